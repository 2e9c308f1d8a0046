/*
 * qemu-img rebase: change the backing file of an image.
 *
 * Safe mode keeps what the guest sees: where the image itself has nothing, old and new backing file
 * are compared, and what differs is copied from the old one into the image.  Unsafe mode (-u) only
 * writes the new name.
 *
 *      image unallocated?  no -> nothing to do
 *        old and new both zero  -> nothing to do
 *        else read both, compare by unit, write what differs (zeroes as zeroes)
 *
 * A unit is what the image maps as one: a cluster, or with extended L2 entries a subcluster.
 *
 * Invariants
 * 1. Whole units are written, so that no write needs to copy the rest of one; and only units that
 *    the image itself does not have.
 * 2. The copied data is stable before the header names the new backing file; a rebase that stops
 *    earlier changed nothing the guest sees, and can be run again.
 * 3. Beyond the end of a backing file there are zeroes.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "block/driver.h"
#include "qemu-img/img.h"
#include "util/checked.h"

typedef struct RebaseArgs {
    const char *format, *cache, *source_cache, *backing, *backing_format;
    bool image_opts, unsafe, compress, force_share, progress, quiet;
    GPtrArray *objects;
} RebaseArgs;

#define FIELD(name) offsetof(RebaseArgs, name)
static const ImgOption rebase_options[] = {
    {IMG_STRING, 'f', "format", FIELD(format), "FMT", "image format (not probed)"},
    {IMG_FLAG, 0, "image-opts", FIELD(image_opts), NULL, "FILE is an option string"},
    {IMG_STRING, 't', "cache", FIELD(cache), "CACHE", "cache mode of FILE [writeback]"},
    {IMG_STRING, 'b', "backing", FIELD(backing), "FILE", "new backing file, empty for none"},
    {IMG_STRING, 'F', "backing-format", FIELD(backing_format), "FMT", "its format"},
    {IMG_STRING, 'B', NULL, FIELD(backing_format), "FMT", "the same as -F"},
    {IMG_STRING, 'T', "backing-cache", FIELD(source_cache), "CACHE",
     "cache mode of the backing files [writeback]"},
    {IMG_FLAG, 'u', "backing-unsafe", FIELD(unsafe), NULL, "change the name only"},
    {IMG_FLAG, 'c', "compress", FIELD(compress), NULL, "compress what is copied"},
    {IMG_FLAG, 'U', "force-share", FIELD(force_share), NULL,
     "open backing files while another process writes them"},
    {IMG_FLAG, 'p', "progress", FIELD(progress), NULL, "show progress"},
    {IMG_FLAG, 'q', "quiet", FIELD(quiet), NULL, "print errors only"},
    {IMG_LIST, 0, "object", FIELD(objects), "OBJDEF", "object definition"},
    {IMG_END},
};

static const ImgUsage rebase_usage = {"rebase", "FILE", "Change the backing file of an image.",
                                      rebase_options};

#define REBASE_CHUNK (4 * 1024 * 1024)

typedef struct Side {
    BlockBackend *blk; /* NULL: no backing file, all zeroes */
    int64_t size;
    uint8_t *buf;
    const char *what;
} Side;

typedef struct Rebase {
    BlockBackend *image;
    Side side[2]; /* old, new */
    int64_t size, unit, cluster;
    bool compress;
    QbProgress *progress;
} Rebase;

static bool say_io_error(const Rebase *r, int ret, const char *doing, int64_t offset)
{
    if (ret < 0) {
        img_error("%s '%s' at offset %" PRId64 ": %s", doing, bdrv_filename(blk_bs(r->image)),
                  offset, g_strerror(-ret));
    }
    return ret >= 0;
}

/* ---- looking ---- */

