/*
 * Whole-image operations of qcow2 on images of many shapes, against an oracle of the guest's disk.
 *
 *   shapes     each operation once on every shape; after each step our check, and in the end the
 *              peer's (`qemu-img check`, where it is installed)
 *   crash      power is lost after each write, flush or change of length of an operation, with and
 *              without the unflushed sectors: the image is sound (or says that it is dirty), opens
 *              writable, and reads as before or as after
 *   fault      each of them fails once: the image is sound, and what the operation returned is true
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2.h"
#include "tests/unit/log-driver.h"

#include <inttypes.h>
#include <stdlib.h>
#include <unistd.h>

#define KIB UINT64_C(1024)
#define MIB (KIB * KIB)
#define BACKING 1 /* number of the disk below */
#define SCRATCH 2 /* where a crashed disk is put together */

/* A shape of image. */
typedef struct Shape {
    const char *name, *options;
    uint64_t size;
    uint64_t unit;      /* writes are of this size, more or less */
    bool backing, no_snapshots, version2;
} Shape;

static const Shape shapes[] = {
    {"512", "cluster_size=512", 700 * KIB, 3 * KIB},
    {"512-backing", "cluster_size=512", 700 * KIB, 3 * KIB, .backing = true},
    {"512-rc64", "cluster_size=512,refcount_bits=64", 700 * KIB, 3 * KIB},
    {"512-v2", "cluster_size=512,compat=0.10", 700 * KIB, 3 * KIB, .version2 = true},
    {"4k-rc2", "cluster_size=4k,refcount_bits=2", 2500 * KIB, 9 * KIB, .backing = true},
    {"4k-rc1", "cluster_size=4k,refcount_bits=1", 2500 * KIB, 9 * KIB, .no_snapshots = true},
    {"64k", "cluster_size=64k", 1600 * KIB, 100 * KIB, .backing = true},
    {"64k-v2", "cluster_size=64k,compat=0.10", 1600 * KIB, 100 * KIB, true, .version2 = true},
    {"64k-lazy", "lazy_refcounts=on,refcount_bits=8", 1600 * KIB, 100 * KIB},
    {"16k-subclusters", "cluster_size=16k,extended_l2=on", 900 * KIB, 5 * KIB, .backing = true},
    {"2M", "cluster_size=2M", 10 * MIB, 700 * KIB, .backing = true},
};

/* --- images --- */

static char *peer; /* the field's qemu-img, or NULL */

static BlockDriverState *open_below(void)
{
    json_t *options = json_pack("{s:s, s:s, s:s, s:i}", "driver", "raw", "node-name", "below",
                                "file.driver", "test-log", "file.disk", BACKING);
    BlockDriverState *bs = bdrv_open(NULL, options, 0, NULL);
    g_assert_nonnull(bs);
    return bs;
}

/* Whatever name the header has, the disk below is the same one. */
static BlockBackend *try_open(const Shape *shape, int disk, int flags)
{
    g_autoptr(GError) err = NULL;
    g_autoptr(BlockDriverState) below = shape->backing ? open_below() : NULL;
    json_t *options = json_pack("{s:s, s:s, s:i}", "driver", "qcow2", "file.driver", "test-log",
                                "file.disk", disk);
    json_object_set_new(options, "backing", below ? json_string("below") : json_null());
    BlockBackend *blk = blk_new_open(NULL, options, flags, &err);
    if (!blk) {
        g_test_message("open: %s", err->message);
    }
    return blk;
}

static BlockBackend *open_image(const Shape *shape, int disk, int flags)
{
    BlockBackend *blk = try_open(shape, disk, flags);
    g_assert_nonnull(blk);
    return blk;
}

/* What the disk below holds: sectors that tell where they are. */
static void fill_below(uint8_t *data, uint64_t bytes)
{
    for (uint64_t pos = 0; pos < bytes; pos += 512) {
        memset(data + pos, (int)(0x40 + (pos >> 9) % 61), MIN(bytes - pos, 512));
    }
}

