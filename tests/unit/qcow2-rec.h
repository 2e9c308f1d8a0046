/*
 * A file in memory that remembers what was done to it, for tests of what qcow2 writes in which
 * order.
 *
 *   RecFile "a"  <--- node of driver test-rec, file.name=a
 *      data, length      as the kernel would show them
 *      log               W W D F M W F ...      writes, discards (as writes of zeroes), flushes,
 *      marks fail              the n-th read, write or flush from now on gives an error, once
 *
 * The log of a run, applied to the bytes from before it, gives what a crash leaves: all up to some
 * point; or all up to the last flush before that point and any sectors of what followed.
 *
 * The files outlive the nodes.  Data are copied without a lock; the log has one.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef TESTS_UNIT_QCOW2_REC_H
#define TESTS_UNIT_QCOW2_REC_H

#include "qcow2-image.h"

#include <sys/mman.h>
#include <unistd.h>

#define REC_SECTOR 512

typedef enum RecKind { REC_READ, REC_WRITE, REC_FLUSH, REC_MARK, REC_KINDS } RecKind;

typedef struct RecOp {
    RecKind kind;
    uint64_t offset, bytes;
    uint8_t *data; /* owned; NULL: zeroes */
    int mark;      /* the test's own number */
} RecOp;

typedef struct RecFile {
    char *name;
    uint8_t *data;
    size_t capacity;
    _Atomic(int64_t) length;
    bool device; /* cannot grow */
    unsigned flush_us; /* what a flush takes */
    _Atomic(unsigned) read_us;
    void (*on_flush)(void *opaque); /* called once, by the next flush */
    void (*on_write)(void *opaque); /* the same for writes, before the bytes are there */
    void *opaque;
    QbMutex lock;
    GArray *log; /* RecOp; NULL: nobody is interested */
    _Atomic(int) fail[REC_KINDS]; /* so many operations of the kind until one fails; 0: none does */
    _Atomic(int) error;           /* that it fails with */
    _Atomic(unsigned) count[REC_KINDS];
} RecFile;

static GPtrArray *rec_files;

static inline RecFile *rec_find(const char *name)
{
    for (guint i = 0; rec_files && i < rec_files->len; i++) {
        RecFile *f = g_ptr_array_index(rec_files, i);
        if (g_str_equal(f->name, name)) {
            return f;
        }
    }
    return NULL;
}

/* --- files --- */

static inline RecFile *rec_file_new(const char *name, const uint8_t *data, size_t length,
                                    size_t capacity)
{
    RecFile *f = g_new0(RecFile, 1);
    f->name = g_strdup(name);
    f->capacity = MAX(capacity, length);
    f->data = mmap(NULL, f->capacity, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0); /* sparse */
    g_assert_true(f->data != MAP_FAILED);
    memcpy(f->data, data, length);
    f->length = (int64_t)length;
    f->error = -EIO;
    qb_mutex_init(&f->lock);
    if (!rec_files) {
        rec_files = g_ptr_array_new();
    }
    g_assert_null(rec_find(name));
    g_ptr_array_add(rec_files, f);
    return f;
}

static inline void rec_log_clear(GArray *log)
{
    for (guint i = 0; i < log->len; i++) {
        g_free(g_array_index(log, RecOp, i).data);
    }
    g_array_set_size(log, 0);
}

static inline void rec_file_free(RecFile *f)
{
    g_ptr_array_remove(rec_files, f);
    if (f->log) {
        rec_log_clear(f->log);
        g_array_free(f->log, true);
    }
    qb_mutex_destroy(&f->lock);
    munmap(f->data, f->capacity);
    g_free(f->name);
    g_free(f);
}

static inline RecFile *rec_file_dup(const char *name, const RecFile *f)
{
    RecFile *copy = rec_file_new(name, f->data, (size_t)f->length, f->capacity);
    copy->device = f->device;
    return copy;
}

/* A fresh image as bdrv_img_create() makes it. */
static inline RecFile *rec_image_new(const char *name, const char *opts, size_t capacity)
{
    g_autofree char *path = image_path("fresh"), *data = NULL;
    gsize length;
    image_create("fresh", opts);
    g_assert_true(g_file_get_contents(path, &data, &length, NULL));
    g_unlink(path);
    return rec_file_new(name, (uint8_t *)data, length, capacity);
}

static inline void rec_start(RecFile *f)
{
    QB_GUARD(&f->lock);
    if (f->log) {
        rec_log_clear(f->log);
    } else {
        f->log = g_array_new(false, true, sizeof(RecOp));
    }
}

static inline void rec_add(RecFile *f, RecOp op)
{
    QB_GUARD(&f->lock);
    f->count[op.kind]++;
    if (f->log) {
        op.data = op.data ? g_memdup2(op.data, (gsize)op.bytes) : NULL;
        g_array_append_val(f->log, op);
    }
}

