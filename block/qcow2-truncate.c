/*
 * Growing and shrinking the guest's disk, and preallocation.
 *
 *   grow                                            shrink
 *   1 drop entries beyond the old end               1 flush: disk and memory agree
 *   2 zero the rest of the last cluster             2 header: size, shorter L1,
 *   3 longer L1, longer data file                     dirty bit (v3)                  <- done
 *   4 zero entries over a longer backing file       3 full discard of what lies beyond: entries of
 *   5 preallocate                                     the boundary table, tables cut off, spare
 *   6 flush                                           clusters of L1; flush
 *   7 header: size, L1's length     <- done         4 move what lies at the end of the file into
 *                                                     what became free (qcow2-compact.c)
 *                                                   5 give the rest of that back, empty refcount
 *                                                     blocks, too; flush
 *                                                   6 cut the image file, the data file
 *                                                   7 header: dirty bit off
 *
 * Invariants
 *  1. Nothing beyond the end of the disk is trusted: images shrunk by others still have bytes and
 *     entries there, and VM state lies there too.  The grown part reads as zeroes, or, where the
 *     caller allows that, as the backing file; never as what was cut off before.
 *  2. Growing happens at its header write: a crash before leaves the old size, plus clusters beyond
 *     the end that the next growth drops.  Shrinking happens at its first header write: a crash
 *     after it leaves tables that nothing names, and clusters mapped beyond the end by the boundary
 *     table.  The next writable open gives them back on version 3, by the dirty bit; on version 2
 *     the former are leaks, and the latter go with the next change of the size.
 *  3. No cluster is given back before the size that makes it invisible is stable; the file is cut
 *     only when the entries that named its end are stably gone.
 *  4. Once a shrink is done, what fails in giving space back is a warning, and the dirty bit stays
 *     set.  Memory's L1 may then be longer than the header says: the entries there are true, and the
 *     next growth makes the header name them again.
 *
 * The core holds the range from the smaller size to infinity; a write below it may go on meanwhile.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-compact.h"

#include <inttypes.h>
#include <string.h>

#include "util/iov.h"

enum {
    ZERO_PIECE = 2 << 20, /* bytes of zeroes written at a time, where writing them is needed */
    TAIL_PIECES = 200,    /* for who watches the tail go */
};

typedef struct Resize {
    BlockDriverState *bs;
    BDRVQcow2State *s;
    uint64_t old_size, new_size;
    PreallocMode prealloc;
    bool zero_new;
} Resize;

static bool fail(GError **errp, int err, const char *text)
{
    qb_error_set(errp, err, "%s", text);
    return false;
}

/* Sets an error from -errno @ret; true when there is none. */
static bool check(int ret, const char *text, GError **errp)
{
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "%s", text);
    }
    return ret >= 0;
}

static uint64_t round_up(const BDRVQcow2State *s, uint64_t size)
{
    return qb_align_up(size, s->cluster_size); /* sizes are below 2^63: no overflow */
}

/* Guest bytes that the present L1 can map; beyond it nothing is mapped. */
static uint64_t l1_span(const BDRVQcow2State *s)
{
    unsigned shift = s->cluster_bits + s->l2_bits;
    return MIN((uint64_t)qcow2_l1_size(s), (uint64_t)INT64_MAX >> shift) << shift;
}

/* ---------------------------------------------------------------- the end of the file */

/* Cuts if nothing was allocated since @seq: 1; else 0, and the end must be looked for again. */
static int cut_if_unchanged(BlockDriverState *bs, uint64_t end, uint64_t seq)
{
    BDRVQcow2State *s = qcow2_state(bs);
    g_autoptr(GError) err = NULL;
    if (!qcow2_cut_begin(s, end, seq)) {
        return 0;
    }
    bool ok = bdrv_truncate(bs->file, (int64_t)end, false, PREALLOC_MODE_OFF, false, &err);
    qcow2_cut_end(s);
    return ok ? 1 : qb_error_to_errno(err);
}

