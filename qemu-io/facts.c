/*
 * What an image is, where its content is allocated, how long it is; and making it longer or stable.
 *
 * alloc and map speak of the image alone, not of its backing files: what they call allocated is
 * decided by the topmost layer.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdio.h>
#include <string.h>
#include "qemu-io/qio.h"
#include "tools/output.h"

enum { DEFAULT_COUNT = 512 }; /* bytes alloc looks at */

/* The extent at @offset: 1 when allocated, 0 when not, with its length (> 0); or -errno. */
static int allocated_extent(BlockDriverState *bs, int64_t offset, int64_t bytes, int64_t *ret_bytes)
{
    BDRV_GRAPH_GUARD();
    int ret = bdrv_is_allocated_above(bs, bs, true, offset, bytes, ret_bytes);
    return ret < 0 ? ret : !!(ret & BDRV_BLOCK_ALLOCATED);
}

/* The same, as far as the answer stays what it is. */
static int allocated_run(BlockDriverState *bs, int64_t offset, int64_t bytes, int64_t *ret_bytes)
{
    int64_t n = 0, run = 0;
    int first = allocated_extent(bs, offset, bytes, &n), ret = first;

    while (first >= 0 && ret == first) {
        run += n;
        if (run == bytes) {
            break;
        }
        ret = allocated_extent(bs, offset + run, bytes - run, &n);
    }
    *ret_bytes = run;
    return ret < 0 ? ret : first;
}

static bool fail_allocation(int ret)
{
    return qio_fail("Failed to get allocation status: %s", g_strerror(-ret));
}

static bool get_length(QioShell *sh, int64_t *ret)
{
    *ret = blk_getlength(sh->blk);
    return *ret >= 0 || qio_fail("getlength: %s", g_strerror((int)-*ret));
}

/* How many of the bytes are allocated. */
static int sum_allocated(BlockDriverState *bs, int64_t offset, int64_t bytes, int64_t *ret)
{
    *ret = 0;
    for (int64_t n = 0; bytes > 0; offset += n, bytes -= n) {
        int allocated = allocated_run(bs, offset, bytes, &n);
        if (allocated < 0) {
            return allocated;
        }
        *ret += allocated ? n : 0;
    }
    return 0;
}

bool qio_cmd_alloc(QioShell *sh, const QioArgs *args)
{
    int64_t offset, bytes = DEFAULT_COUNT, length, sum;
    g_autofree char *at = NULL;
    int ret;

    if (!qio_parse_size(args->operand[0], &offset) ||
        (args->n > 1 && !qio_parse_size(args->operand[1], &bytes)) || !get_length(sh, &length)) {
        return false;
    }
    bytes = CLAMP(length - offset, 0, bytes);
    ret = sum_allocated(blk_bs(sh->blk), offset, bytes, &sum);
    if (ret < 0) {
        return fail_allocation(ret);
    }
    at = qio_size_text((double)offset);
    printf("%" PRId64 "/%" PRId64 " bytes allocated at offset %s\n", sum, bytes, at);
    return true;
}

static void print_run(bool allocated, int64_t offset, int64_t bytes)
{
    g_autofree char *size = qio_size_text((double)bytes);
    g_autofree char *at = qio_size_text((double)offset);

    printf("%s (0x%" PRIx64 ") bytes %s at offset %s (0x%" PRIx64 ")\n", size, bytes,
           allocated ? "    allocated" : "not allocated", at, offset);
}

bool qio_cmd_map(QioShell *sh, const QioArgs *args)
{
    int64_t length, n;

    if (!get_length(sh, &length)) {
        return false;
    }
    for (int64_t offset = 0; offset < length; offset += n) {
        int ret = allocated_run(blk_bs(sh->blk), offset, length - offset, &n);
        if (ret < 0) {
            return fail_allocation(ret);
        }
        print_run(ret, offset, n);
    }
    return true;
}

bool qio_cmd_length(QioShell *sh, const QioArgs *args)
{
    g_autofree char *text = NULL;
    int64_t length;

    if (!get_length(sh, &length)) {
        return false;
    }
    text = qio_size_text((double)length);
    printf("%s\n", text);
    return true;
}

/* Formats without a layout of their own have a layout of nothing. */
static bool get_layout(BlockDriverState *bs, BlockDriverInfo *ret)
{
    GError *err = NULL;

    *ret = (BlockDriverInfo){.vm_state_offset = -1};
    if (bdrv_get_info(bs, ret, &err)) {
        return true;
    }
    if (g_error_matches(err, QB_ERROR, ENOTSUP)) {
        g_clear_error(&err);
        return true;
    }
    return qio_error_prefixed(err, "%s", "");
}

static bool print_specific(BlockDriverState *bs)
{
    GError *err = NULL;
    g_autoptr(json_t) specific = bdrv_get_specific_info(bs, &err);

    if (err) {
        return qio_error_prefixed(err, "%s", "");
    }
    if (specific) {
        printf("Format specific information:\n");
        tool_print_facts(json_object_get(specific, "data"), 1);
    }
    return true;
}

bool qio_cmd_info(QioShell *sh, const QioArgs *args)
{
    BlockDriverState *bs = blk_bs(sh->blk);
    g_autofree char *cluster = NULL, *vm_state = NULL;
    BlockDriverInfo info;

    printf("format name: %s\n", bdrv_get_format_name(bs));
    if (!get_layout(bs, &info)) {
        return false;
    }
    cluster = qio_size_text(info.cluster_size);
    vm_state = qio_size_text((double)MAX(info.vm_state_offset, 0));
    printf("cluster size: %s\nvm state offset: %s\n", cluster, vm_state);
    return print_specific(bs);
}

/* --- changing --- */

static bool parse_prealloc(const char *text, PreallocMode *ret)
{
    *ret = PREALLOC_MODE_OFF;
    for (int i = 0; text && prealloc_mode_names[i]; i++) {
        if (!strcmp(text, prealloc_mode_names[i])) {
            *ret = (PreallocMode)i;
            return true;
        }
    }
    return !text || qio_error("Invalid preallocation mode '%s'", text);
}

bool qio_cmd_truncate(QioShell *sh, const QioArgs *args)
{
    GError *err = NULL;
    PreallocMode prealloc;
    int64_t length;

    if (!parse_prealloc(args->value['m'], &prealloc) ||
        !qio_parse_size(args->operand[0], &length)) {
        return false;
    }
    return blk_truncate(sh->blk, length, false, prealloc, false, &err) ||
           qio_error_prefixed(err, "%s", "");
}

bool qio_cmd_flush(QioShell *sh, const QioArgs *args)
{
    int ret = blk_flush(sh->blk);

    return ret >= 0 || qio_fail("flush failed: %s", g_strerror(-ret));
}
