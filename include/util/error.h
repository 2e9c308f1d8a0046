/*
 * The one error channel of control paths.
 *
 * A function that can fail on a control path returns bool (false on failure) or a pointer (NULL on
 * failure) and fills a GError once, at the place where the cause is known.  Callers prefix the
 * message (g_prefix_error), they never reword it.  Hot I/O paths return 0 or -errno instead.
 *
 * There is one domain, QB_ERROR; the code is a positive errno value.  A message carries no trailing
 * newline and no program name: tools print both.  A hint is a second line inside the message, so it
 * survives prefixing and is printed below the message, as users of these tools know it.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef QB_UTIL_ERROR_H
#define QB_UTIL_ERROR_H

#include <errno.h>
#include <glib.h>

#pragma GCC visibility push(default) /* public: exported by libqblock */

#define QB_ERROR (qb_error_quark())

GQuark qb_error_quark(void);

/* Fills @errp with code @err (positive errno) and the formatted text. @errp may be NULL. */
void qb_error_set(GError **errp, int err, const char *fmt, ...) G_GNUC_PRINTF(3, 4);

/* As qb_error_set(), with ": <text of errno @err>" appended. @err may be given with either sign. */
void qb_error_set_errno(GError **errp, int err, const char *fmt, ...) G_GNUC_PRINTF(3, 4);

/* Appends a hint line to an error that is set; does nothing when @errp is NULL or *@errp is. */
void qb_error_add_hint(GError **errp, const char *fmt, ...) G_GNUC_PRINTF(2, 3);

/* The error's class as -errno, for callers that answer on an I/O path. -EIO for foreign domains. */
int qb_error_to_errno(const GError *err);

#pragma GCC visibility pop

#endif
