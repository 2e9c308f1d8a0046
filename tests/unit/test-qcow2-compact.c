/*
 * A shrink makes the file short: what moves towards the front, and that nobody notices.  Crashes
 * and errors in between are the crash and fault suites' (operations "shrink-moves...").
 *
 * SPDX-License-Identifier: MIT
 */
#include "qcow2-rec.h"

#include <fcntl.h>

enum { CAPACITY = 64 * MIB, C = 64 * KIB };

static void shrink(BlockBackend *blk, int64_t size)
{
    GError *err = NULL;
    bool ok = blk_truncate(blk, size, true, PREALLOC_MODE_OFF, false, &err);
    g_assert_no_error(err);
    g_assert_true(ok);
}

static uint64_t used_clusters(BlockBackend *blk, int64_t length)
{
    BlockDriverState *bs = blk_bs(blk);
    uint64_t used = 0;
    BDRV_GRAPH_GUARD();
    for (uint64_t pos = 0, count, n; pos < (uint64_t)length; pos += n) {
        g_assert_cmpint(qcow2_count_run(bs, pos, (uint64_t)length - pos, &count, &n), ==, 0);
        used += count ? n >> qcow2_state(bs)->cluster_bits : 0;
    }
    return used;
}

/* The file is as long as the clusters in it, or a 256th more: less is not worth moving. */
static void expect_dense(RecFile *f, BlockBackend *blk)
{
    int64_t used = (int64_t)used_clusters(blk, f->length) * image_state(blk)->cluster_size;
    g_assert_cmpint(f->length, >=, used);
    g_assert_cmpint(f->length - used, <=, f->length / 256);
}

static void check_and_free(RecFile *f, BlockBackend *blk)
{
    blk_unref(blk);
    rec_check(f, false);
    rec_file_free(f);
}

/* Two extents of 4 MiB, the second one first in the file. */
static BlockBackend *write_turned(RecFile *f)
{
    BlockBackend *blk = rec_open_rw(f);
    image_write(blk, 4 * MIB, 4 * MIB, 2);
    image_write(blk, 0, 4 * MIB, 1);
    g_assert_cmpint(blk_flush(blk), ==, 0);
    return blk;
}

static void check_extents(const char *opts)
{
    g_autofree char *all = g_strdup_printf("size=8M%s", opts);
    RecFile *f = rec_image_new("a", all, CAPACITY);
    BlockBackend *blk = write_turned(f);
    int64_t before = f->length;
    shrink(blk, 4 * MIB);
    g_assert_cmpint(f->length, <, before * 3 / 4);
    expect_dense(f, blk);
    image_expect(blk, 0, 4 * MIB, 1);
    image_write(blk, MIB, 2 * MIB, 3);
    blk_unref(blk);
    blk = rec_open_rw(f);
    image_expect(blk, 0, MIB, 1);
    image_expect(blk, MIB, 2 * MIB, 3);
    image_expect(blk, 3 * MIB, MIB, 1);
    check_and_free(f, blk);
}

/* With small clusters tables of all kinds lie among the data, and move, too. */
static void test_extents(void)
{
    check_extents("");
    check_extents(",compat=0.10,cluster_size=4k");
    check_extents(",extended_l2=on,cluster_size=16k");
    check_extents(",refcount_bits=1,cluster_size=2k");
    check_extents(",refcount_bits=64,cluster_size=512");
    check_extents(",lazy_refcounts=on,cluster_size=8k");
}

/* Parts of clusters, zeroes with and without a host cluster, what is not allocated. */
static void test_subclusters(void)
{
    RecFile *f = rec_image_new("a", "size=8M,extended_l2=on", CAPACITY);
    BlockBackend *blk = rec_open_rw(f);
    image_write(blk, 4 * MIB, 4 * MIB, 2);
    for (int i = 0; i < 32; i++) {
        image_write(blk, i * C + 4 * KIB, 2 * KIB, 1 + i);
        g_assert_cmpint(blk_pwrite_zeroes(blk, i * C + 6 * KIB, 4 * KIB, 0), ==, 0);
    }
    shrink(blk, 4 * MIB);
    expect_dense(f, blk);
    for (int i = 0; i < 32; i++) {
        image_expect(blk, i * C, 4 * KIB, 0);
        image_expect(blk, i * C + 4 * KIB, 2 * KIB, 1 + i);
        image_expect(blk, i * C + 6 * KIB, C - 6 * KIB, 0);
    }
    check_and_free(f, blk);
}

