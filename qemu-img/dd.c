/*
 * qemu-img dd: copy a part of an image into a new one.
 *
 *      input   |-- skip * bs --|======== size ========|-----|
 *                              |                      `- end of the input, or of count * bs
 *      output                  |======== size ========|        a new image
 *
 * The copying itself is convert's: the input is a source that begins before the output does.
 *
 * Invariants
 * 1. count is counted from the beginning of the input, not from where skip leads to; so it is with
 *    QEMU's dd, and scripts reckon with it.
 * 2. The output is not the input nor what lies below it: making the output empties it.
 *
 * bs is a unit of count and skip only: the sizes of reads and writes are the engine's.  As the
 * output is new, zeroes are left out of it.
 *
 * SPDX-License-Identifier: MIT
 */
#include <string.h>
#include <sys/stat.h>
#include "block/locks.h"
#include "qemu-img/convert.h"
#include "qemu-img/create-options.h"
#include "util/checked.h"

typedef struct DdArgs {
    const char *format, *output_format;
    bool image_opts, force_share;
    GPtrArray *objects;
} DdArgs;

#define FIELD(name) offsetof(DdArgs, name)
static const ImgOption dd_options[] = {
    {IMG_STRING, 'f', "format", FIELD(format), "FMT", "format of the input (not probed)"},
    {IMG_FLAG, 0, "image-opts", FIELD(image_opts), NULL, "the input is an option string"},
    {IMG_STRING, 'O', "output-format", FIELD(output_format), "FMT", "format of the output [raw]"},
    {IMG_FLAG, 'U', "force-share", FIELD(force_share), NULL,
     "open the input while another process writes it"},
    {IMG_LIST, 0, "object", FIELD(objects), "OBJDEF", "object definition"},
    {IMG_END},
};

static const ImgUsage dd_usage = {"dd", "[bs=SIZE] [count=N] [skip=N] if=FILE of=FILE",
                                  "Copy a part of an image into a new one.", dd_options};

#define DEFAULT_BLOCK 512
#define DEFAULT_SPARSE 4096
#define WORKERS 8

/* ---- operands ---- */

typedef struct DdOperands {
    const char *input, *output;
    uint64_t block, count, skip; /* blocks */
    bool has_count;
} DdOperands;

static bool set_input(DdOperands *ops, const char *value)
{
    ops->input = value;
    return true;
}

static bool set_output(DdOperands *ops, const char *value)
{
    ops->output = value;
    return true;
}

static bool set_block(DdOperands *ops, const char *value)
{
    if (!img_parse_size("bs", value, &ops->block)) {
        return false;
    }
    if (ops->block < 1 || ops->block > INT32_MAX) {
        img_error("Invalid bs specified. Must be between 1 and %d.", INT32_MAX);
        return false;
    }
    return true;
}

static bool set_count(DdOperands *ops, const char *value)
{
    ops->has_count = true;
    return img_parse_size("count", value, &ops->count);
}

static bool set_skip(DdOperands *ops, const char *value)
{
    return img_parse_size("skip", value, &ops->skip);
}

static const struct {
    const char *name;
    bool (*set)(DdOperands *ops, const char *value); /* false: said */
} dd_operands[] = {
    {"bs", set_block}, {"count", set_count}, {"if", set_input}, {"of", set_output},
    {"skip", set_skip},
};

static bool parse_operand(DdOperands *ops, const char *word)
{
    size_t length = strcspn(word, "=");

    for (size_t i = 0; word[length] && i < G_N_ELEMENTS(dd_operands); i++) {
        const char *name = dd_operands[i].name;
        if (strlen(name) == length && !strncmp(word, name, length)) {
            return dd_operands[i].set(ops, word + length + 1);
        }
    }
    img_error("unrecognized operand %.*s", (int)length, word);
    return false;
}

static bool parse_operands(DdOperands *ops, const GPtrArray *words)
{
    *ops = (DdOperands){.block = DEFAULT_BLOCK};
    for (guint i = 0; i < words->len; i++) {
        if (!parse_operand(ops, words->pdata[i])) {
            return false;
        }
    }
    if (!ops->input || !ops->output) {
        img_error("Must specify both input and output files");
        return false;
    }
    return true;
}

/* ---- what to copy ---- */

typedef struct DdExtent {
    int64_t start;       /* in the input */
    int64_t output_size; /* of the new image: whole sectors */
    int64_t copy_size;   /* what is copied into it */
} DdExtent;

/* The input counts as whole sectors, though the last may be cut off: the output's length follows
 * from that, as with QEMU.  False: said.  A start beyond the end is said, too, but gives an empty
 * output. */
