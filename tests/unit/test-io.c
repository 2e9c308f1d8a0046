/*
 * Requests: alignment, limits, the end of the node, flags, zeroes, discards, copy-on-read; and
 * random operations against an oracle.
 *
 * A failure of the random cases names its seed: run again with  test-io -p /io/random --seed=...
 * (GLib's own option).
 *
 * SPDX-License-Identifier: MIT
 */
#include "mem-driver.h"

#define KIB 1024

static void fill(uint8_t *buf, size_t n, uint8_t seed)
{
    for (size_t i = 0; i < n; i++) {
        buf[i] = (uint8_t)(seed + i * 7 + (i >> 8));
    }
}

/* --- the end of the node --- */

static void test_read_beyond_end(void)
{
    g_autoptr(BlockBackend) blk = open_blk("driver=test-mem,size=1000,align=512");
    uint8_t buf[700], zero[700] = {0};
    memset(mem_state(blk_bs(blk))->data, 0xaa, 1024); /* also what is beyond the end */
    g_assert_cmpint(bdrv_pread(blk_root(blk), 700, 700, buf, 0), ==, 0);
    g_assert_cmpint(buf[0], ==, 0xaa);
    g_assert_cmpint(buf[299], ==, 0xaa);
    g_assert_cmpmem(buf + 300, 400, zero, 400);
    memset(buf, 1, sizeof(buf));
    g_assert_cmpint(bdrv_pread(blk_root(blk), 5000, 700, buf, 0), ==, 0);
    g_assert_cmpmem(buf, 700, zero, 700);
}

static void test_write_beyond_end(void)
{
    g_autoptr(BlockBackend) blk = open_blk("driver=null-co,size=4096");
    uint8_t buf[512] = {1};
    g_assert_cmpint(bdrv_pwrite(blk_root(blk), 3584, 512, buf, 0), ==, 0);
    g_assert_cmpint(bdrv_pwrite(blk_root(blk), 3585, 512, buf, 0), ==, -EIO);
    g_assert_cmpint(bdrv_pwrite_zeroes(blk_root(blk), 3585, 512, 0), ==, -EIO);
    g_assert_cmpint(bdrv_pdiscard(blk_root(blk), 3585, 512), ==, 0);
    g_assert_cmpint(bdrv_getlength(blk_bs(blk)), ==, 4096);
}

static void test_grow(void)
{
    g_autoptr(BlockBackend) blk =
        open_blk("driver=test-mem,size=1000,capacity=1M,align=512,grow=on");
    uint8_t buf[3] = {1, 2, 3}, back[3];
    g_assert_cmpint(bdrv_pwrite(blk_root(blk), 5000, 3, buf, 0), ==, 0);
    g_assert_cmpint(bdrv_getlength(blk_bs(blk)), ==, 5003); /* padding is not a part of it */
    g_assert_cmpint(bdrv_pwrite(blk_root(blk), 4999, 1, buf, 0), ==, 0);
    g_assert_cmpint(bdrv_getlength(blk_bs(blk)), ==, 5003);
    g_assert_cmpint(bdrv_pread(blk_root(blk), 5000, 3, back, 0), ==, 0);
    g_assert_cmpmem(buf, 3, back, 3);
    g_assert_cmpint(bdrv_pwrite_zeroes(blk_root(blk), 8192, 512, 0), ==, 0);
    g_assert_cmpint(bdrv_getlength(blk_bs(blk)), ==, 8704);
}

static void test_bad_ranges(void)
{
    g_autoptr(BlockBackend) blk = open_blk("driver=null-co,size=4096");
    BdrvChild *root = blk_root(blk);
    uint8_t buf[1] = {0};
    g_assert_cmpint(bdrv_pread(root, -1, 1, buf, 0), ==, -EIO);
    g_assert_cmpint(bdrv_pread(root, 0, -1, buf, 0), ==, -EIO);
    g_assert_cmpint(bdrv_pwrite(root, -512, 1, buf, 0), ==, -EIO);
    g_assert_cmpint(bdrv_pwrite(root, INT64_MAX, 1, buf, 0), ==, -EIO);
    g_assert_cmpint(bdrv_pread(root, 0, BDRV_REQUEST_MAX_BYTES + 1, buf, 0), ==, -EIO);
    g_assert_cmpint(bdrv_pwrite_zeroes(root, 1, INT64_MAX, 0), ==, -EIO);
    g_assert_cmpint(bdrv_pdiscard(root, 1, INT64_MAX), ==, -EIO);
    g_assert_cmpint(bdrv_pread(root, 0, 0, buf, 0), ==, 0);
    g_assert_cmpint(bdrv_pwrite(root, 4096, 0, buf, 0), ==, 0);
}

