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
void qb_libaio_run(QbIoOp *ops, size_t n);

#endif