int qcow2_cut_file(BlockDriverState *bs)
{
    int ret = 0;
    for (int turn = 0; turn < 3 && ret == 0; turn++) { /* a busy image may stay a little longer */
        uint64_t seq = qcow2_alloc_seq(qcow2_state(bs)), end;
        ret = qcow2_last_used_end(bs, &end);
        int64_t length = ret < 0 ? ret : bdrv_getlength(bs->file->bs);
        if (length < 0 || (uint64_t)length <= end) {
            return (int)MIN(length, 0);
        }
        ret = cut_if_unchanged(bs, end, seq);
    }
    return MIN(ret, 0);
}

/* ---------------------------------------------------------------- writing zeroes */

/* The core has the range for us: a request that is already granted. */
static BdrvRequest granted_request(BlockDriverState *bs)
{
    return (BdrvRequest){
        .bs = bs,
        .type = BDRV_TRACKED_TRUNCATE,
        .range = {.offset = 0, .end = UINT64_MAX, .state = QB_RANGE_GRANTED, .wait_plain = true},
    };
}

/* Writes zeroes as a guest would, also beyond the present end. */
static int write_zeroes(BlockDriverState *bs, uint64_t guest, uint64_t bytes)
{
    BdrvRequest req = granted_request(bs);
    size_t piece = MIN(bytes, ZERO_PIECE);
    QB_AUTO_FREE void *buf = qb_try_memalign(4096, MAX(piece, 4096));
    if (!buf) {
        return -ENOMEM;
    }
    memset(buf, 0, piece);
    while (bytes) {
        IoVector qiov;
        size_t now = MIN(bytes, piece);
        iov_vector_init_buf(&qiov, buf, now);
        int ret = qcow2_pwritev(bs, &req, (int64_t)guest, (int64_t)now, &qiov, 0, 0);
        if (ret < 0) {
            return ret;
        }
        guest += now;
        bytes -= now;
    }
    return 0;
}

/* ---------------------------------------------------------------- grow: clean ground */

/* Entries for clusters that begin beyond the old end: left by others, or VM state. */
static int drop_stale_entries(const Resize *r)
{
    uint64_t start = round_up(r->s, r->old_size);
    uint64_t end = MIN(round_up(r->s, r->new_size), l1_span(r->s));
    if (start >= end) {
        return 0;
    }
    return qcow2_discard_clusters(r->bs, start, end - start, QCOW2_DISCARD_FULL,
                                  QCOW2_DISCARD_OTHER);
}

/* Must [guest, +m->bytes), the part of the last cluster behind the end, be overwritten? */
static bool tail_needs_zeroes(const Qcow2Mapping *m, uint64_t shown_end)
{
    switch (m->type) {
    case QCOW2_ZERO_PLAIN:
    case QCOW2_ZERO_ALLOC:
        return false;
    case QCOW2_UNALLOCATED:
    case QCOW2_UNALLOCATED_ALLOC:
        return m->guest < shown_end;
    default:
        return true;
    }
}

/* Zeroes behind the old end, where the part of the (sub)cluster before it may have to be copied. */
static int zero_tail_part(const Resize *r, const Qcow2Mapping *m)
{
    bool copies = m->type == QCOW2_UNALLOCATED || m->type == QCOW2_UNALLOCATED_ALLOC;
    if (copies && !r->bs->backing && !qb_is_aligned(m->guest, r->s->subcluster_size)) {
        return -ENOTSUP; /* the backing file shows there, and is not to be had */
    }
    return write_zeroes(r->bs, m->guest, m->bytes);
}

