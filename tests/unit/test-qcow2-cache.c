/*
 * Tables in memory: finding, loading, poisoning, trimming, and collecting what is dirty.
 *
 * The tables lie in a file in memory behind the clusters of a real image; before it is closed all
 * of them are poisoned, so that nothing of them is written.
 *
 * SPDX-License-Identifier: MIT
 */
#include "qcow2-rec.h"

#define CLUSTER 4096
#define FIRST (64 * CLUSTER) /* behind all that the image uses */
#define TABLES 256
#define SLICE 512

typedef struct Fixture {
    RecFile *f;
    BlockBackend *blk;
    BDRVQcow2State *s;
    Qcow2Cache *c;
} Fixture;

static uint64_t place(unsigned i)
{
    return FIRST + (uint64_t)i * CLUSTER;
}

static void configure(Fixture *x, uint64_t l2, uint64_t refblocks, size_t part)
{
    const Qcow2CacheConfig config = {
        .limit[QCOW2_TABLE_L2] = l2, .limit[QCOW2_TABLE_REFBLOCK] = refblocks, .l2_part = part,
    };
    qcow2_cache_configure(x->c, &config);
}

static void set_limit(Fixture *x, uint64_t bytes)
{
    configure(x, bytes, bytes, CLUSTER);
}

static void setup(Fixture *x, const void *data)
{
    x->f = rec_image_new("a", "size=1M,cluster_size=4k", FIRST + TABLES * CLUSTER);
    for (unsigned i = 0; i < TABLES; i++) {
        memset(x->f->data + place(i), (int)(i & 0xff), CLUSTER);
    }
    x->f->length = FIRST + TABLES * CLUSTER;
    x->blk = rec_open_rw(x->f);
    x->s = image_state(x->blk);
    x->c = x->s->cache;
    set_limit(x, 4 * TABLES * CLUSTER);
    bdrv_graph_rdlock();
}

static void teardown(Fixture *x, const void *data)
{
    qcow2_cache_poison(x->c, FIRST, TABLES * CLUSTER);
    g_assert_cmpuint(qcow2_cache_dirty_bytes(x->c), ==, 0);
    bdrv_graph_rdunlock();
    blk_unref(x->blk); /* asserts that nothing is pinned */
    rec_file_free(x->f);
}

static bool has(Fixture *x, uint64_t offset)
{
    Qcow2TableKind kind;
    return qcow2_cache_has(x->c, offset, &kind);
}

static Qcow2Table *get(Fixture *x, unsigned i)
{
    Qcow2Table *t = NULL;
    g_assert_cmpint(qcow2_cache_get(x->c, QCOW2_TABLE_L2, place(i), &t), ==, 0);
    g_assert_cmpuint(qcow2_table_offset(t), ==, place(i));
    return t;
}

static Qcow2Table *get_part(Fixture *x, unsigned i, size_t pos, size_t len)
{
    const Qcow2TableRange range = {QCOW2_TABLE_L2, place(i), pos, len};
    Qcow2Table *t = NULL;
    g_assert_cmpint(qcow2_cache_get_part(x->c, &range, &t), ==, 0);
    return t;
}

static uint8_t byte_at(const Qcow2Table *t, size_t pos)
{
    uint8_t byte;
    qcow2_table_load(t, pos, 1, &byte);
    return byte;
}

static void store(Qcow2Table *t, size_t pos, uint8_t byte)
{
    qcow2_table_store(t, pos, 1, &byte);
}

/* --- finding and loading --- */

static void test_get(Fixture *x, const void *data)
{
    g_assert_null(qcow2_cache_peek(x->c, QCOW2_TABLE_L2, place(3)));
    Qcow2Table *t = get(x, 3), *same = get(x, 3);
    g_assert_true(t == same);
    g_assert_cmpuint(byte_at(t, CLUSTER - 1), ==, 3);
    qcow2_cache_put(t);
    qcow2_cache_put(same);
    unsigned reads = x->f->count[REC_READ];
    same = qcow2_cache_peek(x->c, QCOW2_TABLE_L2, place(3));
    g_assert_true(t == same);
    qcow2_cache_put(same);
    g_assert_cmpuint(x->f->count[REC_READ], ==, reads);
}

