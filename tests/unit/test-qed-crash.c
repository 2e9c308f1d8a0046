/*
 * QED images and power loss: what is on the disk at any moment is sound, and holds what was
 * flushed.
 *
 *   session   random writes, zeroes, discards and flushes.  Power is lost after each event on the
 *             disk, with and without the unflushed sectors: no corruption, and each sector reads as
 *             it did at some time between the last flush and the loss
 *   whole     resizes, emptying, another backing name: the image is as before or as after
 *   fault     each event fails once: the image is sound, and what returned success is true
 *   order     which writes and flushes there are, exactly
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qed.h"
#include "tests/unit/log-driver.h"

#define KIB UINT64_C(1024)
#define BACKING 1 /* number of the disk below */
#define SCRATCH 2 /* where a crashed disk is put together */
#define CLUSTER (4 * KIB)
#define SIZE (2200 * KIB) /* with tables of 4 KiB, two of them */
#define MAX_STATES 64

typedef struct Shape {
    const char *name, *options;
    bool backing;
} Shape;

static const Shape shapes[] = {
    {"plain", "cluster_size=4k,table_size=1", false},
    {"backing", "cluster_size=4k,table_size=1", true},
    {"long-tables", "cluster_size=4k,table_size=4", false},
};

/* --- images --- */

static BlockDriverState *open_below(void)
{
    json_t *options = json_pack("{s:s, s:s, s:s, s:i}", "driver", "raw", "node-name", "below",
                                "file.driver", "test-log", "file.disk", BACKING);
    BlockDriverState *bs = bdrv_open(NULL, options, 0, NULL);
    g_assert_nonnull(bs);
    return bs;
}

static BlockBackend *open_image(const Shape *shape, int disk, int flags)
{
    g_autoptr(GError) err = NULL;
    g_autoptr(BlockDriverState) below = shape->backing ? open_below() : NULL;
    json_t *options = json_pack("{s:s, s:s, s:s, s:i}", "driver", "qed", "discard", "unmap",
                                "file.driver", "test-log", "file.disk", disk);
    json_object_set_new(options, "backing", below ? json_string("below") : json_null());
    BlockBackend *blk = blk_new_open(NULL, options, flags, &err);
    g_assert_no_error(err);
    return blk;
}

static void fill_below(uint8_t *data, uint64_t bytes)
{
    for (uint64_t pos = 0; pos < bytes; pos += 512) {
        memset(data + pos, (int)(0x40 + (pos >> 9) % 61), MIN(bytes - pos, 512));
    }
}

static void create_image(const Shape *shape)
{
    g_autoptr(GError) err = NULL;
    g_autoptr(json_t) options = qb_opts_parse(shape->options, NULL, NULL);
    json_object_set_new(options, "size", json_integer(SIZE));
    log_reset(&log_disks[BACKING]);
    if (shape->backing) {
        json_object_set_new(options, "backing_file", json_string("below.raw"));
        json_object_set_new(options, "backing_fmt", json_string("raw"));
        log_resize(&log_disks[BACKING], SIZE);
        fill_below(log_disks[BACKING].data, SIZE);
    }
    bdrv_img_create("test-log:0", "qed", options, NULL, &err);
    g_assert_no_error(err);
}

static void tell(const BdrvCheckFinding *finding, void *opaque)
{
    g_test_message("check: %s", finding->text);
}

/* Nothing but leaks, seen by a check that changes nothing. */
static void assert_sound(const Shape *shape, int disk)
{
    g_autoptr(BlockBackend) blk = open_image(shape, disk, BDRV_O_CHECK);
    BdrvCheckOptions opts = {.finding = tell};
    BdrvCheckResult result;
    g_assert_true(bdrv_check(blk_bs(blk), &opts, &result, NULL));
    g_assert_cmpuint(result.corruptions, ==, 0);
    g_assert_cmpuint(result.check_errors, ==, 0);
}

