/*
 * Check: L2 entries that a repair makes point elsewhere, to clusters that it takes into use.
 *
 *   qcow2_check_plan_moves()                          qcow2_check_make_moves()
 *     tables --> entries --> whose is it?               entry by entry, in place
 *                  |-- a stream, or data in a cluster
 *                  |   with a second owner             qcow2-check-alias.c
 *                  `-- leads nowhere                   qcow2-check-lost.c
 *
 *   plan: what an entry will refer to is written to free clusters, and the map counts the new
 *   references, no longer the old ones       (the caller makes counts stable)
 *   make: entries are rewritten one by one; a stop in between leaves some of them as they were
 *
 * Invariants
 *   1. An entry is rewritten only in a table that is alone in its cluster, or that shares it with
 *      nothing but a stream of that very entry.
 *   2. Everything is read before the first entry changes.
 *   3. The list is bounded; what does not fit stays a finding until the next repair.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-check.h"

#include <inttypes.h>

enum { MAX_MOVES = 1 << 20 };

/* An entry to be rewritten. */
typedef struct Move {
    uint64_t pos;         /* of the entry, in the file */
    Qcow2L2Entry becomes;
    uint64_t from;        /* host offset that it has now */
    const char *code, *what;
    uint64_t to;          /* told after @what, 0: not */
    bool finding;         /* is one that was counted */
} Move;

static void free_moves(Qcow2Moves *m)
{
    g_array_unref(m->moves);
    g_hash_table_unref(m->aliases);
    g_free(m->buf);
    g_free(m);
}

/* ---------------------------------------------------------------- for those who judge entries */

static uint64_t first_cluster(const Qcow2EntryMove *x)
{
    return x->host >> x->c->s->cluster_bits;
}

static uint64_t last_cluster(const Qcow2EntryMove *x)
{
    return (x->host + x->bytes - 1) >> x->c->s->cluster_bits;
}

/* Does nothing but the stream of @x lie in the table that @x is in? */
static bool is_in_own_table(const Qcow2EntryMove *x)
{
    const Qcow2RefMap *map = x->c->map;
    uint64_t table = x->t->offset >> x->c->s->cluster_bits;
    unsigned kinds = qcow2_refmap_flags(map, table) & QCOW2_REF_KINDS;
    return kinds == (QCOW2_REF_L2 | QCOW2_REF_COMP) && (x->e.entry & QCOW2_ENTRY_COMPRESSED) &&
           table >= first_cluster(x) && table <= last_cluster(x) &&
           qcow2_refmap_count(map, table) == (uint64_t)x->t->refs * 2;
}

bool qcow2_move_possible(const Qcow2EntryMove *x)
{
    const Qcow2Check *c = x->c;
    bool alone = qcow2_check_exclusive(c, x->t->offset, c->s->cluster_size, QCOW2_REF_L2);
    return x->m->moves->len < MAX_MOVES && (alone || is_in_own_table(x));
}

bool qcow2_move_to_new_cluster(const Qcow2EntryMove *x, const uint8_t *data, Qcow2L2Entry *ret)
{
    Qcow2Check *c = x->c;
    const Qcow2CheckTable *t = x->t;
    bool copied = t->active_refs && t->refs == 1;
    unsigned flags = QCOW2_REF_DATA;
    if (t->active_refs) {
        flags |= QCOW2_REF_ACTIVE | (copied ? QCOW2_REF_COPIED : QCOW2_REF_SHARED);
    }
    int64_t to = qcow2_check_take_clusters(c, 1, flags);
    if (to < 0) {
        return false;
    }
    if (qcow2_check_write(c, (uint64_t)to, c->s->cluster_size, data) < 0) {
        qcow2_check_give_clusters(c, (uint64_t)to, 1, QCOW2_REF_DATA);
        return false;
    }
    if (t->refs > 1) {
        qcow2_refmap_add(c->map, (uint64_t)to >> c->s->cluster_bits, 1, t->refs - 1,
                         flags & ~QCOW2_REF_ACTIVE, NULL, NULL);
    }
    *ret = (Qcow2L2Entry){(uint64_t)to | (copied ? QCOW2_ENTRY_COPIED : 0), x->e.bitmap};
    return true;
}

void qcow2_move_leave(const Qcow2EntryMove *x)
{
    uint64_t first = first_cluster(x), n = last_cluster(x) - first + 1;
    if (x->t->refs > 1) {
        qcow2_refmap_sub(x->c->map, first, n, x->t->refs - 1);
    }
    qcow2_check_give_clusters(x->c, first << x->c->s->cluster_bits, n, 0);
}

