/*
 * Going back to an internal snapshot, for good (apply) or for the life of a read-only node
 * (load_tmp).
 *
 *     active tree A, snapshot tree S          counts            disk
 *     1 flush                                                   all stable
 *     2 COPIED off in S's own tables                            (meaningless there, soon active)
 *     3 a copy of S's L1, COPIED off          S \ A: +1         flush
 *     4 header: L1, size                                        one write       <- done
 *     5                                       A \ S: -1         quarantine, flush
 *
 * What is in both trees keeps its count: an L2 table that both share is not even read.
 *
 * Invariants
 *  1. The active L1 is never overwritten: the header switches to a new one, and to the snapshot's
 *     size, in one write of one sector.
 *  2. Everything the new L1 reaches has a count of at least 2 (it is the snapshot's too), hence
 *     COPIED is off in all of it before the switch; no dirty bit is needed on either version.
 *  3. A failure before the switch takes the counts back, after the barrier that settles the header.
 *
 * Not done: what the active tables held in VM state is given up with them, as elsewhere in the
 * field.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2.h"

#include <inttypes.h>
#include <string.h>

static bool fail(GError **errp, int err, const char *text)
{
    qb_error_set(errp, err, "%s", text);
    return false;
}

static bool fail_errno(GError **errp, int err)
{
    qb_error_set_errno(errp, err, "Failed to load snapshot");
    return false;
}

/* ---------------------------------------------------------------- finding and reading */

const Qcow2Snapshot *qcow2_snapshot_find(const BDRVQcow2State *s, const char *id_or_name)
{
    const Qcow2Snapshot *by_name = NULL;
    for (guint i = 0; i < s->snapshots->len; i++) {
        const Qcow2Snapshot *sn = &g_array_index(s->snapshots, Qcow2Snapshot, i);
        if (!strcmp(sn->id, id_or_name)) {
            return sn;
        }
        if (!by_name && !strcmp(sn->name, id_or_name)) {
            by_name = sn;
        }
    }
    return by_name;
}

static bool check_l1(const BDRVQcow2State *s, const Qcow2Snapshot *sn, GError **errp)
{
    uint64_t bytes = (uint64_t)sn->l1_size * 8;
    if (bytes > QCOW2_MAX_L1_BYTES) {
        return fail(errp, EFBIG, "Snapshot L1 table too large");
    }
    if (!qb_is_aligned(sn->l1_offset, s->cluster_size) || (bytes && !sn->l1_offset) ||
        sn->l1_offset > (uint64_t)INT64_MAX - bytes) {
        return fail(errp, EINVAL, "Snapshot L1 table offset invalid");
    }
    return true;
}

uint64_t *qcow2_snapshot_read_l1(BlockDriverState *bs, const Qcow2Snapshot *sn, GError **errp)
{
    if (!check_l1(qcow2_state(bs), sn, errp)) {
        return NULL;
    }
    return qcow2_read_l1(bs, sn->l1_offset, sn->l1_size, "Snapshot L1 table", errp);
}

/* ---------------------------------------------------------------- the change of trees */

typedef struct Apply {
    BlockDriverState *bs;
    BDRVQcow2State *s;
    uint64_t *old_be, *new_be; /* big-endian; new_be has COPIED off */
    uint32_t old_size, new_size;
    uint64_t old_offset, new_offset; /* new_offset 0: not allocated */
    uint64_t disk_size;
    GArray *up, *down; /* Qcow2HostRun */
    bool raised;
} Apply;

static void apply_clear(Apply *a)
{
    g_free(a->old_be);
    g_free(a->new_be);
    g_clear_pointer(&a->up, g_array_unref);
    g_clear_pointer(&a->down, g_array_unref);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Apply, apply_clear)

static uint64_t l1_clusters_bytes(const Apply *a, uint32_t entries)
{
    return qb_align_up((uint64_t)entries * 8, a->s->cluster_size);
}

/* The new L1 is as long as the snapshot's, and long enough for its size. */
static bool take_l1(Apply *a, const Qcow2Snapshot *sn, GError **errp)
{
    g_autofree uint64_t *be = qcow2_snapshot_read_l1(a->bs, sn, errp);
    if (!be) {
        return false;
    }
    uint64_t size = MAX(qcow2_size_to_l1(a->s, sn->disk_size), sn->l1_size);
    if (sn->disk_size > INT64_MAX || size > QCOW2_MAX_L1_BYTES / 8) {
        return fail(errp, EFBIG, "Snapshot L1 table too large");
    }
    a->new_size = (uint32_t)size;
    a->new_be = g_try_malloc0(size * 8 + 8);
    if (!a->new_be) {
        return fail_errno(errp, -ENOMEM);
    }
    for (uint32_t i = 0; i < sn->l1_size; i++) {
        qb_stbe64(&a->new_be[i], qb_ldbe64(&be[i]) & ~QCOW2_ENTRY_COPIED);
    }
    a->disk_size = sn->disk_size;
    return true;
}

