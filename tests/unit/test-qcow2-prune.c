/*
 * L2 tables that became empty go at the next flush, unless a snapshot has them too, and no store
 * into one that goes is lost.
 *
 * On version 2 a discard leaves entries of 0.
 *
 * SPDX-License-Identifier: MIT
 */
#include "qcow2-rec.h"
#include "block/qcow2-io-int.h"

#define THREADS 4
#define ROUNDS 300

static BlockBackend *open_v2(RecFile **f, const char *opts)
{
    *f = rec_image_new("a", opts, 16 * MIB);
    return rec_open_rw(*f);
}

static uint64_t refcount_of(BlockBackend *blk, uint64_t offset)
{
    uint64_t count;
    BDRV_GRAPH_GUARD();

    g_assert_cmpint(qcow2_get_refcount(blk_bs(blk), offset >> image_state(blk)->cluster_bits,
                                       &count), ==, 0);
    return count;
}

static void discard(BlockBackend *blk, int64_t offset, int64_t bytes)
{
    g_assert_cmpint(blk_pdiscard(blk, offset, bytes), ==, 0);
}

static void test_goes_when_empty(void)
{
    RecFile *f;
    BlockBackend *blk = open_v2(&f, "size=1M,cluster_size=512,compat=0.10");
    uint64_t table;

    image_write(blk, 0, 2 * KIB, 1);
    image_write(blk, 20 * KIB, KIB, 2);
    g_assert_cmpint(blk_flush(blk), ==, 0);
    table = qcow2_l1_get(image_state(blk), 0) & QCOW2_ENTRY_OFFSET_MASK;
    discard(blk, 0, 2 * KIB);
    g_assert_cmpint(blk_flush(blk), ==, 0);
    g_assert_cmphex(qcow2_l1_get(image_state(blk), 0) & QCOW2_ENTRY_OFFSET_MASK, ==, table);
    discard(blk, 20 * KIB, KIB);
    g_assert_cmpint(blk_flush(blk), ==, 0);
    g_assert_cmphex(qcow2_l1_get(image_state(blk), 0), ==, 0);
    g_assert_cmpuint(refcount_of(blk, table), ==, 0);
    image_expect(blk, 0, 32 * KIB, 0);
    image_write(blk, 4 * KIB, KIB, 3);
    blk_unref(blk);
    rec_check(f, false);
    rec_file_free(f);
}

/* Only slices of it are in memory: the rest is looked at, too. */
static void test_goes_from_parts(void)
{
    const Qcow2CacheConfig slices = {.limit = {0, 64 * KIB}, .l2_part = 512};
    RecFile *f;
    BlockBackend *blk = open_v2(&f, "size=1M,cluster_size=4k,compat=0.10");
    BDRVQcow2State *s = image_state(blk);

    image_write(blk, 0, 4 * KIB, 1);
    image_write(blk, 512 * KIB, 4 * KIB, 2);
    g_assert_cmpint(blk_flush(blk), ==, 0);
    uint64_t table = qcow2_l1_get(s, 0) & QCOW2_ENTRY_OFFSET_MASK;
    qcow2_cache_configure(s->cache, &slices);
    discard(blk, 0, 4 * KIB);
    g_assert_cmpint(blk_flush(blk), ==, 0);
    g_assert_cmphex(qcow2_l1_get(s, 0) & QCOW2_ENTRY_OFFSET_MASK, ==, table);
    image_expect(blk, 512 * KIB, 4 * KIB, 2);
    qcow2_cache_trim(s->cache);
    discard(blk, 512 * KIB, 4 * KIB);
    g_assert_null(qcow2_cache_peek(s->cache, QCOW2_TABLE_L2, table));
    g_assert_cmpint(blk_flush(blk), ==, 0);
    g_assert_cmphex(qcow2_l1_get(s, 0), ==, 0);
    g_assert_cmpuint(refcount_of(blk, table), ==, 0);
    blk_unref(blk);
    rec_check(f, false);
    rec_file_free(f);
}

