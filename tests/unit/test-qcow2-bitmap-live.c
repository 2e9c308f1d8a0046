/*
 * Bitmaps of a qcow2 image in use: writers in many threads beside operations on bitmaps, and the
 * fast lane.
 *
 * SPDX-License-Identifier: MIT
 */
#include "tests/unit/qcow2-image.h"
#include "block/queue.h"

#include <inttypes.h>

enum { THREADS = 4, WRITES = 150, BLOCK = 4096, BLOCKS = 2048 };

typedef struct Writer {
    BlockBackend *blk;
    guint32 seed;
    _Atomic(uint8_t) *written; /* of each block */
    _Atomic(unsigned) *busy;
} Writer;

static void *write_randomly(void *opaque)
{
    Writer *w = opaque;
    g_autoptr(GRand) r = g_rand_new_with_seed(w->seed);
    for (int i = 0; i < WRITES; i++) {
        int64_t block = g_rand_int_range(r, 0, BLOCKS), offset = block * BLOCK;
        switch (g_rand_int_range(r, 0, 6)) {
        case 0:
            g_assert_cmpint(blk_pwrite_zeroes(w->blk, offset, BLOCK, BDRV_REQ_MAY_UNMAP), ==, 0);
            break;
        case 1:
            g_assert_cmpint(blk_pdiscard(w->blk, offset, BLOCK), ==, 0);
            continue;
        case 2:
            g_assert_cmpint(blk_flush(w->blk), ==, 0);
            continue;
        default:
            image_write(w->blk, offset, BLOCK, (int)i);
        }
        w->written[block] = 1;
    }
    atomic_fetch_sub(w->busy, 1);
    return NULL;
}

/* Comes and goes beside the writes, in a node that is drained each time. */
static void operate(BlockBackend *blk, _Atomic(unsigned) *busy)
{
    BlockDriverState *bs = blk_bs(blk);
    GError *err = NULL;
    while (atomic_load(busy)) {
        bdrv_bitmap_add(bs, "other", 0, true, false, &err);
        g_assert_no_error(err);
        bdrv_bitmap_merge(bs, "other", bs, "b", &err);
        g_assert_no_error(err);
        bdrv_store_bitmaps(bs, &err);
        g_assert_no_error(err);
        bdrv_bitmap_clear(bs, "other", &err);
        g_assert_no_error(err);
        bdrv_bitmap_disable(bs, "other", &err);
        g_assert_no_error(err);
        bdrv_bitmap_remove(bs, "other", &err);
        g_assert_no_error(err);
    }
}

static bool is_dirty(BlockBackend *blk, const char *name, int64_t offset)
{
    int64_t at, bytes;
    int ret = bdrv_bitmap_next_dirty(blk_bs(blk), name, offset, &at, &bytes);
    g_assert_cmpint(ret, >=, 0);
    return ret == 1 && at == offset;
}

static void test_threads(void)
{
    GError *err = NULL;
    guint32 seed = g_test_rand_int();
    g_test_message("seed %u", seed);
    image_create("image", "size=8M,cluster_size=4k");
    BlockBackend *blk = image_open_rw("image");
    bdrv_bitmap_add(blk_bs(blk), "b", BLOCK, true, false, &err);
    g_assert_no_error(err);
    g_autofree _Atomic(uint8_t) *written = g_new0(_Atomic(uint8_t), BLOCKS);
    _Atomic(unsigned) busy = THREADS;
    Writer writers[THREADS];
    pthread_t threads[THREADS];
    for (unsigned i = 0; i < THREADS; i++) {
        writers[i] = (Writer){.blk = blk, .seed = seed + i, .written = written, .busy = &busy};
        g_assert_true(qb_thread_start(&threads[i], "writer", write_randomly, &writers[i]));
    }
    operate(blk, &busy);
    for (unsigned i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
    }
    blk_unref(blk);
    image_check("image");
    blk = image_open("image", NULL, 0);
    for (int64_t i = 0; i < BLOCKS; i++) {
        g_assert_true(!written[i] || is_dirty(blk, "b", i * BLOCK));
    }
    blk_unref(blk);
}

/* The only bitmap there is was disabled when the image was opened: from its enabling on it follows the
 * guest, and no longer when it is disabled again. */
static void test_enabled_later(void)
{
    GError *err = NULL;
    image_create("image", "size=1M");
    BlockBackend *blk = image_open_rw("image");
    bdrv_bitmap_add(blk_bs(blk), "b", BLOCK, true, true, &err);
    g_assert_no_error(err);
    blk_unref(blk);
    blk = image_open_rw("image");
    image_write(blk, 0, BLOCK, 1);
    bdrv_bitmap_enable(blk_bs(blk), "b", &err);
    g_assert_no_error(err);
    image_write(blk, 2 * BLOCK, BLOCK, 1);
    bdrv_bitmap_disable(blk_bs(blk), "b", &err);
    g_assert_no_error(err);
    image_write(blk, 4 * BLOCK, BLOCK, 1);
    blk_unref(blk);
    blk = image_open("image", NULL, 0);
    g_assert_false(is_dirty(blk, "b", 0));
    g_assert_true(is_dirty(blk, "b", 2 * BLOCK));
    g_assert_false(is_dirty(blk, "b", 4 * BLOCK));
    blk_unref(blk);
}

