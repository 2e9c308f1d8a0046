/*
 * Dirty bitmaps of a node: the list, and what requests do with it.
 *
 *     bs->dirty.all  [ b0 enabled, persistent | b1 disabled | b2 inconsistent ]
 *
 *     write, zero, discard  --before()-->  does a bitmap that is stored become wrong by this?
 *                                          then its IN_USE must be stable first (invariant 7)
 *                           <--after()---  bits set
 *
 * The driver makes IN_USE stable for all bitmaps that guest writes change at once, so a session
 * pays one barrier, in the first write that finds a clear bit.  Later writes cost a look at the
 * bits.
 *
 * Invariants
 *  1. The list and the enabled state change only while no request is inside the node, or is taken
 *     by one operation as a whole.  So requests read both without a lock.
 *  2. Bits are set after the write, before the request ends: who waits for the requests of a node
 *     (a drain) sees the bits of all of them.
 *  3. A bit that cannot be set (no memory, the stored bits cannot be read) makes the bitmap lost:
 *     it keeps its IN_USE, and nobody uses it any more.  The write goes on.
 *
 * Not done: a bitmap of a node that grows by writes does not grow with it; who writes there with a
 * bitmap in place truncates first.
 *
 * SPDX-License-Identifier: MIT
 */
#include <string.h>
#include "block/core-int.h"

/* ---------------------------------------------------------------- the list */

void bdrv_dirty_list_init(BdrvDirtyList *list)
{
    list->all = g_ptr_array_new();
    qb_mutex_init(&list->lock);
}

void bdrv_dirty_list_destroy(BdrvDirtyList *list)
{
    while (list->all->len) {
        bdrv_dirty_bitmap_free(g_ptr_array_index(list->all, list->all->len - 1));
    }
    g_ptr_array_unref(list->all);
    qb_mutex_destroy(&list->lock);
}

static BdrvDirtyBitmap *at(const BlockDriverState *bs, guint i)
{
    return g_ptr_array_index(bs->dirty.all, i);
}

/* Guest writes change it, or make it wrong where it cannot be kept. */
static bool wants_writes(const BdrvDirtyBitmap *bm)
{
    return !atomic_load(&bm->disabled) && !(bm->inconsistent && atomic_load(&bm->in_use));
}

void bdrv_dirty_update_watch(BlockDriverState *bs)
{
    bool watched = false;
    for (guint i = 0; i < bs->dirty.all->len && !watched; i++) {
        watched = wants_writes(at(bs, i));
    }
    atomic_store(&bs->dirty.watched, watched);
}

BdrvDirtyBitmap *bdrv_dirty_bitmap_new(BlockDriverState *bs, const BdrvDirtyParams *params)
{
    BdrvDirtyBitmap *bm = g_new0(BdrvDirtyBitmap, 1);
    bm->bs = bs;
    bm->name = g_strdup(params->name);
    bm->persistent = params->persistent;
    bm->inconsistent = params->inconsistent;
    bm->opaque = params->opaque;
    atomic_init(&bm->disabled, params->disabled);
    atomic_init(&bm->in_use, params->in_use);
    bm->granularity_bits = params->granularity_bits;
    if (!params->inconsistent) {
        bm->bits = bdrv_dirty_bits_new(params->size, params->granularity_bits, params->source);
    }
    QB_GUARD(&bs->dirty.lock);
    g_ptr_array_add(bs->dirty.all, bm);
    if (wants_writes(bm)) {
        atomic_store(&bs->dirty.watched, true);
    }
    return bm;
}

/* An image may have 65535 of them, which go one after the other: the last is looked for first. */
static void unlist(BdrvDirtyBitmap *bm)
{
    GPtrArray *all = bm->bs->dirty.all;
    guint i = all->len;
    QB_GUARD(&bm->bs->dirty.lock);
    while (i > 0 && g_ptr_array_index(all, i - 1) != bm) {
        i--;
    }
    assert(i > 0);
    g_ptr_array_remove_index(all, i - 1);
    if (wants_writes(bm)) {
        bdrv_dirty_update_watch(bm->bs);
    }
}

void bdrv_dirty_bitmap_free(BdrvDirtyBitmap *bm)
{
    if (bm) {
        unlist(bm);
        bdrv_dirty_bits_free(bm->bits);
        g_free(bm->name);
        g_free(bm);
    }
}

BdrvDirtyBitmap *bdrv_find_dirty_bitmap(BlockDriverState *bs, const char *name)
{
    for (guint i = 0; i < bs->dirty.all->len; i++) {
        if (!strcmp(at(bs, i)->name, name)) {
            return at(bs, i);
        }
    }
    return NULL;
}

