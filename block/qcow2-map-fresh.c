/*
 * The fast lane for writes that allocate: whole clusters where there were none.
 *
 *   map        range lock: serialising, if nobody is in the way
 *              entries of one table in memory: all unallocated or zero
 *              a run of host clusters, from blocks in memory                 count 1
 *              the file's map of it
 *   (the queue writes the data)
 *   map_done   qcow2_link(): the entries name the run                   or it is given back
 *
 * The same steps as those of an allocating write in qcow2-cow.c, for the case in which none of them has
 * to wait or to copy.
 *
 * Invariants
 *  1. The table is pinned from map to map_done, so that linking finds it in memory.
 *  2. Nobody else changes the entries in between: the range is granted to this request.  When they are
 *     different all the same, map_done() says -EAGAIN, and a worker does it anew.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-io-int.h"
#include "block/queue.h"

#define MAX_CLUSTERS 32

struct Qcow2FreshWrite {
    Qcow2Table *table; /* pinned */
    uint64_t guest, host;
    size_t n; /* clusters */
    Qcow2L2Entry old[MAX_CLUSTERS], new[MAX_CLUSTERS];
};

static void fresh_free(Qcow2FreshWrite *w)
{
    qcow2_cache_put(w->table);
    g_free(w);
}

static uint64_t fresh_bytes(const BDRVQcow2State *s, const Qcow2FreshWrite *w)
{
    return (uint64_t)w->n << s->cluster_bits;
}

/* An image that can take an allocation now: nothing to be written first, neither the dirty bit nor
 * what waits too long already. */
static bool is_ready(BDRVQcow2State *s)
{
    bool may_begin = !s->lazy_refcounts || atomic_load(&s->lazy_dirty);
    return may_begin && !s->has_data_file && s->data_file->bs->drv->map
           && !qcow2_cache_too_dirty(s->cache) && !qcow2_quarantine_full(s);
}

/* Whole clusters of one table. */
static bool is_candidate(BDRVQcow2State *s, uint64_t guest, uint64_t bytes)
{
    uint64_t n = bytes >> s->cluster_bits;
    return !qcow2_offset_into_cluster(s, guest | bytes) && n > 0 && n <= MAX_CLUSTERS
           && n <= s->l2_entries - qcow2_l2_index(s, guest) && is_ready(s);
}

/* Names no host cluster, not even one to keep. */
static bool is_vacant(Qcow2L2Entry e)
{
    return !(e.entry & ~QCOW2_ENTRY_ZERO) && !(uint32_t)e.bitmap;
}

static Qcow2L2Entry load_entry(const BDRVQcow2State *s, const Qcow2Table *t, unsigned index)
{
    uint8_t raw[16];
    qcow2_table_load(t, (size_t)index * s->l2_entry_size, s->l2_entry_size, raw);
    return qcow2_entry_decode(s, raw);
}

/* Pins the table that may be stored to, and loads the entries: false when they are not all vacant. */
static bool look(BDRVQcow2State *s, Qcow2FreshWrite *w)
{
    uint64_t l1 = qcow2_l1_get(s, qcow2_l1_index(s, w->guest));
    unsigned index = qcow2_l2_index(s, w->guest);
    if (!(l1 & QCOW2_ENTRY_COPIED)) {
        return false;
    }
    unsigned before = index ? 1 : 0; /* for best_place() */
    Qcow2TableRange range = qcow2_l2_range(s, l1 & QCOW2_ENTRY_OFFSET_MASK, index - before,
                                           w->n + before);
    w->table = qcow2_cache_peek_part(s->cache, &range);
    for (size_t i = 0; w->table && i < w->n; i++) {
        w->old[i] = load_entry(s, w->table, index + (unsigned)i);
        if (!is_vacant(w->old[i])) {
            return false;
        }
    }
    return w->table && !qcow2_table_poisoned(w->table);
}

/* Where the clusters would be best: behind those of the entry before. */
static uint64_t best_place(const BDRVQcow2State *s, const Qcow2FreshWrite *w)
{
    unsigned index = qcow2_l2_index(s, w->guest);
    Qcow2L2Entry before = index ? load_entry(s, w->table, index - 1) : (Qcow2L2Entry){0};
    bool follows = qcow2_entry_has_host(s, before);
    return follows ? qcow2_entry_host(before) + s->cluster_size : 0;
}

/* One run for all, or nothing. */
static bool take_run(BlockDriverState *bs, Qcow2FreshWrite *w)
{
    BDRVQcow2State *s = qcow2_state(bs);
    uint64_t bytes = fresh_bytes(s, w);
    int64_t host = qcow2_alloc_run_nowait(bs, best_place(s, w), &bytes);
    if (host <= 0) {
        return false;
    }
    if (bytes < fresh_bytes(s, w)) {
        qcow2_alloc_undo(bs, (uint64_t)host, bytes);
        return false;
    }
    w->host = (uint64_t)host;
    for (size_t i = 0; i < w->n; i++) {
        uint64_t offset = w->host + ((uint64_t)i << s->cluster_bits);
        w->new[i] = (Qcow2L2Entry){.entry = offset | QCOW2_ENTRY_COPIED};
        w->new[i].bitmap = s->has_subclusters ? UINT32_MAX : 0;
    }
    return true;
}

static int map_run(BlockDriverState *bs, BlkQueue *queue, const Qcow2FreshWrite *w,
                   BdrvMapping *mapping)
{
    BDRVQcow2State *s = qcow2_state(bs);
    int64_t bytes = (int64_t)fresh_bytes(s, w);
    int64_t before = mapping->bytes;
    int ret = qcow2_check_overlap(bs, QCOW2_OL_NONE, w->host, (uint64_t)bytes);
    if (ret == 0) {
        ret = bdrv_map(s->data_file, queue, BDRV_MAP_WRITE, (int64_t)w->host, bytes, mapping);
    }
    return ret == 0 && mapping->bytes - before < bytes ? -EAGAIN : ret;
}

int qcow2_map_fresh(BlockDriverState *bs, BlkQueue *queue, uint64_t guest, uint64_t bytes,
                    BdrvMapping *mapping, Qcow2FreshWrite **ret_write)
{
    BDRVQcow2State *s = qcow2_state(bs);
    BdrvRequest *req = &mapping->layer[mapping->depth].req;
    if (!is_candidate(s, guest, bytes)
        || !bdrv_request_try_serialise(req, (int64_t)guest, (int64_t)bytes)) {
        return -EAGAIN;
    }
    Qcow2FreshWrite *w = g_new(Qcow2FreshWrite, 1);
    w->table = NULL;
    w->guest = guest;
    w->n = (size_t)(bytes >> s->cluster_bits);
    bool taken = look(s, w) && take_run(bs, w);
    int ret = taken ? map_run(bs, queue, w, mapping) : -EAGAIN;
    if (ret < 0) {
        if (taken) {
            qcow2_alloc_undo(bs, w->host, bytes);
        }
        fresh_free(w);
        return ret;
    }
    *ret_write = w;
    return 0;
}

int qcow2_map_fresh_done(BlockDriverState *bs, Qcow2FreshWrite *w, int result)
{
    size_t done = 0;
    if (result == 0) {
        const Qcow2Change change = {
            .guest = w->guest, .n = w->n, .old = w->old, .new = w->new,
            .type = QCOW2_DISCARD_OTHER,
        };
        result = qcow2_link(bs, &change, &done);
    }
    if (done < w->n) {
        qcow2_alloc_undo(bs, w->host, fresh_bytes(qcow2_state(bs), w));
    }
    fresh_free(w);
    return result == QCOW2_STALE ? -EAGAIN : result;
}
