/*
 * scratch: a node that can be written while the file below it never is.
 *
 *      writes --> pages in memory, 4 KiB each, by their number
 *      reads  --> those pages; else the file, up to "below"; else zeroes
 *
 *      file    |==================================|
 *      node    |======[p]====[p][p]---------[p]---------|
 *                                  ^below               ^length
 *
 * An operation that is to be tried and not done runs on an image whose files lie under such nodes: what
 * it would do to them is what it does here (block/dry-run.c).
 *
 * Invariants
 *  1. The child is only read: no permission but that is ever asked for, whatever the parents do.
 *  2. below falls and never rises: what was cut off does not come back when the node grows.
 *  3. Bytes of a page at or beyond the length are zero.
 *
 * A page is never freed but by a truncation, which the core keeps apart from requests beyond its cut.
 * Discards change nothing, which they may.  Everything is lost at close: so it is meant.
 *
 * Not done: giving memory back; long ranges of zeroes cost as much as data.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/driver.h"
#include "util/error.h"
#include "util/iov.h"

#include <string.h>

#define PAGE ((int64_t)4096)

typedef struct BDRVScratchState {
    QbMutex lock; /* a leaf; of all below */
    GHashTable *pages; /* number -> PAGE bytes, owned */
    int64_t length, below;
} BDRVScratchState;

static gpointer page_key(int64_t index)
{
    return GSIZE_TO_POINTER((gsize)index);
}

static bool scratch_open(BlockDriverState *bs, json_t *options, int flags, GError **errp)
{
    BDRVScratchState *s = bs->opaque;
    if (!bdrv_open_file_child(bs, NULL, options, BDRV_CHILD_DATA | BDRV_CHILD_PRIMARY, errp)) {
        return false;
    }
    int64_t length = bdrv_getlength(bs->file->bs);
    if (length < 0) {
        qb_error_set_errno(errp, (int)length, "Could not get the length of the file");
        return false;
    }
    s->length = s->below = length;
    s->pages = g_hash_table_new_full(NULL, NULL, NULL, g_free);
    qb_mutex_init(&s->lock);
    return true;
}

static void scratch_close(BlockDriverState *bs)
{
    BDRVScratchState *s = bs->opaque;
    g_hash_table_destroy(s->pages);
    qb_mutex_destroy(&s->lock);
}

/* Invariant 1. Others may read; what they wrote would be seen here in part. */
static void scratch_child_perm(BlockDriverState *bs, const BdrvChild *c, int role, unsigned perm,
                               unsigned shared, unsigned *ret_perm, unsigned *ret_shared)
{
    *ret_perm = BLK_PERM_CONSISTENT_READ;
    *ret_shared = BLK_PERM_CONSISTENT_READ | BLK_PERM_WRITE_UNCHANGED;
}

static int64_t scratch_getlength(BlockDriverState *bs)
{
    BDRVScratchState *s = bs->opaque;
    QB_GUARD(&s->lock);
    return s->length;
}

/* Bytes of [offset, +bytes) that the file decides where there is no page. */
static int64_t bytes_below(BDRVScratchState *s, int64_t offset, int64_t bytes)
{
    QB_GUARD(&s->lock);
    return CLAMP(s->below - offset, 0, bytes);
}

static int64_t part_of_page(int64_t offset, int64_t bytes)
{
    return MIN(bytes, PAGE - offset % PAGE);
}

static uint8_t *find_page_locked(BDRVScratchState *s, int64_t index)
{
    return g_hash_table_lookup(s->pages, page_key(index));
}

/* --- reading --- */

static void lay_pages_over(BDRVScratchState *s, int64_t offset, int64_t bytes, IoVector *qiov,
                           size_t qiov_offset)
{
    QB_GUARD(&s->lock);
    while (bytes > 0) {
        int64_t now = part_of_page(offset, bytes);
        const uint8_t *page = find_page_locked(s, offset / PAGE);
        if (page) {
            iov_vector_from_buf(qiov, qiov_offset, page + offset % PAGE, (size_t)now);
        }
        offset += now;
        qiov_offset += (size_t)now;
        bytes -= now;
    }
}

static int scratch_preadv(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                          IoVector *qiov, size_t qiov_offset, int flags)
{
    BDRVScratchState *s = bs->opaque;
    int64_t below = bytes_below(s, offset, bytes);
    int ret = 0;
    if (below) {
        ret = bdrv_preadv_part(bs->file, offset, below, qiov, qiov_offset, flags);
    }
    if (ret < 0) {
        return ret;
    }
    iov_vector_memset(qiov, qiov_offset + (size_t)below, 0, (size_t)(bytes - below));
    lay_pages_over(s, offset, bytes, qiov, qiov_offset);
    return 0;
}