static void test_read_only(void)
{
    GError *err = NULL;
    BlockDriverState *bs = open_node("driver=test-mem", 0);
    g_autoptr(BlockBackend) blk = blk_new_with_bs(bs, BLK_PERM_CONSISTENT_READ, BLK_PERM_ALL, &err);
    uint8_t buf[1] = {0};
    bdrv_unref(bs);
    g_assert_cmpint(bdrv_pread(blk_root(blk), 0, 1, buf, 0), ==, 0);
    g_assert_cmpint(bdrv_pwrite(blk_root(blk), 0, 1, buf, 0), ==, -EPERM);
    g_assert_cmpint(bdrv_pwrite_zeroes(blk_root(blk), 0, 1, 0), ==, -EPERM);
    g_assert_cmpint(bdrv_pdiscard(blk_root(blk), 0, 1), ==, -EPERM);
    g_assert_false(bdrv_truncate(blk_root(blk), 0, true, PREALLOC_MODE_OFF, false, &err));
    g_assert_cmpstr(err->message, ==, "Image is read-only");
    g_clear_error(&err);
}

/* --- how many requests there are --- */

typedef struct Counts {
    unsigned reads, writes;
} Counts;

static void expect_write(BlockBackend *blk, int64_t offset, int64_t bytes, Counts want)
{
    MemState *s = mem_state(blk_bs(blk));
    g_autofree uint8_t *buf = g_malloc((size_t)bytes);
    memset(buf, 0x55, (size_t)bytes);
    s->reads = s->writes = 0;
    g_assert_cmpint(bdrv_pwrite(blk_root(blk), offset, bytes, buf, 0), ==, 0);
    g_assert_cmpuint(s->reads, ==, want.reads);
    g_assert_cmpuint(s->writes, ==, want.writes);
    for (int64_t i = 0; i < bytes; i++) {
        g_assert_cmpint(s->data[offset + i], ==, 0x55);
    }
}

static void test_read_modify_write(void)
{
    g_autoptr(BlockBackend) blk = open_blk("driver=test-mem,align=512");
    MemState *s = mem_state(blk_bs(blk));
    memset(s->data, 0x11, 65536);
    expect_write(blk, 512, 1024, (Counts){0, 1});
    expect_write(blk, 2048, 100, (Counts){1, 1});  /* head of a block is left, so is its tail */
    expect_write(blk, 4196, 100, (Counts){1, 1});  /* inside one block */
    expect_write(blk, 8292, 512, (Counts){2, 1});  /* two neighbours */
    expect_write(blk, 16484, 2000, (Counts){2, 1}); /* blocks between them */
    expect_write(blk, 32768 + 100, 412, (Counts){1, 1});
    g_assert_cmpint(s->data[2148], ==, 0x11);
    g_assert_cmpint(s->data[8291], ==, 0x11);
    g_assert_cmpint(s->data[8804], ==, 0x11);
    g_assert_cmpint(s->data[32867], ==, 0x11);
}

static void test_max_transfer(void)
{
    g_autoptr(BlockBackend) blk = open_blk("driver=test-mem,align=512,max-transfer=1500");
    g_assert_cmpint(mem_state(blk_bs(blk))->max_transfer, ==, 1500);
    expect_write(blk, 512, 4096, (Counts){0, 4}); /* 1024 each */
    g_assert_cmpint(mem_state(blk_bs(blk))->max_seen, ==, 1024);
}

static void test_memory(void)
{
    g_autoptr(BlockBackend) blk = open_blk("driver=test-mem,align=512,mem-align=512,size=4M");
    MemState *s = mem_state(blk_bs(blk));
    QB_AUTO_FREE uint8_t *buf = qb_try_memalign(512, 3 << 20);
    g_autofree uint8_t *back = g_malloc((3 << 20) + 1);
    fill(buf, 3 << 20, 3);
    g_assert_cmpint(bdrv_pwrite(blk_root(blk), 0, (3 << 20) - 512, buf, 0), ==, 0);
    g_assert_cmpuint(s->writes, ==, 1); /* fits as it is */
    g_assert_cmpint(bdrv_pwrite(blk_root(blk), 512, (3 << 20) - 512, buf + 1, 0), ==, 0);
    g_assert_cmpuint(s->writes, >, 2); /* through the bounce buffer */
    g_assert_cmpint(bdrv_pread(blk_root(blk), 512, (3 << 20) - 512, back + 1, 0), ==, 0);
    g_assert_cmpmem(buf + 1, (3 << 20) - 512, back + 1, (3 << 20) - 512);
}

static void test_many_elements(void)
{
    g_autoptr(BlockBackend) blk = open_blk("driver=test-mem,align=512,max-iov=16");
    uint8_t buf[4096], back[4096];
    IOV_VECTOR_AUTO v, w;
    fill(buf, sizeof(buf), 9);
    iov_vector_init(&v, 0);
    iov_vector_init(&w, 0);
    for (int i = 0; i < 4096; i += 8) {
        iov_vector_add(&v, buf + i, 8);
        iov_vector_add(&w, back + i, 8);
    }
    g_assert_cmpint(bdrv_pwritev(blk_root(blk), 100, 4096, &v, 0), ==, 0);
    g_assert_cmpint(bdrv_preadv(blk_root(blk), 100, 4096, &w, 0), ==, 0);
    g_assert_cmpmem(buf, 4096, back, 4096);
}

