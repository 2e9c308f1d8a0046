/*
 * Repair of damaged images: what it leaves, what a crash in the middle of it leaves, what a failing
 * disk leaves, and what it does to a device that cannot grow.
 *
 *   a sound image  --damage-->  --repair, recorded-->  sound, every guest cluster as before
 *                                  |
 *                                  `-- cut after each write or flush, with and without what no
 *                                      flush has made stable: guest data read as before, a
 *                                      second repair finishes
 *
 * Guest cluster i of the image holds the byte i + 1, so that a lost or exchanged cluster shows.
 *
 * SPDX-License-Identifier: MIT
 */
#include "qcow2-rec.h"

enum { GUEST_CLUSTERS = 8, CAPACITY_CLUSTERS = 400 };

/* ---------------------------------------------------------------- an image and its places */

typedef struct Shape {
    const char *opts;
    unsigned cluster;
} Shape;

static const Shape shapes[] = {
    {"size=64k,cluster_size=512", 512},
    {"size=64k,cluster_size=512,compat=0.10", 512},
    {"size=64k,cluster_size=512,refcount_bits=64", 512},
    {"size=3M,cluster_size=4k,refcount_bits=2", 4096},
};
enum { SMALL_SHAPES = 2 }; /* for what takes long */

static uint64_t get(const RecFile *f, uint64_t pos)
{
    return qb_ldbe64(f->data + pos);
}

static void put(RecFile *f, uint64_t pos, uint64_t value)
{
    qb_stbe64(f->data + pos, value);
}

static uint64_t l1_pos(const RecFile *f)
{
    return get(f, QCOW2_HDR_L1_OFFSET);
}

/* The entry of guest cluster @i; all of them are in the first table. */
static uint64_t l2_pos(const RecFile *f, unsigned i)
{
    return (get(f, l1_pos(f)) & QCOW2_ENTRY_OFFSET_MASK) + i * 8;
}

static uint64_t reftable_pos(const RecFile *f)
{
    return get(f, QCOW2_HDR_REFTABLE_OFFSET);
}

static unsigned refcount_order(const RecFile *f)
{
    return f->data[7] == 2 ? 4 : f->data[QCOW2_HDR_REFCOUNT_ORDER + 3];
}

static void set_count(RecFile *f, unsigned cluster_size, uint64_t offset, uint64_t count)
{
    uint8_t *block = f->data + get(f, reftable_pos(f));
    qcow2_refcount_write(block, refcount_order(f), offset / cluster_size, count);
}

static uint64_t data_offset(const RecFile *f, unsigned i)
{
    return get(f, l2_pos(f, i)) & QCOW2_ENTRY_OFFSET_MASK;
}

static RecFile *make_image(const Shape *shape)
{
    RecFile *f = rec_image_new("image", shape->opts, (size_t)shape->cluster * CAPACITY_CLUSTERS);
    g_autoptr(BlockBackend) blk = rec_open_rw(f);
    for (int i = 0; i < GUEST_CLUSTERS; i++) {
        image_write(blk, (int64_t)i * shape->cluster, shape->cluster, i + 1);
    }
    return f;
}

/* ---------------------------------------------------------------- damage */

typedef struct Damage {
    const char *name;
    void (*fn)(RecFile *f, unsigned cluster_size);
    int lost; /* a guest cluster whose content the damage itself decides, or -1 */
    bool in_place; /* nothing is lost, so the file must not grow */
    bool shares; /* tables stay shared: who writes makes his own, without telling the other COPIED */
} Damage;

static void counts_zero(RecFile *f, unsigned cluster_size)
{
    set_count(f, cluster_size, data_offset(f, 1), 0);
    set_count(f, cluster_size, data_offset(f, 2), 0);
    set_count(f, cluster_size, l1_pos(f), 0);
}

static void counts_high(RecFile *f, unsigned cluster_size)
{
    set_count(f, cluster_size, data_offset(f, 1), 3);
    set_count(f, cluster_size, reftable_pos(f), 2);
}

static void table_entry_lost(RecFile *f, unsigned cluster_size)
{
    put(f, reftable_pos(f), 0);
}

static void table_entry_unaligned(RecFile *f, unsigned cluster_size)
{
    put(f, reftable_pos(f), get(f, reftable_pos(f)) | 1);
}

static void table_entry_outside(RecFile *f, unsigned cluster_size)
{
    put(f, reftable_pos(f), UINT64_C(1) << 40);
}

static void block_named_twice(RecFile *f, unsigned cluster_size)
{
    put(f, reftable_pos(f) + 8, get(f, reftable_pos(f)));
}

static void table_lost(RecFile *f, unsigned cluster_size)
{
    put(f, QCOW2_HDR_REFTABLE_OFFSET, 0);
}

