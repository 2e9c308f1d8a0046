/*
 * The codec of the snapshot table: bytes, kept extra data, limits.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2.h"

#include <string.h>

static Qcow2Snapshot make(const char *id, const char *name)
{
    return (Qcow2Snapshot){
        .l1_offset = 0x50000,
        .l1_size = 3,
        .id = g_strdup(id),
        .name = g_strdup(name),
        .date_sec = 1700000000,
        .date_nsec = 5,
        .vm_clock_nsec = 7,
        .vm_state_size = 9,
        .disk_size = 1 << 20,
        .icount = 11,
        .extra_size = QCOW2_SNAPSHOT_EXTRA_KNOWN,
    };
}

static void append(GArray *list, Qcow2Snapshot sn)
{
    g_array_append_val(list, sn);
}

static void test_bytes(void)
{
    static const uint8_t expected[] = {
        0, 0, 0, 0, 0, 5, 0, 0,  0, 0, 0, 3,  0, 1, 0, 2,  0x65, 0x53, 0xf1, 0,  0, 0, 0, 5,
        0, 0, 0, 0, 0, 0, 0, 7,  0, 0, 0, 9,  0, 0, 0, 24,
        0, 0, 0, 0, 0, 0, 0, 9,  0, 0, 0, 0, 0, 0x10, 0, 0,  0, 0, 0, 0, 0, 0, 0, 11,
        '1', 's', '1',
    };
    g_autoptr(GArray) list = qcow2_snapshots_new();
    size_t bytes;
    append(list, make("1", "s1"));
    g_autofree uint8_t *table = qcow2_snapshots_encode(list, 3, &bytes, NULL);
    g_assert_cmpmem(table, bytes, expected, sizeof(expected));
}

static void assert_same(const Qcow2Snapshot *a, const Qcow2Snapshot *b)
{
    g_assert_cmphex(a->l1_offset, ==, b->l1_offset);
    g_assert_cmpuint(a->l1_size, ==, b->l1_size);
    g_assert_cmpstr(a->id, ==, b->id);
    g_assert_cmpstr(a->name, ==, b->name);
    g_assert_cmpuint(a->date_sec, ==, b->date_sec);
    g_assert_cmpuint(a->date_nsec, ==, b->date_nsec);
    g_assert_cmpuint(a->vm_clock_nsec, ==, b->vm_clock_nsec);
    g_assert_cmpuint(a->vm_state_size, ==, b->vm_state_size);
    g_assert_cmpuint(a->disk_size, ==, b->disk_size);
    g_assert_cmpuint(a->icount, ==, b->icount);
}

/* Entries begin at multiples of 8, whatever the length of the one before. */
static void test_roundtrip(void)
{
    g_autoptr(GArray) list = qcow2_snapshots_new();
    size_t bytes, pos = 0;
    append(list, make("1", ""));
    append(list, make("2", "a name of some length"));
    append(list, make("17", "x"));
    g_array_index(list, Qcow2Snapshot, 1).vm_state_size = UINT64_C(1) << 33;
    g_autofree uint8_t *table = qcow2_snapshots_encode(list, 3, &bytes, NULL);
    for (guint i = 0; i < list->len; i++) {
        Qcow2Snapshot sn;
        size_t used;
        pos = qb_align_up(pos, 8);
        g_assert_true(qcow2_snapshot_decode(table + pos, bytes - pos, 0, &sn, &used, NULL));
        assert_same(&g_array_index(list, Qcow2Snapshot, i), &sn);
        g_assert_cmpuint(qb_ldbe32(table + pos + 32), ==, i == 1 ? 0 : 9); /* 32 bits are few */
        qcow2_snapshot_clear(&sn);
        pos += used;
    }
    g_assert_cmpuint(pos, ==, bytes);
}

/* An entry with @extra bytes of extra data, all 0xab. */
static uint8_t *entry_with_extra(uint32_t extra, size_t *ret_len)
{
    uint8_t *buf = g_malloc0(40 + extra + 3);
    qb_stbe16(buf + 12, 1);
    qb_stbe16(buf + 14, 2);
    qb_stbe32(buf + 32, 1234);
    qb_stbe32(buf + 36, extra);
    memset(buf + 40, 0xab, extra);
    memcpy(buf + 40 + extra, "7nm", 3);
    *ret_len = 40 + extra + 3;
    return buf;
}

