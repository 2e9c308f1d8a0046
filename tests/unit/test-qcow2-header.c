/*
 * The qcow2 header as data: codec, every rule with its text, extensions, feature names, layout.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2.h"

#include <string.h>

/* A header that every rule likes: version 3, 64 KiB clusters, 1 GiB. */
static Qcow2Header good_header(void)
{
    return (Qcow2Header){
        .version = 3,
        .cluster_bits = 16,
        .size = 1 << 30,
        .l1_size = 2,
        .l1_offset = 0x30000,
        .reftable_offset = 0x10000,
        .reftable_clusters = 1,
        .refcount_order = 4,
        .header_length = QCOW2_HDR_V3_LENGTH,
    };
}

static void assert_same_header(const Qcow2Header *a, const Qcow2Header *b)
{
    g_assert_cmpuint(a->version, ==, b->version);
    g_assert_cmphex(a->backing_offset, ==, b->backing_offset);
    g_assert_cmpuint(a->backing_size, ==, b->backing_size);
    g_assert_cmpuint(a->cluster_bits, ==, b->cluster_bits);
    g_assert_cmphex(a->size, ==, b->size);
    g_assert_cmpuint(a->crypt_method, ==, b->crypt_method);
    g_assert_cmpuint(a->l1_size, ==, b->l1_size);
    g_assert_cmphex(a->l1_offset, ==, b->l1_offset);
    g_assert_cmphex(a->reftable_offset, ==, b->reftable_offset);
    g_assert_cmpuint(a->reftable_clusters, ==, b->reftable_clusters);
    g_assert_cmpuint(a->nb_snapshots, ==, b->nb_snapshots);
    g_assert_cmphex(a->snapshots_offset, ==, b->snapshots_offset);
    g_assert_cmphex(a->incompatible, ==, b->incompatible);
    g_assert_cmphex(a->compatible, ==, b->compatible);
    g_assert_cmphex(a->autoclear, ==, b->autoclear);
    g_assert_cmpuint(a->refcount_order, ==, b->refcount_order);
    g_assert_cmpuint(a->header_length, ==, b->header_length);
    g_assert_cmpuint(a->compression_type, ==, b->compression_type);
}

/* ---------------------------------------------------------------- codec */

static void test_bytes(void)
{
    static const uint8_t expected[QCOW2_HDR_V3_LENGTH] = {
        'Q', 'F', 'I', 0xfb, 0, 0, 0, 3,            0, 0, 0, 0, 0, 0, 2, 0x10, 0, 0, 0, 7,
        0, 0, 0, 16,         0, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2,
        0, 0, 0, 0, 0, 3, 0, 0,                     0, 0, 0, 0, 0, 1, 0, 0,    0, 0, 0, 1,
        0, 0, 0, 5,          0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8,
        0, 0, 0, 0, 0, 0, 0, 1,                     0, 0, 0, 0, 0, 0, 0, 1,
        0, 0, 0, 4,          0, 0, 0, 112,          1, 0, 0, 0, 0, 0, 0, 0,
    };
    Qcow2Header h = good_header(), back;
    uint8_t buf[QCOW2_HDR_V3_LENGTH];
    h.backing_offset = 0x210;
    h.backing_size = 7;
    h.nb_snapshots = 5;
    h.snapshots_offset = 0x50000;
    h.incompatible = QCOW2_INCOMPAT_COMPRESSION;
    h.compatible = QCOW2_COMPAT_LAZY_REFCOUNTS;
    h.autoclear = QCOW2_AUTOCLEAR_BITMAPS;
    h.compression_type = QCOW2_COMPRESSION_ZSTD;
    qcow2_header_encode(&h, buf);
    g_assert_cmpmem(buf, sizeof(buf), expected, sizeof(expected));
    g_assert_true(qcow2_header_decode(buf, sizeof(buf), &back, NULL));
    assert_same_header(&h, &back);
}

static void test_version2(void)
{
    Qcow2Header h = good_header(), back;
    uint8_t buf[QCOW2_HDR_V3_LENGTH];
    memset(buf, 0xee, sizeof(buf));
    h.version = 2;
    h.header_length = QCOW2_HDR_V2_LENGTH;
    qcow2_header_encode(&h, buf);
    g_assert_cmphex(buf[QCOW2_HDR_V2_LENGTH], ==, 0xee); /* not a byte too many */
    g_assert_true(qcow2_header_decode(buf, sizeof(buf), &back, NULL));
    assert_same_header(&h, &back); /* what lies behind the header means nothing */
    g_assert_true(qcow2_header_decode(buf, QCOW2_HDR_V2_LENGTH, &back, NULL));
    assert_same_header(&h, &back);
}

