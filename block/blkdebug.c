/*
 * blkdebug: a filter that makes requests fail, stops them, and pretends to be picky.
 *
 *   [qcow2] ---- events: l2_update, cow_read ... ----.
 *      | requests                                     v
 *   [blkdebug]  --- each request asks ---> rules (blkdebug-rules.c): an error? and breakpoints
 *      |
 *   [file]
 *
 * Named "blkdebug:CONFIG:FILE" (CONFIG may be empty), or by options: config, image.*,
 * inject-error.N.*, set-state.N.*; and align, max-transfer, opt-write-zero, max-write-zero,
 * opt-discard, max-discard, which become limits of the node.  What the core sends is checked
 * against those limits with assertions: this node is how the core's promises to drivers are tested.
 *
 * Invariants
 *  1. A request that is to fail does not reach the file.
 *  2. Zero and discard requests smaller than a whole unit are declined, so that the fallbacks run.
 *
 * Not done: the options take-child-perms and unshare-child-perms; drain does not resume anybody.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/blkdebug-rules.h"
#include "block/driver.h"
#include "util/checked.h"
#include "util/error.h"

#include <inttypes.h>
#include <string.h>

typedef struct BDRVBlkdebugState {
    BlkdebugRules *rules;
    uint64_t align, max_transfer;
    uint64_t opt_write_zero, max_write_zero;
    uint64_t opt_discard, max_discard;
} BDRVBlkdebugState;

/* --- names and options --- */

/* "blkdebug:CONFIG:FILE"; without the prefix all of it is FILE. */
static bool blkdebug_parse_filename(const char *filename, json_t *options, GError **errp)
{
    const char *rest, *colon;
    json_object_del(options, "filename");
    if (!g_str_has_prefix(filename, "blkdebug:")) {
        json_object_set_new(options, "x-image", json_string_nocheck(filename));
        return true;
    }
    rest = filename + strlen("blkdebug:");
    colon = strchr(rest, ':');
    if (!colon) {
        qb_error_set(errp, EINVAL, "blkdebug requires both config file and image path");
        return false;
    }
    if (colon != rest) {
        json_object_set_new(options, "config",
                            json_stringn_nocheck(rest, (size_t)(colon - rest)));
    }
    json_object_set_new(options, "x-image", json_string_nocheck(colon + 1));
    return true;
}

typedef struct LimitOption {
    const char *name;
    size_t field; /* in BDRVBlkdebugState */
    size_t unit;  /* field it must be a multiple of, 0: none */
} LimitOption;

static const LimitOption limit_options[] = {
    {"align", offsetof(BDRVBlkdebugState, align), 0},
    {"max-transfer", offsetof(BDRVBlkdebugState, max_transfer),
     offsetof(BDRVBlkdebugState, align)},
    {"opt-write-zero", offsetof(BDRVBlkdebugState, opt_write_zero),
     offsetof(BDRVBlkdebugState, align)},
    {"max-write-zero", offsetof(BDRVBlkdebugState, max_write_zero),
     offsetof(BDRVBlkdebugState, opt_write_zero)},
    {"opt-discard", offsetof(BDRVBlkdebugState, opt_discard),
     offsetof(BDRVBlkdebugState, align)},
    {"max-discard", offsetof(BDRVBlkdebugState, max_discard),
     offsetof(BDRVBlkdebugState, opt_discard)},
};

static uint64_t *limit_field(BDRVBlkdebugState *s, size_t field)
{
    return (uint64_t *)((char *)s + field);
}

static bool check_limit(BDRVBlkdebugState *s, const LimitOption *o, GError **errp)
{
    uint64_t value = *limit_field(s, o->field);
    uint64_t unit = o->unit ? MAX(*limit_field(s, o->unit), s->align) : 1;
    bool power_of_2 = o->unit || value == 0 || qb_is_power_of_2(value);
    if (value >= INT32_MAX || !power_of_2 || value % MAX(unit, 1)) {
        qb_error_set(errp, EINVAL, "Cannot meet constraints with %s %" PRIu64, o->name, value);
        return false;
    }
    return true;
}

static bool take_limits(json_t *options, BDRVBlkdebugState *s, GError **errp)
{
    for (size_t i = 0; i < G_N_ELEMENTS(limit_options); i++) {
        const LimitOption *o = &limit_options[i];
        if (!qb_opt_take_size(options, o->name, 0, limit_field(s, o->field), errp)
            || !check_limit(s, o, errp)) {
            return false;
        }
    }
    return true;
}

static bool take_rules(json_t *options, BlkdebugRules *rules, GError **errp)
{
    g_autofree char *config = qb_opt_take_string(options, "config");
    return (!config || blkdebug_rules_load(rules, config, errp))
           && blkdebug_rules_take(rules, options, errp);
}

static bool open_image(BlockDriverState *bs, json_t *options, GError **errp)
{
    g_autofree char *filename = qb_opt_take_string(options, "x-image");
    const int role = BDRV_CHILD_FILTERED | BDRV_CHILD_PRIMARY;
    return bdrv_open_child(bs, filename, options, "image", role, false, errp) != NULL;
}

