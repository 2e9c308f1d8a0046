/*
 * Zero, discard, and taking ranges out of the map.
 *
 *     entry was           zero, keep              zero, unmap; discard     drop
 *     0, nothing below    0                       0                        0
 *     0, backing below    1                       1                        0
 *     1                   1                       1                        0
 *     data                zeroed in place         0 or 1, cluster freed    0, cluster freed
 *
 * "0 or 1": 1 only where there is a backing file to hide.  A part of a cluster is zeroed in place
 * where the cluster is mapped, is left alone where it reads as zeroes anyway, and else is declined
 * (-ENOTSUP), so that the core writes zeroes.
 *
 * Invariants
 *  1. What was never mapped and has nothing below allocates nothing, and costs a look at L1.
 *  2. A step changes entries of one page, all or none; a request may stop between steps.
 *  3. A dropped table has had all its entries set to 0 before: what they named is freed by that.
 *
 * The core has serialised these requests over whole clusters, or the caller has the node to itself.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qed.h"

typedef struct Clear {
    BlockDriverState *bs;
    BDRVQedState *s;
    uint64_t end;    /* of the range, as it was asked for */
    uint64_t disk_end;
    uint64_t entry;  /* of a cluster that is to read as zeroes: 0 or 1 */
    bool unmap;      /* data clusters are freed */
    int flags;       /* for zeroing in place */
} Clear;

/* ---------------------------------------------------------------- steps */

/* Bytes from @guest on, at most @bytes, that are whole clusters; the last one of the disk is. */
static uint64_t whole_clusters(const Clear *c, uint64_t guest, uint64_t bytes)
{
    uint64_t end = guest + bytes;
    if (!qb_is_aligned(guest, c->s->cluster_size)) {
        return 0;
    }
    end = end >= c->disk_end ? end : qed_start_of_cluster(c->s, end);
    return end > guest ? end - guest : 0;
}

/* Changes the whole clusters of [guest, +bytes), as far as one page goes. Bytes done. */
static int64_t set_entries(const Clear *c, uint64_t guest, uint64_t bytes, uint64_t entry)
{
    bytes = MIN(bytes, qed_to_page_end(c->s, guest));
    uint64_t n = qed_round_up(c->s, bytes) >> c->s->cluster_bits;
    int ret = qed_change(c->bs, guest, n, entry, 0);
    ret = ret < 0 ? ret : qed_relieve(c->bs);
    return ret < 0 ? ret : (int64_t)bytes;
}

/* In place, as a user, since it looks the mapping up again. */
static int64_t zero_in_place(const Clear *c, uint64_t guest, uint64_t bytes)
{
    QedMapping m;
    QedUser user;
    qed_user_begin(c->s, &user);
    int ret = qed_lookup(c->bs, guest, bytes, &m);
    if (ret == 0 && m.type == QED_DATA) {
        ret = bdrv_pwrite_zeroes(c->bs->file, (int64_t)m.host, (int64_t)m.bytes, c->flags);
    }
    qed_user_end(c->s, &user);
    return ret < 0 ? ret : (int64_t)m.bytes;
}

/* An unallocated run: hidden as far as something may show through it. */
static int64_t clear_unallocated(const Clear *c, const QedMapping *m)
{
    int64_t below = bdrv_backing_end(c->bs);
    if (below <= (int64_t)m->guest) {
        return below < 0 ? below : (int64_t)m->bytes;
    }
    uint64_t whole = whole_clusters(c, m->guest, m->bytes);
    if (whole) {
        return set_entries(c, m->guest, whole, QED_ENTRY_ZERO);
    }
    uint64_t rest = m->guest & (c->s->cluster_size - 1);
    uint64_t part = MIN(m->bytes, c->s->cluster_size - rest);
    int ret = below == INT64_MAX ? 0 : qed_reads_zero(c->bs, m->guest, part);
    return ret == 1 ? (int64_t)part : ret < 0 ? ret : -ENOTSUP;
}

static int64_t clear_data(const Clear *c, const QedMapping *m)
{
    uint64_t whole = c->unmap ? whole_clusters(c, m->guest, m->bytes) : 0;
    if (whole) {
        return set_entries(c, m->guest, whole, c->entry);
    }
    uint64_t bytes = m->bytes;
    if (c->unmap) { /* up to the first whole cluster */
        uint64_t into = m->guest & (c->s->cluster_size - 1);
        bytes = MIN(bytes, c->s->cluster_size - into);
    }
    return zero_in_place(c, m->guest, bytes);
}

static int64_t clear_run(const Clear *c, const QedMapping *m)
{
    switch (m->type) {
    case QED_UNALLOCATED:
        return clear_unallocated(c, m);
    case QED_DATA:
        return clear_data(c, m);
    default:
        return (int64_t)m->bytes;
    }
}

