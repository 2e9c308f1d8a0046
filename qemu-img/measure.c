/*
 * qemu-img measure: how large would the new image be?
 *
 *      --size N              an empty image of N bytes
 *      FILE [-l SNAPSHOT]    an image that holds what FILE (or its snapshot) holds
 *
 * The answer is the format driver's (bdrv_measure()); here is only what to ask and how to print it.
 * Nothing is created: options of -o that name files are not looked up.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdio.h>
#include <string.h>
#include "qemu-img/create-options.h"
#include "qemu-img/img.h"

typedef struct MeasureArgs {
    const char *size_text, *target_format, *snapshot, *output, *format, *sandbox;
    char *options;
    bool image_opts, force_share, untrusted;
    GPtrArray *objects;
} MeasureArgs;

#define FIELD(name) offsetof(MeasureArgs, name)
static const ImgOption measure_options[] = {
    {IMG_STRING, 's', "size", FIELD(size_text), "SIZE", "measure an empty image of that size"},
    {IMG_STRING, 'O', "target-format", FIELD(target_format), "FMT", "format to measure [raw]"},
    {IMG_JOINED, 'o', NULL, FIELD(options), "OPTS", "options of the image to measure"},
    {IMG_STRING, 'l', "snapshot", FIELD(snapshot), "SNAPSHOT", "measure this internal snapshot"},
    {IMG_STRING, 0, "output", FIELD(output), "FORMAT", "human or json"},
    {IMG_STRING, 'f', "format", FIELD(format), "FMT", "format of FILE (not probed)"},
    {IMG_FLAG, 0, "image-opts", FIELD(image_opts), NULL, "FILE is an option string"},
    {IMG_FLAG, 'U', "force-share", FIELD(force_share), NULL,
     "open FILE while another process writes it"},
    IMG_SANDBOX_OPTION(MeasureArgs),
    IMG_UNTRUSTED_OPTION(MeasureArgs),
    {IMG_LIST, 0, "object", FIELD(objects), "OBJDEF", "object definition"},
    {IMG_END},
};

static const ImgUsage measure_usage = {"measure", "--size SIZE | FILE",
                                       "Tell how large a new image would be.", measure_options};

static void print_human(const BlockMeasureInfo *info)
{
    printf("required size: %" PRIu64 "\nfully allocated size: %" PRIu64 "\n", info->required,
           info->fully_allocated);
    if (info->has_bitmaps) {
        printf("bitmaps size: %" PRIu64 "\n", info->bitmaps);
    }
}

static void print_json(const BlockMeasureInfo *info)
{
    g_autoptr(json_t) obj = json_object();

    if (info->has_bitmaps) {
        json_object_set_new(obj, "bitmaps", json_integer((json_int_t)info->bitmaps));
    }
    json_object_set_new(obj, "required", json_integer((json_int_t)info->required));
    json_object_set_new(obj, "fully-allocated", json_integer((json_int_t)info->fully_allocated));
    tool_print_json(obj);
}

static int measure(const ImgCreateTables *tables, json_t *options, BlockBackend *source, bool json)
{
    BlockMeasureInfo info;
    GError *err = NULL;

    if (!bdrv_measure(tables->drv, options, source ? blk_bs(source) : NULL, &info, &err)) {
        return img_report(err, 1);
    }
    (json ? print_json : print_human)(&info);
    return 0;
}

static int measure_file(const ImgCreateTables *tables, json_t *options, const char *file,
                        const MeasureArgs *args, bool json)
{
    ImgOpen how = {.format = args->format, .image_opts = args->image_opts,
                   .force_share = args->force_share, .untrusted = args->untrusted,
                   .sandbox = img_sandbox_mode(args->sandbox)};
    g_autoptr(BlockBackend) source = img_open(file, &how);

    if (!source || (args->snapshot && !img_load_snapshot(blk_bs(source), args->snapshot))) {
        return 1;
    }
    return measure(tables, options, source, json);
}

static int measure_size(const ImgCreateTables *tables, json_t *options, const char *size_text,
                        bool json)
{
    uint64_t size;

    if (!img_parse_size("image size", size_text, &size)) {
        return 1;
    }
    json_object_set_new(options, "size", json_integer((json_int_t)size));
    return measure(tables, options, NULL, json);
}

/* What does not go together. False: said. */
static bool check_usage(const MeasureArgs *args, const GPtrArray *operands)
{
    bool of_file = args->image_opts || args->format || args->snapshot;

    if (operands->len > 1) {
        img_usage_error("measure", "At most one filename argument is allowed.");
        return false;
    }
    if (operands->len == 0 && of_file) {
        img_usage_error("measure", "--image-opts, -f, and -l require a filename argument.");
        return false;
    }
    if (operands->len == 0 && !args->size_text) {
        img_usage_error("measure", "Either --size N or one filename must be specified.");
        return false;
    }
    if (operands->len == 1 && args->size_text) {
        img_usage_error("measure", "--size N cannot be used together with a filename.");
        return false;
    }
    return img_check_open_args(args->format, args->image_opts);
}

int img_measure(int argc, char **argv)
{
    g_autoptr(GPtrArray) operands = g_ptr_array_new();
    MeasureArgs args = {.target_format = "raw"};
    int status;
    ImgCreateTables tables;
    GError *err = NULL;
    bool json;

    if (!img_parse_args(&measure_usage, argc, argv, &args, operands, &status)) {
        return status;
    }
    g_autoptr(GPtrArray) objects = args.objects;
    g_autofree char *text = args.options;
    if (img_asks_for_option_help(text)) {
        return img_print_option_help(args.target_format, NULL);
    }
    if (!img_parse_output("measure", args.output, &json) ||
        !img_check_sandbox("measure", args.sandbox) || !check_usage(&args, operands) ||
        !img_check_objects(objects)) {
        return 1;
    }
    if (!img_create_tables_find(&tables, args.target_format, NULL, &err)) {
        return img_report(err, 1);
    }
    g_autoptr(json_t) options = img_parse_create_options(&tables, args.target_format, text, NULL,
                                                         NULL, &err);
    if (!options) {
        return img_report(err, 1);
    }
    return operands->len ? measure_file(&tables, options, operands->pdata[0], &args, json)
                         : measure_size(&tables, options, args.size_text, json);
}
