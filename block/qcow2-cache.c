/*
 * Tables in memory: L2 tables and refcount blocks, big-endian as on disk, found by host offset.
 *
 *      offset --hash--> shard --hash table--> Qcow2Table {dirty sectors, pins, parts}
 *                         |-- dirty list         |
 *                         |      [ part | NULL | part | part | NULL ... ]  what is in memory of it
 *                         `-- LRU list per kind --'
 *
 * A part is what is loaded, counted and dropped: a refcount block as a whole, an L2 table whole or
 * in slices (l2-cache-entry-size; never less than a sector of the file).  Tables keep the size of
 * parts that they were entered with: those entered as zeroes have small ones, so that memory is
 * touched only for what gets entries.
 *
 * Where a part is:   loading (in no list) --> held by its table, while that is pinned
 *                    held --last put--> LRU list --used--> held
 *                    held --store--> dirty list of its table --collect--> held
 *
 * Invariants
 * 1. A table is found by its offset at most once.  Poisoned ones are not found at all, and poison
 *    takes the table with all its parts: none can be left behind.
 * 2. Dirty tables are in the dirty list and have a bit per dirty sector; parts with such sectors
 *    are in memory.  Only qcow2-flush.c makes them clean, by collecting copies.
 * 3. "unlinked" says that no stable pointer names the table: the flush writes it before the pointer
 *    (invariant 0 of the driver).  Collecting clears it; only a flush that failed before its first
 *    barrier sets it again.
 * 4. Nobody waits for an entry while holding one: a get() never waits for space, the cache grows
 *    and is trimmed when parts are loaded; and nobody waits for another's load with one of his own
 *    under way.  Two threads may hold different parts of a table.
 * 5. load() and store() of bytes are atomic against one another: both hold the shard's lock.
 * 6. A part that was asked for, stored to or collected under a pin stays until the last pin of its
 *    table goes; others may be dropped under it.
 * 7. A part with a "zero" bit is zeroes in the file, and nothing was stored to it in memory.  It
 *    needs neither memory nor I/O to be read, and no I/O to be there for a store, which takes the
 *    bit away.
 *
 * Each kind has a limit for the bytes of its parts in one image; beside it a process-wide limit (an
 * eighth of the memory, at most 1 GiB) makes every cache trim when all together are over it.
 *
 * Deliberately not done: writing back single tables (their order is the flusher's business).
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-cache-int.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "util/iov.h"

#define MAX_PROCESS_BYTES (UINT64_C(1) << 30)
#define SHORT_LIFE_NS UINT64_C(1000000000)
#define ZEROED_PART 4096 /* bytes */

static _Atomic(uint64_t) process_bytes;

static uint64_t process_limit(void)
{
    static _Atomic(uint64_t) limit;
    uint64_t value = atomic_load(&limit);

    if (!value) {
        uint64_t ram = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
        value = MIN(ram / 8, MAX_PROCESS_BYTES);
        atomic_store(&limit, value);
    }
    return value;
}

static bool over_limit(const Qcow2Cache *c, Qcow2TableKind kind)
{
    return atomic_load(&c->bytes[kind]) > atomic_load(&c->limit[kind]) ||
           atomic_load(&process_bytes) > process_limit();
}

/* ---- parts ---- */

static bool part_new_locked(Qcow2Table *t, unsigned index)
{
    uint8_t *data = qb_try_memalign(MIN(t->part_bytes, 4096), t->part_bytes);
    Part *p;

    if (!data) {
        return false;
    }
    assert(!t->parts[index]);
    p = g_new0(Part, 1);
    *p = (Part){.table = t, .index = index, .data = data, .loading = true, .link.data = p};
    t->parts[index] = p;
    t->nb_there++;
    atomic_fetch_add(&t->cache->bytes[t->kind], t->part_bytes);
    atomic_fetch_add(&process_bytes, t->part_bytes);
    return true;
}

static void part_move_locked(Part *p, GQueue *to)
{
    if (p->list) {
        g_queue_unlink(p->list, &p->link);
    }
    p->list = to;
    if (to) {
        g_queue_push_tail_link(to, &p->link);
    }
}

static void part_free_locked(Part *p)
{
    Qcow2Table *t = p->table;

    assert(p->list != &t->dirty_parts);
    part_move_locked(p, NULL);
    atomic_fetch_sub(&t->cache->bytes[t->kind], t->part_bytes);
    atomic_fetch_sub(&process_bytes, t->part_bytes);
    t->parts[p->index] = NULL;
    t->nb_there--;
    free(p->data);
    g_free(p);
}