static int zero_tail(const Resize *r, uint64_t shown_end)
{
    uint64_t pos = r->old_size, end = round_up(r->s, r->old_size);
    while (pos < end) {
        Qcow2Mapping m;
        Qcow2User user;
        qcow2_user_announce(r->s, &user);
        int ret = qcow2_lookup(r->bs, pos, end - pos, &m);
        qcow2_user_leave(r->s, &user);
        if (ret == 0 && tail_needs_zeroes(&m, shown_end)) {
            ret = zero_tail_part(r, &m);
        }
        if (ret < 0) {
            return ret;
        }
        pos += m.bytes;
    }
    return 0;
}

/* Zero entries hide the backing file; version 2 has none, there zeroes are written out. */
static int hide_backing(const Resize *r, uint64_t shown_end)
{
    uint64_t start = round_up(r->s, r->old_size);
    uint64_t end = round_up(r->s, shown_end);
    if (start >= end) {
        return 0;
    }
    int ret = qcow2_zero_clusters(r->bs, start, end - start, 0);
    return ret == -ENOTSUP ? write_zeroes(r->bs, start, MIN(end, r->new_size) - start) : ret;
}

/* ---------------------------------------------------------------- preallocation */

/* Upper bound for the file when [old, new) is mapped completely: data, L2 tables,

 * refcount blocks. */
static uint64_t bytes_to_add(const Resize *r)
{
    const BDRVQcow2State *s = r->s;
    uint64_t data = qcow2_size_to_clusters(s, r->new_size) - qcow2_size_to_clusters(s, r->old_size);
    uint64_t clusters = data + (data >> s->l2_bits) + 2;
    uint64_t blocks = (clusters >> s->refblock_bits) + 2;
    uint64_t table = ((blocks << 3) >> s->cluster_bits) + 2;
    return (clusters + blocks + 2 * table) << s->cluster_bits;
}

/* Runs of the grown part that were put into holes of the old file. */
typedef struct OldHoles {
    BlockDriverState *bs;
    uint64_t end; /* of the old file */
    PreallocMode mode;
} OldHoles;

static int fill_host(BlockDriverState *bs, uint64_t host, uint64_t bytes)
{
    g_autofree void *buf = g_try_malloc0(MIN(bytes, ZERO_PIECE));
    if (!buf) {
        return -ENOMEM;
    }
    for (uint64_t done = 0; done < bytes; done += ZERO_PIECE) {
        int ret = bdrv_pwrite(bs->file, (int64_t)(host + done),
                              (int64_t)MIN(bytes - done, ZERO_PIECE), buf, 0);
        if (ret < 0) {
            return ret;
        }
    }
    return 0;
}

static int fill_old_hole(const Qcow2Mapping *run, void *opaque)
{
    const OldHoles *h = opaque;
    if (qb_progress_cancelled(h->bs->resize_progress)) {
        return -ECANCELED;
    }
    if ((run->type != QCOW2_NORMAL && run->type != QCOW2_ZERO_ALLOC) || run->host >= h->end) {
        return 0;
    }
    uint64_t bytes = MIN(run->bytes, h->end - run->host);
    if (h->mode == PREALLOC_MODE_FULL) {
        return fill_host(h->bs, run->host, bytes);
    }
    return bdrv_pwrite_zeroes(h->bs->file, (int64_t)run->host, (int64_t)bytes, 0);
}

/* Makes the image file as long as it may have to become. Only where storage is wanted is failing an
 * error: a device has the length it has, and what is missing in the end settle_file() finds. */
static bool extend_file(const Resize *r, uint64_t from, GError **errp)
{
    PreallocMode mode = r->prealloc == PREALLOC_MODE_METADATA ? PREALLOC_MODE_OFF : r->prealloc;
    uint64_t to = from + bytes_to_add(r);
    int64_t length = bdrv_getlength(r->bs->file->bs);
    if (length >= 0 && (uint64_t)length >= to) {
        return true;
    }
    const BdrvResize how = {
        .length = (int64_t)to, .prealloc = mode, .progress = r->bs->resize_progress,
    };
    bool ok = bdrv_resize(r->bs->file, &how, mode == PREALLOC_MODE_OFF ? NULL : errp);
    if (!ok && mode != PREALLOC_MODE_OFF) {
        g_prefix_error(errp, "Could not resize underlying file: ");
    }
    return ok || mode == PREALLOC_MODE_OFF;
}

