/*
 * Nodes: how they come to be, what they are called, when they end.
 *
 *     new_node --driver's open--> opened --last reference dropped--> flush, driver's close,
 *        refcnt 1                                                    children unlinked, freed
 *
 *     names:  "overlay" -> node,  "#block001" -> node, ...           guarded by names_lock
 *
 * Invariants
 *  1. Each parent edge holds one reference to the node below; so a node that ends has no parents.
 *  2. A node is in the name table from its making to just before it is freed.
 *  3. Closing a chain of any depth uses no stack per layer: nodes that lose their last reference
 *     wait in a list.
 *
 * Not done: no list of all nodes in an order; a monitor that wants one sorts the table.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdlib.h>
#include <string.h>
#include "block/core-int.h"
#include "util/iov.h"

static QbMutex names_lock = {.m = PTHREAD_MUTEX_INITIALIZER};
static GHashTable *names;       /* node name -> BlockDriverState*, guarded by names_lock */
static unsigned next_auto_name; /* guarded by names_lock */

static bool is_wellformed_name(const char *name)
{
    if (!g_ascii_isalpha(name[0])) {
        return false;
    }
    return strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._") ==
           strlen(name);
}

static bool check_name(const char *name, GError **errp)
{
    if (!is_wellformed_name(name)) {
        qb_error_set(errp, EINVAL, "Invalid node-name: '%s'", name);
        return false;
    }
    if (strlen(name) > BDRV_NODE_NAME_MAX) {
        qb_error_set(errp, EINVAL, "Node name too long");
        return false;
    }
    return true;
}

/* Enters @bs under @name, or under a name of our own making when it is NULL. */
static bool register_name(BlockDriverState *bs, const char *name, GError **errp)
{
    if (name && !check_name(name, errp)) {
        return false;
    }
    QB_GUARD(&names_lock);
    if (!names) {
        names = g_hash_table_new(g_str_hash, g_str_equal);
    }
    if (name && g_hash_table_contains(names, name)) {
        qb_error_set(errp, EEXIST, "Duplicate nodes with node-name='%s'", name);
        return false;
    }
    if (name) {
        g_strlcpy(bs->node_name, name, sizeof(bs->node_name));
    } else {
        g_snprintf(bs->node_name, sizeof(bs->node_name), "#block%03u", next_auto_name++);
    }
    g_hash_table_insert(names, bs->node_name, bs);
    return true;
}

static void unregister_name(BlockDriverState *bs)
{
    QB_GUARD(&names_lock);
    if (bs->node_name[0]) {
        g_hash_table_remove(names, bs->node_name);
    }
    if (names && g_hash_table_size(names) == 0) {
        g_clear_pointer(&names, g_hash_table_destroy);
    }
}

BlockDriverState *bdrv_find_node(const char *node_name)
{
    QB_GUARD(&names_lock);
    return names ? g_hash_table_lookup(names, node_name) : NULL;
}

/* A reference unless the last one is gone already. */
static bool try_ref(BlockDriverState *bs)
{
    int n = atomic_load(&bs->refcnt);
    while (n > 0) {
        if (atomic_compare_exchange_weak(&bs->refcnt, &n, n + 1)) {
            return true;
        }
    }
    return false;
}

BlockDriverState *bdrv_ref_node(const char *name, GError **errp)
{
    QB_GUARD(&names_lock);
    BlockDriverState *bs = names ? g_hash_table_lookup(names, name) : NULL;
    if (!bs || !try_ref(bs)) {
        qb_error_set(errp, ENODEV, "Cannot find device='%s' nor node-name='%s'", name, name);
        return NULL;
    }
    return bs;
}

static void free_node(BlockDriverState *bs)
{
    unregister_name(bs);
    assert(bs->parents->len == 0 && bs->children->len == 0);
    bdrv_dirty_list_destroy(&bs->dirty);
    qb_range_lock_destroy(&bs->ranges);
    g_ptr_array_unref(bs->children);
    g_ptr_array_unref(bs->parents);
    json_decref(bs->options);
    json_decref(bs->explicit_options);
    g_free(bs->filename);
    g_free(bs->backing_name);
    g_free(bs->backing_fmt);
    g_free(bs->opaque);
    g_free(bs);
}

