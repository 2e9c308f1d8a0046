/*
 * What single requests do to the map of a qcow2 image: the state table of zero and discard,
 * allocation that does not happen, races of writes with discards, corrupt entries, compressed
 * writes and VM state.
 *
 * SPDX-License-Identifier: MIT
 */
#include "qcow2-image.h"

enum { C = 64 * KIB };

/* --- the state table --- */

typedef enum Before { UNALLOCATED, PLAIN, ALLOC, DATA, STREAM } Before;
typedef enum Op { ZERO_KEEP, ZERO_UNMAP, DISCARD } Op;

typedef struct Case {
    Before before;
    Op op;
    Qcow2ClusterType after, after_over_backing, after_no_unref;
} Case;

static const Case state_table[] = {
    {UNALLOCATED, ZERO_KEEP, QCOW2_UNALLOCATED, QCOW2_ZERO_PLAIN, QCOW2_UNALLOCATED},
    {UNALLOCATED, ZERO_UNMAP, QCOW2_UNALLOCATED, QCOW2_ZERO_PLAIN, QCOW2_UNALLOCATED},
    {UNALLOCATED, DISCARD, QCOW2_UNALLOCATED, QCOW2_ZERO_PLAIN, QCOW2_UNALLOCATED},
    {PLAIN, ZERO_KEEP, QCOW2_ZERO_PLAIN, QCOW2_ZERO_PLAIN, QCOW2_ZERO_PLAIN},
    {PLAIN, ZERO_UNMAP, QCOW2_UNALLOCATED, QCOW2_ZERO_PLAIN, QCOW2_ZERO_PLAIN},
    {PLAIN, DISCARD, QCOW2_UNALLOCATED, QCOW2_ZERO_PLAIN, QCOW2_ZERO_PLAIN},
    {ALLOC, ZERO_KEEP, QCOW2_ZERO_ALLOC, QCOW2_ZERO_ALLOC, QCOW2_ZERO_ALLOC},
    {ALLOC, ZERO_UNMAP, QCOW2_UNALLOCATED, QCOW2_ZERO_PLAIN, QCOW2_ZERO_ALLOC},
    {ALLOC, DISCARD, QCOW2_UNALLOCATED, QCOW2_ZERO_PLAIN, QCOW2_ZERO_ALLOC},
    {DATA, ZERO_KEEP, QCOW2_ZERO_ALLOC, QCOW2_ZERO_ALLOC, QCOW2_ZERO_ALLOC},
    {DATA, ZERO_UNMAP, QCOW2_UNALLOCATED, QCOW2_ZERO_PLAIN, QCOW2_ZERO_ALLOC},
    {DATA, DISCARD, QCOW2_UNALLOCATED, QCOW2_ZERO_PLAIN, QCOW2_ZERO_ALLOC},
    {STREAM, ZERO_KEEP, QCOW2_ZERO_PLAIN, QCOW2_ZERO_PLAIN, QCOW2_ZERO_PLAIN},
    {STREAM, ZERO_UNMAP, QCOW2_UNALLOCATED, QCOW2_ZERO_PLAIN, QCOW2_ZERO_PLAIN},
    {STREAM, DISCARD, QCOW2_UNALLOCATED, QCOW2_ZERO_PLAIN, QCOW2_ZERO_PLAIN},
};

static void put_state(BlockBackend *blk, int64_t offset, Before before)
{
    switch (before) {
    case UNALLOCATED:
        return;
    case STREAM:
    case PLAIN:
        image_write_compressed(blk, offset, C, 3, 0);
        break;
    default:
        image_write(blk, offset, C, 3);
    }
    if (before == PLAIN || before == ALLOC) { /* a stream is released, a cluster kept */
        g_assert_cmpint(blk_pwrite_zeroes(blk, offset, C, 0), ==, 0);
    }
}

static void apply_op(BlockBackend *blk, int64_t offset, Op op)
{
    int flags = op == ZERO_UNMAP ? BDRV_REQ_MAY_UNMAP : 0;
    int ret = op == DISCARD ? blk_pdiscard(blk, offset, C)
                            : blk_pwrite_zeroes(blk, offset, C, flags);
    g_assert_cmpint(ret, ==, 0);
}

static void create_over_base(const char *opts)
{
    g_autofree char *base = image_path("base");
    g_autofree char *all = g_strdup_printf("%s,backing_file=%s,backing_fmt=qcow2", opts, base);
    image_create("base", "size=4M");
    BlockBackend *blk = image_open_rw("base");
    image_write(blk, 0, 4 * MIB, 0xbb);
    blk_unref(blk);
    image_create("image", all);
}

static void check_state_table(bool backing, bool no_unref)
{
    if (backing) {
        create_over_base("size=4M");
    } else {
        image_create("image", "size=4M");
    }
    BlockBackend *blk = image_open("image", no_unref ? "discard=unmap,discard-no-unref=on"
                                                     : "discard=unmap", BDRV_O_RDWR);
    for (size_t i = 0; i < G_N_ELEMENTS(state_table); i++) {
        const Case *c = &state_table[i];
        int64_t offset = (int64_t)i * C;
        put_state(blk, offset, c->before);
        apply_op(blk, offset, c->op);
        Qcow2ClusterType want = no_unref  ? c->after_no_unref
                                : backing ? c->after_over_backing
                                          : c->after;
        Qcow2ClusterType got = image_type(blk, (uint64_t)offset);
        if (got != want) {
            g_error("case %zu: type %d, not %d", i, (int)got, (int)want);
        }
        image_expect(blk, offset, C, 0);
    }
    blk_unref(blk);
    image_check("image");
}

