/*
 * qemu-img convert: copy one or more images into a new (or existing) one.
 *
 *      arguments -> open sources -> size -> create target (unless -n) -> open target -> plan
 *                                                                           -> convert-copy.c
 *
 * Invariants
 * 1. What is wrong with the options is said before any file is touched.
 * 2. The target's content is right only when the exit status is 0; a target that convert created
 *    stays, as users know it, when the copy fails.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "block/dirty-bitmap.h"
#include "block/locks.h"
#include "qemu-img/convert.h"
#include "qemu-img/create-options.h"
#include "util/checked.h"

typedef struct ConvertArgs {
    const char *source_format, *source_cache, *snapshot;
    const char *target_format, *target_cache, *backing, *backing_format;
    const char *sparse_text, *parallel_text;
    char *options;
    bool image_opts, target_image_opts, bitmaps, skip_broken_bitmaps, salvage, no_create;
    bool target_is_zero, out_of_order, copy_offload, compress, force_share, progress, quiet, untrusted;
    uint64_t rate_limit;
    GPtrArray *objects;
} ConvertArgs;

#define FIELD(name) offsetof(ConvertArgs, name)
static const ImgOption convert_options[] = {
    {IMG_STRING, 'f', "source-format", FIELD(source_format), "FMT", "format of the sources"},
    {IMG_FLAG, 0, "image-opts", FIELD(image_opts), NULL, "sources are option strings"},
    {IMG_STRING, 'T', "source-cache", FIELD(source_cache), "CACHE", "cache mode of the sources"},
    {IMG_STRING, 'l', "snapshot", FIELD(snapshot), "SNAPSHOT", "copy this internal snapshot"},
    {IMG_FLAG, 0, "bitmaps", FIELD(bitmaps), NULL, "copy persistent bitmaps too"},
    {IMG_FLAG, 0, "skip-broken-bitmaps", FIELD(skip_broken_bitmaps), NULL,
     "leave inconsistent bitmaps out"},
    {IMG_FLAG, 0, "salvage", FIELD(salvage), NULL, "put zeroes where a source cannot be read"},
    {IMG_STRING, 'O', "target-format", FIELD(target_format), "FMT", "format of the target [raw]"},
    {IMG_FLAG, 0, "target-image-opts", FIELD(target_image_opts), NULL,
     "the target is an option string (with -n)"},
    {IMG_JOINED, 'o', "target-format-options", FIELD(options), "OPTS", "options of the target"},
    {IMG_STRING, 't', "target-cache", FIELD(target_cache), "CACHE",
     "cache mode of the target [unsafe]"},
    {IMG_STRING, 'b', "backing", FIELD(backing), "FILE", "backing file of the target"},
    {IMG_STRING, 'B', NULL, FIELD(backing), "FILE", "the same as -b"},
    {IMG_STRING, 'F', "backing-format", FIELD(backing_format), "FMT", "format of the backing file"},
    {IMG_STRING, 'S', "sparse-size", FIELD(sparse_text), "SIZE",
     "shortest run of zeroes to look for; 0 allocates everything [4k]"},
    {IMG_FLAG, 'n', "no-create", FIELD(no_create), NULL, "the target exists already"},
    {IMG_FLAG, 0, "target-is-zero", FIELD(target_is_zero), NULL, "it reads as zeroes (with -n)"},
    {IMG_SIZE, 'r', "rate-limit", FIELD(rate_limit), "RATE", "bytes per second"},
    {IMG_STRING, 'm', "parallel", FIELD(parallel_text), "N", "workers, 1 to 16 [8]"},
    {IMG_FLAG, 'W', "oob-writes", FIELD(out_of_order), NULL, "write in any order"},
    {IMG_FLAG, 'C', "copy-range-offloading", FIELD(copy_offload), NULL, "let the kernel copy"},
    {IMG_FLAG, 'c', "compress", FIELD(compress), NULL, "compress the target"},
    {IMG_FLAG, 'U', "force-share", FIELD(force_share), NULL,
     "open sources while another process writes them"},
    {IMG_FLAG, 'p', "progress", FIELD(progress), NULL, "show progress"},
    {IMG_FLAG, 'q', "quiet", FIELD(quiet), NULL, "print errors only"},
    IMG_UNTRUSTED_OPTION(ConvertArgs),
    {IMG_LIST, 0, "object", FIELD(objects), "OBJDEF", "object definition"},
    {IMG_END},
};

static const ImgUsage convert_usage = {"convert", "FILE [FILE...] TARGET",
                                       "Copy images into another format or layout.",
                                       convert_options};

#define MAX_SPARSE (16 * 1024 * 1024)
#define DEFAULT_SPARSE 4096
#define DEFAULT_WORKERS 8
#define MAX_WORKERS 16

/* ---- judging options ---- */

