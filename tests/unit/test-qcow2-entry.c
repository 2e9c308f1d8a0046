/*
 * L2 entries: types, host offsets, runs and compressed descriptors, for every cluster size, with
 * and without extended L2 and an external data file.
 *
 * SPDX-License-Identifier: MIT
 */
#undef NDEBUG
#include "block/qcow2-io-int.h"

#define ALL UINT64_C(0xffffffff)
#define ZERO_ALL (ALL << 32)

static BDRVQcow2State state(int version, unsigned bits, bool subclusters, bool data_file)
{
    BDRVQcow2State s = {.version = version, .cluster_bits = bits, .cluster_size = 1u << bits};
    s.has_subclusters = subclusters;
    s.has_data_file = data_file;
    s.l2_entry_size = subclusters ? 16 : 8;
    s.l2_bits = bits - (subclusters ? 4 : 3);
    s.l2_entries = 1u << s.l2_bits;
    s.subclusters_per_cluster = subclusters ? QCOW2_SUBCLUSTERS : 1;
    s.subcluster_bits = bits - (subclusters ? 5 : 0);
    s.subcluster_size = 1u << s.subcluster_bits;
    s.csize_shift = 62 - (bits - 8);
    s.csize_mask = (UINT64_C(1) << (bits - 8)) - 1;
    return s;
}

static Qcow2L2Entry entry(uint64_t e, uint64_t bitmap)
{
    return (Qcow2L2Entry){.entry = e, .bitmap = bitmap};
}

/* --- plain entries --- */

static void test_plain_types(void)
{
    static const struct {
        int version;
        uint64_t entry;
        Qcow2ClusterType type;
    } cases[] = {
        {3, 0, QCOW2_UNALLOCATED},
        {3, 1, QCOW2_ZERO_PLAIN},
        {3, 0x50000, QCOW2_NORMAL},
        {3, QCOW2_ENTRY_COPIED | 0x50000, QCOW2_NORMAL},
        {3, QCOW2_ENTRY_COPIED | 0x50001, QCOW2_ZERO_ALLOC},
        {3, 0x50001, QCOW2_ZERO_ALLOC},
        {3, QCOW2_ENTRY_COMPRESSED | 0x50000, QCOW2_COMPRESSED},
        {3, QCOW2_ENTRY_COMPRESSED | 0x50001, QCOW2_COMPRESSED},
        {3, QCOW2_ENTRY_COPIED, QCOW2_UNALLOCATED}, /* offset 0 is the header */
        {2, 0x50000, QCOW2_NORMAL},
        {2, 0x50001, QCOW2_INVALID},
        {2, 1, QCOW2_INVALID},
        {2, QCOW2_ENTRY_COMPRESSED | 1, QCOW2_COMPRESSED},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        BDRVQcow2State s = state(cases[i].version, 16, false, false);
        g_assert_cmpint(qcow2_entry_type(&s, entry(cases[i].entry, 0), 0), ==, cases[i].type);
    }
}

static void test_data_file_types(void)
{
    BDRVQcow2State s = state(3, 16, false, true);
    Qcow2L2Entry at_zero = entry(QCOW2_ENTRY_COPIED, 0);
    g_assert_cmpint(qcow2_entry_type(&s, at_zero, 0), ==, QCOW2_NORMAL);
    g_assert_true(qcow2_entry_has_host(&s, at_zero));
    g_assert_true(qcow2_entry_copied(&s, at_zero));
    g_assert_cmpint(qcow2_entry_type(&s, entry(QCOW2_ENTRY_COPIED | 1, 0), 0), ==,
                    QCOW2_ZERO_ALLOC);
    g_assert_cmpint(qcow2_entry_type(&s, entry(0, 0), 0), ==, QCOW2_UNALLOCATED);
    g_assert_true(qcow2_entry_copied(&s, entry(0x50000, 0)));
}

static void test_copied(void)
{
    BDRVQcow2State s = state(3, 16, false, false);
    g_assert_true(qcow2_entry_copied(&s, entry(QCOW2_ENTRY_COPIED | 0x50000, 0)));
    g_assert_false(qcow2_entry_copied(&s, entry(0x50000, 0)));
    g_assert_false(qcow2_entry_copied(&s, entry(QCOW2_ENTRY_COPIED, 0)));
    uint64_t stream = QCOW2_ENTRY_COMPRESSED | 512;
    g_assert_false(qcow2_entry_copied(&s, entry(QCOW2_ENTRY_COPIED | stream, 0)));
}

