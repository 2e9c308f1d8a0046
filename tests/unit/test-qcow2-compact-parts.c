/*
 * A shrink makes the file short where bitmaps and snapshots lie at its end: they move, and say what
 * they said before.  Crashes and errors in between are the crash and fault suites' (operations
 * "shrink-moves-parts", "shrink-moves-snapshots").
 *
 * SPDX-License-Identifier: MIT
 */
#include "qcow2-rec.h"

#include "block/qcow2-bitmap.h"
#include "block/qcow2-compact.h"

enum { CAPACITY = 64 * MIB, HALF = 4 * MIB };

static void shrink(BlockBackend *blk)
{
    GError *err = NULL;
    bool ok = blk_truncate(blk, HALF, true, PREALLOC_MODE_OFF, false, &err);
    g_assert_no_error(err);
    g_assert_true(ok);
}

static void add_bitmap(BlockBackend *blk, const char *name)
{
    GError *err = NULL;
    g_assert_true(bdrv_bitmap_add(blk_bs(blk), name, 512, true, false, &err));
}

/* An image whose second half comes first in the file. */
static RecFile *turned_image(const char *opts)
{
    g_autofree char *all = g_strdup_printf("size=8M%s", opts);
    RecFile *f = rec_image_new("a", all, CAPACITY);
    BlockBackend *blk = rec_open_rw(f);
    image_write(blk, HALF, HALF, 2);
    image_write(blk, 0, 64 * KIB, 1);
    blk_unref(blk);
    return f;
}

/* Bits here and there, in runs of different length. */
static void scatter(BlockBackend *blk, int value)
{
    for (int i = 0; i < 60; i++) {
        image_write(blk, i * 64 * KIB + 512 * i, 512 * (1 + i % 5), value);
    }
}

/* The dirty extents of the disk's first half, as text. */
static char *bits_of(BlockBackend *blk, const char *name)
{
    g_autoptr(GString) text = g_string_new(NULL);
    int64_t at = 0, start, bytes;
    while (bdrv_bitmap_next_dirty(blk_bs(blk), name, at, &start, &bytes) == 1 && start < HALF) {
        at = start + bytes;
        g_string_append_printf(text, "%" PRId64 "+%" PRId64 " ", start, MIN(bytes, HALF - start));
    }
    return g_strdup(text->str);
}

static void expect_bits(BlockBackend *blk, const char *name, const char *expected)
{
    g_autofree char *found = bits_of(blk, name);
    g_assert_cmpstr(found, ==, expected);
}

static uint64_t directory_of(BlockBackend *blk)
{
    return atomic_load(&image_state(blk)->bitmaps->dir_offset);
}

static void check_and_free(RecFile *f, BlockBackend *blk)
{
    blk_unref(blk);
    rec_check(f, false);
    rec_file_free(f);
}

/* ---------------------------------------------------------------- */

/*      0 .--> 1 --> 2, 3
 *        '--> 4 --> 5            10 to 13: behind the end  */
static void test_taken_along(void)
{
    static const Qcow2Part all[] = {
        {1, 2, 0}, {3, 4, 0}, {10, 8, 1}, {5, 16, 1}, {6, 32, 0}, {7, 64, 4},
    };
    g_autoptr(GArray) parts = g_array_new(false, false, sizeof(Qcow2Part));
    g_assert_cmpuint(qcow2_parts_taken_along(parts, 0), ==, 0);
    g_array_append_vals(parts, all, G_N_ELEMENTS(all));
    g_assert_cmpuint(qcow2_parts_taken_along(parts, 11), ==, 0);
    g_assert_cmpuint(qcow2_parts_taken_along(parts, 10), ==, 2 + 4);
    g_assert_cmpuint(qcow2_parts_taken_along(parts, 7), ==, 2 + 4 + 32);
    g_assert_cmpuint(qcow2_parts_taken_along(parts, 2), ==, 2);
    g_assert_cmpuint(qcow2_parts_taken_along(parts, 1), ==, 0);
}

/* Stores two bitmaps with the same bits, which it returns. */
static char *store_two_bitmaps(RecFile *f)
{
    BlockBackend *blk = rec_open_rw(f);
    add_bitmap(blk, "one");
    add_bitmap(blk, "two");
    scatter(blk, 3);
    char *bits = bits_of(blk, "one");
    blk_unref(blk);
    return bits;
}

static void check_bitmaps(const char *opts)
{
    RecFile *f = turned_image(opts);
    g_autofree char *before = store_two_bitmaps(f);
    BlockBackend *blk = rec_open_rw(f); /* bits are not read yet */
    uint64_t directory = directory_of(blk);
    int64_t length = f->length;
    unsigned flushes = f->count[REC_FLUSH];
    shrink(blk);
    g_assert_cmpuint(f->count[REC_FLUSH] - flushes, <=, 6 + 2 + 3); /* data move, and bitmaps */
    g_assert_cmpuint(directory_of(blk), <, directory);
    g_assert_cmpint(f->length, <, length * 3 / 4);
    expect_bits(blk, "one", before);
    image_write(blk, 2 * MIB, MIB, 4); /* and the next store finds what moved */
    g_autofree char *after = bits_of(blk, "two");
    g_assert_cmpstr(after, !=, before);
    blk_unref(blk);
    blk = rec_open_rw(f);
    expect_bits(blk, "one", after);
    expect_bits(blk, "two", after);
    image_expect(blk, 2 * MIB, MIB, 4);
    check_and_free(f, blk);
}

