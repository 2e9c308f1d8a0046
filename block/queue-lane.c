/*
 * The lane: requests whose place in a file the drivers know.
 *
 *      request   |--------------------- bytes ---------------------|
 *                |-- transferred --|---- map.bytes ----|  (mapped next)
 *                                  | ext 0 | ext 1 |...|
 *                                          ^ ext, ext_done
 *
 *      extent:  zero            memset
 *               cached file     what goes without waiting in this thread, the rest as below
 *               direct I/O      kernel ring, or the file pool with aio=threads or where the ring is
 *                               forbidden
 *
 * One extent at a time: a request that waits for the device goes on in transfer_done().  A read
 * whose next part cannot be mapped gives that part to a worker.  A write is mapped as a whole or not at
 * all: its parts would have tickets of their own, and another could come in between.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/queue-int.h"

#include <limits.h>

#define LANE_WAITS 1 /* beside 0 and -errno: begun, transfer_done() goes on */
#define LANE_FLAGS (BDRV_REQ_FUA | BDRV_REQ_REGISTERED_BUF)

static bool is_write(const QueueSlot *slot)
{
    return slot->req.op == BLK_OP_WRITE;
}

/* Memory the file takes as it is. */
static bool memory_fits(const QueueSlot *slot)
{
    const IoVector *qiov = slot->req.qiov;
    size_t align = blk_bs(slot->queue->blk)->bl.min_mem_alignment;
    return qiov->niov <= IOV_MAX && (align <= 1 || iov_vector_is_aligned(qiov, align));
}

bool queue_lane_takes(const QueueSlot *slot)
{
    const BlkQueueRequest *req = &slot->req;
    bool transfers = req->op == BLK_OP_READ || req->op == BLK_OP_WRITE;
    return transfers && !(req->flags & ~LANE_FLAGS) && memory_fits(slot);
}

/* --- one extent --- */

static size_t place_in_vector(const QueueSlot *slot)
{
    return (size_t)(slot->transferred + slot->ext_done);
}

static QbIoOp extent_op(const QueueSlot *slot, const BdrvMapExtent *ext)
{
    return (QbIoOp){
        .kind = is_write(slot) ? QB_IO_WRITE : QB_IO_READ, .fd = ext->fd,
        .offset = (uint64_t)(ext->host_offset + slot->ext_done),
        .iov = slot->part.iov, .niov = slot->part.niov,
    };
}

/* Makes slot->part what is left of the extent. */
static void set_part(QueueSlot *slot, const BdrvMapExtent *ext)
{
    const IoVector *qiov = slot->req.qiov;
    size_t pos = place_in_vector(slot), len = (size_t)(ext->bytes - slot->ext_done);
    if (qiov->niov == 1) {
        iov_vector_init_buf(&slot->part, (char *)qiov->iov[0].iov_base + pos, len);
    } else {
        iov_vector_init_slice(&slot->part, qiov, pos, len);
    }
}

static void extent_end(QueueSlot *slot, const BdrvMapExtent *ext)
{
    slot->transferred += ext->bytes;
    slot->ext_done = 0;
    slot->ext++;
}

static void transfer_done(QbRingOp *op);

static void wait_for_device(QueueSlot *slot, const BdrvMapExtent *ext)
{
    slot->waited = true;
    set_part(slot, ext);
    slot->op.io = extent_op(slot, ext);
    slot->op.done = transfer_done;
    qb_ring_transfer(slot->queue->ring, &slot->op, ext->kernel_aio);
}

/* What goes without waiting. */
static int transfer_now(QueueSlot *slot, const BdrvMapExtent *ext)
{
    set_part(slot, ext);
    QbIoOp io = extent_op(slot, ext);
    ssize_t n = qb_io_nowait(&io, ext->lacks_nowait);
    iov_vector_destroy(&slot->part);
    if (n < 0) {
        return n == -EAGAIN ? LANE_WAITS : (int)n;
    }
    slot->ext_done += n;
    return slot->ext_done < ext->bytes ? LANE_WAITS : 0;
}

