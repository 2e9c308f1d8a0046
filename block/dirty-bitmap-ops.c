/*
 * Operations on dirty bitmaps by name: add, remove, clear, enable, disable, merge, list, store.
 *
 *     hold the node --> find and judge the bitmap --> IN_USE stable, if it is stored --> change it
 *
 * Adding and removing change the image at once; a new bitmap is listed as valid and empty.  What
 * changes the content of a persistent bitmap waits in memory for bdrv_store_bitmaps(), with IN_USE
 * stable in the meantime (invariant 7).
 *
 * Invariants
 *  1. No request is inside the node while a bitmap comes, goes, or changes other than by a write.
 *  2. Inconsistent, lost and busy bitmaps are left alone, but that the first two can be removed.
 *  3. The source of a merge from another node is busy meanwhile: not removed, cleared or resized.
 *     Two merges that go both ways at once may refuse each other.
 *
 * Not done: a merge that fails half-way (memory, reading) leaves bits set that it had set by then;
 * that is more than was dirty, never less.
 *
 * SPDX-License-Identifier: MIT
 */
#include <inttypes.h>
#include <string.h>
#include "block/core-int.h"
#include "util/checked.h"

/* ---------------------------------------------------------------- judging */

static bool check_writable(BlockDriverState *bs, const BdrvDirtyBitmap *bm, GError **errp)
{
    if (bm->persistent && bs->read_only) {
        qb_error_set(errp, EACCES, "Bitmap '%s' is readonly and cannot be modified", bm->name);
        return false;
    }
    return true;
}

static bool check_consistent(const BdrvDirtyBitmap *bm, GError **errp)
{
    if (bm->inconsistent || atomic_load(&bm->lost)) {
        qb_error_set(errp, EINVAL, "Bitmap '%s' is inconsistent and cannot be used", bm->name);
        qb_error_add_hint(errp, "Try block-dirty-bitmap-remove to delete this bitmap from disk");
        return false;
    }
    return true;
}

static BdrvDirtyBitmap *find(BlockDriverState *bs, const char *name, GError **errp)
{
    QB_GUARD(&bs->dirty.lock);
    BdrvDirtyBitmap *bm = bdrv_find_dirty_bitmap(bs, name);
    if (!bm) {
        qb_error_set(errp, ENOENT, "Dirty bitmap '%s' not found", name);
    }
    return bm;
}

/* A bitmap whose content may be changed now; its IN_USE is stable if it is stored. */
static BdrvDirtyBitmap *find_to_change(BlockDriverState *bs, const char *name, GError **errp)
{
    BdrvDirtyBitmap *bm = find(bs, name, errp);
    if (!bm || !bdrv_dirty_check_idle(bm, errp) || !check_consistent(bm, errp) ||
        !check_writable(bs, bm, errp)) {
        return NULL;
    }
    if (bm->persistent && !atomic_load(&bm->in_use)) {
        int ret = bs->drv->bitmaps_mark_in_use(bs, BDRV_BITMAPS_ONE, bm);
        if (ret < 0) {
            qb_error_set_errno(errp, ret, "Could not mark bitmap '%s' as in use", name);
            return NULL;
        }
    }
    return bm;
}

/* ---------------------------------------------------------------- add, remove */

static uint32_t default_granularity(BlockDriverState *bs)
{
    BlockDriverInfo info;
    if (!bdrv_get_info(bs, &info, NULL) || !info.cluster_size) {
        return 65536;
    }
    return CLAMP(info.cluster_size, 4096, 65536);
}

static bool check_granularity(uint32_t granularity, GError **errp)
{
    if (!qb_is_power_of_2(granularity) ||
        granularity < 1u << BDRV_BITMAP_MIN_GRANULARITY_BITS) {
        qb_error_set(errp, EINVAL, "Granularity must be power of 2 and at least %u",
                     1u << BDRV_BITMAP_MIN_GRANULARITY_BITS);
        return false;
    }
    return true;
}

static bool check_new_name(BlockDriverState *bs, const char *name, GError **errp)
{
    if (!*name) {
        qb_error_set(errp, EINVAL, "Bitmap name cannot be empty");
        return false;
    }
    if (strlen(name) > BDRV_BITMAP_NAME_MAX) {
        qb_error_set(errp, EINVAL, "Bitmap name too long");
        return false;
    }
    QB_GUARD(&bs->dirty.lock);
    if (bdrv_find_dirty_bitmap(bs, name)) {
        qb_error_set(errp, EEXIST, "Bitmap already exists: %s", name);
        return false;
    }
    return true;
}

static bool add_persistent(BlockDriverState *bs, const BdrvDirtyParams *params, GError **errp)
{
    if (!bs->drv->bitmap_add) {
        qb_error_set(errp, ENOTSUP, "Can't store persistent bitmaps to %s: %s", bs->node_name,
                     g_strerror(ENOTSUP));
        return false;
    }
    if (bs->read_only) {
        qb_error_set(errp, EACCES, "Block node is read-only");
        return false;
    }
    return bs->drv->bitmap_add(bs, params, errp);
}

