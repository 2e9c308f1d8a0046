/*
 * File names: one parser for every spelling.
 *
 *     json:{'driver': ...}      -> options (what was given beside the name wins)
 *     blkdebug:cfg:a.img        -> driver=blkdebug, the rest parsed by that driver
 *     a.img, ./a:b.img          -> filename=a.img of the "file" or "host_device" driver
 *
 * A name is taken apart only where a protocol node is wanted (BDRV_O_PROTOCOL, or a protocol driver
 * named by the options).  For a format node it stays whole and is handed on to its "file" child, so
 * each name is parsed exactly once, at the bottom.
 *
 * Invariants
 *  1. "filename" as an option is never parsed: a name from metadata that must stay plain goes there.
 *  2. After bdrv_merge_filename(), flags say BDRV_O_PROTOCOL if and only if the driver is one.
 *
 * SPDX-License-Identifier: MIT
 */
#include <string.h>
#include "block/open-int.h"

/* Options inside the name; those given beside it stay. */
static bool merge_json(BdrvOpenArgs *args, GError **errp)
{
    if (!args->filename || !g_str_has_prefix(args->filename, "json:")) {
        return true;
    }
    g_autoptr(json_t) nested = qb_json_parse_object(args->filename + strlen("json:"), errp);
    if (!nested) {
        g_prefix_error(errp, "Could not parse the JSON options: ");
        return false;
    }
    g_autoptr(json_t) flat = qb_opts_flatten(nested);
    qb_opts_set_defaults(args->options, flat);
    args->filename = NULL;
    return true;
}

static bool find_named_driver(BdrvOpenArgs *args, const BlockDriver **ret_drv, GError **errp)
{
    *ret_drv = NULL;
    if (!json_object_get(args->options, "driver")) {
        return true;
    }
    const char *name = qb_opt_peek_string(args->options, "driver");
    *ret_drv = name ? bdrv_find_format(name) : NULL;
    if (!*ret_drv) {
        qb_error_set(errp, EINVAL, "Unknown driver '%s'", name ? name : "");
    }
    return *ret_drv != NULL;
}

/* Hands the name to the driver, which may turn it into options of its own. */
static bool parse_by_driver(BdrvOpenArgs *args, const BlockDriver *drv, GError **errp)
{
    const char *filename = args->filename;
    args->filename = NULL;
    if (drv->parse_filename && !drv->parse_filename(filename, args->options, errp)) {
        return false;
    }
    if (!drv->needs_filename) {
        json_object_del(args->options, "filename");
    }
    return true;
}

static bool merge_protocol_name(BdrvOpenArgs *args, const BlockDriver **drv, GError **errp)
{
    const char *given = qb_opt_peek_string(args->options, "filename");
    if (args->filename && given) {
        qb_error_set(errp, EINVAL,
                     "Can't specify 'file' and 'filename' options at the same time");
        return false;
    }
    const char *name = args->filename ? args->filename : given;
    if (!*drv && !name) {
        qb_error_set(errp, EINVAL, "Must specify either driver or file");
        return false;
    }
    if (!*drv && !(*drv = bdrv_find_protocol(name, args->filename != NULL, errp))) {
        return false;
    }
    if (!args->filename) {
        return true;
    }
    json_object_set_new(args->options, "filename", json_string_nocheck(name)); /* names are bytes */
    return parse_by_driver(args, *drv, errp);
}

bool bdrv_merge_filename(BdrvOpenArgs *args, const BlockDriver **ret_drv, GError **errp)
{
    if (!merge_json(args, errp) || !find_named_driver(args, ret_drv, errp)) {
        return false;
    }
    if (*ret_drv) {
        args->flags &= ~BDRV_O_PROTOCOL;
        args->flags |= (*ret_drv)->protocol_name ? BDRV_O_PROTOCOL : 0;
    }
    if (!(args->flags & BDRV_O_PROTOCOL)) {
        return true;
    }
    if (!merge_protocol_name(args, ret_drv, errp)) {
        return false;
    }
    bdrv_set_default_string(args->options, "driver", (*ret_drv)->format_name);
    return true;
}
