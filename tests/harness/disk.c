/*
 * Files in memory below the drivers: they remember all that was done to them, and fail on demand.
 *
 *      request --begin--> log: {kind, bytes, t1, -}     one lock, one clock
 *                 |
 *               fault?  jitter?
 *                 |
 *               effect on the bytes
 *                 '-----end--> log: {..., t1, t2}
 *
 * A flush covers what was complete when it began: an event E is stable at time T if a flush F of
 * its disk has E.end < F.begin and F.end <= T.  That is decided by the replayer (tests/crash), here
 * it is only written down.
 *
 * Invariants
 * 1. Begin and end of one event are two moments of the clock, and no two moments are the same.
 * 2. An operation that fails leaves no event, but for the part of a torn write that was done.
 * 3. After a flush has failed all flushes of that disk fail until it is opened again, as those of a
 *    cached file do.
 *
 * Deliberately simple: all transfers of all disks take one lock.
 *
 * SPDX-License-Identifier: MIT
 */
#include "tests/harness/disk.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "util/checked.h"
#include "util/error.h"
#include "util/iov.h"
#include "util/thread.h"

const char *const disk_kind_names[DISK_KINDS] = {
    "read", "write", "zero", "discard", "flush", "truncate",
};

typedef struct Disk {
    char *name;
    uint8_t *data; /* DISK_CAPACITY bytes of address space; zero beyond the length */
    uint64_t length, limit;
    bool flush_broken;
    bool unflushed; /* written to since the last flush began */
} Disk;

static Disk disks[DISKS_MAX];
static unsigned nb_disks;
static struct {
    QbMutex lock; /* everything here and the disks' bytes */
    GArray *log;  /* NULL: not kept */
    uint64_t clock;
    DiskFault fault; /* countdown 0: none to come */
    unsigned fired;
    bool suspended;
    void (*_Atomic hook)(void *opaque);
    void *_Atomic hook_opaque;
    _Atomic(bool) jitter;
    _Atomic(unsigned) toss; /* state of the jitter's dice */
} control = {.lock = QB_MUTEX_INIT};

/* ---------------------------------------------------------------- bytes */

static void set_length(Disk *d, uint64_t length)
{
    g_assert_cmpuint(length, <=, DISK_CAPACITY);
    if (length < d->length) {
        memset(d->data + length, 0, d->length - length);
    }
    d->length = length;
}

void disk_extend(unsigned disk, uint64_t end)
{
    if (disks[disk].length < end) {
        set_length(&disks[disk], end);
    }
}

void disk_apply(const DiskEvent *e, uint64_t from, uint64_t bytes)
{
    Disk *d = &disks[e->disk];
    uint64_t start = e->offset + from;
    switch (e->kind) {
    case DISK_WRITE:
        disk_extend(e->disk, start + bytes);
        memcpy(d->data + start, e->data + from, bytes);
        break;
    case DISK_ZERO:
        disk_extend(e->disk, start + bytes);
        memset(d->data + start, 0, bytes);
        break;
    case DISK_DISCARD:
        if (start < d->length) {
            memset(d->data + start, 0, MIN(bytes, d->length - start));
        }
        break;
    case DISK_TRUNCATE:
        set_length(d, e->offset);
        break;
    default:
        break;
    }
}

/* ---------------------------------------------------------------- disks */

/* The disk's own name in @name, which may be longer. Newly allocated. */
static char *own_name(const char *name)
{
    return g_strndup(name, strcspn(name, "+"));
}

