/*
 * Check: the refcounts on disk against the map of references.
 *
 *   refcount table (from memory, after a flush)       blocks
 *     [ entry | entry | 0 | entry ]  -- judge -->  [ SOUND | SHARED | ABSENT | BROKEN ]
 *         |                                            |         |        |        |
 *       block: R counts, read many at a time           `- read --'        `- all counts 0 -'
 *         |
 *         `-- 64 counts at a time against a leaf of the map --> findings, work for a repair
 *
 * A block is SOUND when it lies inside the file, aligned, and nothing else refers to its cluster.
 * Reserved bits in its entry are a finding of their own and do not make it less readable.  The
 * second of two entries that name one block is BROKEN: the block can describe only one range.
 *
 * Invariants
 *   1. Blocks are counted in the map here, last of all, so that a conflict is always found on the
 *      side of the refcounts, which can be made anew.
 *   2. c->blocks has an entry for every entry of the table on disk; what lies beyond counts as 0.
 *   3. A difference is reported once per cluster, in the order of the file; for what is done about
 *      it only two bits per block are kept.
 *   4. Counts of clusters beyond the end of the file are lowered too: nobody can use that space.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-check.h"
#include "block/qcow2-refcount-int.h"

#include <inttypes.h>

#define BATCH_BYTES ((size_t)2 << 20) /* what the caches of a core hold */

static uint64_t counts_per_block(const Qcow2Check *c)
{
    return UINT64_C(1) << c->s->refblock_bits;
}

/* ---------------------------------------------------------------- the table and its blocks */

/* Is there a table to speak of? What an unsound one says is used if it can be; a repair makes
 * another. */
static void judge_table(Qcow2Check *c)
{
    BDRVQcow2State *s = c->s;
    c->reftable_offset = s->header.reftable_offset;
    c->reftable_clusters = s->header.reftable_clusters;
    uint64_t bytes = (uint64_t)c->reftable_clusters << s->cluster_bits;
    if (!s->reftable.nb_entries) {
        qcow2_check_report(c, BDRV_FINDING_CORRUPTION, false, "refcount-table-place",
                           c->reftable_offset,
                           "ERROR refcount table offset=%" PRIx64 " clusters=%" PRIu32
                           " is invalid",
                           c->reftable_offset, c->reftable_clusters);
        c->reftable_clusters = 0;
    } else if (qcow2_check_count(c, c->reftable_offset, bytes, 1, QCOW2_REF_META)) {
        c->reftable_sound =
            bytes && qcow2_check_exclusive(c, c->reftable_offset, bytes, QCOW2_REF_META);
    } else {
        c->reftable_clusters = 0;
    }
}

/* Where the block of an entry lies, if it can be read there. */
static bool locate_block(Qcow2Check *c, uint64_t i, uint64_t entry)
{
    BDRVQcow2State *s = c->s;
    uint64_t offset = entry & QCOW2_REFTABLE_OFFSET_MASK;
    if (qcow2_offset_into_cluster(s, offset)) {
        qcow2_check_report(c, BDRV_FINDING_CORRUPTION, false, "refblock-unaligned", offset,
                           "ERROR refcount block %" PRIu64
                           " is not cluster aligned; refcount table entry corrupted",
                           i);
        return false;
    }
    if (offset >> s->cluster_bits >= c->nb_clusters) {
        bool repair = c->fix & BDRV_FIX_ERRORS;
        qcow2_check_report(c, BDRV_FINDING_CORRUPTION, false, "refblock-outside", offset,
                           "%s refcount block %" PRIu64 " is outside image",
                           repair ? "Repairing" : "ERROR", i);
        return false;
    }
    return true;
}

