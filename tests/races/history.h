/*
 * What a sector may show when many threads write it: the oracle of concurrent requests.
 *
 * Any thread.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef TESTS_RACES_HISTORY_H
#define TESTS_RACES_HISTORY_H

#include <stdbool.h>
#include <stdint.h>

typedef struct History History;

/* All sectors show value 0. */
History *history_new(unsigned sectors);
void history_free(History *h);

/* A write of @value to the sectors is about to be submitted. Returns the time, for its end. */
uint64_t history_write_begin(History *h, unsigned first, unsigned n, unsigned value);
/* It has returned; @ok: it is done, what was complete before it began cannot be seen any more. */
void history_write_end(History *h, unsigned first, unsigned n, unsigned value, uint64_t begin,
                       bool ok);
/* A read is about to be submitted. */
uint64_t history_read_begin(History *h);
/* Bit v: what @sector had to show at some time since @begin may have been v. */
uint64_t history_legal(History *h, unsigned sector, uint64_t begin);

#endif
