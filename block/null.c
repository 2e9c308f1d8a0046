/*
 * null-co and null-aio: nodes without storage, for tests and to measure what is above them.
 *
 * Writes go nowhere.  Reads leave the buffer as it is, or fill it with zeroes with read-zeroes=on,
 * in which case block status says so.  Each request takes latency-ns nanoseconds, in the thread
 * that makes it.  The two names differ in nothing; they exist because users have scripts with both.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/driver.h"
#include "util/error.h"

#include <string.h>
#include <time.h>

#define NS_PER_S 1000000000u
#define DEFAULT_SIZE ((uint64_t)1 << 30)

typedef struct BDRVNullState {
    int64_t length;
    uint64_t latency_ns;
    bool read_zeroes;
} BDRVNullState;

static bool parse_name(const char *filename, const char *allowed, GError **errp)
{
    if (strcmp(filename, allowed)) {
        qb_error_set(errp, EINVAL, "The only allowed filename for this driver is '%s'", allowed);
        return false;
    }
    return true;
}

static bool null_co_parse_filename(const char *filename, json_t *options, GError **errp)
{
    return parse_name(filename, "null-co://", errp);
}

static bool null_aio_parse_filename(const char *filename, json_t *options, GError **errp)
{
    return parse_name(filename, "null-aio://", errp);
}

static bool null_open(BlockDriverState *bs, json_t *options, int flags, GError **errp)
{
    BDRVNullState *s = bs->opaque;
    uint64_t size;
    if (!qb_opt_take_size(options, "size", DEFAULT_SIZE, &size, errp)
        || !qb_opt_take_uint(options, "latency-ns", 0, &s->latency_ns, errp)
        || !qb_opt_take_bool(options, "read-zeroes", false, &s->read_zeroes, errp)) {
        return false;
    }
    if (s->latency_ns > INT64_MAX) {
        qb_error_set(errp, EINVAL, "latency-ns is invalid");
        return false;
    }
    s->length = (int64_t)size;
    return true;
}

static int64_t null_getlength(BlockDriverState *bs)
{
    BDRVNullState *s = bs->opaque;
    return s->length;
}

static int64_t null_get_allocated_file_size(BlockDriverState *bs)
{
    return 0;
}

static int pass_time(BlockDriverState *bs)
{
    BDRVNullState *s = bs->opaque;
    if (s->latency_ns) {
        struct timespec ts = {
            .tv_sec = (time_t)(s->latency_ns / NS_PER_S),
            .tv_nsec = (long)(s->latency_ns % NS_PER_S),
        };
        while (clock_nanosleep(CLOCK_MONOTONIC, 0, &ts, &ts) == EINTR) {
        }
    }
    return 0;
}

static int null_preadv(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                       IoVector *qiov, size_t qiov_offset, int flags)
{
    BDRVNullState *s = bs->opaque;
    if (s->read_zeroes) {
        iov_vector_memset(qiov, qiov_offset, 0, (size_t)bytes);
    }
    return pass_time(bs);
}

static int null_pwritev(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                        IoVector *qiov, size_t qiov_offset, int flags)
{
    return pass_time(bs);
}

static int null_pwrite_zeroes(BlockDriverState *bs, BdrvRequest *req, int64_t offset,
                              int64_t bytes, int flags)
{
    return pass_time(bs);
}

static int null_flush(BlockDriverState *bs)
{
    return pass_time(bs);
}

static int null_block_status(BlockDriverState *bs, int64_t offset, int64_t bytes, BdrvStatus *ret)
{
    BDRVNullState *s = bs->opaque;
    *ret = (BdrvStatus){
        .flags = BDRV_BLOCK_ALLOCATED | BDRV_BLOCK_OFFSET_VALID
                 | (s->read_zeroes ? BDRV_BLOCK_ZERO : BDRV_BLOCK_DATA),
        .bytes = bytes,
        .host_offset = offset,
        .host_node = bs,
    };
    return 0;
}

static bool null_reopen_prepare(BDRVReopenState *state, GError **errp)
{
    BDRVNullState *s = state->bs->opaque;
    BDRVNullState want = *s;
    uint64_t size;
    if (!qb_opt_take_size(state->options, "size", DEFAULT_SIZE, &size, errp)
        || !qb_opt_take_uint(state->options, "latency-ns", 0, &want.latency_ns, errp)
        || !qb_opt_take_bool(state->options, "read-zeroes", false, &want.read_zeroes, errp)) {
        return false;
    }
    if ((int64_t)size != s->length || want.latency_ns != s->latency_ns
        || want.read_zeroes != s->read_zeroes) {
        qb_error_set(errp, EINVAL, "Options of a null node cannot be changed");
        return false;
    }
    return true;
}

static const char *const null_strong_options[] = {"size", "read-zeroes", NULL};

#define NULL_DRIVER(name, parse)                                                                   \
    {                                                                                              \
        .format_name = name,                                                                       \
        .protocol_name = name,                                                                     \
        .instance_size = sizeof(BDRVNullState),                                                    \
        .strong_options = null_strong_options,                                                     \
        .parse_filename = parse,                                                                   \
        .open = null_open,                                                                         \
        .reopen_prepare = null_reopen_prepare,                                                     \
        .preadv = null_preadv,                                                                     \
        .pwritev = null_pwritev,                                                                   \
        .pwrite_zeroes = null_pwrite_zeroes,                                                       \
        .block_status = null_block_status,                                                         \
        .flush = null_flush,                                                                       \
        .supported_write_flags = BDRV_REQ_FUA | BDRV_REQ_UNCHANGED,                                \
        .supported_zero_flags =                                                                    \
            BDRV_REQ_FUA | BDRV_REQ_MAY_UNMAP | BDRV_REQ_NO_FALLBACK | BDRV_REQ_UNCHANGED,         \
        .getlength = null_getlength,                                                               \
        .get_allocated_file_size = null_get_allocated_file_size,                                   \
    }

const BlockDriver bdrv_null_co = NULL_DRIVER("null-co", null_co_parse_filename);
const BlockDriver bdrv_null_aio = NULL_DRIVER("null-aio", null_aio_parse_filename);
