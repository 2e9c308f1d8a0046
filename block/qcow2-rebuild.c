/*
 * Repair of refcounts: make them what the map of references says, in place wherever that can be.
 *
 *   plan     which ranges lack a block, does the table need a new place   (only memory changes)
 *   raise    new blocks with their final counts; sound blocks: counts that are too low    | barrier
 *   hook up  entries of the table in place, or a new table and one header write           | barrier
 *   ...      the caller relinks guest data that had a second owner
 *   lower    sound blocks: counts that are too high                                       | barrier
 *
 * A sound block stays where it is, whatever its counts were: nothing grows when nothing was lost.
 * A block that is missing, unreadable or not alone in its cluster is made anew in a free cluster.
 * New blocks and a new table need counts themselves, which may need further blocks: plan_blocks()
 * repeats until nothing is missing.
 *
 * Invariants
 *   1. At every barrier each referenced cluster has a count of at least what it had before.
 *   2. A cluster is free for the repair if the map has no reference to it; when some references
 *      lead nowhere (c->lost) its count on disk should be 0 too, and the file rather grows than
 *      that clusters which look leaked are used.  When something could not be read (c->incomplete)
 *      nothing is made anew: only counts that are too low rise.
 *   3. Clusters with two owners keep the count they have, or get 1 if they had none: they are not
 *      blessed (rule 4 of qcow2-check.c).
 *   4. The header changes by one write of its sector, after everything it will point to is stable.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-check.h"

#include <inttypes.h>

static uint64_t block_of(const Qcow2Check *c, uint64_t cluster)
{
    return cluster >> c->s->refblock_bits;
}

/* The map has changed for these clusters: their blocks have work to do. Missing ones are planned
 * later. */
static void note_change(Qcow2Check *c, uint64_t first, uint64_t n, unsigned todo)
{
    for (uint64_t i = first; i < first + n; i++) {
        if (block_of(c, i) < c->nb_blocks) {
            c->blocks[block_of(c, i)].todo |= todo;
        }
    }
}

/* ---------------------------------------------------------------- free clusters */

/* Certain: also nothing that leads nowhere may have meant it (invariant 2). */
static bool is_free(Qcow2Check *c, uint64_t cluster, bool certain)
{
    if (qcow2_refmap_count(c->map, cluster)) {
        return false;
    }
    uint64_t count = 0;
    return !certain || !c->lost || (qcow2_check_disk_count(c, cluster, &count) && !count);
}

/* The first of @n free clusters in a row inside the file; UINT64_MAX if there are none. */
static uint64_t find_free(Qcow2Check *c, uint64_t n, bool certain)
{
    uint64_t run = 0;
    for (uint64_t i = c->free_hint; i < c->nb_clusters; i++) {
        run = is_free(c, i, certain) ? run + 1 : 0;
        if (run == n) {
            c->free_hint = n == 1 ? i + 1 : c->free_hint;
            return i + 1 - n;
        }
    }
    return UINT64_MAX;
}

/* @n clusters behind everything. */
static uint64_t append_clusters(Qcow2Check *c, uint64_t n)
{
    uint64_t first = MAX(c->nb_clusters, qcow2_refmap_end(c->map));
    if (first + n > (QCOW2_MAX_HOST_OFFSET >> c->s->cluster_bits)) {
        return UINT64_MAX;
    }
    uint64_t end = (first + n) << c->s->cluster_bits;
    if (!bdrv_truncate(c->bs->file, (int64_t)end, false, PREALLOC_MODE_OFF, false, NULL)) {
        return UINT64_MAX;
    }
    c->nb_clusters = first + n;
    c->file_bytes = end;
    c->touched = true;
    return first;
}

int64_t qcow2_check_take_clusters(Qcow2Check *c, uint64_t n, unsigned flags)
{
    uint64_t first = find_free(c, n, true);
    if (first == UINT64_MAX) {
        first = append_clusters(c, n);
    }
    if (c->incomplete) {
        return -EIO; /* maybe only now */
    }
    if (first == UINT64_MAX) {
        c->free_hint = 0;
        first = find_free(c, n, false);
    }
    if (first == UINT64_MAX) {
        return -ENOSPC;
    }
    for (uint64_t i = first; i < first + n; i++) {
        g_hash_table_add(c->taken, (gpointer)(uintptr_t)i);
    }
    qcow2_refmap_add(c->map, first, n, 1, flags, NULL, NULL);
    note_change(c, first, n, QCOW2_BLOCK_RAISE);
    return (int64_t)(first << c->s->cluster_bits);
}

