/*
 * What a truncation would make of an image's file, without touching it.
 *
 *      [image]  read-only, as the caller has it        [the image once more]  writable, truncated
 *         |                                               |file        |data-file
 *         |                                            [scratch]    [scratch]
 *         |file          |data-file                       |            |
 *      [file] <----------|--------------------------------'            |
 *                     [file] <-----------------------------------------'
 *
 * Nothing is predicted: the driver's own truncation runs to its end on nodes that keep in memory what is
 * written (block/scratch.c), and the length that comes out is the answer.  So it is right for whatever
 * lies in the image (snapshots, tables that several share, leaked clusters, a dirty image that is
 * repaired at its opening), and stays right when the driver learns to do better.
 *
 * Invariants
 *  1. The image's own nodes are only read.
 *  2. Nothing is opened that is not open already: no name in the image is looked at.
 *
 * The cost is that of the truncation, and memory for the metadata it writes; no guest data is read.
 *
 * Not done: growing.  A longer image takes what the backing file and the preallocation make of it, at
 * the time it is done.
 *
 * SPDX-License-Identifier: MIT
 */
#include <string.h>
#include "block/block-backend.h"
#include "block/core-int.h"

/* Options that say which nodes there are and how they are opened: here we know better. */
static bool is_about_nodes(const char *key)
{
    static const char *const words[] = {
        "driver", "filename", "node-name", "read-only", "auto-read-only", "force-share",
        "copy-on-read", "file", "data-file", "backing",
    };
    static const char *const prefixes[] = {"file.", "data-file.", "backing."};
    bool found = false;
    for (size_t i = 0; i < G_N_ELEMENTS(words); i++) {
        found |= !strcmp(key, words[i]);
    }
    for (size_t i = 0; i < G_N_ELEMENTS(prefixes); i++) {
        found |= g_str_has_prefix(key, prefixes[i]);
    }
    return found;
}

static BlockDriverState *cover(BlockDriverState *file, GError **errp)
{
    json_t *options = json_object();
    json_object_set_new(options, "driver", json_string("scratch"));
    json_object_set_new(options, "file", json_string(file->node_name));
    return bdrv_open(NULL, options, BDRV_O_RDWR | BDRV_O_RESIZE, errp);
}

/* Opens @bs once more, above @file and @data (may be NULL). */
static BlockBackend *open_again(BlockDriverState *bs, BlockDriverState *file,
                                BlockDriverState *data, GError **errp)
{
    json_t *options = json_object(), *value;
    const char *key;
    json_object_foreach(bs->explicit_options, key, value) {
        if (!is_about_nodes(key)) {
            json_object_set(options, key, value);
        }
    }
    json_object_set_new(options, "driver", json_string(bs->drv->format_name));
    json_object_set_new(options, "file", json_string(file->node_name));
    if (data) {
        json_object_set_new(options, "data-file", json_string(data->node_name));
    }
    int flags = BDRV_O_RDWR | BDRV_O_RESIZE | BDRV_O_NO_IO | BDRV_O_NO_BACKING | BDRV_O_NO_NAMES |
                BDRV_O_TRIAL;
    return blk_new_open(NULL, options, flags, errp);
}

static BlockDriverState *data_file(BlockDriverState *bs)
{
    BDRV_GRAPH_GUARD();
    for (guint i = 0; i < bs->children->len; i++) {
        const BdrvChild *c = g_ptr_array_index(bs->children, i);
        if (!strcmp(c->name, "data-file")) {
            return c->bs;
        }
    }
    return NULL;
}

static bool truncate_and_store(BlockBackend *blk, int64_t length, GError **errp)
{
    if (!blk_truncate(blk, length, true, PREALLOC_MODE_OFF, true, errp) ||
        !bdrv_store_bitmaps(blk_bs(blk), errp)) {
        return false;
    }
    int ret = blk_flush(blk);
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Could not flush the image");
    }
    return ret == 0;
}

/* Truncates the image above new nodes; the length of the one that stands for its file, or -1. */
static int64_t length_after(BlockDriverState *bs, int64_t length, GError **errp)
{
    BlockDriverState *data = data_file(bs);
    g_autoptr(BlockDriverState) file = cover(bs->file->bs, errp);
    g_autoptr(BlockDriverState) covered = file && data ? cover(data, errp) : NULL;
    if (!file || (data && !covered)) {
        return -1;
    }
    g_autoptr(BlockBackend) blk = open_again(bs, file, covered, errp);
    bool ok = blk && truncate_and_store(blk, length, errp);
    g_clear_pointer(&blk, blk_unref); /* closing may still write */
    return ok ? bdrv_getlength(file) : -1;
}

bool bdrv_try_shrink(BlockDriverState *bs, int64_t length, BdrvFileLengths *ret, GError **errp)
{
    bool format = bs->drv->is_format && bs->file;
    *ret = (BdrvFileLengths){.now = format ? bdrv_getlength(bs->file->bs) : -1, .then = -1};
    if (ret->now < 0 || length >= bdrv_getlength(bs) || !bdrv_can_grow(bs->file->bs)) {
        return true; /* a device stays as long as it is */
    }
    ret->then = length_after(bs, length, errp);
    return ret->then >= 0;
}
