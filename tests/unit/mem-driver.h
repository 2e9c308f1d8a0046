/*
 * Drivers in memory, for tests of what is above them.
 *
 *   test-mem      a protocol node: an array of bytes.  Grows with "grow=on".
 *   test-fua      the same with FUA of its own, and run_batch.
 *   test-cow      a format without a file: clusters in memory, others come from "backing".
 *                 Allocates like a real format: serialises, looks again, fills the cluster, links
 *                 it.
 *
 * They check what the core promises to drivers with g_assert.  Data are copied without any lock
 * where the core promises that nobody else is there, so that ThreadSanitizer sees it when that is
 * not true.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef TESTS_MEM_DRIVER_H
#define TESTS_MEM_DRIVER_H

#include "block/block-backend.h"
#include "block/driver.h"
#include "util/checked.h"
#include "util/pool.h"

#include <string.h>

typedef struct MemState {
    uint8_t *data;
    _Atomic(int64_t) length;
    int64_t capacity; /* of data */
    uint64_t align, max_transfer, mem_align, max_iov;
    uint64_t zero_align, max_zero, discard_align, max_discard;
    bool grow, zeroes; /* zeroes: pwrite_zeroes works */
    _Atomic(int) error; /* -errno of the next transfers */
    /* what has been asked for */
    _Atomic(unsigned) reads, writes, n_zeroes, discards, flushes, batches, drained;
    _Atomic(int) last_flags;
    _Atomic(int64_t) max_seen; /* longest transfer */
} MemState;

static inline MemState *mem_state(BlockDriverState *bs)
{
    return bs->opaque;
}

static inline bool mem_open(BlockDriverState *bs, json_t *options, int flags, GError **errp)
{
    MemState *s = mem_state(bs);
    uint64_t size, capacity;
    if (!qb_opt_take_size(options, "size", 65536, &size, errp)
        || !qb_opt_take_size(options, "capacity", size, &capacity, errp)
        || !qb_opt_take_size(options, "align", 1, &s->align, errp)
        || !qb_opt_take_size(options, "max-transfer", 0, &s->max_transfer, errp)
        || !qb_opt_take_size(options, "mem-align", 0, &s->mem_align, errp)
        || !qb_opt_take_size(options, "max-iov", 0, &s->max_iov, errp)
        || !qb_opt_take_size(options, "zero-align", 0, &s->zero_align, errp)
        || !qb_opt_take_size(options, "max-zero", 0, &s->max_zero, errp)
        || !qb_opt_take_size(options, "discard-align", 0, &s->discard_align, errp)
        || !qb_opt_take_size(options, "max-discard", 0, &s->max_discard, errp)
        || !qb_opt_take_bool(options, "grow", false, &s->grow, errp)
        || !qb_opt_take_bool(options, "zeroes", true, &s->zeroes, errp)) {
        return false;
    }
    s->length = (int64_t)size;
    s->capacity = (int64_t)MAX(size, capacity);
    s->data = g_malloc0((size_t)qb_align_up((uint64_t)s->capacity, s->align));
    return true;
}

static inline void mem_close(BlockDriverState *bs)
{
    g_free(mem_state(bs)->data);
}

static inline void mem_refresh_limits(BlockDriverState *bs)
{
    const MemState *s = mem_state(bs);
    bs->bl.request_alignment = (uint32_t)s->align;
    bs->bl.max_transfer = (uint32_t)s->max_transfer;
    bs->bl.min_mem_alignment = s->mem_align;
    bs->bl.opt_mem_alignment = s->mem_align;
    bs->bl.max_iov = (int)s->max_iov;
    bs->bl.pwrite_zeroes_alignment = (uint32_t)s->zero_align;
    bs->bl.max_pwrite_zeroes = (int64_t)s->max_zero;
    bs->bl.pdiscard_alignment = (uint32_t)s->discard_align;
    bs->bl.max_pdiscard = (int64_t)s->max_discard;
}

static inline int64_t mem_getlength(BlockDriverState *bs)
{
    return atomic_load(&mem_state(bs)->length);
}

