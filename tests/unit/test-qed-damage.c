/*
 * Damaged QED images: one field at a time has a hostile value.  Whatever it is, opening, looking,
 * reading, checking and writing end in good order, nothing unharmed is lost, and what a repair
 * leaves behind is found sound or is not written to.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qed.h"
#include "tests/unit/log-driver.h"

#define CLUSTER UINT64_C(4096)
#define SIZE (UINT64_C(5) << 20)
#define SOUND 1 /* disk with the image as it was made */

static uint64_t word(const LogDisk *d, uint64_t offset)
{
    return qb_ldle64(d->data + offset);
}

static BlockBackend *try_open(int flags, GError **errp)
{
    json_t *options = json_pack("{s:s, s:s, s:s, s:i, s:n}", "driver", "qed", "discard", "unmap",
                                "file.driver", "test-log", "file.disk", 0, "backing");
    return blk_new_open(NULL, options, flags, errp);
}

static void make_sound_image(void)
{
    g_autoptr(GError) err = NULL;
    g_autoptr(json_t) options =
        qb_opts_parse("cluster_size=4k,table_size=2,size=5M,backing_file=b,backing_fmt=raw", NULL,
                      NULL);
    bdrv_img_create("test-log:0", "qed", options, NULL, &err);
    g_assert_no_error(err);
    BlockBackend *blk = try_open(BDRV_O_RDWR, &err);
    g_assert_no_error(err);
    g_autofree uint8_t *buf = g_malloc(8 * CLUSTER);
    memset(buf, 0x77, 8 * CLUSTER);
    g_assert_cmpint(blk_pwrite(blk, 0, 6 * CLUSTER, buf, 0), ==, 0);
    g_assert_cmpint(blk_pwrite(blk, 20 * CLUSTER, 2 * CLUSTER, buf, 0), ==, 0);
    g_assert_cmpint(blk_pwrite_zeroes(blk, 30 * CLUSTER, 3 * CLUSTER, 0), ==, 0);
    g_assert_cmpint(blk_pwrite(blk, SIZE - 8 * CLUSTER, 8 * CLUSTER, buf, 0), ==, 0);
    blk_unref(blk);
    log_copy(&log_disks[SOUND], &log_disks[0]);
}

/* --- what is done to a damaged image --- */

static void look(void)
{
    g_autoptr(GError) err = NULL;
    g_autoptr(BlockBackend) blk = try_open(0, &err);
    if (!blk) {
        g_assert_nonnull(err);
        return;
    }
    g_autofree uint8_t *buf = g_malloc(64 * CLUSTER);
    int64_t size = blk_getlength(blk), pos = 0;
    for (int64_t at = 0; at < MIN(size, 2 * (int64_t)SIZE); at += 16 * CLUSTER) {
        (void)blk_pread(blk, at, MIN(16 * (int64_t)CLUSTER, size - at), buf, 0);
    }
    BDRV_GRAPH_GUARD();
    for (unsigned i = 0; i < 1000 && pos < size; i++) {
        BdrvStatus st;
        int ret = bdrv_block_status(blk_bs(blk), pos, size - pos, &st);
        pos += ret == 0 ? st.bytes : (int64_t)CLUSTER;
        g_assert_true(ret < 0 || st.bytes > 0);
    }
}

static void write_here_and_there(void)
{
    g_autoptr(GError) err = NULL;
    g_autoptr(BlockBackend) blk = try_open(BDRV_O_RDWR | BDRV_O_RESIZE, &err);
    if (!blk) {
        return;
    }
    uint8_t buf[CLUSTER];
    memset(buf, 0x99, sizeof(buf));
    (void)blk_pwrite(blk, 3 * CLUSTER + 512, CLUSTER, buf, 0);
    (void)blk_pwrite(blk, 40 * CLUSTER + 512, CLUSTER, buf, 0);
    (void)blk_pdiscard(blk, CLUSTER, 25 * CLUSTER);
    (void)blk_pwrite_zeroes(blk, 31 * CLUSTER, 20 * CLUSTER, BDRV_REQ_MAY_UNMAP);
    (void)blk_flush(blk);
    (void)blk_pwrite(blk, 60 * CLUSTER, CLUSTER, buf, 0);
    (void)blk_truncate(blk, 2 << 20, true, PREALLOC_MODE_OFF, false, NULL);
    (void)blk_truncate(blk, 3 << 20, true, PREALLOC_MODE_OFF, true, NULL);
    (void)bdrv_change_backing_file(blk_bs(blk), "other", "raw", NULL);
    (void)blk_make_empty(blk, false, NULL);
}

