/*
 * Batches, and the core's part of the fast lane.
 *
 * SPDX-License-Identifier: MIT
 */
#include "mem-driver.h"
#include "block/queue.h"

#define N 64

static void make_batch(BdrvBatchOp *ops, uint8_t (*bufs)[512], BdrvBatchKind kind)
{
    for (size_t i = 0; i < N; i++) {
        memset(bufs[i], kind == BDRV_BATCH_WRITE ? (int)i + 1 : 0, 512);
        ops[i] = (BdrvBatchOp){
            .kind = kind, .offset = 1024 * (int64_t)i, .bytes = 512, .buf = bufs[i], .ret = 1,
        };
    }
}

/* Writes, reads back, and compares; @opts is a node of 64 KiB. */
static void test_round_trip(gconstpointer opts)
{
    g_autoptr(BlockBackend) blk = open_blk(opts);
    g_autofree uint8_t *bufs = g_malloc(N * 512);
    BdrvBatchOp ops[N];
    make_batch(ops, (uint8_t (*)[512])bufs, BDRV_BATCH_WRITE);
    g_assert_cmpint(blk_run_batch(blk, ops, N), ==, 0);
    make_batch(ops, (uint8_t (*)[512])bufs, BDRV_BATCH_READ);
    g_assert_cmpint(blk_run_batch(blk, ops, N), ==, 0);
    for (size_t i = 0; i < N; i++) {
        g_assert_cmpint(ops[i].ret, ==, 0);
        for (size_t k = 0; k < 512; k++) {
            g_assert_cmpint(bufs[512 * i + k], ==, i + 1);
        }
    }
    g_assert_cmpint(blk_run_batch(blk, ops, 0), ==, 0);
}

/* Fitting operations go to the driver in one call, all others take the ordinary way. */
static void test_split(void)
{
    g_autoptr(BlockBackend) blk = open_blk("driver=test-fua,align=512,discard=unmap");
    MemState *s = mem_state(blk_bs(blk));
    uint8_t a[512] = {1}, b[100] = {2}, c[512];
    memset(s->data, 0xff, 65536);
    BdrvBatchOp ops[] = {
        {.kind = BDRV_BATCH_WRITE, .offset = 0, .bytes = 512, .buf = a},
        {.kind = BDRV_BATCH_WRITE, .offset = 600, .bytes = 100, .buf = b},
        {.kind = BDRV_BATCH_ZERO, .offset = 2048, .bytes = 1000},
        {.kind = BDRV_BATCH_DISCARD, .offset = 4096, .bytes = 512},
        {.kind = BDRV_BATCH_READ, .offset = 8192, .bytes = 512, .buf = c},
        {.kind = BDRV_BATCH_READ, .offset = 65536 - 256, .bytes = 512, .buf = c},
    };
    g_assert_cmpint(bdrv_run_batch(blk_root(blk), ops, G_N_ELEMENTS(ops)), ==, 0);
    g_assert_cmpuint(s->batches, ==, 1);
    g_assert_cmpint(s->data[0], ==, 1);
    g_assert_cmpint(s->data[599], ==, 0xff);
    g_assert_cmpint(s->data[600], ==, 2);
    g_assert_true(qb_buffer_is_zero(s->data + 2048, 1000));
    g_assert_cmpint(s->data[3048], ==, 0xff);
    g_assert_true(qb_buffer_is_zero(s->data + 4096, 512));
}

static void test_fua(void)
{
    g_autoptr(BlockBackend) blk = open_blk("driver=raw,file.driver=test-fua");
    MemState *s = mem_state(bottom(blk));
    g_autofree uint8_t *bufs = g_malloc(N * 512);
    BdrvBatchOp ops[N];
    make_batch(ops, (uint8_t (*)[512])bufs, BDRV_BATCH_WRITE);
    for (size_t i = 0; i < N; i += 2) {
        ops[i].flags = BDRV_REQ_FUA;
    }
    g_assert_cmpint(bdrv_run_batch(blk_root(blk), ops, N), ==, 0);
    g_assert_cmpuint(s->batches, ==, 1);
    g_assert_cmpuint(s->flushes, ==, 1);
}

static void test_errors(void)
{
    g_autoptr(BlockBackend) blk = open_blk("driver=null-co,size=4096");
    uint8_t buf[512] = {0};
    BdrvBatchOp ops[] = {
        {.kind = BDRV_BATCH_WRITE, .offset = 0, .bytes = 512, .buf = buf, .ret = 1},
        {.kind = BDRV_BATCH_WRITE, .offset = -1, .bytes = 512, .buf = buf},
        {.kind = BDRV_BATCH_READ, .offset = 0, .bytes = BDRV_REQUEST_MAX_BYTES + 1, .buf = buf},
        {.kind = BDRV_BATCH_ZERO, .offset = 4000, .bytes = 512},
    };
    g_assert_cmpint(bdrv_run_batch(blk_root(blk), ops, G_N_ELEMENTS(ops)), ==, -EIO);
    g_assert_cmpint(ops[0].ret, ==, 0);
    for (size_t i = 1; i < G_N_ELEMENTS(ops); i++) {
        g_assert_cmpint(ops[i].ret, ==, -EIO);
    }
}

