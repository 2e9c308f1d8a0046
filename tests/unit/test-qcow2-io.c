/*
 * Guest requests on qcow2 images: random operations against an oracle in memory over cluster sizes,
 * versions, subclusters, backing and data files, by one thread and by several; and what single
 * requests do to the map.
 *
 * A failure of a random case names its seed:  test-qcow2-io -p /qcow2-io/random --seed=...
 *
 * SPDX-License-Identifier: MIT
 */
#include "qb-config.h"
#include "qcow2-image.h"

/* --- the oracle --- */

typedef struct Config {
    const char *name, *opts; /* of creation */
    size_t size;
    unsigned cluster;
    bool backing, compressed, v2;
    const char *open_opts;
    int64_t max_transfer; /* longer requests come in pieces; 0: none do */
} Config;

#define MB4 (4 * MIB)

static const Config configs[] = {
    {"c512", "cluster_size=512", 1 * MIB + 512, 512, .compressed = true},
    {"c4k", "cluster_size=4k", 2 * MIB, 4096, .compressed = true},
    {"c64k", "cluster_size=64k", MB4, 65536, .compressed = true},
#ifdef CONFIG_ZSTD
    {"c64k-zstd", "cluster_size=64k,compression_type=zstd", MB4, 65536, .compressed = true},
#endif
    {"c2m", "cluster_size=2M", 8 * MIB + 512, 2 * MIB, .compressed = true},
    {"c64k-backing", "cluster_size=64k", MB4, 65536, .backing = true, .compressed = true},
    {"c512-backing", "cluster_size=512", 1 * MIB, 512, .backing = true, .compressed = true},
    {"v2", "compat=0.10,cluster_size=4k", 2 * MIB, 4096, .compressed = true, .v2 = true},
    {"v2-backing", "compat=0.10,cluster_size=4k", 2 * MIB, 4096, .backing = true,
     .compressed = true, .v2 = true},
    {"ext-16k", "extended_l2=on,cluster_size=16k", MB4, 16384, .compressed = true},
    {"ext-64k-backing", "extended_l2=on,cluster_size=64k", MB4, 65536, .backing = true,
     .compressed = true},
    {"ext-2m-backing", "extended_l2=on,cluster_size=2M", 8 * MIB, 2 * MIB, .backing = true,
     .compressed = true},
    {"no-unref", "cluster_size=64k", MB4, 65536, .open_opts = "discard=unmap,discard-no-unref=on"},
    {"prealloc", "cluster_size=64k,preallocation=metadata", MB4, 65536, .compressed = false},
    {"slices", "cluster_size=4k", MB4, 4096, .compressed = true,
     .open_opts = "discard=unmap,l2-cache-size=4096,l2-cache-entry-size=512"},
    {"slices-backing", "cluster_size=64k", MB4, 65536, .backing = true, .compressed = true,
     .open_opts = "discard=unmap,l2-cache-size=4096,l2-cache-entry-size=512"},
    {"slices-ext", "extended_l2=on,cluster_size=16k", MB4, 16384,
     .open_opts = "discard=unmap,l2-cache-size=2048,l2-cache-entry-size=1024"},
    {"small-cache", "cluster_size=512", 2 * MIB, 512,
     .open_opts = "discard=unmap,l2-cache-size=4096,refcount-cache-size=4096"},
    {"pieces", "cluster_size=4k", 256 * KIB, 4096, .compressed = true, .max_transfer = 8192},
};

typedef struct World {
    const Config *c;
    BlockBackend *blk;
    uint8_t *oracle;
    size_t from, size; /* the part of the disk that is ours */
    GRand *rand;
} World;

static size_t pick(World *w, size_t max)
{
    return max ? (size_t)g_rand_int(w->rand) % max : 0;
}

/* A range inside our part: of any alignment, of sectors, or of clusters. */
static void pick_range(World *w, size_t max, size_t *offset, size_t *bytes)
{
    static const size_t units[] = {1, 512, 4096, 0};
    size_t unit = units[pick(w, G_N_ELEMENTS(units))];
    unit = unit ? unit : w->c->cluster;
    *offset = w->from + pick(w, w->size) / unit * unit;
    *offset = MAX(*offset, w->from);
    size_t left = w->from + w->size - *offset, wanted = (pick(w, max) + 1) / unit * unit;
    *bytes = CLAMP(wanted, 1, left);
}

static void fill_pattern(World *w, uint8_t *buf, size_t n)
{
    uint8_t seed = (uint8_t)g_rand_int(w->rand);
    bool noise = pick(w, 4) == 0;
    for (size_t i = 0; i < n; i++) {
        buf[i] = noise ? (uint8_t)g_rand_int(w->rand) : (uint8_t)(seed + (i >> 9));
    }
}

