/*
 * Threads and locks: pthread primitives that check their contracts.
 *
 *   QbMutex   [ pthread mutex | owner ]      owner = address of a thread-local of the holder
 *
 * The owner word makes "the caller holds this lock" a cheap assertion.  Only two answers matter,
 * "me" and "not me": a thread that reads another's store, early or late, sees something that is not
 * itself, and its own stores it sees in order.  So relaxed atomics are enough.
 *
 * Invariants
 *  1. owner is the holder from after the lock to before the unlock, and 0 across a condition wait.
 *  2. A mutex is never locked twice by one thread; an assertion catches it before it blocks.
 *  3. Condition waits use CLOCK_MONOTONIC: a change of the wall clock moves no timeout.
 *  4. A thread started here has the asynchronous signals blocked from its first instruction.  The
 *     synchronous ones (SIGSEGV and its kind) stay open: they are bugs, and debuggers, sanitizers
 *     and the kernel want them where they happen.
 *
 * Not done: no cancellation, no detached threads, no recursive locks.  The calls that cannot fail
 * when used as agreed are asserted, not reported.
 *
 * SPDX-License-Identifier: MIT
 */
#include "util/thread.h"

#include <glib.h>
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define NS_PER_S 1000000000u
#define NS_PER_MS 1000000u
#define THREAD_NAME_MAX 16 /* the kernel's limit, terminating 0 included */

/* Only its address counts: it is different in each live thread. */
static __thread char self_mark;

static uintptr_t self(void)
{
    return (uintptr_t)&self_mark;
}

/* Contract check of a pthread call, which is made also where asserts are compiled out. */
static void must(int rc)
{
    assert(rc == 0);
    (void)rc;
}

static void set_owner(QbMutex *m, uintptr_t owner)
{
    atomic_store_explicit(&m->owner, owner, memory_order_relaxed);
}

void qb_mutex_init(QbMutex *m)
{
    must(pthread_mutex_init(&m->m, NULL));
    set_owner(m, 0);
}

void qb_mutex_destroy(QbMutex *m)
{
    must(pthread_mutex_destroy(&m->m));
}

void qb_mutex_lock(QbMutex *m) QB_NO_TSA
{
    assert(!qb_mutex_held(m));
    must(pthread_mutex_lock(&m->m));
    set_owner(m, self());
}

void qb_mutex_unlock(QbMutex *m) QB_NO_TSA
{
    assert(qb_mutex_held(m));
    set_owner(m, 0);
    must(pthread_mutex_unlock(&m->m));
}

bool qb_mutex_held(const QbMutex *m)
{
    return atomic_load_explicit(&m->owner, memory_order_relaxed) == self();
}

void qb_cond_init(QbCond *c)
{
    pthread_condattr_t attr;
    must(pthread_condattr_init(&attr));
    must(pthread_condattr_setclock(&attr, CLOCK_MONOTONIC));
    must(pthread_cond_init(&c->c, &attr));
    must(pthread_condattr_destroy(&attr));
}

void qb_cond_destroy(QbCond *c)
{
    must(pthread_cond_destroy(&c->c));
}

void qb_cond_wait(QbCond *c, QbMutex *m)
{
    assert(qb_mutex_held(m));
    set_owner(m, 0);
    must(pthread_cond_wait(&c->c, &m->m));
    set_owner(m, self());
}

/* The moment @ms from now; times too far away to be told from never are cut. */
static struct timespec deadline_after(uint64_t ms)
{
    const uint64_t cut = UINT64_MAX / 4 / NS_PER_MS;
    uint64_t ns = qb_now_ns() + (ms < cut ? ms : cut) * NS_PER_MS;
    return (struct timespec){
        .tv_sec = (time_t)(ns / NS_PER_S),
        .tv_nsec = (long)(ns % NS_PER_S),
    };
}

bool qb_cond_timedwait(QbCond *c, QbMutex *m, uint64_t ms)
{
    assert(qb_mutex_held(m));
    struct timespec deadline = deadline_after(ms);
    set_owner(m, 0);
    int rc = pthread_cond_timedwait(&c->c, &m->m, &deadline);
    set_owner(m, self());
    assert(rc == 0 || rc == ETIMEDOUT);
    return rc == 0;
}

void qb_cond_signal(QbCond *c)
{
    must(pthread_cond_signal(&c->c));
}

void qb_cond_broadcast(QbCond *c)
{
    must(pthread_cond_broadcast(&c->c));
}

void qb_rwlock_init(QbRwLock *l)
{
    must(pthread_rwlock_init(&l->rw, NULL));
}

void qb_rwlock_destroy(QbRwLock *l)
{
    must(pthread_rwlock_destroy(&l->rw));
}

void qb_rwlock_rdlock(QbRwLock *l) QB_NO_TSA
{
    must(pthread_rwlock_rdlock(&l->rw));
}

bool qb_rwlock_try_rdlock(QbRwLock *l) QB_NO_TSA
{
    int err = pthread_rwlock_tryrdlock(&l->rw);
    if (err != EBUSY && err != EAGAIN) {
        must(err);
    }
    return err == 0;
}

void qb_rwlock_wrlock(QbRwLock *l) QB_NO_TSA
{
    must(pthread_rwlock_wrlock(&l->rw));
}

void qb_rwlock_rdunlock(QbRwLock *l) QB_NO_TSA
{
    must(pthread_rwlock_unlock(&l->rw));
}

void qb_rwlock_wrunlock(QbRwLock *l) QB_NO_TSA
{
    must(pthread_rwlock_unlock(&l->rw));
}

/* All signals but those that a bug raises in the thread itself. */
static void asynchronous_signals(sigset_t *set)
{
    static const int synchronous[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGABRT, SIGSYS};
    sigfillset(set);
    for (size_t i = 0; i < G_N_ELEMENTS(synchronous); i++) {
        sigdelset(set, synchronous[i]);
    }
}

bool qb_thread_start(pthread_t *thread, const char *name, void *(*fn)(void *), void *arg)
{
    sigset_t blocked, before;
    asynchronous_signals(&blocked);
    must(pthread_sigmask(SIG_BLOCK, &blocked, &before));
    int rc = pthread_create(thread, NULL, fn, arg);
    must(pthread_sigmask(SIG_SETMASK, &before, NULL));
    if (rc) {
        return false;
    }
    char cut[THREAD_NAME_MAX];
    g_strlcpy(cut, name, sizeof(cut));
    (void)pthread_setname_np(*thread, cut); /* for debuggers: may fail when it is done already */
    return true;
}

unsigned qb_cpu_count(void)
{
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) == 0) {
        return (unsigned)CPU_COUNT(&set);
    }
    long n = sysconf(_SC_NPROCESSORS_ONLN); /* more processors than a cpu_set_t has room for */
    return n > 0 ? (unsigned)n : 1;
}

uint64_t qb_now_ns(void)
{
    struct timespec ts;
    must(clock_gettime(CLOCK_MONOTONIC, &ts));
    return (uint64_t)ts.tv_sec * NS_PER_S + (uint64_t)ts.tv_nsec;
}
