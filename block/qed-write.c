/*
 * Writing guest data.
 *
 *     as a user: look up -> mapped -> write in place -> leave                        (plain)
 *                             '-- not mapped: leave, serialise the clusters, look up again
 *     table, clusters -> fill head and tail, write -> change the entries             (serialised)
 *
 *     new clusters  |               |               |
 *     data                 [================)
 *     fill          [ head )                [ tail  )     read as a guest would read it
 *
 * Every cluster has one owner, so a mapped one is always written in place.
 *
 * Invariants
 *  1. No entry names a new cluster before all of it has been written; failure gives it back.
 *  2. From serialise to the end of the request nobody else changes entries of its clusters.
 *  3. A step changes entries of one page of an L2 table, all or none.
 *
 * A short fill goes out with the data in one vector; a long one is copied before it in pieces, and
 * left to the file's zero operation where it is known to read as zeroes.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qed.h"

#include <string.h>

#define MAX_RUNS 32
#define SHORT_FILL (256u << 10)
#define FILL_PIECE (UINT64_C(1) << 20)
#define MAX_STEP_BYTES (UINT64_C(1) << 30)

/* ---------------------------------------------------------------- in place */

typedef struct InPlace {
    QedMapping run[MAX_RUNS];
    unsigned n;
    uint64_t bytes;
} InPlace;

/* The mapped runs from @guest on; none if the first byte is not mapped. */
static int plan_in_place(const QedIo *io, uint64_t guest, uint64_t bytes, InPlace *plan)
{
    plan->n = 0;
    plan->bytes = 0;
    while (plan->bytes < bytes && plan->n < MAX_RUNS) {
        QedMapping *m = &plan->run[plan->n];
        int ret = qed_lookup(io->bs, guest + plan->bytes, bytes - plan->bytes, m);
        if (ret < 0 || m->type != QED_DATA) {
            return plan->n ? 0 : ret;
        }
        plan->n++;
        plan->bytes += m->bytes;
    }
    return 0;
}

static int write_runs(const QedIo *io, const InPlace *plan)
{
    g_autoptr(GArray) ops = g_array_new(false, true, sizeof(BdrvBatchOp));
    const QedMapping *m = plan->run;
    bdrv_debug_event(io->bs->file, "write_aio");
    if (plan->n == 1) {
        return bdrv_pwritev_part(io->bs->file, (int64_t)m->host, (int64_t)m->bytes, io->qiov,
                                 qed_io_pos(io, m->guest), 0);
    }
    for (; m < plan->run + plan->n; m++) {
        bdrv_batch_add(ops, BDRV_BATCH_WRITE, (int64_t)m->host, (int64_t)m->bytes, io->qiov,
                       qed_io_pos(io, m->guest));
    }
    return bdrv_run_batch(io->bs->file, (BdrvBatchOp *)ops->data, ops->len);
}

/* Bytes written from @guest on; 0 when the first is not mapped. */
static int64_t write_in_place(const QedIo *io, uint64_t guest, uint64_t bytes)
{
    InPlace plan;
    QedUser user;
    qed_user_begin(io->s, &user);
    int ret = plan_in_place(io, guest, bytes, &plan);
    if (ret == 0 && plan.n > 0) {
        ret = write_runs(io, &plan);
    }
    qed_user_end(io->s, &user);
    return ret < 0 ? ret : (int64_t)plan.bytes;
}

/* ---------------------------------------------------------------- filling */

/* Guest bytes [start, end) that go to @host and following. */
typedef struct Fill {
    uint64_t start, end, host;
    uint8_t *buf; /* owned: goes out with the data; NULL: is there already, or empty */
} Fill;

static void fill_clear(Fill *f)
{
    free(f->buf);
}

#define FILL_AUTO __attribute__((cleanup(fill_clear))) Fill

