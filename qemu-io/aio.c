/*
 * aio_read, aio_write, aio_flush: requests that the shell does not wait for, or not for ever.
 *
 *   main thread                                      a worker of the request pool
 *   aio_write  submit: order drawn, counted  ------> runs the request
 *   ...other commands...                             done: time, result
 *   between commands:  report <---- finished ------- in_flight - 1, finished + 1
 *
 * The order in which overlapping requests take effect is that of the commands: blk_submit() draws
 * it before it returns.  The order of the reports is that of the completions.
 *
 * Invariants
 * 1. A request is in exactly one place: counted in flight, in the list of the finished, or freed.
 * 2. Only the main thread prints, checks patterns and frees.
 * 3. Nothing is in flight when the file is closed, so a request never outlives its BlockBackend.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdio.h>
#include <string.h>
#include "qemu-io/qio.h"

enum {
    /* A request is suspended, and for that long nothing else has ended: nothing will. */
    STALL_MS = 100,
    /* The same for a request that a command waits for, which may just be slow. */
    STALL_ONE_MS = 1000,
};

struct QioAio {
    QbMutex lock;   /* leaf */
    QbCond changed; /* something has finished */
    unsigned in_flight;
    GQueue finished; /* QioRequest* */
};

QioAio *qio_aio_new(void)
{
    QioAio *aio = g_new0(QioAio, 1);

    qb_mutex_init(&aio->lock);
    qb_cond_init(&aio->changed);
    g_queue_init(&aio->finished);
    return aio;
}

void qio_aio_free(QioAio *aio)
{
    g_assert(aio->in_flight == 0 && g_queue_is_empty(&aio->finished));
    qb_cond_destroy(&aio->changed);
    qb_mutex_destroy(&aio->lock);
    g_free(aio);
}

unsigned qio_aio_in_flight(QioAio *aio)
{
    QB_GUARD(&aio->lock);
    return aio->in_flight;
}

/* In a worker. */
static void request_done(void *opaque, int ret)
{
    QioRequest *req = opaque;
    QioAio *aio = req->aio;

    req->ret = ret;
    req->ended = qb_now_ns();
    QB_GUARD(&aio->lock);
    g_queue_push_tail(&aio->finished, req);
    aio->in_flight--;
    qb_cond_signal(&aio->changed);
}

/* Takes over @req. */
static void submit(QioShell *sh, QioRequest *req, BlkOp op)
{
    QioAio *aio = sh->aio;

    req->aio = aio;
    req->started = qb_now_ns();
    qb_mutex_lock(&aio->lock);
    aio->in_flight++;
    qb_mutex_unlock(&aio->lock);
    blk_submit(sh->blk, op, req->offset, req->bytes, &req->qiov, req->flags, request_done, req);
}

static QioRequest *take_finished(QioAio *aio)
{
    QB_GUARD(&aio->lock);
    return g_queue_pop_head(&aio->finished);
}

void qio_aio_report(QioAio *aio)
{
    QioRequest *req;

    while ((req = take_finished(aio))) {
        /* A failure is reported, but it is none of the command that has long succeeded. */
        (void)qio_request_print(req);
        qio_request_free(req);
    }
}

/* Waits for something to finish. 0: nothing is in flight; -ETIME: nothing has ended for long. */
static int wait_for_one(QioAio *aio)
{
    QB_GUARD(&aio->lock);
    if (g_queue_is_empty(&aio->finished) && aio->in_flight > 0) {
        return qb_cond_timedwait(&aio->changed, &aio->lock, STALL_MS) ? 1 : -ETIME;
    }
    return aio->in_flight > 0 || !g_queue_is_empty(&aio->finished);
}

const char *qio_aio_settle(QioShell *sh)
{
    int ret;

    while ((ret = wait_for_one(sh->aio)) != 0) {
        const char *tag = ret < 0 ? qio_suspended_tag(sh) : NULL;
        qio_aio_report(sh->aio);
        if (tag) {
            return tag;
        }
    }
    return NULL;
}

