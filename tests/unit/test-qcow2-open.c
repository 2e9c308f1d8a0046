/*
 * Opening qcow2 images: what is refused and with which words, what an open writes (nothing,
 * mostly), options of the node, damage found at run time, and header updates that fail.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2.h"
#include "tests/unit/log-driver.h"

#define CLUSTER 65536
#define DATA_AT (1 << 20) /* where the guest has written 0x77 */

static GString *warnings; /* what the library warned of */

static void note_warning(const char *text, void *opaque)
{
    g_string_append_printf(warnings, "%s\n", text);
}

/* --- images --- */

/* 8 MiB with one written cluster. */
static void make_image(const char *options)
{
    g_autoptr(json_t) opts = qb_opts_parse(options, NULL, NULL);
    json_object_set_new(opts, "size", json_integer(8 << 20));
    g_assert_true(bdrv_img_create("test-log:0", "qcow2", opts, NULL, NULL));
    g_autoptr(BlockBackend) blk =
        blk_new_open("test-log:0", json_pack("{s:s}", "driver", "qcow2"), BDRV_O_RDWR, NULL);
    g_autofree uint8_t *buf = g_malloc(CLUSTER);
    memset(buf, 0x77, CLUSTER);
    g_assert_cmpint(blk_pwrite(blk, DATA_AT, CLUSTER, buf, 0), ==, 0);
    g_string_truncate(warnings, 0);
}

static BlockBackend *try_open(const char *options, int flags, GError **errp)
{
    json_t *opts = qb_opts_parse(options ? options : "", NULL, NULL);
    json_object_set_new(opts, "driver", json_string("qcow2"));
    json_object_set_new(opts, "file.driver", json_string("test-log"));
    json_object_set_new(opts, "file.disk", json_string("0"));
    return blk_new_open(NULL, opts, flags, errp);
}

static BlockBackend *open_image(int flags)
{
    g_autoptr(GError) err = NULL;
    BlockBackend *blk = try_open(NULL, flags, &err);
    g_assert_no_error(err);
    return blk;
}

/* The text behind the name of the image. */
static void assert_refused(const char *options, int flags, int code, const char *text)
{
    g_autoptr(GError) err = NULL;
    g_assert_null(try_open(options, flags, &err));
    g_assert_nonnull(err);
    g_assert_cmpint(err->code, ==, code);
    if (!g_str_has_suffix(err->message, text)) {
        g_error("'%s' does not end in '%s'", err->message, text);
    }
}

static void poke64(size_t offset, uint64_t value)
{
    qb_stbe64(log_disks[0].data + offset, value);
}

static void poke32(size_t offset, uint32_t value)
{
    qb_stbe32(log_disks[0].data + offset, value);
}

static uint64_t peek64(size_t offset)
{
    return qb_ldbe64(log_disks[0].data + offset);
}

static void assert_reads(BlockBackend *blk)
{
    g_autofree uint8_t *buf = g_malloc(CLUSTER);
    g_assert_cmpint(blk_pread(blk, DATA_AT, CLUSTER, buf, 0), ==, 0);
    for (int i = 0; i < CLUSTER; i++) {
        g_assert_cmphex(buf[i], ==, 0x77);
    }
}

/* Events that changed the disk since log_start(). */
static unsigned changes(void)
{
    unsigned n = 0;
    for (guint i = 0; i < log_disks[0].log->len; i++) {
        n += g_array_index(log_disks[0].log, LogEvent, i).kind != LOG_FLUSH;
    }
    return n;
}

/* --- refusals --- */

static void test_corrupt_bit(void)
{
    make_image("");
    poke64(QCOW2_HDR_INCOMPATIBLE, QCOW2_INCOMPAT_CORRUPT);
    assert_refused(NULL, BDRV_O_RDWR, EACCES,
                   "qcow2: Image is corrupt; cannot be opened read/write");
    g_autoptr(BlockBackend) blk = open_image(0);
    assert_reads(blk);
    g_clear_pointer(&blk, blk_unref);
    blk = open_image(BDRV_O_RDWR | BDRV_O_CHECK);
}

