/*
 * What the files that move clusters towards the front of the image tell one another.
 *
 *   qcow2-compact-plan.c   what is to move, and where to: counts, references, places
 *   qcow2-compact-copy.c   content: from here to there, holes stay holes
 *   qcow2-compact-parts.c  snapshots' table and bitmaps' directory, with what they name
 *   qcow2-compact.c        moves it, step by step
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_QCOW2_COMPACT_H
#define BLOCK_QCOW2_COMPACT_H

#include "block/qcow2-io-int.h"

/* What moves in one way; in the order in which it does. */
typedef enum Qcow2MoveKind {
    QCOW2_MOVE_ENTRIES,  /* guest data and streams: all L2 entries that name the clusters change */
    QCOW2_MOVE_TABLE,    /* an L2 table of the active L1 */
    QCOW2_MOVE_BLOCK,    /* a refcount block */
    QCOW2_MOVE_L1,       /* the active L1 */
    QCOW2_MOVE_REFTABLE,
    QCOW2_MOVE_SNAPSHOTS, /* parts: the table of snapshots, their L1s, L2 tables of one */
    QCOW2_MOVE_BITMAPS,   /* parts: the directory of bitmaps, their tables and data */
} Qcow2MoveKind;

/* A reference to host clusters [cluster, +n). */
typedef struct Qcow2MoveRef {
    uint64_t cluster;
    uint64_t where; /* entries: index in L1, or offset of the L2 table of a snapshot; table, block:
                     * its index */
    uint32_t n;
    uint32_t index; /* entries: in the L2 table */
    uint8_t kind;   /* Qcow2MoveKind */
    bool detached;  /* entries: of a snapshot */
} Qcow2MoveRef;

/* A host cluster in use at or behind the floor. */
typedef struct Qcow2MoveCluster {
    uint64_t cluster;
    uint32_t count, found; /* references by its refcount, and those that were found */
    uint8_t kind;          /* of those */
    bool joined;           /* something lies in it and the next one */
    bool stuck;            /* and does not move */
} Qcow2MoveCluster;

/* Clusters in a row that move as one. */
typedef struct Qcow2MoveUnit {
    uint64_t from, to;   /* cluster numbers; to 0: it stays */
    uint64_t n;
    guint first_cluster; /* in clusters[] */
    guint first_ref, nb_refs; /* in refs[] */
    uint8_t kind;
} Qcow2MoveUnit;

/* Host clusters [first, +n) of one count. */
typedef struct Qcow2MoveUse {
    uint64_t first, n;
    uint64_t count; /* 0: not in use, but there is no refcount block for them */
} Qcow2MoveUse;

typedef struct Qcow2MovePlan {
    BlockDriverState *bs;
    BDRVQcow2State *s;
    const GArray *spare; /* borrowed; Qcow2HostRun, sorted: free but for their count */
    GArray *uses;        /* Qcow2MoveUse, sorted */
    GArray *blocks;      /* Qcow2MoveRef: the refcount blocks there are */
    GArray *clusters;    /* Qcow2MoveCluster, sorted */
    GArray *refs;        /* Qcow2MoveRef, sorted by cluster */
    GArray *parts;       /* Qcow2Part, of snapshots and bitmaps */
    GArray *units;       /* Qcow2MoveUnit, by kind, then by place */
    GArray *gaps;        /* Qcow2MoveUse: places to move to, sorted */
    uint64_t used;       /* clusters, without those of spare */
    uint64_t now;        /* end of what is used */
    uint64_t floor;      /* where the file could end */
    uint64_t end;        /* where it will end; all in clusters */
} Qcow2MovePlan;

void qcow2_move_plan_init(Qcow2MovePlan *p, BlockDriverState *bs, const GArray *spare);
void qcow2_move_plan_clear(Qcow2MovePlan *p);
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Qcow2MovePlan, qcow2_move_plan_clear)
/* Fills it in. Nothing is changed, and others may change things meanwhile: what it says must be
 * looked at again when they are kept away. Reads the tables only if there is something to move. 0
 * or -errno. */
int qcow2_move_plan_make(Qcow2MovePlan *p);

/* Pure: the host clusters that @e names, as cluster and n of @ref; false: none. */
bool qcow2_move_ref_of_entry(const BDRVQcow2State *s, Qcow2L2Entry e, Qcow2MoveRef *ref);

