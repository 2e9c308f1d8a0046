/*
 * qemu-img check: consistency of an image, and repair.
 *
 * The library gives findings as records; each is a line on stderr.  Counts go to stdout for people
 * or as JSON, which lists the findings too.
 *
 *      check [repair] --fixed something?--> say what, check again without repair --> counts
 *
 * Invariants
 * 1. Exit status: 0 clean, 1 the check could not be done, 2 corruption, 3 leaks only, 63 the format
 *    has no check.  It speaks of the image as the last pass found it.
 * 2. Nothing that the image names is opened: no backing file, no data file.
 * 3. Without -r the image is opened read-only.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdio.h>
#include <string.h>
#include "qemu-img/img.h"

typedef struct CheckArgs {
    const char *format, *cache, *repair, *output, *sandbox;
    bool image_opts, force_share, quiet, progress;
    GPtrArray *objects;
} CheckArgs;

static const ImgOption check_options[] = {
    {IMG_STRING, 'f', "format", offsetof(CheckArgs, format), "FMT", "image format (not probed)"},
    {IMG_FLAG, 0, "image-opts", offsetof(CheckArgs, image_opts), NULL, "FILE is an option string"},
    {IMG_STRING, 'T', "cache", offsetof(CheckArgs, cache), "CACHE", "cache mode [writeback]"},
    {IMG_STRING, 'r', "repair", offsetof(CheckArgs, repair), "leaks|all", "what to repair"},
    {IMG_FLAG, 'U', "force-share", offsetof(CheckArgs, force_share), NULL,
     "open the image while another process writes it"},
    {IMG_STRING, 0, "output", offsetof(CheckArgs, output), "FORMAT", "human or json"},
    {IMG_FLAG, 'q', "quiet", offsetof(CheckArgs, quiet), NULL, "print errors only"},
    {IMG_FLAG, 'p', "progress", offsetof(CheckArgs, progress), NULL, "show progress"},
    IMG_SANDBOX_OPTION(CheckArgs),
    {IMG_LIST, 0, "object", offsetof(CheckArgs, objects), "OBJDEF", "object definition"},
    {IMG_END},
};

static const ImgUsage check_usage = {"check", "FILE", "Check an image for consistency.",
                                     check_options};

enum {
    CHECK_OK = 0,
    CHECK_FAILED = 1,
    CHECK_CORRUPT = 2,
    CHECK_LEAKS = 3,
    CHECK_UNSUPPORTED = 63,
};

static const char *const class_names[] = {
    [BDRV_FINDING_LEAK] = "leak",
    [BDRV_FINDING_CORRUPTION] = "corruption",
    [BDRV_FINDING_CHECK_ERROR] = "check-error",
    [BDRV_FINDING_INFO] = "info",
};

/* What a check has found, for JSON. A damaged image of some MiB can have millions of findings: each
 * is said, but no more than MAX_FINDINGS are kept. */
#define MAX_FINDINGS 65536

typedef struct Findings {
    json_t *list; /* NULL: none is wanted */
    uint64_t omitted;
} Findings;

static void keep_finding(Findings *f, const BdrvCheckFinding *finding)
{
    json_t *item;

    if (json_array_size(f->list) >= MAX_FINDINGS) {
        f->omitted++;
        return;
    }
    item = json_object();
    json_object_set_new(item, "class", json_string(class_names[finding->kind]));
    json_object_set_new(item, "code", json_string(finding->code));
    if (finding->offset != UINT64_MAX) {
        json_object_set_new(item, "offset", json_integer((json_int_t)finding->offset));
    }
    json_object_set_new(item, "fixed", json_boolean(finding->fixed));
    json_object_set_new(item, "text", json_string(finding->text));
    json_array_append_new(f->list, item);
}

/* @opaque: Findings */
static void on_finding(const BdrvCheckFinding *finding, void *opaque)
{
    Findings *f = opaque;

    fflush(stdout);
    fprintf(stderr, "%s\n", finding->text);
    if (f->list) {
        keep_finding(f, finding);
    }
}

/* ---- output ---- */

static void set_count(json_t *obj, const char *key, uint64_t value)
{
    if (value) {
        json_object_set_new(obj, key, json_integer((json_int_t)value));
    }
}