/* An owner of @kind is gone; is it known that there is no other one? Where several owners of several
 * kinds are left, there may be: the cluster stays in conflict. */
static void forget_owner(Qcow2Check *c, uint64_t cluster, unsigned kind)
{
    uint32_t count = qcow2_refmap_count(c->map, cluster);
    unsigned others = qcow2_refmap_flags(c->map, cluster) & QCOW2_REF_KINDS & ~kind;
    if (kind && others && count > 1) {
        return;
    }
    qcow2_refmap_clear_kind(c->map, cluster, 1, others ? kind : 0);
}

void qcow2_check_give_clusters(Qcow2Check *c, uint64_t offset, uint64_t n, unsigned kind)
{
    uint64_t first = offset >> c->s->cluster_bits;
    qcow2_refmap_sub(c->map, first, n, 1);
    for (uint64_t i = first; i < first + n; i++) {
        forget_owner(c, i, kind);
    }
    note_change(c, first, n, QCOW2_BLOCK_LOWER);
}

/* ---------------------------------------------------------------- plan */

/* Takes references to blocks that will not stay out of the map. */
static void drop_unsound_blocks(Qcow2Check *c)
{
    for (uint64_t i = 0; i < c->nb_blocks; i++) {
        Qcow2CheckBlock *b = &c->blocks[i];
        if (b->state == QCOW2_BLOCK_SHARED) {
            qcow2_check_give_clusters(c, b->offset, 1, QCOW2_REF_META);
        }
        if (b->state == QCOW2_BLOCK_SHARED || b->state == QCOW2_BLOCK_BROKEN) {
            b->state = QCOW2_BLOCK_ABSENT;
            b->offset = 0;
            b->todo |= QCOW2_BLOCK_ENTRY;
        }
    }
}

static void drop_table(Qcow2Check *c)
{
    if (c->reftable_clusters) {
        qcow2_check_give_clusters(c, c->reftable_offset, c->reftable_clusters, QCOW2_REF_META);
        c->reftable_clusters = 0;
    }
}

void qcow2_check_release_structure(Qcow2Check *c)
{
    if (c->incomplete) {
        return;
    }
    drop_unsound_blocks(c);
    if (!c->reftable_sound) {
        drop_table(c);
    }
}

static int extend_blocks(Qcow2Check *c, uint64_t nb)
{
    if (nb > QCOW2_MAX_REFTABLE_BYTES / sizeof(uint64_t)) {
        return -EFBIG;
    }
    if (nb > c->nb_blocks) {
        c->blocks = g_renew(Qcow2CheckBlock, c->blocks, nb);
        memset(c->blocks + c->nb_blocks, 0, (nb - c->nb_blocks) * sizeof(Qcow2CheckBlock));
        c->nb_blocks = nb;
    }
    return 0;
}

/* Gives the range of counts @index a block if it has none: 1, 0, or -errno. */
static int plan_block(Qcow2Check *c, uint64_t index)
{
    int ret = extend_blocks(c, index + 1);
    if (ret < 0 || c->blocks[index].state == QCOW2_BLOCK_SOUND ||
        c->blocks[index].state == QCOW2_BLOCK_NEW) {
        return ret;
    }
    int64_t offset = qcow2_check_take_clusters(c, 1, QCOW2_REF_META);
    if (offset < 0) {
        return (int)offset;
    }
    c->blocks[index].offset = (uint64_t)offset;
    c->blocks[index].state = QCOW2_BLOCK_NEW;
    c->blocks[index].todo |= QCOW2_BLOCK_ENTRY;
    return 1;
}

/* Every range with references gets a block; the blocks themselves are references. 0 or -errno. */
static int plan_blocks(Qcow2Check *c)
{
    int again = 1;
    while (again > 0) {
        g_autoptr(GPtrArray) leaves = qcow2_refmap_sorted(c->map);
        again = 0;
        for (guint i = 0; i < leaves->len; i++) {
            const Qcow2RefLeaf *leaf = g_ptr_array_index(leaves, i);
            if (!qcow2_refleaf_end(leaf)) {
                continue;
            }
            int ret = plan_block(c, block_of(c, leaf->index * QCOW2_REF_LEAF));
            if (ret < 0) {
                return ret;
            }
            again |= ret;
        }
    }
    return 0;
}

