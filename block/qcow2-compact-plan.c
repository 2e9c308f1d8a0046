/*
 * What a shrink moves towards the front of the file, and where to: the plan.
 *
 *   counts     [ uu.u..uu | uuss.u.uu...uuu.uuu ]     u: in use  s: spare (just freed)  .: free
 *                         ^floor              ^now     floor: as many clusters as are in use
 *   references           t  d  dd      cc d Xdd        d: data  t: L2 table  cc: streams in both
 *   end                                    ^           behind the last cluster that stays (X)
 *
 * 1. The counts tell what is in use.  Refcount blocks for what lies behind the floor do not count:
 *    they go with it.  If nothing else is in use behind the floor, that is all.
 * 2. Is it worth it?  Moving takes the time of what is copied, and of a seek or two for each gap in
 *    it, which counts as 256 KiB more (short gaps as less).  The file is to end at the lowest place
 *    for which that is at most 5/4 of what the file becomes shorter by; or at the floor if that
 *    takes little in any case.  Less than 1/16 of the file (1/256 if it is easy) is not worth the
 *    barriers.  So a large extent moves, and so do few clusters far out; what lies densely
 *    scattered stays, with its holes.
 * 3. All trees are walked for references to clusters behind the floor.  Those for which as many
 *    were found as their count says can move; neighbours that share a stream, or belong to one
 *    table, as one unit.  What was not found, or only in part, stays, and the file cannot end
 *    before it. That may make moving the rest not worth it any more.
 *    What names parts of snapshots and bitmaps (qcow2-compact-parts.c) is written anew when they
 *    move: the end leaves room for it.
 * 4. Units behind the end get places in gaps before it, those of several clusters first, from the
 *    last one down: one that finds room in a row only behind the end, or none, moves the end.
 *
 * Invariants
 *  1. Places are free or spare clusters below the end, so the file never grows; each is given away
 *     once.
 *  2. All units that lie behind the end, and only those, have a place: nothing is copied that does
 *     not make the file shorter.
 *
 * Memory: 24 to 48 bytes for each cluster to be moved, and for each run of clusters in use.
 *
 * Not moved, on purpose:
 *   data in an image with LUKS        its cipher's text depends on the place in the file
 *   L2 tables that several share          what names them cannot be changed at once
 *   the LUKS area, what is not known      they lie in front, mostly
 *   what has more counts than references, or others than its count
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-compact.h"

#include <stdlib.h>

#include "block/qcow2-refcount-int.h"

enum { MAX_GAPS_TRIED = 4096 }; /* for each unit of several clusters */
#define GAP_COSTS (UINT64_C(256) << 10)   /* bytes; of a gap of a quarter of them, or longer */
#define ALWAYS_WORTH (UINT64_C(64) << 20) /* bytes of cost that are never too many */

void qcow2_move_plan_init(Qcow2MovePlan *p, BlockDriverState *bs, const GArray *spare)
{
    *p = (Qcow2MovePlan){
        .bs = bs, .s = qcow2_state(bs), .spare = spare,
        .uses = g_array_new(false, false, sizeof(Qcow2MoveUse)),
        .blocks = g_array_new(false, false, sizeof(Qcow2MoveRef)),
        .clusters = g_array_new(false, false, sizeof(Qcow2MoveCluster)),
        .refs = g_array_new(false, false, sizeof(Qcow2MoveRef)),
        .parts = g_array_new(false, false, sizeof(Qcow2Part)),
        .units = g_array_new(false, false, sizeof(Qcow2MoveUnit)),
        .gaps = g_array_new(false, false, sizeof(Qcow2MoveUse)),
    };
}

void qcow2_move_plan_clear(Qcow2MovePlan *p)
{
    GArray **arrays[] = {&p->uses, &p->blocks, &p->clusters, &p->refs, &p->parts, &p->units,
                         &p->gaps};
    for (size_t i = 0; i < G_N_ELEMENTS(arrays); i++) {
        g_clear_pointer(arrays[i], g_array_unref);
    }
}

static Qcow2MoveUnit *unit_at(const Qcow2MovePlan *p, guint i)
{
    return &g_array_index(p->units, Qcow2MoveUnit, i);
}

/* ---------------------------------------------------------------- counts */