/* It stays as long as its table is pinned. */
static void part_hold_locked(Part *p)
{
    p->loading = false;
    if (p->list != &p->table->dirty_parts) {
        part_move_locked(p, &p->table->held);
    }
}

/* Invariant 7. */
static bool is_zero_locked(const Qcow2Table *t, unsigned index)
{
    return t->zero && (t->zero[index / 64] & (UINT64_C(1) << (index % 64)));
}

static bool is_known_locked(const Qcow2Table *t, unsigned index)
{
    return is_zero_locked(t, index) || (t->parts[index] && !t->parts[index]->loading);
}

/* Those of the parts [first, end) that are known to be zeroes come into memory as if they had been
 * used just now.  Where there is none they stay away. */
static void fill_zeroes_locked(Qcow2Table *t, unsigned first, unsigned end)
{
    unsigned tick = atomic_load_explicit(&t->cache->tick, memory_order_relaxed);

    for (unsigned i = first; i < end; i++) {
        if (t->parts[i] || !is_zero_locked(t, i) || !part_new_locked(t, i)) {
            continue;
        }
        memset(t->parts[i]->data, 0, t->part_bytes);
        t->parts[i]->loading = false;
        t->parts[i]->left_at = tick;
        part_move_locked(t->parts[i], &t->shard->lru[t->kind]);
    }
}

/* ---- tables ---- */

static Shard *shard_of(Qcow2Cache *c, uint64_t offset)
{
    return &c->shards[(offset / c->table_bytes * UINT64_C(0x9E3779B97F4A7C15)) >> 60];
}

static size_t usual_part(const Qcow2Cache *c, Qcow2TableKind kind)
{
    return kind == QCOW2_TABLE_L2 ? atomic_load(&c->l2_part) : c->table_bytes;
}

static Qcow2Table *table_new(Qcow2Cache *c, Qcow2TableKind kind, uint64_t offset, size_t part)
{
    unsigned n = (unsigned)(c->table_bytes / part);
    Qcow2Table *t = g_malloc0(sizeof(*t) + n * sizeof(t->parts[0]));

    t->cache = c;
    t->shard = shard_of(c, offset);
    t->offset = offset;
    t->kind = kind;
    t->part_bytes = part;
    t->nb_parts = n;
    t->dirty = g_new0(uint64_t, (c->nb_sectors + 63) / 64);
    t->dirty_link.data = t;
    atomic_fetch_add(&c->nb_tables, 1);
    return t;
}

static void table_free_locked(Qcow2Table *t)
{
    assert(t->pins == 0 && t->nb_dirty == 0);
    for (unsigned i = 0; i < t->nb_parts && t->nb_there; i++) {
        if (t->parts[i]) {
            part_free_locked(t->parts[i]);
        }
    }
    atomic_fetch_sub(&t->cache->nb_tables, 1);
    g_free(t->dirty);
    g_free(t->zero);
    g_free(t);
}

void qcow2_table_set_clean_locked(Qcow2Table *t)
{
    if (!t->nb_dirty) {
        return;
    }
    g_queue_unlink(&t->shard->dirty, &t->dirty_link);
    memset(t->dirty, 0, (t->cache->nb_sectors + 63) / 64 * sizeof(uint64_t));
    t->nb_dirty = 0;
    while (t->dirty_parts.head) {
        part_move_locked(t->dirty_parts.head->data, &t->held);
        atomic_fetch_sub(&t->cache->dirty_bytes[t->kind], t->part_bytes);
    }
}

void qcow2_table_set_dirty_locked(Qcow2Table *t, size_t pos, size_t len)
{
    size_t first = pos / t->cache->sector, last = (pos + len - 1) / t->cache->sector;

    assert(len > 0 && pos + len <= t->cache->table_bytes);
    if (t->poisoned) {
        return;
    }
    if (!t->nb_dirty) {
        g_queue_push_tail_link(&t->shard->dirty, &t->dirty_link);
    }
    for (size_t i = first; i <= last; i++) {
        uint64_t bit = UINT64_C(1) << (i % 64);
        t->nb_dirty += !(t->dirty[i / 64] & bit);
        t->dirty[i / 64] |= bit;
    }
    for (size_t i = pos / t->part_bytes; i <= (pos + len - 1) / t->part_bytes; i++) {
        assert(t->parts[i] && !t->parts[i]->loading);
        if (t->zero) {
            t->zero[i / 64] &= ~(UINT64_C(1) << (i % 64));
        }
        if (t->parts[i]->list != &t->dirty_parts) {
            part_move_locked(t->parts[i], &t->dirty_parts);
            atomic_fetch_add(&t->cache->dirty_bytes[t->kind], t->part_bytes);
        }
    }
}

