/*
 * Reading, writing and making stable.
 *
 * Growth.  A file may grow in two ways: a write beyond its end, and ftruncate() for zeroes
 * (file-status.c).  The second reads the length and sets a larger one; a write that grows the file
 * in between would be cut off.  So writes that end beyond "eof", a lower bound of the length, hold
 * the grow lock shared, and growth by ftruncate() holds it exclusively.  Writes inside eof, nearly
 * all, take nothing:
 *
 *      0                        eof        length
 *      |  writes take no lock    |  shared   |
 *                                            |---- zeroes: exclusive ---->
 *
 * Flush.  One fdatasync() runs at a time; who arrives meanwhile waits for the next round, which
 * serves all who wait:
 *
 *      round     1         2              3
 *             [======] [=========]     [=====]
 *      A ------^^^^^^|     |               |
 *      B ---------^--------|  joins 2      |        finished >= wanted  =>  done
 *      C ----------^-------|               |
 *
 * Changes are counted when they are done, and a round covers those counted when it begins.  A flush
 * all of whose changes are covered by the round that runs waits for that one; if they are stable
 * already it does nothing.  What others had written before the file was opened is theirs to flush.
 * Discards are not counted: bytes given back may come again after a power failure.  But who is told
 * that there is a hole may leave out zeroes that he would have written (commit does), and flushes
 * then: so the first look that finds one, after a discard or the opening, counts as a change.
 *
 * Rounds have a second purpose.  The kernel reports lost pages of a cached file once per
 * descriptor. With one round at a time, nobody can be told "stable" by a later fdatasync() before
 * the failure of the earlier one is known to all.
 *
 * Invariants
 *  1. eof never exceeds the length while no truncate is running (the core keeps requests out of the
 *     range of a truncate).
 *  2. After a failed fdatasync() of a cached file every later flush fails: the kernel has dropped
 *     the pages, success would be a lie.  Direct I/O has no pages to lose.
 *  3. For the same reason FUA on a cached file is a write and a shared round; RWF_DSYNC, whose
 *     error would be consumed outside of the rounds, is used with direct I/O only.
 *
 * Not done: reads and writes of unaligned memory with direct I/O; the core has aligned them.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/file-int.h"
#include "util/iov.h"

#include <limits.h>
#include <sys/stat.h>
#include <unistd.h>

/* --- growth --- */

static void raise_eof(BDRVFileState *s, int64_t end)
{
    int64_t seen = atomic_load_explicit(&s->eof, memory_order_relaxed);
    while (seen < end && !atomic_compare_exchange_weak(&s->eof, &seen, end)) {
    }
}

/* True when a write up to @end may grow the file: the grow lock is then held shared. */
static bool write_enter(BDRVFileState *s, int64_t end) QB_NO_TSA
{
    if (end <= atomic_load(&s->eof)) {
        return false;
    }
    qb_rwlock_rdlock(&s->grow);
    return true;
}

static void write_leave(BDRVFileState *s, int64_t end, bool grows, int ret) QB_NO_TSA
{
    if (!grows) {
        return;
    }
    if (ret == 0) {
        raise_eof(s, end);
    }
    qb_rwlock_rdunlock(&s->grow);
}

static int grow_locked(BDRVFileState *s, int64_t end)
{
    struct stat st;
    if (fstat(s->fd, &st) < 0) {
        return -errno;
    }
    if (st.st_size < end && ftruncate(s->fd, end) < 0) {
        return -errno;
    }
    raise_eof(s, end);
    return 0;
}

int file_grow(BDRVFileState *s, int64_t end)
{
    if (end <= atomic_load(&s->eof)) {
        return 0;
    }
    qb_rwlock_wrlock(&s->grow);
    int ret = grow_locked(s, end);
    qb_rwlock_wrunlock(&s->grow);
    return ret;
}

static int cut_padding_locked(BDRVFileState *s, int64_t end, int64_t padded_end)
{
    struct stat st;
    if (fstat(s->fd, &st) < 0) {
        return -errno;
    }
    if (st.st_size != padded_end) {
        return 0;
    }
    if (ftruncate(s->fd, end) < 0) {
        return -errno;
    }
    atomic_store(&s->eof, end);
    return 0;
}

