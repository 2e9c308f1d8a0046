/*
 * The qcow2 driver: opening, closing and the table of what it can do.
 *
 *     open:   file child -> header, extensions -> may we? -> geometry -> options -> data file
 *             -> rooms (cache, refcounts, L1) -> snapshots -> names -> repair if dirty -> ready
 *     close:  write back -> owed corrupt bit -> give up the rooms
 *
 * Each step is a function that needs only what the steps before it have set; teardown() takes apart
 * whatever has been built so far, so that a failing step just returns.
 *
 * Rules
 *  1. Nothing is written by an open that does not have to repair: autoclear bits that this driver
 *     does not keep true (the unknown ones, and the bitmaps bit where the directory cannot be read)
 *     are cleared by the gate in front of the first change, see qcow2_begin_change().  Such bitmaps'
 *     extension and clusters stay: whoever knows them sees by the bit that they are out of date.
 *  2. A dirty image is repaired before anything else may change it.
 *  3. The external data file's name comes out of an image that somebody else may have written: it
 *     is a plain file name and never parsed, and it is not opened where no guest data is wanted.
 *  4. Lazy refcounts are allowed by the format, not required: counts are always written in order.
 *     The dirty bit is set by operations that need it (snapshots, shrink, amend), and where the
 *     option is on, while a session allocates (qcow2-lazy.c).
 *
 * Not done: encryption.  Such images open for metadata work only, which needs no key: info, check,
 * snapshots, amend, resize.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2.h"
#include "block/qcow2-bitmap.h"
#include "block/qcow2-requests.h"

#include <inttypes.h>
#include <string.h>

#include "util/iov.h"

/* ---------------------------------------------------------------- taking apart */

static void teardown(BDRVQcow2State *s)
{
    qcow2_background_stop(s);
    g_clear_pointer(&s->bitmaps, qcow2_bitmaps_free);
    g_clear_pointer(&s->compressor, qcow2_compressor_free);
    g_clear_pointer(&s->flusher, qcow2_flusher_free);
    g_clear_pointer(&s->quarantine, qcow2_quarantine_free);
    g_clear_pointer(&s->inflight, qcow2_inflight_free);
    g_clear_pointer(&s->l1, qcow2_l1_free);
    g_clear_pointer(&s->cleared, g_hash_table_destroy);
    qcow2_refcount_close(s->bs);
    g_clear_pointer(&s->free_index, qcow2_free_index_free);
    g_clear_pointer(&s->cache, qcow2_cache_free);
    g_clear_pointer(&s->snapshots, g_array_unref);
    g_clear_pointer(&s->guard, qcow2_guard_free);
    g_clear_pointer(&s->extensions, g_array_unref);
    g_clear_pointer(&s->header_tail, g_free);
    qb_cond_destroy(&s->alloc_wait);
    qb_mutex_destroy(&s->alloc_lock);
    qb_mutex_destroy(&s->lock);
    qb_mutex_destroy(&s->header_lock);
}

static void init_state(BlockDriverState *bs)
{
    BDRVQcow2State *s = qcow2_state(bs);
    s->bs = bs;
    qb_mutex_init(&s->header_lock);
    qb_mutex_init(&s->lock);
    qb_mutex_init(&s->alloc_lock);
    qb_cond_init(&s->alloc_wait);
    s->cut_at = UINT64_MAX;
}

/* ---------------------------------------------------------------- steps of open */

static bool check_may_open(BlockDriverState *bs, int flags, GError **errp)
{
    const Qcow2Header *h = &qcow2_state(bs)->header;
    bool metadata_only = flags & (BDRV_O_NO_IO | BDRV_O_CHECK);
    if ((h->incompatible & QCOW2_INCOMPAT_CORRUPT) && !bdrv_is_read_only(bs) &&
        !(flags & BDRV_O_CHECK)) {
        qb_error_set(errp, EACCES, "qcow2: Image is corrupt; cannot be opened read/write");
        return false;
    }
    if (h->crypt_method != QCOW2_CRYPT_NONE && !metadata_only) {
        qb_error_set(errp, ENOTSUP, "Encrypted qcow2 images are not supported (%s)",
                     h->crypt_method == QCOW2_CRYPT_AES ? "AES" : "LUKS");
        return false;
    }
    return true;
}