static void test_errors(void)
{
    g_autoptr(BlockBackend) blk = open_blk("driver=test-mem,align=512");
    uint8_t buf[1024] = {0};
    mem_state(blk_bs(blk))->error = -ENOSPC;
    g_assert_cmpint(bdrv_pread(blk_root(blk), 0, 512, buf, 0), ==, -ENOSPC);
    g_assert_cmpint(bdrv_pwrite(blk_root(blk), 0, 512, buf, 0), ==, -ENOSPC);
    g_assert_cmpint(bdrv_pwrite(blk_root(blk), 1, 512, buf, 0), ==, -ENOSPC);
    g_assert_cmpint(bdrv_pwrite_zeroes(blk_root(blk), 0, 512, 0), ==, -ENOSPC);
    mem_state(blk_bs(blk))->error = 0;
}

/* --- flags --- */

static void test_fua(void)
{
    g_autoptr(BlockBackend) plain = open_blk("driver=test-mem");
    g_autoptr(BlockBackend) native = open_blk("driver=test-fua");
    MemState *p = mem_state(blk_bs(plain)), *n = mem_state(blk_bs(native));
    uint8_t buf[512] = {1};
    g_assert_cmpint(bdrv_pwrite(blk_root(plain), 0, 512, buf, BDRV_REQ_FUA), ==, 0);
    g_assert_cmpuint(p->flushes, ==, 1);
    g_assert_cmpint(bdrv_pwrite_zeroes(blk_root(plain), 0, 512, BDRV_REQ_FUA), ==, 0);
    g_assert_cmpuint(p->flushes, ==, 2);
    g_assert_cmpint(bdrv_pwrite(blk_root(native), 0, 512, buf, BDRV_REQ_FUA), ==, 0);
    g_assert_cmpint(n->last_flags, ==, BDRV_REQ_FUA);
    g_assert_cmpint(bdrv_pwrite_zeroes(blk_root(native), 0, 512, BDRV_REQ_FUA), ==, 0);
    g_assert_cmpint(n->last_flags, ==, BDRV_REQ_FUA);
    g_assert_cmpuint(n->flushes, ==, 0);
    g_assert_cmpint(bdrv_pwrite_sync(blk_root(native), 0, 512, buf, 0), ==, 0);
    g_assert_cmpuint(n->flushes, ==, 1);
}

static void test_no_flush(void)
{
    g_autoptr(BlockBackend) blk = open_blk("driver=raw,file.driver=test-fua,cache.no-flush=on");
    uint8_t buf[512] = {1};
    g_assert_cmpint(bdrv_flush(blk_bs(blk)), ==, 0);
    g_assert_cmpuint(mem_state(bottom(blk))->flushes, ==, 0);
    g_assert_cmpint(bdrv_pwrite(blk_root(blk), 0, 512, buf, BDRV_REQ_FUA), ==, 0);
    g_assert_cmpint(mem_state(bottom(blk))->last_flags, ==, 0);
}

static void test_flush_goes_down(void)
{
    g_autoptr(BlockBackend) blk = open_blk("driver=raw,file.driver=test-mem");
    g_assert_cmpint(bdrv_flush(blk_bs(blk)), ==, 0);
    g_assert_cmpuint(mem_state(bottom(blk))->flushes, ==, 1);
    mem_state(bottom(blk))->error = -EIO;
    g_assert_cmpint(bdrv_flush(blk_bs(blk)), ==, -EIO);
    mem_state(bottom(blk))->error = 0;
}

static void test_compressed_unsupported(void)
{
    g_autoptr(BlockBackend) blk = open_blk("driver=test-mem");
    uint8_t buf[512] = {1};
    g_assert_cmpint(bdrv_pwrite(blk_root(blk), 0, 512, buf, BDRV_REQ_COMPRESSED), ==, -ENOTSUP);
}

/* --- zeroes and discards --- */

static void test_zeroes_by_driver(void)
{
    g_autoptr(BlockBackend) blk = open_blk("driver=test-mem,align=512,zero-align=4k,max-zero=10k");
    MemState *s = mem_state(blk_bs(blk));
    memset(s->data, 0xff, 65536);
    g_assert_cmpint(bdrv_pwrite_zeroes(blk_root(blk), 1000, 30000, 0), ==, 0);
    g_assert_cmpint(s->data[999], ==, 0xff);
    g_assert_true(qb_buffer_is_zero(s->data + 1000, 30000));
    g_assert_cmpint(s->data[31000], ==, 0xff);
    g_assert_cmpuint(s->n_zeroes, ==, 3); /* 4k..28k by at most 8k */
}