typedef struct Merger {
    BlockDriverState *to, *from;
    unsigned done;
} Merger;

static void *merge_often(void *opaque)
{
    Merger *m = opaque;
    for (int i = 0; i < 200; i++) {
        g_autoptr(GError) err = NULL;
        bool ok = bdrv_bitmap_merge(m->to, "b", m->from, "b", &err);
        g_assert_true(ok || strstr(err->message, "is currently in use"));
        m->done += ok;
    }
    return NULL;
}

/* Merges both ways at once: one may find that its target is the source of the other, and say so; none
 * waits for the other. */
static void test_merges_both_ways(void)
{
    GError *err = NULL;
    BlockBackend *blk[2];
    pthread_t thread;
    for (int i = 0; i < 2; i++) {
        const char *name = i ? "two" : "one";
        image_create(name, "size=8M");
        blk[i] = image_open_rw(name);
        bdrv_bitmap_add(blk_bs(blk[i]), "b", BLOCK, true, false, &err);
        g_assert_no_error(err);
        image_write(blk[i], (i + 1) * MIB, BLOCK, 1);
    }
    qb_error_set(&err, EIO, "first"); /* GLib's part of the first error hides from thread sanitizers */
    g_clear_error(&err);
    Merger there = {blk_bs(blk[0]), blk_bs(blk[1]), 0}, back = {blk_bs(blk[1]), blk_bs(blk[0]), 0};
    g_assert_true(qb_thread_start(&thread, "merger", merge_often, &there));
    merge_often(&back);
    pthread_join(thread, NULL);
    merge_often(&there); /* alone */
    g_assert_cmpuint(there.done, >=, 200);
    g_assert_true(is_dirty(blk[0], "b", MIB) && is_dirty(blk[0], "b", 2 * MIB));
    for (int i = 0; i < 2; i++) {
        blk_unref(blk[i]);
    }
}

static int map(BlockBackend *blk, int64_t offset, int64_t bytes, BdrvMapping *m)
{
    memset(m, 0, sizeof(*m));
    return bdrv_map(blk_root(blk), NULL, BDRV_MAP_WRITE, offset, bytes, m);
}

/* A write in place that finds a clear bit needs a worker until IN_USE is stable, not afterwards. */
static void test_lane(void)
{
    GError *err = NULL;
    BdrvMapping m;
    image_create("image", "size=1M");
    BlockBackend *blk = image_open_rw("image");
    image_write(blk, 0, MIB, 1);
    g_assert_cmpint(blk_flush(blk), ==, 0);
    bdrv_bitmap_add(blk_bs(blk), "b", 65536, true, false, &err);
    g_assert_no_error(err);
    bdrv_graph_rdlock();
    g_assert_cmpint(map(blk, 0, 65536, &m), ==, -EAGAIN);
    bdrv_graph_rdunlock();
    image_write(blk, 512 * KIB, 1, 1);
    bdrv_graph_rdlock();
    g_assert_cmpint(map(blk, 64 * KIB, 64 * KIB, &m), ==, 0);
    g_assert_false(is_dirty(blk, "b", 64 * KIB));
    g_assert_cmpint(bdrv_map_done(NULL, &m, 0), ==, 0);
    g_assert_true(is_dirty(blk, "b", 64 * KIB));
    g_assert_false(is_dirty(blk, "b", 0));
    bdrv_graph_rdunlock();
    bdrv_store_bitmaps(blk_bs(blk), &err);
    g_assert_no_error(err);
    /* A new session: what is dirty may be written again at once, what is not may not. */
    bdrv_graph_rdlock();
    g_assert_cmpint(map(blk, 64 * KIB, 64 * KIB, &m), ==, 0);
    g_assert_cmpint(bdrv_map_done(NULL, &m, 0), ==, 0);
    g_assert_cmpint(map(blk, 128 * KIB, 64 * KIB, &m), ==, -EAGAIN);
    bdrv_graph_rdunlock();
    blk_unref(blk);
    image_check("image");
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    image_setup();
    g_test_add_func("/qcow2-bitmap-live/enabled-later", test_enabled_later);
    g_test_add_func("/qcow2-bitmap-live/threads", test_threads);
    g_test_add_func("/qcow2-bitmap-live/lane", test_lane);
    g_test_add_func("/qcow2-bitmap-live/merges-both-ways", test_merges_both_ways);
    int ret = g_test_run();
    image_teardown();
    return ret;
}
