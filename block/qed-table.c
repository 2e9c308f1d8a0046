/*
 * Guest offset -> table entry, and the one function that changes entries.
 *
 *     guest -> L1 page -> entry -> L2 page -> entries     both pages pinned: a Path
 *
 * A path is read without the lock (pages may have to be loaded), so it is checked once more when
 * the lock is held: it still holds when neither page is gone and the L1 entry still names that
 * table.
 *
 * Invariants
 *  1. Entries are read and changed under the lock, on a path that holds.
 *  2. A table is zero on the disk before L1 names it in memory: the flush that writes the L1 entry
 *     begins with a barrier (QED 1), and entries of the table follow after that barrier as well.
 *  3. What an entry referred to is given to qed_free_locked() under the same hold of the lock in
 *     which the entry changes, so both are in one generation (QED 2).
 *  4. An entry that points to where no cluster can be is refused, whatever is asked for.
 *
 * Not done: a table whose entries became 0 one by one stays; it is freed when a range that contains
 * all it maps is dropped.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qed.h"

typedef struct Path {
    QedPage *l1, *l2;  /* pinned; l2 is NULL when L1 names no table */
    uint64_t table;    /* the L1 entry as it was read */
    unsigned l1_pos, l2_pos; /* entries in the pages */
} Path;

static void path_clear(Path *p)
{
    qed_page_put(p->l1);
    qed_page_put(p->l2);
    *p = (Path){0};
}

#define PATH_AUTO __attribute__((cleanup(path_clear))) Path

/* ---------------------------------------------------------------- judging */

bool qed_in_file(BDRVQedState *s, uint64_t offset, uint64_t bytes)
{
    uint64_t end;
    if (!qb_is_aligned(offset, s->cluster_size) || offset < s->data_start ||
        qb_add_overflow(offset, bytes, &end) || end > INT64_MAX) {
        return false;
    }
    if (end <= atomic_load(&s->file_length)) {
        return true;
    }
    int64_t length = bdrv_getlength(s->bs->file->bs);
    if (length > 0) {
        atomic_store(&s->file_length, (uint64_t)length);
    }
    return length > 0 && end <= (uint64_t)length;
}

/* ---------------------------------------------------------------- paths */

static unsigned page_pos(const BDRVQedState *s, uint64_t index)
{
    return index & ((UINT64_C(1) << s->page_bits) - 1);
}

/* Pins the page of entry @index of the table at @table. */
static int get_page(BDRVQedState *s, uint64_t table, uint64_t index, QedPage **ret)
{
    uint64_t first = index - page_pos(s, index);
    return qed_page_get(s, table + first * QED_ENTRY_BYTES, ret);
}

static uint64_t read_entry(BDRVQedState *s, const QedPage *page, unsigned pos)
{
    QB_GUARD(&s->lock);
    return qed_page_entry_locked(page, pos);
}

static int path_load_l2(BDRVQedState *s, uint64_t guest, Path *p)
{
    uint64_t l2_index = qed_l2_index(s, guest);
    p->table = read_entry(s, p->l1, p->l1_pos);
    p->l2_pos = page_pos(s, l2_index);
    if (!p->table) {
        return 0;
    }
    if (!qed_in_file(s, p->table, s->table_bytes)) {
        return -EINVAL; /* invariant 4 */
    }
    return get_page(s, p->table, l2_index, &p->l2);
}

/* What @p held before is let go. */
static int path_load(BDRVQedState *s, uint64_t guest, Path *p)
{
    uint64_t l1_index = qed_l1_index(s, guest);
    path_clear(p);
    assert(l1_index >> s->table_bits == 0);
    p->l1_pos = page_pos(s, l1_index);
    int ret = get_page(s, s->l1_offset, l1_index, &p->l1);
    return ret < 0 ? ret : path_load_l2(s, guest, p);
}

