/*
 * The range lock: who waits for whom, case by case, and a storm of threads with an oracle.
 *
 * Whether a request is blocked is read from its state under the lock, so no test guesses by time.
 *
 * SPDX-License-Identifier: MIT
 */
#include "util/rangelock.h"

#include <glib.h>

#define K 1024

/* A request made in the scene, and the thread that waits for it where it is serialising. */
typedef struct Actor {
    QbRangeLock *lock;
    QbRangeRequest req;
    pthread_t thread;
    uint64_t offset, bytes;
    bool wait_plain;
} Actor;

static QbRangeState state_of(Actor *a)
{
    QB_GUARD(&a->lock->lock);
    return a->req.state;
}

static void submit(QbRangeLock *l, Actor *a, uint64_t offset, uint64_t bytes)
{
    *a = (Actor){.lock = l};
    qb_range_submit(l, &a->req, offset, bytes);
    g_assert_cmpint(state_of(a), ==, QB_RANGE_PLAIN);
}

static void *serialise_thread(void *opaque)
{
    Actor *a = opaque;
    qb_range_serialise(a->lock, &a->req, a->offset, a->bytes, a->wait_plain);
    return NULL;
}

/* Serialises in a thread; returns when the request is either blocked or granted, and says which.
 * Both are decided in one go under the lock, from PLAIN or ENTERED. */
static QbRangeState serialise(Actor *a, uint64_t offset, uint64_t bytes, bool wait_plain)
{
    a->offset = offset;
    a->bytes = bytes;
    a->wait_plain = wait_plain;
    g_assert_true(qb_thread_start(&a->thread, "serialise", serialise_thread, a));
    QbRangeState state;
    while ((state = state_of(a)) != QB_RANGE_WAITING && state != QB_RANGE_GRANTED) {
        g_usleep(100);
    }
    return state;
}

/* Joins the thread of a serialising request that has to be granted by now, or soon. */
static void expect_granted(Actor *a)
{
    pthread_join(a->thread, NULL);
    g_assert_cmpint(state_of(a), ==, QB_RANGE_GRANTED);
}

static void leave(Actor *a)
{
    qb_range_leave(a->lock, &a->req);
    g_assert_cmpint(a->req.state, ==, QB_RANGE_IDLE);
}

static void test_tickets_rise(void)
{
    QbRangeLock l;
    Actor a, b;
    qb_range_lock_init(&l);
    submit(&l, &a, 0, K);
    submit(&l, &b, 0, K);
    g_assert_cmpuint(a.req.ticket, <, b.req.ticket);
    leave(&a); /* given up before it entered */
    submit(&l, &a, 0, K);
    g_assert_cmpuint(b.req.ticket, <, a.req.ticket);
    leave(&b);
    leave(&a);
    qb_range_lock_destroy(&l);
}

/* Plain requests that overlap enter in the order of their tickets, others as they come. */
static void test_plain_requests_in_order(void)
{
    QbRangeLock l;
    Actor a, b, c;
    qb_range_lock_init(&l);
    submit(&l, &a, 0, K);
    submit(&l, &b, K - 1, K);
    submit(&l, &c, 4 * K, K);
    g_assert_true(qb_range_try_enter(&l, &c.req));
    g_assert_false(qb_range_try_enter(&l, &b.req));
    qb_range_enter(&l, &a.req);
    g_assert_cmpint(state_of(&a), ==, QB_RANGE_ENTERED);
    g_assert_false(qb_range_try_enter(&l, &b.req));
    leave(&a);
    g_assert_true(qb_range_try_enter(&l, &b.req));
    leave(&b);
    leave(&c);
    qb_range_lock_destroy(&l);
}

