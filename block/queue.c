/*
 * BlkQueue: many requests under way, one thread, no callbacks into it from others.
 *
 *                            owner's thread                                     others
 *   submit -> [waiting] -> admitted: counted, pinned
 *                             |  lane: map, transfer, map_done   (queue-lane.c)
 *                             |     all of it in the page cache: at once
 *                             |     else .......................................> kernel ring, file pool
 *                             |  worker: ticket drawn here .....................> request pool
 *                             |  flush, FUA: [to flush] --- one for all --------> request pool
 *                             v                                                       |
 *                        [finished] <------------- qb_ring_poll(), qb_ring_wait() <---'
 *                             v
 *                          done()
 *
 * How the rules of the block layer hold.
 *  Graph lock: each request has a pin from its admission to its end, so the thread may do other
 *      things in between; code that looks at the graph borrows it.
 *  Drain: each request counts in the BlockBackend from admission to its end, and in each node it is
 *      mapped through.  The owner never waits for a drain or a graph change to be over, because these
 *      wait for requests that only the owner can end: whoever cannot be admitted waits in the queue.
 *      Later completions admit it; when nothing is under way, a doorman, a worker that does wait,
 *      tells when to try again.
 *  Tickets: drawn on admission, which is in the order of submission, by bdrv_map() or blk_draw().
 *      A write is mapped as a whole or goes to a worker as a whole, so it has one ticket, which it
 *      keeps when a worker must do again what could not be linked.
 *  Range lock: the lane only tries; whoever is in the way sends the request to a worker, which
 *      waits there, behind it.
 *  Announced: what a driver announced in map() leaves in map_done(), after the I/O.  The owner
 *      waits for nothing but the device in between, as its requests are all that it holds.
 *
 * Invariants
 *  1. A request is in one place: waiting, under way, to flush, being flushed, or finished.
 *  2. Only the owner touches slots, but for the fields of a task while a worker has it.
 *  3. One flush runs at a time and begins after the data of all it serves were written; who comes later
 *     takes the next.  The pins and counts of those it serves cover it.
 *
 * Not done: no fairness between requests, no limit on their number: the user has a depth.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/queue-int.h"
#include "util/pool.h"

/* --- slots --- */

static QueueSlot *take_slot(BlkQueue *q)
{
    QueueSlot *slot = queue_list_take(&q->free);
    if (!slot) {
        slot = g_new0(QueueSlot, 1);
        slot->queue = q;
    }
    return slot;
}

void queue_finish(QueueSlot *slot, int ret)
{
    BlkQueue *q = slot->queue;
    slot->ret = ret;
    if (slot->admitted) {
        slot->admitted = false;
        bdrv_graph_unpin(slot->pin);
        blk_end_request(q->blk);
        q->admitted--;
    }
    queue_list_add(&q->finished, slot);
}

/* --- flush: one for all that want one --- */

static void run_flush(void *opaque)
{
    BlkQueue *q = opaque;
    bdrv_graph_borrow();
    q->flush_ret = bdrv_flush(blk_bs(q->blk));
    bdrv_graph_return();
    qb_ring_post(q->ring, &q->flush);
}

static void flush_done(QbRingOp *op)
{
    BlkQueue *q = container_of(op, BlkQueue, flush);
    QueueSlot *slot;
    while ((slot = queue_list_take(&q->being_flushed))) {
        queue_finish(slot, q->flush_ret);
    }
}

static void start_flush(BlkQueue *q)
{
    if (q->being_flushed.first || !q->to_flush.first) {
        return;
    }
    q->being_flushed = queue_list_steal(&q->to_flush);
    q->stats.flushes++;
    q->flush.done = flush_done;
    qb_ring_expect(q->ring);
    qb_pool_submit(qb_request_pool(), run_flush, q);
}

void queue_want_flush(QueueSlot *slot)
{
    queue_list_add(&slot->queue->to_flush, slot);
}

/* --- workers --- */

static void run_task(void *opaque)
{
    QueueSlot *slot = opaque;
    bdrv_graph_borrow();
    slot->ret = blk_run_drawn(&slot->task);
    bdrv_graph_return();
    qb_ring_post(slot->queue->ring, &slot->op);
}

static void task_done(QbRingOp *op)
{
    QueueSlot *slot = container_of(op, QueueSlot, op);
    iov_vector_destroy(&slot->part);
    queue_finish(slot, slot->ret);
}

/* All of the task but its request in the order. */
static void set_task(QueueSlot *slot)
{
    const BlkQueueRequest *req = &slot->req;
    BlkDrawn *task = &slot->task;
    task->blk = slot->queue->blk;
    task->op = req->op;
    task->offset = req->offset + slot->transferred;
    task->bytes = req->bytes - slot->transferred;
    task->qiov = req->qiov;
    task->flags = req->flags;
    task->failed = 0;
    if (slot->transferred) {
        iov_vector_init_slice(&slot->part, req->qiov, (size_t)slot->transferred,
                              (size_t)task->bytes);
        task->qiov = &slot->part;
    }
}

static void submit_task(QueueSlot *slot)
{
    slot->queue->stats.workers++;
    slot->op.done = task_done;
    qb_ring_expect(slot->queue->ring);
    qb_pool_submit(qb_request_pool(), run_task, slot);
}