static bool path_holds_locked(const Path *p)
{
    return !qed_page_gone_locked(p->l1) && qed_page_entry_locked(p->l1, p->l1_pos) == p->table &&
           (!p->l2 || !qed_page_gone_locked(p->l2));
}

/* ---------------------------------------------------------------- reading */

static QedType type_of(uint64_t entry)
{
    return entry == QED_ENTRY_NONE ? QED_UNALLOCATED : entry == QED_ENTRY_ZERO ? QED_ZERO
                                                                               : QED_DATA;
}

/* Entries of @page from @pos on, at most @max, that continue the first one. */
static uint64_t run_locked(const BDRVQedState *s, const QedPage *page, unsigned pos, uint64_t max)
{
    uint64_t first = qed_page_entry_locked(page, pos);
    uint64_t step = type_of(first) == QED_DATA ? s->cluster_size : 0;
    uint64_t n = 1;
    max = MIN(max, (UINT64_C(1) << s->page_bits) - pos);
    while (n < max && qed_page_entry_locked(page, pos + (unsigned)n) == first + n * step) {
        n++;
    }
    return n;
}

/* What the path says of [guest, +bytes), as far as one page goes. */
static void map_locked(const BDRVQedState *s, const Path *p, uint64_t guest, uint64_t bytes,
                       QedMapping *m)
{
    const QedPage *page = p->l2 ? p->l2 : p->l1;
    unsigned pos = p->l2 ? p->l2_pos : p->l1_pos;
    unsigned span_bits = s->cluster_bits + (p->l2 ? 0 : s->table_bits); /* of an entry */
    uint64_t into = guest & ((UINT64_C(1) << span_bits) - 1);
    uint64_t wanted = ((into + bytes - 1) >> span_bits) + 1;
    uint64_t n = run_locked(s, page, pos, wanted);
    uint64_t entry = p->l2 ? qed_page_entry_locked(page, pos) : QED_ENTRY_NONE;
    *m = (QedMapping){
        .type = type_of(entry),
        .guest = guest,
        .bytes = n == wanted ? bytes : MIN(bytes, (n << span_bits) - into),
    };
    m->host = m->type == QED_DATA ? entry + into : 0;
}

static int judge(BDRVQedState *s, QedMapping *m)
{
    uint64_t into = m->guest & (s->cluster_size - 1);
    if (m->type != QED_DATA || qed_in_file(s, m->host - into, qed_round_up(s, into + m->bytes))) {
        return 0;
    }
    /* Of a run that leaves the file the first cluster may still be good. */
    m->bytes = MIN(m->bytes, s->cluster_size - into);
    return qed_in_file(s, m->host - into, s->cluster_size) ? 0 : -EINVAL;
}

static int map_page(BDRVQedState *s, uint64_t guest, uint64_t bytes, QedMapping *m)
{
    PATH_AUTO p = {0};
    bool holds = false;
    while (!holds) {
        int ret = path_load(s, guest, &p);
        if (ret < 0) {
            return ret;
        }
        QB_GUARD(&s->lock);
        holds = path_holds_locked(&p);
        if (holds) {
            map_locked(s, &p, guest, bytes, m);
        }
    }
    return judge(s, m);
}

static bool mapping_extend(QedMapping *m, const QedMapping *next)
{
    if (next->type != m->type ||
        (m->type == QED_DATA && next->host != m->host + m->bytes)) {
        return false;
    }
    m->bytes += next->bytes;
    return true;
}

int qed_lookup(BlockDriverState *bs, uint64_t guest, uint64_t bytes, QedMapping *ret)
{
    BDRVQedState *s = qed_state(bs);
    QedMapping next;
    int error = map_page(s, guest, bytes, ret);
    if (error < 0) {
        return error;
    }
    while (ret->bytes < bytes) {
        if (map_page(s, guest + ret->bytes, bytes - ret->bytes, &next) < 0 ||
            !mapping_extend(ret, &next)) {
            break; /* whoever looks there meets the error */
        }
    }
    return 0;
}

