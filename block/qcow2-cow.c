/*
 * Writing guest data.
 *
 *   announce -> look up -> mapped and ours alone? -> write in place -> leave           (plain)
 *                              no
 *                              v
 *   leave, serialise the clusters of the request, look up again                   (serialised)
 *     FRESH     allocate clusters, write, link
 *     REUSE     the host cluster is kept though the data are not valid: write there, link
 *     IN_PLACE  as above
 *
 * What a step of an allocating write puts into the file is one contiguous range:
 *
 *     host cluster      |               |               |               |
 *     caller's data               [======================)
 *     fill              [  head  )                        [    tail    )
 *                       fill_start start                 end           fill_end
 *
 * Head and tail reach out to the subcluster, and in a new host cluster to all subclusters whose
 * content was in the old one.  They are read as a guest would read them (so old data, streams,
 * zeroes and the backing file need no cases here) and go out with the data in one vector.  Long
 * ones that read zero are left to the file's zero operation.
 *
 * Invariants
 *  1. New host clusters are named by no entry until their content is written; failure gives
 *     them back.
 *  2. From serialise to the end of the request nobody else changes entries in its range.
 *     qcow2_link() compares all the same, and a difference begins the step anew.
 *  3. A subcluster gets its "allocated" bit only if all of it was written or was valid before.
 *  4. Nothing that is written in place is read for filling: those subclusters are valid as
 *     they are.
 *
 * Not done: no search for zeroes in copied data.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-io-int.h"

#define MAX_RUNS 32
#define MAX_STEP_CLUSTERS 2048
#define MAX_STEP_BYTES (UINT64_C(1) << 30)
#define LONG_FILL (64 << 10) /* from here on the file's zero operation is worth a call */

/* --- in place --- */

typedef struct InPlace {
    Qcow2Mapping run[MAX_RUNS];
    unsigned n;
    uint64_t bytes;
} InPlace;

/* The runs from @guest on that may be written in place, none if the first byte may not. */
static int plan_in_place(const Qcow2Io *io, uint64_t guest, uint64_t bytes, InPlace *plan)
{
    plan->n = 0;
    plan->bytes = 0;
    while (plan->bytes < bytes && plan->n < MAX_RUNS) {
        Qcow2Mapping *m = &plan->run[plan->n];
        int ret = qcow2_lookup(io->bs, guest + plan->bytes, bytes - plan->bytes, m);
        if (ret < 0) {
            return ret;
        }
        if (m->type != QCOW2_NORMAL || !m->copied) {
            break;
        }
        plan->bytes += m->bytes;
        plan->n++;
    }
    return 0;
}

/* Data never go where metadata are, whatever an entry says. */
static int guard_data(const Qcow2Io *io, uint64_t host, uint64_t bytes)
{
    if (io->s->has_data_file) {
        return 0;
    }
    return qcow2_check_overlap(io->bs, QCOW2_OL_NONE, host, bytes);
}

static int write_in_place_batch(const Qcow2Io *io, const InPlace *plan)
{
    g_autoptr(GArray) ops = g_array_new(false, false, sizeof(BdrvBatchOp));
    for (unsigned i = 0; i < plan->n; i++) {
        const Qcow2Mapping *m = &plan->run[i];
        bdrv_batch_add(ops, BDRV_BATCH_WRITE, (int64_t)m->host, (int64_t)m->bytes, io->qiov,
                       qcow2_io_pos(io, m->guest));
    }
    return bdrv_run_batch(io->s->data_file, (BdrvBatchOp *)ops->data, ops->len);
}

static int write_runs_in_place(const Qcow2Io *io, const InPlace *plan)
{
    for (unsigned i = 0; i < plan->n; i++) {
        int ret = guard_data(io, plan->run[i].host, plan->run[i].bytes);
        if (ret < 0) {
            return ret;
        }
    }
    bdrv_debug_event(io->bs->file, "write_aio");
    if (plan->n > 1) {
        return write_in_place_batch(io, plan);
    }
    const Qcow2Mapping *m = &plan->run[0];
    return bdrv_pwritev_part(io->s->data_file, (int64_t)m->host, (int64_t)m->bytes, io->qiov,
                             qcow2_io_pos(io, m->guest), 0);
}

/* The core may bring a request in pieces: nothing of it is behind @end. */
static bool ends_request(const Qcow2Io *io, uint64_t end)
{
    return io->req && end >= io->req->range.end;
}

