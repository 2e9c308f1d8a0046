/*
 * Queues: where requests go, their order, errors, flushes that are shared, drains and changes of the
 * graph meanwhile, direct and cold files, and systems without io_uring.
 *
 * SPDX-License-Identifier: MIT
 */
#include "qcow2-image.h"
#include "block/locks.h"
#include "block/queue.h"
#include "util/thread.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>

enum { DEPTH = 16, BLOCK = 4 * KIB };

/* --- one request --- */

typedef struct Result {
    unsigned calls;
    int ret;
} Result;

static void note(void *opaque, int ret)
{
    Result *r = opaque;
    r->calls++;
    r->ret = ret;
}

static BlkQueueRequest request(BlkOp op, int64_t offset, int64_t bytes, IoVector *qiov,
                               Result *result)
{
    *result = (Result){0};
    return (BlkQueueRequest){
        .op = op, .offset = offset, .bytes = bytes, .qiov = qiov, .done = note, .opaque = result,
    };
}

static void collect_all(BlkQueue *q)
{
    while (blk_queue_pending(q) > 0) {
        g_assert_cmpuint(blk_queue_wait(q), >, 0);
    }
    g_assert_cmpuint(blk_queue_wait(q), ==, 0);
}

static int run_one(BlkQueue *q, BlkOp op, int64_t offset, int64_t bytes, void *buf, int flags)
{
    Result result;
    IoVector qiov;
    iov_vector_init_buf(&qiov, buf, buf ? (size_t)bytes : 0);
    BlkQueueRequest req = request(op, offset, bytes, &qiov, &result);
    req.flags = flags;
    blk_queue_submit(q, &req);
    g_assert_cmpuint(result.calls, ==, 0); /* only in poll and wait */
    collect_all(q);
    g_assert_cmpuint(result.calls, ==, 1);
    return result.ret;
}

static void expect_by_queue(BlkQueue *q, int64_t offset, int64_t bytes, int value)
{
    QB_AUTO_FREE uint8_t *buf = qb_try_memalign(4096, (size_t)bytes);
    memset(buf, ~value, (size_t)bytes);
    g_assert_cmpint(run_one(q, BLK_OP_READ, offset, bytes, buf, 0), ==, 0);
    for (int64_t i = 0; i < bytes; i++) {
        g_assert_cmphex(buf[i], ==, (uint8_t)value);
    }
}

static int write_by_queue(BlkQueue *q, int64_t offset, int64_t bytes, int value, int flags)
{
    QB_AUTO_FREE uint8_t *buf = qb_try_memalign(4096, (size_t)bytes);
    memset(buf, value, (size_t)bytes);
    return run_one(q, BLK_OP_WRITE, offset, bytes, buf, flags);
}

/* --- where requests go --- */

static void test_at_once(void)
{
    image_create("a", "size=1M");
    g_autoptr(BlockBackend) blk = image_open_rw("a");
    image_write(blk, 0, 256 * KIB, 1);
    BlkQueue *q = blk_queue_new(blk);
    expect_by_queue(q, 8 * KIB, BLOCK, 1);
    expect_by_queue(q, 512 * KIB, BLOCK, 0);                     /* not allocated */
    expect_by_queue(q, 192 * KIB, 64 * KIB, 1);
    g_assert_cmpint(write_by_queue(q, 64 * KIB, BLOCK, 2, 0), ==, 0); /* in place */
    expect_by_queue(q, 64 * KIB, BLOCK, 2);
    BlkQueueStats stats = blk_queue_stats(q);
    g_assert_cmpuint(stats.at_once, ==, 5);
    g_assert_cmpuint(stats.lane + stats.workers + stats.flushes, ==, 0);
    blk_queue_free(q);
    image_expect(blk, 64 * KIB, BLOCK, 2);
    image_expect(blk, 68 * KIB, 60 * KIB, 1);
}

