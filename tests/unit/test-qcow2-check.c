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
    g_assert_null(qcow2_refmap_leaf(map, 0)->wide);
    add(map, 3, 1, 100, QCOW2_REF_L2);
    g_assert_nonnull(qcow2_refmap_leaf(map, 0)->wide);
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

static void test_against_oracle(void)
{
    enum { CLUSTERS = 5000, STEPS = 20000 };
    g_autofree uint32_t *oracle = g_new0(uint32_t, CLUSTERS);
    Qcow2RefMap *map = qcow2_refmap_new(1000);
    GRand *rand = g_rand_new_with_seed(20260811);
    for (unsigned step = 0; step < STEPS; step++) {
        uint32_t first = g_rand_int_range(rand, 0, CLUSTERS - 200);
        uint32_t n = g_rand_int_range(rand, 1, 200);
        uint32_t times = g_rand_int_range(rand, 1, 40);
        add(map, first, n, times, QCOW2_REF_DATA);
        for (uint32_t i = first; i < first + n; i++) {
            oracle[i] += times;
        }
    }
    g_rand_free(rand);
    for (uint32_t i = 0; i < CLUSTERS; i++) {
        g_assert_cmpuint(qcow2_refmap_count(map, i), ==, oracle[i]);
    }
    qcow2_refmap_free(map);
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
    g_test_add_func("/qcow2-check/map/against-oracle", test_against_oracle);
    g_test_add_func("/qcow2-check/map/threads", test_threads);
    return g_test_run();
}