static void test_short_header(void)
{
    Qcow2Header h = good_header(), back;
    uint8_t buf[QCOW2_HDR_V3_LENGTH];
    h.header_length = QCOW2_HDR_V3_MIN_LENGTH;
    qcow2_header_encode(&h, buf);
    buf[QCOW2_HDR_COMPRESSION] = 1; /* an extension begins there */
    g_assert_true(qcow2_header_decode(buf, sizeof(buf), &back, NULL));
    g_assert_cmpuint(back.compression_type, ==, 0);
    assert_same_header(&h, &back);
}

static void assert_no_decode(const uint8_t *buf, size_t len, int code, const char *text)
{
    g_autoptr(GError) err = NULL;
    Qcow2Header h = {.version = 77};
    g_assert_false(qcow2_header_decode(buf, len, &h, &err));
    g_assert_error(err, QB_ERROR, code);
    g_assert_cmpstr(err->message, ==, text);
    g_assert_cmpuint(h.version, ==, 77);
}

static void test_refused_bytes(void)
{
    uint8_t buf[QCOW2_HDR_V3_LENGTH] = "QFI\xfb";
    assert_no_decode(buf, 0, EINVAL, "Image is not in qcow2 format");
    assert_no_decode(buf, 3, EINVAL, "Image is not in qcow2 format");
    assert_no_decode(buf, 4, ENOTSUP, "Unsupported qcow2 version 0");
    buf[7] = 1;
    assert_no_decode(buf, sizeof(buf), ENOTSUP, "Unsupported qcow2 version 1");
    buf[7] = 4;
    assert_no_decode(buf, sizeof(buf), ENOTSUP, "Unsupported qcow2 version 4");
    buf[3] = 0xfa;
    assert_no_decode(buf, sizeof(buf), EINVAL, "Image is not in qcow2 format");
}

/* ---------------------------------------------------------------- rules */

typedef struct Rule {
    const char *text;   /* NULL: fine */
    int code;
    bool check_forgives; /* an image opened for check may have it */
    Qcow2Header h;      /* fields that differ from a good header; ~0 stands for 0 */
} Rule;

#define FIELD(f) (rule->h.f ? (rule->h.f == (__typeof__(rule->h.f))~0 ? 0 : rule->h.f) : h.f)

static Qcow2Header header_of(const Rule *rule)
{
    Qcow2Header h = good_header();
    return (Qcow2Header){
        FIELD(version), FIELD(backing_offset), FIELD(backing_size), FIELD(cluster_bits),
        FIELD(size), FIELD(crypt_method), FIELD(l1_size), FIELD(l1_offset), FIELD(reftable_offset),
        FIELD(reftable_clusters), FIELD(nb_snapshots), FIELD(snapshots_offset),
        FIELD(incompatible), FIELD(compatible), FIELD(autoclear), FIELD(refcount_order),
        FIELD(header_length), FIELD(compression_type),
    };
}

#define ZERO UINT64_MAX

