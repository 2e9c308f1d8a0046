/*
 * The qcow2 driver's private header: a map of its rooms.
 *
 * Each banner names the file that owns what follows; nobody reaches into another room's fields.
 *
 *   guest request                                        what it may wait for
 *     qcow2-io.c       announce -> lookup -> data I/O -> link -> leave
 *     qcow2-cluster.c  mapping: L1 -> L2 -> entries      metadata lock
 *     qcow2-walk.c     the only loop over tables
 *     qcow2-alloc.c    where is space                    alloc lock
 *     qcow2-refcount.c counts in bulk                    alloc lock
 *     qcow2-cache.c    tables in memory                  cache lock
 *     qcow2-l1.c       the L1 table in memory            its rwlock
 *     qcow2-inflight.c who uses which host run
 *     qcow2-quarantine.c freed, not yet reusable
 *     qcow2-flush.c    the order in which memory becomes disk
 *
 * Life of a host cluster:
 *
 *     free --alloc--> allocated --link--> mapped --unlink (entry changed)--> quarantined
 *      ^                  |                                                     |
 *      `----- undo -------'            flush made the unlink stable, users left |
 *      `------------------------------------------------------------------------'
 *
 * Numbers in comments (invariant N) are those of docs/devel/invariants.md.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_QCOW2_H
#define BLOCK_QCOW2_H

#include <assert.h>
#include "block/driver.h"
#include "block/qcow2-format.h"
#include "util/checked.h"
#include "util/endian.h"
#include "util/error.h"
#include "util/thread.h"

typedef struct BDRVQcow2State BDRVQcow2State;
typedef struct Qcow2Cache Qcow2Cache;
typedef struct Qcow2Table Qcow2Table;
typedef struct Qcow2FreeIndex Qcow2FreeIndex;
typedef struct Qcow2Inflight Qcow2Inflight;
typedef struct Qcow2Quarantine Qcow2Quarantine;
typedef struct Qcow2Flusher Qcow2Flusher;
typedef struct Qcow2Bitmaps Qcow2Bitmaps;

/* The header in host byte order; version 2 images carry the version 3 fields' defaults. */
typedef struct Qcow2Header {
    uint32_t version;
    uint64_t backing_offset;
    uint32_t backing_size;
    uint32_t cluster_bits;
    uint64_t size;
    uint32_t crypt_method;
    uint32_t l1_size;
    uint64_t l1_offset;
    uint64_t reftable_offset;
    uint32_t reftable_clusters;
    uint32_t nb_snapshots;
    uint64_t snapshots_offset;
    uint64_t incompatible, compatible, autoclear;
    uint32_t refcount_order;
    uint32_t header_length;
    uint8_t compression_type;
} Qcow2Header;

/* A header extension as it stands in the image. */
typedef struct Qcow2Extension {
    uint32_t type;
    uint32_t length;
    uint8_t *data; /* owned */
} Qcow2Extension;

typedef struct Qcow2Snapshot {
    uint64_t l1_offset;
    uint32_t l1_size;
    char *id, *name; /* owned, NUL-terminated */
    uint32_t date_sec, date_nsec;
    uint64_t vm_clock_nsec;
    uint64_t vm_state_size;
    uint64_t disk_size;
    uint64_t icount;
    uint32_t extra_size;  /* bytes on disk, known ones included */
    uint8_t *extra;       /* owned: all extra_size bytes as read; unknown ones are kept verbatim */
    bool extra_cut;       /* more extra bytes than allowed on disk, seen by check only: dropped */
} Qcow2Snapshot;

/* A run of host clusters or bytes. */
typedef struct Qcow2HostRun {
    uint64_t offset, bytes;
} Qcow2HostRun;

typedef enum Qcow2DiscardType { /* why it was freed: decides whether the file is punched */
    QCOW2_DISCARD_NEVER,
    QCOW2_DISCARD_ALWAYS,   /* shrink, make_empty: the space must go */
    QCOW2_DISCARD_REQUEST,  /* guest discard or zero */
    QCOW2_DISCARD_SNAPSHOT,
    QCOW2_DISCARD_OTHER,
} Qcow2DiscardType;

struct BDRVQcow2State {
    /* --- set at open, constant until close (amend changes the version, the width of refcounts and
     * data_file_raw, the node held and drained) --- */
    BlockDriverState *bs;
    BdrvChild *data_file; /* bs->file without an external data file; NULL with one and BDRV_O_NO_IO */
    int version;
    unsigned cluster_bits, cluster_size;
    unsigned l2_entry_size;  /* 8, or 16 with extended L2 */
    unsigned l2_bits, l2_entries; /* entries of an L2 table */
    bool has_subclusters, has_data_file, data_file_raw;
    uint8_t crypt_method;    /* QCOW2_CRYPT_*; not 0: guest data can be neither read nor written */
    unsigned subclusters_per_cluster, subcluster_bits, subcluster_size; /* 1 = the cluster itself */
    unsigned refcount_order;
    unsigned refblock_bits;  /* log2 of counts per refcount block */
    uint64_t refcount_max;
    uint8_t compression_type;
    unsigned csize_shift;    /* compressed descriptor: bits of the offset field */
    uint64_t csize_mask;

    /* --- options, changed by reopen with the node drained --- */
    bool discard_request, discard_snapshot, discard_other; /* pass-discard-* */
    bool discard_no_unref;
    uint64_t l2_cache_size, refcount_cache_size, l2_cache_entry_size; /* bytes, 0 = default */
    uint64_t cache_clean_interval; /* seconds without use after which clean tables go, 0 = never */
    bool lazy_refcounts;           /* the dirty bit is set while a session allocates */
    int overlap_check;             /* Qcow2Overlap bits that the overlap guard looks at */

    /* --- the header: changed under header_lock, written by qcow2-header.c only --- */
    QbMutex header_lock; /* held across the header's own I/O; taken after the flush lock, before 5..8 */
    Qcow2Header header;
    GArray *extensions;  /* Qcow2Extension, in file order; end marker not included */
    uint8_t *header_tail; /* bytes of the header beyond QCOW2_HDR_V3_LENGTH, kept verbatim */
    _Atomic(bool) corrupt; /* marked at run time: all further I/O fails */
    _Atomic(bool) corrupt_unsaved;  /* found under a lock: the bit is still to be written */
    _Atomic(bool) corrupt_reported; /* the warning that is given once is out */
    const char *corrupt_file;       /* where in this source it was found, for debuggers */
    int corrupt_line;
    _Atomic(bool) lazy_dirty; /* the dirty bit is set by qcow2-lazy.c */
    _Atomic(uint64_t) autoclear_pending; /* autoclear bits to clear before the first change */

    /* --- snapshots: changed with the whole node in the range lock --- */
    GArray *snapshots;   /* Qcow2Snapshot; fewer than header.nb_snapshots only when opened for check */
    uint64_t snapshots_offset, snapshots_bytes; /* the table on disk; for those who have no header_lock */

    /* --- metadata lock: changes of L1 and L2 (see qcow2-l1.c, qcow2-cluster.c) --- */
    QbMutex lock;
    GHashTable *cleared; /* a set: 1 + index in L1 of tables that may have become empty; NULL: none */
    /* --- alloc lock: refcounts, refcount table, free-space index --- */
    QbMutex alloc_lock;
    struct Qcow2Reftable {
        uint64_t *entries;   /* host order, reserved bits kept */
        uint64_t nb_entries; /* capacity of the table on disk: clusters * cluster_size / 8 */
        uint64_t offset;
        uint32_t clusters;
        uint64_t nb_blocks;  /* one more than the index of the last block there is */
        bool moved;          /* lies at a new place the header does not name yet */
        bool reserving;      /* somebody writes zeroes where new blocks will be */
        GArray *dirty;       /* uint64_t: indices of entries to be written */
    } reftable;
    uint64_t compressed_next; /* byte offset where the next compressed cluster may go, 0: none */

