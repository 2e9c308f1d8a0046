/*
 * Checked arithmetic: the edges of the number ranges.
 *
 * SPDX-License-Identifier: MIT
 */
#include "util/checked.h"

static void test_overflow(void)
{
    uint64_t u;
    int64_t s;
    g_assert_false(qb_add_overflow(UINT64_MAX - 1, (uint64_t)1, &u));
    g_assert_cmpuint(u, ==, UINT64_MAX);
    g_assert_true(qb_add_overflow(UINT64_MAX, (uint64_t)1, &u));
    g_assert_true(qb_add_overflow(INT64_MAX, (int64_t)1, &s));
    g_assert_true(qb_sub_overflow((uint64_t)0, (uint64_t)1, &u));
    g_assert_true(qb_mul_overflow(UINT64_C(1) << 32, UINT64_C(1) << 32, &u));
    g_assert_false(qb_mul_overflow(UINT64_C(1) << 32, UINT64_C(1) << 31, &u));
    /* The mathematical result decides, not the types of the operands. */
    g_assert_true(qb_add_overflow(UINT64_C(1) << 63, (uint64_t)0, &s));
}

static void test_power_of_2(void)
{
    g_assert_false(qb_is_power_of_2(0));
    g_assert_true(qb_is_power_of_2(1));
    g_assert_true(qb_is_power_of_2(UINT64_C(1) << 63));
    g_assert_false(qb_is_power_of_2(3));
    g_assert_false(qb_is_power_of_2(UINT64_MAX));
}

static void test_align(void)
{
    g_assert_cmpuint(qb_align_down(511, 512), ==, 0);
    g_assert_cmpuint(qb_align_down(512, 512), ==, 512);
    g_assert_cmpuint(qb_align_up(0, 512), ==, 0);
    g_assert_cmpuint(qb_align_up(1, 512), ==, 512);
    g_assert_cmpuint(qb_align_up(512, 512), ==, 512);
    g_assert_true(qb_is_aligned(0, 4096));
    g_assert_false(qb_is_aligned(2048, 4096));
    g_assert_true(qb_is_aligned(12345, 1));
}

static void test_align_up_overflow(void)
{
    int64_t r = -7;
    g_assert_true(qb_align_up_overflow(UINT64_MAX, 512, &r));
    g_assert_true(qb_align_up_overflow(INT64_MAX, 512, &r));
    g_assert_cmpint(r, ==, -7);
    g_assert_false(qb_align_up_overflow((uint64_t)INT64_MAX - 511, 512, &r));
    g_assert_cmpint(r, ==, INT64_MAX - 511);
    g_assert_false(qb_align_up_overflow(INT64_MAX, 1, &r));
    g_assert_cmpint(r, ==, INT64_MAX);
}

static void test_div_round_up(void)
{
    g_assert_cmpuint(qb_div_round_up(0, 10), ==, 0);
    g_assert_cmpuint(qb_div_round_up(1, 10), ==, 1);
    g_assert_cmpuint(qb_div_round_up(10, 10), ==, 1);
    g_assert_cmpuint(qb_div_round_up(UINT64_MAX, 2), ==, UINT64_C(1) << 63);
}

static void test_range_valid(void)
{
    g_assert_true(qb_range_valid(0, 0));
    g_assert_true(qb_range_valid(0, INT64_MAX));
    g_assert_true(qb_range_valid(INT64_MAX, 0));
    g_assert_false(qb_range_valid(INT64_MAX, 1));
    g_assert_false(qb_range_valid(-1, 1));
    g_assert_false(qb_range_valid(1, -1));
}

static void test_ranges_overlap(void)
{
    g_assert_true(qb_ranges_overlap(0, 10, 9, 1));
    g_assert_false(qb_ranges_overlap(0, 10, 10, 1));
    g_assert_false(qb_ranges_overlap(10, 1, 0, 10));
    g_assert_true(qb_ranges_overlap(5, 1, 0, 10));
    g_assert_false(qb_ranges_overlap(5, 0, 0, 10));
    g_assert_false(qb_ranges_overlap(0, 10, 5, 0));
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/checked/overflow", test_overflow);
    g_test_add_func("/checked/power-of-2", test_power_of_2);
    g_test_add_func("/checked/align", test_align);
    g_test_add_func("/checked/align-up-overflow", test_align_up_overflow);
    g_test_add_func("/checked/div-round-up", test_div_round_up);
    g_test_add_func("/checked/range-valid", test_range_valid);
    g_test_add_func("/checked/ranges-overlap", test_ranges_overlap);
    return g_test_run();
}
