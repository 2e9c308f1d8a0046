/*
 * Tables and data of persistent bitmaps: reading them, and storing what changed.
 *
 *   bits in memory, in pages of 4 KiB:   [ . | x | . | . | . | . | . | . ]      x: changed
 *   chunks, a cluster of bits each:      [      0       |        1       ]
 *   table:                               [   offset     |    0 (zeroes)  ]  or 1: all ones
 *
 * Storing, with IN_USE stable:
 *   1. changed pages go to the clusters they have, in place; chunks that have none get new ones;
 *      chunks that became all zeroes or all ones need none
 *   2. table sectors that changed: at once, unless they refer to new clusters
 *   3. flush: data, counts of new clusters | table sectors that refer to them, with the L2 tables
 *   4. directory: IN_USE off, AUTO as it is now, in place; barrier.  Where a table had to move: a
 *      new directory
 *   5. clusters that are not needed any more are freed
 *
 * So a session costs one barrier for IN_USE, the flush that guest data need anyway, and one to end.
 *
 * Invariants
 *  1. A table sector that refers to a new cluster is written after the barrier that made its count
 *     stable: it goes with phase 2 of a flush (qcow2_bitmaps_take_tables()).
 *  2. Only clusters of bitmaps that this session marked IN_USE are written in place, and only while
 *     they have exactly one reference.
 *  3. Without space for a chunk its table entry says all ones: more is dirty than was, nothing is
 *     lost, and that needs no space.  So a full disk, or guest data that cannot be written,
 *     loses no bitmap whose table exists.
 *  4. A bitmap that could not be stored stays IN_USE; its new clusters may leak.  The next store
 *     writes its whole table: nobody knows which sectors of it are in the image.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-bitmap.h"

#include <inttypes.h>
#include <string.h>

#include "util/iov.h"

enum {
    TABLE_SECTOR = QCOW2_HDR_SECTOR,
    SECTOR_ENTRIES = TABLE_SECTOR / 8,
    MAX_BUFFERED = 4 << 20,
};

/* ---------------------------------------------------------------- reading */

static bool entry_is_possible(const BDRVQcow2State *s, uint64_t entry)
{
    uint64_t offset = entry & QCOW2_BITMAP_ENTRY_OFFSET_MASK;
    return !(entry & QCOW2_BITMAP_ENTRY_RESERVED_MASK) && !qcow2_offset_into_cluster(s, offset) &&
           !(offset && (entry & QCOW2_BITMAP_ENTRY_ALL_ONES));
}

int qcow2_bitmap_read_table(Qcow2Bitmap *q)
{
    if (q->table) {
        return 0;
    }
    uint32_t n = qcow2_bitmap_table_entries(q);
    g_autofree uint64_t *table = g_try_new0(uint64_t, n);
    int ret = table ? bdrv_pread(q->bs->file, (int64_t)qcow2_bitmap_table_offset(q),
                                 (int64_t)n * 8, table, 0)
                    : -ENOMEM;
    for (uint32_t i = 0; i < n && ret == 0; i++) {
        table[i] = be64toh(table[i]);
        ret = entry_is_possible(qcow2_state(q->bs), table[i]) ? 0 : -EINVAL;
    }
    if (ret == 0) {
        q->table = g_steal_pointer(&table);
        q->table_entries = n;
    }
    return ret;
}

static BdrvDirtyStored stored_as(uint64_t entry)
{
    if (entry & QCOW2_BITMAP_ENTRY_OFFSET_MASK) {
        return BDRV_DIRTY_STORED_DATA;
    }
    return entry & QCOW2_BITMAP_ENTRY_ALL_ONES ? BDRV_DIRTY_STORED_ONES : BDRV_DIRTY_STORED_ZEROES;
}

static int begin_bits(BdrvDirtyBits *bits, void *opaque)
{
    Qcow2Bitmap *q = opaque;
    uint64_t chunk = qcow2_state(q->bs)->cluster_size;
    int ret = qcow2_bitmap_read_table(q);
    for (uint32_t i = 0; ret == 0 && i < q->table_entries; i++) {
        ret = bdrv_dirty_bits_expect(bits, i * chunk, chunk, stored_as(q->table[i]));
    }
    return ret;
}

