/*
 * Preallocation of the map: every cluster of a range gets its host cluster before it is written.
 *
 *   entry was                  becomes
 *   unallocated, plain zero    zero with host cluster (whose old content must not show)
 *     extended L2              host cluster, bits as they are
 *     version 2                data, the host cluster zeroed before
 *     external data file       data at the same offset, which the caller made read zero
 *   anything else              as it is
 *
 * The first cluster of each L2 table is a step of its own, so that the table lies right behind it and
 * not behind gigabytes: a later shrink can cut the file where the data end.
 *
 * Steps of at most MAX_STEP clusters; between them the operation may be cancelled or fail, which
 * leaves what was mapped so far.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-io-int.h"

#define MAX_STEP 2048
#define MAX_STEP_BYTES (UINT64_C(1) << 30)

typedef struct Prealloc {
    BlockDriverState *bs;
    BDRVQcow2State *s;
    uint64_t guest;    /* next cluster */
    uint64_t end;
    uint64_t want;     /* where the last host run ended */
    Qcow2L2Entry *old, *new;
} Prealloc;

static bool is_unmapped(const BDRVQcow2State *s, Qcow2L2Entry e)
{
    return !qcow2_entry_is_compressed(e) && !qcow2_entry_has_host(s, e);
}

static Qcow2L2Entry mapped_entry(const BDRVQcow2State *s, Qcow2L2Entry old, uint64_t host)
{
    Qcow2L2Entry e = {.entry = host | QCOW2_ENTRY_COPIED, .bitmap = old.bitmap};
    if (s->has_subclusters) {
        e.bitmap = s->data_file_raw ? UINT64_C(0xffffffff) : old.bitmap;
    } else if (!s->has_data_file && s->version >= 3) {
        e.entry |= QCOW2_ENTRY_ZERO;
    }
    return e;
}

/* Space for the first *n clusters, for fewer if there is no such run. Host offset or -errno. */
static int64_t take_space(Prealloc *p, size_t *n)
{
    uint64_t bytes = (uint64_t)*n << p->s->cluster_bits;
    if (p->s->has_data_file) {
        return (int64_t)p->guest;
    }
    int64_t host = qcow2_alloc_run(p->bs, p->want, &bytes);
    if (host < 0) {
        return host;
    }
    if (host == 0) {
        return qcow2_signal_corruption(p->bs, true, -1,
                                       "Preventing invalid allocation of data cluster at offset 0");
    }
    *n = (size_t)(bytes >> p->s->cluster_bits);
    p->want = (uint64_t)host + bytes;
    return host;
}

/* Version 2 has no zero flag, so the cluster itself must read zero. */
static int prepare_space(const Prealloc *p, uint64_t host, size_t n)
{
    uint64_t bytes = (uint64_t)n << p->s->cluster_bits;
    if (p->s->has_data_file) {
        return 0;
    }
    int ret = qcow2_check_overlap(p->bs, QCOW2_OL_NONE, host, bytes);
    if (ret == 0 && p->s->version < 3) {
        ret = bdrv_pwrite_zeroes(p->bs->file, (int64_t)host, (int64_t)bytes, 0);
    }
    return ret;
}

/* Maps up to @n unmapped clusters from p->guest on; the number done. */
static int64_t map_some(Prealloc *p, size_t n)
{
    size_t done = 0;
    int64_t host = take_space(p, &n);
    if (host < 0) {
        return host;
    }
    for (size_t i = 0; i < n; i++) {
        uint64_t at = (uint64_t)host + ((uint64_t)i << p->s->cluster_bits);
        p->new[i] = mapped_entry(p->s, p->old[i], at);
    }
    int ret = prepare_space(p, (uint64_t)host, n);
    if (ret == 0) {
        Qcow2Change change = {
            .guest = p->guest, .n = n, .old = p->old, .new = p->new, .type = QCOW2_DISCARD_OTHER,
        };
        ret = qcow2_link(p->bs, &change, &done);
    }
    if (done < n && !p->s->has_data_file) {
        qcow2_alloc_undo(p->bs, (uint64_t)host + ((uint64_t)done << p->s->cluster_bits),
                         (uint64_t)(n - done) << p->s->cluster_bits);
    }
    return ret < 0 ? ret : (int64_t)done;
}

static size_t step_clusters(const Prealloc *p)
{
    uint64_t left = qcow2_size_to_clusters(p->s, p->end - p->guest);
    uint64_t max = MIN(MAX_STEP, MAX_STEP_BYTES >> p->s->cluster_bits);
    unsigned index = qcow2_l2_index(p->s, p->guest);
    uint64_t of_table = index == 0 ? 1 : p->s->l2_entries - index;
    return (size_t)MIN(MIN(left, max), of_table);
}

/* The clusters done, 0: begin again, or -errno. */
static int64_t prealloc_step(Prealloc *p)
{
    size_t n = step_clusters(p), run = 0;
    Qcow2User user;
    qcow2_user_announce(p->s, &user);
    int ret = qcow2_load_entries(p->bs, p->guest, n, p->old);
    qcow2_user_leave(p->s, &user);
    if (ret < 0) {
        return ret;
    }
    bool unmapped = is_unmapped(p->s, p->old[0]);
    while (run < n && is_unmapped(p->s, p->old[run]) == unmapped) {
        run++;
    }
    return unmapped ? map_some(p, run) : (int64_t)run;
}

static int prealloc_all(Prealloc *p, QbProgress *progress)
{
    while (p->guest < p->end) {
        if (qb_progress_cancelled(progress)) {
            return -ECANCELED;
        }
        int64_t n = prealloc_step(p);
        int ret = n < 0 ? (int)n : qcow2_relieve(p->bs);
        if (ret < 0) {
            return ret;
        }
        p->guest += (uint64_t)n << p->s->cluster_bits;
        qb_progress_add(progress, (uint64_t)n << p->s->cluster_bits);
    }
    return 0;
}

bool qcow2_preallocate(BlockDriverState *bs, uint64_t guest, uint64_t bytes, QbProgress *progress,
                       GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    g_autofree Qcow2L2Entry *entries = g_new(Qcow2L2Entry, 2 * MAX_STEP);
    Prealloc p = {
        .bs = bs, .s = s, .guest = guest, .end = guest + bytes, .old = entries,
        .new = entries + MAX_STEP,
    };
    assert(qcow2_offset_into_cluster(s, guest) == 0);
    int ret = prealloc_all(&p, progress);
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Could not map guest clusters");
    }
    return ret == 0;
}
