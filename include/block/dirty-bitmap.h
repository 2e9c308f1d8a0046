/*
 * Dirty bitmaps: which parts of a node were written since a moment that somebody chose.
 *
 *   guest write --> before: IN_USE stable, if a clear bit of an enabled persistent bitmap is to be set
 *               --> driver
 *               --> after:  bits set, also when the write failed
 *
 * A bitmap belongs to a node and has a name there.  Each bit stands for "granularity" bytes.
 *
 *   enabled       guest writes set bits; a disabled one stays as it is
 *   persistent    stored in the image by the node's driver
 *   inconsistent  stored, but not to be trusted (or not understood): can only be removed
 *   busy          some job or export uses it: nobody else may change it
 *
 * Invariant 7 (docs/devel/invariants.md): a bitmap that is listed in an image without IN_USE is, as
 * stored, safe to trust.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_DIRTY_BITMAP_H
#define BLOCK_DIRTY_BITMAP_H

#include "block/block.h"

#pragma GCC visibility push(default) /* public: exported by libqblock */

typedef struct BdrvDirtyBitmap BdrvDirtyBitmap;

#define BDRV_BITMAP_NAME_MAX 1023
#define BDRV_BITMAP_MIN_GRANULARITY_BITS 9
#define BDRV_BITMAP_MAX_GRANULARITY_BITS 31

/*
 * Operations by name, each complete when it returns; failing ones change nothing.  They drain the node
 * and take it as a whole: not inside a request, not under the graph lock.  What they change of a
 * persistent bitmap's content is stored by bdrv_store_bitmaps(), reopening read-only, or close.
 */

/* @granularity: bytes, a power of two of at least 512; 0: the node's default. */
bool bdrv_bitmap_add(BlockDriverState *bs, const char *name, uint32_t granularity, bool persistent,
                     bool disabled, GError **errp);
/* Also inconsistent ones. */
bool bdrv_bitmap_remove(BlockDriverState *bs, const char *name, GError **errp);
/* All of them, also those in an image whose list of bitmaps cannot be read. */
bool bdrv_bitmap_remove_all(BlockDriverState *bs, GError **errp);
bool bdrv_bitmap_clear(BlockDriverState *bs, const char *name, GError **errp);
bool bdrv_bitmap_enable(BlockDriverState *bs, const char *name, GError **errp);
bool bdrv_bitmap_disable(BlockDriverState *bs, const char *name, GError **errp);
/* Adds what is dirty in bitmap @source of @source_bs (which may be @bs); both are as long as one
 * another, granularities may differ. */
bool bdrv_bitmap_merge(BlockDriverState *bs, const char *name, BlockDriverState *source_bs,
                       const char *source, GError **errp);

typedef struct BdrvBitmapInfo {
    char *name; /* owned */
    uint32_t granularity;
    bool persistent, enabled, inconsistent;
} BdrvBitmapInfo;
/* GArray of BdrvBitmapInfo that clears what it holds, in the order in which they were added. */
GArray *bdrv_bitmap_list(BlockDriverState *bs);
/* Can the node's driver store bitmaps at all? */
bool bdrv_can_store_bitmaps(BlockDriverState *bs);

/* Stores what changed in persistent bitmaps, with a flush of the node if there is something to store:
 * who is about to flush and close stores first. The next change of one begins a new session. Failing
 * to store one does not keep the others from being stored. */
bool bdrv_store_bitmaps(BlockDriverState *bs, GError **errp);

/*
 * The next dirty extent of bitmap @name at or behind @offset: 1 with *ret_offset and *ret_bytes, 0
 * when there is none, -errno. Any thread; the bitmap must not be removed meanwhile.
 */
int bdrv_bitmap_next_dirty(BlockDriverState *bs, const char *name, int64_t offset,
                           int64_t *ret_offset, int64_t *ret_bytes);

#pragma GCC visibility pop

/* ======================= for the core and for drivers ======================= */

#include "block/dirty-bits.h"
#include "util/thread.h"

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
/* Around a change of the node's size; the range from the smaller size on is taken. */
bool bdrv_dirty_before_resize(BlockDriverState *bs, GError **errp);
void bdrv_dirty_after_resize(BlockDriverState *bs, int64_t size);
bool bdrv_has_dirty_bitmaps(BlockDriverState *bs);
/* bdrv_store_bitmaps() for a node that nobody uses any more; failures become warnings. */
void bdrv_store_bitmaps_at_close(BlockDriverState *bs);

#endif
