/*
 * What an open image does without being asked: release of quarantine, looking at refcount blocks,
 * dropping tables; how a drain stops it; and cuts of the file that allocations get along with.
 *
 * What shall happen is waited for as long as it takes; the test's timeout is the limit.
 *
 * SPDX-License-Identifier: MIT
 */
#include "qcow2-rec.h"

#include "block/qcow2-refcount-int.h"

typedef struct World {
    RecFile *f;
    BlockBackend *blk;
    BlockDriverState *bs;
    BDRVQcow2State *s;
} World;

static void world_reopen(World *w, const char *opts)
{
    g_clear_pointer(&w->blk, blk_unref);
    w->blk = rec_open_image(w->f, opts ? opts : "discard=unmap", BDRV_O_RDWR | BDRV_O_RESIZE);
    w->bs = blk_bs(w->blk);
    w->s = image_state(w->blk);
}

static World world_new(const char *create_opts, size_t capacity)
{
    World w = {.f = rec_image_new("a", create_opts, capacity)};
    world_reopen(&w, NULL);
    return w;
}

static void world_free(World *w)
{
    blk_unref(w->blk);
    rec_check(w->f, false);
    rec_file_free(w->f);
}

static void discard(World *w, int64_t offset, int64_t bytes)
{
    g_assert_cmpint(blk_pdiscard(w->blk, offset, bytes), ==, 0);
}

static void wait_released(World *w)
{
    while (qcow2_quarantine_bytes(w->s)) {
        usleep(5000);
    }
    bdrv_drained_begin(w->bs); /* the step has ended, too */
    bdrv_drained_end(w->bs);
}

/* Threads of this process called @name. */
static unsigned threads_called(const char *name)
{
    g_autoptr(GDir) dir = g_dir_open("/proc/self/task", 0, NULL);
    const char *tid;
    unsigned n = 0;

    g_assert_nonnull(dir);
    while ((tid = g_dir_read_name(dir))) {
        g_autofree char *path = g_strdup_printf("/proc/self/task/%s/comm", tid), *comm = NULL;
        if (g_file_get_contents(path, &comm, NULL, NULL)) {
            n += g_str_equal(g_strstrip(comm), name);
        }
    }
    return n;
}

/* --- release --- */

static void test_released_when_idle(void)
{
    World w = world_new("size=8M,cluster_size=4k", 16 * MIB);

    world_reopen(&w, "discard=unmap,cache-clean-interval=0");
    image_write(w.blk, 0, 256 * KIB, 1);
    g_assert_cmpint(blk_flush(w.blk), ==, 0);
    g_assert_cmpuint(threads_called("timer"), ==, 0); /* nothing was freed */
    rec_start(w.f);
    discard(&w, 0, 128 * KIB);
    g_assert_cmpuint(qcow2_quarantine_bytes(w.s), ==, 128 * KIB);
    wait_released(&w);
    for (guint i = 0, flushes = 0; flushes == 0; i++) { /* the unlink first, then holes */
        const RecOp *op = &g_array_index(w.f->log, RecOp, i);
        g_assert_cmpuint(i, <, w.f->log->len);
        g_assert_true(op->kind != REC_WRITE || op->data);
        flushes += op->kind == REC_FLUSH;
    }
    world_free(&w);
}

static void test_failed_release(void)
{
    World w = world_new("size=8M,cluster_size=4k", 16 * MIB);

    image_write(w.blk, 0, 256 * KIB, 1);
    g_assert_cmpint(blk_flush(w.blk), ==, 0);
    discard(&w, 0, 128 * KIB);
    w.f->fail[REC_FLUSH] = 1;
    while (w.f->fail[REC_FLUSH]) {
        usleep(5000);
    }
    usleep(20000);
    g_assert_cmpuint(qcow2_quarantine_bytes(w.s), ==, 128 * KIB);
    g_assert_cmpint(blk_flush(w.blk), ==, 0);
    g_assert_cmpuint(qcow2_quarantine_bytes(w.s), ==, 0);
    image_expect(w.blk, 128 * KIB, 128 * KIB, 1);
    world_free(&w);
}

/* --- drain --- */

static _Atomic(bool) flush_held, flush_let_go, drained;

static void hold_flush(void *opaque)
{
    flush_held = true;
    while (!flush_let_go) {
        usleep(1000);
    }
}

