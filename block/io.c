/*
 * Requests on a child: the entry of reads, writes, zeroes and discards into a node.
 *
 *   bdrv_pwritev(child, ...)                 one graph entry
 *     check the range                        -EIO, -EPERM
 *     begin: count, draw the ticket          (blk_submit() did so earlier: bdrv_*_drawn())
 *     enter: plain or serialising
 *     check against the end of the node      only now: a truncate may have been in the way
 *     carry out                              io-align.c, io-zero.c, io-cor.c
 *     end
 *
 * Which requests enter serialising: those that need a read-modify-write, zeroes, discards, compressed
 * writes.  A read-modify-write, and zeroes for parts of clusters, wait for plain ones, too.  All other
 * writes enter as plain ones; a driver that finds out that it has to allocate calls
 * bdrv_request_serialise().
 *
 * Invariants
 *  1. A range that reaches the code below io.c is a range of non-negative int64_t numbers, lies
 *     inside the vector, and for writes inside the node (or the node grows).
 *  2. Zeroes and discards of more than 1 GiB are requests of at most that, one graph entry each
 *     when the caller holds none, so that a change of the graph never waits for terabytes.  The
 *     cuts are at multiples of 1 GiB and so never split a cluster.
 *
 * Not done: a request drawn earlier is never cut, since its ticket covers it as one.  Letting the graph
 * lock go between its pieces would be a deadlock: whoever drew later and overlaps holds the lock and
 * waits for the ticket, a change of the graph waits for them, and this request for the change.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/io-int.h"

#define PIECE_MAX ((int64_t)1 << 30)

/* --- checks --- */

static int check_transfer(const BdrvTransfer *t)
{
    if (!qb_range_valid(t->offset, t->bytes) || t->bytes > BDRV_REQUEST_MAX_BYTES) {
        return -EIO;
    }
    assert(t->qiov_offset <= t->qiov->size);
    assert((size_t)t->bytes <= t->qiov->size - t->qiov_offset);
    return 0;
}

static int check_change(const BdrvTransfer *t)
{
    if (!qb_range_valid(t->offset, t->bytes)) {
        return -EIO;
    }
    return t->bs->read_only ? -EPERM : 0;
}

static int check_end(const BdrvTransfer *t)
{
    if (bdrv_known_to_reach(t->bs, t->offset + t->bytes)) {
        return 0;
    }
    int64_t length = bdrv_getlength(t->bs);
    if (length < 0) {
        return (int)length;
    }
    return t->offset + t->bytes <= length || bdrv_can_grow(t->bs) ? 0 : -EIO;
}

static bool wants_copy_on_read(const BdrvTransfer *t)
{
    bool asked = (t->flags & BDRV_REQ_COPY_ON_READ) || (t->bs->open_flags & BDRV_O_COPY_ON_READ);
    return asked && !t->bs->read_only;
}

/* --- carrying out: the request has begun --- */

static int run_read(const BdrvTransfer *t)
{
    int ret = check_transfer(t);
    if (ret < 0 || t->bytes == 0) {
        return ret;
    }
    return wants_copy_on_read(t) ? bdrv_copy_on_read(t) : bdrv_padded_preadv(t);
}

static void enter_write(const BdrvTransfer *t)
{
    bool aligned = bdrv_transfer_is_aligned(t);
    if (aligned && !(t->flags & BDRV_REQ_COMPRESSED)) {
        bdrv_request_enter(t->req);
    } else {
        bdrv_request_enter_serialising(t->req, !aligned);
    }
}

static int run_write(const BdrvTransfer *t)
{
    int ret = check_transfer(t);
    if (ret == 0) {
        ret = check_change(t);
    }
    if (ret < 0 || t->bytes == 0) {
        return ret;
    }
    enter_write(t);
    ret = check_end(t);
    return ret < 0 ? ret : bdrv_padded_pwritev(t);
}

/* Zeroes for a part of what the driver changes as one may be written out, into the place where an
 * earlier write is still under way: they wait for it. */
