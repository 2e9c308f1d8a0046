/*
 * Known races, made to happen: breakpoints of blkdebug hold a request at a named point while
 * another one does what must not disturb it.
 *
 *      racer  --> ... --> event "X": held      main thread: the other request, a picture of the
 *                            |                              disk as a power loss would leave it
 *                         resumed --> done
 *
 * More of the kind, of single functions, are in tests/unit/test-qcow2-requests.c.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdlib.h>

#include "block/qcow2.h"
#include "tests/harness/operations.h"
#include "util/pool.h"
#include "util/thread.h"

typedef struct Racer {
    pthread_t thread;
    World *world;
    unsigned first, n; /* written with @value, or discarded; n 0: a flush */
    unsigned value;    /* 0: a discard */
    _Atomic(bool) done;
} Racer;

static void *race(void *opaque)
{
    Racer *r = opaque;
    BlockBackend *blk = r->world->blk;
    if (!r->n) {
        g_assert_cmpint(blk_flush(blk), ==, 0);
        return NULL;
    }
    int64_t offset = (int64_t)r->first * ORACLE_SECTOR, bytes = (int64_t)r->n * ORACLE_SECTOR;
    g_autofree uint8_t *buf = g_malloc((size_t)bytes);
    oracle_fill(buf, r->first, r->n, r->value);
    int ret = r->value ? blk_pwrite(blk, offset, bytes, buf, 0) : blk_pdiscard(blk, offset, bytes);
    g_assert_cmpint(ret, ==, 0);
    atomic_store(&r->done, true);
    return NULL;
}

static void start(Racer *r)
{
    if (r->n) {
        world_mark_write(r->world, VIEW_TOP, r->first, r->n, r->value);
    }
    g_assert_true(qb_thread_start(&r->thread, "racer", race, r));
}

/* Starts it, and waits until it is held at @event. */
static void start_until(Racer *r, const char *event)
{
    BlockDriverState *bs = blk_bs(r->world->blk);
    g_assert_cmpint(bdrv_debug_breakpoint(bs, event, "A"), ==, 0);
    start(r);
    for (int i = 0; i < 20000 && !bdrv_debug_is_suspended(bs, "A"); i++) {
        g_usleep(500);
    }
    g_assert_true(bdrv_debug_is_suspended(bs, "A"));
}

static void finish(Racer *r)
{
    g_assert_cmpint(bdrv_debug_resume(blk_bs(r->world->blk), "A"), ==, 0);
    pthread_join(r->thread, NULL);
}

static World *open_world(const char *kind, const char *more)
{
    World *w = world_new(kind_find(kind));
    w->debug = true;
    w->more = more;
    g_assert_true(world_open(w));
    return w;
}

static void expect(World *w, bool exact)
{
    g_autofree char *why = NULL;
    if (!world_judge(w, exact, &why)) {
        g_error("%s", why);
    }
}

/* The disks with all that was written until now, and what they may show: what a crash leaves. */
typedef struct Picture {
    DiskImage image[DISKS_MAX];
    World world;
} Picture;

static Picture take_picture(const World *w)
{
    Picture p = {.world = world_copy(w)};
    for (unsigned i = 0; i < disk_count(); i++) {
        p.image[i] = disk_save(i);
    }
    return p;
}

/* Opening an image waits for requests that are held, hence pictures are judged afterwards. */
static void judge_picture(Picture *p)
{
    for (unsigned i = 0; i < disk_count(); i++) {
        disk_load(i, &p->image[i]);
        disk_image_clear(&p->image[i]);
    }
    expect(&p->world, false);
    world_copy_clear(&p->world);
}

/* Without a leak. @p: NULL, or a picture to be judged after the last. */
static void close_world(World *w, Picture *p)
{
    g_assert_true(world_close(w));
    w->debug = false;
    w->more = NULL;
    expect(w, true);
    if (p) {
        judge_picture(p);
    }
    world_free(w);
}