unsigned disk_number(const char *name_given)
{
    g_autofree char *name = own_name(name_given);
    QB_GUARD(&control.lock);
    for (unsigned i = 0; i < nb_disks; i++) {
        if (!strcmp(disks[i].name, name)) {
            return i;
        }
    }
    g_assert_cmpuint(nb_disks, <, DISKS_MAX);
    Disk *d = &disks[nb_disks];
    *d = (Disk){.name = g_strdup(name), .limit = DISK_CAPACITY};
    d->data = mmap(NULL, DISK_CAPACITY, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    g_assert_true(d->data != MAP_FAILED);
    return nb_disks++;
}

const char *disk_name(unsigned disk)
{
    return disks[disk].name;
}

unsigned disk_count(void)
{
    return nb_disks;
}

DiskImage disk_save(unsigned disk)
{
    const Disk *d = &disks[disk];
    return (DiskImage){.data = g_memdup2(d->data, d->length), .length = d->length};
}

void disk_image_clear(DiskImage *image)
{
    g_clear_pointer(&image->data, g_free);
}

void disk_load(unsigned disk, const DiskImage *image)
{
    set_length(&disks[disk], image->length);
    if (image->length) {
        memcpy(disks[disk].data, image->data, image->length);
    }
    disks[disk].flush_broken = disks[disk].unflushed = false;
}

uint64_t disk_length(unsigned disk)
{
    QB_GUARD(&control.lock);
    return disks[disk].length;
}

bool disk_export(unsigned disk, const char *path)
{
    return g_file_set_contents(path, (const char *)disks[disk].data, (gssize)disks[disk].length,
                               NULL);
}

bool disk_import(unsigned disk, const char *path)
{
    g_autofree char *data = NULL;
    gsize length;
    if (!g_file_get_contents(path, &data, &length, NULL)) {
        return false;
    }
    disk_load(disk, &(DiskImage){.data = (uint8_t *)data, .length = length});
    return true;
}

void disk_set_limit(unsigned disk, uint64_t bytes)
{
    disks[disk].limit = bytes ? bytes : DISK_CAPACITY;
}

void disk_set_hook(void (*fn)(void *opaque), void *opaque)
{
    atomic_store(&control.hook_opaque, opaque);
    atomic_store(&control.hook, fn);
}

void disk_set_jitter(bool on)
{
    atomic_store(&control.jitter, on);
}

/* ---------------------------------------------------------------- log */

static void clear_event(void *event)
{
    g_free(((DiskEvent *)event)->data);
}

void disk_log_start(void)
{
    QB_GUARD(&control.lock);
    g_assert_null(control.log);
    control.log = g_array_new(false, false, sizeof(DiskEvent));
    g_array_set_clear_func(control.log, clear_event);
    control.clock = 0;
}

GArray *disk_log_stop(void)
{
    QB_GUARD(&control.lock);
    return g_steal_pointer(&control.log);
}

void disk_log_free(GArray *log)
{
    g_array_free(log, true);
}

uint64_t disk_tick(void)
{
    QB_GUARD(&control.lock);
    return ++control.clock;
}

/* Index of the new event. @e->data is copied. */
static guint begin_locked(const DiskEvent *e)
{
    if (!control.log) {
        return 0;
    }
    DiskEvent copy = *e;
    copy.data = e->data ? g_memdup2(e->data, e->bytes) : NULL;
    copy.begin = ++control.clock;
    copy.end = UINT64_MAX;
    g_array_append_val(control.log, copy);
    return control.log->len - 1;
}

static void end_locked(guint index)
{
    if (control.log) {
        g_array_index(control.log, DiskEvent, index).end = ++control.clock;
    }
}

/* ---------------------------------------------------------------- faults */

void disk_fault_set(const DiskFault *fault)
{
    QB_GUARD(&control.lock);
    control.fault = *fault;
    control.fired = 0;
}

void disk_fault_suspend(bool on)
{
    QB_GUARD(&control.lock);
    control.suspended = on;
}

unsigned disk_fault_left(void)
{
    QB_GUARD(&control.lock);
    return control.fault.countdown;
}

bool disk_flush_is_broken(unsigned disk)
{
    QB_GUARD(&control.lock);
    return disks[disk].flush_broken;
}

bool disk_is_unflushed(unsigned disk)
{
    QB_GUARD(&control.lock);
    return disks[disk].unflushed;
}

unsigned disk_fault_clear(void)
{
    QB_GUARD(&control.lock);
    control.fault.countdown = 0;
    control.fault.lasting = false;
    return control.fired;
}

/* 0, or the error an operation of @kind has to give. */
static int fault_locked(DiskKind kind)
{
    DiskFault *f = &control.fault;
    if (f->kind != kind || control.suspended) {
        return 0;
    }
    bool now = f->countdown > 0 && --f->countdown == 0;
    if (!now && !(f->lasting && control.fired)) {
        return 0;
    }
    control.fired++;
    return f->error;
}

/* A request may come late, or let others in. */
static void jitter(void)
{
    if (!atomic_load(&control.jitter)) {
        return;
    }
    unsigned toss = atomic_fetch_add(&control.toss, 1) * 2654435761u;
    if (toss >> 28 < 6) {
        g_usleep(toss >> 8 & 63);
    } else if (toss >> 28 < 12) {
        sched_yield();
    }
}

/* ---------------------------------------------------------------- one operation */

static uint64_t end_of(const DiskEvent *e)
{
    return e->kind == DISK_WRITE || e->kind == DISK_ZERO ? e->offset + e->bytes
           : e->kind == DISK_TRUNCATE                    ? e->offset
                                                         : 0;
}

static int start_flush_locked(Disk *d, int fault)
{
    d->flush_broken |= fault < 0;
    d->unflushed &= d->flush_broken;
    return d->flush_broken ? (fault < 0 ? fault : -EIO) : 0;
}

/* What of the operation is going to happen: cuts *e for a torn one. */
static int judge_locked(DiskEvent *e)
{
    Disk *d = &disks[e->disk];
    int ret = fault_locked(e->kind);
    if (e->kind == DISK_FLUSH) {
        return start_flush_locked(d, ret);
    }
    if (ret == 0 && end_of(e) > MAX(d->limit, d->length)) {
        ret = -ENOSPC;
    } else if (ret < 0 && control.fault.partly) {
        e->bytes = qb_align_down(e->bytes / 2, DISK_SECTOR);
        return ret;
    }
    e->bytes = ret < 0 ? 0 : e->bytes;
    return ret;
}

typedef struct Started {
    DiskEvent e;
    guint index;
    int ret;
    bool logged;
} Started;

static void start(Started *st)
{
    QB_GUARD(&control.lock);
    bool moves = st->e.kind != DISK_FLUSH && st->e.kind != DISK_TRUNCATE;
    st->ret = judge_locked(&st->e);
    st->logged = st->ret == 0 || (moves && st->e.bytes > 0);
    if (st->logged) {
        st->index = begin_locked(&st->e);
    }
}

static void finish(Started *st)
{
    QB_GUARD(&control.lock);
    if (st->logged) {
        disk_apply(&st->e, 0, st->e.bytes);
        disks[st->e.disk].unflushed |= st->e.kind == DISK_WRITE || st->e.kind == DISK_ZERO;
        end_locked(st->index);
    }
}

static int do_event(DiskEvent e)
{
    Started st = {.e = e};
    void (*hook)(void *opaque) = atomic_load(&control.hook);
    if (hook && (e.kind == DISK_WRITE || e.kind == DISK_ZERO)) {
        hook(atomic_load(&control.hook_opaque));
    }
    start(&st);
    jitter();
    finish(&st);
    return st.ret;
}

static int do_read(unsigned disk, uint64_t offset, uint64_t bytes, uint8_t *buf)
{
    jitter();
    QB_GUARD(&control.lock);
    const Disk *d = &disks[disk];
    uint64_t n = offset < d->length ? MIN(bytes, d->length - offset) : 0;
    int ret = fault_locked(DISK_READ);
    if (ret == 0) {
        memcpy(buf, d->data + offset, n);
        memset(buf + n, 0, bytes - n);
    }
    return ret;
}

/* ---------------------------------------------------------------- driver */

typedef struct DiskState {
    unsigned disk;
    uint32_t align;
} DiskState;

static unsigned disk_of(BlockDriverState *bs)
{
    return ((DiskState *)bs->opaque)->disk;
}

static bool drv_parse_filename(const char *filename, json_t *options, GError **errp)
{
    json_object_set_new(options, "disk", json_string(strchr(filename, ':') + 1));
    return true;
}

static bool drv_open(BlockDriverState *bs, json_t *options, int flags, GError **errp)
{
    DiskState *s = bs->opaque;
    g_autofree char *name = qb_opt_take_string(options, "disk");
    uint64_t align;
    if (!name) {
        qb_error_set(errp, EINVAL, "No disk named");
        return false;
    }
    if (!qb_opt_take_size(options, "align", 1, &align, errp)) {
        return false;
    }
    s->align = (uint32_t)align;
    s->disk = disk_number(name);
    disks[s->disk].flush_broken = false;
    return true;
}

static void drv_refresh_limits(BlockDriverState *bs)
{
    bs->bl.request_alignment = ((DiskState *)bs->opaque)->align;
}

static void drv_close(BlockDriverState *bs)
{
}

static bool drv_reopen_prepare(BDRVReopenState *state, GError **errp)
{
    json_object_del(state->options, "disk");
    json_object_del(state->options, "align");
    return true;
}

static char *drv_gather_filename(BlockDriverState *bs)
{
    return g_strdup_printf("test-disk:%s", disks[disk_of(bs)].name);
}

/* As a file that exists it is emptied. */
static bool drv_create(const char *filename, json_t *options, QbProgress *progress,
                       GError **errp)
{
    unsigned disk = disk_number(strchr(filename, ':') + 1);
    uint64_t size;
    if (!qb_opt_take_size(options, "size", 0, &size, errp)) {
        return false;
    }
    int ret = do_event((DiskEvent){.kind = DISK_TRUNCATE, .disk = disk});
    ret = ret < 0 || !size ? ret
                           : do_event((DiskEvent){.kind = DISK_TRUNCATE, .disk = disk,
                                                  .offset = size});
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Could not create '%s'", filename);
    }
    return ret == 0;
}

