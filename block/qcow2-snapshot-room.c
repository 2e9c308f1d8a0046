/*
 * Room in refcounts for one more snapshot, where packed compressed clusters have used it up.
 *
 *      host cluster   [s][s][s][s][s][s][s]...   a reference for each stream, from each snapshot
 *
 *      829 streams, in the active tables and 77 snapshots: 64,662 of 65,535 references
 *
 *      active tables ---.                .--- the snapshots before
 *                        v              v
 *           [s][s]..  [s][s]..       [s][s][s][s][s][s][s]...
 *            moved here, count k       no more than these; nothing is added to it
 *
 * What a snapshot adds is the references of the active tables.  So their streams are moved out of
 * full clusters, byte for byte, into new ones, which the allocator fills up to half of the range at
 * most: then there is room for as many once more.  The move is the rewriting of compressed clusters
 * as any guest write would do it: new stream, link, old one to quarantine.  It is done before the
 * snapshot begins, and whatever stops it leaves a sound image with the same content.
 *
 * Invariants
 *  1. Nothing is moved unless each cluster without room is shared by streams of the active tables:
 *     other clusters have as many snapshots as they can count.
 *  2. A stream that is moved is as long as its entry says, with what follows it in its last sector;
 *     so no codec is needed, and a stream that cannot be unpacked stays what it was.
 *
 * Not done: moved streams are not packed as densely as before, since where in its last sector a
 * stream ends is not known.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-io-int.h"

typedef struct Search {
    const GArray *full;  /* Qcow2HostRun, sorted: clusters without room */
    bool *shared;        /* of each: a stream lies there */
    GArray *streams;     /* Qcow2Mapping */
} Search;

static int note_stream(const Qcow2Mapping *m, void *opaque)
{
    Search *s = opaque;
    bool found = false;
    if (m->type != QCOW2_COMPRESSED) {
        return 0;
    }
    for (guint i = qcow2_runs_find(s->full, m->host); i < s->full->len; i++) {
        if (g_array_index(s->full, Qcow2HostRun, i).offset >= m->host + m->comp_bytes) {
            break;
        }
        s->shared[i] = found = true;
    }
    if (found) {
        g_array_append_val(s->streams, *m);
    }
    return 0;
}

/* Invariant 1. */
static bool all_shared(const Search *s)
{
    for (guint i = 0; i < s->full->len; i++) {
        if (!s->shared[i]) {
            return false;
        }
    }
    return true;
}

static int move_streams(BlockDriverState *bs, const GArray *streams)
{
    int ret = 0;
    for (guint i = 0; i < streams->len && ret == 0; i++) {
        ret = qcow2_move_stream(bs, &g_array_index(streams, Qcow2Mapping, i));
    }
    return ret;
}

int qcow2_make_room_in_counts(BlockDriverState *bs, const GArray *tree)
{
    g_autoptr(GArray) full = g_array_new(false, false, sizeof(Qcow2HostRun));
    g_autoptr(GArray) streams = g_array_new(false, false, sizeof(Qcow2Mapping));
    int ret = qcow2_counts_without_room(bs, tree, full);
    if (ret < 0 || full->len == 0) {
        return ret;
    }
    if (qcow2_state(bs)->refcount_max < 2) {
        return -EINVAL; /* a new cluster would have no room either */
    }
    g_autofree bool *shared = g_new0(bool, full->len);
    Search s = {.full = full, .shared = shared, .streams = streams};
    ret = qcow2_walk_runs(bs, NULL, 0, INT64_MAX, note_stream, &s);
    if (ret == 0 && !all_shared(&s)) {
        ret = -EINVAL;
    }
    return ret < 0 ? ret : move_streams(bs, streams);
}
