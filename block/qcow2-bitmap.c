/*
 * Persistent dirty bitmaps: the operations.
 *
 *     open        directory read; nothing is written
 *     first write that would make a stored bitmap wrong:
 *                 IN_USE in the directory, in place, of all enabled ones    one barrier
 *     ...         bits are set in memory
 *     close       what changed is stored (qcow2-bitmap-store.c), then IN_USE goes off
 *
 *     add         an empty table, then a new directory that lists it: valid from the beginning
 *     remove      a new directory without it, then its clusters are freed
 *
 * Invariants
 *  1. Invariant 7: a bitmap that is listed without IN_USE is, as stored, right.  So the autoclear
 *     bit may stay set all the time.
 *  2. Bitmaps that were IN_USE when the image was opened, and those that are broken, are never
 *     changed, nor are their clusters used; they can be removed.  A broken one that is enabled gets
 *     IN_USE with the others, because nobody keeps it.  A shrink may move the former, byte for byte
 *     (qcow2-bitmap-move.c).
 *  3. A bitmap's name is in the directory from add to remove, whatever happens in between.
 *
 * Lock: Qcow2Bitmaps.lock, taken before all other locks of the driver, held across I/O and flushes;
 * its holder is not announced.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-bitmap.h"

#include <inttypes.h>
#include <string.h>

static bool fail(GError **errp, int err, const char *text)
{
    qb_error_set(errp, err, "%s", text);
    return false;
}

/* ---------------------------------------------------------------- IN_USE */

static bool is_meant(const Qcow2Bitmap *q, BdrvBitmapsWhich which, const BdrvDirtyBitmap *one)
{
    if (atomic_load(&q->bm->in_use)) {
        return false;
    }
    switch (which) {
    case BDRV_BITMAPS_WRITTEN:
        return !atomic_load(&q->bm->disabled);
    case BDRV_BITMAPS_ONE:
        return q->bm == one;
    case BDRV_BITMAPS_ALL:
        break;
    }
    return true;
}

static void put_flags(const Qcow2Bitmap *q, uint32_t flags)
{
    uint8_t *dir = qcow2_state(q->bs)->bitmaps->dir;
    qb_stbe32(dir + q->pos + QCOW2_BITMAP_FLAGS, flags);
}

int qcow2_bitmaps_mark_in_use(BlockDriverState *bs, BdrvBitmapsWhich which, BdrvDirtyBitmap *one)
{
    Qcow2Bitmaps *b = qcow2_state(bs)->bitmaps;
    g_autoptr(GPtrArray) meant = g_ptr_array_new();
    QB_GUARD(&b->lock);
    for (guint i = 0; i < b->all->len; i++) {
        Qcow2Bitmap *q = g_ptr_array_index(b->all, i);
        if (is_meant(q, which, one)) {
            g_ptr_array_add(meant, q);
        }
    }
    int ret = meant->len ? qcow2_begin_change(bs, false) : 0;
    for (guint i = 0; i < meant->len && ret == 0; i++) {
        Qcow2Bitmap *q = g_ptr_array_index(meant, i);
        put_flags(q, qcow2_bitmap_flags(q) | QCOW2_BITMAP_IN_USE);
    }
    ret = meant->len && ret == 0 ? qcow2_bitmap_dir_write(bs, meant) : ret;
    for (guint i = 0; i < meant->len && ret == 0; i++) {
        Qcow2Bitmap *q = g_ptr_array_index(meant, i);
        atomic_store(&q->bm->in_use, true);
    }
    return ret;
}

/* ---------------------------------------------------------------- add */

static bool is_too_large(const BDRVQcow2State *s, uint64_t size, unsigned granularity_bits)
{
    return qcow2_bitmap_entries(s, size, granularity_bits) > QCOW2_MAX_BITMAP_BYTES >> s->cluster_bits;
}

