/*
 * The driver "file": a node that is a regular file of the host.
 *
 *      BlockDriverState --opaque--> BDRVFileState --fd--> the file
 *                                     | locks   bytes 100.. and 200.. of it (file-locks.c)
 *                                     | flush   shared rounds of fdatasync  (file-io.c)
 *                                     | data    the data extent seen last   (file-status.c)
 *
 * This file opens, closes and reopens; host-device.c shares it, since a device differs in its
 * length and its zero and discard calls only.
 *
 * Invariants
 *  1. fd changes only in open, close and reopen_commit, when no request is in flight.
 *  2. The locks live on fd; a reopen has them on the new descriptor before the old one is closed,
 *     so that there is no moment without them.
 *  3. With direct set, request_alignment and mem_alignment are such that the kernel takes every
 *     request that keeps to them; without, both are 1.
 *  4. O_SYNC and O_DSYNC are never used: stability is asked for with flush and FUA.
 *
 * A reopen opens the same inode again through /proc/self/fd, so that it also works for files that
 * were renamed or unlinked in between; without /proc by name, if that is still the same inode.
 *
 * Not done: a length that others change is not noticed before the node is opened again.
 * auto-read-only is the core's: it opens again, read-only, upon EACCES, EPERM and EROFS.
 * Persistent reservations (pr-manager) are refused.  drop-cache matters for live migration over
 * shared storage only, which these tools do not do; it is accepted, as is aio-max-batch, which a
 * program without an event loop has no use for.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/file-int.h"
#include "util/error.h"
#include "util/iov.h"

#include <fcntl.h>
#include <limits.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MIN_DIRECT_ALIGNMENT = 512, MAX_DIRECT_ALIGNMENT = 4096 };

/* --- options --- */

typedef struct FileOptions {
    char *filename;
    int locking;
    QbAioMode aio;
} FileOptions;

