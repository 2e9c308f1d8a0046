/*
 * Free space: what no table refers to.
 *
 *     unknown --first allocation: walk over all tables--> used set
 *
 *     free --qed_alloc()--> taken --entry--> in use --entry gone--> quarantine
 *      ^                      |                                        |
 *      |------- undo ---------'                                        |
 *      '------------------------ flush, users left --------------------'
 *
 * QED images keep no record of free space, so the set is built from the tables, which are the only
 * authority.  Whatever lies behind the last cluster in use is free as well; taking it makes the
 * file longer.  Other programs that append behind the end of the file are right, too: to them free
 * clusters are leaks.
 *
 * Invariants
 *  1. A cluster is in the used set from its allocation to its release; the set never misses one
 *     that a stable entry names (QED 2).
 *  2. While the set is built nothing is allocated or released, so entries only disappear: those
 *     that the walk missed are in quarantine, and all of that is used.
 *  3. A freed run waits until a flush that collected the change of its entry has ended, and until
 *     all users that began before the change have left.
 *  4. Tables that name a cluster twice, or no possible one, make the image corrupt: it is not known
 *     what is free, so nothing is written any more (QED 5).
 *
 * One user that never leaves keeps all that is freed after it began.  Requests are finite, and the
 * list of users is as long as there are requests in flight.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qed.h"

#include <inttypes.h>

#define MAX_WAITING (UINT64_C(64) << 20) /* bytes in quarantine before a flush is made for them */

/* A freed run on its way. */
typedef struct QedFreed {
    uint64_t offset, bytes;
    uint64_t generation;
    uint64_t seq; /* users below it may still look at the run */
} QedFreed;

void qed_alloc_init(BDRVQedState *s)
{
    s->space.quarantine = g_array_new(false, false, sizeof(QedFreed));
    s->space.next_seq = 1;
}

void qed_alloc_free(BDRVQedState *s)
{
    assert(!s->space.first && !s->space.busy);
    g_clear_pointer(&s->space.used, qed_space_free);
    if (s->space.quarantine) {
        g_array_free(g_steal_pointer(&s->space.quarantine), true);
    }
}

/* ---------------------------------------------------------------- users */

void qed_user_begin(BDRVQedState *s, QedUser *u)
{
    QB_GUARD(&s->lock);
    *u = (QedUser){.seq = s->space.next_seq++, .prev = s->space.last};
    if (u->prev) {
        u->prev->next = u;
    } else {
        s->space.first = u;
    }
    s->space.last = u;
}

void qed_user_end(BDRVQedState *s, QedUser *u)
{
    QB_GUARD(&s->lock);
    if (u->prev) {
        u->prev->next = u->next;
    } else {
        s->space.first = u->next;
    }
    if (u->next) {
        u->next->prev = u->prev;
    } else {
        s->space.last = u->prev;
    }
    if (s->space.waiters) {
        qb_cond_broadcast(&s->changed);
    }
}

static bool users_below_locked(const BDRVQedState *s, uint64_t seq)
{
    return s->space.first && s->space.first->seq < seq;
}

void qed_wait_for_users(BDRVQedState *s)
{
    QB_GUARD(&s->lock);
    uint64_t seq = s->space.next_seq;
    s->space.waiters++;
    while (users_below_locked(s, seq)) {
        qb_cond_wait(&s->changed, &s->lock);
    }
    s->space.waiters--;
}

/* ---------------------------------------------------------------- building the set */

typedef struct Build {
    BDRVQedState *s;
    QedSpace *used;
} Build;

static int build_add(Build *b, uint64_t offset, uint64_t bytes)
{
    BDRVQedState *s = b->s;
    if (!qed_in_file(s, offset, bytes) ||
        qed_space_add(b->used, offset >> s->cluster_bits, bytes >> s->cluster_bits)) {
        return -EINVAL; /* invariant 4 */
    }
    return 0;
}

static int build_table(uint64_t l1_index, uint64_t entry, void *opaque)
{
    Build *b = opaque;
    int ret = build_add(b, entry, b->s->table_bytes);
    return ret < 0 ? ret : 1;
}

static int build_piece(const QedWalkPiece *piece, void *opaque)
{
    Build *b = opaque;
    int ret = piece->le ? 0 : piece->error;
    for (size_t i = 0; i < piece->n && ret == 0; i++) {
        uint64_t entry = GUINT64_FROM_LE(piece->le[i]);
        if (entry > QED_ENTRY_ZERO) {
            ret = build_add(b, entry, b->s->cluster_size);
        }
    }
    return ret;
}

static int build_l1_error(uint64_t l1_index, int error, void *opaque)
{
    return error;
}

/* The header, L1, and all that the tables name. */
static int build(BlockDriverState *bs, QedSpace *used)
{
    BDRVQedState *s = qed_state(bs);
    Build b = {s, used};
    QedWalker w = {build_table, build_piece, build_l1_error, &b};
    qed_space_add(used, 0, s->data_start >> s->cluster_bits);
    int ret = build_add(&b, s->l1_offset, s->table_bytes);
    return ret < 0 ? ret : qed_walk(bs, &w);
}

