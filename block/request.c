/*
 * Tracked requests: a request while it is inside a node.
 *
 *   begin ----> [counted, ticket drawn] --enter-------------------> runs plain ------.
 *                          \                                          |               > end
 *                           \--enter_serialising--> runs serialising <-' serialise --'
 *
 * Being counted (bs->in_flight) is what a drain waits for; the ticket in bs->ranges is what puts
 * overlapping requests in order.  Both are taken at begin, which for the requests of blk_submit()
 * is long before a worker picks them up.
 *
 * A plain request that serialises late, since only then it finds out that it has to, must not lose its
 * turn to a serialising one that came after it: so those wait for it, until it ends or has settled.
 * What a driver writes in place, announced, it settles first: whatever the later ones do to the
 * entries, they do not meet in the host cluster.  Batches settle, as their one request
 * covers much that they do not write; and so does the fast lane below its topmost layer.
 *
 * The unit.  A request that was granted a range cannot ask for a wider one: two such requests could
 * wait for one another.  So the core grants ranges that are rounded out to the widest unit the
 * driver changes as one (its cluster), which drivers show in their limits: bdrv_serialising_unit().
 * A driver that upgrades a request that was serialising from the start asks for nothing new then.
 *
 * Invariants
 *  1. in_flight counts every request between begin and end, and is changed under the graph lock
 *     only.
 *  2. A read has no ticket, its range is IDLE from begin to end.
 *  3. A request is granted at most one range, which never changes then.  It goes there from PLAIN,
 *     or from ENTERED as long as it has not begun to change anything.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/io-int.h"

void bdrv_request_begin(BdrvRequest *req, BlockDriverState *bs, BdrvRequestType type,
                        int64_t offset, int64_t bytes)
{
    assert(bdrv_graph_held());
    assert(offset >= 0 && bytes >= 0);
    *req = (BdrvRequest){.bs = bs, .type = type};
    atomic_fetch_add(&bs->in_flight, 1);
    if (type != BDRV_TRACKED_READ) {
        qb_range_submit(&bs->ranges, &req->range, (uint64_t)offset, (uint64_t)bytes);
    }
}

void bdrv_request_draw(BdrvChild *child, BdrvRequest *req, BdrvRequestType type, int64_t offset,
                       int64_t bytes)
{
    bdrv_request_begin(req, child->bs, type, offset, bytes);
}

void bdrv_request_enter(BdrvRequest *req)
{
    assert(req->type != BDRV_TRACKED_READ);
    qb_range_enter(&req->bs->ranges, &req->range);
}

void bdrv_request_settle(BdrvRequest *req)
{
    assert(req->type != BDRV_TRACKED_READ);
    qb_range_settle(&req->bs->ranges, &req->range);
}

uint32_t bdrv_serialising_unit(const BlockDriverState *bs)
{
    uint32_t unit = MAX(bs->bl.request_alignment, 1);
    const uint32_t wider[] = {bs->bl.pwrite_zeroes_alignment, bs->bl.pdiscard_alignment};
    for (size_t i = 0; i < G_N_ELEMENTS(wider); i++) {
        if (wider[i] > unit && qb_is_power_of_2(wider[i])) {
            unit = wider[i];
        }
    }
    return unit;
}

void bdrv_request_enter_serialising(BdrvRequest *req, bool wait_plain)
{
    assert(req->type != BDRV_TRACKED_READ && req->range.state != QB_RANGE_GRANTED);
    uint32_t unit = bdrv_serialising_unit(req->bs);
    uint64_t start = qb_align_down(req->range.offset, unit);
    uint64_t last = req->range.end;
    if (last <= INT64_MAX) { /* else it is the whole rest, which has no end to round */
        last = qb_align_up(last, unit);
    }
    qb_range_serialise(&req->bs->ranges, &req->range, start, last - start, wait_plain);
}