/* Whole clusters that nothing refers to yet: linked when they are written, given back when not. */
static void test_fresh(gconstpointer create_opts)
{
    image_create("n", create_opts);
    g_autoptr(BlockBackend) blk = image_open_rw("n");
    image_write(blk, 0, 64 * KIB, 1); /* makes the table */
    BlkQueue *q = blk_queue_new(blk);
    g_assert_cmpint(write_by_queue(q, 64 * KIB, 64 * KIB, 2, 0), ==, 0);
    g_assert_cmpint(write_by_queue(q, 256 * KIB, 128 * KIB, 3, BDRV_REQ_FUA), ==, 0);
    g_assert_cmpuint(blk_queue_stats(q).workers, ==, 0);
    g_assert_cmpint(run_one(q, BLK_OP_ZERO, 512 * KIB, 64 * KIB, NULL, 0), ==, 0);
    g_assert_cmpint(write_by_queue(q, 512 * KIB, 64 * KIB, 4, 0), ==, 0);
    g_assert_cmpuint(blk_queue_stats(q).workers, ==, 1);
    expect_by_queue(q, 64 * KIB, 64 * KIB, 2);
    expect_by_queue(q, 128 * KIB, 128 * KIB, 0);
    expect_by_queue(q, 256 * KIB, 128 * KIB, 3);
    expect_by_queue(q, 512 * KIB, 64 * KIB, 4);
    blk_queue_free(q);
    g_clear_pointer(&blk, blk_unref);
    image_check("n");
    blk = image_open("n", NULL, 0);
    image_expect(blk, 64 * KIB, 64 * KIB, 2);
    image_expect(blk, 512 * KIB, 64 * KIB, 4);
}

/* The dirty bit is on the disk before anything is allocated: a worker puts it there. */
static void test_fresh_lazy(void)
{
    image_create("l", "size=1M,lazy_refcounts=on");
    BlockBackend *first = image_open_rw("l");
    image_write(first, 0, 64 * KIB, 1); /* makes the table */
    blk_unref(first);
    g_autoptr(BlockBackend) blk = image_open_rw("l");
    image_expect(blk, 0, 64 * KIB, 1);
    BlkQueue *q = blk_queue_new(blk);
    g_assert_cmpint(write_by_queue(q, 64 * KIB, 64 * KIB, 2, 0), ==, 0);
    g_assert_cmpuint(blk_queue_stats(q).workers, ==, 1);
    g_assert_cmpint(write_by_queue(q, 128 * KIB, 64 * KIB, 3, 0), ==, 0);
    g_assert_cmpuint(blk_queue_stats(q).workers, ==, 1);
    blk_queue_free(q);
    g_clear_pointer(&blk, blk_unref);
    image_check("l");
}

/* The mapping of a write that did not happen leaves nothing behind. */
static void test_fresh_undone(void)
{
    image_create("u", "size=1M");
    g_autoptr(BlockBackend) blk = image_open_rw("u");
    image_write(blk, 0, 64 * KIB, 1);
    for (int i = 0; i < 3; i++) {
        BdrvMapping map = {0};
        BDRV_GRAPH_GUARD();
        g_assert_cmpint(bdrv_map(blk_root(blk), NULL, BDRV_MAP_WRITE, 64 * KIB, 64 * KIB, &map), ==,
                        0);
        g_assert_cmpint(map.bytes, ==, 64 * KIB);
        g_assert_cmpint(bdrv_map_done(NULL, &map, -EIO), ==, -EIO);
    }
    image_expect(blk, 64 * KIB, 64 * KIB, 0);
    g_clear_pointer(&blk, blk_unref);
    image_check("u");
}

/* A vector of odd pieces over runs that lie apart in the file. */
static void test_scattered(void)
{
    image_create("s", "size=1M,cluster_size=4k");
    g_autoptr(BlockBackend) blk = image_open_rw("s");
    for (int i = 15; i >= 0; i--) {
        image_write(blk, i * BLOCK, BLOCK, i + 1);
    }
    g_autofree uint8_t *buf = g_malloc0(16 * BLOCK);
    IOV_VECTOR_AUTO qiov;
    iov_vector_init(&qiov, 0);
    for (size_t pos = 0, len = 1000; pos < 16 * BLOCK; pos += len) {
        len = MIN(1000, 16 * BLOCK - pos);
        iov_vector_add(&qiov, buf + pos, len);
    }
    BlkQueue *q = blk_queue_new(blk);
    Result result;
    BlkQueueRequest req = request(BLK_OP_READ, 0, 16 * BLOCK, &qiov, &result);
    blk_queue_submit(q, &req);
    collect_all(q);
    g_assert_cmpint(result.ret, ==, 0);
    for (int i = 0; i < 16 * BLOCK; i++) {
        g_assert_cmpint(buf[i], ==, i / BLOCK + 1);
    }
    memset(buf, 99, 16 * BLOCK); /* as one: a worker has it */
    req.op = BLK_OP_WRITE;
    blk_queue_submit(q, &req);
    collect_all(q);
    blk_queue_free(q);
    image_expect(blk, 0, 16 * BLOCK, 99);
}

