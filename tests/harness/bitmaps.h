/*
 * What a stored dirty bitmap may say: the oracle of bits (invariant 7).
 *
 * A bitmap tells what has changed since a moment.  So for each sector there are values with which
 * its bit may be clear: those that it had at that moment.  A sector that shows another value must
 * be dirty in each bitmap that is listed without IN_USE.  More may be dirty.
 *
 *      begin X        the bitmap may be as before, or as X leaves it; its bits have to suit one
 *      end            it is as X leaves it
 *
 * Not for several threads.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef TESTS_HARNESS_BITMAPS_H
#define TESTS_HARNESS_BITMAPS_H

#include "tests/harness/oracle.h"

typedef enum BitmapId {
    BITMAP_ENABLED,  /* "b0" of the kinds that have bitmaps */
    BITMAP_DISABLED, /* "b1" */
    BITMAP_BROKEN,   /* "b2": IN_USE, left so by a crash */
    BITMAP_NEW,      /* "b3": not there at first */
    BITMAPS,
} BitmapId;

typedef enum BitmapChange {
    BITMAP_ADD,
    BITMAP_REMOVE,
    BITMAP_CLEAR,
    BITMAP_ENABLE,
    BITMAP_DISABLE,
    BITMAP_MERGE,
} BitmapChange;

typedef struct BitmapOracle {
    Presence presence;
    bool vanishes; /* VIEW_MAYBE, and absent when it settles */
    bool disabled; /* writes leave it alone */
    bool changing; /* it may be as in next, too */
    uint64_t clean[ORACLE_MAX]; /* bit v: clear is right when the sector has value v */
    uint64_t next[ORACLE_MAX];
} BitmapOracle;

const char *bitmap_name(BitmapId id);
/* All absent; newly allocated, [BITMAPS]. */
BitmapOracle *bitmaps_new(void);
BitmapOracle *bitmaps_dup(const BitmapOracle *all); /* NULL is fine */
/* @disk: what the image has now. @from: the source of a merge. */
void bitmaps_begin(BitmapOracle *all, BitmapChange change, BitmapId id, BitmapId from,
                   const Oracle *disk);
/* @ok: it is done; else nobody knows. */
void bitmaps_end(BitmapOracle *all, BitmapId id, bool ok);
/* The disk has got, or lost, the sectors between the two sizes. */
void bitmaps_resize(BitmapOracle *all, unsigned from, unsigned to);
/* Are those that @blk lists right? @whole: none may be IN_USE, but for the one that was so from the
 * beginning. *ret_why (newly allocated) says what is wrong. */
bool bitmaps_check(const BitmapOracle *all, BlockBackend *blk, bool whole, char **ret_why);
/* Is it listed, and consistent? */
bool bitmap_is_usable(BlockBackend *blk, BitmapId id);
bool bitmap_is_listed(BlockBackend *blk, BitmapId id);

#endif
