/*
 * Commit: what the layers above a base hold goes into the base.
 *
 *      top --> a --> b --> base          (each arrow: backed by)
 *      \_________________/
 *        allocated here?  --batch of extents--> read from top --> written to base
 *
 * Only what is allocated above the base is visited; ranges that read as zeroes become zeroes in the
 * base without being read, and nothing at all where the base reads as zeroes already.  A batch is
 * read at depth, then written at depth.
 *
 * Invariants
 * 1. The base's content never becomes something that neither base nor top showed: a range is
 *    written with what top shows.  So a commit that stops half-way can be run again, to completion.
 * 2. The base is flushed before success is reported; whoever empties or deletes the overlay
 *    afterwards relies on it.
 * 3. The base goes back to read-only whether the commit succeeds or fails.
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
#include "util/error.h"
#include "util/thread.h"

#define BATCH_EXTENTS 64
#define BATCH_BYTES (16 * 1024 * 1024)
#define PIECE_BYTES (1024 * 1024)
#define LOOK_BYTES (INT64_C(1) << 30) /* an answer is asked for again where a batch ended in it */
#define BATCH_SPAN (INT64_C(256) << 30) /* looked at in one entry of the graph */
#define NAP_NS 50000000

typedef struct Commit {
    const CommitOptions *opts;
    BlockBackend *from, *to;
    int64_t size;     /* of top */
    uint8_t *buf;     /* BATCH_BYTES */
    BlockRateLimit limit;
} Commit;

typedef struct CommitBatch {
    BdrvBatchOp ops[BATCH_EXTENTS];
    unsigned n;
    size_t used; /* of the buffer */
    int64_t next; /* where the next batch begins */
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

static void add_zero(CommitBatch *b, int64_t offset, int64_t bytes)
{
    b->ops[b->n++] = (BdrvBatchOp){.kind = BDRV_BATCH_ZERO, .offset = offset, .bytes = bytes,
                                   .flags = BDRV_REQ_MAY_UNMAP};
}

/* As much of the extent as fits; returns how much that was. */
static int64_t add_data(Commit *c, CommitBatch *b, int64_t offset, int64_t bytes)
{
    int64_t done = 0;

    while (done < bytes && b->n < BATCH_EXTENTS && b->used < BATCH_BYTES) {
        int64_t n = MIN(MIN(bytes - done, PIECE_BYTES), (int64_t)(BATCH_BYTES - b->used));
        b->ops[b->n++] = (BdrvBatchOp){.kind = BDRV_BATCH_READ, .offset = offset + done, .bytes = n,
                                       .buf = c->buf + b->used};
        b->used += (size_t)n;
        done += n;
    }
    return done;
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
        add_zero(b, offset, bytes);
    }
    return bytes;
}

/* Looks at what is at b->next and adds it if a layer above the base decides it. Returns how far
 * that went, or -errno. */
static int64_t add_next(Commit *c, CommitBatch *b)
{
    BdrvStatus st = {0};
    int ret = bdrv_block_status_above(c->opts->top, c->opts->base, b->next,
                                      MIN(c->size - b->next, LOOK_BYTES), &st);

    if (ret < 0) {
        return ret;
    }
    if (!(st.flags & BDRV_BLOCK_ALLOCATED)) {
        return st.bytes;
    }
    return st.flags & BDRV_BLOCK_ZERO ? add_zero_extent(c, b, b->next, st.bytes)
                                      : add_data(c, b, b->next, st.bytes);
}

/* Fills @b from b->next on. One entry of the graph. */
static int collect_batch(Commit *c, CommitBatch *b)
{
    BDRV_GRAPH_GUARD();
    int64_t end = MIN(c->size, b->next + BATCH_SPAN);
    b->n = 0;
    b->used = 0;
    while (b->next < end && b->n < BATCH_EXTENTS && b->used < BATCH_BYTES) {
        int64_t step = add_next(c, b);
        if (step < 0) {
            return (int)step;
        }
        b->next += step;
    }
    return 0;
}

