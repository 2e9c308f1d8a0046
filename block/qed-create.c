/*
 * New QED images.
 *
 *     | header cluster: fields, backing name | L1: table_size clusters of zeroes |
 *
 * All that can be wrong is found before a file is touched.  The tables are stable before the header
 * that makes the file an image.
 *
 * Not done: preallocation; the option of that name is the file's.  A backing format other than raw
 * has no place in the format: it is probed whenever the image is opened.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qed.h"

#include <inttypes.h>
#include <string.h>

#include "block/block-backend.h"

const QbOptDesc qed_create_opts[] = {
    {"backing_file", QB_OPT_STRING, "File name of a base image", NULL},
    {"backing_fmt", QB_OPT_STRING, "Image format of the base image", NULL},
    {"cluster_size", QB_OPT_SIZE, "Cluster size (in bytes)", "65536"},
    {"size", QB_OPT_SIZE, "Virtual disk size", NULL},
    {"table_size", QB_OPT_SIZE, "L1/L2 table size (in clusters)", NULL},
    {NULL, 0, NULL, NULL},
};

typedef struct CreateArgs {
    uint64_t size, cluster_size, table_size;
    char *backing_file, *backing_fmt; /* owned */
} CreateArgs;

static void create_args_clear(CreateArgs *a)
{
    g_free(a->backing_file);
    g_free(a->backing_fmt);
}

G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(CreateArgs, create_args_clear)

static bool take(json_t *options, CreateArgs *a, GError **errp)
{
    int64_t rounded;
    a->backing_file = qb_opt_take_string(options, "backing_file");
    a->backing_fmt = qb_opt_take_string(options, "backing_fmt");
    if (!json_object_get(options, "size")) {
        qb_error_set(errp, EINVAL, "Image creation needs a size parameter");
        return false;
    }
    if (!qb_opt_take_size(options, "size", 0, &a->size, errp) ||
        !qb_opt_take_size(options, "cluster_size", QED_DEFAULT_CLUSTER_SIZE, &a->cluster_size,
                          errp) ||
        !qb_opt_take_size(options, "table_size", QED_DEFAULT_TABLE_SIZE, &a->table_size, errp)) {
        return false;
    }
    a->size = qb_align_up_overflow(a->size, BDRV_SECTOR_SIZE, &rounded) ? UINT64_MAX
                                                                        : (uint64_t)rounded;
    return true;
}

static bool validate_sizes(const CreateArgs *a, GError **errp)
{
    if (!qed_cluster_size_valid(a->cluster_size)) {
        qb_error_set(errp, EINVAL, "QED cluster size must be within range [%u, %u] and power of 2",
                     QED_MIN_CLUSTER_SIZE, QED_MAX_CLUSTER_SIZE);
        return false;
    }
    if (!qed_table_size_valid(a->table_size)) {
        qb_error_set(errp, EINVAL, "QED table size must be within range [%u, %u] and power of 2",
                     QED_MIN_TABLE_SIZE, QED_MAX_TABLE_SIZE);
        return false;
    }
    uint64_t max = qed_max_image_size(a->cluster_size, a->table_size);
    if (a->size == 0 || a->size > max) {
        qb_error_set(errp, EINVAL, "QED image size must be a non-zero multiple of cluster size and"
                                   " less than %" PRIu64 " bytes", max);
        return false;
    }
    return true;
}

static bool validate(const CreateArgs *a, GError **errp)
{
    uint64_t room = MIN(QED_MAX_BACKING_NAME, a->cluster_size - QED_HEADER_BYTES);
    if (!validate_sizes(a, errp)) {
        return false;
    }
    if (a->backing_file && strlen(a->backing_file) > room) {
        qb_error_set(errp, EINVAL, "Backing file name too long");
        return false;
    }
    return true;
}

static QedHeader make_header(const CreateArgs *a)
{
    QedHeader h = {
        .cluster_size = (uint32_t)a->cluster_size,
        .table_size = (uint32_t)a->table_size,
        .header_size = 1,
        .l1_offset = a->cluster_size,
        .image_size = a->size,
    };
    if (a->backing_file && *a->backing_file) {
        h.features |= QED_F_BACKING_FILE;
        h.features |= g_strcmp0(a->backing_fmt, "raw") == 0 ? QED_F_BACKING_NO_PROBE : 0;
        h.backing_offset = QED_HEADER_BYTES;
        h.backing_size = (uint32_t)strlen(a->backing_file);
    }
    return h;
}

static int write_image(BlockBackend *blk, const CreateArgs *a)
{
    QedHeader h = make_header(a);
    uint64_t bytes = qb_align_up(QED_HEADER_BYTES + h.backing_size, QED_HEADER_SECTOR);
    g_autofree uint8_t *start = g_malloc0(bytes);
    qed_header_encode(&h, start);
    if (h.backing_size) {
        memcpy(start + QED_HEADER_BYTES, a->backing_file, h.backing_size);
    }
    int64_t l1_bytes = (int64_t)qed_header_table_bytes(&h);
    int ret = blk_pwrite_zeroes(blk, (int64_t)h.l1_offset, l1_bytes, 0);
    ret = ret < 0 ? ret : blk_flush(blk);
    ret = ret < 0 ? ret : blk_pwrite(blk, 0, (int64_t)bytes, start, 0);
    return ret < 0 ? ret : blk_flush(blk);
}

static bool write_file(const char *filename, const CreateArgs *a, GError **errp)
{
    int64_t end = (int64_t)(a->cluster_size * (1 + a->table_size));
    g_autoptr(BlockBackend) blk =
        blk_new_open(filename, NULL, BDRV_O_RDWR | BDRV_O_RESIZE | BDRV_O_PROTOCOL, errp);
    if (!blk || !blk_truncate(blk, end, false, PREALLOC_MODE_OFF, false, errp)) {
        return false;
    }
    int ret = write_image(blk, a);
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Could not write the new image");
    }
    return ret == 0;
}

bool qed_create(const char *filename, json_t *options, QbProgress *progress, GError **errp)
{
    g_auto(CreateArgs) args = {0};
    g_autoptr(json_t) rest = json_deep_copy(options);
    return take(rest, &args, errp) && validate(&args, errp) &&
           bdrv_create_file(filename, rest, errp) && write_file(filename, &args, errp);
}