static void set_subclusters(BDRVQcow2State *s)
{
    s->has_subclusters = s->header.incompatible & QCOW2_INCOMPAT_EXTL2;
    s->subclusters_per_cluster = s->has_subclusters ? QCOW2_SUBCLUSTERS : 1;
    s->subcluster_size = s->cluster_size / s->subclusters_per_cluster;
    s->subcluster_bits = (unsigned)__builtin_ctz(s->subcluster_size);
    s->l2_entry_size = s->has_subclusters ? 16 : 8;
    s->l2_bits = s->cluster_bits - (s->has_subclusters ? 4 : 3);
    s->l2_entries = 1u << s->l2_bits;
}

void qcow2_set_refcount_order(BDRVQcow2State *s, unsigned order)
{
    s->refcount_order = order;
    s->refblock_bits = s->cluster_bits + 3 - order;
    s->refcount_max = order == 6 ? UINT64_MAX : (UINT64_C(1) << (1u << order)) - 1;
}

/* Numbers that follow from the (validated) header and stay until close. */
static void set_geometry(BDRVQcow2State *s)
{
    const Qcow2Header *h = &s->header;
    s->version = (int)h->version;
    s->cluster_bits = h->cluster_bits;
    s->cluster_size = 1u << h->cluster_bits;
    set_subclusters(s);
    qcow2_set_refcount_order(s, h->refcount_order);
    s->compression_type = h->compression_type;
    s->csize_shift = 70 - s->cluster_bits;
    s->csize_mask = (UINT64_C(1) << (s->cluster_bits - 8)) - 1;
    s->has_data_file = h->incompatible & QCOW2_INCOMPAT_DATA_FILE;
    s->data_file_raw = h->autoclear & QCOW2_AUTOCLEAR_DATA_FILE_RAW;
    s->crypt_method = h->crypt_method;
}

static bool take_options(BlockDriverState *bs, json_t *options, GError **errp)
{
    Qcow2Options o;
    if (qcow2_state(bs)->crypt_method) {
        json_decref(qb_opts_take_prefix(options, "encrypt")); /* a key that nobody needs here */
    }
    if (!qcow2_options_take(bs, options, &o, errp)) {
        return false;
    }
    qcow2_options_apply(qcow2_state(bs), &o);
    return true;
}

/* What the image says becomes an option "filename", which nobody parses. A relative name is
 * relative to the current directory, as elsewhere in the field (backing files are relative to the
 * image). */
static bool name_data_file(BlockDriverState *bs, json_t *options, GError **errp)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    const Qcow2Extension *ext = qcow2_find_extension(s->extensions, QCOW2_EXT_DATA_FILE);
    if (json_object_get(options, "data-file") || qb_opts_has_prefix(options, "data-file")) {
        return true;
    }
    if (!ext || !ext->length || strlen((const char *)ext->data) != ext->length) {
        qb_error_set(errp, EINVAL, "'data-file' is required for this image");
        return false;
    }
    if (bs->open_flags & BDRV_O_NO_NAMES) {
        qb_error_set(errp, EACCES, "Could not open the data file: The image names '%s'; files that "
                     "images name are not to be opened", (const char *)ext->data);
        return false;
    }
    json_object_set_new(options, "data-file.filename",
                        json_string_nocheck((const char *)ext->data));
    return true;
}