/* Clusters whose content is a hole of the file move to where something else was. */
static void test_holes(void)
{
    image_create("holes", "size=8M");
    BlockBackend *blk = image_open_rw("holes");
    image_write(blk, 4 * MIB, 4 * MIB, 2);
    image_write(blk, 0, 4 * MIB, 1);
    uint64_t host = qcow2_entry_host(image_entry(blk, MIB));
    g_assert_cmpuint(qcow2_entry_host(image_entry(blk, 3 * MIB - C)), ==, host + 2 * MIB - C);
    blk_unref(blk);
    g_autofree char *path = image_path("holes");
    int fd = open(path, O_RDWR);
    g_assert_cmpint(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)host, 2 * MIB), ==,
                    0);
    close(fd);
    blk = image_open_rw("holes");
    shrink(blk, 4 * MIB);
    g_assert_cmpuint(qcow2_entry_host(image_entry(blk, MIB)), !=, host);
    image_expect(blk, 0, MIB, 1);
    image_expect(blk, MIB, 2 * MIB, 0);
    image_expect(blk, 3 * MIB, MIB, 1);
    blk_unref(blk);
    image_check("holes");
}

/* The L1 was made longer, behind all else. */
static void test_l1(void)
{
    RecFile *f = rec_image_new("a", "size=1M,cluster_size=512", CAPACITY);
    BlockBackend *blk = rec_open_rw(f);
    image_write(blk, 512 * KIB, 512 * KIB, 2);
    shrink(blk, 32 * MIB); /* a growth */
    uint64_t l1 = image_state(blk)->header.l1_offset;
    image_write(blk, 0, 8 * KIB, 1);
    shrink(blk, 64 * KIB);
    g_assert_cmpuint(image_state(blk)->header.l1_offset, <, l1);
    expect_dense(f, blk);
    image_expect(blk, 0, 8 * KIB, 1);
    check_and_free(f, blk);
}

/* What lies at the end is in a snapshot, too: all its entries change, its count comes along. */
static void test_shared(void)
{
    GError *err = NULL;
    RecFile *f = rec_image_new("a", "size=8M", CAPACITY);
    BlockBackend *blk = write_turned(f);
    g_assert_cmpint(blk_pdiscard(blk, 4 * MIB, 4 * MIB), ==, 0);
    g_assert_cmpint(blk_flush(blk), ==, 0);
    g_assert_true(bdrv_snapshot_create(blk_bs(blk), "s", &err));
    image_write(blk, 0, 4 * KIB, 5); /* a table and a cluster of its own */
    image_write(blk, 7 * MIB, 512 * KIB, 6);
    shrink(blk, 4 * MIB);
    g_assert_cmpint(f->length, <, 6 * MIB);
    image_expect(blk, 0, 4 * KIB, 5);
    image_expect(blk, 4 * KIB, 4 * MIB - 4 * KIB, 1);
    g_assert_true(bdrv_snapshot_apply(blk_bs(blk), "s", &err));
    image_expect(blk, 0, 4 * MIB, 1);
    image_expect(blk, 4 * MIB, 4 * MIB, 0);
    check_and_free(f, blk);
}

/* A cluster of half noise; @value tells them apart. */
static void fill_noise(uint8_t *buf, unsigned value)
{
    g_autoptr(GRand) rand = g_rand_new_with_seed(value);
    memset(buf, (int)(value & 0xff), C);
    for (int i = 0; i < C / 2; i++) {
        buf[i] = (uint8_t)g_rand_int(rand);
    }
}

/* Streams that lie in two clusters each: the whole row moves. What was unpacked before from the
 * places it moves to is not taken for it. */
static void test_compressed(void)
{
    g_autofree uint8_t *buf = g_malloc(C), *found = g_malloc(C);
    RecFile *f = rec_image_new("a", "size=8M", CAPACITY);
    BlockBackend *blk = rec_open_rw(f);
    for (unsigned i = 0; i < 128; i++) { /* the last ones first */
        unsigned at = 127 - i;
        fill_noise(buf, at);
        g_assert_cmpint(blk_pwrite(blk, (int64_t)at * C, C, buf, BDRV_REQ_COMPRESSED), ==, 0);
        g_assert_cmpint(blk_pread(blk, (int64_t)at * C, 512, found, 0), ==, 0);
    }
    int64_t before = f->length;
    shrink(blk, 2 * MIB);
    g_assert_cmpint(f->length, <, before / 2);
    for (unsigned i = 0; i < 32; i++) {
        fill_noise(buf, i);
        g_assert_cmpint(blk_pread(blk, (int64_t)i * C, 512, found, 0), ==, 0);
        g_assert_cmpmem(buf, 512, found, 512);
        g_assert_cmpint(blk_pread(blk, (int64_t)i * C, C, found, 0), ==, 0);
        g_assert_cmpmem(buf, C, found, C);
    }
    check_and_free(f, blk);
}

