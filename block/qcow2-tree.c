/*
 * What an L1 refers to, as sorted sets of host clusters.
 *
 *     L1 (active or a snapshot's) --collect--> [table][data......][data]...   one run per reference
 *
 *     from:  |-----a-----|            difference, by a sweep over the ends of all runs:
 *     to:          |-----b-----|      |- down -|     |-- up --|
 *
 * Snapshots, and anything else that swaps one tree for another, are arithmetic on such sets: raise
 * what comes, switch the header, lower what goes.  What is in both is not touched, so a count never
 * passes its maximum for a change that ends where it began.
 *
 * Invariants
 *  1. A run consists of whole clusters.  A cluster with subclusters of several kinds counts once,
 *     one that holds parts of several compressed clusters once for each of them.
 *  2. COPIED is set here only for clusters whose count was found to be 1 while the whole node was
 *     held.
 *
 * Memory: 16 bytes per run, so at most as much as the metadata really refers to, however large a
 * header claims the image to be.  An L1 that names the same few tables a million times, which
 * nobody makes but to harm, is refused.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-refcount-bulk.h"

#include <limits.h>
#include <string.h>

enum {
    FLUSH_EVERY = 1 << 18, /* runs freed between flushes */
};

/* ---------------------------------------------------------------- collecting */

typedef struct Collect {
    const BDRVQcow2State *s;
    GArray *runs;
    uint64_t done; /* guest clusters below it have been counted */
} Collect;

void qcow2_runs_append(GArray *runs, uint64_t offset, uint64_t bytes)
{
    Qcow2HostRun *last = runs->len ? &g_array_index(runs, Qcow2HostRun, runs->len - 1) : NULL;
    if (last && last->offset + last->bytes == offset) {
        last->bytes += bytes;
    } else {
        g_array_append_val(runs, ((Qcow2HostRun){offset, bytes}));
    }
}

static void add_compressed(Collect *c, const Qcow2Mapping *m)
{
    uint64_t start = qcow2_start_of_cluster(c->s, m->host);
    uint64_t end = qb_align_up(m->host + m->comp_bytes, c->s->cluster_size);
    Qcow2HostRun run = {start, end - start};
    g_array_append_val(c->runs, run); /* never merged with what it may share clusters with */
}

/* Host and guest offsets have the same place in their clusters, so whole clusters follow from any
 * part. */
static void add_clusters(Collect *c, const Qcow2Mapping *m)
{
    uint64_t into = qcow2_offset_into_cluster(c->s, m->guest);
    uint64_t start = MAX(m->guest - into, c->done);
    uint64_t end = qb_align_up(m->guest + m->bytes, c->s->cluster_size);
    if (start < end) {
        qcow2_runs_append(c->runs, m->host - into + (start - (m->guest - into)), end - start);
        c->done = end;
    }
}

static int collect_data(const Qcow2Mapping *m, void *opaque)
{
    Collect *c = opaque;
    switch (m->type) {
    case QCOW2_COMPRESSED:
        add_compressed(c, m);
        return 0;
    case QCOW2_NORMAL:
    case QCOW2_ZERO_ALLOC:
    case QCOW2_UNALLOCATED_ALLOC:
        if (!c->s->has_data_file) {
            add_clusters(c, m);
        }
        return 0;
    default:
        return 0;
    }
}

static void collect_tables(const BDRVQcow2State *s, const uint64_t *be_l1, uint64_t n, GArray *runs)
{
    for (uint64_t i = 0; i < n; i++) {
        uint64_t offset = qb_ldbe64(&be_l1[i]) & QCOW2_ENTRY_OFFSET_MASK;
        if (offset) {
            qcow2_runs_append(runs, offset, s->cluster_size);
        }
    }
}

/* Are most of the tables that @be_l1 names the same ones? */
static bool repeats_itself(const uint64_t *be_l1, uint64_t n)
{
    enum { SMALL = 1024 };
    uint64_t named = 0;
    if (n <= SMALL) {
        return false;
    }
    g_autoptr(GHashTable) tables = g_hash_table_new(NULL, NULL);
    for (uint64_t i = 0; i < n; i++) {
        uint64_t offset = qb_ldbe64(&be_l1[i]) & QCOW2_ENTRY_OFFSET_MASK;
        if (offset) {
            named++;
            g_hash_table_add(tables, (gpointer)(uintptr_t)offset);
        }
    }
    return named > SMALL + 2 * (uint64_t)g_hash_table_size(tables);
}

typedef struct CollectAll {
    BlockDriverState *bs;
    const Qcow2WalkSource *src;
    GArray *runs[QCOW2_MAX_PARTS]; /* NULL: no such part */
} CollectAll;

