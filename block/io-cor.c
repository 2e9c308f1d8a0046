/*
 * Copy-on-read: what a read fetched from below the node stays in the node.
 *
 *   wanted            |=======================|
 *   clusters      |-------|-------|-------|-------|
 *   in the node   | no    | no    | yes   | no    |
 *                 '-copied in one-' read   '-copied'
 *
 * Copies are whole clusters, read through the node itself (so from wherever the content is),
 * written into it as a write that changes nothing, and then handed to the reader.  Zeroes are
 * written as zeroes.
 *
 * Invariants
 *  1. From the look at the map to the end of the copy no write changes the range: the request
 *     serialises over it and waits for plain writes, so that old content never covers new.
 *  2. A read of what is in the node already takes no range and copies nothing.
 *  3. A failed copy fails the read: who asked for it wants to know.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/io-int.h"

#define COPY_MAX ((int64_t)1 << 20)

/* A read with its copy: the reader's request @t, ours @req, and the buffer both use. */
typedef struct CopyOnRead {
    const BdrvTransfer *t;
    BdrvRequest req;
    int64_t unit;
    uint8_t *buf;
    int64_t buf_len;
} CopyOnRead;

static int64_t copy_unit(BlockDriverState *bs)
{
    BlockDriverInfo info = {0};
    uint32_t least = MAX(bs->bl.request_alignment, 1);
    if (!bdrv_get_info(bs, &info, NULL)) {
        return least;
    }
    uint32_t unit = info.subcluster_size ? info.subcluster_size : info.cluster_size;
    return MAX(unit, least);
}

static int is_allocated(BlockDriverState *bs, int64_t offset, int64_t bytes, int64_t *n)
{
    return bdrv_is_allocated_above(bs, bs, true, offset, bytes, n);
}

/* 1: nothing of the range would be copied. */
static int is_all_allocated(const BdrvTransfer *t)
{
    int64_t n = 0;
    int ret = is_allocated(t->bs, t->offset, t->bytes, &n);
    return ret < 0 ? ret : ret > 0 && n == t->bytes;
}

/* The part of @t that lies in [offset, offset + bytes); empty when there is none. */
static BdrvTransfer wanted_part(const BdrvTransfer *t, int64_t offset, int64_t bytes)
{
    int64_t from = MAX(offset, t->offset);
    int64_t to = MIN(offset + bytes, t->offset + t->bytes);
    BdrvTransfer part = *t;
    part.offset = from;
    part.bytes = MAX(to - from, 0);
    part.qiov_offset += (size_t)(from - t->offset);
    return part;
}

static bool cluster_is_zero(const CopyOnRead *c, int64_t at, int64_t bytes)
{
    return qb_buffer_is_zero(c->buf + at, (size_t)MIN(c->unit, bytes - at));
}

/* How many of the @bytes in the buffer from @at on are clusters alike: all zero, or none. */
static int64_t clusters_alike(const CopyOnRead *c, int64_t at, int64_t bytes, bool zero)
{
    int64_t end = at;
    while (end < bytes && cluster_is_zero(c, end, bytes) == zero) {
        end += MIN(c->unit, bytes - end);
    }
    return end - at;
}

/* Writes @copy, which is in the buffer, into the node. */
static int store_copy(CopyOnRead *c, const BdrvTransfer *copy)
{
    int ret = 0;
    bdrv_node_debug_event(copy->bs, "cor_write");
    for (int64_t at = 0; at < copy->bytes && ret == 0;) {
        bool zero = cluster_is_zero(c, at, copy->bytes);
        BdrvTransfer part = *copy;
        part.req = &c->req;
        part.flags = BDRV_REQ_UNCHANGED;
        part.offset += at;
        part.bytes = clusters_alike(c, at, copy->bytes, zero);
        part.qiov_offset = (size_t)at;
        ret = zero ? bdrv_do_pwrite_zeroes(&part) : bdrv_write_pieces(&part);
        at += part.bytes;
    }
    return ret;
}

