/*
 * The active L1 table in memory.
 *
 *      struct Qcow2L1:  be[]  (big-endian, as on disk)   dirty: a flag per 512-byte sector
 *                       offset, size                     moved: the header does not name its place
 *
 * Invariants
 * 1. Readers take the rwlock shared for one entry; whoever changes an entry or the pointer holds
 *    the metadata lock and the rwlock exclusively.
 * 2. A table that grows gets new clusters and "moved"; the flush writes all of it before the header
 *    switches, in one sector write, after the barrier that made its L2 tables stable.  The old
 *    clusters go to quarantine, which keeps them until that flush is done.
 * 3. Entries set while a flush runs stay dirty for the next one.
 * 4. The overlap guard knows the table's place and every L2 table that be[] names.
 *
 * Deliberately not done: overwriting the active table as a whole in place (snapshot apply makes a
 * new table and calls qcow2_l1_replace() after its own header switch).
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2.h"

#include <stdlib.h>
#include <string.h>

#include "util/iov.h"

#define L1_SECTOR 512
#define L1_SECTOR_ENTRIES (L1_SECTOR / sizeof(uint64_t))

struct Qcow2L1 {
    QbRwLock lock;
    uint64_t *be; /* padded with zeroes to whole sectors */
    uint32_t size;
    uint64_t offset;
    uint8_t *dirty;
    bool moved;
};

static size_t nb_sectors(uint32_t size)
{
    return (size + L1_SECTOR_ENTRIES - 1) / L1_SECTOR_ENTRIES;
}

static uint64_t *padded_copy(const uint64_t *be, uint32_t old_size, uint32_t size)
{
    uint64_t *copy = g_try_malloc0_n(MAX(nb_sectors(size), 1), L1_SECTOR);

    if (copy && old_size) {
        memcpy(copy, be, MIN(old_size, size) * sizeof(uint64_t));
    }
    return copy;
}

static struct Qcow2L1 *make(uint64_t *be_entries, uint32_t size, uint64_t offset)
{
    struct Qcow2L1 *l1 = g_new0(struct Qcow2L1, 1);

    qb_rwlock_init(&l1->lock);
    l1->be = g_malloc0_n(MAX(nb_sectors(size), 1), L1_SECTOR);
    if (size) {
        memcpy(l1->be, be_entries, size * sizeof(uint64_t));
    }
    g_free(be_entries);
    l1->size = size;
    l1->offset = offset;
    l1->dirty = g_malloc0(nb_sectors(size) + 1);
    return l1;
}

static void guard_place(BDRVQcow2State *s, const struct Qcow2L1 *l1)
{
    const Qcow2HostRun run = {l1->offset, (uint64_t)l1->size * sizeof(uint64_t)};

    qcow2_guard_set(s, QCOW2_OL_ACTIVE_L1, &run, 1);
}

static void guard_all(BDRVQcow2State *s, const struct Qcow2L1 *l1)
{
    guard_place(s, l1);
    qcow2_guard_forget_tables(s, QCOW2_OL_ACTIVE_L2);
    qcow2_guard_l1(s, QCOW2_OL_ACTIVE_L2, l1->be, l1->size);
}

struct Qcow2L1 *qcow2_l1_new(BDRVQcow2State *s, uint64_t *be_entries, uint32_t size,
                             uint64_t offset)
{
    struct Qcow2L1 *l1 = make(be_entries, size, offset);

    guard_all(s, l1);
    return l1;
}

void qcow2_l1_free(struct Qcow2L1 *l1)
{
    if (l1) {
        qb_rwlock_destroy(&l1->lock);
        g_free(l1->be);
        g_free(l1->dirty);
        g_free(l1);
    }
}

uint64_t qcow2_l1_get(const BDRVQcow2State *s, uint64_t index)
{
    struct Qcow2L1 *l1 = s->l1;
    uint64_t entry;

    qb_rwlock_rdlock(&l1->lock);
    entry = index < l1->size ? be64toh(l1->be[index]) : 0;
    qb_rwlock_rdunlock(&l1->lock);
    return entry;
}

uint32_t qcow2_l1_size(const BDRVQcow2State *s)
{
    struct Qcow2L1 *l1 = s->l1;
    uint32_t size;

    qb_rwlock_rdlock(&l1->lock);
    size = l1->size;
    qb_rwlock_rdunlock(&l1->lock);
    return size;
}

uint64_t qcow2_l1_table_offset(const BDRVQcow2State *s)
{
    struct Qcow2L1 *l1 = s->l1;
    uint64_t offset;

    qb_rwlock_rdlock(&l1->lock);
    offset = l1->offset;
    qb_rwlock_rdunlock(&l1->lock);
    return offset;
}