/* With small clusters tables have several of them, and bits have many. */
static void test_bitmaps(void)
{
    check_bitmaps("");
    check_bitmaps(",cluster_size=4k");
    check_bitmaps(",cluster_size=512");
    check_bitmaps(",cluster_size=2k,refcount_bits=1");
    check_bitmaps(",cluster_size=16k,extended_l2=on");
}

/* Directory and tables lie in front: they are written anew because bits move. */
static void test_bits_only(void)
{
    RecFile *f = rec_image_new("a", "size=8M,cluster_size=4k", CAPACITY);
    BlockBackend *blk = rec_open_rw(f);
    add_bitmap(blk, "one");
    image_write(blk, HALF, HALF, 2);
    scatter(blk, 3);
    g_autofree char *before = bits_of(blk, "one");
    blk_unref(blk);
    blk = rec_open_rw(f);
    int64_t length = f->length;
    shrink(blk);
    g_assert_cmpint(f->length, <, length / 2);
    expect_bits(blk, "one", before);
    blk_unref(blk);
    blk = rec_open_rw(f);
    expect_bits(blk, "one", before);
    check_and_free(f, blk);
}

/* The bytes of what the tables in the file name, entry after entry; "-": no cluster. */
static GBytes *stored_bits(const RecFile *f, BlockBackend *blk)
{
    const BDRVQcow2State *s = image_state(blk);
    GByteArray *all = g_byte_array_new();
    for (guint i = 0; i < s->bitmaps->all->len; i++) {
        const Qcow2Bitmap *q = g_ptr_array_index(s->bitmaps->all, i);
        const uint8_t *table = f->data + qcow2_bitmap_table_offset(q);
        for (uint32_t k = 0; k < qcow2_bitmap_table_entries(q); k++) {
            uint64_t offset = qb_ldbe64(table + k * 8) & QCOW2_BITMAP_ENTRY_OFFSET_MASK;
            g_byte_array_append(all, offset ? f->data + offset : (const uint8_t *)"-",
                                offset ? (guint)s->cluster_size : 1);
        }
    }
    return g_byte_array_free_to_bytes(all);
}

static bool is_inconsistent(BlockBackend *blk, const char *name)
{
    g_autoptr(GArray) list = bdrv_bitmap_list(blk_bs(blk));
    for (guint i = 0; i < list->len; i++) {
        const BdrvBitmapInfo *info = &g_array_index(list, BdrvBitmapInfo, i);
        if (!strcmp(info->name, name)) {
            return info->inconsistent;
        }
    }
    g_assert_not_reached();
}

/* One that somebody left IN_USE moves like the others, and nobody touches what it says. */
static void test_inconsistent(void)
{
    RecFile *f = turned_image(",cluster_size=4k");
    BlockBackend *blk = rec_open_rw(f);
    add_bitmap(blk, "one");
    scatter(blk, 3);
    blk_unref(blk);
    blk = rec_open_rw(f);
    image_write(blk, 3 * MIB, 4 * KIB, 4);
    g_assert_cmpint(blk_flush(blk), ==, 0);
    RecFile *crashed = rec_file_dup("b", f);
    check_and_free(f, blk);
    blk = rec_open_rw(crashed);
    g_assert_true(is_inconsistent(blk, "one"));
    g_autoptr(GBytes) before = stored_bits(crashed, blk);
    uint64_t directory = directory_of(blk);
    shrink(blk);
    g_assert_cmpuint(directory_of(blk), <, directory);
    g_assert_cmpint(crashed->length, <, HALF + MIB);
    g_autoptr(GBytes) after = stored_bits(crashed, blk);
    g_assert_true(g_bytes_equal(before, after));
    blk_unref(blk);
    blk = rec_open_rw(crashed);
    g_assert_true(is_inconsistent(blk, "one"));
    g_autoptr(GBytes) last = stored_bits(crashed, blk);
    g_assert_true(g_bytes_equal(before, last));
    check_and_free(crashed, blk);
}

/* The last of the entries has a flag that nobody knows: its table and bits stay, and so does the
 * end of the file; the image is as good as before. */