/* Who takes another's place is as early as that one was, with a smaller range. */
static void test_handed_over(void)
{
    QbRangeLock l;
    Actor before, a, later, beside;
    QbRangeRequest heir;
    qb_range_lock_init(&l);
    submit(&l, &before, 8 * K, K);
    submit(&l, &a, 4 * K, K);
    submit(&l, &later, 4 * K, K);
    submit(&l, &beside, 6 * K, K);
    g_assert_true(qb_range_try_serialise(&l, &a.req, 4 * K, 4 * K));
    g_assert_false(qb_range_try_enter(&l, &beside.req));
    qb_range_hand_over(&l, &a.req, &heir, 4 * K, K);
    g_assert_cmpint(a.req.state, ==, QB_RANGE_IDLE);
    g_assert_true(qb_range_try_enter(&l, &beside.req));
    g_assert_false(qb_range_try_enter(&l, &later.req));
    g_assert_true(qb_range_try_enter(&l, &heir));
    leave(&before);
    leave(&beside);
    qb_range_leave(&l, &heir);
    g_assert_true(qb_range_try_enter(&l, &later.req));
    leave(&later);
    qb_range_lock_destroy(&l);
}

/* A granted request blocks plain ones that overlap it. */
static void test_granted_blocks_plain(void)
{
    QbRangeLock l;
    Actor s, later, beside;
    qb_range_lock_init(&l);
    submit(&l, &s, 4 * K, 4 * K);
    submit(&l, &later, 7 * K, 2 * K);
    submit(&l, &beside, 9 * K, K);
    g_assert_cmpint(serialise(&s, 4 * K, 4 * K, false), ==, QB_RANGE_GRANTED);
    expect_granted(&s);
    g_assert_false(qb_range_try_enter(&l, &later.req));
    g_assert_true(qb_range_try_enter(&l, &beside.req));
    leave(&s);
    g_assert_true(qb_range_try_enter(&l, &later.req));
    leave(&later);
    leave(&beside);
    qb_range_lock_destroy(&l);
}

/* Without waiting: granted if nobody is in the way, else as if it had not been asked. */
static void test_try_serialise(void)
{
    QbRangeLock l;
    Actor earlier, entered, r, beside;
    qb_range_lock_init(&l);
    submit(&l, &earlier, 0, K);
    submit(&l, &entered, 3 * K, K);
    submit(&l, &r, K, K);
    submit(&l, &beside, 4 * K, K);
    g_assert_true(qb_range_try_enter(&l, &entered.req));
    g_assert_true(qb_range_try_enter(&l, &r.req));
    g_assert_false(qb_range_try_serialise(&l, &r.req, 0, 4 * K)); /* the earlier one may, too */
    g_assert_cmpint(state_of(&r), ==, QB_RANGE_ENTERED);
    g_assert_cmpuint(r.req.offset, ==, K);
    g_assert_cmpuint(r.req.end, ==, 2 * K);
    g_assert_false(qb_range_try_serialise(&l, &r.req, K, 3 * K)); /* so may one that entered */
    qb_range_settle(&l, &entered.req);
    g_assert_true(qb_range_try_serialise(&l, &r.req, K, 3 * K));
    g_assert_cmpint(state_of(&r), ==, QB_RANGE_GRANTED);
    g_assert_true(qb_range_try_serialise(&l, &beside.req, 4 * K, K));
    leave(&beside);
    submit(&l, &beside, 2 * K, K);
    g_assert_false(qb_range_try_serialise(&l, &beside.req, 2 * K, K));
    leave(&r);
    g_assert_true(qb_range_try_serialise(&l, &beside.req, 2 * K, K));
    leave(&beside);
    leave(&entered);
    leave(&earlier);
    qb_range_lock_destroy(&l);
}

