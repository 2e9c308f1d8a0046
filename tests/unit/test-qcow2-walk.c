/*
 * The iterator over tables: active and detached L1, tables in memory and in the file only, ranges,
 * runs over table borders, damaged tables, and edits.
 *
 * SPDX-License-Identifier: MIT
 */
#include "qcow2-image.h"

typedef struct Seen {
    GArray *runs; /* Qcow2Mapping */
    unsigned tables;
    int errors;
} Seen;

static void seen_reset(Seen *seen)
{
    if (seen->runs) {
        g_array_free(seen->runs, true);
    }
    *seen = (Seen){.runs = g_array_new(false, false, sizeof(Qcow2Mapping))};
}

static int note_run(const Qcow2Mapping *run, void *opaque)
{
    Seen *seen = opaque;
    g_array_append_val(seen->runs, *run);
    return 0;
}

static int note_table(const Qcow2WalkTable *table, void *opaque)
{
    Seen *seen = opaque;
    seen->tables++;
    seen->errors += table->be == NULL;
    g_assert_true((table->error != 0) == (table->be == NULL));
    return 0;
}

static void walk_runs(BlockBackend *blk, const Qcow2WalkSource *src, uint64_t start, uint64_t end,
                      Seen *seen)
{
    BDRV_GRAPH_GUARD();
    seen_reset(seen);
    g_assert_cmpint(qcow2_walk_runs(blk_bs(blk), src, start, end, note_run, seen), ==, 0);
}

static const Qcow2Mapping *run_at(const Seen *seen, guint i)
{
    g_assert_cmpuint(i, <, seen->runs->len);
    return &g_array_index(seen->runs, Qcow2Mapping, i);
}

static void expect_run(const Seen *seen, guint i, Qcow2ClusterType type, uint64_t guest,
                       uint64_t bytes)
{
    const Qcow2Mapping *m = run_at(seen, i);
    g_assert_cmpint(m->type, ==, type);
    g_assert_cmpuint(m->guest, ==, guest);
    g_assert_cmpuint(m->bytes, ==, bytes);
}

static void test_runs(void)
{
    Seen seen = {0};
    image_create("image", "size=1G,cluster_size=512"); /* a table maps 32 KiB */
    g_autoptr(BlockBackend) blk = image_open_rw("image");
    image_write(blk, 32 * KIB - 1024, 3 * KIB, 1); /* over a border */
    image_write(blk, 512 * MIB, 512, 2);
    g_assert_cmpint(blk_pwrite_zeroes(blk, 512 * MIB, 512, 0), ==, 0);
    walk_runs(blk, NULL, 0, UINT64_C(1) << 30, &seen);
    g_assert_cmpuint(seen.runs->len, >=, 2);
    uint64_t total = 0;
    for (guint i = 0; i + 1 < seen.runs->len; i++) {
        g_assert_cmpint(run_at(&seen, i)->type, ==, QCOW2_NORMAL);
        total += run_at(&seen, i)->bytes;
    }
    g_assert_cmpuint(total, ==, 3 * KIB);
    expect_run(&seen, seen.runs->len - 1, QCOW2_ZERO_ALLOC, 512 * MIB, 512);
    walk_runs(blk, NULL, 32 * KIB - 100, 32 * KIB - 90, &seen); /* inside a cluster */
    g_assert_cmpuint(seen.runs->len, ==, 1);
    expect_run(&seen, 0, QCOW2_NORMAL, 32 * KIB - 100, 10);
    walk_runs(blk, NULL, 1 * MIB, 2 * MIB, &seen);
    g_assert_cmpuint(seen.runs->len, ==, 0);
    walk_runs(blk, NULL, 5, 5, &seen);
    g_assert_cmpuint(seen.runs->len, ==, 0);
    g_array_free(seen.runs, true);
}

