/*
 * qemu-img commit: an overlay's content goes into its backing file (or one further down), and the
 * overlay is emptied.
 *
 * Invariants
 * 1. The overlay is emptied only after the base was flushed; with -d, or with -b naming a base
 *    below the direct backing file, it is left as it is.
 * 2. A commit that failed or was stopped leaves both images usable, and can be run again.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdio.h>
#include <string.h>
#include "block/job.h"
#include "block/locks.h"
#include "qemu-img/img.h"

typedef struct CommitArgs {
    const char *format, *cache, *base;
    bool image_opts, drop, progress, quiet;
    uint64_t rate_limit;
    GPtrArray *objects;
} CommitArgs;

static const ImgOption commit_options[] = {
    {IMG_STRING, 'f', "format", offsetof(CommitArgs, format), "FMT", "image format (not probed)"},
    {IMG_FLAG, 0, "image-opts", offsetof(CommitArgs, image_opts), NULL, "FILE is an option string"},
    {IMG_STRING, 't', "cache", offsetof(CommitArgs, cache), "CACHE", "cache mode [writeback]"},
    {IMG_FLAG, 'd', "drop", offsetof(CommitArgs, drop), NULL, "do not empty FILE afterwards"},
    {IMG_STRING, 'b', "base", offsetof(CommitArgs, base), "BASE",
     "image of the backing chain to commit into (implies -d)"},
    {IMG_SIZE, 'r', "rate-limit", offsetof(CommitArgs, rate_limit), "RATE", "bytes per second"},
    {IMG_FLAG, 'p', "progress", offsetof(CommitArgs, progress), NULL, "show progress"},
    {IMG_FLAG, 'q', "quiet", offsetof(CommitArgs, quiet), NULL, "print errors only"},
    {IMG_LIST, 0, "object", offsetof(CommitArgs, objects), "OBJDEF", "object definition"},
    {IMG_END},
};

static const ImgUsage commit_usage = {"commit", "FILE", "Commit an overlay into its backing file.",
                                      commit_options};

static BlockDriverState *find_base(BlockDriverState *bs, const char *file, const CommitArgs *args)
{
    BDRV_GRAPH_GUARD();
    BlockDriverState *base;

    if (args->base) {
        base = bdrv_find_backing_image(bs, args->base);
        if (!base) {
            img_error("Did not find '%s' in the backing chain of '%s'", args->base, file);
        }
        return base;
    }
    base = bdrv_backing_chain_next(bs);
    if (!base) {
        img_error("Image does not have a backing file");
    }
    return base;
}

static bool run_commit(BlockDriverState *top, BlockDriverState *base, const CommitArgs *args)
{
    QbProgress progress;
    CommitOptions opts = {.top = top, .base = base, .speed = args->rate_limit,
                          .progress = &progress};
    GError *err = NULL;
    bool ok;

    qb_progress_init(&progress, 0);
    img_progress_start(&progress, args->progress && !args->quiet);
    ok = commit_run(&opts, &err);
    img_progress_end(ok);
    if (!ok) {
        img_report(err, 1);
    }
    return ok;
}

/* Formats that cannot be emptied keep their content, which the base now has too. */
static bool empty_overlay(BlockBackend *blk, const char *file)
{
    GError *err = NULL;

    if (!bdrv_can_make_empty(blk_bs(blk)) || blk_make_empty(blk, true, &err)) {
        return true;
    }
    if (qb_error_to_errno(err) == -ENOTSUP) {
        g_clear_error(&err);
        return true;
    }
    img_report_prefixed(err, 1, "Failed to empty %s: ", file);
    return false;
}

static int commit_blk(BlockBackend *blk, const char *file, const CommitArgs *args)
{
    BlockDriverState *base = find_base(blk_bs(blk), file, args);

    if (!base || !run_commit(blk_bs(blk), base, args)) {
        return 1;
    }
    if (!args->drop && !args->base && !empty_overlay(blk, file)) {
        return 1;
    }
    return 0;
}

int img_commit(int argc, char **argv)
{
    g_autoptr(GPtrArray) operands = g_ptr_array_new();
    CommitArgs args = {0};
    BlockBackend *blk;
    int status;

    if (!img_parse_args(&commit_usage, argc, argv, &args, operands, &status)) {
        return status;
    }
    g_autoptr(GPtrArray) objects = args.objects;
    if (operands->len != 1) {
        return img_usage_error("commit", "Expecting one image file name");
    }
    if (!img_check_open_args(args.format, args.image_opts) ||
        !img_check_objects(objects)) {
        return 1;
    }
    ImgOpen how = {.format = args.format, .image_opts = args.image_opts, .cache = args.cache,
                   .unmap = true, .flags = BDRV_O_RDWR | BDRV_O_RESIZE | BDRV_O_SCATTERED};
    blk = img_open(operands->pdata[0], &how);
    if (!blk) {
        return 1;
    }
    status = commit_blk(blk, operands->pdata[0], &args);
    status = img_close(blk, status);
    if (!status && !args.quiet) {
        printf("Image committed.\n");
    }
    return status;
}
