/*
 * THE table of commands, and help.
 *
 * Everything the shell must know of a command is one entry: how many words it takes, which option
 * letters, what must be there before it runs, and what help says.  Sorted by name; help shows the
 * order of the table.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdio.h>
#include <string.h>
#include "qemu-io/qio.h"

enum { ANY = -1 };

#define NEEDS_WRITE (QIO_FILE | QIO_WRITE)
#define NEEDS_RESIZE (QIO_FILE | QIO_WRITE | QIO_RESIZE)

#define HELP_C " -C  numbers for programs: bytes,operations,time,bytes/s,operations/s\n"
#define HELP_P_READ " -P  complain unless every byte read is this one\n"
#define HELP_P_WRITE " -P  write this byte instead of 0xcd\n"
#define HELP_Q " -q  say nothing of success\n"
#define HELP_R " -r  use a registered buffer where the storage knows such\n"
#define HELP_V " -v  dump what was read\n"
#define HELP_F " -f  be stable on return (force unit access)\n"
#define HELP_U " -u  with -z: storage may be given back\n"

static const char read_details[] =
    "Reads LEN bytes at OFF.  'read -P 0xcd 512 1k' checks the kilobyte behind the first sector.\n"
    " -a, -p  accepted, without effect\n"
    " -b  read the VM state, not the disk\n" HELP_C
    " -l  with -P: check that many bytes\n" HELP_P_READ HELP_Q HELP_R
    " -s  with -P: check from there on, counted from OFF\n" HELP_V;

static const char readv_details[] =
    "Reads into as many buffers as there are lengths: 'readv -v 512 1k 1k'.\n" HELP_C HELP_P_READ
    HELP_Q HELP_R HELP_V;

static const char write_details[] =
    "Writes LEN bytes at OFF: 'write -P 7 1M 64k'.\n"
    " -b  write VM state, not the disk\n"
    " -c  write compressed\n" HELP_C HELP_F
    " -n  with -z: fail rather than write zeroes out\n"
    " -p  accepted, without effect\n" HELP_P_WRITE HELP_Q HELP_R
    " -s  write the bytes of this file, over and over\n" HELP_U
    " -z  write zeroes the cheapest way\n";

static const char writev_details[] =
    "Writes from as many buffers as there are lengths: 'writev 512 1k 1k'.\n" HELP_C HELP_F
    HELP_P_WRITE HELP_Q HELP_R;

static const char aio_read_details[] =
    "Starts a read and does not wait for it; its report comes between later commands, at latest\n"
    "with aio_flush.  The command succeeds when the read is on its way, however it ends.\n" HELP_C
    " -i  count as a request that was refused; nothing is read\n" HELP_P_READ HELP_Q HELP_R HELP_V;

static const char aio_write_details[] =
    "Starts a write and does not wait for it; its report comes between later commands, at latest\n"
    "with aio_flush.  Writes that overlap take effect in the order of the commands.\n" HELP_C HELP_F
    " -i  count as a request that was refused; nothing is written\n" HELP_P_WRITE HELP_Q HELP_R
    HELP_U " -z  write zeroes the cheapest way; one length only\n";

static const char discard_details[] =
    "Tells the image that the range is not needed any more.\n" HELP_C HELP_Q;

static const char open_details[] =
    "Opens a file for the other commands: 'open -n -o driver=raw /tmp/data'.\n"
    " -C  copy what is read from backing files into the image\n"
    " -d  discard mode: unmap (default), ignore\n"
    " -i  batches by: threads, native, io_uring\n"
    " -k  same as -i native\n"
    " -n  same as -t none\n"
    " -o  options of the image's driver, key=value,...\n"
    " -r  read-only\n"
    " -s  changes go to a temporary file that is dropped at close\n"
    " -t  cache mode: none, writeback, writethrough (default), directsync, unsafe\n"
    " -U  open although others are writing\n";

static const char reopen_details[] =
    "Changes how the image is open: 'reopen -o lazy-refcounts=on'.\n"
    " -c  cache mode, as for open\n"
    " -o  options of the image's driver\n"
    " -r  from now on read-only\n"
    " -w  from now on writable\n";

static const char break_details[] =
    "The next request that comes by EVENT stops there and is called TAG; 'wait_break TAG' waits\n"
    "for that, 'resume TAG' lets it go on.  Needs a blkdebug node: 'open blkdebug::FILE'.\n";

static const char sigraise_details[] = "'sigraise 15' ends the program as SIGTERM does.\n";

static const QioCommand commands[] = {
    {"abort", NULL, qio_cmd_abort, 0, 0, NULL, 0, 0, 0,
     "", "end the program as a crash does", NULL},
    {"aio_flush", NULL, qio_cmd_aio_flush, 0, 0, NULL, 0, 0, QIO_FILE,
     "", "wait for all asynchronous requests", NULL},
    {"aio_read", NULL, qio_cmd_aio_read, 2, ANY, "CiP:qrv", 2, ANY, QIO_FILE,
     "[-Ciqrv] [-P pattern] off len [len..]", "start reading", aio_read_details},
    {"aio_write", NULL, qio_cmd_aio_write, 2, ANY, "CfiP:qruz", 2, ANY, NEEDS_WRITE,
     "[-Cfiqruz] [-P pattern] off len [len..]", "start writing", aio_write_details},
    {"alloc", "a", qio_cmd_alloc, 1, 2, NULL, 1, 2, QIO_FILE,
     "off [count]", "tell how much of a range is allocated in the image", NULL},
    {"break", NULL, qio_cmd_break, 2, 2, NULL, 2, 2, QIO_FILE,
     "event tag", "stop the next request that comes by an event", break_details},
    {"close", "c", qio_cmd_close, 0, 0, NULL, 0, 0, QIO_FILE,
     "", "close the file", NULL},
    {"discard", "d", qio_cmd_discard, 2, ANY, "Cq", 2, 2, NEEDS_WRITE,
     "[-Cq] off len", "give a range up", discard_details},
    {"flush", "f", qio_cmd_flush, 0, 0, NULL, 0, 0, QIO_FILE,
     "", "make all that was written stable", NULL},
    {"help", "?", qio_cmd_help, 0, 1, NULL, 0, 1, 0,
     "[command]", "tell about one command, or name all", NULL},
    {"info", "i", qio_cmd_info, 0, 0, NULL, 0, 0, QIO_FILE,
     "", "tell what the file is", NULL},
    {"length", "l", qio_cmd_length, 0, 0, NULL, 0, 0, QIO_FILE,
     "", "tell how long the file is", NULL},
    {"map", NULL, qio_cmd_map, 0, 0, NULL, 0, 0, QIO_FILE,
     "", "tell which ranges are allocated in the image", NULL},
    {"open", "o", qio_cmd_open, 1, ANY, "Cd:i:kno:rst:U", 0, 1, 0,
     "[-CknrsU] [-i aio] [-t cache] [-d discard] [-o options] [path]", "open a file",
     open_details},
    {"quit", "q", qio_cmd_quit, 0, ANY, NULL, 0, ANY, 0,
     "", "close the file and end the program", NULL},
    {"read", "r", qio_cmd_read, 2, ANY, "abCl:pP:qrs:v", 2, 2, QIO_FILE,
     "[-abCqrv] [-P pattern [-s off] [-l len]] off len", "read", read_details},
    {"readv", NULL, qio_cmd_readv, 2, ANY, "CP:qrv", 2, ANY, QIO_FILE,
     "[-Cqrv] [-P pattern] off len [len..]", "read into several buffers", readv_details},
    {"remove_break", NULL, qio_cmd_remove_break, 1, 1, NULL, 1, 1, QIO_FILE,
     "tag", "remove the breakpoints of that tag, and resume", NULL},
    {"reopen", NULL, qio_cmd_reopen, 0, ANY, "c:o:rw", 0, 0, QIO_FILE,
     "[(-r|-w)] [-c cache] [-o options]", "change how the file is open", reopen_details},
    {"resume", NULL, qio_cmd_resume, 1, 1, NULL, 1, 1, QIO_FILE,
     "tag", "let a stopped request go on", NULL},
    {"sigraise", NULL, qio_cmd_sigraise, 1, 1, NULL, 1, 1, 0,
     "signal", "raise a signal, by its number", sigraise_details},
    {"sleep", NULL, qio_cmd_sleep, 1, 1, NULL, 1, 1, 0,
     "milliseconds", "wait that long", NULL},
    {"truncate", "t", qio_cmd_truncate, 1, 3, "m:", 1, 1, NEEDS_RESIZE,
     "[-m prealloc] off", "change the length of the file", NULL},
    {"wait_break", NULL, qio_cmd_wait_break, 1, 1, NULL, 1, 1, QIO_FILE,
     "tag", "wait until a request has stopped at a breakpoint", NULL},
    {"write", "w", qio_cmd_write, 2, ANY, "bcCfnpP:qrs:uz", 2, 2, NEEDS_WRITE,
     "[-bcCfnqruz] [-P pattern | -s source_file] off len", "write", write_details},
    {"writev", NULL, qio_cmd_writev, 2, ANY, "CfP:qr", 2, ANY, NEEDS_WRITE,
     "[-Cfqr] [-P pattern] off len [len..]", "write from several buffers", writev_details},
};

const QioCommand *qio_find_command(const char *name)
{
    for (size_t i = 0; i < G_N_ELEMENTS(commands); i++) {
        const QioCommand *cmd = &commands[i];
        if (!strcmp(name, cmd->name) || !g_strcmp0(name, cmd->alias)) {
            return cmd;
        }
    }
    return NULL;
}

void qio_print_synopsis(const QioCommand *cmd)
{
    printf("%s%s%s -- %s\n", cmd->name, *cmd->synopsis ? " " : "", cmd->synopsis, cmd->summary);
}

static void print_all(void)
{
    for (size_t i = 0; i < G_N_ELEMENTS(commands); i++) {
        qio_print_synopsis(&commands[i]);
    }
    printf("\n'help NAME' tells more of a command.\n");
}

bool qio_cmd_help(QioShell *sh, const QioArgs *args)
{
    const QioCommand *cmd;

    if (args->n == 0) {
        print_all();
        return true;
    }
    cmd = qio_find_command(args->operand[0]);
    if (!cmd) {
        return qio_fail("command %s not found", args->operand[0]);
    }
    qio_print_synopsis(cmd);
    if (cmd->details) {
        printf("\n%s", cmd->details);
    }
    return true;
}
