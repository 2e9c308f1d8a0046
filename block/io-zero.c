/*
 * Zeroes and discards: requests without data, cut to what the driver can do well.
 *
 *   request_alignment   |   |   |   |   |   |   |   |   |   |   |   |   |
 *   driver's unit       |               |               |               |
 *   wanted zeroes         [===================================)
 *                         a   b         c               d     e
 *   a..b  part of an aligned block: read-modify-write with zeroes from memory
 *   b..c  part of a unit, c..d whole units, and the rest of d..e up to the last block: three calls
 *         of the driver; where it declines (-ENOTSUP) zeroes are written, unless NO_FALLBACK
 *   ..e   the last part of a block: as a..b
 *
 * Discards are cut the same way, but what is no aligned block is left alone, and so is what the
 * driver declines.
 *
 * Invariants
 *  1. With NO_FALLBACK nothing has been changed when -ENOTSUP is returned for the middle: it goes
 *     first, the parts of blocks follow.
 *  2. Zeroes are written from one read-only buffer, in pieces of at most 8 MiB: memory does not
 *     grow with the request.
 *  3. MAY_UNMAP reaches a driver only when the node's option says discard=unmap.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/io-int.h"

#define ZERO_BUF_SIZE 65536
#define ZERO_WRITE_MAX (8 << 20)

static const uint8_t zero_buf[ZERO_BUF_SIZE] __attribute__((aligned(4096)));

/* Makes @v as many zeroes. Writes do not change what they write, hence the cast. */
static void init_zero_vector(IoVector *v, size_t bytes)
{
    iov_vector_init(v, (int)qb_div_round_up(bytes, ZERO_BUF_SIZE));
    while (bytes > 0) {
        size_t n = MIN(bytes, ZERO_BUF_SIZE);
        iov_vector_add(v, (void *)zero_buf, n);
        bytes -= n;
    }
}

/*
 * The next piece of [offset, end): up to the next multiple of @unit, then as many units as @max (a
 * multiple of @unit) allows, then the rest.
 */
static int64_t next_piece(int64_t offset, int64_t end, int64_t unit, int64_t max)
{
    int64_t left = end - offset;
    int64_t into = offset % unit;
    if (into) {
        return MIN(left, unit - into);
    }
    if (left > unit) {
        left -= left % unit;
    }
    return MIN(left, max);
}

/* --- zeroes --- */

bool bdrv_detects_zeroes(const BdrvTransfer *t)
{
    return t->bs->detect_zeroes && t->bs->drv->pwrite_zeroes
           && !(t->flags & BDRV_REQ_COMPRESSED)
           && iov_vector_is_zero(t->qiov, t->qiov_offset, (size_t)t->bytes);
}

static int write_zero_buffers(const BdrvTransfer *t)
{
    BdrvTransfer piece = *t;
    int64_t end = t->offset + t->bytes;
    IOV_VECTOR_AUTO zeroes;
    init_zero_vector(&zeroes, (size_t)MIN(t->bytes, ZERO_WRITE_MAX));
    piece.flags = t->flags & BDRV_REQ_UNCHANGED;
    piece.qiov = &zeroes;
    piece.qiov_offset = 0; /* it counts in a vector of the caller's, if there is one */
    int ret = 0;
    while (piece.offset < end && ret == 0) {
        piece.bytes = MIN(end - piece.offset, (int64_t)zeroes.size);
        ret = bdrv_write_pieces(&piece);
        piece.offset += piece.bytes;
    }
    return ret;
}

/* One call of the driver, or what stands for it. *need_flush: FUA was asked for and not done. */
static int zero_piece(const BdrvTransfer *t, bool *need_flush)
{
    const BlockDriver *drv = t->bs->drv;
    bool fua = t->flags & BDRV_REQ_FUA;
    if (drv->pwrite_zeroes) {
        int flags = t->flags & (int)drv->supported_zero_flags;
        int ret = drv->pwrite_zeroes(t->bs, t->req, t->offset, t->bytes, flags);
        assert(ret <= 0);
        if (ret != -ENOTSUP) {
            *need_flush |= fua && !(flags & BDRV_REQ_FUA);
            return ret;
        }
    }
    if (t->flags & BDRV_REQ_NO_FALLBACK) {
        return -ENOTSUP;
    }
    *need_flush |= fua;
    return write_zero_buffers(t);
}

static int zero_pieces(const BdrvTransfer *t, bool *need_flush)
{
    const BlockLimits *bl = &t->bs->bl;
    uint32_t unit = MAX(bl->request_alignment, bl->pwrite_zeroes_alignment);
    int64_t max = bdrv_limit_aligned(bl->max_pwrite_zeroes, unit);
    int64_t end = t->offset + t->bytes;
    BdrvTransfer piece = *t;
    int ret = 0;
    while (piece.offset < end && ret == 0) {
        piece.bytes = next_piece(piece.offset, end, unit, max);
        ret = zero_piece(&piece, need_flush);
        piece.offset += piece.bytes;
    }
    return ret;
}