static void test_zeroes_fallback(void)
{
    g_autoptr(BlockBackend) blk = open_blk("driver=test-mem,align=512,zeroes=off,size=20M");
    MemState *s = mem_state(blk_bs(blk));
    memset(s->data, 0xff, 20 << 20);
    g_assert_cmpint(bdrv_pwrite_zeroes(blk_root(blk), 100, 18 << 20, 0), ==, 0);
    g_assert_cmpint(s->data[99], ==, 0xff);
    g_assert_true(qb_buffer_is_zero(s->data + 100, 18 << 20));
    g_assert_cmpint(s->data[100 + (18 << 20)], ==, 0xff);
    g_assert_cmpint(s->max_seen, <=, 8 << 20);
    memset(s->data, 0xff, 20 << 20);
    int ret = bdrv_pwrite_zeroes(blk_root(blk), 100, 4096, BDRV_REQ_NO_FALLBACK);
    g_assert_cmpint(ret, ==, -ENOTSUP);
    g_assert_cmpint(s->data[100], ==, 0xff);
    g_assert_cmpint(s->data[4195], ==, 0xff);
}

static void test_may_unmap(void)
{
    g_autoptr(BlockBackend) keep = open_blk("driver=test-mem");
    g_autoptr(BlockBackend) drop = open_blk("driver=test-mem,discard=unmap");
    g_assert_cmpint(bdrv_pwrite_zeroes(blk_root(keep), 0, 512, BDRV_REQ_MAY_UNMAP), ==, 0);
    g_assert_cmpint(mem_state(blk_bs(keep))->last_flags, ==, 0);
    g_assert_cmpint(bdrv_pwrite_zeroes(blk_root(drop), 0, 512, BDRV_REQ_MAY_UNMAP), ==, 0);
    g_assert_cmpint(mem_state(blk_bs(drop))->last_flags, ==, BDRV_REQ_MAY_UNMAP);
}

static void test_long_zeroes(void)
{
    g_autoptr(BlockBackend) blk = open_blk("driver=null-co,size=4P,discard=unmap");
    const int64_t len = (int64_t)1 << 44;
    g_assert_cmpint(bdrv_pwrite_zeroes(blk_root(blk), 12345, len, 0), ==, 0);
    g_assert_cmpint(bdrv_pdiscard(blk_root(blk), 12345, len), ==, 0);
}

static void test_discard_ignore(void)
{
    g_autoptr(BlockBackend) blk = open_blk("driver=test-mem");
    g_assert_cmpint(bdrv_pdiscard(blk_root(blk), 0, 4096), ==, 0);
    g_assert_cmpuint(mem_state(blk_bs(blk))->discards, ==, 0);
}

static void test_discard_cut(void)
{
    g_autoptr(BlockBackend) blk =
        open_blk("driver=test-mem,align=512,discard-align=4k,max-discard=10k,discard=unmap");
    MemState *s = mem_state(blk_bs(blk));
    memset(s->data, 0xff, 65536);
    g_assert_cmpint(bdrv_pdiscard(blk_root(blk), 1000, 30000), ==, 0);
    g_assert_cmpint(s->data[4095], ==, 0xff); /* heads and tails that the driver declines */
    g_assert_true(qb_buffer_is_zero(s->data + 4096, 28672 - 4096));
    g_assert_cmpint(s->data[28672], ==, 0xff);
    g_assert_cmpuint(s->discards, ==, 3);
    g_assert_cmpint(bdrv_pdiscard(blk_root(blk), 0, INT64_MAX), ==, 0); /* cut to the node */
    s->error = -EIO;
    g_assert_cmpint(bdrv_pdiscard(blk_root(blk), 0, 65536), ==, -EIO);
    s->error = 0;
}

static void test_detect_zeroes(void)
{
    g_autoptr(BlockBackend) on = open_blk("driver=test-mem,detect-zeroes=on,discard=unmap");
    g_autoptr(BlockBackend) unmap = open_blk("driver=test-mem,detect-zeroes=unmap,discard=unmap");
    MemState *s = mem_state(blk_bs(on)), *u = mem_state(blk_bs(unmap));
    uint8_t buf[4096] = {0};
    g_assert_cmpint(bdrv_pwrite(blk_root(on), 0, 4096, buf, 0), ==, 0);
    g_assert_cmpuint(s->n_zeroes, ==, 1);
    g_assert_cmpint(s->last_flags, ==, 0);
    g_assert_cmpint(bdrv_pwrite(blk_root(unmap), 0, 4096, buf, 0), ==, 0);
    g_assert_cmpint(u->last_flags, ==, BDRV_REQ_MAY_UNMAP);
    buf[4095] = 1;
    g_assert_cmpint(bdrv_pwrite(blk_root(on), 0, 4096, buf, 0), ==, 0);
    g_assert_cmpuint(s->n_zeroes, ==, 1);
    g_assert_cmpuint(s->writes, ==, 1);
    buf[4095] = 0;
    s->zeroes = false; /* the driver declines: written after all, once */
    g_assert_cmpint(bdrv_pwrite(blk_root(on), 0, 4096, buf, 0), ==, 0);
    g_assert_cmpuint(s->writes, ==, 2);
}

/* --- truncate --- */

