/*
 * The walk over all tables, for building the set of clusters in use and for checks.
 *
 *     L1, 1 MiB at a time -> entries that are not 0 -> table(): read it?
 *                                                         |
 *     pieces of up to 1 MiB of up to 16 tables, in file order, one batch -> piece() in L1 order
 *
 * Invariants
 *  1. Memory is bounded by one batch (16 MiB), however long tables claim to be.
 *  2. What pages in memory say goes over what the file says.  A page may be written back and
 *     dropped between the two; then an entry is seen as it was a moment ago, see qed_walk() in
 *     qed.h.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qed.h"

#define PIECE_BYTES (1u << 20)
#define BATCH_PIECES 16u

typedef struct Walk {
    BlockDriverState *bs;
    BDRVQedState *s;
    const QedWalker *w;
    size_t piece_bytes;
    QedWalkPiece piece[BATCH_PIECES];
    unsigned n;
    uint8_t *buf; /* BATCH_PIECES * piece_bytes */
} Walk;

static uint8_t *piece_buf(const Walk *walk, unsigned i)
{
    return walk->buf + i * walk->piece_bytes;
}

static uint64_t piece_offset(const QedWalkPiece *p)
{
    return p->table + p->first * QED_ENTRY_BYTES;
}

static int compare_ops(const void *a, const void *b)
{
    const BdrvBatchOp *x = a, *y = b;
    return (x->offset > y->offset) - (x->offset < y->offset);
}

/* Which piece @op reads follows from its buffer. */
static void take_result(Walk *walk, const BdrvBatchOp *op)
{
    unsigned i = (unsigned)(((uint8_t *)op->buf - walk->buf) / (ptrdiff_t)walk->piece_bytes);
    QedWalkPiece *p = &walk->piece[i];
    p->error = op->ret;
    if (op->ret == 0) {
        qed_pages_overlay(walk->s, piece_offset(p), (size_t)op->bytes, op->buf);
        p->le = op->buf;
    }
}

static void read_pieces(Walk *walk)
{
    BdrvBatchOp ops[BATCH_PIECES];
    for (unsigned i = 0; i < walk->n; i++) {
        ops[i] = (BdrvBatchOp){
            .kind = BDRV_BATCH_READ,
            .offset = (int64_t)piece_offset(&walk->piece[i]),
            .bytes = (int64_t)(walk->piece[i].n * QED_ENTRY_BYTES),
            .buf = piece_buf(walk, i),
        };
    }
    qsort(ops, walk->n, sizeof(ops[0]), compare_ops);
    (void)bdrv_run_batch(walk->bs->file, ops, walk->n);
    for (unsigned i = 0; i < walk->n; i++) {
        take_result(walk, &ops[i]);
    }
}

/* Reads and hands out what has been gathered. */
static int deliver(Walk *walk)
{
    int ret = 0;
    if (walk->n == 0) {
        return 0;
    }
    read_pieces(walk);
    for (unsigned i = 0; i < walk->n && ret == 0; i++) {
        ret = walk->w->piece(&walk->piece[i], walk->w->opaque);
    }
    walk->n = 0;
    return ret;
}

static int add_table(Walk *walk, uint64_t l1_index, uint64_t table)
{
    size_t n = walk->piece_bytes / QED_ENTRY_BYTES;
    int ret = 0;
    for (uint64_t first = 0; first >> walk->s->table_bits == 0 && ret == 0; first += n) {
        walk->piece[walk->n++] = (QedWalkPiece){
            .l1_index = l1_index, .table = table, .first = first, .n = n,
        };
        ret = walk->n == BATCH_PIECES ? deliver(walk) : 0;
    }
    return ret;
}

static int walk_l1_entries(Walk *walk, uint64_t first, const uint64_t *le, size_t n)
{
    int ret = 0;
    for (size_t i = 0; i < n && ret == 0; i++) {
        uint64_t entry = GUINT64_FROM_LE(le[i]);
        if (entry == QED_ENTRY_NONE) {
            continue;
        }
        ret = walk->w->table(first + i, entry, walk->w->opaque);
        if (ret == 1) {
            ret = add_table(walk, first + i, entry);
        }
    }
    return ret;
}

static int walk_l1_piece(Walk *walk, uint64_t first, uint8_t *buf)
{
    BDRVQedState *s = walk->s;
    uint64_t offset = s->l1_offset + first * QED_ENTRY_BYTES;
    int ret = bdrv_pread(walk->bs->file, (int64_t)offset, (int64_t)walk->piece_bytes, buf, 0);
    if (ret < 0) {
        return walk->w->l1_error(first, ret, walk->w->opaque);
    }
    qed_pages_overlay(s, offset, walk->piece_bytes, buf);
    return walk_l1_entries(walk, first, (const uint64_t *)(void *)buf,
                           walk->piece_bytes / QED_ENTRY_BYTES);
}

int qed_walk(BlockDriverState *bs, const QedWalker *w)
{
    BDRVQedState *s = qed_state(bs);
    Walk walk = {.bs = bs, .s = s, .w = w, .piece_bytes = MIN(PIECE_BYTES, s->table_bytes)};
    size_t step = walk.piece_bytes / QED_ENTRY_BYTES;
    QB_AUTO_FREE uint8_t *buf = qb_try_memalign(4096, (BATCH_PIECES + 1) * walk.piece_bytes);
    int ret = buf ? 0 : -ENOMEM;
    walk.buf = buf;
    for (uint64_t first = 0; first >> s->table_bits == 0 && ret == 0; first += step) {
        ret = walk_l1_piece(&walk, first, buf + BATCH_PIECES * walk.piece_bytes);
    }
    return ret < 0 ? ret : deliver(&walk);
}
