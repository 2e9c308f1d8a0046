/*
 * Facts about an image, for `info` of the tools and for monitors.
 *
 * The result is a JSON object whose members stand in the order that scripts have come to know:
 *
 *      limits, children[{name, info}], backing-filename-format, snapshots[], virtual-size, filename,
 *      cluster-size, encrypted, format, actual-size, format-specific, full-backing-filename,
 *      backing-filename, dirty-flag
 *
 * Invariant: a fact that does not exist is left out, never null or zero; only virtual-size,
 * filename, format and dirty-flag are always there.
 *
 * Not done here: printing, and walking the backing chain (the tool opens it or not).
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/info.h"
#include "block/driver.h"
#include "util/error.h"

static void set_nonzero(json_t *obj, const char *key, int64_t value)
{
    if (value) {
        json_object_set_new(obj, key, json_integer(value));
    }
}

static json_t *limits_info(const BlockLimits *bl)
{
    json_t *obj = json_object();

    set_nonzero(obj, "write-zeroes-alignment", bl->pwrite_zeroes_alignment);
    set_nonzero(obj, "max-write-zeroes", bl->max_pwrite_zeroes);
    set_nonzero(obj, "request-alignment", bl->request_alignment);
    set_nonzero(obj, "opt-transfer", bl->opt_transfer);
    set_nonzero(obj, "max-transfer", bl->max_transfer);
    set_nonzero(obj, "min-mem-alignment", (int64_t)bl->min_mem_alignment);
    set_nonzero(obj, "max-discard", bl->max_pdiscard);
    set_nonzero(obj, "discard-alignment", bl->pdiscard_alignment);
    set_nonzero(obj, "opt-mem-alignment", (int64_t)bl->opt_mem_alignment);
    set_nonzero(obj, "max-iov", bl->max_iov);
    return obj;
}

static json_t *snapshot_info(const BdrvSnapshotInfo *sn)
{
    json_t *obj = json_object();

    if (sn->icount != UINT64_MAX) {
        json_object_set_new(obj, "icount", json_integer((json_int_t)sn->icount));
    }
    json_object_set_new(obj, "vm-clock-nsec",
                        json_integer((json_int_t)(sn->vm_clock_nsec % 1000000000)));
    json_object_set_new(obj, "name", json_string(sn->name));
    json_object_set_new(obj, "date-sec", json_integer(sn->date_sec));
    json_object_set_new(obj, "date-nsec", json_integer(sn->date_nsec));
    json_object_set_new(obj, "vm-clock-sec",
                        json_integer((json_int_t)(sn->vm_clock_nsec / 1000000000)));
    json_object_set_new(obj, "id", json_string(sn->id));
    json_object_set_new(obj, "vm-state-size", json_integer((json_int_t)sn->vm_state_size));
    return obj;
}

static bool add_snapshots(BlockDriverState *bs, json_t *obj, GError **errp)
{
    g_autoptr(GArray) list = NULL;
    json_t *array;

    if (!bdrv_can_snapshot(bs)) {
        return true;
    }
    list = bdrv_snapshot_list(bs, errp);
    if (!list) {
        return false;
    }
    if (list->len == 0) {
        return true;
    }
    array = json_array();
    for (guint i = 0; i < list->len; i++) {
        json_array_append_new(array, snapshot_info(&g_array_index(list, BdrvSnapshotInfo, i)));
    }
    json_object_set_new(obj, "snapshots", array);
    return true;
}

/* The nodes that hold the image itself: not the backing file, which is an image of its own. */
static bool add_children(BlockDriverState *bs, json_t *obj, bool limits, GError **errp)
{
    json_t *array = json_array();

    json_object_set_new(obj, "children", array);
    for (guint i = 0; i < bs->children->len; i++) {
        const BdrvChild *child = bs->children->pdata[i];
        json_t *item, *info;
        if (child->role & BDRV_CHILD_COW) {
            continue;
        }
        info = bdrv_image_info(child->bs, limits, errp);
        if (!info) {
            return false;
        }
        item = json_object();
        json_object_set_new(item, "name", json_string(child->name));
        json_object_set_new(item, "info", info);
        json_array_append_new(array, item);
    }
    return true;
}

static void add_backing_names(BlockDriverState *bs, json_t *obj)
{
    const char *name = bdrv_backing_name(bs);
    g_autofree char *full = NULL;

    if (!name || !*name) {
        return;
    }
    full = bdrv_resolve_backing_name(bs, name, NULL);
    if (full) {
        json_object_set_new(obj, "full-backing-filename", json_string(full));
    }
    json_object_set_new(obj, "backing-filename", json_string(name));
}

static bool add_driver_facts(BlockDriverState *bs, json_t *obj, bool *ret_dirty, GError **errp)
{
    BlockDriverInfo info = {.vm_state_offset = -1};
    GError *local = NULL;

    if (!bdrv_get_info(bs, &info, &local)) {
        bool unsupported = qb_error_to_errno(local) == -ENOTSUP;
        if (!unsupported) {
            g_propagate_error(errp, local);
            return false;
        }
        g_clear_error(&local);
    }
    set_nonzero(obj, "cluster-size", info.cluster_size);
    if (info.is_encrypted) {
        json_object_set_new(obj, "encrypted", json_true());
    }
    *ret_dirty = info.is_dirty;
    return true;
}

static bool add_storage_facts(BlockDriverState *bs, json_t *obj, GError **errp)
{
    int64_t actual = bdrv_get_allocated_file_size(bs);
    GError *local = NULL;
    json_t *specific;

    if (actual >= 0) {
        json_object_set_new(obj, "actual-size", json_integer(actual));
    }
    specific = bdrv_get_specific_info(bs, &local);
    if (local) {
        g_propagate_error(errp, local);
        return false;
    }
    if (specific) {
        json_object_set_new(obj, "format-specific", specific);
    }
    return true;
}

static bool add_facts(BlockDriverState *bs, json_t *obj, int64_t length, bool limits, GError **errp)
{
    const char *backing_format = bdrv_backing_format(bs);
    bool dirty = false;

    if (!add_children(bs, obj, limits, errp)) {
        return false;
    }
    if (backing_format && *backing_format) {
        json_object_set_new(obj, "backing-filename-format", json_string(backing_format));
    }
    if (!add_snapshots(bs, obj, errp)) {
        return false;
    }
    json_object_set_new(obj, "virtual-size", json_integer(length));
    json_object_set_new(obj, "filename", json_string(bdrv_filename(bs)));
    if (!add_driver_facts(bs, obj, &dirty, errp)) {
        return false;
    }
    json_object_set_new(obj, "format", json_string(bdrv_get_format_name(bs)));
    if (!add_storage_facts(bs, obj, errp)) {
        return false;
    }
    add_backing_names(bs, obj);
    json_object_set_new(obj, "dirty-flag", json_boolean(dirty));
    return true;
}

json_t *bdrv_image_info(BlockDriverState *bs, bool limits, GError **errp)
{
    int64_t length = bdrv_getlength(bs);
    g_autoptr(json_t) obj = json_object();

    if (length < 0) {
        qb_error_set_errno(errp, (int)-length, "Can't get image size '%s'", bdrv_filename(bs));
        return NULL;
    }
    if (limits) {
        json_object_set_new(obj, "limits", limits_info(bdrv_limits(bs)));
    }
    if (!add_facts(bs, obj, length, limits, errp)) {
        return NULL;
    }
    return g_steal_pointer(&obj);
}
