/*
 * Check: guest data that lies in a cluster with another owner gets a cluster of its own.
 *
 *      entry A --.                         entry A --> old cluster (metadata, or A's data)
 *                 > cluster       ==>
 *      entry B --'  (two owners)           entry B --> copy
 *
 * Raising the count would let both go on: the next change of the metadata would destroy guest data,
 * the next guest write the metadata.  So the data is copied as it reads now, and the entry moves
 * (qcow2-check-moves.c):
 *   - metadata (other than the refcount structure, which moves itself), L2 tables or compressed
 *     data on the one side: every data entry moves away;
 *   - metadata or L2 tables and a compressed stream: the cluster is unpacked and moves away; a
 *     stream that does not unpack any more is given up (qcow2-check-lost.c), since nobody can read
 *     it;
 *   - data twice in the active tables with a count that is too low for it: all but the first move.
 *     (With the right count that is legal; somebody shares clusters on purpose.)
 * A zero cluster that keeps a place loses the place.
 *
 * Not done: data encrypted with LUKS, whose key stream depends on the place; entries in tables that
 * are not alone in their cluster.  These stay findings.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-check.h"

/* A cluster with two owners. */
typedef struct Alias {
    bool keep_first;    /* data twice: one entry may stay */
    bool streams_move;  /* so do compressed streams */
    bool data_stays, stream_stays; /* some entry does */
} Alias;

/* ---------------------------------------------------------------- which clusters */

static void consider_cluster(Qcow2Check *c, Qcow2Moves *m, uint64_t cluster, unsigned flags,
                             uint32_t refs)
{
    unsigned kinds = flags & QCOW2_REF_KINDS;
    bool streams = (kinds & QCOW2_REF_COMP) && (kinds & (QCOW2_REF_META | QCOW2_REF_L2));
    if (!(flags & QCOW2_REF_ALIAS) || (!(kinds & QCOW2_REF_DATA) && !streams)) {
        return;
    }
    uint64_t count;
    bool only_data = kinds == QCOW2_REF_DATA;
    if (!qcow2_check_disk_count(c, cluster, &count) || (only_data && count >= refs)) {
        return;
    }
    Alias *alias = g_new0(Alias, 1);
    alias->keep_first = only_data;
    alias->streams_move = streams;
    g_hash_table_insert(m->aliases, (gpointer)(uintptr_t)cluster, alias);
}

void qcow2_check_find_aliases(Qcow2Check *c, Qcow2Moves *m)
{
    g_autoptr(GPtrArray) leaves = qcow2_refmap_sorted(c->map);
    if (c->s->header.crypt_method == QCOW2_CRYPT_LUKS) {
        return;
    }
    for (guint i = 0; i < leaves->len; i++) {
        const Qcow2RefLeaf *leaf = g_ptr_array_index(leaves, i);
        bool any = qcow2_refleaf_any_flags(leaf) & QCOW2_REF_ALIAS;
        for (unsigned slot = 0; any && slot < QCOW2_REF_LEAF; slot++) {
            consider_cluster(c, m, leaf->index * QCOW2_REF_LEAF + slot,
                             qcow2_refleaf_flags(leaf, slot), qcow2_refleaf_count(leaf, slot));
        }
    }
}

static Alias *alias_of(const Qcow2Moves *m, uint64_t cluster)
{
    return g_hash_table_lookup(m->aliases, (gpointer)(uintptr_t)cluster);
}

/* ---------------------------------------------------------------- data */

static bool move_data(const Qcow2EntryMove *x, const Alias *alias)
{
    const BDRVQcow2State *s = x->c->s;
    Qcow2L2Entry becomes = {s->has_subclusters ? 0 : QCOW2_ENTRY_ZERO, x->e.bitmap};
    if ((alias->keep_first && (!alias->data_stays || !x->t->active_refs)) ||
        !qcow2_move_possible(x)) {
        return false;
    }
    if (!qcow2_check_reads_as_zero(s, x->e) &&
        (qcow2_move_read(x->c, x->host, s->cluster_size, x->m->buf) < 0 ||
         !qcow2_move_to_new_cluster(x, x->m->buf, &becomes))) {
        return false;
    }
    qcow2_move_add(x, becomes, "cluster-shared", "guest data copied to the cluster at", false);
    qcow2_move_leave(x);
    return true;
}

