/*
 * Quarantine: host runs that were freed in memory and may not be reused yet.
 *
 *      entry changed, run freed --> {run, generation, sequence, type} --+
 *                                                                       | that generation flushed,
 *                                                                       | users before it gone
 *      other sharers left, or not to be punched --> lower counts <------+
 *      last reference, to be punched --> punch the file --> lower counts'
 *
 * Invariants
 * 1. A count is lowered only when the unlink is stable and no user announced before it is left, so
 *    no cluster is punched, overwritten or reused while a stable reference or a reader exists
 *    (invariant 3).
 * 2. A cluster that is to be punched keeps its count until the punch is done: it cannot be
 *    allocated in between.
 * 3. One release at a time (the flusher calls it, holding its turn).
 * 4. What a shrink has freed (type ALWAYS) waits, between hold() and take(), as "spare" when it is
 *    ready: with its counts, so that it is nobody else's, to become other clusters of the image or to
 *    be released.  Beyond MAX_SPARE runs it is released at once.
 *
 * The amount is bounded by those who allocate, write and discard: qcow2_quarantine_full() makes
 * them flush (qcow2_relieve()); those who cut all off go on to MAX_RUNS, which bounds its memory, as
 * all they free shall be released at few barriers.  What users held back at the last flush does not
 * count, another one would not move it.  When nothing was freed for a second the background flushes
 * (release step); what that flush cannot release, because it fails or because somebody still uses it,
 * waits for the next flush.
 *
 * Not done: holding half of the file, so that more of what is freed in random order touches when it
 * is punched.  It saves an eighth of the time of such discards; hosts would wait for their space.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2.h"

#include <stdlib.h>

#define QUARANTINE_MAX (UINT64_C(64) << 20)
#define QUARANTINE_MIN (UINT64_C(1) << 20)
#define MAX_RUNS (1u << 18) /* 10 MiB of FreedRun */
#define MAX_SPARE (1u << 20)
#define MAX_BITS 64 /* for each run to be ordered: less than sorting costs */
#define NS_PER_MS UINT64_C(1000000)
#define IDLE_MS 1000

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
    _Atomic(uint64_t) held;      /* of them: not released by the last flush because of users */
    _Atomic(uint64_t) last_free; /* qb_now_ns() */
    _Atomic(unsigned) fresh;     /* runs entered since the last release */
    GArray *spare; /* FreedRun; NULL: nobody wants it */
};

static GArray *new_runs(void)
{
    return g_array_new(FALSE, FALSE, sizeof(FreedRun));
}