    /* --- rooms (each has its own lock) --- */
    struct Qcow2Guard *guard;
    struct Qcow2L1 *l1;
    Qcow2Cache *cache;
    Qcow2FreeIndex *free_index; /* guarded by alloc_lock */
    Qcow2Inflight *inflight;
    Qcow2Quarantine *quarantine;
    Qcow2Flusher *flusher;
    struct Qcow2Compressor *compressor;
    Qcow2Bitmaps *bitmaps;
    bool shows_snapshot; /* read-only node whose L1 is a snapshot's (qcow2_snapshot_load_tmp) */
    uint64_t alloc_seq;  /* counts allocations; guarded by alloc_lock */
    uint64_t cut_at;     /* first cluster of a tail that is being cut off, UINT64_MAX: none; likewise */
    QbCond alloc_wait;   /* with alloc_lock: cut_at became UINT64_MAX, or reserving false */
    uint64_t look_from;  /* the background has looked at all blocks below; UINT64_MAX: all; alloc_lock */
    uint64_t blind_growth; /* bytes that the file grew past blocks not looked at; alloc_lock */
    struct Qcow2Background *background; /* NULL before the image is open and after it is closing */
    _Atomic(uint64_t) file_end; /* end of the last host cluster ever allocated or found in use */
};

static inline BDRVQcow2State *qcow2_state(BlockDriverState *bs)
{
    return bs->opaque;
}
static inline uint64_t qcow2_start_of_cluster(const BDRVQcow2State *s, uint64_t offset)
{
    return offset & ~(uint64_t)(s->cluster_size - 1);
}
static inline uint64_t qcow2_offset_into_cluster(const BDRVQcow2State *s, uint64_t offset)
{
    return offset & (s->cluster_size - 1);
}
/* Clusters needed for @bytes. */
static inline uint64_t qcow2_size_to_clusters(const BDRVQcow2State *s, uint64_t bytes)
{
    return (bytes >> s->cluster_bits) + ((bytes & (s->cluster_size - 1)) != 0);
}
static inline uint64_t qcow2_l1_index(const BDRVQcow2State *s, uint64_t guest)
{
    return guest >> (s->cluster_bits + s->l2_bits);
}
static inline unsigned qcow2_l2_index(const BDRVQcow2State *s, uint64_t guest)
{
    return (guest >> s->cluster_bits) & (s->l2_entries - 1);
}
/* L1 entries that @size bytes of guest disk need. */
static inline uint64_t qcow2_size_to_l1(const BDRVQcow2State *s, uint64_t size)
{
    unsigned shift = s->cluster_bits + s->l2_bits;
    return (size >> shift) + ((size & ((UINT64_C(1) << shift) - 1)) != 0);
}
/* Where VM state begins in the guest address space. */
static inline uint64_t qcow2_vm_state_offset(const BDRVQcow2State *s, uint64_t disk_size)
{
    return qcow2_size_to_l1(s, disk_size) << (s->cluster_bits + s->l2_bits);
}

/* ======================= qcow2-header.c: bytes <-> struct, updates ======================= */

/* Pure: @buf holds @len bytes from file offset 0 (missing bytes read as zero). Only the magic and
 * the version are judged here (EINVAL, ENOTSUP); qcow2_header_validate() does the rest. */
bool qcow2_header_decode(const uint8_t *buf, size_t len, Qcow2Header *ret, GError **errp);
/* Pure: 72 or 112 bytes (by version) to @buf. */
void qcow2_header_encode(const Qcow2Header *h, uint8_t *buf);
/* Pure: all rules of docs/interop/qcow2.md on single fields and their relations. @for_check lets
 * through what check can repair. */
bool qcow2_header_validate(const Qcow2Header *h, bool for_check, GError **errp);
/* Pure: the part of it that must hold before extensions and features can be looked at. */
bool qcow2_header_validate_layout(const Qcow2Header *h, GError **errp);
/* Pure: rules on known extensions (backing format, crypto, bitmaps) given the header. */
bool qcow2_extensions_validate(const Qcow2Header *h, const GArray *extensions, GError **errp);
/* Where the extension area of cluster 0 ends: at the backing name or at the end of the cluster. */
size_t qcow2_extensions_end(const Qcow2Header *h);
/* An empty array of Qcow2Extension that frees what it holds. */
GArray *qcow2_extensions_new(void);
/* Appends a copy of @length bytes of @data. */
void qcow2_extensions_add(GArray *extensions, uint32_t type, const void *data, uint32_t length);
/* Puts a copy of @length bytes of @data in the place of all extensions of @type; NULL: removes
 * them. */
void qcow2_extensions_set(GArray *extensions, uint32_t type, const void *data, uint32_t length);
/* Bytes that @extensions take up behind the header, end marker included. */
size_t qcow2_extensions_length(const GArray *extensions);
/* Pure: the extensions and the end marker to @buf, which is zeroed as far as padding goes. */
void qcow2_extensions_encode(const GArray *extensions, uint8_t *buf);
/* Pure: parses [header_length, end) of cluster 0. Appends to @ret (GArray of Qcow2Extension). */
bool qcow2_extensions_decode(const uint8_t *cluster0, size_t start, size_t end, GArray *ret,
                             GError **errp);
void qcow2_extension_clear(Qcow2Extension *ext);
const Qcow2Extension *qcow2_find_extension(const GArray *extensions, uint32_t type);
/* "Unsupported qcow2 feature(s): ..." with names from the feature table extension, hex for the
 * rest. */
char *qcow2_unknown_feature_names(const GArray *extensions, uint64_t unknown);

/*
 * Changes fixed header fields in ONE write of the sector (device block) that holds them, nothing
 * else in it changed (invariant 5).  @fn edits a copy of s->header; the copy becomes s->header when
 * the write (and, with @sync, a flush after it) has succeeded.  Takes header_lock.  0 or -errno.
 */
int qcow2_header_update(BlockDriverState *bs, void (*fn)(Qcow2Header *h, void *opaque),
                        void *opaque, bool sync);
/* Reads header and extensions at open, validates them, and fills s->header, s->extensions and
 * s->header_tail.  Texts as users know them; unknown incompatible features are named. */
bool qcow2_header_load(BlockDriverState *bs, bool for_check, GError **errp);
/* Writes the first sector (512 bytes at @sector) in one piece; @sync: and flushes.  When either
 * fails the old bytes @undo (may be NULL) are put back; if that fails too nobody knows what the
 * disk says, and the node refuses all further I/O.  Under header_lock. */
int qcow2_header_write_sector_locked(BDRVQcow2State *s, const uint8_t *sector, const uint8_t *undo,
                                     bool sync) QB_REQUIRES(s->header_lock);
/* Before the first change of a session: clears autoclear bits that this driver does not keep true
 * (@guest: guest content changes too, which makes stored bitmaps stale). Cheap when nothing is
 * pending. 0 or -errno; -EIO on a node marked corrupt. No lock held, not announced. */
int qcow2_begin_change(BlockDriverState *bs, bool guest);
/* Sets or clears feature bits, stable on return; no write when nothing changes. */
int qcow2_set_incompatible(BlockDriverState *bs, uint64_t set, uint64_t clear);
int qcow2_set_autoclear(BlockDriverState *bs, uint64_t set, uint64_t clear);
/* qcow2-lazy.c: with lazy refcounts, makes the dirty bit stable before something is allocated; cheap
 * when it is. And ends that: everything stable, then the bit off; not while requests are under way.
 * No lock held, not announced. 0 or -errno. */
int qcow2_lazy_begin(BlockDriverState *bs);
int qcow2_lazy_settle(BlockDriverState *bs);
/* Does the header have the dirty bit, whoever set it? Takes header_lock. */
bool qcow2_dirty_bit(BDRVQcow2State *s);
/* A change of more than fixed fields. */
typedef struct Qcow2HeaderChange {
    const char *backing_file; /* NULL: as it is; "": none */
    /* Edits copies of the fixed fields (version and header_length too) and of the extensions. */
    void (*edit)(Qcow2Header *h, GArray *extensions, void *opaque);
    void *opaque;
} Qcow2HeaderChange;
/* Makes the change so that every step on disk parses; the fixed fields change in its last write, and
 * memory with them (invariant 5). ENOSPC when it does not fit cluster 0. Takes header_lock. */
