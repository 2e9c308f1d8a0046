/*
 * Drain: waits for what runs, holds back what comes, nests, and tells drivers.
 *
 * Requests are held inside the node by breakpoints of blkdebug, so that nothing here depends on
 * time but the small waits that give a wrong implementation the chance to be seen.
 *
 * SPDX-License-Identifier: MIT
 */
#include "mem-driver.h"

#include <unistd.h>

#define STACK                                                                                      \
    "driver=raw,file.driver=blkdebug,file.image.driver=test-mem,file.image.node-name=mem"

/* Something that runs in a thread of its own, and whether it is done. */
typedef struct Task {
    BlockBackend *blk;
    BlockDriverState *bs;
    pthread_t thread;
    _Atomic(bool) done;
    int ret;
} Task;

static void *write_something(void *opaque)
{
    Task *t = opaque;
    uint8_t buf[512] = {1};
    t->ret = blk_pwrite(t->blk, 0, sizeof(buf), buf, 0);
    t->done = true;
    return NULL;
}

static void *drain(void *opaque)
{
    Task *t = opaque;
    bdrv_drained_begin(t->bs);
    t->done = true;
    return NULL;
}

static void start(Task *t, void *(*fn)(void *))
{
    g_assert_true(qb_thread_start(&t->thread, "task", fn, t));
}

static void finish(Task *t)
{
    pthread_join(t->thread, NULL);
    g_assert_true(t->done);
    g_assert_cmpint(t->ret, ==, 0);
}

/* Polling is for tests only: there is no event for "somebody waits now". */
static void wait_suspended(BlockDriverState *bs, const char *tag)
{
    while (!bdrv_debug_is_suspended(bs, tag)) {
        usleep(1000);
    }
}

static void expect_not_done(const Task *t)
{
    usleep(30000);
    g_assert_false(t->done);
}

static void test_idle(void)
{
    g_autoptr(BlockBackend) blk = open_blk(STACK);
    MemState *mem = mem_state(bdrv_find_node("mem"));
    bdrv_drained_begin(blk_bs(blk));
    g_assert_cmpuint(mem->drained, ==, 1);
    bdrv_drained_begin(blk_bs(blk));
    g_assert_cmpuint(mem->drained, ==, 2);
    bdrv_drained_end(blk_bs(blk));
    bdrv_drained_end(blk_bs(blk));
    g_assert_cmpuint(mem->drained, ==, 0);
}

static void test_waits_for_running(void)
{
    g_autoptr(BlockBackend) blk = open_blk(STACK);
    Task writer = {.blk = blk}, drainer = {.bs = blk_bs(blk)};
    g_assert_cmpint(bdrv_debug_breakpoint(blk_bs(blk), "pwritev", "A"), ==, 0);
    start(&writer, write_something);
    wait_suspended(blk_bs(blk), "A");
    start(&drainer, drain);
    expect_not_done(&drainer);
    g_assert_cmpint(bdrv_debug_resume(blk_bs(blk), "A"), ==, 0);
    finish(&writer);
    finish(&drainer);
    bdrv_drained_end(blk_bs(blk));
}

static void test_holds_back_new(void)
{
    g_autoptr(BlockBackend) blk = open_blk(STACK);
    MemState *mem = mem_state(bdrv_find_node("mem"));
    Task writer = {.blk = blk};
    bdrv_drained_begin(blk_bs(blk));
    start(&writer, write_something);
    expect_not_done(&writer);
    g_assert_cmpuint(mem->writes, ==, 0);
    bdrv_drained_end(blk_bs(blk));
    finish(&writer);
    g_assert_cmpuint(mem->writes, ==, 1);
}

