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

typedef enum OperationFlags {
    OPERATION_ONCE = 1 << 0,    /* what is done cannot be done again: then it may fail */
    OPERATION_DAMAGED = 1 << 1, /* the image is corrupt until it has succeeded */
    OPERATION_LOST = 1 << 2,    /* and not all of it can be read */
} OperationFlags;

typedef struct Operation {
    const char *name, *group;
    /* Brings the world into the state it begins with; NULL: as the kind is. */
    void (*prepare)(World *w);
    /* True when it succeeded; failures are counted in the world, too. */
    bool (*run)(World *w);
    unsigned need, bar; /* KindFlags that a kind must, and must not have */
    unsigned flags;     /* OperationFlags */
    const char *only;   /* names of the kinds it is for, a blank before and after each; or NULL */
} Operation;

extern const Operation operations[];
extern const unsigned nb_operations;

bool operation_fits(const Operation *op, const Kind *kind);
/* A request of any kind anywhere; @w has its top open. */
void operation_random_request(World *w, GRand *rand);
/* By name; NULL when there is none. */
const Operation *operation_find(const char *name);
const Kind *kind_find(const char *name);

#endif
