/*
 * Dropping all guest data of an overlay, so that it reads as its backing file again.
 *
 *     1 flush: disk and memory agree, nothing waits in quarantine
 *     2 count what stays: header, snapshots, LUKS area, bitmaps (qcow2_check_count_kept())
 *     3 the smallest structure that describes this and itself, in free clusters:
 *         [refcount blocks][refcount table][empty L1]        BARRIER
 *     4 one header write switches to all three of them       BARRIER     <- done
 *     5 refcount blocks that stayed where they are get their new counts
 *     6 if the rest can lie nearer to the front now: 3 and 4 once more
 *     7 the file ends behind the last cluster in use; holes before it are punched
 *
 *   A refcount block that lies before the last cluster that is kept costs nothing where it is, so it
 *   stays, if its counts are needed at all: with a snapshot of a full image that is all of them.
 *
 *      before the switch     counts of all that was     >=     what is kept, and the new structure
 *      step 5                what is kept, the new structure, and the one of step 6
 *      at the end            what is kept, and the structure in use
 *
 * What is dropped is not looked at: the cost depends on what is kept.  Where step 3 finds no room
 * (a full disk is the usual moment to commit), or where something in the image is unknown or
 * damaged, so that it cannot be said what stays, L1 is cleared in place and what it mapped is freed
 * reference by reference; that makes the room, and steps 2 to 7 are tried again.
 *
 * Invariants
 *  1. Until the header write the structure lies in clusters that nothing refers to; after it all
 *     that is not in the new counts is free.  At each moment the image is valid: after a crash it
 *     reads as before or as its backing file.  Counts are exact but for what step 3 had taken, and
 *     never too low; from step 4 to the end of step 5 they may be too high where blocks stay, which
 *     the dirty bit says (version 2 has none: `check -r leaks` returns the space).
 *  2. What was dropped is punched, cut off or allocated only when the switch is stable and those
 *     who had looked it up have left.
 *  3. L1 in place is the one way that is not all or nothing: each of its sectors that becomes
 *     stable takes whole tables out of the image, which are freed later.  So after a crash or an
 *     error a cluster reads as before or as the backing file.  After a commit that is the same: the
 *     base was flushed, is at least as long, and nobody else may write to either.  Tables, counts
 *     and data of what L1 still names are untouched until L1 is stable, and snapshots have tables
 *     of their own.  Whoever empties an image that its backing file does not equal must expect the
 *     mixture.
 *  4. Clusters of snapshots, bitmaps and the LUKS area are neither moved nor written.
 *  5. Once the switch is stable the image is empty: what fails later costs space only.
 *  6. The clusters of a structure that could not be switched to are not used for anything else before
 *     a flush has settled that the header does not name it.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-check.h"
#include "block/qcow2-refcount-int.h"

/* A refcount block that the image has. */
typedef struct Present {
    uint64_t offset; /* 0: there is none, or it cannot stay */
    bool stays;      /* its counts are needed, and it is counted itself */
} Present;

/* The structure to switch to. */
typedef struct Blob {
    BlockDriverState *bs;
    BDRVQcow2State *s;
    Qcow2RefMap *map;      /* all that stays, and the structure itself */
    Qcow2HostRun l1, table;
    GArray *blocks;        /* uint64_t: host offsets of new ones */
    GArray *indices;       /* uint64_t: which entries of the table name a block */
    GArray *present;       /* Present: by index */
    uint64_t *entries;     /* the table in host order; NULL: not written yet */
    bool dirties;          /* the switch sets the dirty bit */
    bool settles;          /* the switch clears it */
    bool offered;          /* the header may name it */
    /* Where @map says all there is to say of what is free, the allocator is not asked: */
    Qcow2RefMap *avoid;    /* the structure in use; NULL: ask the allocator */
    uint64_t hint, limit;  /* clusters to look at */
} Blob;

static void blob_init(Blob *b, BlockDriverState *bs, Qcow2RefMap *kept)
{
    *b = (Blob){
        .bs = bs, .s = qcow2_state(bs), .map = kept,
        .blocks = g_array_new(false, false, sizeof(uint64_t)),
        .indices = g_array_new(false, false, sizeof(uint64_t)),
        .present = g_array_new(false, true, sizeof(Present)),
    };
}

