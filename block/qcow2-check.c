/*
 * Check and repair of a qcow2 image.
 *
 *   snapshot table -> references -> refcounts -> COPIED flags -> snapshot table, header bits
 *
 *     qcow2-check-snapshots.c  the snapshot table
 *     qcow2-check-refs.c     who refers to which host cluster: header, L1s, snapshots, crypto area
 *     qcow2-check-l1.c         an active L1 that is too long or too short
 *     qcow2-check-l2.c         L2 tables, each read once however many L1s name it
 *     qcow2-check-scan.c       those in which nothing is odd, on all cores
 *     qcow2-check-find.c       L1 entries that lead nowhere, and their tables
 *     qcow2-check-fixes.c      entries that a repair rewrites
 *     qcow2-check-bitmaps.c    stored bitmaps
 *     qcow2-check-map.c        the counts that come of it, in memory
 *     qcow2-check-compare.c  the refcount structure, and every count on disk against the map
 *     qcow2-check-copied.c   COPIED flags against counts
 *     qcow2-rebuild.c        repair of refcounts: raise, hook up new blocks, lower
 *     qcow2-check-moves.c    L2 entries that a repair makes point elsewhere
 *     qcow2-check-alias.c      guest data that has a second owner
 *     qcow2-check-lost.c       entries that lead nowhere
 *
 * Findings are records given to a callback; nothing is printed here.  A repair adds a second
 * record, "Repairing ...", of the class that is counted nowhere.
 *
 * Rules
 *  1. What is on disk is checked: a flush comes first, then tables and refcounts are read from the
 *     file (or from a cache that equals it; a repair empties the caches before it begins).  No
 *     check marks the image corrupt or changes it unless it repairs.
 *  2. Something that cannot be read may hold references.  While there is such a thing no count is
 *     lowered and no cluster is taken for free.  A bitmap directory that makes no sense keeps
 *     counts from being lowered, too, but nothing else from being repaired.
 *  3. A repair raises before it lowers, with a barrier between (invariant 1).  On version 3 the
 *     dirty bit is stable before the first count or flag changes and goes when all of them are
 *     right; on version 2 COPIED flags are cleared before counts rise and set after they fell
 *     (invariant 4).
 *  4. Two owners of one cluster that cannot both be right are told apart and never blessed with a
 *     higher count: the refcount structure moves away, guest data is copied; where neither is
 *     possible the finding stays.
 *  5. Corrupt and dirty bits are cleared only when no error is left.
 *  6. What is lost is given up only for a user who asked for a repair, not when a dirty image is
 *     opened for writing: that fails then.
 *
 * Not done: guessing.  What is lost reads as an error, until it is written.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-check.h"

#include <inttypes.h>
#include <stdarg.h>

/* ---------------------------------------------------------------- findings */

/* The counters of a class: what is left, what was repaired. */
static uint64_t *counter(BdrvCheckResult *res, BdrvFindingClass kind, bool fixed)
{
    switch (kind) {
    case BDRV_FINDING_LEAK:
        return fixed ? &res->leaks_fixed : &res->leaks;
    case BDRV_FINDING_CORRUPTION:
        return fixed ? &res->corruptions_fixed : &res->corruptions;
    case BDRV_FINDING_CHECK_ERROR:
        return &res->check_errors;
    case BDRV_FINDING_INFO:
        break;
    }
    return NULL;
}

void qcow2_check_report(Qcow2Check *c, BdrvFindingClass kind, bool fixed, const char *code,
                        uint64_t offset, const char *fmt, ...)
{
    uint64_t *n = counter(c->res, kind, fixed);
    if (n) {
        (*n)++;
    }
    if (!c->opts->finding || c->quiet) {
        return;
    }
    va_list ap;
    va_start(ap, fmt);
    g_autofree char *text = g_strdup_vprintf(fmt, ap);
    va_end(ap);
    BdrvCheckFinding finding = {
        .kind = kind, .code = code, .text = text, .offset = offset, .fixed = fixed};
    c->opts->finding(&finding, c->opts->opaque);
}

void qcow2_check_mark_fixed(Qcow2Check *c, BdrvFindingClass kind, uint64_t n)
{
    uint64_t *left = counter(c->res, kind, false);
    assert(left && *left >= n);
    *left -= n;
    *counter(c->res, kind, true) += n;
}

