/*
 * Backing chains: opening them, naming their members, refusing loops.
 *
 *     overlay ----header says----> "mid.qcow2" (qcow2) ----> "base.raw" (raw)
 *        `-- spec: what the options said about the first one, in place of the header or beside it
 *
 * The chain is opened from the top, one node after the other, so its depth costs no stack.  Each
 * image has an identity: its driver, the options that change what it shows, and the device and inode
 * of the file at the bottom.  An image whose identity is already above it would never end; nesting by
 * way of filters and json:{} names is covered, since the contexts of outer chains are linked.
 *
 * Invariants
 *  1. A backing file is opened read-only.
 *  2. The format of the header is believed; without one the file is probed.
 *  3. A relative name means: beside the file of the overlay, as that was named (links not followed).
 *  4. Names from the header of an image are parsed like any file name, so they may be json:{} or
 *     "proto:..."; a path that came of joining directory and name never is.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "block/open-int.h"

/* --- names --- */

/* The plain file at the bottom of @bs, or NULL. */
static const char *bottom_filename(const BlockDriverState *bs)
{
    const BdrvChild *c;
    while ((c = bdrv_primary_child(bs))) {
        bs = c->bs;
    }
    bool plain = bs->filename_exact && !bdrv_has_protocol_prefix(bs->filename);
    return plain ? bs->filename : NULL;
}

static bool is_whole_name(const char *name)
{
    return name[0] == '/' || g_str_has_prefix(name, "json:") || bdrv_has_protocol_prefix(name);
}

static char *join_directory(const char *file, const char *name)
{
    const char *slash = strrchr(file, '/');
    int len = slash ? (int)(slash - file + 1) : 0;
    g_autofree char *path = g_strdup_printf("%.*s%s", len, file, name);
    return bdrv_has_protocol_prefix(path) ? g_strconcat("./", path, NULL)
                                          : g_steal_pointer(&path);
}

/* The options inside "json:{...}" in place of a name: the file name in them, or NULL. */
static char *filename_in_json(const char *name)
{
    g_autoptr(json_t) nested = qb_json_parse_object(name + strlen("json:"), NULL);
    g_autoptr(json_t) flat = nested ? qb_opts_flatten(nested) : json_object();
    for (;;) {
        char *filename = qb_opt_take_string(flat, "filename");
        if (filename || !qb_opts_has_prefix(flat, "file")) {
            return filename;
        }
        g_autoptr(json_t) below = qb_opts_take_prefix(flat, "file");
        json_t *above = flat;
        flat = g_steal_pointer(&below);
        json_decref(above);
    }
}

char *bdrv_resolve_name_against(const char *image, const char *name, GError **errp)
{
    if (is_whole_name(name)) {
        return g_strdup(name);
    }
    g_autofree char *inner =
        g_str_has_prefix(image, "json:") ? filename_in_json(image) : g_strdup(image);
    if (!inner) {
        qb_error_set(errp, ENOTSUP, "Cannot generate a base directory for '%s'", image);
        return NULL;
    }
    bool has_prefix = bdrv_has_protocol_prefix(inner);
    if (has_prefix && !g_str_has_prefix(inner, "file:")) {
        const char *rest = strrchr(inner, ':') + 1; /* "blkdebug::dir/a.img" */
        return join_directory(rest, name);
    }
    return join_directory(has_prefix ? inner + strlen("file:") : inner, name);
}

char *bdrv_resolve_backing_name(BlockDriverState *bs, const char *name, GError **errp)
{
    if (is_whole_name(name)) {
        return g_strdup(name);
    }
    const char *file = bottom_filename(bs);
    if (!file) {
        qb_error_set(errp, ENOTSUP, "Cannot generate a base directory for node '%s'",
                     bs->node_name);
        return NULL;
    }
    return join_directory(file, name);
}

static bool same_file(const char *a, const char *b)
{
    struct stat sa, sb;
    return stat(a, &sa) == 0 && stat(b, &sb) == 0 && sa.st_dev == sb.st_dev &&
           sa.st_ino == sb.st_ino;
}

/* True when users may call @backing, the backing node of @overlay, by @name. */
static bool is_called(BlockDriverState *overlay, BlockDriverState *backing, const char *name)
{
    if (!strcmp(backing->node_name, name) || !strcmp(backing->filename, name) ||
        !strcmp(overlay->backing_name, name)) {
        return true;
    }
    g_autofree char *resolved = bdrv_resolve_backing_name(overlay, name, NULL);
    if (resolved && !strcmp(backing->filename, resolved)) {
        return true;
    }
    return same_file(name, backing->filename) ||
           (resolved && same_file(resolved, backing->filename));
}