static void print_json_result(const BdrvCheckResult *r, const char *file, const char *format,
                              const Findings *findings)
{
    g_autoptr(json_t) obj = json_object();

    set_count(obj, "image-end-offset", (uint64_t)r->image_end_offset);
    set_count(obj, "compressed-clusters", r->compressed_clusters);
    set_count(obj, "total-clusters", r->total_clusters);
    set_count(obj, "corruptions", r->corruptions);
    set_count(obj, "corruptions-fixed", r->corruptions_fixed);
    json_object_set_new(obj, "check-errors", json_integer((json_int_t)r->check_errors));
    set_count(obj, "leaks", r->leaks);
    set_count(obj, "leaks-fixed", r->leaks_fixed);
    set_count(obj, "allocated-clusters", r->allocated_clusters);
    json_object_set_new(obj, "filename", json_string(file));
    json_object_set_new(obj, "format", json_string(format));
    set_count(obj, "fragmented-clusters", r->fragmented_clusters);
    if (json_array_size(findings->list) > 0) {
        json_object_set(obj, "findings", findings->list);
    }
    set_count(obj, "findings-omitted", findings->omitted);
    tool_print_json(obj);
}

static void print_counts(const BdrvCheckResult *r)
{
    if (!r->corruptions && !r->leaks && !r->check_errors) {
        printf("No errors were found on the image.\n");
        return;
    }
    if (r->corruptions) {
        printf("\n%" PRIu64 " errors were found on the image.\n"
               "Data may be corrupted, or further writes to the image may corrupt it.\n",
               r->corruptions);
    }
    if (r->leaks) {
        printf("\n%" PRIu64 " leaked clusters were found on the image.\n"
               "This means waste of disk space, but no harm to data.\n", r->leaks);
    }
    if (r->check_errors) {
        printf("\n%" PRIu64 " internal errors have occurred during the check.\n", r->check_errors);
    }
}

static double percent(uint64_t part, uint64_t whole)
{
    return whole ? 100.0 * (double)part / (double)whole : 0.0;
}

static void print_human_result(const BdrvCheckResult *r)
{
    print_counts(r);
    if (r->total_clusters && r->allocated_clusters) {
        printf("%" PRIu64 "/%" PRIu64 " = %.2f%% allocated, %.2f%% fragmented, "
               "%.2f%% compressed clusters\n",
               r->allocated_clusters, r->total_clusters,
               percent(r->allocated_clusters, r->total_clusters),
               percent(r->fragmented_clusters, r->allocated_clusters),
               percent(r->compressed_clusters, r->allocated_clusters));
    }
    if (r->image_end_offset > 0) {
        printf("Image end offset: %" PRId64 "\n", r->image_end_offset);
    }
}

static void print_repaired(const BdrvCheckResult *r)
{
    printf("The following inconsistencies were found and repaired:\n\n"
           "    %" PRIu64 " leaked clusters\n    %" PRIu64 " corruptions\n\n"
           "Double checking the fixed image now...\n", r->leaks_fixed, r->corruptions_fixed);
    fflush(stdout);
}

/* ---- checking ---- */

static int check_status(const BdrvCheckResult *r)
{
    if (r->check_errors) {
        return CHECK_FAILED;
    }
    return r->corruptions ? CHECK_CORRUPT : r->leaks ? CHECK_LEAKS : CHECK_OK;
}

typedef struct CheckRun {
    BlockDriverState *bs;
    BdrvCheckOptions opts;
    bool say, show_progress;
} CheckRun;

/* A pass, with progress on a line of its own. */
static bool check_once(CheckRun *run, BdrvCheckResult *r, GError **errp)
{
    QbProgress progress;
    bool ok;

    qb_progress_init(&progress, 0);
    run->opts.progress = &progress;
    img_progress_start(&progress, run->show_progress);
    ok = bdrv_check(run->bs, &run->opts, r, errp);
    img_progress_end(ok);
    return ok;
}