/* Bytes written from @guest on; 0 when the first needs more than that. Whoever unlinks the clusters
 * meanwhile may pass, once nothing is left to be serialised for. */
static int64_t write_in_place(const Qcow2Io *io, uint64_t guest, uint64_t bytes)
{
    InPlace plan;
    Qcow2User user;
    qcow2_user_announce_writing(io->s, &user);
    int ret = plan_in_place(io, guest, bytes, &plan);
    if (ret == 0 && plan.bytes == bytes && ends_request(io, guest + bytes)) {
        bdrv_request_settle(io->req);
    }
    if (ret == 0 && plan.n == 1) {
        qcow2_user_resolve(io->s, &user, plan.run[0].host, plan.run[0].bytes);
    }
    if (ret == 0 && plan.n > 0) {
        ret = write_runs_in_place(io, &plan);
    }
    qcow2_user_leave(io->s, &user);
    return ret < 0 ? ret : (int64_t)plan.bytes;
}

/* --- a step of an allocating write: what to do --- */

typedef enum WriteHow { WRITE_IN_PLACE, WRITE_REUSE, WRITE_FRESH } WriteHow;

typedef struct WriteStep {
    const Qcow2Io *io;
    WriteHow how;
    uint64_t cluster;              /* guest offset of the first one */
    size_t n;                      /* clusters */
    uint64_t start, end;           /* the caller's data */
    uint64_t fill_start, fill_end; /* what is written, a superset */
    uint64_t host, want;           /* host of the first cluster; where it would be best */
    Qcow2L2Entry *old, *new;
} WriteStep;

static uint64_t cluster_guest(const WriteStep *w, size_t i)
{
    return w->cluster + ((uint64_t)i << w->io->s->cluster_bits);
}

/* Subclusters of cluster @i that [start, end) touches, as [*ret_first, *ret_end). */
static void touched(const WriteStep *w, size_t i, uint64_t start, uint64_t end,
                    unsigned *ret_first, unsigned *ret_end)
{
    const BDRVQcow2State *s = w->io->s;
    uint64_t base = cluster_guest(w, i);
    uint64_t from = MAX(start, base) - base;
    uint64_t to = MIN(end, base + s->cluster_size) - base;
    assert(from < to && to <= s->cluster_size);
    *ret_first = (unsigned)(from >> s->subcluster_bits);
    *ret_end = (unsigned)((to - 1) >> s->subcluster_bits) + 1;
}

static bool all_normal(const BDRVQcow2State *s, Qcow2L2Entry e, unsigned first, unsigned end)
{
    Qcow2ClusterType type;
    unsigned run = qcow2_entry_run(s, e, first, &type);
    return type == QCOW2_NORMAL && first + run >= end;
}

static WriteHow how_to_write(const WriteStep *w, size_t i)
{
    const BDRVQcow2State *s = w->io->s;
    unsigned first, end;
    if (!qcow2_entry_copied(s, w->old[i])) {
        return WRITE_FRESH;
    }
    touched(w, i, w->start, w->end, &first, &end);
    return all_normal(s, w->old[i], first, end) ? WRITE_IN_PLACE : WRITE_REUSE;
}

static void step_cut(WriteStep *w, size_t n)
{
    const BDRVQcow2State *s = w->io->s;
    w->n = n;
    w->end = MIN(w->end, w->cluster + ((uint64_t)n << s->cluster_bits));
}

/* Cuts the step to the clusters that are written like the first, with host clusters in a row. */
static void step_choose(WriteStep *w)
{
    const BDRVQcow2State *s = w->io->s;
    w->how = how_to_write(w, 0);
    w->host = qcow2_entry_host(w->old[0]);
    size_t i = 1;
    while (i < w->n && how_to_write(w, i) == w->how) {
        uint64_t expected = w->host + ((uint64_t)i << s->cluster_bits);
        if (w->how != WRITE_FRESH && qcow2_entry_host(w->old[i]) != expected) {
            break;
        }
        i++;
    }
    step_cut(w, i);
}

/* Content that a new host cluster would lose. */
static bool must_copy(const BDRVQcow2State *s, Qcow2L2Entry e, unsigned sc)
{
    Qcow2ClusterType type = qcow2_entry_type(s, e, sc);
    return type == QCOW2_NORMAL || type == QCOW2_COMPRESSED;
}

