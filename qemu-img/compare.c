/*
 * qemu-img compare: do two images show the same content?
 *
 *      status of both for the next stretch
 *        both zero                 -> equal, nothing read
 *        one zero, one data        -> the data must be zero
 *        both data                 -> read both, compare
 *      the longer image's tail     -> must be zero (an error with -s)
 *
 * Invariants
 * 1. Exit status: 0 same, 1 differ, 2 an image cannot be opened, 3 its status cannot be told, 4 it
 *    cannot be read.
 * 2. Ranges that both images know to be zero cost nothing, whatever their length.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "block/locks.h"
#include "qemu-img/img.h"
#include "util/iov.h"

typedef struct CompareArgs {
    const char *format_a, *format_b, *cache;
    bool image_opts, strict, force_share, progress, quiet, untrusted;
    GPtrArray *objects;
} CompareArgs;

static const ImgOption compare_options[] = {
    {IMG_STRING, 'f', "a-format", offsetof(CompareArgs, format_a), "FMT", "format of FILE1"},
    {IMG_STRING, 'F', "b-format", offsetof(CompareArgs, format_b), "FMT", "format of FILE2"},
    {IMG_FLAG, 0, "image-opts", offsetof(CompareArgs, image_opts), NULL,
     "FILE1 and FILE2 are option strings"},
    {IMG_FLAG, 's', "strict", offsetof(CompareArgs, strict), NULL,
     "sizes and allocation must be equal too"},
    {IMG_STRING, 'T', "cache", offsetof(CompareArgs, cache), "CACHE", "cache mode [writeback]"},
    {IMG_FLAG, 'U', "force-share", offsetof(CompareArgs, force_share), NULL,
     "open images while another process writes them"},
    {IMG_FLAG, 'p', "progress", offsetof(CompareArgs, progress), NULL, "show progress"},
    {IMG_FLAG, 'q', "quiet", offsetof(CompareArgs, quiet), NULL, "print errors only"},
    IMG_UNTRUSTED_OPTION(CompareArgs),
    {IMG_LIST, 0, "object", offsetof(CompareArgs, objects), "OBJDEF", "object definition"},
    {IMG_END},
};

static const ImgUsage compare_usage = {"compare", "FILE1 FILE2",
                                       "Compare the content of two images.", compare_options};

enum {
    COMPARE_SAME = 0,
    COMPARE_DIFFER = 1,
    COMPARE_OPEN_FAILED = 2,
    COMPARE_STATUS_FAILED = 3,
    COMPARE_READ_FAILED = 4,
};

#define COMPARE_CHUNK (4 * 1024 * 1024)

typedef struct Comparison {
    BlockBackend *blk[2];
    const char *name[2];
    int64_t size[2];
    uint8_t *buf[2];
    bool strict, quiet;
    QbProgress progress;
} Comparison;

static void say(const Comparison *c, const char *fmt, ...) G_GNUC_PRINTF(2, 3);
static void say(const Comparison *c, const char *fmt, ...)
{
    va_list ap;

    if (c->quiet) {
        return;
    }
    va_start(ap, fmt);
    vprintf(fmt, ap);
    va_end(ap);
}

static int mismatch(const Comparison *c, int64_t offset)
{
    say(c, "Content mismatch at offset %" PRId64 "!\n", offset);
    return COMPARE_DIFFER;
}

/* ---- reading and looking ---- */

static int query_status(Comparison *c, int which, int64_t offset, int64_t bytes, BdrvStatus *ret)
{
    BDRV_GRAPH_GUARD();
    int err = bdrv_block_status_above(blk_bs(c->blk[which]), NULL, offset, bytes, ret);

    if (err < 0) {
        img_error("Sector allocation test failed for %s: %s", c->name[which], g_strerror(-err));
        return COMPARE_STATUS_FAILED;
    }
    return 0;
}