static void file_options_clear(FileOptions *o)
{
    g_free(o->filename);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(FileOptions, file_options_clear)

static const char *const locking_names[] = {"auto", "on", "off", NULL};

/* Indices are those of QbAioMode, then what stands for "nothing said". */
static const char *const aio_names[] = {"threads", "native", "io_uring", NULL};

/* What the one who opened the tree chose, for where no option says otherwise. Batches go through the
 * ring when nothing else was asked for; it falls back to threads itself. */
static QbAioMode default_aio(int flags)
{
    if (flags & BDRV_O_AIO_NATIVE) {
        return QB_AIO_NATIVE;
    }
    return flags & BDRV_O_AIO_THREADS ? QB_AIO_THREADS : QB_AIO_IO_URING;
}

/* Takes options that are accepted and have no effect; their values are checked all the same. */
static bool take_accepted(json_t *options, GError **errp)
{
    bool flag;
    uint64_t number;
    return qb_opt_take_uint(options, "aio-max-batch", 0, &number, errp) &&
           qb_opt_take_bool(options, "drop-cache", true, &flag, errp) &&
           qb_opt_take_bool(options, "x-check-cache-dropped", false, &flag, errp);
}

/* @ret holds the default. */
static bool take_aio(json_t *options, bool direct, QbAioMode *ret, GError **errp)
{
    int aio;
    if (!qb_opt_take_enum(options, "aio", aio_names, (int)*ret, &aio, errp)) {
        return false;
    }
    if (aio == QB_AIO_NATIVE && !direct) {
        qb_error_set(errp, EINVAL,
                     "aio=native was specified, but it requires cache.direct=on, which was not "
                     "specified.");
        return false;
    }
    *ret = (QbAioMode)aio;
    return true;
}

static bool take_options(json_t *options, int flags, bool direct, FileOptions *ret, GError **errp)
{
    g_autofree char *pr_manager = qb_opt_take_string(options, "pr-manager");
    if (pr_manager) {
        qb_error_set(errp, ENOTSUP, "Option 'pr-manager' is not supported");
        return false;
    }
    ret->filename = qb_opt_take_string(options, "filename");
    ret->aio = default_aio(flags);
    return qb_opt_take_enum(options, "locking", locking_names, FILE_LOCKING_AUTO, &ret->locking,
                            errp) &&
           take_aio(options, direct, &ret->aio, errp) && take_accepted(options, errp);
}

bool file_parse_prefix(const char *filename, const char *prefix, json_t *options, GError **errp)
{
    const char *rest = g_str_has_prefix(filename, prefix) ? filename + strlen(prefix) : filename;
    if (json_object_set_new(options, "filename", json_string(rest)) < 0) {
        qb_error_set(errp, EINVAL, "File name '%s' is not valid UTF-8", filename);
        return false;
    }
    return true;
}

static bool file_parse_filename(const char *filename, json_t *options, GError **errp)
{
    return file_parse_prefix(filename, "file:", options, errp);
}

/* --- what kind of thing it is --- */

static bool check_type(const char *path, mode_t mode, bool device, GError **errp)
{
    if (!device && !S_ISREG(mode)) {
        qb_error_set(errp, EINVAL, "'file' driver requires '%s' to be a regular file", path);
        return false;
    }
    if (device && !S_ISBLK(mode) && !S_ISCHR(mode)) {
        qb_error_set(errp, EINVAL,
                     "'host_device' driver requires '%s' to be either a character or block device",
                     path);
        return false;
    }
    return true;
}

/* Looks before opening, because an open of a fifo waits and of a device may act. */
static bool check_type_by_name(const char *path, bool device, GError **errp)
{
    struct stat st;
    if (stat(path, &st) < 0) {
        qb_error_set_errno(errp, errno, "Could not open '%s'", path);
        return false;
    }
    return check_type(path, st.st_mode, device, errp);
}

/* --- descriptors --- */

/* What a descriptor is to be like. */
typedef struct OpenMode {
    bool read_only, direct;
} OpenMode;

/* A descriptor, or -errno. A read-only device may open well and fail at the first write. */
static int try_open(const char *path, OpenMode mode)
{
    int flags = O_CLOEXEC | (mode.read_only ? O_RDONLY : O_RDWR) | (mode.direct ? O_DIRECT : 0);
    int fd = open(path, flags);
    if (fd < 0) {
        return -errno;
    }
    if (!mode.read_only && host_device_is_read_only(fd)) {
        close(fd);
        return -EACCES;
    }
    return fd;
}

static void set_open_error(GError **errp, int err, const char *path, OpenMode mode)
{
    if (err == -EINVAL && mode.direct) {
        qb_error_set(errp, EINVAL, "Could not open '%s': filesystem does not support O_DIRECT",
                     path);
    } else {
        qb_error_set_errno(errp, err, "Could not open '%s'", path);
    }
}

/* --- alignment of direct I/O --- */

typedef struct FileAlignment {
    uint32_t request;
    size_t memory;
} FileAlignment;

/* What the file system says of itself, where kernel and C library have the question. */
static bool ask_alignment(int fd, FileAlignment *ret)
{
#ifdef STATX_DIOALIGN
    struct statx stx;
    if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &stx) == 0 &&
        (stx.stx_mask & STATX_DIOALIGN) && qb_is_power_of_2(stx.stx_dio_offset_align) &&
        qb_is_power_of_2(stx.stx_dio_mem_align)) {
        ret->request = stx.stx_dio_offset_align;
        /* The length of each element must be whole blocks, too, which this alignment implies. */
        ret->memory = MAX(stx.stx_dio_mem_align, stx.stx_dio_offset_align);
        return true;
    }
#endif
    return false;
}

/* True when a direct read of @align bytes into memory aligned to it works. */
static bool alignment_works(int fd, uint32_t align)
{
    QB_AUTO_FREE void *buf = qb_try_memalign(MAX_DIRECT_ALIGNMENT * 2, MAX_DIRECT_ALIGNMENT * 2);
    return buf && pread(fd, (char *)buf + align, align, 0) >= 0;
}

/* Tries it out. An empty file takes anything: then the largest is the safe answer. */
static bool try_alignment(int fd, FileAlignment *ret)
{
    struct stat st;
    uint32_t align = host_device_sector_size(fd);
    if (!align) {
        bool empty = fstat(fd, &st) == 0 && st.st_size == 0;
        align = empty ? MAX_DIRECT_ALIGNMENT : MIN_DIRECT_ALIGNMENT;
    }
    while (align < MAX_DIRECT_ALIGNMENT && !alignment_works(fd, align)) {
        align *= 2;
    }
    *ret = (FileAlignment){.request = align, .memory = align};
    return alignment_works(fd, align);
}

static bool find_alignment(int fd, bool direct, FileAlignment *ret, GError **errp)
{
    *ret = (FileAlignment){.request = 1, .memory = 1};
    if (!direct || ask_alignment(fd, ret) || try_alignment(fd, ret)) {
        return true;
    }
    qb_error_set(errp, EINVAL, "Could not find working O_DIRECT alignment");
    qb_error_add_hint(errp, "Try cache.direct=off");
    return false;
}

/* --- open and close --- */

