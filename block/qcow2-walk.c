/*
 * THE iterator over L1 -> L2 -> entries.  Nobody else loops over tables.
 *
 *      L1 (active, or a detached copy)   [ 0 | e | e | 0 | 0 | e ... ]
 *                                              |   |           |
 *      batch: up to BATCH_BYTES of tables      v   v           v
 *        in memory already:                  copy            copy
 *        else, in file order, many at once:      read
 *      then, in L1 order:                    fn(table) fn(table) ...
 *
 * L1 entries of 0 cost a look at L1.  Tables that are read from the file do not go into the cache:
 * a walk over a large image must not push out what guests use.
 *
 * Invariants
 *  1. A table that is in memory is taken from there, for active and detached L1 alike: what is in
 *     the file may be older.  After reading from the file it is looked for once more.  One that is
 *     there in part is pinned meanwhile: what is dirty then is not dropped before it is copied.
 *  2. Tables of the active L1 are read while announced, and read again if L1 names another
 *     one then.
 *  3. No lock is held and nobody is announced while a callback runs.
 *  4. Memory is bounded by BATCH_BYTES of tables per thread, whatever an L1 claims.
 *
 * walk_edit() writes tables back by the batch and past the cache: on an image of 1 TiB all entries
 * change, and neither memory nor the barriers of flushes in between should be the price.  It is for
 * whole-node operations, which see to the order of their steps themselves.
 *
 * A walk over active tables that others change meanwhile sees each table as it was at some moment
 * of the walk; those who need one moment for all hold the whole node.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-io-int.h"
#include "block/locks.h"
#include "util/pool.h"

#define BATCH_BYTES (1u << 20) /* what the caches of a core hold */
#define BATCH_TABLES 4096
#define MAX_OP_BYTES (1u << 20)
#define MIN_PART 256 /* tables or blocks for which another thread is worth its while */

typedef struct Slot {
    uint64_t l1_index, l1_entry, offset;
    uint8_t *data; /* in the walk's buffer */
    Qcow2Table *part; /* pinned while the rest is read; NULL: nothing of it was in memory */
    int error;
    bool to_read;
    size_t from, to; /* bytes that an edit changed; to 0: none */
} Slot;

typedef struct Walk {
    BlockDriverState *bs;
    BDRVQcow2State *s;
    const Qcow2WalkSource *src;
    uint64_t next, end; /* L1 indices */
    Slot *slots;
    size_t n, max;
    uint8_t *buf;
} Walk;

static uint64_t l1_entry_of(const Walk *w, uint64_t index)
{
    return w->src->be_l1 ? qb_ldbe64(&w->src->be_l1[index]) : qcow2_l1_get(w->s, index);
}

/* --- a batch --- */

/* The next tables in L1 order; false: there are no more. */
static bool batch_collect(Walk *w)
{
    w->n = 0;
    while (w->next < w->end && w->n < w->max) {
        uint64_t entry = l1_entry_of(w, w->next);
        uint64_t offset = entry & QCOW2_ENTRY_OFFSET_MASK;
        if (offset) {
            w->slots[w->n] = (Slot){
                .l1_index = w->next,
                .l1_entry = entry,
                .offset = offset,
                .data = w->buf + w->n * w->s->cluster_size,
            };
            w->n++;
        }
        w->next++;
    }
    return w->n > 0;
}

/* Takes what is in memory of the table; true: that is all of it. */
static bool slot_from_cache(const Walk *w, Slot *slot, Qcow2Table **ret_part)
{
    const Qcow2TableRange any = {.kind = QCOW2_TABLE_L2, .offset = slot->offset};
    g_autoptr(Qcow2Table) t = qcow2_cache_peek_part(w->s->cache, &any);
    if (!t) {
        return false;
    }
    if (qcow2_table_load_present(t, slot->data)) {
        slot->error = 0;
        return true;
    }
    if (ret_part) {
        *ret_part = g_steal_pointer(&t);
    }
    return false;
}

static gint by_offset(gconstpointer a, gconstpointer b)
{
    const Slot *const *sa = a, *const *sb = b;
    return (*sa)->offset < (*sb)->offset ? -1 : (*sa)->offset > (*sb)->offset;
}