/* Nobody else writes between @end and @padded_end: the core has granted that range. */
int file_cut_padding(BlockDriverState *bs, int64_t end, int64_t padded_end)
{
    BDRVFileState *s = file_state(bs);
    qb_rwlock_wrlock(&s->grow);
    int ret = cut_padding_locked(s, end, padded_end);
    qb_rwlock_wrunlock(&s->grow);
    return ret;
}

/* --- flush --- */

void file_flush_init(FileFlush *f)
{
    qb_mutex_init(&f->lock);
    qb_cond_init(&f->done);
    atomic_store(&f->loose_holes, true); /* those of others */
}

void file_flush_destroy(FileFlush *f)
{
    qb_cond_destroy(&f->done);
    qb_mutex_destroy(&f->lock);
}

static int sync_fd(int fd)
{
    int ret;
    do {
        ret = fdatasync(fd);
    } while (ret < 0 && errno == EINTR);
    return ret < 0 ? -errno : 0;
}

void file_note_change(BDRVFileState *s)
{
    atomic_fetch_add(&s->flush.changes, 1);
}

void file_note_discard(BDRVFileState *s)
{
    atomic_store(&s->flush.loose_holes, true);
}

void file_note_hole_seen(BDRVFileState *s)
{
    if (atomic_load(&s->flush.loose_holes) && atomic_exchange(&s->flush.loose_holes, false)) {
        file_note_change(s);
    }
}

/* Runs the next round; the lock is let go for the time of the barrier. */
static void run_round_locked(BDRVFileState *s) QB_NO_TSA
{
    FileFlush *f = &s->flush;
    qb_mutex_assert_held(&f->lock);
    assert(!f->running);
    f->running = true;
    uint64_t round = ++f->started;
    uint64_t covered = f->covered = atomic_load(&f->changes);
    qb_mutex_unlock(&f->lock);
    int ret = sync_fd(s->fd);
    qb_mutex_lock(&f->lock);
    f->running = false;
    f->finished = round;
    if (ret < 0) {
        f->failed_round = round;
        f->failed_errno = ret;
        f->broken = f->broken || !s->direct;
    } else {
        f->stable = covered;
    }
    qb_cond_broadcast(&f->done);
}

/* The round that will have covered all changes so far. */
static uint64_t covering_round_locked(const FileFlush *f)
{
    bool covered = f->running && f->covered == atomic_load(&f->changes);
    return covered ? f->started : f->started + 1;
}

int file_make_stable(BDRVFileState *s) QB_NO_TSA
{
    FileFlush *f = &s->flush;
    QB_GUARD(&f->lock);
    if (f->broken) {
        return -EIO;
    }
    if (f->stable == atomic_load(&f->changes)) {
        return 0;
    }
    uint64_t wanted = covering_round_locked(f);
    while (f->finished < wanted) {
        if (f->running) {
            qb_cond_wait(&f->done, &f->lock);
        } else {
            run_round_locked(s);
        }
    }
    if (f->failed_round >= wanted) {
        return f->failed_errno;
    }
    return f->broken ? -EIO : 0; /* an earlier round failed while this one waited */
}

int file_flush(BlockDriverState *bs)
{
    return bs->cache_no_flush ? 0 : file_make_stable(file_state(bs));
}

/* --- transfers --- */

static int transfer(BDRVFileState *s, QbIoKind kind, int64_t offset, int64_t bytes,
                    const IoVector *qiov, size_t qiov_offset)
{
    file_assert_request(s, offset, bytes);
    if (qiov_offset == 0 && (uint64_t)bytes == qiov->size) {
        return qb_io_one(kind, s->fd, (uint64_t)offset, qiov->iov, qiov->niov);
    }
    IOV_VECTOR_AUTO part = {0};
    iov_vector_init_slice(&part, qiov, qiov_offset, (size_t)bytes);
    return qb_io_one(kind, s->fd, (uint64_t)offset, part.iov, part.niov);
}

int file_preadv(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                IoVector *qiov, size_t qiov_offset, int flags)
{
    return transfer(file_state(bs), QB_IO_READ, offset, bytes, qiov, qiov_offset);
}

