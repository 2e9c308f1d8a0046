/*
 * Threads and locks: pthread primitives with clang's thread-safety annotations and run-time twins.
 *
 * Names: foo_locked() requires its lock and asserts it with qb_mutex_assert_held(); foo() takes it.
 * The order in which locks may be taken is written once, in include/block/locks.h.
 * QB_GUARD(m) holds m to the end of the enclosing scope.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef QB_UTIL_THREAD_H
#define QB_UTIL_THREAD_H

#include <assert.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#if defined(__clang__)
#define QB_TSA(x) __attribute__((x))
#else
#define QB_TSA(x)
#endif

#define QB_CAPABILITY(name) QB_TSA(capability(name))
#define QB_REQUIRES(...) QB_TSA(requires_capability(__VA_ARGS__))
#define QB_REQUIRES_SHARED(...) QB_TSA(requires_shared_capability(__VA_ARGS__))
#define QB_EXCLUDES(...) QB_TSA(locks_excluded(__VA_ARGS__))
#define QB_ACQUIRE(...) QB_TSA(acquire_capability(__VA_ARGS__))
#define QB_ACQUIRE_SHARED(...) QB_TSA(acquire_shared_capability(__VA_ARGS__))
#define QB_RELEASE(...) QB_TSA(release_capability(__VA_ARGS__))
#define QB_RELEASE_SHARED(...) QB_TSA(release_shared_capability(__VA_ARGS__))
#define QB_ASSERT_HELD(...) QB_TSA(assert_capability(__VA_ARGS__))
#define QB_NO_TSA QB_TSA(no_thread_safety_analysis)

/* A mutex that knows its owner, so that "the lock is held" is an assertion and not a comment. */
typedef struct QB_CAPABILITY("mutex") QbMutex {
    pthread_mutex_t m;
    _Atomic(uintptr_t) owner; /* address of a thread-local of the holder, 0 when free */
} QbMutex;

typedef struct QbCond {
    pthread_cond_t c; /* waits on CLOCK_MONOTONIC */
} QbCond;

typedef struct QB_CAPABILITY("rwlock") QbRwLock {
    pthread_rwlock_t rw;
} QbRwLock;

/* For mutexes of static storage. A condition has no such form, its clock is set at run time. */
#define QB_MUTEX_INIT {.m = PTHREAD_MUTEX_INITIALIZER}

/* Locking twice in one thread, unlocking what is not held and destroying what is are asserted. */
void qb_mutex_init(QbMutex *m);
void qb_mutex_destroy(QbMutex *m);
void qb_mutex_lock(QbMutex *m) QB_ACQUIRE(*m);
void qb_mutex_unlock(QbMutex *m) QB_RELEASE(*m);

/* True when the calling thread holds @m. */
bool qb_mutex_held(const QbMutex *m);

/* The run-time twin of QB_REQUIRES: the state contract of every _locked() function. */
static inline void qb_mutex_assert_held(const QbMutex *m) QB_ASSERT_HELD(*m) QB_NO_TSA
{
    assert(qb_mutex_held(m));
    (void)m;
}

void qb_cond_init(QbCond *c);
void qb_cond_destroy(QbCond *c);
/* Lets @m go, waits, takes it again. May return without a signal: wait in a loop. */
void qb_cond_wait(QbCond *c, QbMutex *m) QB_REQUIRES(*m);
/* Waits at most @ms milliseconds; false when the time ran out. */
bool qb_cond_timedwait(QbCond *c, QbMutex *m, uint64_t ms) QB_REQUIRES(*m);
/* The caller should hold the waiters' mutex; it has to when they may destroy @c at once. */
void qb_cond_signal(QbCond *c);
void qb_cond_broadcast(QbCond *c);

void qb_rwlock_init(QbRwLock *l);
void qb_rwlock_destroy(QbRwLock *l);
void qb_rwlock_rdlock(QbRwLock *l) QB_ACQUIRE_SHARED(*l);
bool qb_rwlock_try_rdlock(QbRwLock *l) QB_TSA(try_acquire_shared_capability(true, *l));
void qb_rwlock_wrlock(QbRwLock *l) QB_ACQUIRE(*l);
void qb_rwlock_rdunlock(QbRwLock *l) QB_RELEASE_SHARED(*l);
void qb_rwlock_wrunlock(QbRwLock *l) QB_RELEASE(*l);

/* Scoped holder. clang 14 cannot follow the cleanup attribute, hence the asserting helper. */
static inline QbMutex *qb_guard_enter(QbMutex *m) QB_ASSERT_HELD(*m) QB_NO_TSA
{
    qb_mutex_lock(m);
    return m;
}

static inline void qb_guard_leave(QbMutex **m) QB_NO_TSA
{
    if (*m) {
        qb_mutex_unlock(*m);
    }
}

#define QB_GUARD_NAME2(line) qb_guard_##line
#define QB_GUARD_NAME(line) QB_GUARD_NAME2(line)
#define QB_GUARD(m)                                                                                \
    __attribute__((cleanup(qb_guard_leave), unused)) QbMutex *QB_GUARD_NAME(__LINE__) =            \
        qb_guard_enter(m)

/* Starts a joinable thread with all signals blocked (signals belong to the sigwait thread).
 * False, with nothing started, when the system cannot give a thread. */
bool qb_thread_start(pthread_t *thread, const char *name, void *(*fn)(void *), void *arg);

/* Processors this process may run on; at least 1. */
unsigned qb_cpu_count(void);

/* Monotonic time in nanoseconds. */
uint64_t qb_now_ns(void);

#endif
