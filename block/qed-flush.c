/*
 * Flush: the order in which memory becomes disk.
 *
 *     under the lock   copy the dirty sectors of all tables; the generation ends
 *                      BARRIER   covers guest data and new, zeroed tables
 *                      write the copies, of L1 and L2 alike
 *                      BARRIER   only if there were any
 *     then             release what was freed in the generation
 *
 * Whatever the copies point to was written before they were taken, so it is stable before they are
 * written (QED 1).  The order among L1 and L2 does not matter: a new table is zero on the disk
 * before L1 can name it, and an entry of it points to stable data.
 *
 * Invariants
 *  1. One flush at a time; those who come while one runs share the next one, which covers all that
 *     they did before.
 *  2. After a failure everything is dirty that was not made stable, and nothing is released.
 *  3. The lock is not held across I/O; the turn is a flag.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qed.h"

typedef struct QedFlushRound {
    unsigned refs;
    bool done;
    int ret;
} QedFlushRound;

static int barrier(BlockDriverState *bs)
{
    bdrv_debug_event(bs->file, "flush_to_disk");
    return bdrv_flush(bs->file->bs);
}

static int write_pieces(BlockDriverState *bs, const GArray *pieces)
{
    g_autoptr(GArray) ops = g_array_new(false, true, sizeof(BdrvBatchOp));
    for (guint i = 0; i < pieces->len; i++) {
        const QedPiece *p = &g_array_index(pieces, QedPiece, i);
        BdrvBatchOp op = {.kind = BDRV_BATCH_WRITE, .offset = (int64_t)p->offset,
                          .bytes = (int64_t)p->bytes, .buf = p->data};
        g_array_append_val(ops, op);
    }
    bdrv_debug_event(bs->file, "l1_update");
    int ret = bdrv_run_batch(bs->file, (BdrvBatchOp *)ops->data, ops->len);
    return ret < 0 ? ret : barrier(bs);
}

static uint64_t end_generation(BDRVQedState *s, GArray *pieces)
{
    QB_GUARD(&s->lock);
    qed_pages_collect_locked(s, pieces);
    return s->flush.generation++;
}

static int flush_once(BlockDriverState *bs)
{
    BDRVQedState *s = qed_state(bs);
    g_autoptr(GArray) pieces = g_array_new(false, false, sizeof(QedPiece));
    uint64_t generation = end_generation(s, pieces);
    bdrv_debug_event(bs->file, "flush_to_os");
    int ret = barrier(bs);
    if (ret == 0 && pieces->len) {
        ret = write_pieces(bs, pieces);
    }
    qed_pages_return(s, pieces, ret < 0);
    if (ret == 0) {
        qed_release(bs, generation);
    }
    return ret;
}

static void lead_locked(BDRVQedState *s, QedFlushRound *round) QB_REQUIRES(s->lock)
{
    s->flush.running = true;
    s->flush.next = NULL;
    qb_mutex_unlock(&s->lock);
    int ret = flush_once(s->bs);
    qb_mutex_lock(&s->lock);
    s->flush.running = false;
    round->ret = ret;
    round->done = true;
    qb_cond_broadcast(&s->changed);
}

int qed_flush(BlockDriverState *bs)
{
    BDRVQedState *s = qed_state(bs);
    QB_GUARD(&s->lock);
    if (!s->flush.next) {
        s->flush.next = g_new0(QedFlushRound, 1);
    }
    QedFlushRound *round = s->flush.next;
    round->refs++;
    while (!round->done) {
        if (s->flush.running) {
            qb_cond_wait(&s->changed, &s->lock);
        } else {
            lead_locked(s, round);
        }
    }
    int ret = round->ret;
    if (--round->refs == 0) {
        g_free(round);
    }
    return ret;
}

int qed_relieve(BlockDriverState *bs)
{
    BDRVQedState *s = qed_state(bs);
    return qed_pages_too_dirty(s) || qed_freed_too_much(s) ? qed_flush(bs) : 0;
}
