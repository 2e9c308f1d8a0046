/*
 * Requests on a node as a whole: flush, truncate, VM state.
 *
 * Flush goes down the node's own file only.  A driver that has a flush callback decides itself when
 * to flush what is below it, since that is what its metadata are ordered by; all others have
 * nothing of their own to make stable.  A protocol node with cache.no-flush counts every flush as
 * done.
 *
 * Truncate takes the range from the smaller of both lengths to infinity.  The old length is read
 * before the range is granted and compared afterwards; when another truncate was faster it starts
 * again.
 *
 * Invariants
 *  1. When truncate calls the driver no write at or beyond the smaller length is running, and none
 *     begins before it is done.
 *  2. Growth never lets a longer backing file show through: then the new part is made to read as
 *     zeroes.
 *  3. The cached length is asked for again after every truncate, also after one that failed
 *     halfway.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/io-int.h"

/* --- flush --- */

static int flush_node(BlockDriverState *bs)
{
    if (!bs->file && bs->cache_no_flush) {
        return 0;
    }
    bdrv_debug_event(bs->file, "flush_to_os");
    bdrv_debug_event(bs->file, "flush_to_disk");
    if (bs->drv->flush) {
        return bs->drv->flush(bs);
    }
    return bs->file ? bdrv_flush(bs->file->bs) : 0;
}

int bdrv_flush(BlockDriverState *bs)
{
    BDRV_GRAPH_GUARD();
    if (bs->read_only) {
        return 0; /* nothing was written; who makes a node read-only flushes it first */
    }
    BdrvRequest req;
    bdrv_request_begin(&req, bs, BDRV_TRACKED_READ, 0, 0);
    int ret = flush_node(bs);
    assert(ret <= 0);
    bdrv_request_end(&req);
    return ret;
}

/* --- truncate --- */

typedef struct Truncation {
    const BdrvResize *how;
    int64_t old_length, length;
} Truncation;

/* Enters @req so that the length cannot change under it; fills in what the length was. */
static bool begin_truncate(BlockDriverState *bs, BdrvRequest *req, Truncation *tr, GError **errp)
{
    for (;;) {
        int64_t length = bdrv_getlength(bs);
        if (length < 0) {
            qb_error_set_errno(errp, (int)length, "Failed to get old image size");
            return false;
        }
        int64_t start = MIN(length, tr->length);
        bdrv_request_begin(req, bs, BDRV_TRACKED_TRUNCATE, start, INT64_MAX - start);
        bdrv_request_enter_serialising(req, true);
        if (bdrv_getlength(bs) == length) {
            tr->old_length = length;
            return true;
        }
        bdrv_request_end(req);
    }
}

/* True when the grown part would show content of the backing file if it were left alone. */
static bool backing_shows_through(BlockDriverState *bs, const Truncation *tr)
{
    BlockDriverState *below = bdrv_backing_chain_next(bs);
    return below && tr->length > tr->old_length && bdrv_getlength(below) > tr->old_length;
}

static bool call_truncate(BlockDriverState *bs, const Truncation *tr, GError **errp)
{
    BdrvResize how = *tr->how;
    how.zero_new |= backing_shows_through(bs, tr);
    if (tr->length != tr->old_length && !bdrv_dirty_before_resize(bs, tr->length, errp)) {
        return false;
    }
    if (bs->drv->truncate) {
        return bs->drv->truncate(bs, how.length, how.exact, how.prealloc, how.zero_new, errp);
    }
    if (bs->drv->is_filter && bs->file) {
        return bdrv_resize(bs->file, &how, errp);
    }
    qb_error_set(errp, ENOTSUP, "Image format driver does not support resize");
    return false;
}

static void refresh_length(BlockDriverState *bs, int64_t otherwise)
{
    int64_t length = otherwise;
    if (bs->drv->getlength) {
        length = bs->drv->getlength(bs);
    } else if (bs->file && bs->drv->is_filter) {
        length = bdrv_getlength(bs->file->bs);
    }
    if (length >= 0) {
        bdrv_set_length(bs, length);
    }
}

bool bdrv_resize(BdrvChild *child, const BdrvResize *how, GError **errp)
{
    BDRV_GRAPH_GUARD();
    BlockDriverState *bs = child->bs;
    Truncation tr = {.how = how, .length = how->length};
    BdrvRequest req;
    if (how->length < 0) {
        qb_error_set(errp, EINVAL, "Image size cannot be negative");
        return false;
    }
    if (bs->read_only) {
        qb_error_set(errp, EACCES, "Image is read-only");
        return false;
    }
    if (!begin_truncate(bs, &req, &tr, errp)) {
        return false;
    }
    bs->resize_progress = how->progress;
    bs->truncation = &req;
    bool ok = call_truncate(bs, &tr, errp);
    bs->truncation = NULL;
    bs->resize_progress = NULL;
    refresh_length(bs, ok ? tr.length : tr.old_length);
    int64_t length = bdrv_getlength(bs);
    if (length >= 0 && length != tr.old_length) {
        bdrv_dirty_after_resize(bs, length);
    }
    bdrv_request_end(&req);
    return ok;
}

bool bdrv_truncate(BdrvChild *child, int64_t offset, bool exact, PreallocMode prealloc,
                   bool zero_new, GError **errp)
{
    const BdrvResize how = {
        .length = offset, .exact = exact, .prealloc = prealloc, .zero_new = zero_new,
    };
    return bdrv_resize(child, &how, errp);
}

/* --- VM state --- */

int bdrv_save_vmstate(BlockDriverState *bs, IoVector *qiov, int64_t pos)
{
    BDRV_GRAPH_GUARD();
    if (bs->read_only) {
        return -EPERM;
    }
    if (!bs->drv->save_vmstate) {
        return bs->file ? bdrv_save_vmstate(bs->file->bs, qiov, pos) : -ENOTSUP;
    }
    BdrvRequest req;
    bdrv_request_begin_whole(bs, &req);
    int ret = bs->drv->save_vmstate(bs, qiov, pos);
    bdrv_request_end_whole(&req);
    return ret;
}

int bdrv_load_vmstate(BlockDriverState *bs, IoVector *qiov, int64_t pos)
{
    BDRV_GRAPH_GUARD();
    if (!bs->drv->load_vmstate) {
        return bs->file ? bdrv_load_vmstate(bs->file->bs, qiov, pos) : -ENOTSUP;
    }
    BdrvRequest req;
    bdrv_request_begin(&req, bs, BDRV_TRACKED_READ, 0, 0);
    int ret = bs->drv->load_vmstate(bs, qiov, pos);
    bdrv_request_end(&req);
    return ret;
}
