/*
 * Space that quarantine holds: it must come back before anybody is told that there is none, and it
 * must not grow without a bound.
 *
 *      full         the file cannot grow, and all that is free in it is in quarantine
 *      rounds       10,000 rounds of discard and rewrite, and nobody flushes
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdlib.h>
#include <string.h>

#include "tests/harness/operations.h"
#include "util/pool.h"

#define ROUNDS 10000
#define GROWTH_MAX (4 << 20) /* quarantine may always hold 1 MiB, and requests are not small */

static void expect_sound(World *w)
{
    g_autofree char *why = NULL;
    g_assert_true(world_close(w));
    g_assert_cmpuint(w->failed, ==, 0);
    g_assert_true(world_judge(w, true, &why) || (g_test_message("%s", why), false));
    world_free(w);
}

/* What a discard gives back is what the next write needs, and there is nothing else. */
static void test_full(const void *data)
{
    const Kind *kind = data;
    unsigned top = disk_number("top"), c = kind->cluster;
    World *w = world_new(kind);
    g_assert_true(world_open(w));
    world_write(w, 0, kind->sectors / 2);
    g_assert_cmpint(world_flush(w), ==, 0);
    world_discard(w, kind->sectors / 2 / c * c, kind->sectors / 4 / c * c);
    g_assert_cmpint(world_flush(w), ==, 0);
    world_write(w, kind->sectors / 2 / c * c, kind->sectors / 4 / c * c);
    disk_set_limit(top, disk_length(top));
    for (unsigned round = 0; round < 200; round++) {
        unsigned places = MIN(32, kind->sectors / c / 2);
        unsigned gone = round * 7 % places * c, wanted = (round * 7 + 7) % places * c;
        world_discard(w, gone, 4 * c);
        world_write(w, wanted, 4 * c);
        g_assert_cmpstr(w->why, ==, NULL);
    }
    disk_set_limit(top, 0);
    expect_sound(w);
}

static void test_rounds(const void *data)
{
    const Kind *kind = data;
    unsigned top = disk_number("top"), c = kind->cluster;
    World *w = world_new(kind);
    g_assert_true(world_open(w));
    uint64_t before = disk_length(top);
    uint64_t bytes = 4 * (uint64_t)c * ORACLE_SECTOR;
    for (unsigned round = 0; round < ROUNDS; round++) {
        unsigned at = round % 8 * 4 * c % (kind->sectors - 4 * c) / c * c;
        world_discard(w, at, 4 * c);
        world_write(w, at, 4 * c);
    }
    g_test_message("%u MiB written, the file grew by %u KiB", (unsigned)(ROUNDS * bytes >> 20),
                   (unsigned)((disk_length(top) - before) >> 10));
    g_assert_cmpuint(disk_length(top), <=, before + GROWTH_MAX);
    expect_sound(w);
}

int main(int argc, char **argv)
{
    static const char *const names[] = {"v3", "v2", "512", "64k", "ext", "snapshot", "compressed"};
    g_test_init(&argc, &argv, NULL);
    disk_init();
    for (size_t i = 0; i < G_N_ELEMENTS(names); i++) {
        g_autofree char *full = g_strdup_printf("/space/full/%s", names[i]);
        g_test_add_data_func(full, kind_find(names[i]), test_full);
    }
    for (size_t i = 0; i < G_N_ELEMENTS(names); i++) {
        g_autofree char *rounds = g_strdup_printf("/space/rounds/%s", names[i]);
        g_test_add_data_func(rounds, kind_find(names[i]), test_rounds);
    }
    int ret = g_test_run();
    qb_pools_shutdown();
    disk_done();
    return ret;
}
