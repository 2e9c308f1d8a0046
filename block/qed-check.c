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
 * Entries are cleared when all owners are known: to write to a table in whose clusters guest data
 * lie, because the entry of L1 that leads there is wrong, would destroy those.
 *
 * Invariants
 *  1. A check without repair writes nothing; a repair writes to a table only if no data share its
 *     clusters.
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

enum { MAX_REPAIRS = 1 << 20 }; /* at once; the rest stays for the next time */

/* An entry to be set to 0. */
typedef struct QedRepair {
    uint64_t table, index, entry;
} QedRepair;

typedef struct QedCheck {
    BlockDriverState *bs;
    BDRVQedState *s;
    const BdrvCheckOptions *opts;
    BdrvCheckResult *res;
    QedSpace *seen;
    QedSpace *tables;     /* first clusters of tables */
    QedSpace *shared;     /* clusters with two owners, of which one is data */
    GArray *repairs;      /* QedRepair */
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

/* How many of the clusters of [offset, +bytes) were there before. */
static uint64_t see(QedCheck *c, uint64_t offset, uint64_t bytes)
{
    const BDRVQedState *s = c->s;
    return qed_space_add(c->seen, offset >> s->cluster_bits, bytes >> s->cluster_bits);
}

static void report_invalid(QedCheck *c, const QedRepair *r, bool fixed)
{
    const char *name = r->table == c->s->l1_offset ? "L1" : "L2";
    BdrvCheckFinding f = {.kind = BDRV_FINDING_CORRUPTION, .code = "invalid-offset",
                          .offset = r->entry, .fixed = fixed};
    report(c, &f, "%s: %s table at offset 0x%" PRIx64 ", entry %" PRIu64 ": offset 0x%" PRIx64
           " is not in the image", fixed ? "Repairing" : "ERROR", name, r->table, r->index,
           r->entry);
}

/* It is repaired, or else told, at the end of a repair. */
static void invalid(QedCheck *c, const QedRepair *r)
{
    if ((c->opts->fix & BDRV_FIX_ERRORS) && c->repairs->len < MAX_REPAIRS) {
        g_array_append_vals(c->repairs, r, 1);
    } else {
        report_invalid(c, r, false);
    }
}

/* @n: clusters; each of them counts. */
static void two_owners(QedCheck *c, const QedRepair *r, uint64_t bytes, uint64_t n)
{
    const BDRVQedState *s = c->s;
    bool l1 = r->table == s->l1_offset;
    uint64_t first = r->entry >> s->cluster_bits;
    BdrvCheckFinding f = {.kind = BDRV_FINDING_CORRUPTION, .code = "two-owners",
                          .offset = r->entry};
    if (!l1 || !qed_space_has(c->tables, first)) {
        qed_space_add(c->shared, first, bytes >> s->cluster_bits);
    }
    report(c, &f, "ERROR: %s table at offset 0x%" PRIx64 ", entry %" PRIu64 ": offset 0x%" PRIx64
           " is referred to twice", l1 ? "L1" : "L2", r->table, r->index, r->entry);
    c->res->corruptions += n - 1;
}

/* What entry @index of the table at @table refers to. True when it may be used. */
static bool judge(QedCheck *c, uint64_t table, uint64_t index, uint64_t entry)
{
    bool l1 = table == c->s->l1_offset;
    uint64_t bytes = l1 ? c->s->table_bytes : c->s->cluster_size;
    QedRepair r = {table, index, entry};
    if (!qed_in_file(c->s, entry, bytes)) {
        invalid(c, &r);
        return false;
    }
    uint64_t again = see(c, entry, bytes);
    if (again) {
        two_owners(c, &r, bytes, again);
        return false;
    }
    if (l1) {
        qed_space_add(c->tables, entry >> c->s->cluster_bits, 1);
    }
    return true;
}

static int check_table(uint64_t l1_index, uint64_t entry, void *opaque)
{
    QedCheck *c = opaque;
    if (cancelled(c)) {
        return -ECANCELED;
    }
    return judge(c, c->s->l1_offset, l1_index, entry); /* invariant 3 */
}

static void check_data(QedCheck *c, const QedWalkPiece *piece, uint64_t index, uint64_t entry)
{
    c->res->allocated_clusters++;
    if (c->last_offset && entry != c->last_offset + c->s->cluster_size) {
        c->res->fragmented_clusters++;
    }
    c->last_offset = entry;
    judge(c, piece->table, index, entry);
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
    return cancelled(c) ? -ECANCELED : 0;
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

/* ---------------------------------------------------------------- repair */

static bool is_alone(const QedCheck *c, uint64_t table)
{
    const BDRVQedState *s = c->s;
    uint64_t first = table >> s->cluster_bits, n = s->table_bytes >> s->cluster_bits;
    bool shared = false;
    for (uint64_t i = first; i < first + n; i++) {
        shared |= qed_space_has(c->shared, i);
    }
    return !shared;
}

/* Sets an entry to 0 if it may be; 0 or -errno. */
static int repair_entry(QedCheck *c, const QedRepair *r)
{
    if (!is_alone(c, r->table)) {
        report_invalid(c, r, false);
        return 0;
    }
    int ret = qed_clear_entry(c->bs, r->table, r->index);
    if (ret < 0) {
        report_io(c, r->table, ret, "Could not change the table");
    }
    report_invalid(c, r, ret == 0);
    return qed_relieve(c->bs);
}

static int repair_entries(QedCheck *c)
{
    int ret = 0;
    for (guint i = 0; i < c->repairs->len && ret == 0; i++) {
        ret = repair_entry(c, &g_array_index(c->repairs, QedRepair, i));
    }
    return ret;
}

/* Whole clusters of @bytes of the file, in sectors as other programs see it. */
static uint64_t clusters_of(const QedCheck *c, int64_t bytes)
{
    return qb_align_up((uint64_t)bytes, BDRV_SECTOR_SIZE) >> c->s->cluster_bits;
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
        if (length >= 0 && clusters_of(c, length) <= end) {
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
    c->file_clusters = clusters_of(c, length);
    c->res->total_clusters = qed_round_up(c->s, atomic_load(&c->s->image_size)) >>
                             c->s->cluster_bits;
    ret = walk(c);
    if (ret == 0 && c->opts->fix) {
        ret = repair_entries(c);
        return ret < 0 ? ret : finish_repair(c);
    }
    check_leaks(c);
    return ret;
}

bool qed_check(BlockDriverState *bs, const BdrvCheckOptions *opts, BdrvCheckResult *result,
               GError **errp)
{
    *result = (BdrvCheckResult){0};
    QedCheck c = {.bs = bs, .s = qed_state(bs), .opts = opts, .res = result,
                  .seen = qed_space_new(), .tables = qed_space_new(),
                  .shared = qed_space_new(),
                  .repairs = g_array_new(false, false, sizeof(QedRepair))};
    int ret = run(&c);
    qed_space_free(c.seen);
    qed_space_free(c.tables);
    qed_space_free(c.shared);
    g_array_unref(c.repairs);
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Could not check the image");
    }
    return ret == 0;
}
