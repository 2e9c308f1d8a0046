/*
 * Allocation of host clusters against an oracle of counts, for all widths of counts; packing;
 * quarantine; how long a file gets; what happens when there is no more space.
 *
 * The oracle knows for every cluster how many references the test holds (mine), how many wait in
 * quarantine (gone), and which clusters are the image's own; the count must be the sum.
 *
 * SPDX-License-Identifier: MIT
 */
#include "qcow2-rec.h"

#include "block/qcow2-refcount-int.h"

#define CLUSTERS 16384 /* that the oracle looks at */
#define MAX_LIVE 160

/* --- the oracle --- */

typedef struct Piece {
    uint64_t offset, bytes;
} Piece;

typedef struct World {
    RecFile *f;
    BlockBackend *blk;
    BlockDriverState *bs;
    BDRVQcow2State *s;
    GRand *rand;
    uint16_t mine[CLUSTERS], gone[CLUSTERS];
    bool own[CLUSTERS];
    uint64_t reftable;           /* where it was when own[] was made */
    unsigned reftable_clusters;
    GArray *live, *waiting;      /* Piece */
} World;

static uint64_t pick(World *w, uint64_t n)
{
    return g_rand_int(w->rand) % n;
}

static void add_to(const World *w, uint16_t *counts, Piece p, int delta)
{
    uint64_t first = p.offset >> w->s->cluster_bits;
    uint64_t last = (p.offset + p.bytes - 1) >> w->s->cluster_bits;
    for (uint64_t c = first; c <= last; c++) {
        g_assert_cmpuint(c, <, CLUSTERS);
        counts[c] = (uint16_t)(counts[c] + delta);
    }
}

static void own_run(World *w, uint64_t offset, uint64_t clusters)
{
    for (uint64_t i = 0; i < clusters; i++) {
        uint64_t c = (offset >> w->s->cluster_bits) + i;
        g_assert_cmpuint(c, <, CLUSTERS);
        g_assert_cmpuint(w->mine[c] + w->gone[c], ==, 0);
        w->own[c] = true;
    }
}

/* The image's own clusters as they are now; an old refcount table waits for the flush like
 * others. */
static void look_at_own(World *w)
{
    BDRVQcow2State *s = w->s;
    QB_GUARD(&s->alloc_lock);
    memset(w->own, 0, sizeof(w->own));
    if (w->reftable && w->reftable != s->reftable.offset) {
        Piece old = {w->reftable, (uint64_t)w->reftable_clusters << s->cluster_bits};
        g_array_append_val(w->waiting, old);
        add_to(w, w->gone, old, 1);
    }
    w->reftable = s->reftable.offset;
    w->reftable_clusters = s->reftable.clusters;
    own_run(w, 0, 1);
    own_run(w, w->reftable, w->reftable_clusters);
    own_run(w, qcow2_l1_table_offset(s),
            qcow2_size_to_clusters(s, (uint64_t)qcow2_l1_size(s) * sizeof(uint64_t)));
    for (uint64_t i = 0; i < s->reftable.nb_blocks; i++) {
        uint64_t offset = qcow2_block_offset_locked(s, i);
        if (offset) {
            own_run(w, offset, 1);
        }
    }
}

static uint64_t expected(const World *w, uint64_t c)
{
    return (uint64_t)w->own[c] + w->mine[c] + w->gone[c];
}

static void expect_counts(World *w)
{
    look_at_own(w);
    for (uint64_t c = 0, n; c < CLUSTERS; c += n) {
        uint64_t count, bytes;
        g_assert_cmpint(qcow2_count_run(w->bs, c << w->s->cluster_bits,
                                        (CLUSTERS - c) << w->s->cluster_bits, &count, &bytes),
                        ==, 0);
        n = bytes >> w->s->cluster_bits;
        for (uint64_t i = 0; i < n; i++) {
            if (expected(w, c + i) != count) {
                g_error("cluster %" PRIu64 " has count %" PRIu64 ", not %" PRIu64, c + i, count,
                        expected(w, c + i));
            }
        }
    }
}

static void world_open(World *w)
{
    w->blk = rec_open_rw(w->f);
    w->bs = blk_bs(w->blk);
    w->s = image_state(w->blk);
    bdrv_graph_rdlock();
}

static void world_close(World *w)
{
    bdrv_graph_rdunlock();
    blk_unref(w->blk);
}

static World *world_new(const char *opts, size_t capacity)
{
    World *w = g_new0(World, 1);
    w->f = rec_image_new("a", opts, capacity);
    w->rand = g_rand_new_with_seed((guint32)g_test_rand_int());
    w->live = g_array_new(false, false, sizeof(Piece));
    w->waiting = g_array_new(false, false, sizeof(Piece));
    world_open(w);
    look_at_own(w);
    return w;
}

static void world_free(World *w)
{
    world_close(w);
    rec_file_free(w->f);
    g_rand_free(w->rand);
    g_array_free(w->live, true);
    g_array_free(w->waiting, true);
    g_free(w);
}

/* --- operations --- */

static void expect_fresh(World *w, Piece p)
{
    look_at_own(w);
    for (uint64_t at = p.offset; at < p.offset + p.bytes; at += w->s->cluster_size) {
        g_assert_cmpuint(expected(w, at >> w->s->cluster_bits), ==, 0);
    }
}