static int drv_preadv(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                      IoVector *qiov, size_t qiov_offset, int flags)
{
    g_autofree uint8_t *buf = g_malloc((size_t)bytes);
    int ret = do_read(disk_of(bs), (uint64_t)offset, (uint64_t)bytes, buf);
    if (ret == 0) {
        iov_vector_from_buf(qiov, qiov_offset, buf, (size_t)bytes);
    }
    return ret;
}

static int drv_pwritev(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                       IoVector *qiov, size_t qiov_offset, int flags)
{
    g_autofree uint8_t *buf = g_malloc((size_t)bytes);
    iov_vector_to_buf(qiov, qiov_offset, buf, (size_t)bytes);
    return do_event((DiskEvent){.kind = DISK_WRITE, .disk = disk_of(bs), .data = buf,
                                .offset = (uint64_t)offset, .bytes = (uint64_t)bytes});
}

static int drv_pwrite_zeroes(BlockDriverState *bs, BdrvRequest *req, int64_t offset,
                             int64_t bytes, int flags)
{
    return do_event((DiskEvent){.kind = DISK_ZERO, .disk = disk_of(bs),
                                .offset = (uint64_t)offset, .bytes = (uint64_t)bytes});
}

static int drv_pdiscard(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes)
{
    return do_event((DiskEvent){.kind = DISK_DISCARD, .disk = disk_of(bs),
                                .offset = (uint64_t)offset, .bytes = (uint64_t)bytes});
}

