/*
 * Flush: what is written in which order, what a crash at any point leaves, what a failure at any
 * point leaves, and how many barriers it takes.
 *
 * The guest's disk is written in units of a sector, each filled with its number and a value.  The
 * oracle knows for every unit which values it may have after a crash or a failure: the one of the
 * last completed flush and all that came after it.
 *
 * SPDX-License-Identifier: MIT
 */
#include "qcow2-rec.h"

#define UNIT 512
#define MAX_UNITS 8192
#define ZERO 0 /* the value of a unit that reads zero */

/* --- values --- */

typedef struct Oracle {
    unsigned units;
    uint64_t allowed[MAX_UNITS]; /* bit v: the unit may have value v */
    uint8_t now[MAX_UNITS];      /* what it has if all went well */
} Oracle;

static void oracle_init(Oracle *o, unsigned units)
{
    g_assert_cmpuint(units, <=, MAX_UNITS);
    o->units = units;
    for (unsigned i = 0; i < units; i++) {
        o->now[i] = ZERO;
        o->allowed[i] = 1;
    }
}

static void oracle_write(Oracle *o, unsigned first, unsigned n, unsigned value)
{
    for (unsigned i = first; i < first + n && i < o->units; i++) {
        o->allowed[i] |= UINT64_C(1) << value;
        o->now[i] = (uint8_t)value;
    }
}

static void oracle_flushed(Oracle *o)
{
    for (unsigned i = 0; i < o->units; i++) {
        o->allowed[i] = UINT64_C(1) << o->now[i];
    }
}

static void fill_unit(uint8_t *buf, unsigned unit, unsigned value)
{
    for (unsigned i = 0; i < UNIT / 8; i++) {
        qb_stbe64(buf + 8 * i, value == ZERO ? 0 : (uint64_t)unit << 8 | value);
    }
}

/* The value that @buf shows; fails on the content of another unit. */
static unsigned unit_value(const uint8_t *buf, unsigned unit)
{
    uint64_t word = qb_ldbe64(buf);
    for (unsigned i = 1; i < UNIT / 8; i++) {
        g_assert_cmphex(qb_ldbe64(buf + 8 * i), ==, word);
    }
    if (word) {
        g_assert_cmpuint(word >> 8, ==, unit);
    }
    return (unsigned)(word & 0xff);
}

static void expect_allowed(BlockBackend *blk, Oracle *o, bool learn)
{
    g_autofree uint8_t *buf = g_malloc((size_t)o->units * UNIT);
    unsigned units = (unsigned)MIN(o->units, blk_getlength(blk) / UNIT);
    g_assert_cmpint(blk_pread(blk, 0, (int64_t)units * UNIT, buf, 0), ==, 0);
    for (unsigned i = 0; i < units; i++) {
        unsigned v = unit_value(buf + (size_t)i * UNIT, i);
        if (!(o->allowed[i] >> v & 1)) {
            g_error("unit %u has value %u, allowed are %#" PRIx64, i, v, o->allowed[i]);
        }
        o->now[i] = learn ? (uint8_t)v : o->now[i];
    }
}

/* --- requests --- */

typedef struct World {
    RecFile *f;
    BlockBackend *blk;
    Oracle *o;
    unsigned value; /* the last one used */
    unsigned failed; /* requests */
} World;

static int note(World *w, int ret)
{
    w->failed += ret < 0;
    return ret;
}

static unsigned next_value(World *w)
{
    w->value = w->value % 63 + 1;
    return w->value;
}

/* Marks carry unit, length and value, so that the oracle can be run again from the log. */
static void mark_write(World *w, unsigned first, unsigned n, unsigned value)
{
    rec_add(w->f, (RecOp){.kind = REC_MARK, .offset = first, .bytes = n, .mark = (int)value});
}

