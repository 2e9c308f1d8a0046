/*
 * A protocol in memory that remembers all that was done to it, for tests of what survives a crash.
 *
 *   "test-log:N"    disk N of log_disks[]
 *
 *   log:  write | write | FLUSH | write | zero | truncate | FLUSH | ...
 *                         \__ before it: stable            \__ between: any part may be on disk
 *
 * log_rebuild() makes the disk as a power loss after a given event may have left it: everything up
 * to the last flush before it, and of what came since each 512-byte sector of each event by the
 * toss of a coin (or all of it).  A disk can also be told to fail its Nth request that changes it
 * or flushes.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef TESTS_LOG_DRIVER_H
#define TESTS_LOG_DRIVER_H

#include "block/block-backend.h"
#include "block/driver.h"
#include "util/checked.h"
#include "util/error.h"
#include "util/pool.h"

#include <string.h>

typedef enum LogKind { LOG_WRITE, LOG_ZERO, LOG_TRUNCATE, LOG_FLUSH } LogKind;

typedef struct LogEvent {
    LogKind kind;
    uint64_t offset, bytes; /* truncate: offset is the new length */
    uint8_t *data;          /* of a write; owned */
} LogEvent;

typedef struct LogDisk {
    QbMutex lock;
    uint8_t *data;
    uint64_t length, capacity;
    GArray *log;        /* LogEvent; NULL: not recorded */
    unsigned fail_at;   /* fails when it counts down to 0; 0: never */
    unsigned failures;
} LogDisk;

#define LOG_DISKS 4
static LogDisk log_disks[LOG_DISKS];

typedef struct LogState {
    LogDisk *disk;
} LogState;

static inline LogDisk *log_disk(BlockDriverState *bs)
{
    return ((LogState *)bs->opaque)->disk;
}

/* --- the disk --- */

static inline void log_resize(LogDisk *d, uint64_t length)
{
    if (length > d->capacity) {
        uint64_t capacity = MAX(length, d->capacity * 2);
        d->data = g_realloc(d->data, capacity);
        memset(d->data + d->capacity, 0, capacity - d->capacity);
        d->capacity = capacity;
    }
    if (length < d->length) {
        memset(d->data + length, 0, d->length - length);
    }
    d->length = length;
}

static inline void log_put(LogDisk *d, uint64_t offset, uint64_t bytes, const uint8_t *data)
{
    log_resize(d, MAX(d->length, offset + bytes));
    if (data) {
        memcpy(d->data + offset, data, bytes);
    } else {
        memset(d->data + offset, 0, bytes);
    }
}

static inline void log_event_clear(void *event)
{
    g_free(((LogEvent *)event)->data);
}

static inline void log_clear(LogDisk *d)
{
    if (d->log) {
        g_array_free(d->log, true);
        d->log = NULL;
    }
}

static inline void log_start(LogDisk *d)
{
    log_clear(d);
    d->log = g_array_new(false, false, sizeof(LogEvent));
    g_array_set_clear_func(d->log, log_event_clear);
}

static inline void log_reset(LogDisk *d)
{
    log_clear(d);
    g_free(d->data);
    *d = (LogDisk){.lock = d->lock};
}

/* Content only: no log, no failures. */
static inline void log_copy(LogDisk *to, const LogDisk *from)
{
    log_reset(to);
    log_resize(to, from->length);
    if (from->length) {
        memcpy(to->data, from->data, from->length);
    }
}

static inline void log_note(LogDisk *d, LogKind kind, uint64_t offset, uint64_t bytes,
                            const uint8_t *data)
{
    LogEvent e = {kind, offset, bytes, g_memdup2(data, data ? bytes : 0)};
    if (d->log) {
        g_array_append_val(d->log, e);
    } else {
        g_free(e.data);
    }
}

static inline int log_fails(LogDisk *d)
{
    if (d->fail_at && --d->fail_at == 0) {
        d->failures++;
        return -EIO;
    }
    return 0;
}

/* --- after a crash --- */

static inline void log_apply(LogDisk *d, const LogEvent *e, GRand *toss)
{
    if (e->kind == LOG_TRUNCATE && (!toss || g_rand_boolean(toss))) {
        log_resize(d, e->offset);
    }
    if (e->kind != LOG_WRITE && e->kind != LOG_ZERO) {
        return;
    }
    for (uint64_t pos = 0; pos < e->bytes; pos += 512) {
        uint64_t n = MIN(e->bytes - pos, 512);
        if (!toss || g_rand_boolean(toss)) {
            log_put(d, e->offset + pos, n, e->data ? e->data + pos : NULL);
        }
    }
}

/* @d, which holds what was there before the log began, becomes a state after @n events of @log. */
static inline void log_rebuild(LogDisk *d, const GArray *log, guint n, GRand *toss)
{
    guint stable = 0;
    for (guint i = 0; i < n; i++) {
        stable = g_array_index(log, LogEvent, i).kind == LOG_FLUSH ? i : stable;
    }
    for (guint i = 0; i < n; i++) {
        log_apply(d, &g_array_index(log, LogEvent, i), i < stable ? NULL : toss);
    }
}

/* --- the driver --- */

