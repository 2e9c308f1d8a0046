/*
 * qemu-img map: where an image's content lies, in the image or its backing chain.
 *
 *      block status in steps  ->  merge with the row before  ->  print the row
 *
 * Invariants
 * 1. Rows are contiguous, neither empty nor overlapping, and two neighbours differ in more than
 *    their place.
 * 2. Human output shows only what can be read from a file at an offset; data that lies compressed,
 *    encrypted or in an external file cannot be shown that way and is an error.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdio.h>
#include <string.h>
#include "block/locks.h"
#include "qemu-img/img.h"

typedef struct MapArgs {
    const char *format, *output, *sandbox;
    bool image_opts, force_share, untrusted;
    uint64_t start, length;
    GPtrArray *objects;
} MapArgs;

static const ImgOption map_options[] = {
    {IMG_STRING, 'f', "format", offsetof(MapArgs, format), "FMT", "image format (not probed)"},
    {IMG_FLAG, 0, "image-opts", offsetof(MapArgs, image_opts), NULL, "FILE is an option string"},
    {IMG_SIZE, 's', "start-offset", offsetof(MapArgs, start), "OFFSET", "where to begin"},
    {IMG_SIZE, 'l', "max-length", offsetof(MapArgs, length), "LENGTH", "how much to show"},
    {IMG_STRING, 0, "output", offsetof(MapArgs, output), "FORMAT", "human or json"},
    {IMG_FLAG, 'U', "force-share", offsetof(MapArgs, force_share), NULL,
     "open the image while another process writes it"},
    IMG_SANDBOX_OPTION(MapArgs),
    IMG_UNTRUSTED_OPTION(MapArgs),
    {IMG_LIST, 0, "object", offsetof(MapArgs, objects), "OBJDEF", "object definition"},
    {IMG_END},
};

static const ImgUsage map_usage = {"map", "FILE", "Tell where an image's content lies.",
                                   map_options};

typedef struct MapRow {
    int64_t start, length;
    int depth;
    bool present, zero, data, compressed, has_offset;
    int64_t offset;
    char *file; /* owned; NULL: none */
} MapRow;

