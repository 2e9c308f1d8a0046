/*
 * Making new images.
 *
 *     options -> parse -> validate -> lay out           (nothing touched so far)
 *             -> protocol file -> tables -> barrier -> header
 *             -> external data file, preallocation      (through the opened image)
 *
 * Layout of a new image; everything is counted, the counts describe themselves:
 *
 *     0        C                 C*(1+R)          C*(1+R+B)
 *     +--------+-----------------+----------------+-------------------+
 *     | header | refcount table  | refcount blocks| L1 (not padded)   |
 *     +--------+-----------------+----------------+-------------------+
 *               R clusters        B clusters       the file ends with its last entry
 *
 * Invariants
 *  1. A file that was there is opened for writing only after all options were found to fit together
 *     and the header was found to fit its cluster.
 *  2. The header is written last, after a barrier: a create that was cut off leaves no image.
 *  3. A data file that was not there before is removed when creating fails; one that was there
 *     never is.  (The core does the same with the image file itself.)
 *
 * Not done: encryption.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-create.h"

#include <inttypes.h>
#include <string.h>
#include <unistd.h>

#include "block/block-backend.h"
#include "qb-config.h"

const QbOptDesc qcow2_create_opts[] = {
    {"backing_file", QB_OPT_STRING, "File name of a base image", NULL},
    {"backing_fmt", QB_OPT_STRING, "Image format of the base image", NULL},
    {"cluster_size", QB_OPT_SIZE, "qcow2 cluster size", "65536"},
    {"compat", QB_OPT_STRING, "Compatibility level (v2 [0.10] or v3 [1.1])", NULL},
    {"compression_type", QB_OPT_STRING, "Compression method used for image cluster compression",
     "zlib"},
    {"data_file", QB_OPT_STRING, "File name of an external data file", NULL},
    {"data_file_raw", QB_OPT_BOOL, "The external data file must stay valid as a raw image", NULL},
    {"extended_l2", QB_OPT_BOOL, "Extended L2 tables", "off"},
    {"lazy_refcounts", QB_OPT_BOOL, "Postpone refcount updates", "off"},
    {"preallocation", QB_OPT_STRING,
     "Preallocation mode (allowed values: off, metadata, falloc, full)", NULL},
    {"refcount_bits", QB_OPT_NUMBER, "Width of a reference count entry in bits", "16"},
    {"size", QB_OPT_SIZE, "Virtual disk size", NULL},
    {NULL, 0, NULL, NULL},
};

void qcow2_create_args_clear(Qcow2CreateArgs *a)
{
    g_free(a->backing_file);
    g_free(a->backing_fmt);
    g_free(a->data_file);
}

static bool fail(GError **errp, int err, const char *text)
{
    qb_error_set(errp, err, "%s", text);
    return false;
}

/* ---------------------------------------------------------------- parsing */

int qcow2_version_by_name(const char *name)
{
    static const struct {
        const char *name;
        int version;
    } names[] = {{"0.10", 2}, {"v2", 2}, {"1.1", 3}, {"v3", 3}};
    for (size_t i = 0; i < G_N_ELEMENTS(names); i++) {
        if (!strcmp(name, names[i].name)) {
            return names[i].version;
        }
    }
    return 0;
}

static bool take_version(json_t *options, int *ret, GError **errp)
{
    g_autofree char *compat = qb_opt_take_string(options, "compat");
    g_autofree char *version = qb_opt_take_string(options, "version");
    const char *name = compat ? compat : version ? version : "v3";
    *ret = qcow2_version_by_name(name);
    if (!*ret) {
        qb_error_set(errp, EINVAL, "Parameter 'version' does not accept value '%s'", name);
    }
    return *ret != 0;
}