/* False when the image cannot be checked at all. */
static bool check(unsigned fix, BdrvCheckResult *result)
{
    g_autoptr(GError) err = NULL;
    BdrvCheckOptions opts = {.fix = fix};
    g_autoptr(BlockBackend) blk = try_open(BDRV_O_CHECK | (fix ? BDRV_O_RDWR : 0), &err);
    return blk && bdrv_check(blk_bs(blk), &opts, result, NULL);
}

static bool same_disk(const LogDisk *a, const LogDisk *b)
{
    return a->length == b->length && memcmp(a->data, b->data, a->length) == 0;
}

static void run_on(const LogDisk *damaged)
{
    BdrvCheckResult first = {0}, repaired, second;
    log_copy(&log_disks[0], damaged);
    look();
    if (check(0, &first)) {
        g_assert_true(same_disk(&log_disks[0], damaged)); /* looking changes nothing */
        g_assert_true(check(BDRV_FIX_ERRORS | BDRV_FIX_LEAKS, &repaired));
        g_assert_cmpuint(repaired.corruptions + repaired.corruptions_fixed, ==, first.corruptions);
        g_assert_true(check(0, &second));
        g_assert_cmpuint(second.corruptions, ==, repaired.corruptions);
        write_here_and_there();
        g_assert_true(check(0, &second));
        g_assert_cmpuint(second.corruptions, ==, repaired.corruptions ? second.corruptions : 0);
    }
    log_copy(&log_disks[0], damaged);
    write_here_and_there();
    if (check(0, &second)) { /* refused, or harmless */
        g_assert_true(second.corruptions <= first.corruptions);
    }
}

/* --- the damage --- */

static void try_value(uint64_t offset, unsigned width, uint64_t value)
{
    LogDisk *damaged = &log_disks[2];
    uint64_t le = GUINT64_TO_LE(value);
    log_copy(damaged, &log_disks[SOUND]);
    memcpy(damaged->data + offset, &le, width);
    g_test_message("%u bytes at %" G_GUINT64_FORMAT ": %#" G_GINT64_MODIFIER "x", width, offset,
                   value);
    run_on(damaged);
}

static void try_field(uint64_t offset, unsigned width)
{
    uint64_t old = word(&log_disks[SOUND], offset), end = log_disks[SOUND].length;
    const uint64_t values[] = {
        0, 1, 2, 3, 4, 8, 511, 512, 4095, 4096, 65536, 2 * CLUSTER, 3 * CLUSTER, 5 * CLUSTER,
        old + 1, old + 8, old + 512, old + CLUSTER, old - CLUSTER, old * 2, old << 8, ~old,
        end, end - CLUSTER, end - 512, end + CLUSTER, UINT32_MAX, INT32_MAX, 1u << 31,
        UINT64_MAX, INT64_MAX, UINT64_C(1) << 63, INT64_MAX - CLUSTER + 1, UINT64_C(1) << 56,
        UINT64_MAX - CLUSTER + 1,
    };
    for (size_t i = 0; i < G_N_ELEMENTS(values); i++) {
        try_value(offset, width, values[i]);
    }
}

static void test_header(void)
{
    static const uint8_t words[] = {16, 24, 32, 40, 48}, halves[] = {0, 4, 8, 12, 56, 60};
    for (size_t i = 0; i < G_N_ELEMENTS(words); i++) {
        try_field(words[i], 8);
    }
    for (size_t i = 0; i < G_N_ELEMENTS(halves); i++) {
        try_field(halves[i], 4);
    }
}

static void test_l1(void)
{
    uint64_t l1 = word(&log_disks[SOUND], 40);
    for (uint64_t i = 0; i < 4; i++) {
        try_field(l1 + i * 8, 8);
    }
    try_field(l1 + 2 * CLUSTER - 8, 8); /* far beyond the end of the disk */
}