bool qcow2_bitmaps_check_size(BlockDriverState *bs, uint64_t size, GError **errp)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    for (guint i = 0; i < s->bitmaps->all->len; i++) {
        const Qcow2Bitmap *q = g_ptr_array_index(s->bitmaps->all, i);
        if (!q->bm->inconsistent && is_too_large(s, size, q->bm->granularity_bits)) {
            qb_error_set(errp, EFBIG, "Bitmap '%s' would take too much space for a disk of that size",
                         q->name);
            qb_error_add_hint(errp, "Remove it first; another one may have a larger granularity");
            return false;
        }
    }
    return true;
}

static bool check_add(BDRVQcow2State *s, const BdrvDirtyParams *params, uint64_t entry_bytes,
                      GError **errp)
{
    const Qcow2Bitmaps *b = s->bitmaps;
    if (s->version < 3) {
        return fail(errp, ENOTSUP, "Cannot store dirty bitmaps in qcow2 v2 files");
    }
    if (!b->loaded) {
        fail(errp, EINVAL, "The bitmap directory of the image is broken");
        qb_error_add_hint(errp, "Use 'qemu-img bitmap --remove-all' to remove it");
        return false;
    }
    if (params->granularity_bits > QCOW2_MAX_GRANULARITY_BITS) {
        qb_error_set(errp, EINVAL, "Granularity exceeds maximum (%u bytes)",
                     1u << QCOW2_MAX_GRANULARITY_BITS);
        return false;
    }
    if (is_too_large(s, params->size, params->granularity_bits)) {
        return fail(errp, EINVAL,
                    "Too much space will be occupied by the bitmap. Use larger granularity");
    }
    if (b->all->len >= QCOW2_MAX_BITMAPS) {
        return fail(errp, EOVERFLOW, "Maximum number of persistent bitmaps is already reached");
    }
    if (atomic_load(&b->dir_bytes) + entry_bytes > QCOW2_MAX_BITMAP_DIRECTORY_BYTES) {
        return fail(errp, EOVERFLOW, "Not enough space in the bitmap directory");
    }
    return true;
}

/* A table whose bits are all clear. Nothing refers to it yet. */
static int64_t write_empty_table(BlockDriverState *bs, uint64_t entries)
{
    uint64_t bytes = qb_align_up(entries * 8, QCOW2_HDR_SECTOR);
    g_autofree uint8_t *zeroes = g_try_malloc0(bytes);
    int64_t offset = zeroes ? qcow2_alloc_clusters(bs, bytes) : -ENOMEM;
    if (offset < 0) {
        return offset;
    }
    int ret = qcow2_check_overlap(bs, 0, (uint64_t)offset, bytes);
    ret = ret < 0 ? ret : bdrv_pwrite(bs->file, offset, (int64_t)bytes, zeroes, 0);
    if (ret < 0) {
        qcow2_alloc_undo(bs, (uint64_t)offset, bytes);
    }
    return ret < 0 ? ret : offset;
}

static void encode_entry(uint8_t *entry, const BdrvDirtyParams *params, uint64_t table_offset,
                         uint64_t table_entries)
{
    qb_stbe64(entry + QCOW2_BITMAP_TABLE_OFFSET, table_offset);
    qb_stbe32(entry + QCOW2_BITMAP_TABLE_ENTRIES, (uint32_t)table_entries);
    qb_stbe32(entry + QCOW2_BITMAP_FLAGS, params->disabled ? 0 : QCOW2_BITMAP_AUTO);
    entry[QCOW2_BITMAP_TYPE] = QCOW2_BITMAP_TYPE_DIRTY;
    entry[QCOW2_BITMAP_GRANULARITY_BITS] = (uint8_t)params->granularity_bits;
    qb_stbe16(entry + QCOW2_BITMAP_NAME_LENGTH, (uint16_t)strlen(params->name));
    memcpy(entry + QCOW2_BITMAP_FIXED, params->name, strlen(params->name));
}

/* A longer copy of the directory; what is behind the old end is zero. */
static uint8_t *longer_directory(const Qcow2Bitmaps *b, uint64_t bytes)
{
    uint8_t *dir = g_try_malloc0(qb_align_up(bytes, QCOW2_HDR_SECTOR));
    if (dir && b->dir) {
        memcpy(dir, b->dir, atomic_load(&b->dir_bytes));
    }
    return dir;
}

