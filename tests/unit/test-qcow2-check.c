/*
 * The reference map of a check: counts, owners, and what it costs.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-check.h"
#include "util/pool.h"

#define FAR (UINT64_C(1) << 47) /* a cluster index near the end of all host offsets */

typedef struct Overflows {
    unsigned n;
    uint64_t last;
} Overflows;

static void note_overflow(uint64_t cluster, void *opaque)
{
    Overflows *o = opaque;
    o->n++;
    o->last = cluster;
}

static void add(Qcow2RefMap *map, uint64_t first, uint64_t n, uint64_t times, unsigned flags)
{
    qcow2_refmap_add(map, first, n, times, flags, NULL, NULL);
}

static void test_empty(void)
{
    Qcow2RefMap *map = qcow2_refmap_new(65535);
    g_assert_cmpuint(qcow2_refmap_count(map, 0), ==, 0);
    g_assert_cmpuint(qcow2_refmap_flags(map, FAR), ==, 0);
    g_assert_null(qcow2_refmap_leaf(map, 5));
    g_assert_cmpuint(qcow2_refmap_end(map), ==, 0);
    g_assert_cmpuint(qcow2_refmap_leaves(map), ==, 0);
    g_autoptr(GPtrArray) sorted = qcow2_refmap_sorted(map);
    g_assert_cmpuint(sorted->len, ==, 0);
    qcow2_refmap_free(map);
    qcow2_refmap_free(NULL);
}

static void test_run_over_leaves(void)
{
    Qcow2RefMap *map = qcow2_refmap_new(65535);
    add(map, 60, 10, 1, QCOW2_REF_DATA);
    add(map, 65, 2, 3, QCOW2_REF_DATA);
    g_assert_cmpuint(qcow2_refmap_count(map, 59), ==, 0);
    g_assert_cmpuint(qcow2_refmap_count(map, 60), ==, 1);
    g_assert_cmpuint(qcow2_refmap_count(map, 64), ==, 1);
    g_assert_cmpuint(qcow2_refmap_count(map, 65), ==, 4);
    g_assert_cmpuint(qcow2_refmap_count(map, 66), ==, 4);
    g_assert_cmpuint(qcow2_refmap_count(map, 69), ==, 1);
    g_assert_cmpuint(qcow2_refmap_count(map, 70), ==, 0);
    g_assert_cmpuint(qcow2_refmap_end(map), ==, 70);
    g_assert_cmpuint(qcow2_refmap_leaves(map), ==, 2);
    qcow2_refmap_free(map);
}

/* A long file or a large offset costs nothing, a reference costs one leaf. */
static void test_cost_is_references(void)
{
    Qcow2RefMap *map = qcow2_refmap_new(65535);
    add(map, FAR, 1, 1, QCOW2_REF_META);
    add(map, 0, 1, 1, QCOW2_REF_META);
    g_assert_cmpuint(qcow2_refmap_leaves(map), ==, 2);
    g_assert_cmpuint(qcow2_refmap_end(map), ==, FAR + 1);
    for (uint64_t i = 1; i <= 10000; i++) {
        add(map, i << 30, 1, 1, QCOW2_REF_DATA);
    }
    g_assert_cmpuint(qcow2_refmap_leaves(map), ==, 10002);
    g_assert_cmpuint(qcow2_refmap_count(map, UINT64_C(5000) << 30), ==, 1);
    qcow2_refmap_free(map);
}