static void state_init(BDRVFileState *s, FileOptions *opts, bool device)
{
    s->path = g_steal_pointer(&opts->filename);
    s->aio = opts->aio;
    s->locking = opts->locking;
    s->is_device = device;
    s->fd = -1;
    qb_rwlock_init(&s->grow);
    file_flush_init(&s->flush);
    file_data_cache_init(&s->data);
}

static void state_destroy(BDRVFileState *s)
{
    if (s->fd >= 0) {
        close(s->fd);
        s->fd = -1;
    }
    file_data_cache_destroy(&s->data);
    file_flush_destroy(&s->flush);
    qb_rwlock_destroy(&s->grow);
    g_clear_pointer(&s->path, g_free);
}

/* The type again, now of what was really opened, and its length. */
static bool examine(BDRVFileState *s, GError **errp)
{
    struct stat st;
    if (fstat(s->fd, &st) < 0) {
        qb_error_set_errno(errp, errno, "Could not stat '%s'", s->path);
        return false;
    }
    if (!check_type(s->path, st.st_mode, s->is_device, errp)) {
        return false;
    }
    s->is_block_device = S_ISBLK(st.st_mode);
    s->copies_pages = qb_io_copies_pages(s->fd);
    int64_t length = file_length(s);
    atomic_store(&s->eof, length > 0 ? length : 0);
    return true;
}

static bool adopt_alignment(BDRVFileState *s, GError **errp)
{
    FileAlignment align;
    if (!find_alignment(s->fd, s->direct, &align, errp)) {
        return false;
    }
    s->request_alignment = align.request;
    s->mem_alignment = align.memory;
    return true;
}

static bool open_state(BlockDriverState *bs, BDRVFileState *s, GError **errp)
{
    OpenMode mode = {.read_only = bs->read_only, .direct = bs->cache_direct};
    if (!check_type_by_name(s->path, s->is_device, errp)) {
        return false;
    }
    s->fd = try_open(s->path, mode);
    if (s->fd < 0) {
        set_open_error(errp, s->fd, s->path, mode);
        return false;
    }
    s->direct = mode.direct;
    s->read_only = mode.read_only;
    return examine(s, errp) && adopt_alignment(s, errp) &&
           file_locks_init(&s->locks, s->fd, s->locking, s->path, errp);
}

bool file_open_common(BlockDriverState *bs, json_t *options, bool device, GError **errp)
{
    BDRVFileState *s = file_state(bs);
    g_auto(FileOptions) opts = {0};
    if (!take_options(options, bs->open_flags, bs->cache_direct, &opts, errp)) {
        return false;
    }
    if (!opts.filename || !*opts.filename) {
        qb_error_set(errp, EINVAL, "The '%s' block driver requires a file name",
                     device ? "host_device" : "file");
        return false;
    }
    state_init(s, &opts, device);
    if (!open_state(bs, s, errp)) {
        state_destroy(s);
        return false;
    }
    return true;
}

static bool file_open(BlockDriverState *bs, json_t *options, int flags, GError **errp)
{
    return file_open_common(bs, options, false, errp);
}

void file_close(BlockDriverState *bs)
{
    state_destroy(file_state(bs));
}

/* --- reopen --- */

typedef struct FileReopen {
    int fd; /* the new descriptor, or -1: the old one serves */
    OpenMode mode;
    QbAioMode aio;
    FileAlignment align;
} FileReopen;

/* What cache.direct will be: from the options if they say so, else as it is. */
static bool reopen_wants_direct(const BDRVReopenState *state)
{
    json_t *value = json_object_get(state->options, "cache.direct");
    const char *text = json_string_value(value);
    if (text) {
        return strcmp(text, "on") == 0;
    }
    return value ? json_is_true(value) : state->bs->cache_direct;
}

static bool same_file(int a, int b)
{
    struct stat sa, sb;
    return fstat(a, &sa) == 0 && fstat(b, &sb) == 0 && sa.st_dev == sb.st_dev &&
           sa.st_ino == sb.st_ino;
}

/* Opens what s->fd has open once more. A descriptor, or -errno. */
static int open_again(const BDRVFileState *s, OpenMode mode)
{
    char proc[sizeof("/proc/self/fd/") + 12];
    g_snprintf(proc, sizeof(proc), "/proc/self/fd/%d", s->fd);
    int fd = try_open(proc, mode);
    if (fd != -ENOENT) {
        return fd;
    }
    fd = try_open(s->path, mode);
    if (fd >= 0 && !same_file(fd, s->fd)) {
        close(fd);
        return -ESTALE;
    }
    return fd;
}