/* What the core promises of every transfer. */
static inline void mem_check(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes)
{
    MemState *s = mem_state(bs);
    int64_t end = s->grow ? s->capacity : s->length;
    g_assert_true(bdrv_graph_held());
    g_assert_true(req->bs == bs);
    g_assert_cmpint(bytes, >, 0);
    g_assert_cmpint(offset % (int64_t)s->align, ==, 0);
    g_assert_cmpint(bytes % (int64_t)s->align, ==, 0);
    g_assert_cmpint(offset + bytes, <=, (int64_t)qb_align_up((uint64_t)end, s->align));
}

static inline void mem_check_vector(BlockDriverState *bs, IoVector *qiov, size_t qiov_offset,
                                    int64_t bytes)
{
    MemState *s = mem_state(bs);
    IOV_VECTOR_AUTO part;
    iov_vector_init_slice(&part, qiov, qiov_offset, (size_t)bytes);
    g_assert_true(!s->max_transfer || bytes <= (int64_t)s->max_transfer);
    g_assert_true(!s->max_iov || part.niov <= (int)s->max_iov);
    g_assert_true(s->mem_align <= 1 || iov_vector_is_aligned(&part, s->mem_align));
    int64_t seen = s->max_seen;
    while (seen < bytes && !atomic_compare_exchange_weak(&s->max_seen, &seen, bytes)) {
    }
}

static inline int mem_preadv(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                             IoVector *qiov, size_t qiov_offset, int flags)
{
    MemState *s = mem_state(bs);
    mem_check(bs, req, offset, bytes);
    mem_check_vector(bs, qiov, qiov_offset, bytes);
    s->reads++;
    if (s->error) {
        return s->error;
    }
    iov_vector_from_buf(qiov, qiov_offset, s->data + offset, (size_t)bytes);
    return 0;
}

static inline int mem_cut_padding(BlockDriverState *bs, int64_t end, int64_t padded_end)
{
    g_assert_cmpint(end, <, padded_end);
    (void)atomic_compare_exchange_strong(&mem_state(bs)->length, &padded_end, end);
    return 0;
}

static inline int mem_note_write(MemState *s, int64_t end, int flags)
{
    s->last_flags = flags;
    if (s->error) {
        return s->error;
    }
    int64_t length = s->length;
    while (s->grow && length < end && !atomic_compare_exchange_weak(&s->length, &length, end)) {
    }
    return 0;
}

static inline int mem_pwritev(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                              IoVector *qiov, size_t qiov_offset, int flags)
{
    MemState *s = mem_state(bs);
    mem_check(bs, req, offset, bytes);
    mem_check_vector(bs, qiov, qiov_offset, bytes);
    g_assert_cmpint(flags & ~(int)bs->drv->supported_write_flags, ==, 0);
    s->writes++;
    int ret = mem_note_write(s, offset + bytes, flags);
    if (ret == 0) {
        iov_vector_to_buf(qiov, qiov_offset, s->data + offset, (size_t)bytes);
    }
    return ret;
}

/* The core cuts where a request is longer than a unit. */
static inline void mem_check_unit(int64_t offset, int64_t bytes, uint64_t unit, uint64_t max)
{
    int64_t u = (int64_t)unit;
    if (u > 1 && bytes >= u) {
        g_assert_cmpint(offset % u, ==, 0);
        g_assert_cmpint(bytes % u, ==, 0);
        g_assert_true(!max || bytes <= (int64_t)max);
    } else if (u > 1) {
        g_assert_cmpint(offset / u, ==, (offset + bytes - 1) / u);
    }
}

