/*
 * qemu-img create.
 *
 * The tool judges what it was told (names, backing file and format, size) and prints the line that
 * scripts know ("Formatting ..."); the library validates and makes the image.
 *
 * Invariant: nothing is printed to stdout but that line, and it is printed before the format driver
 * judges its options, also when those turn out wrong.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "qemu-img/img.h"

typedef struct CreateArgs {
    const char *format;
    char *options;
    const char *backing, *backing_format;
    bool backing_unsafe, quiet;
    GPtrArray *objects;
} CreateArgs;

static const ImgOption create_options[] = {
    {IMG_STRING, 'f', "format", offsetof(CreateArgs, format), "FMT", "format of the new image [raw]"},
    {IMG_JOINED, 'o', "options", offsetof(CreateArgs, options), "OPTS",
     "format options, name=value,...; 'help' lists them"},
    {IMG_STRING, 'b', "backing", offsetof(CreateArgs, backing), "FILE", "backing file"},
    {IMG_STRING, 'F', "backing-format", offsetof(CreateArgs, backing_format), "FMT",
     "format of the backing file"},
    {IMG_FLAG, 'u', "backing-unsafe", offsetof(CreateArgs, backing_unsafe), NULL,
     "do not open the backing file"},
    {IMG_FLAG, 'q', "quiet", offsetof(CreateArgs, quiet), NULL, "print errors only"},
    {IMG_LIST, 0, "object", offsetof(CreateArgs, objects), "OBJDEF", "object definition"},
    {IMG_END},
};

static const ImgUsage create_usage = {"create", "FILE [SIZE]", "Create an image.", create_options};

/* The order in which users know the options of the line; all others follow in table order. */
static const char *const shown_first[] = {
    "encryption", "cluster_size", "extended_l2", "preallocation", "compression_type", "size",
    "compat", "data_file", "data_file_raw", "backing_file", "backing_fmt", "lazy_refcounts",
    "refcount_bits", NULL};

static void print_option(const QbOptDesc *desc, const json_t *options)
{
    const json_t *value = json_object_get(options, desc->name);

    if (json_is_string(value)) {
        printf(" %s=%s", desc->name, json_string_value(value));
    } else if (json_is_integer(value)) {
        printf(" %s=%" JSON_INTEGER_FORMAT, desc->name, json_integer_value(value));
    } else if (desc->def) {
        printf(" %s=%s", desc->name, desc->def);
    }
}

static void print_options(const QbOptDesc *table, const json_t *options, bool skip_known)
{
    for (const QbOptDesc *desc = table; desc->name; desc++) {
        if (!skip_known || !g_strv_contains(shown_first, desc->name)) {
            print_option(desc, options);
        }
    }
}

static void print_formatting(const char *file, const char *format, const json_t *options)
{
    const QbOptDesc *table = bdrv_create_options(bdrv_find_format(format));
    const BlockDriver *protocol = bdrv_find_protocol(file, true, NULL);
    const QbOptDesc *below = protocol ? bdrv_create_options(protocol) : NULL;

    printf("Formatting '%s', fmt=%s", file, format);
    for (const char *const *name = shown_first; *name; name++) {
        const QbOptDesc *desc = qb_opts_find(table, *name);
        if (desc) {
            print_option(desc, options);
        }
    }
    print_options(table, options, true);
    for (const QbOptDesc *desc = below; desc && desc->name; desc++) {
        if (!qb_opts_find(table, desc->name)) {
            print_option(desc, options);
        }
    }
    printf("\n");
    fflush(stdout);
}

static bool check_option_names(const char *file, const QbOptDesc *table, const json_t *options)
{
    const BlockDriver *protocol = bdrv_find_protocol(file, true, NULL);
    const QbOptDesc *below = protocol ? bdrv_create_options(protocol) : NULL;
    const char *key;
    json_t *value;

    json_object_foreach((json_t *)options, key, value) {
        if (!qb_opts_find(table, key) && !(below && qb_opts_find(below, key))) {
            img_error("%s: Invalid parameter '%s'", file, key);
            return false;
        }
    }
    return true;
}

/* The options of both tables, those of the same name once. */
static char *describe_merged(const QbOptDesc *table, const QbOptDesc *below)
{
    g_autoptr(GArray) merged = g_array_new(true, false, sizeof(QbOptDesc));
    for (const QbOptDesc *desc = table; desc->name; desc++) {
        g_array_append_val(merged, *desc);
    }
    for (const QbOptDesc *desc = below; desc && desc->name; desc++) {
        if (!qb_opts_find(table, desc->name)) {
            g_array_append_val(merged, *desc);
        }
    }
    return qb_opts_describe((const QbOptDesc *)(void *)merged->data);
}

/* `-o help`: options of the format, and with a file name those of its protocol too. */
static int print_option_help(const char *format, const char *file)
{
    const BlockDriver *drv = bdrv_find_format(format);
    const QbOptDesc *table = drv ? bdrv_create_options(drv) : NULL;

    if (!table) {
        img_error(drv ? "Format driver '%s' does not support image creation"
                      : "Unknown file format '%s'", format);
        return 1;
    }
    g_autofree char *text = qb_opts_describe(table);
    if (file) {
        const BlockDriver *protocol = bdrv_find_protocol(file, true, NULL);
        const QbOptDesc *below = protocol ? bdrv_create_options(protocol) : NULL;
        g_autofree char *all = describe_merged(table, below);
        printf("Supported options:\n%s", all);
        return 0;
    }
    printf("Supported %s options:\n%s\n"
           "The protocol level may support further options.\n"
           "Specify the target filename to include those options.\n", format, text);
    return 0;
}

