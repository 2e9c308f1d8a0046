/*
 * Check: who refers to which host cluster, down to the L2 tables.
 *
 *   header            cluster 0
 *   active L1         c->be_l1, from memory after a flush
 *   snapshot L1s      read from the file                        L2 tables, each once:
 *        |                                                        offset  refs  active_refs
 *        `--> every entry that can be right ---- add_table() -->  0x40000   3        1
 *                                                                 0x90000   1        0
 *   snapshot table, crypto area, bitmaps (qcow2-check-bitmaps.c)
 *
 * Invariants
 *   1. A table is listed once, with the number of L1 entries that name it.  So its entries are read
 *      and judged once and counted that many times: the cost is the number of tables, not the
 *      number of snapshots times their tables.
 *   2. The L1 tables of snapshots are read in one sweep over the file: where they overlap (a
 *      hostile image) an entry is read once and counted as often as tables hold it.  So no more is
 *      read than the file has, whatever 65536 snapshots claim.
 *   3. Active tables come first, in L1 order; the others by host offset.
 *
 * An L1 entry that is not aligned keeps the cluster it points into from being freed, but nothing is
 * read through it (qcow2-check-find.c looks for its table).
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-check.h"

#include <inttypes.h>

/* A LUKS header with key material takes 2 MiB; a claim is not worth counting clusters for. */
#define MAX_CRYPTO_BYTES (UINT64_C(256) << 20)

/* ---------------------------------------------------------------- counting */

static bool ends_within(const Qcow2Check *c, uint64_t length, uint64_t offset, uint64_t bytes)
{
    uint64_t end;
    return !qb_add_overflow(offset, bytes, &end) && offset <= length &&
           (end <= length || end - length < c->s->cluster_size);
}

bool qcow2_check_is_inside(const Qcow2Check *c, uint64_t offset, uint64_t bytes)
{
    return ends_within(c, c->file_bytes, offset, bytes);
}

bool qcow2_check_was_inside(const Qcow2Check *c, uint64_t offset, uint64_t bytes)
{
    return ends_within(c, c->counted_bytes, offset, bytes);
}

bool qcow2_check_inside(Qcow2Check *c, uint64_t offset, uint64_t bytes)
{
    if (qcow2_check_is_inside(c, offset, bytes)) {
        return true;
    }
    qcow2_check_report(c, BDRV_FINDING_CORRUPTION, false, "beyond-end-of-file", offset,
                       "ERROR: counting reference for region exceeding the end of the file by one "
                       "cluster or more: offset 0x%" PRIx64 " size 0x%" PRIx64,
                       offset, bytes);
    return false;
}

void qcow2_check_overflow(uint64_t cluster, void *opaque)
{
    Qcow2Check *c = opaque;
    uint64_t offset = cluster << c->s->cluster_bits;
    c->overflows++;
    qcow2_check_report(c, BDRV_FINDING_CORRUPTION, false, "refcount-overflow", offset,
                       "ERROR: overflow cluster offset=0x%" PRIx64, offset);
    qcow2_check_report(c, BDRV_FINDING_INFO, false, "refcount-overflow", offset,
                       "Use qemu-img amend to increase the refcount entry width or qemu-img "
                       "convert to create a clean copy if the image cannot be opened for writing");
}

bool qcow2_check_count(Qcow2Check *c, uint64_t offset, uint64_t bytes, uint64_t times,
                       unsigned flags)
{
    if (!bytes) {
        return true;
    }
    if (!qcow2_check_inside(c, offset, bytes)) {
        return false;
    }
    uint64_t first = offset >> c->s->cluster_bits;
    uint64_t last = (offset + bytes - 1) >> c->s->cluster_bits;
    qcow2_refmap_add(c->map, first, last - first + 1, times, flags, qcow2_check_overflow, c);
    return true;
}

/* ---------------------------------------------------------------- the list of tables */

static void add_table(Qcow2Check *c, uint64_t offset, uint64_t times, bool active,
                      uint32_t l1_index, unsigned flags)
{
    gpointer key = (gpointer)(uintptr_t)(offset >> c->s->cluster_bits), pos;
    Qcow2CheckTable *t;
    if (g_hash_table_lookup_extended(c->table_index, key, NULL, &pos)) {
        t = &g_array_index(c->tables, Qcow2CheckTable, GPOINTER_TO_UINT(pos));
    } else {
        Qcow2CheckTable fresh = {.offset = offset, .active_index = l1_index};
        g_hash_table_insert(c->table_index, key, GUINT_TO_POINTER(c->tables->len));
        g_array_append_val(c->tables, fresh);
        t = &g_array_index(c->tables, Qcow2CheckTable, c->tables->len - 1);
    }
    t->refs = MIN(t->refs + times, UINT32_MAX);
    t->active_refs += active;
    t->flags |= flags;
}

