/*
 * Where qcow2 says that guest data lie: for the fast lane, and in an external data file.
 *
 * SPDX-License-Identifier: MIT
 */
#include "qcow2-image.h"
#include "block/queue.h"

enum { C = 64 * KIB };

/* --- the fast lane --- */

static int map(BlockBackend *blk, BdrvMapIntent intent, int64_t offset, int64_t bytes,
               BdrvMapping *m)
{
    memset(m, 0, sizeof(*m));
    return bdrv_map(blk_root(blk), NULL, intent, offset, bytes, m);
}

static void test_map(void)
{
    BdrvMapping m;
    image_create("image", "size=1M");
    BlockBackend *blk = image_open_rw("image");
    image_write(blk, 0, 2 * C, 1);
    g_assert_cmpint(blk_pwrite_zeroes(blk, 3 * C, C, 0), ==, 0);
    image_write_compressed(blk, 5 * C, C, 4, 0);
    g_assert_cmpint(blk_flush(blk), ==, 0);
    uint64_t host = qcow2_entry_host(image_entry(blk, 0));
    bdrv_graph_rdlock();
    g_assert_cmpint(map(blk, BDRV_MAP_READ, 4096, 3 * C, &m), ==, 0);
    g_assert_cmpint(m.bytes, ==, 2 * C - 4096);
    g_assert_cmpuint(m.n, ==, 1);
    g_assert_cmpint(m.ext[0].host_offset, ==, (int64_t)host + 4096);
    g_assert_cmpint(bdrv_map_done(NULL, &m, 0), ==, 0);
    g_assert_cmpint(map(blk, BDRV_MAP_READ, 2 * C, 3 * C, &m), ==, 0);
    g_assert_cmpint(m.bytes, ==, 3 * C); /* nothing, zeroes, nothing */
    g_assert_true(m.ext[0].zero);
    g_assert_cmpint(bdrv_map_done(NULL, &m, 0), ==, 0);
    g_assert_cmpint(map(blk, BDRV_MAP_READ, 5 * C, 4096, &m), ==, -EAGAIN);
    g_assert_cmpint(map(blk, BDRV_MAP_WRITE, 8 * C, 4096, &m), ==, -EAGAIN);
    g_assert_cmpint(map(blk, BDRV_MAP_WRITE, 3 * C, 4096, &m), ==, -EAGAIN);
    g_assert_cmpint(map(blk, BDRV_MAP_WRITE, C, 4096, &m), ==, 0);
    g_assert_cmpint(m.ext[0].host_offset, ==, (int64_t)host + C);
    g_assert_cmpint(bdrv_map_done(NULL, &m, 0), ==, 0);
    bdrv_graph_rdunlock();
    blk_unref(blk);
}

/* A queue's thread must not wait for a new table: a flush leaves it the one it is about to use. */
static void test_map_keeps_table(void)
{
    BdrvMapping m;
    image_create("image", "size=1M");
    BlockBackend *blk = image_open_rw("image");
    image_write(blk, 0, 2 * C, 1);
    g_assert_cmpint(blk_flush(blk), ==, 0);
    uint64_t l1 = qcow2_l1_get(image_state(blk), 0);
    bdrv_graph_rdlock();
    g_assert_cmpint(map(blk, BDRV_MAP_WRITE, 8 * C, C, &m), ==, 0);
    g_assert_cmpint(bdrv_pdiscard(blk_root(blk), 0, 2 * C), ==, 0);
    g_assert_cmpint(bdrv_flush(blk_bs(blk)), ==, 0);
    g_assert_cmphex(qcow2_l1_get(image_state(blk), 0), ==, l1);
    g_assert_cmpint(bdrv_map_done(NULL, &m, -EIO), ==, -EIO);
    g_assert_cmpint(bdrv_flush(blk_bs(blk)), ==, 0);
    g_assert_cmphex(qcow2_l1_get(image_state(blk), 0), ==, 0); /* the next one does not */
    bdrv_graph_rdunlock();
    blk_unref(blk);
    image_check("image");
}

/* --- external data file --- */

static void test_data_file(bool raw)
{
    g_autofree char *path = image_path("data");
    g_autofree char *opts = g_strdup_printf("size=1M,data_file=%s,data_file_raw=%s", path,
                                            raw ? "on" : "off");
    g_unlink(path);
    image_create("image", opts);
    BlockBackend *blk = image_open_rw("image");
    image_write(blk, 100, 3 * C, 5);
    g_assert_cmphex(image_entry(blk, 0).entry, ==, QCOW2_ENTRY_COPIED);
    g_assert_cmphex(image_entry(blk, C).entry, ==, QCOW2_ENTRY_COPIED | C);
    g_assert_cmpint(blk_pwrite_zeroes(blk, C, C, 0), ==, 0);
    g_assert_cmpint(blk_pdiscard(blk, 2 * C, C), ==, 0);
    image_write_compressed(blk, 8 * C, C, 5, -ENOTSUP);
    image_expect(blk, 0, 100, 0);
    image_expect(blk, 100, C - 100, 5);
    image_expect(blk, C, 2 * C, 0);
    image_expect(blk, 3 * C, 100, 5);
    image_write(blk, C + 10, 20, 6);
    image_expect(blk, C, 10, 0);
    image_expect(blk, C + 10, 20, 6);
    image_expect(blk, C + 30, 2 * C - 30, 0);
    blk_unref(blk);
    image_check("image");
    if (raw) {
        g_autoptr(BlockBackend) data = image_open("data", "driver=raw", 0);
        image_expect(data, 100, C - 100, 5);
        image_expect(data, C + 30, 2 * C - 30, 0);
        image_expect(data, C + 10, 20, 6);
    }
}

static void test_data_file_plain(void)
{
    test_data_file(false);
}

static void test_data_file_raw(void)
{
    test_data_file(true);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    image_setup();
    g_test_add_func("/qcow2-map/fast-lane", test_map);
    g_test_add_func("/qcow2-map/keeps-table", test_map_keeps_table);
    g_test_add_func("/qcow2-map/data-file", test_data_file_plain);
    g_test_add_func("/qcow2-map/data-file-raw", test_data_file_raw);
    int ret = g_test_run();
    image_teardown();
    return ret;
}
