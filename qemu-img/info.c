/*
 * qemu-img info.
 *
 * The facts come from the library as JSON (bdrv_image_info); this file prints them, for people in
 * the layout that scripts know too, and follows the backing chain when asked.
 *
 * Invariants
 * 1. Without --backing-chain nothing is opened that the file itself names: a hostile image cannot
 *    make us touch other files.
 * 2. With --image-opts the option string describes the top image only; the rest of the chain is
 *    opened by names.  A chain that comes back to itself is an error, not an endless list.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdio.h>
#include <string.h>
#include "block/info.h"
#include "qemu-img/img.h"
#include "qemu-img/snapshot-list.h"

typedef struct InfoArgs {
    const char *format, *cache, *output, *sandbox;
    bool image_opts, backing_chain, force_share, limits;
    GPtrArray *objects;
} InfoArgs;

static const ImgOption info_options[] = {
    {IMG_STRING, 'f', "format", offsetof(InfoArgs, format), "FMT", "image format (not probed)"},
    {IMG_FLAG, 0, "image-opts", offsetof(InfoArgs, image_opts), NULL, "FILE is an option string"},
    {IMG_FLAG, 0, "backing-chain", offsetof(InfoArgs, backing_chain), NULL,
     "tell about the whole backing chain"},
    {IMG_STRING, 't', "cache", offsetof(InfoArgs, cache), "CACHE", "cache mode [writeback]"},
    {IMG_FLAG, 'U', "force-share", offsetof(InfoArgs, force_share), NULL,
     "open the image while another process writes it"},
    {IMG_FLAG, 0, "limits", offsetof(InfoArgs, limits), NULL, "show the limits of requests"},
    {IMG_STRING, 0, "output", offsetof(InfoArgs, output), "FORMAT", "human or json"},
    IMG_SANDBOX_OPTION(InfoArgs),
    {IMG_LIST, 0, "object", offsetof(InfoArgs, objects), "OBJDEF", "object definition"},
    {IMG_END},
};

static const ImgUsage info_usage = {"info", "FILE", "Tell what an image is.", info_options};

/* ---- for people ---- */

static void print_size(unsigned indent, const char *label, const json_t *bytes, bool exact)
{
    g_autofree char *text = NULL;

    if (!bytes) {
        return;
    }
    text = qb_size_to_text((uint64_t)json_integer_value(bytes));
    printf("%*s%s: %s", (int)indent, "", label, text);
    if (exact) {
        printf(" (%" JSON_INTEGER_FORMAT " bytes)", json_integer_value(bytes));
    }
    printf("\n");
}

static void print_text(unsigned indent, const char *label, const json_t *value)
{
    if (json_is_string(value)) {
        printf("%*s%s: %s\n", (int)indent, "", label, json_string_value(value));
    }
}

static void print_backing(unsigned indent, const json_t *info)
{
    const char *name = json_string_value(json_object_get(info, "backing-filename"));
    const char *full = json_string_value(json_object_get(info, "full-backing-filename"));

    if (!name) {
        return;
    }
    printf("%*sbacking file: %s", (int)indent, "", name);
    if (!full) {
        printf(" (cannot determine actual path)");
    } else if (strcmp(name, full) != 0) {
        printf(" (actual path: %s)", full);
    }
    printf("\n");
    print_text(indent, "backing file format", json_object_get(info, "backing-filename-format"));
}

static void print_limits(unsigned indent, const json_t *limits)
{
    if (limits) {
        printf("%*sBlock limits:\n", (int)indent, "");
        tool_print_facts(limits, indent / 4 + 1);
    }
}

static void print_format_specific(unsigned indent, const json_t *info)
{
    const json_t *data = json_object_get(json_object_get(info, "format-specific"), "data");

    if (json_object_size(data) > 0) {
        printf("%*sFormat specific information:\n", (int)indent, "");
        tool_print_facts(data, indent / 4 + 1);
    }
}

static void print_info(const json_t *info, unsigned indent, const char *path);

static void print_children(const json_t *info, unsigned indent, const char *path)
{
    size_t i;
    json_t *child;

    json_array_foreach(json_object_get(info, "children"), i, child) {
        const char *name = json_string_value(json_object_get(child, "name"));
        g_autofree char *below = g_strdup_printf("%s/%s", path, name);
        printf("%*sChild node '%s':\n", (int)indent, "", below);
        print_info(json_object_get(child, "info"), indent + 4, below);
    }
}

