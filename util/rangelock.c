/*
 * The range lock: overlapping requests of a node take effect in the order of their tickets.
 *
 *   first                                                            last
 *     v                                                               v
 *   [t=3 ENTERED 0..4k] <-> [t=4 GRANTED 64k..1M] <-> [t=7 WAITING 0..128k] <-> [t=8 PLAIN 4k..8k]
 *                                    ^                    |      ^                   |
 *                                    +---- waits for -----+      +---- waits for ----+
 *
 * All requests of the node are in one list in ticket order.  Whether a request is blocked is
 * decided by one function, blocks(), applied to every other request in the list; the header has
 * the rules.
 *
 * Invariants
 *  1. Tickets rise along the list and are never reused, but that a request submitted for another one has
 *     the ticket of that, and stands right behind it.
 *  2. Two granted requests never overlap.
 *  3. waiters is the number of threads that wait; while it is 0 nobody needs to be woken.
 *  4. No cycle of waits: a granted, entered or settled request waits for nothing, any other waits
 *     for such ones or for smaller tickets.  A request that goes from ENTERED to WAITING stops
 *     blocking those with smaller tickets in the same moment, and wakes them.  So does one that is
 *     handed over, which goes back to PLAIN with its ticket.
 *  5. A waiting request is overtaken by none that is submitted later and overlaps it: those see a
 *     smaller ticket.  So nobody starves, but for those who meet a long row of requests that are all
 *     submitted for one: whoever submits them lets others go in between.
 *
 * Not done: no tree of intervals and no condition per waiter.  A node has tens of requests in
 * flight, of which a few overlap; a scan costs a few nanoseconds per request, a leave wakes all
 * waiters.  With hundreds of overlapping serialising requests this
 * becomes quadratic.
 *
 * SPDX-License-Identifier: MIT
 */
#include "util/rangelock.h"
#include "util/checked.h"

static uint64_t end_of(uint64_t offset, uint64_t bytes)
{
    uint64_t end;
    return qb_add_overflow(offset, bytes, &end) ? UINT64_MAX : end;
}

static bool overlap(const QbRangeRequest *a, const QbRangeRequest *b)
{
    bool empty = a->offset == a->end || b->offset == b->end;
    return !empty && a->offset < b->end && b->offset < a->end;
}

/* True when @r, which wants to go on, has to wait for @other: the table in the header. */
static bool blocks(const QbRangeRequest *other, const QbRangeRequest *r)
{
    if (other == r || !overlap(other, r)) {
        return false;
    }
    bool earlier = other->ticket < r->ticket;
    switch (other->state) {
    case QB_RANGE_GRANTED:
        return true;
    case QB_RANGE_WAITING:
        return earlier;
    case QB_RANGE_ENTERED:
        return r->wait_plain || earlier;
    case QB_RANGE_SETTLED:
        return r->wait_plain || (earlier && r->state == QB_RANGE_PLAIN);
    case QB_RANGE_PLAIN:
        return earlier;
    case QB_RANGE_IDLE:
        break;
    }
    assert(!"an idle request is in no list");
    return false;
}

static bool is_blocked_locked(const QbRangeLock *l, const QbRangeRequest *r) QB_REQUIRES(l->lock)
{
    qb_mutex_assert_held(&l->lock);
    for (const QbRangeRequest *other = l->first; other; other = other->next) {
        if (blocks(other, r)) {
            return true;
        }
    }
    return false;
}

static void append_locked(QbRangeLock *l, QbRangeRequest *r) QB_REQUIRES(l->lock)
{
    qb_mutex_assert_held(&l->lock);
    r->prev = l->last;
    r->next = NULL;
    if (l->last) {
        l->last->next = r;
    } else {
        l->first = r;
    }
    l->last = r;
}

static void unlink_locked(QbRangeLock *l, QbRangeRequest *r) QB_REQUIRES(l->lock)
{
    qb_mutex_assert_held(&l->lock);
    if (r->prev) {
        r->prev->next = r->next;
    } else {
        l->first = r->next;
    }
    if (r->next) {
        r->next->prev = r->prev;
    } else {
        l->last = r->prev;
    }
    r->prev = r->next = NULL;
}

void qb_range_lock_init(QbRangeLock *l)
{
    *l = (QbRangeLock){0};
    qb_mutex_init(&l->lock);
    qb_cond_init(&l->changed);
}

void qb_range_lock_destroy(QbRangeLock *l)
{
    assert(!l->first && !l->last && l->waiters == 0);
    qb_cond_destroy(&l->changed);
    qb_mutex_destroy(&l->lock);
}

void qb_range_submit(QbRangeLock *l, QbRangeRequest *r, uint64_t offset, uint64_t bytes)
{
    *r = (QbRangeRequest){
        .offset = offset,
        .end = end_of(offset, bytes),
        .state = QB_RANGE_PLAIN,
    };
    QB_GUARD(&l->lock);
    r->ticket = l->next_ticket++;
    append_locked(l, r);
}

void qb_range_submit_for(QbRangeLock *l, QbRangeRequest *r, const QbRangeRequest *owner,
                         uint64_t offset, uint64_t bytes)
{
    QbRangeRequest *behind = (QbRangeRequest *)owner; /* of the list, which is ours to change */
    *r = (QbRangeRequest){
        .offset = offset,
        .end = end_of(offset, bytes),
        .state = QB_RANGE_PLAIN,
        .ticket = owner->ticket,
    };
    QB_GUARD(&l->lock);
    assert(owner->state == QB_RANGE_GRANTED && !overlap(owner, r));
    if (!behind->next) {
        append_locked(l, r);
        return;
    }
    r->prev = behind;
    r->next = behind->next;
    r->next->prev = r;
    behind->next = r;
}