static inline void rec_mark(RecFile *f, int mark)
{
    rec_add(f, (RecOp){.kind = REC_MARK, .mark = mark});
}

/* True once, when the countdown has come to its end. */
static inline bool rec_fails(RecFile *f, RecKind kind)
{
    int left = f->fail[kind];
    while (left > 0 && !atomic_compare_exchange_weak(&f->fail[kind], &left, left - 1)) {
    }
    return left == 1;
}

/* --- what a crash leaves --- */

static inline void rec_apply_part(RecFile *f, const RecOp *op, uint64_t from, uint64_t bytes)
{
    g_assert_cmpuint(op->offset + from + bytes, <=, f->capacity);
    if (op->data) {
        memcpy(f->data + op->offset + from, op->data + from, bytes);
        f->length = MAX(f->length, (int64_t)(op->offset + from + bytes));
    } else {
        memset(f->data + op->offset + from, 0, bytes);
    }
}

/* @f gets the first @n operations of @log; with @rand those after the last flush among them only by
 * single sectors, at random. */
static inline void rec_replay(RecFile *f, const GArray *log, guint n, GRand *rand)
{
    guint stable = n;
    while (rand && stable > 0 && g_array_index(log, RecOp, stable - 1).kind != REC_FLUSH) {
        stable--;
    }
    for (guint i = 0; i < n; i++) {
        const RecOp *op = &g_array_index(log, RecOp, i);
        if (op->kind != REC_WRITE) {
            continue;
        }
        uint64_t step = i < stable ? op->bytes : REC_SECTOR;
        for (uint64_t from = 0; from < op->bytes; from += step) {
            if (i < stable || g_rand_boolean(rand)) {
                rec_apply_part(f, op, from, MIN(step, op->bytes - from));
            }
        }
    }
}

/* --- the driver --- */

typedef struct RecState {
    RecFile *f;
} RecState;

static inline RecFile *rec_of(BlockDriverState *bs)
{
    return ((RecState *)bs->opaque)->f;
}

static inline bool rec_open(BlockDriverState *bs, json_t *options, int flags, GError **errp)
{
    json_t *name = json_object_get(options, "name");
    RecState *s = bs->opaque;
    s->f = name ? rec_find(json_string_value(name)) : NULL;
    if (!s->f) {
        qb_error_set(errp, ENOENT, "No such file in memory");
        return false;
    }
    json_object_del(options, "name");
    return true;
}

static inline void rec_close(BlockDriverState *bs)
{
}

static inline void rec_refresh_limits(BlockDriverState *bs)
{
    bs->bl.request_alignment = REC_SECTOR;
}

static inline int64_t rec_getlength(BlockDriverState *bs)
{
    return rec_of(bs)->length;
}

static inline int rec_preadv(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                             IoVector *qiov, size_t qiov_offset, int flags)
{
    RecFile *f = rec_of(bs);
    f->count[REC_READ]++;
    if (f->read_us) {
        g_usleep(f->read_us);
    }
    if (rec_fails(f, REC_READ)) {
        return f->error;
    }
    g_assert_cmpuint((size_t)(offset + bytes), <=, f->capacity);
    iov_vector_from_buf(qiov, qiov_offset, f->data + offset, (size_t)bytes);
    return 0;
}

static inline void rec_raise_length(RecFile *f, int64_t end)
{
    int64_t length = f->length;
    g_assert_true(!f->device || end <= length);
    while (length < end && !atomic_compare_exchange_weak(&f->length, &length, end)) {
    }
}

static inline int rec_pwritev(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                              IoVector *qiov, size_t qiov_offset, int flags)
{
    RecFile *f = rec_of(bs);
    void (*hook)(void *opaque) = f->on_write;
    if (hook) {
        f->on_write = NULL;
        hook(f->opaque);
    }
    if (rec_fails(f, REC_WRITE)) {
        return f->error;
    }
    if ((size_t)(offset + bytes) > f->capacity) {
        return -ENOSPC;
    }
    iov_vector_to_buf(qiov, qiov_offset, f->data + offset, (size_t)bytes);
    rec_raise_length(f, offset + bytes);
    rec_add(f, (RecOp){.kind = REC_WRITE, .offset = (uint64_t)offset, .bytes = (uint64_t)bytes,
                       .data = f->data + offset});
    return 0;
}

static inline int rec_pdiscard(BlockDriverState *bs, BdrvRequest *req, int64_t offset,
                               int64_t bytes)
{
    RecFile *f = rec_of(bs);
    memset(f->data + offset, 0, (size_t)bytes);
    rec_add(f, (RecOp){.kind = REC_WRITE, .offset = (uint64_t)offset, .bytes = (uint64_t)bytes});
    return 0;
}

