/*
 * Amending: changing what an existing image says about itself.
 *
 *     options -> parse -> judge everything      (nothing has changed so far)
 *             -> upgrade -> refcount width -> header bits and names -> size -> downgrade
 *
 * Each step is a function that leaves a good image whether it is done, fails or is stopped; running
 * the same amendment again does what is left (invariant 8).  What an option asks for is there
 * already: no step, no write.
 *
 * The order: what version 3 allows comes after the upgrade, what version 2 forbids before the
 * downgrade.
 *
 * Not done: keys of encrypted images.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-amend.h"

#include <inttypes.h>
#include <string.h>

#include "block/qcow2-create.h"

const QbOptDesc qcow2_amend_opts[] = {
    {"backing_file", QB_OPT_STRING, "File name of a base image", NULL},
    {"backing_fmt", QB_OPT_STRING, "Image format of the base image", NULL},
    {"compat", QB_OPT_STRING, "Compatibility level (v2 [0.10] or v3 [1.1])", NULL},
    {"data_file", QB_OPT_STRING, "File name of an external data file", NULL},
    {"data_file_raw", QB_OPT_BOOL, "The external data file must stay valid as a raw image", NULL},
    {"encrypt.iter-time", QB_OPT_NUMBER, "Time to spend in PBKDF in milliseconds", NULL},
    {"encrypt.keyslot", QB_OPT_NUMBER, "Select a single keyslot to modify explicitly", NULL},
    {"encrypt.new-secret", QB_OPT_STRING,
     "New secret to set in the matching keyslots. Empty string to erase", NULL},
    {"encrypt.old-secret", QB_OPT_STRING, "Select all keyslots that match this password", NULL},
    {"encrypt.state", QB_OPT_STRING, "Select new state of affected keyslots (active/inactive)",
     NULL},
    {"lazy_refcounts", QB_OPT_BOOL, "Postpone refcount updates", NULL},
    {"refcount_bits", QB_OPT_NUMBER, "Width of a reference count entry in bits", NULL},
    {"size", QB_OPT_SIZE, "Virtual disk size", NULL},
    {NULL, 0, NULL, NULL},
};

#define NEEDS_V3 "compatibility level 1.1 and above (use compat=1.1 or greater)"

/* What is asked for; what is not said has the image's own value. */
typedef struct Amendment {
    int version;
    bool lazy, raw;
    uint64_t refcount_bits, size;
    bool says_version, says_bits, says_size;
    char *backing_file, *backing_fmt, *data_file; /* NULL: not said */
} Amendment;

static void amendment_clear(Amendment *a)
{
    g_free(a->backing_file);
    g_free(a->backing_fmt);
    g_free(a->data_file);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Amendment, amendment_clear)

static bool fail(GError **errp, int err, const char *text)
{
    qb_error_set(errp, err, "%s", text);
    return false;
}

bool qcow2_amend_go_on(QbProgress *progress, GError **errp)
{
    return !qb_progress_cancelled(progress) ||
           fail(errp, ECANCELED, "Stopped; the same command does what is left");
}

/* ---------------------------------------------------------------- parsing */

static bool take_version(json_t *options, Amendment *a, GError **errp)
{
    g_autofree char *name = qb_opt_take_string(options, "compat");
    a->says_version = name != NULL;
    a->version = name ? qcow2_version_by_name(name) : a->version;
    if (!a->version) {
        qb_error_set(errp, EINVAL, "Unknown compatibility level %s", name);
    }
    return a->version != 0;
}

static bool refuse_encryption(const BDRVQcow2State *s, const json_t *options, GError **errp)
{
    if (!qb_opts_has_prefix(options, "encrypt")) {
        return true;
    }
    return s->header.crypt_method == QCOW2_CRYPT_NONE
               ? fail(errp, EINVAL, "Can't amend encryption options - encryption not present")
               : fail(errp, ENOTSUP, "Changing the keys of encrypted images is not supported");
}

static bool parse(const BDRVQcow2State *s, json_t *options, Amendment *a, GError **errp)
{
    a->version = s->version;
    a->says_bits = json_object_get(options, "refcount_bits");
    a->says_size = json_object_get(options, "size");
    a->backing_file = qb_opt_take_string(options, "backing_file");
    a->backing_fmt = qb_opt_take_string(options, "backing_fmt");
    a->data_file = qb_opt_take_string(options, "data_file");
    bool lazy = s->header.compatible & QCOW2_COMPAT_LAZY_REFCOUNTS;
    return refuse_encryption(s, options, errp) && take_version(options, a, errp) &&
           qb_opt_take_bool(options, "lazy_refcounts", lazy && a->version >= 3, &a->lazy, errp) &&
           qb_opt_take_bool(options, "data_file_raw", s->data_file_raw, &a->raw, errp) &&
           qb_opt_take_uint(options, "refcount_bits", UINT64_C(1) << s->refcount_order,
                            &a->refcount_bits, errp) &&
           qb_opt_take_size(options, "size", s->header.size, &a->size, errp);
}

/* ---------------------------------------------------------------- rules */

static bool judge_width(const Amendment *a, GError **errp)
{
    if (!qb_is_power_of_2(a->refcount_bits) || a->refcount_bits > 64) {
        return fail(errp, EINVAL,
                    "Refcount width must be a power of two and may not exceed 64 bits");
    }
    if (a->version >= 3 || a->refcount_bits == 16) {
        return true;
    }
    return a->says_bits ? fail(errp, EINVAL, "Refcount widths other than 16 bits require"
                                             " compatibility level 1.1 or above (use compat=1.1 or"
                                             " greater)")
                        : fail(errp, EINVAL, "compat=0.10 requires refcount_bits=16");
}

