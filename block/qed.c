/*
 * The QED driver: opening, closing and the table of what it can do.
 *
 *     open:   file child -> header -> geometry -> tables, space -> backing name -> repair if needed
 *     close:  flush -> cut what came free at the end of the file -> give up the memory
 *
 * Rules
 *  1. Nothing is written by an open that does not have to repair.  Unknown autoclear bits go before
 *     the first change.
 *  2. An image with the need-check bit is checked and repaired before anything may change it; one
 *     that cannot be repaired opens read-only.
 *  3. Read-only nodes never write, whatever the bits say.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qed.h"

#define MAX_PAGE_BYTES 65536u

/* ---------------------------------------------------------------- steps of open */

static void teardown(BDRVQedState *s)
{
    qed_pages_free(s);
    qed_alloc_free(s);
    qb_cond_destroy(&s->changed);
    qb_mutex_destroy(&s->lock);
    qb_mutex_destroy(&s->header_lock);
}

static void init_state(BlockDriverState *bs)
{
    BDRVQedState *s = qed_state(bs);
    s->bs = bs;
    qb_mutex_init(&s->header_lock);
    qb_mutex_init(&s->lock);
    qb_cond_init(&s->changed);
    qed_alloc_init(s);
    s->flush.generation = 1;
}

static unsigned log2_of(uint64_t power_of_2)
{
    return (unsigned)__builtin_ctzll(power_of_2);
}

/* Numbers that follow from the (validated) header and stay until close. */
static void set_geometry(BDRVQedState *s)
{
    const QedHeader *h = &s->header;
    s->cluster_size = h->cluster_size;
    s->cluster_bits = log2_of(h->cluster_size);
    s->table_bytes = qed_header_table_bytes(h);
    s->table_bits = log2_of(s->table_bytes / QED_ENTRY_BYTES);
    s->page_bytes = MIN(s->table_bytes, MAX_PAGE_BYTES);
    s->page_bits = log2_of(s->page_bytes / QED_ENTRY_BYTES);
    s->data_start = (uint64_t)h->header_size * h->cluster_size;
    s->l1_offset = h->l1_offset;
    atomic_store(&s->image_size, h->image_size);
}

static bool load_names(BlockDriverState *bs, GError **errp)
{
    bool is_raw = qed_state(bs)->header.features & QED_F_BACKING_NO_PROBE;
    g_autofree char *name = qed_header_read_name(bs, errp);
    if (name) {
        bdrv_set_backing_names(bs, name, *name && is_raw ? "raw" : "");
    }
    return name != NULL;
}

static void set_autoclear_pending(BDRVQedState *s)
{
    QB_GUARD(&s->header_lock);
    atomic_store(&s->autoclear_pending, s->header.autoclear_features != 0);
}

/* ---------------------------------------------------------------- repair */

static bool repair(BlockDriverState *bs, GError **errp)
{
    BDRV_GRAPH_GUARD();
    BdrvCheckOptions opts = {.fix = BDRV_FIX_ERRORS};
    BdrvCheckResult result = {0};
    if (!qed_check(bs, &opts, &result, errp)) {
        g_prefix_error(errp, "Could not repair the image: ");
        return false;
    }
    if (result.corruptions || result.check_errors) {
        qb_error_set(errp, EIO, "Image corrupted");
        qb_error_add_hint(errp, "It can be opened read-only.");
        return false;
    }
    return true;
}

static bool make_ready(BlockDriverState *bs, int flags, GError **errp)
{
    BDRVQedState *s = qed_state(bs);
    if (bdrv_is_read_only(bs)) {
        return true;
    }
    set_autoclear_pending(s);
    return (flags & BDRV_O_CHECK) || !qed_needs_check(s) || repair(bs, errp);
}

static bool open_steps(BlockDriverState *bs, json_t *options, int flags, GError **errp)
{
    BDRVQedState *s = qed_state(bs);
    if (!bdrv_open_file_child(bs, NULL, options, BDRV_CHILD_IMAGE, errp) ||
        !qed_header_load(bs, errp)) {
        return false;
    }
    set_geometry(s);
    qed_pages_init(s);
    return load_names(bs, errp) && make_ready(bs, flags, errp);
}

