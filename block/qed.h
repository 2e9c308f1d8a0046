/*
 * The QED driver's private header: a map of its rooms.
 *
 *     qed-header.c     bytes <-> struct, rules; pure     qed-header-io.c  the header on disk
 *     qed-page.c       pieces of tables in memory        qed-table.c      guest offset -> entry
 *     qed-space.c      a set of clusters; pure           qed-alloc.c      free space, freeing
 *     qed-flush.c      the order in which memory becomes disk
 *     qed-read.c, qed-write.c, qed-zero.c                guest requests
 *     qed-walk.c, qed-check.c                            all tables in bulk; check and repair
 *     qed-create.c, qed-truncate.c, qed.c                whole images
 *
 * The tables are the only authority on what is in use: there are no reference counts.  Free space
 * is what no table refers to, found by a walk over all tables before the first allocation.
 *
 * Invariants of a writable image (cited as "QED n"; docs/interop/qed.md explains them):
 *  1. A stable table entry points to something whose content is stable: an entry is written after
 *     a barrier that follows what it points to.  So a crash leaves leaks at most.
 *  2. A cluster is reused, punched or cut away only when no stable entry refers to it and nobody
 *     who may have seen such an entry still uses it.
 *  3. The need-check bit is stable before an operation whose interruption someone has to clean up
 *     (a shrink), and is cleared when that is done.  Plain writes do not need it, because of 1.
 *  4. The header's first sector changes in one write, nothing else in it changed.  A name that does
 *     not fit there is stable before the sector that names it.
 *  5. An image found inconsistent is not written to until it has been repaired.
 *
 * Locks: header_lock, then lock (a leaf; see block/locks.h).  I/O happens under header_lock alone.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_QED_H
#define BLOCK_QED_H

#include <assert.h>
#include "block/driver.h"
#include "block/qed-format.h"
#include "util/checked.h"
#include "util/endian.h"
#include "util/error.h"
#include "util/thread.h"

typedef struct BDRVQedState BDRVQedState;

/* The header in host byte order. */
typedef struct QedHeader {
    uint32_t cluster_size, table_size, header_size; /* bytes, clusters, clusters */
    uint64_t features, compat_features, autoclear_features;
    uint64_t l1_offset, image_size;
    uint32_t backing_offset, backing_size;
} QedHeader;

/* A piece of a table in memory. */
typedef struct QedPage QedPage;
/* A set of cluster numbers. */
typedef struct QedSpace QedSpace;

/* On the stack of a request that acts on what it reads in the tables. */
typedef struct QedUser {
    struct QedUser *prev, *next;
    uint64_t seq;
} QedUser;

struct BDRVQedState {
    /* --- set at open, constant until close --- */
    BlockDriverState *bs;
    uint64_t cluster_size;
    unsigned cluster_bits;
    uint64_t table_bytes;
    unsigned table_bits;    /* log2 of the entries of a table */
    size_t page_bytes;      /* divides table_bytes */
    unsigned page_bits;     /* log2 of the entries of a page */
    uint64_t data_start;    /* bytes before the first regular cluster */
    uint64_t l1_offset;

    /* --- the header; held across the header's own I/O --- */
    QbMutex header_lock;
    QedHeader header;
    _Atomic(bool) autoclear_pending; /* unknown autoclear bits are to be cleared before a change */
    _Atomic(bool) corrupt;           /* QED 5: all further changes fail */
    _Atomic(uint64_t) image_size;    /* header.image_size, for readers without the lock */
    _Atomic(uint64_t) file_length;   /* the file is at least that long; see qed_in_file() */

    /* --- one lock for all that follows; never held across I/O --- */
    QbMutex lock;
    QbCond changed;