static void take(World *w, Piece p)
{
    add_to(w, w->mine, p, 1);
    g_array_append_val(w->live, p);
}

/* First fit: nothing below is free. */
static void expect_lowest(World *w, uint64_t offset)
{
    for (uint64_t c = 0; c < offset >> w->s->cluster_bits; c++) {
        if (expected(w, c) == 0) {
            g_error("cluster %" PRIu64 " was free, %" PRIu64 " was taken", c,
                    offset >> w->s->cluster_bits);
        }
    }
}

static void op_clusters(World *w)
{
    uint64_t n = pick(w, 4) ? 1 : pick(w, 100) + 1;
    int64_t offset = qcow2_alloc_clusters(w->bs, n << w->s->cluster_bits);
    g_assert_cmpint(offset, >, 0);
    Piece p = {(uint64_t)offset, n << w->s->cluster_bits};
    expect_fresh(w, p);
    if (n == 1) {
        expect_lowest(w, p.offset);
    }
    take(w, p);
}

static void op_run(World *w)
{
    uint64_t bytes = (pick(w, 20) + 1) << w->s->cluster_bits, asked = bytes, want = 0;
    if (w->live->len && pick(w, 2)) {
        Piece last = g_array_index(w->live, Piece, pick(w, w->live->len));
        want = qb_align_up(last.offset + last.bytes, w->s->cluster_size);
    }
    look_at_own(w);
    bool was_free = want && expected(w, want >> w->s->cluster_bits) == 0
                    && want >> w->s->cluster_bits
                           < w->s->reftable.nb_blocks << w->s->refblock_bits;
    int64_t offset = qcow2_alloc_run(w->bs, want, &bytes);
    g_assert_cmpint(offset, >, 0);
    g_assert_cmpuint(bytes, >=, w->s->cluster_size);
    g_assert_cmpuint(bytes, <=, asked);
    g_assert_true(!was_free || (uint64_t)offset == want);
    Piece p = {(uint64_t)offset, bytes};
    expect_fresh(w, p);
    take(w, p);
}

static void op_bytes(World *w)
{
    uint32_t size = (uint32_t)pick(w, w->s->cluster_size - 1) + 1;
    int64_t offset = qcow2_alloc_bytes(w->bs, size);
    g_assert_cmpint(offset, >, 0);
    look_at_own(w);
    Piece p = {(uint64_t)offset, size};
    for (guint i = 0; i < w->live->len; i++) { /* clusters may be shared, bytes not */
        Piece q = g_array_index(w->live, Piece, i);
        g_assert_false(qb_ranges_overlap(p.offset, p.bytes, q.offset, q.bytes));
    }
    for (guint i = 0; i < w->waiting->len; i++) {
        Piece q = g_array_index(w->waiting, Piece, i);
        g_assert_false(qb_ranges_overlap(p.offset, p.bytes, q.offset, q.bytes));
    }
    take(w, p);
}

static Piece take_live(World *w)
{
    guint i = (guint)pick(w, w->live->len);
    Piece p = g_array_index(w->live, Piece, i);
    g_array_remove_index_fast(w->live, i);
    add_to(w, w->mine, p, -1);
    return p;
}

static void op_undo(World *w)
{
    if (w->live->len) {
        Piece p = take_live(w);
        qcow2_alloc_undo(w->bs, p.offset, p.bytes);
    }
}

static void op_free(World *w)
{
    if (w->live->len) {
        Piece p = take_live(w);
        qcow2_free_run(w->bs, p.offset, p.bytes, QCOW2_DISCARD_ALWAYS);
        add_to(w, w->gone, p, 1);
        g_array_append_val(w->waiting, p);
    }
}

static void op_flush(World *w)
{
    look_at_own(w);
    g_assert_cmpint(qcow2_flush(w->bs), ==, 0);
    memset(w->gone, 0, sizeof(w->gone));
    g_array_set_size(w->waiting, 0);
    expect_counts(w);
}

static void random_op(World *w)
{
    static void (*const ops[])(World *) = {
        op_clusters, op_clusters, op_run, op_run, op_bytes, op_bytes, op_bytes, op_undo, op_free,
    };
    if (w->live->len > MAX_LIVE) {
        op_free(w);
        op_undo(w);
    }
    /* quarantine stays below what makes an allocation flush by itself */
    if (qcow2_quarantine_bytes(w->s) > 700000 || pick(w, 40) == 0) {
        op_flush(w);
    }
    ops[pick(w, G_N_ELEMENTS(ops))](w);
}

/* --- random --- */

typedef struct Width {
    unsigned bits, cluster;
} Width;

