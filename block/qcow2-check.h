/*
 * Check and repair of qcow2 images: what its files tell one another.  See block/qcow2-check.c.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_QCOW2_CHECK_H
#define BLOCK_QCOW2_CHECK_H

#include "block/qcow2.h"

/* ======================= qcow2-check-map.c: references to host clusters ======================= */

/* Who refers to a host cluster, and what its active references say; a byte per cluster. */
typedef enum Qcow2RefFlag {
    QCOW2_REF_META = 1 << 0,     /* any other metadata than L2: one owner only */
    QCOW2_REF_L2 = 1 << 1,
    QCOW2_REF_DATA = 1 << 2,
    QCOW2_REF_COMP = 1 << 3,     /* compressed streams: they share */
    QCOW2_REF_ALIAS = 1 << 4,    /* two owners that cannot both be right */
    QCOW2_REF_ACTIVE = 1 << 5,   /* data of the active tables */
    QCOW2_REF_COPIED = 1 << 6,   /* an active entry has the COPIED flag */
    QCOW2_REF_SHARED = 1 << 7,   /* an active entry lacks it */
} Qcow2RefFlag;
#define QCOW2_REF_KINDS (QCOW2_REF_META | QCOW2_REF_L2 | QCOW2_REF_DATA | QCOW2_REF_COMP)

/* Clusters per leaf; divides the number of counts in any refcount block. */
#define QCOW2_REF_LEAF 64

/* Counts and flags of clusters that differ. */
typedef struct Qcow2RefBody {
    uint32_t *wide; /* NULL, or the counts when one of them passed 255 */
    uint8_t narrow[QCOW2_REF_LEAF];
    uint8_t flags[QCOW2_REF_LEAF];
} Qcow2RefBody;

typedef struct Qcow2RefLeaf {
    uint64_t index;     /* of the leaf: first cluster / QCOW2_REF_LEAF */
    Qcow2RefBody *body; /* NULL: all clusters are alike, as the rest says */
    uint32_t count;
    uint8_t flags;
} Qcow2RefLeaf;

typedef struct Qcow2RefMap Qcow2RefMap;

/* An empty map; @cap (at least 1) is the highest count an image can hold. Several
 * threads may add at once; all else is for one thread while nobody adds. */
Qcow2RefMap *qcow2_refmap_new(uint64_t cap);
void qcow2_refmap_free(Qcow2RefMap *map);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Qcow2RefMap, qcow2_refmap_free)
/*
 * Adds @times (at least 1) references of the kind and with the flags in @flags to @n clusters from
 * @first on. Sets ALIAS where a kind meets one it cannot share with, or active data meets active
 * data. Calls @overflow (may be NULL) for each cluster whose count is beyond the cap then. Counts
 * stop at UINT32_MAX.
 */
void qcow2_refmap_add(Qcow2RefMap *map, uint64_t first, uint64_t n, uint64_t times, unsigned flags,
                      void (*overflow)(uint64_t cluster, void *opaque), void *opaque);
/* Takes @times references back from each cluster; what has none left loses its flags. */
void qcow2_refmap_sub(Qcow2RefMap *map, uint64_t first, uint64_t n, uint64_t times);
/* There is no owner of @kind any more (0: of every kind there still is one); ALIAS goes if one kind is
 * left. */
