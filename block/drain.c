/*
 * Drain: a node at rest.
 *
 *   begin:  1. new requests wait at the BlockBackends above    bdrv_parents_quiesce()
 *           2. drivers let go of those that sleep              drain_begin of each node where a
 *                                                              request of theirs may be
 *           3. all that were counted leave                     BlockBackends, then the node itself
 *   end:    the same backwards, without waiting
 *
 * Nobody polls.  A BlockBackend wakes its drainer when its count falls to zero, a node when its own
 * does: bdrv_request_end() sees bs->quiesce and calls bdrv_drain_wake().
 *
 * Invariants
 *  1. Between begin and end no request is inside the node, except those that the drainer itself
 *     makes on it directly.
 *  2. A driver hears drain_begin and drain_end equally often, from the same drain: the nodes that
 *     were told are remembered (and kept alive) with the drain, since the graph changes in between.
 *  3. No lock is held while waiting, and the caller holds no entry of the graph lock.
 *
 * Breakpoints of blkdebug are not released: a test that stops a request wants it stopped.  A drain
 * waits for it then.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/io-int.h"

/* A drain that has begun. */
typedef struct Drain {
    BlockDriverState *bs;
    GPtrArray *told; /* BlockDriverState*, referenced */
} Drain;

static QbMutex drain_lock; /* guards drains; the condition is for in_flight of nodes */
static QbCond drain_idle;
static GPtrArray *drains; /* Drain* */

static void __attribute__((constructor)) drain_init(void)
{
    qb_mutex_init(&drain_lock);
    qb_cond_init(&drain_idle);
}

void bdrv_drain_wake(void)
{
    QB_GUARD(&drain_lock);
    qb_cond_broadcast(&drain_idle);
}

static void wait_node_idle(BlockDriverState *bs)
{
    QB_GUARD(&drain_lock);
    while (atomic_load(&bs->in_flight) > 0) {
        qb_cond_wait(&drain_idle, &drain_lock);
    }
}

/* @bs and each node above it, once, the upper ones first, with a reference. */
static void collect_above(BlockDriverState *bs, GPtrArray *nodes)
{
    if (g_ptr_array_find(nodes, bs, NULL)) {
        return;
    }
    for (guint i = 0; i < bs->parents->len; i++) {
        BdrvChild *edge = g_ptr_array_index(bs->parents, i);
        if (edge->parent) {
            collect_above(edge->parent, nodes);
        }
    }
    bdrv_ref(bs);
    g_ptr_array_add(nodes, bs);
}

/* Those above are quiesced with it: what they still do, in the background, may come down here. */
static void wait_idle(BlockDriverState *bs)
{
    g_autoptr(GPtrArray) nodes = g_ptr_array_new_with_free_func((GDestroyNotify)bdrv_unref);
    bdrv_graph_rdlock();
    collect_above(bs, nodes);
    bdrv_graph_rdunlock();
    for (guint i = 0; i < nodes->len; i++) {
        wait_node_idle(g_ptr_array_index(nodes, i));
    }
}

/* Each node from @bs down, once, with a reference. */
static void collect_below(BlockDriverState *bs, GPtrArray *nodes)
{
    if (g_ptr_array_find(nodes, bs, NULL)) {
        return;
    }
    bdrv_ref(bs);
    g_ptr_array_add(nodes, bs);
    for (guint i = 0; i < bs->children->len; i++) {
        BdrvChild *child = g_ptr_array_index(bs->children, i);
        collect_below(child->bs, nodes);
    }
}

/* Each node that a request on its way to @bs may be in: all below @bs and below what is
 * above it. */
static void collect_around(BlockDriverState *bs, GPtrArray *nodes)
{
    collect_below(bs, nodes);
    for (guint i = 0; i < bs->parents->len; i++) {
        BdrvChild *edge = g_ptr_array_index(bs->parents, i);
        if (edge->parent && !g_ptr_array_find(nodes, edge->parent, NULL)) {
            collect_around(edge->parent, nodes);
        }
    }
}

static GPtrArray *tell_begin(BlockDriverState *bs)
{
    GPtrArray *nodes = g_ptr_array_new();
    BDRV_GRAPH_GUARD();
    collect_around(bs, nodes);
    for (guint i = 0; i < nodes->len; i++) {
        BlockDriverState *node = g_ptr_array_index(nodes, i);
        if (node->drv->drain_begin) {
            node->drv->drain_begin(node);
        }
    }
    return nodes;
}

static void tell_end(GPtrArray *nodes)
{
    for (guint i = 0; i < nodes->len; i++) {
        BlockDriverState *node = g_ptr_array_index(nodes, i);
        if (node->drv->drain_end) {
            BDRV_GRAPH_GUARD();
            node->drv->drain_end(node);
        }
    }
}

static void remember(BlockDriverState *bs, GPtrArray *told)
{
    Drain *d = g_new(Drain, 1);
    *d = (Drain){.bs = bs, .told = told};
    QB_GUARD(&drain_lock);
    if (!drains) {
        drains = g_ptr_array_new();
    }
    g_ptr_array_add(drains, d);
}

/* The told nodes of the youngest drain of @bs, which is forgotten. */
static GPtrArray *recall(BlockDriverState *bs)
{
    QB_GUARD(&drain_lock);
    assert(drains);
    for (guint i = drains->len; i-- > 0;) {
        Drain *d = g_ptr_array_index(drains, i);
        if (d->bs == bs) {
            GPtrArray *told = d->told;
            g_ptr_array_remove_index(drains, i);
            g_free(d);
            return told;
        }
    }
    assert(!"drained_end without drained_begin");
    return NULL;
}

void bdrv_drained_begin(BlockDriverState *bs)
{
    assert(!bdrv_graph_held());
    bdrv_parents_quiesce(bs);
    remember(bs, tell_begin(bs));
    bdrv_parents_wait_idle(bs);
    wait_idle(bs);
}

void bdrv_drained_end(BlockDriverState *bs)
{
    GPtrArray *told = recall(bs);
    tell_end(told);
    bdrv_parents_unquiesce(bs);
    for (guint i = 0; i < told->len; i++) {
        bdrv_unref(g_ptr_array_index(told, i));
    }
    g_ptr_array_free(told, TRUE);
}
