/*
 * Options of an open qcow2 node, and their change by reopen.
 *
 *     json options --take()--> Qcow2Options --apply()--> BDRVQcow2State
 *                                  |
 *        open: applied at once     reopen: kept in state->opaque from prepare to commit
 *
 * Invariants
 *  1. take() changes nothing but the option object; a refused value leaves the node as it was.
 *  2. Going read-only writes everything back in prepare, while the file is still writable; what
 *     fails there leaves the node writable.
 *
 * Not done: a dirty image does not become writable by reopen: it must be repaired first, which
 * happens when it is opened.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2.h"

#include <inttypes.h>
#include <string.h>
#include <unistd.h>

/* ---------------------------------------------------------------- overlap-check */

enum {
    OL_CONSTANT = QCOW2_OL_MAIN_HEADER | QCOW2_OL_ACTIVE_L1 | QCOW2_OL_REFCOUNT_TABLE |
                  QCOW2_OL_SNAPSHOT_TABLE | QCOW2_OL_BITMAP_DIRECTORY,
    OL_CACHED = OL_CONSTANT | QCOW2_OL_ACTIVE_L2 | QCOW2_OL_REFCOUNT_BLOCK | QCOW2_OL_INACTIVE_L1,
    OL_ALL = OL_CACHED | QCOW2_OL_INACTIVE_L2,
};

static const struct {
    const char *name;
    int bits;
} overlap_templates[] = {
    {"none", 0}, {"constant", OL_CONSTANT}, {"cached", OL_CACHED}, {"all", OL_ALL},
};

static const struct {
    const char *key;
    int bit;
} overlap_sections[] = {
    {"overlap-check.main-header", QCOW2_OL_MAIN_HEADER},
    {"overlap-check.active-l1", QCOW2_OL_ACTIVE_L1},
    {"overlap-check.active-l2", QCOW2_OL_ACTIVE_L2},
    {"overlap-check.refcount-table", QCOW2_OL_REFCOUNT_TABLE},
    {"overlap-check.refcount-block", QCOW2_OL_REFCOUNT_BLOCK},
    {"overlap-check.snapshot-table", QCOW2_OL_SNAPSHOT_TABLE},
    {"overlap-check.inactive-l1", QCOW2_OL_INACTIVE_L1},
    {"overlap-check.inactive-l2", QCOW2_OL_INACTIVE_L2},
    {"overlap-check.bitmap-directory", QCOW2_OL_BITMAP_DIRECTORY},
};

static bool find_template(const char *name, int *ret, GError **errp)
{
    for (size_t i = 0; i < G_N_ELEMENTS(overlap_templates); i++) {
        if (!strcmp(name, overlap_templates[i].name)) {
            *ret = overlap_templates[i].bits;
            return true;
        }
    }
    qb_error_set(errp, EINVAL,
                 "Unsupported value '%s' for qcow2 option 'overlap-check'. Allowed are any of the"
                 " following: none, constant, cached, all", name);
    return false;
}

static bool take_overlap_template(json_t *options, int *ret, GError **errp)
{
    g_autofree char *plain = qb_opt_take_string(options, "overlap-check");
    g_autofree char *dotted = qb_opt_take_string(options, "overlap-check.template");
    if (plain && dotted && strcmp(plain, dotted)) {
        qb_error_set(errp, EINVAL,
                     "Conflicting values for qcow2 options 'overlap-check' ('%s') and"
                     " 'overlap-check.template' ('%s')", plain, dotted);
        return false;
    }
    const char *name = plain ? plain : dotted ? dotted : "cached";
    return find_template(name, ret, errp);
}

static bool take_overlap(json_t *options, int *ret, GError **errp)
{
    if (!take_overlap_template(options, ret, errp)) {
        return false;
    }
    for (size_t i = 0; i < G_N_ELEMENTS(overlap_sections); i++) {
        int bit = overlap_sections[i].bit;
        bool on;
        if (!qb_opt_take_bool(options, overlap_sections[i].key, *ret & bit, &on, errp)) {
            return false;
        }
        *ret = on ? *ret | bit : *ret & ~bit;
    }
    return true;
}

/* ---------------------------------------------------------------- caches */

#define DEFAULT_SLICE 4096

static bool take_entry_size(const BDRVQcow2State *s, json_t *options, uint64_t *ret,
                            GError **errp)
{
    bool said = json_object_get(options, "l2-cache-entry-size");
    uint64_t size;
    if (!qb_opt_take_size(options, "l2-cache-entry-size", s->cluster_size, &size, errp)) {
        return false;
    }
    if (size < 512 || size > s->cluster_size || !qb_is_power_of_2(size)) {
        qb_error_set(errp, EINVAL,
                     "L2 cache entry size must be a power of two between 512 and the cluster size"
                     " (%u)", s->cluster_size);
        return false;
    }
    *ret = said ? size : 0;
    return true;
}

static uint64_t minimum_of_refblocks(const BDRVQcow2State *s)
{
    return (uint64_t)s->cluster_size * 4;
}

typedef struct CacheSizes {
    bool has_total, has_l2, has_refcount;
    uint64_t total, l2, refcount;
} CacheSizes;

