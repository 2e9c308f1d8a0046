/*
 * What shrinking and emptying cost and leave: barriers, bytes of the file, places of clusters.  That
 * they survive crashes and errors is tested in test-qcow2-ops.c.
 *
 * SPDX-License-Identifier: MIT
 */
#include "qcow2-rec.h"
#include "block/qcow2-cache-int.h"

enum { C = 64 * KIB, CAPACITY = 160 * MIB };

/* Guest clusters of @blk, @n of them in an order that is not that of the disk. */
static void write_scattered(BlockBackend *blk, int n)
{
    for (int i = 0; i < n; i++) {
        image_write(blk, (int64_t)(i * 7 % n) * 16 * C, C, 1 + i % 200);
    }
}

/* Flushes since rec_start() that had something to do: the others the file driver leaves out. */
static unsigned barriers(const RecFile *f)
{
    unsigned n = 0;
    bool written = false;
    for (guint i = 0; i < f->log->len; i++) {
        RecKind kind = g_array_index(f->log, RecOp, i).kind;
        n += kind == REC_FLUSH && written;
        written = kind == REC_WRITE || (written && kind != REC_FLUSH);
    }
    return n;
}

static void shrink(BlockBackend *blk, int64_t size)
{
    GError *err = NULL;
    bool ok = blk_truncate(blk, size, true, PREALLOC_MODE_OFF, false, &err);
    g_assert_no_error(err);
    g_assert_true(ok);
}

static void make_empty(BlockBackend *blk)
{
    GError *err = NULL;
    bool ok = blk_make_empty(blk, false, &err);
    g_assert_no_error(err);
    g_assert_true(ok);
}

/* Barriers of one operation on an image with much more in it than quarantine likes to hold. */
static void test_shrink_barriers(void)
{
    static const int64_t sizes[] = {512, 8 * MIB, 600 * MIB, 1000 * MIB};
    for (size_t i = 0; i < G_N_ELEMENTS(sizes); i++) {
        RecFile *f = rec_image_new("a", "size=2G", CAPACITY);
        BlockBackend *blk = rec_open_rw(f);
        write_scattered(blk, 1600);
        g_assert_cmpint(blk_flush(blk), ==, 0);
        rec_start(f);
        shrink(blk, sizes[i]);
        blk_unref(blk);
        g_assert_cmpuint(barriers(f), <=, 6);
        rec_check(f, false);
        rec_file_free(f);
    }
}

/* Tables with one entry each, at any place: it is found. */
static void test_shrink_finds_lone_entries(void)
{
    static const char *const opts[] = {
        "size=64M,cluster_size=4k", "size=256M,cluster_size=16k,extended_l2=on",
    };
    for (size_t i = 0; i < G_N_ELEMENTS(opts); i++) {
        RecFile *f = rec_image_new("a", opts[i], CAPACITY);
        BlockBackend *blk = rec_open_rw(f);
        int64_t cluster = (int64_t)image_state(blk)->cluster_size, length = f->length + cluster;
        int64_t table = (int64_t)image_state(blk)->l2_entries * cluster;
        for (int64_t entry = 0; entry < 10; entry++) {
            image_write(blk, (1 + entry) * table + entry * cluster, cluster, 1);
        }
        shrink(blk, 1 * MIB);
        blk_unref(blk);
        g_assert_cmpint(f->length, <, length);
        rec_check(f, false);
        rec_file_free(f);
    }
}