static uint8_t *read_all(BlockBackend *blk, uint64_t *ret_size)
{
    *ret_size = (uint64_t)blk_getlength(blk);
    uint8_t *data = g_malloc(*ret_size);
    g_assert_cmpint(blk_pread(blk, 0, (int64_t)*ret_size, data, 0), ==, 0);
    return data;
}

/* --- a session --- */

typedef struct Session {
    const Shape *shape;
    LogDisk image;               /* what was there when it began */
    uint8_t *state[MAX_STATES];  /* the guest's disk after each request */
    guint event[MAX_STATES];     /* length of the log then */
    unsigned n, flushed[MAX_STATES]; /* the state a flush had reached by then */
} Session;

static void session_clear(Session *s)
{
    for (unsigned i = 0; i < s->n; i++) {
        g_free(s->state[i]);
    }
    log_reset(&s->image);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Session, session_clear)

static void session_note(Session *s, uint8_t *state, bool flush)
{
    const GArray *log = log_disks[0].log;
    g_assert_cmpuint(s->n, <, MAX_STATES);
    s->state[s->n] = state;
    s->event[s->n] = log ? log->len : 0;
    s->flushed[s->n] = flush ? s->n : s->n ? s->flushed[s->n - 1] : 0;
    s->n++;
}

typedef struct Request {
    char kind; /* w z u d f */
    uint64_t offset, bytes;
    uint8_t byte;
} Request;

static Request random_request(GRand *rand)
{
    static const char kinds[] = "wwwwzuudddff";
    Request r = {.kind = kinds[g_rand_int_range(rand, 0, sizeof(kinds) - 1)]};
    r.offset = (uint64_t)g_rand_int_range(rand, 0, 40) * 512;
    if (g_rand_boolean(rand)) {
        r.offset = qb_align_down(r.offset, CLUSTER);
    }
    r.offset += g_rand_boolean(rand) ? 2040 * KIB : 0; /* around the border of two tables */
    r.bytes = (uint64_t)g_rand_int_range(rand, 1, 50) * 512;
    r.byte = (uint8_t)g_rand_int_range(rand, 0x80, 0x100);
    return r;
}

static int run_request(BlockBackend *blk, const Request *r)
{
    g_autofree uint8_t *buf = g_malloc(MAX(r->bytes, 1));
    memset(buf, r->byte, r->bytes);
    switch (r->kind) {
    case 'w':
        return blk_pwrite(blk, (int64_t)r->offset, (int64_t)r->bytes, buf, 0);
    case 'z':
        return blk_pwrite_zeroes(blk, (int64_t)r->offset, (int64_t)r->bytes, 0);
    case 'u':
        return blk_pwrite_zeroes(blk, (int64_t)r->offset, (int64_t)r->bytes, BDRV_REQ_MAY_UNMAP);
    case 'd':
        return blk_pdiscard(blk, (int64_t)r->offset, (int64_t)r->bytes);
    default:
        return blk_flush(blk);
    }
}

/* What the guest's disk is after it. Discards change whole clusters. */
static void apply_request(uint8_t *data, const Request *r)
{
    uint64_t start = r->offset, end = r->offset + r->bytes;
    if (r->kind == 'd') {
        start = qb_align_up(start, CLUSTER);
        end = qb_align_down(end, CLUSTER);
    }
    if (r->kind != 'f' && start < end) {
        memset(data + start, r->kind == 'w' ? r->byte : 0, end - start);
    }
}

/* Some content to begin with, and what else a used image has: freed clusters. */
static void session_prepare(Session *s)
{
    uint64_t size;
    create_image(s->shape);
    BlockBackend *blk = open_image(s->shape, 0, BDRV_O_RDWR);
    Request begin[] = {
        {'w', 8 * KIB, 24 * KIB, 0x11}, {'w', 2044 * KIB, 12 * KIB, 0x22},
        {'f', 0, 0, 0}, {'d', 12 * KIB, 8 * KIB, 0}, {'u', 2048 * KIB, 4 * KIB, 0},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(begin); i++) {
        g_assert_cmpint(run_request(blk, &begin[i]), ==, 0);
    }
    blk_unref(blk);
    log_copy(&s->image, &log_disks[0]);
    blk = open_image(s->shape, 0, 0);
    session_note(s, read_all(blk, &size), true);
    blk_unref(blk);
}

