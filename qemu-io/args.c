/*
 * The words of a command, sorted and read.
 *
 *     write -P 0xcd -q 64k 4k   ->   given['P'] given['q']   value['P'] = "0xcd"   operand = 64k 4k
 *
 * Options may stand between operands; "--" ends them.  What cannot be read is said on stdout in the
 * words of the field's tool, which test scripts compare.
 *
 * SPDX-License-Identifier: MIT
 */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "qemu-io/qio.h"

static bool parse_letters(const QioCommand *cmd, int argc, char **argv, QioArgs *args)
{
    int c;

    fflush(stdout); /* getopt complains on stderr */
    optind = 0;     /* glibc: forget the last command */
    while ((c = getopt(argc, argv, cmd->letters)) != -1) {
        if (c == '?') {
            qio_print_synopsis(cmd);
            return false;
        }
        args->given[c] = true;
        args->value[c] = optarg;
    }
    args->operand = argv + optind;
    args->n = argc - optind;
    return true;
}

bool qio_parse_args(const QioCommand *cmd, int argc, char **argv, QioArgs *ret)
{
    *ret = (QioArgs){.operand = argv + 1, .n = argc - 1};
    if (!cmd->letters) {
        return true; /* the count of words was checked */
    }
    if (!parse_letters(cmd, argc, argv, ret)) {
        return false;
    }
    if (ret->n < cmd->operands || (cmd->operands_max >= 0 && ret->n > cmd->operands_max)) {
        qio_print_synopsis(cmd);
        return false;
    }
    return true;
}

bool qio_parse_size(const char *text, int64_t *ret)
{
    uint64_t value = 0;
    int err = qb_size_parse(text, 'b', &value);

    if (err == 0) {
        *ret = (int64_t)value;
        return true;
    }
    if (err == -ERANGE && *text != '-') {
        return qio_fail("Parsing error: argument too large -- %s", text);
    }
    return qio_fail("Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- %s",
                    text);
}

bool qio_check_length(int64_t bytes, const char *text)
{
    if (bytes <= BDRV_REQUEST_MAX_BYTES) {
        return true;
    }
    return qio_fail("length cannot exceed %" PRId64 ", given %s", BDRV_REQUEST_MAX_BYTES, text);
}

bool qio_parse_range(const QioArgs *args, int64_t *ret_offset, int64_t *ret_bytes)
{
    return qio_parse_size(args->operand[0], ret_offset) &&
           qio_parse_size(args->operand[1], ret_bytes) &&
           qio_check_length(*ret_bytes, args->operand[1]);
}

bool qio_parse_byte(const char *text, int *ret)
{
    char *end = NULL;
    unsigned long value;

    errno = 0;
    value = strtoul(text, &end, 0);
    if (!isdigit((unsigned char)*text) || *end || errno || value > 255) {
        return qio_fail("%s is not a valid pattern byte", text);
    }
    *ret = (int)value;
    return true;
}
