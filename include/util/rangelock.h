/*
 * The range lock: overlapping requests of a node take effect in the order of their tickets.
 *
 * A request draws its ticket when it is submitted (not when a worker picks it up).  It starts
 * PLAIN.  A request that turns out to change the map becomes SERIALISING for a range, and waits
 * until it is GRANTED.  One that knows that it will not, and that may be passed, is SETTLED.
 *
 *   submit ---> PLAIN --serialise()--> WAITING --> GRANTED ------------> done
 *                  \ enter()             ^                              /
 *                   '---------------> ENTERED --settle()--> SETTLED ----'
 *
 * Who waits for whom (ranges overlapping, S = serialising and not done, t = ticket):
 *   a plain request entering            waits for all with smaller t, and for S that is granted
 *   a serialising request               waits for S with smaller t or granted, for plain requests
 *                                       with smaller t that have not settled (they may serialise),
 *                                       and, if asked to, for all plain ones that have entered
 * A granted request waits for nothing any more, and all others wait for smaller tickets or granted
 * ones only: the graph of waits has no cycle.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef QB_UTIL_RANGELOCK_H
#define QB_UTIL_RANGELOCK_H

#include <stdbool.h>
#include <stdint.h>
#include "util/thread.h"

typedef enum QbRangeState {
    QB_RANGE_IDLE,    /* not in the lock */
    QB_RANGE_PLAIN,   /* submitted, not entered */
    QB_RANGE_ENTERED, /* plain and running, may still serialise */
    QB_RANGE_SETTLED, /* plain and running, will not; later serialising ones may pass */
    QB_RANGE_WAITING, /* serialising, not granted */
    QB_RANGE_GRANTED, /* serialising and running */
} QbRangeState;

typedef struct QbRangeRequest QbRangeRequest;
struct QbRangeRequest {
    QbRangeRequest *prev, *next; /* list in ticket order, guarded by the lock's mutex */
    uint64_t ticket;
    uint64_t offset, end; /* half open; end may be UINT64_MAX */
    QbRangeState state;
    bool wait_plain;
};

typedef struct QbRangeLock {
    QbMutex lock;
    QbCond changed;
    QbRangeRequest *first, *last;
    uint64_t next_ticket;
    unsigned waiters; /* threads that wait for changed */
} QbRangeLock;

void qb_range_lock_init(QbRangeLock *l);
void qb_range_lock_destroy(QbRangeLock *l); /* asserts that nobody is inside */

/* Draws the ticket. @r is the caller's, lives until qb_range_leave(). offset + bytes beyond
 * UINT64_MAX means up to infinity; a range of 0 bytes overlaps nothing. */
void qb_range_submit(QbRangeLock *l, QbRangeRequest *r, uint64_t offset, uint64_t bytes);
/* The same for a part of the work of @owner, which is granted, elsewhere: @r has its ticket, and so waits
 * for nobody who waits for @owner. The ranges do not overlap. */
void qb_range_submit_for(QbRangeLock *l, QbRangeRequest *r, const QbRangeRequest *owner,
                         uint64_t offset, uint64_t bytes);
/* Does anybody wait? */
bool qb_range_contended(QbRangeLock *l);
/* Waits for those in the way. */
void qb_range_enter(QbRangeLock *l, QbRangeRequest *r);
/* As qb_range_enter(), but returns false at once instead of waiting. */
bool qb_range_try_enter(QbRangeLock *l, QbRangeRequest *r);
/* @r, which has entered, lets serialising requests with larger tickets pass, and serialises no more. Does
 * nothing to a granted one. */
void qb_range_settle(QbRangeLock *l, QbRangeRequest *r);
/* Turns @r (submitted or entered) serialising for [offset, offset + bytes), which must contain its
 * own range, and waits until it is granted. Calling it again for a contained range does nothing; a
 * granted request cannot be widened, nor made to wait for plain ones afterwards. */
void qb_range_serialise(QbRangeLock *l, QbRangeRequest *r, uint64_t offset, uint64_t bytes,
                        bool wait_plain);
/* The same for [offset, offset + bytes), without waiting for plain ones that have entered; returns false
 * at once, with nothing changed, instead of waiting. */
bool qb_range_try_serialise(QbRangeLock *l, QbRangeRequest *r, uint64_t offset, uint64_t bytes);
/* @to, which is in no lock, takes the place of @from with its ticket and its state as if it had
 * just been submitted with [offset, offset + bytes), part of its range: nobody else passes.  @from
 * has entered or was granted and is out afterwards, all that it did undone. */
void qb_range_hand_over(QbRangeLock *l, QbRangeRequest *from, QbRangeRequest *to, uint64_t offset,
                        uint64_t bytes);
/* Done, or given up before it entered. */
void qb_range_leave(QbRangeLock *l, QbRangeRequest *r);

#endif