static bool add(BlockDriverState *bs, const BdrvDirtyParams *params, GError **errp)
{
    if (!check_new_name(bs, params->name, errp)) {
        return false;
    }
    return params->persistent ? add_persistent(bs, params, errp)
                              : bdrv_dirty_bitmap_new(bs, params) != NULL;
}

static bool take_size(BlockDriverState *bs, BdrvDirtyParams *params, GError **errp)
{
    int64_t size = bdrv_getlength(bs);
    if (size < 0) {
        qb_error_set_errno(errp, (int)size, "Could not get the size of the image");
        return false;
    }
    params->size = (uint64_t)size;
    return true;
}

bool bdrv_bitmap_add(BlockDriverState *bs, const char *name, uint32_t granularity, bool persistent,
                     bool disabled, GError **errp)
{
    granularity = granularity ? granularity : default_granularity(bs);
    if (!check_granularity(granularity, errp)) {
        return false;
    }
    BdrvDirtyParams params = {
        .name = name,
        .granularity_bits = (unsigned)__builtin_ctz(granularity),
        .persistent = persistent,
        .disabled = disabled,
    };
    BdrvHold h;
    bdrv_hold_begin(&h, bs); /* so that the size stays */
    bool ok = take_size(bs, &params, errp) && add(bs, &params, errp);
    bdrv_hold_end(&h);
    return ok;
}

static bool remove_one(BlockDriverState *bs, BdrvDirtyBitmap *bm, GError **errp)
{
    if (!bdrv_dirty_check_idle(bm, errp) || !check_writable(bs, bm, errp)) {
        return false;
    }
    if (bm->persistent) {
        return bs->drv->bitmap_remove(bs, bm, errp);
    }
    bdrv_dirty_bitmap_free(bm);
    return true;
}

bool bdrv_bitmap_remove(BlockDriverState *bs, const char *name, GError **errp)
{
    BdrvHold h;
    bdrv_hold_begin(&h, bs);
    BdrvDirtyBitmap *bm = find(bs, name, errp);
    bool ok = bm && remove_one(bs, bm, errp);
    bdrv_hold_end(&h);
    return ok;
}

static bool remove_all(BlockDriverState *bs, GError **errp)
{
    GPtrArray *all = bs->dirty.all;
    for (guint i = 0; i < all->len; i++) {
        if (!bdrv_dirty_check_idle(g_ptr_array_index(all, i), errp)) {
            return false;
        }
    }
    if (bs->drv->bitmaps_remove_all && !bs->drv->bitmaps_remove_all(bs, errp)) {
        return false;
    }
    while (all->len) { /* those that are not stored */
        bdrv_dirty_bitmap_free(g_ptr_array_index(all, all->len - 1));
    }
    return true;
}

bool bdrv_bitmap_remove_all(BlockDriverState *bs, GError **errp)
{
    if (bs->read_only) {
        qb_error_set(errp, EACCES, "Block node is read-only");
        return false;
    }
    BdrvHold h;
    bdrv_hold_begin(&h, bs);
    bool ok = remove_all(bs, errp);
    bdrv_hold_end(&h);
    return ok;
}

/* ---------------------------------------------------------------- content and state */

bool bdrv_bitmap_clear(BlockDriverState *bs, const char *name, GError **errp)
{
    BdrvHold h;
    bdrv_hold_begin(&h, bs);
    BdrvDirtyBitmap *bm = find_to_change(bs, name, errp);
    int ret = bm ? bdrv_dirty_bits_clear(bm->bits) : 0;
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Could not clear bitmap '%s'", name);
    }
    bdrv_hold_end(&h);
    return bm && ret == 0;
}

static bool set_disabled(BlockDriverState *bs, const char *name, bool disabled, GError **errp)
{
    BdrvHold h;
    bdrv_hold_begin(&h, bs);
    BdrvDirtyBitmap *bm = find(bs, name, errp);
    bool ok = bm && check_consistent(bm, errp);
    if (ok && atomic_load(&bm->disabled) != disabled) {
        bm = find_to_change(bs, name, errp);
        ok = bm != NULL;
        if (ok) {
            atomic_store(&bm->disabled, disabled);
            bdrv_dirty_update_watch(bs);
        }
    }
    bdrv_hold_end(&h);
    return ok;
}

bool bdrv_bitmap_enable(BlockDriverState *bs, const char *name, GError **errp)
{
    return set_disabled(bs, name, false, errp);
}

bool bdrv_bitmap_disable(BlockDriverState *bs, const char *name, GError **errp)
{
    return set_disabled(bs, name, true, errp);
}