static void test_truncate(void)
{
    GError *err = NULL;
    g_autoptr(BlockBackend) blk = open_blk("driver=raw,file.driver=test-mem,file.capacity=1M");
    g_autoptr(BlockBackend) fixed = open_blk("driver=test-cow");
    g_assert_true(bdrv_truncate(blk_root(blk), 1 << 20, true, PREALLOC_MODE_OFF, false, &err));
    g_assert_cmpint(bdrv_getlength(blk_bs(blk)), ==, 1 << 20);
    g_assert_cmpint(bdrv_getlength(bottom(blk)), ==, 1 << 20);
    g_assert_false(bdrv_truncate(blk_root(blk), -1, true, PREALLOC_MODE_OFF, false, &err));
    g_assert_cmpstr(err->message, ==, "Image size cannot be negative");
    g_clear_error(&err);
    g_assert_false(bdrv_truncate(blk_root(fixed), 0, true, PREALLOC_MODE_OFF, false, &err));
    g_assert_cmpstr(err->message, ==, "Image format driver does not support resize");
    g_clear_error(&err);
}

/* --- copy-on-read --- */

static const char *cow_chain =
    "driver=test-cow,size=50000,cluster=4k,backing.driver=test-mem,backing.size=40000";

static void test_copy_on_read(void)
{
    g_autoptr(BlockBackend) blk = open_blk(cow_chain);
    CowDriverState *top = blk_bs(blk)->opaque;
    MemState *base = mem_state(blk_bs(blk)->backing->bs);
    uint8_t buf[10000];
    fill(base->data, 40000, 1);
    memset(base->data + 8192, 0, 4096);
    g_assert_cmpint(bdrv_pread(blk_root(blk), 5000, 6000, buf, BDRV_REQ_COPY_ON_READ), ==, 0);
    g_assert_cmpmem(buf, 6000, base->data + 5000, 6000);
    g_assert_cmpint(top->map[0], ==, COW_NONE);
    g_assert_cmpint(top->map[1], ==, COW_DATA);
    g_assert_cmpint(top->map[2], ==, COW_ZERO);
    g_assert_cmpint(top->map[3], ==, COW_NONE);
    unsigned reads = base->reads;
    g_assert_cmpint(bdrv_pread(blk_root(blk), 5000, 6000, buf, BDRV_REQ_COPY_ON_READ), ==, 0);
    g_assert_cmpuint(base->reads, ==, reads);
    /* the last cluster is not whole, and beyond the end are zeroes */
    g_assert_cmpint(bdrv_pread(blk_root(blk), 45000, 10000, buf, BDRV_REQ_COPY_ON_READ), ==, 0);
    g_assert_true(qb_buffer_is_zero(buf, 10000));
}

static void test_copy_on_read_node(void)
{
    g_autofree char *opts = g_strconcat(cow_chain, ",copy-on-read=on", NULL);
    g_autoptr(BlockBackend) blk = open_blk(opts);
    CowDriverState *top = blk_bs(blk)->opaque;
    uint8_t buf[16];
    g_assert_cmpint(blk_pread(blk, 100, 16, buf, 0), ==, 0);
    g_assert_cmpint(top->map[0], !=, COW_NONE);
}

/* --- random operations --- */

typedef struct Oracle {
    BlockBackend *blk;
    uint8_t *data;
    int64_t length;
} Oracle;

/* [offset, offset + bytes) inside the node: small, or around a power of two. */
static void random_range(const Oracle *o, int64_t *offset, int64_t *bytes)
{
    int64_t unit = (int64_t)1 << g_test_rand_int_range(0, 13);
    *offset = g_test_rand_int_range(0, (int)o->length);
    *bytes = g_test_rand_int_range(0, (int)MIN(o->length - *offset, 20000) + 1);
    if (g_test_rand_bit()) {
        *offset -= *offset % unit;
    }
    if (g_test_rand_bit()) {
        *bytes -= *bytes % unit;
    }
}

/* Cuts @buf into elements of random lengths. */
static void random_vector(IoVector *v, uint8_t *buf, int64_t bytes)
{
    iov_vector_init(v, 0);
    while (bytes > 0) {
        int64_t n = g_test_rand_bit() ? bytes : g_test_rand_int_range(1, (int)bytes + 1);
        iov_vector_add(v, buf, (size_t)n);
        buf += n;
        bytes -= n;
    }
}

static void random_write(Oracle *o, int64_t offset, int64_t bytes)
{
    g_autofree uint8_t *buf = g_malloc((size_t)bytes + 1);
    IOV_VECTOR_AUTO v;
    if (g_test_rand_int_range(0, 4)) {
        fill(buf, (size_t)bytes, (uint8_t)g_test_rand_int());
    } else {
        memset(buf, 0, (size_t)bytes);
    }
    random_vector(&v, buf, bytes);
    int flags = g_test_rand_bit() ? BDRV_REQ_FUA : 0;
    g_assert_cmpint(bdrv_pwritev(blk_root(o->blk), offset, bytes, &v, flags), ==, 0);
    memcpy(o->data + offset, buf, (size_t)bytes);
}

