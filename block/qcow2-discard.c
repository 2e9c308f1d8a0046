/*
 * Discard and zero: guest ranges that lose their content.
 *
 *                                                  zero, unmap / discard
 *   entry was                    zero, keep        not backed   may be backed    full discard
 *   unallocated                  as it is, or      as it is     plain zero       as it is
 *                                plain zero (1)
 *   plain zero                   as it is          0            as it is         0
 *   zero with host cluster       as it is          0, freed     plain zero, f.   0, freed
 *   data                         zero flag set     0, freed     plain zero, f.   0, freed
 *   compressed                   plain zero, freed 0, freed     plain zero, f.   0, freed
 *
 * (1) Where the backing file may show.  An image may be backed when it has a backing file, when its
 * header names one, or when the creator of the node says that one will come (BDRV_O_BACKING_LATER);
 * see bdrv_may_be_backed().  Version 2 has no zero flag: there all is 0 where the image is not
 * backed, and declined where it may be.  discard-no-unref turns "unmap" into "keep" followed by a
 * hole in the file.  A part of an extended L2 cluster changes its bits; with "unmap", the last part
 * of it that held data takes the host cluster along.
 *
 *     step:  skip what L1 does not map | drop a table that is cleared whole | load, change, link
 *
 * Invariants
 *  1. A range that was never allocated allocates nothing and costs a look at L1.
 *  2. Entries change first; what they referred to is freed afterwards, and punched by the
 *     quarantine when the change is stable.
 *  3. Where the host cluster stays with its guest cluster, requests that were writing there are
 *     waited for after the change, so that a late one cannot overwrite what a later request puts
 *     there.
 *  4. A step of at most MAX_STEP entries is done or not; the request may stop between steps.
 *
 * An external data file has no clusters to free.  A raw one must itself read zero: there zeroes are
 * written to it and the entries stay.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-io-int.h"

#define MAX_STEP 2048
#define ALL_SUBCLUSTERS UINT64_C(0xffffffff)

typedef enum ClearMode { CLEAR_KEEP, CLEAR_UNMAP, CLEAR_FULL } ClearMode;

typedef struct Clear {
    BlockDriverState *bs;
    BDRVQcow2State *s;
    ClearMode mode;
    Qcow2DiscardType type;
    bool punch_kept;     /* CLEAR_KEEP stands for an unmap: make holes */
    uint64_t guest, end; /* multiples of the subcluster size */
    int64_t below_end;   /* up to here the backing file shows where nothing is allocated */
    uint64_t disk_end;   /* rounded up to whole clusters */
    GArray *kept;        /* Qcow2HostRun: parts of host clusters that stay, their content void */
} Clear;

/* --- entries --- */

/* Subclusters of the cluster at @cluster that the range covers, as bits. */
static uint64_t covered(const Clear *c, uint64_t cluster)
{
    const BDRVQcow2State *s = c->s;
    uint64_t from = MAX(c->guest, cluster) - cluster;
    uint64_t to = MIN(c->end, cluster + s->cluster_size) - cluster;
    assert(from < to);
    uint64_t first = from >> s->subcluster_bits, last = to >> s->subcluster_bits;
    return (UINT64_C(1) << last) - (UINT64_C(1) << first);
}

static bool covers_all(const Clear *c, uint64_t mask)
{
    return mask == (UINT64_C(1) << c->s->subclusters_per_cluster) - 1;
}

/* The whole entry becomes 0 where it reads zero then anyhow. */
static bool clears_to_nothing(const Clear *c)
{
    bool unallocates = c->mode == CLEAR_UNMAP && !bdrv_may_be_backed(c->bs);
    return c->mode == CLEAR_FULL || c->s->version < 3 || unallocates;
}

/* Without a host cluster; the subclusters in @mask read zero, the others as they did: none of them
 * has data. */
