/*
 * Nodes of the file drivers made by hand, without the core above them: what a test asks of a driver
 * callback is what the driver alone does.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef TESTS_UNIT_FILE_NODE_H
#define TESTS_UNIT_FILE_NODE_H

#undef NDEBUG
#include "block/file-int.h"
#include "util/error.h"
#include "util/iov.h"

#include <fcntl.h>
#include <glib/gstdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

enum { KIB = 1024, MIB = 1024 * 1024 };

typedef struct NodeMode {
    bool read_only, direct, force_share, no_flush;
} NodeMode;

/* Opens @path with "k=v,..." more options (may be NULL). NULL and error when the driver refuses. */
static inline BlockDriverState *node_open(const BlockDriver *drv, const char *path, NodeMode mode,
                                          const char *opts, GError **errp)
{
    BlockDriverState *bs = g_new0(BlockDriverState, 1);
    g_autoptr(json_t) options = opts ? qb_opts_parse(opts, NULL, errp) : json_object();
    g_assert_nonnull(options);
    if (path) {
        json_object_set_new(options, "filename", json_string(path));
    }
    bs->drv = drv;
    bs->opaque = g_malloc0(drv->instance_size);
    bs->options = json_object();
    bs->read_only = mode.read_only;
    bs->cache_direct = mode.direct;
    bs->cache_no_flush = mode.no_flush;
    bs->force_share = mode.force_share;
    if (!drv->open(bs, options, mode.read_only ? 0 : BDRV_O_RDWR, errp)) {
        json_decref(bs->options);
        g_free(bs->opaque);
        g_free(bs);
        return NULL;
    }
    g_assert_cmpuint(json_object_size(options), ==, 0);
    drv->refresh_limits(bs);
    return bs;
}

static inline BlockDriverState *node_open_ok(const char *path, NodeMode mode)
{
    GError *err = NULL;
    BlockDriverState *bs = node_open(&bdrv_file, path, mode, NULL, &err);
    g_assert_no_error(err);
    g_assert_nonnull(bs);
    return bs;
}

static inline void node_close(BlockDriverState *bs)
{
    bs->drv->close(bs);
    json_decref(bs->options);
    g_free(bs->opaque);
    g_free(bs);
}

/* Checks text and class of an error and drops it. */
static inline void expect_error(GError **err, int code, const char *text)
{
    g_assert_nonnull(*err);
    g_assert_cmpstr((*err)->message, ==, text);
    g_assert_cmpint((*err)->code, ==, code);
    g_clear_error(err);
}

static inline int node_write(BlockDriverState *bs, int64_t offset, int64_t bytes, int byte,
                             int flags)
{
    QB_AUTO_FREE void *buf = qb_try_memalign(4096, (size_t)bytes);
    IoVector v;
    memset(buf, byte, (size_t)bytes);
    iov_vector_init_buf(&v, buf, (size_t)bytes);
    return bs->drv->pwritev(bs, NULL, offset, bytes, &v, 0, flags);
}

/* The value all bytes of the range have, -1 when they differ. */
static inline int node_read_byte(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    QB_AUTO_FREE unsigned char *buf = qb_try_memalign(4096, (size_t)bytes);
    IoVector v;
    memset(buf, 0x55, (size_t)bytes);
    iov_vector_init_buf(&v, buf, (size_t)bytes);
    g_assert_cmpint(bs->drv->preadv(bs, NULL, offset, bytes, &v, 0, 0), ==, 0);
    for (int64_t i = 1; i < bytes; i++) {
        if (buf[i] != buf[0]) {
            return -1;
        }
    }
    return buf[0];
}

/* A directory on the file system at @root, and the name of a file in it. */
typedef struct TestDir {
    char *dir, *file;
} TestDir;

static inline void test_dir_setup(TestDir *t, gconstpointer root)
{
    t->dir = g_strdup_printf("%s/qb-file-XXXXXX", (const char *)root);
    g_assert_nonnull(g_mkdtemp(t->dir));
    t->file = g_build_filename(t->dir, "image", NULL);
}

static inline void test_dir_teardown(TestDir *t, gconstpointer root)
{
    g_autoptr(GDir) dir = g_dir_open(t->dir, 0, NULL);
    const char *name;
    while (dir && (name = g_dir_read_name(dir))) {
        g_autofree char *path = g_build_filename(t->dir, name, NULL);
        g_remove(path);
    }
    g_rmdir(t->dir);
    g_free(t->dir);
    g_free(t->file);
}

/* A file of @bytes bytes, all @byte; an empty or sparse one for 0. */
static inline void make_file(const char *path, int64_t bytes, int byte)
{
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(ftruncate(fd, bytes), ==, 0);
    if (byte) {
        g_autofree char *buf = g_malloc((gsize)bytes);
        memset(buf, byte, (size_t)bytes);
        g_assert_cmpint(pwrite(fd, buf, (size_t)bytes, 0), ==, bytes);
    }
    close(fd);
}

static inline int64_t file_size(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 ? st.st_size : -1;
}

static inline int64_t file_blocks(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 ? (int64_t)st.st_blocks * 512 : -1;
}

/* Mounts an empty tmpfs of @size at @dir; false where that is not allowed. */
static inline bool mount_small(const char *dir, const char *size)
{
    g_autofree char *data = g_strdup_printf("size=%s", size);
    return mount("tmpfs", dir, "tmpfs", MS_NOSUID, data) == 0;
}

#endif
