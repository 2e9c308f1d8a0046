/*
 * Block status: layers, chains, holes below, merging, ends.
 *
 * Nodes are drawn as strings, one character for 4 KiB.  "test-map" is a file: d data, h hole.
 * "test-fmt" is a format over a file: d data at the same place of its file, p data far beyond the
 * file's end, c compressed, z zeroes, . not allocated.  Each answer is about one character, so that
 * everything longer was merged by the core.
 *
 * SPDX-License-Identifier: MIT
 */
#include "mem-driver.h"

#define UNIT 4096

typedef struct MapState {
    char *layout;
    _Atomic(unsigned) lookups;
} MapState;

static bool map_open(BlockDriverState *bs, json_t *options, int flags, GError **errp)
{
    MapState *s = bs->opaque;
    s->layout = qb_opt_take_string(options, "layout");
    g_assert_nonnull(s->layout);
    return bs->drv->protocol_name
           || bdrv_open_file_child(bs, NULL, options, BDRV_CHILD_IMAGE, errp);
}

static void map_close(BlockDriverState *bs)
{
    g_free(((MapState *)bs->opaque)->layout);
}

static int64_t map_getlength(BlockDriverState *bs)
{
    return (int64_t)strlen(((MapState *)bs->opaque)->layout) * UNIT;
}

static char map_look(BlockDriverState *bs, int64_t offset, int64_t bytes, BdrvStatus *ret)
{
    MapState *s = bs->opaque;
    s->lookups++;
    *ret = (BdrvStatus){
        .bytes = MIN(bytes, UNIT - offset % UNIT),
        .host_offset = offset,
        .host_node = bs->file ? bs->file->bs : bs,
    };
    return s->layout[offset / UNIT];
}

static int map_block_status(BlockDriverState *bs, int64_t offset, int64_t bytes, BdrvStatus *ret)
{
    char c = map_look(bs, offset, bytes, ret);
    ret->flags = BDRV_BLOCK_OFFSET_VALID | (c == 'h' ? BDRV_BLOCK_ZERO : BDRV_BLOCK_DATA);
    return 0;
}

static int fmt_block_status(BlockDriverState *bs, int64_t offset, int64_t bytes, BdrvStatus *ret)
{
    const int stored = BDRV_BLOCK_DATA | BDRV_BLOCK_OFFSET_VALID | BDRV_BLOCK_RECURSE;
    switch (map_look(bs, offset, bytes, ret)) {
    case 'p':
        ret->host_offset += 1 << 30;
        /* fall through */
    case 'd':
        ret->flags = stored;
        break;
    case 'c':
        ret->flags = BDRV_BLOCK_DATA | BDRV_BLOCK_COMPRESSED;
        break;
    case 'z':
        ret->flags = BDRV_BLOCK_ZERO;
        break;
    case 'E':
        return -EIO;
    }
    return 0;
}

static int fmt_find_allocated(BlockDriverState *bs, int64_t offset, int64_t bytes, GArray *ranges)
{
    MapState *s = bs->opaque;
    for (int64_t at = offset; at < offset + bytes; at += UNIT) {
        if (s->layout[at / UNIT] != '.') {
            g_array_append_val(ranges, ((BdrvRange){at, UNIT}));
        }
    }
    return 0;
}

static int map_preadv(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                      IoVector *qiov, size_t qiov_offset, int flags)
{
    g_assert_not_reached(); /* status never reads */
}

static void map_refresh_limits(BlockDriverState *bs)
{
    bs->bl.request_alignment = bs->drv->protocol_name ? 512 : 1;
}

static const char *const map_strong_options[] = {"layout", NULL};

static const BlockDriver map_driver = {
    .format_name = "test-map",
    .protocol_name = "test-map",
    .instance_size = sizeof(MapState),
    .strong_options = map_strong_options,
    .open = map_open,
    .close = map_close,
    .getlength = map_getlength,
    .refresh_limits = map_refresh_limits,
    .preadv = map_preadv,
    .block_status = map_block_status,
};

static const BlockDriver fmt_driver = {
    .format_name = "test-fmt",
    .is_format = true,
    .supports_backing = true,
    .instance_size = sizeof(MapState),
    .strong_options = map_strong_options,
    .open = map_open,
    .close = map_close,
    .getlength = map_getlength,
    .preadv = map_preadv,
    .block_status = fmt_block_status,
    .find_allocated = fmt_find_allocated,
};

/* --- what is expected --- */

#define D BDRV_BLOCK_DATA
#define Z BDRV_BLOCK_ZERO
#define V BDRV_BLOCK_OFFSET_VALID
#define A BDRV_BLOCK_ALLOCATED
#define E BDRV_BLOCK_EOF
#define C BDRV_BLOCK_COMPRESSED

typedef struct Want {
    int64_t units; /* length of the extent */
    int flags, depth;
} Want;

