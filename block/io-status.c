/*
 * Block status: where the content of a range comes from, and what is known of it without reading.
 *
 *   overlay   |  data  |     not allocated     | zero |   not allocated      |
 *   base               |  data  |  hole  | data|      |data| end of base
 *   answers   |DATA d=0|DATA d=1|ZERO d=1|  ...|ZERO 0|....|ZERO d=0         |
 *
 * One look is one call of one driver.  A look at a layer that names a place in a file below
 * (RECURSE) goes on there, which finds holes in preallocated images.  Looks are repeated and merged
 * as long as what they say is the same, so that one call answers for any length.
 *
 * Where RECURSE comes without DATA and ZERO (raw), the layer below says all there is to say; with
 * DATA it may add ZERO.
 *
 * Invariants
 *  1. ALLOCATED: the layer decides the content.  Without it the layer below does; where there is
 *     none below, or it is too short, ZERO is set.
 *  2. A zero answer is never wrong.  In doubt it is data.
 *  3. Merged extents have equal flags, depth, and, with OFFSET_VALID, offsets that continue.
 *
 * Not done: no cache.  Drivers answer from memory, and the file driver keeps its own note of holes.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/io-int.h"

/* What is asked for. */
typedef struct Look {
    BlockDriverState *bs;
    int64_t offset, bytes;
    bool precise; /* look for zeroes in files below, tell places */
} Look;

typedef int LookFn(const Look *look, void *opaque, BdrvStatus *ret);

/* --- merging --- */

static bool continues(const BdrvStatus *a, const BdrvStatus *b)
{
    if (a->flags != b->flags || a->depth != b->depth) {
        return false;
    }
    return !(a->flags & BDRV_BLOCK_OFFSET_VALID)
           || (a->host_node == b->host_node && a->host_offset + a->bytes == b->host_offset);
}

/* Looks again and again until the answer changes or the range is answered for.  Each time for no
 * more than is known already: an answer that differs is thrown away, and may have cost a long
 * walk. */
static int merged(const Look *look, LookFn *fn, void *opaque, BdrvStatus *ret)
{
    Look rest = *look;
    int err = fn(&rest, opaque, ret);
    while (err == 0 && ret->bytes < look->bytes) {
        BdrvStatus more;
        rest.offset = look->offset + ret->bytes;
        rest.bytes = MIN(look->bytes - ret->bytes, ret->bytes);
        err = fn(&rest, opaque, &more);
        if (err < 0 || !continues(ret, &more)) {
            return 0; /* what was found first is true whatever came next */
        }
        ret->bytes += more.bytes;
    }
    return err;
}

/* --- one layer --- */

/* Where a chain walk ends: before @base, or with it. */
typedef struct ChainEnd {
    BlockDriverState *base; /* below filters; NULL: where the chain ends */
    bool include_base;
} ChainEnd;

static int look_at_layer(const Look *look, void *opaque, BdrvStatus *ret);
static int look_through_chain(const Look *look, void *opaque, BdrvStatus *ret);

/* Drivers without an answer: all is data. */
static void assume_data(const Look *look, BdrvStatus *ret)
{
    *ret = (BdrvStatus){
        .flags = BDRV_BLOCK_DATA | BDRV_BLOCK_ALLOCATED,
        .bytes = look->bytes,
    };
    if (look->bs->drv->protocol_name) {
        ret->flags |= BDRV_BLOCK_OFFSET_VALID;
        ret->host_offset = look->offset;
        ret->host_node = look->bs;
    }
}

