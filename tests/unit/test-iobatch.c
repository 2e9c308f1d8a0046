/*
 * File batches in every mode: against an oracle, at the end of files, with errors in the middle,
 * with transfers cut short, from many threads, and on systems that refuse io_uring at the start
 * or later.
 *
 * The linker wraps the system calls and a function of liburing and libaio each (see meson.build),
 * so that they can be counted, made to fail, or to do less than they were asked for.
 *
 * SPDX-License-Identifier: MIT
 */
#include "qb-config.h"
#include "util/iobatch.h"
#include "util/iov.h"
#include "util/pool.h"

#include <errno.h>
#include <fcntl.h>
#include <glib.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- the wraps ---- */

static _Atomic(size_t) at_most;        /* bytes per system call, 0: no limit */
static _Atomic(unsigned) interrupt_in; /* every n-th call is EINTR, 0: none */
static _Atomic(unsigned) alignment;    /* offsets that are no multiple of it are EINVAL; 0: any */
static _Atomic(unsigned) calls;
static _Atomic(int) nowait_error;      /* what those say that shall not wait, 0: what is true */
static _Atomic(unsigned) foreign;      /* calls made by other threads than the first one */
static pthread_t first_thread;

ssize_t __real_preadv64(int, const struct iovec *, int, off_t);
ssize_t __real_pwritev64(int, const struct iovec *, int, off_t);
ssize_t __wrap_preadv64(int, const struct iovec *, int, off_t);
ssize_t __wrap_pwritev64(int, const struct iovec *, int, off_t);
ssize_t __real_preadv64v2(int, const struct iovec *, int, off_t, int);
ssize_t __wrap_preadv64v2(int, const struct iovec *, int, off_t, int);

/* Whether the call shall fail; sets errno then. */
static bool is_to_fail(off_t offset)
{
    unsigned nth = atomic_load(&interrupt_in), align = atomic_load(&alignment);
    unsigned call = atomic_fetch_add(&calls, 1);
    atomic_fetch_add(&foreign, !pthread_equal(pthread_self(), first_thread));
    errno = nth && call % nth == 0 ? EINTR : align && offset % align ? EINVAL : 0;
    return errno != 0;
}

/* Shortens a call to the bytes allowed of its first element. */
static int shorten(const struct iovec **iov, int niov, struct iovec *room)
{
    size_t limit = atomic_load(&at_most);
    if (!limit || niov == 0) {
        return niov;
    }
    *room = (struct iovec){(*iov)->iov_base, MIN((*iov)->iov_len, limit)};
    *iov = room;
    return 1;
}

ssize_t __wrap_preadv64(int fd, const struct iovec *iov, int niov, off_t offset)
{
    struct iovec room;
    if (is_to_fail(offset)) {
        return -1;
    }
    niov = shorten(&iov, niov, &room);
    return __real_preadv64(fd, iov, niov, offset);
}

ssize_t __wrap_pwritev64(int fd, const struct iovec *iov, int niov, off_t offset)
{
    struct iovec room;
    if (is_to_fail(offset)) {
        return -1;
    }
    niov = shorten(&iov, niov, &room);
    return __real_pwritev64(fd, iov, niov, offset);
}

ssize_t __wrap_preadv64v2(int fd, const struct iovec *iov, int niov, off_t offset, int flags)
{
    struct iovec room;
    errno = atomic_load(&nowait_error);
    if (errno) {
        return -1;
    }
    niov = shorten(&iov, niov, &room);
    return __real_preadv64v2(fd, iov, niov, offset, flags);
}

#ifdef CONFIG_IO_URING
#include <liburing.h>

static _Atomic(unsigned) submits_left = UINT_MAX; /* that many go well */
static _Atomic(unsigned) submits;

int __real_io_uring_submit_and_wait(struct io_uring *, unsigned);
int __wrap_io_uring_submit_and_wait(struct io_uring *, unsigned);

