/*
 * What a sector may show when many threads write it: the oracle of concurrent requests.
 *
 *      write 3   |-----------|
 *      write 5        |-----------|                  overlaps 3: either may be the last one
 *      write 7                         |-----|       begins when both are done: they are gone
 *      read                  |-----------|           3, 5 or 7
 *
 * Per sector and value: how many writes of it are under way, when the last one ended, and when the
 * value was superseded.  A value is superseded when a write ends that began after the value's last
 * write had ended.
 *
 * Invariants
 * 1. A value that may be shown is never called illegal: each rule errs on the side of allowing.
 * 2. Times are drawn under the lock, before a request is submitted and after it has returned.
 *
 * SPDX-License-Identifier: MIT
 */
#include "tests/races/history.h"

#include <glib.h>

#include "util/thread.h"

#define VALUES 64

typedef struct Value {
    uint64_t ended, superseded; /* times; superseded 0: it is not */
    uint32_t under_way;
} Value;

struct History {
    QbMutex lock;
    uint64_t clock;
    unsigned sectors;
    Value *values; /* [sectors][VALUES] */
    uint64_t *present; /* per sector: values that are not superseded */
};

static Value *value_of(History *h, unsigned sector, unsigned value)
{
    g_assert_cmpuint(sector, <, h->sectors);
    return &h->values[(size_t)sector * VALUES + value];
}

History *history_new(unsigned sectors)
{
    History *h = g_new0(History, 1);
    qb_mutex_init(&h->lock);
    h->sectors = sectors;
    h->clock = 1;
    h->values = g_new0(Value, (size_t)sectors * VALUES);
    h->present = g_new0(uint64_t, sectors);
    for (unsigned i = 0; i < sectors; i++) {
        h->present[i] = 1;
    }
    return h;
}

void history_free(History *h)
{
    qb_mutex_destroy(&h->lock);
    g_free(h->values);
    g_free(h->present);
    g_free(h);
}

uint64_t history_write_begin(History *h, unsigned first, unsigned n, unsigned value)
{
    QB_GUARD(&h->lock);
    for (unsigned i = first; i < first + n; i++) {
        Value *v = value_of(h, i, value);
        v->under_way++;
        v->superseded = 0;
        h->present[i] |= UINT64_C(1) << value;
    }
    return ++h->clock;
}

/* All values of the sector that were complete before @begin. */
static void supersede(History *h, unsigned sector, unsigned but, uint64_t begin)
{
    for (unsigned i = 0; i < VALUES; i++) {
        Value *v = value_of(h, sector, i);
        bool there = h->present[sector] >> i & 1;
        if (there && i != but && !v->under_way && v->ended < begin) {
            v->superseded = h->clock;
            h->present[sector] &= ~(UINT64_C(1) << i);
        }
    }
}

void history_write_end(History *h, unsigned first, unsigned n, unsigned value, uint64_t begin,
                       bool ok)
{
    QB_GUARD(&h->lock);
    h->clock++;
    for (unsigned i = first; i < first + n; i++) {
        Value *v = value_of(h, i, value);
        v->under_way--;
        v->ended = h->clock;
        if (ok) {
            supersede(h, i, value, begin);
        }
    }
}

uint64_t history_read_begin(History *h)
{
    QB_GUARD(&h->lock);
    return ++h->clock;
}

uint64_t history_legal(History *h, unsigned sector, uint64_t begin)
{
    QB_GUARD(&h->lock);
    uint64_t legal = h->present[sector];
    for (unsigned i = 0; i < VALUES; i++) {
        if (value_of(h, sector, i)->superseded >= begin) {
            legal |= UINT64_C(1) << i;
        }
    }
    return legal;
}
