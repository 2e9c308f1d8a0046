/*
 * The one option parser of qemu-img.
 *
 * A verb describes its options in a table; each entry says where the value goes in the verb's own
 * argument struct.  From the table come the getopt strings, the parsing and the --help text, so
 * that the three cannot disagree.
 *
 *      table entry {kind, letter, name, offsetof(Args, x)}  --getopt_long-->  args->x
 *
 * Invariants
 * 1. Options may stand before, between and behind operands; after "--" everything is an operand.
 * 2. A word that is '-' and a digit is an operand when the verb has no digit options (none has):
 *    `resize FILE -1G` must not be read as an option.
 * 3. Long names may be abbreviated while they are unambiguous (getopt_long's rule).
 *
 * Not done here: judging values; verbs do, naming the option.
 *
 * SPDX-License-Identifier: MIT
 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "qemu-img/img.h"

#define LONG_ONLY_BASE 256 /* getopt values of options without a letter */
#define MAX_OPTIONS 48

typedef struct GetoptTables {
    char letters[2 * MAX_OPTIONS + 4];
    struct option longs[MAX_OPTIONS + 2];
} GetoptTables;

static bool takes_value(const ImgOption *o)
{
    return o->kind != IMG_FLAG && o->kind != IMG_ACTION;
}

/* "-" first: operands are returned in place (value 1); ":" next: a missing argument is ':'. */
static void build_tables(const ImgOption *options, GetoptTables *t)
{
    char *letter = t->letters;
    int n = 0;

    *letter++ = '-';
    *letter++ = ':';
    *letter++ = 'h';
    t->longs[n++] = (struct option){"help", no_argument, NULL, 'h'};
    for (const ImgOption *o = options; o->kind != IMG_END; o++) {
        int value = o->letter ? o->letter : LONG_ONLY_BASE + (int)(o - options);
        g_assert(n <= MAX_OPTIONS);
        if (o->letter) {
            *letter++ = (char)o->letter;
            if (takes_value(o)) {
                *letter++ = ':';
            }
        }
        if (o->name) {
            int has_arg = takes_value(o) ? required_argument : no_argument;
            t->longs[n++] = (struct option){o->name, has_arg, NULL, value};
        }
    }
    *letter = '\0';
    t->longs[n] = (struct option){0};
}

static const ImgOption *find_option(const ImgOption *options, int value)
{
    if (value >= LONG_ONLY_BASE) {
        return &options[value - LONG_ONLY_BASE];
    }
    for (const ImgOption *o = options; o->kind != IMG_END; o++) {
        if (o->letter == value) {
            return o;
        }
    }
    return NULL;
}

static void append_joined(char **field, const char *value)
{
    char *joined = *field ? g_strdup_printf("%s,%s", *field, value) : g_strdup(value);

    g_free(*field);
    *field = joined;
}

static void append_list(GPtrArray **field, char *value)
{
    if (!*field) {
        *field = g_ptr_array_new();
    }
    g_ptr_array_add(*field, value);
}

static void append_action(GArray **field, const ImgOption *o, const char *value)
{
    ImgAction action = {o->name, o->kind == IMG_ACTION_VALUE ? value : NULL};

    if (!*field) {
        *field = g_array_new(FALSE, FALSE, sizeof(ImgAction));
    }
    g_array_append_val(*field, action);
}

/* "--max-length" is spoken of as "max length". */
static bool store_size(const ImgOption *o, const char *value, uint64_t *field)
{
    g_autofree char *what = g_strdelimit(g_strdup(o->name), "-", ' ');

    return img_parse_size(what, value, field);
}

static bool store_value(const ImgOption *o, char *value, void *args)
{
    void *field = (char *)args + o->field;

    switch (o->kind) {
    case IMG_FLAG:
        *(bool *)field = true;
        return true;
    case IMG_STRING:
        *(const char **)field = value;
        return true;
    case IMG_LIST:
        append_list(field, value);
        return true;
    case IMG_JOINED:
        append_joined(field, value);
        return true;
    case IMG_SIZE:
        return store_size(o, value, field);
    case IMG_ACTION:
    case IMG_ACTION_VALUE:
        append_action(field, o, value);
        return true;
    case IMG_IGNORED:
    case IMG_END:
        break;
    }
    return true;
}

