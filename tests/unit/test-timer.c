/*
 * Timers: functions run when they are due, once for each time they were armed, never two at once.
 *
 * Nothing here depends on how long anything takes, but for small waits that give a wrong
 * implementation the chance to be seen.
 *
 * SPDX-License-Identifier: MIT
 */
#undef NDEBUG
#include "util/pool.h"
#include "util/timer.h"

#include <glib.h>
#include <unistd.h>

#define HOUR_MS 3600000

typedef struct Job {
    QbTimer *timer;
    _Atomic(unsigned) begun, ended;
    _Atomic(bool) hold;   /* the function does not end while it is set */
    unsigned rearm;       /* so many times it arms itself again */
} Job;

static void work(void *opaque)
{
    Job *job = opaque;

    job->begun++;
    while (job->hold) {
        usleep(1000);
    }
    if (job->rearm) {
        job->rearm--;
        qb_timer_arm(job->timer, 0);
    }
    job->ended++;
}

static void wait_for(const _Atomic(unsigned) *counter, unsigned n)
{
    while (*counter < n) {
        usleep(1000);
    }
}

static void job_init(Job *job)
{
    *job = (Job){0};
    job->timer = qb_timer_new(work, job);
}

static void test_order(void)
{
    Job late, soon;

    job_init(&late);
    job_init(&soon);
    qb_timer_arm(late.timer, HOUR_MS);
    qb_timer_arm(soon.timer, 1);
    wait_for(&soon.ended, 1);
    g_assert_cmpuint(late.begun, ==, 0);
    qb_timer_arm(late.timer, 1); /* earlier than before */
    wait_for(&late.ended, 1);
    qb_timer_arm(soon.timer, 1);
    qb_timer_arm(soon.timer, HOUR_MS); /* no later for that */
    wait_for(&soon.ended, 2);
    qb_timer_free(late.timer);
    qb_timer_free(soon.timer);
    g_assert_cmpuint(late.begun, ==, 1);
    g_assert_cmpuint(soon.begun, ==, 2);
}

static void test_armed_while_running(void)
{
    Job job;

    job_init(&job);
    job.hold = true;
    qb_timer_arm(job.timer, 0);
    wait_for(&job.begun, 1);
    qb_timer_arm(job.timer, 0);
    qb_timer_arm(job.timer, 0);
    usleep(20000);
    g_assert_cmpuint(job.begun, ==, 1); /* never two at once */
    job.hold = false;
    wait_for(&job.ended, 2);
    qb_timer_free(job.timer);
    g_assert_cmpuint(job.begun, ==, 2);
}

static void test_arms_itself(void)
{
    Job job;

    job_init(&job);
    job.rearm = 10;
    qb_timer_arm(job.timer, 0);
    wait_for(&job.ended, 11);
    qb_timer_free(job.timer);
    g_assert_cmpuint(job.begun, ==, 11);
}

static void *stop(void *opaque)
{
    Job *job = opaque;

    qb_timer_stop(job->timer);
    g_assert_cmpuint(job->begun, ==, job->ended);
    return NULL;
}

static void test_stop_waits(void)
{
    pthread_t thread;
    Job job;

    job_init(&job);
    job.hold = true;
    job.rearm = 1000000; /* does not keep it from stopping */
    qb_timer_arm(job.timer, 0);
    wait_for(&job.begun, 1);
    g_assert_true(qb_thread_start(&thread, "stop", stop, &job));
    usleep(20000);
    job.hold = false;
    pthread_join(thread, NULL);
    qb_timer_arm(job.timer, 0); /* does nothing now */
    usleep(20000);
    g_assert_cmpuint(job.begun, ==, job.ended);
    qb_timer_free(job.timer);
}

static void test_stop_disarms(void)
{
    for (int i = 0; i < 20; i++) { /* the thread ends with the last timer, and begins anew */
        Job job;
        job_init(&job);
        qb_timer_arm(job.timer, HOUR_MS);
        qb_timer_free(job.timer);
        g_assert_cmpuint(job.begun, ==, 0);
    }
    qb_timer_free(NULL);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/timer/order", test_order);
    g_test_add_func("/timer/armed-while-running", test_armed_while_running);
    g_test_add_func("/timer/arms-itself", test_arms_itself);
    g_test_add_func("/timer/stop-waits", test_stop_waits);
    g_test_add_func("/timer/stop-disarms", test_stop_disarms);
    int ret = g_test_run();
    qb_pools_shutdown();
    return ret;
}