/* --- extended entries --- */

static void test_extended_types(void)
{
    static const struct {
        uint64_t entry, bitmap;
        unsigned sc;
        Qcow2ClusterType type;
    } cases[] = {
        {0, 0, 0, QCOW2_UNALLOCATED},
        {0, ZERO_ALL, 31, QCOW2_ZERO_PLAIN},
        {0, UINT64_C(1) << 32, 0, QCOW2_ZERO_PLAIN},
        {0, UINT64_C(1) << 32, 1, QCOW2_UNALLOCATED},
        {0, 1, 5, QCOW2_INVALID},
        /* writes at 0..2K and 6K..7K, zeroes at 10K..14K of a 64 KiB cluster */
        {0x8000000000050000, 0x0000006000000009, 0, QCOW2_NORMAL},
        {0x8000000000050000, 0x0000006000000009, 1, QCOW2_UNALLOCATED_ALLOC},
        {0x8000000000050000, 0x0000006000000009, 3, QCOW2_NORMAL},
        {0x8000000000050000, 0x0000006000000009, 5, QCOW2_ZERO_ALLOC},
        {0x8000000000050000, 0x0000006000000009, 31, QCOW2_UNALLOCATED_ALLOC},
        {0x8000000000070000, 0x00000001FFFFFFFE, 0, QCOW2_ZERO_ALLOC},
        {0x8000000000070000, 0x00000001FFFFFFFE, 31, QCOW2_NORMAL},
        {0x8000000000070000, 0x8000000080000000, 0, QCOW2_INVALID}, /* one pair spoils all */
        {QCOW2_ENTRY_COMPRESSED | 512, 0, 7, QCOW2_COMPRESSED},
        {QCOW2_ENTRY_COMPRESSED | 512, 1, 7, QCOW2_INVALID},
        {0x8000000000050001, ALL, 0, QCOW2_NORMAL}, /* bit 0 means nothing here */
    };
    BDRVQcow2State s = state(3, 16, true, false);
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        Qcow2L2Entry e = entry(cases[i].entry, cases[i].bitmap);
        g_assert_cmpint(qcow2_entry_type(&s, e, cases[i].sc), ==, cases[i].type);
    }
}

/* Runs must agree with the types, one by one. */
static void check_runs(const BDRVQcow2State *s, Qcow2L2Entry e)
{
    for (unsigned sc = 0; sc < s->subclusters_per_cluster; sc++) {
        Qcow2ClusterType type;
        unsigned n = qcow2_entry_run(s, e, sc, &type);
        g_assert_cmpuint(n, >=, 1);
        g_assert_cmpuint(sc + n, <=, s->subclusters_per_cluster);
        for (unsigned i = sc; i < sc + n; i++) {
            g_assert_cmpint(qcow2_entry_type(s, e, i), ==, type);
        }
        if (sc + n < s->subclusters_per_cluster) {
            g_assert_cmpint(qcow2_entry_type(s, e, sc + n), !=, type);
        }
    }
}

static void test_runs(void)
{
    BDRVQcow2State s = state(3, 16, true, false);
    check_runs(&s, entry(0, 0));
    check_runs(&s, entry(0, ZERO_ALL));
    check_runs(&s, entry(QCOW2_ENTRY_COMPRESSED | 512, 0));
    for (int i = 0; i < 1000; i++) {
        uint64_t alloc = (uint32_t)g_test_rand_int();
        uint64_t zero = (uint32_t)g_test_rand_int() & ~alloc;
        check_runs(&s, entry(QCOW2_ENTRY_COPIED | 0x50000, zero << 32 | alloc));
        check_runs(&s, entry(0, zero << 32));
    }
}

/* Where the alike ones end, entry by entry. */
static unsigned count_alike(const BDRVQcow2State *s, const uint8_t *table, unsigned i, unsigned end)
{
    Qcow2L2Entry e = qcow2_entry_decode(s, table + i * s->l2_entry_size);
    uint64_t step = qcow2_entry_host(e) || s->has_data_file ? s->cluster_size : 0;
    unsigned n = 1;
    for (; i + n < end; n++) {
        Qcow2L2Entry next = qcow2_entry_decode(s, table + (i + n) * s->l2_entry_size);
        if (next.entry != e.entry + n * step || next.bitmap != e.bitmap) {
            break;
        }
    }
    return n;
}

