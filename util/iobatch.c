/*
 * File batches: many reads and writes of files, run at depth, done when the call returns.
 *
 *   qb_io_run(ops, n, mode)
 *        |  n == 1 ............................................ a plain call in this thread
 *        |  io_uring, file not in memory: iobatch-uring.c    native, O_DIRECT: iobatch-libaio.c
 *        |            |  first transfer of each op, up to 64 under way
 *        |            +--> qb_io_complete(): a short transfer is continued in this thread
 *        v
 *   ops still QB_IO_PENDING: this thread tries what needs no waiting: cached reads, cached writes
 *        |
 *        v
 *   ops still QB_IO_PENDING: this thread and up to 63 of the file pool take them one by one
 *
 * A transfer is a walk over the op's elements:
 *
 *        iov[0]      iov[1]      iov[2]
 *      [#########] [####.....] [.........]      # done    . left
 *                       ^ place = { iov + 1, skip 4 }, offset + done in the file
 *
 * Invariants
 *  1. ret of every op is 0 or -errno when qb_io_run() returns; no buffer is touched afterwards.
 *  2. A read never returns less than was asked for: what lies behind the end of the file is zero.
 *  3. The caller's iovec arrays are never written.
 *  4. The pool tasks of a batch wait for nothing but their own I/O, so a batch always ends.
 *
 * Not done: flushes (a barrier is the caller's), registered buffers, order between ops.
 *
 * SPDX-License-Identifier: MIT
 */
#include "qb-config.h"
#include "util/iobatch-engine.h"
#include "util/pool.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

/* A place in the elements of a transfer; skip < iov->iov_len unless niov == 0. */
typedef struct Place {
    const struct iovec *iov;
    int niov;
    size_t skip;
} Place;

/* Moves over @bytes, and over elements without length. */
static void advance(Place *p, size_t bytes)
{
    p->skip += bytes;
    while (p->niov > 0 && p->skip >= p->iov->iov_len) {
        p->skip -= p->iov->iov_len;
        p->iov++;
        p->niov--;
    }
}

static void zero_rest(Place *p)
{
    while (p->niov > 0) {
        size_t left = p->iov->iov_len - p->skip;
        memset((char *)p->iov->iov_base + p->skip, 0, left);
        advance(p, left);
    }
}

/* One system call from @p on; the rest of an element that was begun is a call of its own. */
static ssize_t transfer(QbIoKind kind, int fd, uint64_t offset, const Place *p)
{
    struct iovec rest = {
        .iov_base = (char *)p->iov->iov_base + p->skip,
        .iov_len = p->iov->iov_len - p->skip,
    };
    const struct iovec *iov = p->skip ? &rest : p->iov;
    int niov = p->skip ? 1 : p->niov < IOV_MAX ? p->niov : IOV_MAX;
    ssize_t n = kind == QB_IO_READ ? preadv(fd, iov, niov, (off_t)offset)
                                   : pwritev(fd, iov, niov, (off_t)offset);
    return n < 0 ? -errno : n;
}

static bool is_behind_end(int fd, uint64_t offset)
{
    struct stat st;
    return fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && offset >= (uint64_t)st.st_size;
}

/*
 * What a transfer means that moved nothing: 0 where the file ends, -EINTR, or the error.  A direct
 * read that was cut short at the end of the file cannot be continued there, the place is not
 * aligned: the kernel says EINVAL where we mean end of file.
 */
static int judge(QbIoKind kind, int fd, uint64_t offset, ssize_t res, bool continued)
{
    if (res == 0) {
        return kind == QB_IO_READ ? 0 : -EIO;
    }
    if (res == -EINVAL && kind == QB_IO_READ && continued && is_behind_end(fd, offset)) {
        return 0;
    }
    return (int)res;
}

/* Does all that is left of a transfer from @p on, @offset being the place in the file. */
static int transfer_rest(QbIoKind kind, int fd, uint64_t offset, Place p, bool continued)
{
    while (p.niov > 0) {
        ssize_t n = transfer(kind, fd, offset, &p);
        if (n > 0) {
            advance(&p, (size_t)n);
            offset += (uint64_t)n;
            continued = true;
            continue;
        }
        int rc = judge(kind, fd, offset, n, continued);
        if (rc == 0) {
            zero_rest(&p);
        } else if (rc != -EINTR) {
            return rc;
        }
    }
    return 0;
}

int qb_io_one(QbIoKind kind, int fd, uint64_t offset, const struct iovec *iov, int niov)
{
    Place p = {.iov = iov, .niov = niov};
    advance(&p, 0);
    return transfer_rest(kind, fd, offset, p, false);
}