/* The file ends where the last cluster in use does: mapped clusters must not lie beyond its end. */
static bool settle_file(const Resize *r, GError **errp)
{
    uint64_t end;
    if (!check(qcow2_last_used_end(r->bs, &end), "Failed to find the last cluster", errp)) {
        return false;
    }
    int64_t length = bdrv_getlength(r->bs->file->bs);
    if (length >= 0 && (uint64_t)length >= end) {
        return check(qcow2_cut_file(r->bs), "Failed to truncate the tail of the image", errp);
    }
    return bdrv_truncate(r->bs->file, (int64_t)end, false, PREALLOC_MODE_OFF, false, errp);
}

/* Maps the grown part, but not a partial cluster at the old end: it may show the backing file. */
static bool map_growth(const Resize *r, GError **errp)
{
    uint64_t start = round_up(r->s, r->old_size), bytes = round_up(r->s, r->new_size) - start;
    qb_progress_grow(r->bs->resize_progress, bytes);
    return qcow2_preallocate(r->bs, start, bytes, r->bs->resize_progress, errp);
}

static bool preallocate_inside(const Resize *r, GError **errp)
{
    uint64_t start = round_up(r->s, r->old_size), from;
    OldHoles holes = {.bs = r->bs, .mode = r->prealloc};
    if (!check(qcow2_last_used_end(r->bs, &from), "Failed to find the last cluster", errp) ||
        !extend_file(r, from, errp)) {
        return false;
    }
    holes.end = from;
    if (!map_growth(r, errp)) {
        g_prefix_error(errp, "Could not preallocate: ");
        return false;
    }
    if (r->prealloc != PREALLOC_MODE_METADATA &&
        !check(qcow2_walk_runs(r->bs, NULL, start, r->new_size, fill_old_hole, &holes),
               "Could not preallocate", errp)) {
        return false;
    }
    return settle_file(r, errp);
}

/* What is beyond the end of the data file's old part may hold something: a raw one must
 * read zero. */
static bool clean_data_file(const Resize *r, GError **errp)
{
    BdrvChild *data = r->s->data_file;
    int64_t length = bdrv_getlength(data->bs);
    if (length < 0 || (uint64_t)length <= r->old_size) {
        return check((int)MIN(length, 0), "Could not get the length of the data file", errp);
    }
    if (bdrv_truncate(data, (int64_t)r->old_size, true, PREALLOC_MODE_OFF, false, NULL)) {
        return true;
    }
    int64_t end = MIN(length, (int64_t)r->new_size); /* a device: its length stays */
    return check(bdrv_pwrite_zeroes(data, (int64_t)r->old_size, end - (int64_t)r->old_size, 0),
                 "Could not zero the data file", errp);
}

static bool grow_data_file(const Resize *r, GError **errp)
{
    bool mapped = r->s->data_file_raw || r->prealloc != PREALLOC_MODE_OFF;
    PreallocMode mode = r->prealloc == PREALLOC_MODE_METADATA ? PREALLOC_MODE_OFF : r->prealloc;
    if (mapped && !clean_data_file(r, errp)) {
        return false;
    }
    int64_t length = bdrv_getlength(r->s->data_file->bs);
    if (mode == PREALLOC_MODE_OFF && length >= (int64_t)r->new_size) {
        return true;
    }
    const BdrvResize how = {
        .length = (int64_t)r->new_size, .prealloc = mode, .progress = r->bs->resize_progress,
    };
    if (!bdrv_resize(r->s->data_file, &how, errp)) {
        g_prefix_error(errp, "Could not resize the data file: ");
        return false;
    }
    return true;
}