/* Entries of [start, reached) have become 0: the table that ends there, if it does, and began in
 * the range is given back with its L1 entry. */
static int drop_whole_table(BDRVQedState *s, uint64_t start, uint64_t reached)
{
    uint64_t span = UINT64_C(1) << (s->cluster_bits + s->table_bits);
    bool whole = qb_is_aligned(reached, span) && reached - start >= span;
    return whole ? qed_drop_table(s->bs, qed_l1_index(s, reached - 1)) : 0;
}

/* What is looked at in one step: no more than a table, where tables are to be dropped. */
static int clear_step(const Clear *c, uint64_t start, uint64_t *guest, bool drops)
{
    QedMapping m;
    uint64_t bytes = c->end - *guest;
    bytes = drops ? MIN(bytes, qed_to_table_end(c->s, *guest)) : bytes;
    int ret = qed_lookup_as_user(c->bs, *guest, bytes, &m);
    int64_t done = ret < 0 ? ret : clear_run(c, &m);
    if (done < 0) {
        return (int)done;
    }
    *guest += (uint64_t)done;
    return drops ? drop_whole_table(c->s, start, *guest) : 0;
}

static int clear_range(const Clear *c, uint64_t start)
{
    uint64_t guest = start;
    bool drops = c->unmap && c->entry == QED_ENTRY_NONE;
    int ret = 0;
    while (guest < c->end && ret == 0) {
        int64_t unmapped = drops ? qed_unmapped_by_l1(c->bs, guest, c->end - guest) : 0;
        guest += (uint64_t)MAX(unmapped, 0);
        ret = (int)MIN(unmapped, 0);
        if (unmapped == 0) {
            ret = clear_step(c, start, &guest, drops);
        }
    }
    return ret;
}

static Clear clear_init(BlockDriverState *bs, uint64_t end)
{
    BDRVQedState *s = qed_state(bs);
    return (Clear){
        .bs = bs, .s = s, .end = end, .disk_end = atomic_load(&s->image_size),
        .entry = bdrv_may_be_backed(bs) ? QED_ENTRY_ZERO : QED_ENTRY_NONE, .unmap = true,
    };
}

/* ---------------------------------------------------------------- requests */

int qed_pwrite_zeroes(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                      int flags)
{
    Clear c = clear_init(bs, (uint64_t)(offset + bytes));
    c.unmap = flags & BDRV_REQ_MAY_UNMAP;
    c.flags = flags & (BDRV_REQ_MAY_UNMAP | BDRV_REQ_NO_FALLBACK);
    int ret = qed_begin_change(bs);
    return ret < 0 ? ret : clear_range(&c, (uint64_t)offset);
}

int qed_pdiscard(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes)
{
    Clear c = clear_init(bs, (uint64_t)(offset + bytes));
    uint64_t whole = whole_clusters(&c, (uint64_t)offset, (uint64_t)bytes);
    if (whole == 0) {
        return -ENOTSUP;
    }
    c.end = (uint64_t)offset + whole;
    int ret = qed_begin_change(bs);
    return ret < 0 ? ret : clear_range(&c, (uint64_t)offset);
}

/* ---------------------------------------------------------------- for resizing */

/* The entries from @guest to the end of their page. */
static int drop_page(BlockDriverState *bs, uint64_t guest, uint64_t bytes)
{
    int ret = qed_change(bs, guest, bytes >> qed_state(bs)->cluster_bits, QED_ENTRY_NONE, 0);
    return ret < 0 ? ret : qed_relieve(bs);
}

int qed_drop_beyond(BlockDriverState *bs, uint64_t guest)
{
    BDRVQedState *s = qed_state(bs);
    uint64_t end = qed_round_up(s, qed_max_image_size(s->cluster_size,
                                                      s->table_bytes >> s->cluster_bits));
    uint64_t pos = guest;
    assert(qb_is_aligned(guest, s->cluster_size));
    while (pos < end) {
        int64_t unmapped = qed_unmapped_by_l1(bs, pos, end - pos);
        if (unmapped != 0) {
            if (unmapped < 0) {
                return (int)unmapped;
            }
            pos += (uint64_t)unmapped;
            continue;
        }
        uint64_t bytes = qed_to_page_end(s, pos);
        int ret = drop_page(bs, pos, bytes);
        pos += bytes;
        ret = ret < 0 ? ret : drop_whole_table(s, guest, pos);
        if (ret < 0) {
            return ret;
        }
    }
    return 0;
}

int qed_hide_range(BlockDriverState *bs, uint64_t guest, uint64_t bytes)
{
    Clear c = clear_init(bs, guest + bytes);
    assert(qb_is_aligned(guest | bytes, c.s->cluster_size));
    c.entry = QED_ENTRY_ZERO;
    return clear_range(&c, guest);
}