static Qcow2L2Entry cleared_entry(const Clear *c, Qcow2L2Entry e, uint64_t mask)
{
    if (clears_to_nothing(c)) {
        return (Qcow2L2Entry){0};
    }
    if (c->s->has_subclusters) {
        return (Qcow2L2Entry){.bitmap = (e.bitmap & ALL_SUBCLUSTERS << 32) | mask << 32};
    }
    return (Qcow2L2Entry){.entry = QCOW2_ENTRY_ZERO};
}

/* All of the cluster, or all the data that a part of it still has. */
static bool takes_all(const Clear *c, Qcow2L2Entry e, uint64_t mask)
{
    bool parts = c->s->has_subclusters && !qcow2_entry_is_compressed(e);
    uint64_t data = parts ? e.bitmap & ALL_SUBCLUSTERS : 0;
    return covers_all(c, mask) || (data && !(data & ~mask));
}

/* Do the subclusters in @mask read zero as they are? @below: the backing file shows. */
static bool reads_zero(const BDRVQcow2State *s, Qcow2L2Entry e, uint64_t mask, bool below)
{
    unsigned sc = 0;
    while (sc < s->subclusters_per_cluster) {
        Qcow2ClusterType type;
        unsigned n = qcow2_entry_run(s, e, sc, &type);
        uint64_t bits = ((UINT64_C(1) << n) - 1) << sc;
        bool zero = qcow2_type_is_zero(type) || (qcow2_type_is_unallocated(type) && !below);
        if ((bits & mask) && !zero) {
            return false;
        }
        sc += n;
    }
    return true;
}

/* The entry keeps its host cluster (if any); the subclusters in @mask read zero. */
static Qcow2L2Entry zeroed_entry(const BDRVQcow2State *s, Qcow2L2Entry e, uint64_t mask)
{
    if (!s->has_subclusters) {
        e.entry |= QCOW2_ENTRY_ZERO;
    } else {
        e.bitmap = (e.bitmap & ~mask) | mask << 32;
    }
    return e;
}

static int new_entry(const Clear *c, Qcow2L2Entry e, uint64_t cluster, Qcow2L2Entry *ret)
{
    const BDRVQcow2State *s = c->s;
    uint64_t mask = covered(c, cluster);
    bool all = takes_all(c, e, mask), compressed = qcow2_entry_is_compressed(e);
    bool releases = compressed || (c->mode == CLEAR_UNMAP && qcow2_entry_has_host(s, e));
    *ret = e;
    if (c->mode == CLEAR_FULL || (all && clears_to_nothing(c))) {
        *ret = (Qcow2L2Entry){0};
    } else if (all && releases) {
        *ret = cleared_entry(c, e, mask);
    } else if (compressed) {
        return -ENOTSUP; /* a part of a stream cannot be taken out */
    } else if (!reads_zero(s, e, mask, (int64_t)cluster < c->below_end)) {
        *ret = zeroed_entry(s, e, mask);
    }
    return 0;
}

/* --- host clusters that stay --- */

/* The host bytes of the cluster at @cluster that the range covers. */
static Qcow2HostRun covered_run(const Clear *c, uint64_t cluster, Qcow2L2Entry e)
{
    uint64_t from = MAX(c->guest, cluster), to = MIN(c->end, cluster + c->s->cluster_size);
    return (Qcow2HostRun){qcow2_entry_host(e) + (from - cluster), to - from};
}

static void remember_kept(Clear *c, uint64_t cluster, const Qcow2L2Entry *old,
                          const Qcow2L2Entry *new, size_t n)
{
    const BDRVQcow2State *s = c->s;
    for (size_t i = 0; i < n; i++) {
        bool stays = qcow2_entry_copied(s, old[i]) && qcow2_entry_has_host(s, new[i]);
        if (!stays || qcow2_entry_equal(old[i], new[i])) {
            continue;
        }
        Qcow2HostRun run = covered_run(c, cluster + ((uint64_t)i << s->cluster_bits), old[i]);
        Qcow2HostRun *last = c->kept->len
                                 ? &g_array_index(c->kept, Qcow2HostRun, c->kept->len - 1)
                                 : NULL;
        if (last && last->offset + last->bytes == run.offset) {
            last->bytes += run.bytes;
        } else {
            g_array_append_val(c->kept, run);
        }
    }
}

