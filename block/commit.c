/*
 * Commit: what the layers above a base hold goes into the base.
 *
 *      top --> a --> b --> base          (each arrow: backed by)
 *      \_________________/
 *        allocated here?  ranges of the next FIND_SPAN, found in bulk on all cores
 *             status of them  --batch of extents--> worker: copied from top to base, one by one
 *                             --batch of extents--> worker: ...
 *
 * Only what is allocated above the base is visited; ranges that read as zeroes become zeroes in the
 * base without being read, and nothing at all where the base reads as zeroes already.  Workers take
 * batches in guest order and copy them at the same time: one reads while another writes.  Batches
 * go from file to file where both formats know the place (bdrv_copy_extents), shared by the kernel
 * if it can.
 *
 * What cannot be saved: file systems without shared blocks let one thread at a time write to a
 * file, so that of two cores one is busy with the base's pages all the time; giving the overlay's
 * pages back comes after it.  Both together are about as long as cp of the data.
 *
 * Invariants
 * 1. The base's content never becomes something that neither base nor top showed: a range is
 *    written with what top shows.  So a commit that stops half-way can be run again, to completion.
 * 2. The base is flushed before success is reported; whoever empties or deletes the overlay
 *    afterwards relies on it.
 * 3. The base goes back to read-only whether the commit succeeds or fails.
 * 4. After the first error, or a cancellation, no new batch is handed out; that error is told.
 *
 * Deliberately not done here: emptying the overlay, changing the graph.
 *
 * SPDX-License-Identifier: MIT
 */
#include <inttypes.h>
#include <stdlib.h>
#include <time.h>
#include "block/driver.h"
#include "block/job.h"
#include "util/checked.h"
#include "util/error.h"
#include "util/thread.h"

#define BATCH_EXTENTS 64
#define BATCH_BYTES (4 * 1024 * 1024)
#define SLOW_BATCH_BYTES (64 * 1024) /* at least, with a limited rate */
#define PIECE_BYTES (1024 * 1024)
#define WORKERS 4 /* transfers under way; more of them wait for each other at the base's file */
#define LOOK_BYTES (INT64_C(1) << 30) /* an answer is asked for again where a batch ended in it */
#define FIND_SPAN (INT64_C(256) << 30) /* searched at once; and at most looked at for a batch */
#define NAP_NS 50000000

typedef struct Commit {
    const CommitOptions *opts;
    BlockBackend *from, *to;
    int64_t size;        /* of top */
    int64_t batch_bytes; /* at most, of data */
    QbMutex lock;
    int64_t next;  /* where the next batch begins; guarded by lock, as are all below */
    GArray *found; /* BdrvRange: what may be allocated from next up to found_end, and what was before */
    guint at;      /* the first of them that does not lie before next */
    int64_t found_end;
    GError *error; /* the first */
    BlockRateLimit limit;
} Commit;

typedef struct Extent {
    int64_t offset, bytes;
    bool zero;
} Extent;

typedef struct CommitBatch {
    Extent ext[BATCH_EXTENTS];
    unsigned n;
    int64_t data; /* bytes to copy */
    int64_t from, next; /* where it and the one behind it begin */
} CommitBatch;

/* Sleeps in naps, between which a cancellation is seen. */
static void sleep_until(uint64_t when, QbProgress *p)
{
    uint64_t now;

    while ((now = qb_now_ns()) < when && !qb_progress_cancelled(p)) {
        struct timespec nap = {.tv_nsec = (long)MIN(when - now, NAP_NS)};
        nanosleep(&nap, NULL);
    }
}

void block_rate_limit_wait(BlockRateLimit *limit, uint64_t bytes, QbProgress *p)
{
    if (!limit->speed) {
        return;
    }
    sleep_until(limit->next_ns, p);
    limit->next_ns = MAX(limit->next_ns, qb_now_ns()) +
                     (uint64_t)((double)bytes / (double)limit->speed * 1e9);
}

