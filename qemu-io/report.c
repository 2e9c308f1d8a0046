/*
 * What is said of a request that is done.
 *
 *     wrote 65536/65536 bytes at offset 0
 *     64 KiB, 1 ops; 00.00 sec (40.947 MiB/sec and 655.1491 ops/sec)
 *
 * and for machines (-C):  bytes,operations,h:mm:ss.cc,bytes per second,operations per second
 *
 * Test scripts filter these lines with regular expressions, so every blank counts.
 *
 * SPDX-License-Identifier: MIT
 */
#include <ctype.h>
#include <stdio.h>
#include <string.h>
#include "qemu-io/qio.h"

#define DUMP_WIDTH 16

/* 64.000 -> 64, as decimals that say nothing are left out. */
static void drop_zero_decimals(char *number)
{
    char *point = strchr(number, '.');

    if (point && strspn(point + 1, "0") == strlen(point + 1)) {
        *point = '\0';
    }
}

char *qio_size_text(double bytes)
{
    static const char *const units[] = {"bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    size_t unit = 0;
    char number[64];

    while (bytes >= 1024 && unit + 1 < G_N_ELEMENTS(units)) {
        bytes /= 1024;
        unit++;
    }
    g_snprintf(number, sizeof(number), unit ? "%.3f" : "%f", bytes);
    drop_zero_decimals(number);
    return g_strdup_printf("%s %s", number, units[unit]);
}

/* Seconds alone while there is less than a minute; always h:mm:ss.cc with @full. */
static char *time_text(uint64_t ns, bool full)
{
    uint64_t hundredths = ns / 10000000;
    unsigned cc = hundredths % 100, ss = hundredths / 100 % 60, mm = hundredths / 6000 % 60;
    uint64_t hh = hundredths / 360000;

    if (!full && hundredths < 6000) {
        return g_strdup_printf("%02u.%02u sec", ss, cc);
    }
    return g_strdup_printf("%" PRIu64 ":%02u:%02u.%02u", hh, mm, ss, cc);
}

void qio_print_report(const QioReport *r)
{
    double seconds = (double)MAX(r->ns, 1) / 1e9;
    double rate = (double)r->bytes / seconds;
    g_autofree char *took = time_text(r->ns, r->machine);
    g_autofree char *size = qio_size_text((double)r->bytes);
    g_autofree char *speed = qio_size_text(rate);

    if (r->machine) {
        printf("%" PRId64 ",1,%s,%.3f,%.3f\n", r->bytes, took, rate, 1 / seconds);
        return;
    }
    printf("%s %" PRId64 "/%" PRId64 " bytes at offset %" PRId64 "\n", r->verb, r->bytes, r->bytes,
           r->offset);
    printf("%s, 1 ops; %s (%s/sec and %.4f ops/sec)\n", size, took, speed, 1 / seconds);
}

void qio_dump(const uint8_t *data, size_t bytes, int64_t offset)
{
    for (size_t done = 0; done < bytes; done += DUMP_WIDTH) {
        size_t n = MIN(DUMP_WIDTH, bytes - done);
        char text[DUMP_WIDTH + 1] = "";

        printf("%08" PRIx64 ":  ", (uint64_t)offset + done);
        for (size_t i = 0; i < n; i++) {
            unsigned char byte = data[done + i];
            printf("%02x ", byte);
            text[i] = isalnum(byte) ? (char)byte : '.';
        }
        printf(" %s\n", text);
    }
}
