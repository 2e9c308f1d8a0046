/*
 * What a test program is doing right now: said when the process dies of it, or does not end.
 *
 * Not for several threads.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef TESTS_HARNESS_RUNNING_H
#define TESTS_HARNESS_RUNNING_H

#include <glib.h>

/* Once, at the beginning of main(). */
void running_init(void);
/* From now on this runs, and may take a minute. */
void running_set(const char *fmt, ...) G_GNUC_PRINTF(1, 2);
/* What was set last. Borrowed. */
const char *running_name(void);
/* It is done. */
void running_end(void);

#endif