static uint64_t table_entries_needed(const Qcow2Check *c)
{
    uint64_t n = c->nb_blocks;
    while (n > 0 && c->blocks[n - 1].state == QCOW2_BLOCK_ABSENT) {
        n--;
    }
    return n;
}

static bool table_fits(const Qcow2Check *c)
{
    uint64_t capacity = ((uint64_t)c->reftable_clusters << c->s->cluster_bits) / sizeof(uint64_t);
    return c->reftable_sound && table_entries_needed(c) <= capacity;
}

/* A place for a table with room for all blocks. 0 or -errno. */
static int plan_table(Qcow2Check *c)
{
    uint64_t bytes = table_entries_needed(c) * sizeof(uint64_t);
    uint64_t clusters = MAX(1, qcow2_size_to_clusters(c->s, bytes));
    drop_table(c);
    int64_t offset = qcow2_check_take_clusters(c, clusters, QCOW2_REF_META);
    if (offset < 0) {
        return (int)offset;
    }
    c->reftable_offset = (uint64_t)offset;
    c->reftable_clusters = (uint32_t)clusters;
    c->reftable_sound = true;
    return 0;
}

static bool plan(Qcow2Check *c)
{
    qcow2_check_release_structure(c);
    int ret = plan_blocks(c);
    while (ret == 0 && !table_fits(c)) {
        ret = plan_table(c);
        ret = ret < 0 ? ret : plan_blocks(c);
    }
    if (ret < 0) {
        qcow2_check_report(c, BDRV_FINDING_CHECK_ERROR, false, "rebuild-failed", UINT64_MAX,
                           "ERROR: Could not make room for refcount structures: %s",
                           g_strerror(-ret));
    }
    return ret == 0;
}

/* ---------------------------------------------------------------- counts */

/* What the count of a cluster is to become (invariant 3). */
static uint64_t wanted(const Qcow2Check *c, unsigned flags, uint32_t refs, uint64_t disk)
{
    if ((flags & QCOW2_REF_ALIAS) && (flags & QCOW2_REF_KINDS) != QCOW2_REF_DATA) {
        return MAX(disk, 1);
    }
    return MIN(refs, c->s->refcount_max);
}

static void report_repair(Qcow2Check *c, uint64_t cluster, uint64_t disk, uint64_t refs)
{
    if (!g_hash_table_contains(c->taken, (gpointer)(uintptr_t)cluster)) {
        qcow2_check_report(c, BDRV_FINDING_INFO, true, "refcount-repaired",
                           cluster << c->s->cluster_bits,
                           "Repairing cluster %" PRIu64 " refcount=%" PRIu64 " reference=%" PRIu64,
                           cluster, disk, refs);
    }
}

/* Sets counts of a block that are on the side of @todo; true when there was one. */
static bool correct_block(Qcow2Check *c, uint64_t index, uint8_t *data, unsigned todo)
{
    bool silent = c->blocks[index].state == QCOW2_BLOCK_NEW; /* "Rebuilding" was said */
    unsigned order = c->s->refcount_order;
    uint64_t first = index << c->s->refblock_bits;
    bool changed = false;
    for (uint64_t slot = 0; slot < UINT64_C(1) << c->s->refblock_bits; slot++) {
        const Qcow2RefLeaf *leaf = qcow2_refmap_leaf(c->map, first + slot);
        unsigned in_leaf = slot % QCOW2_REF_LEAF;
        uint64_t disk = qcow2_refcount_read(data, order, slot);
        uint64_t count = 0;
        if (leaf) {
            uint32_t refs = qcow2_refleaf_count(leaf, in_leaf);
            count = wanted(c, qcow2_refleaf_flags(leaf, in_leaf), refs, disk);
        }
        if (todo == QCOW2_BLOCK_RAISE ? disk >= count : disk <= count) {
            continue;
        }
        qcow2_refcount_write(data, order, slot, count);
        changed = true;
        if (!silent) {
            report_repair(c, first + slot, disk, count);
        }
    }
    return changed;
}

static int write_blocks(Qcow2Check *c, BdrvBatchOp *ops, size_t n)
{
    int ret = n ? qcow2_begin_change(c->bs, false) : 0;
    c->touched = true;
    if (ret == 0 && n) {
        ret = bdrv_run_batch(c->bs->file, ops, n);
    }
    if (ret < 0) {
        c->write_failed = true;
        qcow2_check_report(c, BDRV_FINDING_CHECK_ERROR, false, "write-failed", UINT64_MAX,
                           "ERROR writing refblock: %s", g_strerror(-ret));
    }
    return ret;
}