void qcow2_check_bad_l1_entry(Qcow2Check *c, const Qcow2LostTable *lost)
{
    BDRVQcow2State *s = c->s;
    uint64_t offset = lost->entry & QCOW2_ENTRY_OFFSET_MASK;
    uint64_t start = qcow2_start_of_cluster(s, offset);
    qcow2_check_not_followed(c); /* it may be all that the table maps */
    c->copied_uncounted |= lost->l1_index != UINT32_MAX;
    if (!qcow2_offset_into_cluster(s, offset)) {
        qcow2_check_inside(c, offset, s->cluster_size);
        return;
    }
    if (qcow2_check_is_inside(c, start, s->cluster_size)) {
        qcow2_check_count(c, start, s->cluster_size, lost->times, QCOW2_REF_L2);
    }
    qcow2_check_report(c, BDRV_FINDING_CORRUPTION, false, "l1-entry-unaligned", offset,
                       "ERROR l2_offset=%" PRIx64
                       ": Table is not cluster aligned; L1 entry corrupted",
                       offset);
}

/* Readers mask reserved bits; and COPIED without a table is one more of them. */
static void check_l1_reserved_bits(Qcow2Check *c, uint64_t pos, uint64_t entry, uint32_t l1_index)
{
    uint64_t becomes = entry & ~QCOW2_L1_RESERVED_MASK;
    if (!(entry & QCOW2_ENTRY_OFFSET_MASK)) {
        becomes = 0;
    }
    Qcow2EntryFix fix = {
        .pos = pos, .bytes = sizeof(entry), .owner = QCOW2_REF_META, .l1_index = l1_index,
        .was.entry = entry, .becomes.entry = becomes, .code = "l1-entry-reserved-bits"};
    if (entry != becomes) {
        qcow2_check_fixable(c, fix, " found L1 entry with reserved bits set: %" PRIx64, entry);
    }
}

/* An entry at @pos that @times L1 tables have; @l1_index: where the active one has it, or
 * UINT32_MAX when it has not. */
static void check_l1_entry(Qcow2Check *c, uint64_t pos, uint64_t entry, uint64_t times,
                           uint32_t l1_index)
{
    BDRVQcow2State *s = c->s;
    uint64_t offset = entry & QCOW2_ENTRY_OFFSET_MASK;
    bool active = l1_index != UINT32_MAX;
    check_l1_reserved_bits(c, pos, entry, l1_index);
    if (!offset) {
        return;
    }
    unsigned copied = entry & QCOW2_ENTRY_COPIED ? QCOW2_REF_COPIED : QCOW2_REF_SHARED;
    if (qcow2_offset_into_cluster(s, offset) ||
        !qcow2_check_is_inside(c, offset, s->cluster_size)) {
        Qcow2LostTable lost = {pos, entry & ~QCOW2_L1_RESERVED_MASK, times, l1_index};
        if (!qcow2_check_look_for_table(c, &lost)) {
            qcow2_check_bad_l1_entry(c, &lost);
        }
        return;
    }
    add_table(c, offset, times, active, l1_index, active ? copied : 0);
}

static void check_active_l1(Qcow2Check *c)
{
    qcow2_check_count(c, c->s->header.l1_offset, (uint64_t)c->l1_size * sizeof(uint64_t), 1,
                      QCOW2_REF_META);
    for (uint32_t i = 0; i < c->l1_size; i++) {
        uint64_t entry = be64toh(c->be_l1[i]);
        if (entry) {
            check_l1_entry(c, c->s->header.l1_offset + i * sizeof(entry), entry, 1, i);
        }
    }
    c->nb_active_tables = c->tables->len;
}

/* ---------------------------------------------------------------- snapshots */

/* Where an L1 table of a snapshot begins (+1) or ends (-1). */
typedef struct SweepEvent {
    uint64_t offset;
    int delta;
} SweepEvent;

static int compare_events(const void *a, const void *b)
{
    const SweepEvent *x = a, *y = b;
    return x->offset < y->offset ? -1 : x->offset > y->offset;
}

/* Judges a snapshot's pointer; what can be read of its L1 goes to @events. */
static void check_snapshot_l1(Qcow2Check *c, const Qcow2Snapshot *sn, GArray *events)
{
    uint64_t bytes = (uint64_t)sn->l1_size * sizeof(uint64_t);
    if (qcow2_offset_into_cluster(c->s, sn->l1_offset)) {
        qcow2_check_report(c, BDRV_FINDING_CORRUPTION, false, "snapshot-l1-unaligned",
                           sn->l1_offset,
                           "ERROR snapshot %s (%s) l1_offset=%#" PRIx64 ": L1 table is not cluster "
                           "aligned; snapshot table entry corrupted",
                           sn->id, sn->name, sn->l1_offset);
        qcow2_check_not_followed(c);
        return;
    }
    if (bytes > QCOW2_MAX_L1_BYTES) {
        qcow2_check_report(c, BDRV_FINDING_CORRUPTION, false, "snapshot-l1-too-large",
                           sn->l1_offset,
                           "ERROR snapshot %s (%s) l1_size=%#" PRIx32 ": L1 table is too large; "
                           "snapshot table entry corrupted",
                           sn->id, sn->name, sn->l1_size);
        qcow2_check_not_followed(c);
        return;
    }
    if (!qcow2_check_count(c, sn->l1_offset, bytes, 1, QCOW2_REF_META)) {
        qcow2_check_not_followed(c);
        return;
    }
    uint64_t end = MIN(sn->l1_offset + bytes, c->file_bytes);
    if (end > sn->l1_offset) {
        SweepEvent both[] = {{sn->l1_offset, 1}, {end, -1}};
        g_array_append_vals(events, both, 2);
    }
}