/* Out of the hash with all its parts; whoever still has it pinned sees it poisoned. */
static void forget_locked(Qcow2Table *t)
{
    g_hash_table_remove(t->shard->tables, &t->offset);
    qcow2_table_set_clean_locked(t);
    t->poisoned = true;
    for (unsigned i = 0; i < t->nb_parts && t->pins; i++) {
        if (t->parts[i] && t->parts[i]->list == &t->shard->lru[t->kind]) {
            part_move_locked(t->parts[i], &t->held);
        }
    }
    if (!t->pins) {
        table_free_locked(t);
    }
}

/* There is a table that can become unused. Programs that end at once are spared the timer's thread:
 * who goes on uses tables later, too. */
static void arm_cleaning(Qcow2Cache *c)
{
    BDRVQcow2State *s = qcow2_state(c->bs);

    if (atomic_load_explicit(&c->cleaned, memory_order_relaxed) || !s->cache_clean_interval ||
        !qcow2_background_wanted(s) || qb_now_ns() - c->born < SHORT_LIFE_NS) {
        return;
    }
    atomic_store(&c->cleaned, true);
    qcow2_background_arm(s, QCOW2_BG_CLEAN, s->cache_clean_interval * 1000);
}

static void release_held_locked(Qcow2Table *t)
{
    unsigned tick = atomic_load_explicit(&t->cache->tick, memory_order_relaxed);

    if (!t->held.head) {
        return;
    }
    while (t->held.head) {
        Part *p = t->held.head->data;
        p->left_at = tick;
        part_move_locked(p, &t->shard->lru[t->kind]);
    }
    arm_cleaning(t->cache);
}

void qcow2_table_unpin_locked(Qcow2Table *t)
{
    assert(t->pins > 0);
    if (--t->pins) {
        return;
    }
    if (t->poisoned) {
        table_free_locked(t);
    } else if (!t->nb_there) { /* nothing could be loaded, or nobody wanted any of the zeroes */
        forget_locked(t);
    } else {
        release_held_locked(t);
    }
}

static void drop_part_locked(Part *p)
{
    Qcow2Table *t = p->table;

    part_free_locked(p);
    if (!t->nb_there && !t->pins) {
        forget_locked(t);
    }
}

static void trim_shard_locked(Qcow2Cache *c, Shard *shard)
{
    for (int kind = 0; kind < QCOW2_NB_TABLE_KINDS; kind++) {
        while (over_limit(c, kind) && shard->lru[kind].head) {
            drop_part_locked(shard->lru[kind].head->data);
        }
    }
}

/* ---- the cache ---- */

/* True when parts have another size than before. */
static bool set_config(Qcow2Cache *c, const Qcow2CacheConfig *config)
{
    size_t part = CLAMP(config->l2_part, c->sector, c->table_bytes);

    for (int kind = 0; kind < QCOW2_NB_TABLE_KINDS; kind++) {
        atomic_store(&c->limit[kind], config->limit[kind]);
    }
    return atomic_exchange(&c->l2_part, part) != part;
}

Qcow2Cache *qcow2_cache_new(BlockDriverState *bs, const Qcow2CacheConfig *config)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    Qcow2Cache *c = g_new0(Qcow2Cache, 1);
    uint32_t align = bs->file ? bs->file->bs->bl.request_alignment : 1;

    c->bs = bs;
    c->born = qb_now_ns();
    c->table_bytes = s->cluster_size;
    c->sector = MIN(MAX(align, BDRV_SECTOR_SIZE), s->cluster_size);
    c->nb_sectors = (unsigned)(c->table_bytes / c->sector);
    set_config(c, config);
    for (int i = 0; i < NB_SHARDS; i++) {
        qb_mutex_init(&c->shards[i].lock);
        qb_cond_init(&c->shards[i].loaded);
        c->shards[i].tables = g_hash_table_new(g_int64_hash, g_int64_equal);
    }
    return c;
}