/* What must come from the file, in file order, each with memory in that order, too. */
static GPtrArray *batch_to_read(Walk *w, uint64_t file_length)
{
    GPtrArray *list = g_ptr_array_new();
    for (size_t i = 0; i < w->n; i++) {
        Slot *slot = &w->slots[i];
        if (qcow2_offset_into_cluster(w->s, slot->offset)) {
            slot->error = -EIO;
        } else if (!slot_from_cache(w, slot, &slot->part)) {
            slot->to_read = slot->offset < file_length;
            slot->error = slot->to_read ? 0 : -EIO;
        }
        if (slot->to_read) {
            g_ptr_array_add(list, slot);
        }
    }
    /* The buffers of these slots, lowest first, go to the slots in the order of the file. */
    g_autoptr(GPtrArray) buffers = g_ptr_array_new();
    for (guint i = 0; i < list->len; i++) {
        g_ptr_array_add(buffers, ((Slot *)list->pdata[i])->data);
    }
    g_ptr_array_sort(list, by_offset);
    for (guint i = 0; i < list->len; i++) {
        ((Slot *)list->pdata[i])->data = buffers->pdata[i];
    }
    return list;
}

/* True when @next continues @op both in the file and in memory. */
static bool op_takes(const BdrvBatchOp *op, const BdrvBatchOp *next)
{
    return op->offset + op->bytes == next->offset
           && (uint8_t *)op->buf + op->bytes == (uint8_t *)next->buf
           && op->bytes + next->bytes <= MAX_OP_BYTES;
}

static void add_op(GArray *ops, const BdrvBatchOp *op)
{
    BdrvBatchOp *last = ops->len ? &g_array_index(ops, BdrvBatchOp, ops->len - 1) : NULL;
    if (last && op_takes(last, op)) {
        last->bytes += op->bytes;
    } else {
        g_array_append_vals(ops, op, 1);
    }
}

static GArray *read_ops(const Walk *w, const GPtrArray *list)
{
    GArray *ops = g_array_new(false, false, sizeof(BdrvBatchOp));
    for (guint i = 0; i < list->len; i++) {
        const Slot *slot = list->pdata[i];
        add_op(ops, &(BdrvBatchOp){
            .kind = BDRV_BATCH_READ, .offset = (int64_t)slot->offset,
            .bytes = w->s->cluster_size, .buf = slot->data,
        });
    }
    return ops;
}

/* One failed somewhere: each by itself, to know which. */
static void read_singly(const Walk *w, const GPtrArray *list)
{
    for (guint i = 0; i < list->len; i++) {
        Slot *slot = list->pdata[i];
        slot->error = bdrv_pread(w->bs->file, (int64_t)slot->offset, w->s->cluster_size,
                                 slot->data, 0);
    }
}

static void batch_read_file(Walk *w, const GPtrArray *list)
{
    g_autoptr(GArray) ops = read_ops(w, list);
    if (ops->len == 0) {
        return;
    }
    bdrv_debug_event(w->bs->file, "l2_load");
    if (bdrv_run_batch(w->bs->file, (BdrvBatchOp *)ops->data, ops->len) < 0) {
        read_singly(w, list);
    }
    for (guint i = 0; i < list->len; i++) {
        slot_from_cache(w, list->pdata[i], NULL); /* invariant 1 */
    }
}

/* Invariant 2: the table L1 names by now; none: the slot is left out. */
static void slot_catch_up(const Walk *w, Slot *slot)
{
    uint64_t entry = qcow2_l1_get(w->s, slot->l1_index);
    while ((entry & QCOW2_ENTRY_OFFSET_MASK) != slot->offset) {
        g_autoptr(Qcow2Table) t = NULL;
        slot->l1_entry = entry;
        slot->offset = entry & QCOW2_ENTRY_OFFSET_MASK;
        if (slot->offset == 0) {
            return;
        }
        slot->error = qcow2_cache_get(w->s->cache, QCOW2_TABLE_L2, slot->offset, &t);
        if (slot->error == 0) {
            qcow2_table_load(t, 0, w->s->cluster_size, slot->data);
        }
        entry = qcow2_l1_get(w->s, slot->l1_index);
    }
}

static int batch_read(Walk *w)
{
    int64_t length = bdrv_getlength(w->bs->file->bs);
    Qcow2User user;
    if (length < 0) {
        return (int)length;
    }
    qcow2_user_announce(w->s, &user);
    g_autoptr(GPtrArray) list = batch_to_read(w, (uint64_t)length);
    batch_read_file(w, list);
    for (size_t i = 0; i < w->n; i++) {
        g_clear_pointer(&w->slots[i].part, qcow2_cache_put);
    }
    for (size_t i = 0; i < w->n && !w->src->be_l1; i++) {
        slot_catch_up(w, &w->slots[i]);
    }
    qcow2_user_leave(w->s, &user);
    return 0;
}

