/*
 * Breakpoints, and other ways to be in the right place at the right time.
 *
 *     break write_aio A       the next request that comes by "write_aio" stops, and is called A
 *     aio_write 0 4k
 *     wait_break A            until it has stopped there
 *     ...                     whatever shall happen meanwhile
 *     resume A
 *
 * Breakpoints belong to the first node below the image that has them (file name "blkdebug:...").
 *
 * Invariant: the tags of all breakpoints set since the file was opened are in sh->tags, so that
 * closing can release what is still suspended and waits for no request that nobody will resume.
 *
 * SPDX-License-Identifier: MIT
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "qemu-io/qio.h"

enum {
    POLL_MS = 1,
    GRACE_MS = 500, /* nothing of ours is in flight, but the image's own threads may come by */
};

static void sleep_ms(uint64_t ms)
{
    struct timespec left = {(time_t)(ms / 1000), (long)(ms % 1000) * 1000000};

    while (nanosleep(&left, &left) < 0 && errno == EINTR) {
    }
}

bool qio_cmd_break(QioShell *sh, const QioArgs *args)
{
    const char *tag = args->operand[1];
    int ret = bdrv_debug_breakpoint(blk_bs(sh->blk), args->operand[0], tag);

    if (ret < 0) {
        return qio_fail("Could not set breakpoint: %s", g_strerror(-ret));
    }
    g_ptr_array_add(sh->tags, g_strdup(tag));
    return true;
}

bool qio_cmd_remove_break(QioShell *sh, const QioArgs *args)
{
    int ret = bdrv_debug_remove_breakpoint(blk_bs(sh->blk), args->operand[0]);

    if (ret < 0) {
        return qio_fail("Could not remove breakpoint %s: %s", args->operand[0], g_strerror(-ret));
    }
    return true;
}

bool qio_cmd_resume(QioShell *sh, const QioArgs *args)
{
    int ret = bdrv_debug_resume(blk_bs(sh->blk), args->operand[0]);

    if (ret < 0) {
        return qio_fail("Could not resume request: %s", g_strerror(-ret));
    }
    printf("blkdebug: Resuming request '%s'\n", args->operand[0]);
    return true;
}

const char *qio_suspended_tag(QioShell *sh)
{
    for (guint i = 0; i < sh->tags->len; i++) {
        const char *tag = g_ptr_array_index(sh->tags, i);
        if (bdrv_debug_is_suspended(blk_bs(sh->blk), tag)) {
            return tag;
        }
    }
    return NULL;
}

void qio_release_breakpoints(QioShell *sh)
{
    const char *tag;

    for (guint i = 0; i < sh->tags->len; i++) {
        (void)bdrv_debug_remove_breakpoint(blk_bs(sh->blk), g_ptr_array_index(sh->tags, i));
    }
    /* A request that met several breakpoints at once stops at one after the other. */
    while ((tag = qio_aio_settle(sh))) {
        (void)bdrv_debug_remove_breakpoint(blk_bs(sh->blk), tag);
    }
    g_ptr_array_set_size(sh->tags, 0);
}

bool qio_cmd_wait_break(QioShell *sh, const QioArgs *args)
{
    const char *tag = args->operand[0];
    uint64_t idle_ms = 0;

    while (!bdrv_debug_is_suspended(blk_bs(sh->blk), tag)) {
        if (qio_aio_in_flight(sh->aio) > 0) {
            idle_ms = 0;
        } else if ((idle_ms += POLL_MS) > GRACE_MS) {
            return qio_error("no request has stopped at '%s', and none is in flight", tag);
        }
        sleep_ms(POLL_MS);
    }
    printf("blkdebug: Suspended request '%s'\n", tag);
    return true;
}

/* --- the process --- */

bool qio_cmd_abort(QioShell *sh, const QioArgs *args)
{
    fflush(stdout);
    abort();
}

bool qio_cmd_sigraise(QioShell *sh, const QioArgs *args)
{
    int64_t number;

    if (!qio_parse_size(args->operand[0], &number)) {
        return false;
    }
    if (number >= NSIG) {
        return qio_fail("signal argument '%s' is too large to be a valid signal",
                        args->operand[0]);
    }
    fflush(stdout);
    return raise((int)number) == 0 || qio_fail("raise failed: %s", g_strerror(errno));
}

bool qio_cmd_sleep(QioShell *sh, const QioArgs *args)
{
    uint64_t ms;

    if (qb_uint_parse(args->operand[0], &ms) < 0) {
        return qio_fail("%s is not a valid number", args->operand[0]);
    }
    sleep_ms(ms);
    return true;
}
