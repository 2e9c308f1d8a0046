/*
 * IoVector against a flat buffer, and the search for zeroes at every length and place.
 *
 * SPDX-License-Identifier: MIT
 */
#include "util/iov.h"

#include <glib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static void test_empty(void)
{
    IOV_VECTOR_AUTO v;
    iov_vector_init(&v, 0);
    g_assert_cmpint(v.niov, ==, 0);
    g_assert_cmpuint(v.size, ==, 0);
    g_assert_true(iov_vector_is_zero(&v, 0, 0));
    g_assert_true(iov_vector_is_aligned(&v, 4096));
    iov_vector_to_buf(&v, 0, NULL, 0);
    iov_vector_add(&v, &v, 0);
    g_assert_cmpint(v.niov, ==, 0);
}

static void test_single_buffer(void)
{
    char buf[8] = "abcdefg";
    char out[8] = "";
    IOV_VECTOR_AUTO v;
    iov_vector_init_buf(&v, buf, sizeof(buf));
    g_assert_cmpint(v.niov, ==, 1);
    g_assert_true(v.iov == &v.local);
    iov_vector_to_buf(&v, 2, out, 3);
    g_assert_cmpstr(out, ==, "cde");
    iov_vector_from_buf(&v, 0, "XY", 2);
    g_assert_cmpstr(buf, ==, "XYcdefg");
}

/* The local element moves to the heap when a second one comes. */
static void test_grow_from_single(void)
{
    char a[4] = "aaaa", b[4] = "bbbb", out[8];
    IOV_VECTOR_AUTO v;
    iov_vector_init_buf(&v, a, 4);
    for (int i = 0; i < 9; i++) {
        iov_vector_add(&v, b, 4);
    }
    g_assert_cmpint(v.niov, ==, 10);
    g_assert_cmpuint(v.size, ==, 40);
    iov_vector_to_buf(&v, 0, out, 8);
    g_assert_cmpmem(out, 8, "aaaabbbb", 8);
}

static void test_capacity_hint(void)
{
    char c[4] = "";
    IOV_VECTOR_AUTO v;
    iov_vector_init(&v, 3);
    struct iovec *array = v.iov;
    for (int i = 0; i < 3; i++) {
        iov_vector_add(&v, &c[i], 1);
    }
    g_assert_true(v.iov == array);
    iov_vector_add(&v, &c[3], 1);
    g_assert_cmpint(v.niov, ==, 4);
    g_assert_true(v.iov[3].iov_base == &c[3]);
}

#define FLAT 1000

/* Cuts a copy of @flat into random elements, each an allocation of its own. */
static GPtrArray *scatter(GRand *rnd, const char *flat, IoVector *v)
{
    GPtrArray *parts = g_ptr_array_new_with_free_func(g_free);
    iov_vector_init(v, 0);
    for (size_t at = 0; at < FLAT;) {
        size_t len = (size_t)g_rand_int_range(rnd, 1, 200);
        len = MIN(len, FLAT - at);
        char *part = g_malloc(len);
        memcpy(part, flat + at, len);
        g_ptr_array_add(parts, part);
        iov_vector_add(v, part, len);
        at += len;
    }
    return parts;
}

static void fill_random(GRand *rnd, char *buf, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        buf[i] = (char)g_rand_int(rnd);
    }
}

static void check_equal(const IoVector *v, const char *flat)
{
    char out[FLAT];
    g_assert_cmpuint(v->size, ==, FLAT);
    iov_vector_to_buf(v, 0, out, FLAT);
    g_assert_cmpmem(out, FLAT, flat, FLAT);
}

/* Every operation on a scattered copy does to it what the plain one does to the flat buffer. */
static void test_against_flat(void)
{
    g_autoptr(GRand) rnd = g_rand_new_with_seed((guint32)g_test_rand_int());
    for (int round = 0; round < 300; round++) {
        char flat[FLAT], other[FLAT];
        IOV_VECTOR_AUTO v;
        fill_random(rnd, flat, FLAT);
        fill_random(rnd, other, FLAT);
        g_autoptr(GPtrArray) parts = scatter(rnd, flat, &v);
        g_assert_cmpint(v.niov, ==, (int)parts->len);
        size_t at = (size_t)g_rand_int_range(rnd, 0, FLAT + 1);
        size_t len = (size_t)g_rand_int_range(rnd, 0, (gint32)(FLAT - at) + 1);

        iov_vector_to_buf(&v, at, other, len);
        g_assert_cmpmem(other, len, flat + at, len);

        fill_random(rnd, other, FLAT);
        iov_vector_from_buf(&v, at, other, len);
        memcpy(flat + at, other, len);
        check_equal(&v, flat);

        iov_vector_memset(&v, at, 0, len);
        memset(flat + at, 0, len);
        check_equal(&v, flat);
        g_assert_true(iov_vector_is_zero(&v, at, len));
    }
}

static void test_slice(void)
{
    g_autoptr(GRand) rnd = g_rand_new_with_seed((guint32)g_test_rand_int());
    char flat[FLAT], out[FLAT];
    fill_random(rnd, flat, FLAT);
    for (int round = 0; round < 300; round++) {
        IOV_VECTOR_AUTO v;
        IOV_VECTOR_AUTO slice;
        g_autoptr(GPtrArray) parts = scatter(rnd, flat, &v);
        g_assert_cmpint(v.niov, ==, (int)parts->len);
        size_t at = (size_t)g_rand_int_range(rnd, 0, FLAT + 1);
        size_t len = (size_t)g_rand_int_range(rnd, 0, (gint32)(FLAT - at) + 1);
        iov_vector_init_slice(&slice, &v, at, len);
        g_assert_cmpuint(slice.size, ==, len);
        iov_vector_to_buf(&slice, 0, out, len);
        g_assert_cmpmem(out, len, flat + at, len);
        /* A view, no copy. */
        iov_vector_memset(&slice, 0, 0x5a, len);
        memset(out, 0x5a, len);
        char back[FLAT];
        iov_vector_to_buf(&v, at, back, len);
        g_assert_cmpmem(back, len, out, len);
    }
}

