/*
 * Between ring.c and its engine, the kernel's ring.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef QB_UTIL_RING_INT_H
#define QB_UTIL_RING_INT_H

#include "util/ring.h"

/* Operations in order of arrival. */
typedef struct RingList {
    QbRingOp *first, **end;
} RingList;

static inline void ring_list_init(RingList *list)
{
    list->first = NULL;
    list->end = &list->first;
}

static inline void ring_list_add(RingList *list, QbRingOp *op)
{
    op->next = NULL;
    *list->end = op;
    list->end = &op->next;
}

/* The first one, taken off; NULL when there is none. */
static inline QbRingOp *ring_list_take(RingList *list)
{
    QbRingOp *op = list->first;
    if (op) {
        list->first = op->next;
        list->end = list->first ? list->end : &list->first;
    }
    return op;
}

/* --- ring-uring.c --- */

typedef struct KernelRing KernelRing;

/* Completions are signalled to @doorbell. NULL: there shall be none. */
KernelRing *kernel_ring_new(int doorbell);
void kernel_ring_free(KernelRing *k); /* nothing under way; NULL is fine */
/* Takes @op; kernel_ring_push() hands it to the kernel. */
void kernel_ring_add(KernelRing *k, QbRingOp *op);
/* Hands over what was added and there is room for. False: the ring is of no use any more; what the
 * kernel had is complete then, and *ret_left are those it never saw. */
bool kernel_ring_push(KernelRing *k, RingList *ret_left);
/* Appends what is complete to @done. */
void kernel_ring_reap(KernelRing *k, RingList *done);

#endif