void qcow2_l1_set_locked(BDRVQcow2State *s, uint64_t index, uint64_t entry)
{
    struct Qcow2L1 *l1 = s->l1;

    qb_mutex_assert_held(&s->lock);
    qb_rwlock_wrlock(&l1->lock);
    assert(index < l1->size);
    qcow2_guard_table(s, QCOW2_OL_ACTIVE_L2, be64toh(l1->be[index]) & QCOW2_ENTRY_OFFSET_MASK,
                      false);
    qcow2_guard_table(s, QCOW2_OL_ACTIVE_L2, entry & QCOW2_ENTRY_OFFSET_MASK, true);
    l1->be[index] = htobe64(entry);
    l1->dirty[index / L1_SECTOR_ENTRIES] = 1;
    qb_rwlock_wrunlock(&l1->lock);
}

uint64_t *qcow2_l1_dup_be(const BDRVQcow2State *s, uint32_t *ret_size)
{
    struct Qcow2L1 *l1 = s->l1;
    uint64_t *copy;

    qb_rwlock_rdlock(&l1->lock);
    copy = g_memdup2(l1->be, MAX(nb_sectors(l1->size), 1) * L1_SECTOR);
    *ret_size = l1->size;
    qb_rwlock_rdunlock(&l1->lock);
    return copy;
}

/* ---- growing ---- */

/* False: someone else has made it large enough meanwhile. */
static bool switch_locked(BDRVQcow2State *s, uint64_t *be, uint32_t size, uint64_t offset)
{
    struct Qcow2L1 *l1 = s->l1;
    uint64_t *old_be = l1->be, old_offset = l1->offset;
    uint64_t old_bytes = qb_align_up((uint64_t)l1->size * sizeof(uint64_t), s->cluster_size);

    qb_mutex_assert_held(&s->lock);
    if (l1->size >= size) {
        return false;
    }
    qb_rwlock_wrlock(&l1->lock);
    memcpy(be, l1->be, l1->size * sizeof(uint64_t));
    g_free(l1->dirty);
    l1->dirty = g_malloc0(nb_sectors(size) + 1);
    l1->be = be;
    l1->size = size;
    l1->offset = offset;
    l1->moved = true;
    guard_place(s, l1);
    qb_rwlock_wrunlock(&l1->lock);
    g_free(old_be);
    if (old_bytes) {
        qcow2_free_run(s->bs, old_offset, old_bytes, QCOW2_DISCARD_OTHER);
    }
    return true;
}

/* Clusters for a new table, which are nobody's, not even the present one's; offset or -errno. */
static int64_t alloc_place(BlockDriverState *bs, uint64_t bytes)
{
    int64_t offset = qcow2_alloc_clusters(bs, bytes);
    int ret = offset < 0 ? (int)offset
                         : qcow2_check_overlap(bs, QCOW2_OL_NONE, (uint64_t)offset, bytes);

    if (ret < 0 && offset >= 0) {
        qcow2_alloc_undo(bs, (uint64_t)offset, bytes);
    }
    return ret < 0 ? ret : offset;
}

int qcow2_l1_grow(BlockDriverState *bs, uint64_t size, bool exact)
{
    BDRVQcow2State *s = qcow2_state(bs);
    const uint64_t max = QCOW2_MAX_L1_BYTES / sizeof(uint64_t);
    uint64_t old_size = qcow2_l1_size(s), bytes;
    uint64_t *be;
    int64_t offset;
    bool switched;

    if (size <= old_size) {
        return 0;
    }
    if (size > max) {
        return -EFBIG;
    }
    if (!exact) {
        size = MIN(MAX(size, old_size + old_size / 2), max);
    }
    be = padded_copy(NULL, 0, (uint32_t)size);
    if (!be) {
        return -ENOMEM;
    }
    bdrv_debug_event(bs->file, "l1_grow_alloc_table");
    bytes = qb_align_up(size * sizeof(uint64_t), s->cluster_size);
    offset = alloc_place(bs, bytes);
    if (offset < 0) {
        g_free(be);
        return (int)offset;
    }
    qb_mutex_lock(&s->lock);
    switched = switch_locked(s, be, (uint32_t)size, (uint64_t)offset);
    qb_mutex_unlock(&s->lock);
    if (!switched) {
        g_free(be);
        qcow2_alloc_undo(bs, (uint64_t)offset, bytes);
    }
    return 0;
}

