/*
 * Lengths on purpose: truncate with preallocation, and the making of new files.
 *
 *      preallocation     the grown part [old, new)
 *      off               a hole
 *      falloc            reserved with fallocate(); where that does not exist, as full
 *      full              written with zeroes, and made stable
 *
 * The length is set first and the grown part filled then, so that a failure has one undo: the old
 * length.  fallocate() is called itself rather than the C library's posix_fallocate(), whose
 * fallback reads and writes a byte of every block, beneath whoever writes there at the time.
 *
 * Creating:
 *      options checked -> file made or opened -> locked -> new length tried -> emptied -> filled
 *
 * Invariants
 *  1. A file that was there before is never removed, and keeps its content until its options, its
 *     locks and the new length have turned out to be possible.
 *  2. A file that this create made is removed when it fails.
 *  3. A failed truncate leaves the old length.
 *
 * Not done: shrinking in place of devices; they keep their length (host-device.c).
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/file-int.h"
#include "util/error.h"
#include "util/iov.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FILL_BYTES = 1 << 20, FILL_ALIGNMENT = 4096 };

/* --- preallocation --- */

/* A change of length: what to do and where. */
typedef struct Resize {
    BDRVFileState *node; /* NULL: a file in the making */
    int fd;
    int64_t from, to;
    uint32_t unit; /* of writes */
    PreallocMode prealloc;
    QbProgress *progress; /* NULL: nobody looks */
} Resize;

/* Writes zeroes over [@offset, @end), in pieces that also suit direct I/O when both are aligned. */
static int write_zeroes(int fd, int64_t offset, int64_t end, QbProgress *progress)
{
    QB_AUTO_FREE void *buf = qb_try_memalign(FILL_ALIGNMENT, FILL_BYTES);
    if (!buf) {
        return -ENOMEM;
    }
    memset(buf, 0, FILL_BYTES);
    while (offset < end) {
        if (qb_progress_cancelled(progress)) {
            return -ECANCELED;
        }
        struct iovec iov = {.iov_base = buf, .iov_len = (size_t)MIN(end - offset, FILL_BYTES)};
        int ret = qb_io_one(QB_IO_WRITE, fd, (uint64_t)offset, &iov, 1);
        if (ret < 0) {
            return ret;
        }
        offset += (int64_t)iov.iov_len;
        qb_progress_add(progress, iov.iov_len);
    }
    return 0;
}

/*
 * Fills the grown part with zeroes that are really stored.  The head up to the first unit lies in
 * the last block of the old file.
 */
static int fill(const Resize *r)
{
    int64_t start, end;
    if (qb_align_up_overflow((uint64_t)r->from, r->unit, &start) ||
        qb_align_up_overflow((uint64_t)r->to, r->unit, &end)) {
        return -EFBIG;
    }
    qb_progress_grow(r->progress, (uint64_t)(end - start));
    int ret = write_zeroes(r->fd, start, end, r->progress);
    return ret == 0 && end != r->to && ftruncate(r->fd, r->to) < 0 ? -errno : ret;
}

/* A node's barriers all go one way, so that none of them hides the failure of another. */
static int fill_stable(const Resize *r)
{
    int ret = fill(r);
    if (ret < 0) {
        return ret;
    }
    if (r->node) {
        file_note_change(r->node);
        return file_make_stable(r->node);
    }
    return fdatasync(r->fd) < 0 ? -errno : 0;
}

static bool preallocate(const Resize *r, GError **errp)
{
    int ret = -ENOTSUP;
    const char *what = "Could not preallocate data for the new file";
    if (r->prealloc == PREALLOC_MODE_OFF || r->from == r->to) {
        return true;
    }
    if (r->prealloc == PREALLOC_MODE_FALLOC) {
        ret = file_fallocate(r->fd, 0, r->from, r->to - r->from, NULL);
    }
    if (ret == -ENOTSUP) {
        what = "Could not write zeros for preallocation";
        ret = fill_stable(r);
    }
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "%s", what);
    }
    return ret == 0;
}