/* ---- collecting a batch ---- */

/* Joins what follows the last extent and is of its kind. */
static void add_extent(CommitBatch *b, Extent e)
{
    Extent *last = b->n ? &b->ext[b->n - 1] : NULL;

    if (last && last->zero == e.zero && last->offset + last->bytes == e.offset) {
        last->bytes += e.bytes;
    } else {
        b->ext[b->n++] = e;
    }
}

/* As much of the extent as fits; returns how much that was. */
static int64_t add_data(const Commit *c, CommitBatch *b, int64_t offset, int64_t bytes)
{
    bytes = MIN(bytes, c->batch_bytes - b->data);
    add_extent(b, (Extent){.offset = offset, .bytes = bytes});
    b->data += bytes;
    return bytes;
}

/* Zeroes go where the base does not read as zeroes already: a sparse base stays sparse. Returns the
 * length that was decided, or -errno. */
static int64_t add_zero_extent(Commit *c, CommitBatch *b, int64_t offset, int64_t bytes)
{
    BdrvStatus st = {0};
    int ret = bdrv_block_status_above(c->opts->base, NULL, offset, bytes, &st);

    if (ret < 0) {
        return ret;
    }
    bytes = MIN(bytes, st.bytes);
    if (!(st.flags & BDRV_BLOCK_ZERO)) {
        add_extent(b, (Extent){.offset = offset, .bytes = bytes, .zero = true});
    }
    return bytes;
}

/* Looks at what is at b->next, up to @end, and adds it if a layer above the base decides it. Returns
 * how far that went, or -errno. */
static int64_t add_next(Commit *c, CommitBatch *b, int64_t end)
{
    BdrvStatus st = {0};
    int ret = bdrv_block_status_above_step(c->opts->top, c->opts->base, b->next,
                                           MIN(end - b->next, LOOK_BYTES), &st);

    if (ret < 0) {
        return ret;
    }
    if (!(st.flags & BDRV_BLOCK_ALLOCATED)) {
        return st.bytes;
    }
    return st.flags & BDRV_BLOCK_ZERO ? add_zero_extent(c, b, b->next, st.bytes)
                                      : add_data(c, b, b->next, st.bytes);
}

/* Searches from @offset on, if that has not been done yet. */
static int find_from(Commit *c, int64_t offset)
{
    if (offset < c->found_end) {
        return 0;
    }
    int64_t bytes = MIN(c->size - offset, FIND_SPAN);
    c->at = 0;
    c->found_end = offset + bytes;
    return bdrv_find_allocated_above(c->opts->top, c->opts->base, offset, bytes, c->found);
}

/* What may be allocated next: the range at or behind @offset; empty, at found_end: nothing before
 * that. */
static BdrvRange next_found(Commit *c, int64_t offset)
{
    for (; c->at < c->found->len; c->at++) {
        BdrvRange r = g_array_index(c->found, BdrvRange, c->at);
        if (offset < r.offset + r.bytes) {
            int64_t start = MAX(offset, r.offset);
            return (BdrvRange){start, r.offset + r.bytes - start};
        }
    }
    return (BdrvRange){c->found_end, 0};
}

/* Fills @b from c->next on. One entry of the graph. */
static int collect_locked(Commit *c, CommitBatch *b)
{
    BDRV_GRAPH_GUARD();
    *b = (CommitBatch){.from = c->next, .next = c->next};
    int ret = find_from(c, c->next);
    while (ret >= 0 && b->n < BATCH_EXTENTS && b->data < c->batch_bytes) {
        BdrvRange r = next_found(c, b->next);
        b->next = r.offset;
        if (r.bytes == 0) {
            break;
        }
        int64_t step = add_next(c, b, r.offset + r.bytes);
        b->next += MAX(step, 0);
        ret = (int)MIN(step, 0);
    }
    return ret;
}

