/*
 * Requests on a child: what drivers and jobs call.  Users outside call blk_* (block-backend.h).
 *
 * All return 0 or -errno and block until the request is done.  Any alignment, any length up to
 * BDRV_REQUEST_MAX_BYTES for transfers and any int64_t length for zero, discard and status; the
 * core pads, splits and serialises.  Reads of what lies beyond the end of the node return zeroes;
 * writes and zeroes that reach beyond it fail with -EIO unless the node grows (files do); discards
 * are cut.  Writes to a read-only node fail with -EPERM, bad ranges with -EIO.  BlockBackends are
 * stricter.
 * The caller holds the graph lock shared (nested entry is taken anyway).
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_IO_H
#define BLOCK_IO_H

#include "block/block.h"
#include "util/iov.h"

#pragma GCC visibility push(default) /* public: exported by libqblock */

typedef enum BdrvRequestFlags {
    BDRV_REQ_FUA = 1 << 0,         /* stable when the call returns */
    BDRV_REQ_MAY_UNMAP = 1 << 1,   /* zeroes: space may be given back */
    BDRV_REQ_NO_FALLBACK = 1 << 2, /* zeroes: -ENOTSUP rather than writing them out */
    BDRV_REQ_COMPRESSED = 1 << 3,  /* write compressed */
    BDRV_REQ_COPY_ON_READ = 1 << 4,
    BDRV_REQ_REGISTERED_BUF = 1 << 5, /* accepted, a hint */
    BDRV_REQ_UNCHANGED = 1 << 6,   /* write that leaves what the guest reads (COR, commit) */
} BdrvRequestFlags;

typedef enum BdrvCopyFlags {
    /* The kernel only where it shares blocks or hands the copy on, not where it would move page
     * after page: for those who copy in several threads. */
    BDRV_COPY_SHARING = 1 << 0,
} BdrvCopyFlags;

typedef struct BdrvCopyExtent {
    int64_t src_offset, dst_offset, bytes;
} BdrvCopyExtent;

int bdrv_pread(BdrvChild *child, int64_t offset, int64_t bytes, void *buf, int flags);
int bdrv_pwrite(BdrvChild *child, int64_t offset, int64_t bytes, const void *buf, int flags);
int bdrv_preadv(BdrvChild *child, int64_t offset, int64_t bytes, IoVector *qiov, int flags);
int bdrv_pwritev(BdrvChild *child, int64_t offset, int64_t bytes, IoVector *qiov, int flags);
/* The part of @qiov that starts at @qiov_offset. */
int bdrv_preadv_part(BdrvChild *child, int64_t offset, int64_t bytes, IoVector *qiov,
                     size_t qiov_offset, int flags);
int bdrv_pwritev_part(BdrvChild *child, int64_t offset, int64_t bytes, IoVector *qiov,
                      size_t qiov_offset, int flags);
/* bdrv_pwrite() then bdrv_flush() of the child's node. */
int bdrv_pwrite_sync(BdrvChild *child, int64_t offset, int64_t bytes, const void *buf, int flags);
int bdrv_pwrite_zeroes(BdrvChild *child, int64_t offset, int64_t bytes, int flags);
/* Advisory: heads and tails that the driver cannot do are left alone; -ENOTSUP never escapes. */
int bdrv_pdiscard(BdrvChild *child, int64_t offset, int64_t bytes);
/* Copies between nodes, by the kernel where it can; for any range and length. Zeroes are copied as data.
 * The ranges must not overlap in one node. */
int bdrv_copy_range(BdrvChild *src, int64_t src_offset, BdrvChild *dst, int64_t dst_offset,
                    int64_t bytes);
/* The same for many extents, one after the other; with BdrvCopyFlags. Ends at the first error. */
int bdrv_copy_extents(BdrvChild *src, BdrvChild *dst, const BdrvCopyExtent *ext, size_t n,
                      int flags);
/* Makes all writes that have returned stable, down to the last protocol node. */
int bdrv_flush(BlockDriverState *bs);
typedef struct BdrvResize {
    int64_t length;       /* the new one */
    bool exact;           /* ENOTSUP rather than a longer node */
    PreallocMode prealloc; /* of the grown part */
    bool zero_new;        /* the grown part reads as zeroes, also where a longer backing file would show */
    QbProgress *progress; /* grows by what is found to do; NULL: nobody looks */
} BdrvResize;
bool bdrv_resize(BdrvChild *child, const BdrvResize *how, GError **errp);
/* The same without progress. */
bool bdrv_truncate(BdrvChild *child, int64_t offset, bool exact, PreallocMode prealloc,
                   bool zero_new, GError **errp);

/* --- batches --- */
typedef enum BdrvBatchKind {
    BDRV_BATCH_READ,
    BDRV_BATCH_WRITE,
    BDRV_BATCH_ZERO,
    BDRV_BATCH_DISCARD,
} BdrvBatchKind;
typedef struct BdrvBatchOp {
    BdrvBatchKind kind;
    int64_t offset, bytes;
    void *buf; /* read and write */
    int flags; /* BdrvRequestFlags */
    int ret;   /* out */
} BdrvBatchOp;
/* Runs all of @ops at depth and returns when all are done: 0, or the first error in array order.
 * Each op follows the rules of its single form and has its result in ret.
 * The order of effects is not defined; ops of one batch must not overlap unless all read. */
