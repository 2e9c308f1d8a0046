/*
 * Check and repair.
 *
 *     seen set: header, L1, then every table and data cluster on its first reference
 *
 *     entry points to no possible cluster    corruption; repair sets it to 0
 *     cluster referred to a second time      corruption; stays, nobody knows whose content it is
 *     cluster never referred to              leak: free space as far as this driver is concerned
 *
 * A repair of leaks cuts the file behind the last cluster in use; those in between remain, and are
 * counted as other programs count them, because the format cannot tell them from free space.
 *
 * Invariants
 *  1. A check without repair writes nothing.
 *  2. The need-check bit goes last, when all that was repaired is stable, nothing is left, and a
 *     shrink that may have been interrupted has been ended.
 *  3. A table that was seen already is not read again: what it refers to would all be counted
 *     twice. So a check ends, whatever the tables say, after the length of L1 and of as many
 *     tables as fit the file.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qed.h"

#include <inttypes.h>
#include <stdarg.h>

typedef struct QedCheck {
    BlockDriverState *bs;
    BDRVQedState *s;
    const BdrvCheckOptions *opts;
    BdrvCheckResult *res;
    QedSpace *seen;
    uint64_t file_clusters;
    uint64_t l1_index;    /* of the table that pieces are coming from */
    uint64_t last_offset; /* the data cluster before in this table, 0: none */
} QedCheck;

/* ---------------------------------------------------------------- findings */

static void count(QedCheck *c, BdrvFindingClass kind, bool fixed)
{
    if (kind == BDRV_FINDING_CHECK_ERROR) {
        c->res->check_errors++;
    } else if (fixed) {
        c->res->corruptions_fixed++;
    } else {
        c->res->corruptions++;
    }
}

static void report(QedCheck *c, const BdrvCheckFinding *finding, const char *fmt, ...)
    G_GNUC_PRINTF(3, 4);

/* @finding but for its text. */
static void report(QedCheck *c, const BdrvCheckFinding *finding, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    g_autofree char *text = g_strdup_vprintf(fmt, ap);
    va_end(ap);
    BdrvCheckFinding whole = *finding;
    whole.text = text;
    count(c, finding->kind, finding->fixed);
    if (c->opts->finding) {
        c->opts->finding(&whole, c->opts->opaque);
    }
}

static void report_io(QedCheck *c, uint64_t offset, int error, const char *what)
{
    BdrvCheckFinding f = {.kind = BDRV_FINDING_CHECK_ERROR, .code = "io-error", .offset = offset};
    report(c, &f, "ERROR: %s at offset 0x%" PRIx64 ": %s", what, offset, g_strerror(-error));
}

static bool cancelled(const QedCheck *c)
{
    return qb_progress_cancelled(c->opts->progress);
}

/* ---------------------------------------------------------------- entries */

/* Sets entry @index of the table at @table to 0, if repair is wanted. */
static bool clear_entry(QedCheck *c, uint64_t table, uint64_t index)
{
    if (!(c->opts->fix & BDRV_FIX_ERRORS)) {
        return false;
    }
    int ret = qed_clear_entry(c->bs, table, index);
    if (ret < 0) {
        report_io(c, table, ret, "Could not change the table");
    }
    return ret == 0;
}

/* True when the @bytes at @offset were not there before. */
static bool see(QedCheck *c, uint64_t offset, uint64_t bytes)
{
    const BDRVQedState *s = c->s;
    return qed_space_add(c->seen, offset >> s->cluster_bits, bytes >> s->cluster_bits) == 0;
}

/* What entry @index of the table at @table (@name) refers to. True when it may be used. */
static bool judge(QedCheck *c, const char *name, uint64_t table, uint64_t index, uint64_t entry)
{
    uint64_t bytes = table == c->s->l1_offset ? c->s->table_bytes : c->s->cluster_size;
    if (!qed_in_file(c->s, entry, bytes)) {
        bool fixed = clear_entry(c, table, index);
        BdrvCheckFinding f = {.kind = BDRV_FINDING_CORRUPTION, .code = "invalid-offset",
                              .offset = entry, .fixed = fixed};
        report(c, &f, "%s: %s table at offset 0x%" PRIx64 ", entry %" PRIu64 ": offset 0x%" PRIx64
               " is not in the image", fixed ? "Repairing" : "ERROR", name, table, index, entry);
        return false;
    }
    if (!see(c, entry, bytes)) {
        BdrvCheckFinding f = {.kind = BDRV_FINDING_CORRUPTION, .code = "two-owners",
                              .offset = entry};
        report(c, &f, "ERROR: %s table at offset 0x%" PRIx64 ", entry %" PRIu64 ": offset 0x%"
               PRIx64 " is referred to twice", name, table, index, entry);
        return false;
    }
    return true;
}

static int check_table(uint64_t l1_index, uint64_t entry, void *opaque)
{
    QedCheck *c = opaque;
    if (cancelled(c)) {
        return -ECANCELED;
    }
    return judge(c, "L1", c->s->l1_offset, l1_index, entry); /* invariant 3 */
}

