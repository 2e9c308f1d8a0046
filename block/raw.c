/*
 * raw: the guest's disk is the content of a file, or a window into it.
 *
 *   file    |----- offset -----|============ size ============|-------|
 *   node                       |============ length ===========|
 *
 * Without "size" the window reaches to the end of the file and moves with it; with "offset" or
 * "size" the driver is a format of its own, without both it changes nothing.  All requests are
 * passed on with the offset added.
 *
 * Invariants
 *  1. offset + size <= length of the file when the node is opened or reopened; with "size" the
 *     length never changes.
 *  2. In an image whose raw format was only guessed no write makes block 0 look like another
 *     format: the next probing would believe it.  The 512 bytes are looked at in a copy of our own,
 *     and that copy is what is written, so that a guest cannot change them in between.
 *  3. Such an image has a request alignment of 512, so that a write of less than block 0 arrives
 *     whole.
 *
 * Not done: the window is not rounded; "offset" may be any number, alignment of the file is its own
 * matter.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/driver.h"
#include "block/queue.h"
#include "util/checked.h"
#include "util/error.h"

#include <inttypes.h>

typedef struct BDRVRawState {
    int64_t offset, size;
    bool has_size;
    _Atomic(bool) warned; /* of a write refused by invariant 2 */
} BDRVRawState;

/* --- options --- */

static bool take_options(json_t *options, BDRVRawState *s, GError **errp)
{
    uint64_t offset, size;
    s->has_size = json_object_get(options, "size") != NULL;
    if (!qb_opt_take_size(options, "offset", 0, &offset, errp)
        || !qb_opt_take_size(options, "size", 0, &size, errp)) {
        return false;
    }
    s->offset = (int64_t)offset;
    s->size = (int64_t)size;
    return true;
}

/* Checks the window of @s against the file, and settles its size. */
static bool check_window(const BDRVRawState *s, int64_t file_length, GError **errp)
{
    if (s->offset > file_length) {
        qb_error_set(errp, EINVAL,
                     "Offset (%" PRId64 ") cannot be greater than size of the containing file "
                     "(%" PRId64 ")",
                     s->offset, file_length);
        return false;
    }
    if (s->has_size && s->size > file_length - s->offset) {
        qb_error_set(errp, EINVAL,
                     "The sum of offset (%" PRId64 ") and size (%" PRId64 ") has to be smaller or "
                     "equal to the actual size of the containing file (%" PRId64 ")",
                     s->offset, s->size, file_length);
        return false;
    }
    if (s->has_size && !qb_is_aligned((uint64_t)s->size, BDRV_SECTOR_SIZE)) {
        qb_error_set(errp, EINVAL, "Specified size is not multiple of %d", BDRV_SECTOR_SIZE);
        return false;
    }
    return true;
}

static bool apply_options(BlockDriverState *bs, const BDRVRawState *want, GError **errp)
{
    BDRVRawState *s = bs->opaque;
    int64_t file_length = bdrv_getlength(bs->file->bs);
    if (file_length < 0) {
        qb_error_set_errno(errp, (int)file_length, "Could not get image size");
        return false;
    }
    if (!check_window(want, file_length, errp)) {
        return false;
    }
    s->offset = want->offset;
    s->size = want->size;
    s->has_size = want->has_size;
    return true;
}

static bool raw_open(BlockDriverState *bs, json_t *options, int flags, GError **errp)
{
    BDRVRawState want = {0};
    if (!take_options(options, &want, errp)) {
        return false;
    }
    /* A window is data of its own; without one everything is passed on, also who may resize. */
    bool window = want.offset || want.has_size;
    int role = BDRV_CHILD_PRIMARY | (window ? BDRV_CHILD_DATA : BDRV_CHILD_FILTERED);
    return bdrv_open_file_child(bs, NULL, options, role, errp) && apply_options(bs, &want, errp);
}

static bool raw_reopen_prepare(BDRVReopenState *state, GError **errp)
{
    BDRVRawState *want = g_new0(BDRVRawState, 1);
    int64_t file_length = bdrv_getlength(state->bs->file->bs);
    if (take_options(state->options, want, errp) && check_window(want, file_length, errp)) {
        state->opaque = want;
        return true;
    }
    g_free(want);
    return false;
}

static void raw_reopen_commit(BDRVReopenState *state)
{
    BDRVRawState *s = state->bs->opaque;
    BDRVRawState *want = g_steal_pointer(&state->opaque);
    s->offset = want->offset;
    s->size = want->size;
    s->has_size = want->has_size;
    g_free(want);
}

static void raw_reopen_abort(BDRVReopenState *state)
{
    g_free(g_steal_pointer(&state->opaque));
}

/* The smallest score there is: every other format that knows the content comes first. */
static int raw_probe(const uint8_t *buf, size_t len, const char *filename)
{
    return 1;
}

static void raw_refresh_limits(BlockDriverState *bs)
{
    if (bs->probed) {
        bs->bl.request_alignment = BDRV_SECTOR_SIZE; /* invariant 3 */
    }
}

