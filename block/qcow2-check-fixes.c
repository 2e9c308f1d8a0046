/*
 * Check: entries of L1 and L2 that a repair rewrites.
 *
 *   judged while counting --> list --> all owners known --> rewritten, and told
 *
 * Whether a table lies in a cluster of its own is known only when everything has been counted;
 * writing to one that does not would damage its other owner.  So repairs are put on a list, and
 * each is told when it is done, or as an error when it cannot be.  Those are tried again when other
 * owners have been moved away.
 *
 * Invariants
 *   1. Each repair changes one entry in one write, and leaves at most leaks behind.
 *   2. The list is bounded; what does not fit stays an error until the next repair.
 *   3. c->be_l1 follows what was written to the active L1.
 *   4. What waited for its second try meets the entry it was made for, or nothing at all: another
 *      repair may have replaced the entry meanwhile, and with it what was wrong.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-check.h"

#include <stdarg.h>

enum { MAX_FIXES = 65536 };

bool qcow2_check_fixable(Qcow2Check *c, Qcow2EntryFix fix, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    fix.text = g_strdup_vprintf(fmt, ap);
    va_end(ap);
    if ((c->fix & BDRV_FIX_ERRORS) && c->entry_fixes->len < MAX_FIXES) {
        g_array_append_val(c->entry_fixes, fix);
        return true;
    }
    qcow2_check_report(c, BDRV_FINDING_CORRUPTION, false, fix.code, fix.pos, "ERROR%s", fix.text);
    g_free(fix.text);
    return false;
}

static bool write_entry(Qcow2Check *c, const Qcow2EntryFix *fix)
{
    uint8_t buf[16];
    uint64_t cluster = qcow2_start_of_cluster(c->s, fix->pos);
    if (!qcow2_check_exclusive(c, cluster, c->s->cluster_size, fix->owner)) {
        return false;
    }
    qb_stbe64(buf, fix->becomes.entry);
    qb_stbe64(buf + 8, fix->becomes.bitmap);
    if (qcow2_check_write(c, fix->pos, fix->bytes, buf) < 0) {
        return false;
    }
    if (fix->l1_index != UINT32_MAX) {
        c->be_l1[fix->l1_index] = htobe64(fix->becomes.entry);
    }
    return true;
}

/* What the entry refers to after all, so that it is not taken for free. */
static void count_unfixed(Qcow2Check *c, const Qcow2EntryFix *fix)
{
    uint64_t offset = qcow2_start_of_cluster(c->s, fix->was.entry & QCOW2_ENTRY_OFFSET_MASK);
    if (fix->times) {
        qcow2_check_count(c, offset, c->s->cluster_size, fix->times, QCOW2_REF_DATA);
    }
}

void qcow2_check_apply_fixes(Qcow2Check *c)
{
    for (guint i = 0; i < c->entry_fixes->len; i++) {
        Qcow2EntryFix *fix = &g_array_index(c->entry_fixes, Qcow2EntryFix, i);
        fix->done = write_entry(c, fix);
        qcow2_check_report(c, BDRV_FINDING_CORRUPTION, fix->done, fix->code, fix->pos, "%s%s",
                           fix->done ? "Repairing" : "ERROR", fix->text);
        if (!fix->done) {
            count_unfixed(c, fix);
        }
    }
    if (c->entry_fixes->len && c->touched) {
        qcow2_check_barrier(c);
    }
}

/* Is the entry still what it was?  False also when nobody can tell. */
static bool is_unchanged(Qcow2Check *c, const Qcow2EntryFix *fix)
{
    uint8_t buf[16] = {0};
    int ret = bdrv_pread(c->bs->file, (int64_t)fix->pos, fix->bytes, buf, 0);
    return ret >= 0 && qb_ldbe64(buf) == fix->was.entry && qb_ldbe64(buf + 8) == fix->was.bitmap;
}

void qcow2_check_retry_fixes(Qcow2Check *c)
{
    for (guint i = 0; i < c->entry_fixes->len && !c->write_failed; i++) {
        Qcow2EntryFix *fix = &g_array_index(c->entry_fixes, Qcow2EntryFix, i);
        /* One that takes references away has been counted as it is by now. */
        if (fix->done || fix->times || !is_unchanged(c, fix) || !write_entry(c, fix)) {
            continue;
        }
        fix->done = true;
        qcow2_check_mark_fixed(c, BDRV_FINDING_CORRUPTION, 1);
        qcow2_check_report(c, BDRV_FINDING_INFO, true, fix->code, fix->pos, "Repairing%s",
                           fix->text);
    }
}