bool qcow2_header_change(BlockDriverState *bs, const Qcow2HeaderChange *what, GError **errp);
/* The backing name (NULL or "": none) and format only. */
bool qcow2_header_change_names(BlockDriverState *bs, const char *backing_file,
                               const char *backing_fmt, GError **errp);
/* Bytes of a fresh header cluster: header, extensions, backing name. ENOSPC if it does not fit. */
bool qcow2_header_layout(const Qcow2Header *h, const GArray *extensions, const char *backing_file,
                         uint8_t *cluster0, size_t cluster_size, Qcow2Header *ret, GError **errp);
/* The feature-name table extension's 384 bytes, newly allocated. */
uint8_t *qcow2_feature_table(uint32_t *ret_length);

/* Something on disk or about to be written is impossible. Sets the corrupt bit where the image is
 * writable and version 3, refuses all further I/O on this node (@fatal), warns once.
 * Returns -EIO. */
#define qcow2_signal_corruption(bs, fatal, offset, ...)                                            \
    qcow2_signal_corruption_at(bs, fatal, offset, __FILE__, __LINE__, __VA_ARGS__)
int qcow2_signal_corruption_at(BlockDriverState *bs, bool fatal, int64_t offset, const char *file,
                               int line, const char *fmt, ...) G_GNUC_PRINTF(6, 7);
/* Writes the corrupt bit if it was found under a lock, where no I/O is allowed. No lock held. */
int qcow2_corrupt_save(BlockDriverState *bs);

/* ======================= qcow2.c ======================= */

/* The L1 table of @entries at @offset as it is on disk, big-endian, newly allocated; what lies
 * beyond the end of the file is zero, but the table must begin inside. @name begins the
 * error text. */
uint64_t *qcow2_read_l1(BlockDriverState *bs, uint64_t offset, uint32_t entries, const char *name,
                        GError **errp);
/* Numbers that follow from the width of refcounts, 1 << @order bits. At open, or whole node held. */
void qcow2_set_refcount_order(BDRVQcow2State *s, unsigned order);

/* ======================= qcow2-options.c, qcow2-info.c: run time ======================= */

/* What the options of a node say, before they take effect. */
typedef struct Qcow2Options {
    bool lazy_refcounts;
    bool follow_discard; /* pass-discard-request was not said: as the node's "discard" */
    bool discard_request, discard_snapshot, discard_other, discard_no_unref;
    int overlap_check; /* Qcow2Overlap bits */
    uint64_t l2_cache_size, refcount_cache_size, l2_cache_entry_size, cache_clean_interval;
} Qcow2Options;
/* Takes the driver's own options out of @options; those not named have their defaults. Header
 * known. */
bool qcow2_options_take(BlockDriverState *bs, json_t *options, Qcow2Options *ret, GError **errp);
/* Node drained or not yet open. */
void qcow2_options_apply(BDRVQcow2State *s, const Qcow2Options *o);
/* qcow2-crypto.c: what is known of an encrypted image without its key, in print order; NULL: it is
 * not encrypted. New reference. */
json_t *qcow2_crypto_facts(BlockDriverState *bs);
/* Pure: the same from the 592 bytes of a LUKS header of version 1. */
json_t *qcow2_luks_facts(const uint8_t *header);
bool qcow2_reopen_prepare(BDRVReopenState *state, GError **errp);
void qcow2_reopen_commit(BDRVReopenState *state);
void qcow2_reopen_abort(BDRVReopenState *state);
/* Pending autoclear bits, by what the header says now; for a node that is or becomes writable. */
void qcow2_set_autoclear_pending(BDRVQcow2State *s);
bool qcow2_get_info(BlockDriverState *bs, BlockDriverInfo *info, GError **errp);
json_t *qcow2_get_specific_info(BlockDriverState *bs, GError **errp);
void qcow2_refresh_limits(BlockDriverState *bs);

/* ======================= qcow2-cache.c: tables in memory ======================= */

/*
 * L2 tables and refcount blocks, big-endian as on disk, found by host offset.  L2 tables may be in
 * memory in parts.  A table is pinned by whoever holds a Qcow2Table, which may be used for the bytes
 * that were asked for; dirty parts are never dropped, clean ones that nobody asked for are when
 * their kind is over its limit.  Nobody waits for an entry while holding one: the cache grows.
 */
typedef enum Qcow2TableKind { QCOW2_TABLE_L2, QCOW2_TABLE_REFBLOCK } Qcow2TableKind;
#define QCOW2_NB_TABLE_KINDS 2

typedef struct Qcow2CacheConfig {
    uint64_t limit[QCOW2_NB_TABLE_KINDS]; /* bytes to keep in memory */
    size_t l2_part; /* bytes of an L2 table loaded at a time, a power of two; a sector of the file at
                     * least, the table at most */
} Qcow2CacheConfig;
/* qcow2-options.c: what the options say, or the size of the image. */
Qcow2CacheConfig qcow2_cache_config(const BDRVQcow2State *s);
Qcow2Cache *qcow2_cache_new(BlockDriverState *bs, const Qcow2CacheConfig *config);
void qcow2_cache_free(Qcow2Cache *cache); /* asserts that nothing is pinned */
/* The size of the image is another one; nobody else changes it now. */
void qcow2_cache_fit(BDRVQcow2State *s);
/* What does not fit any more and is clean and unused is dropped. Never fails, writes nothing. */
void qcow2_cache_configure(Qcow2Cache *cache, const Qcow2CacheConfig *config);
/* Bytes [pos, +len) of the table at @offset. */
typedef struct Qcow2TableRange {
    Qcow2TableKind kind;
    uint64_t offset;
    size_t pos, len;
} Qcow2TableRange;
/* Pins the table at @offset, loading it whole. Blocks: not under lock or alloc_lock. -EIO with the image
 * marked corrupt when @offset is unaligned, begins beyond the end of the file, or is known as a table
 * of the other kind. */
int qcow2_cache_get(Qcow2Cache *cache, Qcow2TableKind kind, uint64_t offset, Qcow2Table **ret);
/* The same for what is missing of a range, but -ENXIO when it begins beyond the end of the file, and
 * nothing marked: it may be a table that was dropped before it was ever written. Who still finds its
 * pointer in place says so by qcow2_table_outside_file(), which returns -EIO. */
int qcow2_cache_get_part(Qcow2Cache *cache, const Qcow2TableRange *range, Qcow2Table **ret);
int qcow2_table_outside_file(BlockDriverState *bs, Qcow2TableKind kind, uint64_t offset);
/* Pins it only if all of it, or of the range, is in memory; NULL otherwise. Never blocks. With a
 * length of 0 anything of it will do; what is dirty or becomes so then stays until put(). */
Qcow2Table *qcow2_cache_peek(Qcow2Cache *cache, Qcow2TableKind kind, uint64_t offset);
Qcow2Table *qcow2_cache_peek_part(Qcow2Cache *cache, const Qcow2TableRange *range);
/* Copies it if it is all in memory; else false. Never blocks. */
bool qcow2_cache_copy_part(Qcow2Cache *cache, const Qcow2TableRange *range, void *out);
/* The range of @n entries from @index on of the L2 table at @offset; some. */
static inline Qcow2TableRange qcow2_l2_range(const BDRVQcow2State *s, uint64_t offset, unsigned index,
                                             size_t n)
{
    return (Qcow2TableRange){QCOW2_TABLE_L2, offset, (size_t)index * s->l2_entry_size,
                             n * s->l2_entry_size};
}
/* Is a table at @offset in memory (or being loaded), and of what kind? For the overlap guard. */
bool qcow2_cache_has(Qcow2Cache *cache, uint64_t offset, Qcow2TableKind *ret_kind);
/* A table for a cluster just allocated: zeroes or a copy of @init, all dirty, "unlinked": no stable
 * pointer names it yet, so the next flush writes it before the pointer. NULL: no memory. */