int qed_lookup_as_user(BlockDriverState *bs, uint64_t guest, uint64_t bytes, QedMapping *ret)
{
    QedUser user;
    qed_user_begin(qed_state(bs), &user);
    int error = qed_lookup(bs, guest, bytes, ret);
    qed_user_end(qed_state(bs), &user);
    return error;
}

int64_t qed_unmapped_by_l1(BlockDriverState *bs, uint64_t guest, uint64_t bytes)
{
    BDRVQedState *s = qed_state(bs);
    unsigned span_bits = s->cluster_bits + s->table_bits;
    uint64_t done = 0;
    while (done < bytes) {
        g_autoptr(QedPage) page = NULL;
        uint64_t index = qed_l1_index(s, guest + done);
        int ret = get_page(s, s->l1_offset, index, &page);
        if (ret < 0) {
            return ret;
        }
        QB_GUARD(&s->lock);
        unsigned pos = page_pos(s, index);
        if (qed_page_entry_locked(page, pos)) {
            break;
        }
        uint64_t n = run_locked(s, page, pos, qed_l1_index(s, guest + bytes - 1) - index + 1);
        done = MIN(bytes, ((index + n) << span_bits) - guest);
    }
    return (int64_t)done;
}

/* ---------------------------------------------------------------- tables */

/* A zeroed table in new clusters, which nothing names. */
static int64_t new_table(BlockDriverState *bs)
{
    BDRVQedState *s = qed_state(bs);
    uint64_t n = s->table_bytes >> s->cluster_bits, want = n;
    int64_t offset = qed_alloc(bs, 0, want, &n);
    if (offset < 0) {
        return offset;
    }
    bdrv_debug_event(bs->file, "l2_alloc_write");
    int ret = bdrv_pwrite_zeroes(bs->file, offset, (int64_t)s->table_bytes, 0);
    if (ret < 0) {
        qed_alloc_undo(bs, (uint64_t)offset, n);
        return ret;
    }
    /* What was read here before it was freed is not what it is now. */
    QB_GUARD(&s->lock);
    qed_pages_drop_locked(s, (uint64_t)offset, s->table_bytes);
    return offset;
}

/* Somebody else may make the same table for another part of it: the first one stays. */
static int ensure_table(BlockDriverState *bs, uint64_t guest)
{
    BDRVQedState *s = qed_state(bs);
    g_autoptr(QedPage) page = NULL;
    uint64_t index = qed_l1_index(s, guest);
    int64_t offset = new_table(bs);
    if (offset < 0) {
        return (int)offset;
    }
    int ret = get_page(s, s->l1_offset, index, &page);
    if (ret == 0) {
        QB_GUARD(&s->lock);
        if (qed_page_entry_locked(page, page_pos(s, index)) == 0) {
            qed_page_set_locked(page, page_pos(s, index), (uint64_t)offset);
            return 0;
        }
    }
    qed_alloc_undo(bs, (uint64_t)offset, s->table_bytes >> s->cluster_bits);
    return ret;
}

int qed_need_table(BlockDriverState *bs, uint64_t guest)
{
    BDRVQedState *s = qed_state(bs);
    g_autoptr(QedPage) page = NULL;
    uint64_t index = qed_l1_index(s, guest);
    int ret = get_page(s, s->l1_offset, index, &page);
    if (ret == 0 && !read_entry(s, page, page_pos(s, index))) {
        ret = ensure_table(bs, guest);
    }
    return ret;
}

int qed_drop_table(BlockDriverState *bs, uint64_t l1_index)
{
    BDRVQedState *s = qed_state(bs);
    g_autoptr(QedPage) page = NULL;
    int ret = get_page(s, s->l1_offset, l1_index, &page);
    if (ret < 0) {
        return ret;
    }
    QB_GUARD(&s->lock);
    uint64_t table = qed_page_entry_locked(page, page_pos(s, l1_index));
    if (table) {
        qed_page_set_locked(page, page_pos(s, l1_index), QED_ENTRY_NONE);
        qed_pages_drop_locked(s, table, s->table_bytes);
        qed_free_locked(s, table, s->table_bytes);
    }
    return 0;
}

