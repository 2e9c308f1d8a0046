/*
 * The overlap guard: no write of data or of one kind of metadata may hit metadata of another kind.
 *
 * It catches what should be impossible: counts on disk that were wrong (a cluster handed out
 * twice), or a mapping that points into metadata.
 *
 *      header, L1, refcount table, snapshot table, snapshots' L1s,  ranges, compared directly
 *      bitmap directory
 *      active L2 tables, refcount blocks                            by offset, in the sets that the
 *                                                                   L1 and the refcount table keep
 *      tables in memory                                             by offset in the cache
 *
 * Invariant: a look costs a handful of comparisons, and three hash look-ups per cluster written.
 *
 * Deliberately not done: reading the tables of snapshots (inactive L2 tables) to judge a write.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2.h"

static const struct {
    Qcow2Overlap section;
    const char *name;
} section_names[] = {
    {QCOW2_OL_MAIN_HEADER, "qcow2_header"},
    {QCOW2_OL_ACTIVE_L1, "active L1 table"},
    {QCOW2_OL_ACTIVE_L2, "active L2 table"},
    {QCOW2_OL_REFCOUNT_TABLE, "refcount table"},
    {QCOW2_OL_REFCOUNT_BLOCK, "refcount block"},
    {QCOW2_OL_SNAPSHOT_TABLE, "snapshot table"},
    {QCOW2_OL_INACTIVE_L1, "inactive L1 table"},
    {QCOW2_OL_INACTIVE_L2, "inactive L2 table"},
    {QCOW2_OL_BITMAP_DIRECTORY, "bitmap directory"},
};

static const char *section_name(Qcow2Overlap section)
{
    for (size_t i = 0; i < G_N_ELEMENTS(section_names); i++) {
        if (section_names[i].section == section) {
            return section_names[i].name;
        }
    }
    return "metadata";
}

static bool hits(uint64_t offset, uint64_t bytes, uint64_t start, uint64_t length)
{
    return qb_ranges_overlap(offset, bytes, start, length);
}

static bool hits_snapshot_l1(const BDRVQcow2State *s, uint64_t offset, uint64_t bytes)
{
    for (guint i = 0; s->snapshots && i < s->snapshots->len; i++) {
        const Qcow2Snapshot *sn = &g_array_index(s->snapshots, Qcow2Snapshot, i);
        if (hits(offset, bytes, sn->l1_offset, (uint64_t)sn->l1_size * sizeof(uint64_t))) {
            return true;
        }
    }
    return false;
}

/* What the tables in memory say of themselves: among them are those that nothing names yet. */
static Qcow2Overlap cached_table(BDRVQcow2State *s, uint64_t offset, uint64_t bytes)
{
    uint64_t end = offset + bytes;

    for (uint64_t pos = qcow2_start_of_cluster(s, offset); pos < end; pos += s->cluster_size) {
        Qcow2TableKind kind;
        if (qcow2_cache_has(s->cache, pos, &kind)) {
            return kind == QCOW2_TABLE_L2 ? QCOW2_OL_ACTIVE_L2 : QCOW2_OL_REFCOUNT_BLOCK;
        }
    }
    return QCOW2_OL_NONE;
}

/* The place of the refcount table, read under its lock. */
static bool hits_reftable(BDRVQcow2State *s, uint64_t offset, uint64_t bytes)
{
    QB_GUARD(&s->alloc_lock);

    return hits(offset, bytes, s->reftable.offset,
                (uint64_t)s->reftable.clusters << s->cluster_bits);
}

static Qcow2Overlap find_overlap(BDRVQcow2State *s, int checked, uint64_t offset, uint64_t bytes)
{
    uint64_t l1_bytes = (uint64_t)qcow2_l1_size(s) * sizeof(uint64_t);

    if (checked & QCOW2_OL_MAIN_HEADER && offset < s->cluster_size) {
        return QCOW2_OL_MAIN_HEADER;
    }
    if (checked & QCOW2_OL_ACTIVE_L1 && hits(offset, bytes, qcow2_l1_table_offset(s), l1_bytes)) {
        return QCOW2_OL_ACTIVE_L1;
    }
    if (checked & QCOW2_OL_REFCOUNT_TABLE && hits_reftable(s, offset, bytes)) {
        return QCOW2_OL_REFCOUNT_TABLE;
    }
    if (checked & QCOW2_OL_SNAPSHOT_TABLE &&
        hits(offset, bytes, s->snapshots_offset, s->snapshots_bytes)) {
        return QCOW2_OL_SNAPSHOT_TABLE;
    }
    if (checked & QCOW2_OL_INACTIVE_L1 && hits_snapshot_l1(s, offset, bytes)) {
        return QCOW2_OL_INACTIVE_L1;
    }
    if (checked & QCOW2_OL_BITMAP_DIRECTORY && qcow2_bitmaps_hit_directory(s, offset, bytes)) {
        return QCOW2_OL_BITMAP_DIRECTORY;
    }
    if (checked & QCOW2_OL_ACTIVE_L2 && qcow2_l1_names_table(s, offset, bytes)) {
        return QCOW2_OL_ACTIVE_L2;
    }
    if (checked & QCOW2_OL_REFCOUNT_BLOCK && qcow2_is_refblock(s, offset, bytes)) {
        return QCOW2_OL_REFCOUNT_BLOCK;
    }
    return cached_table(s, offset, bytes) & checked;
}

bool qcow2_overlaps_metadata(BlockDriverState *bs, uint64_t offset, uint64_t bytes)
{
    return find_overlap(qcow2_state(bs), ~QCOW2_OL_BITMAP_DIRECTORY, offset, bytes) != 0;
}

int qcow2_check_overlap(BlockDriverState *bs, int ignore, uint64_t offset, uint64_t bytes)
{
    BDRVQcow2State *s = qcow2_state(bs);
    Qcow2Overlap found;

    if (!bytes || !s->overlap_check) {
        return 0;
    }
    found = find_overlap(s, s->overlap_check & ~ignore, offset, bytes);
    if (!found) {
        return 0;
    }
    return qcow2_signal_corruption(bs, true, (int64_t)offset,
                                   "Preventing invalid write on metadata (overlaps with %s)",
                                   section_name(found));
}
