/*
 * The bits of a dirty bitmap: what dirty-bits.c offers to the core and to drivers that store
 * bitmaps.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_DIRTY_BITS_H
#define BLOCK_DIRTY_BITS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct BdrvDirtyBits BdrvDirtyBits;

/* Bits come and go in pages of this many bytes; a page is the unit of loading and storing. */
#define BDRV_DIRTY_PAGE_BYTES 4096

/* How a stretch of stored bits is known before it is read. */
typedef enum BdrvDirtyStored {
    BDRV_DIRTY_STORED_ZEROES,
    BDRV_DIRTY_STORED_ONES,
    BDRV_DIRTY_STORED_DATA, /* must be read */
} BdrvDirtyStored;

/* Where stored bits come from. Positions are bytes of the stored form: bit k is bit k % 8 of byte
 * k / 8. Both may block; they are called under the bits' lock. 0 or -errno. */
typedef struct BdrvDirtySource {
    /* Once, before the first look at the bits: says by bdrv_dirty_bits_expect() what there is. */
    int (*begin)(BdrvDirtyBits *b, void *opaque);
    int (*read)(void *opaque, uint64_t pos, size_t bytes, uint8_t *buf);
    void *opaque;
} BdrvDirtySource;

/*
 * Bits for @size bytes of disk, all clear, or as @source (may be NULL; copied) has them. Any number
 * of threads may set, reset and look at once; "alone" marks what must not run beside anything else.
 */
BdrvDirtyBits *bdrv_dirty_bits_new(uint64_t size, unsigned granularity_bits,
                                   const BdrvDirtySource *source);
void bdrv_dirty_bits_free(BdrvDirtyBits *b); /* alone; NULL is fine */
/* Only from begin(): positions [@pos, +@bytes) are as stored. Multiples of 512. */
int bdrv_dirty_bits_expect(BdrvDirtyBits *b, uint64_t pos, uint64_t bytes, BdrvDirtyStored stored);

uint64_t bdrv_dirty_bits_size(const BdrvDirtyBits *b); /* of the disk, bytes */
unsigned bdrv_dirty_bits_granularity_bits(const BdrvDirtyBits *b);

/* Byte ranges of the disk; what lies beyond its end is left out. 0, -ENOMEM or an error of
 * reading. */
int bdrv_dirty_bits_set(BdrvDirtyBits *b, uint64_t offset, uint64_t bytes);
int bdrv_dirty_bits_reset(BdrvDirtyBits *b, uint64_t offset, uint64_t bytes); /* whole granules */
/* All clear. Alone. */
int bdrv_dirty_bits_clear(BdrvDirtyBits *b);
/* 1: all of the range is dirty. 0, -errno. */
int bdrv_dirty_bits_covers(BdrvDirtyBits *b, uint64_t offset, uint64_t bytes);
/* Would set() neither read nor wait? Never blocks. @ret_covered: nor change anything. */
bool bdrv_dirty_bits_at_hand(BdrvDirtyBits *b, uint64_t offset, uint64_t bytes, bool *ret_covered);
/* The next dirty extent that begins in [offset, end); cut at @end. 1, 0 or -errno. */
int bdrv_dirty_bits_next(BdrvDirtyBits *b, uint64_t offset, uint64_t end, uint64_t *ret_offset,
                         uint64_t *ret_bytes);
/* Sets in @to all that is dirty in @from; sizes are equal. */
int bdrv_dirty_bits_merge(BdrvDirtyBits *to, BdrvDirtyBits *from);
/* New size; what is new is clear. Nobody sets or looks beyond the smaller size meanwhile. */
int bdrv_dirty_bits_truncate(BdrvDirtyBits *b, uint64_t size);

/* --- for storing: nobody sets or resets meanwhile; positions are multiples of 512 --- */

/* Calls the source's begin() if nobody looked at the bits so far. */
int bdrv_dirty_bits_begin(BdrvDirtyBits *b);
/* What is to be known of positions [@pos, +@bytes) to store them. */
typedef struct BdrvDirtyLook {
    bool changed;   /* something in it, since it was loaded or stored */
    bool unread;    /* part of it was never read */
    bool all_zeroes, all_ones; /* known to be; false when unread */
} BdrvDirtyLook;
BdrvDirtyLook bdrv_dirty_bits_look(BdrvDirtyBits *b, uint64_t pos, uint64_t bytes);
/* The next run of changed pages in [pos, end), cut to it; false when there is none. */
bool bdrv_dirty_bits_next_changed(BdrvDirtyBits *b, uint64_t pos, uint64_t end, uint64_t *ret_pos,
                                  uint64_t *ret_bytes);
/* The stored form of positions that are not unread. */
void bdrv_dirty_bits_serialise(BdrvDirtyBits *b, uint64_t pos, size_t bytes, uint8_t *buf);
/* Everything is stored as it is now. */
void bdrv_dirty_bits_mark_stored(BdrvDirtyBits *b);

#endif