/* Maps the grown part as the mode says. */
static bool preallocate(const Resize *r, GError **errp)
{
    if (!r->s->has_data_file) {
        return r->prealloc == PREALLOC_MODE_OFF || preallocate_inside(r, errp);
    }
    if (!grow_data_file(r, errp)) {
        return false;
    }
    if (r->prealloc == PREALLOC_MODE_OFF && !r->s->data_file_raw) {
        return true;
    }
    return map_growth(r, errp);
}

bool qcow2_fill_new(BlockDriverState *bs, PreallocMode prealloc, QbProgress *progress,
                    GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    BDRV_GRAPH_GUARD();
    Resize r = {.bs = bs, .s = s, .new_size = s->header.size, .prealloc = prealloc};
    bs->resize_progress = progress;
    bool ok = preallocate(&r, errp);
    bs->resize_progress = NULL;
    return ok && check(qcow2_flush(bs), "Could not write the new image", errp);
}

/* ---------------------------------------------------------------- grow */

/* All is flushed: L1 is on disk as long as it is in memory. */
static void set_size(Qcow2Header *h, void *opaque)
{
    const Resize *r = opaque;
    h->size = r->new_size;
    h->l1_size = qcow2_l1_size(r->s);
}

/* All that can be done while nobody sees it. */
static bool prepare_growth(const Resize *r, uint64_t shown_end, GError **errp)
{
    uint64_t l1_size = qcow2_size_to_l1(r->s, r->new_size);
    return check(drop_stale_entries(r), "Failed to discard what lies beyond the end", errp) &&
           check(zero_tail(r, shown_end), "Failed to zero what lies beyond the end", errp) &&
           check(qcow2_l1_grow(r->bs, l1_size, true), "Failed to grow the L1 table", errp);
}

/* From here on the node itself takes the new part for its own: zeroing there is not idle. */
static bool fill_growth(const Resize *r, uint64_t shown_end, GError **errp)
{
    bdrv_set_length(r->bs, (int64_t)r->new_size);
    if (check(hide_backing(r, shown_end), "Failed to zero out new area", errp) &&
        preallocate(r, errp) &&
        check(qcow2_flush(r->bs), "Failed to flush the image", errp) &&
        check(qcow2_header_update(r->bs, set_size, (void *)r, true),
              "Failed to update the image size", errp)) {
        return true;
    }
    (void)drop_stale_entries(r); /* if that fails too, the next growth does it */
    bdrv_set_length(r->bs, (int64_t)r->old_size);
    return false;
}

static bool grow(const Resize *r, GError **errp)
{
    int64_t shown_end = (int64_t)r->old_size;
    if (r->zero_new) {
        shown_end = bdrv_backing_end_in_growth(r->bs, shown_end, (int64_t)r->new_size);
    }
    return check((int)MIN(shown_end, 0), "Could not get the length of the backing file", errp) &&
           prepare_growth(r, (uint64_t)shown_end, errp) &&
           fill_growth(r, (uint64_t)shown_end, errp);
}

/* ---------------------------------------------------------------- shrink */

static uint32_t shrunk_l1_size(const Resize *r)
{
    uint64_t needed = MAX(qcow2_size_to_l1(r->s, r->new_size), 1);
    return (uint32_t)MIN(needed, qcow2_l1_size(r->s));
}

/* What step 2 writes: from now on the disk ends there, and somebody is at work (version 3). */
static void begin_shrink(Qcow2Header *h, void *opaque)
{
    const Resize *r = opaque;
    h->size = r->new_size;
    h->l1_size = shrunk_l1_size(r);
    h->incompatible |= h->version >= 3 ? QCOW2_INCOMPAT_DIRTY : 0;
}

static uint64_t l1_bytes(const BDRVQcow2State *s, uint64_t entries)
{
    return qb_align_up(entries * 8, s->cluster_size);
}

