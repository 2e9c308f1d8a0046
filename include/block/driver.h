/*
 * The driver interface: what a driver is and what the core promises to it.
 *
 * Thread rules.  open, close, reopen_*, create: one at a time per node, no request in flight.
 * Everything else: any thread, many at once.  The core holds the graph lock shared around every
 * callback but open/close/reopen/create, which run without it.
 * Requests reach a driver padded to bl.request_alignment, inside the node (writes may grow only with
 * has_variable_length), at most bl.max_transfer and BDRV_REQUEST_MAX_BYTES long.  Zero and discard
 * requests are cut to bl.pwrite_zeroes_alignment / pdiscard_alignment where longer than it.
 * Callbacks return 0 or -errno, -ENOTSUP where the core may fall back, unless they take a GError.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_DRIVER_H
#define BLOCK_DRIVER_H

#include "block/block.h"
#include "block/dirty-bitmap-int.h"
#include "block/io.h"
#include "block/locks.h"
#include "util/rangelock.h"

/* Permissions on a node, as the field counts them; image locks show them to other processes. */
enum {
    BLK_PERM_CONSISTENT_READ = 1 << 0,
    BLK_PERM_WRITE = 1 << 1,
    BLK_PERM_WRITE_UNCHANGED = 1 << 2,
    BLK_PERM_RESIZE = 1 << 3,
    BLK_PERM_ALL = 0xf,
};

typedef enum BdrvChildRole {
    BDRV_CHILD_DATA = 1 << 0,
    BDRV_CHILD_METADATA = 1 << 1,
    BDRV_CHILD_FILTERED = 1 << 2,
    BDRV_CHILD_COW = 1 << 3,
    BDRV_CHILD_PRIMARY = 1 << 4,
    BDRV_CHILD_IMAGE = BDRV_CHILD_DATA | BDRV_CHILD_METADATA | BDRV_CHILD_PRIMARY,
} BdrvChildRole;

struct BdrvChild {
    BlockDriverState *bs;     /* the node below; switched under the exclusive graph lock */
    BlockDriverState *parent; /* NULL when a BlockBackend is the parent */
    BlockBackend *blk;        /* NULL when a node is the parent */
    char *name;               /* "file", "backing", "data-file", "root" */
    int role;                 /* BdrvChildRole */
    unsigned perm, shared;    /* BLK_PERM_*: what the parent does, and lets others do */
    unsigned new_perm, new_shared; /* while permissions are being settled (block/perm.c) */
    bool quiesced;            /* the parent counts the quiescing of @bs (block/graph.c) */
};

/* A request while it is inside a node. Lives on the submitter's stack. */
typedef enum BdrvRequestType {
    BDRV_TRACKED_READ,
    BDRV_TRACKED_WRITE,
    BDRV_TRACKED_ZERO,
    BDRV_TRACKED_DISCARD,
    BDRV_TRACKED_TRUNCATE,
    BDRV_TRACKED_WHOLE, /* snapshot, make_empty, amend, check with repair */
} BdrvRequestType;
typedef struct BdrvRequest {
    BlockDriverState *bs;
    BdrvRequestType type;
    QbRangeRequest range; /* unused (IDLE) for reads */
} BdrvRequest;

/*
 * The request is about to allocate or to change map entries: order it against all others that do, over
 * [offset, offset + bytes), which contains its range.  May wait: the caller must not be announced, nor
 * hold any lock.  Whatever was looked up before must be looked up again.
 * Requests that the core made serialising already (zero, discard, compressed, read-modify-write,
 * copy-on-read) have a range that is rounded out to the largest of bl.request_alignment,
 * pwrite_zeroes_alignment and pdiscard_alignment; a range granted cannot grow, so drivers must not ask
 * for more than that rounding gives.
 */
void bdrv_request_serialise(BdrvRequest *req, int64_t offset, int64_t bytes);
/*
 * A write that was not made serialising will not be, and may be passed by serialising requests that came
 * later: what it does now is right whatever they do meanwhile.  Until then, or its end, they wait.
 * The core may bring a request in pieces: only the one that reaches the end of its range may do this.
 */
void bdrv_request_settle(BdrvRequest *req);
/*
 * Work of a driver that no request asks for.  begin() counts it like a request, which drains of the
 * node and of those below it wait for, and lets whole-node operations and truncations that came
 * earlier end first (later ones wait for it).  False: the node is quiesced, not now.  Graph lock held
 * shared from before begin() to after end().
 */