static bool open_external_data(BlockDriverState *bs, json_t *options, int flags, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    /* Resize and amend change it; check repairs only what the image itself holds. Who has backing
     * files opened may have to read them: a disk that grows keeps what its last cluster shows. */
    bool alone = flags & (BDRV_O_NO_BACKING | BDRV_O_CHECK);
    if ((flags & BDRV_O_NO_IO) && alone && (bdrv_is_read_only(bs) || (flags & BDRV_O_CHECK))) {
        json_object_del(options, "data-file");
        json_decref(qb_opts_take_prefix(options, "data-file"));
        return true;
    }
    if (!name_data_file(bs, options, errp)) {
        return false;
    }
    s->data_file = bdrv_open_child(bs, NULL, options, "data-file", BDRV_CHILD_DATA, false, errp);
    if (!s->data_file) {
        g_prefix_error(errp, "Could not open the data file: ");
    }
    return s->data_file != NULL;
}

static bool open_data_file(BlockDriverState *bs, json_t *options, int flags, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    if (s->has_data_file) {
        return open_external_data(bs, options, flags, errp);
    }
    if (json_object_get(options, "data-file") || qb_opts_has_prefix(options, "data-file")) {
        qb_error_set(errp, EINVAL,
                     "'data-file' can only be set for images with an external data file");
        return false;
    }
    s->data_file = bs->file;
    return true;
}

/* A table that begins beyond the end would show an empty disk: refused. */
uint64_t *qcow2_read_l1(BlockDriverState *bs, uint64_t offset, uint32_t entries, const char *name,
                        GError **errp)
{
    uint64_t bytes = (uint64_t)entries * 8;
    int64_t file_bytes = bdrv_getlength(bs->file->bs);
    if (file_bytes < 0) {
        qb_error_set_errno(errp, (int)file_bytes, "Could not get the length of the image file");
        return NULL;
    }
    if (bytes && offset >= (uint64_t)file_bytes) {
        qb_error_set(errp, EINVAL, "%s lies beyond the end of the image file", name);
        return NULL;
    }
    g_autofree uint64_t *l1 = g_try_malloc0(bytes + 8);
    uint64_t present = bytes ? MIN(bytes, (uint64_t)file_bytes - offset) : 0;
    int ret = !l1 ? -ENOMEM : 0;
    if (ret == 0 && present) {
        ret = bdrv_pread(bs->file, (int64_t)offset, (int64_t)present, l1, 0);
    }
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Could not read the %s", name);
        return NULL;
    }
    return g_steal_pointer(&l1);
}

static bool open_l1(BlockDriverState *bs, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    uint64_t *entries = qcow2_read_l1(bs, s->header.l1_offset, s->header.l1_size, "Active L1 table",
                                      errp);
    if (!entries) {
        return false;
    }
    s->l1 = qcow2_l1_new(s, entries, s->header.l1_size, s->header.l1_offset);
    return true;
}

static bool open_rooms(BlockDriverState *bs, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    s->guard = qcow2_guard_new(s);
    qcow2_guard_bitmaps(s);
    s->inflight = qcow2_inflight_new();
    s->quarantine = qcow2_quarantine_new();
    s->flusher = qcow2_flusher_new();
    s->compressor = qcow2_compressor_new();
    Qcow2CacheConfig config = qcow2_cache_config(s);
    s->cache = qcow2_cache_new(bs, &config);
    s->free_index = qcow2_free_index_new();
    s->background = qcow2_background_new(bs);
    s->bitmaps = qcow2_bitmaps_new();
    return qcow2_refcount_init(bs, errp) && open_l1(bs, errp);
}

static bool load_names(BlockDriverState *bs, GError **errp)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    const Qcow2Extension *fmt = qcow2_find_extension(s->extensions, QCOW2_EXT_BACKING_FORMAT);
    char name[QCOW2_MAX_BACKING_NAME + 1] = "";
    if (s->header.backing_offset && s->header.backing_size) {
        assert(s->header.backing_size < sizeof(name));
        int ret = bdrv_pread(bs->file, (int64_t)s->header.backing_offset, s->header.backing_size,
                             name, 0);
        if (ret < 0) {
            qb_error_set_errno(errp, ret, "Could not read backing file name");
            return false;
        }
    }
    bdrv_set_backing_names(bs, name, fmt ? (const char *)fmt->data : "");
    return true;
}