static void blob_clear(Blob *b)
{
    g_array_free(b->blocks, true);
    g_array_free(b->indices, true);
    g_array_free(b->present, true);
    g_free(b->entries);
    qcow2_refmap_free(b->avoid);
}

#define BLOB_AUTO __attribute__((cleanup(blob_clear))) Blob

static uint32_t new_l1_size(const BDRVQcow2State *s)
{
    return (uint32_t)MAX(qcow2_size_to_l1(s, s->header.size), 1);
}

/* ---------------------------------------------------------------- room for it */

static void count_run(Blob *b, const Qcow2HostRun *run)
{
    qcow2_refmap_add(b->map, run->offset >> b->s->cluster_bits, run->bytes >> b->s->cluster_bits, 1,
                     QCOW2_REF_META, NULL, NULL);
}

static void uncount_run(Blob *b, const Qcow2HostRun *run)
{
    qcow2_refmap_sub(b->map, run->offset >> b->s->cluster_bits, run->bytes >> b->s->cluster_bits,
                     1);
}

/* The allocator trusts counts, which may be wrong: nothing that stays may be overwritten, nor what
 * the image needs before the switch. */
static int judge_run(const Blob *b, const Qcow2HostRun *run)
{
    for (uint64_t pos = 0; pos < run->bytes; pos += b->s->cluster_size) {
        if (qcow2_refmap_count(b->map, (run->offset + pos) >> b->s->cluster_bits)) {
            return -EIO;
        }
    }
    return qcow2_check_overlap(b->bs, QCOW2_OL_NONE, run->offset, run->bytes);
}

/* Is cluster @i the first of a leaf that has none to give? */
static bool is_full_leaf(const Blob *b, uint64_t i)
{
    const Qcow2RefLeaf *leaf = i % QCOW2_REF_LEAF ? NULL : qcow2_refmap_leaf(b->map, i);
    return leaf && qcow2_refleaf_count(leaf, 0) && qcow2_refleaf_run(leaf, 0) == QCOW2_REF_LEAF;
}

/* The first @n free clusters in a row below the limit; host offset. Runs may be longer than what one
 * refcount block counts, which the allocator would only append. */
static int64_t find_run(Blob *b, uint64_t n)
{
    uint64_t run = 0;
    for (uint64_t i = b->hint; i < b->limit; i++) {
        while (i < b->limit && is_full_leaf(b, i)) {
            i += QCOW2_REF_LEAF;
            run = 0;
        }
        if (i >= b->limit) {
            break;
        }
        bool busy = qcow2_refmap_count(b->map, i) || qcow2_refmap_count(b->avoid, i);
        run = busy ? 0 : run + 1;
        if (run == n) {
            b->hint = n == 1 ? i + 1 : b->hint;
            return (int64_t)((i + 1 - n) << b->s->cluster_bits);
        }
    }
    return -ENOSPC;
}

static int64_t find_or_alloc(Blob *b, bool whole, uint64_t *bytes)
{
    if (!b->avoid) {
        return whole ? qcow2_alloc_clusters(b->bs, *bytes) : qcow2_alloc_run(b->bs, 0, bytes);
    }
    *bytes = whole ? *bytes : b->s->cluster_size;
    return find_run(b, *bytes >> b->s->cluster_bits);
}

/* After a switch that failed a crash may still show it: then quarantine waits for the flush that
 * settles which header the disk has. */
static void undo_run(Blob *b, const Qcow2HostRun *run)
{
    if (b->avoid) {
        return; /* the allocator was not asked */
    }
    if (b->offered) {
        qcow2_free_run(b->bs, run->offset, run->bytes, QCOW2_DISCARD_ALWAYS);
    } else {
        qcow2_alloc_undo(b->bs, run->offset, run->bytes);
    }
}

/* Up to @bytes in one run, all of them with @whole. 0 or -errno. */
static int take_run(Blob *b, uint64_t bytes, bool whole, Qcow2HostRun *ret)
{
    uint64_t got = qb_align_up(bytes, b->s->cluster_size);
    int64_t offset = find_or_alloc(b, whole, &got);
    if (offset < 0) {
        return (int)offset;
    }
    Qcow2HostRun run = {(uint64_t)offset, got};
    int err = judge_run(b, &run);
    if (err < 0) {
        undo_run(b, &run);
        return err;
    }
    count_run(b, &run);
    *ret = run;
    return 0;
}

