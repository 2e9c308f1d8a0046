/*
 * Check: stored dirty bitmaps.
 *
 *   extension (24 bytes)  -->  directory        -->  table of each bitmap  -->  data clusters
 *     count, size, offset       entries back to       8 bytes per cluster
 *                               back, padded to 8
 *
 * They are looked at only while the autoclear bit says that they are in use; without it their
 * clusters are free, as far as the format goes.
 *
 * What a repair does with a bitmap that cannot be read is to let it say that all is dirty: a backup
 * then copies too much, never too little, and the bitmap keeps its name and goes on.
 *
 *   entry of a table that is not one, or whose cluster is another's     becomes "all ones"
 *   table that is not one, or lies where something else is              a new one, of all ones
 *   directory, or entry of it, that cannot be understood                stays a finding
 *
 * Invariants
 *   1. Directory, tables and data have one owner.  A table that lies where something else was
 *      counted before is reported by the comparison, and nothing is read through it: so no part of
 *      the file is read twice, whatever the directory claims.  The directory, of which there is one,
 *      is read in any case: if guest data lies there by mistake, it is that which moves.
 *   2. A repair changes a table by single entries in place, or the directory by one write of the
 *      place and length of a table whose content and counts are stable.
 *
 * Not done: judging what bitmaps say.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-check.h"

#include <inttypes.h>

enum {
    EXT_NB = 0,
    TABLE_CHUNK = 1 << 17, /* entries read at once */
    MAX_NEW_TABLES = 1024, /* by one repair; a directory may claim 65535 bitmaps in 2 MiB */
};
#define MAX_TABLE_BYTES (UINT64_C(8) << 20) /* 512 MiB of bitmap in clusters of 512 bytes */

/* An entry of the directory. */
typedef struct Bitmap {
    uint64_t pos;    /* in the file */
    uint64_t offset; /* of its table */
    uint32_t entries, flags;
    unsigned granularity_bits;
    char *name;      /* owned */
} Bitmap;

static void bad(Qcow2Check *c, const char *code, uint64_t offset, const char *what, uint64_t value)
{
    qcow2_check_report(c, BDRV_FINDING_CORRUPTION, false, code, offset,
                       "ERROR bitmaps: %s: %#" PRIx64, what, value);
}

/* Counts a region and says whether it is worth reading: nobody else had any of it. */
static bool claim(Qcow2Check *c, uint64_t offset, uint64_t bytes)
{
    return qcow2_check_count(c, offset, bytes, 1, QCOW2_REF_META) &&
           qcow2_check_exclusive(c, offset, bytes, QCOW2_REF_META);
}

static bool read_meta(Qcow2Check *c, uint64_t offset, size_t bytes, void *buf)
{
    size_t present = offset < c->file_bytes ? MIN(bytes, c->file_bytes - offset) : 0;
    memset((uint8_t *)buf + present, 0, bytes - present);
    int ret = present ? bdrv_pread(c->bs->file, (int64_t)offset, (int64_t)present, buf, 0) : 0;
    if (ret < 0) {
        c->incomplete = true;
        qcow2_check_report(c, BDRV_FINDING_CHECK_ERROR, false, "bitmap-read", offset,
                           "ERROR: Could not read bitmap metadata at offset 0x%" PRIx64 ": %s",
                           offset, g_strerror(-ret));
    }
    return ret == 0;
}

/* Not behind the back of a session that has the directory in memory. */
static bool may_repair(const Qcow2Check *c)
{
    return (c->fix & BDRV_FIX_ERRORS) && !qcow2_bitmaps_maintained(c->s);
}

/* Has somebody been counted in one of these clusters? */
static bool is_taken(const Qcow2Check *c, uint64_t offset, uint64_t bytes)
{
    uint64_t last = (offset + bytes - 1) >> c->s->cluster_bits;
    for (uint64_t i = offset >> c->s->cluster_bits; i <= last; i++) {
        if (qcow2_refmap_count(c->map, i)) {
            return true;
        }
    }
    return false;
}

/* ---------------------------------------------------------------- tables */

