/*
 * qemu-img resize: grow or shrink an image.
 *
 * Shrinking throws data away, so it wants --shrink said; the rest is qcow2_truncate's (or the
 * driver's) work.  The size may be given as N, +N or -N; options may stand anywhere.  With --dry-run
 * the image is opened read-only, and told is what would be lost (resize-dry-run.c).
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdio.h>
#include <string.h>
#include "qemu-img/img.h"
#include "util/checked.h"

typedef struct ResizeArgs {
    const char *format, *preallocation, *output;
    bool image_opts, shrink, quiet, dry_run, progress, json;
    GPtrArray *objects;
} ResizeArgs;

static const ImgOption resize_options[] = {
    {IMG_STRING, 'f', "format", offsetof(ResizeArgs, format), "FMT", "image format (not probed)"},
    {IMG_FLAG, 0, "image-opts", offsetof(ResizeArgs, image_opts), NULL, "FILE is an option string"},
    {IMG_STRING, 0, "preallocation", offsetof(ResizeArgs, preallocation), "MODE",
     "how the new space is allocated: off, metadata, falloc, full"},
    {IMG_FLAG, 0, "shrink", offsetof(ResizeArgs, shrink), NULL,
     "allow the image to become smaller; data beyond the new end is lost"},
    {IMG_FLAG, 0, "dry-run", offsetof(ResizeArgs, dry_run), NULL,
     "write nothing, tell what would be lost; exit status 2 if something would"},
    {IMG_STRING, 0, "output", offsetof(ResizeArgs, output), "FORMAT",
     "of --dry-run: human or json"},
    {IMG_FLAG, 'p', "progress", offsetof(ResizeArgs, progress), NULL,
     "show progress"},
    {IMG_FLAG, 'q', "quiet", offsetof(ResizeArgs, quiet), NULL, "print errors only"},
    {IMG_LIST, 0, "object", offsetof(ResizeArgs, objects), "OBJDEF", "object definition"},
    {IMG_END},
};

static const ImgUsage resize_usage = {"resize", "FILE [+-]SIZE", "Grow or shrink an image.",
                                      resize_options};

static bool parse_prealloc(const char *name, PreallocMode *ret)
{
    *ret = PREALLOC_MODE_OFF;
    for (int i = 0; name && prealloc_mode_names[i]; i++) {
        if (!strcmp(name, prealloc_mode_names[i])) {
            *ret = (PreallocMode)i;
            return true;
        }
    }
    if (name) {
        img_error("Invalid preallocation mode '%s'", name);
    }
    return name == NULL;
}

/* The new size from @text: "N", "+N" or "-N" against @current. False: said. */
static bool new_size(const char *text, int64_t current, int64_t *ret)
{
    char sign = text[0] == '+' || text[0] == '-' ? text[0] : 0;
    uint64_t number;
    int64_t size;

    if (!img_parse_size("image size", text + (sign != 0), &number)) {
        return false;
    }
    if (sign == '+' && qb_add_overflow(current, (int64_t)number, &size)) {
        img_error("Invalid image size specified. Must be between 0 and %" PRId64 ".", INT64_MAX);
        return false;
    }
    if (sign == '-') {
        size = current - (int64_t)number;
    } else if (!sign) {
        size = (int64_t)number;
    }
    if (size <= 0) {
        img_error("New image size must be positive");
        return false;
    }
    *ret = size;
    return true;
}

static bool may_shrink(const ResizeArgs *args)
{
    if (args->shrink) {
        return true;
    }
    img_error("Use the --shrink option to perform a shrink operation.");
    img_warn("Shrinking an image will delete all data beyond the shrunken image's end. Before "
             "performing such an operation, make sure there is no important data there.");
    return false;
}

static int change_size(BlockBackend *blk, int64_t size, const ResizeArgs *args,
                       PreallocMode prealloc)
{
    QbProgress progress;
    BdrvResize how = {.length = size, .exact = true, .prealloc = prealloc, .zero_new = true,
                      .progress = &progress};
    GError *err = NULL;

    qb_progress_init(&progress, 0);
    img_progress_start(&progress, args->progress && !args->quiet);
    bool ok = blk_resize(blk, &how, &err);
    img_progress_end(ok);
    return ok ? 0 : img_report(err, 1);
}

static int resize_blk(BlockBackend *blk, const char *size_text, const ResizeArgs *args,
                      PreallocMode prealloc)
{
    int64_t current = blk_getlength(blk), size;

    if (current < 0) {
        img_error("Failed to get image length: %s", g_strerror((int)-current));
        return 1;
    }
    if (!new_size(size_text, current, &size)) {
        return 1;
    }
    if (size <= current && prealloc != PREALLOC_MODE_OFF) {
        img_error("Preallocation can only be used for growing images");
        return 1;
    }
    if (size < current && !may_shrink(args)) {
        return 1;
    }
    if (args->dry_run) {
        ImgDryRun how = {.size = size, .json = args->json, .quiet = args->quiet,
                         .progress = args->progress && !args->quiet};
        return img_resize_dry_run(blk, &how);
    }
    return change_size(blk, size, args, prealloc);
}

static int open_and_resize(const char *file, const char *size_text, const ResizeArgs *args)
{
    ImgOpen how = {.format = args->format, .image_opts = args->image_opts,
                   .flags = args->dry_run ? 0 : BDRV_O_RDWR | BDRV_O_RESIZE | BDRV_O_NO_IO};
    PreallocMode prealloc;
    BlockBackend *blk;
    int status;

    if (!parse_prealloc(args->preallocation, &prealloc)) {
        return 1;
    }
    blk = img_open(file, &how);
    if (!blk) {
        return 1;
    }
    status = resize_blk(blk, size_text, args, prealloc);
    status = img_close(blk, status);
    if (!status && !args->quiet && !args->dry_run) {
        printf("Image resized.\n");
    }
    return status;
}

/* False: said. */
static bool check_usage(ResizeArgs *args)
{
    if (!args->dry_run && args->output) {
        img_usage_error("resize", "--output is for --dry-run");
        return false;
    }
    return img_parse_output("resize", args->output, &args->json) &&
           img_check_open_args(args->format, args->image_opts);
}

int img_resize(int argc, char **argv)
{
    g_autoptr(GPtrArray) operands = g_ptr_array_new();
    ResizeArgs args = {0};
    int status;

    if (!img_parse_args(&resize_usage, argc, argv, &args, operands, &status)) {
        return status;
    }
    g_autoptr(GPtrArray) objects = args.objects;
    if (operands->len != 2) {
        return img_usage_error("resize", "Expecting image file name and size");
    }
    if (!check_usage(&args) || !img_check_objects(objects)) {
        return 1;
    }
    return open_and_resize(operands->pdata[0], operands->pdata[1], &args);
}