static bool parse_sparse(const char *text, int64_t *ret)
{
    uint64_t value = DEFAULT_SPARSE;

    if (text && (qb_size_parse(text, 'b', &value) < 0 || value % 512 || value > MAX_SPARSE)) {
        img_error("Invalid buffer size for sparse output specified. Valid sizes are multiples of "
                  "512 up to %d. Select 0 to disable sparse detection (fully allocates output).",
                  MAX_SPARSE);
        return false;
    }
    *ret = (int64_t)value;
    return true;
}

static bool parse_workers(const char *text, unsigned *ret)
{
    uint64_t value = DEFAULT_WORKERS;

    if (text && (qb_uint_parse(text, &value) < 0 || value < 1 || value > MAX_WORKERS)) {
        img_error("Invalid number of coroutines specified. Must be between 1 and %d.", MAX_WORKERS);
        return false;
    }
    *ret = (unsigned)value;
    return true;
}

/* @mode is a good one; NULL: unsafe. */
static bool is_cached(const char *mode)
{
    BlkCacheMode cache = {0};

    return !mode || (blk_parse_cache_mode(mode, &cache) && !cache.direct);
}

/* Pairs of options that do not go together, and what is said. */
static bool check_combinations(const ConvertArgs *a)
{
    const struct {
        bool wrong;
        const char *text;
    } rules[] = {
        {a->copy_offload && a->compress, "Cannot enable copy offloading when -c is used"},
        {a->copy_offload && a->sparse_text, "Cannot enable copy offloading when -S is used"},
        {a->target_is_zero && !a->no_create, "--target-is-zero requires use of -n flag"},
        {a->target_image_opts && !a->no_create, "--target-image-opts requires use of -n flag"},
        {a->target_image_opts && a->target_format,
         "--image-opts and --format are mutually exclusive"},
        {a->skip_broken_bitmaps && !a->bitmaps, "Use of --skip-broken-bitmaps requires --bitmaps"},
        {a->no_create && a->options, "-o has no effect when skipping image creation"},
        {a->salvage && a->copy_offload, "Cannot use copy offloading in salvaging mode"},
    };

    for (size_t i = 0; i < G_N_ELEMENTS(rules); i++) {
        if (rules[i].wrong) {
            img_error("%s", rules[i].text);
            return false;
        }
    }
    return true;
}

/* ---- sources ---- */

static bool open_source(ConvertPlan *plan, const char *name, const ConvertArgs *a)
{
    ImgOpen how = {.format = a->source_format, .image_opts = a->image_opts,
                   .cache = a->source_cache, .force_share = a->force_share, .untrusted = a->untrusted,
                   .flags = a->force_share ? 0 : BDRV_O_NO_SHARE};
    ConvertSource *src = &plan->sources[plan->nb_sources];

    src->name = name;
    src->start = plan->size;
    src->blk = img_open(name, &how);
    if (!src->blk) {
        return false;
    }
    plan->nb_sources++;
    if (a->snapshot && !img_load_snapshot(blk_bs(src->blk), a->snapshot)) {
        return false;
    }
    src->size = blk_getlength(src->blk);
    if (src->size < 0 || qb_add_overflow(plan->size, src->size, &plan->size)) {
        img_error("Could not get size of '%s': %s", name,
                  g_strerror(src->size < 0 ? (int)-src->size : EFBIG));
        return false;
    }
    return true;
}

static bool open_sources(ConvertPlan *plan, const GPtrArray *operands, const ConvertArgs *a)
{
    unsigned n = operands->len - 1;

    if (n > 1 && a->backing) {
        img_error("Having a backing file for the target makes no sense when concatenating "
                  "multiple input images");
        return false;
    }
    if (n > 1 && a->snapshot) {
        img_error("No support for concatenating multiple snapshot");
        return false;
    }
    plan->sources = g_new0(ConvertSource, n);
    for (unsigned i = 0; i < n; i++) {
        if (!open_source(plan, operands->pdata[i], a)) {
            return false;
        }
    }
    return true;
}