static void blkdebug_close(BlockDriverState *bs)
{
    BDRVBlkdebugState *s = bs->opaque;
    g_clear_pointer(&s->rules, blkdebug_rules_free);
}

static bool blkdebug_open(BlockDriverState *bs, json_t *options, int flags, GError **errp)
{
    BDRVBlkdebugState *s = bs->opaque;
    s->rules = blkdebug_rules_new();
    if (take_rules(options, s->rules, errp) && take_limits(options, s, errp)
        && open_image(bs, options, errp)) {
        blkdebug_rules_event(s->rules, "none");
        return true;
    }
    blkdebug_close(bs);
    return false;
}

static const char *const blkdebug_strong_options[] = {"config", "inject-error", "set-state", NULL};

static bool is_own_option(const char *key)
{
    if (g_str_has_prefix(key, "inject-error.") || g_str_has_prefix(key, "set-state.")) {
        return true;
    }
    for (size_t i = 0; i < G_N_ELEMENTS(limit_options); i++) {
        if (!strcmp(key, limit_options[i].name)) {
            return true;
        }
    }
    return !strcmp(key, "config") || !strcmp(key, "x-image");
}

/* Nothing of ours can change; what is the same as before is taken. */
static bool blkdebug_reopen_prepare(BDRVReopenState *state, GError **errp)
{
    const char *key;
    void *next;
    json_t *value;
    json_object_foreach_safe(state->options, next, key, value) {
        if (!is_own_option(key)) {
            continue;
        }
        if (!json_equal(value, json_object_get(state->bs->options, key))) {
            qb_error_set(errp, EINVAL, "Cannot change the option '%s'", key);
            return false;
        }
        json_object_del(state->options, key);
    }
    return true;
}

/* The short form says it all when there are no options but the configuration file. */
static char *blkdebug_gather_filename(BlockDriverState *bs)
{
    const char *key;
    json_t *value;
    json_object_foreach(bs->options, key, value) {
        if (is_own_option(key) && strcmp(key, "config") && strcmp(key, "x-image")) {
            return NULL;
        }
    }
    if (!bs->file->bs->filename_exact) {
        return NULL;
    }
    const char *config = qb_opt_peek_string(bs->options, "config");
    return g_strdup_printf("blkdebug:%s:%s", config ? config : "", bs->file->bs->filename);
}

static void blkdebug_refresh_limits(BlockDriverState *bs)
{
    const BDRVBlkdebugState *s = bs->opaque;
    BlockLimits *bl = &bs->bl;
    if (s->align) {
        bl->request_alignment = (uint32_t)s->align;
    }
    if (s->max_transfer) {
        bl->max_transfer = (uint32_t)s->max_transfer;
    }
    bl->pwrite_zeroes_alignment = (uint32_t)s->opt_write_zero;
    bl->max_pwrite_zeroes = (int64_t)s->max_write_zero;
    bl->pdiscard_alignment = (uint32_t)s->opt_discard;
    bl->max_pdiscard = (int64_t)s->max_discard;
}

/* --- requests --- */

static int check(BlockDriverState *bs, BlkdebugIoType type, int64_t offset, int64_t bytes)
{
    BDRVBlkdebugState *s = bs->opaque;
    return blkdebug_rules_check(s->rules, type, offset, bytes);
}

static void assert_transfer(const BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    const BlockLimits *bl = &bs->bl;
    assert(qb_is_aligned((uint64_t)(offset | bytes), bl->request_alignment));
    assert(!bl->max_transfer || bytes <= bl->max_transfer);
    (void)bl;
}

static int blkdebug_preadv(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                           IoVector *qiov, size_t qiov_offset, int flags)
{
    assert_transfer(bs, offset, bytes);
    int ret = check(bs, BLKDEBUG_READ, offset, bytes);
    return ret < 0 ? ret : bdrv_preadv_part(bs->file, offset, bytes, qiov, qiov_offset, flags);
}

static int blkdebug_pwritev(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                            IoVector *qiov, size_t qiov_offset, int flags)
{
    assert_transfer(bs, offset, bytes);
    int ret = check(bs, BLKDEBUG_WRITE, offset, bytes);
    return ret < 0 ? ret : bdrv_pwritev_part(bs->file, offset, bytes, qiov, qiov_offset, flags);
}

static int blkdebug_pwritev_compressed(BlockDriverState *bs, BdrvRequest *req, int64_t offset,
                                       int64_t bytes, IoVector *qiov, size_t qiov_offset)
{
    return blkdebug_pwritev(bs, req, offset, bytes, qiov, qiov_offset, BDRV_REQ_COMPRESSED);
}

/* True for the head or tail of a longer request; asserts that the core cut it well
 * (invariant 2). */
static bool is_partial(int64_t offset, int64_t bytes, int64_t unit, int64_t max)
{
    int64_t end = offset + bytes;
    bool in_one_unit = (offset + unit - 1) / unit == (end + unit - 1) / unit;
    if (bytes < unit) {
        assert(offset % unit == 0 || end % unit == 0 || in_one_unit);
        (void)in_one_unit;
        return true;
    }
    assert(offset % unit == 0 && bytes % unit == 0 && (!max || bytes <= max));
    (void)max;
    return false;
}

