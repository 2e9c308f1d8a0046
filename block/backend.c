/*
 * BlockBackend: a user of the block layer.
 *
 *     user thread                          BlockBackend                 node
 *     blk_pread() ---- begin_request --->  in_flight++  ---root edge--> bdrv_preadv()
 *                                          quiesce > 0: wait here
 *     blk_submit() --- begin, draw ticket, hand to a worker; the worker runs it, calls done(), ends
 *
 * Invariants
 *  1. A request is counted before it takes anything (graph lock, ticket) and until it holds nothing.
 *  2. A request raises in_flight before it looks at quiesce, a drainer raises quiesce before it looks
 *     at in_flight, sequentially consistent: a request either waits or is waited for.
 *  3. The root edge changes only while nothing is in flight; so whoever is counted may use it.
 *  4. With the write cache off, no write is reported before it is stable.
 *
 * Not done: no throttling, no retry policy; those wait here too when they come, before the count.
 *
 * SPDX-License-Identifier: MIT
 */
#include <string.h>
#include "block/core-int.h"
#include "block/open-int.h"
#include "util/checked.h"
#include "util/pool.h"

#define WAITED_FOR (1u << 31)

struct BlockBackend {
    _Atomic(int) refcnt;
    BdrvChild *root; /* set at making */
    _Atomic(unsigned) in_flight; /* requests, and WAITED_FOR */
    _Atomic(unsigned) quiesce;
    _Atomic(bool) write_cache;
    QbMutex lock; /* leaf: only for waiting */
    unsigned idle_waiters; /* guarded by lock; WAITED_FOR is set while there are any */
    QbCond changed;
};

/* --- life --- */

/* Steals the caller's reference to @bs. */
static BlockBackend *new_backend(BlockDriverState *bs, unsigned perm, unsigned shared,
                                 GError **errp)
{
    BlockBackend *blk = g_new0(BlockBackend, 1);
    atomic_init(&blk->refcnt, 1);
    atomic_init(&blk->write_cache, true);
    qb_mutex_init(&blk->lock);
    qb_cond_init(&blk->changed);
    const BdrvAttach at = {.blk = blk, .name = "root", .perm = perm, .shared = shared,
                           .role = BDRV_CHILD_FILTERED | BDRV_CHILD_PRIMARY};
    blk->root = bdrv_attach(&at, bs, errp);
    if (!blk->root) {
        blk_unref(blk);
        return NULL;
    }
    return blk;
}

BlockBackend *blk_new_with_bs(BlockDriverState *bs, unsigned perm, unsigned shared, GError **errp)
{
    bdrv_ref(bs);
    return new_backend(bs, perm, shared, errp);
}

static unsigned perms_of_flags(int flags)
{
    unsigned perm = flags & BDRV_O_NO_IO ? 0 : BLK_PERM_CONSISTENT_READ;
    perm |= flags & BDRV_O_RDWR ? BLK_PERM_WRITE : 0;
    perm |= flags & BDRV_O_RESIZE ? BLK_PERM_RESIZE : 0;
    return perm;
}

BlockBackend *blk_new_open(const char *filename, json_t *options, int flags, GError **errp)
{
    return blk_new_open_guarded(filename, options, flags, NULL, errp);
}

BlockBackend *blk_new_open_guarded(const char *filename, json_t *options, int flags,
                                   const BdrvOpenGuard *guard, GError **errp)
{
    g_autofree char *name = bdrv_spell_name(filename, options);
    unsigned shared = flags & BDRV_O_NO_SHARE ? BLK_PERM_CONSISTENT_READ | BLK_PERM_WRITE_UNCHANGED
                                              : BLK_PERM_ALL;
    BlockDriverState *bs = bdrv_open_guarded(filename, options, flags & ~BDRV_O_NO_SHARE,
                                             guard, errp);
    if (!bs) {
        return NULL;
    }
    if (bs->read_only) { /* an option said so */
        flags &= ~(BDRV_O_RDWR | BDRV_O_RESIZE);
    }
    BlockBackend *blk = new_backend(bs, perms_of_flags(flags), shared, errp);
    if (!blk) {
        bdrv_prefix_open_error(errp, name); /* of another user of the image */
    }
    return blk;
}

void blk_ref(BlockBackend *blk)
{
    int before = atomic_fetch_add(&blk->refcnt, 1);
    assert(before > 0);
    (void)before;
}

bool blk_try_ref(BlockBackend *blk)
{
    int n = atomic_load(&blk->refcnt);
    while (n > 0) {
        if (atomic_compare_exchange_weak(&blk->refcnt, &n, n + 1)) {
            return true;
        }
    }
    return false;
}