/* Copies clusters into the node, and what is wanted of them to the reader. */
static int copy_run(CopyOnRead *c, int64_t offset, int64_t bytes)
{
    IoVector flat;
    iov_vector_init_buf(&flat, c->buf, (size_t)bytes);
    BdrvTransfer copy = {
        .bs = c->t->bs, .req = c->t->req, .offset = offset, .bytes = bytes, .qiov = &flat,
    };
    int ret = bdrv_aligned_preadv(&copy);
    if (ret == 0) {
        ret = store_copy(c, &copy);
    }
    BdrvTransfer part = wanted_part(c->t, offset, bytes);
    if (ret == 0 && part.bytes > 0) {
        iov_vector_from_buf(part.qiov, part.qiov_offset, c->buf + (part.offset - offset),
                            (size_t)part.bytes);
    }
    return ret;
}

static int read_run(CopyOnRead *c, int64_t offset, int64_t bytes)
{
    BdrvTransfer part = wanted_part(c->t, offset, bytes);
    return part.bytes > 0 ? bdrv_padded_preadv(&part) : 0;
}

/* [offset, end) are whole clusters that hold the wanted range. */
static int copy_clusters(CopyOnRead *c, int64_t offset, int64_t end)
{
    while (offset < end) {
        int64_t n = end - offset;
        int ret = is_allocated(c->t->bs, offset, n, &n);
        if (ret == 0) {
            n = MIN(n, c->buf_len);
            ret = copy_run(c, offset, n);
        } else if (ret > 0) {
            ret = read_run(c, offset, n);
        }
        if (ret < 0) {
            return ret;
        }
        offset += n;
    }
    return 0;
}

/* The wanted range in clusters, as far as the node goes. */
static int find_clusters(CopyOnRead *c, int64_t *ret_offset, int64_t *ret_end)
{
    const BdrvTransfer *t = c->t;
    int64_t unit = c->unit = MIN(copy_unit(t->bs), bdrv_serialising_unit(t->bs));
    int64_t length = bdrv_getlength(t->bs), up;
    if (length < 0) {
        return (int)length;
    }
    bool no_end = qb_align_up_overflow((uint64_t)length, t->bs->bl.request_alignment, &length)
                  || qb_align_up_overflow((uint64_t)(t->offset + t->bytes), (uint64_t)unit, &up);
    if (no_end) {
        return -EIO;
    }
    *ret_offset = (int64_t)qb_align_down((uint64_t)t->offset, (uint64_t)unit);
    *ret_end = MIN(up, length);
    c->buf_len = MIN(MAX(unit, COPY_MAX), MAX(*ret_end - *ret_offset, 1));
    return 0;
}

/* What lies beyond the end of the node reads as zeroes and is not copied. */
static void zero_beyond_end(const BdrvTransfer *t, int64_t end)
{
    BdrvTransfer part = wanted_part(t, end, INT64_MAX - end);
    if (part.bytes > 0) {
        iov_vector_memset(part.qiov, part.qiov_offset, 0, (size_t)part.bytes);
    }
}

static int copy_on_read_serialised(CopyOnRead *c)
{
    int64_t offset = 0, end = 0;
    int ret = find_clusters(c, &offset, &end);
    if (ret < 0) {
        return ret;
    }
    c->buf = bdrv_try_blockalign(c->t->bs, (size_t)c->buf_len);
    if (!c->buf) {
        return -ENOMEM;
    }
    ret = copy_clusters(c, offset, end);
    if (ret == 0) {
        zero_beyond_end(c->t, end);
    }
    free(c->buf);
    return ret;
}

int bdrv_copy_on_read(const BdrvTransfer *t)
{
    assert(t->bytes > 0 && t->req->type == BDRV_TRACKED_READ);
    int ret = t->bs->backing ? is_all_allocated(t) : 1;
    if (ret != 0) {
        return ret < 0 ? ret : bdrv_padded_preadv(t);
    }
    CopyOnRead c = {.t = t};
    bdrv_request_begin(&c.req, t->bs, BDRV_TRACKED_WRITE, t->offset, t->bytes);
    bdrv_request_enter_serialising(&c.req, true);
    ret = copy_on_read_serialised(&c);
    bdrv_request_end(&c.req);
    return ret;
}
