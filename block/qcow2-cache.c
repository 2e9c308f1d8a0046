/*
 * Tables in memory: L2 tables and refcount blocks, whole clusters, big-endian as on disk.
 *
 *      offset --hash--> shard --hash table--> Qcow2Table {data, dirty sectors, pins, state}
 *                         |-- dirty list   (never dropped before they are written)
 *                         `-- LRU list     (clean, unpinned: may be dropped)
 *
 * States of a table:   LOADING --read ok--> READY --poison--> (out of the hash, gone at last put)
 *                         `--read failed--> FAILED (out of the hash)
 *
 * Invariants
 * 1. A table is found by its offset at most once.  Poisoned and failed ones are not found at all.
 * 2. Dirty tables are in the dirty list and have a bit per dirty sector; only qcow2-flush.c makes
 *    them clean, by collecting copies.
 * 3. "unlinked" says that no stable pointer names the table: the flush writes it before the pointer
 *    (invariant 0 of the driver).  Collecting clears it; only a flush that failed before its first
 *    barrier sets it again.
 * 4. Nobody waits for an entry while holding one: a get() never waits for space, the cache grows
 *    and is trimmed when tables are put back.
 * 5. load() and store() of bytes are atomic against one another: both hold the shard's lock.
 *
 * The limit counts table bytes of one image; beside it a process-wide limit (an eighth of the
 * memory, at most 1 GiB) makes every cache trim when all together are over it.
 *
 * Deliberately not done: slices smaller than a table; writing back single tables (the order of
 * writes is the flusher's business).
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "util/iov.h"

#define NB_SHARDS 16
#define MAX_PROCESS_BYTES (UINT64_C(1) << 30)
#define SHORT_LIFE_NS UINT64_C(1000000000)

typedef enum TableState { TABLE_LOADING, TABLE_READY, TABLE_FAILED } TableState;

typedef struct Shard {
    QbMutex lock;
    QbCond loaded;
    GHashTable *tables; /* &offset -> Qcow2Table */
    GQueue dirty, lru;  /* of Qcow2Table, by their links */
} Shard;

struct Qcow2Table {
    /* constant */
    Qcow2Cache *cache;
    Shard *shard;
    uint64_t offset;
    Qcow2TableKind kind;
    /* guarded by shard->lock */
    TableState state;
    unsigned pins;
    bool poisoned, unlinked;
    uint64_t *dirty;       /* bit per sector */
    unsigned nb_dirty;     /* bits set */
    GList dirty_link, lru_link;
    bool in_lru;
    unsigned left_at;      /* the cache's tick when it came into the LRU list */
    int error;             /* of a failed load */
    uint8_t *data;         /* readers of refcount blocks look at it under the alloc lock instead */
};

struct Qcow2Cache {
    BlockDriverState *bs;
    size_t table_bytes, sector;
    unsigned nb_sectors;
    _Atomic(uint64_t) limit, bytes, dirty_bytes;
    _Atomic(unsigned) tick; /* cleanings */
    uint64_t born;          /* qb_now_ns() */
    _Atomic(bool) cleaned;  /* the background has been told that there are tables */
    Shard shards[NB_SHARDS];
};

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

static bool over_limit(const Qcow2Cache *c)
{
    return atomic_load(&c->bytes) > atomic_load(&c->limit) ||
           atomic_load(&process_bytes) > process_limit();
}

/* ---- tables ---- */

static Shard *shard_of(Qcow2Cache *c, uint64_t offset)
{
    return &c->shards[(offset / c->table_bytes * UINT64_C(0x9E3779B97F4A7C15)) >> 60];
}

static Qcow2Table *table_alloc(Qcow2Cache *c, Qcow2TableKind kind, uint64_t offset)
{
    uint8_t *data = qb_try_memalign(4096, MAX(c->table_bytes, 4096));
    Qcow2Table *t;

    if (!data) {
        return NULL;
    }
    t = g_new0(Qcow2Table, 1);
    t->cache = c;
    t->shard = shard_of(c, offset);
    t->offset = offset;
    t->kind = kind;
    t->data = data;
    t->dirty = g_new0(uint64_t, (c->nb_sectors + 63) / 64);
    t->dirty_link.data = t->lru_link.data = t;
    atomic_fetch_add(&c->bytes, c->table_bytes);
    atomic_fetch_add(&process_bytes, c->table_bytes);
    return t;
}