/* Walks the node by one call per extent and compares. @base NULL: the whole chain. */
static void expect_chain(BlockDriverState *bs, BlockDriverState *base, const Want *want)
{
    int64_t offset = 0, length = bdrv_getlength(bs);
    for (; offset < length; want++) {
        BdrvStatus st;
        g_assert_cmpint(bdrv_block_status_above(bs, base, offset, length - offset, &st), ==, 0);
        g_assert_cmpint(st.bytes, ==, want->units * UNIT);
        g_assert_cmphex((guint64)st.flags, ==, (guint64)want->flags);
        g_assert_cmpint(st.depth, ==, want->depth);
        offset += st.bytes;
    }
    g_assert_cmpint(want->units, ==, 0);
}

static void expect_node(BlockDriverState *bs, const Want *want)
{
    int64_t offset = 0, length = bdrv_getlength(bs);
    for (; offset < length; want++) {
        BdrvStatus st;
        g_assert_cmpint(bdrv_block_status(bs, offset, length - offset, &st), ==, 0);
        g_assert_cmpint(st.bytes, ==, want->units * UNIT);
        g_assert_cmphex((guint64)st.flags, ==, (guint64)want->flags);
        offset += st.bytes;
    }
    g_assert_cmpint(want->units, ==, 0);
}

static BlockDriverState *backing(BlockDriverState *bs)
{
    return bs->backing->bs;
}

/* --- cases --- */

static void test_protocol(void)
{
    g_autoptr(BlockDriverState) bs = open_node("driver=test-map,layout=ddhhhd", 0);
    expect_node(bs, (Want[]){{2, D | V | A, 0}, {3, Z | V | A, 0}, {1, D | V | A | E, 0}, {0}});
}

static void test_no_callback(void)
{
    g_autoptr(BlockDriverState) bs = open_node("driver=test-mem,size=12288", 0);
    expect_node(bs, (Want[]){{3, D | V | A | E, 0}, {0}});
}

static void test_raw(void)
{
    g_autoptr(BlockDriverState) bs =
        open_node("driver=raw,offset=4096,file.driver=test-map,file.layout=ddhhhd", 0);
    BdrvStatus st;
    expect_node(bs, (Want[]){{1, D | V | A, 0}, {3, Z | V | A, 0}, {1, D | V | A | E, 0}, {0}});
    g_assert_cmpint(bdrv_block_status(bs, UNIT, 100 * UNIT, &st), ==, 0);
    g_assert_cmpint(st.host_offset, ==, 2 * UNIT);
    g_assert_true(st.host_node == bs->file->bs);
}

static void test_raw_over_chain(void)
{
    g_autoptr(BlockDriverState) bs = open_node(
        "driver=raw,file.driver=test-fmt,file.layout=d..z,file.file.driver=test-map,"
        "file.file.layout=dddd,file.backing.driver=test-map,file.backing.layout=hd", 0);
    expect_node(bs, (Want[]){{1, D | V | A, 0}, {1, D | V | A, 0}, {2, Z | A | E, 0}, {0}});
}

static void test_filter(void)
{
    g_autoptr(BlockDriverState) bs =
        open_node("driver=blkdebug,image.driver=test-fmt,image.layout=d..z,"
                  "image.file.driver=test-map,image.file.layout=dddd,"
                  "image.backing.driver=test-map,image.backing.layout=ddd", 0);
    expect_node(bs, (Want[]){{1, D | V | A, 0}, {2, 0, 0}, {1, Z | A | E, 0}, {0}});
    expect_chain(bs, NULL,
                 (Want[]){{1, D | V | A, 0}, {2, D | V | A, 1}, {1, Z | A | E, 0}, {0}});
    expect_chain(bs, backing(bs->file->bs),
                 (Want[]){{1, D | V | A, 0}, {2, 0, -1}, {1, Z | A | E, 0}, {0}});
}

static void test_holes_below(void)
{
    g_autoptr(BlockDriverState) bs = open_node(
        "driver=test-fmt,layout=ddddppcz,file.driver=test-map,file.layout=dhhddd", 0);
    expect_node(bs, (Want[]){{1, D | V | A, 0}, {2, D | V | A | Z, 0}, {1, D | V | A, 0},
                             {2, D | V | A | Z, 0}, {1, D | A | C, 0}, {1, Z | A | E, 0}, {0}});
}

#define CHAIN                                                                                      \
    "driver=test-fmt,layout=d....z....,file.driver=test-map,file.layout=dddddddddd,"               \
    "backing.driver=test-fmt,backing.layout=dddd....,backing.file.driver=test-map,"                \
    "backing.file.layout=ddhhdddd,backing.backing.driver=test-map,backing.backing.layout=hhhhhhdd"