/* What was not said follows from the total: a fifth of it for refcount blocks, but no more than
 * what is enough for most. What was said is not 0 afterwards. */
static bool settle_cache_sizes(const BDRVQcow2State *s, CacheSizes *c, GError **errp)
{
    const char *problem = NULL;
    if (c->has_total && c->has_l2 && c->has_refcount) {
        problem = "cache-size, l2-cache-size and refcount-cache-size may not be set at the same"
                  " time";
    } else if (c->has_total && c->has_l2 && c->l2 > c->total) {
        problem = "l2-cache-size may not exceed cache-size";
    } else if (c->has_total && c->has_refcount && c->refcount > c->total) {
        problem = "refcount-cache-size may not exceed cache-size";
    }
    if (problem) {
        qb_error_set(errp, EINVAL, "%s", problem);
        return false;
    }
    if (c->has_total && !c->has_l2 && !c->has_refcount) {
        c->refcount = MIN(c->total / 5, minimum_of_refblocks(s));
    } else if (c->has_total && !c->has_refcount) {
        c->refcount = c->total - c->l2;
    }
    if (c->has_total && !c->has_l2) {
        c->l2 = c->total - c->refcount;
    }
    c->l2 = c->has_total || c->has_l2 ? MAX(c->l2, 1) : 0;
    c->refcount = c->has_total || c->has_refcount ? MAX(c->refcount, 1) : 0;
    return true;
}

static bool take_caches(const BDRVQcow2State *s, json_t *options, Qcow2Options *o, GError **errp)
{
    CacheSizes c = {
        .has_total = json_object_get(options, "cache-size"),
        .has_l2 = json_object_get(options, "l2-cache-size"),
        .has_refcount = json_object_get(options, "refcount-cache-size"),
    };
    if (!qb_opt_take_size(options, "cache-size", 0, &c.total, errp) ||
        !qb_opt_take_size(options, "l2-cache-size", 0, &c.l2, errp) ||
        !qb_opt_take_size(options, "refcount-cache-size", 0, &c.refcount, errp) ||
        !settle_cache_sizes(s, &c, errp) ||
        !take_entry_size(s, options, &o->l2_cache_entry_size, errp) ||
        !qb_opt_take_uint(options, "cache-clean-interval", 600, &o->cache_clean_interval, errp)) {
        return false;
    }
    if (o->cache_clean_interval > UINT32_MAX) {
        qb_error_set(errp, EINVAL, "Cache clean interval too big");
        return false;
    }
    o->l2_cache_size = c.l2;
    o->refcount_cache_size = c.refcount;
    return true;
}

/* An eighth of the memory, at most 1 GiB. */
static uint64_t default_limit(uint64_t tables, const BDRVQcow2State *s)
{
    uint64_t memory = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    return MIN((tables + 8) << s->cluster_bits, MIN(memory / 8, UINT64_C(1) << 30));
}

/* Without options both kinds have room for the whole disk: L2 tables with a few for VM state, twice
 * the refcount blocks, as snapshots make the file longer. Where L2 tables do not fit, and nobody
 * says otherwise, they are loaded in slices; also where few entries of each will be looked at. */
Qcow2CacheConfig qcow2_cache_config(const BDRVQcow2State *s)
{
    uint64_t tables = qcow2_size_to_l1(s, s->header.size);
    uint64_t clusters = qcow2_size_to_clusters(s, s->header.size);
    uint64_t l2 = s->l2_cache_size ? s->l2_cache_size : default_limit(tables, s);
    uint64_t refs = s->refcount_cache_size ? s->refcount_cache_size
                                           : default_limit((clusters >> s->refblock_bits) * 2, s);
    bool covers = l2 >> s->cluster_bits >= tables;
    bool whole = covers && !(s->bs->open_flags & BDRV_O_SCATTERED);
    uint64_t part = s->l2_cache_entry_size ? s->l2_cache_entry_size
                    : whole                ? s->cluster_size
                                           : MIN(s->cluster_size, DEFAULT_SLICE);
    return (Qcow2CacheConfig){
        .limit[QCOW2_TABLE_L2] = MAX(l2, part * 8),
        .limit[QCOW2_TABLE_REFBLOCK] = MAX(refs, minimum_of_refblocks(s)),
        .l2_part = part,
    };
}

void qcow2_cache_fit(BDRVQcow2State *s)
{
    Qcow2CacheConfig config = qcow2_cache_config(s);
    qcow2_cache_configure(s->cache, &config);
}

/* ---------------------------------------------------------------- all of them */

static bool take_discards(BlockDriverState *bs, json_t *options, Qcow2Options *o, GError **errp)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    o->follow_discard = !json_object_get(options, "pass-discard-request");
    if (!qb_opt_take_bool(options, "pass-discard-request", false, &o->discard_request, errp) ||
        !qb_opt_take_bool(options, "pass-discard-snapshot", true, &o->discard_snapshot, errp) ||
        !qb_opt_take_bool(options, "pass-discard-other", false, &o->discard_other, errp) ||
        !qb_opt_take_bool(options, "discard-no-unref", false, &o->discard_no_unref, errp)) {
        return false;
    }
    if (o->discard_no_unref && s->version < 3) {
        qb_error_set(errp, EINVAL, "discard-no-unref is only supported since qcow2 version 3");
        return false;
    }
    return true;
}

