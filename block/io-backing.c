/*
 * What shows where an image has nothing: the backing file, and zeroes behind it.
 *
 *      disk of the image    |- - - - - - nothing allocated - - - - - -|
 *      backing file         |=========================|
 *      a read of it         |      backing file       |     zeroes    |
 *                                                     ^ shown end
 *
 * The questions that format drivers with a backing file ask, each of which must get the same answer
 * in all of them: how far does it reach, what is there, is it zero.
 *
 * Invariants
 *  1. The backing file shows up to the end of the shorter of both disks.  What lies beyond the end
 *     of the image (VM state) never shows it.
 *  2. A backing file that is not open, because another one is attached or none, or because it comes
 *     later, may be of any length.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/io-int.h"

int64_t bdrv_backing_bytes(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    if (!bs->backing) {
        return 0;
    }
    int64_t below = bdrv_getlength(bs->backing->bs);
    int64_t here = bdrv_getlength(bs);
    int64_t end = MIN(below, here);
    if (end < 0) {
        return end;
    }
    return offset < end ? MIN(bytes, end - offset) : 0;
}

int bdrv_backing_read(BlockDriverState *bs, int64_t offset, int64_t bytes, IoVector *qiov,
                      size_t qiov_offset)
{
    int64_t shown = bdrv_backing_bytes(bs, offset, bytes);
    int ret = (int)MIN(shown, 0);
    if (shown > 0) {
        bdrv_debug_event(bs->file, "read_backing_aio");
        ret = bdrv_preadv_part(bs->backing, offset, shown, qiov, qiov_offset, 0);
    }
    if (ret == 0) {
        iov_vector_memset(qiov, qiov_offset + (size_t)shown, 0, (size_t)(bytes - shown));
    }
    return ret;
}

int bdrv_backing_reads_zero(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    int64_t shown = bdrv_backing_bytes(bs, offset, bytes);
    if (shown <= 0) {
        return shown < 0 ? (int)shown : 1;
    }
    return bdrv_is_zero_fast(bs->backing->bs, offset, shown);
}

static bool gets_other_backing(BlockDriverState *bs)
{
    return bs->has_backing_override || (bs->open_flags & BDRV_O_BACKING_LATER);
}

bool bdrv_may_be_backed(BlockDriverState *bs)
{
    return bs->backing || *bdrv_backing_name(bs) || (bs->open_flags & BDRV_O_BACKING_LATER);
}

int64_t bdrv_backing_end(BlockDriverState *bs)
{
    if (bs->backing && !gets_other_backing(bs)) {
        return bdrv_getlength(bs->backing->bs);
    }
    return bdrv_may_be_backed(bs) ? INT64_MAX : 0;
}

int64_t bdrv_backing_end_in_growth(BlockDriverState *bs, int64_t old_length, int64_t new_length)
{
    int64_t end = bdrv_backing_end(bs);
    return end < 0 ? end : MAX(MIN(end, new_length), old_length);
}
