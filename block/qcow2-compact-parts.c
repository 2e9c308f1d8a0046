/*
 * Snapshots and bitmaps, as compaction sees them: parts, each named by another one, the first of
 * them by the header.
 *
 *     header --> table of snapshots --> L1 --> L2 table that nothing else has, ...
 *                                   '-> L1 --> ...
 *     header --> directory of bitmaps --> table --> cluster of bits, ...
 *                                     '-> table --> ...
 *
 * A pointer in a part is never changed in place.  So a part that moves takes along what names it,
 * up to the header: that is written anew, wherever it lay, and one write of the header switches to
 * it.  What the bytes of a part mean is known only to its room.
 *
 * Invariants
 *  1. Up to the header's write nothing names the new places; after it nothing names the old ones.
 *     Either go by way of quarantine: a header write that failed may show after a crash.
 *  2. A part has count 1 and is named once; what is otherwise stays (qcow2-compact-plan.c).
 *
 * Not done: L2 tables that several snapshots have, or a snapshot and the guest; the LUKS area, which
 * is as old as the image, and so lies in front.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-compact.h"

#include <stdlib.h>

uint64_t qcow2_parts_taken_along(const GArray *parts, uint64_t end)
{
    g_autofree bool *along = g_new0(bool, parts->len + 1);
    uint64_t bytes = 0;
    for (guint i = parts->len; i > 0; i--) { /* what names a part comes before it */
        const Qcow2Part *part = &g_array_index(parts, Qcow2Part, i - 1);
        assert(part->parent < i);
        bool behind = part->offset >= end;
        bytes += along[i - 1] && !behind ? part->bytes : 0;
        along[part->parent] |= behind || along[i - 1];
    }
    return bytes;
}

/* ---------------------------------------------------------------- moving */

static int compare_copies(const void *key, const void *element)
{
    uint64_t from = *(const uint64_t *)key;
    const Qcow2MoveCopy *copy = element;
    return from < copy->from ? -1 : from > copy->from;
}

uint64_t qcow2_parts_place(Qcow2PartsMove *m, uint64_t offset, uint64_t bytes)
{
    const Qcow2MoveCopy *copy = m->places->len
                                    ? bsearch(&offset, m->places->data, m->places->len,
                                              sizeof(Qcow2MoveCopy), compare_copies)
                                    : NULL;
    if (!copy || copy->bytes != bytes) {
        return 0;
    }
    m->found++;
    return copy->to;
}

uint64_t qcow2_parts_renew(Qcow2PartsMove *m, uint64_t offset, uint64_t bytes)
{
    uint64_t place = qcow2_parts_place(m, offset, bytes);
    if (place) {
        return place;
    }
    Qcow2MoveCopy copy = {.from = offset, .to = m->more(m->opaque, bytes), .bytes = bytes};
    if (copy.to) {
        g_array_append_val(m->extra, copy);
    }
    return copy.to;
}

bool qcow2_parts_all_found(const Qcow2PartsMove *m)
{
    return m->found == m->places->len;
}

static void free_new(BlockDriverState *bs, const GArray *copies, uint64_t first)
{
    for (guint i = 0; i < copies->len; i++) {
        const Qcow2MoveCopy *copy = &g_array_index(copies, Qcow2MoveCopy, i);
        if (copy->to != first) {
            qcow2_free_run(bs, copy->to, copy->bytes, QCOW2_DISCARD_ALWAYS);
        }
    }
}

/* Nobody has looked so far at the counts of a part that lay before the end. */
static bool is_alone(BlockDriverState *bs, const Qcow2MoveCopy *copy)
{
    uint64_t count, bytes;
    int ret = qcow2_count_run(bs, copy->from, copy->bytes, &count, &bytes);
    return ret == 0 && count == 1 && bytes == copy->bytes;
}

static void free_old(BlockDriverState *bs, const GArray *copies, uint64_t first,
                     Qcow2DiscardType type)
{
    for (guint i = 0; i < copies->len; i++) {
        const Qcow2MoveCopy *copy = &g_array_index(copies, Qcow2MoveCopy, i);
        if (copy->from != first && is_alone(bs, copy)) {
            qcow2_free_run(bs, copy->from, copy->bytes, type);
        }
    }
}

void qcow2_parts_done(BlockDriverState *bs, const Qcow2PartsMove *m, bool moved, uint64_t first)
{
    if (moved) {
        free_old(bs, m->places, first, m->type);
        free_old(bs, m->extra, first, QCOW2_DISCARD_OTHER);
    } else {
        free_new(bs, m->places, first);
        free_new(bs, m->extra, first);
    }
}
