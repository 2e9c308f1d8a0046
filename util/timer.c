/*
 * Timers: one thread sleeps until the next one is due and hands its function to the request pool.
 *
 *      arm:  idle --> waiting (in a list by due time) --due--> running --done--> idle
 *                                                                 `--armed meanwhile--> waiting
 *
 * Invariants (all under the lock)
 *  1. A timer is in the list exactly when due is not 0 and it is not running.
 *  2. A timer that is running stays where it is: free waits for it.
 *  3. The thread exists only while timers do; it belongs to an epoch, and ends when that is over.
 *
 * The list is searched linearly: there are a few timers per open image.
 *
 * SPDX-License-Identifier: MIT
 */
#include "util/timer.h"

#include <glib.h>

#include "util/pool.h"

#define NS_PER_MS UINT64_C(1000000)

struct QbTimer {
    void (*fn)(void *opaque);
    void *opaque;
    /* guarded by clock_lock */
    uint64_t due; /* ns; 0: not armed */
    bool running, ending;
    QbCond ended;
    GList link;
};

static QbMutex clock_lock = QB_MUTEX_INIT;
static QbCond changed;          /* the head of the list, or the epoch */
static GQueue waiting = G_QUEUE_INIT;
static unsigned timers;         /* that exist */
static unsigned epoch;
static bool has_thread;
static pthread_t thread;        /* when has_thread */

static void __attribute__((constructor)) timer_init(void)
{
    qb_cond_init(&changed);
}

static void enter_locked(QbTimer *t) QB_REQUIRES(clock_lock)
{
    GList *l = waiting.head;

    qb_mutex_assert_held(&clock_lock);
    while (l && ((const QbTimer *)l->data)->due <= t->due) {
        l = l->next;
    }
    if (l) {
        g_queue_insert_before_link(&waiting, l, &t->link);
    } else {
        g_queue_push_tail_link(&waiting, &t->link);
    }
    qb_cond_signal(&changed);
}

static void run(void *opaque)
{
    QbTimer *t = opaque;

    t->fn(t->opaque);
    QB_GUARD(&clock_lock);
    t->running = false;
    if (t->due) {
        enter_locked(t);
    }
    qb_cond_broadcast(&t->ended); /* under the lock: who waits may free it at once */
}

/* Waits until the first timer is due and takes it out; NULL: the epoch is over. */
static QbTimer *next_due_locked(unsigned my_epoch) QB_REQUIRES(clock_lock)
{
    while (epoch == my_epoch) {
        QbTimer *t = waiting.head ? waiting.head->data : NULL;
        uint64_t now = qb_now_ns();
        if (t && t->due <= now) {
            g_queue_unlink(&waiting, &t->link);
            t->due = 0;
            t->running = true;
            return t;
        }
        if (t) {
            (void)qb_cond_timedwait(&changed, &clock_lock, (t->due - now) / NS_PER_MS + 1);
        } else {
            qb_cond_wait(&changed, &clock_lock);
        }
    }
    return NULL;
}

static void *keep_time(void *opaque)
{
    unsigned my_epoch = GPOINTER_TO_UINT(opaque);
    QbTimer *t;

    qb_mutex_lock(&clock_lock);
    while ((t = next_due_locked(my_epoch))) {
        qb_mutex_unlock(&clock_lock);
        qb_pool_submit(qb_request_pool(), run, t);
        qb_mutex_lock(&clock_lock);
    }
    qb_mutex_unlock(&clock_lock);
    return NULL;
}

QbTimer *qb_timer_new(void (*fn)(void *opaque), void *opaque)
{
    QbTimer *t = g_new0(QbTimer, 1);

    t->fn = fn;
    t->opaque = opaque;
    t->link.data = t;
    qb_cond_init(&t->ended);
    QB_GUARD(&clock_lock);
    timers++;
    return t;
}

void qb_timer_arm(QbTimer *t, uint64_t ms)
{
    uint64_t due = qb_now_ns() + MIN(ms, UINT64_MAX / 4 / NS_PER_MS) * NS_PER_MS;
    QB_GUARD(&clock_lock);

    if (t->ending || (t->due && t->due <= due)) {
        return;
    }
    if (t->due && !t->running) {
        g_queue_unlink(&waiting, &t->link);
    }
    t->due = due;
    if (!t->running) {
        enter_locked(t);
    }
    if (!has_thread) {
        has_thread = qb_thread_start(&thread, "timer", keep_time, GUINT_TO_POINTER(epoch));
    }
}

void qb_timer_stop(QbTimer *t)
{
    QB_GUARD(&clock_lock);

    t->ending = true;
    if (t->due && !t->running) {
        g_queue_unlink(&waiting, &t->link);
    }
    t->due = 0;
    while (t->running) {
        qb_cond_wait(&t->ended, &clock_lock);
    }
}

/* One timer less. True when the thread in @ret is to be joined: there is nothing left for it to do. */
static bool leave(pthread_t *ret)
{
    QB_GUARD(&clock_lock);
    bool last = --timers == 0 && has_thread;

    if (last) {
        *ret = thread;
        has_thread = false;
        epoch++;
        qb_cond_broadcast(&changed);
    }
    return last;
}

void qb_timer_free(QbTimer *t)
{
    pthread_t old;

    if (!t) {
        return;
    }
    qb_timer_stop(t);
    if (leave(&old)) {
        pthread_join(old, NULL);
    }
    qb_cond_destroy(&t->ended);
    g_free(t);
}
