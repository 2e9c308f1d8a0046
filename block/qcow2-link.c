/*
 * The mapping, changed: the one function through which guest requests alter L2 entries.
 *
 *   qcow2_link(old[], new[]):  for each L2 table touched
 *     make the table writable        no table: allocate one, and its space in the file
 *                                    shared with a snapshot: allocate a copy
 *     metadata lock {
 *        is it still the table in L1?   else: once more
 *        do its entries equal old[]?    else: QCOW2_STALE, nothing changed here
 *        store new[]
 *     }
 *     free what old[] referred to and new[] does not
 *
 * Invariants
 *  1. Allocation and cache misses happen outside the metadata lock; what they took time for is
 *     looked at again under it.
 *  2. Of the entries of one table all change or none.
 *  3. A host cluster is freed after the entry that named it has changed, never before (a free may
 *     let a flush run, and the flush would make the freed cluster's entry stable).
 *  4. An L1 entry with COPIED names a table that only the active L1 refers to.  Only such a table
 *     is stored to.
 *  5. Entries that do not change are not written, and where none of a table changes no table
 *     is made.
 *  6. A table has its space in the file before L1 names it, so that on a full file system the
 *     request fails that needs the table, and not each flush after it.
 *  7. That space is reserved with zeroes, and a table that begins empty is these.  They were written
 *     before L1 named it in memory; a flush that writes this L1 entry copied it later, and writes it
 *     behind a barrier issued later still: a stable L1 entry names stable zeroes (invariant 0 of the
 *     driver).  So entries of the table go with those of tables that are linked: after the barrier
 *     that makes stable what they refer to, and beside the L1 entry.  Which of the two a crash
 *     spares does not matter.
 *
 * Tables that a request clears as a whole are dropped at once (qcow2_drop_table()); those that
 * became all zero bit by bit, by the next flush (qcow2-prune.c).
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-io-int.h"

#define CHUNK_ENTRIES 128
#define CHUNK_BYTES (CHUNK_ENTRIES * 16)
#define FREED_AT_ONCE 128
#define DROP_BYTES 8192

/* --- a table that may be stored to --- */

static bool is_writable_entry(uint64_t l1_entry)
{
    return (l1_entry & QCOW2_ENTRY_OFFSET_MASK) && (l1_entry & QCOW2_ENTRY_COPIED);
}

/* A cluster for a table, zeroes in the file (invariants 6 and 7); offset or -errno. */
static int64_t alloc_table(BlockDriverState *bs)
{
    BDRVQcow2State *s = qcow2_state(bs);
    int64_t offset = qcow2_alloc_clusters(bs, s->cluster_size);
    if (offset < 0) {
        return offset;
    }
    if (offset == 0) {
        return qcow2_signal_corruption(bs, true, -1,
                                       "Preventing invalid allocation of L2 table at offset 0");
    }
    int ret = qcow2_reserve(bs, (uint64_t)offset, s->cluster_size);
    if (ret < 0) {
        qcow2_alloc_undo(bs, (uint64_t)offset, s->cluster_size);
        return ret;
    }
    return offset;
}

/* A table in memory with the content of @old; NULL: no memory. */
static Qcow2Table *copy_table_locked(BDRVQcow2State *s, const Qcow2Table *old, uint64_t offset)
    QB_REQUIRES(s->lock)
{
    g_autofree uint8_t *content = g_try_malloc(s->cluster_size);
    qb_mutex_assert_held(&s->lock);
    if (!content) {
        return NULL;
    }
    qcow2_table_load(old, 0, s->cluster_size, content);
    return qcow2_cache_add(s->cache, QCOW2_TABLE_L2, offset, content);
}

/* Puts a table at @offset, a copy of @old or the zeroes that are there, into L1, and pins it.
 * QCOW2_STALE: L1 has changed. */
static int install_table_locked(BDRVQcow2State *s, uint64_t l1_index, uint64_t l1_entry,
                                const Qcow2Table *old, uint64_t offset, Qcow2Table **ret)
    QB_REQUIRES(s->lock)
{
    qb_mutex_assert_held(&s->lock);
    if (qcow2_l1_get(s, l1_index) != l1_entry || (old && qcow2_table_poisoned(old))) {
        return QCOW2_STALE;
    }
    *ret = old ? copy_table_locked(s, old, offset) : qcow2_cache_add_zeroed(s->cache, offset);
    if (!*ret) {
        return -ENOMEM;
    }
    qcow2_l1_set_locked(s, l1_index, offset | QCOW2_ENTRY_COPIED);
    return 0;
}

