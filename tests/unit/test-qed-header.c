/*
 * The QED header as bytes, what makes it legal, and the set of clusters: all that is pure.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qed.h"

#include <string.h>

#define FILE_BYTES (UINT64_C(1) << 20)

static const uint8_t sample[QED_HEADER_BYTES] = {
    0x51, 0x45, 0x44, 0x00, 0, 0, 1, 0, 4, 0, 0, 0, 1, 0, 0, 0, /* magic, 64 KiB, 4, 1 */
    5, 0, 0, 0, 0, 0, 0, 0, 0x11, 0, 0, 0, 0, 0, 0, 0,          /* features, compat */
    0, 0, 0, 0, 0, 0, 0, 0x80, 0, 0, 1, 0, 0, 0, 0, 0,          /* autoclear, L1 at 64 KiB */
    0, 0, 0, 0x40, 0, 0, 0, 0, 64, 0, 0, 0, 7, 0, 0, 0,         /* 1 GiB, name at 64, 7 bytes */
};

static void test_codec(void)
{
    QedHeader h;
    uint8_t back[QED_HEADER_BYTES];
    g_assert_true(qed_header_decode(sample, &h, NULL));
    g_assert_cmpuint(h.cluster_size, ==, 65536);
    g_assert_cmpuint(h.table_size, ==, 4);
    g_assert_cmpuint(h.header_size, ==, 1);
    g_assert_cmpuint(h.features, ==, QED_F_BACKING_FILE | QED_F_BACKING_NO_PROBE);
    g_assert_cmpuint(h.compat_features, ==, 0x11);
    g_assert_cmpuint(h.autoclear_features, ==, UINT64_C(1) << 63);
    g_assert_cmpuint(h.l1_offset, ==, 65536);
    g_assert_cmpuint(h.image_size, ==, UINT64_C(1) << 30);
    g_assert_cmpuint(h.backing_offset, ==, 64);
    g_assert_cmpuint(h.backing_size, ==, 7);
    qed_header_encode(&h, back);
    g_assert_cmpmem(back, sizeof(back), sample, sizeof(sample));
}

static void assert_says(const QedHeader *h, const char *text, int code)
{
    g_autoptr(GError) err = NULL;
    g_assert_false(qed_header_validate(h, FILE_BYTES, &err));
    g_assert_cmpstr(err->message, ==, text);
    g_assert_cmpint(err->code, ==, code);
}

static QedHeader good(void)
{
    QedHeader h;
    g_assert_true(qed_header_decode(sample, &h, NULL));
    g_assert_true(qed_header_validate(&h, FILE_BYTES, NULL));
    return h;
}

#define BAD(field, value, text)                                                                    \
    do {                                                                                           \
        QedHeader h_ = good();                                                                     \
        h_.field = (value);                                                                        \
        assert_says(&h_, text, EINVAL);                                                            \
    } while (0)

static void test_rules(void)
{
    QedHeader h = good();
    g_autoptr(GError) err = NULL;
    BAD(cluster_size, 2048, "QED cluster size is invalid");
    BAD(cluster_size, 65537, "QED cluster size is invalid");
    BAD(cluster_size, 128u << 20, "QED cluster size is invalid");
    BAD(table_size, 0, "QED table size is invalid");
    BAD(table_size, 3, "QED table size is invalid");
    BAD(table_size, 32, "QED table size is invalid");
    BAD(header_size, 0, "QED header size is invalid");
    BAD(header_size, 65536, "QED header size is too large");
    BAD(image_size, 513, "QED image size is invalid");
    BAD(image_size, (UINT64_C(64) << 40) + 512, "QED image size is invalid");
    BAD(l1_offset, 0, "QED table offset is invalid");
    BAD(l1_offset, 65536 + 4096, "QED table offset is invalid");
    BAD(l1_offset, FILE_BYTES - 3 * 65536, "QED table offset is invalid");
    BAD(l1_offset, UINT64_MAX - 65535, "QED table offset is invalid");
    BAD(backing_offset, 65530, "QED backing filename offset is invalid");
    BAD(backing_offset, UINT32_MAX, "QED backing filename offset is invalid");
    BAD(backing_size, 4096, "QED backing filename offset is invalid");
    h.features |= 8;
    assert_says(&h, "Unsupported QED features: 8", ENOTSUP);
    g_assert_false(qed_header_decode((const uint8_t *)"QFI\xfb", &h, &err));
    g_assert_cmpstr(err->message, ==, "Image not in QED format");
}