static int write_flags(World *w, unsigned first, unsigned n, int flags)
{
    g_autofree uint8_t *buf = g_malloc((size_t)n * UNIT);
    unsigned value = next_value(w);
    for (unsigned i = 0; i < n; i++) {
        fill_unit(buf + (size_t)i * UNIT, first + i, value);
    }
    mark_write(w, first, n, value);
    oracle_write(w->o, first, n, value);
    return note(w, blk_pwrite(w->blk, (int64_t)first * UNIT, (int64_t)n * UNIT, buf, flags));
}

static int do_write(World *w, unsigned first, unsigned n)
{
    return write_flags(w, first, n, 0);
}

static int do_discard(World *w, unsigned first, unsigned n)
{
    mark_write(w, first, n, ZERO);
    oracle_write(w->o, first, n, ZERO);
    return note(w, blk_pdiscard(w->blk, (int64_t)first * UNIT, (int64_t)n * UNIT));
}

static int do_flush(World *w)
{
    int ret = note(w, blk_flush(w->blk));
    if (ret == 0) {
        rec_mark(w->f, -1);
        if (!w->failed) {
            oracle_flushed(w->o);
        }
    }
    return ret;
}

static void world_open(World *w, RecFile *f, Oracle *o)
{
    *w = (World){.f = f, .o = o, .blk = rec_open_rw(f)};
    oracle_init(o, (unsigned)(blk_getlength(w->blk) / UNIT));
}

/* --- barriers and order --- */

static unsigned flushes_of(World *w, int (*fn)(World *w))
{
    unsigned before = w->f->count[REC_FLUSH];
    rec_start(w->f);
    g_assert_cmpint(fn(w), ==, 0);
    return w->f->count[REC_FLUSH] - before;
}

/* Barriers before the first write to [offset, +bytes) in the log; -1: none. */
static int phase_of(World *w, uint64_t offset, uint64_t bytes)
{
    int phase = 0;
    for (guint i = 0; i < w->f->log->len; i++) {
        const RecOp *op = &g_array_index(w->f->log, RecOp, i);
        if (op->kind == REC_WRITE && qb_ranges_overlap(op->offset, op->bytes, offset, bytes)) {
            return phase;
        }
        phase += op->kind == REC_FLUSH;
    }
    return -1;
}

static uint64_t l2_offset(World *w, uint64_t index)
{
    return qcow2_l1_get(image_state(w->blk), index) & QCOW2_ENTRY_OFFSET_MASK;
}

static uint64_t bytes_written(const World *w)
{
    uint64_t bytes = 0;
    for (guint i = 0; i < w->f->log->len; i++) {
        const RecOp *op = &g_array_index(w->f->log, RecOp, i);
        bytes += op->kind == REC_WRITE ? op->bytes : 0;
    }
    return bytes;
}

static int write_into_new_table(World *w)
{
    do_write(w, 4096, 8);
    return 0;
}

/* Without a change one barrier; counts before the first, entries after it.  A new table is zeroes
 * before that, when the write is done, and its entries go with the pointer to it. */