static const Rule rules[] = {
    {NULL},
    {"Unsupported cluster size: 2^8", EINVAL, false, {.cluster_bits = 8}},
    {"Unsupported cluster size: 2^22", EINVAL, false, {.cluster_bits = 22}},
    {"Unsupported cluster size: 2^2147483656", EINVAL, false, {.cluster_bits = 0x80000008}},
    {"qcow2 header too short", EINVAL, false, {.header_length = 103}},
    {NULL, 0, false, {.header_length = 104}},
    {NULL, 0, false, {.header_length = 65536}},
    {"qcow2 header exceeds cluster size", EINVAL, false, {.header_length = 65537}},
    {"Invalid backing file offset", EINVAL, false, {.backing_offset = 65537}},
    {NULL, 0, false, {.backing_offset = 65536}},
    {"Backing file name too long", EINVAL, false, {.backing_offset = 600, .backing_size = 1024}},
    {NULL, 0, false, {.backing_offset = 600, .backing_size = 1023}},
    {"Backing file name too long", EINVAL, false, {.backing_offset = 65530, .backing_size = 7}},
    {NULL, 0, false, {.backing_offset = 65530, .backing_size = 6}},
    {NULL, 0, false, {.backing_size = 5000}}, /* without an offset it means nothing */
    {"Reference count entry width too large; may not exceed 64 bits", EINVAL, false,
     {.refcount_order = 7}},
    {NULL, 0, false, {.refcount_order = 6}},
    {NULL, 0, false, {.refcount_order = (uint32_t)ZERO}},
    {"Unsupported encryption method 3", EINVAL, false, {.crypt_method = 3}},
    {NULL, 0, false, {.crypt_method = 2}},
    {"Image does not contain a reference count table", EINVAL, true,
     {.reftable_clusters = (uint32_t)ZERO}},
    {NULL, 0, false, {.reftable_clusters = 128}},
    {"Reference count table too large", EFBIG, true, {.reftable_clusters = 129}},
    {"Reference count table offset invalid", EINVAL, true, {.reftable_offset = 0x10200}},
    {"Reference count table offset invalid", EINVAL, true, {.reftable_offset = ZERO}},
    {"Reference count table offset invalid", EINVAL, true,
     {.reftable_offset = UINT64_C(0x7fffffffffff0000)}},
    {"Snapshot table too large", EFBIG, true,
     {.nb_snapshots = 65537, .snapshots_offset = 0x40000}},
    {NULL, 0, false, {.nb_snapshots = 65536, .snapshots_offset = 0x40000}},
    {"Snapshot table offset invalid", EINVAL, true, {.nb_snapshots = 1}},
    {"Snapshot table offset invalid", EINVAL, true, {.snapshots_offset = 0x40001}},
    {"Active L1 table too large", EFBIG, false, {.l1_size = 4194305}},
    {NULL, 0, false, {.l1_size = 4194304}},
    {"Active L1 table offset invalid", EINVAL, false, {.l1_offset = 0x30008}},
    {"Active L1 table offset invalid", EINVAL, false, {.l1_offset = ZERO}},
    {"Active L1 table offset invalid", EINVAL, false,
     {.l1_offset = UINT64_C(0x8000000000000000)}},
    {NULL, 0, false, {.l1_offset = ZERO, .l1_size = (uint32_t)ZERO, .size = ZERO}},
    {"L1 table is too small", EINVAL, true, {.l1_size = 1}},
    {"L1 table is too small", EINVAL, true, {.size = (1 << 30) + 1}},
    {"L1 table is too small", EINVAL, true,
     {.incompatible = QCOW2_INCOMPAT_EXTL2}}, /* half as many entries per table */
    {NULL, 0, false, {.incompatible = QCOW2_INCOMPAT_EXTL2, .l1_size = 4}},
    {"Image is too big", EFBIG, false, {.size = UINT64_C(1) << 62}},
    {"Image is too big", EFBIG, false, {.size = UINT64_MAX - 1}},
    {"Unsupported subcluster size: 256", EINVAL, false,
     {.incompatible = QCOW2_INCOMPAT_EXTL2, .cluster_bits = 13, .l1_size = 1000}},
    {"qcow2: unknown compression type: 2", ENOTSUP, false, {.compression_type = 2}},
    {"qcow2: Compression type incompatible feature bit must be set", EINVAL, false,
     {.compression_type = 1}},
    {"qcow2: Compression type incompatible feature bit must not be set", EINVAL, false,
     {.incompatible = QCOW2_INCOMPAT_COMPRESSION}},
    {NULL, 0, false, {.incompatible = QCOW2_INCOMPAT_COMPRESSION, .compression_type = 1}},
    {"data-file-raw requires a data file", EINVAL, false,
     {.autoclear = QCOW2_AUTOCLEAR_DATA_FILE_RAW}},
    {NULL, 0, false,
     {.autoclear = QCOW2_AUTOCLEAR_DATA_FILE_RAW, .incompatible = QCOW2_INCOMPAT_DATA_FILE}},
};

static void assert_rule(const Rule *rule, bool for_check)
{
    g_autoptr(GError) err = NULL;
    Qcow2Header h = header_of(rule);
    bool fine = !rule->text || (for_check && rule->check_forgives);
    g_test_message("rule %td: %s", rule - rules, rule->text ? rule->text : "fine");
    g_assert_cmpint(qcow2_header_validate(&h, for_check, &err), ==, fine);
    if (fine) {
        g_assert_no_error(err);
    } else {
        g_assert_error(err, QB_ERROR, rule->code);
        g_assert_cmpstr(err->message, ==, rule->text);
    }
}