static void append_use(GArray *uses, uint64_t first, uint64_t n, uint64_t count)
{
    Qcow2MoveUse *last = uses->len ? &g_array_index(uses, Qcow2MoveUse, uses->len - 1) : NULL;
    if (last && last->first + last->n == first && last->count == count) {
        last->n += n;
    } else if (n) {
        g_array_append_val(uses, ((Qcow2MoveUse){first, n, count}));
    }
}

/* The spare runs, from the one that ends behind cluster @first on; *pos only ever rises. */
static bool next_spare(const Qcow2MovePlan *p, guint *pos, uint64_t first, Qcow2MoveUse *ret)
{
    for (; *pos < p->spare->len; ++*pos) {
        const Qcow2HostRun *run = &g_array_index(p->spare, Qcow2HostRun, *pos);
        *ret = (Qcow2MoveUse){run->offset >> p->s->cluster_bits, run->bytes >> p->s->cluster_bits,
                              0};
        if (ret->first + ret->n > first) {
            return true;
        }
    }
    return false;
}

/* Clusters [first, +n) have @count; spare ones among them are not in use. */
static void add_use(Qcow2MovePlan *p, uint64_t first, uint64_t n, uint64_t count, guint *spare_pos)
{
    uint64_t end = first + n;
    Qcow2MoveUse spare;
    while (first < end) {
        bool some = next_spare(p, spare_pos, first, &spare) && spare.first < end;
        uint64_t stop = some ? MAX(spare.first, first) : end;
        append_use(p->uses, first, stop - first, count);
        p->used += stop - first;
        first = some ? spare.first + spare.n : end;
    }
}

static int scan_block(Qcow2MovePlan *p, uint64_t index, guint *spare_pos)
{
    const BDRVQcow2State *s = p->s;
    uint64_t start = index << s->refblock_bits, end = start + qcow2_counts_per_block(s);
    for (uint64_t pos = start, count, bytes; pos < end; pos += bytes >> s->cluster_bits) {
        int ret = qcow2_count_run(p->bs, pos << s->cluster_bits, (end - pos) << s->cluster_bits,
                                  &count, &bytes);
        if (ret < 0) {
            return ret;
        }
        if (count) {
            add_use(p, pos, bytes >> s->cluster_bits, count, spare_pos);
        }
    }
    return 0;
}

/* References of the refcount table to its blocks; *ret_nb: entries in use. */
static void collect_blocks(Qcow2MovePlan *p, uint64_t *ret_nb)
{
    BDRVQcow2State *s = p->s;
    QB_GUARD(&s->alloc_lock);
    *ret_nb = s->reftable.nb_blocks;
    for (uint64_t i = 0; i < *ret_nb; i++) {
        uint64_t offset = qcow2_block_offset_locked(s, i);
        Qcow2MoveRef ref = {.cluster = offset >> s->cluster_bits, .where = i, .n = 1,
                            .kind = QCOW2_MOVE_BLOCK};
        if (offset) {
            g_array_append_val(p->blocks, ref);
        }
    }
}

static int scan_counts(Qcow2MovePlan *p)
{
    uint64_t nb, per_block = qcow2_counts_per_block(p->s);
    guint spare_pos = 0, next = 0;
    int ret = 0;
    collect_blocks(p, &nb);
    for (uint64_t i = 0; i < nb && ret == 0; i++) {
        if (next < p->blocks->len && g_array_index(p->blocks, Qcow2MoveRef, next).where == i) {
            ret = scan_block(p, i, &spare_pos);
            next++;
        } else {
            append_use(p->uses, i * per_block, per_block, 0);
        }
    }
    return ret;
}

/* Blocks that count nothing any more when nothing lies at or behind cluster @end. */
static bool block_goes(const Qcow2MovePlan *p, const Qcow2MoveRef *block, uint64_t end)
{
    return block->where << p->s->refblock_bits >= end;
}

/* Where the file could end: blocks that go make it shorter, by which more may go. */
static uint64_t ideal_end(const Qcow2MovePlan *p)
{
    uint64_t end = p->used, goes;
    do {
        goes = 0;
        for (guint i = 0; i < p->blocks->len; i++) {
            goes += block_goes(p, &g_array_index(p->blocks, Qcow2MoveRef, i), end);
        }
        if (p->used - goes == end) {
            return end;
        }
        end = p->used - goes;
    } while (true);
}

/* ---------------------------------------------------------------- clusters behind the floor */

