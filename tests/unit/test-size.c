/*
 * Sizes as people write and read them: tables of texts and values.
 *
 * SPDX-License-Identifier: MIT
 */
#include "util/size.h"

#include <errno.h>
#include <glib.h>

#define KIB UINT64_C(1024)
#define MIB (KIB * KIB)
#define EIB (MIB * MIB * MIB)
#define UNTOUCHED UINT64_C(0xdeadbeef)

typedef struct Case {
    const char *text;
    int rc;
    uint64_t value;
} Case;

static const Case sizes[] = {
    {"0", 0, 0},
    {"512", 0, 512},
    {"+512", 0, 512},
    {" 512", 0, 512},
    {"010", 0, 10},
    {"1b", 0, 1},
    {"1B", 0, 1},
    {"64k", 0, 64 * KIB},
    {"64K", 0, 64 * KIB},
    {"3m", 0, 3 * MIB},
    {"1G", 0, KIB * MIB},
    {"1T", 0, MIB * MIB},
    {"1p", 0, KIB * MIB * MIB},
    {"7E", 0, 7 * EIB},
    {"1.5M", 0, 3 * MIB / 2},
    {"1.k", 0, KIB},
    {".5k", 0, KIB / 2},
    {"1.0", 0, 1},
    {"1.1k", 0, 1126},         /* 1126.4 */
    {"1.1M", 0, 1153434},      /* 1153433.6 */
    {"1.1G", 0, 1181116006},   /* ...6.4 */
    {"0.000001k", 0, 0},
    {"0.5E", 0, EIB / 2},
    {"7.999999999999999999E", 0, 8 * EIB - 1}, /* 1.15 bytes less */
    {"0x200", 0, 512},
    {"0X1f", 0, 31},
    {"0x20k", 0, 32 * KIB},
    {"0x1b", 0, 27},
    {"9223372036854775807", 0, INT64_MAX},
    {"0x7fffffffffffffff", 0, INT64_MAX},
    {"-0", 0, 0},

    {"9223372036854775808", -ERANGE, 0},
    {"18446744073709551616", -ERANGE, 0},
    {"99999999999999999999999", -ERANGE, 0},
    {"8E", -ERANGE, 0},
    {"8191.9999P", 0, UINT64_C(9223371924264785124)},
    {"8192P", -ERANGE, 0},
    {"99999E", -ERANGE, 0},
    {"-1", -ERANGE, 0},
    {"-1k", -ERANGE, 0},
    {"-0.5k", -ERANGE, 0},

    {"", -EINVAL, 0},
    {" ", -EINVAL, 0},
    {"-", -EINVAL, 0},
    {"+", -EINVAL, 0},
    {"--1", -EINVAL, 0},
    {"k", -EINVAL, 0},
    {".", -EINVAL, 0},
    {".k", -EINVAL, 0},
    {"0x", -EINVAL, 0},
    {"0xk", -EINVAL, 0},
    {"1.5", -EINVAL, 0},
    {"1.5b", -EINVAL, 0},
    {"0.00000000000000000000000001", -EINVAL, 0},
    {"1MB", -EINVAL, 0},
    {"1X", -EINVAL, 0},
    {"1 k", -EINVAL, 0},
    {"512 ", -EINVAL, 0},
    {"1e3", -EINVAL, 0},
    {"1.5.5k", -EINVAL, 0},
    {"1,5k", -EINVAL, 0},
    {"0x1.8k", -EINVAL, 0},
    {"inf", -EINVAL, 0},
    {"nan", -EINVAL, 0},
    {"99999999999999999999x", -EINVAL, 0}, /* garbage before range */
};

static void test_parse(void)
{
    for (size_t i = 0; i < G_N_ELEMENTS(sizes); i++) {
        uint64_t value = UNTOUCHED;
        int rc = qb_size_parse(sizes[i].text, 'b', &value);
        g_test_message("'%s' -> %d, %" G_GUINT64_FORMAT, sizes[i].text, rc, value);
        g_assert_cmpint(rc, ==, sizes[i].rc);
        g_assert_cmpuint(value, ==, rc ? UNTOUCHED : sizes[i].value);
    }
}

static void test_default_suffix(void)
{
    uint64_t value;
    g_assert_cmpint(qb_size_parse("3", 'M', &value), ==, 0);
    g_assert_cmpuint(value, ==, 3 * MIB);
    g_assert_cmpint(qb_size_parse("1.5", 'k', &value), ==, 0);
    g_assert_cmpuint(value, ==, 1536);
    g_assert_cmpint(qb_size_parse("3b", 'M', &value), ==, 0);
    g_assert_cmpuint(value, ==, 3);
    g_assert_cmpint(qb_size_parse("3", 0, &value), ==, 0);
    g_assert_cmpuint(value, ==, 3);
}

static const Case numbers[] = {
    {"0", 0, 0},
    {"16", 0, 16},
    {"0x10", 0, 16},
    {"18446744073709551615", 0, UINT64_MAX},
    {"0xffffffffffffffff", 0, UINT64_MAX},
    {"18446744073709551616", -ERANGE, 0},
    {"0x10000000000000000", -ERANGE, 0},
    {"-1", -ERANGE, 0},
    {"", -EINVAL, 0},
    {"x", -EINVAL, 0},
    {"0x", -EINVAL, 0},
    {"16k", -EINVAL, 0},
    {"1.0", -EINVAL, 0},
    {"1 ", -EINVAL, 0},
};

static void test_uint(void)
{
    for (size_t i = 0; i < G_N_ELEMENTS(numbers); i++) {
        uint64_t value = UNTOUCHED;
        int rc = qb_uint_parse(numbers[i].text, &value);
        g_test_message("'%s' -> %d, %" G_GUINT64_FORMAT, numbers[i].text, rc, value);
        g_assert_cmpint(rc, ==, numbers[i].rc);
        g_assert_cmpuint(value, ==, rc ? UNTOUCHED : numbers[i].value);
    }
}

static void test_text(void)
{
    static const struct {
        uint64_t bytes;
        const char *text;
    } cases[] = {
        {0, "0 B"},
        {1, "1 B"},
        {512, "512 B"},
        {999, "999 B"},
        {1000, "0.977 KiB"},
        {1024, "1 KiB"},
        {491520, "480 KiB"},
        {198 * KIB + 512, "198 KiB"},
        {1022976, "999 KiB"},
        {1023487, "999 KiB"},
        {1023488, "0.976 MiB"}, /* 999.5 KiB; not "1e+03 KiB" */
        {1024000, "0.977 MiB"},
        {10 * MIB, "10 MiB"},
        {3 * KIB * MIB / 2, "1.5 GiB"},
        {1073741824000, "0.977 TiB"},
        {4 * EIB, "4 EiB"},
        {UINT64_MAX, "16 EiB"},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        g_autofree char *text = qb_size_to_text(cases[i].bytes);
        g_assert_cmpstr(text, ==, cases[i].text);
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/size/parse", test_parse);
    g_test_add_func("/size/default-suffix", test_default_suffix);
    g_test_add_func("/size/uint", test_uint);
    g_test_add_func("/size/text", test_text);
    return g_test_run();
}