/* More tables than one batch takes; from memory, from the file, from a copy of L1: all the same. */
static void test_many_tables(void)
{
    enum { TABLES = 4500 };
    Seen hot = {0}, cold = {0}, detached = {0};
    uint32_t l1_size;
    image_create("image", "size=256M,cluster_size=512");
    BlockBackend *blk = image_open_rw("image");
    for (int i = 0; i < TABLES; i++) {
        image_write(blk, (int64_t)i * 32 * KIB, 512, i & 0xff);
    }
    walk_runs(blk, NULL, 0, 256 * MIB, &hot);
    g_assert_cmpuint(hot.runs->len, ==, TABLES);
    blk_unref(blk);
    blk = image_open_rw("image");
    walk_runs(blk, NULL, 0, 256 * MIB, &cold);
    g_autofree uint64_t *be = qcow2_l1_dup_be(image_state(blk), &l1_size);
    Qcow2WalkSource src = {.be_l1 = be, .l1_size = l1_size};
    walk_runs(blk, &src, 0, 256 * MIB, &detached);
    g_assert_cmpmem(hot.runs->data, hot.runs->len * sizeof(Qcow2Mapping), cold.runs->data,
                    cold.runs->len * sizeof(Qcow2Mapping));
    g_assert_cmpmem(hot.runs->data, hot.runs->len * sizeof(Qcow2Mapping), detached.runs->data,
                    detached.runs->len * sizeof(Qcow2Mapping));
    uint64_t first = qb_ldbe64(be) & QCOW2_ENTRY_OFFSET_MASK; /* nothing was put into the cache */
    g_assert_null(qcow2_cache_peek(image_state(blk)->cache, QCOW2_TABLE_L2, first));
    blk_unref(blk);
    g_array_free(hot.runs, true);
    g_array_free(cold.runs, true);
    g_array_free(detached.runs, true);
}

/* What memory has counts, not the older table in the file; also when it has but a slice. */
static void test_dirty_tables_of(const char *options)
{
    Seen seen = {0};
    uint32_t l1_size;
    image_create("image", "size=1M");
    BlockBackend *blk = image_open("image", options, BDRV_O_RDWR);
    image_write(blk, 0, 64 * KIB, 1);
    g_assert_cmpint(blk_flush(blk), ==, 0);
    image_write(blk, 128 * KIB, 64 * KIB, 2);
    g_autofree uint64_t *be = qcow2_l1_dup_be(image_state(blk), &l1_size);
    Qcow2WalkSource src = {.be_l1 = be, .l1_size = l1_size};
    walk_runs(blk, &src, 0, MIB, &seen);
    g_assert_cmpuint(seen.runs->len, ==, 2);
    expect_run(&seen, 1, QCOW2_NORMAL, 128 * KIB, 64 * KIB);
    blk_unref(blk);
    g_array_free(seen.runs, true);
}

static void test_dirty_tables(void)
{
    test_dirty_tables_of("l2-cache-entry-size=64k");
    test_dirty_tables_of("l2-cache-entry-size=512,l2-cache-size=512");
}

/* An L1 that names nonsense: each table gets its own error, the good ones are seen. */
static void test_bad_tables(void)
{
    Seen seen = {0};
    uint32_t l1_size;
    image_create("image", "size=4G");
    g_autoptr(BlockBackend) blk = image_open_rw("image");
    image_write(blk, 0, 512, 1);
    image_write(blk, (int64_t)2 << 30, 512, 1);
    g_assert_cmpint(blk_flush(blk), ==, 0);
    g_autofree uint64_t *be = qcow2_l1_dup_be(image_state(blk), &l1_size);
    qb_stbe64(&be[1], UINT64_C(0x8000000000012200)); /* unaligned */
    qb_stbe64(&be[2], UINT64_C(0x8000000100000000)); /* beyond the end */
    Qcow2WalkSource src = {.be_l1 = be, .l1_size = l1_size};
    BDRV_GRAPH_GUARD();
    seen_reset(&seen);
    g_assert_cmpint(qcow2_walk_tables(blk_bs(blk), &src, 0, UINT64_MAX, note_table, &seen), ==, 0);
    g_assert_cmpuint(seen.tables, ==, 4);
    g_assert_cmpint(seen.errors, ==, 2);
    g_array_free(seen.runs, true);
}

/* One of many reads fails: those of its batch are read one by one, and all are seen. */
static void test_read_error(void)
{
    Seen seen = {0};
    image_create("image", "size=1G");
    BlockBackend *blk = image_open_rw("image");
    image_write(blk, 0, 512, 1);
    image_write(blk, 512 * MIB, 512, 1);
    blk_unref(blk);
    blk = image_open_debug("image", "file.inject-error.0.event=l2_load,"
                                    "file.inject-error.0.once=on,file.inject-error.0.errno=5");
    bdrv_graph_rdlock();
    seen_reset(&seen);
    g_assert_cmpint(qcow2_walk_tables(blk_bs(blk), NULL, 0, UINT64_MAX, note_table, &seen), ==, 0);
    bdrv_graph_rdunlock();
    g_assert_cmpuint(seen.tables, ==, 2);
    g_assert_cmpint(seen.errors, ==, 0);
    blk_unref(blk);
    g_array_free(seen.runs, true);
}

/* --- what is there, in bulk --- */