/* Is the stretch known to be zero on this side? Shortens *bytes to where the answer holds. */
static int side_is_zero(const Side *s, int64_t offset, int64_t *bytes)
{
    BdrvStatus st = {0};
    int ret;

    if (!s->blk || offset >= s->size) {
        return 1;
    }
    ret = bdrv_block_status_above(blk_bs(s->blk), NULL, offset, MIN(*bytes, s->size - offset), &st);
    if (ret < 0) {
        return ret;
    }
    *bytes = st.bytes;
    return !!(st.flags & BDRV_BLOCK_ZERO);
}

/* What is to be done for a stretch. */
typedef enum Need {
    NEED_NOTHING, /* the image has it */
    NEED_ZEROES,  /* neither backing file has anything but zeroes */
    NEED_COMPARE, /* by content */
} Need;

/* A Need, and in *bytes how far it goes; or -errno. */
static int find_need(Rebase *r, int64_t offset, int64_t *bytes)
{
    BDRV_GRAPH_GUARD();
    int zero[2];
    int64_t n = *bytes;
    int ret = bdrv_is_allocated_above(blk_bs(r->image),
                                      bdrv_backing_chain_next(blk_bs(r->image)), false, offset,
                                      *bytes, &n);

    if (ret != 0) {
        *bytes = n;
        return ret < 0 ? ret : NEED_NOTHING;
    }
    for (int i = 0; i < 2; i++) {
        zero[i] = side_is_zero(&r->side[i], offset, &n);
        if (zero[i] < 0) {
            return zero[i];
        }
    }
    *bytes = n;
    return zero[0] && zero[1] ? NEED_ZEROES : NEED_COMPARE;
}

static int read_side(const Side *s, int64_t offset, int64_t bytes)
{
    int64_t n = s->blk ? CLAMP(s->size - offset, 0, bytes) : 0;

    memset(s->buf + n, 0, (size_t)(bytes - n));
    return n ? blk_pread(s->blk, offset, n, s->buf, 0) : 0;
}

/* ---- copying ---- */

static bool unit_differs(const Rebase *r, int64_t pos, int64_t bytes)
{
    return memcmp(r->side[0].buf + pos, r->side[1].buf + pos,
                  (size_t)MIN(r->unit, bytes - pos)) != 0;
}

/* Only whole clusters can be compressed; those that the image has a part of stay as they are. */
static bool can_compress(const Rebase *r, int64_t offset, int64_t bytes)
{
    return r->compress && offset % r->cluster == 0 &&
           (bytes % r->cluster == 0 || offset + bytes == r->size);
}

static int write_run(Rebase *r, int64_t offset, const uint8_t *buf, int64_t bytes)
{
    if (qb_buffer_is_zero(buf, (size_t)bytes)) {
        return blk_pwrite_zeroes(r->image, offset, bytes, 0);
    }
    return blk_pwrite(r->image, offset, bytes, buf,
                      can_compress(r, offset, bytes) ? BDRV_REQ_COMPRESSED : 0);
}

static bool copy_differences(Rebase *r, int64_t offset, int64_t bytes)
{
    for (int64_t pos = 0; pos < bytes;) {
        int64_t start = pos;
        if (!unit_differs(r, pos, bytes)) {
            pos += r->unit;
            continue;
        }
        while (pos < bytes && unit_differs(r, pos, bytes)) {
            pos += r->unit;
        }
        pos = MIN(pos, bytes);
        int ret = write_run(r, offset + start, r->side[0].buf + start, pos - start);
        if (!say_io_error(r, ret, "error while writing to", offset + start)) {
            return false;
        }
    }
    return true;
}

/* Compares the stretch and copies what differs. */
static bool rebase_stretch(Rebase *r, int64_t offset, int64_t bytes)
{
    for (int i = 0; i < 2; i++) {
        const Side *s = &r->side[i];
        int ret = read_side(s, offset, bytes);
        if (ret < 0) {
            img_error("error while reading from %s backing file '%s' at offset %" PRId64 ": %s",
                      s->what, bdrv_filename(blk_bs(s->blk)), offset, g_strerror(-ret));
            return false;
        }
    }
    return copy_differences(r, offset, bytes);
}