/* ---- target ---- */

static const char *target_format(const ConvertArgs *a)
{
    return a->target_format ? a->target_format : "raw";
}

/* Judges what the new image shall be. NULL: said. */
static json_t *judge_target(const ConvertArgs *a, const char *name)
{
    const char *format = target_format(a);
    g_autoptr(json_t) options = NULL;
    ImgCreateTables tables;
    GError *err = NULL;

    if (img_create_tables_find(&tables, format, name, &err)) {
        options = img_parse_create_options(&tables, format, a->options, a->backing,
                                           a->backing_format, &err);
    }
    if (!options) {
        img_report(err, 1);
        return NULL;
    }
    if (qb_opt_peek_string(options, "backing_file") &&
        !qb_opt_peek_string(options, "backing_fmt")) {
        img_error("Use of backing file requires explicit backing format");
        return NULL;
    }
    return g_steal_pointer(&options);
}

/* The size that -o gives, else that of the sources. */
static bool settle_size(ConvertPlan *plan)
{
    g_autoptr(json_t) copy = json_copy(plan->create_options);
    uint64_t size = (uint64_t)plan->size;

    if (!qb_opt_take_size(copy, "size", size, &size, NULL) || size < (uint64_t)plan->size) {
        img_error("output file is smaller than input file");
        return false;
    }
    if (!json_object_get(plan->create_options, "size")) {
        json_object_set_new(plan->create_options, "size", json_integer(plan->size));
    }
    return true;
}

static bool create_target(ConvertPlan *plan, const char *name, const ConvertArgs *a)
{
    const char *backing = qb_opt_peek_string(plan->create_options, "backing_file");
    const char *format = target_format(a);
    GError *err = NULL;

    if (!settle_size(plan)) {
        return false;
    }
    plan->target_has_backing = backing && *backing;
    if (!img_create_stoppable(name, format, plan->create_options, &err)) {
        img_report_prefixed(err, 1, "%s: error while converting %s: ", name, format);
        return false;
    }
    return true;
}

static bool open_target(ConvertPlan *plan, const char *name, const char *format,
                        const ConvertArgs *a)
{
    ImgOpen how = {.format = a->target_image_opts ? NULL : format,
                   .image_opts = a->target_image_opts,
                   .cache = a->target_cache ? a->target_cache : "unsafe",
                   .unmap = true,
                   .flags = BDRV_O_RDWR | BDRV_O_NO_SHARE | (a->no_create ? 0 : BDRV_O_RESIZE)};

    plan->target_name = name;
    plan->target = img_open(name, &how);
    return plan->target && convert_settle_target(plan);
}

bool convert_settle_target(ConvertPlan *plan)
{
    BlockDriverInfo info = {0};
    int64_t size = blk_getlength(plan->target);

    if (size < plan->size) {
        if (size < 0) {
            img_error("unable to get output file size: %s", g_strerror((int)-size));
        } else {
            img_error("output file is smaller than input file");
        }
        return false;
    }
    plan->target_size = size;
    bdrv_get_info(blk_bs(plan->target), &info, NULL);
    plan->target_alignment = MAX(info.cluster_size, 512);
    return true;
}

/* A device keeps what was on it. */
bool convert_fresh_target_is_zero(const char *name, const char *format)
{
    const BlockDriver *protocol = bdrv_find_protocol(name, true, NULL);

    return strcmp(format, "raw") != 0 || !protocol ||
           !strcmp(bdrv_driver_name(protocol), "file");
}

static bool check_compression(const ConvertPlan *plan)
{
    if (plan->compress && !bdrv_supports_compression(blk_bs(plan->target))) {
        img_error("Compression not supported for this file format");
        return false;
    }
    return true;
}

/* With -n and -B: if the target has a backing file, what the source's top layer lacks is there. */
static bool has_backing(BlockBackend *blk)
{
    BDRV_GRAPH_GUARD();

    return bdrv_backing_chain_next(blk_bs(blk)) != NULL;
}

