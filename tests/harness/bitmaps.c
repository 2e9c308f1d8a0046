/*
 * What a stored dirty bitmap may say: the oracle of bits (invariant 7).
 *
 *      sector        0    1    2    3
 *      at the start  1    0    4    1       clean: {1} {0} {4} {1}
 *      now           1    7    4    0
 *      must be dirty      *         *       now is not among clean
 *
 *      disable   what must be dirty stays so (clean: none); for the rest anything goes (clean: all)
 *      merge     what must be dirty in the source must be so in the target
 *
 * Invariant: while something changes, a bit is demanded only if both states demand it.
 *
 * SPDX-License-Identifier: MIT
 */
#include "tests/harness/bitmaps.h"

#include <string.h>

#include "block/dirty-bitmap.h"

#define ANYTHING UINT64_MAX

const char *bitmap_name(BitmapId id)
{
    static const char *const names[BITMAPS] = {"b0", "b1", "b2", "b3"};
    return names[id];
}

BitmapOracle *bitmaps_new(void)
{
    return g_new0(BitmapOracle, BITMAPS);
}

BitmapOracle *bitmaps_dup(const BitmapOracle *all)
{
    return all ? g_memdup2(all, BITMAPS * sizeof(*all)) : NULL;
}

/* ---------------------------------------------------------------- changes */

/* What the sector may have now: after a request that failed nobody knows. */
static uint64_t values_now(const Oracle *disk, unsigned sector)
{
    return disk->doubt[sector] ? disk->allowed[sector] : UINT64_C(1) << disk->now[sector];
}

static bool is_demanded(const BitmapOracle *b, const Oracle *disk, unsigned sector)
{
    return !(b->clean[sector] & values_now(disk, sector));
}

/* With which values the sector may be clear afterwards. */
static uint64_t clean_after(const BitmapOracle *b, BitmapChange change, const BitmapOracle *from,
                            const Oracle *disk, unsigned sector)
{
    uint64_t now = values_now(disk, sector);
    switch (change) {
    case BITMAP_CLEAR:
        return b->disabled ? ANYTHING : now;
    case BITMAP_ENABLE:
        return is_demanded(b, disk, sector) ? 0 : now;
    case BITMAP_DISABLE:
        return is_demanded(b, disk, sector) ? 0 : ANYTHING;
    case BITMAP_MERGE:
        return is_demanded(from, disk, sector) ? 0 : b->clean[sector];
    default:
        return now;
    }
}

static void begin_presence(BitmapOracle *b, BitmapChange change)
{
    if (change == BITMAP_ADD) {
        b->presence = MAX(b->presence, VIEW_MAYBE);
    } else if (change == BITMAP_REMOVE) {
        b->presence = MIN(b->presence, VIEW_MAYBE);
    }
    b->vanishes = change == BITMAP_REMOVE;
}

void bitmaps_begin(BitmapOracle *all, BitmapChange change, BitmapId id, BitmapId from,
                   const Oracle *disk)
{
    BitmapOracle *b = &all[id];
    bool fresh = b->presence == VIEW_ABSENT;
    begin_presence(b, change);
    for (unsigned i = 0; i < ORACLE_MAX; i++) {
        b->clean[i] |= b->changing ? b->next[i] : 0;
        b->next[i] = clean_after(b, change, &all[from], disk, i);
        b->clean[i] = fresh ? b->next[i] : b->clean[i];
    }
    b->changing = true;
    b->disabled = change == BITMAP_DISABLE || (b->disabled && change != BITMAP_ENABLE &&
                                               change != BITMAP_ADD);
}

void bitmaps_end(BitmapOracle *all, BitmapId id, bool ok)
{
    BitmapOracle *b = &all[id];
    if (!ok) {
        return;
    }
    if (b->presence == VIEW_MAYBE) {
        b->presence = b->vanishes ? VIEW_ABSENT : VIEW_PRESENT;
    }
    memcpy(b->clean, b->next, sizeof(b->clean));
    b->changing = false;
}

