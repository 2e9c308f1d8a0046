/*
 * BlockBackend: a user of the block layer (a tool, a device, an export, a job) and its root child.
 *
 * Requests are counted here, at submission; a drain makes new ones wait here, before they have taken
 * anything.  With write-cache off (writethrough, directsync) every write carries FUA.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_BLOCK_BACKEND_H
#define BLOCK_BLOCK_BACKEND_H

#include "block/block.h"
#include "block/io.h"

#pragma GCC visibility push(default) /* public: exported by libqblock */

/* Permissions follow BDRV_O_RDWR / BDRV_O_RESIZE / BDRV_O_NO_IO; everything is shared with others,
 * but with BDRV_O_NO_SHARE only reading. */
BlockBackend *blk_new_open(const char *filename, json_t *options, int flags, GError **errp);
/* See bdrv_open_guarded(). */
BlockBackend *blk_new_open_guarded(const char *filename, json_t *options, int flags,
                                   const BdrvOpenGuard *guard, GError **errp);
/* A user of an existing node; @perm/@shared: BLK_PERM_* of driver.h. */
BlockBackend *blk_new_with_bs(BlockDriverState *bs, unsigned perm, unsigned shared, GError **errp);
void blk_ref(BlockBackend *blk);
/* The last one flushes, detaches the root and frees. */
void blk_unref(BlockBackend *blk);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(BlockBackend, blk_unref)
BlockDriverState *blk_bs(BlockBackend *blk); /* borrowed */
BdrvChild *blk_root(BlockBackend *blk);
bool blk_set_perm(BlockBackend *blk, unsigned perm, unsigned shared, GError **errp);

/* "none|writethrough|writeback|directsync|unsafe" -> what they mean. */
typedef struct BlkCacheMode {
    bool direct, no_flush, writethrough;
} BlkCacheMode;
bool blk_parse_cache_mode(const char *mode, BlkCacheMode *ret); /* false: unknown */
bool blk_parse_discard(const char *mode, bool *ret_unmap);      /* ignore|off, unmap|on */
/* "threads|native|io_uring": adds the BDRV_O_AIO_* flag to *flags, none for the default. */
bool blk_parse_aio(const char *mode, int *flags); /* false: unknown */
void blk_set_write_cache(BlockBackend *blk, bool writeback);
bool blk_write_cache(const BlockBackend *blk);

int64_t blk_getlength(BlockBackend *blk);
bool blk_is_writable(BlockBackend *blk);

/* Synchronous requests; rules of io.h. -EIO beyond the end, -EPERM (-EACCES) on a read-only node. */
int blk_pread(BlockBackend *blk, int64_t offset, int64_t bytes, void *buf, int flags);
int blk_pwrite(BlockBackend *blk, int64_t offset, int64_t bytes, const void *buf, int flags);
int blk_preadv(BlockBackend *blk, int64_t offset, int64_t bytes, IoVector *qiov, int flags);
int blk_pwritev(BlockBackend *blk, int64_t offset, int64_t bytes, IoVector *qiov, int flags);
int blk_pwrite_zeroes(BlockBackend *blk, int64_t offset, int64_t bytes, int flags);
int blk_pdiscard(BlockBackend *blk, int64_t offset, int64_t bytes);
int blk_flush(BlockBackend *blk);
bool blk_resize(BlockBackend *blk, const BdrvResize *how, GError **errp);
bool blk_truncate(BlockBackend *blk, int64_t offset, bool exact, PreallocMode prealloc,
                  bool zero_new, GError **errp);
int blk_run_batch(BlockBackend *blk, BdrvBatchOp *ops, size_t n);
/* As bdrv_copy_range(). */
int blk_copy_range(BlockBackend *src, int64_t src_offset, BlockBackend *dst, int64_t dst_offset,
                   int64_t bytes);
/* As bdrv_copy_extents(). */
int blk_copy_extents(BlockBackend *src, BlockBackend *dst, const BdrvCopyExtent *ext, size_t n,
                     int flags);
int blk_save_vmstate(BlockBackend *blk, IoVector *qiov, int64_t pos);
int blk_load_vmstate(BlockBackend *blk, IoVector *qiov, int64_t pos);
/* As bdrv_make_empty(). */
bool blk_make_empty(BlockBackend *blk, bool committed, GError **errp);

/* Requests that run in the request pool.  The ticket is drawn, and the request counted, at the call;
 * @done runs in a worker thread, once, after which the request is forgotten. */
typedef enum BlkOp { BLK_OP_READ, BLK_OP_WRITE, BLK_OP_ZERO, BLK_OP_DISCARD, BLK_OP_FLUSH } BlkOp;
void blk_submit(BlockBackend *blk, BlkOp op, int64_t offset, int64_t bytes, IoVector *qiov,
                int flags, void (*done)(void *opaque, int ret), void *opaque);
/* Waits until no request of @blk is in flight. */
void blk_drain(BlockBackend *blk);

#pragma GCC visibility pop

#endif
