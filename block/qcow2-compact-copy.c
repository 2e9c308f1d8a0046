/*
 * Content of host clusters that move: read many at once, written many at once, on several cores.
 *
 *      from   [ data ][hole][   data   ]         by what the file says of itself
 *                |      |        |
 *              read     |       read             a batch of up to 1 MiB, in a buffer of a lane:
 *              write   zero     write            it is still in the processor's cache when written
 *
 * Each lane takes the next pieces from a cursor until there are none.
 *
 * Where a file that keeps its pages in memory has to say where data ends, it looks at every page up
 * to there, which is long for a few clusters out of a large file.  So when little is to be copied,
 * it is read to begin with, and what has no block of zeroes cannot have a hole.
 *
 * Invariants
 *  1. What is a hole of the file becomes one, and is not read but where there is little: an image
 *     that was sparse stays so.  What needs its storage later, without asking for more (bitmaps),
 *     gets it.
 *  2. Memory: a buffer for each lane, made once.
 *
 * Barriers are the caller's, who also keeps others from writing to either place.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-compact.h"

#include "util/iov.h"
#include "util/pool.h"

enum {
    LANES = 4,
    LANE_BYTES = 1 << 20,
    HOLE_BYTES = 4096, /* file systems have no shorter ones */
};

typedef struct Lane {
    Qcow2Copier *copier;
    uint8_t *buf; /* LANE_BYTES, owned */
    GArray *ops;  /* BdrvBatchOp */
} Lane;

struct Qcow2Copier {
    BlockDriverState *bs;
    GArray *data;   /* Qcow2MoveCopy, none longer than LANE_BYTES */
    GArray *zeroes; /* BdrvBatchOp */
    int zero_flags;
    Lane lane[LANES];
    QbMutex lock;
    guint next; /* of data; guarded by lock */
};

/* Does it continue the other, in both places, and do both fit a lane? */
static bool continues(const Qcow2MoveCopy *last, const Qcow2MoveCopy *piece)
{
    return last->from + last->bytes == piece->from && last->to + last->bytes == piece->to &&
           last->bytes + piece->bytes <= LANE_BYTES;
}

static void add_data(Qcow2Copier *c, Qcow2MoveCopy rest)
{
    while (rest.bytes) {
        Qcow2MoveCopy *last =
            c->data->len ? &g_array_index(c->data, Qcow2MoveCopy, c->data->len - 1) : NULL;
        Qcow2MoveCopy piece = {rest.from, rest.to, MIN(rest.bytes, LANE_BYTES)};
        if (last && continues(last, &piece)) {
            last->bytes += piece.bytes;
        } else {
            g_array_append_val(c->data, piece);
        }
        rest = (Qcow2MoveCopy){rest.from + piece.bytes, rest.to + piece.bytes,
                               rest.bytes - piece.bytes};
    }
}

static void add_zeroes(Qcow2Copier *c, const Qcow2MoveCopy *piece)
{
    BdrvBatchOp op = {.kind = BDRV_BATCH_ZERO, .offset = (int64_t)piece->to,
                      .bytes = (int64_t)piece->bytes, .flags = c->zero_flags};
    g_array_append_val(c->zeroes, op);
}

/* Read to be looked at: no part of it, as long as a hole may be, is all zero. */
static bool has_no_zeroes(Qcow2Copier *c, const Qcow2MoveCopy *run)
{
    uint64_t step = MIN(HOLE_BYTES, run->bytes);
    uint8_t *buf = c->lane[0].buf;
    if (bdrv_pread(c->bs->file, (int64_t)run->from, (int64_t)run->bytes, buf, 0) < 0) {
        return false; /* who copies it fails, too */
    }
    for (uint64_t pos = 0; pos < run->bytes; pos += step) {
        if (qb_buffer_is_zero(buf + pos, MIN(step, run->bytes - pos))) {
            return false;
        }
    }
    return true;
}

/* Where the file does not tell, there are data. */
static void sort_run(Qcow2Copier *c, Qcow2MoveCopy run)
{
    while (run.bytes) {
        BdrvStatus st = {0};
        int ret = bdrv_block_status_step(c->bs->file->bs, (int64_t)run.from, (int64_t)run.bytes,
                                         &st);
        bool known = ret == 0 && st.bytes > 0;
        Qcow2MoveCopy piece = run;
        piece.bytes = known ? MIN((uint64_t)st.bytes, run.bytes) : run.bytes;
        if (known && (st.flags & BDRV_BLOCK_ZERO)) {
            add_zeroes(c, &piece);
        } else {
            add_data(c, piece);
        }
        run.from += piece.bytes;
        run.to += piece.bytes;
        run.bytes -= piece.bytes;
    }
}

/* ---------------------------------------------------------------- lanes */

/* The next pieces that fit into the buffer, as reads, the first of them is number *ret_first;
 * false: there are none. */
