/*
 * The partition tables of a disk (qemu-img/partitions.c), also of disks that lie.
 *
 * SPDX-License-Identifier: MIT
 */
#include <errno.h>
#include <string.h>
#include <zlib.h>
#include "qemu-img/partitions.h"
#include "util/endian.h"

#define DISK_BYTES (1 << 20)
#define ENTRIES 8
#define ENTRY_BYTES 128

typedef struct Disk {
    uint8_t bytes[DISK_BYTES];
    uint64_t read; /* bytes, in all */
    int error;     /* -errno of each read */
} Disk;

static Disk disk;

static int read_disk(void *opaque, uint64_t offset, size_t bytes, void *buf)
{
    Disk *d = opaque;
    g_assert_cmpuint(offset, <=, DISK_BYTES);
    g_assert_cmpuint(bytes, <=, DISK_BYTES - offset);
    memcpy(buf, d->bytes + offset, bytes);
    d->read += bytes;
    return d->error;
}

static void look(ImgPartitionTable *t)
{
    g_assert_cmpint(img_partitions_read(read_disk, &disk, DISK_BYTES, t), ==, 0);
}

static void set_mbr_entry(unsigned i, uint8_t type, uint32_t first, uint32_t n)
{
    uint8_t *raw = disk.bytes + 446 + 16 * i;
    raw[4] = type;
    qb_stle32(raw + 8, first);
    qb_stle32(raw + 12, n);
    disk.bytes[510] = 0x55;
    disk.bytes[511] = 0xaa;
}

static void set_gpt_entry(uint64_t table, unsigned i, uint64_t first, uint64_t last)
{
    uint8_t *raw = disk.bytes + table + i * ENTRY_BYTES;
    raw[0] = 1;
    qb_stle64(raw + 32, first);
    qb_stle64(raw + 40, last);
}

/* Makes the checksums of the header at @lba right. */
static void seal(unsigned sector, uint64_t lba)
{
    uint8_t *h = disk.bytes + lba * sector;
    uint64_t entries = qb_ldle64(h + 72) * sector;
    uint64_t bytes = (uint64_t)qb_ldle32(h + 80) * qb_ldle32(h + 84);
    if (entries < DISK_BYTES && bytes <= DISK_BYTES - entries) {
        qb_stle32(h + 88, (uint32_t)crc32(0, disk.bytes + entries, (uInt)bytes));
    }
    qb_stle32(h + 16, 0);
    qb_stle32(h + 16, (uint32_t)crc32(0, h, qb_ldle32(h + 12)));
}

static void set_header(unsigned sector, uint64_t lba, uint64_t other, uint64_t entries)
{
    uint8_t *h = disk.bytes + lba * sector;
    memcpy(h, "EFI PART", 8);
    qb_stle32(h + 12, 92);
    qb_stle64(h + 24, lba);
    qb_stle64(h + 32, other);
    qb_stle64(h + 72, entries);
    qb_stle32(h + 80, ENTRIES);
    qb_stle32(h + 84, ENTRY_BYTES);
    seal(sector, lba);
}

/* Partitions of sectors 10..19 and 40..59, tables at both ends. */
static void make_gpt(unsigned sector)
{
    uint64_t last = DISK_BYTES / sector - 1, table = last - 1024 / sector - 1;
    memset(&disk, 0, sizeof(disk));
    set_mbr_entry(0, 0xee, 1, UINT32_MAX);
    set_gpt_entry(2 * sector, 0, 10, 19);
    set_gpt_entry(2 * sector, 3, 40, 59);
    memcpy(disk.bytes + table * sector, disk.bytes + 2 * sector, ENTRIES * ENTRY_BYTES);
    set_header(sector, 1, last, 2);
    set_header(sector, last, 1, table);
}

static void check_gpt(unsigned sector)
{
    g_auto(ImgPartitionTable) t;
    look(&t);
    g_assert_cmpstr(t.type, ==, "gpt");
    g_assert_cmpuint(t.sector_size, ==, sector);
    g_assert_cmpuint(t.partitions->len, ==, 2);
    g_assert_cmpuint(g_array_index(t.partitions, ImgPartition, 1).number, ==, 4);
    g_assert_cmpuint(g_array_index(t.partitions, ImgPartition, 1).start, ==, 40 * sector);
    g_assert_cmpuint(t.last_end, ==, 60 * sector);
    g_assert_cmpuint(t.minimum_size, ==, 60 * sector + MAX(1024, sector) + sector);
    g_assert_true(t.has_backup);
    g_assert_cmpuint(t.backup_end, ==, DISK_BYTES);
}

static void test_gpt(gconstpointer opaque)
{
    unsigned sector = GPOINTER_TO_UINT(opaque);
    make_gpt(sector);
    check_gpt(sector);
    disk.bytes[sector + 40] ^= 1; /* the first header is damaged */
    check_gpt(sector);
    make_gpt(sector);
    disk.bytes[2 * sector + 32] ^= 1; /* its entries are */
    check_gpt(sector);
}

static void check_none(void)
{
    g_auto(ImgPartitionTable) t;
    disk.read = 0;
    look(&t);
    g_assert_null(t.type);
    g_assert_cmpuint(t.partitions->len, ==, 0);
    g_assert_cmpuint(disk.read, <, DISK_BYTES);
}