static bool check_prealloc(const Resize *r, GError **errp)
{
    if (r->prealloc == PREALLOC_MODE_METADATA) {
        qb_error_set(errp, ENOTSUP, "Unsupported preallocation mode: %s",
                     prealloc_mode_names[r->prealloc]);
        return false;
    }
    if (r->prealloc != PREALLOC_MODE_OFF && r->to < r->from) {
        qb_error_set(errp, ENOTSUP, "Cannot use preallocation for shrinking files");
        return false;
    }
    return true;
}

static bool set_length(const Resize *r, GError **errp)
{
    if (ftruncate(r->fd, r->to) < 0) {
        qb_error_set_errno(errp, errno, "Could not resize file");
        return false;
    }
    return true;
}

static bool resize(const Resize *r, GError **errp)
{
    if (!check_prealloc(r, errp) || !set_length(r, errp)) {
        return false;
    }
    if (preallocate(r, errp)) {
        return true;
    }
    if (ftruncate(r->fd, r->from) < 0) {
        qb_error_add_hint(errp, "Restoring the old file length failed, too.");
    }
    return false;
}

bool file_truncate(BlockDriverState *bs, int64_t offset, bool exact, PreallocMode prealloc,
                   bool zero_new, GError **errp)
{
    BDRVFileState *s = file_state(bs);
    int64_t length = file_length(s);
    if (length < 0) {
        qb_error_set_errno(errp, (int)length, "Could not get the length of '%s'", s->path);
        return false;
    }
    Resize r = {.node = s, .fd = s->fd, .from = length, .to = offset,
                .unit = s->request_alignment, .prealloc = prealloc,
                .progress = bs->resize_progress};
    bool ok = resize(&r, errp);
    length = file_length(s);
    atomic_store(&s->eof, length > 0 ? length : 0);
    file_data_cache_drop(&s->data);
    file_note_change(s);
    return ok;
}

/* --- create --- */

const QbOptDesc file_create_opts[] = {
    {"size", QB_OPT_SIZE, "Virtual disk size", NULL},
    {"nocow", QB_OPT_BOOL, "Turn off copy-on-write (valid only on btrfs)", NULL},
    {"preallocation", QB_OPT_STRING, "Preallocation mode (allowed values: off, falloc, full)",
     NULL},
    {"extent_size_hint", QB_OPT_SIZE, "Extent size hint for the image file, 0 to disable", NULL},
    {NULL},
};

typedef struct CreateOptions {
    const char *path; /* borrowed */
    uint64_t size;
    uint64_t extent_size_hint;
    bool has_extent_size_hint; /* the user said so: must work */
    bool nocow;
    int prealloc;
    QbProgress *progress;
} CreateOptions;

/* Extents of this size keep sparse images on XFS from falling into pieces. */
enum { DEFAULT_EXTENT_SIZE_HINT = 1 << 20 };

static bool take_create_options(json_t *options, CreateOptions *o, GError **errp)
{
    o->has_extent_size_hint = json_object_get(options, "extent_size_hint") != NULL;
    if (!qb_opt_take_size(options, "size", 0, &o->size, errp) ||
        !qb_opt_take_size(options, "extent_size_hint", DEFAULT_EXTENT_SIZE_HINT,
                          &o->extent_size_hint, errp) ||
        !qb_opt_take_bool(options, "nocow", false, &o->nocow, errp) ||
        !qb_opt_take_enum(options, "preallocation", prealloc_mode_names, PREALLOC_MODE_OFF,
                          &o->prealloc, errp)) {
        return false;
    }
    if (o->extent_size_hint > UINT32_MAX) {
        qb_error_set(errp, EINVAL, "Extent size hint is too large");
        return false;
    }
    Resize r = {.to = (int64_t)o->size, .prealloc = (PreallocMode)o->prealloc};
    return check_prealloc(&r, errp);
}

