/*
 * Internal snapshots: create, delete, list.  (Apply: qcow2-snapshot-apply.c; the table on disk:
 * qcow2-snapshot-table.c.)
 *
 *   create                                          delete
 *   1 flush; collect the tree, judge its counts     1 flush; collect the snapshot's tree
 *   2 dirty bit, stable (version 3)                 2 dirty bit, stable (version 3)
 *   3 COPIED off everywhere; past all writers       3 table without it; header            <- done
 *     [version 2: flush]                            4 -1 on what others share; free the rest and
 *   4 +1 on the whole tree; a copy of L1              its L1; flush
 *                                                   5 COPIED on where the count is 1 now
 *   5 table with it; flush; header, dirty bit off   6 flush; dirty bit off
 *                                      <- done
 *
 * Invariants (besides invariants 0 to 8 of the driver)
 *  1. Overflow of any count in the whole tree is found before anything changes.  Where streams of
 *     compressed clusters are the cause, they are moved first (qcow2-snapshot-room.c).
 *  2. COPIED is off before a count becomes 2 and comes back after it is 1 again: on version 2,
 *     which has no dirty bit, a crash shows at most "COPIED clear, count 1".
 *  3. Whoever looked an entry up while it was COPIED has finished writing before the snapshot
 *     exists.
 *  4. A create that fails takes its counts back and sets COPIED again.  It does so only when the
 *     barrier after the restored header succeeded; else counts stay raised (a leak), COPIED stays
 *     off and the dirty bit on.  Counts that cannot be written back stay raised, too; COPIED is set
 *     by what they are.
 *  5. Once a delete is done, what fails in freeing is a warning, and the dirty bit stays set.
 *
 * The core holds the whole node and has drained it.
 *
 * Not done: VM state is not part of what is created here; it is written by whoever runs a machine.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-refcount-bulk.h"

#include <inttypes.h>
#include <string.h>
#include <time.h>

static bool fail_errno(GError **errp, int err)
{
    qb_error_set(errp, -err, "%s", g_strerror(-err));
    return false;
}

static void set_dirty(Qcow2Header *h, void *opaque)
{
    h->incompatible |= h->version >= 3 ? QCOW2_INCOMPAT_DIRTY : 0;
}

static void clear_dirty(Qcow2Header *h, void *opaque)
{
    h->incompatible &= ~QCOW2_INCOMPAT_DIRTY;
}

/* Step 2 of both. Version 2 has no bit and gets by without a write. */
static int begin_change_of_counts(BlockDriverState *bs)
{
    return qcow2_state(bs)->version >= 3 ? qcow2_header_update(bs, set_dirty, NULL, true) : 0;
}

static int end_change_of_counts(BlockDriverState *bs)
{
    int ret = qcow2_flush_all(bs);
    if (ret == 0 && qcow2_state(bs)->version >= 3) {
        ret = qcow2_header_update(bs, clear_dirty, NULL, true);
    }
    return ret;
}

/* ---------------------------------------------------------------- a new entry */

char *qcow2_snapshot_next_id(const GArray *snapshots)
{
    uint64_t max = 0;
    for (guint i = 0; i < snapshots->len; i++) {
        uint64_t id = strtoull(g_array_index(snapshots, Qcow2Snapshot, i).id, NULL, 10);
        max = MAX(max, id == UINT64_MAX ? 0 : id);
    }
    return g_strdup_printf("%" PRIu64, max + 1);
}

static Qcow2Snapshot new_entry(const BDRVQcow2State *s, const char *name)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (Qcow2Snapshot){
        .id = qcow2_snapshot_next_id(s->snapshots),
        .name = g_strdup(name),
        .date_sec = (uint32_t)now.tv_sec,
        .date_nsec = (uint32_t)now.tv_nsec,
        .disk_size = s->header.size,
        .extra_size = QCOW2_SNAPSHOT_EXTRA_KNOWN,
    };
}