bool qcow2_check_cancelled(const Qcow2Check *c)
{
    return !c->repairing && qb_progress_cancelled(c->opts->progress);
}

/* ---------------------------------------------------------------- writing */

int qcow2_check_write(Qcow2Check *c, uint64_t offset, size_t bytes, const void *buf)
{
    assert(c->fix);
    int ret = qcow2_begin_change(c->bs, false);
    c->touched = true;
    if (ret == 0) {
        ret = bdrv_pwrite(c->bs->file, (int64_t)offset, (int64_t)bytes, buf, 0);
    }
    if (ret < 0) {
        c->write_failed = true;
        qcow2_check_report(c, BDRV_FINDING_CHECK_ERROR, false, "write-failed", offset,
                           "ERROR: Could not write metadata at offset 0x%" PRIx64 ": %s", offset,
                           g_strerror(-ret));
    }
    return ret;
}

int qcow2_check_barrier(Qcow2Check *c)
{
    int ret = bdrv_flush(c->bs->file->bs);
    if (ret < 0) {
        c->write_failed = true;
        qcow2_check_report(c, BDRV_FINDING_CHECK_ERROR, false, "flush-failed", UINT64_MAX,
                           "ERROR: Could not flush the image file: %s", g_strerror(-ret));
    }
    return ret;
}

/* Sparse files let a hostile image name terabytes of tables. Asking is dearer than reading when
 * they are tiny, and idle when all of them together are no more than the file takes. */
bool qcow2_check_is_hole(const Qcow2Check *c, uint64_t offset, uint64_t n)
{
    BdrvStatus status;
    if (c->s->cluster_size < 4096 || n <= c->file_allocated >> c->s->cluster_bits) {
        return false;
    }
    int ret = bdrv_block_status(c->bs->file->bs, (int64_t)offset, c->s->cluster_size, &status);
    return ret == 0 && (status.flags & BDRV_BLOCK_ZERO) && status.bytes >= c->s->cluster_size;
}

void qcow2_check_not_followed(Qcow2Check *c)
{
    c->lost = true;
    c->keep_leaks = true;
}

bool qcow2_check_exclusive(const Qcow2Check *c, uint64_t offset, uint64_t bytes, unsigned kind)
{
    uint64_t first = offset >> c->s->cluster_bits;
    uint64_t last = bytes ? (offset + bytes - 1) >> c->s->cluster_bits : first;
    for (uint64_t i = first; i <= last; i++) {
        unsigned flags = qcow2_refmap_flags(c->map, i);
        if ((flags & (QCOW2_REF_KINDS | QCOW2_REF_ALIAS)) != kind) {
            return false;
        }
    }
    return true;
}

/* ---------------------------------------------------------------- the run */

static void clear_entry_fix(void *p)
{
    g_free(((Qcow2EntryFix *)p)->text);
}

static void clear_table_fix(void *p)
{
    g_free(((Qcow2TableFix *)p)->name);
}

static bool begin(Qcow2Check *c, GError **errp)
{
    BDRVQcow2State *s = c->s;
    if (c->fix && bdrv_is_read_only(c->bs)) {
        qb_error_set(errp, EACCES, "Cannot repair a read-only image");
        return false;
    }
    int ret = bdrv_is_read_only(c->bs) ? 0 : qcow2_flush(c->bs);
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Could not flush the image before the check");
        return false;
    }
    int64_t file_bytes = bdrv_getlength(c->bs->file->bs);
    if (file_bytes < 0) {
        qb_error_set_errno(errp, (int)file_bytes, "Could not get the length of the image file");
        return false;
    }
    if (c->fix) {
        qcow2_cache_reset(s->cache); /* the repair writes behind it */
    }
    c->file_bytes = c->counted_bytes = (uint64_t)file_bytes;
    c->file_allocated = (uint64_t)MAX(bdrv_get_allocated_file_size(c->bs->file->bs), 0);
    c->nb_clusters = qcow2_size_to_clusters(s, c->file_bytes);
    c->map = qcow2_refmap_new(s->refcount_max);
    c->be_l1 = qcow2_l1_dup_be(s, &c->l1_size);
    c->tables = g_array_new(false, false, sizeof(Qcow2CheckTable));
    c->entry_fixes = g_array_new(false, false, sizeof(Qcow2EntryFix));
    g_array_set_clear_func(c->entry_fixes, clear_entry_fix);
    c->table_fixes = g_array_new(false, false, sizeof(Qcow2TableFix));
    g_array_set_clear_func(c->table_fixes, clear_table_fix);
    c->lost_tables = g_array_new(false, false, sizeof(Qcow2LostTable));
    c->taken = g_hash_table_new(NULL, NULL);
    return true;
}

