/*
 * Sizes as people write and read them.
 *
 *   [space] [+] digits [. digits] [suffix]      suffix: b k K M G T P E, powers of 1024
 *   [space] [+] 0x hexdigits [suffix]           b and E are hex digits here
 *
 * All in integers: a fraction is a numerator over a power of ten, so "0.1E" is exact to the byte
 * (nearest byte, halves up) and nothing depends on the locale.
 *
 * Invariants
 *  1. Garbage behind a number is -EINVAL even where the number alone would be out of range.
 *  2. A fraction of a byte cannot be asked for: "1.5" in bytes is -EINVAL, "1.0" is 1.
 *
 * Not done: decimal units (kB, MB), exponents ("1e3"), octal ("010" is ten).
 *
 * SPDX-License-Identifier: MIT
 */
#include "util/size.h"
#include "util/checked.h"

#include <errno.h>
#include <string.h>

#define MAX_FRACTION_DIGITS 18 /* a numerator below 10^18, times 2^60, fits 128 bits */

/* A run of digits: its value, how many there were, and whether the value fits. */
typedef struct Digits {
    uint64_t value;
    int count;
    bool overflow;
} Digits;

typedef struct Fraction {
    uint64_t numerator, denominator;
    int count;
    bool nonzero; /* also counts digits too small for the numerator */
} Fraction;

static Digits scan_digits(const char **p, unsigned base)
{
    Digits d = {0};
    for (; base == 16 ? g_ascii_isxdigit(**p) : g_ascii_isdigit(**p); (*p)++, d.count++) {
        d.overflow |= qb_mul_overflow(d.value, (uint64_t)base, &d.value);
        d.overflow |= qb_add_overflow(d.value, (uint64_t)g_ascii_xdigit_value(**p), &d.value);
    }
    return d;
}

static Fraction scan_fraction(const char **p)
{
    Fraction f = {.denominator = 1};
    for (; g_ascii_isdigit(**p); (*p)++, f.count++) {
        unsigned digit = (unsigned)g_ascii_digit_value(**p);
        f.nonzero |= digit != 0;
        if (f.count < MAX_FRACTION_DIGITS) {
            f.numerator = f.numerator * 10 + digit;
            f.denominator *= 10;
        }
    }
    return f;
}

/* Skips what may stand before the digits; true when the number is negative. */
static bool skip_lead(const char **p)
{
    while (g_ascii_isspace(**p)) {
        (*p)++;
    }
    bool negative = **p == '-';
    if (**p == '-' || **p == '+') {
        (*p)++;
    }
    return negative;
}

static bool skip_hex_prefix(const char **p)
{
    if ((*p)[0] != '0' || ((*p)[1] != 'x' && (*p)[1] != 'X')) {
        return false;
    }
    *p += 2;
    return true;
}

/* The power of 1024 a suffix stands for; -1 when it is none. */
static int suffix_power(char c)
{
    static const char suffixes[] = "BKMGTPE";
    const char *at = c ? strchr(suffixes, g_ascii_toupper(c)) : NULL;
    return at ? (int)(at - suffixes) : -1;
}

/* (whole + fraction) * 1024^power to the nearest byte; false when it exceeds INT64_MAX. */
static bool scale(uint64_t whole, const Fraction *f, int power, uint64_t *ret)
{
    unsigned __int128 unit = (unsigned __int128)1 << (10 * power);
    unsigned __int128 part = (2 * unit * f->numerator + f->denominator) / (2 * f->denominator);
    unsigned __int128 bytes = whole * unit + part;
    if (bytes > INT64_MAX) {
        return false;
    }
    *ret = (uint64_t)bytes;
    return true;
}

int qb_size_parse(const char *text, char default_suffix, uint64_t *ret)
{
    const char *p = text;
    bool negative = skip_lead(&p);
    bool hex = skip_hex_prefix(&p);
    Digits whole = scan_digits(&p, hex ? 16 : 10);
    Fraction fraction = {.denominator = 1};
    if (!hex && *p == '.') {
        p++;
        fraction = scan_fraction(&p);
    }
    int power = suffix_power(*p ? *p++ : default_suffix ? default_suffix : 'B');
    if (whole.count + fraction.count == 0 || power < 0 || *p) {
        return -EINVAL;
    }
    if (power == 0 && fraction.nonzero) {
        return -EINVAL;
    }
    if (negative && (whole.value || fraction.nonzero || whole.overflow)) {
        return -ERANGE;
    }
    uint64_t bytes;
    if (whole.overflow || !scale(whole.value, &fraction, power, &bytes)) {
        return -ERANGE;
    }
    *ret = bytes;
    return 0;
}

int qb_uint_parse(const char *text, uint64_t *ret)
{
    const char *p = text;
    bool negative = skip_lead(&p);
    Digits d = scan_digits(&p, skip_hex_prefix(&p) ? 16 : 10);
    if (d.count == 0 || *p) {
        return -EINVAL;
    }
    if (d.overflow || (negative && d.value)) {
        return -ERANGE;
    }
    *ret = d.value;
    return 0;
}

char *qb_size_to_text(uint64_t bytes)
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    double value = (double)bytes;
    size_t unit = 0;
    /* From here on three digits would be rounded to 1000: the next unit shows more. */
    while (value >= 999.5 && unit + 1 < G_N_ELEMENTS(units)) {
        value /= 1024;
        unit++;
    }
    char number[G_ASCII_DTOSTR_BUF_SIZE];
    g_ascii_formatd(number, sizeof(number), "%.3g", value);
    return g_strdup_printf("%s %s", number, units[unit]);
}
