/*
 * Memory that is not to be had: the allocations that the drivers expect to fail.
 *
 *      driver -> g_try_malloc(n) -> __wrap_g_try_malloc(n) -> countdown at 0? NULL
 *                                                          -> __real_g_try_malloc(n)
 *
 * SPDX-License-Identifier: MIT
 */
#include "tests/fault/memory.h"

#include <errno.h>
#include <glib.h>
#include <stdatomic.h>
#include <stdbool.h>

static _Atomic(unsigned) countdown, failed;

void memory_fail_at(unsigned n)
{
    atomic_store(&failed, 0);
    atomic_store(&countdown, n);
}

unsigned memory_fail_left(void)
{
    return atomic_load(&countdown);
}

unsigned memory_fail_clear(void)
{
    atomic_store(&countdown, 0);
    return atomic_exchange(&failed, 0);
}

static bool fails(void)
{
    unsigned left = atomic_load(&countdown);
    while (left > 0 && !atomic_compare_exchange_weak(&countdown, &left, left - 1)) {
    }
    if (left == 1) {
        atomic_fetch_add(&failed, 1);
    }
    return left == 1;
}

/* One function in the place of another, with the same parameters. */
#define WRAP(name, params, args)                                                                   \
    void *__real_##name params;                                                                    \
    void *__wrap_##name params;                                                                    \
    void *__wrap_##name params                                                                     \
    {                                                                                              \
        return fails() ? NULL : __real_##name args;                                                \
    }

WRAP(g_try_malloc, (gsize n), (n))
WRAP(g_try_malloc0, (gsize n), (n))
WRAP(g_try_malloc_n, (gsize n, gsize size), (n, size))
WRAP(g_try_malloc0_n, (gsize n, gsize size), (n, size))
WRAP(g_try_realloc, (void *p, gsize n), (p, n))
WRAP(g_try_realloc_n, (void *p, gsize n, gsize size), (p, n, size))

int __real_posix_memalign(void **ret, size_t align, size_t size);
int __wrap_posix_memalign(void **ret, size_t align, size_t size);
int __wrap_posix_memalign(void **ret, size_t align, size_t size)
{
    return fails() ? ENOMEM : __real_posix_memalign(ret, align, size);
}
