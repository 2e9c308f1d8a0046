/*
 * Growth of the refcount table and of L1 at every refcount width and several cluster sizes, and
 * what stops an amendment half way.
 *
 *   growth   clusters are written far apart until several refcount blocks and a longer table were
 *            needed, then the disk grows so that L1 moves; nothing is lost, check finds nothing
 *   stop     somebody asks to stop at the Nth flush, for every N: the image is good, the same
 *            amendment does the rest
 *
 * SPDX-License-Identifier: MIT
 */
#include "qcow2-rec.h"

#include <inttypes.h>

/* --- growth --- */

typedef struct Shape {
    unsigned cluster_size, refcount_bits;
} Shape;

static uint64_t table_clusters(BlockBackend *blk)
{
    return image_state(blk)->header.reftable_clusters;
}

/* Writes @n clusters from @first on, each with its own byte. */
static void write_run(BlockBackend *blk, const Shape *shape, uint64_t first, uint64_t n)
{
    for (uint64_t i = first; i < first + n; i++) {
        image_write(blk, (int64_t)(i * shape->cluster_size), shape->cluster_size, (int)(i % 251));
    }
}

static void expect_run(BlockBackend *blk, const Shape *shape, uint64_t first, uint64_t n)
{
    for (uint64_t i = first; i < first + n; i++) {
        image_expect(blk, (int64_t)(i * shape->cluster_size), shape->cluster_size, (int)(i % 251));
    }
}

/* Host clusters without data are as good: only counts are looked at here. */
static void take_clusters(BlockBackend *blk, uint64_t n)
{
    BlockDriverState *bs = blk_bs(blk);
    BDRV_GRAPH_GUARD();
    int64_t offset = qcow2_alloc_clusters(bs, n * image_state(blk)->cluster_size);
    g_assert_cmpint(offset, >, 0);
    qcow2_free_run(bs, (uint64_t)offset, n * image_state(blk)->cluster_size, QCOW2_DISCARD_NEVER);
}

static void grow_image(RecFile *f, const Shape *shape, uint64_t per_block)
{
    g_autoptr(BlockBackend) blk = rec_open_rw(f);
    uint64_t entries = shape->cluster_size / 8, before = table_clusters(blk);
    uint64_t size = (uint64_t)blk_getlength(blk);
    write_run(blk, shape, 0, 20);
    /* Far enough for a table of the first length to be too short. */
    take_clusters(blk, per_block * (entries * before + 1));
    g_assert_cmpint(blk_flush(blk), ==, 0);
    g_assert_cmpuint(table_clusters(blk), >, before);
    write_run(blk, shape, 20, 20);
    uint64_t l1_size = image_state(blk)->header.l1_size;
    g_assert_true(blk_truncate(blk, (int64_t)(size * 40), true, PREALLOC_MODE_OFF, false, NULL));
    g_assert_cmpuint(image_state(blk)->header.l1_size, >, l1_size);
    uint64_t last = size * 40 / shape->cluster_size - 10;
    write_run(blk, shape, last, 10);
    expect_run(blk, shape, 0, 40);
    expect_run(blk, shape, last, 10);
}

static void test_growth(gconstpointer data)
{
    const Shape *shape = data;
    uint64_t entries = shape->cluster_size / 8;
    uint64_t per_block = shape->cluster_size * 8 / shape->refcount_bits;
    g_autofree char *opts = g_strdup_printf("size=%" PRIu64 ",cluster_size=%u,refcount_bits=%u",
                                            entries * shape->cluster_size, shape->cluster_size,
                                            shape->refcount_bits);
    RecFile *f = rec_image_new("i", opts, (per_block * entries + 4096) * 2 * shape->cluster_size);
    grow_image(f, shape, per_block);
    rec_check(f, false);
    g_autoptr(BlockBackend) blk = rec_open_rw(f);
    expect_run(blk, shape, 0, 40);
    g_clear_pointer(&blk, blk_unref);
    rec_file_free(f);
}

/* --- stopping --- */

typedef struct Stop {
    RecFile *file;
    QbProgress progress;
    unsigned left; /* flushes */
} Stop;

static void count_flush(void *opaque)
{
    Stop *stop = opaque;
    if (--stop->left == 0) {
        atomic_store(&stop->progress.cancel, true);
        return;
    }
    stop->file->on_flush = count_flush;
}

/* One amendment that is asked to stop at flush @n. True when it had ended before. */
static bool amend_until(RecFile *f, const char *options, unsigned n)
{
    Stop stop = {.file = f, .left = n};
    g_autoptr(BlockBackend) blk = rec_open_rw(f);
    g_autoptr(GError) err = NULL;
    qb_progress_init(&stop.progress, 0);
    f->opaque = &stop;
    f->on_flush = count_flush;
    bool ok = bdrv_amend(blk_bs(blk), qb_opts_parse(options, NULL, NULL), &stop.progress, &err);
    f->on_flush = NULL;
    g_assert_true(ok || g_error_matches(err, QB_ERROR, ECANCELED));
    return ok && !atomic_load(&stop.progress.cancel);
}

static void test_stop(gconstpointer data)
{
    const char *options = data;
    RecFile *whole = rec_image_new("whole", "size=2M,cluster_size=512", 64 * MIB);
    g_autoptr(BlockBackend) blk = rec_open_rw(whole);
    image_write(blk, 0, MIB, 7);
    g_assert_cmpint(blk_pwrite_zeroes(blk, 64 * KIB, 256 * KIB, 0), ==, 0);
    g_assert_true(bdrv_snapshot_create(blk_bs(blk), "s", NULL));
    g_assert_cmpint(blk_pwrite_zeroes(blk, 0, 64 * KIB, 0), ==, 0);
    g_clear_pointer(&blk, blk_unref);
    bool ended = false;
    for (unsigned n = 1; !ended; n++) {
        RecFile *f = rec_file_dup("stopped", whole);
        ended = amend_until(f, options, n);
        rec_check(f, false);
        g_assert_true(amend_until(f, options, UINT_MAX));
        rec_check(f, false);
        blk = rec_open_rw(f);
        image_expect(blk, 0, 320 * KIB, 0);
        image_expect(blk, 320 * KIB, MIB - 320 * KIB, 7);
        g_clear_pointer(&blk, blk_unref);
        rec_file_free(f);
    }
    rec_file_free(whole);
}

int main(int argc, char **argv)
{
    static Shape shapes[4 * 7];
    static const unsigned sizes[] = {512, 1024, 4096, 65536};
    size_t nb = 0;
    g_test_init(&argc, &argv, NULL);
    rec_setup();
    for (size_t i = 0; i < G_N_ELEMENTS(sizes); i++) {
        for (unsigned bits = 1; bits <= 64; bits *= 2) {
            /* What would need a file of terabytes before its table grows is left out. */
            uint64_t span = (uint64_t)sizes[i] * sizes[i] * sizes[i] / bits;
            if (span > UINT64_C(1) << 34) {
                continue;
            }
            shapes[nb] = (Shape){sizes[i], bits};
            g_autofree char *path = g_strdup_printf("/qcow2/growth/%u/%u", sizes[i], bits);
            g_test_add_data_func(path, &shapes[nb++], test_growth);
        }
    }
    g_test_add_data_func("/qcow2/stop/width", "refcount_bits=64", test_stop);
    g_test_add_data_func("/qcow2/stop/version", "compat=0.10", test_stop);
    int ret = g_test_run();
    image_teardown();
    return ret;
}