static inline int mem_pwrite_zeroes(BlockDriverState *bs, BdrvRequest *req, int64_t offset,
                                    int64_t bytes, int flags)
{
    MemState *s = mem_state(bs);
    mem_check(bs, req, offset, bytes);
    mem_check_unit(offset, bytes, s->zero_align, s->max_zero);
    g_assert_cmpint(flags & ~(int)bs->drv->supported_zero_flags, ==, 0);
    g_assert_cmpint(req->range.state, ==, QB_RANGE_GRANTED);
    if (!s->zeroes || (s->zero_align && bytes % (int64_t)s->zero_align)) {
        return -ENOTSUP;
    }
    s->n_zeroes++;
    int ret = mem_note_write(s, offset + bytes, flags);
    if (ret == 0) {
        memset(s->data + offset, 0, (size_t)bytes);
    }
    return ret;
}

static inline int mem_pdiscard(BlockDriverState *bs, BdrvRequest *req, int64_t offset,
                               int64_t bytes)
{
    MemState *s = mem_state(bs);
    mem_check(bs, req, offset, bytes);
    mem_check_unit(offset, bytes, s->discard_align, s->max_discard);
    g_assert_cmpint(req->range.state, ==, QB_RANGE_GRANTED);
    if (s->discard_align && bytes % (int64_t)s->discard_align) {
        return -ENOTSUP;
    }
    s->discards++;
    memset(s->data + offset, 0, (size_t)bytes);
    return s->error;
}

static inline int mem_flush(BlockDriverState *bs)
{
    mem_state(bs)->flushes++;
    return mem_state(bs)->error;
}

static inline int mem_run_batch(BlockDriverState *bs, BdrvBatchOp *ops, size_t n)
{
    MemState *s = mem_state(bs);
    s->batches++;
    int first = 0;
    for (size_t i = 0; i < n; i++) {
        BdrvBatchOp *op = &ops[i];
        g_assert_true(op->kind == BDRV_BATCH_READ || op->kind == BDRV_BATCH_WRITE);
        g_assert_cmpint(op->flags & BDRV_REQ_FUA, ==, 0);
        g_assert_cmpint((op->offset | op->bytes) % (int64_t)s->align, ==, 0);
        if (op->kind == BDRV_BATCH_READ) {
            memcpy(op->buf, s->data + op->offset, (size_t)op->bytes);
            op->ret = s->error;
        } else {
            op->ret = mem_note_write(s, op->offset + op->bytes, op->flags);
            memcpy(s->data + op->offset, op->buf, (size_t)op->bytes);
        }
        first = first ? first : op->ret;
    }
    return first;
}

static inline bool mem_truncate(BlockDriverState *bs, int64_t offset, bool exact,
                                PreallocMode prealloc, bool zero_new, GError **errp)
{
    MemState *s = mem_state(bs);
    g_assert_cmpint(offset, <=, s->capacity);
    if (offset < s->length) {
        memset(s->data + offset, 0, (size_t)(s->length - offset));
    }
    s->length = offset;
    return true;
}

static inline void mem_drain_begin(BlockDriverState *bs)
{
    mem_state(bs)->drained++;
}

static inline void mem_drain_end(BlockDriverState *bs)
{
    mem_state(bs)->drained--;
}

#define MEM_DRIVER                                                                                 \
    .instance_size = sizeof(MemState), .open = mem_open, .close = mem_close,                       \
    .refresh_limits = mem_refresh_limits, .preadv = mem_preadv, .pwritev = mem_pwritev,            \
    .pwrite_zeroes = mem_pwrite_zeroes, .pdiscard = mem_pdiscard, .flush = mem_flush,              \
    .getlength = mem_getlength, .truncate = mem_truncate, .drain_begin = mem_drain_begin,          \
    .cut_padding = mem_cut_padding,                                                                \
    .drain_end = mem_drain_end

static const BlockDriver mem_driver = {
    .format_name = "test-mem",
    .protocol_name = "test-mem",
    .supported_zero_flags = BDRV_REQ_MAY_UNMAP | BDRV_REQ_NO_FALLBACK,
    MEM_DRIVER,
};

static const BlockDriver fua_driver = {
    .format_name = "test-fua",
    .protocol_name = "test-fua",
    .supported_write_flags = BDRV_REQ_FUA,
    .supported_zero_flags = BDRV_REQ_FUA | BDRV_REQ_MAY_UNMAP | BDRV_REQ_NO_FALLBACK,
    .run_batch = mem_run_batch,
    MEM_DRIVER,
};