/* A drain of a node deep down concerns the users above it. */
static void test_node_below(void)
{
    g_autoptr(BlockBackend) blk = open_blk(STACK);
    BlockDriverState *mem = bdrv_find_node("mem");
    Task writer = {.blk = blk}, second = {.blk = blk}, drainer = {.bs = mem};
    g_assert_cmpint(bdrv_debug_breakpoint(blk_bs(blk), "pwritev", "A"), ==, 0);
    start(&writer, write_something);
    wait_suspended(blk_bs(blk), "A");
    start(&drainer, drain);
    expect_not_done(&drainer);
    start(&second, write_something);
    g_assert_cmpint(bdrv_debug_resume(blk_bs(blk), "A"), ==, 0);
    finish(&writer);
    finish(&drainer);
    expect_not_done(&second);
    bdrv_drained_end(mem);
    finish(&second);
}

/* The drainer's own requests on the node pass. */
static void test_requests_of_drainer(void)
{
    g_autoptr(BlockBackend) blk = open_blk(STACK);
    uint8_t buf[512] = {1};
    bdrv_drained_begin(blk_bs(blk));
    g_assert_cmpint(bdrv_pwrite(blk_root(blk), 0, 512, buf, 0), ==, 0);
    bdrv_drained_end(blk_bs(blk));
}

/* A request that does not come through a BlockBackend is waited for, too. */
static void *write_to_node(void *opaque)
{
    Task *t = opaque;
    uint8_t buf[512] = {1};
    t->ret = bdrv_pwrite(blk_root(t->blk), 0, sizeof(buf), buf, 0);
    t->done = true;
    return NULL;
}

static void test_waits_for_node(void)
{
    g_autoptr(BlockBackend) blk = open_blk(STACK);
    Task writer = {.blk = blk}, drainer = {.bs = blk_bs(blk)};
    g_assert_cmpint(bdrv_debug_breakpoint(blk_bs(blk), "pwritev", "A"), ==, 0);
    start(&writer, write_to_node);
    wait_suspended(blk_bs(blk), "A");
    start(&drainer, drain);
    expect_not_done(&drainer);
    g_assert_cmpint(bdrv_debug_resume(blk_bs(blk), "A"), ==, 0);
    finish(&writer);
    finish(&drainer);
    bdrv_drained_end(blk_bs(blk));
}

/* --- many at once --- */

#define THREADS 4
#define ROUNDS 200

static void *write_often(void *opaque)
{
    Task *t = opaque;
    uint8_t buf[512] = {1};
    for (int i = 0; i < ROUNDS && t->ret == 0; i++) {
        t->ret = blk_pwrite(t->blk, 100 * i % 4096, sizeof(buf), buf, 0);
    }
    t->done = true;
    return NULL;
}

static void *drain_often(void *opaque)
{
    Task *t = opaque;
    for (int i = 0; i < ROUNDS / 4; i++) {
        bdrv_drained_begin(t->bs);
        g_assert_cmpuint(t->bs->in_flight, ==, 0);
        bdrv_drained_end(t->bs);
    }
    t->done = true;
    return NULL;
}

static void test_storm(void)
{
    g_autoptr(BlockBackend) blk = open_blk(STACK);
    BlockDriverState *nodes[] = {blk_bs(blk), bdrv_find_node("mem")};
    Task writers[THREADS], drainers[G_N_ELEMENTS(nodes)];
    for (unsigned i = 0; i < THREADS; i++) {
        writers[i] = (Task){.blk = blk};
        start(&writers[i], write_often);
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(nodes); i++) {
        drainers[i] = (Task){.bs = nodes[i]};
        start(&drainers[i], drain_often);
    }
    for (unsigned i = 0; i < THREADS; i++) {
        finish(&writers[i]);
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(nodes); i++) {
        finish(&drainers[i]);
    }
    g_assert_cmpuint(mem_state(nodes[1])->drained, ==, 0);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    mem_drivers_register();
    g_test_add_func("/drain/idle", test_idle);
    g_test_add_func("/drain/waits-for-running", test_waits_for_running);
    g_test_add_func("/drain/holds-back-new", test_holds_back_new);
    g_test_add_func("/drain/node-below", test_node_below);
    g_test_add_func("/drain/requests-of-drainer", test_requests_of_drainer);
    g_test_add_func("/drain/waits-for-node", test_waits_for_node);
    g_test_add_func("/drain/storm", test_storm);
    int ret = g_test_run();
    qb_pools_shutdown();
    return ret;
}
