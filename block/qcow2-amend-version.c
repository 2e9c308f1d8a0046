/*
 * Changing the version of an image, both ways.
 *
 *   2 -> 3   snapshot table with the fields that version 3 demands; header: longer, feature names
 *   3 -> 2   zero clusters go from all tables; header: shorter, no features
 *
 * Version 2 has no zero flag.  Without a backing file a zero cluster becomes an unallocated one;
 * with one it becomes a cluster of zeroes, a hole in the file where the file can have holes.  Each
 * L2 table is looked at once, however many L1 tables share it:
 *
 *     table T with count n                   host cluster H of a zero entry in T
 *       no H, no backing file      -> 0
 *       no H                       -> a new cluster of zeroes, count n
 *       H, and only T has it       -> H zeroed, the entry loses its flag     (H's count is n)
 *       H, and others have it too  -> as without H; H loses n references     (H's count is more)
 *
 * The last kind may leave another entry as the only owner of H, which must then get COPIED: the
 * dirty bit is stable before the first such change, and goes when COPIED is right again, with the
 * header's switch at the latest (invariant 4 of the driver).
 *
 * Invariants
 *  1. Nothing an entry other than a zero entry refers to is written.
 *  2. What a table comes to refer to is stable, with its counts, before the table is written; what
 *     it no longer refers to is freed afterwards (the order of the flush).  So every moment shows
 *     the same content, and stopping anywhere leaves a good version 3 image.
 *  3. Whether the image may become version 2 is judged before its first change.
 *
 * Stored bitmaps, which version 2 does not have, are a reason to refuse; an extension that has been
 * out of date since before is left out, its clusters are leaks already.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-amend.h"

#include <inttypes.h>
#include <string.h>

static bool fail(GError **errp, int err, const char *text)
{
    qb_error_set(errp, err, "%s", text);
    return false;
}

static bool fail_errno(GError **errp, int err)
{
    qb_error_set_errno(errp, err, "Could not change the version of the image");
    return false;
}

/* ---------------------------------------------------------------- 2 -> 3 */

/* The snapshots with the fields that version 3 demands, or NULL when they have them. */
static GArray *with_extra_data(const BDRVQcow2State *s)
{
    g_autoptr(GArray) list = qcow2_snapshots_dup(s->snapshots);
    bool changed = false;
    for (guint i = 0; i < list->len; i++) {
        Qcow2Snapshot *sn = &g_array_index(list, Qcow2Snapshot, i);
        if (sn->extra_size < QCOW2_SNAPSHOT_EXTRA_V3) {
            g_clear_pointer(&sn->extra, g_free);
            sn->extra_size = QCOW2_SNAPSHOT_EXTRA_KNOWN;
            changed = true;
        }
    }
    return changed ? g_steal_pointer(&list) : NULL;
}

static void edit_upgrade(Qcow2Header *h, GArray *extensions, void *opaque)
{
    h->version = 3;
    h->header_length = QCOW2_HDR_V3_LENGTH;
    if (h->cluster_bits > 12) {
        uint32_t length;
        g_autofree uint8_t *table = qcow2_feature_table(&length);
        qcow2_extensions_set(extensions, QCOW2_EXT_FEATURE_TABLE, table, length);
    }
}

bool qcow2_upgrade(BlockDriverState *bs, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    Qcow2HeaderChange what = {.edit = edit_upgrade};
    int ret = qcow2_flush_all(bs);
    if (ret < 0) {
        return fail_errno(errp, ret);
    }
    GArray *list = with_extra_data(s);
    if (list && !qcow2_snapshots_store(bs, list, NULL, NULL, errp)) {
        return false;
    }
    if (!qcow2_header_change(bs, &what, errp)) {
        return false;
    }
    s->version = 3;
    return true;
}

/* ---------------------------------------------------------------- every L2 table once */

typedef struct Tables {
    BlockDriverState *bs;
    BDRVQcow2State *s;
    GHashTable *seen;  /* cluster numbers */
    GArray *offsets;   /* uint64_t, sorted */
} Tables;