static void check_table_entry(Qcow2Check *c, uint64_t pos, uint64_t entry)
{
    uint64_t offset = entry & QCOW2_BITMAP_ENTRY_OFFSET_MASK, bytes = c->s->cluster_size;
    bool wrong = (entry & QCOW2_BITMAP_ENTRY_RESERVED_MASK) ||
                 (offset && (entry & QCOW2_BITMAP_ENTRY_ALL_ONES)) ||
                 qcow2_offset_into_cluster(c->s, offset) ||
                 !qcow2_check_is_inside(c, offset, bytes);
    bool taken = !wrong && offset && may_repair(c) && is_taken(c, offset, bytes);
    if (wrong || taken) {
        Qcow2EntryFix fix = {
            .pos = pos, .bytes = sizeof(entry), .owner = QCOW2_REF_META, .l1_index = UINT32_MAX,
            .was.entry = entry, .becomes.entry = QCOW2_BITMAP_ENTRY_ALL_ONES, .times = taken,
            .code = "bitmap-table-entry"};
        qcow2_check_fixable(c, fix, " bitmaps: invalid bitmap table entry: %#" PRIx64, entry);
    } else if (offset) {
        qcow2_check_count(c, offset, bytes, 1, QCOW2_REF_META);
    }
}

static void check_table_entries(Qcow2Check *c, const Bitmap *b)
{
    g_autofree uint64_t *buf = g_new(uint64_t, MIN(b->entries, TABLE_CHUNK) + 1);
    for (uint64_t i = 0; i < b->entries && !qcow2_check_cancelled(c); i += TABLE_CHUNK) {
        size_t n = MIN(TABLE_CHUNK, b->entries - i);
        uint64_t pos = b->offset + i * sizeof(uint64_t);
        if (!read_meta(c, pos, n * sizeof(uint64_t), buf)) {
            return;
        }
        for (size_t k = 0; k < n; k++) {
            if (buf[k]) {
                check_table_entry(c, pos + k * sizeof(uint64_t), be64toh(buf[k]));
            }
        }
    }
}

static uint64_t entries_needed(const Qcow2Check *c, const Bitmap *b)
{
    uint64_t size = c->s->header.size, granularity = UINT64_C(1) << b->granularity_bits;
    uint64_t bits = (size >> b->granularity_bits) + ((size & (granularity - 1)) != 0);
    return MAX(1, qcow2_size_to_clusters(c->s, bits / 8 + (bits % 8 != 0)));
}

/* The repair of a table that cannot be used; false when there is none. */
static bool plan_new_table(Qcow2Check *c, const Bitmap *b)
{
    uint64_t entries = entries_needed(c, b);
    Qcow2TableFix fix = {.pos = b->pos, .entries = (uint32_t)entries, .name = g_strdup(b->name)};
    if (!may_repair(c) || entries * sizeof(uint64_t) > MAX_TABLE_BYTES ||
        c->table_fixes->len >= MAX_NEW_TABLES) {
        g_free(fix.name);
        return false;
    }
    g_array_append_val(c->table_fixes, fix);
    return true;
}

static void check_table(Qcow2Check *c, const Bitmap *b)
{
    uint64_t bytes = (uint64_t)b->entries * sizeof(uint64_t);
    bool wrong = !b->offset || qcow2_offset_into_cluster(c->s, b->offset) || !b->entries ||
                 bytes > MAX_TABLE_BYTES || !qcow2_check_is_inside(c, b->offset, bytes) ||
                 (!(b->flags & QCOW2_BITMAP_IN_USE) && b->entries != entries_needed(c, b));
    if (wrong) {
        bad(c, "bitmap-table", b->offset, "invalid bitmap table offset or size", b->offset);
        if (!plan_new_table(c, b)) {
            qcow2_check_not_followed(c);
        }
    } else if (may_repair(c) && is_taken(c, b->offset, bytes)) {
        bad(c, "bitmap-table", b->offset, "bitmap table is not alone in its place", b->offset);
        if (!plan_new_table(c, b)) {
            claim(c, b->offset, bytes);
        }
    } else if (claim(c, b->offset, bytes)) {
        check_table_entries(c, b);
    } else {
        qcow2_check_not_followed(c);
    }
}

/* ---------------------------------------------------------------- directory */

