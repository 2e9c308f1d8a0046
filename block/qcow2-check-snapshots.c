/*
 * Check: the snapshot table.
 *
 *      header: place, number   -->  [ entry | entry | entry ...     of varying length, padded to 8
 *                                       `-> place and length of an L1, extra data, ID, name
 *
 * It was read when the image was opened, as far as it makes sense.  What is wrong is put right in
 * memory first; a repair counts what snapshots refer to accordingly, and writes the whole table
 * again, to new clusters, when the counts are right.
 *
 * A snapshot whose L1 has an impossible length gets the one that its disk takes.  One whose L1 is
 * at an impossible place stays a finding, and nothing is freed while it does: somebody may know
 * the place, or gives the snapshot up by deleting it.
 *
 * Invariants
 *   1. Without a repair of errors nothing changes, in memory or on disk.
 *   2. Entries that cannot be read any more are given up by a repair of errors only.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-check.h"

#include <inttypes.h>

/* Snapshots that do not fit are given up by a repair of errors only; until then they hold
 * clusters. */
static void check_overhang(Qcow2Check *c, uint64_t overhang)
{
    if (c->fix & BDRV_FIX_ERRORS) {
        qcow2_check_report(c, BDRV_FINDING_INFO, false, "snapshot-overhang",
                           c->s->header.snapshots_offset,
                           "Discarding %" PRIu64 " overhanging snapshots", overhang);
        c->snapshot_faults += overhang;
        c->res->corruptions += overhang;
        return;
    }
    bool too_many = c->s->header.nb_snapshots > QCOW2_MAX_SNAPSHOTS;
    c->incomplete = true;
    qcow2_check_report(c, BDRV_FINDING_CORRUPTION, false, "snapshot-overhang",
                       c->s->header.snapshots_offset, "ERROR snapshot table %s",
                       too_many ? "too large" : "is cut off");
    qcow2_check_report(c, BDRV_FINDING_INFO, false, "snapshot-overhang", UINT64_MAX,
                       "You can force-remove all %" PRIu64
                       " overhanging snapshots with qemu-img check -r all",
                       overhang);
}

/* An entry that does not tell the size of its disk: the image's, as far as its L1 goes. */
static void complete(const BDRVQcow2State *s, Qcow2Snapshot *sn)
{
    uint64_t mapped = (uint64_t)sn->l1_size << (s->cluster_bits + s->l2_bits);
    if (sn->l1_size <= QCOW2_MAX_L1_BYTES / sizeof(uint64_t)) {
        sn->disk_size = MIN(sn->disk_size, mapped);
    }
}

static void check_extra_data(Qcow2Check *c, guint i, Qcow2Snapshot *sn)
{
    bool repair = c->fix & BDRV_FIX_ERRORS;
    if (sn->extra_cut) {
        qcow2_check_report(c, BDRV_FINDING_CORRUPTION, false, "snapshot-extra-data",
                           c->s->header.snapshots_offset,
                           "%s too much extra metadata in snapshot table entry %u (> %u)",
                           repair ? "Discarding" : "ERROR", i, QCOW2_MAX_SNAPSHOT_EXTRA);
        c->snapshot_faults++;
        c->incomplete |= !repair; /* what follows in the table may be misread */
    }
    if (c->s->version >= 3 && sn->extra_size < QCOW2_SNAPSHOT_EXTRA_V3) {
        qcow2_check_report(c, BDRV_FINDING_CORRUPTION, false, "snapshot-incomplete",
                           c->s->header.snapshots_offset,
                           "%s snapshot table entry %u is incomplete",
                           repair ? "Repairing" : "ERROR", i);
        c->snapshot_faults++;
        if (repair) {
            complete(c->s, sn);
        }
    }
}

/* Entries of L1 that the disk of a snapshot, and the state of its machine, take. */
static uint64_t entries_needed(const BDRVQcow2State *s, const Qcow2Snapshot *sn, bool with_state)
{
    return qcow2_size_to_l1(s, sn->disk_size) +
           (with_state ? qcow2_size_to_l1(s, sn->vm_state_size) : 0);
}

/* Is there a table of @entries where @sn says, without more clusters than it has now, or one? */
static bool can_have(const Qcow2Check *c, const Qcow2Snapshot *sn, uint64_t entries)
{
    uint64_t bytes = entries * sizeof(uint64_t), now = (uint64_t)sn->l1_size * sizeof(uint64_t);
    return sn->l1_offset && !qcow2_offset_into_cluster(c->s, sn->l1_offset) &&
           bytes <= QCOW2_MAX_L1_BYTES && qcow2_check_is_inside(c, sn->l1_offset, bytes) &&
           bytes <= qb_align_up(MAX(now, 1), c->s->cluster_size);
}