static void tables_clear(Tables *t)
{
    g_clear_pointer(&t->seen, g_hash_table_destroy);
    g_clear_pointer(&t->offsets, g_array_unref);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Tables, tables_clear)

static void add_tables(Tables *t, const uint64_t *be_l1, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++) {
        uint64_t offset = be64toh(be_l1[i]) & QCOW2_ENTRY_OFFSET_MASK;
        gpointer key = (gpointer)(uintptr_t)(offset >> t->s->cluster_bits);
        if (offset && g_hash_table_add(t->seen, key)) {
            g_array_append_val(t->offsets, offset);
        }
    }
}

static gint by_number(gconstpointer a, gconstpointer b)
{
    const uint64_t *x = a, *y = b;
    return *x < *y ? -1 : *x > *y;
}

static bool collect_tables(Tables *t, GError **errp)
{
    uint32_t n;
    g_autofree uint64_t *active = qcow2_l1_dup_be(t->s, &n);
    t->seen = g_hash_table_new(NULL, NULL);
    t->offsets = g_array_new(false, false, sizeof(uint64_t));
    add_tables(t, active, n);
    for (guint i = 0; i < t->s->snapshots->len; i++) {
        const Qcow2Snapshot *sn = &g_array_index(t->s->snapshots, Qcow2Snapshot, i);
        g_autofree uint64_t *be = qcow2_snapshot_read_l1(t->bs, sn, errp);
        if (!be) {
            return false;
        }
        add_tables(t, be, sn->l1_size);
    }
    g_array_sort(t->offsets, by_number);
    return true;
}

/* Calls @fn for every L2 table of the disk and its snapshots. 0, or what @fn returned. */
static bool for_each_table(BlockDriverState *bs, QbProgress *progress,
                           int (*fn)(Qcow2Table *table, void *opaque), void *opaque, GError **errp)
{
    g_auto(Tables) t = {.bs = bs, .s = qcow2_state(bs)};
    if (!collect_tables(&t, errp)) {
        return false;
    }
    qb_progress_grow(progress, t.offsets->len);
    for (guint i = 0; i < t.offsets->len; i++) {
        g_autoptr(Qcow2Table) table = NULL;
        uint64_t offset = g_array_index(t.offsets, uint64_t, i);
        int ret = qcow2_cache_get(t.s->cache, QCOW2_TABLE_L2, offset, &table);
        ret = ret < 0 ? ret : fn(table, opaque);
        if (ret < 0) {
            return fail_errno(errp, ret);
        }
        qb_progress_add(progress, 1);
        if (!qcow2_amend_go_on(progress, errp)) {
            return false;
        }
    }
    return true;
}

/* Entry @i. Only images without subclusters come this far. */
static uint64_t load_entry(const Qcow2Table *table, unsigned i)
{
    uint64_t be;
    qcow2_table_load(table, i * sizeof(be), sizeof(be), &be);
    return be64toh(be);
}

static void store_entry(BDRVQcow2State *s, Qcow2Table *table, unsigned i, uint64_t entry)
{
    QB_GUARD(&s->lock);
    uint64_t be = htobe64(entry);
    qcow2_table_store(table, i * sizeof(be), sizeof(be), &be);
}

/* ---------------------------------------------------------------- 3 -> 2: may it? */

/* What the judge must know of the tables. */
typedef struct Content {
    const BDRVQcow2State *s;
    bool compressed, zero;
} Content;

static int look_at_table(Qcow2Table *table, void *opaque)
{
    Content *c = opaque;
    for (unsigned i = 0; i < c->s->l2_entries; i++) {
        uint64_t entry = load_entry(table, i);
        c->compressed |= entry & QCOW2_ENTRY_COMPRESSED;
        c->zero |= (entry & (QCOW2_ENTRY_COMPRESSED | QCOW2_ENTRY_ZERO)) == QCOW2_ENTRY_ZERO;
    }
    return 0;
}

static bool is_backed(const BlockDriverState *bs)
{
    return bs->backing || *bdrv_backing_name(bs);
}

