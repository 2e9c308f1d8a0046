/*
 * Check: L2 tables and their entries.
 *
 *      table (refs times)                        map
 *      [ data | 0 | zero | compressed | ... ]     +refs per entry on each host cluster touched
 *           |                                     flags: DATA or COMP; of active tables
 *           `-> check_entry()                            also ACTIVE, and COPIED or SHARED
 *
 * What is wrong with an entry is told at once, unless it is to be repaired (qcow2-check-fixes.c);
 * then it is counted as it will be.  Repaired are: a preallocated zero cluster at an impossible
 * place loses the place; bits that no reader looks at are cleared (reserved ones, COPIED on
 * compressed clusters); the subcluster bitmap of a compressed cluster becomes zero, as the format
 * has it; the place of data in an external data file becomes the only one it can be.  Entries that
 * lead nowhere are counted as they are, and repaired when all owners are known
 * (qcow2-check-lost.c).
 *
 * Invariants
 *   1. A data entry that is not aligned keeps the cluster it points into from being freed.
 *   2. With an external data file no data cluster is counted.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-check.h"

#include <inttypes.h>

/* ---------------------------------------------------------------- walking */

typedef struct TableWalk {
    Qcow2Check *c;
    guint first;
    Qcow2CheckTableFn fn;
    void *opaque;
} TableWalk;

static void report_unreadable(Qcow2Check *c, uint64_t offset, int error)
{
    c->incomplete = true;
    qcow2_check_report(c, BDRV_FINDING_CHECK_ERROR, false, "l2-read", offset,
                       "ERROR: Could not read L2 table: %s", g_strerror(-error));
}

static int walk_table(const Qcow2WalkTable *table, void *opaque)
{
    TableWalk *w = opaque;
    const Qcow2CheckTable *t =
        &g_array_index(w->c->tables, Qcow2CheckTable, w->first + table->l1_index);
    if (!table->be) {
        report_unreadable(w->c, t->offset, table->error);
    } else {
        w->fn(w->c, t, (const uint8_t *)table->be, w->opaque);
    }
    qb_progress_add(w->c->opts->progress, w->c->s->cluster_size);
    return qcow2_check_cancelled(w->c) ? -EINTR : 0;
}

int qcow2_check_walk(const Qcow2Check *c, guint first, guint n, Qcow2TableFn fn, void *opaque)
{
    BDRVQcow2State *s = c->s;
    uint64_t be_l1[QCOW2_CHECK_WALK];
    assert(n <= QCOW2_CHECK_WALK);
    for (guint i = 0; i < n; i++) {
        uint64_t offset = g_array_index(c->tables, Qcow2CheckTable, first + i).offset;
        be_l1[i] = qcow2_check_is_hole(c, offset, c->tables->len) ? 0 : htobe64(offset);
    }
    Qcow2WalkSource src = {.be_l1 = be_l1, .l1_size = n};
    uint64_t end = (uint64_t)n << (s->cluster_bits + s->l2_bits);
    return qcow2_walk_tables(c->bs, &src, 0, end, fn, opaque);
}

void qcow2_check_for_tables(Qcow2Check *c, guint first, guint n, Qcow2CheckTableFn fn,
                            void *opaque)
{
    for (guint end = first + n; first < end; first += MIN(QCOW2_CHECK_WALK, end - first)) {
        TableWalk w = {.c = c, .first = first, .fn = fn, .opaque = opaque};
        int ret = qcow2_check_walk(c, first, MIN(QCOW2_CHECK_WALK, end - first), walk_table, &w);
        if (ret == -EINTR && qcow2_check_cancelled(c)) {
            return;
        }
        if (ret < 0) {
            report_unreadable(c, UINT64_MAX, ret);
        }
    }
}

Qcow2L2Entry qcow2_check_entry(const BDRVQcow2State *s, const uint8_t *entries, uint32_t index)
{
    const uint8_t *p = entries + (size_t)index * s->l2_entry_size;
    return (Qcow2L2Entry){
        .entry = qb_ldbe64(p),
        .bitmap = s->has_subclusters ? qb_ldbe64(p + 8) : 0,
    };
}

/* ---------------------------------------------------------------- what can be repaired */

/* An entry under examination. */
typedef struct EntryCheck {
    Qcow2Check *c;
    const Qcow2CheckTable *t;
    uint32_t index;
    Qcow2L2Entry e;          /* as it is, or will be */
    uint64_t next_contiguous; /* host offset where the run of data would go on, 0: no run yet */
} EntryCheck;

/* The repair of x->e; @times: references that it takes away. */
static Qcow2EntryFix fix_of(const EntryCheck *x, Qcow2L2Entry becomes, uint64_t times,
                            const char *code)
{
    return (Qcow2EntryFix){
        .pos = x->t->offset + (uint64_t)x->index * x->c->s->l2_entry_size,
        .bytes = x->c->s->l2_entry_size,
        .owner = QCOW2_REF_L2,
        .l1_index = UINT32_MAX,
        .was = x->e,
        .becomes = becomes,
        .times = times,
        .code = code,
    };
}