/* ---------------------------------------------------------------- create */

typedef struct Creation {
    BlockDriverState *bs;
    BDRVQcow2State *s;
    GArray *tree;      /* Qcow2HostRun: all that the active L1 refers to */
    uint64_t l1_offset, l1_bytes; /* the snapshot's copy of L1; 0: not yet, or none needed */
    bool raised;       /* counts */
} Creation;

/* Step 3. Afterwards every write to a shared cluster is a new allocation. */
static int prepare_sharing(Creation *c)
{
    int ret = qcow2_clear_all_copied(c->bs);
    qcow2_inflight_wait(c->s, qcow2_inflight_seq(c->s));
    return ret == 0 && c->s->version < 3 ? qcow2_flush(c->bs) : ret;
}

static int raise_counts(Creation *c)
{
    int ret = qcow2_raise_counts_at_once(c->bs, c->tree);
    c->raised = ret == 0;
    return ret;
}

/* The snapshot's own copy; the flush before the header's switch makes it stable. */
static int copy_l1(Creation *c, Qcow2Snapshot *sn)
{
    g_autofree uint64_t *be = qcow2_l1_dup_be(c->s, &sn->l1_size);
    uint64_t bytes = (uint64_t)sn->l1_size * 8;
    if (!bytes) {
        return 0;
    }
    uint64_t clusters = qb_align_up(bytes, c->s->cluster_size);
    int64_t offset = qcow2_alloc_clusters(c->bs, clusters);
    if (offset < 0) {
        return (int)offset;
    }
    c->l1_offset = sn->l1_offset = (uint64_t)offset;
    c->l1_bytes = clusters;
    int ret = qcow2_check_overlap(c->bs, QCOW2_OL_NONE, c->l1_offset, bytes);
    return ret < 0 ? ret : bdrv_pwrite(c->bs->file, offset, (int64_t)bytes, be, 0);
}

static int do_create(Creation *c, Qcow2Snapshot *sn)
{
    int ret = begin_change_of_counts(c->bs);
    ret = ret < 0 ? ret : prepare_sharing(c);
    ret = ret < 0 ? ret : raise_counts(c);
    return ret < 0 ? ret : copy_l1(c, sn);
}

static int lower_counts(Creation *c)
{
    if (!c->raised) {
        return 0;
    }
    return qcow2_change_counts(c->bs, c->tree, -1);
}

/* Invariant 4. The first barrier settles which header the disk has: the old one. */
static int undo_create(Creation *c)
{
    g_autoptr(GArray) ones = g_array_new(false, false, sizeof(Qcow2HostRun));
    int ret = bdrv_flush(c->bs->file->bs);
    ret = ret < 0 ? ret : lower_counts(c);
    if (ret < 0) {
        return ret;
    }
    if (c->l1_bytes) {
        qcow2_free_run(c->bs, c->l1_offset, c->l1_bytes, QCOW2_DISCARD_SNAPSHOT);
    }
    ret = qcow2_flush_all(c->bs); /* counts go down before COPIED comes back */
    ret = ret < 0 ? ret : qcow2_runs_with_count_one(c->bs, c->tree, ones);
    ret = ret < 0 ? ret : qcow2_set_copied_in(c->bs, ones);
    return ret < 0 ? ret : end_change_of_counts(c->bs);
}

static bool create_entry(Creation *c, Qcow2Snapshot *sn, GError **errp)
{
    int ret = do_create(c, sn);
    if (ret < 0) {
        qcow2_snapshot_clear(sn);
        return fail_errno(errp, ret);
    }
    GArray *list = qcow2_snapshots_dup(c->s->snapshots);
    g_array_append_val(list, *sn); /* owned by the list from here on */
    return qcow2_snapshots_store(c->bs, list, clear_dirty, NULL, errp);
}