/* Replaces the table @old that @l1_entry names (NULL: none) by one of our own, pinned. */
static int replace_table(BlockDriverState *bs, uint64_t l1_index, uint64_t l1_entry,
                         const Qcow2Table *old, Qcow2Table **ret_new)
{
    BDRVQcow2State *s = qcow2_state(bs);
    int64_t offset = alloc_table(bs);
    if (offset < 0) {
        return (int)offset;
    }
    if (old) {
        bdrv_debug_event(bs->file, "l2_alloc_cow_read");
    }
    bdrv_debug_event(bs->file, "l2_alloc_write");
    qb_mutex_lock(&s->lock);
    int ret = install_table_locked(s, l1_index, l1_entry, old, (uint64_t)offset, ret_new);
    qb_mutex_unlock(&s->lock);
    if (ret != 0) {
        qcow2_alloc_undo(bs, (uint64_t)offset, s->cluster_size);
    } else if (old) {
        qcow2_free_run(bs, qcow2_table_offset(old), s->cluster_size, QCOW2_DISCARD_OTHER);
    }
    return ret;
}

int qcow2_get_active_entries(BlockDriverState *bs, uint64_t l1_index, Qcow2EntryRange r,
                             uint64_t *ret_entry, Qcow2Table **ret)
{
    BDRVQcow2State *s = qcow2_state(bs);
    Qcow2User user;
    int err;
    *ret = NULL;
    qcow2_user_announce(s, &user);
    do {
        *ret_entry = qcow2_l1_get(s, l1_index);
        err = *ret_entry & QCOW2_ENTRY_OFFSET_MASK
                  ? qcow2_pin_entries(bs, l1_index, *ret_entry, r, ret)
                  : qcow2_l1_entry_judge(bs, *ret_entry, l1_index);
    } while (err == QCOW2_STALE);
    qcow2_user_leave(s, &user);
    return err;
}

int qcow2_get_active_table(BlockDriverState *bs, uint64_t l1_index, uint64_t *ret_entry,
                           Qcow2Table **ret)
{
    Qcow2EntryRange all = {0, qcow2_state(bs)->l2_entries};
    return qcow2_get_active_entries(bs, l1_index, all, ret_entry, ret);
}

/* Pins @r of a table at @l1_index that the active L1 alone refers to (invariant 4). What is to be
 * copied for that must be there as a whole. */
static int get_writable_table(BlockDriverState *bs, uint64_t l1_index, Qcow2EntryRange r,
                              Qcow2Table **ret)
{
    BDRVQcow2State *s = qcow2_state(bs);
    Qcow2EntryRange all = {0, s->l2_entries};
    g_autoptr(Qcow2Table) new = NULL; /* stays in memory until its entries are asked for */
    for (;;) {
        uint64_t l1_entry;
        g_autoptr(Qcow2Table) t = NULL;
        int err = qcow2_get_active_entries(bs, l1_index, r, &l1_entry, &t);
        if (err < 0) {
            return err;
        }
        if (is_writable_entry(l1_entry)) {
            *ret = g_steal_pointer(&t);
            return 0;
        }
        if (t && r.n < all.n) {
            r = all;
            continue;
        }
        if (l1_index >= qcow2_l1_size(s)) {
            return -EIO; /* nothing that is written lies there: L1 covers the disk */
        }
        g_clear_pointer(&new, qcow2_cache_put);
        err = replace_table(bs, l1_index, l1_entry, t, &new);
        if (err < 0) {
            return err;
        }
    }
}

static bool table_is_current_locked(BDRVQcow2State *s, const Qcow2Table *t, uint64_t l1_index)
    QB_REQUIRES(s->lock)
{
    qb_mutex_assert_held(&s->lock);
    uint64_t entry = qcow2_l1_get(s, l1_index); /* may have reserved bits set: check's business */
    return is_writable_entry(entry)
           && (entry & QCOW2_ENTRY_OFFSET_MASK) == qcow2_table_offset(t)
           && !qcow2_table_poisoned(t);
}

/* --- storing --- */