static int collect_part(uint64_t first, uint64_t end, unsigned part, void *opaque)
{
    CollectAll *all = opaque;
    const BDRVQcow2State *s = qcow2_state(all->bs);
    unsigned shift = s->cluster_bits + s->l2_bits;
    Collect c = {.s = s, .runs = g_array_new(false, false, sizeof(Qcow2HostRun))};
    all->runs[part] = c.runs;
    return qcow2_walk_runs(all->bs, all->src, first << shift, end << shift, collect_data, &c);
}

static int collect_all_data(BlockDriverState *bs, const Qcow2WalkSource *src, uint64_t l1_size,
                            GArray *runs)
{
    CollectAll all = {.bs = bs, .src = src};
    int ret = qcow2_walk_in_parts(l1_size, collect_part, &all);
    for (unsigned i = 0; i < QCOW2_MAX_PARTS && all.runs[i]; i++) {
        g_array_append_vals(runs, all.runs[i]->data, all.runs[i]->len);
        g_array_unref(all.runs[i]);
    }
    return ret;
}

int qcow2_tree_collect(BlockDriverState *bs, const Qcow2WalkSource *src, GArray *runs)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    g_autofree uint64_t *active = NULL;
    const uint64_t *be_l1 = src ? src->be_l1 : NULL;
    uint64_t n = src ? src->l1_size : 0;
    if (!be_l1) {
        uint32_t size;
        be_l1 = active = qcow2_l1_dup_be(s, &size);
        n = size;
    }
    if (repeats_itself(be_l1, n)) {
        return -EMLINK;
    }
    int ret = collect_all_data(bs, src, n, runs);
    if (ret == 0) {
        collect_tables(s, be_l1, n, runs);
    }
    return ret;
}

/* ---------------------------------------------------------------- sets */

/* At @at the number of references changes by @delta. */
typedef struct Edge {
    uint64_t at;
    int64_t delta;
} Edge;

static gint by_place(gconstpointer a, gconstpointer b)
{
    const Edge *ea = a, *eb = b;
    return ea->at < eb->at ? -1 : ea->at > eb->at;
}

static void add_edges(GArray *edges, const GArray *runs, int delta)
{
    for (guint i = 0; i < runs->len; i++) {
        const Qcow2HostRun *run = &g_array_index(runs, Qcow2HostRun, i);
        g_array_append_val(edges, ((Edge){run->offset, delta}));
        g_array_append_val(edges, ((Edge){run->offset + run->bytes, -delta}));
    }
}

/* Stretches of clusters (Qcow2Stretch): refs says how many each of @to adds and each of @from takes
 * away. */
static GArray *stretches(const BDRVQcow2State *s, const GArray *from, const GArray *to)
{
    g_autoptr(GArray) edges = g_array_new(false, false, sizeof(Edge));
    GArray *list = g_array_new(false, false, sizeof(Qcow2Stretch));
    int64_t now = 0;
    if (from) {
        add_edges(edges, from, -1);
    }
    add_edges(edges, to, 1);
    g_array_sort(edges, by_place);
    for (guint i = 0; i + 1 < edges->len; i++) {
        const Edge *e = &g_array_index(edges, Edge, i), *next = e + 1;
        now += e->delta;
        assert(qcow2_offset_into_cluster(s, e->at) == 0);
        if (now && e->at < next->at) {
            g_array_append_val(list, ((Qcow2Stretch){e->at, next->at, now}));
        }
    }
    return list;
}

void qcow2_runs_difference(const BDRVQcow2State *s, const GArray *from, const GArray *to,
                           GArray *ret_up, GArray *ret_down)
{
    g_autoptr(GArray) list = stretches(s, from, to);
    for (guint i = 0; i < list->len; i++) {
        const Qcow2Stretch *st = &g_array_index(list, Qcow2Stretch, i);
        Qcow2HostRun run = {st->start, st->end - st->start};
        for (int64_t n = ABS(st->refs); n > 0; n--) {
            g_array_append_val(st->refs > 0 ? ret_up : ret_down, run);
        }
    }
}

/* Judges or changes counts; see qcow2.h. */
typedef int CountsFn(BlockDriverState *bs, Qcow2HostRun *runs, size_t n, int delta);

/* Calls @fn for those of @list that are met @times times. */
static int with_counts_of(BlockDriverState *bs, const GArray *list, int64_t times, int delta,
                          CountsFn *fn)
{
    g_autoptr(GArray) runs = g_array_new(false, false, sizeof(Qcow2HostRun));
    for (guint i = 0; i < list->len; i++) {
        const Qcow2Stretch *st = &g_array_index(list, Qcow2Stretch, i);
        if (st->refs == times) {
            g_array_append_val(runs, ((Qcow2HostRun){st->start, st->end - st->start}));
        }
    }
    return runs->len ? fn(bs, (Qcow2HostRun *)runs->data, runs->len, delta) : 0;
}