static void create_image(const Shape *shape)
{
    g_autoptr(GError) err = NULL;
    g_autoptr(json_t) options = qb_opts_parse(shape->options, NULL, NULL);
    json_object_set_new(options, "size", json_integer((json_int_t)shape->size));
    log_reset(&log_disks[BACKING]);
    if (shape->backing) {
        json_object_set_new(options, "backing_file", json_string("below.raw"));
        json_object_set_new(options, "backing_fmt", json_string("raw"));
        log_resize(&log_disks[BACKING], shape->size * 2);
        fill_below(log_disks[BACKING].data, shape->size * 2);
    }
    bdrv_img_create("test-log:0", "qcow2", options, NULL, &err);
    g_assert_no_error(err);
}

/* --- checks --- */

/* The one mismatch that version 2, which has no dirty bit, may show after a crash. */
static void count_harmless(const BdrvCheckFinding *finding, void *opaque)
{
    g_test_message("check: %s", finding->text);
    if (finding->kind == BDRV_FINDING_CORRUPTION && strstr(finding->text, "OFLAG_COPIED") &&
        g_str_has_suffix(finding->text, " refcount=1")) {
        ++*(unsigned *)opaque;
    }
}

/* *ret_harmless: corruptions that are "COPIED clear, refcount 1"; NULL: none are. */
static BdrvCheckResult run_check(BlockBackend *blk, unsigned *ret_harmless)
{
    g_autoptr(GError) err = NULL;
    unsigned harmless = 0;
    BdrvCheckOptions opts = {.finding = count_harmless, .opaque = &harmless};
    BdrvCheckResult result;
    bdrv_check(blk_bs(blk), &opts, &result, &err);
    g_assert_no_error(err);
    if (ret_harmless) {
        *ret_harmless = harmless;
    }
    return result;
}

static void assert_clean(const Shape *shape, int disk)
{
    g_autoptr(BlockBackend) blk = open_image(shape, disk, BDRV_O_CHECK);
    BdrvCheckResult result = run_check(blk, NULL);
    g_assert_cmpuint(result.corruptions, ==, 0);
    g_assert_cmpuint(result.check_errors, ==, 0);
    g_assert_cmpuint(result.leaks, ==, 0);
}

/* What the field's own tool thinks of it. */
static void assert_peer_agrees(int disk)
{
    if (!peer) {
        return;
    }
    g_autofree char *path = NULL;
    int fd = g_file_open_tmp("qcow2-ops-XXXXXX", &path, NULL);
    g_assert_cmpint(write(fd, log_disks[disk].data, log_disks[disk].length), ==,
                    (ssize_t)log_disks[disk].length);
    close(fd);
    g_autofree char *command =
        g_strdup_printf("%s check -q 'json:{\"driver\":\"qcow2\",\"backing\":null,"
                        "\"file\":{\"driver\":\"file\",\"filename\":\"%s\"}}'", peer, path);
    int status = system(command);
    unlink(path);
    g_assert_cmpint(status, ==, 0);
}

/* --- the guest's disk --- */

typedef struct Guest {
    uint8_t *data;
    uint64_t size;
} Guest;

static void guest_clear(Guest *g)
{
    g_clear_pointer(&g->data, g_free);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Guest, guest_clear)

static Guest guest_copy(const Guest *g)
{
    return (Guest){g_memdup2(g->data, g->size), g->size};
}

/* As a new image, or one that was emptied, reads. */
static void guest_below(Guest *g, const Shape *shape)
{
    memset(g->data, 0, g->size);
    if (shape->backing) {
        fill_below(g->data, MIN(g->size, shape->size * 2));
    }
}

static Guest guest_new(const Shape *shape)
{
    Guest g = {g_malloc(shape->size), shape->size};
    guest_below(&g, shape);
    return g;
}

static void guest_resize(Guest *g, uint64_t size)
{
    g->data = g_realloc(g->data, size);
    if (size > g->size) {
        memset(g->data + g->size, 0, size - g->size);
    }
    g->size = size;
}