/* A copy of @be without the tables that @other has at the same place. */
static uint64_t *without_shared(const uint64_t *be, uint32_t size, const uint64_t *other,
                                uint32_t other_size)
{
    uint64_t *own = g_malloc0((size_t)size * 8 + 8); /* NULL would mean the active L1 */
    memcpy(own, be, (size_t)size * 8);
    for (uint32_t i = 0; i < MIN(size, other_size); i++) {
        uint64_t same = (qb_ldbe64(&be[i]) ^ qb_ldbe64(&other[i])) & QCOW2_ENTRY_OFFSET_MASK;
        own[i] = same ? own[i] : 0;
    }
    return own;
}

static int collect_differences(Apply *a)
{
    g_autoptr(GArray) from = g_array_new(false, false, sizeof(Qcow2HostRun));
    g_autoptr(GArray) to = g_array_new(false, false, sizeof(Qcow2HostRun));
    g_autofree uint64_t *old = without_shared(a->old_be, a->old_size, a->new_be, a->new_size);
    g_autofree uint64_t *new = without_shared(a->new_be, a->new_size, a->old_be, a->old_size);
    int ret = qcow2_tree_collect(a->bs, &(Qcow2WalkSource){old, a->old_size}, from);
    ret = ret < 0 ? ret : qcow2_tree_collect(a->bs, &(Qcow2WalkSource){new, a->new_size}, to);
    if (ret == 0) {
        qcow2_runs_difference(a->s, from, to, a->up, a->down);
    }
    return ret;
}

/* ---------------------------------------------------------------- COPIED in the

 * snapshot's tables */

/* L1 indices of tables in which some entry has the flag. */
typedef struct Flagged {
    const BDRVQcow2State *s;
    GArray *indices; /* uint64_t */
} Flagged;

static int find_flagged(const Qcow2Mapping *m, void *opaque)
{
    const Flagged *f = opaque;
    if (!m->copied || m->type == QCOW2_COMPRESSED) {
        return 0;
    }
    uint64_t last = qcow2_l1_index(f->s, m->guest + m->bytes - 1);
    for (uint64_t i = qcow2_l1_index(f->s, m->guest); i <= last; i++) {
        guint n = f->indices->len;
        if (!n || g_array_index(f->indices, uint64_t, n - 1) != i) {
            g_array_append_val(f->indices, i);
        }
    }
    return 0;
}

static void clear_flags_locked(BDRVQcow2State *s, Qcow2Table *t) QB_REQUIRES(s->lock)
{
    for (unsigned i = 0; i < s->l2_entries; i++) {
        uint64_t be, entry;
        qcow2_table_load(t, (size_t)i * s->l2_entry_size, 8, &be);
        entry = qb_ldbe64(&be);
        if (entry & QCOW2_ENTRY_COPIED) {
            qb_stbe64(&be, entry & ~QCOW2_ENTRY_COPIED);
            qcow2_table_store(t, (size_t)i * s->l2_entry_size, 8, &be);
        }
    }
}

static int clear_table(Apply *a, uint64_t index)
{
    BDRVQcow2State *s = a->s;
    g_autoptr(Qcow2Table) t = NULL;
    uint64_t offset = qb_ldbe64(&a->new_be[index]) & QCOW2_ENTRY_OFFSET_MASK;
    int ret = qcow2_cache_get(s->cache, QCOW2_TABLE_L2, offset, &t);
    if (ret == 0) {
        QB_GUARD(&s->lock);
        clear_flags_locked(s, t);
    }
    return ret;
}

/* Step 2: what others may have left set. Tables that the active L1 shares are in order already. */
static int clear_stale_copied(Apply *a)
{
    g_autoptr(GArray) indices = g_array_new(false, false, sizeof(uint64_t));
    Flagged f = {.s = a->s, .indices = indices};
    g_autofree uint64_t *own = without_shared(a->new_be, a->new_size, a->old_be, a->old_size);
    int ret = qcow2_walk_runs(a->bs, &(Qcow2WalkSource){own, a->new_size}, 0, INT64_MAX,
                              find_flagged, &f);
    for (guint i = 0; i < indices->len && ret == 0; i++) {
        uint64_t index = g_array_index(indices, uint64_t, i);
        ret = qb_ldbe64(&own[index]) ? clear_table(a, index) : 0;
    }
    return ret;
}

/* ---------------------------------------------------------------- the switch */

static int write_new_l1(Apply *a)
{
    if (!a->new_size) {
        return 0;
    }
    int64_t offset = qcow2_alloc_clusters(a->bs, l1_clusters_bytes(a, a->new_size));
    if (offset < 0) {
        return (int)offset;
    }
    a->new_offset = (uint64_t)offset;
    int64_t bytes = (int64_t)a->new_size * 8;
    int ret = qcow2_check_overlap(a->bs, QCOW2_OL_NONE, a->new_offset, (uint64_t)bytes);
    return ret < 0 ? ret : bdrv_pwrite(a->bs->file, offset, bytes, a->new_be, 0);
}

