/*
 * Moving the table of snapshots, their L1s, and L2 tables that one snapshot has for itself, for
 * compaction.
 *
 *     L2 tables   copied by the caller, with all that was changed in them
 *     L1s         copied by the caller; those that name an L2 table that moves are written anew
 *     table       written anew; one write of the header switches to it
 *
 * Invariants
 *  1. Before the header's write the snapshots are untouched, after it complete (0).
 *  2. The list in memory stays the same one, as others may look at it: L1s get their new places there
 *     when the header is written.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-compact.h"

static uint64_t l1_clusters_bytes(const BDRVQcow2State *s, const Qcow2Snapshot *sn)
{
    return qb_align_up((uint64_t)sn->l1_size * 8, s->cluster_size);
}

static const Qcow2Snapshot *snapshot_at(const GArray *list, guint i)
{
    return &g_array_index(list, Qcow2Snapshot, i);
}

/* ---------------------------------------------------------------- what there is */

static void add_part(GArray *parts, uint64_t offset, uint64_t bytes, guint parent)
{
    Qcow2Part part = {.offset = offset, .bytes = bytes, .parent = parent};
    g_array_append_val(parts, part);
}

/* Tables that others have, too, have a count to tell. */
static void add_snapshot(BlockDriverState *bs, const Qcow2Snapshot *sn, guint table,
                         uint64_t floor, GArray *parts)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    g_autofree uint64_t *be = qcow2_snapshot_read_l1(bs, sn, NULL);
    guint l1 = parts->len;
    if (!be || !sn->l1_size) {
        return;
    }
    add_part(parts, sn->l1_offset, l1_clusters_bytes(s, sn), table);
    for (uint32_t i = 0; i < sn->l1_size; i++) {
        uint64_t offset = qb_ldbe64(&be[i]) & QCOW2_ENTRY_OFFSET_MASK;
        if (offset && offset >= floor && !qcow2_offset_into_cluster(s, offset)) {
            add_part(parts, offset, s->cluster_size, l1);
        }
    }
}

void qcow2_snapshots_parts(BlockDriverState *bs, uint64_t floor, GArray *parts)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    guint table = parts->len;
    if (!s->snapshots->len) {
        return;
    }
    add_part(parts, s->snapshots_offset, qb_align_up(s->snapshots_bytes, s->cluster_size), table);
    for (guint i = 0; i < s->snapshots->len; i++) {
        add_snapshot(bs, snapshot_at(s->snapshots, i), table, floor, parts);
    }
}

/* ---------------------------------------------------------------- what there shall be */

/* Points the entries to where the tables go; does any of them? */
static bool point_entries(const BDRVQcow2State *s, Qcow2PartsMove *m, uint64_t *be, uint32_t n)
{
    bool changed = false;
    for (uint32_t i = 0; i < n; i++) {
        uint64_t entry = qb_ldbe64(&be[i]), offset = entry & QCOW2_ENTRY_OFFSET_MASK;
        uint64_t place = offset ? qcow2_parts_place(m, offset, s->cluster_size) : 0;
        if (place) {
            qb_stbe64(&be[i], (entry & ~QCOW2_ENTRY_OFFSET_MASK) | place);
            changed = true;
        }
    }
    return changed;
}

static int write_l1(BlockDriverState *bs, uint64_t offset, const uint64_t *be, uint32_t n)
{
    int64_t bytes = (int64_t)n * 8;
    int ret = qcow2_check_overlap(bs, QCOW2_OL_NONE, offset, (uint64_t)bytes);
    return ret < 0 ? ret : bdrv_pwrite(bs->file, (int64_t)offset, bytes, be, 0);
}

/* An L1 that moves, or names what does. */
static int renew_l1(BlockDriverState *bs, Qcow2PartsMove *m, Qcow2Snapshot *sn)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    uint64_t bytes = l1_clusters_bytes(s, sn);
    uint64_t place = bytes ? qcow2_parts_place(m, sn->l1_offset, bytes) : 0;
    g_autofree uint64_t *be = qcow2_snapshot_read_l1(bs, sn, NULL);
    if (!be) {
        return place ? -EIO : 0; /* one that is damaged stays as it is */
    }
    bool changed = point_entries(s, m, be, sn->l1_size);
    if (changed && !place) {
        place = qcow2_parts_renew(m, sn->l1_offset, bytes);
        if (!place) {
            return QCOW2_STALE;
        }
    }
    sn->l1_offset = place ? place : sn->l1_offset;
    return changed ? write_l1(bs, place, be, sn->l1_size) : 0;
}

/* Invariant 2. */
static void adopt_l1s(BDRVQcow2State *s, const GArray *list)
{
    for (guint i = 0; i < list->len; i++) {
        g_array_index(s->snapshots, Qcow2Snapshot, i).l1_offset = snapshot_at(list, i)->l1_offset;
    }
}

/* Whichever of the two places of the table is not named goes with qcow2_snapshots_rewrite(). */
static int switch_table(BlockDriverState *bs, Qcow2PartsMove *m, const GArray *list)
{
    BDRVQcow2State *s = qcow2_state(bs);
    g_autoptr(GError) err = NULL;
    uint64_t old = s->snapshots_offset, room = qcow2_snapshots_room(s);
    uint64_t place = room ? qcow2_parts_renew(m, old, room) : 0;
    if (!place || !qcow2_parts_all_found(m)) {
        qcow2_parts_done(bs, m, false, 0);
        return QCOW2_STALE;
    }
    if (!qcow2_snapshots_rewrite(bs, list, place, &err)) {
        qcow2_parts_done(bs, m, false, place);
        return qb_error_to_errno(err);
    }
    adopt_l1s(s, list);
    qcow2_guard_snapshots(bs);
    qcow2_parts_done(bs, m, true, old);
    return 0;
}

int qcow2_snapshots_move(BlockDriverState *bs, Qcow2PartsMove *m)
{
    g_autoptr(GArray) list = qcow2_snapshots_dup(qcow2_state(bs)->snapshots);
    int ret = 0;
    for (guint i = 0; i < list->len && ret == 0; i++) {
        ret = renew_l1(bs, m, &g_array_index(list, Qcow2Snapshot, i));
    }
    if (ret != 0) {
        qcow2_parts_done(bs, m, false, 0);
        return ret;
    }
    return switch_table(bs, m, list);
}
