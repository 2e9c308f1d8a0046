/*
 * Worker pools: order of starts, growth and its limit, leaving, ending, and systems without
 * threads.
 *
 * pthread_create is wrapped by the linker, so that the system can refuse threads or be slow.
 *
 * SPDX-License-Identifier: MIT
 */
#include "util/pool.h"

#include <errno.h>
#include <glib.h>

static _Atomic(bool) refuse_threads;
static _Atomic(bool) hold_threads; /* new ones do not get to run yet */
static _Atomic(unsigned) threads_made;

int __real_pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
int __wrap_pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);

typedef struct HeldThread {
    void *(*fn)(void *);
    void *arg;
} HeldThread;

static void *held_thread(void *opaque)
{
    HeldThread held = *(HeldThread *)opaque;
    g_free(opaque);
    while (atomic_load(&hold_threads)) {
        g_usleep(1000);
    }
    return held.fn(held.arg);
}

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*fn)(void *),
                          void *arg)
{
    if (atomic_load(&refuse_threads)) {
        return EAGAIN;
    }
    atomic_fetch_add(&threads_made, 1);
    HeldThread *held = g_new(HeldThread, 1);
    *held = (HeldThread){.fn = fn, .arg = arg};
    return __real_pthread_create(thread, attr, held_thread, held);
}

#define TASKS 200

/* What the tasks of one test share. */
typedef struct Scene {
    QbMutex lock;
    QbCond changed;
    QbPool *pool;
    unsigned started, finished, running, peak;
    unsigned let_through; /* tasks with smaller numbers pass the gate */
    unsigned order[TASKS];
} Scene;

typedef struct Item {
    Scene *scene;
    unsigned number;
} Item;

static void scene_init(Scene *s, unsigned min, unsigned max)
{
    *s = (Scene){0};
    qb_mutex_init(&s->lock);
    qb_cond_init(&s->changed);
    s->pool = qb_pool_new("test", min, max);
}

static void scene_destroy(Scene *s)
{
    qb_pool_free(s->pool);
    qb_cond_destroy(&s->changed);
    qb_mutex_destroy(&s->lock);
}

static void enter_locked(Scene *s, unsigned number)
{
    s->order[s->started++] = number;
    s->running++;
    s->peak = MAX(s->peak, s->running);
    qb_cond_broadcast(&s->changed);
}

static void leave_locked(Scene *s)
{
    s->running--;
    s->finished++;
    qb_cond_broadcast(&s->changed);
}

static void wait_for_started(Scene *s, unsigned n)
{
    QB_GUARD(&s->lock);
    while (s->started < n) {
        qb_cond_wait(&s->changed, &s->lock);
    }
}

/* Lets the tasks whose numbers are below @n pass. */
static void let_through(Scene *s, unsigned n)
{
    QB_GUARD(&s->lock);
    s->let_through = n;
    qb_cond_broadcast(&s->changed);
}

static void open_gate(Scene *s)
{
    let_through(s, UINT_MAX);
}

static void quick_task(void *opaque)
{
    Item *item = opaque;
    QB_GUARD(&item->scene->lock);
    enter_locked(item->scene, item->number);
    leave_locked(item->scene);
}

static void gated_task(void *opaque)
{
    Item *item = opaque;
    Scene *s = item->scene;
    QB_GUARD(&s->lock);
    enter_locked(s, item->number);
    while (item->number >= s->let_through) {
        qb_cond_wait(&s->changed, &s->lock);
    }
    leave_locked(s);
}

static void submit_one(Scene *s, Item *items, unsigned i, void (*fn)(void *))
{
    items[i] = (Item){.scene = s, .number = i};
    qb_pool_submit(s->pool, fn, &items[i]);
}

static void submit_all(Scene *s, Item *items, unsigned n, void (*fn)(void *))
{
    for (unsigned i = 0; i < n; i++) {
        submit_one(s, items, i, fn);
    }
}