static int batch_call(const Walk *w, Qcow2TableFn fn, void *opaque)
{
    int ret = 0;
    for (size_t i = 0; i < w->n && ret >= 0; i++) {
        const Slot *slot = &w->slots[i];
        if (slot->offset == 0) {
            continue;
        }
        Qcow2WalkTable table = {
            .l1_index = slot->l1_index,
            .l1_entry = slot->l1_entry,
            .be = slot->error ? NULL : (const uint64_t *)(const void *)slot->data,
            .error = slot->error,
        };
        ret = fn(&table, opaque);
    }
    return MIN(ret, 0);
}

/* --- the walk --- */

static bool walk_init(Walk *w, BlockDriverState *bs, const Qcow2WalkSource *src, uint64_t start,
                      uint64_t end)
{
    static const Qcow2WalkSource active = {0};
    BDRVQcow2State *s = qcow2_state(bs);
    *w = (Walk){.bs = bs, .s = s, .src = src ? src : &active};
    uint64_t size = w->src->be_l1 ? w->src->l1_size : qcow2_l1_size(s);
    w->next = qcow2_l1_index(s, start);
    w->end = end > start ? MIN(size, qcow2_l1_index(s, end - 1) + 1) : 0;
    if (w->next >= w->end) {
        return true;
    }
    w->max = CLAMP(BATCH_BYTES >> s->cluster_bits, 1, BATCH_TABLES);
    w->max = MIN(w->max, w->end - w->next);
    w->slots = g_try_new(Slot, w->max);
    w->buf = bdrv_try_blockalign(bs->file->bs, w->max << s->cluster_bits);
    return w->slots && w->buf;
}

static void walk_clear(Walk *w)
{
    g_free(w->slots);
    free(w->buf);
}

#define WALK_AUTO __attribute__((cleanup(walk_clear))) Walk

int qcow2_walk_tables(BlockDriverState *bs, const Qcow2WalkSource *src, uint64_t start,
                      uint64_t end, Qcow2TableFn fn, void *opaque)
{
    WALK_AUTO w;
    if (!walk_init(&w, bs, src, start, end)) {
        return -ENOMEM;
    }
    int ret = 0;
    while (ret == 0 && batch_collect(&w)) {
        ret = batch_read(&w);
        if (ret == 0) {
            ret = batch_call(&w, fn, opaque);
        }
    }
    return ret;
}

/* --- runs --- */

typedef struct RunWalk {
    BlockDriverState *bs;
    uint64_t start, end;
    Qcow2RunFn fn;
    void *opaque;
    Qcow2Mapping run; /* not yet handed over; bytes 0: none */
} RunWalk;

static int hand_over(RunWalk *r)
{
    Qcow2Mapping run = r->run;
    r->run.bytes = 0;
    return run.bytes && run.type != QCOW2_UNALLOCATED ? r->fn(&run, r->opaque) : 0;
}

static int add_piece(RunWalk *r, const Qcow2Mapping *next)
{
    bool follows = r->run.bytes == 0 || r->run.guest + r->run.bytes == next->guest;
    if (follows && qcow2_mapping_extend(&r->run, next)) {
        return 0;
    }
    int ret = hand_over(r);
    r->run = *next;
    return ret;
}

/* What @n entries say of [guest, end): the first is @e, the others continue it. */
static int add_entries(RunWalk *r, Qcow2L2Entry e, unsigned n, uint64_t guest, uint64_t end)
{
    int ret = 0;
    while (guest < end && ret >= 0) {
        Qcow2Mapping next = qcow2_entry_mapping(qcow2_state(r->bs), e, guest, end);
        next.bytes = n > 1 ? end - guest : next.bytes;
        ret = add_piece(r, &next);
        guest += next.bytes;
    }
    return ret;
}

static int add_table(const Qcow2WalkTable *table, void *opaque)
{
    RunWalk *r = opaque;
    const BDRVQcow2State *s = qcow2_state(r->bs);
    uint64_t base = table->l1_index << (s->cluster_bits + s->l2_bits);
    if (!table->be) {
        int ret = qcow2_l1_entry_judge(r->bs, table->l1_entry, table->l1_index);
        return ret < 0 ? ret : table->error;
    }
    unsigned n, i = r->start > base ? (unsigned)((r->start - base) >> s->cluster_bits) : 0;
    int ret = 0;
    for (; i < s->l2_entries && ret >= 0; i += n) {
        uint64_t guest = base + ((uint64_t)i << s->cluster_bits);
        if (guest >= r->end) {
            break;
        }
        const uint8_t *raw = (const uint8_t *)table->be + (size_t)i * s->l2_entry_size;
        Qcow2L2Entry e = qcow2_entry_decode(s, raw);
        n = qcow2_entries_alike(s, raw, s->l2_entries - i);
        ret = qcow2_entry_judge(r->bs, e, guest, table->l1_entry & QCOW2_ENTRY_OFFSET_MASK, i);
        if (ret == 0) {
            uint64_t end = guest + ((uint64_t)n << s->cluster_bits);
            ret = add_entries(r, e, n, MAX(guest, r->start), MIN(end, r->end));
        }
    }
    return ret;
}