static void test_legal(void)
{
    QedHeader h = good();
    h.table_size = 1;
    g_assert_true(qed_header_validate(&h, FILE_BYTES, NULL));
    h = good();
    h.image_size = UINT64_C(64) << 40;
    g_assert_true(qed_header_validate(&h, FILE_BYTES, NULL));
    h.l1_offset = FILE_BYTES - 4 * 65536;
    g_assert_true(qed_header_validate(&h, FILE_BYTES + 1, NULL));
    h.features = 0; /* then the name means nothing */
    h.backing_offset = h.backing_size = UINT32_MAX;
    g_assert_true(qed_header_validate(&h, FILE_BYTES, NULL));
}

static void test_max_size(void)
{
    g_assert_cmpuint(qed_max_image_size(65536, 4), ==, UINT64_C(64) << 40);
    g_assert_cmpuint(qed_max_image_size(4096, 1), ==, UINT64_C(512) * 512 * 4096);
    g_assert_cmpuint(qed_max_image_size(64 << 20, 16), ==, INT64_MAX / 512 * 512); /* of 2^80 */
}

/* --- the set of clusters --- */

static void test_space_counts(void)
{
    QedSpace *sp = qed_space_new();
    g_assert_cmpuint(qed_space_end(sp), ==, 0);
    g_assert_cmpuint(qed_space_add(sp, 10, 5000), ==, 0);
    g_assert_cmpuint(qed_space_add(sp, 5000, 20), ==, 10);
    g_assert_cmpuint(qed_space_count(sp), ==, 5010);
    g_assert_cmpuint(qed_space_end(sp), ==, 5020);
    g_assert_true(qed_space_has(sp, 5019));
    g_assert_false(qed_space_has(sp, 5020));
    qed_space_remove(sp, 4000, 10000);
    g_assert_cmpuint(qed_space_count(sp), ==, 3990);
    g_assert_cmpuint(qed_space_end(sp), ==, 4000);
    qed_space_add(sp, UINT64_C(1) << 50, 1); /* far apart costs nothing */
    g_assert_cmpuint(qed_space_end(sp), ==, (UINT64_C(1) << 50) + 1);
    qed_space_free(sp);
}

/* Against an array of flags. */
static void test_space_model(void)
{
    enum { N = 6000 };
    bool used[N + 100] = {false};
    QedSpace *sp = qed_space_new();
    for (int round = 0; round < 3000; round++) {
        uint64_t first = (uint64_t)g_test_rand_int_range(0, N - 300);
        uint64_t n = (uint64_t)g_test_rand_int_range(1, 300);
        bool add = g_test_rand_bit();
        if (add) {
            qed_space_add(sp, first, n);
        } else {
            qed_space_remove(sp, first, n);
        }
        memset(used + first, add, n);
        uint64_t min = (uint64_t)g_test_rand_int_range(1, 40), got, want = 0;
        while (memchr(used + want, true, min)) { /* lowest place where @min are free */
            want++;
        }
        g_assert_cmpuint(qed_space_find(sp, min, min, &got), ==, want);
        g_assert_cmpuint(got, ==, min);
    }
    qed_space_free(sp);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/qed/header/codec", test_codec);
    g_test_add_func("/qed/header/rules", test_rules);
    g_test_add_func("/qed/header/legal", test_legal);
    g_test_add_func("/qed/header/max-size", test_max_size);
    g_test_add_func("/qed/space/counts", test_space_counts);
    g_test_add_func("/qed/space/model", test_space_model);
    return g_test_run();
}