static bool asks_for_help(const char *options)
{
    g_auto(GStrv) words = g_strsplit(options ? options : "", ",", -1);

    return g_strv_contains((const char *const *)words, "help") ||
           g_strv_contains((const char *const *)words, "?");
}

static bool set_size(json_t *options, const char *size_text)
{
    const char *given = qb_opt_peek_string(options, "size");
    const char *text = size_text ? size_text : given;
    uint64_t size;

    if (!text) {
        return true;
    }
    if (!img_parse_size(text, &size)) {
        return false;
    }
    json_object_set_new(options, "size", json_integer((json_int_t)size));
    return true;
}

static json_t *collect_options(const CreateArgs *args, const char *file, const char *size_text)
{
    GError *err = NULL;
    json_t *options = qb_opts_parse(args->options ? args->options : "", NULL, &err);

    if (!options) {
        img_report_prefixed(err, 1, "%s: ", file);
        return NULL;
    }
    if (args->backing) {
        json_object_set_new(options, "backing_file", json_string(args->backing));
    }
    if (args->backing_format) {
        json_object_set_new(options, "backing_fmt", json_string(args->backing_format));
    }
    if (!set_size(options, size_text)) {
        json_decref(options);
        return NULL;
    }
    return options;
}

/* Opens the backing file to see that it is there, and for its format and size. */
static bool inspect_backing(const char *file, json_t *options, bool size_wanted)
{
    const char *backing = qb_opt_peek_string(options, "backing_file");
    const char *format = qb_opt_peek_string(options, "backing_fmt");
    GError *err = NULL;
    g_autofree char *path = bdrv_resolve_name_against(file, backing, &err);
    json_t *how = json_object();

    if (format) {
        json_object_set_new(how, "driver", json_string(format));
    }
    json_object_set_new(how, "force-share", json_true());
    g_autoptr(BlockDriverState) bs = path ? bdrv_open(path, how, BDRV_O_NO_IO, &err) : NULL;
    if (!bs) {
        if (!path) { /* else bdrv_open() has taken them */
            json_decref(how);
        }
        qb_error_add_hint(&err, "Could not open backing image.");
        img_report_prefixed(err, 1, "%s: ", file);
        return false;
    }
    if (!format) {
        img_error("%s: Backing file specified without backing format\nDetected format of %s.", file,
                  bdrv_get_format_name(bs));
        return false;
    }
    if (size_wanted) {
        json_object_set_new(options, "size", json_integer(bdrv_getlength(bs)));
    }
    return true;
}

static bool check_backing(const CreateArgs *args, const char *file, const char *format,
                          json_t *options)
{
    const char *backing = qb_opt_peek_string(options, "backing_file");
    const char *backing_format = qb_opt_peek_string(options, "backing_fmt");
    bool size_wanted = !json_object_get(options, "size");

    if (backing && *backing) {
        if (!bdrv_driver_supports_backing(bdrv_find_format(format))) {
            img_error("%s: Backing file not supported for file format '%s'", file, format);
            return false;
        }
        if (backing_format && !bdrv_find_format(backing_format)) {
            img_error("%s: Unknown backing file format '%s'", file, backing_format);
            return false;
        }
        if (!strcmp(backing, file)) {
            img_error("%s: Error: Trying to create an image with the same filename as the backing "
                      "file", file);
            return false;
        }
        if (!args->backing_unsafe && !inspect_backing(file, options, size_wanted)) {
            return false;
        }
        if (args->backing_unsafe && !backing_format) {
            img_error("%s: Backing file specified without backing format", file);
            return false;
        }
    }
    if (!json_object_get(options, "size")) {
        img_error("%s: Image creation needs a size parameter", file);
        return false;
    }
    return true;
}

static int create_image(const CreateArgs *args, const char *file, const char *size_text)
{
    const char *format = args->format ? args->format : "raw";
    const BlockDriver *drv = bdrv_find_format(format);
    GError *err = NULL;

    if (!drv) {
        img_error("%s: Unknown file format '%s'", file, format);
        return 1;
    }
    if (!bdrv_create_options(drv)) {
        img_error("%s: Format driver '%s' does not support image creation", file, format);
        return 1;
    }
    g_autoptr(json_t) options = collect_options(args, file, size_text);
    if (!options || !check_option_names(file, bdrv_create_options(drv), options) ||
        !check_backing(args, file, format, options)) {
        return 1;
    }
    if (!args->quiet) {
        print_formatting(file, format, options);
    }
    if (!bdrv_img_create(file, format, options, &err)) {
        return img_report_prefixed(err, 1, "%s: ", file);
    }
    return 0;
}

int img_create(int argc, char **argv)
{
    g_autoptr(GPtrArray) operands = g_ptr_array_new();
    CreateArgs args = {0};

    switch (img_parse_args(&create_usage, argc, argv, &args, operands)) {
    case IMG_PARSE_HELP:
        return 0;
    case IMG_PARSE_ERROR:
        return 1;
    case IMG_PARSE_OK:
        break;
    }
    g_autofree char *options = args.options;
    g_autoptr(GPtrArray) objects = args.objects;
    if (asks_for_help(args.options)) {
        return print_option_help(args.format ? args.format : "raw",
                                 operands->len ? operands->pdata[0] : NULL);
    }
    if (operands->len == 0) {
        return img_usage_error("create", "Expecting image file name");
    }
    if (operands->len > 2) {
        return img_usage_error("create", "Unexpected argument: %s", (char *)operands->pdata[2]);
    }
    if (!img_check_objects(objects)) {
        return 1;
    }
    return create_image(&args, operands->pdata[0], operands->len > 1 ? operands->pdata[1] : NULL);
}
