/*
 * The free-space index: which refcount block may have a run of free clusters of a given length.
 *
 *      longest[]   a segment tree of maxima over the blocks
 *
 *                       8                 find(3): go left where the maximum allows
 *                    /     \
 *                   2       8        <- inner nodes: maximum of the two below
 *                  / \     / \
 *                 2   0   8   3      <- a leaf per refcount block
 *
 *      first[]     per block: no slot below this one is free
 *      seen[]      blocks not looked at yet have longest 0 and are handed out by unseen() in order
 *
 * Invariants
 * 1. A leaf is never smaller than the longest run of free counts in its block (an upper bound): a
 *    search that fails inside a block makes it exact, a free raises it by what may have merged.
 * 2. first[] is never larger than the lowest free slot.
 *
 * So an allocation costs O(log n) here and one scan of one block; nothing is rescanned after a
 * free. All functions are called with the alloc lock held.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-refcount-int.h"

#include <string.h>

struct Qcow2FreeIndex {
    uint64_t nb;       /* blocks */
    uint64_t leaves;   /* power of two >= nb */
    uint32_t *longest; /* 2 * leaves: node i has children 2i and 2i + 1; leaves from [leaves] on */
    uint32_t *first;
    uint8_t *seen;
    uint64_t next_unseen;
    uint64_t unseen_frees; /* frees in blocks not looked at: who looks without the lock looks again */
};

Qcow2FreeIndex *qcow2_free_index_new(void)
{
    Qcow2FreeIndex *ix = g_new0(Qcow2FreeIndex, 1);

    ix->leaves = 1;
    ix->longest = g_new0(uint32_t, 2);
    return ix;
}

void qcow2_free_index_free(Qcow2FreeIndex *ix)
{
    if (ix) {
        g_free(ix->longest);
        g_free(ix->first);
        g_free(ix->seen);
        g_free(ix);
    }
}

static void update_up(Qcow2FreeIndex *ix, uint64_t node)
{
    for (node /= 2; node >= 1; node /= 2) {
        ix->longest[node] = MAX(ix->longest[2 * node], ix->longest[2 * node + 1]);
    }
}

static void set_leaf(Qcow2FreeIndex *ix, uint64_t index, uint32_t longest)
{
    if (ix->longest[ix->leaves + index] != longest) {
        ix->longest[ix->leaves + index] = longest;
        update_up(ix, ix->leaves + index);
    }
}

static void grow_tree(Qcow2FreeIndex *ix, uint64_t nb)
{
    uint64_t leaves = ix->leaves;
    uint32_t *longest;

    while (leaves < nb) {
        leaves *= 2;
    }
    if (leaves == ix->leaves) {
        return;
    }
    longest = g_new0(uint32_t, 2 * leaves);
    memcpy(longest + leaves, ix->longest + ix->leaves, ix->nb * sizeof(uint32_t));
    for (uint64_t node = leaves - 1; node >= 1; node--) {
        longest[node] = MAX(longest[2 * node], longest[2 * node + 1]);
    }
    g_free(ix->longest);
    ix->longest = longest;
    ix->leaves = leaves;
}

void qcow2_free_index_resize(Qcow2FreeIndex *ix, uint64_t nb)
{
    if (nb <= ix->nb) {
        return;
    }
    grow_tree(ix, nb);
    ix->first = g_renew(uint32_t, ix->first, nb);
    ix->seen = g_renew(uint8_t, ix->seen, nb);
    memset(ix->first + ix->nb, 0, (nb - ix->nb) * sizeof(uint32_t));
    memset(ix->seen + ix->nb, 0, nb - ix->nb);
    ix->nb = nb;
}

void qcow2_free_index_set(Qcow2FreeIndex *ix, uint64_t index, uint64_t longest, uint64_t first)
{
    assert(index < ix->nb);
    ix->seen[index] = 1;
    ix->first[index] = (uint32_t)first;
    set_leaf(ix, index, (uint32_t)longest);
}

void qcow2_free_index_freed(Qcow2FreeIndex *ix, uint64_t index, uint64_t slot, uint64_t n,
                            uint64_t limit)
{
    uint64_t bound;

    assert(index < ix->nb);
    ix->first[index] = (uint32_t)MIN(ix->first[index], slot);
    if (ix->seen[index]) {
        bound = 2 * (uint64_t)ix->longest[ix->leaves + index] + n;
        set_leaf(ix, index, (uint32_t)MIN(bound, limit));
    } else {
        ix->unseen_frees++;
    }
}

void qcow2_free_index_raise_first(Qcow2FreeIndex *ix, uint64_t index, uint64_t first)
{
    ix->first[index] = (uint32_t)MAX(ix->first[index], first);
}

uint64_t qcow2_free_index_first(const Qcow2FreeIndex *ix, uint64_t index)
{
    return ix->first[index];
}

bool qcow2_free_index_seen(const Qcow2FreeIndex *ix, uint64_t index)
{
    return index < ix->nb && ix->seen[index];
}

uint64_t qcow2_free_index_find(const Qcow2FreeIndex *ix, uint64_t n)
{
    uint64_t node = 1;

    assert(n > 0);
    if (n > UINT32_MAX || ix->longest[1] < n) {
        return UINT64_MAX;
    }
    while (node < ix->leaves) {
        node = 2 * node + (ix->longest[2 * node] < n);
    }
    return node - ix->leaves;
}

uint64_t qcow2_free_index_unseen_from(const Qcow2FreeIndex *ix, uint64_t from)
{
    while (from < ix->nb && ix->seen[from]) {
        from++;
    }
    return from < ix->nb ? from : UINT64_MAX;
}

uint64_t qcow2_free_index_unseen(Qcow2FreeIndex *ix)
{
    uint64_t next = qcow2_free_index_unseen_from(ix, ix->next_unseen);

    ix->next_unseen = MIN(next, ix->nb); /* blocks stay seen: they are not looked at again */
    return next;
}

uint64_t qcow2_free_index_unseen_frees(const Qcow2FreeIndex *ix)
{
    return ix->unseen_frees;
}