static void session_run(Session *s, GRand *rand)
{
    log_start(&log_disks[0]);
    g_autoptr(BlockBackend) blk = open_image(s->shape, 0, BDRV_O_RDWR);
    for (int i = 0; i < 30; i++) {
        Request r = random_request(rand);
        uint8_t *next = g_memdup2(s->state[s->n - 1], SIZE);
        apply_request(next, &r);
        g_assert_cmpint(run_request(blk, &r), ==, 0);
        session_note(s, next, r.kind == 'f');
    }
}

/* Each sector reads as in one of the states from @first to @last. */
static void assert_sectors(const Session *s, const uint8_t *data, unsigned first, unsigned last)
{
    for (uint64_t pos = 0; pos < SIZE; pos += 512) {
        bool found = false;
        for (unsigned i = first; i <= last && !found; i++) {
            found = memcmp(data + pos, s->state[i] + pos, 512) == 0;
        }
        if (!found) {
            g_error("sector at %" G_GUINT64_FORMAT " reads %#x, in states %u to %u it was never"
                    " that (then %#x)", pos, data[pos], first, last, s->state[last][pos]);
        }
    }
}

static void session_crash_at(const Session *s, GArray *log, guint n, GRand *toss)
{
    unsigned last = 0;
    uint64_t size;
    log_copy(&log_disks[SCRATCH], &s->image);
    log_rebuild(&log_disks[SCRATCH], log, n, toss);
    while (last + 1 < s->n && s->event[last] < n) { /* the request that was under way counts */
        last++;
    }
    unsigned done = last > 0 && s->event[last] > n ? last - 1 : last;
    assert_sound(s->shape, SCRATCH);
    g_autoptr(BlockBackend) blk = open_image(s->shape, SCRATCH, BDRV_O_RDWR);
    g_autofree uint8_t *data = read_all(blk, &size);
    assert_sectors(s, data, s->flushed[done], last);
    memset(data, 0x33, 64 * KIB); /* what comes next overwrites nothing else */
    g_assert_cmpint(blk_pwrite(blk, 0, 64 * KIB, data, 0), ==, 0);
    g_autofree uint8_t *after = read_all(blk, &size);
    g_assert_cmpmem(after, SIZE, data, SIZE);
}

static void test_session(gconstpointer shape)
{
    g_autoptr(GRand) rand = g_rand_new_with_seed((guint32)g_test_rand_int());
    for (int turn = 0; turn < 2; turn++) {
        g_auto(Session) s = {.shape = shape};
        qb_mutex_init(&s.image.lock);
        session_prepare(&s);
        session_run(&s, rand);
        g_autoptr(GArray) log = g_steal_pointer(&log_disks[0].log);
        assert_sound(shape, 0);
        for (guint n = 0; n <= log->len; n++) {
            session_crash_at(&s, log, n, NULL);
            session_crash_at(&s, log, n, rand);
        }
        qb_mutex_destroy(&s.image.lock);
    }
}

/* Requests that fail leave their range undefined; nothing else changes, and the image is sound. */
static void fail_one(const Session *s, GRand *rand, unsigned n, bool *ret_fired)
{
    g_autofree uint8_t *want = g_memdup2(s->state[0], SIZE);
    g_autofree bool *unknown = g_new0(bool, SIZE / 512);
    uint64_t size;
    log_copy(&log_disks[0], &s->image);
    log_disks[0].fail_at = n;
    BlockBackend *blk = open_image(s->shape, 0, BDRV_O_RDWR);
    for (int i = 0; i < 12; i++) {
        Request r = random_request(rand);
        bool ok = run_request(blk, &r) == 0;
        for (uint64_t k = 0; !ok && r.kind != 'f' && k < r.bytes / 512; k++) {
            unknown[r.offset / 512 + k] = true;
        }
        apply_request(want, &r);
    }
    blk_unref(blk);
    *ret_fired = log_disks[0].failures > 0;
    log_disks[0].fail_at = 0;
    assert_sound(s->shape, 0);
    blk = open_image(s->shape, 0, BDRV_O_RDWR);
    g_autofree uint8_t *got = read_all(blk, &size);
    for (uint64_t k = 0; k < SIZE / 512; k++) {
        if (!unknown[k]) {
            g_assert_cmpmem(got + k * 512, 512, want + k * 512, 512);
        }
    }
    blk_unref(blk);
}

