/*
 * Dirty bitmaps: which parts of a node were written since a moment that somebody chose.
 *
 *   guest write --> before: IN_USE stable, if it sets a clear bit of an enabled persistent bitmap
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

#define BDRV_BITMAP_NAME_MAX 1023
#define BDRV_BITMAP_MIN_GRANULARITY_BITS 9
#define BDRV_BITMAP_MAX_GRANULARITY_BITS 31

/*
 * Operations by name, each complete when it returns; failing ones change nothing.  They drain the
 * node and take it as a whole: not inside a request, not under the graph lock.  What they change of
 * a persistent bitmap's content is stored by bdrv_store_bitmaps(), reopening read-only, or close.
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

/* Stores what changed in persistent bitmaps, with a flush of the node if there is something to
 * store: who is about to flush and close stores first. The next change of one begins a new session.
 * Failing to store one does not keep the others from being stored. */
bool bdrv_store_bitmaps(BlockDriverState *bs, GError **errp);

/*
 * The next dirty extent of bitmap @name at or behind @offset: 1 with *ret_offset and *ret_bytes, 0
 * when there is none, -errno. Any thread; the bitmap must not be removed meanwhile.
 */
int bdrv_bitmap_next_dirty(BlockDriverState *bs, const char *name, int64_t offset,
                           int64_t *ret_offset, int64_t *ret_bytes);

#pragma GCC visibility pop

#endif
