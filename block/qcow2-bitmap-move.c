/*
 * Moving stored bitmaps to other clusters of the image, for compaction.
 *
 *     clusters of bits     copied by the caller, byte for byte
 *     tables               written anew, those that move and those that name what moves
 *     directory            written anew; one write of the header switches to it
 *
 * All kinds of bitmaps move in the same way: what they say, and whether it is to be trusted, stays
 * as it is.  So those that another program has left IN_USE are moved, too.  Broken ones (with flags or
 * types that are not known) stay where they are: nobody knows what else their tables mean.
 *
 * Invariants
 *  1. Before the header's write the image's bitmaps are untouched, after it complete: whatever
 *     flags they have, they are as right as before (invariants 0, 7).
 *  2. Memory follows when the header is written: the next store uses the new places.  Who reads
 *     bits meanwhile finds them by the old table or by the new one: old clusters stay until it has left
 *     (quarantine).
 *  3. While a store that failed leaves it open what tables are like in the image, nothing moves.
 *
 * Not done: freeing what a smaller disk needs no more; that is the next store's.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-bitmap.h"

#include <string.h>

#include "block/dirty-bitmap-int.h"
#include "block/qcow2-compact.h"

static uint64_t table_clusters_bytes(const Qcow2Bitmap *q)
{
    uint64_t bytes = (uint64_t)qcow2_bitmap_table_entries(q) * 8;
    return qb_align_up(bytes, qcow2_state(q->bs)->cluster_size);
}

static uint64_t dir_clusters_bytes(const BDRVQcow2State *s)
{
    return qb_align_up(atomic_load(&s->bitmaps->dir_bytes), s->cluster_size);
}

/* ---------------------------------------------------------------- what there is */

/* Afterwards no reader of the bits looks at the directory. */
static bool table_is_known(Qcow2Bitmap *q)
{
    int ret = q->bm->bits ? bdrv_dirty_bits_begin(q->bm->bits) : qcow2_bitmap_read_table(q);
    return ret == 0 && q->table && q->table_entries == qcow2_bitmap_table_entries(q);
}

static bool all_can_move_locked(Qcow2Bitmaps *b) QB_REQUIRES(b->lock)
{
    qb_mutex_assert_held(&b->lock);
    bool can = b->loaded && b->all->len && atomic_load(&b->dir_offset);
    for (guint i = 0; i < b->all->len && can; i++) {
        Qcow2Bitmap *q = g_ptr_array_index(b->all, i);
        can = !q->table_unsettled && (q->broken || table_is_known(q));
    }
    return can;
}

static void add_part(GArray *parts, uint64_t offset, uint64_t bytes, guint parent)
{
    Qcow2Part part = {.offset = offset, .bytes = bytes, .parent = parent};
    g_array_append_val(parts, part);
}

static void add_bitmap(const Qcow2Bitmap *q, guint dir, uint64_t floor, GArray *parts)
{
    guint table = parts->len;
    add_part(parts, qcow2_bitmap_table_offset(q), table_clusters_bytes(q), dir);
    for (uint32_t i = 0; i < q->table_entries; i++) {
        uint64_t offset = q->table[i] & QCOW2_BITMAP_ENTRY_OFFSET_MASK;
        if (offset && offset >= floor) {
            add_part(parts, offset, qcow2_state(q->bs)->cluster_size, table);
        }
    }
}

void qcow2_bitmaps_parts(BlockDriverState *bs, uint64_t floor, GArray *parts)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    Qcow2Bitmaps *b = s->bitmaps;
    guint dir = parts->len;
    QB_GUARD(&b->lock);
    if (!all_can_move_locked(b)) {
        return;
    }
    add_part(parts, atomic_load(&b->dir_offset), dir_clusters_bytes(s), dir);
    for (guint i = 0; i < b->all->len; i++) {
        const Qcow2Bitmap *q = g_ptr_array_index(b->all, i);
        if (!q->broken) {
            add_bitmap(q, dir, floor, parts);
        }
    }
}

/* ---------------------------------------------------------------- what there shall be */

/* A table that is written anew. */
typedef struct NewTable {
    Qcow2Bitmap *q;
    uint64_t *entries; /* owned; host order */
    uint64_t offset;
} NewTable;

typedef struct Renewal {
    BlockDriverState *bs;
    BDRVQcow2State *s;
    Qcow2PartsMove *move;
    GArray *tables; /* NewTable */
    uint8_t *dir;   /* whole sectors; owned until it is given to the header */
} Renewal;

static void table_clear(void *table)
{
    g_free(((NewTable *)table)->entries);
}

static void renewal_clear(Renewal *r)
{
    g_clear_pointer(&r->tables, g_array_unref);
    g_clear_pointer(&r->dir, g_free);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Renewal, renewal_clear)

