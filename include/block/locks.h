/*
 * The order of locks, in one place.  A thread that holds a lock may take only locks further down.
 *
 *   1. drain            (a counter, not a mutex: new requests wait at the BlockBackend)
 *   -  graph change lock  one change of edges or permissions at a time (block/graph.c); taken after a
 *                       drain and never under the graph lock.  Locks of files are taken under it
 *   2. graph lock       shared: from the outermost call of a request to its end; nested calls and
 *                       workers acting for the request borrow its entry.  exclusive: pointer switches
 *                       only; no I/O, no waiting, no join under it
 *   3. range lock       of a node, then of the nodes below it (taken and released inside one graph
 *                       entry); holds no mutex while it is held
 *                       A truncation that moves clusters takes the range before its own, too, by short
 *                       pieces, with its own ticket (bdrv_truncate_pause_writes())
 *   4. qcow2: snapshot/truncate/empty/amend need the whole node in the range lock
 *   -  qcow2 bitmaps lock   Qcow2Bitmaps.lock: one change of stored bitmaps or their directory at a time.
 *                           Held across I/O, flushes and allocations; its holder is not announced
 *   5. qcow2 metadata lock  BDRVQcow2State.lock: changes of L1 and L2.  Never across data I/O,
 *                           never across a cache miss
 *   6. qcow2 alloc lock     BDRVQcow2State.alloc_lock: refcounts and the free-space index.  Never
 *                           across I/O
 *   7. qcow2 cache lock     inside qcow2-cache.c
 *   8. file grow lock       shared by writes that end beyond the known end of a file, exclusive for
 *                           growth by ftruncate; held across that one operation (block/file-io.c)
 *   9. leaf locks           in-flight table, quarantine list, worker pool queue, blkdebug rules,
 *                           range lock's own mutex, BlockBackend's counters, a file's flush rounds
 *                           and data extent, the one lock of a QED image (BDRVQedState.lock)
 *
 * A qcow2 flush is a turn, not a mutex: a flag under a leaf lock says that one runs, others wait for
 * the next round.  Nobody waits for it while holding 5..9 or announced in the in-flight table.
 *
 * Held across I/O, on purpose: the qcow2 bitmaps lock, the lock of a bitmap's bits while they are
 * read (block/dirty-bits.c; taken where no lock from 5 on is held), the header locks of qcow2 and QED
 * (BDRVQcow2State.header_lock, taken before 5, and BDRVQedState.header_lock; for the one sector they
 * write, QED's for a long name, too), the file grow lock, and the graph change lock (locks of files).
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_LOCKS_H
#define BLOCK_LOCKS_H

#include <stdbool.h>
#include "util/thread.h"

/* The graph lock.  Entries nest per thread; only the outermost one touches shared memory. */
void bdrv_graph_rdlock(void);
void bdrv_graph_rdunlock(void);
/* Waits for all readers; the caller must not hold an entry.  Pointer switches only. */
void bdrv_graph_wrlock(void);
void bdrv_graph_wrunlock(void);
/* True when this thread may follow graph pointers (an entry of its own, borrowed, or exclusive). */
bool bdrv_graph_held(void);
/* A worker that acts for a request whose thread holds an entry and waits for the worker. */
void bdrv_graph_borrow(void);
void bdrv_graph_return(void);
/*
 * An entry that belongs to a request and not to a thread: pinned where the request is submitted (may
 * wait for a writer), unpinned by whoever ends it.  Threads that work for it in between borrow.  Who
 * draws a ticket needs one before: a worker that first had to get past a waiting writer would keep
 * others, who hold entries, waiting for its ticket.
 */
typedef unsigned BdrvGraphPin;
BdrvGraphPin bdrv_graph_pin(void);
/* The same for who must not wait: false while a writer is there. */
bool bdrv_graph_try_pin(BdrvGraphPin *ret);
void bdrv_graph_unpin(BdrvGraphPin pin);

static inline void bdrv_graph_guard_leave(int *held)
{
    if (*held) {
        bdrv_graph_rdunlock();
    }
}
static inline int bdrv_graph_guard_enter(void)
{
    bdrv_graph_rdlock();
    return 1;
}
#define BDRV_GRAPH_GUARD()                                                                         \
    __attribute__((cleanup(bdrv_graph_guard_leave), unused)) int bdrv_graph_guard_ =               \
        bdrv_graph_guard_enter()

#endif