static bool take_compression(json_t *options, int *ret, GError **errp)
{
#ifdef CONFIG_ZSTD
    static const char *const names[] = {"zlib", "zstd", NULL};
#else
    static const char *const names[] = {"zlib", NULL};
#endif
    g_autofree char *name = qb_opt_take_string(options, "compression_type");
    for (int i = 0; names[i]; i++) {
        if (!name || !strcmp(name, names[i])) {
            *ret = i; /* the table follows the numbers of the format */
            return true;
        }
    }
    qb_error_set(errp, EINVAL, "Parameter 'compression-type' does not accept value '%s'", name);
    return false;
}

static bool take_size(json_t *options, uint64_t *ret, GError **errp)
{
    int64_t rounded;
    if (!json_object_get(options, "size")) {
        return fail(errp, EINVAL, "Image creation needs a size parameter");
    }
    if (!qb_opt_take_size(options, "size", 0, ret, errp)) {
        return false;
    }
    if (qb_align_up_overflow(*ret, BDRV_SECTOR_SIZE, &rounded)) {
        return fail(errp, EFBIG, "The image size is too large for file format 'qcow2'"
                                 " (try using a larger cluster size)");
    }
    *ret = (uint64_t)rounded;
    return true;
}

static bool parse(json_t *options, Qcow2CreateArgs *a, GError **errp)
{
    a->backing_file = qb_opt_take_string(options, "backing_file");
    a->backing_fmt = qb_opt_take_string(options, "backing_fmt");
    a->data_file = qb_opt_take_string(options, "data_file");
    return qb_opt_take_size(options, "cluster_size", 65536, &a->cluster_size, errp) &&
           qb_opt_take_uint(options, "refcount_bits", 16, &a->refcount_bits, errp) &&
           qb_opt_take_bool(options, "extended_l2", false, &a->extended_l2, errp) &&
           qb_opt_take_bool(options, "lazy_refcounts", false, &a->lazy_refcounts, errp) &&
           qb_opt_take_bool(options, "data_file_raw", false, &a->data_file_raw, errp) &&
           qb_opt_take_enum(options, "preallocation", prealloc_mode_names, PREALLOC_MODE_OFF,
                            &a->prealloc, errp) &&
           take_version(options, &a->version, errp) &&
           take_compression(options, &a->compression, errp) &&
           take_size(options, &a->size, errp);
}

/* ---------------------------------------------------------------- rules */

#define NEEDS_V3 "compatibility level 1.1 and above (use version=v3 or greater)"

static bool validate_version2(const Qcow2CreateArgs *a, GError **errp)
{
    if (a->version >= 3) {
        return true;
    }
    if (a->data_file) {
        return fail(errp, EINVAL, "External data files are only supported with " NEEDS_V3);
    }
    if (a->extended_l2) {
        return fail(errp, EINVAL, "Extended L2 entries are only supported with " NEEDS_V3);
    }
    if (a->lazy_refcounts) {
        return fail(errp, EINVAL, "Lazy refcounts only supported with " NEEDS_V3);
    }
    if (a->refcount_bits != 16) {
        return fail(errp, EINVAL, "Different refcount widths than 16 bits require compatibility"
                                  " level 1.1 or above (use version=v3 or greater)");
    }
    if (a->compression != QCOW2_COMPRESSION_ZLIB) {
        return fail(errp, EINVAL, "Non-zlib compression type is only supported with " NEEDS_V3);
    }
    return true;
}

static bool validate_geometry(const Qcow2CreateArgs *a, GError **errp)
{
    if (!qb_is_power_of_2(a->cluster_size) || a->cluster_size < 512 ||
        a->cluster_size > (2u << 20)) {
        return fail(errp, EINVAL, "Cluster size must be a power of two between 512 and 2048k");
    }
    if (!qb_is_power_of_2(a->refcount_bits) || a->refcount_bits > 64) {
        return fail(errp, EINVAL,
                    "Refcount width must be a power of two and may not exceed 64 bits");
    }
    if (a->extended_l2 && a->cluster_size < QCOW2_SUBCLUSTERS * BDRV_SECTOR_SIZE) {
        return fail(errp, EINVAL, "Extended L2 entries are only supported with cluster sizes of at"
                                  " least 16384 bytes");
    }
    return true;
}