static bool in_whole_units(const BdrvTransfer *t)
{
    return qb_is_aligned((uint64_t)(t->offset | t->bytes), bdrv_serialising_unit(t->bs));
}

static int run_zeroes(const BdrvTransfer *t)
{
    int ret = check_change(t);
    if (ret < 0 || t->bytes == 0) {
        return ret;
    }
    bdrv_request_enter_serialising(t->req, !in_whole_units(t));
    ret = check_end(t);
    return ret < 0 ? ret : bdrv_do_pwrite_zeroes(t);
}

/* Discards are advice: what lies beyond the end is not an error, and who does not want them gets
 * none. */
static int run_discard(const BdrvTransfer *t)
{
    int ret = check_change(t);
    bool wanted = t->bs->discard_unmap && t->bs->drv->pdiscard;
    if (ret < 0 || t->bytes == 0 || !wanted) {
        return ret;
    }
    bdrv_request_enter_serialising(t->req, false);
    int64_t length = bdrv_getlength(t->bs);
    if (length < 0) {
        return (int)length;
    }
    BdrvTransfer inside = *t;
    inside.bytes = CLAMP(length - t->offset, 0, t->bytes);
    return bdrv_do_pdiscard(&inside);
}

/* --- requests drawn earlier --- */

static int drawn(BdrvChild *child, BdrvTransfer t, int (*run)(const BdrvTransfer *t))
{
    assert(bdrv_graph_held());
    assert(t.req->bs == child->bs); /* nobody may have changed the graph in between */
    t.bs = child->bs;
    if (t.bs->cache_no_flush && !t.bs->file) {
        t.flags &= ~BDRV_REQ_FUA; /* nothing is made stable there, see io-node.c */
    }
    int ret = run(&t);
    bdrv_request_end(t.req);
    return ret;
}

int bdrv_preadv_drawn(BdrvChild *child, BdrvRequest *req, int64_t offset, int64_t bytes,
                      IoVector *qiov, int flags)
{
    BdrvTransfer t = {
        .req = req, .offset = offset, .bytes = bytes, .qiov = qiov, .flags = flags,
    };
    return drawn(child, t, run_read);
}

int bdrv_pwritev_drawn(BdrvChild *child, BdrvRequest *req, int64_t offset, int64_t bytes,
                       IoVector *qiov, int flags)
{
    BdrvTransfer t = {
        .req = req, .offset = offset, .bytes = bytes, .qiov = qiov, .flags = flags,
    };
    return drawn(child, t, run_write);
}

int bdrv_pwrite_zeroes_drawn(BdrvChild *child, BdrvRequest *req, int64_t offset, int64_t bytes,
                             int flags)
{
    BdrvTransfer t = {.req = req, .offset = offset, .bytes = bytes, .flags = flags};
    return drawn(child, t, run_zeroes);
}

int bdrv_pdiscard_drawn(BdrvChild *child, BdrvRequest *req, int64_t offset, int64_t bytes)
{
    BdrvTransfer t = {.req = req, .offset = offset, .bytes = bytes};
    return drawn(child, t, run_discard);
}

/* --- requests drawn now --- */

/* A bad range has no place in the order. It fails here as it would further down. */
static int now(BdrvChild *child, BdrvTransfer t, BdrvRequestType type,
               int (*run)(const BdrvTransfer *t))
{
    if (!qb_range_valid(t.offset, t.bytes)) {
        return -EIO;
    }
    BDRV_GRAPH_GUARD();
    BdrvRequest req;
    bdrv_request_begin(&req, child->bs, type, t.offset, t.bytes);
    t.req = &req;
    return drawn(child, t, run);
}

int bdrv_preadv_part(BdrvChild *child, int64_t offset, int64_t bytes, IoVector *qiov,
                     size_t qiov_offset, int flags)
{
    BdrvTransfer t = {
        .offset = offset, .bytes = bytes, .qiov = qiov, .qiov_offset = qiov_offset, .flags = flags,
    };
    return now(child, t, BDRV_TRACKED_READ, run_read);
}

