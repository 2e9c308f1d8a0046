/*
 * The signal thread: delivery, signals that were ignored, stopping.
 *
 * Each test runs in a child process: signals are the whole process's.
 *
 * SPDX-License-Identifier: MIT
 */
#include "util/signals.h"
#include "util/thread.h"

#include <glib.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static QbMutex lock = QB_MUTEX_INIT;
static unsigned seen[65]; /* guarded by lock */
static pthread_t callback_thread;

static void note(int signum, void *opaque)
{
    QB_GUARD(&lock);
    seen[signum]++;
    callback_thread = pthread_self();
    g_assert_true(opaque == &lock);
}

static unsigned count(int signum)
{
    QB_GUARD(&lock);
    return seen[signum];
}

static void wait_for(int signum, unsigned n)
{
    for (int i = 0; i < 10000 && count(signum) < n; i++) {
        g_usleep(1000);
    }
    g_assert_cmpuint(count(signum), ==, n);
}

static void send(int signum)
{
    g_assert_cmpint(kill(getpid(), signum), ==, 0);
}

static void all_four(void)
{
    static const int signals[] = {SIGINT, SIGTERM, SIGHUP, SIGUSR1};
    g_assert_true(qb_signals_start(note, &lock));
    for (unsigned round = 1; round <= 3; round++) {
        for (size_t i = 0; i < G_N_ELEMENTS(signals); i++) {
            send(signals[i]);
            wait_for(signals[i], round);
        }
    }
    g_assert_false(pthread_equal(callback_thread, pthread_self()));
    qb_signals_stop();
    qb_signals_stop();
}

static void *sleeper(void *unused)
{
    g_usleep(300000);
    return NULL;
}

/* A thread that was not started by us inherits the mask: it cannot be killed instead. */
static void in_foreign_threads(void)
{
    pthread_t thread;
    g_assert_true(qb_signals_start(note, &lock));
    g_assert_cmpint(pthread_create(&thread, NULL, sleeper, NULL), ==, 0);
    for (unsigned i = 1; i <= 20; i++) {
        send(SIGTERM);
        wait_for(SIGTERM, i);
    }
    pthread_join(thread, NULL);
    qb_signals_stop();
}

static void ignored_stay_ignored(void)
{
    signal(SIGHUP, SIG_IGN);
    signal(SIGUSR1, SIG_IGN); /* also the wake-up signal of stop */
    g_assert_true(qb_signals_start(note, &lock));
    send(SIGHUP);
    send(SIGUSR1);
    send(SIGTERM);
    wait_for(SIGTERM, 1);
    g_usleep(50000);
    g_assert_cmpuint(count(SIGHUP), ==, 0);
    g_assert_cmpuint(count(SIGUSR1), ==, 0);
    qb_signals_stop();
}

static void start_again(void)
{
    for (unsigned i = 1; i <= 3; i++) {
        g_assert_true(qb_signals_start(note, &lock));
        send(SIGUSR1);
        wait_for(SIGUSR1, i);
        qb_signals_stop();
    }
    sigset_t mask;
    pthread_sigmask(SIG_SETMASK, NULL, &mask);
    g_assert_false(sigismember(&mask, SIGTERM));
}

/* After the stop a signal does what it did before the start: here it kills. */
static void killed_after_stop(void)
{
    g_assert_true(qb_signals_start(note, &lock));
    qb_signals_stop();
    send(SIGTERM);
}

/* Runs @fn in a child, which never returns into the test program; returns the wait status. */
static int run_in_child(void (*fn)(void))
{
    pid_t child = fork();
    g_assert_cmpint(child, >=, 0);
    if (child == 0) {
        fn();
        _exit(0);
    }
    int status;
    g_assert_cmpint(waitpid(child, &status, 0), ==, child);
    return status;
}

static void check_child(gconstpointer fn)
{
    g_assert_cmpint(run_in_child((void (*)(void))fn), ==, 0);
}

static void test_killed_after_stop(void)
{
    int status = run_in_child(killed_after_stop);
    g_assert_true(WIFSIGNALED(status));
    g_assert_cmpint(WTERMSIG(status), ==, SIGTERM);
}

static void add(const char *path, void (*fn)(void))
{
    g_test_add_data_func(path, (gconstpointer)fn, check_child);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    signal(SIGHUP, SIG_DFL); /* nohup, of all runners, hands it down ignored */
    add("/signals/all-four", all_four);
    add("/signals/in-foreign-threads", in_foreign_threads);
    add("/signals/ignored-stay-ignored", ignored_stay_ignored);
    add("/signals/start-again", start_again);
    g_test_add_func("/signals/killed-after-stop", test_killed_after_stop);
    return g_test_run();
}