/* ---- copying a batch ---- */

static size_t pick_reads(const CommitBatch *b, BdrvBatchOp *out)
{
    size_t n = 0;

    for (unsigned i = 0; i < b->n; i++) {
        if (b->ops[i].kind == BDRV_BATCH_READ) {
            out[n++] = b->ops[i];
        }
    }
    return n;
}

/* The first line is the text of the errno alone, which scripts look at; the rest says where. */
static bool copy_error(int ret, const char *doing, BlockDriverState *bs, int64_t offset,
                       GError **errp)
{
    qb_error_set(errp, -ret, "%s", g_strerror(-ret));
    qb_error_add_hint(errp, "%s '%s' at offset %" PRId64 " or behind it failed.", doing,
                      bdrv_filename(bs), offset);
    return false;
}

static bool copy_batch(Commit *c, CommitBatch *b, int64_t from, GError **errp)
{
    BdrvBatchOp reads[BATCH_EXTENTS];
    size_t n = pick_reads(b, reads);
    int ret = n ? blk_run_batch(c->from, reads, n) : 0;

    if (ret < 0) {
        return copy_error(ret, "Reading", c->opts->top, from, errp);
    }
    for (unsigned i = 0; i < b->n; i++) {
        if (b->ops[i].kind == BDRV_BATCH_READ) {
            b->ops[i].kind = BDRV_BATCH_WRITE;
        }
    }
    ret = b->n ? blk_run_batch(c->to, b->ops, b->n) : 0;
    return ret >= 0 || copy_error(ret, "Writing", c->opts->base, from, errp);
}

static bool copy_all(Commit *c, GError **errp)
{
    CommitBatch b = {.next = 0};

    while (b.next < c->size) {
        int64_t from = b.next;
        int ret;
        if (qb_progress_cancelled(c->opts->progress)) {
            qb_error_set(errp, ECANCELED, "Commit stopped at offset %" PRId64 " of %" PRId64
                         "; run it again to complete it", from, c->size);
            return false;
        }
        ret = collect_batch(c, &b);
        if (ret < 0) {
            return copy_error(ret, "Looking for data in", c->opts->top, from, errp);
        }
        block_rate_limit_wait(&c->limit, b.used, c->opts->progress);
        if (!copy_batch(c, &b, from, errp)) {
            return false;
        }
        qb_progress_add(c->opts->progress, (uint64_t)(b.next - from));
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

static bool commit_opened(Commit *c, GError **errp)
{
    int ret;

    if (!grow_base(c, errp) || !copy_all(c, errp)) {
        return false;
    }
    ret = blk_flush(c->to);
    if (ret < 0) {
        qb_error_set_errno(errp, -ret, "Failed to flush the base image");
        return false;
    }
    return true;
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

bool commit_run(const CommitOptions *opts, GError **errp)
{
    Commit c = {.opts = opts, .limit = {.speed = opts->speed}};
    bool was_read_only = bdrv_is_read_only(opts->base), ok;

    c.size = bdrv_getlength(opts->top);
    if (c.size < 0) {
        qb_error_set_errno(errp, (int)-c.size, "Failed to get the size of the image");
        return false;
    }
    c.buf = bdrv_try_blockalign(opts->base, BATCH_BYTES);
    if (!c.buf) {
        qb_error_set(errp, ENOMEM, "Not enough memory for a buffer of %d bytes", BATCH_BYTES);
        return false;
    }
    qb_progress_grow(opts->progress, (uint64_t)c.size);
    ok = (!was_read_only || bdrv_reopen_set_read_only(opts->base, false, errp)) &&
         commit_with_backends(&c, errp);
    if (was_read_only && !bdrv_is_read_only(opts->base)) {
        ok &= bdrv_reopen_set_read_only(opts->base, true, ok ? errp : NULL);
    }
    free(c.buf);
    return ok;
}
