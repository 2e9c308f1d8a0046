/*
 * What an open image does without being asked.
 *
 *      task       armed by                         does                                     again
 *      release    a free                           flushes, when nothing was freed for 1 s  next free
 *      look       an allocation that finds          reads refcount blocks into the            until all
 *                 blocks not looked at              free-space index                          are seen
 *      clean      a load, every interval            drops tables unused for an interval      while there
 *                                                                                             are tables
 *
 *      armed --timer (util/timer.c)--> a pool thread: graph entry -> bdrv_background_begin()
 *                                        |              the task's step -> end
 *                                        `- quiesced: try again in a second
 *
 * Invariants
 *  1. Nothing is armed before the image is open to the end, and nothing runs after
 *     qcow2_background_stop() has returned; in between a step runs only while the node is not
 *     quiesced, and no operation on the whole node runs beside it.  So a drain, a reopen (which
 *     drains) and a close meet none.
 *  2. Arming costs an atomic exchange when the task is armed already, and may be done under any
 *     lock.
 *  3. A step is short or gives up between its parts when asked to (qcow2_background_wanted()).
 *  4. What fails in a step stays as it was: the next flush, or whoever needs the block, meets the
 *     same error and reports it.  Nothing is tried again by itself, so a broken disk is not hammered.
 *
 * An image that frees nothing, has no unseen blocks and loads no tables has no timer and no thread.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2.h"

#include "util/timer.h"

#define RETRY_MS 1000

typedef struct Task {
    BlockDriverState *bs;
    uint64_t (*step)(BlockDriverState *bs); /* milliseconds until the next one, 0: none */
    QbTimer *timer;
    _Atomic(bool) armed;
} Task;

struct Qcow2Background {
    _Atomic(bool) wanted; /* from the end of open to the beginning of close */
    Task tasks[QCOW2_BG_TASKS];
};

static uint64_t (*const steps[QCOW2_BG_TASKS])(BlockDriverState *bs) = {
    [QCOW2_BG_RELEASE] = qcow2_release_step,
    [QCOW2_BG_LOOK] = qcow2_look_step,
    [QCOW2_BG_CLEAN] = qcow2_cache_clean_step,
};

static bool is_on(const BDRVQcow2State *s)
{
    return s->background && atomic_load(&s->background->wanted);
}

static void arm(Task *t, uint64_t ms)
{
    if (!atomic_exchange(&t->armed, true)) {
        qb_timer_arm(t->timer, ms);
    }
}

static uint64_t step_unless_quiesced(const Task *t)
{
    BDRV_GRAPH_GUARD();
    BdrvRequest req;
    uint64_t again;

    if (!bdrv_background_begin(t->bs, &req)) {
        return RETRY_MS;
    }
    again = t->step(t->bs);
    bdrv_background_end(&req);
    return again;
}

static void run(void *opaque)
{
    Task *t = opaque;
    uint64_t again;

    atomic_store(&t->armed, false); /* before the look: what comes during it arms once more */
    again = is_on(qcow2_state(t->bs)) ? step_unless_quiesced(t) : 0;
    if (again) {
        arm(t, again);
    }
}

struct Qcow2Background *qcow2_background_new(BlockDriverState *bs)
{
    struct Qcow2Background *b = g_new0(struct Qcow2Background, 1);

    for (int i = 0; i < QCOW2_BG_TASKS; i++) {
        b->tasks[i].bs = bs;
        b->tasks[i].step = steps[i];
        b->tasks[i].timer = qb_timer_new(run, &b->tasks[i]);
    }
    return b;
}

void qcow2_background_start(BDRVQcow2State *s)
{
    atomic_store(&s->background->wanted, true);
    if (qcow2_quarantine_bytes(s)) {
        qcow2_background_arm(s, QCOW2_BG_RELEASE, RETRY_MS);
    }
}

/* A step may still arm another task, so that no timer goes before all are stopped. */
void qcow2_background_stop(BDRVQcow2State *s)
{
    if (!s->background) {
        return;
    }
    atomic_store(&s->background->wanted, false);
    for (int i = 0; i < QCOW2_BG_TASKS; i++) {
        qb_timer_stop(s->background->tasks[i].timer);
    }
    for (int i = 0; i < QCOW2_BG_TASKS; i++) {
        qb_timer_free(s->background->tasks[i].timer);
    }
    g_clear_pointer(&s->background, g_free);
}

bool qcow2_background_wanted(const BDRVQcow2State *s)
{
    return is_on(s) && atomic_load(&s->bs->quiesce) == 0;
}

void qcow2_background_arm(BDRVQcow2State *s, Qcow2BackgroundTask task, uint64_t ms)
{
    if (is_on(s)) {
        arm(&s->background->tasks[task], ms);
    }
}

void qcow2_background_hasten(BDRVQcow2State *s, Qcow2BackgroundTask task, uint64_t ms)
{
    if (is_on(s)) {
        atomic_store(&s->background->tasks[task].armed, true);
        qb_timer_arm(s->background->tasks[task].timer, ms);
    }
}