static uint64_t chunk_entry(const Qcow2Bitmap *q, uint64_t i)
{
    QB_GUARD(&qcow2_state(q->bs)->bitmaps->tables_lock);
    return i < q->table_entries ? q->table[i] : 0;
}

/* Part of one chunk. The cluster may be moved or freed meanwhile: it stays until we have left. */
static int read_chunk(Qcow2Bitmap *q, uint64_t pos, size_t bytes, uint8_t *buf)
{
    BDRVQcow2State *s = qcow2_state(q->bs);
    Qcow2User user;
    int ret = 0;
    qcow2_user_announce(s, &user);
    uint64_t entry = chunk_entry(q, pos >> s->cluster_bits);
    uint64_t offset = entry & QCOW2_BITMAP_ENTRY_OFFSET_MASK;
    if (offset) {
        offset += qcow2_offset_into_cluster(s, pos);
        qcow2_user_resolve(s, &user, offset, bytes);
        ret = bdrv_pread(q->bs->file, (int64_t)offset, (int64_t)bytes, buf, 0);
    } else {
        memset(buf, entry & QCOW2_BITMAP_ENTRY_ALL_ONES ? 0xff : 0, bytes);
    }
    qcow2_user_leave(s, &user);
    return ret;
}

static int read_bits(void *opaque, uint64_t pos, size_t bytes, uint8_t *buf)
{
    Qcow2Bitmap *q = opaque;
    uint64_t chunk = qcow2_state(q->bs)->cluster_size;
    int ret = 0;
    while (bytes && ret == 0) {
        size_t n = MIN(bytes, chunk - pos % chunk);
        ret = read_chunk(q, pos, n, buf);
        pos += n;
        buf += n;
        bytes -= n;
    }
    return ret;
}

BdrvDirtySource qcow2_bitmap_source(Qcow2Bitmap *q)
{
    return (BdrvDirtySource){.begin = begin_bits, .read = read_bits, .opaque = q};
}

/* ---------------------------------------------------------------- whose clusters */

/* Nobody else has the cluster, as far as counts and metadata in memory tell. */
static bool is_own(BlockDriverState *bs, uint64_t offset)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    uint64_t count;
    return qcow2_get_refcount(bs, offset >> s->cluster_bits, &count) == 0 && count == 1 &&
           !qcow2_overlaps_metadata(bs, offset, s->cluster_size);
}

void qcow2_bitmap_free_clusters(BlockDriverState *bs, uint64_t offset, uint64_t bytes)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    for (uint64_t end = offset + bytes; offset < end; offset += s->cluster_size) {
        if (is_own(bs, offset)) {
            qcow2_free_run(bs, offset, s->cluster_size, QCOW2_DISCARD_OTHER);
        }
    }
}

/* ---------------------------------------------------------------- one bitmap on its way */

/* How much space may be asked for; each is tried when the one before met a full disk. */
typedef enum StoreMode {
    STORE_ANYWHERE,
    STORE_IN_PLACE, /* chunks without a cluster become all ones */
    STORE_AS_ONES,  /* so do those whose cluster cannot be written: holes in the file */
} StoreMode;

typedef struct Storing {
    BlockDriverState *bs;
    BDRVQcow2State *s;
    Qcow2Bitmap *q;
    StoreMode mode;
    uint64_t *table;   /* the new one */
    uint32_t entries;
    uint64_t table_offset;
    GArray *fresh;     /* Qcow2HostRun: new data clusters, and a new table */
    GArray *ops;       /* BdrvBatchOp, buffers owned */
    size_t buffered;
    bool failed;
} Storing;

static void op_clear(void *op)
{
    g_free(((BdrvBatchOp *)op)->buf);
}

static GArray *new_ops(void)
{
    GArray *ops = g_array_new(false, false, sizeof(BdrvBatchOp));
    g_array_set_clear_func(ops, op_clear);
    return ops;
}