void bitmaps_resize(BitmapOracle *all, unsigned from, unsigned to)
{
    for (BitmapId id = 0; id < BITMAPS; id++) {
        for (unsigned i = from; i < to; i++) {
            all[id].clean[i] |= 1; /* what comes reads zero, and was never written */
            all[id].next[i] |= 1;
        }
    }
}

/* ---------------------------------------------------------------- looking */

/* 1: listed, 2: and consistent. */
static int look_up(BlockBackend *blk, BitmapId id)
{
    g_autoptr(GArray) list = bdrv_bitmap_list(blk_bs(blk));
    for (guint i = 0; i < list->len; i++) {
        const BdrvBitmapInfo *info = &g_array_index(list, BdrvBitmapInfo, i);
        if (!strcmp(info->name, bitmap_name(id))) {
            return info->inconsistent ? 1 : 2;
        }
    }
    return 0;
}

bool bitmap_is_listed(BlockBackend *blk, BitmapId id)
{
    return look_up(blk, id) > 0;
}

bool bitmap_is_usable(BlockBackend *blk, BitmapId id)
{
    return look_up(blk, id) == 2;
}

/* True for each sector that is dirty; newly allocated, or NULL. */
static bool *read_bits(BlockBackend *blk, BitmapId id, unsigned sectors)
{
    g_autofree bool *bits = g_new0(bool, sectors + 1);
    int64_t at = 0, start, bytes;
    int ret;
    while ((ret = bdrv_bitmap_next_dirty(blk_bs(blk), bitmap_name(id), at, &start, &bytes)) == 1) {
        at = start + bytes;
        for (int64_t i = start / ORACLE_SECTOR; i * ORACLE_SECTOR < at && i < sectors; i++) {
            bits[i] = true;
        }
    }
    return ret == 0 ? g_steal_pointer(&bits) : NULL;
}

static bool check_bits(const BitmapOracle *b, const bool *bits, const uint8_t *disk,
                       unsigned sectors, char **ret_why)
{
    for (unsigned i = 0; i < sectors; i++) {
        int value = oracle_value(disk + (size_t)i * ORACLE_SECTOR, i);
        uint64_t clean = b->clean[i] | (b->changing ? b->next[i] : 0);
        if (!bits[i] && (value < 0 || !(clean >> value & 1))) {
            *ret_why = g_strdup_printf("sector %u has value %d and is not dirty; it may be so for "
                                       "%#" G_GINT64_MODIFIER "x", i, value, clean);
            return false;
        }
    }
    return true;
}

static bool check_one(const BitmapOracle *all, BitmapId id, BlockBackend *blk,
                      const uint8_t *disk, bool whole, char **ret_why)
{
    const BitmapOracle *b = &all[id];
    bool listed = bitmap_is_listed(blk, id);
    if (b->presence != VIEW_MAYBE && listed != (b->presence == VIEW_PRESENT)) {
        *ret_why = g_strdup(listed ? "it is listed" : "it is not listed");
        return false;
    }
    if (!listed || !bitmap_is_usable(blk, id)) {
        bool right = !listed || !whole || id == BITMAP_BROKEN;
        *ret_why = right ? NULL : g_strdup("it is in use");
        return right;
    }
    unsigned sectors = (unsigned)(blk_getlength(blk) / ORACLE_SECTOR);
    g_autofree bool *bits = read_bits(blk, id, sectors);
    if (!bits) {
        *ret_why = g_strdup("it cannot be read");
        return false;
    }
    return check_bits(b, bits, disk, sectors, ret_why);
}

bool bitmaps_check(const BitmapOracle *all, BlockBackend *blk, bool whole, char **ret_why)
{
    int64_t length = blk_getlength(blk);
    g_autofree uint8_t *disk = g_malloc((size_t)length + 1);
    if (length && blk_pread(blk, 0, length, disk, 0) < 0) {
        *ret_why = g_strdup("the disk cannot be read");
        return false;
    }
    for (BitmapId id = 0; id < BITMAPS; id++) {
        g_autofree char *why = NULL;
        if (!check_one(all, id, blk, disk, whole, &why)) {
            *ret_why = g_strdup_printf("bitmap %s: %s", bitmap_name(id), why);
            return false;
        }
    }
    return true;
}
