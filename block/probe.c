/*
 * Probing: which format the first bytes of a file are.
 *
 *     file node --first 2048 bytes--> each format's probe() --> score 0..100, best one wins
 *
 * Formats are asked in the order of the registry; of equal scores the first one counts.  Raw knows
 * every content with the lowest score: that guess is what the warning of the core is about, because
 * whoever can write the first sector of a guessed image could turn it into any other format.
 *
 * Invariants
 *  1. The buffer is as long as BDRV_PROBE_BYTES and zero behind what the file holds.
 *  2. Probing reads and nothing else; it needs no permission that others could refuse.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdlib.h>
#include "block/core-int.h"

/* An image too short for any header is raw; so is one whose length is not known. */
static bool is_empty(BlockDriverState *file)
{
    return bdrv_getlength(file) <= 0;
}

static const BlockDriver *best_format(const uint8_t *buf, size_t len, const char *filename)
{
    const BlockDriver *best = NULL;
    int best_score = 0;
    for (unsigned i = 0; i < bdrv_driver_count(); i++) {
        const BlockDriver *drv = bdrv_driver_at(i);
        int score = drv->probe ? drv->probe(buf, len, filename) : 0;
        if (score > best_score) {
            best = drv;
            best_score = score;
        }
    }
    return best;
}

/* Reads the head of @file into @buf; its length or -errno. */
static int64_t read_head(BlockDriverState *file, uint8_t *buf, GError **errp)
{
    int64_t len = MIN(bdrv_getlength(file), BDRV_PROBE_BYTES);
    g_autoptr(BlockBackend) blk = blk_new_with_bs(file, 0, BLK_PERM_ALL, errp);
    if (!blk) {
        return -EIO;
    }
    int ret = blk_pread(blk, 0, len, buf, 0);
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Could not read image for determining its format");
        return ret;
    }
    return len;
}

const BlockDriver *bdrv_probe_format(BlockDriverState *file, const char *filename, GError **errp)
{
    const BlockDriver *raw = bdrv_find_format("raw");
    const BlockDriver *best = NULL;
    if (!is_empty(file)) {
        g_autofree uint8_t *buf = g_malloc0(BDRV_PROBE_BYTES);
        int64_t len = read_head(file, buf, errp);
        if (len < 0) {
            return NULL;
        }
        best = best_format(buf, (size_t)len, filename);
    }
    if (!best) {
        best = raw;
    }
    if (!best) {
        qb_error_set(errp, ENOENT, "Could not determine image format: No compatible driver found");
    }
    return best;
}
