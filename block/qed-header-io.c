/*
 * The QED header on disk: read at open, changed one sector at a time.
 *
 *     [ 0 .. 63 fields | name, if it fits | ... sector 1 ... header_size clusters ... ]
 *       <------ sector 0: one write ----->
 *
 * Rules
 *  1. Fields change together, in one write of sector 0 that leaves its other bytes alone; s->header
 *     changes after the disk did, under header_lock, which is held across this I/O and no other.
 *  2. A write that fails leaves open which of the two states the disk is in: the old sector is put
 *     back; if even that fails, the node refuses further changes.
 *  3. A new backing name goes to where the present one is not, and is stable before the switch; a
 *     name that fits sector 0 goes with the switch.
 *
 * Unknown autoclear bits are cleared before the first change of a session, not at open: opening an
 * image and only reading leaves it as it is.
 *
 * Not done: a long name that has no room beside the present long name is refused.  That takes two
 * names of together more than the header's clusters hold, 3.5 KiB in the smallest case.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qed.h"

#include <string.h>

/* ---------------------------------------------------------------- reading */

bool qed_header_load(BlockDriverState *bs, GError **errp)
{
    BDRVQedState *s = qed_state(bs);
    uint8_t buf[QED_HEADER_BYTES] = {0};
    int64_t length = bdrv_getlength(bs->file->bs);
    int64_t present = MIN(length, QED_HEADER_BYTES);
    int ret = length < 0 ? (int)length : 0;
    if (present > 0) {
        ret = bdrv_pread(bs->file, 0, present, buf, 0);
    }
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Failed to read QED header");
        return false;
    }
    atomic_store(&s->file_length, (uint64_t)length);
    return qed_header_decode(buf, &s->header, errp) &&
           qed_header_validate(&s->header, (uint64_t)length, errp);
}

char *qed_header_read_name(BlockDriverState *bs, GError **errp)
{
    const QedHeader *h = &qed_state(bs)->header;
    if (!(h->features & QED_F_BACKING_FILE)) {
        return g_strdup("");
    }
    assert(h->backing_size <= QED_MAX_BACKING_NAME);
    g_autofree char *name = g_malloc0(h->backing_size + 1);
    int ret = bdrv_pread(bs->file, h->backing_offset, h->backing_size, name, 0);
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Failed to read backing filename");
        return NULL;
    }
    return g_steal_pointer(&name);
}

/* ---------------------------------------------------------------- writing */

/* Replaces sector 0 by @sector, or leaves it as it is in @old. */
static int write_sector_locked(BDRVQedState *s, const uint8_t *sector, const uint8_t *old)
    QB_REQUIRES(s->header_lock)
{
    BdrvChild *file = s->bs->file;
    qb_mutex_assert_held(&s->header_lock);
    int ret = bdrv_pwrite_sync(file, 0, QED_HEADER_SECTOR, sector, 0);
    if (ret < 0 && bdrv_pwrite(file, 0, QED_HEADER_SECTOR, old, 0) < 0) {
        bdrv_warn("qed: Image header could not be written and not be restored; node '%s' refuses"
                  " all further changes", bdrv_get_node_name(s->bs));
        atomic_store(&s->corrupt, true);
    }
    return ret;
}

/* The fields of @h, and @bytes of @more behind them, to the disk. */
static int write_header_locked(BDRVQedState *s, const QedHeader *h, const char *more, size_t bytes)
    QB_REQUIRES(s->header_lock)
{
    uint8_t old[QED_HEADER_SECTOR], sector[QED_HEADER_SECTOR];
    assert(bytes <= sizeof(sector) - QED_HEADER_BYTES);
    int ret = bdrv_pread(s->bs->file, 0, sizeof(old), old, 0);
    if (ret < 0) {
        return ret;
    }
    memcpy(sector, old, sizeof(sector));
    qed_header_encode(h, sector);
    if (bytes) {
        memcpy(sector + QED_HEADER_BYTES, more, bytes);
    }
    ret = write_sector_locked(s, sector, old);
    if (ret == 0) {
        s->header = *h;
        atomic_store(&s->image_size, h->image_size);
    }
    return ret;
}