static void random_read(Oracle *o, int64_t offset, int64_t bytes)
{
    g_autofree uint8_t *buf = g_malloc((size_t)bytes + 1);
    IOV_VECTOR_AUTO v;
    random_vector(&v, buf, bytes);
    g_assert_cmpint(bdrv_preadv(blk_root(o->blk), offset, bytes, &v, 0), ==, 0);
    g_assert_cmpmem(buf, (size_t)bytes, o->data + offset, (size_t)bytes);
}

static void random_zeroes(Oracle *o, int64_t offset, int64_t bytes)
{
    int flags = g_test_rand_bit() ? BDRV_REQ_MAY_UNMAP : 0;
    g_assert_cmpint(bdrv_pwrite_zeroes(blk_root(o->blk), offset, bytes, flags), ==, 0);
    memset(o->data + offset, 0, (size_t)bytes);
}

/* A discarded byte keeps its content or becomes zero. */
static void random_discard(Oracle *o, int64_t offset, int64_t bytes)
{
    g_autofree uint8_t *buf = g_malloc((size_t)o->length);
    g_assert_cmpint(bdrv_pdiscard(blk_root(o->blk), offset, bytes), ==, 0);
    g_assert_cmpint(bdrv_pread(blk_root(o->blk), 0, o->length, buf, 0), ==, 0);
    for (int64_t i = 0; i < bytes; i++) {
        g_assert_true(buf[offset + i] == 0 || buf[offset + i] == o->data[offset + i]);
        o->data[offset + i] = buf[offset + i];
    }
}

static void random_step(Oracle *o)
{
    static void (*const ops[])(Oracle *, int64_t, int64_t) = {
        random_write, random_write, random_write, random_read, random_zeroes, random_discard,
    };
    int64_t offset, bytes;
    random_range(o, &offset, &bytes);
    ops[g_test_rand_int_range(0, G_N_ELEMENTS(ops))](o, offset, bytes);
}

static void test_random(gconstpointer opts)
{
    Oracle o = {.blk = open_blk(opts)};
    o.length = bdrv_getlength(blk_bs(o.blk));
    o.data = g_malloc((size_t)o.length);
    g_assert_cmpint(bdrv_pread(blk_root(o.blk), 0, o.length, o.data, 0), ==, 0);
    for (int i = 0; i < 400; i++) {
        random_step(&o);
    }
    random_read(&o, 0, o.length);
    g_free(o.data);
    blk_unref(o.blk);
}

static const char *const stacks[] = {
    "driver=test-mem,align=1,discard=unmap",
    "driver=test-mem,align=2,discard=unmap,detect-zeroes=on",
    "driver=test-mem,align=8,max-transfer=24,discard=unmap",
    "driver=test-mem,align=512,max-transfer=2k,zero-align=4k,max-zero=8k,"
    "discard-align=4k,discard=unmap",
    "driver=test-mem,align=512,mem-align=512,zeroes=off,detect-zeroes=unmap,discard=unmap",
    "driver=test-mem,align=4k,mem-align=4k,max-iov=3,discard=unmap",
    "driver=test-fua,align=4k,zero-align=16k,discard=unmap",
    "driver=raw,offset=777,size=40960,discard=unmap,file.driver=test-mem,file.align=512,"
    "file.size=50000",
    "driver=raw,discard=unmap,file.driver=blkdebug,file.align=512,file.max-transfer=4k,"
    "file.opt-write-zero=8k,file.max-write-zero=16k,file.opt-discard=2k,file.max-discard=4k,"
    "file.image.driver=test-mem,file.image.align=2k,file.image.max-transfer=6k,"
    "file.image.size=61440",
    "driver=test-cow,size=60000,cluster=2k,discard=unmap,"
    "backing.driver=test-mem,backing.size=30000",
    "driver=test-cow,size=60000,cluster=1k,copy-on-read=on,detect-zeroes=on,"
    "backing.driver=test-cow,backing.cluster=4k,backing.size=50000,"
    "backing.backing.driver=test-mem,backing.backing.size=40000",
};

/* --- many threads --- */

#define WRITERS 6
#define ROUNDS 60

typedef struct Writer {
    BlockBackend *blk;
    unsigned index;
    pthread_t thread;
} Writer;

/* Every WRITERS-th group of 3 bytes is ours: all neighbours in a block belong to others. */
static void *write_own_bytes(void *opaque)
{
    Writer *w = opaque;
    for (unsigned round = 1; round <= ROUNDS; round++) {
        for (int64_t offset = 3 * w->index; offset + 3 <= 1024; offset += 3 * WRITERS) {
            uint8_t buf[3] = {(uint8_t)round, (uint8_t)w->index, (uint8_t)offset};
            g_assert_cmpint(blk_pwrite(w->blk, offset, 3, buf, 0), ==, 0);
        }
    }
    return NULL;
}

