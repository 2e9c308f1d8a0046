/*
 * Jobs: long operations as a thread with a loop.
 *
 * A job reads and writes through BlockBackends, reports through its QbProgress, and looks at
 * cancellation and its rate limit between steps.  A copy step is one entry of the graph lock.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_JOB_H
#define BLOCK_JOB_H

#include "block/block-backend.h"
#include "util/progress.h"

#pragma GCC visibility push(default) /* public: exported by libqblock */

/* --- commit: content of @top (and all between) goes into @base --- */
typedef struct CommitOptions {
    BlockDriverState *top;  /* the image that is committed */
    BlockDriverState *base; /* in top's backing chain */
    uint64_t speed;         /* bytes per second, 0: as fast as it goes */
    QbProgress *progress;   /* required */
} CommitOptions;
/*
 * Blocking.  Makes @base writable for the time, grows it if smaller, copies what is allocated above
 * it, flushes it, and restores its state.  Neither empties nor detaches @top.  After a failure or
 * cancellation (-ECANCELED class) overlay and base are usable and nothing flushed is lost.
 */
bool commit_run(const CommitOptions *opts, GError **errp);

/* Sleeps as needed so that @bytes more keep to @speed (bytes/s; 0: never), or until @p is cancelled;
 * state is the caller's. */
typedef struct BlockRateLimit {
    uint64_t speed, next_ns;
} BlockRateLimit;
void block_rate_limit_wait(BlockRateLimit *limit, uint64_t bytes, QbProgress *p);

#pragma GCC visibility pop

#endif