static void test_empty(void)
{
    unsigned before = atomic_load(&threads_made);
    qb_pool_free(NULL);
    qb_pool_free(qb_pool_new("idle", 4, 8));
    g_assert_cmpuint(atomic_load(&threads_made), ==, before); /* none before the first task */
}

static void test_fifo(void)
{
    Scene s;
    Item items[TASKS];
    scene_init(&s, 0, 1);
    submit_all(&s, items, TASKS, quick_task);
    scene_destroy(&s);
    g_assert_cmpuint(s.finished, ==, TASKS);
    for (unsigned i = 0; i < TASKS; i++) {
        g_assert_cmpuint(s.order[i], ==, i);
    }
}

/* All tasks block at once: this ends only when the pool grows to one thread per task. */
static void test_grows(void)
{
    Scene s;
    Item items[40];
    scene_init(&s, 0, 40);
    submit_all(&s, items, 40, gated_task);
    wait_for_started(&s, 40);
    open_gate(&s);
    scene_destroy(&s);
    g_assert_cmpuint(s.peak, ==, 40);
}

static void test_maximum(void)
{
    Scene s;
    Item items[TASKS];
    unsigned before = atomic_load(&threads_made);
    scene_init(&s, 0, 3);
    submit_all(&s, items, TASKS, gated_task);
    wait_for_started(&s, 3);
    open_gate(&s);
    scene_destroy(&s);
    g_assert_cmpuint(s.finished, ==, TASKS);
    g_assert_cmpuint(s.peak, ==, 3);
    g_assert_cmpuint(atomic_load(&threads_made) - before, ==, 3);
}

/* One after the other: the thread that is free is used again. */
static void test_reuses(void)
{
    Scene s;
    Item items[50];
    unsigned before = atomic_load(&threads_made);
    scene_init(&s, 0, 8);
    for (unsigned i = 0; i < 50; i++) {
        submit_one(&s, items, i, quick_task);
        wait_for_started(&s, i + 1);
        g_usleep(500); /* time to fall asleep; if it does not suffice one more thread is made */
    }
    scene_destroy(&s);
    g_assert_cmpuint(atomic_load(&threads_made) - before, <=, 8);
    g_assert_cmpuint(s.finished, ==, 50);
}

/* A task is queued, a thread on its way to it: when another thread was faster, the thread on its
 * way does for the next task, and none is started. */
static void test_thread_under_way_is_counted(void)
{
    Scene s;
    Item items[3];
    unsigned before = atomic_load(&threads_made);
    scene_init(&s, 0, 8);
    submit_one(&s, items, 0, gated_task);
    wait_for_started(&s, 1);
    atomic_store(&hold_threads, true);
    submit_one(&s, items, 1, gated_task); /* starts the second thread, which is slow */
    let_through(&s, 1);
    wait_for_started(&s, 2); /* by the first thread, which stays in it */
    submit_one(&s, items, 2, quick_task);
    g_assert_cmpuint(atomic_load(&threads_made) - before, ==, 2);
    atomic_store(&hold_threads, false);
    wait_for_started(&s, 3);
    open_gate(&s);
    scene_destroy(&s);
    g_assert_cmpuint(s.finished, ==, 3);
}

/* Every task waits for the one before it. Ends with two threads, because starts are in order. */
static void chained_task(void *opaque)
{
    Item *item = opaque;
    Scene *s = item->scene;
    QB_GUARD(&s->lock);
    enter_locked(s, item->number);
    while (s->finished < item->number) {
        qb_cond_wait(&s->changed, &s->lock);
    }
    leave_locked(s);
}

static void test_chain(void)
{
    Scene s;
    Item items[TASKS];
    scene_init(&s, 1, 2);
    submit_all(&s, items, TASKS, chained_task);
    scene_destroy(&s);
    g_assert_cmpuint(s.finished, ==, TASKS);
}