static void test_random(const void *data)
{
    const Width *width = data;
    g_autofree char *opts = g_strdup_printf("size=1M,cluster_size=%u,refcount_bits=%u",
                                            width->cluster, width->bits);
    World *w = world_new(opts, (size_t)CLUSTERS * width->cluster);
    unsigned tables = w->s->reftable.clusters;
    for (int i = 0; i < 250; i++) {
        random_op(w);
    }
    op_flush(w);
    if (width->cluster == 512 && width->bits == 64) { /* 64 clusters a block, 64 blocks a cluster */
        while (w->s->reftable.nb_blocks <= 70) {
            int64_t offset = qcow2_alloc_clusters(w->bs, 60 * 512);
            g_assert_cmpint(offset, >, 0);
            look_at_own(w);
            take(w, (Piece){(uint64_t)offset, 60 * 512});
        }
        g_assert_cmpuint(w->s->reftable.clusters, >, tables);
        op_flush(w);
    }
    world_close(w);
    world_open(w);
    expect_counts(w);
    while (w->live->len) {
        op_free(w);
    }
    op_flush(w);
    g_assert_cmpint(qcow2_flush_all(w->bs), ==, 0);
    g_assert_true(qcow2_is_clean(w->s));
    world_close(w);
    rec_check(w->f, false);
    world_open(w);
    world_free(w);
}

/* --- packing --- */

/* Streams lie back to back, over the ends of clusters, too. */
static void test_packing(void)
{
    World *w = world_new("size=1M,cluster_size=4k", CLUSTERS * 4096);
    int64_t first = qcow2_alloc_bytes(w->bs, 1000);
    for (int i = 1; i < 40; i++) {
        g_assert_cmpint(qcow2_alloc_bytes(w->bs, 1000), ==, first + i * 1000);
    }
    uint64_t count;
    g_assert_cmpint(qcow2_get_refcount(w->bs, (uint64_t)first / 4096, &count), ==, 0);
    g_assert_cmpuint(count, ==, 5); /* four, and one that begins here */
    for (int i = 0; i < 40; i++) {
        qcow2_alloc_undo(w->bs, (uint64_t)first + (uint64_t)i * 1000, 1000);
    }
    expect_counts(w);
    world_free(w);
}

/* A stream that is freed or undone is not packed behind: its cluster may be about to go. */
static void test_packing_ends(void)
{
    World *w = world_new("size=1M,cluster_size=4k", CLUSTERS * 4096);
    for (int undo = 0; undo < 2; undo++) {
        int64_t a = qcow2_alloc_bytes(w->bs, 100), b = qcow2_alloc_bytes(w->bs, 200);
        g_assert_cmpint(b, ==, a + 100);
        qcow2_free_run(w->bs, (uint64_t)a, 100, QCOW2_DISCARD_ALWAYS);
        int64_t c = qcow2_alloc_bytes(w->bs, 300);
        g_assert_cmpint(c / 4096, !=, a / 4096);
        if (undo) {
            qcow2_alloc_undo(w->bs, (uint64_t)c, 300);
        } else {
            qcow2_free_run(w->bs, (uint64_t)c, 300, QCOW2_DISCARD_ALWAYS);
        }
        g_assert_cmpuint(w->s->compressed_next, ==, 0);
        qcow2_free_run(w->bs, (uint64_t)b, 200, QCOW2_DISCARD_ALWAYS);
        g_assert_cmpint(qcow2_flush(w->bs), ==, 0);
        expect_counts(w);
    }
    world_free(w);
}

/* One that is undone while the one before it lives. */
static void test_packing_undo(void)
{
    World *w = world_new("size=1M,cluster_size=4k", CLUSTERS * 4096);
    int64_t a = qcow2_alloc_bytes(w->bs, 100), b = qcow2_alloc_bytes(w->bs, 200);
    g_assert_cmpint(b, ==, a + 100);
    qcow2_alloc_undo(w->bs, (uint64_t)b, 200);
    g_assert_cmpuint(w->s->compressed_next, ==, 0);
    qcow2_alloc_undo(w->bs, (uint64_t)a, 100);
    expect_counts(w);
    world_free(w);
}

typedef struct Packer {
    BlockDriverState *bs;
    uint32_t size;
    int64_t offset;
} Packer;

static void *pack(void *opaque)
{
    Packer *p = opaque;
    BDRV_GRAPH_GUARD();
    p->offset = qcow2_alloc_bytes(p->bs, p->size);
    return NULL;
}

/* Somebody has the rest of a cluster and is looking for the one behind it: nobody else gets that rest. */
static void test_packing_race(void)
{
    pthread_t thread;
    image_create("packing", "size=1M");
    BlockBackend *blk = image_open_debug("packing", "");
    BlockDriverState *bs = blk_bs(blk);
    Packer first = {bs, 1000, 0}, longer = {bs, 65000, 0}, last = {bs, 500, 0};
    pack(&first);
    g_assert_cmpint(bdrv_debug_breakpoint(bs, "cluster_alloc", "A"), ==, 0);
    g_assert_true(qb_thread_start(&thread, "packer", pack, &longer));
    while (!bdrv_debug_is_suspended(bs, "A")) {
        g_usleep(200);
    }
    pack(&last);
    g_assert_cmpint(bdrv_debug_resume(bs, "A"), ==, 0);
    pthread_join(thread, NULL);
    g_assert_cmpint(longer.offset, ==, first.offset + first.size);
    g_assert_cmpint(last.offset, >=, longer.offset + longer.size);
    blk_unref(blk);
}

