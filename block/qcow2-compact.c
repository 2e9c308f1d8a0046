/*
 * Compaction: what lies at the end of the image file moves into free clusters before it, so that a
 * shrink makes the file really short.
 *
 *     plan (qcow2-compact-plan.c)
 *     step, 16 MiB at a time     nobody writes meanwhile:
 *         take the places, copy (qcow2-compact-copy.c), change the entries in memory, free the old
 *     flush after 1 GiB, and at the end
 *         barrier: copies, counts; entries; barrier; the old clusters are nobody's
 *     snapshots' table with L1s, bitmaps' directory with tables and bits (qcow2-compact-parts.c):
 *         take the places, copy, flush, one write of the header, free the old, flush
 *     the caller cuts the file once
 *
 * The clusters a shrink has just freed are the best places: they have a count already, and need not
 * be punched before they are written to.  So a shrink that moves does not pay for both.
 *
 * Who is in the way.  For a step the whole disk is in the range lock, beside what the truncation
 * holds: no request that changes data or entries is under way, and none begins.  Readers go on:
 * they see the old entry or the new one, and what they find by the old one stays until they have
 * left (quarantine).  The plan was made while others wrote, so each step looks again: a cluster
 * whose entries or count are not as planned stays.  A busy image may so end a little longer; the
 * caller may plan again.
 *
 * Invariants
 *  1. A copy is complete, and its place has its count, before an entry names it; the flush makes
 *     both stable before the entry is written (invariants 1 and 2 of the driver).
 *  2. A place is a cluster that no stable entry names: it was free, or freed by a flush that is
 *     done. The old cluster keeps its count until the new entry is stable and its readers have left
 *     (3).
 *  3. All entries that name a cluster change under one hold of the metadata lock, or none.  The
 *     count of the new cluster is that of the old one, so COPIED stays as it was (4).
 *  4. A table goes as a whole: the next flush writes it at its new place before anything names it
 *     (0).  So do snapshots' table and bitmaps' directory, each with all that moves of what it
 *     names.
 *  5. A step that fails gives its places back and leaves entries as they are.  A crash at any
 *     moment leaves leaks at most.
 *
 * Not done: moving without a shrink; giving space back before the end, so on a full disk moving
 * stops where holes would have to be filled.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-compact.h"

#include "block/qcow2-refcount-int.h"

#define STEP_BYTES (UINT64_C(16) << 20)
#define FLUSH_BYTES (UINT64_C(1) << 30)

typedef struct Compaction {
    BlockDriverState *bs;
    BDRVQcow2State *s;
    Qcow2MovePlan *p;
    GArray *spare;         /* Qcow2HostRun, sorted; borrowed */
    Qcow2DiscardType type; /* of what becomes free */
    Qcow2Copier *copier;   /* owned; NULL: not needed yet */
    uint64_t unflushed;    /* bytes moved since the last flush */
} Compaction;

static Qcow2MoveUnit *unit_at(const Compaction *c, guint i)
{
    return &g_array_index(c->p->units, Qcow2MoveUnit, i);
}

static const Qcow2MoveRef *ref_at(const Compaction *c, guint i)
{
    return &g_array_index(c->p->refs, Qcow2MoveRef, i);
}

static uint64_t bytes_of(const Compaction *c, uint64_t clusters)
{
    return clusters << c->s->cluster_bits;
}

static uint32_t planned_count(const Compaction *c, const Qcow2MoveUnit *u, uint64_t i)
{
    return g_array_index(c->p->clusters, Qcow2MoveCluster, u->first_cluster + (guint)i).count;
}

/* ---------------------------------------------------------------- places */

/* Takes [offset, +bytes) out of the run, in which it lies. */
static void cut_spare(GArray *spare, guint i, uint64_t offset, uint64_t bytes)
{
    Qcow2HostRun *run = &g_array_index(spare, Qcow2HostRun, i);
    Qcow2HostRun rest = {offset + bytes, run->offset + run->bytes - (offset + bytes)};
    if (offset == run->offset) {
        *run = rest;
        return;
    }
    run->bytes = offset - run->offset;
    if (rest.bytes) {
        g_array_insert_val(spare, i + 1, rest);
    }
}