/* Asks the driver in its alignment, and cuts the answer to what was asked. */
static int ask_driver(const Look *look, BdrvStatus *ret)
{
    BlockDriverState *bs = look->bs;
    uint32_t unit = bs->bl.request_alignment;
    int64_t start = (int64_t)qb_align_down((uint64_t)look->offset, unit), end;
    if (qb_align_up_overflow((uint64_t)(look->offset + look->bytes), unit, &end)) {
        return -EIO;
    }
    *ret = (BdrvStatus){0};
    int err = bs->drv->block_status(bs, start, end - start, ret);
    if (err < 0) {
        return err;
    }
    int64_t skip = look->offset - start;
    assert(ret->bytes <= end - start);
    if (ret->bytes <= skip) { /* somebody cut the file since its length was asked for */
        assume_data(look, ret);
        return 0;
    }
    ret->bytes = MIN(ret->bytes - skip, look->bytes);
    ret->host_offset += skip;
    return 0;
}

/* What the file below says of the place that @ret names, shortened to as much as one look there
 * tells: merging is for the outermost. */
static int ask_below(BdrvStatus *ret, BdrvStatus *below)
{
    int64_t length = bdrv_getlength(ret->host_node);
    if (length < 0) {
        return (int)length;
    }
    if (ret->host_offset >= length) { /* beyond the end of the file: not written yet */
        *below = *ret;
        below->flags = BDRV_BLOCK_ZERO | BDRV_BLOCK_OFFSET_VALID;
        return 0;
    }
    Look look = {
        .bs = ret->host_node, .offset = ret->host_offset, .precise = true,
        .bytes = MIN(ret->bytes, length - ret->host_offset),
    };
    ChainEnd end = {0};
    int err = look_through_chain(&look, &end, below);
    ret->bytes = MIN(ret->bytes, below->bytes);
    return err;
}

static int follow(const Look *look, BdrvStatus *ret)
{
    bool below_decides = !(ret->flags & (BDRV_BLOCK_DATA | BDRV_BLOCK_ZERO));
    assert(ret->flags & BDRV_BLOCK_OFFSET_VALID);
    ret->flags &= ~BDRV_BLOCK_RECURSE;
    if (!look->precise) {
        ret->flags |= below_decides ? BDRV_BLOCK_DATA : 0;
        return 0;
    }
    BdrvStatus below;
    int err = ask_below(ret, &below);
    if (err < 0) {
        return err;
    }
    if (!below_decides) {
        ret->flags |= below.flags & BDRV_BLOCK_ZERO;
        return 0;
    }
    const int taken_over =
        BDRV_BLOCK_DATA | BDRV_BLOCK_ZERO | BDRV_BLOCK_COMPRESSED | BDRV_BLOCK_OFFSET_VALID;
    ret->flags = (ret->flags & ~BDRV_BLOCK_OFFSET_VALID) | (below.flags & taken_over);
    ret->host_offset = below.host_offset;
    ret->host_node = below.host_node;
    return 0;
}

/* The part of the answer that comes from there being nothing below (invariant 1). */
static int settle_unallocated(const Look *look, BdrvStatus *ret)
{
    BlockDriverState *below = bdrv_backing_chain_next(look->bs);
    int64_t length = below ? bdrv_getlength(below) : 0;
    if (length < 0) {
        return (int)length;
    }
    if (look->offset >= length) {
        ret->flags |= BDRV_BLOCK_ZERO;
    } else {
        ret->bytes = MIN(ret->bytes, length - look->offset);
    }
    return 0;
}

/* A filter shows what its file has; its own alignment does not matter. */
static bool shows_child(const BlockDriverState *bs)
{
    return bs->drv->is_filter && !bs->drv->block_status && bs->file;
}

static int look_at_driver(const Look *look, BdrvStatus *ret)
{
    if (!look->bs->drv->block_status) {
        assume_data(look, ret);
        return 0;
    }
    int err = ask_driver(look, ret);
    if (err == 0 && (ret->flags & BDRV_BLOCK_RECURSE)) {
        err = follow(look, ret);
    }
    if (err < 0 || look->bs->drv->is_filter) {
        return err; /* a filter's own answer is that of the layer it shows, settled there */
    }
    if ((ret->flags & (BDRV_BLOCK_DATA | BDRV_BLOCK_ZERO)) || !look->bs->drv->supports_backing) {
        ret->flags |= BDRV_BLOCK_ALLOCATED;
    }
    return ret->flags & BDRV_BLOCK_ALLOCATED ? 0 : settle_unallocated(look, ret);
}