/* Reads (or, if new, makes) the blocks @indices, corrects and writes them. */
static int correct_batch(Qcow2Check *c, const uint64_t *indices, size_t n, unsigned todo,
                         uint8_t *buf)
{
    g_autofree BdrvBatchOp *ops = g_new0(BdrvBatchOp, MAX(n, 1));
    bool new = n && c->blocks[indices[0]].state == QCOW2_BLOCK_NEW;
    size_t bytes = c->s->cluster_size, changed = 0;
    if (new) {
        memset(buf, 0, n * bytes);
    } else {
        qcow2_check_read_blocks(c, indices, n, buf);
    }
    for (size_t i = 0; i < n; i++) {
        const Qcow2CheckBlock *b = &c->blocks[indices[i]];
        bool write = b->state != QCOW2_BLOCK_UNREADABLE &&
                     correct_block(c, indices[i], buf + i * bytes, todo);
        if (write || new) {
            ops[changed++] = (BdrvBatchOp){.kind = BDRV_BATCH_WRITE, .offset = (int64_t)b->offset,
                                           .bytes = (int64_t)bytes, .buf = buf + i * bytes};
        }
    }
    return write_blocks(c, ops, changed);
}

/* All blocks in @state with @todo (0: any). */
static bool correct_blocks(Qcow2Check *c, Qcow2BlockState state, unsigned todo, unsigned with)
{
    size_t batch = qcow2_check_batch(c), n = 0;
    g_autofree uint8_t *buf = g_malloc(batch << c->s->cluster_bits);
    g_autofree uint64_t *indices = g_new(uint64_t, batch);
    int ret = 0;
    for (uint64_t i = 0; i < c->nb_blocks && ret == 0; i++) {
        const Qcow2CheckBlock *b = &c->blocks[i];
        if (b->state == state && (!with || (b->todo & with))) {
            indices[n++] = i;
        }
        if (n == batch) {
            ret = correct_batch(c, indices, n, todo, buf);
            n = 0;
        }
    }
    return ret == 0 && correct_batch(c, indices, n, todo, buf) == 0;
}

/* ---------------------------------------------------------------- hooking up */

static bool entries_to_write(const Qcow2Check *c, uint64_t *first, uint64_t *end)
{
    *first = UINT64_MAX;
    for (uint64_t i = 0; i < c->nb_blocks; i++) {
        if (c->blocks[i].todo & QCOW2_BLOCK_ENTRY) {
            *first = MIN(*first, i);
            *end = i + 1;
        }
    }
    return *first != UINT64_MAX;
}

/* Entries [first, first + n), big-endian; what lies beyond the blocks is 0. */
static uint64_t *encode_entries(const Qcow2Check *c, uint64_t first, uint64_t n)
{
    uint64_t *be = g_new0(uint64_t, n);
    for (uint64_t i = first; i < first + n && i < c->nb_blocks; i++) {
        be[i - first] = htobe64(c->blocks[i].offset);
    }
    return be;
}

static void set_table(Qcow2Header *h, void *opaque)
{
    const Qcow2Check *c = opaque;
    h->reftable_offset = c->reftable_offset;
    h->reftable_clusters = c->reftable_clusters;
}

/* Writes the new table and switches the header to it (invariant 4). */
static bool switch_table(Qcow2Check *c)
{
    size_t bytes = (size_t)c->reftable_clusters << c->s->cluster_bits;
    g_autofree uint64_t *be = encode_entries(c, 0, bytes / sizeof(uint64_t));
    if (qcow2_check_write(c, c->reftable_offset, bytes, be) < 0 || qcow2_check_barrier(c) < 0) {
        return false;
    }
    int ret = qcow2_header_update(c->bs, set_table, c, true);
    if (ret < 0) {
        c->write_failed = true;
        qcow2_check_report(c, BDRV_FINDING_CHECK_ERROR, false, "write-failed", 0,
                           "ERROR setting reftable: %s", g_strerror(-ret));
    }
    return ret == 0;
}

/* Sectors in between are rewritten as they are. */
static bool write_entries(Qcow2Check *c, uint64_t first, uint64_t end)
{
    g_autofree uint64_t *be = encode_entries(c, first, end - first);
    uint64_t pos = c->reftable_offset + first * sizeof(uint64_t);
    return qcow2_check_write(c, pos, (end - first) * sizeof(uint64_t), be) == 0 &&
           qcow2_check_barrier(c) == 0;
}