/* What is zero on both sides ends anywhere; the unit in which it ends is compared. */
static int round_to_units(const Rebase *r, int need, int64_t offset, int64_t *bytes)
{
    uint64_t unit = (uint64_t)r->unit;
    bool to_end = offset + *bytes == r->size;

    if (need == NEED_ZEROES && !to_end) {
        *bytes = (int64_t)qb_align_down((uint64_t)*bytes, unit);
        need = *bytes ? need : NEED_COMPARE;
    }
    if (need == NEED_COMPARE) {
        *bytes = (int64_t)qb_align_up((uint64_t)CLAMP(*bytes, 1, REBASE_CHUNK), unit);
    }
    *bytes = MIN(*bytes, r->size - offset);
    return need;
}

/* The next stretch. What the image has itself ends with a unit, or with the image. */
static bool rebase_step(Rebase *r, int64_t offset, int64_t *ret_bytes)
{
    int64_t bytes = r->size - offset;
    int need = find_need(r, offset, &bytes);

    if (!say_io_error(r, MIN(need, 0), "error while reading the metadata of", offset)) {
        return false;
    }
    need = round_to_units(r, need, offset, &bytes);
    *ret_bytes = bytes;
    return need != NEED_COMPARE || rebase_stretch(r, offset, bytes);
}

static bool rebase_content(Rebase *r)
{
    int64_t bytes;

    for (int64_t offset = 0; offset < r->size; offset += bytes) {
        if (img_interrupted()) {
            img_error("Interrupted at offset %" PRId64 " of %" PRId64
                      "; the backing file was not changed", offset, r->size);
            return false;
        }
        if (!rebase_step(r, offset, &bytes)) {
            return false;
        }
        qb_progress_add(r->progress, (uint64_t)bytes);
    }
    return say_io_error(r, blk_flush(r->image), "error while flushing", r->size);
}

/* ---- opening ---- */

static bool prepare_side(Rebase *r, int which, BlockBackend *blk, const char *what)
{
    Side *s = &r->side[which];

    s->blk = blk;
    s->what = what;
    s->size = blk ? blk_getlength(blk) : 0;
    s->buf = bdrv_try_blockalign(blk_bs(r->image), REBASE_CHUNK + (size_t)r->cluster);
    if (s->size < 0 || !s->buf) {
        img_error("Could not use the %s backing file: %s", what,
                  g_strerror(s->size < 0 ? (int)-s->size : ENOMEM));
        return false;
    }
    return true;
}

static bool prepare_image(Rebase *r)
{
    BlockDriverInfo info = {0};

    r->size = blk_getlength(r->image);
    if (r->size < 0) {
        img_error("Could not get size of the image: %s", g_strerror((int)-r->size));
        return false;
    }
    bdrv_get_info(blk_bs(r->image), &info, NULL);
    r->cluster = MAX(info.cluster_size, 512);
    r->unit = MAX(info.subcluster_size, 512);
    qb_progress_grow(r->progress, (uint64_t)r->size);
    return true;
}

static BlockDriverState *backing_of(BlockDriverState *bs)
{
    BDRV_GRAPH_GUARD();

    return bdrv_backing_chain_next(bs);
}

/* The old backing file as a reader of its own; *ret stays NULL when there is none. */
static bool open_old(Rebase *r, BlockBackend **ret)
{
    BlockDriverState *old = backing_of(blk_bs(r->image));
    GError *err = NULL;

    *ret = NULL;
    if (!old) {
        return true;
    }
    *ret = blk_new_with_bs(old, BLK_PERM_CONSISTENT_READ, BLK_PERM_ALL, &err);
    if (!*ret) {
        img_report_prefixed(err, 1, "Could not use the old backing file: ");
    }
    return *ret != NULL;
}