static bool entries_equal_old_locked(BDRVQcow2State *s, const Qcow2Table *t, unsigned index,
                                     const Qcow2L2Entry *old, size_t n) QB_REQUIRES(s->lock)
{
    uint8_t raw[CHUNK_BYTES];
    qb_mutex_assert_held(&s->lock);
    for (size_t done = 0; done < n;) {
        size_t part = MIN(n - done, CHUNK_ENTRIES);
        qcow2_table_load(t, (index + done) * s->l2_entry_size, part * s->l2_entry_size, raw);
        for (size_t i = 0; i < part; i++) {
            Qcow2L2Entry now = qcow2_entry_decode(s, raw + i * s->l2_entry_size);
            if (!qcow2_entry_equal(now, old[done + i])) {
                return false;
            }
        }
        done += part;
    }
    return true;
}

static void store_run_locked(BDRVQcow2State *s, Qcow2Table *t, unsigned index,
                             const Qcow2L2Entry *new, size_t n) QB_REQUIRES(s->lock)
{
    uint8_t raw[CHUNK_BYTES];
    qb_mutex_assert_held(&s->lock);
    for (size_t done = 0; done < n;) {
        size_t part = MIN(n - done, CHUNK_ENTRIES);
        for (size_t i = 0; i < part; i++) {
            qcow2_entry_encode(s, new[done + i], raw + i * s->l2_entry_size);
        }
        qcow2_table_store(t, (index + done) * s->l2_entry_size, part * s->l2_entry_size, raw);
        done += part;
    }
}

/* A change inside one table, with what is equal at both ends cut off. */
typedef struct Part {
    uint64_t l1_index;
    unsigned index;
    const Qcow2L2Entry *old, *new;
    size_t n;
} Part;

/* A run that became unallocated ends with an entry of 0: the table may be empty now. */
static void note_if_cleared_locked(BDRVQcow2State *s, const Part *p, size_t last)
    QB_REQUIRES(s->lock)
{
    if (qcow2_entry_equal(p->new[last], (Qcow2L2Entry){0})) {
        qcow2_note_cleared_locked(s, p->l1_index);
    }
}

static void store_part_locked(BDRVQcow2State *s, Qcow2Table *t, const Part *p)
    QB_REQUIRES(s->lock)
{
    size_t i = 0;
    while (i < p->n) {
        size_t first = i;
        while (i < p->n && !qcow2_entry_equal(p->old[i], p->new[i])) {
            i++;
        }
        if (i > first) {
            store_run_locked(s, t, p->index + (unsigned)first, p->new + first, i - first);
            note_if_cleared_locked(s, p, i - 1);
        }
        while (i < p->n && qcow2_entry_equal(p->old[i], p->new[i])) {
            i++;
        }
    }
}

static void trim_part(Part *p)
{
    while (p->n > 0 && qcow2_entry_equal(p->old[0], p->new[0])) {
        p->old++;
        p->new++;
        p->index++;
        p->n--;
    }
    while (p->n > 0 && qcow2_entry_equal(p->old[p->n - 1], p->new[p->n - 1])) {
        p->n--;
    }
}

/* 0, QCOW2_STALE: entries differ from old. *ret_retry: the table is not the one in L1 any more. */
static int store_checked(BDRVQcow2State *s, Qcow2Table *t, const Part *p, bool *ret_retry)
{
    QB_GUARD(&s->lock);
    *ret_retry = !table_is_current_locked(s, t, p->l1_index);
    if (*ret_retry) {
        return 0;
    }
    if (!entries_equal_old_locked(s, t, p->index, p->old, p->n)) {
        return QCOW2_STALE;
    }
    store_part_locked(s, t, p);
    return 0;
}

static const char *update_event(const Part *p)
{
    return qcow2_entry_is_compressed(p->new[0]) ? "l2_update_compressed" : "l2_update";
}

static int link_part(BlockDriverState *bs, Part p)
{
    BDRVQcow2State *s = qcow2_state(bs);
    bool retry = false;
    int ret;
    trim_part(&p);
    if (p.n == 0) {
        return 0; /* invariant 5 */
    }
    bdrv_debug_event(bs->file, update_event(&p));
    do {
        g_autoptr(Qcow2Table) t = NULL;
        ret = get_writable_table(bs, p.l1_index, (Qcow2EntryRange){p.index, p.n}, &t);
        if (ret == 0) {
            ret = store_checked(s, t, &p, &retry);
        }
    } while (ret == 0 && retry);
    return ret;
}

/* --- freeing --- */

/* What the entry refers to; no bytes: nothing. */
static Qcow2HostRun referred_run(const BDRVQcow2State *s, Qcow2L2Entry e)
{
    Qcow2HostRun run = {0};
    if (qcow2_entry_is_compressed(e)) {
        uint32_t bytes;
        qcow2_parse_compressed(s, e.entry, &run.offset, &bytes);
        run.bytes = bytes;
    } else if (qcow2_entry_has_host(s, e)) {
        run = (Qcow2HostRun){qcow2_entry_host(e), s->cluster_size};
    }
    return run;
}

