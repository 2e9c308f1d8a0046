/*
 * raw and null: windows, resizing, the restriction of guessed images, names and options.
 *
 * SPDX-License-Identifier: MIT
 */
#include "mem-driver.h"

#include <sys/stat.h>
#include <unistd.h>

static void expect_open_error(const char *opts, const char *error)
{
    GError *err = NULL;
    json_t *options = qb_opts_parse(opts, NULL, NULL);
    g_assert_null(bdrv_open(NULL, options, BDRV_O_RDWR, &err));
    g_assert_nonnull(strstr(err->message, error));
    g_clear_error(&err);
}

static void test_window(void)
{
    g_autoptr(BlockBackend) blk =
        open_blk("driver=raw,offset=1000,size=2048,file.driver=test-mem,file.size=4096");
    MemState *mem = mem_state(bottom(blk));
    uint8_t buf[100];
    memset(buf, 0x42, sizeof(buf));
    g_assert_cmpint(bdrv_getlength(blk_bs(blk)), ==, 2048);
    g_assert_cmpint(bdrv_pwrite(blk_root(blk), 10, 100, buf, 0), ==, 0);
    g_assert_cmpint(mem->data[1009], ==, 0);
    g_assert_cmpint(mem->data[1010], ==, 0x42);
    g_assert_cmpint(mem->data[1109], ==, 0x42);
    g_assert_cmpint(mem->data[1110], ==, 0);
    g_assert_cmpint(bdrv_pwrite(blk_root(blk), 1949, 100, buf, 0), ==, -ENOSPC);
    memset(mem->data + 3048, 0x11, 1000);
    g_assert_cmpint(bdrv_pread(blk_root(blk), 2000, 100, buf, 0), ==, 0);
    g_assert_true(qb_buffer_is_zero(buf, 100)); /* what follows in the file is not ours */
}

static void test_window_errors(void)
{
    expect_open_error("driver=raw,offset=5000,file.driver=test-mem,file.size=4096",
                      "Offset (5000) cannot be greater than size of the containing file (4096)");
    expect_open_error("driver=raw,offset=1024,size=4096,file.driver=test-mem,file.size=4096",
                      "The sum of offset (1024) and size (4096) has to be smaller or equal to the "
                      "actual size of the containing file (4096)");
    expect_open_error("driver=raw,size=1000,file.driver=test-mem,file.size=4096",
                      "Specified size is not multiple of 512");
}

static void test_resize(void)
{
    GError *err = NULL;
    g_autoptr(BlockBackend) open =
        open_blk("driver=raw,offset=512,file.driver=test-mem,file.size=4096,file.capacity=64k");
    g_autoptr(BlockBackend) fixed =
        open_blk("driver=raw,size=512,file.driver=test-mem,file.size=4096");
    g_assert_cmpint(bdrv_getlength(blk_bs(open)), ==, 3584);
    g_assert_true(blk_truncate(open, 8192, true, PREALLOC_MODE_OFF, false, &err));
    g_assert_cmpint(bdrv_getlength(blk_bs(open)), ==, 8192);
    g_assert_cmpint(mem_state(bottom(open))->length, ==, 8704);
    g_assert_false(blk_truncate(fixed, 8192, true, PREALLOC_MODE_OFF, false, &err));
    g_assert_cmpstr(err->message, ==, "Cannot resize fixed-size raw disks");
    g_clear_error(&err);
}

static void test_zeroes_and_discards(void)
{
    g_autoptr(BlockBackend) blk = open_blk(
        "driver=raw,offset=512,size=2048,discard=unmap,file.driver=test-mem,file.size=4096");
    MemState *mem = mem_state(bottom(blk));
    memset(mem->data, 0xff, 4096);
    g_assert_cmpint(bdrv_pwrite_zeroes(blk_root(blk), 0, 512, BDRV_REQ_MAY_UNMAP), ==, 0);
    g_assert_cmpint(mem->last_flags, ==, BDRV_REQ_MAY_UNMAP);
    g_assert_cmpint(bdrv_pdiscard(blk_root(blk), 1024, INT64_MAX / 2), ==, 0);
    g_assert_cmpint(mem->data[511], ==, 0xff);
    g_assert_true(qb_buffer_is_zero(mem->data + 512, 512));
    g_assert_cmpint(mem->data[1024], ==, 0xff);
    g_assert_true(qb_buffer_is_zero(mem->data + 1536, 1024));
    g_assert_cmpint(mem->data[2560], ==, 0xff);
}

/* --- guessed images --- */

static const uint8_t qcow2_head[512] = {'Q', 'F', 'I', 0xfb, 0, 0, 0, 3};

static unsigned warnings;

static void count_warning(const char *text, void *opaque)
{
    warnings++;
}

/* A format that the restriction can be tried with. */
static int magic_probe(const uint8_t *buf, size_t len, const char *filename)
{
    return len >= 4 && !memcmp(buf, "QFI\xfb", 4) ? 100 : 0;
}

static const BlockDriver magic_driver = {
    .format_name = "test-magic",
    .is_format = true,
    .probe = magic_probe,
};

static BlockBackend *open_guessed(bool guessed)
{
    GError *err = NULL;
    char name[] = "/tmp/test-raw-XXXXXX";
    int fd = mkstemp(name);
    g_assert_cmpint(ftruncate(fd, 65536), ==, 0);
    close(fd);
    json_t *options = json_object();
    if (!guessed) {
        json_object_set_new(options, "driver", json_string("raw"));
    }
    BlockBackend *blk = blk_new_open(name, options, BDRV_O_RDWR, &err);
    g_assert_no_error(err);
    unlink(name);
    return blk;
}

