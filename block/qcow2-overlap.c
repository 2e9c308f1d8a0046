/*
 * The overlap guard: no write of data or of one kind of metadata may hit metadata of another kind.
 *
 * It catches what should be impossible: counts on disk that were wrong (a cluster handed out
 * twice), or a mapping or a table entry that points into metadata.
 *
 *      ranges    header, L1, refcount table, snapshot table, L1s of snapshots, bitmap directory
 *
 *                start   |--a--|  |----b----|   |c|      sorted by start; each knows the largest
 *                max_end       a            b     c      end up to it, so that a look is one binary
 *                                                        search
 *      tables    cluster -> sections: active L2 tables, refcount blocks, L2 tables of snapshots
 *
 * The rooms tell when something of theirs comes or goes; a write looks once before it happens:
 * guest data when its place is chosen, tables when the flush writes them.
 *
 * Invariants
 *  1. What a room has in memory is what is guarded, whether the disk has it already or not.
 *  2. A look costs a binary search and a hash look-up per cluster written, under a leaf lock shared
 *     by those who look.  It does no I/O.
 *  3. A cluster that a broken image names twice is forgotten with the first of the two.
 *
 * L2 tables of snapshots are known only while the option asks for them, because that takes reading
 * the L1 of each; one that cannot be read guards nothing, and is an error elsewhere.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2.h"

typedef struct Range {
    uint64_t start, end;
    uint64_t max_end; /* of this one and all before it */
    Qcow2Overlap section;
} Range;

struct Qcow2Guard {
    QbRwLock lock;
    GArray *ranges;     /* Range */
    GHashTable *tables; /* cluster number -> Qcow2Overlap bits */
};

static const struct {
    Qcow2Overlap section;
    const char *name;
} section_names[] = {
    {QCOW2_OL_MAIN_HEADER, "qcow2_header"},
    {QCOW2_OL_ACTIVE_L1, "active L1 table"},
    {QCOW2_OL_ACTIVE_L2, "active L2 table"},
    {QCOW2_OL_REFCOUNT_TABLE, "refcount table"},
    {QCOW2_OL_REFCOUNT_BLOCK, "refcount block"},
    {QCOW2_OL_SNAPSHOT_TABLE, "snapshot table"},
    {QCOW2_OL_INACTIVE_L1, "inactive L1 table"},
    {QCOW2_OL_INACTIVE_L2, "inactive L2 table"},
    {QCOW2_OL_BITMAP_DIRECTORY, "bitmap directory"},
};

/* The first of the sections in @found, as users know it. */
static const char *section_name(int found)
{
    for (size_t i = 0; i < G_N_ELEMENTS(section_names); i++) {
        if (section_names[i].section & found) {
            return section_names[i].name;
        }
    }
    return "metadata";
}

struct Qcow2Guard *qcow2_guard_new(const BDRVQcow2State *s)
{
    struct Qcow2Guard *g = g_new0(struct Qcow2Guard, 1);
    Range header = {.end = s->cluster_size, .max_end = s->cluster_size,
                    .section = QCOW2_OL_MAIN_HEADER};

    qb_rwlock_init(&g->lock);
    g->tables = g_hash_table_new(NULL, NULL);
    g->ranges = g_array_new(FALSE, FALSE, sizeof(Range));
    g_array_append_val(g->ranges, header);
    return g;
}

void qcow2_guard_free(struct Qcow2Guard *g)
{
    if (g) {
        g_array_free(g->ranges, TRUE);
        g_hash_table_destroy(g->tables);
        qb_rwlock_destroy(&g->lock);
        g_free(g);
    }
}

/* ---- what there is ---- */

static gint compare_ranges(gconstpointer a, gconstpointer b)
{
    const Range *x = a, *y = b;

    return x->start < y->start ? -1 : x->start > y->start;
}

static void drop_section(GArray *ranges, Qcow2Overlap section)
{
    guint kept = 0;

    for (guint i = 0; i < ranges->len; i++) {
        Range r = g_array_index(ranges, Range, i);
        if (r.section != section) {
            g_array_index(ranges, Range, kept++) = r;
        }
    }
    g_array_set_size(ranges, kept);
}

static void settle(GArray *ranges)
{
    uint64_t max_end = 0;

    g_array_sort(ranges, compare_ranges);
    for (guint i = 0; i < ranges->len; i++) {
        Range *r = &g_array_index(ranges, Range, i);
        max_end = MAX(max_end, r->end);
        r->max_end = max_end;
    }
}

