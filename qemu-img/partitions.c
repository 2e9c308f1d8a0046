/*
 * Partition tables: MBR and GPT, read to tell what a shrink would cut.
 *
 *      LBA 0         1        2 ...                                          last
 *      [MBR]     [header] [entries]   partitions ...         [entries] [backup header]
 *        446: 4 entries of 16 bytes,  510: 55 aa
 *
 *      GPT header (little-endian)               GPT entry               MBR entry
 *         0 "EFI PART"     40 first usable        0 type, zero: unused     0 status: 00 or 80
 *        12 its length     72 LBA of entries     32 first LBA              4 type, zero: unused
 *        16 CRC32 of it    80 their number       40 last LBA, included     8 first sector
 *        24 own LBA        84 length of one                               12 sectors
 *        32 LBA of other   88 CRC32 of all
 *
 * The sector size is not written down anywhere: a GPT header says that it lies in LBA 1, so it is looked
 * for where that would be with sectors of 512 and of 4096 bytes.  Where the first header is damaged the
 * backup in the last sector stands in.  MBR counts in 512 bytes.
 *
 * Invariants
 *  1. A GPT counts only when both its checksums are right; so numbers in it are wrong on purpose or not
 *     at all, and all arithmetic on them is checked.
 *  2. No more than MAX_ENTRIES_BYTES are read, whatever a header claims.
 *  3. Partitions that begin beyond the disk are left out, ends are cut to the disk: nothing more can be
 *     lost there.
 *
 * Not done: logical partitions (they lie inside the extended one, which is listed), other kinds of
 * tables.  The boot sector of a file system has MBR's signature too; it is told apart by bytes that no
 * MBR has where the entries are.
 *
 * SPDX-License-Identifier: MIT
 */
#include "qemu-img/partitions.h"

#include <errno.h>
#include <string.h>
#include <zlib.h>
#include "util/checked.h"
#include "util/endian.h"

#define MBR_BYTES 512
#define MBR_ENTRIES 446
#define MBR_PROTECTIVE 0xee /* the disk has a GPT */
#define GPT_MIN_HEADER 92
#define GPT_MIN_ENTRY 128
#define MAX_ENTRIES_BYTES (UINT32_C(4) << 20)

typedef struct Disk {
    ImgReadFn read;
    void *opaque;
    uint64_t bytes;
} Disk;

typedef struct GptHeader {
    uint64_t other, entries; /* LBA */
    uint32_t number, entry_bytes, entries_crc;
} GptHeader;

/* Does [offset, +bytes) lie on the disk? */
static bool is_inside(const Disk *d, uint64_t offset, uint64_t bytes)
{
    return offset <= d->bytes && bytes <= d->bytes - offset;
}

/* What the table says of a partition; *end excluded. */
static void add_partition(const Disk *d, ImgPartitionTable *t, unsigned number, uint64_t start,
                          uint64_t end)
{
    ImgPartition p = {.number = number, .start = start, .end = MIN(end, d->bytes)};
    if (p.start < p.end) {
        g_array_append_val(t->partitions, p);
        t->last_end = MAX(t->last_end, p.end);
    }
}

/* ---- GPT ---- */

static uint32_t crc(const void *data, size_t bytes)
{
    return (uint32_t)crc32(0, data, (uInt)bytes);
}

/* The header in the sector @raw, which lies at @lba; false: it makes no sense. */
static bool decode_header(uint8_t *raw, unsigned sector, uint64_t lba, GptHeader *ret)
{
    uint32_t bytes = qb_ldle32(raw + 12), sum = qb_ldle32(raw + 16);
    if (memcmp(raw, "EFI PART", 8) || bytes < GPT_MIN_HEADER || bytes > sector ||
        qb_ldle64(raw + 24) != lba) {
        return false;
    }
    memset(raw + 16, 0, 4); /* the sum is made without itself */
    *ret = (GptHeader){
        .other = qb_ldle64(raw + 32),
        .entries = qb_ldle64(raw + 72),
        .number = qb_ldle32(raw + 80),
        .entry_bytes = qb_ldle32(raw + 84),
        .entries_crc = qb_ldle32(raw + 88),
    };
    return crc(raw, bytes) == sum && ret->entry_bytes >= GPT_MIN_ENTRY &&
           ret->entry_bytes % 8 == 0 &&
           ret->number <= MAX_ENTRIES_BYTES / ret->entry_bytes;
}

static void add_gpt_entry(const Disk *d, ImgPartitionTable *t, unsigned number, const uint8_t *raw)
{
    static const uint8_t unused[16];
    uint64_t first = qb_ldle64(raw + 32), last = qb_ldle64(raw + 40), start, end;
    bool sound = memcmp(raw, unused, sizeof(unused)) && first <= last &&
                 !qb_mul_overflow(first, (uint64_t)t->sector_size, &start) &&
                 !qb_add_overflow(last, UINT64_C(1), &last) &&
                 !qb_mul_overflow(last, (uint64_t)t->sector_size, &end);
    if (sound) {
        add_partition(d, t, number, start, end);
    }
}

