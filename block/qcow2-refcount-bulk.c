/*
 * Counts of whole trees, changed on all cores and past the cache.
 *
 *      stretches of clusters     |--- 2 ---|-------- 1 --------|      |---- 1 ----|
 *      refcount blocks        [ 0        ][ 1        ][ 2        ]  [ 4        ]
 *
 *      each thread, with its part of the blocks, by the batch:
 *           read what the stretches cover  ->  edit  ->  write  ->  poison
 *
 * On an image of 1 TiB a snapshot changes 32 MiB of counts.  In the cache that is memory that is
 * filled, copied for the flush and given back, all by one thread; here it is a buffer that the caches
 * of a core hold.  For single clusters see qcow2-refcount.c.
 *
 * Invariants
 *  1. Whole node in the range lock, nothing dirty: the file has what memory has.  Nobody else
 *     changes a count.  A block that somebody reads meanwhile (reading ahead does) is poisoned
 *     after the write, so no copy from before it stays.
 *  2. No count is 0 before or after: what is free does not change, so the free-space index need not
 *     hear of anything, and nothing is to be punched.
 *  3. No block is written but those that were found in order: in their places, each named once.
 *  4. Counts of a block are judged before one of them is changed.
 *  5. A raise that fails is taken back, in memory that is known to be right: the batch that could not
 *     be written from the buffer, the others by reading what was written.
 *
 * Not done: telling what is wrong with an image.  Whoever is told that something is goes the slow
 * way, which says it.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-refcount-bulk.h"
#include "block/qcow2-refcount-int.h"

#include <stdlib.h>

#define BATCH_BYTES (1u << 20) /* what the caches of a core hold */
#define BATCH_BLOCKS 4096

typedef struct Block {
    uint64_t index, offset;
    guint first;  /* the first stretch that reaches into it */
    bool edited;  /* in the buffer */
    bool written;
} Block;

typedef struct Bulk Bulk;
/* Edits what @data has of the block. 1: there is a change, 0, or -errno with nothing changed. */
typedef int EditFn(Bulk *b, const Block *block, uint8_t *data, unsigned part);

struct Bulk {
    BlockDriverState *bs;
    BDRVQcow2State *s;
    const GArray *list; /* Qcow2Stretch */
    GArray *blocks;     /* Block */
    EditFn *edit;
    EditFn *revert;     /* of an edit that could not be written; NULL: it does no harm */
    GArray *ones[QCOW2_MAX_PARTS], *rest[QCOW2_MAX_PARTS]; /* Qcow2HostRun, of each part */
};

/* ---------------------------------------------------------------- which blocks */

static gint by_value(gconstpointer a, gconstpointer b)
{
    const uint64_t *x = a, *y = b;
    return *x < *y ? -1 : *x > *y;
}

/* Two entries of the table that name the same block would undo each other's work. */
static bool names_one_twice(const GArray *blocks)
{
    g_autoptr(GArray) offsets = g_array_sized_new(false, false, sizeof(uint64_t), blocks->len);
    for (guint i = 0; i < blocks->len; i++) {
        g_array_append_val(offsets, g_array_index(blocks, Block, i).offset);
    }
    g_array_sort(offsets, by_value);
    for (guint i = 1; i < offsets->len; i++) {
        if (g_array_index(offsets, uint64_t, i) == g_array_index(offsets, uint64_t, i - 1)) {
            return true;
        }
    }
    return false;
}

/* Appends block @index, met in stretch @first, unless it is there. False: it is not in its place. */
static bool add_block(Bulk *b, uint64_t index, guint first, uint64_t file_length)
{
    GArray *blocks = b->blocks;
    if (blocks->len && g_array_index(blocks, Block, blocks->len - 1).index == index) {
        return true;
    }
    QB_GUARD(&b->s->alloc_lock);
    uint64_t offset = qcow2_block_offset_locked(b->s, index);
    g_array_append_val(blocks, ((Block){.index = index, .offset = offset, .first = first}));
    return offset && qcow2_offset_into_cluster(b->s, offset) == 0 &&
           qb_align_up(offset + 1, b->s->cluster_size) <= file_length;
}