static void op_write(World *w)
{
    size_t offset, bytes;
    pick_range(w, 3 * w->c->cluster + 10000, &offset, &bytes);
    fill_pattern(w, w->oracle + offset, bytes);
    int flags = pick(w, 16) == 0 ? BDRV_REQ_FUA : 0;
    g_assert_cmpint(blk_pwrite(w->blk, (int64_t)offset, (int64_t)bytes, w->oracle + offset, flags),
                    ==, 0);
}

/* Many pieces of memory, some of them tiny. */
static void op_writev(World *w)
{
    size_t offset, bytes, done = 0;
    IOV_VECTOR_AUTO v;
    pick_range(w, 2 * w->c->cluster + 5000, &offset, &bytes);
    fill_pattern(w, w->oracle + offset, bytes);
    iov_vector_init(&v, 4);
    while (done < bytes) {
        size_t n = pick(w, 9000) + 1;
        n = MIN(n, bytes - done);
        iov_vector_add(&v, w->oracle + offset + done, n);
        done += n;
    }
    g_assert_cmpint(blk_pwritev(w->blk, (int64_t)offset, (int64_t)bytes, &v, 0), ==, 0);
}

static void expect_equal(World *w, size_t offset, size_t bytes)
{
    g_autofree uint8_t *buf = g_malloc(bytes);
    memset(buf, 0x5a, bytes);
    g_assert_cmpint(blk_pread(w->blk, (int64_t)offset, (int64_t)bytes, buf, 0), ==, 0);
    for (size_t i = 0; i < bytes; i++) {
        if (buf[i] != w->oracle[offset + i]) {
            g_error("%s: byte %zu (of %zu+%zu) is 0x%02x, not 0x%02x", w->c->name, offset + i,
                    offset, bytes, buf[i], w->oracle[offset + i]);
        }
    }
}

static void op_read(World *w)
{
    size_t offset, bytes;
    pick_range(w, pick(w, 4) ? 3 * w->c->cluster : w->size, &offset, &bytes);
    expect_equal(w, offset, bytes);
}

static void op_zero(World *w)
{
    static const int flags[] = {0, BDRV_REQ_MAY_UNMAP};
    size_t offset, bytes;
    pick_range(w, 4 * w->c->cluster + 5000, &offset, &bytes);
    memset(w->oracle + offset, 0, bytes);
    g_assert_cmpint(blk_pwrite_zeroes(w->blk, (int64_t)offset, (int64_t)bytes,
                                      flags[pick(w, G_N_ELEMENTS(flags))]),
                    ==, 0);
}

/* What a discarded range reads as is zero or what it was; here the whole clusters are looked at. */
static void op_discard(World *w)
{
    size_t offset, bytes;
    pick_range(w, 4 * w->c->cluster + 5000, &offset, &bytes);
    g_assert_cmpint(blk_pdiscard(w->blk, (int64_t)offset, (int64_t)bytes), ==, 0);
    g_assert_cmpint(blk_pread(w->blk, (int64_t)offset, (int64_t)bytes, w->oracle + offset, 0), ==,
                    0);
    if (!w->c->v2) {
        size_t first = qb_align_up(offset, w->c->cluster);
        size_t end = offset + bytes == w->c->size ? w->c->size
                                                  : qb_align_down(offset + bytes, w->c->cluster);
        g_assert_true(end <= first || qb_buffer_is_zero(w->oracle + first, end - first));
    }
}

/* Only where nothing is; elsewhere it must be refused, and nothing change. */
static void op_compressed(World *w)
{
    size_t cluster = w->c->cluster;
    size_t offset = qb_align_up(w->from + pick(w, w->size), cluster);
    size_t bytes = (pick(w, 5) + 1) * cluster;
    if (!w->c->compressed || offset >= w->from + w->size) {
        return;
    }
    bytes = MIN(bytes, w->from + w->size - offset);
    g_autofree uint8_t *data = g_malloc(bytes);
    fill_pattern(w, data, bytes);
    if (pick(w, 6) == 0) {
        memset(data, 0, MIN(bytes, cluster));
    }
    bool partial = bytes % cluster && offset + bytes != w->c->size;
    bool taken = false;
    for (size_t pos = offset; pos < offset + bytes; pos += cluster) {
        Qcow2L2Entry e = image_entry(w->blk, pos);
        taken |= qcow2_entry_is_compressed(e) || qcow2_entry_has_host(image_state(w->blk), e);
    }
    int ret = blk_pwrite(w->blk, (int64_t)offset, (int64_t)bytes, data, BDRV_REQ_COMPRESSED);
    g_assert_cmpint(ret, ==, partial ? -EINVAL : taken ? -EIO : 0);
    if (ret == 0) {
        memcpy(w->oracle + offset, data, bytes);
    } else if (ret == -EIO) { /* batches before the taken cluster are done */
        g_assert_cmpint(blk_pread(w->blk, (int64_t)offset, (int64_t)bytes, w->oracle + offset, 0),
                        ==, 0);
    }
}