static bool judge_names(const BlockDriverState *bs, const Amendment *a, GError **errp)
{
    const BDRVQcow2State *s = qcow2_state((BlockDriverState *)bs);
    if ((a->backing_file && strcmp(a->backing_file, bdrv_backing_name(bs))) ||
        (a->backing_fmt && strcmp(a->backing_fmt, bdrv_backing_format(bs)))) {
        fail(errp, EINVAL, "Cannot amend the backing file");
        qb_error_add_hint(errp, "You can use 'qemu-img rebase' instead.");
        return false;
    }
    if (a->data_file && !s->has_data_file) {
        return fail(errp, EINVAL,
                    "data-file can only be set for images that use an external data file");
    }
    if (a->raw && !s->data_file_raw) {
        return fail(errp, EINVAL, "data-file-raw cannot be set on existing images");
    }
    return true;
}

static bool judge(BlockDriverState *bs, const Amendment *a, GError **errp)
{
    if (a->lazy && a->version < 3) {
        return fail(errp, EINVAL, "Lazy refcounts only supported with " NEEDS_V3);
    }
    if (!judge_width(a, errp) || !judge_names(bs, a, errp)) {
        return false;
    }
    if (a->says_size && a->size % BDRV_SECTOR_SIZE) {
        return fail(errp, EINVAL, "The new size must be a multiple of 512");
    }
    return a->version >= qcow2_state(bs)->version || qcow2_may_downgrade(bs, a->size, errp);
}

/* ---------------------------------------------------------------- steps */

static void edit_bits_and_names(Qcow2Header *h, GArray *extensions, void *opaque)
{
    const Amendment *a = opaque;
    uint64_t lazy = QCOW2_COMPAT_LAZY_REFCOUNTS, raw = QCOW2_AUTOCLEAR_DATA_FILE_RAW;
    h->compatible = a->lazy ? h->compatible | lazy : h->compatible & ~lazy;
    h->autoclear = a->raw ? h->autoclear | raw : h->autoclear & ~raw;
    if (a->data_file) {
        qcow2_extensions_set(extensions, QCOW2_EXT_DATA_FILE, *a->data_file ? a->data_file : NULL,
                             strlen(a->data_file));
    }
}

/* Is all that edit_bits_and_names() would do there already? Version 2 knows nothing of it. */
static bool header_agrees(const BDRVQcow2State *s, const Amendment *a)
{
    const Qcow2Extension *name = qcow2_find_extension(s->extensions, QCOW2_EXT_DATA_FILE);
    bool lazy = s->header.compatible & QCOW2_COMPAT_LAZY_REFCOUNTS;
    bool same_name = !a->data_file || !strcmp(a->data_file, name ? (const char *)name->data : "");
    return s->version < 3 || (a->lazy == lazy && a->raw == s->data_file_raw && same_name);
}

/* Lazy refcounts, data file. */
static bool amend_header(BlockDriverState *bs, Amendment *a, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    Qcow2HeaderChange what = {.edit = edit_bits_and_names, .opaque = a};
    if (header_agrees(s, a)) {
        return true;
    }
    if (!qcow2_header_change(bs, &what, errp)) {
        return false;
    }
    s->lazy_refcounts = a->lazy;
    s->data_file_raw = a->raw;
    return true;
}

static bool amend_size(BlockDriverState *bs, const Amendment *a, GError **errp)
{
    if (!a->says_size || a->size == qcow2_state(bs)->header.size) {
        return true;
    }
    if (!bdrv_dirty_before_resize(bs, (int64_t)a->size, errp)) {
        return false;
    }
    bool ok = qcow2_truncate(bs, (int64_t)a->size, false, PREALLOC_MODE_OFF, true, errp);
    int64_t length = (int64_t)qcow2_state(bs)->header.size;
    bdrv_set_length(bs, length);
    bdrv_dirty_after_resize(bs, length);
    return ok;
}

/* Each step settles what lazy refcounts have begun in the one before: the dirty bit is its own. */
static bool settled(BlockDriverState *bs, GError **errp)
{
    int ret = qcow2_lazy_settle(bs);
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Could not write back the metadata of the image");
    }
    return ret == 0;
}

static bool carry_out(BlockDriverState *bs, Amendment *a, QbProgress *progress, GError **errp)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    unsigned order = (unsigned)__builtin_ctzll(a->refcount_bits);
    return (a->version <= s->version || qcow2_upgrade(bs, errp)) &&
           qcow2_amend_width(bs, order, progress, errp) && amend_header(bs, a, errp) &&
           amend_size(bs, a, errp) && settled(bs, errp) &&
           (a->version >= s->version || qcow2_downgrade(bs, progress, errp));
}

bool qcow2_amend(BlockDriverState *bs, json_t *options, QbProgress *progress, GError **errp)
{
    g_auto(Amendment) a = {0};
    return parse(qcow2_state(bs), options, &a, errp) && judge(bs, &a, errp) &&
           carry_out(bs, &a, progress, errp);
}

/* ---------------------------------------------------------------- backing file */

/* The open graph is the caller's. */
bool qcow2_change_backing_file(BlockDriverState *bs, const char *file, const char *fmt,
                               GError **errp)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    if (s->data_file_raw && file && *file) {
        qb_error_set(errp, EINVAL,
                     "Backing file and data-file-raw cannot be used at the same time");
        return false;
    }
    if (!qcow2_header_change_names(bs, file, fmt, errp)) {
        return false;
    }
    bdrv_set_backing_names(bs, file, file && *file ? fmt : "");
    return true;
}