/* A cluster with many references, which go one by one: what waits is bounded by its number, too. */
static void test_shrink_is_bounded(void)
{
    const unsigned many = (1 << 18) + 1;
    RecFile *f = rec_image_new("a", "size=1M,refcount_bits=64", MIB);
    BlockBackend *blk = rec_open_rw(f);
    BlockDriverState *bs = blk_bs(blk);
    image_write(blk, 0, 2 * C, 1);
    bdrv_graph_rdlock();
    Qcow2HostRun run = {(uint64_t)qcow2_alloc_clusters(bs, C), C};
    g_assert_cmpint(qcow2_update_refcounts(bs, &run, 1, (int)many - 1), ==, 0);
    for (unsigned i = 0; i < many; i++) {
        g_assert_false(qcow2_quarantine_crowded(image_state(blk)));
        qcow2_free_run(bs, run.offset, C, QCOW2_DISCARD_ALWAYS);
    }
    g_assert_true(qcow2_quarantine_crowded(image_state(blk)));
    g_assert_cmpint(qcow2_discard_clusters(bs, C, C, QCOW2_DISCARD_FULL, QCOW2_DISCARD_ALWAYS), ==,
                    0);
    g_assert_cmpuint(qcow2_quarantine_bytes(image_state(blk)), ==, C);
    g_assert_false(qcow2_quarantine_crowded(image_state(blk)));
    bdrv_graph_rdunlock();
    blk_unref(blk);
    rec_check(f, false);
    rec_file_free(f);
}

/* All that a resize finds to do it has done in the end. */
static void test_tells_progress(void)
{
    RecFile *f = rec_image_new("a", "size=2G", CAPACITY);
    BlockBackend *blk = rec_open_rw(f);
    QbProgress progress;
    BdrvResize how = {.length = 100 * MIB, .exact = true, .progress = &progress};
    write_scattered(blk, 1600);
    qb_progress_init(&progress, 0);
    g_assert_true(blk_resize(blk, &how, NULL));
    g_assert_cmpuint(progress.total, >=, 2 * (UINT64_C(1600) * MIB - 100 * MIB));
    g_assert_cmpuint(progress.current, ==, progress.total);
    how.length = 200 * MIB;
    how.prealloc = PREALLOC_MODE_METADATA;
    qb_progress_init(&progress, 0);
    g_assert_true(blk_resize(blk, &how, NULL));
    g_assert_cmpuint(progress.total, ==, 100 * MIB);
    g_assert_cmpuint(progress.current, ==, progress.total);
    g_assert_null(blk_bs(blk)->resize_progress);
    blk_unref(blk);
    rec_check(f, false);
    rec_file_free(f);
}

static void test_empty_barriers(void)
{
    RecFile *f = rec_image_new("a", "size=2G", CAPACITY);
    BlockBackend *blk = rec_open_rw(f);
    write_scattered(blk, 1600);
    g_assert_cmpint(blk_flush(blk), ==, 0);
    uint64_t l1_offset = image_state(blk)->header.l1_offset;
    rec_start(f);
    make_empty(blk);
    g_assert_cmpuint(barriers(f), <=, 6);
    g_assert_cmpuint(image_state(blk)->header.l1_offset, !=, l1_offset); /* by switching */
    g_assert_cmpint(bdrv_getlength(blk_bs(blk)->file->bs), ==, 4 * C);
    image_expect(blk, 0, MIB, 0);
    image_write(blk, 5 * MIB, C, 9);
    image_expect(blk, 5 * MIB, C, 9);
    blk_unref(blk);
    rec_check(f, false);
    rec_file_free(f);
}

/* Header, table, block, L1, in whatever clusters: all that an empty image needs, and at the front. */
static void check_emptied(const char *opts, int64_t clusters, int64_t written)
{
    RecFile *f = rec_image_new("a", opts, CAPACITY);
    BlockBackend *blk = rec_open_rw(f);
    int64_t cluster_size = image_state(blk)->cluster_size;
    image_write(blk, 0, written, 5);
    make_empty(blk);
    g_assert_cmpint(bdrv_getlength(blk_bs(blk)->file->bs), ==, clusters * cluster_size);
    image_expect(blk, 0, written, 0);
    blk_unref(blk);
    rec_check(f, false);
    rec_file_free(f);
}