/* The first line is the text of the errno alone, which scripts look at; the rest says where. */
static GError *copy_error(int ret, const char *doing, BlockDriverState *bs, int64_t offset)
{
    GError *err = NULL;

    qb_error_set(&err, -ret, "%s", g_strerror(-ret));
    qb_error_add_hint(&err, "%s '%s' at offset %" PRId64 " or behind it failed.", doing,
                      bdrv_filename(bs), offset);
    return err;
}

static bool fill_batch_locked(Commit *c, CommitBatch *b)
{
    if (qb_progress_cancelled(c->opts->progress)) {
        qb_error_set(&c->error, ECANCELED, "Commit stopped at offset %" PRId64 " of %" PRId64
                     "; run it again to complete it", c->next, c->size);
        return false;
    }
    int ret = collect_locked(c, b);
    if (ret < 0) {
        c->error = copy_error(ret, "Looking for data in", c->opts->top, b->next);
        return false;
    }
    c->next = b->next;
    block_rate_limit_wait(&c->limit, (uint64_t)b->data, c->opts->progress);
    return true;
}

/* False: none is left, or the commit has failed. */
static bool take_batch(Commit *c, CommitBatch *b)
{
    QB_GUARD(&c->lock);
    return !c->error && c->next < c->size && fill_batch_locked(c, b);
}

/* ---- copying a batch ---- */

/* Through memory, piece by piece; says which side failed. */
static GError *copy_by_hand(Commit *c, const Extent *e)
{
    QB_AUTO_FREE uint8_t *buf = bdrv_try_blockalign(c->opts->base, PIECE_BYTES);
    int64_t n;

    if (!buf) {
        return copy_error(-ENOMEM, "Reading", c->opts->top, e->offset);
    }
    for (int64_t done = 0; done < e->bytes; done += n) {
        n = MIN(e->bytes - done, PIECE_BYTES);
        int ret = blk_pread(c->from, e->offset + done, n, buf, 0);
        if (ret < 0) {
            return copy_error(ret, "Reading", c->opts->top, e->offset);
        }
        ret = blk_pwrite(c->to, e->offset + done, n, buf, 0);
        if (ret < 0) {
            return copy_error(ret, "Writing", c->opts->base, e->offset);
        }
    }
    return NULL;
}

/* All data of the batch; false: some of it, or nobody knows how much, is not there. */
static bool copy_data(Commit *c, const CommitBatch *b)
{
    BdrvCopyExtent ext[BATCH_EXTENTS];
    size_t n = 0;

    for (unsigned i = 0; i < b->n; i++) {
        if (!b->ext[i].zero) {
            ext[n++] = (BdrvCopyExtent){b->ext[i].offset, b->ext[i].offset, b->ext[i].bytes};
        }
    }
    return blk_copy_extents(c->from, c->to, ext, n, BDRV_COPY_SHARING) >= 0;
}

static GError *write_zeroes(Commit *c, const Extent *e)
{
    int ret = blk_pwrite_zeroes(c->to, e->offset, e->bytes, BDRV_REQ_MAY_UNMAP);
    return ret < 0 ? copy_error(ret, "Writing", c->opts->base, e->offset) : NULL;
}

/* An error of a copy does not say whose it is: what fails is done once more by hand. */
static GError *copy_batch(Commit *c, const CommitBatch *b)
{
    bool copied = copy_data(c, b);
    GError *err = NULL;

    for (unsigned i = 0; i < b->n && !err; i++) {
        if (b->ext[i].zero) {
            err = write_zeroes(c, &b->ext[i]);
        } else if (!copied) {
            err = copy_by_hand(c, &b->ext[i]);
        }
    }
    return err;
}

static void report_error(Commit *c, GError *err)
{
    QB_GUARD(&c->lock);
    if (c->error) {
        g_error_free(err);
    } else {
        c->error = err;
    }
}

static void *worker_main(void *opaque)
{
    Commit *c = opaque;
    CommitBatch b;

    while (take_batch(c, &b)) {
        GError *err = copy_batch(c, &b);
        if (err) {
            report_error(c, err);
        } else {
            qb_progress_add(c->opts->progress, (uint64_t)(b.next - b.from));
        }
    }
    return NULL;
}