/* Counts a block; is it the only owner of its cluster? */
static Qcow2BlockState claim_block(Qcow2Check *c, uint64_t i, uint64_t offset, GHashTable *seen)
{
    gpointer key = (gpointer)(uintptr_t)(offset >> c->s->cluster_bits);
    bool twice = !g_hash_table_add(seen, key);
    if (!twice) {
        qcow2_check_count(c, offset, c->s->cluster_size, 1, QCOW2_REF_META);
    }
    uint64_t count = qcow2_refmap_count(c->map, offset >> c->s->cluster_bits) + twice;
    if (qcow2_check_exclusive(c, offset, c->s->cluster_size, QCOW2_REF_META) && !twice) {
        return QCOW2_BLOCK_SOUND;
    }
    qcow2_check_report(c, BDRV_FINDING_CORRUPTION, false, "refblock-shared", offset,
                       "ERROR refcount block %" PRIu64 " refcount=%" PRIu64, i, count);
    return twice ? QCOW2_BLOCK_BROKEN : QCOW2_BLOCK_SHARED;
}

static void judge_block(Qcow2Check *c, uint64_t i, uint64_t entry, GHashTable *seen)
{
    Qcow2CheckBlock *block = &c->blocks[i];
    if (entry & QCOW2_REFTABLE_RESERVED_MASK) {
        qcow2_check_report(c, BDRV_FINDING_CORRUPTION, false, "reftable-reserved-bits",
                           entry & QCOW2_REFTABLE_OFFSET_MASK,
                           "ERROR refcount table entry %" PRIu64 " has reserved bits set", i);
        block->todo |= QCOW2_BLOCK_ENTRY;
    }
    if (!(entry & QCOW2_REFTABLE_OFFSET_MASK)) {
        return;
    }
    if (!locate_block(c, i, entry)) {
        block->state = QCOW2_BLOCK_BROKEN;
        return;
    }
    block->offset = entry & QCOW2_REFTABLE_OFFSET_MASK;
    block->state = claim_block(c, i, block->offset, seen);
}

void qcow2_check_refcount_structure(Qcow2Check *c)
{
    uint64_t before = c->res->corruptions - c->overflows; /* those are settled by themselves */
    judge_table(c);
    c->nb_blocks = c->reftable_clusters ? c->s->reftable.nb_entries : 0;
    c->blocks = g_new0(Qcow2CheckBlock, MAX(c->nb_blocks, 1));
    g_autoptr(GHashTable) seen = g_hash_table_new(NULL, NULL);
    for (uint64_t i = 0; i < c->nb_blocks; i++) {
        uint64_t entry = c->s->reftable.entries[i];
        if (entry) {
            judge_block(c, i, entry, seen);
        }
    }
    c->structure_faults = c->res->corruptions - c->overflows - before;
}

/* ---------------------------------------------------------------- reading blocks */

static bool is_readable(const Qcow2CheckBlock *b)
{
    return b->state == QCOW2_BLOCK_SOUND || b->state == QCOW2_BLOCK_SHARED;
}

static uint64_t count_readable(const Qcow2Check *c)
{
    uint64_t n = 0;
    for (uint64_t i = 0; i < c->nb_blocks; i++) {
        n += is_readable(&c->blocks[i]);
    }
    return n;
}

size_t qcow2_check_batch(const Qcow2Check *c)
{
    return MAX(1, BATCH_BYTES >> c->s->cluster_bits);
}

/* The last block of a file may be cut off: what is missing is zero. */
static BdrvBatchOp read_op(const Qcow2Check *c, uint64_t offset, uint8_t *buf)
{
    size_t bytes = MIN((uint64_t)c->s->cluster_size, c->file_bytes - offset);
    memset(buf + bytes, 0, c->s->cluster_size - bytes);
    return (BdrvBatchOp){.kind = BDRV_BATCH_READ, .offset = (int64_t)offset,
                         .bytes = (int64_t)bytes, .buf = buf};
}

static void block_unreadable(Qcow2Check *c, uint64_t index, int error)
{
    uint64_t cluster = index << c->s->refblock_bits;
    qcow2_check_report(c, BDRV_FINDING_CHECK_ERROR, false, "refblock-read", c->blocks[index].offset,
                       "Can't get refcount for cluster %" PRIu64 ": %s", cluster,
                       g_strerror(-error));
    c->blocks[index].state = QCOW2_BLOCK_UNREADABLE;
    c->incomplete = true;
}

