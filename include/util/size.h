/*
 * Sizes as people write and read them.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef QB_UTIL_SIZE_H
#define QB_UTIL_SIZE_H

#include <stdbool.h>
#include <stdint.h>

#pragma GCC visibility push(default) /* public: exported by libqblock */

/* "1.5M", "64k", "0x200", "512b": powers of 1024, fractions (not of a byte), nothing behind it.
 * @default_suffix, one of "bkMGTPE" in either case, is meant where none is written; 0 stands for b.
 * 0, -EINVAL (not a size) or -ERANGE (negative or more than INT64_MAX). *ret only on success. */
int qb_size_parse(const char *text, char default_suffix, uint64_t *ret);
/* Plain unsigned number, decimal or 0x. 0, -EINVAL, or -ERANGE (negative or beyond 64 bits). */
int qb_uint_parse(const char *text, uint64_t *ret);

/* "10 MiB", "480 KiB", "1.5 GiB", "0 B": three significant digits at most, never
 * an exponent. Newly allocated. */
char *qb_size_to_text(uint64_t bytes);

#pragma GCC visibility pop

#endif