static int punch_kept(Clear *c)
{
    if (!c->punch_kept || c->kept->len == 0) {
        return 0;
    }
    int ret = qcow2_flush(c->bs); /* the content goes when no stable entry shows it any more */
    for (guint i = 0; i < c->kept->len && ret == 0; i++) {
        const Qcow2HostRun *run = &g_array_index(c->kept, Qcow2HostRun, i);
        ret = bdrv_pdiscard(c->s->data_file, (int64_t)run->offset, (int64_t)run->bytes);
    }
    return ret;
}

static int finish_kept(Clear *c)
{
    for (guint i = 0; i < c->kept->len; i++) {
        const Qcow2HostRun *run = &g_array_index(c->kept, Qcow2HostRun, i);
        qcow2_inflight_wait_writers(c->s, run->offset, run->bytes); /* invariant 3 */
    }
    return punch_kept(c);
}

/* --- steps --- */

static int load_announced(BlockDriverState *bs, uint64_t guest, size_t n, Qcow2L2Entry *ret)
{
    Qcow2User user;
    qcow2_user_announce(qcow2_state(bs), &user);
    int err = qcow2_load_entries(bs, guest, n, ret);
    qcow2_user_leave(qcow2_state(bs), &user);
    return err;
}

/* Changes up to @n entries from @cluster on; the number done (0: begin again) or -errno. */
static int64_t change_entries(Clear *c, uint64_t cluster, size_t n, Qcow2L2Entry *old,
                              Qcow2L2Entry *new)
{
    size_t done;
    int ret = load_announced(c->bs, cluster, n, old);
    for (size_t i = 0; i < n && ret == 0; i++) {
        ret = new_entry(c, old[i], cluster + ((uint64_t)i << c->s->cluster_bits), &new[i]);
    }
    if (ret < 0) {
        return ret;
    }
    Qcow2Change change = {.guest = cluster, .n = n, .old = old, .new = new, .type = c->type};
    ret = qcow2_link(c->bs, &change, &done);
    remember_kept(c, cluster, old, new, done);
    return ret < 0 ? ret : (int64_t)done;
}

/* Bytes from @cluster on that stay as they are because L1 maps nothing there; 0: look closer. */
static uint64_t skippable(const Clear *c, uint64_t cluster)
{
    bool stays = c->mode == CLEAR_FULL || (int64_t)cluster >= c->below_end;
    return stays ? qcow2_unmapped_by_l1(c->s, cluster, c->end - cluster) : 0;
}

/* Does a table begin at @cluster that holds nothing but what is cleared? */
static bool clears_table(const Clear *c, uint64_t cluster)
{
    const BDRVQcow2State *s = c->s;
    uint64_t table_end = cluster + ((uint64_t)s->l2_entries << s->cluster_bits);
    bool to_disk_end = cluster < c->disk_end && c->end >= c->disk_end; /* behind it is nothing */
    return clears_to_nothing(c) && qcow2_l2_index(s, cluster) == 0 && c->guest <= cluster
           && (c->end >= table_end || to_disk_end);
}

static size_t step_clusters(const Clear *c, uint64_t cluster)
{
    const BDRVQcow2State *s = c->s;
    uint64_t left = qcow2_size_to_clusters(s, c->end - cluster);
    uint64_t in_table = s->l2_entries - qcow2_l2_index(s, cluster);
    return (size_t)MIN(MIN(left, in_table), MAX_STEP);
}

/* The bytes from @cluster on that are done, 0: begin again, or -errno. */
static int64_t clear_step(Clear *c, uint64_t cluster, Qcow2L2Entry *entries)
{
    const BDRVQcow2State *s = c->s;
    uint64_t skip = skippable(c, cluster);
    if (skip > 0) {
        return (int64_t)skip;
    }
    if (clears_table(c, cluster)) {
        int ret = qcow2_drop_table(c->bs, qcow2_l1_index(s, cluster), c->type);
        return ret < 0 ? ret : (int64_t)((uint64_t)s->l2_entries << s->cluster_bits);
    }
    int64_t n = change_entries(c, cluster, step_clusters(c, cluster), entries, entries + MAX_STEP);
    return n < 0 ? n : n << s->cluster_bits;
}

