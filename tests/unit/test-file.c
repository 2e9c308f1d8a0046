/*
 * Driver "file": opening, transfers, zeroes, status, lengths, creation.
 *
 * Each case runs in /tmp and, where there is one, in /dev/shm: file systems differ in what they can
 * do with holes.  Errors are injected by descriptors that are something else, by a limit of the
 * file size and by a file system that is too small.
 *
 * SPDX-License-Identifier: MIT
 */
#include "file-node.h"

#include <signal.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <linux/fs.h>

#define RDWR ((NodeMode){0})
#define RDONLY ((NodeMode){.read_only = true})
#define DIRECT ((NodeMode){.direct = true})

/* --- opening --- */

static void expect_open_error(const BlockDriver *drv, const char *path, const char *opts,
                              const char *text)
{
    GError *err = NULL;
    g_assert_null(node_open(drv, path, RDWR, opts, &err));
    g_assert_nonnull(err);
    g_assert_cmpstr(err->message, ==, text);
    g_clear_error(&err);
}

static void test_open_wrong_thing(TestDir *t, gconstpointer root)
{
    g_autofree char *fifo = g_build_filename(t->dir, "fifo", NULL);
    g_autofree char *missing = g_strdup_printf("Could not open '%s': No such file or directory",
                                               t->file);
    const char *not_regular = "'file' driver requires '%s' to be a regular file";
    g_autofree char *dir = g_strdup_printf(not_regular, t->dir);
    g_autofree char *pipe = g_strdup_printf(not_regular, fifo);
    g_autofree char *device = g_strdup_printf(
        "'host_device' driver requires '%s' to be either a character or block device", t->file);
    expect_open_error(&bdrv_file, t->file, NULL, missing);
    expect_open_error(&bdrv_file, t->dir, NULL, dir);
    g_assert_cmpint(mkfifo(fifo, 0600), ==, 0);
    expect_open_error(&bdrv_file, fifo, NULL, pipe);
    expect_open_error(&bdrv_file, "/dev/null", NULL,
                      "'file' driver requires '/dev/null' to be a regular file");
    make_file(t->file, 512, 0);
    expect_open_error(&bdrv_host_device, t->file, NULL, device);
    expect_open_error(&bdrv_file, NULL, NULL, "The 'file' block driver requires a file name");
    expect_open_error(&bdrv_file, "", NULL, "The 'file' block driver requires a file name");
}

static void test_open_options(TestDir *t, gconstpointer root)
{
    make_file(t->file, 512, 0);
    expect_open_error(&bdrv_file, t->file, "locking=maybe",
                      "Parameter 'locking' does not accept value 'maybe'");
    expect_open_error(&bdrv_file, t->file, "aio=epoll",
                      "Parameter 'aio' does not accept value 'epoll'");
    expect_open_error(&bdrv_file, t->file, "pr-manager=pr0",
                      "Option 'pr-manager' is not supported");
    expect_open_error(&bdrv_file, t->file, "aio=native",
                      "aio=native was specified, but it requires cache.direct=on, which was not "
                      "specified.");
    GError *err = NULL;
    BlockDriverState *bs = node_open(&bdrv_file, t->file, RDWR,
                                     "locking=off,aio=threads,aio-max-batch=4,drop-cache=off,"
                                     "x-check-cache-dropped=on", &err);
    g_assert_no_error(err);
    g_assert_cmpint(file_state(bs)->aio, ==, QB_AIO_THREADS);
    g_assert_false(file_state(bs)->locks.enabled);
    node_close(bs);
}

static void test_parse_filename(void)
{
    GError *err = NULL;
    g_autoptr(json_t) options = json_object();
    g_assert_true(bdrv_file.parse_filename("file:a:b", options, &err));
    g_assert_cmpstr(qb_opt_peek_string(options, "filename"), ==, "a:b");
    g_assert_true(bdrv_host_device.parse_filename("host_device:/dev/x", options, &err));
    g_assert_cmpstr(qb_opt_peek_string(options, "filename"), ==, "/dev/x");
    g_assert_false(bdrv_file.parse_filename("file:\xff", options, &err));
    expect_error(&err, EINVAL, "File name 'file:\xff' is not valid UTF-8");
    g_assert_cmpint(bdrv_host_device.probe_device("/dev/null"), ==, 100);
    g_assert_cmpint(bdrv_host_device.probe_device("/tmp"), ==, 0);
}

/* Makes the file immutable or not: even root cannot open it for writing then. */
static bool set_immutable(const char *path, bool on)
{
    int attributes, fd = open(path, O_RDONLY | O_CLOEXEC);
    g_assert_cmpint(fd, >=, 0);
    bool ok = ioctl(fd, FS_IOC_GETFLAGS, &attributes) == 0;
    attributes = on ? attributes | FS_IMMUTABLE_FL : attributes & ~FS_IMMUTABLE_FL;
    ok = ok && ioctl(fd, FS_IOC_SETFLAGS, &attributes) == 0;
    close(fd);
    return ok;
}

/* The class of the error is what the core decides by whether read-only would do. */
static void test_open_refused(TestDir *t, gconstpointer root)
{
    GError *err = NULL;
    make_file(t->file, 512, 0);
    if (!set_immutable(t->file, true)) {
        g_test_skip("no immutable files here");
        return;
    }
    g_autofree char *text =
        g_strdup_printf("Could not open '%s': Operation not permitted", t->file);
    g_assert_null(node_open(&bdrv_file, t->file, RDWR, NULL, &err));
    expect_error(&err, EPERM, text);
    BlockDriverState *bs = node_open_ok(t->file, RDONLY);
    g_assert_cmpint(bs->drv->getlength(bs), ==, 512);
    node_close(bs);
    set_immutable(t->file, false);
}

/* --- transfers --- */

