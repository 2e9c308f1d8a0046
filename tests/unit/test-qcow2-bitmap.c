/*
 * Persistent bitmaps of qcow2 in an image that loses power, or whose file fails, at every step; and
 * in images whose bitmap metadata somebody damaged.
 *
 *   before   the image with bitmaps "on" (enabled) and "off" (disabled), both right
 *   session  writes, and what a script does to the bitmaps
 *   after    any state the disk can be in:
 *              the image is sound, both names are there (unless removed)
 *              a bitmap that is listed without IN_USE is right: "on" has every granule that differs
 *              from before, and what it had before unless it was cleared; "off" is as it was, or as
 *              the session made it
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2.h"
#include "tests/unit/log-driver.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

enum { GRANULARITY = 512, SCRATCH = 2, BEFORE = 3 };
#define KIB UINT64_C(1024)

typedef struct Shape {
    const char *name, *options;
    uint64_t size;
} Shape;

/* The last has tables of several clusters and chunks smaller than a page. */
static const Shape shapes[] = {
    {"4k", "cluster_size=4k", 600 * KIB},
    {"64k", "cluster_size=64k", 1600 * KIB},
    {"512", "cluster_size=512", 3000 * KIB},
};

/* ---- images ---- */

static BlockBackend *open_disk(int disk, int flags)
{
    g_autoptr(GError) err = NULL;
    json_t *options = json_pack("{s:s, s:s, s:i, s:s}", "driver", "qcow2", "file.driver",
                                "test-log", "file.disk", disk, "discard", "unmap");
    BlockBackend *blk = blk_new_open(NULL, options, flags, &err);
    g_assert_no_error(err);
    return blk;
}

static void write_at(BlockBackend *blk, uint64_t offset, uint64_t bytes, int value)
{
    g_autofree uint8_t *buf = g_malloc(bytes);
    memset(buf, value, bytes);
    (void)blk_pwrite(blk, (int64_t)offset, (int64_t)bytes, buf, 0); /* may fail on purpose */
}

static void add(BlockBackend *blk, const char *name, bool disabled)
{
    g_autoptr(GError) err = NULL;
    bdrv_bitmap_add(blk_bs(blk), name, GRANULARITY, true, disabled, &err);
    g_assert_no_error(err);
}

/* "on" has [0, 2k) and some more, "off" [8k, 9k). */
static void make_before(const Shape *shape)
{
    g_autoptr(GError) err = NULL;
    g_autoptr(json_t) options = qb_opts_parse(shape->options, NULL, NULL);
    json_object_set_new(options, "size", json_integer((json_int_t)shape->size));
    bdrv_img_create("test-log:0", "qcow2", options, NULL, &err);
    g_assert_no_error(err);
    BlockBackend *blk = open_disk(0, BDRV_O_RDWR | BDRV_O_RESIZE);
    add(blk, "off", false);
    write_at(blk, 8 * KIB, KIB, 1);
    bdrv_bitmap_disable(blk_bs(blk), "off", &err);
    add(blk, "on", false);
    write_at(blk, 0, 2 * KIB, 2);
    write_at(blk, shape->size / 2, KIB, 3);
    g_assert_no_error(err);
    blk_unref(blk);
    log_copy(&log_disks[BEFORE], &log_disks[0]);
}

/* ---- what a bitmap says ---- */

typedef struct Marks {
    bool listed, trusted;
    uint64_t size;
    uint8_t *bit; /* one byte per granule */
} Marks;

static void marks_clear(Marks *m)
{
    g_free(m->bit);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Marks, marks_clear)