static void clear_bitmap(Bitmap *b)
{
    g_free(b->name);
}

/* One entry at @dir; its length, or 0 when it cannot be right. */
static uint64_t parse_entry(const uint8_t *dir, uint64_t left, uint64_t pos, Bitmap *ret)
{
    if (left < QCOW2_BITMAP_FIXED) {
        return 0;
    }
    uint64_t extra = qb_ldbe32(dir + QCOW2_BITMAP_EXTRA_LENGTH);
    size_t name = qb_ldbe16(dir + QCOW2_BITMAP_NAME_LENGTH);
    uint64_t bytes = qb_align_up(QCOW2_BITMAP_FIXED + extra + name, 8);
    if (bytes > left) {
        return 0;
    }
    *ret = (Bitmap){
        .pos = pos,
        .offset = qb_ldbe64(dir + QCOW2_BITMAP_TABLE_OFFSET),
        .entries = qb_ldbe32(dir + QCOW2_BITMAP_TABLE_ENTRIES),
        .flags = qb_ldbe32(dir + QCOW2_BITMAP_FLAGS),
        .granularity_bits = dir[QCOW2_BITMAP_GRANULARITY_BITS],
        .name = g_strndup((const char *)dir + QCOW2_BITMAP_FIXED + extra, name),
    };
    return bytes;
}

/* Of those that make a bitmap unfit for any use. @dir: its fixed part. */
static bool is_understood(Qcow2Check *c, const Bitmap *b, const uint8_t *dir, GHashTable *names)
{
    size_t name = qb_ldbe16(dir + QCOW2_BITMAP_NAME_LENGTH);
    const char *what = NULL;
    if (dir[QCOW2_BITMAP_TYPE] != QCOW2_BITMAP_TYPE_DIRTY) {
        what = "bitmap of an unknown type";
    } else if (b->granularity_bits < QCOW2_MIN_GRANULARITY_BITS ||
               b->granularity_bits > QCOW2_MAX_GRANULARITY_BITS) {
        what = "bitmap of an impossible granularity";
    } else if (b->flags & ~(QCOW2_BITMAP_IN_USE | QCOW2_BITMAP_AUTO)) {
        what = "bitmap with unknown flags";
    } else if (!name || name > QCOW2_MAX_BITMAP_NAME) {
        what = "bitmap with an impossible name";
    } else if (!g_hash_table_add(names, g_strdup(b->name))) {
        what = "bitmap with the name of another";
    }
    if (what) {
        bad(c, "bitmap-directory-entry", b->pos, what, b->pos);
    }
    return !what;
}

/* What such a bitmap has stays its own. */
static void claim_table(Qcow2Check *c, const Bitmap *b)
{
    uint64_t bytes = (uint64_t)b->entries * sizeof(uint64_t);
    bool sane = b->offset && b->entries && bytes <= MAX_TABLE_BYTES &&
                !qcow2_offset_into_cluster(c->s, b->offset);
    if (sane && claim(c, b->offset, bytes)) {
        check_table_entries(c, b);
    } else {
        qcow2_check_not_followed(c);
    }
}

static void check_entries(Qcow2Check *c, const uint8_t *dir, uint64_t offset, uint64_t bytes,
                          uint32_t nb)
{
    g_autoptr(GHashTable) names = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, NULL);
    uint64_t pos = 0, n = 0;
    for (; pos < bytes; n++) {
        __attribute__((cleanup(clear_bitmap))) Bitmap b = {0};
        uint64_t len = parse_entry(dir + pos, bytes - pos, offset + pos, &b);
        if (!len) {
            bad(c, "bitmap-directory", offset, "bitmap directory entry is cut off", n);
            qcow2_check_not_followed(c);
            return;
        }
        if (is_understood(c, &b, dir + pos, names)) {
            check_table(c, &b);
        } else {
            claim_table(c, &b);
        }
        pos += len;
    }
    if (n != nb) {
        bad(c, "bitmap-directory", offset, "directory size does not match its entries", bytes);
    }
}

