/*
 * The signal thread of a tool.
 *
 *   kill(2), ^C --> pending in the process, blocked in every thread
 *                        |
 *                        v  sigwait()
 *                  the signal thread --> on_signal(signum, opaque)
 *                        ^
 *   qb_signals_stop() ---+  SIGUSR1 to this thread alone, after `stopping` is set
 *
 * Invariants
 *  1. The set waited for never contains a signal that was ignored: Linux would queue it while it is
 *     blocked, and a tool under nohup would be stopped by a SIGHUP.
 *  2. SIGUSR1 is blocked also when it was ignored, for the wake-up; then it is not reported.
 *  3. Everything below is written before the thread starts and read by it only, but for `stopping`.
 *
 * Not done: no chain of callbacks; a tool has one place that decides what a signal means.
 *
 * SPDX-License-Identifier: MIT
 */
#include "util/signals.h"
#include "util/thread.h"

#include <glib.h>
#include <signal.h>
#include <unistd.h>

#define WAKE_SIGNAL SIGUSR1

static struct {
    bool started;
    sigset_t waited_for; /* reported ones and WAKE_SIGNAL */
    sigset_t reported;
    sigset_t before; /* mask of the starting thread */
    pthread_t thread;
    void (*on_signal)(int signum, void *opaque);
    void *opaque;
    _Atomic(bool) stopping;
} state;

static bool is_ignored(int signum)
{
    struct sigaction action;
    return sigaction(signum, NULL, &action) == 0 && action.sa_handler == SIG_IGN;
}

static void choose_signals(void)
{
    static const int candidates[] = {SIGINT, SIGTERM, SIGHUP, SIGUSR1};
    sigemptyset(&state.reported);
    for (size_t i = 0; i < G_N_ELEMENTS(candidates); i++) {
        if (!is_ignored(candidates[i])) {
            sigaddset(&state.reported, candidates[i]);
        }
    }
    state.waited_for = state.reported;
    sigaddset(&state.waited_for, WAKE_SIGNAL);
}

static void *signal_thread(void *unused)
{
    int signum;
    while (sigwait(&state.waited_for, &signum) == 0) {
        if (atomic_load(&state.stopping)) {
            break;
        }
        if (sigismember(&state.reported, signum)) {
            state.on_signal(signum, state.opaque);
        }
    }
    if (signum != WAKE_SIGNAL) {
        kill(getpid(), signum); /* too late for the callback: give it back, it stays pending */
    }
    return NULL;
}

bool qb_signals_start(void (*on_signal)(int signum, void *opaque), void *opaque)
{
    assert(!state.started);
    choose_signals();
    state.on_signal = on_signal;
    state.opaque = opaque;
    atomic_store(&state.stopping, false);
    pthread_sigmask(SIG_BLOCK, &state.waited_for, &state.before);
    state.started = qb_thread_start(&state.thread, "signals", signal_thread, NULL);
    if (!state.started) {
        pthread_sigmask(SIG_SETMASK, &state.before, NULL);
    }
    return state.started;
}

void qb_signals_stop(void)
{
    if (!state.started) {
        return;
    }
    atomic_store(&state.stopping, true);
    pthread_kill(state.thread, WAKE_SIGNAL);
    pthread_join(state.thread, NULL);
    state.started = false;
    pthread_sigmask(SIG_SETMASK, &state.before, NULL);
}
