/*
 * qemu-img resize --dry-run: what a shrink would cut off, without writing.
 *
 *      guest's disk  |==== kept ====|~~~~~~~~~ beyond ~~~~~~~~~~|
 *                    table of       | block status, in bulk; what may be data is read, CHUNK by CHUNK,
 *                    partitions     | DEPTH at once, and looked at in steps of GRAIN
 *      image file    bdrv_try_shrink() shrinks in memory and tells how long the file becomes
 *
 * Invariants
 *  1. The image is open read-only.
 *  2. Memory does not depend on the image: DEPTH chunks, and MAX_RANGES ranges; further ones are only
 *     counted.
 *  3. Exit status 2 if and only if the report names something that is lost: bytes other than zero, a
 *     partition, the backup of its table.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdio.h>
#include <stdlib.h>
#include "block/locks.h"
#include "qemu-img/img.h"
#include "qemu-img/partitions.h"
#include "util/iov.h"

#define CHUNK ((int64_t)1 << 20)
#define DEPTH 8
#define GRAIN 4096
#define MAX_RANGES 1000 /* listed */
#define MAX_LINES 20    /* of them for people */

enum { DRY_RUN_NO_LOSS = 0, DRY_RUN_FAILED = 1, DRY_RUN_LOSS = 2 };

typedef struct Range {
    int64_t start, end;
} Range;

typedef struct DryRun {
    BlockBackend *blk;
    int64_t current, size;
    BdrvFileLengths file;
    /* what is not zero beyond the new end */
    GArray *ranges; /* Range */
    uint64_t nb_ranges, bytes;
    Range last;     /* the one that may still grow, not counted yet; empty: none */
    ImgPartitionTable table;
    QbProgress progress;
    uint8_t *buf; /* DEPTH chunks */
    BdrvBatchOp ops[DEPTH];
    size_t n;
} DryRun;

/* ---- data beyond the end ---- */

static void finish_range(DryRun *d)
{
    if (d->last.start == d->last.end) {
        return;
    }
    d->bytes += (uint64_t)(d->last.end - d->last.start);
    d->nb_ranges++;
    if (d->ranges->len < MAX_RANGES) {
        g_array_append_val(d->ranges, d->last);
    }
}

static void add_range(DryRun *d, int64_t start, int64_t end)
{
    if (start != d->last.end || d->last.start == d->last.end) {
        finish_range(d);
        d->last.start = start;
    }
    d->last.end = end;
}

static void look_at(DryRun *d, const BdrvBatchOp *op)
{
    const uint8_t *buf = op->buf;
    for (int64_t pos = 0, bytes; pos < op->bytes; pos += bytes) {
        bytes = MIN(op->bytes - pos, GRAIN - (op->offset + pos) % GRAIN);
        if (!qb_buffer_is_zero(buf + pos, (size_t)bytes)) {
            add_range(d, op->offset + pos, op->offset + pos + bytes);
        }
    }
}

/* Reads what has been collected, and looks at it. */
static bool run_reads(DryRun *d)
{
    int ret = d->n ? blk_run_batch(d->blk, d->ops, d->n) : 0;
    for (size_t i = 0; i < d->n && ret == 0; i++) {
        look_at(d, &d->ops[i]);
        qb_progress_add(&d->progress, (uint64_t)d->ops[i].bytes);
    }
    d->n = 0;
    if (ret < 0) {
        img_error("Error while reading the image: %s", g_strerror(-ret));
    }
    return ret == 0;
}

/* [pos, end) may hold data. */
static bool read_extent(DryRun *d, int64_t pos, int64_t end)
{
    for (int64_t bytes; pos < end; pos += bytes) {
        bytes = MIN(end - pos, CHUNK);
        d->ops[d->n] = (BdrvBatchOp){.kind = BDRV_BATCH_READ, .offset = pos, .bytes = bytes,
                                     .buf = d->buf + (int64_t)d->n * CHUNK};
        d->n++;
        if (d->n == DEPTH && (img_interrupted() || !run_reads(d))) {
            return false;
        }
    }
    return true;
}