static void table_free(Qcow2Table *t)
{
    assert(t->pins == 0 && t->nb_dirty == 0 && !t->in_lru);
    atomic_fetch_sub(&t->cache->bytes, t->cache->table_bytes);
    atomic_fetch_sub(&process_bytes, t->cache->table_bytes);
    free(t->data);
    g_free(t->dirty);
    g_free(t);
}

static void lru_remove_locked(Qcow2Table *t)
{
    if (t->in_lru) {
        g_queue_unlink(&t->shard->lru, &t->lru_link);
        t->in_lru = false;
    }
}

static void set_clean_locked(Qcow2Table *t)
{
    if (t->nb_dirty) {
        g_queue_unlink(&t->shard->dirty, &t->dirty_link);
        atomic_fetch_sub(&t->cache->dirty_bytes, t->cache->table_bytes);
        memset(t->dirty, 0, (t->cache->nb_sectors + 63) / 64 * sizeof(uint64_t));
        t->nb_dirty = 0;
    }
}

static void set_dirty_locked(Qcow2Table *t, size_t pos, size_t len)
{
    size_t first = pos / t->cache->sector, last = (pos + len - 1) / t->cache->sector;

    assert(len > 0 && pos + len <= t->cache->table_bytes);
    if (t->poisoned) {
        return;
    }
    if (!t->nb_dirty) {
        g_queue_push_tail_link(&t->shard->dirty, &t->dirty_link);
        atomic_fetch_add(&t->cache->dirty_bytes, t->cache->table_bytes);
    }
    for (size_t i = first; i <= last; i++) {
        uint64_t bit = UINT64_C(1) << (i % 64);
        t->nb_dirty += !(t->dirty[i / 64] & bit);
        t->dirty[i / 64] |= bit;
    }
}

