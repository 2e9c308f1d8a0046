/*
 * blkdebug: rules by themselves, names, limits, injected errors, breakpoints.
 *
 * SPDX-License-Identifier: MIT
 */
#include "mem-driver.h"
#include "block/blkdebug-rules.h"

#include <unistd.h>

#define ANY 0, 512

static BlkdebugRules *rules_from(const char *opts, const char *error)
{
    GError *err = NULL;
    BlkdebugRules *r = blkdebug_rules_new();
    g_autoptr(json_t) options = qb_opts_parse(opts, NULL, &err);
    g_assert_no_error(err);
    bool ok = blkdebug_rules_take(r, options, &err);
    g_assert_cmpstr(err ? err->message : NULL, ==, error);
    g_assert_true(ok == !error);
    g_assert_true(error || json_object_size(options) == 0);
    g_clear_error(&err);
    return r;
}

/* --- rules --- */

static void test_event_activates(void)
{
    BlkdebugRules *r = rules_from("inject-error.0.event=l2_update,inject-error.0.errno=28", NULL);
    g_assert_cmpint(blkdebug_rules_check(r, BLKDEBUG_WRITE, ANY), ==, 0);
    blkdebug_rules_event(r, "l2_load");
    g_assert_cmpint(blkdebug_rules_check(r, BLKDEBUG_WRITE, ANY), ==, 0);
    blkdebug_rules_event(r, "l2_update");
    g_assert_cmpint(blkdebug_rules_check(r, BLKDEBUG_WRITE, ANY), ==, -ENOSPC);
    g_assert_cmpint(blkdebug_rules_check(r, BLKDEBUG_READ, ANY), ==, -ENOSPC);
    g_assert_cmpint(blkdebug_rules_check(r, BLKDEBUG_FLUSH, 0, 0), ==, -ENOSPC);
    g_assert_cmpint(blkdebug_rules_check(r, BLKDEBUG_BLOCK_STATUS, ANY), ==, 0);
    blkdebug_rules_free(r);
}

static void test_once(void)
{
    BlkdebugRules *r = rules_from(
        "inject-error.0.event=none,inject-error.0.once=on,inject-error.0.immediately=off", NULL);
    blkdebug_rules_event(r, "none");
    g_assert_cmpint(blkdebug_rules_check(r, BLKDEBUG_WRITE, ANY), ==, -EIO);
    g_assert_cmpint(blkdebug_rules_check(r, BLKDEBUG_WRITE, ANY), ==, 0);
    blkdebug_rules_free(r);
}

static void test_sector(void)
{
    BlkdebugRules *r = rules_from("inject-error.0.event=none,inject-error.0.sector=8", NULL);
    blkdebug_rules_event(r, "none");
    g_assert_cmpint(blkdebug_rules_check(r, BLKDEBUG_READ, 0, 4096), ==, 0);
    g_assert_cmpint(blkdebug_rules_check(r, BLKDEBUG_READ, 0, 4097), ==, -EIO);
    g_assert_cmpint(blkdebug_rules_check(r, BLKDEBUG_READ, 4096, 1), ==, -EIO);
    g_assert_cmpint(blkdebug_rules_check(r, BLKDEBUG_READ, 4097, 1), ==, 0);
    g_assert_cmpint(blkdebug_rules_check(r, BLKDEBUG_FLUSH, 0, 0), ==, 0);
    blkdebug_rules_free(r);
}

static void test_io_type(void)
{
    static const char *const names[] = {
        "read", "write", "write-zeroes", "discard", "flush", "block-status",
    };
    for (int want = 0; want < BLKDEBUG_IO_TYPES; want++) {
        g_autofree char *opts = g_strdup_printf(
            "inject-error.0.event=none,inject-error.0.iotype=%s,inject-error.0.sector=-1",
            names[want]);
        BlkdebugRules *r = rules_from(opts, NULL);
        blkdebug_rules_event(r, "none");
        for (int type = 0; type < BLKDEBUG_IO_TYPES; type++) {
            int ret = blkdebug_rules_check(r, (BlkdebugIoType)type, ANY);
            g_assert_cmpint(ret, ==, type == want ? -EIO : 0);
        }
        blkdebug_rules_free(r);
    }
}

