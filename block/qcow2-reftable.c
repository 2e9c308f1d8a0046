/*
 * The refcount table and its blocks: reading, appending, moving to a larger place.
 *
 *      s->reftable.entries[i] --> block i --> counts of host clusters [i * R, (i + 1) * R)
 *
 * New blocks are made where nothing has a count yet: at the first cluster of the first new block's
 * range.
 *
 *      cluster  i*R                              (k blocks, T clusters of table, n asked for)
 *               [block i][block i+1]...[new table, T clusters][the n clusters]
 *               each block counts what lies in its range: itself, the others, the table, the n
 *
 * Invariants
 * 1. entries[] is what the next successful flush makes of the disk; dirty[] lists entries that the
 *    disk does not have; "moved" says that the whole table lies at a place the header does not
 *    name.
 * 2. A block that was appended describes its own cluster, or lies in the range of one appended with
 *    it.
 * 3. The old table's clusters are freed through quarantine, so they stay until the header has
 *    switched.
 * 4. The table never exceeds QCOW2_MAX_REFTABLE_BYTES, and no cluster lies beyond
 *    QCOW2_MAX_HOST_OFFSET.
 * 5. Appended blocks and tables have their space in the file before they are made, so that on a
 *    full file system the request fails that needs them, and not each flush after it.  Zeroes are
 *    written there without the lock, while "reserving" keeps others from appending.  Nobody has a
 *    cluster there: it takes a block to hand one out.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-refcount-int.h"

#include <stdlib.h>
#include <string.h>

#include "util/iov.h"

#define TABLE_SECTOR 512
#define SECTOR_ENTRIES (TABLE_SECTOR / sizeof(uint64_t))

/* ---- reading ---- */

static uint64_t *read_entries(BlockDriverState *bs, uint64_t offset, uint64_t bytes, GError **errp)
{
    uint64_t *entries = g_try_malloc(MAX(bytes, 1));
    int ret;

    if (!entries) {
        qb_error_set(errp, ENOMEM, "Not enough memory for the refcount table");
        return NULL;
    }
    bdrv_debug_event(bs->file, "reftable_load");
    ret = bytes ? bdrv_pread(bs->file, (int64_t)offset, (int64_t)bytes, entries, 0) : 0;
    if (ret < 0) {
        qb_error_set_errno(errp, -ret, "Could not read refcount table");
        g_free(entries);
        return NULL;
    }
    for (uint64_t i = 0; i < bytes / sizeof(uint64_t); i++) {
        entries[i] = be64toh(entries[i]);
    }
    return entries;
}

/* Entries below @n up to the last one that names a block. */
static uint64_t trim_blocks(const BDRVQcow2State *s, uint64_t n)
{
    while (n > 0 && !(s->reftable.entries[n - 1] & QCOW2_REFTABLE_OFFSET_MASK)) {
        n--;
    }
    return n;
}

static void set_entry_locked(BDRVQcow2State *s, uint64_t index, uint64_t offset)
{
    uint64_t old = s->reftable.entries[index] & QCOW2_REFTABLE_OFFSET_MASK;

    qcow2_guard_table(s, QCOW2_OL_REFCOUNT_BLOCK, old, false);
    s->reftable.entries[index] = offset;
    qcow2_guard_table(s, QCOW2_OL_REFCOUNT_BLOCK, offset, true);
}

static void guard_place(BDRVQcow2State *s)
{
    const Qcow2HostRun run = {s->reftable.offset, (uint64_t)s->reftable.clusters << s->cluster_bits};

    qcow2_guard_set(s, QCOW2_OL_REFCOUNT_TABLE, &run, 1);
}

static void guard_all(BDRVQcow2State *s)
{
    guard_place(s);
    qcow2_guard_forget_tables(s, QCOW2_OL_REFCOUNT_BLOCK);
    for (uint64_t i = 0; i < s->reftable.nb_entries; i++) {
        qcow2_guard_table(s, QCOW2_OL_REFCOUNT_BLOCK,
                          s->reftable.entries[i] & QCOW2_REFTABLE_OFFSET_MASK, true);
    }
}

/* Blocks that are missing between others: all their clusters are free, and that is known at
 * once. */