static bool take_pieces(Lane *lane, guint *ret_first)
{
    Qcow2Copier *c = lane->copier;
    uint64_t used = 0;
    g_array_set_size(lane->ops, 0);
    QB_GUARD(&c->lock);
    *ret_first = c->next;
    for (; c->next < c->data->len; c->next++) {
        const Qcow2MoveCopy *piece = &g_array_index(c->data, Qcow2MoveCopy, c->next);
        BdrvBatchOp op = {.kind = BDRV_BATCH_READ, .offset = (int64_t)piece->from,
                          .bytes = (int64_t)piece->bytes, .buf = lane->buf + used};
        if (used + piece->bytes > LANE_BYTES) {
            break;
        }
        used += piece->bytes;
        g_array_append_val(lane->ops, op);
    }
    return used > 0;
}

/* The same pieces, to be written. */
static void turn_into_writes(Lane *lane, guint first)
{
    for (guint i = 0; i < lane->ops->len; i++) {
        BdrvBatchOp *op = &g_array_index(lane->ops, BdrvBatchOp, i);
        op->kind = BDRV_BATCH_WRITE;
        op->offset = (int64_t)g_array_index(lane->copier->data, Qcow2MoveCopy, first + i).to;
    }
}

static int run_ops(Lane *lane)
{
    return bdrv_run_batch(lane->copier->bs->file, (BdrvBatchOp *)lane->ops->data, lane->ops->len);
}

static int run_lane(void *opaque)
{
    Lane *lane = opaque;
    guint first;
    int ret = 0;
    bdrv_graph_borrow();
    while (ret == 0 && take_pieces(lane, &first)) {
        ret = run_ops(lane);
        if (ret == 0) {
            turn_into_writes(lane, first);
            ret = run_ops(lane);
        }
    }
    bdrv_graph_return();
    return ret;
}

static int copy_data(Qcow2Copier *c)
{
    QbTaskGroup group;
    c->next = 0;
    if (c->data->len == 1) {
        return run_lane(&c->lane[0]);
    }
    qb_group_init(&group);
    for (guint i = 0; i < MIN(LANES, c->data->len); i++) {
        qb_group_submit(&group, qb_compute_pool(), run_lane, &c->lane[i]);
    }
    int ret = qb_group_wait(&group, 0);
    qb_group_destroy(&group);
    return ret;
}

/* ---------------------------------------------------------------- */

Qcow2Copier *qcow2_copier_new(BlockDriverState *bs)
{
    Qcow2Copier *c = g_new0(Qcow2Copier, 1);
    bool all = true;
    c->bs = bs;
    c->data = g_array_new(false, false, sizeof(Qcow2MoveCopy));
    c->zeroes = g_array_new(false, false, sizeof(BdrvBatchOp));
    qb_mutex_init(&c->lock);
    for (int i = 0; i < LANES; i++) {
        c->lane[i] = (Lane){
            .copier = c, .buf = bdrv_try_blockalign(bs->file->bs, LANE_BYTES),
            .ops = g_array_new(false, false, sizeof(BdrvBatchOp)),
        };
        all &= c->lane[i].buf != NULL;
    }
    if (!all) {
        g_clear_pointer(&c, qcow2_copier_free);
    }
    return c;
}

void qcow2_copier_free(Qcow2Copier *c)
{
    if (!c) {
        return;
    }
    for (int i = 0; i < LANES; i++) {
        free(c->lane[i].buf);
        g_array_unref(c->lane[i].ops);
    }
    g_array_unref(c->data);
    g_array_unref(c->zeroes);
    qb_mutex_destroy(&c->lock);
    g_free(c);
}

static uint64_t total_bytes(const GArray *list)
{
    uint64_t bytes = 0;
    for (guint i = 0; i < list->len; i++) {
        bytes += g_array_index(list, Qcow2MoveCopy, i).bytes;
    }
    return bytes;
}

int qcow2_copier_run(Qcow2Copier *c, const GArray *list, bool storage)
{
    c->zero_flags = storage ? 0 : BDRV_REQ_MAY_UNMAP;
    g_array_set_size(c->data, 0);
    g_array_set_size(c->zeroes, 0);
    bool little = total_bytes(list) <= LANE_BYTES;
    for (guint i = 0; i < list->len; i++) {
        const Qcow2MoveCopy *run = &g_array_index(list, Qcow2MoveCopy, i);
        if (little && has_no_zeroes(c, run)) {
            add_data(c, *run);
        } else {
            sort_run(c, *run);
        }
    }
    int ret = c->data->len ? copy_data(c) : 0;
    if (ret == 0) {
        ret = bdrv_run_batch(c->bs->file, (BdrvBatchOp *)c->zeroes->data, c->zeroes->len);
    }
    return ret;
}
