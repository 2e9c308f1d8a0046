/*
 * The directory of bitmaps: the list of names, and where each bitmap's table is.
 *
 *   header extension --> directory [ entry | entry | entry ]       back to back, padded to 8
 *                                    |  flags: IN_USE, AUTO
 *                                    '--> table --> clusters of bits
 *
 * The bytes of the directory stay in memory as they are in the image; entries are looked at and
 * changed there.  What this driver does not understand goes from one directory to the next
 * verbatim.
 *
 * Two kinds of change:
 *   in place   flags and number of table entries, bytes 8..15 of an entry: entries begin at
 *              multiples of 8, so these lie in one sector, which changes atomically
 *   switch     everything else: a new directory in free clusters, then one write of the header
 *
 * Invariants
 *  1. The header names a directory whose content and counts are stable (invariants 0, 1).
 *  2. Nothing of an entry but bytes 8..15 changes in place.
 *  3. Memory is bounded: a directory lies in the file as a whole, and tables that share bytes with
 *     one another or with the directory are broken and not read.
 *
 * Not done: a directory that cannot be walked (cut off, wrong count) is not mended, only removed.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-bitmap.h"

#include <inttypes.h>
#include <string.h>

/* ---------------------------------------------------------------- entries */

static uint8_t *entry_of(const Qcow2Bitmap *q)
{
    return qcow2_state(q->bs)->bitmaps->dir + q->pos;
}

uint32_t qcow2_bitmap_flags(const Qcow2Bitmap *q)
{
    return qb_ldbe32(entry_of(q) + QCOW2_BITMAP_FLAGS);
}

uint64_t qcow2_bitmap_table_offset(const Qcow2Bitmap *q)
{
    return qb_ldbe64(entry_of(q) + QCOW2_BITMAP_TABLE_OFFSET);
}

uint32_t qcow2_bitmap_table_entries(const Qcow2Bitmap *q)
{
    return qb_ldbe32(entry_of(q) + QCOW2_BITMAP_TABLE_ENTRIES);
}

uint64_t qcow2_bitmap_entry_bytes(const uint8_t *entry, uint64_t left)
{
    if (left < QCOW2_BITMAP_FIXED) {
        return 0;
    }
    uint64_t bytes = qb_align_up(QCOW2_BITMAP_FIXED +
                                     (uint64_t)qb_ldbe32(entry + QCOW2_BITMAP_EXTRA_LENGTH) +
                                     qb_ldbe16(entry + QCOW2_BITMAP_NAME_LENGTH), 8);
    return bytes <= left ? bytes : 0;
}

static const char *name_at(const uint8_t *entry, uint16_t *ret_bytes)
{
    *ret_bytes = qb_ldbe16(entry + QCOW2_BITMAP_NAME_LENGTH);
    return (const char *)entry + QCOW2_BITMAP_FIXED + qb_ldbe32(entry + QCOW2_BITMAP_EXTRA_LENGTH);
}

uint64_t qcow2_bitmap_entries(const BDRVQcow2State *s, uint64_t size, unsigned granularity_bits)
{
    uint64_t bits = qb_div_round_up(size, UINT64_C(1) << granularity_bits);
    return MAX(qcow2_size_to_clusters(s, qb_div_round_up(bits, 8)), 1);
}

static const char *kind_problem(const uint8_t *entry)
{
    unsigned granularity_bits = entry[QCOW2_BITMAP_GRANULARITY_BITS];
    uint16_t name_bytes;
    const char *name = name_at(entry, &name_bytes);
    if (qb_ldbe32(entry + QCOW2_BITMAP_FLAGS) & ~(QCOW2_BITMAP_IN_USE | QCOW2_BITMAP_AUTO)) {
        return "unknown flags";
    }
    if (entry[QCOW2_BITMAP_TYPE] != QCOW2_BITMAP_TYPE_DIRTY) {
        return "unknown type";
    }
    if (qb_ldbe32(entry + QCOW2_BITMAP_EXTRA_LENGTH)) {
        return "unknown extra data";
    }
    if (granularity_bits < QCOW2_MIN_GRANULARITY_BITS ||
        granularity_bits > QCOW2_MAX_GRANULARITY_BITS) {
        return "granularity out of range";
    }
    if (!name_bytes || name_bytes > QCOW2_MAX_BITMAP_NAME || memchr(name, 0, name_bytes)) {
        return "bad name";
    }
    return NULL;
}

