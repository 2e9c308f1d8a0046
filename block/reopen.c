/*
 * Reopening: other options for nodes that stay where they are.
 *
 *     overlay   read-only=off        queue:  overlay, its file     (base's options do not change)
 *      | file       `-inherited--> file
 *      | backing    `-not inherited (always read-only)
 *
 *     drain all -> flush -> prepare each -> check permissions with the new modes
 *                              |                   |
 *                 one fails:  abort all that were prepared, old state
 *                                                  `-> commit, lowest nodes first -> old locks go
 *                                                       -> repair what became writable
 *
 * Invariants
 *  1. Nothing that a reader of the node can see changes before every node is prepared and the
 *     permissions of the new state are granted (locks for both states are held then).
 *  2. Commit cannot fail.  Nodes below are committed first, so that a format may write at its commit.
 *  3. An option that a driver does not take at prepare must be what it was.
 *  4. A child follows when it was opened for this parent; a node that was referenced by name has
 *     options of its own.
 *  5. A node that became writable is repaired, where it has to be, before anybody else uses it; where
 *     that fails the nodes become read-only again.
 *
 * Not done: children are not exchanged by reopen; bdrv_set_backing() does that.
 *
 * SPDX-License-Identifier: MIT
 */
#include <string.h>
#include "block/open-int.h"

/* A node and what it is to become. */
typedef struct Entry {
    BDRVReopenState state;
    json_t *explicit_options, *effective;
    BdrvNodeOptions node_options;
    bool drained, prepared, was_read_only;
} Entry;

static void entry_free(gpointer opaque)
{
    Entry *e = opaque;
    if (e->drained) {
        bdrv_drained_end(e->state.bs);
    }
    bdrv_unref(e->state.bs);
    json_decref(e->state.options);
    json_decref(e->explicit_options);
    json_decref(e->effective);
    bdrv_node_options_clear(&e->node_options);
    g_free(e);
}

static void cannot_change(GError **errp, const char *key)
{
    qb_error_set(errp, EINVAL, "Cannot change the option '%s'", key);
}

/* --- which nodes, with which options --- */

/* Steals both objects. */
static Entry *enqueue(GPtrArray *queue, BlockDriverState *bs, json_t *explicit_options,
                      json_t *effective)
{
    Entry *e = g_new0(Entry, 1);
    bdrv_ref(bs);
    e->state.bs = bs;
    e->explicit_options = explicit_options;
    e->effective = effective;
    g_ptr_array_add(queue, e);
    return e;
}

/* Options that make the node what it is, whatever else changes. */
static void keep_identity(json_t *dst, const BlockDriverState *bs)
{
    static const char *const keys[] = {"driver", "filename", "node-name", "read-only"};
    for (size_t i = 0; i < G_N_ELEMENTS(keys); i++) {
        json_t *value = json_object_get(bs->options, keys[i]);
        if (value && !json_object_get(dst, keys[i])) {
            json_object_set(dst, keys[i], value);
        }
    }
}

static bool is_queued(GPtrArray *queue, const BlockDriverState *bs)
{
    for (unsigned i = 0; i < queue->len; i++) {
        const Entry *e = g_ptr_array_index(queue, i);
        if (e->state.bs == bs) {
            return true;
        }
    }
    return false;
}

/* The parent's options for child @name, taken out; a reference must name the node that is there. */
static bool take_child_options(json_t *options, const BdrvChild *c, json_t **ret, GError **errp)
{
    g_autofree char *reference = qb_opt_take_string(options, c->name);
    g_autoptr(json_t) own = qb_opts_take_prefix(options, c->name);
    if (reference && strcmp(reference, c->bs->node_name)) {
        cannot_change(errp, c->name);
        return false;
    }
    if (json_object_size(own) && !c->bs->implicit) {
        g_autofree char *key = g_strdup_printf("%s.%s", c->name,
                                               json_object_iter_key(json_object_iter(own)));
        cannot_change(errp, key);
        return false;
    }
    *ret = g_steal_pointer(&own);
    return true;
}

static bool enqueue_children(GPtrArray *queue, const Entry *parent, GError **errp);