static uint64_t fill_start_of(const WriteStep *w)
{
    const BDRVQcow2State *s = w->io->s;
    Qcow2L2Entry e = w->old[0];
    unsigned first, end, sc = 0;
    touched(w, 0, w->start, w->end, &first, &end);
    if (w->how == WRITE_REUSE) {
        bool valid = qcow2_entry_type(s, e, first) == QCOW2_NORMAL;
        return valid ? w->start : qb_align_down(w->start, s->subcluster_size);
    }
    while (sc < first && !must_copy(s, e, sc)) {
        sc++;
    }
    return w->cluster + ((uint64_t)sc << s->subcluster_bits);
}

static uint64_t fill_end_of(const WriteStep *w)
{
    const BDRVQcow2State *s = w->io->s;
    Qcow2L2Entry e = w->old[w->n - 1];
    unsigned first, end, sc = s->subclusters_per_cluster;
    touched(w, w->n - 1, w->start, w->end, &first, &end);
    if (w->how == WRITE_REUSE) {
        bool valid = qcow2_entry_type(s, e, end - 1) == QCOW2_NORMAL;
        return valid ? w->end : qb_align_up(w->end, s->subcluster_size);
    }
    while (sc > end && !must_copy(s, e, sc - 1)) {
        sc--;
    }
    return cluster_guest(w, w->n - 1) + ((uint64_t)sc << s->subcluster_bits);
}

static void step_set_new(WriteStep *w)
{
    const BDRVQcow2State *s = w->io->s;
    for (size_t i = 0; i < w->n; i++) {
        uint64_t host = w->host + ((uint64_t)i << s->cluster_bits);
        w->new[i] = (Qcow2L2Entry){.entry = host | QCOW2_ENTRY_COPIED};
        if (!s->has_subclusters) {
            continue;
        }
        unsigned first, end;
        touched(w, i, w->fill_start, w->fill_end, &first, &end);
        uint64_t mask = (UINT64_C(1) << end) - (UINT64_C(1) << first);
        uint64_t keep = w->how == WRITE_REUSE ? w->old[i].bitmap
                                              : w->old[i].bitmap >> 32 << 32; /* zero bits only */
        w->new[i].bitmap = (keep & ~(mask << 32)) | mask;
    }
}

/* --- a step: space --- */

static int take_space(WriteStep *w)
{
    const BDRVQcow2State *s = w->io->s;
    uint64_t bytes = (uint64_t)w->n << s->cluster_bits;
    if (s->has_data_file) {
        w->host = w->cluster;
        return 0;
    }
    int64_t host = qcow2_alloc_run(w->io->bs, w->io->first_fit ? 0 : w->want, &bytes);
    if (host < 0) {
        return (int)host;
    }
    if (host == 0) {
        return qcow2_signal_corruption(w->io->bs, true, -1,
                                       "Preventing invalid allocation of data cluster at offset 0");
    }
    assert(bytes > 0 && qcow2_offset_into_cluster(s, bytes) == 0);
    w->host = (uint64_t)host;
    step_cut(w, MIN(w->n, bytes >> s->cluster_bits));
    return 0;
}

/* Gives back the clusters from @i on. */
static void give_back(const WriteStep *w, size_t i)
{
    const BDRVQcow2State *s = w->io->s;
    if (w->how == WRITE_FRESH && !s->has_data_file && i < w->n) {
        qcow2_alloc_undo(w->io->bs, w->host + ((uint64_t)i << s->cluster_bits),
                         (uint64_t)(w->n - i) << s->cluster_bits);
    }
}

/* --- a step: data --- */

static uint64_t step_host(const WriteStep *w, uint64_t guest)
{
    return w->host + (guest - w->cluster);
}

/* Head or tail of what is written. */
typedef struct Fill {
    uint64_t start, end; /* guest bytes, may be none */
    uint8_t *buf;        /* owned: goes out with the data; NULL: nothing does */
    bool zero;           /* left to the file's zero operation */
} Fill;

static void fill_clear(Fill *f)
{
    free(f->buf);
}

#define FILL_AUTO __attribute__((cleanup(fill_clear))) Fill

static size_t fill_len(const Fill *f)
{
    return f->buf ? (size_t)(f->end - f->start) : 0;
}

