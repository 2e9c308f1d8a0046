/*
 * Dirty bitmaps as the core and drivers see them; what users see is in dirty-bitmap.h.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_DIRTY_BITMAP_INT_H
#define BLOCK_DIRTY_BITMAP_INT_H

#include "block/dirty-bitmap.h"
#include "block/dirty-bits.h"
#include "util/thread.h"

typedef struct BdrvDirtyBitmap BdrvDirtyBitmap;

/* Lives in its node's list from bdrv_dirty_bitmap_new() to bdrv_dirty_bitmap_free(). */
struct BdrvDirtyBitmap {
    BlockDriverState *bs;
    char *name;          /* owned */
    BdrvDirtyBits *bits; /* owned; NULL when inconsistent */
    unsigned granularity_bits;
    bool persistent;
    bool inconsistent;
    void *opaque;        /* the driver's, of a persistent one */
    _Atomic(bool) disabled; /* changed with the node drained */
    _Atomic(bool) in_use;   /* persistent: what is stored says IN_USE, stably */
    _Atomic(bool) lost;     /* a bit could not be set: not to be stored, nor used */
    _Atomic(unsigned) busy; /* users that want it left alone */
};

/* A node's bitmaps; part of BlockDriverState. The list changes while the node is drained or not in
 * use; who is inside a request may read it, all others take the lock. */
typedef struct BdrvDirtyList {
    GPtrArray *all; /* BdrvDirtyBitmap*, borrowed from themselves */
    QbMutex lock;
    _Atomic(bool) watched; /* some of them want to hear of writes */
} BdrvDirtyList;

void bdrv_dirty_list_init(BdrvDirtyList *list);
void bdrv_dirty_list_destroy(BdrvDirtyList *list); /* frees the bitmaps that are left */

typedef struct BdrvDirtyParams {
    const char *name;
    uint64_t size;            /* of the disk */
    unsigned granularity_bits;
    bool persistent, disabled, inconsistent, in_use;
    const BdrvDirtySource *source; /* NULL: all clear; not with inconsistent */
    void *opaque;
} BdrvDirtyParams;
/* At the end of the list. Node drained or not in use. */
BdrvDirtyBitmap *bdrv_dirty_bitmap_new(BlockDriverState *bs, const BdrvDirtyParams *params);
void bdrv_dirty_bitmap_free(BdrvDirtyBitmap *bm); /* same; NULL is fine */
/* To be called when in_use, disabled or the list has changed. */
void bdrv_dirty_update_watch(BlockDriverState *bs);
/* By name, or NULL. Node drained, not in use, or inside a request. */
BdrvDirtyBitmap *bdrv_find_dirty_bitmap(BlockDriverState *bs, const char *name);

/* Of which bitmaps a driver makes IN_USE stable; those that have it already cost nothing. */
typedef enum BdrvBitmapsWhich {
    BDRV_BITMAPS_WRITTEN, /* guest writes would make them wrong: the enabled ones, known or not */
    BDRV_BITMAPS_ALL,     /* a change of size would */
    BDRV_BITMAPS_ONE,
} BdrvBitmapsWhich;

/* --- requests: the graph lock is held shared --- */
/* Before guest content of the range changes. 0 or -errno. */
int bdrv_dirty_before(BlockDriverState *bs, int64_t offset, int64_t bytes);
/* After it may have changed. */
void bdrv_dirty_after(BlockDriverState *bs, int64_t offset, int64_t bytes);
/* Would before() and after() neither wait nor do I/O? */
bool bdrv_dirty_lane_is_open(BlockDriverState *bs, int64_t offset, int64_t bytes);
/* False and an error while somebody uses the bitmap. */
bool bdrv_dirty_check_idle(const BdrvDirtyBitmap *bm, GError **errp);
/* Around a change of the node's size; the range from the smaller size on is taken. False: a bitmap is
 * busy, or cannot be kept for @size. */
bool bdrv_dirty_before_resize(BlockDriverState *bs, int64_t size, GError **errp);
void bdrv_dirty_after_resize(BlockDriverState *bs, int64_t size);
bool bdrv_has_dirty_bitmaps(BlockDriverState *bs);
/* bdrv_store_bitmaps() for a node that nobody uses any more; failures become warnings. */
void bdrv_store_bitmaps_at_close(BlockDriverState *bs);

#endif
