/*
 * In-flight users of host runs.
 *
 *      announce --> [unresolved: pins everything] --resolve--> [pins its run] --leave-->
 *
 * A request announces itself before it looks its mapping up, because from then on it may act on
 * what it reads there.  Whoever takes a host run away changes the map first and then asks whether
 * anybody who was announced before that still uses the run (invariant 3 of the driver).
 *
 * Invariants
 * 1. Sequence numbers rise in list order; everybody announced before qcow2_inflight_seq() returned
 *    has a smaller one than it.
 * 2. The lock is a leaf and never held while anything waits but in functions that wait here.
 * 3. Resolving takes no lock: it sets `bytes` before it looks for waiters, a waiter counts itself
 *    before it looks at `bytes`, sequentially consistent, so one of the two sees the other.
 *
 * The list is as long as there are requests in flight (tens), so it is searched linearly.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2.h"

struct Qcow2Inflight {
    QbMutex lock;
    QbCond left;
    Qcow2User *first, *last; /* in the order of seq */
    uint64_t next_seq;
    _Atomic(unsigned) waiters; /* changed under the lock */
};

Qcow2Inflight *qcow2_inflight_new(void)
{
    Qcow2Inflight *f = g_new0(Qcow2Inflight, 1);

    qb_mutex_init(&f->lock);
    qb_cond_init(&f->left);
    f->next_seq = 1;
    return f;
}

void qcow2_inflight_free(Qcow2Inflight *f)
{
    if (f) {
        assert(!f->first);
        qb_cond_destroy(&f->left);
        qb_mutex_destroy(&f->lock);
        g_free(f);
    }
}

static void announce(BDRVQcow2State *s, Qcow2User *u, bool writes)
{
    Qcow2Inflight *f = s->inflight;
    QB_GUARD(&f->lock);

    *u = (Qcow2User){.seq = f->next_seq++, .prev = f->last, .writes = writes};
    if (f->last) {
        f->last->next = u;
    } else {
        f->first = u;
    }
    f->last = u;
}

void qcow2_user_announce(BDRVQcow2State *s, Qcow2User *u)
{
    announce(s, u, false);
}

void qcow2_user_announce_writing(BDRVQcow2State *s, Qcow2User *u)
{
    announce(s, u, true);
}

void qcow2_user_resolve(BDRVQcow2State *s, Qcow2User *u, uint64_t host, uint64_t bytes)
{
    assert(bytes > 0);
    u->host = host;
    atomic_store(&u->bytes, bytes);
    if (atomic_load(&s->inflight->waiters)) { /* invariant 3 */
        QB_GUARD(&s->inflight->lock);
        qb_cond_broadcast(&s->inflight->left);
    }
}

void qcow2_user_leave(BDRVQcow2State *s, Qcow2User *u)
{
    Qcow2Inflight *f = s->inflight;
    QB_GUARD(&f->lock);

    if (u->prev) {
        u->prev->next = u->next;
    } else {
        f->first = u->next;
    }
    if (u->next) {
        u->next->prev = u->prev;
    } else {
        f->last = u->prev;
    }
    if (f->waiters) {
        qb_cond_broadcast(&f->left);
    }
}

uint64_t qcow2_inflight_seq(BDRVQcow2State *s)
{
    QB_GUARD(&s->inflight->lock);

    return s->inflight->next_seq;
}

uint64_t qcow2_inflight_oldest(BDRVQcow2State *s)
{
    QB_GUARD(&s->inflight->lock);

    return s->inflight->first ? s->inflight->first->seq : s->inflight->next_seq;
}

static bool is_on(const Qcow2User *u, uint64_t host, uint64_t bytes)
{
    uint64_t pinned = atomic_load(&u->bytes);
    return !pinned || qb_ranges_overlap(u->host, pinned, host, bytes);
}

bool qcow2_inflight_busy(BDRVQcow2State *s, uint64_t seq, uint64_t host, uint64_t bytes)
{
    QB_GUARD(&s->inflight->lock);

    for (const Qcow2User *u = s->inflight->first; u && u->seq < seq; u = u->next) {
        if (is_on(u, host, bytes)) {
            return true;
        }
    }
    return false;
}

static bool writer_is_on_locked(const Qcow2Inflight *f, uint64_t seq, uint64_t host,
                                uint64_t bytes)
{
    for (const Qcow2User *u = f->first; u && u->seq < seq; u = u->next) {
        if (u->writes && is_on(u, host, bytes)) {
            return true;
        }
    }
    return false;
}

void qcow2_inflight_wait_writers(BDRVQcow2State *s, uint64_t host, uint64_t bytes)
{
    Qcow2Inflight *f = s->inflight;
    QB_GUARD(&f->lock);
    uint64_t seq = f->next_seq;

    f->waiters++;
    while (writer_is_on_locked(f, seq, host, bytes)) {
        qb_cond_wait(&f->left, &f->lock);
    }
    f->waiters--;
}

void qcow2_inflight_wait(BDRVQcow2State *s, uint64_t seq)
{
    Qcow2Inflight *f = s->inflight;
    QB_GUARD(&f->lock);

    f->waiters++;
    while (f->first && f->first->seq < seq) {
        qb_cond_wait(&f->left, &f->lock);
    }
    f->waiters--;
}