void queue_to_worker(QueueSlot *slot)
{
    set_task(slot);
    blk_draw(&slot->task);
    submit_task(slot);
}

void queue_redo_by_worker(QueueSlot *slot)
{
    slot->transferred = 0;
    set_task(slot);
    submit_task(slot);
}

/* --- admission --- */

static bool admit(BlkQueue *q, QueueSlot *slot)
{
    if (!blk_try_begin_request(q->blk)) {
        return false;
    }
    if (!bdrv_graph_try_pin(&slot->pin)) {
        blk_end_request(q->blk);
        return false;
    }
    slot->admitted = true;
    q->admitted++;
    return true;
}

/* Starts a request that was admitted. */
static void start(QueueSlot *slot)
{
    const BlkQueueRequest *req = &slot->req;
    bdrv_graph_borrow();
    int ret = blk_check_request(slot->queue->blk, req->op, req->offset, req->bytes);
    if (ret < 0) {
        queue_finish(slot, ret);
    } else if (req->op == BLK_OP_FLUSH) {
        queue_want_flush(slot);
    } else if (queue_lane_takes(slot)) {
        queue_lane_run(slot);
    } else {
        queue_to_worker(slot);
    }
    bdrv_graph_return();
}

/* Waits where the owner must not: until requests are let in again. */
static void stand_at_door(void *opaque)
{
    BlkQueue *q = opaque;
    blk_begin_request(q->blk);
    bdrv_graph_unpin(bdrv_graph_pin());
    blk_end_request(q->blk);
    qb_ring_post(q->ring, &q->doorman);
}

static void door_opened(QbRingOp *op)
{
    container_of(op, BlkQueue, doorman)->doorman_out = false;
}

static void send_doorman(BlkQueue *q)
{
    if (q->doorman_out || q->admitted > 0) {
        return;
    }
    q->doorman_out = true;
    q->doorman.done = door_opened;
    qb_ring_expect(q->ring);
    qb_pool_submit(qb_request_pool(), stand_at_door, q);
}

/* Admits those that wait, in order. */
static void admit_waiting(BlkQueue *q)
{
    while (q->waiting.first) {
        if (!admit(q, q->waiting.first)) {
            send_doorman(q);
            return;
        }
        start(queue_list_take(&q->waiting));
    }
}

void blk_queue_submit(BlkQueue *q, const BlkQueueRequest *req)
{
    QueueSlot *slot = take_slot(q);
    slot->req = *req;
    slot->transferred = 0;
    slot->waited = false;
    if (req->op == BLK_OP_WRITE || req->op == BLK_OP_ZERO) {
        slot->req.flags = blk_write_flags(q->blk, req->flags);
    }
    q->pending++;
    queue_list_add(&q->waiting, slot);
    admit_waiting(q);
}

/* --- collecting --- */

/* Calls done() of those that are finished now; what they submit may be finished at once, too, and is
 * for the next time. */
static unsigned deliver(BlkQueue *q)
{
    QueueList batch = queue_list_steal(&q->finished);
    QueueSlot *slot;
    unsigned n = 0;
    while ((slot = queue_list_take(&batch))) {
        BlkQueueRequest req = slot->req;
        int ret = slot->ret;
        queue_list_push(&q->free, slot);
        q->pending--;
        n++;
        req.done(req.opaque, ret);
    }
    return n;
}

unsigned blk_queue_poll(BlkQueue *q)
{
    assert(!bdrv_graph_held());
    start_flush(q);
    (void)qb_ring_poll(q->ring);
    admit_waiting(q);
    return deliver(q);
}

unsigned blk_queue_wait(BlkQueue *q)
{
    unsigned n = blk_queue_poll(q);
    while (n == 0 && q->pending > 0) {
        if (!q->finished.first) {
            start_flush(q);
            (void)qb_ring_wait(q->ring);
        }
        n = blk_queue_poll(q);
    }
    return n;
}

unsigned blk_queue_pending(const BlkQueue *q)
{
    return q->pending;
}

int blk_queue_fd(BlkQueue *q)
{
    return qb_ring_fd(q->ring);
}

BlkQueueStats blk_queue_stats(const BlkQueue *q)
{
    return q->stats;
}

/* --- life --- */

BlkQueue *blk_queue_new(BlockBackend *blk)
{
    QbRing *ring = qb_ring_new();
    if (!ring) {
        return NULL;
    }
    BlkQueue *q = g_new0(BlkQueue, 1);
    blk_ref(blk);
    q->blk = blk;
    q->ring = ring;
    return q;
}

static void free_slots(BlkQueue *q)
{
    QueueSlot *slot;
    while ((slot = queue_list_take(&q->free))) {
        g_free(slot);
    }
}

void blk_queue_free(BlkQueue *q)
{
    if (!q) {
        return;
    }
    while (q->pending > 0 || qb_ring_under_way(q->ring) > 0) {
        (void)blk_queue_wait(q);
        (void)qb_ring_wait(q->ring); /* the doorman may be all that is left */
    }
    free_slots(q);
    qb_ring_free(q->ring);
    blk_unref(q->blk);
    g_free(q);
}
