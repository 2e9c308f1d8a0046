/*
 * Emptying images of which snapshots keep something: what is left is exact, small and sound,
 * wherever the structure in use, what is kept and what is dropped lie to each other.
 *
 * SPDX-License-Identifier: MIT
 */
#include "qcow2-image.h"

enum { SIZE = 256 * KIB, BASE_VALUE = 0xbb, MAX_SNAPSHOTS = 3 };

typedef struct Shape {
    const char *options;
    int64_t cluster;
} Shape;

static const Shape shapes[] = {
    {"cluster_size=512", 512},
    {"cluster_size=512,refcount_bits=64", 512},
    {"cluster_size=512,refcount_bits=8", 512},
    {"cluster_size=512,compat=0.10", 512},
    {"cluster_size=1k,refcount_bits=32", 1024},
    {"cluster_size=4k", 4096},
    {"cluster_size=512,lazy_refcounts=on,refcount_bits=32", 512},
};

static void make_chain(const Shape *shape)
{
    g_autofree char *base = image_path("base");
    g_autofree char *options = g_strdup_printf("size=%d,backing_file=%s,backing_fmt=qcow2,%s", SIZE,
                                               base, shape->options);
    image_create("base", "size=256k");
    g_autoptr(BlockBackend) blk = image_open_rw("base");
    image_write(blk, 0, SIZE, BASE_VALUE);
    image_create("image", options);
}

static void take_snapshot(BlockBackend *blk, unsigned number, uint8_t *ret_content)
{
    GError *err = NULL;
    g_autofree char *name = g_strdup_printf("s%u", number);
    bdrv_snapshot_create(blk_bs(blk), name, &err);
    g_assert_no_error(err);
    g_assert_cmpint(blk_pread(blk, 0, SIZE, ret_content, 0), ==, 0);
}

static void drop_snapshot(BlockBackend *blk, unsigned number)
{
    GError *err = NULL;
    g_autofree char *name = g_strdup_printf("s%u", number);
    bdrv_snapshot_delete(blk_bs(blk), NULL, name, &err);
    g_assert_no_error(err);
}

/* Writes and discards here and there; sometimes everything. */
static void change_content(BlockBackend *blk, GRand *r, const Shape *shape)
{
    unsigned n = (unsigned)g_rand_int_range(r, 0, 30);
    if (g_rand_int_range(r, 0, 3) == 0) {
        image_write(blk, 0, SIZE, g_rand_int_range(r, 1, 250));
    }
    for (unsigned i = 0; i < n; i++) {
        int64_t bytes = g_rand_int_range(r, 1, 40) * shape->cluster;
        int64_t offset = g_rand_int_range(r, 0, (gint32)(SIZE / shape->cluster)) * shape->cluster;
        bytes = MIN(bytes, SIZE - offset);
        if (g_rand_int_range(r, 0, 3)) {
            image_write(blk, offset, bytes, g_rand_int_range(r, 1, 250));
        } else {
            g_assert_cmpint(blk_pdiscard(blk, offset, bytes), ==, 0);
        }
    }
}

/* Where the last cluster with a count ends. */
static uint64_t used_end(BlockBackend *blk)
{
    BDRVQcow2State *s = image_state(blk);
    int64_t length = bdrv_getlength(blk_bs(blk)->file->bs);
    uint64_t end = 0, n, count;
    BDRV_GRAPH_GUARD();
    for (uint64_t at = 0; at < (uint64_t)length; at += n) {
        uint64_t left = qb_align_up((uint64_t)length - at, s->cluster_size);
        g_assert_cmpint(qcow2_count_run(blk_bs(blk), at, left, &count, &n), ==, 0);
        end = count ? at + n : end;
    }
    return end;
}

/* A writable open would repair what the bit tells of. */
static void expect_clean(void)
{
    g_autoptr(BlockBackend) blk = image_open("image", NULL, BDRV_O_CHECK | BDRV_O_NO_BACKING);
    g_assert_false(qcow2_dirty_bit(image_state(blk)));
}

static void expect_empty(const uint8_t *const kept[], const Shape *shape)
{
    g_autofree uint8_t *content = g_malloc(SIZE);
    image_check("image");
    expect_clean();
    g_autoptr(BlockBackend) blk = image_open_rw("image");
    image_expect(blk, 0, SIZE, BASE_VALUE);
    int64_t length = bdrv_getlength(blk_bs(blk)->file->bs);
    g_assert_cmpuint(qb_align_up((uint64_t)length, (uint64_t)shape->cluster), ==, used_end(blk));
    for (unsigned i = 0; i < MAX_SNAPSHOTS; i++) {
        GError *err = NULL;
        g_autofree char *name = g_strdup_printf("s%u", i);
        if (kept[i]) {
            bdrv_snapshot_apply(blk_bs(blk), name, &err);
            g_assert_no_error(err);
            g_assert_cmpint(blk_pread(blk, 0, SIZE, content, 0), ==, 0);
            g_assert_cmpmem(content, SIZE, kept[i], SIZE);
        }
    }
    image_write(blk, 0, SIZE, 7); /* nothing that is kept is taken for this */
}