static void give_run(Blob *b, Qcow2HostRun *run)
{
    if (run->bytes) {
        uncount_run(b, run);
        undo_run(b, run);
        run->bytes = 0;
    }
}

/* @n more blocks, wherever there is room. */
static int take_blocks(Blob *b, uint64_t n)
{
    while (n > 0) {
        Qcow2HostRun run;
        int ret = take_run(b, n << b->s->cluster_bits, false, &run);
        if (ret < 0) {
            return ret;
        }
        for (uint64_t pos = 0; pos < run.bytes; pos += b->s->cluster_size, n--) {
            g_array_append_val(b->blocks, ((uint64_t){run.offset + pos}));
        }
    }
    return 0;
}

static void give_last_block(Blob *b)
{
    Qcow2HostRun run = {
        g_array_index(b->blocks, uint64_t, b->blocks->len - 1), b->s->cluster_size,
    };
    g_array_set_size(b->blocks, b->blocks->len - 1);
    give_run(b, &run);
}

/* ---------------------------------------------------------------- blocks that stay */

/* One past the last cluster with a count. */
static uint64_t map_end(const Blob *b)
{
    g_autoptr(GPtrArray) leaves = qcow2_refmap_sorted(b->map);
    for (guint i = leaves->len; i > 0; i--) {
        const Qcow2RefLeaf *leaf = g_ptr_array_index(leaves, i - 1);
        unsigned end = qcow2_refleaf_end(leaf);
        if (end) {
            return leaf->index * QCOW2_REF_LEAF + end;
        }
    }
    return 0;
}

/* Notes which blocks lie before the end of what is kept. */
static void find_present(Blob *b)
{
    uint64_t end = map_end(b) << b->s->cluster_bits;
    QB_GUARD(&b->s->alloc_lock);
    g_array_set_size(b->present, (guint)b->s->reftable.nb_entries);
    for (guint i = 0; i < b->present->len; i++) {
        uint64_t offset = qcow2_block_offset_locked(b->s, i);
        bool ok = offset < end && qcow2_offset_into_cluster(b->s, offset) == 0;
        g_array_index(b->present, Present, i) = (Present){.offset = ok ? offset : 0};
    }
}

/* What belongs to something that is kept, or to another index, cannot stay. */
static void set_staying(Blob *b, Present *p, bool stays)
{
    Qcow2HostRun run = {p->offset, b->s->cluster_size};
    if (!stays) {
        uncount_run(b, &run);
    } else if (qcow2_refmap_count(b->map, p->offset >> b->s->cluster_bits)) {
        p->offset = 0;
        return;
    } else {
        count_run(b, &run);
    }
    p->stays = stays;
}

/* Those whose index is needed stay, no others do. True: that has changed something. */
static bool update_staying(Blob *b)
{
    bool changed = false;
    guint at = 0;
    for (guint i = 0; i < b->present->len; i++) {
        Present *p = &g_array_index(b->present, Present, i);
        bool needed = at < b->indices->len && g_array_index(b->indices, uint64_t, at) == i;
        at += needed;
        if (p->offset && p->stays != needed) {
            set_staying(b, p, needed);
            changed = true;
        }
    }
    return changed;
}

/* Where the block of @index stays; 0: it does not. */
static uint64_t staying(const Blob *b, uint64_t index)
{
    const Present *p = index < b->present->len ? &g_array_index(b->present, Present, index) : NULL;
    return p && p->stays ? p->offset : 0;
}

static bool any_stays(const Blob *b)
{
    for (guint i = 0; i < b->present->len; i++) {
        if (staying(b, i)) {
            return true;
        }
    }
    return false;
}

static guint new_blocks_needed(const Blob *b)
{
    guint n = 0;
    for (guint i = 0; i < b->indices->len; i++) {
        n += !staying(b, g_array_index(b->indices, uint64_t, i));
    }
    return n;
}

/* ---------------------------------------------------------------- the whole of it */

