/*
 * qemu-io's private header: what the command groups share.
 *
 *   main.c      program options, the life of the process
 *   shell.c     a line becomes words, words run a command; the prompt
 *   commands.c  THE table of commands, and help
 *   args.c      options, numbers and patterns of a command
 *   report.c    what is said of a request that is done
 *   request.c   the description of a transfer: parsing, buffers, checking, printing
 *   rw.c        read readv write writev discard
 *   aio.c       aio_read aio_write aio_flush
 *   image.c     open close reopen
 *   facts.c     alloc map length info truncate flush
 *   debug.c     break remove_break resume wait_break abort sigraise sleep
 *
 * Everything here runs in the main thread unless it says otherwise.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef QEMU_IO_QIO_H
#define QEMU_IO_QIO_H

#include <stdbool.h>
#include <inttypes.h>
#include <stddef.h>
#include <stdint.h>
#include <glib.h>
#include <jansson.h>
#include "block/block-backend.h"
#include "block/block.h"
#include "block/driver.h"
#include "util/error.h"
#include "util/iov.h"
#include "util/options.h"
#include "util/size.h"
#include "util/thread.h"

typedef struct QioAio QioAio;

/* The state that one command leaves to the next. */
typedef struct QioShell {
    BlockBackend *blk; /* NULL: no file open */
    QioAio *aio;       /* requests of aio_*; never NULL */
    GPtrArray *tags;   /* char *: breakpoints set since the file was opened */
    bool misalign;     /* -m: buffers that direct I/O cannot use as they are */
    bool quit;         /* no command after this one */
    bool failed;       /* one of them did not succeed */
} QioShell;

/* The words of a command line, sorted. Option letters are below 128. */
typedef struct QioArgs {
    bool given[128];
    const char *value[128];
    char **operand; /* borrowed, NULL-terminated */
    int n;
} QioArgs;

/* What must be there before a command runs. */
enum {
    QIO_FILE = 1 << 0,   /* an open file */
    QIO_WRITE = 1 << 1,  /* that may be written */
    QIO_RESIZE = 1 << 2, /* and resized */
};

typedef struct QioCommand {
    const char *name, *alias;
    bool (*run)(QioShell *sh, const QioArgs *args); /* false: it has said what was wrong */
    int argmin, argmax;       /* words after the name; argmax < 0: any number */
    const char *letters;      /* getopt's; NULL: a word that begins with '-' is an operand */
    int operands, operands_max; /* left after options; else the synopsis is printed */
    unsigned needs;
    const char *synopsis, *summary;
    const char *details; /* lines for "help NAME", or NULL */
} QioCommand;

/* ---- main.c ---- */

/* "qemu-io: TEXT" on stderr, behind what stdout has so far. Returns false. */
bool qio_error(const char *fmt, ...) G_GNUC_PRINTF(1, 2);
/* The same for @err, which is freed, after a prefix. */
bool qio_error_prefixed(GError *err, const char *fmt, ...) G_GNUC_PRINTF(2, 3);
/* TEXT on stdout, for what the field's tool says there. Returns false. */
bool qio_fail(const char *fmt, ...) G_GNUC_PRINTF(1, 2);

/* ---- shell.c ---- */

/* Runs one line, then prints the reports of asynchronous requests that are done. A failure sets
 * sh->failed. @line is changed. */
void qio_run_line(QioShell *sh, char *line);
/* Prompts, reads and runs lines of stdin until quit or the end. */
void qio_run_stdin(QioShell *sh);

/* ---- commands.c ---- */

const QioCommand *qio_find_command(const char *name);
void qio_print_synopsis(const QioCommand *cmd);
bool qio_cmd_help(QioShell *sh, const QioArgs *args);

/* ---- args.c ---- */

/* Sorts @argv (NULL-terminated, [0] is the command) by @cmd's letters. False: said. */
bool qio_parse_args(const QioCommand *cmd, int argc, char **argv, QioArgs *ret);
/* A number of bytes, 0..INT64_MAX, with suffix. False: said. */
bool qio_parse_size(const char *text, int64_t *ret);
/* "offset" and "length" as first and second operand; the length at most BDRV_REQUEST_MAX_BYTES. */
bool qio_parse_range(const QioArgs *args, int64_t *ret_offset, int64_t *ret_bytes);
/* Says that @bytes, written as @text, is too much. */
bool qio_check_length(int64_t bytes, const char *text);
/* 0..255 in any C notation. False: said. */
bool qio_parse_byte(const char *text, int *ret);

/* ---- report.c ---- */

/* "64 KiB", "1.500 MiB", "40 bytes". Newly allocated. */
char *qio_size_text(double bytes);
typedef struct QioReport {
    const char *verb; /* "wrote" */
    int64_t offset, bytes;
    uint64_t ns; /* it took */
    bool machine; /* -C */
} QioReport;
void qio_print_report(const QioReport *r);
/* The bytes as lines of 16, numbered from @offset. */
void qio_dump(const uint8_t *data, size_t bytes, int64_t offset);

/* ---- request.c ---- */

enum {
    QIO_FILL_READ = 0xab,  /* what a read must overwrite */
    QIO_FILL_WRITE = 0xcd, /* what is written where nothing was said */
};