static void test_workers(void)
{
    image_create("w", "size=1M");
    g_autoptr(BlockBackend) blk = image_open_rw("w");
    BlkQueue *q = blk_queue_new(blk);
    g_assert_cmpint(write_by_queue(q, 1000, 3000, 7, 0), ==, 0);
    g_assert_cmpint(run_one(q, BLK_OP_ZERO, 2000, 1000, NULL, 0), ==, 0);
    g_assert_cmpint(run_one(q, BLK_OP_DISCARD, 64 * KIB, 64 * KIB, NULL, 0), ==, 0);
    g_assert_cmpuint(blk_queue_stats(q).workers, ==, 3);
    expect_by_queue(q, 1000, 1000, 7);
    expect_by_queue(q, 2000, 1000, 0);
    expect_by_queue(q, 3000, 1000, 7);
    blk_queue_free(q);
}

static void test_errors(void)
{
    image_create("e", "size=1M");
    g_autoptr(BlockBackend) ro = image_open("e", NULL, 0);
    BlkQueue *q = blk_queue_new(ro);
    uint8_t buf[512] = {0};
    g_assert_cmpint(run_one(q, BLK_OP_READ, MIB - 256, 512, buf, 0), ==, -EIO);
    g_assert_cmpint(run_one(q, BLK_OP_READ, -512, 512, buf, 0), ==, -EIO);
    g_assert_cmpint(run_one(q, BLK_OP_WRITE, 0, 512, buf, 0), ==, -EPERM);
    g_assert_cmpint(run_one(q, BLK_OP_ZERO, 0, 512, NULL, 0), ==, -EPERM);
    g_assert_cmpint(run_one(q, BLK_OP_READ, 0, 0, buf, 0), ==, 0);
    blk_queue_free(q);
    g_clear_pointer(&ro, blk_unref);
    g_autoptr(BlockBackend) bad =
        image_open_debug("e", "file.inject-error.0.event=write_aio,file.inject-error.0.errno=28");
    q = blk_queue_new(bad);
    g_assert_cmpint(write_by_queue(q, 0, BLOCK, 1, 0), ==, -ENOSPC);
    blk_queue_free(q);
}

/* --- flushes --- */

static void test_shared_flush(void)
{
    image_create("f", "size=1M");
    g_autoptr(BlockBackend) blk = image_open_rw("f");
    image_write(blk, 0, 256 * KIB, 1);
    BlkQueue *q = blk_queue_new(blk);
    QB_AUTO_FREE uint8_t *buf = qb_try_memalign(4096, BLOCK);
    memset(buf, 5, BLOCK);
    IoVector qiov;
    iov_vector_init_buf(&qiov, buf, BLOCK);
    Result results[DEPTH];
    for (int i = 0; i < DEPTH; i++) {
        BlkQueueRequest req = request(BLK_OP_WRITE, i * BLOCK, BLOCK, &qiov, &results[i]);
        req.flags = BDRV_REQ_FUA;
        blk_queue_submit(q, &req);
    }
    collect_all(q);
    for (int i = 0; i < DEPTH; i++) {
        g_assert_cmpint(results[i].ret, ==, 0);
    }
    g_assert_cmpuint(blk_queue_stats(q).flushes, ==, 1);
    g_assert_cmpint(run_one(q, BLK_OP_FLUSH, 0, 0, NULL, 0), ==, 0);
    blk_set_write_cache(blk, false);
    g_assert_cmpint(write_by_queue(q, 0, BLOCK, 6, 0), ==, 0);
    g_assert_cmpuint(blk_queue_stats(q).flushes, ==, 3);
    blk_queue_free(q);
}

