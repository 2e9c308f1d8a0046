/*
 * The overlap guard's index against a plain list of what it was told.
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

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    rec_setup();
    g_test_add_func("/qcow2-overlap/against-model", test_against_model);
    g_test_add_func("/qcow2-overlap/impossible-numbers", test_impossible_numbers);
    int ret = g_test_run();
    image_teardown();
    return ret;
}