void qcow2_refmap_clear_kind(Qcow2RefMap *map, uint64_t first, uint64_t n, unsigned kind);
uint32_t qcow2_refmap_count(const Qcow2RefMap *map, uint64_t cluster);
unsigned qcow2_refmap_flags(const Qcow2RefMap *map, uint64_t cluster);
/* The leaf that holds @cluster, or NULL when all its clusters are free. */
const Qcow2RefLeaf *qcow2_refmap_leaf(const Qcow2RefMap *map, uint64_t cluster);
static inline uint32_t qcow2_refleaf_count(const Qcow2RefLeaf *leaf, unsigned slot)
{
    const Qcow2RefBody *body = leaf->body;
    if (!body) {
        return leaf->count;
    }
    return body->wide ? body->wide[slot] : body->narrow[slot];
}
static inline unsigned qcow2_refleaf_flags(const Qcow2RefLeaf *leaf, unsigned slot)
{
    return leaf->body ? leaf->body->flags[slot] : leaf->flags;
}
/* The flags that any of its clusters has. */
unsigned qcow2_refleaf_any_flags(const Qcow2RefLeaf *leaf);
/* How many clusters from @slot on, at least 1, have the same count. */
unsigned qcow2_refleaf_run(const Qcow2RefLeaf *leaf, unsigned slot);
/* One past the last slot with a count; 0 for none. */
unsigned qcow2_refleaf_end(const Qcow2RefLeaf *leaf);
/* All leaves by index; borrowed until the next add. Not to be changed; give it back with
 * g_ptr_array_unref(). */
GPtrArray *qcow2_refmap_sorted(Qcow2RefMap *map);
/* One past the highest cluster with a count; 0 for none. */
uint64_t qcow2_refmap_end(const Qcow2RefMap *map);
/* Number of leaves: what the map costs. */
size_t qcow2_refmap_leaves(const Qcow2RefMap *map);

/* ======================= qcow2-check.c: one run ======================= */

/* An L2 table, once, however many L1 entries name it. */
typedef struct Qcow2CheckTable {
    uint64_t offset;
    uint32_t refs;         /* L1 entries of all trees that name it; stops at UINT32_MAX */
    uint32_t active_refs;  /* those of the active L1 */
    uint32_t active_index; /* the first of them */
    unsigned flags;        /* QCOW2_REF_COPIED, QCOW2_REF_SHARED: what active L1 entries say */
} Qcow2CheckTable;

/* A reference to a refcount block, by index in the refcount table. */
typedef enum Qcow2BlockState {
    QCOW2_BLOCK_ABSENT,
    QCOW2_BLOCK_SOUND,    /* inside the file, nobody else's: kept by a repair */
    QCOW2_BLOCK_SHARED,   /* readable, but something else lies there too: a repair replaces it */
    QCOW2_BLOCK_BROKEN,   /* nothing to read there: counts 0 */
    QCOW2_BLOCK_UNREADABLE, /* I/O error: counts not known */
    QCOW2_BLOCK_NEW,      /* made by the repair */
} Qcow2BlockState;
enum {
    QCOW2_BLOCK_RAISE = 1 << 0, /* some counts are too low */
    QCOW2_BLOCK_LOWER = 1 << 1, /* some counts are too high */
    QCOW2_BLOCK_ENTRY = 1 << 2, /* the table's entry must be written */
};
typedef struct Qcow2CheckBlock {
    uint64_t offset;
    uint8_t state; /* Qcow2BlockState */
    uint8_t todo;
} Qcow2CheckBlock;

/* An entry of L1 or L2 that a repair rewrites once all owners are known. */
typedef struct Qcow2EntryFix {
    uint64_t pos;       /* in the file */
    unsigned bytes;     /* 8 or 16 */
    unsigned owner;     /* QCOW2_REF_META or QCOW2_REF_L2: who alone must have its cluster */
    uint32_t l1_index;  /* in the active L1; UINT32_MAX elsewhere */
    Qcow2L2Entry was, becomes;
    const char *code;
    char *text;      /* owned; without its first word */
    uint64_t times;  /* references to take if it cannot be rewritten, 0: none */
    bool done;
} Qcow2EntryFix;

/* An L1 entry at @pos that leads nowhere. */
typedef struct Qcow2LostTable {
    uint64_t pos, entry;
    uint64_t times;    /* L1 tables that have it */
    uint32_t l1_index; /* as above */
} Qcow2LostTable;

/* A table of a bitmap that a repair makes anew. */
typedef struct Qcow2TableFix {
    uint64_t pos;      /* of the directory entry, in the file */
    uint64_t offset;   /* of the new table */
    uint32_t entries;
    char *name;        /* owned */
    bool ready;        /* written, and counted in the map */
} Qcow2TableFix;

