/*
 * Transfers that one thread starts and collects later, and a mailbox into which others put what
 * they have done for it.
 *
 *      owner  --qb_ring_transfer()-->  kernel ring, or file pool   --.
 *      owner  --qb_ring_expect()---->  anybody                       |  qb_ring_post()
 *      owner  <--- done(op), in qb_ring_poll() or qb_ring_wait() <---'
 *
 * The kernel's ring is made at the first transfer that asks for it, and where there is none threads
 * do the same.  The rules of transfers are those of util/iobatch.h.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef QB_UTIL_RING_H
#define QB_UTIL_RING_H

#include <stdbool.h>
#include "util/iobatch.h"

typedef struct QbRing QbRing; /* belongs to one thread, which calls everything but qb_ring_post() */
typedef struct QbRingOp QbRingOp;

/* The caller's; must stay where it is until done() is called. */
struct QbRingOp {
    QbIoOp io;                  /* of a transfer; its ret is the result */
    void (*done)(QbRingOp *op); /* in the owner's thread */
    QbRingOp *next;             /* the ring's, as the next one */
    QbRing *ring;
};

/* NULL: no file descriptor to be had. */
QbRing *qb_ring_new(void);
/* Nothing may be under way. NULL is fine. */
void qb_ring_free(QbRing *ring);

/* Starts op->io; its vector must live until done(), too. @kernel: through the kernel's ring if there
 * is one. It may begin as late as the next poll or wait. */
void qb_ring_transfer(QbRing *ring, QbRingOp *op, bool kernel);
/* Announces one qb_ring_post() by another thread. */
void qb_ring_expect(QbRing *ring);
/* Any thread, once for each qb_ring_expect(). Touches neither @ring nor @op afterwards. */
void qb_ring_post(QbRing *ring, QbRingOp *op);

/* Transfers and announced posts whose done() was not called yet. */
unsigned qb_ring_under_way(const QbRing *ring);
/* Calls done() of all that has come; does not wait. Returns how many. */
unsigned qb_ring_poll(QbRing *ring);
/* The same, but waits for at least one if anything is under way. */
unsigned qb_ring_wait(QbRing *ring);
/* Readable when qb_ring_poll() may have something to do. Borrowed; only to be polled. */
int qb_ring_fd(QbRing *ring);

#endif