int __wrap_io_uring_submit_and_wait(struct io_uring *ring, unsigned n)
{
    if (atomic_load(&submits_left) == 0) {
        return -EPERM;
    }
    atomic_fetch_sub(&submits_left, 1);
    atomic_fetch_add(&submits, 1);
    return __real_io_uring_submit_and_wait(ring, n);
}
#endif

#ifdef CONFIG_LIBAIO
#include <libaio.h>

static _Atomic(unsigned) aio_submits;

int __real_io_submit(io_context_t, long, struct iocb **);
int __wrap_io_submit(io_context_t, long, struct iocb **);

int __wrap_io_submit(io_context_t ctx, long n, struct iocb **list)
{
    atomic_fetch_add(&aio_submits, 1);
    return __real_io_submit(ctx, n, list);
}
#endif

/* ---- files ---- */

static char *directory;

/* A new file of @size bytes that is gone from the directory at once. */
static int make_file(int flags, off_t size)
{
    g_autofree char *name = g_strconcat(directory, "/file", NULL);
    int fd = open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | flags, 0600);
    if (fd >= 0) {
        unlink(name);
        g_assert_cmpint(ftruncate(fd, size), ==, 0);
    } else if (flags & O_DIRECT) {
        unlink(name); /* made before the file system refused direct I/O */
    }
    return fd;
}

static void fill_random(char *buf, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        buf[i] = (char)g_test_rand_int();
    }
}

/* ---- an oracle ---- */

#define PIECE 4096
#define PIECES 300
#define FILE_SIZE (PIECE * PIECES)

/* PIECES ops that together cover the file in random order, each of up to four elements of @buf. */
static void make_ops(QbIoOp *ops, struct iovec *iov, QbIoKind kind, int fd, char *buf)
{
    unsigned order[PIECES];
    for (unsigned i = 0; i < PIECES; i++) {
        unsigned j = (unsigned)g_test_rand_int_range(0, (gint32)i + 1);
        order[i] = order[j];
        order[j] = i;
    }
    for (unsigned i = 0; i < PIECES; i++, iov += 4) {
        size_t at = (size_t)order[i] * PIECE;
        int niov = 1 << g_test_rand_int_range(0, 3);
        size_t len = PIECE / (size_t)niov;
        for (int k = 0; k < niov; k++) {
            iov[k] = (struct iovec){buf + at + (size_t)k * len, len};
        }
        ops[i] = (QbIoOp){kind, fd, at, iov, niov, .ret = 99};
    }
}

/* Writes random data in one batch and reads it back in another. */
static void write_and_read(int fd, QbAioMode mode)
{
    char *data = qb_try_memalign(PIECE, FILE_SIZE), *back = qb_try_memalign(PIECE, FILE_SIZE);
    g_autofree QbIoOp *ops = g_new(QbIoOp, PIECES);
    g_autofree struct iovec *iov = g_new(struct iovec, PIECES * 4);
    fill_random(data, FILE_SIZE);
    make_ops(ops, iov, QB_IO_WRITE, fd, data);
    g_assert_cmpint(qb_io_run(ops, PIECES, mode), ==, 0);
    memset(back, 0xee, FILE_SIZE);
    make_ops(ops, iov, QB_IO_READ, fd, back);
    g_assert_cmpint(qb_io_run(ops, PIECES, mode), ==, 0);
    for (unsigned i = 0; i < PIECES; i++) {
        g_assert_cmpint(ops[i].ret, ==, 0);
    }
    g_assert_cmpmem(back, FILE_SIZE, data, FILE_SIZE);
    free(data);
    free(back);
}

static void test_oracle(gconstpointer mode)
{
    int fd = make_file(0, 0);
    write_and_read(fd, (QbAioMode)GPOINTER_TO_INT(mode));
    close(fd);
}

static void test_oracle_direct(gconstpointer mode)
{
    int fd = make_file(O_DIRECT, 0);
    if (fd < 0) {
        g_test_skip("no direct I/O here");
        return;
    }
    write_and_read(fd, (QbAioMode)GPOINTER_TO_INT(mode));
    close(fd);
}

