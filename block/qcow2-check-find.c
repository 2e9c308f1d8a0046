/*
 * Check: L1 entries that lead nowhere, and the L2 tables that they should lead to.
 *
 *      L1 entry, not aligned                candidates: the offset without its low bits,
 *      or behind the end of the file                    and with each single bit the other way
 *
 *      candidate: nobody refers to it,      its entries, too, refer to nothing but what has a count
 *      but it has a count                   on disk that nobody else accounts for
 *
 * Such a table is the one that was meant: random bytes do not look like that, and neither does a
 * table of anybody else.  So a flipped bit does not cost the guest all that a table maps, which is
 * 512 MiB in clusters of 64 KiB.  Where there is none, an entry behind the end becomes 0: that is
 * how other programs read it, and what lies there is somebody else's once the file has grown.  One
 * that is not aligned stays a finding, and nothing is freed while it does.
 *
 * Only a repair of errors looks for tables; a check says what is wrong with the entry.
 *
 * Invariants
 *   1. Tables are looked for when everything else has been counted.
 *   2. A table that was found is counted as if it had been named all the time.
 *   3. Time is bounded: few entries are looked after, and a table is read only if its own cluster
 *      passes.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-check.h"

#include <inttypes.h>

enum {
    MAX_LOST_TABLES = 65536,
    MAX_FLIPPED = 4096, /* of them: those for which bits are tried */
};

/* ---------------------------------------------------------------- is this the table? */

/* Does the disk have more references to each of these clusters than the map? Kinds in @with may
 * have some already. */
static bool unaccounted(Qcow2Check *c, uint64_t offset, uint64_t bytes, unsigned with)
{
    unsigned bits = c->s->cluster_bits;
    for (uint64_t i = offset >> bits; i <= (offset + bytes - 1) >> bits; i++) {
        uint64_t count;
        if ((qcow2_refmap_flags(c->map, i) & ~with) || !qcow2_check_disk_count(c, i, &count) ||
            count <= qcow2_refmap_count(c->map, i)) {
            return false;
        }
    }
    return true;
}

/* Can the table that is looked for have this entry? Counts those that refer to something. */
static bool is_likely(Qcow2Check *c, Qcow2L2Entry e, unsigned *refs)
{
    const BDRVQcow2State *s = c->s;
    uint64_t host = e.entry & QCOW2_ENTRY_OFFSET_MASK, bytes = s->cluster_size;
    unsigned with = QCOW2_REF_DATA | QCOW2_REF_SHARED;
    if (e.entry & QCOW2_ENTRY_COMPRESSED) {
        uint32_t stream;
        qcow2_parse_compressed(s, e.entry & ~QCOW2_ENTRY_COPIED, &host, &stream);
        bytes = stream;
        with = QCOW2_REF_COMP;
    } else if ((e.entry & QCOW2_L2_STD_RESERVED_MASK) || qcow2_offset_into_cluster(s, host)) {
        return false;
    }
    if (!host) {
        return true;
    }
    (*refs)++;
    return qcow2_check_is_inside(c, host, bytes) && unaccounted(c, host, bytes, with);
}

static bool is_table(Qcow2Check *c, uint64_t offset, uint8_t *buf)
{
    const BDRVQcow2State *s = c->s;
    unsigned refs = 0;
    if (!qcow2_check_is_inside(c, offset, s->cluster_size) ||
        !unaccounted(c, offset, s->cluster_size, 0)) {
        return false;
    }
    if (qcow2_move_read(c, offset, s->cluster_size, buf) < 0) {
        c->incomplete = true; /* it may be the one: nothing is given up */
        return false;
    }
    for (uint32_t i = 0; i < s->l2_entries; i++) {
        if (!is_likely(c, qcow2_check_entry(s, buf, i), &refs)) {
            return false;
        }
    }
    return refs > 0;
}