static void warn_corrupt(BDRVQedState *s)
{
    if (!atomic_exchange(&s->corrupt, true)) {
        bdrv_warn("qed: The tables of '%s' are inconsistent; it is not written to any more. Use"
                  " 'qemu-img check -r all' to repair it.", bdrv_filename(s->bs));
    }
}

static void add_quarantine_locked(BDRVQedState *s, QedSpace *used)
{
    for (guint i = 0; i < s->space.quarantine->len; i++) {
        const QedFreed *f = &g_array_index(s->space.quarantine, QedFreed, i);
        qed_space_add(used, f->offset >> s->cluster_bits, f->bytes >> s->cluster_bits);
    }
}

static void wait_until_idle_locked(BDRVQedState *s) QB_REQUIRES(s->lock)
{
    while (s->space.busy || (!s->space.used && s->space.releasing)) {
        qb_cond_wait(&s->changed, &s->lock);
    }
}

static void set_idle_locked(BDRVQedState *s, bool *flag) QB_REQUIRES(s->lock)
{
    *flag = false;
    qb_cond_broadcast(&s->changed);
}

/* Under the lock, which it lets go meanwhile; the set is there afterwards, and nobody is busy. */
static int need_set_locked(BDRVQedState *s) QB_REQUIRES(s->lock)
{
    wait_until_idle_locked(s);
    if (s->space.used) {
        return 0;
    }
    QedSpace *used = qed_space_new();
    s->space.busy = true;
    qb_mutex_unlock(&s->lock);
    int ret = build(s->bs, used);
    if (ret == -EINVAL) {
        warn_corrupt(s);
        ret = -EIO;
    }
    qb_mutex_lock(&s->lock);
    if (ret == 0) {
        add_quarantine_locked(s, used); /* invariant 2 */
        s->space.used = used;
    } else {
        qed_space_free(used);
    }
    set_idle_locked(s, &s->space.busy);
    return ret;
}

int qed_know_space(BlockDriverState *bs)
{
    BDRVQedState *s = qed_state(bs);
    QB_GUARD(&s->lock);
    return need_set_locked(s);
}

void qed_space_forget(BDRVQedState *s)
{
    QB_GUARD(&s->lock);
    wait_until_idle_locked(s);
    g_clear_pointer(&s->space.used, qed_space_free);
}

/* ---------------------------------------------------------------- allocation */

/* Holes are filled before the file grows, even where that tears a sequential write apart. */
static uint64_t choose_locked(const BDRVQedState *s, uint64_t want, uint64_t min, uint64_t *n)
{
    uint64_t first = want >> s->cluster_bits;
    bool inside = first && first < qed_space_end(s->space.used);
    uint64_t gap = inside ? qed_space_gap(s->space.used, first, *n) : 0;
    if (gap >= min) {
        *n = gap;
        return first;
    }
    return qed_space_find(s->space.used, min, *n, n);
}

int64_t qed_alloc(BlockDriverState *bs, uint64_t want, uint64_t min, uint64_t *n)
{
    BDRVQedState *s = qed_state(bs);
    bdrv_debug_event(bs->file, "cluster_alloc");
    QB_GUARD(&s->lock);
    int ret = need_set_locked(s);
    if (ret < 0) {
        return ret;
    }
    uint64_t first = choose_locked(s, want, min, n);
    if (first + *n > (uint64_t)INT64_MAX >> s->cluster_bits) {
        return -EFBIG;
    }
    qed_space_add(s->space.used, first, *n);
    return (int64_t)(first << s->cluster_bits);
}

void qed_alloc_undo(BlockDriverState *bs, uint64_t offset, uint64_t n)
{
    BDRVQedState *s = qed_state(bs);
    QB_GUARD(&s->lock);
    wait_until_idle_locked(s);
    if (s->space.used) {
        qed_space_remove(s->space.used, offset >> s->cluster_bits, n);
    }
}

/* ---------------------------------------------------------------- freeing */

void qed_free_locked(BDRVQedState *s, uint64_t offset, uint64_t bytes)
{
    QedFreed f = {offset, bytes, s->flush.generation, s->space.next_seq};
    qb_mutex_assert_held(&s->lock);
    assert(qb_is_aligned(offset | bytes, s->cluster_size) && bytes > 0);
    g_array_append_val(s->space.quarantine, f);
    s->space.waiting += bytes;
}

static bool may_release_locked(const BDRVQedState *s, const QedFreed *f, uint64_t gen)
{
    return f->generation <= gen && !users_below_locked(s, f->seq);
}

static int compare_freed(const void *a, const void *b)
{
    const QedFreed *x = a, *y = b;
    return (x->offset > y->offset) - (x->offset < y->offset);
}