static Storing *storing_new(Qcow2Bitmap *q)
{
    Storing *st = g_new0(Storing, 1);
    st->bs = q->bs;
    st->s = qcow2_state(q->bs);
    st->q = q;
    st->fresh = g_array_new(false, false, sizeof(Qcow2HostRun));
    st->ops = new_ops();
    return st;
}

static void storing_free(void *opaque)
{
    Storing *st = opaque;
    g_array_unref(st->fresh);
    g_array_unref(st->ops);
    g_free(st->table);
    g_free(st);
}

/* Writes what is waiting, at depth. */
static int run_ops(Storing *st)
{
    int ret = st->ops->len ? bdrv_run_batch(st->bs->file, (BdrvBatchOp *)st->ops->data,
                                            st->ops->len)
                           : 0;
    g_array_set_size(st->ops, 0);
    st->buffered = 0;
    return ret;
}

/* Takes @buf over; NULL: no memory. */
static int add_op(Storing *st, uint64_t offset, uint64_t bytes, uint8_t *buf)
{
    BdrvBatchOp op = {.kind = BDRV_BATCH_WRITE, .offset = (int64_t)offset,
                      .bytes = (int64_t)bytes, .buf = buf};
    if (!buf) {
        return -ENOMEM;
    }
    g_array_append_val(st->ops, op);
    st->buffered += bytes;
    int ret = qcow2_check_overlap(st->bs, 0, offset, bytes);
    return ret == 0 && st->buffered > MAX_BUFFERED ? run_ops(st) : ret;
}

static int add_zeroes(Storing *st, uint64_t offset, uint64_t bytes)
{
    BdrvBatchOp op = {.kind = BDRV_BATCH_ZERO, .offset = (int64_t)offset, .bytes = (int64_t)bytes};
    g_array_append_val(st->ops, op);
    return qcow2_check_overlap(st->bs, 0, offset, bytes);
}

static int64_t allocate(Storing *st, uint64_t bytes)
{
    int64_t offset = st->mode == STORE_ANYWHERE ? qcow2_alloc_clusters(st->bs, bytes) : -ENOSPC;
    if (offset >= 0) {
        Qcow2HostRun run = {(uint64_t)offset, qb_align_up(bytes, st->s->cluster_size)};
        g_array_append_val(st->fresh, run);
    }
    return offset;
}

/* ---------------------------------------------------------------- chunks */

static int add_bits(Storing *st, uint64_t pos, uint64_t bytes, uint64_t offset)
{
    uint8_t *buf = g_try_malloc(bytes);
    if (buf) {
        bdrv_dirty_bits_serialise(st->q->bm->bits, pos, bytes, buf);
    }
    return add_op(st, offset, bytes, buf);
}

/* Zeroes beyond the end of the file would only make it longer, without storage. */
static int reach_end_of(Storing *st, uint64_t offset, const uint8_t *chunk)
{
    uint64_t last = st->s->cluster_size - BDRV_SECTOR_SIZE;
    int64_t length = bdrv_getlength(st->bs->file->bs);
    if (length < 0 || (uint64_t)length > offset + last) {
        return (int)MIN(length, 0);
    }
    return bdrv_pwrite(st->bs->file, (int64_t)(offset + last), BDRV_SECTOR_SIZE, chunk + last, 0);
}

/* The bits of a chunk to its new cluster, which may hold anything. Zeroes are not written out, but
 * have their storage: the next session must not need any for them. */
static int add_new_chunk(Storing *st, uint64_t pos, uint64_t offset)
{
    uint64_t piece = MIN(st->s->cluster_size, BDRV_DIRTY_PAGE_BYTES);
    g_autofree uint8_t *buf = g_try_malloc(st->s->cluster_size);
    int ret = buf ? 0 : -ENOMEM;
    if (buf) {
        bdrv_dirty_bits_serialise(st->q->bm->bits, pos, st->s->cluster_size, buf);
        ret = reach_end_of(st, offset, buf);
    }
    uint64_t at = 0;
    while (at < st->s->cluster_size && ret == 0) {
        bool zero = qb_buffer_is_zero(buf + at, piece);
        uint64_t end = at + piece;
        while (end < st->s->cluster_size && qb_buffer_is_zero(buf + end, piece) == zero) {
            end += piece;
        }
        ret = zero ? add_zeroes(st, offset + at, end - at)
                   : add_op(st, offset + at, end - at, g_memdup2(buf + at, end - at));
        at = end;
    }
    return ret;
}