static void add_clusters(Qcow2MovePlan *p, const Qcow2MoveUse *use)
{
    for (uint64_t i = MAX(use->first, p->floor); i < use->first + use->n; i++) {
        Qcow2MoveCluster c = {.cluster = i, .count = (uint32_t)MIN(use->count, UINT32_MAX)};
        g_array_append_val(p->clusters, c);
    }
}

static int compare_clusters(const void *key, const void *element)
{
    uint64_t cluster = *(const uint64_t *)key;
    const Qcow2MoveCluster *c = element;
    return cluster < c->cluster ? -1 : cluster > c->cluster;
}

static Qcow2MoveCluster *find_cluster(const Qcow2MovePlan *p, uint64_t cluster)
{
    return p->clusters->len ? bsearch(&cluster, p->clusters->data, p->clusters->len,
                                      sizeof(Qcow2MoveCluster), compare_clusters)
                            : NULL;
}

/* Drops the blocks that go: nobody moves them, and they keep nothing where it is. */
static void drop_blocks_that_go(Qcow2MovePlan *p)
{
    guint kept = 0;
    for (guint i = 0; i < p->blocks->len; i++) {
        const Qcow2MoveRef *block = &g_array_index(p->blocks, Qcow2MoveRef, i);
        bool goes = block_goes(p, block, p->floor);
        Qcow2MoveCluster *c = goes ? find_cluster(p, block->cluster) : NULL;
        if (c) {
            c->found = UINT32_MAX;
        }
    }
    for (guint i = 0; i < p->clusters->len; i++) {
        Qcow2MoveCluster c = g_array_index(p->clusters, Qcow2MoveCluster, i);
        if (c.found != UINT32_MAX) {
            g_array_index(p->clusters, Qcow2MoveCluster, kept++) = c;
        }
    }
    g_array_set_size(p->clusters, kept);
}

static void collect_clusters(Qcow2MovePlan *p)
{
    p->floor = ideal_end(p);
    for (guint i = 0; i < p->uses->len; i++) {
        const Qcow2MoveUse *use = &g_array_index(p->uses, Qcow2MoveUse, i);
        if (use->count && use->first + use->n > p->floor) {
            add_clusters(p, use);
        }
    }
    if (p->clusters->len) {
        drop_blocks_that_go(p);
    }
}

/* ---------------------------------------------------------------- worth it? */

static uint64_t cluster_at(const Qcow2MovePlan *p, guint i)
{
    return g_array_index(p->clusters, Qcow2MoveCluster, i).cluster;
}

/* Where the file could end if clusters[i] moved, and all behind it: behind the one before. */
static uint64_t end_before(const Qcow2MovePlan *p, guint i)
{
    return i > 0 ? MAX(cluster_at(p, i - 1) + 1, p->end) : p->end;
}

/* Raises the end, from which on all is to move, to the lowest place for which that is worth it. */
static void raise_end_to_worth(Qcow2MovePlan *p)
{
    uint64_t cost = 0, best = p->now, bytes = p->s->cluster_size;
    for (guint i = p->clusters->len; i > 0 && cluster_at(p, i - 1) >= p->end; i--) {
        uint64_t end = end_before(p, i - 1), gap = cluster_at(p, i - 1) - end;
        cost += bytes + MIN(GAP_COSTS, gap * bytes * 4); /* a short way is no seek */
        if (cost <= (p->now - end) * bytes / 4 * 5) {
            best = end;
        }
    }
    bool easy = cost <= ALWAYS_WORTH;
    best = easy ? p->end : best;
    p->end = (p->now - best) * (easy ? 256 : 16) < p->now ? p->now : best;
}

/* What lies before the end is not looked at any more. */
static void forget_what_stays(Qcow2MovePlan *p)
{
    guint n = 0;
    while (n < p->clusters->len && cluster_at(p, n) < p->end) {
        n++;
    }
    g_array_remove_range(p->clusters, 0, n);
    p->floor = p->end;
}

/* ---------------------------------------------------------------- references */

static void add_ref(Qcow2MovePlan *p, Qcow2MoveRef ref)
{
    if (ref.n && ref.cluster + ref.n > p->floor) {
        g_array_append_val(p->refs, ref);
    }
}

