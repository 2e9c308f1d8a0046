/*
 * The block layer as its users see it: nodes, how they are opened, what they can do.
 *
 * A node (BlockDriverState) is an instance of a driver; children hang below it (BdrvChild): "file",
 * "backing", ...  A chain  overlay.qcow2 -> base.raw  looks like this:
 *
 *      BlockBackend -root-> [qcow2] -file-> [file overlay.qcow2]
 *                              `---backing-> [raw] -file-> [file base.raw]
 *
 * All functions block, all may be called from any thread unless they say otherwise.  Offsets and
 * lengths are bytes.  Control functions return bool or a pointer and fill a GError; I/O functions
 * (include/block/io.h) return 0 or -errno.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_BLOCK_H
#define BLOCK_BLOCK_H

#include <stdbool.h>
#include <stdint.h>
#include <glib.h>
#include <jansson.h>
#include "util/options.h"
#include "util/progress.h"

#pragma GCC visibility push(default) /* public: exported by libqblock */

typedef struct BlockDriver BlockDriver;
typedef struct BlockDriverState BlockDriverState;
typedef struct BdrvChild BdrvChild;
typedef struct BlockBackend BlockBackend;

/* One request may move at most this much; longer zero, discard and status requests are split. */
#define BDRV_REQUEST_MAX_BYTES ((int64_t)INT32_MAX / 512 * 512) /* 2^31 - 512 */
#define BDRV_SECTOR_SIZE 512
#define BDRV_NODE_NAME_MAX 31

/* Open flags. What users can say is an option; flags are what the tools decide. */
typedef enum BdrvOpenFlags {
    BDRV_O_RDWR = 1 << 0,         /* writable (option read-only=off) */
    BDRV_O_RESIZE = 1 << 1,       /* the user will truncate */
    BDRV_O_SNAPSHOT = 1 << 2,     /* writes go to a temporary overlay that is dropped at close */
    BDRV_O_NO_BACKING = 1 << 3,   /* do not open the backing file */
    BDRV_O_NO_IO = 1 << 4,        /* metadata only: no guest data is read (info); and with NO_BACKING
                                   * no data file opened */
    BDRV_O_CHECK = 1 << 5,        /* for check: tolerate what check can repair, do not auto-repair */
    BDRV_O_COPY_ON_READ = 1 << 6, /* reads fill the overlay */
    BDRV_O_PROTOCOL = 1 << 7,     /* filename names a protocol node, no format probing */
    BDRV_O_BACKING_LATER = 1 << 8, /* will get a backing file: what is zero must be said to be */
    BDRV_O_AIO_NATIVE = 1 << 9,   /* files run batches by the kernel's aio where no option "aio" ... */
    BDRV_O_AIO_THREADS = 1 << 10, /* ... says otherwise; or by threads */
    BDRV_O_NO_NAMES = 1 << 12,    /* open nothing that an image names: no backing, no data file */
    BDRV_O_TRIAL = 1 << 13,       /* nothing of it is to last: copying guest data may be left out */
    BDRV_O_SCATTERED = 1 << 14,   /* the map will be looked at here and there: small pieces of it are
                                   * loaded where nobody says otherwise */
    BDRV_O_NO_SHARE = 1 << 11,    /* for blk_new_open(): nobody else may write meanwhile */
} BdrvOpenFlags;

/*
 * Options every node understands (flat keys): driver, node-name, read-only, auto-read-only,
 * force-share, detect-zeroes (off|on|unmap), discard (ignore|unmap), cache.direct, cache.no-flush,
 * copy-on-read; plus the driver's own, and "file", "backing" (a node-name, null, or "file.*").
 */

/*
 * Opens a node. @filename may be NULL (then @options say it all), a plain name, "json:{...}", or
 * "driver:rest"; without BDRV_O_PROTOCOL and a "driver" option the format is probed.  @options
 * (flat; reference stolen; may be NULL) override what the file name says.  The new reference is the
 * caller's.  Errors begin with "Could not open 'F': ", where F is the name or the options as they were
 * given; callers add nothing.  Not under the graph lock.
 */