void qcow2_l1_move(BlockDriverState *bs, uint64_t offset, Qcow2DiscardType type)
{
    BDRVQcow2State *s = qcow2_state(bs);
    struct Qcow2L1 *l1 = s->l1;
    QB_GUARD(&s->lock);
    uint64_t old = l1->offset;

    qb_rwlock_wrlock(&l1->lock);
    l1->offset = offset;
    l1->moved = true;
    guard_place(s, l1);
    qb_rwlock_wrunlock(&l1->lock);
    qcow2_free_run(bs, old, qb_align_up((uint64_t)l1->size * sizeof(uint64_t), s->cluster_size),
                   type);
}

void qcow2_l1_replace(BDRVQcow2State *s, uint64_t *be_entries, uint32_t size, uint64_t offset)
{
    struct Qcow2L1 *fresh = make(be_entries, size, offset);
    struct Qcow2L1 *l1 = s->l1;

    QB_GUARD(&s->lock);
    qb_rwlock_wrlock(&l1->lock);
    g_free(l1->be);
    g_free(l1->dirty);
    l1->be = g_steal_pointer(&fresh->be);
    l1->dirty = g_steal_pointer(&fresh->dirty);
    l1->size = size;
    l1->offset = offset;
    l1->moved = false;
    guard_all(s, l1);
    qb_rwlock_wrunlock(&l1->lock);
    qcow2_l1_free(fresh);
}

void qcow2_l1_shorten(BDRVQcow2State *s, uint32_t size)
{
    struct Qcow2L1 *l1 = s->l1;
    QB_GUARD(&s->lock);

    qb_rwlock_wrlock(&l1->lock);
    for (uint32_t i = size; i < l1->size; i++) {
        qcow2_guard_table(s, QCOW2_OL_ACTIVE_L2, be64toh(l1->be[i]) & QCOW2_ENTRY_OFFSET_MASK,
                          false);
        l1->be[i] = 0; /* the last sector is written as a whole */
    }
    l1->size = MIN(l1->size, size);
    guard_place(s, l1);
    qb_rwlock_wrunlock(&l1->lock);
}

/* ---- flushing ---- */

static bool append_piece(const struct Qcow2L1 *l1, size_t first, size_t end, GArray *pieces)
{
    Qcow2DirtyPiece piece = {.offset = l1->offset + first * L1_SECTOR,
                             .bytes = (end - first) * L1_SECTOR,
                             .data = qb_try_memalign(4096, MAX((end - first) * L1_SECTOR, 4096))};

    if (!piece.data) {
        return false;
    }
    memcpy(piece.data, (uint8_t *)l1->be + first * L1_SECTOR, piece.bytes);
    g_array_append_val(pieces, piece);
    return true;
}

static void free_pieces(GArray *pieces)
{
    for (guint i = 0; i < pieces->len; i++) {
        free(g_array_index(pieces, Qcow2DirtyPiece, i).data);
    }
    g_array_set_size(pieces, 0);
}

int qcow2_l1_collect_locked(BDRVQcow2State *s, GArray *pieces, Qcow2L1Copy *ret)
{
    struct Qcow2L1 *l1 = s->l1;
    size_t n = nb_sectors(l1->size);

    qb_mutex_assert_held(&s->lock);
    *ret = (Qcow2L1Copy){.moved = l1->moved, .offset = l1->offset, .size = l1->size};
    for (size_t first = 0, end; first < n; first = end) {
        end = first + 1;
        if (!l1->moved && !l1->dirty[first]) {
            continue;
        }
        while (end < n && (l1->moved || l1->dirty[end])) {
            end++;
        }
        if (!append_piece(l1, first, end, pieces)) {
            free_pieces(pieces);
            return -ENOMEM;
        }
    }
    memset(l1->dirty, 0, n);
    return 0;
}

void qcow2_l1_done(BDRVQcow2State *s, const GArray *pieces, const Qcow2L1Copy *copy, bool failed)
{
    struct Qcow2L1 *l1 = s->l1;

    QB_GUARD(&s->lock);
    if (l1->offset != copy->offset) {
        return; /* moved again meanwhile: all of it will be written */
    }
    if (!failed) {
        l1->moved = false;
        return;
    }
    for (guint i = 0; i < pieces->len; i++) {
        const Qcow2DirtyPiece *p = &g_array_index(pieces, Qcow2DirtyPiece, i);
        memset(l1->dirty + (p->offset - l1->offset) / L1_SECTOR, 1, p->bytes / L1_SECTOR);
    }
}

bool qcow2_l1_is_clean(const BDRVQcow2State *s)
{
    BDRVQcow2State *state = (BDRVQcow2State *)s;
    QB_GUARD(&state->lock);

    return !s->l1->moved && !memchr(s->l1->dirty, 1, nb_sectors(s->l1->size));
}