static inline int rec_pwrite_zeroes(BlockDriverState *bs, BdrvRequest *req, int64_t offset,
                                    int64_t bytes, int flags)
{
    if ((size_t)(offset + bytes) > rec_of(bs)->capacity) {
        return -ENOSPC;
    }
    rec_raise_length(rec_of(bs), offset + bytes);
    return rec_pdiscard(bs, req, offset, bytes);
}

static inline int rec_flush(BlockDriverState *bs)
{
    RecFile *f = rec_of(bs);
    void (*hook)(void *opaque) = f->on_flush;
    if (hook) {
        f->on_flush = NULL;
        hook(f->opaque);
    }
    if (rec_fails(f, REC_FLUSH)) {
        return f->error;
    }
    if (f->flush_us) {
        g_usleep(f->flush_us);
    }
    rec_add(f, (RecOp){.kind = REC_FLUSH});
    return 0;
}

static inline bool rec_truncate(BlockDriverState *bs, int64_t offset, bool exact,
                                PreallocMode prealloc, bool zero_new, GError **errp)
{
    RecFile *f = rec_of(bs);
    if ((size_t)offset > f->capacity) {
        qb_error_set(errp, ENOSPC, "No space left in memory");
        return false;
    }
    if (offset < f->length) {
        memset(f->data + offset, 0, (size_t)(f->length - offset));
    }
    f->length = offset;
    return true;
}

#define REC_DRIVER                                                                                 \
    .instance_size = sizeof(RecState), .open = rec_open, .close = rec_close,                       \
    .refresh_limits = rec_refresh_limits, .preadv = rec_preadv, .pwritev = rec_pwritev,            \
    .pwrite_zeroes = rec_pwrite_zeroes, .pdiscard = rec_pdiscard, .flush = rec_flush,              \
    .getlength = rec_getlength,                                                                    \
    .supported_zero_flags = BDRV_REQ_MAY_UNMAP | BDRV_REQ_NO_FALLBACK

static const BlockDriver rec_driver = {
    .format_name = "test-rec", .protocol_name = "test-rec", .truncate = rec_truncate, REC_DRIVER,
};

/* The same without a way to grow. */
static const BlockDriver rec_device_driver = {
    .format_name = "test-rec-dev", .protocol_name = "test-rec-dev", REC_DRIVER,
};

static inline void rec_setup(void)
{
    image_setup();
    bdrv_register(&rec_driver);
    bdrv_register(&rec_device_driver);
}

/* --- images --- */

/* NULL when it does not open. @opts: more node options, or NULL. */
static inline BlockBackend *rec_try_image(const RecFile *f, const char *opts, int flags)
{
    GError *err = NULL;
    g_autofree char *text = g_strdup_printf("driver=qcow2,file.driver=%s,file.name=%s%s%s",
                                            f->device ? "test-rec-dev" : "test-rec", f->name,
                                            opts ? "," : "", opts ? opts : "");
    json_t *options = qb_opts_parse(text, NULL, &err);
    g_assert_no_error(err);
    BlockDriverState *bs = bdrv_open(NULL, options, flags, &err);
    if (!bs) {
        g_test_message("%s", err->message);
        g_error_free(err);
        return NULL;
    }
    unsigned perm = flags & BDRV_O_RDWR ? BLK_PERM_ALL : BLK_PERM_CONSISTENT_READ;
    BlockBackend *blk = blk_new_with_bs(bs, perm, BLK_PERM_ALL, &err);
    g_assert_no_error(err);
    bdrv_unref(bs);
    return blk;
}

static inline BlockBackend *rec_open_image(const RecFile *f, const char *opts, int flags)
{
    BlockBackend *blk = rec_try_image(f, opts, flags);
    g_assert_nonnull(blk);
    return blk;
}

static inline BlockBackend *rec_open_rw(const RecFile *f)
{
    return rec_open_image(f, "discard=unmap,file.discard=unmap", BDRV_O_RDWR | BDRV_O_RESIZE);
}

/* @opaque: a bool, whether leaks are of no interest. */
static inline void rec_print_finding(const BdrvCheckFinding *finding, void *opaque)
{
    const bool *leaks = opaque;
    if (finding->kind != BDRV_FINDING_LEAK || !*leaks) {
        g_test_message("%s", finding->text);
    }
}

/* Checks the image; no corruptions, and @leaks tells whether leaks are allowed. */
static inline void rec_check(const RecFile *f, bool leaks)
{
    GError *err = NULL;
    BdrvCheckOptions opts = {.finding = rec_print_finding, .opaque = &leaks};
    BdrvCheckResult result = {0};
    g_autoptr(BlockBackend) blk = rec_open_image(f, NULL, BDRV_O_CHECK);
    bool ok = bdrv_check(blk_bs(blk), &opts, &result, &err);
    g_assert_no_error(err);
    g_assert_true(ok);
    g_assert_cmpuint(result.corruptions, ==, 0);
    g_assert_cmpuint(result.check_errors, ==, 0);
    g_assert_true(leaks || result.leaks == 0);
}

#endif