typedef struct Qcow2Check {
    BlockDriverState *bs;
    BDRVQcow2State *s;
    const BdrvCheckOptions *opts;
    BdrvCheckResult *res;
    unsigned fix;            /* BdrvCheckFix */
    bool give_up;            /* what is lost may be told to be */
    uint64_t file_bytes, nb_clusters;
    uint64_t file_allocated; /* bytes that the file takes; 0: not known */
    uint64_t counted_bytes;  /* the first of them before a repair made the file longer */
    bool incomplete;         /* something was not read: there may be more references */
    bool lost;               /* an L1 entry, a snapshot or a bitmap leads nowhere */
    uint64_t lost_entries;   /* findings of L2 entries that do */
    bool keep_leaks;         /* and what looks leaked may be its own */
    bool touched;            /* the image was written: caches are stale */
    bool write_failed;       /* a repair stopped half-way */
    bool quiet;              /* findings are counted, not told */
    bool repairing;          /* goes on to its end */
    bool compared;           /* todo of blocks says where they differ from the map */
    bool copied_suspect;     /* some COPIED flag is wrong, by the map */
    bool copied_uncounted;   /* same, of an entry that is not in the map */
    Qcow2RefMap *map;
    uint64_t *be_l1;         /* active L1 as on disk */
    uint32_t l1_size;        /* entries that are looked at */
    bool l1_resized;         /* the header says another number */
    GArray *tables;          /* Qcow2CheckTable: active ones in L1 order, others by offset */
    guint nb_active_tables;
    GHashTable *table_index; /* offset -> position in tables, while they are collected */
    GArray *entry_fixes;     /* Qcow2EntryFix */
    GArray *table_fixes;     /* Qcow2TableFix */
    GArray *lost_tables;     /* Qcow2LostTable */
    bool snapshots_broken;   /* the table is to be written again */
    uint64_t snapshot_faults;
    /* refcount structure; see qcow2-check-compare.c and qcow2-rebuild.c */
    bool reftable_sound;
    uint64_t nb_blocks;
    Qcow2CheckBlock *blocks;
    uint64_t reftable_offset;
    uint32_t reftable_clusters;
    bool uncounted;          /* something is referenced where there is no block */
    uint64_t structure_faults, count_faults, count_leaks; /* found in table and blocks; in counts */
    uint64_t overflows;      /* found while counting */
    bool overflowing;        /* some are left */
    uint64_t free_hint;      /* no free cluster below */
    GHashTable *taken;       /* clusters that the repair took into use */
    struct {
        uint64_t index; /* UINT64_MAX: empty */
        uint8_t *data;
    } near_blocks[8]; /* refcount blocks read for the COPIED check, direct mapped */
} Qcow2Check;

/* Counts a finding and tells the caller of it. @code is a literal, @offset UINT64_MAX if none. */
void qcow2_check_report(Qcow2Check *c, BdrvFindingClass kind, bool fixed, const char *code,
                        uint64_t offset, const char *fmt, ...) G_GNUC_PRINTF(6, 7);
/* @n findings of this class that were reported before have been repaired. */
void qcow2_check_mark_fixed(Qcow2Check *c, BdrvFindingClass kind, uint64_t n);
/* Did the user ask to stop? Not once a repair of counts has begun: what it has seen half of would
 * be judged wrongly. */
bool qcow2_check_cancelled(const Qcow2Check *c);
/* Writes to the image file; a failure is reported as a check error. */
int qcow2_check_write(Qcow2Check *c, uint64_t offset, size_t bytes, const void *buf);
/* Barrier; a failure is reported. */
int qcow2_check_barrier(Qcow2Check *c);
/* Counts all that stays when the active L1 goes, with its tables and their data: header, snapshots,
 * LUKS area, bitmaps. NULL when that cannot be said for sure. Flushes; whole node held. */