static int read_chunk(Comparison *c, int which, int64_t offset, int64_t bytes)
{
    int ret = blk_pread(c->blk[which], offset, bytes, c->buf[which], 0);

    if (ret < 0) {
        img_error("Error while reading offset %" PRId64 " of %s: %s", offset, c->name[which],
                  g_strerror(-ret));
        return COMPARE_READ_FAILED;
    }
    return 0;
}

/* Position of the first sector that differs, or @bytes; @b NULL stands for zeroes. */
static int64_t first_difference(const uint8_t *a, const uint8_t *b, int64_t bytes)
{
    for (int64_t pos = 0; pos < bytes; pos += BDRV_SECTOR_SIZE) {
        size_t len = (size_t)MIN(BDRV_SECTOR_SIZE, bytes - pos);
        if (b ? memcmp(a + pos, b + pos, len) != 0 : !qb_buffer_is_zero(a + pos, len)) {
            return pos;
        }
    }
    return bytes;
}

static int compare_data(Comparison *c, int64_t offset, int64_t bytes)
{
    int status;
    int64_t same;

    if ((status = read_chunk(c, 0, offset, bytes)) || (status = read_chunk(c, 1, offset, bytes))) {
        return status;
    }
    if (!memcmp(c->buf[0], c->buf[1], (size_t)bytes)) {
        return COMPARE_SAME;
    }
    same = first_difference(c->buf[0], c->buf[1], bytes);
    return mismatch(c, offset + same);
}

static int require_zero(Comparison *c, int which, int64_t offset, int64_t bytes)
{
    int status = read_chunk(c, which, offset, bytes);
    int64_t same;

    if (status || qb_buffer_is_zero(c->buf[which], (size_t)bytes)) {
        return status;
    }
    same = first_difference(c->buf[which], NULL, bytes);
    return mismatch(c, offset + same);
}

/* ---- comparing ---- */

static bool same_status(const BdrvStatus *a, const BdrvStatus *b)
{
    int mask = BDRV_BLOCK_DATA | BDRV_BLOCK_ZERO | BDRV_BLOCK_ALLOCATED;

    return (a->flags & mask) == (b->flags & mask);
}

/* Compares the stretch at @offset; *ret_bytes is how far that went. */
static int compare_step(Comparison *c, int64_t offset, int64_t bytes, int64_t *ret_bytes)
{
    BdrvStatus st[2] = {{0}};
    int status;
    bool zero[2];

    for (int i = 0; i < 2; i++) {
        status = query_status(c, i, offset, bytes, &st[i]);
        if (status) {
            return status;
        }
        bytes = MIN(bytes, st[i].bytes);
        zero[i] = st[i].flags & BDRV_BLOCK_ZERO;
    }
    if (c->strict && !same_status(&st[0], &st[1])) {
        say(c, "Strict mode: Offset %" PRId64 " block status mismatch!\n", offset);
        return COMPARE_DIFFER;
    }
    if (!zero[0] || !zero[1]) {
        bytes = MIN(bytes, COMPARE_CHUNK);
    }
    *ret_bytes = bytes;
    if (zero[0] && zero[1]) {
        return COMPARE_SAME;
    }
    if (zero[0] || zero[1]) {
        return require_zero(c, zero[0], offset, bytes);
    }
    return compare_data(c, offset, bytes);
}

/* Counts a step; the place to stop at when a signal asked for it. */
static int step_done(Comparison *c, int64_t offset, int64_t bytes)
{
    qb_progress_add(&c->progress, (uint64_t)bytes);
    if (img_interrupted()) {
        img_error("Interrupted at offset %" PRId64 "; no difference found so far", offset + bytes);
        return COMPARE_READ_FAILED;
    }
    return COMPARE_SAME;
}

static int compare_common(Comparison *c, int64_t end)
{
    for (int64_t offset = 0, bytes; offset < end; offset += bytes) {
        int status = compare_step(c, offset, end - offset, &bytes);
        if (status) {
            return status;
        }
        status = step_done(c, offset, bytes);
        if (status) {
            return status;
        }
    }
    return COMPARE_SAME;
}

