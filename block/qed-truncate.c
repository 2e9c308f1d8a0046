/*
 * Growing, shrinking and emptying.
 *
 *   grow                                        shrink
 *   1 drop entries beyond the old end           1 flush
 *   2 zero the rest of the last cluster         2 header: size, need-check bit        <- done
 *   3 hide what a longer backing file shows     3 drop entries beyond the new end, zero the rest of
 *   4 flush                                       the last cluster; flush
 *   5 header: size                  <- done     4 cut the file; header: need-check bit off
 *
 *   empty:  drop all entries; flush, users gone; cut the file
 *
 * Invariants
 *  1. Nothing beyond the end of the disk is trusted: what others cut off there does not come back.
 *  2. Growing happens at its header write: a crash before leaves the old size, and entries beyond
 *     it that the next growth drops.  Shrinking happens at its header write, which sets the
 *     need-check bit as well (QED 3): after a crash the next writable open ends it.  Where that is
 *     another program's, it finds nothing wrong, and clusters that no guest can see stay in use.
 *  3. No cluster is given back before the size that hides it is stable.
 *  4. Once a shrink is done, failing to give space back is a warning.
 *
 * The core holds the range from the smaller size to infinity, and the whole node for empty.
 *
 * Emptying goes table by table as L1 says, without reading what they refer to: after it there is
 * nothing but the header and L1.  Each L1 sector written takes what it mapped out of the overlay,
 * whose backing file says the same: any part of it may survive a crash.
 *
 * Not done: preallocation.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qed.h"

static bool fail(GError **errp, int err, const char *text)
{
    qb_error_set(errp, err, "%s", text);
    return false;
}

typedef struct Resize {
    BlockDriverState *bs;
    BDRVQedState *s;
    uint64_t old_size, new_size;
    bool zero_new;
} Resize;

static void set_size(QedHeader *h, void *opaque)
{
    const Resize *r = opaque;
    h->image_size = r->new_size;
    if (r->new_size < r->old_size) {
        h->features |= QED_F_NEED_CHECK;
    }
}

/* ---------------------------------------------------------------- the last cluster */

/* [guest, end of its cluster) reads as zeroes afterwards where the cluster is mapped. */
static int zero_mapped_tail(BlockDriverState *bs, uint64_t guest)
{
    BDRVQedState *s = qed_state(bs);
    uint64_t bytes = qed_round_up(s, guest) - guest;
    QedMapping m;
    if (bytes == 0) {
        return 0;
    }
    int ret = qed_lookup_as_user(bs, guest, bytes, &m);
    if (ret < 0 || m.type != QED_DATA) {
        return ret;
    }
    return bdrv_pwrite_zeroes(bs->file, (int64_t)m.host, (int64_t)bytes, 0);
}

/* The last cluster is not mapped, and a backing file would show behind the old end: it is
 * copied. */
static int hide_backing_in_tail(const Resize *r, uint64_t shown_end)
{
    uint64_t end = MIN(qed_round_up(r->s, r->old_size), shown_end);
    QedMapping m;
    if (r->old_size >= end) {
        return 0;
    }
    int ret = qed_lookup_as_user(r->bs, r->old_size, end - r->old_size, &m);
    if (ret < 0 || m.type != QED_UNALLOCATED) {
        return ret;
    }
    if (!r->bs->backing) {
        return -ENOTSUP; /* it shows before the old end, too, and is not to be had */
    }
    g_autofree uint8_t *zeroes = g_try_malloc0(end - r->old_size);
    IoVector qiov;
    if (!zeroes) {
        return -ENOMEM;
    }
    iov_vector_init_buf(&qiov, zeroes, end - r->old_size);
    QedIo io = {.bs = r->bs, .s = r->s, .qiov = &qiov, .base = r->old_size};
    return qed_write_guest(&io, NULL, r->old_size, end - r->old_size);
}

/* ---------------------------------------------------------------- grow */

static int hide_backing(const Resize *r)
{
    int64_t shown_end = bdrv_backing_end_in_growth(r->bs, (int64_t)r->old_size,
                                                   (int64_t)r->new_size);
    if (shown_end < 0) {
        return (int)shown_end;
    }
    uint64_t start = qed_round_up(r->s, r->old_size);
    uint64_t end = qed_round_up(r->s, (uint64_t)shown_end);
    int ret = hide_backing_in_tail(r, (uint64_t)shown_end);
    return ret == 0 && start < end ? qed_hide_range(r->bs, start, end - start) : ret;
}