#ifdef CONFIG_LIBAIO
/* Kernel aio serves direct files, and no others. */
static void test_native_is_used(void)
{
    int buffered = make_file(0, 0), direct = make_file(O_DIRECT, 0);
    unsigned before = atomic_load(&aio_submits);
    write_and_read(buffered, QB_AIO_NATIVE);
    g_assert_cmpuint(atomic_load(&aio_submits), ==, before);
    if (direct >= 0) {
        write_and_read(direct, QB_AIO_NATIVE);
        g_assert_cmpuint(atomic_load(&aio_submits), ==, before + 2 * PIECES);
        close(direct);
    } else {
        g_test_skip("no direct I/O here");
    }
    close(buffered);
}
#endif

/* ---- the end of the file ---- */

/* The same read twice, as a batch of more than one; both must see @expected. */
static void check_read(int fd, uint64_t offset, size_t len, const char *expected, QbAioMode mode)
{
    char *buf = qb_try_memalign(PIECE, 2 * len);
    memset(buf, 0xee, 2 * len);
    struct iovec iov[3] = {{buf, len / 2}, {buf + len / 2, len - len / 2}, {buf + len, len}};
    QbIoOp ops[2] = {
        {.kind = QB_IO_READ, .fd = fd, .offset = offset, .iov = &iov[0], .niov = 2},
        {.kind = QB_IO_READ, .fd = fd, .offset = offset, .iov = &iov[2], .niov = 1},
    };
    g_assert_cmpint(qb_io_run(ops, 2, mode), ==, 0);
    g_assert_cmpmem(buf, len, expected, len);
    g_assert_cmpmem(buf + len, len, expected, len);
    free(buf);
}

static void check_end_of_file(int fd, QbAioMode mode)
{
    char expected[3 * PIECE] = "";
    memset(expected, 'x', PIECE + 1000);
    check_read(fd, 0, 2 * PIECE, expected, mode);
    check_read(fd, PIECE, PIECE, expected + PIECE, mode);
    check_read(fd, 2 * PIECE, PIECE, expected + 2 * PIECE, mode);
    check_read(fd, INT64_MAX - 2 * PIECE + 1, PIECE, expected + 2 * PIECE, mode);
}

static int make_short_file(int flags)
{
    int fd = make_file(flags, 0);
    if (fd < 0) {
        return fd;
    }
    char *buf = qb_try_memalign(PIECE, 2 * PIECE);
    memset(buf, 'x', 2 * PIECE);
    g_assert_cmpint(pwrite(fd, buf, 2 * PIECE, 0), ==, 2 * PIECE);
    g_assert_cmpint(ftruncate(fd, PIECE + 1000), ==, 0);
    free(buf);
    return fd;
}

static void test_end_of_file(gconstpointer mode)
{
    int fd = make_short_file(0);
    check_end_of_file(fd, (QbAioMode)GPOINTER_TO_INT(mode));
    close(fd);
}

/* A direct read that ends inside a sector cannot be continued where it ended; some file systems say
 * so.  The same answer inside the file is an error. */
static void test_end_of_file_unaligned(void)
{
    int fd = make_short_file(0);
    char buf[PIECE];
    struct iovec iov = {buf, PIECE};
    atomic_store(&alignment, 512);
    check_end_of_file(fd, QB_AIO_THREADS);
    g_assert_cmpint(qb_io_one(QB_IO_READ, fd, PIECE + 1000, &iov, 1), ==, -EINVAL);
    atomic_store(&at_most, 100);
    g_assert_cmpint(qb_io_one(QB_IO_READ, fd, 0, &iov, 1), ==, -EINVAL);
    atomic_store(&at_most, 0);
    atomic_store(&alignment, 0);
    close(fd);
}

static void test_end_of_file_direct(gconstpointer mode)
{
    int fd = make_short_file(O_DIRECT);
    if (fd < 0) {
        g_test_skip("no direct I/O here");
        return;
    }
    check_end_of_file(fd, (QbAioMode)GPOINTER_TO_INT(mode));
    close(fd);
}

/* ---- errors ---- */