BlockDriverState *bdrv_open(const char *filename, json_t *options, int flags, GError **errp);
/*
 * The same for images nobody vouches for: @guard->opened runs once, when the file that the name means is
 * open and before a byte of it is looked at, so that the process can give up what it does not need any
 * more.  Its failure ends the opening.  NULL @guard: nothing runs.
 */
typedef struct BdrvOpenGuard {
    bool (*opened)(void *opaque, GError **errp);
    void *opaque;
} BdrvOpenGuard;
BlockDriverState *bdrv_open_guarded(const char *filename, json_t *options, int flags,
                                    const BdrvOpenGuard *guard, GError **errp);
void bdrv_ref(BlockDriverState *bs);
/* The last one closes the node: flush, driver close, children. Not under the graph lock. */
void bdrv_unref(BlockDriverState *bs);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(BlockDriverState, bdrv_unref)

/* Finds a node by node-name; borrowed, or NULL. */
BlockDriverState *bdrv_find_node(const char *node_name);

/*
 * Changes options of an open node (all of "its" options: those not named go back to their
 * defaults unless @keep_old; read-only stays as it is unless it is named).  @options: flat, reference
 * stolen; "file.*" and the like go to children that were opened for this node.  What is inherited
 * changes below, too.  Prepare on the whole subtree, then commit; a failure leaves the old state.
 * Drains the nodes: not inside a request, not under the graph lock.
 */
bool bdrv_reopen(BlockDriverState *bs, json_t *options, bool keep_old, GError **errp);
bool bdrv_reopen_set_read_only(BlockDriverState *bs, bool read_only, GError **errp);

/* --- facts about a node --- */
const char *bdrv_get_node_name(const BlockDriverState *bs);
const char *bdrv_get_format_name(const BlockDriverState *bs); /* of its driver */
const char *bdrv_filename(const BlockDriverState *bs);        /* as users named it, or json:{...} */
bool bdrv_is_read_only(const BlockDriverState *bs);
/* Guest-visible size; cached, cheap. -errno on failure. */
int64_t bdrv_getlength(BlockDriverState *bs);
/* True when writes may make @bs longer (files, not devices). */
bool bdrv_can_grow(const BlockDriverState *bs);
/* Like bdrv_getlength(), but asks the system again: somebody may have made a device longer. */
int64_t bdrv_ask_length_again(BlockDriverState *bs);
/* Bytes the node occupies on its storage (st_blocks), children's data files included; or -errno. */
int64_t bdrv_get_allocated_file_size(BlockDriverState *bs);
/* The backing node below filters, or NULL. Borrowed: valid while the caller holds the graph lock, or
 * knows that nobody changes the chain. */
BlockDriverState *bdrv_backing_chain_next(BlockDriverState *bs);
/* The backing file name as the image header has it ("" if none), and its format. Borrowed. */
const char *bdrv_backing_name(const BlockDriverState *bs);
const char *bdrv_backing_format(const BlockDriverState *bs);
/* Resolves @name relative to the directory of @bs's file. Newly allocated. */
char *bdrv_resolve_backing_name(BlockDriverState *bs, const char *name, GError **errp);
/* The same for an image that is not open: @name as it would stand in the header of image @image. */
char *bdrv_resolve_name_against(const char *image, const char *name, GError **errp);
/* The node in @bs's backing chain that users call @name (file name or node-name), or NULL. */
BlockDriverState *bdrv_find_backing_image(BlockDriverState *bs, const char *name);

typedef struct BlockLimits {
    uint32_t request_alignment;  /* power of two, >= 1: requests are padded to it */
    uint32_t pdiscard_alignment; /* 0: none */
    uint32_t pwrite_zeroes_alignment;
    int64_t max_pdiscard;      /* 0: no limit but BDRV_REQUEST_MAX_BYTES per driver call */
    int64_t max_pwrite_zeroes;
    uint32_t opt_transfer, max_transfer; /* 0: unknown / none */
    size_t min_mem_alignment, opt_mem_alignment;
    int max_iov;
} BlockLimits;
const BlockLimits *bdrv_limits(const BlockDriverState *bs);
/* Memory fit for direct I/O on @bs; NULL when there is none. free() it. */
void *bdrv_try_blockalign(BlockDriverState *bs, size_t size);