static void test_order(void)
{
    World w;
    Oracle o;
    RecFile *f = rec_image_new("a", "size=4M,cluster_size=4k", 16 * MIB);
    world_open(&w, f, &o);
    BDRVQcow2State *s = image_state(w.blk);
    uint64_t refblock = s->reftable.entries[0], l1 = qcow2_l1_table_offset(s);
    g_assert_cmpuint(flushes_of(&w, do_flush), <=, 1);
    do_write(&w, 0, 8);
    g_assert_cmpuint(flushes_of(&w, do_flush), ==, 2);
    g_assert_cmpint(phase_of(&w, l2_offset(&w, 0), 4096), ==, 1);
    g_assert_cmpint(phase_of(&w, refblock, 4096), ==, 0);
    g_assert_cmpint(phase_of(&w, l1, 512), ==, 1);
    do_write(&w, 8, 8);
    g_assert_cmpuint(flushes_of(&w, do_flush), ==, 2);
    g_assert_cmpint(phase_of(&w, refblock, 4096), ==, 0);
    g_assert_cmpint(phase_of(&w, l2_offset(&w, 0), 4096), ==, 1);
    g_assert_cmpint(phase_of(&w, l1, 512), ==, -1);
    do_write(&w, 8, 8); /* in place */
    g_assert_cmpuint(flushes_of(&w, do_flush), ==, 1);
    g_assert_cmpuint(flushes_of(&w, write_into_new_table), ==, 0);
    g_assert_cmpint(phase_of(&w, l2_offset(&w, 1), 4096), ==, 0);
    do_write(&w, 24, 8); /* and into one that is not new */
    g_assert_cmpuint(flushes_of(&w, do_flush), ==, 2);
    g_assert_cmpint(phase_of(&w, l2_offset(&w, 1), 4096), ==, 1);
    g_assert_cmpint(phase_of(&w, l2_offset(&w, 0), 4096), ==, 1);
    g_assert_cmpint(phase_of(&w, l1, 512), ==, 1);
    uint64_t host = qcow2_entry_host(image_entry(w.blk, 0));
    do_discard(&w, 0, 8); /* punched when no stable entry names it, counted as free after that */
    g_assert_cmpuint(flushes_of(&w, do_flush), ==, 2);
    g_assert_cmpint(phase_of(&w, l2_offset(&w, 0), 4096), ==, 1);
    g_assert_cmpint(phase_of(&w, host, 4096), ==, 2);
    g_assert_cmpint(phase_of(&w, refblock, 4096), ==, -1);
    g_assert_cmpuint(flushes_of(&w, do_flush), ==, 1);
    g_assert_cmpint(phase_of(&w, refblock, 4096), ==, 0);
    blk_unref(w.blk);
    rec_check(f, false);
    rec_file_free(f);
}

/* Tables that were touched here and there are not written in whole. */
static void test_writes_little(void)
{
    enum { TABLES = 8, CLUSTER = 65536, SECTOR = 512 };
    Oracle o = {0}; /* for nothing */
    RecFile *f = rec_image_new("a", "size=4G", 64 * MIB);
    World w = {.f = f, .o = &o, .blk = rec_open_rw(f)};
    uint8_t *buf = g_malloc0(CLUSTER);
    rec_start(f);
    for (unsigned i = 0; i < TABLES; i++) {
        g_assert_cmpint(blk_pwrite(w.blk, (int64_t)i << 29, CLUSTER, buf, 0), ==, 0);
    }
    g_assert_cmpuint(bytes_written(&w), ==, 2 * TABLES * CLUSTER); /* data, zeroes of tables */
    g_assert_cmpuint(flushes_of(&w, do_flush), ==, 2);
    g_assert_cmpuint(bytes_written(&w), ==, (TABLES + 2) * SECTOR); /* counts, L1 */
    g_free(buf);
    blk_unref(w.blk);
    rec_check(f, false);
    rec_file_free(f);
}

/* A flush that failed before its first barrier leaves a copied table to the next one as what it is:
 * no stable pointer names it.  After that barrier one may. */
static void test_order_after_error(void)
{
    enum { IN_PHASE_1 = 1, BARRIER_1 = 1, BARRIER_2 = 2 };
    static const struct {
        RecKind kind;
        int n; /* that fails */
        int phase_of_table, phase_of_l1; /* in the flush after it */
    } cases[] = {
        {REC_WRITE, IN_PHASE_1, 0, 1}, {REC_FLUSH, BARRIER_1, 0, 1}, {REC_FLUSH, BARRIER_2, 1, 1},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        World w;
        Oracle o;
        RecFile *f = rec_image_new("a", "size=4M,cluster_size=4k", 16 * MIB);
        world_open(&w, f, &o);
        do_write(&w, 0, 8);
        g_assert_cmpint(do_flush(&w), ==, 0);
        g_assert_true(bdrv_snapshot_create(blk_bs(w.blk), "s", NULL));
        do_write(&w, 0, 8); /* makes a copy of the table */
        f->fail[cases[i].kind] = cases[i].n;
        g_assert_cmpint(do_flush(&w), <, 0);
        g_assert_cmpint(f->fail[cases[i].kind], ==, 0);
        do_write(&w, 8, 8); /* into the same table */
        g_assert_cmpuint(flushes_of(&w, do_flush), ==, 2);
        g_assert_cmpint(phase_of(&w, l2_offset(&w, 0), 4096), ==, cases[i].phase_of_table);
        g_assert_cmpint(phase_of(&w, qcow2_l1_table_offset(image_state(w.blk)), 512), ==,
                        cases[i].phase_of_l1);
        blk_unref(w.blk);
        rec_check(f, false);
        rec_file_free(f);
    }
}