Qcow2Quarantine *qcow2_quarantine_new(void)
{
    Qcow2Quarantine *q = g_new0(Qcow2Quarantine, 1);

    qb_mutex_init(&q->lock);
    q->runs = new_runs();
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

static void enter_locked(const BDRVQcow2State *s, Qcow2Quarantine *q, const FreedRun *run)
    QB_REQUIRES(q->lock)
{
    FreedRun *last = q->runs->len ? &g_array_index(q->runs, FreedRun, q->runs->len - 1) : NULL;

    if (last && merges(s, last, run)) {
        last->bytes += run->bytes;
        last->seq = MAX(last->seq, run->seq); /* others may have been here since we asked */
    } else {
        g_array_append_vals(q->runs, run, 1);
        atomic_fetch_add(&q->fresh, 1);
    }
    atomic_fetch_add(&q->bytes, run->bytes);
}

/* @run says what all of @runs have in common. */
static void enter_all(BDRVQcow2State *s, const Qcow2HostRun *runs, size_t n, FreedRun run)
{
    Qcow2Quarantine *q = s->quarantine;
    QB_GUARD(&q->lock);

    for (size_t i = 0; i < n; i++) {
        run.offset = runs[i].offset;
        run.bytes = runs[i].bytes;
        enter_locked(s, q, &run);
    }
    atomic_store(&q->last_free, qb_now_ns());
}

static void free_all(BlockDriverState *bs, const Qcow2HostRun *runs, size_t n,
                     Qcow2DiscardType type)
{
    BDRVQcow2State *s = qcow2_state(bs);
    FreedRun common = {.type = type, .generation = qcow2_flush_generation(s),
                       .seq = qcow2_inflight_seq(s)};

    qcow2_cache_poison_list(s->cache, runs, n);
    enter_all(s, runs, n, common);
    qcow2_background_arm(s, QCOW2_BG_RELEASE, IDLE_MS);
}

void qcow2_free_list(BlockDriverState *bs, const Qcow2HostRun *runs, size_t n,
                     Qcow2DiscardType type)
{
    qcow2_alloc_leave(qcow2_state(bs), runs, n);
    free_all(bs, runs, n, type);
}

void qcow2_free_run(BlockDriverState *bs, uint64_t offset, uint64_t bytes, Qcow2DiscardType type)
{
    qcow2_free_list(bs, &(Qcow2HostRun){offset, bytes}, 1, type);
}

void qcow2_free_tables(BlockDriverState *bs, uint64_t offset, uint64_t bytes, Qcow2DiscardType type)
{
    free_all(bs, &(Qcow2HostRun){offset, bytes}, 1, type);
}

uint64_t qcow2_quarantine_bytes(BDRVQcow2State *s)
{
    return atomic_load(&s->quarantine->bytes);
}

uint64_t qcow2_quarantine_releasable(BDRVQcow2State *s)
{
    uint64_t held = atomic_load(&s->quarantine->held), bytes = qcow2_quarantine_bytes(s);

    return bytes > held ? bytes - held : 0;
}

bool qcow2_quarantine_full(BDRVQcow2State *s)
{
    uint64_t part = atomic_load(&s->file_end) / 16;

    return qcow2_quarantine_releasable(s) > CLAMP(part, QUARANTINE_MIN, QUARANTINE_MAX);
}

bool qcow2_quarantine_crowded(BDRVQcow2State *s)
{
    return atomic_load(&s->quarantine->fresh) > MAX_RUNS;
}

uint64_t qcow2_release_step(BlockDriverState *bs)
{
    BDRVQcow2State *s = qcow2_state(bs);
    uint64_t age = (qb_now_ns() - atomic_load(&s->quarantine->last_free)) / NS_PER_MS;

    if (bdrv_is_read_only(bs) || qcow2_quarantine_releasable(s) == 0) {
        return 0;
    }
    if (age < IDLE_MS) {
        return IDLE_MS - age;
    }
    (void)qcow2_flush(bs); /* whoever flushes next meets the same error */
    return 0;
}

void qcow2_quarantine_forget(BDRVQcow2State *s)
{
    Qcow2Quarantine *q = s->quarantine;
    QB_GUARD(&q->lock);

    g_array_set_size(q->runs, 0);
    atomic_store(&q->bytes, 0);
    atomic_store(&q->fresh, 0);
    atomic_store(&q->held, 0);
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

/* Takes out what is free to go, in its place in memory; the rest stays in its order. */
static GArray *take_free_locked(BDRVQcow2State *s, Qcow2Quarantine *q, uint64_t gen)
    QB_REQUIRES(q->lock)
{
    GArray *runs = g_steal_pointer(&q->runs);
    uint64_t oldest = qcow2_inflight_oldest(s), held = 0, taken = 0;
    guint n = 0;

    q->runs = new_runs();
    for (guint i = 0; i < runs->len; i++) {
        FreedRun run = g_array_index(runs, FreedRun, i);
        bool stable = run.generation <= gen;
        if (stable && (run.seq <= oldest ||
                       !qcow2_inflight_busy(s, run.seq, run.offset, run.bytes))) {
            g_array_index(runs, FreedRun, n++) = run;
            taken += run.bytes;
        } else {
            held += stable ? run.bytes : 0;
            g_array_append_val(q->runs, run);
        }
    }
    g_array_set_size(runs, n);
    atomic_fetch_sub(&q->bytes, taken);
    atomic_store(&q->held, held);
    atomic_store(&q->fresh, 0);
    return runs;
}

static bool all_spare(const GArray *runs)
{
    bool spare = runs->len <= MAX_SPARE;

    for (guint i = 0; i < runs->len && spare; i++) {
        spare = g_array_index(runs, FreedRun, i).type == QCOW2_DISCARD_ALWAYS;
    }
    return spare;
}

/* Keeps of @runs what may be spare, and returns the others. */
static GArray *keep_spare_locked(Qcow2Quarantine *q, GArray *runs) QB_REQUIRES(q->lock)
{
    guint n = 0;

    if (q->spare->len == 0 && all_spare(runs)) { /* nearly always, and there may be many */
        GArray *none = q->spare;
        q->spare = runs;
        return none;
    }
    for (guint i = 0; i < runs->len; i++) {
        FreedRun run = g_array_index(runs, FreedRun, i);
        if (q->spare->len < MAX_SPARE && run.type == QCOW2_DISCARD_ALWAYS) {
            g_array_append_val(q->spare, run);
        } else {
            g_array_index(runs, FreedRun, n++) = run;
        }
    }
    g_array_set_size(runs, n);
    return runs;
}

/* What is to be released now. */
static GArray *take_ready(BDRVQcow2State *s, uint64_t gen)
{
    Qcow2Quarantine *q = s->quarantine;
    QB_GUARD(&q->lock);
    GArray *ready = take_free_locked(s, q, gen);

    return q->spare ? keep_spare_locked(q, ready) : ready;
}

/* Where the references that go begin or end to cover clusters. */
typedef struct Edge {
    uint64_t offset;
    int refs, punchers; /* +1 or -1; punchers: of those whose space is to be given back */
} Edge;

/* A stretch of clusters that each lose the same number of references. */
typedef struct Loss {
    uint64_t offset, bytes;
    int times;
    bool punch;
} Loss;

static gint compare_edges(gconstpointer a, gconstpointer b)
{
    const Edge *ea = a, *eb = b;

    return ea->offset < eb->offset ? -1 : ea->offset > eb->offset;
}

static gint compare_freed_runs(gconstpointer a, gconstpointer b)
{
    const FreedRun *ra = a, *rb = b;

    return ra->offset < rb->offset ? -1 : ra->offset > rb->offset;
}

/* Much of what is sorted here is in order already. */
static void sort_array(GArray *array, GCompareFunc compare)
{
    guint size = g_array_get_element_size(array);

    for (guint i = 1; i < array->len; i++) {
        if (compare(array->data + (gsize)(i - 1) * size, array->data + (gsize)i * size) > 0) {
            g_array_sort(array, compare);
            return;
        }
    }
}

static gint compare_losses(gconstpointer a, gconstpointer b)
{
    const Loss *la = a, *lb = b;

    if (la->times != lb->times) {
        return la->times - lb->times;
    }
    return la->offset < lb->offset ? -1 : la->offset > lb->offset;
}

/* Every run covers the clusters that it touches.  When the runs are in order, and none of them
 * overlap, so are their edges. */
static GArray *edges_of(const BDRVQcow2State *s, GArray *ready)
{
    GArray *edges = g_array_sized_new(FALSE, FALSE, sizeof(Edge), 2 * ready->len);

    sort_array(ready, compare_freed_runs);
    for (guint i = 0; i < ready->len; i++) {
        const FreedRun *run = &g_array_index(ready, FreedRun, i);
        int punch = may_punch(s, run->type);
        Edge pair[] = {
            {qcow2_start_of_cluster(s, run->offset), 1, punch},
            {qb_align_up(run->offset + run->bytes, s->cluster_size), -1, -punch},
        };
        g_array_append_vals(edges, pair, 2);
    }
    sort_array(edges, compare_edges);
    return edges;
}

static void append_loss(GArray *losses, const Loss *loss)
{
    Loss *last = losses->len ? &g_array_index(losses, Loss, losses->len - 1) : NULL;

    if (last && last->offset + last->bytes == loss->offset && last->times == loss->times &&
        last->punch == loss->punch) {
        last->bytes += loss->bytes;
    } else {
        g_array_append_vals(losses, loss, 1);
    }
}

/* What goes from one edge to the next, in the order of the times. */
static GArray *losses_by_edges(const BDRVQcow2State *s, GArray *ready)
{
    g_autoptr(GArray) edges = edges_of(s, ready);
    GArray *losses = g_array_new(FALSE, FALSE, sizeof(Loss));
    int refs = 0, punchers = 0;

    for (guint i = 0; i + 1 < edges->len; i++) {
        const Edge *edge = &g_array_index(edges, Edge, i), *next = edge + 1;
        refs += edge->refs;
        punchers += edge->punchers;
        if (refs > 0 && next->offset > edge->offset) {
            Loss loss = {edge->offset, next->offset - edge->offset, refs, punchers > 0};
            append_loss(losses, &loss);
        }
    }
    sort_array(losses, compare_losses);
    return losses;
}

/* Clusters from number @first up to @end, a bit for each, and at least one more. */
typedef struct ClusterSet {
    uint64_t first, end;
    uint64_t *bits; /* NULL: no set */
} ClusterSet;

/* True: none of the clusters that the run touches was in the set. */
static bool set_add(const BDRVQcow2State *s, ClusterSet *set, const FreedRun *run)
{
    uint64_t end = qcow2_size_to_clusters(s, run->offset + run->bytes) - set->first;
    uint64_t seen = 0;

    for (uint64_t i = (run->offset >> s->cluster_bits) - set->first; i < end; i++) {
        uint64_t bit = UINT64_C(1) << i % 64;
        seen |= set->bits[i / 64] & bit;
        set->bits[i / 64] |= bit;
    }
    return !seen;
}

/* The first from @i on, counted from the first of the set, that is in it (@in) or is not; else its
 * length. */
static uint64_t set_next(const ClusterSet *set, uint64_t i, bool in)
{
    uint64_t n = set->end - set->first;

    while (i < n) {
        uint64_t bits = (in ? set->bits[i / 64] : ~set->bits[i / 64]) >> i % 64;
        if (bits) {
            return i + (uint64_t)__builtin_ctzll(bits);
        }
        i = (i / 64 + 1) * 64;
    }
    return n;
}

static GArray *losses_of_set(const BDRVQcow2State *s, const ClusterSet *set, bool punch)
{
    GArray *losses = g_array_new(FALSE, FALSE, sizeof(Loss));
    uint64_t n = set->end - set->first;

    for (uint64_t i = set_next(set, 0, true), end; i < n; i = set_next(set, end, true)) {
        end = set_next(set, i, false);
        Loss loss = {(set->first + i) << s->cluster_bits, (end - i) << s->cluster_bits, 1, punch};
        g_array_append_val(losses, loss);
    }
    return losses;
}

/* The smallest set that all the runs fit into, empty; no bits: sorting them is cheaper, or they are
 * not of one kind. */
static ClusterSet set_for(const BDRVQcow2State *s, const GArray *runs)
{
    ClusterSet set = {.first = UINT64_MAX};
    bool alike = true;

    for (guint i = 0; i < runs->len; i++) {
        const FreedRun *run = &g_array_index(runs, FreedRun, i);
        set.first = MIN(set.first, run->offset >> s->cluster_bits);
        set.end = MAX(set.end, qcow2_size_to_clusters(s, run->offset + run->bytes));
        alike &= run->type == g_array_index(runs, FreedRun, 0).type;
    }
    if (alike && runs->len > 1 && set.end - set.first <= (uint64_t)runs->len * MAX_BITS) {
        set.bits = g_new0(uint64_t, (set.end - set.first) / 64 + 1);
    }
    return set;
}

/* The usual case of many clusters that were freed in any order, each of them once: NULL if it is
 * another one. */
static GArray *losses_by_set(const BDRVQcow2State *s, const GArray *ready)
{
    ClusterSet set = set_for(s, ready);
    g_autofree uint64_t *bits = set.bits;
    bool once = bits != NULL;

    for (guint i = 0; i < ready->len && once; i++) {
        once = set_add(s, &set, &g_array_index(ready, FreedRun, i));
    }
    return once ? losses_of_set(s, &set, may_punch(s, g_array_index(ready, FreedRun, 0).type))
                : NULL;
}

static GArray *cluster_losses(const BDRVQcow2State *s, GArray *ready)
{
    GArray *losses = losses_by_set(s, ready);

    return losses ? losses : losses_by_edges(s, ready);
}

/* A reader that had seen the old L1 may have loaded a table again after it was freed. */
static void poison_lost(BDRVQcow2State *s, const GArray *losses)
{
    for (guint i = 0; i < losses->len; i++) {
        const Loss *loss = &g_array_index(losses, Loss, i);
        qcow2_cache_poison(s->cache, loss->offset, loss->bytes);
    }
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

/* Sorts the clusters of one loss: those whose last reference goes and whose space is to be given
 * back into @punch, the others into @now. */
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
        append_run(count == (uint64_t)loss->times ? punch : now, loss->offset + pos, n);
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

static int lower(BlockDriverState *bs, GArray *runs, int times)
{
    return runs->len ? qcow2_update_refcounts(bs, (Qcow2HostRun *)runs->data, runs->len, -times)
                     : 0;
}

/* Handles @n losses of the same number of references. */
static int release_losses(BlockDriverState *bs, const Loss *losses, guint n)
{
    g_autoptr(GArray) now = g_array_new(FALSE, FALSE, sizeof(Qcow2HostRun));
    g_autoptr(GArray) punch = g_array_new(FALSE, FALSE, sizeof(Qcow2HostRun));
    int ret = 0;

    for (guint i = 0; i < n && ret == 0; i++) {
        ret = sort_loss(bs, &losses[i], now, punch);
    }
    if (ret == 0) {
        ret = lower(bs, now, losses->times);
    }
    if (ret == 0) {
        punch_runs(bs, punch);
        ret = lower(bs, punch, losses->times);
    }
    return ret;
}

/* Handles @n losses of the same number of references: clusters that lose the last one keep one count. */
static int lower_to_spare(BlockDriverState *bs, const Loss *losses, guint n, GArray *ret)
{
    g_autoptr(GArray) now = g_array_new(FALSE, FALSE, sizeof(Qcow2HostRun));
    g_autoptr(GArray) last = g_array_new(FALSE, FALSE, sizeof(Qcow2HostRun));
    int err = 0;

    for (guint i = 0; i < n && err == 0; i++) {
        err = sort_loss(bs, &losses[i], now, last);
    }
    err = err < 0 ? err : lower(bs, now, losses->times);
    if (err == 0 && losses->times > 1) {
        err = lower(bs, last, losses->times - 1);
    }
    if (err == 0 && last->len) {
        g_array_append_vals(ret, last->data, last->len);
    }
    return err;
}

/* As release_losses(), but what loses its last reference goes to @spare. */
static int release_to(BlockDriverState *bs, const Loss *losses, guint n, GArray *spare)
{
    return spare ? lower_to_spare(bs, losses, n, spare) : release_losses(bs, losses, n);
}

/* Releases @runs, which it sorts, or, where @spare is not NULL, keeps what it can there. */
static int release_runs(BlockDriverState *bs, GArray *runs, GArray *spare)
{
    g_autoptr(GArray) losses = cluster_losses(qcow2_state(bs), runs);
    int result = 0;

    poison_lost(qcow2_state(bs), losses);
    for (guint first = 0, end; first < losses->len; first = end) {
        const Loss *loss = &g_array_index(losses, Loss, first);
        int ret;
        for (end = first + 1; end < losses->len && loss[end - first].times == loss->times; end++) {
        }
        ret = release_to(bs, loss, end - first, spare);
        result = result ? result : ret;
    }
    return result;
}

int qcow2_quarantine_release(BlockDriverState *bs, uint64_t gen)
{
    g_autoptr(GArray) ready = take_ready(qcow2_state(bs), gen);

    if (!ready->len) {
        return 0;
    }
    int ret = release_runs(bs, ready, NULL);
    bdrv_debug_event(bs->file, "cluster_free");
    return ret;
}

/* ---- spare clusters ---- */

void qcow2_quarantine_hold(BDRVQcow2State *s)
{
    Qcow2Quarantine *q = s->quarantine;
    QB_GUARD(&q->lock);

    assert(!q->spare);
    q->spare = new_runs();
}

static GArray *end_hold(BDRVQcow2State *s)
{
    Qcow2Quarantine *q = s->quarantine;
    QB_GUARD(&q->lock);

    return g_steal_pointer(&q->spare);
}

static gint compare_host_runs(gconstpointer a, gconstpointer b)
{
    const Qcow2HostRun *ra = a, *rb = b;

    return ra->offset < rb->offset ? -1 : ra->offset > rb->offset;
}

int qcow2_quarantine_take(BlockDriverState *bs, GArray *ret)
{
    g_autoptr(GArray) spare = end_hold(qcow2_state(bs));

    int err = release_runs(bs, spare, ret);
    sort_array(ret, compare_host_runs);
    return err;
}

int qcow2_release_spare(BlockDriverState *bs, GArray *spare, uint64_t punch_end)
{
    g_autoptr(GArray) punch = g_array_new(FALSE, FALSE, sizeof(Qcow2HostRun));
    int ret;

    for (guint i = 0; i < spare->len; i++) {
        Qcow2HostRun run = g_array_index(spare, Qcow2HostRun, i);
        if (run.offset < punch_end) {
            run.bytes = MIN(run.bytes, punch_end - run.offset);
            g_array_append_val(punch, run);
        }
    }
    punch_runs(bs, punch);
    ret = lower(bs, spare, 1);
    g_array_set_size(spare, 0);
    return ret;
}