Qcow2Table *qcow2_cache_add(Qcow2Cache *cache, Qcow2TableKind kind, uint64_t offset,
                            const void *init);
/* An L2 table for such a cluster after qcow2_reserve(): nothing is dirty, or in memory before it is
 * asked for.  What is stored to it goes behind the first barrier of a flush, which covers that. */
Qcow2Table *qcow2_cache_add_zeroed(Qcow2Cache *cache, uint64_t offset);
void qcow2_cache_put(Qcow2Table *t); /* NULL is fine */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Qcow2Table, qcow2_cache_put)
/* Host clusters [offset, +bytes) no longer hold tables: their entries, dirty, loading or pinned, are
 * never written again and never found again. */
void qcow2_cache_poison(Qcow2Cache *cache, uint64_t offset, uint64_t bytes);
/* The same for each of @n runs of clusters, or of bytes in them. */
void qcow2_cache_poison_list(Qcow2Cache *cache, const Qcow2HostRun *runs, size_t n);
/* A poisoned table's content is stale: start again from L1. */
bool qcow2_table_poisoned(const Qcow2Table *t);
/* Has somebody else it pinned, too? */
bool qcow2_table_shared(const Qcow2Table *t);
uint64_t qcow2_table_offset(const Qcow2Table *t);
/* Copies bytes out of / into the table, atomically against each other. store marks the sectors dirty;
 * the caller holds the lock that owns the kind (metadata lock for L2, alloc lock for refcount blocks). */
void qcow2_table_load(const Qcow2Table *t, size_t pos, size_t len, void *out);
void qcow2_table_store(Qcow2Table *t, size_t pos, size_t len, const void *in);
/* Copies of the whole table what needs no I/O, each to its place in @out. True: that was all. */
bool qcow2_table_load_present(const Qcow2Table *t, void *out);
/* Direct view of a refcount block; alloc lock held throughout. After changing bytes call mark_dirty. */
uint8_t *qcow2_refblock_data(Qcow2Table *t);
void qcow2_table_mark_dirty(Qcow2Table *t, size_t pos, size_t len);
/* Forgets everything, dirty or not (after repair wrote behind the cache's back). Node quiesced. */
void qcow2_cache_reset(Qcow2Cache *cache);

/* A piece of a dirty table copied for writing; see qcow2-flush.c. */
typedef struct Qcow2DirtyPiece {
    uint64_t offset; /* in the file */
    size_t bytes;
    uint8_t *data;   /* owned by the set */
    Qcow2Table *table; /* pinned */
    bool unlinked;   /* piece of a table that no stable pointer names */
} Qcow2DirtyPiece;
/* Copies all dirty sectors of @kind, merged into pieces, and marks them clean (and linked). The lock
 * that owns the kind is held. -ENOMEM leaves everything as it was. */
int qcow2_cache_collect_dirty(Qcow2Cache *cache, Qcow2TableKind kind, GArray *pieces);
/* Marks pieces dirty again after a failed write; @relink: also unlinked as they were. Frees pieces. */
void qcow2_cache_return_pieces(Qcow2Cache *cache, GArray *pieces, bool failed, bool relink);
/* Drops clean parts that nobody holds down to the limits. */
void qcow2_cache_trim(Qcow2Cache *cache);
/* A step in the background: drops clean tables that were not used since the one before. */
uint64_t qcow2_cache_clean_step(BlockDriverState *bs);
/* Bytes of all tables in memory. */
uint64_t qcow2_cache_bytes(Qcow2Cache *cache);
/* Bytes of dirty parts, and whether those of a kind pass its limit: the driver then flushes by itself;
 * or half of it. */
uint64_t qcow2_cache_dirty_bytes(Qcow2Cache *cache);
bool qcow2_cache_too_dirty(Qcow2Cache *cache);
bool qcow2_cache_half_dirty(Qcow2Cache *cache);

/* ======================= qcow2-l1.c: the active L1 ======================= */

struct Qcow2L1 *qcow2_l1_new(BDRVQcow2State *s, uint64_t *be_entries, uint32_t size, uint64_t offset);
void qcow2_l1_free(struct Qcow2L1 *l1);
/* Entry in host order; 0 beyond the table. Takes the rwlock shared; cheap, any thread. */
uint64_t qcow2_l1_get(const BDRVQcow2State *s, uint64_t index);
uint32_t qcow2_l1_size(const BDRVQcow2State *s);
uint64_t qcow2_l1_table_offset(const BDRVQcow2State *s);
/* Changes one entry and marks its sector dirty. */
void qcow2_l1_set_locked(BDRVQcow2State *s, uint64_t index, uint64_t entry) QB_REQUIRES(s->lock);
/* What a flush writes of it: dirty sectors in place, or all of a table at its new place. Metadata lock
 * held. done() tells how it went: after a failure it is dirty as before. */
typedef struct Qcow2L1Copy {
    bool moved;      /* the header must switch to {offset, size} */
    uint64_t offset;
    uint32_t size;
} Qcow2L1Copy;
int qcow2_l1_collect_locked(BDRVQcow2State *s, GArray *pieces, Qcow2L1Copy *ret)
    QB_REQUIRES(s->lock);
void qcow2_l1_done(BDRVQcow2State *s, const GArray *pieces, const Qcow2L1Copy *copy, bool failed);
bool qcow2_l1_is_clean(const BDRVQcow2State *s);
/* Copies all entries, big-endian; newly allocated. */
uint64_t *qcow2_l1_dup_be(const BDRVQcow2State *s, uint32_t *ret_size);
/* Makes room for @size entries: a new table in new clusters, to which the next flush switches.
 * @exact: no spare. The old clusters go to quarantine. Not under any lock. */
int qcow2_l1_grow(BlockDriverState *bs, uint64_t size, bool exact);
/* The table as it is goes to @offset, to which the next flush switches: clusters for all of it, which
 * nothing refers to yet. The old ones are freed. Not under any lock. */
void qcow2_l1_move(BlockDriverState *bs, uint64_t offset, Qcow2DiscardType type);
/* Forgets the entries from @size on, in memory; dirty ones below stay so. Who calls frees what they
 * named, and the clusters they lay in. The header says so already. */
void qcow2_l1_shorten(BDRVQcow2State *s, uint32_t size);
/* Replaces the table by @be_entries (stolen) at @offset, as the header on disk already says; the old
 * table's clusters are the caller's to free. Whole node in the range lock. */
void qcow2_l1_replace(BDRVQcow2State *s, uint64_t *be_entries, uint32_t size, uint64_t offset);

/* ======================= qcow2-prune.c: L2 tables that became empty ======================= */

/* An entry of 0 was stored to the table at @l1_index: it may be empty now. */
void qcow2_note_cleared_locked(BDRVQcow2State *s, uint64_t l1_index) QB_REQUIRES(s->lock);
/* Loads what is missing of those that look empty; for the flush, before it takes the lock. Not pinned:
 * it is there unless others load much meanwhile. */
void qcow2_fetch_cleared_tables(BlockDriverState *bs);
/* Takes those that are out of L1 and frees them; for the flush, before it copies. */
void qcow2_drop_empty_tables_locked(BDRVQcow2State *s) QB_REQUIRES(s->lock);

/* ======================= qcow2-inflight.c: users of host runs ======================= */

/* On the request's stack.  announce: before the look-up, pins everything.  resolve: once the run is
 * known, pins that run only.  leave: file I/O done; never hold while waiting for a lock or worker. */