static void test_sorted(void)
{
    static const uint64_t clusters[] = {FAR, 7, 1000000, 64, 63, 128};
    static const uint64_t leaves[] = {0, 1, 2, 1000000 / 64, FAR / 64};
    Qcow2RefMap *map = qcow2_refmap_new(65535);
    for (size_t i = 0; i < G_N_ELEMENTS(clusters); i++) {
        add(map, clusters[i], 1, 1, QCOW2_REF_DATA);
    }
    g_autoptr(GPtrArray) sorted = qcow2_refmap_sorted(map);
    g_assert_cmpuint(sorted->len, ==, G_N_ELEMENTS(leaves));
    for (size_t i = 0; i < G_N_ELEMENTS(leaves); i++) {
        const Qcow2RefLeaf *leaf = g_ptr_array_index(sorted, i);
        g_assert_cmpuint(leaf->index, ==, leaves[i]);
    }
    qcow2_refmap_free(map);
}

/* Counts beyond 255 take more room, for the leaf they are in only, and keep their neighbours. */
static void test_widening(void)
{
    Qcow2RefMap *map = qcow2_refmap_new(UINT64_MAX);
    add(map, 0, 64, 200, QCOW2_REF_L2);
    g_assert_null(qcow2_refmap_leaf(map, 0)->body);
    add(map, 3, 1, 100, QCOW2_REF_L2);
    g_assert_nonnull(qcow2_refmap_leaf(map, 0)->body->wide);
    g_assert_cmpuint(qcow2_refmap_count(map, 2), ==, 200);
    g_assert_cmpuint(qcow2_refmap_count(map, 3), ==, 300);
    add(map, 3, 1, UINT64_MAX, QCOW2_REF_L2);
    g_assert_cmpuint(qcow2_refmap_count(map, 3), ==, UINT32_MAX);
    for (int i = 0; i < 3; i++) { /* nobody knows how many are left */
        qcow2_refmap_sub(map, 3, 1, UINT32_MAX - 1);
        g_assert_cmpuint(qcow2_refmap_count(map, 3), ==, UINT32_MAX);
    }
    qcow2_refmap_free(map);
}

static void test_cap(void)
{
    static const uint64_t caps[] = {1, 3, 15, 255, 65535};
    for (size_t i = 0; i < G_N_ELEMENTS(caps); i++) {
        Qcow2RefMap *map = qcow2_refmap_new(caps[i]);
        Overflows o = {0};
        qcow2_refmap_add(map, 10, 3, caps[i], QCOW2_REF_COMP, note_overflow, &o);
        g_assert_cmpuint(o.n, ==, 0);
        qcow2_refmap_add(map, 11, 1, 1, QCOW2_REF_COMP, note_overflow, &o);
        g_assert_cmpuint(o.n, ==, 1);
        g_assert_cmpuint(o.last, ==, 11);
        g_assert_cmpuint(qcow2_refmap_count(map, 11), ==, caps[i] + 1);
        qcow2_refmap_sub(map, 11, 1, 1);
        g_assert_cmpuint(qcow2_refmap_count(map, 11), ==, caps[i]);
        qcow2_refmap_free(map);
    }
}

typedef struct AliasCase {
    unsigned first, second;
    bool alias;
} AliasCase;

static const AliasCase alias_cases[] = {
    {QCOW2_REF_META, QCOW2_REF_META, true},
    {QCOW2_REF_META, QCOW2_REF_L2, true},
    {QCOW2_REF_META, QCOW2_REF_DATA, true},
    {QCOW2_REF_META, QCOW2_REF_COMP, true},
    {QCOW2_REF_L2, QCOW2_REF_L2, false}, /* of a snapshot, too */
    {QCOW2_REF_L2, QCOW2_REF_DATA, true},
    {QCOW2_REF_L2, QCOW2_REF_COMP, true},
    {QCOW2_REF_DATA, QCOW2_REF_COMP, true},
    {QCOW2_REF_COMP, QCOW2_REF_COMP, false},
    {QCOW2_REF_DATA, QCOW2_REF_DATA, false},
    {QCOW2_REF_DATA, QCOW2_REF_DATA | QCOW2_REF_ACTIVE, false},
    {QCOW2_REF_DATA | QCOW2_REF_ACTIVE, QCOW2_REF_DATA, false},
    {QCOW2_REF_DATA | QCOW2_REF_ACTIVE, QCOW2_REF_DATA | QCOW2_REF_ACTIVE, true},
};