static void test_failed_load(Fixture *x, const void *data)
{
    Qcow2Table *t;
    x->f->fail[REC_READ] = 1;
    g_assert_cmpint(qcow2_cache_get(x->c, QCOW2_TABLE_L2, place(1), &t), ==, -EIO);
    g_assert_false(has(x, place(1)));
    t = get(x, 1);
    g_assert_cmpuint(byte_at(t, 0), ==, 1);
    qcow2_cache_put(t);
    g_assert_false(atomic_load(&x->s->corrupt));
}

static void test_bad_places(Fixture *x, const void *data)
{
    static const uint64_t bad[] = {0, FIRST + 512, FIRST + (uint64_t)TABLES * CLUSTER, 1ULL << 60};
    for (size_t i = 0; i < G_N_ELEMENTS(bad); i++) {
        Qcow2Table *t;
        atomic_store(&x->s->corrupt, false);
        g_assert_cmpint(qcow2_cache_get(x->c, QCOW2_TABLE_L2, bad[i], &t), ==, -EIO);
        g_assert_true(atomic_load(&x->s->corrupt));
    }
}

/* A cluster that is a table of both kinds is refused by whoever comes second. */
static void test_two_kinds(Fixture *x, const void *data)
{
    Qcow2Table *t = get(x, 2), *other;
    g_assert_null(qcow2_cache_peek(x->c, QCOW2_TABLE_REFBLOCK, place(2)));
    g_assert_cmpint(qcow2_cache_get(x->c, QCOW2_TABLE_REFBLOCK, place(2), &other), ==, -EIO);
    g_assert_true(atomic_load(&x->s->corrupt));
    qcow2_cache_put(t);
}

/* --- poison --- */

static void test_poison_pinned(Fixture *x, const void *data)
{
    Qcow2Table *t = get(x, 5);
    store(t, 0, 0x77);
    qcow2_cache_poison(x->c, place(5) + 100, 1); /* any byte of it */
    g_assert_true(qcow2_table_poisoned(t));
    g_assert_false(has(x, place(5)));
    g_assert_cmpuint(qcow2_cache_dirty_bytes(x->c), ==, 0);
    store(t, 0, 0x78); /* goes nowhere */
    g_assert_cmpuint(qcow2_cache_dirty_bytes(x->c), ==, 0);
    Qcow2Table *fresh = get(x, 5);
    g_assert_true(fresh != t);
    g_assert_cmpuint(byte_at(fresh, 0), ==, 5);
    g_assert_cmpuint(byte_at(t, 0), ==, 0x78);
    qcow2_cache_put(t);
    g_assert_true(has(x, place(5)));
    g_assert_false(qcow2_table_poisoned(fresh));
    qcow2_cache_put(fresh);
}

/* Ranges larger and smaller than what is in memory. */
static void test_poison_ranges(Fixture *x, const void *data)
{
    for (unsigned i = 0; i < 20; i++) {
        qcow2_cache_put(get(x, i));
    }
    qcow2_cache_poison(x->c, place(3), 2 * CLUSTER);
    for (unsigned i = 0; i < 20; i++) {
        g_assert_true(has(x, place(i)) == (i < 3 || i > 4));
    }
    qcow2_cache_poison(x->c, place(10), (uint64_t)1 << 40);
    for (unsigned i = 0; i < 20; i++) {
        g_assert_true(has(x, place(i)) == (i < 10 && i != 3 && i != 4));
    }
}

/* Many runs where few tables are in memory, and few of them where many are. */
static void test_poison_list(Fixture *x, const void *data)
{
    Qcow2HostRun runs[200] = {{place(5) + 100, 1}, {place(8), 2 * CLUSTER}};
    for (unsigned i = 2; i < G_N_ELEMENTS(runs); i++) {
        runs[i] = (Qcow2HostRun){place(1000 + 2 * i), CLUSTER};
    }
    for (int many = 0; many < 2; many++) {
        for (unsigned i = 0; i < 12; i++) {
            qcow2_cache_put(get(x, i));
        }
        qcow2_cache_poison_list(x->c, runs, many ? G_N_ELEMENTS(runs) : 2);
        for (unsigned i = 0; i < 12; i++) {
            g_assert_true(has(x, place(i)) == (i != 5 && i != 8 && i != 9));
        }
    }
}

