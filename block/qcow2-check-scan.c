/*
 * Check: counts what sound L2 tables refer to, on all cores.
 *
 *      tables  [ a b c d | e f g h | i j ... ]      chunks, taken by whoever is free
 *                  |         |
 *               thread 1  thread 2    read, look through, and if nothing is odd: count, by runs
 *                  |         |
 *                  odd: c  odd: -  --> judged entry by entry, in order, by one thread
 *                                      (qcow2-check-l2.c)
 *
 * Most tables of most images are sound, and most of their entries go on where the one before them
 * ended.  So a table is turned into runs of host clusters first, which is where it may turn out to
 * be odd, and then counted run by run.  What is odd is left alone: findings are made in one place.
 *
 * Invariants
 *   1. A table is counted here in whole or not at all; one that could not be read is not.
 *   2. No finding is made here, but for counts that do not fit, which are told afterwards in the
 *      order of clusters: what a check says does not depend on the number of threads.
 *   3. Memory is bounded by a chunk of tables per thread and one byte per table.
 *
 * Not done: entries that refer to an external data file.  They are not counted, which leaves little
 * to be shared out.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-check.h"

#include <inttypes.h>
#include "block/locks.h"
#include "block/qcow2-io-int.h"
#include "util/pool.h"

enum {
    CHUNK_BYTES = 4 << 20, /* at least */
    THREAD_CHUNKS = 4,     /* per thread, unless they get too small or too large */
    MAX_THREADS = 16,
};

/* Clusters that entries in a row refer to. */
typedef struct Run {
    uint64_t offset, bytes;
    unsigned flags; /* Qcow2RefFlag */
} Run;

typedef struct Scan {
    Qcow2Check *c;
    guint chunk;          /* tables */
    _Atomic(guint) next;  /* the first table nobody has taken */
    uint8_t *odd;         /* by table: not counted here */
} Scan;

/* A thread's part. */
typedef struct ScanTask {
    Scan *scan;
    guint first;          /* of the chunk in hand */
    GArray *runs;         /* Run: of the table in hand */
    GArray *overflows;    /* uint64_t: clusters whose count is beyond the cap */
    uint64_t allocated, fragmented, compressed;
} ScanTask;

/* A table while it is turned into runs. */
typedef struct TableScan {
    const Qcow2Check *c;
    const Qcow2CheckTable *t;
    const uint64_t *be;
    GArray *runs;
    uint64_t next_contiguous; /* as EntryCheck of qcow2-check-l2.c has it */
    uint64_t allocated, fragmented, compressed;
} TableScan;

/* ---------------------------------------------------------------- entries into runs */

static void add_run(TableScan *x, uint64_t offset, uint64_t bytes, unsigned flags)
{
    Run run = {offset, bytes, flags};
    g_array_append_val(x->runs, run);
}

static bool add_compressed(TableScan *x, uint64_t entry, uint64_t bitmap)
{
    uint64_t host;
    uint32_t bytes;
    if ((entry & QCOW2_ENTRY_COPIED) || bitmap) {
        return false;
    }
    qcow2_parse_compressed(x->c->s, entry, &host, &bytes);
    add_run(x, host, bytes, QCOW2_REF_COMP);
    x->allocated++;
    x->compressed++;
    x->fragmented++;
    return qcow2_check_is_inside(x->c, host, bytes);
}

/* Nothing is odd about the entry of a data cluster or zeroes? */
static bool is_plain(const BDRVQcow2State *s, uint64_t entry, uint64_t bitmap)
{
    uint64_t offset = entry & QCOW2_ENTRY_OFFSET_MASK;
    uint64_t reserved = QCOW2_L2_STD_RESERVED_MASK;
    if (s->version < 3 || s->has_subclusters) {
        reserved |= QCOW2_ENTRY_ZERO;
    }
    uint32_t alloc = (uint32_t)bitmap, zero = bitmap >> 32;
    return !(entry & reserved) && !qcow2_offset_into_cluster(s, offset) &&
           (offset ? !(alloc & zero) : !alloc);
}

static bool add_data(TableScan *x, uint64_t entry, uint64_t clusters)
{
    const BDRVQcow2State *s = x->c->s;
    uint64_t offset = entry & QCOW2_ENTRY_OFFSET_MASK, bytes = clusters << s->cluster_bits;
    unsigned flags = QCOW2_REF_DATA;
    if (x->t->active_refs) {
        flags |= QCOW2_REF_ACTIVE;
        flags |= entry & QCOW2_ENTRY_COPIED ? QCOW2_REF_COPIED : QCOW2_REF_SHARED;
    }
    x->allocated += clusters;
    x->fragmented += x->next_contiguous && offset != x->next_contiguous;
    x->next_contiguous = offset + bytes;
    add_run(x, offset, bytes, flags);
    return qcow2_check_is_inside(x->c, offset, bytes);
}

/* The entries from @i on that make one run; *ret_n: how many. False: something is odd. */
static bool scan_entries(TableScan *x, uint32_t i, uint32_t *ret_n)
{
    const BDRVQcow2State *s = x->c->s;
    const uint64_t *raw = x->be + (size_t)i * (s->l2_entry_size / sizeof(uint64_t));
    uint64_t entry = be64toh(raw[0]), bitmap = s->has_subclusters ? be64toh(raw[1]) : 0;
    *ret_n = 1;
    if (entry & QCOW2_ENTRY_COMPRESSED) {
        return add_compressed(x, entry, bitmap);
    }
    if (!is_plain(s, entry, bitmap)) {
        return false;
    }
    *ret_n = qcow2_entries_alike(s, raw, s->l2_entries - i);
    return !(entry & QCOW2_ENTRY_OFFSET_MASK) || add_data(x, entry, *ret_n);
}