static void test_state_table(void)
{
    check_state_table(false, false);
}

static void test_state_table_backing(void)
{
    check_state_table(true, false);
}

static void test_state_table_no_unref(void)
{
    check_state_table(false, true);
}

/* Without discard=unmap a discard does nothing and a zero write keeps its cluster. */
static void test_discard_ignored(void)
{
    image_create("image", "size=1M");
    BlockBackend *blk = image_open("image", "discard=ignore", BDRV_O_RDWR);
    image_write(blk, 0, 2 * C, 3);
    g_assert_cmpint(blk_pdiscard(blk, 0, C), ==, 0);
    image_expect(blk, 0, C, 3);
    g_assert_cmpint(blk_pwrite_zeroes(blk, C, C, BDRV_REQ_MAY_UNMAP), ==, 0);
    g_assert_cmpint(image_type(blk, C), ==, QCOW2_ZERO_ALLOC);
    blk_unref(blk);
}

/* Version 2: 0 without a backing file; with one discards are ignored and zeroes written out. */
static void test_version_2(void)
{
    image_create("image", "size=4M,compat=0.10");
    BlockBackend *blk = image_open_rw("image");
    image_write(blk, 0, 3 * C, 3);
    g_assert_cmpint(blk_pdiscard(blk, 0, C), ==, 0);
    g_assert_cmpint(blk_pwrite_zeroes(blk, C, C, 0), ==, 0);
    g_assert_cmphex(image_entry(blk, 0).entry, ==, 0);
    g_assert_cmphex(image_entry(blk, C).entry, ==, 0);
    image_expect(blk, 0, 2 * C, 0);
    image_expect(blk, 2 * C, C, 3);
    blk_unref(blk);
    image_check("image");
    create_over_base("size=4M,compat=0.10");
    blk = image_open_rw("image");
    image_write(blk, 0, C, 3);
    g_assert_cmpint(blk_pdiscard(blk, 0, C), ==, 0);
    image_expect(blk, 0, C, 3);
    g_assert_cmpint(blk_pwrite_zeroes(blk, 0, 2 * C, BDRV_REQ_NO_FALLBACK), ==, -ENOTSUP);
    g_assert_cmpint(blk_pwrite_zeroes(blk, 0, 2 * C, 0), ==, 0);
    g_assert_cmpint(image_type(blk, 0), ==, QCOW2_NORMAL);
    image_expect(blk, 0, 2 * C, 0);
    image_expect(blk, 2 * C, C, 0xbb);
    blk_unref(blk);
    image_check("image");
}

/* Parts of subclusters, parts of streams. */
static void test_subclusters(void)
{
    enum { SC = 2 * KIB };
    create_over_base("size=4M,extended_l2=on");
    BlockBackend *blk = image_open_rw("image");
    image_write(blk, 0, SC, 3);
    g_assert_cmphex(image_entry(blk, 0).bitmap, ==, 1);
    g_assert_cmpint(blk_pwrite_zeroes(blk, SC, 3 * SC, 0), ==, 0);
    g_assert_cmphex(image_entry(blk, 0).bitmap, ==, 0xe00000001);
    image_write(blk, 2 * SC + 100, 10, 4);
    g_assert_cmphex(image_entry(blk, 0).bitmap, ==, 0xa00000005);
    image_expect(blk, 2 * SC, 100, 0);
    image_expect(blk, 2 * SC + 100, 10, 4);
    image_expect(blk, 2 * SC + 110, SC - 110, 0);
    image_expect(blk, 4 * SC, C - 4 * SC, 0xbb);
    g_assert_cmpint(blk_pwrite_zeroes(blk, 0, C, BDRV_REQ_MAY_UNMAP), ==, 0);
    g_assert_cmphex(image_entry(blk, 0).entry, ==, 0);
    g_assert_cmphex(image_entry(blk, 0).bitmap, ==, 0xffffffff00000000);
    image_write_compressed(blk, C, C, 5, 0);
    g_assert_cmpint(blk_pwrite_zeroes(blk, C + SC, C, 0), ==, 0);
    image_expect(blk, C, SC, 5);
    image_expect(blk, C + SC, C, 0);
    image_expect(blk, 2 * C + SC, C - SC, 0xbb);
    blk_unref(blk);
    image_check("image");
}

/* Discards of parts change bits; the last one takes the cluster along. */
static void check_partial_discards(bool backed)
{
    enum { SC = 2 * KIB };
    if (backed) {
        create_over_base("size=4M,extended_l2=on");
    } else {
        image_create("image", "size=4M,extended_l2=on");
    }
    BlockBackend *blk = image_open_rw("image");
    image_write(blk, 0, 2 * C, 3);
    g_assert_cmpint(blk_pdiscard(blk, SC + 512, C - SC - 512), ==, 0);
    g_assert_cmphex(image_entry(blk, 0).bitmap, ==, 0xfffffffc00000003);
    image_expect(blk, 0, 2 * SC, 3);
    image_expect(blk, 2 * SC, C - 2 * SC, 0);
    g_assert_cmpint(blk_pdiscard(blk, 0, 2 * SC), ==, 0);
    g_assert_cmphex(image_entry(blk, 0).entry, ==, 0);
    g_assert_cmphex(image_entry(blk, 0).bitmap, ==, backed ? 0xffffffff00000000 : 0);
    image_write_compressed(blk, 2 * C, C, 5, 0);
    g_assert_cmpint(blk_pdiscard(blk, C, C + SC), ==, 0);
    image_expect(blk, 0, 2 * C, 0);
    image_expect(blk, 2 * C, C, 5);
    image_expect(blk, 3 * C, C, backed ? 0xbb : 0);
    blk_unref(blk);
    image_check("image");
}

