/*
 * Warnings: the one way the block layer says something that is not an error.
 *
 *     bdrv_warn("...%s...") --> text --> handler of the process (a tool prints it) --> stderr
 *
 * Invariants
 *  1. Without a handler a warning goes nowhere: a library does not print.
 *  2. The handler is set once, before the first open, hence read without a lock.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdarg.h>
#include "block/block.h"

static void (*handler)(const char *text, void *opaque);
static void *handler_opaque;

void bdrv_set_warning_handler(void (*fn)(const char *text, void *opaque), void *opaque)
{
    handler = fn;
    handler_opaque = opaque;
}

void bdrv_warn(const char *fmt, ...)
{
    if (!handler) {
        return;
    }
    va_list ap;
    va_start(ap, fmt);
    g_autofree char *text = g_strdup_vprintf(fmt, ap);
    va_end(ap);
    handler(text, handler_opaque);
}
