/*
 * Where the layers above a base may decide something, found in bulk.
 *
 *      top        |   [====]          [==]        |          ranges of each layer
 *      a          |      [=====]                  |
 *      b          |              | end of b ######|          beyond it a reads as zeroes
 *      base       |                               |
 *      found      |   [========]      [==]  ######|          sorted and joined
 *
 * Each layer reads its map as it can do best (BlockDriver.find_allocated); one that cannot tells
 * nothing, so all of it may be something.  For what it is, block status is asked.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/io-int.h"

static void add_range(GArray *ranges, int64_t start, int64_t end)
{
    if (start < end) {
        g_array_append_val(ranges, ((BdrvRange){start, end - start}));
    }
}

/* In layer @bs of [start, end), which lies in the topmost layer. */
static int find_in_layer(BlockDriverState *bs, int64_t start, int64_t end, GArray *ranges)
{
    int64_t length = bdrv_getlength(bs);
    if (length < 0) {
        return (int)length;
    }
    int64_t inside = MIN(end, length);
    add_range(ranges, MAX(start, length), end); /* the layer above decides: zeroes */
    if (start >= inside) {
        return 0;
    }
    if (bs->drv->find_allocated) {
        return bs->drv->find_allocated(bs, start, inside - start, ranges);
    }
    add_range(ranges, start, inside);
    return 0;
}

static gint by_offset(gconstpointer a, gconstpointer b)
{
    const BdrvRange *x = a, *y = b;
    return x->offset < y->offset ? -1 : x->offset > y->offset;
}

static void sort_and_join(GArray *ranges)
{
    guint n = 0;
    g_array_sort(ranges, by_offset);
    for (guint i = 0; i < ranges->len; i++) {
        BdrvRange r = g_array_index(ranges, BdrvRange, i);
        BdrvRange *last = n ? &g_array_index(ranges, BdrvRange, n - 1) : NULL;
        if (last && r.offset <= last->offset + last->bytes) {
            last->bytes = MAX(last->offset + last->bytes, r.offset + r.bytes) - last->offset;
        } else {
            g_array_index(ranges, BdrvRange, n++) = r;
        }
    }
    g_array_set_size(ranges, n);
}

static int find_in_layers(BlockDriverState *bs, BlockDriverState *base, int64_t start, int64_t end,
                          GArray *ranges)
{
    int64_t length = bdrv_getlength(bs);
    int ret = (int)MIN(length, 0);
    end = MIN(end, length);
    base = bdrv_skip_filters(base);
    for (bs = bdrv_skip_filters(bs); ret == 0 && bs && bs != base;
         bs = bdrv_backing_chain_next(bs)) {
        ret = find_in_layer(bs, start, end, ranges);
    }
    sort_and_join(ranges);
    return ret;
}

int bdrv_find_allocated_above(BlockDriverState *bs, BlockDriverState *base, int64_t offset,
                              int64_t bytes, GArray *ranges)
{
    BDRV_GRAPH_GUARD();
    if (!qb_range_valid(offset, bytes)) {
        return -EINVAL;
    }
    BdrvRequest req;
    bdrv_request_begin(&req, bs, BDRV_TRACKED_READ, offset, bytes);
    g_array_set_size(ranges, 0);
    int ret = find_in_layers(bs, base, offset, offset + bytes, ranges);
    bdrv_request_end(&req);
    return ret;
}