/* 1: read; 0: they are not what the header says. */
static int read_entries(const Disk *d, const GptHeader *h, ImgPartitionTable *t)
{
    size_t bytes = (size_t)h->number * h->entry_bytes;
    uint64_t offset;
    if (qb_mul_overflow(h->entries, (uint64_t)t->sector_size, &offset) ||
        !is_inside(d, offset, bytes)) {
        return 0;
    }
    g_autofree uint8_t *raw = g_try_malloc(MAX(bytes, 1));
    int ret = !raw ? -ENOMEM : bytes ? d->read(d->opaque, offset, bytes, raw) : 0;
    if (ret < 0 || crc(raw, bytes) != h->entries_crc) {
        return MIN(ret, 0);
    }
    for (uint32_t i = 0; i < h->number; i++) {
        add_gpt_entry(d, t, i + 1, raw + (size_t)i * h->entry_bytes);
    }
    return 1;
}

/* Room for the partitions, and behind them the backup of the table. */
static void finish_gpt(const Disk *d, const GptHeader *h, uint64_t backup, ImgPartitionTable *t)
{
    uint64_t entries = qb_align_up((uint64_t)h->number * h->entry_bytes, t->sector_size), end;
    uint64_t partitions = qb_align_up(t->last_end, t->sector_size);
    t->type = "gpt";
    if (qb_add_overflow(partitions, entries + t->sector_size, &t->minimum_size)) {
        t->minimum_size = d->bytes;
    }
    bool sound = !qb_add_overflow(backup, UINT64_C(1), &end) &&
                 !qb_mul_overflow(end, (uint64_t)t->sector_size, &end);
    t->has_backup = sound && end <= d->bytes;
    t->backup_end = t->has_backup ? end : 0;
}

/* Tries the header at @lba. 1: this is the table. */
static int try_header(const Disk *d, unsigned sector, uint64_t lba, ImgPartitionTable *t)
{
    g_autofree uint8_t *raw = g_malloc(sector);
    GptHeader h;
    if (!is_inside(d, lba * sector, sector)) {
        return 0;
    }
    int ret = d->read(d->opaque, lba * sector, sector, raw);
    if (ret < 0 || !decode_header(raw, sector, lba, &h)) {
        return MIN(ret, 0);
    }
    t->sector_size = sector;
    ret = read_entries(d, &h, t);
    if (ret > 0) {
        finish_gpt(d, &h, lba == 1 ? h.other : lba, t);
    } else {
        t->sector_size = 0;
    }
    return ret;
}

static int read_gpt(const Disk *d, ImgPartitionTable *t)
{
    static const unsigned sectors[] = {512, 4096};
    int ret = 0;
    for (size_t i = 0; i < G_N_ELEMENTS(sectors) && ret == 0; i++) {
        uint64_t last = d->bytes / sectors[i];
        ret = try_header(d, sectors[i], 1, t);
        if (ret == 0 && last > 2) {
            ret = try_header(d, sectors[i], last - 1, t);
        }
    }
    return ret;
}

/* ---- MBR ---- */

static bool looks_like_mbr(const uint8_t *sector)
{
    bool good = sector[510] == 0x55 && sector[511] == 0xaa;
    for (unsigned i = 0; i < 4; i++) {
        good &= (sector[MBR_ENTRIES + 16 * i] & 0x7f) == 0;
    }
    return good;
}

static void read_mbr_entries(const Disk *d, const uint8_t *sector, ImgPartitionTable *t)
{
    for (unsigned i = 0; i < 4; i++) {
        const uint8_t *raw = sector + MBR_ENTRIES + 16 * i;
        uint64_t first = qb_ldle32(raw + 8), n = qb_ldle32(raw + 12);
        if (raw[4] && raw[4] != MBR_PROTECTIVE) {
            add_partition(d, t, i + 1, first * MBR_BYTES, (first + n) * MBR_BYTES);
        }
    }
}

static int read_mbr(const Disk *d, ImgPartitionTable *t)
{
    uint8_t sector[MBR_BYTES];
    if (!is_inside(d, 0, MBR_BYTES)) {
        return 0;
    }
    int ret = d->read(d->opaque, 0, MBR_BYTES, sector);
    if (ret < 0 || !looks_like_mbr(sector)) {
        return ret;
    }
    read_mbr_entries(d, sector, t);
    if (t->partitions->len) {
        t->type = "mbr";
        t->sector_size = MBR_BYTES;
        t->minimum_size = t->last_end;
    }
    return 0;
}

int img_partitions_read(ImgReadFn read, void *opaque, uint64_t disk_bytes, ImgPartitionTable *ret)
{
    Disk d = {.read = read, .opaque = opaque, .bytes = disk_bytes};
    *ret = (ImgPartitionTable){.partitions = g_array_new(false, false, sizeof(ImgPartition))};
    int err = read_gpt(&d, ret);
    return err == 0 ? read_mbr(&d, ret) : MIN(err, 0);
}

void img_partitions_clear(ImgPartitionTable *table)
{
    g_clear_pointer(&table->partitions, g_array_unref);
}