typedef struct Qcow2User {
    struct Qcow2User *prev, *next;
    uint64_t seq;
    uint64_t host;
    _Atomic(uint64_t) bytes; /* 0: unresolved, pins everything; host is set before */
    bool writes;
} Qcow2User;
Qcow2Inflight *qcow2_inflight_new(void);
void qcow2_inflight_free(Qcow2Inflight *f);
void qcow2_user_announce(BDRVQcow2State *s, Qcow2User *u);
/* The same, for who is going to write into what it finds mapped. */
void qcow2_user_announce_writing(BDRVQcow2State *s, Qcow2User *u);
void qcow2_user_resolve(BDRVQcow2State *s, Qcow2User *u, uint64_t host, uint64_t bytes);
void qcow2_user_leave(BDRVQcow2State *s, Qcow2User *u);
/* Everybody announced before this call has a sequence number below the result. */
uint64_t qcow2_inflight_seq(BDRVQcow2State *s);
/* Nobody who was announced before is left. */
uint64_t qcow2_inflight_oldest(BDRVQcow2State *s);
/* Is a user announced before @seq on the run (or unresolved)? */
bool qcow2_inflight_busy(BDRVQcow2State *s, uint64_t seq, uint64_t host, uint64_t bytes);
/* Waits past all users announced before @seq. Caller is not announced and holds no lock. */
void qcow2_inflight_wait(BDRVQcow2State *s, uint64_t seq);
/* Waits past those announced before this call who write on the run. Same conditions. */
void qcow2_inflight_wait_writers(BDRVQcow2State *s, uint64_t host, uint64_t bytes);

/* ======================= qcow2-quarantine.c: freed, not yet reusable ======================= */

Qcow2Quarantine *qcow2_quarantine_new(void);
void qcow2_quarantine_free(Qcow2Quarantine *q);
/*
 * The references to the host run have been taken out of memory's tables; each cluster it touches loses
 * one count when the next flush has made that stable and its users have left (invariant 3).  Byte
 * runs of compressed clusters lose one on every cluster touched.  No lock needed; the metadata lock
 * may be held.  Poisons cached tables in the run.  Never fails (out of memory: the run leaks, and
 * the flusher says so).
 */
void qcow2_free_run(BlockDriverState *bs, uint64_t offset, uint64_t bytes, Qcow2DiscardType type);
/* The same for whole clusters that never held compressed data; also under the alloc lock. */
void qcow2_free_tables(BlockDriverState *bs, uint64_t offset, uint64_t bytes,
                       Qcow2DiscardType type);
/* qcow2_free_run() for each of @n runs, in one go. */
void qcow2_free_list(BlockDriverState *bs, const Qcow2HostRun *runs, size_t n, Qcow2DiscardType t);
/* Bytes waiting, and whether that is more than it should be (64 MiB or 1/16 of the file). */
uint64_t qcow2_quarantine_bytes(BDRVQcow2State *s);
bool qcow2_quarantine_full(BDRVQcow2State *s);
/* More runs than a flush should have to release, of whatever length. */
bool qcow2_quarantine_crowded(BDRVQcow2State *s);
/* Bytes that a flush could release: without what users held back at the last one. */
uint64_t qcow2_quarantine_releasable(BDRVQcow2State *s);
/* A step in the background: when nothing was freed for a second, flushes to release what waits. */
uint64_t qcow2_release_step(BlockDriverState *bs);
/* All refcounts have been replaced by ones that do not count what waits. Whole node held, users
 * waited for. */
void qcow2_quarantine_forget(BDRVQcow2State *s);
/*
 * A shrink frees clusters between hold() and take(): those whose unlink a flush has made stable, and whose
 * users have left, are kept as they are.  take(): appends them to @ret (Qcow2HostRun, sorted): nothing
 * refers to them, their count is 1, and they are the caller's; what somebody else has too is released
 * as ever.  0 or the first error (the rest leaks).
 */
void qcow2_quarantine_hold(BDRVQcow2State *s);
int qcow2_quarantine_take(BlockDriverState *bs, GArray *ret);
/* Makes such clusters free, and @spare empty; the space of those below @punch_end is given back. */
int qcow2_release_spare(BlockDriverState *bs, GArray *spare, uint64_t punch_end);
/* Called by the flusher: everything freed before generation @gen ended is unlinked stably. Lowers
 * counts, then punches merged runs. 0 or first error (the rest leaks, never dangles). */
int qcow2_quarantine_release(BlockDriverState *bs, uint64_t gen);

/* ======================= qcow2-background.c: what is done without being asked ============= */

typedef enum Qcow2BackgroundTask {
    QCOW2_BG_RELEASE, /* quarantine, by age */
    QCOW2_BG_LOOK,    /* refcount blocks into the free-space index */
    QCOW2_BG_CLEAN,   /* tables unused for long */
    QCOW2_BG_TASKS,
} Qcow2BackgroundTask;
struct Qcow2Background *qcow2_background_new(BlockDriverState *bs);
/* The image is open: from now on tasks can be armed. */
void qcow2_background_start(BDRVQcow2State *s);
/* Waits for running steps and frees it; no step begins any more. Graph lock not held. */
void qcow2_background_stop(BDRVQcow2State *s);
/* Does the step of @task in @ms milliseconds, unless it is armed already. Any thread, any lock. */
void qcow2_background_arm(BDRVQcow2State *s, Qcow2BackgroundTask task, uint64_t ms);
/* The same, also when it is armed for later. */
void qcow2_background_hasten(BDRVQcow2State *s, Qcow2BackgroundTask task, uint64_t ms);
/* For steps: false when they should come to an end, and go on another time. */
bool qcow2_background_wanted(const BDRVQcow2State *s);

/* ======================= qcow2-flush.c: memory becomes disk ======================= */

Qcow2Flusher *qcow2_flusher_new(void);
void qcow2_flusher_free(Qcow2Flusher *f);
/*
 * Makes stable all that was done before the call.  Under the metadata and alloc lock: copy dirty
 * sectors.  Write copied tables and refcount blocks; barrier (covers data; a data file's comes first);
 * [new refcount blocks: hook up; barrier]; L2 sectors, L1, header switch; barrier; release quarantine.
 * Flushes are shared: one that arrives during a flush joins the next.  Caller not announced, no lock held.
 */
int qcow2_flush(BlockDriverState *bs);
/* Same, without the last barrier being needed by anybody (cache pressure, quarantine full). */
int qcow2_write_back(BlockDriverState *bs);
/* Generation that the next flush will end; a change made now is stable when it is done. */
uint64_t qcow2_flush_generation(BDRVQcow2State *s);
/* Gets space back that quarantine holds: flush and release. True when some came free. Not announced,
 * no lock held. For callers that met ENOSPC, once. */
bool qcow2_reclaim(BlockDriverState *bs);
/* For whole-node operations: is anything dirty? */
bool qcow2_is_clean(BDRVQcow2State *s);

/* ======================= qcow2-alloc.c, qcow2-refcount.c ======================= */

Qcow2FreeIndex *qcow2_free_index_new(void);
void qcow2_free_index_free(Qcow2FreeIndex *ix);
/* Reads the refcount table named by the header. */
bool qcow2_refcount_init(BlockDriverState *bs, GError **errp);
void qcow2_refcount_close(BlockDriverState *bs);
/* Forgets what is in memory and reads again (after repair or rebuild). Node quiesced. */
bool qcow2_refcount_reload(BlockDriverState *bs, GError **errp);
/* The same from memory: @entries (stolen, host order) is what the header names now. Cannot fail. */
void qcow2_refcount_adopt(BlockDriverState *bs, uint64_t *entries);

/*
 * Allocation: counts become 1 in memory at once; nothing on disk refers to the clusters yet.  First fit
 * by lowest host offset.  Before the file grows, and on ENOSPC, quarantine is flushed and released and
 * the search repeated once.  May block: no lock held, not announced.  Host offset or -errno (-EFBIG:
 * the file would pass the format's limits).
 */
int64_t qcow2_alloc_clusters(BlockDriverState *bs, uint64_t bytes);
/* Up to *bytes (cluster multiple) in one run, at @want if that is free (0: anywhere); *bytes becomes
 * what was given, at least one cluster. */