/* ---------------------------------------------------------------- streams */

/* Calls @fn for the aliases that the stream of @x touches; true if there is one it must leave. */
static bool for_aliases(const Qcow2EntryMove *x, void (*fn)(Alias *alias))
{
    unsigned bits = x->c->s->cluster_bits;
    bool any = false;
    for (uint64_t i = x->host >> bits; i <= (x->host + x->bytes - 1) >> bits; i++) {
        Alias *alias = alias_of(x->m, i);
        any |= alias && alias->streams_move;
        if (alias && fn) {
            fn(alias);
        }
    }
    return any;
}

static void stream_stays(Alias *alias)
{
    alias->stream_stays = true;
}

/* Unpacks the stream to x->m->buf, if it is one. False: it cannot be read. */
static bool unpack(const Qcow2EntryMove *x, bool *ret_is_stream)
{
    const BDRVQcow2State *s = x->c->s;
    g_autofree uint8_t *stream = g_malloc(x->bytes);
    if (qcow2_move_read(x->c, x->host, x->bytes, stream) < 0) {
        return false;
    }
    *ret_is_stream = qcow2_decompress(s->compression_type, x->m->buf, s->cluster_size, stream,
                                      x->bytes) == 0;
    return true;
}

static bool move_stream(const Qcow2EntryMove *x)
{
    Qcow2L2Entry becomes;
    bool is_stream, readable = x->c->s->header.crypt_method == QCOW2_CRYPT_NONE;
    if (!readable || !qcow2_move_possible(x) || !unpack(x, &is_stream)) {
        return false;
    }
    if (is_stream ? !qcow2_move_to_new_cluster(x, x->m->buf, &becomes)
                  : !qcow2_check_dead_end(x, &becomes)) {
        return false;
    }
    if (is_stream && x->c->s->has_subclusters) {
        becomes.bitmap = UINT32_MAX; /* all of them are allocated */
    }
    qcow2_move_add(x, becomes, "cluster-shared",
                   is_stream ? "compressed data unpacked to the cluster at" : QCOW2_SAY_GIVEN_UP,
                   false);
    qcow2_move_leave(x);
    return true;
}

/* ---------------------------------------------------------------- both */

void qcow2_check_move_aliased(const Qcow2EntryMove *x)
{
    if (!g_hash_table_size(x->m->aliases)) {
        return;
    }
    if (x->e.entry & QCOW2_ENTRY_COMPRESSED) {
        if (!for_aliases(x, NULL) || !move_stream(x)) {
            for_aliases(x, stream_stays);
        }
        return;
    }
    Alias *alias = alias_of(x->m, x->host >> x->c->s->cluster_bits);
    if (alias) {
        alias->data_stays |= !move_data(x, alias);
    }
}

void qcow2_check_alias_stays(const Qcow2EntryMove *x)
{
    Alias *alias = alias_of(x->m, x->host >> x->c->s->cluster_bits);
    if (alias) {
        alias->data_stays = true;
    }
}

void qcow2_check_forget_owners(Qcow2Check *c, const Qcow2Moves *m)
{
    GHashTableIter it;
    gpointer key, value;
    g_hash_table_iter_init(&it, m->aliases);
    while (g_hash_table_iter_next(&it, &key, &value)) {
        const Alias *alias = value;
        uint64_t cluster = (uint64_t)(uintptr_t)key;
        if (!alias->data_stays) {
            qcow2_refmap_clear_kind(c->map, cluster, 1, QCOW2_REF_DATA);
        }
        if (alias->streams_move && !alias->stream_stays) {
            qcow2_refmap_clear_kind(c->map, cluster, 1, QCOW2_REF_COMP);
        }
    }
}
