/*
 * Many threads at one small image: they write, overwrite, zero, discard, read, flush, ask for the
 * map, write compressed clusters, take and delete snapshots, and resize, all at once.
 *
 *      six workers  -->  blk_*()  -->  [qcow2]  -->  disks in memory, which let requests wait at
 *      snapshots    -->                              random, so that threads overtake each other
 *      resizing     -->
 *
 * Each read is compared with what the sectors may have shown meanwhile (history.h); a snapshot is a
 * read whose result is looked at in the end.  Afterwards the image is closed, checked (no leak
 * either) and compared once more.  Threads make every run another one; the seed fixes the requests
 * of each thread, not their order.
 *
 * SPDX-License-Identifier: MIT
 */
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/harness/operations.h"
#include "tests/harness/running.h"
#include "tests/races/history.h"
#include "util/pool.h"
#include "util/thread.h"

#define WORKERS 6
#define VALUES_EACH 10 /* a worker's own: 1 + 10 * number ... */
#define SNAPSHOTS 4
#define SECONDS_MAX 120

static struct {
    int requests, rounds;
} opts = {.requests = 120, .rounds = 1};

typedef struct Arena {
    World *world;
    BlockBackend *blk;
    History *history;
    unsigned sectors;
    uint64_t *snapshot; /* what "s0" may show, per sector; NULL: there is none to be looked at */
    _Atomic(unsigned) running; /* workers */
} Arena;

typedef struct Worker {
    Arena *arena;
    pthread_t thread;
    GRand *rand;
    unsigned number, turn;
} Worker;

/* ---------------------------------------------------------------- requests */

static unsigned own_value(Worker *w)
{
    return 1 + w->number * VALUES_EACH + w->turn++ % VALUES_EACH;
}

static unsigned pick(Worker *w, unsigned limit)
{
    return (unsigned)g_rand_int_range(w->rand, 0, (gint32)limit);
}

static void must(int ret, const char *what)
{
    if (ret < 0) {
        g_error("%s: %s", what, g_strerror(-ret));
    }
}

static int64_t bytes_of(unsigned sectors)
{
    return (int64_t)sectors * ORACLE_SECTOR;
}

static int write_sectors(Worker *w, unsigned first, unsigned n, int flags)
{
    Arena *a = w->arena;
    unsigned value = own_value(w);
    g_autofree uint8_t *buf = g_malloc((size_t)bytes_of(n));
    oracle_fill(buf, first, n, value);
    uint64_t begin = history_write_begin(a->history, first, n, value);
    int ret = blk_pwrite(a->blk, bytes_of(first), bytes_of(n), buf, flags);
    history_write_end(a->history, first, n, value, begin, ret == 0);
    return ret;
}

static void do_write(Worker *w, unsigned first, unsigned n)
{
    must(write_sectors(w, first, n, 0), "write");
}

static void do_zero(Worker *w, unsigned first, unsigned n)
{
    Arena *a = w->arena;
    uint64_t begin = history_write_begin(a->history, first, n, 0);
    must(blk_pwrite_zeroes(a->blk, bytes_of(first), bytes_of(n),
                           pick(w, 2) ? BDRV_REQ_MAY_UNMAP : 0), "zero");
    history_write_end(a->history, first, n, 0, begin, true);
}

static void do_discard(Worker *w, unsigned first, unsigned n)
{
    Arena *a = w->arena;
    unsigned c = a->world->kind->cluster;
    first = first / c * c;
    n = MAX(n / c, 1) * c;
    if (a->world->kind->flags & KIND_NO_DISCARD) {
        return;
    }
    uint64_t begin = history_write_begin(a->history, first, n, 0);
    must(blk_pdiscard(a->blk, bytes_of(first), bytes_of(n)), "discard");
    history_write_end(a->history, first, n, 0, begin, true);
}

/* Where something is mapped already, a compressed write is refused. */
static void do_compressed(Worker *w, unsigned first, unsigned n)
{
    unsigned c = w->arena->world->kind->cluster;
    if (w->arena->world->kind->flags & (KIND_DATA_FILE | KIND_QED)) {
        return;
    }
    do_discard(w, first, c);
    int ret = write_sectors(w, first / c * c, c, BDRV_REQ_COMPRESSED);
    must(ret == -EIO ? 0 : ret, "compressed write");
}

static void do_read(Worker *w, unsigned first, unsigned n)
{
    Arena *a = w->arena;
    g_autofree uint8_t *buf = g_malloc((size_t)bytes_of(n));
    uint64_t begin = history_read_begin(a->history);
    must(blk_pread(a->blk, bytes_of(first), bytes_of(n), buf, 0), "read");
    for (unsigned i = 0; i < n; i++) {
        int value = oracle_value(buf + bytes_of(i), first + i);
        uint64_t legal = history_legal(a->history, first + i, begin);
        if (value < 0 || !(legal >> value & 1)) {
            g_error("sector %u shows value %d, legal are %#" PRIx64, first + i, value, legal);
        }
    }
}