static int next_extent(DryRun *d, int64_t pos, BdrvStatus *ret)
{
    BDRV_GRAPH_GUARD();
    return bdrv_block_status_above(blk_bs(d->blk), NULL, pos, d->current - pos, ret);
}

static bool scan(DryRun *d)
{
    BdrvStatus st = {0};
    for (int64_t pos = d->size; pos < d->current; pos += st.bytes) {
        int ret = next_extent(d, pos, &st);
        if (ret < 0) {
            img_error("Could not get the status of offset %" PRId64 ": %s", pos, g_strerror(-ret));
            return false;
        }
        if (st.flags & BDRV_BLOCK_ZERO) {
            qb_progress_add(&d->progress, (uint64_t)st.bytes);
        } else if (!read_extent(d, pos, pos + st.bytes)) {
            return false;
        }
    }
    bool ok = !img_interrupted() && run_reads(d);
    finish_range(d);
    return ok;
}

/* ---- partitions, and the length of the file ---- */

static int read_disk(void *opaque, uint64_t offset, size_t bytes, void *buf)
{
    return blk_pread(opaque, (int64_t)offset, (int64_t)bytes, buf, 0);
}

static bool find_partitions(DryRun *d)
{
    int ret = img_partitions_read(read_disk, d->blk, (uint64_t)d->current, &d->table);
    if (ret < 0) {
        img_error("Could not read the partition table: %s", g_strerror(-ret));
    }
    return ret == 0;
}

static bool try_shrink(DryRun *d)
{
    GError *err = NULL;
    if (!bdrv_try_shrink(blk_bs(d->blk), d->size, &d->file, &err)) {
        img_report(err, DRY_RUN_FAILED);
        return false;
    }
    return true;
}

static bool is_cut(const DryRun *d, uint64_t end)
{
    return end > (uint64_t)d->size;
}

static bool backup_is_cut(const DryRun *d)
{
    return d->table.has_backup && is_cut(d, d->table.backup_end);
}

static bool loses(const DryRun *d)
{
    return d->nb_ranges || is_cut(d, d->table.last_end) || backup_is_cut(d);
}

/* ---- the report ---- */

static json_t *integer_or_null(int64_t n)
{
    return n < 0 ? json_null() : json_integer(n);
}

static json_t *data_json(const DryRun *d)
{
    json_t *list = json_array(), *obj = json_object();
    for (guint i = 0; i < d->ranges->len; i++) {
        const Range *r = &g_array_index(d->ranges, Range, i);
        json_t *item = json_object();
        json_object_set_new(item, "start", json_integer(r->start));
        json_object_set_new(item, "length", json_integer(r->end - r->start));
        json_array_append_new(list, item);
    }
    json_object_set_new(obj, "bytes", json_integer((json_int_t)d->bytes));
    json_object_set_new(obj, "ranges", list);
    json_object_set_new(obj, "ranges-omitted",
                        json_integer((json_int_t)(d->nb_ranges - d->ranges->len)));
    return obj;
}

static json_t *cut_partitions_json(const DryRun *d)
{
    json_t *list = json_array();
    for (guint i = 0; i < d->table.partitions->len; i++) {
        const ImgPartition *p = &g_array_index(d->table.partitions, ImgPartition, i);
        if (!is_cut(d, p->end)) {
            continue;
        }
        json_t *item = json_object();
        json_object_set_new(item, "number", json_integer(p->number));
        json_object_set_new(item, "start", json_integer((json_int_t)p->start));
        json_object_set_new(item, "end", json_integer((json_int_t)p->end));
        json_array_append_new(list, item);
    }
    return list;
}

static json_t *table_json(const DryRun *d)
{
    const ImgPartitionTable *t = &d->table;
    if (!t->type) {
        return json_null();
    }
    json_t *obj = json_object();
    json_object_set_new(obj, "type", json_string(t->type));
    json_object_set_new(obj, "sector-size", json_integer(t->sector_size));
    json_object_set_new(obj, "last-partition-end", json_integer((json_int_t)t->last_end));
    json_object_set_new(obj, "minimum-size", json_integer((json_int_t)t->minimum_size));
    json_object_set_new(obj, "backup-header-cut", json_boolean(backup_is_cut(d)));
    json_object_set_new(obj, "partitions-cut", cut_partitions_json(d));
    return obj;
}