Qcow2RefMap *qcow2_check_count_kept(BlockDriverState *bs);
/* Is the cluster at @offset known to be a hole of the file? Then it reads as zeroes. Nobody asks
 * when all @n clusters that are to be read together are no more than the file takes. */
bool qcow2_check_is_hole(const Qcow2Check *c, uint64_t offset, uint64_t n);
/* Is every byte of [offset, +bytes) in clusters that belong to one owner of @kind only? */
bool qcow2_check_exclusive(const Qcow2Check *c, uint64_t offset, uint64_t bytes, unsigned kind);

/* Something refers to clusters that will look leaked: they are kept, for whoever can read it. */
void qcow2_check_not_followed(Qcow2Check *c);

/* ======================= qcow2-check-snapshots.c: the snapshot table ======================= */

/* Judges the entries; a repair of errors puts them right in memory. */
void qcow2_check_snapshot_table(Qcow2Check *c);
/* Writes the table again, as memory has it, to new clusters. The counts have been put right. */
void qcow2_check_write_snapshot_table(Qcow2Check *c);

/* ======================= qcow2-check-refs.c: count what refers to what ======================= */

/* Fills the map, the tables and the findings on everything but refcounts. */
void qcow2_check_count_all(Qcow2Check *c);
/* Does [offset, +bytes) end less than a cluster beyond the end of the file? */
bool qcow2_check_is_inside(const Qcow2Check *c, uint64_t offset, uint64_t bytes);
/* Did it when references were counted?  What did not leads nowhere, whatever a repair puts there. */
bool qcow2_check_was_inside(const Qcow2Check *c, uint64_t offset, uint64_t bytes);
/* Is it inside?  Says so when it is not. */
bool qcow2_check_inside(Qcow2Check *c, uint64_t offset, uint64_t bytes);
/* Says that the count of a cluster is too high for the image; @opaque: the Qcow2Check. */
void qcow2_check_overflow(uint64_t cluster, void *opaque);
/* Counts @times references to each cluster touched; false when that was refused (see above). */
bool qcow2_check_count(Qcow2Check *c, uint64_t offset, uint64_t bytes, uint64_t times,
                       unsigned flags);

/* Reports an L1 entry that leads nowhere, and whose table has not been found. */
void qcow2_check_bad_l1_entry(Qcow2Check *c, const Qcow2LostTable *lost);

/* ======================= qcow2-check-find.c: tables that L1 has lost ======================= */

/* Is its table to be looked for? If not, it is to be reported now. */
bool qcow2_check_look_for_table(Qcow2Check *c, const Qcow2LostTable *lost);
/* Looks for them all, once everything else is counted; what is found, or is not there, is put on
 * the list of entries to be rewritten, the rest is reported. */
void qcow2_check_find_tables(Qcow2Check *c);

/* ======================= qcow2-check-l1.c: the length of the active L1 ======================= */

/* Reports an L1 table that runs into another structure, or is too short for the disk; c->l1_size
 * and c->be_l1 are what it can be. */
void qcow2_check_l1_length(Qcow2Check *c);
/* Writes that to the header, stable on return. False when it could not be written. */
bool qcow2_check_resize_l1(Qcow2Check *c);

/* ======================= qcow2-check-l2.c: L2 entries ======================= */

enum { QCOW2_CHECK_WALK = 1024 }; /* tables at once */
/* qcow2_walk_tables() over at most QCOW2_CHECK_WALK tables from @first on, whose l1_index counts
 * from 0; those in holes of the file are left out. Any thread. */
int qcow2_check_walk(const Qcow2Check *c, guint first, guint n, Qcow2TableFn fn, void *opaque);
/* Judges and counts all entries of all tables, or of table @index. */
void qcow2_check_l2_tables(Qcow2Check *c);
void qcow2_check_l2_table(Qcow2Check *c, guint index);
/* Calls @fn for tables [first, first + n) of c->tables that can be read, in order; @entries holds
 * the table as on disk. Unreadable ones are reported, those in holes
 * of the file have no entries. */