static void test_empty_is_smallest(void)
{
    check_emptied("size=1G", 4, 8 * MIB);
    check_emptied("size=1G,compat=0.10", 4, 8 * MIB);
    check_emptied("size=1G,refcount_bits=1", 4, 8 * MIB);
    check_emptied("size=1G,extended_l2=on", 4, 8 * MIB);
    check_emptied("size=1G,cluster_size=2M", 4, 8 * MIB);
    /* 32768 entries of L1 in 512 clusters, three blocks of 256 counts */
    check_emptied("size=1G,cluster_size=512", 512 + 1 + 1 + 3, 4 * MIB);
}

/* A snapshot stays where it is, and its clusters are the image's alone afterwards. */
static void test_empty_keeps_snapshot(void)
{
    GError *err = NULL;
    RecFile *f = rec_image_new("a", "size=64M", CAPACITY);
    BlockBackend *blk = rec_open_rw(f);
    image_write(blk, 0, 2 * MIB, 1);
    g_assert_true(bdrv_snapshot_create(blk_bs(blk), "s", &err));
    image_write(blk, MIB, 20 * MIB, 2);
    make_empty(blk);
    g_assert_cmpint(bdrv_getlength(blk_bs(blk)->file->bs), <=, 4 * MIB);
    image_expect(blk, 0, 21 * MIB, 0);
    g_assert_true(bdrv_snapshot_apply(blk_bs(blk), "s", &err));
    image_expect(blk, 0, 2 * MIB, 1);
    image_expect(blk, 2 * MIB, MIB, 0);
    blk_unref(blk);
    rec_check(f, false);
    rec_file_free(f);
}

/* No room for anything new: L1 is cleared in place. */
static void test_empty_without_room(void)
{
    RecFile *f = rec_image_new("a", "size=64M", CAPACITY);
    BlockBackend *blk = rec_open_rw(f);
    image_write(blk, 0, 4 * MIB, 1);
    blk_unref(blk);
    f->capacity = (size_t)f->length;
    blk = rec_open_rw(f);
    make_empty(blk);
    g_assert_cmpint(bdrv_getlength(blk_bs(blk)->file->bs), ==, 4 * C);
    image_expect(blk, 0, 4 * MIB, 0);
    blk_unref(blk);
    rec_check(f, false);
    f->capacity = CAPACITY;
    rec_file_free(f);
}

/* Neither the table of a range that goes, nor one for a range that never was, is written. */
static void test_shrink_writes_no_tables(void)
{
    RecFile *f = rec_image_new("a", "size=1T", CAPACITY);
    BlockBackend *blk = rec_open_rw(f);
    unsigned before = f->count[REC_WRITE];
    int64_t length = f->length;
    shrink(blk, 1 * MIB);
    g_assert_cmpuint(f->count[REC_WRITE] - before, <=, 4);
    g_assert_cmpint(f->length, <=, length);
    g_assert_cmpuint(image_state(blk)->header.l1_size, ==, 1);
    blk_unref(blk);
    rec_check(f, false);
    rec_file_free(f);
}

/* What was cut off does not come back. */
static void test_grow_reads_zero(void)
{
    RecFile *f = rec_image_new("a", "size=8M", CAPACITY);
    BlockBackend *blk = rec_open_rw(f);
    image_write(blk, 0, 8 * MIB, 3);
    shrink(blk, MIB + 512);
    shrink(blk, 8 * MIB);
    image_expect(blk, 0, MIB + 512, 3);
    image_expect(blk, MIB + 512, 7 * MIB - 512, 0);
    blk_unref(blk);
    rec_check(f, false);
    rec_file_free(f);
}

/* A shrink that drops refcount blocks, and a writer below its cut that needs new ones meanwhile. */
typedef struct Meeting {
    RecFile *f;
    BlockBackend *blk;
    uint64_t blocks; /* before the shrink */
    pthread_t thread;
    bool begun;
    _Atomic(bool) done;
} Meeting;

static uint64_t nb_blocks(BlockBackend *blk)
{
    BDRVQcow2State *s = image_state(blk);
    QB_GUARD(&s->alloc_lock);
    return s->reftable.nb_blocks;
}

static void *fill_below(void *opaque)
{
    Meeting *m = opaque;
    for (int i = 0; i < 300; i++) {
        image_write(m->blk, i * 512, 512, 1 + i % 200);
    }
    m->done = true;
    return NULL;
}