/* Users that want to know whether it worked have flushed before. The last user's node is flushed
 * when it is closed, along with what closing adds to it. */
static void flush_root(BlockBackend *blk)
{
    BDRV_GRAPH_GUARD();
    bool last = atomic_load(&blk->root->bs->refcnt) == 1;
    if ((blk->root->perm & BLK_PERM_WRITE) && !last) {
        (void)bdrv_flush(blk->root->bs);
    }
}

static void end_backend(BlockBackend *blk)
{
    assert(!bdrv_graph_held());
    blk_drain(blk);
    if (blk->root) {
        flush_root(blk);
        bdrv_detach_child(blk->root);
    }
    qb_cond_destroy(&blk->changed);
    qb_mutex_destroy(&blk->lock);
    g_free(blk);
}

void blk_unref(BlockBackend *blk)
{
    if (!blk) {
        return;
    }
    int before = atomic_fetch_sub(&blk->refcnt, 1);
    assert(before > 0);
    if (before == 1) {
        end_backend(blk);
    }
}

BlockDriverState *blk_bs(BlockBackend *blk)
{
    return blk->root->bs;
}

BdrvChild *blk_root(BlockBackend *blk)
{
    return blk->root;
}

bool blk_set_perm(BlockBackend *blk, unsigned perm, unsigned shared, GError **errp)
{
    assert(!bdrv_graph_held());
    QB_GUARD(&bdrv_graph_change_lock);
    blk->root->new_perm = perm;
    blk->root->new_shared = shared;
    return bdrv_settle_perms(blk->root->bs, errp);
}

/* --- counting --- */

static void wake_waiters(BlockBackend *blk)
{
    QB_GUARD(&blk->lock);
    qb_cond_broadcast(&blk->changed);
}

void blk_end_request(BlockBackend *blk)
{
    unsigned n = atomic_load(&blk->in_flight);
    while (!(n & WAITED_FOR)) { /* nobody to be woken */
        if (atomic_compare_exchange_weak(&blk->in_flight, &n, n - 1)) {
            return;
        }
    }
    /* Who waits for the last one may free @blk once it sees none, which it looks for under the
     * lock: unlocking is the last touch. */
    QB_GUARD(&blk->lock);
    if (atomic_fetch_sub(&blk->in_flight, 1) == (WAITED_FOR | 1)) {
        qb_cond_broadcast(&blk->changed);
    }
}

bool blk_try_begin_request(BlockBackend *blk)
{
    atomic_fetch_add(&blk->in_flight, 1);
    if (atomic_load(&blk->quiesce) == 0) {
        return true;
    }
    blk_end_request(blk);
    return false;
}

void blk_begin_request(BlockBackend *blk)
{
    assert(!bdrv_graph_held());
    while (!blk_try_begin_request(blk)) {
        QB_GUARD(&blk->lock);
        while (atomic_load(&blk->quiesce) > 0) {
            qb_cond_wait(&blk->changed, &blk->lock);
        }
    }
}

void blk_quiesce(BlockBackend *blk)
{
    atomic_fetch_add(&blk->quiesce, 1);
}

void blk_unquiesce(BlockBackend *blk)
{
    if (atomic_fetch_sub(&blk->quiesce, 1) == 1) {
        wake_waiters(blk);
    }
}

void blk_wait_idle(BlockBackend *blk)
{
    QB_GUARD(&blk->lock);
    blk->idle_waiters++;
    atomic_fetch_or(&blk->in_flight, WAITED_FOR);
    while (atomic_load(&blk->in_flight) & ~WAITED_FOR) {
        qb_cond_wait(&blk->changed, &blk->lock);
    }
    if (--blk->idle_waiters == 0) {
        atomic_fetch_and(&blk->in_flight, ~WAITED_FOR);
    }
}

void blk_drain(BlockBackend *blk)
{
    blk_wait_idle(blk);
}

/* --- modes --- */

bool blk_parse_cache_mode(const char *mode, BlkCacheMode *ret)
{
    static const struct {
        const char *name;
        BlkCacheMode mode; /* direct, no_flush, writethrough */
    } modes[] = {
        {"none", {true, false, false}},       {"off", {true, false, false}},
        {"directsync", {true, false, true}},  {"writeback", {false, false, false}},
        {"writethrough", {false, false, true}}, {"unsafe", {false, true, false}},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(modes); i++) {
        if (!strcmp(mode, modes[i].name)) {
            *ret = modes[i].mode;
            return true;
        }
    }
    return false;
}

