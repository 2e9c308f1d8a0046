/*
 * The order of writes: power is lost when one of them has gone ahead of all others that are not
 * stable yet, or is the last that is missing.
 *
 *      log     W1 W2 FLUSH W3 W4 W5 W6 FLUSH
 *      alone   W1 W2             W5              the disk was told to do W5 last, and did it first
 *      missing W1 W2       W3 W4    W6           it has done all but W5
 *
 * Both are made for every event of an operation, without chance, so that a pointer that is
 * published before what it points to is found each time.  The cases are what other implementations
 * got wrong; the crash suite goes through all operations and kinds, by chance.
 *
 *      order [-p /order/NAME]      ORDER_STEP=N: every N-th event only
 *
 * SPDX-License-Identifier: MIT
 */
#include <inttypes.h>
#include <stdlib.h>

#include "tests/crash/replay.h"
#include "util/pool.h"

typedef struct Case {
    const char *name, *op, *kind;
} Case;

static const Case cases[] = {
    {"cluster-is-not-reused-before-its-unlink-is-stable", "overwrite", "compressed"},
    {"entry-is-not-published-before-its-data", "write", "v3"},
    {"entry-is-not-published-before-its-data/lazy-refcounts", "write", "lazy"},
    {"entry-is-not-published-before-its-data/subclusters", "cow", "ext"},
    {"entry-is-not-published-before-its-data/reused-clusters", "random-1", "512"},
    {"discard-punches-behind-the-unlink", "discard", "v3"},
    {"commit-does-not-empty-before-the-base-is-stable", "commit", "backing"},
    {"commit-does-not-punch-what-is-mapped/snapshot", "commit", "backing-snapshot"},
    {"commit-does-not-punch-what-is-mapped/version-2", "commit", "backing-v2"},
    {"rebase-copies-before-it-names-the-base", "rebase", "backing"},
    {"rebase-copies-before-it-drops-the-base", "rebase-none", "backing"},
    {"shrink-unlinks-before-it-cuts", "shrink", "v3"},
    {"shrink-unlinks-before-it-cuts/subclusters", "shrink", "ext"},
    {"shrink-unlinks-before-it-cuts/version-2", "shrink", "v2"},
    {"copied-flags-follow-counts/snapshot-create", "snapshot-create", "v3"},
    {"copied-flags-follow-counts/snapshot-create/version-2", "snapshot-create", "v2"},
    {"copied-flags-follow-counts/snapshot-delete", "snapshot-delete", "snapshot"},
    {"copied-flags-follow-counts/snapshot-delete/version-2", "snapshot-delete", "snapshot-v2"},
    {"copied-flags-follow-counts/snapshot-apply", "snapshot-apply", "snapshot"},
    {"copied-flags-follow-counts/snapshot-apply/version-2", "snapshot-apply", "snapshot-v2"},
    {"counts-are-stable-before-they-are-needed/block", "new-refcount-block", "512"},
    {"counts-are-stable-before-they-are-needed/table", "grow-refcount-table", "512"},
    {"table-is-empty-before-l1-names-it", "new-table-on-remains", "v3"},
    {"table-is-stable-before-the-header-names-it/l1", "grow-l1-table", "512"},
    {"table-is-stable-before-the-header-names-it/empty", "make-empty", "backing"},
    {"table-is-stable-before-the-header-names-it/width", "amend-width", "v3"},
    {"table-is-stable-before-the-header-names-it/width-back", "amend-back", "v3"},
    {"names-parse-at-each-step", "rename-base", "backing"},
    {"names-parse-at-each-step/extensions-grow", "bitmap-first", "backing"},
    {"bitmap-is-in-use-before-it-is-wrong", "bitmap-session", "bitmap"},
    {"bitmap-is-listed-when-it-is-whole/added", "bitmap-add", "bitmap"},
    {"bitmap-is-listed-when-it-is-whole/chunks", "bitmap-session", "bitmap-512"},
    {"dirty-bit-covers-lazy-counts", "random-1", "lazy"},
    {"entry-is-not-published-before-its-data/data-file", "write", "data-file"},
};

static void try_state(const Recording *r, State state)
{
    g_autofree char *name = state_name(&state), *why = NULL;
    World w = recording_world(r, state_build(r, &state));
    if (!world_judge(&w, false, &why)) {
        g_test_message("%s/%s, state %s: %s", r->op->name, r->world->kind->name, name, why);
        g_test_fail();
    }
    world_copy_clear(&w);
}

static guint step(void)
{
    const char *text = g_getenv("ORDER_STEP");
    return text ? (guint)MAX(atoi(text), 1) : 1;
}

static void test_case(gconstpointer data)
{
    const Case *c = data;
    g_autofree char *why = NULL;
    const Operation *op = operation_find(c->op);
    const Kind *kind = kind_find(c->kind);
    g_assert_true(op && kind && operation_fits(op, kind));
    Recording *r = recording_new(op, kind, &why);
    g_assert_cmpstr(why, ==, NULL);
    g_test_message("%u events, %u flushes", r->log->len, recording_flushes(r));
    for (guint i = 0; i < r->log->len && !g_test_failed(); i += step()) {
        if (g_array_index(r->log, DiskEvent, i).kind != DISK_FLUSH) {
            try_state(r, (State){.kind = STATE_ALONE, .mask = i});
            try_state(r, (State){.kind = STATE_MISSING, .mask = i});
        }
    }
    recording_free(r);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    bdrv_init();
    disk_init();
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        g_autofree char *path = g_strconcat("/order/", cases[i].name, NULL);
        g_test_add_data_func(path, &cases[i], test_case);
    }
    int ret = g_test_run();
    qb_pools_shutdown();
    disk_done();
    return ret;
}