static bool may_create(BlockDriverState *bs, const char *name, GError **errp)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    if (s->has_data_file) {
        return fail_errno(errp, -ENOTSUP);
    }
    if (s->snapshots->len >= QCOW2_MAX_SNAPSHOTS) {
        return fail_errno(errp, -EFBIG);
    }
    if (strlen(name) > UINT16_MAX) {
        return fail_errno(errp, -EINVAL);
    }
    return true;
}

/* Users know the first line. */
static bool fail_for_counts(const BDRVQcow2State *s, int err, GError **errp)
{
    fail_errno(errp, err);
    if (err == -EINVAL) {
        qb_error_add_hint(errp, "Some clusters have as many references as refcounts of %u bits can"
                                " count; 'qemu-img amend -o refcount_bits=N' makes them wider.",
                          1u << s->refcount_order);
    }
    return false;
}

static int collect_active(BlockDriverState *bs, GArray *tree)
{
    int ret = qcow2_flush_all(bs);
    g_array_set_size(tree, 0);
    return ret < 0 ? ret : qcow2_tree_collect(bs, NULL, tree);
}

/* Also by moving what fills counts up; @tree is collected anew then. */
static int find_room(BlockDriverState *bs, GArray *tree)
{
    int ret = qcow2_counts_have_room(bs, tree);
    if (ret != -EINVAL) {
        return ret;
    }
    ret = qcow2_make_room_in_counts(bs, tree);
    ret = ret < 0 ? ret : collect_active(bs, tree);
    return ret < 0 ? ret : qcow2_counts_have_room(bs, tree);
}

bool qcow2_snapshot_create(BlockDriverState *bs, const char *name, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    g_autoptr(GArray) tree = g_array_new(false, false, sizeof(Qcow2HostRun));
    Creation c = {.bs = bs, .s = s, .tree = tree};
    if (!may_create(bs, name, errp)) {
        return false;
    }
    int ret = collect_active(bs, tree);
    if (ret < 0) {
        return fail_errno(errp, ret);
    }
    ret = find_room(bs, tree);
    if (ret < 0) {
        return fail_for_counts(s, ret, errp);
    }
    Qcow2Snapshot sn = new_entry(s, name);
    if (create_entry(&c, &sn, errp)) {
        return true;
    }
    ret = undo_create(&c);
    if (ret < 0) {
        bdrv_warn("Snapshot '%s' could not be taken back completely: %s", name, g_strerror(-ret));
    }
    return false;
}

/* ---------------------------------------------------------------- delete */

static int find_exact(const GArray *snapshots, const char *id, const char *name)
{
    for (guint i = 0; i < snapshots->len; i++) {
        const Qcow2Snapshot *sn = &g_array_index(snapshots, Qcow2Snapshot, i);
        if ((!id || !strcmp(sn->id, id)) && (!name || !strcmp(sn->name, name))) {
            return (int)i;
        }
    }
    return -1;
}

static int free_and_flush(BlockDriverState *bs, const GArray *runs)
{
    int ret = qcow2_free_runs(bs, runs, QCOW2_DISCARD_SNAPSHOT);
    return ret < 0 ? ret : qcow2_flush_all(bs);
}

/* Step 4; which of the clusters have one reference left is in @ones.  The drained node has no users,
 * and the header without the snapshot is stable: what others share need not go through quarantine. */
static int free_tree(BlockDriverState *bs, const GArray *tree, GArray *ones)
{
    g_autoptr(GArray) rest = g_array_new(false, false, sizeof(Qcow2HostRun));
    int ret = qcow2_lower_shared_counts(bs, tree, ones, rest);
    if (ret != -EUCLEAN) {
        return ret < 0 ? ret : free_and_flush(bs, rest);
    }
    ret = free_and_flush(bs, tree);
    return ret < 0 ? ret : qcow2_runs_with_count_one(bs, tree, ones);
}