static void test_rules(void)
{
    for (size_t i = 0; i < G_N_ELEMENTS(rules); i++) {
        assert_rule(&rules[i], false);
        assert_rule(&rules[i], true);
    }
}

/* ---------------------------------------------------------------- extensions */

static void put_extension(uint8_t *at, uint32_t type, uint32_t length)
{
    qb_stbe32(at, type);
    qb_stbe32(at + 4, length);
}

static void test_extensions_roundtrip(void)
{
    g_autoptr(GArray) in = qcow2_extensions_new(), out = qcow2_extensions_new();
    uint8_t buf[256];
    qcow2_extensions_add(in, QCOW2_EXT_BACKING_FORMAT, "qcow2", 5);
    qcow2_extensions_add(in, 0x12345678, "", 0);
    qcow2_extensions_add(in, 0x87654321, "12345678", 8);
    g_assert_cmpuint(qcow2_extensions_length(in), ==, 16 + 8 + 16 + 8);
    memset(buf, 0xff, sizeof(buf));
    qcow2_extensions_encode(in, buf);
    g_assert_true(qcow2_extensions_decode(buf, 0, sizeof(buf), out, NULL));
    g_assert_cmpuint(out->len, ==, in->len);
    for (guint i = 0; i < in->len; i++) {
        const Qcow2Extension *a = &g_array_index(in, Qcow2Extension, i);
        const Qcow2Extension *b = &g_array_index(out, Qcow2Extension, i);
        g_assert_cmphex(a->type, ==, b->type);
        g_assert_cmpmem(a->data, a->length, b->data, b->length);
    }
    g_assert_cmpstr((char *)qcow2_find_extension(out, QCOW2_EXT_BACKING_FORMAT)->data, ==, "qcow2");
    g_assert_null(qcow2_find_extension(out, QCOW2_EXT_CRYPTO));
}

/* The padding of the last one may lie beyond the area, and there need be no end marker. */
static void test_extensions_end(void)
{
    g_autoptr(GArray) out = qcow2_extensions_new();
    uint8_t buf[64] = {0};
    put_extension(buf, 0xabc, 3);
    put_extension(buf + 16, 0xabd, 0);
    g_assert_true(qcow2_extensions_decode(buf, 0, 11, out, NULL));
    g_assert_cmpuint(out->len, ==, 1);
    g_array_set_size(out, 0);
    g_assert_true(qcow2_extensions_decode(buf, 0, 24, out, NULL));
    g_assert_cmpuint(out->len, ==, 2);
    g_array_set_size(out, 0);
    g_assert_true(qcow2_extensions_decode(buf, 0, 23, out, NULL)); /* no room for a head: the end */
    g_assert_cmpuint(out->len, ==, 1);
    g_array_set_size(out, 0);
    g_assert_true(qcow2_extensions_decode(buf, 40, 8, out, NULL)); /* a name before the area */
    g_assert_cmpuint(out->len, ==, 0);
}

static void test_extensions_too_long(void)
{
    static const uint32_t lengths[] = {25, 0x7fffffff, 0xfffffff8, 0xffffffff};
    for (size_t i = 0; i < G_N_ELEMENTS(lengths); i++) {
        g_autoptr(GArray) out = qcow2_extensions_new();
        g_autoptr(GError) err = NULL;
        uint8_t buf[32] = {0};
        put_extension(buf, 0xabc, lengths[i]);
        g_assert_false(qcow2_extensions_decode(buf, 0, sizeof(buf), out, &err));
        g_assert_error(err, QB_ERROR, EINVAL);
        g_assert_cmpstr(err->message, ==, "Header extension too large");
    }
}

/* The later of two counts, for those who write them twice. */
static void test_extensions_twice(void)
{
    g_autoptr(GArray) list = qcow2_extensions_new();
    qcow2_extensions_add(list, QCOW2_EXT_DATA_FILE, "a", 1);
    qcow2_extensions_add(list, QCOW2_EXT_DATA_FILE, "b", 1);
    g_assert_cmpstr((char *)qcow2_find_extension(list, QCOW2_EXT_DATA_FILE)->data, ==, "b");
}