static void forget_all(Shard *shard)
{
    QB_GUARD(&shard->lock);
    GHashTableIter iter;
    Qcow2Table *t;

    for (;;) {
        g_hash_table_iter_init(&iter, shard->tables);
        if (!g_hash_table_iter_next(&iter, NULL, (gpointer *)&t)) {
            return;
        }
        forget_locked(t);
    }
}

void qcow2_cache_reset(Qcow2Cache *c)
{
    for (int i = 0; i < NB_SHARDS; i++) {
        forget_all(&c->shards[i]);
    }
}

void qcow2_cache_free(Qcow2Cache *c)
{
    if (!c) {
        return;
    }
    qcow2_cache_reset(c);
    assert(atomic_load(&c->nb_tables) == 0);
    for (int i = 0; i < NB_SHARDS; i++) {
        g_hash_table_destroy(c->shards[i].tables);
        qb_cond_destroy(&c->shards[i].loaded);
        qb_mutex_destroy(&c->shards[i].lock);
    }
    g_free(c);
}

/* Those that came into the lists before the cleaning @tick, which are the first of them. */
static void drop_unused(Shard *shard, unsigned tick)
{
    QB_GUARD(&shard->lock);

    for (int kind = 0; kind < QCOW2_NB_TABLE_KINDS; kind++) {
        const GQueue *lru = &shard->lru[kind];
        while (lru->head && ((const Part *)lru->head->data)->left_at != tick) {
            drop_part_locked(lru->head->data);
        }
    }
}

void qcow2_cache_configure(Qcow2Cache *c, const Qcow2CacheConfig *config)
{
    if (set_config(c, config)) {
        atomic_fetch_add(&c->tick, 1);
        for (int i = 0; i < NB_SHARDS; i++) {
            drop_unused(&c->shards[i], atomic_load(&c->tick));
        }
    }
    qcow2_cache_trim(c);
}

void qcow2_cache_trim(Qcow2Cache *c)
{
    for (int i = 0; i < NB_SHARDS; i++) {
        QB_GUARD(&c->shards[i].lock);
        trim_shard_locked(c, &c->shards[i]);
    }
}

uint64_t qcow2_cache_clean_step(BlockDriverState *bs)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    Qcow2Cache *c = s->cache;
    unsigned tick;

    tick = atomic_fetch_add(&c->tick, 1);
    for (int i = 0; i < NB_SHARDS; i++) {
        drop_unused(&c->shards[i], tick);
    }
    if (qcow2_cache_bytes(c) && s->cache_clean_interval) {
        return s->cache_clean_interval * 1000;
    }
    atomic_store(&c->cleaned, false);
    return 0;
}

uint64_t qcow2_cache_bytes(Qcow2Cache *c)
{
    return atomic_load(&c->bytes[QCOW2_TABLE_L2]) + atomic_load(&c->bytes[QCOW2_TABLE_REFBLOCK]);
}

uint64_t qcow2_cache_dirty_bytes(Qcow2Cache *c)
{
    return atomic_load(&c->dirty_bytes[QCOW2_TABLE_L2]) +
           atomic_load(&c->dirty_bytes[QCOW2_TABLE_REFBLOCK]);
}

/* Is more than an @nth of what either kind may have dirty? */
static bool dirtier_than(Qcow2Cache *c, unsigned nth)
{
    for (int kind = 0; kind < QCOW2_NB_TABLE_KINDS; kind++) {
        uint64_t limit = MIN(atomic_load(&c->limit[kind]), process_limit());
        if (atomic_load(&c->dirty_bytes[kind]) > limit / nth) {
            return true;
        }
    }
    return qcow2_cache_dirty_bytes(c) > process_limit() / nth;
}

bool qcow2_cache_too_dirty(Qcow2Cache *c)
{
    return dirtier_than(c, 1);
}

bool qcow2_cache_half_dirty(Qcow2Cache *c)
{
    return dirtier_than(c, 2);
}

/* ---- finding and loading ---- */

static const char *kind_name(Qcow2TableKind kind)
{
    return kind == QCOW2_TABLE_L2 ? "L2 table" : "refcount block";
}

/* A table must be aligned and begin inside the file (else -ENXIO, which is not reported here); its last
 * bytes may lie beyond the end. */
static int judge_offset(const Qcow2Cache *c, Qcow2TableKind kind, uint64_t offset)
{
    int64_t length = bdrv_getlength(c->bs->file->bs);

    if (!qb_is_aligned(offset, c->table_bytes)) {
        return qcow2_signal_corruption(c->bs, true, (int64_t)offset,
                                       "Cannot get entry from %s cache: Offset %#" G_GINT64_MODIFIER
                                       "x is unaligned", kind_name(kind), offset);
    }
    if (length < 0) {
        return (int)length;
    }
    return offset == 0 || offset >= (uint64_t)length ? -ENXIO : 0;
}

