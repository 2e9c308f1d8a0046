/*
 * The io_uring engine of file batches.
 *
 *      ops:   [done] [done] [on ring] [done] [on ring] [pending] [pending] ...
 *                                                      ^ next
 *      each turn:  fill the ring from next on  ->  submit, wait for one  ->  complete all that came
 *
 * Every thread that runs batches has a ring of its own, made at its first batch and closed when the
 * thread ends.  So nothing is shared, and the kernel may take a ring's single issuer for granted.
 *
 * Invariants
 *  1. under_way counts the ops whose buffers the kernel may touch; the engine returns at 0 only.
 *  2. An op keeps QB_IO_PENDING until its completion came: what could not be submitted is left so.
 *  3. Once a ring could not be made, or submitting failed for good, no thread tries again: a system
 *     that forbids io_uring is asked once.  QB_DISABLE_IO_URING=1 in the environment forbids it
 *     too.
 *
 * Not done: registered files and buffers, polling.
 *
 * SPDX-License-Identifier: MIT
 */
#include "qb-config.h"

#ifdef CONFIG_IO_URING

#include "util/iobatch-engine.h"
#include "util/thread.h"

#include <assert.h>
#include <errno.h>
#include <liburing.h>
#include <stdlib.h>
#include <string.h>
#include <glib.h>

/* About that many (threads may pass it together): a ring is a file descriptor, and those are also
 * needed for images. The threads beyond share the file pool. */
#define MAX_RINGS 64
#define MAX_FIRST_TRANSFER (1u << 30) /* what is longer is continued by qb_io_complete() */

typedef struct Ring {
    struct io_uring uring;
    unsigned prepared;  /* in the submission queue, not known to the kernel */
    unsigned under_way; /* known to the kernel, completion not seen */
    bool broken;
} Ring;

static pthread_once_t key_once = PTHREAD_ONCE_INIT;
static pthread_key_t ring_key; /* frees a thread's ring when it ends */
static _Atomic(bool) unusable; /* invariant 3 */
static _Atomic(unsigned) ring_count;

/* Rings are made and closed one at a time. liburing maps their memory by bare system calls, so the
 * thread sanitizer does not know that an address has got a new life with another thread: it sees
 * this lock instead. */
static QbMutex life_lock = QB_MUTEX_INIT;

void qb_uring_close(struct io_uring *uring)
{
    QB_GUARD(&life_lock);
    io_uring_queue_exit(uring);
    atomic_fetch_sub(&ring_count, 1);
}

void qb_uring_forbid(void)
{
    atomic_store(&unusable, true);
}

/* Newer kernels do less work when they know that one thread uses the ring; older ones refuse. */
static int init_uring(struct io_uring *uring, unsigned entries)
{
    QB_GUARD(&life_lock);
    int rc = -EINVAL;
#if defined(IORING_SETUP_SINGLE_ISSUER) && defined(IORING_SETUP_COOP_TASKRUN)
    rc = io_uring_queue_init(entries, uring,
                             IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_COOP_TASKRUN);
#endif
    return rc == -EINVAL ? io_uring_queue_init(entries, uring, 0) : rc;
}

static bool is_disabled(void)
{
    const char *env = getenv("QB_DISABLE_IO_URING");
    return env && strcmp(env, "0") != 0 && env[0];
}

static bool is_usable(void)
{
    return !atomic_load_explicit(&unusable, memory_order_relaxed) && !is_disabled();
}

bool qb_uring_open(struct io_uring *uring, unsigned entries)
{
    if (!is_usable() || atomic_load(&ring_count) >= MAX_RINGS) {
        return false;
    }
    if (init_uring(uring, entries) < 0) {
        qb_uring_forbid();
        return false;
    }
    atomic_fetch_add(&ring_count, 1);
    return true;
}

/* --- rings of threads that run batches --- */

static void free_ring(void *opaque)
{
    Ring *ring = opaque;
    assert(ring->under_way == 0);
    qb_uring_close(&ring->uring);
    g_free(ring);
}

static void make_key(void)
{
    if (pthread_key_create(&ring_key, free_ring) != 0) {
        qb_uring_forbid();
    }
}