static bool content_allows(BlockDriverState *bs, GError **errp)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    Content c = {.s = s};
    bool zeroes_matter = s->header.crypt_method && is_backed(bs);
    if (s->compression_type == QCOW2_COMPRESSION_ZLIB && !zeroes_matter) {
        return true;
    }
    if (!for_each_table(bs, NULL, look_at_table, &c, errp)) {
        return false;
    }
    if (s->compression_type != QCOW2_COMPRESSION_ZLIB && c.compressed) {
        return fail(errp, ENOTSUP, "Cannot downgrade an image with zstd compression type and"
                                   " existing compressed clusters");
    }
    return !(zeroes_matter && c.zero) ||
           fail(errp, ENOTSUP, "Cannot downgrade an encrypted image with zero clusters that hide"
                               " its backing file");
}

static bool snapshots_allow(const BDRVQcow2State *s, uint64_t size, GError **errp)
{
    for (guint i = 0; i < s->snapshots->len; i++) {
        const Qcow2Snapshot *sn = &g_array_index(s->snapshots, Qcow2Snapshot, i);
        if (sn->vm_state_size > UINT32_MAX || sn->disk_size != size) {
            return fail(errp, ENOTSUP, "Internal snapshots prevent downgrade of image");
        }
    }
    return true;
}

static bool bitmaps_allow(const BDRVQcow2State *s, GError **errp)
{
    if (!(s->header.autoclear & QCOW2_AUTOCLEAR_BITMAPS) ||
        !qcow2_find_extension(s->extensions, QCOW2_EXT_BITMAPS)) {
        return true;
    }
    fail(errp, ENOTSUP, "Cannot downgrade an image with persistent bitmaps");
    qb_error_add_hint(errp, "Use 'qemu-img bitmap --remove' to delete them first.");
    return false;
}

bool qcow2_may_downgrade(BlockDriverState *bs, uint64_t size, GError **errp)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    uint64_t left = s->header.incompatible & ~(QCOW2_INCOMPAT_COMPRESSION | QCOW2_INCOMPAT_DIRTY);
    if (s->has_data_file) {
        return fail(errp, ENOTSUP, "Cannot downgrade an image with a data file");
    }
    if (!snapshots_allow(s, size, errp)) {
        return false;
    }
    if (left) {
        qb_error_set(errp, ENOTSUP, "Cannot downgrade an image with incompatible features %#" PRIx64
                     " set", left);
        return false;
    }
    return bitmaps_allow(s, errp) && content_allows(bs, errp);
}

/* ---------------------------------------------------------------- 3 -> 2: zero clusters */

typedef struct Expansion {
    BlockDriverState *bs;
    BDRVQcow2State *s;
    bool backed;
    GArray *shared; /* Qcow2HostRun: host clusters that lost some of their references */
} Expansion;

static bool is_zero_entry(uint64_t entry)
{
    return (entry & QCOW2_ENTRY_ZERO) && !(entry & QCOW2_ENTRY_COMPRESSED);
}

/* Before entries are changed that refer to the host cluster (0: to none). */
static int prepare_free(Expansion *x, uint64_t host)
{
    if (!host) {
        return 0;
    }
    g_array_append_val(x->shared, ((Qcow2HostRun){host, x->s->cluster_size}));
    return qcow2_set_incompatible(x->bs, QCOW2_INCOMPAT_DIRTY, 0);
}

/* Drops @n references to the host cluster. */
static void free_host(Expansion *x, uint64_t host, uint64_t n)
{
    for (uint64_t i = 0; host && i < n; i++) {
        qcow2_free_run(x->bs, host, x->s->cluster_size, QCOW2_DISCARD_OTHER);
    }
}

/* The whole entry for a host cluster with count @n. */
static uint64_t data_entry(uint64_t host, uint64_t n)
{
    return host | (n == 1 ? QCOW2_ENTRY_COPIED : 0);
}