static void test_read_write(TestDir *t, gconstpointer root)
{
    make_file(t->file, 0, 0);
    BlockDriverState *bs = node_open_ok(t->file, RDWR);
    g_assert_cmpuint(bs->bl.request_alignment, ==, 1);
    g_assert_cmpint(node_write(bs, 3, 10000, 7, 0), ==, 0);
    g_assert_cmpint(bs->drv->getlength(bs), ==, 10003);
    g_assert_cmpint(node_read_byte(bs, 0, 3), ==, 0);
    g_assert_cmpint(node_read_byte(bs, 3, 10000), ==, 7);
    g_assert_cmpint(node_read_byte(bs, 10003, 4096), ==, 0);
    g_assert_cmpint(node_read_byte(bs, INT64_C(1) << 40, 10), ==, 0);
    g_assert_cmpint(node_write(bs, 5000, 1, 9, BDRV_REQ_FUA), ==, 0);
    g_assert_cmpint(node_read_byte(bs, 5000, 1), ==, 9);
    g_assert_cmpint(bs->drv->flush(bs), ==, 0);
    node_close(bs);
}

/* A request may be a part of a longer vector. */
static void test_vector_part(TestDir *t, gconstpointer root)
{
    char data[] = "abcdefghijkl", back[12] = "";
    make_file(t->file, 0, 0);
    BlockDriverState *bs = node_open_ok(t->file, RDWR);
    IOV_VECTOR_AUTO v;
    iov_vector_init(&v, 3);
    iov_vector_add(&v, data, 4);
    iov_vector_add(&v, data + 4, 4);
    iov_vector_add(&v, data + 8, 4);
    g_assert_cmpint(bs->drv->pwritev(bs, NULL, 0, 6, &v, 3, 0), ==, 0);
    g_assert_cmpint(bs->drv->getlength(bs), ==, 6);
    IoVector r;
    iov_vector_init_buf(&r, back, sizeof(back));
    g_assert_cmpint(bs->drv->preadv(bs, NULL, 1, 7, &r, 2, 0), ==, 0);
    g_assert_cmpmem(back, 12, "\0\0efghi\0\0\0\0\0", 12);
    node_close(bs);
}

static void test_read_only_write(TestDir *t, gconstpointer root)
{
    make_file(t->file, 4096, 1);
    BlockDriverState *bs = node_open_ok(t->file, RDONLY);
    g_assert_cmpint(node_write(bs, 0, 512, 2, 0), ==, -EBADF);
    g_assert_cmpint(node_read_byte(bs, 0, 4096), ==, 1);
    node_close(bs);
}

static void test_direct(TestDir *t, gconstpointer root)
{
    GError *err = NULL;
    make_file(t->file, 5000, 3);
    BlockDriverState *bs = node_open(&bdrv_file, t->file, DIRECT, NULL, &err);
    if (!bs) {
        g_test_skip(err->message);
        g_assert_nonnull(strstr(err->message, "O_DIRECT"));
        g_clear_error(&err);
        return;
    }
    uint32_t unit = bs->bl.request_alignment;
    g_assert_cmpuint(unit, >=, 1);
    g_assert_cmpuint(unit & (unit - 1), ==, 0);
    g_assert_cmpint(node_read_byte(bs, 0, 4096), ==, 3);
    g_assert_cmpint(node_read_byte(bs, 8192, 4096), ==, 0);
    g_assert_cmpint(node_write(bs, 4096, 4096, 4, BDRV_REQ_FUA), ==, 0);
    g_assert_cmpint(node_read_byte(bs, 4096, 4096), ==, 4);
    g_assert_cmpint(bs->drv->getlength(bs), ==, 8192);
    g_assert_cmpint(bs->drv->flush(bs), ==, 0);
    node_close(bs);
}

/* A direct read of the last, partial, unit hands back zeroes behind the end. */
static void test_direct_tail(TestDir *t, gconstpointer root)
{
    GError *err = NULL;
    make_file(t->file, 100, 3);
    BlockDriverState *bs = node_open(&bdrv_file, t->file, DIRECT, "aio=native", &err);
    if (!bs) {
        g_test_skip(err->message);
        g_clear_error(&err);
        return;
    }
    QB_AUTO_FREE unsigned char *buf = qb_try_memalign(4096, 4096);
    BdrvBatchOp ops[1] = {{.kind = BDRV_BATCH_READ, .bytes = 4096, .buf = buf}};
    memset(buf, 0x55, 4096);
    g_assert_cmpint(bs->drv->run_batch(bs, ops, 1), ==, 0);
    g_assert_cmpint(buf[99], ==, 3);
    g_assert_true(qb_buffer_is_zero(buf + 100, 3996));
    node_close(bs);
}

/* What padding has added goes, what others have written behind it stays. */
static void test_cut_padding(TestDir *t, gconstpointer root)
{
    make_file(t->file, 1024, 3);
    BlockDriverState *bs = node_open(&bdrv_file, t->file, RDWR, NULL, NULL);
    g_assert_cmpint(bs->drv->cut_padding(bs, 700, 1000), ==, 0);
    g_assert_cmpint(bs->drv->getlength(bs), ==, 1024);
    g_assert_cmpint(bs->drv->cut_padding(bs, 700, 1024), ==, 0);
    g_assert_cmpint(bs->drv->getlength(bs), ==, 700);
    g_assert_cmpint(atomic_load(&file_state(bs)->eof), ==, 700);
    node_close(bs);
}

static void truncate_ok(BlockDriverState *bs, int64_t length, PreallocMode prealloc)
{
    GError *err = NULL;
    g_assert_true(bs->drv->truncate(bs, length, true, prealloc, false, &err));
    g_assert_no_error(err);
    g_assert_cmpint(bs->drv->getlength(bs), ==, length);
    g_assert_cmpint(atomic_load(&file_state(bs)->eof), ==, length);
}

/* --- flush --- */

/* Puts something that cannot be synced in the place of the descriptor, or the saved one back. */
static void break_fd(BlockDriverState *bs, int *saved)
{
    int pipes[2], fd = file_state(bs)->fd;
    *saved = dup(fd);
    g_assert_cmpint(pipe(pipes), ==, 0);
    g_assert_cmpint(dup2(pipes[1], fd), ==, fd);
    close(pipes[0]);
    close(pipes[1]);
}

static void mend_fd(BlockDriverState *bs, int saved)
{
    int fd = file_state(bs)->fd;
    g_assert_cmpint(dup2(saved, fd), ==, fd);
    close(saved);
}