static void test_chain(void)
{
    g_autoptr(BlockDriverState) bs = open_node(CHAIN, 0);
    expect_chain(bs, NULL,
                 (Want[]){{1, D | V | A, 0}, {1, D | V | A, 1}, {2, D | V | Z | A, 1},
                          {1, Z | V | A, 2}, {1, Z | A, 0}, {2, D | V | A, 2},
                          {2, Z | A | E, 0}, {0}});
    expect_node(bs, (Want[]){{1, D | V | A, 0}, {4, 0, 0}, {1, Z | A, 0}, {2, 0, 0},
                             {2, Z | E, 0}, {0}});
}

static void test_base(void)
{
    g_autoptr(BlockDriverState) bs = open_node(CHAIN, 0);
    expect_chain(bs, backing(bs),
                 (Want[]){{1, D | V | A, 0}, {4, 0, -1}, {1, Z | A, 0}, {2, 0, -1},
                          {2, Z | E, -1}, {0}});
    expect_chain(bs, backing(backing(bs)),
                 (Want[]){{1, D | V | A, 0}, {1, D | V | A, 1}, {2, D | V | Z | A, 1},
                          {1, 0, -1}, {1, Z | A, 0}, {2, 0, -1}, {2, Z | A | E, 0}, {0}});
    expect_chain(bs, bs, (Want[]){{10, E, -1}, {0}});
}

typedef struct Alloc {
    int64_t units;
    int flags;
} Alloc;

static void expect_allocated(BlockDriverState *bs, BlockDriverState *base, bool include_base,
                             const Alloc *want)
{
    int64_t offset = 0, length = bdrv_getlength(bs), n;
    for (; offset < length; want++) {
        int ret = bdrv_is_allocated_above(bs, base, include_base, offset, length - offset, &n);
        g_assert_cmphex((guint64)ret, ==, (guint64)want->flags);
        g_assert_cmpint(n, ==, want->units * UNIT);
        offset += n;
    }
    g_assert_cmpint(want->units, ==, 0);
}

static void test_is_allocated(void)
{
    g_autoptr(BlockDriverState) bs = open_node(CHAIN, 0);
    MapState *file = bs->file->bs->opaque;
    expect_allocated(bs, bs, true, (Alloc[]){{1, A}, {4, 0}, {1, A | Z}, {4, 0}, {0}});
    expect_allocated(bs, backing(bs), false, (Alloc[]){{1, A}, {4, 0}, {1, A | Z}, {4, 0}, {0}});
    /* the middle layer is shorter than the top: what is beyond its end is decided */
    expect_allocated(bs, backing(backing(bs)), false,
                     (Alloc[]){{4, A}, {1, 0}, {1, A | Z}, {2, 0}, {2, A | Z}, {0}});
    expect_allocated(bs, backing(bs), true,
                     (Alloc[]){{4, A}, {1, 0}, {1, A | Z}, {2, 0}, {2, A | Z}, {0}});
    g_assert_cmpuint(file->lookups, ==, 0); /* nobody asked the file */
}

/* In [@first, +@n), in units: @want are first and last unit of each range. */
static void expect_found(BlockDriverState *bs, BlockDriverState *base, int64_t first, int64_t n,
                         guint count, const int64_t (*want)[2])
{
    g_autoptr(GArray) ranges = g_array_new(false, false, sizeof(BdrvRange));
    g_array_append_val(ranges, ((BdrvRange){77, 77})); /* makes room for the answer */
    g_assert_cmpint(bdrv_find_allocated_above(bs, base, first * UNIT, n * UNIT, ranges), ==, 0);
    g_assert_cmpuint(ranges->len, ==, count);
    for (guint i = 0; i < count; i++) {
        const BdrvRange *r = &g_array_index(ranges, BdrvRange, i);
        g_assert_cmpint(r->offset, ==, want[i][0] * UNIT);
        g_assert_cmpint(r->offset + r->bytes, ==, (want[i][1] + 1) * UNIT);
    }
}

static void test_find_allocated(void)
{
    g_autoptr(BlockDriverState) bs = open_node(CHAIN, 0);
    g_autoptr(GArray) none = g_array_new(false, false, sizeof(BdrvRange));
    expect_found(bs, bs, 0, 10, 0, NULL);
    expect_found(bs, backing(bs), 0, 10, 2, (const int64_t[][2]){{0, 0}, {5, 5}});
    /* the middle layer is shorter than the top */
    expect_found(bs, backing(backing(bs)), 0, 10, 3,
                 (const int64_t[][2]){{0, 3}, {5, 5}, {8, 9}});
    expect_found(bs, backing(backing(bs)), 3, 4, 2, (const int64_t[][2]){{3, 3}, {5, 5}});
    expect_found(bs, backing(backing(bs)), 9, 100, 1, (const int64_t[][2]){{9, 9}});
    expect_found(bs, backing(backing(bs)), 10, 1, 0, NULL);
    expect_found(bs, NULL, 0, 10, 1, (const int64_t[][2]){{0, 9}}); /* the lowest cannot tell */
    g_assert_cmpint(bdrv_find_allocated_above(bs, NULL, -1, 1, none), ==, -EINVAL);
}