/* Steps 4 to 6. @tree: what the snapshot referred to, its L1 included. */
static int give_back(BlockDriverState *bs, const GArray *tree)
{
    g_autoptr(GArray) ones = g_array_new(false, false, sizeof(Qcow2HostRun));
    int ret = free_tree(bs, tree, ones);
    ret = ret < 0 ? ret : qcow2_set_copied_in(bs, ones);
    return ret < 0 ? ret : end_change_of_counts(bs);
}

/* All that the snapshot refers to, and its L1; nothing when that is at an impossible place: then
 * deleting it is what one can do with such a snapshot. */
static bool collect_snapshot(BlockDriverState *bs, const Qcow2Snapshot *sn, GArray *tree,
                             GError **errp)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    g_autoptr(GError) err = NULL;
    g_autofree uint64_t *be = qcow2_snapshot_read_l1(bs, sn, &err);
    if (!be && (err->code == EINVAL || err->code == EFBIG)) {
        bdrv_warn("%s; the space of the snapshot is leaked, 'qemu-img check -r leaks' gives it back",
                  err->message);
        return true;
    }
    if (!be) {
        g_propagate_error(errp, g_steal_pointer(&err));
        return false;
    }
    int ret = qcow2_tree_collect(bs, &(Qcow2WalkSource){.be_l1 = be, .l1_size = sn->l1_size}, tree);
    if (ret < 0) {
        return fail_errno(errp, ret);
    }
    if (sn->l1_size) {
        Qcow2HostRun l1 = {sn->l1_offset, qb_align_up((uint64_t)sn->l1_size * 8, s->cluster_size)};
        g_array_append_val(tree, l1);
    }
    return true;
}

static bool drop_entry(BlockDriverState *bs, int index, GError **errp)
{
    int ret = begin_change_of_counts(bs);
    if (ret < 0) {
        return fail_errno(errp, ret);
    }
    GArray *list = qcow2_snapshots_dup(qcow2_state(bs)->snapshots);
    g_array_remove_index(list, (guint)index);
    if (qcow2_snapshots_store(bs, list, NULL, NULL, errp)) {
        return true;
    }
    ret = bdrv_flush(bs->file->bs); /* the restored header; nothing else has changed */
    if (ret == 0) {
        (void)end_change_of_counts(bs);
    }
    return false;
}

bool qcow2_snapshot_delete(BlockDriverState *bs, const char *id, const char *name, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    g_autoptr(GArray) tree = g_array_new(false, false, sizeof(Qcow2HostRun));
    int index = find_exact(s->snapshots, id, name);
    if (index < 0) {
        qb_error_set(errp, ENOENT, "snapshot not found");
        return false;
    }
    int ret = qcow2_flush_all(bs);
    if (ret < 0) {
        return fail_errno(errp, ret);
    }
    if (!collect_snapshot(bs, &g_array_index(s->snapshots, Qcow2Snapshot, index), tree, errp) ||
        !drop_entry(bs, index, errp)) {
        return false;
    }
    ret = give_back(bs, tree);
    if (ret < 0) {
        bdrv_warn("Could not give back all space of the deleted snapshot: %s", g_strerror(-ret));
    }
    return true;
}

/* ---------------------------------------------------------------- list */

GArray *qcow2_snapshot_list(BlockDriverState *bs, GError **errp)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    GArray *list = g_array_new(false, true, sizeof(BdrvSnapshotInfo));
    for (guint i = 0; i < s->snapshots->len; i++) {
        const Qcow2Snapshot *sn = &g_array_index(s->snapshots, Qcow2Snapshot, i);
        BdrvSnapshotInfo info = {
            .id = g_strdup(sn->id),
            .name = g_strdup(sn->name),
            .vm_state_size = sn->vm_state_size,
            .disk_size = sn->disk_size,
            .date_sec = sn->date_sec,
            .date_nsec = sn->date_nsec,
            .vm_clock_nsec = sn->vm_clock_nsec,
            .icount = sn->icount,
        };
        g_array_append_val(list, info);
    }
    return list;
}