BlockDriverState *bdrv_find_backing_image(BlockDriverState *bs, const char *name)
{
    BDRV_GRAPH_GUARD();
    BlockDriverState *overlay = bdrv_skip_filters(bs), *backing;
    while (overlay && (backing = bdrv_backing_chain_next(overlay))) {
        if (is_called(overlay, backing, name)) {
            return backing;
        }
        overlay = backing;
    }
    return NULL;
}

/* --- loops --- */

static void append_identity(GString *s, const BlockDriver *drv, const json_t *strong)
{
    char *text = json_dumps(strong, JSON_SORT_KEYS | JSON_COMPACT);
    g_string_append_printf(s, "%s%s/", drv->format_name, text ? text : "");
    free(text);
}

static void append_bottom(GString *s, const BlockDriverState *bs)
{
    struct stat st;
    const char *plain = bottom_filename(bs);
    if (plain && stat(plain, &st) == 0) {
        g_string_append_printf(s, "%llx:%llx", (unsigned long long)st.st_dev,
                               (unsigned long long)st.st_ino);
    } else {
        g_string_append(s, bs->filename);
    }
}

char *bdrv_image_identity(const BlockDriver *drv, const json_t *strong, BlockDriverState *file)
{
    GString *s = g_string_new(NULL);
    append_identity(s, drv, strong);
    const BdrvChild *c;
    while ((c = bdrv_primary_child(file))) {
        g_autoptr(json_t) inner = bdrv_strong_options(file);
        append_identity(s, file->drv, inner);
        file = c->bs;
    }
    append_bottom(s, file);
    return g_string_free(s, FALSE);
}

bool bdrv_check_no_loop(const BdrvOpenContext *context, const char *identity,
                        const char *filename, GError **errp)
{
    for (; context; context = context->up) {
        if (g_hash_table_contains(context->above, identity)) {
            qb_error_set(errp, ELOOP, "Backing file loop: '%s' is already above itself in the chain",
                         filename);
            return false;
        }
    }
    return true;
}

static void enter_context(BdrvOpenContext *context, const BlockDriverState *bs)
{
    if (bs->file) {
        g_autoptr(json_t) strong = bdrv_strong_options(bs);
        g_hash_table_add(context->above, bdrv_image_identity(bs->drv, strong, bs->file->bs));
    }
}

/* --- opening --- */

static bool says_file(const json_t *options)
{
    return json_object_get(options, "file.filename") || json_object_get(options, "file");
}

/* Opens the node of @bs's backing file by name and options. */
static BlockDriverState *open_by_name(BlockDriverState *bs, const BdrvBackingSpec *spec,
                                      const BdrvOpenContext *context, BdrvBackingSpec *ret_spec,
                                      GError **errp)
{
    g_autofree char *filename = NULL;
    if (bs->backing_name[0] && !says_file(spec->options)) {
        if (bs->open_flags & BDRV_O_NO_NAMES) {
            qb_error_set(errp, EACCES, "The image names '%s'; files that images name are not to be "
                         "opened", bs->backing_name);
            return NULL;
        }
        filename = bdrv_resolve_backing_name(bs, bs->backing_name, errp);
        if (!filename) {
            return NULL;
        }
    }
    BdrvOpenArgs args = {
        .filename = filename,
        .options = json_copy(spec->options),
        .flags = bdrv_inherit_flags(bs->open_flags, BDRV_CHILD_COW, true),
        .parent_options = bs->options,
        .role = BDRV_CHILD_COW,
        .context = context,
    };
    if (bs->backing_fmt[0]) {
        bdrv_set_default_string(args.options, "driver", bs->backing_fmt);
    }
    return bdrv_open_node(&args, ret_spec, errp);
}

static BlockDriverState *open_by_reference(const BdrvBackingSpec *spec, GError **errp)
{
    if (json_object_size(spec->options)) {
        qb_error_set(errp, EINVAL,
                     "Cannot reference an existing block device with additional options or a new "
                     "filename");
        return NULL;
    }
    return bdrv_ref_node(spec->reference, errp);
}

static bool wants_backing(const BlockDriverState *bs, const BdrvBackingSpec *spec)
{
    return !spec->none &&
           (spec->reference || json_object_size(spec->options) || bs->backing_name[0]);
}

/* Opens and attaches the backing file of @bs; *ret_spec is about the next one below. */
static bool open_one(BlockDriverState *bs, const BdrvBackingSpec *spec,
                     const BdrvOpenContext *context, BdrvBackingSpec *ret_spec, GError **errp)
{
    if (!bs->drv->supports_backing) {
        qb_error_set(errp, EINVAL, "Driver doesn't support backing files");
        return false;
    }
    BlockDriverState *backing = spec->reference
                                    ? open_by_reference(spec, errp)
                                    : open_by_name(bs, spec, context, ret_spec, errp);
    const BdrvAttach at = {.parent = bs, .name = "backing", .role = BDRV_CHILD_COW};
    if (!backing || !bdrv_attach(&at, backing, errp)) {
        g_prefix_error(errp, "Could not open backing file: ");
        return false;
    }
    backing->implicit |= !spec->reference;
    bdrv_refresh_limits(bs);
    return true;
}