static void assert_extra(uint32_t extra, uint64_t vm_state, uint64_t disk, uint64_t icount)
{
    Qcow2Snapshot sn;
    size_t len, used;
    g_autofree uint8_t *buf = entry_with_extra(extra, &len);
    g_assert_true(qcow2_snapshot_decode(buf, len, 4096, &sn, &used, NULL));
    g_assert_cmpuint(used, ==, len);
    g_assert_cmphex(sn.vm_state_size, ==, vm_state);
    g_assert_cmphex(sn.disk_size, ==, disk);
    g_assert_cmphex(sn.icount, ==, icount);
    g_assert_cmpstr(sn.id, ==, "7");
    g_assert_cmpstr(sn.name, ==, "nm");
    qcow2_snapshot_clear(&sn);
}

static void test_extra_fields(void)
{
    const uint64_t ab = UINT64_C(0xabababababababab);
    assert_extra(0, 1234, 4096, UINT64_MAX);
    assert_extra(7, 1234, 4096, UINT64_MAX);
    assert_extra(8, ab, 4096, UINT64_MAX);
    assert_extra(16, ab, ab, UINT64_MAX);
    assert_extra(24, ab, ab, ab);
    assert_extra(1024, ab, ab, ab);
}

static void test_unknown_extra_is_kept(void)
{
    g_autoptr(GArray) list = qcow2_snapshots_new();
    Qcow2Snapshot sn;
    size_t len, used, bytes;
    g_autofree uint8_t *buf = entry_with_extra(40, &len);
    g_assert_true(qcow2_snapshot_decode(buf, len, 4096, &sn, &used, NULL));
    append(list, sn);
    g_autoptr(GArray) copy = qcow2_snapshots_dup(list);
    g_autofree uint8_t *table = qcow2_snapshots_encode(copy, 3, &bytes, NULL);
    g_assert_cmpuint(bytes, ==, len);
    g_assert_cmpmem(table + 64, 16, buf + 64, 16);
    g_assert_cmpuint(qb_ldbe32(table + 36), ==, 40);
}

/* An entry comes back as it was, however much extra data it has; version 3 asks for some. */
static void test_entries_are_kept(void)
{
    static const uint32_t sizes[] = {0, 1, 7, 8, 9, 16, 17, 23, 24, 25, 32, 100, 1024};
    for (guint i = 0; i < G_N_ELEMENTS(sizes) * 2; i++) {
        uint32_t extra = sizes[i / 2];
        int version = 2 + (int)i % 2;
        g_autoptr(GArray) list = qcow2_snapshots_new();
        Qcow2Snapshot sn;
        size_t len, used, bytes;
        g_autofree uint8_t *buf = entry_with_extra(extra, &len);
        if (extra >= 8) {
            qb_stbe64(buf + 40, 1234);
        }
        g_assert_true(qcow2_snapshot_decode(buf, len, 4096, &sn, &used, NULL));
        append(list, sn);
        g_autofree uint8_t *table = qcow2_snapshots_encode(list, version, &bytes, NULL);
        if (version == 2 || extra >= 16) {
            g_assert_cmpmem(table, bytes, buf, len);
        } else {
            g_assert_cmpuint(qb_ldbe32(table + 36), ==, 16);
            g_assert_cmpuint(qb_ldbe64(table + 48), ==, 4096);
        }
    }
}

static void assert_refused(const uint8_t *buf, size_t len, int code, const char *text)
{
    g_autoptr(GError) err = NULL;
    Qcow2Snapshot sn;
    size_t used;
    g_assert_false(qcow2_snapshot_decode(buf, len, 0, &sn, &used, &err));
    g_assert_error(err, QB_ERROR, code);
    g_assert_cmpstr(err->message, ==, text);
}