static bool list_bitmap(BlockDriverState *bs, const BdrvDirtyParams *params, uint64_t entry_bytes,
                        uint64_t table, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    Qcow2Bitmaps *b = s->bitmaps;
    uint64_t pos = atomic_load(&b->dir_bytes);
    uint8_t *dir = longer_directory(b, pos + entry_bytes);
    if (!dir) {
        qb_error_set_errno(errp, ENOMEM, "Could not write the bitmap directory");
        return false;
    }
    encode_entry(dir + pos, params, table,
                 qcow2_bitmap_entries(s, params->size, params->granularity_bits));
    return qcow2_bitmap_dir_switch(bs, dir, pos + entry_bytes, b->all->len + 1, errp);
}

static void show_new(BlockDriverState *bs, const BdrvDirtyParams *params, uint64_t pos,
                     uint64_t entry_bytes)
{
    Qcow2Bitmap *q = g_new0(Qcow2Bitmap, 1);
    *q = (Qcow2Bitmap){.bs = bs, .pos = pos, .bytes = entry_bytes, .name = g_strdup(params->name)};
    BdrvDirtySource source = qcow2_bitmap_source(q);
    BdrvDirtyParams own = *params;
    own.source = &source;
    own.opaque = q;
    q->bm = bdrv_dirty_bitmap_new(bs, &own);
    g_ptr_array_add(qcow2_state(bs)->bitmaps->all, q);
}

static bool add_locked(BlockDriverState *bs, const BdrvDirtyParams *params, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    uint64_t pos = atomic_load(&s->bitmaps->dir_bytes);
    uint64_t entry_bytes = qb_align_up(QCOW2_BITMAP_FIXED + strlen(params->name), 8);
    if (!check_add(s, params, entry_bytes, errp)) {
        return false;
    }
    uint64_t entries = qcow2_bitmap_entries(s, params->size, params->granularity_bits);
    int ret = qcow2_begin_change(bs, false);
    int64_t table = ret < 0 ? ret : write_empty_table(bs, entries);
    if (table < 0) {
        qb_error_set_errno(errp, (int)table, "Could not write the bitmap table");
        return false;
    }
    if (!list_bitmap(bs, params, entry_bytes, (uint64_t)table, errp)) {
        qcow2_free_run(bs, (uint64_t)table, qb_align_up(entries * 8, s->cluster_size),
                       QCOW2_DISCARD_OTHER);
        return false;
    }
    show_new(bs, params, pos, entry_bytes);
    return true;
}

bool qcow2_bitmap_add(BlockDriverState *bs, const BdrvDirtyParams *params, GError **errp)
{
    QB_GUARD(&qcow2_state(bs)->bitmaps->lock);
    if (!add_locked(bs, params, errp)) {
        g_prefix_error(errp, "Can't make bitmap '%s' persistent in '%s': ", params->name,
                       bs->node_name);
        return false;
    }
    return true;
}

/* ---------------------------------------------------------------- remove */

/* Nothing names them any more. A table that cannot be right leaks with all it refers to. */
static void free_storage(Qcow2Bitmap *q, uint64_t table_offset, uint32_t entries)
{
    const BDRVQcow2State *s = qcow2_state(q->bs);
    for (uint32_t i = 0; i < q->table_entries; i++) {
        uint64_t offset = q->table[i] & QCOW2_BITMAP_ENTRY_OFFSET_MASK;
        if (offset) {
            qcow2_bitmap_free_clusters(q->bs, offset, s->cluster_size);
        }
    }
    qcow2_bitmap_free_clusters(q->bs, table_offset, (uint64_t)entries * 8);
}

/* The directory without entry @q. */
static uint8_t *shorter_directory(const Qcow2Bitmaps *b, const Qcow2Bitmap *q)
{
    uint64_t bytes = atomic_load(&b->dir_bytes), behind = q->pos + q->bytes;
    uint8_t *dir = g_try_malloc0(qb_align_up(bytes, QCOW2_HDR_SECTOR));
    if (dir) {
        memcpy(dir, b->dir, q->pos);
        memcpy(dir + q->pos, b->dir + behind, bytes - behind);
    }
    return dir;
}