/* --- the window --- */

/* Turns an offset of the node into one of the file; -errno when the range leaves the window. */
static int to_file(BlockDriverState *bs, int64_t *offset, int64_t bytes)
{
    const BDRVRawState *s = bs->opaque;
    if (s->has_size && (*offset > s->size || bytes > s->size - *offset)) {
        return -ENOSPC;
    }
    return qb_add_overflow(*offset, s->offset, offset) || *offset > INT64_MAX - bytes ? -EINVAL : 0;
}

static int64_t raw_getlength(BlockDriverState *bs)
{
    const BDRVRawState *s = bs->opaque;
    if (s->has_size) {
        return s->size;
    }
    int64_t length = bdrv_getlength(bs->file->bs);
    return length < 0 ? length : MAX(length - s->offset, 0);
}

static bool raw_truncate(BlockDriverState *bs, int64_t offset, bool exact, PreallocMode prealloc,
                         bool zero_new, GError **errp)
{
    const BDRVRawState *s = bs->opaque;
    int64_t file_length;
    if (s->has_size) {
        qb_error_set(errp, ENOTSUP, "Cannot resize fixed-size raw disks");
        return false;
    }
    if (qb_add_overflow(offset, s->offset, &file_length)) {
        qb_error_set(errp, EINVAL, "Disk size too large for the chosen offset");
        return false;
    }
    const BdrvResize how = {
        .length = file_length, .exact = exact, .prealloc = prealloc, .zero_new = zero_new,
        .progress = bs->resize_progress,
    };
    return bdrv_resize(bs->file, &how, errp);
}

/* --- requests --- */

/* Requests are padded to the node's alignment; what the window does not have reads as zeroes. */
static int raw_preadv(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                      IoVector *qiov, size_t qiov_offset, int flags)
{
    int ret = to_file(bs, &offset, bytes);
    if (ret < 0) {
        return ret;
    }
    bdrv_debug_event(bs->file, "read_aio");
    return bdrv_preadv_part(bs->file, offset, bytes, qiov, qiov_offset, flags);
}

typedef struct ProbeContest {
    const uint8_t *buf;
    bool recognised;
} ProbeContest;

static void probe_one(const BlockDriver *drv, void *opaque)
{
    ProbeContest *c = opaque;
    if (drv != &bdrv_raw && drv->probe && drv->probe(c->buf, BDRV_SECTOR_SIZE, "") > 0) {
        c->recognised = true;
    }
}

static void warn_refused(BlockDriverState *bs)
{
    BDRVRawState *s = bs->opaque;
    if (!atomic_exchange(&s->warned, true)) {
        bdrv_warn("WARNING: Refused to write a header of another image format to block 0 of '%s'.\n"
                  "         Its raw format was only guessed, write operations on block 0 are "
                  "restricted.\n"
                  "         Specify the 'raw' format explicitly to remove the restrictions.",
                  bdrv_filename(bs));
    }
}

/* Writes what begins with block 0, after a look at it (invariant 2). */
static int write_block_0(BlockDriverState *bs, int64_t offset, int64_t bytes, IoVector *qiov,
                         size_t qiov_offset, int flags)
{
    uint8_t block[BDRV_SECTOR_SIZE];
    ProbeContest contest = {.buf = block};
    assert(bytes >= BDRV_SECTOR_SIZE); /* invariant 3 */
    iov_vector_to_buf(qiov, qiov_offset, block, sizeof(block));
    bdrv_for_each_driver(probe_one, &contest);
    if (contest.recognised) {
        warn_refused(bs);
        return -EPERM;
    }
    IOV_VECTOR_AUTO checked;
    iov_vector_init(&checked, qiov->niov + 1);
    iov_vector_add(&checked, block, sizeof(block));
    iov_vector_concat(&checked, qiov, qiov_offset + sizeof(block), (size_t)bytes - sizeof(block));
    return bdrv_pwritev(bs->file, offset, bytes, &checked, flags);
}

static int raw_pwritev(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                       IoVector *qiov, size_t qiov_offset, int flags)
{
    bool block_0 = bs->probed && offset < BDRV_SECTOR_SIZE;
    int ret = to_file(bs, &offset, bytes);
    if (ret < 0) {
        return ret;
    }
    bdrv_debug_event(bs->file, "write_aio");
    if (block_0) {
        return write_block_0(bs, offset, bytes, qiov, qiov_offset, flags);
    }
    return bdrv_pwritev_part(bs->file, offset, bytes, qiov, qiov_offset, flags);
}

static int raw_pwrite_zeroes(BlockDriverState *bs, BdrvRequest *req, int64_t offset,
                             int64_t bytes, int flags)
{
    int ret = to_file(bs, &offset, bytes);
    return ret < 0 ? ret : bdrv_pwrite_zeroes(bs->file, offset, bytes, flags);
}

static int raw_pdiscard(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes)
{
    int ret = to_file(bs, &offset, bytes);
    return ret < 0 ? ret : bdrv_pdiscard(bs->file, offset, bytes);
}

