/*
 * Checked arithmetic for every number that came from disk, wire or user.
 *
 * The *_overflow forms return true when the mathematical result does not fit *@res; *@res is then
 * not to be used.  Operands must be unsigned or int64_t; the compiler's builtins do the work.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef QB_UTIL_CHECKED_H
#define QB_UTIL_CHECKED_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <glib.h>

#define qb_add_overflow(a, b, res) __builtin_add_overflow((a), (b), (res))
#define qb_sub_overflow(a, b, res) __builtin_sub_overflow((a), (b), (res))
#define qb_mul_overflow(a, b, res) __builtin_mul_overflow((a), (b), (res))

static inline bool qb_is_power_of_2(uint64_t v)
{
    return v && !(v & (v - 1));
}

/* Rounding to a power of two @a. Up rounds past 2^64 to 0: foreign input needs the checked form. */
static inline uint64_t qb_align_down(uint64_t v, uint64_t a)
{
    return v & ~(a - 1);
}

static inline uint64_t qb_align_up(uint64_t v, uint64_t a)
{
    return (v + a - 1) & ~(a - 1);
}

static inline bool qb_is_aligned(uint64_t v, uint64_t a)
{
    return (v & (a - 1)) == 0;
}

/* True (overflow) when @v rounded up to the power of two @a does not fit int64_t. */
static inline bool qb_align_up_overflow(uint64_t v, uint64_t a, int64_t *res)
{
    uint64_t up;
    if (qb_add_overflow(v, a - 1, &up) || (up & ~(a - 1)) > INT64_MAX) {
        return true;
    }
    *res = (int64_t)(up & ~(a - 1));
    return false;
}

static inline uint64_t qb_div_round_up(uint64_t n, uint64_t d)
{
    return n / d + (n % d != 0);
}

/* True when [@offset, @offset + @bytes) is a range of non-negative int64_t numbers. */
static inline bool qb_range_valid(int64_t offset, int64_t bytes)
{
    int64_t end;
    return offset >= 0 && bytes >= 0 && !qb_add_overflow(offset, bytes, &end);
}

/* True when [a, a+alen) and [b, b+blen) share a byte; the ends must not overflow. */
static inline bool qb_ranges_overlap(uint64_t a, uint64_t alen, uint64_t b, uint64_t blen)
{
    return alen && blen && a < b + blen && b < a + alen;
}

#endif