/* Who cuts all off wants the space in the end, and pays for few flushes: what waits is bounded by the
 * memory for its runs. Who allocates meanwhile flushes by the usual bound (qcow2_relieve()). */
static int relieve(const Clear *c)
{
    bool waits = c->mode == CLEAR_FULL && c->type == QCOW2_DISCARD_ALWAYS;
    if (waits) {
        bool much = qcow2_cache_too_dirty(c->s->cache) || qcow2_quarantine_crowded(c->s);
        return much ? qcow2_write_back(c->bs) : 0;
    }
    return qcow2_relieve(c->bs);
}

static int clear_all(Clear *c)
{
    g_autofree Qcow2L2Entry *entries = g_try_new(Qcow2L2Entry, 2 * MAX_STEP);
    uint64_t cluster = qcow2_start_of_cluster(c->s, c->guest);
    if (!entries) {
        return -ENOMEM;
    }
    while (cluster < c->end) {
        int64_t done = clear_step(c, cluster, entries);
        if (done < 0) {
            return (int)done;
        }
        cluster += (uint64_t)done;
        int ret = relieve(c);
        if (ret < 0) {
            return ret;
        }
    }
    return 0;
}

static int clear_init(Clear *c, BlockDriverState *bs, uint64_t guest, uint64_t bytes)
{
    BDRVQcow2State *s = qcow2_state(bs);
    int64_t length = bdrv_getlength(bs);
    if (length < 0) {
        return (int)length;
    }
    c->bs = bs;
    c->s = s;
    c->guest = guest;
    c->disk_end = qb_align_up((uint64_t)length, s->cluster_size);
    c->end = guest + bytes;
    if (c->end >= (uint64_t)length) {
        c->end = qb_align_up(c->end, s->cluster_size); /* what lies behind the end is nobody's */
    }
    assert(qb_is_aligned(c->guest | c->end, s->subcluster_size));
    c->below_end = bdrv_backing_end(bs);
    return (int)MIN(c->below_end, 0);
}

static int clear_range(Clear *c, uint64_t guest, uint64_t bytes)
{
    int ret = bytes ? clear_init(c, c->bs, guest, bytes) : 0;
    if (ret < 0 || bytes == 0) {
        return ret;
    }
    ret = relieve(c); /* what waits since earlier ones, before more comes */
    if (ret < 0) {
        return ret;
    }
    c->kept = g_array_new(false, false, sizeof(Qcow2HostRun));
    ret = clear_all(c);
    int err = finish_kept(c);
    g_array_free(c->kept, true);
    return ret < 0 ? ret : err;
}

/* --- external data file --- */

static bool punches(const BDRVQcow2State *s, Qcow2DiscardType type)
{
    const bool by_type[] = {
        [QCOW2_DISCARD_NEVER] = false,
        [QCOW2_DISCARD_ALWAYS] = true,
        [QCOW2_DISCARD_REQUEST] = s->discard_request,
        [QCOW2_DISCARD_SNAPSHOT] = s->discard_snapshot,
        [QCOW2_DISCARD_OTHER] = s->discard_other,
    };
    return by_type[type];
}

/* A raw data file must read zero by itself. */
static int zero_data_file(BlockDriverState *bs, uint64_t guest, uint64_t bytes, int flags)
{
    BDRVQcow2State *s = qcow2_state(bs);
    qcow2_inflight_wait_writers(s, guest, bytes);
    return bdrv_pwrite_zeroes(s->data_file, (int64_t)guest, (int64_t)bytes,
                              flags & BDRV_REQ_MAY_UNMAP);
}