static int change_counts_of(BlockDriverState *bs, const GArray *list, int64_t times, int delta)
{
    return with_counts_of(bs, list, times, delta, qcow2_update_refcounts);
}

/* The most references below @limit in @list; 0: none. */
static int64_t next_lower(const GArray *list, int64_t limit)
{
    int64_t most = 0;
    for (guint i = 0; i < list->len; i++) {
        int64_t refs = g_array_index(list, Qcow2Stretch, i).refs;
        most = refs < limit ? MAX(most, refs) : most;
    }
    return most;
}

int qcow2_counts_have_room(BlockDriverState *bs, const GArray *runs)
{
    g_autoptr(GArray) list = stretches(qcow2_state(bs), NULL, runs);
    int ret = qcow2_bulk_judge(bs, list);
    if (ret != -EUCLEAN) {
        return ret;
    }
    ret = 0;
    for (int64_t n = next_lower(list, INT64_MAX); n > 0 && ret == 0; n = next_lower(list, n)) {
        ret = n > INT_MAX ? -EINVAL : with_counts_of(bs, list, n, (int)n, qcow2_judge_refcounts);
    }
    return ret;
}

int qcow2_counts_without_room(BlockDriverState *bs, const GArray *runs, GArray *ret)
{
    g_autoptr(GArray) list = stretches(qcow2_state(bs), NULL, runs);
    for (guint i = 0; i < list->len; i++) {
        const Qcow2Stretch *st = &g_array_index(list, Qcow2Stretch, i);
        Qcow2HostRun run = {st->start, st->end - st->start};
        int err = st->refs > INT_MAX ? -EINVAL
                                      : qcow2_judge_refcounts(bs, &run, 1, (int)st->refs);
        if (err == -EINVAL) {
            g_array_append_val(ret, run);
        } else if (err < 0) {
            return err;
        }
    }
    return 0;
}

int qcow2_change_counts(BlockDriverState *bs, const GArray *runs, int sign)
{
    g_autoptr(GArray) list = stretches(qcow2_state(bs), NULL, runs);
    assert(sign == 1 || sign == -1);
    int ret = 0;
    int64_t failed = 0;
    for (int64_t n = next_lower(list, INT64_MAX); n > 0 && ret == 0; n = next_lower(list, n)) {
        ret = n > INT_MAX ? -EINVAL : change_counts_of(bs, list, n, sign * (int)n);
        failed = ret < 0 ? n : 0;
    }
    if (ret < 0) { /* the groups before the one that failed, which has changed nothing itself */
        for (int64_t n = next_lower(list, INT64_MAX); n > failed; n = next_lower(list, n)) {
            (void)change_counts_of(bs, list, n, -sign * (int)n);
        }
    }
    return ret;
}

int qcow2_raise_counts_at_once(BlockDriverState *bs, const GArray *runs)
{
    g_autoptr(GArray) list = stretches(qcow2_state(bs), NULL, runs);
    int ret = qcow2_bulk_raise(bs, list);
    return ret == -EUCLEAN ? qcow2_change_counts(bs, runs, 1) : ret;
}

int qcow2_lower_shared_counts(BlockDriverState *bs, const GArray *runs, GArray *ones, GArray *rest)
{
    g_autoptr(GArray) list = stretches(qcow2_state(bs), NULL, runs);
    return qcow2_bulk_lower(bs, list, ones, rest);
}

static gint by_offset(gconstpointer a, gconstpointer b)
{
    const Qcow2HostRun *ra = a, *rb = b;
    return ra->offset < rb->offset ? -1 : ra->offset > rb->offset;
}

/* Sorted, without overlaps. */
static GArray *union_of(const GArray *runs)
{
    GArray *sorted = g_array_sized_new(false, false, sizeof(Qcow2HostRun), runs->len);
    g_array_append_vals(sorted, runs->data, runs->len);
    g_array_sort(sorted, by_offset);
    guint n = 0;
    for (guint i = 0; i < sorted->len; i++) {
        Qcow2HostRun run = g_array_index(sorted, Qcow2HostRun, i);
        Qcow2HostRun *last = n ? &g_array_index(sorted, Qcow2HostRun, n - 1) : NULL;
        if (last && run.offset <= last->offset + last->bytes) {
            last->bytes = MAX(last->offset + last->bytes, run.offset + run.bytes) - last->offset;
        } else {
            g_array_index(sorted, Qcow2HostRun, n++) = run;
        }
    }
    g_array_set_size(sorted, n);
    return sorted;
}