static void check_data(QedCheck *c, const QedWalkPiece *piece, uint64_t index, uint64_t entry)
{
    c->res->allocated_clusters++;
    if (c->last_offset && entry != c->last_offset + c->s->cluster_size) {
        c->res->fragmented_clusters++;
    }
    c->last_offset = entry;
    judge(c, "L2", piece->table, index, entry);
}

static void begin_table(QedCheck *c, const QedWalkPiece *piece)
{
    if (piece->first == 0) {
        qb_progress_add(c->opts->progress, piece->l1_index - c->l1_index);
        c->l1_index = piece->l1_index;
        c->last_offset = 0;
    }
}

static int check_piece(const QedWalkPiece *piece, void *opaque)
{
    QedCheck *c = opaque;
    begin_table(c, piece);
    if (!piece->le) {
        report_io(c, piece->table, piece->error, "Could not read the table");
        return 0;
    }
    for (size_t i = 0; i < piece->n; i++) {
        uint64_t entry = GUINT64_FROM_LE(piece->le[i]);
        if (entry > QED_ENTRY_ZERO) {
            check_data(c, piece, piece->first + i, entry);
        }
    }
    if (cancelled(c)) {
        return -ECANCELED;
    }
    return c->opts->fix ? qed_relieve(c->bs) : 0;
}

static int check_l1_error(uint64_t l1_index, int error, void *opaque)
{
    QedCheck *c = opaque;
    report_io(c, c->s->l1_offset + l1_index * QED_ENTRY_BYTES, error, "Could not read L1");
    return 0;
}

/* ---------------------------------------------------------------- the whole */

static int walk(QedCheck *c)
{
    BDRVQedState *s = c->s;
    QedWalker w = {check_table, check_piece, check_l1_error, c};
    uint64_t tables = qed_l1_index(s, qed_round_up(s, atomic_load(&s->image_size))) + 1;
    qb_progress_grow(c->opts->progress, tables);
    see(c, 0, s->data_start);
    see(c, s->l1_offset, s->table_bytes);
    int ret = qed_walk(c->bs, &w);
    qb_progress_add(c->opts->progress, tables - MIN(tables, c->l1_index));
    return ret;
}

/* Clusters of the file that nothing refers to; those at its end may be cut off. */
static void check_leaks(QedCheck *c)
{
    uint64_t used = qed_space_count(c->seen);
    uint64_t leaks = c->file_clusters > used ? c->file_clusters - used : 0;
    uint64_t end = qed_space_end(c->seen);
    bool sound = !c->res->corruptions && !c->res->check_errors;
    c->res->leaks = leaks;
    if ((c->opts->fix & BDRV_FIX_LEAKS) && sound && c->file_clusters > end) {
        qed_space_forget(c->s);
        int ret = qed_cut_file(c->bs);
        if (ret < 0) {
            report_io(c, end << c->s->cluster_bits, ret, "Could not cut the file");
            return;
        }
        int64_t length = bdrv_getlength(c->bs->file->bs); /* devices stay as they are */
        if (length >= 0 && (uint64_t)length >> c->s->cluster_bits <= end) {
            c->res->leaks_fixed = c->file_clusters - end;
            c->res->leaks -= c->res->leaks_fixed;
        }
    }
}

/* Invariant 2. */
static int finish_repair(QedCheck *c)
{
    int ret = qed_flush(c->bs);
    qed_space_forget(c->s);
    if (ret == 0) {
        check_leaks(c);
    }
    bool sound = !c->res->corruptions && !c->res->check_errors;
    if (ret < 0 || !sound || !qed_needs_check(c->s)) {
        return ret;
    }
    ret = qed_finish_shrink(c->bs);
    return ret < 0 ? ret : qed_set_need_check(c->bs, false);
}

static int run(QedCheck *c)
{
    int64_t length = bdrv_getlength(c->bs->file->bs);
    int ret = length < 0 ? (int)length : c->opts->fix ? qed_begin_change(c->bs) : 0;
    if (ret < 0) {
        return ret;
    }
    c->file_clusters = (uint64_t)length >> c->s->cluster_bits;
    c->res->total_clusters = qed_round_up(c->s, atomic_load(&c->s->image_size)) >>
                             c->s->cluster_bits;
    ret = walk(c);
    if (ret == 0 && c->opts->fix) {
        return finish_repair(c);
    }
    check_leaks(c);
    return ret;
}

bool qed_check(BlockDriverState *bs, const BdrvCheckOptions *opts, BdrvCheckResult *result,
               GError **errp)
{
    *result = (BdrvCheckResult){0};
    QedCheck c = {.bs = bs, .s = qed_state(bs), .opts = opts, .res = result,
                  .seen = qed_space_new()};
    int ret = run(&c);
    qed_space_free(c.seen);
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Could not check the image");
    }
    return ret == 0;
}