/* The table that @entry should name; 0: not to be found. @flips: one bit may be wrong. */
static uint64_t find_table(Qcow2Check *c, uint64_t entry, bool flips, uint8_t *buf)
{
    const BDRVQcow2State *s = c->s;
    uint64_t offset = entry & QCOW2_ENTRY_OFFSET_MASK, start = qcow2_start_of_cluster(s, offset);
    if (is_table(c, start, buf)) {
        return start;
    }
    for (unsigned bit = s->cluster_bits; flips && bit < 56 && offset == start; bit++) {
        uint64_t other = offset ^ (UINT64_C(1) << bit);
        if (other && is_table(c, other, buf)) {
            return other;
        }
    }
    return 0;
}

/* ---------------------------------------------------------------- what becomes of the entry */

/* Puts a table where its kind is in c->tables: active ones in L1 order, others behind them. */
static guint list_table(Qcow2Check *c, const Qcow2CheckTable *t)
{
    guint at = c->tables->len;
    if (t->active_refs) {
        for (at = c->nb_active_tables; at > 0; at--) {
            if (g_array_index(c->tables, Qcow2CheckTable, at - 1).active_index < t->active_index) {
                break;
            }
        }
        c->nb_active_tables++;
    }
    g_array_insert_val(c->tables, at, *t);
    return at;
}

/* Invariant 2. */
static void adopt(Qcow2Check *c, const Qcow2LostTable *lost, uint64_t offset)
{
    bool active = lost->l1_index != UINT32_MAX;
    bool copied = lost->entry & QCOW2_ENTRY_COPIED;
    Qcow2CheckTable t = {.offset = offset, .refs = MIN(lost->times, UINT32_MAX),
                         .active_refs = active, .active_index = lost->l1_index,
                         .flags = !active ? 0 : copied ? QCOW2_REF_COPIED : QCOW2_REF_SHARED};
    guint at = list_table(c, &t);
    qcow2_check_count(c, offset, c->s->cluster_size, t.refs, QCOW2_REF_L2 | t.flags);
    qcow2_check_l2_table(c, at);
}

static void handle_lost(Qcow2Check *c, const Qcow2LostTable *lost, bool flips, uint8_t *buf)
{
    uint64_t offset = lost->entry & QCOW2_ENTRY_OFFSET_MASK;
    uint64_t copied = lost->entry & QCOW2_ENTRY_COPIED;
    uint64_t found = c->incomplete ? 0 : find_table(c, lost->entry, flips, buf);
    bool unaligned = qcow2_offset_into_cluster(c->s, offset);
    if (!found && (unaligned || c->incomplete || !c->give_up)) {
        qcow2_check_bad_l1_entry(c, lost);
        return;
    }
    Qcow2EntryFix fix = {
        .pos = lost->pos, .bytes = sizeof(lost->entry), .owner = QCOW2_REF_META,
        .l1_index = lost->l1_index, .was.entry = lost->entry,
        .becomes.entry = found ? found | copied : 0,
        .code = unaligned ? "l1-entry-unaligned" : "l1-entry-outside"};
    const char *remedy = found ? "the table can only be that at " : "nothing is there";
    g_autofree char *where = found ? g_strdup_printf("0x%" PRIx64, found) : g_strdup("");
    if (found) {
        adopt(c, lost, found);
    }
    qcow2_check_fixable(c, fix, " l2_offset=%" PRIx64 ": L1 entry corrupted: %s%s", offset, remedy,
                        where);
}

bool qcow2_check_look_for_table(Qcow2Check *c, const Qcow2LostTable *lost)
{
    if (!(c->fix & BDRV_FIX_ERRORS) || c->lost_tables->len >= MAX_LOST_TABLES) {
        return false;
    }
    g_array_append_val(c->lost_tables, *lost);
    return true;
}

void qcow2_check_find_tables(Qcow2Check *c)
{
    g_autofree uint8_t *buf = c->lost_tables->len ? g_malloc(c->s->cluster_size) : NULL;
    for (guint i = 0; i < c->lost_tables->len; i++) {
        handle_lost(c, &g_array_index(c->lost_tables, Qcow2LostTable, i), i < MAX_FLIPPED, buf);
    }
    qcow2_check_drop_blocks(c);
}
