/*
 * What the test programs have in common that go through many cases: their options, and what they
 * are doing right now, which is said when the process dies of it, or does not end.
 *
 *      --shard 1/4     cases 1, 5, 9, ...       so that several processes share them
 *      --every 10      one in ten of these      so that a short run is another one each time
 *
 * The text stands in a static buffer, and only write() is called from the signal handler.
 *
 * SPDX-License-Identifier: MIT
 */
#include "tests/harness/running.h"

#include <signal.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SECONDS_MAX 60

static char now[256];

/* ---------------------------------------------------------------- options */

RunningOptions running_options = {.every = 1};
static unsigned shard_index, shard_count = 1;

static void refuse(const char *message)
{
    fprintf(stderr, "%s\n", message);
    exit(2);
}

void running_parse(int argc, char **argv, const GOptionEntry *entries)
{
    const GOptionEntry common[] = {
        {"seed", 0, 0, G_OPTION_ARG_INT64, &running_options.seed, "of what is random", "N"},
        {"only", 0, 0, G_OPTION_ARG_STRING, &running_options.only, "these cases (a pattern)",
         "NAME"},
        {"shard", 0, 0, G_OPTION_ARG_STRING, &running_options.shard, "every N-th case from I on",
         "I/N"},
        {"every", 0, 0, G_OPTION_ARG_INT, &running_options.every, "one case of N, by the seed",
         "N"},
        {NULL},
    };
    g_autoptr(GOptionContext) context = g_option_context_new(NULL);
    g_option_context_add_main_entries(context, entries, NULL);
    g_option_context_add_main_entries(context, common, NULL);
    GError *err = NULL;
    if (!g_option_context_parse(context, &argc, &argv, &err)) {
        refuse(err->message);
    }
    const char *shard = running_options.shard;
    if (shard && (sscanf(shard, "%u/%u", &shard_index, &shard_count) != 2 || !shard_count)) {
        refuse("--shard takes I/N");
    }
    if (!running_options.seed) {
        running_options.seed = g_random_int_range(1, 1 << 20);
    }
    printf("# seed %" PRId64 "\n", running_options.seed);
    fflush(stdout);
}

bool running_wants(const char *name, unsigned number)
{
    guint64 turn = number / shard_count + (guint64)running_options.seed;
    return number % shard_count == shard_index % shard_count &&
           turn % (guint64)MAX(running_options.every, 1) == 0 &&
           (!running_options.only || g_pattern_match_simple(running_options.only, name));
}

/* ---------------------------------------------------------------- what runs */

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