static int fill_alloc(const Qcow2Io *io, Fill *f)
{
    f->buf = bdrv_try_blockalign(io->s->data_file->bs, (size_t)(f->end - f->start));
    return f->buf ? 0 : -ENOMEM;
}

/* Reads it as a guest would, or finds that it is long and all zero. Not announced. */
static int fill_prepare(const Qcow2Io *io, Fill *f)
{
    uint64_t len = f->end - f->start;
    if (len == 0) {
        return 0;
    }
    int ret = len >= LONG_FILL ? qcow2_reads_zero(io->bs, f->start, len) : 0;
    if (ret != 0) {
        f->zero = ret == 1;
        return MIN(ret, 0);
    }
    ret = fill_alloc(io, f);
    if (ret < 0) {
        return ret;
    }
    IoVector flat;
    iov_vector_init_buf(&flat, f->buf, (size_t)len);
    bdrv_debug_event(io->bs->file, "cow_read");
    Qcow2Io fill = {.bs = io->bs, .s = io->s, .qiov = &flat, .base = f->start};
    return qcow2_read_guest(&fill, f->start, len);
}

/* Zeroes it in the file; where the file is not quick at that, zeroes go out with the data. */
static int fill_zero(const WriteStep *w, Fill *f)
{
    if (!f->zero) {
        return 0;
    }
    int ret = bdrv_pwrite_zeroes(w->io->s->data_file, (int64_t)step_host(w, f->start),
                                 (int64_t)(f->end - f->start), BDRV_REQ_NO_FALLBACK);
    if (ret == -ENOTSUP) {
        ret = fill_alloc(w->io, f);
        if (ret == 0) {
            memset(f->buf, 0, (size_t)(f->end - f->start));
        }
    }
    return ret;
}

static int write_filled(const WriteStep *w, const Fill *head, const Fill *tail)
{
    const Qcow2Io *io = w->io;
    IOV_VECTOR_AUTO all;
    iov_vector_init(&all, io->qiov->niov + 2);
    iov_vector_add(&all, head->buf, fill_len(head));
    iov_vector_concat(&all, io->qiov, qcow2_io_pos(io, w->start), (size_t)(w->end - w->start));
    iov_vector_add(&all, tail->buf, fill_len(tail));
    if (head->buf || tail->buf) {
        bdrv_debug_event(io->bs->file, "cow_write");
    }
    bdrv_debug_event(io->bs->file, "write_aio");
    uint64_t first = head->buf ? head->start : w->start;
    return bdrv_pwritev(io->s->data_file, (int64_t)step_host(w, first), (int64_t)all.size, &all,
                        0);
}

static int write_prepared(const WriteStep *w, Fill *head, Fill *tail)
{
    int ret = guard_data(w->io, step_host(w, w->fill_start), w->fill_end - w->fill_start);
    if (ret == 0) {
        ret = fill_zero(w, head);
    }
    if (ret == 0) {
        ret = fill_zero(w, tail);
    }
    return ret < 0 ? ret : write_filled(w, head, tail);
}

/* A host cluster that is in use already is pinned while it is written. */
static int write_step_data(const WriteStep *w)
{
    FILL_AUTO head = {.start = w->fill_start, .end = w->start};
    FILL_AUTO tail = {.start = w->end, .end = w->fill_end};
    int ret = fill_prepare(w->io, &head);
    if (ret == 0) {
        ret = fill_prepare(w->io, &tail);
    }
    if (ret < 0 || w->how == WRITE_FRESH) {
        return ret < 0 ? ret : write_prepared(w, &head, &tail);
    }
    Qcow2User user;
    qcow2_user_announce_writing(w->io->s, &user);
    qcow2_user_resolve(w->io->s, &user, step_host(w, w->fill_start), w->fill_end - w->fill_start);
    ret = write_prepared(w, &head, &tail);
    qcow2_user_leave(w->io->s, &user);
    return ret;
}

/* --- a step --- */

/* The entries of the step, and where the cluster before it lies. */
static int step_load(WriteStep *w)
{
    const Qcow2Io *io = w->io;
    bool has_before = qcow2_l2_index(io->s, w->cluster) > 0;
    Qcow2L2Entry before = {0};
    Qcow2User user;
    qcow2_user_announce(io->s, &user);
    int ret = qcow2_load_entries(io->bs, w->cluster, w->n, w->old);
    if (ret == 0 && has_before && !io->s->has_data_file) {
        ret = qcow2_load_entries(io->bs, w->cluster - io->s->cluster_size, 1, &before);
    }
    qcow2_user_leave(io->s, &user);
    bool follows = qcow2_entry_has_host(io->s, before);
    w->want = follows ? qcow2_entry_host(before) + io->s->cluster_size : 0;
    return ret;
}