typedef struct BlockDriverInfo {
    uint32_t cluster_size;     /* 0: none */
    uint32_t subcluster_size;  /* == cluster_size without subclusters */
    int64_t vm_state_offset;   /* -1: none */
    bool is_dirty;             /* not cleanly shut down */
    bool is_encrypted;
} BlockDriverInfo;
bool bdrv_get_info(BlockDriverState *bs, BlockDriverInfo *ret_info, GError **errp);
/* Format specific information as JSON {"type":..., "data":{...}} in print order; NULL if none. New ref. */
json_t *bdrv_get_specific_info(BlockDriverState *bs, GError **errp);

/* --- creating --- */
/* Table of a driver's creation options; NULL: cannot create. */
const QbOptDesc *bdrv_create_options(const BlockDriver *drv);
/* What bdrv_amend() knows; NULL: nothing can be amended. */
const QbOptDesc *bdrv_amend_options(const BlockDriver *drv);
/*
 * Creates an image. @options (flat, borrowed) hold "size", "backing_file", ... by their
 * `qemu-img create -o` names.  Never removes a file that was there before; what a failed create
 * added it removes. @progress grows by what preallocation writes and may cancel it (ECANCELED);
 * NULL: nobody looks.
 */
bool bdrv_img_create(const char *filename, const char *format, json_t *options,
                     QbProgress *progress, GError **errp);
/* What a new image would take, in bytes of its file (with an external data file: of both). */
typedef struct BlockMeasureInfo {
    uint64_t required;        /* holding what the source holds; without a source, no guest data */
    uint64_t fully_allocated; /* holding data everywhere */
    bool has_bitmaps;         /* source and format can both store bitmaps; else bitmaps is 0 */
    uint64_t bitmaps;         /* taken by the source's bitmaps in addition, broken ones left out */
} BlockMeasureInfo;
/*
 * Measures an image of format @drv, made with @options (flat, borrowed, as for bdrv_img_create), that
 * would hold the content of @source; NULL: an empty one of option "size".  Reads block status, never
 * data.  Holds the graph lock meanwhile.  *ret only on success.
 */
bool bdrv_measure(const BlockDriver *drv, const json_t *options, BlockDriverState *source,
                  BlockMeasureInfo *ret, GError **errp);
const BlockDriver *bdrv_find_format(const char *format_name);
/* The driver named by the "proto:" prefix of @filename, or "file"/"host_device" as it is. */
const BlockDriver *bdrv_find_protocol(const char *filename, bool allow_prefix, GError **errp);
/* Calls @cb for each registered driver name, sorted. */
void bdrv_for_each_driver(void (*cb)(const BlockDriver *drv, void *opaque), void *opaque);
const char *bdrv_driver_name(const BlockDriver *drv);
bool bdrv_driver_can_create(const BlockDriver *drv);
bool bdrv_driver_supports_backing(const BlockDriver *drv);

/* --- changing (each takes the whole node in the range lock; never under the graph lock) --- */
typedef enum PreallocMode {
    PREALLOC_MODE_OFF,
    PREALLOC_MODE_METADATA,
    PREALLOC_MODE_FALLOC,
    PREALLOC_MODE_FULL,
} PreallocMode;
extern const char *const prealloc_mode_names[]; /* NULL-terminated: off metadata falloc full */

/* Writes names into the header; the open graph does not change. @backing_file NULL or "": none. */
bool bdrv_change_backing_file(BlockDriverState *bs, const char *backing_file,
                              const char *backing_fmt, GError **errp);
/* Switches the open graph: @backing (may be NULL) becomes the backing child. Drains @bs. */
bool bdrv_set_backing(BlockDriverState *bs, BlockDriverState *backing, GError **errp);
/* How long the file of an image is, and would be; -1: not known. An external data file is another one. */
typedef struct BdrvFileLengths {
    int64_t now, then;
} BdrvFileLengths;
/*
 * What a shrink of @bs to @length would do, tried in memory: it fails as the shrink would fail.  No
 * length is known of what is no format; nor is the future one where the image lies on a device, or
 * where @length is not shorter.  @bs is read-only and is only read; nobody else may write to it
 * meanwhile.  Not under the graph lock.
 */
