/*
 * Transfers at the driver: what stands between an aligned request and the driver's callbacks.
 *
 *   aligned read                          aligned write
 *     |-- beyond the end: zeroes            |-- all zero and detect-zeroes: becomes a zero write
 *     v                                     v
 *   pieces of max_transfer                pieces of max_transfer, pwritev / pwritev_done events
 *     v                                     v
 *   memory fit for the driver?            memory fit for the driver?
 *     |-- yes: preadv                       |-- yes: pwritev
 *     '-- no:  through a bounce buffer      '-- no:  through a bounce buffer
 *                                           v
 *                                         flush, where the driver cannot do FUA itself
 *
 * Invariants
 *  1. A driver sees multiples of request_alignment, at most max_transfer and BDRV_REQUEST_MAX_BYTES
 *     long; vectors of at most max_iov elements, which have min_mem_alignment where it asks for it.
 *  2. A read hands back zeroes for every byte at or beyond the end of the node, whatever the driver
 *     put there.
 *  3. bs->length only rises here, and before the write that raised it returns.
 *
 * Not done: no attempt to bounce only those elements that are not aligned.  Bounce buffers hold 1
 * MiB; a request that needs one is copied anyway, so more pieces cost little.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/io-int.h"

#include <limits.h>

#define BOUNCE_MAX (1 << 20)
#define DEFAULT_MAX_IOV 1024 /* what the kernel takes in one call */

int64_t bdrv_limit_aligned(int64_t max, uint32_t align)
{
    int64_t limit = max > 0 && max < BDRV_REQUEST_MAX_BYTES ? max : BDRV_REQUEST_MAX_BYTES;
    int64_t cut = limit - limit % align;
    return cut > 0 ? cut : align;
}

/* The first @bytes of @t. */
static BdrvTransfer transfer_head(const BdrvTransfer *t, int64_t bytes)
{
    BdrvTransfer head = *t;
    head.bytes = bytes;
    return head;
}

/* Moves the start of @t forward. */
static void transfer_advance(BdrvTransfer *t, int64_t bytes)
{
    t->offset += bytes;
    t->bytes -= bytes;
    t->qiov_offset += (size_t)bytes;
}

static int in_pieces(const BdrvTransfer *t, int64_t max, int (*fn)(const BdrvTransfer *piece))
{
    BdrvTransfer rest = *t;
    int ret = 0;
    while (rest.bytes > 0 && ret >= 0) {
        BdrvTransfer piece = transfer_head(&rest, MIN(rest.bytes, max));
        ret = fn(&piece);
        transfer_advance(&rest, piece.bytes);
    }
    return ret;
}

static int64_t max_transfer(const BlockDriverState *bs)
{
    return bdrv_limit_aligned(bs->bl.max_transfer, bs->bl.request_alignment);
}

/* --- the callbacks, contract checked --- */

static void assert_transfer(const BdrvTransfer *t)
{
    assert(bdrv_graph_held());
    assert(t->bytes > 0 && t->bytes <= max_transfer(t->bs));
    assert(qb_is_aligned((uint64_t)(t->offset | t->bytes), t->bs->bl.request_alignment));
    assert(t->qiov_offset + (size_t)t->bytes <= t->qiov->size);
    (void)t;
}

static int call_preadv(const BdrvTransfer *t)
{
    const BlockDriver *drv = t->bs->drv;
    assert_transfer(t);
    if (!drv->preadv) {
        return -ENOTSUP;
    }
    int ret = drv->preadv(t->bs, t->req, t->offset, t->bytes, t->qiov, t->qiov_offset, t->flags);
    assert(ret <= 0);
    return ret;
}

static int call_pwritev(const BdrvTransfer *t)
{
    const BlockDriver *drv = t->bs->drv;
    assert_transfer(t);
    int ret = -ENOTSUP;
    if (t->flags & BDRV_REQ_COMPRESSED) {
        if (drv->pwritev_compressed) {
            ret = drv->pwritev_compressed(t->bs, t->req, t->offset, t->bytes, t->qiov,
                                          t->qiov_offset);
        }
    } else if (drv->pwritev) {
        int flags = t->flags & (int)drv->supported_write_flags;
        ret = drv->pwritev(t->bs, t->req, t->offset, t->bytes, t->qiov, t->qiov_offset, flags);
    }
    assert(ret <= 0);
    return ret;
}

/* --- memory --- */

/* True when the driver may be given the memory of @t as it is. */
static bool memory_fits(const BdrvTransfer *t)
{
    const BlockLimits *bl = &t->bs->bl;
    int max_iov = bl->max_iov > 0 ? bl->max_iov : DEFAULT_MAX_IOV;
    if (bl->min_mem_alignment <= 1 && t->qiov->niov <= max_iov) {
        return true;
    }
    IOV_VECTOR_AUTO part;
    iov_vector_init_slice(&part, t->qiov, t->qiov_offset, (size_t)t->bytes);
    return part.niov <= max_iov
           && (bl->min_mem_alignment <= 1 || iov_vector_is_aligned(&part, bl->min_mem_alignment));
}

static int64_t bounce_max(const BlockDriverState *bs)
{
    return bdrv_limit_aligned(MIN(BOUNCE_MAX, max_transfer(bs)), bs->bl.request_alignment);
}

typedef int TransferFn(const BdrvTransfer *t);