/* Tables of runs of all lengths, from hosts that are and are not multiples of many clusters. */
static void check_alike(const BDRVQcow2State *s)
{
    enum { ENTRIES = 512 };
    uint8_t table[ENTRIES * 16];
    static const uint64_t bitmaps[] = {0, ALL, ZERO_ALL};
    for (unsigned i = 0, n; i < ENTRIES; i += n) {
        bool host = s->has_data_file || g_test_rand_bit();
        uint64_t cluster = host ? (uint64_t)g_test_rand_int_range(1, 200) : 0;
        uint64_t bitmap = s->has_subclusters ? bitmaps[g_test_rand_int_range(0, 3)] : 0;
        n = (unsigned)g_test_rand_int_range(1, 100);
        n = MIN(n, ENTRIES - i);
        for (unsigned k = i; k < i + n; k++, cluster += host) {
            uint64_t e = cluster << s->cluster_bits | (host ? QCOW2_ENTRY_COPIED : 0);
            qcow2_entry_encode(s, entry(e, bitmap), table + k * s->l2_entry_size);
        }
    }
    for (unsigned i = 0; i < ENTRIES; i++) {
        unsigned end = (unsigned)g_test_rand_int_range((int)i + 1, ENTRIES + 1);
        g_assert_cmpuint(qcow2_entries_alike(s, table + i * s->l2_entry_size, end - i), ==,
                         count_alike(s, table, i, end));
    }
}

static void test_alike(void)
{
    for (unsigned round = 0; round < 200; round++) {
        unsigned bits = (unsigned)g_test_rand_int_range(9, 22);
        BDRVQcow2State s = state(3, bits, bits >= 14 && g_test_rand_bit(), g_test_rand_bit());
        check_alike(&s);
    }
}

/* Hosts that differ in the bits in which those in a row would, and are not in a row. */
static void test_alike_but_for_the_carry(void)
{
    for (unsigned wide = 0; wide < 2; wide++) {
        BDRVQcow2State s = state(3, 16, wide, false);
        for (uint64_t base = 0x100; base < 0x120; base++) {
            uint8_t table[64 * 16];
            for (unsigned k = 0; k < 64; k++) {
                qcow2_entry_encode(&s, entry((base ^ k) << 16, 0), table + k * s.l2_entry_size);
            }
            g_assert_cmpuint(qcow2_entries_alike(&s, table, 64), ==, count_alike(&s, table, 0, 64));
        }
    }
}

/* Behind the last host offset there is none that would continue a run. */
static void test_alike_at_the_end_of_offsets(void)
{
    BDRVQcow2State s = state(3, 16, false, false);
    uint64_t last = QCOW2_ENTRY_OFFSET_MASK & ~UINT64_C(0xffff);
    uint8_t table[64 * 8];
    for (unsigned i = 0; i < 64; i++) {
        qcow2_entry_encode(&s, entry(last + ((uint64_t)i << 16) - (40 << 16), 0), table + i * 8);
    }
    g_assert_cmpuint(qcow2_entries_alike(&s, table, 64), ==, 41);
    g_assert_cmpuint(qcow2_entries_alike(&s, table + 40 * 8, 24), ==, 1);
}

static void test_mapping(void)
{
    BDRVQcow2State s = state(3, 16, true, false);
    Qcow2L2Entry e = entry(0x8000000000050000, 0x0000006000000009);
    Qcow2Mapping m = qcow2_entry_mapping(&s, e, 0x100000 + 7 * 1024, 0x110000);
    g_assert_cmpint(m.type, ==, QCOW2_NORMAL);
    g_assert_cmpuint(m.bytes, ==, 1024);
    g_assert_cmpuint(m.host, ==, 0x50000 + 7 * 1024);
    g_assert_true(m.copied);
    m = qcow2_entry_mapping(&s, e, 0x100000 + 10 * 1024, 0x100000 + 11 * 1024);
    g_assert_cmpint(m.type, ==, QCOW2_ZERO_ALLOC);
    g_assert_cmpuint(m.bytes, ==, 1024);
}