static void test_states(void)
{
    BlkdebugRules *r = rules_from(
        "set-state.0.event=cow_read,set-state.0.state=1,set-state.0.new_state=2,"
        "set-state.1.event=cow_read,set-state.1.state=2,set-state.1.new_state=3,"
        "inject-error.0.event=cow_read,inject-error.0.state=3,inject-error.0.errno=5,"
        "inject-error.1.event=cow_write,inject-error.1.errno=28", NULL);
    for (int i = 0; i < 2; i++) {
        blkdebug_rules_event(r, "cow_read");
        g_assert_cmpint(blkdebug_rules_check(r, BLKDEBUG_READ, ANY), ==, 0);
    }
    blkdebug_rules_event(r, "cow_read");
    g_assert_cmpint(blkdebug_rules_check(r, BLKDEBUG_READ, ANY), ==, -EIO);
    blkdebug_rules_event(r, "cow_write"); /* takes the place of those active before */
    g_assert_cmpint(blkdebug_rules_check(r, BLKDEBUG_READ, ANY), ==, -ENOSPC);
    blkdebug_rules_free(r);
}

static void test_errno_zero(void)
{
    BlkdebugRules *r = rules_from("inject-error.0.event=none,inject-error.0.errno=0", NULL);
    blkdebug_rules_event(r, "none");
    g_assert_cmpint(blkdebug_rules_check(r, BLKDEBUG_READ, ANY), ==, 0);
    blkdebug_rules_free(r);
}

static void test_bad_rules(void)
{
    static const char *const cases[][2] = {
        {"inject-error.0.errno=5", "Missing event name for rule"},
        {"inject-error.0.event=bogus", "Invalid event name \"bogus\""},
        {"inject-error.0.event=none,inject-error.0.color=red", "Invalid parameter 'color'"},
        {"inject-error.1.event=none", "Invalid parameter 'inject-error.1.event'"},
        {"set-state.0.event=none,set-state.0.errno=1", "Invalid parameter 'errno'"},
        {"inject-error.0.event=none,inject-error.0.errno=x", "Parameter 'errno' expects a number"},
        {"inject-error.0.event=none,inject-error.0.errno=5000", "Parameter 'errno' is too large"},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        blkdebug_rules_free(rules_from(cases[i][0], cases[i][1]));
    }
}

static void test_all_events(void)
{
    static const char *const some[] = {
        "l1_update", "l1_grow_activate_table", "refblock_alloc_switch_table", "cluster_alloc_space",
        "pwritev_rmw_after_tail", "empty_image_prepare", "l1_shrink_free_l2_clusters", "cor_write",
        "vmstate_load", "flush_to_disk", "cluster_free", "l2_alloc_cow_read",
    };
    BlkdebugRules *r = blkdebug_rules_new();
    for (size_t i = 0; i < G_N_ELEMENTS(some); i++) {
        g_assert_cmpint(blkdebug_rules_break(r, some[i], "t"), ==, 0);
    }
    g_assert_cmpint(blkdebug_rules_break(r, "bogus", "t"), ==, -ENOENT);
    g_assert_cmpint(blkdebug_rules_remove_break(r, "t"), ==, 0);
    g_assert_cmpint(blkdebug_rules_remove_break(r, "t"), ==, -ENOENT);
    blkdebug_rules_free(r);
}

/* --- the configuration file --- */

static void expect_config(const char *text, const char *error)
{
    GError *err = NULL;
    char name[] = "/tmp/test-blkdebug-XXXXXX";
    int fd = mkstemp(name);
    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(write(fd, text, strlen(text)), ==, (ssize_t)strlen(text));
    close(fd);
    BlkdebugRules *r = blkdebug_rules_new();
    bool ok = blkdebug_rules_load(r, name, &err);
    unlink(name);
    g_assert_true(ok == !error);
    g_assert_cmpstr(err ? strchr(err->message, ':') : NULL, ==, error);
    if (ok) {
        blkdebug_rules_event(r, "write_aio");
        g_assert_cmpint(blkdebug_rules_check(r, BLKDEBUG_WRITE, ANY), ==, 0);
        blkdebug_rules_event(r, "write_aio");
        g_assert_cmpint(blkdebug_rules_check(r, BLKDEBUG_WRITE, ANY), ==, -ENOSPC);
    }
    blkdebug_rules_free(r);
    g_clear_error(&err);
}