/* @want: offsets and lengths. */
static void expect_found(BlockBackend *blk, int64_t offset, int64_t bytes, guint n,
                         const int64_t (*want)[2])
{
    const BdrvRange other = {offset + bytes / 2, 1}; /* of another layer */
    g_autoptr(GArray) ranges = g_array_new(false, false, sizeof(BdrvRange));
    BDRV_GRAPH_GUARD();
    g_array_append_val(ranges, other);
    g_assert_cmpint(qcow2_find_allocated(blk_bs(blk), offset, bytes, ranges), ==, 0);
    g_assert_cmpuint(ranges->len, ==, n + 1);
    g_assert_cmpmem(ranges->data, sizeof(other), &other, sizeof(other));
    for (guint i = 0; i < n; i++) {
        g_assert_cmpint(g_array_index(ranges, BdrvRange, i + 1).offset, ==, want[i][0]);
        g_assert_cmpint(g_array_index(ranges, BdrvRange, i + 1).bytes, ==, want[i][1]);
    }
}

/* All kinds of content, more tables than one thread is for, from memory and from the file. */
static void test_find(void)
{
    const int64_t all[][2] = {
        {0, 512}, {8 * MIB, 512 * KIB + 512}, {20 * MIB, 1024}, {30 * MIB, 512}, {63 * MIB, MIB},
    };
    image_create("image", "size=64M,cluster_size=512");
    BlockBackend *blk = image_open_rw("image");
    expect_found(blk, 0, 64 * MIB, 0, NULL);
    image_write(blk, 100, 10, 1);
    image_write(blk, 8 * MIB, 512, 2);
    image_write(blk, 8 * MIB + 512 * KIB, 512, 3); /* near enough */
    image_write(blk, 20 * MIB, 1024, 6);
    g_assert_cmpint(blk_pwrite_zeroes(blk, 20 * MIB, 1024, 0), ==, 0); /* stays mapped */
    image_write_compressed(blk, 30 * MIB, 512, 4, 0);
    image_write(blk, 63 * MIB, MIB, 5);
    for (int turn = 0; turn < 2; turn++) {
        expect_found(blk, 0, 64 * MIB, G_N_ELEMENTS(all), all);
        expect_found(blk, 8 * MIB + 256, MIB, 1, (const int64_t[][2]){{8 * MIB + 256,
                                                                     512 * KIB + 256}});
        expect_found(blk, 9 * MIB, 11 * MIB, 0, NULL);
        blk_unref(blk);
        blk = image_open_rw("image");
    }
    blk_unref(blk);
}

/* Mapped is not allocated; one subcluster is. */
static void test_find_subclusters(void)
{
    image_create("base", "size=64M");
    g_autofree char *base = image_path("base");
    g_autofree char *options = g_strdup_printf("size=64M,extended_l2=on,preallocation=metadata,"
                                               "backing_file=%s,backing_fmt=qcow2", base);
    image_create("image", options);
    g_autoptr(BlockBackend) blk = image_open_rw("image");
    expect_found(blk, 0, 64 * MIB, 0, NULL);
    image_write(blk, 33 * MIB + 2 * KIB, 2 * KIB, 1);
    g_assert_cmpint(blk_pwrite_zeroes(blk, 40 * MIB, 2 * KIB, 0), ==, 0);
    expect_found(blk, 0, 64 * MIB, 2,
                 (const int64_t[][2]){{33 * MIB, 64 * KIB}, {40 * MIB, 64 * KIB}});
}

/* What cannot be right is something: whoever looks there gets the error. */
static void test_find_damaged(void)
{
    image_create("image", "size=1G");
    g_autoptr(BlockBackend) blk = image_open_rw("image");
    image_write(blk, 0, 512, 1);
    g_assert_cmpint(blk_flush(blk), ==, 0);
    BDRVQcow2State *s = image_state(blk);
    qb_mutex_lock(&s->lock);
    qcow2_l1_set_locked(s, 1, UINT64_C(0x8000000000012200)); /* unaligned */
    qb_mutex_unlock(&s->lock);
    expect_found(blk, 0, (int64_t)1 << 30, 2,
                 (const int64_t[][2]){{0, 64 * KIB}, {512 * MIB, 512 * MIB}});
    qb_mutex_lock(&s->lock);
    qcow2_l1_set_locked(s, 1, 0);
    qb_mutex_unlock(&s->lock);
}

static int stop_at_second(const Qcow2WalkTable *table, void *opaque)
{
    unsigned *n = opaque;
    return ++*n == 2 ? -ECANCELED : 0;
}

static void test_stop(void)
{
    unsigned n = 0;
    image_create("image", "size=1M,cluster_size=512");
    g_autoptr(BlockBackend) blk = image_open_rw("image");
    image_write(blk, 0, 256 * KIB, 1);
    BDRV_GRAPH_GUARD();
    g_assert_cmpint(qcow2_walk_tables(blk_bs(blk), NULL, 0, MIB, stop_at_second, &n), ==,
                    -ECANCELED);
    g_assert_cmpuint(n, ==, 2);
}