static Ring *new_ring(void)
{
    Ring *ring = g_new0(Ring, 1);
    if (!qb_uring_open(&ring->uring, QB_IO_DEPTH)) {
        g_free(ring);
        return NULL;
    }
    if (pthread_setspecific(ring_key, ring) != 0) {
        free_ring(ring);
        return NULL;
    }
    return ring;
}

/* The calling thread's ring, NULL where there shall be none. */
static Ring *my_ring(void)
{
    pthread_once(&key_once, make_key);
    if (!is_usable()) {
        return NULL;
    }
    Ring *ring = pthread_getspecific(ring_key);
    return ring ? ring : new_ring();
}

void qb_uring_prepare(struct io_uring_sqe *sqe, QbIoOp *op)
{
    int niov = qb_io_first_niov(op);
    unsigned len = niov != 1 ? 0 : (unsigned)MIN(op->iov->iov_len, MAX_FIRST_TRANSFER);
    if (niov == 1 && op->kind == QB_IO_READ) {
        io_uring_prep_read(sqe, op->fd, op->iov->iov_base, len, op->offset);
    } else if (niov == 1) {
        io_uring_prep_write(sqe, op->fd, op->iov->iov_base, len, op->offset);
    } else if (op->kind == QB_IO_READ) {
        io_uring_prep_readv(sqe, op->fd, op->iov, (unsigned)niov, op->offset);
    } else {
        io_uring_prep_writev(sqe, op->fd, op->iov, (unsigned)niov, op->offset);
    }
    io_uring_sqe_set_data(sqe, op);
}

/* Puts ops on the ring while there is room; returns how many. */
static size_t fill(Ring *ring, QbIoOp *ops, size_t n)
{
    size_t taken = 0;
    while (taken < n && ring->prepared + ring->under_way < QB_IO_DEPTH) {
        struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->uring);
        if (!sqe) {
            break;
        }
        qb_uring_prepare(sqe, &ops[taken++]);
        ring->prepared++;
    }
    return taken;
}

/* Completes all that has come. */
static void reap(Ring *ring)
{
    struct io_uring_cqe *cqe;
    while (ring->under_way > 0 && io_uring_peek_cqe(&ring->uring, &cqe) == 0) {
        QbIoOp *op = io_uring_cqe_get_data(cqe);
        ssize_t res = cqe->res;
        io_uring_cqe_seen(&ring->uring, cqe);
        ring->under_way--;
        qb_io_complete(op, res);
    }
}

/* Submits what is prepared and waits for one completion. */
static void submit_and_wait(Ring *ring)
{
    int rc = io_uring_submit_and_wait(&ring->uring, 1);
    if (rc >= 0) {
        assert((unsigned)rc <= ring->prepared);
        ring->prepared -= (unsigned)rc;
        ring->under_way += (unsigned)rc;
        return;
    }
    bool out_of_resources = rc == -EAGAIN || rc == -EBUSY;
    if (rc != -EINTR && !(out_of_resources && ring->under_way > 0)) {
        ring->broken = true;
    }
}

/* Waits for what the kernel has; only then may the buffers be given back. */
static void drain(Ring *ring)
{
    while (ring->under_way > 0) {
        struct io_uring_cqe *cqe;
        int rc = io_uring_wait_cqe(&ring->uring, &cqe);
        assert(rc == 0 || rc == -EINTR || rc == -EAGAIN);
        (void)rc;
        reap(ring);
    }
}

/* Gives a ring up that refuses to submit. Closing it drops what was prepared and not submitted. */
static void give_up(Ring *ring)
{
    drain(ring);
    qb_uring_forbid();
    pthread_setspecific(ring_key, NULL);
    free_ring(ring);
}

void qb_uring_run(QbIoOp *ops, size_t n)
{
    Ring *ring = my_ring();
    if (!ring) {
        return;
    }
    size_t next = 0;
    while (!ring->broken && (next < n || ring->prepared + ring->under_way > 0)) {
        next += fill(ring, ops + next, n - next);
        submit_and_wait(ring);
        reap(ring);
    }
    if (ring->broken) {
        give_up(ring);
    }
}

#else
typedef int QbNoUring; /* ISO C wants a declaration in every file */
#endif