    struct { /* qed-page.c */
        GHashTable *by_offset; /* uint64_t* -> QedPage */
        GQueue lru;            /* all pages in it, the next one to go first */
        GPtrArray *dirty;
    } pages;
    struct { /* qed-alloc.c */
        QedSpace *used;        /* NULL: not built yet */
        bool busy;             /* being built, or the file is being cut: no allocation meanwhile */
        bool releasing;        /* clusters between quarantine and free: the set is not built */
        GArray *quarantine;    /* QedFreed, in the order they were freed */
        uint64_t waiting;      /* bytes in it */
        bool freed;            /* something came free since the file was cut last */
        QedUser *first, *last; /* users in the order of seq */
        uint64_t next_seq;
        unsigned waiters;
    } space;
    struct { /* qed-flush.c */
        struct QedFlushRound *next;
        bool running;
        uint64_t generation;   /* ended by the next flush */
    } flush;
};

static inline BDRVQedState *qed_state(BlockDriverState *bs)
{
    return bs->opaque;
}
static inline uint64_t qed_start_of_cluster(const BDRVQedState *s, uint64_t offset)
{
    return qb_align_down(offset, s->cluster_size);
}
static inline uint64_t qed_round_up(const BDRVQedState *s, uint64_t offset)
{
    return qb_align_up(offset, s->cluster_size); /* guest and file offsets are below 2^63 */
}
static inline uint64_t qed_l1_index(const BDRVQedState *s, uint64_t guest)
{
    return guest >> (s->cluster_bits + s->table_bits);
}
static inline uint64_t qed_l2_index(const BDRVQedState *s, uint64_t guest)
{
    return (guest >> s->cluster_bits) & ((UINT64_C(1) << s->table_bits) - 1);
}
/* Guest bytes from @guest to the end of what its L2 table, or its page of it, maps. */
static inline uint64_t qed_to_table_end(const BDRVQedState *s, uint64_t guest)
{
    uint64_t span = UINT64_C(1) << (s->cluster_bits + s->table_bits);
    return span - (guest & (span - 1));
}
static inline uint64_t qed_to_page_end(const BDRVQedState *s, uint64_t guest)
{
    uint64_t span = UINT64_C(1) << (s->cluster_bits + s->page_bits);
    return span - (guest & (span - 1));
}

/* ======================= qed-header.c: pure ======================= */

/* @buf: QED_HEADER_BYTES. False with EINVAL when it is no QED header at all. */
bool qed_header_decode(const uint8_t *buf, QedHeader *ret, GError **errp);
void qed_header_encode(const QedHeader *h, uint8_t *buf);
/* All rules on the fields of an image whose file is @file_length bytes long. */
bool qed_header_validate(const QedHeader *h, uint64_t file_length, GError **errp);
/* The largest disk such an image can have, at most INT64_MAX rounded down to sectors. */
uint64_t qed_max_image_size(uint64_t cluster_size, uint64_t table_size);
bool qed_cluster_size_valid(uint64_t cluster_size);
bool qed_table_size_valid(uint64_t table_size);
static inline uint64_t qed_header_table_bytes(const QedHeader *h)
{
    return (uint64_t)h->cluster_size * h->table_size;
}

/* ======================= qed-header-io.c ======================= */

/* Reads and validates the header of bs->file into s->header. */
bool qed_header_load(BlockDriverState *bs, GError **errp);
/* The backing file name, "" for none; newly allocated. NULL and error when it cannot be read. */
char *qed_header_read_name(BlockDriverState *bs, GError **errp);
/* Changes fields in ONE write of the first sector (QED 4), stable on return. @fn edits a copy that
 * becomes s->header when that has worked. Takes header_lock. 0 or -errno. */
int qed_header_update(BlockDriverState *bs, void (*fn)(QedHeader *h, void *opaque), void *opaque);
/* Sets or clears the need-check bit; no write when it is that already. */
int qed_set_need_check(BlockDriverState *bs, bool set);
bool qed_needs_check(BDRVQedState *s);
/* The gate in front of every change: 0, -EIO on an image that must not be changed (QED 5), or the
 * -errno of clearing unknown autoclear bits, which is done once. No lock held. */
int qed_begin_change(BlockDriverState *bs);
/* Writes another backing name ("" for none) and whether it is raw. ENOSPC: no room
 * for the switch. */