/* One pwritev2(RWF_DSYNC) of what is left: bytes written, or -errno. */
static ssize_t write_dsync_once(BDRVFileState *s, int64_t offset, const IoVector *qiov,
                                size_t qiov_offset, size_t bytes)
{
    IOV_VECTOR_AUTO part = {0};
    iov_vector_init_slice(&part, qiov, qiov_offset, bytes);
    ssize_t n = pwritev2(s->fd, part.iov, MIN(part.niov, IOV_MAX), offset, RWF_DSYNC);
    return n < 0 ? -errno : n;
}

/* -ENOTSUP: the file cannot; nothing that matters was written. */
static int write_dsync(BDRVFileState *s, int64_t offset, int64_t bytes, const IoVector *qiov,
                       size_t qiov_offset)
{
    size_t done = 0;
    while (done < (size_t)bytes) {
        ssize_t n = write_dsync_once(s, offset + (int64_t)done, qiov, qiov_offset + done,
                                     (size_t)bytes - done);
        if (n == 0) {
            return -ENOSPC;
        }
        if (n < 0 && n != -EINTR) {
            return (int)n;
        }
        done += n > 0 ? (size_t)n : 0;
    }
    return 0;
}

/* Writes with direct I/O and RWF_DSYNC; -ENOTSUP where that is not to be had. */
static int try_write_dsync(BDRVFileState *s, int64_t offset, int64_t bytes, const IoVector *qiov,
                           size_t qiov_offset)
{
    file_assert_request(s, offset, bytes);
    if (!s->direct || atomic_load(&s->lacks.dsync)) {
        return -ENOTSUP;
    }
    int ret = write_dsync(s, offset, bytes, qiov, qiov_offset);
    if (ret != -ENOTSUP && ret != -ENOSYS) {
        return ret;
    }
    atomic_store(&s->lacks.dsync, true);
    return -ENOTSUP;
}

int file_pwritev(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                 IoVector *qiov, size_t qiov_offset, int flags)
{
    BDRVFileState *s = file_state(bs);
    int64_t end = offset + bytes;
    bool fua = (flags & BDRV_REQ_FUA) && !bs->cache_no_flush;
    bool grows = write_enter(s, end);
    int ret = fua ? try_write_dsync(s, offset, bytes, qiov, qiov_offset) : -ENOTSUP;
    bool stable = ret != -ENOTSUP;
    if (!stable) {
        ret = transfer(s, QB_IO_WRITE, offset, bytes, qiov, qiov_offset);
        file_note_change(s);
    }
    write_leave(s, end, grows, ret);
    return ret == 0 && fua && !stable ? file_make_stable(s) : ret;
}

/* --- batches --- */

static bool is_transfer(const BdrvBatchOp *op)
{
    return op->kind == BDRV_BATCH_READ || op->kind == BDRV_BATCH_WRITE;
}

/* A batch in the making: transfers go down together, with the index of the op they came from. */
typedef struct FileBatch {
    QbIoOp *io;
    struct iovec *iov;
    size_t *index;
    size_t n;
    int64_t end; /* largest end of a write */
    bool fua;
} FileBatch;