bool bdrv_background_begin(BlockDriverState *bs, BdrvRequest *req);
void bdrv_background_end(BdrvRequest *req);

/*
 * For a driver's truncate(): keeps requests from changing what lies before the range that the truncation
 * holds, too, and waits for those that do.  Reads go on.  For short pieces of work: end() lets those go
 * on who wait, and for as long as it held them up, since the next begin() goes before all of them.  No
 * lock held, not announced.
 */
typedef struct BdrvWritePause {
    BdrvRequest req;
    uint64_t since; /* qb_now_ns() */
} BdrvWritePause;
void bdrv_truncate_pause_writes(BlockDriverState *bs, BdrvWritePause *pause);
void bdrv_truncate_resume_writes(BdrvWritePause *pause);

/* bdrv_request_serialise() in a driver's map(), for a range that has the units of the driver already:
 * false, with nothing changed, where it would wait. */
bool bdrv_request_try_serialise(BdrvRequest *req, int64_t offset, int64_t bytes);

/* --- the fast lane --- */
typedef struct BlkQueue BlkQueue; /* owned by one thread */
typedef enum BdrvMapIntent { BDRV_MAP_READ, BDRV_MAP_WRITE } BdrvMapIntent;
#define BDRV_MAP_MAX_EXTENTS 8
typedef struct BdrvMapExtent {
    bool zero;           /* read: reads as zeroes, no I/O */
    int fd;              /* -1 when zero */
    bool direct;         /* of fd: O_DIRECT */
    bool kernel_aio;     /* the kernel's asynchronous I/O may be used, not threads only */
    _Atomic(bool) *lacks_nowait; /* for qb_io_nowait(); lives as long as the mapping */
    _Atomic(bool) *lacks_copy;   /* the kernel cannot copy into this file; lives as long, too */
    bool copies_pages;   /* when it does, it moves page after page */
    int64_t host_offset; /* in fd */
    int64_t bytes;
} BdrvMapExtent;
#define BDRV_MAP_MAX_LAYERS (BDRV_MAP_MAX_EXTENTS + 3)
/* What a mapping is to one node on the way down; filled in by bdrv_map(), but for the token. */
typedef struct BdrvMapLayer {
    BlockDriverState *bs;
    BdrvRequest req;
    int64_t start, end; /* in the node, of what was mapped */
    void *token; /* the driver's, from its map to its map_done */
} BdrvMapLayer;
/* Rules in block/queue.h. Must stay where it is from bdrv_map() to bdrv_map_done(). */
typedef struct BdrvMapping {
    unsigned n;
    BdrvMapExtent ext[BDRV_MAP_MAX_EXTENTS]; /* cover the range from its start, in order */
    int64_t bytes;     /* covered in all; the rest is mapped by another call */
    BdrvMapLayer layer[BDRV_MAP_MAX_LAYERS]; /* in the order of the calls of bdrv_map() */
    unsigned layers;
    bool unused;       /* in map_done: nothing was transferred, the mapping is only given back */
    bool copied;       /* a write: done by copying inside the kernel, which may make holes */
    unsigned depth;    /* in callbacks: the driver's own layer is layer[depth] */
} BdrvMapping;

typedef struct BDRVReopenState {
    BlockDriverState *bs;
    json_t *options; /* flat; the driver takes what it knows */
    int flags;
    bool read_only;
    void *opaque; /* the driver's prepared state */
} BDRVReopenState;

struct BlockDriver {
    const char *format_name;
    const char *protocol_name; /* "file" in "file:name"; NULL for formats */
    size_t instance_size;
    bool is_format;            /* may be probed for and named with -f on a file */
    bool is_filter;            /* passes its "file" child through unchanged */
    bool supports_backing;
    bool has_variable_length;  /* others may change its length: ask again */
    bool has_fixed_length;     /* of a protocol: writes do not make it longer (a device) */
    bool needs_filename;
    /* Options that decide what the node shows (raw's "offset"); NULL-terminated, or NULL. A node that
     * has one set is not described by a plain file name. */
    const char *const *strong_options;

