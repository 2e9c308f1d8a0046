/*
 * Check: an active L1 table that claims more entries than it can have, or fewer than it needs.
 *
 *      header says   [ needed by the disk | ...................................... ]
 *      the file has  [ needed by the disk | zeroes | another structure | ...
 *                                                  `-- here it must end
 *
 * Entries beyond the guest's disk map nothing but the VM state of a machine that is being saved.  A
 * count of entries that makes the table run into another structure, or over the end of the file,
 * would turn whatever lies there into thousands of findings, and repairing those would destroy it.
 * So the table is looked at as far as it can reach; a repair writes that length into the header.
 *
 * Invariants
 *   1. Entries that the disk needs are never cut off.
 *   2. As long as the header is not repaired nothing that the rest may refer to is taken for free.
 *
 * Fewer than needed, and nothing else where the missing ones must be: then they are still there,
 * and the number alone is wrong.
 *
 * Guest data it may run into are looked for only if the entries in question are not all zero, which
 * is rare: that takes reading the tables once more.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-check.h"

#include <inttypes.h>

/* Where a table from @begin on must end, given that something else lies at @other. */
static void bound(const Qcow2Check *c, uint64_t begin, uint64_t other, uint64_t *end)
{
    if (other > begin && other < *end && !qcow2_offset_into_cluster(c->s, other)) {
        *end = other;
    }
}

static void bound_by_refcounts(const Qcow2Check *c, uint64_t begin, uint64_t *end)
{
    const struct Qcow2Reftable *table = &c->s->reftable;
    bound(c, begin, c->s->header.reftable_offset, end);
    for (uint64_t i = 0; i < table->nb_entries; i++) {
        bound(c, begin, table->entries[i] & QCOW2_REFTABLE_OFFSET_MASK, end);
    }
}

static void bound_by_snapshots(const Qcow2Check *c, uint64_t begin, uint64_t *end)
{
    const GArray *list = c->s->snapshots;
    if (c->s->header.nb_snapshots) {
        bound(c, begin, c->s->header.snapshots_offset, end);
    }
    for (guint i = 0; list && i < list->len; i++) {
        bound(c, begin, g_array_index(list, Qcow2Snapshot, i).l1_offset, end);
    }
}

static void bound_by_tables(const Qcow2Check *c, uint64_t begin, uint64_t needed, uint64_t *end)
{
    for (uint64_t i = 0; i < needed; i++) {
        bound(c, begin, be64toh(c->be_l1[i]) & QCOW2_ENTRY_OFFSET_MASK, end);
    }
}

/* Where a table must end because of guest data. */
typedef struct DataBound {
    const Qcow2Check *c;
    uint64_t begin, *end;
} DataBound;

static int bound_by_entries(const Qcow2WalkTable *table, void *opaque)
{
    DataBound *b = opaque;
    const BDRVQcow2State *s = b->c->s;
    for (uint32_t i = 0; table->be && i < s->l2_entries; i++) {
        uint64_t entry = qcow2_check_entry(s, (const uint8_t *)table->be, i).entry, host;
        uint32_t bytes;
        if (entry & QCOW2_ENTRY_COMPRESSED) {
            qcow2_parse_compressed(s, entry & ~QCOW2_ENTRY_COPIED, &host, &bytes);
            bound(b->c, b->begin, qcow2_start_of_cluster(s, host), b->end);
        } else if (!s->has_data_file) {
            bound(b->c, b->begin, entry & QCOW2_ENTRY_OFFSET_MASK, b->end);
        }
    }
    return qcow2_check_cancelled(b->c) ? -EINTR : 0;
}

/* The first @n entries of L1, without those that name a table again, or one that cannot be read: a
 * hostile one names one table a million times. */
static uint64_t *each_table_once(const Qcow2Check *c, uint64_t n)
{
    uint64_t *be = g_memdup2(c->be_l1, n * sizeof(*be));
    g_autoptr(GHashTable) seen = g_hash_table_new(NULL, NULL);
    for (uint64_t i = 0; i < n; i++) {
        uint64_t offset = be64toh(be[i]) & QCOW2_ENTRY_OFFSET_MASK;
        if (offset >= c->file_bytes || qcow2_offset_into_cluster(c->s, offset) ||
            !g_hash_table_add(seen, (gpointer)(uintptr_t)offset)) {
            be[i] = 0;
        }
    }
    return be;
}