static void test_partial_discards(void)
{
    check_partial_discards(false);
    check_partial_discards(true);
}

/* The hole is no larger than what was asked for. */
static void test_partial_no_unref(void)
{
    enum { SC = 2 * KIB };
    image_create("image", "size=4M,extended_l2=on");
    BlockBackend *blk = image_open("image", "discard=unmap,discard-no-unref=on", BDRV_O_RDWR);
    image_write(blk, 0, 2 * C, 3);
    g_assert_cmpint(blk_pwrite_zeroes(blk, SC, SC, BDRV_REQ_MAY_UNMAP), ==, 0);
    g_assert_cmpint(blk_pdiscard(blk, C - 4 * SC, C), ==, 0);
    image_expect(blk, 0, SC, 3);
    image_expect(blk, SC, SC, 0);
    image_expect(blk, 2 * SC, C - 6 * SC, 3);
    image_expect(blk, C - 4 * SC, C, 0);
    image_expect(blk, 2 * C - 4 * SC, 4 * SC, 3);
    blk_unref(blk);
    image_check("image");
}

/* --- allocation that does not happen --- */

static void test_nothing_from_nothing(void)
{
    image_create("image", "size=1T");
    BlockBackend *blk = image_open_rw("image");
    int64_t before = bdrv_getlength(blk_bs(blk)->file->bs);
    uint64_t started = qb_now_ns();
    g_assert_cmpint(blk_pdiscard(blk, 0, (int64_t)1 << 40), ==, 0);
    g_assert_cmpint(blk_pwrite_zeroes(blk, 0, (int64_t)1 << 40, BDRV_REQ_MAY_UNMAP), ==, 0);
    g_assert_cmpint(blk_pwrite_zeroes(blk, 12345, ((int64_t)1 << 40) - 20000, 0), ==, 0);
    g_assert_cmpuint((qb_now_ns() - started) / 1000000, <, 3000);
    g_assert_true(qcow2_is_clean(image_state(blk)));
    g_assert_cmpint(bdrv_getlength(blk_bs(blk)->file->bs), ==, before);
    blk_unref(blk);
    image_check("image");
}

/* Zeroes that are there already change no entry. */
static void test_unchanged_is_not_written(void)
{
    image_create("image", "size=1M");
    BlockBackend *blk = image_open_rw("image");
    image_write(blk, 0, C, 1);
    g_assert_cmpint(blk_pwrite_zeroes(blk, 0, C, 0), ==, 0);
    g_assert_cmpint(blk_flush(blk), ==, 0);
    g_assert_cmpint(blk_flush(blk), ==, 0);
    g_assert_true(qcow2_is_clean(image_state(blk)));
    g_assert_cmpint(blk_pwrite_zeroes(blk, 0, 4 * C, 0), ==, 0);
    g_assert_cmpint(blk_pwrite_zeroes(blk, 100, C, 0), ==, 0);
    g_assert_true(qcow2_is_clean(image_state(blk)));
    blk_unref(blk);
}

/* A part of a cluster whose rest is zero too: the entry says it, no data are written. */
static void test_zero_part(void)
{
    create_over_base("size=4M");
    BlockBackend *blk = image_open_rw("image");
    g_assert_cmpint(blk_pwrite_zeroes(blk, 100, C - 100, 0), ==, 0);
    g_assert_cmpint(image_type(blk, 0), ==, QCOW2_NORMAL); /* the first 100 bytes come from below */
    image_expect(blk, 0, 100, 0xbb);
    image_expect(blk, 100, C - 100, 0);
    g_assert_cmpint(blk_pwrite_zeroes(blk, C, C, 0), ==, 0);
    g_assert_cmpint(blk_pwrite_zeroes(blk, C + 5, 7, 0), ==, 0);
    g_assert_cmpint(image_type(blk, C), ==, QCOW2_ZERO_PLAIN);
    blk_unref(blk);
    image_check("image");
}

/* Nothing is below: what is discarded is simply not there. */
static void test_unallocated_again(void)
{
    image_create("image", "size=1M,cluster_size=512");
    BlockBackend *blk = image_open("image", "discard=unmap", BDRV_O_RDWR);
    image_write(blk, 0, 64 * KIB, 1);
    g_assert_cmpint(blk_pdiscard(blk, 512, 512), ==, 0);
    g_assert_cmphex(image_entry(blk, 512).entry, ==, 0);
    g_assert_cmpint(blk_pwrite_zeroes(blk, 1024, 512, BDRV_REQ_MAY_UNMAP), ==, 0);
    g_assert_cmphex(image_entry(blk, 1024).entry, ==, 0);
    g_assert_cmpint(blk_pwrite_zeroes(blk, 32 * KIB, 32 * KIB, BDRV_REQ_MAY_UNMAP), ==, 0);
    g_assert_cmphex(qcow2_l1_get(image_state(blk), 1), ==, 0); /* nor the table */
    image_expect(blk, 0, 512, 1);
    image_expect(blk, 512, 1024, 0);
    image_expect(blk, 32 * KIB, 32 * KIB, 0);
    blk_unref(blk);
    image_check("image");
}