typedef struct Loader {
    Fixture *x;
    Qcow2Table *t;
} Loader;

static void *run_loader(void *opaque)
{
    Loader *l = opaque;
    bdrv_graph_rdlock();
    l->t = get(l->x, 7);
    bdrv_graph_rdunlock();
    return NULL;
}

/* Poisoned while it is read: nobody finds it afterwards, those who waited for it see that it is
 * stale. */
static void test_poison_loading(Fixture *x, const void *data)
{
    Loader l[4];
    pthread_t threads[G_N_ELEMENTS(l)];
    x->f->read_us = 20000;
    for (size_t i = 0; i < G_N_ELEMENTS(l); i++) {
        l[i] = (Loader){.x = x};
        g_assert_true(qb_thread_start(&threads[i], "loader", run_loader, &l[i]));
    }
    while (!has(x, place(7))) {
        g_usleep(100);
    }
    g_assert_null(qcow2_cache_peek(x->c, QCOW2_TABLE_L2, place(7))); /* not loaded yet */
    qcow2_cache_poison(x->c, place(7), CLUSTER);
    g_assert_false(has(x, place(7)));
    x->f->read_us = 0;
    Qcow2Table *fresh = get(x, 7);
    unsigned poisoned = 0;
    for (size_t i = 0; i < G_N_ELEMENTS(l); i++) {
        pthread_join(threads[i], NULL);
        poisoned += qcow2_table_poisoned(l[i].t);
        g_assert_true(qcow2_table_poisoned(l[i].t) == (l[i].t != fresh));
        g_assert_cmpuint(byte_at(l[i].t, 9), ==, 7);
        qcow2_cache_put(l[i].t);
    }
    g_assert_cmpuint(poisoned, >=, 1);
    qcow2_cache_put(fresh);
}

/* --- the limit --- */

static void test_trim(Fixture *x, const void *data)
{
    Qcow2Table *pinned = get(x, 0), *dirty = get(x, 1);
    store(dirty, 17, 0xee);
    qcow2_cache_put(dirty);
    set_limit(x, 16 * CLUSTER);
    for (unsigned i = 2; i < TABLES; i++) {
        qcow2_cache_put(get(x, i));
    }
    qcow2_cache_trim(x->c);
    unsigned there = 0;
    for (unsigned i = 0; i < TABLES; i++) {
        there += has(x, place(i));
    }
    g_assert_cmpuint(there, <=, 16);
    g_assert_true(has(x, place(0)) && has(x, place(1)));
    g_assert_cmpuint(byte_at(pinned, 0), ==, 0);
    dirty = get(x, 1);
    g_assert_cmpuint(byte_at(dirty, 17), ==, 0xee);
    qcow2_cache_put(dirty);
    qcow2_cache_put(pinned);
}

static void load_refblock(Fixture *x, unsigned i)
{
    Qcow2Table *t = NULL;
    g_assert_cmpint(qcow2_cache_get(x->c, QCOW2_TABLE_REFBLOCK, place(i), &t), ==, 0);
    qcow2_cache_put(t);
}

static unsigned count_there(Fixture *x, unsigned from, unsigned end)
{
    unsigned there = 0;
    for (unsigned i = from; i < end; i++) {
        there += has(x, place(i));
    }
    return there;
}

static void test_two_limits(Fixture *x, const void *data)
{
    configure(x, 4 * CLUSTER, 64 * CLUSTER, CLUSTER);
    for (unsigned i = 0; i < 32; i++) {
        load_refblock(x, i);
    }
    for (unsigned i = 32; i < 96; i++) {
        qcow2_cache_put(get(x, i));
    }
    qcow2_cache_trim(x->c);
    g_assert_cmpuint(count_there(x, 0, 32), ==, 32);
    g_assert_cmpuint(count_there(x, 32, 96), <=, 4);
    configure(x, 64 * CLUSTER, CLUSTER, CLUSTER);
    g_assert_cmpuint(count_there(x, 0, 32), <=, 1);
    qcow2_cache_poison(x->c, FIRST, TABLES * CLUSTER);

    Qcow2Table *dirty = get(x, 0), *other = get(x, 1);
    store(dirty, 0, 1);
    store(other, 0, 1);
    configure(x, 2 * CLUSTER, 64 * CLUSTER, CLUSTER);
    g_assert_false(qcow2_cache_too_dirty(x->c));
    g_assert_true(qcow2_cache_half_dirty(x->c));
    configure(x, CLUSTER, 64 * CLUSTER, CLUSTER);
    g_assert_true(qcow2_cache_too_dirty(x->c)); /* refcount blocks' room does not help */
    qcow2_cache_put(dirty);
    qcow2_cache_put(other);
}