static void test_errors(gconstpointer mode)
{
    g_autofree char *name = g_strconcat(directory, "/read-only", NULL);
    g_assert_true(g_file_set_contents(name, "abcd", 4, NULL));
    int fd = make_file(0, 4096), ro = open(name, O_RDONLY | O_CLOEXEC);
    int closed = dup(fd);
    close(closed);
    char data[4] = "data", back[4] = "";
    struct iovec out = {data, 4}, in = {back, 4};
    QbIoOp ops[] = {
        {.kind = QB_IO_WRITE, .fd = fd, .offset = 0, .iov = &out, .niov = 1},
        {.kind = QB_IO_WRITE, .fd = fd, .offset = UINT64_MAX - 1, .iov = &out, .niov = 1},
        {.kind = QB_IO_WRITE, .fd = closed, .offset = 0, .iov = &out, .niov = 1},
        {.kind = QB_IO_WRITE, .fd = ro, .offset = 0, .iov = &out, .niov = 1},
        {.kind = QB_IO_READ, .fd = ro, .offset = 0, .iov = &in, .niov = 1},
    };
    g_assert_cmpint(qb_io_run(ops, G_N_ELEMENTS(ops), (QbAioMode)GPOINTER_TO_INT(mode)), ==,
                    -EINVAL);
    g_assert_cmpint(ops[0].ret, ==, 0);
    g_assert_cmpint(ops[1].ret, ==, -EINVAL);
    g_assert_cmpint(ops[2].ret, ==, -EBADF);
    g_assert_cmpint(ops[3].ret, ==, -EBADF);
    g_assert_cmpint(ops[4].ret, ==, 0);
    g_assert_cmpmem(back, 4, "abcd", 4);
    close(ro);
    close(fd);
    unlink(name);
}

static void test_direct_misaligned(gconstpointer mode)
{
    int fd = make_short_file(O_DIRECT);
    if (fd < 0) {
        g_test_skip("no direct I/O here");
        return;
    }
    char *buf = qb_try_memalign(PIECE, PIECE);
    struct iovec odd = {buf + 1, 511}, even = {buf, PIECE};
    QbIoOp ops[2] = {
        {.kind = QB_IO_READ, .fd = fd, .offset = 1, .iov = &odd, .niov = 1},
        {.kind = QB_IO_READ, .fd = fd, .offset = 0, .iov = &even, .niov = 1},
    };
    int rc = qb_io_run(ops, 2, (QbAioMode)GPOINTER_TO_INT(mode));
    if (rc == 0) {
        g_test_skip("this file system reads directly at any alignment");
    } else {
        g_assert_cmpint(rc, ==, -EINVAL);
    }
    g_assert_cmpint(ops[1].ret, ==, 0);
    free(buf);
    close(fd);
}

/* ---- shapes ---- */

#define MANY (IOV_MAX * 2 + 10)

/* Elements of 0, 1 and 1 bytes in turn over @buf; returns the bytes they have together. */
static size_t make_many(struct iovec *iov, char *buf)
{
    size_t len = 0;
    for (size_t i = 0; i < MANY; i++) {
        iov[i] = (struct iovec){buf + len, i % 3 ? 1 : 0};
        len += iov[i].iov_len;
    }
    return len;
}

/* More elements than one system call takes, some of them empty. */
static void test_many_elements(gconstpointer mode)
{
    int fd = make_file(0, 0);
    g_autofree struct iovec *iov = g_new(struct iovec, 2 * MANY);
    g_autofree char *data = g_malloc(2 * MANY), *back = g_malloc0(2 * MANY);
    fill_random(data, 2 * MANY);
    size_t len = make_many(iov, data);
    make_many(iov + MANY, data + MANY);
    QbIoOp ops[2] = {
        {.kind = QB_IO_WRITE, .fd = fd, .offset = 0, .iov = iov, .niov = MANY},
        {.kind = QB_IO_WRITE, .fd = fd, .offset = MANY, .iov = iov + MANY, .niov = MANY},
    };
    g_assert_cmpint(qb_io_run(ops, 2, (QbAioMode)GPOINTER_TO_INT(mode)), ==, 0);
    make_many(iov, back);
    make_many(iov + MANY, back + MANY);
    ops[0].kind = ops[1].kind = QB_IO_READ;
    g_assert_cmpint(qb_io_run(ops, 2, (QbAioMode)GPOINTER_TO_INT(mode)), ==, 0);
    g_assert_cmpmem(back, len, data, len);
    g_assert_cmpmem(back + MANY, len, data + MANY, len);
    close(fd);
}

