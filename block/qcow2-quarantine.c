/*
 * Quarantine: host runs that were freed in memory and may not be reused yet.
 *
 *      entry changed, run freed --> {run, generation, sequence, type} --+
 *                                                                       | flush of that generation done,
 *                                                                       | users announced before have left
 *      other sharers left, or not to be punched --> lower counts <------+
 *      last reference, to be punched --> punch the file --> lower counts'
 *
 * Invariants
 * 1. A count is lowered only when the unlink is stable and no user announced before it is left, so no
 *    cluster is punched, overwritten or reused while a stable reference or a reader exists (invariant 3).
 * 2. A cluster that is to be punched keeps its count until the punch is done: it cannot be allocated
 *    in between.
 * 3. One release at a time (the flusher calls it, holding its turn).
 *
 * The amount is bounded by those who allocate and write: qcow2_quarantine_full() makes them flush.
 * Deliberately not done: releasing by a timer; an idle image releases at its next flush or close.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2.h"

#include <stdlib.h>

#define QUARANTINE_MAX (UINT64_C(64) << 20)
#define QUARANTINE_MIN (UINT64_C(1) << 20)

typedef struct FreedRun {
    uint64_t offset, bytes;
    uint64_t generation; /* the flush of this one makes the unlink stable */
    uint64_t seq;        /* users announced before it may still use the run */
    Qcow2DiscardType type;
} FreedRun;

struct Qcow2Quarantine {
    QbMutex lock;
    GArray *runs; /* FreedRun */
    _Atomic(uint64_t) bytes;
};

Qcow2Quarantine *qcow2_quarantine_new(void)
{
    Qcow2Quarantine *q = g_new0(Qcow2Quarantine, 1);

    qb_mutex_init(&q->lock);
    q->runs = g_array_new(FALSE, FALSE, sizeof(FreedRun));
    return q;
}

void qcow2_quarantine_free(Qcow2Quarantine *q)
{
    if (q) {
        g_array_free(q->runs, TRUE);
        qb_mutex_destroy(&q->lock);
        g_free(q);
    }
}

/* Runs of whole clusters that touch may become one; byte runs of compressed clusters may not, since
 * each of them counts on the cluster they share. */
static bool merges(const BDRVQcow2State *s, const FreedRun *last, const FreedRun *run)
{
    return last->type == run->type && last->generation == run->generation &&
           last->offset + last->bytes == run->offset &&
           qb_is_aligned(last->offset | run->offset | run->bytes, s->cluster_size);
}

void qcow2_free_run(BlockDriverState *bs, uint64_t offset, uint64_t bytes, Qcow2DiscardType type)
{
    qcow2_alloc_leave(qcow2_state(bs), offset, bytes);
    qcow2_free_tables(bs, offset, bytes, type);
}

void qcow2_free_tables(BlockDriverState *bs, uint64_t offset, uint64_t bytes, Qcow2DiscardType type)
{
    BDRVQcow2State *s = qcow2_state(bs);
    Qcow2Quarantine *q = s->quarantine;
    FreedRun run = {.offset = offset, .bytes = bytes, .type = type,
                    .generation = qcow2_flush_generation(s), .seq = qcow2_inflight_seq(s)};

    qcow2_cache_poison(s->cache, offset, bytes);
    QB_GUARD(&q->lock);
    FreedRun *last = q->runs->len ? &g_array_index(q->runs, FreedRun, q->runs->len - 1) : NULL;
    if (last && merges(s, last, &run)) {
        last->bytes += bytes;
        last->seq = run.seq;
    } else {
        g_array_append_val(q->runs, run);
    }
    atomic_fetch_add(&q->bytes, bytes);
}

void qcow2_free_entry(BlockDriverState *bs, uint64_t l2_entry, Qcow2DiscardType type)
{
    BDRVQcow2State *s = qcow2_state(bs);
    uint64_t offset = l2_entry & QCOW2_ENTRY_OFFSET_MASK;

    if (s->has_data_file) {
        return;
    }
    if (l2_entry & QCOW2_ENTRY_COMPRESSED) {
        uint32_t bytes;
        qcow2_parse_compressed(s, l2_entry, &offset, &bytes);
        qcow2_free_run(bs, offset, bytes, type);
    } else if (offset) {
        qcow2_free_run(bs, offset, s->cluster_size, type);
    }
}