static bool hook_up(Qcow2Check *c)
{
    uint64_t first, end = 0;
    bool entries = entries_to_write(c, &first, &end);
    if (c->reftable_offset != c->s->header.reftable_offset ||
        c->reftable_clusters != c->s->header.reftable_clusters) {
        return switch_table(c);
    }
    return !entries || write_entries(c, first, end);
}

/* ---------------------------------------------------------------- the two halves of a repair */

/* Does the structure itself, not only some counts, have to change? */
static bool structure_is_broken(const Qcow2Check *c)
{
    bool broken = !c->reftable_sound || c->uncounted;
    for (uint64_t i = 0; i < c->nb_blocks && !broken; i++) {
        uint8_t state = c->blocks[i].state;
        broken = state == QCOW2_BLOCK_SHARED || state == QCOW2_BLOCK_BROKEN ||
                 (c->blocks[i].todo & QCOW2_BLOCK_ENTRY);
    }
    return broken;
}

static void say_rebuild(Qcow2Check *c, const char *text)
{
    qcow2_check_report(c, BDRV_FINDING_INFO, false, "refcount-rebuild", UINT64_MAX, "%s", text);
}

bool qcow2_check_raise(Qcow2Check *c)
{
    bool rebuild = structure_is_broken(c);
    qcow2_check_drop_blocks(c);
    if (rebuild && c->incomplete) {
        say_rebuild(c, "ERROR need to rebuild refcount structures");
        rebuild = false;
    } else if (rebuild) {
        say_rebuild(c, "Rebuilding refcount structure");
    }
    bool planned = !c->incomplete && plan(c);
    qcow2_check_drop_blocks(c);
    if (planned && !correct_blocks(c, QCOW2_BLOCK_NEW, QCOW2_BLOCK_RAISE, 0)) {
        return false;
    }
    bool raised = correct_blocks(c, QCOW2_BLOCK_SOUND, QCOW2_BLOCK_RAISE, QCOW2_BLOCK_RAISE);
    return (!c->touched || qcow2_check_barrier(c) == 0) && raised && planned && hook_up(c);
}

bool qcow2_check_lower(Qcow2Check *c)
{
    if (c->incomplete || c->keep_leaks) {
        return false;
    }
    if (!(c->fix & BDRV_FIX_ERRORS) && structure_is_broken(c)) {
        say_rebuild(c, "ERROR need to rebuild refcount structures");
    }
    qcow2_check_drop_blocks(c);
    return correct_blocks(c, QCOW2_BLOCK_SOUND, QCOW2_BLOCK_LOWER, QCOW2_BLOCK_LOWER) &&
           (!c->touched || qcow2_check_barrier(c) == 0);
}

/* ---------------------------------------------------------------- verification */

/* What the repair has made is what is looked at from now on. */
static void adopt_blocks(Qcow2Check *c)
{
    for (uint64_t i = 0; i < c->nb_blocks; i++) {
        c->blocks[i].todo = 0;
        if (c->blocks[i].state == QCOW2_BLOCK_NEW) {
            c->blocks[i].state = QCOW2_BLOCK_SOUND;
        }
    }
}

/* Moves what is no longer found from @left to @fixed. */
static void settle_counter(uint64_t *left, uint64_t *fixed, uint64_t before, uint64_t after)
{
    assert(*left >= before);
    *left = *left - before + after;
    *fixed += before > after ? before - after : 0;
}

void qcow2_check_verify(Qcow2Check *c, bool hooked_up)
{
    BdrvCheckResult *res = c->res, again = {0};
    uint64_t structure = c->structure_faults;
    c->res = &again;
    c->quiet = true;
    c->copied_suspect = c->overflowing = false;
    if (hooked_up) {
        adopt_blocks(c);
        structure = 0;
    }
    qcow2_check_drop_blocks(c);
    qcow2_check_compare(c);
    c->res = res;
    c->quiet = false;
    settle_counter(&res->corruptions, &res->corruptions_fixed, c->structure_faults, structure);
    settle_counter(&res->corruptions, &res->corruptions_fixed, c->overflows,
                   c->overflowing ? c->overflows : 0);
    settle_counter(&res->corruptions, &res->corruptions_fixed, c->count_faults, again.corruptions);
    settle_counter(&res->leaks, &res->leaks_fixed, c->count_leaks, again.leaks);
    res->check_errors += again.check_errors;
    res->image_end_offset = again.image_end_offset;
}