bool blk_parse_discard(const char *mode, bool *ret_unmap)
{
    bool unmap = !strcmp(mode, "unmap") || !strcmp(mode, "on");
    if (!unmap && strcmp(mode, "ignore") && strcmp(mode, "off")) {
        return false;
    }
    *ret_unmap = unmap;
    return true;
}

bool blk_parse_aio(const char *mode, int *flags)
{
    static const struct {
        const char *name;
        int flags;
    } modes[] = {
        {"threads", BDRV_O_AIO_THREADS}, {"native", BDRV_O_AIO_NATIVE}, {"io_uring", 0},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(modes); i++) {
        if (!strcmp(mode, modes[i].name)) {
            *flags |= modes[i].flags;
            return true;
        }
    }
    return false;
}

void blk_set_write_cache(BlockBackend *blk, bool writeback)
{
    atomic_store(&blk->write_cache, writeback);
}

bool blk_write_cache(const BlockBackend *blk)
{
    return atomic_load(&blk->write_cache);
}

/* --- facts --- */

int64_t blk_getlength(BlockBackend *blk)
{
    return bdrv_getlength(blk->root->bs);
}

bool blk_is_writable(BlockBackend *blk)
{
    return !blk->root->bs->read_only && (blk->root->perm & BLK_PERM_WRITE);
}

/* --- requests --- */

int blk_write_flags(const BlockBackend *blk, int flags)
{
    return blk_write_cache(blk) ? flags : flags | BDRV_REQ_FUA;
}

/* A range inside the image; a transfer no longer than one request may be. */
static int check_range(BlockBackend *blk, int64_t offset, int64_t bytes, int64_t max)
{
    if (!qb_range_valid(offset, bytes) || bytes > max) {
        return -EIO;
    }
    if (bdrv_known_to_reach(blk->root->bs, offset + bytes)) {
        return 0; /* asking a file is a system call */
    }
    int64_t length = blk_getlength(blk);
    if (length < 0) {
        return (int)length;
    }
    return offset + bytes <= length ? 0 : -EIO;
}

static int check_change(BlockBackend *blk, int64_t offset, int64_t bytes, int64_t max)
{
    if (!blk_is_writable(blk)) {
        return -EPERM;
    }
    return check_range(blk, offset, bytes, max);
}

int blk_preadv(BlockBackend *blk, int64_t offset, int64_t bytes, IoVector *qiov, int flags)
{
    blk_begin_request(blk);
    int ret = check_range(blk, offset, bytes, BDRV_REQUEST_MAX_BYTES);
    if (ret == 0) {
        BDRV_GRAPH_GUARD();
        ret = bdrv_preadv(blk->root, offset, bytes, qiov, flags);
    }
    blk_end_request(blk);
    return ret;
}

int blk_pwritev(BlockBackend *blk, int64_t offset, int64_t bytes, IoVector *qiov, int flags)
{
    blk_begin_request(blk);
    int ret = check_change(blk, offset, bytes, BDRV_REQUEST_MAX_BYTES);
    if (ret == 0) {
        BDRV_GRAPH_GUARD();
        ret = bdrv_pwritev(blk->root, offset, bytes, qiov, blk_write_flags(blk, flags));
    }
    blk_end_request(blk);
    return ret;
}

int blk_pread(BlockBackend *blk, int64_t offset, int64_t bytes, void *buf, int flags)
{
    if (bytes < 0) {
        return -EIO;
    }
    IoVector qiov;
    iov_vector_init_buf(&qiov, buf, (size_t)bytes);
    return blk_preadv(blk, offset, bytes, &qiov, flags);
}

int blk_pwrite(BlockBackend *blk, int64_t offset, int64_t bytes, const void *buf, int flags)
{
    if (bytes < 0) {
        return -EIO;
    }
    IoVector qiov;
    iov_vector_init_buf(&qiov, (void *)buf, (size_t)bytes);
    return blk_pwritev(blk, offset, bytes, &qiov, flags);
}

/* Long ones are cut by io.c, each piece with its own entry of the graph lock. */
int blk_pwrite_zeroes(BlockBackend *blk, int64_t offset, int64_t bytes, int flags)
{
    blk_begin_request(blk);
    int ret = check_change(blk, offset, bytes, INT64_MAX);
    if (ret == 0) {
        ret = bdrv_pwrite_zeroes(blk->root, offset, bytes, blk_write_flags(blk, flags));
    }
    blk_end_request(blk);
    return ret;
}

int blk_pdiscard(BlockBackend *blk, int64_t offset, int64_t bytes)
{
    blk_begin_request(blk);
    int ret = check_change(blk, offset, bytes, INT64_MAX);
    if (ret == 0) {
        ret = bdrv_pdiscard(blk->root, offset, bytes);
    }
    blk_end_request(blk);
    return ret;
}