static void read_marks(BlockBackend *blk, const char *name, Marks *m)
{
    g_autoptr(GArray) list = bdrv_bitmap_list(blk_bs(blk));
    *m = (Marks){.size = (uint64_t)blk_getlength(blk)};
    for (guint i = 0; i < list->len; i++) {
        const BdrvBitmapInfo *info = &g_array_index(list, BdrvBitmapInfo, i);
        if (!strcmp(info->name, name)) {
            m->listed = true;
            m->trusted = !info->inconsistent;
        }
    }
    m->bit = g_malloc0(m->size / GRANULARITY + 1);
    int64_t at = 0, bytes = 0;
    int ret = 0;
    while (m->trusted &&
           (ret = bdrv_bitmap_next_dirty(blk_bs(blk), name, at + bytes, &at, &bytes)) > 0) {
        memset(m->bit + at / GRANULARITY, 1, (size_t)(bytes + GRANULARITY - 1) / GRANULARITY);
    }
    g_assert_cmpint(ret, ==, 0);
}

static uint8_t *read_all(BlockBackend *blk, uint64_t bytes)
{
    uint8_t *buf = g_malloc0(bytes);
    uint64_t n = MIN(bytes, (uint64_t)blk_getlength(blk));
    g_assert_cmpint(blk_pread(blk, 0, (int64_t)n, buf, 0), ==, 0);
    return buf;
}

/* ---- sessions ---- */

typedef struct Session {
    const char *name;
    void (*run)(const Shape *shape, BlockBackend *blk);
    bool clears_on, changes_off, removes_off;
} Session;

static void session_write(const Shape *shape, BlockBackend *blk)
{
    write_at(blk, 40 * KIB, 5 * KIB, 7);
    blk_flush(blk);
    write_at(blk, shape->size - 4 * KIB, 4 * KIB, 8);
    blk_pwrite_zeroes(blk, 0, (int64_t)KIB, 0);
    blk_pdiscard(blk, (int64_t)(shape->size / 2), (int64_t)(64 * KIB));
}

static void session_write_all(const Shape *shape, BlockBackend *blk)
{
    write_at(blk, 0, shape->size, 9);
}

static void session_clear(const Shape *shape, BlockBackend *blk)
{
    bdrv_bitmap_clear(blk_bs(blk), "on", NULL);
    write_at(blk, 100 * KIB, KIB, 7);
}

static void session_merge(const Shape *shape, BlockBackend *blk)
{
    bdrv_bitmap_merge(blk_bs(blk), "off", blk_bs(blk), "on", NULL);
}

static void session_switch(const Shape *shape, BlockBackend *blk)
{
    bdrv_bitmap_disable(blk_bs(blk), "on", NULL);
    bdrv_bitmap_enable(blk_bs(blk), "on", NULL);
    write_at(blk, 70 * KIB, KIB, 7);
}

static void session_add(const Shape *shape, BlockBackend *blk)
{
    write_at(blk, 60 * KIB, KIB, 6);
    bdrv_bitmap_add(blk_bs(blk), "new", 4096, true, false, NULL);
    write_at(blk, 70 * KIB, KIB, 7);
}

static void session_remove(const Shape *shape, BlockBackend *blk)
{
    write_at(blk, 60 * KIB, KIB, 6);
    bdrv_bitmap_remove(blk_bs(blk), "off", NULL);
    write_at(blk, 70 * KIB, KIB, 7);
}

static void session_grow(const Shape *shape, BlockBackend *blk)
{
    write_at(blk, 60 * KIB, KIB, 6);
    blk_truncate(blk, (int64_t)(shape->size * 3), false, PREALLOC_MODE_OFF, true, NULL);
    write_at(blk, shape->size * 2, KIB, 7);
}

static void session_shrink(const Shape *shape, BlockBackend *blk)
{
    blk_truncate(blk, (int64_t)(shape->size / 4), false, PREALLOC_MODE_OFF, true, NULL);
    write_at(blk, 70 * KIB, KIB, 7);
}

static void session_amend(const Shape *shape, BlockBackend *blk)
{
    write_at(blk, 60 * KIB, KIB, 6);
    bdrv_amend(blk_bs(blk), json_pack("{s:i}", "size", (int)shape->size * 3), NULL, NULL);
    write_at(blk, shape->size * 2, KIB, 7);
}

