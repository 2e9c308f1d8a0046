/*
 * Counts of whole stretches, changed past the cache: all widths, over the borders of blocks, what
 * stays in the cache, what is refused with nothing changed, and a write that fails.
 *
 * SPDX-License-Identifier: MIT
 */
#include "qcow2-image.h"
#include "block/qcow2-refcount-bulk.h"

/* @n clusters in a row, with count 1. */
static uint64_t take(BlockBackend *blk, uint64_t n)
{
    BDRV_GRAPH_GUARD();
    uint64_t bytes = n * image_state(blk)->cluster_size;
    int64_t offset = qcow2_alloc_clusters(blk_bs(blk), bytes);
    g_assert_cmpint(offset, >, 0);
    return (uint64_t)offset;
}

/* All of the @n clusters from @offset on. */
static void expect_counts(BlockBackend *blk, uint64_t offset, uint64_t n, uint64_t expected)
{
    BDRV_GRAPH_GUARD();
    uint64_t end = offset + n * image_state(blk)->cluster_size, count, bytes;
    for (; offset < end; offset += bytes) {
        g_assert_cmpint(qcow2_count_run(blk_bs(blk), offset, end - offset, &count, &bytes), ==, 0);
        g_assert_cmpuint(count, ==, expected);
    }
}

static void add(GArray *list, BlockBackend *blk, uint64_t start, uint64_t n, int64_t refs)
{
    uint64_t bytes = n * image_state(blk)->cluster_size;
    g_array_append_val(list, ((Qcow2Stretch){start, start + bytes, refs}));
}

static GArray *new_list(void)
{
    return g_array_new(false, false, sizeof(Qcow2Stretch));
}

static GArray *new_runs(void)
{
    return g_array_new(false, false, sizeof(Qcow2HostRun));
}

static int judge(BlockBackend *blk, const GArray *list)
{
    BDRV_GRAPH_GUARD();
    return qcow2_bulk_judge(blk_bs(blk), list);
}

static int raise_all(BlockBackend *blk, const GArray *list)
{
    BDRV_GRAPH_GUARD();
    return qcow2_bulk_raise(blk_bs(blk), list);
}

static int lower_all(BlockBackend *blk, const GArray *list, GArray *ones, GArray *rest)
{
    BDRV_GRAPH_GUARD();
    return qcow2_bulk_lower(blk_bs(blk), list, ones, rest);
}

static uint64_t clusters_of(BlockBackend *blk, const GArray *runs)
{
    uint64_t bytes = 0;
    for (guint i = 0; i < runs->len; i++) {
        bytes += g_array_index(runs, Qcow2HostRun, i).bytes;
    }
    return bytes / image_state(blk)->cluster_size;
}

static BlockBackend *open_with_width(unsigned bits)
{
    g_autofree char *opts = g_strdup_printf("size=1M,cluster_size=512,refcount_bits=%u", bits);
    image_create("image", opts);
    return image_open_rw("image");
}

/* Over many blocks, some of which are in the cache before. */
static void test_width(gconstpointer opaque)
{
    g_autoptr(GArray) list = new_list();
    g_autoptr(GArray) ones = new_runs();
    g_autoptr(GArray) rest = new_runs();
    BlockBackend *blk = open_with_width(GPOINTER_TO_UINT(opaque));
    uint64_t size = image_state(blk)->cluster_size, low = take(blk, 40000) + 7 * size;
    uint64_t high = low + 30001 * size;
    expect_counts(blk, low, 5000, 1);
    add(list, blk, low, 30000, 1);
    add(list, blk, high, 900, 2);
    g_assert_cmpint(judge(blk, list), ==, 0);
    g_assert_cmpint(raise_all(blk, list), ==, 0);
    expect_counts(blk, low - 7 * size, 7, 1);
    expect_counts(blk, low, 30000, 2);
    expect_counts(blk, high - size, 1, 1);
    expect_counts(blk, high, 900, 3);
    expect_counts(blk, high + 900 * size, 500, 1);

    g_array_index(list, Qcow2Stretch, 1).refs = 1;
    g_assert_cmpint(lower_all(blk, list, ones, rest), ==, 0);
    expect_counts(blk, low - 7 * size, 30007, 1);
    expect_counts(blk, high, 900, 2);
    g_assert_cmpuint(clusters_of(blk, ones), ==, 30000);
    g_assert_cmpuint(rest->len, ==, 0);
    blk_unref(blk);
}