void qcow2_check_read_blocks(Qcow2Check *c, const uint64_t *indices, size_t n, uint8_t *buf)
{
    g_autofree BdrvBatchOp *ops = g_new0(BdrvBatchOp, n);
    for (size_t i = 0; i < n; i++) {
        assert(is_readable(&c->blocks[indices[i]]));
        ops[i] = read_op(c, c->blocks[indices[i]].offset, buf + (i << c->s->cluster_bits));
    }
    if (n && bdrv_run_batch(c->bs->file, ops, n) < 0) {
        for (size_t i = 0; i < n; i++) {
            if (ops[i].ret < 0) {
                block_unreadable(c, indices[i], ops[i].ret);
            }
        }
    }
    qb_progress_add(c->opts->progress, (uint64_t)n << c->s->cluster_bits);
}

/* ---------------------------------------------------------------- counts */

/* Two owners on one cluster: who are they? */
static void name_owners(Qcow2Check *c, uint64_t cluster, unsigned flags, bool count_it)
{
    static const char *const names[] = {"metadata", "an L2 table", "guest data", "compressed data"};
    g_autoptr(GString) who = g_string_new(NULL);
    for (unsigned i = 0; i < G_N_ELEMENTS(names); i++) {
        if (flags & (1u << i)) {
            g_string_append_printf(who, "%s%s", who->len ? " and " : "", names[i]);
        }
    }
    bool one_kind = !strstr(who->str, " and ");
    qcow2_check_report(c, count_it ? BDRV_FINDING_CORRUPTION : BDRV_FINDING_INFO, false,
                       "cluster-shared", cluster << c->s->cluster_bits,
                       "ERROR cluster %" PRIu64 " is used twice%s%s", cluster,
                       one_kind ? " as " : ": as ", who->str);
}

/* Kinds that cannot share are damage whatever the count says. Data twice is legal with the right
 * count. */
static bool is_conflict(unsigned flags)
{
    unsigned kinds = flags & QCOW2_REF_KINDS;
    return (flags & QCOW2_REF_ALIAS) && kinds != QCOW2_REF_DATA;
}

static void report_difference(Qcow2Check *c, uint64_t cluster, uint64_t disk, uint32_t refs,
                              Qcow2CheckBlock *block)
{
    uint64_t offset = cluster << c->s->cluster_bits;
    if (disk > refs) {
        qcow2_check_report(c, BDRV_FINDING_LEAK, false, "refcount-too-high", offset,
                           "Leaked cluster %" PRIu64 " refcount=%" PRIu64 " reference=%" PRIu32,
                           cluster, disk, refs);
    } else {
        qcow2_check_report(c, BDRV_FINDING_CORRUPTION, false, "refcount-too-low", offset,
                           "ERROR cluster %" PRIu64 " refcount=%" PRIu64 " reference=%" PRIu32,
                           cluster, disk, refs);
    }
    if (block) {
        block->todo |= disk > refs ? QCOW2_BLOCK_LOWER : QCOW2_BLOCK_RAISE;
    } else {
        c->uncounted = true;
    }
}

/* @cluster is in use. */
static void note_end(Qcow2Check *c, uint64_t cluster)
{
    if (cluster < c->nb_clusters) {
        c->res->image_end_offset = (int64_t)((cluster + 1) << c->s->cluster_bits);
    }
}

static void compare_cluster(Qcow2Check *c, uint64_t cluster, uint64_t disk,
                            const Qcow2RefLeaf *leaf, Qcow2CheckBlock *block)
{
    unsigned slot = cluster % QCOW2_REF_LEAF;
    uint32_t refs = leaf ? qcow2_refleaf_count(leaf, slot) : 0;
    unsigned flags = leaf ? qcow2_refleaf_flags(leaf, slot) : 0;
    c->overflowing |= refs > c->s->refcount_max;
    refs = MIN(refs, c->s->refcount_max);
    if (disk != refs) {
        report_difference(c, cluster, disk, refs, block);
    }
    if (is_conflict(flags)) {
        name_owners(c, cluster, flags, disk >= refs);
    }
    c->copied_suspect |= ((flags & QCOW2_REF_COPIED) && disk != 1) ||
                         ((flags & QCOW2_REF_SHARED) && disk == 1);
    if (disk || refs) {
        note_end(c, cluster);
    }
}