static int blkdebug_pwrite_zeroes(BlockDriverState *bs, BdrvRequest *req, int64_t offset,
                                  int64_t bytes, int flags)
{
    const BlockLimits *bl = &bs->bl;
    uint32_t unit = MAX(bl->request_alignment, bl->pwrite_zeroes_alignment);
    if (is_partial(offset, bytes, unit, bl->max_pwrite_zeroes)) {
        return -ENOTSUP;
    }
    int ret = check(bs, BLKDEBUG_WRITE_ZEROES, offset, bytes);
    return ret < 0 ? ret : bdrv_pwrite_zeroes(bs->file, offset, bytes, flags);
}

static int blkdebug_pdiscard(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes)
{
    const BlockLimits *bl = &bs->bl;
    uint32_t unit = MAX(bl->request_alignment, bl->pdiscard_alignment);
    if (is_partial(offset, bytes, unit, bl->max_pdiscard)) {
        return -ENOTSUP;
    }
    int ret = check(bs, BLKDEBUG_DISCARD, offset, bytes);
    return ret < 0 ? ret : bdrv_pdiscard(bs->file, offset, bytes);
}

static int blkdebug_flush(BlockDriverState *bs)
{
    int ret = check(bs, BLKDEBUG_FLUSH, 0, 0);
    return ret < 0 ? ret : bdrv_flush(bs->file->bs);
}

/* The answer of the node below, which is what a filter's status is. */
static int blkdebug_block_status(BlockDriverState *bs, int64_t offset, int64_t bytes,
                                 BdrvStatus *ret)
{
    int err = check(bs, BLKDEBUG_BLOCK_STATUS, offset, bytes);
    if (err == 0) {
        err = bdrv_block_status(bs->file->bs, offset, bytes, ret);
    }
    if (err == 0 && ret->bytes == 0) { /* the last unit of ours begins beyond the file's odd end */
        *ret = (BdrvStatus){.flags = BDRV_BLOCK_ZERO | BDRV_BLOCK_ALLOCATED, .bytes = bytes};
    }
    ret->flags &= ~BDRV_BLOCK_EOF;
    return err;
}

static bool blkdebug_get_info(BlockDriverState *bs, BlockDriverInfo *info, GError **errp)
{
    return bdrv_get_info(bs->file->bs, info, errp);
}

/* --- debugging --- */

static void blkdebug_debug_event(BlockDriverState *bs, const char *event)
{
    BDRVBlkdebugState *s = bs->opaque;
    blkdebug_rules_event(s->rules, event);
}

static int blkdebug_debug_breakpoint(BlockDriverState *bs, const char *event, const char *tag)
{
    BDRVBlkdebugState *s = bs->opaque;
    return blkdebug_rules_break(s->rules, event, tag);
}

static int blkdebug_debug_remove_breakpoint(BlockDriverState *bs, const char *tag)
{
    BDRVBlkdebugState *s = bs->opaque;
    return blkdebug_rules_remove_break(s->rules, tag);
}

static int blkdebug_debug_resume(BlockDriverState *bs, const char *tag)
{
    BDRVBlkdebugState *s = bs->opaque;
    return blkdebug_rules_resume(s->rules, tag);
}

static bool blkdebug_debug_is_suspended(BlockDriverState *bs, const char *tag)
{
    BDRVBlkdebugState *s = bs->opaque;
    return blkdebug_rules_is_suspended(s->rules, tag);
}

const BlockDriver bdrv_blkdebug = {
    .format_name = "blkdebug",
    .protocol_name = "blkdebug",
    .instance_size = sizeof(BDRVBlkdebugState),
    .is_filter = true,
    .has_variable_length = true,
    .strong_options = blkdebug_strong_options,
    .parse_filename = blkdebug_parse_filename,
    .open = blkdebug_open,
    .close = blkdebug_close,
    .reopen_prepare = blkdebug_reopen_prepare,
    .refresh_limits = blkdebug_refresh_limits,
    .gather_filename = blkdebug_gather_filename,
    .preadv = blkdebug_preadv,
    .pwritev = blkdebug_pwritev,
    .pwritev_compressed = blkdebug_pwritev_compressed,
    .pwrite_zeroes = blkdebug_pwrite_zeroes,
    .pdiscard = blkdebug_pdiscard,
    .block_status = blkdebug_block_status,
    .flush = blkdebug_flush,
    .supported_write_flags = BDRV_REQ_FUA | BDRV_REQ_UNCHANGED,
    .supported_zero_flags =
        BDRV_REQ_FUA | BDRV_REQ_MAY_UNMAP | BDRV_REQ_NO_FALLBACK | BDRV_REQ_UNCHANGED,
    .get_info = blkdebug_get_info,
    .debug_event = blkdebug_debug_event,
    .debug_breakpoint = blkdebug_debug_breakpoint,
    .debug_remove_breakpoint = blkdebug_debug_remove_breakpoint,
    .debug_resume = blkdebug_debug_resume,
    .debug_is_suspended = blkdebug_debug_is_suspended,
};