/* The entries of [offset, end), which @times tables hold. */
static void sweep_range(Qcow2Check *c, uint64_t offset, uint64_t end, uint64_t times)
{
    enum { CHUNK = 1 << 20 };
    g_autofree uint64_t *buf = g_malloc(CHUNK);
    for (; offset < end && !qcow2_check_cancelled(c); offset += MIN(CHUNK, end - offset)) {
        size_t bytes = MIN(CHUNK, end - offset);
        memset(buf, 0, qb_align_up(bytes, sizeof(uint64_t)));
        int ret = bdrv_pread(c->bs->file, (int64_t)offset, (int64_t)bytes, buf, 0);
        if (ret < 0) {
            c->incomplete = true;
            qcow2_check_report(c, BDRV_FINDING_CHECK_ERROR, false, "l1-read", offset,
                               "ERROR: I/O error in check_refcounts_l1");
            continue;
        }
        for (size_t i = 0; i < bytes / sizeof(uint64_t); i++) {
            if (buf[i]) {
                check_l1_entry(c, offset + i * sizeof(buf[i]), be64toh(buf[i]), times, UINT32_MAX);
            }
        }
    }
}

static void sweep(Qcow2Check *c, GArray *events)
{
    uint64_t from = 0, depth = 0;
    if (events->len) {
        qsort(events->data, events->len, sizeof(SweepEvent), compare_events);
    }
    for (guint i = 0; i < events->len; i++) {
        const SweepEvent *e = &g_array_index(events, SweepEvent, i);
        if (depth && e->offset > from) {
            sweep_range(c, from, e->offset, depth);
        }
        from = e->offset;
        depth += e->delta;
    }
    assert(depth == 0);
}

static int compare_tables(const void *a, const void *b)
{
    const Qcow2CheckTable *x = a, *y = b;
    return x->offset < y->offset ? -1 : x->offset > y->offset;
}

static void check_snapshots(Qcow2Check *c)
{
    const GArray *list = c->s->snapshots;
    if (!list || !list->len) {
        return;
    }
    if (c->s->has_data_file) {
        qcow2_check_report(c, BDRV_FINDING_CORRUPTION, false, "snapshots-with-data-file",
                           UINT64_MAX,
                           "ERROR %u snapshots in image with data file", list->len);
    }
    g_autoptr(GArray) events = g_array_new(false, false, sizeof(SweepEvent));
    for (guint i = 0; i < list->len; i++) {
        check_snapshot_l1(c, &g_array_index(list, Qcow2Snapshot, i), events);
    }
    sweep(c, events);
    guint rest = c->tables->len - c->nb_active_tables;
    if (rest) {
        qsort(&g_array_index(c->tables, Qcow2CheckTable, c->nb_active_tables), rest,
              sizeof(Qcow2CheckTable), compare_tables);
    }
}

/* ---------------------------------------------------------------- the rest */

static void count_tables(Qcow2Check *c)
{
    for (guint i = 0; i < c->tables->len; i++) {
        const Qcow2CheckTable *t = &g_array_index(c->tables, Qcow2CheckTable, i);
        qcow2_check_count(c, t->offset, c->s->cluster_size, t->refs, QCOW2_REF_L2 | t->flags);
    }
}

static void check_crypto_area(Qcow2Check *c)
{
    const Qcow2Extension *ext = qcow2_find_extension(c->s->extensions, QCOW2_EXT_CRYPTO);
    if (!ext || ext->length != 16 || c->s->header.crypt_method != QCOW2_CRYPT_LUKS) {
        return;
    }
    uint64_t offset = qb_ldbe64(ext->data), bytes = qb_ldbe64(ext->data + 8);
    if (bytes > MAX_CRYPTO_BYTES) {
        qcow2_check_report(c, BDRV_FINDING_CORRUPTION, false, "crypto-header-too-large", offset,
                           "ERROR crypto header at offset 0x%" PRIx64 " is too large: 0x%" PRIx64
                           " bytes", offset, bytes);
        return;
    }
    qcow2_check_count(c, offset, bytes, 1, QCOW2_REF_META);
}

void qcow2_check_count_all(Qcow2Check *c)
{
    BDRVQcow2State *s = c->s;
    c->table_index = g_hash_table_new(NULL, NULL);
    qcow2_check_count(c, 0, s->cluster_size, 1, QCOW2_REF_META);
    check_active_l1(c);
    check_snapshots(c);
    g_clear_pointer(&c->table_index, g_hash_table_unref);
    count_tables(c);
    qcow2_check_l2_tables(c);
    if (s->header.nb_snapshots) {
        qcow2_check_count(c, s->header.snapshots_offset, s->snapshots_bytes, 1, QCOW2_REF_META);
    }
    check_crypto_area(c);
    qcow2_check_bitmaps(c);
}
