/*
 * Allocation: where free host clusters are, and taking them.
 *
 *      blocks not looked at yet, before the first one that may have the run: look at up to 8 (the
 *        |      background looks at all of them, from the first allocation on)
 *        |
 *      find in the index  -- a block that may have it? --> search it: take, or make the bound exact
 *        | none, also in the last block
 *      append: new blocks behind the last one, the run behind them
 *
 * A file that cannot grow (a device) gives -ENOSPC here and not at a flush, where nobody could
 * help.
 *
 * First fit by lowest host offset.  The free tail of the last block is free space like any other,
 * so a file grows simply because the lowest free cluster lies at its end; before that happens with
 * much in quarantine, quarantine is flushed and released, and the search repeated once.  Past blocks
 * that nobody has looked at it grows by 64 MiB at most; then allocations look at all of them.
 *
 * Invariants
 * 1. A cluster that is handed out has count 1 in memory before the alloc lock is let go; nothing on
 *    disk refers to it (invariant 1 of the driver: counts are raised before anything links).
 * 2. Cluster 0 is never handed out, whatever the counts say.
 * 3. No I/O under the alloc lock.  A block that must be loaded, or needs space in the file before
 *    it is made, means that the search starts again.
 * 4. Whatever the cache may hold at the place of a new cluster is the past: it is poisoned.
 * 5. While the tail of the file is being cut off, or the refcount blocks for it, nothing in it is
 *    handed out: cut_at is an upper limit, looked at under the same hold of the lock in which counts
 *    become 1.
 * 6. The background reads blocks past the cache and without the lock: what it saw enters the index
 *    only if nothing in blocks not looked at became free meanwhile (allocations make the bound
 *    loose, not wrong).
 * 7. compressed_next is 0 or lies behind a stream, in whose cluster a stream lives that is neither
 *    freed nor undone: each of those resets it, and who has taken it sets it again only behind his
 *    own.  So a cluster whose references are all in quarantine never gets another one.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-refcount-int.h"

#include <inttypes.h>
#include <limits.h>
#include <string.h>

#include "util/iov.h"

#define MAX_LOOKS 8 /* blocks looked at for one allocation */
#define MAX_BLIND_GROWTH (UINT64_C(64) << 20)
#define STEP_LOOKS 64 /* blocks looked at by one step in the background */
#define MAX_REREADS 4

/* ---- searching one block ---- */

/* Eight bytes of counts: no zero in a word of them (of any width) means no free cluster there.  The
 * usual trick: taking 1 from every count borrows from the top bit of those that are 0. */
static bool word_has_free(uint64_t word, unsigned order)
{
    static const uint64_t ones[] = {
        UINT64_MAX, UINT64_MAX / 0x3, UINT64_MAX / 0xf, UINT64_MAX / 0xff, UINT64_MAX / 0xffff,
        UINT64_MAX / 0xffffffff, 1,
    };
    uint64_t tops = ones[order] << ((1u << order) - 1);

    return ((word - ones[order]) & ~word & tops) != 0;
}

static bool word_may_have(uint64_t word, unsigned order, bool want_free)
{
    return want_free ? word_has_free(word, order) : word != 0;
}

/* The first slot in [@slot, @end) that is free, or not: @end when there is none. Words without one
 * are passed over. */
static uint64_t next_slot(const BDRVQcow2State *s, const uint8_t *data, uint64_t slot, uint64_t end,
                          bool want_free)
{
    unsigned order = s->refcount_order;
    uint64_t per_word = UINT64_C(64) >> order;

    while (slot < end) {
        uint64_t word;
        if (slot % per_word == 0) {
            memcpy(&word, data + (slot << order >> 3), sizeof(word));
            if (!word_may_have(word, order, want_free)) {
                slot += per_word;
                continue;
            }
        }
        if ((qcow2_refcount_read(data, order, slot) == 0) == want_free) {
            return slot;
        }
        slot++;
    }
    return end;
}

