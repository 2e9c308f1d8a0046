/*
 * Images with some fields changed, put through all that can be done with an image.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef TESTS_FUZZ_DAMAGE_H
#define TESTS_FUZZ_DAMAGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "tests/harness/disk.h"

#define DAMAGE_AREAS 11

/* A piece of metadata in an image: words of so many bytes. */
typedef struct DamageArea {
    uint64_t offset;
    unsigned words, width;
} DamageArea;

/* A sound image, on the disk "top". */
typedef struct DamageBase {
    const char *driver;
    bool little_endian;
    DiskImage image;
    unsigned cluster_size;
    DamageArea area[DAMAGE_AREAS];
    unsigned areas;
} DamageBase;

/* Damages one of @bases as @data says, uses it, checks and repairs it, uses it again. Aborts when a
 * check still finds corruption after a repair that says it left none. */
void damage_run(const DamageBase *bases, unsigned n, const uint8_t *data, size_t size);

/* Adds an area; ones without words, or beyond the image, are left out. */
void damage_add_area(DamageBase *base, uint64_t offset, uint64_t words, unsigned width);

/* Seeds that change a word of each area of each base. */
void damage_seeds(const DamageBase *bases, unsigned n, void (*add)(const void *data, size_t size));

#endif