static void test_unknown_features(void)
{
    make_image("");
    poke64(QCOW2_HDR_INCOMPATIBLE, UINT64_C(1) << 40 | 1 << 7);
    poke32(QCOW2_HDR_REFCOUNT_ORDER, 99); /* may mean something else with such a feature */
    memcpy(log_disks[0].data + 112 + 8 + 48 + 1, "\x07warp drive", 12); /* was "corrupt bit" */
    assert_refused(NULL, 0, ENOTSUP,
                   "Unsupported qcow2 feature(s): warp drive, Unknown incompatible feature: "
                   "10000000000");
}

static void test_encrypted(void)
{
    make_image("");
    poke32(QCOW2_HDR_CRYPT, 1);
    assert_refused(NULL, 0, ENOTSUP, "Encrypted qcow2 images are not supported (AES)");
    g_autoptr(BlockBackend) blk = open_image(BDRV_O_NO_IO);
    g_clear_pointer(&blk, blk_unref);
    blk = open_image(BDRV_O_CHECK);
}

static void test_tables_beyond_end(void)
{
    make_image("");
    poke64(QCOW2_HDR_L1_OFFSET, UINT64_C(1) << 40);
    assert_refused(NULL, 0, EINVAL, "Active L1 table lies beyond the end of the image file");
    make_image("");
    poke64(QCOW2_HDR_SNAPSHOTS_OFFSET, UINT64_C(1) << 40);
    poke32(QCOW2_HDR_NB_SNAPSHOTS, 65536);
    assert_refused(NULL, 0, EINVAL, "Snapshot table entry 0: Snapshot table reaches beyond the end"
                                    " of the image file");
}

static void test_data_file_name(void)
{
    static const struct {
        const char *name, *text;
    } cases[] = {
        {"", "'data-file' is required for this image"},
        {"nbd://nowhere/x", "Could not open 'nbd://nowhere/x': No such file or directory"},
        {"json:{'driver':'null-co'}",
         "Could not open 'json:{'driver':'null-co'}': No such file or directory"},
        {"test-log:2", "Could not open 'test-log:2': No such file or directory"},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        make_image("");
        poke64(QCOW2_HDR_INCOMPATIBLE, QCOW2_INCOMPAT_DATA_FILE);
        uint8_t *ext = log_disks[0].data + QCOW2_HDR_V3_LENGTH;
        memset(ext, 0, 512);
        qb_stbe32(ext, QCOW2_EXT_DATA_FILE);
        qb_stbe32(ext + 4, (uint32_t)strlen(cases[i].name));
        memcpy(ext + 8, cases[i].name, strlen(cases[i].name));
        assert_refused(NULL, 0, i ? ENOENT : EINVAL, cases[i].text);
        blk_unref(open_image(BDRV_O_NO_IO | BDRV_O_NO_BACKING)); /* asks for no data file */
    }
    make_image("");
    assert_refused("data-file.driver=null-co", 0, EINVAL,
                   "'data-file' can only be set for images with an external data file");
}

/* --- options --- */

static void test_options(void)
{
    static const struct {
        const char *options, *text; /* NULL: fine */
    } cases[] = {
        {"lazy-refcounts=on", NULL},
        {"lazy-refcounts=maybe", "Parameter 'lazy-refcounts' expects 'on' or 'off'"},
        {"cache-size=1M", NULL},
        {"cache-size=1M,l2-cache-size=512k", NULL},
        {"cache-size=1M,l2-cache-size=2M", "l2-cache-size may not exceed cache-size"},
        {"cache-size=1M,refcount-cache-size=2M", "refcount-cache-size may not exceed cache-size"},
        {"cache-size=1M,l2-cache-size=1,refcount-cache-size=1",
         "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time"},
        {"l2-cache-entry-size=512", NULL},
        {"l2-cache-entry-size=256",
         "L2 cache entry size must be a power of two between 512 and the cluster size (65536)"},
        {"l2-cache-entry-size=131072",
         "L2 cache entry size must be a power of two between 512 and the cluster size (65536)"},
        {"l2-cache-entry-size=1000",
         "L2 cache entry size must be a power of two between 512 and the cluster size (65536)"},
        {"overlap-check=all,overlap-check.inactive-l2=off", NULL},
        {"overlap-check.template=constant", NULL},
        {"overlap-check=most",
         "Unsupported value 'most' for qcow2 option 'overlap-check'. Allowed are any of the"
         " following: none, constant, cached, all"},
        {"overlap-check=none,overlap-check.template=all",
         "Conflicting values for qcow2 options 'overlap-check' ('none') and"
         " 'overlap-check.template' ('all')"},
        {"cache-clean-interval=0", NULL},
        {"cache-clean-interval=4294967296", "Cache clean interval too big"},
        {"pass-discard-request=on,pass-discard-snapshot=off,pass-discard-other=on", NULL},
        {"discard-no-unref=on", NULL},
        {"l3-cache-size=1", "Block format 'qcow2' does not support the option 'l3-cache-size'"},
    };
    make_image("");
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        if (cases[i].text) {
            assert_refused(cases[i].options, 0, EINVAL, cases[i].text);
        } else {
            g_autoptr(BlockBackend) blk = try_open(cases[i].options, 0, NULL);
            g_assert_nonnull(blk);
        }
    }
}