typedef struct Found {
    uint64_t slot, n; /* the run; n 0: none */
    uint64_t first;   /* the lowest free slot seen */
    uint64_t longest; /* the longest run seen; of all the block when nothing was found */
} Found;

/* The first run of at least @min free slots from @from on, cut to @max. */
static Found search_block(const BDRVQcow2State *s, const uint8_t *data, uint64_t from, uint64_t min,
                          uint64_t max)
{
    uint64_t per_block = qcow2_counts_per_block(s);
    Found f = {.first = per_block};

    for (uint64_t slot = from; slot < per_block;) {
        uint64_t start = next_slot(s, data, slot, per_block, true);
        uint64_t end = max < per_block - start ? start + max : per_block;
        slot = next_slot(s, data, start, end, false);
        f.first = MIN(f.first, start);
        f.longest = MAX(f.longest, slot - start);
        if (slot - start >= min) {
            f.slot = start;
            f.n = slot - start;
            break;
        }
    }
    return f;
}

/* ---- one attempt ---- */

typedef struct Request {
    uint64_t want;       /* cluster to continue at, 0: anywhere */
    uint64_t min, max;   /* clusters */
    uint64_t limit;      /* clusters that the file can hold */
    uint64_t cluster, n; /* the result */
    Qcow2HostRun reserved; /* for new blocks */
} Request;

/* Clusters from here on are not to be had: the file cannot hold them, or they are being cut off. */
static uint64_t limit_locked(const BDRVQcow2State *s, const Request *r)
    QB_REQUIRES(s->alloc_lock)
{
    qb_mutex_assert_held(&s->alloc_lock);
    return MIN(r->limit, s->cut_at);
}

/* Tries block @index: r->n tells. Makes the index exact when there is no such run. -ENOSPC: the
 * lowest run lies beyond the end of a file that cannot grow, and so do all others. */
static int take_from_block_locked(BDRVQcow2State *s, Qcow2Table *t, uint64_t index, Request *r)
    QB_REQUIRES(s->alloc_lock)
{
    uint64_t hint = qcow2_free_index_first(s->free_index, index);
    uint64_t from = index == 0 ? MAX(hint, 1) : hint; /* cluster 0 is the header */
    Found f = search_block(s, qcow2_refblock_data(t), from, r->min, r->max);
    uint64_t cluster = (index << s->refblock_bits) + f.slot, limit = limit_locked(s, r);

    if (!f.n) {
        qcow2_free_index_set(s->free_index, index, f.longest, f.first);
        return 0;
    }
    if (cluster >= limit || limit - cluster < r->min) {
        return -ENOSPC;
    }
    r->cluster = cluster;
    r->n = MIN(f.n, limit - cluster);
    qcow2_set_counts_locked(s, t, index, f.slot, r->n, 1);
    qcow2_free_index_raise_first(s->free_index, index,
                                 f.first == f.slot ? f.slot + r->n : f.first);
    return 0;
}

/* Is the run at @cluster free for at least one cluster? Takes up to @max of it. */
static uint64_t take_at_locked(BDRVQcow2State *s, Qcow2Table *t, uint64_t cluster, uint64_t max)
    QB_REQUIRES(s->alloc_lock)
{
    const uint8_t *data = qcow2_refblock_data(t);
    uint64_t slot = qcow2_slot_of(s, cluster), n = 0;

    while (n < max && slot + n < qcow2_counts_per_block(s) &&
           !qcow2_refcount_read(data, s->refcount_order, slot + n)) {
        n++;
    }
    qcow2_set_counts_locked(s, t, qcow2_block_of(s, cluster), slot, n, 1);
    return n;
}

static void index_block_locked(BDRVQcow2State *s, uint64_t index, const uint8_t *data)
    QB_REQUIRES(s->alloc_lock)
{
    Found f = search_block(s, data, index == 0, UINT64_MAX, UINT64_MAX);

    qcow2_free_index_set(s->free_index, index, f.longest, f.first);
}

