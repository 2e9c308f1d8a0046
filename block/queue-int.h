/*
 * Between queue.c and queue-lane.c.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_QUEUE_INT_H
#define BLOCK_QUEUE_INT_H

#include <stddef.h>
#include "block/core-int.h"
#include "block/queue.h"
#include "util/ring.h"

#define container_of(ptr, type, member) ((type *)(void *)((char *)(ptr)-offsetof(type, member)))

/* A request and what is done for it. */
typedef struct QueueSlot {
    BlkQueue *queue;
    struct QueueSlot *next; /* in the list it is in */
    BlkQueueRequest req;
    int ret;
    bool admitted;       /* counted in the BlockBackend and pinned: queue_finish() ends both */
    BdrvGraphPin pin;
    bool waited;         /* for the device */

    /* on the lane */
    int64_t transferred; /* bytes from the start of the request */
    unsigned ext;        /* of the mapping: being transferred */
    int64_t ext_done;    /* bytes of it */
    BdrvMapping map;

    /* with somebody else */
    QbRingOp op;
    IoVector part;       /* of the request's vector, for the operation */
    BlkDrawn task;
} QueueSlot;

/* First in, first out; all zero: empty. */
typedef struct QueueList {
    QueueSlot *first, *last;
} QueueList;

static inline void queue_list_add(QueueList *list, QueueSlot *slot)
{
    slot->next = NULL;
    if (list->first) {
        list->last->next = slot;
    } else {
        list->first = slot;
    }
    list->last = slot;
}

/* At the front: the slot used last is in the processor's cache. */
static inline void queue_list_push(QueueList *list, QueueSlot *slot)
{
    slot->next = list->first;
    list->last = list->first ? list->last : slot;
    list->first = slot;
}

static inline QueueSlot *queue_list_take(QueueList *list)
{
    QueueSlot *slot = list->first;
    if (slot) {
        list->first = slot->next;
    }
    return slot;
}

static inline QueueList queue_list_steal(QueueList *list)
{
    QueueList all = *list;
    *list = (QueueList){0};
    return all;
}

struct BlkQueue {
    BlockBackend *blk;
    QbRing *ring;
    unsigned pending;  /* submitted, done() not called */
    unsigned admitted; /* of these */
    QueueList free, waiting, finished;
    QueueList to_flush, being_flushed;
    QbRingOp flush;
    int flush_ret;     /* the worker's, until it posts */
    QbRingOp doorman;
    bool doorman_out;
    BlkQueueStats stats;
};

/* --- queue.c --- */

/* The request has its result. */
void queue_finish(QueueSlot *slot, int ret);
/* Its data are written; it ends with the next flush. */
void queue_want_flush(QueueSlot *slot);
/* Hands what is not transferred yet to a worker. Graph lock held. */
void queue_to_worker(QueueSlot *slot);
/* The same for a write as a whole whose place in the order is in slot->task.req. */
void queue_redo_by_worker(QueueSlot *slot);

/* --- queue-lane.c --- */

/* May the request try the lane? Graph lock held, here and below. */
bool queue_lane_takes(const QueueSlot *slot);
/* Carries it out, or begins to. */
void queue_lane_run(QueueSlot *slot);

#endif