static void test_failed_flush(void)
{
    image_create("ff", "size=1M");
    g_autoptr(BlockBackend) blk = image_open_debug(
        "ff", "file.inject-error.0.event=flush_to_disk,file.inject-error.0.errno=5");
    BlkQueue *q = blk_queue_new(blk);
    g_assert_cmpint(write_by_queue(q, 0, BLOCK, 1, BDRV_REQ_FUA), ==, -EIO);
    g_assert_cmpint(run_one(q, BLK_OP_FLUSH, 0, 0, NULL, 0), ==, -EIO);
    blk_queue_free(q);
}

/* --- order --- */

typedef struct Writer {
    uint8_t *buf;
    IoVector qiov;
    bool busy;
} Writer;

static void writer_done(void *opaque, int ret)
{
    Writer *w = opaque;
    g_assert_cmpint(ret, ==, 0);
    w->busy = false;
}

static Writer *idle_writer(BlkQueue *q, Writer *writers)
{
    for (;;) {
        for (int i = 0; i < DEPTH; i++) {
            if (!writers[i].busy) {
                return &writers[i];
            }
        }
        (void)blk_queue_wait(q);
    }
}

/* Overlapping writes at random, many at once, while @oracle takes them one after the other. */
static void write_at_random(BlkQueue *q, int64_t base, uint8_t *oracle, int n, GRand *rand)
{
    Writer writers[DEPTH] = {0};
    for (int i = 0; i < DEPTH; i++) {
        writers[i].buf = qb_try_memalign(4096, 8 * BLOCK);
    }
    for (int i = 0; i < n; i++) {
        Writer *w = idle_writer(q, writers);
        int first = g_rand_int_range(rand, 0, 56), blocks = g_rand_int_range(rand, 1, 9);
        size_t len = (size_t)blocks * BLOCK;
        bool fua = g_rand_int_range(rand, 0, 8) == 0;
        memset(w->buf, i, len);
        memset(oracle + first * BLOCK, i, len);
        iov_vector_init_buf(&w->qiov, w->buf, len);
        w->busy = true;
        blk_queue_submit(q, &(BlkQueueRequest){
            .op = BLK_OP_WRITE, .offset = base + first * BLOCK, .bytes = (int64_t)len,
            .flags = fua ? BDRV_REQ_FUA : 0, .qiov = &w->qiov, .done = writer_done, .opaque = w});
    }
    collect_all(q);
    for (int i = 0; i < DEPTH; i++) {
        free(writers[i].buf);
    }
}

static void expect_oracle(BlockBackend *blk, int64_t base, const uint8_t *oracle)
{
    QB_AUTO_FREE uint8_t *buf = qb_try_memalign(4096, 64 * BLOCK);
    g_assert_cmpint(blk_pread(blk, base, 64 * BLOCK, buf, 0), ==, 0);
    for (int i = 0; i < 64 * BLOCK; i++) {
        if (buf[i] != oracle[i]) {
            g_error("byte %d is 0x%02x, not 0x%02x", i, buf[i], oracle[i]);
        }
    }
}

static void test_order(gconstpointer opts)
{
    g_autoptr(GRand) rand = g_rand_new_with_seed(g_test_rand_int_range(0, INT32_MAX));
    image_create("o", "size=1M,cluster_size=16k");
    g_autoptr(BlockBackend) blk = image_open("o", opts, BDRV_O_RDWR);
    BlkQueue *q = blk_queue_new(blk);
    g_autofree uint8_t *oracle = g_malloc0(64 * BLOCK);
    write_at_random(q, 0, oracle, 300, rand);
    expect_oracle(blk, 0, oracle);
    blk_queue_free(q);
    g_clear_pointer(&blk, blk_unref);
    image_check("o");
    blk = image_open("o", NULL, 0);
    expect_oracle(blk, 0, oracle);
}

/* A node above a file that waits for the device, and refuses to link the first writes. */
static unsigned refusals;

static bool redo_open(BlockDriverState *bs, json_t *options, int flags, GError **errp)
{
    return bdrv_open_file_child(bs, NULL, options, BDRV_CHILD_IMAGE, errp);
}

static int64_t redo_getlength(BlockDriverState *bs)
{
    return bdrv_getlength(bs->file->bs);
}

static int redo_pwritev(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                        IoVector *qiov, size_t qiov_offset, int flags)
{
    return bdrv_pwritev_part(bs->file, offset, bytes, qiov, qiov_offset, flags);
}

