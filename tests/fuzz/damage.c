/*
 * Images with some fields changed, put through all that can be done with an image.
 *
 *      input   | base | record | record | ...
 *      record  | area | operation | word: 2 bytes | value: 8 bytes |
 *
 * So blind changes of bytes are changes of fields: which one, and to what.  A value is a number as it
 * is, a bit, a distance in clusters, or the offset of another area, since pointers to something that
 * is there are worth more than pointers to nowhere.
 *
 *      damage | look (metadata only, read, map) | check | repair | check again | write, snapshot,
 *      shrink, empty
 *
 * Errors are fine anywhere.  Nothing that the image names is opened.
 *
 * SPDX-License-Identifier: MIT
 */
#include "tests/fuzz/damage.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "block/block-backend.h"
#include "block/locks.h"

#define RECORD 12
#define MAX_RECORDS 16
#define LOOK_AT (UINT64_C(256) << 10)

/* ---- damaging ---- */

static uint64_t load_word(const uint8_t *at, unsigned width, bool little)
{
    uint64_t word = 0;
    for (unsigned i = 0; i < width; i++) {
        word = word << 8 | at[little ? width - 1 - i : i];
    }
    return word;
}

static void store_word(uint8_t *at, unsigned width, bool little, uint64_t word)
{
    for (unsigned i = width; i-- > 0; word >>= 8) {
        at[little ? width - 1 - i : i] = (uint8_t)word;
    }
}

static uint64_t changed(const DamageBase *base, uint64_t old, uint8_t operation, uint64_t value)
{
    switch (operation % 6) {
    case 0:
        return value;
    case 1:
        return old ^ UINT64_C(1) << (value % 64);
    case 2:
        return old + value % 16 * base->cluster_size;
    case 3:
        return old - value % 16 * base->cluster_size;
    case 4:
        return (old & ~UINT64_C(0x00ffffffffffff00)) | base->area[value % base->areas].offset;
    default:
        return old + value % 1024;
    }
}

static void damage_word(const DamageBase *base, DiskImage *image, const uint8_t *record)
{
    const DamageArea *area = &base->area[record[0] % base->areas];
    unsigned index = (unsigned)load_word(record + 2, 2, false) % area->words;
    uint8_t *at = image->data + area->offset + (size_t)index * area->width;
    uint64_t old = load_word(at, area->width, base->little_endian);
    uint64_t value = load_word(record + 4, 8, false);
    store_word(at, area->width, base->little_endian, changed(base, old, record[1], value));
}

static void damage(const DamageBase *base, const uint8_t *data, size_t size)
{
    DiskImage image = {.data = g_memdup2(base->image.data, base->image.length),
                       .length = base->image.length};
    for (unsigned i = 0; i < MAX_RECORDS && size >= RECORD; i++) {
        if (data[0] == 0xff) { /* a file that ends early */
            image.length = MIN(image.length, load_word(data + 4, 8, false) % (image.length + 1));
            break;
        }
        damage_word(base, &image, data);
        data += RECORD;
        size -= RECORD;
    }
    disk_load(disk_number("top"), &image);
    disk_image_clear(&image);
}

/* ---- using ---- */

static BlockBackend *open_top(const DamageBase *base, int flags)
{
    json_t *options = json_pack("{ssssssss}", "driver", base->driver, "file.driver", "test-disk",
                                "file.disk", "top", "discard", "unmap");
    return blk_new_open(NULL, options, flags | BDRV_O_NO_BACKING | BDRV_O_NO_NAMES, NULL);
}

static void look_at_status(BlockDriverState *bs, int64_t end)
{
    BDRV_GRAPH_GUARD();
    for (int64_t at = 0, got; at < end; at += got) {
        BdrvStatus status;
        if (bdrv_block_status(bs, at, end - at, &status) < 0 || status.bytes == 0) {
            return;
        }
        got = status.bytes;
    }
}