static Guest guest_read(BlockBackend *blk)
{
    Guest g = {NULL, (uint64_t)blk_getlength(blk)};
    g.data = g_malloc(g.size);
    g_assert_cmpint(blk_pread(blk, 0, (int64_t)g.size, g.data, 0), ==, 0);
    return g;
}

static bool guest_equal(const Guest *a, const Guest *b)
{
    return a->size == b->size && !memcmp(a->data, b->data, a->size);
}

static void assert_reads(BlockBackend *blk, const Guest *want)
{
    g_auto(Guest) got = guest_read(blk);
    g_assert_cmpuint(got.size, ==, want->size);
    for (uint64_t i = 0; i < want->size && !guest_equal(&got, want); i++) {
        if (got.data[i] != want->data[i]) {
            g_error("guest byte %#" PRIx64 " is %#x, should be %#x", i, got.data[i], want->data[i]);
        }
    }
}

/* --- guest writes --- */

static void write_at(BlockBackend *blk, Guest *g, uint64_t pos, uint64_t bytes, uint8_t byte)
{
    bytes = MIN(bytes, g->size - pos);
    memset(g->data + pos, byte, bytes);
    g_assert_cmpint(blk_pwrite(blk, (int64_t)pos, (int64_t)bytes, g->data + pos, 0), ==, 0);
}

/* Some writes spread over the disk, one of them up to its end. */
static void write_some(BlockBackend *blk, Guest *g, const Shape *shape, uint8_t byte)
{
    uint64_t step = g->size / 7;
    for (uint64_t i = 0; i < 6; i++) {
        uint64_t pos = (i * step + byte * UINT64_C(1536)) & ~UINT64_C(511);
        write_at(blk, g, MIN(pos, g->size - 512), shape->unit, (uint8_t)(byte + i));
    }
    write_at(blk, g, g->size - 512 * (1 + byte % 3), shape->unit, byte);
    g_assert_cmpint(blk_pwrite_zeroes(blk, (int64_t)(step & ~UINT64_C(511)), 2048, 0), ==, 0);
    memset(g->data + (step & ~UINT64_C(511)), 0, 2048);
}

/* Whole clusters: some that were never written, some that were, some given back. */
static void zero_some(BlockBackend *blk, Guest *g, uint64_t seed)
{
    BlockDriverInfo info;
    g_assert_true(bdrv_get_info(blk_bs(blk), &info, NULL));
    uint64_t step = qb_align_down(g->size / 5, info.cluster_size), bytes = 2 * info.cluster_size;
    for (uint64_t i = 0; i < 5; i++) {
        uint64_t pos = i * step + (seed + i) % 3 * info.cluster_size;
        if (pos + bytes <= g->size) {
            memset(g->data + pos, 0, bytes);
            int flags = i % 2 ? BDRV_REQ_MAY_UNMAP : 0;
            g_assert_cmpint(blk_pwrite_zeroes(blk, (int64_t)pos, (int64_t)bytes, flags), ==, 0);
        }
    }
}

/* --- operations --- */

/* One that is tried with crashes and faults. The oracle goes from before to after with it. */
typedef struct Operation {
    const char *name;
    bool (*run)(BlockBackend *blk, const Shape *shape, GError **errp);
    void (*oracle)(Guest *g, const Guest *snapshot, const Shape *shape);
    bool snapshots;    /* starts with snapshot "s1" in the image, taken before the last writes */
    bool by_clusters;  /* a crash may leave some clusters as before and some as after */
    bool needs_v3;
    bool needs_v2;     /* version 2, or what can become it */
    bool zeroes;       /* starts with zero clusters of all kinds */
    bool tables_only;  /* large clusters show nothing that smaller ones do not */
} Operation;

static bool run_snapshot_create(BlockBackend *blk, const Shape *shape, GError **errp)
{
    return bdrv_snapshot_create(blk_bs(blk), "new", errp);
}

static bool run_snapshot_apply(BlockBackend *blk, const Shape *shape, GError **errp)
{
    return bdrv_snapshot_apply(blk_bs(blk), "s1", errp);
}

