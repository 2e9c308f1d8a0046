/*
 * Users of host runs: who is announced when, what each pins, and waiting past them.
 *
 * SPDX-License-Identifier: MIT
 */
#undef NDEBUG
#include "block/qcow2.h"

#include <unistd.h>

static BDRVQcow2State state;

static void setup(void)
{
    state.inflight = qcow2_inflight_new();
}

static void teardown(void)
{
    g_clear_pointer(&state.inflight, qcow2_inflight_free);
}

static void test_seq(void)
{
    Qcow2User a, b;
    setup();
    uint64_t before = qcow2_inflight_seq(&state);
    qcow2_user_announce(&state, &a);
    uint64_t between = qcow2_inflight_seq(&state);
    qcow2_user_announce(&state, &b);
    uint64_t after = qcow2_inflight_seq(&state);
    g_assert_false(qcow2_inflight_busy(&state, before, 0, UINT64_MAX / 2));
    g_assert_true(qcow2_inflight_busy(&state, between, 0, 1));
    qcow2_user_leave(&state, &a);
    g_assert_false(qcow2_inflight_busy(&state, between, 0, 1)); /* b came later */
    g_assert_true(qcow2_inflight_busy(&state, after, 0, 1));
    qcow2_user_leave(&state, &b);
    g_assert_false(qcow2_inflight_busy(&state, after, 0, 1));
    teardown();
}

static void test_resolve(void)
{
    Qcow2User u;
    setup();
    qcow2_user_announce(&state, &u);
    uint64_t seq = qcow2_inflight_seq(&state);
    g_assert_true(qcow2_inflight_busy(&state, seq, 1 << 20, 512)); /* anything */
    qcow2_user_resolve(&state, &u, 65536, 4096);
    g_assert_false(qcow2_inflight_busy(&state, seq, 1 << 20, 512));
    g_assert_false(qcow2_inflight_busy(&state, seq, 65536 - 512, 512));
    g_assert_false(qcow2_inflight_busy(&state, seq, 65536 + 4096, 512));
    g_assert_true(qcow2_inflight_busy(&state, seq, 65536 - 512, 513));
    g_assert_true(qcow2_inflight_busy(&state, seq, 65536 + 4095, 1));
    g_assert_true(qcow2_inflight_busy(&state, seq, 0, 1 << 20));
    qcow2_user_leave(&state, &u);
    teardown();
}

/* Leaving in any order keeps the list whole. */
static void test_leave_in_any_order(void)
{
    static const int orders[][3] = {
        {0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0},
    };
    setup();
    for (size_t o = 0; o < G_N_ELEMENTS(orders); o++) {
        Qcow2User u[3];
        bool there[3] = {true, true, true};
        for (int i = 0; i < 3; i++) {
            qcow2_user_announce(&state, &u[i]);
            qcow2_user_resolve(&state, &u[i], (uint64_t)i * 512, 512);
        }
        for (int i = 0; i < 3; i++) {
            qcow2_user_leave(&state, &u[orders[o][i]]);
            there[orders[o][i]] = false;
            for (int j = 0; j < 3; j++) {
                g_assert_true(qcow2_inflight_busy(&state, UINT64_MAX, (uint64_t)j * 512, 512)
                              == there[j]);
            }
        }
    }
    teardown();
}

typedef struct Waiter {
    uint64_t seq;
    _Atomic(bool) done;
} Waiter;

static void *run_waiter(void *opaque)
{
    Waiter *w = opaque;
    qcow2_inflight_wait(&state, w->seq);
    atomic_store(&w->done, true);
    return NULL;
}

/* Waits for those before, not for those after. */
static void test_wait(void)
{
    Qcow2User a, b, later;
    Waiter w = {0};
    pthread_t thread;
    setup();
    qcow2_inflight_wait(&state, qcow2_inflight_seq(&state)); /* nobody */
    qcow2_user_announce(&state, &a);
    qcow2_user_announce(&state, &b);
    w.seq = qcow2_inflight_seq(&state);
    qcow2_user_announce(&state, &later);
    g_assert_true(qb_thread_start(&thread, "waiter", run_waiter, &w));
    g_usleep(5000);
    qcow2_user_leave(&state, &b);
    qcow2_user_resolve(&state, &a, 0, 512);
    g_usleep(5000);
    g_assert_false(atomic_load(&w.done));
    qcow2_user_leave(&state, &a);
    pthread_join(thread, NULL);
    g_assert_true(atomic_load(&w.done));
    qcow2_user_leave(&state, &later);
    teardown();
}

/* Runs with an owner: who finds that nobody announced before is on it may take it. */
#define STRESS_RUNS 8
static _Atomic(int) users_of[STRESS_RUNS];
static _Atomic(bool) gone[STRESS_RUNS]; /* announced users find it in the "map" until then */

static void *run_user(void *opaque)
{
    GRand *rand = opaque;
    for (int i = 0; i < 3000; i++) {
        Qcow2User u;
        int run = g_rand_int_range(rand, 0, STRESS_RUNS);
        qcow2_user_announce(&state, &u);
        if (!atomic_load(&gone[run])) {
            qcow2_user_resolve(&state, &u, (uint64_t)run * 512, 512);
            atomic_fetch_add(&users_of[run], 1);
            atomic_fetch_sub(&users_of[run], 1);
        }
        qcow2_user_leave(&state, &u);
    }
    g_rand_free(rand);
    return NULL;
}

static void test_stress(void)
{
    pthread_t threads[3];
    setup();
    for (guint i = 0; i < G_N_ELEMENTS(threads); i++) {
        g_assert_true(qb_thread_start(&threads[i], "user", run_user, g_rand_new_with_seed(i)));
    }
    for (int i = 0; i < 500; i++) {
        int run = i % STRESS_RUNS;
        atomic_store(&gone[run], true);
        uint64_t seq = qcow2_inflight_seq(&state);
        if (i % 2) {
            qcow2_inflight_wait(&state, seq);
        }
        if (!qcow2_inflight_busy(&state, seq, (uint64_t)run * 512, 512)) {
            g_assert_cmpint(atomic_load(&users_of[run]), ==, 0);
        } else {
            g_assert_true(i % 2 == 0);
        }
        atomic_store(&gone[run], false);
    }
    for (guint i = 0; i < G_N_ELEMENTS(threads); i++) {
        pthread_join(threads[i], NULL);
    }
    teardown();
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/qcow2-inflight/seq", test_seq);
    g_test_add_func("/qcow2-inflight/resolve", test_resolve);
    g_test_add_func("/qcow2-inflight/leave-in-any-order", test_leave_in_any_order);
    g_test_add_func("/qcow2-inflight/wait", test_wait);
    g_test_add_func("/qcow2-inflight/stress", test_stress);
    return g_test_run();
}