static void print_json(const DryRun *d)
{
    g_autoptr(json_t) obj = json_object();
    json_object_set_new(obj, "virtual-size", json_integer(d->current));
    json_object_set_new(obj, "new-virtual-size", json_integer(d->size));
    json_object_set_new(obj, "file-length", integer_or_null(d->file.now));
    json_object_set_new(obj, "new-file-length", integer_or_null(d->file.then));
    json_object_set_new(obj, "data", data_json(d));
    json_object_set_new(obj, "partition-table", table_json(d));
    json_object_set_new(obj, "loss", json_boolean(loses(d)));
    tool_print_json(obj);
}

static void print_length(const char *what, int64_t bytes)
{
    if (bytes < 0) {
        printf("%s: not known\n", what);
    } else {
        printf("%s: %" PRId64 " bytes\n", what, bytes);
    }
}

static void print_data(const DryRun *d)
{
    printf("data beyond the new end: %" PRIu64 " bytes in %" PRIu64 " ranges\n", d->bytes,
           d->nb_ranges);
    for (guint i = 0; i < MIN(d->ranges->len, MAX_LINES); i++) {
        const Range *r = &g_array_index(d->ranges, Range, i);
        printf("    0x%" PRIx64 ", length 0x%" PRIx64 "\n", r->start, r->end - r->start);
    }
    if (d->nb_ranges > MAX_LINES) {
        printf("    and %" PRIu64 " more\n", d->nb_ranges - MAX_LINES);
    }
}

static void print_table(const DryRun *d)
{
    const ImgPartitionTable *t = &d->table;
    if (!t->type) {
        printf("partition table: none found\n");
        return;
    }
    printf("partition table: %s, sectors of %u bytes\n", t->type, t->sector_size);
    printf("last partition ends at: %" PRIu64 "\n", t->last_end);
    printf("minimum size for it: %" PRIu64 "\n", t->minimum_size);
    for (guint i = 0; i < t->partitions->len; i++) {
        const ImgPartition *p = &g_array_index(t->partitions, ImgPartition, i);
        if (is_cut(d, p->end)) {
            printf("partition %u would be cut: %" PRIu64 " to %" PRIu64 "\n", p->number, p->start,
                   p->end);
        }
    }
    if (backup_is_cut(d)) {
        printf("the backup of the partition table would be cut\n");
    }
}

static void print_human(const DryRun *d)
{
    print_length("virtual size", d->current);
    print_length("new virtual size", d->size);
    print_length("file length", d->file.now);
    print_length("new file length", d->file.then);
    print_data(d);
    print_table(d);
    printf("%s\n", loses(d) ? "Data would be lost." : "Nothing would be lost.");
}

/* ---- */

static bool look(DryRun *d, bool progress)
{
    if (!find_partitions(d) || !try_shrink(d)) {
        return false;
    }
    qb_progress_init(&d->progress, (uint64_t)MAX(d->current - d->size, 0));
    img_progress_start(&d->progress, progress);
    bool ok = scan(d);
    img_progress_end(ok);
    if (!ok && img_interrupted()) {
        img_error("Interrupted; nothing was written");
    }
    return ok;
}

int img_resize_dry_run(BlockBackend *blk, const ImgDryRun *how)
{
    DryRun d = {.blk = blk, .current = blk_getlength(blk), .size = how->size,
                .ranges = g_array_new(false, false, sizeof(Range)),
                .buf = bdrv_try_blockalign(blk_bs(blk), DEPTH * CHUNK)};
    int status = DRY_RUN_FAILED;
    if (!d.buf) {
        img_error("Not enough memory for a buffer of %" PRId64 " bytes", DEPTH * CHUNK);
    } else if (look(&d, how->progress)) {
        if (!how->quiet) {
            (how->json ? print_json : print_human)(&d);
        }
        status = loses(&d) ? DRY_RUN_LOSS : DRY_RUN_NO_LOSS;
    }
    free(d.buf);
    g_array_unref(d.ranges);
    img_partitions_clear(&d.table);
    return status;
}