static int read_fill(const QedIo *io, uint64_t guest, uint64_t bytes, uint8_t *buf)
{
    IoVector flat;
    iov_vector_init_buf(&flat, buf, (size_t)bytes);
    bdrv_debug_event(io->bs->file, "cow_read");
    QedIo fill = {.bs = io->bs, .s = io->s, .qiov = &flat, .base = guest};
    return qed_read_guest(&fill, guest, bytes);
}

static int fill_piece(const QedIo *io, uint64_t guest, uint64_t bytes, uint64_t host, uint8_t *buf)
{
    int zero = qed_reads_zero(io->bs, guest, bytes);
    if (zero == 1) {
        return bdrv_pwrite_zeroes(io->bs->file, (int64_t)host, (int64_t)bytes, 0);
    }
    int ret = zero < 0 ? zero : read_fill(io, guest, bytes, buf);
    bdrv_debug_event(io->bs->file, "cow_write");
    return ret < 0 ? ret : bdrv_pwrite(io->bs->file, (int64_t)host, (int64_t)bytes, buf, 0);
}

static int fill_long(const QedIo *io, const Fill *f)
{
    QB_AUTO_FREE uint8_t *buf = bdrv_try_blockalign(io->bs->file->bs, FILL_PIECE);
    int ret = buf ? 0 : -ENOMEM;
    for (uint64_t pos = f->start; pos < f->end && ret == 0; pos += FILL_PIECE) {
        ret = fill_piece(io, pos, MIN(FILL_PIECE, f->end - pos), f->host + (pos - f->start), buf);
    }
    return ret;
}

static int fill_prepare(const QedIo *io, Fill *f)
{
    uint64_t bytes = f->end - f->start;
    if (bytes == 0) {
        return 0;
    }
    if (bytes > SHORT_FILL) {
        return fill_long(io, f);
    }
    f->buf = bdrv_try_blockalign(io->bs->file->bs, (size_t)bytes);
    return f->buf ? read_fill(io, f->start, bytes, f->buf) : -ENOMEM;
}

static size_t fill_len(const Fill *f)
{
    return f->buf ? (size_t)(f->end - f->start) : 0;
}

/* ---------------------------------------------------------------- a step */

typedef struct WriteStep {
    const QedIo *io;
    uint64_t cluster;    /* guest offset of the first one */
    uint64_t n;          /* clusters */
    uint64_t start, end; /* the caller's data */
    uint64_t host;       /* of @cluster */
} WriteStep;

static void step_cut(WriteStep *w, uint64_t n)
{
    w->n = n;
    w->end = MIN(w->end, w->cluster + (n << w->io->s->cluster_bits));
}

static int write_filled(const WriteStep *w, const Fill *head, const Fill *tail)
{
    const QedIo *io = w->io;
    IOV_VECTOR_AUTO all;
    iov_vector_init(&all, io->qiov->niov + 2);
    iov_vector_add(&all, head->buf, fill_len(head));
    iov_vector_concat(&all, io->qiov, qed_io_pos(io, w->start), (size_t)(w->end - w->start));
    iov_vector_add(&all, tail->buf, fill_len(tail));
    bdrv_debug_event(io->bs->file, head->buf || tail->buf ? "cow_write" : "write_aio");
    uint64_t first = head->buf ? head->start : w->start;
    return bdrv_pwritev(io->bs->file, (int64_t)(w->host + (first - w->cluster)), (int64_t)all.size,
                        &all, 0);
}

static int write_data(const WriteStep *w)
{
    uint64_t clusters_end = w->cluster + (w->n << w->io->s->cluster_bits);
    FILL_AUTO head = {.start = w->cluster, .end = w->start, .host = w->host};
    FILL_AUTO tail = {.start = w->end, .end = clusters_end,
                      .host = w->host + (w->end - w->cluster)};
    int ret = fill_prepare(w->io, &head);
    ret = ret < 0 ? ret : fill_prepare(w->io, &tail);
    return ret < 0 ? ret : write_filled(w, &head, &tail);
}