static bool disk_says_dirty(const RecFile *f)
{
    return qb_ldbe64(f->data + QCOW2_HDR_INCOMPATIBLE) & QCOW2_INCOMPAT_DIRTY;
}

/* Lazy refcounts: the dirty bit before the first change, also after the changes before were settled. */
static void test_lazy_again(void)
{
    World w;
    Oracle o;
    RecFile *f = rec_image_new("a", "size=4M,cluster_size=4k,lazy_refcounts=on", 16 * MIB);
    world_open(&w, f, &o);
    for (unsigned i = 0; i < 3; i++) {
        g_assert_false(disk_says_dirty(f));
        do_write(&w, 64 * i, 8);
        g_assert_true(disk_says_dirty(f));
        BDRV_GRAPH_GUARD();
        g_assert_cmpint(qcow2_lazy_settle(blk_bs(w.blk)), ==, 0);
    }
    blk_unref(w.blk);
    rec_check(f, false);
    rec_file_free(f);
}

/* A new refcount block has its table entry after its own barrier and before what it counts is
 * linked. */
static void test_order_refblock(void)
{
    World w;
    Oracle o;
    RecFile *f = rec_image_new("a", "size=4M,cluster_size=512,refcount_bits=64", 16 * MIB);
    world_open(&w, f, &o);
    BDRVQcow2State *s = image_state(w.blk);
    unsigned grown = 0;
    for (unsigned at = 0; at < 6000; at += 32) {
        uint64_t nb = s->reftable.nb_blocks, table = s->reftable.offset;
        do_write(&w, at, 32);
        unsigned n = flushes_of(&w, do_flush);
        if (s->reftable.offset != table) { /* the whole table moves with one write of the header */
            grown++;
            g_assert_cmpuint(n, ==, 3);
            g_assert_cmpint(phase_of(&w, s->reftable.offset, 512), ==, 0);
            g_assert_cmpint(phase_of(&w, 0, 512), ==, 1);
        } else if (s->reftable.nb_blocks > nb) {
            g_assert_cmpuint(n, ==, 3);
            g_assert_cmpint(phase_of(&w, s->reftable.entries[nb], 512), ==, 0);
            g_assert_cmpint(phase_of(&w, table + nb * 8 / 512 * 512, 512), ==, 1);
        } else {
            g_assert_cmpuint(n, ==, 2);
        }
        g_assert_cmpint(phase_of(&w, l2_offset(&w, at / 64), 512), ==,
                        (int)n - 1);
    }
    g_assert_cmpuint(grown, >, 0);
    expect_allowed(w.blk, &o, false);
    blk_unref(w.blk);
    rec_check(f, false);
    rec_file_free(f);
}

/* --- sharing --- */

#define SHARERS 16
#define SHARER_WRITES 12

static void *run_sharer(void *opaque)
{
    World *w = opaque; /* its own unit is w->value */
    uint8_t buf[UNIT];
    for (unsigned i = 0; i < SHARER_WRITES; i++) {
        unsigned unit = w->value + i * SHARERS * 8;
        fill_unit(buf, unit, 1);
        g_assert_cmpint(blk_pwrite(w->blk, (int64_t)unit * UNIT, UNIT, buf, BDRV_REQ_FUA), ==, 0);
    }
    return NULL;
}

