/*
 * The reference map of a check: how often is each host cluster referenced, and by whom.
 *
 *      rows: 64 leaves with neighbouring indices; neighbouring rows are in different shards
 *      shard: hash table of rows (open addressing), and the slabs that leaves and bodies lie in
 *          [ . | row | . | row | row | . ]
 *                 |
 *              bitmap of leaves that exist, pointers to them
 *                 |   |
 *              leaf  leaf             64 clusters each: all alike, their count and flags are here
 *                |
 *              body                   or they differ: 64 counts of 8 bits, 64 bytes of flags;
 *                                     a count beyond 255 turns the counts into 32 bits
 *
 * A leaf exists only where something is referenced, a body only where neighbours differ.  So the
 * map costs what metadata really refers to: 160 bytes for a lonely reference (which took 8 bytes of
 * metadata) and 32 to 64 for its row, half a byte per cluster where a run covers whole leaves, 2.5
 * bytes where none does, and nothing for a long file or for what a header claims.
 *
 * References come in runs, one thread's mostly far from another's: a lock per shard, taken once per
 * row, is hardly ever waited for.  Only changes take it; all else happens when nobody adds.
 *
 * Invariants
 *   1. A cluster without a leaf has count 0 and no flags.
 *   2. A count that passes the cap, the width of refcounts in the image, is reported; it is kept
 *      as it is, so that references can be taken back.  One that came to 2^32-1 stays there.
 *   3. ALIAS is set once two owners were seen that cannot both be right:
 *        META with anything; L2 with DATA or COMP; DATA with COMP; active data twice.
 *      Data of two trees (active, snapshots), and compressed streams among themselves, share.
 *      In which order the owners came makes no difference.
 *   4. Leaves and bodies stay where they are.  A leaf that got a body keeps it: clusters that
 *      become alike by and by are not looked for.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-check.h"

enum {
    SHARDS = 64, /* power of two */
    ROW_LEAVES = 64,
    ROW_CLUSTERS = ROW_LEAVES * QCOW2_REF_LEAF,
    FEW_LEAVES = 8, /* pointers that a row has room for once it has several */
    FIRST_SLAB = 4,           /* items; each slab has twice as many as the one before, */
    MAX_SLAB_BYTES = 96 << 10, /* up to that: what malloc does not get from the system singly */
    RADIX_BITS = 11,
};

/* Items of one size, zeroed, that stay where they are until all of them go. */
typedef struct Slabs {
    size_t item_size;
    GPtrArray *slabs;
    size_t used, size; /* items of the last of them */
} Slabs;

typedef struct Row {
    uint64_t number;  /* index of its first leaf / ROW_LEAVES */
    uint64_t present; /* by leaf: it exists; 0: no row, a free slot of the table */
    union {
        Qcow2RefLeaf *one;   /* the only one */
        Qcow2RefLeaf **many; /* all there are, by index */
    } leaves;
} Row;

typedef struct Shard {
    QbMutex lock; /* taken by those who change something */
    Row *rows;
    size_t nrows; /* power of two; 0: nothing yet */
    size_t used_rows, used_leaves;
    Slabs leaves, bodies;
} Shard;

struct Qcow2RefMap {
    uint64_t cap;
    Shard shards[SHARDS];
    GPtrArray *sorted; /* all leaves there were when somebody asked last, or NULL */
};

/* ---------------------------------------------------------------- slabs */

static void slabs_init(Slabs *p, size_t item_size)
{
    *p = (Slabs){.item_size = item_size, .slabs = g_ptr_array_new_with_free_func(g_free)};
}

/* How many items slab @i has. */
static size_t slab_size(const Slabs *p, guint i)
{
    return MIN((size_t)FIRST_SLAB << MIN(i, 16), MAX_SLAB_BYTES / p->item_size);
}

static void *slabs_take(Slabs *p)
{
    if (p->used == p->size) {
        p->size = slab_size(p, p->slabs->len);
        p->used = 0;
        /* Not by calloc: a page that is read first, and written then, costs two faults. */
        void *fresh = g_malloc_n(p->size, p->item_size);
        memset(fresh, 0, p->size * p->item_size);
        g_ptr_array_add(p->slabs, fresh);
    }
    uint8_t *slab = p->slabs->pdata[p->slabs->len - 1];
    return slab + p->used++ * p->item_size;
}