static void index_missing_blocks(BDRVQcow2State *s)
{
    QB_GUARD(&s->alloc_lock);
    uint64_t nb = trim_blocks(s, s->reftable.nb_entries);

    s->reftable.nb_blocks = nb;
    qcow2_free_index_resize(s->free_index, nb);
    for (uint64_t i = 1; i < nb; i++) {
        if (!(s->reftable.entries[i] & QCOW2_REFTABLE_OFFSET_MASK)) {
            qcow2_free_index_set(s->free_index, i, qcow2_counts_per_block(s), 0);
        }
    }
}

static bool init_file_end(BlockDriverState *bs, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    int64_t length = bdrv_getlength(bs->file->bs);

    if (length < 0) {
        qb_error_set_errno(errp, (int)-length, "Could not get the length of the image file");
        return false;
    }
    atomic_store(&s->file_end, qb_align_up((uint64_t)length, s->cluster_size));
    return true;
}

/* The length of the table; 0 when its place is one that only a check lets through. */
static uint64_t table_bytes(const BDRVQcow2State *s)
{
    uint64_t offset = s->header.reftable_offset;
    uint64_t bytes = (uint64_t)s->header.reftable_clusters << s->cluster_bits;
    bool valid = offset && !qcow2_offset_into_cluster(s, offset) &&
                 bytes <= QCOW2_MAX_REFTABLE_BYTES && offset <= INT64_MAX - bytes;

    return valid ? bytes : 0;
}

/* @entries (stolen) is the table that the header names, of @bytes. */
static void set_table(BDRVQcow2State *s, uint64_t *entries, uint64_t bytes)
{
    s->reftable.entries = entries;
    s->reftable.nb_entries = bytes / sizeof(uint64_t);
    s->reftable.offset = s->header.reftable_offset;
    s->reftable.clusters = s->header.reftable_clusters;
    s->reftable.moved = false;
    s->compressed_next = 0;
    s->look_from = s->blind_growth = 0;
    guard_all(s);
    index_missing_blocks(s);
}

/* A header that names more table than the file holds names nothing there: the rest stays zero. The
 * claim itself is bounded by the header's validation. */
bool qcow2_refcount_init(BlockDriverState *bs, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    uint64_t bytes = table_bytes(s);

    s->reftable.dirty = g_array_new(FALSE, FALSE, sizeof(uint64_t)); /* also when this fails */
    if (!init_file_end(bs, errp)) {
        return false;
    }
    uint64_t *entries = read_entries(bs, s->header.reftable_offset, bytes, errp);
    if (entries) {
        set_table(s, entries, bytes);
    }
    return entries != NULL;
}

void qcow2_refcount_close(BlockDriverState *bs)
{
    BDRVQcow2State *s = qcow2_state(bs);

    g_clear_pointer(&s->reftable.entries, g_free);
    if (s->reftable.dirty) {
        g_array_free(g_steal_pointer(&s->reftable.dirty), TRUE);
    }
    s->reftable.nb_entries = 0;
}

static void forget(BlockDriverState *bs)
{
    BDRVQcow2State *s = qcow2_state(bs);

    qcow2_refcount_close(bs);
    qcow2_free_index_free(s->free_index);
    s->free_index = qcow2_free_index_new();
    s->look_from = 0;
}

bool qcow2_refcount_reload(BlockDriverState *bs, GError **errp)
{
    forget(bs);
    return qcow2_refcount_init(bs, errp);
}

void qcow2_refcount_adopt(BlockDriverState *bs, uint64_t *entries)
{
    BDRVQcow2State *s = qcow2_state(bs);

    forget(bs);
    s->reftable.dirty = g_array_new(FALSE, FALSE, sizeof(uint64_t));
    set_table(s, entries, table_bytes(s));
}

/* ---- finding blocks ---- */

uint64_t qcow2_block_offset_locked(const BDRVQcow2State *s, uint64_t index)
{
    return index < s->reftable.nb_entries
               ? s->reftable.entries[index] & QCOW2_REFTABLE_OFFSET_MASK
               : 0;
}

