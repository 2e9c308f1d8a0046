/*
 * The operations that the suites put through crashes and faults.
 *
 * Each is run in a world whose images are closed, and closes what it opens.  It can be run again
 * after it was interrupted anywhere, and then ends with the same content.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef TESTS_HARNESS_OPERATIONS_H
#define TESTS_HARNESS_OPERATIONS_H

#include "tests/harness/world.h"

typedef struct Operation {
    const char *name, *group;
    /* Brings the world into the state it begins with; NULL: as the kind is. */
    void (*prepare)(World *w);
    /* True when it succeeded; failures are counted in the world, too. */
    bool (*run)(World *w);
    unsigned need, bar; /* KindFlags that a kind must, and must not have */
    const char *only;   /* the one kind it is for, or NULL */
} Operation;

extern const Operation operations[];
extern const unsigned nb_operations;

bool operation_fits(const Operation *op, const Kind *kind);
/* By name; NULL when there is none. */
const Operation *operation_find(const char *name);
const Kind *kind_find(const char *name);

#endif