static void check_alias(unsigned first, unsigned second, bool alias)
{
    Qcow2RefMap *map = qcow2_refmap_new(65535);
    add(map, 9, 1, 1, first);
    g_assert_cmpuint(qcow2_refmap_flags(map, 9) & QCOW2_REF_ALIAS, ==, 0);
    add(map, 9, 1, 1, second);
    g_assert_cmpint(!!(qcow2_refmap_flags(map, 9) & QCOW2_REF_ALIAS), ==, alias);
    g_assert_cmpuint(qcow2_refmap_flags(map, 8) | qcow2_refmap_flags(map, 10), ==, 0);
    qcow2_refmap_free(map);
}

static void test_alias(void)
{
    for (size_t i = 0; i < G_N_ELEMENTS(alias_cases); i++) {
        const AliasCase *a = &alias_cases[i];
        check_alias(a->first, a->second, a->alias);
        check_alias(a->second, a->first, a->alias);
    }
}

/* When the other owner has gone, what is left is alone; when all have gone, nothing is known of them. */
static void test_taking_back(void)
{
    Qcow2RefMap *map = qcow2_refmap_new(65535);
    add(map, 4, 1, 2, QCOW2_REF_DATA | QCOW2_REF_COPIED);
    add(map, 4, 1, 1, QCOW2_REF_META);
    g_assert_cmpuint(qcow2_refmap_flags(map, 4) & QCOW2_REF_ALIAS, !=, 0);
    qcow2_refmap_sub(map, 4, 1, 1);
    g_assert_cmpuint(qcow2_refmap_count(map, 4), ==, 2);
    g_assert_cmpuint(qcow2_refmap_flags(map, 4) & QCOW2_REF_ALIAS, !=, 0);
    qcow2_refmap_clear_kind(map, 4, 1, QCOW2_REF_META);
    g_assert_cmpuint(qcow2_refmap_flags(map, 4), ==, QCOW2_REF_DATA | QCOW2_REF_COPIED);
    qcow2_refmap_sub(map, 4, 1, 5);
    g_assert_cmpuint(qcow2_refmap_count(map, 4), ==, 0);
    g_assert_cmpuint(qcow2_refmap_flags(map, 4), ==, 0);
    g_assert_cmpuint(qcow2_refmap_end(map), ==, 0);
    qcow2_refmap_free(map);
}

/* ---------------------------------------------------------------- against a plain array */

enum {
    CLUSTERS = 1500,       /* some leaves, and a part of one */
    BASE = 4096 - 600,     /* they lie in two rows */
    CAP = 700,
};

typedef struct Cluster {
    uint64_t count;
    unsigned flags;
} Cluster;

typedef struct Model {
    Qcow2RefMap *map;
    Cluster clusters[CLUSTERS];
    GArray *overflows; /* uint64_t: to be told, and in this order */
    guint told;
    GRand *rand;
} Model;

static void expect_overflow(uint64_t cluster, void *opaque)
{
    Model *m = opaque;
    g_assert_cmpuint(m->told, <, m->overflows->len);
    g_assert_cmpuint(g_array_index(m->overflows, uint64_t, m->told++), ==, cluster);
}

/* What the map may know of two owners (invariant 3 of the map), said once more. */
static bool model_conflict(unsigned a, unsigned b)
{
    unsigned both = (a | b) & QCOW2_REF_KINDS;
    if (!(a & QCOW2_REF_KINDS)) {
        return false;
    }
    if (both == QCOW2_REF_DATA) {
        return (a & QCOW2_REF_ACTIVE) && (b & QCOW2_REF_ACTIVE);
    }
    return both != QCOW2_REF_L2 && both != QCOW2_REF_COMP;
}

