/*
 * Check: stored dirty bitmaps, read only.
 *
 *   extension (24 bytes)  -->  directory        -->  table of each bitmap  -->  data clusters
 *     count, size, offset       entries back to       8 bytes per cluster
 *                               back, padded to 8
 *
 * They are looked at only while the autoclear bit says that they are in use; without it their
 * clusters are free, as far as the format goes.
 *
 * Invariants
 *   1. Directory, tables and data have one owner.  A table or a directory that lies where something
 *      else was counted before is reported by the comparison, and nothing is read through it: so no
 *      part of the file is read twice, whatever the directory claims.
 *   2. The image is not changed.
 *
 * Not done: judging the content of bitmaps, and names used twice; that is for those who load them.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-check.h"

#include <inttypes.h>

enum {
    DIR_TABLE_OFFSET = 0,
    DIR_TABLE_SIZE = 8,
    DIR_NAME_LENGTH = 18,
    DIR_EXTRA_LENGTH = 20,
    DIR_FIXED = 24,
    EXT_NB = 0,
    EXT_DIR_SIZE = 8,
    EXT_DIR_OFFSET = 16,
    EXT_LENGTH = 24,
    TABLE_CHUNK = 1 << 17, /* entries read at once */
};
#define MAX_DIRECTORY_BYTES UINT64_C(67107840)
#define MAX_TABLE_BYTES (UINT64_C(8) << 20) /* 512 MiB of bitmap in clusters of 512 bytes */
#define TABLE_OFFSET_MASK UINT64_C(0x00fffffffffffe00)
#define TABLE_RESERVED_MASK UINT64_C(0xff000000000001fe)
#define TABLE_ALL_ONES UINT64_C(1)

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

static void check_table_entry(Qcow2Check *c, uint64_t table, uint64_t entry)
{
    uint64_t offset = entry & TABLE_OFFSET_MASK;
    if ((entry & TABLE_RESERVED_MASK) || (offset && (entry & TABLE_ALL_ONES)) ||
        qcow2_offset_into_cluster(c->s, offset)) {
        bad(c, "bitmap-table-entry", table, "invalid bitmap table entry", entry);
        return;
    }
    if (offset) {
        qcow2_check_count(c, offset, c->s->cluster_size, 1, QCOW2_REF_META);
    }
}

static void check_table(Qcow2Check *c, uint64_t offset, uint64_t entries)
{
    uint64_t bytes = entries * sizeof(uint64_t);
    if (!offset || qcow2_offset_into_cluster(c->s, offset) || bytes > MAX_TABLE_BYTES) {
        bad(c, "bitmap-table", offset, "invalid bitmap table offset or size", offset);
        return;
    }
    if (!claim(c, offset, bytes)) {
        return;
    }
    g_autofree uint64_t *buf = g_new(uint64_t, MIN(entries, TABLE_CHUNK) + 1);
    for (uint64_t i = 0; i < entries && !qcow2_check_cancelled(c); i += TABLE_CHUNK) {
        size_t n = MIN(TABLE_CHUNK, entries - i);
        if (!read_meta(c, offset + i * sizeof(uint64_t), n * sizeof(uint64_t), buf)) {
            return;
        }
        for (size_t k = 0; k < n; k++) {
            if (buf[k]) {
                check_table_entry(c, offset, be64toh(buf[k]));
            }
        }
    }
}

/* One entry at @dir; its length, or 0 when it cannot be right. */
static uint64_t check_directory_entry(Qcow2Check *c, const uint8_t *dir, uint64_t left)
{
    if (left < DIR_FIXED) {
        return 0;
    }
    uint64_t bytes = qb_align_up(DIR_FIXED + (uint64_t)qb_ldbe32(dir + DIR_EXTRA_LENGTH) +
                                     qb_ldbe16(dir + DIR_NAME_LENGTH), 8);
    if (bytes > left) {
        return 0;
    }
    check_table(c, qb_ldbe64(dir + DIR_TABLE_OFFSET), qb_ldbe32(dir + DIR_TABLE_SIZE));
    return bytes;
}

static void check_directory(Qcow2Check *c, uint64_t offset, uint64_t bytes, uint32_t nb)
{
    if (!bytes || bytes > MAX_DIRECTORY_BYTES || qcow2_offset_into_cluster(c->s, offset)) {
        bad(c, "bitmap-directory", offset, "invalid bitmap directory size", bytes);
        return;
    }
    if (!claim(c, offset, bytes)) {
        return;
    }
    g_autofree uint8_t *dir = g_malloc(bytes);
    if (!read_meta(c, offset, bytes, dir)) {
        return;
    }
    uint64_t pos = 0;
    for (uint32_t i = 0; i < nb; i++) {
        uint64_t len = check_directory_entry(c, dir + pos, bytes - pos);
        if (!len) {
            bad(c, "bitmap-directory", offset, "bitmap directory entry is cut off", i);
            c->lost = true;
            return;
        }
        pos += len;
    }
    if (pos != bytes) {
        bad(c, "bitmap-directory", offset, "directory size does not match its entries", bytes);
    }
}

void qcow2_check_bitmaps(Qcow2Check *c)
{
    const Qcow2Extension *ext = qcow2_find_extension(c->s->extensions, QCOW2_EXT_BITMAPS);
    if (!ext || c->s->version < 3 || !(c->s->header.autoclear & QCOW2_AUTOCLEAR_BITMAPS) ||
        ext->length != EXT_LENGTH) {
        return;
    }
    check_directory(c, qb_ldbe64(ext->data + EXT_DIR_OFFSET), qb_ldbe64(ext->data + EXT_DIR_SIZE),
                    qb_ldbe32(ext->data + EXT_NB));
}
