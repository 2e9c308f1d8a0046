/*
 * Making and reading errors: one GError domain whose codes are errno values.
 *
 *   GError { domain = QB_ERROR, code = ENOENT, message = "Could not open 'x': No such file...\n"
 *                                                        "Could not open backing image." }
 *             always our quark   errno class   first line: what happened; further lines: hints
 *
 * Invariants
 *  1. A code is a positive errno value, never 0: whoever asks for -errno gets a failure.
 *  2. A message has no newline at its end; the hint is joined with one, so that a caller's prefix
 *     lands on the first line and the hint stays below.
 *  3. An error that is already set is never overwritten; GLib reports such a caller.
 *
 * Not done: no stack of causes and no source positions.  The message says what the user can act on.
 *
 * SPDX-License-Identifier: MIT
 */
#include "util/error.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* Several threads may meet their first error at once: GLib's macro leaves that to chance. */
GQuark qb_error_quark(void)
{
    static _Atomic(GQuark) quark;
    GQuark known = atomic_load(&quark);
    if (!known) {
        known = g_quark_from_static_string("qb-error-quark");
        atomic_store(&quark, known);
    }
    return known;
}

/* Either sign in, positive and not 0 out: a failure without a cause is EIO. */
static int error_code(int err)
{
    int code = err < 0 ? -err : err;
    return code > 0 ? code : EIO;
}

void qb_error_set(GError **errp, int err, const char *fmt, ...)
{
    if (!errp) {
        return;
    }
    va_list ap;
    va_start(ap, fmt);
    GError *error = g_error_new_valist(QB_ERROR, error_code(err), fmt, ap);
    va_end(ap);
    g_propagate_error(errp, error);
}

void qb_error_set_errno(GError **errp, int err, const char *fmt, ...)
{
    if (!errp) {
        return;
    }
    va_list ap;
    va_start(ap, fmt);
    g_autofree char *text = g_strdup_vprintf(fmt, ap);
    va_end(ap);
    char buf[128];
    int code = error_code(err);
    qb_error_set(errp, code, "%s: %s", text, strerror_r(code, buf, sizeof(buf)));
}

void qb_error_add_hint(GError **errp, const char *fmt, ...)
{
    if (!errp || !*errp) {
        return;
    }
    va_list ap;
    va_start(ap, fmt);
    g_autofree char *hint = g_strdup_vprintf(fmt, ap);
    va_end(ap);
    char *joined = g_strconcat((*errp)->message, "\n", hint, NULL);
    g_free((*errp)->message);
    (*errp)->message = joined;
}

int qb_error_to_errno(const GError *err)
{
    if (!err || err->domain != QB_ERROR || err->code <= 0) {
        return -EIO;
    }
    return -err->code;
}