/* The content is what the file says it is. */
static int raw_block_status(BlockDriverState *bs, int64_t offset, int64_t bytes, BdrvStatus *ret)
{
    const BDRVRawState *s = bs->opaque;
    *ret = (BdrvStatus){
        .flags = BDRV_BLOCK_ALLOCATED | BDRV_BLOCK_OFFSET_VALID | BDRV_BLOCK_RECURSE,
        .bytes = bytes,
        .host_offset = offset + s->offset,
        .host_node = bs->file->bs,
    };
    return 0;
}

static bool batch_passes(BlockDriverState *bs, const BdrvBatchOp *op)
{
    return !(bs->probed && op->kind == BDRV_BATCH_WRITE && op->offset < BDRV_SECTOR_SIZE);
}

/* Passed on as one where the window allows; else each for itself, which finds out why not. */
static int raw_run_batch(BlockDriverState *bs, BdrvBatchOp *ops, size_t n)
{
    g_autofree BdrvBatchOp *moved = g_memdup2(ops, n * sizeof(*ops));
    for (size_t i = 0; i < n; i++) {
        if (!batch_passes(bs, &ops[i]) || to_file(bs, &moved[i].offset, moved[i].bytes) < 0) {
            return -ENOTSUP;
        }
    }
    int ret = bdrv_run_batch(bs->file, moved, n);
    for (size_t i = 0; i < n; i++) {
        ops[i].ret = moved[i].ret;
    }
    return ret;
}

static int raw_map(BlockDriverState *bs, BlkQueue *queue, BdrvMapIntent intent, int64_t offset,
                   int64_t bytes, BdrvMapping *mapping)
{
    bool block_0 = bs->probed && intent == BDRV_MAP_WRITE && offset < BDRV_SECTOR_SIZE;
    if (block_0 || to_file(bs, &offset, bytes) < 0) {
        return -EAGAIN;
    }
    return bdrv_map(bs->file, queue, intent, offset, bytes, mapping);
}

/* --- information, creation --- */

static bool raw_get_info(BlockDriverState *bs, BlockDriverInfo *info, GError **errp)
{
    return bdrv_get_info(bs->file->bs, info, errp);
}

static json_t *raw_get_specific_info(BlockDriverState *bs, GError **errp)
{
    return bdrv_get_specific_info(bs->file->bs, errp);
}

static bool raw_create(const char *filename, json_t *options, QbProgress *progress,
                       GError **errp)
{
    const BlockDriver *protocol = bdrv_find_protocol(filename, true, errp);
    if (!protocol) {
        return false;
    }
    if (!protocol->create) {
        qb_error_set(errp, ENOTSUP, "Protocol driver '%s' does not support creating new images",
                     protocol->format_name);
        return false;
    }
    return protocol->create(filename, options, progress, errp);
}

/* Raw files grow to their length at once; as create, which rounds lengths up. */
static bool raw_measure(json_t *options, BlockDriverState *source, BlockMeasureInfo *ret,
                        GError **errp)
{
    uint64_t size;
    int64_t rounded;
    if (!qb_opt_take_size(options, "size", 0, &size, errp)) {
        return false;
    }
    if (qb_align_up_overflow(size, BDRV_SECTOR_SIZE, &rounded)) {
        qb_error_set(errp, EFBIG, "The image size is too large");
        return false;
    }
    ret->required = ret->fully_allocated = (uint64_t)rounded;
    return true;
}

static const QbOptDesc raw_create_opts[] = {
    {"size", QB_OPT_SIZE, "Virtual disk size", NULL},
    {NULL, QB_OPT_STRING, NULL, NULL},
};

static const char *const raw_strong_options[] = {"offset", "size", NULL};

#define ZERO_FLAGS                                                                                 \
    (BDRV_REQ_FUA | BDRV_REQ_MAY_UNMAP | BDRV_REQ_NO_FALLBACK | BDRV_REQ_UNCHANGED)

const BlockDriver bdrv_raw = {
    .format_name = "raw",
    .instance_size = sizeof(BDRVRawState),
    .is_format = true,
    .has_variable_length = true,
    .strong_options = raw_strong_options,
    .probe = raw_probe,
    .open = raw_open,
    .reopen_prepare = raw_reopen_prepare,
    .reopen_commit = raw_reopen_commit,
    .reopen_abort = raw_reopen_abort,
    .refresh_limits = raw_refresh_limits,
    .create_opts = raw_create_opts,
    .create = raw_create,
    .measure = raw_measure,
    .preadv = raw_preadv,
    .pwritev = raw_pwritev,
    .pwrite_zeroes = raw_pwrite_zeroes,
    .pdiscard = raw_pdiscard,
    .block_status = raw_block_status,
    .run_batch = raw_run_batch,
    .supported_write_flags = BDRV_REQ_FUA | BDRV_REQ_UNCHANGED,
    .supported_zero_flags = ZERO_FLAGS,
    .map = raw_map,
    .getlength = raw_getlength,
    .truncate = raw_truncate,
    .get_info = raw_get_info,
    .get_specific_info = raw_get_specific_info,
};