/* Some bytes from @offset on, at most @bytes, with count 1; 0: they are no longer free. */
static uint64_t take_some(Compaction *c, uint64_t offset, uint64_t bytes)
{
    guint i = qcow2_runs_find(c->spare, offset);
    if (i < c->spare->len) {
        Qcow2HostRun run = g_array_index(c->spare, Qcow2HostRun, i);
        if (run.offset <= offset) {
            bytes = MIN(bytes, run.offset + run.bytes - offset);
            cut_spare(c->spare, i, offset, bytes);
            return bytes;
        }
        bytes = MIN(bytes, run.offset - offset);
    }
    return qcow2_alloc_at(c->bs, offset, bytes);
}

/* What was copied there is nobody's. */
static void give_back(Compaction *c, uint64_t offset, uint64_t bytes)
{
    if (bytes) {
        bdrv_pdiscard(c->bs->file, (int64_t)offset, (int64_t)bytes);
        qcow2_alloc_undo(c->bs, offset, bytes);
    }
}

static bool take_place(Compaction *c, const Qcow2MoveUnit *u)
{
    uint64_t offset = bytes_of(c, u->to), bytes = bytes_of(c, u->n), done = 0, n;
    for (; done < bytes; done += n) {
        n = take_some(c, offset + done, bytes - done);
        if (n == 0) {
            give_back(c, offset, done);
            return false;
        }
    }
    return true;
}

/* Adds to, or takes away from, the counts of the place what the unit has beyond 1. */
static int change_counts(Compaction *c, const Qcow2MoveUnit *u, int sign)
{
    int ret = 0;
    for (uint64_t i = 0; i < u->n && ret == 0; i++) {
        int more = (int)planned_count(c, u, i) - 1;
        Qcow2HostRun run = {bytes_of(c, u->to + i), c->s->cluster_size};
        ret = more > 0 ? qcow2_update_refcounts(c->bs, &run, 1, sign * more) : 0;
    }
    return ret;
}

static bool counts_as_planned(Compaction *c, const Qcow2MoveUnit *u)
{
    for (uint64_t i = 0; i < u->n; i++) {
        uint64_t count;
        if (qcow2_get_refcount(c->bs, u->from + i, &count) < 0 || count != planned_count(c, u, i)) {
            return false;
        }
    }
    return true;
}

/* 1: the place is ours, 0: it is no longer free, or -errno. */
static int claim_place(Compaction *c, const Qcow2MoveUnit *u)
{
    uint64_t to = bytes_of(c, u->to), bytes = bytes_of(c, u->n);
    if (!take_place(c, u)) {
        return 0;
    }
    int ret = qcow2_check_overlap(c->bs, QCOW2_OL_NONE, to, bytes);
    if (ret < 0) {
        give_back(c, to, bytes);
        return ret;
    }
    qcow2_streams_forget(c->s, to, bytes);
    return 1;
}

/* 1: the place is ours, 0: the unit stays, or -errno. */
static int prepare(Compaction *c, const Qcow2MoveUnit *u)
{
    return u->to && counts_as_planned(c, u) ? claim_place(c, u) : 0;
}

/* ---------------------------------------------------------------- units with entries: a step */

/* An entry to be changed. */
typedef struct Edit {
    Qcow2Table *table; /* pinned */
    const Qcow2MoveRef *ref;
    Qcow2MoveUnit *unit;
} Edit;

typedef struct Step {
    Compaction *c;
    guint first, end; /* units; those that stay get to = 0 */
    GArray *edits;
} Step;

static void edit_clear(void *opaque)
{
    Edit *edit = opaque;
    qcow2_cache_put(edit->table);
}

/* A unit that was prepared stays after all. */
static void abandon(Compaction *c, Qcow2MoveUnit *u)
{
    give_back(c, bytes_of(c, u->to), bytes_of(c, u->n));
    u->to = 0;
}