    /* --- opening --- */
    /* 0..100; @buf holds the first @len (up to 2048) bytes, the rest is zero. */
    int (*probe)(const uint8_t *buf, size_t len, const char *filename);
    int (*probe_device)(const char *filename);
    /* Puts what "proto:rest" means into @options. */
    bool (*parse_filename)(const char *filename, json_t *options, GError **errp);
    /* Takes what it knows out of @options (the core complains of the rest), opens children with
     * bdrv_open_child(). On failure the driver has undone its own part; the core drops children. */
    bool (*open)(BlockDriverState *bs, json_t *options, int flags, GError **errp);
    void (*close)(BlockDriverState *bs);
    bool (*reopen_prepare)(BDRVReopenState *state, GError **errp);
    void (*reopen_commit)(BDRVReopenState *state);
    void (*reopen_abort)(BDRVReopenState *state);
    /* A reopen has made the node writable; it is still drained. Repairs what open would repair.
     * Where that fails the node becomes read-only again. Optional. */
    bool (*reopen_repair)(BlockDriverState *bs, GError **errp);
    /* What the node needs of child @c given what its own parents do (@perm) and share (@shared).
     * NULL: the default by the child's role. */
    void (*child_perm)(BlockDriverState *bs, const BdrvChild *c, int role, unsigned perm,
                       unsigned shared, unsigned *ret_perm, unsigned *ret_shared);
    /* Protocol nodes: take the image locks. set: final; check+abort: see block/perm.c */
    bool (*check_perm)(BlockDriverState *bs, unsigned perm, unsigned shared, GError **errp);
    void (*set_perm)(BlockDriverState *bs, unsigned perm, unsigned shared);
    void (*abort_perm)(BlockDriverState *bs);
    void (*refresh_limits)(BlockDriverState *bs); /* fills bs->bl */
    /* bs->filename from options/children; NULL: the core's default. Newly allocated. */
    char *(*gather_filename)(BlockDriverState *bs);

    /* --- creating --- */
    const QbOptDesc *create_opts;
    const QbOptDesc *amend_opts;
    /* See bdrv_img_create(). */
    bool (*create)(const char *filename, json_t *options, QbProgress *progress, GError **errp);
    /* See bdrv_measure(). @options ("size" is there) may be taken from; @source may be NULL. */
    bool (*measure)(json_t *options, BlockDriverState *source, BlockMeasureInfo *ret,
                    GError **errp);

    /* --- requests --- */
    int (*preadv)(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                  IoVector *qiov, size_t qiov_offset, int flags);
    int (*pwritev)(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                   IoVector *qiov, size_t qiov_offset, int flags);
    int (*pwritev_compressed)(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                              IoVector *qiov, size_t qiov_offset);
    int (*pwrite_zeroes)(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                         int flags);
    int (*pdiscard)(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes);
    /* The extent at @offset: flags DATA ZERO OFFSET_VALID ALLOCATED COMPRESSED RECURSE; *ret->bytes at
     * most @bytes, at least 1 alignment unit; as long as the driver knows without extra I/O. */
    int (*block_status)(BlockDriverState *bs, int64_t offset, int64_t bytes, BdrvStatus *ret);
    /* Appends to @ranges (BdrvRange), in order and apart, where in [offset, +bytes), which is not empty,
     * block status may say ALLOCATED. For whole nodes: on all cores, past caches. NULL: anywhere. */
    int (*find_allocated)(BlockDriverState *bs, int64_t offset, int64_t bytes, GArray *ranges);
    /* Makes the driver's own metadata and, for protocols, the file stable. The core flushes nothing
     * below a format that has this callback: its order is the driver's (design: one barrier, then ...). */
    int (*flush)(BlockDriverState *bs);
    int (*run_batch)(BlockDriverState *bs, BdrvBatchOp *ops, size_t n); /* NULL: the core loops */
    unsigned supported_write_flags; /* FUA: else the core flushes after the write */
    unsigned supported_zero_flags;

    /* --- fast lane: see block/queue.h; -EAGAIN means "use a worker" --- */
    int (*map)(BlockDriverState *bs, BlkQueue *queue, BdrvMapIntent intent, int64_t offset,
               int64_t bytes, BdrvMapping *mapping);
    int (*map_done)(BlockDriverState *bs, BlkQueue *queue, BdrvMapping *mapping, int result);
    void (*cancel_in_flight)(BlockDriverState *bs); /* network: shut the socket down */
    void (*drain_begin)(BlockDriverState *bs); /* wake suspended, throttled, reconnecting requests */
    void (*drain_end)(BlockDriverState *bs);

    /* --- size --- */
    int64_t (*getlength)(BlockDriverState *bs);
    bool (*truncate)(BlockDriverState *bs, int64_t offset, bool exact, PreallocMode prealloc,
                     bool zero_new, GError **errp);
    /* A write that was padded to request_alignment has made the node @padded_end long, where @end
     * would do: cut it, unless it is longer by now. The range of the padding is granted. 0 or
     * -errno. */
    int (*cut_padding)(BlockDriverState *bs, int64_t end, int64_t padded_end);
    int64_t (*get_allocated_file_size)(BlockDriverState *bs);