static void empty_one(GRand *r, const Shape *shape)
{
    g_autofree uint8_t *memory = g_malloc((gsize)MAX_SNAPSHOTS * SIZE);
    const uint8_t *kept[MAX_SNAPSHOTS] = {NULL};
    GError *err = NULL;
    make_chain(shape);
    BlockBackend *blk = image_open_rw("image");
    for (int steps = g_rand_int_range(r, 1, 8); steps > 0; steps--) {
        unsigned i = (unsigned)g_rand_int_range(r, 0, MAX_SNAPSHOTS);
        change_content(blk, r, shape);
        if (kept[i]) {
            drop_snapshot(blk, i);
            kept[i] = NULL;
        } else {
            take_snapshot(blk, i, memory + (gsize)i * SIZE);
            kept[i] = memory + (gsize)i * SIZE;
        }
        g_assert_cmpint(blk_flush(blk), ==, 0); /* what was freed may be used again */
    }
    change_content(blk, r, shape);
    blk_make_empty(blk, false, &err);
    g_assert_no_error(err);
    if (g_rand_boolean(r)) {
        image_write(blk, 0, SIZE, BASE_VALUE);
        blk_make_empty(blk, true, &err);
        g_assert_no_error(err);
    }
    blk_unref(blk);
    expect_empty(kept, shape);
    image_check("image");
}

static void test_random(gconstpointer opaque)
{
    const Shape *shape = opaque;
    for (unsigned i = 0; i < (g_test_slow() ? 500 : 12); i++) {
        guint32 seed = g_test_rand_int();
        g_test_message("seed %u", seed);
        g_autoptr(GRand) r = g_rand_new_with_seed(seed);
        empty_one(r, shape);
    }
}

/* The structure first lies in a part of the file that nothing else needs counts for, and whose counts
 * are a block that could stay; at the front, where what is dropped was, it needs that no more. */
static void test_alone_in_its_block(void)
{
    const Shape *shape = &shapes[1];
    const uint64_t part = 64 * 512; /* what a block counts */
    g_autofree uint8_t *memory = g_malloc(SIZE);
    const uint8_t *kept[MAX_SNAPSHOTS] = {memory};
    GError *err = NULL;
    make_chain(shape);
    BlockBackend *blk = image_open_rw("image");
    bdrv_graph_rdlock();
    int64_t dropped = qcow2_alloc_clusters(blk_bs(blk), 6 * part);
    bdrv_graph_rdunlock();
    g_assert_cmpint(dropped, >, 0);
    image_write(blk, 0, 64 * KIB, 1);
    take_snapshot(blk, 0, memory);
    int64_t room = (int64_t)qb_align_up((uint64_t)dropped + part, part);
    bdrv_graph_rdlock();
    qcow2_free_run(blk_bs(blk), (uint64_t)room, 2 * part, QCOW2_DISCARD_ALWAYS);
    bdrv_graph_rdunlock();
    g_assert_cmpint(blk_flush(blk), ==, 0);
    bdrv_graph_rdlock();
    for (int64_t at = 0; at < room; ) {
        at = qcow2_alloc_clusters(blk_bs(blk), 512); /* none is left before it */
        g_assert_cmpint(at, >, 0);
    }
    bdrv_graph_rdunlock();
    blk_make_empty(blk, false, &err);
    g_assert_no_error(err);
    blk_unref(blk);
    expect_empty(kept, shape);
}

/* The structure lies as near to the front as can be at once: it does not move, and all is settled. */
static void test_stays_at_once(void)
{
    const Shape *shape = &shapes[1];
    g_autofree uint8_t *memory = g_malloc(SIZE);
    const uint8_t *kept[MAX_SNAPSHOTS] = {memory};
    GError *err = NULL;
    make_chain(shape);
    BlockBackend *blk = image_open_rw("image");
    bdrv_graph_rdlock();
    int64_t gap = qcow2_alloc_clusters(blk_bs(blk), 4 * 512);
    bdrv_graph_rdunlock();
    g_assert_cmpint(gap, >, 0);
    image_write(blk, 0, 64 * KIB, 1);
    blk_truncate(blk, 4 * MIB, false, PREALLOC_MODE_OFF, false, &err); /* the L1 moves */
    g_assert_no_error(err);
    take_snapshot(blk, 0, memory);
    bdrv_graph_rdlock();
    qcow2_free_run(blk_bs(blk), (uint64_t)gap, 4 * 512, QCOW2_DISCARD_ALWAYS);
    bdrv_graph_rdunlock();
    g_assert_cmpint(blk_flush(blk), ==, 0);
    blk_make_empty(blk, false, &err);
    g_assert_no_error(err);
    g_assert_cmpuint(image_state(blk)->header.l1_offset, ==, (uint64_t)gap);
    blk_unref(blk);
    expect_empty(kept, shape);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    image_setup();
    for (size_t i = 0; i < G_N_ELEMENTS(shapes); i++) {
        g_autofree char *name = g_strdup_printf("/qcow2-empty/%s", shapes[i].options);
        g_test_add_data_func(name, &shapes[i], test_random);
    }
    g_test_add_func("/qcow2-empty/alone-in-its-block", test_alone_in_its_block);
    g_test_add_func("/qcow2-empty/stays-at-once", test_stays_at_once);
    int ret = g_test_run();
    image_teardown();
    return ret;
}