/* What fails the first time must not mislead the second. */
static void session_store_again(const Shape *shape, BlockBackend *blk)
{
    bdrv_bitmap_clear(blk_bs(blk), "on", NULL);
    bdrv_store_bitmaps(blk_bs(blk), NULL);
    write_at(blk, 0, KIB, 7);
}

static const Session sessions[] = {
    {"write", session_write},
    {"write-all", session_write_all},
    {"clear", session_clear, .clears_on = true},
    {"merge", session_merge, .changes_off = true},
    {"switch", session_switch},
    {"add", session_add},
    {"remove", session_remove, .removes_off = true},
    {"grow", session_grow},
    {"shrink", session_shrink},
    {"amend", session_amend},
    {"store-again", session_store_again, .clears_on = true},
};

/* ---- what must hold ---- */

static void no_finding_but_leaks(const BdrvCheckFinding *finding, void *opaque)
{
    g_test_message("check: %s", finding->text);
}

static void assert_sound(int disk)
{
    g_autoptr(BlockBackend) blk = open_disk(disk, BDRV_O_CHECK);
    g_autoptr(GError) err = NULL;
    BdrvCheckOptions opts = {.finding = no_finding_but_leaks};
    BdrvCheckResult result;
    bool dirty = qcow2_state(blk_bs(blk))->header.incompatible & QCOW2_INCOMPAT_DIRTY;
    bdrv_check(blk_bs(blk), &opts, &result, &err);
    g_assert_no_error(err);
    g_assert_cmpuint(result.check_errors, ==, 0);
    g_assert_true(dirty || result.corruptions == 0);
}

static void assert_on(const Session *s, const Marks *was, const Marks *is, const uint8_t *before,
                      const uint8_t *now)
{
    uint64_t n = MIN(was->size, is->size) / GRANULARITY;
    g_assert_true(is->listed);
    for (uint64_t i = 0; is->trusted && i < n; i++) {
        bool differs = memcmp(before + i * GRANULARITY, now + i * GRANULARITY, GRANULARITY);
        if ((differs || (was->bit[i] && !s->clears_on)) && !is->bit[i]) {
            g_error("granule %" PRIu64 " %s and is not dirty", i,
                    differs ? "changed" : "was dirty");
        }
    }
}

static void assert_off(const Session *s, const Marks *was, const Marks *was_on, const Marks *is)
{
    uint64_t n = MIN(was->size, is->size) / GRANULARITY;
    bool old = true, merged = true;
    g_assert_true(is->listed || s->removes_off);
    for (uint64_t i = 0; is->trusted && i < n; i++) {
        old &= is->bit[i] == was->bit[i];
        merged &= is->bit[i] >= (was->bit[i] | was_on->bit[i]);
    }
    g_assert_true(old || (s->changes_off && merged));
}

/* @ret_trusted: how many of both can be trusted. */
static void assert_state(const Session *s, int disk, unsigned *ret_trusted)
{
    assert_sound(disk);
    g_autoptr(BlockBackend) before = open_disk(BEFORE, 0), now = open_disk(disk, BDRV_O_RDWR);
    g_auto(Marks) was_on, was_off, on, off;
    read_marks(before, "on", &was_on);
    read_marks(before, "off", &was_off);
    g_assert_true(was_on.trusted && was_off.trusted);
    read_marks(now, "on", &on);
    read_marks(now, "off", &off);
    g_autofree uint8_t *old_content = read_all(before, was_on.size);
    g_autofree uint8_t *content = read_all(now, was_on.size);
    assert_on(s, &was_on, &on, old_content, content);
    assert_off(s, &was_off, &was_on, &off);
    *ret_trusted = on.trusted + (off.trusted || s->removes_off);
}

static void run_session(const Shape *shape, const Session *s)
{
    BlockBackend *blk = open_disk(0, BDRV_O_RDWR | BDRV_O_RESIZE);
    s->run(shape, blk);
    blk_unref(blk);
}

/* ---- crash ---- */