static bool find_extent(const DdOperands *ops, int64_t length, DdExtent *ret)
{
    int64_t end, counted, start;

    if (qb_align_up_overflow((uint64_t)length, BDRV_SECTOR_SIZE, &end)) {
        img_error("%s: image size too large", ops->input);
        return false;
    }
    if (ops->has_count && !qb_mul_overflow(ops->count, ops->block, &counted)) {
        end = MIN(end, counted);
    }
    *ret = (DdExtent){0};
    if (qb_mul_overflow(ops->skip, ops->block, &start) || start > end) {
        img_error("%s: cannot skip to specified offset", ops->input);
        return true;
    }
    ret->start = start;
    ret->output_size = (int64_t)qb_align_up((uint64_t)(end - start), BDRV_SECTOR_SIZE);
    ret->copy_size = MAX(MIN(end, length) - start, 0);
    return true;
}

/* ---- copying ---- */

/* Is @output one of the files of @bs's chain? */
static bool is_below(BlockDriverState *bs, const char *output)
{
    BDRV_GRAPH_GUARD();
    struct stat out, in;

    if (stat(g_str_has_prefix(output, "file:") ? output + 5 : output, &out) < 0) {
        return false;
    }
    for (; bs; bs = bdrv_backing_chain_next(bs)) {
        if (stat(bdrv_filename(bs), &in) == 0 && in.st_dev == out.st_dev &&
            in.st_ino == out.st_ino) {
            return true;
        }
    }
    return false;
}

static bool create_output(const DdOperands *ops, const char *format, int64_t size)
{
    g_autoptr(json_t) options = json_pack("{s:I}", "size", (json_int_t)size);
    GError *err = NULL;

    if (!img_create_stoppable(ops->output, format, options, &err)) {
        img_report_prefixed(err, 1, "%s: error while creating output image: ", ops->output);
        return false;
    }
    return true;
}

static bool open_output(ConvertPlan *plan, const DdOperands *ops, const char *format)
{
    ImgOpen how = {.format = format, .flags = BDRV_O_RDWR | BDRV_O_RESIZE};

    plan->target_name = ops->output;
    plan->target = img_open(ops->output, &how);
    plan->target_is_zero = convert_fresh_target_is_zero(ops->output, format);
    return plan->target && convert_settle_target(plan);
}

static int copy_extent(ConvertPlan *plan, const DdOperands *ops, const char *format)
{
    ConvertSource *src = &plan->sources[0];
    int64_t length = blk_getlength(src->blk);
    DdExtent extent;
    int status;

    if (length < 0) {
        img_error("Failed to get size for '%s'", ops->input);
        return 1;
    }
    if (is_below(blk_bs(src->blk), ops->output)) {
        img_error("%s: error while creating output image: it is the input, or below it",
                  ops->output);
        return 1;
    }
    if (!find_extent(ops, length, &extent) || !create_output(ops, format, extent.output_size)) {
        return 1;
    }
    src->start = -extent.start;
    src->size = extent.start + extent.copy_size;
    plan->size = extent.copy_size;
    if (!open_output(plan, ops, format)) {
        return 1;
    }
    status = convert_run(plan, false) ? 0 : 1;
    return img_close(g_steal_pointer(&plan->target), status);
}

static int copy_image(const DdOperands *ops, const DdArgs *args)
{
    ImgOpen how = {.format = args->format, .image_opts = args->image_opts,
                   .force_share = args->force_share};
    ConvertPlan plan = {.nb_sources = 1, .min_sparse = DEFAULT_SPARSE, .workers = WORKERS};
    BlockBackend *input = img_open(ops->input, &how);
    int status;

    if (!input) {
        return 1;
    }
    plan.sources = g_new0(ConvertSource, 1);
    plan.sources[0] = (ConvertSource){.blk = input, .name = ops->input};
    status = copy_extent(&plan, ops, args->output_format);
    convert_plan_clear(&plan);
    return status;
}

int img_dd(int argc, char **argv)
{
    g_autoptr(GPtrArray) words = g_ptr_array_new();
    DdArgs args = {.output_format = "raw"};
    ImgCreateTables tables;
    GError *err = NULL;
    DdOperands ops;
    int status;

    if (!img_parse_args(&dd_usage, argc, argv, &args, words, &status)) {
        return status;
    }
    g_autoptr(GPtrArray) objects = args.objects;
    if (!parse_operands(&ops, words) || !img_check_open_args(args.format, args.image_opts) ||
        !img_check_objects(objects)) {
        return 1;
    }
    if (!img_create_tables_find(&tables, args.output_format, ops.output, &err)) {
        return img_report(err, 1);
    }
    return copy_image(&ops, &args);
}