/* The entries do not name the range any more. After a full discard the backing file shows there, so
 * the data go only when that is stable; else they read zero before and after. */
static int discard_in_data_file(BlockDriverState *bs, uint64_t guest, uint64_t bytes,
                                Qcow2DiscardHow how, Qcow2DiscardType type)
{
    BDRVQcow2State *s = qcow2_state(bs);
    qcow2_inflight_wait_writers(s, guest, bytes);
    if (!punches(s, type)) {
        return 0;
    }
    int ret = how == QCOW2_DISCARD_FULL ? qcow2_flush(bs) : 0;
    return ret < 0 ? ret : bdrv_pdiscard(s->data_file, (int64_t)guest, (int64_t)bytes);
}

/* --- the two operations --- */

int qcow2_discard_clusters(BlockDriverState *bs, uint64_t guest, uint64_t bytes,
                           Qcow2DiscardHow how, Qcow2DiscardType type)
{
    BDRVQcow2State *s = qcow2_state(bs);
    bool to_zero = how == QCOW2_DISCARD_TO_ZERO;
    assert(qcow2_offset_into_cluster(s, guest) == 0 || to_zero);
    if (to_zero && s->version < 3 && bdrv_may_be_backed(bs)) {
        return 0; /* version 2 cannot say "zero" over a backing file; a discard is advice */
    }
    if (to_zero && s->data_file_raw) {
        return zero_data_file(bs, guest, bytes, punches(s, type) ? BDRV_REQ_MAY_UNMAP : 0);
    }
    bool keep = to_zero && s->discard_no_unref;
    Clear c = {
        .bs = bs,
        .mode = keep ? CLEAR_KEEP : to_zero ? CLEAR_UNMAP : CLEAR_FULL,
        .type = type,
        .punch_kept = keep && punches(s, type),
    };
    int ret = clear_range(&c, guest, bytes);
    if (ret == 0 && s->has_data_file && !keep) {
        ret = discard_in_data_file(bs, guest, bytes, how, type);
    }
    return ret;
}

int qcow2_zero_clusters(BlockDriverState *bs, uint64_t guest, uint64_t bytes, int flags)
{
    BDRVQcow2State *s = qcow2_state(bs);
    bool unmap = flags & BDRV_REQ_MAY_UNMAP;
    if (s->version < 3 && bdrv_may_be_backed(bs)) {
        return -ENOTSUP;
    }
    if (s->data_file_raw) {
        return zero_data_file(bs, guest, bytes, flags);
    }
    bool keep = s->version >= 3 && (!unmap || s->discard_no_unref);
    Clear c = {
        .bs = bs,
        .mode = keep ? CLEAR_KEEP : CLEAR_UNMAP,
        .type = QCOW2_DISCARD_REQUEST,
        .punch_kept = unmap && keep,
    };
    int ret = clear_range(&c, guest, bytes);
    if (ret == 0 && s->has_data_file && !keep) {
        ret = discard_in_data_file(bs, guest, bytes, QCOW2_DISCARD_TO_ZERO, QCOW2_DISCARD_REQUEST);
    }
    return ret;
}

/* --- requests --- */

static int begin_request(BlockDriverState *bs, BdrvRequest *req)
{
    BDRVQcow2State *s = qcow2_state(bs);
    if (atomic_load(&s->corrupt)) {
        return -ENOMEDIUM;
    }
    qcow2_serialise(s, req);
    return 0;
}

/* Moves *pos down (or up) to a multiple of the subcluster size if what lies between reads zero. */
static int widen_start(BlockDriverState *bs, uint64_t *pos)
{
    uint64_t down = qb_align_down(*pos, qcow2_state(bs)->subcluster_size);
    int zero = down == *pos ? 1 : qcow2_reads_zero(bs, down, *pos - down);
    if (zero == 1) {
        *pos = down;
    }
    return zero < 0 ? zero : zero == 0 ? -ENOTSUP : 0;
}