bool qed_change_backing_file(BlockDriverState *bs, const char *file, const char *fmt,
                             GError **errp);

/* ======================= qed-page.c: pieces of tables in memory ======================= */

void qed_pages_init(BDRVQedState *s);
void qed_pages_free(BDRVQedState *s); /* asserts that nothing is pinned; dirty ones are lost */
/* Pins the page at file offset @offset (a multiple of page_bytes from the start of its table),
 * reading it if needed. Blocks: no lock held. 0 or -errno. */
int qed_page_get(BDRVQedState *s, uint64_t offset, QedPage **ret);
void qed_page_put(QedPage *page); /* NULL is fine; takes the lock */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(QedPage, qed_page_put)
/* The table it is a part of was freed since it was pinned: look again from L1. */
bool qed_page_gone_locked(const QedPage *page);
uint64_t qed_page_entry_locked(const QedPage *page, unsigned index);
/* Stores an entry; the sector becomes dirty. Not on a page that is gone. */
void qed_page_set_locked(QedPage *page, unsigned index, uint64_t entry);
/* [offset, +bytes) no longer holds a table: its pages are never written again and never found. */
void qed_pages_drop_locked(BDRVQedState *s, uint64_t offset, uint64_t bytes);
/* Copies what pages in memory hold of [offset, +bytes) over @buf, which was read from the file. */
void qed_pages_overlay(BDRVQedState *s, uint64_t offset, size_t bytes, uint8_t *buf);
/* Enough is dirty to write it back without being asked. */
bool qed_pages_too_dirty(BDRVQedState *s);

/* A run of dirty sectors, copied to be written. */
typedef struct QedPiece {
    QedPage *page; /* pinned */
    uint64_t offset;
    size_t bytes;
    uint8_t *data; /* owned */
} QedPiece;
/* Moves all dirty sectors into @pieces; the pages are clean then. */
void qed_pages_collect_locked(BDRVQedState *s, GArray *pieces);
/* Lets go of @pieces; after a failure their sectors are dirty as before. Takes the lock. */
void qed_pages_return(BDRVQedState *s, GArray *pieces, bool failed);

/* ======================= qed-table.c: guest offset -> entry ======================= */

typedef enum QedType {
    QED_UNALLOCATED, /* the backing file shows */
    QED_ZERO,
    QED_DATA,
} QedType;

/* A stretch of guest bytes of one type; host bytes contiguous where there are any. */
typedef struct QedMapping {
    QedType type;
    uint64_t guest, bytes;
    uint64_t host; /* of @guest, for QED_DATA */
} QedMapping;

/* Maps [guest, +bytes) as far as one type and one host run go, over several tables if need be. The
 * caller is a user (below), or keeps all changes away. 0, -EINVAL on an entry that points outside
 * the file or into the header, or -errno of reading. Blocks. */
int qed_lookup(BlockDriverState *bs, uint64_t guest, uint64_t bytes, QedMapping *ret);
/* The same for those who only want to know. */
int qed_lookup_as_user(BlockDriverState *bs, uint64_t guest, uint64_t bytes, QedMapping *ret);
/* How far from @guest on, at most @bytes, L1 names no table. May be 0. Negative: -errno. */
int64_t qed_unmapped_by_l1(BlockDriverState *bs, uint64_t guest, uint64_t bytes);
/*
 * Changes the entries of the @n clusters from @guest on, which lie in one page: the i-th becomes
 * @first + i * @step.  Frees the data clusters that lose their entry.  Makes the L2 table if there
 * is none, unless the entries become 0 anyway.  The guest range is serialised, no lock held, not a
 * user. 0 or -errno with nothing changed.
 */
int qed_change(BlockDriverState *bs, uint64_t guest, uint64_t n, uint64_t first, uint64_t step);
/* Makes the L2 table for @guest if there is none, so that it lies before what is allocated next,
 * which may be cut off again. As qed_change(). */