typedef void (*Qcow2CheckTableFn)(Qcow2Check *c, const Qcow2CheckTable *t, const uint8_t *entries,
                                  void *opaque);
void qcow2_check_for_tables(Qcow2Check *c, guint first, guint n, Qcow2CheckTableFn fn,
                            void *opaque);
/* Entry @index of a table as on disk. */
Qcow2L2Entry qcow2_check_entry(const BDRVQcow2State *s, const uint8_t *entries, uint32_t index);

/* ======================= qcow2-check-scan.c: sound L2 tables ======================= */

/* Counts what tables refer to in which nothing is odd. Says of each table whether it is still to be
 * judged and counted (a byte each, newly allocated). */
uint8_t *qcow2_check_scan_tables(Qcow2Check *c);

/* ======================= qcow2-check-fixes.c: entries to be rewritten ======================= */

/*
 * Something is wrong with the entry that @fix tells of. @fmt follows "ERROR" or "Repairing". With
 * BDRV_FIX_ERRORS it is told when qcow2_check_apply_fixes() rewrites it, and the entry is to be
 * counted as it will be: true; else it is told now: false.
 */
bool qcow2_check_fixable(Qcow2Check *c, Qcow2EntryFix fix, const char *fmt, ...)
    G_GNUC_PRINTF(3, 4);
/* Rewrites the entries whose repair was put off until all owners were known. */
void qcow2_check_apply_fixes(Qcow2Check *c);
/* Those that could not be, once more, after owners have been moved. */
void qcow2_check_retry_fixes(Qcow2Check *c);

/* ======================= qcow2-check-bitmaps.c ======================= */

/* Counts the bitmap directory, tables and data, and judges them. */
void qcow2_check_bitmaps(Qcow2Check *c);
/* Makes tables for bitmaps whose own cannot be used. Nothing refers to them yet, but the map counts
 * as if. */
void qcow2_check_make_bitmap_tables(Qcow2Check *c);
/* Makes the directory point to them, stable on return; they and their counts are stable. */
void qcow2_check_link_bitmap_tables(Qcow2Check *c);

/* ======================= qcow2-check-compare.c: the refcounts ======================= */

/* Looks at the refcount table and its blocks, and counts them. */
void qcow2_check_refcount_structure(Qcow2Check *c);
/* Reports every difference and remembers what has to be done to which block. */
void qcow2_check_compare(Qcow2Check *c);
/* Reads the blocks @indices (states SOUND or SHARED) one behind the other to @buf. A block that
 * cannot be read is reported and becomes UNREADABLE. */
void qcow2_check_read_blocks(Qcow2Check *c, const uint64_t *indices, size_t n, uint8_t *buf);
/* How many blocks to handle at once. */
size_t qcow2_check_batch(const Qcow2Check *c);
/* What the refcounts on disk say of a cluster; false when that cannot be known. */
bool qcow2_check_disk_count(Qcow2Check *c, uint64_t cluster, uint64_t *ret);
/* Forgets blocks read for that. */
void qcow2_check_drop_blocks(Qcow2Check *c);

/* ======================= qcow2-check-copied.c: the COPIED flags ======================= */

/* Reports wrong flags in the active tables; with @repair rewrites them. @clear_only: looks only for
 * flags that are set and must not be. */
void qcow2_check_copied(Qcow2Check *c, bool repair, bool clear_only);

/* ======================= qcow2-rebuild.c: make the refcounts right ======================= */

/* Raises counts that are too low, makes missing blocks, and a new table where one is needed; all of
 * it is stable on return. False when something could not be written. */
bool qcow2_check_raise(Qcow2Check *c);
/* Lowers counts that are too high, in sound blocks; stable on return. */
bool qcow2_check_lower(Qcow2Check *c);
/* A free host cluster (@n of them in a row) for the repair, counted in the map as @flags says; may
 * make the file longer. Host offset or -errno. */