static void do_flush(Worker *w, unsigned first, unsigned n)
{
    must(blk_flush(w->arena->blk), "flush");
}

static void do_map(Worker *w, unsigned first, unsigned n)
{
    BdrvStatus st;
    BDRV_GRAPH_GUARD();
    must(bdrv_block_status_above(blk_bs(w->arena->blk), NULL, bytes_of(first), bytes_of(n), &st),
         "block status");
}

typedef void (*RequestFn)(Worker *w, unsigned first, unsigned n);

static void *run_worker(void *opaque)
{
    static const RequestFn requests[] = {
        do_write, do_write, do_write, do_write, do_zero, do_discard, do_discard, do_compressed,
        do_read, do_read, do_read, do_flush, do_map,
    };
    Worker *w = opaque;
    unsigned c = w->arena->world->kind->cluster;
    for (int i = 0; i < opts.requests; i++) {
        unsigned n = 1 + pick(w, 3 * c);
        unsigned first = pick(w, w->arena->sectors - 4 * c);
        requests[pick(w, G_N_ELEMENTS(requests))](w, first, n);
    }
    atomic_fetch_sub(&w->arena->running, 1);
    return NULL;
}

/* ---------------------------------------------------------------- the whole image */

/* What a snapshot shows is what was legal at some time while it was taken. */
static void take_snapshot(Arena *a, const char *name)
{
    GError *err = NULL;
    uint64_t begin = history_read_begin(a->history);
    if (!bdrv_snapshot_create(blk_bs(a->blk), name, &err)) {
        g_error("snapshot: %s", err->message);
    }
    a->snapshot = a->snapshot ? a->snapshot : g_new0(uint64_t, a->sectors);
    for (unsigned i = 0; i < a->sectors; i++) {
        a->snapshot[i] = history_legal(a->history, i, begin);
    }
}

static void *run_snapshots(void *opaque)
{
    Arena *a = opaque;
    for (int i = 0; i < SNAPSHOTS && a->running; i++) {
        GError *err = NULL;
        if (i > 0 && !bdrv_snapshot_delete(blk_bs(a->blk), NULL, "race", &err)) {
            g_error("delete: %s", err->message);
        }
        take_snapshot(a, "race");
        g_usleep(3000);
    }
    return NULL;
}

/* Every third cluster of what came, so that a shrink frees some of all kinds, between those that stay. */
static void fill_growth(Arena *a, int64_t start, int64_t end)
{
    int64_t cluster = bytes_of(a->world->kind->cluster);
    g_autofree uint8_t *buf = g_malloc0((size_t)cluster);
    for (int64_t pos = start; pos + cluster <= end && a->running; pos += 3 * cluster) {
        must(blk_pwrite(a->blk, pos, cluster, buf, 0), "write to what came");
    }
}

/* Nobody else uses what comes and goes. */
static void *run_resizes(void *opaque)
{
    Arena *a = opaque;
    int64_t size = bytes_of(a->world->kind->sectors);
    bool maps = !(a->world->kind->flags & KIND_QED);
    for (int i = 0; a->running; i++) {
        GError *err = NULL;
        PreallocMode mode = maps && i % 8 == 4 ? PREALLOC_MODE_METADATA : PREALLOC_MODE_OFF;
        if (!blk_truncate(a->blk, i % 2 ? size : 2 * size, true, mode, true, &err)) {
            g_error("resize: %s", err->message);
        }
        if (i % 4 == 2) {
            fill_growth(a, size, 2 * size);
        }
        g_usleep(2000);
    }
    blk_truncate(a->blk, size, true, PREALLOC_MODE_OFF, true, NULL);
    return NULL;
}

/* ---------------------------------------------------------------- one round */

/* The history begins with what the world has. */
static History *history_of(const World *w)
{
    const Oracle *o = &w->view[VIEW_TOP].oracle;
    History *h = history_new(o->sectors);
    for (unsigned i = 0; i < o->sectors; i++) {
        uint64_t begin = history_write_begin(h, i, 1, o->now[i]);
        history_write_end(h, i, 1, o->now[i], begin, true);
    }
    return h;
}

static void start(pthread_t *thread, const char *name, void *(*fn)(void *), void *arg)
{
    bool ok = qb_thread_start(thread, name, fn, arg);
    g_assert_true(ok);
}