/* A limited rate is kept by one worker alone. */
static bool copy_all(Commit *c, GError **errp)
{
    pthread_t threads[WORKERS - 1];
    unsigned started = 0, wanted = c->limit.speed ? 0 : WORKERS - 1;

    while (started < wanted && qb_thread_start(&threads[started], "commit", worker_main, c)) {
        started++;
    }
    worker_main(c);
    while (started > 0) {
        pthread_join(threads[--started], NULL);
    }
    if (c->error) {
        g_propagate_error(errp, g_steal_pointer(&c->error));
        return false;
    }
    return true;
}

/* ---- around it ---- */

static bool grow_base(Commit *c, GError **errp)
{
    int64_t base_size = blk_getlength(c->to);

    if (base_size < 0) {
        qb_error_set_errno(errp, (int)-base_size, "Failed to get the size of the base image");
        return false;
    }
    return base_size >= c->size ||
           blk_truncate(c->to, c->size, false, PREALLOC_MODE_OFF, true, errp);
}

static bool copy_and_flush(Commit *c, GError **errp)
{
    int ret;

    if (!copy_all(c, errp)) {
        return false;
    }
    ret = blk_flush(c->to);
    if (ret < 0) {
        qb_error_set_errno(errp, -ret, "Failed to flush the base image");
    }
    return ret >= 0;
}

/* Users' scripts tell a job that failed from one that could not begin. */
static bool commit_opened(Commit *c, GError **errp)
{
    if (!grow_base(c, errp)) {
        return false;
    }
    bool ok = copy_and_flush(c, errp);
    if (!ok) {
        g_prefix_error(errp, "Block job failed: ");
    }
    return ok;
}

static bool commit_with_backends(Commit *c, GError **errp)
{
    g_autoptr(BlockBackend) from =
        blk_new_with_bs(c->opts->top, BLK_PERM_CONSISTENT_READ, BLK_PERM_ALL, errp);
    g_autoptr(BlockBackend) to =
        from ? blk_new_with_bs(c->opts->base,
                               BLK_PERM_CONSISTENT_READ | BLK_PERM_WRITE | BLK_PERM_RESIZE,
                               BLK_PERM_ALL, errp)
             : NULL;

    if (!to) {
        return false;
    }
    c->from = from;
    c->to = to;
    return commit_opened(c, errp);
}

/* A limited rate is kept from one tenth of a second to the next. */
static int64_t batch_bytes(uint64_t speed)
{
    uint64_t tenth = qb_align_down(speed / 10, SLOW_BATCH_BYTES);
    return speed ? (int64_t)CLAMP(tenth, SLOW_BATCH_BYTES, BATCH_BYTES) : BATCH_BYTES;
}

bool commit_run(const CommitOptions *opts, GError **errp)
{
    Commit c = {.opts = opts, .limit = {.speed = opts->speed},
                .batch_bytes = batch_bytes(opts->speed)};
    bool was_read_only = bdrv_is_read_only(opts->base), ok;

    c.size = bdrv_getlength(opts->top);
    if (c.size < 0) {
        qb_error_set_errno(errp, (int)-c.size, "Failed to get the size of the image");
        return false;
    }
    qb_mutex_init(&c.lock);
    c.found = g_array_new(false, false, sizeof(BdrvRange));
    qb_progress_grow(opts->progress, (uint64_t)c.size);
    ok = (!was_read_only || bdrv_reopen_set_read_only(opts->base, false, errp)) &&
         commit_with_backends(&c, errp);
    if (was_read_only && !bdrv_is_read_only(opts->base)) {
        ok &= bdrv_reopen_set_read_only(opts->base, true, ok ? errp : NULL);
    }
    g_array_unref(c.found);
    qb_mutex_destroy(&c.lock);
    return ok;
}