/* Status must cover the range and never call zero what is not. */
static void op_status(World *w)
{
    size_t offset, bytes;
    pick_range(w, w->size, &offset, &bytes);
    size_t pos = offset;
    BDRV_GRAPH_GUARD();
    while (pos < offset + bytes) {
        BdrvStatus st;
        g_assert_cmpint(bdrv_block_status_above(blk_bs(w->blk), NULL, (int64_t)pos,
                                                (int64_t)(offset + bytes - pos), &st),
                        ==, 0);
        g_assert_cmpint(st.bytes, >, 0);
        g_assert_cmpint(st.bytes, <=, (int64_t)(offset + bytes - pos));
        if (st.flags & BDRV_BLOCK_ZERO) {
            g_assert_true(qb_buffer_is_zero(w->oracle + pos, (size_t)st.bytes));
        }
        pos += (size_t)st.bytes;
    }
}

static void op_flush(World *w)
{
    g_assert_cmpint(blk_flush(w->blk), ==, 0);
}

static void random_op(World *w)
{
    static void (*const ops[])(World *) = {
        op_write, op_write, op_write, op_writev, op_read, op_read, op_zero,
        op_discard, op_discard, op_compressed, op_compressed, op_status, op_flush,
    };
    ops[pick(w, G_N_ELEMENTS(ops))](w);
}

/* --- images --- */

/* Backing data: half of it holes, ends in the middle of the overlay's. */
static void make_base(const Config *c, uint8_t *oracle)
{
    size_t size = qb_align_down(c->size * 3 / 4, 512) + 512;
    g_autofree char *opts = g_strdup_printf("size=%zu,cluster_size=4k", size);
    image_create("base", opts);
    g_autoptr(BlockBackend) blk = image_open_rw("base");
    for (size_t pos = 0; pos < size; pos += 20000) {
        size_t n = MIN(10000, size - pos);
        memset(oracle + pos, (int)(pos / 20000 + 1), n);
        g_assert_cmpint(blk_pwrite(blk, (int64_t)pos, (int64_t)n, oracle + pos, 0), ==, 0);
    }
}

static void make_image(const Config *c, uint8_t *oracle)
{
    memset(oracle, 0, c->size);
    if (c->backing) {
        make_base(c, oracle);
    }
    g_autofree char *base = image_path("base");
    g_autofree char *opts = c->backing
        ? g_strdup_printf("size=%zu,%s,backing_file=%s,backing_fmt=qcow2", c->size, c->opts, base)
        : g_strdup_printf("size=%zu,%s", c->size, c->opts);
    image_create("image", opts);
}

static BlockBackend *open_image(const Config *c)
{
    BlockBackend *blk =
        image_open("image", c->open_opts ? c->open_opts : "discard=unmap", BDRV_O_RDWR);
    blk_bs(blk)->bl.max_transfer = c->max_transfer;
    return blk;
}

static void test_random(const void *data)
{
    const Config *c = data;
    g_autofree uint8_t *oracle = g_malloc(c->size);
    World w = {.c = c, .oracle = oracle, .size = c->size};
    w.rand = g_rand_new_with_seed((guint32)g_test_rand_int());
    make_image(c, oracle);
    for (int session = 0; session < 2; session++) {
        w.blk = open_image(c);
        for (int i = 0; i < 100; i++) {
            random_op(&w);
        }
        expect_equal(&w, 0, c->size);
        blk_unref(w.blk);
        image_check("image");
    }
    w.blk = open_image(c);
    expect_equal(&w, 0, c->size);
    blk_unref(w.blk);
    g_rand_free(w.rand);
}

/* --- internal snapshots: shared clusters and tables --- */

static void snapshot(World *w, bool (*fn)(BlockDriverState *bs, const char *name, GError **errp))
{
    GError *err = NULL;
    bool ok = fn(blk_bs(w->blk), "s", &err);
    g_assert_no_error(err);
    g_assert_true(ok);
}

static bool delete_snapshot(BlockDriverState *bs, const char *name, GError **errp)
{
    return bdrv_snapshot_delete(bs, NULL, name, errp);
}

static void many_ops(World *w)
{
    for (int i = 0; i < 40; i++) {
        random_op(w);
    }
    expect_equal(w, 0, w->c->size);
}

