/*
 * File batches: many reads and writes of files, run at depth, done when the call returns.
 *
 * High depth without asynchronous code: the caller fills an array and gets it back with results.
 * io_uring serves it where the kernel allows (QB_DISABLE_IO_URING=1 in the environment forbids it);
 * native, the kernel's older aio, where all files are open with O_DIRECT; threads otherwise.  Short
 * transfers are continued; a read at or past end of file fills the rest of the buffer with zeroes
 * (block layer semantics).  Thread safe: each calling thread has its own ring.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef QB_UTIL_IOBATCH_H
#define QB_UTIL_IOBATCH_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

typedef enum QbAioMode {
    QB_AIO_THREADS,
    QB_AIO_NATIVE,
    QB_AIO_IO_URING,
} QbAioMode;

typedef enum QbIoKind {
    QB_IO_READ,
    QB_IO_WRITE,
} QbIoKind;

typedef struct QbIoOp {
    QbIoKind kind;
    int fd;
    uint64_t offset;
    const struct iovec *iov; /* not changed; must live until the batch is done */
    int niov;
    int ret; /* out: 0 or -errno */
} QbIoOp;

/* Runs all of @ops, also after one has failed; the order of effects is not defined. Returns 0 or
 * the first error in array order. Not for tasks of qb_file_pool(), which serves it. */
int qb_io_run(QbIoOp *ops, size_t n, QbAioMode mode);

/* One blocking transfer with the same rules. @offset + length must fit int64_t. */
int qb_io_one(QbIoKind kind, int fd, uint64_t offset, const struct iovec *iov, int niov);

/* Copies between files inside the kernel. 0, -ENOTSUP when it cannot do it for these files (a part may
 * be copied by then), or another -errno. A source that ends early is -ENOTSUP as well. */
int qb_io_copy(int src, int64_t src_offset, int dst, int64_t dst_offset, int64_t bytes);

/* True where it is known that qb_io_copy() into @fd moves page after page, as reading and writing
 * do, instead of sharing blocks or letting a server copy. */
bool qb_io_copies_pages(int fd);

/*
 * The part of a transfer that needs no waiting for the device: the bytes done, 0 at the end of a file,
 * -EAGAIN for none, or another -errno.  *@lacks is set when the file system does not take the question
 * (some memory file systems; cached writes on many); it is then, and later, a plain call.
 */
ssize_t qb_io_nowait(const QbIoOp *op, _Atomic(bool) *lacks);

#endif
