/*
 * The reference map of a check: how often is each host cluster referenced, and by whom.
 *
 *      shards, by leaf index: 64 neighbours in one shard, the next 64 in the next one
 *        hash table of leaves (open addressing, by leaf index), and the slabs they lie in
 *          [ . | o | . | o | o | . ]
 *                |       |   |
 *              leaf    leaf  leaf     64 clusters each: 64 counts of 8 bits, 64 bytes of flags;
 *                                     a count beyond 255 turns the leaf's counts into 32 bits
 *
 * A leaf exists only where something is referenced, so the map costs what metadata really refers
 * to: 144 bytes for a lonely reference (which took 8 bytes of metadata), 2.5 bytes per cluster of a
 * dense image (40 MB for 1 TiB at 64 KiB clusters), nothing for a long file or for what a header
 * claims.
 *
 * References come in runs, one thread's mostly far from another's: a lock per shard, taken once per
 * leaf, is hardly ever waited for.  Only adding takes it; all else happens when nobody adds.
 *
 * Invariants
 *   1. A cluster without a leaf has count 0 and no flags.
 *   2. A count that passes the cap, the width of refcounts in the image, is reported; it is kept
 *      as it is, so that references can be taken back.  One that came to 2^32-1 stays there.
 *   3. ALIAS is set once two owners were seen that cannot both be right:
 *        META with anything; L2 with DATA or COMP; DATA with COMP; active data twice.
 *      Data of two trees (active, snapshots), and compressed streams among themselves, share.
 *      In which order the owners came makes no difference.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-check.h"

enum {
    SHARDS = 64,       /* power of two */
    SLAB_LEAVES = 32,  /* allocated at once */
    RADIX_BITS = 11,
};

typedef struct Shard {
    QbMutex lock; /* taken by those who add */
    Qcow2RefLeaf **slots;
    size_t nslots; /* power of two; 0: nothing yet */
    size_t used;
    GPtrArray *slabs;   /* of SLAB_LEAVES leaves each, filled one after the other */
    Qcow2RefLeaf *last; /* of the last look-up */
} Shard;

struct Qcow2RefMap {
    uint64_t cap;
    Shard shards[SHARDS];
    GPtrArray *sorted; /* all leaves there were when somebody asked last, or NULL */
};

Qcow2RefMap *qcow2_refmap_new(uint64_t cap)
{
    assert(cap > 0);
    Qcow2RefMap *map = g_new0(Qcow2RefMap, 1);
    map->cap = cap;
    for (size_t i = 0; i < SHARDS; i++) {
        qb_mutex_init(&map->shards[i].lock);
        map->shards[i].slabs = g_ptr_array_new_with_free_func(g_free);
    }
    return map;
}

static void free_shard(Shard *shard)
{
    for (size_t i = 0; i < shard->nslots; i++) {
        if (shard->slots[i]) {
            g_free(shard->slots[i]->wide);
        }
    }
    g_free(shard->slots);
    g_ptr_array_unref(shard->slabs);
    qb_mutex_destroy(&shard->lock);
}

void qcow2_refmap_free(Qcow2RefMap *map)
{
    for (size_t i = 0; map && i < SHARDS; i++) {
        free_shard(&map->shards[i]);
    }
    if (map) {
        g_clear_pointer(&map->sorted, g_ptr_array_unref);
    }
    g_free(map);
}

/* ---------------------------------------------------------------- leaves */

static Shard *shard_of(Qcow2RefMap *map, uint64_t index)
{
    return &map->shards[(index / QCOW2_REF_LEAF) % SHARDS];
}

/* The slot that holds leaf @index, or the free one where it would go. */
static size_t find_slot(const Shard *shard, uint64_t index)
{
    size_t mask = shard->nslots - 1;
    size_t i = (index * UINT64_C(0x9e3779b97f4a7c15)) >> 20 & mask;
    while (shard->slots[i] && shard->slots[i]->index != index) {
        i = (i + 1) & mask;
    }
    return i;
}

static void grow(Shard *shard)
{
    Qcow2RefLeaf **old = shard->slots;
    size_t n = shard->nslots;
    shard->nslots = n ? n * 2 : 16;
    shard->slots = g_new0(Qcow2RefLeaf *, shard->nslots);
    for (size_t i = 0; i < n; i++) {
        if (old[i]) {
            shard->slots[find_slot(shard, old[i]->index)] = old[i];
        }
    }
    g_free(old);
}