/* --- parts --- */

static void slices(Fixture *x)
{
    configure(x, 4 * TABLES * CLUSTER, TABLES * CLUSTER, SLICE);
    g_assert_cmpuint(qcow2_cache_bytes(x->c), ==, 0);
}

static void test_loads_parts(Fixture *x, const void *data)
{
    slices(x);
    Qcow2Table *t = get_part(x, 3, SLICE - 1, 2), *same;
    g_assert_cmpuint(qcow2_cache_bytes(x->c), ==, 2 * SLICE);
    g_assert_cmpuint(byte_at(t, SLICE - 1), ==, 3);
    g_assert_cmpuint(byte_at(t, SLICE), ==, 3);
    store(t, SLICE, 0xee);
    g_assert_cmpuint(qcow2_cache_dirty_bytes(x->c), ==, SLICE);
    g_assert_null(qcow2_cache_peek(x->c, QCOW2_TABLE_L2, place(3)));
    same = get(x, 3); /* the rest: what was stored stays */
    g_assert_true(same == t);
    g_assert_cmpuint(qcow2_cache_bytes(x->c), ==, CLUSTER);
    g_assert_cmpuint(byte_at(t, SLICE), ==, 0xee);
    g_assert_cmpuint(byte_at(t, CLUSTER - 1), ==, 3);
    qcow2_cache_put(t);
    qcow2_cache_put(same);
}

/* Under the pin of a table what others asked for goes; what this one did, or is dirty, stays. */
static void test_drops_parts(Fixture *x, const void *data)
{
    slices(x);
    qcow2_cache_put(get(x, 3));
    Qcow2Table *t = get_part(x, 3, 0, 1), *dirty = get_part(x, 4, SLICE, 1);
    store(dirty, SLICE, 0xee);
    qcow2_cache_put(dirty);
    configure(x, 0, 0, SLICE);
    g_assert_cmpuint(qcow2_cache_bytes(x->c), ==, 2 * SLICE);
    g_assert_cmpuint(byte_at(t, 0), ==, 3);
    qcow2_cache_put(t);
    qcow2_cache_trim(x->c);
    g_assert_false(has(x, place(3)));
    dirty = get_part(x, 4, SLICE, 1);
    g_assert_cmpuint(byte_at(dirty, SLICE), ==, 0xee);
    qcow2_cache_put(dirty);
}

static void test_poisons_parts(Fixture *x, const void *data)
{
    slices(x);
    for (size_t pos = 0; pos < CLUSTER; pos += SLICE) {
        Qcow2Table *t = get_part(x, 3, pos, SLICE);
        if (pos != SLICE) {
            store(t, pos, 0xee);
        }
        qcow2_cache_put(t);
    }
    qcow2_cache_poison(x->c, place(3), 1);
    g_assert_false(has(x, place(3)));
    g_assert_cmpuint(qcow2_cache_bytes(x->c), ==, 0);
    g_assert_cmpuint(qcow2_cache_dirty_bytes(x->c), ==, 0);
    Qcow2Table *fresh = get(x, 3);
    for (size_t pos = 0; pos < CLUSTER; pos += SLICE) {
        g_assert_cmpuint(byte_at(fresh, pos), ==, 3);
    }
    qcow2_cache_put(fresh);
}

/* Another size of parts: tables with something to write keep theirs. */
static void test_other_parts(Fixture *x, const void *data)
{
    Qcow2Table *dirty = get(x, 3);
    store(dirty, 0, 0xee);
    qcow2_cache_put(dirty);
    qcow2_cache_put(get(x, 4));
    configure(x, 4 * TABLES * CLUSTER, TABLES * CLUSTER, SLICE);
    g_assert_cmpuint(qcow2_cache_bytes(x->c), ==, CLUSTER);
    qcow2_cache_put(get_part(x, 4, 0, 1));
    g_assert_cmpuint(qcow2_cache_bytes(x->c), ==, CLUSTER + SLICE);
    dirty = get_part(x, 3, 0, CLUSTER);
    g_assert_cmpuint(byte_at(dirty, 0), ==, 0xee);
    qcow2_cache_put(dirty);
}