static bool validate_names(const Qcow2CreateArgs *a, GError **errp)
{
    if (a->data_file_raw && !a->data_file) {
        return fail(errp, EINVAL, "data-file-raw requires data-file");
    }
    if (a->data_file_raw && a->backing_file) {
        return fail(errp, EINVAL, "Backing file and data-file-raw cannot be used at the same time");
    }
    if (a->backing_file && a->prealloc != PREALLOC_MODE_OFF && !a->extended_l2) {
        return fail(errp, EINVAL, "Backing file and preallocation can only be used at the same"
                                  " time if extended_l2 is on");
    }
    if (a->backing_fmt && !a->backing_file) {
        return fail(errp, EINVAL, "Backing format cannot be used without backing file");
    }
    if (a->backing_fmt && strlen(a->backing_fmt) > QCOW2_MAX_BACKING_FORMAT) {
        return fail(errp, EINVAL, "Backing format name too long");
    }
    return true;
}

static bool validate(const Qcow2CreateArgs *a, GError **errp)
{
    return validate_geometry(a, errp) && validate_names(a, errp) && validate_version2(a, errp);
}

bool qcow2_create_args_take(json_t *options, Qcow2CreateArgs *a, GError **errp)
{
    return parse(options, a, errp) && validate(a, errp);
}

/* ---------------------------------------------------------------- layout */

/* Where everything goes, in clusters. */
typedef struct Layout {
    Qcow2Header header;
    uint64_t reftable_clusters, refblocks, l1_clusters;
    uint64_t end; /* bytes of the file */
} Layout;

static unsigned log2_of(uint64_t power_of_2)
{
    return (unsigned)__builtin_ctzll(power_of_2);
}

/* Blocks count themselves and their table: grow both until nothing changes any more. */
void qcow2_settle_refcounts(const Qcow2CreateArgs *a, uint64_t others, uint64_t *ret_blocks,
                            uint64_t *ret_table)
{
    uint64_t per_block = a->cluster_size * 8 / a->refcount_bits;
    uint64_t per_table = a->cluster_size / 8;
    uint64_t blocks = 1, table = 1, before;
    do {
        before = table + blocks;
        blocks = qb_div_round_up(others + before, per_block);
        table = qb_div_round_up(blocks, per_table);
    } while (table + blocks != before);
    *ret_blocks = blocks;
    *ret_table = table;
}

uint64_t qcow2_new_l2_tables(const Qcow2CreateArgs *a)
{
    uint64_t entries = a->cluster_size / (a->extended_l2 ? 16 : 8);
    return qb_div_round_up(a->size, a->cluster_size * entries);
}

static bool settle_l1(const Qcow2CreateArgs *a, Layout *l, GError **errp)
{
    uint64_t entries = qcow2_new_l2_tables(a);
    if (entries > QCOW2_MAX_L1_BYTES / 8) {
        return fail(errp, EFBIG, "The image size is too large for file format 'qcow2' (try using a"
                                 " larger cluster size)");
    }
    l->header.l1_size = entries;
    l->l1_clusters = qb_div_round_up(entries * 8, a->cluster_size);
    return true;
}

static void set_features(const Qcow2CreateArgs *a, Qcow2Header *h)
{
    h->incompatible = (a->data_file ? QCOW2_INCOMPAT_DATA_FILE : 0) |
                      (a->compression ? QCOW2_INCOMPAT_COMPRESSION : 0) |
                      (a->extended_l2 ? QCOW2_INCOMPAT_EXTL2 : 0);
    h->compatible = a->lazy_refcounts ? QCOW2_COMPAT_LAZY_REFCOUNTS : 0;
    h->autoclear = a->data_file_raw ? QCOW2_AUTOCLEAR_DATA_FILE_RAW : 0;
    h->compression_type = a->compression;
    h->refcount_order = log2_of(a->refcount_bits);
}

