/*
 * Options every node understands, and what a child inherits of them.
 *
 *     said by the user  ->  explicit      node-name, read-only, auto-read-only, force-share,
 *     plus the parent's ->  defaults      discard, detect-zeroes, cache.direct, cache.no-flush,
 *                                         copy-on-read; the rest belongs to the driver
 *
 * What goes down, unless the child's own options say otherwise:
 *
 *     option                    "file" and the like              "backing"
 *     cache.*, force-share      as the parent                    as the parent
 *     read-only                 as the parent                    on
 *     auto-read-only            as the parent                    off
 *     discard                   unmap: the parent decides        ignore
 *
 * Invariants
 *  1. Taking options twice from copies of the same object gives the same node.
 *  2. A writable node is not shared by force.
 *
 * SPDX-License-Identifier: MIT
 */
#include <string.h>
#include "block/core-int.h"
#include "block/open-int.h"

static const char *const detect_zeroes_names[] = {"off", "on", "unmap", NULL};

void bdrv_node_options_clear(BdrvNodeOptions *no)
{
    g_clear_pointer(&no->node_name, g_free);
}

static bool take_discard(json_t *options, bool *ret, GError **errp)
{
    g_autofree char *mode = qb_opt_take_string(options, "discard");
    *ret = false;
    if (mode && !blk_parse_discard(mode, ret)) {
        qb_error_set(errp, EINVAL, "Invalid discard option");
        return false;
    }
    return true;
}

static bool take_detect_zeroes(json_t *options, int *ret, GError **errp)
{
    g_autofree char *mode = qb_opt_take_string(options, "detect-zeroes");
    *ret = 0;
    for (int i = 0; mode && detect_zeroes_names[i]; i++) {
        if (!strcmp(mode, detect_zeroes_names[i])) {
            *ret = i;
            return true;
        }
    }
    if (mode) {
        qb_error_set(errp, EINVAL, "invalid parameter value: %s", mode);
    }
    return !mode;
}

/* What does not fit together. */
static bool check_node_options(const BdrvNodeOptions *no, GError **errp)
{
    if (no->force_share && !no->read_only) {
        qb_error_set(errp, EINVAL, "force-share=on can only be used with read-only images");
        return false;
    }
    if (no->detect_zeroes == 2 && !no->discard_unmap) {
        qb_error_set(errp, EINVAL,
                     "setting detect-zeroes to unmap is not allowed without setting discard "
                     "operation to unmap");
        return false;
    }
    if (no->copy_on_read && no->read_only) {
        qb_error_set(errp, EINVAL, "Can't use copy-on-read on read-only device");
        return false;
    }
    return true;
}

bool bdrv_take_node_options(json_t *options, BdrvNodeOptions *ret, GError **errp)
{
    *ret = (BdrvNodeOptions){0};
    return qb_opt_take_bool(options, "read-only", false, &ret->read_only, errp) &&
           qb_opt_take_bool(options, "auto-read-only", false, &ret->auto_read_only, errp) &&
           qb_opt_take_bool(options, "force-share", false, &ret->force_share, errp) &&
           qb_opt_take_bool(options, "cache.direct", false, &ret->cache_direct, errp) &&
           qb_opt_take_bool(options, "cache.no-flush", false, &ret->cache_no_flush, errp) &&
           qb_opt_take_bool(options, "copy-on-read", false, &ret->copy_on_read, errp) &&
           take_discard(options, &ret->discard_unmap, errp) &&
           take_detect_zeroes(options, &ret->detect_zeroes, errp) &&
           check_node_options(ret, errp) &&
           ((ret->node_name = qb_opt_take_string(options, "node-name")) || true);
}

static void set_default(json_t *options, const char *key, json_t *value)
{
    if (!json_object_get(options, key)) {
        json_object_set(options, key, value);
    }
}

static void copy_default(json_t *dst, const json_t *src, const char *key)
{
    json_t *value = json_object_get(src, key);
    if (value) {
        set_default(dst, key, value);
    }
}

void bdrv_set_default_string(json_t *options, const char *key, const char *value)
{
    g_autoptr(json_t) text = json_string_nocheck(value);
    set_default(options, key, text);
}

void bdrv_inherit_options(json_t *child, const json_t *parent, int role)
{
    bool cow = role & BDRV_CHILD_COW;
    copy_default(child, parent, "cache.direct");
    copy_default(child, parent, "cache.no-flush");
    copy_default(child, parent, "force-share");
    if (cow) {
        bdrv_set_default_string(child, "read-only", "on");
        bdrv_set_default_string(child, "auto-read-only", "off");
    } else {
        copy_default(child, parent, "read-only");
        copy_default(child, parent, "auto-read-only");
        bdrv_set_default_string(child, "discard", "unmap");
    }
}

int bdrv_node_flags(int flags, const BdrvNodeOptions *no)
{
    flags &= ~(BDRV_O_RDWR | BDRV_O_COPY_ON_READ);
    if (no->read_only) {
        flags &= ~BDRV_O_RESIZE;
    } else {
        flags |= BDRV_O_RDWR;
    }
    return no->copy_on_read ? flags | BDRV_O_COPY_ON_READ : flags;
}

void bdrv_apply_node_options(BlockDriverState *bs, const BdrvNodeOptions *no, int flags)
{
    bs->read_only = no->read_only;
    bs->auto_read_only = no->auto_read_only;
    bs->force_share = no->force_share;
    bs->cache_direct = no->cache_direct;
    bs->cache_no_flush = no->cache_no_flush;
    bs->discard_unmap = no->discard_unmap;
    bs->detect_zeroes = no->detect_zeroes;
    bs->open_flags = bdrv_node_flags(flags, no);
}

int bdrv_inherit_flags(int flags, int role, bool parent_is_format)
{
    int everywhere = BDRV_O_NO_IO | BDRV_O_NO_NAMES | BDRV_O_AIO_NATIVE | BDRV_O_AIO_THREADS |
                     BDRV_O_SCATTERED;
    int down = flags & (everywhere | BDRV_O_NO_BACKING | BDRV_O_CHECK | BDRV_O_PROTOCOL);
    if (role & BDRV_CHILD_COW) {
        return down & everywhere;
    }
    if (role & BDRV_CHILD_METADATA) {
        down &= ~BDRV_O_NO_IO; /* metadata are read whatever the user wants */
    }
    if (parent_is_format) {
        down |= BDRV_O_PROTOCOL;
    }
    return down;
}