/* A backing file will come: what reads as zeroes says so, also where nothing was allocated. */
static void check_backing_later(int flags)
{
    BlockBackend *blk = image_open("image", "discard=unmap", BDRV_O_RDWR | flags);
    bool version2 = image_state(blk)->version < 3;
    image_write(blk, 0, 2 * C, 1);
    g_assert_cmpint(blk_pdiscard(blk, 0, C), ==, 0);
    image_expect(blk, 0, C, version2 ? 1 : 0); /* a discard is advice */
    g_assert_cmpint(blk_pwrite_zeroes(blk, C, 2 * C, BDRV_REQ_MAY_UNMAP), ==, 0);
    image_expect(blk, C, 2 * C, 0);
    for (uint64_t at = 0; at < 3 * C; at += C) {
        Qcow2ClusterType want = version2 ? QCOW2_NORMAL : QCOW2_ZERO_PLAIN;
        g_assert_cmpint(image_type(blk, at), ==, want);
    }
    blk_unref(blk);
    image_check("image");
}

static void test_backing_later(void)
{
    static const char *const shapes[] = {"size=1M", "size=1M,compat=0.10", "size=1M,extended_l2=on"};
    for (size_t i = 0; i < G_N_ELEMENTS(shapes); i++) {
        image_create("image", shapes[i]);
        check_backing_later(BDRV_O_BACKING_LATER);
    }
    create_over_base("size=1M"); /* named, but not attached */
    check_backing_later(BDRV_O_NO_BACKING);
}

/* A full discard of all that a table maps gives the table back, too. */
static void test_table_dropped(void)
{
    image_create("image", "size=1M,cluster_size=512");
    BlockBackend *blk = image_open_rw("image");
    image_write(blk, 0, MIB, 1);
    bdrv_graph_rdlock();
    g_assert_cmpint(qcow2_discard_clusters(blk_bs(blk), 10 * KIB, MIB - 10 * KIB,
                                           QCOW2_DISCARD_FULL, QCOW2_DISCARD_ALWAYS),
                    ==, 0);
    bdrv_graph_rdunlock();
    g_assert_cmphex(qcow2_l1_get(image_state(blk), 0), !=, 0);
    for (uint64_t i = 1; i < 32; i++) {
        g_assert_cmphex(qcow2_l1_get(image_state(blk), i), ==, 0);
    }
    image_expect(blk, 0, 10 * KIB, 1);
    image_expect(blk, 10 * KIB, MIB - 10 * KIB, 0);
    blk_unref(blk);
    image_check("image");
}

/* --- races, made to happen with breakpoints --- */

typedef struct Racer {
    pthread_t thread;
    BlockBackend *blk;
    int64_t offset, bytes;
    int value; /* -1: discard */
} Racer;

static void *race(void *opaque)
{
    Racer *r = opaque;
    if (r->value < 0) {
        g_assert_cmpint(blk_pdiscard(r->blk, r->offset, r->bytes), ==, 0);
    } else {
        image_write(r->blk, r->offset, r->bytes, r->value);
    }
    return NULL;
}

static void race_start(Racer *r, BlockBackend *blk, int64_t offset, int64_t bytes, int value)
{
    *r = (Racer){.blk = blk, .offset = offset, .bytes = bytes, .value = value};
    g_assert_true(qb_thread_start(&r->thread, "racer", race, r));
}

static void stop_at(BlockBackend *blk, const char *event)
{
    g_assert_cmpint(bdrv_debug_breakpoint(blk_bs(blk), event, "A"), ==, 0);
}

static void wait_stopped(BlockBackend *blk)
{
    for (int i = 0; i < 5000 && !bdrv_debug_is_suspended(blk_bs(blk), "A"); i++) {
        g_usleep(1000);
    }
    g_assert_true(bdrv_debug_is_suspended(blk_bs(blk), "A"));
}

static void resume(BlockBackend *blk)
{
    g_assert_cmpint(bdrv_debug_resume(blk_bs(blk), "A"), ==, 0);
}

/* A write into a preallocated zero cluster is under way when the cluster is discarded: the discard
 * comes after it, and nobody else gets the cluster. */
static void test_write_zero_alloc_against_discard(void)
{
    Racer writer, discarder;
    image_create("image", "size=1M");
    BlockBackend *blk = image_open_debug("image", "");
    image_write(blk, 0, C, 1);
    g_assert_cmpint(blk_pwrite_zeroes(blk, 0, C, 0), ==, 0);
    stop_at(blk, "write_aio");
    race_start(&writer, blk, 0, C, 5);
    wait_stopped(blk);
    race_start(&discarder, blk, 0, C, -1);
    g_usleep(30000);
    resume(blk);
    pthread_join(writer.thread, NULL);
    pthread_join(discarder.thread, NULL);
    image_write(blk, 8 * C, C, 9);
    image_expect(blk, 0, C, 0);
    image_expect(blk, 8 * C, C, 9);
    blk_unref(blk);
    image_check("image");
}