guint qcow2_runs_find(const GArray *runs, uint64_t offset)
{
    guint low = 0, high = runs->len;
    while (low < high) {
        guint mid = low + (high - low) / 2;
        const Qcow2HostRun *run = &g_array_index(runs, Qcow2HostRun, mid);
        if (run->offset + run->bytes <= offset) {
            low = mid + 1;
        } else {
            high = mid;
        }
    }
    return low;
}

int qcow2_runs_with_count_one(BlockDriverState *bs, const GArray *runs, GArray *ret)
{
    g_autoptr(GArray) sorted = union_of(runs);
    for (guint i = 0; i < sorted->len; i++) {
        const Qcow2HostRun *run = &g_array_index(sorted, Qcow2HostRun, i);
        for (uint64_t pos = 0, n; pos < run->bytes; pos += n) {
            uint64_t count;
            int err = qcow2_count_run(bs, run->offset + pos, run->bytes - pos, &count, &n);
            if (err < 0) {
                return err;
            }
            if (count == 1) {
                qcow2_runs_append(ret, run->offset + pos, n);
            }
        }
    }
    return 0;
}

int qcow2_free_runs(BlockDriverState *bs, const GArray *runs, Qcow2DiscardType type)
{
    for (guint i = 0; i < runs->len; i++) {
        const Qcow2HostRun *run = &g_array_index(runs, Qcow2HostRun, i);
        qcow2_free_run(bs, run->offset, run->bytes, type);
        int ret = (i + 1) % FLUSH_EVERY == 0 ? qcow2_flush(bs) : 0;
        if (ret < 0) {
            return ret;
        }
    }
    return 0;
}

int qcow2_flush_all(BlockDriverState *bs)
{
    BDRVQcow2State *s = qcow2_state(bs);
    int ret = qcow2_flush(bs);
    for (int turn = 0; turn < 2 && ret == 0 && !qcow2_is_clean(s); turn++) {
        ret = qcow2_flush(bs);
    }
    return ret;
}

/* ---------------------------------------------------------------- COPIED */

/* Which entries get the flag: those with a host cluster in @ones; NULL: none. */
typedef struct CopiedEdit {
    BDRVQcow2State *s;
    const GArray *ones;
} CopiedEdit;

/* Is the cluster at @offset in @ones? Up to *n clusters from there on: lowered to those like it. */
static bool are_ones(const CopiedEdit *ed, uint64_t offset, unsigned *n)
{
    guint i = qcow2_runs_find(ed->ones, offset);
    const Qcow2HostRun *run = i < ed->ones->len ? &g_array_index(ed->ones, Qcow2HostRun, i) : NULL;
    bool is_one = run && run->offset <= offset;
    if (run) {
        uint64_t end = is_one ? run->offset + run->bytes : run->offset;
        *n = (unsigned)MIN(*n, MAX((end - offset) >> ed->s->cluster_bits, 1));
    }
    return is_one;
}

/* The entry as it shall be. Entries without a host cluster, and streams, never have the flag. */
static uint64_t edited(const CopiedEdit *ed, uint64_t entry, unsigned *n)
{
    uint64_t offset = entry & QCOW2_ENTRY_OFFSET_MASK;
    if ((entry & QCOW2_ENTRY_COMPRESSED) || !offset) {
        return entry;
    }
    if (!ed->ones) {
        return entry & ~QCOW2_ENTRY_COPIED;
    }
    return are_ones(ed, offset, n) ? entry | QCOW2_ENTRY_COPIED : entry;
}

static int edit_l2_entry(uint64_t guest, Qcow2L2Entry *e, unsigned *n, void *opaque)
{
    uint64_t entry = edited(opaque, e->entry, n);
    bool changed = entry != e->entry;
    e->entry = entry;
    return changed;
}

static void edit_l1_entries(const CopiedEdit *ed)
{
    BDRVQcow2State *s = ed->s;
    QB_GUARD(&s->lock);
    for (uint64_t i = 0; i < qcow2_l1_size(s); i++) {
        unsigned n = 1;
        uint64_t old = qcow2_l1_get(s, i), entry = edited(ed, old, &n);
        if (entry != old) {
            qcow2_l1_set_locked(s, i, entry);
        }
    }
}

static int edit_copied(BlockDriverState *bs, const GArray *ones)
{
    CopiedEdit ed = {.s = qcow2_state(bs), .ones = ones};
    int ret = qcow2_walk_edit(bs, 0, INT64_MAX, edit_l2_entry, &ed);
    edit_l1_entries(&ed); /* also after a failure: every entry is right by itself */
    return ret;
}

int qcow2_clear_all_copied(BlockDriverState *bs)
{
    return edit_copied(bs, NULL);
}

int qcow2_set_copied_in(BlockDriverState *bs, const GArray *ones)
{
    return ones->len ? edit_copied(bs, ones) : 0;
}
