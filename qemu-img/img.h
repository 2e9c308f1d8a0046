/*
 * qemu-img's private header: what the verbs share.
 *
 *   main.c      finds the verb                    args.c      the one option parser
 *   common.c    opening, messages, exit codes     progress.c  -p, SIGUSR1, SIGINT
 *   sandbox.c   --sandbox                         partitions.c  tables of a disk (partitions.h)
 *   VERB.c      one file per verb                 create-options.c  -o of create and convert
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef QEMU_IMG_IMG_H
#define QEMU_IMG_IMG_H

#include <stdbool.h>
#include <inttypes.h>
#include <stddef.h>
#include <stdint.h>
#include <glib.h>
#include <jansson.h>
#include "block/block-backend.h"
#include "block/block.h"
#include "tools/output.h"
#include "util/error.h"
#include "util/options.h"
#include "util/progress.h"
#include "util/size.h"

typedef struct ImgVerb {
    const char *name;
    int (*run)(int argc, char **argv); /* argv[0] is the verb; returns the exit status */
    const char *summary;
} ImgVerb;

int img_amend(int argc, char **argv);
int img_bench(int argc, char **argv);
int img_bitmap(int argc, char **argv);
int img_check(int argc, char **argv);
int img_commit(int argc, char **argv);
int img_compare(int argc, char **argv);
int img_convert(int argc, char **argv);
int img_create(int argc, char **argv);
int img_dd(int argc, char **argv);
int img_info(int argc, char **argv);
int img_map(int argc, char **argv);
int img_measure(int argc, char **argv);
int img_rebase(int argc, char **argv);
int img_resize(int argc, char **argv);
int img_snapshot(int argc, char **argv);

/* ---- args.c ---- */

typedef enum ImgOptionKind {
    IMG_END = 0,
    IMG_FLAG,   /* bool, set to true */
    IMG_STRING, /* const char *, the last one wins */
    IMG_LIST,   /* GPtrArray * of const char *, made at the first */
    IMG_JOINED, /* char *, repeated values joined with commas (-o) */
    IMG_SIZE,   /* uint64_t; has a long name */
    IMG_ACTION, /* GArray * of ImgAction in the order given, made at the first; long form only */
    IMG_ACTION_VALUE, /* the same, with a value */
    IMG_IGNORED /* accepted with an argument, without effect */
} ImgOptionKind;

/* One option of a verb: where its value goes in the verb's argument struct. */
typedef struct ImgOption {
    ImgOptionKind kind;
    int letter;       /* 0: long form only */
    const char *name; /* NULL: short form only */
    size_t field;     /* offsetof() */
    const char *value; /* how --help names the argument */
    const char *help;
} ImgOption;

#define IMG_SANDBOX_OPTION(args) \
    {IMG_STRING, 0, "sandbox", offsetof(args, sandbox), "MODE", \
     "give up what is not needed once the image is open: auto, on, off"}
#define IMG_UNTRUSTED_OPTION(args) \
    {IMG_FLAG, 0, "untrusted", offsetof(args, untrusted), NULL, "open nothing that an image names"}

/* An action of a verb that carries out several in order. */
typedef struct ImgAction {
    const char *name;
    const char *value; /* NULL: takes none */
} ImgAction;

typedef struct ImgUsage {
    const char *verb;
    const char *operands; /* "FILE [SIZE]" */
    const char *summary;
    const ImgOption *options;
} ImgUsage;

/* Parses @argv into @args by the table. Operands go to @operands (borrowed strings) in order; a
 * word that looks like a negative number is an operand. False: the verb is done with *ret_status,
 * 0 after --help, 1 after an error that was said. */
bool img_parse_args(const ImgUsage *usage, int argc, char **argv, void *args,
                    GPtrArray *operands, int *ret_status);
/* "qemu-img: MSG" and the hint to try --help; returns 1. */
int img_usage_error(const char *verb, const char *fmt, ...) G_GNUC_PRINTF(2, 3);
/* --output: "human" or "json"; false: said. */
bool img_parse_output(const char *verb, const char *text, bool *ret_json);