int qcow2_table_outside_file(BlockDriverState *bs, Qcow2TableKind kind, uint64_t offset)
{
    return qcow2_signal_corruption(bs, true, (int64_t)offset, "%s at offset %#" G_GINT64_MODIFIER
                                   "x lies outside the image file", kind_name(kind), offset);
}

/* Into the memory of @n parts from @first on, which this thread is loading. */
static int read_run(Qcow2Table *t, unsigned first, unsigned n)
{
    BdrvChild *file = t->cache->bs->file;
    int64_t offset = (int64_t)(t->offset + first * t->part_bytes);
    size_t bytes = n * t->part_bytes;
    int ret = judge_offset(t->cache, t->kind, t->offset);

    if (ret < 0) {
        return ret;
    }
    bdrv_debug_event(file, t->kind == QCOW2_TABLE_L2 ? "l2_load" : "refblock_load");
    if (n == 1) {
        ret = bdrv_pread(file, offset, (int64_t)bytes, t->parts[first]->data, 0);
        return ret == -ENXIO ? -EIO : ret;
    }
    uint8_t *buf = qb_try_memalign(4096, MAX(bytes, 4096));
    ret = buf ? bdrv_pread(file, offset, (int64_t)bytes, buf, 0) : -ENOMEM;
    for (unsigned i = 0; i < n && ret >= 0; i++) {
        memcpy(t->parts[first + i]->data, buf + i * t->part_bytes, t->part_bytes);
    }
    free(buf);
    return ret == -ENXIO ? -EIO : ret;
}

static void finish_run(Qcow2Table *t, unsigned first, unsigned n, int ret)
{
    Shard *shard = t->shard;
    QB_GUARD(&shard->lock);

    for (unsigned i = first; i < first + n; i++) {
        if (ret < 0) {
            part_free_locked(t->parts[i]);
        } else {
            part_hold_locked(t->parts[i]);
        }
    }
    qb_cond_broadcast(&shard->loaded);
}

/* Holds the part @first, if others have loaded it or do so now, or it is zeroes: *ret_mine is 0
 * then.  Else enters it and those missing behind it, *ret_mine in all, for this thread to load.
 * -ENOMEM. */
static int claim_run(Qcow2Table *t, unsigned first, unsigned end, unsigned *ret_mine)
{
    Shard *shard = t->shard;
    QB_GUARD(&shard->lock);

    *ret_mine = 0;
    while (t->parts[first] && t->parts[first]->loading) {
        qb_cond_wait(&shard->loaded, &shard->lock);
    }
    fill_zeroes_locked(t, first, end);
    if (t->parts[first]) {
        part_hold_locked(t->parts[first]);
        return 0;
    }
    for (unsigned i = first; i < end && !t->parts[i] && part_new_locked(t, i); i++) {
        ++*ret_mine;
    }
    trim_shard_locked(t->cache, shard);
    return *ret_mine ? 0 : -ENOMEM;
}

/* Loads what is missing of the parts [first, end) of a pinned table. Whoever waits for another's
 * part has none of his own under way (invariant 4). */
static int bring_parts(Qcow2Table *t, unsigned first, unsigned end)
{
    while (first < end) {
        unsigned mine;
        int ret = claim_run(t, first, end, &mine);
        if (ret == 0 && mine) {
            ret = read_run(t, first, mine);
            finish_run(t, first, mine, ret);
        }
        if (ret < 0) {
            return ret;
        }
        first += MAX(mine, 1);
    }
    return 0;
}

/* Numbers of the parts that it lies in. */
static void range_of(const Qcow2Table *t, const Qcow2TableRange *r, unsigned *first, unsigned *end)
{
    assert(r->len > 0 && r->pos + r->len <= t->cache->table_bytes);
    *first = (unsigned)(r->pos / t->part_bytes);
    *end = (unsigned)((r->pos + r->len - 1) / t->part_bytes) + 1;
}