static void test_fault(gconstpointer shape)
{
    g_auto(Session) s = {.shape = shape};
    guint32 seed = (guint32)g_test_rand_int();
    bool fired = true;
    qb_mutex_init(&s.image.lock);
    session_prepare(&s);
    for (unsigned n = 1; fired; n++) {
        g_autoptr(GRand) rand = g_rand_new_with_seed(seed);
        g_test_message("fault at %u", n);
        fail_one(&s, rand, n, &fired);
    }
    qb_mutex_destroy(&s.image.lock);
}

/* --- whole-image operations --- */

typedef struct Operation {
    const char *name;
    bool (*run)(BlockBackend *blk, GError **errp);
    uint64_t size;   /* afterwards */
    bool by_sectors; /* a crash may leave some sectors as before, some as after */
    bool needs_backing;
} Operation;

static bool run_shrink(BlockBackend *blk, GError **errp)
{
    return blk_truncate(blk, 20 * KIB + 512, true, PREALLOC_MODE_OFF, false, errp);
}
static bool run_grow(BlockBackend *blk, GError **errp)
{
    return blk_truncate(blk, SIZE + 300 * KIB, true, PREALLOC_MODE_OFF, true, errp);
}
static bool run_shrink_grow(BlockBackend *blk, GError **errp)
{
    return run_shrink(blk, errp) &&
           blk_truncate(blk, SIZE, true, PREALLOC_MODE_OFF, true, errp);
}
static bool run_empty(BlockBackend *blk, GError **errp)
{
    return blk_make_empty(blk, false, errp);
}
static bool run_long_name(BlockBackend *blk, GError **errp)
{
    char name[1001] = "";
    memset(name, 'n', sizeof(name) - 1);
    return bdrv_change_backing_file(blk_bs(blk), name, "qed", errp) &&
           bdrv_change_backing_file(blk_bs(blk), "short", "raw", errp);
}

static const Operation operations[] = {
    {"shrink", run_shrink, 20 * KIB + 512, false, false},
    {"grow", run_grow, SIZE + 300 * KIB, false, false},
    {"shrink-grow", run_shrink_grow, SIZE, true, false},
    {"empty", run_empty, SIZE, true, true},
    {"names", run_long_name, SIZE, false, false},
};

typedef struct Trial {
    const Shape *shape;
    const Operation *op;
    LogDisk image;
    uint8_t *before, *after; /* of the longer of both sizes */
} Trial;

static void trial_init(Trial *t)
{
    g_auto(Session) s = {.shape = t->shape};
    qb_mutex_init(&s.image.lock);
    qb_mutex_init(&t->image.lock);
    session_prepare(&s);
    log_copy(&t->image, &s.image);
    t->before = g_malloc0(SIZE + 300 * KIB);
    t->after = g_malloc0(SIZE + 300 * KIB);
    memcpy(t->before, s.state[0], SIZE);
    memcpy(t->after, t->before, SIZE);
    if (t->op->run == run_empty) {
        fill_below(t->after, SIZE);
    } else if (t->op->run == run_shrink_grow || t->op->run == run_shrink) {
        memset(t->after + 20 * KIB + 512, 0, SIZE - 20 * KIB - 512);
    }
    qb_mutex_destroy(&s.image.lock);
}

static void trial_clear(Trial *t)
{
    log_reset(&t->image);
    qb_mutex_destroy(&t->image.lock);
    g_free(t->before);
    g_free(t->after);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Trial, trial_clear)