static const char *table_problem(const BDRVQcow2State *s, const uint8_t *entry, uint64_t file_bytes)
{
    uint64_t offset = qb_ldbe64(entry + QCOW2_BITMAP_TABLE_OFFSET);
    uint64_t entries = qb_ldbe32(entry + QCOW2_BITMAP_TABLE_ENTRIES);
    if (!offset || qcow2_offset_into_cluster(s, offset) || offset >= file_bytes) {
        return "bad place of the table";
    }
    if (!entries || entries << s->cluster_bits > QCOW2_MAX_BITMAP_BYTES ||
        entries * 8 > file_bytes - offset) {
        return "bad size of the table";
    }
    return NULL;
}

const char *qcow2_bitmap_entry_problem(const BDRVQcow2State *s, const uint8_t *entry,
                                       uint64_t disk_size, uint64_t file_bytes)
{
    const char *problem = kind_problem(entry);
    problem = problem ? problem : table_problem(s, entry, file_bytes);
    if (problem || (qb_ldbe32(entry + QCOW2_BITMAP_FLAGS) & QCOW2_BITMAP_IN_USE)) {
        return problem; /* one that was not stored may be of a disk of any size */
    }
    uint64_t wanted = qcow2_bitmap_entries(s, disk_size, entry[QCOW2_BITMAP_GRANULARITY_BITS]);
    return qb_ldbe32(entry + QCOW2_BITMAP_TABLE_ENTRIES) == wanted ? NULL : "made for another size";
}

/* ---------------------------------------------------------------- life */

void qcow2_bitmap_free(void *opaque)
{
    Qcow2Bitmap *q = opaque;
    bdrv_dirty_bitmap_free(q->bm);
    g_free(q->table);
    g_free(q->name);
    g_free(q);
}

/* From the last to the first, as the node forgets them fastest. */
void qcow2_bitmaps_forget_all(Qcow2Bitmaps *b)
{
    while (b->all->len) {
        g_ptr_array_set_size(b->all, (int)b->all->len - 1);
    }
}

Qcow2Bitmaps *qcow2_bitmaps_new(void)
{
    Qcow2Bitmaps *b = g_new0(Qcow2Bitmaps, 1);
    qb_mutex_init(&b->lock);
    qb_mutex_init(&b->tables_lock);
    b->all = g_ptr_array_new_with_free_func(qcow2_bitmap_free);
    return b;
}

void qcow2_bitmaps_free(Qcow2Bitmaps *b)
{
    if (b) {
        assert(!b->tables);
        qcow2_bitmaps_forget_all(b);
        g_ptr_array_unref(b->all);
        g_free(b->dir);
        qb_mutex_destroy(&b->tables_lock);
        qb_mutex_destroy(&b->lock);
        g_free(b);
    }
}

/* ---------------------------------------------------------------- loading */

/* A directory while it is being read. */
typedef struct Loading {
    BlockDriverState *bs;
    BDRVQcow2State *s;
    uint64_t offset, bytes, file_bytes;
    uint32_t nb;
} Loading;

static bool bad_directory(GError **errp, const char *why)
{
    qb_error_set(errp, EINVAL, "%s", why);
    return false;
}

static bool read_directory(const Loading *l, GError **errp)
{
    uint64_t sectors = qb_align_up(l->bytes, QCOW2_HDR_SECTOR);
    if (qcow2_overlaps_metadata(l->bs, l->offset, l->bytes)) {
        return bad_directory(errp, "the bitmap directory lies on other metadata");
    }
    if (!l->bytes || l->offset >= l->file_bytes || l->bytes > l->file_bytes - l->offset) {
        return bad_directory(errp, "the bitmap directory lies beyond the end of the file");
    }
    l->s->bitmaps->dir = g_try_malloc0(sectors);
    uint64_t present = MIN(sectors, l->file_bytes - l->offset);
    int ret = l->s->bitmaps->dir ? bdrv_pread(l->bs->file, (int64_t)l->offset, (int64_t)present,
                                              l->s->bitmaps->dir, 0)
                                 : -ENOMEM;
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Could not read the bitmap directory");
    }
    return ret == 0;
}