/* Writes to the first and to the last sector of a cluster; the second comes while the first is under
 * way.  Closes the image: no leak, one cluster for both. */
static void race_for_cluster(World *w, unsigned cluster)
{
    Racer first = {.world = w, .first = cluster, .n = 1, .value = 50};
    Racer second = {.world = w, .first = cluster + w->kind->cluster - 1, .n = 1, .value = 51};
    start_until(&first, "write_aio");
    start(&second);
    g_usleep(20000);
    finish(&first);
    pthread_join(second.thread, NULL);
    close_world(w, NULL);
}

/* Two writes that fill a part each of the same new cluster: one copies, the other finds it. */
static void test_cow_against_cow(const void *data)
{
    World *w = open_world(data, NULL);
    race_for_cluster(w, 3 * w->kind->cluster); /* not there yet */
}

/* The same with a zero cluster that has its place already: what the first fills up with zeroes is not
 * what the second has written. */
static void test_reuse_against_reuse(const void *data)
{
    World *w = open_world(data, NULL);
    unsigned c = w->kind->cluster, cluster = 3 * c;
    world_write(w, cluster, c);
    world_zero(w, cluster, c, 0);
    g_assert_cmpint(world_flush(w), ==, 0);
    race_for_cluster(w, cluster);
}

/* What must not be done before a write that it found under way. */
typedef struct Waiter {
    pthread_t thread;
    World *world;
    void (*run)(World *w);
    _Atomic(bool) done;
} Waiter;

static void *run_waiter(void *opaque)
{
    Waiter *x = opaque;
    x->run(x->world);
    atomic_store(&x->done, true);
    return NULL;
}

static void zero_first(World *w)
{
    unsigned c = w->kind->cluster;
    g_assert_cmpint(blk_pwrite_zeroes(w->blk, 0, (int64_t)c * ORACLE_SECTOR, 0), ==, 0);
}

static void snapshot(World *w)
{
    g_assert_true(bdrv_snapshot_create(blk_bs(w->blk), "new", NULL));
}

static void wait_for_write(const char *kind, void (*run)(World *w))
{
    World *w = open_world(kind, NULL);
    Racer writer = {.world = w, .first = 0, .n = 1, .value = 50};
    Waiter waiter = {.world = w, .run = run};
    start_until(&writer, "write_aio");
    g_assert_true(qb_thread_start(&waiter.thread, "waiter", run_waiter, &waiter));
    g_usleep(20000);
    g_assert_false(atomic_load(&waiter.done));
    finish(&writer);
    pthread_join(waiter.thread, NULL);
    g_assert_true(world_close(w));
    world_free(w);
}

/* A cluster keeps its place and reads zero: a write in place that is late would show up in what is put
 * there next. */
static void test_zero_waits_for_rewrite(const void *data)
{
    wait_for_write(data, zero_first);
}

/* Who takes the node as a whole has it for himself. */
static void test_snapshot_waits_for_rewrite(const void *data)
{
    wait_for_write(data, snapshot);
}

/* Data are on their way into a cluster in place when it is discarded: until they are there nobody
 * else gets it. */
static void test_rewrite_against_discard(const void *data)
{
    World *w = open_world(data, NULL);
    unsigned c = w->kind->cluster;
    Racer writer = {.world = w, .first = 0, .n = c, .value = 50};
    start_until(&writer, "write_aio");
    world_discard(w, 0, c);
    g_assert_cmpint(blk_flush(w->blk), ==, 0);
    world_write(w, 3 * c, c);
    world_write(w, 7 * c, c);
    finish(&writer);
    close_world(w, NULL);
}

/* The same with a zero cluster that has its place already: the write makes it a normal one, the
 * discard takes it away, in one order or the other. */
