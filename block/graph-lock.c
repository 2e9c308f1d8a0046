/*
 * The graph lock: a big-reader lock.
 *
 *     thread A   thread B          thread C              slots (one cache line each)
 *     depth 2    depth 1           exclusive             [ 1 ][ 1 ][ 0 ][ 0 ] ... 64
 *        `----------+------ slot = thread number mod 64 ---^----^
 *
 *     writer:  raise `writer`, then wait until each slot has been seen at 0
 *     reader:  raise own slot, then look at `writer`; if it is up, lower the slot and wait
 *
 * Readers are every request, writers are rare, so a reader touches one line that is practically its
 * own and reads one that practically never changes.
 *
 * Invariants
 *  1. A reader raises its slot before it reads `writer`, a writer raises `writer` before it reads a
 *     slot, all sequentially consistent: at least one of the two sees the other.
 *  2. A thread that has an entry, its own or a borrowed one, never waits here for a nested one.
 *     So a writer that waits cannot stop a request half way.
 *  3. A slot counts outermost entries only; the depth lives in thread-local memory.
 *  4. A thread that takes the lock exclusively holds no entry: it would wait for itself.
 *  5. A borrowed entry is covered by the lender, who waits for the borrower before leaving, or by a
 *     pin: an entry in a slot that no thread holds but a request, until unpinned.
 *
 * Not done: no upgrade, no try-lock but for pins, no fairness among writers beyond their mutex.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/locks.h"

#define SLOTS 64
#define CACHE_LINE 64

typedef struct GraphSlot {
    _Alignas(CACHE_LINE) _Atomic(unsigned) readers; /* outermost entries and pins */
} GraphSlot;

/* What a thread holds. */
typedef struct GraphEntry {
    unsigned depth;    /* nested entries */
    unsigned borrowed; /* nested loans */
    bool slot_held;    /* the outermost entry is in our slot */
    bool exclusive;
    int slot; /* 1 + index, 0: not chosen yet */
} GraphEntry;

static GraphSlot slots[SLOTS];
static _Atomic(bool) writer;
static _Atomic(unsigned) next_slot;
static QbMutex writers = {.m = PTHREAD_MUTEX_INITIALIZER};   /* one writer at a time */
static QbMutex wait_lock = {.m = PTHREAD_MUTEX_INITIALIZER}; /* leaf: guards the two conditions */
static QbCond slot_left = {.c = PTHREAD_COND_INITIALIZER};
static QbCond writer_left = {.c = PTHREAD_COND_INITIALIZER};
static __thread GraphEntry self;

static GraphSlot *own_slot(void)
{
    if (!self.slot) {
        self.slot = 1 + (int)(atomic_fetch_add_explicit(&next_slot, 1, memory_order_relaxed) % SLOTS);
    }
    return &slots[self.slot - 1];
}

/* Lowers the slot and tells a writer that may wait for it. */
static void leave_slot(GraphSlot *slot)
{
    atomic_fetch_sub(&slot->readers, 1);
    if (atomic_load(&writer)) {
        QB_GUARD(&wait_lock);
        qb_cond_broadcast(&slot_left);
    }
}

static void wait_for_writer(void)
{
    QB_GUARD(&wait_lock);
    while (atomic_load(&writer)) {
        qb_cond_wait(&writer_left, &wait_lock);
    }
}

static bool try_enter_slot(GraphSlot *slot)
{
    atomic_fetch_add(&slot->readers, 1);
    if (!atomic_load(&writer)) {
        return true;
    }
    leave_slot(slot);
    return false;
}

static void enter_slot(GraphSlot *slot)
{
    while (!try_enter_slot(slot)) {
        wait_for_writer();
    }
}

void bdrv_graph_rdlock(void)
{
    if (!bdrv_graph_held()) {
        enter_slot(own_slot());
        self.slot_held = true;
    }
    self.depth++;
}

void bdrv_graph_rdunlock(void)
{
    assert(self.depth > 0);
    self.depth--;
    if (self.depth == 0 && self.slot_held) {
        self.slot_held = false;
        leave_slot(own_slot());
    }
}

bool bdrv_graph_held(void)
{
    return self.depth || self.borrowed || self.exclusive;
}

void bdrv_graph_borrow(void)
{
    self.borrowed++;
}

void bdrv_graph_return(void)
{
    assert(self.borrowed > 0);
    self.borrowed--;
    /* entries taken under the loan have ended, unless the thread had one of its own before it */
    assert(self.borrowed || self.depth == 0 || self.slot_held);
}

BdrvGraphPin bdrv_graph_pin(void)
{
    assert(!bdrv_graph_held()); /* its own entry would be what it waits for, if a writer waits */
    GraphSlot *slot = own_slot();
    enter_slot(slot);
    return (BdrvGraphPin)(slot - slots);
}

bool bdrv_graph_try_pin(BdrvGraphPin *ret)
{
    GraphSlot *slot = own_slot();
    *ret = (BdrvGraphPin)(slot - slots);
    return try_enter_slot(slot);
}

void bdrv_graph_unpin(BdrvGraphPin pin)
{
    assert(pin < SLOTS);
    leave_slot(&slots[pin]);
}

void bdrv_graph_wrlock(void) QB_NO_TSA
{
    assert(!bdrv_graph_held());
    qb_mutex_lock(&writers);
    atomic_store(&writer, true);
    qb_mutex_lock(&wait_lock);
    for (int i = 0; i < SLOTS; i++) {
        while (atomic_load(&slots[i].readers)) {
            qb_cond_wait(&slot_left, &wait_lock);
        }
    }
    qb_mutex_unlock(&wait_lock);
    self.exclusive = true;
}

void bdrv_graph_wrunlock(void) QB_NO_TSA
{
    assert(self.exclusive && self.depth == 0);
    self.exclusive = false;
    qb_mutex_lock(&wait_lock);
    atomic_store(&writer, false);
    qb_cond_broadcast(&writer_left);
    qb_mutex_unlock(&wait_lock);
    qb_mutex_unlock(&writers);
}