static int zero_host(Expansion *x, uint64_t host, uint64_t bytes)
{
    int ret = qcow2_check_overlap(x->bs, QCOW2_OL_NONE, host, bytes);
    return ret < 0 ? ret : bdrv_pwrite_zeroes(x->bs->file, (int64_t)host, (int64_t)bytes,
                                              BDRV_REQ_MAY_UNMAP);
}

/* A new run of zeroes, each cluster with count @n. */
static int64_t new_zeroes(Expansion *x, uint64_t n, uint64_t *bytes)
{
    int64_t offset = qcow2_alloc_run(x->bs, 0, bytes);
    if (offset < 0) {
        return offset;
    }
    Qcow2HostRun run = {(uint64_t)offset, *bytes};
    int ret = zero_host(x, run.offset, run.bytes);
    if (ret == 0 && n > 1) {
        ret = qcow2_update_refcounts(x->bs, &run, 1, (int)n - 1);
    }
    if (ret < 0) {
        qcow2_alloc_undo(x->bs, run.offset, run.bytes);
    }
    return ret < 0 ? ret : offset;
}

/* How the zero entry at hand may be replaced. */
typedef enum Fate { FATE_NONE, FATE_UNALLOCATE, FATE_KEEP_HOST, FATE_NEW_HOST } Fate;

static int fate_of(Expansion *x, uint64_t entry, uint64_t n, Fate *ret)
{
    uint64_t host = entry & QCOW2_ENTRY_OFFSET_MASK, count = 0;
    *ret = FATE_NONE;
    if (!is_zero_entry(entry)) {
        return 0;
    }
    int err = host && !x->s->header.crypt_method
                  ? qcow2_get_refcount(x->bs, host >> x->s->cluster_bits, &count)
                  : 0;
    if (count && count == n) {
        *ret = FATE_KEEP_HOST;
    } else {
        *ret = x->backed ? FATE_NEW_HOST : FATE_UNALLOCATE;
    }
    return err;
}

/* Entries from @i on that need a new cluster; ready to lose their old ones. */
static int count_new(Expansion *x, const Qcow2Table *table, unsigned i, uint64_t n, unsigned *ret)
{
    Fate fate = FATE_NEW_HOST;
    int err = 0;
    for (*ret = 0; i < x->s->l2_entries && fate == FATE_NEW_HOST; i++) {
        uint64_t entry = load_entry(table, i);
        err = fate_of(x, entry, n, &fate);
        if (err == 0 && fate == FATE_NEW_HOST) {
            err = prepare_free(x, entry & QCOW2_ENTRY_OFFSET_MASK);
            ++*ret;
        }
        if (err < 0) {
            return err;
        }
    }
    return 0;
}

/* Gives the entries from @i on a run of zeroes; *ret: how many. */
static int link_new(Expansion *x, Qcow2Table *table, unsigned i, uint64_t n, unsigned *ret)
{
    unsigned wanted;
    int err = count_new(x, table, i, n, &wanted);
    if (err < 0) {
        return err;
    }
    uint64_t bytes = (uint64_t)wanted << x->s->cluster_bits;
    int64_t offset = new_zeroes(x, n, &bytes);
    if (offset < 0) {
        return (int)offset;
    }
    *ret = (unsigned)(bytes >> x->s->cluster_bits);
    for (unsigned k = 0; k < *ret; k++) {
        uint64_t old = load_entry(table, i + k) & QCOW2_ENTRY_OFFSET_MASK;
        uint64_t host = (uint64_t)offset + ((uint64_t)k << x->s->cluster_bits);
        store_entry(x->s, table, i + k, data_entry(host, n));
        free_host(x, old, n);
    }
    return 0;
}

static int expand_entry(Expansion *x, Qcow2Table *table, unsigned i, uint64_t n, unsigned *ret)
{
    uint64_t entry = load_entry(table, i), host = entry & QCOW2_ENTRY_OFFSET_MASK;
    Fate fate;
    int err = fate_of(x, entry, n, &fate);
    *ret = 1;
    if (err < 0 || fate == FATE_NONE) {
        return err;
    }
    if (fate == FATE_NEW_HOST) {
        return link_new(x, table, i, n, ret);
    }
    bool keep = fate == FATE_KEEP_HOST;
    err = keep ? zero_host(x, host, x->s->cluster_size) : prepare_free(x, host);
    if (err < 0) {
        return err;
    }
    store_entry(x->s, table, i, keep ? data_entry(host, n) : 0);
    free_host(x, host, keep ? 0 : n);
    return 0;
}

