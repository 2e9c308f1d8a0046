/*
 * Reading guest data.
 *
 *   announce ---> look up runs ---> pin ---> read what lies in the file ---> leave
 *                                                                              |
 *                           zeroes, backing file, unpacking of streams <-------'
 *
 * A request is cut into steps of up to MAX_RUNS runs.  Within a step all runs that lie in the data
 * file are read as one batch, so that a fragmented image is read at depth; a single run is one
 * plain request.
 *
 * Invariants
 *  1. Host clusters are read only while announced: none of them gets other content meanwhile.
 *  2. Nothing that may wait for others is done while announced: no lock of long holding, no worker,
 *     no other image.
 *  3. Where this image has nothing the backing file shows up to the end of the shorter of both
 *     disks; zeroes follow.  VM state lies beyond the end and so never sees the backing file.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-io-int.h"

#define MAX_RUNS 32
#define MAX_STREAM_BYTES (8u << 20) /* unpacked, per step */

typedef struct ReadPlan {
    Qcow2Mapping run[MAX_RUNS];
    unsigned n;
    uint64_t bytes; /* of all runs */
    unsigned n_file, n_compressed;
} ReadPlan;

/* --- plan: announced --- */

static void plan_add(ReadPlan *plan, const Qcow2Mapping *m)
{
    plan->run[plan->n++] = *m;
    plan->bytes += m->bytes;
    plan->n_file += m->type == QCOW2_NORMAL;
    plan->n_compressed += m->type == QCOW2_COMPRESSED;
}

static bool plan_is_full(const BDRVQcow2State *s, const ReadPlan *plan)
{
    uint64_t unpacked = (uint64_t)plan->n_compressed << s->cluster_bits;
    return plan->n == MAX_RUNS || unpacked >= MAX_STREAM_BYTES;
}

static int plan_read(const Qcow2Io *io, uint64_t guest, uint64_t bytes, ReadPlan *plan)
{
    plan->n = plan->n_file = plan->n_compressed = 0;
    plan->bytes = 0;
    while (plan->bytes < bytes && !plan_is_full(io->s, plan)) {
        Qcow2Mapping m;
        int ret = qcow2_lookup(io->bs, guest + plan->bytes, bytes - plan->bytes, &m);
        if (ret < 0) {
            return plan->n ? 0 : ret; /* the next step meets the error again */
        }
        plan_add(plan, &m);
    }
    return 0;
}

/* --- file: announced --- */

static int read_one_run(const Qcow2Io *io, const Qcow2Mapping *m)
{
    return bdrv_preadv_part(io->s->data_file, (int64_t)m->host, (int64_t)m->bytes, io->qiov,
                            qcow2_io_pos(io, m->guest), 0);
}

static int read_many_runs(const Qcow2Io *io, const ReadPlan *plan)
{
    g_autoptr(GArray) ops = g_array_new(false, false, sizeof(BdrvBatchOp));
    for (unsigned i = 0; i < plan->n; i++) {
        const Qcow2Mapping *m = &plan->run[i];
        if (m->type == QCOW2_NORMAL) {
            bdrv_batch_add(ops, BDRV_BATCH_READ, (int64_t)m->host, (int64_t)m->bytes, io->qiov,
                           qcow2_io_pos(io, m->guest));
        }
    }
    return bdrv_run_batch(io->s->data_file, (BdrvBatchOp *)ops->data, ops->len);
}

static int read_file_runs(const Qcow2Io *io, const ReadPlan *plan)
{
    if (plan->n_file == 0) {
        return 0;
    }
    bdrv_debug_event(io->bs->file, "read_aio");
    if (plan->n_file > 1) {
        return read_many_runs(io, plan);
    }
    for (unsigned i = 0; i < plan->n; i++) {
        if (plan->run[i].type == QCOW2_NORMAL) {
            return read_one_run(io, &plan->run[i]);
        }
    }
    g_assert_not_reached();
}

static size_t collect_streams(const ReadPlan *plan, Qcow2Stream *streams)
{
    size_t n = 0;
    for (unsigned i = 0; i < plan->n; i++) {
        if (plan->run[i].type == QCOW2_COMPRESSED) {
            streams[n++] = (Qcow2Stream){.map = plan->run[i]};
        }
    }
    return n;
}

/* A step that uses one host run pins that one alone; else it pins everything for its short time. */
static void pin_plan(const Qcow2Io *io, const ReadPlan *plan, Qcow2User *user)
{
    if (plan->n == 1) {
        const Qcow2Mapping *m = &plan->run[0];
        bool compressed = m->type == QCOW2_COMPRESSED;
        qcow2_user_resolve(io->s, user, m->host, compressed ? m->comp_bytes : m->bytes);
    }
}

static int read_announced(const Qcow2Io *io, uint64_t guest, uint64_t bytes, ReadPlan *plan,
                          Qcow2Stream *streams)
{
    Qcow2User user;
    qcow2_user_announce(io->s, &user);
    int ret = plan_read(io, guest, bytes, plan);
    if (ret == 0) {
        pin_plan(io, plan, &user);
        ret = read_file_runs(io, plan);
    }
    if (ret == 0 && plan->n_compressed > 0) {
        ret = qcow2_streams_read(io->bs, streams, collect_streams(plan, streams));
    }
    qcow2_user_leave(io->s, &user);
    return ret;
}

/* --- the rest: not announced --- */