/* Holds the parts of a table about to be pinned, if all of them are there or can be without I/O. */
static bool hold_range_locked(Qcow2Table *t, unsigned first, unsigned end)
{
    fill_zeroes_locked(t, first, end);
    for (unsigned i = first; i < end; i++) {
        if (!t->parts[i] || t->parts[i]->loading) {
            return false;
        }
    }
    for (unsigned i = first; i < end; i++) {
        part_hold_locked(t->parts[i]);
    }
    trim_shard_locked(t->cache, t->shard);
    return true;
}

/* Pins the table that is there, or enters a new one without parts. */
static Qcow2Table *find_or_enter_locked(Qcow2Cache *c, Shard *shard, Qcow2TableKind kind,
                                        uint64_t offset)
{
    Qcow2Table *t = g_hash_table_lookup(shard->tables, &offset);

    if (!t) {
        t = table_new(c, kind, offset, usual_part(c, kind));
        g_hash_table_insert(shard->tables, &t->offset, t);
    }
    t->pins++;
    return t;
}

/* The image's L1 and its refcount table name the same cluster. */
static int refuse_other_kind(const Qcow2Cache *c, uint64_t offset)
{
    return qcow2_signal_corruption(c->bs, true, (int64_t)offset, "Cluster at offset %#"
                                   G_GINT64_MODIFIER "x is an L2 table and a refcount block",
                                   offset);
}

int qcow2_cache_get_part(Qcow2Cache *c, const Qcow2TableRange *r, Qcow2Table **ret)
{
    Shard *shard = shard_of(c, r->offset);
    unsigned first, end;
    Qcow2Table *t;
    bool there;
    int err;

    qb_mutex_lock(&shard->lock);
    t = find_or_enter_locked(c, shard, r->kind, r->offset);
    if (t->kind != r->kind) {
        qcow2_table_unpin_locked(t);
        qb_mutex_unlock(&shard->lock);
        return refuse_other_kind(c, r->offset);
    }
    range_of(t, r, &first, &end);
    there = hold_range_locked(t, first, end);
    qb_mutex_unlock(&shard->lock);
    err = there ? 0 : bring_parts(t, first, end);
    if (err < 0) {
        qcow2_cache_put(t);
        return err;
    }
    *ret = t;
    return 0;
}

int qcow2_cache_get(Qcow2Cache *c, Qcow2TableKind kind, uint64_t offset, Qcow2Table **ret)
{
    const Qcow2TableRange whole = {kind, offset, 0, c->table_bytes};

    int err = qcow2_cache_get_part(c, &whole, ret);
    return err == -ENXIO ? qcow2_table_outside_file(c->bs, kind, offset) : err;
}

Qcow2Table *qcow2_cache_peek_part(Qcow2Cache *c, const Qcow2TableRange *r)
{
    Shard *shard = shard_of(c, r->offset);
    QB_GUARD(&shard->lock);
    Qcow2Table *t = g_hash_table_lookup(shard->tables, &r->offset);
    unsigned first, end;

    if (!t || t->kind != r->kind) {
        return NULL;
    }
    if (r->len) {
        range_of(t, r, &first, &end);
        if (!hold_range_locked(t, first, end)) {
            return NULL;
        }
    }
    t->pins++;
    return t;
}

/* As if it had been held for a moment: it is the one used last. */
static void part_touch_locked(Part *p)
{
    GQueue *lru = &p->table->shard->lru[p->table->kind];

    if (p->list == lru) {
        p->left_at = atomic_load_explicit(&p->table->cache->tick, memory_order_relaxed);
        if (lru->tail != &p->link) {
            part_move_locked(p, lru);
        }
    }
}

bool qcow2_cache_copy_part(Qcow2Cache *c, const Qcow2TableRange *r, void *out)
{
    Shard *shard = shard_of(c, r->offset);
    QB_GUARD(&shard->lock);
    const Qcow2Table *t = g_hash_table_lookup(shard->tables, &r->offset);
    unsigned first, end;

    if (!t || t->kind != r->kind) {
        return false;
    }
    range_of(t, r, &first, &end);
    for (unsigned i = first; i < end; i++) {
        if (!is_known_locked(t, i)) {
            return false;
        }
        if (t->parts[i]) {
            part_touch_locked(t->parts[i]);
        }
    }
    qcow2_table_copy_out_locked(t, r->pos, r->len, out);
    return true;
}

Qcow2Table *qcow2_cache_peek(Qcow2Cache *c, Qcow2TableKind kind, uint64_t offset)
{
    const Qcow2TableRange whole = {kind, offset, 0, c->table_bytes};

    return qcow2_cache_peek_part(c, &whole);
}