void qcow2_guard_set(BDRVQcow2State *s, Qcow2Overlap section, const Qcow2HostRun *runs, size_t n)
{
    struct Qcow2Guard *g = s->guard;

    qb_rwlock_wrlock(&g->lock);
    drop_section(g->ranges, section);
    for (size_t i = 0; i < n; i++) {
        Range r = {.start = qcow2_start_of_cluster(s, runs[i].offset), .section = section};
        int64_t end;
        if (runs[i].bytes && !qb_add_overflow(runs[i].offset, runs[i].bytes, &r.end) &&
            !qb_align_up_overflow(r.end, s->cluster_size, &end)) {
            r.end = (uint64_t)end; /* what lies in its last cluster is its own, too */
            g_array_append_val(g->ranges, r);
        }
    }
    settle(g->ranges);
    qb_rwlock_wrunlock(&g->lock);
}

static gpointer key_of(const BDRVQcow2State *s, uint64_t offset)
{
    return GSIZE_TO_POINTER((gsize)(offset >> s->cluster_bits));
}

static void set_bits(GHashTable *tables, gpointer key, guint bits)
{
    if (bits) {
        g_hash_table_insert(tables, key, GUINT_TO_POINTER(bits));
    } else {
        g_hash_table_remove(tables, key);
    }
}

void qcow2_guard_table(BDRVQcow2State *s, Qcow2Overlap section, uint64_t offset, bool there)
{
    struct Qcow2Guard *g = s->guard;
    gpointer key = key_of(s, offset);
    guint bits;

    if (!offset || qcow2_offset_into_cluster(s, offset)) {
        return; /* nobody writes to where a misplaced table is said to be as to a table */
    }
    qb_rwlock_wrlock(&g->lock);
    bits = GPOINTER_TO_UINT(g_hash_table_lookup(g->tables, key));
    set_bits(g->tables, key, there ? bits | section : bits & ~(guint)section);
    qb_rwlock_wrunlock(&g->lock);
}

void qcow2_guard_forget_tables(BDRVQcow2State *s, Qcow2Overlap section)
{
    struct Qcow2Guard *g = s->guard;
    GHashTableIter iter;
    gpointer value;

    qb_rwlock_wrlock(&g->lock);
    g_hash_table_iter_init(&iter, g->tables);
    while (g_hash_table_iter_next(&iter, NULL, &value)) {
        guint bits = GPOINTER_TO_UINT(value) & ~(guint)section;
        if (bits) {
            g_hash_table_iter_replace(&iter, GUINT_TO_POINTER(bits));
        } else {
            g_hash_table_iter_remove(&iter);
        }
    }
    qb_rwlock_wrunlock(&g->lock);
}

void qcow2_guard_l1(BDRVQcow2State *s, Qcow2Overlap section, const uint64_t *be_l1, uint32_t size)
{
    for (uint32_t i = 0; i < size; i++) {
        qcow2_guard_table(s, section, be64toh(be_l1[i]) & QCOW2_ENTRY_OFFSET_MASK, true);
    }
}

/* ---- snapshots and bitmaps ---- */

static void guard_inactive_tables(BlockDriverState *bs)
{
    BDRVQcow2State *s = qcow2_state(bs);

    qcow2_guard_forget_tables(s, QCOW2_OL_INACTIVE_L2);
    if (!(s->overlap_check & QCOW2_OL_INACTIVE_L2)) {
        return;
    }
    for (guint i = 0; i < s->snapshots->len; i++) {
        const Qcow2Snapshot *sn = &g_array_index(s->snapshots, Qcow2Snapshot, i);
        g_autofree uint64_t *be_l1 = qcow2_snapshot_read_l1(bs, sn, NULL);
        if (be_l1) {
            qcow2_guard_l1(s, QCOW2_OL_INACTIVE_L2, be_l1, sn->l1_size);
        }
    }
}

void qcow2_guard_snapshots(BlockDriverState *bs)
{
    BDRVQcow2State *s = qcow2_state(bs);
    const Qcow2HostRun table = {s->snapshots_offset, s->snapshots_bytes};
    g_autoptr(GArray) l1s = g_array_new(FALSE, FALSE, sizeof(Qcow2HostRun));

    for (guint i = 0; i < s->snapshots->len; i++) {
        const Qcow2Snapshot *sn = &g_array_index(s->snapshots, Qcow2Snapshot, i);
        Qcow2HostRun run = {sn->l1_offset, (uint64_t)sn->l1_size * sizeof(uint64_t)};
        g_array_append_val(l1s, run);
    }
    qcow2_guard_set(s, QCOW2_OL_SNAPSHOT_TABLE, &table, 1);
    qcow2_guard_set(s, QCOW2_OL_INACTIVE_L1, (Qcow2HostRun *)l1s->data, l1s->len);
    guard_inactive_tables(bs);
}

