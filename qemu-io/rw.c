/*
 * read, readv, write, writev, discard: transfers that the shell waits for.
 *
 * Each command reads its words into a QioRequest, makes one call of the block layer and prints.
 * Where breakpoints are set the call is made in the request pool, since it may have to wait for a
 * request that only a later command resumes.
 * Ranges need no alignment.  A range beyond the end of the image fails in the block layer (EIO), so
 * that what users see is what the library does.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdio.h>
#include <string.h>
#include "qemu-io/qio.h"

/* How the block layer is called. */
typedef struct Transfer {
    int (*run)(BlockBackend *blk, QioRequest *req);
    BlkOp op; /* the same in the request pool */
    bool here_only; /* there is no such op */
} Transfer;

static int run_read(BlockBackend *blk, QioRequest *req)
{
    return blk_preadv(blk, req->offset, req->bytes, &req->qiov, req->flags);
}

static int run_write(BlockBackend *blk, QioRequest *req)
{
    return blk_pwritev(blk, req->offset, req->bytes, &req->qiov, req->flags);
}

static int run_zero(BlockBackend *blk, QioRequest *req)
{
    return blk_pwrite_zeroes(blk, req->offset, req->bytes, req->flags);
}

static int run_discard(BlockBackend *blk, QioRequest *req)
{
    return blk_pdiscard(blk, req->offset, req->bytes);
}

static int run_load_vmstate(BlockBackend *blk, QioRequest *req)
{
    return blk_load_vmstate(blk, &req->qiov, req->offset);
}

static int run_save_vmstate(BlockBackend *blk, QioRequest *req)
{
    return blk_save_vmstate(blk, &req->qiov, req->offset);
}

static const Transfer transfer_read = {run_read, BLK_OP_READ, false};
static const Transfer transfer_write = {run_write, BLK_OP_WRITE, false};
static const Transfer transfer_zero = {run_zero, BLK_OP_ZERO, false};
static const Transfer transfer_discard = {run_discard, BLK_OP_DISCARD, false};
static const Transfer transfer_load_vmstate = {run_load_vmstate, BLK_OP_READ, true};
static const Transfer transfer_save_vmstate = {run_save_vmstate, BLK_OP_WRITE, true};

/* Takes over @req. Where there are breakpoints it may have to be left to itself (aio.c). */
static bool run_request(QioShell *sh, QioRequest *req, const Transfer *transfer)
{
    g_autoptr(QioRequest) owned = req;

    if (sh->tags->len > 0 && !transfer->here_only) {
        return qio_aio_run(sh, g_steal_pointer(&owned), transfer->op);
    }
    req->started = qb_now_ns();
    req->ret = transfer->run(sh->blk, req);
    req->ended = qb_now_ns();
    return qio_request_print(req);
}

/* --- reading --- */

bool qio_cmd_read(QioShell *sh, const QioArgs *args)
{
    g_autoptr(QioRequest) req = qio_request_new(args);

    req->verb = req->fail_verb = "read";
    if ((args->given['s'] || args->given['l']) && !args->given['P']) {
        qio_print_synopsis(qio_find_command("read"));
        return false;
    }
    return qio_parse_range(args, &req->offset, &req->bytes) &&
           qio_request_parse_check(req, args) && qio_request_alloc(sh, req, QIO_FILL_READ) &&
           run_request(sh, g_steal_pointer(&req),
                       args->given['b'] ? &transfer_load_vmstate : &transfer_read);
}

bool qio_cmd_readv(QioShell *sh, const QioArgs *args)
{
    g_autoptr(QioRequest) req = qio_request_new(args);

    req->verb = "read";
    req->fail_verb = "readv";
    return qio_parse_size(args->operand[0], &req->offset) &&
           qio_request_alloc_vector(sh, req, args, 1, QIO_FILL_READ) &&
           qio_request_parse_check(req, args) &&
           run_request(sh, g_steal_pointer(&req), &transfer_read);
}

/* --- writing --- */