/* Looks at a block for the first time. One that is missing leaves its clusters free. */
static int look_at_locked(BDRVQcow2State *s, uint64_t index)
    QB_REQUIRES(s->alloc_lock)
{
    g_autoptr(Qcow2Table) t = NULL;
    bool dropped = false;
    int ret;

    if (!qcow2_block_offset_locked(s, index)) {
        qcow2_free_index_set(s->free_index, index, qcow2_counts_per_block(s), 0);
        return 0;
    }
    ret = qcow2_pin_block_locked(s, index, &t, &dropped);
    if (ret == 0 && !qcow2_free_index_seen(s->free_index, index)) {
        index_block_locked(s, index, qcow2_refblock_data(t));
    }
    return ret;
}

/* Blocks not looked at yet that lie before the first one known to have the run: they may have it,
 * too. */
static int look_ahead_locked(BDRVQcow2State *s, const Request *r)
    QB_REQUIRES(s->alloc_lock)
{
    unsigned max = s->blind_growth < MAX_BLIND_GROWTH ? MAX_LOOKS : UINT_MAX;
    int ret = 0;

    for (unsigned looks = 0; looks < max && ret == 0; looks++) {
        uint64_t index = qcow2_free_index_unseen(s->free_index);
        if (index == UINT64_MAX || qcow2_free_index_find(s->free_index, r->min) < index) {
            break;
        }
        ret = look_at_locked(s, index);
    }
    return ret;
}

static int try_want_locked(BDRVQcow2State *s, Request *r)
    QB_REQUIRES(s->alloc_lock)
{
    uint64_t index = qcow2_block_of(s, r->want);
    g_autoptr(Qcow2Table) t = NULL;
    bool dropped = false;
    uint64_t limit;
    int ret;

    if (!r->want || !qcow2_block_offset_locked(s, index)) {
        return 0;
    }
    ret = qcow2_pin_block_locked(s, index, &t, &dropped);
    limit = limit_locked(s, r);
    if (ret < 0 || r->want >= limit) {
        return ret;
    }
    r->cluster = r->want;
    r->n = take_at_locked(s, t, r->want, MIN(r->max, limit - r->want));
    return 0;
}

/* A range of clusters whose block is missing is free but for what the block itself takes. 0: it is
 * there now, or the lock was let go. */
static int make_missing_locked(BDRVQcow2State *s, uint64_t index, Request *r)
    QB_REQUIRES(s->alloc_lock)
{
    int64_t ret;

    if (qcow2_block_offset_locked(s, index)) {
        return 0;
    }
    ret = qcow2_append_blocks_locked(s, index, 0, limit_locked(s, r), &r->reserved);
    return ret < 0 ? (int)ret : 0;
}

/* Searches the blocks that were looked at. r->n stays 0 when none has the run. */
static int try_index_locked(BDRVQcow2State *s, Request *r)
    QB_REQUIRES(s->alloc_lock)
{
    uint64_t index;
    int ret = 0;

    while (ret == 0 && !r->n &&
           (index = qcow2_free_index_find(s->free_index, r->min)) != UINT64_MAX) {
        g_autoptr(Qcow2Table) t = NULL;
        bool dropped = false;
        ret = make_missing_locked(s, index, r);
        if (ret == 0 && qcow2_block_offset_locked(s, index)) {
            ret = qcow2_pin_block_locked(s, index, &t, &dropped);
        }
        /* the index may have changed while the lock was let go */
        if (ret == 0 && t && (!dropped || qcow2_free_index_find(s->free_index, r->min) == index)) {
            ret = take_from_block_locked(s, t, index, r);
        }
    }
    return ret;
}

/* A new block lies behind the range of the last one, however little of that is used: the last one is
 * looked at in any case before. */
static int try_last_locked(BDRVQcow2State *s, Request *r)
    QB_REQUIRES(s->alloc_lock)
{
    int ret;

    if (qcow2_free_index_seen(s->free_index, s->reftable.nb_blocks - 1)) {
        return 0;
    }
    ret = look_at_locked(s, s->reftable.nb_blocks - 1);
    return ret < 0 ? ret : try_index_locked(s, r);
}