void qcow2_guard_bitmaps(BDRVQcow2State *s)
{
    const Qcow2Extension *ext = qcow2_find_extension(s->extensions, QCOW2_EXT_BITMAPS);
    Qcow2HostRun dir = {0};

    /* without the bit nobody counts on it: its clusters may be somebody else's by now */
    if (ext && ext->length >= QCOW2_BITMAP_EXT_LENGTH &&
        (s->header.autoclear & QCOW2_AUTOCLEAR_BITMAPS)) {
        dir.offset = qb_ldbe64(ext->data + QCOW2_BITMAP_EXT_DIR_OFFSET);
        dir.bytes = qb_ldbe64(ext->data + QCOW2_BITMAP_EXT_DIR_BYTES);
    }
    qcow2_guard_set(s, QCOW2_OL_BITMAP_DIRECTORY, &dir, 1);
}

/* ---- a look ---- */

/* Ranges that begin below @end. */
static guint ranges_below(const GArray *ranges, uint64_t end)
{
    guint low = 0, high = ranges->len;

    while (low < high) {
        guint middle = low + (high - low) / 2;
        if (g_array_index(ranges, Range, middle).start < end) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

static int range_hit(const GArray *ranges, int checked, uint64_t start, uint64_t end)
{
    for (guint i = ranges_below(ranges, end); i > 0; i--) {
        const Range *r = &g_array_index(ranges, Range, i - 1);
        if (r->max_end <= start) {
            break;
        }
        if (r->end > start && (r->section & checked)) {
            return r->section;
        }
    }
    return 0;
}

/* Cluster by cluster, or table by table where those are fewer. */
static int table_hit(const BDRVQcow2State *s, int checked, uint64_t start, uint64_t end)
{
    GHashTable *tables = s->guard->tables;
    uint64_t first = start >> s->cluster_bits, last = (end - 1) >> s->cluster_bits;
    gpointer key, value;
    GHashTableIter iter;
    int found = 0;

    if (last - first < g_hash_table_size(tables)) {
        for (uint64_t c = first; c <= last && !found; c++) {
            found = GPOINTER_TO_INT(g_hash_table_lookup(tables, GSIZE_TO_POINTER(c))) & checked;
        }
        return found;
    }
    g_hash_table_iter_init(&iter, tables);
    while (!found && g_hash_table_iter_next(&iter, &key, &value)) {
        bool inside = GPOINTER_TO_SIZE(key) >= first && GPOINTER_TO_SIZE(key) <= last;
        found = inside ? GPOINTER_TO_INT(value) & checked : 0;
    }
    return found;
}

/* Numbers from the disk may be anything. */
static uint64_t end_of(uint64_t offset, uint64_t bytes)
{
    uint64_t end;

    return qb_add_overflow(offset, bytes, &end) ? UINT64_MAX : end;
}

static int find_overlap(const BDRVQcow2State *s, int checked, uint64_t start, uint64_t end)
{
    int found;

    if (start == end) {
        return 0;
    }
    qb_rwlock_rdlock(&s->guard->lock);
    found = range_hit(s->guard->ranges, checked, start, end);
    if (!found) {
        found = table_hit(s, checked, start, end);
    }
    qb_rwlock_rdunlock(&s->guard->lock);
    return found;
}

bool qcow2_overlaps_metadata(BlockDriverState *bs, uint64_t offset, uint64_t bytes)
{
    return find_overlap(qcow2_state(bs), ~QCOW2_OL_BITMAP_DIRECTORY, offset, end_of(offset, bytes)) != 0;
}

int qcow2_check_overlap(BlockDriverState *bs, int ignore, uint64_t offset, uint64_t bytes)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    int checked = s->overlap_check & ~ignore, found;

    if (!bytes || !checked) {
        return 0;
    }
    found = find_overlap(s, checked, offset, end_of(offset, bytes));
    if (!found) {
        return 0;
    }
    return qcow2_signal_corruption(bs, true, (int64_t)offset,
                                   "Preventing invalid write on metadata (overlaps with %s)",
                                   section_name(found));
}