static int prepare_all(Step *st)
{
    int ret = 0;
    for (guint i = st->first; i < st->end; i++) {
        Qcow2MoveUnit *u = unit_at(st->c, i);
        int taken = ret < 0 ? 0 : prepare(st->c, u);
        u->to = taken > 0 ? u->to : 0;
        ret = MIN(ret, taken);
    }
    return MIN(ret, 0);
}

/* Qcow2MoveCopy of all that was prepared. */
static GArray *copies_of(const Step *st)
{
    const Compaction *c = st->c;
    GArray *list = g_array_new(false, false, sizeof(Qcow2MoveCopy));
    for (guint i = st->first; i < st->end; i++) {
        const Qcow2MoveUnit *u = unit_at(c, i);
        Qcow2MoveCopy copy = {bytes_of(c, u->from), bytes_of(c, u->to), bytes_of(c, u->n)};
        if (u->to) {
            g_array_append_val(list, copy);
        }
    }
    return list;
}

/* Where nothing is to last, nobody will read guest data either. */
static int copy_all(const Step *st)
{
    Compaction *c = st->c;
    g_autoptr(GArray) list = copies_of(st);
    uint8_t kind = unit_at(c, st->first)->kind;
    if (kind == QCOW2_MOVE_ENTRIES && (c->bs->open_flags & BDRV_O_TRIAL)) {
        return 0;
    }
    if (!c->copier) {
        c->copier = qcow2_copier_new(c->bs);
    }
    return c->copier ? qcow2_copier_run(c->copier, list, kind == QCOW2_MOVE_BITMAPS) : -ENOMEM;
}

static int pin_table(const Compaction *c, const Qcow2MoveRef *ref, Qcow2Table **ret)
{
    uint64_t l1_entry;
    if (ref->detached) {
        return qcow2_cache_get(c->s->cache, QCOW2_TABLE_L2, ref->where, ret);
    }
    return qcow2_get_active_table(c->bs, ref->where, &l1_entry, ret);
}

static int pin_tables(Step *st)
{
    for (guint i = st->first; i < st->end; i++) {
        Qcow2MoveUnit *u = unit_at(st->c, i);
        for (guint k = 0; u->to && k < u->nb_refs; k++) {
            Edit edit = {.ref = ref_at(st->c, u->first_ref + k), .unit = u};
            int ret = pin_table(st->c, edit.ref, &edit.table);
            if (ret < 0) {
                return ret;
            }
            g_array_append_val(st->edits, edit);
        }
    }
    return 0;
}

/* Does the entry name what it did when the plan was made? */
static bool load_entry(const BDRVQcow2State *s, const Edit *edit, Qcow2L2Entry *ret)
{
    uint8_t raw[16];
    Qcow2MoveRef now = {0};
    if (!edit->table || qcow2_table_poisoned(edit->table)) {
        return false;
    }
    qcow2_table_load(edit->table, (size_t)edit->ref->index * s->l2_entry_size, s->l2_entry_size,
                     raw);
    *ret = qcow2_entry_decode(s, raw);
    return qcow2_move_ref_of_entry(s, *ret, &now) && now.cluster == edit->ref->cluster &&
           now.n == edit->ref->n;
}

/* Host offsets are the low bits of entries of all kinds, and only become smaller. A table that the
 * active L1 shares with a snapshot is met twice, and changed once. */
static void store_entry_locked(BDRVQcow2State *s, const Edit *edit) QB_REQUIRES(s->lock)
{
    uint8_t raw[16];
    Qcow2L2Entry e;
    qb_mutex_assert_held(&s->lock);
    if (load_entry(s, edit, &e)) {
        e.entry -= (edit->unit->from - edit->unit->to) << s->cluster_bits;
        qcow2_entry_encode(s, e, raw);
        qcow2_table_store(edit->table, (size_t)edit->ref->index * s->l2_entry_size,
                          s->l2_entry_size, raw);
    }
}