/* Later bitmaps of a name that is taken are broken: nobody could say which one is meant. */
static void add_entry(const Loading *l, uint64_t pos, uint64_t bytes, GHashTable *names)
{
    const uint8_t *entry = l->s->bitmaps->dir + pos;
    uint16_t name_bytes;
    const char *name = name_at(entry, &name_bytes);
    Qcow2Bitmap *q = g_new0(Qcow2Bitmap, 1);
    q->bs = l->bs;
    q->pos = pos;
    q->bytes = bytes;
    q->name = g_strndup(name, name_bytes);
    q->broken = qcow2_bitmap_entry_problem(l->s, entry, l->s->header.size, l->file_bytes) ||
                !g_hash_table_add(names, q->name) ||
                qcow2_overlaps_metadata(l->bs, qcow2_bitmap_table_offset(q),
                                        (uint64_t)qcow2_bitmap_table_entries(q) * 8);
    g_ptr_array_add(l->s->bitmaps->all, q);
}

static bool parse_directory(const Loading *l, GError **errp)
{
    g_autoptr(GHashTable) names = g_hash_table_new(g_str_hash, g_str_equal);
    uint64_t pos = 0;
    for (uint32_t i = 0; i < l->nb; i++) {
        uint64_t bytes = qcow2_bitmap_entry_bytes(l->s->bitmaps->dir + pos, l->bytes - pos);
        if (!bytes) {
            return bad_directory(errp, "a bitmap directory entry is cut off");
        }
        add_entry(l, pos, bytes, names);
        pos += bytes;
    }
    return pos == l->bytes ||
           bad_directory(errp, "the size of the bitmap directory does not match its entries");
}

typedef struct TablePlace {
    uint64_t start, end;
    Qcow2Bitmap *q; /* NULL: the directory */
} TablePlace;

static int by_start(const void *a, const void *b)
{
    const TablePlace *x = a, *y = b;
    return x->start < y->start ? -1 : x->start > y->start;
}

static void mark_shared(TablePlace *a, TablePlace *b)
{
    TablePlace *both[] = {a, b};
    for (int i = 0; i < 2; i++) {
        if (both[i]->q) {
            both[i]->q->broken = true;
        }
    }
}

/* Invariant 3. */
static void find_shared_tables(const Loading *l)
{
    g_autoptr(GArray) places = g_array_new(false, false, sizeof(TablePlace));
    TablePlace dir = {l->offset, l->offset + l->bytes, NULL};
    g_array_append_val(places, dir);
    for (guint i = 0; i < l->s->bitmaps->all->len; i++) {
        Qcow2Bitmap *q = g_ptr_array_index(l->s->bitmaps->all, i);
        if (!q->broken) {
            uint64_t start = qcow2_bitmap_table_offset(q);
            TablePlace p = {start, start + (uint64_t)qcow2_bitmap_table_entries(q) * 8, q};
            g_array_append_val(places, p);
        }
    }
    g_array_sort(places, by_start);
    for (guint i = 1, widest = 0; i < places->len; i++) {
        TablePlace *p = &g_array_index(places, TablePlace, i);
        TablePlace *before = &g_array_index(places, TablePlace, widest);
        if (p->start < before->end) {
            mark_shared(before, p);
        }
        widest = p->end > before->end ? i : widest;
    }
}

/* The node's bitmap for an entry. */
static void show_bitmap(Qcow2Bitmap *q)
{
    uint32_t flags = qcow2_bitmap_flags(q);
    BdrvDirtySource source = qcow2_bitmap_source(q);
    bool in_use = flags & QCOW2_BITMAP_IN_USE;
    q->bm = bdrv_dirty_bitmap_new(q->bs, &(BdrvDirtyParams){
        .name = q->name,
        .size = qcow2_state(q->bs)->header.size,
        .granularity_bits = entry_of(q)[QCOW2_BITMAP_GRANULARITY_BITS],
        .persistent = true,
        .disabled = !(flags & QCOW2_BITMAP_AUTO),
        .inconsistent = q->broken || in_use,
        .in_use = in_use,
        .source = &source,
        .opaque = q,
    });
}