static void test_nothing(gconstpointer opaque)
{
    QbAioMode mode = (QbAioMode)GPOINTER_TO_INT(opaque);
    int fd = make_file(0, 100);
    struct iovec empty[2] = {{NULL, 0}, {NULL, 0}};
    QbIoOp ops[3] = {
        {.kind = QB_IO_READ, .fd = fd, .iov = empty, .niov = 2},
        {.kind = QB_IO_WRITE, .fd = fd, .iov = empty, .niov = 1},
        {.kind = QB_IO_WRITE, .fd = fd, .iov = NULL, .niov = 0},
    };
    g_assert_cmpint(qb_io_run(NULL, 0, mode), ==, 0);
    g_assert_cmpint(qb_io_run(ops, 3, mode), ==, 0);
    g_assert_cmpint(qb_io_run(ops, 1, mode), ==, 0);
    g_assert_cmpint(qb_io_one(QB_IO_WRITE, fd, 50, empty, 2), ==, 0);
    close(fd);
}

/* System calls that do seven bytes at a time and are interrupted now and then. */
static void test_short_transfers(gconstpointer opaque)
{
    QbAioMode mode = (QbAioMode)GPOINTER_TO_INT(opaque);
    int fd = make_file(0, 0);
    char data[2000], back[4000], expected[4000] = "";
    fill_random(data, sizeof(data));
    memcpy(expected, data, sizeof(data));
    struct iovec out[2] = {{data, 999}, {data + 999, 1001}};
    struct iovec in[2] = {{back, 5}, {back + 5, 3995}};
    QbIoOp ops[2] = {
        {.kind = QB_IO_WRITE, .fd = fd, .offset = 10, .iov = out, .niov = 2},
        {.kind = QB_IO_WRITE, .fd = fd, .offset = 100000, .iov = out, .niov = 2},
    };
    atomic_store(&at_most, 7);
    atomic_store(&interrupt_in, 5);
    g_assert_cmpint(qb_io_run(ops, 2, mode), ==, 0);
    g_assert_cmpint(qb_io_one(QB_IO_READ, fd, 100000, in, 2), ==, 0);
    atomic_store(&at_most, 0);
    atomic_store(&interrupt_in, 0);
    g_assert_cmpmem(back, sizeof(back), expected, sizeof(back));
    check_read(fd, 10, sizeof(data), data, mode);
    close(fd);
}

/* What is in the page cache, or goes there, is done where it is asked for. */
static void test_cached(void)
{
    int fd = make_file(0, 1);
    char byte;
    struct iovec iov = {&byte, 1};
    if (__real_preadv64v2(fd, &iov, 1, 0, RWF_NOWAIT) < 0 && errno == EOPNOTSUPP) {
        g_test_skip("this file system does not say what is cached");
        close(fd);
        return;
    }
    atomic_store(&foreign, 0);
    write_and_read(fd, QB_AIO_THREADS);
    g_assert_cmpuint(atomic_load(&foreign), ==, 0);
    close(fd);
}

/* Cold files, and files where nobody can say: the other threads do it, and see what errors there are. */
static void test_not_cached(void)
{
    static const int errors[] = {EAGAIN, EOPNOTSUPP, ENOSYS, EINVAL, EIO};
    int fd = make_file(0, 0), end = make_short_file(0);
    for (size_t i = 0; i < G_N_ELEMENTS(errors); i++) {
        atomic_store(&nowait_error, errors[i]);
        write_and_read(fd, QB_AIO_THREADS);
        check_end_of_file(end, QB_AIO_THREADS);
        test_errors(GINT_TO_POINTER(QB_AIO_THREADS));
    }
    atomic_store(&nowait_error, 0);
    close(end);
    close(fd);
}

