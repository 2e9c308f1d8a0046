/*
 * qemu-img snapshot: list, create, apply, delete internal snapshots.
 *
 *      action table: letter -> {opens writable?, function}
 *
 * -a looks an ID up first, then a name; -d takes names only, the first hit, as users know it.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdio.h>
#include <string.h>
#include "qemu-img/img.h"
#include "qemu-img/snapshot-list.h"

typedef struct SnapshotArgs {
    const char *format, *apply, *create, *delete;
    bool list, image_opts, force_share, quiet;
    GPtrArray *objects;
} SnapshotArgs;

static const ImgOption snapshot_options[] = {
    {IMG_STRING, 'f', "format", offsetof(SnapshotArgs, format), "FMT", "image format (not probed)"},
    {IMG_FLAG, 0, "image-opts", offsetof(SnapshotArgs, image_opts), NULL,
     "FILE is an option string"},
    {IMG_FLAG, 'l', "list", offsetof(SnapshotArgs, list), NULL, "list snapshots [default]"},
    {IMG_STRING, 'a', "apply", offsetof(SnapshotArgs, apply), "SNAPSHOT",
     "revert the disk to a snapshot"},
    {IMG_STRING, 'c', "create", offsetof(SnapshotArgs, create), "SNAPSHOT", "create a snapshot"},
    {IMG_STRING, 'd', "delete", offsetof(SnapshotArgs, delete), "SNAPSHOT", "delete a snapshot"},
    {IMG_FLAG, 'U', "force-share", offsetof(SnapshotArgs, force_share), NULL,
     "open the image while another process writes it"},
    {IMG_FLAG, 'q', "quiet", offsetof(SnapshotArgs, quiet), NULL, "print errors only"},
    {IMG_LIST, 0, "object", offsetof(SnapshotArgs, objects), "OBJDEF", "object definition"},
    {IMG_END},
};

static const ImgUsage snapshot_usage = {
    "snapshot", "FILE", "List, create, apply or delete internal snapshots.", snapshot_options};

static int list_snapshots(BlockDriverState *bs)
{
    GError *err = NULL;
    g_autoptr(GArray) list = NULL;

    if (!bdrv_can_snapshot(bs)) {
        return 0;
    }
    list = bdrv_snapshot_list(bs, &err);
    if (!list) {
        return img_report(err, 1);
    }
    img_print_snapshots(list);
    return 0;
}

static int create_snapshot(BlockDriverState *bs, const char *name)
{
    GError *err = NULL;

    return bdrv_snapshot_create(bs, name, &err)
               ? 0
               : img_report_prefixed(err, 1, "Could not create snapshot '%s': ", name);
}

static int apply_snapshot(BlockDriverState *bs, const char *name)
{
    GError *err = NULL;

    return bdrv_snapshot_apply(bs, name, &err)
               ? 0
               : img_report_prefixed(err, 1, "Could not apply snapshot '%s': ", name);
}

static int delete_snapshot(BlockDriverState *bs, const char *name)
{
    GError *err = NULL;

    if (bdrv_snapshot_delete(bs, NULL, name, &err)) {
        return 0;
    }
    if (qb_error_to_errno(err) == -ENOENT) {
        g_clear_error(&err);
        img_error("Could not delete snapshot '%s': snapshot not found", name);
        return 1;
    }
    return img_report_prefixed(err, 1, "Could not delete snapshot '%s': ", name);
}

static int run_action(BlockDriverState *bs, const SnapshotArgs *args)
{
    if (args->create) {
        return create_snapshot(bs, args->create);
    }
    if (args->apply) {
        return apply_snapshot(bs, args->apply);
    }
    if (args->delete) {
        return delete_snapshot(bs, args->delete);
    }
    return list_snapshots(bs);
}

static int open_and_run(const char *file, const SnapshotArgs *args)
{
    bool writable = args->create || args->apply || args->delete;
    ImgOpen how = {.format = args->format, .image_opts = args->image_opts,
                   .force_share = args->force_share,
                   .flags = BDRV_O_NO_BACKING | BDRV_O_NO_IO | (writable ? BDRV_O_RDWR | BDRV_O_RESIZE : 0)};
    BlockBackend *blk = img_open(file, &how);
    QbProgress progress; /* nobody looks at it, but it keeps the first signal until all is done */
    int status;

    if (!blk) {
        return 1;
    }
    qb_progress_init(&progress, 0);
    img_progress_start(&progress, false);
    status = run_action(blk_bs(blk), args);
    img_progress_end(status == 0);
    return img_close(blk, status);
}

int img_snapshot(int argc, char **argv)
{
    g_autoptr(GPtrArray) operands = g_ptr_array_new();
    SnapshotArgs args = {0};
    int status;

    if (!img_parse_args(&snapshot_usage, argc, argv, &args, operands, &status)) {
        return status;
    }
    g_autoptr(GPtrArray) objects = args.objects;
    if (args.list + !!args.apply + !!args.create + !!args.delete > 1) {
        return img_usage_error("snapshot", "Cannot mix '-l', '-a', '-c', '-d'");
    }
    if (operands->len != 1) {
        return img_usage_error("snapshot", "Expecting one image file name");
    }
    if (!img_check_open_args(args.format, args.image_opts) ||
        !img_check_objects(objects)) {
        return 1;
    }
    return open_and_run(operands->pdata[0], &args);
}