/* Writes and links what step_choose() left; the bytes done, 0: begin again. */
static int64_t step_run(WriteStep *w)
{
    const Qcow2Io *io = w->io;
    size_t done = 0;
    int ret = w->how == WRITE_FRESH ? take_space(w) : 0;
    if (ret < 0) {
        return ret;
    }
    w->fill_start = fill_start_of(w);
    w->fill_end = fill_end_of(w);
    step_set_new(w);
    ret = write_step_data(w);
    if (ret == 0) {
        Qcow2Change change = {
            .guest = w->cluster, .n = w->n, .old = w->old, .new = w->new,
            .type = QCOW2_DISCARD_OTHER,
        };
        ret = qcow2_link(io->bs, &change, &done);
    }
    give_back(w, done);
    if (ret < 0) {
        return ret;
    }
    uint64_t reached = done ? MIN(w->end, cluster_guest(w, done)) : w->start;
    return (int64_t)(reached - w->start);
}

static size_t step_clusters(const BDRVQcow2State *s, uint64_t guest, uint64_t bytes)
{
    uint64_t into = qcow2_offset_into_cluster(s, guest);
    uint64_t max = MIN(MAX_STEP_CLUSTERS, MAX_STEP_BYTES >> s->cluster_bits);
    return (size_t)MIN(qcow2_size_to_clusters(s, into + bytes), max);
}

/* Serialised. The bytes done, 0: begin again. */
static int64_t write_step(const Qcow2Io *io, uint64_t guest, uint64_t bytes)
{
    size_t n = step_clusters(io->s, guest, bytes);
    g_autofree Qcow2L2Entry *entries = g_try_new(Qcow2L2Entry, 2 * n);
    if (!entries) {
        return -ENOMEM;
    }
    WriteStep w = {
        .io = io, .cluster = qcow2_start_of_cluster(io->s, guest), .n = n, .start = guest,
        .end = guest + bytes, .old = entries, .new = entries + n,
    };
    step_cut(&w, n);
    int ret = step_load(&w);
    if (ret < 0) {
        return ret;
    }
    step_choose(&w);
    if (w.how == WRITE_IN_PLACE) {
        return write_in_place(io, guest, w.end - guest);
    }
    int64_t done = step_run(&w);
    ret = done < 0 ? 0 : qcow2_relieve(io->bs);
    return ret < 0 ? ret : done;
}

void qcow2_serialise(BDRVQcow2State *s, BdrvRequest *req)
{
    if (!req || req->range.state == QB_RANGE_GRANTED) {
        return;
    }
    uint64_t start = qcow2_start_of_cluster(s, req->range.offset);
    uint64_t end = qb_align_up(req->range.end, s->cluster_size);
    bdrv_request_serialise(req, (int64_t)start, (int64_t)(end - start));
}

/* Without space below, what quarantine holds may do: once more, in the lowest free clusters. */
static int64_t write_step_or_reclaim(const Qcow2Io *io, uint64_t guest, uint64_t bytes)
{
    int64_t done = write_step(io, guest, bytes);
    if (done == -ENOSPC && !io->s->has_data_file && qcow2_reclaim(io->bs)) {
        Qcow2Io again = *io;
        again.first_fit = true;
        done = write_step(&again, guest, bytes);
    }
    return done;
}

int qcow2_write_guest(const Qcow2Io *io, uint64_t guest, uint64_t bytes)
{
    bool alone = !io->req || io->req->range.state == QB_RANGE_GRANTED;
    while (bytes > 0) {
        int64_t done = alone ? write_step_or_reclaim(io, guest, bytes)
                             : write_in_place(io, guest, bytes);
        if (done < 0) {
            return (int)done;
        }
        if (done == 0 && !alone) {
            qcow2_serialise(io->s, io->req);
            alone = true;
        }
        assert((uint64_t)done <= bytes);
        guest += (uint64_t)done;
        bytes -= (uint64_t)done;
    }
    return 0;
}