/* ---- common.c ---- */

void img_set_argv0(const char *argv0);
const char *img_argv0(void);
/* "qemu-img: TEXT" on stderr. */
void img_error(const char *fmt, ...) G_GNUC_PRINTF(1, 2);
void img_warn(const char *fmt, ...) G_GNUC_PRINTF(1, 2);
/* Says @err (freed) after an optional prefix, and returns @status. */
int img_report(GError *err, int status);
int img_report_prefixed(GError *err, int status, const char *fmt, ...) G_GNUC_PRINTF(3, 4);

/* How an image is to be opened; zero-initialised means: read-only, writeback, probe. */
typedef struct ImgOpen {
    const char *format;
    bool image_opts;
    const char *cache; /* NULL: writeback */
    const char *what;  /* said of a failure: "Could not open WHAT: ..."; NULL: nothing more */
    bool force_share;
    bool unmap;        /* zeroes and discards may give space back */
    int flags;         /* BdrvOpenFlags */
    bool untrusted;    /* --untrusted: open nothing that the image names */
    const char *sandbox; /* --sandbox of a verb that only looks: "auto", "on", "off"; NULL: none */
} ImgOpen;
/* NULL: said. */
BlockBackend *img_open(const char *name, const ImgOpen *how);
/* What a verb without --sandbox does; "off" unless the process is one verb's alone. */
void img_set_default_sandbox(const char *mode);
/* The mode of a verb that has the option: @said or the default. */
const char *img_sandbox_mode(const char *said);
/* --sandbox: NULL and "auto", "on", "off" are fine; false: said. */
bool img_check_sandbox(const char *verb, const char *mode);
/* What img_open() does with the options it made of @how (reference stolen): opens, and enters the sandbox
 * when that is wanted. */
BlockBackend *img_open_guarded(const char *name, const ImgOpen *how, json_t *options,
                               GError **errp);
/* --image-opts and -f exclude each other; false: said. */
bool img_check_open_args(const char *format, bool image_opts);
/* Is @mode (or NULL) a cache mode? @which: "source " or "". False: said. */
bool img_check_cache(const char *which, const char *mode);
/* Stores bitmaps, flushes and closes. Returns @status, or 1 when that is 0 and storing or flushing
 * failed, which is then said
 * (a verb that failed has said why: one error is enough). */
int img_close(BlockBackend *blk, int status);
/* Lets a read-only node show a snapshot: "ID", else "NAME", or "snapshot.id=ID,snapshot.name=NAME"
 * (one of them will do). False: said. */
bool img_load_snapshot(BlockDriverState *bs, const char *text);
/* --object is accepted for kinds that change nothing here; false: said. */
bool img_check_objects(const GPtrArray *objects);
/* A size in @text, which is the @what ("image size"); false: said as users know it. */
bool img_parse_size(const char *what, const char *text, uint64_t *ret);

/* ---- resize-dry-run.c ---- */

typedef struct ImgDryRun {
    int64_t size; /* that the guest's disk is to get */
    bool json, quiet, progress;
} ImgDryRun;
/* resize --dry-run of an image that is open read-only: tells what would be lost. The exit status:
 * 0 nothing, 1 failed (said), 2 something. */
int img_resize_dry_run(BlockBackend *blk, const ImgDryRun *how);

/* ---- progress.c ---- */

/* Before the first thread: blocks the signals that progress.c takes. */
void img_progress_init(void);
/* From now on @p is reported: with @show every change, else on SIGUSR1. SIGINT and SIGTERM set
 * p->cancel. One at a time. */
void img_progress_start(QbProgress *p, bool show);
/* Prints the end (100 % if @success) and stops reporting. */
void img_progress_end(bool success);
/* True when a signal asked to stop. */
bool img_interrupted(void);
/* bdrv_img_create() that signals stop: what it made is removed then, as after any failure. */
bool img_create_stoppable(const char *name, const char *format, json_t *options, GError **errp);

#endif