static bool scan_entries_of(TableScan *x)
{
    const BDRVQcow2State *s = x->c->s;
    for (uint32_t i = 0, n; i < s->l2_entries; i += n) {
        if (!scan_entries(x, i, &n)) {
            return false;
        }
    }
    return true;
}

/* ---------------------------------------------------------------- tables */

static void note_overflow(uint64_t cluster, void *opaque)
{
    ScanTask *task = opaque;
    g_array_append_val(task->overflows, cluster);
}

static void count_runs(ScanTask *task, const TableScan *x)
{
    Qcow2Check *c = task->scan->c;
    unsigned bits = c->s->cluster_bits;
    for (guint i = 0; i < x->runs->len; i++) {
        const Run *run = &g_array_index(x->runs, Run, i);
        uint64_t first = run->offset >> bits, last = (run->offset + run->bytes - 1) >> bits;
        qcow2_refmap_add(c->map, first, last - first + 1, x->t->refs, run->flags, note_overflow,
                         task);
    }
    task->allocated += x->allocated * x->t->active_refs;
    task->fragmented += x->fragmented * x->t->active_refs;
    task->compressed += x->compressed * x->t->active_refs;
}

static int scan_table(const Qcow2WalkTable *table, void *opaque)
{
    ScanTask *task = opaque;
    Qcow2Check *c = task->scan->c;
    guint index = task->first + (guint)table->l1_index;
    TableScan x = {.c = c, .be = table->be, .runs = task->runs,
                   .t = &g_array_index(c->tables, Qcow2CheckTable, index)};
    g_array_set_size(x.runs, 0);
    if (x.be && scan_entries_of(&x)) {
        task->scan->odd[index] = false;
        count_runs(task, &x);
        qb_progress_add(c->opts->progress, c->s->cluster_size);
    }
    return qcow2_check_cancelled(c) ? -EINTR : 0;
}

static int run_task(void *opaque)
{
    ScanTask *task = opaque;
    Scan *scan = task->scan;
    guint n = scan->c->tables->len;
    bdrv_graph_borrow();
    while ((task->first = atomic_fetch_add(&scan->next, scan->chunk)) < n &&
           !qcow2_check_cancelled(scan->c)) {
        guint count = MIN(scan->chunk, n - task->first);
        qcow2_check_walk(scan->c, task->first, count, scan_table, task); /* the rest stays odd */
    }
    bdrv_graph_return();
    return 0;
}

/* ---------------------------------------------------------------- all together */

static int compare_clusters(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static void collect(Qcow2Check *c, ScanTask *task, GArray *overflows)
{
    c->res->allocated_clusters += task->allocated;
    c->res->fragmented_clusters += task->fragmented;
    c->res->compressed_clusters += task->compressed;
    g_array_append_vals(overflows, task->overflows->data, task->overflows->len);
    g_array_unref(task->overflows);
    g_array_unref(task->runs);
}

static void report_overflows(Qcow2Check *c, GArray *overflows)
{
    if (overflows->len) {
        qsort(overflows->data, overflows->len, sizeof(uint64_t), compare_clusters);
    }
    for (guint i = 0; i < overflows->len; i++) {
        qcow2_check_overflow(g_array_index(overflows, uint64_t, i), c);
    }
}

static void run_tasks(Scan *scan, unsigned n)
{
    ScanTask tasks[MAX_THREADS] = {0};
    QbTaskGroup group;
    g_autoptr(GArray) overflows = g_array_new(false, false, sizeof(uint64_t));
    qb_group_init(&group);
    for (unsigned i = 0; i < n; i++) {
        tasks[i].scan = scan;
        tasks[i].runs = g_array_new(false, false, sizeof(Run));
        tasks[i].overflows = g_array_new(false, false, sizeof(uint64_t));
        if (i > 0) {
            qb_group_submit(&group, qb_compute_pool(), run_task, &tasks[i]);
        }
    }
    run_task(&tasks[0]);
    qb_group_wait(&group, 0);
    qb_group_destroy(&group);
    for (unsigned i = 0; i < n; i++) {
        collect(scan->c, &tasks[i], overflows);
    }
    report_overflows(scan->c, overflows);
}

uint8_t *qcow2_check_scan_tables(Qcow2Check *c)
{
    guint n = c->tables->len;
    Scan scan = {.c = c, .odd = g_malloc(MAX(n, 1))};
    memset(scan.odd, true, MAX(n, 1));
    unsigned threads = MIN(qb_cpu_count(), MAX_THREADS);
    guint least = CLAMP(CHUNK_BYTES >> c->s->cluster_bits, 1, QCOW2_CHECK_WALK);
    scan.chunk = CLAMP(n / (threads * THREAD_CHUNKS), least, QCOW2_CHECK_WALK);
    guint chunks = n / scan.chunk + (n % scan.chunk != 0);
    if (n && !c->s->has_data_file) {
        run_tasks(&scan, MIN(threads, chunks));
    }
    return scan.odd;
}
