/*
 * QED images under many threads: each owns some clusters, interleaved with those of the others, and
 * writes, zeroes, discards and reads them, while one flushes.  All share tables, the free space
 * and the end of the file.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qed.h"
#include "tests/unit/log-driver.h"

#define CLUSTER 4096
#define THREADS 4
#define CLUSTERS 64   /* of each thread */
#define STRIDE 37     /* from one cluster of a thread to its next */
#define FIRST 384     /* cluster: the border between two tables is at 512 */
#define ROUNDS 1500

static BlockBackend *blk;
static _Atomic(bool) stop;

typedef struct Worker {
    unsigned number;
    guint32 seed;
    uint8_t byte[CLUSTERS]; /* what each cluster holds */
} Worker;

static int64_t place(const Worker *w, unsigned i)
{
    unsigned index = i * STRIDE % (CLUSTERS * THREADS) / THREADS * THREADS + w->number;
    return (int64_t)(FIRST + index) * CLUSTER;
}

static void expect(const Worker *w, unsigned i)
{
    uint8_t buf[CLUSTER], want[CLUSTER];
    memset(want, w->byte[i], sizeof(want));
    g_assert_cmpint(blk_pread(blk, place(w, i), CLUSTER, buf, 0), ==, 0);
    g_assert_cmpmem(buf, CLUSTER, want, CLUSTER);
}

static void write_cluster(Worker *w, unsigned i, uint8_t byte)
{
    uint8_t buf[CLUSTER];
    memset(buf, byte, sizeof(buf));
    g_assert_cmpint(blk_pwrite(blk, place(w, i), CLUSTER / 2, buf, 0), ==, 0);
    g_assert_cmpint(blk_pwrite(blk, place(w, i) + CLUSTER / 2, CLUSTER / 2, buf, 0), ==, 0);
    w->byte[i] = byte;
}

static void *work(void *opaque)
{
    Worker *w = opaque;
    GRand *rand = g_rand_new_with_seed(w->seed);
    for (int round = 0; round < ROUNDS; round++) {
        unsigned i = (unsigned)g_rand_int_range(rand, 0, CLUSTERS / 4) * 4;
        switch (g_rand_int_range(rand, 0, 4)) {
        case 0:
        case 1:
            write_cluster(w, i, (uint8_t)g_rand_int_range(rand, 1, 256));
            break;
        case 2:
            g_assert_cmpint(blk_pdiscard(blk, place(w, i), CLUSTER), ==, 0);
            w->byte[i] = 0;
            break;
        default:
            expect(w, i);
        }
        expect(w, i);
    }
    g_rand_free(rand);
    return NULL;
}

/* Lets what was freed be used again, and looks at everything. */
static void *flush_all_the_time(void *opaque)
{
    while (!atomic_load(&stop)) {
        g_assert_cmpint(blk_flush(blk), ==, 0);
        BDRV_GRAPH_GUARD();
        BdrvStatus st;
        g_assert_cmpint(bdrv_block_status(blk_bs(blk), 0, CLUSTERS * THREADS * CLUSTER, &st), ==,
                        0);
    }
    return NULL;
}

static void open_new_image(void)
{
    g_autoptr(GError) err = NULL;
    g_autoptr(json_t) create = qb_opts_parse("cluster_size=4k,table_size=1,size=4M", NULL, NULL);
    bdrv_img_create("test-log:0", "qed", create, NULL, &err);
    g_assert_no_error(err);
    json_t *options = json_pack("{s:s, s:s, s:s, s:i}", "driver", "qed", "discard", "unmap",
                                "file.driver", "test-log", "file.disk", 0);
    blk = blk_new_open(NULL, options, BDRV_O_RDWR, &err);
    g_assert_no_error(err);
}

static void test_threads(void)
{
    Worker workers[THREADS] = {{0}};
    pthread_t threads[THREADS], flusher;
    open_new_image();
    atomic_store(&stop, false);
    g_assert_cmpint(pthread_create(&flusher, NULL, flush_all_the_time, NULL), ==, 0);
    for (unsigned i = 0; i < THREADS; i++) {
        workers[i].number = i;
        workers[i].seed = (guint32)g_test_rand_int();
        g_assert_cmpint(pthread_create(&threads[i], NULL, work, &workers[i]), ==, 0);
    }
    for (unsigned i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
    }
    atomic_store(&stop, true);
    pthread_join(flusher, NULL);
    for (unsigned i = 0; i < THREADS; i++) {
        for (unsigned k = 0; k < CLUSTERS; k += 4) {
            expect(&workers[i], k);
        }
    }
    BdrvCheckOptions opts = {0};
    BdrvCheckResult result;
    g_assert_true(bdrv_check(blk_bs(blk), &opts, &result, NULL));
    g_assert_cmpuint(result.corruptions + result.check_errors, ==, 0);
    blk_unref(blk);
}

/* All write into one cluster that is not there yet: one of them makes it, none is lost. */
static void *write_sector(void *opaque)
{
    uint8_t buf[512];
    unsigned n = GPOINTER_TO_UINT(opaque);
    memset(buf, (int)n + 1, sizeof(buf));
    for (int64_t cluster = 0; cluster < 40; cluster++) {
        g_assert_cmpint(blk_pwrite(blk, cluster * CLUSTER + n * 512, 512, buf, 0), ==, 0);
    }
    return NULL;
}

static void test_one_cluster(void)
{
    pthread_t threads[THREADS];
    uint8_t buf[512];
    open_new_image();
    for (unsigned i = 0; i < THREADS; i++) {
        pthread_create(&threads[i], NULL, write_sector, GUINT_TO_POINTER(i));
    }
    for (unsigned i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
    }
    for (int64_t k = 0; k < 40 * THREADS; k++) {
        int64_t offset = k / THREADS * CLUSTER + k % THREADS * 512;
        g_assert_cmpint(blk_pread(blk, offset, 512, buf, 0), ==, 0);
        g_assert_cmpuint(buf[0], ==, k % THREADS + 1);
        g_assert_cmpuint(buf[511], ==, k % THREADS + 1);
    }
    blk_unref(blk);
    g_assert_cmpuint(log_disks[0].length, ==, (2 + 1 + 40) * CLUSTER); /* nothing was made twice */
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    log_init();
    g_test_add_func("/qed/threads/own-clusters", test_threads);
    g_test_add_func("/qed/threads/one-cluster", test_one_cluster);
    return log_done(g_test_run());
}
