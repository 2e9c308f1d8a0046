/*
 * qemu-img amend: change options of an existing image.
 *
 *      -o "k=v,..."  --judge by the driver's table--> bdrv_amend()
 *
 * The table is that of the image's format, so options are judged after the image was opened, and
 * before anything is changed.  What is not in it but would do for a new image gets a hint.
 *
 * Only metadata is changed: the image is opened without its backing file, and an encrypted one
 * without its key.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdio.h>
#include <string.h>
#include "qemu-img/create-options.h"

typedef struct AmendArgs {
    const char *format, *cache;
    char *options;
    bool image_opts, force, progress, quiet;
    GPtrArray *objects;
} AmendArgs;

#define FIELD(name) offsetof(AmendArgs, name)
static const ImgOption amend_options[] = {
    {IMG_JOINED, 'o', "options", FIELD(options), "OPTS",
     "options to change, name=value,...; 'help' lists them"},
    {IMG_STRING, 'f', "format", FIELD(format), "FMT", "image format (not probed)"},
    {IMG_FLAG, 0, "image-opts", FIELD(image_opts), NULL, "FILE is an option string"},
    {IMG_STRING, 't', "cache", FIELD(cache), "CACHE", "cache mode of FILE [writeback]"},
    {IMG_FLAG, 0, "force", FIELD(force), NULL,
     "accepted; nothing here is unsafe enough to want it"},
    {IMG_FLAG, 'p', "progress", FIELD(progress), NULL, "show progress"},
    {IMG_FLAG, 'q', "quiet", FIELD(quiet), NULL, "print errors only"},
    {IMG_LIST, 0, "object", FIELD(objects), "OBJDEF", "object definition"},
    {IMG_END},
};

static const ImgUsage amend_usage = {"amend", "FILE", "Change options of an existing image.",
                                     amend_options};

static bool check_amendable(const BlockDriver *drv, const char *name)
{
    if (!bdrv_amend_options(drv)) {
        img_error("Format driver '%s' does not support option amendment", name);
        return false;
    }
    return true;
}

static int print_help(const char *format)
{
    const BlockDriver *drv = bdrv_find_format(format);

    if (!drv) {
        img_error("Unknown file format '%s'", format);
        return 1;
    }
    if (!check_amendable(drv, format)) {
        return 1;
    }
    g_autofree char *text = qb_opts_describe(bdrv_amend_options(drv));
    printf("Amend options for '%s':\n%s", format, text);
    return 0;
}

/* The first option that is only for new images, or NULL. */
static const char *creation_only(const BlockDriver *drv, const char *text)
{
    g_autoptr(json_t) options = qb_opts_parse(text, NULL, NULL);
    const QbOptDesc *create = bdrv_create_options(drv);
    const char *key;
    json_t *value;

    json_object_foreach(options, key, value) {
        if (!qb_opts_find(bdrv_amend_options(drv), key)) {
            return create && qb_opts_find(create, key) ? qb_opts_find(create, key)->name : NULL;
        }
    }
    return NULL;
}

static json_t *parse_options(BlockDriverState *bs, const char *text, GError **errp)
{
    const char *format = bdrv_get_format_name(bs);
    const BlockDriver *drv = bdrv_find_format(format);
    ImgCreateTables tables = {.drv = drv, .format = bdrv_amend_options(drv)};
    json_t *options = img_parse_create_options(&tables, format, text, NULL, NULL, errp);

    if (!options && creation_only(drv, text)) {
        qb_error_add_hint(errp, "This option is only supported for image creation");
    }
    return options;
}

static bool run_amend(BlockDriverState *bs, json_t *options, const AmendArgs *args)
{
    QbProgress progress;
    GError *err = NULL;
    bool ok;

    qb_progress_init(&progress, 0);
    img_progress_start(&progress, args->progress && !args->quiet);
    ok = bdrv_amend(bs, options, &progress, &err);
    img_progress_end(ok);
    if (!ok) {
        img_report(err, 1);
    }
    return ok;
}

static int amend_blk(BlockBackend *blk, const AmendArgs *args)
{
    BlockDriverState *bs = blk_bs(blk);
    const char *format = bdrv_get_format_name(bs);
    GError *err = NULL;

    if (!check_amendable(bdrv_find_format(format), format)) {
        return 1;
    }
    if (img_asks_for_option_help(args->options)) {
        return print_help(format);
    }
    json_t *options = parse_options(bs, args->options, &err);
    if (!options) {
        return img_report(err, 1);
    }
    return run_amend(bs, options, args) ? 0 : 1;
}

static int open_and_amend(const char *file, const AmendArgs *args)
{
    bool help = img_asks_for_option_help(args->options);
    ImgOpen how = {.format = args->format, .image_opts = args->image_opts, .cache = args->cache,
                   .unmap = true, .force_share = help,
                   .flags = BDRV_O_NO_BACKING | BDRV_O_NO_IO |
                            (help ? 0 : BDRV_O_RDWR | BDRV_O_RESIZE)};
    BlockBackend *blk = img_open(file, &how);

    return blk ? img_close(blk, amend_blk(blk, args)) : 1;
}

int img_amend(int argc, char **argv)
{
    g_autoptr(GPtrArray) operands = g_ptr_array_new();
    AmendArgs args = {0};
    int status;

    if (!img_parse_args(&amend_usage, argc, argv, &args, operands, &status)) {
        return status;
    }
    g_autofree char *options = args.options;
    g_autoptr(GPtrArray) objects = args.objects;
    if (!options) {
        return img_usage_error("amend", "Must specify options (-o)");
    }
    if (!img_check_objects(objects) || !img_check_open_args(args.format, args.image_opts)) {
        return 1;
    }
    if (args.format && img_asks_for_option_help(options)) {
        return print_help(args.format);
    }
    if (operands->len != 1) {
        return img_usage_error("amend", "Expecting one image file name");
    }
    return open_and_amend(operands->pdata[0], &args);
}