static void assert_extension(const Qcow2Header *h, uint32_t type, const void *data, uint32_t length,
                             const char *text)
{
    g_autoptr(GArray) list = qcow2_extensions_new();
    g_autoptr(GError) err = NULL;
    qcow2_extensions_add(list, type, data, length);
    g_assert_cmpint(qcow2_extensions_validate(h, list, &err), ==, text == NULL);
    if (text) {
        g_assert_error(err, QB_ERROR, EINVAL);
        g_assert_cmpstr(err->message, ==, text);
    }
}

static void assert_bitmaps(uint32_t nb, uint32_t reserved, uint64_t size, uint64_t offset,
                           const char *text)
{
    Qcow2Header h = good_header();
    uint8_t data[24];
    qb_stbe32(data, nb);
    qb_stbe32(data + 4, reserved);
    qb_stbe64(data + 8, size);
    qb_stbe64(data + 16, offset);
    assert_extension(&h, QCOW2_EXT_BITMAPS, data, 24, NULL); /* no autoclear bit: ignored */
    h.autoclear = QCOW2_AUTOCLEAR_BITMAPS;
    assert_extension(&h, QCOW2_EXT_BITMAPS, data, 24, text);
}

static void test_bitmaps_rules(void)
{
    Qcow2Header h = good_header();
    h.autoclear = QCOW2_AUTOCLEAR_BITMAPS;
    assert_extension(&h, QCOW2_EXT_BITMAPS, "12345678", 8, "bitmaps_ext: Invalid extension length");
    assert_bitmaps(1, 0, 32, 0x50000, NULL);
    assert_bitmaps(1, 1, 32, 0x50000, "bitmaps_ext: Reserved field is not zero");
    assert_bitmaps(0, 0, 32, 0x50000, "found bitmaps extension with zero bitmaps");
    assert_bitmaps(65535, 0, 32, 0x50000, NULL);
    assert_bitmaps(65536, 0, 32, 0x50000,
                   "bitmaps_ext: Image has 65536 bitmaps, exceeding the supported maximum of"
                   " 65535");
    assert_bitmaps(1, 0, 32, 0x50001, "bitmaps_ext: invalid bitmap directory offset");
    assert_bitmaps(1, 0, 32, 0, "bitmaps_ext: invalid bitmap directory offset");
    assert_bitmaps(1, 0, 67107841, 0x50000,
                   "bitmaps_ext: bitmap directory size (67107841) exceeds the maximum supported"
                   " size (67107840)");
}

static void test_crypto_rules(void)
{
    Qcow2Header h = good_header();
    uint8_t data[16] = {0};
    qb_stbe64(data, 0x40000);
    qb_stbe64(data + 8, 2068480);
    assert_extension(&h, QCOW2_EXT_CRYPTO, data, 16,
                     "CRYPTO header extension only expected with LUKS encryption method");
    h.crypt_method = QCOW2_CRYPT_LUKS;
    assert_extension(&h, QCOW2_EXT_CRYPTO, data, 16, NULL);
    assert_extension(&h, QCOW2_EXT_CRYPTO, data, 15,
                     "CRYPTO header extension size 15, but expected size 16");
    assert_extension(&h, 0xabc, "", 0, "Header extension for LUKS encryption is missing");
    qb_stbe64(data, 0x40001);
    assert_extension(&h, QCOW2_EXT_CRYPTO, data, 16, "Encryption header offset invalid");
}

static void test_format_rule(void)
{
    Qcow2Header h = good_header();
    assert_extension(&h, QCOW2_EXT_BACKING_FORMAT, "123456789012345", 15, NULL);
    assert_extension(&h, QCOW2_EXT_BACKING_FORMAT, "1234567890123456", 16,
                     "Backing format name too long");
}

/* ---------------------------------------------------------------- feature names */