/* Counts of a group of clusters, as a leaf has them: all alike. */
typedef struct Pattern {
    uint32_t refs; /* 0: all is zero */
    uint8_t counts[QCOW2_REF_LEAF * 8];
} Pattern;

static bool group_is(const uint8_t *group, unsigned order, uint32_t refs, Pattern *p)
{
    if (p->refs != refs) {
        p->refs = refs;
        qcow2_fill_counts(p->counts, order, 0, QCOW2_REF_LEAF, refs);
    }
    return memcmp(group, p->counts, (QCOW2_REF_LEAF << order) / 8) == 0;
}

/* Nearly all groups of nearly all images: every cluster is in use and has the same count, that on
 * disk, and the flags agree with it. Nothing to say then. */
static bool group_is_settled(const Qcow2Check *c, const uint8_t *group, const Qcow2RefLeaf *leaf,
                             Pattern *p)
{
    uint32_t refs = qcow2_refleaf_count(leaf, 0);
    if (!refs || refs > c->s->refcount_max || qcow2_refleaf_run(leaf, 0) < QCOW2_REF_LEAF) {
        return false;
    }
    unsigned wrong = QCOW2_REF_ALIAS | (refs == 1 ? QCOW2_REF_SHARED : QCOW2_REF_COPIED);
    return !(qcow2_refleaf_any_flags(leaf) & wrong) &&
           group_is(group, c->s->refcount_order, refs, p);
}

/* The next leaf in file order. */
typedef struct LeafCursor {
    GPtrArray *leaves;
    guint next;
} LeafCursor;

static const Qcow2RefLeaf *leaf_at(LeafCursor *cur, uint64_t index)
{
    while (cur->next < cur->leaves->len) {
        const Qcow2RefLeaf *leaf = g_ptr_array_index(cur->leaves, cur->next);
        if (leaf->index >= index) {
            return leaf->index == index ? leaf : NULL;
        }
        cur->next++;
    }
    return NULL;
}

static void compare_leaf(Qcow2Check *c, const Qcow2RefLeaf *leaf, Qcow2CheckBlock *block)
{
    for (unsigned i = 0; i < QCOW2_REF_LEAF; i++) {
        compare_cluster(c, leaf->index * QCOW2_REF_LEAF + i, 0, leaf, block);
    }
}

/* Everything referenced in leaves before @end has no count at all. */
static void compare_uncounted(Qcow2Check *c, LeafCursor *cur, uint64_t end, Qcow2CheckBlock *block)
{
    for (; cur->next < cur->leaves->len; cur->next++) {
        const Qcow2RefLeaf *leaf = g_ptr_array_index(cur->leaves, cur->next);
        if (leaf->index >= end) {
            break;
        }
        compare_leaf(c, leaf, block);
    }
}

static void compare_block(Qcow2Check *c, LeafCursor *cur, uint64_t index, const uint8_t *data)
{
    unsigned order = c->s->refcount_order;
    uint64_t first = index << c->s->refblock_bits;
    Pattern free = {0}, used = {0};
    for (uint64_t slot = 0; slot < counts_per_block(c); slot += QCOW2_REF_LEAF) {
        const Qcow2RefLeaf *leaf = leaf_at(cur, (first + slot) / QCOW2_REF_LEAF);
        const uint8_t *group = data + ((slot << order) / 8);
        if (!leaf && group_is(group, order, 0, &free)) {
            continue;
        }
        if (leaf && group_is_settled(c, group, leaf, &used)) {
            note_end(c, first + slot + QCOW2_REF_LEAF - 1);
            continue;
        }
        for (uint64_t i = slot; i < slot + QCOW2_REF_LEAF; i++) {
            compare_cluster(c, first + i, qcow2_refcount_read(data, order, i), leaf,
                            &c->blocks[index]);
        }
    }
    leaf_at(cur, (first + counts_per_block(c)) / QCOW2_REF_LEAF); /* past what was compared */
}