static int store_in_place(Storing *st, uint64_t start, uint64_t offset)
{
    uint64_t pos = start, end = start + st->s->cluster_size, bytes;
    int ret = 0;
    while (ret == 0 &&
           bdrv_dirty_bits_next_changed(st->q->bm->bits, pos, end, &pos, &bytes)) {
        ret = add_bits(st, pos, bytes, offset + (pos - start));
        pos += bytes;
    }
    return ret;
}

static int store_in_new_cluster(Storing *st, uint64_t start, uint64_t *entry)
{
    int64_t offset = allocate(st, st->s->cluster_size);
    if (offset == -ENOSPC || offset == -EFBIG) {
        *entry = QCOW2_BITMAP_ENTRY_ALL_ONES; /* invariant 3 */
        return 0;
    }
    *entry = offset < 0 ? 0 : (uint64_t)offset;
    return offset < 0 ? (int)offset : add_new_chunk(st, start, (uint64_t)offset);
}

static int store_chunk(Storing *st, uint32_t i)
{
    uint64_t start = (uint64_t)i << st->s->cluster_bits, *entry = &st->table[i];
    BdrvDirtyLook look = bdrv_dirty_bits_look(st->q->bm->bits, start, st->s->cluster_size);
    uint64_t offset = *entry & QCOW2_BITMAP_ENTRY_OFFSET_MASK;
    if (!look.changed) {
        return 0;
    }
    if (look.all_zeroes || look.all_ones) {
        *entry = look.all_ones ? QCOW2_BITMAP_ENTRY_ALL_ONES : 0;
        return 0;
    }
    if (offset && st->mode != STORE_AS_ONES && is_own(st->bs, offset)) {
        return store_in_place(st, start, offset);
    }
    return look.unread && st->mode == STORE_ANYWHERE ? -EIO
                                                     : store_in_new_cluster(st, start, entry);
}

/* ---------------------------------------------------------------- tables */

static uint64_t table_bytes(const Storing *st, uint64_t entries)
{
    return qb_align_up(entries * 8, st->s->cluster_size);
}

static bool sector_changed(const Storing *st, uint32_t first)
{
    const Qcow2Bitmap *q = st->q;
    for (uint32_t i = first; i < MIN(first + SECTOR_ENTRIES, st->entries); i++) {
        if (i >= q->table_entries || st->table[i] != q->table[i]) {
            return true;
        }
    }
    return false;
}

static int add_table_sector(Storing *st, uint32_t first)
{
    uint8_t *buf = g_try_malloc0(TABLE_SECTOR);
    for (uint32_t i = first; buf && i < MIN(first + SECTOR_ENTRIES, st->entries); i++) {
        qb_stbe64(buf + (size_t)(i - first) * 8, st->table[i]);
    }
    return add_op(st, st->table_offset + (uint64_t)first * 8, TABLE_SECTOR, buf);
}

static bool table_moves(const Storing *st)
{
    return st->table_offset != qcow2_bitmap_table_offset(st->q);
}

/* The table stays where it is while its clusters suffice. */
static int place_table(Storing *st)
{
    uint64_t old = qcow2_bitmap_table_offset(st->q);
    if (table_bytes(st, st->entries) <= table_bytes(st, st->q->table_entries) &&
        is_own(st->bs, old)) {
        st->table_offset = old;
        return 0;
    }
    int64_t offset = allocate(st, (uint64_t)st->entries * 8);
    st->table_offset = offset < 0 ? old : (uint64_t)offset;
    return (int)MIN(offset, 0);
}

static int add_table(Storing *st)
{
    bool all = st->q->table_unsettled || table_moves(st);
    int ret = 0;
    for (uint32_t first = 0; first < st->entries && ret == 0; first += SECTOR_ENTRIES) {
        if (all || sector_changed(st, first)) {
            ret = add_table_sector(st, first);
        }
    }
    return ret;
}