static uint64_t host_of(BlockBackend *blk, uint64_t guest)
{
    QedMapping m;
    BDRV_GRAPH_GUARD();
    g_assert_cmpint(qed_lookup_as_user(blk_bs(blk), guest, 512, &m), ==, 0);
    return m.type == QED_DATA ? m.host : m.type;
}

static bool is_mixture(const Trial *t, const uint8_t *got, uint64_t size)
{
    for (uint64_t pos = 0; pos < size; pos += 512) {
        if (memcmp(got + pos, t->before + pos, 512) && memcmp(got + pos, t->after + pos, 512)) {
            return false;
        }
    }
    return true;
}

static bool reads_as(BlockBackend *blk, const uint8_t *want, uint64_t want_size)
{
    uint64_t size;
    g_autofree uint8_t *got = read_all(blk, &size);
    return size == want_size && memcmp(got, want, size) == 0;
}

static void assert_survived(const Trial *t, int disk)
{
    uint64_t size;
    assert_sound(t->shape, disk);
    g_autoptr(BlockBackend) blk = open_image(t->shape, disk, BDRV_O_RDWR);
    g_autofree uint8_t *got = read_all(blk, &size);
    bool fine = reads_as(blk, t->before, SIZE) || reads_as(blk, t->after, t->op->size) ||
                (t->op->by_sectors && is_mixture(t, got, size));
    g_assert_true(fine);
    const char *name = bdrv_backing_name(blk_bs(blk));
    g_assert_true(!*name || !strcmp(name, "below.raw") || !strcmp(name, "short") ||
                  (strlen(name) == 1000 && strspn(name, "n") == 1000));
    g_assert_false(qed_needs_check(qed_state(blk_bs(blk))));
    if (t->op->run == run_shrink && size < SIZE) { /* the open has ended the shrink */
        for (uint64_t pos = qb_align_up(size, CLUSTER); pos < SIZE; pos += CLUSTER) {
            g_assert_cmpuint(host_of(blk, pos), ==, 0);
        }
    }
}

static bool run_operation(const Trial *t)
{
    g_autoptr(GError) err = NULL;
    g_autoptr(BlockBackend) blk = open_image(t->shape, 0, BDRV_O_RDWR | BDRV_O_RESIZE);
    bool ok = t->op->run(blk, &err);
    if (!ok) {
        g_test_message("%s: %s", t->op->name, err->message);
    }
    return ok;
}

static void crash_operation(Trial *t, GRand *toss)
{
    log_copy(&log_disks[0], &t->image);
    log_start(&log_disks[0]);
    g_assert_true(run_operation(t));
    g_autoptr(GArray) log = g_steal_pointer(&log_disks[0].log);
    for (guint n = 0; n <= log->len; n++) {
        for (int tossed = 0; tossed < 4; tossed++) {
            g_test_message("%s: crash after event %u of %u", t->op->name, n, log->len);
            log_copy(&log_disks[SCRATCH], &t->image);
            log_rebuild(&log_disks[SCRATCH], log, n, tossed ? toss : NULL);
            assert_survived(t, SCRATCH);
        }
    }
}

static void fail_operation(Trial *t)
{
    bool fired = true;
    for (unsigned n = 1; fired; n++) {
        g_test_message("%s: fault at %u", t->op->name, n);
        log_copy(&log_disks[0], &t->image);
        log_disks[0].fail_at = n;
        bool ok = run_operation(t);
        fired = log_disks[0].failures > 0;
        log_disks[0].fail_at = 0;
        assert_survived(t, 0);
        g_autoptr(BlockBackend) blk = open_image(t->shape, 0, 0);
        g_assert_true(!ok || reads_as(blk, t->after, t->op->size));
        g_assert_true(ok || t->op->by_sectors || reads_as(blk, t->before, SIZE));
    }
}

