/*
 * Memory that is not to be had: the allocations that the drivers expect to fail.
 *
 * The linker puts these functions in the place of GLib's g_try_*() and of posix_memalign(), see
 * meson.build; g_malloc() and the like end the process when there is no memory and are left alone.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef TESTS_FAULT_MEMORY_H
#define TESTS_FAULT_MEMORY_H

/* The @countdown-th allocation from now on fails; 0: none does. */
void memory_fail_at(unsigned countdown);
/* What is left of the countdown. */
unsigned memory_fail_left(void);
/* Ends it. How many allocations have failed. */
unsigned memory_fail_clear(void);

#endif
