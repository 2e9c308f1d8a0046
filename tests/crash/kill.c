/*
 * Kill tests: a process that writes an image as fast as it can is killed at a random moment, again
 * and again.
 *
 *      parent   fork --> writer: requests to a file, marks in shared memory     SIGKILL
 *               fork --> checker: opens the file, checks it, compares with the marks
 *               and so on, with the image as it is now
 *
 * What had reached the kernel survives, what the writer had in memory does not: the oracle is that
 * of a crash.  The parent itself never uses the block layer, so that its children start without
 * threads.
 *
 * SPDX-License-Identifier: MIT
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/harness/operations.h"
#include "tests/harness/running.h"
#include "tests/harness/verbs.h"
#include "util/pool.h"

#define MOST_US 12000 /* that a writer lives */

static struct {
    int kills;
} opts = {.kills = 60};

static const Kind kill_kinds[] = {
    {"kill-v3", "cluster_size=2k", 4, 1024, 0},
    {"kill-v2", "cluster_size=4k,compat=0.10", 8, 1024, KIND_V2},
    {"kill-512", "cluster_size=512,refcount_bits=64", 1, 256, 0},
    {"kill-ext", "cluster_size=16k,extended_l2=on", 32, 2048, KIND_PARTS},
};

/* In memory that parent and children share. */
static View *share_views(unsigned sectors)
{
    size_t bytes = VIEWS * sizeof(View);
    View *views = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    g_assert_true(views != MAP_FAILED);
    for (ViewId v = VIEW_TOP; v < VIEWS; v++) {
        oracle_init(&views[v].oracle, sectors);
    }
    views[VIEW_TOP].presence = VIEW_PRESENT;
    return views;
}

/* The kernel may close the files of a killed process (and give up their locks) a little later. */
static void wait_for_locks(World *w)
{
    for (int i = 0; i < 1000; i++) {
        g_autofree char *why = NULL;
        g_autoptr(BlockBackend) blk =
            world_open_view(w, VIEW_TOP, BDRV_O_RDWR | BDRV_O_CHECK, &why);
        if (blk || !strstr(why, "lock")) {
            return;
        }
        g_usleep(5000);
    }
}

static int write_for_ever(World *w, guint32 seed)
{
    g_autoptr(GRand) rand = g_rand_new_with_seed(seed);
    w->value = seed;
    if (!world_open(w)) {
        fprintf(stderr, "not ok - writer: %s\n", w->why);
        return 1;
    }
    while (!w->failed) {
        operation_random_request(w, rand);
    }
    fprintf(stderr, "not ok - writer: %s\n", w->why);
    return 1;
}

/* What is found is what there is from now on. */
static int check_image(World *w, guint32 seed)
{
    char *why = NULL;
    wait_for_locks(w);
    if (world_judge(w, false, &why)) {
        g_autoptr(BlockBackend) blk = world_open_view(w, VIEW_TOP, 0, &why);
        if (blk && oracle_learn(&w->view[VIEW_TOP].oracle, blk, &why)) {
            return 0;
        }
    }
    fprintf(stderr, "not ok - %s after a kill: %s\n", w->kind->name, why);
    return 1;
}

static int make_image(World *w, guint32 seed)
{
    g_autofree char *command =
        g_strdup_printf("create -q -f qcow2 -o %s %s/top %u", w->kind->create, w->dir,
                        w->kind->sectors * ORACLE_SECTOR);
    return verb_run(command, NULL);
}

static pid_t start(World *w, int (*fn)(World *w, guint32 seed), guint32 seed)
{
    pid_t pid = fork();
    g_assert_cmpint(pid, >=, 0);
    if (pid == 0) {
        disk_init();
        alarm(60);
        int ret = fn(w, seed);
        qb_pools_shutdown();
        _exit(ret);
    }
    return pid;
}

/* True when the process ended by itself, without complaint. */
static bool ended_well(pid_t pid)
{
    int status;
    g_assert_cmpint(waitpid(pid, &status, 0), ==, pid);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

/* The writer must be alive when it is killed. */
static bool was_killed(pid_t pid, unsigned after_us)
{
    int status;
    g_usleep(after_us);
    kill(pid, SIGKILL);
    g_assert_cmpint(waitpid(pid, &status, 0), ==, pid);
    return WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
}

static bool run_kind(const Kind *kind, const char *dir, GRand *rand)
{
    World w = {.kind = kind, .dir = dir, .view = share_views(kind->sectors)};
    bool ok = ended_well(start(&w, make_image, 0));
    int i;
    for (i = 0; i < opts.kills && ok; i++) {
        pid_t writer = start(&w, write_for_ever, g_rand_int(rand) % 60);
        ok = was_killed(writer, (unsigned)g_rand_int_range(rand, 0, MOST_US)) &&
             ended_well(start(&w, check_image, 0));
    }
    printf("%s - %s: %d kills\n", ok ? "ok" : "not ok", kind->name, i);
    munmap(w.view, VIEWS * sizeof(View));
    g_autofree char *path = g_build_filename(dir, "top", NULL);
    if (ok) {
        unlink(path);
    }
    return ok;
}

int main(int argc, char **argv)
{
    const GOptionEntry entries[] = {
        {"kills", 0, 0, G_OPTION_ARG_INT, &opts.kills, "of each kind", "N"},
        {NULL},
    };
    running_parse(argc, argv, entries);
    const char *parent = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : g_get_tmp_dir();
    g_autofree char *dir = g_build_filename(parent, "qb-kill-XXXXXX", NULL);
    g_autoptr(GRand) rand = g_rand_new_with_seed((guint32)running_options.seed);
    bool ok = g_mkdtemp(dir) != NULL;
    printf("# images in %s stay when something is wrong\n", dir);
    fflush(stdout);
    for (size_t i = 0; i < G_N_ELEMENTS(kill_kinds); i++) {
        if (running_wants(kill_kinds[i].name, (unsigned)i)) {
            ok = ok && run_kind(&kill_kinds[i], dir, rand);
        }
        fflush(stdout);
    }
    rmdir(dir);
    return ok ? 0 : 1;
}
