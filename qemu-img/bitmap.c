/*
 * qemu-img bitmap: changes the persistent dirty bitmaps of an image.
 *
 *      --add --merge other --disable IMAGE NAME      actions are carried out in the order given
 *
 * Each action is complete before the next begins; the first that fails ends the run, and what was
 * done before it stays.
 *
 * The backing file is not opened: bitmaps have nothing to do with it, and who repairs a chain may
 * have lost it.  --remove-all takes no name, and also works where the list cannot be read.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdio.h>
#include <string.h>
#include "block/dirty-bitmap.h"
#include "qemu-img/img.h"

typedef struct BitmapArgs {
    const char *format, *source_file, *source_format, *granularity;
    bool image_opts;
    GArray *actions; /* ImgAction */
    GPtrArray *objects;
} BitmapArgs;

static const ImgOption bitmap_options[] = {
    {IMG_STRING, 'f', "format", offsetof(BitmapArgs, format), "FMT", "image format (not probed)"},
    {IMG_FLAG, 0, "image-opts", offsetof(BitmapArgs, image_opts), NULL, "FILE is an option string"},
    {IMG_ACTION, 0, "add", offsetof(BitmapArgs, actions), NULL, "add bitmap NAME, enabled"},
    {IMG_STRING, 'g', "granularity", offsetof(BitmapArgs, granularity), "SIZE",
     "bytes for each bit (with --add); a power of two [cluster size, 4k to 64k]"},
    {IMG_ACTION, 0, "remove", offsetof(BitmapArgs, actions), NULL, "remove it"},
    {IMG_ACTION, 0, "clear", offsetof(BitmapArgs, actions), NULL, "forget what was written"},
    {IMG_ACTION, 0, "enable", offsetof(BitmapArgs, actions), NULL, "let writes mark it"},
    {IMG_ACTION, 0, "disable", offsetof(BitmapArgs, actions), NULL, "keep it as it is"},
    {IMG_ACTION_VALUE, 0, "merge", offsetof(BitmapArgs, actions), "SOURCE",
     "add what bitmap SOURCE has"},
    {IMG_ACTION, 0, "remove-all", offsetof(BitmapArgs, actions), NULL,
     "remove all bitmaps, readable or not; takes no NAME"},
    {IMG_STRING, 'b', "source-file", offsetof(BitmapArgs, source_file), "FILE",
     "image that has the bitmaps to merge [the image itself]"},
    {IMG_STRING, 'F', "source-format", offsetof(BitmapArgs, source_format), "FMT",
     "format of the source file"},
    {IMG_LIST, 0, "object", offsetof(BitmapArgs, objects), "OBJDEF", "object definition"},
    {IMG_END},
};

static const ImgUsage bitmap_usage = {"bitmap", "FILE NAME",
                                      "Change persistent dirty bitmaps of an image.",
                                      bitmap_options};

/* What an action works on. */
typedef struct BitmapTarget {
    BlockDriverState *bs, *source; /* source: where bitmaps to merge are */
    const char *name;              /* NULL with remove-all */
    uint32_t granularity;          /* 0: default */
} BitmapTarget;

/* ---- the actions ---- */

static bool do_add(const BitmapTarget *t, const char *value, GError **errp)
{
    return bdrv_bitmap_add(t->bs, t->name, t->granularity, true, false, errp);
}

static bool do_remove(const BitmapTarget *t, const char *value, GError **errp)
{
    return bdrv_bitmap_remove(t->bs, t->name, errp);
}

static bool do_remove_all(const BitmapTarget *t, const char *value, GError **errp)
{
    return bdrv_bitmap_remove_all(t->bs, errp);
}

static bool do_clear(const BitmapTarget *t, const char *value, GError **errp)
{
    return bdrv_bitmap_clear(t->bs, t->name, errp);
}

static bool do_enable(const BitmapTarget *t, const char *value, GError **errp)
{
    return bdrv_bitmap_enable(t->bs, t->name, errp);
}

static bool do_disable(const BitmapTarget *t, const char *value, GError **errp)
{
    return bdrv_bitmap_disable(t->bs, t->name, errp);
}

static bool do_merge(const BitmapTarget *t, const char *value, GError **errp)
{
    return bdrv_bitmap_merge(t->bs, t->name, t->source, value, errp);
}

static const struct {
    const char *name;
    bool (*run)(const BitmapTarget *t, const char *value, GError **errp);
} actions[] = {
    {"add", do_add},         {"remove", do_remove},   {"remove-all", do_remove_all},
    {"clear", do_clear},     {"enable", do_enable},   {"disable", do_disable},
    {"merge", do_merge},
};