/* ---------------------------------------------------------------- all of one bitmap */

static int start_over(Storing *st, StoreMode mode)
{
    const Qcow2Bitmap *q = st->q;
    uint64_t size = bdrv_dirty_bits_size(q->bm->bits);
    st->mode = mode;
    st->entries = (uint32_t)qcow2_bitmap_entries(st->s, size, q->bm->granularity_bits);
    g_free(st->table);
    st->table = g_try_new0(uint64_t, st->entries);
    if (!st->table || st->entries > QCOW2_MAX_BITMAP_BYTES >> st->s->cluster_bits) {
        return st->table ? -EFBIG : -ENOMEM;
    }
    memcpy(st->table, q->table, MIN(st->entries, q->table_entries) * sizeof(uint64_t));
    return 0;
}

/* Data to the image, and the table, unless it refers to what is new: then its sectors wait in
 * st->ops. */
static int try_store(Storing *st, StoreMode mode)
{
    int ret = start_over(st, mode);
    for (uint32_t i = 0; i < st->entries && ret == 0; i++) {
        ret = store_chunk(st, i);
    }
    ret = ret < 0 ? ret : place_table(st);
    ret = ret < 0 ? ret : run_ops(st);
    ret = ret < 0 ? ret : add_table(st);
    if (ret < 0) {
        return ret;
    }
    st->q->table_unsettled = true;
    return st->fresh->len ? 0 : run_ops(st);
}

/* Nothing refers to them. */
static void undo_fresh(Storing *st)
{
    for (guint i = 0; i < st->fresh->len; i++) {
        const Qcow2HostRun *run = &g_array_index(st->fresh, Qcow2HostRun, i);
        qcow2_alloc_undo(st->bs, run->offset, run->bytes);
    }
    g_array_set_size(st->fresh, 0);
    g_array_set_size(st->ops, 0);
    st->buffered = 0;
}

static bool is_no_space(int ret)
{
    return ret == -ENOSPC || ret == -EFBIG || ret == -EDQUOT;
}

static int store_data(Storing *st)
{
    int ret = atomic_load(&st->q->bm->lost) ? -EIO : bdrv_dirty_bits_begin(st->q->bm->bits);
    ret = ret < 0 ? ret : try_store(st, STORE_ANYWHERE);
    for (int mode = STORE_IN_PLACE; mode <= STORE_AS_ONES && is_no_space(ret); mode++) {
        undo_fresh(st);
        ret = try_store(st, (StoreMode)mode);
    }
    if (ret < 0) {
        undo_fresh(st);
    }
    st->failed = ret < 0;
    return ret;
}

/* The flush that its new clusters needed has failed; what of the table was written nobody knows.
 * The clusters leak: something may refer to them. */
static int store_without_fresh(Storing *st)
{
    g_array_set_size(st->fresh, 0);
    g_array_set_size(st->ops, 0);
    int ret = try_store(st, STORE_IN_PLACE);
    ret = is_no_space(ret) ? try_store(st, STORE_AS_ONES) : ret;
    st->failed = ret < 0;
    return ret;
}

bool qcow2_bitmaps_settled(BDRVQcow2State *s)
{
    QB_GUARD(&s->bitmaps->lock);
    bool settled = true;
    for (guint i = 0; i < s->bitmaps->all->len; i++) {
        const Qcow2Bitmap *q = g_ptr_array_index(s->bitmaps->all, i);
        settled &= !q->table_unsettled;
    }
    return settled;
}

/* ---------------------------------------------------------------- the tables' turn in a flush */

GArray *qcow2_bitmaps_take_tables(BDRVQcow2State *s)
{
    if (!s->bitmaps) {
        return NULL;
    }
    QB_GUARD(&s->bitmaps->tables_lock);
    return s->bitmaps->tables ? g_array_ref(s->bitmaps->tables) : NULL;
}