static void file_batch_clear(FileBatch *b)
{
    g_free(b->io);
    g_free(b->iov);
    g_free(b->index);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(FileBatch, file_batch_clear)

static void batch_add(FileBatch *b, const BDRVFileState *s, const BdrvBatchOp *op, size_t index)
{
    bool write = op->kind == BDRV_BATCH_WRITE;
    struct iovec *iov = &b->iov[b->n];
    *iov = (struct iovec){.iov_base = op->buf, .iov_len = (size_t)op->bytes};
    b->io[b->n] = (QbIoOp){
        .kind = write ? QB_IO_WRITE : QB_IO_READ,
        .fd = s->fd,
        .offset = (uint64_t)op->offset,
        .iov = iov,
        .niov = 1,
    };
    b->index[b->n++] = index;
    if (write) {
        b->end = MAX(b->end, op->offset + op->bytes);
        b->fua = b->fua || (op->flags & BDRV_REQ_FUA);
    }
}

static void batch_collect(FileBatch *b, const BDRVFileState *s, const BdrvBatchOp *ops, size_t n)
{
    b->io = g_new(QbIoOp, n);
    b->iov = g_new(struct iovec, n);
    b->index = g_new(size_t, n);
    for (size_t i = 0; i < n; i++) {
        if (is_transfer(&ops[i])) {
            batch_add(b, s, &ops[i], i);
        }
    }
}

/* One barrier serves all writes with FUA. */
static void batch_make_stable(BlockDriverState *bs, BdrvBatchOp *ops, size_t n)
{
    int ret = file_flush(bs);
    for (size_t i = 0; i < n; i++) {
        if (ops[i].kind == BDRV_BATCH_WRITE && (ops[i].flags & BDRV_REQ_FUA) && ops[i].ret == 0) {
            ops[i].ret = ret;
        }
    }
}

static void batch_run_transfers(BlockDriverState *bs, BdrvBatchOp *ops, size_t n)
{
    BDRVFileState *s = file_state(bs);
    g_auto(FileBatch) b = {0};
    batch_collect(&b, s, ops, n);
    if (b.n == 0) {
        return;
    }
    bool grows = write_enter(s, b.end);
    int ret = qb_io_run(b.io, b.n, s->aio);
    if (b.end > 0) {
        file_note_change(s);
    }
    write_leave(s, b.end, grows, ret);
    for (size_t i = 0; i < b.n; i++) {
        ops[b.index[i]].ret = b.io[i].ret;
    }
    if (b.fua) {
        batch_make_stable(bs, ops, n);
    }
}

int file_run_batch(BlockDriverState *bs, BdrvBatchOp *ops, size_t n)
{
    batch_run_transfers(bs, ops, n);
    int first = 0;
    for (size_t i = 0; i < n; i++) {
        BdrvBatchOp *op = &ops[i];
        if (op->kind == BDRV_BATCH_ZERO) {
            op->ret = file_pwrite_zeroes(bs, NULL, op->offset, op->bytes, op->flags);
        } else if (op->kind == BDRV_BATCH_DISCARD) {
            op->ret = file_pdiscard(bs, NULL, op->offset, op->bytes);
        }
        first = first ? first : op->ret;
    }
    return first;
}

/* --- the bottom of the fast lane --- */

/* Growing writes hold the grow lock, as those of file_pwritev() do; the queue's thread may, since it has
 * both ends. */
static bool map_grows(BDRVFileState *s, BdrvMapIntent intent, int64_t end) QB_NO_TSA
{
    return intent == BDRV_MAP_WRITE && !s->is_device && end > atomic_load(&s->eof);
}

int file_map(BlockDriverState *bs, BlkQueue *queue, BdrvMapIntent intent, int64_t offset,
             int64_t bytes, BdrvMapping *mapping) QB_NO_TSA
{
    BDRVFileState *s = file_state(bs);
    int64_t end = offset + bytes;
    bool aligned = qb_is_aligned((uint64_t)(offset | bytes), s->request_alignment);
    bool writable = intent == BDRV_MAP_READ || !s->read_only;
    bool grows = map_grows(s, intent, end);
    /* Inside eof a read is never short. */
    if (!aligned || !writable || (!grows && end > atomic_load(&s->eof)) ||
        mapping->n == BDRV_MAP_MAX_EXTENTS || (grows && !qb_rwlock_try_rdlock(&s->grow))) {
        return -EAGAIN;
    }
    mapping->layer[mapping->depth].token = grows ? s : NULL;
    mapping->ext[mapping->n++] = (BdrvMapExtent){
        .fd = s->fd, .host_offset = offset, .bytes = bytes,
        .direct = s->direct, .kernel_aio = s->aio != QB_AIO_THREADS,
        .lacks_nowait = intent == BDRV_MAP_READ ? &s->lacks.nowait_read : &s->lacks.nowait_write,
        .lacks_copy = &s->lacks.copy_range, .copies_pages = s->copies_pages,
    };
    mapping->bytes += bytes;
    return 0;
}

int file_map_done(BlockDriverState *bs, BlkQueue *queue, BdrvMapping *mapping, int result)
{
    BDRVFileState *s = file_state(bs);
    const BdrvMapLayer *layer = &mapping->layer[mapping->depth];
    if (layer->req.type == BDRV_TRACKED_WRITE) {
        file_note_change(s);
    }
    if (mapping->copied) { /* sharing blocks may have turned data into a hole */
        file_data_cache_drop(&s->data);
    }
    write_leave(s, layer->end, layer->token != NULL, result);
    return result;
}
