/*
 * Threads and locks: ownership, waiting with and without an end, contracts that assert.
 *
 * SPDX-License-Identifier: MIT
 */
#include "util/thread.h"

#include <glib.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

#define NS_PER_MS UINT64_C(1000000)

static pthread_t start(void *(*fn)(void *), void *arg)
{
    pthread_t thread;
    g_assert_true(qb_thread_start(&thread, "test", fn, arg));
    return thread;
}

static bool run_and_join(void *(*fn)(void *), void *arg)
{
    void *result;
    g_assert_cmpint(pthread_join(start(fn, arg), &result), ==, 0);
    return result != NULL;
}

static void *is_held(void *opaque)
{
    return qb_mutex_held(opaque) ? opaque : NULL;
}

static void test_owner(void)
{
    QbMutex m;
    qb_mutex_init(&m);
    g_assert_false(qb_mutex_held(&m));
    qb_mutex_lock(&m);
    g_assert_true(qb_mutex_held(&m));
    qb_mutex_assert_held(&m);
    g_assert_false(run_and_join(is_held, &m));
    qb_mutex_unlock(&m);
    g_assert_false(qb_mutex_held(&m));
    qb_mutex_destroy(&m);
}

static QbMutex static_mutex = QB_MUTEX_INIT;

static void test_static_mutex(void)
{
    qb_mutex_lock(&static_mutex);
    g_assert_true(qb_mutex_held(&static_mutex));
    qb_mutex_unlock(&static_mutex);
}

static bool leave_early(QbMutex *m, bool early)
{
    QB_GUARD(m);
    g_assert_true(qb_mutex_held(m));
    if (early) {
        return true;
    }
    g_assert_true(qb_mutex_held(m));
    return false;
}

static void test_guard(void)
{
    QbMutex m;
    qb_mutex_init(&m);
    g_assert_true(leave_early(&m, true));
    g_assert_false(qb_mutex_held(&m));
    g_assert_false(leave_early(&m, false));
    g_assert_false(qb_mutex_held(&m));
    qb_mutex_destroy(&m);
}

#define COUNTERS 4
#define ROUNDS 20000

typedef struct Counter {
    QbMutex lock;
    unsigned long n; /* not atomic: the lock has to be good */
} Counter;

static void *count(void *opaque)
{
    Counter *c = opaque;
    for (int i = 0; i < ROUNDS; i++) {
        QB_GUARD(&c->lock);
        c->n++;
    }
    return NULL;
}

static void test_exclusion(void)
{
    Counter c = {.n = 0};
    pthread_t threads[COUNTERS];
    qb_mutex_init(&c.lock);
    for (int i = 0; i < COUNTERS; i++) {
        threads[i] = start(count, &c);
    }
    for (int i = 0; i < COUNTERS; i++) {
        pthread_join(threads[i], NULL);
    }
    g_assert_cmpuint(c.n, ==, COUNTERS * ROUNDS);
    qb_mutex_destroy(&c.lock);
}

typedef struct Gate {
    QbMutex lock;
    QbCond changed;
    int step;
} Gate;

static void gate_init(Gate *g)
{
    qb_mutex_init(&g->lock);
    qb_cond_init(&g->changed);
    g->step = 0;
}

static void gate_destroy(Gate *g)
{
    qb_cond_destroy(&g->changed);
    qb_mutex_destroy(&g->lock);
}

static void *answer(void *opaque)
{
    Gate *g = opaque;
    QB_GUARD(&g->lock);
    while (g->step != 1) {
        qb_cond_wait(&g->changed, &g->lock);
        g_assert_true(qb_mutex_held(&g->lock));
    }
    g->step = 2;
    qb_cond_broadcast(&g->changed);
    return NULL;
}

static void test_cond(void)
{
    Gate g;
    gate_init(&g);
    pthread_t thread = start(answer, &g);
    qb_mutex_lock(&g.lock);
    g.step = 1;
    qb_cond_signal(&g.changed);
    while (g.step != 2) {
        g_assert_true(qb_cond_timedwait(&g.changed, &g.lock, 60000));
        g_assert_true(qb_mutex_held(&g.lock));
    }
    qb_mutex_unlock(&g.lock);
    pthread_join(thread, NULL);
    gate_destroy(&g);
}

static void test_timedwait_ends(void)
{
    Gate g;
    gate_init(&g);
    qb_mutex_lock(&g.lock);
    uint64_t before = qb_now_ns();
    g_assert_false(qb_cond_timedwait(&g.changed, &g.lock, 50));
    g_assert_cmpuint(qb_now_ns() - before, >=, 50 * NS_PER_MS);
    g_assert_true(qb_mutex_held(&g.lock));
    g_assert_false(qb_cond_timedwait(&g.changed, &g.lock, 0));
    qb_mutex_unlock(&g.lock);
    gate_destroy(&g);
}

/* The longest possible wait is far away, not in the past. */
static void test_timedwait_for_ever(void)
{
    Gate g;
    gate_init(&g);
    g.step = 1;
    qb_mutex_lock(&g.lock);
    pthread_t thread = start(answer, &g);
    while (g.step != 2) {
        g_assert_true(qb_cond_timedwait(&g.changed, &g.lock, UINT64_MAX));
    }
    qb_mutex_unlock(&g.lock);
    pthread_join(thread, NULL);
    gate_destroy(&g);
}

typedef struct Shared {
    QbRwLock lock;
    Gate gate; /* step counts readers inside */
    long value;
} Shared;