static void crash_session(const Shape *shape, const Session *s, GRand *toss)
{
    unsigned trusted;
    log_copy(&log_disks[0], &log_disks[BEFORE]);
    log_start(&log_disks[0]);
    run_session(shape, s);
    g_autoptr(GArray) log = g_steal_pointer(&log_disks[0].log);
    assert_state(s, 0, &trusted);
    g_assert_cmpuint(trusted, ==, 2); /* a session that ends well leaves all of them right */
    for (guint n = 1; n <= log->len; n++) {
        g_test_message("%s, %s: power lost after %u of %u", shape->name, s->name, n, log->len);
        log_copy(&log_disks[SCRATCH], &log_disks[BEFORE]);
        log_rebuild(&log_disks[SCRATCH], log, n, n % 3 ? toss : NULL);
        assert_state(s, SCRATCH, &trusted);
    }
}

static void test_crash(gconstpointer data)
{
    const Shape *shape = data;
    guint32 seed = g_test_rand_int();
    g_test_message("seed %u", seed);
    g_autoptr(GRand) toss = g_rand_new_with_seed(seed);
    make_before(shape);
    for (size_t i = 0; i < G_N_ELEMENTS(sessions); i++) {
        crash_session(shape, &sessions[i], toss);
    }
}

/* ---- faults ---- */

static void fault_session(const Shape *shape, const Session *s)
{
    unsigned trusted, failures;
    unsigned n = 0;
    do {
        log_copy(&log_disks[0], &log_disks[BEFORE]);
        log_disks[0].fail_at = ++n;
        run_session(shape, s);
        log_disks[0].fail_at = 0;
        failures = log_disks[0].failures;
        g_test_message("%s, %s: failure %u", shape->name, s->name, n);
        assert_state(s, 0, &trusted);
    } while (failures);
}

static void test_fault(gconstpointer data)
{
    make_before(data);
    for (size_t i = 0; i < G_N_ELEMENTS(sessions); i++) {
        fault_session(data, &sessions[i]);
    }
}

/* ---- exact costs ---- */

static unsigned count_events(const GArray *log, LogKind kind)
{
    unsigned n = 0;
    for (guint i = 0; i < log->len; i++) {
        n += g_array_index(log, LogEvent, i).kind == kind;
    }
    return n;
}

/* The log of one session on a warm image. */
static GArray *log_of(const Shape *shape, void (*run)(BlockBackend *blk))
{
    log_start(&log_disks[0]);
    BlockBackend *blk = open_disk(0, BDRV_O_RDWR);
    run(blk);
    GError *err = NULL;
    bdrv_store_bitmaps(blk_bs(blk), &err);
    g_assert_no_error(err);
    unsigned n = count_events(log_disks[0].log, LOG_FLUSH);
    GArray *log = g_steal_pointer(&log_disks[0].log);
    g_test_message("%u flushes", n);
    blk_unref(blk);
    return log;
}

static void run_read(BlockBackend *blk)
{
    uint8_t byte;
    g_assert_cmpint(blk_pread(blk, 0, 1, &byte, 0), ==, 0);
}

static void run_rewrite(BlockBackend *blk)
{
    write_at(blk, 0, KIB, 0x77); /* dirty already */
}

static void run_write(BlockBackend *blk)
{
    write_at(blk, 300 * KIB, KIB, 0x77);
    write_at(blk, 301 * KIB, KIB, 0x78);
}

static void test_costs(void)
{
    make_before(&shapes[1]);
    g_autoptr(GArray) nothing = log_of(&shapes[1], run_read);
    g_assert_cmpuint(nothing->len, ==, 0);
    g_autoptr(GArray) known = log_of(&shapes[1], run_rewrite);
    for (guint i = 0; i < known->len; i++) { /* the data, and no bitmap */
        g_assert_cmpuint(g_array_index(known, LogEvent, i).bytes, !=, 512);
    }
    g_autoptr(GArray) new = log_of(&shapes[1], run_write);
    g_assert_cmpuint(count_events(new, LOG_FLUSH), <=, 4);
    uint64_t bytes = 0;
    for (guint i = 0; i < new->len; i++) {
        bytes += g_array_index(new, LogEvent, i).bytes;
    }
    g_test_message("%" PRIu64 " bytes", bytes);
}