static void copied_flags(RecFile *f, unsigned cluster_size)
{
    put(f, l2_pos(f, 1), get(f, l2_pos(f, 1)) ^ QCOW2_ENTRY_COPIED);
    put(f, l2_pos(f, 2), get(f, l2_pos(f, 2)) ^ QCOW2_ENTRY_COPIED);
    put(f, l1_pos(f), get(f, l1_pos(f)) ^ QCOW2_ENTRY_COPIED);
}

static void data_over_l1(RecFile *f, unsigned cluster_size)
{
    put(f, l2_pos(f, 3), l1_pos(f) | QCOW2_ENTRY_COPIED);
}

static void data_over_reftable(RecFile *f, unsigned cluster_size)
{
    put(f, l2_pos(f, 3), reftable_pos(f) | QCOW2_ENTRY_COPIED);
}

static void data_over_block(RecFile *f, unsigned cluster_size)
{
    put(f, l2_pos(f, 3), get(f, reftable_pos(f)) | QCOW2_ENTRY_COPIED);
}

static void data_twice(RecFile *f, unsigned cluster_size)
{
    put(f, l2_pos(f, 3), get(f, l2_pos(f, 4)));
}

/* The table of the first entry is that of the second one, too. */
static void table_twice(RecFile *f, unsigned cluster_size)
{
    put(f, l1_pos(f) + 8, get(f, l1_pos(f)));
}

/* So it leads to a cluster of metadata twice. */
static void table_twice_over_l1(RecFile *f, unsigned cluster_size)
{
    table_twice(f, cluster_size);
    data_over_l1(f, cluster_size);
}

static void table_twice_data_twice(RecFile *f, unsigned cluster_size)
{
    table_twice(f, cluster_size);
    data_twice(f, cluster_size);
}

static void reserved_bits(RecFile *f, unsigned cluster_size)
{
    put(f, l2_pos(f, 1), get(f, l2_pos(f, 1)) | 0x4);
    put(f, l1_pos(f), get(f, l1_pos(f)) | 0x10);
}

static void everything(RecFile *f, unsigned cluster_size)
{
    counts_high(f, cluster_size);
    counts_zero(f, cluster_size);
    copied_flags(f, cluster_size);
    reserved_bits(f, cluster_size);
    data_over_l1(f, cluster_size);
}

static const Damage damages[] = {
    {"counts-zero", counts_zero, -1, true},
    {"counts-high", counts_high, -1, true},
    {"table-entry-lost", table_entry_lost, -1, true},
    {"table-entry-unaligned", table_entry_unaligned, -1, true},
    {"table-entry-outside", table_entry_outside, -1, true},
    {"block-named-twice", block_named_twice, -1, true},
    {"table-lost", table_lost, -1, true},
    {"copied-flags", copied_flags, -1, true},
    {"data-over-l1", data_over_l1, 3, false},
    {"data-over-reftable", data_over_reftable, 3, false},
    {"data-over-block", data_over_block, 3, false},
    {"data-twice", data_twice, 3, false},
    {"table-twice", table_twice, -1, true, true},
    {"table-twice-over-l1", table_twice_over_l1, 3, false, true},
    {"table-twice-data-twice", table_twice_data_twice, 3, false, true},
    {"reserved-bits", reserved_bits, -1, true},
    {"everything", everything, 3, false},
};

/* ---------------------------------------------------------------- repair and look */

/* False: it could not be run. *ret_left: what is left of the countdown @fail before the close. */
static bool check_with(const RecFile *f, unsigned fix, BdrvCheckResult *result,
                       const _Atomic(int) *fail, int *ret_left)
{
    g_autoptr(GError) err = NULL;
    BdrvCheckOptions opts = {.fix = fix, .finding = image_print_finding};
    int flags = fix ? BDRV_O_CHECK | BDRV_O_RDWR | BDRV_O_RESIZE : BDRV_O_CHECK;
    g_autoptr(BlockBackend) blk = rec_try_image(f, NULL, flags);
    bool ok = blk && bdrv_check(blk_bs(blk), &opts, result, &err);
    *ret_left = atomic_load(fail);
    return ok;
}

static bool check(const RecFile *f, unsigned fix, BdrvCheckResult *result)
{
    int left;
    return check_with(f, fix, result, &f->fail[REC_READ], &left);
}

static void expect_guest(const RecFile *f, const Shape *shape, int lost)
{
    g_autoptr(BlockBackend) blk = rec_open_image(f, NULL, BDRV_O_CHECK);
    for (int i = 0; i < GUEST_CLUSTERS; i++) {
        if (i != lost) {
            image_expect(blk, (int64_t)i * shape->cluster, shape->cluster, i + 1);
        }
    }
}