/* Slab @i; *ret_n: how many items of it are taken. */
static void *slabs_get(const Slabs *p, guint i, size_t *ret_n)
{
    *ret_n = i + 1 < p->slabs->len ? slab_size(p, i) : p->used;
    return p->slabs->pdata[i];
}

/* ---------------------------------------------------------------- */

Qcow2RefMap *qcow2_refmap_new(uint64_t cap)
{
    assert(cap > 0);
    Qcow2RefMap *map = g_new0(Qcow2RefMap, 1);
    map->cap = cap;
    for (size_t i = 0; i < SHARDS; i++) {
        qb_mutex_init(&map->shards[i].lock);
        slabs_init(&map->shards[i].leaves, sizeof(Qcow2RefLeaf));
        slabs_init(&map->shards[i].bodies, sizeof(Qcow2RefBody));
    }
    return map;
}

static bool has_many(const Row *row)
{
    return row->present & (row->present - 1);
}

static void free_shard(Shard *shard)
{
    for (guint i = 0; i < shard->bodies.slabs->len; i++) {
        size_t n;
        const Qcow2RefBody *bodies = slabs_get(&shard->bodies, i, &n);
        for (size_t k = 0; k < n; k++) {
            g_free(bodies[k].wide);
        }
    }
    for (size_t i = 0; i < shard->nrows; i++) {
        if (has_many(&shard->rows[i])) {
            g_free(shard->rows[i].leaves.many);
        }
    }
    g_free(shard->rows);
    g_ptr_array_unref(shard->leaves.slabs);
    g_ptr_array_unref(shard->bodies.slabs);
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

static Shard *shard_of(Qcow2RefMap *map, uint64_t number)
{
    return &map->shards[number % SHARDS];
}

/* The slot that holds row @number, or the free one where it would go. */
static Row *find_row(const Shard *shard, uint64_t number)
{
    size_t mask = shard->nrows - 1;
    size_t i = (number * UINT64_C(0x9e3779b97f4a7c15)) >> 20 & mask;
    while (shard->rows[i].present && shard->rows[i].number != number) {
        i = (i + 1) & mask;
    }
    return &shard->rows[i];
}

static void grow(Shard *shard)
{
    Row *old = shard->rows;
    size_t n = shard->nrows;
    shard->nrows = n ? n * 2 : 4;
    shard->rows = g_new0(Row, shard->nrows);
    for (size_t i = 0; i < n; i++) {
        if (old[i].present) {
            *find_row(shard, old[i].number) = old[i];
        }
    }
    g_free(old);
}

/* The row, which may still have to be given its first leaf. */
static Row *make_row(Shard *shard, uint64_t number)
{
    if (shard->used_rows >= shard->nrows / 4 * 3) {
        grow(shard);
    }
    Row *row = find_row(shard, number);
    shard->used_rows += !row->present;
    row->number = number;
    return row;
}

/* Where the pointer to leaf @k is, or would be. */
static unsigned position(const Row *row, unsigned k)
{
    return (unsigned)__builtin_popcountll(row->present & ((UINT64_C(1) << k) - 1));
}

static Qcow2RefLeaf *find_leaf(const Row *row, unsigned k)
{
    if (!(row->present >> k & 1)) {
        return NULL;
    }
    return has_many(row) ? row->leaves.many[position(row, k)] : row->leaves.one;
}

/* Makes room for a pointer more than the @n there are. */
static void extend_row(Row *row, unsigned n)
{
    if (n == 1) {
        Qcow2RefLeaf *one = row->leaves.one;
        row->leaves.many = g_new(Qcow2RefLeaf *, FEW_LEAVES);
        row->leaves.many[0] = one;
    } else if (n == FEW_LEAVES) {
        row->leaves.many = g_renew(Qcow2RefLeaf *, row->leaves.many, ROW_LEAVES);
    }
}

static Qcow2RefLeaf *new_leaf(Shard *shard, Row *row, unsigned k)
{
    unsigned n = (unsigned)__builtin_popcountll(row->present), at = position(row, k);
    Qcow2RefLeaf *leaf = slabs_take(&shard->leaves);
    leaf->index = row->number * ROW_LEAVES + k;
    shard->used_leaves++;
    extend_row(row, n);
    if (n == 0) {
        row->leaves.one = leaf;
    } else {
        Qcow2RefLeaf **many = row->leaves.many;
        memmove(many + at + 1, many + at, (n - at) * sizeof(*many));
        many[at] = leaf;
    }
    row->present |= UINT64_C(1) << k;
    return leaf;
}

const Qcow2RefLeaf *qcow2_refmap_leaf(const Qcow2RefMap *map, uint64_t cluster)
{
    uint64_t index = cluster / QCOW2_REF_LEAF, number = index / ROW_LEAVES;
    const Shard *shard = &map->shards[number % SHARDS];
    return shard->nrows ? find_leaf(find_row(shard, number), index % ROW_LEAVES) : NULL;
}

/* ---------------------------------------------------------------- clusters of a leaf */

/* What is known of a cluster. */
typedef struct Refs {
    uint32_t count;
    uint8_t flags;
} Refs;

static void widen(Qcow2RefBody *body)
{
    body->wide = g_new(uint32_t, QCOW2_REF_LEAF);
    for (unsigned i = 0; i < QCOW2_REF_LEAF; i++) {
        body->wide[i] = body->narrow[i];
    }
}

static void fill(Qcow2RefBody *body, unsigned slot, unsigned n, Refs r)
{
    if (!body->wide && r.count > UINT8_MAX) {
        widen(body);
    }
    for (unsigned i = slot; body->wide && i < slot + n; i++) {
        body->wide[i] = r.count;
    }
    memset(body->narrow + slot, (int)(r.count & UINT8_MAX), n);
    memset(body->flags + slot, r.flags, n);
}

/* @n clusters of the leaf from @slot on become @r. */
static void set_refs(Shard *shard, Qcow2RefLeaf *leaf, unsigned slot, unsigned n, Refs r)
{
    bool same = r.count == leaf->count && r.flags == leaf->flags;
    if (!leaf->body && (same || n == QCOW2_REF_LEAF)) {
        leaf->count = r.count;
        leaf->flags = r.flags;
        return;
    }
    if (!leaf->body) {
        leaf->body = slabs_take(&shard->bodies);
        fill(leaf->body, 0, QCOW2_REF_LEAF, (Refs){leaf->count, leaf->flags});
    }
    fill(leaf->body, slot, n, r);
}

/* How many of the @max clusters from @slot on are alike. */
static unsigned refs_run(const Qcow2RefLeaf *leaf, unsigned slot, unsigned max)
{
    const Qcow2RefBody *body = leaf->body;
    unsigned n = 1;
    if (!body) {
        return max;
    }
    while (n < max && body->flags[slot + n] == body->flags[slot] &&
           qcow2_refleaf_count(leaf, slot + n) == qcow2_refleaf_count(leaf, slot)) {
        n++;
    }
    return n;
}

/* ---------------------------------------------------------------- changes */

/* What happens to clusters in a row, alike for those that are alike. */
typedef struct Change {
    bool (*fn)(Refs *r, const struct Change *change); /* true: overflow is to be called */
    uint64_t times, cap;
    unsigned flags;
    void (*overflow)(uint64_t cluster, void *opaque);
    void *opaque;
} Change;

static void change_leaf(Shard *shard, Qcow2RefLeaf *leaf, unsigned slot, unsigned end,
                        const Change *change)
{
    for (unsigned alike; slot < end; slot += alike) {
        Refs r = {qcow2_refleaf_count(leaf, slot), qcow2_refleaf_flags(leaf, slot)};
        alike = refs_run(leaf, slot, end - slot);
        bool overflow = change->fn(&r, change);
        set_refs(shard, leaf, slot, alike, r);
        for (unsigned i = slot; overflow && i < slot + alike; i++) {
            change->overflow(leaf->index * QCOW2_REF_LEAF + i, change->opaque);
        }
    }
}

/* Changes [@first, @end) of row @number. */
static void change_row(Shard *shard, uint64_t number, unsigned first, unsigned end,
                       const Change *change)
{
    QB_GUARD(&shard->lock);
    Row *row = make_row(shard, number);
    for (unsigned n; first < end; first += n) {
        unsigned k = first / QCOW2_REF_LEAF, slot = first % QCOW2_REF_LEAF;
        Qcow2RefLeaf *leaf = find_leaf(row, k);
        n = MIN(end - first, QCOW2_REF_LEAF - slot);
        change_leaf(shard, leaf ? leaf : new_leaf(shard, row, k), slot, slot + n, change);
    }
}

static void change_all(Qcow2RefMap *map, uint64_t first, uint64_t n, const Change *change)
{
    for (uint64_t part; n > 0; first += part, n -= part) {
        uint64_t number = first / ROW_CLUSTERS;
        unsigned at = first % ROW_CLUSTERS;
        part = MIN(n, ROW_CLUSTERS - at);
        change_row(shard_of(map, number), number, at, at + (unsigned)part, change);
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

static bool join(Refs *r, const Change *change)
{
    uint64_t count = r->count;
    r->flags |= change->flags | (conflicts(r->flags, change->flags) ? QCOW2_REF_ALIAS : 0);
    r->count = (uint32_t)MIN(count + MIN(change->times, UINT32_MAX), UINT32_MAX);
    return change->overflow && (count > change->cap || change->times > change->cap - count);
}

void qcow2_refmap_add(Qcow2RefMap *map, uint64_t first, uint64_t n, uint64_t times, unsigned flags,
                      void (*overflow)(uint64_t cluster, void *opaque), void *opaque)
{
    assert(times > 0 && (flags & QCOW2_REF_KINDS));
    Change change = {.fn = join, .times = times, .cap = map->cap, .flags = flags,
                     .overflow = overflow, .opaque = opaque};
    change_all(map, first, n, &change);
}

static bool leave(Refs *r, const Change *change)
{
    assert(r->count > 0);
    if (r->count < UINT32_MAX) { /* invariant 2: it may be any */
        r->count = r->count > change->times ? r->count - (uint32_t)change->times : 0;
        r->flags = r->count ? r->flags : 0;
    }
    return false;
}

void qcow2_refmap_sub(Qcow2RefMap *map, uint64_t first, uint64_t n, uint64_t times)
{
    change_all(map, first, n, &(Change){.fn = leave, .times = times});
}

static bool clear_kind(Refs *r, const Change *change)
{
    r->flags &= ~change->flags;
    unsigned kinds = r->flags & QCOW2_REF_KINDS;
    bool twice = kinds == QCOW2_REF_META && r->count > 1;
    if ((kinds & (kinds - 1)) == 0 && !twice) {
        r->flags &= ~QCOW2_REF_ALIAS;
    }
    return false;
}

void qcow2_refmap_clear_kind(Qcow2RefMap *map, uint64_t first, uint64_t n, unsigned kind)
{
    change_all(map, first, n, &(Change){.fn = clear_kind, .flags = kind});
}

uint32_t qcow2_refmap_count(const Qcow2RefMap *map, uint64_t cluster)
{
    const Qcow2RefLeaf *leaf = qcow2_refmap_leaf(map, cluster);
    return leaf ? qcow2_refleaf_count(leaf, cluster % QCOW2_REF_LEAF) : 0;
}

unsigned qcow2_refmap_flags(const Qcow2RefMap *map, uint64_t cluster)
{
    const Qcow2RefLeaf *leaf = qcow2_refmap_leaf(map, cluster);
    return leaf ? qcow2_refleaf_flags(leaf, cluster % QCOW2_REF_LEAF) : 0;
}

/* ---------------------------------------------------------------- all leaves */

typedef struct LeafIter {
    const Qcow2RefMap *map;
    size_t shard, in_slab;
    guint slab;
} LeafIter;

/* The next of all leaves, in no order; NULL: that was the last one. */
static Qcow2RefLeaf *next_leaf(LeafIter *it)
{
    for (; it->shard < SHARDS; it->shard++, it->slab = 0) {
        const Slabs *leaves = &it->map->shards[it->shard].leaves;
        for (; it->slab < leaves->slabs->len; it->slab++, it->in_slab = 0) {
            size_t n;
            Qcow2RefLeaf *slab = slabs_get(leaves, it->slab, &n);
            if (it->in_slab < n) {
                return &slab[it->in_slab++];
            }
        }
    }
    return NULL;
}

/* Rows, to be sorted. */
typedef struct RowKey {
    uint64_t number;
    const Row *row;
} RowKey;

static RowKey *collect_rows(const Qcow2RefMap *map, size_t n)
{
    RowKey *keys = g_new(RowKey, n);
    size_t pos = 0;
    for (size_t i = 0; i < SHARDS; i++) {
        const Shard *shard = &map->shards[i];
        for (size_t k = 0; k < shard->nrows; k++) {
            if (shard->rows[k].present) {
                keys[pos++] = (RowKey){shard->rows[k].number, &shard->rows[k]};
            }
        }
    }
    assert(pos == n);
    return keys;
}

/* Sorts by the RADIX_BITS bits from @shift on, keeping the order of what is equal there. */
static void radix_pass(const RowKey *from, RowKey *to, size_t n, unsigned shift)
{
    enum { BUCKETS = 1 << RADIX_BITS };
    size_t starts[BUCKETS + 1] = {0};
    for (size_t i = 0; i < n; i++) {
        starts[(from[i].number >> shift) % BUCKETS + 1]++;
    }
    for (size_t b = 1; b < BUCKETS; b++) {
        starts[b] += starts[b - 1];
    }
    for (size_t i = 0; i < n; i++) {
        to[starts[(from[i].number >> shift) % BUCKETS]++] = from[i];
    }
}

static RowKey *sort_rows(const Qcow2RefMap *map, size_t n)
{
    RowKey *keys = collect_rows(map, n), *other = g_new(RowKey, n);
    uint64_t all = 0;
    for (size_t i = 0; i < n; i++) {
        all |= keys[i].number;
    }
    for (unsigned shift = 0; shift < 64 && all >> shift; shift += RADIX_BITS) {
        radix_pass(keys, other, n, shift);
        RowKey *sorted = other;
        other = keys;
        keys = sorted;
    }
    g_free(other);
    return keys;
}

static GPtrArray *sort_leaves(const Qcow2RefMap *map)
{
    size_t n = 0, pos = 0;
    for (size_t i = 0; i < SHARDS; i++) {
        n += map->shards[i].used_rows;
    }
    g_autofree RowKey *keys = sort_rows(map, n);
    GPtrArray *leaves = g_ptr_array_new();
    g_ptr_array_set_size(leaves, (gint)qcow2_refmap_leaves(map));
    for (size_t i = 0; i < n; i++) {
        const Row *row = keys[i].row;
        size_t in_row = (size_t)__builtin_popcountll(row->present);
        const void *from = in_row > 1 ? (const void *)row->leaves.many : &row->leaves.one;
        memcpy(leaves->pdata + pos, from, in_row * sizeof(gpointer));
        pos += in_row;
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

unsigned qcow2_refleaf_any_flags(const Qcow2RefLeaf *leaf)
{
    unsigned any = 0;
    for (unsigned i = 0; leaf->body && i < QCOW2_REF_LEAF; i++) {
        any |= leaf->body->flags[i];
    }
    return leaf->body ? any : leaf->flags;
}

unsigned qcow2_refleaf_run(const Qcow2RefLeaf *leaf, unsigned slot)
{
    const Qcow2RefBody *body = leaf->body;
    unsigned end = slot + 1;
    if (!body) {
        return QCOW2_REF_LEAF - slot;
    }
    if (!body->wide && slot == 0 && !memcmp(body->narrow, body->narrow + 1, QCOW2_REF_LEAF - 1)) {
        return QCOW2_REF_LEAF;
    }
    while (end < QCOW2_REF_LEAF &&
           qcow2_refleaf_count(leaf, end) == qcow2_refleaf_count(leaf, slot)) {
        end++;
    }
    return end - slot;
}

unsigned qcow2_refleaf_end(const Qcow2RefLeaf *leaf)
{
    unsigned slot = QCOW2_REF_LEAF;
    if (!leaf->body) {
        return leaf->count ? QCOW2_REF_LEAF : 0;
    }
    while (slot > 0 && !qcow2_refleaf_count(leaf, slot - 1)) {
        slot--;
    }
    return slot;
}

uint64_t qcow2_refmap_end(const Qcow2RefMap *map)
{
    uint64_t end = 0;
    LeafIter it = {.map = map};
    for (const Qcow2RefLeaf *leaf; (leaf = next_leaf(&it));) {
        uint64_t first = leaf->index * QCOW2_REF_LEAF;
        unsigned used = first + QCOW2_REF_LEAF > end ? qcow2_refleaf_end(leaf) : 0;
        end = used ? MAX(end, first + used) : end;
    }
    return end;
}

size_t qcow2_refmap_leaves(const Qcow2RefMap *map)
{
    size_t n = 0;
    for (size_t i = 0; i < SHARDS; i++) {
        n += map->shards[i].used_leaves;
    }
    return n;
}