static void brawl(Arena *a, guint32 seed)
{
    Worker workers[WORKERS];
    pthread_t snapshots, resizes;
    unsigned flags = a->world->kind->flags;
    bool snapshot = !(flags & (KIND_NO_SHARING | KIND_DATA_FILE | KIND_V2 | KIND_QED));
    bool resize = !(flags & KIND_FIXED);
    a->running = WORKERS;
    for (unsigned i = 0; i < WORKERS; i++) {
        workers[i] = (Worker){.arena = a, .number = i, .rand = g_rand_new_with_seed(seed + i)};
        start(&workers[i].thread, "worker", run_worker, &workers[i]);
    }
    if (snapshot) {
        start(&snapshots, "snapshots", run_snapshots, a);
    }
    if (resize) {
        start(&resizes, "resizes", run_resizes, a);
    }
    for (unsigned i = 0; i < WORKERS; i++) {
        pthread_join(workers[i].thread, NULL);
        g_rand_free(workers[i].rand);
    }
    if (snapshot) {
        pthread_join(snapshots, NULL);
    }
    if (resize) {
        pthread_join(resizes, NULL);
    }
}

static void expect_legal(Arena *a, BlockBackend *blk, const uint64_t *legal)
{
    g_autofree uint8_t *buf = g_malloc((size_t)bytes_of(a->sectors));
    must(blk_pread(blk, 0, bytes_of(a->sectors), buf, 0), "read at the end");
    for (unsigned i = 0; i < a->sectors; i++) {
        int value = oracle_value(buf + bytes_of(i), i);
        uint64_t mask = legal ? legal[i] : history_legal(a->history, i, UINT64_MAX);
        if (value < 0 || !(mask >> value & 1)) {
            g_error("%s: sector %u shows value %d, legal are %#" PRIx64,
                    legal ? "snapshot" : "at the end", i, value, mask);
        }
    }
}

static void expect_sound(Arena *a)
{
    g_autofree char *why = NULL;
    g_autoptr(BlockBackend) blk = world_open_view(a->world, VIEW_TOP, BDRV_O_RDWR, &why);
    g_assert_cmpstr(why, ==, NULL);
    BdrvCheckResult result = {0};
    BdrvCheckOptions check = {0};
    g_assert_true(bdrv_check(blk_bs(blk), &check, &result, NULL));
    g_assert_cmpuint(result.corruptions, ==, 0);
    if (!(a->world->kind->flags & KIND_QED)) { /* which has no counts: what is free looks leaked */
        g_assert_cmpuint(result.leaks, ==, 0);
    }
    expect_legal(a, blk, NULL);
}

static void expect_snapshot(Arena *a)
{
    GError *err = NULL;
    g_autofree char *why = NULL;
    g_autoptr(BlockBackend) blk = world_open_view(a->world, VIEW_TOP, 0, &why);
    g_assert_nonnull(blk);
    if (!bdrv_snapshot_load_tmp(blk_bs(blk), "race", &err)) {
        g_error("%s", err->message);
    }
    expect_legal(a, blk, a->snapshot);
}

static void run_round(const Kind *kind, const char *more, guint32 seed)
{
    printf("# %s%s, seed %u\n", kind->name, *more ? ", few tables in memory" : "", seed);
    fflush(stdout);
    World *w = world_new(kind);
    Arena a = {.world = w, .history = history_of(w), .sectors = w->view[VIEW_TOP].oracle.sectors};
    g_autofree char *why = NULL;
    w->more = more;
    a.blk = world_open_view(w, VIEW_TOP, BDRV_O_RDWR | BDRV_O_RESIZE, &why);
    g_assert_cmpstr(why, ==, NULL);
    disk_set_jitter(true);
    alarm(SECONDS_MAX);
    brawl(&a, seed);
    must(blk_flush(a.blk), "flush");
    disk_set_jitter(false);
    g_clear_pointer(&a.blk, blk_unref);
    expect_sound(&a);
    if (a.snapshot) {
        expect_snapshot(&a);
    }
    alarm(0);
    g_free(a.snapshot);
    history_free(a.history);
    world_free(w);
    for (unsigned i = 0; i < disk_count(); i++) {
        disk_load(i, &(DiskImage){0});
    }
}

/* ---------------------------------------------------------------- main */

static void parse_options(int argc, char **argv)
{
    const GOptionEntry entries[] = {
        {"requests", 0, 0, G_OPTION_ARG_INT, &opts.requests, "of each worker", "N"},
        {"rounds", 0, 0, G_OPTION_ARG_INT, &opts.rounds, "for each kind", "N"},
        {NULL},
    };
    running_parse(argc, argv, entries);
}

int main(int argc, char **argv)
{
    parse_options(argc, argv);
    disk_init();
    for (int round = 0; round < opts.rounds; round++) {
        for (unsigned k = 0; k < nb_kinds; k++) {
            if (running_wants(kinds[k].name, k)) {
                bool few = (round + (int)k) % 2 && !(kinds[k].flags & KIND_QED) && !kinds[k].open;
                run_round(&kinds[k], few ? ",l2-cache-size=4096,l2-cache-entry-size=512,"
                                           "refcount-cache-size=4096" : "",
                          (guint32)(running_options.seed + round * 1000));
            }
        }
    }
    qb_pools_shutdown();
    disk_done();
    return 0;
}