static void test_overlap_bits(void)
{
    make_image("");
    g_autoptr(BlockBackend) blk =
        try_open("overlap-check=none,overlap-check.active-l2=on", 0, NULL);
    g_assert_cmphex(qcow2_state(blk_bs(blk))->overlap_check, ==, QCOW2_OL_ACTIVE_L2);
    g_clear_pointer(&blk, blk_unref);
    blk = open_image(0);
    g_assert_cmphex(qcow2_state(blk_bs(blk))->overlap_check, ==, 0x17f); /* no inactive L2 */
}

static void test_version2_options(void)
{
    make_image("compat=0.10");
    assert_refused("lazy-refcounts=on", 0, EINVAL,
                   "Lazy refcounts require a qcow2 image of version 3 (compat=1.1) or above");
    assert_refused("discard-no-unref=on", 0, EINVAL,
                   "discard-no-unref is only supported since qcow2 version 3");
}

static void test_discard_follows(void)
{
    make_image("");
    g_autoptr(BlockBackend) blk = try_open("discard=unmap", BDRV_O_RDWR, NULL);
    const BDRVQcow2State *s = qcow2_state(blk_bs(blk));
    g_assert_true(s->discard_request);
    g_assert_true(bdrv_reopen(blk_bs(blk), json_pack("{s:s}", "discard", "ignore"), true, NULL));
    g_assert_false(s->discard_request);
    g_assert_true(bdrv_reopen(blk_bs(blk), json_pack("{s:s}", "pass-discard-request", "on"), true,
                              NULL));
    g_assert_true(s->discard_request);
}

/* --- what a session writes --- */

static void read_session(int flags)
{
    g_autoptr(BlockBackend) blk = open_image(flags);
    assert_reads(blk);
}

/* Bits that are not ours to keep true go before the first change, not at open. */
static void test_autoclear(void)
{
    make_image("");
    poke64(QCOW2_HDR_AUTOCLEAR, UINT64_C(1) << 20 | QCOW2_AUTOCLEAR_BITMAPS);
    log_start(&log_disks[0]);
    read_session(0);
    read_session(BDRV_O_RDWR);
    g_assert_cmpuint(changes(), ==, 0);
    g_autoptr(BlockBackend) blk = open_image(BDRV_O_RDWR);
    g_assert_true(bdrv_snapshot_create(blk_bs(blk), "s", NULL));
    g_assert_cmphex(peek64(QCOW2_HDR_AUTOCLEAR), ==, QCOW2_AUTOCLEAR_BITMAPS);
    log_start(&log_disks[0]);
    g_assert_cmpint(blk_pwrite(blk, 0, 5, "12345", 0), ==, 0);
    g_assert_cmphex(peek64(QCOW2_HDR_AUTOCLEAR), ==, 0);
    const LogEvent *first = &g_array_index(log_disks[0].log, LogEvent, 0);
    g_assert_cmpuint(first->offset, ==, 0);
    g_assert_cmpuint(first->bytes, ==, QCOW2_HDR_SECTOR);
    g_assert_cmpint(first[1].kind, ==, LOG_FLUSH);
}

static void test_autoclear_of_data_file_stays(void)
{
    make_image("");
    poke64(QCOW2_HDR_INCOMPATIBLE, QCOW2_INCOMPAT_DATA_FILE);
    poke64(QCOW2_HDR_AUTOCLEAR, QCOW2_AUTOCLEAR_DATA_FILE_RAW | 1 << 9);
    g_autoptr(BlockBackend) blk =
        try_open("data-file.driver=null-co,data-file.size=8M", BDRV_O_RDWR, NULL);
    g_assert_cmphex(atomic_load(&qcow2_state(blk_bs(blk))->autoclear_pending), ==, 1 << 9);
}