static void look(const DamageBase *base)
{
    g_autoptr(BlockBackend) blk = open_top(base, 0);
    g_autofree uint8_t *buf = g_malloc(LOOK_AT);
    int64_t size = blk ? blk_getlength(blk) : 0;
    if (!blk || size <= 0) {
        return;
    }
    int64_t piece = MIN(size, (int64_t)LOOK_AT);
    blk_pread(blk, 0, piece, buf, 0);
    blk_pread(blk, size - piece, piece, buf, 0);
    look_at_status(blk_bs(blk), piece);
    GArray *list = bdrv_snapshot_list(blk_bs(blk), NULL);
    g_clear_pointer(&list, g_array_unref);
}

static void say_finding(const BdrvCheckFinding *finding, void *opaque)
{
    fprintf(stderr, "  %s: %s%s\n", finding->code, finding->fixed ? "(repaired) " : "", finding->text);
}

static bool check(const DamageBase *base, unsigned fix, bool say, BdrvCheckResult *ret)
{
    int flags = BDRV_O_CHECK | (fix ? BDRV_O_RDWR | BDRV_O_RESIZE : BDRV_O_NO_IO);
    g_autoptr(BlockBackend) blk = open_top(base, flags);
    const BdrvCheckOptions options = {.fix = fix, .finding = say ? say_finding : NULL};
    *ret = (BdrvCheckResult){0};
    return blk && bdrv_check(blk_bs(blk), &options, ret, NULL);
}

static void check_and_repair(const DamageBase *base)
{
    BdrvCheckResult before, repair, after;
    check(base, 0, false, &before);
    if (!check(base, BDRV_FIX_LEAKS | BDRV_FIX_ERRORS, getenv("SAY"), &repair) || repair.check_errors ||
        repair.corruptions) {
        return;
    }
    if (!check(base, 0, false, &after) || after.corruptions || after.check_errors) {
        fprintf(stderr, "repaired, but still %" G_GUINT64_FORMAT " corruptions\n",
                (guint64)after.corruptions);
        check(base, 0, true, &after);
        abort();
    }
}

static void change(const DamageBase *base)
{
    g_autoptr(BlockBackend) blk = open_top(base, BDRV_O_RDWR | BDRV_O_RESIZE);
    g_autofree uint8_t *buf = g_malloc0(LOOK_AT);
    int64_t size = blk ? blk_getlength(blk) : 0;
    if (!blk || size <= 0) {
        return;
    }
    int64_t piece = MIN(size, (int64_t)LOOK_AT / 2);
    blk_pwrite(blk, 0, MIN(piece, 70000), buf, 0);
    blk_pwrite_zeroes(blk, piece / 2, piece / 4, BDRV_REQ_MAY_UNMAP);
    blk_pdiscard(blk, piece / 4 * 3, piece / 8);
    blk_flush(blk);
    bdrv_snapshot_create(blk_bs(blk), "f", NULL);
    blk_pwrite(blk, size - MIN(size, 5000), MIN(size, 5000), buf, BDRV_REQ_FUA);
    blk_truncate(blk, size / 2 & ~INT64_C(511), true, PREALLOC_MODE_OFF, false, NULL);
    blk_make_empty(blk, false, NULL);
    blk_flush(blk);
}

void damage_run(const DamageBase *bases, unsigned n, const uint8_t *data, size_t size)
{
    if (size < 1) {
        return;
    }
    const DamageBase *base = &bases[data[0] % n];
    damage(base, data + 1, size - 1);
    look(base);
    check_and_repair(base);
    change(base);
    look(base);
}

/* ---- bases and seeds ---- */

void damage_add_area(DamageBase *base, uint64_t offset, uint64_t words, unsigned width)
{
    uint64_t fit = offset < base->image.length ? (base->image.length - offset) / width : 0;
    unsigned n = (unsigned)MIN(MIN(words, fit), 65535);
    if (n > 0 && base->areas < DAMAGE_AREAS) {
        base->area[base->areas++] = (DamageArea){offset, n, width};
    }
}

void damage_seeds(const DamageBase *bases, unsigned n, void (*add)(const void *data, size_t size))
{
    for (unsigned b = 0; b < n; b++) {
        for (unsigned a = 0; a < bases[b].areas; a++) {
            uint8_t seed[1 + RECORD] = {(uint8_t)b, (uint8_t)a, (uint8_t)(a + b), 0, (uint8_t)b};
            seed[RECORD] = (uint8_t)(a + 1);
            add(seed, sizeof(seed));
        }
    }
}
