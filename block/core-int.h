/*
 * What the files of the block core tell one another and nobody else.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_CORE_INT_H
#define BLOCK_CORE_INT_H

#include "block/block-backend.h"
#include "block/driver.h"
#include "util/error.h"

/* --- registry.c --- */
/* The table in order of registration. */
unsigned bdrv_driver_count(void);
const BlockDriver *bdrv_driver_at(unsigned i);
/* True when @filename begins with "proto:" and is not a plain name. */
bool bdrv_has_protocol_prefix(const char *filename);

/* --- image.c --- */
/* A node taken for one operation: drained, the graph lock shared, the whole node in the range lock.
 * Not inside a request, not under the graph lock. */
typedef struct BdrvHold {
    BlockDriverState *bs;
    BdrvRequest req;
} BdrvHold;
void bdrv_hold_begin(BdrvHold *h, BlockDriverState *bs);
void bdrv_hold_end(BdrvHold *h);

/* --- probe.c --- */
#define BDRV_PROBE_BYTES 2048
/* Looks at the first bytes of @file and returns the best format, raw when none knows them; NULL and
 * error when they cannot be read. */
const BlockDriver *bdrv_probe_format(BlockDriverState *file, const char *filename, GError **errp);

/* --- node.c --- */
/* A new node: registered by name (@node_name NULL: "#blockN"), nothing opened, one reference. */
BlockDriverState *bdrv_new_node(const BlockDriver *drv, const char *node_name, GError **errp);
/* A new reference to the node named @name, or NULL and error. */
BlockDriverState *bdrv_ref_node(const char *name, GError **errp);

/* --- graph.c: edges; every change of a pointer in the graph is here --- */
/*
 * Serialises functions that change the graph or permissions.  Taken after a drain and before the
 * graph lock.  Who holds it may follow graph pointers, because a writer of them holds both this
 * and the exclusive graph lock.  File locks are taken under it, guest I/O is not.
 */
extern QbMutex bdrv_graph_change_lock;

/*
 * Makes @bs a child of @parent, or the root of @blk (exactly one of them is not NULL), and settles
 * permissions below.  Steals the caller's reference to @bs, also on failure.  Neither lock held.
 */
typedef struct BdrvAttach {
    BlockDriverState *parent;
    BlockBackend *blk;
    const char *name;
    int role;
    unsigned perm, shared; /* of a root; a node's edges get theirs from child_perm */
} BdrvAttach;
BdrvChild *bdrv_attach(const BdrvAttach *at, BlockDriverState *bs, GError **errp);
/* Takes the edge out and frees it; its reference to the node returned is now the caller's. */
BlockDriverState *bdrv_unlink_child(BdrvChild *child);
/* The child that holds the node's own data and metadata ("file"), or NULL. Graph change lock or graph
 * lock held, unless the node is being opened. */
BdrvChild *bdrv_primary_child(const BlockDriverState *bs);
/* The node below filters. Locks as above. */
BlockDriverState *bdrv_skip_filters(BlockDriverState *bs);

/* --- refresh.c: what a node derives from its children --- */
/* Recomputes bs->bl from the children and the driver. No request may be in flight. */
void bdrv_refresh_limits(BlockDriverState *bs);
/* Recomputes bs->filename. */
void bdrv_refresh_filename(BlockDriverState *bs);
/* Those options of @bs that decide what it shows; new reference. */
json_t *bdrv_strong_options(const BlockDriverState *bs);
/* Asks the driver for the length and remembers it: the length or -errno. */
int64_t bdrv_refresh_length(BlockDriverState *bs);

/*
 * Quiescing, the part that is about parents.  quiesce() and unquiesce() count at @bs, at all nodes
 * above it and at their BlockBackends (a parent attached in between inherits the count); new requests
 * then wait in blk_begin_request().  wait_idle() returns when none is left of those that were begun.
 * Both take the graph lock shared by themselves; the caller must not be inside a request.
 */
void bdrv_parents_quiesce(BlockDriverState *bs);
void bdrv_parents_unquiesce(BlockDriverState *bs);
void bdrv_parents_wait_idle(BlockDriverState *bs);