/* Units with an entry that has changed stay: they are listed in @stay. */
static void switch_entries(Step *st, GPtrArray *stay)
{
    BDRVQcow2State *s = st->c->s;
    QB_GUARD(&s->lock);
    for (guint i = 0; i < st->edits->len; i++) {
        const Edit *edit = &g_array_index(st->edits, Edit, i);
        Qcow2L2Entry e;
        bool listed = stay->len && stay->pdata[stay->len - 1] == edit->unit;
        if (!listed && !load_entry(s, edit, &e)) {
            g_ptr_array_add(stay, edit->unit);
        }
    }
    guint next = 0; /* of stay, which is in the order of the edits */
    for (guint i = 0; i < st->edits->len; i++) {
        const Edit *edit = &g_array_index(st->edits, Edit, i);
        while (next < stay->len && (Qcow2MoveUnit *)stay->pdata[next] < edit->unit) {
            next++;
        }
        if (next >= stay->len || stay->pdata[next] != edit->unit) {
            store_entry_locked(s, edit);
        }
    }
}

/* As many times as it was referred to. */
static void free_old(Compaction *c, const Qcow2MoveUnit *u)
{
    for (uint64_t i = 0; i < u->n; i++) {
        for (uint32_t times = planned_count(c, u, i); times > 0; times--) {
            qcow2_free_run(c->bs, bytes_of(c, u->from + i), c->s->cluster_size, c->type);
        }
    }
}

static int raise_all(Step *st)
{
    for (guint i = st->first; i < st->end; i++) {
        int ret = unit_at(st->c, i)->to ? change_counts(st->c, unit_at(st->c, i), 1) : 0;
        if (ret < 0) {
            return ret; /* counts that are too high leak, and only when they cannot be read */
        }
    }
    return 0;
}

static int run_entries_prepared(Step *st)
{
    g_autoptr(GPtrArray) stay = g_ptr_array_new();
    int ret = copy_all(st);
    ret = ret < 0 ? ret : pin_tables(st);
    ret = ret < 0 ? ret : raise_all(st);
    if (ret < 0) {
        return ret;
    }
    switch_entries(st, stay);
    for (guint i = 0; i < stay->len; i++) {
        (void)change_counts(st->c, stay->pdata[i], -1);
        abandon(st->c, stay->pdata[i]);
    }
    for (guint i = st->first; i < st->end; i++) {
        if (unit_at(st->c, i)->to) {
            free_old(st->c, unit_at(st->c, i));
        }
    }
    return 0;
}

static void abandon_all(const Step *st)
{
    for (guint i = st->first; i < st->end; i++) {
        if (unit_at(st->c, i)->to) {
            abandon(st->c, unit_at(st->c, i));
        }
    }
}

static int run_entries(Compaction *c, guint first, guint end)
{
    Step st = {.c = c, .first = first, .end = end};
    g_autoptr(GArray) edits = g_array_new(false, false, sizeof(Edit));
    g_array_set_clear_func(edits, edit_clear);
    st.edits = edits;
    int ret = prepare_all(&st);
    ret = ret < 0 ? ret : run_entries_prepared(&st);
    if (ret < 0) {
        abandon_all(&st);
    }
    return ret;
}

/* ---------------------------------------------------------------- tables */

static int move_l2_table(Compaction *c, const Qcow2MoveUnit *u, uint64_t index)
{
    return qcow2_move_table(c->bs, index, bytes_of(c, u->from), bytes_of(c, u->to), c->type);
}

static int move_block(Compaction *c, const Qcow2MoveUnit *u, uint64_t index)
{
    BDRVQcow2State *s = c->s;
    qb_mutex_lock(&s->alloc_lock);
    bool there = qcow2_block_offset_locked(s, index) == bytes_of(c, u->from);
    qb_mutex_unlock(&s->alloc_lock);
    return there ? qcow2_refblock_move(c->bs, index, bytes_of(c, u->to), c->type) : QCOW2_STALE;
}

