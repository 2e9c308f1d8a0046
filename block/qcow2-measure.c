/*
 * How large a new image would be: arithmetic on the options of creation and on the source's block
 * status.  No guest data is read, and nothing is written.
 *
 *     fully allocated = header | L1 | L2 tables | guest clusters, and the refcount blocks and table
 *                       that count these and themselves
 *     required        = fully allocated - guest clusters + clusters that the source has data in
 *     bitmaps         = for each of the source's: table and data; the directory
 *
 * Invariants
 *  1. required <= fully allocated, and no image made from the source with these options takes more
 *     than required says: so the tables are those of the full image, also for an empty source.
 *  2. A cluster of the new image counts once, whatever number of the source's extents touch it.
 *     Zeroes count nothing, compressed data count in full.
 *  3. What preallocation fills counts as data; so does everything when the new image has a backing
 *     file, as nobody knows what of the source that file holds already.
 *
 * An external data file is counted with the image that it belongs to.
 *
 * Not done: no estimate of compression; encryption cannot be asked for yet.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-create.h"

/* ---------------------------------------------------------------- source */

/* Clusters of @cluster_size bytes that hold data in @source or in what is below it, or -errno. */
static int64_t count_data_clusters(BlockDriverState *source, int64_t length, uint64_t cluster_size)
{
    const int wanted = BDRV_BLOCK_DATA | BDRV_BLOCK_ALLOCATED;
    int64_t offset = 0, clusters = 0;
    while (offset < length) {
        BdrvStatus st;
        int ret = bdrv_block_status_above(source, NULL, offset, length - offset, &st);
        if (ret < 0 || st.bytes == 0) {
            return ret < 0 ? ret : clusters;
        }
        int64_t end = offset + st.bytes;
        if ((st.flags & (wanted | BDRV_BLOCK_ZERO)) == wanted) {
            uint64_t first = qb_align_down((uint64_t)offset, cluster_size);
            end = (int64_t)qb_align_up((uint64_t)end, cluster_size); /* invariant 2 */
            clusters += (int64_t)(((uint64_t)end - first) / cluster_size);
        }
        offset = end;
    }
    return clusters;
}

/* ---------------------------------------------------------------- bitmaps */

/* Table and data of a bitmap, all of its bits being set. */
static uint64_t bitmap_clusters(uint64_t disk_size, unsigned granularity_bits,
                                uint64_t cluster_size)
{
    uint64_t bits = qb_div_round_up(disk_size, UINT64_C(1) << granularity_bits);
    uint64_t data = qb_div_round_up(qb_div_round_up(bits, 8), cluster_size);
    return data + qb_div_round_up(data * 8, cluster_size);
}

/* What the source's bitmaps take in the new image; broken ones are left out, as nobody would copy them.
 * Sums cannot overflow before the last step: there are at most 2^16 bitmaps of 2^55 clusters. */
static bool measure_bitmaps(BlockDriverState *source, const Qcow2CreateArgs *a, uint64_t *ret,
                            GError **errp)
{
    uint64_t clusters = 0, dir_bytes = 0;
    Qcow2BitmapFacts facts;
    for (guint i = 0; qcow2_bitmap_facts(qcow2_state(source), i, &facts); i++) {
        if (!facts.broken && !(facts.flags & QCOW2_BITMAP_IN_USE)) {
            clusters += bitmap_clusters(a->size, facts.granularity_bits, a->cluster_size);
            dir_bytes += qb_align_up(QCOW2_BITMAP_FIXED + facts.name_bytes, 8);
        }
    }
    clusters += qb_div_round_up(dir_bytes, a->cluster_size);
    if (qb_mul_overflow(clusters, a->cluster_size, ret) || *ret > INT64_MAX) {
        qb_error_set(errp, EFBIG, "The bitmaps are too large");
        return false;
    }
    return true;
}

/* True when both @source and the new image can hold bitmaps. */
static bool has_bitmaps(BlockDriverState *source, const Qcow2CreateArgs *a)
{
    return a->version >= 3 && source && source->drv == &bdrv_qcow2 &&
           qcow2_state(source)->version >= 3;
}

/* ---------------------------------------------------------------- the new image */

/* Clusters of everything that is not guest data; false: such an image cannot be. */
static bool count_metadata(const Qcow2CreateArgs *a, uint64_t guest_clusters, uint64_t *ret,
                           GError **errp)
{
    uint64_t l2_tables = qcow2_new_l2_tables(a), blocks, table;
    if (l2_tables > QCOW2_MAX_L1_BYTES / 8) {
        qb_error_set(errp, EFBIG,
                     "The image size is too large (try using a larger cluster size)");
        return false;
    }
    uint64_t tables = 1 + qb_div_round_up(l2_tables * 8, a->cluster_size) + l2_tables;
    qcow2_settle_refcounts(a, tables + guest_clusters, &blocks, &table);
    *ret = tables + blocks + table;
    return true;
}

/* Guest clusters that would be there from the beginning, or be written; or -errno. */
static int64_t count_needed(BlockDriverState *source, const Qcow2CreateArgs *a,
                            uint64_t guest_clusters)
{
    if (a->prealloc == PREALLOC_MODE_FALLOC || a->prealloc == PREALLOC_MODE_FULL ||
        (source && a->backing_file)) {
        return (int64_t)guest_clusters;
    }
    return source ? count_data_clusters(source, (int64_t)a->size, a->cluster_size) : 0;
}

static bool measure(BlockDriverState *source, const Qcow2CreateArgs *a, BlockMeasureInfo *ret,
                    GError **errp)
{
    uint64_t guest_clusters = qb_div_round_up(a->size, a->cluster_size), metadata;
    if (!count_metadata(a, guest_clusters, &metadata, errp)) {
        return false;
    }
    int64_t needed = count_needed(source, a, guest_clusters);
    if (needed < 0) {
        qb_error_set_errno(errp, (int)needed, "Unable to get block status");
        return false;
    }
    assert((uint64_t)needed <= guest_clusters); /* invariant 1 */
    ret->required = (metadata + (uint64_t)needed) * a->cluster_size;
    ret->fully_allocated = (metadata + guest_clusters) * a->cluster_size;
    ret->has_bitmaps = has_bitmaps(source, a);
    return !ret->has_bitmaps || measure_bitmaps(source, a, &ret->bitmaps, errp);
}

bool qcow2_measure(json_t *options, BlockDriverState *source, BlockMeasureInfo *ret, GError **errp)
{
    g_auto(Qcow2CreateArgs) args = {0};
    return qcow2_create_args_take(options, &args, errp) && measure(source, &args, ret, errp);
}