/* A write in place is under way when its cluster is discarded and somebody needs a new one: the
 * cluster is not given out before the write has ended, whatever is flushed meanwhile. */
static void test_write_in_place_against_discard(void)
{
    Racer writer;
    image_create("image", "size=1M");
    BlockBackend *blk = image_open_debug("image", "");
    image_write(blk, 0, C, 1);
    uint64_t host = qcow2_entry_host(image_entry(blk, 0));
    stop_at(blk, "write_aio");
    race_start(&writer, blk, 0, C, 5);
    wait_stopped(blk);
    g_assert_cmpint(blk_pdiscard(blk, 0, C), ==, 0); /* does not wait for the writer */
    g_assert_cmpint(blk_flush(blk), ==, 0);
    image_write(blk, 8 * C, C, 9);
    g_assert_cmphex(qcow2_entry_host(image_entry(blk, 8 * C)), !=, host);
    resume(blk);
    pthread_join(writer.thread, NULL);
    image_expect(blk, 8 * C, C, 9);
    image_expect(blk, 0, C, 0);
    g_assert_cmpint(blk_flush(blk), ==, 0);
    image_write(blk, 12 * C, C, 7); /* now it may be used */
    g_assert_cmphex(qcow2_entry_host(image_entry(blk, 12 * C)), ==, host);
    blk_unref(blk);
    image_check("image");
}

/* A zero write that keeps the cluster waits for a write that is under way there. */
static void *zero_keep(void *opaque)
{
    g_assert_cmpint(blk_pwrite_zeroes(opaque, 0, C, 0), ==, 0);
    return NULL;
}

static void test_write_in_place_against_zero(void)
{
    Racer writer;
    pthread_t zeroer;
    image_create("image", "size=1M");
    BlockBackend *blk = image_open_debug("image", "");
    image_write(blk, 0, C, 1);
    stop_at(blk, "write_aio");
    race_start(&writer, blk, 0, C, 5);
    wait_stopped(blk);
    g_assert_true(qb_thread_start(&zeroer, "zeroer", zero_keep, blk));
    g_usleep(30000);
    resume(blk);
    pthread_join(writer.thread, NULL);
    pthread_join(zeroer, NULL);
    image_expect(blk, 0, C, 0);
    image_write(blk, 0, C, 6);
    image_expect(blk, 0, C, 6);
    blk_unref(blk);
    image_check("image");
}

/* It does not wait for a read, which may see one or the other. */
static void *read_any(void *opaque)
{
    uint8_t buf[512];
    g_assert_cmpint(blk_pread(opaque, 0, sizeof(buf), buf, 0), ==, 0);
    g_assert_true(buf[0] == 1 || buf[0] == 0);
    return NULL;
}

static void test_read_against_zero(void)
{
    pthread_t reader;
    image_create("image", "size=1M");
    BlockBackend *blk = image_open_debug("image", "");
    image_write(blk, 0, C, 1);
    stop_at(blk, "read_aio");
    g_assert_true(qb_thread_start(&reader, "reader", read_any, blk));
    wait_stopped(blk);
    g_assert_cmpint(blk_pwrite_zeroes(blk, 0, C, 0), ==, 0);
    g_assert_cmpint(image_type(blk, 0), ==, QCOW2_ZERO_ALLOC);
    resume(blk);
    pthread_join(reader, NULL);
    image_expect(blk, 0, C, 0);
    blk_unref(blk);
}

/* A read is under way when its cluster is discarded: what it reads is not overwritten. */
static void *read_fives(void *opaque)
{
    image_expect(opaque, 0, C, 5);
    return NULL;
}

static void test_read_against_reuse(void)
{
    pthread_t reader;
    image_create("image", "size=1M");
    BlockBackend *blk = image_open_debug("image", "");
    image_write(blk, 0, C, 5);
    stop_at(blk, "read_aio");
    g_assert_true(qb_thread_start(&reader, "reader", read_fives, blk));
    wait_stopped(blk);
    g_assert_cmpint(blk_pdiscard(blk, 0, C), ==, 0);
    g_assert_cmpint(blk_flush(blk), ==, 0);
    image_write(blk, 8 * C, 4 * C, 9);
    resume(blk);
    pthread_join(reader, NULL);
    blk_unref(blk);
    image_check("image");
}

/* An overwritten compressed cluster stays as it is in the file until its unlink is stable. */
static void test_freed_is_not_reused_early(void)
{
    image_create("image", "size=1M");
    BlockBackend *blk = image_open_rw("image");
    image_write_compressed(blk, 0, C, 5, 0);
    uint64_t stream, next;
    uint32_t bytes;
    qcow2_parse_compressed(image_state(blk), image_entry(blk, 0).entry, &stream, &bytes);
    g_assert_cmpint(blk_flush(blk), ==, 0);
    image_write(blk, 0, C, 6);
    for (int i = 1; i < 5; i++) {
        image_write(blk, i * C, C, 7);
        next = qcow2_entry_host(image_entry(blk, (uint64_t)i * C));
        g_assert_cmphex(next, !=, qcow2_start_of_cluster(image_state(blk), stream));
    }
    blk_unref(blk);
    image_check("image");
}

/* --- failures leave nothing behind --- */