static void run_writers(BlockBackend *blk, void *(*fn)(void *))
{
    Writer w[WRITERS];
    for (unsigned i = 0; i < WRITERS; i++) {
        w[i] = (Writer){.blk = blk, .index = i};
        g_assert_true(qb_thread_start(&w[i].thread, "writer", fn, &w[i]));
    }
    for (unsigned i = 0; i < WRITERS; i++) {
        pthread_join(w[i].thread, NULL);
    }
}

static void test_concurrent_rmw(gconstpointer opts)
{
    g_autoptr(BlockBackend) blk = open_blk(opts);
    uint8_t buf[1024];
    run_writers(blk, write_own_bytes);
    g_assert_cmpint(blk_pread(blk, 0, 1024, buf, 0), ==, 0);
    for (int64_t offset = 0; offset + 3 <= 1024; offset += 3) {
        g_assert_cmpint(buf[offset], ==, ROUNDS);
        g_assert_cmpint(buf[offset + 1], ==, (offset / 3) % WRITERS);
        g_assert_cmpint(buf[offset + 2], ==, (uint8_t)offset);
    }
}

/* As above with zeroes and discards in between. Reads are not ordered against the writes of others,
 * so what is read are blocks that nobody else writes. */
static void *disturb(void *opaque)
{
    Writer *w = opaque;
    uint8_t buf[600];
    for (unsigned round = 0; round < ROUNDS; round++) {
        int64_t offset = 16384 + 512 * (int64_t)(w->index % 3) + round;
        g_assert_cmpint(blk_pwrite_zeroes(w->blk, offset, 600, 0), ==, 0);
        g_assert_cmpint(blk_pdiscard(w->blk, offset, 600), ==, 0);
        memset(buf, (int)w->index, sizeof(buf));
        g_assert_cmpint(blk_pwrite(w->blk, 8192 + 1024 * w->index, 600, buf, 0), ==, 0);
        g_assert_cmpint(blk_pread(w->blk, 8192 + 1024 * w->index, 600, buf, 0), ==, 0);
        for (int i = 0; i < 600; i++) {
            g_assert_cmpint(buf[i], ==, w->index);
        }
    }
    return write_own_bytes(opaque);
}

static void test_concurrent_mix(gconstpointer opts)
{
    g_autoptr(BlockBackend) blk = open_blk(opts);
    run_writers(blk, disturb);
}

static void *truncate_up_and_down(void *opaque)
{
    Writer *w = opaque;
    for (int64_t i = 0; i < ROUNDS; i++) {
        uint8_t buf[4096] = {1};
        int64_t length = 32768 + 512 * ((i + w->index) % 7);
        g_assert_true(blk_truncate(w->blk, length, true, PREALLOC_MODE_OFF, false, NULL));
        g_assert_cmpint(bdrv_pwrite(blk_root(w->blk), 32768, 512 * (1 + i % 6), buf, 0), ==, 0);
        g_assert_cmpint(bdrv_pwrite(blk_root(w->blk), 100, 512, buf, 0), ==, 0);
    }
    return NULL;
}

/* Clusters get allocated by several requests at once; each must find what the others left. */
static void *allocate(void *opaque)
{
    Writer *w = opaque;
    uint8_t buf[100], back[100];
    for (int64_t offset = 100 * w->index; offset + 100 <= 60000; offset += 100 * WRITERS) {
        memset(buf, (int)(offset / 100), sizeof(buf));
        g_assert_cmpint(blk_pwrite(w->blk, offset, 100, buf, 0), ==, 0);
        int flags = w->index % 2 ? BDRV_REQ_COPY_ON_READ : 0;
        g_assert_cmpint(blk_pread(w->blk, offset, 100, back, flags), ==, 0);
        g_assert_cmpmem(buf, 100, back, 100);
    }
    return NULL;
}

static void test_concurrent_allocation(void)
{
    g_autoptr(BlockBackend) blk = open_blk(
        "driver=test-cow,size=61000,cluster=4k,backing.driver=test-mem,backing.size=61000");
    uint8_t buf[61000];
    MemState *base = mem_state(blk_bs(blk)->backing->bs);
    memset(base->data, 0xee, 61000);
    run_writers(blk, allocate);
    g_assert_cmpint(blk_pread(blk, 0, 61000, buf, 0), ==, 0);
    for (int i = 0; i < 61000; i++) {
        g_assert_cmpint(buf[i], ==, i < 60000 ? (uint8_t)(i / 100) : 0xee);
    }
    g_assert_cmpuint(base->writes, ==, 0);
}

/* --- submitted requests --- */

#define SUBMITTED 300

typedef struct Submitted {
    uint8_t buf[2000];
    IoVector qiov;
    _Atomic(bool) done;
} Submitted;

static void submitted_done(void *opaque, int ret)
{
    Submitted *r = opaque;
    g_assert_cmpint(ret, ==, 0);
    r->done = true;
}

