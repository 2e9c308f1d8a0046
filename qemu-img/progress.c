/*
 * Progress and signals of a long verb.
 *
 *      verb thread --> QbProgress (atomics) <-- reporter thread --> stdout
 *      SIGUSR1 ------> reporter prints once      SIGINT, SIGTERM --> QbProgress.cancel
 *
 * The operation only writes numbers; printing happens here, so that a slow terminal never slows a
 * copy.  With -p the reporter looks ten times a second and prints when the shown number changed.
 *
 * Invariants
 * 1. Signals are taken by one thread (util/signals.c); all others have them blocked.
 * 2. A first SIGINT or SIGTERM during a reported operation asks it to stop at its next step; a
 *    second one, or one outside such an operation, ends the process as if the signal were not
 *    caught.
 *
 * SPDX-License-Identifier: MIT
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include "qemu-img/img.h"
#include "util/signals.h"
#include "util/thread.h"

static struct {
    QbMutex lock;
    QbCond wake;
    QbProgress *current; /* guarded by lock; NULL: nothing is reported */
    bool show, stop, running;
    int shown; /* last printed value in 1/100 percent */
    pthread_t thread;
    _Atomic(bool) interrupted;
} reporter;

static void print_percent(double percent)
{
    printf("    (%3.2f/100%%)\r", percent);
    fflush(stdout);
}

static void print_if_changed_locked(void)
{
    double percent = qb_progress_percent(reporter.current);
    int value = (int)(percent * 100);

    if (value != reporter.shown) {
        reporter.shown = value;
        print_percent(percent);
    }
}

static void *reporter_main(void *opaque)
{
    qb_mutex_lock(&reporter.lock);
    while (!reporter.stop) {
        print_if_changed_locked();
        qb_cond_timedwait(&reporter.wake, &reporter.lock, 100);
    }
    qb_mutex_unlock(&reporter.lock);
    return NULL;
}

static void die_by_signal(int sig)
{
    sigset_t set;

    signal(sig, SIG_DFL);
    sigemptyset(&set);
    sigaddset(&set, sig);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    raise(sig);
    _exit(128 + sig);
}

static void on_signal(int sig, void *opaque)
{
    QB_GUARD(&reporter.lock);
    if (sig == SIGUSR1) {
        if (reporter.current) {
            print_percent(qb_progress_percent(reporter.current));
        }
        return;
    }
    if (!reporter.current || atomic_exchange(&reporter.interrupted, true)) {
        die_by_signal(sig);
    }
    atomic_store(&reporter.current->cancel, true);
}

void img_progress_init(void)
{
    qb_mutex_init(&reporter.lock);
    qb_cond_init(&reporter.wake);
    qb_signals_start(on_signal, NULL);
}

void img_progress_start(QbProgress *p, bool show)
{
    QB_GUARD(&reporter.lock);
    reporter.current = p;
    reporter.show = show;
    reporter.stop = false;
    reporter.shown = 0;
    if (show) {
        print_percent(0);
    }
    reporter.running = show && qb_thread_start(&reporter.thread, "progress", reporter_main, NULL);
}

void img_progress_end(bool success)
{
    qb_mutex_lock(&reporter.lock);
    reporter.stop = true;
    qb_cond_broadcast(&reporter.wake);
    qb_mutex_unlock(&reporter.lock);
    if (reporter.running) {
        pthread_join(reporter.thread, NULL);
        reporter.running = false;
    }
    QB_GUARD(&reporter.lock);
    if (reporter.show && reporter.current) {
        if (success) {
            print_percent(100.0);
        }
        printf("\n");
        fflush(stdout);
    }
    reporter.current = NULL;
}

bool img_create_stoppable(const char *name, const char *format, json_t *options, GError **errp)
{
    QbProgress progress;

    qb_progress_init(&progress, 0);
    img_progress_start(&progress, false);
    bool ok = bdrv_img_create(name, format, options, &progress, errp);
    img_progress_end(ok);
    return ok;
}

bool img_interrupted(void)
{
    return atomic_load(&reporter.interrupted);
}