/* Runs @t through a buffer of the driver's liking, in pieces. */
static int bounced(const BdrvTransfer *t, TransferFn *fn, bool is_write)
{
    int64_t max = MIN(bounce_max(t->bs), t->bytes);
    QB_AUTO_FREE void *buf = bdrv_try_blockalign(t->bs, (size_t)max);
    if (!buf) {
        return -ENOMEM;
    }
    BdrvTransfer rest = *t;
    int ret = 0;
    while (rest.bytes > 0 && ret >= 0) {
        size_t n = (size_t)MIN(rest.bytes, max);
        IoVector flat;
        iov_vector_init_buf(&flat, buf, n);
        BdrvTransfer piece = transfer_head(&rest, (int64_t)n);
        piece.qiov = &flat;
        piece.qiov_offset = 0;
        if (is_write) {
            iov_vector_to_buf(rest.qiov, rest.qiov_offset, buf, n);
        }
        ret = fn(&piece);
        if (!is_write && ret >= 0) {
            iov_vector_from_buf(rest.qiov, rest.qiov_offset, buf, n);
        }
        transfer_advance(&rest, (int64_t)n);
    }
    return ret;
}

static int read_piece(const BdrvTransfer *t)
{
    return memory_fits(t) ? call_preadv(t) : bounced(t, call_preadv, false);
}

static int write_piece(const BdrvTransfer *t)
{
    /* A compressed cluster is made from one call: it must not be cut into bounce buffers. */
    bool whole = (t->flags & BDRV_REQ_COMPRESSED) || memory_fits(t);
    return whole ? call_pwritev(t) : bounced(t, call_pwritev, true);
}

/* --- reads --- */

/* How much of @t the driver is asked for: up to the end of the node, rounded up. */
static int64_t readable_bytes(const BdrvTransfer *t, int64_t length)
{
    int64_t up;
    if (length <= t->offset) {
        return 0;
    }
    if (qb_align_up_overflow((uint64_t)length, t->bs->bl.request_alignment, &up)) {
        return t->bytes;
    }
    return MIN(t->bytes, up - t->offset);
}

static void zero_beyond(const BdrvTransfer *t, int64_t length)
{
    int64_t keep = CLAMP(length - t->offset, 0, t->bytes);
    iov_vector_memset(t->qiov, t->qiov_offset + (size_t)keep, 0, (size_t)(t->bytes - keep));
}

static int read_inside(const BdrvTransfer *t, int64_t bytes)
{
    BdrvTransfer inside = transfer_head(t, bytes);
    inside.flags = 0; /* no request flag means anything to a driver's read */
    return in_pieces(&inside, max_transfer(t->bs), read_piece);
}

bool bdrv_known_to_reach(const BlockDriverState *bs, int64_t end)
{
    return end <= atomic_load(&bs->length);
}

int bdrv_aligned_preadv(const BdrvTransfer *t)
{
    if (bdrv_known_to_reach(t->bs, t->offset + t->bytes)) {
        return read_inside(t, t->bytes);
    }
    int64_t length = bdrv_getlength(t->bs);
    if (length < 0) {
        return (int)length;
    }
    int ret = read_inside(t, readable_bytes(t, length));
    if (ret == 0) {
        zero_beyond(t, length);
    }
    return ret;
}

/* --- writes --- */

/* The node whose length this one has. */
static BlockDriverState *length_owner(BlockDriverState *bs)
{
    while (bs->file && (bs->drv->has_variable_length || bs->drv->is_filter)) {
        bs = bs->file->bs;
    }
    return bs;
}

bool bdrv_can_grow(const BlockDriverState *bs)
{
    const BlockDriver *drv = length_owner((BlockDriverState *)bs)->drv;
    return drv->protocol_name && drv->truncate && !drv->has_fixed_length;
}

int64_t bdrv_ask_length_again(BlockDriverState *bs)
{
    int64_t length = bdrv_refresh_length(length_owner(bs));
    return length < 0 ? length : bdrv_getlength(bs);
}

void bdrv_raise_length(BlockDriverState *bs, int64_t end)
{
    int64_t known = atomic_load(&bs->length);
    if (end <= known || !bdrv_can_grow(bs)) {
        return; /* the last unit of a node with an odd length is written past its end */
    }
    while (known >= 0 && known < end && !atomic_compare_exchange_weak(&bs->length, &known, end)) {
    }
}

/* The flush that stands for FUA at a driver that has none. */
static int finish_fua(const BdrvTransfer *t)
{
    bool native = (t->bs->drv->supported_write_flags & BDRV_REQ_FUA)
                  && !(t->flags & BDRV_REQ_COMPRESSED);
    return (t->flags & BDRV_REQ_FUA) && !native ? bdrv_flush(t->bs) : 0;
}

int bdrv_write_pieces(const BdrvTransfer *t)
{
    return in_pieces(t, max_transfer(t->bs), write_piece);
}

static int write_data(const BdrvTransfer *t)
{
    bool changes = !(t->flags & BDRV_REQ_UNCHANGED);
    int ret = changes ? bdrv_dirty_before(t->bs, t->offset, t->bytes) : 0;
    if (ret < 0) {
        return ret;
    }
    bdrv_node_debug_event(t->bs, "pwritev");
    ret = bdrv_write_pieces(t);
    bdrv_node_debug_event(t->bs, "pwritev_done");
    if (changes) {
        bdrv_dirty_after(t->bs, t->offset, t->bytes);
    }
    if (ret < 0) {
        return ret;
    }
    bdrv_raise_length(t->bs, t->offset + t->bytes);
    return finish_fua(t);
}

int bdrv_aligned_pwritev(const BdrvTransfer *t)
{
    if (!bdrv_detects_zeroes(t)) {
        return write_data(t);
    }
    BdrvTransfer zeroes = *t;
    zeroes.qiov = NULL;
    zeroes.qiov_offset = 0;
    zeroes.flags |= t->bs->detect_zeroes == 2 ? BDRV_REQ_MAY_UNMAP : 0;
    if (t->req->range.state == QB_RANGE_ENTERED) {
        bdrv_request_enter_serialising(t->req, false);
    }
    return bdrv_do_pwrite_zeroes(&zeroes);
}
