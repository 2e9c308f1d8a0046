/*
 * What a guest may find on its disk: for every sector the values that are legal now.
 *
 *      sector 5, value 3:   64 big-endian words  0x0000000000000503
 *                           (5 << 8 | 3)
 *
 *      allowed   bit mask of values, narrowed to one by oracle_settle() unless it is in doubt
 *      now       the last value given
 *
 * Invariants
 * 1. now[i] is among allowed[i].
 * 2. Sectors behind the larger of the two sizes are never looked at.
 *
 * SPDX-License-Identifier: MIT
 */
#include "tests/harness/oracle.h"

#include <inttypes.h>
#include <string.h>

#include "util/endian.h"

void oracle_init(Oracle *o, unsigned sectors)
{
    g_assert_cmpuint(sectors, <=, ORACLE_MAX);
    o->sectors = o->other_sectors = sectors;
    o->doubt_size = false;
    for (unsigned i = 0; i < ORACLE_MAX; i++) {
        o->doubt[i] = false;
        o->now[i] = 0;
        o->allowed[i] = 1;
    }
}

static void set(Oracle *o, unsigned i, unsigned value)
{
    o->allowed[i] |= UINT64_C(1) << value;
    o->now[i] = (uint8_t)value;
    o->doubt[i] = false;
}

void oracle_write(Oracle *o, unsigned first, unsigned n, unsigned value)
{
    g_assert_cmpuint(value, <, ORACLE_VALUES);
    for (unsigned i = first; i < first + n && i < o->sectors; i++) {
        set(o, i, value);
    }
}

void oracle_resize(Oracle *o, unsigned sectors)
{
    g_assert_cmpuint(sectors, <=, ORACLE_MAX);
    for (unsigned i = o->sectors; i < sectors; i++) {
        o->now[i] = 0;
        o->allowed[i] = 1;
        o->doubt[i] = false;
    }
    o->other_sectors = o->sectors;
    o->sectors = sectors;
}

void oracle_merge(Oracle *o, const Oracle *from)
{
    if (from->sectors != o->sectors) {
        oracle_resize(o, from->sectors);
    }
    for (unsigned i = 0; i < o->sectors; i++) {
        set(o, i, from->now[i]);
    }
}

void oracle_doubt(Oracle *o, unsigned first, unsigned n)
{
    for (unsigned i = first; i < first + n && i < ORACLE_MAX; i++) {
        o->doubt[i] = true;
    }
}

void oracle_doubt_all(Oracle *o)
{
    oracle_doubt(o, 0, ORACLE_MAX);
    o->doubt_size = o->other_sectors != o->sectors;
}

void oracle_settle_part(Oracle *o, unsigned first, unsigned n)
{
    for (unsigned i = first; i < first + n && i < o->sectors; i++) {
        if (!o->doubt[i]) {
            o->allowed[i] = UINT64_C(1) << o->now[i];
        }
    }
}

void oracle_settle(Oracle *o)
{
    o->other_sectors = o->doubt_size ? o->other_sectors : o->sectors;
    oracle_settle_part(o, 0, o->sectors);
}

void oracle_fill(uint8_t *buf, unsigned first, unsigned n, unsigned value)
{
    for (unsigned i = 0; i < n; i++) {
        uint64_t word = value ? (uint64_t)(first + i) << 8 | value : 0;
        for (unsigned j = 0; j < ORACLE_SECTOR; j += 8) {
            qb_stbe64(buf + (size_t)i * ORACLE_SECTOR + j, word);
        }
    }
}

int oracle_value(const uint8_t *buf, unsigned sector)
{
    uint64_t word = qb_ldbe64(buf);
    bool uniform = !memcmp(buf, buf + 8, ORACLE_SECTOR - 8);
    if (!uniform || (word && word >> 8 != sector) || (word & 0xff) >= ORACLE_VALUES) {
        return -1;
    }
    return (int)(word & 0xff);
}

/* ---------------------------------------------------------------- comparing */

static char *describe(const uint8_t *buf, unsigned sector, uint64_t allowed)
{
    int value = oracle_value(buf, sector);
    if (value >= 0) {
        return g_strdup_printf("sector %u has value %d, allowed are %#" PRIx64, sector, value,
                               allowed);
    }
    return g_strdup_printf("sector %u has content that is not its own: %016" PRIx64 " %016" PRIx64
                           " ... %016" PRIx64, sector, qb_ldbe64(buf), qb_ldbe64(buf + 8),
                           qb_ldbe64(buf + ORACLE_SECTOR - 8));
}

/* The sectors of the disk, newly allocated; NULL: said in *ret_why. */
static uint8_t *read_disk(const Oracle *o, BlockBackend *blk, unsigned *ret_sectors,
                          char **ret_why)
{
    int64_t length = blk_getlength(blk);
    unsigned sectors = (unsigned)(length / ORACLE_SECTOR);
    if (length != (int64_t)o->sectors * ORACLE_SECTOR &&
        length != (int64_t)o->other_sectors * ORACLE_SECTOR) {
        *ret_why = g_strdup_printf("the disk is %" PRId64 " bytes long, not %u or %u sectors",
                                   length, o->sectors, o->other_sectors);
        return NULL;
    }
    g_autofree uint8_t *buf = g_malloc((size_t)length + 1);
    int ret = length ? blk_pread(blk, 0, length, buf, 0) : 0;
    if (ret < 0) {
        *ret_why = g_strdup_printf("the disk cannot be read: %s", g_strerror(-ret));
        return NULL;
    }
    *ret_sectors = sectors;
    return g_steal_pointer(&buf);
}

bool oracle_check(const Oracle *o, BlockBackend *blk, char **ret_why)
{
    unsigned sectors;
    g_autofree uint8_t *buf = read_disk(o, blk, &sectors, ret_why);
    if (!buf) {
        return false;
    }
    for (unsigned i = 0; i < sectors; i++) {
        const uint8_t *at = buf + (size_t)i * ORACLE_SECTOR;
        int value = oracle_value(at, i);
        if (value < 0 || !(o->allowed[i] >> value & 1)) {
            *ret_why = describe(at, i, o->allowed[i]);
            return false;
        }
    }
    return true;
}

bool oracle_learn(Oracle *o, BlockBackend *blk, char **ret_why)
{
    unsigned sectors;
    g_autofree uint8_t *buf =
        oracle_check(o, blk, ret_why) ? read_disk(o, blk, &sectors, ret_why) : NULL;
    if (!buf) {
        return false;
    }
    oracle_init(o, sectors);
    for (unsigned i = 0; i < sectors; i++) {
        set(o, i, (unsigned)oracle_value(buf + (size_t)i * ORACLE_SECTOR, i));
    }
    oracle_settle(o);
    return true;
}