static void give_blob(Blob *b)
{
    while (b->blocks->len) {
        give_last_block(b);
    }
    give_run(b, &b->table);
    give_run(b, &b->l1);
}

/* The first of the sorted @leaves that does not lie before @cluster. */
static guint find_leaf(const GPtrArray *leaves, uint64_t cluster)
{
    guint low = 0, high = leaves->len;
    while (low < high) {
        guint mid = low + (high - low) / 2;
        if (((const Qcow2RefLeaf *)leaves->pdata[mid])->index < cluster / QCOW2_REF_LEAF) {
            low = mid + 1;
        } else {
            high = mid;
        }
    }
    return low;
}

/* Which blocks count something. */
static void find_indices(Blob *b)
{
    g_autoptr(GPtrArray) leaves = qcow2_refmap_sorted(b->map);
    g_array_set_size(b->indices, 0);
    for (guint i = 0; i < leaves->len; ) {
        const Qcow2RefLeaf *leaf = g_ptr_array_index(leaves, i);
        uint64_t index = leaf->index * QCOW2_REF_LEAF >> b->s->refblock_bits;
        bool used = qcow2_refleaf_end(leaf) > 0;
        if (used) {
            g_array_append_val(b->indices, index);
        }
        i = used ? find_leaf(leaves, (index + 1) << b->s->refblock_bits) : i + 1;
    }
}

/* A table for the highest block there is now. */
static int fit_table(Blob *b)
{
    uint64_t highest = g_array_index(b->indices, uint64_t, b->indices->len - 1);
    uint64_t bytes = (highest + 1) * sizeof(uint64_t);
    if (bytes <= b->table.bytes) {
        return 0;
    }
    give_run(b, &b->table);
    int ret = bytes > QCOW2_MAX_REFTABLE_BYTES ? -EFBIG : take_run(b, bytes, true, &b->table);
    return ret < 0 ? ret : 1;
}

/* Blocks and table need counts themselves, which may take further blocks. 0: all fits; 1: look
 * again; or -errno. */
static int fit_blocks(Blob *b)
{
    find_indices(b);
    int ret = fit_table(b);
    if (ret != 0 || update_staying(b)) {
        return ret < 0 ? ret : 1;
    }
    guint needed = new_blocks_needed(b);
    if (b->blocks->len < needed) {
        ret = take_blocks(b, needed - b->blocks->len);
        return ret < 0 ? ret : 1;
    }
    if (b->blocks->len > needed) {
        give_last_block(b);
        return 1;
    }
    return 0;
}

static int take_blob(Blob *b)
{
    int ret = take_run(b, (uint64_t)new_l1_size(b->s) * sizeof(uint64_t), true, &b->l1);
    do {
        ret = ret < 0 ? ret : fit_blocks(b);
    } while (ret > 0);
    if (ret < 0) {
        give_blob(b);
    }
    return ret;
}

static uint64_t blob_end(const Blob *b)
{
    uint64_t end = MAX(b->l1.offset + b->l1.bytes, b->table.offset + b->table.bytes);
    for (guint i = 0; i < b->blocks->len; i++) {
        end = MAX(end, g_array_index(b->blocks, uint64_t, i) + b->s->cluster_size);
    }
    return end;
}

/* ---------------------------------------------------------------- writing it */

/* Counts that are alike, not yet in the block. */
typedef struct Fill {
    uint8_t *data;
    unsigned order;
    uint64_t slot, n, count;
} Fill;

static void finish_fill(const Fill *f)
{
    if (f->n && f->count) {
        qcow2_fill_counts(f->data, f->order, f->slot, f->n, f->count);
    }
}

static void fill_more(Fill *f, uint64_t slot, uint64_t n, uint64_t count)
{
    if (f->slot + f->n != slot || f->count != count) {
        finish_fill(f);
        *f = (Fill){f->data, f->order, slot, 0, count};
    }
    f->n += n;
}