int qcow2_pin_block_locked(BDRVQcow2State *s, uint64_t index, Qcow2Table **ret, bool *dropped)
{
    qb_mutex_assert_held(&s->alloc_lock);
    for (;;) {
        uint64_t offset = qcow2_block_offset_locked(s, index);
        assert(offset);
        *ret = qcow2_cache_peek(s->cache, QCOW2_TABLE_REFBLOCK, offset);
        if (*ret) {
            return 0;
        }
        *dropped = true;
        qb_mutex_unlock(&s->alloc_lock);
        int err = qcow2_cache_get(s->cache, QCOW2_TABLE_REFBLOCK, offset, ret);
        qb_mutex_lock(&s->alloc_lock);
        if (err < 0 || !qcow2_table_poisoned(*ret)) {
            return err;
        }
        g_clear_pointer(ret, qcow2_cache_put); /* it has moved */
    }
}

/* ---- appending ---- */

/* What an append consists of. */
typedef struct Append {
    uint64_t first;        /* index of the first new block */
    uint64_t blocks;       /* how many */
    uint64_t table;        /* clusters of a new table, 0: the present one is large enough */
    uint64_t clusters;     /* asked for */
    uint64_t limit;        /* clusters that the file can hold */
} Append;

/* Blocks needed depend on the table's size and the other way round: grow both until they fit. */
static int plan_append(const BDRVQcow2State *s, Append *a)
{
    uint64_t per_block = qcow2_counts_per_block(s), per_table = s->cluster_size / sizeof(uint64_t);
    uint64_t end;

    a->blocks = 1;
    a->table = 0;
    for (;;) {
        uint64_t blocks = qb_div_round_up(a->blocks + a->table + a->clusters, per_block);
        uint64_t entries = a->first + MAX(blocks, a->blocks);
        uint64_t table = entries > s->reftable.nb_entries
                             ? qb_div_round_up(entries + entries / 2, per_table)
                             : 0;
        if (blocks <= a->blocks && table <= a->table) {
            break;
        }
        a->blocks = MAX(blocks, a->blocks);
        a->table = MAX(table, a->table);
    }
    if (a->table << s->cluster_bits > QCOW2_MAX_REFTABLE_BYTES) {
        a->table = QCOW2_MAX_REFTABLE_BYTES >> s->cluster_bits;
    }
    end = (a->first + a->blocks) << s->refblock_bits;
    if ((a->table && a->table * per_table < a->first + a->blocks) ||
        end > QCOW2_MAX_HOST_OFFSET >> s->cluster_bits) {
        return -EFBIG;
    }
    end = (a->first << s->refblock_bits) + a->blocks + a->table + a->clusters;
    return end > a->limit ? -ENOSPC : 0;
}

/* The new table's memory first: nothing may fail once blocks have been made. */
static int enlarge_entries(BDRVQcow2State *s, const Append *a)
{
    uint64_t nb = a->table * (s->cluster_size / sizeof(uint64_t));
    uint64_t *entries;

    if (!a->table) {
        return 0;
    }
    entries = g_try_realloc_n(s->reftable.entries, nb, sizeof(uint64_t));
    if (!entries) {
        return -ENOMEM;
    }
    memset(entries + s->reftable.nb_entries, 0,
           (nb - s->reftable.nb_entries) * sizeof(uint64_t));
    s->reftable.entries = entries;
    return 0;
}

static uint64_t append_offset(const BDRVQcow2State *s, const Append *a, uint64_t cluster)
{
    return ((a->first << s->refblock_bits) + cluster) << s->cluster_bits;
}

static void switch_table(BDRVQcow2State *s, const Append *a)
{
    uint64_t old = s->reftable.offset;
    uint64_t old_bytes = (uint64_t)s->reftable.clusters << s->cluster_bits;

    if (!a->table) {
        return;
    }
    s->reftable.nb_entries = a->table * (s->cluster_size / sizeof(uint64_t));
    s->reftable.offset = append_offset(s, a, a->blocks);
    s->reftable.clusters = (uint32_t)a->table;
    s->reftable.moved = true;
    guard_place(s);
    g_array_set_size(s->reftable.dirty, 0); /* all of it will be written */
    qcow2_free_tables(s->bs, old, old_bytes, QCOW2_DISCARD_OTHER);
}