static void model_add(Model *m, unsigned first, unsigned n)
{
    static const unsigned kinds[] = {
        QCOW2_REF_META, QCOW2_REF_L2, QCOW2_REF_DATA, QCOW2_REF_COMP,
        QCOW2_REF_DATA | QCOW2_REF_ACTIVE | QCOW2_REF_COPIED,
        QCOW2_REF_DATA | QCOW2_REF_ACTIVE | QCOW2_REF_SHARED,
    };
    static const uint64_t times[] = {1, 1, 1, 1, 2, 54, 255, 300, CAP, UINT32_MAX, UINT64_MAX};
    unsigned flags = kinds[g_rand_int_range(m->rand, 0, G_N_ELEMENTS(kinds))];
    uint64_t t = times[g_rand_int_range(m->rand, 0, G_N_ELEMENTS(times))];
    t = g_rand_int_range(m->rand, 0, 20) ? MIN(t, CAP) : t;
    g_array_set_size(m->overflows, 0);
    m->told = 0;
    for (unsigned i = first; i < first + n; i++) {
        Cluster *c = &m->clusters[i];
        bool alias = model_conflict(c->flags, flags);
        c->flags |= flags | (alias ? QCOW2_REF_ALIAS : 0);
        c->count = MIN(c->count + MIN(t, UINT32_MAX), UINT32_MAX);
        if (c->count > CAP) {
            uint64_t cluster = BASE + i;
            g_array_append_val(m->overflows, cluster);
        }
    }
    qcow2_refmap_add(m->map, BASE + first, n, t, flags, expect_overflow, m);
    g_assert_cmpuint(m->told, ==, m->overflows->len);
}

/* Only of those that have some. */
static void model_sub(Model *m, unsigned first, unsigned n)
{
    uint64_t times = g_rand_boolean(m->rand) ? 1 : (uint64_t)g_rand_int_range(m->rand, 1, 1000);
    for (unsigned i = 0; i < n; i++) {
        n = m->clusters[first + i].count ? n : i;
    }
    for (unsigned i = first; i < first + n; i++) {
        Cluster *c = &m->clusters[i];
        if (c->count < UINT32_MAX) {
            c->count -= MIN(times, c->count);
            c->flags = c->count ? c->flags : 0;
        }
    }
    qcow2_refmap_sub(m->map, BASE + first, n, times);
}

static void model_clear_kind(Model *m, unsigned first, unsigned n)
{
    unsigned kind = (1u << g_rand_int_range(m->rand, 0, 5)) & QCOW2_REF_KINDS; /* 0, too */
    for (unsigned i = first; i < first + n; i++) {
        Cluster *c = &m->clusters[i];
        c->flags &= ~kind;
        unsigned kinds = c->flags & QCOW2_REF_KINDS;
        bool one = !kinds || kinds == QCOW2_REF_META || kinds == QCOW2_REF_L2 ||
                   kinds == QCOW2_REF_DATA || kinds == QCOW2_REF_COMP;
        if (one && (kinds != QCOW2_REF_META || c->count < 2)) {
            c->flags &= ~QCOW2_REF_ALIAS;
        }
    }
    qcow2_refmap_clear_kind(m->map, BASE + first, n, kind);
}

/* Whole leaves as often as parts of them. */
static void model_step(Model *m)
{
    static void (*const steps[])(Model *, unsigned, unsigned) = {
        model_add, model_add, model_add, model_sub, model_sub, model_clear_kind,
    };
    unsigned first = g_rand_int_range(m->rand, 0, CLUSTERS);
    unsigned n = g_rand_int_range(m->rand, 1, g_rand_boolean(m->rand) ? 10 : CLUSTERS);
    if (g_rand_boolean(m->rand)) {
        first -= MIN(first, (BASE + first) % QCOW2_REF_LEAF);
        n = (n + QCOW2_REF_LEAF - 1) / QCOW2_REF_LEAF * QCOW2_REF_LEAF;
    }
    steps[g_rand_int_range(m->rand, 0, G_N_ELEMENTS(steps))](m, first, MIN(n, CLUSTERS - first));
}