static void test_failed_write(void)
{
    image_create("image", "size=1M");
    BlockBackend *blk = image_open_debug("image", "");
    image_write(blk, 0, C, 1);
    blk_unref(blk);
    static const char *const events[] = {
        "write_aio", "cow_read", "cow_write", "l2_update", "l2_alloc_write", "cluster_alloc",
        "write_compressed", "read_aio", "read_compressed",
    };
    for (size_t i = 0; i < G_N_ELEMENTS(events); i++) {
        g_autofree char *opts = g_strdup_printf(
            "file.inject-error.0.event=%s,file.inject-error.0.errno=5", events[i]);
        blk = image_open_debug("image", opts);
        uint8_t buf[C] = {7};
        (void)blk_pwrite(blk, 2 * C + 512, 1024, buf, 0);
        (void)blk_pwrite(blk, 3 * C, C, buf, BDRV_REQ_COMPRESSED);
        (void)blk_pwrite(blk, 0, 512, buf, 0);
        (void)blk_pread(blk, 3 * C, C, buf, 0);
        (void)blk_pwrite(blk, 3 * C + 512, 512, buf, 0);
        blk_unref(blk);
        image_check("image");
    }
}

/* --- the Nth write to the file fails --- */

enum { FAULT_UNITS = 16, FAULT_BYTES = FAULT_UNITS * C };

typedef struct FaultWorld {
    BlockBackend *blk;
    uint8_t value[FAULT_UNITS], other[FAULT_UNITS]; /* of each cluster; the other may be, too */
    unsigned failed;
} FaultWorld;

/* A failed request leaves each cluster as it was or as it was to be. */
static void note_result(FaultWorld *w, int unit, int n, int value, int ret)
{
    for (int i = unit; i < unit + n; i++) {
        w->other[i] = ret == 0 ? (uint8_t)value : w->value[i];
        w->value[i] = (uint8_t)value;
    }
    w->failed += ret < 0;
}

static void fault_write(FaultWorld *w, int unit, int n, int value, int flags)
{
    g_autofree uint8_t *buf = g_malloc((size_t)n * C);
    memset(buf, value, (size_t)n * C);
    int ret = blk_pwrite(w->blk, (int64_t)unit * C, (int64_t)n * C, buf, flags);
    note_result(w, unit, n, value, ret);
}

static void fault_zero(FaultWorld *w, int unit, int n, int flags)
{
    int ret = blk_pwrite_zeroes(w->blk, (int64_t)unit * C, (int64_t)n * C, flags);
    note_result(w, unit, n, 0, ret);
}

static void fault_script(FaultWorld *w)
{
    fault_write(w, 0, 4, 1, 0);
    fault_write(w, 6, 3, 2, BDRV_REQ_COMPRESSED);
    (void)blk_flush(w->blk);
    fault_write(w, 2, 3, 3, 0);
    fault_write(w, 7, 1, 4, 0);
    fault_zero(w, 1, 2, 0);
    fault_zero(w, 3, 4, BDRV_REQ_MAY_UNMAP);
    (void)blk_flush(w->blk);
    fault_write(w, 1, 12, 5, 0);
}

static void expect_either(FaultWorld *w)
{
    g_autofree uint8_t *buf = g_malloc(FAULT_BYTES);
    g_assert_cmpint(blk_pread(w->blk, 0, FAULT_BYTES, buf, 0), ==, 0);
    for (int i = 0; i < FAULT_BYTES; i++) {
        g_assert_true(buf[i] == w->value[i / C] || buf[i] == w->other[i / C]);
    }
}

static char *fail_nth_write(int n)
{
    GString *opts = g_string_new(NULL);
    for (int i = 0; i < n - 1; i++) { /* state 1 at the start, n when the nth write comes */
        g_string_append_printf(opts, "file.set-state.%d.event=pwritev,file.set-state.%d.state=%d,"
                                     "file.set-state.%d.new_state=%d,", i, i, i + 1, i, i + 2);
    }
    g_string_append_printf(opts, "file.inject-error.0.event=pwritev,file.inject-error.0.state=%d,"
                                 "file.inject-error.0.once=on,file.inject-error.0.errno=%d", n,
                           n % 2 ? EIO : ENOSPC);
    return g_string_free(opts, false);
}

static void test_nth_write_fails(void)
{
    unsigned failed = 0;
    for (int n = 1; n < 30; n++) {
        g_autofree char *opts = fail_nth_write(n);
        image_create("image", "size=1M");
        FaultWorld w = {.blk = image_open_debug("image", opts)};
        fault_script(&w);
        expect_either(&w);
        if (blk_flush(w.blk) < 0) {
            g_assert_cmpint(blk_flush(w.blk), ==, 0); /* nothing was lost by the failure */
        }
        failed += w.failed;
        blk_unref(w.blk);
        image_check("image");
        w.blk = image_open_rw("image");
        expect_either(&w);
        blk_unref(w.blk);
    }
    g_assert_cmpuint(failed, >=, 6);
}

/* --- compressed writes --- */

