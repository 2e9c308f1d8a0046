/*
 * The graph: nodes and edges.  Every change of a pointer in it is in this file.
 *
 *      BlockBackend                     an edge is a BdrvChild, listed at both ends:
 *          | root                         child->parent->children  (or child->blk)
 *       [overlay]                         child->bs->parents
 *        |     \ backing                parent->file and parent->backing are short cuts into children
 *        | file [base]
 *     [file]      | file
 *              [file]
 *
 * Who may look: whoever holds the graph lock, shared or exclusive, or bdrv_graph_change_lock.
 * Who may change: whoever holds both bdrv_graph_change_lock and the graph lock exclusively.
 *
 * Invariants
 *  1. An edge holds one reference to the node below it.
 *  2. There is no cycle: bdrv_attach() refuses one.
 *  3. Pointers switch under the exclusive lock, and nothing else happens under it: permissions (file
 *     locks) are settled before or after, references dropped after.
 *  4. A node counts in `quiesce` its own drains plus one for each edge below it whose node is
 *     quiesced; edge->quiesced says whether this edge is counted.  Edges come and go with their share.
 *
 * Not done: no transactions over several edges but the one of bdrv_set_backing().
 *
 * SPDX-License-Identifier: MIT
 */
#include <string.h>
#include "block/core-int.h"

QbMutex bdrv_graph_change_lock = {.m = PTHREAD_MUTEX_INITIALIZER};

/* Guards the counting of quiesce and edge->quiesced against other drains. Leaf. */
static QbMutex quiesce_lock = {.m = PTHREAD_MUTEX_INITIALIZER};

/* --- looking --- */

/* True when @needle is @bs or below it. */
static bool is_below(BlockDriverState *bs, const BlockDriverState *needle)
{
    if (bs == needle) {
        return true;
    }
    for (unsigned i = 0; i < bs->children->len; i++) {
        BdrvChild *c = g_ptr_array_index(bs->children, i);
        if (is_below(c->bs, needle)) {
            return true;
        }
    }
    return false;
}

BdrvChild *bdrv_primary_child(const BlockDriverState *bs)
{
    for (unsigned i = 0; i < bs->children->len; i++) {
        BdrvChild *c = g_ptr_array_index(bs->children, i);
        if (c->role & BDRV_CHILD_PRIMARY) {
            return c;
        }
    }
    return NULL;
}

BlockDriverState *bdrv_skip_filters(BlockDriverState *bs)
{
    while (bs && bs->drv->is_filter) {
        BdrvChild *c = bs->file ? bs->file : bdrv_primary_child(bs);
        bs = c ? c->bs : NULL;
    }
    return bs;
}

BlockDriverState *bdrv_backing_chain_next(BlockDriverState *bs)
{
    BDRV_GRAPH_GUARD();
    bs = bdrv_skip_filters(bs);
    return bs && bs->backing ? bdrv_skip_filters(bs->backing->bs) : NULL;
}

/* --- quiescing --- */

static void quiesce_node(BlockDriverState *bs);
static void unquiesce_node(BlockDriverState *bs);

static void quiesce_edge(BdrvChild *c)
{
    assert(!c->quiesced);
    c->quiesced = true;
    if (c->parent) {
        quiesce_node(c->parent);
    } else {
        blk_quiesce(c->blk);
    }
}

static void unquiesce_edge(BdrvChild *c)
{
    assert(c->quiesced);
    c->quiesced = false;
    if (c->parent) {
        unquiesce_node(c->parent);
    } else {
        blk_unquiesce(c->blk);
    }
}

static void quiesce_node(BlockDriverState *bs)
{
    if (atomic_fetch_add(&bs->quiesce, 1) > 0) {
        return;
    }
    for (unsigned i = 0; i < bs->parents->len; i++) {
        quiesce_edge(g_ptr_array_index(bs->parents, i));
    }
}

static void unquiesce_node(BlockDriverState *bs)
{
    unsigned before = atomic_fetch_sub(&bs->quiesce, 1);
    assert(before > 0);
    if (before > 1) {
        return;
    }
    for (unsigned i = 0; i < bs->parents->len; i++) {
        unquiesce_edge(g_ptr_array_index(bs->parents, i));
    }
}

void bdrv_parents_quiesce(BlockDriverState *bs)
{
    BDRV_GRAPH_GUARD();
    QB_GUARD(&quiesce_lock);
    quiesce_node(bs);
}

