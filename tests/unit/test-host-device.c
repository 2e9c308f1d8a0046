/*
 * Driver "host_device": loop devices over files.  Skipped where the system gives none.
 *
 * The devices are made with autoclear, so that they go away with their last user, whatever happens.
 *
 * SPDX-License-Identifier: MIT
 */
#include "file-node.h"

#include <linux/fs.h>
#include <linux/loop.h>
#include <sys/ioctl.h>

#define RDWR ((NodeMode){0})
#define RDONLY ((NodeMode){.read_only = true})
#define DIRECT ((NodeMode){.direct = true})

/* Makes the free device @nr show @file: the device's descriptor, or -1. */
static int configure_loop(int nr, int file, uint32_t sector, bool read_only)
{
    struct loop_config config = {
        .fd = (uint32_t)file,
        .block_size = sector,
        .info.lo_flags = LO_FLAGS_AUTOCLEAR | (read_only ? LO_FLAGS_READ_ONLY : 0),
    };
    g_autofree char *path = g_strdup_printf("/dev/loop%d", nr);
    int fd = open(path, (read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC);
    if (fd >= 0 && ioctl(fd, LOOP_CONFIGURE, &config) == 0) {
        return fd;
    }
    if (fd >= 0) {
        close(fd);
    }
    return -1;
}

/* A loop device over @file; its path in *ret_path. -1 where there is none to be had. */
static int make_loop(const char *file, uint32_t sector, bool read_only, char **ret_path)
{
    int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
    int backing = open(file, (read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC);
    int fd = -1, nr = -1;
    for (int tries = 0; control >= 0 && fd < 0 && tries < 20; tries++) {
        nr = ioctl(control, LOOP_CTL_GET_FREE);
        fd = nr >= 0 ? configure_loop(nr, backing, sector, read_only) : -1;
    }
    close(backing);
    if (control >= 0) {
        close(control);
    }
    *ret_path = g_strdup_printf("/dev/loop%d", nr);
    return fd;
}

/* A device of 4 MiB full of 5. */
typedef struct Device {
    TestDir t;
    char *path;
    int fd;
} Device;

static void device_setup(Device *d, gconstpointer sector)
{
    test_dir_setup(&d->t, "/tmp");
    make_file(d->t.file, 4 * MIB, 5);
    d->fd = make_loop(d->t.file, GPOINTER_TO_UINT(sector), false, &d->path);
}

static void device_teardown(Device *d, gconstpointer sector)
{
    if (d->fd >= 0) {
        close(d->fd);
    }
    g_free(d->path);
    test_dir_teardown(&d->t, "/tmp");
}

static bool have_device(const Device *d)
{
    if (d->fd < 0) {
        g_test_skip("no loop devices");
    }
    return d->fd >= 0;
}

static BlockDriverState *open_device(const Device *d, NodeMode mode)
{
    GError *err = NULL;
    BlockDriverState *bs = node_open(&bdrv_host_device, d->path, mode, NULL, &err);
    g_assert_no_error(err);
    return bs;
}

static void test_transfer(Device *d, gconstpointer sector)
{
    if (!have_device(d)) {
        return;
    }
    GError *err = NULL;
    g_autofree char *text =
        g_strdup_printf("'file' driver requires '%s' to be a regular file", d->path);
    g_assert_null(node_open(&bdrv_file, d->path, RDONLY, NULL, &err));
    expect_error(&err, EINVAL, text);
    g_assert_cmpint(bdrv_host_device.probe_device(d->path), ==, 100);
    BlockDriverState *bs = open_device(d, RDWR);
    g_assert_cmpint(bs->drv->getlength(bs), ==, 4 * MIB);
    g_assert_cmpuint(bs->bl.request_alignment, ==, 1);
    g_assert_cmpuint(bs->bl.pdiscard_alignment, ==, GPOINTER_TO_UINT(sector));
    g_assert_cmpint(node_write(bs, 1000, 3000, 7, BDRV_REQ_FUA), ==, 0);
    g_assert_cmpint(node_read_byte(bs, 1000, 3000), ==, 7);
    g_assert_cmpint(node_read_byte(bs, 0, 1000), ==, 5);
    g_assert_cmpint(node_write(bs, 4 * MIB, 512, 7, 0), ==, -ENOSPC);
    g_assert_cmpint(bs->drv->flush(bs), ==, 0);
    node_close(bs);
}

static void test_direct(Device *d, gconstpointer sector)
{
    if (!have_device(d)) {
        return;
    }
    uint32_t unit = GPOINTER_TO_UINT(sector);
    BlockDriverState *bs = open_device(d, DIRECT);
    g_assert_cmpuint(bs->bl.request_alignment, ==, unit);
    g_assert_cmpint(node_write(bs, unit, unit, 7, BDRV_REQ_FUA), ==, 0);
    g_assert_cmpint(node_read_byte(bs, unit, unit), ==, 7);
    g_assert_cmpint(node_read_byte(bs, 0, unit), ==, 5);
    node_close(bs);
}

static void test_zero_discard(Device *d, gconstpointer sector)
{
    if (!have_device(d)) {
        return;
    }
    BlockDriverState *bs = open_device(d, RDWR);
    int (*zero)(BlockDriverState *, BdrvRequest *, int64_t, int64_t, int) = bs->drv->pwrite_zeroes;
    g_assert_cmpint(zero(bs, NULL, 100, 4096, 0), ==, -ENOTSUP);
    g_assert_cmpint(zero(bs, NULL, 0, 100, BDRV_REQ_MAY_UNMAP), ==, -ENOTSUP);
    g_assert_cmpint(zero(bs, NULL, 0, 64 * KIB, BDRV_REQ_NO_FALLBACK), ==, -ENOTSUP);
    g_assert_cmpint(zero(bs, NULL, 0, 64 * KIB, 0), ==, 0);
    g_assert_cmpint(node_read_byte(bs, 0, 64 * KIB), ==, 0);
    int ret = zero(bs, NULL, MIB, MIB, BDRV_REQ_MAY_UNMAP | BDRV_REQ_NO_FALLBACK);
    g_assert_true(ret == 0 || ret == -ENOTSUP);
    g_assert_cmpint(node_read_byte(bs, MIB, MIB), ==, ret ? 5 : 0);
    ret = bs->drv->pdiscard(bs, NULL, 2 * MIB, MIB);
    g_assert_true(ret == 0 || ret == -ENOTSUP);
    g_assert_cmpint(bs->drv->pdiscard(bs, NULL, 2 * MIB + 1, MIB), ==, -ENOTSUP);
    g_assert_cmpint(node_read_byte(bs, 3 * MIB, MIB), ==, 5);
    BdrvStatus st = {0};
    g_assert_cmpint(bs->drv->block_status(bs, 0, 4 * MIB, &st), ==, 0);
    g_assert_true(st.flags & BDRV_BLOCK_DATA);
    g_assert_cmpint(st.bytes, ==, 4 * MIB);
    node_close(bs);
}

/* A device keeps its length: what is asked for must fit, and be equal if exact. */
static void test_length(Device *d, gconstpointer sector)
{
    if (!have_device(d)) {
        return;
    }
    GError *err = NULL;
    BlockDriverState *bs = open_device(d, RDWR);
    g_assert_true(bs->drv->truncate(bs, 4 * MIB, true, PREALLOC_MODE_OFF, false, &err));
    g_assert_true(bs->drv->truncate(bs, MIB, false, PREALLOC_MODE_OFF, false, &err));
    g_assert_no_error(err);
    g_assert_false(bs->drv->truncate(bs, MIB, true, PREALLOC_MODE_OFF, false, &err));
    expect_error(&err, ENOTSUP, "Cannot resize device files");
    g_assert_false(bs->drv->truncate(bs, 5 * MIB, false, PREALLOC_MODE_OFF, false, &err));
    expect_error(&err, EINVAL, "Cannot grow device files");
    g_assert_false(bs->drv->truncate(bs, 4 * MIB, false, PREALLOC_MODE_FULL, false, &err));
    expect_error(&err, ENOTSUP, "Unsupported preallocation mode 'full'");
    g_assert_cmpint(bs->drv->getlength(bs), ==, 4 * MIB);
    node_close(bs);
}

static bool create(const char *path, const char *opts, GError **errp)
{
    g_autoptr(json_t) options = qb_opts_parse(opts, NULL, NULL);
    return bdrv_host_device.create(path, options, NULL, errp);
}

static void test_create(Device *d, gconstpointer sector)
{
    if (!have_device(d)) {
        return;
    }
    GError *err = NULL;
    g_autofree char *prefixed = g_strconcat("host_device:", d->path, NULL);
    g_assert_false(create(d->path, "size=5M", &err));
    expect_error(&err, EINVAL, "Cannot grow device files");
    BlockDriverState *bs = open_device(d, RDONLY);
    g_assert_cmpint(node_read_byte(bs, 0, 512), ==, 5);
    bs->drv->check_perm(bs, BLK_PERM_CONSISTENT_READ, BLK_PERM_CONSISTENT_READ, &err);
    g_assert_no_error(err);
    g_assert_false(create(d->path, "size=4M", &err));
    g_assert_nonnull(strstr(err->message, "Failed to get \"write\" lock\n"));
    g_clear_error(&err);
    node_close(bs);
    g_assert_true(create(prefixed, "size=4M", &err));
    g_assert_no_error(err);
    bs = open_device(d, RDONLY);
    g_assert_cmpint(node_read_byte(bs, 0, 512), ==, 0);
    g_assert_cmpint(node_read_byte(bs, 512, 512), ==, 5);
    node_close(bs);
}

/* A device that refuses writes says so at open, in the class that read-only helps against. */
static void test_read_only(Device *d, gconstpointer sector)
{
    char *path;
    GError *err = NULL;
    int fd = make_loop(d->t.file, GPOINTER_TO_UINT(sector), true, &path);
    g_autofree char *text = g_strdup_printf("Could not open '%s': Permission denied", path);
    if (fd < 0) {
        g_test_skip("no loop devices");
    } else {
        g_assert_null(node_open(&bdrv_host_device, path, RDWR, NULL, &err));
        expect_error(&err, EACCES, text);
        BlockDriverState *bs = node_open(&bdrv_host_device, path, RDONLY, NULL, &err);
        g_assert_no_error(err);
        g_assert_cmpint(node_read_byte(bs, 0, 4 * MIB), ==, 5);
        node_close(bs);
        close(fd);
    }
    g_free(path);
}

static void test_character_device(void)
{
    GError *err = NULL;
    BlockDriverState *bs = node_open(&bdrv_host_device, "/dev/zero", RDONLY, NULL, &err);
    g_assert_no_error(err);
    g_assert_cmpint(bs->drv->getlength(bs), ==, 0);
    g_assert_cmpint(node_read_byte(bs, 0, 512), ==, 0);
    node_close(bs);
    g_assert_false(create("/dev/null", "size=0", &err));
    expect_error(&err, ENOTTY, "Could not get the size of the device: "
                               "Inappropriate ioctl for device");
}

static void add(const char *name, void (*fn)(Device *, gconstpointer))
{
    static const unsigned sectors[] = {512, 4096};
    for (unsigned i = 0; i < G_N_ELEMENTS(sectors); i++) {
        g_autofree char *path = g_strdup_printf("/host-device/%s/%u", name, sectors[i]);
        g_test_add(path, Device, GUINT_TO_POINTER(sectors[i]), device_setup, fn, device_teardown);
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/host-device/character", test_character_device);
    add("transfer", test_transfer);
    add("direct", test_direct);
    add("zero-discard", test_zero_discard);
    add("length", test_length);
    add("create", test_create);
    add("read-only", test_read_only);
    return g_test_run();
}