int qcow2_walk_runs(BlockDriverState *bs, const Qcow2WalkSource *src, uint64_t start, uint64_t end,
                    Qcow2RunFn fn, void *opaque)
{
    RunWalk r = {.bs = bs, .start = start, .end = end, .fn = fn, .opaque = opaque};
    int ret = qcow2_walk_tables(bs, src, start, end, add_table, &r);
    if (ret == 0) {
        ret = MIN(hand_over(&r), 0);
    }
    return ret;
}

/* --- editing --- */

typedef struct Edit {
    BlockDriverState *bs;
    uint64_t start, end; /* clusters that begin there */
    Qcow2EditFn fn;
    void *opaque;
} Edit;

/* Makes of the @n entries at @raw, that continue @old, those that continue @e in the same host
 * clusters. */
static void change_flags(const BDRVQcow2State *s, Qcow2L2Entry old, Qcow2L2Entry e, unsigned n,
                         uint8_t *raw)
{
    uint64_t change[] = {htobe64(old.entry ^ e.entry), htobe64(old.bitmap ^ e.bitmap)};
    uint64_t *word = (uint64_t *)(void *)raw;
    unsigned words = s->l2_entry_size / 8;
    for (unsigned i = 0; i < n * words; i += words) {
        word[i] ^= change[0];
    }
    for (unsigned i = 1; change[1] && i < n * words; i += words) {
        word[i] ^= change[1];
    }
}

/* Puts @e and the @n - 1 entries that continue it to @raw, where @old and such as continue it are. */
static void store_alike(const BDRVQcow2State *s, Qcow2L2Entry old, Qcow2L2Entry e, unsigned n,
                        uint8_t *raw)
{
    if (qcow2_entry_has_host(s, old) && qcow2_entry_host(old) == qcow2_entry_host(e)) {
        change_flags(s, old, e, n, raw);
        return;
    }
    uint64_t step = qcow2_entry_has_host(s, e) ? s->cluster_size : 0;
    for (unsigned i = 0; i < n; i++) {
        qcow2_entry_encode(s, e, raw + (size_t)i * s->l2_entry_size);
        e.entry += step;
    }
}

/* Edits the entries [@i, @end) of the table in the walk's memory; [slot->from, slot->to) is what
 * changed of it. */
static int edit_entries(const Edit *ed, Slot *slot, unsigned i, unsigned end)
{
    const BDRVQcow2State *s = qcow2_state(ed->bs);
    uint64_t base = slot->l1_index << (s->cluster_bits + s->l2_bits);
    int ret = 0;
    for (unsigned n; i < end && ret >= 0; i += n) {
        size_t pos = (size_t)i * s->l2_entry_size;
        Qcow2L2Entry e = qcow2_entry_decode(s, slot->data + pos), old = e;
        n = qcow2_entries_alike(s, slot->data + pos, end - i);
        ret = ed->fn(base + ((uint64_t)i << s->cluster_bits), &e, &n, ed->opaque);
        if (ret > 0) {
            store_alike(s, old, e, n, slot->data + pos);
            slot->from = slot->to ? slot->from : pos;
            slot->to = pos + (size_t)n * s->l2_entry_size;
        }
    }
    return MIN(ret, 0);
}

static int edit_slot(const Edit *ed, Slot *slot)
{
    const BDRVQcow2State *s = qcow2_state(ed->bs);
    uint64_t base = slot->l1_index << (s->cluster_bits + s->l2_bits);
    uint64_t span = (uint64_t)s->l2_entries << s->cluster_bits;
    uint64_t from = MAX(ed->start, base) - base, to = MIN(ed->end, base + span) - base;
    slot->from = slot->to = 0;
    if (slot->offset == 0 || slot->error < 0) {
        return slot->error;
    }
    return edit_entries(ed, slot, (unsigned)qcow2_size_to_clusters(s, from),
                        (unsigned)qcow2_size_to_clusters(s, to));
}