/* The kernel has dropped the pages: no later success is believed. */
static void test_flush_failure_sticks(TestDir *t, gconstpointer root)
{
    int saved;
    make_file(t->file, 4096, 1);
    BlockDriverState *bs = node_open_ok(t->file, RDWR);
    g_assert_cmpint(node_write(bs, 0, 512, 2, 0), ==, 0);
    break_fd(bs, &saved);
    g_assert_cmpint(bs->drv->flush(bs), ==, -EINVAL);
    mend_fd(bs, saved);
    g_assert_cmpint(bs->drv->flush(bs), ==, -EIO);
    g_assert_cmpint(node_write(bs, 0, 512, 2, 0), ==, 0);
    g_assert_cmpint(node_write(bs, 0, 512, 2, BDRV_REQ_FUA), ==, -EIO);
    char buf[512] = "";
    BdrvBatchOp ops[] = {
        {.kind = BDRV_BATCH_WRITE, .bytes = 512, .buf = buf},
        {.kind = BDRV_BATCH_WRITE, .offset = 512, .bytes = 512, .buf = buf, .flags = BDRV_REQ_FUA},
    };
    g_assert_cmpint(bs->drv->run_batch(bs, ops, 2), ==, -EIO);
    g_assert_cmpint(ops[0].ret, ==, 0);
    g_assert_cmpint(ops[1].ret, ==, -EIO);
    bs->cache_no_flush = true;
    g_assert_cmpint(bs->drv->flush(bs), ==, 0);
    g_assert_cmpint(node_write(bs, 0, 512, 2, BDRV_REQ_FUA), ==, 0);
    node_close(bs);
    bs = node_open_ok(t->file, RDWR);
    g_assert_cmpint(bs->drv->flush(bs), ==, 0);
    node_close(bs);
}

static void test_flush_failure_direct(TestDir *t, gconstpointer root)
{
    int saved;
    GError *err = NULL;
    make_file(t->file, 4096, 1);
    BlockDriverState *bs = node_open(&bdrv_file, t->file, DIRECT, NULL, &err);
    if (!bs) {
        g_test_skip(err->message);
        g_clear_error(&err);
        return;
    }
    g_assert_cmpint(node_write(bs, 0, 4096, 2, 0), ==, 0);
    break_fd(bs, &saved);
    g_assert_cmpint(bs->drv->flush(bs), ==, -EINVAL);
    mend_fd(bs, saved);
    g_assert_cmpint(bs->drv->flush(bs), ==, 0);
    node_close(bs);
}

/* Barriers so far. */
static uint64_t barriers(BlockDriverState *bs)
{
    return file_state(bs)->flush.started;
}

static void expect_barrier(BlockDriverState *bs, bool expected)
{
    uint64_t before = barriers(bs);
    g_assert_cmpint(bs->drv->flush(bs), ==, 0);
    g_assert_cmpuint(barriers(bs) - before, ==, expected ? 1 : 0);
}

static void map_and_end(BlockDriverState *bs, BdrvMapIntent intent)
{
    BdrvMapping m = {0};
    m.layer[0].req.type = intent == BDRV_MAP_WRITE ? BDRV_TRACKED_WRITE : BDRV_TRACKED_READ;
    g_assert_cmpint(bs->drv->map(bs, NULL, intent, 0, 4096, &m), ==, 0);
    g_assert_cmpint(bs->drv->map_done(bs, NULL, &m, 0), ==, 0);
}

/* Nothing is made stable twice. */
static void test_flush_only_changes(TestDir *t, gconstpointer root)
{
    char buf[512] = {0};
    BdrvBatchOp op = {.kind = BDRV_BATCH_READ, .bytes = sizeof(buf), .buf = buf};
    make_file(t->file, 8192, 1);
    BlockDriverState *bs = node_open_ok(t->file, RDWR);
    expect_barrier(bs, false);
    g_assert_cmpint(node_read_byte(bs, 0, 4096), ==, 1);
    map_and_end(bs, BDRV_MAP_READ);
    g_assert_cmpint(bs->drv->run_batch(bs, &op, 1), ==, 0);
    expect_barrier(bs, false);

    g_assert_cmpint(node_write(bs, 0, 512, 2, 0), ==, 0);
    expect_barrier(bs, true);
    expect_barrier(bs, false);
    g_assert_cmpint(bs->drv->pwrite_zeroes(bs, NULL, 0, 512, 0), ==, 0);
    expect_barrier(bs, true);
    op.kind = BDRV_BATCH_WRITE;
    g_assert_cmpint(bs->drv->run_batch(bs, &op, 1), ==, 0);
    expect_barrier(bs, true);
    map_and_end(bs, BDRV_MAP_WRITE);
    expect_barrier(bs, true);
    truncate_ok(bs, 4096, PREALLOC_MODE_OFF);
    expect_barrier(bs, true);
    g_assert_cmpint(node_write(bs, 0, 512, 2, BDRV_REQ_FUA), ==, 0);
    expect_barrier(bs, false);
    node_close(bs);
}

static void look(BlockDriverState *bs, int64_t offset, bool is_hole)
{
    BdrvStatus st;
    g_assert_cmpint(bs->drv->block_status(bs, offset, 4096, &st), ==, 0);
    g_assert_true(!!(st.flags & BDRV_BLOCK_ZERO) == is_hole);
}

/* Who was told of a hole may rely on it after a flush, whoever has made it. */
static void test_flush_holes_seen(TestDir *t, gconstpointer root)
{
    make_file(t->file, 64 * KIB, 1);
    BlockDriverState *bs = node_open_ok(t->file, RDWR);
    look(bs, 0, false);
    expect_barrier(bs, false);
    g_assert_cmpint(bs->drv->pdiscard(bs, NULL, 0, 32 * KIB), ==, 0);
    expect_barrier(bs, false);
    look(bs, 0, true);
    expect_barrier(bs, true);
    look(bs, 4096, true);
    expect_barrier(bs, false);
    node_close(bs);
    bs = node_open_ok(t->file, RDWR);
    look(bs, 0, true);
    expect_barrier(bs, true);
    node_close(bs);
}

enum { FLUSHERS = 8, FLUSHES = 50 };

static void *flush_often(void *opaque)
{
    BlockDriverState *bs = opaque;
    for (int i = 0; i < FLUSHES; i++) {
        g_assert_cmpint(node_write(bs, 0, 512, i, 0), ==, 0);
        g_assert_cmpint(bs->drv->flush(bs), ==, 0);
    }
    return NULL;
}