static int redo_preadv(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                       IoVector *qiov, size_t qiov_offset, int flags)
{
    return bdrv_preadv_part(bs->file, offset, bytes, qiov, qiov_offset, flags);
}

static int redo_map(BlockDriverState *bs, BlkQueue *queue, BdrvMapIntent intent, int64_t offset,
                    int64_t bytes, BdrvMapping *m)
{
    unsigned n = m->n;
    int ret = bdrv_map(bs->file, queue, intent, offset, bytes, m);
    for (; ret == 0 && n < m->n; n++) {
        m->ext[n].direct = true;
    }
    return ret;
}

static int redo_map_done(BlockDriverState *bs, BlkQueue *queue, BdrvMapping *m, int result)
{
    bool refuses = result == 0 && refusals > 0;
    refusals -= refuses;
    return refuses ? -EAGAIN : result;
}

static const BlockDriver redo_driver = {
    .format_name = "test-redo", .open = redo_open, .getlength = redo_getlength,
    .preadv = redo_preadv, .pwritev = redo_pwritev,
    .map = redo_map, .map_done = redo_map_done,
};

/* The second write overlaps the first and comes later, also when the first is done again. */
static void test_redone_in_its_place(void)
{
    image_create("r", "size=1M");
    g_autoptr(BlockBackend) blk = image_open("r", "driver=test-redo", BDRV_O_RDWR);
    BlkQueue *q = blk_queue_new(blk);
    QB_AUTO_FREE uint8_t *buf = qb_try_memalign(4096, 2 * BLOCK);
    Result results[2];
    IoVector qiov[2];
    memset(buf, 1, BLOCK);
    memset(buf + BLOCK, 2, BLOCK);
    image_write(blk, 4 * BLOCK, BLOCK, 0); /* now the length of the file is known */
    refusals = 1;
    for (int i = 0; i < 2; i++) {
        iov_vector_init_buf(&qiov[i], buf + i * BLOCK, BLOCK);
        BlkQueueRequest req = request(BLK_OP_WRITE, 4 * BLOCK, BLOCK, &qiov[i], &results[i]);
        blk_queue_submit(q, &req);
    }
    collect_all(q);
    g_assert_cmpuint(refusals, ==, 0);
    g_assert_cmpuint(blk_queue_stats(q).workers, ==, 2);
    g_assert_cmpint(results[0].ret | results[1].ret, ==, 0);
    expect_by_queue(q, 4 * BLOCK, BLOCK, 2);
    blk_queue_free(q);
}

/* --- drains and the graph --- */

static void test_drain(void)
{
    image_create("d", "size=1M");
    g_autoptr(BlockBackend) blk = image_open_rw("d");
    BlkQueue *q = blk_queue_new(blk);
    struct pollfd pfd = {.fd = blk_queue_fd(q), .events = POLLIN};
    uint8_t buf[512];
    IoVector qiov;
    Result result;
    iov_vector_init_buf(&qiov, buf, sizeof(buf));
    BlkQueueRequest req = request(BLK_OP_READ, 0, sizeof(buf), &qiov, &result);
    bdrv_drained_begin(blk_bs(blk));
    blk_queue_submit(q, &req);
    g_assert_cmpuint(blk_queue_poll(q), ==, 0);
    g_assert_cmpuint(blk_queue_pending(q), ==, 1);
    bdrv_drained_end(blk_bs(blk));
    while (blk_queue_poll(q) == 0) {
        g_assert_cmpint(poll(&pfd, 1, -1), ==, 1); /* the descriptor tells when */
    }
    g_assert_cmpuint(result.calls, ==, 1);
    g_assert_cmpint(result.ret, ==, 0);
    blk_queue_free(q);
}

/* The descriptor is silent again when all that came was taken. */
static void test_descriptor(void)
{
    image_create("p", "size=1M");
    g_autoptr(BlockBackend) blk = image_open_rw("p");
    BlkQueue *q = blk_queue_new(blk);
    struct pollfd pfd = {.fd = blk_queue_fd(q), .events = POLLIN};
    for (int i = 0; i < 3; i++) {
        Result result;
        BlkQueueRequest req = request(BLK_OP_FLUSH, 0, 0, NULL, &result);
        blk_queue_submit(q, &req);
        while (blk_queue_poll(q) == 0) {
            g_assert_cmpint(poll(&pfd, 1, -1), ==, 1);
        }
        g_assert_cmpuint(result.calls, ==, 1);
        g_assert_cmpint(poll(&pfd, 1, 0), ==, 0);
    }
    blk_queue_free(q);
}