/* --- collecting --- */

static GArray *collect(Fixture *x)
{
    GArray *pieces = g_array_new(false, false, sizeof(Qcow2DirtyPiece));
    g_assert_cmpint(qcow2_cache_collect_dirty(x->c, QCOW2_TABLE_L2, pieces), ==, 0);
    return pieces;
}

static void give_back(Fixture *x, GArray *pieces, bool failed, bool relink)
{
    qcow2_cache_return_pieces(x->c, pieces, failed, relink);
    g_array_free(pieces, true);
}

static const Qcow2DirtyPiece *piece(const GArray *pieces, guint i)
{
    g_assert_cmpuint(i, <, pieces->len);
    return &g_array_index(pieces, Qcow2DirtyPiece, i);
}

static void test_collect(Fixture *x, const void *data)
{
    Qcow2Table *t = get(x, 4);
    store(t, 0, 1);
    store(t, 600, 2);
    store(t, 2048, 3);
    GArray *p = collect(x);
    g_assert_cmpuint(p->len, ==, 1); /* with the little that is clean in between */
    g_assert_cmpuint(piece(p, 0)->offset, ==, place(4));
    g_assert_cmpuint(piece(p, 0)->bytes, ==, 2560);
    g_assert_cmpuint(piece(p, 0)->data[600], ==, 2);
    g_assert_cmpuint(piece(p, 0)->data[1100], ==, 4);
    g_assert_cmpuint(piece(p, 0)->data[2048], ==, 3);
    g_assert_false(piece(p, 0)->unlinked);
    store(t, 600, 9); /* while it is being written */
    g_assert_cmpuint(piece(p, 0)->data[600], ==, 2);
    give_back(x, p, false, false);
    p = collect(x);
    g_assert_cmpuint(p->len, ==, 1);
    g_assert_cmpuint(piece(p, 0)->offset, ==, place(4) + 512);
    g_assert_cmpuint(piece(p, 0)->data[88], ==, 9);
    give_back(x, p, true, false);
    store(t, 600, 10);
    p = collect(x);
    g_assert_cmpuint(p->len, ==, 1);
    g_assert_cmpuint(piece(p, 0)->data[88], ==, 10);
    give_back(x, p, false, false);
    p = collect(x);
    g_assert_cmpuint(p->len, ==, 0);
    give_back(x, p, false, false);
    qcow2_cache_put(t);
}

/* Parts that lie between dirty ones are not written with these: while that fails they may go. */
static void test_collect_parts(Fixture *x, const void *data)
{
    slices(x);
    qcow2_cache_put(get(x, 4));
    Qcow2Table *t = get_part(x, 4, 0, SLICE), *same = get_part(x, 4, 3 * SLICE, 2 * SLICE);
    store(t, 0, 1);
    store(t, 3 * SLICE, 2);
    store(t, 4 * SLICE, 3);
    GArray *p = collect(x);
    g_assert_cmpuint(p->len, ==, 2);
    g_assert_cmpuint(piece(p, 0)->bytes, ==, SLICE);
    g_assert_cmpuint(piece(p, 1)->offset, ==, place(4) + 3 * SLICE);
    g_assert_cmpuint(piece(p, 1)->bytes, ==, 2 * SLICE);
    configure(x, 0, 0, SLICE);
    give_back(x, p, true, false);
    qcow2_cache_put(t);
    qcow2_cache_put(same);
}

/* A new table is unlinked until it was collected; again when that failed before the barrier. */
static void test_unlinked(Fixture *x, const void *data)
{
    static const struct {
        bool failed, relink, unlinked;
    } steps[] = {{true, true, true}, {true, false, true}, {true, true, false}};
    Qcow2Table *t = qcow2_cache_add(x->c, QCOW2_TABLE_L2, place(6), NULL);
    g_assert_cmpuint(byte_at(t, 0), ==, 0);
    qcow2_cache_put(t); /* dirty ones stay */
    for (size_t i = 0; i < G_N_ELEMENTS(steps); i++) {
        GArray *p = collect(x);
        g_assert_cmpuint(p->len, ==, 1);
        g_assert_cmpuint(piece(p, 0)->bytes, ==, CLUSTER);
        g_assert_true(piece(p, 0)->unlinked == steps[i].unlinked);
        give_back(x, p, steps[i].failed, steps[i].relink);
    }
    g_assert_true(has(x, place(6)));
}