static bool has_action(const BitmapArgs *args, const char *name)
{
    for (guint i = 0; args->actions && i < args->actions->len; i++) {
        if (!strcmp(g_array_index(args->actions, ImgAction, i).name, name)) {
            return true;
        }
    }
    return false;
}

static bool run_action(const BitmapTarget *t, const ImgAction *action)
{
    GError *err = NULL;

    for (size_t i = 0; i < G_N_ELEMENTS(actions); i++) {
        if (strcmp(actions[i].name, action->name) != 0) {
            continue;
        }
        if (actions[i].run(t, action->value, &err)) {
            return true;
        }
    }
    if (t->name) {
        g_prefix_error(&err, "Operation %s on bitmap %s failed: ", action->name, t->name);
    } else {
        g_prefix_error(&err, "Operation %s failed: ", action->name);
    }
    img_report(err, 1);
    return false;
}

static int run_actions(const BitmapTarget *t, const BitmapArgs *args)
{
    for (guint i = 0; i < args->actions->len; i++) {
        if (!run_action(t, &g_array_index(args->actions, ImgAction, i))) {
            return 1;
        }
    }
    return 0;
}

/* ---- around them ---- */

static int open_and_run(BitmapTarget *t, const char *file, const BitmapArgs *args)
{
    ImgOpen how = {.format = args->format, .image_opts = args->image_opts,
                   .flags = BDRV_O_RDWR | BDRV_O_NO_BACKING | BDRV_O_NO_IO};
    ImgOpen source_how = {.format = args->source_format,
                          .flags = BDRV_O_NO_BACKING | BDRV_O_NO_IO};
    BlockBackend *blk = img_open(file, &how);
    g_autoptr(BlockBackend) source = NULL;
    int status = 1;

    if (!blk) {
        return 1;
    }
    source = args->source_file ? img_open(args->source_file, &source_how) : NULL;
    if (source || !args->source_file) {
        t->bs = blk_bs(blk);
        t->source = source ? blk_bs(source) : t->bs;
        status = run_actions(t, args);
    }
    return img_close(blk, status);
}

static bool check_usage(const BitmapArgs *args, const GPtrArray *operands)
{
    bool all = has_action(args, "remove-all");
    const struct {
        bool wrong;
        const char *text;
    } rules[] = {
        {all && (args->actions->len > 1 || operands->len != 1),
         "--remove-all takes a file name, and goes with no other action"},
        {!all && operands->len != 2, "Expecting filename and bitmap name"},
        {!args->actions, "Need at least one of --add, --remove, --clear, --enable, --disable, or"
                         " --merge"},
        {args->granularity && !has_action(args, "add"), "granularity only supported with --add"},
        {args->source_format && !args->source_file, "-F only supported with -b"},
        {args->source_file && !has_action(args, "merge"),
         "Merge bitmap source file only supported with --merge"},
    };

    for (size_t i = 0; i < G_N_ELEMENTS(rules); i++) {
        if (rules[i].wrong) {
            img_error("%s", rules[i].text);
            return false;
        }
    }
    return true;
}

static bool parse_granularity(const char *text, uint32_t *ret)
{
    uint64_t value = 0;

    if (text && !img_parse_size("granularity", text, &value)) {
        return false;
    }
    if (value > UINT32_C(1) << BDRV_BITMAP_MAX_GRANULARITY_BITS) {
        value = UINT32_MAX; /* no power of two either; said with the rest */
    }
    *ret = (uint32_t)value;
    return true;
}

static int run(const BitmapArgs *args, const GPtrArray *operands, const GPtrArray *objects)
{
    BitmapTarget target = {0};

    if (!check_usage(args, operands) || !img_check_open_args(args->format, args->image_opts) ||
        !parse_granularity(args->granularity, &target.granularity) || !img_check_objects(objects)) {
        return 1;
    }
    target.name = operands->len > 1 ? operands->pdata[1] : NULL;
    return open_and_run(&target, operands->pdata[0], args);
}

int img_bitmap(int argc, char **argv)
{
    g_autoptr(GPtrArray) operands = g_ptr_array_new();
    BitmapArgs args = {0};
    int status;

    if (!img_parse_args(&bitmap_usage, argc, argv, &args, operands, &status)) {
        return status;
    }
    g_autoptr(GPtrArray) objects = args.objects;
    status = run(&args, operands, objects);
    g_clear_pointer(&args.actions, g_array_unref);
    return status;
}