static int find_blocks(Bulk *b)
{
    const BDRVQcow2State *s = b->s;
    int64_t length = bdrv_getlength(b->bs->file->bs);
    if (length < 0) {
        return (int)length;
    }
    for (guint i = 0; i < b->list->len; i++) {
        const Qcow2Stretch *st = &g_array_index(b->list, Qcow2Stretch, i);
        uint64_t last = qcow2_block_of(s, (st->end - 1) >> s->cluster_bits);
        assert(st->start < st->end && st->refs > 0);
        for (uint64_t n = qcow2_block_of(s, st->start >> s->cluster_bits); n <= last; n++) {
            if (!add_block(b, n, i, (uint64_t)length)) {
                return -EUCLEAN;
            }
        }
    }
    return names_one_twice(b->blocks) ? -EUCLEAN : 0;
}

/* ---------------------------------------------------------------- pieces of a block */

/* What a stretch covers of a block. */
typedef struct Piece {
    uint64_t slot, end;
    uint64_t refs;
} Piece;

/* The piece of stretch *i, which becomes the next one; false: it begins behind the block. */
static bool next_piece(const Bulk *b, const Block *block, guint *i, Piece *ret)
{
    uint64_t first = block->index << b->s->refblock_bits;
    uint64_t end = first + qcow2_counts_per_block(b->s);
    if (*i >= b->list->len) {
        return false;
    }
    const Qcow2Stretch *st = &g_array_index(b->list, Qcow2Stretch, (*i)++);
    first = MAX(first, st->start >> b->s->cluster_bits);
    end = MIN(end, st->end >> b->s->cluster_bits);
    *ret = (Piece){qcow2_slot_of(b->s, first), qcow2_slot_of(b->s, end - 1) + 1,
                   (uint64_t)st->refs};
    return first < end;
}

/* The bytes of the block that its pieces lie in, in units of the file. */
static void range_of(const Bulk *b, const Block *block, uint64_t *ret_from, uint64_t *ret_to)
{
    uint64_t unit = MAX(b->bs->file->bs->bl.request_alignment, BDRV_SECTOR_SIZE);
    guint i = block->first;
    Piece p, last;
    unit = MIN(unit, b->s->cluster_size);
    bool any = next_piece(b, block, &i, &p);
    assert(any);
    last = p;
    for (Piece next; next_piece(b, block, &i, &next);) {
        last = next;
    }
    *ret_from = qb_align_down(p.slot << b->s->refcount_order >> 3, unit);
    *ret_to = qb_align_up(((last.end << b->s->refcount_order) + 7) >> 3, unit);
}

/* ---------------------------------------------------------------- edits */

static int judge_block(Bulk *b, const Block *block, uint8_t *data, unsigned part)
{
    const BDRVQcow2State *s = b->s;
    guint i = block->first;
    for (Piece p; next_piece(b, block, &i, &p);) {
        for (uint64_t n, count; p.slot < p.end; p.slot += n) {
            n = qcow2_equal_counts(data, s->refcount_order, p.slot, p.end - p.slot, &count);
            if (count == 0 || p.refs > s->refcount_max - count) {
                return -EUCLEAN;
            }
        }
    }
    return 0;
}

/* Adds its references to each piece, or takes them away. */
static void add_refs(const Bulk *b, const Block *block, uint8_t *data, bool add)
{
    unsigned order = b->s->refcount_order;
    guint i = block->first;
    for (Piece p; next_piece(b, block, &i, &p);) {
        for (uint64_t n, count; p.slot < p.end; p.slot += n) {
            n = qcow2_equal_counts(data, order, p.slot, p.end - p.slot, &count);
            count = add ? count + p.refs : count - p.refs;
            qcow2_fill_counts(data, order, p.slot, n, count);
        }
    }
}

static int raise_block(Bulk *b, const Block *block, uint8_t *data, unsigned part)
{
    int ret = judge_block(b, block, data, part);
    if (ret < 0) {
        return ret;
    }
    add_refs(b, block, data, true);
    return 1;
}

static int revert_raise(Bulk *b, const Block *block, uint8_t *data, unsigned part)
{
    add_refs(b, block, data, false);
    return 1;
}

/* The clusters of @run have @count references, of which @refs go. True: others stay. */
static bool sort_run(Bulk *b, unsigned part, const Qcow2HostRun *run, uint64_t count, uint64_t refs)
{
    if (count > refs) {
        if (count - refs == 1) {
            qcow2_runs_append(b->ones[part], run->offset, run->bytes);
        }
        return true;
    }
    for (; refs > 0; refs--) {
        qcow2_runs_append(b->rest[part], run->offset, run->bytes);
    }
    return false;
}