static bool load_directory(Loading *l, GError **errp)
{
    Qcow2Bitmaps *b = l->s->bitmaps;
    if (!read_directory(l, errp) || !parse_directory(l, errp)) {
        qcow2_bitmaps_forget_all(b);
        g_clear_pointer(&b->dir, g_free);
        return false;
    }
    find_shared_tables(l);
    for (guint i = 0; i < b->all->len; i++) {
        show_bitmap(g_ptr_array_index(b->all, i));
    }
    return true;
}

bool qcow2_bitmaps_load(BlockDriverState *bs, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    const Qcow2Extension *ext = qcow2_find_extension(s->extensions, QCOW2_EXT_BITMAPS);
    Qcow2Bitmaps *b = s->bitmaps;
    b->loaded = true;
    if (!ext || s->version < 3 || !(s->header.autoclear & QCOW2_AUTOCLEAR_BITMAPS)) {
        return true;
    }
    int64_t file_bytes = bdrv_getlength(bs->file->bs);
    if (file_bytes < 0) {
        qb_error_set_errno(errp, (int)file_bytes, "Could not get the length of the image file");
        return false;
    }
    Loading l = {
        .bs = bs,
        .s = s,
        .file_bytes = (uint64_t)file_bytes,
        .nb = qb_ldbe32(ext->data),
        .bytes = qb_ldbe64(ext->data + QCOW2_BITMAP_EXT_DIR_BYTES),
        .offset = qb_ldbe64(ext->data + QCOW2_BITMAP_EXT_DIR_OFFSET),
    };
    atomic_store(&b->dir_offset, l.offset);
    atomic_store(&b->dir_bytes, l.bytes);
    g_autoptr(GError) err = NULL;
    b->loaded = load_directory(&l, &err);
    if (!b->loaded && !bdrv_is_read_only(bs) && qb_error_to_errno(err) != -EINVAL) {
        g_propagate_error(errp, g_steal_pointer(&err)); /* a better time may come: nothing is lost */
        return false;
    }
    if (!b->loaded) {
        bdrv_warn("The bitmaps of '%s' are lost: %s", bs->filename, err->message);
    }
    return true;
}

bool qcow2_bitmaps_maintained(BDRVQcow2State *s)
{
    return s->bitmaps->loaded && atomic_load(&s->bitmaps->dir_offset);
}

bool qcow2_bitmap_facts(BDRVQcow2State *s, guint i, Qcow2BitmapFacts *ret)
{
    QB_GUARD(&s->bitmaps->lock);
    if (i >= s->bitmaps->all->len) {
        return false;
    }
    const Qcow2Bitmap *q = g_ptr_array_index(s->bitmaps->all, i);
    *ret = (Qcow2BitmapFacts){
        .name = q->name,
        .name_bytes = qb_ldbe16(entry_of(q) + QCOW2_BITMAP_NAME_LENGTH),
        .granularity_bits = entry_of(q)[QCOW2_BITMAP_GRANULARITY_BITS],
        .flags = qcow2_bitmap_flags(q),
        .broken = q->broken,
    };
    return true;
}

/* ---------------------------------------------------------------- in place */

/* Sectors [first, end) of the directory. */
static int write_sectors(BlockDriverState *bs, uint64_t first, uint64_t end)
{
    Qcow2Bitmaps *b = qcow2_state(bs)->bitmaps;
    uint64_t start = first * QCOW2_HDR_SECTOR, bytes = (end - first) * QCOW2_HDR_SECTOR;
    uint64_t offset = atomic_load(&b->dir_offset) + start;
    int ret = qcow2_check_overlap(bs, QCOW2_OL_BITMAP_DIRECTORY, offset, bytes);
    if (ret == 0) {
        ret = bdrv_pwrite(bs->file, (int64_t)offset, (int64_t)bytes, b->dir + start, 0);
    }
    return ret;
}

int qcow2_bitmap_dir_write(BlockDriverState *bs, const GPtrArray *bitmaps)
{
    uint64_t first = 0, end = 0; /* sectors that wait to be written; in the directory's order */
    int ret = 0;
    for (guint i = 0; i < bitmaps->len && ret == 0; i++) {
        const Qcow2Bitmap *q = g_ptr_array_index(bitmaps, i);
        uint64_t sector = (q->pos + QCOW2_BITMAP_TABLE_ENTRIES) / QCOW2_HDR_SECTOR;
        if (sector > end && first < end) {
            ret = write_sectors(bs, first, end);
        }
        first = sector > end || first == end ? sector : first;
        end = sector + 1;
    }
    if (ret == 0 && first < end) {
        ret = write_sectors(bs, first, end);
    }
    return ret < 0 ? ret : bdrv_flush(bs->file->bs);
}

