/*
 * Timers: a function that shall run once, some time from now.
 *
 * One thread of the process keeps the time; the functions run in the request pool, so that one that
 * blocks delays no other.  Timers are for work in the background: when the system gives no thread,
 * it stays undone.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef QB_UTIL_TIMER_H
#define QB_UTIL_TIMER_H

#include "util/thread.h"

typedef struct QbTimer QbTimer;

/* Not armed. No thread is started before the first one is armed (fork comes first). */
QbTimer *qb_timer_new(void (*fn)(void *opaque), void *opaque);
/* The function runs @ms milliseconds from now, or earlier if it was armed for that already. Once for
 * each time it is armed while it does not wait; never twice at the same time. Any thread, also from
 * the function itself; takes a leaf lock only. */
void qb_timer_arm(QbTimer *t, uint64_t ms);
/* Disarms it for good and waits for the function to end if it is running; arming it does nothing from
 * now on. Not from the function itself. */
void qb_timer_stop(QbTimer *t);
/* Stops it. NULL is fine. The last timer of the process takes the thread with it. */
void qb_timer_free(QbTimer *t);

#endif