bool qio_aio_wait(QioShell *sh)
{
    const char *tag = qio_aio_settle(sh);

    return !tag || qio_error("request '%s' is suspended, resume it first", tag);
}

/* True when @req has finished; it is the caller's then. Waits for STALL_ONE_MS at most. */
static bool wait_for(QioAio *aio, QioRequest *req)
{
    uint64_t now = qb_now_ns(), until = now + (uint64_t)STALL_ONE_MS * 1000000;
    bool finished;

    QB_GUARD(&aio->lock);
    while (!(finished = g_queue_remove(&aio->finished, req)) && now < until) {
        qb_cond_timedwait(&aio->changed, &aio->lock, (until - now) / 1000000 + 1);
        now = qb_now_ns();
    }
    return finished;
}

bool qio_aio_run(QioShell *sh, QioRequest *req, BlkOp op)
{
    const char *verb = req->fail_verb, *tag;
    bool ok;

    submit(sh, req, op);
    while (!wait_for(sh->aio, req)) {
        if ((tag = qio_suspended_tag(sh))) {
            /* From now on @req is like one of aio_*: its report tells how it went. */
            (void)qio_error("%s goes on in the background, as request '%s' is suspended", verb, tag);
            return true;
        }
    }
    ok = qio_request_print(req);
    qio_request_free(req);
    return ok;
}

bool qio_cmd_aio_flush(QioShell *sh, const QioArgs *args)
{
    return qio_aio_wait(sh);
}

/* -i: a request that fails before it starts; the command itself has done what it was asked. */
static bool inject_invalid(const char *kind)
{
    printf("injecting invalid %s request\n", kind);
    return true;
}

bool qio_cmd_aio_read(QioShell *sh, const QioArgs *args)
{
    g_autoptr(QioRequest) req = qio_request_new(args);

    req->verb = "read";
    req->fail_verb = "readv";
    if (args->given['i']) {
        return inject_invalid("read");
    }
    if (!qio_parse_size(args->operand[0], &req->offset) ||
        !qio_request_alloc_vector(sh, req, args, 1, QIO_FILL_READ) ||
        !qio_request_parse_check(req, args)) {
        return false;
    }
    submit(sh, g_steal_pointer(&req), BLK_OP_READ);
    return true;
}

static bool submit_zeroes(QioShell *sh, QioRequest *req, const QioArgs *args)
{
    g_autoptr(QioRequest) owned = req;

    if (args->n != 2) {
        return qio_fail("-z supports only a single length parameter");
    }
    if (!qio_parse_size(args->operand[0], &req->offset) ||
        !qio_parse_size(args->operand[1], &req->bytes)) {
        return false;
    }
    submit(sh, g_steal_pointer(&owned), BLK_OP_ZERO);
    return true;
}

static bool submit_write(QioShell *sh, QioRequest *req, const QioArgs *args)
{
    g_autoptr(QioRequest) owned = req;
    int fill = QIO_FILL_WRITE;

    if ((args->given['P'] && !qio_parse_byte(args->value['P'], &fill)) ||
        !qio_parse_size(args->operand[0], &req->offset) ||
        !qio_request_alloc_vector(sh, req, args, 1, fill)) {
        return false;
    }
    submit(sh, g_steal_pointer(&owned), BLK_OP_WRITE);
    return true;
}

bool qio_cmd_aio_write(QioShell *sh, const QioArgs *args)
{
    QioRequest *req;

    if (args->given['u'] && !args->given['z']) {
        return qio_fail("-u requires -z to be specified");
    }
    if (args->given['i']) {
        return inject_invalid("write");
    }
    req = qio_request_new(args);
    req->verb = "wrote";
    req->fail_verb = "aio_write";
    return args->given['z'] ? submit_zeroes(sh, req, args) : submit_write(sh, req, args);
}