/* Counts 1 for the first @used clusters of the append, block by block. */
static void fill_block(BDRVQcow2State *s, const Append *a, uint64_t i, Qcow2Table *t)
    QB_REQUIRES(s->alloc_lock)
{
    uint64_t per_block = qcow2_counts_per_block(s);
    uint64_t used = a->blocks + a->table + a->clusters, start = i * per_block;
    uint64_t n = used > start ? MIN(used - start, per_block) : 0;

    qcow2_free_index_set(s->free_index, a->first + i, per_block - n, n);
    qcow2_set_counts_locked(s, t, a->first + i, 0, n, 1);
}

static void hook_up(BDRVQcow2State *s, uint64_t index, uint64_t offset)
{
    set_entry_locked(s, index, offset);
    s->reftable.nb_blocks = MAX(s->reftable.nb_blocks, index + 1);
    if (!s->reftable.moved) {
        g_array_append_val(s->reftable.dirty, index);
    }
}

/* Makes the tables; on failure forgets those already made. */
static int make_blocks(BDRVQcow2State *s, const Append *a, Qcow2Table **tables)
{
    for (uint64_t i = 0; i < a->blocks; i++) {
        tables[i] = qcow2_cache_add(s->cache, QCOW2_TABLE_REFBLOCK, append_offset(s, a, i), NULL);
        if (!tables[i]) {
            qcow2_cache_poison(s->cache, append_offset(s, a, 0), i << s->cluster_bits);
            while (i > 0) {
                qcow2_cache_put(tables[--i]);
            }
            return -ENOMEM;
        }
    }
    return 0;
}

/* Invariant 5. 1: it is done. 0: the lock was let go. */
static int reserve_append(BDRVQcow2State *s, const Append *a, Qcow2HostRun *reserved)
    QB_REQUIRES(s->alloc_lock)
{
    uint64_t offset = append_offset(s, a, 0), bytes = (a->blocks + a->table) << s->cluster_bits;
    int ret;

    if (s->reftable.reserving) {
        qb_cond_wait(&s->alloc_wait, &s->alloc_lock);
        return 0;
    }
    if (reserved->offset == offset && reserved->bytes == bytes) {
        return 1;
    }
    s->reftable.reserving = true;
    qb_mutex_unlock(&s->alloc_lock);
    ret = qcow2_reserve(s->bs, offset, bytes);
    qb_mutex_lock(&s->alloc_lock);
    s->reftable.reserving = false;
    qb_cond_broadcast(&s->alloc_wait);
    *reserved = (Qcow2HostRun){offset, bytes};
    return MIN(ret, 0);
}

int64_t qcow2_append_blocks_locked(BDRVQcow2State *s, uint64_t blocks_from, uint64_t clusters,
                                   uint64_t limit, Qcow2HostRun *reserved)
{
    Append a = {.first = blocks_from, .clusters = clusters, .limit = limit};
    g_autofree Qcow2Table **tables = NULL;
    int ret = plan_append(s, &a);

    qb_mutex_assert_held(&s->alloc_lock);
    assert(blocks_from > 0 && !qcow2_block_offset_locked(s, blocks_from));
    ret = ret < 0 ? ret : reserve_append(s, &a, reserved);
    if (ret <= 0 || (ret = enlarge_entries(s, &a)) < 0) {
        return ret;
    }
    tables = g_new(Qcow2Table *, a.blocks);
    ret = make_blocks(s, &a, tables);
    if (ret < 0) {
        return ret;
    }
    switch_table(s, &a);
    qcow2_free_index_resize(s->free_index, a.first + a.blocks);
    for (uint64_t i = 0; i < a.blocks; i++) {
        hook_up(s, a.first + i, append_offset(s, &a, i));
        fill_block(s, &a, i, tables[i]);
        qcow2_cache_put(tables[i]);
    }
    return (int64_t)append_offset(s, &a, a.blocks + a.table);
}

/* ---- flushing ---- */

static int append_sector(const BDRVQcow2State *s, uint64_t first, uint64_t n, GArray *pieces)
{
    Qcow2DirtyPiece piece = {.offset = s->reftable.offset + first * sizeof(uint64_t),
                             .bytes = n * sizeof(uint64_t),
                             .data = qb_try_memalign(4096, MAX(n * sizeof(uint64_t), 4096))};

    if (!piece.data) {
        return -ENOMEM;
    }
    for (uint64_t i = 0; i < n; i++) {
        qb_stbe64(piece.data + i * sizeof(uint64_t), s->reftable.entries[first + i]);
    }
    g_array_append_val(pieces, piece);
    return 0;
}