static void test_is_zero(void)
{
    g_autoptr(BlockDriverState) bs = open_node(CHAIN, 0);
    g_assert_cmpint(bdrv_is_zero_fast(bs, 2 * UNIT, 4 * UNIT), ==, 1);
    g_assert_cmpint(bdrv_is_zero_fast(bs, 2 * UNIT, 5 * UNIT), ==, 0);
    g_assert_cmpint(bdrv_is_zero_fast(bs, 8 * UNIT, 100 * UNIT), ==, 1);
    g_assert_cmpint(bdrv_is_zero_fast(bs, 0, 1), ==, 0);
    g_assert_cmpint(bdrv_is_zero_fast(bs, 0, 0), ==, 1);
    g_assert_cmpint(bdrv_is_zero_fast(bs, 100 * UNIT, 1), ==, 1);
}

static void test_ends(void)
{
    g_autoptr(BlockDriverState) bs = open_node("driver=test-map,layout=dh", 0);
    BdrvStatus st;
    g_assert_cmpint(bdrv_block_status(bs, 2 * UNIT, 1, &st), ==, 0);
    g_assert_cmpint(st.bytes, ==, 0);
    g_assert_cmphex((guint64)st.flags, ==, E);
    g_assert_cmpint(bdrv_block_status(bs, -1, 1, &st), ==, -EINVAL);
    g_assert_cmpint(bdrv_block_status(bs, 1, INT64_MAX, &st), ==, -EINVAL);
    g_assert_cmpint(bdrv_block_status(bs, 0, INT64_MAX, &st), ==, 0);
    g_assert_cmpint(st.bytes, ==, UNIT);
}

static void test_unaligned(void)
{
    g_autoptr(BlockDriverState) bs = open_node("driver=test-map,layout=ddh", 0);
    BdrvStatus st;
    g_assert_cmpint(bdrv_block_status(bs, 4001, 100, &st), ==, 0);
    g_assert_cmpint(st.bytes, ==, 100);
    g_assert_cmpint(st.host_offset, ==, 4001);
    g_assert_cmpint(bdrv_block_status(bs, 8191, 3, &st), ==, 0);
    g_assert_cmpint(st.bytes, ==, 1);
}

static void test_error(void)
{
    g_autoptr(BlockDriverState) bs = open_node(
        "driver=test-fmt,layout=dE,file.driver=test-map,file.layout=dd", 0);
    BdrvStatus st = {.bytes = 77};
    g_assert_cmpint(bdrv_block_status(bs, 0, 2 * UNIT, &st), ==, 0);
    g_assert_cmpint(st.bytes, ==, UNIT); /* what was found before the error is told */
    g_assert_cmpint(bdrv_block_status(bs, UNIT, UNIT, &st), ==, -EIO);
    g_assert_cmpint(st.bytes, ==, UNIT);
}

static void test_null(void)
{
    g_autoptr(BlockDriverState) data = open_node("driver=null-co,size=1E", 0);
    g_autoptr(BlockDriverState) zero = open_node("driver=null-co,size=1E,read-zeroes=on", 0);
    BdrvStatus st;
    g_assert_cmpint(bdrv_block_status(data, 0, INT64_MAX, &st), ==, 0);
    g_assert_cmpint(st.bytes, ==, (int64_t)1 << 60);
    g_assert_cmphex((guint64)st.flags, ==, D | V | A | E);
    g_assert_cmpint(bdrv_is_zero_fast(zero, 0, (int64_t)1 << 60), ==, 1);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    mem_drivers_register();
    bdrv_register(&map_driver);
    bdrv_register(&fmt_driver);
    g_test_add_func("/status/protocol", test_protocol);
    g_test_add_func("/status/no-callback", test_no_callback);
    g_test_add_func("/status/raw", test_raw);
    g_test_add_func("/status/raw-over-chain", test_raw_over_chain);
    g_test_add_func("/status/filter", test_filter);
    g_test_add_func("/status/holes-below", test_holes_below);
    g_test_add_func("/status/chain", test_chain);
    g_test_add_func("/status/base", test_base);
    g_test_add_func("/status/is-allocated", test_is_allocated);
    g_test_add_func("/status/find-allocated", test_find_allocated);
    g_test_add_func("/status/is-zero", test_is_zero);
    g_test_add_func("/status/ends", test_ends);
    g_test_add_func("/status/unaligned", test_unaligned);
    g_test_add_func("/status/error", test_error);
    g_test_add_func("/status/null", test_null);
    return g_test_run();
}
