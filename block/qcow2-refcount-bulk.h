/*
 * Counts of whole trees, changed on all cores and past the cache.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_QCOW2_REFCOUNT_BULK_H
#define BLOCK_QCOW2_REFCOUNT_BULK_H

#include "block/qcow2.h"

/* Host clusters [start, end), in bytes, and how many references come to or go from each of them. */
typedef struct Qcow2Stretch {
    uint64_t start, end;
    int64_t refs;
} Qcow2Stretch;

/*
 * All of these: @list has Qcow2Stretch, sorted, without overlaps, every refs above 0.  Whole node
 * in the range lock.  May block.  -EUCLEAN: a count is not what it should be, or a block is missing
 * or misplaced; who wants to know more, and the image marked corrupt where it is, asks
 * qcow2_judge_refcounts().
 */

/* Can all counts take so many references more? 0, -EUCLEAN if not, or -errno. */
int qcow2_bulk_judge(BlockDriverState *bs, const GArray *list);
/* Raises all counts; in the file, without a barrier: only where a count that is too high does no harm.
 * After a failure they are as they were, or, where that could not be written, too high. */
int qcow2_bulk_raise(BlockDriverState *bs, const GArray *list);
/*
 * Lowers counts by references that no stable pointer leads to any more, of clusters that have others:
 * in the file, without a barrier.  Those whose count is 1 then are appended to @ones (Qcow2HostRun).
 * Nothing is done to clusters that have no others, or whose count is wrong; they are appended to
 * @rest (Qcow2HostRun), once for each reference.  After a failure some are done, and what is in the
 * arrays does not count.
 */
int qcow2_bulk_lower(BlockDriverState *bs, const GArray *list, GArray *ones, GArray *rest);

/* ---- qcow2-tree.c: the same for runs (Qcow2HostRun), which may overlap ---- */

/* Pure: appends a run to @runs, or makes the last one longer where they touch. */
void qcow2_runs_append(GArray *runs, uint64_t offset, uint64_t bytes);

/* qcow2_change_counts(runs, 1) as a qcow2_bulk_raise(), where that can be done. */
int qcow2_raise_counts_at_once(BlockDriverState *bs, const GArray *runs);
/* qcow2_bulk_lower() of all their references. */
int qcow2_lower_shared_counts(BlockDriverState *bs, const GArray *runs, GArray *ones, GArray *rest);

#endif