int64_t qcow2_alloc_run(BlockDriverState *bs, uint64_t want, uint64_t *bytes);
/* Those of [offset, +bytes) that are free, up to the first that is not, in bytes; makes no blocks */
uint64_t qcow2_alloc_at(BlockDriverState *bs, uint64_t offset, uint64_t bytes);
/* qcow2_alloc_run() from what is in memory, without waiting or flushing: -EAGAIN otherwise. */
int64_t qcow2_alloc_run_nowait(BlockDriverState *bs, uint64_t want, uint64_t *bytes);
/* @size bytes (< cluster_size) for a compressed cluster; packs them behind the previous ones. */
int64_t qcow2_alloc_bytes(BlockDriverState *bs, uint32_t size);
/* @n runs are being freed: no further stream is packed into their clusters. Takes the alloc lock. */
void qcow2_alloc_leave(BDRVQcow2State *s, const Qcow2HostRun *runs, size_t n);
/* A step in the background: looks at refcount blocks that nobody has looked at. */
uint64_t qcow2_look_step(BlockDriverState *bs);
/*
 * Between begin and end no cluster at or beyond host offset @end is handed out: who wants one and
 * finds none below waits.  begin: false when something was allocated since qcow2_alloc_seq() said
 * @seq.  One at a time (truncation has the end of the node to itself).
 */
uint64_t qcow2_alloc_seq(BDRVQcow2State *s);
bool qcow2_cut_begin(BDRVQcow2State *s, uint64_t end, uint64_t seq);
void qcow2_cut_end(BDRVQcow2State *s);
/* Zeroes for tables to come, written so that they have space in the file. Guarded; like alloc_*. */
int qcow2_reserve(BlockDriverState *bs, uint64_t offset, uint64_t bytes);
/* Gives back what alloc_* returned and nothing ever referred to. */
void qcow2_alloc_undo(BlockDriverState *bs, uint64_t offset, uint64_t bytes);

/* Count of host cluster @index; 0 where there is no block. May block. */
int qcow2_get_refcount(BlockDriverState *bs, uint64_t index, uint64_t *ret);
/* Count of the cluster at host @offset, and in *ret_bytes how far (at most @bytes) clusters have the same.
 * May block. */
int qcow2_count_run(BlockDriverState *bs, uint64_t offset, uint64_t bytes, uint64_t *ret_count,
                    uint64_t *ret_bytes);
/* Adds @delta (+1 or -1, or any) to every cluster touched by each run. Overflow (-EINVAL) and underflow
 * (image marked corrupt) of any cluster is found before the first change. Runs are sorted in place.
 * May block. Only for whole-node operations and quarantine release. */
int qcow2_update_refcounts(BlockDriverState *bs, Qcow2HostRun *runs, size_t n, int delta);
/* Would that fail? Changes nothing but the order of @runs. */
int qcow2_judge_refcounts(BlockDriverState *bs, Qcow2HostRun *runs, size_t n, int delta);
/* End of the last host cluster with a count > 0, in bytes. May block. */
int qcow2_last_used_end(BlockDriverState *bs, uint64_t *ret);
/* What a flush writes of the refcount table: dirty entries' sectors, or all of it at its new place (then
 * the header must switch). done(): after a failure it is dirty as before. */
typedef struct Qcow2ReftableCopy {
    bool moved;
    uint64_t offset;
    uint32_t clusters;
} Qcow2ReftableCopy;
int qcow2_reftable_collect_locked(BDRVQcow2State *s, GArray *pieces, Qcow2ReftableCopy *ret)
    QB_REQUIRES(s->alloc_lock);
void qcow2_reftable_done(BDRVQcow2State *s, const GArray *pieces, const Qcow2ReftableCopy *copy,
                         bool failed);
/* Block @index, or the table, becomes what lies at @offset, in clusters of its own that nothing refers to
 * yet; the old ones are freed. The next flush writes it. -ENOMEM, or -errno of reading the block. */
int qcow2_refblock_move(BlockDriverState *bs, uint64_t index, uint64_t offset,
                        Qcow2DiscardType type);
void qcow2_reftable_move(BlockDriverState *bs, uint64_t offset, Qcow2DiscardType type);
/* Drops refcount blocks whose counts are all zero (but themselves) at the table's end; for shrink.
 * Requests may allocate meanwhile; one at a time, as cuts. */
int qcow2_refcount_shrink(BlockDriverState *bs);
/* Raw access to one count in a block of @order: used by refcount.c and check.c. */
uint64_t qcow2_refcount_read(const uint8_t *block, unsigned order, uint64_t slot);
void qcow2_refcount_write(uint8_t *block, unsigned order, uint64_t slot, uint64_t value);

/* Overlap guard: may [offset, +bytes) of the image file be written as data or by section @ignore?
 * 0, or -EIO with the image marked corrupt. */
typedef enum Qcow2Overlap {
    QCOW2_OL_NONE = 0,
    QCOW2_OL_MAIN_HEADER = 1 << 0,
    QCOW2_OL_ACTIVE_L1 = 1 << 1,
    QCOW2_OL_ACTIVE_L2 = 1 << 2,
    QCOW2_OL_REFCOUNT_TABLE = 1 << 3,
    QCOW2_OL_REFCOUNT_BLOCK = 1 << 4,
    QCOW2_OL_SNAPSHOT_TABLE = 1 << 5,
    QCOW2_OL_INACTIVE_L1 = 1 << 6,
    QCOW2_OL_INACTIVE_L2 = 1 << 7,
    QCOW2_OL_BITMAP_DIRECTORY = 1 << 8,
} Qcow2Overlap;
int qcow2_check_overlap(BlockDriverState *bs, int ignore, uint64_t offset, uint64_t bytes);
/* What it knows; the rooms tell it of every change, under whatever lock (its own is a leaf). */
struct Qcow2Guard *qcow2_guard_new(const BDRVQcow2State *s);
void qcow2_guard_free(struct Qcow2Guard *g);
/* The places of a section that lies in runs, instead of those before. */
void qcow2_guard_set(BDRVQcow2State *s, Qcow2Overlap section, const Qcow2HostRun *runs, size_t n);
/* A table of one cluster comes to or goes from host @offset (0 or unaligned: nothing happens). */
void qcow2_guard_table(BDRVQcow2State *s, Qcow2Overlap section, uint64_t offset, bool there);
void qcow2_guard_forget_tables(BDRVQcow2State *s, Qcow2Overlap section);
/* All tables that an L1 names come. */
void qcow2_guard_l1(BDRVQcow2State *s, Qcow2Overlap section, const uint64_t *be_l1, uint32_t size);
/* s->snapshots or the option has changed; reads the L1s of snapshots where that is asked for. */
void qcow2_guard_snapshots(BlockDriverState *bs);
/* s->extensions has changed. Under header_lock, or while nobody else has the node. */
void qcow2_guard_bitmaps(BDRVQcow2State *s);
/* Does the range hit any metadata but the bitmap directory, whatever options say? Only looks. */
bool qcow2_overlaps_metadata(BlockDriverState *bs, uint64_t offset, uint64_t bytes);

/* ======================= qcow2-cluster.c: guest offset -> mapping ======================= */

typedef enum Qcow2ClusterType {
    QCOW2_UNALLOCATED,     /* backing file shows */
    QCOW2_ZERO_PLAIN,
    QCOW2_ZERO_ALLOC,      /* zeroes, host cluster kept */
    QCOW2_NORMAL,
    QCOW2_COMPRESSED,
    QCOW2_UNALLOCATED_ALLOC, /* subcluster not allocated inside an allocated cluster */
    QCOW2_INVALID,
} Qcow2ClusterType;

/* Both words of an L2 entry, host order; bitmap is 0 without subclusters. */
typedef struct Qcow2L2Entry {
    uint64_t entry, bitmap;
} Qcow2L2Entry;

/* Pure: type of subcluster @sc (0 without subclusters) of @e. */
Qcow2ClusterType qcow2_entry_type(const BDRVQcow2State *s, Qcow2L2Entry e, unsigned sc);
/* Pure: byte run of a compressed descriptor. */
void qcow2_parse_compressed(const BDRVQcow2State *s, uint64_t entry, uint64_t *ret_offset,
                            uint32_t *ret_bytes);

