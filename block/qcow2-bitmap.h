/*
 * What the files of the bitmap room tell one another.
 *
 *   qcow2-bitmap-dir.c    directory: bytes <-> entries, loading, IN_USE in place, a new directory
 *   qcow2-bitmap-store.c  tables and data: reading, storing
 *   qcow2-bitmap-move.c   all of them to other places, for compaction (qcow2-compact.h)
 *   qcow2-bitmap.c        the operations
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_QCOW2_BITMAP_H
#define BLOCK_QCOW2_BITMAP_H

#include "block/qcow2.h"

/* A bitmap of the directory. */
typedef struct Qcow2Bitmap {
    BlockDriverState *bs;
    uint64_t pos, bytes; /* of its entry in the directory */
    char *name;          /* owned; up to the first NUL */
    bool broken;         /* cannot be understood: carried along as it is */
    uint64_t *table;     /* owned, host order; NULL: not read yet */
    uint32_t table_entries; /* of table[] */
    bool table_unsettled;   /* a store that did not end may have written other entries than table[] */
    BdrvDirtyBitmap *bm; /* the node's; owned */
} Qcow2Bitmap;

struct Qcow2Bitmaps {
    QbMutex lock; /* one change of the directory at a time; held across its I/O and flushes */
    GPtrArray *all; /* Qcow2Bitmap, in the directory's order; changes with the node held */
    bool loaded;     /* the directory is known, or there is none */
    uint8_t *dir;    /* as in the image, whole sectors */
    _Atomic(uint64_t) dir_offset, dir_bytes; /* as the header has them, 0: none */
    QbMutex tables_lock; /* leaf; also for what table[] of a bitmap says, against who reads its bits */
    GArray *tables; /* see qcow2_bitmaps_take_tables(); NULL: none */
};

/* --- qcow2-bitmap.c --- */
/* The driver's bitmaps_check_size(). */
bool qcow2_bitmaps_check_size(BlockDriverState *bs, uint64_t size, GError **errp);

/* --- qcow2-bitmap-dir.c --- */
/* Fields of the entry in the directory. */
uint32_t qcow2_bitmap_flags(const Qcow2Bitmap *q);
uint64_t qcow2_bitmap_table_offset(const Qcow2Bitmap *q);
uint32_t qcow2_bitmap_table_entries(const Qcow2Bitmap *q);
void qcow2_bitmap_free(void *q);
/* Frees all that are listed, with the node's bitmaps. */
void qcow2_bitmaps_forget_all(Qcow2Bitmaps *b);
/* Pure: length of the entry at @entry, of which @left bytes are there; 0: it is cut off. */
uint64_t qcow2_bitmap_entry_bytes(const uint8_t *entry, uint64_t left);
/* Pure: why the entry cannot be used (static text), or NULL. @file_bytes: its table must lie
 * before. */
const char *qcow2_bitmap_entry_problem(const BDRVQcow2State *s, const uint8_t *entry,
                                       uint64_t disk_size, uint64_t file_bytes);
/* Writes those sectors of the directory, as memory has it, that hold fields of @bitmaps; a
 * barrier. */
int qcow2_bitmap_dir_write(BlockDriverState *bs, const GPtrArray *bitmaps);
/*
 * Switches the image to a directory of @nb entries at @dir (@bytes; stolen, room for whole
 * sectors): written to new clusters, made stable, named by the header, the old one freed. With @nb
 * 0 the header names none. Entries of s->bitmaps->all keep their old positions: the caller knows
 * the new.
 */
bool qcow2_bitmap_dir_switch(BlockDriverState *bs, uint8_t *dir, uint64_t bytes, uint32_t nb,
                             GError **errp);
/* The same, to clusters of the caller's at @place, which have count 1; freed on failure. */
bool qcow2_bitmap_dir_switch_at(BlockDriverState *bs, uint8_t *dir, uint64_t bytes, uint32_t nb,
                                uint64_t place, GError **errp);

/* --- qcow2-bitmap-store.c --- */
/* Where the bits of @q come from. */
BdrvDirtySource qcow2_bitmap_source(Qcow2Bitmap *q);
/* Reads and judges the table, once. 0 or -errno (-EINVAL: impossible entries). */
int qcow2_bitmap_read_table(Qcow2Bitmap *q);
/* Frees the clusters of [offset, +bytes) that have one reference: others leak, as somebody else may
 * have them. Nothing in the image refers to them stably any more. */
void qcow2_bitmap_free_clusters(BlockDriverState *bs, uint64_t offset, uint64_t bytes);

#endif