/* A cluster that is counted, and that nobody names, stays: nothing is copied that would not help. */
static void test_stuck(void)
{
    RecFile *f = rec_image_new("a", "size=8M", CAPACITY);
    BlockBackend *blk = write_turned(f);
    g_assert_cmpint(qcow2_alloc_clusters(blk_bs(blk), C), >, 0);
    g_assert_cmpint(blk_flush(blk), ==, 0);
    int64_t before = f->length;
    rec_start(f);
    shrink(blk, 4 * MIB);
    g_assert_cmpint(f->length, >=, before);
    for (guint i = 0; i < f->log->len; i++) {
        const RecOp *op = &g_array_index(f->log, RecOp, i);
        g_assert_true(op->kind != REC_WRITE || !op->data || op->bytes <= C);
    }
    image_expect(blk, 0, 4 * MIB, 1);
    blk_unref(blk);
    rec_check(f, true);
    rec_file_free(f);
}

/* A device is not cut, but what lies at its end moves all the same. */
static void test_device(void)
{
    uint64_t end;
    RecFile *f = rec_image_new("a", "size=8M", CAPACITY);
    f->device = true;
    f->length = 16 * MIB;
    BlockBackend *blk = write_turned(f);
    shrink(blk, 4 * MIB);
    g_assert_cmpint(f->length, ==, 16 * MIB);
    g_assert_cmpint(qcow2_last_used_end(blk_bs(blk), &end), ==, 0);
    g_assert_cmpuint(end, <, 5 * MIB);
    image_expect(blk, 0, 4 * MIB, 1);
    for (uint64_t i = end; i < 16 * MIB; i++) {
        g_assert_cmpuint(f->data[i], ==, 0);
    }
    check_and_free(f, blk);
}

/* ---------------------------------------------------------------- a shrink in a busy process */

typedef struct Busy {
    BlockBackend *blk;
    _Atomic(bool) stop;
} Busy;

/* Nobody writes there. */
static void *read_all(void *opaque)
{
    Busy *b = opaque;
    while (!b->stop) {
        image_expect(b->blk, MIB, 2 * MIB, 1);
    }
    return NULL;
}

/* In place, cluster by cluster, each time another value. */
static void *overwrite(void *opaque)
{
    Busy *b = opaque;
    for (int value = 2; !b->stop; value = 2 + value % 100) {
        for (int i = 0; i < 16; i++) {
            image_write(b->blk, i * C + 512, 4 * KIB, value);
            image_expect(b->blk, i * C + 512, 4 * KIB, value);
        }
    }
    return NULL;
}

/* Frees and allocates. */
static void *churn(void *opaque)
{
    Busy *b = opaque;
    for (int value = 2; !b->stop; value = 2 + value % 100) {
        g_assert_cmpint(blk_pdiscard(b->blk, 3 * MIB, 8 * C), ==, 0);
        image_expect(b->blk, 3 * MIB, 8 * C, 0);
        image_write(b->blk, 3 * MIB, 8 * C, value);
        image_expect(b->blk, 3 * MIB, 8 * C, value);
    }
    return NULL;
}

static void shrink_among(RecFile *f, void *(*const fn[])(void *), int n)
{
    Busy b = {.blk = write_turned(f)};
    pthread_t threads[4];
    f->flush_us = 1000;
    for (int i = 0; i < n; i++) {
        g_assert_true(qb_thread_start(&threads[i], "busy", fn[i], &b));
    }
    g_usleep(3000);
    shrink(b.blk, 4 * MIB);
    g_usleep(3000);
    b.stop = true;
    for (int i = 0; i < n; i++) {
        pthread_join(threads[i], NULL);
    }
    f->flush_us = 0;
    image_expect(b.blk, MIB, 2 * MIB, 1);
    image_expect(b.blk, 4 * MIB - C, C, 1);
    blk_unref(b.blk);
}

static void test_live(void)
{
    static void *(*const all[])(void *) = {read_all, overwrite, churn, read_all};
    for (int round = 0; round < 4; round++) {
        RecFile *f = rec_image_new("a", "size=8M", CAPACITY);
        shrink_among(f, all, 4);
        rec_check(f, false);
        rec_file_free(f);
    }
}