static void end(Qcow2Check *c)
{
    qcow2_check_drop_blocks(c);
    qcow2_refmap_free(c->map);
    g_free(c->be_l1);
    g_clear_pointer(&c->tables, g_array_unref);
    g_clear_pointer(&c->entry_fixes, g_array_unref);
    g_clear_pointer(&c->table_fixes, g_array_unref);
    g_clear_pointer(&c->lost_tables, g_array_unref);
    g_clear_pointer(&c->table_index, g_hash_table_unref);
    g_clear_pointer(&c->taken, g_hash_table_unref);
    g_free(c->blocks);
}

static bool interrupted(const Qcow2Check *c, GError **errp)
{
    if (qcow2_check_cancelled(c)) {
        qb_error_set(errp, EINTR, "Check was interrupted");
        return true;
    }
    return false;
}

/* Repairing only leaks may set COPIED flags right as long as nothing else is wrong. */
static bool may_repair_copied(const Qcow2Check *c)
{
    const BdrvCheckResult *res = c->res;
    if (c->fix & BDRV_FIX_ERRORS) {
        return true;
    }
    return c->fix && !res->corruptions && !res->leaks && !res->check_errors;
}

/* Changes header bits for a repair; @what for the message. */
static bool change_bits(Qcow2Check *c, uint64_t set, uint64_t clear, const char *what)
{
    int ret = c->s->version >= 3 ? qcow2_set_incompatible(c->bs, set, clear) : 0;
    if (ret < 0) {
        c->write_failed = true;
        qcow2_check_report(c, BDRV_FINDING_CHECK_ERROR, false, "write-failed", 0,
                           "ERROR: Could not %s: %s", what, g_strerror(-ret));
    }
    return ret == 0;
}

/* Rule 3: raise, relink, lower; what version 3 leaves to the dirty bit, version 2 does by order. */
static bool repair_errors(Qcow2Check *c)
{
    if (!change_bits(c, QCOW2_INCOMPAT_DIRTY, 0, "set the dirty bit")) {
        return false;
    }
    if (!qcow2_check_resize_l1(c)) {
        return false;
    }
    qcow2_check_release_structure(c);
    qcow2_check_make_bitmap_tables(c);
    Qcow2Moves *moves = qcow2_check_plan_moves(c);
    if (c->s->version < 3) {
        qcow2_check_copied(c, true, true);
    }
    bool raised = qcow2_check_raise(c);
    qcow2_check_make_moves(c, moves, raised);
    if (raised) {
        qcow2_check_link_bitmap_tables(c);
    }
    if (raised && !c->write_failed) {
        qcow2_check_lower(c);
    }
    return raised;
}

static void repair_counts(Qcow2Check *c)
{
    bool hooked_up = false;
    if (c->fix & BDRV_FIX_ERRORS) {
        hooked_up = repair_errors(c);
    } else {
        qcow2_check_lower(c);
    }
    qcow2_check_verify(c, hooked_up);
    qcow2_check_retry_fixes(c);
}

/* What was written behind their back: the caches, the refcounts and L1 in memory. */
static bool reload(Qcow2Check *c, GError **errp)
{
    BDRVQcow2State *s = c->s;
    qcow2_cache_reset(s->cache);
    qcow2_l1_replace(s, g_memdup2(c->be_l1, c->l1_size * sizeof(uint64_t)), c->l1_size,
                     s->header.l1_offset);
    if (!qcow2_refcount_reload(c->bs, errp)) {
        atomic_store(&s->corrupt, true); /* nobody can allocate without refcounts */
        g_prefix_error(errp, "Could not load the repaired refcounts: ");
        return false;
    }
    return true;
}