/* In a flush of the shrink: once blocks are out of the table the writer gets all the time it wants, up
 * to the point where it waits for this flush. */
static void meet(void *opaque)
{
    Meeting *m = opaque;
    if (nb_blocks(m->blk) >= m->blocks) {
        m->f->on_flush = meet;
        return;
    }
    m->begun = qb_thread_start(&m->thread, "writer", fill_below, m);
    g_assert_true(m->begun);
    for (int i = 0; i < 100 && !m->done; i++) {
        g_usleep(2000);
    }
}

static void test_shrink_beside_allocations(void)
{
    RecFile *f = rec_image_new("a", "size=8M,cluster_size=512,refcount_bits=64", CAPACITY);
    Meeting m = {.f = f, .blk = rec_open_rw(f)};
    image_write(m.blk, 4 * MIB, 512 * KIB, 7);
    g_assert_cmpint(blk_flush(m.blk), ==, 0);
    m.blocks = nb_blocks(m.blk);
    f->opaque = &m;
    f->on_flush = meet;
    shrink(m.blk, 2 * MIB);
    g_assert_true(m.begun);
    pthread_join(m.thread, NULL);
    for (int i = 0; i < 300; i++) {
        image_expect(m.blk, i * 512, 512, 1 + i % 200);
    }
    f->on_flush = NULL;
    blk_unref(m.blk);
    rec_check(f, false);
    rec_file_free(f);
}

/* No flush succeeds any more from the one on that follows the @left-th switch to another L1. */
typedef struct Breakage {
    RecFile *f;
    uint8_t l1[8];
    int left;
} Breakage;

static void break_after_switch(void *opaque)
{
    Breakage *b = opaque;
    b->f->on_flush = break_after_switch;
    if (memcmp(b->l1, b->f->data + QCOW2_HDR_L1_OFFSET, sizeof(b->l1)) && b->left-- > 0) {
        memcpy(b->l1, b->f->data + QCOW2_HDR_L1_OFFSET, sizeof(b->l1));
    }
    if (b->left <= 0) {
        b->left = INT_MIN / 2;
        b->f->fail[REC_FLUSH] = 1;
    }
}

/* What a crash leaves when the header that was put back at last is what got lost. */
static RecFile *replay_without_undo(const RecFile *before, const RecFile *f)
{
    RecFile *crashed = rec_file_dup("crashed", before);
    guint undo = f->log->len;
    for (guint i = 0; i < f->log->len; i++) {
        const RecOp *op = &g_array_index(f->log, RecOp, i);
        undo = op->kind == REC_WRITE && op->offset == 0 ? i : undo;
    }
    for (guint i = 0; i < f->log->len; i++) {
        const RecOp *op = &g_array_index(f->log, RecOp, i);
        if (op->kind == REC_WRITE && i != undo) {
            rec_apply_part(crashed, op, 0, op->bytes);
        }
    }
    return crashed;
}

/* Nothing is put where a switch that failed, but may be on disk, has its structure. */
static void check_failed_switch(int switches)
{
    RecFile *f = rec_image_new("a", "size=64M", CAPACITY);
    BlockBackend *blk = rec_open_rw(f);
    image_write(blk, 0, 2 * MIB, 1);
    g_assert_cmpint(blk_flush(blk), ==, 0);
    RecFile *before = rec_file_dup("before", f);
    Breakage b = {.f = f, .left = switches};
    memcpy(b.l1, f->data + QCOW2_HDR_L1_OFFSET, sizeof(b.l1));
    rec_start(f);
    f->opaque = &b;
    f->on_flush = break_after_switch;
    (void)blk_make_empty(blk, false, NULL);
    g_assert_cmpint(b.left, <, 0);
    g_autofree uint8_t *buf = g_malloc0(8 * MIB);
    memset(buf, 0xee, 8 * MIB);
    (void)blk_pwrite(blk, 16 * MIB, 8 * MIB, buf, 0);
    RecFile *crashed = replay_without_undo(before, f);
    rec_check(crashed, true);
    blk_unref(blk);
    rec_file_free(crashed);
    rec_file_free(before);
    rec_file_free(f);
}