uint64_t qcow2_quarantine_bytes(BDRVQcow2State *s)
{
    return atomic_load(&s->quarantine->bytes);
}

bool qcow2_quarantine_full(BDRVQcow2State *s)
{
    uint64_t part = MAX(atomic_load(&s->file_end) / 16, QUARANTINE_MIN);

    return qcow2_quarantine_bytes(s) > MIN(part, QUARANTINE_MAX);
}

/* ---- release ---- */

static bool may_punch(const BDRVQcow2State *s, Qcow2DiscardType type)
{
    switch (type) {
    case QCOW2_DISCARD_NEVER:
        return false;
    case QCOW2_DISCARD_ALWAYS:
        return true;
    case QCOW2_DISCARD_REQUEST:
        return s->discard_request;
    case QCOW2_DISCARD_SNAPSHOT:
        return s->discard_snapshot;
    case QCOW2_DISCARD_OTHER:
        return s->discard_other;
    }
    return false;
}

/* Takes out what is free to go; the rest stays in its order. */
static GArray *take_ready(BDRVQcow2State *s, uint64_t gen)
{
    Qcow2Quarantine *q = s->quarantine;
    QB_GUARD(&q->lock);
    GArray *ready = g_array_new(FALSE, FALSE, sizeof(FreedRun));
    guint kept = 0;

    for (guint i = 0; i < q->runs->len; i++) {
        FreedRun run = g_array_index(q->runs, FreedRun, i);
        if (run.generation <= gen && !qcow2_inflight_busy(s, run.seq, run.offset, run.bytes)) {
            g_array_append_val(ready, run);
            atomic_fetch_sub(&q->bytes, run.bytes);
        } else {
            g_array_index(q->runs, FreedRun, kept++) = run;
        }
    }
    g_array_set_size(q->runs, kept);
    return ready;
}

/* A reader that had seen the old L1 may have loaded a table again after it was freed. */
static void poison_ready(BDRVQcow2State *s, const GArray *ready)
{
    for (guint i = 0; i < ready->len; i++) {
        const FreedRun *run = &g_array_index(ready, FreedRun, i);
        qcow2_cache_poison(s->cache, run->offset, run->bytes);
    }
}

/* A stretch of clusters that each lose the same number of references. */
typedef struct Loss {
    uint64_t offset, bytes;
    unsigned times;
    bool punch;
} Loss;

static gint compare_loss(gconstpointer a, gconstpointer b)
{
    const Loss *la = a, *lb = b;

    return la->offset < lb->offset ? -1 : la->offset > lb->offset;
}

/* Byte runs become the clusters they touch, one by one; whole runs stay as they are. */
static GArray *cluster_losses(const BDRVQcow2State *s, const GArray *ready)
{
    GArray *losses = g_array_new(FALSE, FALSE, sizeof(Loss));

    for (guint i = 0; i < ready->len; i++) {
        const FreedRun *run = &g_array_index(ready, FreedRun, i);
        uint64_t start = qcow2_start_of_cluster(s, run->offset);
        uint64_t end = qb_align_up(run->offset + run->bytes, s->cluster_size);
        bool whole = qb_is_aligned(run->offset | run->bytes, s->cluster_size);
        uint64_t step = whole ? end - start : s->cluster_size;
        for (; start < end; start += step) {
            Loss loss = {start, step, 1, may_punch(s, run->type)};
            g_array_append_val(losses, loss);
        }
    }
    g_array_sort(losses, compare_loss);
    return losses;
}

/* Single clusters that several byte runs of this release touch count together. Whole runs never
 * overlap one another: each stands for the one reference that owned the clusters, or for one of
 * several sharers, which then come as equal runs. */