/* The header's cluster is not for anybody, even where its count is wrong. */
static void test_cluster_0(void)
{
    World *w = world_new("size=1M,cluster_size=4k", CLUSTERS * 4096);
    Qcow2HostRun header = {0, 4096};
    g_assert_cmpint(qcow2_alloc_clusters(w->bs, 4096), >, 0); /* the block has been looked at */
    g_assert_cmpint(qcow2_update_refcounts(w->bs, &header, 1, -1), ==, 0);
    int64_t a = qcow2_alloc_clusters(w->bs, 4096);
    g_assert_cmpint(a, >, 0);
    qcow2_alloc_undo(w->bs, (uint64_t)a, 4096);
    /* in use without a count */
    g_assert_cmpint(qcow2_update_refcounts(w->bs, &header, 1, 1), ==, -EIO);
    g_assert_true(atomic_load(&w->s->corrupt));
    world_free(w);
}

/* Counts are changed all or not at all. */
static void test_update_limits(void)
{
    World *w = world_new("size=1M,cluster_size=4k,refcount_bits=2", CLUSTERS * 4096);
    int64_t a = qcow2_alloc_clusters(w->bs, 3 * 4096);
    Qcow2HostRun last = {(uint64_t)a + 2 * 4096, 4096}, all = {(uint64_t)a, 3 * 4096};
    Qcow2HostRun beyond = {(uint64_t)1 << 40, 4096};
    g_assert_cmpint(qcow2_update_refcounts(w->bs, &last, 1, 1), ==, 0);
    g_assert_cmpint(qcow2_update_refcounts(w->bs, &all, 1, 2), ==, -EINVAL);
    uint64_t count;
    g_assert_cmpint(qcow2_get_refcount(w->bs, (uint64_t)a >> 12, &count), ==, 0);
    g_assert_cmpuint(count, ==, 1);
    g_assert_cmpint(qcow2_update_refcounts(w->bs, &last, 1, -1), ==, 0);
    g_assert_cmpint(qcow2_update_refcounts(w->bs, &all, 1, -1), ==, 0);
    expect_counts(w);
    g_assert_false(atomic_load(&w->s->corrupt));
    uint64_t blocks = w->s->reftable.nb_blocks;
    g_assert_cmpint(qcow2_update_refcounts(w->bs, &beyond, 1, 1), ==, -EIO); /* no block is made */
    g_assert_cmpuint(w->s->reftable.nb_blocks, ==, blocks);
    g_assert_true(atomic_load(&w->s->corrupt));
    world_free(w);
}

/* --- quarantine --- */

static bool is_free(World *w, int64_t offset)
{
    uint64_t count;
    g_assert_cmpint(qcow2_get_refcount(w->bs, (uint64_t)offset >> w->s->cluster_bits, &count), ==,
                    0);
    return count == 0;
}

/* Freed runs stay until the flush, and until those who may use them have left. */
static void test_quarantine_users(void)
{
    World *w = world_new("size=1M,cluster_size=4k", CLUSTERS * 4096);
    int64_t a = qcow2_alloc_clusters(w->bs, 4096), b = qcow2_alloc_clusters(w->bs, 4096);
    Qcow2User on_a, unresolved;
    qcow2_user_announce(w->s, &on_a);
    qcow2_user_resolve(w->s, &on_a, (uint64_t)a, 512);
    qcow2_free_run(w->bs, (uint64_t)a, 4096, QCOW2_DISCARD_ALWAYS);
    qcow2_user_announce(w->s, &unresolved);
    g_assert_cmpint(qcow2_flush(w->bs), ==, 0);
    g_assert_false(is_free(w, a));
    g_assert_cmpuint(qcow2_quarantine_bytes(w->s), ==, 4096);
    g_assert_cmpuint(qcow2_quarantine_releasable(w->s), ==, 0); /* a flush would not help */
    qcow2_free_run(w->bs, (uint64_t)b, 4096, QCOW2_DISCARD_ALWAYS);
    g_assert_cmpint(qcow2_flush(w->bs), ==, 0);
    g_assert_false(is_free(w, b)); /* pinned by the one who may be anywhere */
    qcow2_user_leave(w->s, &on_a);
    g_assert_cmpint(qcow2_flush(w->bs), ==, 0);
    g_assert_true(is_free(w, a) && !is_free(w, b)); /* freed before the other came */
    qcow2_user_leave(w->s, &unresolved);
    g_assert_false(is_free(w, b));
    g_assert_cmpint(qcow2_flush(w->bs), ==, 0);
    g_assert_true(is_free(w, b));
    g_assert_cmpuint(qcow2_quarantine_bytes(w->s), ==, 0);
    world_free(w);
}

/* Runs that touch are one in quarantine: who came between the two may still be on the second. */
static void test_quarantine_merged(void)
{
    World *w = world_new("size=1M,cluster_size=4k", CLUSTERS * 4096);
    int64_t a = qcow2_alloc_clusters(w->bs, 8192), b = a + 4096;
    Qcow2User on_b;
    qcow2_free_run(w->bs, (uint64_t)a, 4096, QCOW2_DISCARD_ALWAYS);
    qcow2_user_announce(w->s, &on_b);
    qcow2_user_resolve(w->s, &on_b, (uint64_t)b, 512);
    qcow2_free_run(w->bs, (uint64_t)b, 4096, QCOW2_DISCARD_ALWAYS);
    g_assert_cmpint(qcow2_flush(w->bs), ==, 0);
    g_assert_false(is_free(w, b));
    qcow2_user_leave(w->s, &on_b);
    g_assert_cmpint(qcow2_flush(w->bs), ==, 0);
    g_assert_true(is_free(w, a) && is_free(w, b));
    world_free(w);
}