static void test_flush_shared(TestDir *t, gconstpointer root)
{
    pthread_t threads[FLUSHERS];
    make_file(t->file, 4096, 1);
    BlockDriverState *bs = node_open_ok(t->file, RDWR);
    for (int i = 0; i < FLUSHERS; i++) {
        g_assert_true(qb_thread_start(&threads[i], "flush", flush_often, bs));
    }
    for (int i = 0; i < FLUSHERS; i++) {
        pthread_join(threads[i], NULL);
    }
    const FileFlush *f = &file_state(bs)->flush;
    g_assert_cmpuint(f->started, ==, f->finished);
    g_assert_cmpuint(f->started, <=, FLUSHERS * FLUSHES);
    g_assert_cmpuint(f->started, >=, FLUSHES);
    node_close(bs);
}

/* --- zeroes, discard, status --- */

static bool reads_zero_after(BlockDriverState *bs, int64_t offset, int64_t bytes, int flags)
{
    int ret = bs->drv->pwrite_zeroes(bs, NULL, offset, bytes, flags);
    g_assert_true(ret == 0 || ret == -ENOTSUP);
    return ret == 0 && node_read_byte(bs, offset, bytes) == 0;
}

static void test_zero_inside(TestDir *t, gconstpointer root)
{
    make_file(t->file, 4 * MIB, 5);
    BlockDriverState *bs = node_open_ok(t->file, RDWR);
    int64_t before = file_blocks(t->file);
    if (!reads_zero_after(bs, MIB, MIB, BDRV_REQ_MAY_UNMAP)) {
        g_test_skip("holes are not supported here");
        node_close(bs);
        return;
    }
    g_assert_cmpint(file_blocks(t->file), <=, before - MIB);
    int64_t punched = file_blocks(t->file);
    g_assert_true(reads_zero_after(bs, 2 * MIB + 100, 5000, 0));
    g_assert_cmpint(file_blocks(t->file), >=, punched);
    g_assert_cmpint(node_read_byte(bs, 0, MIB), ==, 5);
    g_assert_cmpint(node_read_byte(bs, 2 * MIB, 100), ==, 5);
    g_assert_cmpint(node_read_byte(bs, 2 * MIB + 5100, 100), ==, 5);
    g_assert_cmpint(bs->drv->getlength(bs), ==, 4 * MIB);
    node_close(bs);
}

static void test_zero_beyond(TestDir *t, gconstpointer root)
{
    make_file(t->file, MIB, 5);
    BlockDriverState *bs = node_open_ok(t->file, RDWR);
    int64_t before = file_blocks(t->file);
    g_assert_true(reads_zero_after(bs, 8 * MIB, MIB, 0));
    g_assert_cmpint(bs->drv->getlength(bs), ==, 9 * MIB);
    g_assert_cmpint(file_blocks(t->file), ==, before);
    g_assert_true(reads_zero_after(bs, 8 * MIB + 512 * KIB, MIB, BDRV_REQ_MAY_UNMAP));
    g_assert_cmpint(bs->drv->getlength(bs), ==, 9 * MIB + 512 * KIB);
    g_assert_cmpint(node_read_byte(bs, 0, MIB), ==, 5);
    node_close(bs);
}

/* What is remembered as missing is not asked for again, and never an error of its own. */
static void test_zero_unsupported(TestDir *t, gconstpointer root)
{
    make_file(t->file, MIB, 5);
    BlockDriverState *bs = node_open_ok(t->file, RDWR);
    FileLacks *lacks = &file_state(bs)->lacks;
    atomic_store(&lacks->zero_range, true);
    bool punches = reads_zero_after(bs, 0, 4096, 0);
    atomic_store(&lacks->punch_hole, true);
    g_assert_cmpint(bs->drv->pwrite_zeroes(bs, NULL, 8192, 4096, 0), ==, -ENOTSUP);
    g_assert_cmpint(bs->drv->pwrite_zeroes(bs, NULL, 8192, 4096, BDRV_REQ_MAY_UNMAP), ==, -ENOTSUP);
    g_assert_cmpint(bs->drv->pdiscard(bs, NULL, 8192, 4096), ==, -ENOTSUP);
    g_assert_cmpint(node_read_byte(bs, 8192, 4096), ==, 5);
    atomic_store(&lacks->zero_range, false);
    reads_zero_after(bs, 8192, 4096, BDRV_REQ_MAY_UNMAP);
    g_test_message("zero range made of a punch and an allocation: %d", punches);
    node_close(bs);
}

static void test_discard(TestDir *t, gconstpointer root)
{
    make_file(t->file, 2 * MIB, 5);
    BlockDriverState *bs = node_open_ok(t->file, RDWR);
    int64_t before = file_blocks(t->file);
    int ret = bs->drv->pdiscard(bs, NULL, MIB, 8 * MIB);
    g_assert_true(ret == 0 || ret == -ENOTSUP);
    if (ret == 0) {
        g_assert_cmpint(file_blocks(t->file), <=, before - MIB);
    }
    g_assert_cmpint(bs->drv->getlength(bs), ==, 2 * MIB);
    g_assert_cmpint(bs->drv->pdiscard(bs, NULL, 4 * MIB, MIB), ==, 0);
    g_assert_cmpint(node_read_byte(bs, 0, MIB), ==, 5);
    node_close(bs);
}

static void expect_status(BlockDriverState *bs, int64_t offset, int64_t bytes, int kind,
                          int64_t length)
{
    BdrvStatus st = {0};
    g_assert_cmpint(bs->drv->block_status(bs, offset, bytes, &st), ==, 0);
    g_assert_cmpint(st.flags, ==, kind | BDRV_BLOCK_OFFSET_VALID | BDRV_BLOCK_ALLOCATED);
    g_assert_cmpint(st.bytes, ==, length);
    g_assert_cmpint(st.host_offset, ==, offset);
    g_assert_true(st.host_node == bs);
}