/* Counts of block @index into @data. */
static void encode_block(const Blob *b, uint64_t index, const GPtrArray *leaves, uint8_t *data)
{
    uint64_t first = index << b->s->refblock_bits;
    uint64_t end = first + (UINT64_C(1) << b->s->refblock_bits);
    Fill f = {.data = data, .order = b->s->refcount_order};
    memset(data, 0, b->s->cluster_size);
    for (guint i = find_leaf(leaves, first); i < leaves->len; i++) {
        const Qcow2RefLeaf *leaf = g_ptr_array_index(leaves, i);
        uint64_t cluster = leaf->index * QCOW2_REF_LEAF;
        if (cluster >= end) {
            break;
        }
        for (unsigned k = 0, n; k < QCOW2_REF_LEAF; k += n) {
            n = qcow2_refleaf_run(leaf, k);
            fill_more(&f, cluster + k - first, n, qcow2_refleaf_count(leaf, k));
        }
    }
    finish_fill(&f);
}

/* A block of the structure. */
typedef struct Place {
    uint64_t index, offset;
    bool stays;
} Place;

/* Those that stay, or those that are new. */
static GArray *places(const Blob *b, bool stay)
{
    GArray *list = g_array_new(false, false, sizeof(Place));
    guint next = 0;
    for (guint i = 0; i < b->indices->len; i++) {
        uint64_t index = g_array_index(b->indices, uint64_t, i), offset = staying(b, index);
        Place p = {index, offset, offset != 0};
        if (!p.stays) {
            p.offset = g_array_index(b->blocks, uint64_t, next++);
        }
        if (p.stays == stay) {
            g_array_append_val(list, p);
        }
    }
    return list;
}

typedef struct BlockWriter {
    const Blob *b;
    const GPtrArray *leaves;
    const GArray *places;
} BlockWriter;

static int write_part(uint64_t first, uint64_t end, unsigned part, void *opaque)
{
    const BlockWriter *w = opaque;
    const BDRVQcow2State *s = w->b->s;
    QB_AUTO_FREE uint8_t *data = qb_try_memalign(4096, MAX(s->cluster_size, 4096));
    int ret = data ? 0 : -ENOMEM;
    for (guint i = (guint)first; i < end && ret == 0; i++) {
        const Place *p = &g_array_index(w->places, Place, i);
        encode_block(w->b, p->index, w->leaves, data);
        ret = bdrv_pwrite(w->b->bs->file, (int64_t)p->offset, s->cluster_size, data, 0);
    }
    return ret;
}

/* What the map says, past the cache. */
static int write_places(const Blob *b, const GArray *list)
{
    if (!list->len) {
        return 0;
    }
    g_autoptr(GPtrArray) leaves = qcow2_refmap_sorted(b->map);
    BlockWriter w = {b, leaves, list};
    return qcow2_walk_in_parts(list->len, write_part, &w);
}

static int write_blocks(const Blob *b, bool stay)
{
    g_autoptr(GArray) list = places(b, stay);
    return write_places(b, list);
}

/* Kept for memory, too: after the switch nothing may fail (invariant 5). */
static int write_table(Blob *b)
{
    g_autofree uint64_t *be = g_try_malloc0(b->table.bytes);
    b->entries = g_try_malloc0(b->table.bytes);
    if (!be || !b->entries) {
        return -ENOMEM;
    }
    for (int stay = 0; stay < 2; stay++) {
        g_autoptr(GArray) list = places(b, stay);
        for (guint i = 0; i < list->len; i++) {
            const Place *p = &g_array_index(list, Place, i);
            b->entries[p->index] = p->offset;
            be[p->index] = htobe64(p->offset);
        }
    }
    return bdrv_pwrite(b->bs->file, (int64_t)b->table.offset, (int64_t)b->table.bytes, be, 0);
}

static void switch_to_blob(Qcow2Header *h, void *opaque)
{
    const Blob *b = opaque;
    h->l1_offset = b->l1.offset;
    h->l1_size = new_l1_size(b->s);
    h->reftable_offset = b->table.offset;
    h->reftable_clusters = (uint32_t)(b->table.bytes >> b->s->cluster_bits);
    h->incompatible |= b->dirties ? QCOW2_INCOMPAT_DIRTY : 0;
    h->incompatible &= b->settles ? ~(uint64_t)QCOW2_INCOMPAT_DIRTY : UINT64_MAX;
}