static void test_compressed_rules(void)
{
    image_create("image", "size=1M");
    BlockBackend *blk = image_open_rw("image");
    image_write_compressed(blk, 0, C, 5, 0);
    g_assert_cmpint(image_type(blk, 0), ==, QCOW2_COMPRESSED);
    image_write_compressed(blk, 0, C, 5, -EIO);
    image_write_compressed(blk, C, 512, 5, -EINVAL);
    image_write_compressed(blk, C + 512, C, 5, -EINVAL);
    image_write(blk, 2 * C, 512, 1);
    image_write_compressed(blk, 2 * C, C, 5, -EIO);
    image_write_compressed(blk, 3 * C, C, 0, 0); /* zeroes need nothing */
    g_assert_cmpint(image_type(blk, 3 * C), ==, QCOW2_UNALLOCATED);
    image_expect(blk, 0, C, 5);
    image_expect(blk, 3 * C, C, 0);
    blk_unref(blk);
    image_check("image");
}

/* Streams of one request lie back to back and share clusters; noise is stored as it is. */
static void test_compressed_run(void)
{
    enum { N = 40 };
    g_autofree uint8_t *data = g_malloc(N * C), *back = g_malloc(N * C);
    image_create("image", "size=8M");
    BlockBackend *blk = image_open_rw("image");
    for (size_t i = 0; i < N * C; i++) {
        data[i] = i / C % 7 == 3 ? (uint8_t)g_test_rand_int() : (uint8_t)(i / C + 1);
    }
    g_assert_cmpint(blk_pwrite(blk, 0, N * C, data, BDRV_REQ_COMPRESSED), ==, 0);
    for (unsigned i = 0; i < N; i++) {
        g_assert_cmpint(image_type(blk, (uint64_t)i * C), ==,
                        i % 7 == 3 ? QCOW2_NORMAL : QCOW2_COMPRESSED);
    }
    g_assert_cmpint(blk_pread(blk, 0, N * C, back, 0), ==, 0);
    g_assert_cmpmem(back, N * C, data, N * C);
    for (int64_t pos = 0; pos < 4 * C; pos += 512) { /* through the cache of clusters */
        g_assert_cmpint(blk_pread(blk, pos, 512, back, 0), ==, 0);
        g_assert_cmpmem(back, 512, data + pos, 512);
    }
    blk_unref(blk);
    image_check("image");
}

/* Space of a stream is given to another: the old content must not come out of the cache. */
static void test_compressed_cache(void)
{
    image_create("image", "size=1M");
    BlockBackend *blk = image_open_rw("image");
    for (int round = 1; round < 6; round++) {
        image_write_compressed(blk, 0, C, round, 0);
        image_expect(blk, 512, 512, round);
        image_expect(blk, 1024, 512, round);
        g_assert_cmpint(blk_pdiscard(blk, 0, C), ==, 0);
        g_assert_cmpint(blk_flush(blk), ==, 0);
        g_assert_cmpint(blk_flush(blk), ==, 0);
    }
    blk_unref(blk);
    image_check("image");
}

/* --- corrupt entries --- */

static char *last_warning;

static void note_warning(const char *text, void *opaque)
{
    g_free(last_warning);
    last_warning = g_strdup(text);
}

typedef struct Damage {
    const char *opts, *text;
    uint64_t entry, bitmap;
} Damage;

static int put_damage(uint64_t guest, Qcow2L2Entry *e, unsigned *n, void *opaque)
{
    const Damage *d = opaque;
    *e = (Qcow2L2Entry){d->entry, d->bitmap};
    return 1;
}

/* The first read says what is wrong; from then on the node is out of order. */
static void expect_corrupt(BlockBackend *blk, const char *text)
{
    uint8_t buf[512] = {0};
    g_clear_pointer(&last_warning, g_free);
    g_assert_cmpint(blk_pread(blk, C, 512, buf, 0), ==, -EIO);
    g_assert_nonnull(last_warning);
    g_assert_nonnull(strstr(last_warning, text));
    g_assert_cmpint(blk_pread(blk, C, 512, buf, 0), <, 0);
    g_assert_cmpint(blk_pwrite(blk, 512 * KIB, 512, buf, 0), <, 0);
}

static void test_corrupt_entries(void)
{
    g_autofree char *data = image_path("data");
    g_autofree char *with_data = g_strdup_printf("size=1M,data_file=%s", data);
    const Damage damages[] = {
        {"size=1M", "Cluster allocation offset 0x52200 unaligned (L2 offset: 0x",
         0x8000000000052200, 0},
        {"size=1M", "Preallocated zero cluster offset 0x52200 unaligned (L2 offset: 0x",
         0x8000000000052201, 0},
        {"size=1M,compat=0.10", "Zero cluster entry found in pre-v3 image (L2 offset: 0x", 1, 0},
        {"size=1M,extended_l2=on", "Invalid cluster entry found  (L2 offset: 0x", 0, 1},
        {with_data, "External data file host cluster offset 0x50000 does not match guest cluster "
                    "offset: 0x10000, L2 index: 0x1)",
         0x8000000000050000, 0},
        {with_data, "Compressed cluster entry found in image with external data file (L2 offset: ",
         0x4000000000050000, 0},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(damages); i++) {
        const Damage *d = &damages[i];
        image_create("image", d->opts);
        BlockBackend *blk = image_open_rw("image");
        image_write(blk, C, C, 1);
        bdrv_graph_rdlock();
        g_assert_cmpint(qcow2_walk_edit(blk_bs(blk), C, 2 * C, put_damage, (void *)d), ==, 0);
        bdrv_graph_rdunlock();
        expect_corrupt(blk, d->text);
        blk_unref(blk);
    }
}