bool bdrv_has_dirty_bitmaps(BlockDriverState *bs)
{
    QB_GUARD(&bs->dirty.lock);
    return bs->dirty.all->len > 0;
}

/* ---------------------------------------------------------------- requests */

/* Its stored form would be wrong after a write to the range, and does not say so. */
static bool needs_in_use(BdrvDirtyBitmap *bm, uint64_t offset, uint64_t bytes)
{
    if (!bm->persistent || atomic_load(&bm->in_use) || atomic_load(&bm->disabled)) {
        return false;
    }
    return bm->inconsistent || bdrv_dirty_bits_covers(bm->bits, offset, bytes) != 1;
}

int bdrv_dirty_before(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    if (!atomic_load(&bs->dirty.watched)) {
        return 0;
    }
    for (guint i = 0; i < bs->dirty.all->len; i++) {
        if (needs_in_use(at(bs, i), (uint64_t)offset, (uint64_t)bytes)) {
            return bs->drv->bitmaps_mark_in_use(bs, BDRV_BITMAPS_WRITTEN, NULL);
        }
    }
    return 0;
}

void bdrv_dirty_after(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    if (!atomic_load(&bs->dirty.watched)) {
        return;
    }
    for (guint i = 0; i < bs->dirty.all->len; i++) {
        BdrvDirtyBitmap *bm = at(bs, i);
        if (!bm->inconsistent && !atomic_load(&bm->disabled) &&
            bdrv_dirty_bits_set(bm->bits, (uint64_t)offset, (uint64_t)bytes) < 0) {
            atomic_store(&bm->lost, true);
        }
    }
}

static bool lane_is_open(BdrvDirtyBitmap *bm, uint64_t offset, uint64_t bytes)
{
    bool covered;
    if (!wants_writes(bm)) {
        return true;
    }
    if (bm->inconsistent || !bdrv_dirty_bits_at_hand(bm->bits, offset, bytes, &covered)) {
        return false;
    }
    return covered || !bm->persistent || atomic_load(&bm->in_use);
}

bool bdrv_dirty_lane_is_open(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    bool open = true;
    for (guint i = 0; atomic_load(&bs->dirty.watched) && open && i < bs->dirty.all->len; i++) {
        open = lane_is_open(at(bs, i), (uint64_t)offset, (uint64_t)bytes);
    }
    return open;
}

/* ---------------------------------------------------------------- size */

bool bdrv_dirty_check_idle(const BdrvDirtyBitmap *bm, GError **errp)
{
    if (atomic_load(&bm->busy)) {
        qb_error_set(errp, EBUSY, "Bitmap '%s' is currently in use by another operation and cannot"
                     " be used", bm->name);
        return false;
    }
    return true;
}

static bool all_idle(BlockDriverState *bs, GError **errp)
{
    for (guint i = 0; i < bs->dirty.all->len; i++) {
        if (!bdrv_dirty_check_idle(at(bs, i), errp)) {
            return false;
        }
    }
    return true;
}

static bool can_keep_all(BlockDriverState *bs, int64_t size, GError **errp)
{
    return !bs->drv->bitmaps_check_size || bs->drv->bitmaps_check_size(bs, (uint64_t)size, errp);
}

bool bdrv_dirty_before_resize(BlockDriverState *bs, int64_t size, GError **errp)
{
    if (!all_idle(bs, errp) || !can_keep_all(bs, size, errp)) {
        return false;
    }
    for (guint i = 0; i < bs->dirty.all->len; i++) {
        if (at(bs, i)->persistent && !atomic_load(&at(bs, i)->in_use)) {
            int ret = bs->drv->bitmaps_mark_in_use(bs, BDRV_BITMAPS_ALL, NULL);
            if (ret < 0) {
                qb_error_set_errno(errp, ret, "Could not mark the bitmaps of the image as in use");
            }
            return ret == 0;
        }
    }
    return true;
}

void bdrv_dirty_after_resize(BlockDriverState *bs, int64_t size)
{
    for (guint i = 0; i < bs->dirty.all->len; i++) {
        BdrvDirtyBitmap *bm = at(bs, i);
        if (!bm->inconsistent && bdrv_dirty_bits_truncate(bm->bits, (uint64_t)size) < 0) {
            atomic_store(&bm->lost, true);
        }
    }
}

/* ---------------------------------------------------------------- close */

void bdrv_store_bitmaps_at_close(BlockDriverState *bs)
{
    BDRV_GRAPH_GUARD();
    g_autoptr(GError) err = NULL;
    if (!bs->read_only && bs->drv->bitmaps_store && !bs->drv->bitmaps_store(bs, &err)) {
        bdrv_warn("Lost persistent bitmaps during inactivation of node '%s': %s", bs->node_name,
                  err->message);
    }
}
