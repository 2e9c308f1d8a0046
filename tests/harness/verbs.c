/*
 * The verbs of qemu-img, run inside the test's process: the code is the tool's, only main() is not.
 *
 *      "resize --shrink a 1M"  -->  argv  -->  img_resize()       stdout, stderr --> text
 *
 * Both streams are exchanged for one in memory while a verb runs; file descriptor 2 stays what it
 * is, so that the sanitizers are heard.
 *
 * SPDX-License-Identifier: MIT
 */
#include "tests/harness/verbs.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "qemu-img/img.h"

static const ImgVerb verbs[] = {
    {.name = "amend", .run = img_amend},     {.name = "check", .run = img_check},
    {.name = "commit", .run = img_commit},   {.name = "convert", .run = img_convert},
    {.name = "create", .run = img_create},   {.name = "rebase", .run = img_rebase},
    {.name = "resize", .run = img_resize},   {.name = "snapshot", .run = img_snapshot},
};

static const ImgVerb *find_verb(const char *name)
{
    for (size_t i = 0; i < G_N_ELEMENTS(verbs); i++) {
        if (!strcmp(verbs[i].name, name)) {
            return &verbs[i];
        }
    }
    g_error("no verb '%s'", name);
}

static int run_quietly(const ImgVerb *verb, int argc, char **argv, char **ret_said)
{
    char *text = NULL;
    size_t size;
    FILE *memory = open_memstream(&text, &size), *out = stdout, *err = stderr;
    g_assert_nonnull(memory);
    stdout = stderr = memory;
    int status = verb->run(argc, argv);
    stdout = out;
    stderr = err;
    fclose(memory);
    if (ret_said) {
        *ret_said = g_strdup(text);
    }
    free(text);
    return status;
}

int verb_run(const char *command, char **ret_said)
{
    g_auto(GStrv) argv = NULL;
    int argc;
    gboolean ok = g_shell_parse_argv(command, &argc, &argv, NULL);
    g_assert_true(ok);
    return run_quietly(find_verb(argv[0]), argc, argv, ret_said);
}