/* Bytes to copy inside the file. */
typedef struct Qcow2MoveCopy {
    uint64_t from, to, bytes;
} Qcow2MoveCopy;
typedef struct Qcow2Copier Qcow2Copier;
/* NULL: no memory. */
Qcow2Copier *qcow2_copier_new(BlockDriverState *bs);
void qcow2_copier_free(Qcow2Copier *c); /* NULL is fine */
/* Copies all of @list (Qcow2MoveCopy); no two ranges overlap. What are holes become holes, unless
 * @storage: then they become zeroes that have their storage. 0 or -errno. */
int qcow2_copier_run(Qcow2Copier *c, const GArray *list, bool storage);

/* --- qcow2-compact-parts.c --- */

/* A part of what one header field names: snapshots, or bitmaps. A whole number of clusters. */
typedef struct Qcow2Part {
    uint64_t offset, bytes;
    guint parent; /* index of the part that names it, which is smaller; of the first: itself */
} Qcow2Part;

/* Pure: bytes of the parts before @end that move because a part that they name lies behind it. */
uint64_t qcow2_parts_taken_along(const GArray *parts, uint64_t end);

/* An order to move parts, and what becomes of it. */
typedef struct Qcow2PartsMove {
    const GArray *places; /* Qcow2MoveCopy, sorted by from: parts, with their content copied; the
                           * new places have count 1 and are the mover's, also on failure */
    GArray *extra;        /* the same, of parts that are written anew because of these */
    guint found;          /* of places */
    uint64_t (*more)(void *opaque, uint64_t bytes); /* a place for those; 0: there is none */
    void *opaque;
    Qcow2DiscardType type; /* of the old places */
} Qcow2PartsMove;

/* Where the part goes; 0: it stays. Once for each part. */
uint64_t qcow2_parts_place(Qcow2PartsMove *m, uint64_t offset, uint64_t bytes);
/* The same for a part that is written anew in any case, so it needs a place; 0: there is none. */
uint64_t qcow2_parts_renew(Qcow2PartsMove *m, uint64_t offset, uint64_t bytes);
/* Has each place got its part? */
bool qcow2_parts_all_found(const Qcow2PartsMove *m);
/* Frees all old places (@moved) or all new ones, but that of the first part, which begins at @first
 * (0: that, too). They are free with the next flush. */
void qcow2_parts_done(BlockDriverState *bs, const Qcow2PartsMove *m, bool moved, uint64_t first);

/*
 * Of the room of snapshots (qcow2-snapshot-move.c) and that of bitmaps (qcow2-bitmap-move.c).
 *
 * parts: appends what can be moved, with all that names it, to @parts (Qcow2Part); nothing where
 * that is not known.  What lies before @floor and names no part is left out.
 * move: does what @m says. What names a moved part is written anew, and one write of the header
 * switches to that. Flushes. 0; QCOW2_STALE: nothing has moved, as @m does not fit what there is
 * now or there is no place for what names it; or -errno: likewise.  Nobody changes the parts
 * meanwhile; for snapshots the whole node is in the range lock.
 */
void qcow2_snapshots_parts(BlockDriverState *bs, uint64_t floor, GArray *parts);
int qcow2_snapshots_move(BlockDriverState *bs, Qcow2PartsMove *m);
void qcow2_bitmaps_parts(BlockDriverState *bs, uint64_t floor, GArray *parts);
int qcow2_bitmaps_move(BlockDriverState *bs, Qcow2PartsMove *m);

/* qcow2-snapshot-table.c: writes @list as the table of snapshots, to the clusters at @place, and
 * switches to it; the old one is freed.  The list in memory stays as it is.  On failure the clusters
 * are. */
bool qcow2_snapshots_rewrite(BlockDriverState *bs, const GArray *list, uint64_t place,
                             GError **errp);
/* Clusters that the table takes when it is written, in bytes; 0: it cannot be written. */
uint64_t qcow2_snapshots_room(const BDRVQcow2State *s);

/*
 * Moves what lies at the end of the image file into free clusters before it, and into those of @spare (see
 * qcow2_quarantine_take(); it takes out what it uses).  *ret_end: where what is in use ends when empty
 * refcount blocks have been dropped, too; UINT64_MAX: not known.  Guest requests go on.  0 or -errno:
 * then some of it may have been moved, and the image is as good as before.
 */
int qcow2_compact(BlockDriverState *bs, GArray *spare, uint64_t *ret_end);
/* Gives back the space of free clusters from @start to @end. */
void qcow2_punch_free(BlockDriverState *bs, uint64_t start, uint64_t end);

#endif