static void test_extend(void)
{
    Qcow2Mapping m = {.guest = 0};
    Qcow2Mapping a = {QCOW2_NORMAL, .guest = 0, .bytes = 512, .host = 4096, .copied = true};
    Qcow2Mapping b = {QCOW2_NORMAL, .guest = 512, .bytes = 512, .host = 4608, .copied = true};
    g_assert_true(qcow2_mapping_extend(&m, &a));
    g_assert_true(qcow2_mapping_extend(&m, &b));
    g_assert_cmpuint(m.bytes, ==, 1024);
    Qcow2Mapping far = {QCOW2_NORMAL, .guest = 1024, .bytes = 512, .host = 9216, .copied = true};
    g_assert_false(qcow2_mapping_extend(&m, &far));
    Qcow2Mapping shared = {.type = QCOW2_NORMAL, .guest = 1024, .bytes = 512, .host = 5120};
    g_assert_false(qcow2_mapping_extend(&m, &shared));
    Qcow2Mapping zero = {.type = QCOW2_ZERO_PLAIN, .guest = 1024, .bytes = 512};
    g_assert_false(qcow2_mapping_extend(&m, &zero));
    g_assert_cmpuint(m.bytes, ==, 1024);
}

/* --- descriptors --- */

static void test_known_descriptors(void)
{
    BDRVQcow2State s = state(3, 16, false, false);
    uint64_t offset;
    uint32_t bytes;
    qcow2_parse_compressed(&s, 0x4E0000000005009E, &offset, &bytes);
    g_assert_cmpuint(offset, ==, 0x5009e);
    g_assert_cmpuint(bytes, ==, 29026);
    qcow2_parse_compressed(&s, 0x4040000000057174, &offset, &bytes);
    g_assert_cmpuint(offset, ==, 0x57174);
    g_assert_cmpuint(bytes, ==, 652);
}

/* For every cluster size: the widest fields come back, and bits for sectors are as many as the
 * format says. */
static void test_descriptors_of_all_sizes(void)
{
    for (unsigned bits = QCOW2_MIN_CLUSTER_BITS; bits <= QCOW2_MAX_CLUSTER_BITS; bits++) {
        BDRVQcow2State s = state(3, bits, false, false);
        unsigned x = 70 - bits;
        uint64_t max_offset = (UINT64_C(1) << x) - 1, sectors = UINT64_C(1) << (bits - 8);
        uint64_t offset;
        uint32_t bytes;
        qcow2_parse_compressed(&s, QCOW2_ENTRY_COMPRESSED | (sectors - 1) << x | max_offset,
                               &offset, &bytes);
        g_assert_cmpuint(offset, ==, max_offset);
        g_assert_cmpuint(bytes, ==, sectors * 512 - 511);
        qcow2_parse_compressed(&s, QCOW2_ENTRY_COMPRESSED, &offset, &bytes);
        g_assert_cmpuint(offset, ==, 0);
        g_assert_cmpuint(bytes, ==, 512);
    }
}

static void test_codec(void)
{
    static const uint8_t raw[16] = {0x80, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0x60, 0, 0, 0, 9};
    for (unsigned bits = QCOW2_MIN_CLUSTER_BITS; bits <= QCOW2_MAX_CLUSTER_BITS; bits++) {
        bool subclusters = bits >= 14;
        BDRVQcow2State s = state(3, bits, subclusters, false);
        uint8_t back[16] = {0};
        Qcow2L2Entry e = qcow2_entry_decode(&s, raw);
        g_assert_cmphex(e.entry, ==, 0x8000000000050000);
        g_assert_cmphex(e.bitmap, ==, subclusters ? 0x0000006000000009 : 0);
        qcow2_entry_encode(&s, e, back);
        g_assert_cmpmem(back, s.l2_entry_size, raw, s.l2_entry_size);
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/qcow2-entry/plain-types", test_plain_types);
    g_test_add_func("/qcow2-entry/data-file-types", test_data_file_types);
    g_test_add_func("/qcow2-entry/copied", test_copied);
    g_test_add_func("/qcow2-entry/extended-types", test_extended_types);
    g_test_add_func("/qcow2-entry/runs", test_runs);
    g_test_add_func("/qcow2-entry/alike", test_alike);
    g_test_add_func("/qcow2-entry/alike-but-for-the-carry", test_alike_but_for_the_carry);
    g_test_add_func("/qcow2-entry/alike-at-the-end-of-offsets", test_alike_at_the_end_of_offsets);
    g_test_add_func("/qcow2-entry/mapping", test_mapping);
    g_test_add_func("/qcow2-entry/extend", test_extend);
    g_test_add_func("/qcow2-entry/known-descriptors", test_known_descriptors);
    g_test_add_func("/qcow2-entry/descriptors-of-all-sizes", test_descriptors_of_all_sizes);
    g_test_add_func("/qcow2-entry/codec", test_codec);
    return g_test_run();
}
