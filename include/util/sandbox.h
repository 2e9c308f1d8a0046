/*
 * Shutting the process in: from a point on it can use the files it has open and nothing else.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef QB_UTIL_SANDBOX_H
#define QB_UTIL_SANDBOX_H

#include <stdbool.h>
#include <glib.h>

/*
 * Takes away from the process, for good: opening and changing files by name, the network, other
 * programs, I/O rings, new executable memory, other processes.  What is open stays usable, and so do
 * threads.  To be called before worker threads start: those that run already keep their way to the
 * file system, but not to the other things.
 *
 * False and error when the kernel or the build lacks a part of it (the rest is in force then), or in
 * builds for the sanitizers, whose own runtime needs what is taken away.
 */
bool qb_sandbox_enter(GError **errp);

#endif