static bool run_snapshot_delete(BlockBackend *blk, const Shape *shape, GError **errp)
{
    return bdrv_snapshot_delete(blk_bs(blk), NULL, "s1", errp);
}

static uint64_t shrunk(const Shape *shape)
{
    return shape->size / 3 / 512 * 512 + 512;
}

static uint64_t grown(const Shape *shape)
{
    return shape->size + shape->size / 2 + 1536;
}

static bool run_shrink(BlockBackend *blk, const Shape *shape, GError **errp)
{
    return blk_truncate(blk, (int64_t)shrunk(shape), true, PREALLOC_MODE_OFF, false, errp);
}

static bool run_grow(BlockBackend *blk, const Shape *shape, GError **errp)
{
    return blk_truncate(blk, (int64_t)grown(shape), true, PREALLOC_MODE_OFF, false, errp);
}

static bool run_grow_mapped(BlockBackend *blk, const Shape *shape, GError **errp)
{
    return blk_truncate(blk, (int64_t)grown(shape), true, PREALLOC_MODE_METADATA, false, errp);
}

static bool run_empty(BlockBackend *blk, const Shape *shape, GError **errp)
{
    return blk_make_empty(blk, false, errp);
}

#define OTHER_NAME "another/and/rather/longer/name-of-the-image-below.qcow2"

static bool run_rename(BlockBackend *blk, const Shape *shape, GError **errp)
{
    return bdrv_change_backing_file(blk_bs(blk), OTHER_NAME, "qcow2", errp);
}

static bool run_forget(BlockBackend *blk, const Shape *shape, GError **errp)
{
    return bdrv_change_backing_file(blk_bs(blk), NULL, NULL, errp);
}

/* The same again has nothing left to do. */
static bool amend(BlockBackend *blk, const char *options, GError **errp)
{
    BlockDriverState *bs = blk_bs(blk);
    if (!bdrv_amend(bs, qb_opts_parse(options, NULL, NULL), NULL, errp)) {
        return false;
    }
    Qcow2Header h = qcow2_state(bs)->header;
    g_autoptr(GError) err = NULL;
    bdrv_amend(bs, qb_opts_parse(options, NULL, NULL), NULL, &err);
    g_assert_no_error(err);
    g_assert_cmpmem(&h, sizeof(h), &qcow2_state(bs)->header, sizeof(h));
    return true;
}

static bool run_widen(BlockBackend *blk, const Shape *shape, GError **errp)
{
    return amend(blk, "refcount_bits=64", errp);
}

static bool run_narrow(BlockBackend *blk, const Shape *shape, GError **errp)
{
    return amend(blk, "refcount_bits=4", errp);
}

static bool run_upgrade(BlockBackend *blk, const Shape *shape, GError **errp)
{
    return amend(blk, "compat=1.1,lazy_refcounts=on", errp);
}

static bool run_downgrade(BlockBackend *blk, const Shape *shape, GError **errp)
{
    return amend(blk, "compat=0.10,refcount_bits=16", errp);
}

static void same(Guest *g, const Guest *snapshot, const Shape *shape)
{
}

static void becomes_snapshot(Guest *g, const Guest *snapshot, const Shape *shape)
{
    guest_clear(g);
    *g = guest_copy(snapshot);
}

static void becomes_shrunk(Guest *g, const Guest *snapshot, const Shape *shape)
{
    guest_resize(g, shrunk(shape));
}

static void becomes_grown(Guest *g, const Guest *snapshot, const Shape *shape)
{
    guest_resize(g, grown(shape));
}

static void becomes_empty(Guest *g, const Guest *snapshot, const Shape *shape)
{
    guest_below(g, shape);
}