static void fold_equal(GArray *losses)
{
    guint n = 0;

    for (guint i = 0; i < losses->len; i++) {
        const Loss *loss = &g_array_index(losses, Loss, i);
        Loss *last = n ? &g_array_index(losses, Loss, n - 1) : NULL;
        if (last && last->offset == loss->offset && last->bytes == loss->bytes) {
            last->times++;
            last->punch |= loss->punch;
        } else {
            g_array_index(losses, Loss, n++) = *loss;
        }
    }
    g_array_set_size(losses, n);
}

static void append_run(GArray *runs, uint64_t offset, uint64_t bytes)
{
    Qcow2HostRun *last = runs->len ? &g_array_index(runs, Qcow2HostRun, runs->len - 1) : NULL;
    Qcow2HostRun run = {offset, bytes};

    if (last && last->offset + last->bytes == offset) {
        last->bytes += bytes;
    } else {
        g_array_append_val(runs, run);
    }
}

/* Sorts the clusters of one loss: those whose last reference goes and whose space is to be given back
 * into @punch, the others into @now. */
static int sort_loss(BlockDriverState *bs, const Loss *loss, GArray *now, GArray *punch)
{
    if (!loss->punch) {
        append_run(now, loss->offset, loss->bytes);
        return 0;
    }
    for (uint64_t pos = 0, n; pos < loss->bytes; pos += n) {
        uint64_t count;
        int ret = qcow2_count_run(bs, loss->offset + pos, loss->bytes - pos, &count, &n);
        if (ret < 0) {
            return ret;
        }
        append_run(count == loss->times ? punch : now, loss->offset + pos, n);
    }
    return 0;
}

static void punch_runs(BlockDriverState *bs, const GArray *runs)
{
    for (guint i = 0; i < runs->len; i++) {
        const Qcow2HostRun *run = &g_array_index(runs, Qcow2HostRun, i);
        bdrv_pdiscard(bs->file, (int64_t)run->offset, (int64_t)run->bytes); /* advisory */
    }
}

static int lower(BlockDriverState *bs, GArray *runs, unsigned times)
{
    int ret = 0;

    for (unsigned i = 0; i < times && ret == 0; i++) {
        ret = qcow2_update_refcounts(bs, (Qcow2HostRun *)runs->data, runs->len, -1);
    }
    return ret;
}

/* Handles all losses of @times references; most releases have only times == 1. */
static int release_losses(BlockDriverState *bs, const GArray *losses, unsigned times)
{
    g_autoptr(GArray) now = g_array_new(FALSE, FALSE, sizeof(Qcow2HostRun));
    g_autoptr(GArray) punch = g_array_new(FALSE, FALSE, sizeof(Qcow2HostRun));
    int ret = 0;

    for (guint i = 0; i < losses->len && ret == 0; i++) {
        const Loss *loss = &g_array_index(losses, Loss, i);
        if (loss->times == times) {
            ret = sort_loss(bs, loss, now, punch);
        }
    }
    if (ret == 0 && now->len) {
        ret = lower(bs, now, times);
    }
    if (ret == 0 && punch->len) {
        punch_runs(bs, punch);
        ret = lower(bs, punch, times);
    }
    return ret;
}

int qcow2_quarantine_release(BlockDriverState *bs, uint64_t gen)
{
    g_autoptr(GArray) ready = take_ready(qcow2_state(bs), gen);
    g_autoptr(GArray) losses = NULL;
    unsigned most = 0;
    int result = 0;

    if (!ready->len) {
        return 0;
    }
    poison_ready(qcow2_state(bs), ready);
    losses = cluster_losses(qcow2_state(bs), ready);
    fold_equal(losses);
    for (guint i = 0; i < losses->len; i++) {
        most = MAX(most, g_array_index(losses, Loss, i).times);
    }
    for (unsigned times = 1; times <= most; times++) {
        int ret = release_losses(bs, losses, times);
        result = result ? result : ret;
    }
    bdrv_debug_event(bs->file, "cluster_free");
    return result;
}