/* Points the entries to where the clusters go; does any of them? */
static bool point_entries(Renewal *r, const Qcow2Bitmap *q, uint64_t *entries)
{
    bool changed = false;
    for (uint32_t i = 0; i < q->table_entries; i++) {
        uint64_t offset = entries[i] & QCOW2_BITMAP_ENTRY_OFFSET_MASK;
        uint64_t place = offset ? qcow2_parts_place(r->move, offset, r->s->cluster_size) : 0;
        if (place) {
            entries[i] = (entries[i] & ~QCOW2_BITMAP_ENTRY_OFFSET_MASK) | place;
            changed = true;
        }
    }
    return changed;
}

static int write_table(const Renewal *r, const NewTable *t)
{
    uint64_t bytes = qb_align_up((uint64_t)t->q->table_entries * 8, QCOW2_HDR_SECTOR);
    g_autofree uint8_t *buf = g_try_malloc0(bytes);
    for (uint32_t i = 0; buf && i < t->q->table_entries; i++) {
        qb_stbe64(buf + (size_t)i * 8, t->entries[i]);
    }
    int ret = buf ? qcow2_check_overlap(r->bs, QCOW2_OL_NONE, t->offset, bytes) : -ENOMEM;
    return ret < 0 ? ret : bdrv_pwrite(r->bs->file, (int64_t)t->offset, (int64_t)bytes, buf, 0);
}

/* A table that moves, or names what does. */
static int renew_table(Renewal *r, Qcow2Bitmap *q)
{
    uint64_t offset = qcow2_bitmap_table_offset(q), bytes = table_clusters_bytes(q);
    NewTable t = {.q = q, .offset = qcow2_parts_place(r->move, offset, bytes)};
    t.entries = g_try_malloc(MAX(q->table_entries, 1) * sizeof(uint64_t));
    if (!t.entries) {
        return -ENOMEM;
    }
    memcpy(t.entries, q->table, q->table_entries * sizeof(uint64_t));
    if (point_entries(r, q, t.entries) && !t.offset) {
        t.offset = qcow2_parts_renew(r->move, offset, bytes);
        if (!t.offset) {
            table_clear(&t);
            return QCOW2_STALE;
        }
    }
    if (!t.offset) {
        table_clear(&t);
        return 0;
    }
    g_array_append_val(r->tables, t);
    qb_stbe64(r->dir + q->pos + QCOW2_BITMAP_TABLE_OFFSET, t.offset);
    return write_table(r, &t);
}

static int renew_tables(Renewal *r)
{
    const Qcow2Bitmaps *b = r->s->bitmaps;
    r->dir = g_memdup2(b->dir, qb_align_up(atomic_load(&b->dir_bytes), QCOW2_HDR_SECTOR));
    int ret = 0;
    for (guint i = 0; i < b->all->len && ret == 0; i++) {
        Qcow2Bitmap *q = g_ptr_array_index(b->all, i);
        ret = q->broken ? 0 : renew_table(r, q);
    }
    return ret;
}

/* ---------------------------------------------------------------- the switch */

/* Invariant 2. */
static void adopt_tables(const Renewal *r)
{
    QB_GUARD(&r->s->bitmaps->tables_lock);
    for (guint i = 0; i < r->tables->len; i++) {
        const NewTable *t = &g_array_index(r->tables, NewTable, i);
        memcpy(t->q->table, t->entries, t->q->table_entries * sizeof(uint64_t));
    }
}

/* Whichever of the two places of the directory is not named goes with dir_switch_at(). */
static int switch_directory(Renewal *r)
{
    Qcow2Bitmaps *b = r->s->bitmaps;
    g_autoptr(GError) err = NULL;
    uint64_t old = atomic_load(&b->dir_offset);
    uint64_t place = qcow2_parts_renew(r->move, old, dir_clusters_bytes(r->s));
    if (!place || !qcow2_parts_all_found(r->move)) {
        qcow2_parts_done(r->bs, r->move, false, 0);
        return QCOW2_STALE;
    }
    if (!qcow2_bitmap_dir_switch_at(r->bs, g_steal_pointer(&r->dir), atomic_load(&b->dir_bytes),
                                    b->all->len, place, &err)) {
        qcow2_parts_done(r->bs, r->move, false, place);
        return qb_error_to_errno(err);
    }
    adopt_tables(r);
    qcow2_parts_done(r->bs, r->move, true, old);
    return 0;
}

int qcow2_bitmaps_move(BlockDriverState *bs, Qcow2PartsMove *m)
{
    BDRVQcow2State *s = qcow2_state(bs);
    g_auto(Renewal) r = {.bs = bs, .s = s, .move = m};
    r.tables = g_array_new(false, false, sizeof(NewTable));
    g_array_set_clear_func(r.tables, table_clear);
    QB_GUARD(&s->bitmaps->lock);
    int ret = all_can_move_locked(s->bitmaps) ? qcow2_begin_change(bs, false) : QCOW2_STALE;
    ret = ret == 0 ? renew_tables(&r) : ret;
    if (ret != 0) {
        qcow2_parts_done(bs, m, false, 0);
        return ret;
    }
    return switch_directory(&r);
}