static int raise_counts(Apply *a)
{
    int ret = qcow2_change_counts(a->bs, a->up, 1);
    a->raised = ret == 0;
    return ret;
}

static void switch_l1(Qcow2Header *h, void *opaque)
{
    const Apply *a = opaque;
    h->l1_offset = a->new_offset;
    h->l1_size = a->new_size;
    h->size = a->disk_size;
}

static int do_switch(Apply *a)
{
    int ret = clear_stale_copied(a);
    ret = ret < 0 ? ret : raise_counts(a);
    ret = ret < 0 ? ret : write_new_l1(a);
    ret = ret < 0 ? ret : qcow2_flush(a->bs);
    return ret < 0 ? ret : qcow2_header_update(a->bs, switch_l1, a, true);
}

static int undo(Apply *a)
{
    int ret = bdrv_flush(a->bs->file->bs);
    if (ret == 0 && a->raised) {
        ret = qcow2_change_counts(a->bs, a->up, -1);
    }
    if (ret == 0 && a->new_offset) {
        qcow2_free_run(a->bs, a->new_offset, l1_clusters_bytes(a, a->new_size),
                       QCOW2_DISCARD_SNAPSHOT);
    }
    return ret < 0 ? ret : qcow2_flush_all(a->bs);
}

/* Step 5: the header names the new tree; memory follows, the old one goes. */
static int finish(Apply *a)
{
    qcow2_l1_replace(a->s, g_steal_pointer(&a->new_be), a->new_size, a->new_offset);
    bdrv_set_length(a->bs, (int64_t)qb_align_down(a->disk_size, BDRV_SECTOR_SIZE));
    qcow2_inflight_wait(a->s, qcow2_inflight_seq(a->s));
    if (a->old_size) {
        qcow2_free_run(a->bs, a->old_offset, l1_clusters_bytes(a, a->old_size),
                       QCOW2_DISCARD_SNAPSHOT);
    }
    int ret = qcow2_free_runs(a->bs, a->down, QCOW2_DISCARD_SNAPSHOT);
    return ret < 0 ? ret : qcow2_flush_all(a->bs);
}

static bool prepare(Apply *a, const Qcow2Snapshot *sn, GError **errp)
{
    int ret = qcow2_flush_all(a->bs);
    if (ret < 0) {
        return fail_errno(errp, ret);
    }
    a->old_be = qcow2_l1_dup_be(a->s, &a->old_size);
    a->old_offset = qcow2_l1_table_offset(a->s);
    if (!take_l1(a, sn, errp)) {
        return false;
    }
    ret = collect_differences(a);
    return ret == 0 || fail_errno(errp, ret);
}

bool qcow2_snapshot_apply(BlockDriverState *bs, const char *id_or_name, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    const Qcow2Snapshot *sn = qcow2_snapshot_find(s, id_or_name);
    g_auto(Apply) a = {
        .bs = bs,
        .s = s,
        .up = g_array_new(false, false, sizeof(Qcow2HostRun)),
        .down = g_array_new(false, false, sizeof(Qcow2HostRun)),
    };
    if (s->has_data_file) {
        return fail_errno(errp, -ENOTSUP);
    }
    if (!sn) {
        return fail_errno(errp, -ENOENT);
    }
    if (!prepare(&a, sn, errp)) {
        return false;
    }
    int ret = do_switch(&a);
    if (ret < 0) {
        int err = undo(&a);
        if (err < 0) {
            bdrv_warn("Going back to the snapshot could not be undone: %s", g_strerror(-err));
        }
        return fail_errno(errp, ret);
    }
    ret = finish(&a);
    if (ret < 0) {
        bdrv_warn("Could not give back all space of the former state: %s", g_strerror(-ret));
    }
    return true;
}

/* ---------------------------------------------------------------- for reading only */

bool qcow2_snapshot_load_tmp(BlockDriverState *bs, const char *id_or_name, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    const Qcow2Snapshot *sn = qcow2_snapshot_find(s, id_or_name);
    assert(bdrv_is_read_only(bs));
    if (!sn) {
        return fail(errp, ENOENT, "Can't find snapshot");
    }
    uint64_t *be = qcow2_snapshot_read_l1(bs, sn, errp);
    if (!be) {
        return false;
    }
    qcow2_l1_replace(s, be, sn->l1_size, sn->l1_offset);
    s->shows_snapshot = true; /* never to become writable */
    qb_mutex_lock(&s->header_lock);
    s->header.size = sn->disk_size;
    qb_mutex_unlock(&s->header_lock);
    bdrv_set_length(bs, (int64_t)qb_align_down(sn->disk_size, BDRV_SECTOR_SIZE));
    return true;
}
