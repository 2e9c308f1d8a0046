/*
 * Operations on an image as a whole: check, amend, empty, internal snapshots, header names, facts.
 *
 *     drained_begin ---> graph lock shared ---> whole node in the range lock ---> driver
 *        no request from any BlockBackend           nobody inside, also not by another way
 *
 * Invariants
 *  1. The driver's callback has the node for itself; it does not meet a request half way.
 *  2. What changes the image asks first whether the node is writable; ENOTSUP says that the driver
 *     has no such operation.
 *
 * Not done: no progress besides what the driver reports; no jobs.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/core-int.h"

void bdrv_hold_begin(BdrvHold *h, BlockDriverState *bs)
{
    h->bs = bs;
    bdrv_drained_begin(bs);
    bdrv_graph_rdlock();
    bdrv_request_begin_whole(bs, &h->req);
}

void bdrv_hold_end(BdrvHold *h)
{
    bdrv_request_end_whole(&h->req);
    bdrv_graph_rdunlock();
    bdrv_drained_end(h->bs);
}

static bool check_writable(const BlockDriverState *bs, GError **errp)
{
    if (bs->read_only) {
        qb_error_set(errp, EACCES, "Block node is read-only");
        return false;
    }
    return true;
}

static bool check_has(const BlockDriverState *bs, bool has, const char *what, GError **errp)
{
    if (!has) {
        qb_error_set(errp, ENOTSUP, "Block driver '%s' does not support %s", bs->drv->format_name,
                     what);
    }
    return has;
}

/* --- check, amend, empty --- */

bool bdrv_check(BlockDriverState *bs, const BdrvCheckOptions *opts, BdrvCheckResult *result,
                GError **errp)
{
    *result = (BdrvCheckResult){0};
    if (!check_has(bs, bs->drv->check, "checks", errp) ||
        (opts->fix && !check_writable(bs, errp))) {
        return false;
    }
    BdrvHold h;
    bdrv_hold_begin(&h, bs);
    bool ok = bs->drv->check(bs, opts, result, errp);
    bdrv_hold_end(&h);
    return ok;
}

bool bdrv_amend(BlockDriverState *bs, json_t *options, QbProgress *progress, GError **errp)
{
    g_autoptr(json_t) owned = options;
    if (!bs->drv->amend) {
        qb_error_set(errp, ENOTSUP, "Format driver '%s' does not support option amendment",
                     bs->drv->format_name);
        return false;
    }
    if (!check_writable(bs, errp)) {
        return false;
    }
    BdrvHold h;
    bdrv_hold_begin(&h, bs);
    bool ok = bs->drv->amend(bs, owned, progress, errp);
    bdrv_hold_end(&h);
    return ok;
}

/* What the node has will read as what is below: to its dirty bitmaps that is a write. 0 or
 * -errno. */
static int mark_emptied(BlockDriverState *bs)
{
    int64_t size = bdrv_has_dirty_bitmaps(bs) ? bdrv_getlength(bs) : 0, bytes = 0;
    int ret = size < 0 ? (int)size : 0;
    for (int64_t at = 0; at < size && ret >= 0; at += bytes) {
        ret = bdrv_is_allocated_above(bs, bdrv_backing_chain_next(bs), false, at, size - at,
                                      &bytes);
        bool has = ret > 0;
        ret = has ? bdrv_dirty_before(bs, at, bytes) : ret;
        if (has && ret == 0) {
            bdrv_dirty_after(bs, at, bytes);
        }
    }
    return ret;
}

bool bdrv_make_empty(BlockDriverState *bs, bool committed, GError **errp)
{
    if (!check_has(bs, bs->drv->make_empty, "emptying", errp) || !check_writable(bs, errp)) {
        return false;
    }
    BdrvHold h;
    bdrv_hold_begin(&h, bs);
    int ret = committed ? 0 : mark_emptied(bs);
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Could not mark in the bitmaps what goes away");
    }
    bool ok = ret == 0 && bs->drv->make_empty(bs, errp);
    bdrv_hold_end(&h);
    return ok;
}

bool bdrv_change_backing_file(BlockDriverState *bs, const char *backing_file,
                              const char *backing_fmt, GError **errp)
{
    if (!check_has(bs, bs->drv->change_backing_file, "changing the backing file", errp) ||
        !check_writable(bs, errp)) {
        return false;
    }
    BdrvHold h;
    bdrv_hold_begin(&h, bs);
    bool ok = bs->drv->change_backing_file(bs, backing_file ? backing_file : "",
                                           backing_fmt ? backing_fmt : "", errp);
    if (ok) {
        bdrv_set_backing_names(bs, backing_file, backing_fmt);
    }
    bdrv_hold_end(&h);
    return ok;
}

/* --- internal snapshots --- */