/* ---- damage ---- */

static uint64_t directory_offset(const LogDisk *d)
{
    g_autoptr(BlockBackend) blk = open_disk((int)(d - log_disks), BDRV_O_CHECK);
    BDRVQcow2State *s = qcow2_state(blk_bs(blk));
    const Qcow2Extension *ext = qcow2_find_extension(s->extensions, QCOW2_EXT_BITMAPS);
    return qb_ldbe64(ext->data + QCOW2_BITMAP_EXT_DIR_OFFSET);
}

/* Whatever the bytes are: it opens, is written, closed, and the bitmaps can be removed. */
static void use_damaged(void)
{
    g_autoptr(GError) err = NULL;
    json_t *options = json_pack("{s:s, s:s, s:i}", "driver", "qcow2", "file.driver", "test-log",
                                "file.disk", 0);
    BlockBackend *blk = blk_new_open(NULL, options, BDRV_O_RDWR | BDRV_O_RESIZE, NULL);
    g_assert_nonnull(blk);
    write_at(blk, 64 * KIB, KIB, 5);
    bdrv_bitmap_merge(blk_bs(blk), "on", blk_bs(blk), "off", NULL);
    bdrv_bitmap_clear(blk_bs(blk), "off", NULL);
    bdrv_bitmap_add(blk_bs(blk), "new", 0, true, false, NULL);
    blk_unref(blk);
    blk = open_disk(0, BDRV_O_RDWR);
    bdrv_bitmap_remove(blk_bs(blk), "on", NULL);
    if (!atomic_load(&qcow2_state(blk_bs(blk))->corrupt)) {
        bdrv_bitmap_remove_all(blk_bs(blk), &err);
        g_assert_no_error(err);
        g_assert_false(qcow2_bitmaps_present(qcow2_state(blk_bs(blk))));
    }
    blk_unref(blk);
}

static void test_damage(void)
{
    guint32 seed = g_test_rand_int();
    g_test_message("seed %u", seed);
    g_autoptr(GRand) r = g_rand_new_with_seed(seed);
    make_before(&shapes[0]);
    uint64_t dir = directory_offset(&log_disks[BEFORE]);
    uint64_t table = qb_ldbe64(log_disks[BEFORE].data + dir);
    static const uint8_t values[] = {0, 1, 0x7f, 0x80, 0xff, 0x10};
    for (int i = 0; i < 150; i++) {
        log_copy(&log_disks[0], &log_disks[BEFORE]);
        for (int k = g_rand_int_range(r, 1, 4); k > 0; k--) {
            uint64_t at = g_rand_int_range(r, 0, 3) ? dir + (uint64_t)g_rand_int_range(r, 0, 64)
                                                    : table + (uint64_t)g_rand_int_range(r, 0, 16);
            log_disks[0].data[at] = values[g_rand_int_range(r, 0, G_N_ELEMENTS(values))];
        }
        use_damaged();
    }
}

/* A table in the place of the L1 table, and one that two bitmaps share: kept, but never used. */
static void test_stolen_places(void)
{
    make_before(&shapes[0]);
    uint64_t dir = directory_offset(&log_disks[BEFORE]);
    uint8_t *entry = log_disks[0].data + dir;
    uint8_t *second = entry + 32; /* "off" fills 27 bytes, "on" follows */
    uint64_t l1 = qb_ldbe64(log_disks[0].data + QCOW2_HDR_L1_OFFSET);
    for (int turn = 0; turn < 2; turn++) {
        log_copy(&log_disks[0], &log_disks[BEFORE]);
        entry = log_disks[0].data + dir;
        second = entry + 32;
        qb_stbe64(second, turn ? qb_ldbe64(entry) : l1);
        g_autoptr(BlockBackend) blk = open_disk(0, 0);
        Marks on, off;
        read_marks(blk, "on", &on);
        read_marks(blk, "off", &off);
        g_assert_true(on.listed && !on.trusted);
        g_assert_true(off.listed && off.trusted == !turn);
        marks_clear(&on);
        marks_clear(&off);
    }
}