static void test_status(TestDir *t, gconstpointer root)
{
    make_file(t->file, 8 * MIB, 0);
    BlockDriverState *bs = node_open_ok(t->file, RDWR);
    g_assert_cmpint(node_write(bs, 2 * MIB, 2 * MIB, 1, 0), ==, 0);
    expect_status(bs, 0, 8 * MIB, BDRV_BLOCK_ZERO, 2 * MIB);
    expect_status(bs, MIB, 4096, BDRV_BLOCK_ZERO, 4096);
    expect_status(bs, 2 * MIB, 6 * MIB, BDRV_BLOCK_DATA, 2 * MIB);
    expect_status(bs, 3 * MIB, 5 * MIB, BDRV_BLOCK_DATA, MIB);
    expect_status(bs, 3 * MIB, 4096, BDRV_BLOCK_DATA, 4096);
    expect_status(bs, 4 * MIB, 4 * MIB, BDRV_BLOCK_ZERO, 4 * MIB);
    expect_status(bs, 8 * MIB, MIB, BDRV_BLOCK_ZERO, MIB);
    node_close(bs);
}

static void test_status_after_changes(TestDir *t, gconstpointer root)
{
    make_file(t->file, 8 * MIB, 1);
    BlockDriverState *bs = node_open_ok(t->file, RDWR);
    expect_status(bs, 0, 8 * MIB, BDRV_BLOCK_DATA, 8 * MIB);
    g_assert_cmpint(file_state(bs)->data.list[0].end, ==, 8 * MIB);
    if (bs->drv->pwrite_zeroes(bs, NULL, MIB, MIB, BDRV_REQ_MAY_UNMAP) == 0) {
        expect_status(bs, 0, 8 * MIB, BDRV_BLOCK_DATA, MIB);
        expect_status(bs, MIB, 7 * MIB, BDRV_BLOCK_ZERO, MIB);
        g_assert_cmpint(node_write(bs, MIB, 64 * KIB, 1, 0), ==, 0);
        expect_status(bs, MIB, 7 * MIB, BDRV_BLOCK_DATA, 64 * KIB);
    }
    GError *err = NULL;
    g_assert_true(bs->drv->truncate(bs, 3 * MIB, true, PREALLOC_MODE_OFF, false, &err));
    g_assert_true(bs->drv->truncate(bs, 8 * MIB, true, PREALLOC_MODE_OFF, false, &err));
    expect_status(bs, 3 * MIB, 5 * MIB, BDRV_BLOCK_ZERO, 5 * MIB);
    node_close(bs);
}

/* What is asked for from back to front is one remembered extent, which may begin earlier. */
static void test_status_backwards(TestDir *t, gconstpointer root)
{
    make_file(t->file, 8 * MIB, 1);
    BlockDriverState *bs = node_open_ok(t->file, RDWR);
    const FileDataCache *c = &file_state(bs)->data;
    for (int64_t at = 7 * MIB; at >= 0; at -= MIB) {
        expect_status(bs, at, MIB, BDRV_BLOCK_DATA, MIB);
        g_assert_cmpuint(c->n, ==, 1);
        g_assert_cmpint(c->list[0].start, <=, at);
        g_assert_cmpint(c->list[0].end, ==, 8 * MIB);
    }
    node_close(bs);
}

/* More extents than are remembered, in any order: the answers stay true. */
static void test_status_many(TestDir *t, gconstpointer root)
{
    enum { N = FILE_DATA_EXTENTS + 50, STEP = 128 * 1024 };
    make_file(t->file, (int64_t)(N + 1) * STEP, 0);
    BlockDriverState *bs = node_open_ok(t->file, RDWR);
    for (int64_t i = 0; i <= N; i++) {
        g_assert_cmpint(node_write(bs, i * STEP, STEP / 2, 1, 0), ==, 0);
    }
    for (int64_t i = 0; i < 3 * N; i++) {
        int64_t at = i * 101 % N * STEP;
        expect_status(bs, at, STEP, BDRV_BLOCK_DATA, STEP / 2);
        expect_status(bs, at + STEP / 2, STEP, BDRV_BLOCK_ZERO, STEP / 2);
        g_assert_cmpuint(file_state(bs)->data.n, <=, FILE_DATA_EXTENTS);
    }
    node_close(bs);
}

/* A walk asks once where a hole ends and once where the data behind it do; holes of our own are seen. */
static void test_status_walk(TestDir *t, gconstpointer root)
{
    make_file(t->file, 4 * MIB, 0);
    BlockDriverState *bs = node_open_ok(t->file, RDWR);
    g_assert_cmpint(node_write(bs, MIB, MIB, 1, 0), ==, 0);
    g_assert_cmpint(node_write(bs, 3 * MIB, MIB, 1, 0), ==, 0);
    expect_status(bs, 0, 4 * MIB, BDRV_BLOCK_ZERO, MIB);
    g_assert_cmpint(file_state(bs)->data.begins, ==, MIB);
    expect_status(bs, MIB, 3 * MIB, BDRV_BLOCK_DATA, MIB);
    expect_status(bs, 2 * MIB, 2 * MIB, BDRV_BLOCK_ZERO, MIB);
    g_assert_cmpint(file_state(bs)->data.begins, ==, 3 * MIB);
    if (bs->drv->pwrite_zeroes(bs, NULL, 3 * MIB, 512 * KIB, BDRV_REQ_MAY_UNMAP) == 0) {
        expect_status(bs, 3 * MIB, MIB, BDRV_BLOCK_ZERO, 512 * KIB);
    }
    node_close(bs);
}

/* Extents that end inside a unit: data is rounded up, a hole down, and a mixed unit is data. */
static void test_status_units(TestDir *t, gconstpointer root)
{
    make_file(t->file, 64 * KIB, 0);
    BlockDriverState *bs = node_open_ok(t->file, RDWR);
    g_assert_cmpint(node_write(bs, 16 * KIB, 4 * KIB, 1, 0), ==, 0);
    file_state(bs)->request_alignment = 32 * KIB;
    expect_status(bs, 0, 64 * KIB, BDRV_BLOCK_DATA, 32 * KIB);
    expect_status(bs, 32 * KIB, 32 * KIB, BDRV_BLOCK_ZERO, 32 * KIB);
    node_close(bs);
}

/* --- growth under concurrency --- */

enum { GROW_STEPS = 400, GROW_PIECE = 512 };

static void *grow_by_writes(void *opaque)
{
    BlockDriverState *bs = opaque;
    for (int64_t i = 0; i < GROW_STEPS; i++) {
        g_assert_cmpint(node_write(bs, (2 * i + 1) * GROW_PIECE, GROW_PIECE, 1 + (int)(i & 63), 0),
                        ==, 0);
    }
    return NULL;
}

