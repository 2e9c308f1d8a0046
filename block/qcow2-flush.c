/*
 * Flush: the order in which memory becomes disk.
 *
 *   under the metadata lock    take empty L2 tables out of the L1 (qcow2-prune.c)
 *                              copy dirty L2 sectors and the L1
 *     and the alloc lock too   copy dirty refcount blocks, refcount table; the generation ends
 *   ------------------------------------------------------------------------------------------
 *   phase 1   L2 tables copied to a new place, all refcount blocks, a refcount table or L1 at a new
 *             place
 *             BARRIER (covers guest data too; an external data file's comes first)
 *   phase 1b  only for new refcount blocks: refcount table entries, or the header's switch to the
 *             new table
 *             BARRIER
 *   phase 2   sectors of other L2 tables, of the L1, or the header's switch to the new L1; sectors
 *             of bitmap tables, while these are being stored
 *             BARRIER
 *   then      release quarantine up to the generation that ended
 *
 * Why that is enough.  What phase 2 links was written (data) or copied (tables, counts) before the
 * first barrier, so a stable pointer points to stable content (invariants 0, 2) with a stable count
 * (1): an allocation raises the count in memory before anything can link it, and counts go down
 * only after the unlink is stable.  What is linked after the copy waits for the next flush.  L2
 * tables that began empty were zeroes in the file before the L1 named them in memory, so the first
 * barrier covers these as it does data, and nothing is left to be written in phase 1.
 *
 * Invariants
 * 1. One flush at a time.  Callers that arrive while one runs share the next one: they joined a
 *    round that had not begun, so it covers what they did before.
 * 2. A failed phase leaves everything dirty that it did not make stable.  A table is "unlinked"
 *    again only when the first barrier did not pass; afterwards a pointer to it may be on disk.
 * 3. No mutex is held across I/O here; the flusher's turn is a flag.
 * 4. A generation ends while both locks are held that changes are made under.  So whatever is freed
 *    in a generation was unlinked in a table that its flush, or one before, has copied.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2.h"

#include <stdlib.h>

typedef struct FlushRound {
    unsigned refs;
    bool done;
    int ret;
} FlushRound;

struct Qcow2Flusher {
    QbMutex lock;
    QbCond changed;
    FlushRound *next; /* the round that late comers join */
    bool running;
    _Atomic(uint64_t) generation; /* ended by the next copy; invariant 4 */
};

/* What one flush writes. */
typedef struct FlushCopy {
    uint64_t generation;
    GArray *l2, *refblocks, *reftable, *l1; /* Qcow2DirtyPiece */
    Qcow2L1Copy l1_copy;
    Qcow2ReftableCopy reftable_copy;
    GArray *bitmap_tables; /* BdrvBatchOp, or NULL */
    bool phase1_stable;
} FlushCopy;

Qcow2Flusher *qcow2_flusher_new(void)
{
    Qcow2Flusher *f = g_new0(Qcow2Flusher, 1);

    qb_mutex_init(&f->lock);
    qb_cond_init(&f->changed);
    atomic_store(&f->generation, 1);
    return f;
}

void qcow2_flusher_free(Qcow2Flusher *f)
{
    if (f) {
        assert(!f->running && !f->next);
        qb_cond_destroy(&f->changed);
        qb_mutex_destroy(&f->lock);
        g_free(f);
    }
}

uint64_t qcow2_flush_generation(BDRVQcow2State *s)
{
    return atomic_load(&s->flusher->generation);
}

bool qcow2_is_clean(BDRVQcow2State *s)
{
    bool reftable_clean;

    qb_mutex_lock(&s->alloc_lock);
    reftable_clean = !s->reftable.moved && s->reftable.dirty->len == 0;
    qb_mutex_unlock(&s->alloc_lock);
    return reftable_clean && qcow2_cache_dirty_bytes(s->cache) == 0 && qcow2_l1_is_clean(s) &&
           qcow2_quarantine_bytes(s) == 0;
}

/* ---- copying ---- */

static GArray *new_pieces(void)
{
    return g_array_new(FALSE, FALSE, sizeof(Qcow2DirtyPiece));
}

static void copy_init(FlushCopy *c)
{
    *c = (FlushCopy){.l2 = new_pieces(), .refblocks = new_pieces(), .reftable = new_pieces(),
                     .l1 = new_pieces()};
}

static int copy_refcounts(BDRVQcow2State *s, FlushCopy *c)
{
    QB_GUARD(&s->alloc_lock);
    int ret = qcow2_cache_collect_dirty(s->cache, QCOW2_TABLE_REFBLOCK, c->refblocks);

    if (ret == 0) {
        ret = qcow2_reftable_collect_locked(s, c->reftable, &c->reftable_copy);
    }
    if (ret == 0) {
        c->generation = atomic_fetch_add(&s->flusher->generation, 1);
    }
    return ret;
}