static void clear_row(MapRow *row)
{
    g_clear_pointer(&row->file, g_free);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(MapRow, clear_row)

/* ---- output ---- */

static const char *truth(bool b)
{
    return b ? "true" : "false";
}

static void print_json_row(const MapRow *row, bool first)
{
    printf("%s{ \"start\": %" PRId64 ", \"length\": %" PRId64 ", \"depth\": %d, \"present\": %s, "
           "\"zero\": %s, \"data\": %s, \"compressed\": %s",
           first ? "[" : ",\n", row->start, row->length, row->depth, truth(row->present),
           truth(row->zero), truth(row->data), truth(row->compressed));
    if (row->has_offset) {
        printf(", \"offset\": %" PRId64, row->offset);
    }
    printf("}");
}

static bool print_human_row(const MapRow *row)
{
    if (row->data && !row->zero) {
        if (!row->has_offset) {
            img_error("File contains external, encrypted or compressed clusters.");
            return false;
        }
        printf("%#-16" PRIx64 "%#-16" PRIx64 "%#-16" PRIx64 "%s\n", row->start, row->length,
               row->offset, row->file ? row->file : "");
    }
    return true;
}

/* ---- collecting ---- */

static bool continues(const MapRow *row, const MapRow *next)
{
    return row->length > 0 && row->depth == next->depth && row->present == next->present &&
           row->zero == next->zero && row->data == next->data &&
           row->compressed == next->compressed && row->has_offset == next->has_offset &&
           (!row->has_offset || row->offset + row->length == next->offset) &&
           !g_strcmp0(row->file, next->file);
}

/*
 * The first layer that knows something of the extent.  Layer by layer, not through the chain in one
 * call: zeroes that come from the layer below being too short, or not there, are "not present" to
 * readers of a map.
 */
static int first_answer(BlockDriverState *bs, int64_t offset, int64_t bytes, BdrvStatus *st)
{
    for (int depth = 0; bs; depth++) {
        int ret = bdrv_block_status_step(bs, offset, bytes, st);
        st->depth = depth;
        if (ret < 0 || st->bytes == 0 || (st->flags & (BDRV_BLOCK_DATA | BDRV_BLOCK_ZERO))) {
            return ret;
        }
        bytes = st->bytes;
        bs = bdrv_backing_chain_next(bs);
    }
    return 0;
}

/* The row at @offset. */
static int query_row(BlockDriverState *bs, int64_t offset, int64_t bytes, MapRow *row)
{
    BDRV_GRAPH_GUARD();
    BdrvStatus st = {0};
    int ret = first_answer(bs, offset, bytes, &st);

    if (ret < 0) {
        return ret;
    }
    *row = (MapRow){
        .start = offset,
        .length = st.bytes,
        .depth = st.depth,
        .present = st.flags & BDRV_BLOCK_ALLOCATED,
        .zero = st.flags & BDRV_BLOCK_ZERO,
        .data = st.flags & BDRV_BLOCK_DATA,
        .compressed = st.flags & BDRV_BLOCK_COMPRESSED,
        .has_offset = st.flags & BDRV_BLOCK_OFFSET_VALID,
        .offset = st.host_offset,
    };
    if (row->has_offset && st.host_node) {
        row->file = g_strdup(bdrv_filename(st.host_node));
    }
    return 0;
}

typedef struct MapOutput {
    bool json, first;
} MapOutput;

static bool emit_row(MapOutput *out, const MapRow *row)
{
    if (row->length == 0) {
        return true;
    }
    if (!out->json) {
        return print_human_row(row);
    }
    print_json_row(row, out->first);
    out->first = false;
    return true;
}

static int map_range(BlockDriverState *bs, int64_t start, int64_t end, MapOutput *out)
{
    g_auto(MapRow) row = {0};

    while (start < end) {
        MapRow next;
        if (img_interrupted()) {
            img_error("Interrupted at offset %" PRId64, start);
            return 1;
        }
        int ret = query_row(bs, start, end - start, &next);
        if (ret < 0) {
            img_error("Failed to read image metadata: %s", g_strerror(-ret));
            return 1;
        }
        start += next.length;
        if (continues(&row, &next)) {
            row.length += next.length;
            clear_row(&next);
            continue;
        }
        if (!emit_row(out, &row)) {
            clear_row(&next);
            return 1;
        }
        clear_row(&row);
        row = next;
    }
    return emit_row(out, &row) ? 0 : 1;
}

static int map_blk(BlockBackend *blk, const MapArgs *args, bool json)
{
    MapOutput out = {.json = json, .first = true};
    int64_t size = blk_getlength(blk), start, end;
    QbProgress progress; /* nobody looks at it, but it has the signals */
    int status;

    if (size < 0) {
        img_error("Failed to get size for '%s'", bdrv_filename(blk_bs(blk)));
        return 1;
    }
    start = (int64_t)MIN(args->start, (uint64_t)size);
    end = (int64_t)args->length < size - start ? start + (int64_t)args->length : size;
    if (!json) {
        printf("%-16s%-16s%-16s%s\n", "Offset", "Length", "Mapped to", "File");
    }
    qb_progress_init(&progress, 0);
    img_progress_start(&progress, false);
    status = map_range(blk_bs(blk), start, end, &out);
    img_progress_end(status == 0);
    if (json && status == 0) {
        printf("%s]\n", out.first ? "[" : "");
    }
    return status;
}

int img_map(int argc, char **argv)
{
    g_autoptr(GPtrArray) operands = g_ptr_array_new();
    MapArgs args = {.length = INT64_MAX};
    int status;
    bool json;

    if (!img_parse_args(&map_usage, argc, argv, &args, operands, &status)) {
        return status;
    }
    g_autoptr(GPtrArray) objects = args.objects;
    if (operands->len != 1) {
        return img_usage_error("map", "Expecting one image file name");
    }
    if (!img_parse_output("map", args.output, &json) || !img_check_sandbox("map", args.sandbox) ||
        !img_check_open_args(args.format, args.image_opts) || !img_check_objects(objects)) {
        return 1;
    }
    ImgOpen how = {.format = args.format, .image_opts = args.image_opts,
                   .force_share = args.force_share, .untrusted = args.untrusted,
                   .sandbox = img_sandbox_mode(args.sandbox)};
    g_autoptr(BlockBackend) blk = img_open(operands->pdata[0], &how);
    return blk ? map_blk(blk, &args, json) : 1;
}