/* Takes what may be released out of quarantine, sorted and merged. */
static GArray *take_released_locked(BDRVQedState *s, uint64_t gen)
{
    GArray *taken = g_array_new(false, false, sizeof(QedFreed));
    guint kept = 0;
    for (guint i = 0; i < s->space.quarantine->len; i++) {
        QedFreed f = g_array_index(s->space.quarantine, QedFreed, i);
        if (may_release_locked(s, &f, gen)) {
            g_array_append_val(taken, f);
            s->space.waiting -= f.bytes;
        } else {
            g_array_index(s->space.quarantine, QedFreed, kept++) = f;
        }
    }
    g_array_set_size(s->space.quarantine, kept);
    g_array_sort(taken, compare_freed);
    return taken;
}

static GArray *merge(const GArray *runs)
{
    GArray *merged = g_array_new(false, false, sizeof(QedFreed));
    for (guint i = 0; i < runs->len; i++) {
        QedFreed f = g_array_index(runs, QedFreed, i);
        QedFreed *last = merged->len ? &g_array_index(merged, QedFreed, merged->len - 1) : NULL;
        if (last && last->offset + last->bytes == f.offset) {
            last->bytes += f.bytes;
        } else {
            g_array_append_val(merged, f);
        }
    }
    return merged;
}

/* Advisory: that the storage keeps its blocks is no error. */
static void punch(BlockDriverState *bs, const GArray *runs)
{
    g_autoptr(GArray) ops = g_array_new(false, true, sizeof(BdrvBatchOp));
    for (guint i = 0; i < runs->len; i++) {
        const QedFreed *f = &g_array_index(runs, QedFreed, i);
        BdrvBatchOp op = {.kind = BDRV_BATCH_DISCARD, .offset = (int64_t)f->offset,
                          .bytes = (int64_t)f->bytes};
        g_array_append_val(ops, op);
    }
    if (ops->len) {
        (void)bdrv_run_batch(bs->file, (BdrvBatchOp *)ops->data, ops->len);
    }
}

/* Clusters stay in the set while they are punched.  Where there is no set yet it is not built
 * meanwhile, as it would miss them. */
void qed_release(BlockDriverState *bs, uint64_t gen)
{
    BDRVQedState *s = qed_state(bs);
    qb_mutex_lock(&s->lock);
    if (s->space.quarantine->len == 0 || s->space.busy) { /* the next flush will do */
        qb_mutex_unlock(&s->lock);
        return;
    }
    s->space.releasing = true;
    g_autoptr(GArray) taken = take_released_locked(s, gen);
    qb_mutex_unlock(&s->lock);
    g_autoptr(GArray) runs = merge(taken);
    punch(bs, runs);
    qb_mutex_lock(&s->lock);
    for (guint i = 0; s->space.used && i < runs->len; i++) {
        const QedFreed *f = &g_array_index(runs, QedFreed, i);
        qed_space_remove(s->space.used, f->offset >> s->cluster_bits, f->bytes >> s->cluster_bits);
    }
    s->space.freed |= runs->len > 0;
    set_idle_locked(s, &s->space.releasing);
    qb_mutex_unlock(&s->lock);
}

static uint64_t bytes_waiting(BDRVQedState *s)
{
    QB_GUARD(&s->lock);
    return s->space.waiting;
}

bool qed_freed_too_much(BDRVQedState *s)
{
    uint64_t part = atomic_load(&s->file_length) / 16;
    return bytes_waiting(s) > MIN(MAX_WAITING, MAX(part, s->table_bytes));
}

bool qed_reclaim(BlockDriverState *bs)
{
    uint64_t before = bytes_waiting(qed_state(bs));
    return before > 0 && qed_flush(bs) == 0 && bytes_waiting(qed_state(bs)) < before;
}

/* ---------------------------------------------------------------- the end of the file */

static int cut_to(BlockDriverState *bs, uint64_t end)
{
    BDRVQedState *s = qed_state(bs);
    g_autoptr(GError) err = NULL;
    int64_t length = bdrv_getlength(bs->file->bs);
    if (length < 0 || (uint64_t)length <= end || !bdrv_can_grow(bs->file->bs)) {
        return (int)MIN(length, 0);
    }
    atomic_store(&s->file_length, end);
    bool ok = bdrv_truncate(bs->file, (int64_t)end, false, PREALLOC_MODE_OFF, false, &err);
    return ok ? 0 : qb_error_to_errno(err);
}

int qed_cut_file(BlockDriverState *bs)
{
    BDRVQedState *s = qed_state(bs);
    qb_mutex_lock(&s->lock);
    int ret = need_set_locked(s);
    if (ret == 0) {
        uint64_t end = qed_space_end(s->space.used) << s->cluster_bits;
        s->space.busy = true;
        s->space.freed = false;
        qb_mutex_unlock(&s->lock);
        ret = cut_to(bs, end);
        qb_mutex_lock(&s->lock);
        set_idle_locked(s, &s->space.busy);
    }
    qb_mutex_unlock(&s->lock);
    return ret;
}