static void test_dirty(void)
{
    make_image("");
    poke64(QCOW2_HDR_INCOMPATIBLE, QCOW2_INCOMPAT_DIRTY);
    log_start(&log_disks[0]);
    read_session(0);
    g_assert_cmpuint(changes(), ==, 0);
    read_session(BDRV_O_RDWR);
    g_assert_cmphex(peek64(QCOW2_HDR_INCOMPATIBLE), ==, 0);
}

/* A shrink that a crash interrupted leaves mapped clusters beyond the end: the next open drops
 * them. */
static void test_interrupted_shrink(void)
{
    make_image("");
    poke64(QCOW2_HDR_SIZE, DATA_AT / 2);
    poke64(QCOW2_HDR_INCOMPATIBLE, QCOW2_INCOMPAT_DIRTY);
    g_autoptr(BlockBackend) blk = open_image(BDRV_O_RDWR);
    BDRV_GRAPH_GUARD();
    Qcow2Mapping m;
    g_assert_cmpint(qcow2_lookup(blk_bs(blk), DATA_AT, CLUSTER, &m), ==, 0);
    g_assert_cmpint(m.type, ==, QCOW2_UNALLOCATED);
}

/* --- reopen --- */

static bool reopen_read_only(BlockBackend *blk, bool read_only, GError **errp)
{
    return blk_set_perm(blk, BLK_PERM_CONSISTENT_READ | (read_only ? 0 : BLK_PERM_WRITE),
                        BLK_PERM_ALL, NULL)
               ? bdrv_reopen_set_read_only(blk_bs(blk), read_only, errp)
               : bdrv_reopen_set_read_only(blk_bs(blk), read_only, errp) &&
                     blk_set_perm(blk, BLK_PERM_CONSISTENT_READ | BLK_PERM_WRITE, BLK_PERM_ALL,
                                  errp);
}

static void test_reopen(void)
{
    make_image("");
    poke64(QCOW2_HDR_AUTOCLEAR, 1 << 20);
    g_autoptr(BlockBackend) blk = open_image(0);
    g_autoptr(GError) err = NULL;
    reopen_read_only(blk, false, &err);
    g_assert_no_error(err);
    g_assert_cmpint(blk_pwrite(blk, 5 << 20, 5, "12345", 0), ==, 0);
    g_assert_cmphex(peek64(QCOW2_HDR_AUTOCLEAR), ==, 0);
    reopen_read_only(blk, true, &err);
    g_assert_no_error(err);
    g_assert_true(qcow2_is_clean(qcow2_state(blk_bs(blk)))); /* all was written before the switch */
    g_assert_cmpint(blk_pwrite(blk, 0, 1, "x", 0), <, 0);
    assert_reads(blk);
}

static void test_reopen_of_dirty(void)
{
    make_image("");
    poke64(QCOW2_HDR_INCOMPATIBLE, QCOW2_INCOMPAT_DIRTY);
    g_autoptr(BlockBackend) blk = open_image(0);
    assert_reads(blk); /* what it leaves in memory is not in the way */
    g_autoptr(GError) err = NULL;
    reopen_read_only(blk, false, &err);
    g_assert_no_error(err);
    g_assert_cmphex(peek64(QCOW2_HDR_INCOMPATIBLE), ==, 0);
    assert_reads(blk);
}

static void test_reopen_of_beyond_repair(void)
{
    make_image("");
    poke64(QCOW2_HDR_INCOMPATIBLE, QCOW2_INCOMPAT_DIRTY);
    poke64(peek64(QCOW2_HDR_L1_OFFSET), UINT64_C(0x0034567812345600)); /* means no table */
    g_autoptr(BlockBackend) blk = open_image(0);
    g_autoptr(GError) err = NULL;
    g_assert_false(bdrv_reopen_set_read_only(blk_bs(blk), false, &err));
    g_assert_error(err, QB_ERROR, EIO);
    g_assert_true(bdrv_is_read_only(blk_bs(blk)));
    g_assert_cmphex(peek64(QCOW2_HDR_INCOMPATIBLE), ==, QCOW2_INCOMPAT_DIRTY);
}

