/*
 * Whole-image operations of qcow2 while guests write: growing and shrinking, snapshots, emptying.
 *
 * Writer threads own a part of the disk each, below all sizes that come by, and know what they
 * wrote. Meanwhile the main thread resizes, takes, applies and deletes snapshots.  In the end each
 * part reads as its writer left it and the image is clean.  Made for ThreadSanitizer, too.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2.h"
#include "tests/unit/log-driver.h"

#define KIB UINT64_C(1024)
#define PART (256 * KIB)
#define WRITERS 3
#define BASE (WRITERS * PART)
#define ROUNDS 12

typedef struct Writer {
    BlockBackend *blk;
    pthread_t thread;
    uint64_t start;
    uint32_t seed;
    uint8_t data[PART];
    _Atomic(bool) stop;
} Writer;

static uint32_t next_random(uint32_t *seed)
{
    *seed = *seed * 1664525 + 1013904223;
    return *seed >> 8;
}

static void write_once(Writer *w)
{
    uint64_t pos = next_random(&w->seed) % (PART / 512) * 512;
    uint64_t bytes = 512 * (1 + next_random(&w->seed) % 40);
    int64_t at = (int64_t)(w->start + pos);
    int ret;
    bytes = MIN(bytes, PART - pos);
    switch (next_random(&w->seed) % 8) {
    case 0:
        memset(w->data + pos, 0, bytes);
        ret = blk_pwrite_zeroes(w->blk, at, (int64_t)bytes, BDRV_REQ_MAY_UNMAP);
        break;
    case 1:
        ret = blk_flush(w->blk);
        break;
    default:
        memset(w->data + pos, (int)(next_random(&w->seed) % 255 + 1), bytes);
        ret = blk_pwrite(w->blk, at, (int64_t)bytes, w->data + pos, 0);
    }
    g_assert_cmpint(ret, ==, 0);
}

static void *writer_main(void *opaque)
{
    Writer *w = opaque;
    while (!atomic_load(&w->stop)) {
        write_once(w);
    }
    return NULL;
}

static BlockBackend *make_image(const char *options)
{
    g_autoptr(GError) err = NULL;
    g_autoptr(json_t) opts = qb_opts_parse(options, NULL, NULL);
    json_object_set_new(opts, "size", json_integer(BASE));
    g_assert_true(bdrv_img_create("test-log:0", "qcow2", opts, NULL, NULL));
    BlockBackend *blk =
        blk_new_open("test-log:0", json_pack("{s:s, s:s}", "driver", "qcow2", "discard", "unmap"),
                     BDRV_O_RDWR | BDRV_O_RESIZE, &err);
    g_assert_no_error(err);
    return blk;
}

static void start_writers(Writer *writers, BlockBackend *blk)
{
    for (int i = 0; i < WRITERS; i++) {
        Writer *w = &writers[i];
        w->blk = blk;
        w->start = (uint64_t)i * PART;
        w->seed = g_test_rand_int();
        g_assert_true(qb_thread_start(&w->thread, "writer", writer_main, w));
    }
}

static void stop_writers(Writer *writers)
{
    for (int i = 0; i < WRITERS; i++) {
        atomic_store(&writers[i].stop, true);
        pthread_join(writers[i].thread, NULL);
    }
}

static void assert_parts(const Writer *writers, BlockBackend *blk)
{
    g_autofree uint8_t *buf = g_malloc(PART);
    for (int i = 0; i < WRITERS; i++) {
        g_assert_cmpint(blk_pread(blk, (int64_t)writers[i].start, PART, buf, 0), ==, 0);
        g_assert_cmpmem(buf, PART, writers[i].data, PART);
    }
}

static void assert_clean(void)
{
    g_autoptr(BlockBackend) blk =
        blk_new_open("test-log:0", json_pack("{s:s}", "driver", "qcow2"), BDRV_O_CHECK, NULL);
    BdrvCheckOptions opts = {0};
    BdrvCheckResult result;
    g_assert_true(bdrv_check(blk_bs(blk), &opts, &result, NULL));
    g_assert_cmpuint(result.corruptions + result.leaks + result.check_errors, ==, 0);
}

/* Sizes from BASE on; what is cut off comes back as zeroes. */
static void resize_round(BlockBackend *blk, int i)
{
    g_autoptr(GError) err = NULL;
    static const PreallocMode modes[] = {PREALLOC_MODE_OFF, PREALLOC_MODE_METADATA};
    uint64_t size = BASE + (uint64_t)g_test_rand_int_range(1, 800) * 512;
    g_autofree uint8_t *buf = g_malloc0(size - BASE);
    blk_truncate(blk, (int64_t)size, true, modes[i % 2], false, &err);
    g_assert_no_error(err);
    g_assert_cmpint(blk_pread(blk, BASE, (int64_t)(size - BASE), buf, 0), ==, 0);
    g_assert_true(qb_buffer_is_zero(buf, size - BASE));
    memset(buf, 0xee, size - BASE);
    g_assert_cmpint(blk_pwrite(blk, BASE, (int64_t)(size - BASE), buf, 0), ==, 0);
    blk_truncate(blk, BASE + 512 * (i % 3), true, PREALLOC_MODE_OFF, false, &err);
    g_assert_no_error(err);
    blk_truncate(blk, BASE, true, PREALLOC_MODE_OFF, false, &err);
    g_assert_no_error(err);
}

static void snapshot_round(BlockBackend *blk, int i)
{
    g_autoptr(GError) err = NULL;
    g_autofree char *name = g_strdup_printf("s%d", i);
    bdrv_snapshot_create(blk_bs(blk), name, &err);
    g_assert_no_error(err);
    if (i % 3 == 2) {
        g_autofree char *old = g_strdup_printf("s%d", i - 1);
        bdrv_snapshot_delete(blk_bs(blk), NULL, old, &err);
        g_assert_no_error(err);
    }
}

static void run(const char *options, void (*round)(BlockBackend *blk, int i))
{
    g_autofree Writer *writers = g_new0(Writer, WRITERS);
    g_autoptr(BlockBackend) blk = make_image(options);
    start_writers(writers, blk);
    for (int i = 0; i < ROUNDS; i++) {
        round(blk, i);
    }
    stop_writers(writers);
    assert_parts(writers, blk);
    g_clear_pointer(&blk, blk_unref);
    assert_clean();
}

static void test_resize(gconstpointer options)
{
    run(options, resize_round);
}

static void test_snapshots(gconstpointer options)
{
    run(options, snapshot_round);
}

int main(int argc, char **argv)
{
    static const char *const shapes[] = {"cluster_size=512", "cluster_size=4k", "cluster_size=64k",
                                         "cluster_size=16k,extended_l2=on"};
    g_test_init(&argc, &argv, NULL);
    log_init();
    for (size_t i = 0; i < G_N_ELEMENTS(shapes); i++) {
        g_autofree char *resize = g_strdup_printf("/qcow2/live/resize/%s", shapes[i]);
        g_autofree char *snapshots = g_strdup_printf("/qcow2/live/snapshots/%s", shapes[i]);
        g_test_add_data_func(resize, shapes[i], test_resize);
        g_test_add_data_func(snapshots, shapes[i], test_snapshots);
    }
    int ret = g_test_run();
    return log_done(ret);
}