/* Blocks that stay have to count the structure already when the header names it. */
static int make_stable(const Blob *b)
{
    return b->avoid || !any_stays(b) ? bdrv_flush(b->bs->file->bs) : qcow2_flush(b->bs);
}

/* Steps 3 and 4. */
static int install_blob(Blob *b)
{
    bdrv_debug_event(b->bs->file, "empty_image_prepare");
    int ret = write_blocks(b, false);
    ret = ret < 0 ? ret : write_table(b);
    ret = ret < 0 ? ret : bdrv_pwrite_zeroes(b->bs->file, (int64_t)b->l1.offset,
                                             (int64_t)b->l1.bytes, 0);
    ret = ret < 0 ? ret : make_stable(b);
    if (ret < 0) {
        return ret;
    }
    b->offered = true;
    return qcow2_header_update(b->bs, switch_to_blob, b, true);
}

/* Memory becomes what the header says by now. Nobody allocates meanwhile: the whole node is held. */
static void adopt_blob(Blob *b)
{
    BDRVQcow2State *s = b->s;
    uint32_t size = new_l1_size(s);
    qcow2_l1_replace(s, g_new0(uint64_t, size), size, b->l1.offset);
    qcow2_inflight_wait(s, qcow2_inflight_seq(s)); /* invariant 2 */
    qcow2_cache_poison(s->cache, 0, QCOW2_MAX_HOST_OFFSET);
    qcow2_quarantine_forget(s);
    qcow2_refcount_adopt(b->bs, g_steal_pointer(&b->entries));
}

/* ---------------------------------------------------------------- space */

static void punch(const Blob *b, uint64_t first, uint64_t end)
{
    if (end > first) {
        bdrv_pdiscard(b->bs->file, (int64_t)(first << b->s->cluster_bits),
                      (int64_t)((end - first) << b->s->cluster_bits));
    }
}

/* Free stretches before the last cluster in use. A failure costs space only. */
static void punch_gaps(const Blob *b)
{
    g_autoptr(GPtrArray) leaves = qcow2_refmap_sorted(b->map);
    uint64_t gap = 0;
    for (guint i = 0; i < leaves->len; i++) {
        const Qcow2RefLeaf *leaf = g_ptr_array_index(leaves, i);
        for (unsigned k = 0, n; k < QCOW2_REF_LEAF; k += n) {
            uint64_t cluster = leaf->index * QCOW2_REF_LEAF + k;
            n = qcow2_refleaf_run(leaf, k);
            if (qcow2_refleaf_count(leaf, k)) {
                punch(b, gap, cluster);
                gap = cluster + n;
            }
        }
    }
}

/* What a device or a window of fixed size, which cannot be cut, had in use behind the end. */
static void discard_behind(BlockDriverState *bs, uint64_t end, uint64_t used_end)
{
    int64_t length = bdrv_getlength(bs->file->bs);
    used_end = MIN(used_end, (uint64_t)MAX(length, 0));
    if (end < used_end) {
        bdrv_pdiscard(bs->file, (int64_t)end, (int64_t)(used_end - end));
    }
}

static void give_space_back(const Blob *b, uint64_t used_end)
{
    uint64_t end = map_end(b) << b->s->cluster_bits;
    int ret = qcow2_cut_file(b->bs);
    if (ret < 0 && ret != -ENOTSUP) {
        bdrv_warn("Failed to truncate the tail of the image: %s", g_strerror(-ret));
    }
    discard_behind(b->bs, end, used_end);
    punch_gaps(b);
    if (b->s->has_data_file) {
        int64_t length = bdrv_getlength(b->s->data_file->bs);
        bdrv_pdiscard(b->s->data_file, 0, MAX(length, 0));
    }
}

/* ---------------------------------------------------------------- the fast way */

/* Things that we do not know may own clusters. */
static bool has_unknown_owners(const BDRVQcow2State *s)
{
    static const uint32_t known[] = {
        QCOW2_EXT_BACKING_FORMAT, QCOW2_EXT_FEATURE_TABLE, QCOW2_EXT_BITMAPS, QCOW2_EXT_CRYPTO,
        QCOW2_EXT_DATA_FILE,
    };
    for (guint i = 0; i < s->extensions->len; i++) {
        uint32_t type = g_array_index(s->extensions, Qcow2Extension, i).type;
        bool found = false;
        for (size_t k = 0; k < G_N_ELEMENTS(known) && !found; k++) {
            found = known[k] == type;
        }
        if (!found) {
            return true;
        }
    }
    return s->header.compatible & ~QCOW2_COMPAT_LAZY_REFCOUNTS;
}