static void test_failed_reopen_changes_nothing(void)
{
    make_image("");
    g_autoptr(BlockBackend) blk = open_image(BDRV_O_RDWR);
    const BDRVQcow2State *s = qcow2_state(blk_bs(blk));
    json_t *options = json_pack("{s:s, s:s}", "overlap-check", "none", "cache-clean-interval", "x");
    g_assert_false(bdrv_reopen(blk_bs(blk), options, true, NULL));
    g_assert_cmphex(s->overlap_check, ==, 0x17f);
    options = json_pack("{s:s}", "overlap-check", "none");
    g_assert_true(bdrv_reopen(blk_bs(blk), options, true, NULL));
    g_assert_cmphex(s->overlap_check, ==, 0);
}

/* --- damage at run time --- */

static void test_signal_corruption(void)
{
    make_image("");
    g_autoptr(BlockBackend) blk = open_image(BDRV_O_RDWR);
    BlockDriverState *bs = blk_bs(blk);
    g_assert_cmpint(qcow2_signal_corruption(bs, true, 0, "first %d", 1), ==, -EIO);
    g_assert_cmpint(qcow2_signal_corruption(bs, true, 0, "second"), ==, -EIO);
    g_assert_cmpstr(warnings->str, ==,
                    "qcow2: Marking image as corrupt: first 1; further corruption events will be "
                    "suppressed\n");
    g_assert_cmphex(peek64(QCOW2_HDR_INCOMPATIBLE), ==, QCOW2_INCOMPAT_CORRUPT);
    g_assert_cmpint(blk_pwrite(blk, 0, 1, "x", 0), <, 0);
    g_assert_false(blk_truncate(blk, 1 << 20, true, PREALLOC_MODE_OFF, false, NULL));
    g_assert_false(bdrv_snapshot_create(bs, "s", NULL));
}

static void test_signal_not_fatal(void)
{
    make_image("");
    g_autoptr(BlockBackend) blk = open_image(BDRV_O_RDWR);
    BlockDriverState *bs = blk_bs(blk);
    qcow2_signal_corruption(bs, false, 0, "odd");
    qcow2_signal_corruption(bs, false, 0, "odder");
    g_assert_cmpstr(warnings->str, ==, "qcow2: Image is corrupt: odd; further non-fatal corruption "
                                       "events will be suppressed\n");
    g_assert_cmphex(peek64(QCOW2_HDR_INCOMPATIBLE), ==, 0);
    assert_reads(blk);
    qcow2_signal_corruption(bs, true, 0, "worse"); /* is said all the same */
    g_assert_nonnull(strstr(warnings->str, "Marking image as corrupt: worse"));
}

static void test_signal_read_only(void)
{
    make_image("");
    log_start(&log_disks[0]);
    g_autoptr(BlockBackend) blk = open_image(0);
    qcow2_signal_corruption(blk_bs(blk), true, 0, "bad");
    g_assert_nonnull(strstr(warnings->str, "Image is corrupt: bad; further non-fatal"));
    assert_reads(blk);
    g_clear_pointer(&blk, blk_unref);
    g_assert_cmpuint(changes(), ==, 0);
}

/* No I/O under the metadata lock: the bit is written later. */
static void test_signal_under_lock(void)
{
    make_image("");
    g_autoptr(BlockBackend) blk = open_image(BDRV_O_RDWR);
    BDRVQcow2State *s = qcow2_state(blk_bs(blk));
    log_start(&log_disks[0]);
    qb_mutex_lock(&s->lock);
    qcow2_signal_corruption(blk_bs(blk), true, 0, "bad");
    qb_mutex_unlock(&s->lock);
    g_assert_cmpuint(changes(), ==, 0);
    g_assert_true(atomic_load(&s->corrupt));
    g_clear_pointer(&blk, blk_unref);
    g_assert_cmphex(peek64(QCOW2_HDR_INCOMPATIBLE), ==, QCOW2_INCOMPAT_CORRUPT);
}

static void test_signal_version2(void)
{
    make_image("compat=0.10");
    g_autoptr(BlockBackend) blk = open_image(BDRV_O_RDWR);
    log_start(&log_disks[0]);
    qcow2_signal_corruption(blk_bs(blk), true, 0, "bad");
    g_assert_cmpint(blk_pwrite(blk, 0, 1, "x", 0), <, 0);
    g_clear_pointer(&blk, blk_unref);
    g_assert_cmpuint(changes(), ==, 0); /* nowhere to write it */
}

/* --- header updates --- */

static void set_compatible(Qcow2Header *h, void *opaque)
{
    h->compatible = *(const uint64_t *)opaque;
}