static void *drain_file(void *opaque)
{
    World *w = opaque;

    bdrv_drained_begin(w->bs->file->bs);
    drained = true;
    return NULL;
}

/* A drain of the file waits for the image's flush above it, and then none begins. */
static void test_drain_waits(void)
{
    World w = world_new("size=8M,cluster_size=4k", 16 * MIB);
    pthread_t thread;

    image_write(w.blk, 0, 256 * KIB, 1);
    g_assert_cmpint(blk_flush(w.blk), ==, 0);
    w.f->on_flush = hold_flush;
    discard(&w, 0, 128 * KIB);
    while (!flush_held) {
        usleep(1000);
    }
    g_assert_true(qb_thread_start(&thread, "drain", drain_file, &w));
    usleep(50000);
    g_assert_false(drained);
    flush_let_go = true;
    pthread_join(thread, NULL);
    g_assert_cmpuint(qcow2_quarantine_bytes(w.s), ==, 0);

    unsigned flushes = w.f->count[REC_FLUSH];
    bdrv_graph_rdlock();
    qcow2_free_run(w.bs, (uint64_t)qcow2_alloc_clusters(w.bs, 4096), 4096, QCOW2_DISCARD_ALWAYS);
    bdrv_graph_rdunlock();
    qcow2_background_hasten(w.s, QCOW2_BG_RELEASE, 0);
    usleep(50000);
    g_assert_cmpuint(w.f->count[REC_FLUSH], ==, flushes);
    bdrv_drained_end(w.bs->file->bs);
    wait_released(&w);
    world_free(&w);
}

/* --- looking at refcount blocks --- */

static bool all_seen(World *w)
{
    QB_GUARD(&w->s->alloc_lock);

    return qcow2_free_index_unseen(w->s->free_index) == UINT64_MAX;
}

static bool looked(World *w)
{
    QB_GUARD(&w->s->alloc_lock);

    return w->s->look_from == UINT64_MAX;
}

static void alloc_and_undo(World *w, uint64_t bytes)
{
    BDRV_GRAPH_GUARD();
    int64_t offset = qcow2_alloc_clusters(w->bs, bytes);

    g_assert_cmpint(offset, >, 0);
    qcow2_alloc_undo(w->bs, (uint64_t)offset, bytes);
}

static void test_looks_at_all_blocks(void)
{
    World w = world_new("size=8M,cluster_size=512,preallocation=metadata", 16 * MIB);

    world_reopen(&w, NULL);
    g_assert_false(all_seen(&w));
    alloc_and_undo(&w, 512);
    while (!all_seen(&w)) {
        usleep(1000);
    }
    world_free(&w);
}

/* Nobody hears of it; the block stays for whoever needs it. */
static void test_looks_past_errors(void)
{
    World w = world_new("size=8M,cluster_size=512,preallocation=metadata", 16 * MIB);

    world_reopen(&w, NULL);
    w.f->fail[REC_READ] = 20; /* the allocation itself reads eight */
    alloc_and_undo(&w, 512);
    while (!looked(&w)) {
        usleep(1000);
    }
    g_assert_cmpint(w.f->fail[REC_READ], ==, 0);
    g_assert_false(all_seen(&w));
    alloc_and_undo(&w, MIB);
    g_assert_true(all_seen(&w));
    world_free(&w);
}

/* A hole behind thousands of blocks not looked at is found before the file has grown by more than
 * 64 MiB, also when the background does not help. */
static void test_bounded_blind_growth(void)
{
    const uint64_t run = 120 * KIB; /* of the 128 KiB that a block counts */
    World w = world_new("size=1G,cluster_size=512", 768 * (size_t)MIB);
    int64_t hole, offset;
    uint64_t grown = 0;

    bdrv_graph_rdlock();
    for (int i = 0; i < 4800; i++) {
        g_assert_cmpint(qcow2_alloc_clusters(w.bs, run), >, 0);
    }
    hole = qcow2_alloc_clusters(w.bs, run);
    g_assert_cmpint(qcow2_alloc_clusters(w.bs, run), >, 0);
    qcow2_alloc_undo(w.bs, (uint64_t)hole, run);
    bdrv_graph_rdunlock();
    world_reopen(&w, NULL);
    qcow2_background_stop(w.s);
    bdrv_graph_rdlock();
    do {
        g_assert_cmpuint(grown, <=, 65 * MIB);
        offset = qcow2_alloc_clusters(w.bs, run);
        g_assert_cmpint(offset, >, 0);
        grown += run;
    } while (offset > hole);
    bdrv_graph_rdunlock();
    g_assert_cmpuint(grown, >, 8 * MIB); /* else this is no test of it */
    blk_unref(w.blk);
    rec_file_free(w.f);
}

