/*
 * What the files that carry guest requests through a qcow2 image tell one another.
 *
 *   qcow2-io.c        entries of reads and writes, VM state
 *     qcow2-read.c      look up, pin, read, fill; block status
 *     qcow2-find.c      where anything is, in bulk
 *     qcow2-cow.c       writes that allocate: plan, copy, write, link
 *     qcow2-compress.c  compressed clusters
 *     qcow2-discard.c   discard and zero
 *     qcow2-prealloc.c  mapping in advance
 *     qcow2-map.c       the fast lane
 *     qcow2-map-fresh.c   its writes that allocate
 *       qcow2-link.c      changes L2 entries
 *       qcow2-cluster.c   reads L2 entries
 *
 * Who reads entries is announced (qcow2_user_announce()) meanwhile; who changes them is not, and
 * has the guest range serialised.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_QCOW2_IO_INT_H
#define BLOCK_QCOW2_IO_INT_H

#include <inttypes.h>
#include "block/qcow2.h"
#include "block/qcow2-requests.h"

/* Beside 0 and -errno: what was looked at has changed, begin again. No I/O returns it. */
#define QCOW2_STALE 2

/* A guest transfer. The pieces of it are named by guest ranges; the vector follows from them. */
typedef struct Qcow2Io {
    BlockDriverState *bs;
    BDRVQcow2State *s;
    BdrvRequest *req;   /* NULL: the caller keeps others away by itself */
    IoVector *qiov;
    size_t qiov_offset; /* of the byte for guest offset @base */
    uint64_t base;
    bool first_fit;     /* space is short: the lowest free clusters, not those that follow */
} Qcow2Io;

static inline size_t qcow2_io_pos(const Qcow2Io *io, uint64_t guest)
{
    return io->qiov_offset + (size_t)(guest - io->base);
}

/* --- qcow2-cluster.c: pure functions on entries --- */

/* Has the entry a host cluster? With an external data file offset 0 counts when COPIED is set. */
bool qcow2_entry_has_host(const BDRVQcow2State *s, Qcow2L2Entry e);
static inline bool qcow2_entry_is_compressed(Qcow2L2Entry e)
{
    return e.entry & QCOW2_ENTRY_COMPRESSED;
}
static inline uint64_t qcow2_entry_host(Qcow2L2Entry e)
{
    return e.entry & QCOW2_ENTRY_OFFSET_MASK;
}
/* May the host cluster be written in place? True for all of an external data file. */
bool qcow2_entry_copied(const BDRVQcow2State *s, Qcow2L2Entry e);
static inline bool qcow2_entry_equal(Qcow2L2Entry a, Qcow2L2Entry b)
{
    return a.entry == b.entry && a.bitmap == b.bitmap;
}
/* Entry <-> l2_entry_size bytes as they stand in a table. */
Qcow2L2Entry qcow2_entry_decode(const BDRVQcow2State *s, const void *raw);
void qcow2_entry_encode(const BDRVQcow2State *s, Qcow2L2Entry e, void *raw);
/* Subclusters of @e from @sc on that are of one type, which goes to *ret. */
unsigned qcow2_entry_run(const BDRVQcow2State *s, Qcow2L2Entry e, unsigned sc,
                         Qcow2ClusterType *ret);
/* How many of the @max entries at @raw, as they stand in a table, continue the first one: one type in
 * all of them, host clusters one behind the other. At least 1. If the first one is possible, all are. */
unsigned qcow2_entries_alike(const BDRVQcow2State *s, const void *raw, unsigned max);
/* What @e says of [guest, end), as far as its cluster and one type go. */
Qcow2Mapping qcow2_entry_mapping(const BDRVQcow2State *s, Qcow2L2Entry e, uint64_t guest,
                                 uint64_t end);
/* Appends @next to @m if it continues it (same type, host bytes contiguous) or @m is empty. */
bool qcow2_mapping_extend(Qcow2Mapping *m, const Qcow2Mapping *next);
static inline bool qcow2_type_is_zero(Qcow2ClusterType type)
{
    return type == QCOW2_ZERO_PLAIN || type == QCOW2_ZERO_ALLOC;
}
static inline bool qcow2_type_is_unallocated(Qcow2ClusterType type)
{
    return type == QCOW2_UNALLOCATED || type == QCOW2_UNALLOCATED_ALLOC;
}

/* --- qcow2-cluster.c: entries of the active tables --- */

/* 0, or -EIO with the image marked corrupt when @e is impossible. It stands at @index in the table
 * at @l2_offset and maps @guest. No mutex held. */
int qcow2_entry_judge(BlockDriverState *bs, Qcow2L2Entry e, uint64_t guest, uint64_t l2_offset,
                      unsigned index);
/* Judges an L1 entry; 0 or -EIO. */
int qcow2_l1_entry_judge(BlockDriverState *bs, uint64_t l1_entry, uint64_t l1_index);
/* Reads the @n entries from cluster-aligned @guest on, possibly of several tables, all judged. The
 * caller is announced, or keeps all changes away. Blocks on cache misses. */
int qcow2_load_entries(BlockDriverState *bs, uint64_t guest, size_t n, Qcow2L2Entry *ret);
/* Length of the stretch from @guest on, at most @bytes, for which L1 names no table. May be 0. */
uint64_t qcow2_unmapped_by_l1(const BDRVQcow2State *s, uint64_t guest, uint64_t bytes);
/* Like qcow2_lookup(), but -EAGAIN rather than waiting for a table. */
int qcow2_lookup_nowait(BlockDriverState *bs, uint64_t guest, uint64_t bytes, Qcow2Mapping *ret);

/* --- qcow2-link.c --- */