/* What an implicit child will be: its own options, then what the parent's new ones say. */
static bool enqueue_child(GPtrArray *queue, const Entry *parent, const BdrvChild *c,
                          json_t *options, GError **errp)
{
    static const char *const inherited[] = {"cache.direct", "cache.no-flush", "force-share",
                                            "read-only", "auto-read-only", "discard"};
    g_autoptr(json_t) explicit_options = json_copy(c->bs->explicit_options);
    g_autoptr(json_t) effective = json_copy(c->bs->options);
    json_object_update(explicit_options, options);
    for (size_t i = 0; i < G_N_ELEMENTS(inherited); i++) {
        json_object_del(effective, inherited[i]);
    }
    json_object_update(effective, explicit_options);
    bdrv_inherit_options(effective, parent->effective, c->role);
    if (json_equal(effective, c->bs->options)) {
        return true;
    }
    Entry *e = enqueue(queue, c->bs, g_steal_pointer(&explicit_options),
                       g_steal_pointer(&effective));
    return enqueue_children(queue, e, errp);
}

/* Options of children are taken out of the parent's; a node reached by two ways follows the first. */
static bool enqueue_children(GPtrArray *queue, const Entry *parent, GError **errp)
{
    BlockDriverState *bs = parent->state.bs;
    for (unsigned i = 0; i < bs->children->len; i++) {
        const BdrvChild *c = g_ptr_array_index(bs->children, i);
        g_autoptr(json_t) own = NULL;
        if (!take_child_options(parent->effective, c, &own, errp)) {
            return false;
        }
        json_decref(qb_opts_take_prefix(parent->explicit_options, c->name));
        json_object_del(parent->explicit_options, c->name);
        if (c->bs->implicit && !is_queued(queue, c->bs) &&
            !enqueue_child(queue, parent, c, own, errp)) {
            return false;
        }
    }
    return true;
}

/* Graph lock held shared. */
static bool build_queue(GPtrArray *queue, BlockDriverState *bs, json_t *options, bool keep_old,
                        GError **errp)
{
    json_t *explicit_options = keep_old ? json_copy(bs->explicit_options) : json_object();
    json_t *effective = keep_old ? json_copy(bs->options) : json_object();
    json_object_update(explicit_options, options);
    json_object_update(effective, options);
    keep_identity(effective, bs);
    Entry *e = enqueue(queue, bs, explicit_options, effective);
    return enqueue_children(queue, e, errp);
}

/* --- prepare --- */

static bool flush_node(BlockDriverState *bs, GError **errp)
{
    BDRV_GRAPH_GUARD();
    int ret = bs->read_only ? 0 : bdrv_flush(bs);
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Error flushing drive");
    }
    return ret == 0;
}

/* What the driver left must be as it was. @left is used up. */
static bool check_unchanged(const BlockDriverState *bs, json_t *left, GError **errp)
{
    g_auto(BdrvNodeOptions) common = {0};
    if (!bdrv_take_node_options(left, &common, errp)) {
        return false;
    }
    if (common.node_name && strcmp(common.node_name, bs->node_name)) {
        cannot_change(errp, "node-name");
        return false;
    }
    const char *key;
    json_t *value;
    json_object_foreach(left, key, value) {
        json_t *old = json_object_get(bs->options, key);
        if (!old || !json_equal(old, value)) {
            cannot_change(errp, key);
            return false;
        }
    }
    return true;
}

/* The new mode of the node, from its options. */
static bool prepare_state(Entry *e, GError **errp)
{
    BDRVReopenState *state = &e->state;
    g_autoptr(json_t) left = json_copy(e->effective);
    if (!bdrv_take_node_options(left, &e->node_options, errp)) {
        return false;
    }
    e->was_read_only = state->bs->read_only;
    state->read_only = e->node_options.read_only;
    state->flags = bdrv_node_flags(state->bs->open_flags, &e->node_options);
    state->options = json_copy(e->effective);
    return true;
}

static bool prepare_entry(Entry *e, GError **errp)
{
    BDRVReopenState *state = &e->state;
    const BlockDriver *drv = state->bs->drv;
    if (!prepare_state(e, errp) || !flush_node(state->bs, errp)) {
        return false;
    }
    if (!drv->reopen_prepare) {
        qb_error_set(errp, ENOTSUP, "Block %s '%s' used by node '%s' does not support reopening files",
                     drv->protocol_name ? "protocol" : "format", drv->format_name,
                     state->bs->node_name);
        return false;
    }
    if (!drv->reopen_prepare(state, errp)) {
        return false;
    }
    e->prepared = true;
    return check_unchanged(state->bs, state->options, errp);
}

static bool prepare_all(GPtrArray *queue, GError **errp)
{
    for (unsigned i = 0; i < queue->len; i++) {
        if (!prepare_entry(g_ptr_array_index(queue, i), errp)) {
            return false;
        }
    }
    return true;
}