void qcow2_move_add(const Qcow2EntryMove *x, Qcow2L2Entry becomes, const char *code,
                    const char *what, bool finding)
{
    Move move = {
        .pos = x->t->offset + (uint64_t)x->index * x->c->s->l2_entry_size,
        .becomes = becomes, .from = x->host, .code = code, .what = what, .finding = finding};
    if (!(becomes.entry & QCOW2_ENTRY_COMPRESSED)) {
        move.to = becomes.entry & QCOW2_ENTRY_OFFSET_MASK;
    }
    g_array_append_val(x->m->moves, move);
}

int qcow2_move_read(Qcow2Check *c, uint64_t offset, size_t bytes, uint8_t *buf)
{
    size_t present = offset < c->file_bytes ? MIN(bytes, c->file_bytes - offset) : 0;
    memset(buf + present, 0, bytes - present);
    int ret = present ? bdrv_pread(c->bs->file, (int64_t)offset, (int64_t)present, buf, 0) : 0;
    if (ret < 0) {
        qcow2_check_report(c, BDRV_FINDING_CHECK_ERROR, false, "data-read", offset,
                           "ERROR: Could not read data cluster at offset 0x%" PRIx64 ": %s",
                           offset, g_strerror(-ret));
    }
    return ret;
}

/* ---------------------------------------------------------------- plan */

/* Where the entry leads. False: nowhere that matters here. */
static bool locate(Qcow2EntryMove *x)
{
    BDRVQcow2State *s = x->c->s;
    if (x->e.entry & QCOW2_ENTRY_COMPRESSED) {
        uint32_t bytes;
        qcow2_parse_compressed(s, x->e.entry & ~QCOW2_ENTRY_COPIED, &x->host, &bytes);
        x->bytes = bytes;
        return true;
    }
    x->host = x->e.entry & QCOW2_ENTRY_OFFSET_MASK;
    x->bytes = s->cluster_size - qcow2_offset_into_cluster(s, x->host);
    return x->host || (uint32_t)x->e.bitmap;
}

static void handle_table(Qcow2Check *c, const Qcow2CheckTable *t, const uint8_t *entries,
                         void *opaque)
{
    Qcow2EntryMove x = {.c = c, .m = opaque, .t = t};
    for (x.index = 0; x.index < c->s->l2_entries; x.index++) {
        x.e = qcow2_check_entry(c->s, entries, x.index);
        if (!locate(&x)) {
            continue;
        }
        if (qcow2_check_leads_nowhere(c, x.e)) {
            qcow2_check_replace_lost(&x);
        } else {
            qcow2_check_move_aliased(&x);
        }
    }
}

Qcow2Moves *qcow2_check_plan_moves(Qcow2Check *c)
{
    if (c->incomplete || c->s->has_data_file) {
        return NULL;
    }
    Qcow2Moves *m = g_new0(Qcow2Moves, 1);
    m->moves = g_array_new(false, false, sizeof(Move));
    m->aliases = g_hash_table_new_full(NULL, NULL, NULL, g_free);
    qcow2_check_find_aliases(c, m);
    if (!g_hash_table_size(m->aliases) && !c->lost_entries) {
        free_moves(m);
        return NULL;
    }
    m->buf = g_malloc(c->s->cluster_size);
    qb_progress_grow(c->opts->progress, (uint64_t)c->tables->len * c->s->cluster_size);
    qcow2_check_for_tables(c, 0, c->tables->len, handle_table, m);
    qcow2_check_forget_owners(c, m);
    return m;
}

/* ---------------------------------------------------------------- make */

static void make(Qcow2Check *c, const Move *move)
{
    uint8_t raw[16];
    qb_stbe64(raw, move->becomes.entry);
    qb_stbe64(raw + 8, move->becomes.bitmap);
    if (qcow2_check_write(c, move->pos, c->s->l2_entry_size, raw) < 0) {
        return;
    }
    if (move->finding) {
        qcow2_check_mark_fixed(c, BDRV_FINDING_CORRUPTION, 1);
    }
    g_autofree char *to = move->to ? g_strdup_printf(" 0x%" PRIx64, move->to) : g_strdup("");
    qcow2_check_report(c, BDRV_FINDING_INFO, true, move->code, move->pos,
                       "Repairing offset=%" PRIx64 ": %s%s", move->from, move->what, to);
}

void qcow2_check_make_moves(Qcow2Check *c, Qcow2Moves *moves, bool go)
{
    if (!moves) {
        return;
    }
    for (guint i = 0; go && i < moves->moves->len && !c->write_failed; i++) {
        make(c, &g_array_index(moves->moves, Move, i));
    }
    if (moves->moves->len && !c->write_failed) {
        qcow2_check_barrier(c);
    }
    free_moves(moves);
}