/* One look at one node; the range is inside it. */
static int look_at_layer(const Look *look, void *opaque, BdrvStatus *ret)
{
    if (shows_child(look->bs)) {
        Look child = *look;
        child.bs = look->bs->file->bs;
        return look_at_layer(&child, opaque, ret);
    }
    int err = look_at_driver(look, ret);
    if (err < 0) {
        return err;
    }
    assert(ret->bytes > 0 && ret->bytes <= look->bytes);
    ret->depth = ret->flags & BDRV_BLOCK_ALLOCATED ? 0 : -1;
    if (!look->precise) {
        ret->flags &= BDRV_BLOCK_ALLOCATED | BDRV_BLOCK_ZERO;
    }
    return 0;
}

/* --- a chain --- */

static ChainEnd chain_end(BlockDriverState *base, bool include_base)
{
    return (ChainEnd){.base = base ? bdrv_skip_filters(base) : NULL, .include_base = include_base};
}

static bool is_base(const ChainEnd *end, BlockDriverState *bs)
{
    return end->base && bdrv_skip_filters(bs) == end->base;
}

/* True when @bs is the layer to stop before. */
static bool is_past_end(const ChainEnd *end, BlockDriverState *bs)
{
    return !bs || (is_base(end, bs) && !end->include_base);
}

/* One look through the chain. Each layer that does not decide may shorten the range for
 * the next. */
static int look_through_chain(const Look *look, void *opaque, BdrvStatus *ret)
{
    const ChainEnd *end = opaque;
    Look layer = *look;
    *ret = (BdrvStatus){.bytes = look->bytes};
    for (int depth = 0; !is_past_end(end, layer.bs); depth++) {
        int err = look_at_layer(&layer, NULL, ret);
        if (err < 0) {
            return err;
        }
        BlockDriverState *next =
            is_base(end, layer.bs) ? NULL : bdrv_backing_chain_next(layer.bs);
        /* Zeroes because the next layer is too short: this one decides. */
        bool outgrown = (ret->flags & BDRV_BLOCK_ZERO) && !is_past_end(end, next);
        if ((ret->flags & BDRV_BLOCK_ALLOCATED) || outgrown) {
            ret->flags |= BDRV_BLOCK_ALLOCATED;
            ret->depth = depth;
            return 0;
        }
        layer.bytes = ret->bytes;
        layer.bs = next;
    }
    ret->depth = -1;
    return 0;
}

/* --- entries --- */

typedef struct Inquiry {
    Look look;
    bool once; /* do not look whether what follows is the same */
    LookFn *fn;
    void *opaque;
} Inquiry;

/* Cuts the range to the node; marks an extent that reaches its end. */
static int inquire(const Inquiry *q, BdrvStatus *ret)
{
    Look look = q->look;
    int64_t length = bdrv_getlength(look.bs);
    if (length < 0) {
        return (int)length;
    }
    if (look.offset >= length || look.bytes == 0) {
        *ret = (BdrvStatus){.flags = BDRV_BLOCK_EOF, .depth = -1};
        return 0;
    }
    look.bytes = MIN(look.bytes, length - look.offset);
    int err = q->once ? q->fn(&look, q->opaque, ret) : merged(&look, q->fn, q->opaque, ret);
    if (err == 0 && look.offset + ret->bytes == length) {
        ret->flags |= BDRV_BLOCK_EOF;
    }
    return err;
}

static int counted_inquiry(const Inquiry *q, BdrvStatus *ret)
{
    BdrvStatus found = {0};
    if (!qb_range_valid(q->look.offset, q->look.bytes)) {
        return -EINVAL;
    }
    BdrvRequest req;
    bdrv_request_begin(&req, q->look.bs, BDRV_TRACKED_READ, q->look.offset, q->look.bytes);
    int err = inquire(q, &found);
    bdrv_request_end(&req);
    if (err == 0) {
        *ret = found;
    }
    return err;
}

