/*
 * Another width of refcounts: a second refcount structure beside the first, then one write.
 *
 *     old table -> [16 bit][16 bit]...            counts   o o o n n n ...
 *     new table -> [1 bit ............]                    . . . n n n      o: old structure
 *        ^                                                                  n: new structure
 *        `-- header: table, clusters, order, dirty bit off: one write of one sector
 *
 *     1 flush; every count fits the new width?            nothing has changed yet
 *     2 dirty bit, stable (version 3)
 *     3 allocate blocks and table for the new counts, by the old ones; flush
 *     4 write the new blocks and the table; barrier
 *     5 header                                            <- done
 *     6 memory reads the new structure; the file is cut where the old one lay at its end
 *
 * Invariants
 *  1. The old structure stays whole and true until the header's write: a crash before it leaves the
 *     new structure's clusters as leaks, which the next writable open gives back because of the
 *     dirty bit, and running again needs nothing of what was there.
 *  2. In the new structure the old one's clusters have no count; nobody reuses them before the
 *     header's write is stable (invariant 3 of the driver).
 *  3. COPIED stays true: counts of what the map refers to do not change (invariant 4).
 *  4. When memory cannot follow the header, the node refuses further I/O.
 *
 * New blocks need counts themselves, which may need further blocks, and so may what the allocation
 * does to the old structure: allocate() repeats until nothing is missing.
 *
 * Not done: ranges are not kept sparse below a block; a block with any count is written whole.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-amend.h"

#include <inttypes.h>
#include <string.h>

#define MAX_BLOCKS (QCOW2_MAX_REFTABLE_BYTES / sizeof(uint64_t))

typedef struct Width {
    BlockDriverState *bs;
    BDRVQcow2State *s;
    QbProgress *progress;
    unsigned order, block_bits; /* the new ones */
    uint64_t max;
    bool *needed;               /* by new block: has counts that are not 0 */
    uint64_t nb_needed, end;    /* how many, and one more than the last */
    GArray *runs;               /* Qcow2HostRun: clusters for new blocks */
    uint64_t got;               /* clusters in them */
    Qcow2HostRun table;
    GArray *old;                /* uint64_t: clusters of the old structure, sorted */
    uint64_t *be_entries;       /* the new table, as long as its clusters */
} Width;

static void width_clear(Width *w)
{
    g_free(w->needed);
    g_free(w->be_entries);
    g_clear_pointer(&w->runs, g_array_unref);
    g_clear_pointer(&w->old, g_array_unref);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Width, width_clear)

static bool fail_errno(GError **errp, int err)
{
    qb_error_set_errno(errp, err, "Could not change the refcount width");
    return false;
}

static uint64_t nb_old_blocks(BDRVQcow2State *s)
{
    QB_GUARD(&s->alloc_lock);
    return s->reftable.nb_blocks;
}

/* ---------------------------------------------------------------- looking at counts */

static bool need_block(Width *w, uint64_t index, GError **errp)
{
    if (index >= MAX_BLOCKS) {
        qb_error_set(errp, EFBIG, "The refcount table would become too large");
        return false;
    }
    w->nb_needed += !w->needed[index];
    w->needed[index] = true;
    w->end = MAX(w->end, index + 1);
    return true;
}

static bool need_blocks(Width *w, uint64_t cluster, uint64_t n, GError **errp)
{
    uint64_t last = (cluster + n - 1) >> w->block_bits;
    for (uint64_t i = cluster >> w->block_bits; i <= last; i++) {
        if (!need_block(w, i, errp)) {
            return false;
        }
    }
    return true;
}

static bool note_run(Width *w, uint64_t cluster, uint64_t n, uint64_t count, GError **errp)
{
    if (count > w->max) {
        qb_error_set(errp, EINVAL,
                     "Cannot decrease refcount entry width to %u bits: Cluster at offset %#" PRIx64
                     " has a refcount of %" PRIu64, 1u << w->order, cluster << w->s->cluster_bits,
                     count);
        return false;
    }
    return !count || need_blocks(w, cluster, n, errp);
}

