/*
 * What a guest may find on its disk: for every sector the values that are legal now.
 *
 * The disk is written in sectors of 512 bytes, each filled with its own number and a value of 1 to
 * 63; value 0 is a sector of zeroes.  So a sector that shows the content of another one is seen at
 * once, and so is one that is torn.
 *
 *      write v        the sector may have v, besides what it may have already
 *      doubt          (a request failed) nobody knows which it has, until it is written again
 *      settle         (a flush is complete) each sector has the value it was given last, no other
 *
 * Not for several threads.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef TESTS_HARNESS_ORACLE_H
#define TESTS_HARNESS_ORACLE_H

#include "block/block-backend.h"

#define ORACLE_SECTOR 512
#define ORACLE_VALUES 64
#define ORACLE_MAX 16384 /* sectors */

/* Of a view, a snapshot, a bitmap. */
typedef enum Presence { VIEW_ABSENT, VIEW_MAYBE, VIEW_PRESENT } Presence;

typedef struct Oracle {
    unsigned sectors, other_sectors; /* the legal sizes; the first is that if all went well */
    uint64_t allowed[ORACLE_MAX];    /* bit v: the sector may have value v */
    uint8_t now[ORACLE_MAX];         /* what it has if all went well */
    bool doubt[ORACLE_MAX];          /* settling does not narrow it */
    bool doubt_size;
} Oracle;

/* All zeroes. */
void oracle_init(Oracle *o, unsigned sectors);
void oracle_write(Oracle *o, unsigned first, unsigned n, unsigned value);
/* The disk becomes what @from is now: each sector may have the old or the new value. */
void oracle_merge(Oracle *o, const Oracle *from);
/* The size may be either; a grown part reads zero. */
void oracle_resize(Oracle *o, unsigned sectors);
void oracle_doubt(Oracle *o, unsigned first, unsigned n);
/* Of all sectors, and of the size. */
void oracle_doubt_all(Oracle *o);
void oracle_settle(Oracle *o);
/* Of some sectors only, and not of the size. */
void oracle_settle_part(Oracle *o, unsigned first, unsigned n);
/* What @blk shows, which must be legal, is what the disk has from now on. */
bool oracle_learn(Oracle *o, BlockBackend *blk, char **ret_why);
/* Is everything that @blk shows legal? *ret_why (newly allocated) says what is not. */
bool oracle_check(const Oracle *o, BlockBackend *blk, char **ret_why);

/* @n sectors of @value to @buf. */
void oracle_fill(uint8_t *buf, unsigned first, unsigned n, unsigned value);
/* The value that @sector has by its content in @buf; -1 when it is none of its own. */
int oracle_value(const uint8_t *buf, unsigned sector);

#endif
