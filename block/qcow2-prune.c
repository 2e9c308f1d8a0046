/*
 * L2 tables that became empty: taken out of L1 by the next flush, and freed.
 *
 *      link stores an entry of 0 --> s->cleared: {index in L1, ...}
 *                                        |
 *      flush, before it copies:          `--> table all zero and ours alone?  L1 entry 0, free it
 *
 * Invariants
 *  1. The look at the table, the change of L1 and the poisoning happen under one hold of the
 *     metadata lock, and so does every store: one that has the table pinned finds it no longer
 *     current and begins again, so that none is lost.  Readers that got hold of it before are
 *     announced, and quarantine waits for them.
 *  2. The table's cluster is freed in the generation that the flush is about to end: L1 without it
 *     is in the same copy.  What the table held was freed in this generation or an earlier one, and
 *     stays in quarantine until L1 is stable.  The table's last content is never written: until L1
 *     is, the disk has the table as it was (invariants 0 to 3 of the driver).
 *  3. A table shared with a snapshot (L1 entry without COPIED) stays.  It would not be stored to
 *     anyway: whoever stores makes a copy first.
 *  4. Only tables stored to since the last flush are looked at.  They are dirty, hence in memory,
 *     at least in part; one that is in use is looked at again by later flushes as long as it stays
 *     there.  Of those that are in memory in part, and empty as far as that goes, the rest is loaded
 *     before the flush takes the metadata lock, under which there is no I/O.  What cannot be loaded,
 *     is dropped or cleared in between, stays: an empty table is no harm.
 *  5. A table that somebody has pinned stays, this time: it may be a queue's, which stores to it when
 *     its data are written and must not wait for another then.
 *
 * Entries that say "zero" are not 0: a table full of them stays, since it hides a backing file.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-io-int.h"

#include <string.h>

#define CHUNK 512

static gpointer key_of(uint64_t l1_index)
{
    return GSIZE_TO_POINTER((gsize)l1_index + 1);
}

void qcow2_note_cleared_locked(BDRVQcow2State *s, uint64_t l1_index)
{
    qb_mutex_assert_held(&s->lock);
    if (!s->cleared) {
        s->cleared = g_hash_table_new(NULL, NULL);
    }
    g_hash_table_add(s->cleared, key_of(l1_index));
}

static bool is_empty(const BDRVQcow2State *s, const Qcow2Table *t)
{
    static const uint8_t zeroes[CHUNK];
    uint8_t part[CHUNK];

    for (size_t pos = 0; pos < s->cluster_size; pos += CHUNK) {
        qcow2_table_load(t, pos, CHUNK, part);
        if (memcmp(part, zeroes, CHUNK)) {
            return false;
        }
    }
    return true;
}

/* Is part of the table missing in memory, and what is there, empty? */
static bool may_be_empty(const BDRVQcow2State *s, uint64_t offset)
{
    const Qcow2TableRange any = {.kind = QCOW2_TABLE_L2, .offset = offset};
    g_autoptr(Qcow2Table) t = qcow2_cache_peek_part(s->cache, &any);
    g_autofree uint8_t *content = t ? g_try_malloc0(s->cluster_size) : NULL;

    return content && !qcow2_table_load_present(t, content) &&
           content[0] == 0 && !memcmp(content, content + 1, s->cluster_size - 1);
}

static GArray *cleared_indices(BDRVQcow2State *s)
{
    GArray *indices = g_array_new(FALSE, FALSE, sizeof(uint64_t));
    QB_GUARD(&s->lock);
    GHashTableIter iter;
    gpointer key;

    if (s->cleared) {
        g_hash_table_iter_init(&iter, s->cleared);
        while (g_hash_table_iter_next(&iter, &key, NULL)) {
            uint64_t index = GPOINTER_TO_SIZE(key) - 1;
            g_array_append_val(indices, index);
        }
    }
    return indices;
}

void qcow2_fetch_cleared_tables(BlockDriverState *bs)
{
    BDRVQcow2State *s = qcow2_state(bs);
    g_autoptr(GPtrArray) tables = g_ptr_array_new_with_free_func((GDestroyNotify)qcow2_cache_put);
    g_autoptr(GArray) indices = cleared_indices(s);

    for (guint i = 0; i < indices->len; i++) {
        uint64_t index = g_array_index(indices, uint64_t, i), entry = qcow2_l1_get(s, index);
        Qcow2Table *t = NULL;
        if (!may_be_empty(s, entry & QCOW2_ENTRY_OFFSET_MASK) ||
            qcow2_get_active_table(bs, index, &entry, &t) < 0 || !t) {
            continue;
        }
        if (is_empty(s, t)) {
            g_ptr_array_add(tables, t);
        } else {
            qcow2_cache_put(t);
        }
    }
}

/* False: it is in use, to be looked at again. */
static bool drop_if_empty_locked(BDRVQcow2State *s, uint64_t l1_index) QB_REQUIRES(s->lock)
{
    uint64_t entry = qcow2_l1_get(s, l1_index), offset = entry & QCOW2_ENTRY_OFFSET_MASK;
    g_autoptr(Qcow2Table) t = NULL;

    qb_mutex_assert_held(&s->lock);
    if (!offset || !(entry & QCOW2_ENTRY_COPIED)) {
        return true;
    }
    t = qcow2_cache_peek(s->cache, QCOW2_TABLE_L2, offset);
    if (!t || !is_empty(s, t)) {
        return true;
    }
    if (qcow2_table_shared(t)) {
        return false;
    }
    qcow2_l1_set_locked(s, l1_index, 0);
    qcow2_free_run(s->bs, offset, s->cluster_size, QCOW2_DISCARD_OTHER);
    return true;
}

void qcow2_drop_empty_tables_locked(BDRVQcow2State *s)
{
    GHashTableIter iter;
    gpointer key;

    qb_mutex_assert_held(&s->lock);
    if (!s->cleared) {
        return;
    }
    g_hash_table_iter_init(&iter, s->cleared);
    while (g_hash_table_iter_next(&iter, &key, NULL)) {
        if (drop_if_empty_locked(s, GPOINTER_TO_SIZE(key) - 1)) {
            g_hash_table_iter_remove(&iter);
        }
    }
    if (g_hash_table_size(s->cleared) == 0) {
        g_clear_pointer(&s->cleared, g_hash_table_destroy);
    }
}