void bdrv_parents_unquiesce(BlockDriverState *bs)
{
    BDRV_GRAPH_GUARD();
    QB_GUARD(&quiesce_lock);
    unquiesce_node(bs);
}

static void collect_backends(BlockDriverState *bs, GHashTable *seen, GPtrArray *blks)
{
    if (!g_hash_table_add(seen, bs)) {
        return;
    }
    for (unsigned i = 0; i < bs->parents->len; i++) {
        BdrvChild *c = g_ptr_array_index(bs->parents, i);
        if (c->parent) {
            collect_backends(c->parent, seen, blks);
        } else if (blk_try_ref(c->blk)) {
            g_ptr_array_add(blks, c->blk);
        }
    }
}

void bdrv_parents_wait_idle(BlockDriverState *bs)
{
    g_autoptr(GPtrArray) blks = g_ptr_array_new_with_free_func((GDestroyNotify)blk_unref);
    bdrv_graph_rdlock();
    g_autoptr(GHashTable) seen = g_hash_table_new(NULL, NULL);
    collect_backends(bs, seen, blks);
    bdrv_graph_rdunlock();
    assert(!bdrv_graph_held()); /* a request of this thread would wait for itself */
    for (unsigned i = 0; i < blks->len; i++) {
        blk_wait_idle(g_ptr_array_index(blks, i));
    }
}

/* --- changing --- */

static BdrvChild **shortcut_of(const BdrvChild *c)
{
    if (!c->parent) {
        return NULL;
    }
    /* a filter calls it what it likes (blkdebug: "image") */
    bool filtered = c->parent->drv->is_filter && (c->role & BDRV_CHILD_PRIMARY);
    if (filtered || !strcmp(c->name, "file")) {
        return &c->parent->file;
    }
    return !strcmp(c->name, "backing") ? &c->parent->backing : NULL;
}

/* Enters a new edge at both ends. Graph lock held exclusively. */
static void link_locked(BdrvChild *c)
{
    g_ptr_array_add(c->bs->parents, c);
    if (c->parent) {
        g_ptr_array_add(c->parent->children, c);
    }
    BdrvChild **shortcut = shortcut_of(c);
    if (shortcut) {
        assert(!*shortcut);
        *shortcut = c;
    }
    if (atomic_load(&c->bs->quiesce) > 0) {
        quiesce_edge(c);
    }
}

static void unlink_locked(BdrvChild *c)
{
    if (c->quiesced) {
        unquiesce_edge(c);
    }
    BdrvChild **shortcut = shortcut_of(c);
    if (shortcut && *shortcut == c) {
        *shortcut = NULL;
    }
    if (c->parent) {
        g_ptr_array_remove(c->parent->children, c);
    }
    g_ptr_array_remove(c->bs->parents, c);
}

static void free_edge(BdrvChild *c)
{
    g_free(c->name);
    g_free(c);
}

static BdrvChild *new_edge(const BdrvAttach *at, BlockDriverState *bs)
{
    assert(!at->parent != !at->blk);
    BdrvChild *c = g_new0(BdrvChild, 1);
    c->bs = bs;
    c->parent = at->parent;
    c->blk = at->blk;
    c->name = g_strdup(at->name);
    c->role = at->role;
    c->shared = c->new_shared = BLK_PERM_ALL;
    return c;
}

static bool check_no_cycle(const BdrvAttach *at, BlockDriverState *bs, GError **errp)
{
    if (!at->parent || !is_below(bs, at->parent)) {
        return true;
    }
    qb_error_set(errp, EINVAL, "Making '%s' a %s child of '%s' would create a cycle",
                 bs->node_name, at->name, at->parent->node_name);
    return false;
}

/* Permissions once the edge is there: those of a root are given, all others follow from above. */
static bool settle_edge(BdrvChild *c, const BdrvAttach *at, GError **errp)
    QB_REQUIRES(bdrv_graph_change_lock)
{
    if (c->parent) {
        return bdrv_settle_perms(c->parent, errp);
    }
    c->new_perm = at->perm;
    c->new_shared = at->shared;
    return bdrv_settle_perms(c->bs, errp);
}

