/*
 * What the files of operations share: rows of the table in operations.c.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef TESTS_HARNESS_OPERATIONS_INT_H
#define TESTS_HARNESS_OPERATIONS_INT_H

#include "tests/harness/operations.h"

/* The sector where the @n-th group of four clusters (world.c) begins. */
unsigned operation_group(const World *w, unsigned n);

/* --- operations-bitmap.c --- */
bool run_bitmap_add(World *w);
bool run_bitmap_remove(World *w);
bool run_bitmap_remove_broken(World *w);
bool run_bitmap_clear(World *w);
bool run_bitmap_enable(World *w);
bool run_bitmap_disable(World *w);
bool run_bitmap_merge(World *w);
bool run_bitmap_session(World *w);
bool run_bitmap_first(World *w);

/* --- operations-repair.c: what is damaged, and how it is mended --- */
void damage_leaks(World *w);
void damage_dirty(World *w);
void damage_counts(World *w);
void damage_copied(World *w);
void damage_table(World *w);
void damage_l1(World *w);
void damage_entries(World *w);
void damage_qed(World *w);
bool run_repair(World *w);

#endif