/* Flags that contradict one another. (-c says nothing beside -z and -b, as it always has.) */
static bool check_write_flags(const QioArgs *args)
{
    const bool *g = args->given;

    if (g['b'] && g['z']) {
        return qio_fail("-b and -z cannot be specified at the same time");
    }
    if (g['f'] && (g['b'] || g['c'])) {
        return qio_fail("-f and -b or -c cannot be specified at the same time");
    }
    if (g['n'] && !g['z']) {
        return qio_fail("-n requires -z to be specified");
    }
    if (g['u'] && !g['z']) {
        return qio_fail("-u requires -z to be specified");
    }
    if (g['z'] + g['P'] + g['s'] > 1) {
        return qio_fail("Only one of -z, -P, and -s can be specified at the same time");
    }
    return true;
}

/* Zeroes are written out, and so limited, unless falling back to that is forbidden. */
static bool parse_write_range(QioRequest *req, const QioArgs *args)
{
    if (!qio_parse_size(args->operand[0], &req->offset) ||
        !qio_parse_size(args->operand[1], &req->bytes)) {
        return false;
    }
    if (args->given['n'] || req->bytes <= BDRV_REQUEST_MAX_BYTES) {
        return true;
    }
    if (args->given['z']) {
        return qio_fail("length cannot exceed %" PRId64 " without -n, given %s",
                        BDRV_REQUEST_MAX_BYTES, args->operand[1]);
    }
    return qio_check_length(req->bytes, args->operand[1]);
}

static bool fail_file(const char *name, const char *why)
{
    fflush(stdout);
    fprintf(stderr, "%s: %s\n", name, why);
    return false;
}

/* Reads what there is of file @name, at most @max bytes. -errno, or how many. */
static int64_t read_file(const char *name, uint8_t *data, size_t max)
{
    FILE *f = fopen(name, "re");
    int64_t ret;

    if (!f) {
        return -errno;
    }
    errno = 0;
    ret = (int64_t)fread(data, 1, max, f);
    if (ferror(f)) {
        ret = errno ? -errno : -EIO;
    }
    fclose(f);
    return ret;
}

/* Fills the data with the bytes of file @name, over and over. */
static bool fill_from_file(QioRequest *req, const char *name)
{
    size_t bytes = (size_t)req->bytes;
    int64_t n = read_file(name, req->data, bytes);

    if (n < 0) {
        return fail_file(name, g_strerror((int)-n));
    }
    if (n == 0 && bytes > 0) {
        return fail_file(name, "file is empty");
    }
    for (size_t done = (size_t)n; done < bytes; done += (size_t)n) {
        memcpy(req->data + done, req->data, MIN((size_t)n, bytes - done));
    }
    return true;
}

static bool parse_fill(const QioArgs *args, int *ret)
{
    *ret = QIO_FILL_WRITE;
    return !args->given['P'] || qio_parse_byte(args->value['P'], ret);
}

static bool prepare_data(QioShell *sh, QioRequest *req, const QioArgs *args, int fill)
{
    return qio_request_alloc(sh, req, fill) &&
           (!args->given['s'] || fill_from_file(req, args->value['s']));
}

bool qio_cmd_write(QioShell *sh, const QioArgs *args)
{
    g_autoptr(QioRequest) req = qio_request_new(args);
    int fill;

    req->verb = "wrote";
    req->fail_verb = "write";
    if (!check_write_flags(args) || !parse_fill(args, &fill) || !parse_write_range(req, args)) {
        return false;
    }
    if (args->given['z']) {
        req->flags &= ~BDRV_REQ_COMPRESSED;
        return run_request(sh, g_steal_pointer(&req), &transfer_zero);
    }
    return prepare_data(sh, req, args, fill) &&
           run_request(sh, g_steal_pointer(&req),
                       args->given['b'] ? &transfer_save_vmstate : &transfer_write);
}

bool qio_cmd_writev(QioShell *sh, const QioArgs *args)
{
    g_autoptr(QioRequest) req = qio_request_new(args);
    int fill;

    req->verb = "wrote";
    req->fail_verb = "writev";
    return parse_fill(args, &fill) && qio_parse_size(args->operand[0], &req->offset) &&
           qio_request_alloc_vector(sh, req, args, 1, fill) &&
           run_request(sh, g_steal_pointer(&req), &transfer_write);
}

bool qio_cmd_discard(QioShell *sh, const QioArgs *args)
{
    g_autoptr(QioRequest) req = qio_request_new(args);

    req->verb = req->fail_verb = "discard";
    return qio_parse_range(args, &req->offset, &req->bytes) &&
           run_request(sh, g_steal_pointer(&req), &transfer_discard);
}