/* A task that submits the next one to its own pool; freeing waits for those too. */
static void breeding_task(void *opaque)
{
    Item *item = opaque;
    Scene *s = item->scene;
    quick_task(opaque);
    if (item->number + 1 < TASKS) {
        item->number++;
        qb_pool_submit(s->pool, breeding_task, item);
    }
}

static void test_free_waits_for_offspring(void)
{
    for (int round = 0; round < 20; round++) {
        Scene s;
        scene_init(&s, 0, 4);
        Item item = {.scene = &s};
        qb_pool_submit(s.pool, breeding_task, &item);
        scene_destroy(&s);
        g_assert_cmpuint(s.finished, ==, TASKS);
    }
}

static void test_no_threads_at_all(void)
{
    Scene s;
    Item items[10];
    scene_init(&s, 0, 4);
    atomic_store(&refuse_threads, true);
    submit_all(&s, items, 10, quick_task);
    g_assert_cmpuint(s.finished, ==, 10); /* done when submit returns: in this thread */
    atomic_store(&refuse_threads, false);
    scene_destroy(&s);
}

/* One thread is there: it does all the work, in order. */
static void test_no_more_threads(void)
{
    Scene s;
    Item items[20];
    scene_init(&s, 0, 4);
    submit_all(&s, items, 1, gated_task);
    wait_for_started(&s, 1);
    atomic_store(&refuse_threads, true);
    for (unsigned i = 1; i < 20; i++) {
        submit_one(&s, items, i, quick_task);
    }
    g_assert_cmpuint(s.finished, ==, 0);
    open_gate(&s);
    scene_destroy(&s);
    atomic_store(&refuse_threads, false);
    g_assert_cmpuint(s.finished, ==, 20);
    for (unsigned i = 0; i < 20; i++) {
        g_assert_cmpuint(s.order[i], ==, i);
    }
}

static unsigned count_own_threads(void)
{
    unsigned n = 0;
    g_autoptr(GDir) dir = g_dir_open("/proc/self/task", 0, NULL);
    g_assert_nonnull(dir);
    while (g_dir_read_name(dir)) {
        n++;
    }
    return n;
}

/* A joined thread may still be listed for a moment. */
static void wait_for_own_threads(unsigned n)
{
    for (int i = 0; i < 300 && count_own_threads() != n; i++) {
        g_usleep(100000);
    }
    g_assert_cmpuint(count_own_threads(), ==, n);
}

/* Threads beyond the minimum leave after some seconds without work, the minimum stays. */
static void test_idle_threads_leave(void)
{
    Scene s;
    Item items[15];
    g_usleep(50000); /* for those of the tests before */
    unsigned before = count_own_threads();
    scene_init(&s, 2, 12);
    submit_all(&s, items, 12, gated_task);
    wait_for_started(&s, 12);
    g_assert_cmpuint(count_own_threads(), ==, before + 12);
    open_gate(&s);
    wait_for_own_threads(before + 2);
    g_usleep(1000000);
    g_assert_cmpuint(count_own_threads(), ==, before + 2);
    for (unsigned i = 12; i < 15; i++) {
        submit_one(&s, items, i, quick_task); /* the pool still works */
    }
    scene_destroy(&s);
    g_assert_cmpuint(s.finished, ==, 15);
    wait_for_own_threads(before);
}

/* ---- groups ---- */

typedef struct GroupScene {
    _Atomic(int) done;
    int ret[30];
} GroupScene;

static GroupScene group_scene;

static int group_task(void *opaque)
{
    int i = GPOINTER_TO_INT(opaque);
    atomic_fetch_add(&group_scene.done, 1);
    return group_scene.ret[i];
}