/* Memory follows the header; what was beyond has been dropped. Free with the next flush. */
static void shorten_l1(const Resize *r)
{
    BDRVQcow2State *s = r->s;
    uint32_t entries = shrunk_l1_size(r);
    uint64_t keep = l1_bytes(s, entries), had = l1_bytes(s, qcow2_l1_size(s));
    qcow2_l1_shorten(s, entries);
    if (keep < had) {
        qcow2_free_run(r->bs, qcow2_l1_table_offset(s) + keep, had - keep, QCOW2_DISCARD_ALWAYS);
    }
}

static uint64_t tail_bytes(const Resize *r)
{
    uint64_t start = round_up(r->s, r->new_size), end = l1_span(r->s);
    return end > start ? end - start : 0;
}

static int discard_tail(const Resize *r)
{
    uint64_t pos = round_up(r->s, r->new_size), end = pos + tail_bytes(r);
    uint64_t table = (uint64_t)r->s->l2_entries << r->s->cluster_bits;
    uint64_t piece = qb_align_up(MAX((end - pos) / TAIL_PIECES, 1), table);
    int ret = 0;
    while (pos < end && ret == 0) {
        uint64_t next = MIN(qb_align_down(pos, table) + piece, end); /* tables go as a whole */
        ret = qcow2_discard_clusters(r->bs, pos, next - pos, QCOW2_DISCARD_FULL,
                                     QCOW2_DISCARD_ALWAYS);
        qb_progress_add(r->bs->resize_progress, next - pos);
        pos = next;
    }
    return ret;
}

static bool warn(int ret, const char *text)
{
    if (ret < 0) {
        bdrv_warn("%s: %s", text, g_strerror(-ret));
    }
    return ret >= 0;
}

/* Step 3. What it frees is kept in @spare until it is known what becomes of it. */
static bool free_tail(const Resize *r, GArray *spare)
{
    qcow2_quarantine_hold(r->s);
    int ret = discard_tail(r);
    if (ret == 0) {
        shorten_l1(r);
        ret = qcow2_flush(r->bs);
    }
    int err = qcow2_quarantine_take(r->bs, spare);
    return warn(ret < 0 ? ret : err, "Failed to discard cropped clusters");
}

/* Step 5. */
static bool free_counts(const Resize *r, GArray *spare, uint64_t end)
{
    bool cuts = bdrv_can_grow(r->bs->file->bs); /* then what lies behind @end goes with the file */
    return warn(qcow2_release_spare(r->bs, spare, cuts ? end : UINT64_MAX),
                "Failed to discard cropped clusters") &&
           warn(qcow2_refcount_shrink(r->bs), "Failed to discard unused refblocks") &&
           (qcow2_is_clean(r->s) ||
            warn(qcow2_flush_all(r->bs), "Failed to discard unused refblocks"));
}

/* Steps 4 and 5, again where guests have allocated meanwhile; where the file is to end to *ret_end. */
static bool settle_clusters(const Resize *r, GArray *spare, uint64_t *ret_end)
{
    uint64_t used = 0;
    bool ok = true;
    for (int turn = 0; turn < 3 && ok; turn++) {
        warn(qcow2_compact(r->bs, spare, ret_end), "Failed to move clusters");
        ok = free_counts(r, spare, *ret_end) &&
             warn(qcow2_last_used_end(r->bs, &used), "Failed to find the last cluster");
        if (used <= *ret_end) {
            break;
        }
    }
    return ok;
}

/* Step 6 for the image file. What is left behind @end, which guests keep long, becomes a hole. */
static void cut_at(BlockDriverState *bs, uint64_t end)
{
    warn(qcow2_cut_file(bs), "Failed to truncate the tail of the image");
    int64_t length = bdrv_getlength(bs->file->bs);
    if (length > 0 && (uint64_t)length > end && bdrv_can_grow(bs->file->bs)) {
        qcow2_punch_free(bs, end, (uint64_t)length);
    }
}

