/*
 * The core's part of the fast lane: who may pass, who is counted, who hears of the end.
 *
 *      layer[0] = node A     layer[1] = node B        layers = 2
 *      done:    then A       first B
 *
 * The contract is in block/queue.h.
 *
 * Invariants
 *  1. Each layer has a request that has begun, and entered if it writes; a layer that declines is
 *     undone before bdrv_map() returns, with the extents its children added.
 *  2. Nothing here waits: a range is only tried.
 *  3. A write that must be done anew by a worker keeps its ticket from map to worker, in the node
 *     that the user mapped; nothing overlapping that came later gets in between.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/queue.h"
#include "block/io-int.h"

/* Everything that needs more of the core than a look: a worker has it. */
static bool lane_is_open(BlockDriverState *bs, BdrvMapIntent intent, int64_t offset, int64_t bytes)
{
    if (!bs->drv->map || atomic_load(&bs->quiesce) > 0) {
        return false;
    }
    if (intent == BDRV_MAP_WRITE) {
        return !bs->read_only && !bs->detect_zeroes && bdrv_dirty_lane_is_open(bs, offset, bytes);
    }
    return !(bs->open_flags & BDRV_O_COPY_ON_READ);
}

static bool range_fits(BlockDriverState *bs, BdrvMapIntent intent, int64_t offset, int64_t bytes)
{
    bool aligned = qb_is_aligned((uint64_t)(offset | bytes), bs->bl.request_alignment);
    if (bytes <= 0 || !qb_range_valid(offset, bytes) || !aligned) {
        return false;
    }
    /* asking a file is a system call */
    return bdrv_known_to_reach(bs, offset + bytes)
           || (intent == BDRV_MAP_WRITE && bdrv_can_grow(bs));
}

/* Counts the request in the node; false when it would have to wait. */
static bool begin_layer(BdrvMapLayer *layer, BdrvMapIntent intent, int64_t offset, int64_t bytes)
{
    bool writes = intent == BDRV_MAP_WRITE;
    bdrv_request_begin(&layer->req, layer->bs, writes ? BDRV_TRACKED_WRITE : BDRV_TRACKED_READ,
                       offset, bytes);
    if (!writes || qb_range_try_enter(&layer->bs->ranges, &layer->req.range)) {
        return true;
    }
    bdrv_request_end(&layer->req);
    return false;
}

/* Takes the topmost layer off, its driver told; who ends the request is for the caller to say. */
static int leave_layer(BlkQueue *queue, BdrvMapping *mapping, int result)
{
    unsigned depth = --mapping->layers;
    BdrvMapLayer *layer = &mapping->layer[depth];
    mapping->depth = depth;
    if (layer->bs->drv->map_done) {
        result = layer->bs->drv->map_done(layer->bs, queue, mapping, result);
    }
    bool writes = layer->req.type == BDRV_TRACKED_WRITE;
    if (result == 0 && writes) {
        bdrv_raise_length(layer->bs, layer->end);
    }
    if (writes && !mapping->unused) {
        bdrv_dirty_after(layer->bs, layer->start, layer->end - layer->start);
    }
    return result;
}

static int finish_layer(BlkQueue *queue, BdrvMapping *mapping, int result)
{
    result = leave_layer(queue, mapping, result);
    bdrv_request_end(&mapping->layer[mapping->layers].req);
    return result;
}

/* Takes layers off until @layers are left, as if they had never been there. */
static void undo_layers(BlkQueue *queue, BdrvMapping *mapping, unsigned layers)
{
    mapping->unused = true;
    while (mapping->layers > layers) {
        (void)finish_layer(queue, mapping, -ECANCELED); /* any error: drivers give all back */
    }
    mapping->unused = false;
}

int bdrv_map(BdrvChild *child, BlkQueue *queue, BdrvMapIntent intent, int64_t offset,
             int64_t bytes, BdrvMapping *mapping)
{
    BlockDriverState *bs = child->bs;
    unsigned depth = mapping->layers, n_before = mapping->n, depth_before = mapping->depth;
    int64_t bytes_before = mapping->bytes;
    assert(bdrv_graph_held());
    if (depth == BDRV_MAP_MAX_LAYERS || !range_fits(bs, intent, offset, bytes)
        || !lane_is_open(bs, intent, offset, bytes)) {
        return -EAGAIN;
    }
    mapping->layer[depth] = (BdrvMapLayer){.bs = bs, .start = offset};
    if (!begin_layer(&mapping->layer[depth], intent, offset, bytes)) {
        return -EAGAIN;
    }
    mapping->layers++;
    mapping->depth = depth;
    int ret = bs->drv->map(bs, queue, intent, offset, bytes, mapping);
    if (ret == 0 && intent == BDRV_MAP_WRITE && depth > 0) {
        /* The queue's thread may zero or discard below in the name of other requests: they do not wait. */
        bdrv_request_settle(&mapping->layer[depth].req);
    }
    mapping->layer[depth].end = offset + mapping->bytes - bytes_before;
    if (ret < 0) {
        undo_layers(queue, mapping, depth + 1); /* children it had mapped by then */
        bdrv_request_end(&mapping->layer[depth].req);
        mapping->layers = depth;
        mapping->n = n_before;
        mapping->bytes = bytes_before;
    }
    mapping->depth = depth_before;
    return ret;
}

int bdrv_map_done(BlkQueue *queue, BdrvMapping *mapping, int result)
{
    assert(bdrv_graph_held() && mapping->layers > 0);
    while (mapping->layers > 0) {
        result = finish_layer(queue, mapping, result);
    }
    return result;
}

int bdrv_map_done_or_redo(BlkQueue *queue, BdrvMapping *mapping, int result, BdrvRequest *redo)
{
    BdrvMapLayer *top = &mapping->layer[0];
    assert(bdrv_graph_held() && mapping->layers > 0);
    while (mapping->layers > 1) {
        result = finish_layer(queue, mapping, result);
    }
    result = leave_layer(queue, mapping, result);
    if (result == -EAGAIN && top->req.type == BDRV_TRACKED_WRITE) {
        bdrv_request_hand_over(&top->req, redo, top->start, top->end - top->start);
    } else {
        bdrv_request_end(&top->req);
    }
    return result;
}

void bdrv_map_undo(BlkQueue *queue, BdrvMapping *mapping)
{
    assert(bdrv_graph_held() && mapping->layers > 0);
    undo_layers(queue, mapping, 0);
}