static int move_l1(Compaction *c, const Qcow2MoveUnit *u, uint64_t index)
{
    if (qcow2_l1_table_offset(c->s) != bytes_of(c, u->from)) {
        return QCOW2_STALE;
    }
    qcow2_l1_move(c->bs, bytes_of(c, u->to), c->type);
    return 0;
}

static int move_reftable(Compaction *c, const Qcow2MoveUnit *u, uint64_t index)
{
    BDRVQcow2State *s = c->s;
    qb_mutex_lock(&s->alloc_lock);
    bool there = s->reftable.offset == bytes_of(c, u->from) && s->reftable.clusters == u->n;
    qb_mutex_unlock(&s->alloc_lock);
    if (there) {
        qcow2_reftable_move(c->bs, bytes_of(c, u->to), c->type);
    }
    return there ? 0 : QCOW2_STALE;
}

/* One unit: a table with the one reference to it. */
static int run_table(Compaction *c, guint i)
{
    static int (*const movers[])(Compaction *c, const Qcow2MoveUnit *u, uint64_t index) = {
        [QCOW2_MOVE_TABLE] = move_l2_table,
        [QCOW2_MOVE_BLOCK] = move_block,
        [QCOW2_MOVE_L1] = move_l1,
        [QCOW2_MOVE_REFTABLE] = move_reftable,
    };
    Qcow2MoveUnit *u = unit_at(c, i);
    int ret = prepare(c, u);
    if (ret <= 0) {
        return ret;
    }
    ret = movers[u->kind](c, u, ref_at(c, u->first_ref)->where);
    if (ret != 0) {
        abandon(c, u);
    }
    return MIN(ret, 0);
}

/* ---------------------------------------------------------------- snapshots, bitmaps */

/* Takes @n clusters from the beginning of @gap; their offset, or 0: some are no longer free. */
static uint64_t take_from_gap(Compaction *c, Qcow2MoveUse *gap, uint64_t n)
{
    Qcow2MoveUnit u = {.to = gap->first, .n = n};
    gap->first += n;
    gap->n -= n;
    return claim_place(c, &u) > 0 ? bytes_of(c, u.to) : 0;
}

/* Clusters before the end that no unit goes to. */
static uint64_t more_room(void *opaque, uint64_t bytes)
{
    Compaction *c = opaque;
    uint64_t n = qcow2_size_to_clusters(c->s, bytes), offset = 0;
    for (guint i = 0; i < c->p->gaps->len && !offset; i++) {
        Qcow2MoveUse *gap = &g_array_index(c->p->gaps, Qcow2MoveUse, i);
        if (gap->n >= n && gap->first + n <= c->p->end) {
            offset = take_from_gap(c, gap, n);
        }
    }
    return offset;
}

/* What was changed in snapshots' L2 tables must be in the file to be copied. */
static int settle_tables(const Compaction *c, const Qcow2MoveUnit *u)
{
    bool dirty = u->kind == QCOW2_MOVE_SNAPSHOTS && qcow2_cache_dirty_bytes(c->s->cache);
    return dirty ? qcow2_flush(c->bs) : 0;
}

/* All of a kind at once: one write of the header switches to them. */
static int run_parts(Compaction *c, guint first, guint end)
{
    static int (*const movers[])(BlockDriverState *bs, Qcow2PartsMove *m) = {
        [QCOW2_MOVE_SNAPSHOTS] = qcow2_snapshots_move,
        [QCOW2_MOVE_BITMAPS] = qcow2_bitmaps_move,
    };
    Step st = {.c = c, .first = first, .end = end};
    int ret = settle_tables(c, unit_at(c, first));
    if (ret < 0) {
        return ret;
    }
    ret = prepare_all(&st);
    ret = ret < 0 ? ret : copy_all(&st);
    if (ret < 0) {
        abandon_all(&st);
        return ret;
    }
    g_autoptr(GArray) places = copies_of(&st);
    g_autoptr(GArray) extra = g_array_new(false, false, sizeof(Qcow2MoveCopy));
    Qcow2PartsMove move = {
        .places = places, .extra = extra, .more = more_room, .opaque = c, .type = c->type,
    };
    ret = places->len ? movers[unit_at(c, first)->kind](c->bs, &move) : 0;
    return MIN(ret, 0);
}