int qed_need_table(BlockDriverState *bs, uint64_t guest);
/* Frees the L2 table of @l1_index, whose entries are all 0. Its guest range is serialised. */
int qed_drop_table(BlockDriverState *bs, uint64_t l1_index);
/* Sets one entry of the table at @table to 0 without freeing anything, for repair. */
int qed_clear_entry(BlockDriverState *bs, uint64_t table, uint64_t index);
/* Is [offset, +bytes) behind the header and inside the file? Asks for the file's length if
 * needed. */
bool qed_in_file(BDRVQedState *s, uint64_t offset, uint64_t bytes);

/* ======================= qed-space.c: a set of clusters; pure ======================= */

/* Memory is bounded by the clusters in the set, not by their numbers. Not locked. */
QedSpace *qed_space_new(void);
void qed_space_free(QedSpace *sp);
/* Adds [first, +n); how many of them were in it already. */
uint64_t qed_space_add(QedSpace *sp, uint64_t first, uint64_t n);
void qed_space_remove(QedSpace *sp, uint64_t first, uint64_t n);
bool qed_space_has(const QedSpace *sp, uint64_t index);
uint64_t qed_space_count(const QedSpace *sp);
/* One more than the highest cluster in it, 0 when it is empty. */
uint64_t qed_space_end(QedSpace *sp);
/* The lowest run of at least @min clusters that are not in it; *ret_n: its length, at most @max. */
uint64_t qed_space_find(const QedSpace *sp, uint64_t min, uint64_t max, uint64_t *ret_n);
/* Clusters from @first on, at most @max, that are not in it. */
uint64_t qed_space_gap(const QedSpace *sp, uint64_t first, uint64_t max);

/* ======================= qed-alloc.c: users, allocation, freeing ======================= */

void qed_alloc_init(BDRVQedState *s);
void qed_alloc_free(BDRVQedState *s); /* asserts that nobody uses anything */
/* begin: before tables are read; end: when what was found there is no longer used. In between the
 * caller waits for no other request. */
void qed_user_begin(BDRVQedState *s, QedUser *u);
void qed_user_end(BDRVQedState *s, QedUser *u);
/* Waits past all users there are. The caller is none and holds no lock. */
void qed_wait_for_users(BDRVQedState *s);

/* Finds out what is in use, unless that is known. 0, -EIO when the tables contradict each other
 * (then nothing may be changed: QED 5), or -errno of reading. Blocks: not a user, no lock held. */
int qed_know_space(BlockDriverState *bs);
/* Takes between @min and *n clusters in one run: at @want (0: anywhere) if that is free and does
 * not make the file longer, else at the lowest place; *n becomes their number. Host offset or
 * -errno. Nothing refers to them yet. Blocks: not a user, no lock held. */
int64_t qed_alloc(BlockDriverState *bs, uint64_t want, uint64_t min, uint64_t *n);
/* Gives back what qed_alloc() returned and nothing ever referred to. */
void qed_alloc_undo(BlockDriverState *bs, uint64_t offset, uint64_t n);
/* [offset, +bytes) lost its entries in memory: it comes free after the next flush (QED 2). */
void qed_free_locked(BDRVQedState *s, uint64_t offset, uint64_t bytes);
/* Called by the flusher when all that was freed before generation @gen ended is stably unlinked. */
void qed_release(BlockDriverState *bs, uint64_t gen);
/* More waits to come free than should. */
bool qed_freed_too_much(BDRVQedState *s);
/* Flushes if that can bring space back; true when it has. For those who met -ENOSPC, once. */
bool qed_reclaim(BlockDriverState *bs);
/* Cuts the file behind the last cluster in use; devices stay as they are. 0 or -errno. */
int qed_cut_file(BlockDriverState *bs);
/* Forgets which space is free; it is found again when needed. Whole node in the range lock. */
void qed_space_forget(BDRVQedState *s);

/* ======================= qed-flush.c ======================= */