static const Operation operations[] = {
    {"create", run_snapshot_create, same, .snapshots = false},
    {"create-second", run_snapshot_create, same, .snapshots = true},
    {"apply", run_snapshot_apply, becomes_snapshot, .snapshots = true},
    {"delete", run_snapshot_delete, same, .snapshots = true},
    {"shrink", run_shrink, becomes_shrunk},
    {"shrink-snapshot", run_shrink, becomes_shrunk, .snapshots = true, .needs_v3 = true},
    {"grow", run_grow, becomes_grown},
    {"grow-mapped", run_grow_mapped, becomes_grown},
    {"empty", run_empty, becomes_empty, .by_clusters = true},
    {"empty-snapshot", run_empty, becomes_empty, .snapshots = true, .by_clusters = true},
    {"rename", run_rename, same},
    {"forget", run_forget, same},
    {"widen", run_widen, same, .needs_v3 = true, .tables_only = true},
    {"narrow-snapshot", run_narrow, same, .snapshots = true, .needs_v3 = true,
     .tables_only = true},
    {"upgrade", run_upgrade, same, .needs_v2 = true, .tables_only = true},
    {"upgrade-snapshot", run_upgrade, same, .snapshots = true, .needs_v2 = true,
     .tables_only = true},
    {"downgrade", run_downgrade, same, .needs_v2 = true, .zeroes = true, .tables_only = true},
    {"downgrade-snapshot", run_downgrade, same, .snapshots = true, .needs_v2 = true,
     .zeroes = true, .tables_only = true},
};

/* What an operation works on. */
typedef struct Trial {
    const Shape *shape;
    const Operation *op;
    Guest before, after, snapshot;
    LogDisk image; /* the disk before the operation */
} Trial;

static bool applies(const Operation *op, const Shape *shape)
{
    bool snapshots = op->snapshots || op->run == run_snapshot_create;
    return !(snapshots && shape->no_snapshots) && !(op->needs_v3 && shape->version2) &&
           !(op->needs_v2 && strstr(shape->options, "extended_l2")) &&
           !(op->tables_only && shape->unit > 500 * KIB);
}

static void trial_clear(Trial *t)
{
    guest_clear(&t->before);
    guest_clear(&t->after);
    guest_clear(&t->snapshot);
    log_reset(&t->image);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Trial, trial_clear)

static void prepare(Trial *t)
{
    create_image(t->shape);
    t->before = guest_new(t->shape);
    g_autoptr(BlockBackend) blk = open_image(t->shape, 0, BDRV_O_RDWR | BDRV_O_RESIZE);
    write_some(blk, &t->before, t->shape, 0x90);
    if (t->op->zeroes) {
        zero_some(blk, &t->before, 1);
    }
    if (t->op->snapshots) {
        g_assert_true(bdrv_snapshot_create(blk_bs(blk), "s1", NULL));
    }
    t->snapshot = guest_copy(&t->before);
    write_some(blk, &t->before, t->shape, 0xa1);
    if (t->op->zeroes) {
        zero_some(blk, &t->before, 2);
    }
    g_clear_pointer(&blk, blk_unref);
    log_copy(&t->image, &log_disks[0]);
    t->after = guest_copy(&t->before);
    t->op->oracle(&t->after, &t->snapshot, t->shape);
}

/* Runs the operation and closes the image. */
static bool run_operation(const Trial *t)
{
    g_autoptr(BlockBackend) blk = open_image(t->shape, 0, BDRV_O_RDWR | BDRV_O_RESIZE);
    g_autoptr(GError) err = NULL;
    bool ok = t->op->run(blk, t->shape, &err);
    if (!ok) {
        g_test_message("%s: %s", t->op->name, err->message);
    }
    return ok;
}

/* Each sector is of the one or of the other. */
static bool is_mixture(const Guest *g, const Guest *a, const Guest *b)
{
    for (uint64_t pos = 0; pos < g->size; pos += 512) {
        if (memcmp(g->data + pos, a->data + pos, 512) &&
            memcmp(g->data + pos, b->data + pos, 512)) {
            return false;
        }
    }
    return g->size == a->size && g->size == b->size;
}

static void assert_before_or_after(const Trial *t, BlockBackend *blk)
{
    g_auto(Guest) got = guest_read(blk);
    bool fine = guest_equal(&got, &t->before) || guest_equal(&got, &t->after) ||
                (t->op->by_clusters && is_mixture(&got, &t->before, &t->after));
    if (!fine) { /* say where */
        assert_reads(blk, got.size == t->before.size ? &t->before : &t->after);
    }
}

