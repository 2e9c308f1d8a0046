/*
 * What a fuzz target gives: one function for an input, one for the inputs to begin with.
 *
 * A target is linked to libFuzzer (clang, -Dfuzz=true), or to replay.c, which runs it in the normal
 * test suite.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef TESTS_FUZZ_FUZZ_H
#define TESTS_FUZZ_FUZZ_H

#include <stddef.h>
#include <stdint.h>

/* Takes any input and returns 0. A crash, a hang, a leak, a failed assertion is a finding. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Calls @add with each seed. */
void fuzz_seeds(void (*add)(const void *data, size_t size));

#endif