/* The range of the last block is used before another one makes the file longer. */
static void test_fills_last_block(void)
{
    World w = world_new("size=8M,cluster_size=512,preallocation=metadata", 16 * MIB);
    int64_t length, offset;

    world_reopen(&w, NULL);
    qcow2_background_stop(w.s);
    length = w.f->length;
    bdrv_graph_rdlock();
    offset = qcow2_alloc_clusters(w.bs, 512);
    qcow2_alloc_undo(w.bs, (uint64_t)offset, 512);
    bdrv_graph_rdunlock();
    g_assert_cmpint(offset, <=, length);
    g_assert_false(all_seen(&w));
    world_free(&w);
}

/* --- tables unused for long --- */

static void test_drops_unused_tables(void)
{
    World w = world_new("size=64M,cluster_size=4k", 128 * MIB);

    image_write(w.blk, 0, 4 * KIB, 1);
    world_reopen(&w, "cache-clean-interval=1");
    while (threads_called("timer") == 0) { /* not for programs that end at once */
        image_expect(w.blk, 0, 4 * KIB, 1);
        usleep(5000);
    }
    while (qcow2_cache_bytes(w.s->cache)) {
        usleep(5000);
    }
    image_expect(w.blk, 0, 4 * KIB, 1);
    world_free(&w);
}

/* --- cuts --- */

static _Atomic(bool) allocated;

static void *allocate_beyond(void *opaque)
{
    World *w = opaque;
    BDRV_GRAPH_GUARD();
    int64_t offset = qcow2_alloc_clusters(w->bs, 4096);

    g_assert_cmpint(offset, >, 0);
    allocated = true;
    qcow2_alloc_undo(w->bs, (uint64_t)offset, 4096);
    return NULL;
}

static void test_cut_and_allocation(void)
{
    World w = world_new("size=8M,cluster_size=4k", 16 * MIB);
    pthread_t thread;

    bdrv_graph_rdlock();
    uint64_t seq = qcow2_alloc_seq(w.s);
    int64_t low = qcow2_alloc_clusters(w.bs, 4096), last = qcow2_alloc_clusters(w.bs, 4096);
    uint64_t end = (uint64_t)last + 4096;
    qcow2_alloc_undo(w.bs, (uint64_t)low, 4096);
    g_assert_false(qcow2_cut_begin(w.s, end, seq)); /* something has changed */
    seq = qcow2_alloc_seq(w.s);
    g_assert_true(qcow2_cut_begin(w.s, end, seq));
    g_assert_cmpint(qcow2_alloc_clusters(w.bs, 4096), ==, low);
    g_assert_true(qb_thread_start(&thread, "beyond", allocate_beyond, &w));
    usleep(50000);
    g_assert_false(allocated);
    qcow2_cut_end(w.s);
    pthread_join(thread, NULL);
    qcow2_alloc_undo(w.bs, (uint64_t)low, 4096);
    qcow2_alloc_undo(w.bs, (uint64_t)last, 4096);
    bdrv_graph_rdunlock();
    world_free(&w);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    rec_setup();
    g_test_add_func("/qcow2-background/released-when-idle", test_released_when_idle);
    g_test_add_func("/qcow2-background/failed-release", test_failed_release);
    g_test_add_func("/qcow2-background/drain-waits", test_drain_waits);
    g_test_add_func("/qcow2-background/looks-at-all-blocks", test_looks_at_all_blocks);
    g_test_add_func("/qcow2-background/looks-past-errors", test_looks_past_errors);
    g_test_add_func("/qcow2-background/bounded-blind-growth", test_bounded_blind_growth);
    g_test_add_func("/qcow2-background/fills-last-block", test_fills_last_block);
    g_test_add_func("/qcow2-background/drops-unused-tables", test_drops_unused_tables);
    g_test_add_func("/qcow2-background/cut-and-allocation", test_cut_and_allocation);
    int ret = g_test_run();
    image_teardown();
    return ret;
}