static gint compare_u64(gconstpointer a, gconstpointer b)
{
    const uint64_t *x = a, *y = b;

    return *x < *y ? -1 : *x > *y;
}

/* Sectors of the dirty entries, each once. */
static int append_dirty_sectors(BDRVQcow2State *s, GArray *pieces)
{
    uint64_t last = UINT64_MAX;
    int ret = 0;

    g_array_sort(s->reftable.dirty, compare_u64);
    for (guint i = 0; i < s->reftable.dirty->len && ret == 0; i++) {
        uint64_t sector = g_array_index(s->reftable.dirty, uint64_t, i) / SECTOR_ENTRIES;
        if (sector != last) {
            ret = append_sector(s, sector * SECTOR_ENTRIES, SECTOR_ENTRIES, pieces);
            last = sector;
        }
    }
    return ret;
}

int qcow2_reftable_collect_locked(BDRVQcow2State *s, GArray *pieces, Qcow2ReftableCopy *ret)
{
    int err;

    qb_mutex_assert_held(&s->alloc_lock);
    *ret = (Qcow2ReftableCopy){.moved = s->reftable.moved, .offset = s->reftable.offset,
                               .clusters = s->reftable.clusters};
    err = s->reftable.moved ? append_sector(s, 0, s->reftable.nb_entries, pieces)
                            : append_dirty_sectors(s, pieces);
    if (err == 0) {
        g_array_set_size(s->reftable.dirty, 0);
    }
    /* while a moved table is being written, entries set meanwhile are noted like any other */
    s->reftable.moved = err < 0 && s->reftable.moved;
    return err;
}

void qcow2_reftable_done(BDRVQcow2State *s, const GArray *pieces, const Qcow2ReftableCopy *copy,
                         bool failed)
{
    QB_GUARD(&s->alloc_lock);

    if (!failed || s->reftable.offset != copy->offset) {
        return;
    }
    s->reftable.moved |= copy->moved;
    if (s->reftable.moved) {
        g_array_set_size(s->reftable.dirty, 0);
        return;
    }
    for (guint i = 0; i < pieces->len; i++) {
        const Qcow2DirtyPiece *p = &g_array_index(pieces, Qcow2DirtyPiece, i);
        uint64_t index = (p->offset - s->reftable.offset) / sizeof(uint64_t);
        g_array_append_val(s->reftable.dirty, index);
    }
}

/* ---- moving ---- */

int qcow2_refblock_move(BlockDriverState *bs, uint64_t index, uint64_t offset,
                        Qcow2DiscardType type)
{
    BDRVQcow2State *s = qcow2_state(bs);
    QB_GUARD(&s->alloc_lock);
    g_autoptr(Qcow2Table) old = NULL, new = NULL;
    bool dropped = false;
    int ret = qcow2_pin_block_locked(s, index, &old, &dropped);

    if (ret < 0) {
        return ret;
    }
    new = qcow2_cache_add(s->cache, QCOW2_TABLE_REFBLOCK, offset, qcow2_refblock_data(old));
    if (!new) {
        return -ENOMEM;
    }
    hook_up(s, index, offset);
    qcow2_free_tables(bs, qcow2_table_offset(old), s->cluster_size, type);
    return 0;
}

void qcow2_reftable_move(BlockDriverState *bs, uint64_t offset, Qcow2DiscardType type)
{
    BDRVQcow2State *s = qcow2_state(bs);
    QB_GUARD(&s->alloc_lock);
    uint64_t old = s->reftable.offset;

    s->reftable.offset = offset;
    s->reftable.moved = true;
    guard_place(s);
    g_array_set_size(s->reftable.dirty, 0); /* all of it will be written */
    qcow2_free_tables(bs, old, (uint64_t)s->reftable.clusters << s->cluster_bits, type);
}

/* ---- shrinking ---- */