static void test_config(void)
{
    expect_config("# a comment\n\n"
                  "[set-state]\nevent = \"write_aio\"\nstate = \"1\"\nnew_state = \"2\"\n"
                  "[inject-error \"name\"]\n  event=\"write_aio\"\n errno = 28\nstate=\"2\"", NULL);
    expect_config("[bogus]\n", ":1: There is no option group 'bogus'");
    expect_config("event = \"x\"\n", ":1: no group defined");
    expect_config("[set-state]\nevent\n", ":2: parse error");
    expect_config("[set-state\n", ":1: parse error");
    expect_config("[inject-error]\nevent = \"bogus\"\n", ":3: Invalid event name \"bogus\"");
}

static void test_config_missing(void)
{
    GError *err = NULL;
    BlkdebugRules *r = blkdebug_rules_new();
    g_assert_false(blkdebug_rules_load(r, "/nonexistent/x.conf", &err));
    g_assert_cmpstr(err->message, ==,
                    "Could not read blkdebug config file: No such file or directory");
    g_clear_error(&err);
    blkdebug_rules_free(r);
}

/* --- the node --- */

static void expect_name(const char *name, const char *config, const char *image, const char *error)
{
    GError *err = NULL;
    g_autoptr(json_t) options = json_object();
    bool ok = bdrv_blkdebug.parse_filename(name, options, &err);
    g_assert_cmpstr(err ? err->message : NULL, ==, error);
    g_assert_true(ok == !error);
    g_assert_cmpstr(qb_opt_peek_string(options, "config"), ==, config);
    g_assert_cmpstr(qb_opt_peek_string(options, "x-image"), ==, image);
    g_clear_error(&err);
}

static void test_names(void)
{
    expect_name("blkdebug::a.img", NULL, "a.img", NULL);
    expect_name("blkdebug:c.conf:a.img", "c.conf", "a.img", NULL);
    expect_name("blkdebug:c.conf:nbd:x:y", "c.conf", "nbd:x:y", NULL);
    expect_name("blkdebug:a.img", NULL, NULL, "blkdebug requires both config file and image path");
}

static void test_open_by_name(void)
{
    GError *err = NULL;
    char name[] = "/tmp/test-blkdebug-XXXXXX";
    int fd = mkstemp(name);
    g_assert_cmpint(ftruncate(fd, 8192), ==, 0);
    close(fd);
    g_autofree char *full = g_strconcat("blkdebug::", name, NULL);
    json_t *options = json_object();
    json_object_set_new(options, "driver", json_string("raw"));
    g_autoptr(BlockDriverState) bs = bdrv_open(full, options, 0, &err);
    g_assert_no_error(err);
    g_assert_cmpint(bdrv_getlength(bs), ==, 8192);
    g_assert_true(bs->file->bs->drv == &bdrv_blkdebug);
    g_assert_cmpstr(bdrv_filename(bs->file->bs), ==, full);
    g_assert_true(bs->file->bs->file && bs->file->bs->file->bs->drv == &bdrv_file);
    unlink(name);
}

static void expect_bad_limit(const char *opts, const char *error)
{
    GError *err = NULL;
    g_autofree char *all = g_strconcat("driver=blkdebug,image.driver=null-co,", opts, NULL);
    json_t *options = qb_opts_parse(all, NULL, NULL);
    g_assert_null(bdrv_open(NULL, options, 0, &err));
    g_assert_nonnull(strstr(err->message, error));
    g_clear_error(&err);
}