static void *grow_by_zeroes(void *opaque)
{
    BlockDriverState *bs = opaque;
    for (int64_t i = 0; i < GROW_STEPS; i++) {
        int ret = bs->drv->pwrite_zeroes(bs, NULL, 2 * i * GROW_PIECE, GROW_PIECE, 0);
        g_assert_true(ret == 0 || ret == -ENOTSUP);
    }
    return NULL;
}

/* Growth by ftruncate() must never cut off a write that grew the file at the same time. */
static void test_grow_race(TestDir *t, gconstpointer root)
{
    pthread_t writer, zeroer;
    make_file(t->file, 0, 0);
    BlockDriverState *bs = node_open_ok(t->file, RDWR);
    g_assert_true(qb_thread_start(&writer, "write", grow_by_writes, bs));
    g_assert_true(qb_thread_start(&zeroer, "zero", grow_by_zeroes, bs));
    pthread_join(writer, NULL);
    pthread_join(zeroer, NULL);
    g_assert_cmpint(bs->drv->getlength(bs), ==, 2 * GROW_STEPS * GROW_PIECE);
    for (int64_t i = 0; i < GROW_STEPS; i++) {
        g_assert_cmpint(node_read_byte(bs, (2 * i + 1) * GROW_PIECE, GROW_PIECE), ==,
                        1 + (int)(i & 63));
    }
    node_close(bs);
}

/* --- truncate --- */

static void expect_truncate_error(BlockDriverState *bs, int64_t length, PreallocMode prealloc,
                                  const char *text)
{
    GError *err = NULL;
    int64_t before = bs->drv->getlength(bs);
    g_assert_false(bs->drv->truncate(bs, length, true, prealloc, false, &err));
    g_assert_nonnull(err);
    g_assert_cmpstr(err->message, ==, text);
    g_clear_error(&err);
    g_assert_cmpint(bs->drv->getlength(bs), ==, before);
}

static void test_truncate(TestDir *t, gconstpointer root)
{
    make_file(t->file, 1000, 6);
    BlockDriverState *bs = node_open_ok(t->file, RDWR);
    truncate_ok(bs, 3000, PREALLOC_MODE_OFF);
    g_assert_cmpint(node_read_byte(bs, 1000, 2000), ==, 0);
    int64_t before = bs->drv->get_allocated_file_size(bs);
    truncate_ok(bs, 3000 + 2 * MIB, PREALLOC_MODE_FALLOC);
    g_assert_cmpint(bs->drv->get_allocated_file_size(bs), >=, before + 2 * MIB - 8192);
    before = bs->drv->get_allocated_file_size(bs);
    truncate_ok(bs, 3000 + 4 * MIB + 77, PREALLOC_MODE_FULL);
    g_assert_cmpint(bs->drv->get_allocated_file_size(bs), >=, before + 2 * MIB - 8192);
    g_assert_cmpint(node_read_byte(bs, 1000, 4 * MIB), ==, 0);
    g_assert_cmpint(node_read_byte(bs, 0, 1000), ==, 6);
    truncate_ok(bs, 500, PREALLOC_MODE_OFF);
    truncate_ok(bs, 1000, PREALLOC_MODE_OFF);
    g_assert_cmpint(node_read_byte(bs, 500, 500), ==, 0);
    expect_truncate_error(bs, 2000, PREALLOC_MODE_METADATA,
                          "Unsupported preallocation mode: metadata");
    expect_truncate_error(bs, 100, PREALLOC_MODE_FALLOC,
                          "Cannot use preallocation for shrinking files");
    node_close(bs);
}

/* The barrier of a preallocation is one of the node's: it does not succeed after one has failed. */
static void test_truncate_after_lost_data(TestDir *t, gconstpointer root)
{
    make_file(t->file, 1000, 6);
    BlockDriverState *bs = node_open_ok(t->file, RDWR);
    file_state(bs)->flush.broken = true;
    expect_truncate_error(bs, 100000, PREALLOC_MODE_FULL,
                          "Could not write zeros for preallocation: Input/output error");
    node_close(bs);
}

static void test_truncate_direct_full(TestDir *t, gconstpointer root)
{
    GError *err = NULL;
    make_file(t->file, 1000, 6);
    BlockDriverState *bs = node_open(&bdrv_file, t->file, DIRECT, NULL, &err);
    if (!bs) {
        g_test_skip(err->message);
        g_clear_error(&err);
        return;
    }
    truncate_ok(bs, 10001, PREALLOC_MODE_FULL);
    g_assert_cmpint(node_read_byte(bs, 4096, 8192), ==, 0);
    node_close(bs);
    bs = node_open_ok(t->file, RDWR);
    g_assert_cmpint(node_read_byte(bs, 0, 1000), ==, 6);
    g_assert_cmpint(node_read_byte(bs, 1000, 9001), ==, 0);
    node_close(bs);
}

/* Runs with files of at most @bytes bytes. */
static void limit_file_size(rlim_t bytes)
{
    struct rlimit limit;
    getrlimit(RLIMIT_FSIZE, &limit);
    limit.rlim_cur = bytes;
    g_assert_cmpint(setrlimit(RLIMIT_FSIZE, &limit), ==, 0);
}

static void test_file_size_limit(TestDir *t, gconstpointer root)
{
    make_file(t->file, MIB, 6);
    BlockDriverState *bs = node_open_ok(t->file, RDWR);
    limit_file_size(2 * MIB);
    expect_truncate_error(bs, 4 * MIB, PREALLOC_MODE_OFF, "Could not resize file: File too large");
    g_assert_cmpint(node_write(bs, 3 * MIB, 512, 1, 0), ==, -EFBIG);
    g_assert_cmpint(bs->drv->pwrite_zeroes(bs, NULL, 3 * MIB, 512, 0), ==, -EFBIG);
    limit_file_size(RLIM_INFINITY);
    g_assert_cmpint(bs->drv->getlength(bs), ==, MIB);
    g_assert_cmpint(node_read_byte(bs, 0, MIB), ==, 6);
    node_close(bs);
}