int blk_flush(BlockBackend *blk)
{
    blk_begin_request(blk);
    int ret;
    {
        BDRV_GRAPH_GUARD();
        ret = bdrv_flush(blk->root->bs);
    }
    blk_end_request(blk);
    return ret;
}

bool blk_resize(BlockBackend *blk, const BdrvResize *how, GError **errp)
{
    blk_begin_request(blk);
    bool ok;
    {
        BDRV_GRAPH_GUARD();
        ok = bdrv_resize(blk->root, how, errp);
    }
    blk_end_request(blk);
    return ok;
}

bool blk_truncate(BlockBackend *blk, int64_t offset, bool exact, PreallocMode prealloc,
                  bool zero_new, GError **errp)
{
    const BdrvResize how = {
        .length = offset, .exact = exact, .prealloc = prealloc, .zero_new = zero_new,
    };
    return blk_resize(blk, &how, errp);
}

static int check_batch(BlockBackend *blk, const BdrvBatchOp *ops, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        bool moves_data = ops[i].kind == BDRV_BATCH_READ || ops[i].kind == BDRV_BATCH_WRITE;
        int64_t max = moves_data ? BDRV_REQUEST_MAX_BYTES : INT64_MAX;
        int ret = ops[i].kind == BDRV_BATCH_READ
                      ? check_range(blk, ops[i].offset, ops[i].bytes, max)
                      : check_change(blk, ops[i].offset, ops[i].bytes, max);
        if (ret < 0) {
            return ret;
        }
    }
    return 0;
}

int blk_run_batch(BlockBackend *blk, BdrvBatchOp *ops, size_t n)
{
    blk_begin_request(blk);
    int ret = check_batch(blk, ops, n);
    for (size_t i = 0; ret == 0 && i < n && !blk_write_cache(blk); i++) {
        if (ops[i].kind == BDRV_BATCH_WRITE || ops[i].kind == BDRV_BATCH_ZERO) {
            ops[i].flags |= BDRV_REQ_FUA;
        }
    }
    if (ret == 0) {
        BDRV_GRAPH_GUARD();
        ret = bdrv_run_batch(blk->root, ops, n);
    }
    blk_end_request(blk);
    return ret;
}

/* Counts a request in both. Never waits at one door while counted at the other: who drains both would
 * wait for us in turn. */
static void begin_both(BlockBackend *a, BlockBackend *b)
{
    blk_begin_request(a);
    while (!blk_try_begin_request(b)) {
        BlockBackend *shut = b;
        blk_end_request(a);
        b = a;
        a = shut;
        blk_begin_request(a);
    }
}

static int check_copy(BlockBackend *src, BlockBackend *dst, const BdrvCopyExtent *ext)
{
    int ret = check_range(src, ext->src_offset, ext->bytes, INT64_MAX);
    return ret < 0 ? ret : check_change(dst, ext->dst_offset, ext->bytes, INT64_MAX);
}

static int copy_begun(BlockBackend *src, BlockBackend *dst, const BdrvCopyExtent *ext, size_t n,
                      int flags)
{
    BDRV_GRAPH_GUARD();
    int ret = 0;
    for (size_t i = 0; ret == 0 && i < n; i++) {
        ret = check_copy(src, dst, &ext[i]);
    }
    if (ret == 0) {
        ret = bdrv_copy_extents(src->root, dst->root, ext, n, flags);
    }
    return ret == 0 && !blk_write_cache(dst) ? bdrv_flush(dst->root->bs) : ret;
}

int blk_copy_extents(BlockBackend *src, BlockBackend *dst, const BdrvCopyExtent *ext, size_t n,
                     int flags)
{
    begin_both(src, dst);
    int ret = copy_begun(src, dst, ext, n, flags);
    blk_end_request(src);
    blk_end_request(dst);
    return ret;
}

int blk_copy_range(BlockBackend *src, int64_t src_offset, BlockBackend *dst, int64_t dst_offset,
                   int64_t bytes)
{
    BdrvCopyExtent ext = {.src_offset = src_offset, .dst_offset = dst_offset, .bytes = bytes};
    return blk_copy_extents(src, dst, &ext, 1, 0);
}

int blk_save_vmstate(BlockBackend *blk, IoVector *qiov, int64_t pos)
{
    if (!blk_is_writable(blk)) {
        return -EPERM;
    }
    blk_begin_request(blk);
    int ret;
    {
        BDRV_GRAPH_GUARD();
        ret = bdrv_save_vmstate(blk->root->bs, qiov, pos);
        if (ret >= 0 && !blk_write_cache(blk)) {
            ret = bdrv_flush(blk->root->bs);
        }
    }
    blk_end_request(blk);
    return ret;
}

