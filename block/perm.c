/*
 * Permissions: who may do what to a node, inside this process and towards others.
 *
 *     parents of a node            each edge says:  perm   what the parent does
 *        |     |     |                              shared what it lets others do
 *        v     v     v
 *      [     node     ]  cumulative: perm = OR of all, shared = AND of all
 *        |          |    protocol nodes show both to other processes as file locks
 *      file      backing edges below: computed from the cumulative pair, by the driver or by role
 *
 * A change at one place is settled for everything below in two phases:
 *
 *     for each node, parents before children:   check conflicts, take new locks, compute edges below
 *     all well:    edges get the new values, drivers let go of locks no longer needed
 *     one is not:  edges go back to the old values, drivers go back to the old locks
 *
 * Invariants
 *  1. No edge needs what another edge of the same node does not share.
 *  2. A node that is read-only gives nobody WRITE.
 *  3. Outside bdrv_settle_perms(), new_perm == perm and new_shared == shared on every edge.
 *  4. While both the old and the new state are possible, locks for both are held (check_perm adds,
 *     set_perm and abort_perm take away).
 *
 * Not done: permissions are not checked again per request, only that writing was asked for.
 *
 * SPDX-License-Identifier: MIT
 */
#include <string.h>
#include "block/core-int.h"

static bool will_be_writable(const BlockDriverState *bs)
{
    return bs->reopening ? !bs->reopening->read_only : !bs->read_only;
}

static int will_have_flags(const BlockDriverState *bs)
{
    return bs->reopening ? bs->reopening->flags : bs->open_flags;
}

/* --- what a parent needs of its children --- */

/* A backing file is read, never changed; others may change it if our users do not mind. */
static void cow_perms(unsigned perm, unsigned shared, unsigned *ret_perm, unsigned *ret_shared)
{
    *ret_perm = perm & BLK_PERM_CONSISTENT_READ;
    *ret_shared = BLK_PERM_CONSISTENT_READ | BLK_PERM_WRITE_UNCHANGED;
    if (shared & BLK_PERM_WRITE) {
        *ret_shared |= BLK_PERM_WRITE | BLK_PERM_RESIZE;
    }
}

/* Metadata may change although no guest writes, and nobody else may touch them. */
static void metadata_perms(BlockDriverState *bs, unsigned *perm, unsigned *shared)
{
    if (will_be_writable(bs)) {
        *perm |= BLK_PERM_WRITE | BLK_PERM_RESIZE;
    }
    if (!(will_have_flags(bs) & BDRV_O_NO_IO)) {
        *perm |= BLK_PERM_CONSISTENT_READ;
    }
    *shared &= ~(unsigned)(BLK_PERM_WRITE | BLK_PERM_RESIZE);
}

/* Guest data at another place: writing may make it longer. */
static void data_perms(unsigned *perm, unsigned *shared)
{
    if (*perm & BLK_PERM_WRITE_UNCHANGED) {
        *perm |= BLK_PERM_WRITE;
    }
    if (*perm & BLK_PERM_WRITE) {
        *perm |= BLK_PERM_RESIZE;
    }
    *shared &= ~(unsigned)BLK_PERM_RESIZE;
}

void bdrv_default_perms(BlockDriverState *bs, int role, unsigned perm, unsigned shared,
                        unsigned *ret_perm, unsigned *ret_shared)
{
    if (role & BDRV_CHILD_COW) {
        cow_perms(perm, shared, ret_perm, ret_shared);
        return;
    }
    if (role & BDRV_CHILD_METADATA) {
        metadata_perms(bs, &perm, &shared);
    }
    if (role & BDRV_CHILD_DATA) {
        data_perms(&perm, &shared);
    }
    *ret_perm = perm;
    *ret_shared = shared;
}

static void compute_edge(BdrvChild *c, unsigned perm, unsigned shared)
{
    BlockDriverState *bs = c->parent;
    if (bs->drv->child_perm) {
        bs->drv->child_perm(bs, c, c->role, perm, shared, &c->new_perm, &c->new_shared);
    } else {
        bdrv_default_perms(bs, c->role, perm, shared, &c->new_perm, &c->new_shared);
    }
    if (c->bs->force_share) {
        c->new_shared = BLK_PERM_ALL;
    }
}

/* --- conflicts --- */

static char *perm_names(unsigned perm)
{
    static const char *const text[] = {"consistent read", "write", "write unchanged", "resize"};
    GString *s = g_string_new(NULL);
    for (unsigned i = 0; i < G_N_ELEMENTS(text); i++) {
        if (perm & 1u << i) {
            g_string_append_printf(s, "%s%s", s->len ? ", " : "", text[i]);
        }
    }
    return g_string_free(s, FALSE);
}

static char *describe_user(const BdrvChild *c)
{
    g_autofree char *user =
        c->parent ? g_strdup_printf("node '%s'", c->parent->node_name)
                  : g_strdup("an unnamed block device");
    return g_strdup_printf("%s (uses node '%s' as '%s' child)", user, c->bs->node_name, c->name);
}

static bool check_pair(const BdrvChild *user, const BdrvChild *other, GError **errp)
{
    unsigned conflict = user->new_perm & ~other->new_shared;
    if (!conflict || user == other) {
        return true;
    }
    g_autofree char *names = perm_names(conflict);
    g_autofree char *who = describe_user(user), *against = describe_user(other);
    qb_error_set(errp, EPERM,
                 "Permission conflict on node '%s': permissions '%s' are both required by %s and "
                 "unshared by %s.",
                 user->bs->node_name, names, who, against);
    return false;
}