bool qcow2_cache_has(Qcow2Cache *c, uint64_t offset, Qcow2TableKind *ret_kind)
{
    Shard *shard = shard_of(c, offset);
    QB_GUARD(&shard->lock);
    const Qcow2Table *t = g_hash_table_lookup(shard->tables, &offset);

    if (t) {
        *ret_kind = t->kind;
    }
    return t != NULL;
}

/* All parts of a table that nobody else knows yet, in memory. */
static bool fill_new(Qcow2Table *t, const uint8_t *init)
{
    QB_GUARD(&t->shard->lock);

    for (unsigned i = 0; i < t->nb_parts; i++) {
        if (!part_new_locked(t, i)) {
            return false;
        }
        if (init) {
            memcpy(t->parts[i]->data, init + i * t->part_bytes, t->part_bytes);
        } else {
            memset(t->parts[i]->data, 0, t->part_bytes);
        }
        part_hold_locked(t->parts[i]);
    }
    return true;
}

/* Pins a new table, which takes the place of one that may be left of the cluster's former life. */
static void enter_new_locked(Qcow2Table *t)
{
    Qcow2Table *old = g_hash_table_lookup(t->shard->tables, &t->offset);

    if (old) {
        forget_locked(old);
    }
    g_hash_table_insert(t->shard->tables, &t->offset, t);
    t->pins++;
}

Qcow2Table *qcow2_cache_add(Qcow2Cache *c, Qcow2TableKind kind, uint64_t offset, const void *init)
{
    Qcow2Table *t = table_new(c, kind, offset, usual_part(c, kind));
    bool filled = fill_new(t, init);

    QB_GUARD(&t->shard->lock);
    if (!filled) {
        table_free_locked(t);
        return NULL;
    }
    t->unlinked = true;
    enter_new_locked(t);
    qcow2_table_set_dirty_locked(t, 0, c->table_bytes);
    trim_shard_locked(c, t->shard);
    return t;
}

Qcow2Table *qcow2_cache_add_zeroed(Qcow2Cache *c, uint64_t offset)
{
    size_t part = MIN(usual_part(c, QCOW2_TABLE_L2), MAX(c->sector, ZEROED_PART));
    Qcow2Table *t = table_new(c, QCOW2_TABLE_L2, offset, part);
    size_t bytes = (t->nb_parts + 63) / 64 * sizeof(uint64_t);

    t->zero = g_malloc(bytes);
    memset(t->zero, 0xff, bytes);
    QB_GUARD(&t->shard->lock);
    enter_new_locked(t);
    return t;
}

void qcow2_cache_put(Qcow2Table *t)
{
    Shard *shard;

    if (!t) {
        return;
    }
    shard = t->shard;
    QB_GUARD(&shard->lock);
    qcow2_table_unpin_locked(t);
}

/* ---- poison ---- */

static void poison_one(Qcow2Cache *c, uint64_t offset)
{
    Shard *shard = shard_of(c, offset);
    QB_GUARD(&shard->lock);
    Qcow2Table *t = g_hash_table_lookup(shard->tables, &offset);

    if (t) {
        forget_locked(t);
    }
}

static GArray *offsets_between(Shard *shard, uint64_t start, uint64_t end)
{
    QB_GUARD(&shard->lock);
    GArray *offsets = g_array_new(FALSE, FALSE, sizeof(uint64_t));
    GHashTableIter iter;
    Qcow2Table *t;

    g_hash_table_iter_init(&iter, shard->tables);
    while (g_hash_table_iter_next(&iter, NULL, (gpointer *)&t)) {
        if (t->offset >= start && t->offset < end) {
            g_array_append_val(offsets, t->offset);
        }
    }
    return offsets;
}

/* Clusters are looked up one by one where they are fewer than the tables in memory, else the other
 * way round: the cost is bounded by both. */
void qcow2_cache_poison(Qcow2Cache *c, uint64_t offset, uint64_t bytes)
{
    uint64_t start = qb_align_down(offset, c->table_bytes);
    uint64_t end = qb_align_up(offset + bytes, c->table_bytes);

    if (atomic_load(&c->nb_tables) == 0) {
        return;
    }
    if ((end - start) / c->table_bytes <= atomic_load(&c->nb_tables)) {
        for (; start < end; start += c->table_bytes) {
            poison_one(c, start);
        }
        return;
    }
    for (int i = 0; i < NB_SHARDS; i++) {
        g_autoptr(GArray) offsets = offsets_between(&c->shards[i], start, end);
        for (guint j = 0; j < offsets->len; j++) {
            poison_one(c, g_array_index(offsets, uint64_t, j));
        }
    }
}