/* r->n stays 0 when the lock was let go. */
static int append_locked(BDRVQcow2State *s, Request *r)
    QB_REQUIRES(s->alloc_lock)
{
    int64_t offset = qcow2_append_blocks_locked(s, s->reftable.nb_blocks, r->min,
                                                limit_locked(s, r), &r->reserved);

    if (offset <= 0) {
        return (int)offset;
    }
    r->cluster = (uint64_t)offset >> s->cluster_bits;
    r->n = r->min;
    return 0;
}

static int attempt_locked(BDRVQcow2State *s, Request *r)
    QB_REQUIRES(s->alloc_lock)
{
    int ret;

    if (!qcow2_block_offset_locked(s, 0)) {
        return qcow2_signal_corruption(s->bs, true, -1, "Preventing invalid allocation of %s at "
                                       "offset 0", "refcount block");
    }
    ret = try_want_locked(s, r);
    if (ret == 0 && !r->n) {
        ret = look_ahead_locked(s, r);
    }
    if (ret == 0 && !r->n) {
        ret = try_index_locked(s, r);
    }
    if (ret == 0 && !r->n) {
        ret = try_last_locked(s, r);
    }
    if (ret == 0 && !r->n) {
        ret = append_locked(s, r);
    }
    return ret;
}

static uint64_t request_end(const BDRVQcow2State *s, const Request *r)
{
    return (r->cluster + r->n) << s->cluster_bits;
}

/* The file grows although there may be room in blocks that nobody has looked at. */
static void note_blind_growth_locked(BDRVQcow2State *s, const Request *r)
    QB_REQUIRES(s->alloc_lock)
{
    uint64_t end = request_end(s, r), old_end = atomic_load(&s->file_end);

    qb_mutex_assert_held(&s->alloc_lock);
    if (qcow2_free_index_unseen(s->free_index) == UINT64_MAX) {
        return;
    }
    s->blind_growth += end > old_end ? end - old_end : 0;
    if (s->look_from != UINT64_MAX) {
        qcow2_background_arm(s, QCOW2_BG_LOOK, 0);
    }
}

/* Where the only space is in a tail that is being cut off it waits for that to end. */
static int attempt(BDRVQcow2State *s, Request *r)
{
    QB_GUARD(&s->alloc_lock);
    int ret;

    while (((ret = attempt_locked(s, r)) == 0 && !r->n) ||
           (ret == -ENOSPC && s->cut_at < r->limit)) {
        if (ret < 0) {
            qb_cond_wait(&s->alloc_wait, &s->alloc_lock);
        }
    }
    if (ret == 0) {
        note_blind_growth_locked(s, r);
    }
    return ret;
}

/* ---- cutting the file ---- */

uint64_t qcow2_alloc_seq(BDRVQcow2State *s)
{
    QB_GUARD(&s->alloc_lock);

    return s->alloc_seq;
}

bool qcow2_cut_begin(BDRVQcow2State *s, uint64_t end, uint64_t seq)
{
    QB_GUARD(&s->alloc_lock);

    assert(s->cut_at == UINT64_MAX && !qcow2_offset_into_cluster(s, end));
    if (s->alloc_seq != seq) {
        return false;
    }
    s->cut_at = end >> s->cluster_bits;
    return true;
}

void qcow2_cut_end(BDRVQcow2State *s)
{
    QB_GUARD(&s->alloc_lock);

    assert(s->cut_at != UINT64_MAX);
    s->cut_at = UINT64_MAX;
    qb_cond_broadcast(&s->alloc_wait);
}

/* ---- looking at blocks in the background ---- */

/* Does a block seem to be at @offset? Whoever needs it judges it, and says what is wrong. */
static bool may_be_block(BlockDriverState *bs, uint64_t offset)
{
    int64_t length = bdrv_getlength(bs->file->bs);

    return offset && !qcow2_offset_into_cluster(qcow2_state(bs), offset) && length > 0 &&
           offset < (uint64_t)length;
}

