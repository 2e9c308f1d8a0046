/*
 * Worker pools: threads that run tasks in the order they were submitted.
 *
 *   submit --> a thread sleeps? --yes--> hand the task to the one that slept last
 *                    | no
 *                    v
 *              queue [t5 t6 t7] <--- each thread takes the head when its task is done
 *                    |
 *                    +--> more tasks than threads under way to them: start one (to the maximum)
 *
 *   sleepers: top -> [thread C] -> [thread A] -> [thread B]    a stack; each has its own condition
 *
 * The stack of sleepers lets the threads that are not needed sleep undisturbed until their time is
 * up; a shared condition would wake them in turn and none would ever leave.
 *
 * Invariants (all under the pool's lock)
 *  1. Sleepers and queued tasks never exist together; so handing a task to a sleeper overtakes
 *     none.
 *  2. Every queued task has a thread that is being started for it, or the pool is at its maximum,
 *     or the system gave no more threads; a thread never ends while a task is queued.
 *  3. threads counts those that may still touch the pool, from before they are started until they
 *     have put themselves into last_left.  Each leaving thread joins the one that left before it,
 *     so joining last_left joins all.
 *
 * Not done: no priorities, no cancelling, no limit of the queue: who submits must bound its own
 * tasks.
 *
 * SPDX-License-Identifier: MIT
 */
#include "util/pool.h"

#include <glib.h>

#define IDLE_MS 5000

/* Requests block in breakpoints, throttles and locks: many threads, nearly all asleep. */
#define REQUEST_THREADS 1024
#define FILE_THREADS 64

typedef struct Task Task;
struct Task {
    void (*fn)(void *);
    void *opaque;
    Task *next;
};

/* Lives on the stack of the sleeping thread, from when it is pushed until it is popped. */
typedef struct Sleeper Sleeper;
struct Sleeper {
    QbCond wake;
    bool popped; /* by somebody else; task is then what to do, NULL: the pool closes */
    Task *task;
    Sleeper *next;
};

struct QbPool {
    /* set when made */
    char *name;
    unsigned min, max;
    QbMutex lock;
    QbCond all_left;
    /* guarded by lock */
    Task *head, **tail;
    unsigned queued;
    unsigned threads;  /* invariant 3 */
    unsigned starting; /* of these, not yet at their first task */
    Sleeper *sleepers;
    bool closing;
    bool any_left;
    pthread_t last_left; /* when any_left */
};

QbPool *qb_pool_new(const char *name, unsigned min, unsigned max)
{
    assert(max > 0 && min <= max);
    QbPool *pool = g_new0(QbPool, 1);
    pool->name = g_strdup(name);
    pool->min = min;
    pool->max = max;
    pool->tail = &pool->head;
    qb_mutex_init(&pool->lock);
    qb_cond_init(&pool->all_left);
    return pool;
}

static void run(Task *task)
{
    Task copy = *task;
    g_free(task);
    copy.fn(copy.opaque);
}

static Task *take_locked(QbPool *pool) QB_REQUIRES(pool->lock)
{
    qb_mutex_assert_held(&pool->lock);
    Task *task = pool->head;
    if (task) {
        pool->head = task->next;
        pool->tail = pool->head ? pool->tail : &pool->head;
        pool->queued--;
    }
    return task;
}

static void append_locked(QbPool *pool, Task *task) QB_REQUIRES(pool->lock)
{
    qb_mutex_assert_held(&pool->lock);
    *pool->tail = task;
    pool->tail = &task->next;
    pool->queued++;
}

/* Wakes the thread that slept last, with @task or, at the end, without. */
static void wake_locked(QbPool *pool, Task *task) QB_REQUIRES(pool->lock)
{
    qb_mutex_assert_held(&pool->lock);
    Sleeper *s = pool->sleepers;
    pool->sleepers = s->next;
    s->popped = true;
    s->task = task;
    qb_cond_signal(&s->wake);
}

static void unlink_sleeper_locked(QbPool *pool, const Sleeper *s) QB_REQUIRES(pool->lock)
{
    qb_mutex_assert_held(&pool->lock);
    Sleeper **link = &pool->sleepers;
    while (*link != s) {
        link = &(*link)->next;
    }
    *link = s->next;
}

/* Sleeps until there is a task; NULL when the thread shall leave. */
static Task *sleep_locked(QbPool *pool) QB_REQUIRES(pool->lock)
{
    qb_mutex_assert_held(&pool->lock);
    assert(!pool->head);
    Sleeper me = {.next = pool->sleepers};
    qb_cond_init(&me.wake);
    pool->sleepers = &me;
    bool late = false;
    while (!me.popped && !(late && pool->threads > pool->min)) {
        late = !qb_cond_timedwait(&me.wake, &pool->lock, IDLE_MS);
    }
    if (!me.popped) {
        unlink_sleeper_locked(pool, &me);
    }
    qb_cond_destroy(&me.wake);
    return me.task;
}

/* The next task of the calling thread, or NULL when it shall leave. */
static Task *next_task_locked(QbPool *pool) QB_REQUIRES(pool->lock)
{
    Task *task = take_locked(pool);
    return task || pool->closing ? task : sleep_locked(pool);
}

/* Leaves the pool (invariant 3). Behind the unlock the pool may be gone. */
static void leave(QbPool *pool) QB_RELEASE(pool->lock)
{
    qb_mutex_assert_held(&pool->lock);
    bool have_earlier = pool->any_left;
    pthread_t earlier = pool->last_left;
    pool->any_left = true;
    pool->last_left = pthread_self();
    if (--pool->threads == 0) {
        qb_cond_signal(&pool->all_left);
    }
    qb_mutex_unlock(&pool->lock);
    if (have_earlier) {
        pthread_join(earlier, NULL);
    }
}