static void test_sharing(void)
{
    World w[SHARERS];
    Oracle o;
    pthread_t threads[SHARERS];
    RecFile *f = rec_image_new("a", "size=4M,cluster_size=4k", 16 * MIB);
    world_open(&w[0], f, &o);
    f->flush_us = 2000;
    unsigned before = f->count[REC_FLUSH];
    for (unsigned i = 0; i < SHARERS; i++) {
        w[i] = (World){.blk = w[0].blk, .value = i * 8};
        g_assert_true(qb_thread_start(&threads[i], "sharer", run_sharer, &w[i]));
    }
    for (unsigned i = 0; i < SHARERS; i++) {
        pthread_join(threads[i], NULL);
    }
    unsigned flushes = f->count[REC_FLUSH] - before;
    g_test_message("%u barriers for %u writes", flushes, SHARERS * SHARER_WRITES);
    g_assert_cmpuint(flushes, <, SHARERS * SHARER_WRITES / 2);
    f->flush_us = 0;
    blk_unref(w[0].blk);
    rec_check(f, false);
    rec_file_free(f);
}

/* --- crash --- */

/* The oracle as it was when the first @n operations of the log had been done. */
static void oracle_at(Oracle *o, const GArray *log, guint n, unsigned units)
{
    oracle_init(o, units);
    for (guint i = 0; i < n; i++) {
        const RecOp *op = &g_array_index(log, RecOp, i);
        if (op->kind == REC_MARK && op->mark >= 0) {
            oracle_write(o, (unsigned)op->offset, (unsigned)op->bytes, (unsigned)op->mark);
        } else if (op->kind == REC_MARK) {
            oracle_flushed(o);
        }
    }
}

static void expect_sound(const RecFile *before, const GArray *log, guint n, unsigned units,
                         GRand *rand)
{
    Oracle o;
    RecFile *f = rec_file_new("crash", before->data, (size_t)before->length, 2 * MIB);
    rec_replay(f, log, n, rand);
    rec_check(f, true);
    oracle_at(&o, log, n, units);
    BlockBackend *blk = rec_open_image(f, NULL, 0);
    expect_allowed(blk, &o, false);
    blk_unref(blk);
    rec_file_free(f);
}

static void expect_sound_at_every_point(const RecFile *before, const RecFile *f, unsigned units,
                                        guint step)
{
    GRand *rand = g_rand_new_with_seed((guint32)g_test_rand_int());
    for (guint n = 0; n <= f->log->len; n += step) {
        expect_sound(before, f->log, n, units, NULL);
        expect_sound(before, f->log, n, units, rand);
    }
    g_rand_free(rand);
}

typedef struct CrashCase {
    const char *name, *opts;
    unsigned cluster; /* units */
} CrashCase;

static void crash_op(World *w, const CrashCase *c, GRand *rand)
{
    unsigned what = (unsigned)g_rand_int_range(rand, 0, 10);
    unsigned n = (unsigned)g_rand_int_range(rand, 1, 5) * (what < 3 ? 1 : c->cluster);
    unsigned at = (unsigned)g_rand_int_range(rand, 0, (gint32)(w->o->units - n));
    if (what >= 7) {
        at = at / c->cluster * c->cluster;
    }
    if (what == 9) {
        g_assert_cmpint(do_flush(w), ==, 0);
    } else if (what >= 7) {
        g_assert_cmpint(do_discard(w, at, n), ==, 0);
    } else if (what == 6) {
        at = at / c->cluster * c->cluster; /* fails where something is mapped */
        do_discard(w, at, c->cluster);
        g_assert_cmpint(write_flags(w, at, c->cluster, BDRV_REQ_COMPRESSED), ==, 0);
    } else {
        g_assert_cmpint(do_write(w, at, n), ==, 0);
    }
}