static void test_full_device(gconstpointer opaque)
{
    char data[8] = "x";
    int fd = open("/dev/full", O_RDWR | O_CLOEXEC);
    if (fd < 0) {
        g_test_skip("no /dev/full");
        return;
    }
    struct iovec iov = {data, 8};
    QbIoOp ops[2] = {
        {.kind = QB_IO_WRITE, .fd = fd, .iov = &iov, .niov = 1},
        {.kind = QB_IO_WRITE, .fd = fd, .iov = &iov, .niov = 1},
    };
    g_assert_cmpint(qb_io_run(ops, 2, (QbAioMode)GPOINTER_TO_INT(opaque)), ==, -ENOSPC);
    g_assert_cmpint(ops[1].ret, ==, -ENOSPC);
    close(fd);
}

/* ---- threads ---- */

static void *batch_thread(void *opaque)
{
    /* GLib's random numbers of a test are for one thread; these are as good here. */
    static _Atomic(unsigned) seed;
    char data[64 * 64], back[64 * 64];
    struct iovec iov[64];
    QbIoOp ops[64];
    int fd = *(int *)opaque;
    uint64_t base = (uint64_t)atomic_fetch_add(&seed, 1) * sizeof(data);
    for (unsigned round = 0; round < 20; round++) {
        memset(data, (int)(base + round), sizeof(data));
        for (unsigned i = 0; i < 64; i++) {
            iov[i] = (struct iovec){data + i * 64, 64};
            ops[i] = (QbIoOp){QB_IO_WRITE, fd, base + i * 64, &iov[i], 1, 0};
        }
        g_assert_cmpint(qb_io_run(ops, 64, round % 3), ==, 0);
        for (unsigned i = 0; i < 64; i++) {
            iov[i].iov_base = back + i * 64;
            ops[i].kind = QB_IO_READ;
        }
        g_assert_cmpint(qb_io_run(ops, 64, (round + 1) % 3), ==, 0);
        g_assert_cmpmem(back, sizeof(back), data, sizeof(data));
    }
    return NULL;
}

static void test_many_threads(void)
{
    pthread_t threads[6];
    int fd = make_file(0, 0);
    for (size_t i = 0; i < G_N_ELEMENTS(threads); i++) {
        g_assert_true(qb_thread_start(&threads[i], "batch", batch_thread, &fd));
    }
    for (size_t i = 0; i < G_N_ELEMENTS(threads); i++) {
        pthread_join(threads[i], NULL);
    }
    close(fd);
}

/* ---- systems without io_uring; these come last, the last one is for good ---- */

#ifdef CONFIG_IO_URING
static void *run_uring_batch(void *opaque)
{
    write_and_read(*(int *)opaque, QB_AIO_IO_URING);
    return NULL;
}

/* How many times a batch in this thread asks io_uring for something. */
static unsigned count_submits(int fd)
{
    unsigned before = atomic_load(&submits);
    run_uring_batch(&fd);
    return atomic_load(&submits) - before;
}

static void test_environment(void)
{
    int fd = make_file(0, 0);
    bool has_uring = count_submits(fd) > 0;
    g_setenv("QB_DISABLE_IO_URING", "1", TRUE);
    g_assert_cmpuint(count_submits(fd), ==, 0);
    g_setenv("QB_DISABLE_IO_URING", "0", TRUE);
    g_assert_cmpint(count_submits(fd) > 0, ==, has_uring);
    g_unsetenv("QB_DISABLE_IO_URING");
    close(fd);
    if (!has_uring) {
        g_test_skip("no io_uring here");
    }
}

static void *write_to_pipe(void *opaque)
{
    g_usleep(50000);
    g_assert_cmpint(write(*(int *)opaque, "late", 4), ==, 4);
    return NULL;
}

/* A batch whose first op is a read of a pipe, which only io_uring can do, and which is under way
 * until a thread writes to the pipe, after the ring has refused. */
