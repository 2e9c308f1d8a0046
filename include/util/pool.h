/*
 * Worker pools: threads that run tasks in the order they were submitted.
 *
 * Tasks may block for as long as they like: when a task waits and no thread of the pool is idle the
 * pool grows, up to its maximum.  Tasks start in submission order, which is what lets a task wait
 * for one submitted earlier without a deadlock.  A task must not wait for one submitted later to
 * the same pool: all threads may be in such waits when the maximum is reached.  Idle threads
 * beyond @min leave after a few seconds.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef QB_UTIL_POOL_H
#define QB_UTIL_POOL_H

#include <stdbool.h>
#include <stddef.h>
#include "util/thread.h"

typedef struct QbPool QbPool;

/* @name is shown by debuggers. No thread is started before the first task (fork comes first). */
QbPool *qb_pool_new(const char *name, unsigned min, unsigned max);
/* Waits for all tasks (also those that running tasks still submit), joins all threads. Nobody else
 * may use the pool from then on. NULL is fine. */
void qb_pool_free(QbPool *pool);
/* Runs @fn(@opaque) in the pool; in the calling thread if no thread at all can be started. */
void qb_pool_submit(QbPool *pool, void (*fn)(void *), void *opaque);

/* Process-wide pools; made at first use, by any thread. qb_pools_shutdown() waits for their tasks
 * and joins their threads, when nobody uses them any more; a later use makes them anew. */
QbPool *qb_request_pool(void);  /* guest requests: grows when all its threads are blocked */
QbPool *qb_file_pool(void);     /* file batches, where io_uring is not to be had */
QbPool *qb_compute_pool(void);  /* compression, checksums: one thread per core */
void qb_pools_shutdown(void);

/* A set of tasks that somebody waits for. Remembers the first negative result. */
typedef struct QbTaskGroup {
    QbMutex lock;
    QbCond done;
    unsigned running;
    int first_error;
} QbTaskGroup;

void qb_group_init(QbTaskGroup *g);
void qb_group_destroy(QbTaskGroup *g); /* after qb_group_wait(g, 0) */
/* Runs @fn(@opaque) in @pool; its result is folded into the group. */
void qb_group_submit(QbTaskGroup *g, QbPool *pool, int (*fn)(void *), void *opaque);
/* Waits until at most @left tasks run (0: all done). Returns the first error or 0. */
int qb_group_wait(QbTaskGroup *g, unsigned left);

#endif