/* What is about to become free, or has too few, is named for each reference and left alone. */
static void test_last_references(void)
{
    g_autoptr(GArray) list = new_list();
    g_autoptr(GArray) ones = new_runs();
    g_autoptr(GArray) rest = new_runs();
    BlockBackend *blk = open_with_width(16);
    uint64_t size = image_state(blk)->cluster_size, at = take(blk, 1000);
    add(list, blk, at, 100, 1);
    g_assert_cmpint(raise_all(blk, list), ==, 0);
    g_array_set_size(list, 0);
    add(list, blk, at, 50, 1);
    add(list, blk, at + 50 * size, 50, 2);
    add(list, blk, at + 100 * size, 10, 1);
    add(list, blk, at + 110 * size, 5, 3);
    g_assert_cmpint(lower_all(blk, list, ones, rest), ==, 0);
    g_assert_cmpuint(clusters_of(blk, ones), ==, 50);
    g_assert_cmpuint(g_array_index(ones, Qcow2HostRun, 0).offset, ==, at);
    g_assert_cmpuint(clusters_of(blk, rest), ==, 2 * 50 + 10 + 3 * 5);
    expect_counts(blk, at, 50, 1);
    expect_counts(blk, at + 50 * size, 50, 2);
    expect_counts(blk, at + 100 * size, 15, 1);
    blk_unref(blk);
}

/* Counts without room, of free clusters and of clusters without a block: nothing has changed. */
static void test_refused(void)
{
    g_autoptr(GArray) list = new_list();
    BlockBackend *blk = open_with_width(2);
    uint64_t size = image_state(blk)->cluster_size, at = take(blk, 20000);
    add(list, blk, at + 19000 * size, 3, 1);
    g_assert_cmpint(raise_all(blk, list), ==, 0);
    g_array_set_size(list, 0);
    add(list, blk, at, 18000, 2);
    add(list, blk, at + 18999 * size, 2, 2);
    g_assert_cmpint(judge(blk, list), ==, -EUCLEAN);
    g_assert_cmpint(raise_all(blk, list), ==, -EUCLEAN);
    expect_counts(blk, at, 19000, 1);
    expect_counts(blk, at + 19000 * size, 3, 2);
    static const uint64_t wrong[] = {20100, 1 << 20, UINT64_C(1) << 40};
    for (size_t i = 0; i < G_N_ELEMENTS(wrong); i++) {
        g_array_set_size(list, 1);
        add(list, blk, at + wrong[i] * size, 1, 1);
        g_assert_cmpint(raise_all(blk, list), ==, -EUCLEAN);
        expect_counts(blk, at, 19000, 1);
    }
    blk_unref(blk);
}

/* Two entries of the refcount table for one block. */
static void test_block_named_twice(void)
{
    g_autoptr(GArray) list = new_list();
    BlockBackend *blk = open_with_width(64);
    uint64_t at = take(blk, 1000);
    BDRVQcow2State *s = image_state(blk);
    uint64_t *entries = s->reftable.entries, saved = entries[3];
    add(list, blk, at, 900, 1);
    entries[3] = entries[4];
    g_assert_cmpint(judge(blk, list), ==, -EUCLEAN);
    entries[3] = saved;
    g_assert_cmpint(judge(blk, list), ==, 0);
    blk_unref(blk);
}

/* One batch of several cannot be written: the others are taken back. */
static void test_write_error(void)
{
    enum { N = 4200 * 64 };
    g_autoptr(GArray) list = new_list();
    BlockBackend *blk = open_with_width(64);
    uint64_t at = take(blk, N);
    blk_unref(blk);
    blk = image_open_debug("image", "file.inject-error.0.event=refblock_update_part,"
                                    "file.inject-error.0.once=on,file.inject-error.0.errno=5");
    add(list, blk, at, N, 1);
    g_assert_cmpint(raise_all(blk, list), ==, -EIO);
    expect_counts(blk, at, N, 1);
    g_assert_cmpint(raise_all(blk, list), ==, 0);
    expect_counts(blk, at, N, 2);
    blk_unref(blk);
}

int main(int argc, char **argv)
{
    static const unsigned widths[] = {2, 4, 8, 16, 32, 64};
    g_test_init(&argc, &argv, NULL);
    image_setup();
    for (size_t i = 0; i < G_N_ELEMENTS(widths); i++) {
        g_autofree char *name = g_strdup_printf("/qcow2-refcount-bulk/width-%u", widths[i]);
        g_test_add_data_func(name, GUINT_TO_POINTER(widths[i]), test_width);
    }
    g_test_add_func("/qcow2-refcount-bulk/last-references", test_last_references);
    g_test_add_func("/qcow2-refcount-bulk/refused", test_refused);
    g_test_add_func("/qcow2-refcount-bulk/block-named-twice", test_block_named_twice);
    g_test_add_func("/qcow2-refcount-bulk/write-error", test_write_error);
    int ret = g_test_run();
    image_teardown();
    return ret;
}