/* @path is "" for the image itself, "/file", ... for the nodes that hold it. */
static void print_info(const json_t *info, unsigned indent, const char *path)
{
    const json_t *cluster_size = json_object_get(info, "cluster-size");
    bool top = *path == '\0';

    print_text(indent, top ? "image" : "filename", json_object_get(info, "filename"));
    print_text(indent, top ? "file format" : "protocol type", json_object_get(info, "format"));
    print_size(indent, top ? "virtual size" : "file length", json_object_get(info, "virtual-size"),
               true);
    print_size(indent, "disk size", json_object_get(info, "actual-size"), false);
    if (json_is_true(json_object_get(info, "encrypted"))) {
        printf("%*sencrypted: yes\n", (int)indent, "");
    }
    if (cluster_size) {
        printf("%*scluster_size: %" JSON_INTEGER_FORMAT "\n", (int)indent, "",
               json_integer_value(cluster_size));
    }
    if (json_is_true(json_object_get(info, "dirty-flag"))) {
        printf("%*scleanly shut down: no\n", (int)indent, "");
    }
    print_backing(indent, info);
    if (json_object_get(info, "snapshots")) {
        img_print_snapshot_facts(json_object_get(info, "snapshots"));
    }
    print_limits(indent, json_object_get(info, "limits"));
    print_format_specific(indent, info);
    print_children(info, indent, path);
}

static void print_chain(const json_t *chain, bool json, bool as_list)
{
    size_t i;
    json_t *info;

    if (json) {
        tool_print_json(as_list ? chain : json_array_get(chain, 0));
        return;
    }
    json_array_foreach((json_t *)chain, i, info) {
        printf("%s", i ? "\n" : "");
        print_info(info, 0, "");
    }
}

/* ---- collecting ---- */

/* Facts of one image; *ret_next: the file that backs it, or NULL. */
static json_t *collect_one(const char *name, const ImgOpen *how, const InfoArgs *args,
                           char **ret_next, char **ret_format)
{
    BlockBackend *blk = img_open(name, how);
    GError *err = NULL;
    json_t *info;

    if (!blk) {
        return NULL;
    }
    info = bdrv_image_info(blk_bs(blk), args->limits, &err);
    if (info) {
        const char *format = bdrv_backing_format(blk_bs(blk));
        *ret_next = g_strdup(
            json_string_value(json_object_get(info, "full-backing-filename")));
        *ret_format = format && *format ? g_strdup(format) : NULL;
    } else {
        img_report(err, 1);
    }
    blk_unref(blk);
    return info;
}

static bool already_seen(GHashTable *seen, const char *name)
{
    if (g_hash_table_add(seen, g_strdup(name))) {
        return false;
    }
    img_error("Backing file '%s' creates an infinite loop.", name);
    return true;
}

static json_t *collect_chain(const char *name, const InfoArgs *args)
{
    g_autoptr(GHashTable) seen = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, NULL);
    g_autoptr(json_t) chain = json_array();
    g_autofree char *file = g_strdup(name), *format = g_strdup(args->format);
    ImgOpen how = {.image_opts = args->image_opts, .cache = args->cache,
                   .force_share = args->force_share,
                   .flags = BDRV_O_NO_BACKING | BDRV_O_NO_IO,
                   .sandbox = args->backing_chain ? NULL : img_sandbox_mode(args->sandbox)};

    while (file) {
        char *next = NULL, *next_format = NULL;
        json_t *info;
        if (already_seen(seen, file)) {
            return NULL;
        }
        how.format = format;
        info = collect_one(file, &how, args, &next, &next_format);
        if (!info) {
            return NULL;
        }
        json_array_append_new(chain, info);
        g_free(file);
        g_free(format);
        file = args->backing_chain ? next : (g_free(next), NULL);
        format = next_format;
        how.image_opts = false;
    }
    return g_steal_pointer(&chain);
}

int img_info(int argc, char **argv)
{
    g_autoptr(GPtrArray) operands = g_ptr_array_new();
    InfoArgs args = {0};
    int status;
    bool json;

    if (!img_parse_args(&info_usage, argc, argv, &args, operands, &status)) {
        return status;
    }
    g_autoptr(GPtrArray) objects = args.objects;
    if (operands->len != 1) {
        return img_usage_error("info", "Expecting one image file name");
    }
    if (!img_parse_output("info", args.output, &json) || !img_check_sandbox("info", args.sandbox) ||
        !img_check_open_args(args.format, args.image_opts) || !img_check_objects(objects)) {
        return 1;
    }
    g_autoptr(json_t) chain = collect_chain(operands->pdata[0], &args);
    if (!chain) {
        return 1;
    }
    print_chain(chain, json, args.backing_chain);
    return 0;
}
