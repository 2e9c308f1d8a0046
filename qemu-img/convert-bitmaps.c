/*
 * Persistent dirty bitmaps in convert: judged before anything is copied, copied at the end.
 *
 * The target's bitmaps get the names, granularities and states of the source's.  They are added
 * when the content is there, so that none of them shows the copying itself as written.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/dirty-bitmap.h"
#include "qemu-img/convert.h"

bool convert_check_bitmaps(const ConvertPlan *plan, bool skip_broken)
{
    BlockDriverState *bs = blk_bs(plan->sources[0].blk);
    g_autoptr(GArray) list = bdrv_bitmap_list(bs);

    if (!bdrv_can_store_bitmaps(bs)) {
        img_error("Source lacks bitmap support");
        return false;
    }
    for (guint i = 0; i < list->len && !skip_broken; i++) {
        const BdrvBitmapInfo *info = &g_array_index(list, BdrvBitmapInfo, i);
        if (info->inconsistent) {
            img_error("Cannot copy inconsistent bitmap '%s'\n"
                      "Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it",
                      info->name);
            return false;
        }
    }
    return true;
}

static bool copy_one(BlockDriverState *from, BlockDriverState *to, const BdrvBitmapInfo *info)
{
    GError *err = NULL;

    if (!bdrv_bitmap_add(to, info->name, info->granularity, true, !info->enabled, &err)) {
        img_report_prefixed(err, 1, "Failed to create bitmap %s: ", info->name);
        return false;
    }
    if (!bdrv_bitmap_merge(to, info->name, from, info->name, &err)) {
        bdrv_bitmap_remove(to, info->name, NULL);
        img_report_prefixed(err, 1, "Failed to populate bitmap %s: ", info->name);
        return false;
    }
    return true;
}

bool convert_copy_bitmaps(const ConvertPlan *plan)
{
    BlockDriverState *from = blk_bs(plan->sources[0].blk), *to = blk_bs(plan->target);
    g_autoptr(GArray) list = bdrv_bitmap_list(from);

    for (guint i = 0; i < list->len; i++) {
        const BdrvBitmapInfo *info = &g_array_index(list, BdrvBitmapInfo, i);
        if (info->inconsistent) {
            img_warn("Skipping inconsistent bitmap '%s'", info->name);
        } else if (info->persistent && !copy_one(from, to, info)) {
            return false;
        }
    }
    return true;
}