static void test_driver_error(void)
{
    g_autoptr(BlockBackend) blk = open_blk("driver=raw,file.driver=test-fua");
    uint8_t buf[512] = {0};
    BdrvBatchOp op = {
        .kind = BDRV_BATCH_WRITE, .bytes = 512, .buf = buf, .flags = BDRV_REQ_FUA,
    };
    mem_state(bottom(blk))->error = -ENOSPC;
    g_assert_cmpint(bdrv_run_batch(blk_root(blk), &op, 1), ==, -ENOSPC);
    g_assert_cmpuint(mem_state(bottom(blk))->flushes, ==, 0);
    mem_state(bottom(blk))->error = 0;
}

/* Batches from many threads of the pool that batches use themselves. */
static int batch_in_pool(void *opaque)
{
    BlockBackend *blk = opaque;
    g_autofree uint8_t *bufs = g_malloc(N * 512);
    BdrvBatchOp ops[N];
    make_batch(ops, (uint8_t (*)[512])bufs, BDRV_BATCH_READ);
    return blk_run_batch(blk, ops, N);
}

static void test_crowd(void)
{
    g_autoptr(BlockBackend) blk = open_blk("driver=test-mem,align=512");
    QbTaskGroup g;
    qb_group_init(&g);
    for (int i = 0; i < 200; i++) {
        qb_group_submit(&g, qb_request_pool(), batch_in_pool, blk);
    }
    g_assert_cmpint(qb_group_wait(&g, 0), ==, 0);
    qb_group_destroy(&g);
}

/* --- the fast lane --- */

/* A file of which each 4 KiB is one extent; what is beyond 32 KiB is not in memory. */
static unsigned lane_done;
static int lane_result;

static bool lane_open(BlockDriverState *bs, json_t *options, int flags, GError **errp)
{
    return true;
}

static int64_t lane_getlength(BlockDriverState *bs)
{
    return 65536;
}

static void lane_refresh_limits(BlockDriverState *bs)
{
    bs->bl.request_alignment = 512;
}

static int lane_map(BlockDriverState *bs, BlkQueue *queue, BdrvMapIntent intent, int64_t offset,
                    int64_t bytes, BdrvMapping *m)
{
    if (offset >= 32768) {
        return -EAGAIN;
    }
    while (bytes > 0 && m->n < BDRV_MAP_MAX_EXTENTS) {
        int64_t n = MIN(bytes, 4096 - offset % 4096);
        m->ext[m->n++] = (BdrvMapExtent){.fd = 7, .host_offset = offset, .bytes = n};
        m->bytes += n;
        offset += n;
        bytes -= n;
    }
    m->layer[m->depth].token = bs;
    return 0;
}

static int lane_map_done(BlockDriverState *bs, BlkQueue *queue, BdrvMapping *m, int result)
{
    g_assert_true(m->layer[m->depth].token == bs);
    g_assert_true(m->layer[m->depth].bs == bs);
    lane_done++;
    lane_result = result;
    return result;
}

static int lane_pwrite_zeroes(BlockDriverState *bs, BdrvRequest *req, int64_t offset,
                              int64_t bytes, int flags)
{
    return 0;
}

static const BlockDriver lane_driver = {
    .format_name = "test-lane",
    .protocol_name = "test-lane",
    .open = lane_open,
    .getlength = lane_getlength,
    .refresh_limits = lane_refresh_limits,
    .pwrite_zeroes = lane_pwrite_zeroes,
    .map = lane_map,
    .map_done = lane_map_done,
};

static int try_map(BlockBackend *blk, BdrvMapIntent intent, int64_t offset, int64_t bytes,
                   BdrvMapping *m)
{
    memset(m, 0xff, sizeof(*m)); /* what memory holds that nobody has initialised */
    bdrv_mapping_init(m);
    return bdrv_map(blk_root(blk), NULL, intent, offset, bytes, m);
}

static void test_lane_passes(void)
{
    g_autoptr(BlockBackend) blk = open_blk("driver=raw,offset=512,file.driver=test-lane");
    BlockDriverState *file = bottom(blk);
    BdrvMapping m;
    BDRV_GRAPH_GUARD();
    lane_done = 0;
    g_assert_cmpint(try_map(blk, BDRV_MAP_WRITE, 1024, 8192, &m), ==, 0);
    g_assert_cmpuint(m.n, ==, 3);
    g_assert_cmpint(m.ext[0].host_offset, ==, 1536);
    g_assert_cmpint(m.ext[0].bytes, ==, 2560);
    g_assert_cmpint(m.bytes, ==, 8192);
    g_assert_cmpuint(m.layers, ==, 2);
    g_assert_cmpuint(file->in_flight, ==, 1);
    g_assert_cmpuint(blk_bs(blk)->in_flight, ==, 1);
    g_assert_cmpint(bdrv_map_done(NULL, &m, -EIO), ==, -EIO);
    g_assert_cmpuint(lane_done, ==, 1);
    g_assert_cmpint(lane_result, ==, -EIO);
    g_assert_cmpuint(file->in_flight, ==, 0);
    g_assert_cmpuint(blk_bs(blk)->in_flight, ==, 0);
}

