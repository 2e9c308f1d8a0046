/*
 * Where the metadata of a sound qcow2 image is, and what damage can be done to it.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef TESTS_INTEROP_DAMAGE_FIELDS_H
#define TESTS_INTEROP_DAMAGE_FIELDS_H

#include <glib.h>
#include <stdint.h>

typedef struct DamageField {
    char *name;
    uint64_t pos;   /* in the file */
    unsigned bytes; /* 1, 2, 4 or 8 */
} DamageField;

typedef struct DamageLayout {
    const uint8_t *image; /* borrowed */
    size_t length;
    uint64_t cluster;
    GArray *fields;       /* DamageField */
    GArray *places;       /* uint64_t: where structures of each kind begin */
    uint64_t n_cases;     /* fields times values */
} DamageLayout;

/* Finds the fields of an image that is known to be sound. */
DamageLayout *damage_layout_new(const uint8_t *image, size_t length);
void damage_layout_free(DamageLayout *l);
/* Sets one field of @data, a copy of the image, to one value; @i < n_cases says which. What was
 * done, newly allocated. */
char *damage_field(const DamageLayout *l, uint64_t i, uint8_t *data, size_t length);
/* Several fields, bytes of metadata, or the file cut off; all drawn from @seed. *length follows. */
char *damage_at_random(const DamageLayout *l, uint64_t seed, uint8_t *data, size_t *length);

#endif