static void test_group(void)
{
    QbTaskGroup g;
    QbPool *pool = qb_pool_new("group", 0, 4);
    group_scene = (GroupScene){.ret = {[3] = 5, [17] = -ENOSPC}}; /* positive is no error */
    qb_group_init(&g);
    g_assert_cmpint(qb_group_wait(&g, 0), ==, 0);
    for (int i = 0; i < 30; i++) {
        qb_group_submit(&g, pool, group_task, GINT_TO_POINTER(i));
        g_assert_cmpint(qb_group_wait(&g, 6), <=, 0);
    }
    g_assert_cmpint(qb_group_wait(&g, 0), ==, -ENOSPC);
    g_assert_cmpint(atomic_load(&group_scene.done), ==, 30);
    qb_group_destroy(&g);
    qb_pool_free(pool);
}

static int wait_for_gate(void *opaque)
{
    gated_task(opaque);
    return 0;
}

/* Waiting for "at most n left" returns while n still run. */
static void test_group_wait_left(void)
{
    Scene s;
    Item items[3];
    QbTaskGroup g;
    scene_init(&s, 0, 3);
    qb_group_init(&g);
    for (unsigned i = 0; i < 3; i++) {
        items[i] = (Item){.scene = &s, .number = i};
        qb_group_submit(&g, s.pool, wait_for_gate, &items[i]);
    }
    g_assert_cmpint(qb_group_wait(&g, 3), ==, 0);
    g_assert_cmpuint(s.finished, ==, 0);
    open_gate(&s);
    g_assert_cmpint(qb_group_wait(&g, 0), ==, 0);
    g_assert_cmpuint(s.finished, ==, 3);
    qb_group_destroy(&g);
    scene_destroy(&s);
}

/* A group that is destroyed the moment it is done, many times: nobody touches it afterwards. */
static void test_group_is_gone_at_once(void)
{
    for (int i = 0; i < 2000; i++) {
        QbTaskGroup *g = g_new(QbTaskGroup, 1);
        qb_group_init(g);
        qb_group_submit(g, qb_compute_pool(), group_task, GINT_TO_POINTER(0));
        qb_group_wait(g, 0);
        qb_group_destroy(g);
        g_free(g);
    }
}

static void *use_global_pools(void *opaque)
{
    QbPool **pools = opaque;
    pools[0] = qb_request_pool();
    pools[1] = qb_file_pool();
    pools[2] = qb_compute_pool();
    return NULL;
}

static void test_global_pools(void)
{
    QbPool *a[3], *b[3];
    pthread_t thread;
    qb_pools_shutdown();
    g_assert_true(qb_thread_start(&thread, "other", use_global_pools, a));
    use_global_pools(b);
    pthread_join(thread, NULL);
    for (int i = 0; i < 3; i++) {
        g_assert_true(a[i] == b[i]);
        g_assert_true(a[i] != a[(i + 1) % 3]);
    }
    qb_pools_shutdown();
    qb_pools_shutdown();
    test_group_is_gone_at_once(); /* made anew */
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/pool/empty", test_empty);
    g_test_add_func("/pool/fifo", test_fifo);
    g_test_add_func("/pool/grows", test_grows);
    g_test_add_func("/pool/maximum", test_maximum);
    g_test_add_func("/pool/reuses", test_reuses);
    g_test_add_func("/pool/thread-under-way-is-counted", test_thread_under_way_is_counted);
    g_test_add_func("/pool/chain", test_chain);
    g_test_add_func("/pool/free-waits-for-offspring", test_free_waits_for_offspring);
    g_test_add_func("/pool/no-threads-at-all", test_no_threads_at_all);
    g_test_add_func("/pool/no-more-threads", test_no_more_threads);
    g_test_add_func("/pool/idle-threads-leave", test_idle_threads_leave);
    g_test_add_func("/group/results", test_group);
    g_test_add_func("/group/wait-left", test_group_wait_left);
    g_test_add_func("/group/gone-at-once", test_group_is_gone_at_once);
    g_test_add_func("/pool/global", test_global_pools);
    int rc = g_test_run();
    qb_pools_shutdown();
    return rc;
}