int bdrv_block_status(BlockDriverState *bs, int64_t offset, int64_t bytes, BdrvStatus *ret)
{
    BDRV_GRAPH_GUARD();
    Inquiry q = {
        .look = {.bs = bs, .offset = offset, .bytes = bytes, .precise = true},
        .fn = look_at_layer,
    };
    return counted_inquiry(&q, ret);
}

int bdrv_block_status_step(BlockDriverState *bs, int64_t offset, int64_t bytes, BdrvStatus *ret)
{
    BDRV_GRAPH_GUARD();
    Inquiry q = {
        .look = {.bs = bs, .offset = offset, .bytes = bytes, .precise = true},
        .once = true,
        .fn = look_at_layer,
    };
    return counted_inquiry(&q, ret);
}

static int status_above(const Look *look, BlockDriverState *base, bool once, BdrvStatus *ret)
{
    BDRV_GRAPH_GUARD();
    ChainEnd end = chain_end(base, false);
    Inquiry q = {.look = *look, .once = once, .fn = look_through_chain, .opaque = &end};
    return counted_inquiry(&q, ret);
}

int bdrv_block_status_above(BlockDriverState *bs, BlockDriverState *base, int64_t offset,
                            int64_t bytes, BdrvStatus *ret)
{
    Look look = {.bs = bs, .offset = offset, .bytes = bytes, .precise = true};
    return status_above(&look, base, false, ret);
}

int bdrv_block_status_above_step(BlockDriverState *bs, BlockDriverState *base, int64_t offset,
                                 int64_t bytes, BdrvStatus *ret)
{
    Look look = {.bs = bs, .offset = offset, .bytes = bytes, .precise = true};
    return status_above(&look, base, true, ret);
}

/* Who decides does not matter here, nor what is known of ranges that nobody decides. */
static int look_for_allocated(const Look *look, void *opaque, BdrvStatus *ret)
{
    int err = look_through_chain(look, opaque, ret);
    if (err == 0) {
        ret->depth = 0;
        ret->flags = ret->flags & BDRV_BLOCK_ALLOCATED ? ret->flags : 0;
    }
    return err;
}

int bdrv_is_allocated_above(BlockDriverState *bs, BlockDriverState *base, bool include_base,
                            int64_t offset, int64_t bytes, int64_t *ret_bytes)
{
    BDRV_GRAPH_GUARD();
    ChainEnd end = chain_end(base, include_base);
    Inquiry q = {
        .look = {.bs = bs, .offset = offset, .bytes = bytes},
        .fn = look_for_allocated,
        .opaque = &end,
    };
    BdrvStatus st = {0};
    int err = counted_inquiry(&q, &st);
    if (err < 0) {
        return err;
    }
    *ret_bytes = st.bytes;
    return st.flags & (BDRV_BLOCK_ALLOCATED | BDRV_BLOCK_ZERO);
}

static int look_for_zero(const Look *look, void *opaque, BdrvStatus *ret)
{
    int err = look_through_chain(look, opaque, ret);
    if (err == 0) {
        ret->flags &= BDRV_BLOCK_ZERO;
        ret->depth = 0;
    }
    return err;
}

int bdrv_is_zero_fast(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    BDRV_GRAPH_GUARD();
    ChainEnd end = {0};
    Inquiry q = {
        .look = {.bs = bs, .offset = offset, .bytes = bytes, .precise = true},
        .fn = look_for_zero,
        .opaque = &end,
    };
    BdrvStatus st = {0};
    int err = counted_inquiry(&q, &st);
    if (err < 0) {
        return err;
    }
    int64_t inside = CLAMP(bdrv_getlength(bs) - offset, 0, bytes);
    return inside == 0 || (st.bytes >= inside && (st.flags & BDRV_BLOCK_ZERO));
}
