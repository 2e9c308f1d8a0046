/*
 * What a test program is doing right now: said when the process dies of it, or does not end.
 *
 * The text stands in a static buffer, and only write() is called from the signal handler.
 *
 * SPDX-License-Identifier: MIT
 */
#include "tests/harness/running.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define SECONDS_MAX 60

static char now[256];

static void on_fatal_signal(int sig)
{
    static const char what[] = "not ok - died in ";
    ssize_t n = write(STDOUT_FILENO, what, sizeof(what) - 1);
    n += write(STDOUT_FILENO, now, strlen(now));
    n += write(STDOUT_FILENO, "\n", 1);
    (void)n;
    signal(sig, SIG_DFL);
    raise(sig);
}

void running_init(void)
{
    static const int fatal[] = {SIGABRT, SIGSEGV, SIGTRAP, SIGALRM};
    for (size_t i = 0; i < G_N_ELEMENTS(fatal); i++) {
        signal(fatal[i], on_fatal_signal);
    }
}

void running_set(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(now, sizeof(now), fmt, ap);
    va_end(ap);
    alarm(SECONDS_MAX);
}

const char *running_name(void)
{
    return now;
}

void running_end(void)
{
    alarm(0);
}