static void test_operation(gconstpointer op)
{
    g_autoptr(GRand) toss = g_rand_new_with_seed((guint32)g_test_rand_int());
    for (size_t i = 0; i < G_N_ELEMENTS(shapes); i++) {
        g_auto(Trial) t = {.shape = &shapes[i], .op = op};
        if (t.op->needs_backing && !shapes[i].backing) {
            qb_mutex_init(&t.image.lock);
            continue;
        }
        trial_init(&t);
        crash_operation(&t, toss);
        fail_operation(&t);
    }
}

/* --- the exact order --- */

/* One letter per event: F flush, H header, T L1, D data or L2 by place behind the L1 table. */
static char *describe_log(const GArray *log)
{
    GString *text = g_string_new(NULL);
    for (guint i = 0; i < log->len; i++) {
        const LogEvent *e = &g_array_index(log, LogEvent, i);
        char place = e->offset < CLUSTER ? 'H' : e->offset < 2 * CLUSTER ? '1' : '.';
        char kind = e->kind == LOG_WRITE ? 'w' : e->kind == LOG_ZERO ? 'z' : 't';
        if (e->kind == LOG_FLUSH) {
            g_string_append(text, "F ");
        } else {
            g_string_append_printf(text, "%c%c ", kind, place);
        }
    }
    return g_string_free(text, false);
}

static void assert_log(const char *want)
{
    g_autofree char *got = describe_log(log_disks[0].log);
    g_assert_cmpstr(got, ==, want);
    log_start(&log_disks[0]);
}

static void must(BlockBackend *blk, Request r)
{
    g_assert_cmpint(run_request(blk, &r), ==, 0);
}

static void test_order(void)
{
    create_image(&shapes[0]);
    log_start(&log_disks[0]);
    g_autoptr(BlockBackend) blk = open_image(&shapes[0], 0, BDRV_O_RDWR);
    assert_log(""); /* opening writes nothing */
    must(blk, (Request){'w', 0, 4096, 1});
    assert_log("z. w. "); /* an empty table, data */
    must(blk, (Request){'f', 0, 0, 0});
    assert_log("F w1 w. F "); /* what they point to is stable; L1 and L2 follow */
    must(blk, (Request){'w', 0, 4096, 2});
    must(blk, (Request){'f', 0, 0, 0});
    assert_log("w. F "); /* in place */
    must(blk, (Request){'w', 4096, 8192, 2});
    must(blk, (Request){'f', 0, 0, 0});
    assert_log("w. F w. F "); /* the table is there */
    must(blk, (Request){'d', 0, 4096, 0});
    assert_log(""); /* nothing is punched as long as the disk names it */
    must(blk, (Request){'f', 0, 0, 0});
    assert_log("F w. F z. ");
}

/* Whatever is changed first, bits that this version does not know are stably gone before. */
static void test_autoclear(void)
{
    enum { AUTOCLEAR = 32 };
    static const char kinds[] = {'w', 'z', 'd', 'r', 'n'}; /* the last two: resize, name */
    for (size_t i = 0; i < G_N_ELEMENTS(kinds); i++) {
        create_image(&shapes[0]);
        log_disks[0].data[AUTOCLEAR] = 1;
        log_start(&log_disks[0]);
        g_autoptr(BlockBackend) blk = open_image(&shapes[0], 0, BDRV_O_RDWR | BDRV_O_RESIZE);
        assert_log("");
        if (kinds[i] == 'r') {
            g_assert_true(blk_truncate(blk, 2 * SIZE, true, PREALLOC_MODE_OFF, false, NULL));
        } else if (kinds[i] == 'n') {
            g_assert_true(bdrv_change_backing_file(blk_bs(blk), "other", "raw", NULL));
        } else {
            must(blk, (Request){kinds[i], 0, 4096, 1});
        }
        g_autofree char *log = describe_log(log_disks[0].log);
        g_test_message("%c: %s", kinds[i], log);
        g_assert_true(g_str_has_prefix(log, "wH F "));
        g_assert_cmpint(log_disks[0].data[AUTOCLEAR], ==, 0);
    }
}