static void offer_tables(Qcow2Bitmaps *b, GArray *ops)
{
    QB_GUARD(&b->tables_lock);
    b->tables = ops;
}

/* Flushes everything, with the tables of those that wait. */
static int flush_with_tables(BlockDriverState *bs, const GPtrArray *all)
{
    Qcow2Bitmaps *b = qcow2_state(bs)->bitmaps;
    g_autoptr(GArray) ops = new_ops();
    for (guint i = 0; i < all->len; i++) {
        Storing *st = g_ptr_array_index(all, i);
        if (!st->failed && st->ops->len) {
            g_array_append_vals(ops, st->ops->data, st->ops->len);
            g_array_set_clear_func(st->ops, NULL); /* the buffers moved */
            g_array_set_size(st->ops, 0);
            g_array_set_clear_func(st->ops, op_clear);
        }
    }
    offer_tables(b, ops->len ? ops : NULL);
    int ret = qcow2_flush(bs);
    offer_tables(b, NULL);
    return ret;
}

static int make_stable(BlockDriverState *bs, const GPtrArray *all)
{
    int ret = flush_with_tables(bs, all), err = 0;
    if (ret == 0 || atomic_load(&qcow2_state(bs)->corrupt)) {
        return ret;
    }
    for (guint i = 0; i < all->len; i++) { /* guest data are in trouble; bitmaps need not be */
        Storing *st = g_ptr_array_index(all, i);
        if (!st->failed && st->fresh->len) {
            err = store_without_fresh(st) < 0 ? ret : err;
        }
    }
    ret = bdrv_flush(bs->file->bs);
    return ret < 0 ? ret : err;
}

/* ---------------------------------------------------------------- the directory's turn */

static uint32_t final_flags(const Storing *st)
{
    uint32_t flags = qcow2_bitmap_flags(st->q) & ~(QCOW2_BITMAP_IN_USE | QCOW2_BITMAP_AUTO);
    return flags | (atomic_load(&st->q->bm->disabled) ? 0 : QCOW2_BITMAP_AUTO);
}

/* Puts what is stored now into the directory at @dir. */
static void edit_entry(const Storing *st, uint8_t *dir)
{
    uint8_t *entry = dir + st->q->pos;
    qb_stbe64(entry + QCOW2_BITMAP_TABLE_OFFSET, st->table_offset);
    qb_stbe32(entry + QCOW2_BITMAP_TABLE_ENTRIES, st->entries);
    qb_stbe32(entry + QCOW2_BITMAP_FLAGS, final_flags(st));
}

static bool finish_by_switch(BlockDriverState *bs, const GPtrArray *stored, GError **errp)
{
    Qcow2Bitmaps *b = qcow2_state(bs)->bitmaps;
    uint64_t bytes = atomic_load(&b->dir_bytes);
    uint8_t *dir = g_memdup2(b->dir, qb_align_up(bytes, QCOW2_HDR_SECTOR));
    for (guint i = 0; i < stored->len; i++) {
        edit_entry(g_ptr_array_index(stored, i), dir);
    }
    return qcow2_bitmap_dir_switch(bs, dir, bytes, b->all->len, errp);
}

static bool finish_in_place(BlockDriverState *bs, const GPtrArray *stored, GError **errp)
{
    g_autoptr(GPtrArray) touched = g_ptr_array_new();
    for (guint i = 0; i < stored->len; i++) {
        Storing *st = g_ptr_array_index(stored, i);
        edit_entry(st, qcow2_state(bs)->bitmaps->dir);
        g_ptr_array_add(touched, st->q);
    }
    int ret = qcow2_bitmap_dir_write(bs, touched);
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Could not write the bitmap directory");
    }
    return ret == 0;
}

/* The new table is the bitmap's; @st keeps the old one. */
static void adopt(Storing *st)
{
    Qcow2Bitmap *q = st->q;
    uint64_t *old = q->table;
    uint32_t old_entries = q->table_entries;
    qb_mutex_lock(&st->s->bitmaps->tables_lock);
    q->table = st->table;
    q->table_entries = st->entries;
    qb_mutex_unlock(&st->s->bitmaps->tables_lock);
    st->table = old;
    st->entries = old_entries;
    q->table_unsettled = false;
    bdrv_dirty_bits_mark_stored(q->bm->bits);
}