static bool open_new(Rebase *r, const RebaseArgs *args, BlockBackend **ret)
{
    GError *err = NULL;
    g_autofree char *path = NULL;
    ImgOpen how = {.format = args->backing_format, .cache = args->source_cache,
                   .force_share = args->force_share};

    *ret = NULL;
    if (!args->backing || !*args->backing) {
        return true;
    }
    g_autofree char *what = g_strdup_printf("new backing file '%s'", args->backing);
    how.what = what;
    path = bdrv_resolve_backing_name(blk_bs(r->image), args->backing, &err);
    if (!path) {
        img_report_prefixed(err, 1, "Could not resolve backing filename: ");
        return false;
    }
    *ret = img_open(path, &how);
    return *ret != NULL;
}

static bool rebase_safely(BlockBackend *image, const RebaseArgs *args)
{
    g_autoptr(BlockBackend) old = NULL;
    g_autoptr(BlockBackend) new = NULL;
    QbProgress progress;
    Rebase r = {.image = image, .progress = &progress, .compress = args->compress};
    bool ok;

    qb_progress_init(&progress, 0);
    if (!prepare_image(&r) || !open_old(&r, &old) || !open_new(&r, args, &new)) {
        return false;
    }
    img_progress_start(&progress, args->progress && !args->quiet);
    ok = prepare_side(&r, 0, old, "old") && prepare_side(&r, 1, new, "new") && rebase_content(&r);
    img_progress_end(ok);
    free(r.side[0].buf);
    free(r.side[1].buf);
    return ok;
}

static bool change_name(BlockBackend *image, const RebaseArgs *args)
{
    GError *err = NULL;
    const char *name = args->backing && *args->backing ? args->backing : NULL;

    if (name && !args->backing_format) {
        img_error("Could not change the backing file to '%s': backing format must be specified",
                  name);
        return false;
    }
    if (bdrv_change_backing_file(blk_bs(image), name, name ? args->backing_format : NULL, &err)) {
        return true;
    }
    if (qb_error_to_errno(err) == -ENOSPC) {
        g_clear_error(&err);
        img_error("Could not change the backing file to '%s': No space left in the file header",
                  args->backing);
        return false;
    }
    img_report_prefixed(err, 1, "Could not change the backing file to '%s': ", args->backing);
    return false;
}

static int rebase_image(const char *file, const RebaseArgs *args)
{
    bool backed = args->backing && *args->backing;
    /* What the new backing file must not show is written as zeroes, even where nothing is below. */
    ImgOpen how = {.format = args->format, .image_opts = args->image_opts, .cache = args->cache,
                   .flags = BDRV_O_RDWR | BDRV_O_RESIZE |
                            (args->unsafe ? BDRV_O_NO_BACKING | BDRV_O_NO_IO : 0) |
                            (backed ? BDRV_O_BACKING_LATER : 0)};
    BlockBackend *image;
    bool ok;

    if (args->backing_format && !bdrv_find_format(args->backing_format)) {
        img_error("Invalid format name: '%s'", args->backing_format);
        return 1;
    }
    image = img_open(file, &how);
    if (!image) {
        return 1;
    }
    ok = (args->unsafe || rebase_safely(image, args)) && change_name(image, args);
    return img_close(image, ok ? 0 : 1);
}

int img_rebase(int argc, char **argv)
{
    g_autoptr(GPtrArray) operands = g_ptr_array_new();
    RebaseArgs args = {0};
    int status;

    if (!img_parse_args(&rebase_usage, argc, argv, &args, operands, &status)) {
        return status;
    }
    g_autoptr(GPtrArray) objects = args.objects;
    if (operands->len != 1) {
        return img_usage_error("rebase", "Expecting one image file name");
    }
    if (!args.unsafe && !args.backing) {
        return img_usage_error("rebase",
                               "Must specify backing file (-b) or use unsafe mode (-u)");
    }
    if (!img_check_open_args(args.format, args.image_opts) ||
        !img_check_cache("", args.cache) || !img_check_cache("source ", args.source_cache) ||
        !img_check_objects(objects)) {
        return 1;
    }
    return rebase_image(operands->pdata[0], &args);
}