typedef struct FreeLater {
    World *w;
    int64_t offset;
} FreeLater;

static void free_later(void *opaque)
{
    FreeLater *later = opaque;
    qcow2_free_run(later->w->bs, (uint64_t)later->offset, 4096, QCOW2_DISCARD_ALWAYS);
}

/* What is freed while a flush is under way waits for the next one: this one has copied its
 * tables. */
static void test_quarantine_generation(void)
{
    World *w = world_new("size=1M,cluster_size=4k", CLUSTERS * 4096);
    FreeLater later = {w, qcow2_alloc_clusters(w->bs, 4096)};
    w->f->opaque = &later;
    w->f->on_flush = free_later;
    g_assert_cmpint(qcow2_flush(w->bs), ==, 0);
    g_assert_null(w->f->on_flush);
    g_assert_false(is_free(w, later.offset));
    g_assert_cmpint(qcow2_flush(w->bs), ==, 0);
    g_assert_true(is_free(w, later.offset));
    world_free(w);
}

/* References to the same clusters that go together, as whole runs and as streams. */
static void test_quarantine_overlaps(void)
{
    World *w = world_new("size=1M,cluster_size=4k", CLUSTERS * 4096);
    int64_t a = qcow2_alloc_clusters(w->bs, 8 * 4096);
    Qcow2HostRun twice[] = {{(uint64_t)a, 5 * 4096}, {(uint64_t)a + 2 * 4096, 6 * 4096},
                            {(uint64_t)a + 100, 1}};
    g_autofree uint8_t *buf = g_malloc(8 * 4096);
    memset(buf, 0x11, 8 * 4096);
    g_assert_cmpint(bdrv_pwrite(w->bs->file, a, 8 * 4096, buf, 0), ==, 0);
    g_assert_cmpint(qcow2_update_refcounts(w->bs, twice, 3, 1), ==, 0);
    qcow2_free_run(w->bs, (uint64_t)a, 8 * 4096, QCOW2_DISCARD_ALWAYS);
    qcow2_free_run(w->bs, (uint64_t)a, 5 * 4096, QCOW2_DISCARD_ALWAYS);
    qcow2_free_run(w->bs, (uint64_t)a + 100, 1, QCOW2_DISCARD_NEVER);
    g_assert_cmpint(qcow2_flush(w->bs), ==, 0);
    for (int i = 0; i < 8; i++) {
        g_assert_true(is_free(w, a + i * 4096) == (i < 2)); /* 2, 2, 1... were left */
        g_assert_cmpint(w->f->data[a + i * 4096] == 0, ==, i < 2); /* punched */
    }
    qcow2_free_run(w->bs, (uint64_t)a + 2 * 4096, 6 * 4096, QCOW2_DISCARD_NEVER);
    g_assert_cmpint(qcow2_flush(w->bs), ==, 0);
    for (int i = 2; i < 8; i++) {
        g_assert_true(is_free(w, a + i * 4096));
        g_assert_cmpint(w->f->data[a + i * 4096], ==, 0x11); /* not asked for */
    }
    world_free(w);
}

/* Pairs of clusters, and many in a row at the end, freed backwards in one go: counts and space go,
 * others' stay. */
static void test_quarantine_any_order(void)
{
    enum { N = 200, TAIL = 150 };
    World *w = world_new("size=1M,cluster_size=512", CLUSTERS * 512);
    int64_t a = qcow2_alloc_clusters(w->bs, N * 512);
    Qcow2HostRun runs[N];
    size_t n = 0;
    g_autofree uint8_t *buf = g_malloc(N * 512);
    memset(buf, 0x11, N * 512);
    g_assert_cmpint(bdrv_pwrite(w->bs->file, a, N * 512, buf, 0), ==, 0);
    for (int i = N - 1; i >= 0; i--) {
        if (i % 6 == 2 || i % 6 == 3 || i >= TAIL) {
            runs[n++] = (Qcow2HostRun){(uint64_t)a + (uint64_t)i * 512, 512};
        }
    }
    qcow2_free_list(w->bs, runs, n, QCOW2_DISCARD_ALWAYS);
    g_assert_cmpuint(qcow2_quarantine_bytes(w->s), ==, n * 512);
    g_assert_cmpint(qcow2_flush(w->bs), ==, 0);
    for (int i = 0; i < N; i++) {
        bool gone = i % 6 == 2 || i % 6 == 3 || i >= TAIL;
        g_assert_true(is_free(w, a + i * 512) == gone);
        g_assert_cmpint(w->f->data[a + i * 512], ==, gone ? 0 : 0x11);
    }
    qcow2_free_run(w->bs, (uint64_t)a, 512, QCOW2_DISCARD_ALWAYS); /* of two kinds */
    qcow2_free_run(w->bs, (uint64_t)a + 512, 512, QCOW2_DISCARD_NEVER);
    g_assert_cmpint(qcow2_flush(w->bs), ==, 0);
    g_assert_true(is_free(w, a) && is_free(w, a + 512));
    g_assert_cmpint(w->f->data[a], ==, 0);
    g_assert_cmpint(w->f->data[a + 512], ==, 0x11);
    world_free(w);
}