/* A number of entries that cannot be right; the extra data of an entry tell how many it must be. */
static void check_l1_size(Qcow2Check *c, Qcow2Snapshot *sn)
{
    uint64_t bytes = (uint64_t)sn->l1_size * sizeof(uint64_t);
    bool known = sn->extra_size >= QCOW2_SNAPSHOT_EXTRA_V3 && sn->disk_size <= INT64_MAX;
    bool shorter = known && sn->l1_size < entries_needed(c->s, sn, false);
    bool longer = bytes > QCOW2_MAX_L1_BYTES || !qcow2_check_is_inside(c, sn->l1_offset, bytes);
    if (!known || (!shorter && !longer)) {
        return;
    }
    uint64_t entries = entries_needed(c->s, sn, true);
    entries = can_have(c, sn, entries) ? entries : entries_needed(c->s, sn, false);
    bool repair = (c->fix & BDRV_FIX_ERRORS) && can_have(c, sn, entries);
    if (shorter || repair) {
        qcow2_check_report(c, BDRV_FINDING_CORRUPTION, false, "snapshot-l1-size", sn->l1_offset,
                           "%s snapshot %s (%s) l1_size=%#" PRIx32
                           ": its disk takes %#" PRIx64 "; snapshot table entry corrupted",
                           repair ? "Repairing" : "ERROR", sn->id, sn->name, sn->l1_size, entries);
    }
    if (repair) {
        sn->l1_size = (uint32_t)entries;
        c->snapshot_faults++;
    } else if (shorter) {
        qcow2_check_not_followed(c);
    }
}

/* The place of a table that does not exist is nobody's, but readers refuse an impossible one. */
static void check_no_table(Qcow2Check *c)
{
    uint64_t offset = c->s->header.snapshots_offset;
    if (qcow2_offset_into_cluster(c->s, offset) || offset > INT64_MAX) {
        qcow2_check_report(c, BDRV_FINDING_CORRUPTION, false, "snapshot-table-place", offset,
                           "%s snapshot table offset invalid",
                           c->fix & BDRV_FIX_ERRORS ? "Repairing" : "ERROR");
        c->snapshot_faults++;
    }
}

/* A number that no snapshot has as its ID; *next: the one to give out, 0: not known yet. */
static char *fresh_id(Qcow2Check *c, uint64_t *next)
{
    if (!*next) {
        g_autofree char *first = qcow2_snapshot_next_id(c->s->snapshots);
        *next = g_ascii_strtoull(first, NULL, 10);
    }
    return g_strdup_printf("%" PRIu64, (*next)++);
}

/* Nobody could name the second of two snapshots with one ID. */
static void check_id(Qcow2Check *c, Qcow2Snapshot *sn, GHashTable *ids, uint64_t *next)
{
    if (g_hash_table_add(ids, g_strdup(sn->id))) {
        return;
    }
    bool repair = c->fix & BDRV_FIX_ERRORS;
    g_autofree char *id = repair ? fresh_id(c, next) : NULL;
    qcow2_check_report(c, BDRV_FINDING_CORRUPTION, false, "snapshot-id",
                       c->s->header.snapshots_offset,
                       "%s snapshot %s (%s): another has this ID%s%s",
                       repair ? "Repairing" : "ERROR", sn->id, sn->name,
                       repair ? "; it is now " : "", repair ? id : "");
    c->snapshot_faults++;
    if (repair) {
        g_free(sn->id);
        sn->id = g_steal_pointer(&id);
    }
}

void qcow2_check_snapshot_table(Qcow2Check *c)
{
    g_autoptr(GHashTable) ids = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, NULL);
    uint64_t next_id = 0;
    if (!c->s->header.nb_snapshots) {
        check_no_table(c);
    }
    const GArray *list = c->s->snapshots;
    guint n = list ? list->len : 0;
    if (c->s->header.nb_snapshots > n) {
        check_overhang(c, c->s->header.nb_snapshots - n);
    }
    for (guint i = 0; i < n; i++) {
        check_extra_data(c, i, &g_array_index(list, Qcow2Snapshot, i));
        check_id(c, &g_array_index(list, Qcow2Snapshot, i), ids, &next_id);
        check_l1_size(c, &g_array_index(list, Qcow2Snapshot, i));
    }
    c->snapshots_broken = c->snapshot_faults > 0;
}

/* A damaged table claims clusters of others: only those before the first of them are its own. */
static uint64_t own_table_bytes(const Qcow2Check *c)
{
    const BDRVQcow2State *s = c->s;
    uint64_t bytes = 0;
    while (bytes < s->snapshots_bytes &&
           qcow2_check_exclusive(c, s->header.snapshots_offset + bytes, 1, QCOW2_REF_META)) {
        bytes += s->cluster_size;
    }
    return MIN(bytes, s->snapshots_bytes);
}

void qcow2_check_write_snapshot_table(Qcow2Check *c)
{
    g_autoptr(GError) err = NULL;
    c->s->snapshots_bytes = own_table_bytes(c);
    qcow2_guard_snapshots(c->bs); /* for L1s that have another length now */
    GArray *list = c->s->snapshots ? qcow2_snapshots_dup(c->s->snapshots) : qcow2_snapshots_new();
    if (!qcow2_snapshots_store(c->bs, list, NULL, NULL, &err) || qcow2_flush(c->bs) < 0 ||
        !qcow2_snapshots_load(c->bs, true, &err)) {
        qcow2_check_report(c, BDRV_FINDING_CHECK_ERROR, false, "snapshot-table-write", UINT64_MAX,
                           "ERROR failed to update snapshot table: %s",
                           err ? err->message : "flush failed");
        return;
    }
    qcow2_check_mark_fixed(c, BDRV_FINDING_CORRUPTION, c->snapshot_faults);
    c->snapshot_faults = 0;
}