bool qcow2_move_ref_of_entry(const BDRVQcow2State *s, Qcow2L2Entry e, Qcow2MoveRef *ref)
{
    uint64_t offset = qcow2_entry_host(e), bytes = s->cluster_size;
    if (qcow2_entry_is_compressed(e)) {
        uint32_t len;
        qcow2_parse_compressed(s, e.entry, &offset, &len);
        bytes = len;
    } else if (!offset || qcow2_offset_into_cluster(s, offset)) {
        return false;
    }
    ref->cluster = offset >> s->cluster_bits;
    ref->n = (uint32_t)(((offset + bytes - 1) >> s->cluster_bits) + 1 - ref->cluster);
    return true;
}

/* A walk over one tree. */
typedef struct Visit {
    Qcow2MovePlan *p;
    bool detached;
} Visit;

static int visit_table(const Qcow2WalkTable *t, void *opaque)
{
    const Visit *v = opaque;
    const BDRVQcow2State *s = v->p->s;
    uint64_t offset = t->l1_entry & QCOW2_ENTRY_OFFSET_MASK;
    if (!t->be) {
        return t->error;
    }
    if (!v->detached && (t->l1_entry & QCOW2_ENTRY_COPIED)) {
        add_ref(v->p, (Qcow2MoveRef){.cluster = offset >> s->cluster_bits, .where = t->l1_index,
                                     .n = 1, .kind = QCOW2_MOVE_TABLE});
    }
    if (s->has_data_file || s->crypt_method == QCOW2_CRYPT_LUKS) {
        return 0;
    }
    Qcow2MoveRef ref = {.where = v->detached ? offset : t->l1_index, .kind = QCOW2_MOVE_ENTRIES,
                        .detached = v->detached};
    for (ref.index = 0; ref.index < s->l2_entries; ref.index++) {
        const uint8_t *raw = (const uint8_t *)t->be + (size_t)ref.index * s->l2_entry_size;
        if (qcow2_move_ref_of_entry(s, qcow2_entry_decode(s, raw), &ref)) {
            add_ref(v->p, ref);
        }
    }
    return 0;
}

/* The guard of snapshots' tables lets nobody write to them, where it was asked for. */
static int visit_snapshots(Qcow2MovePlan *p)
{
    Visit v = {p, true};
    int ret = 0;
    if (p->s->overlap_check & QCOW2_OL_INACTIVE_L2) {
        return 0;
    }
    for (guint i = 0; i < p->s->snapshots->len && ret == 0; i++) {
        const Qcow2Snapshot *sn = &g_array_index(p->s->snapshots, Qcow2Snapshot, i);
        g_autofree uint64_t *be = qcow2_snapshot_read_l1(p->bs, sn, NULL);
        Qcow2WalkSource src = {.be_l1 = be, .l1_size = sn->l1_size};
        ret = be ? qcow2_walk_tables(p->bs, &src, 0, INT64_MAX, visit_table, &v) : -EIO;
    }
    return ret;
}

static void add_tables(Qcow2MovePlan *p)
{
    BDRVQcow2State *s = p->s;
    uint64_t l1_bytes = (uint64_t)qcow2_l1_size(s) * sizeof(uint64_t);
    add_ref(p, (Qcow2MoveRef){.cluster = qcow2_l1_table_offset(s) >> s->cluster_bits,
                              .n = (uint32_t)qcow2_size_to_clusters(s, l1_bytes),
                              .kind = QCOW2_MOVE_L1});
    for (guint i = 0; i < p->blocks->len; i++) {
        const Qcow2MoveRef *block = &g_array_index(p->blocks, Qcow2MoveRef, i);
        if (!block_goes(p, block, p->floor)) {
            add_ref(p, *block);
        }
    }
    QB_GUARD(&s->alloc_lock);
    add_ref(p, (Qcow2MoveRef){.cluster = s->reftable.offset >> s->cluster_bits,
                              .n = s->reftable.clusters, .kind = QCOW2_MOVE_REFTABLE});
}

static void add_parts(Qcow2MovePlan *p, Qcow2MoveKind kind,
                      void (*list)(BlockDriverState *bs, uint64_t floor, GArray *parts))
{
    guint first = p->parts->len;
    list(p->bs, p->floor << p->s->cluster_bits, p->parts);
    for (guint i = first; i < p->parts->len; i++) {
        const Qcow2Part *part = &g_array_index(p->parts, Qcow2Part, i);
        add_ref(p, (Qcow2MoveRef){.cluster = part->offset >> p->s->cluster_bits,
                                  .n = (uint32_t)(part->bytes >> p->s->cluster_bits),
                                  .kind = kind});
    }
}