bool bdrv_try_shrink(BlockDriverState *bs, int64_t length, BdrvFileLengths *ret, GError **errp);
/* Drops all guest data of an overlay so that it reads as its backing file. To its dirty bitmaps that is a
 * write of what it had, unless @committed: the backing file has the same, so nothing changes. */
bool bdrv_make_empty(BlockDriverState *bs, bool committed, GError **errp);
/* True when compressed writes are possible. */
bool bdrv_supports_compression(const BlockDriverState *bs);
/* True when the driver has make_empty. */
bool bdrv_can_make_empty(const BlockDriverState *bs);
/* @options: flat, by `qemu-img amend -o` names, reference stolen. */
bool bdrv_amend(BlockDriverState *bs, json_t *options, QbProgress *progress, GError **errp);

/* --- internal snapshots --- */
typedef struct BdrvSnapshotInfo {
    char *id, *name;
    uint64_t vm_state_size;
    uint64_t disk_size;
    uint32_t date_sec, date_nsec;
    uint64_t vm_clock_nsec;
    uint64_t icount; /* UINT64_MAX: unknown */
} BdrvSnapshotInfo;
void bdrv_snapshot_info_clear(BdrvSnapshotInfo *sn);
bool bdrv_can_snapshot(const BlockDriverState *bs);
bool bdrv_snapshot_create(BlockDriverState *bs, const char *name, GError **errp);
/* Reverts to the snapshot whose ID, or else name, is @id_or_name. */
bool bdrv_snapshot_apply(BlockDriverState *bs, const char *id_or_name, GError **errp);
/* Deletes by @id and/or @name; NULL matches anything. ENOENT when there is none. */
bool bdrv_snapshot_delete(BlockDriverState *bs, const char *id, const char *name, GError **errp);
/* GArray of BdrvSnapshotInfo (cleared with the array). Empty array when there are none. */
GArray *bdrv_snapshot_list(BlockDriverState *bs, GError **errp);
/* Makes the (read-only) node show the content of a snapshot. */
bool bdrv_snapshot_load_tmp(BlockDriverState *bs, const char *id_or_name, GError **errp);

/* --- check --- */
typedef enum BdrvCheckFix { BDRV_FIX_LEAKS = 1, BDRV_FIX_ERRORS = 2 } BdrvCheckFix;
typedef enum BdrvFindingClass {
    BDRV_FINDING_LEAK,
    BDRV_FINDING_CORRUPTION,
    BDRV_FINDING_CHECK_ERROR, /* the check itself could not look */
    BDRV_FINDING_INFO,        /* said to the user, counted nowhere */
} BdrvFindingClass;
/* A record per finding; @text is what the field's tools print, without prefix or newline. */
typedef struct BdrvCheckFinding {
    BdrvFindingClass kind;
    const char *code; /* stable short name, "refcount-mismatch" */
    const char *text;
    uint64_t offset;  /* host offset it is about, UINT64_MAX if none */
    bool fixed;
} BdrvCheckFinding;
typedef struct BdrvCheckResult {
    uint64_t corruptions, leaks, check_errors;
    uint64_t corruptions_fixed, leaks_fixed;
    int64_t image_end_offset; /* 0: not known */
    uint64_t total_clusters, allocated_clusters, fragmented_clusters, compressed_clusters;
} BdrvCheckResult;
typedef struct BdrvCheckOptions {
    unsigned fix; /* BdrvCheckFix bits */
    void (*finding)(const BdrvCheckFinding *finding, void *opaque); /* may be NULL */
    void *opaque;
    QbProgress *progress; /* may be NULL */
} BdrvCheckOptions;
/* False: the check could not be run (ENOTSUP: the format has none); findings are not failures. */
bool bdrv_check(BlockDriverState *bs, const BdrvCheckOptions *opts, BdrvCheckResult *result,
                GError **errp);

/* --- process --- */
/* Registers the built-in drivers (idempotent). Call before anything else here. */
void bdrv_init(void);
/* Where warnings go ("WARNING: Image format was not specified ..."); default: nowhere. The text may
 * hold several lines. Set once, before the first open. */
void bdrv_set_warning_handler(void (*fn)(const char *text, void *opaque), void *opaque);
void bdrv_warn(const char *fmt, ...) G_GNUC_PRINTF(1, 2);
#pragma GCC visibility pop

#endif
