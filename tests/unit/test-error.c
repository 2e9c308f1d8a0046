/*
 * Errors: one domain, codes that are errno values, texts that survive prefixing.
 *
 * SPDX-License-Identifier: MIT
 */
#include "util/error.h"

static void test_set(void)
{
    g_autoptr(GError) err = NULL;
    qb_error_set(&err, ENOSPC, "no room for %d", 7);
    g_assert_error(err, QB_ERROR, ENOSPC);
    g_assert_cmpstr(err->message, ==, "no room for 7");
    g_assert_cmpint(qb_error_to_errno(err), ==, -ENOSPC);
}

static void test_null_is_fine(void)
{
    qb_error_set(NULL, EIO, "nobody listens");
    qb_error_set_errno(NULL, EIO, "nobody listens");
    qb_error_add_hint(NULL, "nobody listens");
    GError *none = NULL;
    qb_error_add_hint(&none, "nothing to add to");
    g_assert_null(none);
}

static void test_errno_of_either_sign(void)
{
    g_autoptr(GError) plus = NULL, minus = NULL;
    qb_error_set_errno(&plus, ENOENT, "Could not open '%s'", "x");
    qb_error_set_errno(&minus, -ENOENT, "Could not open '%s'", "x");
    g_assert_cmpstr(plus->message, ==, "Could not open 'x': No such file or directory");
    g_assert_cmpstr(minus->message, ==, plus->message);
    g_assert_error(plus, QB_ERROR, ENOENT);
    g_assert_error(minus, QB_ERROR, ENOENT);
}

static void test_code_is_never_zero(void)
{
    g_autoptr(GError) err = NULL;
    qb_error_set(&err, 0, "failed for no reason");
    g_assert_error(err, QB_ERROR, EIO);
    g_assert_cmpint(qb_error_to_errno(err), ==, -EIO);
}

static void test_hint_stays_below_a_prefix(void)
{
    g_autoptr(GError) err = NULL;
    qb_error_set(&err, EAGAIN, "Failed to get \"write\" lock");
    qb_error_add_hint(&err, "Is another process using the image [%s]?", "a.qcow2");
    g_prefix_error(&err, "Could not open '%s': ", "a.qcow2");
    g_assert_cmpstr(err->message, ==,
                    "Could not open 'a.qcow2': Failed to get \"write\" lock\n"
                    "Is another process using the image [a.qcow2]?");
}

static void test_two_hints(void)
{
    g_autoptr(GError) err = NULL;
    qb_error_set(&err, EINVAL, "a");
    qb_error_add_hint(&err, "b");
    qb_error_add_hint(&err, "c");
    g_assert_cmpstr(err->message, ==, "a\nb\nc");
}

static void test_foreign_domain(void)
{
    g_autoptr(GError) err = g_error_new(G_FILE_ERROR, G_FILE_ERROR_NOENT, "not ours");
    g_assert_cmpint(qb_error_to_errno(err), ==, -EIO);
    g_assert_cmpint(qb_error_to_errno(NULL), ==, -EIO);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/error/set", test_set);
    g_test_add_func("/error/null-is-fine", test_null_is_fine);
    g_test_add_func("/error/errno-of-either-sign", test_errno_of_either_sign);
    g_test_add_func("/error/code-is-never-zero", test_code_is_never_zero);
    g_test_add_func("/error/hint-stays-below-a-prefix", test_hint_stays_below_a_prefix);
    g_test_add_func("/error/two-hints", test_two_hints);
    g_test_add_func("/error/foreign-domain", test_foreign_domain);
    return g_test_run();
}