static bool check_sizes(const BdrvDirtyBitmap *to, const BdrvDirtyBitmap *from, GError **errp)
{
    uint64_t to_size = bdrv_dirty_bits_size(to->bits), from_size = bdrv_dirty_bits_size(from->bits);
    if (to_size != from_size) {
        qb_error_set(errp, EINVAL,
                     "Bitmaps are of different sizes (destination size is %" PRIu64 ", source size"
                     " is %" PRIu64 ") and can't be merged", to_size, from_size);
    }
    return to_size == from_size;
}

static bool merge(BlockDriverState *bs, const char *name, BdrvDirtyBitmap *from, GError **errp)
{
    BdrvDirtyBitmap *to = find(bs, name, errp);
    if (!to || !check_consistent(to, errp) || !check_consistent(from, errp) ||
        !check_sizes(to, from, errp)) {
        return false;
    }
    to = find_to_change(bs, name, errp);
    int ret = to ? bdrv_dirty_bits_merge(to->bits, from->bits) : 0;
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Could not merge bitmap '%s'", from->name);
    }
    return to && ret == 0;
}

/* A bitmap of another node, left alone by others until it is given back.  Its node is not held for
 * so long: what marks the target in the image may go through it. */
static BdrvDirtyBitmap *borrow(BlockDriverState *bs, const char *name, GError **errp)
{
    BdrvHold h;
    bdrv_hold_begin(&h, bs);
    BdrvDirtyBitmap *bm = find(bs, name, errp);
    if (bm) {
        atomic_fetch_add(&bm->busy, 1);
    }
    bdrv_hold_end(&h);
    return bm;
}

bool bdrv_bitmap_merge(BlockDriverState *bs, const char *name, BlockDriverState *source_bs,
                       const char *source, GError **errp)
{
    BdrvDirtyBitmap *borrowed = NULL;
    if (!find(bs, name, errp)) {
        return false; /* the error that comes first */
    }
    if (source_bs != bs && !(borrowed = borrow(source_bs, source, errp))) {
        return false;
    }
    BdrvHold h;
    bdrv_hold_begin(&h, bs);
    BdrvDirtyBitmap *from = borrowed ? borrowed : find(bs, source, errp);
    bool ok = from && merge(bs, name, from, errp);
    bdrv_hold_end(&h);
    if (borrowed) {
        atomic_fetch_sub(&borrowed->busy, 1);
    }
    return ok;
}

/* ---------------------------------------------------------------- looking */

static void info_clear(void *opaque)
{
    g_free(((BdrvBitmapInfo *)opaque)->name);
}

GArray *bdrv_bitmap_list(BlockDriverState *bs)
{
    GArray *list = g_array_new(false, true, sizeof(BdrvBitmapInfo));
    g_array_set_clear_func(list, info_clear);
    QB_GUARD(&bs->dirty.lock);
    for (guint i = 0; i < bs->dirty.all->len; i++) {
        const BdrvDirtyBitmap *bm = g_ptr_array_index(bs->dirty.all, i);
        BdrvBitmapInfo info = {
            .name = g_strdup(bm->name),
            .granularity = UINT32_C(1) << MIN(bm->granularity_bits, 31),
            .persistent = bm->persistent,
            .enabled = !atomic_load(&bm->disabled),
            .inconsistent = bm->inconsistent || atomic_load(&bm->lost),
        };
        g_array_append_val(list, info);
    }
    return list;
}

bool bdrv_can_store_bitmaps(BlockDriverState *bs)
{
    return bs->drv->bitmap_add != NULL;
}

int bdrv_bitmap_next_dirty(BlockDriverState *bs, const char *name, int64_t offset,
                           int64_t *ret_offset, int64_t *ret_bytes)
{
    BDRV_GRAPH_GUARD();
    BdrvDirtyBitmap *bm = find(bs, name, NULL);
    if (!bm || bm->inconsistent || atomic_load(&bm->lost) || offset < 0) {
        return bm ? -EINVAL : -ENOENT;
    }
    uint64_t at, bytes;
    int ret = bdrv_dirty_bits_next(bm->bits, (uint64_t)offset, bdrv_dirty_bits_size(bm->bits), &at,
                                   &bytes);
    if (ret > 0) {
        *ret_offset = (int64_t)at;
        *ret_bytes = (int64_t)bytes;
    }
    return ret;
}

/* ---------------------------------------------------------------- storing */

static bool store(BlockDriverState *bs, GError **errp)
{
    if (bs->drv->bitmaps_store && !bs->drv->bitmaps_store(bs, errp)) {
        g_prefix_error(errp, "Lost persistent bitmaps during inactivation of node '%s': ",
                       bs->node_name);
        return false;
    }
    return true;
}

bool bdrv_store_bitmaps(BlockDriverState *bs, GError **errp)
{
    if (bs->read_only) {
        return true;
    }
    BdrvHold h;
    bdrv_hold_begin(&h, bs);
    bool ok = store(bs, errp);
    bdrv_hold_end(&h);
    return ok;
}