/* --- test-cow --- */

typedef enum CowState { COW_NONE, COW_DATA, COW_ZERO } CowState;

typedef struct CowDriverState {
    uint8_t *data;
    int64_t length;
    int64_t cluster;
    _Atomic(int) *map; /* CowState per cluster */
    _Atomic(unsigned) writes, lookups;
} CowDriverState;

static inline bool cow_open(BlockDriverState *bs, json_t *options, int flags, GError **errp)
{
    CowDriverState *s = bs->opaque;
    uint64_t size, cluster;
    if (!qb_opt_take_size(options, "size", 65536, &size, errp)
        || !qb_opt_take_size(options, "cluster", 4096, &cluster, errp)) {
        return false;
    }
    s->length = (int64_t)size;
    s->cluster = (int64_t)cluster;
    s->data = g_malloc0((size_t)qb_align_up(size, cluster));
    s->map = g_new0(_Atomic(int), size / cluster + 1);
    return true;
}

static inline void cow_close(BlockDriverState *bs)
{
    CowDriverState *s = bs->opaque;
    g_free(s->data);
    g_free((void *)s->map);
}

static inline void cow_refresh_limits(BlockDriverState *bs)
{
    const CowDriverState *s = bs->opaque;
    bs->bl.pwrite_zeroes_alignment = (uint32_t)s->cluster;
    bs->bl.pdiscard_alignment = (uint32_t)s->cluster;
}

static inline int64_t cow_getlength(BlockDriverState *bs)
{
    return ((CowDriverState *)bs->opaque)->length;
}

static inline bool cow_get_info(BlockDriverState *bs, BlockDriverInfo *info, GError **errp)
{
    const CowDriverState *s = bs->opaque;
    info->cluster_size = info->subcluster_size = (uint32_t)s->cluster;
    return true;
}

/* The part of [offset, offset + bytes) in the first cluster. */
static inline int64_t cow_part(const CowDriverState *s, int64_t offset, int64_t bytes)
{
    return MIN(bytes, s->cluster - offset % s->cluster);
}

static inline int cow_preadv(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                             IoVector *qiov, size_t qiov_offset, int flags)
{
    CowDriverState *s = bs->opaque;
    int ret = 0;
    while (bytes > 0 && ret == 0) {
        int64_t n = cow_part(s, offset, bytes);
        switch (atomic_load(&s->map[offset / s->cluster])) {
        case COW_DATA:
            iov_vector_from_buf(qiov, qiov_offset, s->data + offset, (size_t)n);
            break;
        case COW_NONE:
            if (bs->backing) {
                ret = bdrv_preadv_part(bs->backing, offset, n, qiov, qiov_offset, 0);
                break;
            }
            /* fall through */
        default:
            iov_vector_memset(qiov, qiov_offset, 0, (size_t)n);
        }
        offset += n;
        qiov_offset += (size_t)n;
        bytes -= n;
    }
    return ret;
}

/* Fills the cluster of @offset with what it showed so far. */
static inline int cow_fill(BlockDriverState *bs, int64_t offset)
{
    CowDriverState *s = bs->opaque;
    int64_t start = offset - offset % s->cluster;
    int was = atomic_load(&s->map[start / s->cluster]);
    if (was == COW_DATA) {
        return 0;
    }
    if (was == COW_ZERO || !bs->backing) {
        memset(s->data + start, 0, (size_t)s->cluster);
        return 0;
    }
    return bdrv_pread(bs->backing, start, s->cluster, s->data + start, 0);
}

static inline bool cow_is_allocated(const CowDriverState *s, int64_t offset, int64_t bytes)
{
    for (int64_t c = offset / s->cluster; c <= (offset + bytes - 1) / s->cluster; c++) {
        if (atomic_load(&s->map[c]) != COW_DATA) {
            return false;
        }
    }
    return true;
}