static int copy_map(BDRVQcow2State *s, FlushCopy *c)
{
    qcow2_fetch_cleared_tables(s->bs);
    c->bitmap_tables = qcow2_bitmaps_take_tables(s);
    QB_GUARD(&s->lock);
    int ret;

    qcow2_drop_empty_tables_locked(s);
    ret = qcow2_cache_collect_dirty(s->cache, QCOW2_TABLE_L2, c->l2);

    if (ret == 0) {
        ret = qcow2_l1_collect_locked(s, c->l1, &c->l1_copy);
    }
    return ret < 0 ? ret : copy_refcounts(s, c);
}

/* Gives everything back: clean after success, dirty again where it failed. Nobody else collects
 * meanwhile (invariant 1), so the locks of the kinds are not needed. */
static void copy_finish(BDRVQcow2State *s, FlushCopy *c, bool failed)
{
    bool relink = failed && !c->phase1_stable;

    qcow2_l1_done(s, c->l1, &c->l1_copy, failed);
    qcow2_reftable_done(s, c->reftable, &c->reftable_copy, failed);
    qcow2_cache_return_pieces(s->cache, c->l2, failed, relink);
    qcow2_cache_return_pieces(s->cache, c->refblocks, failed, relink);
    qcow2_cache_return_pieces(s->cache, c->reftable, false, false);
    qcow2_cache_return_pieces(s->cache, c->l1, false, false);
    g_array_free(c->l2, TRUE);
    g_array_free(c->refblocks, TRUE);
    g_array_free(c->reftable, TRUE);
    g_array_free(c->l1, TRUE);
    g_clear_pointer(&c->bitmap_tables, g_array_unref);
}

/* ---- writing ---- */

typedef enum PieceChoice { PIECES_ALL, PIECES_UNLINKED, PIECES_LINKED } PieceChoice;

static void add_ops(GArray *ops, const GArray *pieces, PieceChoice choice)
{
    for (guint i = 0; i < pieces->len; i++) {
        const Qcow2DirtyPiece *p = &g_array_index(pieces, Qcow2DirtyPiece, i);
        if (choice == PIECES_ALL || p->unlinked == (choice == PIECES_UNLINKED)) {
            BdrvBatchOp op = {.kind = BDRV_BATCH_WRITE, .offset = (int64_t)p->offset,
                              .bytes = (int64_t)p->bytes, .buf = p->data};
            g_array_append_val(ops, op);
        }
    }
}

static int write_ops(BlockDriverState *bs, const GArray *ops)
{
    return ops->len ? bdrv_run_batch(bs->file, (BdrvBatchOp *)ops->data, ops->len) : 0;
}

static int barrier(BlockDriverState *bs)
{
    bdrv_debug_event(bs->file, "flush_to_disk");
    return bdrv_flush(bs->file->bs);
}

/* Guest data goes before anything that may come to point to it. */
static int data_barrier(BlockDriverState *bs)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    bool external = s->data_file && s->data_file != bs->file; /* none: opened for its metadata */
    int ret = external ? bdrv_flush(s->data_file->bs) : 0;

    return ret < 0 ? ret : barrier(bs);
}

static void set_header_reftable(Qcow2Header *h, void *opaque)
{
    const Qcow2ReftableCopy *table = opaque;

    h->reftable_offset = table->offset;
    h->reftable_clusters = table->clusters;
}

static void set_header_l1(Qcow2Header *h, void *opaque)
{
    const Qcow2L1Copy *l1 = opaque;

    h->l1_offset = l1->offset;
    h->l1_size = l1->size;
}

static int phase1(BlockDriverState *bs, FlushCopy *c)
{
    g_autoptr(GArray) ops = g_array_new(FALSE, FALSE, sizeof(BdrvBatchOp));
    int ret;

    add_ops(ops, c->l2, PIECES_UNLINKED);
    add_ops(ops, c->refblocks, PIECES_ALL);
    if (c->reftable_copy.moved) {
        add_ops(ops, c->reftable, PIECES_ALL);
    }
    if (c->l1_copy.moved) {
        add_ops(ops, c->l1, PIECES_ALL);
        bdrv_debug_event(bs->file, "l1_grow_write_table");
    }
    if (c->refblocks->len) {
        bdrv_debug_event(bs->file, "refblock_update_part");
    }
    ret = write_ops(bs, ops);
    if (ret == 0) {
        ret = data_barrier(bs);
    }
    c->phase1_stable = ret == 0;
    return ret;
}

static int phase1b(BlockDriverState *bs, FlushCopy *c)
{
    g_autoptr(GArray) ops = g_array_new(FALSE, FALSE, sizeof(BdrvBatchOp));

    if (c->reftable->len == 0) {
        return 0;
    }
    if (c->reftable_copy.moved) {
        bdrv_debug_event(bs->file, "refblock_alloc_switch_table");
        return qcow2_header_update(bs, set_header_reftable, &c->reftable_copy, true);
    }
    bdrv_debug_event(bs->file, "refblock_alloc_hookup");
    add_ops(ops, c->reftable, PIECES_ALL);
    int ret = write_ops(bs, ops);
    return ret < 0 ? ret : barrier(bs);
}

