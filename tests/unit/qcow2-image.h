/*
 * qcow2 images for tests of the driver through the whole block layer: made in a directory that goes
 * away with the test, opened with short option strings.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef TESTS_UNIT_QCOW2_IMAGE_H
#define TESTS_UNIT_QCOW2_IMAGE_H

#undef NDEBUG
#include "block/block-backend.h"
#include "block/driver.h"
#include "block/qcow2-io-int.h"
#include "util/error.h"
#include "util/pool.h"

#include <glib/gstdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { KIB = 1024, MIB = 1024 * 1024 };

static char *test_dir;

/* In memory where that is to be had: these tests flush a lot and are not about disks. */
static inline void image_setup(void)
{
    bool in_memory = !g_getenv("TMPDIR") && access("/dev/shm", W_OK) == 0;
    const char *parent = in_memory ? "/dev/shm" : g_get_tmp_dir();
    bdrv_init();
    test_dir = g_build_filename(parent, "qb-qcow2-XXXXXX", NULL);
    g_assert_nonnull(g_mkdtemp(test_dir));
}

static inline void image_teardown(void)
{
    g_autoptr(GDir) dir = g_dir_open(test_dir, 0, NULL);
    const char *name;
    while ((name = g_dir_read_name(dir))) {
        g_autofree char *path = g_build_filename(test_dir, name, NULL);
        g_unlink(path);
    }
    g_rmdir(test_dir);
    g_clear_pointer(&test_dir, g_free);
    qb_pools_shutdown();
}

static inline char *image_path(const char *name)
{
    return g_build_filename(test_dir, name, NULL);
}

/* @opts: "size=1M,cluster_size=512,..." */
static inline void image_create(const char *name, const char *opts)
{
    GError *err = NULL;
    g_autofree char *path = image_path(name);
    g_autoptr(json_t) options = qb_opts_parse(opts, NULL, &err);
    g_assert_no_error(err);
    bool ok = bdrv_img_create(path, "qcow2", options, NULL, &err);
    g_assert_no_error(err);
    g_assert_true(ok);
}

/* @opts: more node options or NULL. */
static inline BlockBackend *image_open(const char *name, const char *opts, int flags)
{
    GError *err = NULL;
    g_autofree char *path = image_path(name);
    json_t *options = opts ? qb_opts_parse(opts, NULL, &err) : json_object();
    g_assert_no_error(err);
    if (!json_object_get(options, "driver")) {
        json_object_set_new(options, "driver", json_string("qcow2"));
    }
    BlockBackend *blk = blk_new_open(path, options, flags, &err);
    g_assert_no_error(err);
    g_assert_nonnull(blk);
    return blk;
}

static inline BlockBackend *image_open_rw(const char *name)
{
    return image_open(name, "discard=unmap", BDRV_O_RDWR);
}

/* With blkdebug below; @opts: its options ("file.inject-error...") or "". */
static inline BlockBackend *image_open_debug(const char *name, const char *opts)
{
    GError *err = NULL;
    g_autofree char *path = image_path(name);
    g_autofree char *all = g_strdup_printf("driver=qcow2,discard=unmap,file.driver=blkdebug,"
                                           "file.image.driver=file,file.image.filename=%s%s%s",
                                           path, *opts ? "," : "", opts);
    json_t *options = qb_opts_parse(all, NULL, &err);
    g_assert_no_error(err);
    BlockBackend *blk = blk_new_open(NULL, options, BDRV_O_RDWR, &err);
    g_assert_no_error(err);
    g_assert_nonnull(blk);
    return blk;
}

static inline BDRVQcow2State *image_state(BlockBackend *blk)
{
    return qcow2_state(blk_bs(blk));
}

static inline void image_print_finding(const BdrvCheckFinding *f, void *opaque)
{
    g_test_message("%s", f->text);
}

/* Asserts that the image has no corruptions and no leaks. */
static inline void image_check(const char *name)
{
    GError *err = NULL;
    BdrvCheckOptions opts = {.finding = image_print_finding};
    BdrvCheckResult result = {0};
    g_autoptr(BlockBackend) blk = image_open(name, NULL, BDRV_O_CHECK | BDRV_O_NO_BACKING);
    bool ok = bdrv_check(blk_bs(blk), &opts, &result, &err);
    g_assert_no_error(err);
    g_assert_true(ok);
    g_assert_cmpuint(result.corruptions, ==, 0);
    g_assert_cmpuint(result.check_errors, ==, 0);
    g_assert_cmpuint(result.leaks, ==, 0);
}

/* The entry of @guest as memory has it. */
static inline Qcow2L2Entry image_entry(BlockBackend *blk, uint64_t guest)
{
    BDRVQcow2State *s = image_state(blk);
    Qcow2L2Entry e;
    Qcow2User user;
    BDRV_GRAPH_GUARD();
    qcow2_user_announce(s, &user);
    int ret = qcow2_load_entries(blk_bs(blk), qcow2_start_of_cluster(s, guest), 1, &e);
    qcow2_user_leave(s, &user);
    g_assert_cmpint(ret, ==, 0);
    return e;
}

static inline Qcow2ClusterType image_type(BlockBackend *blk, uint64_t guest)
{
    BDRVQcow2State *s = image_state(blk);
    unsigned sc = (unsigned)(qcow2_offset_into_cluster(s, guest) >> s->subcluster_bits);
    return qcow2_entry_type(s, image_entry(blk, guest), sc);
}

/* Writes or expects @bytes of one value. */
static inline void image_write(BlockBackend *blk, int64_t offset, int64_t bytes, int value)
{
    g_autofree uint8_t *buf = g_malloc((size_t)bytes);
    memset(buf, value, (size_t)bytes);
    g_assert_cmpint(blk_pwrite(blk, offset, bytes, buf, 0), ==, 0);
}

static inline void image_write_compressed(BlockBackend *blk, int64_t offset, int64_t bytes,
                                          int value, int want)
{
    g_autofree uint8_t *buf = g_malloc((size_t)bytes);
    memset(buf, value, (size_t)bytes);
    g_assert_cmpint(blk_pwrite(blk, offset, bytes, buf, BDRV_REQ_COMPRESSED), ==, want);
}

static inline void image_expect(BlockBackend *blk, int64_t offset, int64_t bytes, int value)
{
    g_autofree uint8_t *buf = g_malloc((size_t)bytes);
    memset(buf, ~value, (size_t)bytes);
    g_assert_cmpint(blk_pread(blk, offset, bytes, buf, 0), ==, 0);
    for (int64_t i = 0; i < bytes; i++) {
        if (buf[i] != (uint8_t)value) {
            g_error("byte %" PRId64 " is 0x%02x, not 0x%02x", offset + i, buf[i], value);
        }
    }
}

#endif
