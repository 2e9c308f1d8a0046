/*
 * Check: L2 entries that lead nowhere.
 *
 *      data entry, not aligned         the cluster it lies in, if that is counted as often as the
 *                                      entry exists and nobody else refers to it; else a dead end
 *      data beyond the end of the file zeroes, which is what it reads as
 *      stream beyond the end,
 *      subclusters allocated nowhere   a dead end
 *
 * Left alone such an entry makes an image that nobody may use: reading it marks the image corrupt;
 * what is beyond the end today is somebody else's when the file has grown, and a guest's write
 * would take a reference from it.  What it meant is lost, and must not read as something else.
 *
 * A dead end is an entry of a compressed cluster whose stream no decoder takes.  So reading that
 * cluster fails, by every program that knows the format, writing it makes it whole again, and
 * everything else is sound.  Dead ends share a stream, as far as counts can say.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-check.h"

bool qcow2_check_reads_as_zero(const BDRVQcow2State *s, Qcow2L2Entry e)
{
    if (s->has_subclusters) {
        return !(uint32_t)e.bitmap;
    }
    return s->version >= 3 && (e.entry & QCOW2_ENTRY_ZERO);
}

bool qcow2_check_leads_nowhere(const Qcow2Check *c, Qcow2L2Entry e)
{
    const BDRVQcow2State *s = c->s;
    uint64_t host = e.entry & QCOW2_ENTRY_OFFSET_MASK;
    if (e.entry & QCOW2_ENTRY_COMPRESSED) {
        uint32_t bytes;
        qcow2_parse_compressed(s, e.entry & ~QCOW2_ENTRY_COPIED, &host, &bytes);
        return !qcow2_check_was_inside(c, host, bytes);
    }
    if (!host) {
        return (uint32_t)e.bitmap;
    }
    return (qcow2_offset_into_cluster(s, host) && !qcow2_check_reads_as_zero(s, e)) ||
           !qcow2_check_was_inside(c, qcow2_start_of_cluster(s, host), s->cluster_size);
}

/* ---------------------------------------------------------------- dead ends */

/* A stream for another @refs references: both formats refuse what begins with these bytes. */
static bool make_stream(const Qcow2EntryMove *x)
{
    Qcow2Check *c = x->c;
    memset(x->m->buf, 0xff, c->s->cluster_size);
    int64_t to = qcow2_check_take_clusters(c, 1, QCOW2_REF_COMP);
    if (to < 0) {
        return false;
    }
    if ((uint64_t)to >> c->s->csize_shift ||
        qcow2_check_write(c, (uint64_t)to, c->s->cluster_size, x->m->buf) < 0) {
        qcow2_check_give_clusters(c, (uint64_t)to, 1, QCOW2_REF_COMP);
        return false;
    }
    x->m->dead_end = (uint64_t)to;
    return true;
}

bool qcow2_check_dead_end(const Qcow2EntryMove *x, Qcow2L2Entry *ret)
{
    Qcow2Check *c = x->c;
    uint64_t more = x->t->refs, cluster = x->m->dead_end >> c->s->cluster_bits;
    uint64_t room = MIN(c->s->refcount_max, UINT32_MAX);
    if (more > room || !c->give_up) {
        return false;
    }
    if (!cluster || qcow2_refmap_count(c->map, cluster) + more > room) {
        if (!make_stream(x)) {
            return false;
        }
        cluster = x->m->dead_end >> c->s->cluster_bits;
        more--; /* counted when it was taken */
    }
    if (more) {
        qcow2_refmap_add(c->map, cluster, 1, more, QCOW2_REF_COMP, NULL, NULL);
    }
    *ret = (Qcow2L2Entry){QCOW2_ENTRY_COMPRESSED | x->m->dead_end, 0};
    return true;
}

/* ---------------------------------------------------------------- what becomes of it */

/* Zeroes, without a place where the version can say so. */
static bool zeroes(const Qcow2EntryMove *x, Qcow2L2Entry *ret)
{
    const BDRVQcow2State *s = x->c->s;
    uint64_t zero = (x->e.bitmap >> QCOW2_SUBCLUSTERS) | (uint32_t)x->e.bitmap;
    if (!x->c->give_up && !qcow2_check_reads_as_zero(s, x->e)) {
        return false;
    }
    if (s->has_subclusters) {
        *ret = (Qcow2L2Entry){0, zero << QCOW2_SUBCLUSTERS};
    } else if (s->version >= 3) {
        *ret = (Qcow2L2Entry){QCOW2_ENTRY_ZERO, 0};
    } else if (!s->header.backing_offset) {
        *ret = (Qcow2L2Entry){0, 0};
    } else {
        memset(x->m->buf, 0, s->cluster_size);
        return qcow2_move_to_new_cluster(x, x->m->buf, ret);
    }
    return true;
}

/* Are only the low bits of the offset wrong? Then its cluster is counted for this entry, and
 * without it nobody's. */
static bool is_its_own(const Qcow2EntryMove *x)
{
    Qcow2Check *c = x->c;
    uint64_t cluster = x->host >> c->s->cluster_bits, count;
    unsigned flags = qcow2_refmap_flags(c->map, cluster);
    bool copied = x->e.entry & QCOW2_ENTRY_COPIED;
    return (flags & (QCOW2_REF_KINDS | QCOW2_REF_ALIAS)) == QCOW2_REF_DATA &&
           qcow2_refmap_count(c->map, cluster) == x->t->refs &&
           qcow2_check_disk_count(c, cluster, &count) && count == x->t->refs &&
           (!x->t->active_refs || copied == (count == 1));
}

/* An entry that is not aligned was counted in the cluster it lies in. */
static void replace_unaligned(const Qcow2EntryMove *x)
{
    uint64_t low = x->c->s->cluster_size - 1;
    Qcow2L2Entry becomes = {x->e.entry & ~(low & QCOW2_ENTRY_OFFSET_MASK), x->e.bitmap};
    if (is_its_own(x)) {
        qcow2_move_add(x, becomes, "data-unaligned", "the cluster can only be that at", true);
    } else if (qcow2_check_dead_end(x, &becomes)) {
        qcow2_move_add(x, becomes, "data-unaligned", QCOW2_SAY_GIVEN_UP, true);
        qcow2_move_leave(x);
    } else {
        qcow2_check_alias_stays(x);
    }
}

void qcow2_check_replace_lost(const Qcow2EntryMove *x)
{
    BDRVQcow2State *s = x->c->s;
    uint64_t start = qcow2_start_of_cluster(s, x->host);
    bool stream = x->e.entry & QCOW2_ENTRY_COMPRESSED;
    bool unaligned = !stream && qcow2_offset_into_cluster(s, x->host);
    bool encrypted = s->header.crypt_method != QCOW2_CRYPT_NONE;
    Qcow2L2Entry becomes;
    if (!qcow2_move_possible(x)) {
        qcow2_check_alias_stays(x);
    } else if (unaligned && qcow2_check_was_inside(x->c, start, s->cluster_size)) {
        replace_unaligned(x);
    } else if (stream || unaligned || !x->host ||
               (encrypted && !qcow2_check_reads_as_zero(s, x->e))) {
        if (qcow2_check_dead_end(x, &becomes)) {
            const char *code = !x->host ? "subcluster-bitmap"
                               : unaligned ? "data-unaligned" : "beyond-end-of-file";
            qcow2_move_add(x, becomes, code, QCOW2_SAY_GIVEN_UP, true);
        }
    } else if (zeroes(x, &becomes)) {
        qcow2_move_add(x, becomes, "beyond-end-of-file", "behind the end of the file; zeroes now",
                       true);
    }
}