/* ---------------------------------------------------------------- one entry */

static bool is_active(const EntryCheck *x)
{
    return x->t->active_refs > 0;
}

static void check_compressed(EntryCheck *x)
{
    Qcow2Check *c = x->c;
    uint64_t host;
    uint32_t bytes;
    qcow2_parse_compressed(c->s, x->e.entry & ~QCOW2_ENTRY_COPIED, &host, &bytes);
    if (x->e.entry & QCOW2_ENTRY_COPIED) {
        Qcow2L2Entry becomes = {x->e.entry & ~QCOW2_ENTRY_COPIED, x->e.bitmap};
        if (qcow2_check_fixable(c, fix_of(x, becomes, 0, "compressed-copied"),
                                ": coffset=0x%" PRIx64
                                ": copied flag must never be set for compressed clusters",
                                host)) {
            x->e = becomes;
        }
    }
    if (c->s->has_data_file) {
        qcow2_check_report(c, BDRV_FINDING_CORRUPTION, false, "compressed-with-data-file", host,
                           "ERROR compressed cluster %" PRIu32 " with data file, entry=0x%" PRIx64,
                           x->index, x->e.entry & ~QCOW2_ENTRY_COPIED);
        return;
    }
    if (x->e.bitmap) {
        Qcow2L2Entry becomes = {x->e.entry, 0};
        if (qcow2_check_fixable(c, fix_of(x, becomes, 0, "compressed-bitmap"),
                                " compressed cluster %" PRIu32
                                " with non-zero subcluster allocation bitmap, entry=0x%" PRIx64,
                                x->index, x->e.entry)) {
            x->e = becomes;
        }
    }
    c->res->allocated_clusters += x->t->active_refs;
    c->res->compressed_clusters += x->t->active_refs;
    c->res->fragmented_clusters += x->t->active_refs;
    c->lost_entries += !qcow2_check_count(c, host, bytes, x->t->refs, QCOW2_REF_COMP);
}

/* Readers mask reserved bits, so clearing them changes nothing; but the zero bit of version 2,
 * which some read as damage. */
static void check_reserved_bits(EntryCheck *x)
{
    const BDRVQcow2State *s = x->c->s;
    uint64_t mask = QCOW2_L2_STD_RESERVED_MASK;
    if (s->version < 3 || s->has_subclusters) {
        mask |= QCOW2_ENTRY_ZERO;
    }
    uint64_t wrong = x->e.entry & mask;
    if (!wrong) {
        return;
    }
    if (s->version < 3 && (wrong & QCOW2_ENTRY_ZERO)) {
        qcow2_check_report(x->c, BDRV_FINDING_CORRUPTION, false, "l2-entry-reserved-bits",
                           x->t->offset, "ERROR found l2 entry with reserved bits set: %" PRIx64,
                           x->e.entry);
        return;
    }
    Qcow2L2Entry becomes = {x->e.entry & ~mask, x->e.bitmap};
    if (qcow2_check_fixable(x->c, fix_of(x, becomes, 0, "l2-entry-reserved-bits"),
                            " found l2 entry with reserved bits set: %" PRIx64, x->e.entry)) {
        x->e = becomes;
    }
}

static void check_subclusters(EntryCheck *x, uint64_t offset, bool allocated)
{
    uint32_t alloc = (uint32_t)x->e.bitmap, zero = x->e.bitmap >> 32;
    if (!allocated && alloc) {
        x->c->lost_entries++;
        qcow2_check_report(x->c, BDRV_FINDING_CORRUPTION, false, "subcluster-bitmap", x->t->offset,
                           "ERROR: Unallocated cluster has non-zero subcluster allocation map");
    } else if (alloc & zero) {
        qcow2_check_report(x->c, BDRV_FINDING_CORRUPTION, false, "subcluster-bitmap", x->t->offset,
                           "ERROR offset=%" PRIx64
                           ": Allocated cluster has corrupted subcluster allocation bitmap",
                           offset);
    }
}

static void count_fragments(EntryCheck *x, uint64_t offset)
{
    BdrvCheckResult *res = x->c->res;
    res->allocated_clusters += x->t->active_refs;
    if (x->next_contiguous && offset != x->next_contiguous) {
        res->fragmented_clusters += x->t->active_refs;
    }
    x->next_contiguous = offset + x->c->s->cluster_size;
}