void bdrv_snapshot_info_clear(BdrvSnapshotInfo *sn)
{
    g_clear_pointer(&sn->id, g_free);
    g_clear_pointer(&sn->name, g_free);
}

static bool check_snapshots(const BlockDriverState *bs, bool has, GError **errp)
{
    return check_has(bs, has, "internal snapshots", errp);
}

bool bdrv_snapshot_create(BlockDriverState *bs, const char *name, GError **errp)
{
    if (!bs->drv->snapshot_create) { /* in the field's words */
        qb_error_set(errp, ENOTSUP, "%s", g_strerror(ENOTSUP));
        return false;
    }
    if (!check_writable(bs, errp)) {
        return false;
    }
    BdrvHold h;
    bdrv_hold_begin(&h, bs);
    bool ok = bs->drv->snapshot_create(bs, name, errp);
    bdrv_hold_end(&h);
    return ok;
}

bool bdrv_snapshot_apply(BlockDriverState *bs, const char *id_or_name, GError **errp)
{
    if (!check_snapshots(bs, bs->drv->snapshot_apply, errp) || !check_writable(bs, errp)) {
        return false;
    }
    BdrvHold h;
    bdrv_hold_begin(&h, bs);
    bool ok = !bdrv_has_dirty_bitmaps(bs);
    if (ok) {
        ok = bs->drv->snapshot_apply(bs, id_or_name, errp);
    } else { /* none of them would hear of what changes */
        qb_error_set(errp, EBUSY, "Device has active dirty bitmaps");
    }
    bdrv_hold_end(&h);
    return ok;
}

bool bdrv_snapshot_delete(BlockDriverState *bs, const char *id, const char *name, GError **errp)
{
    if (!check_snapshots(bs, bs->drv->snapshot_delete, errp) || !check_writable(bs, errp)) {
        return false;
    }
    BdrvHold h;
    bdrv_hold_begin(&h, bs);
    bool ok = bs->drv->snapshot_delete(bs, id, name, errp);
    bdrv_hold_end(&h);
    return ok;
}

static void clear_info(gpointer sn)
{
    bdrv_snapshot_info_clear(sn);
}

GArray *bdrv_snapshot_list(BlockDriverState *bs, GError **errp)
{
    BDRV_GRAPH_GUARD();
    GArray *list = bs->drv->snapshot_list
                       ? bs->drv->snapshot_list(bs, errp)
                       : g_array_new(FALSE, TRUE, sizeof(BdrvSnapshotInfo));
    if (list) {
        g_array_set_clear_func(list, clear_info);
    }
    return list;
}

bool bdrv_snapshot_load_tmp(BlockDriverState *bs, const char *id_or_name, GError **errp)
{
    if (!check_snapshots(bs, bs->drv->snapshot_load_tmp, errp)) {
        return false;
    }
    if (!bs->read_only) {
        qb_error_set(errp, EINVAL, "Device is not readonly");
        return false;
    }
    BdrvHold h;
    bdrv_hold_begin(&h, bs);
    bool ok = bs->drv->snapshot_load_tmp(bs, id_or_name, errp);
    bdrv_hold_end(&h);
    return ok;
}

/* --- facts --- */

bool bdrv_get_info(BlockDriverState *bs, BlockDriverInfo *ret_info, GError **errp)
{
    BDRV_GRAPH_GUARD();
    BlockDriverInfo info = {.vm_state_offset = -1};
    BlockDriverState *node = bdrv_skip_filters(bs);
    if (!node || !node->drv->get_info) {
        return check_has(bs, false, "asking for its layout", errp);
    }
    if (!node->drv->get_info(node, &info, errp)) {
        return false;
    }
    *ret_info = info;
    return true;
}

json_t *bdrv_get_specific_info(BlockDriverState *bs, GError **errp)
{
    BDRV_GRAPH_GUARD();
    return bs->drv->get_specific_info ? bs->drv->get_specific_info(bs, errp) : NULL;
}

/* What the node stores at places other than its backing file. */
static int64_t sum_children(BlockDriverState *bs)
{
    int64_t sum = 0;
    unsigned storage = 0;
    for (unsigned i = 0; i < bs->children->len; i++) {
        BdrvChild *c = g_ptr_array_index(bs->children, i);
        if (c->role & BDRV_CHILD_COW) {
            continue;
        }
        int64_t size = bdrv_get_allocated_file_size(c->bs);
        if (size < 0) {
            return size;
        }
        sum += size;
        storage++;
    }
    return storage ? sum : -ENOTSUP;
}

int64_t bdrv_get_allocated_file_size(BlockDriverState *bs)
{
    BDRV_GRAPH_GUARD();
    return bs->drv->get_allocated_file_size ? bs->drv->get_allocated_file_size(bs)
                                            : sum_children(bs);
}
