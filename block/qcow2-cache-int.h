/*
 * The cache of tables from inside: what qcow2-cache.c and qcow2-cache-dirty.c share.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_QCOW2_CACHE_INT_H
#define BLOCK_QCOW2_CACHE_INT_H

#include "block/qcow2.h"

#define NB_SHARDS 16

typedef struct Part Part;

typedef struct Shard {
    QbMutex lock;
    QbCond loaded;
    GHashTable *tables; /* &offset -> Qcow2Table */
    GQueue dirty;       /* of Qcow2Table, by dirty_link */
    GQueue lru[QCOW2_NB_TABLE_KINDS]; /* of Part, by link */
} Shard;

struct Part {
    Qcow2Table *table;
    unsigned index;
    uint8_t *data;    /* readers of refcount blocks look at it under the alloc lock instead */
    bool loading;     /* data belongs to the thread that loads it */
    GQueue *list;     /* the shard's LRU, the table's held or dirty ones; NULL while loading */
    GList link;
    unsigned left_at; /* the cache's tick when it came into the LRU list */
};

struct Qcow2Table {
    /* constant */
    Qcow2Cache *cache;
    Shard *shard;
    uint64_t offset;
    Qcow2TableKind kind;
    size_t part_bytes;
    unsigned nb_parts;
    /* guarded by shard->lock */
    unsigned pins;
    bool poisoned, unlinked;
    uint64_t *dirty;          /* bit per sector */
    unsigned nb_dirty;        /* bits set */
    uint64_t *zero;           /* bit per part: zeroes in the file, and not stored to; NULL: none */
    GList dirty_link;
    GQueue held, dirty_parts; /* of Part */
    unsigned nb_there;
    Part *parts[];            /* NULL: not in memory */
};

struct Qcow2Cache {
    BlockDriverState *bs;
    size_t table_bytes, sector;
    unsigned nb_sectors;
    _Atomic(size_t) l2_part; /* bytes of a part, for L2 tables entered from now on */
    _Atomic(uint64_t) limit[QCOW2_NB_TABLE_KINDS], bytes[QCOW2_NB_TABLE_KINDS];
    _Atomic(uint64_t) dirty_bytes[QCOW2_NB_TABLE_KINDS];
    _Atomic(uint64_t) nb_tables;
    _Atomic(unsigned) tick; /* cleanings */
    uint64_t born;          /* qb_now_ns() */
    _Atomic(bool) cleaned;  /* the background has been told that there are tables */
    Shard shards[NB_SHARDS];
};

/* All under the shard's lock. */
/* Marks the sectors of [pos, pos + len), which is in memory; nothing for a poisoned table. */
void qcow2_table_set_dirty_locked(Qcow2Table *t, size_t pos, size_t len);
void qcow2_table_set_clean_locked(Qcow2Table *t);
/* The last one may free a table that is poisoned, or has nothing in memory. */
void qcow2_table_unpin_locked(Qcow2Table *t);
/* Copies bytes whose parts are in memory or known to be zeroes. */
void qcow2_table_copy_out_locked(const Qcow2Table *t, size_t pos, size_t len, uint8_t *out);

#endif