static bool says_dirty(int disk)
{
    Qcow2Header h;
    g_assert_true(qcow2_header_decode(log_disks[disk].data, log_disks[disk].length, &h, NULL));
    return h.incompatible & QCOW2_INCOMPAT_DIRTY;
}

/* No corruption but what the version has no way to avoid showing. */
static void assert_sound(const Trial *t, BlockBackend *blk)
{
    unsigned harmless;
    BdrvCheckResult result = run_check(blk, &harmless);
    g_assert_cmpuint(result.corruptions, ==, t->shape->version2 ? harmless : 0);
    g_assert_cmpuint(result.check_errors, ==, 0);
}

/* Whoever has a snapshot still finds in it what was put there. */
static void assert_snapshot_survived(const Trial *t, int disk)
{
    g_autoptr(GError) err = NULL;
    if (!t->op->zeroes || !t->op->snapshots) {
        return;
    }
    g_autoptr(BlockBackend) blk = open_image(t->shape, disk, 0);
    bdrv_snapshot_load_tmp(blk_bs(blk), "s1", &err);
    g_assert_no_error(err);
    assert_reads(blk, &t->snapshot);
}

/* The image on @disk is sound or says that it is not, opens writable, and reads as it may. */
static void assert_survived(const Trial *t, int disk)
{
    BlockBackend *blk;
    if (!says_dirty(disk)) {
        blk = open_image(t->shape, disk, BDRV_O_CHECK);
        assert_sound(t, blk);
        blk_unref(blk);
    }
    blk = open_image(t->shape, disk, BDRV_O_RDWR);
    assert_before_or_after(t, blk);
    assert_sound(t, blk);
    blk_unref(blk);
    assert_snapshot_survived(t, disk);
}

/* --- the tests --- */

static void note_trial(const Trial *t, const char *how, unsigned n)
{
    g_test_message("%s on %s, %s %u", t->op->name, t->shape->name, how, n);
}

static void crash_at(const Trial *t, const GArray *log, guint n, GRand *toss)
{
    log_copy(&log_disks[SCRATCH], &t->image);
    log_rebuild(&log_disks[SCRATCH], log, n, toss);
    assert_survived(t, SCRATCH);
}

/* Sector 0 changes alone and whole; the rest of cluster 0 only with names and extensions. */
static void assert_header_writes(const Trial *t, const GArray *log)
{
    Qcow2Header h;
    bool names = t->op->run == run_rename || t->op->run == run_forget || t->op->needs_v2;
    g_assert_true(qcow2_header_decode(t->image.data, t->image.length, &h, NULL));
    for (guint i = 0; i < log->len; i++) {
        const LogEvent *e = &g_array_index(log, LogEvent, i);
        if (e->kind == LOG_WRITE && e->offset == 0) {
            g_assert_cmpuint(e->bytes, ==, QCOW2_HDR_SECTOR);
        } else if (e->kind == LOG_WRITE && e->offset >> h.cluster_bits == 0) {
            g_assert_true(names && e->offset >= QCOW2_HDR_SECTOR);
        }
    }
}

static void crash_one(const Shape *shape, const Operation *op)
{
    g_auto(Trial) t = {.shape = shape, .op = op};
    prepare(&t);
    log_start(&log_disks[0]);
    g_assert_true(run_operation(&t));
    g_autoptr(GArray) log = g_steal_pointer(&log_disks[0].log);
    assert_header_writes(&t, log);
    g_assert_false(says_dirty(0));
    assert_clean(shape, 0);
    g_autoptr(GRand) toss = g_rand_new_with_seed(g_test_rand_int());
    for (guint n = 0; n <= log->len; n++) {
        note_trial(&t, "crash after event", n);
        crash_at(&t, log, n, NULL);
        crash_at(&t, log, n, toss);
    }
}