static void test_stays_in_snapshot(void)
{
    GError *err = NULL;
    RecFile *f;
    BlockBackend *blk = open_v2(&f, "size=1M,cluster_size=512,compat=0.10");

    image_write(blk, 0, KIB, 1);
    g_assert_true(bdrv_snapshot_create(blk_bs(blk), "s", &err));
    discard(blk, 0, KIB);
    g_assert_cmpint(blk_flush(blk), ==, 0);
    g_assert_cmphex(qcow2_l1_get(image_state(blk), 0), ==, 0); /* the copy that the discard made */
    image_expect(blk, 0, KIB, 0);
    g_assert_true(bdrv_snapshot_apply(blk_bs(blk), "s", &err));
    image_expect(blk, 0, KIB, 1);
    blk_unref(blk);
    rec_check(f, false);
    rec_file_free(f);
}

/* --- stores into a table that is about to go --- */

typedef struct Worker {
    BlockBackend *blk;
    int64_t offset;
    pthread_t thread;
} Worker;

static _Atomic(bool) stop;

static void *write_and_discard(void *opaque)
{
    const Worker *w = opaque;

    for (int i = 0; i < ROUNDS; i++) {
        image_write(w->blk, w->offset, KIB, i % 255 + 1);
        image_expect(w->blk, w->offset, KIB, i % 255 + 1);
        discard(w->blk, w->offset, KIB);
        image_expect(w->blk, w->offset, KIB, 0);
    }
    return NULL;
}

static void *flush_always(void *opaque)
{
    while (!stop) {
        g_assert_cmpint(blk_flush(opaque), ==, 0);
    }
    return NULL;
}

static void test_no_store_is_lost(void)
{
    RecFile *f;
    BlockBackend *blk = open_v2(&f, "size=1M,cluster_size=1k,compat=0.10");
    Worker workers[THREADS];
    pthread_t flusher;

    g_assert_true(qb_thread_start(&flusher, "flush", flush_always, blk));
    for (int i = 0; i < THREADS; i++) { /* all in one table */
        workers[i] = (Worker){.blk = blk, .offset = i * 8 * KIB};
        g_assert_true(qb_thread_start(&workers[i].thread, "worker", write_and_discard,
                                      &workers[i]));
    }
    for (int i = 0; i < THREADS; i++) {
        pthread_join(workers[i].thread, NULL);
    }
    stop = true;
    pthread_join(flusher, NULL);
    g_assert_cmpint(blk_flush(blk), ==, 0);
    g_assert_cmphex(qcow2_l1_get(image_state(blk), 0), ==, 0);
    blk_unref(blk);
    rec_check(f, false);
    rec_file_free(f);
}

/* Who has seen L1 name a table that went before it was ever written finds no corruption; where L1
 * still names what lies outside the file, it does. */
static void test_unwritten_table_is_gone(void)
{
    RecFile *f;
    BlockBackend *blk = open_v2(&f, "size=1M,cluster_size=512,compat=0.10");
    BDRVQcow2State *s = image_state(blk);
    uint64_t beyond = 64 * MIB | QCOW2_ENTRY_COPIED;
    Qcow2Table *t = NULL;

    bdrv_graph_rdlock();
    g_assert_cmpint(qcow2_pin_entries(blk_bs(blk), 0, beyond, (Qcow2EntryRange){0, 1}, &t), ==,
                    QCOW2_STALE);
    g_assert_null(t);
    g_assert_false(atomic_load(&s->corrupt));
    qb_mutex_lock(&s->lock);
    qcow2_l1_set_locked(s, 0, beyond);
    qb_mutex_unlock(&s->lock);
    g_assert_cmpint(qcow2_pin_entries(blk_bs(blk), 0, beyond, (Qcow2EntryRange){0, 1}, &t), ==, -EIO);
    g_assert_true(atomic_load(&s->corrupt));
    bdrv_graph_rdunlock();
    blk_unref(blk);
    rec_file_free(f);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    rec_setup();
    g_test_add_func("/qcow2-prune/goes-when-empty", test_goes_when_empty);
    g_test_add_func("/qcow2-prune/goes-from-parts", test_goes_from_parts);
    g_test_add_func("/qcow2-prune/stays-in-snapshot", test_stays_in_snapshot);
    g_test_add_func("/qcow2-prune/no-store-is-lost", test_no_store_is_lost);
    g_test_add_func("/qcow2-prune/unwritten-table-is-gone", test_unwritten_table_is_gone);
    int ret = g_test_run();
    image_teardown();
    return ret;
}