static void test_limits(void)
{
    size_t len;
    g_autofree uint8_t *buf = entry_with_extra(24, &len);
    assert_refused(buf, 0, EINVAL, "Snapshot table entry is cut off");
    assert_refused(buf, 39, EINVAL, "Snapshot table entry is cut off");
    assert_refused(buf, len - 1, EINVAL, "Snapshot table entry is cut off");
    qb_stbe32(buf + 36, 1025);
    assert_refused(buf, len, EFBIG, "Too much extra metadata in snapshot table entry");
    qb_stbe32(buf + 36, UINT32_MAX);
    assert_refused(buf, len, EFBIG, "Too much extra metadata in snapshot table entry");
}

/* 1100 entries with names of 64 KiB are more than 64 MiB. */
static void test_table_limit(void)
{
    g_autoptr(GArray) list = qcow2_snapshots_new();
    g_autoptr(GError) err = NULL;
    g_autofree char *name = g_strnfill(UINT16_MAX, 'n');
    size_t bytes;
    for (int i = 0; i < 1020; i++) {
        append(list, make("1", name));
    }
    g_autofree uint8_t *table = qcow2_snapshots_encode(list, 3, &bytes, NULL);
    g_assert_nonnull(table);
    for (int i = 0; i < 80; i++) {
        append(list, make("1", name));
    }
    g_assert_null(qcow2_snapshots_encode(list, 3, &bytes, &err));
    g_assert_error(err, QB_ERROR, EFBIG);
    g_assert_cmpstr(err->message, ==, "Snapshot table too large");
}

static void test_empty(void)
{
    g_autoptr(GArray) list = qcow2_snapshots_new();
    size_t bytes = 77;
    g_autofree uint8_t *table = qcow2_snapshots_encode(list, 2, &bytes, NULL);
    g_assert_nonnull(table);
    g_assert_cmpuint(bytes, ==, 0);
}

/* ---------------------------------------------------------------- sets of runs */

static GArray *runs(const char *text)
{
    GArray *list = g_array_new(false, false, sizeof(Qcow2HostRun));
    for (; *text; text++) { /* each letter is a cluster of 512 bytes, a = 1 */
        Qcow2HostRun run = {(uint64_t)(*text - 'a' + 1) * 512, 512};
        g_array_append_val(list, run);
    }
    return list;
}

static char *letters(const GArray *list)
{
    GString *text = g_string_new("");
    for (guint i = 0; i < list->len; i++) {
        const Qcow2HostRun *run = &g_array_index(list, Qcow2HostRun, i);
        for (uint64_t pos = 0; pos < run->bytes; pos += 512) {
            g_string_append_c(text, (char)('a' + (run->offset + pos) / 512 - 1));
        }
    }
    return g_string_free(text, false);
}

static void assert_difference(const char *from, const char *to, const char *up, const char *down)
{
    const BDRVQcow2State s = {.cluster_size = 512};
    g_autoptr(GArray) a = runs(from), b = runs(to), ret_up = runs(""), ret_down = runs("");
    qcow2_runs_difference(&s, a, b, ret_up, ret_down);
    g_autofree char *got_up = letters(ret_up), *got_down = letters(ret_down);
    g_assert_cmpstr(got_up, ==, up);
    g_assert_cmpstr(got_down, ==, down);
}

static void test_difference(void)
{
    assert_difference("", "", "", "");
    assert_difference("abc", "abc", "", "");
    assert_difference("", "cab", "abc", "");
    assert_difference("abc", "", "", "abc");
    assert_difference("abc", "bcd", "d", "a");
    assert_difference("aab", "abb", "b", "a"); /* shared by several streams */
    assert_difference("aaa", "a", "", "aa");
    assert_difference("zxy", "zzzx", "zz", "y");
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/qcow2/snapshot-table/bytes", test_bytes);
    g_test_add_func("/qcow2/snapshot-table/roundtrip", test_roundtrip);
    g_test_add_func("/qcow2/snapshot-table/extra-fields", test_extra_fields);
    g_test_add_func("/qcow2/snapshot-table/unknown-extra", test_unknown_extra_is_kept);
    g_test_add_func("/qcow2/snapshot-table/entries-are-kept", test_entries_are_kept);
    g_test_add_func("/qcow2/snapshot-table/limits", test_limits);
    g_test_add_func("/qcow2/snapshot-table/table-limit", test_table_limit);
    g_test_add_func("/qcow2/snapshot-table/empty", test_empty);
    g_test_add_func("/qcow2/tree/difference", test_difference);
    return g_test_run();
}