void qcow2_set_autoclear_pending(BDRVQcow2State *s)
{
    uint64_t kept = QCOW2_AUTOCLEAR_DATA_FILE_RAW;
    kept |= qcow2_bitmaps_maintained(s) ? QCOW2_AUTOCLEAR_BITMAPS : 0;
    atomic_store(&s->autoclear_pending, s->header.autoclear & ~kept);
}

static void warn_of_stale_bitmaps(const BDRVQcow2State *s)
{
    const Qcow2Extension *ext = qcow2_find_extension(s->extensions, QCOW2_EXT_BITMAPS);
    if (!ext || (s->header.autoclear & QCOW2_AUTOCLEAR_BITMAPS)) {
        return;
    }
    bdrv_warn("%s", s->version >= 3
                  ? "a program lacking bitmap support modified this file, so all bitmaps are now"
                    " considered inconsistent"
                  : "This qcow2 v2 image contains bitmaps, but they may have been modified by a"
                    " program without persistent bitmap support; so now they must all be considered"
                    " inconsistent");
}

/* Before the bitmaps are read, as it may change their directory. */
static bool repair_if_dirty(BlockDriverState *bs, int flags, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    if (bdrv_is_read_only(bs) || (flags & BDRV_O_CHECK) ||
        !(s->header.incompatible & QCOW2_INCOMPAT_DIRTY)) {
        return true;
    }
    qcow2_set_autoclear_pending(s);
    BDRV_GRAPH_GUARD();
    int ret = qcow2_begin_change(bs, false);
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Could not repair dirty image");
        return false;
    }
    if (!qcow2_repair_dirty(bs, errp)) {
        g_prefix_error(errp, "Could not repair dirty image: ");
        return false;
    }
    ret = qcow2_finish_shrink(bs);
    if (ret < 0) { /* space only, and the next resize looks there again */
        bdrv_warn("Could not give back what lies beyond the end of the disk: %s", g_strerror(-ret));
    }
    return true;
}

/* The same for a node that was read-only until now. Its bitmaps are read again after it. */
static bool qcow2_reopen_repair(BlockDriverState *bs, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    if (!(s->header.incompatible & QCOW2_INCOMPAT_DIRTY)) {
        return true;
    }
    g_clear_pointer(&s->bitmaps, qcow2_bitmaps_free);
    s->bitmaps = qcow2_bitmaps_new();
    bool ok = repair_if_dirty(bs, 0, errp);
    ok = qcow2_bitmaps_load(bs, ok ? errp : NULL) && ok;
    qcow2_set_autoclear_pending(s); /* the bitmaps are known again */
    return ok;
}

static bool open_steps(BlockDriverState *bs, json_t *options, int flags, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    bool for_check = flags & BDRV_O_CHECK;
    if (!bdrv_open_file_child(bs, NULL, options, BDRV_CHILD_IMAGE, errp) ||
        !qcow2_header_load(bs, for_check, errp) || !check_may_open(bs, flags, errp)) {
        return false;
    }
    set_geometry(s);
    if (!take_options(bs, options, errp) || !open_data_file(bs, options, flags, errp) ||
        !open_rooms(bs, errp) || !qcow2_snapshots_load(bs, for_check, errp) ||
        !load_names(bs, errp) || !repair_if_dirty(bs, flags, errp) ||
        (!for_check && !qcow2_bitmaps_load(bs, errp))) {
        return false;
    }
    warn_of_stale_bitmaps(s);
    if (!bdrv_is_read_only(bs)) {
        qcow2_set_autoclear_pending(s);
    }
    return true;
}

static bool qcow2_open(BlockDriverState *bs, json_t *options, int flags, GError **errp)
{
    init_state(bs);
    if (!open_steps(bs, options, flags, errp)) {
        teardown(qcow2_state(bs));
        return false;
    }
    if (!(flags & BDRV_O_CHECK)) {
        qcow2_background_start(qcow2_state(bs));
    }
    return true;
}

/* Flushes until what was freed has been returned and that is written too. Errors have been told to
 * whoever flushed; what cannot be written now leaves leaks behind, never dangling references. */
