/*
 * The overlap guard: its index against a plain list of what it was told, and that those who take
 * clusters ask it.
 *
 * SPDX-License-Identifier: MIT
 */
#include "qcow2-rec.h"

#define CLUSTER 4096
#define SPAN 512 /* clusters that things lie in */

typedef struct Model {
    Qcow2HostRun runs[QCOW2_OL_BITMAP_DIRECTORY + 1][8]; /* by section */
    uint16_t tables[SPAN + 1];                           /* sections */
} Model;

static bool model_hit(const Model *m, int checked, uint64_t offset, uint64_t bytes)
{
    for (int section = 1; section <= QCOW2_OL_BITMAP_DIRECTORY; section <<= 1) {
        for (int i = 0; i < 8 && (section & checked); i++) {
            Qcow2HostRun r = m->runs[section][i]; /* its clusters are its own */
            uint64_t start = qb_align_down(r.offset, CLUSTER);
            uint64_t end = r.bytes ? qb_align_up(r.offset + r.bytes, CLUSTER) : start;
            if (qb_ranges_overlap(offset, bytes, start, end - start)) {
                return true;
            }
        }
    }
    for (uint64_t c = offset / CLUSTER; c <= (offset + bytes - 1) / CLUSTER; c++) {
        if (m->tables[c] & checked) {
            return true;
        }
    }
    return false;
}

static const Qcow2Overlap range_sections[] = {
    QCOW2_OL_ACTIVE_L1, QCOW2_OL_REFCOUNT_TABLE, QCOW2_OL_SNAPSHOT_TABLE, QCOW2_OL_INACTIVE_L1,
    QCOW2_OL_BITMAP_DIRECTORY,
};
static const Qcow2Overlap table_sections[] = {
    QCOW2_OL_ACTIVE_L2, QCOW2_OL_REFCOUNT_BLOCK, QCOW2_OL_INACTIVE_L2,
};

static void change_ranges(BDRVQcow2State *s, Model *m)
{
    Qcow2Overlap section = range_sections[g_test_rand_int_range(0, 5)];
    Qcow2HostRun *runs = m->runs[section];

    memset(runs, 0, sizeof(m->runs[section]));
    for (int i = 0; i < g_test_rand_int_range(0, 9); i++) {
        runs[i].offset = (uint64_t)g_test_rand_int_range(0, (SPAN - 40) * CLUSTER);
        runs[i].bytes = (uint64_t)g_test_rand_int_range(0, 30 * CLUSTER);
    }
    qcow2_guard_set(s, section, runs, 8);
}

static void change_table(BDRVQcow2State *s, Model *m)
{
    Qcow2Overlap section = table_sections[g_test_rand_int_range(0, 3)];
    unsigned c = (unsigned)g_test_rand_int_range(1, SPAN);
    bool there = g_test_rand_bit();

    if (g_test_rand_int_range(0, 50) == 0) {
        qcow2_guard_forget_tables(s, section);
        for (c = 0; c < SPAN; c++) {
            m->tables[c] &= (uint16_t)~section;
        }
        return;
    }
    qcow2_guard_table(s, section, (uint64_t)c * CLUSTER, there);
    m->tables[c] = (uint16_t)(there ? m->tables[c] | section : m->tables[c] & ~section);
}

static void look(BlockDriverState *bs, const Model *m)
{
    int checked = g_test_rand_int_range(0, 2 * QCOW2_OL_BITMAP_DIRECTORY);
    uint64_t offset = (uint64_t)g_test_rand_int_range(0, (SPAN - 64) * CLUSTER);
    uint64_t bytes = (uint64_t)g_test_rand_int_range(1, g_test_rand_bit() ? 512 : 60 * CLUSTER);
    BDRVQcow2State *s = qcow2_state(bs);
    bool hit = model_hit(m, checked, offset, bytes);

    s->overlap_check = checked;
    g_assert_cmpint(qcow2_check_overlap(bs, 0, offset, bytes), ==, hit ? -EIO : 0);
    g_assert_cmpint(qcow2_check_overlap(bs, checked, offset, bytes), ==, 0);
}