int bdrv_pwritev_part(BdrvChild *child, int64_t offset, int64_t bytes, IoVector *qiov,
                      size_t qiov_offset, int flags)
{
    BdrvTransfer t = {
        .offset = offset, .bytes = bytes, .qiov = qiov, .qiov_offset = qiov_offset, .flags = flags,
    };
    return now(child, t, BDRV_TRACKED_WRITE, run_write);
}

int bdrv_preadv(BdrvChild *child, int64_t offset, int64_t bytes, IoVector *qiov, int flags)
{
    return bdrv_preadv_part(child, offset, bytes, qiov, 0, flags);
}

int bdrv_pwritev(BdrvChild *child, int64_t offset, int64_t bytes, IoVector *qiov, int flags)
{
    return bdrv_pwritev_part(child, offset, bytes, qiov, 0, flags);
}

int bdrv_pread(BdrvChild *child, int64_t offset, int64_t bytes, void *buf, int flags)
{
    if (bytes < 0) {
        return -EIO;
    }
    IoVector qiov;
    iov_vector_init_buf(&qiov, buf, (size_t)bytes);
    return bdrv_preadv(child, offset, bytes, &qiov, flags);
}

int bdrv_pwrite(BdrvChild *child, int64_t offset, int64_t bytes, const void *buf, int flags)
{
    if (bytes < 0) {
        return -EIO;
    }
    IoVector qiov;
    iov_vector_init_buf(&qiov, (void *)buf, (size_t)bytes);
    return bdrv_pwritev(child, offset, bytes, &qiov, flags);
}

int bdrv_pwrite_sync(BdrvChild *child, int64_t offset, int64_t bytes, const void *buf, int flags)
{
    BDRV_GRAPH_GUARD();
    int ret = bdrv_pwrite(child, offset, bytes, buf, flags);
    return ret < 0 ? ret : bdrv_flush(child->bs);
}

/* --- any length --- */

/* Up to the next multiple of 1 GiB. */
static int64_t piece_bytes(int64_t offset, int64_t bytes)
{
    return MIN(bytes, PIECE_MAX - offset % PIECE_MAX);
}

static int in_long_pieces(BdrvChild *child, BdrvTransfer t, BdrvRequestType type,
                          int (*run)(const BdrvTransfer *t))
{
    int64_t left = t.bytes;
    if (!qb_range_valid(t.offset, left)) {
        return -EIO;
    }
    int ret;
    do {
        t.bytes = piece_bytes(t.offset, left);
        ret = now(child, t, type, run);
        t.offset += t.bytes;
        left -= t.bytes;
    } while (ret == 0 && left > 0);
    return ret;
}

/* All that was zeroed becomes stable at once, not piece by piece. */
static int flush_after_zeroes(BdrvChild *child)
{
    BDRV_GRAPH_GUARD();
    return bdrv_flush(child->bs);
}

int bdrv_pwrite_zeroes(BdrvChild *child, int64_t offset, int64_t bytes, int flags)
{
    bool flush = (flags & BDRV_REQ_FUA) && bytes > PIECE_MAX;
    BdrvTransfer t = {.offset = offset, .bytes = bytes, .flags = flags};
    t.flags &= flush ? ~BDRV_REQ_FUA : ~0;
    int ret = in_long_pieces(child, t, BDRV_TRACKED_ZERO, run_zeroes);
    return ret == 0 && flush ? flush_after_zeroes(child) : ret;
}

int bdrv_pdiscard(BdrvChild *child, int64_t offset, int64_t bytes)
{
    BdrvTransfer t = {.offset = offset, .bytes = bytes};
    bdrv_graph_rdlock();
    int64_t length = bdrv_getlength(child->bs);
    bdrv_graph_rdunlock();
    if (length < 0) {
        return (int)length;
    }
    if (qb_range_valid(offset, bytes)) { /* else it fails below */
        t.bytes = CLAMP(length - offset, 0, bytes); /* or a discard of "all" would take years */
    }
    return in_long_pieces(child, t, BDRV_TRACKED_DISCARD, run_discard);
}