static void test_concat_appends(void)
{
    char a[3] = "ab", b[] = "0123456789", out[8] = "";
    IOV_VECTOR_AUTO src;
    IOV_VECTOR_AUTO v;
    iov_vector_init(&src, 2);
    iov_vector_add(&src, b, 5);
    iov_vector_add(&src, b + 5, 5);
    iov_vector_init_buf(&v, a, 2);
    iov_vector_concat(&v, &src, 3, 4);
    g_assert_cmpuint(v.size, ==, 6);
    g_assert_cmpint(v.niov, ==, 3);
    iov_vector_to_buf(&v, 0, out, 6);
    g_assert_cmpstr(out, ==, "ab3456");
}

static void test_is_aligned(void)
{
    char *base = qb_try_memalign(4096, 8192);
    IOV_VECTOR_AUTO v;
    iov_vector_init(&v, 2);
    iov_vector_add(&v, base, 4096);
    g_assert_true(iov_vector_is_aligned(&v, 4096));
    iov_vector_add(&v, base + 4096, 512);
    g_assert_false(iov_vector_is_aligned(&v, 4096));
    g_assert_true(iov_vector_is_aligned(&v, 512));
    iov_vector_add(&v, base + 1, 512);
    g_assert_false(iov_vector_is_aligned(&v, 512));
    g_assert_true(iov_vector_is_aligned(&v, 1));
    free(base);
}

/* Each single byte is seen, whatever the length and alignment, and none beside the buffer. */
static void test_zero_every_place(void)
{
    static const size_t lens[] = {0, 1, 7, 8, 9, 31, 255, 256, 257, 511, 512, 513, 1024, 4096};
    char *buf = g_malloc(4096 + 16);
    for (size_t i = 0; i < G_N_ELEMENTS(lens); i++) {
        size_t len = lens[i], skew = i % 9;
        memset(buf, 0xff, 4096 + 16);
        memset(buf + skew, 0, len);
        g_assert_true(qb_buffer_is_zero(buf + skew, len));
        for (size_t at = 0; at < len; at++) {
            buf[skew + at] = (char)0x80;
            g_assert_false(qb_buffer_is_zero(buf + skew, len));
            buf[skew + at] = 0;
        }
    }
    g_free(buf);
}

/* Reading one byte past the buffer would hit a page that may not be read. */
static void test_zero_reads_no_further(void)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    char *map = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    g_assert_true(map != MAP_FAILED);
    g_assert_cmpint(mprotect(map + page, page, PROT_NONE), ==, 0);
    for (size_t len = 0; len <= 1024; len++) {
        g_assert_true(qb_buffer_is_zero(map + page - len, len));
    }
    munmap(map, 2 * page);
}

static void test_vector_is_zero(void)
{
    char a[300] = "", b[300] = "";
    IOV_VECTOR_AUTO v;
    iov_vector_init(&v, 2);
    iov_vector_add(&v, a, sizeof(a));
    iov_vector_add(&v, b, sizeof(b));
    g_assert_true(iov_vector_is_zero(&v, 0, 600));
    b[10] = 1;
    g_assert_false(iov_vector_is_zero(&v, 0, 600));
    g_assert_true(iov_vector_is_zero(&v, 0, 310));
    g_assert_false(iov_vector_is_zero(&v, 310, 1));
    g_assert_true(iov_vector_is_zero(&v, 311, 289));
}

static void test_memalign(void)
{
    QB_AUTO_FREE char *small = qb_try_memalign(1, 1);
    QB_AUTO_FREE char *page = qb_try_memalign(4096, 0);
    g_assert_nonnull(small);
    g_assert_nonnull(page);
    g_assert_cmpuint((uintptr_t)page % 4096, ==, 0);
}

static void test_beyond_the_end_asserts(void)
{
    if (g_test_subprocess()) {
        char buf[4], out[8];
        IOV_VECTOR_AUTO v;
        iov_vector_init_buf(&v, buf, 4);
        iov_vector_to_buf(&v, 2, out, 3);
        return;
    }
    g_test_trap_subprocess(NULL, 0, G_TEST_SUBPROCESS_DEFAULT);
    g_test_trap_assert_failed();
    g_test_trap_assert_stderr("*Assertion*");
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/iov/empty", test_empty);
    g_test_add_func("/iov/single-buffer", test_single_buffer);
    g_test_add_func("/iov/grow-from-single", test_grow_from_single);
    g_test_add_func("/iov/capacity-hint", test_capacity_hint);
    g_test_add_func("/iov/against-flat", test_against_flat);
    g_test_add_func("/iov/slice", test_slice);
    g_test_add_func("/iov/concat-appends", test_concat_appends);
    g_test_add_func("/iov/is-aligned", test_is_aligned);
    g_test_add_func("/iov/beyond-the-end-asserts", test_beyond_the_end_asserts);
    g_test_add_func("/iov/vector-is-zero", test_vector_is_zero);
    g_test_add_func("/iov/memalign", test_memalign);
    g_test_add_func("/zero/every-place", test_zero_every_place);
    g_test_add_func("/zero/reads-no-further", test_zero_reads_no_further);
    return g_test_run();
}