/* True when there is nothing to read for block @index: it is seen, missing, or in memory. Else
 * *ret_offset and *ret_frees tell where it is and from when. */
static bool look_in_memory(BDRVQcow2State *s, uint64_t index, uint64_t *ret_offset,
                           uint64_t *ret_frees)
{
    QB_GUARD(&s->alloc_lock);
    g_autoptr(Qcow2Table) t = NULL;

    *ret_offset = qcow2_block_offset_locked(s, index);
    *ret_frees = qcow2_free_index_unseen_frees(s->free_index);
    if (qcow2_free_index_seen(s->free_index, index)) {
        return true;
    }
    if (!*ret_offset) {
        qcow2_free_index_set(s->free_index, index, qcow2_counts_per_block(s), 0);
        return true;
    }
    t = qcow2_cache_peek(s->cache, QCOW2_TABLE_REFBLOCK, *ret_offset);
    if (t) {
        index_block_locked(s, index, qcow2_refblock_data(t));
    }
    return t != NULL;
}

/* What was read enters the index if it is still true (invariant 6). False: read it again. */
static bool note_read(BDRVQcow2State *s, uint64_t index, uint64_t offset, uint64_t frees,
                      const uint8_t *data)
{
    QB_GUARD(&s->alloc_lock);

    if (qcow2_free_index_seen(s->free_index, index)) {
        return true;
    }
    if (qcow2_block_offset_locked(s, index) != offset ||
        qcow2_free_index_unseen_frees(s->free_index) != frees) {
        return false;
    }
    index_block_locked(s, index, data);
    return true;
}

/* Reads past the cache, where it would drive out tables that are in use. A block that cannot be read
 * or changes all the time is left to whoever needs it. */
static void look_at_file(BlockDriverState *bs, uint64_t index, uint8_t *buf)
{
    BDRVQcow2State *s = qcow2_state(bs);

    for (int i = 0; i < MAX_REREADS; i++) {
        uint64_t offset, frees;
        if (look_in_memory(s, index, &offset, &frees) || !may_be_block(bs, offset) ||
            bdrv_pread(bs->file, (int64_t)offset, s->cluster_size, buf, 0) < 0 ||
            note_read(s, index, offset, frees, buf)) {
            return;
        }
    }
}

/* The next block to look at, UINT64_MAX: all were looked at, as far as that was possible. */
static uint64_t next_to_look_at(BDRVQcow2State *s, uint64_t from)
{
    QB_GUARD(&s->alloc_lock);

    s->look_from = qcow2_free_index_unseen_from(s->free_index, MAX(from, s->look_from));
    return s->look_from;
}

uint64_t qcow2_look_step(BlockDriverState *bs)
{
    BDRVQcow2State *s = qcow2_state(bs);
    QB_AUTO_FREE uint8_t *buf = qb_try_memalign(4096, MAX(s->cluster_size, 4096));
    uint64_t index = next_to_look_at(s, 0);

    for (int looks = 0; buf && index != UINT64_MAX; looks++) {
        if (looks == STEP_LOOKS || !qcow2_background_wanted(s)) {
            return 1;
        }
        look_at_file(bs, index, buf);
        index = next_to_look_at(s, index + 1);
    }
    return 0;
}

/* ---- quarantine before growth ---- */

/* The file would grow although a good part of it waits in quarantine. */
static bool should_reclaim(BDRVQcow2State *s, const Request *r)
{
    uint64_t end = atomic_load(&s->file_end);

    return request_end(s, r) > end &&
           qcow2_quarantine_releasable(s) > MAX(end / 64, UINT64_C(1) << 20);
}

/* Host clusters that the file can hold. */
static int file_limit(BlockDriverState *bs, uint64_t *ret)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    int64_t length = bdrv_can_grow(bs->file->bs) ? INT64_MAX : bdrv_getlength(bs->file->bs);

    *ret = (uint64_t)MAX(length, 0) >> s->cluster_bits;
    return (int)MIN(length, 0);
}