/* Whoever fails gives back what it has taken; only a downgrade may leave that to the dirty bit. */
static void assert_no_leaks(const Trial *t)
{
    unsigned harmless;
    if (says_dirty(0)) {
        g_assert_true(t->op->run == run_downgrade);
        return;
    }
    g_autoptr(BlockBackend) blk = open_image(t->shape, 0, BDRV_O_CHECK);
    g_assert_cmpuint(run_check(blk, &harmless).leaks, ==, 0);
}

static void fault_at(const Trial *t, unsigned n, bool *ret_fired)
{
    log_copy(&log_disks[0], &t->image);
    log_disks[0].fail_at = n;
    bool ok = run_operation(t);
    *ret_fired = log_disks[0].failures > 0;
    log_disks[0].fail_at = 0;
    if (!ok) {
        assert_no_leaks(t);
    }
    assert_survived(t, 0);
    g_autoptr(BlockBackend) blk = open_image(t->shape, 0, 0);
    if (ok) {
        assert_reads(blk, &t->after);
    } else if (!t->op->by_clusters) {
        assert_reads(blk, &t->before);
    }
}

static void fault_one(const Shape *shape, const Operation *op)
{
    g_auto(Trial) t = {.shape = shape, .op = op};
    bool fired = true;
    prepare(&t);
    for (unsigned n = 1; fired; n++) {
        note_trial(&t, "fault at", n);
        fault_at(&t, n, &fired);
    }
}

typedef void (*TrialFn)(const Shape *shape, const Operation *op);

/* @data: index of the operation. The small shapes, which have everything that the others have. */
static void on_small_shapes(gconstpointer data, TrialFn fn)
{
    static const char *const small[] = {"512-backing", "512-v2", "4k-rc2", "16k-subclusters",
                                        "64k"};
    const Operation *op = data;
    for (size_t i = 0; i < G_N_ELEMENTS(shapes); i++) {
        for (size_t j = 0; j < G_N_ELEMENTS(small); j++) {
            if (!strcmp(shapes[i].name, small[j]) && applies(op, &shapes[i])) {
                fn(&shapes[i], op);
            }
        }
    }
}

static void test_crash(gconstpointer data)
{
    on_small_shapes(data, crash_one);
}

static void test_fault(gconstpointer data)
{
    on_small_shapes(data, fault_one);
}

/* Every operation on the shape, in images that live on. */
static void test_shape(gconstpointer data)
{
    const Shape *shape = data;
    for (size_t i = 0; i < G_N_ELEMENTS(operations); i++) {
        if (!applies(&operations[i], shape)) {
            continue;
        }
        g_auto(Trial) t = {.shape = shape, .op = &operations[i]};
        prepare(&t);
        assert_clean(shape, 0);
        g_assert_true(run_operation(&t));
        assert_clean(shape, 0);
        g_autoptr(BlockBackend) blk = open_image(shape, 0, BDRV_O_RDWR | BDRV_O_RESIZE);
        assert_reads(blk, &t.after);
        write_some(blk, &t.after, shape, 0xc3);
        assert_reads(blk, &t.after);
        g_clear_pointer(&blk, blk_unref);
        assert_clean(shape, 0);
        assert_peer_agrees(0);
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    log_init();
    peer = g_find_program_in_path("qemu-img");
    for (size_t i = 0; i < G_N_ELEMENTS(shapes); i++) {
        g_autofree char *path = g_strdup_printf("/qcow2/ops/shape/%s", shapes[i].name);
        g_test_add_data_func(path, &shapes[i], test_shape);
    }
    for (size_t i = 0; i < G_N_ELEMENTS(operations); i++) {
        g_autofree char *crash = g_strdup_printf("/qcow2/ops/crash/%s", operations[i].name);
        g_autofree char *fault = g_strdup_printf("/qcow2/ops/fault/%s", operations[i].name);
        g_test_add_data_func(crash, &operations[i], test_crash);
        g_test_add_data_func(fault, &operations[i], test_fault);
    }
    int ret = g_test_run();
    g_free(peer);
    return log_done(ret);
}
