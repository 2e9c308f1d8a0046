/*
 * Images that want to be repaired, each damaged in a way of its own, in the bytes of its disk.
 *
 *      leaks     counted, and used by nobody            nothing is wrong but space
 *      dirty     counts that are not there, dirty bit   what a crash leaves: no data are at risk
 *      qed       a cluster at the end that nobody uses, and the bit that wants a check
 *      counts    of tables: too low, too high           these are corrupt: whoever writes to the
 *      copied    flags that are wrong                   image before the repair is done may
 *      table     an entry of the refcount table lost    overwrite what is in use
 *      l1        a flipped bit: no table is there
 *      entries   of data: not aligned
 *
 * In none of them does the guest's content change.
 *
 * SPDX-License-Identifier: MIT
 */
#include "tests/harness/operations-int.h"

#include <string.h>

#include "block/qcow2.h"
#include "block/qed-format.h"

/* ---------------------------------------------------------------- the bytes of the image */

typedef struct Bytes {
    unsigned disk;
    DiskImage image;
} Bytes;

static Bytes take_bytes(void)
{
    unsigned top = disk_number("top");
    return (Bytes){.disk = top, .image = disk_save(top)};
}

static void put_bytes(Bytes *b)
{
    disk_load(b->disk, &b->image);
    disk_image_clear(&b->image);
}

static uint64_t get(const Bytes *b, uint64_t pos)
{
    g_assert_cmpuint(pos, <=, b->image.length - 8);
    return qb_ldbe64(b->image.data + pos);
}

static void put(Bytes *b, uint64_t pos, uint64_t value)
{
    qb_stbe64(b->image.data + pos, value);
}

static uint64_t cluster_size(const Bytes *b)
{
    return UINT64_C(1) << qb_ldbe32(b->image.data + QCOW2_HDR_CLUSTER_BITS);
}

static unsigned refcount_order(const Bytes *b)
{
    return qb_ldbe32(b->image.data + QCOW2_HDR_VERSION) == 2
               ? 4
               : qb_ldbe32(b->image.data + QCOW2_HDR_REFCOUNT_ORDER);
}

/* Clusters that the first block counts: those at the beginning. */
static void set_count(Bytes *b, uint64_t offset, uint64_t count)
{
    uint64_t block = get(b, get(b, QCOW2_HDR_REFTABLE_OFFSET));
    qcow2_refcount_write(b->image.data + block, refcount_order(b), offset / cluster_size(b), count);
}

/* ---------------------------------------------------------------- damage */

void damage_leaks(World *w)
{
    g_assert_true(world_open(w));
    BlockDriverState *bs = blk_bs(w->blk);
    int64_t leaked = qcow2_alloc_clusters(bs, 5 * (uint64_t)qcow2_state(bs)->cluster_size);
    g_assert_cmpint(leaked, >, 0);
    g_assert_true(world_close(w));
}

/* What a crash with lazy refcounts leaves. */
void damage_dirty(World *w)
{
    Bytes b = take_bytes();
    uint64_t block = get(&b, get(&b, QCOW2_HDR_REFTABLE_OFFSET));
    put(&b, QCOW2_HDR_INCOMPATIBLE, get(&b, QCOW2_HDR_INCOMPATIBLE) | QCOW2_INCOMPAT_DIRTY);
    memset(b.image.data + block + cluster_size(&b) / 4, 0, cluster_size(&b) / 2);
    put_bytes(&b);
}

void damage_counts(World *w)
{
    Bytes b = take_bytes();
    uint64_t l1 = get(&b, QCOW2_HDR_L1_OFFSET), table = get(&b, QCOW2_HDR_REFTABLE_OFFSET);
    set_count(&b, l1, 0);
    set_count(&b, get(&b, l1) & QCOW2_ENTRY_OFFSET_MASK, 0);
    if (refcount_order(&b)) {
        set_count(&b, table, 3);
    }
    put_bytes(&b);
}

/* Of the first table and of the first entries in it. */
void damage_copied(World *w)
{
    Bytes b = take_bytes();
    uint64_t l1 = get(&b, QCOW2_HDR_L1_OFFSET);
    uint64_t l2 = get(&b, l1) & QCOW2_ENTRY_OFFSET_MASK;
    bool extended = get(&b, QCOW2_HDR_INCOMPATIBLE) & QCOW2_INCOMPAT_EXTL2 &&
                    !(w->kind->flags & KIND_V2);
    put(&b, l1, get(&b, l1) ^ QCOW2_ENTRY_COPIED);
    for (unsigned i = 0; i < 8; i++) {
        uint64_t pos = l2 + i * (extended ? 16 : 8), entry = get(&b, pos);
        if (entry & QCOW2_ENTRY_OFFSET_MASK && !(entry & QCOW2_ENTRY_COMPRESSED)) {
            put(&b, pos, entry ^ QCOW2_ENTRY_COPIED);
        }
    }
    put_bytes(&b);
}

/* All counts of its block are lost with it: the structure is made anew. */
void damage_table(World *w)
{
    Bytes b = take_bytes();
    put(&b, get(&b, QCOW2_HDR_REFTABLE_OFFSET), 0);
    put_bytes(&b);
}

void damage_l1(World *w)
{
    Bytes b = take_bytes();
    uint64_t l1 = get(&b, QCOW2_HDR_L1_OFFSET);
    put(&b, l1, get(&b, l1) ^ (UINT64_C(1) << 45));
    put_bytes(&b);
}

void damage_entries(World *w)
{
    Bytes b = take_bytes();
    uint64_t l2 = get(&b, get(&b, QCOW2_HDR_L1_OFFSET)) & QCOW2_ENTRY_OFFSET_MASK;
    for (unsigned i = 0; i < 8; i++) {
        uint64_t pos = l2 + i * 8, entry = get(&b, pos);
        uint64_t no_data = QCOW2_ENTRY_COMPRESSED | QCOW2_ENTRY_ZERO;
        if ((entry & QCOW2_ENTRY_COPIED) && !(entry & no_data)) {
            put(&b, pos, entry | cluster_size(&b) / 2);
        }
    }
    put_bytes(&b);
}

void damage_qed(World *w)
{
    Bytes b = take_bytes();
    uint64_t end = b.image.length;
    b.image.data[16] |= QED_F_NEED_CHECK;
    put_bytes(&b);
    disk_extend(b.disk, end + w->kind->cluster * ORACLE_SECTOR);
}

/* ---------------------------------------------------------------- repair */

bool run_repair(World *w)
{
    return world_verb(w, "check -q -r all --image-opts %TOP");
}
