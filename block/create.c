/*
 * Creating images, and measuring what one would take.
 *
 *     bdrv_img_create(name, format, options)
 *       size, unless given, from the backing file
 *       options that neither format nor protocol knows: error, before anything is touched
 *       driver's create
 *         its own checks
 *         bdrv_create_file()   makes the protocol file, or empties the one that is there
 *         opens it, writes the format
 *
 * Invariants
 *  1. A file that was there before is never removed, and not changed before the driver has judged all
 *     options: the driver calls bdrv_create_file() last before it writes.
 *  2. A file that was not there before is removed when creation fails.
 *
 * Not done: no check that the backing file exists or has the format that is said; that is a matter of
 * the user's wishes (-u), hence of the tool.
 *
 * SPDX-License-Identifier: MIT
 */
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "block/core-int.h"

const char *const prealloc_mode_names[] = {"off", "metadata", "falloc", "full", NULL};

static const BlockDriver *creating_format(const char *format, GError **errp)
{
    const BlockDriver *drv = bdrv_find_format(format);
    if (!drv) {
        qb_error_set(errp, EINVAL, "Unknown file format '%s'", format);
    } else if (!drv->create) {
        qb_error_set(errp, ENOTSUP, "Format driver '%s' does not support image creation", format);
        drv = NULL;
    }
    return drv;
}

static const BlockDriver *creating_protocol(const char *filename, GError **errp)
{
    const BlockDriver *proto = bdrv_find_protocol(filename, true, errp);
    if (proto && !proto->create) {
        qb_error_set(errp, ENOTSUP, "Protocol driver '%s' does not support image creation",
                     proto->format_name);
        return NULL;
    }
    return proto;
}

static bool is_known(const BlockDriver *drv, const char *name)
{
    return drv->create_opts && qb_opts_find(drv->create_opts, name);
}

static bool check_names(const BlockDriver *drv, const BlockDriver *proto, json_t *options,
                        GError **errp)
{
    const char *key;
    json_t *value;
    json_object_foreach(options, key, value) {
        if (!is_known(drv, key) && !is_known(proto, key)) {
            qb_error_set(errp, EINVAL, "Invalid parameter '%s'", key);
            return false;
        }
    }
    return true;
}

/* --- size --- */

static int64_t backing_length(const char *path, const char *format, GError **errp)
{
    json_t *options = json_object();
    if (format) {
        json_object_set_new(options, "driver", json_string(format));
    }
    g_autoptr(BlockDriverState) bs = bdrv_open(path, options, 0, errp);
    if (!bs) {
        return -1;
    }
    int64_t length = bdrv_getlength(bs);
    if (length < 0) {
        qb_error_set_errno(errp, (int)length, "Could not get size of '%s'", path);
    }
    return length;
}

static bool take_size_from_backing(const char *filename, json_t *options, GError **errp)
{
    const char *backing = qb_opt_peek_string(options, "backing_file");
    if (!backing || !*backing) {
        qb_error_set(errp, EINVAL, "Image creation needs a size parameter");
        return false;
    }
    g_autofree char *path = bdrv_resolve_name_against(filename, backing, errp);
    int64_t length = !path ? -1 : backing_length(path, qb_opt_peek_string(options, "backing_fmt"), errp);
    if (length < 0) {
        return false;
    }
    json_object_set_new(options, "size", json_integer(length));
    return true;
}

/* --- the file --- */

/* The path of a plain file in this file system that @filename names, or NULL. Borrowed. */
static const char *plain_path(const char *filename, const BlockDriver *proto)
{
    if (strcmp(proto->format_name, "file") || g_str_has_prefix(filename, "json:")) {
        return NULL;
    }
    bool prefixed = bdrv_has_protocol_prefix(filename);
    return prefixed ? strchr(filename, ':') + 1 : filename;
}

bool bdrv_create_file(const char *filename, json_t *options, GError **errp)
{
    const BlockDriver *proto = creating_protocol(filename, errp);
    if (!proto) {
        return false;
    }
    g_autoptr(json_t) own = json_object();
    const char *key;
    json_t *value;
    void *next;
    json_object_foreach_safe(options, next, key, value) {
        if (is_known(proto, key) && strcmp(key, "size")) {
            json_object_set(own, key, value);
            json_object_del(options, key);
        }
    }
    json_object_set_new(own, "size", json_integer(0));
    return proto->create(filename, own, NULL, errp);
}

static bool create_checked(const BlockDriver *drv, const BlockDriver *proto, const char *filename,
                           json_t *options, QbProgress *progress, GError **errp)
{
    struct stat st;
    const char *path = plain_path(filename, proto);
    bool ours = path && lstat(path, &st) < 0 && errno == ENOENT;
    if (drv->create(filename, options, progress, errp)) {
        return true;
    }
    if (ours) {
        (void)unlink(path);
    }
    return false;
}

bool bdrv_img_create(const char *filename, const char *format, json_t *options,
                     QbProgress *progress, GError **errp)
{
    const BlockDriver *drv = creating_format(format, errp);
    const BlockDriver *proto = drv ? creating_protocol(filename, errp) : NULL;
    if (!proto) {
        return false;
    }
    g_autoptr(json_t) own = json_copy(options);
    if (!check_names(drv, proto, own, errp)) {
        return false;
    }
    if (!json_object_get(own, "size") && !take_size_from_backing(filename, own, errp)) {
        return false;
    }
    return create_checked(drv, proto, filename, own, progress, errp);
}

/* --- measuring --- */

bool bdrv_measure(const BlockDriver *drv, const json_t *options, BlockDriverState *source,
                  BlockMeasureInfo *ret, GError **errp)
{
    g_autoptr(json_t) own = json_deep_copy(options);
    BlockMeasureInfo info = {0};
    if (!drv->measure) {
        qb_error_set(errp, ENOTSUP, "Block driver '%s' does not support size measurement",
                     drv->format_name);
        return false;
    }
    BDRV_GRAPH_GUARD();
    int64_t length = source ? bdrv_getlength(source) : 0;
    if (length < 0) {
        qb_error_set_errno(errp, (int)length, "Unable to get image virtual_size");
        return false;
    }
    if (source) {
        json_object_set_new(own, "size", json_integer(length));
    }
    if (!drv->measure(own, source, &info, errp)) {
        return false;
    }
    *ret = info;
    return true;
}
