/*
 * The kernel's side of a ring: io_uring.
 *
 *      waiting:  [entry made] [entry made] [no entry yet] ...      in the kernel: counted only
 *                <----- prepared ------->
 *
 * Entries of the submission queue are made in the order of the list, so that the first `prepared` of
 * it are what the kernel takes next.
 *
 * Invariants
 *  1. Never more under way than the completion queue holds.
 *  2. A ring that refuses to submit is given up for good, by the whole process: what it had is waited
 *     for, the rest is handed back.
 *
 * SPDX-License-Identifier: MIT
 */
#include "qb-config.h"
#include "util/ring-int.h"

#include <stddef.h>

#ifdef CONFIG_IO_URING

#include "util/iobatch-engine.h"

#include <assert.h>
#include <errno.h>
#include <glib.h>
#include <liburing.h>

#define ENTRIES 128

struct KernelRing {
    struct io_uring uring;
    RingList waiting;
    unsigned prepared, in_kernel, room;
};

KernelRing *kernel_ring_new(int doorbell)
{
    KernelRing *k = g_new0(KernelRing, 1);
    if (!qb_uring_open(&k->uring, ENTRIES)) {
        g_free(k);
        return NULL;
    }
    if (io_uring_register_eventfd(&k->uring, doorbell) < 0) {
        qb_uring_close(&k->uring);
        g_free(k);
        return NULL;
    }
    k->room = k->uring.cq.ring_entries;
    ring_list_init(&k->waiting);
    return k;
}

void kernel_ring_free(KernelRing *k)
{
    if (k) {
        assert(k->in_kernel == 0);
        qb_uring_close(&k->uring);
        g_free(k);
    }
}

void kernel_ring_add(KernelRing *k, QbRingOp *op)
{
    ring_list_add(&k->waiting, op);
}

/* The first of the list that has no entry yet. */
static QbRingOp *first_unprepared(const KernelRing *k)
{
    QbRingOp *op = k->waiting.first;
    for (unsigned i = 0; op && i < k->prepared; i++) {
        op = op->next;
    }
    return op;
}

static void prepare(KernelRing *k)
{
    for (QbRingOp *op = first_unprepared(k); op; op = op->next) {
        bool room = k->in_kernel + k->prepared < k->room;
        struct io_uring_sqe *sqe = room ? io_uring_get_sqe(&k->uring) : NULL;
        if (!sqe) {
            return;
        }
        qb_uring_prepare(sqe, &op->io);
        k->prepared++;
    }
}

static void account(KernelRing *k, unsigned submitted)
{
    assert(submitted <= k->prepared);
    k->prepared -= submitted;
    k->in_kernel += submitted;
    while (submitted-- > 0) {
        (void)ring_list_take(&k->waiting);
    }
}

/* What the kernel has must end before its buffers are given back. */
static void give_up(KernelRing *k, RingList *ret_left)
{
    while (io_uring_cq_ready(&k->uring) < k->in_kernel) {
        struct io_uring_cqe *cqe;
        int rc = io_uring_wait_cqe_nr(&k->uring, &cqe, k->in_kernel);
        assert(rc == 0 || rc == -EINTR || rc == -EAGAIN);
        (void)rc;
    }
    qb_uring_forbid();
    *ret_left = k->waiting;
    ret_left->end = ret_left->first ? ret_left->end : &ret_left->first;
    ring_list_init(&k->waiting);
    k->prepared = 0;
}

bool kernel_ring_push(KernelRing *k, RingList *ret_left)
{
    while (k->waiting.first) {
        prepare(k);
        if (k->prepared == 0) {
            return true; /* no room: some of those under way must come first */
        }
        int rc = io_uring_submit(&k->uring);
        bool busy = rc == -EAGAIN || rc == -EBUSY;
        if (rc < 0 && busy && k->in_kernel > 0) {
            return true;
        }
        if (rc < 0 && rc != -EINTR) {
            give_up(k, ret_left);
            return false;
        }
        account(k, rc > 0 ? (unsigned)rc : 0);
    }
    return true;
}

void kernel_ring_reap(KernelRing *k, RingList *done)
{
    struct io_uring_cqe *cqe;
    while (k->in_kernel > 0 && io_uring_peek_cqe(&k->uring, &cqe) == 0) {
        QbIoOp *io = io_uring_cqe_get_data(cqe);
        ssize_t res = cqe->res;
        io_uring_cqe_seen(&k->uring, cqe);
        k->in_kernel--;
        qb_io_complete(io, res);
        ring_list_add(done, (QbRingOp *)((char *)io - offsetof(QbRingOp, io)));
    }
}

#else

KernelRing *kernel_ring_new(int doorbell)
{
    return NULL;
}

void kernel_ring_free(KernelRing *k)
{
}

void kernel_ring_add(KernelRing *k, QbRingOp *op)
{
}

bool kernel_ring_push(KernelRing *k, RingList *ret_left)
{
    return true;
}

void kernel_ring_reap(KernelRing *k, RingList *done)
{
}

#endif