/* Odd lengths: each write is a read-modify-write and so has its place in the order. */
static void submit_one(Oracle *o, Submitted *r)
{
    int64_t bytes = 1 + 2 * g_test_rand_int_range(0, 999);
    int64_t offset = g_test_rand_int_range(0, 6000);
    uint8_t pattern = (uint8_t)g_test_rand_int_range(1, 256);
    bool zero = g_test_rand_int_range(0, 4) == 0;
    memset(r->buf, pattern, sizeof(r->buf));
    iov_vector_init_buf(&r->qiov, r->buf, (size_t)bytes);
    blk_submit(o->blk, zero ? BLK_OP_ZERO : BLK_OP_WRITE, offset, bytes, zero ? NULL : &r->qiov, 0,
               submitted_done, r);
    memset(o->data + offset, zero ? 0 : pattern, (size_t)bytes);
}

/* Overlapping requests take effect in the order of their submission, whatever threads run them. */
static void test_submission_order(gconstpointer opts)
{
    g_autofree Submitted *r = g_new0(Submitted, SUBMITTED);
    g_autofree uint8_t *data = g_malloc0(65536);
    Oracle o = {.blk = open_blk(opts), .data = data, .length = 8192};
    for (int i = 0; i < SUBMITTED; i++) {
        submit_one(&o, &r[i]);
    }
    blk_drain(o.blk);
    for (int i = 0; i < SUBMITTED; i++) {
        g_assert_true(r[i].done);
    }
    random_read(&o, 0, o.length);
    blk_unref(o.blk);
}

/* Writes at the end make the node longer while others make it shorter. */
static void test_concurrent_truncate(void)
{
    g_autoptr(BlockBackend) blk = open_blk("driver=test-mem,align=512,capacity=128k,grow=on");
    Writer w[WRITERS];
    for (unsigned i = 0; i < 3; i++) {
        w[i] = (Writer){.blk = blk, .index = i};
        g_assert_true(qb_thread_start(&w[i].thread, "resizer", truncate_up_and_down, &w[i]));
    }
    for (unsigned i = 0; i < 3; i++) {
        pthread_join(w[i].thread, NULL);
    }
    g_assert_cmpint(bdrv_getlength(blk_bs(blk)), ==, mem_state(blk_bs(blk))->length);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    mem_drivers_register();
    g_test_add_func("/io/end/read", test_read_beyond_end);
    g_test_add_func("/io/end/write", test_write_beyond_end);
    g_test_add_func("/io/end/grow", test_grow);
    g_test_add_func("/io/bad-ranges", test_bad_ranges);
    g_test_add_func("/io/read-only", test_read_only);
    g_test_add_func("/io/read-modify-write", test_read_modify_write);
    g_test_add_func("/io/max-transfer", test_max_transfer);
    g_test_add_func("/io/memory", test_memory);
    g_test_add_func("/io/many-elements", test_many_elements);
    g_test_add_func("/io/errors", test_errors);
    g_test_add_func("/io/fua", test_fua);
    g_test_add_func("/io/flush/no-flush", test_no_flush);
    g_test_add_func("/io/flush/down", test_flush_goes_down);
    g_test_add_func("/io/compressed", test_compressed_unsupported);
    g_test_add_func("/io/zeroes/driver", test_zeroes_by_driver);
    g_test_add_func("/io/zeroes/fallback", test_zeroes_fallback);
    g_test_add_func("/io/zeroes/may-unmap", test_may_unmap);
    g_test_add_func("/io/zeroes/long", test_long_zeroes);
    g_test_add_func("/io/discard/ignore", test_discard_ignore);
    g_test_add_func("/io/discard/cut", test_discard_cut);
    g_test_add_func("/io/detect-zeroes", test_detect_zeroes);
    g_test_add_func("/io/truncate", test_truncate);
    g_test_add_func("/io/copy-on-read/flag", test_copy_on_read);
    g_test_add_func("/io/copy-on-read/node", test_copy_on_read_node);
    for (unsigned i = 0; i < G_N_ELEMENTS(stacks); i++) {
        g_autofree char *name = g_strdup_printf("/io/random/%u", i);
        g_test_add_data_func(name, stacks[i], test_random);
    }
    g_test_add_data_func("/io/threads/rmw", "driver=test-mem,align=512", test_concurrent_rmw);
    g_test_add_data_func("/io/threads/rmw-big", "driver=test-mem,align=4k", test_concurrent_rmw);
    g_test_add_data_func("/io/threads/mix",
                         "driver=test-mem,align=512,discard=unmap,detect-zeroes=on",
                         test_concurrent_mix);
    g_test_add_data_func("/io/submit/order", "driver=test-mem,align=512", test_submission_order);
    g_test_add_data_func("/io/submit/order-below",
                         "driver=blkdebug,align=1k,image.driver=test-mem,image.align=512",
                         test_submission_order);
    g_test_add_func("/io/threads/allocation", test_concurrent_allocation);
    g_test_add_func("/io/threads/truncate", test_concurrent_truncate);
    int ret = g_test_run();
    qb_pools_shutdown();
    return ret;
}