static int lower_block(Bulk *b, const Block *block, uint8_t *data, unsigned part)
{
    const BDRVQcow2State *s = b->s;
    uint64_t first = block->index << s->refblock_bits;
    guint i = block->first;
    int ret = 0;
    for (Piece p; next_piece(b, block, &i, &p);) {
        for (uint64_t n, count; p.slot < p.end; p.slot += n) {
            n = qcow2_equal_counts(data, s->refcount_order, p.slot, p.end - p.slot, &count);
            Qcow2HostRun run = {(first + p.slot) << s->cluster_bits, n << s->cluster_bits};
            if (sort_run(b, part, &run, count, p.refs)) {
                qcow2_fill_counts(data, s->refcount_order, p.slot, n, count - p.refs);
                ret = 1;
            }
        }
    }
    return ret;
}

/* ---------------------------------------------------------------- batches */

/* Reads all @n blocks, or writes those that were edited. */
static int transfer(const Bulk *b, const Block *blocks, size_t n, BdrvBatchKind kind, uint8_t *buf)
{
    g_autoptr(GArray) ops = g_array_sized_new(false, false, sizeof(BdrvBatchOp), (guint)n);
    for (size_t i = 0; i < n; i++) {
        uint64_t from, to;
        range_of(b, &blocks[i], &from, &to);
        BdrvBatchOp op = {
            .kind = kind, .offset = (int64_t)(blocks[i].offset + from),
            .bytes = (int64_t)(to - from),
            .buf = buf + (i << b->s->cluster_bits) + from,
        };
        if (kind == BDRV_BATCH_READ || blocks[i].edited) {
            g_array_append_val(ops, op);
        }
    }
    return ops->len ? bdrv_run_batch(b->bs->file, (BdrvBatchOp *)ops->data, ops->len) : 0;
}

static int read_batch(const Bulk *b, const Block *blocks, size_t n, uint8_t *buf)
{
    bdrv_debug_event(b->bs->file, "refblock_load");
    return transfer(b, blocks, n, BDRV_BATCH_READ, buf);
}

static int edit_batch(Bulk *b, Block *blocks, size_t n, uint8_t *buf, unsigned part)
{
    int ret = 0;
    for (size_t i = 0; i < n && ret >= 0; i++) {
        ret = b->edit(b, &blocks[i], buf + (i << b->s->cluster_bits), part);
        blocks[i].edited = ret > 0;
    }
    return MIN(ret, 0);
}

static int guard_batch(const Bulk *b, const Block *blocks, size_t n)
{
    int ret = 0;
    for (size_t i = 0; i < n && ret == 0; i++) {
        ret = blocks[i].edited ? qcow2_check_overlap(b->bs, QCOW2_OL_REFCOUNT_BLOCK,
                                                     blocks[i].offset, b->s->cluster_size)
                               : 0;
    }
    return ret;
}

static int write_batch(const Bulk *b, const Block *blocks, size_t n, uint8_t *buf)
{
    bdrv_debug_event(b->bs->file, "refblock_update_part");
    int ret = transfer(b, blocks, n, BDRV_BATCH_WRITE, buf);
    for (size_t i = 0; i < n; i++) {
        if (blocks[i].edited) {
            qcow2_cache_poison(b->s->cache, blocks[i].offset, b->s->cluster_size);
        }
    }
    return ret;
}

/* Nobody knows what a write that failed has done: what was there is written once more. */
static void revert_batch(Bulk *b, const Block *blocks, size_t n, uint8_t *buf, unsigned part)
{
    for (size_t i = 0; i < n; i++) {
        if (blocks[i].edited) {
            b->revert(b, &blocks[i], buf + (i << b->s->cluster_bits), part);
        }
    }
    (void)write_batch(b, blocks, n, buf);
}

static int store_batch(Bulk *b, Block *blocks, size_t n, uint8_t *buf, unsigned part)
{
    int ret = guard_batch(b, blocks, n);
    if (ret < 0) {
        return ret;
    }
    ret = write_batch(b, blocks, n, buf);
    if (ret < 0 && b->revert) {
        revert_batch(b, blocks, n, buf, part);
    }
    for (size_t i = 0; i < n; i++) {
        blocks[i].written = ret == 0 && blocks[i].edited;
    }
    return ret;
}