static int drv_flush(BlockDriverState *bs)
{
    return do_event((DiskEvent){.kind = DISK_FLUSH, .disk = disk_of(bs)});
}

static bool drv_truncate(BlockDriverState *bs, int64_t offset, bool exact, PreallocMode prealloc,
                         bool zero_new, GError **errp)
{
    int ret = do_event((DiskEvent){.kind = DISK_TRUNCATE, .disk = disk_of(bs),
                                   .offset = (uint64_t)offset});
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Failed to resize file");
    }
    return ret == 0;
}

static int64_t drv_getlength(BlockDriverState *bs)
{
    return (int64_t)disk_length(disk_of(bs));
}

static const DiskKind batch_kinds[] = {
    [BDRV_BATCH_READ] = DISK_READ,
    [BDRV_BATCH_WRITE] = DISK_WRITE,
    [BDRV_BATCH_ZERO] = DISK_ZERO,
    [BDRV_BATCH_DISCARD] = DISK_DISCARD,
};

/* All begin before the first one ends. */
static int drv_run_batch(BlockDriverState *bs, BdrvBatchOp *ops, size_t n)
{
    g_autofree Started *started = g_new0(Started, n);
    int first = 0;
    for (size_t i = 0; i < n; i++) {
        started[i].e = (DiskEvent){.kind = batch_kinds[ops[i].kind], .disk = disk_of(bs),
                                   .offset = (uint64_t)ops[i].offset,
                                   .bytes = (uint64_t)ops[i].bytes,
                                   .data = ops[i].kind == BDRV_BATCH_WRITE ? ops[i].buf : NULL};
        if (ops[i].kind != BDRV_BATCH_READ) {
            start(&started[i]);
        }
    }
    for (size_t i = 0; i < n; i++) {
        const DiskEvent *e = &started[i].e;
        if (ops[i].kind == BDRV_BATCH_READ) {
            ops[i].ret = do_read(e->disk, e->offset, e->bytes, ops[i].buf);
        } else {
            finish(&started[i]);
            ops[i].ret = started[i].ret;
        }
        first = first ? first : ops[i].ret;
    }
    return first;
}

static const BlockDriver disk_driver = {
    .format_name = "test-disk",
    .protocol_name = "test-disk",
    .instance_size = sizeof(DiskState),
    .parse_filename = drv_parse_filename,
    .open = drv_open,
    .close = drv_close,
    .reopen_prepare = drv_reopen_prepare,
    .gather_filename = drv_gather_filename,
    .refresh_limits = drv_refresh_limits,
    .create = drv_create,
    .preadv = drv_preadv,
    .pwritev = drv_pwritev,
    .pwrite_zeroes = drv_pwrite_zeroes,
    .pdiscard = drv_pdiscard,
    .flush = drv_flush,
    .run_batch = drv_run_batch,
    .truncate = drv_truncate,
    .getlength = drv_getlength,
    .supported_zero_flags = BDRV_REQ_MAY_UNMAP | BDRV_REQ_NO_FALLBACK,
};

void disk_init(void)
{
    bdrv_init();
    bdrv_register(&disk_driver);
}

void disk_done(void)
{
    if (control.log) {
        disk_log_free(g_steal_pointer(&control.log));
    }
    while (nb_disks > 0) {
        Disk *d = &disks[--nb_disks];
        munmap(d->data, DISK_CAPACITY);
        g_free(d->name);
    }
}