static int grow(const Resize *r)
{
    int ret = qed_drop_beyond(r->bs, qed_round_up(r->s, r->old_size));
    ret = ret < 0 ? ret : zero_mapped_tail(r->bs, r->old_size);
    ret = ret < 0 || !r->zero_new ? ret : hide_backing(r);
    ret = ret < 0 ? ret : qed_flush(r->bs);
    return ret < 0 ? ret : qed_header_update(r->bs, set_size, (void *)r);
}

/* ---------------------------------------------------------------- shrink */

int qed_finish_shrink(BlockDriverState *bs)
{
    BDRVQedState *s = qed_state(bs);
    uint64_t end = atomic_load(&s->image_size);
    int ret = qed_drop_beyond(bs, qed_round_up(s, end));
    ret = ret < 0 ? ret : zero_mapped_tail(bs, end);
    qed_wait_for_users(s); /* so that all of it comes free now */
    ret = ret < 0 ? ret : qed_flush(bs);
    return ret < 0 ? ret : qed_cut_file(bs);
}

static int shrink(const Resize *r)
{
    int ret = qed_flush(r->bs);
    ret = ret < 0 ? ret : qed_know_space(r->bs); /* refuses while nothing has changed */
    ret = ret < 0 ? ret : qed_header_update(r->bs, set_size, (void *)r);
    if (ret < 0) {
        return ret;
    }
    ret = qed_finish_shrink(r->bs);
    ret = ret < 0 ? ret : qed_set_need_check(r->bs, false);
    if (ret < 0) {
        bdrv_warn("Could not give back what lies beyond the end of the disk: %s", g_strerror(-ret));
    }
    return 0;
}

/* ---------------------------------------------------------------- resize */

static bool validate(const Resize *r, PreallocMode prealloc, GError **errp)
{
    if (prealloc != PREALLOC_MODE_OFF) {
        qb_error_set(errp, ENOTSUP, "Unsupported preallocation mode '%s'",
                     prealloc_mode_names[prealloc]);
        return false;
    }
    if (!qb_is_aligned(r->new_size, BDRV_SECTOR_SIZE)) {
        return fail(errp, EINVAL, "The new size must be a multiple of 512");
    }
    if (r->new_size > qed_max_image_size(r->s->cluster_size,
                                         r->s->table_bytes >> r->s->cluster_bits)) {
        return fail(errp, EINVAL, "Invalid image size specified");
    }
    return true;
}

bool qed_truncate(BlockDriverState *bs, int64_t offset, bool exact, PreallocMode prealloc,
                  bool zero_new, GError **errp)
{
    BDRVQedState *s = qed_state(bs);
    Resize r = {.bs = bs, .s = s, .old_size = atomic_load(&s->image_size),
                .new_size = (uint64_t)offset, .zero_new = zero_new};
    if (!validate(&r, prealloc, errp)) {
        return false;
    }
    int ret = qed_begin_change(bs);
    if (ret == 0 && r.new_size != r.old_size) {
        ret = r.new_size > r.old_size ? grow(&r) : shrink(&r);
    }
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Failed to update the image size");
    }
    return ret == 0;
}

/* ---------------------------------------------------------------- empty */

/* All of L1 becomes 0; nothing is given back yet, since nobody asks what it was. */
static int drop_all_tables(BlockDriverState *bs)
{
    const BDRVQedState *s = qed_state(bs);
    uint64_t end = qed_max_image_size(s->cluster_size, s->table_bytes >> s->cluster_bits), pos = 0;
    while (pos < end) {
        int64_t unmapped = qed_unmapped_by_l1(bs, pos, end - pos);
        if (unmapped < 0) {
            return (int)unmapped;
        }
        pos += (uint64_t)unmapped;
        if (unmapped == 0) {
            int ret = qed_drop_table(bs, qed_l1_index(s, pos));
            if (ret < 0) {
                return ret;
            }
            pos += MIN(qed_to_table_end(s, pos), end - pos);
        }
    }
    return 0;
}

/* Whole node in the range lock: nobody allocates between these steps. */
static int empty(BlockDriverState *bs)
{
    BDRVQedState *s = qed_state(bs);
    int ret = qed_begin_change(bs);
    ret = ret < 0 ? ret : qed_know_space(bs);
    ret = ret < 0 ? ret : drop_all_tables(bs);
    qed_wait_for_users(s);
    ret = ret < 0 ? ret : qed_flush(bs);
    if (ret < 0) {
        return ret;
    }
    qed_space_forget(s); /* the tables are all there is to ask, and they say: nothing */
    return qed_cut_file(bs);
}

bool qed_make_empty(BlockDriverState *bs, GError **errp)
{
    int ret = empty(bs);
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Failed to empty the image");
    }
    return ret == 0;
}
