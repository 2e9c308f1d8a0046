/*
 * Between iobatch.c and its engines.
 *
 * An engine is handed a batch and runs what it can of it.  Each op it has run is completed through
 * qb_io_complete(); an op it could not start it leaves QB_IO_PENDING, and threads will run it.
 * When the engine returns, the kernel touches no buffer of the batch any more.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef QB_UTIL_IOBATCH_ENGINE_H
#define QB_UTIL_IOBATCH_ENGINE_H

#include <limits.h>
#include <stdbool.h>
#include <sys/types.h>
#include "util/iobatch.h"

#define QB_IO_PENDING 1 /* in ret of an op that nobody has run */
#define QB_IO_DEPTH 64  /* ops under way at once, per calling thread */

/* Takes the result of the first transfer of @op (bytes or -errno), does what is left of it in the
 * calling thread, and sets @op->ret. */
void qb_io_complete(QbIoOp *op, ssize_t res);

/* How many elements of @op the first transfer may have. */
static inline int qb_io_first_niov(const QbIoOp *op)
{
    return op->niov < IOV_MAX ? op->niov : IOV_MAX;
}

void qb_uring_run(QbIoOp *ops, size_t n);

/* Rings are made, limited in number and given up in one place, for batches and for queues. */
struct io_uring;
struct io_uring_sqe;
/* False: none to be had, now or for good. */
bool qb_uring_open(struct io_uring *uring, unsigned entries);
void qb_uring_close(struct io_uring *uring);
/* The system refuses: nobody in this process tries again. */
void qb_uring_forbid(void);
/* Makes @sqe the first transfer of @op, which becomes its user data. */
void qb_uring_prepare(struct io_uring_sqe *sqe, QbIoOp *op);

void qb_libaio_run(QbIoOp *ops, size_t n);

#endif