/* A waiting request blocks later plain ones only. */
static void test_waiting_blocks_later_plain(void)
{
    QbRangeLock l;
    Actor holder, earlier, s, later;
    qb_range_lock_init(&l);
    submit(&l, &holder, 0, K);
    submit(&l, &earlier, K, K);
    submit(&l, &s, 0, 2 * K);
    submit(&l, &later, K, K);
    g_assert_cmpint(serialise(&holder, 0, K, false), ==, QB_RANGE_GRANTED);
    expect_granted(&holder);
    g_assert_cmpint(serialise(&s, 0, 2 * K, false), ==, QB_RANGE_WAITING);
    g_assert_true(qb_range_try_enter(&l, &earlier.req));
    qb_range_settle(&l, &earlier.req);
    g_assert_false(qb_range_try_enter(&l, &later.req));
    leave(&holder);
    expect_granted(&s); /* it does not wait for plain ones that have settled */
    leave(&s);
    leave(&earlier);
    g_assert_true(qb_range_try_enter(&l, &later.req));
    leave(&later);
    qb_range_lock_destroy(&l);
}

/* Serialising requests that overlap are granted in the order of their tickets. */
static void test_serialising_in_ticket_order(void)
{
    QbRangeLock l;
    Actor first, a, b, c;
    qb_range_lock_init(&l);
    submit(&l, &first, 0, 10 * K);
    submit(&l, &a, 0, K);
    submit(&l, &b, 0, 2 * K);
    submit(&l, &c, K, K);
    serialise(&first, 0, 10 * K, false);
    expect_granted(&first);
    /* They ask in the wrong order. */
    g_assert_cmpint(serialise(&c, K, K, false), ==, QB_RANGE_WAITING);
    g_assert_cmpint(serialise(&b, 0, 2 * K, false), ==, QB_RANGE_WAITING);
    g_assert_cmpint(serialise(&a, 0, K, false), ==, QB_RANGE_WAITING);
    leave(&first);
    expect_granted(&a);
    g_assert_cmpint(state_of(&b), ==, QB_RANGE_WAITING);
    g_assert_cmpint(state_of(&c), ==, QB_RANGE_WAITING); /* not past b, though free of a */
    leave(&a);
    expect_granted(&b);
    g_assert_cmpint(state_of(&c), ==, QB_RANGE_WAITING);
    leave(&b);
    expect_granted(&c);
    leave(&c);
    qb_range_lock_destroy(&l);
}

/* An earlier one that has not entered may still serialise: who asks first does not overtake it. */
static void test_earlier_ticket_goes_first(void)
{
    QbRangeLock l;
    Actor a, b;
    qb_range_lock_init(&l);
    submit(&l, &a, 0, K);
    submit(&l, &b, 0, K);
    g_assert_cmpint(serialise(&b, 0, K, false), ==, QB_RANGE_WAITING);
    serialise(&a, 0, K, false);
    expect_granted(&a);
    g_assert_cmpint(state_of(&b), ==, QB_RANGE_WAITING);
    leave(&a);
    expect_granted(&b);
    leave(&b);
    qb_range_lock_destroy(&l);
}

/* Granted already: an earlier ticket that widens into its range has to wait. */
static void test_late_earlier_ticket_waits(void)
{
    QbRangeLock l;
    Actor a, b;
    qb_range_lock_init(&l);
    submit(&l, &a, 0, K);
    submit(&l, &b, K, K);
    serialise(&b, K, K, false);
    expect_granted(&b);
    g_assert_cmpint(serialise(&a, 0, 2 * K, false), ==, QB_RANGE_WAITING);
    leave(&b);
    expect_granted(&a);
    leave(&a);
    qb_range_lock_destroy(&l);
}

static void test_wait_plain(void)
{
    QbRangeLock l;
    Actor entered, plain_earlier, plain_later, beside, s;
    qb_range_lock_init(&l);
    submit(&l, &plain_earlier, 0, K);
    submit(&l, &entered, K, K);
    submit(&l, &s, 0, 2 * K);
    submit(&l, &plain_later, 0, K);
    submit(&l, &beside, 2 * K, K);
    g_assert_true(qb_range_try_enter(&l, &entered.req));
    g_assert_true(qb_range_try_enter(&l, &beside.req));
    g_assert_cmpint(serialise(&s, 0, 2 * K, true), ==, QB_RANGE_WAITING);
    /* A waiting request that is later does not block it. */
    g_assert_true(qb_range_try_enter(&l, &plain_earlier.req));
    g_assert_false(qb_range_try_enter(&l, &plain_later.req));
    leave(&plain_earlier);
    g_assert_cmpint(state_of(&s), ==, QB_RANGE_WAITING);
    leave(&entered);
    expect_granted(&s); /* plain_later, not entered, is not waited for */
    leave(&s);
    leave(&plain_later);
    leave(&beside);
    qb_range_lock_destroy(&l);
}