/* Opened for check, so that what is found marks nothing. */
static void test_against_model(void)
{
    RecFile *f = rec_image_new("a", "size=1M,cluster_size=4k", MIB);
    BlockBackend *blk = rec_open_image(f, NULL, BDRV_O_CHECK);
    BlockDriverState *bs = blk_bs(blk);
    Model *m = g_new0(Model, 1);

    m->runs[QCOW2_OL_MAIN_HEADER][0].bytes = CLUSTER;
    for (size_t i = 0; i < G_N_ELEMENTS(range_sections); i++) {
        qcow2_guard_set(qcow2_state(bs), range_sections[i], NULL, 0);
    }
    for (size_t i = 0; i < G_N_ELEMENTS(table_sections); i++) {
        qcow2_guard_forget_tables(qcow2_state(bs), table_sections[i]);
    }
    for (int i = 0; i < 20000; i++) {
        if (g_test_rand_int_range(0, 4) == 0) {
            change_ranges(qcow2_state(bs), m);
        }
        change_table(qcow2_state(bs), m);
        look(bs, m);
    }
    g_free(m);
    blk_unref(blk);
    rec_file_free(f);
}

static void test_impossible_numbers(void)
{
    RecFile *f = rec_image_new("a", "size=1M,cluster_size=4k", MIB);
    BlockBackend *blk = rec_open_image(f, NULL, BDRV_O_CHECK);
    const Qcow2HostRun beyond = {UINT64_MAX - 5, 100};
    BDRVQcow2State *s = image_state(blk);

    qcow2_guard_set(s, QCOW2_OL_SNAPSHOT_TABLE, &beyond, 1); /* nothing can be there */
    g_assert_false(qcow2_overlaps_metadata(blk_bs(blk), UINT64_MAX - 4, 2));
    g_assert_true(qcow2_overlaps_metadata(blk_bs(blk), 100, UINT64_MAX)); /* at once, too */
    g_assert_true(qcow2_overlaps_metadata(blk_bs(blk), 0, 1));
    g_assert_false(qcow2_overlaps_metadata(blk_bs(blk), 0, 0));
    blk_unref(blk);
    rec_file_free(f);
}

/* --- whoever takes clusters looks first --- */

static uint64_t l1_place(const BDRVQcow2State *s)
{
    return qcow2_l1_table_offset(s);
}

static uint64_t l2_place(const BDRVQcow2State *s)
{
    return qcow2_l1_get(s, 0) & QCOW2_ENTRY_OFFSET_MASK;
}

static uint64_t reftable_place(const BDRVQcow2State *s)
{
    return s->reftable.offset;
}

static uint64_t refblock_place(const BDRVQcow2State *s)
{
    return s->reftable.entries[0] & QCOW2_REFTABLE_OFFSET_MASK;
}

static uint64_t snapshots_place(const BDRVQcow2State *s)
{
    return s->snapshots_offset;
}

static uint64_t inactive_l1_place(const BDRVQcow2State *s)
{
    return g_array_index(s->snapshots, Qcow2Snapshot, 0).l1_offset;
}

static uint64_t bitmaps_place(const BDRVQcow2State *s)
{
    return qb_ldbe64(qcow2_find_extension(s->extensions, QCOW2_EXT_BITMAPS)->data +
                     QCOW2_BITMAP_EXT_DIR_OFFSET);
}

static uint64_t (*const places[])(const BDRVQcow2State *s) = {
    l1_place, l2_place, reftable_place, refblock_place, snapshots_place, inactive_l1_place,
    bitmaps_place,
};

static bool new_cluster(BlockBackend *blk)
{
    uint8_t buf[CLUSTER] = {1};
    return blk_pwrite(blk, 64 * CLUSTER, CLUSTER, buf, 0) == 0;
}

static bool new_table(BlockBackend *blk)
{
    uint8_t buf[CLUSTER] = {1};
    return blk_pwrite(blk, 3 * MIB, CLUSTER, buf, 0) == 0;
}