/* An entry whose offset is none (invariant 1). */
static void check_misaligned(EntryCheck *x, uint64_t offset)
{
    Qcow2Check *c = x->c;
    BDRVQcow2State *s = c->s;
    bool data = !qcow2_check_reads_as_zero(s, x->e);
    uint64_t was = x->e.entry, start = qcow2_start_of_cluster(s, offset);
    if (data) {
        c->lost_entries++;
        qcow2_check_report(c, BDRV_FINDING_CORRUPTION, false, "data-unaligned", x->t->offset,
                           "ERROR offset=%" PRIx64
                           ": Data cluster is not properly aligned; L2 entry corrupted.",
                           offset);
    } else {
        Qcow2L2Entry becomes = {s->has_subclusters ? 0 : QCOW2_ENTRY_ZERO, x->e.bitmap};
        if (qcow2_check_fixable(c, fix_of(x, becomes, x->t->refs, "zero-unaligned"),
                                " offset=%" PRIx64 ": Preallocated cluster is not properly "
                                "aligned; L2 entry corrupted.",
                                offset)) {
            x->e = becomes;
        }
    }
    if (x->e.entry != was) {
        return;
    }
    if (qcow2_check_is_inside(c, start, s->cluster_size)) {
        qcow2_check_count(c, start, s->cluster_size, x->t->refs, QCOW2_REF_DATA);
    }
    c->copied_uncounted |= is_active(x);
}

/* Guest data lies in the data file where the guest has it, so an entry can say nothing else. */
static void check_data_file_entry(EntryCheck *x, uint64_t offset)
{
    const BDRVQcow2State *s = x->c->s;
    if (x->t->active_refs != 1) {
        return;
    }
    uint64_t guest = ((uint64_t)x->t->active_index << (s->cluster_bits + s->l2_bits)) +
                     ((uint64_t)x->index << s->cluster_bits);
    uint64_t entry = (x->e.entry & ~QCOW2_ENTRY_OFFSET_MASK) | guest | QCOW2_ENTRY_COPIED;
    Qcow2L2Entry becomes = {entry, x->e.bitmap};
    const char *what = qcow2_offset_into_cluster(s, offset)
                           ? "Data cluster is not properly aligned"
                           : "External data file cluster is not where the guest has it";
    if (offset != guest && qcow2_check_fixable(x->c, fix_of(x, becomes, 0, "data-file-offset"),
                                               " offset=%" PRIx64 ": %s; L2 entry corrupted.",
                                               offset, what)) {
        x->e = becomes;
    }
    x->c->copied_uncounted |= !(x->e.entry & QCOW2_ENTRY_COPIED);
}

static void count_data(EntryCheck *x, uint64_t offset)
{
    Qcow2Check *c = x->c;
    bool copied = x->e.entry & QCOW2_ENTRY_COPIED;
    unsigned flags = QCOW2_REF_DATA;
    if (is_active(x)) {
        flags |= QCOW2_REF_ACTIVE | (copied ? QCOW2_REF_COPIED : QCOW2_REF_SHARED);
    }
    if (!qcow2_check_count(c, offset, c->s->cluster_size, x->t->refs, flags)) {
        c->copied_uncounted |= is_active(x) && copied;
        c->lost_entries++;
    }
}

static void check_standard(EntryCheck *x)
{
    BDRVQcow2State *s = x->c->s;
    uint64_t offset = x->e.entry & QCOW2_ENTRY_OFFSET_MASK;
    bool zero = !s->has_subclusters && (x->e.entry & QCOW2_ENTRY_ZERO);
    bool first_of_data_file = s->has_data_file && (x->e.entry & QCOW2_ENTRY_COPIED) && !zero;
    bool allocated = offset || first_of_data_file;
    check_reserved_bits(x);
    check_subclusters(x, offset, allocated);
    if (!allocated) {
        return;
    }
    count_fragments(x, offset);
    if (s->has_data_file) {
        check_data_file_entry(x, offset);
    } else if (qcow2_offset_into_cluster(s, offset)) {
        check_misaligned(x, offset);
    } else {
        count_data(x, offset);
    }
}

static void check_table(Qcow2Check *c, const Qcow2CheckTable *t, const uint8_t *entries,
                        void *opaque)
{
    EntryCheck x = {.c = c, .t = t};
    for (x.index = 0; x.index < c->s->l2_entries; x.index++) {
        x.e = qcow2_check_entry(c->s, entries, x.index);
        if (x.e.entry & QCOW2_ENTRY_COMPRESSED) {
            check_compressed(&x);
        } else if (x.e.entry || x.e.bitmap) {
            check_standard(&x);
        }
    }
}

void qcow2_check_l2_table(Qcow2Check *c, guint index)
{
    qcow2_check_for_tables(c, index, 1, check_table, NULL);
}

void qcow2_check_l2_tables(Qcow2Check *c)
{
    guint n = c->tables->len;
    qb_progress_grow(c->opts->progress, (uint64_t)n * c->s->cluster_size);
    g_autofree uint8_t *odd = qcow2_check_scan_tables(c);
    for (guint i = 0, end; i < n; i = end) {
        for (end = i; end < n && odd[end]; end++) {
        }
        qcow2_check_for_tables(c, i, end - i, check_table, NULL);
        end = MAX(end, i + 1);
    }
}