static int expand_table(Qcow2Table *table, void *opaque)
{
    Expansion *x = opaque;
    uint64_t n;
    int ret = qcow2_get_refcount(x->bs, qcow2_table_offset(table) >> x->s->cluster_bits, &n);
    for (unsigned i = 0, done; ret == 0 && i < x->s->l2_entries; i += done) {
        ret = expand_entry(x, table, i, n, &done);
    }
    if (ret == 0 && (qcow2_cache_too_dirty(x->s->cache) || qcow2_quarantine_full(x->s))) {
        ret = qcow2_flush(x->bs);
    }
    return ret;
}

/* ---------------------------------------------------------------- 3 -> 2 */

static void edit_downgrade(Qcow2Header *h, GArray *extensions, void *opaque)
{
    h->version = 2;
    h->header_length = QCOW2_HDR_V2_LENGTH;
    h->incompatible = h->compatible = h->autoclear = 0;
    h->compression_type = QCOW2_COMPRESSION_ZLIB;
    qcow2_extensions_set(extensions, QCOW2_EXT_FEATURE_TABLE, NULL, 0);
    qcow2_extensions_set(extensions, QCOW2_EXT_BITMAPS, NULL, 0);
}

static void become_version2(BDRVQcow2State *s)
{
    s->version = 2;
    s->lazy_refcounts = s->discard_no_unref = false;
    s->compression_type = QCOW2_COMPRESSION_ZLIB;
    g_clear_pointer(&s->header_tail, g_free);
    atomic_store(&s->autoclear_pending, 0);
}

/* Everything stable, and COPIED on whatever has one owner now. */
static int settle(Expansion *x)
{
    g_autoptr(GArray) ones = g_array_new(false, false, sizeof(Qcow2HostRun));
    int ret = qcow2_flush_all(x->bs);
    ret = ret < 0 ? ret : qcow2_runs_with_count_one(x->bs, x->shared, ones);
    ret = ret < 0 ? ret : qcow2_set_copied_in(x->bs, ones);
    return ret < 0 ? ret : qcow2_flush_all(x->bs);
}

static bool expand(BlockDriverState *bs, QbProgress *progress, GError **errp)
{
    g_autoptr(GArray) shared = g_array_new(false, false, sizeof(Qcow2HostRun));
    Expansion x = {.bs = bs, .s = qcow2_state(bs), .backed = is_backed(bs), .shared = shared};
    bool expanded = for_each_table(bs, progress, expand_table, &x, errp);
    int ret = settle(&x);
    if (!expanded) {
        if (ret == 0) {
            (void)qcow2_set_incompatible(bs, 0, QCOW2_INCOMPAT_DIRTY);
        }
        return false; /* a dirty bit that stays is for the next writable open */
    }
    return ret == 0 || fail_errno(errp, ret);
}

static bool downgrade(BlockDriverState *bs, QbProgress *progress, GError **errp)
{
    Qcow2HeaderChange what = {.edit = edit_downgrade};
    if (!expand(bs, progress, errp)) {
        return false;
    }
    if (!qcow2_header_change(bs, &what, errp)) {
        (void)qcow2_set_incompatible(bs, 0, QCOW2_INCOMPAT_DIRTY);
        return false;
    }
    become_version2(qcow2_state(bs));
    return true;
}

bool qcow2_downgrade(BlockDriverState *bs, QbProgress *progress, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    bool lazy = s->lazy_refcounts;
    assert(s->version == 3 && s->refcount_order == 4 && !s->has_subclusters);
    s->lazy_refcounts = false; /* the dirty bit is used otherwise here */
    bool ok = downgrade(bs, progress, errp);
    s->lazy_refcounts = lazy && !ok;
    return ok;
}
