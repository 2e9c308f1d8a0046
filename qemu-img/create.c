/*
 * qemu-img create.
 *
 * The tool judges what it was told (names, backing file and format, size) and prints the line that
 * scripts know ("Formatting ..."); the library validates and makes the image.
 *
 * Invariant: nothing is printed to stdout but that line (or the help for -o), and it is printed
 * before the format driver judges what the options mean, also when that turns out wrong.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "qemu-img/create-options.h"
#include "util/checked.h"

typedef struct CreateArgs {
    const char *format;
    char *options;
    const char *backing, *backing_format;
    bool backing_unsafe, quiet;
    GPtrArray *objects;
} CreateArgs;

static const ImgOption create_options[] = {
    {IMG_STRING, 'f', "format", offsetof(CreateArgs, format), "FMT",
     "format of the new image [raw]"},
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

static const char *create_format(const CreateArgs *args)
{
    return args->format ? args->format : "raw";
}

/* The order in which users know the options of the line; all others follow in table order. */
static const char *const shown_for_qcow2[] = {
    "encryption", "cluster_size", "extended_l2", "preallocation", "compression_type", "size",
    "compat", "data_file", "data_file_raw", "backing_file", "backing_fmt", "lazy_refcounts",
    "refcount_bits", NULL};
static const char *const shown_for_others[] = {"size", "backing_file", "backing_fmt", NULL};

/* A comma in a value is doubled, as it would be in -o. */
static void print_string(const char *name, const char *value)
{
    g_auto(GStrv) pieces = g_strsplit(value, ",", -1);
    g_autofree char *doubled = g_strjoinv(",,", pieces);

    printf(" %s=%s", name, doubled);
}

static void print_option(const QbOptDesc *desc, const json_t *options)
{
    const json_t *value = json_object_get(options, desc->name);

    if (json_is_string(value)) {
        print_string(desc->name, json_string_value(value));
    } else if (json_is_integer(value)) {
        printf(" %s=%" JSON_INTEGER_FORMAT, desc->name, json_integer_value(value));
    } else if (desc->def) {
        printf(" %s=%s", desc->name, desc->def);
    }
}

static void print_formatting(const char *file, const char *format, const ImgCreateTables *t,
                             const json_t *options)
{
    const char *const *shown_first = strcmp(format, "qcow2") ? shown_for_others : shown_for_qcow2;

    printf("Formatting '%s', fmt=%s", file, format);
    for (const char *const *name = shown_first; *name; name++) {
        const QbOptDesc *desc = qb_opts_find(t->format, *name);
        if (desc) {
            print_option(desc, options);
        }
    }
    for (const QbOptDesc *desc = t->format; desc->name; desc++) {
        if (!g_strv_contains(shown_first, desc->name)) {
            print_option(desc, options);
        }
    }
    for (const QbOptDesc *desc = t->protocol; desc && desc->name; desc++) {
        if (!qb_opts_find(t->format, desc->name)) {
            print_option(desc, options);
        }
    }
    printf("\n");
    fflush(stdout);
}

/* The size operand joins the options. False: said. */
static bool add_size(json_t *options, const char *file, const char *text)
{
    uint64_t size;

    if (!text) {
        return true;
    }
    if (json_object_get(options, "size")) {
        img_error("%s: The image size must be specified only once", file);
        return false;
    }
    if (!img_parse_size("image size", text, &size)) {
        return false;
    }
    json_object_set_new(options, "size", json_integer((json_int_t)size));
    return true;
}

/* New images are whole sectors long. */
static bool round_size(const char *file, json_t *options)
{
    uint64_t size = (uint64_t)json_integer_value(json_object_get(options, "size"));
    int64_t rounded;

    if (qb_align_up_overflow(size, BDRV_SECTOR_SIZE, &rounded)) {
        img_error("%s: The image size is too large", file);
        return false;
    }
    json_object_set_new(options, "size", json_integer(rounded));
    return true;
}

static bool inherit_size(const char *file, BlockDriverState *backing, json_t *options)
{
    int64_t size = bdrv_getlength(backing);

    if (size < 0) {
        img_error("%s: Could not get size of '%s': %s", file, bdrv_filename(backing),
                  g_strerror((int)-size));
        return false;
    }
    json_object_set_new(options, "size", json_integer(size));
    return round_size(file, options);
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
        return inherit_size(file, bs, options);
    }
    return true;
}

static bool check_backing(const CreateArgs *args, const char *file, json_t *options)
{
    const char *backing = qb_opt_peek_string(options, "backing_file");
    const char *format = qb_opt_peek_string(options, "backing_fmt");
    bool size_wanted = !json_object_get(options, "size");

    if (format && !bdrv_find_format(format)) {
        img_error("%s: Unknown backing file format '%s'", file, format);
        return false;
    }
    if (!backing) {
        return true; /* a format without a file is refused by the driver */
    }
    if (!*backing) {
        img_error("%s: Expected backing file name, got empty string", file);
        return false;
    }
    if (!strcmp(backing, file)) {
        img_error("%s: Error: Trying to create an image with the same filename as the backing "
                  "file", file);
        return false;
    }
    if (!args->backing_unsafe) {
        return inspect_backing(file, options, size_wanted);
    }
    if (!format) {
        img_error("%s: Backing file specified without backing format", file);
    }
    return format != NULL;
}

static json_t *collect_options(const CreateArgs *args, const char *file, const char *size_text,
                               const ImgCreateTables *t)
{
    GError *err = NULL;
    g_autoptr(json_t) options = img_parse_create_options(t, create_format(args), args->options,
                                                         args->backing, args->backing_format, &err);

    if (!options) {
        img_report_prefixed(err, 1, "%s: ", file);
        return NULL;
    }
    if (!add_size(options, file, size_text) || !check_backing(args, file, options)) {
        return NULL;
    }
    if (!json_object_get(options, "size")) {
        img_error("%s: Image creation needs a size parameter", file);
        return NULL;
    }
    return g_steal_pointer(&options);
}

static int create_image(const CreateArgs *args, const char *file, const char *size_text)
{
    const char *format = create_format(args);
    ImgCreateTables tables;
    GError *err = NULL;

    if (!img_create_tables_find(&tables, format, file, &err)) {
        return img_report_prefixed(err, 1, "%s: ", file);
    }
    g_autoptr(json_t) options = collect_options(args, file, size_text, &tables);
    if (!options) {
        return 1;
    }
    if (!args->quiet) {
        print_formatting(file, format, &tables, options);
    }
    if (!round_size(file, options)) {
        return 1;
    }
    if (!img_create_stoppable(file, format, options, &err)) {
        return img_report_prefixed(err, 1, "%s: ", file);
    }
    return 0;
}

int img_create(int argc, char **argv)
{
    g_autoptr(GPtrArray) operands = g_ptr_array_new();
    CreateArgs args = {0};
    int status;

    if (!img_parse_args(&create_usage, argc, argv, &args, operands, &status)) {
        return status;
    }
    g_autofree char *options = args.options;
    g_autoptr(GPtrArray) objects = args.objects;
    if (img_asks_for_option_help(options)) {
        return img_print_option_help(create_format(&args),
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