/* The structure's own clusters in the map, or out of it. */
static void count_blob(Blob *b, void (*change)(Blob *b, const Qcow2HostRun *run))
{
    change(b, &b->l1);
    change(b, &b->table);
    for (guint i = 0; i < b->blocks->len; i++) {
        change(b, &(Qcow2HostRun){g_array_index(b->blocks, uint64_t, i), b->s->cluster_size});
    }
}

/* One of two structures is in use, nobody can tell which, and only one of them is counted. */
static void refuse_requests(BDRVQcow2State *s)
{
    bdrv_warn("qcow2: Image header could not be made stable; node '%s' refuses all further"
              " requests", bdrv_get_node_name(s->bs));
    atomic_store(&s->corrupt, true);
}

static void count_staying(Blob *b)
{
    for (guint i = 0; i < b->present->len; i++) {
        const Present *p = &g_array_index(b->present, Present, i);
        if (p->stays) {
            count_run(b, &(Qcow2HostRun){p->offset, b->s->cluster_size});
        }
    }
}

/* What stays for @b but not for @front goes with the rest of @b; without @front, it stays. */
static void part_from(Blob *b, Blob *front, bool moves)
{
    for (guint i = 0; i < b->present->len; i++) {
        Present *mine = &g_array_index(b->present, Present, i);
        Present *next = &g_array_index(front->present, Present, i);
        if (!moves && mine->stays != next->stays) {
            set_staying(front, next, mine->stays);
        } else if (mine->stays && !next->stays) {
            g_array_append_val(b->blocks, mine->offset);
            mine->stays = false;
        }
    }
}

/* Step 6: the dropped clusters are free by now, so a structure may find room before them. The one
 * there is stays in use until the switch. */
static bool take_front(Blob *b, Blob *front)
{
    count_blob(b, uncount_run);
    blob_init(front, b->bs, b->map);
    g_array_append_vals(front->present, b->present->data, b->present->len);
    front->limit = (blob_end(b) >> b->s->cluster_bits) - 1; /* at least a cluster nearer */
    front->avoid = qcow2_refmap_new(1);
    front->settles = b->dirties;
    Blob busy = {
        .s = b->s, .map = front->avoid, .l1 = b->l1, .table = b->table, .blocks = b->blocks,
        .present = b->present,
    };
    count_blob(&busy, count_run);
    count_staying(&busy);
    bool moves = take_blob(front) == 0;
    part_from(b, front, moves);
    count_blob(b, count_run);
    return moves;
}

static void mark_run(const BDRVQcow2State *s, uint64_t offset, uint64_t bytes, bool *marks)
{
    uint64_t last = qcow2_block_of(s, (offset + bytes - 1) >> s->cluster_bits);
    for (uint64_t i = qcow2_block_of(s, offset >> s->cluster_bits); i <= last; i++) {
        marks[i] = true;
    }
}

/* Those of the blocks that stay which count clusters of @old. */
static GArray *places_that_count(const Blob *b, const Blob *old)
{
    const BDRVQcow2State *s = b->s;
    uint64_t n = qcow2_block_of(s, (blob_end(old) - 1) >> s->cluster_bits) + 1;
    g_autofree bool *marks = g_new0(bool, n);
    g_autoptr(GArray) all = places(b, true);
    GArray *list = g_array_new(false, false, sizeof(Place));
    mark_run(s, old->l1.offset, old->l1.bytes, marks);
    mark_run(s, old->table.offset, old->table.bytes, marks);
    for (guint i = 0; i < old->blocks->len; i++) {
        mark_run(s, g_array_index(old->blocks, uint64_t, i), s->cluster_size, marks);
    }
    for (guint i = 0; i < all->len; i++) {
        const Place *p = &g_array_index(all, Place, i);
        if (p->index < n && marks[p->index]) {
            g_array_append_vals(list, p, 1);
        }
    }
    return list;
}