static bool prepare_target(ConvertPlan *plan, const char *name, const ConvertArgs *a)
{
    const char *format = target_format(a);

    if (plan->create_options && !create_target(plan, name, a)) {
        return false;
    }
    if (!open_target(plan, name, format, a) || !check_compression(plan)) {
        return false;
    }
    if (a->no_create && a->backing && *a->backing) {
        plan->target_has_backing = has_backing(plan->target);
    }
    plan->target_is_zero = a->no_create ? a->target_is_zero
                                        : !plan->target_has_backing &&
                                              convert_fresh_target_is_zero(name, format);
    plan->target_is_zero &= plan->min_sparse != 0;
    return true;
}

/* Can the sources' bitmaps go to the target? */
static bool check_bitmaps(const ConvertPlan *plan, const ConvertArgs *a)
{
    if (!a->bitmaps) {
        return true;
    }
    if (plan->nb_sources > 1) {
        img_error("Copying bitmaps only possible with single source");
        return false;
    }
    return convert_check_bitmaps(plan, a->skip_broken_bitmaps);
}

static bool check_target_bitmaps(const ConvertPlan *plan, const ConvertArgs *a)
{
    if (a->bitmaps && !bdrv_can_store_bitmaps(blk_bs(plan->target))) {
        img_error("Format driver '%s' does not support bitmaps",
                  bdrv_get_format_name(blk_bs(plan->target)));
        return false;
    }
    return true;
}

/* ---- the verb ---- */

bool convert_run(ConvertPlan *plan, bool show)
{
    QbProgress progress;
    bool ok;

    qb_progress_init(&progress, (uint64_t)plan->size);
    plan->progress = &progress;
    img_progress_start(&progress, show);
    ok = convert_copy(plan);
    img_progress_end(ok);
    return ok;
}

static int convert_images(ConvertPlan *plan, const GPtrArray *operands, const ConvertArgs *a)
{
    const char *target = operands->pdata[operands->len - 1];
    int status;

    if (!a->no_create && !(plan->create_options = judge_target(a, target))) {
        return 1;
    }
    if (!open_sources(plan, operands, a) || !check_bitmaps(plan, a) ||
        !prepare_target(plan, target, a) || !check_target_bitmaps(plan, a)) {
        return 1;
    }
    status = convert_run(plan, a->progress && !a->quiet) ? 0 : 1;
    if (status == 0 && a->bitmaps && !convert_copy_bitmaps(plan)) {
        status = 1;
    }
    return img_close(g_steal_pointer(&plan->target), status);
}

void convert_plan_clear(ConvertPlan *plan)
{
    if (plan->target) {
        blk_unref(plan->target);
    }
    for (unsigned i = 0; i < plan->nb_sources; i++) {
        blk_unref(plan->sources[i].blk);
    }
    g_free(plan->sources);
    json_decref(plan->create_options);
}

static const char *last_operand(const GPtrArray *operands)
{
    return operands->len ? operands->pdata[operands->len - 1] : NULL;
}

int img_convert(int argc, char **argv)
{
    g_autoptr(GPtrArray) operands = g_ptr_array_new();
    ConvertArgs args = {0};
    int status;

    if (!img_parse_args(&convert_usage, argc, argv, &args, operands, &status)) {
        return status;
    }
    g_autoptr(GPtrArray) objects = args.objects;
    g_autofree char *options = args.options;
    ConvertPlan plan = {.compress = args.compress, .out_of_order = args.out_of_order,
                        .salvage = args.salvage, .quiet = args.quiet,
                        .target_cached = is_cached(args.target_cache),
                        .copy_offload = args.copy_offload, .rate_limit = args.rate_limit};
    if (img_asks_for_option_help(options)) {
        return img_print_option_help(target_format(&args), last_operand(operands));
    }
    if (operands->len < 2) {
        return img_usage_error("convert", "Must specify image file name");
    }
    if (!img_check_open_args(args.source_format, args.image_opts) ||
        !img_check_cache("", args.target_cache) || !img_check_cache("source ", args.source_cache) ||
        !check_combinations(&args) || !parse_sparse(args.sparse_text, &plan.min_sparse) ||
        !parse_workers(args.parallel_text, &plan.workers) || !img_check_objects(objects)) {
        return 1;
    }
    status = convert_images(&plan, operands, &args);
    convert_plan_clear(&plan);
    return status;
}