static bool check_conflicts(const BlockDriverState *bs, GError **errp)
{
    for (unsigned i = 0; i < bs->parents->len; i++) {
        for (unsigned j = 0; j < bs->parents->len; j++) {
            if (!check_pair(g_ptr_array_index(bs->parents, i), g_ptr_array_index(bs->parents, j),
                            errp)) {
                return false;
            }
        }
    }
    return true;
}

static bool check_writable(const BlockDriverState *bs, unsigned perm, GError **errp)
{
    if (!(perm & (BLK_PERM_WRITE | BLK_PERM_WRITE_UNCHANGED)) || will_be_writable(bs)) {
        return true;
    }
    if (bs->reopening && !bs->read_only) {
        qb_error_set(errp, EPERM, "Read-only block node '%s' cannot support read-write users",
                     bs->node_name);
    } else {
        qb_error_set(errp, EPERM, "Block node is read-only");
    }
    return false;
}

/* --- settling --- */

static void cumulative(const BlockDriverState *bs, unsigned *ret_perm, unsigned *ret_shared)
{
    *ret_perm = 0;
    *ret_shared = BLK_PERM_ALL;
    for (unsigned i = 0; i < bs->parents->len; i++) {
        const BdrvChild *c = g_ptr_array_index(bs->parents, i);
        *ret_perm |= c->new_perm;
        *ret_shared &= c->new_shared;
    }
}

/* Appends all nodes of the subtree so that children come before their parents. */
static void collect(BlockDriverState *bs, GHashTable *seen, GPtrArray *order)
{
    if (!g_hash_table_add(seen, bs)) {
        return;
    }
    for (unsigned i = 0; i < bs->children->len; i++) {
        BdrvChild *c = g_ptr_array_index(bs->children, i);
        collect(c->bs, seen, order);
    }
    g_ptr_array_add(order, bs);
}

static bool check_node(BlockDriverState *bs, GError **errp)
{
    unsigned perm, shared;
    cumulative(bs, &perm, &shared);
    if (!check_conflicts(bs, errp) || !check_writable(bs, perm, errp)) {
        return false;
    }
    if (bs->drv->check_perm && !bs->drv->check_perm(bs, perm, shared, errp)) {
        return false;
    }
    for (unsigned i = 0; i < bs->children->len; i++) {
        compute_edge(g_ptr_array_index(bs->children, i), perm, shared);
    }
    return true;
}

/* Edges of requests in flight are read without a lock: only a real change is written. */
static void commit_node(BlockDriverState *bs)
{
    unsigned perm, shared;
    cumulative(bs, &perm, &shared);
    for (unsigned i = 0; i < bs->parents->len; i++) {
        BdrvChild *c = g_ptr_array_index(bs->parents, i);
        if (c->perm != c->new_perm || c->shared != c->new_shared) {
            c->perm = c->new_perm;
            c->shared = c->new_shared;
        }
    }
    if (bs->drv->set_perm) {
        bs->drv->set_perm(bs, perm, shared);
    }
}

static void abort_node(BlockDriverState *bs, bool checked)
{
    for (unsigned i = 0; i < bs->parents->len; i++) {
        BdrvChild *c = g_ptr_array_index(bs->parents, i);
        c->new_perm = c->perm;
        c->new_shared = c->shared;
    }
    if (checked && bs->drv->abort_perm) {
        bs->drv->abort_perm(bs);
    }
}

GPtrArray *bdrv_nodes_below(GPtrArray *roots)
{
    g_autoptr(GHashTable) seen = g_hash_table_new(NULL, NULL);
    g_autoptr(GPtrArray) upwards = g_ptr_array_new();
    for (unsigned i = 0; i < roots->len; i++) {
        collect(g_ptr_array_index(roots, i), seen, upwards);
    }
    GPtrArray *downwards = g_ptr_array_sized_new(upwards->len);
    for (unsigned i = upwards->len; i > 0; i--) {
        g_ptr_array_add(downwards, g_ptr_array_index(upwards, i - 1));
    }
    return downwards;
}

/* Checks @nodes in order; the number that passed. */
static unsigned check_nodes(GPtrArray *nodes, GError **errp)
{
    unsigned n = 0;
    while (n < nodes->len && check_node(g_ptr_array_index(nodes, n), errp)) {
        n++;
    }
    return n;
}

bool bdrv_check_perms(GPtrArray *nodes, GError **errp)
{
    qb_mutex_assert_held(&bdrv_graph_change_lock);
    unsigned passed = check_nodes(nodes, errp);
    if (passed == nodes->len) {
        return true;
    }
    for (unsigned i = 0; i < nodes->len; i++) {
        abort_node(g_ptr_array_index(nodes, i), i < passed);
    }
    return false;
}

void bdrv_commit_perms(GPtrArray *nodes)
{
    qb_mutex_assert_held(&bdrv_graph_change_lock);
    for (unsigned i = 0; i < nodes->len; i++) {
        commit_node(g_ptr_array_index(nodes, i));
    }
}

bool bdrv_settle_perms(BlockDriverState *bs, GError **errp)
{
    qb_mutex_assert_held(&bdrv_graph_change_lock);
    g_autoptr(GPtrArray) roots = g_ptr_array_new();
    g_ptr_array_add(roots, bs);
    g_autoptr(GPtrArray) nodes = bdrv_nodes_below(roots);
    if (!bdrv_check_perms(nodes, errp)) {
        return false;
    }
    bdrv_commit_perms(nodes);
    return true;
}