static void test_broken(void)
{
    RecFile *f = turned_image("");
    BlockBackend *blk = rec_open_rw(f);
    add_bitmap(blk, "one");
    add_bitmap(blk, "two");
    scatter(blk, 3);
    const Qcow2Bitmap *q = g_ptr_array_index(image_state(blk)->bitmaps->all, 1);
    uint64_t flags = directory_of(blk) + q->pos + QCOW2_BITMAP_FLAGS;
    g_autofree char *before = bits_of(blk, "one");
    blk_unref(blk);
    f->data[flags] |= 0x40;
    blk = rec_open_rw(f);
    q = g_ptr_array_index(image_state(blk)->bitmaps->all, 1);
    g_assert_true(q->broken);
    uint64_t table = qcow2_bitmap_table_offset(q);
    shrink(blk);
    g_assert_cmpuint(qcow2_bitmap_table_offset(q), ==, table);
    expect_bits(blk, "one", before);
    blk_unref(blk);
    rec_file_free(f);
}

/* ---------------------------------------------------------------- snapshots */

static void take_snapshot(BlockBackend *blk, const char *name)
{
    GError *err = NULL;
    g_assert_true(bdrv_snapshot_create(blk_bs(blk), name, &err));
}

/* A snapshot that is deleted leaves room in front; behind it lie the L2 table, L1 and table of one that
 * stays. */
static void check_snapshots(const char *opts)
{
    GError *err = NULL;
    RecFile *f = turned_image(opts);
    BlockBackend *blk = rec_open_rw(f);
    take_snapshot(blk, "first");
    g_assert_cmpint(blk_pdiscard(blk, HALF, HALF), ==, 0);
    image_write(blk, MIB, 64 * KIB, 3);
    take_snapshot(blk, "last");
    image_write(blk, MIB, 64 * KIB, 4);
    g_assert_true(bdrv_snapshot_delete(blk_bs(blk), NULL, "first", &err));
    int64_t length = f->length;
    g_assert_cmpint(length, >, HALF);
    unsigned flushes = f->count[REC_FLUSH];
    shrink(blk);
    g_assert_cmpuint(f->count[REC_FLUSH] - flushes, <=, 6 + 2 + 3);
    g_assert_cmpint(f->length, <, MIB);
    image_expect(blk, 0, 64 * KIB, 1);
    image_expect(blk, MIB, 64 * KIB, 4);
    blk_unref(blk);
    blk = rec_open_rw(f);
    g_assert_true(bdrv_snapshot_apply(blk_bs(blk), "last", &err));
    image_expect(blk, 0, 64 * KIB, 1);
    image_expect(blk, MIB, 64 * KIB, 3);
    image_expect(blk, HALF, HALF, 0);
    g_assert_true(bdrv_snapshot_delete(blk_bs(blk), NULL, "last", &err));
    check_and_free(f, blk);
}

static void test_snapshots(void)
{
    check_snapshots("");
    check_snapshots(",cluster_size=4k");
    check_snapshots(",cluster_size=16k,extended_l2=on");
}

/* ---------------------------------------------------------------- who is there meanwhile */

typedef struct Busy {
    BlockBackend *blk;
    const char *expected;
    _Atomic(bool) stop;
} Busy;

static void *read_bits(void *opaque)
{
    Busy *r = opaque;
    while (!r->stop) {
        expect_bits(r->blk, "one", r->expected);
        expect_bits(r->blk, "two", r->expected);
    }
    return NULL;
}

/* Where bits are set already. */
static void *overwrite(void *opaque)
{
    Busy *r = opaque;
    for (int value = 4; !r->stop; value = 4 + value % 100) {
        image_write(r->blk, 4 * 64 * KIB + 512 * 4, 512 * 5, value);
    }
    return NULL;
}

static void test_busy(void)
{
    static void *(*const all[])(void *) = {read_bits, overwrite, read_bits};
    for (int round = 0; round < 4; round++) {
        pthread_t threads[G_N_ELEMENTS(all)];
        RecFile *f = turned_image(",cluster_size=512");
        g_autofree char *before = store_two_bitmaps(f);
        Busy r = {.blk = rec_open_rw(f), .expected = before};
        f->read_us = 100;
        f->flush_us = 500;
        for (guint i = 0; i < G_N_ELEMENTS(all); i++) {
            g_assert_true(qb_thread_start(&threads[i], "busy", all[i], &r));
        }
        shrink(r.blk);
        r.stop = true;
        for (guint i = 0; i < G_N_ELEMENTS(all); i++) {
            pthread_join(threads[i], NULL);
        }
        f->read_us = f->flush_us = 0;
        expect_bits(r.blk, "two", before);
        check_and_free(f, r.blk);
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    rec_setup();
    g_test_add_func("/qcow2-compact-parts/taken-along", test_taken_along);
    g_test_add_func("/qcow2-compact-parts/bitmaps", test_bitmaps);
    g_test_add_func("/qcow2-compact-parts/bits-only", test_bits_only);
    g_test_add_func("/qcow2-compact-parts/inconsistent", test_inconsistent);
    g_test_add_func("/qcow2-compact-parts/broken", test_broken);
    g_test_add_func("/qcow2-compact-parts/snapshots", test_snapshots);
    g_test_add_func("/qcow2-compact-parts/busy", test_busy);
    int ret = g_test_run();
    image_teardown();
    return ret;
}