int qed_header_update(BlockDriverState *bs, void (*fn)(QedHeader *h, void *opaque), void *opaque)
{
    BDRVQedState *s = qed_state(bs);
    QB_GUARD(&s->header_lock);
    QedHeader h = s->header;
    fn(&h, opaque);
    assert(h.cluster_size == s->header.cluster_size && h.table_size == s->header.table_size);
    return write_header_locked(s, &h, NULL, 0);
}

/* ---------------------------------------------------------------- bits */

static void set_need_check(QedHeader *h, void *opaque)
{
    const bool *set = opaque;
    h->features = *set ? h->features | QED_F_NEED_CHECK : h->features & ~QED_F_NEED_CHECK;
}

static void clear_autoclear(QedHeader *h, void *opaque)
{
    h->autoclear_features = 0;
}

bool qed_needs_check(BDRVQedState *s)
{
    QB_GUARD(&s->header_lock);
    return s->header.features & QED_F_NEED_CHECK;
}

int qed_set_need_check(BlockDriverState *bs, bool set)
{
    return qed_needs_check(qed_state(bs)) == set ? 0
                                                 : qed_header_update(bs, set_need_check, &set);
}

int qed_begin_change(BlockDriverState *bs)
{
    BDRVQedState *s = qed_state(bs);
    if (atomic_load(&s->corrupt)) {
        return -EIO;
    }
    if (!atomic_load(&s->autoclear_pending)) {
        return 0;
    }
    /* Threads that come here at once write the same; all return after a flush of it. */
    int ret = qed_header_update(bs, clear_autoclear, NULL);
    if (ret == 0) {
        atomic_store(&s->autoclear_pending, false);
    }
    return ret;
}

/* ---------------------------------------------------------------- the backing name */

/* Where @len bytes can go so that the name the header has now stays readable; 0: nowhere. */
static uint32_t place_for_name(const BDRVQedState *s, const QedHeader *now, size_t len)
{
    if (QED_HEADER_BYTES + len <= QED_HEADER_SECTOR) {
        return QED_HEADER_BYTES;
    }
    uint64_t from = now->backing_offset, size = now->backing_size;
    uint64_t place = QED_HEADER_SECTOR;
    if ((now->features & QED_F_BACKING_FILE) && qb_ranges_overlap(place, len, from, size)) {
        place = from + size;
    }
    return place + len <= s->data_start ? (uint32_t)place : 0;
}

static void name_in_header(QedHeader *h, uint32_t offset, const char *file, const char *fmt)
{
    h->features &= ~(QED_F_BACKING_FILE | QED_F_BACKING_NO_PROBE);
    h->backing_offset = h->backing_size = 0;
    if (*file) {
        h->features |= QED_F_BACKING_FILE;
        h->features |= strcmp(fmt, "raw") == 0 ? QED_F_BACKING_NO_PROBE : 0;
        h->backing_offset = offset;
        h->backing_size = (uint32_t)strlen(file);
    }
}

static int write_name_locked(BDRVQedState *s, const char *file, const char *fmt)
    QB_REQUIRES(s->header_lock)
{
    QedHeader h = s->header;
    size_t len = strlen(file);
    uint32_t offset = place_for_name(s, &h, len);
    if (!offset) {
        return -ENOSPC;
    }
    name_in_header(&h, offset, file, fmt);
    if (offset == QED_HEADER_BYTES) {
        return write_header_locked(s, &h, file, len);
    }
    int ret = bdrv_pwrite_sync(s->bs->file, offset, (int64_t)len, file, 0);
    return ret < 0 ? ret : write_header_locked(s, &h, NULL, 0);
}

bool qed_change_backing_file(BlockDriverState *bs, const char *file, const char *fmt,
                             GError **errp)
{
    BDRVQedState *s = qed_state(bs);
    int ret = qed_begin_change(bs);
    QB_GUARD(&s->header_lock);
    if (ret == 0 && s->header.compat_features) {
        qb_error_set(errp, ENOTSUP, "The image has features (%#" G_GINT64_MODIFIER "x) that may"
                     " depend on its backing file", s->header.compat_features);
        return false;
    }
    if (ret == 0 && strlen(file) > QED_MAX_BACKING_NAME) {
        ret = -ENAMETOOLONG;
    }
    ret = ret < 0 ? ret : write_name_locked(s, file, fmt);
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Could not change the backing file name");
    }
    return ret == 0;
}