/* A stretch of guest bytes of one type, host bytes contiguous where it has them. */
typedef struct Qcow2Mapping {
    Qcow2ClusterType type;
    uint64_t guest, bytes;
    uint64_t host;       /* host byte for @guest; compressed: start of the stream */
    uint32_t comp_bytes; /* compressed: bytes available to the decoder */
    bool copied;         /* whole run may be overwritten in place */
    Qcow2L2Entry first;  /* the entry of @guest as it was read */
} Qcow2Mapping;

/* Maps [guest, +bytes), as far as one type and one host run go (possibly over several L2 tables).
 * Blocks on cache misses; takes no metadata lock. Marks the image corrupt on impossible entries. */
int qcow2_lookup(BlockDriverState *bs, uint64_t guest, uint64_t bytes, Qcow2Mapping *ret);

/* Bulk changes of the map. Ranges are aligned to clusters (ends of the disk excepted), to subclusters
 * where they are to read zero; -ENOTSUP where that takes a part of a compressed cluster. The request is
 * serialised by the caller. Bounded lock holds; ranges never allocated allocate nothing. */
typedef enum Qcow2DiscardHow {
    QCOW2_DISCARD_TO_ZERO, /* reads zeroes afterwards (plain zero; 0 where nothing can shine through) */
    QCOW2_DISCARD_FULL,    /* entry becomes 0: the backing file shows (shrink, make_empty) */
} Qcow2DiscardHow;
int qcow2_discard_clusters(BlockDriverState *bs, uint64_t guest, uint64_t bytes,
                           Qcow2DiscardHow how, Qcow2DiscardType type);
/* @flags: BDRV_REQ_MAY_UNMAP. -ENOTSUP on version 2 with a backing file. */
int qcow2_zero_clusters(BlockDriverState *bs, uint64_t guest, uint64_t bytes, int flags);
/* Preallocates: every cluster of the range mapped, reading as before or zero (zero with a host cluster;
 * normal on version 2, where the cluster is zeroed, and in an external data file). Rules as above. */
bool qcow2_preallocate(BlockDriverState *bs, uint64_t guest, uint64_t bytes, QbProgress *progress,
                       GError **errp);

/* ======================= qcow2-compress.c ======================= */

/* One cluster. compress: bytes written to @dst (< cluster_size), or -ENOSPC when it does not shrink.
 * decompress: exactly @dst_len bytes or -EIO. Thread-safe, pure. */
ssize_t qcow2_compress(uint8_t type, void *dst, size_t dst_len, const void *src, size_t src_len);
int qcow2_decompress(uint8_t type, void *dst, size_t dst_len, const void *src, size_t src_len);

/* What a node keeps for compressed clusters (the last few unpacked ones); s->compressor. Made at open, freed
 * at close. Without it (NULL) everything works, but each read unpacks again. */
struct Qcow2Compressor *qcow2_compressor_new(void);
void qcow2_compressor_free(struct Qcow2Compressor *c); /* NULL is fine */

/* ======================= qcow2-walk.c: THE iterator ======================= */

/* What to walk: the active tables, or a detached L1 (of a snapshot, or one just cut off). */
typedef struct Qcow2WalkSource {
    const uint64_t *be_l1; /* big-endian; NULL: the active table through the cache */
    uint64_t l1_size;
} Qcow2WalkSource;

/* An L2 table. Return < 0 to stop with that error. */
typedef struct Qcow2WalkTable {
    uint64_t l1_index;
    uint64_t l1_entry;
    const uint64_t *be;   /* l2_entries entries (l2_entry_size each), big-endian; NULL: not readable */
    int error;            /* -errno when be is NULL */
} Qcow2WalkTable;
typedef int (*Qcow2TableFn)(const Qcow2WalkTable *table, void *opaque);
/* Calls @fn for each L1 entry != 0 that maps part of [start, end), in L1 order; tables are read many at
 * a time in file order. Active tables are seen as memory has them. Not under any lock. */
int qcow2_walk_tables(BlockDriverState *bs, const Qcow2WalkSource *src, uint64_t start,
                      uint64_t end, Qcow2TableFn fn, void *opaque);
/* Same, by runs of equal type and contiguous host bytes; unallocated ones are skipped. */
typedef int (*Qcow2RunFn)(const Qcow2Mapping *run, void *opaque);
int qcow2_walk_runs(BlockDriverState *bs, const Qcow2WalkSource *src, uint64_t start, uint64_t end,
                    Qcow2RunFn fn, void *opaque);
/* Rewrites entries of the active tables that begin in [start, end). @fn gets @e and knows that the
 * *n - 1 behind it continue it (one type, host clusters in a row); it edits @e, which the others then
 * continue as before, may lower *n to what that holds for, and returns 1 if there is a change, 0, or
 * -errno. Called from several threads. Whole node in the range lock. What is dirty is flushed; then
 * tables are written by the batch, past the cache and without a barrier, each entry as it was or as it
 * shall be. After a failure some are done. */
typedef int (*Qcow2EditFn)(uint64_t guest, Qcow2L2Entry *e, unsigned *n, void *opaque);
int qcow2_walk_edit(BlockDriverState *bs, uint64_t start, uint64_t end, Qcow2EditFn fn,
                    void *opaque);

/* Cuts indices [0, @size), of L1 entries or refcount blocks, into up to QCOW2_MAX_PARTS parts and handles
 * each in a thread, one of them this one. The first error. */
#define QCOW2_MAX_PARTS 16
typedef int (*Qcow2PartFn)(uint64_t first, uint64_t end, unsigned part, void *opaque);
int qcow2_walk_in_parts(uint64_t size, Qcow2PartFn fn, void *opaque);

/* ======================= qcow2-tree.c: all that an L1 refers to ======================= */

/* Pure: index of the first of @runs (Qcow2HostRun, sorted, not overlapping) that ends behind @offset;
 * runs->len: none. */
guint qcow2_runs_find(const GArray *runs, uint64_t offset);
/* Host clusters as runs (Qcow2HostRun), one for each reference: those that several compressed
 * clusters share come several times. */
/* Appends the L2 tables and data that @src refers to, not the L1 itself; nothing that lies in an
 * external data file. Reads all its tables; nobody changes them meanwhile. 0 or -errno (-EIO and
 * the image marked corrupt on impossible entries). */
int qcow2_tree_collect(BlockDriverState *bs, const Qcow2WalkSource *src, GArray *runs);
/* Pure: how references change from @from to @to: runs that come into @ret_up and go away into
 * @ret_down. */
void qcow2_runs_difference(const BDRVQcow2State *s, const GArray *from, const GArray *to,
                           GArray *ret_up, GArray *ret_down);
/* Adds @sign (1 or -1) to the counts of all of @runs, which may overlap. Overflow (-EINVAL) and
 * underflow leave everything as it was. In memory; whole node in the range lock, no flush under
 * way. */
int qcow2_change_counts(BlockDriverState *bs, const GArray *runs, int sign);
/* Is there room for one more in all of @runs? -EINVAL if not. Changes nothing. */
int qcow2_counts_have_room(BlockDriverState *bs, const GArray *runs);
/* Appends to @ret, in order, the clusters of @runs where there is none. */
int qcow2_counts_without_room(BlockDriverState *bs, const GArray *runs, GArray *ret);
/* qcow2-snapshot-room.c: makes room in the counts of @tree, what the active tables refer to, which
 * is another tree then.  -EINVAL, with nothing changed, where that is not possible. Whole node in
 * the range lock. */
int qcow2_make_room_in_counts(BlockDriverState *bs, const GArray *tree);
/* Frees every run through quarantine, flushing now and then. 0 or -errno of a flush (the rest
 * leaks). */