/* What was submitted earlier is waited for before it has entered; it may still be in a queue. */
static void test_wait_plain_not_entered(void)
{
    QbRangeLock l;
    Actor plain, s;
    qb_range_lock_init(&l);
    submit(&l, &plain, 0, K);
    submit(&l, &s, 0, K);
    g_assert_cmpint(serialise(&s, 0, K, true), ==, QB_RANGE_WAITING);
    leave(&plain);
    expect_granted(&s);
    leave(&s);
    qb_range_lock_destroy(&l);
}

/* An entered request that serialises stops blocking an earlier one that waits for plain ones: if it
 * did not, both would wait for ever. */
static void test_entered_turns_serialising(void)
{
    QbRangeLock l;
    Actor a, b;
    qb_range_lock_init(&l);
    submit(&l, &a, 0, K);
    submit(&l, &b, K, K);
    g_assert_true(qb_range_try_enter(&l, &b.req));
    g_assert_cmpint(serialise(&a, 0, 2 * K, true), ==, QB_RANGE_WAITING);
    g_assert_cmpint(serialise(&b, 0, 2 * K, true), ==, QB_RANGE_WAITING);
    expect_granted(&a);
    g_assert_cmpint(state_of(&b), ==, QB_RANGE_WAITING);
    leave(&a);
    expect_granted(&b);
    leave(&b);
    qb_range_lock_destroy(&l);
}

/* Nor does it lose its turn to a later one, unless it has said that it will not serialise. */
static void test_entered_keeps_its_turn(void)
{
    QbRangeLock l;
    Actor a, b;
    for (int settled = 0; settled < 2; settled++) {
        qb_range_lock_init(&l);
        submit(&l, &a, 0, K);
        submit(&l, &b, 0, K);
        g_assert_true(qb_range_try_enter(&l, &a.req));
        g_assert_cmpint(serialise(&b, 0, K, false), ==, QB_RANGE_WAITING);
        if (settled) {
            qb_range_settle(&l, &a.req);
            expect_granted(&b);
            leave(&a);
        } else {
            serialise(&a, 0, K, false);
            expect_granted(&a);
            g_assert_cmpint(state_of(&b), ==, QB_RANGE_WAITING);
            leave(&a);
            expect_granted(&b);
        }
        leave(&b);
        qb_range_lock_destroy(&l);
    }
}

static void test_widening(void)
{
    QbRangeLock l;
    Actor a, b;
    qb_range_lock_init(&l);
    submit(&l, &a, 5 * K, 1);
    submit(&l, &b, 4 * K, 1);
    g_assert_cmpint(serialise(&a, 4 * K, 4 * K, false), ==, QB_RANGE_GRANTED);
    expect_granted(&a);
    g_assert_false(qb_range_try_enter(&l, &b.req));
    /* Again, for a part of it: nothing happens. */
    qb_range_serialise(&l, &a.req, 5 * K, K, false);
    g_assert_cmpuint(a.req.offset, ==, 4 * K);
    g_assert_cmpuint(a.req.end, ==, 8 * K);
    leave(&a);
    leave(&b);
    qb_range_lock_destroy(&l);
}