static void print_help(const ImgUsage *usage)
{
    printf("Usage:\n  %s %s [OPTION...] %s\n\n%s\n\n  -h, --help\n     print this help\n",
           img_argv0(), usage->verb, usage->operands, usage->summary);
    for (const ImgOption *o = usage->options; o->kind != IMG_END; o++) {
        g_autofree char *letter = o->letter ? g_strdup_printf("-%c", o->letter) : NULL;
        printf("  %s%s%s%s%s%s\n     %s\n", letter ? letter : "", letter && o->name ? ", " : "",
               o->name ? "--" : "", o->name ? o->name : "", o->value ? " " : "",
               o->value ? o->value : "", o->help);
    }
}

static const char *option_in_error(char **argv, char *buf)
{
    if (optopt && optopt < LONG_ONLY_BASE) {
        buf[0] = '-';
        buf[1] = (char)optopt;
        buf[2] = '\0';
        return buf;
    }
    return argv[optind - 1];
}

static bool is_negative_number(const char *word)
{
    return word && word[0] == '-' && g_ascii_isdigit(word[1]);
}

/* One step of getopt; a negative number at a word's start is handed out as an operand (value 1)
 * before getopt sees it.  Verbs never have options in clusters ending before such a word, since
 * getopt moves optind on only when a word is done. */
static int next_option(int argc, char **argv, const GetoptTables *t)
{
    if (optind < argc && is_negative_number(argv[optind])) {
        optarg = argv[optind++];
        return 1;
    }
    return getopt_long(argc, argv, t->letters, t->longs, NULL);
}

typedef enum ParseResult {
    PARSE_GO_ON,
    PARSE_HELP, /* --help was printed */
    PARSE_ERROR /* said */
} ParseResult;

static ParseResult handle_option(const ImgUsage *usage, int c, char **argv, void *args,
                                 GPtrArray *operands)
{
    const ImgOption *o;
    char buf[3];

    switch (c) {
    case 'h':
        print_help(usage);
        return PARSE_HELP;
    case 1:
        g_ptr_array_add(operands, optarg);
        return PARSE_GO_ON;
    case ':':
        img_usage_error(usage->verb, "missing argument for option '%s'",
                        option_in_error(argv, buf));
        return PARSE_ERROR;
    case '?':
        img_usage_error(usage->verb, "unrecognized option '%s'", option_in_error(argv, buf));
        return PARSE_ERROR;
    }
    o = find_option(usage->options, c);
    return store_value(o, optarg, args) ? PARSE_GO_ON : PARSE_ERROR;
}

bool img_parse_args(const ImgUsage *usage, int argc, char **argv, void *args,
                    GPtrArray *operands, int *ret_status)
{
    GetoptTables tables;
    int c;

    build_tables(usage->options, &tables);
    opterr = 0;
    optind = 1;
    while ((c = next_option(argc, argv, &tables)) != -1) {
        ParseResult result = handle_option(usage, c, argv, args, operands);
        if (result != PARSE_GO_ON) {
            *ret_status = result == PARSE_ERROR;
            return false;
        }
    }
    while (optind < argc) {
        g_ptr_array_add(operands, argv[optind++]);
    }
    return true;
}

int img_usage_error(const char *verb, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    g_autofree char *text = g_strdup_vprintf(fmt, ap);
    va_end(ap);
    img_error("%s", text);
    fprintf(stderr, "Try '%s%s%s --help' for more information\n", img_argv0(), verb ? " " : "",
            verb ? verb : "");
    return 1;
}

bool img_parse_output(const char *verb, const char *text, bool *ret_json)
{
    *ret_json = text && !strcmp(text, "json");
    if (!text || *ret_json || !strcmp(text, "human")) {
        return true;
    }
    img_usage_error(verb, "--output expects 'human' or 'json', not '%s'", text);
    return false;
}
