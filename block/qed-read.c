/*
 * Reading guest data, and saying what is where.
 *
 *     become a user -> look up runs -> read what lies in the file, as one batch -> leave
 *                                                                                    |
 *                                               zeroes, backing file  <--------------'
 *
 * A request is cut into steps of up to MAX_RUNS runs.
 *
 * Invariants
 *  1. Clusters are read only as a user, so that none of them gets other content meanwhile (QED 2).
 *  2. Other images are read when this one is no longer used: a slow backing file keeps nothing.
 *  3. Where nothing is here the backing file shows up to the end of the shorter of both disks.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qed.h"

#define MAX_RUNS 32

typedef struct ReadPlan {
    QedMapping run[MAX_RUNS];
    unsigned n, n_data;
    uint64_t bytes;
} ReadPlan;

static int plan_read(const QedIo *io, uint64_t guest, uint64_t bytes, ReadPlan *plan)
{
    plan->n = plan->n_data = 0;
    plan->bytes = 0;
    while (plan->bytes < bytes && plan->n < MAX_RUNS) {
        QedMapping *m = &plan->run[plan->n];
        int ret = qed_lookup(io->bs, guest + plan->bytes, bytes - plan->bytes, m);
        if (ret < 0) {
            return plan->n ? 0 : ret; /* the next step meets the error again */
        }
        plan->n++;
        plan->n_data += m->type == QED_DATA;
        plan->bytes += m->bytes;
    }
    return 0;
}

/* ---------------------------------------------------------------- the file: as a user */

static int read_one_run(const QedIo *io, const QedMapping *m)
{
    return bdrv_preadv_part(io->bs->file, (int64_t)m->host, (int64_t)m->bytes, io->qiov,
                            qed_io_pos(io, m->guest), 0);
}

static int read_data(const QedIo *io, const ReadPlan *plan)
{
    g_autoptr(GArray) ops = g_array_new(false, true, sizeof(BdrvBatchOp));
    if (plan->n_data == 0) {
        return 0;
    }
    bdrv_debug_event(io->bs->file, "read_aio");
    for (unsigned i = 0; i < plan->n; i++) {
        const QedMapping *m = &plan->run[i];
        if (m->type != QED_DATA) {
            continue;
        }
        if (plan->n_data == 1) {
            return read_one_run(io, m);
        }
        bdrv_batch_add(ops, BDRV_BATCH_READ, (int64_t)m->host, (int64_t)m->bytes, io->qiov,
                       qed_io_pos(io, m->guest));
    }
    return bdrv_run_batch(io->bs->file, (BdrvBatchOp *)ops->data, ops->len);
}

static int read_as_user(const QedIo *io, uint64_t guest, uint64_t bytes, ReadPlan *plan)
{
    QedUser user;
    qed_user_begin(io->s, &user);
    int ret = plan_read(io, guest, bytes, plan);
    ret = ret < 0 ? ret : read_data(io, plan);
    qed_user_end(io->s, &user);
    return ret;
}

/* ---------------------------------------------------------------- below */

static int fill_run(const QedIo *io, const QedMapping *m)
{
    if (m->type == QED_UNALLOCATED) {
        return bdrv_backing_read(io->bs, (int64_t)m->guest, (int64_t)m->bytes, io->qiov,
                                 qed_io_pos(io, m->guest));
    }
    if (m->type == QED_ZERO) {
        iov_vector_memset(io->qiov, qed_io_pos(io, m->guest), 0, (size_t)m->bytes);
    }
    return 0;
}

/* ---------------------------------------------------------------- requests */

/* Bytes read from @guest on, or -errno. */
static int64_t read_step(const QedIo *io, uint64_t guest, uint64_t bytes)
{
    ReadPlan plan;
    int ret = read_as_user(io, guest, bytes, &plan);
    for (unsigned i = 0; ret == 0 && i < plan.n; i++) {
        ret = fill_run(io, &plan.run[i]);
    }
    return ret < 0 ? ret : (int64_t)plan.bytes;
}

int qed_read_guest(const QedIo *io, uint64_t guest, uint64_t bytes)
{
    while (bytes > 0) {
        int64_t done = read_step(io, guest, bytes);
        if (done < 0) {
            return (int)done;
        }
        assert(done > 0 && (uint64_t)done <= bytes);
        guest += (uint64_t)done;
        bytes -= (uint64_t)done;
    }
    return 0;
}

int qed_preadv(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
               IoVector *qiov, size_t qiov_offset, int flags)
{
    QedIo io = {.bs = bs, .s = qed_state(bs), .qiov = qiov, .qiov_offset = qiov_offset,
                .base = (uint64_t)offset};
    return qed_read_guest(&io, (uint64_t)offset, (uint64_t)bytes);
}

/* ---------------------------------------------------------------- what is known without reading */

static int run_reads_zero(BlockDriverState *bs, const QedMapping *m)
{
    if (m->type != QED_UNALLOCATED) {
        return m->type == QED_ZERO;
    }
    return bdrv_backing_reads_zero(bs, (int64_t)m->guest, (int64_t)m->bytes);
}

int qed_reads_zero(BlockDriverState *bs, uint64_t guest, uint64_t bytes)
{
    int zero = 1;
    while (bytes > 0 && zero == 1) {
        QedMapping m;
        int ret = qed_lookup_as_user(bs, guest, bytes, &m);
        if (ret < 0) {
            return ret;
        }
        zero = run_reads_zero(bs, &m);
        guest += m.bytes;
        bytes -= m.bytes;
    }
    return zero;
}

/* That unallocated ranges read as zeroes where nothing is below is for the core to say. */
int qed_block_status(BlockDriverState *bs, int64_t offset, int64_t bytes, BdrvStatus *ret)
{
    static const int flags[] = {
        [QED_UNALLOCATED] = 0,
        [QED_ZERO] = BDRV_BLOCK_ALLOCATED | BDRV_BLOCK_ZERO,
        [QED_DATA] = BDRV_BLOCK_ALLOCATED | BDRV_BLOCK_DATA | BDRV_BLOCK_OFFSET_VALID |
                     BDRV_BLOCK_RECURSE,
    };
    QedMapping m;
    int error = qed_lookup_as_user(bs, (uint64_t)offset, (uint64_t)bytes, &m);
    if (error < 0) {
        return error;
    }
    *ret = (BdrvStatus){.flags = flags[m.type], .bytes = (int64_t)m.bytes};
    if (m.type == QED_DATA) {
        ret->host_offset = (int64_t)m.host;
        ret->host_node = bs->file->bs;
    }
    return 0;
}
