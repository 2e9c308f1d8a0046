/*
 * The fault suite: every operation meets every error that the files below it, or the memory, can
 * give.
 *
 *      for each operation and kind of image, each fault, N = 1, 2, ... until it does not fire:
 *          run the operation, its N-th read (write, flush, ...) fails
 *          the image can be used further by whoever has it open
 *          open it again read-write, check it, compare with the oracle
 *          run the operation again: now it succeeds
 *
 * After a flush that failed below a cached file every later one has to fail until the image is
 * opened anew: that is looked at, too.
 *
 * The short form takes some of the N, spread over the operation.  A seeded sample is shown to the
 * peer's qemu-img check.  A failure says how to see it alone:
 *
 *      fault --only commit/backing --fault write.17
 *
 * SPDX-License-Identifier: MIT
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/crash/replay.h"
#include "tests/fault/memory.h"
#include "tests/harness/running.h"
#include "util/pool.h"

#define PEER "/usr/bin/qemu-img"

/* A way of failing. */
typedef struct FaultKind {
    const char *name;
    DiskKind kind; /* DISK_KINDS: memory */
    int error;
    bool lasting, partly;
} FaultKind;

static const FaultKind fault_kinds[] = {
    {"read", DISK_READ, -EIO, false, false},
    {"write", DISK_WRITE, -EIO, false, false},
    {"short-write", DISK_WRITE, -EIO, false, true},
    {"no-space", DISK_WRITE, -ENOSPC, true, true},
    {"zero", DISK_ZERO, -EIO, false, false},
    {"discard", DISK_DISCARD, -EIO, false, false},
    {"flush", DISK_FLUSH, -EIO, false, false},
    {"truncate", DISK_TRUNCATE, -EIO, false, false},
    {"truncate-no-space", DISK_TRUNCATE, -ENOSPC, true, false},
    {"memory", DISK_KINDS, -ENOMEM, false, false},
};

static struct {
    char *fault;
    int points; /* of each fault and pair; 0: all */
} opts = {.points = 4};
static struct {
    uint64_t points, pairs, failures, shown;
} total;

/* ---------------------------------------------------------------- one fault */

static const FaultKind *active; /* what is being tried, and in what; for look_usable() */
static const Recording *subject;
static char *unusable;          /* what was wrong in it */

static void arm(const FaultKind *f, unsigned n)
{
    active = f;
    if (f->kind == DISK_KINDS) {
        memory_fail_at(n);
        return;
    }
    disk_fault_set(&(DiskFault){.kind = f->kind, .countdown = n, .error = f->error,
                                .lasting = f->lasting, .partly = f->partly});
}

static unsigned disarm(void)
{
    return disk_fault_clear() + memory_fail_clear();
}

/* A sector gets the value that it has at the end of the operation. */
static void write_last_value(World *w, unsigned sector)
{
    unsigned value = subject->world->view[VIEW_TOP].oracle.now[sector];
    if (value) {
        w->value = value - 1; /* the next one is it */
        world_write(w, sector, 1);
    } else {
        world_zero(w, sector, 1, 0);
    }
}

/* Reads everything back, writes a sector, flushes. */
static char *use_image(World *w)
{
    char *why = NULL;
    if (!oracle_check(&w->view[VIEW_TOP].oracle, w->blk, &why)) {
        return why;
    }
    unsigned failed = w->failed;
    write_last_value(w, 1);
    if (w->failed != failed) {
        return g_strdup_printf("it cannot be written any more: %s", w->why);
    }
    if (!oracle_check(&w->view[VIEW_TOP].oracle, w->blk, &why)) {
        return why;
    }
    return world_flush(w) < 0 ? g_strdup_printf("it cannot be flushed any more: %s", w->why) : NULL;
}

/* Called before the operation closes the image, if something has failed until then: the errors are
 * over, and whoever has the image open goes on. */
static void look_usable(World *w)
{
    if (!w->failed || unusable) {
        return;
    }
    disk_fault_suspend(true);
    if (disk_flush_is_broken(disk_number("top")) || disk_flush_is_broken(disk_number("data"))) {
        bool lies = blk_flush(w->blk) == 0;
        unusable = lies ? g_strdup("a flush succeeds after one has failed") : NULL;
    } else if (!active->lasting) {
        unusable = use_image(w);
    }
    disk_fault_suspend(false);
}

static World world_to_try(const Recording *r)
{
    for (unsigned i = 0; i < disk_count(); i++) {
        disk_load(i, &r->image[i]);
    }
    World w = world_copy(&r->before);
    w.at_close = look_usable;
    return w;
}

/* Nothing is wrong with the image: the operation succeeds. */
static bool succeeds_now(const Recording *r, World *w, char **ret_why)
{
    w->at_close = NULL;
    w->failed = 0;
    g_clear_pointer(&w->why, g_free);
    return recording_run_again(r, w, ret_why);
}

/* What the peer says of the image; data files and the harmless mismatches of version 2 apart. */
static bool peer_agrees(const Recording *r, char **ret_why)
{
    bool apart = r->before.damaged || r->world->kind->flags & (KIND_DATA_FILE | KIND_V2);
    if (apart || access(PEER, X_OK) < 0) {
        return true;
    }
    g_autofree char *path = g_strdup_printf("/dev/shm/qb-fault-%d", (int)getpid());
    g_autofree char *name =
        g_strdup_printf("json:{\"driver\": \"%s\", \"backing\": null, \"file.filename\": \"%s\"}",
                        r->world->kind->flags & KIND_QED ? "qed" : "qcow2", path);
    g_autofree char *said = NULL;
    int status = -1;
    char *argv[] = {(char *)PEER, (char *)"check", name, NULL};
    if (!disk_export(disk_number("top"), path)) {
        return true;
    }
    bool ok = g_spawn_sync(NULL, argv, NULL, G_SPAWN_STDOUT_TO_DEV_NULL, NULL, NULL, NULL, &said,
                           &status, NULL);
    unlink(path);
    total.shown++;
    bool sound = ok && WIFEXITED(status) && (WEXITSTATUS(status) == 0 || WEXITSTATUS(status) == 3);
    if (!sound) {
        *ret_why = g_strdup_printf("the peer's check: %s", said);
    }
    return sound;
}