static void test_preallocated_zero_against_discard(const void *data)
{
    World *w = open_world(data, NULL);
    unsigned c = w->kind->cluster;
    world_write(w, 2 * c, c);
    world_zero(w, 2 * c, c, 0);
    g_assert_cmpint(world_flush(w), ==, 0);
    Racer writer = {.world = w, .first = 2 * c, .n = c, .value = 50};
    Racer discard = {.world = w, .first = 2 * c, .n = c};
    start_until(&writer, "write_aio");
    start(&discard);
    g_usleep(20000);
    world_write(w, 3 * c, c);
    g_assert_cmpint(blk_flush(w->blk), ==, 0);
    world_write(w, 7 * c, c);
    finish(&writer);
    pthread_join(discard.thread, NULL);
    world_write(w, 11 * c, c);
    close_world(w, NULL);
}

/* What is freed while a flush is under way was not unlinked in what this one has copied: it is
 * neither punched nor used again before another one. */
static void test_free_against_flush(const void *data)
{
    World *w = open_world(data, NULL);
    unsigned c = w->kind->cluster;
    Racer flusher = {.world = w};
    world_write(w, 3 * c, c);
    start_until(&flusher, "l2_update");
    world_discard(w, 4 * c, c);
    world_discard(w, 0, c);
    finish(&flusher);
    for (unsigned i = 1; i < 4; i++) {
        world_write(w, (3 + 4 * i) * c, c);
    }
    Picture p = take_picture(w);
    close_world(w, &p);
}

/* The data of a new cluster are not written yet when somebody flushes: nothing may name it. */
static void test_flush_against_write(const void *data)
{
    World *w = open_world(data, NULL);
    unsigned c = w->kind->cluster;
    Racer writer = {.world = w, .first = 3 * c, .n = c, .value = 50};
    start_until(&writer, "write_aio");
    world_write(w, 7 * c, c);
    g_assert_cmpint(blk_flush(w->blk), ==, 0);
    Picture p = take_picture(w);
    finish(&writer);
    close_world(w, &p);
}

/* Holds a racer before one of the writes that he does to a disk. */
typedef struct Gate {
    unsigned left; /* writes until then */
    _Atomic(bool) armed, held, open;
} Gate;

static void hold_at_gate(void *opaque)
{
    Gate *g = opaque;
    if (!atomic_load(&g->armed) || --g->left > 0) {
        return;
    }
    atomic_store(&g->armed, false);
    atomic_store(&g->held, true);
    while (!atomic_load(&g->open)) {
        g_usleep(100);
    }
}

/* Somebody flushes before the @n-th write of a request. False: it has fewer. */
static bool flush_before_write(const char *kind, unsigned n)
{
    World *w = open_world(kind, NULL);
    unsigned c = w->kind->cluster;
    Racer writer = {.world = w, .first = 3 * c + 1, .n = 1, .value = 50};
    Gate gate = {.left = n};
    Picture p = {0};
    atomic_store(&gate.armed, true);
    disk_set_hook(hold_at_gate, &gate);
    start(&writer);
    while (!atomic_load(&gate.held) && !atomic_load(&writer.done)) {
        g_usleep(100);
    }
    atomic_store(&gate.armed, false);
    bool held = atomic_load(&gate.held);
    if (held) {
        g_assert_cmpint(blk_flush(w->blk), ==, 0);
        p = take_picture(w);
    }
    atomic_store(&gate.open, true);
    pthread_join(writer.thread, NULL);
    disk_set_hook(NULL, NULL);
    close_world(w, held ? &p : NULL);
    return held;
}

/* A part of a new cluster is written, and what was there before around it: as long as one of the writes
 * that this takes is missing, no entry names the cluster. */
static void test_flush_against_parts(const void *data)
{
    unsigned n = 1;
    while (flush_before_write(data, n)) {
        n++;
    }
    g_assert_cmpuint(n, >, 1);
}

/* Entries change while a flush stands between its barrier and the old tables: what it writes is
 * what it copied, and what came later waits for the next one. */
static void test_update_against_flush(const void *data)
{
    World *w = open_world(data, NULL);
    unsigned c = w->kind->cluster;
    Racer flusher = {.world = w};
    world_write(w, 3 * c, c);
    start_until(&flusher, "l2_update");
    world_write(w, 7 * c, c);
    world_discard(w, 8 * c, 4 * c);
    world_write(w, 11 * c, c);
    world_write(w, 15 * c, c);
    Picture p = take_picture(w);
    finish(&flusher);
    close_world(w, &p);
}

