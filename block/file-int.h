/*
 * The file drivers' private map: one state, five rooms.
 *
 *   file-posix.c    driver "file": options, open, close, reopen, limits, length
 *   file-io.c       read, write, FUA, flush, batches, the bottom of the fast lane
 *   file-status.c   where data is (block status), zero and discard, growing by zeroes
 *   file-create.c   truncate with preallocation, create
 *   file-locks.c    image locks that other processes see
 *   host-device.c   driver "host_device": what block and character devices do differently
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_FILE_INT_H
#define BLOCK_FILE_INT_H

#include "block/driver.h"
#include "util/checked.h"
#include "util/iobatch.h"
#include "util/thread.h"

/* Which bytes one open file holds locked; see the essay of file-locks.c. */
typedef struct FileLocks {
    bool enabled;
    bool required;                    /* locking=on: never go on without */
    unsigned perm, unshared;          /* BLK_PERM_*: bytes held now */
    unsigned final_perm, final_unshared; /* what abort goes back to */
} FileLocks;

/* Flushes are shared: see file-io.c. */
typedef struct FileFlush {
    QbMutex lock;
    QbCond done;
    /* guarded by lock */
    bool running;
    uint64_t started, finished; /* rounds of fdatasync */
    uint64_t covered;           /* changes that came before the last round that began */
    uint64_t stable;            /* changes that came before the last round that went well */
    uint64_t failed_round;      /* the last that failed, 0: none */
    int failed_errno;           /* of that round */
    bool broken;                /* a cached file lost data: every later flush fails */
    /* any thread */
    _Atomic(uint64_t) changes;  /* counted when they are done: file_note_change() */
    _Atomic(bool) loose_holes;  /* holes may be there that are not stable, nobody was told of */
} FileFlush;

/* Data extents that look-ups found: see file-status.c. */
#define FILE_DATA_EXTENTS 256
typedef struct FileDataExtent {
    int64_t start, end;
} FileDataExtent;
typedef struct FileDataCache {
    QbMutex lock;
    /* guarded by lock */
    FileDataExtent list[FILE_DATA_EXTENTS]; /* sorted, none touches the next */
    unsigned n, victim;
    bool asked;       /* somebody has asked since the file was opened */
    int64_t begins;   /* data begins here, behind the hole found last; -1: not known */
    uint64_t changes; /* holes made so far */
} FileDataCache;

/* An operation the file system turned out not to have is not tried again. One way, no lock. */
typedef struct FileLacks {
    _Atomic(bool) punch_hole, zero_range, blkzeroout, blkdiscard, copy_range, dsync, nowait_read,
        nowait_write;
} FileLacks;

typedef struct BDRVFileState {
    /* set at open */
    char *path;
    bool is_device;       /* driver host_device */
    bool is_block_device; /* and not a character device */
    bool copies_pages;    /* qb_io_copies_pages() */
    int locking;          /* FILE_LOCKING_*, as the option said */

    /* changed by reopen, with the node drained */
    int fd;
    bool direct;
    bool read_only;
    QbAioMode aio;
    uint32_t request_alignment; /* of offsets and lengths */
    size_t mem_alignment;
    FileLocks locks; /* changed by permission changes, which the core makes one at a time */

    /* any thread */
    QbRwLock grow;         /* shared: a write beyond eof; exclusive: growth by ftruncate */
    _Atomic(int64_t) eof;  /* the file is at least this long */
    FileFlush flush;
    FileDataCache data;
    FileLacks lacks;
} BDRVFileState;

static inline BDRVFileState *file_state(BlockDriverState *bs)
{
    return bs->opaque;
}

/* What the core promises of every request. */
static inline void file_assert_request(const BDRVFileState *s, int64_t offset, int64_t bytes)
{
    assert(s->fd >= 0);
    assert(bytes > 0 && qb_range_valid(offset, bytes));
    assert(qb_is_aligned((uint64_t)(offset | bytes), s->request_alignment));
}

/* --- file-posix.c --- */

enum { FILE_LOCKING_AUTO, FILE_LOCKING_ON, FILE_LOCKING_OFF };

/* The whole of open for both drivers. On failure nothing is left behind. */
bool file_open_common(BlockDriverState *bs, json_t *options, bool device, GError **errp);
void file_close(BlockDriverState *bs);
bool file_reopen_prepare(BDRVReopenState *state, GError **errp);
void file_reopen_commit(BDRVReopenState *state);
void file_reopen_abort(BDRVReopenState *state);
void file_refresh_limits(BlockDriverState *bs);
int64_t file_getlength(BlockDriverState *bs); /* file_length() */
int64_t file_get_allocated_size(BlockDriverState *bs);
/* Length of a regular file, block device or seekable character device, or -errno. */
int64_t file_length(const BDRVFileState *s);
/* Moves what follows "@prefix" in @filename to option "filename". */
bool file_parse_prefix(const char *filename, const char *prefix, json_t *options, GError **errp);

/* --- file-io.c --- */