/* --- trees --- */

/* What collecting the tree of an L1 says whose @n entries name the @tables first tables in turn. */
static int collect_repeated(BlockBackend *blk, const uint64_t *tables, unsigned nb_tables, uint32_t n,
                            unsigned *ret_refs)
{
    BDRV_GRAPH_GUARD();
    g_autofree uint64_t *be = g_new(uint64_t, n);
    g_autoptr(GArray) runs = g_array_new(false, false, sizeof(Qcow2HostRun));
    for (uint32_t i = 0; i < n; i++) {
        be[i] = tables[i % nb_tables];
    }
    int ret = qcow2_tree_collect(blk_bs(blk), &(Qcow2WalkSource){.be_l1 = be, .l1_size = n}, runs);
    *ret_refs = 0;
    for (guint i = 0; i < runs->len; i++) {
        *ret_refs += (unsigned)(g_array_index(runs, Qcow2HostRun, i).bytes / 512);
    }
    return ret;
}

/* A small L1 may name one table as often as it likes; in a larger one, 1,024 entries and two for
 * each table are the most.  Each naming counts: for the table, and for its one cluster of data. */
static void test_repeated_tables(void)
{
    static const struct {
        unsigned tables;
        uint32_t n;
        int ret;
    } cases[] = {
        {1, 1024, 0}, {1, 1026, 0}, {1, 1027, -EMLINK}, {1, 100000, -EMLINK}, {2, 1028, 0},
        {2, 1029, -EMLINK},
    };
    uint32_t l1_size;
    image_create("image", "size=1M,cluster_size=512");
    g_autoptr(BlockBackend) blk = image_open_rw("image");
    image_write(blk, 0, 512, 1);
    image_write(blk, 32 * KIB, 512, 2);
    g_assert_cmpint(blk_flush(blk), ==, 0);
    g_autofree uint64_t *tables = qcow2_l1_dup_be(image_state(blk), &l1_size);
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        unsigned refs;
        int ret = collect_repeated(blk, tables, cases[i].tables, cases[i].n, &refs);
        g_assert_cmpint(ret, ==, cases[i].ret);
        g_assert_cmpuint(refs, ==, ret ? 0 : 2 * cases[i].n);
    }
}

/* --- edits --- */

typedef struct EditCount {
    unsigned seen, changed;
} EditCount;

static int set_zero(uint64_t guest, Qcow2L2Entry *e, unsigned *n, void *opaque)
{
    EditCount *count = opaque;
    count->seen += *n;
    if (!(e->entry & QCOW2_ENTRY_OFFSET_MASK)) {
        return 0;
    }
    e->entry |= QCOW2_ENTRY_ZERO;
    count->changed += *n;
    return 1;
}

static void test_edit(void)
{
    EditCount count = {0};
    image_create("image", "size=1M,cluster_size=512");
    BlockBackend *blk = image_open_rw("image");
    image_write(blk, 30 * KIB, 4 * KIB, 1);
    bdrv_graph_rdlock();
    g_assert_cmpint(qcow2_walk_edit(blk_bs(blk), 31 * KIB, 33 * KIB, set_zero, &count), ==, 0);
    bdrv_graph_rdunlock();
    g_assert_cmpuint(count.seen, ==, 4);
    g_assert_cmpuint(count.changed, ==, 4);
    image_expect(blk, 30 * KIB, KIB, 1);
    image_expect(blk, 31 * KIB, 2 * KIB, 0);
    image_expect(blk, 33 * KIB, KIB, 1);
    blk_unref(blk);
    blk = image_open_rw("image");
    image_expect(blk, 31 * KIB, 2 * KIB, 0);
    image_expect(blk, 33 * KIB, KIB, 1);
    blk_unref(blk);
    image_check("image");
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    image_setup();
    g_test_add_func("/qcow2-walk/repeated-tables", test_repeated_tables);
    g_test_add_func("/qcow2-walk/runs", test_runs);
    g_test_add_func("/qcow2-walk/many-tables", test_many_tables);
    g_test_add_func("/qcow2-walk/dirty-tables", test_dirty_tables);
    g_test_add_func("/qcow2-walk/bad-tables", test_bad_tables);
    g_test_add_func("/qcow2-walk/read-error", test_read_error);
    g_test_add_func("/qcow2-walk/find", test_find);
    g_test_add_func("/qcow2-walk/find-subclusters", test_find_subclusters);
    g_test_add_func("/qcow2-walk/find-damaged", test_find_damaged);
    g_test_add_func("/qcow2-walk/stop", test_stop);
    g_test_add_func("/qcow2-walk/edit", test_edit);
    int ret = g_test_run();
    image_teardown();
    return ret;
}