/* ---------------------------------------------------------------- all */

static bool is_part(const Qcow2MoveUnit *u)
{
    return u->kind == QCOW2_MOVE_SNAPSHOTS || u->kind == QCOW2_MOVE_BITMAPS;
}

/* Entries by steps, tables one by one, parts all at once. */
static guint step_end(const Compaction *c, guint first)
{
    const Qcow2MoveUnit *u = unit_at(c, first);
    uint64_t limit = is_part(u) ? UINT64_MAX : u->kind == QCOW2_MOVE_ENTRIES ? STEP_BYTES : 0;
    uint64_t clusters = 0;
    guint i = first;
    do {
        clusters += unit_at(c, i++)->n;
    } while (i < c->p->units->len && unit_at(c, i)->kind == u->kind &&
             bytes_of(c, clusters) < limit);
    return i;
}

static int run_units(Compaction *c, guint first, guint end)
{
    const Qcow2MoveUnit *u = unit_at(c, first);
    if (is_part(u)) {
        return run_parts(c, first, end);
    }
    return u->kind == QCOW2_MOVE_ENTRIES ? run_entries(c, first, end) : run_table(c, first);
}

/* Guests do not write to bitmaps in the image: these need no pause, however many they are. */
static int run_step(Compaction *c, guint first, guint end)
{
    bool pauses = unit_at(c, first)->kind != QCOW2_MOVE_BITMAPS;
    BdrvWritePause pause;
    if (pauses) {
        bdrv_truncate_pause_writes(c->bs, &pause);
    }
    int ret = run_units(c, first, end);
    if (pauses) {
        bdrv_truncate_resume_writes(&pause);
    }
    for (guint i = first; i < end; i++) {
        c->unflushed += unit_at(c, i)->to ? bytes_of(c, unit_at(c, i)->n) : 0;
    }
    return ret;
}

static int flush(Compaction *c)
{
    c->unflushed = 0;
    return qcow2_flush(c->bs);
}

static int run_all(Compaction *c)
{
    int ret = 0;
    for (guint first = 0, end; first < c->p->units->len && ret == 0; first = end) {
        end = step_end(c, first);
        ret = run_step(c, first, end);
        if (ret == 0 && (c->unflushed >= FLUSH_BYTES || qcow2_cache_half_dirty(c->s->cache))) {
            ret = flush(c);
        }
    }
    return ret == 0 && c->unflushed ? flush(c) : ret;
}

int qcow2_compact(BlockDriverState *bs, GArray *spare, uint64_t *ret_end)
{
    g_auto(Qcow2MovePlan) plan;
    qcow2_move_plan_init(&plan, bs, spare);
    Compaction c = {
        .bs = bs, .s = qcow2_state(bs), .p = &plan, .spare = spare,
        /* what is going to be cut off need not be punched */
        .type = bdrv_can_grow(bs->file->bs) ? QCOW2_DISCARD_NEVER : QCOW2_DISCARD_ALWAYS,
    };
    int ret = qcow2_move_plan_make(&plan);
    ret = ret < 0 ? ret : run_all(&c);
    qcow2_copier_free(c.copier);
    *ret_end = ret < 0 ? UINT64_MAX : bytes_of(&c, plan.end);
    return ret;
}

void qcow2_punch_free(BlockDriverState *bs, uint64_t start, uint64_t end)
{
    for (uint64_t pos = start, count, bytes; pos < end; pos += bytes) {
        if (qcow2_count_run(bs, pos, end - pos, &count, &bytes) < 0) {
            return;
        }
        uint64_t ours = count ? 0 : qcow2_alloc_at(bs, pos, bytes);
        if (ours) { /* nobody takes them before they are holes */
            bdrv_pdiscard(bs->file, (int64_t)pos, (int64_t)ours);
            qcow2_alloc_undo(bs, pos, ours);
            bytes = ours;
        }
    }
}