    /* --- images --- */
    bool (*get_info)(BlockDriverState *bs, BlockDriverInfo *info, GError **errp);
    json_t *(*get_specific_info)(BlockDriverState *bs, GError **errp);
    bool (*check)(BlockDriverState *bs, const BdrvCheckOptions *opts, BdrvCheckResult *result,
                  GError **errp);
    bool (*amend)(BlockDriverState *bs, json_t *options, QbProgress *progress, GError **errp);
    bool (*change_backing_file)(BlockDriverState *bs, const char *file, const char *fmt,
                                GError **errp);
    bool (*make_empty)(BlockDriverState *bs, GError **errp);
    bool (*snapshot_create)(BlockDriverState *bs, const char *name, GError **errp);
    bool (*snapshot_apply)(BlockDriverState *bs, const char *id_or_name, GError **errp);
    bool (*snapshot_delete)(BlockDriverState *bs, const char *id, const char *name, GError **errp);
    GArray *(*snapshot_list)(BlockDriverState *bs, GError **errp);
    bool (*snapshot_load_tmp)(BlockDriverState *bs, const char *id_or_name, GError **errp);
    int (*save_vmstate)(BlockDriverState *bs, IoVector *qiov, int64_t pos);
    int (*load_vmstate)(BlockDriverState *bs, IoVector *qiov, int64_t pos);

    /* --- persistent dirty bitmaps; the node is held, but for mark_in_use --- */
    /* Lists it in the image, valid and empty, and puts it into the node's list. */
    bool (*bitmap_add)(BlockDriverState *bs, const BdrvDirtyParams *params, GError **errp);
    /* Takes it out of the image and frees it. */
    bool (*bitmap_remove)(BlockDriverState *bs, BdrvDirtyBitmap *bm, GError **errp);
    bool (*bitmaps_remove_all)(BlockDriverState *bs, GError **errp);
    /* Can those that are stored be stored for a disk of @size? Optional. */
    bool (*bitmaps_check_size)(BlockDriverState *bs, uint64_t size, GError **errp);
    /* Makes IN_USE of those bitmaps stable; @one with BDRV_BITMAPS_ONE. Many at once, inside requests
     * that have entered. 0 or -errno. */
    int (*bitmaps_mark_in_use)(BlockDriverState *bs, BdrvBitmapsWhich which, BdrvDirtyBitmap *one);
    /* Stores all that are in use, makes that and the rest of the image stable, then takes IN_USE off.
     * Writes nothing when none is in use. False: some are lost. */
    bool (*bitmaps_store)(BlockDriverState *bs, GError **errp);

    /* --- debugging (blkdebug) --- */
    void (*debug_event)(BlockDriverState *bs, const char *event);
    int (*debug_breakpoint)(BlockDriverState *bs, const char *event, const char *tag);
    int (*debug_remove_breakpoint)(BlockDriverState *bs, const char *tag);
    int (*debug_resume)(BlockDriverState *bs, const char *tag);
    bool (*debug_is_suspended)(BlockDriverState *bs, const char *tag);
};

struct BlockDriverState {
    /* set at open */
    const BlockDriver *drv;
    void *opaque; /* instance_size zeroed bytes, the driver's */
    char node_name[BDRV_NODE_NAME_MAX + 1];
    char *filename;         /* as shown to users */
    json_t *options;        /* flat, all that make the node what it is; changed by reopen */
    json_t *explicit_options; /* flat, those the user said */
    bool opened;            /* drv->open has succeeded */
    bool implicit;          /* opened for its parent, not referenced: follows the parent's options */
    bool probed;            /* format was guessed: raw restricts block 0 */
    bool has_backing_override; /* options named another backing file than the header, or none */
    bool filename_exact;    /* the name alone, opened again, gives the same content */
    const struct BdrvOpenContext *open_context; /* while it is being opened (block/open.c) */

    /* changed by reopen, with the node drained */
    int open_flags; /* BdrvOpenFlags */
    bool read_only;
    bool auto_read_only; /* becomes read-only where its storage is, rather than fail */
    bool force_share;
    bool cache_direct, cache_no_flush;
    bool discard_unmap;
    int detect_zeroes; /* 0 off, 1 on, 2 unmap */
    BlockLimits bl;
    BDRVReopenState *reopening; /* prepared, not committed; graph change lock (block/core-int.h) */