static void test_guessed(void)
{
    g_autoptr(BlockBackend) blk = open_guessed(true);
    uint8_t buf[1024] = {0}, back[1024];
    g_assert_true(blk_bs(blk)->probed);
    g_assert_cmpuint(bdrv_limits(blk_bs(blk))->request_alignment, ==, 512);
    warnings = 0;
    memcpy(buf + 512, qcow2_head, 512);
    g_assert_cmpint(blk_pwrite(blk, 0, 1024, buf, 0), ==, 0); /* the magic is in block 1 */
    memcpy(buf, qcow2_head, 512);
    g_assert_cmpint(blk_pwrite(blk, 0, 512, buf, 0), ==, -EPERM);
    g_assert_cmpint(blk_pwrite(blk, 0, 1024, buf, 0), ==, -EPERM);
    g_assert_cmpint(blk_pwrite(blk, 0, 4, buf, 0), ==, -EPERM); /* in parts */
    g_assert_cmpuint(warnings, ==, 1);
    g_assert_cmpint(blk_pwrite(blk, 0, 3, buf, 0), ==, 0);
    g_assert_cmpint(blk_pwrite(blk, 3, 1, buf + 3, 0), ==, -EPERM);
    g_assert_cmpint(blk_pwrite_zeroes(blk, 0, 512, 0), ==, 0);
    g_assert_cmpint(blk_pread(blk, 0, 1024, back, 0), ==, 0);
    g_assert_true(qb_buffer_is_zero(back, 512));
    g_assert_cmpmem(back + 512, 512, qcow2_head, 512);
}

static void test_guessed_batch(void)
{
    g_autoptr(BlockBackend) blk = open_guessed(true);
    uint8_t buf[512] = {0}, magic[512];
    memcpy(magic, qcow2_head, 512);
    BdrvBatchOp ops[] = {
        {.kind = BDRV_BATCH_WRITE, .offset = 512, .bytes = 512, .buf = buf},
        {.kind = BDRV_BATCH_WRITE, .offset = 0, .bytes = 512, .buf = magic},
        {.kind = BDRV_BATCH_WRITE, .offset = 1024, .bytes = 512, .buf = magic},
    };
    g_assert_cmpint(blk_run_batch(blk, ops, G_N_ELEMENTS(ops)), ==, -EPERM);
    g_assert_cmpint(ops[0].ret, ==, 0);
    g_assert_cmpint(ops[1].ret, ==, -EPERM);
    g_assert_cmpint(ops[2].ret, ==, 0);
}

static void test_named(void)
{
    g_autoptr(BlockBackend) blk = open_guessed(false);
    g_assert_false(blk_bs(blk)->probed);
    g_assert_cmpint(blk_pwrite(blk, 0, 512, qcow2_head, 0), ==, 0);
}

/* --- create --- */

static void test_create(void)
{
    GError *err = NULL;
    char name[] = "/tmp/test-raw-XXXXXX";
    close(mkstemp(name));
    g_autoptr(json_t) options = json_object();
    json_object_set_new(options, "size", json_string("1M"));
    g_assert_true(bdrv_img_create(name, "raw", options, NULL, &err));
    g_assert_no_error(err);
    struct stat st;
    g_assert_cmpint(stat(name, &st), ==, 0);
    g_assert_cmpint(st.st_size, ==, 1 << 20);
    unlink(name);
}

/* --- null --- */

static void test_null_names(void)
{
    GError *err = NULL;
    g_autoptr(BlockDriverState) bs = bdrv_open("null-co://", NULL, BDRV_O_PROTOCOL, &err);
    g_assert_no_error(err);
    g_assert_cmpint(bdrv_getlength(bs), ==, 1 << 30);
    g_assert_null(bdrv_open("null-co://x", NULL, BDRV_O_PROTOCOL, &err));
    g_assert_nonnull(strstr(err->message,
                            "The only allowed filename for this driver is 'null-co://'"));
    g_clear_error(&err);
}

static void test_null_reads(void)
{
    g_autoptr(BlockBackend) zeroes = open_blk("driver=null-aio,read-zeroes=on");
    uint8_t buf[512];
    memset(buf, 1, sizeof(buf));
    g_assert_cmpint(bdrv_pread(blk_root(zeroes), 0, 512, buf, 0), ==, 0);
    g_assert_true(qb_buffer_is_zero(buf, 512));
}

static void test_null_latency(void)
{
    g_autoptr(BlockBackend) blk = open_blk("driver=null-co,latency-ns=20000000");
    uint8_t buf[512] = {0};
    uint64_t before = qb_now_ns();
    g_assert_cmpint(bdrv_pwrite(blk_root(blk), 0, 512, buf, 0), ==, 0);
    g_assert_cmpuint(qb_now_ns() - before, >=, 20000000);
    expect_open_error("driver=null-co,latency-ns=18446744073709551615", "latency-ns is invalid");
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    mem_drivers_register();
    bdrv_register(&magic_driver);
    bdrv_set_warning_handler(count_warning, NULL);
    g_test_add_func("/raw/window/requests", test_window);
    g_test_add_func("/raw/window/errors", test_window_errors);
    g_test_add_func("/raw/resize", test_resize);
    g_test_add_func("/raw/zeroes-and-discards", test_zeroes_and_discards);
    g_test_add_func("/raw/guessed/requests", test_guessed);
    g_test_add_func("/raw/guessed/batch", test_guessed_batch);
    g_test_add_func("/raw/guessed/named", test_named);
    g_test_add_func("/raw/create", test_create);
    g_test_add_func("/null/names", test_null_names);
    g_test_add_func("/null/reads", test_null_reads);
    g_test_add_func("/null/latency", test_null_latency);
    int ret = g_test_run();
    qb_pools_shutdown();
    return ret;
}