static bool reads_zero(Fixture *x, unsigned i, size_t pos, size_t len)
{
    static const uint8_t zeroes[CLUSTER];
    const Qcow2TableRange range = {QCOW2_TABLE_L2, place(i), pos, len};
    uint8_t out[CLUSTER];
    return qcow2_cache_copy_part(x->c, &range, out) && !memcmp(out, zeroes, len);
}

/* Zeroes of the file, where the test has other bytes to see who reads it: they are known without
 * I/O, in memory when asked for to be stored to, and dirty is only what was. */
static void test_zeroed(Fixture *x, const void *data)
{
    slices(x);
    Qcow2Table *t = qcow2_cache_add_zeroed(x->c, place(9));
    uint8_t out[CLUSTER] = {1};
    g_assert_cmpuint(qcow2_cache_dirty_bytes(x->c), ==, 0);
    g_assert_true(reads_zero(x, 9, 0, CLUSTER));
    g_assert_true(qcow2_table_load_present(t, out));
    g_assert_cmpuint(out[0], ==, 0);
    g_assert_cmpuint(qcow2_cache_bytes(x->c), ==, 0);
    const Qcow2TableRange range = {QCOW2_TABLE_L2, place(9), 3 * SLICE, 16};
    g_assert_true(qcow2_cache_peek_part(x->c, &range) == t);
    g_assert_cmpuint(qcow2_cache_bytes(x->c), ==, SLICE);
    store(t, 3 * SLICE, 7);
    g_assert_cmpuint(qcow2_cache_dirty_bytes(x->c), ==, SLICE);
    g_assert_cmpuint(byte_at(t, 3 * SLICE), ==, 7);
    g_assert_cmpuint(byte_at(t, 4 * SLICE), ==, 0);
    qcow2_cache_put(t);
    qcow2_cache_put(t);
    GArray *p = collect(x);
    g_assert_cmpuint(p->len, ==, 1);
    g_assert_cmpuint(piece(p, 0)->offset, ==, place(9) + 3 * SLICE);
    g_assert_cmpuint(piece(p, 0)->bytes, ==, SLICE);
    g_assert_false(piece(p, 0)->unlinked); /* the L1 that names it may be stable */
    give_back(x, p, false, false);
    t = qcow2_cache_add_zeroed(x->c, place(10)); /* what nobody wants anything of goes at once */
    qcow2_cache_put(t);
    g_assert_false(has(x, place(10)));
}

/* What was stored is not zero any more when it was written and dropped; the rest is. */
static void test_zeroed_trimmed(Fixture *x, const void *data)
{
    slices(x);
    Qcow2Table *t = qcow2_cache_add_zeroed(x->c, place(9));
    qcow2_cache_put(get_part(x, 9, 0, SLICE));
    qcow2_cache_put(get_part(x, 9, 2 * SLICE, SLICE));
    store(t, 0, 7);
    give_back(x, collect(x), false, false);
    qcow2_cache_put(get_part(x, 9, SLICE, SLICE));
    store(t, SLICE, 7); /* dirty: keeps the table */
    qcow2_cache_put(t);
    configure(x, 0, 0, SLICE);
    g_assert_cmpuint(qcow2_cache_bytes(x->c), ==, SLICE);
    g_assert_false(reads_zero(x, 9, 0, SLICE));
    g_assert_true(reads_zero(x, 9, 2 * SLICE, CLUSTER - 2 * SLICE));
    t = get(x, 9);
    g_assert_cmpuint(byte_at(t, 0), ==, 9); /* from the file */
    g_assert_cmpuint(byte_at(t, SLICE), ==, 7);
    g_assert_cmpuint(byte_at(t, 2 * SLICE), ==, 0);
    qcow2_cache_put(t);
}