/* Whole clusters that touch are put together; streams are not: several may be in one cluster. */
static bool continues(const BDRVQcow2State *s, const Qcow2HostRun *last, const Qcow2HostRun *run)
{
    return last->offset + last->bytes == run->offset &&
           qb_is_aligned(last->offset | last->bytes | run->bytes, s->cluster_size);
}

void qcow2_free_entries(BlockDriverState *bs, const Qcow2L2Entry *e, size_t n,
                        Qcow2DiscardType type)
{
    BDRVQcow2State *s = qcow2_state(bs);
    Qcow2HostRun runs[FREED_AT_ONCE];
    size_t len = 0;
    for (size_t i = 0; i < n && !s->has_data_file; i++) { /* whose clusters are not counted */
        Qcow2HostRun run = referred_run(s, e[i]);
        if (len && continues(s, &runs[len - 1], &run)) {
            runs[len - 1].bytes += run.bytes;
        } else if (run.bytes) {
            runs[len++] = run;
        }
        if (len == FREED_AT_ONCE) {
            qcow2_free_list(bs, runs, len, type);
            len = 0;
        }
    }
    if (len) {
        qcow2_free_list(bs, runs, len, type);
    }
}

/* Does @now keep the reference that @old has? */
static bool keeps_reference(const BDRVQcow2State *s, Qcow2L2Entry old, Qcow2L2Entry now)
{
    if (qcow2_entry_is_compressed(old)) {
        return qcow2_entry_is_compressed(now) && now.entry == old.entry;
    }
    return qcow2_entry_has_host(s, now) && qcow2_entry_host(now) == qcow2_entry_host(old);
}

static void free_lost(BlockDriverState *bs, const Qcow2Change *c, size_t first, size_t n)
{
    BDRVQcow2State *s = qcow2_state(bs);
    size_t i = first, end = first + n;
    while (i < end) {
        size_t from = i;
        while (i < end && !keeps_reference(s, c->old[i], c->new[i])) {
            i++;
        }
        qcow2_free_entries(bs, c->old + from, i - from, c->type);
        while (i < end && keeps_reference(s, c->old[i], c->new[i])) {
            i++;
        }
    }
}

int qcow2_link(BlockDriverState *bs, const Qcow2Change *c, size_t *ret_done)
{
    BDRVQcow2State *s = qcow2_state(bs);
    size_t done = 0;
    int ret = 0;
    assert(qcow2_offset_into_cluster(s, c->guest) == 0);
    while (done < c->n && ret == 0) {
        uint64_t guest = c->guest + ((uint64_t)done << s->cluster_bits);
        Part p = {
            .l1_index = qcow2_l1_index(s, guest),
            .index = qcow2_l2_index(s, guest),
            .old = c->old + done,
            .new = c->new + done,
            .n = MIN(c->n - done, s->l2_entries - qcow2_l2_index(s, guest)),
        };
        ret = link_part(bs, p);
        if (ret == 0) {
            free_lost(bs, c, done, p.n); /* invariant 3 */
            done += p.n;
        }
    }
    *ret_done = done;
    return ret;
}

/* --- whole tables --- */

/* Takes the table out of L1. QCOW2_STALE: it is no longer the one there. */
static int unhook_table(BDRVQcow2State *s, uint64_t l1_index, uint64_t l1_entry,
                        const Qcow2Table *t)
{
    QB_GUARD(&s->lock);
    if (qcow2_l1_get(s, l1_index) != l1_entry || qcow2_table_poisoned(t)) {
        return QCOW2_STALE;
    }
    qcow2_l1_set_locked(s, l1_index, 0);
    return 0;
}

/* A table that is out of L1, pinned: its content stays as it was. */
typedef struct Dropped {
    BlockDriverState *bs;
    BDRVQcow2State *s;
    Qcow2Table *table;
    uint64_t guest;
    Qcow2DiscardType type;
    Qcow2L2Entry e[FREED_AT_ONCE]; /* to be freed */
    size_t n;
} Dropped;

static void free_found(Dropped *d)
{
    qcow2_free_entries(d->bs, d->e, d->n, d->type);
    d->n = 0;
}

