/*
 * Batches: many operations on one node, run at depth, done when the call returns.
 *
 *   ops    [ W ][ W ][ R unaligned ][ Z ][ W ] ...
 *            |    |          |        |    |
 *            '----+----------|--------+----'    fit: one call of the driver's run_batch, which
 *                            |                  has io_uring or threads below it
 *                            '                  others, and all where the driver has no run_batch:
 *                                               ordinary requests, several at a time
 *
 * Ordinary requests are shared out by a cursor: the calling thread and helpers in the request pool
 * take the next operation until there is none.  The caller never waits for a helper that has not
 * taken one, so that it gets done alone, too, when all threads of the pool are busy (perhaps with
 * batches).
 *
 * What goes to the driver is one request in the node's range lock, from the lowest to the highest
 * byte that is written, and a plain one.  Entering one by one could wait for a request that waits
 * for those already entered.
 *
 * Invariants
 *  1. A Crew lives until the last helper has let go of it; ops are touched only by who took them.
 *  2. Helpers act for the caller's request and borrow its graph entry, between taking an operation
 *     and reporting it done.
 *  3. FUA of the operations that go to the driver is one flush after them.
 *  4. What the core has something to say about goes the ordinary way: zeroes and discards,
 *     alignment, the end of the node, copy-on-read, detect-zeroes, errors.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/io-int.h"
#include "util/pool.h"

#include <string.h>

#define HELPERS_MAX 15 /* depth 16 with the caller */

/* --- ordinary requests, several at a time --- */

typedef struct Crew {
    QbMutex lock;
    QbCond all_done;
    unsigned refs;       /* the caller and the helpers */
    size_t next, done;   /* operations taken, operations finished */
    BdrvChild *child;
    BdrvBatchOp **ops;
    size_t n;
} Crew;

static int run_op(BdrvChild *child, const BdrvBatchOp *op)
{
    switch (op->kind) {
    case BDRV_BATCH_READ:
        return bdrv_pread(child, op->offset, op->bytes, op->buf, op->flags);
    case BDRV_BATCH_WRITE:
        return bdrv_pwrite(child, op->offset, op->bytes, op->buf, op->flags);
    case BDRV_BATCH_ZERO:
        return bdrv_pwrite_zeroes(child, op->offset, op->bytes, op->flags);
    case BDRV_BATCH_DISCARD:
        return bdrv_pdiscard(child, op->offset, op->bytes);
    }
    assert(!"unknown kind of batch operation");
    return -EINVAL;
}

static BdrvBatchOp *take_op(Crew *c)
{
    QB_GUARD(&c->lock);
    return c->next < c->n ? c->ops[c->next++] : NULL;
}

static void report_op(Crew *c)
{
    QB_GUARD(&c->lock);
    c->done++;
    if (c->done == c->n) {
        qb_cond_broadcast(&c->all_done);
    }
}

static void work(Crew *c)
{
    BdrvBatchOp *op;
    while ((op = take_op(c))) {
        op->ret = run_op(c->child, op);
        report_op(c);
    }
}

/* As work(), in a thread that has no graph entry of its own: a loan covers each operation. */
static void work_on_loan(Crew *c)
{
    BdrvBatchOp *op;
    while ((op = take_op(c))) {
        bdrv_graph_borrow();
        op->ret = run_op(c->child, op);
        bdrv_graph_return();
        report_op(c);
    }
}

static void crew_leave(Crew *c)
{
    qb_mutex_lock(&c->lock);
    bool last = --c->refs == 0;
    qb_mutex_unlock(&c->lock);
    if (last) {
        qb_cond_destroy(&c->all_done);
        qb_mutex_destroy(&c->lock);
        g_free(c->ops);
        g_free(c);
    }
}

static void help(void *opaque)
{
    work_on_loan(opaque);
    crew_leave(opaque);
}

/* Takes @ops, an array of pointers. */
static Crew *crew_new(BdrvChild *child, BdrvBatchOp **ops, size_t n)
{
    Crew *c = g_new0(Crew, 1);
    qb_mutex_init(&c->lock);
    qb_cond_init(&c->all_done);
    c->child = child;
    c->ops = ops;
    c->n = n;
    c->refs = 1;
    return c;
}

static void crew_hire(Crew *c)
{
    size_t helpers = MIN(c->n - 1, HELPERS_MAX);
    c->refs += (unsigned)helpers; /* nobody else knows it yet */
    for (size_t i = 0; i < helpers; i++) {
        qb_pool_submit(qb_request_pool(), help, c);
    }
}

static void crew_wait(Crew *c)
{
    QB_GUARD(&c->lock);
    while (c->done < c->n) {
        qb_cond_wait(&c->all_done, &c->lock);
    }
}

/* Runs @ops as ordinary requests; takes the array of pointers. */
static void run_ordinary(BdrvChild *child, BdrvBatchOp **ops, size_t n)
{
    Crew *c = crew_new(child, ops, n);
    if (n > 1) {
        crew_hire(c);
    }
    work(c);
    crew_wait(c);
    crew_leave(c);
}

/* --- the driver's batches --- */

/* True when the node leaves operations of this kind to its driver (invariant 4). */
static bool node_batches(BlockDriverState *bs, BdrvBatchKind kind)
{
    if (!bs->drv->run_batch) {
        return false;
    }
    if (kind == BDRV_BATCH_READ) {
        return !(bs->open_flags & BDRV_O_COPY_ON_READ);
    }
    return kind == BDRV_BATCH_WRITE && !bs->read_only && !bs->detect_zeroes &&
           !atomic_load(&bs->dirty.watched);
}