static int transfer_extent(QueueSlot *slot)
{
    const BdrvMapExtent *ext = &slot->map.ext[slot->ext];
    if (ext->zero) {
        iov_vector_memset(slot->req.qiov, place_in_vector(slot), 0, (size_t)ext->bytes);
        extent_end(slot, ext);
        return 0;
    }
    int ret = ext->direct ? LANE_WAITS : transfer_now(slot, ext);
    if (ret == 0) {
        extent_end(slot, ext);
    } else if (ret == LANE_WAITS) {
        wait_for_device(slot, ext);
    }
    return ret;
}

/* --- the mapping, and the next --- */

/* 0 with slot->map, or -errno: -EAGAIN for a worker. */
static int map_next(QueueSlot *slot)
{
    BdrvMapping *map = &slot->map;
    int64_t left = slot->req.bytes - slot->transferred;
    BdrvMapIntent intent = is_write(slot) ? BDRV_MAP_WRITE : BDRV_MAP_READ;
    bdrv_mapping_init(map);
    slot->ext = 0;
    slot->ext_done = 0;
    int ret = bdrv_map(blk_root(slot->queue->blk), slot->queue, intent,
                       slot->req.offset + slot->transferred, left, map);
    if (ret == 0 && is_write(slot) && map->bytes < left) {
        bdrv_map_undo(slot->queue, map);
        return -EAGAIN;
    }
    return ret;
}

/* -EAGAIN for a write: as if nothing had happened; its place in the order is the task's. */
static int end_mapping(QueueSlot *slot, int ret)
{
    return bdrv_map_done_or_redo(slot->queue, &slot->map, ret, &slot->task.req);
}

/* Transfers what the mapping has left, and ends it. */
static int transfer_mapped(QueueSlot *slot)
{
    int ret = 0;
    while (ret == 0 && slot->ext < slot->map.n) {
        ret = transfer_extent(slot);
    }
    return ret == LANE_WAITS ? ret : end_mapping(slot, ret);
}

static void all_transferred(QueueSlot *slot)
{
    BlkQueueStats *stats = &slot->queue->stats;
    if (is_write(slot) && (slot->req.flags & BDRV_REQ_FUA)) {
        stats->lane++;
        queue_want_flush(slot);
        return;
    }
    *(slot->waited ? &stats->lane : &stats->at_once) += 1;
    queue_finish(slot, 0);
}

static void fail(QueueSlot *slot, int ret)
{
    if (ret == -EAGAIN && is_write(slot)) {
        queue_redo_by_worker(slot);
    } else {
        queue_finish(slot, ret);
    }
}

/* From the next mapping on, as far as it goes without waiting. */
void queue_lane_run(QueueSlot *slot)
{
    while (slot->transferred < slot->req.bytes) {
        int ret = map_next(slot);
        if (ret == -EAGAIN) {
            queue_to_worker(slot);
            return;
        }
        ret = ret < 0 ? ret : transfer_mapped(slot);
        if (ret == LANE_WAITS) {
            return;
        }
        if (ret < 0) {
            fail(slot, ret);
            return;
        }
    }
    all_transferred(slot);
}

static void transfer_done(QbRingOp *op)
{
    QueueSlot *slot = container_of(op, QueueSlot, op);
    int ret = op->io.ret;
    iov_vector_destroy(&slot->part);
    bdrv_graph_borrow();
    if (ret < 0) {
        ret = end_mapping(slot, ret);
    } else {
        extent_end(slot, &slot->map.ext[slot->ext]);
        ret = transfer_mapped(slot);
    }
    if (ret == 0) {
        queue_lane_run(slot);
    } else if (ret < 0) {
        fail(slot, ret);
    }
    bdrv_graph_return();
}