/* What is said of a leaf as a whole is what its clusters say. */
static void compare_leaf(const Model *m, const Qcow2RefLeaf *leaf)
{
    unsigned any = 0, end = 0, same = 1;
    for (unsigned slot = QCOW2_REF_LEAF; slot-- > 0;) {
        uint64_t i = leaf->index * QCOW2_REF_LEAF + slot - BASE; /* wraps before it */
        Cluster c = i < CLUSTERS ? m->clusters[i] : (Cluster){0};
        bool follows = slot + 1 < QCOW2_REF_LEAF &&
                       qcow2_refleaf_count(leaf, slot) == qcow2_refleaf_count(leaf, slot + 1);
        g_assert_cmpuint(qcow2_refleaf_count(leaf, slot), ==, c.count);
        g_assert_cmpuint(qcow2_refleaf_flags(leaf, slot), ==, c.flags);
        same = follows ? same + 1 : 1;
        g_assert_cmpuint(qcow2_refleaf_run(leaf, slot), ==, same);
        any |= c.flags;
        end = end || !c.count ? end : slot + 1;
    }
    g_assert_cmpuint(qcow2_refleaf_any_flags(leaf), ==, any);
    g_assert_cmpuint(qcow2_refleaf_end(leaf), ==, end);
}

static void compare_model(const Model *m)
{
    g_autoptr(GPtrArray) sorted = qcow2_refmap_sorted(m->map);
    uint64_t end = 0;
    for (unsigned i = 0; i < CLUSTERS; i++) {
        g_assert_cmpuint(qcow2_refmap_count(m->map, BASE + i), ==, m->clusters[i].count);
        g_assert_cmpuint(qcow2_refmap_flags(m->map, BASE + i), ==, m->clusters[i].flags);
        end = m->clusters[i].count ? BASE + i + 1 : end;
    }
    g_assert_cmpuint(qcow2_refmap_end(m->map), ==, end);
    g_assert_cmpuint(sorted->len, ==, qcow2_refmap_leaves(m->map));
    for (guint i = 0; i < sorted->len; i++) {
        const Qcow2RefLeaf *leaf = g_ptr_array_index(sorted, i);
        g_assert_true(i == 0 || leaf->index > ((Qcow2RefLeaf *)sorted->pdata[i - 1])->index);
        compare_leaf(m, leaf);
    }
}

static void test_against_model(void)
{
    enum { ROUNDS = 40, STEPS = 60 };
    guint32 seed = g_test_rand_int();
    g_test_message("seed %u", seed); /* again: --seed with what the first line of output says */
    g_autoptr(GRand) rand = g_rand_new_with_seed(seed);
    for (unsigned round = 0; round < ROUNDS; round++) {
        Model m = {.map = qcow2_refmap_new(CAP), .rand = rand,
                   .overflows = g_array_new(false, false, sizeof(uint64_t))};
        for (unsigned step = 0; step < STEPS; step++) {
            model_step(&m);
            compare_model(&m);
        }
        g_array_unref(m.overflows);
        qcow2_refmap_free(m.map);
    }
}

/* ---------------------------------------------------------------- */