/* What a shrink frees stays as it is, whichever flush it was ready at; what others free meanwhile, and
 * clusters that somebody else has, do not. */
static void test_quarantine_spare(void)
{
    World *w = world_new("size=1M,cluster_size=4k", CLUSTERS * 4096);
    uint64_t a = (uint64_t)qcow2_alloc_clusters(w->bs, 8 * 4096);
    Qcow2HostRun shared = {a + 4096, 4096};
    g_autoptr(GArray) spare = g_array_new(false, false, sizeof(Qcow2HostRun));
    g_assert_cmpint(qcow2_update_refcounts(w->bs, &shared, 1, 1), ==, 0);
    qcow2_quarantine_hold(w->s);
    for (int half = 0; half < 2; half++) {
        Qcow2HostRun runs[] = {{a + 4096, 4096}, {a, 4096}};
        Qcow2HostRun more[] = {{a + 6 * 4096, 4096}, {a + 3 * 4096, 4096}, {a + 5 * 4096, 4096}};
        qcow2_free_list(w->bs, half ? more : runs, half ? 3 : 2, QCOW2_DISCARD_ALWAYS);
        qcow2_free_run(w->bs, a + (half ? 7 : 2) * 4096, 4096, QCOW2_DISCARD_OTHER);
        g_assert_cmpint(qcow2_flush(w->bs), ==, 0);
    }
    g_assert_cmpint(qcow2_quarantine_take(w->bs, spare), ==, 0);
    const Qcow2HostRun expected[] = {{a, 4096}, {a + 3 * 4096, 4096}, {a + 5 * 4096, 2 * 4096}};
    g_assert_cmpmem(spare->data, spare->len * sizeof(Qcow2HostRun), expected, sizeof(expected));
    for (int i = 0; i < 8; i++) {
        g_assert_true(is_free(w, (int64_t)a + i * 4096) == (i == 2 || i == 7));
    }
    g_assert_cmpint(qcow2_release_spare(w->bs, spare, UINT64_MAX), ==, 0);
    for (int i = 0; i < 8; i++) { /* 1: the other's; 4: nobody freed it */
        g_assert_true(is_free(w, (int64_t)a + i * 4096) == (i != 1 && i != 4));
    }
    world_free(w);
}

/* A guest that discards and writes without ever flushing: the driver flushes by itself. */
static void test_bounded(void)
{
    World *w = world_new("size=8M,cluster_size=4k", 64 * MIB);
    bdrv_graph_rdunlock(); /* requests come from outside */
    g_autofree uint8_t *buf = g_malloc0(64 * KIB);
    int64_t longest = 0;
    for (int i = 0; i < 10000; i++) {
        int64_t offset = (int64_t)pick(w, 64) * 128 * KIB;
        g_assert_cmpint(blk_pdiscard(w->blk, offset, 64 * KIB), ==, 0);
        buf[0] = (uint8_t)i;
        g_assert_cmpint(blk_pwrite(w->blk, offset, 64 * KIB, buf, 0), ==, 0);
        g_assert_cmpuint(qcow2_quarantine_bytes(w->s), <=, 1200 * KIB);
        longest = MAX(longest, w->f->length);
    }
    for (int i = 0; i < 64; i++) {
        image_write(w->blk, i * 128 * KIB, 64 * KIB, 1);
    }
    for (int i = 0; i < 64; i++) { /* nothing is allocated here */
        g_assert_cmpint(blk_pdiscard(w->blk, i * 128 * KIB, 64 * KIB), ==, 0);
        g_assert_cmpuint(qcow2_quarantine_bytes(w->s), <=, 1200 * KIB);
    }
    g_assert_cmpint(longest, <, 8 * MIB); /* 4 MiB of data, 1 MiB in quarantine, tables, gaps */
    bdrv_graph_rdlock();
    world_close(w);
    rec_check(w->f, false);
    world_open(w);
    world_free(w);
}

/* --- no space --- */