static void forget(Qcow2Bitmaps *b, Qcow2Bitmap *q)
{
    for (guint i = 0; i < b->all->len; i++) {
        Qcow2Bitmap *other = g_ptr_array_index(b->all, i);
        other->pos -= other->pos > q->pos ? q->bytes : 0;
    }
    g_ptr_array_remove(b->all, q);
}

static bool remove_locked(BlockDriverState *bs, Qcow2Bitmap *q, GError **errp)
{
    Qcow2Bitmaps *b = qcow2_state(bs)->bitmaps;
    uint64_t table_offset = qcow2_bitmap_table_offset(q);
    uint32_t entries = qcow2_bitmap_table_entries(q);
    bool readable = !q->broken && qcow2_bitmap_read_table(q) == 0;
    int ret = qcow2_begin_change(bs, false);
    uint8_t *dir = ret == 0 ? shorter_directory(b, q) : NULL;
    if (!dir) {
        qb_error_set_errno(errp, ret < 0 ? ret : -ENOMEM, "Could not remove the bitmap");
        return false;
    }
    if (!qcow2_bitmap_dir_switch(bs, dir, atomic_load(&b->dir_bytes) - q->bytes, b->all->len - 1,
                                 errp)) {
        return false;
    }
    if (readable) {
        free_storage(q, table_offset, entries);
    }
    forget(b, q);
    return true;
}

bool qcow2_bitmap_remove(BlockDriverState *bs, BdrvDirtyBitmap *bm, GError **errp)
{
    QB_GUARD(&qcow2_state(bs)->bitmaps->lock);
    if (!remove_locked(bs, bm->opaque, errp)) {
        g_prefix_error(errp, "Failed to remove persistent bitmap '%s' from node '%s': ", bm->name,
                       bs->node_name);
        return false;
    }
    return true;
}

bool qcow2_bitmaps_present(BDRVQcow2State *s)
{
    QB_GUARD(&s->header_lock);
    return (s->header.autoclear & QCOW2_AUTOCLEAR_BITMAPS) &&
           qcow2_find_extension(s->extensions, QCOW2_EXT_BITMAPS);
}

/* An extension that does not count goes as well, so that no downgrade meets it again. */
static bool has_extension(BDRVQcow2State *s)
{
    QB_GUARD(&s->header_lock);
    return qcow2_find_extension(s->extensions, QCOW2_EXT_BITMAPS) != NULL;
}

bool qcow2_bitmaps_remove_all(BlockDriverState *bs, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    Qcow2Bitmaps *b = s->bitmaps;
    QB_GUARD(&b->lock);
    if (s->version < 3 || !has_extension(s)) {
        return true;
    }
    for (guint i = 0; i < b->all->len; i++) {
        Qcow2Bitmap *q = g_ptr_array_index(b->all, i);
        q->broken = q->broken || qcow2_bitmap_read_table(q) < 0;
    }
    int ret = qcow2_begin_change(bs, false);
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Could not remove the bitmaps");
        return false;
    }
    g_autofree uint8_t *old_dir = g_steal_pointer(&b->dir); /* entries are looked at once more */
    if (!qcow2_bitmap_dir_switch(bs, NULL, 0, 0, errp)) {
        b->dir = g_steal_pointer(&old_dir);
        return false;
    }
    b->dir = g_steal_pointer(&old_dir);
    for (guint i = 0; i < b->all->len; i++) {
        Qcow2Bitmap *q = g_ptr_array_index(b->all, i);
        if (!q->broken) {
            free_storage(q, qcow2_bitmap_table_offset(q), qcow2_bitmap_table_entries(q));
        }
    }
    qcow2_bitmaps_forget_all(b);
    g_clear_pointer(&b->dir, g_free);
    b->loaded = true;
    return true;
}