/* A change of the map: @n entries from @guest on were @old and shall be @new. */
typedef struct Qcow2Change {
    uint64_t guest; /* cluster aligned */
    size_t n;
    const Qcow2L2Entry *old, *new;
    Qcow2DiscardType type; /* for host clusters that lose their reference */
} Qcow2Change;
/*
 * Stores the entries that differ, table by table, making or copying L2 tables as needed, and then
 * frees what @old referred to and @new does not.  0; QCOW2_STALE: an entry is no longer what @old
 * says; or -errno.  *ret_done: entries from the first on that are done; of a table all or none.
 * The guest range is serialised; no lock held, not announced.
 */
int qcow2_link(BlockDriverState *bs, const Qcow2Change *change, size_t *ret_done);
/* Frees what @n entries refer to, contiguous host clusters as one run. */
void qcow2_free_entries(BlockDriverState *bs, const Qcow2L2Entry *e, size_t n,
                        Qcow2DiscardType type);
/* Pins the table that the active L1 names at @l1_index, and tells the entry; none: NULL. Announced
 * while it loads, so that its cluster does not become something else before it is read. */
int qcow2_get_active_table(BlockDriverState *bs, uint64_t l1_index, uint64_t *ret_entry,
                           Qcow2Table **ret);
/* The same for some entries of it: the rest may be in the file only. */
typedef struct Qcow2EntryRange {
    unsigned index;
    size_t n;
} Qcow2EntryRange;
/* Pins entries of the table that @l1_entry, read from @l1_index while announced, names. QCOW2_STALE: L1
 * names another one by now. -EIO: the entry is impossible, and the image marked. */
int qcow2_pin_entries(BlockDriverState *bs, uint64_t l1_index, uint64_t l1_entry, Qcow2EntryRange r,
                      Qcow2Table **ret);
int qcow2_get_active_entries(BlockDriverState *bs, uint64_t l1_index, Qcow2EntryRange r,
                             uint64_t *ret_entry, Qcow2Table **ret);
/* Takes the whole table @l1_index out of the active L1 and frees it with all that it refers to. Its
 * guest range is serialised; no lock held, not announced. */
int qcow2_drop_table(BlockDriverState *bs, uint64_t l1_index, Qcow2DiscardType type);
/* The active table @l1_index goes from its own cluster @from to @to, which nothing refers to yet; the old
 * one is freed. 0, QCOW2_STALE: it is not there, or not alone; or -errno. No lock held, not announced. */
int qcow2_move_table(BlockDriverState *bs, uint64_t l1_index, uint64_t from, uint64_t to,
                     Qcow2DiscardType type);
/* Writes metadata back when more waits than should. 0 or -errno. No lock held, not announced. */
int qcow2_relieve(BlockDriverState *bs);

/* --- qcow2-read.c --- */

/* Reads [guest, +bytes) to where @io has it; beyond the end of the disk as well. Not announced. */
int qcow2_read_guest(const Qcow2Io *io, uint64_t guest, uint64_t bytes);
/* 1 when all of the range reads as zeroes and no write in place can change that (no mapped cluster
 * is in it), 0 when not or not known, or -errno. Not announced. */
int qcow2_reads_zero(BlockDriverState *bs, uint64_t guest, uint64_t bytes);

/* --- qcow2-cow.c --- */

/* Writes [guest, +bytes) from where @io has it; serialises the request when it must allocate. */
int qcow2_write_guest(const Qcow2Io *io, uint64_t guest, uint64_t bytes);
/* Serialises @req over the whole clusters it touches; does nothing for one that is, or for NULL. */
void qcow2_serialise(BDRVQcow2State *s, BdrvRequest *req);

/* --- qcow2-compress.c --- */

/* A compressed run of a read: read while the caller is announced, unpacked afterwards. */
typedef struct Qcow2Stream {
    Qcow2Mapping map;                 /* part of one compressed cluster */
    uint8_t *data;                    /* owned: the stream */
    struct Qcow2Unpacked *cluster;    /* owned reference: the cluster, had from the cache */
    uint64_t generation;              /* of the cache when the stream was read */
} Qcow2Stream;
/* Announced. 0, or -errno with nothing left to clear. */
int qcow2_streams_read(BlockDriverState *bs, Qcow2Stream *streams, size_t n);
/* Not announced: waits for workers. Fills @io's vector. */
int qcow2_streams_unpack(const Qcow2Io *io, Qcow2Stream *streams, size_t n);
void qcow2_streams_clear(Qcow2Stream *streams, size_t n);
/* Other streams are going to lie in [host, +bytes): what is known of those that lay there is dropped. */
void qcow2_streams_forget(BDRVQcow2State *s, uint64_t host, uint64_t bytes);
/* Moves the stream of a compressed cluster, found by a walk, to another place. Whole node in the
 * range lock, not announced. */
int qcow2_move_stream(BlockDriverState *bs, const Qcow2Mapping *m);

/* --- qcow2-map-fresh.c --- */

typedef struct Qcow2FreshWrite Qcow2FreshWrite;
/* For qcow2_map(): maps a write of all of [guest, +bytes) to clusters that nothing refers to yet.
 * -EAGAIN, with nothing changed but the range lock, where that would wait or copy. Not announced. */
int qcow2_map_fresh(BlockDriverState *bs, BlkQueue *queue, uint64_t guest, uint64_t bytes,
                    BdrvMapping *mapping, Qcow2FreshWrite **ret_write);
/* Links what was written, or gives it back, and frees @w; map_done's result. */
int qcow2_map_fresh_done(BlockDriverState *bs, Qcow2FreshWrite *w, int result);

#endif