static bool lay_out(const Qcow2CreateArgs *a, Layout *l, GError **errp)
{
    Qcow2Header *h = &l->header;
    *h = (Qcow2Header){
        .version = a->version,
        .cluster_bits = log2_of(a->cluster_size),
        .size = a->size,
    };
    set_features(a, h);
    if (!settle_l1(a, l, errp)) {
        return false;
    }
    qcow2_settle_refcounts(a, 1 + l->l1_clusters, &l->refblocks, &l->reftable_clusters);
    h->reftable_offset = a->cluster_size;
    h->reftable_clusters = l->reftable_clusters;
    uint64_t l1_offset = a->cluster_size * (1 + l->reftable_clusters + l->refblocks);
    h->l1_offset = h->l1_size ? l1_offset : 0;
    l->end = l1_offset + (uint64_t)h->l1_size * 8;
    return true;
}

static GArray *make_extensions(const Qcow2CreateArgs *a)
{
    GArray *extensions = qcow2_extensions_new();
    if (a->backing_fmt) {
        qcow2_extensions_add(extensions, QCOW2_EXT_BACKING_FORMAT, a->backing_fmt,
                             strlen(a->backing_fmt));
    }
    if (a->data_file) {
        qcow2_extensions_add(extensions, QCOW2_EXT_DATA_FILE, a->data_file, strlen(a->data_file));
    }
    if (a->version >= 3 && a->cluster_size > 4096) {
        uint32_t length;
        g_autofree uint8_t *table = qcow2_feature_table(&length);
        qcow2_extensions_add(extensions, QCOW2_EXT_FEATURE_TABLE, table, length);
    }
    return extensions;
}

/* The header cluster; NULL when it does not hold everything. Also the last step of validation. */
static uint8_t *make_cluster0(const Qcow2CreateArgs *a, Layout *l, GError **errp)
{
    g_autoptr(GArray) extensions = make_extensions(a);
    g_autofree uint8_t *cluster0 = g_malloc(a->cluster_size);
    if (!qcow2_header_layout(&l->header, extensions, a->backing_file, cluster0, a->cluster_size,
                             &l->header, errp) ||
        !qcow2_header_validate(&l->header, false, errp)) {
        return NULL;
    }
    return g_steal_pointer(&cluster0);
}

/* ---------------------------------------------------------------- writing */

static int write_reftable(BlockBackend *blk, const Qcow2CreateArgs *a, const Layout *l)
{
    size_t bytes = l->reftable_clusters * a->cluster_size;
    g_autofree uint8_t *table = g_malloc0(bytes);
    uint64_t first = a->cluster_size * (1 + l->reftable_clusters);
    for (uint64_t i = 0; i < l->refblocks; i++) {
        qb_stbe64(table + i * 8, first + i * a->cluster_size);
    }
    return blk_pwrite(blk, (int64_t)a->cluster_size, (int64_t)bytes, table, 0);
}

static int write_refblocks(BlockBackend *blk, const Qcow2CreateArgs *a, const Layout *l)
{
    uint64_t per_block = a->cluster_size * 8 / a->refcount_bits;
    uint64_t used = 1 + l->reftable_clusters + l->refblocks + l->l1_clusters;
    uint64_t pos = a->cluster_size * (1 + l->reftable_clusters);
    g_autofree uint8_t *block = g_malloc(a->cluster_size);
    for (uint64_t i = 0; i < l->refblocks; i++, pos += a->cluster_size) {
        uint64_t counts = MIN(used - i * per_block, per_block);
        memset(block, 0, a->cluster_size);
        for (uint64_t slot = 0; slot < counts; slot++) {
            qcow2_refcount_write(block, l->header.refcount_order, slot, 1);
        }
        int ret = blk_pwrite(blk, (int64_t)pos, (int64_t)a->cluster_size, block, 0);
        if (ret < 0) {
            return ret;
        }
    }
    return 0;
}