/* Somebody may make a device longer when it is full, and try again. */
static bool device_grew(BlockDriverState *bs, Request *r)
{
    uint64_t before = r->limit;
    return !bdrv_can_grow(bs->file->bs) && bdrv_ask_length_again(bs->file->bs) >= 0 &&
           file_limit(bs, &r->limit) == 0 && r->limit > before;
}

static void note_end(BDRVQcow2State *s, const Request *r)
{
    uint64_t end = request_end(s, r), seen = atomic_load(&s->file_end);

    while (seen < end && !atomic_compare_exchange_weak(&s->file_end, &seen, end)) {
    }
}

/* The clusters are ours: tables that once lay there are forgotten. */
static void note_allocated(BlockDriverState *bs, const Request *r)
{
    BDRVQcow2State *s = qcow2_state(bs);

    note_end(s, r);
    qcow2_cache_poison(s->cache, r->cluster << s->cluster_bits, r->n << s->cluster_bits);
    bdrv_debug_event(bs->file, "cluster_alloc");
}

static int allocate(BlockDriverState *bs, Request *r)
{
    BDRVQcow2State *s = qcow2_state(bs);
    int ret = file_limit(bs, &r->limit);

    assert(!qb_mutex_held(&s->lock) && !qb_mutex_held(&s->alloc_lock));
    if (ret == 0) {
        ret = attempt(s, r);
    }
    if (ret == 0 && should_reclaim(s, r)) {
        qcow2_alloc_undo(bs, r->cluster << s->cluster_bits, r->n << s->cluster_bits);
        r->n = 0;
        qcow2_reclaim(bs);
        ret = attempt(s, r);
    } else if (ret == -ENOSPC && qcow2_reclaim(bs)) {
        ret = attempt(s, r);
    }
    if (ret == -ENOSPC && device_grew(bs, r)) {
        ret = attempt(s, r);
    }
    if (ret == 0) {
        note_allocated(bs, r);
    }
    return ret;
}

int64_t qcow2_alloc_clusters(BlockDriverState *bs, uint64_t bytes)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    uint64_t n = qcow2_size_to_clusters(s, bytes);
    Request r = {.min = n, .max = n};
    int ret = qcow2_lazy_begin(bs);

    assert(n > 0);
    ret = ret < 0 ? ret : allocate(bs, &r);
    return ret < 0 ? ret : (int64_t)(r.cluster << s->cluster_bits);
}

int64_t qcow2_alloc_run(BlockDriverState *bs, uint64_t want, uint64_t *bytes)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    Request r = {.want = want >> s->cluster_bits, .min = 1,
                 .max = MAX(*bytes >> s->cluster_bits, 1)};
    int ret = qcow2_lazy_begin(bs);

    ret = ret < 0 ? ret : allocate(bs, &r);

    if (ret < 0) {
        return ret;
    }
    *bytes = r.n << s->cluster_bits;
    return (int64_t)(r.cluster << s->cluster_bits);
}

uint64_t qcow2_alloc_at(BlockDriverState *bs, uint64_t offset, uint64_t bytes)
{
    BDRVQcow2State *s = qcow2_state(bs);
    Request r = {.want = offset >> s->cluster_bits, .max = bytes >> s->cluster_bits};

    if (qcow2_lazy_begin(bs) < 0 || file_limit(bs, &r.limit) < 0) {
        return 0;
    }
    qb_mutex_lock(&s->alloc_lock);
    if (try_want_locked(s, &r) < 0) {
        r.n = 0;
    }
    qb_mutex_unlock(&s->alloc_lock);
    if (r.n) {
        note_allocated(bs, &r);
    }
    return r.n << s->cluster_bits;
}

/* ---- without waiting ---- */

static Qcow2Table *peek_block_locked(BDRVQcow2State *s, uint64_t index)
    QB_REQUIRES(s->alloc_lock)
{
    uint64_t offset = qcow2_block_offset_locked(s, index);

    return offset ? qcow2_cache_peek(s->cache, QCOW2_TABLE_REFBLOCK, offset) : NULL;
}