static gint by_cluster(gconstpointer a, gconstpointer b)
{
    const Qcow2MoveRef *ra = a, *rb = b;
    return ra->cluster < rb->cluster ? -1 : ra->cluster > rb->cluster;
}

static int collect_refs(Qcow2MovePlan *p)
{
    Visit active = {p, false};
    add_tables(p);
    add_parts(p, QCOW2_MOVE_SNAPSHOTS, qcow2_snapshots_parts);
    add_parts(p, QCOW2_MOVE_BITMAPS, qcow2_bitmaps_parts);
    int ret = qcow2_walk_tables(p->bs, NULL, 0, INT64_MAX, visit_table, &active);
    ret = ret < 0 ? ret : visit_snapshots(p);
    g_array_sort(p->refs, by_cluster);
    return ret;
}

/* ---------------------------------------------------------------- units */

/* Two kinds in one cluster: the image is damaged, it stays. */
static void count_ref(const Qcow2MovePlan *p, const Qcow2MoveRef *ref)
{
    bool stuck = false;
    for (uint64_t i = 0; i < ref->n; i++) {
        stuck |= !find_cluster(p, ref->cluster + i);
    }
    for (uint64_t i = 0; i < ref->n; i++) {
        Qcow2MoveCluster *c = find_cluster(p, ref->cluster + i);
        if (c) {
            c->stuck |= stuck || (c->found && c->kind != ref->kind);
            c->kind = ref->kind;
            c->found++;
            c->joined |= i + 1 < ref->n && !stuck;
        }
    }
}

static bool can_move(const Qcow2MoveCluster *c)
{
    bool is_part = c->kind == QCOW2_MOVE_SNAPSHOTS || c->kind == QCOW2_MOVE_BITMAPS;
    return !c->stuck && c->found == c->count && (!is_part || c->count == 1);
}

/* The first of the references, from number @pos on, that begins at or behind @cluster. */
static guint ref_from(const Qcow2MovePlan *p, guint pos, uint64_t cluster)
{
    while (pos < p->refs->len && g_array_index(p->refs, Qcow2MoveRef, pos).cluster < cluster) {
        pos++;
    }
    return pos;
}

/* The unit that begins with clusters[first]; the number of them. */
static guint add_unit(Qcow2MovePlan *p, guint first, guint *ref_pos)
{
    const Qcow2MoveCluster *c = &g_array_index(p->clusters, Qcow2MoveCluster, first);
    Qcow2MoveUnit u = {.from = c->cluster, .first_cluster = first, .kind = c->kind};
    bool movable = true;
    do {
        movable &= can_move(&c[u.n]) && c[u.n].kind == u.kind;
    } while (c[u.n++].joined);
    u.first_ref = ref_from(p, *ref_pos, u.from);
    *ref_pos = ref_from(p, u.first_ref, u.from + u.n);
    u.nb_refs = *ref_pos - u.first_ref;
    if (movable) {
        g_array_append_val(p->units, u);
    } else {
        p->end = MAX(p->end, u.from + u.n);
    }
    return (guint)u.n;
}

/* Units before the end stay; one that reaches over it does, too. */
static void drop_units_before_end(Qcow2MovePlan *p)
{
    guint kept = 0;
    for (guint i = 0; i < p->units->len; i++) {
        Qcow2MoveUnit u = *unit_at(p, i);
        if (u.from >= p->end) {
            *unit_at(p, kept++) = u;
        } else {
            p->end = MAX(p->end, u.from + u.n);
        }
    }
    g_array_set_size(p->units, kept);
}

/* What names moving parts is written anew, also where it lies before the end. */
static void leave_room_for_parts(Qcow2MovePlan *p)
{
    uint64_t bytes = qcow2_parts_taken_along(p->parts, p->end << p->s->cluster_bits);
    p->end += bytes >> p->s->cluster_bits;
    drop_units_before_end(p);
}

static void make_units(Qcow2MovePlan *p)
{
    guint ref_pos = 0;
    for (guint i = 0; i < p->refs->len; i++) {
        count_ref(p, &g_array_index(p->refs, Qcow2MoveRef, i));
    }
    for (guint i = 0; i < p->clusters->len; i += add_unit(p, i, &ref_pos)) {
    }
    raise_end_to_worth(p);
    drop_units_before_end(p);
    leave_room_for_parts(p);
}