typedef struct Owner {
    BlockBackend *blk;
    int64_t base;
    guint32 seed;
    uint8_t oracle[64 * BLOCK];
} Owner;

static void *own_queue(void *opaque)
{
    Owner *o = opaque;
    g_autoptr(GRand) rand = g_rand_new_with_seed(o->seed);
    for (int round = 0; round < 4; round++) {
        BlkQueue *q = blk_queue_new(o->blk);
        write_at_random(q, o->base, o->oracle, 60, rand);
        blk_queue_free(q);
    }
    return NULL;
}

static _Atomic(bool) stop_disturbing;

static void *disturb(void *opaque)
{
    BlockBackend *blk = opaque;
    while (!atomic_load(&stop_disturbing)) {
        bdrv_drained_begin(blk_bs(blk));
        g_assert_cmpuint(atomic_load(&blk_bs(blk)->in_flight), ==, 0);
        bdrv_graph_wrlock();
        bdrv_graph_wrunlock();
        bdrv_drained_end(blk_bs(blk));
        bdrv_graph_wrlock();
        bdrv_graph_wrunlock();
        g_usleep(500);
    }
    return NULL;
}

static void test_many_queues(gconstpointer opts)
{
    enum { QUEUES = 4 };
    Owner *owners = g_new0(Owner, QUEUES);
    pthread_t threads[QUEUES], disturber;
    image_create("m", "size=4M,cluster_size=16k");
    g_autoptr(BlockBackend) blk = image_open("m", opts, BDRV_O_RDWR);
    atomic_store(&stop_disturbing, false);
    for (int i = 0; i < QUEUES; i++) {
        owners[i].blk = blk;
        owners[i].base = i * MIB;
        owners[i].seed = (guint32)g_test_rand_int();
        g_assert_true(qb_thread_start(&threads[i], "owner", own_queue, &owners[i]));
    }
    g_assert_true(qb_thread_start(&disturber, "disturber", disturb, blk));
    for (int i = 0; i < QUEUES; i++) {
        pthread_join(threads[i], NULL);
    }
    atomic_store(&stop_disturbing, true);
    pthread_join(disturber, NULL);
    for (int i = 0; i < QUEUES; i++) {
        expect_oracle(blk, owners[i].base, owners[i].oracle);
    }
    g_clear_pointer(&blk, blk_unref);
    image_check("m");
    g_free(owners);
}

/* --- waiting for the device --- */

/* A raw file of 1 MiB on a disk, its blocks numbered; NULL where it cannot be opened with @opts. */
static BlockBackend *open_on_disk(const char *opts, char **ret_path)
{
    g_autoptr(GError) err = NULL;
    g_autofree uint8_t *buf = g_malloc(MIB);
    char *path = g_build_filename(g_get_tmp_dir(), "qb-queue-XXXXXX", NULL);
    int fd = g_mkstemp(path);
    for (int i = 0; i < MIB; i++) {
        buf[i] = (uint8_t)(i / BLOCK);
    }
    g_assert_cmpint(write(fd, buf, MIB), ==, MIB);
    g_assert_cmpint(fsync(fd), ==, 0);
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    close(fd);
    json_t *options = qb_opts_parse(opts, NULL, &err);
    json_object_set_new(options, "driver", json_string("raw"));
    *ret_path = path;
    BlockBackend *blk = blk_new_open(path, options, BDRV_O_RDWR, &err);
    if (!blk) {
        g_test_skip(err->message);
    }
    return blk;
}

