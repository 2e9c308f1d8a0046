/*
 * The verbs of qemu-img, run inside the test's process: the code is the tool's, only main() is not.
 *
 * One at a time.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef TESTS_HARNESS_VERBS_H
#define TESTS_HARNESS_VERBS_H

#include <glib.h>

/* Runs "VERB ARG..." (split as a shell does). The exit status; what it printed goes to *ret_said
 * (newly allocated; NULL: dropped). */
int verb_run(const char *command, char **ret_said);

#endif