int64_t qcow2_check_take_clusters(Qcow2Check *c, uint64_t n, unsigned flags);
/* @n clusters from @offset on lose a reference of @kind in the map; lowering follows. */
void qcow2_check_give_clusters(Qcow2Check *c, uint64_t offset, uint64_t n, unsigned kind);
/* Takes what cannot stay of the old structure out of the map: who shared its clusters is alone. */
void qcow2_check_release_structure(Qcow2Check *c);
/* Compares again, silently: what is no longer found moves to the fixed counters. @hooked_up: the
 * structure is as planned. Afterwards c->copied_suspect speaks of the counts as they are now. */
void qcow2_check_verify(Qcow2Check *c, bool hooked_up);

/* ======================= qcow2-check-moves.c: entries that move ======================= */

typedef struct Qcow2Moves {
    GArray *moves;       /* Move */
    GHashTable *aliases; /* cluster -> Alias */
    uint8_t *buf;        /* a cluster */
    uint64_t dead_end;   /* a stream that cannot be unpacked, 0: none made yet */
} Qcow2Moves;

/* An L2 entry in hand. */
typedef struct Qcow2EntryMove {
    Qcow2Check *c;
    Qcow2Moves *m;
    const Qcow2CheckTable *t;
    uint32_t index;
    Qcow2L2Entry e;
    uint64_t host, bytes; /* where it leads: to the end of the stream, or of the cluster */
} Qcow2EntryMove;

/* Decides what becomes of entries that lead nowhere or to another's cluster, and writes what they
 * will refer to. Nothing refers to it yet, but the map counts as if. NULL when there is nothing to
 * do. */
Qcow2Moves *qcow2_check_plan_moves(Qcow2Check *c);
/* Rewrites the entries, stable on return. @go: what they will refer to and its counts are stable;
 * else only frees @moves, which may be NULL. */
void qcow2_check_make_moves(Qcow2Check *c, Qcow2Moves *moves, bool go);

/* For those who decide. May the entry be rewritten? */
bool qcow2_move_possible(const Qcow2EntryMove *x);
/* A new cluster with @data, counted for the entry; *ret: the entry that points there. */
bool qcow2_move_to_new_cluster(const Qcow2EntryMove *x, const uint8_t *data, Qcow2L2Entry *ret);
/* The map no longer counts what the entry refers to. */
void qcow2_move_leave(const Qcow2EntryMove *x);
/* Puts the move on the list; @code and @what are literals. @finding: one finding is repaired by it
 * that has been counted. */
void qcow2_move_add(const Qcow2EntryMove *x, Qcow2L2Entry becomes, const char *code,
                    const char *what, bool finding);
/* Reads from the file, zeroes behind its end; a failure is reported. */
int qcow2_move_read(Qcow2Check *c, uint64_t offset, size_t bytes, uint8_t *buf);

/* ======================= qcow2-check-alias.c: two owners of one cluster ======================= */

/* Fills m->aliases. */
void qcow2_check_find_aliases(Qcow2Check *c, Qcow2Moves *m);
/* Data, or a stream, that may have to move. */
void qcow2_check_move_aliased(const Qcow2EntryMove *x);
/* The entry stays where it is. */
void qcow2_check_alias_stays(const Qcow2EntryMove *x);
/* Where all data, or all streams, have left, the other owner is alone in the map. */
void qcow2_check_forget_owners(Qcow2Check *c, const Qcow2Moves *m);

/* ======================= qcow2-check-lost.c: entries that lead nowhere ======================= */

#define QCOW2_SAY_GIVEN_UP "lost; reading it fails until it is written"
/* Does the entry mean data of which nobody can say where they are? */
bool qcow2_check_leads_nowhere(const Qcow2Check *c, Qcow2L2Entry e);
/* Decides what becomes of it. */
void qcow2_check_replace_lost(const Qcow2EntryMove *x);
/* *ret: an entry that reads as an error. */
bool qcow2_check_dead_end(const Qcow2EntryMove *x, Qcow2L2Entry *ret);
/* Is nothing of the cluster data? */
bool qcow2_check_reads_as_zero(const BDRVQcow2State *s, Qcow2L2Entry e);

#endif