/* Step 1: which new blocks there will be, and whether all counts fit. */
static bool survey(Width *w, GError **errp)
{
    uint64_t block_bytes = UINT64_C(1) << (w->s->refblock_bits + w->s->cluster_bits);
    uint64_t blocks = nb_old_blocks(w->s);
    qb_progress_grow(w->progress, blocks);
    for (uint64_t i = 0; i < blocks; i++) {
        for (uint64_t pos = 0, n, count; pos < block_bytes; pos += n) {
            uint64_t offset = i * block_bytes + pos;
            int ret = qcow2_count_run(w->bs, offset, block_bytes - pos, &count, &n);
            if (ret < 0) {
                return fail_errno(errp, ret);
            }
            if (!note_run(w, offset >> w->s->cluster_bits, n >> w->s->cluster_bits, count, errp)) {
                return false;
            }
        }
        qb_progress_add(w->progress, 1);
        if (!qcow2_amend_go_on(w->progress, errp)) {
            return false;
        }
    }
    return true;
}

/* ---------------------------------------------------------------- room */

static bool allocate_blocks(Width *w, GError **errp)
{
    while (w->got < w->nb_needed) {
        uint64_t bytes = (w->nb_needed - w->got) << w->s->cluster_bits;
        int64_t offset = qcow2_alloc_run(w->bs, 0, &bytes);
        if (offset < 0) {
            return fail_errno(errp, (int)offset);
        }
        g_array_append_val(w->runs, ((Qcow2HostRun){(uint64_t)offset, bytes}));
        w->got += bytes >> w->s->cluster_bits;
        if (!need_blocks(w, (uint64_t)offset >> w->s->cluster_bits, bytes >> w->s->cluster_bits,
                         errp)) {
            return false;
        }
    }
    return true;
}

/* A table for what is needed by now; one that has become too short is given back. */
static bool allocate_table(Width *w, GError **errp)
{
    uint64_t bytes = qb_align_up(w->end * sizeof(uint64_t), w->s->cluster_size);
    if (bytes <= w->table.bytes) {
        return true;
    }
    if (w->table.bytes) {
        qcow2_alloc_undo(w->bs, w->table.offset, w->table.bytes);
        w->table.bytes = 0;
    }
    int64_t offset = qcow2_alloc_clusters(w->bs, bytes);
    if (offset < 0) {
        return fail_errno(errp, (int)offset);
    }
    w->table = (Qcow2HostRun){(uint64_t)offset, bytes};
    return need_blocks(w, (uint64_t)offset >> w->s->cluster_bits, bytes >> w->s->cluster_bits,
                       errp);
}

static bool enough(const Width *w)
{
    return w->got >= w->nb_needed && w->table.bytes >= w->end * sizeof(uint64_t);
}

static bool allocate(Width *w, GError **errp)
{
    do {
        if (!allocate_blocks(w, errp) || !allocate_table(w, errp)) {
            return false;
        }
    } while (!enough(w));
    return true;
}

/* Gives the new structure back. @maybe_named: a header that names it may still come to light, so
 * that only a flush makes it free. */
static void give_back(Width *w, bool maybe_named)
{
    g_array_append_val(w->runs, w->table);
    for (guint i = 0; i < w->runs->len; i++) {
        const Qcow2HostRun *run = &g_array_index(w->runs, Qcow2HostRun, i);
        if (run->bytes && maybe_named) {
            qcow2_free_run(w->bs, run->offset, run->bytes, QCOW2_DISCARD_OTHER);
        } else if (run->bytes) {
            qcow2_alloc_undo(w->bs, run->offset, run->bytes);
        }
    }
    g_array_set_size(w->runs, 0);
}

/* ---------------------------------------------------------------- the new blocks */