/* What an overwrite freed while a flush was under way is not what the next write gets. */
static void test_compressed_overwrite_against_flush(const void *data)
{
    World *w = open_world(data, NULL);
    unsigned c = w->kind->cluster;
    Racer flusher = {.world = w};
    world_write(w, 0, c);
    world_write(w, c, c);
    start_until(&flusher, "l2_update");
    for (unsigned i = 0; i < 4; i++) {
        world_write(w, (3 + 4 * i) * c, c);
    }
    Picture p = take_picture(w);
    finish(&flusher);
    close_world(w, &p);
}

/* A table is being loaded while others come and push everything out of the cache. */
static void test_eviction_against_load(const void *data)
{
    World *w = open_world(data, ",l2-cache-size=1024,refcount-cache-size=1024");
    unsigned c = w->kind->cluster, tables = w->kind->sectors / 64;
    Racer writer = {.world = w, .first = 64, .n = c, .value = 50};
    g_assert_cmpuint(tables, >, 2);
    start_until(&writer, "l2_load");
    for (unsigned i = 2; i < tables; i++) {
        world_write(w, 64 * i, c);
    }
    g_assert_cmpint(blk_flush(w->blk), ==, 0);
    finish(&writer);
    close_world(w, NULL);
}

int main(int argc, char **argv)
{
    static const char *const names[] = {"v3", "v2", "512", "64k", "ext", "snapshot", "backing"};
    g_test_init(&argc, &argv, NULL);
    disk_init();
    for (size_t i = 0; i < G_N_ELEMENTS(names); i++) {
        g_autofree char *flush = g_strdup_printf("/known/flush-write/%s", names[i]);
        g_autofree char *update = g_strdup_printf("/known/update-flush/%s", names[i]);
        g_test_add_data_func(flush, names[i], test_flush_against_write);
        g_test_add_data_func(update, names[i], test_update_against_flush);
        g_autofree char *parts = g_strdup_printf("/known/flush-parts/%s", names[i]);
        g_test_add_data_func(parts, names[i], test_flush_against_parts);
        g_autofree char *free = g_strdup_printf("/known/free-flush/%s", names[i]);
        g_autofree char *rewrite = g_strdup_printf("/known/rewrite-discard/%s", names[i]);
        g_test_add_data_func(free, names[i], test_free_against_flush);
        g_test_add_data_func(rewrite, names[i], test_rewrite_against_discard);
    }
    g_test_add_data_func("/known/zero-discard/v3", "v3", test_preallocated_zero_against_discard);
    g_test_add_data_func("/known/zero-discard/ext", "ext", test_preallocated_zero_against_discard);
    g_test_add_data_func("/known/cow-cow/v3", "v3", test_cow_against_cow);
    g_test_add_data_func("/known/cow-cow/64k", "64k", test_cow_against_cow);
    g_test_add_data_func("/known/cow-cow/backing", "backing", test_cow_against_cow);
    g_test_add_data_func("/known/cow-cow/ext", "backing-ext", test_cow_against_cow);
    g_test_add_data_func("/known/reuse-reuse/v3", "v3", test_reuse_against_reuse);
    g_test_add_data_func("/known/reuse-reuse/ext", "ext", test_reuse_against_reuse);
    g_test_add_data_func("/known/rewrite-zero/v3", "v3", test_zero_waits_for_rewrite);
    g_test_add_data_func("/known/rewrite-snapshot/v3", "v3", test_snapshot_waits_for_rewrite);
    g_test_add_data_func("/known/compressed", "compressed",
                         test_compressed_overwrite_against_flush);
    g_test_add_data_func("/known/eviction", "512", test_eviction_against_load);
    int ret = g_test_run();
    qb_pools_shutdown();
    disk_done();
    return ret;
}