/* The first entry from @i on in the same 64 bytes, or in later ones that are not all zero. */
static unsigned skip_empty(const BDRVQcow2State *s, const uint8_t *raw, unsigned i, unsigned n)
{
    uint64_t words[8];
    unsigned entries = s->has_subclusters ? 4 : 8;
    for (; (i & (entries - 1)) == 0 && i < n; i += entries) {
        memcpy(words, raw + (size_t)i * s->l2_entry_size, sizeof(words));
        if (words[0] | words[1] | words[2] | words[3] | words[4] | words[5] | words[6] | words[7]) {
            break;
        }
    }
    return i;
}

/* Entries that are impossible keep what they may refer to: a leak, where freeing could take away
 * somebody else's cluster. The image is marked corrupt.  Most of a table may be empty: such entries
 * are not looked at any closer. */
static int free_piece(Dropped *d, unsigned first, const uint8_t *raw, unsigned n)
{
    const BDRVQcow2State *s = d->s;
    int ret = 0;
    for (unsigned i = 0; (i = skip_empty(s, raw, i, n)) < n; i++) {
        Qcow2L2Entry e = qcow2_entry_decode(s, raw + (size_t)i * s->l2_entry_size);
        if (qcow2_entry_equal(e, (Qcow2L2Entry){0})) {
            continue;
        }
        uint64_t guest = d->guest + ((uint64_t)(first + i) << s->cluster_bits);
        int err = qcow2_entry_judge(d->bs, e, guest, qcow2_table_offset(d->table), first + i);
        if (err < 0) {
            ret = err;
            continue;
        }
        d->e[d->n++] = e;
        if (d->n == FREED_AT_ONCE) {
            free_found(d);
        }
    }
    return ret;
}

static int free_table_content(Dropped *d)
{
    const BDRVQcow2State *s = d->s;
    uint8_t raw[DROP_BYTES];
    size_t bytes = MIN(sizeof(raw), s->cluster_size);
    int ret = 0;
    for (size_t pos = 0; pos < s->cluster_size; pos += bytes) {
        qcow2_table_load(d->table, pos, bytes, raw);
        int err = free_piece(d, (unsigned)(pos / s->l2_entry_size), raw,
                             (unsigned)(bytes / s->l2_entry_size));
        ret = err < 0 ? err : ret;
    }
    free_found(d);
    return ret;
}

int qcow2_drop_table(BlockDriverState *bs, uint64_t l1_index, Qcow2DiscardType type)
{
    BDRVQcow2State *s = qcow2_state(bs);
    g_autoptr(Qcow2Table) t = NULL;
    uint64_t l1_entry = 0;
    int ret;
    do {
        g_clear_pointer(&t, qcow2_cache_put);
        ret = qcow2_get_active_table(bs, l1_index, &l1_entry, &t);
        if ((l1_entry & QCOW2_ENTRY_OFFSET_MASK) == 0 || ret < 0) {
            return ret;
        }
        ret = unhook_table(s, l1_index, l1_entry, t);
    } while (ret == QCOW2_STALE);
    Dropped d = {.bs = bs, .s = s, .table = t, .type = type};
    d.guest = l1_index << (s->cluster_bits + s->l2_bits);
    ret = free_table_content(&d);
    qcow2_free_run(bs, l1_entry & QCOW2_ENTRY_OFFSET_MASK, s->cluster_size, type);
    return ret;
}

int qcow2_move_table(BlockDriverState *bs, uint64_t l1_index, uint64_t from, uint64_t to,
                     Qcow2DiscardType type)
{
    BDRVQcow2State *s = qcow2_state(bs);
    uint64_t l1_entry;
    g_autoptr(Qcow2Table) t = NULL, new = NULL;
    int ret = qcow2_get_active_table(bs, l1_index, &l1_entry, &t);
    if (ret < 0) {
        return ret;
    }
    if (!is_writable_entry(l1_entry) || (l1_entry & QCOW2_ENTRY_OFFSET_MASK) != from) {
        return QCOW2_STALE;
    }
    qb_mutex_lock(&s->lock);
    ret = install_table_locked(s, l1_index, l1_entry, t, to, &new);
    qb_mutex_unlock(&s->lock);
    if (ret == 0) {
        qcow2_free_run(bs, from, s->cluster_size, type);
    }
    return ret;
}

int qcow2_relieve(BlockDriverState *bs)
{
    BDRVQcow2State *s = qcow2_state(bs);
    bool due = qcow2_cache_too_dirty(s->cache) || qcow2_quarantine_full(s);
    return due ? qcow2_write_back(bs) : 0;
}
