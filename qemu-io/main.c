/*
 * qemu-io: a shell that makes single requests of the block layer.
 *
 *     options -> open FILE -> each -c, or the lines of stdin -> close -> exit status
 *
 * Invariants
 * 1. All -c commands run (up to quit), also behind one that failed; the exit status is then 1.
 * 2. A file that cannot be opened ends the program before the first command.
 * 3. The file is closed, and its requests have ended, before the program ends by itself.  SIGINT
 *    and SIGTERM end it at once, as a crash would.
 *
 * SPDX-License-Identifier: MIT
 */
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "qemu-io/qio.h"
#include "tools/objects.h"
#include "util/pool.h"

/* The command line. */
typedef struct Program {
    QioOpen open;
    const char *format;
    bool image_opts, misalign, help, version;
    GPtrArray *commands; /* borrowed strings */
    GPtrArray *objects;  /* borrowed strings */
} Program;

enum { OPTION_OBJECT = 256, OPTION_IMAGE_OPTS };

static const char short_options[] = "hVc:d:f:rsnCmki:t:T:U";
static const struct option long_options[] = {
    {"help", no_argument, NULL, 'h'},
    {"version", no_argument, NULL, 'V'},
    {"cmd", required_argument, NULL, 'c'},
    {"format", required_argument, NULL, 'f'},
    {"read-only", no_argument, NULL, 'r'},
    {"snapshot", no_argument, NULL, 's'},
    {"nocache", no_argument, NULL, 'n'},
    {"copy-on-read", no_argument, NULL, 'C'},
    {"misalign", no_argument, NULL, 'm'},
    {"native-aio", no_argument, NULL, 'k'},
    {"aio", required_argument, NULL, 'i'},
    {"discard", required_argument, NULL, 'd'},
    {"cache", required_argument, NULL, 't'},
    {"trace", required_argument, NULL, 'T'},
    {"force-share", no_argument, NULL, 'U'},
    {"object", required_argument, NULL, OPTION_OBJECT},
    {"image-opts", no_argument, NULL, OPTION_IMAGE_OPTS},
    {0},
};

static const char usage_text[] =
    "Usage: qemu-io [OPTION]... [-c COMMAND]... [FILE]\n"
    "Makes single requests of a disk image.\n"
    "\n"
    "  -c, --cmd COMMAND    run this command; without any, they are read from stdin\n"
    "  -f, --format FMT     the format of FILE; guessed if not given\n"
    "      --image-opts     FILE is key=value,... options\n"
    "  -r, --read-only      open for reading only\n"
    "  -s, --snapshot       changes go to a temporary file that is dropped at the end\n"
    "  -n, --nocache        same as -t none\n"
    "  -C, --copy-on-read   copy what is read from backing files into the image\n"
    "  -m, --misalign       use buffers that direct I/O must copy\n"
    "  -k, --native-aio     same as -i native\n"
    "  -i, --aio MODE       batches by: threads, native, io_uring\n"
    "  -t, --cache MODE     none, writeback, writethrough (default), directsync, unsafe\n"
    "  -d, --discard MODE   unmap (default), ignore\n"
    "  -U, --force-share    open although others are writing\n"
    "      --object DEF     define an object, such as a secret\n"
    "  -T, --trace SPEC     accepted, without effect\n"
    "  -h, --help           show this text\n"
    "  -V, --version        show the version\n"
    "\n"
    "'qemu-io -c help' names the commands.\n";

/* --- messages --- */

bool qio_error(const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    g_autofree char *text = g_strdup_vprintf(fmt, ap);
    va_end(ap);
    fflush(stdout);
    fprintf(stderr, "qemu-io: %s\n", text);
    return false;
}

bool qio_error_prefixed(GError *err, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    g_autofree char *prefix = g_strdup_vprintf(fmt, ap);
    va_end(ap);
    qio_error("%s%s", prefix, err->message);
    g_error_free(err);
    return false;
}

bool qio_fail(const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    vprintf(fmt, ap);
    va_end(ap);
    putchar('\n');
    return false;
}

/* Two kinds are known without our name in front: on probing, and what a format says of itself. */
static void print_warning(const char *text, void *opaque)
{
    bool bare = g_str_has_prefix(text, "WARNING: ") || g_str_has_prefix(text, "qcow2: ");

    fflush(stdout);
    fprintf(stderr, "%s%s\n", bare ? "" : "qemu-io: warning: ", text);
}

/* --- the command line --- */

typedef enum Kind { SWITCH, WORD, LIST, IGNORED } Kind;