static void try_want_nowait_locked(BDRVQcow2State *s, Request *r)
    QB_REQUIRES(s->alloc_lock)
{
    uint64_t limit = limit_locked(s, r);
    g_autoptr(Qcow2Table) t = NULL;

    if (r->want && r->want < limit) {
        t = peek_block_locked(s, qcow2_block_of(s, r->want));
    }
    if (t) {
        r->cluster = r->want;
        r->n = take_at_locked(s, t, r->want, MIN(r->max, limit - r->want));
    }
}

/* Only where the lowest block that may have the run is known and in memory. */
static void try_index_nowait_locked(BDRVQcow2State *s, Request *r)
    QB_REQUIRES(s->alloc_lock)
{
    uint64_t index = qcow2_free_index_find(s->free_index, r->min);
    g_autoptr(Qcow2Table) t = NULL;

    if (index != UINT64_MAX && qcow2_free_index_unseen(s->free_index) > index) {
        t = peek_block_locked(s, index);
    }
    if (t && take_from_block_locked(s, t, index, r) < 0) {
        r->n = 0;
    }
}

static bool attempt_nowait(BDRVQcow2State *s, Request *r)
{
    QB_GUARD(&s->alloc_lock);

    try_want_nowait_locked(s, r);
    if (!r->n) {
        try_index_nowait_locked(s, r);
    }
    if (r->n) {
        note_blind_growth_locked(s, r);
    }
    return r->n > 0;
}

int64_t qcow2_alloc_run_nowait(BlockDriverState *bs, uint64_t want, uint64_t *bytes)
{
    BDRVQcow2State *s = qcow2_state(bs);
    Request r = {.want = want >> s->cluster_bits, .min = 1,
                 .max = MAX(*bytes >> s->cluster_bits, 1)};

    if (file_limit(bs, &r.limit) < 0 || !attempt_nowait(s, &r)) {
        return -EAGAIN;
    }
    if (should_reclaim(s, &r)) {
        qcow2_alloc_undo(bs, r.cluster << s->cluster_bits, r.n << s->cluster_bits);
        return -EAGAIN;
    }
    note_allocated(bs, &r);
    *bytes = r.n << s->cluster_bits;
    return (int64_t)(r.cluster << s->cluster_bits);
}

/* The file may be sparse there, or hold what is left of the clusters' former life. */
int qcow2_reserve(BlockDriverState *bs, uint64_t offset, uint64_t bytes)
{
    static uint8_t zeroes[65536] __attribute__((aligned(4096))); /* never touched: takes no memory */
    int ret = qcow2_check_overlap(bs, QCOW2_OL_NONE, offset, bytes);

    for (uint64_t n; bytes > 0 && ret >= 0; offset += n, bytes -= n) {
        n = MIN(bytes, sizeof(zeroes));
        ret = bdrv_pwrite(bs->file, (int64_t)offset, (int64_t)n, zeroes, 0);
    }
    return ret;
}

void qcow2_alloc_undo(BlockDriverState *bs, uint64_t offset, uint64_t bytes)
{
    Qcow2HostRun run = {offset, bytes};

    /* Tables that were made in it are dropped; a count that cannot be lowered leaks the cluster. No
     * stream is packed behind one that is gone: it could be the last live one of its cluster. */
    qcow2_alloc_leave(qcow2_state(bs), &run, 1);
    qcow2_cache_poison(qcow2_state(bs)->cache, offset, bytes);
    qcow2_update_refcounts(bs, &run, 1, -1);
}

/* ---- compressed clusters ---- */