BlockDriverState *bdrv_new_node(const BlockDriver *drv, const char *node_name, GError **errp)
{
    BlockDriverState *bs = g_new0(BlockDriverState, 1);
    bs->drv = drv;
    bs->opaque = drv->instance_size ? g_malloc0(drv->instance_size) : NULL;
    bs->filename = g_strdup("");
    bs->backing_name = g_strdup("");
    bs->backing_fmt = g_strdup("");
    bs->children = g_ptr_array_new();
    bs->parents = g_ptr_array_new();
    bs->bl.request_alignment = 1;
    qb_range_lock_init(&bs->ranges);
    bdrv_dirty_list_init(&bs->dirty);
    atomic_init(&bs->refcnt, 1);
    atomic_init(&bs->length, -1);
    if (!register_name(bs, node_name, errp)) {
        free_node(bs);
        return NULL;
    }
    return bs;
}

void bdrv_ref(BlockDriverState *bs)
{
    unsigned before = (unsigned)atomic_fetch_add(&bs->refcnt, 1);
    assert(before > 0);
    (void)before;
}

/* Drops a reference; a node that has none left goes to @ending. */
static void drop(BlockDriverState *bs, GPtrArray *ending)
{
    int before = atomic_fetch_sub(&bs->refcnt, 1);
    assert(before > 0);
    if (before == 1) {
        g_ptr_array_add(ending, bs);
    }
}

/* An error has nobody to go to here: users that care flush before they let go. */
static void flush_before_close(BlockDriverState *bs)
{
    BDRV_GRAPH_GUARD();
    if (!bs->read_only) {
        (void)bdrv_flush(bs);
    }
}

static void close_node(BlockDriverState *bs, GPtrArray *ending)
{
    if (bs->opened) {
        bdrv_store_bitmaps_at_close(bs); /* flushes as it needs to: the next flush has less to do */
        flush_before_close(bs);
        if (bs->drv->close) {
            bs->drv->close(bs);
        }
    }
    while (bs->children->len) {
        drop(bdrv_unlink_child(g_ptr_array_index(bs->children, bs->children->len - 1)), ending);
    }
    free_node(bs);
}

void bdrv_unref(BlockDriverState *bs)
{
    if (!bs) {
        return;
    }
    g_autoptr(GPtrArray) ending = g_ptr_array_new();
    drop(bs, ending);
    while (ending->len) {
        assert(!bdrv_graph_held());
        close_node(g_ptr_array_steal_index(ending, ending->len - 1), ending);
    }
}

/* --- facts --- */

const char *bdrv_get_node_name(const BlockDriverState *bs)
{
    return bs->node_name;
}

const char *bdrv_get_format_name(const BlockDriverState *bs)
{
    return bs->drv->format_name;
}

const char *bdrv_filename(const BlockDriverState *bs)
{
    return bs->filename;
}

bool bdrv_is_read_only(const BlockDriverState *bs)
{
    return bs->read_only;
}

const char *bdrv_backing_name(const BlockDriverState *bs)
{
    return bs->backing_name;
}

const char *bdrv_backing_format(const BlockDriverState *bs)
{
    return bs->backing_fmt;
}

void bdrv_set_backing_names(BlockDriverState *bs, const char *file, const char *fmt)
{
    g_free(bs->backing_name);
    g_free(bs->backing_fmt);
    bs->backing_name = g_strdup(file ? file : "");
    bs->backing_fmt = g_strdup(fmt ? fmt : "");
}

const BlockLimits *bdrv_limits(const BlockDriverState *bs)
{
    return &bs->bl;
}

void *bdrv_try_blockalign(BlockDriverState *bs, size_t size)
{
    size_t align = MAX(bs->bl.opt_mem_alignment, sizeof(void *));
    return qb_try_memalign(MAX(align, bs->bl.min_mem_alignment), MAX(size, 1));
}

bool bdrv_can_make_empty(const BlockDriverState *bs)
{
    return bs->drv->make_empty != NULL;
}

bool bdrv_can_snapshot(const BlockDriverState *bs)
{
    return bs->drv->snapshot_create != NULL;
}

bool bdrv_supports_compression(const BlockDriverState *bs)
{
    return bs->drv->pwritev_compressed != NULL;
}