/* Steps 3 to 6; false when something of it failed, which costs space only. */
static bool give_back(const Resize *r)
{
    g_autoptr(GArray) spare = g_array_new(false, false, sizeof(Qcow2HostRun));
    QbProgress *progress = r->bs->resize_progress;
    uint64_t tail = tail_bytes(r), end = UINT64_MAX;
    qb_progress_grow(progress, 2 * tail); /* taking it out is about half of the work */
    if (!free_tail(r, spare)) {
        warn(qcow2_release_spare(r->bs, spare, UINT64_MAX), "Failed to discard cropped clusters");
        return false;
    }
    qb_progress_add(progress, tail / 4);
    if (!settle_clusters(r, spare, &end)) {
        return false;
    }
    qb_progress_add(progress, tail / 2);
    cut_at(r->bs, end);
    g_autoptr(GError) err = NULL;
    if (r->s->has_data_file && !bdrv_truncate(r->s->data_file, (int64_t)r->new_size, false,
                                              PREALLOC_MODE_OFF, false, &err)) {
        bdrv_warn("Failed to truncate the data file: %s", err->message);
    }
    qb_progress_add(progress, tail - tail / 2 - tail / 4);
    return true;
}

static bool shrink(const Resize *r, GError **errp)
{
    bool was_dirty = qcow2_dirty_bit(r->s); /* a write below the cut may just set it */
    if (r->prealloc != PREALLOC_MODE_OFF) {
        return fail(errp, EINVAL, "Preallocation can't be used for shrinking an image");
    }
    int ret = qcow2_is_clean(r->s) ? 0 : qcow2_flush(r->bs);
    if (!check(ret, "Failed to flush the image", errp) ||
        !check(qcow2_header_update(r->bs, begin_shrink, (void *)r, true),
               "Failed to update the image size", errp)) {
        return false;
    }
    if (give_back(r) && r->s->version >= 3 && !was_dirty) {
        warn(qcow2_set_incompatible(r->bs, 0, QCOW2_INCOMPAT_DIRTY),
             "Failed to clear the dirty bit");
    }
    return true;
}

int qcow2_finish_shrink(BlockDriverState *bs)
{
    BDRVQcow2State *s = qcow2_state(bs);
    Resize r = {.bs = bs, .s = s, .new_size = s->header.size};
    int ret = discard_tail(&r);
    ret = ret < 0 ? ret : qcow2_flush_all(bs);
    return ret < 0 ? ret : qcow2_cut_file(bs);
}

/* ---------------------------------------------------------------- */

static bool may_resize(const BDRVQcow2State *s, uint64_t size, GError **errp)
{
    if (!qb_is_aligned(size, BDRV_SECTOR_SIZE)) {
        return fail(errp, EINVAL, "The new size must be a multiple of 512");
    }
    if (s->version < 3 && s->snapshots->len) {
        return fail(errp, ENOTSUP, "Can't resize a v2 image which has snapshots");
    }
    if (qcow2_size_to_l1(s, size) > QCOW2_MAX_L1_BYTES / 8) {
        return fail(errp, EFBIG, "The image size is too large for file format 'qcow2' (try using a"
                                 " larger cluster size)");
    }
    return true;
}

bool qcow2_truncate(BlockDriverState *bs, int64_t offset, bool exact, PreallocMode prealloc,
                    bool zero_new, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    Resize r = {
        .bs = bs,
        .s = s,
        .old_size = s->header.size,
        .new_size = (uint64_t)offset,
        .prealloc = prealloc,
        .zero_new = zero_new,
    };
    assert(offset >= 0);
    if (!may_resize(s, r.new_size, errp)) {
        return false;
    }
    if (r.new_size == r.old_size) {
        return true;
    }
    bool ok = r.new_size > r.old_size ? grow(&r, errp) : shrink(&r, errp);
    if (ok) {
        qcow2_cache_fit(s);
    }
    return ok;
}