static void write_back_for_close(BlockDriverState *bs)
{
    BDRV_GRAPH_GUARD();
    if (!atomic_load(&qcow2_state(bs)->corrupt) && qcow2_flush_all(bs) == 0) {
        (void)qcow2_lazy_settle(bs); /* else the next writable open repairs */
    }
    qcow2_corrupt_save(bs);
}

static void qcow2_close(BlockDriverState *bs)
{
    qcow2_background_stop(qcow2_state(bs));
    if (!bdrv_is_read_only(bs)) {
        write_back_for_close(bs);
    }
    teardown(qcow2_state(bs));
}

static int qcow2_probe(const uint8_t *buf, size_t len, const char *filename)
{
    return len >= 8 && qb_ldbe32(buf) == QCOW2_MAGIC && qb_ldbe32(buf + 4) >= 2 ? 100 : 0;
}

static int64_t qcow2_getlength(BlockDriverState *bs)
{
    BDRVQcow2State *s = qcow2_state(bs);
    QB_GUARD(&s->header_lock);
    return (int64_t)qb_align_down(s->header.size, BDRV_SECTOR_SIZE);
}

/* ---------------------------------------------------------------- the gate in front of changes */

static int gated_pwritev(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                         IoVector *qiov, size_t qiov_offset, int flags)
{
    int ret = qcow2_begin_change(bs, true);
    return ret < 0 ? ret : qcow2_pwritev(bs, req, offset, bytes, qiov, qiov_offset, flags);
}

static int gated_pwritev_compressed(BlockDriverState *bs, BdrvRequest *req, int64_t offset,
                                    int64_t bytes, IoVector *qiov, size_t qiov_offset)
{
    int ret = qcow2_state(bs)->crypt_method ? -EACCES : qcow2_begin_change(bs, true);
    return ret < 0 ? ret : qcow2_pwritev_compressed(bs, req, offset, bytes, qiov, qiov_offset);
}

static int gated_pwrite_zeroes(BlockDriverState *bs, BdrvRequest *req, int64_t offset,
                               int64_t bytes, int flags)
{
    int ret = qcow2_begin_change(bs, true);
    return ret < 0 ? ret : qcow2_pwrite_zeroes(bs, req, offset, bytes, flags);
}

static int gated_pdiscard(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes)
{
    int ret = qcow2_begin_change(bs, true);
    return ret < 0 ? ret : qcow2_pdiscard(bs, req, offset, bytes);
}

static int gated_save_vmstate(BlockDriverState *bs, IoVector *qiov, int64_t pos)
{
    int ret = qcow2_begin_change(bs, false);
    return ret < 0 ? ret : qcow2_save_vmstate(bs, qiov, pos);
}

/* The queue's thread must not wait for the header: a worker opens the gate. */
static int gated_map(BlockDriverState *bs, BlkQueue *queue, BdrvMapIntent intent, int64_t offset,
                     int64_t bytes, BdrvMapping *mapping)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    if (s->crypt_method || (intent == BDRV_MAP_WRITE && atomic_load(&s->autoclear_pending))) {
        return -EAGAIN;
    }
    return qcow2_map(bs, queue, intent, offset, bytes, mapping);
}

/* The same for operations on the image, which may use the dirty bit and report through a GError. */
static bool open_gate(BlockDriverState *bs, bool guest, GError **errp)
{
    int ret = qcow2_begin_change(bs, guest);
    ret = ret < 0 ? ret : qcow2_lazy_settle(bs);
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Could not update qcow2 header");
    }
    return ret == 0;
}

static bool gated_truncate(BlockDriverState *bs, int64_t offset, bool exact, PreallocMode prealloc,
                           bool zero_new, GError **errp)
{
    return open_gate(bs, true, errp) &&
           qcow2_truncate(bs, offset, exact, prealloc, zero_new, errp);
}

static bool gated_make_empty(BlockDriverState *bs, GError **errp)
{
    return open_gate(bs, true, errp) && qcow2_make_empty(bs, errp);
}