/* A write of what changed of @slot, in units of the file. */
static BdrvBatchOp slot_write_op(const Walk *w, const Slot *slot)
{
    uint64_t unit = MAX(w->bs->file->bs->bl.request_alignment, BDRV_SECTOR_SIZE);
    unit = MIN(unit, w->s->cluster_size);
    uint64_t from = qb_align_down(slot->from, unit), to = qb_align_up(slot->to, unit);
    return (BdrvBatchOp){
        .kind = BDRV_BATCH_WRITE, .offset = (int64_t)(slot->offset + from),
        .bytes = (int64_t)(to - from), .buf = slot->data + from,
    };
}

/* What changed in the batch, in file order, as few writes. */
static int add_write_ops(const Walk *w, GArray *ops)
{
    g_autoptr(GPtrArray) list = g_ptr_array_new();
    int ret = 0;
    for (size_t i = 0; i < w->n; i++) {
        if (w->slots[i].to) {
            g_ptr_array_add(list, &w->slots[i]);
        }
    }
    g_ptr_array_sort(list, by_offset);
    for (guint i = 0; i < list->len && ret == 0; i++) {
        BdrvBatchOp op = slot_write_op(w, list->pdata[i]);
        ret = qcow2_check_overlap(w->bs, QCOW2_OL_ACTIVE_L2, (uint64_t)op.offset,
                                  (uint64_t)op.bytes);
        add_op(ops, &op);
    }
    return ret;
}

/* Memory must not have the old tables when the file has, or may have, the new ones. */
static int batch_write(Walk *w)
{
    g_autoptr(GArray) ops = g_array_new(false, false, sizeof(BdrvBatchOp));
    int ret = add_write_ops(w, ops);
    if (ret < 0 || ops->len == 0) {
        return ret;
    }
    bdrv_debug_event(w->bs->file, "l2_update");
    ret = bdrv_run_batch(w->bs->file, (BdrvBatchOp *)ops->data, ops->len);
    for (size_t i = 0; i < w->n; i++) {
        if (w->slots[i].to) {
            qcow2_cache_poison(w->s->cache, w->slots[i].offset, w->s->cluster_size);
        }
    }
    return ret;
}

static int batch_edit(Walk *w, const Edit *ed)
{
    int ret = batch_read(w);
    for (size_t i = 0; i < w->n && ret == 0; i++) {
        ret = edit_slot(ed, &w->slots[i]);
    }
    return ret < 0 ? ret : batch_write(w);
}

static int edit_part(uint64_t first, uint64_t end, unsigned part, void *opaque)
{
    const Edit *ed = opaque;
    const BDRVQcow2State *s = qcow2_state(ed->bs);
    unsigned shift = s->cluster_bits + s->l2_bits;
    WALK_AUTO w;
    if (!walk_init(&w, ed->bs, NULL, MAX(ed->start, first << shift), MIN(ed->end, end << shift))) {
        return -ENOMEM;
    }
    int ret = 0;
    while (ret == 0 && batch_collect(&w)) {
        ret = batch_edit(&w, ed);
    }
    return ret;
}

int qcow2_walk_edit(BlockDriverState *bs, uint64_t start, uint64_t end, Qcow2EditFn fn,
                    void *opaque)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    Edit ed = {.bs = bs, .start = start, .end = end, .fn = fn, .opaque = opaque};
    int ret = qcow2_cache_dirty_bytes(s->cache) ? qcow2_flush(bs) : 0;
    return ret < 0 ? ret : qcow2_walk_in_parts(qcow2_l1_size(s), edit_part, &ed);
}

/* --- on all cores --- */

typedef struct PartTask {
    uint64_t first, end;
    unsigned part;
    Qcow2PartFn fn;
    void *opaque;
} PartTask;

static int run_part(void *opaque)
{
    const PartTask *t = opaque;
    bdrv_graph_borrow();
    int ret = t->fn(t->first, t->end, t->part, t->opaque);
    bdrv_graph_return();
    return ret;
}

int qcow2_walk_in_parts(uint64_t size, Qcow2PartFn fn, void *opaque)
{
    PartTask tasks[QCOW2_MAX_PARTS];
    unsigned most = MIN(qb_cpu_count(), QCOW2_MAX_PARTS);
    unsigned n = (unsigned)CLAMP(size / MIN_PART, 1, most);
    QbTaskGroup group;
    qb_group_init(&group);
    for (unsigned i = 0; i < n; i++) {
        tasks[i] = (PartTask){size * i / n, size * (i + 1) / n, i, fn, opaque};
        if (i > 0) {
            qb_group_submit(&group, qb_compute_pool(), run_part, &tasks[i]);
        }
    }
    int ret = run_part(&tasks[0]);
    int others = qb_group_wait(&group, 0);
    qb_group_destroy(&group);
    return ret < 0 ? ret : others;
}