static gint by_number(gconstpointer a, gconstpointer b)
{
    const uint64_t *x = a, *y = b;
    return *x < *y ? -1 : *x > *y;
}

/* Not before all has been allocated: that may add to it. */
static void collect_old(Width *w)
{
    BDRVQcow2State *s = w->s;
    QB_GUARD(&s->alloc_lock);
    for (uint64_t i = 0; i < s->reftable.nb_entries; i++) {
        uint64_t cluster = (s->reftable.entries[i] & QCOW2_REFTABLE_OFFSET_MASK) >> s->cluster_bits;
        if (cluster) {
            g_array_append_val(w->old, cluster);
        }
    }
    for (uint64_t i = 0; i < s->reftable.clusters; i++) {
        uint64_t cluster = (s->reftable.offset >> s->cluster_bits) + i;
        g_array_append_val(w->old, cluster);
    }
    g_array_sort(w->old, by_number);
}

/* The new block @index from the old counts. */
static int fill_block(Width *w, uint64_t index, uint8_t *buf)
{
    unsigned bits = w->s->cluster_bits;
    uint64_t slots = UINT64_C(1) << w->block_bits, first = index * slots;
    memset(buf, 0, w->s->cluster_size);
    for (uint64_t slot = 0, count, n; slot < slots; slot += n >> bits) {
        int ret = qcow2_count_run(w->bs, (first + slot) << bits, (slots - slot) << bits, &count,
                                  &n);
        if (ret < 0) {
            return ret;
        }
        for (uint64_t i = 0; count && i < n >> bits; i++) {
            qcow2_refcount_write(buf, w->order, slot + i, count);
        }
    }
    return 0;
}

/* Invariant 2, for the block @index; *@next is the first old cluster not yet met. */
static void leave_out_old(const Width *w, uint64_t index, uint8_t *buf, guint *next)
{
    uint64_t slots = UINT64_C(1) << w->block_bits, first = index * slots;
    for (; *next < w->old->len; ++*next) {
        uint64_t cluster = g_array_index(w->old, uint64_t, *next);
        if (cluster >= first + slots) {
            return;
        }
        if (cluster >= first) {
            qcow2_refcount_write(buf, w->order, cluster - first, 0);
        }
    }
}

static int write_structure(const Width *w, uint64_t offset, uint64_t bytes, const void *buf)
{
    int ret = qcow2_check_overlap(w->bs, QCOW2_OL_NONE, offset, bytes);
    return ret < 0 ? ret : bdrv_pwrite(w->bs->file, (int64_t)offset, (int64_t)bytes, buf, 0);
}

/* Places for blocks, one after the other. */
typedef struct Places {
    guint run;
    uint64_t used; /* bytes of it */
} Places;

static uint64_t next_place(const Width *w, Places *p)
{
    const Qcow2HostRun *run = &g_array_index(w->runs, Qcow2HostRun, p->run);
    uint64_t offset = run->offset + p->used;
    p->used += w->s->cluster_size;
    if (p->used == run->bytes) {
        p->run++;
        p->used = 0;
    }
    return offset;
}

static bool write_blocks(Width *w, GError **errp)
{
    g_autofree uint8_t *buf = g_malloc(w->s->cluster_size);
    Places places = {0};
    guint next_old = 0;
    qb_progress_grow(w->progress, w->nb_needed);
    for (uint64_t i = 0; i < w->end; i++) {
        if (!w->needed[i]) {
            continue;
        }
        uint64_t offset = next_place(w, &places);
        w->be_entries[i] = htobe64(offset);
        int ret = fill_block(w, i, buf);
        leave_out_old(w, i, buf, &next_old);
        ret = ret < 0 ? ret : write_structure(w, offset, w->s->cluster_size, buf);
        if (ret < 0) {
            return fail_errno(errp, ret);
        }
        qb_progress_add(w->progress, 1);
        if (!qcow2_amend_go_on(w->progress, errp)) {
            return false;
        }
    }
    return true;
}