/* Readers and writers in place keep no cluster where it is: their requests are waited for.  But one
 * that is kept from running while it has looked up a cluster keeps what the shrink frees in
 * quarantine, so that there is nothing to move to: not each time. */
static void test_live_moves(void)
{
    static void *(*const quiet[])(void *) = {read_all, overwrite};
    bool moved = false;
    for (int round = 0; round < 20 && !moved; round++) {
        RecFile *f = rec_image_new("a", "size=8M", CAPACITY);
        shrink_among(f, quiet, 2);
        rec_check(f, false);
        moved = f->length < 5 * MIB;
        rec_file_free(f);
    }
    g_assert_true(moved);
}

/* Requests over both sides of the cut wait for the truncation, which must not wait for them. */
typedef struct Straddler {
    RecFile *f;
    BlockBackend *blk;
    pthread_t thread;
    bool begun;
} Straddler;

static void *zero_all(void *opaque)
{
    Straddler *st = opaque;
    (void)blk_pwrite_zeroes(st->blk, 0, 8 * MIB, 0); /* too long when its turn comes */
    return NULL;
}

static void begin_straddler(void *opaque)
{
    Straddler *st = opaque;
    st->begun = qb_thread_start(&st->thread, "straddler", zero_all, st);
    g_usleep(20000); /* it is in the range lock by then */
}

static void *write_one(void *opaque)
{
    image_write(opaque, MIB, 4 * KIB, 9);
    return NULL;
}

static void *shrink_half(void *opaque)
{
    shrink(opaque, 4 * MIB);
    return NULL;
}

/* Data are on their way into a cluster that is about to move: they are waited for, and move with it. */
static void test_move_waits_for_write(void)
{
    pthread_t writer, shrinker;
    image_create("move", "size=8M");
    BlockBackend *blk = image_open_rw("move");
    image_write(blk, 4 * MIB, 4 * MIB, 2);
    image_write(blk, 0, 4 * MIB, 1);
    blk_unref(blk);
    blk = image_open_debug("move", "");
    uint64_t host = qcow2_entry_host(image_entry(blk, MIB));
    g_assert_cmpint(bdrv_debug_breakpoint(blk_bs(blk), "write_aio", "A"), ==, 0);
    g_assert_true(qb_thread_start(&writer, "writer", write_one, blk));
    while (!bdrv_debug_is_suspended(blk_bs(blk), "A")) {
        g_usleep(200);
    }
    g_assert_true(qb_thread_start(&shrinker, "shrinker", shrink_half, blk));
    g_usleep(50000);
    g_assert_cmpint(bdrv_debug_resume(blk_bs(blk), "A"), ==, 0);
    pthread_join(writer, NULL);
    pthread_join(shrinker, NULL);
    g_assert_cmpuint(qcow2_entry_host(image_entry(blk, MIB)), !=, host);
    image_expect(blk, MIB, 4 * KIB, 9);
    image_expect(blk, MIB + 4 * KIB, MIB, 1);
    blk_unref(blk);
    image_check("move");
}

static void test_straddler(void)
{
    RecFile *f = rec_image_new("a", "size=8M", CAPACITY);
    Straddler st = {.f = f, .blk = write_turned(f)};
    f->opaque = &st;
    f->on_flush = begin_straddler;
    shrink(st.blk, 4 * MIB);
    g_assert_true(st.begun);
    pthread_join(st.thread, NULL);
    g_assert_cmpint(f->length, <, 5 * MIB);
    check_and_free(f, st.blk);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    rec_setup();
    g_test_add_func("/qcow2-compact/extents", test_extents);
    g_test_add_func("/qcow2-compact/subclusters", test_subclusters);
    g_test_add_func("/qcow2-compact/holes", test_holes);
    g_test_add_func("/qcow2-compact/l1", test_l1);
    g_test_add_func("/qcow2-compact/shared", test_shared);
    g_test_add_func("/qcow2-compact/compressed", test_compressed);
    g_test_add_func("/qcow2-compact/stuck", test_stuck);
    g_test_add_func("/qcow2-compact/device", test_device);
    g_test_add_func("/qcow2-compact/live", test_live);
    g_test_add_func("/qcow2-compact/live-moves", test_live_moves);
    g_test_add_func("/qcow2-compact/move-waits-for-write", test_move_waits_for_write);
    g_test_add_func("/qcow2-compact/straddler", test_straddler);
    int ret = g_test_run();
    image_teardown();
    return ret;
}
