/*
 * Copies of many extents from node to node: mapped on both sides, on one, on none.
 *
 *      source image   [ data | hole | data ...  ]      every 512 bytes differ
 *                        |  \________
 *      target image   [  1's ..  |  copied | .. ]      compared with a copy made in memory
 *
 * SPDX-License-Identifier: MIT
 */
#include "qcow2-image.h"

enum { SIZE = 6 * MIB, PLACE = 512 };

typedef struct Pair {
    BlockBackend *src, *dst;
    uint8_t *src_bytes, *expected; /* of SIZE */
} Pair;

/* A hole of whole clusters lies in the middle. */
static void fill_source(Pair *p)
{
    p->src_bytes = g_malloc0(SIZE);
    for (uint32_t i = 0; i < SIZE / PLACE; i++) {
        memset(p->src_bytes + i * PLACE, (int)(i % 251) + 1, PLACE);
        qb_stbe32(p->src_bytes + i * PLACE, i);
    }
    memset(p->src_bytes + 2 * MIB, 0, MIB + 64 * KIB);
    g_assert_cmpint(blk_pwrite(p->src, 0, 2 * MIB, p->src_bytes, 0), ==, 0);
    g_assert_cmpint(blk_pwrite(p->src, 3 * MIB + 64 * KIB, 3 * MIB - 64 * KIB,
                               p->src_bytes + 3 * MIB + 64 * KIB, 0), ==, 0);
}

static BlockBackend *open_side(const char *name, const char *debug)
{
    return debug ? image_open_debug(name, debug) : image_open_rw(name);
}

/* @src_debug, @dst_debug: options of a blkdebug below, which cannot be mapped; NULL: none. */
static void pair_open(Pair *p, const char *src_debug, const char *dst_debug)
{
    image_create("src", "size=6M");
    image_create("dst", "size=6M");
    p->src = image_open_rw("src");
    fill_source(p);
    blk_unref(p->src);
    p->src = open_side("src", src_debug);
    p->expected = g_malloc(SIZE);
    memset(p->expected, 0xee, SIZE);
    p->dst = image_open_rw("dst");
    image_write(p->dst, 0, 5 * MIB, 0xee);
    memset(p->expected + 5 * MIB, 0, MIB); /* to be allocated */
    blk_unref(p->dst);
    p->dst = open_side("dst", dst_debug);
}

static void pair_close(Pair *p)
{
    blk_unref(p->src);
    blk_unref(p->dst);
    g_free(p->src_bytes);
    g_free(p->expected);
    image_check("src");
    image_check("dst");
}

static void expect_target(const Pair *p)
{
    g_autofree uint8_t *buf = g_malloc(SIZE);
    g_assert_cmpint(blk_pread(p->dst, 0, SIZE, buf, 0), ==, 0);
    for (int64_t i = 0; i < SIZE; i++) {
        if (buf[i] != p->expected[i]) {
            g_error("byte %" PRId64 " is 0x%02x, not 0x%02x", i, buf[i], p->expected[i]);
        }
    }
}

/* Data, the hole, both; to the same place, elsewhere, inside clusters; longer than a piece; nothing. */
static const BdrvCopyExtent extents[] = {
    {0, 0, 512},
    {700, 9000, 1},
    {1 * MIB - 3, 1 * MIB + 5, 100},
    {64 * KIB, 64 * KIB, 64 * KIB},
    {0, 0, 0},
    {2 * MIB - 4096, 3 * MIB - 8192, 1 * MIB + 128 * KIB},
    {2 * MIB + 512, 2 * MIB + 512, 4096},
    {3 * MIB + 64 * KIB + 1, 4 * MIB + 512 * KIB - 7, 1 * MIB + 200001},
};

static int copy(const Pair *p, const BdrvCopyExtent *ext, size_t n, int flags)
{
    return blk_copy_extents(p->src, p->dst, ext, n, flags);
}

static void expect_copied(Pair *p, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        memcpy(p->expected + extents[i].dst_offset, p->src_bytes + extents[i].src_offset,
               (size_t)extents[i].bytes);
    }
    expect_target(p);
}

typedef struct Case {
    const char *name, *src_debug, *dst_debug;
    int flags;
} Case;

static const Case cases[] = {
    {"mapped", NULL, NULL, 0},
    {"mapped-sharing", NULL, NULL, BDRV_COPY_SHARING},
    {"source-not-mapped", "", NULL, 0},
    {"target-not-mapped", NULL, "", BDRV_COPY_SHARING},
    {"neither-mapped", "", "", 0},
};

static void test_extents(gconstpointer data)
{
    const Case *c = data;
    Pair p;
    pair_open(&p, c->src_debug, c->dst_debug);
    g_assert_cmpint(copy(&p, NULL, 0, c->flags), ==, 0);
    expect_target(&p);
    g_assert_cmpint(copy(&p, extents, G_N_ELEMENTS(extents), c->flags), ==, 0);
    expect_copied(&p, G_N_ELEMENTS(extents));
    pair_close(&p);
}

/* It ends at the first error: what comes before is there, what comes behind is not begun. */
static void test_error(gconstpointer data)
{
    bool reading = data;
    g_autofree char *debug =
        g_strdup_printf("file.inject-error.0.event=%s,file.inject-error.0.once=on",
                        reading ? "read_aio" : "write_aio");
    enum { FAILING = 3 };
    Pair p;
    pair_open(&p, reading ? "" : NULL, reading ? NULL : "");
    g_assert_cmpint(copy(&p, extents, FAILING, 0), ==, 0);
    blk_unref(reading ? p.src : p.dst);
    *(reading ? &p.src : &p.dst) = image_open_debug(reading ? "src" : "dst", debug);
    g_assert_cmpint(copy(&p, extents + FAILING, G_N_ELEMENTS(extents) - FAILING, 0), ==, -EIO);
    expect_copied(&p, FAILING);
    pair_close(&p);
}

/* One range is an extent. */
static void test_range(void)
{
    Pair p;
    pair_open(&p, NULL, NULL);
    g_assert_cmpint(bdrv_copy_range(blk_root(p.src), 12345, blk_root(p.dst), 4 * MIB + 54321, 999999),
                    ==, 0);
    memcpy(p.expected + 4 * MIB + 54321, p.src_bytes + 12345, 999999);
    expect_target(&p);
    pair_close(&p);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    image_setup();
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        g_autofree char *path = g_strdup_printf("/copy/extents/%s", cases[i].name);
        g_test_add_data_func(path, &cases[i], test_extents);
    }
    g_test_add_data_func("/copy/read-error", GINT_TO_POINTER(true), test_error);
    g_test_add_data_func("/copy/write-error", GINT_TO_POINTER(false), test_error);
    g_test_add_func("/copy/range", test_range);
    int ret = g_test_run();
    image_teardown();
    return ret;
}
