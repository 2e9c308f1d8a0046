/*
 * What a node derives from its driver and its children: length, limits, file name.
 *
 *     length    driver's getlength(), cached; a change at the bottom goes up along the edges that
 *               carry the content through ("file" of raw and of filters)
 *     limits    the strictest of the children, then the driver's own
 *     filename  [qcow2] -> [file a.img]                     "a.img"         (exact)
 *               [raw offset=512] -> [file a.img]            json:{"driver": "raw", "offset": ...}
 *
 * A name is exact when opening it again gives the same content.  A node passes on the name of its
 * primary child unless something said at run time (an option its driver calls strong, another
 * backing file) makes the name say less than the node shows; then the name is the JSON text.
 *
 * Invariants
 *  1. Limits and names change only at open, or while the node is drained.
 *  2. request_alignment is never 0, and is the driver's own: the core pads for each node anew.
 *
 * SPDX-License-Identifier: MIT
 */
#include <string.h>
#include "block/core-int.h"

/* --- length --- */

static int64_t ask_length(BlockDriverState *bs)
{
    BDRV_GRAPH_GUARD();
    if (bs->drv->getlength) {
        return bs->drv->getlength(bs);
    }
    BdrvChild *c = bdrv_primary_child(bs);
    return c ? bdrv_getlength(c->bs) : -ENOTSUP;
}

int64_t bdrv_refresh_length(BlockDriverState *bs)
{
    int64_t length = ask_length(bs);
    if (length >= 0) {
        atomic_store(&bs->length, length);
    }
    return length;
}

int64_t bdrv_getlength(BlockDriverState *bs)
{
    int64_t cached = atomic_load(&bs->length);
    if (cached >= 0 && bs->drv->getlength && !bs->drv->has_variable_length) {
        return cached;
    }
    return bdrv_refresh_length(bs);
}

/* True when the parent shows the length of the node below. */
static bool passes_length(const BdrvChild *c)
{
    if (!c->parent) {
        return false;
    }
    return (c->role & BDRV_CHILD_FILTERED) ||
           ((c->role & BDRV_CHILD_PRIMARY) && !(c->role & BDRV_CHILD_METADATA));
}

void bdrv_set_length(BlockDriverState *bs, int64_t length)
{
    assert(length >= 0);
    BDRV_GRAPH_GUARD();
    atomic_store(&bs->length, length);
    for (unsigned i = 0; i < bs->parents->len; i++) {
        BdrvChild *c = g_ptr_array_index(bs->parents, i);
        int64_t above = passes_length(c) ? ask_length(c->parent) : -1;
        if (above >= 0) {
            bdrv_set_length(c->parent, above);
        }
    }
}

/* --- limits --- */

/* The smaller one, where 0 stands for "none". */
static int64_t stricter(int64_t a, int64_t b)
{
    return a && b ? MIN(a, b) : MAX(a, b);
}

static void merge_limits(BlockLimits *bl, const BlockLimits *below)
{
    bl->opt_transfer = MAX(bl->opt_transfer, below->opt_transfer);
    bl->max_transfer = (uint32_t)stricter(bl->max_transfer, below->max_transfer);
    bl->opt_mem_alignment = MAX(bl->opt_mem_alignment, below->opt_mem_alignment);
    bl->min_mem_alignment = MAX(bl->min_mem_alignment, below->min_mem_alignment);
    bl->max_iov = (int)stricter(bl->max_iov, below->max_iov);
}

void bdrv_refresh_limits(BlockDriverState *bs)
{
    const int carries_data = BDRV_CHILD_DATA | BDRV_CHILD_FILTERED | BDRV_CHILD_COW;
    BlockLimits bl = {.request_alignment = 1};
    for (unsigned i = 0; i < bs->children->len; i++) {
        BdrvChild *c = g_ptr_array_index(bs->children, i);
        if (c->role & carries_data) {
            merge_limits(&bl, &c->bs->bl);
        }
    }
    bs->bl = bl;
    if (bs->drv->refresh_limits) {
        bs->drv->refresh_limits(bs);
    }
    if (!bs->bl.min_mem_alignment) {
        bs->bl.min_mem_alignment = 1;
    }
    if (!bs->bl.opt_mem_alignment) {
        bs->bl.opt_mem_alignment = MAX(bs->bl.min_mem_alignment, 4096);
    }
    assert(bs->bl.request_alignment > 0);
}

/* --- file name --- */

/* Copies what @bs has of the option @name, alone or as "name.*". */
static void copy_option(json_t *dst, const BlockDriverState *bs, const char *name)
{
    const char *key;
    json_t *value;
    size_t len = strlen(name);
    json_object_foreach(bs->options, key, value) {
        if (!strncmp(key, name, len) && (key[len] == '\0' || key[len] == '.')) {
            json_object_set(dst, key, value);
        }
    }
}

json_t *bdrv_strong_options(const BlockDriverState *bs)
{
    json_t *strong = json_object();
    for (unsigned i = 0; bs->drv->strong_options && bs->drv->strong_options[i]; i++) {
        copy_option(strong, bs, bs->drv->strong_options[i]);
    }
    return strong;
}

static json_t *describe(const BlockDriverState *bs);

/* Adds the children that a description of @bs must name. */
static void describe_children(json_t *desc, const BlockDriverState *bs)
{
    for (unsigned i = 0; i < bs->children->len; i++) {
        const BdrvChild *c = g_ptr_array_index(bs->children, i);
        if (!(c->role & BDRV_CHILD_COW) || bs->has_backing_override) {
            json_object_set_new(desc, c->name, describe(c->bs));
        }
    }
    if (bs->has_backing_override && !bs->backing) {
        json_object_set_new(desc, "backing", json_null());
    }
}

/* {"driver": ..., strong options, "filename", children} */
static json_t *describe(const BlockDriverState *bs)
{
    json_t *desc = json_object();
    json_object_set_new(desc, "driver", json_string(bs->drv->format_name));
    g_autoptr(json_t) strong = bdrv_strong_options(bs);
    json_object_update(desc, strong);
    json_t *filename = json_object_get(bs->options, "filename");
    if (filename) {
        json_object_set(desc, "filename", filename);
    }
    describe_children(desc, bs);
    return desc;
}

/* The plain name that says all about @bs, borrowed; NULL when there is none. */
static const char *exact_filename(const BlockDriverState *bs)
{
    g_autoptr(json_t) strong = bdrv_strong_options(bs);
    if (json_object_size(strong) || bs->has_backing_override) {
        return NULL;
    }
    const BdrvChild *primary = bdrv_primary_child(bs);
    if (primary) {
        return primary->bs->filename_exact ? primary->bs->filename : NULL;
    }
    return qb_opt_peek_string(bs->options, "filename");
}

static char *json_filename(const BlockDriverState *bs)
{
    g_autoptr(json_t) flat = describe(bs);
    g_autoptr(json_t) nested = qb_opts_unflatten(flat, NULL);
    char *text = json_dumps(nested ? nested : flat, JSON_ENCODE_ANY);
    char *name = g_strconcat("json:", text ? text : "{}", NULL);
    free(text);
    return name;
}

void bdrv_refresh_filename(BlockDriverState *bs)
{
    char *name = bs->drv->gather_filename ? bs->drv->gather_filename(bs) : NULL;
    const char *exact = name ? NULL : exact_filename(bs);
    if (exact) {
        name = g_strdup(exact);
    } else if (!name) {
        name = json_filename(bs);
    }
    bs->filename_exact = !g_str_has_prefix(name, "json:");
    g_free(bs->filename);
    bs->filename = name;
}
