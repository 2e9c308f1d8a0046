/*
 * Progress: numbers a long operation writes and anybody may read at any time.
 *
 * The operation never prints: a tool's reporter, or a monitor, reads.  Atomics, no lock: current
 * and total may be read a moment apart, which shifts a displayed percentage at most.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef QB_UTIL_PROGRESS_H
#define QB_UTIL_PROGRESS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct QbProgress {
    _Atomic(uint64_t) current, total; /* in units of the operation's choice, mostly bytes */
    _Atomic(bool) cancel;             /* set by anybody; the operation stops at its next step */
} QbProgress;

static inline void qb_progress_init(QbProgress *p, uint64_t total)
{
    atomic_store(&p->current, 0);
    atomic_store(&p->total, total);
    atomic_store(&p->cancel, false);
}
static inline void qb_progress_add(QbProgress *p, uint64_t n)
{
    if (p) {
        atomic_fetch_add_explicit(&p->current, n, memory_order_relaxed);
    }
}
static inline void qb_progress_grow(QbProgress *p, uint64_t n)
{
    if (p) {
        atomic_fetch_add_explicit(&p->total, n, memory_order_relaxed);
    }
}
static inline bool qb_progress_cancelled(QbProgress *p)
{
    return p && atomic_load_explicit(&p->cancel, memory_order_relaxed);
}
/* 0..100; 0 while it is not known how much there is to do */
static inline double qb_progress_percent(QbProgress *p)
{
    uint64_t total = atomic_load(&p->total), current = atomic_load(&p->current);
    return total ? (current >= total ? 100.0 : 100.0 * (double)current / (double)total) : 0.0;
}

#endif