/* One header, of sectors of 512 bytes, with 8 bytes at @pos changed and right checksums. */
static void lie(unsigned pos, uint64_t value, bool wide)
{
    make_gpt(512);
    memset(disk.bytes + DISK_BYTES - 512, 0, 512);
    if (wide) {
        qb_stle64(disk.bytes + 512 + pos, value);
    } else {
        qb_stle32(disk.bytes + 512 + pos, (uint32_t)value);
    }
    seal(512, 1);
}

static void test_hostile_header(void)
{
    static const struct {
        unsigned pos;
        bool wide;
        uint64_t value;
    } lies[] = {
        {12, false, 91}, {12, false, 513}, {24, true, 2}, {72, true, UINT64_MAX},
        {72, true, UINT64_MAX / 512}, {72, true, 2048}, {80, false, UINT32_MAX},
        {80, false, 32769}, {84, false, 0}, {84, false, 127}, {84, false, 129},
        {84, false, UINT32_MAX},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(lies); i++) {
        lie(lies[i].pos, lies[i].value, lies[i].wide);
        check_none();
    }
}

/* Neither is believed where its checksum is wrong. */
static void test_checksums(void)
{
    static const unsigned damaged[] = {512 + 40, 512 + 16, 512 + 88, 1024 + 32};
    for (size_t i = 0; i < G_N_ELEMENTS(damaged); i++) {
        make_gpt(512);
        memset(disk.bytes + DISK_BYTES - 512, 0, 512);
        disk.bytes[damaged[i]] ^= 1;
        check_none();
    }
}

static void test_hostile_entries(void)
{
    static const uint64_t bad[][2] = {
        {20, 19}, {0, UINT64_MAX}, {10, UINT64_MAX / 512}, {UINT64_MAX, UINT64_MAX},
        {2048, 4096}, /* beyond the disk */
    };
    for (size_t i = 0; i < G_N_ELEMENTS(bad); i++) {
        g_auto(ImgPartitionTable) t;
        make_gpt(512);
        set_gpt_entry(1024, 3, bad[i][0], bad[i][1]);
        seal(512, 1);
        look(&t);
        g_assert_cmpstr(t.type, ==, "gpt");
        g_assert_cmpuint(t.partitions->len, ==, 1);
    }
    g_auto(ImgPartitionTable) t;
    make_gpt(512);
    set_gpt_entry(1024, 3, 40, UINT32_MAX); /* reaches beyond it */
    seal(512, 1);
    look(&t);
    g_assert_cmpuint(t.last_end, ==, DISK_BYTES);
}

static void test_backup_elsewhere(void)
{
    static const uint64_t places[] = {2048, UINT64_MAX, UINT64_MAX / 512};
    for (size_t i = 0; i < G_N_ELEMENTS(places); i++) {
        g_auto(ImgPartitionTable) t;
        lie(32, places[i], true);
        look(&t);
        g_assert_cmpstr(t.type, ==, "gpt");
        g_assert_false(t.has_backup);
    }
}

static void test_mbr(void)
{
    g_auto(ImgPartitionTable) t;
    memset(&disk, 0, sizeof(disk));
    set_mbr_entry(0, 0x83, 100, 100);
    set_mbr_entry(2, 0x05, 300, 400);
    set_mbr_entry(3, 0x83, UINT32_MAX, UINT32_MAX);
    look(&t);
    g_assert_cmpstr(t.type, ==, "mbr");
    g_assert_cmpuint(t.partitions->len, ==, 2);
    g_assert_cmpuint(t.last_end, ==, 700 * 512);
    g_assert_cmpuint(t.minimum_size, ==, 700 * 512);
    g_assert_false(t.has_backup);
}

static void test_no_table(void)
{
    memset(&disk, 0, sizeof(disk));
    check_none();
    set_mbr_entry(0, 0x83, 100, 100);
    disk.bytes[446] = 0x41; /* code of a boot sector */
    check_none();
    for (uint64_t bytes = 0; bytes < 9000; bytes += 500) {
        g_auto(ImgPartitionTable) t;
        make_gpt(512);
        g_assert_cmpint(img_partitions_read(read_disk, &disk, bytes, &t), ==, 0);
    }
}

static void test_read_error(void)
{
    g_auto(ImgPartitionTable) t;
    make_gpt(512);
    disk.error = -EIO;
    g_assert_cmpint(img_partitions_read(read_disk, &disk, DISK_BYTES, &t), ==, -EIO);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_data_func("/partitions/gpt-512", GUINT_TO_POINTER(512), test_gpt);
    g_test_add_data_func("/partitions/gpt-4096", GUINT_TO_POINTER(4096), test_gpt);
    g_test_add_func("/partitions/gpt-header-lies", test_hostile_header);
    g_test_add_func("/partitions/gpt-checksums", test_checksums);
    g_test_add_func("/partitions/gpt-entries-lie", test_hostile_entries);
    g_test_add_func("/partitions/gpt-backup-elsewhere", test_backup_elsewhere);
    g_test_add_func("/partitions/mbr", test_mbr);
    g_test_add_func("/partitions/none", test_no_table);
    g_test_add_func("/partitions/read-error", test_read_error);
    return g_test_run();
}
