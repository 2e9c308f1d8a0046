/*
 * Dropping all guest data of an overlay, so that it reads as its backing file again.
 *
 *     1 flush
 *     2 full discard of everything L1 maps, VM state too: L1 entries go, in place, sector by
 *     sector;
 *       whole tables at once; what they referred to goes through quarantine
 *     3 flush: stable; quarantine empty
 *     4 L1 to the lowest free place, if that is lower, by one header write
 *     5 refcount blocks that count nothing; end of the file
 *
 * Invariants
 *  1. Each sector of L1 that becomes stable takes tables out of the image completely; nothing of
 *     them is punched or reused before.  So a crash leaves each guest cluster either as it was or
 *     as the backing file has it, which is the same after a commit, and at most leaks.
 *  2. Snapshots, bitmaps and the crypto header keep their clusters: counts go down by one.
 *  3. Nothing is allocated but a new L1, and without room for that the old one stays.
 *
 * Not done: refcount table and blocks are not moved to the front.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2.h"

static int drop_everything(BlockDriverState *bs)
{
    BDRVQcow2State *s = qcow2_state(bs);
    unsigned shift = s->cluster_bits + s->l2_bits;
    uint64_t span = MIN((uint64_t)qcow2_l1_size(s), (uint64_t)INT64_MAX >> shift) << shift;
    if (!span) {
        return 0;
    }
    int ret = qcow2_discard_clusters(bs, 0, span, QCOW2_DISCARD_FULL, QCOW2_DISCARD_ALWAYS);
    return ret < 0 ? ret : qcow2_flush_all(bs);
}

/* ---------------------------------------------------------------- L1 to the front */

typedef struct NewL1 {
    uint64_t offset, bytes;
    uint32_t size;
} NewL1;

static void switch_l1(Qcow2Header *h, void *opaque)
{
    const NewL1 *l1 = opaque;
    h->l1_offset = l1->offset;
    h->l1_size = l1->size;
}

/* All entries are 0 by now, and all is stable. The new table is as long as the disk needs. */
static int switch_to(BlockDriverState *bs, const NewL1 *l1)
{
    BDRVQcow2State *s = qcow2_state(bs);
    uint64_t old_offset = qcow2_l1_table_offset(s);
    uint64_t old_bytes = qb_align_up((uint64_t)qcow2_l1_size(s) * 8, s->cluster_size);
    g_autofree uint64_t *be = g_try_malloc0(l1->bytes + 8);
    int ret = be ? bdrv_pwrite(bs->file, (int64_t)l1->offset, (int64_t)l1->bytes, be, 0) : -ENOMEM;
    ret = ret < 0 ? ret : qcow2_flush(bs);
    ret = ret < 0 ? ret : qcow2_header_update(bs, switch_l1, (void *)l1, true);
    if (ret < 0) {
        qcow2_free_run(bs, l1->offset, l1->bytes, QCOW2_DISCARD_ALWAYS);
        return ret;
    }
    qcow2_l1_replace(s, g_steal_pointer(&be), l1->size, l1->offset);
    qcow2_free_run(bs, old_offset, old_bytes, QCOW2_DISCARD_ALWAYS);
    return qcow2_flush_all(bs);
}

static int move_l1(BlockDriverState *bs)
{
    BDRVQcow2State *s = qcow2_state(bs);
    NewL1 l1 = {.size = MAX(qcow2_size_to_l1(s, s->header.size), 1)};
    l1.bytes = qb_align_up((uint64_t)l1.size * 8, s->cluster_size);
    int64_t offset = qcow2_l1_size(s) ? qcow2_alloc_clusters(bs, l1.bytes) : -ENOSPC;
    if (offset < 0) {
        return 0; /* no room: it stays where it is */
    }
    l1.offset = (uint64_t)offset;
    if (l1.offset > qcow2_l1_table_offset(s)) {
        qcow2_alloc_undo(bs, l1.offset, l1.bytes);
        return 0;
    }
    return switch_to(bs, &l1);
}

/* ---------------------------------------------------------------- */

bool qcow2_make_empty(BlockDriverState *bs, GError **errp)
{
    if (qcow2_state(bs)->data_file_raw) {
        qb_error_set(errp, ENOTSUP, "An image with a raw data file has nothing below it to show");
        return false;
    }
    int ret = qcow2_flush_all(bs);
    ret = ret < 0 ? ret : drop_everything(bs);
    ret = ret < 0 ? ret : move_l1(bs);
    ret = ret < 0 ? ret : qcow2_refcount_shrink(bs);
    ret = ret < 0 ? ret : qcow2_flush_all(bs);
    ret = ret < 0 ? ret : qcow2_cut_file(bs);
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Failed to empty the image");
    }
    return ret == 0;
}