static void test_crash(const void *data)
{
    const CrashCase *c = data;
    World w;
    Oracle o;
    GRand *rand = g_rand_new_with_seed((guint32)g_test_rand_int());
    RecFile *f = rec_image_new("a", c->opts, 4 * MIB), *before = rec_file_dup("before", f);
    world_open(&w, f, &o);
    rec_start(f);
    for (int i = 0; i < 60; i++) {
        crash_op(&w, c, rand);
    }
    blk_unref(w.blk);
    expect_sound_at_every_point(before, f, o.units, MAX(f->log->len / 30, 1));
    rec_check(f, false);
    g_rand_free(rand);
    rec_file_free(before);
    rec_file_free(f);
}

/* --- faults --- */

typedef struct FaultCase {
    const char *name, *opts;
    void (*prepare)(World *w); /* may be NULL */
    void (*run)(World *w);
} FaultCase;

static void run_first_write(World *w)
{
    do_write(w, 3, 20);
    do_flush(w);
}

static void prepare_some(World *w)
{
    do_write(w, 0, 64);
    do_flush(w);
}

static void run_new_l2(World *w)
{
    do_write(w, 2048, 24);
    do_flush(w);
    do_write(w, 3, 4);
    do_flush(w);
}

/* The next write needs a refcount block. */
static void prepare_full_block(World *w)
{
    const BDRVQcow2State *s = image_state(w->blk);
    for (unsigned at = 0; s->reftable.nb_blocks < 3; at += 16) {
        do_write(w, at, 16);
    }
    do_flush(w);
}

static void run_new_block(World *w)
{
    do_write(w, 4000, 100);
    do_flush(w);
}

static void prepare_full_table(World *w)
{
    const BDRVQcow2State *s = image_state(w->blk);
    for (unsigned at = 0; s->reftable.nb_blocks < 64; at += 48) {
        do_write(w, at, 48);
    }
    do_flush(w);
}

static void run_grow_table(World *w)
{
    const BDRVQcow2State *s = image_state(w->blk);
    unsigned clusters = s->reftable.clusters;
    for (unsigned at = 6000; at < 6400 && s->reftable.clusters == clusters; at += 80) {
        do_write(w, at, 80);
    }
    do_flush(w);
}

static void prepare_compressed(World *w)
{
    for (unsigned at = 0; at < 64; at += 8) {
        write_flags(w, at, 8, BDRV_REQ_COMPRESSED);
    }
    do_flush(w);
}

static void run_overwrite(World *w)
{
    do_write(w, 0, 8);
    do_write(w, 18, 3);
    do_flush(w);
    write_flags(w, 80, 8, BDRV_REQ_COMPRESSED);
    do_flush(w);
}

static void run_discard(World *w)
{
    do_discard(w, 8, 24);
    do_write(w, 8, 8);
    do_flush(w);
    do_write(w, 100, 8);
    do_flush(w);
}

/* The table becomes empty bit by bit, goes, and comes again. */
static void run_empty_table(World *w)
{
    do_discard(w, 0, 40);
    do_discard(w, 40, 24);
    do_flush(w);
    do_write(w, 5, 3);
    do_flush(w);
}

/* Power is lost anywhere while a table goes. */
static void test_crash_empty_table(void)
{
    World w;
    Oracle o;
    RecFile *f = rec_image_new("a", "size=64k,cluster_size=512,compat=0.10", 4 * MIB);
    RecFile *before = rec_file_dup("before", f);

    world_open(&w, f, &o);
    rec_start(f);
    prepare_some(&w);
    run_empty_table(&w);
    blk_unref(w.blk);
    expect_sound_at_every_point(before, f, o.units, 1);
    rec_check(f, false);
    rec_file_free(before);
    rec_file_free(f);
}

static void run_grow_l1(World *w)
{
    if (blk_truncate(w->blk, 2 * MIB, true, PREALLOC_MODE_OFF, false, NULL)) {
        do_write(w, 3000, 16);
    } else {
        w->failed++;
    }
    do_flush(w);
}