/* --- perm.c --- */
/* Settles permissions of @bs and below after its parents changed: checks all, then sets all, or
 * leaves everything as it was. Graph change lock held, here and below. */
bool bdrv_settle_perms(BlockDriverState *bs, GError **errp)
    QB_REQUIRES(bdrv_graph_change_lock);
/* The same in steps, for a set of nodes: all of @roots and below, parents before children. */
GPtrArray *bdrv_nodes_below(GPtrArray *roots);
bool bdrv_check_perms(GPtrArray *nodes, GError **errp) /* false: everything is as it was */
    QB_REQUIRES(bdrv_graph_change_lock);
void bdrv_commit_perms(GPtrArray *nodes)
    QB_REQUIRES(bdrv_graph_change_lock);

/* --- backend.c --- */
/* Counts a request; waits while @blk is quiesced. Never under the graph lock. */
void blk_begin_request(BlockBackend *blk);
/* The same for who must not wait: false while @blk is quiesced. */
bool blk_try_begin_request(BlockBackend *blk);
void blk_end_request(BlockBackend *blk);
/* A reference unless the last one is gone already. */
bool blk_try_ref(BlockBackend *blk);
/* Used by graph.c for bdrv_parents_*. */
void blk_quiesce(BlockBackend *blk);
void blk_unquiesce(BlockBackend *blk);
void blk_wait_idle(BlockBackend *blk);

/*
 * A request of @blk that another thread may carry out.  draw() checks it and gives it its place in the
 * order of the node; run() does it, once.  Both with the request counted in @blk and the graph lock
 * held shared, by an entry that lasts from the one to the other.
 */
typedef struct BlkDrawn {
    BlockBackend *blk;
    BlkOp op;
    int64_t offset, bytes;
    IoVector *qiov;
    int flags;
    BdrvRequest req; /* private, as the next one */
    int failed;
} BlkDrawn;
void blk_draw(BlkDrawn *d);
int blk_run_drawn(BlkDrawn *d);
/* 0, or what is wrong with a request as such. The graph lock held shared. */
int blk_check_request(BlockBackend *blk, BlkOp op, int64_t offset, int64_t bytes);
/* @flags and what the cache mode adds to a write. */
int blk_write_flags(const BlockBackend *blk, int flags);

/* --- io.c: what backend.c and image.c need of requests --- */
/*
 * A request whose place in the order of its node is drawn before it runs.  draw(): in the thread that
 * submits, with the graph lock held shared; the range is valid (qb_range_valid).  The BlockBackend's
 * count keeps the graph above the node from changing until exactly one bdrv_*_drawn() has run, in any
 * thread, with the graph lock held shared; that call ends the request.
 */
void bdrv_request_draw(BdrvChild *child, BdrvRequest *req, BdrvRequestType type, int64_t offset,
                       int64_t bytes);
int bdrv_preadv_drawn(BdrvChild *child, BdrvRequest *req, int64_t offset, int64_t bytes,
                      IoVector *qiov, int flags);
int bdrv_pwritev_drawn(BdrvChild *child, BdrvRequest *req, int64_t offset, int64_t bytes,
                       IoVector *qiov, int flags);
int bdrv_pwrite_zeroes_drawn(BdrvChild *child, BdrvRequest *req, int64_t offset, int64_t bytes,
                             int flags);
int bdrv_pdiscard_drawn(BdrvChild *child, BdrvRequest *req, int64_t offset, int64_t bytes);
/*
 * True when the node was at least @end long when it was last asked.  Spares the question: who makes
 * a node shorter sets the cached length before new requests come in, and a file that was cut behind
 * our back answers reads with zeroes and writes by growing, whenever it was asked.
 */
bool bdrv_known_to_reach(const BlockDriverState *bs, int64_t end);
/* Takes the whole node in the range lock (BDRV_TRACKED_WHOLE); graph lock held shared. */
void bdrv_request_begin_whole(BlockDriverState *bs, BdrvRequest *req);
void bdrv_request_end_whole(BdrvRequest *req);

#endif