static inline int cow_pwritev(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                              IoVector *qiov, size_t qiov_offset, int flags)
{
    CowDriverState *s = bs->opaque;
    if (!cow_is_allocated(s, offset, bytes)) {
        int64_t start = offset - offset % s->cluster;
        int64_t end = (int64_t)qb_align_up((uint64_t)(offset + bytes), (uint64_t)s->cluster);
        bdrv_request_serialise(req, start, end - start);
    }
    s->writes++;
    while (bytes > 0) {
        int64_t n = cow_part(s, offset, bytes);
        int ret = cow_fill(bs, offset);
        if (ret < 0) {
            return ret;
        }
        iov_vector_to_buf(qiov, qiov_offset, s->data + offset, (size_t)n);
        atomic_store(&s->map[offset / s->cluster], COW_DATA);
        offset += n;
        qiov_offset += (size_t)n;
        bytes -= n;
    }
    return 0;
}

static inline int cow_pwrite_zeroes(BlockDriverState *bs, BdrvRequest *req, int64_t offset,
                                    int64_t bytes, int flags)
{
    CowDriverState *s = bs->opaque;
    if ((offset | bytes) % s->cluster) {
        return -ENOTSUP;
    }
    for (int64_t c = offset / s->cluster; c < (offset + bytes) / s->cluster; c++) {
        atomic_store(&s->map[c], COW_ZERO);
    }
    return 0;
}

static inline int cow_block_status(BlockDriverState *bs, int64_t offset, int64_t bytes,
                                   BdrvStatus *ret)
{
    static const int flags[] = {
        [COW_NONE] = 0,
        [COW_DATA] = BDRV_BLOCK_ALLOCATED | BDRV_BLOCK_DATA,
        [COW_ZERO] = BDRV_BLOCK_ALLOCATED | BDRV_BLOCK_ZERO,
    };
    CowDriverState *s = bs->opaque;
    s->lookups++;
    *ret = (BdrvStatus){
        .flags = flags[atomic_load(&s->map[offset / s->cluster])],
        .bytes = cow_part(s, offset, bytes),
    };
    return 0;
}

static const BlockDriver cow_driver = {
    .format_name = "test-cow",
    .instance_size = sizeof(CowDriverState),
    .is_format = true,
    .supports_backing = true,
    .open = cow_open,
    .close = cow_close,
    .refresh_limits = cow_refresh_limits,
    .getlength = cow_getlength,
    .get_info = cow_get_info,
    .preadv = cow_preadv,
    .pwritev = cow_pwritev,
    .pwrite_zeroes = cow_pwrite_zeroes,
    .block_status = cow_block_status,
};

/* --- helpers --- */

static inline void mem_drivers_register(void)
{
    bdrv_init();
    bdrv_register(&mem_driver);
    bdrv_register(&fua_driver);
    bdrv_register(&cow_driver);
}

/* @opts: "driver=test-mem,size=...,...". The node's only reference is the caller's. */
static inline BlockDriverState *open_node(const char *opts, int flags)
{
    GError *err = NULL;
    json_t *options = qb_opts_parse(opts, NULL, &err);
    g_assert_no_error(err);
    BlockDriverState *bs = bdrv_open(NULL, options, flags, &err);
    g_assert_no_error(err);
    return bs;
}

/* A writable tree, with a user at its root. */
static inline BlockBackend *open_blk(const char *opts)
{
    GError *err = NULL;
    BlockDriverState *bs = open_node(opts, BDRV_O_RDWR | BDRV_O_RESIZE);
    BlockBackend *blk = blk_new_with_bs(bs, BLK_PERM_ALL, BLK_PERM_ALL, &err);
    g_assert_no_error(err);
    bdrv_unref(bs);
    return blk;
}

/* The node at the end of the files. */
static inline BlockDriverState *bottom(BlockBackend *blk)
{
    BlockDriverState *bs = blk_bs(blk);
    while (bs->file) {
        bs = bs->file->bs;
    }
    return bs;
}

#endif