/* Options that may not change are compared with what the node was opened with. */
static bool check_unchanged(const BDRVFileState *s, const FileOptions *opts, GError **errp)
{
    const char *changed = NULL;
    if (opts->filename && strcmp(opts->filename, s->path) != 0) {
        changed = "filename";
    } else if (opts->locking != s->locking) {
        changed = "locking";
    }
    if (changed) {
        qb_error_set(errp, EINVAL, "Cannot change the option '%s'", changed);
    }
    return !changed;
}

/* Opens r->fd, or tells why not. No locks yet: checks made on the old one would run into them. */
static bool prepare_fd(const BDRVFileState *s, FileReopen *r, GError **errp)
{
    r->fd = open_again(s, r->mode);
    if (r->fd < 0) {
        set_open_error(errp, r->fd, s->path, r->mode);
        return false;
    }
    if (find_alignment(r->fd, r->mode.direct, &r->align, errp)) {
        return true;
    }
    close(r->fd);
    return false;
}

bool file_reopen_prepare(BDRVReopenState *state, GError **errp)
{
    BDRVFileState *s = file_state(state->bs);
    g_auto(FileOptions) opts = {0};
    OpenMode mode = {.read_only = state->read_only, .direct = reopen_wants_direct(state)};
    if (!take_options(state->options, state->flags, mode.direct, &opts, errp) ||
        !check_unchanged(s, &opts, errp)) {
        return false;
    }
    g_autofree FileReopen *r = g_new0(FileReopen, 1);
    *r = (FileReopen){.fd = -1, .mode = mode, .aio = opts.aio};
    bool new_fd = mode.read_only != s->read_only || mode.direct != s->direct;
    if (new_fd && !prepare_fd(s, r, errp)) {
        return false;
    }
    state->opaque = g_steal_pointer(&r);
    return true;
}

/* There is no way back any more; the kernel can refuse shared locks for want of memory only. */
static void move_locks(const BDRVFileState *s, int fd)
{
    g_autoptr(GError) err = NULL;
    if (!file_locks_copy(&s->locks, fd, s->path, &err)) {
        bdrv_warn("%s", err->message);
    }
}

static void switch_fd(BDRVFileState *s, const FileReopen *r)
{
    move_locks(s, r->fd);
    close(s->fd);
    s->fd = r->fd;
    s->direct = r->mode.direct;
    s->read_only = r->mode.read_only;
    s->request_alignment = r->align.request;
    s->mem_alignment = r->align.memory;
}

void file_reopen_commit(BDRVReopenState *state)
{
    BDRVFileState *s = file_state(state->bs);
    g_autofree FileReopen *r = g_steal_pointer(&state->opaque);
    s->aio = r->aio;
    if (r->fd >= 0) {
        switch_fd(s, r);
    }
}

void file_reopen_abort(BDRVReopenState *state)
{
    g_autofree FileReopen *r = g_steal_pointer(&state->opaque);
    if (r && r->fd >= 0) {
        close(r->fd);
    }
}

/* --- facts --- */

void file_refresh_limits(BlockDriverState *bs)
{
    const BDRVFileState *s = file_state(bs);
    bs->bl.request_alignment = s->request_alignment;
    bs->bl.min_mem_alignment = s->mem_alignment;
    bs->bl.opt_mem_alignment = MAX(s->mem_alignment, (size_t)sysconf(_SC_PAGESIZE));
    bs->bl.max_iov = IOV_MAX;
    if (s->is_block_device) {
        uint32_t sector = host_device_sector_size(s->fd);
        bs->bl.pdiscard_alignment = sector;
        bs->bl.pwrite_zeroes_alignment = sector;
    }
}

int64_t file_length(const BDRVFileState *s)
{
    struct stat st;
    if (s->is_block_device) {
        return host_device_length(s->fd);
    }
    if (fstat(s->fd, &st) < 0) {
        return -errno;
    }
    return st.st_size; /* 0 for character devices */
}

int64_t file_getlength(BlockDriverState *bs)
{
    return file_length(file_state(bs));
}

int64_t file_get_allocated_size(BlockDriverState *bs)
{
    struct stat st;
    if (fstat(file_state(bs)->fd, &st) < 0) {
        return -errno;
    }
    return (int64_t)st.st_blocks * 512;
}

const BlockDriver bdrv_file = {
    .format_name = "file",
    .protocol_name = "file",
    FILE_DRIVER_COMMON,
    .parse_filename = file_parse_filename,
    .open = file_open,
    .create_opts = file_create_opts,
    .create = file_create,
    .truncate = file_truncate,
    .cut_padding = file_cut_padding,
};