    /* graph: changed under the exclusive graph lock, read under the shared one */
    BdrvChild *file, *backing;
    GPtrArray *children; /* BdrvChild* owned */
    GPtrArray *parents;  /* BdrvChild* of the parents, borrowed */
    char *backing_name, *backing_fmt; /* as in the header; "" for none */
    BdrvDirtyList dirty;

    /* requests */
    QbRangeLock ranges;
    BdrvRequest *truncation; /* the one that is inside; its thread only */
    _Atomic(unsigned) in_flight;
    _Atomic(unsigned) quiesce;
    _Atomic(int) refcnt;
    _Atomic(int64_t) length; /* bytes, -1: not known */
    QbProgress *resize_progress; /* of the truncate under way, there is one at most; NULL: nobody looks */
};

/* --- for drivers' open --- */
/* Opens or finds child @name of @bs: option "@name" as a node-name, or "@name.*", or @filename.
 * Attaches it. NULL and error, or NULL without error when absent and @allow_none. */
BdrvChild *bdrv_open_child(BlockDriverState *bs, const char *filename, json_t *options,
                           const char *name, int role, bool allow_none, GError **errp);
/* The usual "file" child of a format; sets bs->file. */
bool bdrv_open_file_child(BlockDriverState *bs, const char *filename, json_t *options, int role,
                          GError **errp);
void bdrv_detach_child(BdrvChild *child); /* drops the reference; not under the graph lock */
/* The default of child_perm, for drivers that change it a little. */
void bdrv_default_perms(BlockDriverState *bs, int role, unsigned perm, unsigned shared,
                        unsigned *ret_perm, unsigned *ret_shared);
/* The child's node changed length; refresh the cache and tell parents that depend on it. */
void bdrv_set_length(BlockDriverState *bs, int64_t length);
/* The backing names the header holds; called by open and change_backing_file. */
void bdrv_set_backing_names(BlockDriverState *bs, const char *file, const char *fmt);

/* --- for formats: what the backing file shows where the image has nothing --- */
/* Bytes from @offset on, at most @bytes, that the backing file decides on, or -errno. What follows
 * reads zero: it lies beyond the end of the backing file or of the disk. */
int64_t bdrv_backing_bytes(BlockDriverState *bs, int64_t offset, int64_t bytes);
/* Reads it, with those zeroes, to @qiov_offset of the vector. */
int bdrv_backing_read(BlockDriverState *bs, int64_t offset, int64_t bytes, IoVector *qiov,
                      size_t qiov_offset);
/* 1 when that is known to be zero, 0 when not, or -errno. Never reads data. */
int bdrv_backing_reads_zero(BlockDriverState *bs, int64_t offset, int64_t bytes);
/* Does, or may, something show where nothing is allocated? Then zeroes must be said to be there. */
bool bdrv_may_be_backed(BlockDriverState *bs);
/* Up to here something may show, now or later, or -errno: the end of the disk does not count, since
 * growing clears what it uncovers. INT64_MAX where a backing file is meant that is not open. */
int64_t bdrv_backing_end(BlockDriverState *bs);
/* End of what it would show in the grown part of the disk, @old_length when nothing, or -errno. */
int64_t bdrv_backing_end_in_growth(BlockDriverState *bs, int64_t old_length, int64_t new_length);

/* For a format's create: makes the protocol file @filename, empty ("size" is not looked at), and takes
 * the options its protocol knows out of @options. A file that exists is emptied: check everything else
 * before. */
bool bdrv_create_file(const char *filename, json_t *options, GError **errp);

/* Event named as in qapi (underscores); blkdebug nodes below may fail or suspend at it. */
void bdrv_debug_event(BdrvChild *child, const char *event);
int bdrv_debug_breakpoint(BlockDriverState *bs, const char *event, const char *tag);
int bdrv_debug_remove_breakpoint(BlockDriverState *bs, const char *tag);
int bdrv_debug_resume(BlockDriverState *bs, const char *tag);
bool bdrv_debug_is_suspended(BlockDriverState *bs, const char *tag);

void bdrv_register(const BlockDriver *drv);

/* Built-in drivers. */
extern const BlockDriver bdrv_file, bdrv_host_device, bdrv_null_co, bdrv_null_aio, bdrv_raw,
    bdrv_blkdebug, bdrv_scratch, bdrv_qcow2, bdrv_qed;

#endif