/* ---------------------------------------------------------------- changing entries */

typedef struct Change {
    uint64_t n, first, step;
} Change;

/* The host run of entries [i, ret) of the path's page, which are data. */
static uint64_t data_run_end_locked(const BDRVQedState *s, const Path *p, uint64_t i, uint64_t n)
{
    return i + run_locked(s, p->l2, p->l2_pos + (unsigned)i, n - i);
}

/* All data entries must be such as can be freed. Does not ask for the length of the file. */
static bool can_free_locked(BDRVQedState *s, const Path *p, uint64_t n)
{
    for (uint64_t i = 0; i < n;) {
        uint64_t entry = qed_page_entry_locked(p->l2, p->l2_pos + (unsigned)i);
        uint64_t end = data_run_end_locked(s, p, i, n), bytes = (end - i) << s->cluster_bits;
        if (type_of(entry) == QED_DATA &&
            (!qb_is_aligned(entry, s->cluster_size) || entry < s->data_start ||
             entry > INT64_MAX - bytes)) {
            return false;
        }
        i = end;
    }
    return true;
}

static void free_data_locked(BDRVQedState *s, const Path *p, uint64_t n)
{
    for (uint64_t i = 0; i < n;) {
        uint64_t entry = qed_page_entry_locked(p->l2, p->l2_pos + (unsigned)i);
        uint64_t end = data_run_end_locked(s, p, i, n);
        if (type_of(entry) == QED_DATA) {
            qed_free_locked(s, entry, (end - i) << s->cluster_bits);
        }
        i = end;
    }
}

static void store_locked(const Path *p, const Change *c)
{
    for (uint64_t i = 0; i < c->n; i++) {
        unsigned pos = p->l2_pos + (unsigned)i;
        uint64_t entry = c->first + i * c->step;
        if (qed_page_entry_locked(p->l2, pos) != entry) {
            qed_page_set_locked(p->l2, pos, entry);
        }
    }
}

/* 1: done; 0: look again; or -errno. */
static int change_once(BlockDriverState *bs, uint64_t guest, const Change *c)
{
    BDRVQedState *s = qed_state(bs);
    PATH_AUTO p = {0};
    int ret = path_load(s, guest, &p);
    if (ret < 0) {
        return ret;
    }
    if (!p.l2) {
        ret = c->first == QED_ENTRY_NONE ? 1 : ensure_table(bs, guest);
        return ret;
    }
    QB_GUARD(&s->lock);
    if (!path_holds_locked(&p)) {
        return 0;
    }
    if (!can_free_locked(s, &p, c->n)) {
        return -EINVAL;
    }
    free_data_locked(s, &p, c->n);
    store_locked(&p, c);
    return 1;
}

int qed_change(BlockDriverState *bs, uint64_t guest, uint64_t n, uint64_t first, uint64_t step)
{
    const BDRVQedState *s = qed_state(bs);
    Change c = {n, first, step};
    int ret = qed_know_space(bs); /* nothing is freed that a second entry may name */
    assert(n > 0 && qb_is_aligned(guest, s->cluster_size));
    assert(n << s->cluster_bits <= qed_to_page_end(s, guest));
    bdrv_debug_event(bs->file, "l2_update");
    while (ret == 0) {
        ret = change_once(bs, guest, &c);
    }
    return MIN(ret, 0);
}

int qed_clear_entry(BlockDriverState *bs, uint64_t table, uint64_t index)
{
    BDRVQedState *s = qed_state(bs);
    g_autoptr(QedPage) page = NULL;
    int ret = get_page(s, table, index, &page);
    if (ret == 0) {
        QB_GUARD(&s->lock);
        qed_page_set_locked(page, page_pos(s, index), QED_ENTRY_NONE);
    }
    return ret;
}