static Qcow2RefLeaf *new_leaf(Shard *shard, uint64_t index)
{
    size_t in_slab = shard->used++ % SLAB_LEAVES;
    if (in_slab == 0) {
        g_ptr_array_add(shard->slabs, g_new0(Qcow2RefLeaf, SLAB_LEAVES));
    }
    Qcow2RefLeaf *slab = shard->slabs->pdata[shard->slabs->len - 1];
    slab[in_slab].index = index;
    return &slab[in_slab];
}

static Qcow2RefLeaf *make_leaf(Shard *shard, uint64_t index)
{
    if (shard->last && shard->last->index == index) {
        return shard->last;
    }
    if (shard->used >= shard->nslots / 2) {
        grow(shard);
    }
    size_t i = find_slot(shard, index);
    if (!shard->slots[i]) {
        shard->slots[i] = new_leaf(shard, index);
    }
    shard->last = shard->slots[i];
    return shard->last;
}

const Qcow2RefLeaf *qcow2_refmap_leaf(const Qcow2RefMap *map, uint64_t cluster)
{
    uint64_t index = cluster / QCOW2_REF_LEAF;
    const Shard *shard = &map->shards[(index / QCOW2_REF_LEAF) % SHARDS];
    if (shard->last && shard->last->index == index) {
        return shard->last;
    }
    return shard->nslots ? shard->slots[find_slot(shard, index)] : NULL;
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

/* ---------------------------------------------------------------- references */

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

/* References to clusters of one leaf that come together. */
typedef struct Addition {
    uint64_t times, cap;
    unsigned flags;
    void (*overflow)(uint64_t cluster, void *opaque);
    void *opaque;
} Addition;

static void add_one(Qcow2RefLeaf *leaf, unsigned slot, const Addition *a)
{
    uint64_t count = qcow2_refleaf_count(leaf, slot);
    if (conflicts(leaf->flags[slot], a->flags)) {
        leaf->flags[slot] |= QCOW2_REF_ALIAS;
    }
    leaf->flags[slot] |= a->flags;
    if (a->overflow && (count > a->cap || a->times > a->cap - count)) {
        a->overflow(leaf->index * QCOW2_REF_LEAF + slot, a->opaque);
    }
    set_count(leaf, slot, MIN(count + MIN(a->times, UINT32_MAX), UINT32_MAX));
}

static void add_to_shard(Shard *shard, uint64_t first, uint64_t n, const Addition *a)
{
    unsigned slot = first % QCOW2_REF_LEAF;
    QB_GUARD(&shard->lock);
    size_t used = shard->used;
    Qcow2RefLeaf *leaf = make_leaf(shard, first / QCOW2_REF_LEAF);
    if (shard->used > used && a->times == 1) { /* a fresh leaf: all of it in two strokes */
        memset(leaf->narrow + slot, 1, n);
        memset(leaf->flags + slot, (int)a->flags, n);
        return;
    }
    for (uint64_t i = 0; i < n; i++) {
        add_one(leaf, slot + i, a);
    }
}

void qcow2_refmap_add(Qcow2RefMap *map, uint64_t first, uint64_t n, uint64_t times, unsigned flags,
                      void (*overflow)(uint64_t cluster, void *opaque), void *opaque)
{
    assert(times > 0 && (flags & QCOW2_REF_KINDS));
    Addition a = {.times = times, .cap = map->cap, .flags = flags, .overflow = overflow,
                  .opaque = opaque};
    while (n > 0) {
        uint64_t part = MIN(n, QCOW2_REF_LEAF - first % QCOW2_REF_LEAF);
        add_to_shard(shard_of(map, first / QCOW2_REF_LEAF), first, part, &a);
        first += part;
        n -= part;
    }
}

void qcow2_refmap_sub(Qcow2RefMap *map, uint64_t first, uint64_t n, uint64_t times)
{
    for (uint64_t c = first; c < first + n; c++) {
        Qcow2RefLeaf *leaf = make_leaf(shard_of(map, c / QCOW2_REF_LEAF), c / QCOW2_REF_LEAF);
        unsigned slot = c % QCOW2_REF_LEAF;
        uint32_t count = qcow2_refleaf_count(leaf, slot);
        assert(count > 0);
        if (count == UINT32_MAX) {
            continue; /* invariant 2: it may be any */
        }
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
        Qcow2RefLeaf *leaf = make_leaf(shard_of(map, c / QCOW2_REF_LEAF), c / QCOW2_REF_LEAF);
        uint8_t *flags = &leaf->flags[c % QCOW2_REF_LEAF];
        *flags &= ~kind;
        unsigned kinds = *flags & QCOW2_REF_KINDS;
        bool twice = kinds == QCOW2_REF_META && qcow2_refleaf_count(leaf, c % QCOW2_REF_LEAF) > 1;
        if ((kinds & (kinds - 1)) == 0 && !twice) {
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

/* ---------------------------------------------------------------- all leaves */

typedef struct LeafKey {
    uint64_t index;
    Qcow2RefLeaf *leaf;
} LeafKey;

static LeafKey *collect_leaves(const Qcow2RefMap *map, size_t *ret_n)
{
    LeafKey *keys = g_new(LeafKey, qcow2_refmap_leaves(map) + 1);
    size_t n = 0;
    for (size_t i = 0; i < SHARDS; i++) {
        const Shard *shard = &map->shards[i];
        for (size_t k = 0; k < shard->used; k++) {
            Qcow2RefLeaf *slab = shard->slabs->pdata[k / SLAB_LEAVES];
            keys[n++] = (LeafKey){slab[k % SLAB_LEAVES].index, &slab[k % SLAB_LEAVES]};
        }
    }
    *ret_n = n;
    return keys;
}

/* Sorts by the RADIX_BITS bits from @shift on, keeping the order of what is equal there. */
static void radix_pass(const LeafKey *from, LeafKey *to, size_t n, unsigned shift)
{
    enum { BUCKETS = 1 << RADIX_BITS };
    size_t starts[BUCKETS + 1] = {0};
    for (size_t i = 0; i < n; i++) {
        starts[(from[i].index >> shift) % BUCKETS + 1]++;
    }
    for (size_t b = 1; b < BUCKETS; b++) {
        starts[b] += starts[b - 1];
    }
    for (size_t i = 0; i < n; i++) {
        to[starts[(from[i].index >> shift) % BUCKETS]++] = from[i];
    }
}

static GPtrArray *sort_leaves(const Qcow2RefMap *map)
{
    size_t n;
    g_autofree LeafKey *keys = collect_leaves(map, &n);
    g_autofree LeafKey *other = g_new(LeafKey, n + 1);
    uint64_t all = 0;
    for (size_t i = 0; i < n; i++) {
        all |= keys[i].index;
    }
    for (unsigned shift = 0; shift < 64 && all >> shift; shift += RADIX_BITS) {
        radix_pass(keys, other, n, shift);
        LeafKey *sorted = other;
        other = keys;
        keys = sorted;
    }
    GPtrArray *leaves = g_ptr_array_sized_new((guint)n);
    for (size_t i = 0; i < n; i++) {
        g_ptr_array_add(leaves, keys[i].leaf);
    }
    return leaves;
}

/* Leaves come and stay, at their places: as long as there are no more, the order is the same. */
GPtrArray *qcow2_refmap_sorted(Qcow2RefMap *map)
{
    if (!map->sorted || map->sorted->len != qcow2_refmap_leaves(map)) {
        g_clear_pointer(&map->sorted, g_ptr_array_unref);
        map->sorted = sort_leaves(map);
    }
    return g_ptr_array_ref(map->sorted);
}

unsigned qcow2_refleaf_run(const Qcow2RefLeaf *leaf, unsigned slot)
{
    unsigned end = slot + 1;
    if (!leaf->wide && slot == 0 && !memcmp(leaf->narrow, leaf->narrow + 1, QCOW2_REF_LEAF - 1)) {
        return QCOW2_REF_LEAF;
    }
    while (end < QCOW2_REF_LEAF &&
           qcow2_refleaf_count(leaf, end) == qcow2_refleaf_count(leaf, slot)) {
        end++;
    }
    return end - slot;
}

static uint64_t leaf_end(const Qcow2RefLeaf *leaf)
{
    unsigned slot = QCOW2_REF_LEAF;
    while (slot > 0 && !qcow2_refleaf_count(leaf, slot - 1)) {
        slot--;
    }
    return slot ? leaf->index * QCOW2_REF_LEAF + slot : 0;
}

static uint64_t shard_end(const Shard *shard, uint64_t end)
{
    for (size_t i = 0; i < shard->nslots; i++) {
        if (shard->slots[i] && (shard->slots[i]->index + 1) * QCOW2_REF_LEAF > end) {
            end = MAX(end, leaf_end(shard->slots[i]));
        }
    }
    return end;
}

uint64_t qcow2_refmap_end(const Qcow2RefMap *map)
{
    uint64_t end = 0;
    for (size_t i = 0; i < SHARDS; i++) {
        end = shard_end(&map->shards[i], end);
    }
    return end;
}

size_t qcow2_refmap_leaves(const Qcow2RefMap *map)
{
    size_t n = 0;
    for (size_t i = 0; i < SHARDS; i++) {
        n += map->shards[i].used;
    }
    return n;
}
