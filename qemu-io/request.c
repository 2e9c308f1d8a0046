/*
 * A transfer: from its options to its report.
 *
 *     memory   |gap|  data ...                                   |    gap: 16 bytes with -m
 *     qiov          [ elem 0 ][ elem 1 ][    elem 2             ]
 *     check               [ check_offset, + check_bytes )
 *
 * The same description serves the commands that wait (rw.c) and those that do not (aio.c); only who
 * calls the block layer differs.
 *
 * Invariants
 * 1. qiov covers data[0, bytes) in order, without a hole.
 * 2. The checked part lies inside the data.
 * 3. Memory that is going to be read into holds 0xab, so that a byte nobody has written does not
 *    look like a zero.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "qemu-io/qio.h"

#define MISALIGNMENT 16

void qio_request_free(QioRequest *req)
{
    if (req) {
        iov_vector_destroy(&req->qiov);
        free(req->memory);
        g_free(req);
    }
}

QioRequest *qio_request_new(const QioArgs *args)
{
    static const struct {
        char letter;
        int flag;
    } flags[] = {
        {'f', BDRV_REQ_FUA},        {'u', BDRV_REQ_MAY_UNMAP},      {'n', BDRV_REQ_NO_FALLBACK},
        {'c', BDRV_REQ_COMPRESSED}, {'r', BDRV_REQ_REGISTERED_BUF},
    };
    QioRequest *req = g_new0(QioRequest, 1);

    for (size_t i = 0; i < G_N_ELEMENTS(flags); i++) {
        req->flags |= args->given[(int)flags[i].letter] ? flags[i].flag : 0;
    }
    req->quiet = args->given['q'];
    req->dump = args->given['v'];
    req->machine = args->given['C'];
    iov_vector_init(&req->qiov, 1);
    return req;
}

/* -s and -l, which default to the whole of the data. */
static bool parse_part(QioRequest *req, const QioArgs *args)
{
    const char *start = args->value['s'], *length = args->value['l'];

    if (start && !qio_parse_size(start, &req->check_offset)) {
        return false;
    }
    req->check_bytes = req->bytes - req->check_offset;
    if (length && !qio_parse_size(length, &req->check_bytes)) {
        return false;
    }
    if (req->check_offset > req->bytes || req->check_bytes > req->bytes - req->check_offset) {
        return qio_fail("pattern verification range exceeds end of read data");
    }
    return true;
}

bool qio_request_parse_check(QioRequest *req, const QioArgs *args)
{
    req->check = args->given['P'];
    return !req->check ||
           (qio_parse_byte(args->value['P'], &req->pattern) && parse_part(req, args));
}

bool qio_request_alloc(QioShell *sh, QioRequest *req, int fill)
{
    size_t gap = sh->misalign ? MISALIGNMENT : 0;

    g_assert(!req->memory && req->bytes >= 0);
    req->memory = bdrv_try_blockalign(blk_bs(sh->blk), (size_t)MAX(req->bytes, 1) + gap);
    if (!req->memory) {
        return qio_fail("%s failed: %s", req->fail_verb, g_strerror(ENOMEM));
    }
    req->data = (uint8_t *)req->memory + gap;
    memset(req->data, fill, (size_t)req->bytes);
    iov_vector_add(&req->qiov, req->data, (size_t)req->bytes);
    return true;
}

/* One length of a vector; @total is the sum of those before it. */
static bool parse_element(const char *text, int64_t total, int64_t *ret)
{
    if (!qio_parse_size(text, ret)) {
        return false;
    }
    if (*ret > BDRV_REQUEST_MAX_BYTES) {
        return qio_fail("Argument '%s' exceeds maximum size %" PRId64, text,
                        BDRV_REQUEST_MAX_BYTES);
    }
    if (*ret > BDRV_REQUEST_MAX_BYTES - total) {
        return qio_fail("The total number of bytes exceed the maximum size %" PRId64,
                        BDRV_REQUEST_MAX_BYTES);
    }
    return true;
}

/* Cuts the one element that qio_request_alloc() made. */
static void cut_vector(QioRequest *req, const int64_t *lengths, int n)
{
    uint8_t *at = req->data;

    iov_vector_destroy(&req->qiov);
    iov_vector_init(&req->qiov, n);
    for (int i = 0; i < n; i++) {
        iov_vector_add(&req->qiov, at, (size_t)lengths[i]);
        at += lengths[i];
    }
    g_assert(req->qiov.size == (size_t)req->bytes);
}

bool qio_request_alloc_vector(QioShell *sh, QioRequest *req, const QioArgs *args, int first,
                              int fill)
{
    int n = args->n - first;
    g_autofree int64_t *lengths = g_new(int64_t, n);

    req->bytes = 0;
    for (int i = 0; i < n; i++) {
        if (!parse_element(args->operand[first + i], req->bytes, &lengths[i])) {
            return false;
        }
        req->bytes += lengths[i];
    }
    if (!qio_request_alloc(sh, req, fill)) {
        return false;
    }
    cut_vector(req, lengths, n);
    return true;
}

static bool holds_pattern(const uint8_t *data, int64_t bytes, int pattern)
{
    /* The first byte is right, and each byte equals the one before it. */
    return bytes == 0 || (data[0] == pattern && !memcmp(data, data + 1, (size_t)bytes - 1));
}

static bool print_check(const QioRequest *req)
{
    if (!req->check ||
        holds_pattern(req->data + req->check_offset, req->check_bytes, req->pattern)) {
        return true;
    }
    return qio_fail("Pattern verification failed at offset %" PRId64 ", %" PRId64 " bytes",
                    req->offset + req->check_offset, req->check_bytes);
}

bool qio_request_print(const QioRequest *req)
{
    const QioReport report = {
        .verb = req->verb, .offset = req->offset, .bytes = req->bytes,
        .ns = req->ended - req->started, .machine = req->machine,
    };
    bool ok;

    if (req->ret < 0) {
        return qio_fail("%s failed: %s", req->fail_verb, g_strerror(-req->ret));
    }
    ok = print_check(req);
    if (req->quiet) {
        return ok;
    }
    if (req->dump) {
        qio_dump(req->data, (size_t)req->bytes, req->offset);
    }
    qio_print_report(&report);
    return ok;
}