static void check_directory(Qcow2Check *c, uint64_t offset, uint64_t bytes, uint32_t nb)
{
    if (!bytes || bytes > QCOW2_MAX_BITMAP_DIRECTORY_BYTES ||
        qcow2_offset_into_cluster(c->s, offset)) {
        bad(c, "bitmap-directory", offset, "invalid bitmap directory size", bytes);
        qcow2_check_not_followed(c);
        return;
    }
    if (!qcow2_check_count(c, offset, bytes, 1, QCOW2_REF_META)) {
        qcow2_check_not_followed(c);
        return;
    }
    g_autofree uint8_t *dir = g_malloc(bytes);
    if (read_meta(c, offset, bytes, dir)) {
        check_entries(c, dir, offset, bytes, nb);
    }
}

void qcow2_check_bitmaps(Qcow2Check *c)
{
    const Qcow2Extension *ext = qcow2_find_extension(c->s->extensions, QCOW2_EXT_BITMAPS);
    if (!ext || c->s->version < 3 || !(c->s->header.autoclear & QCOW2_AUTOCLEAR_BITMAPS) ||
        ext->length != QCOW2_BITMAP_EXT_LENGTH) {
        return;
    }
    if (!qcow2_bitmaps_settled(c->s)) {
        qcow2_check_not_followed(c); /* tables in memory refer to more */
    }
    check_directory(c, qb_ldbe64(ext->data + QCOW2_BITMAP_EXT_DIR_OFFSET),
                    qb_ldbe64(ext->data + QCOW2_BITMAP_EXT_DIR_BYTES),
                    qb_ldbe32(ext->data + EXT_NB));
}

/* ---------------------------------------------------------------- repair */

static bool make_table(Qcow2Check *c, Qcow2TableFix *fix)
{
    uint64_t bytes = (uint64_t)fix->entries * sizeof(uint64_t);
    uint64_t clusters = qcow2_size_to_clusters(c->s, bytes);
    int64_t offset = qcow2_check_take_clusters(c, clusters, QCOW2_REF_META);
    if (offset < 0) {
        return false;
    }
    size_t words = (size_t)(clusters << c->s->cluster_bits) / sizeof(uint64_t);
    g_autofree uint64_t *be = g_new0(uint64_t, words);
    for (uint32_t i = 0; i < fix->entries; i++) {
        be[i] = htobe64(QCOW2_BITMAP_ENTRY_ALL_ONES);
    }
    fix->offset = (uint64_t)offset;
    return qcow2_check_write(c, fix->offset, words * sizeof(uint64_t), be) == 0;
}

void qcow2_check_make_bitmap_tables(Qcow2Check *c)
{
    for (guint i = 0; i < c->table_fixes->len && !c->incomplete; i++) {
        Qcow2TableFix *fix = &g_array_index(c->table_fixes, Qcow2TableFix, i);
        fix->ready = make_table(c, fix);
    }
}

static void link_table(Qcow2Check *c, const Qcow2TableFix *fix)
{
    enum { BYTES = QCOW2_BITMAP_TABLE_ENTRIES + sizeof(uint32_t) };
    uint8_t buf[BYTES];
    qb_stbe64(buf + QCOW2_BITMAP_TABLE_OFFSET, fix->offset);
    qb_stbe32(buf + QCOW2_BITMAP_TABLE_ENTRIES, fix->entries);
    if (!qcow2_check_exclusive(c, fix->pos, BYTES, QCOW2_REF_META) ||
        qcow2_check_write(c, fix->pos, BYTES, buf) < 0) {
        return;
    }
    qcow2_check_mark_fixed(c, BDRV_FINDING_CORRUPTION, 1);
    qcow2_check_report(c, BDRV_FINDING_INFO, true, "bitmap-table", fix->pos,
                       "Repairing bitmap '%s': its content is lost, it says now that all is dirty",
                       fix->name);
}

void qcow2_check_link_bitmap_tables(Qcow2Check *c)
{
    bool any = false;
    for (guint i = 0; i < c->table_fixes->len && !c->write_failed; i++) {
        const Qcow2TableFix *fix = &g_array_index(c->table_fixes, Qcow2TableFix, i);
        if (fix->ready) {
            link_table(c, fix);
            any = true;
        }
    }
    if (any && !c->write_failed) {
        qcow2_check_barrier(c);
    }
}