static void test_limits(void)
{
    g_autoptr(BlockDriverState) bs =
        open_node("driver=blkdebug,image.driver=null-co,align=4096,max-transfer=64k,"
                  "opt-write-zero=8k,max-write-zero=16k,opt-discard=4k,max-discard=1M", 0);
    const BlockLimits *bl = bdrv_limits(bs);
    g_assert_cmpuint(bl->request_alignment, ==, 4096);
    g_assert_cmpuint(bl->max_transfer, ==, 65536);
    g_assert_cmpuint(bl->pwrite_zeroes_alignment, ==, 8192);
    g_assert_cmpint(bl->max_pwrite_zeroes, ==, 16384);
    g_assert_cmpuint(bl->pdiscard_alignment, ==, 4096);
    g_assert_cmpint(bl->max_pdiscard, ==, 1 << 20);
    expect_bad_limit("align=3", "Cannot meet constraints with align 3");
    expect_bad_limit("align=512,max-transfer=100", "Cannot meet constraints with max-transfer 100");
    expect_bad_limit("opt-discard=4k,max-discard=5k",
                     "Cannot meet constraints with max-discard 5120");
    expect_bad_limit("bogus=1", "bogus");
}

static void test_injection(void)
{
    g_autoptr(BlockBackend) blk = open_blk(
        "driver=raw,discard=unmap,file.driver=blkdebug,file.image.driver=test-mem,"
        "file.inject-error.0.event=write_aio,file.inject-error.0.once=on,"
        "file.inject-error.1.event=none,file.inject-error.1.iotype=flush");
    MemState *mem = mem_state(bottom(blk));
    uint8_t buf[512] = {1};
    g_assert_cmpint(bdrv_flush(blk_bs(blk)), ==, -EIO);
    g_assert_cmpint(bdrv_pread(blk_root(blk), 0, 512, buf, 0), ==, 0);
    g_assert_cmpint(bdrv_pwrite(blk_root(blk), 0, 512, buf, 0), ==, -EIO);
    g_assert_cmpuint(mem->writes, ==, 0);
    g_assert_cmpint(bdrv_pwrite(blk_root(blk), 0, 512, buf, 0), ==, 0);
    g_assert_cmpuint(mem->writes, ==, 1);
}

static void test_injection_by_type(void)
{
    g_autoptr(BlockBackend) blk = open_blk(
        "driver=raw,discard=unmap,file.driver=blkdebug,file.image.driver=test-mem,"
        "file.inject-error.0.event=none,file.inject-error.0.iotype=discard,"
        "file.inject-error.1.event=none,file.inject-error.1.iotype=write-zeroes,"
        "file.inject-error.2.event=none,file.inject-error.2.iotype=block-status");
    uint8_t buf[512] = {1};
    BdrvStatus st;
    g_assert_cmpint(bdrv_pdiscard(blk_root(blk), 0, 512), ==, -EIO);
    g_assert_cmpint(bdrv_pwrite_zeroes(blk_root(blk), 0, 512, 0), ==, -EIO);
    g_assert_cmpint(bdrv_block_status(blk_bs(blk), 0, 512, &st), ==, -EIO);
    g_assert_cmpint(bdrv_pwrite(blk_root(blk), 0, 512, buf, 0), ==, 0);
    g_assert_cmpint(bdrv_flush(blk_bs(blk)), ==, 0);
}

/* --- breakpoints --- */

typedef struct Writer {
    BlockBackend *blk;
    int64_t offset;
    pthread_t thread;
    _Atomic(bool) done;
} Writer;

static void *write_100(void *opaque)
{
    Writer *w = opaque;
    uint8_t buf[100];
    memset(buf, 0x77, sizeof(buf));
    g_assert_cmpint(blk_pwrite(w->blk, w->offset, sizeof(buf), buf, 0), ==, 0);
    w->done = true;
    return NULL;
}

static void start(Writer *w)
{
    g_assert_true(qb_thread_start(&w->thread, "writer", write_100, w));
}

static void wait_suspended(BlockBackend *blk, const char *tag)
{
    while (!bdrv_debug_is_suspended(blk_bs(blk), tag)) {
        usleep(1000);
    }
}

#define ALIGNED "driver=raw,file.driver=blkdebug,file.align=512,file.image.driver=test-mem"