static void test_infinity_and_nothing(void)
{
    QbRangeLock l;
    Actor all, far, nothing, before;
    qb_range_lock_init(&l);
    submit(&l, &all, K, UINT64_MAX);
    submit(&l, &far, UINT64_MAX - K, K);
    submit(&l, &nothing, 2 * K, 0);
    submit(&l, &before, 0, K);
    g_assert_cmpuint(all.req.end, ==, UINT64_MAX);
    serialise(&all, K, UINT64_MAX, true);
    expect_granted(&all);
    g_assert_false(qb_range_try_enter(&l, &far.req));
    g_assert_true(qb_range_try_enter(&l, &nothing.req));
    g_assert_true(qb_range_try_enter(&l, &before.req));
    leave(&all);
    leave(&far);
    leave(&nothing);
    leave(&before);
    qb_range_lock_destroy(&l);
}

static void *enter_thread(void *opaque)
{
    Actor *a = opaque;
    qb_range_enter(a->lock, &a->req);
    return NULL;
}

/* The blocking form of entering: goes on when the way is free. */
static void test_enter_waits(void)
{
    QbRangeLock l;
    Actor s, p;
    qb_range_lock_init(&l);
    submit(&l, &s, 0, K);
    submit(&l, &p, 0, K);
    serialise(&s, 0, K, false);
    expect_granted(&s);
    g_assert_true(qb_thread_start(&p.thread, "enter", enter_thread, &p));
    g_usleep(20000);
    g_assert_cmpint(state_of(&p), ==, QB_RANGE_PLAIN);
    leave(&s);
    pthread_join(p.thread, NULL);
    g_assert_cmpint(state_of(&p), ==, QB_RANGE_ENTERED);
    leave(&p);
    qb_range_lock_destroy(&l);
}

/* ---- the storm ---- */

#define SLOTS 16
#define STORM_THREADS 6
#define STORM_ROUNDS 1500

typedef struct Storm {
    QbRangeLock lock;
    /* Plain memory, written by serialising requests that wait for plain ones and read by all: the
     * range lock is all there is between the threads, and the thread sanitizer watches. */
    unsigned slots[SLOTS];
    _Atomic(int) readers[SLOTS], writers[SLOTS];
} Storm;

static Storm storm;

static void write_slots(unsigned from, unsigned to)
{
    for (unsigned i = from; i < to; i++) {
        g_assert_cmpint(atomic_fetch_add(&storm.writers[i], 1), ==, 0);
        g_assert_cmpint(atomic_load(&storm.readers[i]), ==, 0);
        storm.slots[i]++;
    }
    for (unsigned i = from; i < to; i++) {
        atomic_fetch_sub(&storm.writers[i], 1);
    }
}

static unsigned read_slots(unsigned from, unsigned to)
{
    unsigned sum = 0;
    for (unsigned i = from; i < to; i++) {
        atomic_fetch_add(&storm.readers[i], 1);
        g_assert_cmpint(atomic_load(&storm.writers[i]), ==, 0);
        sum += storm.slots[i];
    }
    for (unsigned i = from; i < to; i++) {
        atomic_fetch_sub(&storm.readers[i], 1);
    }
    return sum;
}

/* Plain, serialising, and plain that widens to serialising, in turn at random. */
static void storm_round(GRand *rnd, unsigned *written)
{
    QbRangeRequest r;
    unsigned from = (unsigned)g_rand_int_range(rnd, 0, SLOTS);
    unsigned to = (unsigned)g_rand_int_range(rnd, (gint32)from + 1, SLOTS + 1);
    int kind = g_rand_int_range(rnd, 0, 4);
    qb_range_submit(&storm.lock, &r, from, to - from);
    if (kind < 2) {
        qb_range_enter(&storm.lock, &r);
        read_slots(from, to);
    } else {
        if (kind == 3) {
            qb_range_enter(&storm.lock, &r);
            read_slots(from, to);
            from = from ? from - 1 : 0;
        }
        qb_range_serialise(&storm.lock, &r, from, to - from, true);
        write_slots(from, to);
        *written += to - from;
    }
    qb_range_leave(&storm.lock, &r);
}

