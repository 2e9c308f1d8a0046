/*
 * The reference map of a check: how often is each host cluster referenced, and by whom.
 *
 *      hash table of leaves (open addressing, by leaf index)
 *        [ . | o | . | o | o | . ]
 *              |       |   |
 *            leaf    leaf  leaf       64 clusters each: 64 counts of 8 bits, 64 bytes of flags;
 *                                     a count beyond 255 turns the leaf's counts into 32 bits
 *
 * A leaf exists only where something is referenced, so the map costs what metadata really refers
 * to: 144 bytes for a lonely reference (which took 8 bytes of metadata), 2.5 bytes per cluster of a
 * dense image (40 MB for 1 TiB at 64 KiB clusters), nothing for a long file or for what a header
 * claims.
 *
 * Invariants
 *   1. A cluster without a leaf has count 0 and no flags.
 *   2. A count that passes the cap, the width of refcounts in the image, is reported; it is kept
 *      as it is (up to 2^32-1), so that references can be taken back.
 *   3. ALIAS is set once two owners were seen that cannot both be right:
 *        META with anything; L2 with DATA or COMP; DATA with COMP; active data twice.
 *      Data of two trees (active, snapshots), and compressed streams among themselves, share.
 *
 * Not done: threads.  Counting is memory-bound and takes a small part of the time it takes to read
 * the tables.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-check.h"

struct Qcow2RefMap {
    Qcow2RefLeaf **slots;
    size_t nslots; /* power of two */
    size_t used;
    uint64_t cap;
    Qcow2RefLeaf *last; /* of the last look-up: references come in runs */
};

Qcow2RefMap *qcow2_refmap_new(uint64_t cap)
{
    assert(cap > 0);
    Qcow2RefMap *map = g_new0(Qcow2RefMap, 1);
    map->nslots = 64;
    map->slots = g_new0(Qcow2RefLeaf *, map->nslots);
    map->cap = cap;
    return map;
}

void qcow2_refmap_free(Qcow2RefMap *map)
{
    if (!map) {
        return;
    }
    for (size_t i = 0; i < map->nslots; i++) {
        if (map->slots[i]) {
            g_free(map->slots[i]->wide);
            g_free(map->slots[i]);
        }
    }
    g_free(map->slots);
    g_free(map);
}

/* The slot that holds leaf @index, or the free one where it would go. */
static size_t find_slot(const Qcow2RefMap *map, uint64_t index)
{
    size_t mask = map->nslots - 1;
    size_t i = (index * UINT64_C(0x9e3779b97f4a7c15)) >> 20 & mask;
    while (map->slots[i] && map->slots[i]->index != index) {
        i = (i + 1) & mask;
    }
    return i;
}

static void grow(Qcow2RefMap *map)
{
    Qcow2RefLeaf **old = map->slots;
    size_t n = map->nslots;
    map->nslots *= 2;
    map->slots = g_new0(Qcow2RefLeaf *, map->nslots);
    for (size_t i = 0; i < n; i++) {
        if (old[i]) {
            map->slots[find_slot(map, old[i]->index)] = old[i];
        }
    }
    g_free(old);
}

static Qcow2RefLeaf *make_leaf(Qcow2RefMap *map, uint64_t index)
{
    if (map->last && map->last->index == index) {
        return map->last;
    }
    size_t i = find_slot(map, index);
    if (!map->slots[i]) {
        if (map->used >= map->nslots / 2) {
            grow(map);
            i = find_slot(map, index);
        }
        map->slots[i] = g_new0(Qcow2RefLeaf, 1);
        map->slots[i]->index = index;
        map->used++;
    }
    map->last = map->slots[i];
    return map->last;
}

const Qcow2RefLeaf *qcow2_refmap_leaf(const Qcow2RefMap *map, uint64_t cluster)
{
    uint64_t index = cluster / QCOW2_REF_LEAF;
    if (map->last && map->last->index == index) {
        return map->last;
    }
    return map->slots[find_slot(map, index)];
}

static void widen(Qcow2RefLeaf *leaf)
{
    assert(!leaf->wide);
    leaf->wide = g_new(uint32_t, QCOW2_REF_LEAF);
    for (unsigned i = 0; i < QCOW2_REF_LEAF; i++) {
        leaf->wide[i] = leaf->narrow[i];
    }
}

static void set_count(Qcow2RefLeaf *leaf, unsigned slot, uint32_t count)
{
    if (!leaf->wide && count > UINT8_MAX) {
        widen(leaf);
    }
    if (leaf->wide) {
        leaf->wide[slot] = count;
    } else {
        leaf->narrow[slot] = count;
    }
}