static void run_one(QbIoOp *op)
{
    op->ret = qb_io_one(op->kind, op->fd, op->offset, op->iov, op->niov);
}

void qb_io_complete(QbIoOp *op, ssize_t res)
{
    /* An engine also says EAGAIN where a plain call would have waited. */
    if (res < 0 && res != -EINTR && res != -EAGAIN) {
        op->ret = (int)res;
        return;
    }
    size_t done = res > 0 ? (size_t)res : 0;
    Place p = {.iov = op->iov, .niov = op->niov};
    advance(&p, done);
    op->ret = transfer_rest(op->kind, op->fd, op->offset + done, p, done > 0);
}

/* ---- without waiting ---- */

/* The short form costs less, and is all that many transfers need. */
static ssize_t transfer_one_piece(const QbIoOp *op)
{
    const struct iovec *iov = op->iov;
    ssize_t n;
    do {
        n = op->kind == QB_IO_READ ? pread(op->fd, iov->iov_base, iov->iov_len, (off_t)op->offset)
                                   : pwrite(op->fd, iov->iov_base, iov->iov_len, (off_t)op->offset);
    } while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : n;
}

static ssize_t transfer_flags(const QbIoOp *op, int flags)
{
    int niov = qb_io_first_niov(op);
    ssize_t n;
    do {
        n = op->kind == QB_IO_READ ? preadv2(op->fd, op->iov, niov, (off_t)op->offset, flags)
                                   : pwritev2(op->fd, op->iov, niov, (off_t)op->offset, flags);
    } while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : n;
}

ssize_t qb_io_nowait(const QbIoOp *op, _Atomic(bool) *lacks)
{
    if (!atomic_load_explicit(lacks, memory_order_relaxed)) {
        ssize_t n = transfer_flags(op, RWF_NOWAIT);
        if (n != -EOPNOTSUPP && n != -ENOSYS && n != -EINVAL) {
            return n;
        }
        atomic_store_explicit(lacks, true, memory_order_relaxed);
    }
    return op->niov == 1 ? transfer_one_piece(op) : transfer_flags(op, 0);
}

/* What is worth a try in the calling thread, for the file of the ops in a row. */
typedef struct Cached {
    int fd;
    bool reads, writes;
    bool in_memory; /* all of the file, always */
} Cached;

/* Direct I/O waits for the device.  Writes into the page cache of a regular file do not, as a rule, and
 * where they do they wait for one another, too: the file system lets one into a file at a time. */
static Cached look_at_file(int fd)
{
    struct stat st;
    int flags = fcntl(fd, F_GETFL);
    bool cached = flags >= 0 && !(flags & (O_DIRECT | O_DSYNC));
    return (Cached){
        .fd = fd, .reads = cached,
        .writes = cached && fstat(fd, &st) == 0 && S_ISREG(st.st_mode),
    };
}

/* Of a file system that does not know the question: is all of it in memory anyway? */
static bool is_in_memory(int fd)
{
    struct statfs fs;
    return fstatfs(fd, &fs) == 0 && fs.f_type == TMPFS_MAGIC;
}

static size_t first_bytes(const QbIoOp *op)
{
    size_t bytes = 0;
    for (int i = 0; i < qb_io_first_niov(op); i++) {
        bytes += op->iov[i].iov_len;
    }
    return bytes;
}

/* Runs the op if the page cache has all of it; else it stays pending, also when there is an error. */
static void try_cached_read(QbIoOp *op, Cached *file)
{
    ssize_t n = file->in_memory ? -EOPNOTSUPP : transfer_flags(op, RWF_NOWAIT);
    if (n == -EOPNOTSUPP || n == -ENOSYS || n == -EINVAL) {
        file->reads = file->in_memory = file->in_memory || is_in_memory(op->fd);
        if (file->reads) {
            run_one(op);
        }
    } else if (n >= 0 && (size_t)n == first_bytes(op)) {
        qb_io_complete(op, n);
    }
}

/* What needs no waiting needs no other thread, whose waking costs more than it gains. */
static void run_cached(QbIoOp *ops, size_t n)
{
    Cached file = {.fd = -1};
    for (size_t i = 0; i < n; i++) {
        QbIoOp *op = &ops[i];
        if (op->ret != QB_IO_PENDING) {
            continue;
        }
        if (op->fd != file.fd) {
            file = look_at_file(op->fd);
        }
        if (op->kind == QB_IO_READ && file.reads) {
            try_cached_read(op, &file);
        } else if (op->kind == QB_IO_WRITE && file.writes) {
            run_one(op);
        }
    }
}

/* ---- inside the kernel ---- */