/* @b is counted on disk, but not used any more. */
static int give_counts_back(const Blob *front, const Blob *b)
{
    g_autoptr(GArray) list = places_that_count(front, b);
    return write_places(front, list);
}

static int move_to_front(Blob *b, Blob *front)
{
    count_blob(b, uncount_run);
    int ret = install_blob(front);
    if (ret == 0) {
        ret = give_counts_back(front, b);
        adopt_blob(front);
        return ret;
    }
    give_blob(front);
    count_blob(b, count_run);
    if (front->offered && bdrv_flush(b->bs->file->bs) < 0) {
        refuse_requests(b->s);
    }
    return ret;
}

/* Steps 5 and 6. What fails here costs space only; the dirty bit stays then. */
static void settle_counts(Blob *b)
{
    BLOB_AUTO front;
    adopt_blob(b);
    bool moves = take_front(b, &front);
    int ret = write_blocks(moves ? &front : b, true);
    qcow2_cache_poison(b->s->cache, 0, QCOW2_MAX_HOST_OFFSET); /* nobody counts, but one may look */
    if (ret == 0 && moves) {
        ret = move_to_front(b, &front);
    } else if (ret == 0 && b->dirties) {
        ret = bdrv_flush(b->bs->file->bs);
        ret = ret < 0 ? ret : qcow2_set_incompatible(b->bs, 0, QCOW2_INCOMPAT_DIRTY);
    }
    if (ret < 0 && any_stays(b)) {
        bdrv_warn("Failed to lower the counts of what was dropped: %s; 'qemu-img check -r leaks' "
                  "returns the space", g_strerror(-ret));
    }
}

/* Empty, as small as can be; false: not possible in this way, nothing was changed. */
static bool switch_to_smallest(BlockDriverState *bs)
{
    uint64_t used_end = atomic_load(&qcow2_state(bs)->file_end);
    g_autoptr(Qcow2RefMap) kept = has_unknown_owners(qcow2_state(bs)) ? NULL
                                                                     : qcow2_check_count_kept(bs);
    if (!kept) {
        return false;
    }
    BLOB_AUTO b;
    blob_init(&b, bs, kept);
    find_present(&b);
    if (take_blob(&b) < 0) {
        return false;
    }
    b.dirties = any_stays(&b) && b.s->version >= 3 && !qcow2_dirty_bit(b.s);
    if (install_blob(&b) < 0) {
        give_blob(&b);
        return false;
    }
    settle_counts(&b);
    if (!atomic_load(&b.s->corrupt)) {
        give_space_back(&b, used_end);
    }
    return true;
}

/* ---------------------------------------------------------------- in place */

static int clear_l1(BlockDriverState *bs)
{
    BDRVQcow2State *s = qcow2_state(bs);
    unsigned shift = s->cluster_bits + s->l2_bits;
    uint64_t span = MIN((uint64_t)qcow2_l1_size(s), (uint64_t)INT64_MAX >> shift) << shift;
    int ret = span ? qcow2_discard_clusters(bs, 0, span, QCOW2_DISCARD_FULL, QCOW2_DISCARD_ALWAYS)
                   : 0;
    return ret < 0 ? ret : qcow2_flush_all(bs);
}

/* Clears L1 in place, then tries for less than that leaves. */
static int drop_everything(BlockDriverState *bs)
{
    int ret = clear_l1(bs);
    if (ret < 0 || switch_to_smallest(bs)) {
        return ret;
    }
    ret = qcow2_refcount_shrink(bs);
    ret = ret < 0 ? ret : qcow2_flush_all(bs);
    return ret < 0 ? ret : qcow2_cut_file(bs);
}

/* ---------------------------------------------------------------- */

bool qcow2_make_empty(BlockDriverState *bs, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    if (s->data_file_raw) {
        qb_error_set(errp, ENOTSUP, "An image with a raw data file has nothing below it to show");
        return false;
    }
    int ret = qcow2_is_clean(s) ? 0 : qcow2_flush_all(bs);
    if (ret == 0 && !switch_to_smallest(bs)) {
        ret = drop_everything(bs);
    }
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Failed to empty the image");
    }
    return ret >= 0;
}
