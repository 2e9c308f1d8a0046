/*
 * Transfers started and collected by one thread; a mailbox for those who work for it.
 *
 *      [waiting] --push--> [kernel] --reap--.
 *                                           v
 *      [file pool] ----- post --> mail --> came --> done(op)
 *      [workers] ------- post ----^
 *
 * Everything that ends rings the doorbell, an eventfd: the kernel's ring does by itself, who posts
 * does when the mailbox was empty.  So one read waits for all of them, and whoever has other things
 * to wait for polls the same descriptor.
 *
 * Invariants
 *  1. under_way counts operations between qb_ring_transfer() or qb_ring_expect() and done(); only the
 *     owner touches it.
 *  2. The doorbell is written after, and under the lock of, the post it stands for; the owner looks
 *     into the mailbox after each read.  A ring too many costs a look, none is missed.
 *  3. Whoever posts is out of the lock before the owner can get in and see the last one: it may free
 *     the ring then.
 *  4. While nothing is under way no system call is made.
 *
 * Not done: no cancelling, no order between operations.
 *
 * SPDX-License-Identifier: MIT
 */
#include "qb-config.h"
#include "util/ring-int.h"
#include "util/pool.h"
#include "util/thread.h"

#include <errno.h>
#include <glib.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

struct QbRing {
    unsigned under_way;
    int doorbell;
    bool watched;      /* somebody else polls the doorbell */
    bool kernel_tried;
    KernelRing *kernel;

    QbMutex lock;      /* leaf */
    RingList mail;     /* guarded by lock */
    _Atomic(bool) has_mail;
};

QbRing *qb_ring_new(void)
{
    int doorbell = eventfd(0, EFD_CLOEXEC);
    if (doorbell < 0) {
        return NULL;
    }
    QbRing *ring = g_new0(QbRing, 1);
    ring->doorbell = doorbell;
    qb_mutex_init(&ring->lock);
    ring_list_init(&ring->mail);
    return ring;
}

void qb_ring_free(QbRing *ring)
{
    if (!ring) {
        return;
    }
    assert(ring->under_way == 0);
    kernel_ring_free(ring->kernel);
    qb_mutex_destroy(&ring->lock);
    close(ring->doorbell);
    g_free(ring);
}

unsigned qb_ring_under_way(const QbRing *ring)
{
    return ring->under_way;
}

int qb_ring_fd(QbRing *ring)
{
    ring->watched = true;
    return ring->doorbell;
}

/* --- the doorbell --- */

static void ring_doorbell(QbRing *ring)
{
    uint64_t one = 1;
    ssize_t n;
    do {
        n = write(ring->doorbell, &one, sizeof(one));
    } while (n < 0 && errno == EINTR);
    assert(n == sizeof(one));
}

/* Waits until it has rung, and silences it. */
static void hear_doorbell(QbRing *ring)
{
    uint64_t count;
    ssize_t n;
    do {
        n = read(ring->doorbell, &count, sizeof(count));
    } while (n < 0 && errno == EINTR);
    assert(n == sizeof(count));
}

/* Silences it, for who polls it. Before the look at what has come, so that nothing is lost. */
static void silence_doorbell(QbRing *ring)
{
    struct pollfd pfd = {.fd = ring->doorbell, .events = POLLIN};
    if (ring->watched && poll(&pfd, 1, 0) == 1) {
        hear_doorbell(ring);
    }
}

/* --- mail --- */

void qb_ring_expect(QbRing *ring)
{
    ring->under_way++;
}

void qb_ring_post(QbRing *ring, QbRingOp *op)
{
    QB_GUARD(&ring->lock);
    bool was_empty = !ring->mail.first;
    ring_list_add(&ring->mail, op);
    atomic_store_explicit(&ring->has_mail, true, memory_order_release);
    if (was_empty) {
        ring_doorbell(ring);
    }
}

static void take_mail(QbRing *ring, RingList *came)
{
    if (!atomic_load_explicit(&ring->has_mail, memory_order_acquire)) {
        return;
    }
    QB_GUARD(&ring->lock);
    QbRingOp *op;
    while ((op = ring_list_take(&ring->mail))) {
        ring_list_add(came, op);
    }
    atomic_store_explicit(&ring->has_mail, false, memory_order_relaxed);
}

/* --- transfers --- */

static void transfer_in_thread(void *opaque)
{
    QbRingOp *op = opaque;
    op->io.ret = qb_io_one(op->io.kind, op->io.fd, op->io.offset, op->io.iov, op->io.niov);
    qb_ring_post(op->ring, op);
}

static KernelRing *kernel_of(QbRing *ring)
{
    if (!ring->kernel_tried) {
        ring->kernel_tried = true;
        ring->kernel = kernel_ring_new(ring->doorbell);
    }
    return ring->kernel;
}

void qb_ring_transfer(QbRing *ring, QbRingOp *op, bool kernel)
{
    KernelRing *k = kernel ? kernel_of(ring) : NULL;
    ring->under_way++;
    op->ring = ring;
    if (k) {
        kernel_ring_add(k, op);
    } else {
        qb_pool_submit(qb_file_pool(), transfer_in_thread, op);
    }
}

/* Hands transfers to the kernel; those of a ring that broke to threads. */
static void push(QbRing *ring, RingList *came)
{
    RingList left;
    QbRingOp *op;
    if (!ring->kernel || kernel_ring_push(ring->kernel, &left)) {
        return;
    }
    kernel_ring_reap(ring->kernel, came);
    kernel_ring_free(ring->kernel);
    ring->kernel = NULL;
    while ((op = ring_list_take(&left))) {
        qb_pool_submit(qb_file_pool(), transfer_in_thread, op);
    }
}

/* --- collecting --- */

static void look(QbRing *ring, RingList *came)
{
    push(ring, came);
    if (ring->kernel) {
        kernel_ring_reap(ring->kernel, came);
    }
    take_mail(ring, came);
}

static unsigned deliver(QbRing *ring, RingList *came)
{
    unsigned n = 0;
    QbRingOp *op;
    while ((op = ring_list_take(came))) {
        assert(ring->under_way > 0);
        ring->under_way--;
        n++;
        op->done(op);
    }
    return n;
}

unsigned qb_ring_poll(QbRing *ring)
{
    RingList came;
    if (ring->under_way == 0) {
        return 0;
    }
    ring_list_init(&came);
    silence_doorbell(ring);
    look(ring, &came);
    return deliver(ring, &came);
}

unsigned qb_ring_wait(QbRing *ring)
{
    RingList came;
    if (ring->under_way == 0) {
        return 0;
    }
    ring_list_init(&came);
    look(ring, &came);
    while (!came.first) {
        hear_doorbell(ring);
        look(ring, &came);
    }
    return deliver(ring, &came);
}