/* Is there something in the base that a flush should have made stable, but has failed to? What a
 * format does to an image after its last flush only gives back space. */
static bool base_was_lost(char **ret_why)
{
    unsigned base = disk_number("base");
    bool lost = disk_flush_is_broken(base) && disk_is_unflushed(base);
    if (lost) {
        *ret_why = g_strdup("it said that it is done, but the base is not flushed");
    }
    return lost;
}

static bool judge_point(const Recording *r, World *w, bool ok, char **ret_why)
{
    if (unusable) {
        *ret_why = g_strdup_printf("in the same process: %s", unusable);
        return false;
    }
    if (ok && !w->failed && base_was_lost(ret_why)) {
        return false;
    }
    if (ok && !w->failed && !world_judge(r->world, false, ret_why)) {
        return false; /* it said that it is done */
    }
    if (!world_judge(w, false, ret_why)) {
        return false;
    }
    if (((guint)running_options.seed + total.points) % 200 == 0 && !peer_agrees(r, ret_why)) {
        return false;
    }
    return succeeds_now(r, w, ret_why);
}

/* False: the fault did not fire any more. */
static bool try_point(const Recording *r, const FaultKind *f, unsigned n)
{
    World w = world_to_try(r);
    g_autofree char *why = NULL;
    running_set("%s/%s --fault %s.%u", r->op->name, r->world->kind->name, f->name, n);
    subject = r;
    arm(f, n);
    bool ok = r->op->run(&w);
    bool fired = disarm() > 0;
    if (fired && !judge_point(r, &w, ok, &why)) {
        total.failures++;
        printf("not ok - %s: %s\n", running_name(), why);
        printf("#   replay: fault --only %s\n", running_name());
    }
    running_end();
    total.points += fired;
    g_clear_pointer(&unusable, g_free);
    world_copy_clear(&w);
    return fired;
}

/* ---------------------------------------------------------------- one pair */

/* How often the operation does what can fail so. */
static unsigned count_chances(const Recording *r, const FaultKind *f)
{
    unsigned most = 1 << 20;
    World w = world_to_try(r);
    w.at_close = NULL;
    arm(f, most);
    r->op->run(&w);
    unsigned left = f->kind == DISK_KINDS ? memory_fail_left() : disk_fault_left();
    disarm();
    world_copy_clear(&w);
    return most - left;
}

static void try_fault(const Recording *r, const FaultKind *f)
{
    unsigned n, chances = count_chances(r, f);
    unsigned step = opts.points ? MAX(chances / (unsigned)opts.points, 1) : 1;
    if (opts.fault) {
        if (g_str_has_prefix(opts.fault, f->name) && opts.fault[strlen(f->name)] == '.') {
            try_point(r, f, (unsigned)atoi(opts.fault + strlen(f->name) + 1));
        }
        return;
    }
    unsigned shift = (unsigned)running_options.seed + 7 * (unsigned)total.pairs; /* not all alike */
    for (n = 1 + shift % step; n <= chances + 1; n += step) {
        if (!try_point(r, f, n)) {
            break;
        }
    }
}

static void run_pair(const Operation *op, const Kind *kind)
{
    g_autofree char *why = NULL;
    uint64_t before = total.points;
    running_set("%s/%s, without a fault", op->name, kind->name);
    Recording *r = recording_new(op, kind, &why);
    total.pairs++;
    if (!r) {
        total.failures++;
        printf("not ok - %s: %s\n", running_name(), why);
        return;
    }
    for (size_t i = 0; i < G_N_ELEMENTS(fault_kinds); i++) {
        try_fault(r, &fault_kinds[i]);
    }
    printf("# %-20s %-20s %6" PRIu64 " faults\n", op->name, kind->name, total.points - before);
    fflush(stdout);
    recording_free(r);
}

static void run_all(void)
{
    unsigned number = 0;
    for (unsigned i = 0; i < nb_operations; i++) {
        for (unsigned k = 0; k < nb_kinds; k++) {
            g_autofree char *name = g_strdup_printf("%s/%s", operations[i].name, kinds[k].name);
            if (operation_fits(&operations[i], &kinds[k]) &&
                running_wants(name, number++)) {
                run_pair(&operations[i], &kinds[k]);
            }
        }
    }
}

/* ---------------------------------------------------------------- main */

static void parse_options(int argc, char **argv)
{
    const GOptionEntry entries[] = {
        {"fault", 0, 0, G_OPTION_ARG_STRING, &opts.fault, "this one only", "NAME.N"},
        {"points", 0, 0, G_OPTION_ARG_INT, &opts.points, "of each fault; 0: all", "N"},
        {NULL},
    };
    running_parse(argc, argv, entries);
}

int main(int argc, char **argv)
{
    parse_options(argc, argv);
    running_init();
    disk_init();
    run_all();
    printf("# %" PRIu64 " faults in %" PRIu64 " pairs, %" PRIu64 " shown to the peer, %" PRIu64
           " failures\n", total.points, total.pairs, total.shown, total.failures);
    qb_pools_shutdown();
    disk_done();
    g_free(opts.fault);
    return total.failures ? 1 : 0;
}