/* An image with a feature that we do not know is emptied in place. Power lost at any moment leaves it
 * sound: no structure is cut off that the disk still names. */
static void check_emptied_in_place(const char *opts)
{
    enum { DATA = 512 * 1024 };
    g_autoptr(GRand) toss = g_rand_new_with_seed(7);
    RecFile *f = rec_image_new("a", opts, CAPACITY);
    BlockBackend *blk = rec_open_rw(f);
    image_write(blk, 0, DATA, 1);
    blk_unref(blk);
    qb_stbe64(f->data + QCOW2_HDR_COMPATIBLE, qb_ldbe64(f->data + QCOW2_HDR_COMPATIBLE) | 0x80);
    RecFile *before = rec_file_dup("before", f);
    blk = rec_open_rw(f);
    rec_start(f);
    make_empty(blk);
    g_assert_cmpint(f->length, <, DATA / 8);
    blk_unref(blk);
    rec_check(f, false);
    for (guint n = 0; n <= f->log->len; n++) {
        RecFile *crashed = rec_file_dup("crashed", before);
        rec_replay(crashed, f->log, n, n % 2 ? toss : NULL);
        rec_check(crashed, true);
        rec_file_free(crashed);
    }
    rec_file_free(before);
    rec_file_free(f);
}

static void test_empty_in_place(void)
{
    check_emptied_in_place("size=8M,cluster_size=512,refcount_bits=64");
    check_emptied_in_place("size=8M,cluster_size=4k");
}

static void test_empty_switch_fails(void)
{
    check_failed_switch(1);
}

static void test_empty_second_switch_fails(void)
{
    check_failed_switch(2);
}

/* All flushes fail from now on. */
static void fail_flushes(void *opaque)
{
    RecFile *f = opaque;
    f->on_flush = fail_flushes;
    f->fail[REC_FLUSH] = 1;
}

static void store_bitmaps(BlockBackend *blk, bool succeeds)
{
    GError *err = NULL;
    BDRV_GRAPH_GUARD();
    g_assert_true(qcow2_bitmaps_store(blk_bs(blk), &err) == succeeds);
    g_assert_true(!err == succeeds);
    g_clear_error(&err);
}

/* A bitmap that could not be stored may have clusters that its table on disk does not name any more: they
 * stay its own. */
static void test_empty_beside_bitmap(void)
{
    GError *err = NULL;
    RecFile *f = rec_image_new("a", "size=64M", CAPACITY);
    BlockBackend *blk = rec_open_rw(f);
    g_assert_true(bdrv_bitmap_add(blk_bs(blk), "b", 0, true, false, &err));
    image_write(blk, 0, C, 1);
    store_bitmaps(blk, true);
    g_assert_true(bdrv_bitmap_clear(blk_bs(blk), "b", &err));
    f->opaque = f;
    fail_flushes(f);
    store_bitmaps(blk, false);
    f->on_flush = NULL;
    f->fail[REC_FLUSH] = 0;
    make_empty(blk);
    image_write(blk, 0, 2 * MIB, 3);
    store_bitmaps(blk, true);
    image_expect(blk, 0, 2 * MIB, 3);
    blk_unref(blk);
    rec_check(f, true);
    rec_file_free(f);
}

/* The limits of the caches are those of the disk as it is, not as it was when it was opened. */
static void test_caches_follow_size(void)
{
    RecFile *f = rec_image_new("a", "size=64M", CAPACITY);
    BlockBackend *blk = rec_open_rw(f);
    Qcow2Cache *c = image_state(blk)->cache;
    uint64_t before = c->limit[QCOW2_TABLE_L2];
    shrink(blk, (int64_t)65536 * MIB);
    g_assert_cmpuint(c->limit[QCOW2_TABLE_L2], >=, before + 127 * C);
    shrink(blk, 64 * MIB);
    g_assert_cmpuint(c->limit[QCOW2_TABLE_L2], ==, before);
    blk_unref(blk);
    rec_check(f, false);
    rec_file_free(f);
}