/* Where an option goes. */
static const struct Destination {
    int c;
    Kind kind;
    size_t field;     /* of Program: bool, const char * or GPtrArray * */
    const char *word; /* WORD: what a switch stands for; NULL: its argument */
} destinations[] = {
    {'r', SWITCH, offsetof(Program, open.read_only), NULL},
    {'s', SWITCH, offsetof(Program, open.snapshot), NULL},
    {'C', SWITCH, offsetof(Program, open.copy_on_read), NULL},
    {'U', SWITCH, offsetof(Program, open.force_share), NULL},
    {'m', SWITCH, offsetof(Program, misalign), NULL},
    {'h', SWITCH, offsetof(Program, help), NULL},
    {'V', SWITCH, offsetof(Program, version), NULL},
    {OPTION_IMAGE_OPTS, SWITCH, offsetof(Program, image_opts), NULL},
    {'f', WORD, offsetof(Program, format), NULL},
    {'t', WORD, offsetof(Program, open.cache), NULL},
    {'n', WORD, offsetof(Program, open.cache), "none"},
    {'d', WORD, offsetof(Program, open.discard), NULL},
    {'i', WORD, offsetof(Program, open.aio), NULL},
    {'k', WORD, offsetof(Program, open.aio), "native"},
    {'c', LIST, offsetof(Program, commands), NULL},
    {OPTION_OBJECT, LIST, offsetof(Program, objects), NULL},
    {'T', IGNORED, 0, NULL},
};

static void store(Program *p, const struct Destination *d, const char *value)
{
    void *field = (char *)p + d->field;

    switch (d->kind) {
    case SWITCH:
        *(bool *)field = true;
        break;
    case WORD:
        *(const char **)field = d->word ? d->word : value;
        break;
    case LIST:
        g_ptr_array_add(*(GPtrArray **)field, (void *)value);
        break;
    case IGNORED:
        break;
    }
}

static bool hint_help(void)
{
    fprintf(stderr, "Try 'qemu-io --help' for more information\n");
    return false;
}

static bool take_option(Program *p, int c, const char *value)
{
    for (size_t i = 0; i < G_N_ELEMENTS(destinations); i++) {
        if (destinations[i].c == c) {
            store(p, &destinations[i], value);
            return true;
        }
    }
    return hint_help(); /* getopt has named what it does not know */
}

/* What is left of the command line: FILE, or its options. */
static bool take_file(Program *p, int n, char **words)
{
    GError *err = NULL;

    if (n > 1) {
        qio_error("Only one file can be opened, what is '%s'?", words[1]);
        return hint_help();
    }
    if (p->image_opts && p->format) {
        return qio_error("--image-opts and -f are mutually exclusive");
    }
    if (n == 1 && p->image_opts) {
        p->open.options = qb_opts_parse(words[0], NULL, &err);
        return p->open.options || qio_error_prefixed(err, "can't open: ");
    }
    p->open.filename = n == 1 ? words[0] : NULL;
    if (n == 1 && p->format) {
        p->open.options = json_object();
        json_object_set_new(p->open.options, "driver", json_string(p->format));
    }
    return true;
}

static bool parse_program(Program *p, int argc, char **argv)
{
    int c;

    while ((c = getopt_long(argc, argv, short_options, long_options, NULL)) != -1) {
        if (!take_option(p, c, optarg)) {
            return false;
        }
    }
    return p->help || p->version || take_file(p, argc - optind, argv + optind);
}

static bool check_objects(const Program *p)
{
    GError *err = NULL;

    return tool_check_objects(p->objects, &err) || qio_error_prefixed(err, "%s", "");
}

/* --- running --- */

static void run_commands(QioShell *sh, const Program *p)
{
    if (p->commands->len == 0) {
        qio_run_stdin(sh);
        return;
    }
    for (guint i = 0; i < p->commands->len && !sh->quit; i++) {
        g_autofree char *line = g_strdup(g_ptr_array_index(p->commands, i));
        qio_run_line(sh, line);
    }
}

static bool run_program(Program *p)
{
    QioShell sh = {
        .aio = qio_aio_new(),
        .tags = g_ptr_array_new_with_free_func(g_free),
        .misalign = p->misalign,
    };
    bool has_file = p->open.filename || (p->image_opts && p->open.options);

    sh.failed = has_file && !qio_open(&sh, &p->open);
    if (!sh.failed) {
        run_commands(&sh, p);
    }
    if (sh.blk && !qio_close(&sh)) {
        sh.failed = true;
    }
    qio_aio_free(sh.aio);
    g_ptr_array_unref(sh.tags);
    return !sh.failed;
}

static bool print_about(const Program *p)
{
    if (p->help) {
        fputs(usage_text, stdout);
    } else {
        printf("qemu-io version " QB_VERSION " (qemu-block)\n");
    }
    return true;
}

static bool run_process(Program *p)
{
    bool ok;

    bdrv_init();
    bdrv_set_warning_handler(print_warning, NULL);
    ok = check_objects(p) && run_program(p);
    qb_pools_shutdown();
    return ok;
}

int main(int argc, char **argv)
{
    g_autoptr(GPtrArray) commands = g_ptr_array_new(), objects = g_ptr_array_new();
    Program p = {.commands = commands, .objects = objects};

    /* A file size limit is an error of the write that meets it, not the end of the tool. */
    signal(SIGXFSZ, SIG_IGN);
    bool ok = parse_program(&p, argc, argv);

    if (ok) {
        ok = p.help || p.version ? print_about(&p) : run_process(&p);
    }
    json_decref(p.open.options);
    if (fflush(stdout) != 0) {
        ok = qio_error("Could not write to the standard output");
    }
    return ok ? 0 : 1;
}