static void test_corrupt_l1(void)
{
    image_create("image", "size=1M");
    BlockBackend *blk = image_open_rw("image");
    BDRVQcow2State *s = image_state(blk);
    image_write(blk, C, C, 1);
    qb_mutex_lock(&s->lock);
    qcow2_l1_set_locked(s, 0, 0x8000000000052200);
    qb_mutex_unlock(&s->lock);
    expect_corrupt(blk, "L2 table offset 0x52200 unaligned (L1 index: 0)");
    blk_unref(blk);
}

/* --- VM state --- */

static void test_vmstate(void)
{
    g_autofree uint8_t *data = g_malloc(3 * MIB), *back = g_malloc(3 * MIB);
    IoVector out, in;
    create_over_base("size=1M,cluster_size=4k");
    BlockBackend *blk = image_open_rw("image");
    memset(data, 0x77, 3 * MIB);
    iov_vector_init_buf(&out, data, 3 * MIB);
    iov_vector_init_buf(&in, back, 3 * MIB);
    g_assert_cmpint(blk_save_vmstate(blk, &out, 12345), ==, 0);
    g_assert_cmpint(blk_load_vmstate(blk, &in, 12345), ==, 0);
    g_assert_cmpmem(back, 3 * MIB, data, 3 * MIB);
    iov_vector_init_buf(&in, back, 12345);
    g_assert_cmpint(blk_load_vmstate(blk, &in, 0), ==, 0);
    g_assert_true(qb_buffer_is_zero(back, 12345)); /* not the backing file, longer than the disk */
    image_expect(blk, 0, MIB, 0xbb);
    blk_unref(blk);
    image_check("image");
}

/* --- a stream in the place of another --- */

/* A stream as long as the one that was there before, and read: what is shown is its own content. */
static void test_stream_after_stream(void)
{
    image_create("image", "size=4M");
    g_autoptr(BlockBackend) blk = image_open_rw("image");
    uint64_t host = 0;
    for (int i = 0; i < 4; i++) {
        image_write_compressed(blk, i * C, C, 0x10 + i, 0);
        uint64_t now = image_entry(blk, (uint64_t)i * C).entry;
        g_assert_true(i == 0 || now == host);
        host = now;
        image_expect(blk, i * C, C, 0x10 + i);
        g_assert_cmpint(blk_pdiscard(blk, i * C, C), ==, 0);
        g_assert_cmpint(blk_flush(blk), ==, 0);
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    image_setup();
    bdrv_set_warning_handler(note_warning, NULL);
    g_test_add_func("/qcow2-requests/stream-after-stream", test_stream_after_stream);
    g_test_add_func("/qcow2-requests/state-table", test_state_table);
    g_test_add_func("/qcow2-requests/state-table-backing", test_state_table_backing);
    g_test_add_func("/qcow2-requests/state-table-no-unref", test_state_table_no_unref);
    g_test_add_func("/qcow2-requests/discard-ignored", test_discard_ignored);
    g_test_add_func("/qcow2-requests/version-2", test_version_2);
    g_test_add_func("/qcow2-requests/subclusters", test_subclusters);
    g_test_add_func("/qcow2-requests/partial-discards", test_partial_discards);
    g_test_add_func("/qcow2-requests/partial-no-unref", test_partial_no_unref);
    g_test_add_func("/qcow2-requests/nothing-from-nothing", test_nothing_from_nothing);
    g_test_add_func("/qcow2-requests/unchanged-is-not-written", test_unchanged_is_not_written);
    g_test_add_func("/qcow2-requests/zero-part", test_zero_part);
    g_test_add_func("/qcow2-requests/unallocated-again", test_unallocated_again);
    g_test_add_func("/qcow2-requests/backing-later", test_backing_later);
    g_test_add_func("/qcow2-requests/table-dropped", test_table_dropped);
    g_test_add_func("/qcow2-requests/write-zero-alloc-against-discard",
                    test_write_zero_alloc_against_discard);
    g_test_add_func("/qcow2-requests/write-in-place-against-discard",
                    test_write_in_place_against_discard);
    g_test_add_func("/qcow2-requests/write-in-place-against-zero",
                    test_write_in_place_against_zero);
    g_test_add_func("/qcow2-requests/read-against-zero", test_read_against_zero);
    g_test_add_func("/qcow2-requests/read-against-reuse", test_read_against_reuse);
    g_test_add_func("/qcow2-requests/freed-is-not-reused-early", test_freed_is_not_reused_early);
    g_test_add_func("/qcow2-requests/failed-write", test_failed_write);
    g_test_add_func("/qcow2-requests/nth-write-fails", test_nth_write_fails);
    g_test_add_func("/qcow2-requests/compressed-rules", test_compressed_rules);
    g_test_add_func("/qcow2-requests/compressed-run", test_compressed_run);
    g_test_add_func("/qcow2-requests/compressed-cache", test_compressed_cache);
    g_test_add_func("/qcow2-requests/corrupt-entries", test_corrupt_entries);
    g_test_add_func("/qcow2-requests/corrupt-l1", test_corrupt_l1);
    g_test_add_func("/qcow2-requests/vmstate", test_vmstate);
    int ret = g_test_run();
    g_clear_pointer(&last_warning, g_free);
    image_teardown();
    return ret;
}