/* Stays inside until the other reader is inside too: only shared locks let this end. */
static void *read_together(void *opaque)
{
    Shared *s = opaque;
    qb_rwlock_rdlock(&s->lock);
    qb_mutex_lock(&s->gate.lock);
    s->gate.step++;
    qb_cond_broadcast(&s->gate.changed);
    while (s->gate.step < 2) {
        qb_cond_wait(&s->gate.changed, &s->gate.lock);
    }
    qb_mutex_unlock(&s->gate.lock);
    qb_rwlock_rdunlock(&s->lock);
    return NULL;
}

static void *write_alone(void *opaque)
{
    Shared *s = opaque;
    for (int i = 0; i < ROUNDS; i++) {
        qb_rwlock_wrlock(&s->lock);
        s->value++;
        qb_rwlock_wrunlock(&s->lock);
    }
    return NULL;
}

static void test_rwlock(void)
{
    Shared s = {.value = 0};
    qb_rwlock_init(&s.lock);
    gate_init(&s.gate);
    pthread_t a = start(read_together, &s), b = start(read_together, &s);
    pthread_join(a, NULL);
    pthread_join(b, NULL);
    a = start(write_alone, &s);
    b = start(write_alone, &s);
    pthread_join(a, NULL);
    pthread_join(b, NULL);
    g_assert_cmpint(s.value, ==, 2 * ROUNDS);
    gate_destroy(&s.gate);
    qb_rwlock_destroy(&s.lock);
}

static void *signals_are_blocked(void *opaque)
{
    sigset_t mask;
    pthread_sigmask(SIG_SETMASK, NULL, &mask);
    bool ok = sigismember(&mask, SIGINT) && sigismember(&mask, SIGTERM) &&
              sigismember(&mask, SIGUSR1) && sigismember(&mask, SIGALRM) &&
              !sigismember(&mask, SIGSEGV);
    return ok ? opaque : NULL;
}

static void test_signals_blocked(void)
{
    int any;
    g_assert_true(run_and_join(signals_are_blocked, &any));
    sigset_t mask;
    pthread_sigmask(SIG_SETMASK, NULL, &mask);
    g_assert_false(sigismember(&mask, SIGINT)); /* the starter's own mask is as before */
}

static void *check_name(void *opaque)
{
    char name[32] = "";
    /* The starter sets the name after the start. */
    for (int i = 0; i < 5000 && strcmp(name, "a-name-that-is-") != 0; i++) {
        g_usleep(1000);
        pthread_getname_np(pthread_self(), name, sizeof(name));
    }
    return strcmp(name, "a-name-that-is-") == 0 ? opaque : NULL;
}

static void test_long_name_is_cut(void)
{
    pthread_t thread;
    void *result;
    g_assert_true(qb_thread_start(&thread, "a-name-that-is-longer-than-16", check_name, &thread));
    pthread_join(thread, &result);
    g_assert_nonnull(result);
}

static void test_machine(void)
{
    g_assert_cmpuint(qb_cpu_count(), >=, 1);
    g_assert_cmpuint(qb_cpu_count(), <=, (unsigned)sysconf(_SC_NPROCESSORS_CONF));
    uint64_t a = qb_now_ns();
    g_usleep(2000);
    g_assert_cmpuint(qb_now_ns() - a, >=, 2 * NS_PER_MS);
}

/* ---- contracts ---- */

static void lock_twice(void) QB_NO_TSA
{
    QbMutex m;
    qb_mutex_init(&m);
    qb_mutex_lock(&m);
    qb_mutex_lock(&m);
}

static void unlock_unheld(void) QB_NO_TSA
{
    QbMutex m;
    qb_mutex_init(&m);
    qb_mutex_unlock(&m);
}

static void assert_unheld(void)
{
    QbMutex m;
    qb_mutex_init(&m);
    qb_mutex_assert_held(&m);
}

static void wait_unheld(void) QB_NO_TSA
{
    Gate g;
    gate_init(&g);
    qb_cond_wait(&g.changed, &g.lock);
}

static void check_asserts(gconstpointer fn)
{
    if (g_test_subprocess()) {
        ((void (*)(void))fn)();
        return;
    }
    g_test_trap_subprocess(NULL, 0, G_TEST_SUBPROCESS_DEFAULT);
    g_test_trap_assert_failed();
    g_test_trap_assert_stderr("*Assertion*qb_mutex_held*");
}

static void add_contract(const char *path, void (*fn)(void))
{
    g_test_add_data_func(path, (gconstpointer)fn, check_asserts);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/thread/owner", test_owner);
    g_test_add_func("/thread/static-mutex", test_static_mutex);
    g_test_add_func("/thread/guard", test_guard);
    g_test_add_func("/thread/exclusion", test_exclusion);
    g_test_add_func("/thread/cond", test_cond);
    g_test_add_func("/thread/timedwait-ends", test_timedwait_ends);
    g_test_add_func("/thread/timedwait-for-ever", test_timedwait_for_ever);
    g_test_add_func("/thread/rwlock", test_rwlock);
    g_test_add_func("/thread/signals-blocked", test_signals_blocked);
    g_test_add_func("/thread/long-name-is-cut", test_long_name_is_cut);
    g_test_add_func("/thread/machine", test_machine);
    add_contract("/thread/contract/lock-twice", lock_twice);
    add_contract("/thread/contract/unlock-unheld", unlock_unheld);
    add_contract("/thread/contract/assert-unheld", assert_unheld);
    add_contract("/thread/contract/wait-unheld", wait_unheld);
    return g_test_run();
}
