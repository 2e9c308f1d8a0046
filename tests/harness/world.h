/*
 * A world: the images of a test, what is on them, and what may be on them.
 *
 *      kind    how the image under test is made     (a row of a table)
 *      views   guests' disks, each with its oracle: the image, its base, another image, the
 *              content of two internal snapshots
 *      bitmaps dirty bitmaps of the image under test, of the kinds that have some
 *      marks   what was done to views and bitmaps, with times on the disks' clock, so that the
 *              oracles can be had as they were at any time
 *
 * Everything that changes an oracle goes through a mark.  Several threads may make requests, each
 * with a copy of the world that has sectors of its own (world_part()); else not for several
 * threads.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef TESTS_HARNESS_WORLD_H
#define TESTS_HARNESS_WORLD_H

#include "tests/harness/bitmaps.h"
#include "tests/harness/disk.h"
#include "tests/harness/oracle.h"

typedef enum KindFlags {
    KIND_V2 = 1 << 0,
    KIND_BACKING = 1 << 1,    /* over a base */
    KIND_RAW_BASE = 1 << 2,   /* which is raw */
    KIND_DATA_FILE = 1 << 3,
    KIND_SNAPSHOT = 1 << 4,   /* has a snapshot from the beginning */
    KIND_COMPRESSED = 1 << 5, /* filled with compressed clusters */
    KIND_NO_SHARING = 1 << 6, /* counts of one bit: no snapshots, and compressed data take whole
                                 clusters */
    KIND_NO_DISCARD = 1 << 7, /* discards do nothing: version 2 over a base */
    KIND_FIXED = 1 << 8,      /* cannot be resized: version 2 with snapshots */
    KIND_QED = 1 << 9,        /* the other format: no snapshots, nothing compressed or amended */
    KIND_BITMAPS = 1 << 10,   /* has a dirty bitmap in each state (BitmapId) */
    KIND_4K = 1 << 11,        /* on a device whose sectors have 4096 bytes */
    KIND_BIG = 1 << 12,       /* takes long: for the operations of group bitmap only */
    KIND_TIGHT = 1 << 13,     /* counts are full: for operations that need just that */
    KIND_PARTS = 1 << 14,     /* extended L2 entries, with subclusters of one sector */
    KIND_SHORT_BASE = 1 << 15, /* the base is shorter than the image */
    KIND_BLOCKS = 1 << 16,    /* several refcount blocks: for operations that write them anew */
} KindFlags;

typedef struct Kind {
    const char *name;
    const char *create; /* options of qemu-img create */
    unsigned cluster;   /* sectors */
    unsigned sectors;   /* of the guest's disk */
    unsigned flags;     /* KindFlags */
    const char *open;   /* options of its node, with a comma in front; NULL: none */
} Kind;

extern const Kind kinds[];
extern const unsigned nb_kinds;

typedef enum ViewId {
    VIEW_TOP,   /* the image under test, disks "top" and "data" */
    VIEW_BASE,  /* its base, disk "base" */
    VIEW_OTHER, /* another image, disk "other" */
    VIEW_SNAP0, /* snapshot "s0" of the top */
    VIEW_SNAP1, /* snapshot "s1" */
    VIEWS,
} ViewId;

typedef struct View {
    Presence presence;
    bool vanishes; /* VIEW_MAYBE, and absent when it settles */
    Oracle oracle;
} View;

typedef struct World {
    const Kind *kind;
    View *view;       /* [VIEWS] */
    BitmapOracle *bitmaps; /* [BITMAPS]; NULL: the kind has none */
    BlockBackend *blk; /* the top, when an operation has it open */
    const char *more; /* more options of the top's node, with a comma in front; NULL: none */
    const char *dir;  /* images are files there (kinds without a base); NULL: disks in memory */
    bool debug;       /* blkdebug stands below the top */
    bool damaged;     /* the top is what nobody would write to: it is only read, not checked */
    bool lost;        /* nor read */
    unsigned value;   /* the last one written */
    unsigned own_first, own_n; /* sectors that a thread has for itself: a flush settles them only;
                                  0: all */
    GArray *marks;    /* NULL: not kept */
    unsigned failed;  /* requests that gave an error */
    void (*at_close)(struct World *w); /* called by world_close() first; may be NULL */
    char *why;        /* of the first operation that failed; owned */
} World;

/* The image as the kind has it, filled: about half of the disk has data. */
World *world_new(const Kind *kind);
void world_free(World *w);

/* The image of a view, as options of a node. */
char *world_options(const World *w, ViewId view);
/* NULL: *ret_why says why not. */
BlockBackend *world_open_view(const World *w, ViewId view, int flags, char **ret_why);
/* Opens the top as w->blk, with discards going down; false: counted in w->failed. */
bool world_open(World *w);
/* Flushes and closes it. */
bool world_close(World *w);

/* A copy for a thread that uses only the sectors [first, first + n) until world_part_end(). */
World world_part(const World *w, unsigned first, unsigned n);
/* Its failures become those of @w. */
void world_part_end(World *w, World *part);

/* --- requests to the top, in sectors; 0 or -errno --- */
int world_write(World *w, unsigned first, unsigned n);
int world_write_flags(World *w, unsigned first, unsigned n, int flags);
int world_zero(World *w, unsigned first, unsigned n, int flags);
int world_discard(World *w, unsigned first, unsigned n);
/* The same where the kind has KIND_PARTS, and nothing compressed lies there: all of it reads zero
 * after it. */
int world_discard_parts(World *w, unsigned first, unsigned n);
int world_flush(World *w);
/* Counts a failure, and remembers the first. Returns @ok. */
bool world_note(World *w, bool ok, const char *what, GError *err);
/* Changes a dirty bitmap of the top, which is open; false: it is counted as a failure. */
bool world_bitmap(World *w, BitmapChange change, BitmapId id, BitmapId from);
/* Runs a verb of qemu-img; in @command %TOP, %BASE, %OTHER are the images. */
bool world_verb(World *w, const char *command);

/* --- marks --- */
void world_mark_write(World *w, ViewId view, unsigned first, unsigned n, unsigned value);
/* @view becomes as @from is. */
void world_mark_merge(World *w, ViewId view, ViewId from);
/* The top becomes as its base is, with zeroes behind a short one. */
void world_mark_shows_base(World *w);
void world_mark_resize(World *w, ViewId view, unsigned sectors);
/* It comes into being, as a copy of @from; it goes away. */
void world_mark_appear(World *w, ViewId view, ViewId from);
void world_mark_appear_empty(World *w, ViewId view);
void world_mark_vanish(World *w, ViewId view);
/* Something was done to all of the view: it is stable (@ok), or nobody knows. */
void world_mark_done(World *w, ViewId view, bool ok);

/* A world of its own that has the kind and the oracles as they are now: world_copy_clear(). */
World world_copy(const World *w);
void world_copy_clear(World *copy);
/* Begins to keep marks. */
void world_record(World *w);
/* Does to @copy what the marks of @w up to @time say. */
void world_advance(World *copy, const World *w, uint64_t time);

/* --- judging --- */
/* Opens every image read-write, checks it, and compares every view with what it may be. @exact:
 * leaks are not allowed either, nor are bitmaps in use. *ret_why says what is wrong. */
bool world_judge(const World *w, bool exact, char **ret_why);
/* The same for what @recorded became, when the bitmaps are those of @w. */
bool world_judge_end(const World *recorded, const World *w, char **ret_why);

#endif