static void test_snapshots(const void *data)
{
    const Config *c = data;
    g_autofree uint8_t *oracle = g_malloc(c->size), *kept = g_malloc(c->size);
    World w = {.c = c, .oracle = oracle, .size = c->size};
    w.rand = g_rand_new_with_seed((guint32)g_test_rand_int());
    make_image(c, oracle);
    w.blk = open_image(c);
    many_ops(&w);
    memcpy(kept, oracle, c->size);
    snapshot(&w, bdrv_snapshot_create);
    many_ops(&w);
    blk_unref(w.blk);
    image_check("image");
    w.blk = open_image(c);
    snapshot(&w, bdrv_snapshot_apply);
    memcpy(oracle, kept, c->size);
    many_ops(&w);
    snapshot(&w, delete_snapshot);
    many_ops(&w);
    blk_unref(w.blk);
    image_check("image");
    g_rand_free(w.rand);
}

/* --- several threads with parts of their own, which share tables and clusters --- */

#define THREADS 4

static void *run_world(void *opaque)
{
    World *w = opaque;
    for (int i = 0; i < 80; i++) {
        random_op(w);
    }
    return NULL;
}

static void test_threads(const void *data)
{
    const Config *c = data;
    g_autofree uint8_t *oracle = g_malloc(c->size);
    World w[THREADS];
    pthread_t threads[THREADS];
    make_image(c, oracle);
    BlockBackend *blk = open_image(c);
    size_t part = c->size / THREADS / 512 * 512;
    for (int i = 0; i < THREADS; i++) {
        w[i] = (World){.c = c, .blk = blk, .oracle = oracle, .from = part * (size_t)i};
        w[i].size = i == THREADS - 1 ? c->size - w[i].from : part;
        w[i].rand = g_rand_new_with_seed((guint32)g_test_rand_int());
        g_assert_true(qb_thread_start(&threads[i], "world", run_world, &w[i]));
    }
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        expect_equal(&w[i], w[i].from, w[i].size);
        g_rand_free(w[i].rand);
    }
    blk_unref(blk);
    image_check("image");
}

/* --- several threads on the same clusters: content is anybody's, the map must stay sound --- */

static void *run_brawl(void *opaque)
{
    World *w = opaque;
    g_autofree uint8_t *buf = g_malloc0(w->size);
    for (int i = 0; i < 120; i++) {
        size_t offset, bytes;
        pick_range(w, 2 * w->c->cluster, &offset, &bytes);
        switch (pick(w, 5)) {
        case 0:
            blk_pwrite_zeroes(w->blk, (int64_t)offset, (int64_t)bytes,
                              pick(w, 2) ? BDRV_REQ_MAY_UNMAP : 0);
            break;
        case 1:
            blk_pdiscard(w->blk, (int64_t)offset, (int64_t)bytes);
            break;
        case 2:
            blk_pread(w->blk, (int64_t)offset, (int64_t)bytes, buf, 0);
            break;
        default:
            memset(buf, (int)pick(w, 255) + 1, bytes);
            g_assert_cmpint(blk_pwrite(w->blk, (int64_t)offset, (int64_t)bytes, buf, 0), ==, 0);
        }
    }
    return NULL;
}

/* Shares all clusters with a snapshot, and takes it away again, while the others go on. */
static void *run_snapshots(void *opaque)
{
    World *w = opaque;
    for (int i = 0; i < 8; i++) {
        snapshot(w, bdrv_snapshot_create);
        g_usleep(2000);
        snapshot(w, delete_snapshot);
    }
    return NULL;
}

static void test_brawl(const void *data)
{
    const Config *c = data;
    g_autofree uint8_t *oracle = g_malloc(c->size);
    World w[THREADS];
    pthread_t threads[THREADS];
    make_image(c, oracle);
    BlockBackend *blk = open_image(c);
    for (int i = 0; i < THREADS; i++) {
        w[i] = (World){.c = c, .blk = blk, .size = MIN(c->size, 6 * c->cluster)};
        w[i].rand = g_rand_new_with_seed((guint32)g_test_rand_int());
        g_assert_true(qb_thread_start(&threads[i], "brawl", i ? run_brawl : run_snapshots, &w[i]));
    }
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        g_rand_free(w[i].rand);
    }
    blk_unref(blk);
    image_check("image");
}

static void add_configs(const char *prefix, GTestDataFunc fn)
{
    for (size_t i = 0; i < G_N_ELEMENTS(configs); i++) {
        g_autofree char *path = g_strdup_printf("/qcow2-io/%s/%s", prefix, configs[i].name);
        g_test_add_data_func(path, &configs[i], fn);
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    image_setup();
    add_configs("random", test_random);
    add_configs("snapshots", test_snapshots);
    add_configs("threads", test_threads);
    add_configs("brawl", test_brawl);
    int ret = g_test_run();
    image_teardown();
    return ret;
}
