/*
 * What is dirty in the cache: copies of it for a flush, and what becomes of them.
 *
 *      dirty list of a shard --collect--> pieces: copied runs of dirty sectors; tables pinned, clean
 *                            <--return--- written: unpinned;  failed: dirty again
 *
 * Invariants
 * 1. Between collecting and returning, a table stays in memory: its pieces hold a pin each.
 * 2. All or nothing: when there is no memory for a copy, what was collected becomes dirty again.
 * 3. Clean sectors of a table are what the disk has.  Few of them between dirty ones are written
 *    again: a write of two pages costs less than two writes.  They are of dirty parts only: these
 *    stay under the piece's pin, should it fail and become dirty again.
 *
 * The order in which pieces are written is qcow2-flush.c's business.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-cache-int.h"

#include <stdlib.h>

#include "util/iov.h"

#define SMALL_GAP 4096 /* bytes */

static bool sector_dirty(const Qcow2Table *t, unsigned i)
{
    return t->dirty[i / 64] & (UINT64_C(1) << (i % 64));
}

static bool collect_run_locked(Qcow2Table *t, unsigned first, unsigned end, GArray *pieces)
{
    size_t sector = t->cache->sector, bytes = (end - first) * sector;
    Qcow2DirtyPiece piece = {.offset = t->offset + first * sector, .bytes = bytes, .table = t,
                             .unlinked = t->unlinked,
                             .data = qb_try_memalign(4096, MAX(bytes, 4096))};

    if (!piece.data) {
        return false;
    }
    qcow2_table_copy_out_locked(t, first * sector, bytes, piece.data);
    t->pins++;
    g_array_append_val(pieces, piece);
    return true;
}

static bool in_dirty_part_locked(const Qcow2Table *t, unsigned i)
{
    const Part *p = t->parts[i * t->cache->sector / t->part_bytes];

    return p && p->list == &t->dirty_parts;
}

/* Where the run ends that begins with the dirty sector @first (invariant 3). */
static unsigned run_end_locked(const Qcow2Table *t, unsigned first)
{
    unsigned end = first + 1, gap = (unsigned)(SMALL_GAP / t->cache->sector);

    for (unsigned i = end; i < t->cache->nb_sectors && i <= end + gap; i++) {
        if (sector_dirty(t, i)) {
            end = i + 1;
        } else if (!in_dirty_part_locked(t, i)) {
            break;
        }
    }
    return end;
}

static bool collect_table_locked(Qcow2Table *t, GArray *pieces)
{
    unsigned n = t->cache->nb_sectors;

    for (unsigned first = 0, end; first < n; first = end) {
        end = first + 1;
        if (!sector_dirty(t, first)) {
            continue;
        }
        end = run_end_locked(t, first);
        if (!collect_run_locked(t, first, end, pieces)) {
            return false;
        }
    }
    qcow2_table_set_clean_locked(t);
    t->unlinked = false;
    return true;
}

static bool collect_shard(Shard *shard, Qcow2TableKind kind, GArray *pieces)
{
    QB_GUARD(&shard->lock);
    GList *next;

    for (GList *l = shard->dirty.head; l; l = next) {
        Qcow2Table *t = l->data;
        next = l->next;
        if (t->kind == kind && !collect_table_locked(t, pieces)) {
            return false;
        }
    }
    return true;
}

static gint compare_pieces(gconstpointer a, gconstpointer b)
{
    const Qcow2DirtyPiece *pa = a, *pb = b;

    return pa->offset < pb->offset ? -1 : pa->offset > pb->offset;
}

int qcow2_cache_collect_dirty(Qcow2Cache *c, Qcow2TableKind kind, GArray *pieces)
{
    for (int i = 0; i < NB_SHARDS; i++) {
        if (!collect_shard(&c->shards[i], kind, pieces)) {
            qcow2_cache_return_pieces(c, pieces, true, true);
            return -ENOMEM;
        }
    }
    g_array_sort(pieces, compare_pieces);
    return 0;
}

static void return_piece(Qcow2DirtyPiece *p, bool failed, bool relink)
{
    Qcow2Table *t = p->table;
    Shard *shard = t->shard; /* the last unpin may free the table */
    QB_GUARD(&shard->lock);

    if (failed) {
        qcow2_table_set_dirty_locked(t, (size_t)(p->offset - t->offset), p->bytes);
        t->unlinked |= relink && p->unlinked;
    }
    qcow2_table_unpin_locked(t);
}

void qcow2_cache_return_pieces(Qcow2Cache *c, GArray *pieces, bool failed, bool relink)
{
    for (guint i = 0; i < pieces->len; i++) {
        Qcow2DirtyPiece *p = &g_array_index(pieces, Qcow2DirtyPiece, i);
        if (p->table) {
            return_piece(p, failed, relink);
        }
        free(p->data);
    }
    g_array_set_size(pieces, 0);
}