/* A full file system: errors, the old length, the old content. */
static void test_no_space(TestDir *t, gconstpointer root)
{
    if (!mount_small(t->dir, "1M")) {
        g_test_skip("mounting is not allowed");
        return;
    }
    make_file(t->file, 256 * KIB, 6);
    BlockDriverState *bs = node_open_ok(t->file, RDWR);
    expect_truncate_error(bs, 4 * MIB, PREALLOC_MODE_FALLOC,
                          "Could not preallocate data for the new file: No space left on device");
    expect_truncate_error(bs, 4 * MIB, PREALLOC_MODE_FULL,
                          "Could not write zeros for preallocation: No space left on device");
    g_assert_cmpint(node_write(bs, 256 * KIB, 4 * MIB, 1, 0), ==, -ENOSPC);
    g_assert_cmpint(node_write(bs, 256 * KIB, 4 * MIB, 1, BDRV_REQ_FUA), ==, -ENOSPC);
    g_assert_cmpint(node_read_byte(bs, 0, 256 * KIB), ==, 6);
    g_assert_cmpint(bs->drv->flush(bs), ==, 0);
    node_close(bs);
    g_remove(t->file);
    g_assert_cmpint(umount(t->dir), ==, 0);
}

/* --- batches, copies, the fast lane --- */

static void test_batch(TestDir *t, gconstpointer root)
{
    static const char *const modes[] = {"aio=threads", "aio=io_uring"};
    for (unsigned m = 0; m < G_N_ELEMENTS(modes); m++) {
        GError *err = NULL;
        char a[4096], b[4096], c[8192];
        make_file(t->file, 64 * KIB, 2);
        BlockDriverState *bs = node_open(&bdrv_file, t->file, RDWR, modes[m], &err);
        g_assert_no_error(err);
        memset(a, 7, sizeof(a));
        memset(b, 8, sizeof(b));
        BdrvBatchOp ops[] = {
            {.kind = BDRV_BATCH_WRITE, .offset = 100, .bytes = 4096, .buf = a},
            {.kind = BDRV_BATCH_READ, .offset = 60 * KIB, .bytes = 8192, .buf = c},
            {.kind = BDRV_BATCH_ZERO, .offset = 16 * KIB, .bytes = 4096},
            {.kind = BDRV_BATCH_WRITE, .offset = 128 * KIB, .bytes = 4096, .buf = b,
             .flags = BDRV_REQ_FUA},
            {.kind = BDRV_BATCH_DISCARD, .offset = 32 * KIB, .bytes = 4096},
        };
        int ret = bs->drv->run_batch(bs, ops, G_N_ELEMENTS(ops));
        g_assert_true(ret == 0 || ret == -ENOTSUP);
        g_assert_cmpint(ops[0].ret, ==, 0);
        g_assert_cmpint(ops[1].ret, ==, 0);
        g_assert_cmpint(ops[3].ret, ==, 0);
        g_assert_cmpint(c[4095], ==, 2);
        g_assert_true(qb_buffer_is_zero(c + 4096, 4096) || c[4096] == 0);
        g_assert_cmpint(node_read_byte(bs, 100, 4096), ==, 7);
        g_assert_cmpint(node_read_byte(bs, 16 * KIB, 4096), ==, ops[2].ret ? 2 : 0);
        g_assert_cmpint(node_read_byte(bs, 128 * KIB, 4096), ==, 8);
        g_assert_cmpint(bs->drv->getlength(bs), ==, 132 * KIB);
        node_close(bs);
    }
}

static void test_batch_error(TestDir *t, gconstpointer root)
{
    char buf[512] = "";
    make_file(t->file, 4096, 2);
    BlockDriverState *bs = node_open_ok(t->file, RDONLY);
    BdrvBatchOp ops[] = {
        {.kind = BDRV_BATCH_READ, .bytes = 512, .buf = buf},
        {.kind = BDRV_BATCH_WRITE, .offset = 512, .bytes = 512, .buf = buf, .flags = BDRV_REQ_FUA},
        {.kind = BDRV_BATCH_READ, .offset = 1024, .bytes = 512, .buf = buf},
    };
    g_assert_cmpint(bs->drv->run_batch(bs, ops, 3), ==, -EBADF);
    g_assert_cmpint(ops[0].ret, ==, 0);
    g_assert_cmpint(ops[1].ret, ==, -EBADF);
    g_assert_cmpint(ops[2].ret, ==, 0);
    node_close(bs);
}

static void test_map(TestDir *t, gconstpointer root)
{
    make_file(t->file, MIB, 2);
    BlockDriverState *bs = node_open_ok(t->file, RDWR);
    BdrvMapping m = {0};
    g_assert_cmpint(bs->drv->map(bs, NULL, BDRV_MAP_WRITE, 1000, 4096, &m), ==, 0);
    g_assert_cmpuint(m.n, ==, 1);
    g_assert_cmpint(m.ext[0].fd, ==, file_state(bs)->fd);
    g_assert_cmpint(m.ext[0].host_offset, ==, 1000);
    g_assert_cmpint(m.ext[0].bytes, ==, 4096);
    g_assert_cmpint(m.bytes, ==, 4096);
    g_assert_cmpint(bs->drv->map_done(bs, NULL, &m, -EIO), ==, -EIO);
    g_assert_cmpint(bs->drv->map(bs, NULL, BDRV_MAP_READ, MIB - 512, 1024, &m), ==, -EAGAIN);
    g_assert_cmpint(node_write(bs, MIB, 512, 1, 0), ==, 0);
    g_assert_cmpint(bs->drv->map(bs, NULL, BDRV_MAP_READ, MIB - 512, 1024, &m), ==, 0);
    node_close(bs);
    bs = node_open_ok(t->file, RDONLY);
    g_assert_cmpint(bs->drv->map(bs, NULL, BDRV_MAP_WRITE, 0, 512, &m), ==, -EAGAIN);
    node_close(bs);
}

/* --- create --- */

static bool create(const char *path, const char *opts, GError **errp)
{
    g_autoptr(json_t) options = qb_opts_parse(opts, NULL, NULL);
    bool ok = bdrv_file.create(path, options, NULL, errp);
    g_assert_true(!ok || json_object_size(options) == 0);
    return ok;
}

static void expect_create_error(const char *path, const char *opts, const char *text)
{
    GError *err = NULL;
    g_assert_false(create(path, opts, &err));
    g_assert_nonnull(err);
    g_assert_cmpstr(err->message, ==, text);
    g_clear_error(&err);
}