static bool touches_any(const Qcow2Cache *c, uint64_t offset, const Qcow2HostRun *runs, size_t n)
{
    bool found = false;

    for (size_t i = 0; i < n; i++) {
        found |= qb_ranges_overlap(offset, c->table_bytes, runs[i].offset, runs[i].bytes);
    }
    return found;
}

void qcow2_cache_poison_list(Qcow2Cache *c, const Qcow2HostRun *runs, size_t n)
{
    if (atomic_load(&c->nb_tables) >= n / 8) { /* comparing is some times cheaper than looking up */
        for (size_t i = 0; i < n; i++) {
            qcow2_cache_poison(c, runs[i].offset, runs[i].bytes);
        }
        return;
    }
    for (int i = 0; i < NB_SHARDS; i++) {
        g_autoptr(GArray) offsets = offsets_between(&c->shards[i], 0, UINT64_MAX);
        for (guint j = 0; j < offsets->len; j++) {
            uint64_t offset = g_array_index(offsets, uint64_t, j);
            if (touches_any(c, offset, runs, n)) {
                poison_one(c, offset);
            }
        }
    }
}

bool qcow2_table_poisoned(const Qcow2Table *t)
{
    QB_GUARD(&t->shard->lock);

    return t->poisoned;
}

bool qcow2_table_shared(const Qcow2Table *t)
{
    QB_GUARD(&t->shard->lock);

    return t->pins > 1;
}

uint64_t qcow2_table_offset(const Qcow2Table *t)
{
    return t->offset;
}

/* ---- content ---- */

/* Where the byte @pos of the table is in memory, and how many of the @len from there on. NULL: they
 * are zeroes without memory. */
static uint8_t *bytes_at_locked(const Qcow2Table *t, size_t pos, size_t len, size_t *ret_n)
{
    unsigned index = (unsigned)(pos / t->part_bytes);
    size_t into = pos % t->part_bytes;

    assert(is_known_locked(t, index));
    *ret_n = MIN(len, t->part_bytes - into);
    return t->parts[index] && !t->parts[index]->loading ? t->parts[index]->data + into : NULL;
}

void qcow2_table_copy_out_locked(const Qcow2Table *t, size_t pos, size_t len, uint8_t *out)
{
    assert(pos + len <= t->cache->table_bytes);
    for (size_t n; len; pos += n, out += n, len -= n) {
        const uint8_t *from = bytes_at_locked(t, pos, len, &n);
        if (from) {
            memcpy(out, from, n);
        } else {
            memset(out, 0, n);
        }
    }
}

void qcow2_table_load(const Qcow2Table *t, size_t pos, size_t len, void *out)
{
    QB_GUARD(&t->shard->lock);

    qcow2_table_copy_out_locked(t, pos, len, out);
}

bool qcow2_table_load_present(const Qcow2Table *t, void *out)
{
    bool all = true;
    QB_GUARD(&t->shard->lock);

    for (unsigned i = 0; i < t->nb_parts; i++) {
        size_t pos = i * t->part_bytes;
        if (is_known_locked(t, i)) {
            qcow2_table_copy_out_locked(t, pos, t->part_bytes, (uint8_t *)out + pos);
        } else {
            all = false;
        }
    }
    return all;
}

void qcow2_table_store(Qcow2Table *t, size_t pos, size_t len, const void *in)
{
    const uint8_t *from = in;
    QB_GUARD(&t->shard->lock);

    assert(pos + len <= t->cache->table_bytes);
    for (size_t done = 0, n; done < len; done += n) {
        uint8_t *to = bytes_at_locked(t, pos + done, len - done, &n);
        assert(to); /* asked for under the pin */
        memcpy(to, from + done, n);
    }
    qcow2_table_set_dirty_locked(t, pos, len);
}

uint8_t *qcow2_refblock_data(Qcow2Table *t)
{
    assert(t->kind == QCOW2_TABLE_REFBLOCK);
    qb_mutex_assert_held(&qcow2_state(t->cache->bs)->alloc_lock);
    return t->parts[0]->data;
}

void qcow2_table_mark_dirty(Qcow2Table *t, size_t pos, size_t len)
{
    QB_GUARD(&t->shard->lock);

    qcow2_table_set_dirty_locked(t, pos, len);
}
