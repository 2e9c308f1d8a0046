/*
 * What qcow2-refcount.c, qcow2-reftable.c and qcow2-alloc.c share: the alloc lock's inner
 * functions.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_QCOW2_REFCOUNT_INT_H
#define BLOCK_QCOW2_REFCOUNT_INT_H

#include "block/qcow2.h"

/* Counts per refcount block, and the block and slot of a host cluster. */
static inline uint64_t qcow2_counts_per_block(const BDRVQcow2State *s)
{
    return UINT64_C(1) << s->refblock_bits;
}
static inline uint64_t qcow2_block_of(const BDRVQcow2State *s, uint64_t cluster)
{
    return cluster >> s->refblock_bits;
}
static inline uint64_t qcow2_slot_of(const BDRVQcow2State *s, uint64_t cluster)
{
    return cluster & (qcow2_counts_per_block(s) - 1);
}

/* ---- qcow2-reftable.c ---- */

/* Host offset of refcount block @index, 0: there is none. */
uint64_t qcow2_block_offset_locked(const BDRVQcow2State *s, uint64_t index)
    QB_REQUIRES(s->alloc_lock);
/*
 * Pins block @index, which exists.  If it is not in memory the alloc lock is let go for loading it,
 * and *dropped becomes true: what was looked at before may have changed.  0 or -errno.
 */
int qcow2_pin_block_locked(BDRVQcow2State *s, uint64_t index, Qcow2Table **ret, bool *dropped)
    QB_REQUIRES(s->alloc_lock);
/*
 * Makes blocks for @blocks_from onwards, so that they cover themselves, a larger refcount table if
 * one is needed, and @clusters more; all that in one run of clusters none of which has a count. 
 * Counts of all of it become 1.  Host offset of the @clusters, or -errno with nothing changed:
 * -ENOSPC when it would not lie below host cluster @limit, or the file has no space for blocks and
 * table.  0: the alloc lock was let go to reserve that, look for free clusters once more; @reserved,
 * empty at first, tells the next call.
 */
int64_t qcow2_append_blocks_locked(BDRVQcow2State *s, uint64_t blocks_from, uint64_t clusters,
                                   uint64_t limit, Qcow2HostRun *reserved)
    QB_REQUIRES(s->alloc_lock);

/* ---- qcow2-refcount.c ---- */

/* Pure: how many counts from @slot on, at least 1 and at most @max, are the same; *ret_count says
 * which. @data is a block with counts of @order. */
uint64_t qcow2_equal_counts(const uint8_t *data, unsigned order, uint64_t slot, uint64_t max,
                            uint64_t *ret_count);
/* Pure: @n counts from @slot on become @value. */
void qcow2_fill_counts(uint8_t *data, unsigned order, uint64_t slot, uint64_t n, uint64_t value);
/* Sets @n counts from @slot on, and tells the free-space index. Pinned block. */
void qcow2_set_counts_locked(BDRVQcow2State *s, Qcow2Table *t, uint64_t index, uint64_t slot,
                             uint64_t n, uint64_t value) QB_REQUIRES(s->alloc_lock);

/* ---- qcow2-free-index.c: where runs of free clusters may be ---- */

/* Makes room for @nb blocks; new ones are "not looked at". */
void qcow2_free_index_resize(Qcow2FreeIndex *ix, uint64_t nb);
/* Block @index has been looked at: no run longer than @longest, no free slot below @first. */
void qcow2_free_index_set(Qcow2FreeIndex *ix, uint64_t index, uint64_t longest, uint64_t first);
/* @n clusters from @slot on became free; runs may have merged. @limit: counts per block. */
void qcow2_free_index_freed(Qcow2FreeIndex *ix, uint64_t index, uint64_t slot, uint64_t n,
                            uint64_t limit);
/* Everything below @first turned out to be used. */
void qcow2_free_index_raise_first(Qcow2FreeIndex *ix, uint64_t index, uint64_t first);
/* First slot that may be free. */
uint64_t qcow2_free_index_first(const Qcow2FreeIndex *ix, uint64_t index);
/* The first block that may have a run of @n; UINT64_MAX: none of those looked at. */
uint64_t qcow2_free_index_find(const Qcow2FreeIndex *ix, uint64_t n);
/* The next block not looked at; UINT64_MAX: none. */
uint64_t qcow2_free_index_unseen(Qcow2FreeIndex *ix);
/* The same, not before @from. */
uint64_t qcow2_free_index_unseen_from(const Qcow2FreeIndex *ix, uint64_t from);
/* Rises whenever a cluster of a block not looked at becomes free. */
uint64_t qcow2_free_index_unseen_frees(const Qcow2FreeIndex *ix);
bool qcow2_free_index_seen(const Qcow2FreeIndex *ix, uint64_t index);

#endif