/* A transfer from its command line to its report. */
typedef struct QioRequest {
    const char *verb;      /* of the report: "read", "wrote", "discard" */
    const char *fail_verb; /* "read", "readv", "aio_write" */
    int64_t offset, bytes;
    int flags; /* BdrvRequestFlags */
    bool quiet, dump, machine;

    void *memory;  /* free() it */
    uint8_t *data; /* inside memory; NULL for zeroes and discards */
    IoVector qiov;

    bool check; /* compare data[check_offset, +check_bytes) with pattern */
    int pattern;
    int64_t check_offset, check_bytes;

    uint64_t started, ended; /* qb_now_ns() */
    int ret;
    QioAio *aio; /* where it is reported to */
} QioRequest;

/* NULL is fine. */
void qio_request_free(QioRequest *req);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(QioRequest, qio_request_free)
/* A request with what -C -q -v -f -u -n -c -r ask for; no range, no buffer. */
QioRequest *qio_request_new(const QioArgs *args);
/* -P and, with it, -s and -l of the readers, once the range is known. False: said. */
bool qio_request_parse_check(QioRequest *req, const QioArgs *args);
/* A buffer of @req->bytes filled with @fill, as one element. False: said. */
bool qio_request_alloc(QioShell *sh, QioRequest *req, int fill);
/* The operands from @first on are lengths: sets bytes, and a buffer of that many elements. */
bool qio_request_alloc_vector(QioShell *sh, QioRequest *req, const QioArgs *args, int first,
                              int fill);
/* Says how the (ended) request went. False: it failed, or read something else than -P says. */
bool qio_request_print(const QioRequest *req);

/* ---- rw.c ---- */

bool qio_cmd_read(QioShell *sh, const QioArgs *args);
bool qio_cmd_readv(QioShell *sh, const QioArgs *args);
bool qio_cmd_write(QioShell *sh, const QioArgs *args);
bool qio_cmd_writev(QioShell *sh, const QioArgs *args);
bool qio_cmd_discard(QioShell *sh, const QioArgs *args);

/* ---- aio.c ---- */

QioAio *qio_aio_new(void);
/* Nothing may be in flight, nor unreported. */
void qio_aio_free(QioAio *aio);
/* Prints the reports of requests that are done; does not wait. */
void qio_aio_report(QioAio *aio);
/* Waits until nothing is in flight, and reports: NULL. When that will never be, since a request is
 * suspended at a breakpoint, returns its tag (borrowed). */
const char *qio_aio_settle(QioShell *sh);
/* The same for commands. False: said. */
bool qio_aio_wait(QioShell *sh);
unsigned qio_aio_in_flight(QioAio *aio);
/* Submits @req, which is taken over, and waits for its end, to report it. When that will not come, as
 * a request is suspended at a breakpoint, it says so and leaves @req in flight. */
bool qio_aio_run(QioShell *sh, QioRequest *req, BlkOp op);
bool qio_cmd_aio_read(QioShell *sh, const QioArgs *args);
bool qio_cmd_aio_write(QioShell *sh, const QioArgs *args);
bool qio_cmd_aio_flush(QioShell *sh, const QioArgs *args);

/* ---- image.c ---- */

/* How a file is to be opened, by the program's options or those of "open". */
typedef struct QioOpen {
    const char *filename; /* may be NULL: options say it all */
    json_t *options;      /* flat; borrowed; may be NULL */
    const char *cache, *discard, *aio; /* NULL: writethrough, unmap, the driver's choice */
    bool read_only, snapshot, copy_on_read, force_share;
} QioOpen;
/* No file may be open. False: said. */
bool qio_open(QioShell *sh, const QioOpen *how);
/* Completes and reports what is in flight, releasing breakpoints; flushes; closes. False: said. */
bool qio_close(QioShell *sh);
/* Gets the permissions that @needs stands for. False: said. */
bool qio_want_permissions(QioShell *sh, unsigned needs);
bool qio_cmd_open(QioShell *sh, const QioArgs *args);
bool qio_cmd_close(QioShell *sh, const QioArgs *args);
bool qio_cmd_reopen(QioShell *sh, const QioArgs *args);
bool qio_cmd_quit(QioShell *sh, const QioArgs *args);

/* ---- facts.c ---- */

bool qio_cmd_alloc(QioShell *sh, const QioArgs *args);
bool qio_cmd_map(QioShell *sh, const QioArgs *args);
bool qio_cmd_length(QioShell *sh, const QioArgs *args);
bool qio_cmd_info(QioShell *sh, const QioArgs *args);
bool qio_cmd_truncate(QioShell *sh, const QioArgs *args);
bool qio_cmd_flush(QioShell *sh, const QioArgs *args);

/* ---- debug.c ---- */

/* The tag of a request that is suspended, or NULL. Borrowed. */
const char *qio_suspended_tag(QioShell *sh);
/* Removes all breakpoints and waits for all requests, as they go on. Reports. */
void qio_release_breakpoints(QioShell *sh);
bool qio_cmd_break(QioShell *sh, const QioArgs *args);
bool qio_cmd_remove_break(QioShell *sh, const QioArgs *args);
bool qio_cmd_resume(QioShell *sh, const QioArgs *args);
bool qio_cmd_wait_break(QioShell *sh, const QioArgs *args);
bool qio_cmd_abort(QioShell *sh, const QioArgs *args);
bool qio_cmd_sigraise(QioShell *sh, const QioArgs *args);
bool qio_cmd_sleep(QioShell *sh, const QioArgs *args);

#endif
