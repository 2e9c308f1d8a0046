/*
 * Lazy refcounts: an image whose session did not end says so.
 *
 *     first allocation --> dirty bit, stable --> ... --> settle: all stable --> dirty bit off
 *                                              (close, going read-only, operations on the image)
 *
 * Whoever finds the bit set repairs the image before writing to it, as with the images of others
 * that carry this option.  Here counts are written in order all the same, so there is little to
 * repair; what the bit buys is that clusters which a crash leaked come back at the next writable
 * open.
 *
 * Invariants
 *  1. s->lazy_dirty: the bit is set, and set by this room.  One that an operation set and left
 *     behind because it needs a repair is not taken away here; so operations that use the bit
 *     settle first.
 *  2. Only what is stable makes the bit go; when a flush fails it stays.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2.h"

bool qcow2_dirty_bit(BDRVQcow2State *s)
{
    QB_GUARD(&s->header_lock);
    return s->header.incompatible & QCOW2_INCOMPAT_DIRTY;
}

int qcow2_lazy_begin(BlockDriverState *bs)
{
    BDRVQcow2State *s = qcow2_state(bs);
    if (!s->lazy_refcounts || atomic_load(&s->lazy_dirty) || qcow2_dirty_bit(s)) {
        return 0; /* a bit that somebody is just writing was waited for: header_lock */
    }
    int ret = qcow2_set_incompatible(bs, QCOW2_INCOMPAT_DIRTY, 0);
    if (ret == 0) {
        atomic_store(&s->lazy_dirty, true);
    }
    return ret;
}

int qcow2_lazy_settle(BlockDriverState *bs)
{
    BDRVQcow2State *s = qcow2_state(bs);
    if (!atomic_load(&s->lazy_dirty)) {
        return 0;
    }
    int ret = qcow2_flush_all(bs);
    ret = ret < 0 ? ret : qcow2_set_incompatible(bs, 0, QCOW2_INCOMPAT_DIRTY);
    if (ret == 0) {
        atomic_store(&s->lazy_dirty, false);
    }
    return ret;
}
