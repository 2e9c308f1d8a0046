/*
 * Check: guest data that lies in a cluster with another owner gets a cluster of its own.
 *
 *      entry A --.                         entry A --> old cluster (metadata, or A's data)
 *                 > cluster       ==>
 *      entry B --'  (two owners)           entry B --> copy
 *
 * Raising the count would let both go on: the next change of the metadata would destroy guest data,
 * the next guest write the metadata.  So the data is copied as it reads now, and the entry
 * relinked:
 *   - metadata (other than the refcount structure, which moves itself), L2 tables or compressed
 *     data on the one side: every data entry moves away;
 *   - data twice in the active tables with a count that is too low for it: all but the first move.
 *     (With the right count that is legal; somebody shares clusters on purpose.)
 * A zero cluster that keeps a place loses the place.
 *
 *   copy: read, write to a free cluster; the map counts the new reference, no longer the old one
 *   (the caller makes counts stable: the copies' rise to 1)
 *   relink: entries are rewritten one by one; a stop in between leaves some of them as they were
 *
 * Not done: data encrypted with LUKS, whose key stream depends on the place; entries in tables that
 * are not alone in their cluster; compressed data over metadata.  These stay findings.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-check.h"

#include <inttypes.h>

enum { MAX_MOVES = 65536 };

/* An entry to be rewritten. */
typedef struct Move {
    uint64_t pos;   /* of the entry, in the file */
    uint64_t from;  /* cluster */
    uint64_t entry; /* its new first word */
} Move;

/* A cluster with two owners. */
typedef struct Alias {
    bool keep_first; /* data twice: one entry may stay */
    bool stays;      /* some data entry stays */
} Alias;

struct Qcow2Moves {
    GArray *moves;       /* Move */
    GHashTable *aliases; /* cluster -> Alias */
    uint8_t *buf;        /* a cluster */
};

static void free_moves(Qcow2Moves *m)
{
    g_array_unref(m->moves);
    g_hash_table_unref(m->aliases);
    g_free(m->buf);
    g_free(m);
}

/* ---------------------------------------------------------------- which clusters */

static void consider_cluster(Qcow2Check *c, Qcow2Moves *m, uint64_t cluster, unsigned flags,
                             uint32_t refs)
{
    if (!(flags & QCOW2_REF_ALIAS) || !(flags & QCOW2_REF_DATA)) {
        return;
    }
    uint64_t count;
    bool only_data = (flags & QCOW2_REF_KINDS) == QCOW2_REF_DATA;
    if (!qcow2_check_disk_count(c, cluster, &count) || (only_data && count >= refs)) {
        return;
    }
    Alias *alias = g_new0(Alias, 1);
    alias->keep_first = only_data;
    g_hash_table_insert(m->aliases, (gpointer)(uintptr_t)cluster, alias);
}

static void find_aliases(Qcow2Check *c, Qcow2Moves *m)
{
    g_autoptr(GPtrArray) leaves = qcow2_refmap_sorted(c->map);
    for (guint i = 0; i < leaves->len; i++) {
        const Qcow2RefLeaf *leaf = g_ptr_array_index(leaves, i);
        for (unsigned slot = 0; slot < QCOW2_REF_LEAF; slot++) {
            consider_cluster(c, m, leaf->index * QCOW2_REF_LEAF + slot, leaf->flags[slot],
                             qcow2_refleaf_count(leaf, slot));
        }
    }
}

/* ---------------------------------------------------------------- copying */

static int copy_cluster(Qcow2Check *c, uint8_t *buf, uint64_t from, uint64_t to)
{
    size_t bytes = from < c->file_bytes ? MIN(c->s->cluster_size, c->file_bytes - from) : 0;
    memset(buf + bytes, 0, c->s->cluster_size - bytes);
    int ret = bytes ? bdrv_pread(c->bs->file, (int64_t)from, (int64_t)bytes, buf, 0) : 0;
    if (ret < 0) {
        qcow2_check_report(c, BDRV_FINDING_CHECK_ERROR, false, "data-read", from,
                           "ERROR: Could not read data cluster at offset 0x%" PRIx64 ": %s", from,
                           g_strerror(-ret));
        return ret;
    }
    return qcow2_check_write(c, to, c->s->cluster_size, buf);
}

static bool reads_as_zero(const BDRVQcow2State *s, Qcow2L2Entry e)
{
    return s->has_subclusters ? !(uint32_t)e.bitmap : e.entry & QCOW2_ENTRY_ZERO;
}

/* Copies the data of @e, which @t has; true with the new first word in *ret_entry. */
static bool copy_data(Qcow2Check *c, Qcow2Moves *m, const Qcow2CheckTable *t, Qcow2L2Entry e,
                      uint64_t *ret_entry)
{
    BDRVQcow2State *s = c->s;
    if (reads_as_zero(s, e)) {
        *ret_entry = s->has_subclusters ? 0 : QCOW2_ENTRY_ZERO;
        return true;
    }
    bool copied = t->active_refs && t->refs == 1;
    unsigned flags = QCOW2_REF_DATA;
    if (t->active_refs) {
        flags |= QCOW2_REF_ACTIVE | (copied ? QCOW2_REF_COPIED : QCOW2_REF_SHARED);
    }
    int64_t to = qcow2_check_take_clusters(c, 1, flags);
    if (to < 0) {
        return false;
    }
    if (copy_cluster(c, m->buf, e.entry & QCOW2_ENTRY_OFFSET_MASK, (uint64_t)to) < 0) {
        qcow2_check_give_clusters(c, (uint64_t)to, 1, QCOW2_REF_DATA);
        return false;
    }
    if (t->refs > 1) {
        qcow2_refmap_add(c->map, (uint64_t)to >> s->cluster_bits, 1, t->refs - 1,
                         flags & ~QCOW2_REF_ACTIVE, NULL, NULL);
    }
    *ret_entry = (uint64_t)to | (copied ? QCOW2_ENTRY_COPIED : 0);
    return true;
}