/* What the old table had and the new one has not.  No reader finds it any more. */
static void free_spare(const Storing *st, uint64_t old_offset)
{
    const Qcow2Bitmap *q = st->q;
    for (uint32_t i = 0; i < st->entries; i++) {
        uint64_t was = st->table[i] & QCOW2_BITMAP_ENTRY_OFFSET_MASK;
        if (was && (i >= q->table_entries || q->table[i] != was)) {
            qcow2_bitmap_free_clusters(st->bs, was, st->s->cluster_size);
        }
    }
    uint64_t kept = st->table_offset == old_offset ? table_bytes(st, q->table_entries) : 0;
    uint64_t had = table_bytes(st, st->entries);
    if (kept < had) {
        qcow2_bitmap_free_clusters(st->bs, old_offset + kept, had - kept);
    }
}

/* IN_USE goes off. A failure leaves nobody knowing whether it did: it must be made stable again
 * before the next change. */
static bool finish(BlockDriverState *bs, const GPtrArray *stored, GError **errp)
{
    g_autofree uint64_t *old_offsets = g_new0(uint64_t, stored->len + 1);
    bool moves = false;
    for (guint i = 0; i < stored->len; i++) {
        Storing *st = g_ptr_array_index(stored, i);
        old_offsets[i] = qcow2_bitmap_table_offset(st->q);
        moves |= table_moves(st);
        atomic_store(&st->q->bm->in_use, false);
    }
    bool ok = !stored->len || (moves ? finish_by_switch(bs, stored, errp)
                                     : finish_in_place(bs, stored, errp));
    for (guint i = 0; i < stored->len && ok; i++) {
        Storing *st = g_ptr_array_index(stored, i);
        adopt(st);
        free_spare(st, old_offsets[i]);
    }
    return ok;
}

/* ---------------------------------------------------------------- all of them */

/* Ours to store: those this session changed. Others that are IN_USE were left so by somebody
 * else. */
static GPtrArray *bitmaps_to_store(const Qcow2Bitmaps *b)
{
    GPtrArray *all = g_ptr_array_new_with_free_func(storing_free);
    for (guint i = 0; i < b->all->len; i++) {
        Qcow2Bitmap *q = g_ptr_array_index(b->all, i);
        if (!q->bm->inconsistent && atomic_load(&q->bm->in_use)) {
            g_ptr_array_add(all, storing_new(q));
        }
    }
    return all;
}

static GPtrArray *those_stored(const GPtrArray *all)
{
    GPtrArray *stored = g_ptr_array_new();
    for (guint i = 0; i < all->len; i++) {
        Storing *st = g_ptr_array_index(all, i);
        if (!st->failed) {
            g_ptr_array_add(stored, st);
        }
    }
    return stored;
}

static int store_all_data(const GPtrArray *all)
{
    int err = 0;
    for (guint i = 0; i < all->len; i++) {
        int ret = store_data(g_ptr_array_index(all, i));
        err = err < 0 ? err : ret;
    }
    return err;
}

bool qcow2_bitmaps_store(BlockDriverState *bs, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    QB_GUARD(&s->bitmaps->lock);
    g_autoptr(GPtrArray) all = bitmaps_to_store(s->bitmaps);
    if (!all->len) {
        return true;
    }
    int err = atomic_load(&s->corrupt) ? -EIO : store_all_data(all);
    int ret = atomic_load(&s->corrupt) ? -EIO : make_stable(bs, all);
    g_autoptr(GPtrArray) stored = those_stored(all);
    g_autoptr(GError) finish_error = NULL;
    bool ok = ret == 0 && finish(bs, stored, &finish_error);
    if (ok && err == 0) {
        return true;
    }
    if (finish_error) {
        g_propagate_error(errp, g_steal_pointer(&finish_error));
    } else {
        qb_error_set_errno(errp, ret < 0 ? ret : err, "Could not store the bitmaps");
    }
    return false;
}