/* Makes stable all that was done before the call; see its essay. Not a user, no lock held. */
int qed_flush(BlockDriverState *bs);
/* Flushes when more than enough waits for it. */
int qed_relieve(BlockDriverState *bs);

/* ======================= qed-walk.c: all tables in bulk ======================= */

/* Entries of an L2 table, or a part of it, in file order of tables. */
typedef struct QedWalkPiece {
    uint64_t l1_index, table; /* its L1 entry, and where it is in the file */
    uint64_t first;           /* index of le[0] */
    size_t n;
    const uint64_t *le;       /* little-endian; NULL: not readable */
    int error;                /* -errno then */
} QedWalkPiece;
typedef struct QedWalker {
    /* An L1 entry that is not 0. 1: read the table; 0: leave it out; or -errno to stop. */
    int (*table)(uint64_t l1_index, uint64_t entry, void *opaque);
    int (*piece)(const QedWalkPiece *piece, void *opaque); /* 0, or -errno to stop */
    int (*l1_error)(uint64_t l1_index, int error, void *opaque); /* a part of L1 is not readable */
    void *opaque;
} QedWalker;
/* Calls @w for all of L1. Entries change only from data to something else meanwhile, and such
 * changes may be missed. */
int qed_walk(BlockDriverState *bs, const QedWalker *w);

/* ======================= requests ======================= */

/* A guest transfer: the vector, and the guest offset of the byte at @qiov_offset. */
typedef struct QedIo {
    BlockDriverState *bs;
    BDRVQedState *s;
    IoVector *qiov;
    size_t qiov_offset;
    uint64_t base;
} QedIo;
static inline size_t qed_io_pos(const QedIo *io, uint64_t guest)
{
    return io->qiov_offset + (size_t)(guest - io->base);
}

/* qed-read.c */
int qed_preadv(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
               IoVector *qiov, size_t qiov_offset, int flags);
int qed_block_status(BlockDriverState *bs, int64_t offset, int64_t bytes, BdrvStatus *ret);
/* Reads as a guest would, also beyond the end of the disk. Not a user. */
int qed_read_guest(const QedIo *io, uint64_t guest, uint64_t bytes);
/* 1 when the range reads as zeroes and no write in place can change that, 0 when not, or -errno. */
int qed_reads_zero(BlockDriverState *bs, uint64_t guest, uint64_t bytes);

/* qed-write.c */
int qed_pwritev(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                IoVector *qiov, size_t qiov_offset, int flags);
/* Writes from where @io has it; the caller has the clusters to itself, or gives its request. */
int qed_write_guest(const QedIo *io, BdrvRequest *req, uint64_t guest, uint64_t bytes);

/* qed-zero.c */
int qed_pwrite_zeroes(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                      int flags);
int qed_pdiscard(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes);
/* Makes all entries from cluster-aligned @guest on 0, to the end of what the tables can map, and
 * gives back tables of which nothing is left. What was never mapped costs a look at L1. From
 * @guest on the range is serialised. 0 or -errno. */
int qed_drop_beyond(BlockDriverState *bs, uint64_t guest);
/* Makes [guest, +bytes), whole clusters, read as zeroes even where a backing file is below it. */
int qed_hide_range(BlockDriverState *bs, uint64_t guest, uint64_t bytes);

/* ======================= whole images ======================= */

extern const QbOptDesc qed_create_opts[];
bool qed_create(const char *filename, json_t *options, QbProgress *progress, GError **errp);
/* qed-truncate.c */
bool qed_truncate(BlockDriverState *bs, int64_t offset, bool exact, PreallocMode prealloc,
                  bool zero_new, GError **errp);
bool qed_make_empty(BlockDriverState *bs, GError **errp);
/* Ends a shrink that a crash interrupted: gives back what lies beyond the end. 0 or -errno. */
int qed_finish_shrink(BlockDriverState *bs);
/* qed-check.c */
bool qed_check(BlockDriverState *bs, const BdrvCheckOptions *opts, BdrvCheckResult *result,
               GError **errp);

#endif