bool qb_range_contended(QbRangeLock *l)
{
    QB_GUARD(&l->lock);
    return l->waiters > 0;
}

static void wake_locked(QbRangeLock *l) QB_REQUIRES(l->lock)
{
    qb_mutex_assert_held(&l->lock);
    if (l->waiters > 0) {
        qb_cond_broadcast(&l->changed);
    }
}

static void wait_unblocked_locked(QbRangeLock *l, const QbRangeRequest *r) QB_REQUIRES(l->lock)
{
    qb_mutex_assert_held(&l->lock);
    l->waiters++;
    while (is_blocked_locked(l, r)) {
        qb_cond_wait(&l->changed, &l->lock);
    }
    l->waiters--;
}

void qb_range_enter(QbRangeLock *l, QbRangeRequest *r)
{
    QB_GUARD(&l->lock);
    assert(r->state == QB_RANGE_PLAIN);
    wait_unblocked_locked(l, r);
    r->state = QB_RANGE_ENTERED; /* nobody to wake: it blocks whom it blocked before */
}

bool qb_range_try_enter(QbRangeLock *l, QbRangeRequest *r)
{
    QB_GUARD(&l->lock);
    assert(r->state == QB_RANGE_PLAIN);
    if (is_blocked_locked(l, r)) {
        return false;
    }
    r->state = QB_RANGE_ENTERED;
    return true;
}

static void become_waiting_locked(QbRangeLock *l, QbRangeRequest *r) QB_REQUIRES(l->lock)
{
    qb_mutex_assert_held(&l->lock);
    r->state = QB_RANGE_WAITING;
    wake_locked(l); /* invariant 4: it blocks fewer than before */
}

void qb_range_serialise(QbRangeLock *l, QbRangeRequest *r, uint64_t offset, uint64_t bytes,
                        bool wait_plain)
{
    uint64_t end = end_of(offset, bytes);
    QB_GUARD(&l->lock);
    if (r->state == QB_RANGE_GRANTED) {
        assert(offset >= r->offset && end <= r->end);
        assert(r->wait_plain || !wait_plain);
        return;
    }
    assert(r->state == QB_RANGE_PLAIN || r->state == QB_RANGE_ENTERED);
    assert(offset <= r->offset && end >= r->end);
    r->offset = offset;
    r->end = end;
    r->wait_plain = wait_plain;
    become_waiting_locked(l, r);
    wait_unblocked_locked(l, r);
    r->state = QB_RANGE_GRANTED;
}

bool qb_range_try_serialise(QbRangeLock *l, QbRangeRequest *r, uint64_t offset, uint64_t bytes)
{
    QB_GUARD(&l->lock);
    QbRangeRequest as_is = *r;
    assert(r->state == QB_RANGE_PLAIN || r->state == QB_RANGE_ENTERED);
    assert(offset <= r->offset && end_of(offset, bytes) >= r->end);
    r->offset = offset;
    r->end = end_of(offset, bytes);
    r->wait_plain = false;
    r->state = QB_RANGE_WAITING; /* as others would see it who are in the way or not */
    if (is_blocked_locked(l, r)) {
        *r = as_is;
        return false;
    }
    r->state = QB_RANGE_GRANTED;
    return true;
}

/* The neighbours of @r point to it, who has the pointers of who was there. */
static void relink_locked(QbRangeLock *l, QbRangeRequest *r) QB_REQUIRES(l->lock)
{
    qb_mutex_assert_held(&l->lock);
    *(r->prev ? &r->prev->next : &l->first) = r;
    *(r->next ? &r->next->prev : &l->last) = r;
}

void qb_range_hand_over(QbRangeLock *l, QbRangeRequest *from, QbRangeRequest *to, uint64_t offset,
                        uint64_t bytes)
{
    uint64_t end = end_of(offset, bytes);
    QB_GUARD(&l->lock);
    assert(from->state == QB_RANGE_ENTERED || from->state == QB_RANGE_GRANTED);
    assert(from->offset <= offset && end <= from->end);
    *to = (QbRangeRequest){
        .prev = from->prev, .next = from->next, .ticket = from->ticket,
        .offset = offset, .end = end, .state = QB_RANGE_PLAIN,
    };
    relink_locked(l, to);
    *from = (QbRangeRequest){.state = QB_RANGE_IDLE};
    wake_locked(l); /* those that a granted range kept away and a smaller ticket lets through */
}

void qb_range_settle(QbRangeLock *l, QbRangeRequest *r)
{
    QB_GUARD(&l->lock);
    assert(r->state >= QB_RANGE_ENTERED && r->state != QB_RANGE_WAITING);
    if (r->state == QB_RANGE_ENTERED) {
        r->state = QB_RANGE_SETTLED;
        wake_locked(l);
    }
}

void qb_range_leave(QbRangeLock *l, QbRangeRequest *r)
{
    QB_GUARD(&l->lock);
    assert(r->state != QB_RANGE_IDLE && r->state != QB_RANGE_WAITING);
    wake_locked(l);
    unlink_locked(l, r);
    r->state = QB_RANGE_IDLE;
}
