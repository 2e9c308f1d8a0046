/*
 * Snapshots and bitmaps, as compaction sees them: parts, each named by another one, the first of
 * them by the header.
 *
 *     header --> table of snapshots --> L1, L1, ...
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
 * Not done: L2 tables that only snapshots have; the LUKS area, which is as old as the image, and so
 * lies in front.
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

static int compare_copies(const void *key, const void *element)
{
    uint64_t from = *(const uint64_t *)key;
    const Qcow2MoveCopy *copy = element;
    return from < copy->from ? -1 : from > copy->from;
}

uint64_t qcow2_parts_place(const Qcow2PartsMove *m, uint64_t offset, uint64_t bytes)
{
    const Qcow2MoveCopy *copy = m->places->len
                                    ? bsearch(&offset, m->places->data, m->places->len,
                                              sizeof(Qcow2MoveCopy), compare_copies)
                                    : NULL;
    return copy && copy->bytes == bytes ? copy->to : 0;
}

void qcow2_parts_free_old(BlockDriverState *bs, const Qcow2PartsMove *m, uint64_t except)
{
    for (guint i = 0; i < m->places->len; i++) {
        const Qcow2MoveCopy *copy = &g_array_index(m->places, Qcow2MoveCopy, i);
        if (copy->from != except) {
            qcow2_free_run(bs, copy->from, copy->bytes, m->type);
        }
    }
}

void qcow2_parts_free_new(BlockDriverState *bs, const Qcow2PartsMove *m, uint64_t except)
{
    for (guint i = 0; i < m->places->len; i++) {
        const Qcow2MoveCopy *copy = &g_array_index(m->places, Qcow2MoveCopy, i);
        if (copy->to != except) {
            qcow2_free_run(bs, copy->to, copy->bytes, QCOW2_DISCARD_ALWAYS);
        }
    }
}
