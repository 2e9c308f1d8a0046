/*
 * What all verbs of qemu-img do alike: messages, opening and closing, snapshots, sizes.
 *
 * Every diagnostic goes to stderr with the prefix "qemu-img: "; data go to stdout.  A message is
 * made where the cause is known (mostly in the library); here it is printed, once.
 *
 * Not done here: deciding exit codes; each verb knows its own.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "block/dirty-bitmap.h"
#include "qemu-img/img.h"
#include "tools/objects.h"

static const char *argv0 = "qemu-img";

void img_set_argv0(const char *name)
{
    argv0 = name;
}

const char *img_argv0(void)
{
    return argv0;
}

void img_error(const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    g_autofree char *text = g_strdup_vprintf(fmt, ap);
    va_end(ap);
    fflush(stdout);
    fprintf(stderr, "qemu-img: %s\n", text);
}

void img_warn(const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    g_autofree char *text = g_strdup_vprintf(fmt, ap);
    va_end(ap);
    fflush(stdout);
    fprintf(stderr, "qemu-img: warning: %s\n", text);
}

int img_report(GError *err, int status)
{
    img_error("%s", err ? err->message : "unknown error");
    g_clear_error(&err);
    return status;
}

int img_report_prefixed(GError *err, int status, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    g_autofree char *prefix = g_strdup_vprintf(fmt, ap);
    va_end(ap);
    g_prefix_error(&err, "%s", prefix);
    return img_report(err, status);
}

bool img_check_open_args(const char *format, bool image_opts)
{
    if (format && image_opts) {
        img_error("--image-opts and --format are mutually exclusive");
        return false;
    }
    return true;
}

bool img_check_cache(const char *which, const char *mode)
{
    BlkCacheMode cache;

    if (mode && !blk_parse_cache_mode(mode, &cache)) {
        img_error("Invalid %scache option: %s", which, mode);
        return false;
    }
    return true;
}

static void set_default_bool(json_t *options, const char *key, bool value)
{
    if (!json_object_get(options, key)) {
        json_object_set_new(options, key, json_boolean(value));
    }
}

/* Options that the verb's switches stand for; what --image-opts says itself wins. */
static json_t *open_options(const char *name, const ImgOpen *how, const BlkCacheMode *cache,
                            GError **errp)
{
    json_t *options;

    if (how->image_opts && !strchr(name, '=')) {
        qb_error_set(errp, EINVAL, "--image-opts expects NAME=VALUE[,...]");
        return NULL;
    }
    options = how->image_opts ? qb_opts_parse(name, NULL, errp) : json_object();
    if (!options) {
        return NULL;
    }
    if (how->format) {
        json_object_set_new(options, "driver", json_string(how->format));
    }
    if (cache->direct) {
        set_default_bool(options, "cache.direct", true);
    }
    if (cache->no_flush) {
        set_default_bool(options, "cache.no-flush", true);
    }
    if (how->unmap && !json_object_get(options, "discard")) {
        json_object_set_new(options, "discard", json_string("unmap"));
    }
    if (how->force_share) {
        json_object_set_new(options, "force-share", json_true());
    }
    return options;
}

BlockBackend *img_open(const char *name, const ImgOpen *how)
{
    BlkCacheMode cache = {0};
    GError *err = NULL;
    BlockBackend *blk;
    json_t *options;

    if (!img_check_cache("", how->cache)) {
        return NULL;
    }
    if (how->cache) {
        blk_parse_cache_mode(how->cache, &cache);
    }
    options = open_options(name, how, &cache, &err);
    if (!options) {
        img_report_prefixed(err, 1, "Could not open '%s': ", name);
        return NULL;
    }
    blk = img_open_guarded(name, how, options, &err);
    if (!blk && how->what) {
        g_prefix_error(&err, "Could not open %s: ", how->what);
    }
    if (!blk) {
        img_report(err, 1);
        return NULL;
    }
    blk_set_write_cache(blk, !cache.writethrough);
    return blk;
}

/* Bitmaps first: what they need made stable goes with the flush. */
static bool store_and_flush(BlockBackend *blk)
{
    GError *err = NULL;
    int ret;

    if (!bdrv_store_bitmaps(blk_bs(blk), &err)) {
        img_report_prefixed(err, 1, "Error while closing the image: ");
        return false;
    }
    ret = blk_flush(blk);
    if (ret < 0) {
        img_error("Error while closing the image: %s: %s", bdrv_filename(blk_bs(blk)),
                  g_strerror(-ret));
    }
    return ret == 0;
}

int img_close(BlockBackend *blk, int status)
{
    if (status == 0 && blk_is_writable(blk) && !store_and_flush(blk)) {
        status = 1;
    }
    blk_unref(blk);
    return status;
}

/* The ID of the snapshot that has the ID and the name given (NULL: any). Borrowed from @list. */
static const char *find_snapshot(const GArray *list, const char *id, const char *name)
{
    for (guint i = 0; i < list->len; i++) {
        const BdrvSnapshotInfo *sn = &g_array_index(list, BdrvSnapshotInfo, i);
        if ((!id || !strcmp(id, sn->id)) && (!name || !strcmp(name, sn->name))) {
            return sn->id;
        }
    }
    return NULL;
}

/* "snapshot.id=X,snapshot.name=Y", or one of them. */
static bool load_described_snapshot(BlockDriverState *bs, const char *text, GError **errp)
{
    g_autoptr(json_t) options = qb_opts_parse(text, NULL, errp);
    g_autoptr(GArray) list = options ? bdrv_snapshot_list(bs, errp) : NULL;

    if (!list) {
        return false;
    }
    g_autofree char *id = qb_opt_take_string(options, "snapshot.id");
    g_autofree char *name = qb_opt_take_string(options, "snapshot.name");
    if (json_object_size(options) > 0) {
        qb_error_set(errp, EINVAL, "Invalid parameter '%s'",
                     json_object_iter_key(json_object_iter(options)));
        return false;
    }
    const char *found = find_snapshot(list, id, name);
    if (!found) {
        qb_error_set(errp, ENOENT, "Can't find snapshot");
    }
    return found && bdrv_snapshot_load_tmp(bs, found, errp);
}

bool img_load_snapshot(BlockDriverState *bs, const char *text)
{
    bool described = g_str_has_prefix(text, "snapshot.");
    GError *err = NULL;

    if (described ? load_described_snapshot(bs, text, &err)
                  : bdrv_snapshot_load_tmp(bs, text, &err)) {
        return true;
    }
    img_report_prefixed(err, 1, "Failed to load snapshot: ");
    return false;
}

bool img_check_objects(const GPtrArray *objects)
{
    GError *err = NULL;

    return tool_check_objects(objects, &err) || img_report(err, 0);
}

bool img_parse_size(const char *what, const char *text, uint64_t *ret)
{
    switch (qb_size_parse(text, 'b', ret)) {
    case 0:
        return true;
    case -ERANGE:
        img_error("Invalid %s specified. Must be between 0 and %" PRId64 ".", what, INT64_MAX);
        return false;
    default:
        img_error("Invalid %s specified: '%s'\n"
                  "You may use k, M, G, T, P or E suffixes for\n"
                  "kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes.",
                  what, text);
        return false;
    }
}