static void abort_all(GPtrArray *queue)
{
    for (unsigned i = queue->len; i > 0; i--) {
        Entry *e = g_ptr_array_index(queue, i - 1);
        if (e->prepared && e->state.bs->drv->reopen_abort) {
            e->state.bs->drv->reopen_abort(&e->state);
        }
    }
}

/* --- commit --- */

static void commit_entry(Entry *e)
{
    BlockDriverState *bs = e->state.bs;
    bdrv_apply_node_options(bs, &e->node_options, e->state.flags);
    json_decref(bs->options);
    json_decref(bs->explicit_options);
    bs->options = g_steal_pointer(&e->effective);
    bs->explicit_options = g_steal_pointer(&e->explicit_options);
    if (bs->drv->reopen_commit) {
        bs->drv->reopen_commit(&e->state);
    }
}

static void set_reopening(GPtrArray *queue, bool on)
{
    for (unsigned i = 0; i < queue->len; i++) {
        Entry *e = g_ptr_array_index(queue, i);
        e->state.bs->reopening = on ? &e->state : NULL;
    }
}

static GPtrArray *affected_nodes(GPtrArray *queue)
{
    g_autoptr(GPtrArray) roots = g_ptr_array_new();
    for (unsigned i = 0; i < queue->len; i++) {
        Entry *e = g_ptr_array_index(queue, i);
        g_ptr_array_add(roots, e->state.bs);
    }
    return bdrv_nodes_below(roots);
}

static void commit_all(GPtrArray *queue)
{
    for (unsigned i = queue->len; i > 0; i--) {
        commit_entry(g_ptr_array_index(queue, i - 1));
    }
}

/* All are prepared: the step from the old state to the new one. */
static bool switch_over(GPtrArray *queue, GError **errp)
{
    QB_GUARD(&bdrv_graph_change_lock);
    g_autoptr(GPtrArray) nodes = affected_nodes(queue);
    set_reopening(queue, true);
    bool ok = bdrv_check_perms(nodes, errp);
    if (ok) {
        commit_all(queue);
        bdrv_commit_perms(nodes);
    }
    set_reopening(queue, false);
    return ok;
}

static void refresh_all(GPtrArray *queue)
{
    for (unsigned i = queue->len; i > 0; i--) {
        Entry *e = g_ptr_array_index(queue, i - 1);
        bdrv_refresh_limits(e->state.bs);
        (void)bdrv_refresh_length(e->state.bs);
    }
}

/* Invariant 5; lowest nodes first, too. */
static bool repair_all(GPtrArray *queue, GError **errp)
{
    for (unsigned i = queue->len; i > 0; i--) {
        const Entry *e = g_ptr_array_index(queue, i - 1);
        BlockDriverState *bs = e->state.bs;
        if (e->was_read_only && !bs->read_only && bs->drv->reopen_repair &&
            !bs->drv->reopen_repair(bs, errp)) {
            return false;
        }
    }
    return true;
}

static bool reopen_drained(BlockDriverState *bs, GPtrArray *queue, json_t *options, bool keep_old,
                           GError **errp)
{
    bdrv_graph_rdlock();
    bool ok = build_queue(queue, bs, options, keep_old, errp);
    bdrv_graph_rdunlock();
    if (!ok) {
        return false;
    }
    for (unsigned i = 0; i < queue->len; i++) {
        Entry *e = g_ptr_array_index(queue, i);
        bdrv_drained_begin(e->state.bs);
        e->drained = true;
    }
    if (!prepare_all(queue, errp) || !switch_over(queue, errp)) {
        abort_all(queue);
        return false;
    }
    refresh_all(queue);
    if (!repair_all(queue, errp)) {
        (void)bdrv_reopen_set_read_only(bs, true, NULL);
        return false;
    }
    return true;
}

bool bdrv_reopen(BlockDriverState *bs, json_t *options, bool keep_old, GError **errp)
{
    assert(!bdrv_graph_held());
    g_autoptr(json_t) owned = options;
    g_autoptr(GPtrArray) queue = g_ptr_array_new_with_free_func(entry_free);
    return reopen_drained(bs, queue, owned, keep_old, errp);
}

bool bdrv_reopen_set_read_only(BlockDriverState *bs, bool read_only, GError **errp)
{
    json_t *options = json_object();
    json_object_set_new(options, "read-only", json_string(read_only ? "on" : "off"));
    return bdrv_reopen(bs, options, true, errp);
}
