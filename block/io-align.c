/*
 * Requests of any alignment on nodes that have one.
 *
 *   request_alignment   |       |       |       |       |       |
 *   wanted                  [=======================)
 *   asked of the driver [...[=======================)...)
 *                        head                        tail
 *
 * A read of the wider range goes into one vector: memory of ours for head and tail, the caller's
 * between them.  A write first fills that memory by reading, then writes the same vector back, so
 * that the driver sees one request either way.  Head and tail may fall into the same unit, which is
 * then read once.
 *
 * Invariants
 *  1. Between the reading of head and tail and the end of the write no other write changes them:
 *     the request is serialising for the whole wider range and has waited for the plain ones in it.
 *  2. The driver's request begins and ends at multiples of request_alignment.
 *  3. Padding makes no node longer: what a write adds behind its own end is cut off again, while
 *     its range is granted.  A crash in between leaves zeroes there.
 *
 * Events, for tests that stop a request there: pwritev_rmw_head and pwritev_rmw_after_head around
 * the reading of the first unit, pwritev_rmw_tail and pwritev_rmw_after_tail around that of the
 * last.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/io-int.h"

typedef struct Padding {
    size_t head, tail;       /* bytes */
    int64_t offset, bytes;   /* the wider range */
    uint32_t unit;
    uint8_t *buf;            /* one unit, or two when head and tail are in different ones */
    size_t buf_len;
    IoVector qiov;           /* the wider range's memory */
} Padding;

static void padding_clear(Padding *p)
{
    iov_vector_destroy(&p->qiov);
    free(p->buf);
}

#define PADDING_AUTO __attribute__((cleanup(padding_clear))) Padding

bool bdrv_transfer_is_aligned(const BdrvTransfer *t)
{
    return qb_is_aligned((uint64_t)(t->offset | t->bytes), t->bs->bl.request_alignment);
}

static uint8_t *padding_tail_unit(const Padding *p)
{
    return p->buf + p->buf_len - p->unit;
}

/* False, and nothing to clear, when there is no memory or the wider range has no end. */
static bool padding_init(Padding *p, const BdrvTransfer *t)
{
    uint32_t unit = t->bs->bl.request_alignment;
    int64_t end;
    *p = (Padding){.unit = unit, .offset = (int64_t)qb_align_down((uint64_t)t->offset, unit)};
    if (qb_align_up_overflow((uint64_t)(t->offset + t->bytes), unit, &end)) {
        return false;
    }
    p->bytes = end - p->offset;
    p->head = (size_t)(t->offset - p->offset);
    p->tail = (size_t)(end - t->offset - t->bytes);
    p->buf_len = p->head && p->tail && p->bytes > unit ? 2 * (size_t)unit : unit;
    p->buf = bdrv_try_blockalign(t->bs, p->buf_len);
    if (!p->buf) {
        return false;
    }
    iov_vector_init(&p->qiov, t->qiov->niov + 2);
    iov_vector_add(&p->qiov, p->buf, p->head);
    iov_vector_concat(&p->qiov, t->qiov, t->qiov_offset, (size_t)t->bytes);
    iov_vector_add(&p->qiov, padding_tail_unit(p) + unit - p->tail, p->tail);
    return true;
}

/* @t widened: its range, its memory. */
static BdrvTransfer padded(const BdrvTransfer *t, Padding *p)
{
    BdrvTransfer wide = *t;
    wide.offset = p->offset;
    wide.bytes = p->bytes;
    wide.qiov = &p->qiov;
    wide.qiov_offset = 0;
    return wide;
}

int bdrv_padded_preadv(const BdrvTransfer *t)
{
    if (bdrv_transfer_is_aligned(t)) {
        return bdrv_aligned_preadv(t);
    }
    PADDING_AUTO p;
    if (!padding_init(&p, t)) {
        return -ENOMEM;
    }
    BdrvTransfer wide = padded(t, &p);
    return bdrv_aligned_preadv(&wide);
}

static int read_unit(const BdrvTransfer *t, int64_t offset, uint8_t *buf, uint32_t unit)
{
    IoVector flat;
    iov_vector_init_buf(&flat, buf, unit);
    BdrvTransfer read = {
        .bs = t->bs,
        .req = t->req,
        .offset = offset,
        .bytes = unit,
        .qiov = &flat,
    };
    return bdrv_aligned_preadv(&read);
}

static int read_head(const BdrvTransfer *t, const Padding *p)
{
    bool tail_too = p->tail && p->bytes == p->unit;
    bdrv_node_debug_event(t->bs, "pwritev_rmw_head");
    if (tail_too) {
        bdrv_node_debug_event(t->bs, "pwritev_rmw_tail");
    }
    int ret = read_unit(t, p->offset, p->buf, p->unit);
    if (ret < 0) {
        return ret;
    }
    bdrv_node_debug_event(t->bs, "pwritev_rmw_after_head");
    if (tail_too) {
        bdrv_node_debug_event(t->bs, "pwritev_rmw_after_tail");
    }
    return 0;
}

static int read_tail(const BdrvTransfer *t, const Padding *p)
{
    bdrv_node_debug_event(t->bs, "pwritev_rmw_tail");
    int ret = read_unit(t, p->offset + p->bytes - p->unit, padding_tail_unit(p), p->unit);
    if (ret < 0) {
        return ret;
    }
    bdrv_node_debug_event(t->bs, "pwritev_rmw_after_tail");
    return 0;
}

static int read_head_and_tail(const BdrvTransfer *t, const Padding *p)
{
    int ret = 0;
    if (p->head) {
        ret = read_head(t, p);
    }
    bool have_tail = !p->tail || (p->head && p->bytes == p->unit);
    if (ret == 0 && !have_tail) {
        ret = read_tail(t, p);
    }
    return ret;
}

/* Where the node shall end at least after the padded write of @t; the end of the padding when that
 * is behind no end of the node. Or -errno. */
static int64_t wanted_end(const BdrvTransfer *t, const Padding *p)
{
    int64_t padded_end = p->offset + p->bytes;
    if (!p->tail || !t->bs->drv->cut_padding || bdrv_known_to_reach(t->bs, padded_end)) {
        return padded_end;
    }
    int64_t length = bdrv_getlength(t->bs);
    return length < 0 ? length : MIN(MAX(length, t->offset + t->bytes), padded_end);
}

/* Invariant 3. */
static int cut_padding(const BdrvTransfer *t, const Padding *p, int64_t end)
{
    BlockDriverState *bs = t->bs;
    int64_t padded_end = p->offset + p->bytes;
    int ret = end < padded_end ? bs->drv->cut_padding(bs, end, padded_end) : 0;
    if (end < padded_end && ret == 0) {
        (void)atomic_compare_exchange_strong(&bs->length, &padded_end, end);
    }
    return ret;
}

int bdrv_padded_pwritev(const BdrvTransfer *t)
{
    if (bdrv_transfer_is_aligned(t)) {
        return bdrv_aligned_pwritev(t);
    }
    assert(t->req->range.state == QB_RANGE_GRANTED && t->req->range.wait_plain); /* invariant 1 */
    PADDING_AUTO p;
    if (!padding_init(&p, t)) {
        return -ENOMEM;
    }
    int ret = read_head_and_tail(t, &p);
    if (ret < 0) {
        return ret;
    }
    int64_t end = wanted_end(t, &p);
    if (end < 0) {
        return (int)end;
    }
    BdrvTransfer wide = padded(t, &p);
    ret = bdrv_aligned_pwritev(&wide);
    int cut = cut_padding(t, &p, end); /* a part may be written */
    return ret < 0 ? ret : cut;
}