/* Repairs and asserts that nothing is left to be said. */
static void repair_fully(const RecFile *f, const Shape *shape, int lost)
{
    BdrvCheckResult result;
    g_assert_true(check(f, BDRV_FIX_LEAKS | BDRV_FIX_ERRORS, &result));
    g_assert_cmpuint(result.corruptions, ==, 0);
    g_assert_cmpuint(result.leaks, ==, 0);
    g_assert_cmpuint(result.check_errors, ==, 0);
    rec_check(f, false);
    expect_guest(f, shape, lost);
}

/* Both must hold after a repair: writes through the image reach their own clusters only. */
static void expect_writable(const RecFile *f, const Shape *shape)
{
    g_autoptr(BlockBackend) blk = rec_open_rw(f);
    for (int i = 0; i < GUEST_CLUSTERS; i++) {
        image_write(blk, (int64_t)i * shape->cluster, shape->cluster, 0x40 + i);
    }
    for (int i = 0; i < GUEST_CLUSTERS; i++) {
        image_expect(blk, (int64_t)i * shape->cluster, shape->cluster, 0x40 + i);
    }
}

static void test_repair(gconstpointer data)
{
    const Damage *damage = data;
    for (size_t i = 0; i < G_N_ELEMENTS(shapes); i++) {
        RecFile *f = make_image(&shapes[i]);
        int64_t length = f->length;
        BdrvCheckResult result;
        damage->fn(f, shapes[i].cluster);
        g_assert_true(check(f, 0, &result));
        g_assert_cmpuint(result.corruptions + result.leaks, >, 0);
        repair_fully(f, &shapes[i], damage->lost);
        if (damage->in_place) {
            g_assert_cmpint(f->length, <=, qb_align_up((uint64_t)length, shapes[i].cluster));
        }
        expect_writable(f, &shapes[i]);
        if (damage->shares) {
            g_assert_true(check(f, BDRV_FIX_LEAKS | BDRV_FIX_ERRORS, &result));
        }
        rec_check(f, false);
        rec_file_free(f);
    }
}

/* ---------------------------------------------------------------- crash */

static void crash_at(const RecFile *before, const GArray *log, guint n, GRand *toss,
                     const Shape *shape, int lost)
{
    RecFile *f = rec_file_dup("crashed", before);
    rec_replay(f, log, n, toss);
    expect_guest(f, shape, lost);
    repair_fully(f, shape, lost);
    rec_file_free(f);
}

static void test_crash(gconstpointer data)
{
    const Damage *damage = data;
    GRand *toss = g_rand_new_with_seed(11);
    for (size_t i = 0; i < SMALL_SHAPES; i++) {
        RecFile *f = make_image(&shapes[i]);
        damage->fn(f, shapes[i].cluster);
        RecFile *before = rec_file_dup("before", f);
        rec_start(f);
        repair_fully(f, &shapes[i], damage->lost);
        for (guint n = 0; n <= f->log->len; n++) {
            crash_at(before, f->log, n, NULL, &shapes[i], damage->lost);
            crash_at(before, f->log, n, toss, &shapes[i], damage->lost);
        }
        rec_file_free(before);
        rec_file_free(f);
    }
    g_rand_free(toss);
}

/* ---------------------------------------------------------------- faults */

/* The @n-th operation of @kind fails in the repair; false when there was none. */
static bool fail_at(const RecFile *before, RecKind kind, int n, const Shape *shape, int lost)
{
    BdrvCheckResult result;
    RecFile *f = rec_file_dup("failing", before);
    f->fail[kind] = n;
    int left;
    bool ok = check_with(f, BDRV_FIX_LEAKS | BDRV_FIX_ERRORS, &result, &f->fail[kind], &left);
    bool fired = f->fail[kind] == 0;
    f->fail[kind] = 0;
    if (ok && left == 0 && kind != REC_READ) {
        g_assert_cmpuint(result.check_errors, >, 0);
    }
    expect_guest(f, shape, lost);
    repair_fully(f, shape, lost);
    rec_file_free(f);
    return fired;
}

static void test_fault(gconstpointer data)
{
    const Damage *damage = data;
    static const RecKind kinds[] = {REC_READ, REC_WRITE, REC_FLUSH};
    for (size_t i = 0; i < SMALL_SHAPES; i++) {
        RecFile *before = make_image(&shapes[i]);
        damage->fn(before, shapes[i].cluster);
        for (size_t k = 0; k < G_N_ELEMENTS(kinds); k++) {
            int n = 1;
            while (fail_at(before, kinds[k], n, &shapes[i], damage->lost)) {
                n++;
            }
        }
        rec_file_free(before);
    }
}

/* ---------------------------------------------------------------- devices */

