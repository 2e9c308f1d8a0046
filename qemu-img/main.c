/*
 * qemu-img: offline work on disk images.  This file finds the verb and runs it.
 *
 *      qemu-img [--help | --version | -T SPEC] VERB ...  ->  verbs[]  ->  VERB.c
 *
 * Invariant: signals are blocked for all threads before the first one starts (progress.c's reporter
 * is the only thread that takes them), and pools are joined before exit.
 *
 * SPDX-License-Identifier: MIT
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "qemu-img/img.h"
#include "util/pool.h"

static const ImgVerb verbs[] = {
    {"amend", img_amend, "change options of an existing image"},
    {"bench", img_bench, "measure how fast an image takes requests"},
    {"bitmap", img_bitmap, "change persistent dirty bitmaps"},
    {"check", img_check, "check an image for consistency, and repair it"},
    {"commit", img_commit, "move an overlay's content into its backing file"},
    {"compare", img_compare, "compare the content of two images"},
    {"convert", img_convert, "copy images into another format or layout"},
    {"create", img_create, "create an image"},
    {"dd", img_dd, "copy a part of an image into a new one"},
    {"info", img_info, "tell what an image is"},
    {"map", img_map, "tell where an image's content lies"},
    {"measure", img_measure, "tell how large a new image would be"},
    {"rebase", img_rebase, "change the backing file of an image"},
    {"resize", img_resize, "grow or shrink an image"},
    {"snapshot", img_snapshot, "list, create, apply and delete internal snapshots"},
};

static void print_version(void)
{
    printf("qemu-img version " QB_VERSION " (qemu-block)\n");
}

static int print_help(void)
{
    print_version();
    printf("Usage:\n  %s [--help|--version|--trace SPEC] COMMAND [OPTION...]\n\nCommands:\n",
           img_argv0());
    for (size_t i = 0; i < G_N_ELEMENTS(verbs); i++) {
        printf("  %-10s %s\n", verbs[i].name, verbs[i].summary);
    }
    printf("\n'%s COMMAND --help' tells the options of a command.\n", img_argv0());
    return 0;
}

static int run_verb(int argc, char **argv)
{
    for (size_t i = 0; i < G_N_ELEMENTS(verbs); i++) {
        if (!strcmp(argv[0], verbs[i].name)) {
            int status = verbs[i].run(argc, argv);
            if ((fflush(stdout) != 0 || ferror(stdout)) && status == 0) {
                img_error("Could not write to the standard output");
                status = 1;
            }
            return status;
        }
    }
    return img_usage_error(NULL, "Command not found: %s", argv[0]);
}

/* Options before the verb. Returns the index of the verb, or -1 with *ret_status. */
static int parse_global(int argc, char **argv, int *ret_status)
{
    int i = 1;

    for (; i < argc && argv[i][0] == '-'; i++) {
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) {
            *ret_status = print_help();
            return -1;
        }
        if (!strcmp(argv[i], "--version") || !strcmp(argv[i], "-V")) {
            print_version();
            *ret_status = 0;
            return -1;
        }
        if ((!strcmp(argv[i], "-T") || !strcmp(argv[i], "--trace")) && i + 1 < argc) {
            i++; /* there is nothing to trace; scripts may say it */
            continue;
        }
        *ret_status = img_usage_error(NULL, "unrecognized option '%s'", argv[i]);
        return -1;
    }
    if (i >= argc) {
        *ret_status = img_usage_error(NULL, "Not enough arguments");
        return -1;
    }
    return i;
}

/* Two kinds are known without our name in front: on probing, and what a format says of itself. */
static void print_warning(const char *text, void *opaque)
{
    bool bare = g_str_has_prefix(text, "WARNING: ") || g_str_has_prefix(text, "qcow2: ");

    if (!bare) {
        img_warn("%s", text);
        return;
    }
    fflush(stdout);
    fprintf(stderr, "%s\n", text);
}

int main(int argc, char **argv)
{
    int status = 0;
    int verb;

    /* A file size limit is an error of the write that meets it, not the end of the tool. */
    signal(SIGXFSZ, SIG_IGN);
    img_set_argv0(argv[0]);
    verb = parse_global(argc, argv, &status);
    if (verb < 0) {
        return status;
    }
    img_progress_init();
    bdrv_init();
    img_set_default_sandbox("auto");
    bdrv_set_warning_handler(print_warning, NULL);
    status = run_verb(argc - verb, argv + verb);
    qb_pools_shutdown();
    return status;
}