static void *change_source(void *opaque)
{
    BlockBackend *blk = opaque;
    GError *err = NULL;
    g_assert_false(bdrv_bitmap_remove(blk_bs(blk), "b", &err));
    g_assert_error(err, QB_ERROR, EBUSY);
    g_clear_error(&err);
    g_assert_false(blk_truncate(blk, 32 * MIB, true, PREALLOC_MODE_OFF, false, &err));
    g_assert_error(err, QB_ERROR, EBUSY);
    g_clear_error(&err);
    return NULL;
}

/* Called by the flush of a merge, in the target. */
static void try_to_change_source(void *opaque)
{
    pthread_t thread;
    g_assert_true(qb_thread_start(&thread, "remover", change_source, opaque));
    pthread_join(thread, NULL);
}

/* The source of a merge from another node stays as it is until the merge is done. */
static void test_merge_keeps_source(void)
{
    GError *err = NULL;
    RecFile *f = rec_image_new("a", "size=64M", CAPACITY);
    RecFile *g = rec_image_new("b", "size=64M", CAPACITY);
    BlockBackend *target = rec_open_rw(f), *source = rec_open_rw(g);
    g_assert_true(bdrv_bitmap_add(blk_bs(target), "t", 0, true, false, &err));
    g_assert_true(bdrv_bitmap_add(blk_bs(source), "b", 0, true, false, &err));
    image_write(source, 0, C, 1);
    f->opaque = source;
    f->on_flush = try_to_change_source;
    g_assert_true(bdrv_bitmap_merge(blk_bs(target), "t", blk_bs(source), "b", &err));
    g_assert_true(!f->on_flush);
    int64_t at, bytes;
    g_assert_cmpint(bdrv_bitmap_next_dirty(blk_bs(target), "t", 0, &at, &bytes), ==, 1);
    g_assert_true(bdrv_bitmap_remove(blk_bs(source), "b", &err));
    blk_unref(target);
    blk_unref(source);
    rec_file_free(f);
    rec_file_free(g);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    rec_setup();
    g_test_add_func("/qcow2-resize/shrink-barriers", test_shrink_barriers);
    g_test_add_func("/qcow2-resize/shrink-finds-lone-entries", test_shrink_finds_lone_entries);
    g_test_add_func("/qcow2-resize/shrink-is-bounded", test_shrink_is_bounded);
    g_test_add_func("/qcow2-resize/tells-progress", test_tells_progress);
    g_test_add_func("/qcow2-resize/shrink-writes-no-tables", test_shrink_writes_no_tables);
    g_test_add_func("/qcow2-resize/grow-reads-zero", test_grow_reads_zero);
    g_test_add_func("/qcow2-resize/shrink-beside-allocations", test_shrink_beside_allocations);
    g_test_add_func("/qcow2-resize/empty-barriers", test_empty_barriers);
    g_test_add_func("/qcow2-resize/empty-is-smallest", test_empty_is_smallest);
    g_test_add_func("/qcow2-resize/empty-keeps-snapshot", test_empty_keeps_snapshot);
    g_test_add_func("/qcow2-resize/empty-beside-bitmap", test_empty_beside_bitmap);
    g_test_add_func("/qcow2-resize/empty-in-place", test_empty_in_place);
    g_test_add_func("/qcow2-resize/empty-switch-fails", test_empty_switch_fails);
    g_test_add_func("/qcow2-resize/empty-second-switch-fails", test_empty_second_switch_fails);
    g_test_add_func("/qcow2-resize/empty-without-room", test_empty_without_room);
    g_test_add_func("/qcow2-resize/caches-follow-size", test_caches_follow_size);
    g_test_add_func("/qcow2-resize/merge-keeps-source", test_merge_keeps_source);
    int ret = g_test_run();
    image_teardown();
    return ret;
}