/* A device: nothing is handed out behind its end, and nothing is written there by a flush. */
static void test_device(void)
{
    World *w = world_new("size=64M,cluster_size=512,refcount_bits=64", 2 * MIB);
    world_close(w);
    w->f->device = true;
    w->f->length = 2 * MIB - 5000; /* inside a block's range, and inside a cluster */
    world_open(w);
    int64_t end = 0, ret;
    uint64_t n = 0, bytes = 40 * 512;
    while ((ret = qcow2_alloc_run(w->bs, 0, &bytes)) >= 0) {
        end = MAX(end, ret + (int64_t)bytes);
        take(w, (Piece){(uint64_t)ret, bytes});
        n += bytes;
        bytes = 40 * 512;
    }
    g_assert_cmpint(ret, ==, -ENOSPC);
    g_assert_cmpint(end, <=, w->f->length);
    g_assert_cmpuint(n, >, 2 * MIB - 200 * KIB);
    g_assert_cmpint(qcow2_alloc_clusters(w->bs, 100 * 512), ==, -ENOSPC);
    g_assert_cmpint(qcow2_alloc_bytes(w->bs, 100), ==, -ENOSPC);
    qcow2_alloc_undo(w->bs, (uint64_t)end - 1024, 1024);
    g_assert_cmpint(qcow2_alloc_clusters(w->bs, 1536), ==, -ENOSPC); /* free counts go on behind */
    g_assert_cmpint(qcow2_alloc_clusters(w->bs, 1024), ==, end - 1024);
    Piece p = take_live(w);
    qcow2_free_run(w->bs, p.offset, p.bytes, QCOW2_DISCARD_ALWAYS);
    ret = qcow2_alloc_clusters(w->bs, 512); /* flushes for it */
    g_assert_cmpint(ret, ==, (int64_t)p.offset);
    take(w, (Piece){p.offset, 512});
    expect_counts(w);
    while (w->live->len) {
        p = take_live(w);
        qcow2_alloc_undo(w->bs, p.offset, p.bytes);
    }
    world_close(w);
    rec_check(w->f, false);
    world_open(w);
    world_free(w);
}

/* A full file system: what waits in quarantine is asked for once. */
static void test_full(void)
{
    for (int compressed = 0; compressed < 2; compressed++) {
        World *w = world_new("size=8M,cluster_size=64k", 3 * MIB);
        bdrv_graph_rdunlock(); /* requests come from outside */
        g_autofree uint8_t *buf = g_malloc0(64 * KIB);
        int flags = compressed ? BDRV_REQ_COMPRESSED : 0, ret = 0;
        int64_t at = 0;
        for (size_t i = 0; i < 64 * KIB; i++) {
            buf[i] = (uint8_t)(i % 2 && compressed ? 7 : g_rand_int(w->rand)); /* 2:1 at best */
        }
        while (ret == 0) {
            ret = blk_pwrite(w->blk, at, 64 * KIB, buf, flags);
            at += ret == 0 ? 64 * KIB : 0;
        }
        g_assert_cmpint(ret, ==, -ENOSPC);
        g_assert_cmpint(at, >, 2 * MIB);
        g_assert_cmpint(blk_pdiscard(w->blk, 0, 256 * KIB), ==, 0);
        g_assert_cmpint(blk_pwrite(w->blk, at, 64 * KIB, buf, flags), ==, 0);
        g_assert_cmpint(blk_flush(w->blk), ==, 0);
        bdrv_graph_rdlock();
        world_close(w);
        rec_check(w->f, false);
        world_open(w);
        world_free(w);
    }
}

/* --- many threads --- */

typedef struct Taker {
    World *w;
    unsigned seed;
    GArray *live;
} Taker;

static _Atomic(uint8_t) taken[CLUSTERS];

static void taker_take(Taker *t)
{
    const BDRVQcow2State *s = t->w->s;
    uint64_t bytes = (uint64_t)(t->seed % 5 + 1) << s->cluster_bits;
    int64_t offset = qcow2_alloc_run(t->w->bs, 0, &bytes);
    g_assert_cmpint(offset, >, 0);
    for (uint64_t at = 0; at < bytes; at += s->cluster_size) {
        uint64_t c = ((uint64_t)offset + at) >> s->cluster_bits;
        g_assert_cmpuint(atomic_fetch_add(&taken[c], 1), ==, 0);
    }
    Piece p = {(uint64_t)offset, bytes};
    g_array_append_val(t->live, p);
}

static void taker_give(Taker *t, bool undo)
{
    const BDRVQcow2State *s = t->w->s;
    if (!t->live->len) {
        return;
    }
    Piece p = g_array_index(t->live, Piece, t->live->len - 1);
    g_array_set_size(t->live, t->live->len - 1);
    for (uint64_t at = 0; at < p.bytes; at += s->cluster_size) {
        atomic_fetch_sub(&taken[(p.offset + at) >> s->cluster_bits], 1);
    }
    if (undo) {
        qcow2_alloc_undo(t->w->bs, p.offset, p.bytes);
    } else {
        qcow2_free_run(t->w->bs, p.offset, p.bytes, QCOW2_DISCARD_ALWAYS);
    }
}

static void *run_taker(void *opaque)
{
    Taker *t = opaque;
    bdrv_graph_rdlock();
    for (int i = 0; i < 400; i++) {
        t->seed = t->seed * 1103515245 + 12345;
        switch (t->seed >> 16 & 7) {
        case 0:
            taker_give(t, true);
            break;
        case 1:
        case 2:
            taker_give(t, false);
            break;
        case 3:
            if (i % 8 == 0) {
                g_assert_cmpint(qcow2_flush(t->w->bs), ==, 0);
            }
            break;
        default:
            taker_take(t);
        }
    }
    while (t->live->len) {
        taker_give(t, false);
    }
    bdrv_graph_rdunlock();
    return NULL;
}

