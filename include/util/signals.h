/*
 * Signals of a tool, delivered to an ordinary function in a thread of their own.
 *
 * Nothing of the block layer is safe in a signal handler, so there are no handlers: SIGINT,
 * SIGTERM, SIGHUP and SIGUSR1 are blocked in all threads, and one thread waits for them.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef QB_UTIL_SIGNALS_H
#define QB_UTIL_SIGNALS_H

#include <stdbool.h>

/*
 * Blocks the four signals in the calling thread, which must be the only one: threads inherit it.
 * Then starts the thread that calls @on_signal(signal number, @opaque), once per signal and one
 * at a time. The callback may take locks and print; it must not call qb_signals_stop(). A signal
 * that is ignored when the tool starts (nohup, a shell's background job) stays ignored. False,
 * with the signals as they were, when there is no thread to be had. Not twice without a stop.
 */
bool qb_signals_start(void (*on_signal)(int signum, void *opaque), void *opaque);

/*
 * Ends the thread, after a callback that is running; no callback runs from then on. To be called by
 * the thread that started. The signals act again as before the start, also one that came meanwhile.
 * Does nothing when nothing was started.
 */
void qb_signals_stop(void);

#endif