static int compare_tail(Comparison *c, int which, int64_t offset)
{
    int64_t end = c->size[which], bytes;

    for (; offset < end; offset += bytes) {
        BdrvStatus st = {0};
        int status = query_status(c, which, offset, end - offset, &st);
        if (status) {
            return status;
        }
        bytes = st.bytes;
        if (!(st.flags & BDRV_BLOCK_ZERO)) {
            bytes = MIN(bytes, COMPARE_CHUNK);
            status = require_zero(c, which, offset, bytes);
        }
        status = status ? status : step_done(c, offset, bytes);
        if (status) {
            return status;
        }
    }
    return COMPARE_SAME;
}

static int compare_images(Comparison *c)
{
    int64_t common = MIN(c->size[0], c->size[1]);
    bool differ = c->size[0] != c->size[1];
    int status;

    if (differ && c->strict) {
        say(c, "Strict mode: Image size mismatch!\n");
        return COMPARE_DIFFER;
    }
    status = compare_common(c, common);
    if (status || !differ) {
        return status;
    }
    say(c, "Warning: Image size mismatch!\n");
    return compare_tail(c, c->size[1] > c->size[0], common);
}

static int prepare(Comparison *c)
{
    for (int i = 0; i < 2; i++) {
        c->size[i] = blk_getlength(c->blk[i]);
        if (c->size[i] < 0) {
            img_error("Can't get size of %s: %s", c->name[i], g_strerror((int)-c->size[i]));
            return COMPARE_READ_FAILED;
        }
        c->buf[i] = bdrv_try_blockalign(blk_bs(c->blk[i]), COMPARE_CHUNK);
        if (!c->buf[i]) {
            img_error("Not enough memory for a buffer of %d bytes", COMPARE_CHUNK);
            return COMPARE_READ_FAILED;
        }
    }
    qb_progress_init(&c->progress, (uint64_t)MAX(c->size[0], c->size[1]));
    return 0;
}

static int open_and_compare(Comparison *c, const CompareArgs *args)
{
    const char *const formats[2] = {args->format_a, args->format_b};
    int status;

    for (int i = 0; i < 2; i++) {
        ImgOpen how = {.format = formats[i], .image_opts = args->image_opts, .cache = args->cache,
                       .force_share = args->force_share, .untrusted = args->untrusted};
        c->blk[i] = img_open(c->name[i], &how);
        if (!c->blk[i]) {
            return COMPARE_OPEN_FAILED;
        }
    }
    status = prepare(c);
    if (status) {
        return status;
    }
    img_progress_start(&c->progress, args->progress && !args->quiet);
    status = compare_images(c);
    img_progress_end(status == COMPARE_SAME);
    if (status == COMPARE_SAME) {
        say(c, "Images are identical.\n");
    }
    return status;
}

static void close_all(Comparison *c)
{
    for (int i = 0; i < 2; i++) {
        free(c->buf[i]);
        if (c->blk[i]) {
            blk_unref(c->blk[i]);
        }
    }
}

int img_compare(int argc, char **argv)
{
    g_autoptr(GPtrArray) operands = g_ptr_array_new();
    CompareArgs args = {0};
    int status;

    if (!img_parse_args(&compare_usage, argc, argv, &args, operands, &status)) {
        return status;
    }
    g_autoptr(GPtrArray) objects = args.objects;
    if (operands->len != 2) {
        return img_usage_error("compare", "Expecting two image file names");
    }
    if (!img_check_open_args(args.format_a, args.image_opts) ||
        !img_check_cache("source ", args.cache) || !img_check_objects(objects)) {
        return COMPARE_OPEN_FAILED;
    }
    Comparison c = {.name = {operands->pdata[0], operands->pdata[1]},
                    .strict = args.strict, .quiet = args.quiet};
    status = open_and_compare(&c, &args);
    close_all(&c);
    return status;
}