static const FaultCase fault_cases[] = {
    {"first-write", "size=2M,cluster_size=4k", NULL, run_first_write},
    {"new-l2", "size=4M,cluster_size=4k", prepare_some, run_new_l2},
    {"new-block", "size=4M,cluster_size=512,refcount_bits=64", prepare_full_block, run_new_block},
    {"grow-table", "size=4M,cluster_size=512,refcount_bits=64", prepare_full_table, run_grow_table},
    {"overwrite-compressed", "size=1M,cluster_size=4k", prepare_compressed, run_overwrite},
    {"discard", "size=1M,cluster_size=4k", prepare_some, run_discard},
    {"empty-table", "size=1M,cluster_size=512,compat=0.10", prepare_some, run_empty_table},
    {"grow-l1", "size=512k,cluster_size=512", prepare_some, run_grow_l1},
};

/* What the requests after a failure may rely on: unless the node refuses, all works. */
static void expect_usable(World *w)
{
    if (w->failed) {
        expect_allowed(w->blk, w->o, true); /* which of the allowed ones it is now */
        w->failed = 0;
    }
    g_assert_cmpint(do_write(w, 200, 8), ==, 0);
    g_assert_cmpint(do_flush(w), ==, 0);
    expect_allowed(w->blk, w->o, false);
}

/* True when the fault has fired. */
static bool run_with_fault(const FaultCase *c, const RecFile *ready, const Oracle *ready_oracle,
                           RecKind kind, int n)
{
    Oracle o = *ready_oracle;
    RecFile *f = rec_file_dup("fault", ready);
    World w = {.f = f, .o = &o, .blk = rec_open_rw(f), .value = 40};
    o.units = MAX_UNITS; /* the disk may grow */
    f->fail[kind] = n;
    c->run(&w);
    bool fired = f->fail[kind] == 0;
    f->fail[kind] = 0;
    expect_usable(&w);
    blk_unref(w.blk);
    rec_check(f, true);
    w.blk = rec_open_image(f, NULL, 0);
    expect_allowed(w.blk, &o, false);
    blk_unref(w.blk);
    rec_file_free(f);
    return fired;
}

static void test_fault(const void *data)
{
    const FaultCase *c = data;
    World w;
    Oracle *o = g_new0(Oracle, 1);
    RecFile *f = rec_image_new("a", c->opts, 4 * MIB);
    world_open(&w, f, o);
    for (unsigned i = o->units; i < MAX_UNITS; i++) {
        o->allowed[i] = 1; /* what growing adds reads zero */
    }
    if (c->prepare) {
        c->prepare(&w);
    }
    blk_unref(w.blk);
    for (RecKind kind = REC_READ; kind <= REC_FLUSH; kind++) {
        int n = 1;
        while (run_with_fault(c, f, o, kind, n)) {
            n++;
        }
        g_test_message("%d operations of kind %d", n - 1, kind);
    }
    rec_file_free(f);
    g_free(o);
}

/* --- many threads --- */

#define BRAWLERS 4

typedef struct Brawler {
    World w;
    unsigned first, units;
    GRand *rand;
} Brawler;

/* Every thread owns part of the units; tables, blocks and clusters are shared. */
static void brawl_once(Brawler *b)
{
    unsigned n = (unsigned)g_rand_int_range(b->rand, 1, 40);
    unsigned at = b->first + (unsigned)g_rand_int_range(b->rand, 0, (gint32)(b->units - n));
    uint8_t buf[40 * UNIT];
    switch (g_rand_int_range(b->rand, 0, 8)) {
    case 0:
        g_assert_cmpint(blk_flush(b->w.blk), ==, 0);
        break;
    case 1:
    case 2: {
        unsigned first = (unsigned)qb_align_up(at, 8), end = (at + n) / 8 * 8;
        if (first < end) {
            g_assert_cmpint(blk_pdiscard(b->w.blk, (int64_t)first * UNIT,
                                         (int64_t)(end - first) * UNIT), ==, 0);
            oracle_write(b->w.o, first, end - first, ZERO);
        }
        break;
    }
    case 3:
        g_assert_cmpint(blk_pread(b->w.blk, (int64_t)at * UNIT, (int64_t)n * UNIT, buf, 0), ==, 0);
        for (unsigned i = 0; i < n; i++) {
            g_assert_cmpuint(unit_value(buf + i * UNIT, at + i), ==, b->w.o->now[at + i]);
        }
        break;
    default: {
        unsigned value = next_value(&b->w);
        for (unsigned i = 0; i < n; i++) {
            fill_unit(buf + i * UNIT, at + i, value);
        }
        g_assert_cmpint(blk_pwrite(b->w.blk, (int64_t)at * UNIT, (int64_t)n * UNIT, buf, 0), ==, 0);
        oracle_write(b->w.o, at, n, value);
    }
    }
}