/* EINVAL also stands for ranges of one file that overlap; giving up then costs speed only. */
static bool means_cannot_copy(int err)
{
    return err == EXDEV || err == EOPNOTSUPP || err == ENOSYS || err == EINVAL || err == ETXTBSY;
}

int qb_io_copy(int src, int64_t src_offset, int dst, int64_t dst_offset, int64_t bytes)
{
    while (bytes > 0) {
        off64_t from = src_offset, to = dst_offset;
        ssize_t n = copy_file_range(src, &from, dst, &to, (size_t)bytes, 0);
        if (n == 0 || (n < 0 && means_cannot_copy(errno))) {
            return -ENOTSUP;
        }
        if (n < 0 && errno != EINTR) {
            return -errno;
        }
        n = n > 0 ? n : 0;
        src_offset += n;
        dst_offset += n;
        bytes -= n;
    }
    return 0;
}

bool qb_io_copies_pages(int fd)
{
    static const __fsword_t plain[] = {EXT4_SUPER_MAGIC, TMPFS_MAGIC, RAMFS_MAGIC};
    struct statfs fs;
    if (fstatfs(fd, &fs) < 0) {
        return false;
    }
    for (size_t i = 0; i < sizeof(plain) / sizeof(plain[0]); i++) {
        if (fs.f_type == plain[i]) {
            return true;
        }
    }
    return false;
}

/* ---- threads ---- */

/* On the stack of the caller, who waits for the group. */
typedef struct Crew {
    QbIoOp *ops;
    size_t n;
    _Atomic(size_t) next; /* ops below it belong to somebody */
    QbTaskGroup group;
} Crew;

static int work_off(void *opaque)
{
    Crew *crew = opaque;
    size_t i;
    while ((i = atomic_fetch_add_explicit(&crew->next, 1, memory_order_relaxed)) < crew->n) {
        if (crew->ops[i].ret == QB_IO_PENDING) {
            run_one(&crew->ops[i]);
        }
    }
    return 0;
}

static size_t count_pending(const QbIoOp *ops, size_t n)
{
    size_t pending = 0;
    for (size_t i = 0; i < n; i++) {
        pending += ops[i].ret == QB_IO_PENDING;
    }
    return pending;
}

/* Runs all pending ops; the calling thread works too. */
static void run_in_threads(QbIoOp *ops, size_t n)
{
    size_t pending = count_pending(ops, n);
    if (pending == 0) {
        return;
    }
    Crew crew = {.ops = ops, .n = n};
    size_t helpers = (pending < QB_IO_DEPTH ? pending : QB_IO_DEPTH) - 1;
    qb_group_init(&crew.group);
    for (size_t i = 0; i < helpers; i++) {
        qb_group_submit(&crew.group, qb_file_pool(), work_off, &crew);
    }
    work_off(&crew);
    qb_group_wait(&crew.group, 0);
    qb_group_destroy(&crew.group);
}

/* ---- the batch ---- */

#ifdef CONFIG_LIBAIO
/* Kernel aio blocks in the submission unless the file is open for direct I/O. */
static bool all_direct(const QbIoOp *ops, size_t n)
{
    int checked = -1;
    for (size_t i = 0; i < n; i++) {
        if (ops[i].fd == checked) {
            continue;
        }
        int flags = fcntl(ops[i].fd, F_GETFL);
        if (flags < 0 || !(flags & O_DIRECT)) {
            return false;
        }
        checked = ops[i].fd;
    }
    return true;
}
#endif

/* A ring hands what may have to wait to threads of the kernel, and takes all of a file system that
 * cannot tell for that. The ops of a batch are nearly always of one file: the first one speaks for all. */
static void run_in_engine(QbIoOp *ops, size_t n, QbAioMode mode)
{
#ifdef CONFIG_IO_URING
    if (mode == QB_AIO_IO_URING && !is_in_memory(ops[0].fd)) {
        qb_uring_run(ops, n);
    }
#endif
#ifdef CONFIG_LIBAIO
    if (mode == QB_AIO_NATIVE && all_direct(ops, n)) {
        qb_libaio_run(ops, n);
    }
#endif
}

int qb_io_run(QbIoOp *ops, size_t n, QbAioMode mode)
{
    if (n == 0) {
        return 0;
    }
    if (n == 1) {
        run_one(ops);
        return ops->ret;
    }
    for (size_t i = 0; i < n; i++) {
        ops[i].ret = QB_IO_PENDING;
    }
    run_in_engine(ops, n, mode);
    run_cached(ops, n);
    run_in_threads(ops, n);
    for (size_t i = 0; i < n; i++) {
        if (ops[i].ret < 0) {
            return ops[i].ret;
        }
    }
    return 0;
}