static void run_batch_that_breaks(int fd)
{
    int ends[2];
    char late[5] = "", *data = g_malloc0(FILE_SIZE);
    g_autofree QbIoOp *ops = g_new(QbIoOp, PIECES);
    g_autofree struct iovec *iov = g_new(struct iovec, PIECES * 4);
    struct iovec in = {late, 4};
    pthread_t thread;
    make_ops(ops, iov, QB_IO_WRITE, fd, data);
    g_assert_cmpint(pipe(ends), ==, 0);
    ops[0] = (QbIoOp){.kind = QB_IO_READ, .fd = ends[0], .iov = &in, .niov = 1};
    g_assert_true(qb_thread_start(&thread, "writer", write_to_pipe, &ends[1]));
    g_assert_cmpint(qb_io_run(ops, PIECES, QB_AIO_IO_URING), ==, 0);
    g_assert_cmpstr(late, ==, "late");
    pthread_join(thread, NULL);
    close(ends[0]);
    close(ends[1]);
    g_free(data);
}

/* The ring refuses in the middle of a batch: the batch is completed, what the ring had done is not
 * done twice, and no thread uses io_uring again. */
static void test_ring_gives_up(void)
{
    int fd = make_file(0, 0);
    if (count_submits(fd) == 0) {
        g_test_skip("no io_uring here");
        close(fd);
        return;
    }
    unsigned before = atomic_load(&submits), before_calls = atomic_load(&calls);
    atomic_store(&submits_left, 2);
    run_batch_that_breaks(fd);
    g_assert_cmpuint(atomic_load(&submits) - before, ==, 2);
    g_assert_cmpuint(atomic_load(&calls) - before_calls, <=, PIECES - 64);
    atomic_store(&submits_left, UINT_MAX);
    g_assert_cmpuint(count_submits(fd), ==, 0);
    pthread_t thread;
    before = atomic_load(&submits);
    g_assert_true(qb_thread_start(&thread, "other", run_uring_batch, &fd));
    pthread_join(thread, NULL);
    g_assert_cmpuint(atomic_load(&submits), ==, before);
    close(fd);
}
#endif

static void add_for_all_modes(const char *name, void (*fn)(gconstpointer))
{
    static const char *const modes[] = {
        [QB_AIO_THREADS] = "threads",
        [QB_AIO_NATIVE] = "native",
        [QB_AIO_IO_URING] = "io_uring",
    };
    for (int i = 0; i < (int)G_N_ELEMENTS(modes); i++) {
        g_autofree char *path = g_strdup_printf("/iobatch/%s/%s", modes[i], name);
        g_test_add_data_func(path, GINT_TO_POINTER(i), fn);
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    first_thread = pthread_self();
    directory = g_dir_make_tmp("qb-iobatch-XXXXXX", NULL);
    g_assert_nonnull(directory);
    add_for_all_modes("oracle", test_oracle);
    add_for_all_modes("oracle-direct", test_oracle_direct);
    add_for_all_modes("end-of-file", test_end_of_file);
    add_for_all_modes("end-of-file-direct", test_end_of_file_direct);
    add_for_all_modes("errors", test_errors);
    add_for_all_modes("direct-misaligned", test_direct_misaligned);
    add_for_all_modes("many-elements", test_many_elements);
    add_for_all_modes("nothing", test_nothing);
    add_for_all_modes("short-transfers", test_short_transfers);
    add_for_all_modes("full-device", test_full_device);
    g_test_add_func("/iobatch/end-of-file-unaligned", test_end_of_file_unaligned);
    g_test_add_func("/iobatch/cached", test_cached);
    g_test_add_func("/iobatch/not-cached", test_not_cached);
    g_test_add_func("/iobatch/many-threads", test_many_threads);
#ifdef CONFIG_LIBAIO
    g_test_add_func("/iobatch/native-is-used", test_native_is_used);
#endif
#ifdef CONFIG_IO_URING
    g_test_add_func("/iobatch/without/environment", test_environment);
    g_test_add_func("/iobatch/without/ring-gives-up", test_ring_gives_up);
#endif
    int rc = g_test_run();
    qb_pools_shutdown();
    rmdir(directory);
    g_free(directory);
    return rc;
}