static void test_lane_part(void)
{
    g_autoptr(BlockBackend) blk = open_blk("driver=raw,file.driver=test-lane");
    BdrvMapping m;
    BDRV_GRAPH_GUARD();
    g_assert_cmpint(try_map(blk, BDRV_MAP_READ, 0, 65536, &m), ==, 0);
    g_assert_cmpint(m.bytes, ==, 32768);
    g_assert_cmpint(bdrv_map_done(NULL, &m, 0), ==, 0);
}

static void expect_worker(BlockBackend *blk, BdrvMapIntent intent, int64_t offset, int64_t bytes)
{
    BdrvMapping m;
    BDRV_GRAPH_GUARD();
    g_assert_cmpint(try_map(blk, intent, offset, bytes, &m), ==, -EAGAIN);
    g_assert_cmpuint(m.n, ==, 0);
    g_assert_cmpuint(m.layers, ==, 0);
    g_assert_cmpuint(blk_bs(blk)->in_flight, ==, 0);
}

static void test_lane_closed(void)
{
    g_autoptr(BlockBackend) blk = open_blk("driver=raw,file.driver=test-lane");
    g_autoptr(BlockBackend) detect = open_blk("driver=raw,detect-zeroes=on,file.driver=test-lane");
    g_autoptr(BlockBackend) none = open_blk("driver=raw,file.driver=test-mem");
    expect_worker(blk, BDRV_MAP_READ, 32768, 512);   /* the driver says so */
    expect_worker(blk, BDRV_MAP_WRITE, 100, 512);    /* alignment */
    expect_worker(blk, BDRV_MAP_WRITE, 65024, 1024); /* the end */
    expect_worker(blk, BDRV_MAP_READ, -512, 512);
    expect_worker(blk, BDRV_MAP_READ, 0, 0);
    expect_worker(detect, BDRV_MAP_WRITE, 0, 512);
    expect_worker(none, BDRV_MAP_READ, 0, 512);
    bdrv_drained_begin(blk_bs(blk));
    expect_worker(blk, BDRV_MAP_READ, 0, 512);
    bdrv_drained_end(blk_bs(blk));
}

/* A serialising request is neither overtaken nor passed. */
static void test_lane_ranges(void)
{
    g_autoptr(BlockBackend) blk = open_blk("driver=test-lane");
    BlockDriverState *bs = blk_bs(blk);
    QbRangeRequest r;
    BdrvMapping m;
    qb_range_submit(&bs->ranges, &r, 0, 4096);
    qb_range_serialise(&bs->ranges, &r, 0, 4096, false);
    expect_worker(blk, BDRV_MAP_WRITE, 2048, 512);
    BDRV_GRAPH_GUARD();
    g_assert_cmpint(try_map(blk, BDRV_MAP_WRITE, 4096, 512, &m), ==, 0);
    g_assert_cmpint(bdrv_map_done(NULL, &m, 0), ==, 0);
    g_assert_cmpint(try_map(blk, BDRV_MAP_READ, 2048, 512, &m), ==, 0);
    g_assert_cmpint(bdrv_map_done(NULL, &m, 0), ==, 0);
    qb_range_leave(&bs->ranges, &r);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    mem_drivers_register();
    bdrv_register(&lane_driver);
    g_test_add_data_func("/batch/ordinary", "driver=test-mem,align=512", test_round_trip);
    g_test_add_data_func("/batch/driver", "driver=test-fua", test_round_trip);
    g_test_add_data_func("/batch/raw", "driver=raw,file.driver=test-fua", test_round_trip);
    g_test_add_data_func("/batch/unaligned", "driver=test-fua,align=1024", test_round_trip);
    g_test_add_data_func("/batch/cow", "driver=test-cow,cluster=2k", test_round_trip);
    g_test_add_func("/batch/split", test_split);
    g_test_add_func("/batch/fua", test_fua);
    g_test_add_func("/batch/errors", test_errors);
    g_test_add_func("/batch/driver-error", test_driver_error);
    g_test_add_func("/batch/crowd", test_crowd);
    g_test_add_func("/lane/passes", test_lane_passes);
    g_test_add_func("/lane/part", test_lane_part);
    g_test_add_func("/lane/closed", test_lane_closed);
    g_test_add_func("/lane/ranges", test_lane_ranges);
    int ret = g_test_run();
    qb_pools_shutdown();
    return ret;
}