static void test_breakpoint(void)
{
    g_autoptr(BlockBackend) blk = open_blk(ALIGNED);
    Writer first = {.blk = blk, .offset = 100}, second = {.blk = blk, .offset = 300};
    uint8_t buf[512];
    g_assert_cmpint(bdrv_debug_resume(blk_bs(blk), "A"), ==, -ENOENT);
    g_assert_cmpint(bdrv_debug_breakpoint(blk_bs(blk), "pwritev_rmw_after_head", "A"), ==, 0);
    start(&first);
    wait_suspended(blk, "A");
    /* the first has read the block; the second must wait or its bytes would be lost */
    start(&second);
    usleep(30000);
    g_assert_false(second.done);
    g_assert_cmpint(bdrv_debug_resume(blk_bs(blk), "A"), ==, 0);
    pthread_join(first.thread, NULL);
    pthread_join(second.thread, NULL); /* one breakpoint stops one request */
    g_assert_cmpint(blk_pread(blk, 0, 512, buf, 0), ==, 0);
    for (int i = 0; i < 512; i++) {
        bool written = (i >= 100 && i < 200) || (i >= 300 && i < 400);
        g_assert_cmpint(buf[i], ==, written ? 0x77 : 0);
    }
}

static void test_remove_break(void)
{
    g_autoptr(BlockBackend) blk = open_blk(ALIGNED);
    Writer w = {.blk = blk, .offset = 100};
    g_assert_cmpint(bdrv_debug_breakpoint(blk_bs(blk), "pwritev_rmw_tail", "A"), ==, 0);
    g_assert_cmpint(bdrv_debug_breakpoint(blk_bs(blk), "pwritev_rmw_tail", "B"), ==, 0);
    start(&w);
    wait_suspended(blk, "A");
    g_assert_cmpint(bdrv_debug_remove_breakpoint(blk_bs(blk), "A"), ==, 0);
    wait_suspended(blk, "B"); /* two breakpoints of one event stop one after the other */
    g_assert_false(bdrv_debug_is_suspended(blk_bs(blk), "A"));
    g_assert_cmpint(bdrv_debug_resume(blk_bs(blk), "B"), ==, 0);
    pthread_join(w.thread, NULL);
}

static void test_no_listener(void)
{
    g_autoptr(BlockBackend) blk = open_blk("driver=test-mem");
    g_assert_cmpint(bdrv_debug_breakpoint(blk_bs(blk), "pwritev", "A"), ==, -ENOTSUP);
    g_assert_cmpint(bdrv_debug_resume(blk_bs(blk), "A"), ==, -ENOTSUP);
    g_assert_cmpint(bdrv_debug_remove_breakpoint(blk_bs(blk), "A"), ==, -ENOTSUP);
    g_assert_false(bdrv_debug_is_suspended(blk_bs(blk), "A"));
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    mem_drivers_register();
    g_test_add_func("/blkdebug/rules/event", test_event_activates);
    g_test_add_func("/blkdebug/rules/once", test_once);
    g_test_add_func("/blkdebug/rules/sector", test_sector);
    g_test_add_func("/blkdebug/rules/iotype", test_io_type);
    g_test_add_func("/blkdebug/rules/states", test_states);
    g_test_add_func("/blkdebug/rules/errno-zero", test_errno_zero);
    g_test_add_func("/blkdebug/rules/bad", test_bad_rules);
    g_test_add_func("/blkdebug/rules/events", test_all_events);
    g_test_add_func("/blkdebug/config/good-and-bad", test_config);
    g_test_add_func("/blkdebug/config/missing", test_config_missing);
    g_test_add_func("/blkdebug/node/names", test_names);
    g_test_add_func("/blkdebug/node/open", test_open_by_name);
    g_test_add_func("/blkdebug/node/limits", test_limits);
    g_test_add_func("/blkdebug/node/injection", test_injection);
    g_test_add_func("/blkdebug/node/injection-by-type", test_injection_by_type);
    g_test_add_func("/blkdebug/break/rmw", test_breakpoint);
    g_test_add_func("/blkdebug/break/remove", test_remove_break);
    g_test_add_func("/blkdebug/break/no-listener", test_no_listener);
    return g_test_run();
}