static void test_device(gconstpointer opts)
{
    g_autofree char *path = NULL;
    g_autoptr(BlockBackend) blk = open_on_disk(opts, &path);
    BlkQueue *q = blk ? blk_queue_new(blk) : NULL;
    QB_AUTO_FREE uint8_t *buf = qb_try_memalign(4096, MIB);
    IoVector qiov[64];
    Result results[64];
    for (int i = 0; q && i < 64; i++) {
        int64_t offset = (i * 37 % 64) * 4 * BLOCK;
        iov_vector_init_buf(&qiov[i], buf + offset, BLOCK);
        BlkQueueRequest req = request(BLK_OP_READ, offset, BLOCK, &qiov[i], &results[i]);
        blk_queue_submit(q, &req);
    }
    if (q) {
        collect_all(q);
        for (int i = 0; i < 64; i++) {
            g_assert_cmpint(results[i].ret, ==, 0);
            g_assert_cmpint(buf[i * 4 * BLOCK], ==, i * 4 & 0xff);
            g_assert_cmpint(buf[i * 4 * BLOCK + BLOCK - 1], ==, i * 4 & 0xff);
        }
        BlkQueueStats stats = blk_queue_stats(q);
        g_assert_cmpuint(stats.workers, ==, 0);
        g_assert_true(!strstr(opts, "direct=on") || stats.lane == 64);
        g_assert_cmpint(write_by_queue(q, 8 * BLOCK, 2 * BLOCK, 0xee, BDRV_REQ_FUA), ==, 0);
        expect_by_queue(q, 8 * BLOCK, 2 * BLOCK, 0xee);
        expect_by_queue(q, 10 * BLOCK, BLOCK, 10);
    }
    blk_queue_free(q);
    g_unlink(path);
}

/* Memory the file would refuse goes another way. */
static void test_unaligned_memory(void)
{
    g_autofree char *path = NULL;
    g_autoptr(BlockBackend) blk = open_on_disk("cache.direct=on", &path);
    BlkQueue *q = blk ? blk_queue_new(blk) : NULL;
    g_autofree uint8_t *buf = g_malloc0(BLOCK + 1);
    if (q) {
        g_assert_cmpint(run_one(q, BLK_OP_READ, 5 * BLOCK, BLOCK, buf + 1, 0), ==, 0);
        g_assert_cmpint(buf[1], ==, 5);
        g_assert_cmpint(buf[BLOCK], ==, 5);
        g_assert_cmpuint(blk_queue_stats(q).workers, ==, 1);
    }
    blk_queue_free(q);
    g_unlink(path);
}

static void without_io_uring(gconstpointer test)
{
    g_setenv("QB_DISABLE_IO_URING", "1", true);
    test_device("cache.direct=on");
    test_device("cache.direct=off");
    test_order("driver=qcow2");
    test_many_queues("driver=qcow2");
    g_unsetenv("QB_DISABLE_IO_URING");
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    image_setup();
    g_test_add_func("/queue/at-once", test_at_once);
    g_test_add_data_func("/queue/fresh/plain", "size=1M", test_fresh);
    g_test_add_data_func("/queue/fresh/small", "size=1M,cluster_size=8k", test_fresh);
    g_test_add_data_func("/queue/fresh/subclusters", "size=1M,extended_l2=on", test_fresh);
    g_test_add_func("/queue/fresh/lazy", test_fresh_lazy);
    g_test_add_func("/queue/fresh/undone", test_fresh_undone);
    g_test_add_func("/queue/scattered", test_scattered);
    g_test_add_func("/queue/workers", test_workers);
    g_test_add_func("/queue/errors", test_errors);
    g_test_add_func("/queue/shared-flush", test_shared_flush);
    g_test_add_func("/queue/failed-flush", test_failed_flush);
    g_test_add_data_func("/queue/order/plain", "driver=qcow2", test_order);
    g_test_add_data_func("/queue/order/worker", "driver=qcow2,detect-zeroes=on", test_order);
    bdrv_register(&redo_driver);
    g_test_add_func("/queue/order/redone", test_redone_in_its_place);
    g_test_add_func("/queue/drain", test_drain);
    g_test_add_func("/queue/descriptor", test_descriptor);
    g_test_add_data_func("/queue/many", "driver=qcow2", test_many_queues);
    g_test_add_data_func("/queue/device/direct", "cache.direct=on", test_device);
    g_test_add_data_func("/queue/device/native", "cache.direct=on,file.aio=native", test_device);
    g_test_add_data_func("/queue/device/threads", "cache.direct=on,file.aio=threads", test_device);
    g_test_add_data_func("/queue/device/cold", "cache.direct=off", test_device);
    g_test_add_func("/queue/unaligned-memory", test_unaligned_memory);
    g_test_add_data_func("/queue/no-io-uring", NULL, without_io_uring);
    int ret = g_test_run();
    image_teardown();
    return ret;
}