static bool gated_snapshot_create(BlockDriverState *bs, const char *name, GError **errp)
{
    return open_gate(bs, false, errp) && qcow2_snapshot_create(bs, name, errp);
}

static bool gated_snapshot_apply(BlockDriverState *bs, const char *id_or_name, GError **errp)
{
    return open_gate(bs, true, errp) && qcow2_snapshot_apply(bs, id_or_name, errp);
}

static bool gated_snapshot_delete(BlockDriverState *bs, const char *id, const char *name,
                                  GError **errp)
{
    return open_gate(bs, false, errp) && qcow2_snapshot_delete(bs, id, name, errp);
}

static bool gated_change_backing_file(BlockDriverState *bs, const char *file, const char *fmt,
                                      GError **errp)
{
    return open_gate(bs, false, errp) && qcow2_change_backing_file(bs, file, fmt, errp);
}

static bool gated_amend(BlockDriverState *bs, json_t *options, QbProgress *progress, GError **errp)
{
    return open_gate(bs, json_object_get(options, "size"), errp) &&
           qcow2_amend(bs, options, progress, errp);
}

static bool gated_check(BlockDriverState *bs, const BdrvCheckOptions *opts,
                        BdrvCheckResult *result, GError **errp)
{
    if (opts->fix && !bdrv_is_read_only(bs) && !open_gate(bs, false, errp)) {
        return false;
    }
    return qcow2_check(bs, opts, result, errp);
}

/* ---------------------------------------------------------------- the driver */

static const char *const strong_options[] = {"data-file", NULL};

const BlockDriver bdrv_qcow2 = {
    .format_name = "qcow2",
    .instance_size = sizeof(BDRVQcow2State),
    .is_format = true,
    .supports_backing = true,
    .strong_options = strong_options,

    .probe = qcow2_probe,
    .open = qcow2_open,
    .close = qcow2_close,
    .reopen_prepare = qcow2_reopen_prepare,
    .reopen_commit = qcow2_reopen_commit,
    .reopen_abort = qcow2_reopen_abort,
    .reopen_repair = qcow2_reopen_repair,
    .refresh_limits = qcow2_refresh_limits,

    .create_opts = qcow2_create_opts,
    .amend_opts = qcow2_amend_opts,
    .create = qcow2_create,
    .measure = qcow2_measure,

    .preadv = qcow2_preadv,
    .pwritev = gated_pwritev,
    .pwritev_compressed = gated_pwritev_compressed,
    .pwrite_zeroes = gated_pwrite_zeroes,
    .pdiscard = gated_pdiscard,
    .block_status = qcow2_block_status,
    .find_allocated = qcow2_find_allocated,
    .flush = qcow2_flush,
    .supported_zero_flags = BDRV_REQ_MAY_UNMAP | BDRV_REQ_NO_FALLBACK,
    .map = gated_map,
    .map_done = qcow2_map_done,

    .getlength = qcow2_getlength,
    .truncate = gated_truncate,

    .get_info = qcow2_get_info,
    .get_specific_info = qcow2_get_specific_info,
    .check = gated_check,
    .amend = gated_amend,
    .change_backing_file = gated_change_backing_file,
    .make_empty = gated_make_empty,
    .snapshot_create = gated_snapshot_create,
    .snapshot_apply = gated_snapshot_apply,
    .snapshot_delete = gated_snapshot_delete,
    .snapshot_list = qcow2_snapshot_list,
    .snapshot_load_tmp = qcow2_snapshot_load_tmp,
    .bitmap_add = qcow2_bitmap_add,
    .bitmap_remove = qcow2_bitmap_remove,
    .bitmaps_remove_all = qcow2_bitmaps_remove_all,
    .bitmaps_check_size = qcow2_bitmaps_check_size,
    .bitmaps_mark_in_use = qcow2_bitmaps_mark_in_use,
    .bitmaps_store = qcow2_bitmaps_store,
    .save_vmstate = gated_save_vmstate,
    .load_vmstate = qcow2_load_vmstate,
};