static bool take_lazy_refcounts(const BDRVQcow2State *s, json_t *options, Qcow2Options *o,
                                GError **errp)
{
    bool def = s->header.compatible & QCOW2_COMPAT_LAZY_REFCOUNTS;
    if (!qb_opt_take_bool(options, "lazy-refcounts", def, &o->lazy_refcounts, errp)) {
        return false;
    }
    if (o->lazy_refcounts && s->version < 3) {
        qb_error_set(errp, EINVAL,
                     "Lazy refcounts require a qcow2 image of version 3 (compat=1.1) or above");
        return false;
    }
    return true;
}

bool qcow2_options_take(BlockDriverState *bs, json_t *options, Qcow2Options *ret, GError **errp)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    Qcow2Options o = {0};
    if (!take_lazy_refcounts(s, options, &o, errp) || !take_discards(bs, options, &o, errp) ||
        !take_overlap(options, &o.overlap_check, errp) || !take_caches(s, options, &o, errp)) {
        return false;
    }
    *ret = o;
    return true;
}

void qcow2_options_apply(BDRVQcow2State *s, const Qcow2Options *o)
{
    s->lazy_refcounts = o->lazy_refcounts;
    s->discard_request = o->follow_discard ? s->bs->discard_unmap : o->discard_request;
    s->discard_snapshot = o->discard_snapshot;
    s->discard_other = o->discard_other;
    s->discard_no_unref = o->discard_no_unref;
    bool other_guard = s->overlap_check != o->overlap_check;
    s->overlap_check = o->overlap_check;
    if (other_guard && s->snapshots) {
        qcow2_guard_snapshots(s->bs);
    }
    s->l2_cache_size = o->l2_cache_size;
    s->refcount_cache_size = o->refcount_cache_size;
    s->l2_cache_entry_size = o->l2_cache_entry_size;
    s->cache_clean_interval = o->cache_clean_interval;
    if (s->cache) {
        qcow2_cache_fit(s);
        if (s->cache_clean_interval) { /* a longer one counts from the next cleaning on */
            qcow2_background_hasten(s, QCOW2_BG_CLEAN, s->cache_clean_interval * 1000);
        }
    }
}

/* ---------------------------------------------------------------- reopen */

static bool may_become_writable(const BDRVQcow2State *s, GError **errp)
{
    if (s->shows_snapshot) {
        qb_error_set(errp, EACCES, "A node that shows a snapshot cannot become writable");
        return false;
    }
    if (s->header.incompatible & QCOW2_INCOMPAT_CORRUPT) {
        qb_error_set(errp, EACCES, "qcow2: Image is corrupt; cannot be opened read/write");
        return false;
    }
    return true;
}

static bool check_written(const BlockDriverState *bs, int ret, GError **errp)
{
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Could not write back the metadata of '%s'", bs->filename);
    }
    return ret == 0;
}

/* The file becomes read-only too: nothing may be left to write. Freed clusters need a second turn. */
static bool write_everything(BlockDriverState *bs, GError **errp)
{
    BDRV_GRAPH_GUARD();
    if (!qcow2_bitmaps_store(bs, errp)) {
        g_prefix_error(errp, "Lost persistent bitmaps during inactivation of node '%s': ",
                       bs->node_name);
        return false;
    }
    int ret = qcow2_flush_all(bs);
    return check_written(bs, ret < 0 ? ret : qcow2_lazy_settle(bs), errp);
}

static bool end_lazy(BlockDriverState *bs, GError **errp)
{
    BDRV_GRAPH_GUARD();
    return check_written(bs, qcow2_lazy_settle(bs), errp);
}

static bool change_of_mode(BDRVReopenState *state, bool lazy, GError **errp)
{
    BlockDriverState *bs = state->bs;
    if (state->read_only == bs->read_only) {
        return lazy || end_lazy(bs, errp);
    }
    return state->read_only ? write_everything(bs, errp)
                            : may_become_writable(qcow2_state(bs), errp);
}

bool qcow2_reopen_prepare(BDRVReopenState *state, GError **errp)
{
    g_autofree Qcow2Options *o = g_new0(Qcow2Options, 1);
    if (!qcow2_options_take(state->bs, state->options, o, errp) ||
        !change_of_mode(state, o->lazy_refcounts, errp)) {
        return false;
    }
    state->opaque = g_steal_pointer(&o);
    return true;
}

void qcow2_reopen_commit(BDRVReopenState *state)
{
    g_autofree Qcow2Options *o = state->opaque;
    BDRVQcow2State *s = qcow2_state(state->bs);
    state->opaque = NULL;
    qcow2_options_apply(s, o);
    if (!state->read_only) {
        qcow2_set_autoclear_pending(s);
    }
}

void qcow2_reopen_abort(BDRVReopenState *state)
{
    g_clear_pointer(&state->opaque, g_free);
}