static bool new_stream(BlockBackend *blk)
{
    uint8_t buf[CLUSTER] = {1};
    return blk_pwrite(blk, 64 * CLUSTER, CLUSTER, buf, BDRV_REQ_COMPRESSED) == 0;
}

static bool new_snapshot(BlockBackend *blk)
{
    return bdrv_snapshot_create(blk_bs(blk), "new", NULL);
}

static bool apply_snapshot(BlockBackend *blk)
{
    return bdrv_snapshot_apply(blk_bs(blk), "old", NULL);
}

static bool longer_l1(BlockBackend *blk)
{
    return blk_truncate(blk, 2048 * (int64_t)MIB, true, PREALLOC_MODE_OFF, false, NULL);
}

static bool new_bitmap(BlockBackend *blk)
{
    return bdrv_bitmap_add(blk_bs(blk), "new", 0, true, true, NULL) &&
           bdrv_store_bitmaps(blk_bs(blk), NULL);
}

static bool wider_counts(BlockBackend *blk)
{
    QbProgress progress;
    qb_progress_init(&progress, 0);
    return bdrv_amend(blk_bs(blk), qb_opts_parse("refcount_bits=64", NULL, NULL), &progress, NULL);
}

static const struct {
    const char *name;
    bool (*run)(BlockBackend *blk);
} takers[] = {
    {"data", new_cluster}, {"table", new_table}, {"stream", new_stream}, {"snapshot", new_snapshot},
    {"apply", apply_snapshot}, {"l1", longer_l1}, {"bitmap", new_bitmap}, {"width", wider_counts},
};

static RecFile *make_taken_image(void)
{
    RecFile *f = rec_image_new("a", "size=4M,cluster_size=4k", 16 * MIB);
    BlockBackend *blk = rec_open_rw(f);
    image_write(blk, 0, 8 * CLUSTER, 1);
    g_assert_true(bdrv_snapshot_create(blk_bs(blk), "old", NULL));
    image_write(blk, 0, 8 * CLUSTER, 2);
    g_assert_true(bdrv_bitmap_add(blk_bs(blk), "b", 0, true, true, NULL));
    blk_unref(blk);
    return f;
}

/* The count of a cluster of metadata is 0 by mistake, so that it is the next to be taken: nobody does,
 * and what is there stays. */
static void test_takers(gconstpointer data)
{
    RecFile *whole = make_taken_image();
    for (size_t i = 0; i < G_N_ELEMENTS(places); i++) {
        RecFile *f = rec_file_dup("b", whole);
        BlockBackend *blk = rec_open_image(f, NULL, 0);
        uint64_t place = places[i](image_state(blk)), block = refblock_place(image_state(blk));
        blk_unref(blk);
        qcow2_refcount_write(f->data + block, 4, place / CLUSTER, 0);
        qcow2_refcount_write(f->data + block, 4, place / CLUSTER + 1, 0); /* for a longer run */
        g_autofree uint8_t *before = g_memdup2(f->data + place, CLUSTER);
        blk = rec_open_rw(f);
        bool ok = takers[GPOINTER_TO_SIZE(data)].run(blk);
        g_test_message("place %zu: %s", i, ok ? "done" : "refused");
        g_assert_false(ok);
        /* the block counts what is taken; the directory says IN_USE */
        if (place != block && places[i] != bitmaps_place) {
            g_assert_cmpmem(f->data + place, CLUSTER, before, CLUSTER);
        }
        blk_unref(blk);
        rec_file_free(f);
    }
    rec_file_free(whole);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    rec_setup();
    g_test_add_func("/qcow2-overlap/against-model", test_against_model);
    g_test_add_func("/qcow2-overlap/impossible-numbers", test_impossible_numbers);
    for (size_t i = 0; i < G_N_ELEMENTS(takers); i++) {
        g_autofree char *path = g_strdup_printf("/qcow2-overlap/takers/%s", takers[i].name);
        g_test_add_data_func(path, GSIZE_TO_POINTER(i), test_takers);
    }
    int ret = g_test_run();
    image_teardown();
    return ret;
}
