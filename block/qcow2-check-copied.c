/*
 * Check: COPIED flags of the active tables against the refcounts on disk.
 *
 * Counting has noted for every host cluster whether active entries with and without the flag refer
 * to it, and comparing has looked whether that fits its refcount.  So this second pass over the
 * tables runs only when some flag is known to be wrong (c->copied_suspect); a sound image is read
 * once.
 *
 * Invariants
 *   1. COPIED is right if and only if the refcount is exactly 1; data in an external data file
 *      counts as 1.
 *   2. Compressed entries and entries without a place are not looked at; nor are detached tables.
 *   3. A table is rewritten only if its cluster has no other owner, and in one write.  The same
 *      holds for the active L1; its copy in c->be_l1 follows what was written.
 *   4. With clear_only, before counts are repaired, the flag is only taken away, and judged by
 *      what the counts will be: a COPIED flag that is missing does no harm.  What cannot be
 *      rewritten is left to the pass that follows the repair.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-check.h"

#include <inttypes.h>
#include <string.h>

typedef struct CopiedPass {
    bool repair, clear_only;
    bool l1_repair;   /* the active L1 may be rewritten */
    uint32_t next_l1; /* L1 entries below it have been judged */
    uint64_t *be_l1;  /* as it shall be; NULL: nothing to change; owned */
} CopiedPass;

/* What the count of the cluster at @offset is, or will be after the repair; false: nobody knows. */
static bool count_of(Qcow2Check *c, const CopiedPass *pass, uint64_t offset, uint64_t *ret)
{
    uint64_t cluster = offset >> c->s->cluster_bits;
    if (pass->clear_only) {
        *ret = qcow2_refmap_count(c->map, cluster);
        return true;
    }
    return qcow2_check_disk_count(c, cluster, ret);
}

static bool flag_is_right(const CopiedPass *pass, uint64_t entry, uint64_t refcount)
{
    bool copied = entry & QCOW2_ENTRY_COPIED;
    return copied == (refcount == 1) || (pass->clear_only && !copied);
}

/* ---------------------------------------------------------------- L1 */

static void judge_l1_entry(Qcow2Check *c, CopiedPass *pass, uint32_t i)
{
    uint64_t entry = be64toh(c->be_l1[i]);
    uint64_t offset = entry & QCOW2_ENTRY_OFFSET_MASK, refcount;
    if (!offset || !count_of(c, pass, offset, &refcount) ||
        flag_is_right(pass, entry, refcount) || (pass->clear_only && !pass->l1_repair)) {
        return;
    }
    qcow2_check_report(c, BDRV_FINDING_CORRUPTION, pass->l1_repair, "copied-flag-l1", offset,
                       "%s OFLAG_COPIED L2 cluster: l1_index=%" PRIu32 " l1_entry=%" PRIx64
                       " refcount=%" PRIu64,
                       pass->l1_repair ? "Repairing" : "ERROR", i, entry, refcount);
    if (pass->l1_repair) {
        if (!pass->be_l1) {
            pass->be_l1 = g_memdup2(c->be_l1, (size_t)c->l1_size * sizeof(uint64_t));
        }
        pass->be_l1[i] = htobe64(entry ^ QCOW2_ENTRY_COPIED);
    }
}

/* Judges L1 entries before @end, so that findings come in the order of the tables. */
static void judge_l1_before(Qcow2Check *c, CopiedPass *pass, uint32_t end)
{
    for (; pass->next_l1 < end; pass->next_l1++) {
        judge_l1_entry(c, pass, pass->next_l1);
    }
}

/* What could not be written is not what the image has, and will be found wrong again. */
static void write_l1(Qcow2Check *c, CopiedPass *pass)
{
    g_autofree uint64_t *be_l1 = g_steal_pointer(&pass->be_l1);
    if (be_l1 && qcow2_check_write(c, c->s->header.l1_offset,
                                   (size_t)c->l1_size * sizeof(uint64_t), be_l1) == 0) {
        memcpy(c->be_l1, be_l1, (size_t)c->l1_size * sizeof(uint64_t));
    }
}

/* ---------------------------------------------------------------- L2 */

static bool has_flag_to_judge(const BDRVQcow2State *s, uint64_t entry)
{
    if (entry & QCOW2_ENTRY_COMPRESSED) {
        return false;
    }
    return (entry & QCOW2_ENTRY_OFFSET_MASK) || (s->has_data_file && (entry & QCOW2_ENTRY_COPIED));
}

static bool judge_l2_entry(Qcow2Check *c, const CopiedPass *pass, bool may_write, uint64_t entry)
{
    uint64_t offset = entry & QCOW2_ENTRY_OFFSET_MASK, refcount = 1;
    if ((!c->s->has_data_file && !count_of(c, pass, offset, &refcount)) ||
        flag_is_right(pass, entry, refcount) || (pass->clear_only && !may_write)) {
        return true;
    }
    qcow2_check_report(c, BDRV_FINDING_CORRUPTION, may_write, "copied-flag-data", offset,
                       "%s OFLAG_COPIED data cluster: l2_entry=%" PRIx64 " refcount=%" PRIu64,
                       may_write ? "Repairing" : "ERROR", entry, refcount);
    return false;
}

static void judge_table(Qcow2Check *c, const Qcow2CheckTable *t, const uint8_t *entries,
                        void *opaque)
{
    BDRVQcow2State *s = c->s;
    CopiedPass *pass = opaque;
    judge_l1_before(c, pass, t->active_index + 1);
    bool may_write =
        pass->repair && qcow2_check_exclusive(c, t->offset, s->cluster_size, QCOW2_REF_L2);
    g_autofree uint8_t *changed = NULL;
    for (uint32_t i = 0; i < s->l2_entries; i++) {
        uint64_t entry = qcow2_check_entry(s, entries, i).entry;
        if (!entry || !has_flag_to_judge(s, entry) || judge_l2_entry(c, pass, may_write, entry) ||
            !may_write) {
            continue;
        }
        if (!changed) {
            changed = g_memdup2(entries, s->cluster_size);
        }
        qb_stbe64(changed + (size_t)i * s->l2_entry_size, entry ^ QCOW2_ENTRY_COPIED);
    }
    if (changed) {
        qcow2_check_write(c, t->offset, s->cluster_size, changed);
    }
}

void qcow2_check_copied(Qcow2Check *c, bool repair, bool clear_only)
{
    uint64_t l1_bytes = (uint64_t)c->l1_size * sizeof(uint64_t);
    CopiedPass pass = {.repair = repair, .clear_only = clear_only};
    pass.l1_repair =
        repair && qcow2_check_exclusive(c, c->s->header.l1_offset, l1_bytes, QCOW2_REF_META);
    qb_progress_grow(c->opts->progress, (uint64_t)c->nb_active_tables * c->s->cluster_size);
    qcow2_check_for_tables(c, 0, c->nb_active_tables, judge_table, &pass);
    judge_l1_before(c, &pass, c->l1_size);
    write_l1(c, &pass);
    c->copied_uncounted |= clear_only; /* the map's flags are no longer those on disk */
    if (repair && c->touched) {
        qcow2_check_barrier(c);
    }
}