/* May this entry be moved, or is it the one that stays? */
static bool may_move(Qcow2Check *c, Qcow2Moves *m, Alias *alias, const Qcow2CheckTable *t,
                     Qcow2L2Entry e)
{
    if (alias->keep_first && (!alias->stays || !t->active_refs)) {
        return false;
    }
    return m->moves->len < MAX_MOVES &&
           !qcow2_offset_into_cluster(c->s, e.entry & QCOW2_ENTRY_OFFSET_MASK) &&
           qcow2_check_exclusive(c, t->offset, c->s->cluster_size, QCOW2_REF_L2);
}

static void handle_entry(Qcow2Check *c, Qcow2Moves *m, const Qcow2CheckTable *t, uint32_t index,
                         Qcow2L2Entry e)
{
    uint64_t cluster = (e.entry & QCOW2_ENTRY_OFFSET_MASK) >> c->s->cluster_bits;
    Alias *alias = g_hash_table_lookup(m->aliases, (gpointer)(uintptr_t)cluster);
    if (!alias) {
        return;
    }
    Move move = {.pos = t->offset + (uint64_t)index * c->s->l2_entry_size, .from = cluster};
    if (!may_move(c, m, alias, t, e) || !copy_data(c, m, t, e, &move.entry)) {
        alias->stays = true;
        return;
    }
    g_array_append_val(m->moves, move);
    qcow2_refmap_sub(c->map, cluster, 1, t->refs - 1);
    qcow2_check_give_clusters(c, cluster << c->s->cluster_bits, 1, 0);
}

static void handle_table(Qcow2Check *c, const Qcow2CheckTable *t, const uint8_t *entries,
                         void *opaque)
{
    for (uint32_t i = 0; i < c->s->l2_entries; i++) {
        Qcow2L2Entry e = qcow2_check_entry(c->s, entries, i);
        if ((e.entry & QCOW2_ENTRY_OFFSET_MASK) && !(e.entry & QCOW2_ENTRY_COMPRESSED)) {
            handle_entry(c, opaque, t, i, e);
        }
    }
}

/* Where all data has left, the other owner is alone. */
static void forget_data_owners(Qcow2Check *c, const Qcow2Moves *m)
{
    GHashTableIter it;
    gpointer key, value;
    g_hash_table_iter_init(&it, m->aliases);
    while (g_hash_table_iter_next(&it, &key, &value)) {
        const Alias *alias = value;
        if (!alias->stays) {
            qcow2_refmap_clear_kind(c->map, (uint64_t)(uintptr_t)key, 1, QCOW2_REF_DATA);
        }
    }
}

Qcow2Moves *qcow2_check_copy_aliases(Qcow2Check *c)
{
    if (c->incomplete || c->s->has_data_file || c->s->header.crypt_method == QCOW2_CRYPT_LUKS) {
        return NULL;
    }
    Qcow2Moves *m = g_new0(Qcow2Moves, 1);
    m->moves = g_array_new(false, false, sizeof(Move));
    m->aliases = g_hash_table_new_full(NULL, NULL, NULL, g_free);
    find_aliases(c, m);
    if (!g_hash_table_size(m->aliases)) {
        free_moves(m);
        return NULL;
    }
    m->buf = g_malloc(c->s->cluster_size);
    qcow2_check_for_tables(c, 0, c->tables->len, handle_table, m);
    forget_data_owners(c, m);
    return m;
}

/* ---------------------------------------------------------------- relinking */

static void relink(Qcow2Check *c, const Move *move)
{
    uint64_t be = htobe64(move->entry);
    if (qcow2_check_write(c, move->pos, sizeof(be), &be) < 0) {
        return;
    }
    uint64_t to = (move->entry & QCOW2_ENTRY_OFFSET_MASK) >> c->s->cluster_bits;
    if (to) {
        qcow2_check_report(c, BDRV_FINDING_INFO, true, "cluster-shared",
                           move->from << c->s->cluster_bits,
                           "Repairing cluster %" PRIu64 ": guest data copied to cluster %" PRIu64,
                           move->from, to);
    }
}

void qcow2_check_relink_aliases(Qcow2Check *c, Qcow2Moves *moves, bool go)
{
    if (!moves) {
        return;
    }
    for (guint i = 0; go && i < moves->moves->len && !c->write_failed; i++) {
        relink(c, &g_array_index(moves->moves, Move, i));
    }
    if (moves->moves->len && !c->write_failed) {
        qcow2_check_barrier(c);
    }
    free_moves(moves);
}