/* Out of the hash; whoever still has it pinned sees it poisoned. */
static void forget_locked(Qcow2Table *t)
{
    g_hash_table_remove(t->shard->tables, &t->offset);
    lru_remove_locked(t);
    set_clean_locked(t);
    t->poisoned = true;
    if (!t->pins) {
        table_free(t);
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

static void unpin_locked(Qcow2Table *t)
{
    assert(t->pins > 0);
    if (--t->pins) {
        return;
    }
    if (t->poisoned) {
        table_free(t);
    } else if (!t->nb_dirty && !t->in_lru) {
        g_queue_push_tail_link(&t->shard->lru, &t->lru_link);
        t->in_lru = true;
        t->left_at = atomic_load_explicit(&t->cache->tick, memory_order_relaxed);
        arm_cleaning(t->cache);
    }
}

static void pin_locked(Qcow2Table *t)
{
    lru_remove_locked(t);
    t->pins++;
}

static void trim_shard_locked(Qcow2Cache *c, Shard *shard)
{
    while (over_limit(c) && shard->lru.head) {
        forget_locked(shard->lru.head->data);
    }
}

/* ---- the cache ---- */

Qcow2Cache *qcow2_cache_new(BlockDriverState *bs, uint64_t limit_bytes)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    Qcow2Cache *c = g_new0(Qcow2Cache, 1);
    uint32_t align = bs->file ? bs->file->bs->bl.request_alignment : 1;

    c->bs = bs;
    c->born = qb_now_ns();
    c->table_bytes = s->cluster_size;
    c->sector = MIN(MAX(align, BDRV_SECTOR_SIZE), s->cluster_size);
    c->nb_sectors = (unsigned)(c->table_bytes / c->sector);
    atomic_store(&c->limit, limit_bytes);
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
    assert(atomic_load(&c->bytes) == 0);
    for (int i = 0; i < NB_SHARDS; i++) {
        g_hash_table_destroy(c->shards[i].tables);
        qb_cond_destroy(&c->shards[i].loaded);
        qb_mutex_destroy(&c->shards[i].lock);
    }
    g_free(c);
}

void qcow2_cache_set_limit(Qcow2Cache *c, uint64_t limit_bytes)
{
    atomic_store(&c->limit, limit_bytes);
    qcow2_cache_trim(c);
}

void qcow2_cache_trim(Qcow2Cache *c)
{
    for (int i = 0; i < NB_SHARDS; i++) {
        QB_GUARD(&c->shards[i].lock);
        trim_shard_locked(c, &c->shards[i]);
    }
}

/* Those that came into the list before the cleaning @tick, which are the first of it. */
static void drop_unused(Shard *shard, unsigned tick)
{
    QB_GUARD(&shard->lock);
    const Qcow2Table *t;

    while (shard->lru.head && (t = shard->lru.head->data)->left_at != tick) {
        forget_locked(shard->lru.head->data);
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
    if (atomic_load(&c->bytes) && s->cache_clean_interval) {
        return s->cache_clean_interval * 1000;
    }
    atomic_store(&c->cleaned, false);
    return 0;
}

uint64_t qcow2_cache_bytes(Qcow2Cache *c)
{
    return atomic_load(&c->bytes);
}

uint64_t qcow2_cache_dirty_bytes(Qcow2Cache *c)
{
    return atomic_load(&c->dirty_bytes);
}

bool qcow2_cache_too_dirty(Qcow2Cache *c)
{
    uint64_t limit = atomic_load(&c->limit), all = process_limit();

    return atomic_load(&c->dirty_bytes) > MIN(limit, all);
}

/* ---- finding and loading ---- */

/* Waits for another thread's load. 0, or the load's error with the pin dropped. */
static int wait_loaded_locked(Shard *shard, Qcow2Table *t)
    QB_REQUIRES(shard->lock)
{
    int error;

    while (t->state == TABLE_LOADING) {
        qb_cond_wait(&shard->loaded, &shard->lock);
    }
    if (t->state == TABLE_READY) {
        return 0;
    }
    error = t->error;
    unpin_locked(t);
    return error;
}

/* A table must be aligned and begin inside the file; its last bytes may lie beyond the end. */
static int judge_offset(const Qcow2Cache *c, Qcow2TableKind kind, uint64_t offset)
{
    const char *name = kind == QCOW2_TABLE_L2 ? "L2 table" : "refcount block";
    int64_t length = bdrv_getlength(c->bs->file->bs);

    if (!qb_is_aligned(offset, c->table_bytes)) {
        return qcow2_signal_corruption(c->bs, true, (int64_t)offset,
                                       "Cannot get entry from %s cache: Offset %#" G_GINT64_MODIFIER
                                       "x is unaligned", name, offset);
    }
    if (length < 0) {
        return (int)length;
    }
    if (offset == 0 || offset >= (uint64_t)length) {
        return qcow2_signal_corruption(c->bs, true, (int64_t)offset, "%s at offset %#"
                                       G_GINT64_MODIFIER "x lies outside the image file", name,
                                       offset);
    }
    return 0;
}

static int read_table(Qcow2Table *t)
{
    const Qcow2Cache *c = t->cache;
    int ret = judge_offset(c, t->kind, t->offset);

    if (ret < 0) {
        return ret;
    }
    bdrv_debug_event(c->bs->file, t->kind == QCOW2_TABLE_L2 ? "l2_load" : "refblock_load");
    return bdrv_pread(c->bs->file, (int64_t)t->offset, (int64_t)c->table_bytes, t->data, 0);
}

static void finish_load(Qcow2Table *t, int ret)
{
    Shard *shard = t->shard;
    QB_GUARD(&shard->lock);
    t->state = ret < 0 ? TABLE_FAILED : TABLE_READY;
    t->error = ret;
    if (ret < 0 && !t->poisoned) {
        forget_locked(t);
    }
    qb_cond_broadcast(&shard->loaded);
}

/* Finds and pins, or enters a new LOADING table and says so. */
static Qcow2Table *find_or_enter_locked(Qcow2Cache *c, Shard *shard, Qcow2TableKind kind,
                                        uint64_t offset, bool *ret_new)
{
    Qcow2Table *t = g_hash_table_lookup(shard->tables, &offset);

    *ret_new = !t;
    if (!t) {
        t = table_alloc(c, kind, offset);
        if (!t) {
            return NULL;
        }
        t->state = TABLE_LOADING;
        g_hash_table_insert(shard->tables, &t->offset, t);
    }
    pin_locked(t);
    return t;
}

/* The image's L1 and its refcount table name the same cluster. */
static int refuse_other_kind(const Qcow2Cache *c, uint64_t offset)
{
    return qcow2_signal_corruption(c->bs, true, (int64_t)offset, "Cluster at offset %#"
                                   G_GINT64_MODIFIER "x is an L2 table and a refcount block",
                                   offset);
}

/* Pins the table that is there, once it is loaded, or a new one that the caller has to load. */
static int enter(Qcow2Cache *c, Qcow2TableKind kind, uint64_t offset, Qcow2Table **ret,
                 bool *ret_new)
{
    Shard *shard = shard_of(c, offset);
    bool other_kind;
    int err = 0;

    qb_mutex_lock(&shard->lock);
    *ret = find_or_enter_locked(c, shard, kind, offset, ret_new);
    other_kind = *ret && (*ret)->kind != kind;
    if (*ret_new) {
        trim_shard_locked(c, shard);
    } else if (other_kind) {
        unpin_locked(*ret);
    } else {
        err = wait_loaded_locked(shard, *ret);
    }
    qb_mutex_unlock(&shard->lock);
    if (other_kind) {
        return refuse_other_kind(c, offset);
    }
    return *ret ? err : -ENOMEM;
}

int qcow2_cache_get(Qcow2Cache *c, Qcow2TableKind kind, uint64_t offset, Qcow2Table **ret)
{
    Qcow2Table *t;
    bool is_new;
    int err = enter(c, kind, offset, &t, &is_new);

    if (err == 0 && is_new) {
        err = read_table(t);
        finish_load(t, err);
        if (err < 0) {
            qcow2_cache_put(t);
        }
    }
    if (err < 0) {
        return err;
    }
    *ret = t;
    return 0;
}

Qcow2Table *qcow2_cache_peek(Qcow2Cache *c, Qcow2TableKind kind, uint64_t offset)
{
    Shard *shard = shard_of(c, offset);
    QB_GUARD(&shard->lock);
    Qcow2Table *t = g_hash_table_lookup(shard->tables, &offset);

    if (!t || t->state != TABLE_READY || t->kind != kind) {
        return NULL;
    }
    pin_locked(t);
    return t;
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

Qcow2Table *qcow2_cache_add(Qcow2Cache *c, Qcow2TableKind kind, uint64_t offset, const void *init)
{
    Qcow2Table *t = table_alloc(c, kind, offset), *old;

    if (!t) {
        return NULL;
    }
    if (init) {
        memcpy(t->data, init, c->table_bytes);
    } else {
        memset(t->data, 0, c->table_bytes);
    }
    QB_GUARD(&t->shard->lock);
    old = g_hash_table_lookup(t->shard->tables, &offset);
    if (old) {
        forget_locked(old);
    }
    t->state = TABLE_READY;
    t->unlinked = true;
    g_hash_table_insert(t->shard->tables, &t->offset, t);
    pin_locked(t);
    set_dirty_locked(t, 0, c->table_bytes);
    trim_shard_locked(c, t->shard);
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
    unpin_locked(t);
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

    if (atomic_load(&c->bytes) == 0) {
        return;
    }
    if (end - start <= atomic_load(&c->bytes)) {
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

void qcow2_table_load(const Qcow2Table *t, size_t pos, size_t len, void *out)
{
    QB_GUARD(&t->shard->lock);

    assert(pos + len <= t->cache->table_bytes);
    memcpy(out, t->data + pos, len);
}

void qcow2_table_store(Qcow2Table *t, size_t pos, size_t len, const void *in)
{
    QB_GUARD(&t->shard->lock);

    assert(pos + len <= t->cache->table_bytes);
    lru_remove_locked(t);
    memcpy(t->data + pos, in, len);
    set_dirty_locked(t, pos, len);
}

uint8_t *qcow2_refblock_data(Qcow2Table *t)
{
    assert(t->kind == QCOW2_TABLE_REFBLOCK);
    qb_mutex_assert_held(&qcow2_state(t->cache->bs)->alloc_lock);
    return t->data;
}

void qcow2_table_mark_dirty(Qcow2Table *t, size_t pos, size_t len)
{
    QB_GUARD(&t->shard->lock);

    set_dirty_locked(t, pos, len);
}

/* ---- collecting what is dirty ---- */

static bool sector_dirty(const Qcow2Table *t, unsigned i)
{
    return t->dirty[i / 64] & (UINT64_C(1) << (i % 64));
}

static bool collect_run_locked(Qcow2Table *t, unsigned first, unsigned end, GArray *pieces)
{
    size_t sector = t->cache->sector, bytes = (end - first) * sector;
    Qcow2DirtyPiece piece = {.offset = t->offset + first * sector, .bytes = bytes, .table = t,
                             .unlinked = t->unlinked,
                             .data = qb_try_memalign(4096, MAX(bytes, 4096))};

    if (!piece.data) {
        return false;
    }
    memcpy(piece.data, t->data + first * sector, bytes);
    pin_locked(t);
    g_array_append_val(pieces, piece);
    return true;
}

static bool collect_table_locked(Qcow2Table *t, GArray *pieces)
{
    unsigned n = t->cache->nb_sectors;

    for (unsigned first = 0, end; first < n; first = end) {
        end = first + 1;
        if (!sector_dirty(t, first)) {
            continue;
        }
        while (end < n && sector_dirty(t, end)) {
            end++;
        }
        if (!collect_run_locked(t, first, end, pieces)) {
            return false;
        }
    }
    set_clean_locked(t);
    t->unlinked = false;
    return true;
}

static bool collect_shard(Shard *shard, Qcow2TableKind kind, GArray *pieces)
{
    QB_GUARD(&shard->lock);
    GList *next;

    for (GList *l = shard->dirty.head; l; l = next) {
        Qcow2Table *t = l->data;
        next = l->next;
        if (t->kind == kind && !collect_table_locked(t, pieces)) {
            return false;
        }
    }
    return true;
}

static gint compare_pieces(gconstpointer a, gconstpointer b)
{
    const Qcow2DirtyPiece *pa = a, *pb = b;

    return pa->offset < pb->offset ? -1 : pa->offset > pb->offset;
}

int qcow2_cache_collect_dirty(Qcow2Cache *c, Qcow2TableKind kind, GArray *pieces)
{
    for (int i = 0; i < NB_SHARDS; i++) {
        if (!collect_shard(&c->shards[i], kind, pieces)) {
            qcow2_cache_return_pieces(c, pieces, true, true);
            return -ENOMEM;
        }
    }
    g_array_sort(pieces, compare_pieces);
    return 0;
}

static void return_piece(Qcow2DirtyPiece *p, bool failed, bool relink)
{
    Qcow2Table *t = p->table;
    Shard *shard = t->shard; /* the last unpin may free the table */
    QB_GUARD(&shard->lock);

    if (failed) {
        set_dirty_locked(t, (size_t)(p->offset - t->offset), p->bytes);
        t->unlinked |= relink && p->unlinked;
    }
    unpin_locked(t);
}

void qcow2_cache_return_pieces(Qcow2Cache *c, GArray *pieces, bool failed, bool relink)
{
    for (guint i = 0; i < pieces->len; i++) {
        Qcow2DirtyPiece *p = &g_array_index(pieces, Qcow2DirtyPiece, i);
        if (p->table) {
            return_piece(p, failed, relink);
        }
        free(p->data);
    }
    g_array_set_size(pieces, 0);
}