/* Poisoned while it is being written: it does not come back when that failed. */
static void test_poison_collected(Fixture *x, const void *data)
{
    Qcow2Table *t = qcow2_cache_add(x->c, QCOW2_TABLE_L2, place(8), NULL);
    qcow2_cache_put(t);
    GArray *p = collect(x);
    g_assert_cmpuint(p->len, ==, 1);
    qcow2_cache_poison(x->c, place(8), CLUSTER);
    give_back(x, p, true, true);
    g_assert_false(has(x, place(8)));
    g_assert_cmpuint(qcow2_cache_dirty_bytes(x->c), ==, 0);
}

/* --- all at once --- */

typedef struct Brawler {
    Fixture *x;
    GRand *rand;
} Brawler;

/* Everybody stores i into table i, so that content never depends on who came first. */
static void brawl_once(Brawler *b)
{
    unsigned i = (unsigned)g_rand_int_range(b->rand, 0, 24);
    switch (g_rand_int_range(b->rand, 0, 8)) {
    case 0:
        qcow2_cache_poison(b->x->c, place(i), CLUSTER);
        break;
    case 1:
        qcow2_cache_put(qcow2_cache_peek(b->x->c, QCOW2_TABLE_L2, place(i)));
        break;
    case 2:
        give_back(b->x, collect(b->x), g_rand_boolean(b->rand), true);
        break;
    case 3:
        qcow2_cache_put(qcow2_cache_add_zeroed(b->x->c, place(0)));
        break;
    default: {
        size_t pos = (size_t)g_rand_int_range(b->rand, 0, CLUSTER);
        size_t len = (size_t)g_rand_int_range(b->rand, 1, (gint32)(CLUSTER - pos) + 1);
        Qcow2Table *t = get_part(b->x, i, pos, len);
        g_assert_cmpuint(byte_at(t, pos), ==, i);
        g_assert_cmpuint(byte_at(t, pos + len - 1), ==, i);
        store(t, pos + len / 2, (uint8_t)i);
        qcow2_cache_put(t);
    }
    }
}

static void *run_brawl(void *opaque)
{
    Brawler *b = opaque;
    bdrv_graph_rdlock();
    for (int i = 0; i < 2000; i++) {
        brawl_once(b);
    }
    bdrv_graph_rdunlock();
    return NULL;
}

static void brawl(Fixture *x, size_t part)
{
    Brawler b[4];
    pthread_t threads[G_N_ELEMENTS(b)];
    configure(x, 8 * part, CLUSTER, part);
    for (guint i = 0; i < G_N_ELEMENTS(b); i++) {
        b[i] = (Brawler){.x = x, .rand = g_rand_new_with_seed(i)};
        g_assert_true(qb_thread_start(&threads[i], "brawl", run_brawl, &b[i]));
    }
    for (guint i = 0; i < G_N_ELEMENTS(b); i++) {
        pthread_join(threads[i], NULL);
        g_rand_free(b[i].rand);
    }
}

static void test_brawl(Fixture *x, const void *data)
{
    brawl(x, CLUSTER);
    brawl(x, SLICE);
}

static void add(const char *name, void (*fn)(Fixture *x, const void *data))
{
    g_autofree char *path = g_strconcat("/qcow2-cache/", name, NULL);
    g_test_add(path, Fixture, NULL, setup, fn, teardown);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    rec_setup();
    add("get", test_get);
    add("failed-load", test_failed_load);
    add("bad-places", test_bad_places);
    add("two-kinds", test_two_kinds);
    add("poison-pinned", test_poison_pinned);
    add("poison-ranges", test_poison_ranges);
    add("poison-list", test_poison_list);
    add("poison-loading", test_poison_loading);
    add("trim", test_trim);
    add("two-limits", test_two_limits);
    add("loads-parts", test_loads_parts);
    add("drops-parts", test_drops_parts);
    add("poison-parts", test_poisons_parts);
    add("other-parts", test_other_parts);
    add("collect", test_collect);
    add("collect-parts", test_collect_parts);
    add("unlinked", test_unlinked);
    add("zeroed", test_zeroed);
    add("zeroed-trimmed", test_zeroed_trimmed);
    add("poison-collected", test_poison_collected);
    add("brawl", test_brawl);
    int ret = g_test_run();
    image_teardown();
    return ret;
}