void file_flush_init(FileFlush *f);
void file_flush_destroy(FileFlush *f);
int file_preadv(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                IoVector *qiov, size_t qiov_offset, int flags);
int file_pwritev(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                 IoVector *qiov, size_t qiov_offset, int flags);
int file_run_batch(BlockDriverState *bs, BdrvBatchOp *ops, size_t n);
int file_flush(BlockDriverState *bs);
/* As file_flush(), whatever cache.no-flush says: what was written before the call is stable. */
int file_make_stable(BDRVFileState *s);
int file_map(BlockDriverState *bs, BlkQueue *queue, BdrvMapIntent intent, int64_t offset,
             int64_t bytes, BdrvMapping *mapping);
int file_map_done(BlockDriverState *bs, BlkQueue *queue, BdrvMapping *mapping, int result);
/* To be called after what a flush must make stable, and before who asked for it hears of it, also
 * when it failed halfway. */
void file_note_change(BDRVFileState *s);
/* To be called after bytes were given back, whether they have become a hole or not. */
void file_note_discard(BDRVFileState *s);
/* To be called when a hole has been seen, before anybody hears of it. */
void file_note_hole_seen(BDRVFileState *s);
/* Makes the file at least @end bytes long, never shorter, whoever else writes. 0 or -errno. */
int file_grow(BDRVFileState *s, int64_t end);
int file_cut_padding(BlockDriverState *bs, int64_t end, int64_t padded_end);

/* --- file-status.c --- */

void file_data_cache_init(FileDataCache *c);
void file_data_cache_destroy(FileDataCache *c);
/* To be called after every change that may have made data a hole. */
void file_data_cache_drop(FileDataCache *c);
int file_block_status(BlockDriverState *bs, int64_t offset, int64_t bytes, BdrvStatus *ret);
int file_pwrite_zeroes(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                       int flags);
int file_pdiscard(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes);
/* fallocate() with the errors of "there is no such operation here" folded into -ENOTSUP, which is
 * remembered in @lacks (may be NULL). */
int file_fallocate(int fd, int mode, int64_t offset, int64_t bytes, _Atomic(bool) *lacks);

/* --- file-create.c --- */

extern const QbOptDesc file_create_opts[];
bool file_create(const char *filename, json_t *options, QbProgress *progress, GError **errp);
bool file_truncate(BlockDriverState *bs, int64_t offset, bool exact, PreallocMode prealloc,
                   bool zero_new, GError **errp);

/* --- file-locks.c --- */

/* Finds out whether locks work on @fd. False and error only with locking=on. */
bool file_locks_init(FileLocks *l, int fd, int locking, const char *path, GError **errp);
/*
 * Locks the bytes of @perm and @unshared that are not held yet and looks for other processes that
 * are in the way of them. On failure what was held before is held, no more. @fd: where the locks
 * live.
 */
bool file_locks_take(FileLocks *l, int fd, unsigned perm, unsigned unshared, const char *path,
                     GError **errp);
/* Unlocks all but @perm and @unshared, which must be held. */
void file_locks_keep(FileLocks *l, int fd, unsigned perm, unsigned unshared);
/* Locks on @fd, another open of the same file without locks, what @l holds. */
bool file_locks_copy(const FileLocks *l, int fd, const char *path, GError **errp);
bool file_check_perm(BlockDriverState *bs, unsigned perm, unsigned shared, GError **errp);
void file_set_perm(BlockDriverState *bs, unsigned perm, unsigned shared);
void file_abort_perm(BlockDriverState *bs);

/* --- host-device.c --- */

/* Size of the block device behind @fd in bytes, or -errno. */
int64_t host_device_length(int fd);
/* Its logical block size, or 0 when it does not say. */
uint32_t host_device_sector_size(int fd);
bool host_device_is_read_only(int fd);
int host_device_zero(BDRVFileState *s, int64_t offset, int64_t bytes, int flags);
int host_device_discard(BDRVFileState *s, int64_t offset, int64_t bytes);

/* --- the drivers' tables --- */

/* What both drivers have in common. */
#define FILE_DRIVER_COMMON                                                                         \
    .instance_size = sizeof(BDRVFileState),                                                        \
    .needs_filename = true,                                                                        \
    .close = file_close,                                                                           \
    .reopen_prepare = file_reopen_prepare,                                                         \
    .reopen_commit = file_reopen_commit,                                                           \
    .reopen_abort = file_reopen_abort,                                                             \
    .check_perm = file_check_perm,                                                                 \
    .set_perm = file_set_perm,                                                                     \
    .abort_perm = file_abort_perm,                                                                 \
    .refresh_limits = file_refresh_limits,                                                         \
    .preadv = file_preadv,                                                                         \
    .pwritev = file_pwritev,                                                                       \
    .pwrite_zeroes = file_pwrite_zeroes,                                                           \
    .pdiscard = file_pdiscard,                                                                     \
    .block_status = file_block_status,                                                             \
    .flush = file_flush,                                                                           \
    .run_batch = file_run_batch,                                                                   \
    .supported_write_flags = BDRV_REQ_FUA,                                                         \
    .supported_zero_flags = BDRV_REQ_MAY_UNMAP | BDRV_REQ_NO_FALLBACK,                             \
    .map = file_map,                                                                               \
    .map_done = file_map_done,                                                                     \
    .getlength = file_getlength,                                                                   \
    .get_allocated_file_size = file_get_allocated_size

#endif