void bdrv_request_serialise(BdrvRequest *req, int64_t offset, int64_t bytes)
{
    assert(req->type != BDRV_TRACKED_READ);
    assert(offset >= 0 && bytes >= 0);
    qb_range_serialise(&req->bs->ranges, &req->range, (uint64_t)offset, (uint64_t)bytes, false);
}

bool bdrv_request_try_serialise(BdrvRequest *req, int64_t offset, int64_t bytes)
{
    assert(req->type != BDRV_TRACKED_READ);
    assert(offset >= 0 && bytes >= 0);
    return qb_range_try_serialise(&req->bs->ranges, &req->range, (uint64_t)offset,
                                  (uint64_t)bytes);
}

void bdrv_request_end(BdrvRequest *req)
{
    BlockDriverState *bs = req->bs;
    assert(bdrv_graph_held());
    if (req->type != BDRV_TRACKED_READ) {
        qb_range_leave(&bs->ranges, &req->range);
    }
    /* The graph lock keeps the node alive over the second look at it. A drainer raises quiesce
     * before it reads in_flight, both sequentially consistent, so one of the two sees the other. */
    if (atomic_fetch_sub(&bs->in_flight, 1) == 1 && atomic_load(&bs->quiesce) > 0) {
        bdrv_drain_wake();
    }
}

void bdrv_request_hand_over(BdrvRequest *req, BdrvRequest *to, int64_t offset, int64_t bytes)
{
    assert(req->type == BDRV_TRACKED_WRITE);
    *to = (BdrvRequest){.bs = req->bs, .type = req->type}; /* in_flight counts it from now on */
    qb_range_hand_over(&req->bs->ranges, &req->range, &to->range, (uint64_t)offset,
                       (uint64_t)bytes);
}

void bdrv_request_begin_whole(BlockDriverState *bs, BdrvRequest *req)
{
    bdrv_request_begin(req, bs, BDRV_TRACKED_WHOLE, 0, INT64_MAX);
    qb_range_serialise(&bs->ranges, &req->range, 0, UINT64_MAX, true);
}

void bdrv_request_end_whole(BdrvRequest *req)
{
    assert(req->type == BDRV_TRACKED_WHOLE);
    bdrv_request_end(req);
}

#define NS_PER_US 1000

void bdrv_truncate_pause_writes(BlockDriverState *bs, BdrvWritePause *pause)
{
    BdrvRequest *req = &pause->req;
    const QbRangeRequest *owner = &bs->truncation->range;
    assert(bdrv_graph_held());
    *req = (BdrvRequest){.bs = bs, .type = BDRV_TRACKED_WRITE};
    atomic_fetch_add(&bs->in_flight, 1);
    qb_range_submit_for(&bs->ranges, &req->range, owner, 0, owner->offset);
    qb_range_serialise(&bs->ranges, &req->range, 0, owner->offset, true);
    pause->since = qb_now_ns();
}

void bdrv_truncate_resume_writes(BdrvWritePause *pause)
{
    QbRangeLock *ranges = &pause->req.bs->ranges;
    uint64_t held = qb_now_ns() - pause->since;
    bool contended = qb_range_contended(ranges);
    bdrv_request_end(&pause->req);
    if (contended) {
        g_usleep(held / NS_PER_US);
    }
}

/* Where no guest request is, but whole-node operations and truncations are. */
#define BACKGROUND_OFFSET (INT64_MAX - 1)

bool bdrv_background_begin(BlockDriverState *bs, BdrvRequest *req)
{
    bdrv_request_begin(req, bs, BDRV_TRACKED_WRITE, BACKGROUND_OFFSET, 1);
    if (atomic_load(&bs->quiesce) > 0) { /* looked at after being counted: see bdrv_request_end() */
        bdrv_request_end(req);
        return false;
    }
    bdrv_request_enter(req);
    return true;
}

void bdrv_background_end(BdrvRequest *req)
{
    assert(req->range.offset == BACKGROUND_OFFSET);
    bdrv_request_end(req);
}