/* A device with room to spare: a lost structure is made anew inside it. */
static void test_device(gconstpointer data)
{
    const Damage *damage = data;
    for (size_t i = 0; i < G_N_ELEMENTS(shapes); i++) {
        RecFile *f = make_image(&shapes[i]);
        f->device = true;
        f->length = (int64_t)f->capacity;
        damage->fn(f, shapes[i].cluster);
        repair_fully(f, &shapes[i], damage->lost);
        g_assert_cmpint(f->length, ==, (int64_t)f->capacity);
        rec_file_free(f);
    }
}

/* A device without a free cluster: what needs one is not done, and nothing gets worse. */
static void test_full_device(void)
{
    for (size_t i = 0; i < G_N_ELEMENTS(shapes); i++) {
        RecFile *f = make_image(&shapes[i]);
        BdrvCheckResult result;
        f->device = true;
        f->length = qb_align_up((uint64_t)f->length, shapes[i].cluster);
        data_over_l1(f, shapes[i].cluster);
        set_count(f, shapes[i].cluster, data_offset(f, 0), 0);
        g_assert_true(check(f, BDRV_FIX_LEAKS | BDRV_FIX_ERRORS, &result));
        expect_guest(f, &shapes[i], 3);
        rec_file_free(f);
    }
}

/* ---------------------------------------------------------------- stopping */

typedef struct Stop {
    QbProgress progress;
    unsigned left;    /* findings */
    bool in_repair;   /* the last of them was one that a repair had made good */
} Stop;

static void stop_at_finding(const BdrvCheckFinding *finding, void *opaque)
{
    Stop *stop = opaque;
    if (stop->left && --stop->left == 0) {
        atomic_store(&stop->progress.cancel, true);
        stop->in_repair = finding->fixed;
    }
}

/* A repair that is asked to stop at finding @n. False: it had ended before. */
static bool stop_at(const RecFile *before, const Shape *shape, unsigned n, unsigned *ret_whole)
{
    RecFile *f = rec_file_dup("stopped", before);
    Stop stop = {.left = n};
    BdrvCheckOptions opts = {.fix = BDRV_FIX_LEAKS | BDRV_FIX_ERRORS, .finding = stop_at_finding,
                             .opaque = &stop, .progress = &stop.progress};
    BdrvCheckResult result;
    g_autoptr(GError) err = NULL;
    qb_progress_init(&stop.progress, 0);
    BlockBackend *blk = rec_open_image(f, NULL, BDRV_O_CHECK | BDRV_O_RDWR | BDRV_O_RESIZE);
    bool ok = bdrv_check(blk_bs(blk), &opts, &result, &err);
    blk_unref(blk);
    g_assert_true(ok || g_error_matches(err, QB_ERROR, EINTR));
    if (ok) {
        g_assert_cmpuint(result.corruptions + result.leaks + result.check_errors, ==, 0);
        rec_check(f, false);
        *ret_whole += stop.in_repair;
    }
    repair_fully(f, shape, -1);
    rec_file_free(f);
    return stop.left == 0;
}

/* Once a repair writes it goes on to its end, in every table. */
static void test_stop(void)
{
    const Shape *shape = &shapes[0];
    enum { IN_SECOND_TABLE = 512 / 8 };
    RecFile *f = make_image(shape);
    BlockBackend *blk = rec_open_rw(f);
    image_write(blk, (int64_t)IN_SECOND_TABLE * shape->cluster, shape->cluster, 0x77);
    blk_unref(blk);
    uint64_t second = get(f, l1_pos(f) + 8) & QCOW2_ENTRY_OFFSET_MASK;
    copied_flags(f, shape->cluster);
    counts_high(f, shape->cluster);
    put(f, second, get(f, second) ^ QCOW2_ENTRY_COPIED);
    unsigned n = 1, whole = 0;
    while (stop_at(f, shape, n, &whole)) {
        n++;
    }
    g_assert_cmpuint(whole, >, 0);
    rec_file_free(f);
}

/* ---------------------------------------------------------------- main */

static void add_cases(const char *what, GTestDataFunc fn)
{
    for (size_t i = 0; i < G_N_ELEMENTS(damages); i++) {
        g_autofree char *path = g_strdup_printf("/qcow2-repair/%s/%s", what, damages[i].name);
        g_test_add_data_func(path, &damages[i], fn);
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    rec_setup();
    add_cases("repair", test_repair);
    add_cases("crash", test_crash);
    add_cases("fault", test_fault);
    add_cases("device", test_device);
    g_test_add_func("/qcow2-repair/full-device", test_full_device);
    g_test_add_func("/qcow2-repair/stop", test_stop);
    int rc = g_test_run();
    image_teardown();
    return rc;
}