static int aligned_zeroes(const BdrvTransfer *t)
{
    bool need_flush = false, changes = !(t->flags & BDRV_REQ_UNCHANGED);
    int ret = changes ? bdrv_dirty_before(t->bs, t->offset, t->bytes) : 0;
    if (ret < 0) {
        return ret;
    }
    bdrv_node_debug_event(t->bs, "pwritev_zero");
    ret = zero_pieces(t, &need_flush);
    bdrv_node_debug_event(t->bs, "pwritev_done");
    if (changes) {
        bdrv_dirty_after(t->bs, t->offset, t->bytes);
    }
    if (ret < 0) {
        return ret;
    }
    bdrv_raise_length(t->bs, t->offset + t->bytes);
    return need_flush ? bdrv_flush(t->bs) : 0;
}

/* Less than a block: read, modified, written. */
static int zero_part_of_block(const BdrvTransfer *t)
{
    IoVector zeroes;
    assert(t->bytes > 0);
    QB_AUTO_FREE void *big = NULL;
    if (t->bytes <= ZERO_BUF_SIZE) {
        iov_vector_init_buf(&zeroes, (void *)zero_buf, (size_t)t->bytes);
    } else { /* blocks of this size do not exist; but a limit says so, not this function */
        big = calloc(1, (size_t)t->bytes);
        if (!big) {
            return -ENOMEM;
        }
        iov_vector_init_buf(&zeroes, big, (size_t)t->bytes);
    }
    BdrvTransfer part = *t;
    part.flags = t->flags & (BDRV_REQ_FUA | BDRV_REQ_UNCHANGED);
    part.qiov = &zeroes;
    part.qiov_offset = 0;
    return bdrv_padded_pwritev(&part);
}

static int zero_range_of(const BdrvTransfer *t, int64_t offset, int64_t end,
                         int (*fn)(const BdrvTransfer *t))
{
    if (offset >= end) {
        return 0;
    }
    BdrvTransfer part = *t;
    part.offset = offset;
    part.bytes = end - offset;
    return fn(&part);
}

static int unaligned_zeroes(const BdrvTransfer *t)
{
    uint32_t unit = t->bs->bl.request_alignment;
    int64_t end = t->offset + t->bytes, first;
    if (qb_align_up_overflow((uint64_t)t->offset, unit, &first)) {
        return -EIO;
    }
    int64_t last = (int64_t)qb_align_down((uint64_t)end, unit);
    if (first > last) { /* all in one block */
        return zero_part_of_block(t);
    }
    int ret = zero_range_of(t, first, last, aligned_zeroes); /* invariant 1: before the others */
    if (ret == 0) {
        ret = zero_range_of(t, t->offset, first, zero_part_of_block);
    }
    if (ret == 0) {
        ret = zero_range_of(t, last, end, zero_part_of_block);
    }
    return ret;
}

int bdrv_do_pwrite_zeroes(const BdrvTransfer *t)
{
    assert(t->req->range.state == QB_RANGE_GRANTED);
    BdrvTransfer allowed = *t;
    if (!t->bs->discard_unmap) {
        allowed.flags &= ~BDRV_REQ_MAY_UNMAP; /* invariant 3 */
    }
    return bdrv_transfer_is_aligned(t) ? aligned_zeroes(&allowed) : unaligned_zeroes(&allowed);
}

/* --- discards --- */

/* The driver's unit; one that is no multiple of request_alignment is of no use. */
static int64_t discard_unit(const BlockLimits *bl)
{
    bool usable = bl->pdiscard_alignment && bl->pdiscard_alignment % bl->request_alignment == 0;
    return usable ? bl->pdiscard_alignment : bl->request_alignment;
}

static int discard_piece(const BdrvTransfer *t, int64_t unit)
{
    int ret = t->bs->drv->pdiscard(t->bs, t->req, t->offset, t->bytes);
    assert(ret <= 0);
    bool part_of_unit = t->offset % unit || t->bytes % unit;
    bool declined = ret == -ENOTSUP || (ret == -EINVAL && part_of_unit);
    return declined ? 0 : ret;
}

int bdrv_do_pdiscard(const BdrvTransfer *t)
{
    const BlockLimits *bl = &t->bs->bl;
    int64_t unit = discard_unit(bl);
    int64_t max = bdrv_limit_aligned(bl->max_pdiscard, (uint32_t)unit);
    int64_t end = (int64_t)qb_align_down((uint64_t)(t->offset + t->bytes), bl->request_alignment);
    BdrvTransfer piece = *t;
    if (qb_align_up_overflow((uint64_t)t->offset, bl->request_alignment, &piece.offset)) {
        return 0;
    }
    int64_t start = piece.offset;
    int ret = start < end ? bdrv_dirty_before(t->bs, start, end - start) : 0;
    while (piece.offset < end && ret == 0) {
        piece.bytes = next_piece(piece.offset, end, unit, max);
        ret = discard_piece(&piece, unit);
        piece.offset += piece.bytes;
    }
    if (start < piece.offset) {
        bdrv_dirty_after(t->bs, start, piece.offset - start);
    }
    return ret;
}