static void *worker(void *opaque)
{
    QbPool *pool = opaque;
    Task *task;
    qb_mutex_lock(&pool->lock);
    pool->starting--;
    while ((task = next_task_locked(pool))) {
        qb_mutex_unlock(&pool->lock);
        run(task);
        qb_mutex_lock(&pool->lock);
    }
    leave(pool);
    return NULL;
}

/* Gives @task to a thread; true when one more has to be started, which is then accounted for. */
static bool enqueue(QbPool *pool, Task *task)
{
    QB_GUARD(&pool->lock);
    if (pool->sleepers) {
        assert(!pool->head);
        wake_locked(pool, task);
        return false;
    }
    append_locked(pool, task);
    if (pool->queued <= pool->starting || pool->threads == pool->max) {
        return false;
    }
    pool->threads++;
    pool->starting++;
    return true;
}

/* Takes back what enqueue() accounted for; the next task when there is no thread to do it. */
static Task *start_failed(QbPool *pool)
{
    QB_GUARD(&pool->lock);
    pool->threads--;
    pool->starting--;
    return pool->threads == 0 ? take_locked(pool) : NULL;
}

static Task *next_orphan(QbPool *pool)
{
    QB_GUARD(&pool->lock);
    return pool->threads == 0 ? take_locked(pool) : NULL;
}

void qb_pool_submit(QbPool *pool, void (*fn)(void *), void *opaque)
{
    Task *task = g_new(Task, 1);
    *task = (Task){.fn = fn, .opaque = opaque};
    if (!enqueue(pool, task)) {
        return;
    }
    pthread_t thread;
    if (qb_thread_start(&thread, pool->name, worker, pool)) {
        return;
    }
    for (task = start_failed(pool); task; task = next_orphan(pool)) {
        run(task);
    }
}

static void close_and_wait(QbPool *pool)
{
    QB_GUARD(&pool->lock);
    pool->closing = true;
    while (pool->sleepers) {
        wake_locked(pool, NULL);
    }
    while (pool->threads > 0) {
        qb_cond_wait(&pool->all_left, &pool->lock);
    }
    assert(!pool->head && !pool->sleepers);
}

void qb_pool_free(QbPool *pool)
{
    if (!pool) {
        return;
    }
    close_and_wait(pool);
    if (pool->any_left) {
        pthread_join(pool->last_left, NULL);
    }
    qb_cond_destroy(&pool->all_left);
    qb_mutex_destroy(&pool->lock);
    g_free(pool->name);
    g_free(pool);
}

/* The process-wide pools.  The lock is for making and freeing; readers load the pointer, which
 * is stored with release order after the pool is complete. */
static QbMutex global_lock = QB_MUTEX_INIT;
static _Atomic(QbPool *) request_pool, file_pool, compute_pool;

static QbPool *global_pool(_Atomic(QbPool *) *where, const char *name, unsigned max)
{
    QbPool *pool = atomic_load_explicit(where, memory_order_acquire);
    if (pool) {
        return pool;
    }
    QB_GUARD(&global_lock);
    pool = atomic_load_explicit(where, memory_order_relaxed);
    if (!pool) {
        pool = qb_pool_new(name, 0, max);
        atomic_store_explicit(where, pool, memory_order_release);
    }
    return pool;
}

QbPool *qb_request_pool(void)
{
    return global_pool(&request_pool, "request", REQUEST_THREADS);
}

QbPool *qb_file_pool(void)
{
    return global_pool(&file_pool, "file-io", FILE_THREADS);
}

QbPool *qb_compute_pool(void)
{
    return global_pool(&compute_pool, "compute", qb_cpu_count());
}

void qb_pools_shutdown(void)
{
    /* In this order: requests use the other two. */
    qb_pool_free(atomic_exchange(&request_pool, NULL));
    qb_pool_free(atomic_exchange(&compute_pool, NULL));
    qb_pool_free(atomic_exchange(&file_pool, NULL));
}

/* One member of a group on its way through a pool. */
typedef struct GroupTask {
    QbTaskGroup *group;
    int (*fn)(void *);
    void *opaque;
} GroupTask;

void qb_group_init(QbTaskGroup *g)
{
    *g = (QbTaskGroup){0};
    qb_mutex_init(&g->lock);
    qb_cond_init(&g->done);
}

void qb_group_destroy(QbTaskGroup *g)
{
    assert(g->running == 0);
    qb_cond_destroy(&g->done);
    qb_mutex_destroy(&g->lock);
}

static void group_run(void *opaque)
{
    GroupTask task = *(GroupTask *)opaque;
    g_free(opaque);
    int ret = task.fn(task.opaque);
    /* Signalled with the lock held: whoever waits may destroy the group right after. */
    QB_GUARD(&task.group->lock);
    if (ret < 0 && task.group->first_error == 0) {
        task.group->first_error = ret;
    }
    task.group->running--;
    qb_cond_broadcast(&task.group->done);
}

static void group_add(QbTaskGroup *g)
{
    QB_GUARD(&g->lock);
    g->running++;
}

void qb_group_submit(QbTaskGroup *g, QbPool *pool, int (*fn)(void *), void *opaque)
{
    GroupTask *task = g_new(GroupTask, 1);
    *task = (GroupTask){.group = g, .fn = fn, .opaque = opaque};
    group_add(g);
    qb_pool_submit(pool, group_run, task);
}

int qb_group_wait(QbTaskGroup *g, unsigned left)
{
    QB_GUARD(&g->lock);
    while (g->running > left) {
        qb_cond_wait(&g->done, &g->lock);
    }
    return g->first_error;
}