/* A new file reads zeroes anyway, a device does not. */
static int write_l1(BlockBackend *blk, const Layout *l)
{
    int64_t bytes = (int64_t)l->header.l1_size * 8;
    return bytes ? blk_pwrite_zeroes(blk, (int64_t)l->header.l1_offset, bytes, 0) : 0;
}

static int write_image(BlockBackend *blk, const Qcow2CreateArgs *a, const Layout *l,
                       const uint8_t *cluster0)
{
    int ret = write_reftable(blk, a, l);
    ret = ret < 0 ? ret : write_refblocks(blk, a, l);
    ret = ret < 0 ? ret : write_l1(blk, l);
    ret = ret < 0 ? ret : blk_flush(blk);
    ret = ret < 0 ? ret : blk_pwrite(blk, 0, (int64_t)a->cluster_size, cluster0, 0);
    return ret < 0 ? ret : blk_flush(blk);
}

static bool write_file(const char *filename, const Qcow2CreateArgs *a, const Layout *l,
                       const uint8_t *cluster0, GError **errp)
{
    g_autoptr(BlockBackend) blk =
        blk_new_open(filename, NULL, BDRV_O_RDWR | BDRV_O_RESIZE | BDRV_O_PROTOCOL, errp);
    if (!blk || !blk_truncate(blk, (int64_t)l->end, false, PREALLOC_MODE_OFF, false, errp)) {
        return false;
    }
    int ret = write_image(blk, a, l, cluster0);
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Could not write the new image");
    }
    return ret == 0;
}

/* ---------------------------------------------------------------- filling */

/* What needs the image open: the length of the data file and preallocation. */
static bool fill(const char *filename, const Qcow2CreateArgs *a, QbProgress *progress,
                 GError **errp)
{
    if (!a->data_file && a->prealloc == PREALLOC_MODE_OFF) {
        return true;
    }
    json_t *options = json_pack("{s:s}", "driver", "qcow2");
    g_autoptr(BlockBackend) blk = blk_new_open(
        filename, options, BDRV_O_RDWR | BDRV_O_RESIZE | BDRV_O_NO_BACKING, errp);
    if (!blk || !qcow2_fill_new(blk_bs(blk), a->prealloc, progress, errp)) {
        return false;
    }
    int ret = blk_flush(blk);
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Could not write the new image");
    }
    return ret == 0;
}

/* Like the name in the header, it is a plain file name and not parsed. */
static bool create_data_file(const char *name, GError **errp)
{
    const BlockDriver *proto = bdrv_find_protocol(name, false, errp);
    g_autoptr(json_t) options = json_pack("{s:i}", "size", 0);
    return proto && proto->create(name, options, NULL, errp);
}

static bool create_files(const char *filename, const Qcow2CreateArgs *a, json_t *rest,
                         GError **errp)
{
    return bdrv_create_file(filename, rest, errp) &&
           (!a->data_file || create_data_file(a->data_file, errp));
}

static bool build(const char *filename, const Qcow2CreateArgs *a, Layout *l, json_t *rest,
                  QbProgress *progress, GError **errp)
{
    g_autofree uint8_t *cluster0 = make_cluster0(a, l, errp);
    if (!cluster0) {
        return false;
    }
    bool new_data_file = a->data_file && access(a->data_file, F_OK) < 0 && errno == ENOENT;
    if (create_files(filename, a, rest, errp) && write_file(filename, a, l, cluster0, errp) &&
        fill(filename, a, progress, errp)) {
        return true;
    }
    if (new_data_file) {
        unlink(a->data_file);
    }
    return false;
}

bool qcow2_create(const char *filename, json_t *options, QbProgress *progress, GError **errp)
{
    g_auto(Qcow2CreateArgs) args = {0};
    g_autoptr(json_t) rest = json_deep_copy(options);
    Layout layout = {0};
    if (!qcow2_create_args_take(rest, &args, errp) || !lay_out(&args, &layout, errp)) {
        return false;
    }
    return build(filename, &args, &layout, rest, progress, errp);
}