static void test_create(TestDir *t, gconstpointer root)
{
    GError *err = NULL;
    g_autofree char *prefixed = g_strconcat("file:", t->file, NULL);
    g_assert_true(create(prefixed, "size=3M", &err));
    g_assert_cmpint(file_size(t->file), ==, 3 * MIB);
    g_assert_cmpint(file_blocks(t->file), <, MIB);
    g_assert_true(create(t->file, "size=2M,preallocation=falloc,nocow=on", &err));
    g_assert_cmpint(file_blocks(t->file), >=, 2 * MIB);
    g_assert_true(create(t->file, "size=1000000,preallocation=full", &err));
    g_assert_cmpint(file_size(t->file), ==, 1000000);
    g_assert_cmpint(file_blocks(t->file), >=, 999424);
    g_assert_true(create(t->file, "size=0,extent_size_hint=0", &err));
    g_assert_cmpint(file_size(t->file), ==, 0);
    g_assert_no_error(err);
}

static void test_create_errors(TestDir *t, gconstpointer root)
{
    g_autofree char *is_dir = g_strdup_printf("Could not create '%s': Is a directory", t->dir);
    g_autofree char *no_dir = g_strdup_printf(
        "Could not create '%s/x/y': No such file or directory", t->dir);
    g_autofree char *deep = g_strdup_printf("%s/x/y", t->dir);
    expect_create_error(t->dir, "size=1M", is_dir);
    expect_create_error(deep, "size=1M", no_dir);
    expect_create_error(t->file, "size=1M,preallocation=metadata",
                        "Unsupported preallocation mode: metadata");
    expect_create_error(t->file, "size=1M,preallocation=some",
                        "Parameter 'preallocation' does not accept value 'some'");
    expect_create_error(t->file, "extent_size_hint=8G", "Extent size hint is too large");
    expect_create_error("/dev/null", "size=1M",
                        "'file' driver requires '/dev/null' to be a regular file");
    g_assert_cmpint(file_size(t->file), ==, -1);
}

/* A file that was there survives a failing create with its content; a new one is removed. */
static void test_create_failure_keeps(TestDir *t, gconstpointer root)
{
    limit_file_size(4 * MIB);
    expect_create_error(t->file, "size=8M", "Could not resize file: File too large");
    g_assert_cmpint(file_size(t->file), ==, -1);
    make_file(t->file, 4096, 6);
    expect_create_error(t->file, "size=8M", "Could not resize file: File too large");
    expect_create_error(t->file, "size=8M,preallocation=full",
                        "Could not resize file: File too large");
    limit_file_size(RLIM_INFINITY);
    BlockDriverState *bs = node_open_ok(t->file, RDONLY);
    g_assert_cmpint(bs->drv->getlength(bs), ==, 4096);
    g_assert_cmpint(node_read_byte(bs, 0, 4096), ==, 6);
    node_close(bs);
}

static void test_create_no_space(TestDir *t, gconstpointer root)
{
    if (!mount_small(t->dir, "1M")) {
        g_test_skip("mounting is not allowed");
        return;
    }
    expect_create_error(t->file, "size=4M,preallocation=falloc",
                        "Could not preallocate data for the new file: No space left on device");
    g_assert_cmpint(file_size(t->file), ==, -1);
    make_file(t->file, 4096, 6);
    expect_create_error(t->file, "size=4M,preallocation=full",
                        "Could not write zeros for preallocation: No space left on device");
    g_assert_cmpint(file_size(t->file), >=, 0);
    g_remove(t->file);
    g_assert_cmpint(umount(t->dir), ==, 0);
}

static void test_create_options_help(void)
{
    g_autofree char *text = qb_opts_describe(bdrv_file.create_opts);
    g_assert_cmpstr(
        text, ==,
        "  extent_size_hint=<size> - Extent size hint for the image file, 0 to disable\n"
        "  nocow=<bool (on/off)>  - Turn off copy-on-write (valid only on btrfs)\n"
        "  preallocation=<str>    - Preallocation mode (allowed values: off, falloc, full)\n"
        "  size=<size>            - Virtual disk size\n");
}

static void add(const char *name, void (*fn)(TestDir *, gconstpointer))
{
    static const char *const roots[] = {"/tmp", "/dev/shm"};
    for (unsigned i = 0; i < G_N_ELEMENTS(roots); i++) {
        if (access(roots[i], W_OK) == 0) {
            g_autofree char *path = g_strdup_printf("/file/%s%s", name, roots[i]);
            g_test_add(path, TestDir, roots[i], test_dir_setup, fn, test_dir_teardown);
        }
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    signal(SIGXFSZ, SIG_IGN);
    g_test_add_func("/file/parse-filename", test_parse_filename);
    g_test_add_func("/file/create-options-help", test_create_options_help);
    add("open-wrong-thing", test_open_wrong_thing);
    add("open-options", test_open_options);
    add("open-refused", test_open_refused);
    add("read-write", test_read_write);
    add("vector-part", test_vector_part);
    add("read-only-write", test_read_only_write);
    add("direct", test_direct);
    add("direct-tail", test_direct_tail);
    add("cut-padding", test_cut_padding);
    add("flush-failure-sticks", test_flush_failure_sticks);
    add("flush-failure-direct", test_flush_failure_direct);
    add("flush-only-changes", test_flush_only_changes);
    add("flush-holes-seen", test_flush_holes_seen);
    add("flush-shared", test_flush_shared);
    add("zero-inside", test_zero_inside);
    add("zero-beyond", test_zero_beyond);
    add("zero-unsupported", test_zero_unsupported);
    add("discard", test_discard);
    add("status", test_status);
    add("status-after-changes", test_status_after_changes);
    add("status-backwards", test_status_backwards);
    add("status-many-extents", test_status_many);
    add("status-walk", test_status_walk);
    add("status-units", test_status_units);
    add("grow-race", test_grow_race);
    add("truncate", test_truncate);
    add("truncate-after-lost-data", test_truncate_after_lost_data);
    add("truncate-direct-full", test_truncate_direct_full);
    add("file-size-limit", test_file_size_limit);
    add("no-space", test_no_space);
    add("batch", test_batch);
    add("batch-error", test_batch_error);
    add("map", test_map);
    add("create", test_create);
    add("create-errors", test_create_errors);
    add("create-failure-keeps", test_create_failure_keeps);
    add("create-no-space", test_create_no_space);
    return g_test_run();
}