int qcow2_free_runs(BlockDriverState *bs, const GArray *runs, Qcow2DiscardType type);
/* Of @runs the clusters whose count is 1 now, sorted and merged, into @ret. */
int qcow2_runs_with_count_one(BlockDriverState *bs, const GArray *runs, GArray *ret);
/* Clears COPIED in all entries of the L2 tables of the active L1, in the file but without a barrier, and
 * of L1 itself, in memory. Whole node in the range lock. */
int qcow2_clear_all_copied(BlockDriverState *bs);
/* Sets COPIED in all entries of the active tables whose host cluster lies in @ones (sorted,
 * merged); likewise. */
int qcow2_set_copied_in(BlockDriverState *bs, const GArray *ones);
/* Flushes until quarantine is empty too and its counts are written. Whole node in the
 * range lock. */
int qcow2_flush_all(BlockDriverState *bs);

/* ======================= whole-image operations (node serialised by the core) ======================= */

/* qcow2-create.c */
extern const QbOptDesc qcow2_create_opts[];
bool qcow2_create(const char *filename, json_t *options, QbProgress *progress, GError **errp);
/* qcow2-measure.c: bdrv_measure() of block.h */
bool qcow2_measure(json_t *options, BlockDriverState *source, BlockMeasureInfo *ret,
                   GError **errp);
/* qcow2-amend.c */
extern const QbOptDesc qcow2_amend_opts[];
/* Options by the names of that table; everything is judged before the first change. Steps that are done
 * stay done when a later one fails. */
bool qcow2_amend(BlockDriverState *bs, json_t *options, QbProgress *progress, GError **errp);
bool qcow2_change_backing_file(BlockDriverState *bs, const char *file, const char *fmt,
                               GError **errp);
/* qcow2-truncate.c */
bool qcow2_truncate(BlockDriverState *bs, int64_t offset, bool exact, PreallocMode prealloc,
                    bool zero_new, GError **errp);
/* A new image: gives its external data file the right length and preallocates. Node not in use. */
bool qcow2_fill_new(BlockDriverState *bs, PreallocMode prealloc, QbProgress *progress,
                    GError **errp);
/* After the repair of a dirty image: ends a shrink that a crash interrupted. 0 or -errno. */
int qcow2_finish_shrink(BlockDriverState *bs);
/* Cuts the image file behind the last host cluster in use; devices stay as long as they are. */
int qcow2_cut_file(BlockDriverState *bs);
/* qcow2-empty.c */
bool qcow2_make_empty(BlockDriverState *bs, GError **errp);
/* qcow2-snapshot.c */
void qcow2_snapshot_clear(Qcow2Snapshot *sn);
/* An empty array that frees what it holds. */
GArray *qcow2_snapshots_new(void);
/* An ID that none of @snapshots has: the largest number plus one. Newly allocated. */
char *qcow2_snapshot_next_id(const GArray *snapshots);
/* Deep copy. */
GArray *qcow2_snapshots_dup(const GArray *snapshots);
/* Pure: one entry of the table from @len bytes at @buf; *ret_bytes: its length without padding.
 * @disk_size: what an entry without that field means. EINVAL when it is cut off, EFBIG
 * over limits. */
bool qcow2_snapshot_decode(const uint8_t *buf, size_t len, uint64_t disk_size, Qcow2Snapshot *ret,
                           size_t *ret_bytes, GError **errp);
/* Reads the table the header names into s->snapshots. @for_check: what check can repair (too many
 * entries, too much or too little extra data) is let through, cut to the limits. */
bool qcow2_snapshots_load(BlockDriverState *bs, bool for_check, GError **errp);
/* By ID, or else by name; borrowed, NULL when there is none. */
const Qcow2Snapshot *qcow2_snapshot_find(const BDRVQcow2State *s, const char *id_or_name);
/* Its L1 as on disk, big-endian, newly allocated, after checking its place and length. */
uint64_t *qcow2_snapshot_read_l1(BlockDriverState *bs, const Qcow2Snapshot *sn, GError **errp);
bool qcow2_snapshot_create(BlockDriverState *bs, const char *name, GError **errp);
bool qcow2_snapshot_apply(BlockDriverState *bs, const char *id_or_name, GError **errp);
bool qcow2_snapshot_delete(BlockDriverState *bs, const char *id, const char *name, GError **errp);
GArray *qcow2_snapshot_list(BlockDriverState *bs, GError **errp);
bool qcow2_snapshot_load_tmp(BlockDriverState *bs, const char *id_or_name, GError **errp);
/* Encodes @snapshots as a table; newly allocated. EFBIG over the limits. */
uint8_t *qcow2_snapshots_encode(const GArray *snapshots, int version, size_t *ret_bytes,
                                GError **errp);
/* Writes @snapshots (stolen, also on failure) as a table into new clusters, makes that stable and
 * switches the header to it in one write, in which @fn (may be NULL) changes other fields too. The
 * old table is freed, s->snapshots replaced. Failure leaves the old one. Whole node in the range
 * lock. */
bool qcow2_snapshots_store(BlockDriverState *bs, GArray *snapshots,
                           void (*fn)(Qcow2Header *h, void *opaque), void *opaque, GError **errp);
/* qcow2-bitmap.c: callbacks of driver.h */
bool qcow2_bitmap_add(BlockDriverState *bs, const BdrvDirtyParams *params, GError **errp);
bool qcow2_bitmap_remove(BlockDriverState *bs, BdrvDirtyBitmap *bm, GError **errp);
bool qcow2_bitmaps_remove_all(BlockDriverState *bs, GError **errp);
int qcow2_bitmaps_mark_in_use(BlockDriverState *bs, BdrvBitmapsWhich which, BdrvDirtyBitmap *one);
bool qcow2_bitmaps_store(BlockDriverState *bs, GError **errp);
/* Reads the directory, and gives the node its bitmaps. What cannot be understood is kept as it is, and
 * inconsistent; a directory that makes no sense at all is warned of, and its autoclear bit goes with
 * the first change of guest content. False: it could not be read just now, and the node is
 * writable. Writes nothing. */
bool qcow2_bitmaps_load(BlockDriverState *bs, GError **errp);
Qcow2Bitmaps *qcow2_bitmaps_new(void);
void qcow2_bitmaps_free(Qcow2Bitmaps *b); /* with the node's bitmaps; NULL is fine */
/* Does the image list bitmaps that count (its autoclear bit is set)? */
bool qcow2_bitmaps_present(BDRVQcow2State *s);
/* Guest writes keep the listed bitmaps true, so that the autoclear bit may stay. */
bool qcow2_bitmaps_maintained(BDRVQcow2State *s);
/* The @i-th bitmap of the directory as it is listed now; false: there is none. */
typedef struct Qcow2BitmapFacts {
    const char *name; /* borrowed; of a broken one perhaps cut */
    size_t name_bytes;
    unsigned granularity_bits;
    uint32_t flags;
    bool broken;      /* not IN_USE, but not to be understood */
} Qcow2BitmapFacts;
bool qcow2_bitmap_facts(BDRVQcow2State *s, guint i, Qcow2BitmapFacts *ret);
/* Sectors of bitmap tables that refer to clusters allocated before: to be written when the counts are
 * stable, by the flush that takes them before it copies. GArray of BdrvBatchOp, new reference;
 * NULL: none. */
GArray *qcow2_bitmaps_take_tables(BDRVQcow2State *s);
/* Does the image on disk tell which clusters belong to bitmaps? Not after a store that failed: those of
 * the tables in memory stay in use, too. */
bool qcow2_bitmaps_settled(BDRVQcow2State *s);
/* Table entries that @size bytes of disk need; at least 1. */
uint64_t qcow2_bitmap_entries(const BDRVQcow2State *s, uint64_t size, unsigned granularity_bits);

/* qcow2-check.c */
bool qcow2_check(BlockDriverState *bs, const BdrvCheckOptions *opts, BdrvCheckResult *result,
                 GError **errp);
/* Repairs a dirty image at a writable open: errors and leaks, then clears the bit. */
bool qcow2_repair_dirty(BlockDriverState *bs, GError **errp);

#endif