/* Opens or makes the file: a descriptor, or -errno. */
static int open_or_make(const char *path, bool *ret_made)
{
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    *ret_made = fd >= 0;
    if (fd >= 0 || errno != EEXIST) {
        return fd >= 0 ? fd : -errno;
    }
    /* Without O_EXCL again, for a symbolic link whose target is not there yet. */
    fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NONBLOCK, 0644);
    return fd >= 0 ? fd : -errno;
}

static bool check_regular(int fd, const char *path, GError **errp)
{
    struct stat st;
    if (fstat(fd, &st) == 0 && !S_ISREG(st.st_mode)) {
        qb_error_set(errp, EINVAL, "'file' driver requires '%s' to be a regular file", path);
        return false;
    }
    return true;
}

/* Best effort: only btrfs knows the flag, and only for files that are still empty. */
static void set_nocow(int fd)
{
    int attributes;
    if (ioctl(fd, FS_IOC_GETFLAGS, &attributes) == 0) {
        attributes |= FS_NOCOW_FL;
        ioctl(fd, FS_IOC_SETFLAGS, &attributes);
    }
}

/* The default is a wish; what the user asked for is not. */
static bool set_extent_size(int fd, const CreateOptions *o, GError **errp)
{
    struct fsxattr attr;
    if (o->extent_size_hint == 0) {
        return true;
    }
    int ret = ioctl(fd, FS_IOC_FSGETXATTR, &attr);
    if (ret == 0) {
        attr.fsx_xflags |= FS_XFLAG_EXTSIZE;
        attr.fsx_extsize = (uint32_t)o->extent_size_hint;
        ret = ioctl(fd, FS_IOC_FSSETXATTR, &attr);
    }
    if (ret < 0 && o->has_extent_size_hint && errno != ENOTTY && errno != EOPNOTSUPP) {
        qb_error_set_errno(errp, errno, "Failed to set extent size hint");
        return false;
    }
    return true;
}

/* Nobody else is in the way: new length tried, old content dropped, attributes, new content. */
static bool fill_new_file(int fd, const CreateOptions *o, GError **errp)
{
    Resize r = {.fd = fd, .to = (int64_t)o->size, .unit = 1, .prealloc = (PreallocMode)o->prealloc,
                .progress = o->progress};
    struct stat st;
    if (fstat(fd, &st) < 0 || (st.st_size < r.to && ftruncate(fd, r.to) < 0)) {
        qb_error_set_errno(errp, errno, "Could not resize file");
        return false;
    }
    if (ftruncate(fd, 0) < 0) {
        qb_error_set_errno(errp, errno, "Could not resize file");
        return false;
    }
    if (o->nocow) {
        set_nocow(fd);
    }
    return set_extent_size(fd, o, errp) && resize(&r, errp);
}

/* Keeps others out while the file has neither its old nor its new content. */
static bool fill_locked(int fd, const CreateOptions *o, GError **errp)
{
    FileLocks locks;
    return file_locks_init(&locks, fd, FILE_LOCKING_AUTO, o->path, errp) &&
           file_locks_take(&locks, fd, BLK_PERM_WRITE | BLK_PERM_RESIZE, BLK_PERM_RESIZE, o->path,
                           errp) &&
           fill_new_file(fd, o, errp);
}

bool file_create(const char *filename, json_t *options, QbProgress *progress, GError **errp)
{
    CreateOptions o = {
        .path = g_str_has_prefix(filename, "file:") ? filename + strlen("file:") : filename,
        .progress = progress,
    };
    bool made;
    if (!take_create_options(options, &o, errp)) {
        return false;
    }
    int fd = open_or_make(o.path, &made);
    if (fd < 0) {
        qb_error_set_errno(errp, fd, "Could not create '%s'", o.path);
        return false;
    }
    bool ok = check_regular(fd, o.path, errp) && fill_locked(fd, &o, errp);
    if (!ok && made) {
        unlink(o.path);
    }
    close(fd);
    return ok;
}