/* @fail_at: the request that fails (1: the write, 2: the flush). The disk has the old

 * header then. */
static void failing_update(unsigned fail_at)
{
    uint64_t value = 0x1234;
    make_image("");
    g_autoptr(BlockBackend) blk = open_image(BDRV_O_RDWR);
    BDRVQcow2State *s = qcow2_state(blk_bs(blk));
    log_disks[0].fail_at = fail_at;
    g_assert_cmpint(qcow2_header_update(blk_bs(blk), set_compatible, &value, true), ==, -EIO);
    g_assert_cmphex(s->header.compatible, ==, 0);
    g_assert_cmphex(peek64(QCOW2_HDR_COMPATIBLE), ==, 0);
    g_assert_cmpint(qcow2_header_update(blk_bs(blk), set_compatible, &value, true), ==, 0);
    g_assert_cmphex(s->header.compatible, ==, value);
    g_assert_cmphex(peek64(QCOW2_HDR_COMPATIBLE), ==, value);
}

static void test_header_update(void)
{
    failing_update(1);
    failing_update(2);
}

static void test_header_update_touches_one_sector(void)
{
    uint64_t value = 0x1234;
    make_image("");
    memset(log_disks[0].data + QCOW2_HDR_V3_LENGTH + 400, 0xcd, 100); /* not reached */
    g_autofree uint8_t *before = g_memdup2(log_disks[0].data, CLUSTER);
    g_autoptr(BlockBackend) blk = open_image(BDRV_O_RDWR);
    log_start(&log_disks[0]);
    g_assert_cmpint(qcow2_header_update(blk_bs(blk), set_compatible, &value, false), ==, 0);
    g_assert_cmpuint(log_disks[0].log->len, ==, 1);
    const LogEvent *e = &g_array_index(log_disks[0].log, LogEvent, 0);
    g_assert_cmpuint(e->offset, ==, 0);
    g_assert_cmpuint(e->bytes, ==, QCOW2_HDR_SECTOR);
    qb_stbe64(before + QCOW2_HDR_COMPATIBLE, value);
    g_assert_cmpmem(log_disks[0].data, CLUSTER, before, CLUSTER);
    g_assert_cmpint(qcow2_header_update(blk_bs(blk), set_compatible, &value, false), ==, 0);
    g_assert_cmpuint(log_disks[0].log->len, ==, 1); /* the same again is no write */
}

int main(int argc, char **argv)
{
    static const struct {
        const char *path;
        void (*fn)(void);
    } tests[] = {
        {"refuse/corrupt", test_corrupt_bit},
        {"refuse/unknown-features", test_unknown_features},
        {"refuse/encrypted", test_encrypted},
        {"refuse/tables-beyond-end", test_tables_beyond_end},
        {"refuse/data-file-name", test_data_file_name},
        {"options/texts", test_options},
        {"options/overlap-bits", test_overlap_bits},
        {"options/version2", test_version2_options},
        {"options/discard-follows", test_discard_follows},
        {"session/autoclear", test_autoclear},
        {"session/autoclear-of-data-file", test_autoclear_of_data_file_stays},
        {"session/dirty", test_dirty},
        {"session/interrupted-shrink", test_interrupted_shrink},
        {"reopen/modes", test_reopen},
        {"reopen/dirty", test_reopen_of_dirty},
        {"reopen/beyond-repair", test_reopen_of_beyond_repair},
        {"reopen/failed", test_failed_reopen_changes_nothing},
        {"corruption/fatal", test_signal_corruption},
        {"corruption/not-fatal", test_signal_not_fatal},
        {"corruption/read-only", test_signal_read_only},
        {"corruption/under-lock", test_signal_under_lock},
        {"corruption/version2", test_signal_version2},
        {"header/failing", test_header_update},
        {"header/one-sector", test_header_update_touches_one_sector},
    };
    g_test_init(&argc, &argv, NULL);
    log_init();
    warnings = g_string_new("");
    bdrv_set_warning_handler(note_warning, NULL);
    for (size_t i = 0; i < G_N_ELEMENTS(tests); i++) {
        g_autofree char *path = g_strdup_printf("/qcow2/open/%s", tests[i].path);
        g_test_add_func(path, tests[i].fn);
    }
    int ret = g_test_run();
    g_string_free(warnings, true);
    return log_done(ret);
}