static int widen_end(BlockDriverState *bs, uint64_t *pos)
{
    int64_t length = bdrv_getlength(bs);
    uint64_t up = qb_align_up(*pos, qcow2_state(bs)->subcluster_size);
    if (length < 0) {
        return (int)length;
    }
    uint64_t visible = MIN(up, MAX(*pos, (uint64_t)length)); /* behind the end nothing is lost */
    int zero = visible == *pos ? 1 : qcow2_reads_zero(bs, *pos, visible - *pos);
    if (zero == 1) {
        *pos = up;
    }
    return zero < 0 ? zero : zero == 0 ? -ENOTSUP : 0;
}

/* Part of a compressed cluster: the zeroes are written, which unpacks it. */
static int write_zeroes_out(BlockDriverState *bs, BdrvRequest *req, uint64_t guest, uint64_t bytes)
{
    IoVector flat;
    QB_AUTO_FREE void *zeroes = calloc(1, (size_t)bytes);
    if (!zeroes) {
        return -ENOMEM;
    }
    iov_vector_init_buf(&flat, zeroes, (size_t)bytes);
    Qcow2Io io = {
        .bs = bs, .s = qcow2_state(bs), .req = req, .qiov = &flat, .base = guest,
    };
    return qcow2_write_guest(&io, guest, bytes);
}

static int zero_part_of_cluster(BlockDriverState *bs, BdrvRequest *req, uint64_t guest,
                                uint64_t end, int flags)
{
    if (guest >= end) {
        return 0;
    }
    int ret = qcow2_zero_clusters(bs, guest, end - guest, flags);
    return ret == -ENOTSUP ? write_zeroes_out(bs, req, guest, end - guest) : ret;
}

/* [start, end): multiples of the subcluster size. Only extended L2 has heads and tails. */
static int zero_widened(BlockDriverState *bs, BdrvRequest *req, uint64_t start, uint64_t end,
                        int flags)
{
    BDRVQcow2State *s = qcow2_state(bs);
    uint64_t first = qb_align_up(start, s->cluster_size);
    uint64_t last = qcow2_start_of_cluster(s, end);
    if (first >= last) { /* no whole cluster: if this is declined, the core writes zeroes */
        return qcow2_zero_clusters(bs, start, end - start, flags);
    }
    int ret = qcow2_zero_clusters(bs, first, last - first, flags);
    if (ret == 0) {
        ret = zero_part_of_cluster(bs, req, start, first, flags);
    }
    if (ret == 0) {
        ret = zero_part_of_cluster(bs, req, last, end, flags);
    }
    return ret;
}

int qcow2_pwrite_zeroes(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                        int flags)
{
    uint64_t start = (uint64_t)offset, end = (uint64_t)(offset + bytes);
    int ret = begin_request(bs, req);
    if (ret == 0) {
        ret = widen_start(bs, &start);
    }
    if (ret == 0) {
        ret = widen_end(bs, &end);
    }
    if (ret == 0) {
        ret = zero_widened(bs, req, start, end, flags);
    }
    return ret == 0 && (flags & BDRV_REQ_FUA) ? qcow2_flush(bs) : ret;
}

/* Parts of clusters come alone (the core cuts at pdiscard_alignment), so that a compressed one, which
 * declines, keeps nobody else from going. */
int qcow2_pdiscard(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes)
{
    BDRVQcow2State *s = qcow2_state(bs);
    uint64_t start = qb_align_up((uint64_t)offset, s->subcluster_size);
    uint64_t end = (uint64_t)(offset + bytes);
    int64_t length = bdrv_getlength(bs);
    if (length < 0) {
        return (int)length;
    }
    if (end < (uint64_t)length) {
        end = qb_align_down(end, s->subcluster_size);
    }
    if (start >= end) {
        return 0; /* no whole subcluster: a discard is advice */
    }
    int ret = begin_request(bs, req);
    return ret < 0 ? ret
                   : qcow2_discard_clusters(bs, start, end - start, QCOW2_DISCARD_TO_ZERO,
                                            QCOW2_DISCARD_REQUEST);
}