/* True when the core would hand the operation to the driver as it is. */
static bool op_fits(BlockDriverState *bs, const BdrvBatchOp *op, int64_t length)
{
    const BlockLimits *bl = &bs->bl;
    const int known_flags = BDRV_REQ_FUA | BDRV_REQ_REGISTERED_BUF | BDRV_REQ_UNCHANGED;
    if (!node_batches(bs, op->kind) || (op->flags & ~known_flags) || op->bytes <= 0
        || !qb_range_valid(op->offset, op->bytes)) {
        return false;
    }
    bool inside = op->offset + op->bytes <= length;
    bool may_grow = op->kind == BDRV_BATCH_WRITE && bdrv_can_grow(bs);
    return (inside || may_grow)
           && op->bytes <= bdrv_limit_aligned(bl->max_transfer, bl->request_alignment)
           && qb_is_aligned((uint64_t)(op->offset | op->bytes), bl->request_alignment)
           && qb_is_aligned((uintptr_t)op->buf | (uint64_t)op->bytes, bl->min_mem_alignment);
}

typedef struct Split {
    BdrvBatchOp *fit;       /* copies, side by side for the driver, without FUA */
    BdrvBatchOp **fit_from; /* the originals */
    BdrvBatchOp **other;
    size_t n_fit, n_other;
} Split;

static void split_clear(Split *s)
{
    g_free(s->fit);
    g_free(s->fit_from);
    g_free(s->other);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Split, split_clear)

static void split_ops(BlockDriverState *bs, BdrvBatchOp *ops, size_t n, Split *s)
{
    int64_t length = bdrv_getlength(bs);
    s->fit = g_new(BdrvBatchOp, n);
    s->fit_from = g_new(BdrvBatchOp *, n);
    s->other = g_new(BdrvBatchOp *, n);
    for (size_t i = 0; i < n; i++) {
        if (length >= 0 && op_fits(bs, &ops[i], length)) {
            s->fit_from[s->n_fit] = &ops[i];
            s->fit[s->n_fit] = ops[i];
            s->fit[s->n_fit++].flags &= ~BDRV_REQ_FUA;
        } else {
            s->other[s->n_other++] = &ops[i];
        }
    }
}

/* Counts the operations as one request: for the range that is written, if any. */
static void begin_batch(BlockDriverState *bs, const Split *s, BdrvRequest *req, int64_t *ret_end)
{
    int64_t offset = INT64_MAX, end = 0;
    for (size_t i = 0; i < s->n_fit; i++) {
        if (s->fit[i].kind == BDRV_BATCH_WRITE) {
            offset = MIN(offset, s->fit[i].offset);
            end = MAX(end, s->fit[i].offset + s->fit[i].bytes);
        }
    }
    if (end == 0) {
        bdrv_request_begin(req, bs, BDRV_TRACKED_READ, 0, 0);
    } else {
        bdrv_request_begin(req, bs, BDRV_TRACKED_WRITE, offset, end - offset);
        bdrv_request_enter(req);
        bdrv_request_settle(req);
    }
    *ret_end = end;
}

/* -ENOTSUP: the driver declined, nothing has happened. */
static int run_in_driver(BlockDriverState *bs, Split *s)
{
    BdrvRequest req;
    int64_t end;
    begin_batch(bs, s, &req, &end);
    int ret = bs->drv->run_batch(bs, s->fit, s->n_fit);
    if (ret != -ENOTSUP) {
        bdrv_raise_length(bs, end);
    }
    bdrv_request_end(&req);
    return ret;
}

static void flush_for_fua(BlockDriverState *bs, const Split *s)
{
    int ret = 0;
    bool flushed = false;
    for (size_t i = 0; i < s->n_fit; i++) {
        BdrvBatchOp *op = s->fit_from[i];
        if (op->kind != BDRV_BATCH_WRITE || !(op->flags & BDRV_REQ_FUA) || op->ret < 0) {
            continue;
        }
        if (!flushed) {
            ret = bdrv_flush(bs);
            flushed = true;
        }
        op->ret = ret;
    }
}

/* Operations the driver declines to run together become ordinary ones. */
static void run_fitting(BlockDriverState *bs, Split *s)
{
    if (s->n_fit == 0) {
        return;
    }
    if (run_in_driver(bs, s) == -ENOTSUP) {
        memcpy(s->other + s->n_other, s->fit_from, s->n_fit * sizeof(*s->other));
        s->n_other += s->n_fit;
        return;
    }
    for (size_t i = 0; i < s->n_fit; i++) {
        s->fit_from[i]->ret = s->fit[i].ret;
    }
    flush_for_fua(bs, s);
}

int bdrv_run_batch(BdrvChild *child, BdrvBatchOp *ops, size_t n)
{
    if (n == 0) {
        return 0;
    }
    BDRV_GRAPH_GUARD();
    g_auto(Split) split = {0};
    split_ops(child->bs, ops, n, &split);
    run_fitting(child->bs, &split);
    if (split.n_other > 0) {
        run_ordinary(child, g_steal_pointer(&split.other), split.n_other);
    }
    for (size_t i = 0; i < n; i++) {
        if (ops[i].ret < 0) {
            return ops[i].ret;
        }
    }
    return 0;
}

/* --- making one --- */

void bdrv_batch_add(GArray *ops, BdrvBatchKind kind, int64_t offset, int64_t bytes,
                    const IoVector *qiov, size_t qiov_offset)
{
    IOV_VECTOR_AUTO part;
    iov_vector_init_slice(&part, qiov, qiov_offset, (size_t)bytes);
    for (int i = 0; i < part.niov; i++) {
        BdrvBatchOp op = {
            .kind = kind,
            .offset = offset,
            .bytes = (int64_t)part.iov[i].iov_len,
            .buf = part.iov[i].iov_base,
        };
        g_array_append_val(ops, op);
        offset += op.bytes;
    }
}