static void test_feature_names(void)
{
    g_autoptr(GArray) list = qcow2_extensions_new();
    uint8_t table[2 * 48 + 5] = {0};
    g_autofree char *bare = qcow2_unknown_feature_names(list, UINT64_C(1) << 63 | 0x20);
    g_assert_cmpstr(bare, ==,
                    "Unsupported qcow2 feature(s): Unknown incompatible feature: 8000000000000020");
    table[1] = 5;
    memset(table + 2, 'x', 46); /* as long as can be: no NUL */
    table[48] = 1;              /* a compatible one: not asked for */
    table[49] = 6;
    strcpy((char *)table + 50, "other");
    qcow2_extensions_add(list, QCOW2_EXT_FEATURE_TABLE, table, sizeof(table));
    g_autofree char *both = qcow2_unknown_feature_names(list, 0x60);
    g_assert_cmpstr(both, ==, "Unsupported qcow2 feature(s): "
                              "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx, "
                              "Unknown incompatible feature: 40");
}

static void test_feature_names_are_printable(void)
{
    g_autoptr(GArray) list = qcow2_extensions_new();
    uint8_t table[48] = {0, 7, 'a', '\n', 0x1b, '[', 0xff};
    qcow2_extensions_add(list, QCOW2_EXT_FEATURE_TABLE, table, sizeof(table));
    g_autofree char *text = qcow2_unknown_feature_names(list, 0x80);
    g_assert_cmpstr(text, ==, "Unsupported qcow2 feature(s): a??[?");
}

static void test_own_feature_table(void)
{
    uint32_t length;
    g_autofree uint8_t *table = qcow2_feature_table(&length);
    g_assert_cmpuint(length, ==, 384);
    g_assert_cmpstr((char *)table + 2, ==, "dirty bit");
    g_assert_cmpuint(table[7 * 48], ==, 2);
    g_assert_cmpuint(table[7 * 48 + 1], ==, 1);
    g_assert_cmpstr((char *)table + 7 * 48 + 2, ==, "raw external data");
}

/* ---------------------------------------------------------------- layout */

static void assert_layout(size_t cluster_size, size_t name_length, const char *text)
{
    g_autoptr(GArray) list = qcow2_extensions_new();
    g_autoptr(GError) err = NULL;
    g_autofree char *name = g_strnfill(name_length, 'n');
    g_autofree uint8_t *cluster0 = g_malloc(cluster_size);
    Qcow2Header h = good_header(), out, back;
    h.cluster_bits = (uint32_t)__builtin_ctzl(cluster_size);
    qcow2_extensions_add(list, QCOW2_EXT_BACKING_FORMAT, "raw", 3);
    bool ok = qcow2_header_layout(&h, list, name, cluster0, cluster_size, &out, &err);
    g_assert_cmpint(ok, ==, text == NULL);
    if (!ok) {
        g_assert_cmpstr(err->message, ==, text);
        return;
    }
    g_assert_true(qcow2_header_decode(cluster0, cluster_size, &back, NULL));
    assert_same_header(&out, &back);
    g_assert_cmpuint(back.backing_offset, ==, 112 + 16 + 8);
    g_assert_cmpmem(cluster0 + back.backing_offset, back.backing_size, name, name_length);
}

static void test_layout(void)
{
    assert_layout(65536, 1, NULL);
    assert_layout(65536, 1023, NULL);
    assert_layout(65536, 1024, "Backing file name too long");
    assert_layout(512, 512 - 136, NULL);
    assert_layout(512, 512 - 135, "No space left in the file header");
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/qcow2/header/bytes", test_bytes);
    g_test_add_func("/qcow2/header/version2", test_version2);
    g_test_add_func("/qcow2/header/short", test_short_header);
    g_test_add_func("/qcow2/header/refused-bytes", test_refused_bytes);
    g_test_add_func("/qcow2/header/rules", test_rules);
    g_test_add_func("/qcow2/extensions/roundtrip", test_extensions_roundtrip);
    g_test_add_func("/qcow2/extensions/end", test_extensions_end);
    g_test_add_func("/qcow2/extensions/too-long", test_extensions_too_long);
    g_test_add_func("/qcow2/extensions/twice", test_extensions_twice);
    g_test_add_func("/qcow2/extensions/bitmaps", test_bitmaps_rules);
    g_test_add_func("/qcow2/extensions/crypto", test_crypto_rules);
    g_test_add_func("/qcow2/extensions/format", test_format_rule);
    g_test_add_func("/qcow2/features/names", test_feature_names);
    g_test_add_func("/qcow2/features/printable", test_feature_names_are_printable);
    g_test_add_func("/qcow2/features/own-table", test_own_feature_table);
    g_test_add_func("/qcow2/header/layout", test_layout);
    return g_test_run();
}