/* ---------------------------------------------------------------- places */

/* What is not in use, spare clusters included, is a gap; cluster 0 never is. */
static void collect_gaps(Qcow2MovePlan *p)
{
    uint64_t pos = 1;
    for (guint i = 0; i < p->uses->len; i++) {
        const Qcow2MoveUse *use = &g_array_index(p->uses, Qcow2MoveUse, i);
        if (use->first > pos) {
            append_use(p->gaps, pos, use->first - pos, 0);
        }
        pos = MAX(pos, use->first + use->n);
    }
}

/* The first @n in a row before @limit; 0: there are none. *from: no gap before it is worth
 * a look. */
static uint64_t take_gap(Qcow2MovePlan *p, uint64_t n, uint64_t limit, guint *from)
{
    guint end = MIN(p->gaps->len, *from + MAX_GAPS_TRIED);
    for (guint i = *from; i < end; i++) {
        Qcow2MoveUse *gap = &g_array_index(p->gaps, Qcow2MoveUse, i);
        if (gap->n >= n && gap->first + n <= limit) {
            uint64_t first = gap->first;
            gap->first += n;
            gap->n -= n;
            *from = i;
            return first;
        }
    }
    return 0;
}

/* From the last one down: if one stays, those before it need not move either. One that finds room
 * only behind the end, but before itself, moves the end. */
static void place_long_units(Qcow2MovePlan *p)
{
    guint from = 0;
    uint64_t last_n = 0;
    for (guint i = p->units->len; i > 0; i--) {
        Qcow2MoveUnit *u = unit_at(p, i - 1);
        if (u->n == 1) {
            continue;
        }
        from = u->n < last_n ? 0 : from;
        last_n = u->n;
        u->to = take_gap(p, u->n, u->from, &from);
        p->end = MAX(p->end, (u->to ? u->to : u->from) + u->n);
        if (!u->to) {
            break;
        }
    }
    drop_units_before_end(p);
}

static gint by_kind(gconstpointer a, gconstpointer b)
{
    const Qcow2MoveUnit *ua = a, *ub = b;
    if (ua->kind != ub->kind) {
        return ua->kind - ub->kind;
    }
    return ua->from < ub->from ? -1 : ua->from > ub->from;
}

/* Room for all there is, unless clusters have no refcount block: then the last ones go first. */
static void fit_single_units(Qcow2MovePlan *p)
{
    uint64_t room = 0;
    for (guint i = 0; i < p->gaps->len; i++) {
        const Qcow2MoveUse *gap = &g_array_index(p->gaps, Qcow2MoveUse, i);
        room += gap->first < p->end ? MIN(gap->n, p->end - gap->first) : 0;
    }
    for (guint i = p->units->len; i > 0; i--) {
        const Qcow2MoveUnit *u = unit_at(p, i - 1);
        if (u->n > 1) {
            continue;
        }
        if (room == 0) {
            p->end = u->from + 1;
            break;
        }
        room--;
    }
    drop_units_before_end(p);
}

/* In their order, so that what is contiguous stays so. */
static void place_single_units(Qcow2MovePlan *p)
{
    guint from = 0;
    fit_single_units(p);
    g_array_sort(p->units, by_kind);
    for (guint i = 0; i < p->units->len; i++) {
        Qcow2MoveUnit *u = unit_at(p, i);
        while (u->n == 1 && !u->to && from < p->gaps->len) {
            guint at = from;
            u->to = take_gap(p, 1, p->end, &at);
            from = u->to ? at : from + MAX_GAPS_TRIED;
        }
    }
}

int qcow2_move_plan_make(Qcow2MovePlan *p)
{
    int ret = scan_counts(p);
    if (ret < 0) {
        return ret;
    }
    collect_clusters(p);
    p->end = p->floor;
    if (p->clusters->len == 0) {
        return 0;
    }
    p->now = cluster_at(p, p->clusters->len - 1) + 1;
    raise_end_to_worth(p);
    forget_what_stays(p);
    if (p->end == p->now) {
        return 0;
    }
    ret = collect_refs(p);
    if (ret < 0) {
        return ret;
    }
    make_units(p);
    if (p->end < p->now) {
        collect_gaps(p);
        place_long_units(p);
        place_single_units(p);
    }
    return 0;
}