int blk_load_vmstate(BlockBackend *blk, IoVector *qiov, int64_t pos)
{
    blk_begin_request(blk);
    int ret;
    {
        BDRV_GRAPH_GUARD();
        ret = bdrv_load_vmstate(blk->root->bs, qiov, pos);
    }
    blk_end_request(blk);
    return ret;
}

bool blk_make_empty(BlockBackend *blk, bool committed, GError **errp)
{
    return bdrv_make_empty(blk->root->bs, committed, errp);
}

/* --- requests that run in the pool ---
 *
 * From the drawing of its ticket to its end such a request has an entry of the graph lock, since
 * others may wait for the ticket with an entry of their own while a writer waits for them. */

typedef struct Task {
    BlkDrawn drawn;
    BdrvGraphPin pin;
    void (*done)(void *opaque, int ret);
    void *opaque;
} Task;

int blk_check_request(BlockBackend *blk, BlkOp op, int64_t offset, int64_t bytes)
{
    switch (op) {
    case BLK_OP_READ:
        return check_range(blk, offset, bytes, BDRV_REQUEST_MAX_BYTES);
    case BLK_OP_WRITE:
        return check_change(blk, offset, bytes, BDRV_REQUEST_MAX_BYTES);
    case BLK_OP_ZERO:
    case BLK_OP_DISCARD:
        return check_change(blk, offset, bytes, INT64_MAX);
    case BLK_OP_FLUSH:
        return 0;
    }
    g_assert_not_reached();
}

static void draw_ticket(BlkDrawn *d)
{
    static const BdrvRequestType types[] = {
        [BLK_OP_READ] = BDRV_TRACKED_READ,
        [BLK_OP_WRITE] = BDRV_TRACKED_WRITE,
        [BLK_OP_ZERO] = BDRV_TRACKED_ZERO,
        [BLK_OP_DISCARD] = BDRV_TRACKED_DISCARD,
    };
    if (d->op != BLK_OP_FLUSH) {
        bdrv_request_draw(d->blk->root, &d->req, types[d->op], d->offset, d->bytes);
    }
}

void blk_draw(BlkDrawn *d)
{
    if (d->op == BLK_OP_WRITE || d->op == BLK_OP_ZERO) {
        d->flags = blk_write_flags(d->blk, d->flags);
    }
    d->failed = blk_check_request(d->blk, d->op, d->offset, d->bytes);
    if (!d->failed) {
        draw_ticket(d);
    }
}

int blk_run_drawn(BlkDrawn *d)
{
    BdrvChild *root = d->blk->root;
    if (d->failed) {
        return d->failed;
    }
    switch (d->op) {
    case BLK_OP_READ:
        return bdrv_preadv_drawn(root, &d->req, d->offset, d->bytes, d->qiov, d->flags);
    case BLK_OP_WRITE:
        return bdrv_pwritev_drawn(root, &d->req, d->offset, d->bytes, d->qiov, d->flags);
    case BLK_OP_ZERO:
        return bdrv_pwrite_zeroes_drawn(root, &d->req, d->offset, d->bytes, d->flags);
    case BLK_OP_DISCARD:
        return bdrv_pdiscard_drawn(root, &d->req, d->offset, d->bytes);
    case BLK_OP_FLUSH:
        return bdrv_flush(root->bs);
    }
    g_assert_not_reached();
}

static void run_task(void *opaque)
{
    Task *t = opaque;
    bdrv_graph_borrow();
    int ret = blk_run_drawn(&t->drawn);
    bdrv_graph_return();
    bdrv_graph_unpin(t->pin);
    t->done(t->opaque, ret);
    blk_end_request(t->drawn.blk);
    g_free(t);
}

void blk_submit(BlockBackend *blk, BlkOp op, int64_t offset, int64_t bytes, IoVector *qiov,
                int flags, void (*done)(void *opaque, int ret), void *opaque)
{
    blk_begin_request(blk);
    Task *t = g_new0(Task, 1);
    *t = (Task){
        .drawn = {.blk = blk, .op = op, .offset = offset, .bytes = bytes, .qiov = qiov,
                  .flags = flags},
        .done = done, .opaque = opaque,
    };
    t->pin = bdrv_graph_pin();
    bdrv_graph_borrow();
    blk_draw(&t->drawn);
    bdrv_graph_return();
    qb_pool_submit(qb_request_pool(), run_task, t);
}
