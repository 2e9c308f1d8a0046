/*
 * The fast lane through a qcow2 image: reads of mapped and zero runs, writes in place; and writes of
 * whole clusters that are not allocated (qcow2-map-fresh.c).
 *
 *   map        announce -> look up without waiting -> pin -> the file's map        -> token
 *   map_done   leave
 *
 * One mapping covers the zero runs at the start of the range and then one run of the file; callers
 * ask again for the rest.  Everything else is answered with -EAGAIN, "use a worker": a table that
 * is not in memory, an allocation, compressed clusters, the backing file, a header that must change
 * first.
 *
 * The announcement lasts from map to map_done, that is as long as the file I/O.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-io-int.h"
#include "block/queue.h"

static void add_zero_extent(BdrvMapping *mapping, uint64_t bytes)
{
    assert(mapping->n < BDRV_MAP_MAX_EXTENTS);
    mapping->ext[mapping->n++] = (BdrvMapExtent){.zero = true, .fd = -1, .bytes = (int64_t)bytes};
    mapping->bytes += (int64_t)bytes;
}

static bool may_pass(const Qcow2Mapping *m, BdrvMapIntent intent)
{
    return m->type == QCOW2_NORMAL && (intent == BDRV_MAP_READ || m->copied);
}

/* Reads zero without a look at the backing file. */
static bool reads_zero(BlockDriverState *bs, const Qcow2Mapping *m)
{
    return qcow2_type_is_zero(m->type) || (qcow2_type_is_unallocated(m->type) && !bs->backing);
}

/* Metadata would be overwritten: the worker says so. Blocks only when that is the case. */
static int guard_in_place(BlockDriverState *bs, const Qcow2Mapping *m, BdrvMapIntent intent)
{
    if (intent == BDRV_MAP_READ || qcow2_state(bs)->has_data_file) {
        return 0;
    }
    return qcow2_check_overlap(bs, QCOW2_OL_NONE, m->host, m->bytes);
}

static int map_file_run(BlockDriverState *bs, BlkQueue *queue, BdrvMapIntent intent,
                        const Qcow2Mapping *m, Qcow2User *user, BdrvMapping *mapping)
{
    BDRVQcow2State *s = qcow2_state(bs);
    int ret = guard_in_place(bs, m, intent);
    if (ret < 0) {
        return ret;
    }
    qcow2_user_resolve(s, user, m->host, m->bytes);
    return bdrv_map(s->data_file, queue, intent, (int64_t)m->host, (int64_t)m->bytes, mapping);
}

/* Fills @mapping from [offset, end) as far as it can; 0 if that is something. */
static int map_runs(BlockDriverState *bs, BlkQueue *queue, BdrvMapIntent intent, uint64_t offset,
                    uint64_t end, Qcow2User *user, BdrvMapping *mapping)
{
    unsigned n_before = mapping->n;
    while (offset < end && mapping->n < BDRV_MAP_MAX_EXTENTS) {
        Qcow2Mapping m;
        int ret = qcow2_lookup_nowait(bs, offset, end - offset, &m);
        bool zero = ret == 0 && intent == BDRV_MAP_READ && reads_zero(bs, &m);
        if (!zero) {
            if (ret == 0) {
                ret = may_pass(&m, intent) ? map_file_run(bs, queue, intent, &m, user, mapping)
                                           : -EAGAIN;
            }
            return mapping->n > n_before ? 0 : ret;
        }
        add_zero_extent(mapping, m.bytes);
        offset += m.bytes;
    }
    return mapping->n > n_before ? 0 : -EAGAIN;
}

/* What a mapping is to this driver from map to map_done. */
typedef struct LaneToken {
    Qcow2User user;
    Qcow2FreshWrite *fresh; /* NULL: announced as @user */
} LaneToken;

static bool lane_is_open(BDRVQcow2State *s, BdrvMapIntent intent)
{
    bool clean = intent == BDRV_MAP_READ || atomic_load(&s->autoclear_pending) == 0;
    return clean && !atomic_load(&s->corrupt);
}

/* What is mapped, announced unless that fails. */
static int map_present(BlockDriverState *bs, BlkQueue *queue, BdrvMapIntent intent, uint64_t offset,
                       uint64_t bytes, LaneToken *token, BdrvMapping *mapping)
{
    BDRVQcow2State *s = qcow2_state(bs);
    if (intent == BDRV_MAP_WRITE) {
        qcow2_user_announce_writing(s, &token->user);
    } else {
        qcow2_user_announce(s, &token->user);
    }
    int ret = map_runs(bs, queue, intent, offset, offset + bytes, &token->user, mapping);
    if (ret < 0) {
        qcow2_user_leave(s, &token->user);
    }
    return ret;
}

int qcow2_map(BlockDriverState *bs, BlkQueue *queue, BdrvMapIntent intent, int64_t offset,
              int64_t bytes, BdrvMapping *mapping)
{
    uint64_t guest = (uint64_t)offset, length = (uint64_t)bytes;
    unsigned depth = mapping->depth;
    if (!lane_is_open(qcow2_state(bs), intent)) {
        return -EAGAIN;
    }
    LaneToken *token = g_try_new(LaneToken, 1);
    if (!token) {
        return -EAGAIN;
    }
    token->fresh = NULL;
    int ret = map_present(bs, queue, intent, guest, length, token, mapping);
    if (ret == -EAGAIN && intent == BDRV_MAP_WRITE) {
        ret = qcow2_map_fresh(bs, queue, guest, length, mapping, &token->fresh);
    }
    if (ret < 0) {
        g_free(token);
        return ret;
    }
    mapping->layer[depth].token = token;
    return 0;
}

int qcow2_map_done(BlockDriverState *bs, BlkQueue *queue, BdrvMapping *mapping, int result)
{
    LaneToken *token = mapping->layer[mapping->depth].token;
    if (token->fresh) {
        result = qcow2_map_fresh_done(bs, token->fresh, result);
    } else {
        qcow2_user_leave(qcow2_state(bs), &token->user);
    }
    g_free(token);
    return result;
}