/* Steps 3 and 4. */
static bool build(Width *w, GError **errp)
{
    if (!allocate(w, errp)) {
        return false;
    }
    int ret = qcow2_flush(w->bs);
    if (ret < 0) {
        return fail_errno(errp, ret);
    }
    collect_old(w);
    w->be_entries = g_try_malloc0(w->table.bytes);
    if (!w->be_entries) {
        return fail_errno(errp, -ENOMEM);
    }
    if (!write_blocks(w, errp)) {
        return false;
    }
    ret = write_structure(w, w->table.offset, w->table.bytes, w->be_entries);
    ret = ret < 0 ? ret : bdrv_flush(w->bs->file->bs);
    return ret == 0 || fail_errno(errp, ret);
}

/* ---------------------------------------------------------------- the switch */

static void switch_header(Qcow2Header *h, void *opaque)
{
    const Width *w = opaque;
    h->reftable_offset = w->table.offset;
    h->reftable_clusters = (uint32_t)(w->table.bytes >> h->cluster_bits);
    h->refcount_order = w->order;
    h->incompatible &= ~QCOW2_INCOMPAT_DIRTY;
}

/* Step 6. */
static bool follow_header(Width *w, GError **errp)
{
    BDRVQcow2State *s = w->s;
    for (guint i = 0; i < w->old->len; i++) {
        uint64_t cluster = g_array_index(w->old, uint64_t, i);
        qcow2_cache_poison(s->cache, cluster << s->cluster_bits, s->cluster_size);
    }
    qcow2_set_refcount_order(s, w->order);
    if (!qcow2_refcount_reload(w->bs, errp)) {
        atomic_store(&s->corrupt, true); /* invariant 4 */
        return false;
    }
    int ret = qcow2_cut_file(w->bs);
    if (ret < 0) {
        bdrv_warn("Could not give back the space of the old refcounts: %s", g_strerror(-ret));
    }
    return true;
}

/* What failed before the switch. What cannot be given back leaks, the dirty bit stays. */
static void undo(Width *w, bool maybe_named)
{
    give_back(w, maybe_named);
    if (qcow2_flush_all(w->bs) == 0 && w->s->version >= 3) {
        (void)qcow2_set_incompatible(w->bs, 0, QCOW2_INCOMPAT_DIRTY);
    }
}

static bool change_width(Width *w, GError **errp)
{
    int ret = w->s->version >= 3 ? qcow2_set_incompatible(w->bs, QCOW2_INCOMPAT_DIRTY, 0) : 0;
    if (ret < 0) {
        return fail_errno(errp, ret);
    }
    if (!build(w, errp)) {
        undo(w, false);
        return false;
    }
    ret = qcow2_header_update(w->bs, switch_header, w, true);
    if (ret < 0) {
        undo(w, true);
        return fail_errno(errp, ret);
    }
    return follow_header(w, errp);
}

bool qcow2_amend_width(BlockDriverState *bs, unsigned order, QbProgress *progress, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    g_auto(Width) w = {
        .bs = bs,
        .s = s,
        .progress = progress,
        .order = order,
        .block_bits = s->cluster_bits + 3 - order,
        .max = order == 6 ? UINT64_MAX : (UINT64_C(1) << (1u << order)) - 1,
        .needed = g_new0(bool, MAX_BLOCKS),
        .runs = g_array_new(false, false, sizeof(Qcow2HostRun)),
        .old = g_array_new(false, false, sizeof(uint64_t)),
    };
    assert(order <= 6 && (s->version >= 3 || order == 4));
    if (order == s->refcount_order) {
        return true;
    }
    int ret = qcow2_flush_all(bs);
    if (ret < 0) {
        return fail_errno(errp, ret);
    }
    return survey(&w, errp) && change_width(&w, errp);
}