static void *run_brawl(void *opaque)
{
    Brawler *b = opaque;
    for (int i = 0; i < 150; i++) {
        brawl_once(b);
    }
    return NULL;
}

static void test_brawl(const void *data)
{
    World w;
    Oracle o;
    Brawler b[BRAWLERS];
    pthread_t threads[BRAWLERS];
    RecFile *f = rec_image_new("a", data, 32 * MIB);
    world_open(&w, f, &o);
    for (unsigned i = 0; i < BRAWLERS; i++) {
        unsigned part = o.units / BRAWLERS / 8 * 8;
        b[i] = (Brawler){.w = w, .first = i * part, .units = part, .rand = g_rand_new_with_seed(i)};
        g_assert_true(qb_thread_start(&threads[i], "brawl", run_brawl, &b[i]));
    }
    for (unsigned i = 0; i < BRAWLERS; i++) {
        pthread_join(threads[i], NULL);
        g_rand_free(b[i].rand);
    }
    oracle_flushed(&o);
    expect_allowed(w.blk, &o, false);
    blk_unref(w.blk);
    rec_check(f, false);
    w.blk = rec_open_image(f, NULL, 0);
    expect_allowed(w.blk, &o, false);
    blk_unref(w.blk);
    rec_file_free(f);
}

static const CrashCase crash_cases[] = {
    {"4k", "size=1M,cluster_size=4k", 8},
    {"512", "size=256k,cluster_size=512,refcount_bits=64", 1},
    {"v2", "size=1M,cluster_size=4k,compat=0.10", 8},
    {"ext", "size=2M,cluster_size=16k,extended_l2=on", 32},
};

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    rec_setup();
    g_test_add_func("/qcow2-flush/order", test_order);
    g_test_add_func("/qcow2-flush/order-refblock", test_order_refblock);
    g_test_add_func("/qcow2-flush/order-after-error", test_order_after_error);
    g_test_add_func("/qcow2-flush/writes-little", test_writes_little);
    g_test_add_func("/qcow2-flush/lazy-again", test_lazy_again);
    g_test_add_func("/qcow2-flush/sharing", test_sharing);
    for (size_t i = 0; i < G_N_ELEMENTS(crash_cases); i++) {
        g_autofree char *path = g_strconcat("/qcow2-flush/crash/", crash_cases[i].name, NULL);
        g_test_add_data_func(path, &crash_cases[i], test_crash);
    }
    for (size_t i = 0; i < G_N_ELEMENTS(fault_cases); i++) {
        g_autofree char *path = g_strconcat("/qcow2-flush/fault/", fault_cases[i].name, NULL);
        g_test_add_data_func(path, &fault_cases[i], test_fault);
    }
    g_test_add_func("/qcow2-flush/crash/empty-table", test_crash_empty_table);
    g_test_add_data_func("/qcow2-flush/brawl/4k", "size=1M,cluster_size=4k", test_brawl);
    g_test_add_data_func("/qcow2-flush/brawl/512", "size=1M,cluster_size=512,refcount_bits=64",
                         test_brawl);
    int ret = g_test_run();
    image_teardown();
    return ret;
}