/* ---------------------------------------------------------------- switch */

/* To clusters at @place; 0: anywhere. */
static int write_new(BlockDriverState *bs, const uint8_t *dir, uint64_t bytes, uint64_t place,
                     uint64_t *ret_offset)
{
    int64_t offset = place ? (int64_t)place : qcow2_alloc_clusters(bs, bytes);
    if (offset < 0) {
        return (int)offset;
    }
    int ret = qcow2_check_overlap(bs, 0, (uint64_t)offset, bytes);
    ret = ret < 0 ? ret
                  : bdrv_pwrite(bs->file, offset, (int64_t)qb_align_up(bytes, QCOW2_HDR_SECTOR),
                                dir, 0);
    if (ret < 0) {
        qcow2_alloc_undo(bs, (uint64_t)offset, bytes);
        return ret;
    }
    *ret_offset = (uint64_t)offset;
    return 0;
}

typedef struct NewDirectory {
    uint32_t nb;
    uint64_t bytes, offset;
} NewDirectory;

/* The extension and the bit that makes it count come and go together. */
static void edit_header(Qcow2Header *h, GArray *extensions, void *opaque)
{
    const NewDirectory *d = opaque;
    uint8_t ext[QCOW2_BITMAP_EXT_LENGTH] = {0};
    qb_stbe32(ext, d->nb);
    qb_stbe64(ext + QCOW2_BITMAP_EXT_DIR_BYTES, d->bytes);
    qb_stbe64(ext + QCOW2_BITMAP_EXT_DIR_OFFSET, d->offset);
    qcow2_extensions_set(extensions, QCOW2_EXT_BITMAPS, d->nb ? ext : NULL, sizeof(ext));
    h->autoclear = (h->autoclear & ~QCOW2_AUTOCLEAR_BITMAPS) |
                   (d->nb ? QCOW2_AUTOCLEAR_BITMAPS : 0);
}

/* The flush makes the directory, and all it refers to, stable with its counts. */
static bool name_directory(BlockDriverState *bs, NewDirectory *d, GError **errp)
{
    const Qcow2HeaderChange what = {.edit = edit_header, .opaque = d};
    int ret = qcow2_flush(bs);
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Could not write the bitmap directory");
        return false;
    }
    return qcow2_header_change(bs, &what, errp);
}

bool qcow2_bitmap_dir_switch(BlockDriverState *bs, uint8_t *dir, uint64_t bytes, uint32_t nb,
                             GError **errp)
{
    return qcow2_bitmap_dir_switch_at(bs, dir, bytes, nb, 0, errp);
}

bool qcow2_bitmap_dir_switch_at(BlockDriverState *bs, uint8_t *dir, uint64_t bytes, uint32_t nb,
                                uint64_t place, GError **errp)
{
    g_autofree uint8_t *owned = dir;
    Qcow2Bitmaps *b = qcow2_state(bs)->bitmaps;
    uint64_t old = atomic_load(&b->dir_offset), old_bytes = atomic_load(&b->dir_bytes);
    NewDirectory d = {.nb = nb, .bytes = nb ? bytes : 0};
    bool sane = b->loaded; /* one that is not may lie anywhere */
    int ret = nb ? write_new(bs, dir, bytes, place, &d.offset) : 0;
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Could not write the bitmap directory");
        return false;
    }
    if (!name_directory(bs, &d, errp)) {
        if (nb) { /* the header may name it: free only after the next flush */
            qcow2_free_run(bs, d.offset, qb_align_up(bytes, qcow2_state(bs)->cluster_size),
                           QCOW2_DISCARD_OTHER);
        }
        return false;
    }
    g_free(b->dir);
    b->dir = g_steal_pointer(&owned);
    atomic_store(&b->dir_offset, d.offset);
    atomic_store(&b->dir_bytes, d.bytes);
    atomic_fetch_and(&qcow2_state(bs)->autoclear_pending, ~QCOW2_AUTOCLEAR_BITMAPS);
    if (old && sane) {
        qcow2_bitmap_free_clusters(bs, old, old_bytes);
    }
    return true;
}