static int fill_run(const Qcow2Io *io, const Qcow2Mapping *m)
{
    if (qcow2_type_is_unallocated(m->type)) {
        return bdrv_backing_read(io->bs, (int64_t)m->guest, (int64_t)m->bytes, io->qiov,
                                 qcow2_io_pos(io, m->guest));
    }
    if (qcow2_type_is_zero(m->type)) {
        iov_vector_memset(io->qiov, qcow2_io_pos(io, m->guest), 0, (size_t)m->bytes);
    }
    return 0;
}

/* Reads from the start of the range on; the number of bytes read. */
static int64_t read_step(const Qcow2Io *io, uint64_t guest, uint64_t bytes)
{
    ReadPlan plan;
    Qcow2Stream streams[MAX_RUNS];
    int ret = read_announced(io, guest, bytes, &plan, streams);
    if (ret < 0) {
        return ret;
    }
    if (plan.n_compressed > 0) {
        ret = qcow2_streams_unpack(io, streams, plan.n_compressed);
        qcow2_streams_clear(streams, plan.n_compressed);
    }
    for (unsigned i = 0; i < plan.n && ret == 0; i++) {
        ret = fill_run(io, &plan.run[i]);
    }
    return ret < 0 ? ret : (int64_t)plan.bytes;
}

int qcow2_read_guest(const Qcow2Io *io, uint64_t guest, uint64_t bytes)
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

/* --- what reads zero without being read --- */

static int run_reads_zero(BlockDriverState *bs, const Qcow2Mapping *m)
{
    if (qcow2_type_is_zero(m->type)) {
        return 1;
    }
    if (!qcow2_type_is_unallocated(m->type)) {
        return 0;
    }
    return bdrv_backing_reads_zero(bs, (int64_t)m->guest, (int64_t)m->bytes);
}

static int lookup_announced(BlockDriverState *bs, uint64_t guest, uint64_t bytes, Qcow2Mapping *ret)
{
    Qcow2User user;
    qcow2_user_announce(qcow2_state(bs), &user);
    int err = qcow2_lookup(bs, guest, bytes, ret);
    qcow2_user_leave(qcow2_state(bs), &user);
    return err;
}

int qcow2_reads_zero(BlockDriverState *bs, uint64_t guest, uint64_t bytes)
{
    int zero = 1;
    while (bytes > 0 && zero == 1) {
        Qcow2Mapping m;
        int ret = lookup_announced(bs, guest, bytes, &m);
        if (ret < 0) {
            return ret;
        }
        zero = run_reads_zero(bs, &m);
        guest += m.bytes;
        bytes -= m.bytes;
    }
    return zero;
}

/* --- block status --- */

static void status_of_run(BlockDriverState *bs, const Qcow2Mapping *m, BdrvStatus *ret)
{
    static const int flags[] = {
        [QCOW2_UNALLOCATED] = 0,
        [QCOW2_UNALLOCATED_ALLOC] = 0,
        [QCOW2_ZERO_PLAIN] = BDRV_BLOCK_ALLOCATED | BDRV_BLOCK_ZERO,
        [QCOW2_ZERO_ALLOC] = BDRV_BLOCK_ALLOCATED | BDRV_BLOCK_ZERO | BDRV_BLOCK_OFFSET_VALID,
        [QCOW2_NORMAL] = BDRV_BLOCK_ALLOCATED | BDRV_BLOCK_DATA | BDRV_BLOCK_OFFSET_VALID
                         | BDRV_BLOCK_RECURSE,
        [QCOW2_COMPRESSED] = BDRV_BLOCK_ALLOCATED | BDRV_BLOCK_DATA | BDRV_BLOCK_COMPRESSED,
    };
    assert(m->type < G_N_ELEMENTS(flags));
    /* That unallocated ones read as zeroes where nothing is below is for the core to say: with ZERO
     * from here it would take this layer for the one that decided. */
    *ret = (BdrvStatus){.flags = flags[m->type], .bytes = (int64_t)m->bytes};
    if (ret->flags & BDRV_BLOCK_OFFSET_VALID) {
        ret->host_offset = (int64_t)m->host;
        ret->host_node = qcow2_state(bs)->data_file->bs;
    }
}

static bool status_extend(BdrvStatus *st, const BdrvStatus *next)
{
    bool contiguous = next->host_offset == st->host_offset + st->bytes;
    if (next->flags != st->flags
        || ((st->flags & BDRV_BLOCK_OFFSET_VALID) && !contiguous)) {
        return false;
    }
    st->bytes += next->bytes;
    return true;
}

/* Runs that differ only in what users cannot see are one extent. */
int qcow2_block_status(BlockDriverState *bs, int64_t offset, int64_t bytes, BdrvStatus *ret)
{
    BdrvStatus st = {0}, next;
    Qcow2Mapping m;
    if (atomic_load(&qcow2_state(bs)->corrupt)) {
        return -ENOMEDIUM;
    }
    int err = lookup_announced(bs, (uint64_t)offset, (uint64_t)bytes, &m);
    if (err < 0) {
        return err;
    }
    status_of_run(bs, &m, &st);
    while (st.bytes < bytes) {
        uint64_t from = (uint64_t)(offset + st.bytes);
        /* no further than it reaches already: what differs is thrown away */
        uint64_t most = (uint64_t)MIN(bytes - st.bytes, st.bytes);
        if (lookup_announced(bs, from, most, &m) < 0) {
            break; /* whoever asks from there gets the error */
        }
        status_of_run(bs, &m, &next);
        if (!status_extend(&st, &next)) {
            break;
        }
    }
    *ret = st;
    return 0;
}