/* Rule 5. A dirty bit of our own making goes as soon as nothing was left half-done. */
static void clear_bits(Qcow2Check *c, bool was_dirty)
{
    const BdrvCheckResult *res = c->res;
    if (!res->corruptions && !res->check_errors) {
        uint64_t both = QCOW2_INCOMPAT_DIRTY | QCOW2_INCOMPAT_CORRUPT;
        if (change_bits(c, 0, both, "clear the dirty bit")) {
            atomic_store(&c->s->corrupt, false);
        }
    } else if (!was_dirty && !c->write_failed) {
        change_bits(c, 0, QCOW2_INCOMPAT_DIRTY, "clear the dirty bit");
    }
}

static bool repair(Qcow2Check *c, GError **errp)
{
    c->repairing = true;
    bool was_dirty = c->s->header.incompatible & QCOW2_INCOMPAT_DIRTY;
    if (c->res->corruptions || c->res->leaks) {
        repair_counts(c);
    }
    if ((c->copied_suspect || c->copied_uncounted) && !c->write_failed) {
        qcow2_check_copied(c, may_repair_copied(c), false);
    }
    if (c->touched) {
        qcow2_check_barrier(c);
        if (!reload(c, errp)) {
            return false;
        }
    }
    if (c->snapshots_broken && (c->fix & BDRV_FIX_ERRORS) && !c->write_failed) {
        qcow2_check_write_snapshot_table(c);
    }
    clear_bits(c, was_dirty);
    return true;
}

static bool run(Qcow2Check *c, GError **errp)
{
    qcow2_check_snapshot_table(c);
    qcow2_check_l1_length(c);
    qcow2_check_count_all(c);
    if (interrupted(c, errp)) {
        return false;
    }
    qcow2_check_refcount_structure(c);
    qcow2_check_find_tables(c);
    qcow2_check_apply_fixes(c);
    BdrvCheckResult before = *c->res;
    qcow2_check_compare(c);
    c->count_faults = c->res->corruptions - before.corruptions;
    c->count_leaks = c->res->leaks - before.leaks;
    if (interrupted(c, errp)) {
        return false;
    }
    c->res->total_clusters = qcow2_size_to_clusters(c->s, c->s->header.size);
    if (c->fix) {
        return repair(c, errp);
    }
    if (c->copied_suspect || c->copied_uncounted) {
        qcow2_check_copied(c, false, false);
    }
    return true;
}

/* @give_up: may a repair settle what is lost? */
static bool check_image(BlockDriverState *bs, const BdrvCheckOptions *opts, bool give_up,
                        BdrvCheckResult *result, GError **errp)
{
    *result = (BdrvCheckResult){0};
    Qcow2Check c = {.bs = bs, .s = qcow2_state(bs), .opts = opts, .res = result,
                    .fix = opts->fix, .give_up = give_up};
    bool ok = begin(&c, errp) && run(&c, errp);
    end(&c);
    return ok;
}

bool qcow2_check(BlockDriverState *bs, const BdrvCheckOptions *opts, BdrvCheckResult *result,
                 GError **errp)
{
    return check_image(bs, opts, opts->fix & BDRV_FIX_ERRORS, result, errp);
}

Qcow2RefMap *qcow2_check_count_kept(BlockDriverState *bs)
{
    BdrvCheckOptions opts = {0};
    BdrvCheckResult res = {0};
    Qcow2Check c = {.bs = bs, .s = qcow2_state(bs), .opts = &opts, .res = &res};
    Qcow2RefMap *map = NULL;
    if (begin(&c, NULL)) {
        c.l1_size = 0;
        qcow2_check_snapshot_table(&c);
        qcow2_check_count_all(&c);
        bool sound = !res.corruptions && !res.check_errors && !c.incomplete && !c.lost;
        map = sound ? g_steal_pointer(&c.map) : NULL;
    }
    end(&c);
    return map;
}

bool qcow2_repair_dirty(BlockDriverState *bs, GError **errp)
{
    BdrvCheckOptions opts = {.fix = BDRV_FIX_LEAKS | BDRV_FIX_ERRORS};
    BdrvCheckResult res;
    if (!check_image(bs, &opts, false, &res, errp)) {
        return false;
    }
    if (res.corruptions || res.check_errors) {
        qb_error_set(errp, EIO, "%" PRIu64 " errors are left, see 'qemu-img check'",
                     res.corruptions + res.check_errors);
        return false;
    }
    return true;
}