static inline bool log_parse_filename(const char *filename, json_t *options, GError **errp)
{
    json_object_set_new(options, "disk", json_string(strchr(filename, ':') + 1));
    return true;
}

static inline bool log_open(BlockDriverState *bs, json_t *options, int flags, GError **errp)
{
    uint64_t n;
    if (!qb_opt_take_uint(options, "disk", 0, &n, errp)) {
        return false;
    }
    g_assert_cmpuint(n, <, LOG_DISKS);
    ((LogState *)bs->opaque)->disk = &log_disks[n];
    return true;
}

static inline void log_close(BlockDriverState *bs)
{
}

static inline bool log_create(const char *filename, json_t *options, QbProgress *progress,
                              GError **errp)
{
    log_reset(&log_disks[strchr(filename, ':')[1] - '0']);
    return true;
}

static inline int log_preadv(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                             IoVector *qiov, size_t qiov_offset, int flags)
{
    LogDisk *d = log_disk(bs);
    QB_GUARD(&d->lock);
    iov_vector_memset(qiov, qiov_offset, 0, (size_t)bytes);
    if ((uint64_t)offset < d->length) {
        iov_vector_from_buf(qiov, qiov_offset, d->data + offset,
                            (size_t)MIN((uint64_t)bytes, d->length - (uint64_t)offset));
    }
    return 0;
}

static inline int log_pwritev(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                              IoVector *qiov, size_t qiov_offset, int flags)
{
    LogDisk *d = log_disk(bs);
    g_autofree uint8_t *data = g_malloc((size_t)bytes);
    QB_GUARD(&d->lock);
    iov_vector_to_buf(qiov, qiov_offset, data, (size_t)bytes);
    int ret = log_fails(d);
    if (ret == 0) {
        log_note(d, LOG_WRITE, (uint64_t)offset, (uint64_t)bytes, data);
        log_put(d, (uint64_t)offset, (uint64_t)bytes, data);
    }
    return ret;
}

static inline int log_pwrite_zeroes(BlockDriverState *bs, BdrvRequest *req, int64_t offset,
                                    int64_t bytes, int flags)
{
    LogDisk *d = log_disk(bs);
    QB_GUARD(&d->lock);
    int ret = log_fails(d);
    if (ret == 0) {
        log_note(d, LOG_ZERO, (uint64_t)offset, (uint64_t)bytes, NULL);
        log_put(d, (uint64_t)offset, (uint64_t)bytes, NULL);
    }
    return ret;
}

static inline int64_t log_getlength(BlockDriverState *bs)
{
    LogDisk *d = log_disk(bs);
    QB_GUARD(&d->lock);
    return (int64_t)d->length;
}

static inline int log_pdiscard(BlockDriverState *bs, BdrvRequest *req, int64_t offset,
                               int64_t bytes)
{
    int64_t length = log_getlength(bs), end = MIN(offset + bytes, length);
    return offset < end ? log_pwrite_zeroes(bs, req, offset, end - offset, 0) : 0;
}

static inline int log_flush(BlockDriverState *bs)
{
    LogDisk *d = log_disk(bs);
    QB_GUARD(&d->lock);
    int ret = log_fails(d);
    if (ret == 0) {
        log_note(d, LOG_FLUSH, 0, 0, NULL);
    }
    return ret;
}

static inline bool log_truncate(BlockDriverState *bs, int64_t offset, bool exact,
                                PreallocMode prealloc, bool zero_new, GError **errp)
{
    LogDisk *d = log_disk(bs);
    QB_GUARD(&d->lock);
    if (log_fails(d) < 0) {
        qb_error_set(errp, EIO, "told to fail");
        return false;
    }
    log_note(d, LOG_TRUNCATE, (uint64_t)offset, 0, NULL);
    log_resize(d, (uint64_t)offset);
    return true;
}

static inline bool log_reopen_prepare(BDRVReopenState *state, GError **errp)
{
    json_object_del(state->options, "disk");
    return true;
}

static const BlockDriver log_driver = {
    .format_name = "test-log",
    .protocol_name = "test-log",
    .instance_size = sizeof(LogState),
    .parse_filename = log_parse_filename,
    .open = log_open,
    .close = log_close,
    .reopen_prepare = log_reopen_prepare,
    .create = log_create,
    .preadv = log_preadv,
    .pwritev = log_pwritev,
    .pwrite_zeroes = log_pwrite_zeroes,
    .pdiscard = log_pdiscard,
    .flush = log_flush,
    .truncate = log_truncate,
    .getlength = log_getlength,
    .supported_zero_flags = BDRV_REQ_MAY_UNMAP | BDRV_REQ_NO_FALLBACK,
};

static inline void log_init(void)
{
    bdrv_init();
    bdrv_register(&log_driver);
    for (int i = 0; i < LOG_DISKS; i++) {
        qb_mutex_init(&log_disks[i].lock);
    }
}

/* Ends what the tests have made. Returns @ret, for the last line of main(). */
static inline int log_done(int ret)
{
    qb_pools_shutdown();
    for (int i = 0; i < LOG_DISKS; i++) {
        log_reset(&log_disks[i]);
        qb_mutex_destroy(&log_disks[i].lock);
    }
    return ret;
}

#endif
