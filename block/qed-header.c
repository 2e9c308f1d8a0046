/*
 * The QED header as bytes and as a struct, and what makes it legal.
 *
 *     64 bytes --decode--> QedHeader --validate--> fit to be opened
 *              <--encode--
 *
 * All functions are pure.  Sizes are multiplied in 128 bits: with the largest clusters and tables a
 * disk could have 2^80 bytes, which no file offset reaches.
 *
 * Rules
 *  1. Unknown incompatible features are refused before anything whose meaning they may have
 *     changed.
 *  2. header_size 0 would let data be written over the header: refused.
 *  3. The L1 table lies inside the file as a whole.  A table of one cluster is as good as any.
 *
 * Not done: compat and autoclear features have no meaning here; who changes the image looks at
 * them.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qed.h"

#include <inttypes.h>

bool qed_header_decode(const uint8_t *buf, QedHeader *ret, GError **errp)
{
    if (qb_ldle32(buf) != QED_MAGIC) {
        qb_error_set(errp, EINVAL, "Image not in QED format");
        return false;
    }
    *ret = (QedHeader){
        .cluster_size = qb_ldle32(buf + 4),
        .table_size = qb_ldle32(buf + 8),
        .header_size = qb_ldle32(buf + 12),
        .features = qb_ldle64(buf + 16),
        .compat_features = qb_ldle64(buf + 24),
        .autoclear_features = qb_ldle64(buf + 32),
        .l1_offset = qb_ldle64(buf + 40),
        .image_size = qb_ldle64(buf + 48),
        .backing_offset = qb_ldle32(buf + 56),
        .backing_size = qb_ldle32(buf + 60),
    };
    return true;
}

void qed_header_encode(const QedHeader *h, uint8_t *buf)
{
    qb_stle32(buf, QED_MAGIC);
    qb_stle32(buf + 4, h->cluster_size);
    qb_stle32(buf + 8, h->table_size);
    qb_stle32(buf + 12, h->header_size);
    qb_stle64(buf + 16, h->features);
    qb_stle64(buf + 24, h->compat_features);
    qb_stle64(buf + 32, h->autoclear_features);
    qb_stle64(buf + 40, h->l1_offset);
    qb_stle64(buf + 48, h->image_size);
    qb_stle32(buf + 56, h->backing_offset);
    qb_stle32(buf + 60, h->backing_size);
}

bool qed_cluster_size_valid(uint64_t cluster_size)
{
    return qb_is_power_of_2(cluster_size) && cluster_size >= QED_MIN_CLUSTER_SIZE &&
           cluster_size <= QED_MAX_CLUSTER_SIZE;
}

bool qed_table_size_valid(uint64_t table_size)
{
    return qb_is_power_of_2(table_size) && table_size >= QED_MIN_TABLE_SIZE &&
           table_size <= QED_MAX_TABLE_SIZE;
}

uint64_t qed_max_image_size(uint64_t cluster_size, uint64_t table_size)
{
    unsigned __int128 entries = cluster_size * table_size / QED_ENTRY_BYTES;
    unsigned __int128 size = entries * entries * cluster_size;
    uint64_t limit = qb_align_down(INT64_MAX, BDRV_SECTOR_SIZE);
    return size < limit ? (uint64_t)size : limit;
}

static bool fail(GError **errp, const char *text)
{
    qb_error_set(errp, EINVAL, "%s", text);
    return false;
}

static bool validate_features(const QedHeader *h, GError **errp)
{
    uint64_t unknown = h->features & ~QED_F_KNOWN;
    if (unknown) {
        qb_error_set(errp, ENOTSUP, "Unsupported QED features: %" PRIx64, unknown);
    }
    return !unknown;
}

static bool validate_sizes(const QedHeader *h, GError **errp)
{
    if (!qed_cluster_size_valid(h->cluster_size)) {
        return fail(errp, "QED cluster size is invalid");
    }
    if (!qed_table_size_valid(h->table_size)) {
        return fail(errp, "QED table size is invalid");
    }
    if (h->header_size == 0) {
        return fail(errp, "QED header size is invalid");
    }
    if ((uint64_t)h->header_size * h->cluster_size > UINT32_MAX) {
        return fail(errp, "QED header size is too large");
    }
    if (!qb_is_aligned(h->image_size, BDRV_SECTOR_SIZE) ||
        h->image_size > qed_max_image_size(h->cluster_size, h->table_size)) {
        return fail(errp, "QED image size is invalid");
    }
    return true;
}

static bool validate_l1(const QedHeader *h, uint64_t file_length, GError **errp)
{
    uint64_t end;
    if (!qb_is_aligned(h->l1_offset, h->cluster_size) ||
        h->l1_offset < (uint64_t)h->header_size * h->cluster_size ||
        qb_add_overflow(h->l1_offset, qed_header_table_bytes(h), &end) ||
        end > qb_align_down(file_length, h->cluster_size)) {
        return fail(errp, "QED table offset is invalid");
    }
    return true;
}

static bool validate_name(const QedHeader *h, GError **errp)
{
    if (!(h->features & QED_F_BACKING_FILE)) {
        return true;
    }
    uint64_t end = (uint64_t)h->backing_offset + h->backing_size;
    if (end > (uint64_t)h->header_size * h->cluster_size ||
        h->backing_size > QED_MAX_BACKING_NAME) {
        return fail(errp, "QED backing filename offset is invalid");
    }
    return true;
}

bool qed_header_validate(const QedHeader *h, uint64_t file_length, GError **errp)
{
    return validate_features(h, errp) && validate_sizes(h, errp) &&
           validate_l1(h, file_length, errp) && validate_name(h, errp);
}