int bdrv_run_batch(BdrvChild *child, BdrvBatchOp *ops, size_t n);
/* Appends to @ops, an array of BdrvBatchOp, the transfer of [offset, +bytes) from or to
 * @qiov_offset of the vector: one operation for each piece of memory. */
void bdrv_batch_add(GArray *ops, BdrvBatchKind kind, int64_t offset, int64_t bytes,
                    const IoVector *qiov, size_t qiov_offset);

/* --- block status --- */
typedef enum BdrvBlockStatus {
    BDRV_BLOCK_DATA = 1 << 0,         /* storage holds the bytes */
    BDRV_BLOCK_ZERO = 1 << 1,         /* reads as zeroes */
    BDRV_BLOCK_OFFSET_VALID = 1 << 2, /* host_offset in host_node holds exactly these bytes */
    BDRV_BLOCK_ALLOCATED = 1 << 3,    /* this layer decides the content (not the backing file) */
    BDRV_BLOCK_EOF = 1 << 4,          /* the extent reaches the end of the node */
    BDRV_BLOCK_COMPRESSED = 1 << 5,
    /* Driver only, with OFFSET_VALID: ask there about zeroes; without DATA and ZERO: ask there for
     * all but ALLOCATED. */
    BDRV_BLOCK_RECURSE = 1 << 6,
} BdrvBlockStatus;
typedef struct BdrvStatus {
    int flags;             /* BdrvBlockStatus */
    int depth;             /* layers above the one that decided; -1: none of them did */
    int64_t bytes;         /* length of the extent, merged; 0 only beyond the end of the node */
    int64_t host_offset;   /* with OFFSET_VALID */
    BlockDriverState *host_node; /* with OFFSET_VALID: borrowed */
} BdrvStatus;
/* What one node says of [offset, offset+bytes): ALLOCATED tells whether it decides.  Without it
 * ZERO says that there is nothing below, or that what is below is too short. *ret is set on success
 * only, here and below. */
int bdrv_block_status(BlockDriverState *bs, int64_t offset, int64_t bytes, BdrvStatus *ret);
/* The same, but what follows the extent may be of the same kind: for those who go over a node step by
 * step and merge themselves. Merging needs a look at what is behind, which they would take again. */
int bdrv_block_status_step(BlockDriverState *bs, int64_t offset, int64_t bytes, BdrvStatus *ret);
/* Through the chain: @base excluded (NULL: to the end of the chain). Short backing files read as
 * zeroes beyond their end, decided (ALLOCATED) by the layer above. */
int bdrv_block_status_above(BlockDriverState *bs, BlockDriverState *base, int64_t offset,
                            int64_t bytes, BdrvStatus *ret);
/* One step of it, as above. */
int bdrv_block_status_above_step(BlockDriverState *bs, BlockDriverState *base, int64_t offset,
                                 int64_t bytes, BdrvStatus *ret);
/* As above without look-ups in files below.  Returns BDRV_BLOCK_ALLOCATED, with BDRV_BLOCK_ZERO
 * where the layer that decides knows it; 0: no layer decides; or -errno.  *ret_bytes as in
 * BdrvStatus. */
int bdrv_is_allocated_above(BlockDriverState *bs, BlockDriverState *base, bool include_base,
                            int64_t offset, int64_t bytes, int64_t *ret_bytes);
typedef struct BdrvRange {
    int64_t offset, bytes;
} BdrvRange;
/* Makes of @ranges the ranges of [offset, +bytes), in order and apart, outside of which
 * bdrv_block_status_above() would not say ALLOCATED; inside it may.  For those who go over a large
 * node of which little may be allocated: maps are read in bulk, on all cores, past caches.  What is
 * allocated while this runs may be missing.  0 or -errno. */
int bdrv_find_allocated_above(BlockDriverState *bs, BlockDriverState *base, int64_t offset,
                              int64_t bytes, GArray *ranges);
/* 1 when the range is known to read as zeroes (beyond the end it does), 0 when not, or -errno.
 * Never reads data. */
int bdrv_is_zero_fast(BlockDriverState *bs, int64_t offset, int64_t bytes);

/* --- quiescing --- */
/* Waits for all requests of @bs and its parents' BlockBackends and keeps new ones waiting. Nests.
 * Not under the graph lock, not inside a request. */
void bdrv_drained_begin(BlockDriverState *bs);
void bdrv_drained_end(BlockDriverState *bs);

/* --- VM state, above the guest's disk --- */
int bdrv_save_vmstate(BlockDriverState *bs, IoVector *qiov, int64_t pos);
int bdrv_load_vmstate(BlockDriverState *bs, IoVector *qiov, int64_t pos);

#pragma GCC visibility pop

#endif