/* A repair at open may give a bitmap another table: the session must not bring the old one back. */
static void test_repair_at_open(void)
{
    const Shape *shape = &shapes[1];
    BdrvCheckOptions opts = {0};
    BdrvCheckResult result;
    make_before(shape);
    LogDisk *d = &log_disks[0];
    uint8_t *on = d->data + directory_offset(d) + 32;
    qb_stbe64(on, qb_ldbe64(d->data + QCOW2_HDR_L1_OFFSET));
    uint64_t bits = qb_ldbe64(d->data + QCOW2_HDR_INCOMPATIBLE);
    qb_stbe64(d->data + QCOW2_HDR_INCOMPATIBLE, bits | QCOW2_INCOMPAT_DIRTY);
    BlockBackend *blk = open_disk(0, BDRV_O_RDWR);
    write_at(blk, 60 * KIB, KIB, 6);
    blk_unref(blk);
    blk = open_disk(0, BDRV_O_CHECK);
    g_assert_true(bdrv_check(blk_bs(blk), &opts, &result, NULL));
    g_assert_cmpuint(result.corruptions + result.check_errors, ==, 0);
    blk_unref(blk);
    blk = open_disk(0, 0);
    g_auto(Marks) marks;
    read_marks(blk, "on", &marks);
    g_assert_true(marks.listed && marks.trusted && marks.bit[60 * KIB / GRANULARITY]);
    blk_unref(blk);
}

/* The only table entry of "on" says "all ones", as a repair or a full disk leaves it. */
static void make_all_ones(const Shape *shape)
{
    make_before(shape);
    uint64_t dir = directory_offset(&log_disks[0]);
    uint8_t *on = log_disks[0].data + dir + 32;
    qb_stbe64(log_disks[0].data + qb_ldbe64(on), QCOW2_BITMAP_ENTRY_ALL_ONES);
}

/* All ones ends where the disk ended, and a chunk of it can be stored after it changed. */
static void test_all_ones_grow(void)
{
    const Shape *shape = &shapes[1];
    uint64_t later = 100 * KIB * KIB; /* another page of bits, the same chunk */
    make_all_ones(shape);
    BlockBackend *blk = open_disk(0, BDRV_O_RDWR | BDRV_O_RESIZE);
    blk_truncate(blk, (int64_t)(later * 2), false, PREALLOC_MODE_OFF, true, NULL);
    write_at(blk, later, KIB, 7);
    blk_unref(blk);
    blk = open_disk(0, 0);
    g_auto(Marks) on;
    read_marks(blk, "on", &on);
    g_assert_true(on.trusted);
    for (uint64_t i = 0; i < on.size / GRANULARITY; i++) {
        uint64_t at = i * GRANULARITY;
        g_assert_cmpint(on.bit[i], ==, at < shape->size || (at >= later && at < later + KIB));
    }
    blk_unref(blk);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    log_init();
    for (size_t i = 0; i < G_N_ELEMENTS(shapes); i++) {
        g_autofree char *crash = g_strdup_printf("/qcow2-bitmap/crash/%s", shapes[i].name);
        g_autofree char *fault = g_strdup_printf("/qcow2-bitmap/fault/%s", shapes[i].name);
        g_test_add_data_func(crash, &shapes[i], test_crash);
        g_test_add_data_func(fault, &shapes[i], test_fault);
    }
    g_test_add_func("/qcow2-bitmap/costs", test_costs);
    g_test_add_func("/qcow2-bitmap/all-ones-grow", test_all_ones_grow);
    g_test_add_func("/qcow2-bitmap/repair-at-open", test_repair_at_open);
    g_test_add_func("/qcow2-bitmap/damage", test_damage);
    g_test_add_func("/qcow2-bitmap/stolen-places", test_stolen_places);
    return log_done(g_test_run());
}
