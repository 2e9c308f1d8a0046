/*
 * The driver "host_device": a block or character device of the host.
 *
 * Opening, transfers, locks and reopen are those of the driver "file" (file-posix.c).  A device has
 * another way to tell its length, cannot grow, and takes zero and discard requests in whole logical
 * blocks:
 *
 *      zeroes, may be given back    fallocate(PUNCH_HOLE): what the device offloads
 *      zeroes, must be quick        -ENOTSUP unless the line above did it
 *      zeroes                       fallocate(ZERO_RANGE), BLKZEROOUT on kernels without
 *      discard                      BLKDISCARD; says nothing about what is read afterwards
 *
 * Invariants
 *  1. The kernel's own zeroing and discarding keep the page cache of the device right, so these
 *     calls mix with buffered reads and writes.
 *  2. A request that is not made of whole logical blocks is answered with -ENOTSUP, and the core
 *     writes instead.
 *
 * Not done: SCSI generic, CD-ROM and floppy peculiarities.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/file-int.h"
#include "util/error.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

int64_t host_device_length(int fd)
{
    uint64_t bytes;
    if (ioctl(fd, BLKGETSIZE64, &bytes) < 0) {
        return -errno;
    }
    return bytes > INT64_MAX ? -EFBIG : (int64_t)bytes;
}

uint32_t host_device_sector_size(int fd)
{
    int size;
    if (ioctl(fd, BLKSSZGET, &size) < 0 || size <= 0 || !qb_is_power_of_2((uint64_t)size)) {
        return 0;
    }
    return (uint32_t)size;
}

bool host_device_is_read_only(int fd)
{
    int read_only;
    return ioctl(fd, BLKROGET, &read_only) == 0 && read_only;
}

/* True when the device can be asked to zero or discard exactly this. */
static bool whole_blocks(const BDRVFileState *s, int64_t offset, int64_t bytes)
{
    uint32_t sector = s->is_block_device ? host_device_sector_size(s->fd) : 0;
    return sector && qb_is_aligned((uint64_t)(offset | bytes), sector);
}

/* An ioctl on a range; -ENOTSUP is remembered in @lacks. */
static int range_ioctl(int fd, unsigned long request, int64_t offset, int64_t bytes,
                       _Atomic(bool) *lacks)
{
    uint64_t range[2] = {(uint64_t)offset, (uint64_t)bytes};
    int ret;
    if (atomic_load(lacks)) {
        return -ENOTSUP;
    }
    do {
        ret = ioctl(fd, request, range);
    } while (ret < 0 && errno == EINTR);
    if (ret < 0 && (errno == EOPNOTSUPP || errno == ENOTTY || errno == ENOSYS)) {
        atomic_store(lacks, true);
        return -ENOTSUP;
    }
    return ret < 0 ? -errno : 0;
}

int host_device_zero(BDRVFileState *s, int64_t offset, int64_t bytes, int flags)
{
    int ret = -ENOTSUP;
    if (!whole_blocks(s, offset, bytes)) {
        return -ENOTSUP;
    }
    if (flags & BDRV_REQ_MAY_UNMAP) {
        ret = file_fallocate(s->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, bytes,
                             &s->lacks.punch_hole);
    }
    if (ret != -ENOTSUP || (flags & BDRV_REQ_NO_FALLBACK)) {
        return ret;
    }
    ret = file_fallocate(s->fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, bytes,
                         &s->lacks.zero_range);
    if (ret != -ENOTSUP) {
        return ret;
    }
    return range_ioctl(s->fd, BLKZEROOUT, offset, bytes, &s->lacks.blkzeroout);
}

int host_device_discard(BDRVFileState *s, int64_t offset, int64_t bytes)
{
    if (!whole_blocks(s, offset, bytes)) {
        return -ENOTSUP;
    }
    return range_ioctl(s->fd, BLKDISCARD, offset, bytes, &s->lacks.blkdiscard);
}

/* --- the driver --- */

static int device_probe(const char *filename)
{
    struct stat st;
    bool device = stat(filename, &st) == 0 && (S_ISBLK(st.st_mode) || S_ISCHR(st.st_mode));
    return device ? 100 : 0;
}

static bool device_parse_filename(const char *filename, json_t *options, GError **errp)
{
    return file_parse_prefix(filename, "host_device:", options, errp);
}

static bool device_open(BlockDriverState *bs, json_t *options, int flags, GError **errp)
{
    return file_open_common(bs, options, true, errp);
}

static bool check_device_size(int64_t length, int64_t size, GError **errp)
{
    if (length < 0) {
        qb_error_set_errno(errp, (int)length, "Could not get the size of the device");
        return false;
    }
    if (size > length) {
        qb_error_set(errp, EINVAL, "Cannot grow device files");
        return false;
    }
    return true;
}

static bool device_truncate(BlockDriverState *bs, int64_t offset, bool exact, PreallocMode prealloc,
                            bool zero_new, GError **errp)
{
    int64_t length = file_getlength(bs);
    if (prealloc != PREALLOC_MODE_OFF) {
        qb_error_set(errp, ENOTSUP, "Unsupported preallocation mode '%s'",
                     prealloc_mode_names[prealloc]);
        return false;
    }
    if (exact && length >= 0 && offset != length) {
        qb_error_set(errp, ENOTSUP, "Cannot resize device files");
        return false;
    }
    return check_device_size(length, offset, errp);
}

/* Zeroes where a format would be recognised, so that the new content is what gets probed. */
static bool clear_first_sector(int fd, int64_t length, GError **errp)
{
    static const char zeroes[BDRV_SECTOR_SIZE];
    size_t n = (size_t)MIN(length, (int64_t)sizeof(zeroes));
    if (pwrite(fd, zeroes, n, 0) != (ssize_t)n) {
        qb_error_set_errno(errp, errno, "Failed to clear the new image's first sector");
        return false;
    }
    return true;
}

/* Checks what is there, and that nobody else uses it, before the first byte is changed. */
static bool create_on_device(int fd, const char *path, int64_t size, GError **errp)
{
    FileLocks locks;
    int64_t length = host_device_length(fd);
    return file_locks_init(&locks, fd, FILE_LOCKING_AUTO, path, errp) &&
           file_locks_take(&locks, fd, BLK_PERM_WRITE | BLK_PERM_RESIZE, BLK_PERM_RESIZE, path,
                           errp) &&
           check_device_size(length, size, errp) && clear_first_sector(fd, length, errp);
}

/* A device is there already: creating means to see that it is large enough. */
static bool device_create(const char *filename, json_t *options, QbProgress *progress,
                          GError **errp)
{
    const char *path = g_str_has_prefix(filename, "host_device:")
                           ? filename + strlen("host_device:") : filename;
    uint64_t size;
    if (!qb_opt_take_size(options, "size", 0, &size, errp)) {
        return false;
    }
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) {
        qb_error_set_errno(errp, errno, "Could not open '%s'", path);
        return false;
    }
    bool ok = create_on_device(fd, path, (int64_t)size, errp);
    close(fd);
    return ok;
}

static const QbOptDesc device_create_opts[] = {
    {"size", QB_OPT_SIZE, "Virtual disk size", NULL},
    {NULL},
};

const BlockDriver bdrv_host_device = {
    .format_name = "host_device",
    .protocol_name = "host_device",
    FILE_DRIVER_COMMON,
    .has_fixed_length = true,
    .probe_device = device_probe,
    .parse_filename = device_parse_filename,
    .open = device_open,
    .create_opts = device_create_opts,
    .create = device_create,
    .truncate = device_truncate,
};