static int run_part(uint64_t first, uint64_t end, unsigned part, void *opaque)
{
    Bulk *b = opaque;
    Block *blocks = (Block *)(void *)b->blocks->data;
    size_t max = CLAMP(BATCH_BYTES >> b->s->cluster_bits, 1, BATCH_BLOCKS);
    max = MIN(max, end - first);
    uint8_t *buf = max ? bdrv_try_blockalign(b->bs->file->bs, max << b->s->cluster_bits) : NULL;
    int ret = buf || !max ? 0 : -ENOMEM;
    for (size_t n; first < end && ret == 0; first += n) {
        n = MIN(max, end - first);
        ret = read_batch(b, &blocks[first], n, buf);
        ret = ret < 0 ? ret : edit_batch(b, &blocks[first], n, buf, part);
        ret = ret < 0 ? ret : store_batch(b, &blocks[first], n, buf, part);
    }
    free(buf);
    return ret;
}

/* ---------------------------------------------------------------- */

static void bulk_clear(Bulk *b)
{
    g_array_unref(b->blocks);
    for (unsigned i = 0; i < QCOW2_MAX_PARTS; i++) {
        g_clear_pointer(&b->ones[i], g_array_unref);
        g_clear_pointer(&b->rest[i], g_array_unref);
    }
}

#define BULK_AUTO __attribute__((cleanup(bulk_clear))) Bulk

/* Invariants 1 and 3. */
static int bulk_init(Bulk *b, BlockDriverState *bs, const GArray *list, EditFn *edit)
{
    *b = (Bulk){
        .bs = bs, .s = qcow2_state(bs), .list = list, .edit = edit,
        .blocks = g_array_new(false, false, sizeof(Block)),
    };
    int ret = qcow2_cache_dirty_bytes(b->s->cache) ? qcow2_flush_all(bs) : 0;
    return ret < 0 ? ret : find_blocks(b);
}

static int bulk_run(Bulk *b)
{
    return qcow2_walk_in_parts(b->blocks->len, run_part, b);
}

int qcow2_bulk_judge(BlockDriverState *bs, const GArray *list)
{
    BULK_AUTO b;
    int ret = bulk_init(&b, bs, list, judge_block);
    return ret < 0 ? ret : bulk_run(&b);
}

/* Invariant 5. What cannot be written stays too high. */
static void take_back(Bulk *b)
{
    GArray *written = g_array_new(false, false, sizeof(Block));
    for (guint i = 0; i < b->blocks->len; i++) {
        const Block *block = &g_array_index(b->blocks, Block, i);
        if (block->written) {
            g_array_append_vals(written, block, 1);
        }
    }
    g_array_unref(b->blocks);
    b->blocks = written;
    b->edit = revert_raise;
    b->revert = NULL;
    (void)bulk_run(b);
}

static void raised(BDRVQcow2State *s)
{
    QB_GUARD(&s->alloc_lock);
    s->alloc_seq++; /* who is about to cut the file looks again */
}

int qcow2_bulk_raise(BlockDriverState *bs, const GArray *list)
{
    BULK_AUTO b;
    int ret = bulk_init(&b, bs, list, raise_block);
    if (ret < 0) {
        return ret;
    }
    b.revert = revert_raise;
    ret = bulk_run(&b);
    if (ret < 0) {
        take_back(&b);
    }
    raised(b.s);
    return ret;
}

static void append_all(GArray *to, GArray *const parts[])
{
    for (unsigned i = 0; i < QCOW2_MAX_PARTS; i++) {
        g_array_append_vals(to, parts[i]->data, parts[i]->len);
    }
}

int qcow2_bulk_lower(BlockDriverState *bs, const GArray *list, GArray *ones, GArray *rest)
{
    BULK_AUTO b;
    int ret = bulk_init(&b, bs, list, lower_block);
    for (unsigned i = 0; i < QCOW2_MAX_PARTS; i++) {
        b.ones[i] = g_array_new(false, false, sizeof(Qcow2HostRun));
        b.rest[i] = g_array_new(false, false, sizeof(Qcow2HostRun));
    }
    ret = ret < 0 ? ret : bulk_run(&b);
    append_all(ones, b.ones);
    append_all(rest, b.rest);
    return ret;
}
