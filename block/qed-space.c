/*
 * A set of clusters: which are in use, or which a check has seen.
 *
 *     chunks:  number / 2048 -> { 2048 bits, how many are set }      absent: none is set
 *     hint:    all clusters below it are in the set
 *
 * Chunks exist only where something is in the set, so that a file that claims to be huge, or tables
 * that point far apart, cost no more memory than their own size.
 *
 * Invariants
 *  1. Every chunk has at least one bit set, and counts them rightly.
 *  2. No cluster below the hint is outside of the set.
 *  3. The end is looked for only after the highest cluster was removed.
 *
 * A search looks at one chunk after the other from the hint on.  A full terabyte of 64 KiB
 * clusters has 8192 of them.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qed.h"

#define CHUNK_BITS 11
#define CHUNK_CLUSTERS (UINT64_C(1) << CHUNK_BITS)
#define WORDS (CHUNK_CLUSTERS / 64)

typedef struct Chunk {
    uint64_t number;
    unsigned count;
    uint64_t bits[WORDS];
} Chunk;

struct QedSpace {
    GHashTable *chunks; /* uint64_t* -> Chunk, owned */
    uint64_t hint;
    uint64_t count;
    uint64_t end; /* one more than the highest in the set, when end_known */
    bool end_known;
};

QedSpace *qed_space_new(void)
{
    QedSpace *sp = g_new0(QedSpace, 1);
    sp->chunks = g_hash_table_new_full(g_int64_hash, g_int64_equal, NULL, g_free);
    return sp;
}

void qed_space_free(QedSpace *sp)
{
    if (sp) {
        g_hash_table_unref(sp->chunks);
        g_free(sp);
    }
}

static Chunk *chunk_of(const QedSpace *sp, uint64_t index)
{
    uint64_t number = index >> CHUNK_BITS;
    return g_hash_table_lookup(sp->chunks, &number);
}

static Chunk *make_chunk(QedSpace *sp, uint64_t index)
{
    Chunk *c = chunk_of(sp, index);
    if (!c) {
        c = g_new0(Chunk, 1);
        c->number = index >> CHUNK_BITS;
        g_hash_table_insert(sp->chunks, &c->number, c);
    }
    return c;
}

static bool bit(const Chunk *c, uint64_t index)
{
    unsigned pos = index & (CHUNK_CLUSTERS - 1);
    return c->bits[pos / 64] >> (pos % 64) & 1;
}

static void flip(Chunk *c, uint64_t index)
{
    unsigned pos = index & (CHUNK_CLUSTERS - 1);
    c->bits[pos / 64] ^= UINT64_C(1) << (pos % 64);
}

uint64_t qed_space_add(QedSpace *sp, uint64_t first, uint64_t n)
{
    uint64_t already = 0;
    for (uint64_t i = first; i < first + n; i++) {
        Chunk *c = make_chunk(sp, i);
        if (bit(c, i)) {
            already++;
        } else {
            flip(c, i);
            c->count++;
        }
    }
    sp->count += n - already;
    sp->end = MAX(sp->end, first + n);
    if (first <= sp->hint && sp->hint < first + n) {
        sp->hint = first + n;
    }
    return already;
}

void qed_space_remove(QedSpace *sp, uint64_t first, uint64_t n)
{
    for (uint64_t i = first; i < first + n; i++) {
        Chunk *c = chunk_of(sp, i);
        if (!c || !bit(c, i)) {
            continue;
        }
        flip(c, i);
        sp->count--;
        if (--c->count == 0) {
            g_hash_table_remove(sp->chunks, &c->number);
        }
    }
    sp->hint = n ? MIN(sp->hint, first) : sp->hint;
    sp->end_known = sp->end_known && first + n < sp->end;
}

bool qed_space_has(const QedSpace *sp, uint64_t index)
{
    const Chunk *c = chunk_of(sp, index);
    return c && bit(c, index);
}

uint64_t qed_space_count(const QedSpace *sp)
{
    return sp->count;
}

static uint64_t chunk_end(const Chunk *c)
{
    unsigned word = WORDS - 1;
    while (!c->bits[word]) { /* invariant 1 */
        word--;
    }
    unsigned top = 64 - (unsigned)__builtin_clzll(c->bits[word]);
    return (c->number << CHUNK_BITS) + word * 64 + top;
}

uint64_t qed_space_end(QedSpace *sp)
{
    GHashTableIter it;
    const Chunk *last = NULL, *c;
    if (!sp->end_known) {
        g_hash_table_iter_init(&it, sp->chunks);
        while (g_hash_table_iter_next(&it, NULL, (void **)&c)) {
            last = !last || c->number > last->number ? c : last;
        }
        sp->end = last ? chunk_end(last) : 0;
        sp->end_known = true;
    }
    return sp->end;
}

/* The first cluster from @index on that is not in the set. */
static uint64_t next_outside(const QedSpace *sp, uint64_t index)
{
    const Chunk *c;
    while ((c = chunk_of(sp, index))) {
        if (c->count == CHUNK_CLUSTERS) {
            index = (c->number + 1) << CHUNK_BITS;
        } else if (bit(c, index)) {
            index++;
        } else {
            break;
        }
    }
    return index;
}

uint64_t qed_space_gap(const QedSpace *sp, uint64_t first, uint64_t max)
{
    uint64_t n = 0;
    while (n < max) {
        const Chunk *c = chunk_of(sp, first + n);
        if (!c) {
            n += CHUNK_CLUSTERS - ((first + n) & (CHUNK_CLUSTERS - 1));
        } else if (!bit(c, first + n)) {
            n++;
        } else {
            break;
        }
    }
    return MIN(n, max);
}

uint64_t qed_space_find(const QedSpace *sp, uint64_t min, uint64_t max, uint64_t *ret_n)
{
    assert(min > 0 && min <= max);
    uint64_t first = next_outside(sp, sp->hint);
    uint64_t n = qed_space_gap(sp, first, max);
    while (n < min) {
        first = next_outside(sp, first + n);
        n = qed_space_gap(sp, first, max);
    }
    *ret_n = n;
    return first;
}