static void test_threads(void)
{
    World *w = world_new("size=1M,cluster_size=512,refcount_bits=64", CLUSTERS * 512);
    Taker t[4];
    pthread_t threads[G_N_ELEMENTS(t)];
    for (guint i = 0; i < G_N_ELEMENTS(t); i++) {
        t[i] = (Taker){.w = w, .seed = i, .live = g_array_new(false, false, sizeof(Piece))};
        g_assert_true(qb_thread_start(&threads[i], "taker", run_taker, &t[i]));
    }
    for (guint i = 0; i < G_N_ELEMENTS(t); i++) {
        pthread_join(threads[i], NULL);
        g_array_free(t[i].live, true);
    }
    world_close(w);
    rec_check(w->f, false);
    world_open(w);
    world_free(w);
}

/* --- two that need the next refcount block --- */

typedef struct Racer {
    World *w;
    pthread_t thread;
    QbMutex lock;
    QbCond changed;
    bool done;
} Racer;

static void *run_racer(void *opaque)
{
    Racer *r = opaque;
    bdrv_graph_rdlock();
    g_assert_cmpint(qcow2_alloc_clusters(r->w->bs, 512), >, 0);
    g_assert_cmpint(qcow2_flush(r->w->bs), ==, 0);
    bdrv_graph_rdunlock();
    QB_GUARD(&r->lock);
    r->done = true;
    qb_cond_broadcast(&r->changed);
    return NULL;
}

/* The racer has time to come as far as he can. */
static void start_racer(void *opaque)
{
    Racer *r = opaque;
    g_assert_true(qb_thread_start(&r->thread, "racer", run_racer, r));
    QB_GUARD(&r->lock);
    while (!r->done && qb_cond_timedwait(&r->changed, &r->lock, 50)) {
    }
}

static unsigned writes_to(const RecFile *f, uint64_t offset)
{
    unsigned n = 0;
    for (guint i = 0; i < f->log->len; i++) {
        const RecOp *op = &g_array_index(f->log, RecOp, i);
        n += op->kind == REC_WRITE && op->offset == offset;
    }
    return n;
}

/* While one writes zeroes where a block will be, nobody else does: they could end in the block. */
static void test_reserve_race(void)
{
    World *w = world_new("size=1M,cluster_size=512,refcount_bits=64", CLUSTERS * 512);
    Racer r = {.w = w};
    uint64_t nb = w->s->reftable.nb_blocks, per_block = qcow2_counts_per_block(w->s);
    int64_t last = 0;
    qb_mutex_init(&r.lock);
    qb_cond_init(&r.changed);
    while ((uint64_t)last / 512 != nb * per_block - 1) {
        last = qcow2_alloc_clusters(w->bs, 512);
    }
    rec_start(w->f);
    w->f->opaque = &r;
    w->f->on_write = start_racer;
    g_assert_cmpint(qcow2_alloc_clusters(w->bs, 512), >, last);
    g_assert_null(w->f->on_write);
    pthread_join(r.thread, NULL);
    g_assert_cmpuint(w->s->reftable.nb_blocks, ==, nb + 1);
    g_assert_cmpuint(writes_to(w->f, w->s->reftable.entries[nb]), ==, 2); /* and the flush's */
    g_assert_cmphex(qb_ldbe64(w->f->data + w->s->reftable.entries[nb]), ==, 1); /* its own count */
    qb_cond_destroy(&r.changed);
    qb_mutex_destroy(&r.lock);
    world_free(w);
}

int main(int argc, char **argv)
{
    static Width widths[21];
    g_test_init(&argc, &argv, NULL);
    rec_setup();
    for (unsigned i = 0; i < G_N_ELEMENTS(widths); i++) {
        static const unsigned clusters[] = {512, 4096, 65536};
        widths[i] = (Width){.bits = 1u << (i % 7), .cluster = clusters[i / 7]};
        g_autofree char *path = g_strdup_printf("/qcow2-alloc/random/%u-%u", widths[i].cluster,
                                                widths[i].bits);
        g_test_add_data_func(path, &widths[i], test_random);
    }
    g_test_add_func("/qcow2-alloc/packing", test_packing);
    g_test_add_func("/qcow2-alloc/packing-ends", test_packing_ends);
    g_test_add_func("/qcow2-alloc/packing-undo", test_packing_undo);
    g_test_add_func("/qcow2-alloc/packing-race", test_packing_race);
    g_test_add_func("/qcow2-alloc/cluster-0", test_cluster_0);
    g_test_add_func("/qcow2-alloc/update-limits", test_update_limits);
    g_test_add_func("/qcow2-alloc/quarantine/generation", test_quarantine_generation);
    g_test_add_func("/qcow2-alloc/quarantine/users", test_quarantine_users);
    g_test_add_func("/qcow2-alloc/quarantine/merged", test_quarantine_merged);
    g_test_add_func("/qcow2-alloc/quarantine/overlaps", test_quarantine_overlaps);
    g_test_add_func("/qcow2-alloc/quarantine/any-order", test_quarantine_any_order);
    g_test_add_func("/qcow2-alloc/quarantine/spare", test_quarantine_spare);
    g_test_add_func("/qcow2-alloc/quarantine/bounded", test_bounded);
    g_test_add_func("/qcow2-alloc/no-space/device", test_device);
    g_test_add_func("/qcow2-alloc/no-space/full", test_full);
    g_test_add_func("/qcow2-alloc/threads", test_threads);
    g_test_add_func("/qcow2-alloc/reserve-race", test_reserve_race);
    int ret = g_test_run();
    image_teardown();
    return ret;
}