static BdrvChild *attach_locked(const BdrvAttach *at, BlockDriverState *bs, GError **errp)
    QB_REQUIRES(bdrv_graph_change_lock)
{
    if (!check_no_cycle(at, bs, errp)) {
        return NULL;
    }
    BdrvChild *c = new_edge(at, bs);
    bdrv_graph_wrlock();
    link_locked(c);
    bdrv_graph_wrunlock();
    if (settle_edge(c, at, errp)) {
        return c;
    }
    bdrv_graph_wrlock();
    unlink_locked(c);
    bdrv_graph_wrunlock();
    free_edge(c);
    return NULL;
}

BdrvChild *bdrv_attach(const BdrvAttach *at, BlockDriverState *bs, GError **errp)
{
    assert(!bdrv_graph_held());
    qb_mutex_lock(&bdrv_graph_change_lock);
    BdrvChild *c = attach_locked(at, bs, errp);
    qb_mutex_unlock(&bdrv_graph_change_lock);
    if (!c) {
        bdrv_unref(bs);
    }
    return c;
}

BlockDriverState *bdrv_unlink_child(BdrvChild *child)
{
    BlockDriverState *bs = child->bs;
    assert(!bdrv_graph_held());
    QB_GUARD(&bdrv_graph_change_lock);
    bdrv_graph_wrlock();
    unlink_locked(child);
    bdrv_graph_wrunlock();
    free_edge(child);
    /* Fewer users need no more than before: this lets go of locks and cannot fail. A node that only
     * the caller still holds is about to end, with all its locks (or to be settled when it is
     * attached again); for a long chain that ends, settling at each layer would be quadratic. */
    if (atomic_load(&bs->refcnt) > 1) {
        (void)bdrv_settle_perms(bs, NULL);
    }
    return bs;
}

void bdrv_detach_child(BdrvChild *child)
{
    if (child) {
        bdrv_unref(bdrv_unlink_child(child));
    }
}

/* --- switching the backing file --- */

/* The new edge, settled, in place of the old one; the old one is unlinked but not freed. */
static bool switch_backing_locked(BlockDriverState *bs, BlockDriverState *backing,
                                  BdrvChild **ret_old, GError **errp)
    QB_REQUIRES(bdrv_graph_change_lock)
{
    const BdrvAttach at = {.parent = bs, .name = "backing", .role = BDRV_CHILD_COW};
    if (backing && !check_no_cycle(&at, backing, errp)) {
        return false;
    }
    BdrvChild *old = bs->backing, *new = backing ? new_edge(&at, backing) : NULL;
    bdrv_graph_wrlock();
    if (old) {
        unlink_locked(old);
    }
    if (new) {
        link_locked(new);
    }
    bdrv_graph_wrunlock();
    if (bdrv_settle_perms(bs, errp)) {
        *ret_old = old;
        return true;
    }
    bdrv_graph_wrlock();
    if (new) {
        unlink_locked(new);
    }
    if (old) {
        link_locked(old);
    }
    bdrv_graph_wrunlock();
    if (new) {
        free_edge(new);
    }
    return false;
}

/* Permissions of a node that lost a parent: those it no longer needs are given back. */
static void release_edge(BdrvChild *c)
{
    if (!c) {
        return;
    }
    BlockDriverState *bs = c->bs;
    free_edge(c);
    qb_mutex_lock(&bdrv_graph_change_lock);
    (void)bdrv_settle_perms(bs, NULL);
    qb_mutex_unlock(&bdrv_graph_change_lock);
    bdrv_unref(bs);
}

bool bdrv_set_backing(BlockDriverState *bs, BlockDriverState *backing, GError **errp)
{
    if (backing && !bs->drv->supports_backing) {
        qb_error_set(errp, EINVAL, "Driver '%s' of node '%s' does not support backing files",
                     bs->drv->format_name, bs->node_name);
        return false;
    }
    if (backing) {
        bdrv_ref(backing);
    }
    BdrvChild *old = NULL;
    bdrv_drained_begin(bs);
    qb_mutex_lock(&bdrv_graph_change_lock);
    bool ok = switch_backing_locked(bs, backing, &old, errp);
    if (ok) {
        bdrv_refresh_limits(bs);
    }
    qb_mutex_unlock(&bdrv_graph_change_lock);
    bdrv_drained_end(bs);
    release_edge(old);
    if (!ok && backing) {
        bdrv_unref(backing);
    }
    return ok;
}