/* Does the block hold nothing but, maybe, its own count? *ret_self: it counts itself. */
static bool block_is_empty_locked(BDRVQcow2State *s, uint64_t index, Qcow2Table *t, bool *ret_self)
    QB_REQUIRES(s->alloc_lock)
{
    const uint8_t *data = qcow2_refblock_data(t);
    uint64_t self = qcow2_table_offset(t) >> s->cluster_bits;
    uint64_t used = 0;

    *ret_self = qcow2_block_of(s, self) == index;
    for (uint64_t slot = 0; slot < qcow2_counts_per_block(s); slot++) {
        used += qcow2_refcount_read(data, s->refcount_order, slot) != 0;
        if (used > 1) {
            return false;
        }
    }
    return used == 0 ||
           (*ret_self && qcow2_refcount_read(data, s->refcount_order, qcow2_slot_of(s, self)) == 1);
}

static void drop_entry_locked(BDRVQcow2State *s, uint64_t index) QB_REQUIRES(s->alloc_lock)
{
    set_entry_locked(s, index, 0);
    s->reftable.nb_blocks = trim_blocks(s, s->reftable.nb_blocks);
    if (!s->reftable.moved) {
        g_array_append_val(s->reftable.dirty, index);
    }
    qcow2_free_index_set(s->free_index, index, 0, 0); /* not to be used before the flush */
}

/* Drops block @index, the last one, if it is empty. One hold: requests may allocate meanwhile. What
 * it counted is out of bounds for them until settle_dropped(), also for a new block. */
static bool drop_if_empty(BDRVQcow2State *s, uint64_t index, Qcow2Table *t, bool *ret_self)
{
    QB_GUARD(&s->alloc_lock);

    if (s->reftable.nb_blocks != index + 1 || !block_is_empty_locked(s, index, t, ret_self)) {
        return false;
    }
    drop_entry_locked(s, index);
    s->cut_at = index << s->refblock_bits;
    return true;
}

static uint64_t last_block(BDRVQcow2State *s, uint64_t *ret_offset)
{
    QB_GUARD(&s->alloc_lock);
    uint64_t nb = s->reftable.nb_blocks;

    *ret_offset = nb ? qcow2_block_offset_locked(s, nb - 1) : 0;
    return nb;
}

/* A block that counts itself, dropped from the table. */
typedef struct DroppedBlock {
    uint64_t index, offset;
} DroppedBlock;

static void restore_entry(BDRVQcow2State *s, const DroppedBlock *d)
{
    QB_GUARD(&s->alloc_lock);
    hook_up(s, d->index, d->offset);
    qcow2_free_index_set(s->free_index, d->index, qcow2_counts_per_block(s), 0);
}

/* Their clusters became free with the entries, so they must not be used before the table on disk
 * has forgotten them: where the flush failed they are put back. */
static int settle_dropped(BlockDriverState *bs, const GArray *dropped)
{
    BDRVQcow2State *s = qcow2_state(bs);
    int ret = qcow2_flush(bs);

    for (guint i = 0; i < dropped->len; i++) {
        const DroppedBlock *d = &g_array_index(dropped, DroppedBlock, i);
        if (ret < 0) {
            restore_entry(s, d);
        } else {
            qcow2_cache_poison(s->cache, d->offset, s->cluster_size);
        }
    }
    return ret;
}

/* Requests below the end of a shrinking disk go on. Those who find no room but in what is being cut
 * off wait until that is settled. */
int qcow2_refcount_shrink(BlockDriverState *bs)
{
    BDRVQcow2State *s = qcow2_state(bs);
    g_autoptr(GArray) dropped = g_array_new(FALSE, FALSE, sizeof(DroppedBlock));
    bool cut = false;
    int ret = 0;

    for (;;) {
        g_autoptr(Qcow2Table) t = NULL;
        uint64_t offset, nb = last_block(s, &offset);
        bool self;

        if (nb <= 1) {
            break;
        }
        ret = qcow2_cache_get(s->cache, QCOW2_TABLE_REFBLOCK, offset, &t);
        if (ret < 0 || !drop_if_empty(s, nb - 1, t, &self)) {
            break;
        }
        cut = true;
        if (self) {
            g_array_append_val(dropped, ((DroppedBlock){nb - 1, offset}));
        } else {
            qcow2_free_run(bs, offset, s->cluster_size, QCOW2_DISCARD_ALWAYS);
        }
    }
    int err = settle_dropped(bs, dropped);
    if (cut) {
        qcow2_cut_end(s);
    }
    return ret < 0 ? ret : err;
}