/* A repaired image gets a second pass, whose counts replace the first's. */
static bool run_check(CheckRun *run, BdrvCheckResult *r, GError **errp)
{
    uint64_t leaks_fixed, corruptions_fixed;

    if (!check_once(run, r, errp)) {
        return false;
    }
    leaks_fixed = r->leaks_fixed;
    corruptions_fixed = r->corruptions_fixed;
    if (!leaks_fixed && !corruptions_fixed) {
        return true;
    }
    if (run->say) {
        print_repaired(r);
    }
    run->opts.fix = 0;
    *r = (BdrvCheckResult){0};
    if (!check_once(run, r, errp)) {
        return false;
    }
    r->leaks_fixed = leaks_fixed;
    r->corruptions_fixed = corruptions_fixed;
    return true;
}

static int check_failed(GError *err, bool quiet)
{
    if (qb_error_to_errno(err) == -ENOTSUP) {
        if (!quiet) {
            img_error("This image format does not support checks");
        }
        g_clear_error(&err);
        return CHECK_UNSUPPORTED;
    }
    return img_report_prefixed(err, CHECK_FAILED, "Check failed: ");
}

static int check_blk(BlockBackend *blk, const char *file, const CheckArgs *args, unsigned fix,
                     bool json)
{
    g_autoptr(json_t) list = json ? json_array() : NULL;
    Findings findings = {.list = list};
    bool for_people = !json && !args->quiet;
    CheckRun check = {.bs = blk_bs(blk), .say = for_people,
                      .opts = {.fix = fix, .finding = on_finding, .opaque = &findings},
                      .show_progress = args->progress && for_people};
    BdrvCheckResult result = {0};
    GError *err = NULL;

    if (!run_check(&check, &result, &err)) {
        return check_failed(err, args->quiet);
    }
    if (args->quiet) {
        return check_status(&result);
    }
    if (json) {
        print_json_result(&result, file, bdrv_get_format_name(blk_bs(blk)), &findings);
    } else {
        print_human_result(&result);
    }
    return check_status(&result);
}

static bool parse_repair(const char *what, unsigned *ret_fix)
{
    *ret_fix = 0;
    if (!what) {
        return true;
    }
    if (!strcmp(what, "leaks")) {
        *ret_fix = BDRV_FIX_LEAKS;
    } else if (!strcmp(what, "all")) {
        *ret_fix = BDRV_FIX_LEAKS | BDRV_FIX_ERRORS;
    } else {
        img_usage_error("check", "--repair (-r) expects 'leaks' or 'all', not '%s'", what);
        return false;
    }
    return true;
}

static int open_and_check(const char *file, const CheckArgs *args, unsigned fix, bool json)
{
    ImgOpen how = {.format = args->format, .image_opts = args->image_opts, .cache = args->cache,
                   .force_share = args->force_share,
                   .sandbox = img_sandbox_mode(args->sandbox),
                   .flags = BDRV_O_CHECK | BDRV_O_NO_BACKING | BDRV_O_NO_IO};
    BlockBackend *blk;
    int status;

    if (fix) {
        how.flags |= BDRV_O_RDWR | BDRV_O_RESIZE;
    }
    blk = img_open(file, &how);
    if (!blk) {
        return CHECK_FAILED;
    }
    status = check_blk(blk, file, args, fix, json);
    return img_close(blk, status);
}

int img_check(int argc, char **argv)
{
    g_autoptr(GPtrArray) operands = g_ptr_array_new();
    CheckArgs args = {0};
    int status;
    unsigned fix;
    bool json;

    if (!img_parse_args(&check_usage, argc, argv, &args, operands, &status)) {
        return status;
    }
    g_autoptr(GPtrArray) objects = args.objects;
    if (!img_check_cache("source ", args.cache) || !parse_repair(args.repair, &fix) ||
        !img_parse_output("check", args.output, &json)) {
        return CHECK_FAILED;
    }
    if (operands->len != 1) {
        return img_usage_error("check", "Expecting one image file name");
    }
    if (!img_check_sandbox("check", args.sandbox) ||
        !img_check_open_args(args.format, args.image_opts) ||
        !img_check_objects(objects)) {
        return CHECK_FAILED;
    }
    return open_and_check(operands->pdata[0], &args, fix, json);
}
