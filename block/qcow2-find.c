/*
 * Where this layer decides something: its whole map, read in bulk and on all cores.
 *
 *      L1, a part per core    [ 0 | t | t | 0 | t ][ t | 0 | t | t | t ]
 *                                   |   |       |    |       |   |   |
 *      tables, by the batch       WORDS_AT_ONCE for a look: one of interest?
 *                                   |                        |
 *      ranges of each part    [a, b) [c, d)            [e, f)          then joined, in order
 *
 * Block status answers for one extent at a time, out of the cache.  For those who go over an image of
 * which little is allocated in tables that all exist (a commit, with preallocated metadata), most of
 * that is filling the cache with tables that are not looked at again.
 *
 * Invariants
 *  1. What the layer decides at the time of the call is in a range.  What is in no range it does not
 *     decide.  The reverse does not hold: NEAR_BYTES.
 *  2. An entry or a table that cannot be right counts as something: whoever looks there finds out.
 *  3. Memory is bounded by a range for each NEAR_BYTES of what is asked for.
 *
 * Not done: telling what is in a range.  Block status does.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-io-int.h"

#define WORDS_AT_ONCE 64 /* for one look; what the smallest table has */
#define NEAR_BYTES (INT64_C(1) << 20) /* ranges that are closer to each other are one */

typedef struct Find {
    BlockDriverState *bs;
    uint64_t start, end;
    uint64_t first_table;             /* L1 index */
    GArray *ranges[QCOW2_MAX_PARTS];  /* BdrvRange; NULL: no such part */
} Find;

/* What one thread does of it. */
typedef struct FindPart {
    const Find *find;
    GArray *ranges;
    uint64_t bits[2]; /* bits_of_interest() */
} FindPart;

static void add_range(GArray *ranges, int64_t offset, int64_t bytes)
{
    BdrvRange *last = ranges->len ? &g_array_index(ranges, BdrvRange, ranges->len - 1) : NULL;
    if (last && offset - (last->offset + last->bytes) < NEAR_BYTES) {
        last->bytes = offset + bytes - last->offset;
    } else {
        g_array_append_val(ranges, ((BdrvRange){offset, bytes}));
    }
}

/* Guest bytes [from, to), as far as they were asked for. */
static void add_found(const FindPart *p, uint64_t from, uint64_t to)
{
    from = MAX(from, p->find->start);
    to = MIN(to, p->find->end);
    if (from < to) {
        add_range(p->ranges, (int64_t)from, (int64_t)(to - from));
    }
}

/* The bits, in the order of the file, of which one is set in each entry of interest: in its first word
 * and in its second one, or in any. An entry that has them in what cannot be right is one, too. */
static void bits_of_interest(const BDRVQcow2State *s, uint64_t ret[2])
{
    uint64_t into_cluster = QCOW2_ENTRY_OFFSET_MASK & (s->cluster_size - 1);
    ret[0] = s->has_subclusters ? htobe64(QCOW2_ENTRY_COMPRESSED | into_cluster) : UINT64_MAX;
    ret[1] = UINT64_MAX;
}

/* Has one of the WORDS_AT_ONCE words at @be, the first of which begins an entry, one of the bits? */
static bool any_of_interest(const uint64_t *be, const uint64_t bits[2])
{
    uint64_t even = 0, odd = 0;
    for (unsigned i = 0; i < WORDS_AT_ONCE; i += 2) {
        even |= be[i];
        odd |= be[i + 1];
    }
    return (even & bits[0]) || (odd & bits[1]);
}

/* Entries [first, end) of a table that maps what begins at @base. */
static void find_entries(const FindPart *p, const Qcow2WalkTable *table, uint64_t base, unsigned first,
                         unsigned end)
{
    const BDRVQcow2State *s = qcow2_state(p->find->bs);
    unsigned words = s->l2_entry_size / sizeof(uint64_t);
    for (unsigned i = first; i < end; i++) {
        const uint64_t *be = table->be + (size_t)i * words;
        if ((be[0] & p->bits[0]) || (words > 1 && be[1])) {
            uint64_t guest = base + ((uint64_t)i << s->cluster_bits);
            add_found(p, guest, guest + s->cluster_size);
        }
    }
}

static int find_in_table(const Qcow2WalkTable *table, void *opaque)
{
    const FindPart *p = opaque;
    const BDRVQcow2State *s = qcow2_state(p->find->bs);
    unsigned words = s->l2_entry_size / sizeof(uint64_t), step = WORDS_AT_ONCE / words;
    uint64_t base = table->l1_index << (s->cluster_bits + s->l2_bits);
    if (!table->be) {
        add_found(p, base, base + ((uint64_t)s->l2_entries << s->cluster_bits));
        return 0;
    }
    for (unsigned i = 0; i < s->l2_entries; i += step) {
        if (any_of_interest(table->be + (size_t)i * words, p->bits)) {
            find_entries(p, table, base, i, i + step);
        }
    }
    return 0;
}

static int find_part(uint64_t first, uint64_t end, unsigned part, void *opaque)
{
    Find *f = opaque;
    unsigned shift = qcow2_state(f->bs)->cluster_bits + qcow2_state(f->bs)->l2_bits;
    FindPart p = {.find = f, .ranges = g_array_new(false, false, sizeof(BdrvRange))};
    f->ranges[part] = p.ranges;
    bits_of_interest(qcow2_state(f->bs), p.bits);
    return qcow2_walk_tables(f->bs, NULL, (f->first_table + first) << shift,
                             (f->first_table + end) << shift, find_in_table, &p);
}

/* Ranges of neighbouring parts may be one; what others have put into @ranges before is theirs. */
static void join_parts(Find *f, GArray *ranges)
{
    GArray *all = f->ranges[0];
    for (unsigned i = 1; i < QCOW2_MAX_PARTS && f->ranges[i]; i++) {
        for (guint k = 0; k < f->ranges[i]->len; k++) {
            const BdrvRange *r = &g_array_index(f->ranges[i], BdrvRange, k);
            add_range(all, r->offset, r->bytes);
        }
        g_array_unref(f->ranges[i]);
    }
    g_array_append_vals(ranges, all->data, all->len);
    g_array_unref(all);
}

int qcow2_find_allocated(BlockDriverState *bs, int64_t offset, int64_t bytes, GArray *ranges)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    if (atomic_load(&s->corrupt)) {
        return -ENOMEDIUM;
    }
    Find f = {
        .bs = bs, .start = (uint64_t)offset, .end = (uint64_t)(offset + bytes),
        .first_table = qcow2_l1_index(s, (uint64_t)offset),
    };
    uint64_t tables = qcow2_l1_index(s, f.end - 1) + 1 - f.first_table;
    int ret = qcow2_walk_in_parts(tables, find_part, &f);
    join_parts(&f, ranges);
    return ret;
}