static bool qed_open(BlockDriverState *bs, json_t *options, int flags, GError **errp)
{
    init_state(bs);
    if (!open_steps(bs, options, flags, errp)) {
        teardown(qed_state(bs));
        return false;
    }
    return true;
}

/* ---------------------------------------------------------------- close and reopen */

static bool came_free(BDRVQedState *s)
{
    QB_GUARD(&s->lock);
    return s->space.freed;
}

/* Metadata to the disk, and the file as short as it can be. */
static int write_back(BlockDriverState *bs)
{
    BDRVQedState *s = qed_state(bs);
    int ret = qed_flush(bs);
    if (ret == 0 && came_free(s) && !atomic_load(&s->corrupt)) {
        (void)qed_cut_file(bs); /* space only */
    }
    return ret;
}

static void qed_close(BlockDriverState *bs)
{
    if (!bdrv_is_read_only(bs)) {
        BDRV_GRAPH_GUARD();
        (void)write_back(bs); /* the error was told to whoever flushed before */
    }
    teardown(qed_state(bs));
}

static bool qed_reopen_prepare(BDRVReopenState *state, GError **errp)
{
    BlockDriverState *bs = state->bs;
    if (state->read_only == bs->read_only) {
        return true;
    }
    BDRV_GRAPH_GUARD();
    int ret = state->read_only ? write_back(bs) : 0;
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Could not write back the metadata of '%s'", bs->filename);
    }
    return ret == 0;
}

static void qed_reopen_commit(BDRVReopenState *state)
{
    if (!state->read_only) {
        set_autoclear_pending(qed_state(state->bs));
    }
}

static bool qed_reopen_repair(BlockDriverState *bs, GError **errp)
{
    return !qed_needs_check(qed_state(bs)) || repair(bs, errp);
}

/* ---------------------------------------------------------------- facts */

static int qed_probe(const uint8_t *buf, size_t len, const char *filename)
{
    return len >= QED_HEADER_BYTES && qb_ldle32(buf) == QED_MAGIC ? 100 : 0;
}

static int64_t qed_getlength(BlockDriverState *bs)
{
    return (int64_t)atomic_load(&qed_state(bs)->image_size);
}

static void qed_refresh_limits(BlockDriverState *bs)
{
    const BDRVQedState *s = qed_state(bs);
    bs->bl.request_alignment = 1;
    bs->bl.pwrite_zeroes_alignment = (uint32_t)s->cluster_size;
    bs->bl.pdiscard_alignment = (uint32_t)s->cluster_size;
}

static bool qed_get_info(BlockDriverState *bs, BlockDriverInfo *info, GError **errp)
{
    BDRVQedState *s = qed_state(bs);
    *info = (BlockDriverInfo){
        .cluster_size = (uint32_t)s->cluster_size,
        .subcluster_size = (uint32_t)s->cluster_size,
        .vm_state_offset = -1,
        .is_dirty = qed_needs_check(s),
    };
    return true;
}

const BlockDriver bdrv_qed = {
    .format_name = "qed",
    .instance_size = sizeof(BDRVQedState),
    .is_format = true,
    .supports_backing = true,

    .probe = qed_probe,
    .open = qed_open,
    .close = qed_close,
    .reopen_prepare = qed_reopen_prepare,
    .reopen_commit = qed_reopen_commit,
    .reopen_repair = qed_reopen_repair,
    .refresh_limits = qed_refresh_limits,

    .create_opts = qed_create_opts,
    .create = qed_create,

    .preadv = qed_preadv,
    .pwritev = qed_pwritev,
    .pwrite_zeroes = qed_pwrite_zeroes,
    .pdiscard = qed_pdiscard,
    .block_status = qed_block_status,
    .flush = qed_flush,
    .supported_zero_flags = BDRV_REQ_MAY_UNMAP | BDRV_REQ_NO_FALLBACK,

    .getlength = qed_getlength,
    .truncate = qed_truncate,

    .get_info = qed_get_info,
    .check = qed_check,
    .change_backing_file = qed_change_backing_file,
    .make_empty = qed_make_empty,
};