static void bound_by_data(const Qcow2Check *c, uint64_t begin, uint64_t needed, uint64_t *end)
{
    DataBound b = {.c = c, .begin = begin, .end = end};
    g_autofree uint64_t *be_l1 = each_table_once(c, needed);
    Qcow2WalkSource src = {.be_l1 = be_l1, .l1_size = needed};
    qcow2_walk_tables(c->bs, &src, 0, c->s->header.size, bound_by_entries, &b);
}

/* Are all entries from @first on zero? */
static bool rest_is_zero(const Qcow2Check *c, uint64_t first)
{
    uint64_t any = 0;
    for (uint64_t i = first; i < c->l1_size; i++) {
        any |= c->be_l1[i];
    }
    return !any;
}

/* How many entries there is room for. */
static uint64_t room(const Qcow2Check *c, uint64_t needed)
{
    const BDRVQcow2State *s = c->s;
    uint64_t begin = s->header.l1_offset, end = c->nb_clusters << s->cluster_bits;
    uint64_t known = MIN(needed, c->l1_size);
    if (begin >= end) {
        return 0;
    }
    bound_by_refcounts(c, begin, &end);
    bound_by_snapshots(c, begin, &end);
    bound_by_tables(c, begin, known, &end);
    if (needed > c->l1_size || !rest_is_zero(c, needed)) {
        bound_by_data(c, begin, known, &end);
    }
    return (end - begin) / sizeof(uint64_t);
}

/* The table is to be of @entries. */
static void resized(Qcow2Check *c, uint64_t entries)
{
    c->l1_size = (uint32_t)entries;
    c->l1_resized = true;
    c->incomplete |= !(c->fix & BDRV_FIX_ERRORS);
}

static void check_too_long(Qcow2Check *c, uint64_t needed)
{
    uint64_t fits = MAX(needed, room(c, needed));
    if (c->s->header.l1_offset >= c->nb_clusters << c->s->cluster_bits || fits >= c->l1_size) {
        return;
    }
    qcow2_check_report(c, BDRV_FINDING_CORRUPTION, false, "l1-too-long", c->s->header.l1_offset,
                       "ERROR active L1 table of %" PRIu32
                       " entries reaches into other structures: there is room for %" PRIu64,
                       c->l1_size, fits);
    resized(c, fits);
}

static void check_too_short(Qcow2Check *c, uint64_t needed)
{
    uint64_t *be = NULL, offset = c->s->header.l1_offset;
    qcow2_check_report(c, BDRV_FINDING_CORRUPTION, false, "l1-too-short", offset,
                       "ERROR active L1 table of %" PRIu32 " entries is too short for the disk: "
                       "%" PRIu64 " are needed",
                       c->l1_size, needed);
    if (offset && needed <= MIN(room(c, needed), QCOW2_MAX_L1_BYTES / sizeof(uint64_t))) {
        be = qcow2_read_l1(c->bs, offset, (uint32_t)needed, "Active L1 table", NULL);
    }
    if (be) {
        g_free(c->be_l1);
        c->be_l1 = be;
        resized(c, needed);
    } else {
        c->incomplete = true; /* what the rest refers to is not known */
    }
}

void qcow2_check_l1_length(Qcow2Check *c)
{
    uint64_t needed = qcow2_size_to_l1(c->s, c->s->header.size);
    if (needed < c->l1_size) {
        check_too_long(c, needed);
    } else if (needed > c->l1_size) {
        check_too_short(c, needed);
    }
}

static void set_l1_size(Qcow2Header *h, void *opaque)
{
    const Qcow2Check *c = opaque;
    h->l1_size = c->l1_size;
}

bool qcow2_check_resize_l1(Qcow2Check *c)
{
    if (!c->l1_resized) {
        return true;
    }
    int ret = qcow2_header_update(c->bs, set_l1_size, c, true);
    c->touched = true;
    if (ret < 0) {
        c->write_failed = true;
        qcow2_check_report(c, BDRV_FINDING_CHECK_ERROR, false, "write-failed", 0,
                           "ERROR setting the length of the L1 table: %s", g_strerror(-ret));
        return false;
    }
    c->l1_resized = false;
    qcow2_check_mark_fixed(c, BDRV_FINDING_CORRUPTION, 1);
    qcow2_check_report(c, BDRV_FINDING_INFO, true, "l1-resized", c->s->header.l1_offset,
                       "Repairing active L1 table: it has %" PRIu32 " entries now", c->l1_size);
    return true;
}