static void *storm_thread(void *opaque)
{
    unsigned *written = opaque;
    g_autoptr(GRand) rnd = g_rand_new_with_seed(*written);
    *written = 0;
    for (int i = 0; i < STORM_ROUNDS; i++) {
        storm_round(rnd, written);
    }
    return NULL;
}

static void test_storm(void)
{
    pthread_t threads[STORM_THREADS];
    unsigned written[STORM_THREADS], expected = 0, found = 0;
    qb_range_lock_init(&storm.lock);
    for (int i = 0; i < STORM_THREADS; i++) {
        written[i] = (unsigned)g_test_rand_int(); /* the seed, at first */
        g_assert_true(qb_thread_start(&threads[i], "storm", storm_thread, &written[i]));
    }
    for (int i = 0; i < STORM_THREADS; i++) {
        pthread_join(threads[i], NULL);
        expected += written[i];
    }
    for (int i = 0; i < SLOTS; i++) {
        found += storm.slots[i];
    }
    g_assert_cmpuint(found, ==, expected);
    qb_range_lock_destroy(&storm.lock);
}

/* A part of a granted request's work elsewhere: it waits for nobody who waits for that request. */
static void test_submitted_for_another(void)
{
    QbRangeLock l;
    QbRangeRequest owner, across, before, part;
    qb_range_lock_init(&l);
    qb_range_submit(&l, &owner, 100, UINT64_MAX);
    qb_range_serialise(&l, &owner, 100, UINT64_MAX, true);
    qb_range_submit(&l, &across, 50, 100);
    g_assert_false(qb_range_try_enter(&l, &across)); /* it waits for the owner */
    qb_range_submit(&l, &before, 0, 10);
    qb_range_submit_for(&l, &part, &owner, 0, 100);
    qb_range_serialise(&l, &part, 0, 100, true); /* does not wait for either */
    g_assert_false(qb_range_try_enter(&l, &before));
    g_assert_false(qb_range_contended(&l));
    qb_range_leave(&l, &part);
    g_assert_true(qb_range_try_enter(&l, &before));
    qb_range_leave(&l, &before);
    qb_range_leave(&l, &owner);
    g_assert_true(qb_range_try_enter(&l, &across));
    qb_range_leave(&l, &across);
    qb_range_lock_destroy(&l);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/rangelock/handed-over", test_handed_over);
    g_test_add_func("/rangelock/tickets-rise", test_tickets_rise);
    g_test_add_func("/rangelock/plain-in-order", test_plain_requests_in_order);
    g_test_add_func("/rangelock/try-serialise", test_try_serialise);
    g_test_add_func("/rangelock/granted-blocks-plain", test_granted_blocks_plain);
    g_test_add_func("/rangelock/waiting-blocks-later-plain", test_waiting_blocks_later_plain);
    g_test_add_func("/rangelock/serialising-in-ticket-order", test_serialising_in_ticket_order);
    g_test_add_func("/rangelock/earlier-ticket-goes-first", test_earlier_ticket_goes_first);
    g_test_add_func("/rangelock/late-earlier-ticket-waits", test_late_earlier_ticket_waits);
    g_test_add_func("/rangelock/wait-plain", test_wait_plain);
    g_test_add_func("/rangelock/wait-plain-not-entered", test_wait_plain_not_entered);
    g_test_add_func("/rangelock/entered-turns-serialising", test_entered_turns_serialising);
    g_test_add_func("/rangelock/entered-keeps-its-turn", test_entered_keeps_its_turn);
    g_test_add_func("/rangelock/widening", test_widening);
    g_test_add_func("/rangelock/infinity-and-nothing", test_infinity_and_nothing);
    g_test_add_func("/rangelock/enter-waits", test_enter_waits);
    g_test_add_func("/rangelock/submitted-for-another", test_submitted_for_another);
    g_test_add_func("/rangelock/storm", test_storm);
    return g_test_run();
}