static int phase2(BlockDriverState *bs, FlushCopy *c)
{
    g_autoptr(GArray) ops = g_array_new(FALSE, FALSE, sizeof(BdrvBatchOp));
    int ret;

    add_ops(ops, c->l2, PIECES_LINKED);
    if (!c->l1_copy.moved) {
        add_ops(ops, c->l1, PIECES_ALL);
    }
    if (c->bitmap_tables) {
        g_array_append_vals(ops, c->bitmap_tables->data, c->bitmap_tables->len);
    }
    if (!ops->len && !c->l1_copy.moved) {
        return 0;
    }
    bdrv_debug_event(bs->file, c->l1->len ? "l1_update" : "l2_update");
    ret = write_ops(bs, ops);
    if (ret == 0 && c->l1_copy.moved) {
        bdrv_debug_event(bs->file, "l1_grow_activate_table");
        ret = qcow2_header_update(bs, set_header_l1, &c->l1_copy, false);
    }
    return ret < 0 ? ret : barrier(bs);
}

/* Nothing is written where the image has something else (qcow2-overlap.c). */
static int guard_pieces(BlockDriverState *bs, const GArray *pieces, Qcow2Overlap own)
{
    int ret = 0;

    for (guint i = 0; i < pieces->len && ret == 0; i++) {
        const Qcow2DirtyPiece *p = &g_array_index(pieces, Qcow2DirtyPiece, i);
        ret = qcow2_check_overlap(bs, own, p->offset, p->bytes);
    }
    return ret;
}

static int guard_copy(BlockDriverState *bs, const FlushCopy *c)
{
    int ret = guard_pieces(bs, c->l2, QCOW2_OL_ACTIVE_L2);

    if (ret == 0) {
        ret = guard_pieces(bs, c->refblocks, QCOW2_OL_REFCOUNT_BLOCK);
    }
    if (ret == 0) {
        ret = guard_pieces(bs, c->l1, QCOW2_OL_ACTIVE_L1);
    }
    return ret < 0 ? ret : guard_pieces(bs, c->reftable, QCOW2_OL_REFCOUNT_TABLE);
}

static int flush_once(BlockDriverState *bs)
{
    BDRVQcow2State *s = qcow2_state(bs);
    FlushCopy c;
    int ret;

    if (atomic_load(&s->corrupt)) {
        return -EIO;
    }
    copy_init(&c);
    ret = copy_map(s, &c);
    if (ret == 0) {
        ret = guard_copy(bs, &c);
    }
    if (ret == 0) {
        bdrv_debug_event(bs->file, "flush_to_os");
        ret = phase1(bs, &c);
    }
    if (ret == 0) {
        ret = phase1b(bs, &c);
    }
    if (ret == 0) {
        ret = phase2(bs, &c);
    }
    copy_finish(s, &c, ret < 0);
    if (ret == 0) {
        /* A release that fails leaks clusters, which check finds; what was flushed is safe. */
        qcow2_quarantine_release(bs, c.generation);
        qcow2_cache_trim(s->cache);
    }
    return ret;
}

/* ---- sharing ---- */

static void lead_locked(BlockDriverState *bs, Qcow2Flusher *f, FlushRound *round)
    QB_REQUIRES(f->lock)
{
    int ret;

    f->running = true;
    f->next = NULL;
    qb_mutex_unlock(&f->lock);
    ret = flush_once(bs);
    qb_mutex_lock(&f->lock);
    f->running = false;
    round->ret = ret;
    round->done = true;
    qb_cond_broadcast(&f->changed);
}

int qcow2_flush(BlockDriverState *bs)
{
    Qcow2Flusher *f = qcow2_state(bs)->flusher;
    FlushRound *round;
    int ret;

    qb_mutex_lock(&f->lock);
    if (!f->next) {
        f->next = g_new0(FlushRound, 1);
    }
    round = f->next;
    round->refs++;
    while (!round->done) {
        if (f->running) {
            qb_cond_wait(&f->changed, &f->lock);
        } else {
            lead_locked(bs, f, round);
        }
    }
    ret = round->ret;
    if (--round->refs == 0) {
        g_free(round);
    }
    qb_mutex_unlock(&f->lock);
    return ret;
}

int qcow2_write_back(BlockDriverState *bs)
{
    return qcow2_flush(bs);
}

bool qcow2_reclaim(BlockDriverState *bs)
{
    uint64_t before = qcow2_quarantine_bytes(qcow2_state(bs));

    return before > 0 && qcow2_flush(bs) == 0 &&
           qcow2_quarantine_bytes(qcow2_state(bs)) < before;
}
