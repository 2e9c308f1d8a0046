/*
 * The graph lock: exclusion, nesting, loans, and many threads at once.
 *
 * The stress test lets writers change two plain variables that readers must always see equal; with
 * the thread sanitizer it also proves that the lock orders the accesses.
 *
 * SPDX-License-Identifier: MIT
 */
#undef NDEBUG
#include <glib.h>
#include <unistd.h>
#include "block/locks.h"

static void test_nesting(void)
{
    g_assert_false(bdrv_graph_held());
    bdrv_graph_rdlock();
    bdrv_graph_rdlock();
    g_assert_true(bdrv_graph_held());
    bdrv_graph_rdunlock();
    g_assert_true(bdrv_graph_held());
    bdrv_graph_rdunlock();
    g_assert_false(bdrv_graph_held());
    {
        BDRV_GRAPH_GUARD();
        g_assert_true(bdrv_graph_held());
    }
    g_assert_false(bdrv_graph_held());
}

static void test_exclusive_nests_shared(void)
{
    bdrv_graph_wrlock();
    g_assert_true(bdrv_graph_held());
    bdrv_graph_rdlock();
    bdrv_graph_rdunlock();
    g_assert_true(bdrv_graph_held());
    bdrv_graph_wrunlock();
    g_assert_false(bdrv_graph_held());
}

typedef struct Flagged {
    _Atomic(bool) begun, done;
} Flagged;

static void *write_once(void *opaque)
{
    Flagged *f = opaque;
    atomic_store(&f->begun, true);
    bdrv_graph_wrlock();
    atomic_store(&f->done, true);
    bdrv_graph_wrunlock();
    return NULL;
}

static void wait_for(_Atomic(bool) *flag)
{
    while (!atomic_load(flag)) {
        usleep(1000);
    }
}

/* A waiting writer stops new outermost entries, but neither nested ones nor loans. */
static void *borrow_and_enter(void *opaque)
{
    Flagged *f = opaque;
    bdrv_graph_borrow();
    g_assert_true(bdrv_graph_held());
    bdrv_graph_rdlock();
    bdrv_graph_rdlock();
    bdrv_graph_rdunlock();
    bdrv_graph_rdunlock();
    g_assert_true(bdrv_graph_held());
    bdrv_graph_return();
    g_assert_false(bdrv_graph_held());
    atomic_store(&f->done, true);
    return NULL;
}

static void test_writer_waits_for_reader(void)
{
    Flagged w = {false, false}, b = {false, false};
    pthread_t writer, borrower;
    bdrv_graph_rdlock();
    g_assert_true(qb_thread_start(&writer, "writer", write_once, &w));
    wait_for(&w.begun);
    usleep(20000);
    g_assert_false(atomic_load(&w.done));
    bdrv_graph_rdlock(); /* nested: does not wait */
    g_assert_true(qb_thread_start(&borrower, "borrower", borrow_and_enter, &b));
    pthread_join(borrower, NULL);
    g_assert_true(atomic_load(&b.done));
    bdrv_graph_rdunlock();
    g_assert_false(atomic_load(&w.done));
    bdrv_graph_rdunlock();
    pthread_join(writer, NULL);
    g_assert_true(atomic_load(&w.done));
}

/* A loan taken by a thread that has an entry of its own, as when no worker can be started. */
static void test_borrow_in_own_thread(void)
{
    bdrv_graph_rdlock();
    bdrv_graph_borrow();
    bdrv_graph_rdlock();
    bdrv_graph_rdunlock();
    bdrv_graph_return();
    g_assert_true(bdrv_graph_held());
    bdrv_graph_rdunlock();
    g_assert_false(bdrv_graph_held());
    bdrv_graph_wrlock();
    bdrv_graph_wrunlock();
}

typedef struct Pinned {
    BdrvGraphPin pin;
    Flagged writer;
} Pinned;

/* The worker of a request whose submitter has gone on. */
static void *work_and_unpin(void *opaque)
{
    Pinned *p = opaque;
    bdrv_graph_borrow();
    {
        BDRV_GRAPH_GUARD(); /* does not wait for the writer that waits for us */
        g_assert_false(atomic_load(&p->writer.done));
    }
    bdrv_graph_return();
    bdrv_graph_unpin(p->pin);
    return NULL;
}

static void test_pin(void)
{
    Pinned p = {.pin = bdrv_graph_pin()};
    pthread_t writer, worker;
    g_assert_false(bdrv_graph_held());
    g_assert_true(qb_thread_start(&writer, "writer", write_once, &p.writer));
    wait_for(&p.writer.begun);
    usleep(20000);
    g_assert_false(atomic_load(&p.writer.done));
    g_assert_true(qb_thread_start(&worker, "worker", work_and_unpin, &p));
    pthread_join(worker, NULL);
    pthread_join(writer, NULL);
    g_assert_true(atomic_load(&p.writer.done));
}

#define READERS 6
#define WRITERS 2
#define ROUNDS 10000

typedef struct Pair {
    unsigned a, b; /* equal whenever somebody may look */
    _Atomic(unsigned) reads;
} Pair;

static void *stress_reader(void *opaque)
{
    Pair *p = opaque;
    for (int i = 0; i < ROUNDS * 4; i++) {
        bdrv_graph_rdlock();
        unsigned a = p->a;
        if (i % 3 == 0) {
            BDRV_GRAPH_GUARD();
            g_assert_cmpuint(p->b, ==, a);
        }
        if (i % 64 == 0) {
            sched_yield();
        }
        g_assert_cmpuint(p->b, ==, a);
        bdrv_graph_rdunlock();
        atomic_fetch_add_explicit(&p->reads, 1, memory_order_relaxed);
    }
    return NULL;
}

static void *stress_writer(void *opaque)
{
    Pair *p = opaque;
    for (int i = 0; i < ROUNDS / 10; i++) {
        bdrv_graph_wrlock();
        p->a++;
        if (i % 16 == 0) {
            sched_yield();
        }
        p->b++;
        bdrv_graph_wrunlock();
    }
    return NULL;
}

static void test_stress(void)
{
    Pair p = {0};
    pthread_t threads[READERS + WRITERS];
    for (int i = 0; i < READERS + WRITERS; i++) {
        g_assert_true(qb_thread_start(&threads[i], "stress",
                                      i < READERS ? stress_reader : stress_writer, &p));
    }
    for (int i = 0; i < READERS + WRITERS; i++) {
        pthread_join(threads[i], NULL);
    }
    g_assert_cmpuint(p.a, ==, WRITERS * (ROUNDS / 10));
    g_assert_cmpuint(p.b, ==, p.a);
    g_assert_cmpuint(atomic_load(&p.reads), ==, READERS * ROUNDS * 4);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/graph-lock/nesting", test_nesting);
    g_test_add_func("/graph-lock/exclusive-nests-shared", test_exclusive_nests_shared);
    g_test_add_func("/graph-lock/writer-waits-for-reader", test_writer_waits_for_reader);
    g_test_add_func("/graph-lock/borrow-in-own-thread", test_borrow_in_own_thread);
    g_test_add_func("/graph-lock/pin", test_pin);
    g_test_add_func("/graph-lock/stress", test_stress);
    return g_test_run();
}