static void release_as_of_earlier_flush(BlockBackend *blk)
{
    BDRV_GRAPH_GUARD();
    qed_release(blk_bs(blk), qed_state(blk_bs(blk))->flush.generation - 1);
}

static void test_reuse_waits_for_flush(void)
{
    create_image(&shapes[0]);
    g_autoptr(BlockBackend) blk = open_image(&shapes[0], 0, BDRV_O_RDWR);
    must(blk, (Request){'w', 0, 4 * CLUSTER, 1});
    uint64_t freed = host_of(blk, CLUSTER), end = log_disks[0].length;
    must(blk, (Request){'d', CLUSTER, CLUSTER, 0});
    must(blk, (Request){'w', 8 * CLUSTER, CLUSTER, 2});
    g_assert_cmpuint(host_of(blk, 8 * CLUSTER), ==, end);
    release_as_of_earlier_flush(blk);
    must(blk, (Request){'w', 10 * CLUSTER, CLUSTER, 2});
    g_assert_cmpuint(host_of(blk, 10 * CLUSTER), !=, freed);
    must(blk, (Request){'f', 0, 0, 0});
    must(blk, (Request){'w', 9 * CLUSTER, CLUSTER, 3});
    g_assert_cmpuint(host_of(blk, 9 * CLUSTER), ==, freed);
}

static void test_reuse_waits_for_users(void)
{
    create_image(&shapes[0]);
    g_autoptr(BlockBackend) blk = open_image(&shapes[0], 0, BDRV_O_RDWR);
    BDRVQedState *s = qed_state(blk_bs(blk));
    QedUser reader;
    must(blk, (Request){'w', 0, 4 * CLUSTER, 1});
    uint64_t freed = host_of(blk, CLUSTER);
    qed_user_begin(s, &reader);
    must(blk, (Request){'d', CLUSTER, CLUSTER, 0});
    must(blk, (Request){'f', 0, 0, 0});
    must(blk, (Request){'w', 8 * CLUSTER, CLUSTER, 2});
    g_assert_cmpuint(host_of(blk, 8 * CLUSTER), !=, freed);
    qed_user_end(s, &reader);
    must(blk, (Request){'f', 0, 0, 0});
    must(blk, (Request){'w', 9 * CLUSTER, CLUSTER, 3});
    g_assert_cmpuint(host_of(blk, 9 * CLUSTER), ==, freed);
}

/* What a discard frees at the end of the file is cut off when the image is closed. */
static void test_close_cuts_file(void)
{
    create_image(&shapes[0]);
    uint64_t empty = log_disks[0].length;
    BlockBackend *blk = open_image(&shapes[0], 0, BDRV_O_RDWR);
    must(blk, (Request){'w', 0, 64 * KIB, 1});
    must(blk, (Request){'d', 0, SIZE, 0});
    blk_unref(blk);
    assert_sound(&shapes[0], 0);
    g_assert_cmpuint(log_disks[0].length, ==, empty);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    log_init();
    for (size_t i = 0; i < G_N_ELEMENTS(shapes); i++) {
        g_autofree char *session = g_strdup_printf("/qed/crash/session/%s", shapes[i].name);
        g_autofree char *fault = g_strdup_printf("/qed/crash/fault/%s", shapes[i].name);
        g_test_add_data_func(session, &shapes[i], test_session);
        g_test_add_data_func(fault, &shapes[i], test_fault);
    }
    for (size_t i = 0; i < G_N_ELEMENTS(operations); i++) {
        g_autofree char *path = g_strdup_printf("/qed/crash/whole/%s", operations[i].name);
        g_test_add_data_func(path, &operations[i], test_operation);
    }
    g_test_add_func("/qed/order", test_order);
    g_test_add_func("/qed/autoclear", test_autoclear);
    g_test_add_func("/qed/reuse/flush", test_reuse_waits_for_flush);
    g_test_add_func("/qed/reuse/users", test_reuse_waits_for_users);
    g_test_add_func("/qed/close-cuts-file", test_close_cuts_file);
    return log_done(g_test_run());
}
