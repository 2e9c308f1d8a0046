/*
 * The kernel aio engine of file batches (aio=native), for files open with O_DIRECT.
 *
 * As the io_uring engine, with a context per thread.  A slot is a control block and, by its index,
 * the op it works for:
 *
 *      slots:  [iocb -> op 7] [free] [iocb -> op 5] ... 64 of them       free: a stack of slots
 *
 * Invariants
 *  1. A slot is off the stack exactly while its op is under way.
 *  2. The engine returns when no op is under way; ops that could not be submitted stay pending.
 *  3. Once a context could not be made (the system's limit of events), no thread tries again.
 *
 * Not done: submission in arrays.  One system call per op is small against the I/O of a device.
 *
 * SPDX-License-Identifier: MIT
 */
#include "qb-config.h"

#ifdef CONFIG_LIBAIO

#include "util/iobatch-engine.h"
#include "util/thread.h"

#include <assert.h>
#include <errno.h>
#include <libaio.h>
#include <glib.h>

typedef struct Slot {
    struct iocb iocb; /* first: the kernel hands its address back */
    QbIoOp *op;
} Slot;

typedef struct Context {
    io_context_t ctx;
    Slot slots[QB_IO_DEPTH];
    Slot *free[QB_IO_DEPTH];
    unsigned nfree;
} Context;

static pthread_once_t key_once = PTHREAD_ONCE_INIT;
static pthread_key_t context_key;
static _Atomic(bool) unusable; /* invariant 3 */

static void free_context(void *opaque)
{
    Context *c = opaque;
    io_destroy(c->ctx);
    g_free(c);
}

static void make_key(void)
{
    if (pthread_key_create(&context_key, free_context) != 0) {
        atomic_store(&unusable, true);
    }
}

static Context *new_context(void)
{
    Context *c = g_new0(Context, 1);
    if (io_setup(QB_IO_DEPTH, &c->ctx) < 0) {
        g_free(c);
        return NULL;
    }
    for (; c->nfree < QB_IO_DEPTH; c->nfree++) {
        c->free[c->nfree] = &c->slots[c->nfree];
    }
    if (pthread_setspecific(context_key, c) != 0) {
        free_context(c);
        return NULL;
    }
    return c;
}

static Context *my_context(void)
{
    pthread_once(&key_once, make_key);
    if (atomic_load_explicit(&unusable, memory_order_relaxed)) {
        return NULL;
    }
    Context *c = pthread_getspecific(context_key);
    if (!c) {
        c = new_context();
        if (!c) {
            atomic_store(&unusable, true);
        }
    }
    return c;
}

/* Starts @op; false when the kernel does not take it now. */
static bool submit(Context *c, QbIoOp *op)
{
    assert(c->nfree > 0);
    Slot *slot = c->free[c->nfree - 1];
    int niov = qb_io_first_niov(op);
    if (op->kind == QB_IO_READ) {
        io_prep_preadv(&slot->iocb, op->fd, op->iov, niov, (long long)op->offset);
    } else {
        io_prep_pwritev(&slot->iocb, op->fd, op->iov, niov, (long long)op->offset);
    }
    slot->op = op;
    struct iocb *list = &slot->iocb;
    if (io_submit(c->ctx, 1, &list) != 1) {
        return false;
    }
    c->nfree--;
    return true;
}

/* Waits for at least one completion and takes all that have come. */
static void reap(Context *c)
{
    struct io_event events[QB_IO_DEPTH];
    int n = io_getevents(c->ctx, 1, QB_IO_DEPTH, events, NULL);
    assert(n >= 0 || n == -EINTR);
    for (int i = 0; i < n; i++) {
        Slot *slot = (Slot *)events[i].obj;
        c->free[c->nfree++] = slot;
        qb_io_complete(slot->op, (ssize_t)events[i].res);
    }
}

void qb_libaio_run(QbIoOp *ops, size_t n)
{
    Context *c = my_context();
    if (!c) {
        return;
    }
    for (size_t next = 0; next < n; next++) {
        while (c->nfree == 0) {
            reap(c);
        }
        /* An op refused for a reason of its own gets its error from the thread that runs it. */
        submit(c, &ops[next]);
    }
    while (c->nfree < QB_IO_DEPTH) {
        reap(c);
    }
}

#else
typedef int QbNoLibaio; /* ISO C wants a declaration in every file */
#endif