/* Can a reference with @flags join those that @old tells of? (invariant 3) */
static bool conflicts(unsigned old, unsigned flags)
{
    unsigned kinds = old & QCOW2_REF_KINDS, kind = flags & QCOW2_REF_KINDS;
    if (!kinds) {
        return false;
    }
    if (kinds != kind || kind == QCOW2_REF_META) {
        return true;
    }
    return kind == QCOW2_REF_DATA && (old & flags & QCOW2_REF_ACTIVE);
}

void qcow2_refmap_add(Qcow2RefMap *map, uint64_t first, uint64_t n, uint64_t times, unsigned flags,
                      void (*overflow)(uint64_t cluster, void *opaque), void *opaque)
{
    assert(times > 0 && (flags & QCOW2_REF_KINDS));
    for (uint64_t c = first; c < first + n; c++) {
        Qcow2RefLeaf *leaf = make_leaf(map, c / QCOW2_REF_LEAF);
        unsigned slot = c % QCOW2_REF_LEAF;
        uint64_t count = qcow2_refleaf_count(leaf, slot);
        if (conflicts(leaf->flags[slot], flags)) {
            leaf->flags[slot] |= QCOW2_REF_ALIAS;
        }
        leaf->flags[slot] |= flags;
        if (overflow && (count > map->cap || times > map->cap - count)) {
            overflow(c, opaque);
        }
        set_count(leaf, slot, MIN(count + MIN(times, UINT32_MAX), UINT32_MAX));
    }
}

void qcow2_refmap_sub(Qcow2RefMap *map, uint64_t first, uint64_t n, uint64_t times)
{
    for (uint64_t c = first; c < first + n; c++) {
        Qcow2RefLeaf *leaf = make_leaf(map, c / QCOW2_REF_LEAF);
        unsigned slot = c % QCOW2_REF_LEAF;
        uint32_t count = qcow2_refleaf_count(leaf, slot);
        assert(count > 0);
        count = count > times ? count - times : 0;
        set_count(leaf, slot, count);
        if (!count) {
            leaf->flags[slot] = 0;
        }
    }
}

void qcow2_refmap_clear_kind(Qcow2RefMap *map, uint64_t first, uint64_t n, unsigned kind)
{
    for (uint64_t c = first; c < first + n; c++) {
        Qcow2RefLeaf *leaf = make_leaf(map, c / QCOW2_REF_LEAF);
        uint8_t *flags = &leaf->flags[c % QCOW2_REF_LEAF];
        *flags &= ~kind;
        unsigned kinds = *flags & QCOW2_REF_KINDS;
        if ((kinds & (kinds - 1)) == 0) {
            *flags &= ~QCOW2_REF_ALIAS;
        }
    }
}

uint32_t qcow2_refmap_count(const Qcow2RefMap *map, uint64_t cluster)
{
    const Qcow2RefLeaf *leaf = qcow2_refmap_leaf(map, cluster);
    return leaf ? qcow2_refleaf_count(leaf, cluster % QCOW2_REF_LEAF) : 0;
}

unsigned qcow2_refmap_flags(const Qcow2RefMap *map, uint64_t cluster)
{
    const Qcow2RefLeaf *leaf = qcow2_refmap_leaf(map, cluster);
    return leaf ? leaf->flags[cluster % QCOW2_REF_LEAF] : 0;
}

static int compare_leaves(const void *a, const void *b)
{
    const Qcow2RefLeaf *x = *(Qcow2RefLeaf *const *)a, *y = *(Qcow2RefLeaf *const *)b;
    return x->index < y->index ? -1 : x->index > y->index;
}

GPtrArray *qcow2_refmap_sorted(const Qcow2RefMap *map)
{
    GPtrArray *leaves = g_ptr_array_new();
    for (size_t i = 0; i < map->nslots; i++) {
        if (map->slots[i]) {
            g_ptr_array_add(leaves, map->slots[i]);
        }
    }
    if (leaves->len) {
        qsort(leaves->pdata, leaves->len, sizeof(gpointer), compare_leaves);
    }
    return leaves;
}

static uint64_t leaf_end(const Qcow2RefLeaf *leaf)
{
    unsigned slot = QCOW2_REF_LEAF;
    while (slot > 0 && !qcow2_refleaf_count(leaf, slot - 1)) {
        slot--;
    }
    return slot ? leaf->index * QCOW2_REF_LEAF + slot : 0;
}

uint64_t qcow2_refmap_end(const Qcow2RefMap *map)
{
    uint64_t end = 0;
    for (size_t i = 0; i < map->nslots; i++) {
        if (map->slots[i] && (map->slots[i]->index + 1) * QCOW2_REF_LEAF > end) {
            end = MAX(end, leaf_end(map->slots[i]));
        }
    }
    return end;
}

size_t qcow2_refmap_leaves(const Qcow2RefMap *map)
{
    return map->used;
}