/* Reads the blocks @indices and compares them; in between lie only blocks that are not there. */
static void compare_batch(Qcow2Check *c, LeafCursor *cur, const uint64_t *indices, size_t n,
                          uint8_t *buf)
{
    qcow2_check_read_blocks(c, indices, n, buf);
    for (size_t i = 0; i < n; i++) {
        uint64_t first_leaf = (indices[i] << c->s->refblock_bits) / QCOW2_REF_LEAF;
        compare_uncounted(c, cur, first_leaf, NULL);
        if (is_readable(&c->blocks[indices[i]])) {
            compare_block(c, cur, indices[i], buf + (i << c->s->cluster_bits));
        } else {
            leaf_at(cur, first_leaf + counts_per_block(c) / QCOW2_REF_LEAF);
        }
    }
}

/* A block in a hole of the file: all its counts are 0. */
static void compare_hole(Qcow2Check *c, LeafCursor *cur, uint64_t index)
{
    uint64_t first = index << c->s->refblock_bits;
    compare_uncounted(c, cur, first / QCOW2_REF_LEAF, NULL);
    compare_uncounted(c, cur, (first + counts_per_block(c)) / QCOW2_REF_LEAF, &c->blocks[index]);
}

void qcow2_check_compare(Qcow2Check *c)
{
    size_t batch = qcow2_check_batch(c), n = 0;
    g_autofree uint8_t *buf = g_malloc(batch << c->s->cluster_bits);
    g_autofree uint64_t *indices = g_new(uint64_t, batch);
    g_autoptr(GPtrArray) leaves = qcow2_refmap_sorted(c->map);
    LeafCursor cur = {.leaves = leaves};
    uint64_t readable = count_readable(c);
    for (uint64_t i = 0; i < c->nb_blocks && !qcow2_check_cancelled(c); i++) {
        if (!is_readable(&c->blocks[i])) {
            continue;
        }
        bool hole = qcow2_check_is_hole(c, c->blocks[i].offset, readable);
        if (!hole) {
            indices[n++] = i;
        }
        if (hole || n == batch) {
            compare_batch(c, &cur, indices, n, buf);
            n = 0;
        }
        if (hole) {
            compare_hole(c, &cur, i);
        }
    }
    compare_batch(c, &cur, indices, n, buf);
    compare_uncounted(c, &cur, UINT64_MAX, NULL);
    c->compared = true;
}

/* ---------------------------------------------------------------- single counts */

void qcow2_check_drop_blocks(Qcow2Check *c)
{
    for (size_t i = 0; i < G_N_ELEMENTS(c->near_blocks); i++) {
        g_clear_pointer(&c->near_blocks[i].data, g_free);
    }
}

static const uint8_t *near_block(Qcow2Check *c, uint64_t index)
{
    size_t way = index % G_N_ELEMENTS(c->near_blocks);
    if (!c->near_blocks[way].data) {
        c->near_blocks[way].data = g_malloc(c->s->cluster_size);
        c->near_blocks[way].index = UINT64_MAX;
    }
    if (c->near_blocks[way].index != index) {
        c->near_blocks[way].index = index;
        qcow2_check_read_blocks(c, &index, 1, c->near_blocks[way].data); /* or UNREADABLE */
    }
    return c->near_blocks[way].data;
}

bool qcow2_check_disk_count(Qcow2Check *c, uint64_t cluster, uint64_t *ret)
{
    uint64_t index = cluster >> c->s->refblock_bits;
    const Qcow2CheckBlock *block = index < c->nb_blocks ? &c->blocks[index] : NULL;
    *ret = 0;
    if (!block || (!is_readable(block) && block->state != QCOW2_BLOCK_UNREADABLE)) {
        return true;
    }
    bool differs = !c->compared || (block->todo & (QCOW2_BLOCK_RAISE | QCOW2_BLOCK_LOWER));
    if (block->state == QCOW2_BLOCK_SOUND && !differs) {
        *ret = MIN(qcow2_refmap_count(c->map, cluster), c->s->refcount_max);
        return true;
    }
    const uint8_t *data = is_readable(block) ? near_block(c, index) : NULL;
    if (!data || !is_readable(block)) {
        return false;
    }
    *ret = qcow2_refcount_read(data, c->s->refcount_order, cluster & (counts_per_block(c) - 1));
    return true;
}
