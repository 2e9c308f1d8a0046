/*
 * The fast lane: a thread that owns a queue does the I/O of a request itself.
 *
 *      bdrv_map(child, ...)          no waiting, no I/O         [node A]   shifts, looks its map up
 *           |                                                      |       bdrv_map() of its child
 *           v                                                   [node B]   ext[] = (fd, offset)
 *      the queue does the I/O of ext[]
 *           |
 *      bdrv_map_done(mapping, result)    B, then A hear of the end: link, set dirty bits, leave
 *
 * Contract
 *  1. One thread calls bdrv_map(), does the I/O and calls bdrv_map_done(), and holds the graph lock
 *     shared all the time.  The mapping does not move in between.
 *  2. -EAGAIN: nothing has happened, the request must go to a worker as an ordinary one.  Nothing
 *     is promised about when the lane is open; users must always have the worker ready.
 *  3. On success mapping->ext[0..n) are the first mapping->bytes (> 0) of the range, in order.  A
 *     read takes a zero extent as zeroes without I/O.  The rest of the range is mapped by another
 *     call.
 *  4. From map to done the request counts in each node it passed, and for writes stands in their
 *     range locks as a plain request: a serialising one is neither overtaken nor passed.
 *  5. A driver's map() answers for its own node and calls bdrv_map() for the child below, with
 *     the offset of its own; it keeps what it must remember in layer[depth].token (depth read
 *     before it goes down).  Its map_done() is called exactly once for each map() that returned 0,
 *     lower nodes first, with the result so far; what it returns is the result for those above.
 *     A write's map_done() may return -EAGAIN: it is as if nothing was written, a worker must do
 *     it, in the place that the write had in the order.
 *  6. Data are not stable when bdrv_map_done() returns: FUA is a flush afterwards, shared with
 *     others.
 *
 * "Use a worker" is also the answer where the core has something to say: alignment, the end of the
 * node, detect-zeroes, copy-on-read, a read-only node, a drain.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_QUEUE_H
#define BLOCK_QUEUE_H

#include "block/block-backend.h"
#include "block/driver.h"

/* Of users, before bdrv_map(): all but the arrays, which are large. */
static inline void bdrv_mapping_init(BdrvMapping *mapping)
{
    mapping->n = mapping->layers = mapping->depth = 0;
    mapping->bytes = 0;
    mapping->unused = mapping->copied = false;
}
/* Maps the start of the range. Users pass a fresh @mapping; drivers pass theirs.
 * @queue may be NULL. 0, or -EAGAIN, or another -errno that a worker would meet as well. */
int bdrv_map(BdrvChild *child, BlkQueue *queue, BdrvMapIntent intent, int64_t offset,
             int64_t bytes, BdrvMapping *mapping);
/* For users: @result is 0 or -errno of the I/O. Returns what the request returns. */
int bdrv_map_done(BlkQueue *queue, BdrvMapping *mapping, int result);
/* The same, for users with a worker: when it returns -EAGAIN for a write, *redo is the request that
 * the worker carries on with, in its place in the order; it has begun and not entered. */
int bdrv_map_done_or_redo(BlkQueue *queue, BdrvMapping *mapping, int result, BdrvRequest *redo);
/* Gives a mapping back of which nothing was used: as if it had never been. */
void bdrv_map_undo(BlkQueue *queue, BdrvMapping *mapping);

/*
 * The queue: requests of one thread on one BlockBackend, started now and collected later.
 *
 * All functions are called by the owner, the thread that submits first.  done() is called in
 * blk_queue_poll() and blk_queue_wait() only; it may submit.  Requests have the meaning they have with
 * blk_submit(): those that overlap take effect in the order they were submitted; a flush, and FUA,
 * cover what was done before.
 *
 * The owner must keep collecting: what is under way holds an entry of the graph lock, and drains wait
 * for it.  While anything is under way it must not call what may wait for that itself: blocking
 * requests on the same nodes, drains, changes of the graph.  While the node is drained requests
 * wait in the queue; submitting never blocks for it.
 */
typedef struct BlkQueueRequest {
    BlkOp op;
    int flags; /* BdrvRequestFlags */
    int64_t offset, bytes;
    IoVector *qiov; /* read, write; lives until done() */
    void (*done)(void *opaque, int ret);
    void *opaque;
} BlkQueueRequest;

/* Holds a reference to @blk. NULL: no file descriptor to be had. */
BlkQueue *blk_queue_new(BlockBackend *blk);
/* Waits for all requests, their done() called. NULL is fine. */
void blk_queue_free(BlkQueue *q);
/* @req is copied. */
void blk_queue_submit(BlkQueue *q, const BlkQueueRequest *req);
/* Calls done() for what is done by now, without waiting; returns how many. Sends on what was
 * submitted. */
unsigned blk_queue_poll(BlkQueue *q);
/* The same, but waits for one at least if there are any. */
unsigned blk_queue_wait(BlkQueue *q);
/* Submitted and done() not called. */
unsigned blk_queue_pending(const BlkQueue *q);
/* Readable when blk_queue_poll() may have something to do; to be asked before the first request, and
 * polled after a blk_queue_poll() that returned 0. */
int blk_queue_fd(BlkQueue *q);
/* How requests went so far, for tests and tools. */
typedef struct BlkQueueStats {
    uint64_t at_once; /* done when submitted: no waiting, no thread */
    uint64_t lane;    /* through the driver's map, with waiting for the device */
    uint64_t workers; /* through a worker */
    uint64_t flushes; /* of the node; many requests may share one */
} BlkQueueStats;
BlkQueueStats blk_queue_stats(const BlkQueue *q);

#endif