/* Raises the count of the shared cluster under @offset; false: a fresh one must be taken. */
static int share_cluster_locked(BDRVQcow2State *s, uint64_t offset, bool *ret_shared)
    QB_REQUIRES(s->alloc_lock)
{
    uint64_t cluster = offset >> s->cluster_bits, index = qcow2_block_of(s, cluster), count;
    g_autoptr(Qcow2Table) t = NULL;
    bool dropped = false;
    int ret;

    *ret_shared = false;
    if (!qcow2_block_offset_locked(s, index)) {
        return 0;
    }
    ret = qcow2_pin_block_locked(s, index, &t, &dropped);
    if (ret < 0) {
        return ret;
    }
    count = qcow2_refcount_read(qcow2_refblock_data(t), s->refcount_order,
                                qcow2_slot_of(s, cluster));
    /* Half of the range stays free, so that at least one snapshot of the image is always
     * possible. */
    if (s->compressed_next == offset && count > 0 && count < s->refcount_max / 2) {
        qcow2_set_counts_locked(s, t, index, qcow2_slot_of(s, cluster), 1, count + 1);
        *ret_shared = true;
    }
    return 0;
}

static void drop_share(BlockDriverState *bs, uint64_t offset)
{
    Qcow2HostRun run = {qcow2_start_of_cluster(qcow2_state(bs), offset), 1};

    qcow2_update_refcounts(bs, &run, 1, -1);
}

/* Tries to put @size bytes behind the stream before. 0: *ret_offset tells where, 0 if not
 * possible. */
static int alloc_behind(BlockDriverState *bs, uint32_t size, uint64_t *ret_offset)
{
    BDRVQcow2State *s = qcow2_state(bs);
    uint64_t next, room, cluster_end, got = s->cluster_size;
    bool shared = false;
    int64_t more;
    int ret;

    *ret_offset = 0;
    qb_mutex_lock(&s->alloc_lock);
    next = s->compressed_next;
    ret = next ? share_cluster_locked(s, next, &shared) : 0;
    if (shared) {
        s->compressed_next = 0; /* ours until we are done */
    }
    qb_mutex_unlock(&s->alloc_lock);
    if (ret < 0 || !shared) {
        return ret;
    }
    cluster_end = qcow2_start_of_cluster(s, next) + s->cluster_size;
    room = cluster_end - next;
    if (size <= room) {
        *ret_offset = next;
        return 0;
    }
    more = qcow2_alloc_run(bs, cluster_end, &got);
    if (more == (int64_t)cluster_end) {
        *ret_offset = next;
        return 0;
    }
    drop_share(bs, next);
    *ret_offset = (uint64_t)MAX(more, 0); /* a fresh cluster elsewhere will do */
    return (int)MIN(more, 0);
}

void qcow2_alloc_leave(BDRVQcow2State *s, const Qcow2HostRun *runs, size_t n)
{
    QB_GUARD(&s->alloc_lock);

    for (size_t i = 0; i < n && s->compressed_next; i++) {
        uint64_t start = qcow2_start_of_cluster(s, runs[i].offset);
        /* to the end of the cluster: it may point right behind the run */
        uint64_t end = qb_align_up(runs[i].offset + runs[i].bytes, s->cluster_size);
        if (s->compressed_next >= start && s->compressed_next < end) {
            s->compressed_next = 0;
        }
    }
}

static void set_compressed_next(BDRVQcow2State *s, uint64_t next)
{
    QB_GUARD(&s->alloc_lock);

    s->compressed_next = qcow2_offset_into_cluster(s, next) ? next : 0;
}

int64_t qcow2_alloc_bytes(BlockDriverState *bs, uint32_t size)
{
    BDRVQcow2State *s = qcow2_state(bs);
    uint64_t offset;
    int ret = qcow2_lazy_begin(bs);

    assert(size > 0 && size < s->cluster_size);
    ret = ret < 0 ? ret : alloc_behind(bs, size, &offset);
    if (ret < 0) {
        return ret;
    }
    if (!offset) {
        int64_t fresh = qcow2_alloc_clusters(bs, s->cluster_size);
        if (fresh < 0) {
            return fresh;
        }
        offset = (uint64_t)fresh;
    }
    set_compressed_next(s, offset + size);
    return (int64_t)offset;
}