/* Clusters that are alike share what is known of them, however it came about and whatever it is. */
static void test_whole_leaves(void)
{
    static const uint64_t times[] = {1, 7, 300, UINT32_MAX};
    Qcow2RefMap *map = qcow2_refmap_new(65535);
    for (size_t i = 0; i < G_N_ELEMENTS(times); i++) {
        add(map, 10, 10 * 64, times[i], QCOW2_REF_DATA);
    }
    for (unsigned leaf = 1; leaf < 10; leaf++) {
        g_assert_null(qcow2_refmap_leaf(map, leaf * 64)->body);
        g_assert_cmpuint(qcow2_refmap_count(map, leaf * 64), ==, UINT32_MAX);
    }
    g_assert_nonnull(qcow2_refmap_leaf(map, 0)->body);
    g_assert_nonnull(qcow2_refmap_leaf(map, 640)->body);
    qcow2_refmap_sub(map, 64, 64, 1);
    qcow2_refmap_clear_kind(map, 130, 10, QCOW2_REF_L2); /* changes nothing */
    g_assert_null(qcow2_refmap_leaf(map, 64)->body);
    g_assert_null(qcow2_refmap_leaf(map, 130)->body);
    add(map, 200, 1, 1, QCOW2_REF_META);
    g_assert_nonnull(qcow2_refmap_leaf(map, 200)->body);
    qcow2_refmap_free(map);
}

/* Few leaves and far apart, or many and close: one order. */
static void test_sorting_both_ways(void)
{
    static const uint64_t strides[] = {1, 3, 5, 1000, UINT64_C(1) << 30};
    for (size_t i = 0; i < G_N_ELEMENTS(strides); i++) {
        enum { LEAVES = 3000 };
        Qcow2RefMap *map = qcow2_refmap_new(1);
        for (uint64_t k = 0; k < LEAVES; k++) {
            add(map, (k * 7 % LEAVES) * strides[i] * QCOW2_REF_LEAF, 1, 1, QCOW2_REF_DATA);
        }
        g_autoptr(GPtrArray) sorted = qcow2_refmap_sorted(map);
        g_assert_cmpuint(sorted->len, ==, LEAVES);
        for (uint64_t k = 0; k < LEAVES; k++) {
            g_assert_cmpuint(((Qcow2RefLeaf *)sorted->pdata[k])->index, ==, k * strides[i]);
        }
        qcow2_refmap_free(map);
    }
}

enum { ADDERS = 4, SHARED_CLUSTERS = 20000 };

static int add_many(void *opaque)
{
    Qcow2RefMap *map = opaque;
    for (uint64_t first = 0; first < SHARED_CLUSTERS; first += 50) {
        add(map, first, 100, 1, QCOW2_REF_DATA);
    }
    return 0;
}

/* Threads that add to the same clusters lose nothing. */
static void test_threads(void)
{
    Qcow2RefMap *map = qcow2_refmap_new(65535);
    QbTaskGroup group;
    qb_group_init(&group);
    for (unsigned i = 0; i < ADDERS; i++) {
        qb_group_submit(&group, qb_request_pool(), add_many, map);
    }
    qb_group_wait(&group, 0);
    qb_group_destroy(&group);
    for (uint64_t i = 0; i < SHARED_CLUSTERS; i++) {
        g_assert_cmpuint(qcow2_refmap_count(map, i), ==, i < 50 ? ADDERS : 2 * ADDERS);
    }
    qcow2_refmap_free(map);
    qb_pools_shutdown();
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/qcow2-check/map/empty", test_empty);
    g_test_add_func("/qcow2-check/map/run-over-leaves", test_run_over_leaves);
    g_test_add_func("/qcow2-check/map/cost-is-references", test_cost_is_references);
    g_test_add_func("/qcow2-check/map/sorted", test_sorted);
    g_test_add_func("/qcow2-check/map/widening", test_widening);
    g_test_add_func("/qcow2-check/map/cap", test_cap);
    g_test_add_func("/qcow2-check/map/alias", test_alias);
    g_test_add_func("/qcow2-check/map/taking-back", test_taking_back);
    g_test_add_func("/qcow2-check/map/against-model", test_against_model);
    g_test_add_func("/qcow2-check/map/whole-leaves", test_whole_leaves);
    g_test_add_func("/qcow2-check/map/sorting-both-ways", test_sorting_both_ways);
    g_test_add_func("/qcow2-check/map/threads", test_threads);
    return g_test_run();
}
