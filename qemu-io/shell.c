/*
 * The shell: lines in, commands out.
 *
 *     line --split--> words --table--> command --needs--> file open? writable? --args--> run
 *                                                                                         |
 *     prompt <-- flush <-- reports of asynchronous requests that are done by now <--------'
 *
 * Invariants
 * 1. Reports are printed by the main thread between commands, so never inside another line.
 * 2. What a command has said has left the process before the next line is looked at: a program at
 *    the other end of a pipe can take the prompt for the end of an answer.
 * 3. A line that fails does not keep the next from running; the exit status remembers it.
 *
 * Words are separated by blanks; there is no quoting, as in the field's tool.
 * Not done here: history and completion; `rlwrap qemu-io` gives both.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "qemu-io/qio.h"

#define BLANKS " \t\r\n"

/* The words of @line, in place; NULL-terminated. */
static GPtrArray *split_words(char *line)
{
    GPtrArray *words = g_ptr_array_new();
    char *rest = NULL;

    for (char *w = strtok_r(line, BLANKS, &rest); w; w = strtok_r(NULL, BLANKS, &rest)) {
        g_ptr_array_add(words, w);
    }
    g_ptr_array_add(words, NULL);
    return words;
}

static bool complain_count(const QioCommand *cmd, int n)
{
    g_autofree char *expected = NULL;

    if (cmd->argmax < 0) {
        expected = g_strdup_printf("at least %d", cmd->argmin);
    } else if (cmd->argmin == cmd->argmax) {
        expected = g_strdup_printf("%d", cmd->argmin);
    } else {
        expected = g_strdup_printf("between %d and %d", cmd->argmin, cmd->argmax);
    }
    fflush(stdout);
    fprintf(stderr, "bad argument count %d to %s, expected %s arguments\n", n, cmd->name, expected);
    return false;
}

static bool have_what_it_needs(QioShell *sh, const QioCommand *cmd, int n)
{
    if ((cmd->needs & QIO_FILE) && !sh->blk) {
        fflush(stdout);
        fprintf(stderr, "no file open, try 'help open'\n");
        return false;
    }
    if (n < cmd->argmin || (cmd->argmax >= 0 && n > cmd->argmax)) {
        return complain_count(cmd, n);
    }
    return qio_want_permissions(sh, cmd->needs);
}

static bool run_words(QioShell *sh, int argc, char **argv)
{
    const QioCommand *cmd = qio_find_command(argv[0]);
    QioArgs args;

    if (!cmd) {
        fflush(stdout);
        fprintf(stderr, "command \"%s\" not found\n", argv[0]);
        return false;
    }
    return have_what_it_needs(sh, cmd, argc - 1) && qio_parse_args(cmd, argc, argv, &args) &&
           cmd->run(sh, &args);
}

void qio_run_line(QioShell *sh, char *line)
{
    g_autoptr(GPtrArray) words = split_words(line);
    int argc = (int)words->len - 1;

    if (argc > 0 && !run_words(sh, argc, (char **)words->pdata)) {
        sh->failed = true;
    }
    qio_aio_report(sh->aio);
    fflush(stdout);
}

static char *prompt_and_read(char **buffer, size_t *size)
{
    fputs("qemu-io> ", stdout);
    fflush(stdout);
    return getline(buffer, size, stdin) < 0 ? NULL : *buffer;
}

void qio_run_stdin(QioShell *sh)
{
    char *buffer QB_AUTO_FREE = NULL;
    size_t size = 0;

    while (!sh->quit && prompt_and_read(&buffer, &size)) {
        qio_run_line(sh, buffer);
    }
}
