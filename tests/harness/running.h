/*
 * What the test programs have in common that go through many cases: their options, and what they
 * are doing right now, which is said when the process dies of it, or does not end.
 *
 * Not for several threads.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef TESTS_HARNESS_RUNNING_H
#define TESTS_HARNESS_RUNNING_H

#include <stdbool.h>
#include <glib.h>

/* Those that all of them have; part of them in @running_options. */
typedef struct RunningOptions {
    gint64 seed; /* 0: by chance */
    char *only;  /* a pattern, or NULL: all */
    char *shard; /* "I/N": every N-th case from the I-th on */
    int every;   /* of these every N-th, beginning where the seed says */
} RunningOptions;
extern RunningOptions running_options;

/* Parses the options of the program, those in @entries and --seed, --only, --shard and --every, and
 * prints the seed; exits when they are not understood. */
void running_parse(int argc, char **argv, const GOptionEntry *entries);
/* Does case @name, the @number-th, belong to what these options say? */
bool running_wants(const char *name, unsigned number);

/* Once, at the beginning of main(). */
void running_init(void);
/* From now on this runs, and may take a minute. */
void running_set(const char *fmt, ...) G_GNUC_PRINTF(1, 2);
/* What was set last. Borrowed. */
const char *running_name(void);
/* It is done. */
void running_end(void);

#endif
