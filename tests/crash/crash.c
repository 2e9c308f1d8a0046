/*
 * The crash suite: power is lost at any moment of any operation, on every kind of image.
 *
 *      for each operation and kind:
 *          record it once, without a crash
 *          for each state that its files could be in after one:
 *              open them read-write, check them, compare with the oracle
 *              run the operation again, to its end
 *              check and compare again
 *
 * Everything lives in memory, in this process.  A state that fails says how to see it alone:
 *
 *      crash --only commit/backing-v2 --state r117 --keep DIR
 *
 * Options: --group G   operations of one group           --only OP/KIND   one pair
 *          --states N  states for each pair              --seed N         of the random ones
 *          --long      a hundred times as many           --state NAME     this one only
 *          --shard I/N every N-th pair from I on         --list           say which pairs there are
 *          --log HASH  record until the log is this      --keep DIR       put failing files there
 *          --every N   one pair of N, by the seed        --events         what is written, and when
 *
 * SPDX-License-Identifier: MIT
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/crash/replay.h"
#include "tests/harness/running.h"
#include "util/pool.h"

#define RECORDINGS_MAX 1000 /* until a log is the wanted one */

typedef struct Options {
    char *group, *state, *keep;
    int states;
    gint64 log;
    gboolean all, list, events;
} Options;

static Options opts = {.states = 100};
static struct {
    uint64_t states, pairs, failures;
} total;

/* ---------------------------------------------------------------- one state */

static bool try_state(const Recording *r, const State *s, char **ret_why)
{
    World w = recording_world(r, state_build(r, s));
    bool ok = world_judge(&w, false, ret_why) && recording_run_again(r, &w, ret_why);
    world_copy_clear(&w);
    return ok;
}

static void keep_files(const Recording *r, const State *s)
{
    state_build(r, s);
    for (unsigned i = 0; i < disk_count(); i++) {
        g_autofree char *path = g_strdup_printf("%s/%s", opts.keep, disk_name(i));
        if (!disk_length(i) || disk_export(i, path)) {
            continue;
        }
        printf("# cannot write %s\n", path);
    }
}

static void report(const Recording *r, const State *s, const char *why)
{
    g_autofree char *name = state_name(s);
    total.failures++;
    printf("not ok - %s/%s %s: %s\n"
           "#   replay: crash --only %s/%s --state %s --log %u\n",
           r->op->name, r->world->kind->name, name, why, r->op->name, r->world->kind->name, name,
           r->hash);
    if (opts.keep) {
        keep_files(r, s);
    }
}

static bool run_state(const Recording *r, const State *s)
{
    g_autofree char *why = NULL, *name = state_name(s);
    running_set("%s/%s --state %s --log %u", r->op->name, r->world->kind->name, name, r->hash);
    bool ok = try_state(r, s, &why);
    running_end();
    total.states++;
    if (!ok) {
        report(r, s, why);
    }
    return ok;
}

/* ---------------------------------------------------------------- one pair */

static GArray *choose_states(const Recording *r)
{
    State s;
    if (!opts.state) {
        return recording_states(r, (unsigned)opts.states, (uint64_t)running_options.seed * 4096);
    }
    if (!state_parse(opts.state, &s)) {
        g_error("'%s' is not the name of a state", opts.state);
    }
    GArray *states = g_array_new(false, false, sizeof(State));
    g_array_append_val(states, s);
    return states;
}

static void show_events(const Recording *r)
{
    for (guint i = 0; opts.events && i < r->log->len; i++) {
        const DiskEvent *e = &g_array_index(r->log, DiskEvent, i);
        printf("#   %u: %" PRIu64 "-%" PRIu64 " %s %s %#" PRIx64 "+%#" PRIx64 "\n", i, e->begin,
               e->end, disk_name(e->disk), disk_kind_names[e->kind], e->offset, e->bytes);
    }
}

/* Some operations use several threads, and not every recording is like the other. */
static Recording *record(const Operation *op, const Kind *kind, char **ret_why)
{
    Recording *r = recording_new(op, kind, ret_why);
    for (unsigned i = 0; r && opts.log && r->hash != (guint)opts.log && i < RECORDINGS_MAX; i++) {
        recording_free(r);
        r = recording_new(op, kind, ret_why);
    }
    return r;
}

static void run_pair(const Operation *op, const Kind *kind)
{
    g_autofree char *why = NULL;
    unsigned failures = 0;
    running_set("%s/%s, recording", op->name, kind->name);
    Recording *r = record(op, kind, &why);
    total.pairs++;
    if (!r || !world_judge(r->world, true, &why)) {
        total.failures++;
        printf("not ok - %s/%s without a crash: %s\n", op->name, kind->name, why);
        return;
    }
    show_events(r);
    g_autoptr(GArray) states = choose_states(r);
    for (guint i = 0; i < states->len && failures < 5; i++) {
        failures += !run_state(r, &g_array_index(states, State, i));
    }
    printf("# %-20s %-20s %4u events %3u flushes %6u states\n", op->name, kind->name, r->log->len,
           recording_flushes(r), states->len);
    fflush(stdout);
    recording_free(r);
}

static bool is_wanted(const Operation *op, const Kind *kind, unsigned number)
{
    g_autofree char *name = g_strdup_printf("%s/%s", op->name, kind->name);
    return running_wants(name, number) && (!opts.group || !strcmp(opts.group, op->group));
}

static void run_all(void)
{
    unsigned number = 0;
    for (unsigned i = 0; i < nb_operations; i++) {
        for (unsigned k = 0; k < nb_kinds; k++) {
            if (!operation_fits(&operations[i], &kinds[k]) ||
                !is_wanted(&operations[i], &kinds[k], number++)) {
                continue;
            }
            if (opts.list) {
                printf("%s/%s\n", operations[i].name, kinds[k].name);
            } else {
                run_pair(&operations[i], &kinds[k]);
            }
        }
    }
}

/* ---------------------------------------------------------------- main */

static void parse_options(int argc, char **argv)
{
    const GOptionEntry entries[] = {
        {"group", 0, 0, G_OPTION_ARG_STRING, &opts.group, "operations of this group", "NAME"},
        {"states", 0, 0, G_OPTION_ARG_INT, &opts.states, "for each pair", "N"},
        {"long", 0, 0, G_OPTION_ARG_NONE, &opts.all, "a hundred times as many", NULL},
        {"state", 0, 0, G_OPTION_ARG_STRING, &opts.state, "this one only", "NAME"},
        {"log", 0, 0, G_OPTION_ARG_INT64, &opts.log, "record until the log is this", "HASH"},
        {"keep", 0, 0, G_OPTION_ARG_STRING, &opts.keep, "put a failing state's files here", "DIR"},
        {"events", 0, 0, G_OPTION_ARG_NONE, &opts.events, "show what an operation writes", NULL},
        {"list", 0, 0, G_OPTION_ARG_NONE, &opts.list, "say which pairs there are", NULL},
        {NULL},
    };
    running_parse(argc, argv, entries);
    opts.states *= opts.all ? 100 : 1;
}

int main(int argc, char **argv)
{
    parse_options(argc, argv);
    running_init();
    disk_init();
    run_all();
    printf("# %" PRIu64 " states of %" PRIu64 " pairs, %" PRIu64 " failures\n", total.states,
           total.pairs, total.failures);
    qb_pools_shutdown();
    disk_done();
    g_free(opts.group);
    g_free(opts.state);
    g_free(opts.keep);
    return total.failures ? 1 : 0;
}