/* Options may also say what the header says: then the file name alone still says it all. */
static bool differs_from_header(BlockDriverState *bs)
{
    if (!bs->backing || !bs->backing_name[0]) {
        return bs->backing || bs->backing_name[0];
    }
    const BlockDriverState *backing = bs->backing->bs;
    g_autofree char *resolved = bdrv_resolve_backing_name(bs, bs->backing_name, NULL);
    bool same_format = !bs->backing_fmt[0] || !strcmp(bs->backing_fmt, backing->drv->format_name);
    return !resolved || strcmp(resolved, backing->filename) || !same_format;
}

/* Names that mention the backing file can be made when all of the chain is there. */
static void refresh_names(GPtrArray *chain)
{
    for (unsigned i = chain->len; i > 0; i--) {
        BlockDriverState *bs = g_ptr_array_index(chain, i - 1);
        if (bs->has_backing_override) {
            bs->has_backing_override = differs_from_header(bs);
            bdrv_refresh_filename(bs);
        }
    }
}

/* An error deep down says through how many backing files it came. */
static void prefix_depth(GError **errp, unsigned depth)
{
    while (depth--) {
        g_prefix_error(errp, "Could not open backing file: ");
    }
}

bool bdrv_open_backing_chain(BlockDriverState *bs, const BdrvBackingSpec *spec,
                             const BdrvOpenContext *context, GError **errp)
{
    g_autoptr(GHashTable) above = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, NULL);
    g_autoptr(GPtrArray) chain = g_ptr_array_new();
    BdrvOpenContext here = {.above = above, .up = context};
    g_auto(BdrvBackingSpec) next = {
        .none = spec->none,
        .reference = g_strdup(spec->reference),
        .options = json_copy(spec->options),
    };
    for (;;) {
        g_ptr_array_add(chain, bs);
        bs->has_backing_override =
            next.none || next.reference || json_object_size(next.options) > 0;
        if (!wants_backing(bs, &next)) {
            break;
        }
        enter_context(&here, bs);
        g_auto(BdrvBackingSpec) below = {0};
        if (!open_one(bs, &next, &here, &below, errp)) {
            prefix_depth(errp, chain->len - 1);
            return false;
        }
        if (next.reference) {
            break;
        }
        bdrv_backing_spec_clear(&next);
        next = below;
        below = (BdrvBackingSpec){0};
        bs = bs->backing->bs;
    }
    refresh_names(chain);
    return true;
}

/* --- temporary overlays --- */

/* Makes an empty file; its name, or NULL and error. */
static char *make_temporary_file(GError **errp)
{
    const char *dir = getenv("TMPDIR");
    g_autofree char *path = g_strconcat(dir && *dir ? dir : "/var/tmp", "/qb.XXXXXX", NULL);
    int fd = mkstemp(path);
    if (fd < 0) {
        qb_error_set_errno(errp, errno, "Could not get temporary filename '%s'", path);
        return NULL;
    }
    close(fd);
    return g_steal_pointer(&path);
}

static void move_option(json_t *dst, const json_t *src, const char *key)
{
    json_t *value = json_object_get(src, key);
    if (value) {
        json_object_set(dst, key, value);
    }
}

static BlockDriverState *open_overlay(const char *path, int64_t size, const json_t *user_options,
                                      GError **errp)
{
    g_autoptr(json_t) create = json_pack("{sI}", "size", (json_int_t)size);
    if (!bdrv_img_create(path, "qcow2", create, NULL, errp)) {
        return NULL;
    }
    BdrvOpenArgs args = {
        .options = json_pack("{ssssssssss}", "driver", "qcow2", "file.driver", "file",
                             "file.filename", path, "read-only", "off", "cache.no-flush", "on"),
        .flags = BDRV_O_RDWR,
    };
    move_option(args.options, user_options, "discard");
    move_option(args.options, user_options, "detect-zeroes");
    return bdrv_open_tree(&args, errp);
}

BlockDriverState *bdrv_append_temporary(BlockDriverState *base, const json_t *options,
                                        GError **errp)
{
    BlockDriverState *overlay = NULL;
    int64_t size = bdrv_getlength(base);
    g_autofree char *path = size < 0 ? NULL : make_temporary_file(errp);
    if (size < 0) {
        qb_error_set_errno(errp, (int)size, "Could not get image size");
    } else if (path) {
        overlay = open_overlay(path, size, options, errp);
        unlink(path); /* at once: however the process ends, nothing stays behind */
    }
    if (overlay && !bdrv_set_backing(overlay, base, errp)) {
        g_clear_pointer(&overlay, bdrv_unref);
    }
    bdrv_unref(base);
    return overlay;
}