/* --- writing --- */

/* The file may have been cut here since @page was read. */
static void insert_page(BDRVScratchState *s, int64_t index, uint8_t *page)
{
    QB_GUARD(&s->lock);
    if (find_page_locked(s, index)) {
        g_free(page); /* another request was faster */
        return;
    }
    int64_t below = CLAMP(s->below - index * PAGE, 0, PAGE);
    memset(page + below, 0, (size_t)(PAGE - below));
    g_hash_table_insert(s->pages, page_key(index), page);
}

static bool has_page(BDRVScratchState *s, int64_t index)
{
    QB_GUARD(&s->lock);
    return find_page_locked(s, index) != NULL;
}

/* Makes the page exist, showing what was there. */
static int make_page(BlockDriverState *bs, int64_t index)
{
    BDRVScratchState *s = bs->opaque;
    if (has_page(s, index)) {
        return 0;
    }
    g_autofree uint8_t *page = g_try_malloc0(PAGE);
    if (!page) {
        return -ENOMEM;
    }
    int64_t below = bytes_below(s, index * PAGE, PAGE);
    int ret = below ? bdrv_pread(bs->file, index * PAGE, below, page, 0) : 0;
    if (ret == 0) {
        insert_page(s, index, g_steal_pointer(&page));
    }
    return ret;
}

/* @qiov NULL: zeroes. */
static void store(BDRVScratchState *s, int64_t offset, int64_t bytes, IoVector *qiov,
                  size_t qiov_offset)
{
    QB_GUARD(&s->lock);
    uint8_t *to = find_page_locked(s, offset / PAGE) + offset % PAGE;
    if (qiov) {
        iov_vector_to_buf(qiov, qiov_offset, to, (size_t)bytes);
    } else {
        memset(to, 0, (size_t)bytes);
    }
    s->length = MAX(s->length, offset + bytes);
}

static int write_pages(BlockDriverState *bs, int64_t offset, int64_t bytes, IoVector *qiov,
                       size_t qiov_offset)
{
    while (bytes > 0) {
        int64_t now = part_of_page(offset, bytes);
        int ret = make_page(bs, offset / PAGE);
        if (ret < 0) {
            return ret;
        }
        store(bs->opaque, offset, now, qiov, qiov_offset);
        offset += now;
        qiov_offset += (size_t)now;
        bytes -= now;
    }
    return 0;
}

static int scratch_pwritev(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                           IoVector *qiov, size_t qiov_offset, int flags)
{
    return write_pages(bs, offset, bytes, qiov, qiov_offset);
}

static int scratch_pwrite_zeroes(BlockDriverState *bs, BdrvRequest *req, int64_t offset,
                                 int64_t bytes, int flags)
{
    return write_pages(bs, offset, bytes, NULL, 0);
}

static int scratch_pdiscard(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes)
{
    return 0;
}

/* Nothing is to survive. */
static int scratch_flush(BlockDriverState *bs)
{
    return 0;
}

/* --- length --- */

static gboolean lies_beyond(gpointer key, gpointer page, gpointer opaque)
{
    const int64_t *length = opaque;
    return (int64_t)GPOINTER_TO_SIZE(key) * PAGE >= *length;
}

static bool scratch_truncate(BlockDriverState *bs, int64_t offset, bool exact,
                             PreallocMode prealloc, bool zero_new, GError **errp)
{
    BDRVScratchState *s = bs->opaque;
    QB_GUARD(&s->lock);
    if (offset < s->length) {
        uint8_t *last = find_page_locked(s, offset / PAGE);
        if (last) {
            memset(last + offset % PAGE, 0, (size_t)(PAGE - offset % PAGE));
        }
        s->below = MIN(s->below, offset);
        g_hash_table_foreach_remove(s->pages, lies_beyond, &offset);
    }
    s->length = offset;
    return true;
}

const BlockDriver bdrv_scratch = {
    .format_name = "scratch",
    .protocol_name = "scratch",
    .instance_size = sizeof(BDRVScratchState),
    .open = scratch_open,
    .close = scratch_close,
    .child_perm = scratch_child_perm,
    .preadv = scratch_preadv,
    .pwritev = scratch_pwritev,
    .pwrite_zeroes = scratch_pwrite_zeroes,
    .pdiscard = scratch_pdiscard,
    .flush = scratch_flush,
    .supported_write_flags = BDRV_REQ_FUA | BDRV_REQ_UNCHANGED,
    .supported_zero_flags =
        BDRV_REQ_FUA | BDRV_REQ_MAY_UNMAP | BDRV_REQ_NO_FALLBACK | BDRV_REQ_UNCHANGED,
    .getlength = scratch_getlength,
    .truncate = scratch_truncate,
};