static void test_l2(void)
{
    uint64_t l2 = word(&log_disks[SOUND], word(&log_disks[SOUND], 40));
    static const uint8_t entries[] = {0, 1, 5, 6, 20, 31, 60};
    for (size_t i = 0; i < G_N_ELEMENTS(entries); i++) {
        try_field(l2 + entries[i] * 8u, 8);
    }
}

static void test_cut(void)
{
    LogDisk *damaged = &log_disks[2];
    for (uint64_t length = 0; length < log_disks[SOUND].length; length += CLUSTER / 2 + 33) {
        log_copy(damaged, &log_disks[SOUND]);
        log_resize(damaged, length);
        g_test_message("cut at %" G_GUINT64_FORMAT, length);
        run_on(damaged);
    }
}

/* An image that is not known to be sound is not written to: no entry, no size, no name changes. */
static void test_refuses_writes(void)
{
    uint64_t l2 = word(&log_disks[SOUND], word(&log_disks[SOUND], 40));
    g_autoptr(GError) err = NULL;
    uint8_t buf[512] = {1};
    log_copy(&log_disks[0], &log_disks[SOUND]);
    qb_stle64(log_disks[0].data + l2 + 8 * 8, word(&log_disks[SOUND], l2)); /* a second owner */
    log_start(&log_disks[0]);
    BlockBackend *blk = try_open(BDRV_O_RDWR, &err);
    g_assert_no_error(err);
    g_assert_cmpint(blk_pdiscard(blk, 8 * CLUSTER, CLUSTER), ==, -EIO);
    g_assert_cmpint(blk_pwrite(blk, 50 * CLUSTER, 512, buf, 0), ==, -EIO);
    g_assert_cmpint(blk_pwrite(blk, 0, 512, buf, 0), ==, -EIO);
    g_assert_cmpint(blk_pread(blk, 8 * CLUSTER, 512, buf, 0), ==, 0);
    g_assert_cmpint(buf[0], ==, 0x77);
    blk_unref(blk);
    for (guint i = 0; i < log_disks[0].log->len; i++) {
        g_assert_cmpint(g_array_index(log_disks[0].log, LogEvent, i).kind, ==, LOG_FLUSH);
    }
    log_clear(&log_disks[0]);
}

/* With the need-check bit the damage is found at open: repaired where that can be, else refused. */
static void test_need_check(void)
{
    uint64_t l2 = word(&log_disks[SOUND], word(&log_disks[SOUND], 40));
    g_autoptr(GError) err = NULL;
    BdrvCheckResult result;
    log_copy(&log_disks[0], &log_disks[SOUND]);
    qb_stle64(log_disks[0].data + l2 + 8 * 8, 12345); /* nothing is there */
    log_disks[0].data[16] |= QED_F_NEED_CHECK;
    BlockBackend *blk = try_open(BDRV_O_RDWR, &err);
    g_assert_no_error(err);
    g_assert_false(qed_needs_check(qed_state(blk_bs(blk))));
    blk_unref(blk);
    g_assert_cmpuint(log_disks[0].data[16] & QED_F_NEED_CHECK, ==, 0);
    g_assert_true(check(0, &result));
    g_assert_cmpuint(result.corruptions, ==, 0);

    qb_stle64(log_disks[0].data + l2 + 8 * 8, word(&log_disks[SOUND], l2));
    log_disks[0].data[16] |= QED_F_NEED_CHECK;
    g_assert_null(try_open(BDRV_O_RDWR, &err));
    g_assert_nonnull(strstr(err->message, "Image corrupted"));
    g_assert_cmpuint(log_disks[0].data[16] & QED_F_NEED_CHECK, !=, 0);
    blk = try_open(0, NULL);
    g_assert_nonnull(blk);
    blk_unref(blk);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    log_init();
    make_sound_image();
    g_test_add_func("/qed/damage/header", test_header);
    g_test_add_func("/qed/damage/l1", test_l1);
    g_test_add_func("/qed/damage/l2", test_l2);
    g_test_add_func("/qed/damage/cut", test_cut);
    g_test_add_func("/qed/damage/refuses-writes", test_refuses_writes);
    g_test_add_func("/qed/damage/need-check", test_need_check);
    return log_done(g_test_run());
}