/* Where the cluster before this one ends in the file, 0 when it is not there. */
static uint64_t follow_up(const WriteStep *w)
{
    const BDRVQedState *s = w->io->s;
    QedMapping m;
    if (w->cluster == 0 ||
        qed_lookup_as_user(w->io->bs, w->cluster - s->cluster_size, s->cluster_size, &m) < 0) {
        return 0;
    }
    return m.type == QED_DATA ? m.host + s->cluster_size : 0;
}

static int take_space(WriteStep *w)
{
    uint64_t n = w->n;
    int64_t host = qed_alloc(w->io->bs, follow_up(w), 1, &n);
    if (host < 0) {
        return (int)host;
    }
    w->host = (uint64_t)host;
    step_cut(w, n);
    return 0;
}

static int64_t step_run(WriteStep *w)
{
    const QedIo *io = w->io;
    int ret = qed_need_table(io->bs, w->cluster);
    ret = ret < 0 ? ret : take_space(w);
    if (ret < 0) {
        return ret;
    }
    ret = write_data(w);
    if (ret == 0) {
        ret = qed_change(io->bs, w->cluster, w->n, w->host, io->s->cluster_size);
    }
    if (ret < 0) {
        qed_alloc_undo(io->bs, w->host, w->n);
        return ret;
    }
    return (int64_t)(w->end - w->start);
}

/* Serialised. Writes what is alike from @guest on: in place, or into new clusters. */
static int64_t write_step(const QedIo *io, uint64_t guest, uint64_t bytes)
{
    const BDRVQedState *s = io->s;
    WriteStep w = {.io = io, .cluster = qed_start_of_cluster(s, guest), .start = guest,
                   .end = guest + bytes};
    uint64_t span = qed_round_up(s, w.end) - w.cluster;
    span = MIN(span, MAX(MAX_STEP_BYTES, s->cluster_size));
    span = MIN(span, qed_to_page_end(s, w.cluster));
    QedMapping m;
    int ret = qed_lookup_as_user(io->bs, w.cluster, span, &m);
    if (ret < 0) {
        return ret;
    }
    step_cut(&w, m.bytes >> s->cluster_bits);
    return m.type == QED_DATA ? write_in_place(io, guest, w.end - guest) : step_run(&w);
}

/* Without space below, what was freed and waits may do. */
static int64_t write_step_or_reclaim(const QedIo *io, uint64_t guest, uint64_t bytes)
{
    int64_t done = write_step(io, guest, bytes);
    if (done == -ENOSPC && qed_reclaim(io->bs)) {
        done = write_step(io, guest, bytes);
    }
    int ret = done < 0 ? 0 : qed_relieve(io->bs);
    return ret < 0 ? ret : done;
}

/* ---------------------------------------------------------------- requests */

static void serialise(const BDRVQedState *s, BdrvRequest *req)
{
    uint64_t start = qed_start_of_cluster(s, req->range.offset);
    uint64_t end = qed_round_up(s, req->range.end);
    bdrv_request_serialise(req, (int64_t)start, (int64_t)(end - start));
}

int qed_write_guest(const QedIo *io, BdrvRequest *req, uint64_t guest, uint64_t bytes)
{
    bool alone = !req || req->range.state == QB_RANGE_GRANTED;
    while (bytes > 0) {
        int64_t done = alone ? write_step_or_reclaim(io, guest, bytes)
                             : write_in_place(io, guest, bytes);
        if (done < 0) {
            return (int)done;
        }
        if (done == 0) {
            assert(!alone);
            serialise(io->s, req);
            alone = true;
        }
        guest += (uint64_t)done;
        bytes -= (uint64_t)done;
    }
    return 0;
}

int qed_pwritev(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                IoVector *qiov, size_t qiov_offset, int flags)
{
    QedIo io = {.bs = bs, .s = qed_state(bs), .qiov = qiov, .qiov_offset = qiov_offset,
                .base = (uint64_t)offset};
    int ret = qed_begin_change(bs);
    return ret < 0 ? ret : qed_write_guest(&io, req, (uint64_t)offset, (uint64_t)bytes);
}
