/*
 * Streams of compressed clusters: round trips, what may follow a stream in its last sector, streams
 * of other writers, and streams that are broken.
 *
 * SPDX-License-Identifier: MIT
 */
#undef NDEBUG
#include "qb-config.h"
#include "block/qcow2.h"

#include <zlib.h>
#ifdef CONFIG_ZSTD
#include <zstd.h>
#endif

#define MAX_CLUSTER (2u << 20)
#define SECTOR 512

static const uint8_t types[] = {
    QCOW2_COMPRESSION_ZLIB,
#ifdef CONFIG_ZSTD
    QCOW2_COMPRESSION_ZSTD,
#endif
};

/* Text-like: shrinks, but not to nothing. */
static void fill_text(uint8_t *buf, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        buf[i] = (uint8_t)('a' + (i / 7 * 31 + i % 7) % 23 + g_test_rand_int_range(0, 2));
    }
}

static void fill_noise(uint8_t *buf, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        buf[i] = (uint8_t)g_test_rand_int();
    }
}

/* The stream as it is read: up to the end of its last sector, garbage behind it. */
static size_t pad_with_garbage(uint8_t *stream, size_t len, size_t offset_in_sector)
{
    size_t end = qb_align_up(offset_in_sector + len, SECTOR) - offset_in_sector;
    fill_noise(stream + len, end - len);
    return end;
}

static void round_trip(uint8_t type, size_t size, size_t offset_in_sector)
{
    g_autofree uint8_t *data = g_malloc(size), *back = g_malloc(size);
    g_autofree uint8_t *stream = g_malloc(size + SECTOR);
    fill_text(data, size);
    ssize_t len = qcow2_compress(type, stream, size - 1, data, size);
    g_assert_cmpint(len, >, 0);
    g_assert_cmpint(len, <, (ssize_t)size);
    size_t padded = pad_with_garbage(stream, (size_t)len, offset_in_sector);
    memset(back, 0xee, size);
    g_assert_cmpint(qcow2_decompress(type, back, size, stream, padded), ==, 0);
    g_assert_cmpmem(back, size, data, size);
    g_assert_cmpint(qcow2_decompress(type, back, size, stream, (size_t)len), ==, 0);
}

static void test_round_trip(void)
{
    for (size_t t = 0; t < G_N_ELEMENTS(types); t++) {
        for (unsigned bits = QCOW2_MIN_CLUSTER_BITS; bits <= QCOW2_MAX_CLUSTER_BITS; bits++) {
            round_trip(types[t], (size_t)1 << bits, 0);
            round_trip(types[t], (size_t)1 << bits, (size_t)g_test_rand_int_range(1, SECTOR));
        }
    }
}

static void test_does_not_shrink(void)
{
    for (size_t t = 0; t < G_N_ELEMENTS(types); t++) {
        for (unsigned bits = QCOW2_MIN_CLUSTER_BITS; bits <= 16; bits++) {
            size_t size = (size_t)1 << bits;
            g_autofree uint8_t *data = g_malloc(size), *stream = g_malloc(size);
            fill_noise(data, size);
            g_assert_cmpint(qcow2_compress(types[t], stream, size - 1, data, size), ==, -ENOSPC);
            memset(data, 7, size); /* the thread's encoder works after a failure */
            g_assert_cmpint(qcow2_compress(types[t], stream, size - 1, data, size), >, 0);
        }
    }
}

static void test_cut_short(void)
{
    for (size_t t = 0; t < G_N_ELEMENTS(types); t++) {
        enum { SIZE = 65536 };
        g_autofree uint8_t *data = g_malloc(SIZE), *back = g_malloc(SIZE), *stream = g_malloc(SIZE);
        fill_text(data, SIZE);
        ssize_t len = qcow2_compress(types[t], stream, SIZE - 1, data, SIZE);
        g_assert_cmpint(len, >, 100);
        for (size_t cut = 0; cut < (size_t)len - 40; cut += 97) {
            g_assert_cmpint(qcow2_decompress(types[t], back, SIZE, stream, cut), ==, -EIO);
        }
        g_assert_cmpint(qcow2_decompress(types[t], back, SIZE, stream, (size_t)len), ==, 0);
        g_assert_cmpmem(back, SIZE, data, SIZE);
    }
}

static void test_noise(void)
{
    for (size_t t = 0; t < G_N_ELEMENTS(types); t++) {
        uint8_t back[4096], stream[1024];
        for (int i = 0; i < 2000; i++) {
            fill_noise(stream, sizeof(stream));
            if (types[t] == QCOW2_COMPRESSION_ZSTD && i % 2) {
                memcpy(stream, "\x28\xb5\x2f\xfd", 4);
            }
            int ret = qcow2_decompress(types[t], back, sizeof(back), stream, sizeof(stream));
            g_assert_true(ret == 0 || ret == -EIO);
        }
    }
}

static void test_unknown_type(void)
{
    uint8_t buf[512] = {0};
    g_assert_cmpint(qcow2_compress(7, buf, 511, buf, 512), ==, -ENOTSUP);
    g_assert_cmpint(qcow2_decompress(7, buf, 512, buf, 512), ==, -ENOTSUP);
}

/* Others may have used a larger window than ours. */
static void test_large_window(void)
{
    enum { SIZE = 65536 };
    g_autofree uint8_t *data = g_malloc(SIZE), *back = g_malloc(SIZE), *stream = g_malloc(SIZE);
    z_stream z = {0};
    fill_noise(data, SIZE / 4);
    memcpy(data + SIZE / 4, data, SIZE / 4); /* found only by looking back 16 KiB */
    memcpy(data + SIZE / 2, data, SIZE / 2);
    g_assert_cmpint(deflateInit2(&z, 9, Z_DEFLATED, -15, 9, Z_DEFAULT_STRATEGY), ==, Z_OK);
    z.next_in = data;
    z.avail_in = SIZE;
    z.next_out = stream;
    z.avail_out = SIZE;
    g_assert_cmpint(deflate(&z, Z_FINISH), ==, Z_STREAM_END);
    size_t len = SIZE - z.avail_out;
    deflateEnd(&z);
    g_assert_cmpint(qcow2_decompress(QCOW2_COMPRESSION_ZLIB, back, SIZE, stream, len), ==, 0);
    g_assert_cmpmem(back, SIZE, data, SIZE);
}

/* Our streams need no more than 4 KiB to look back. */
static void test_small_window(void)
{
    enum { SIZE = 65536 };
    g_autofree uint8_t *data = g_malloc(SIZE), *back = g_malloc(SIZE), *stream = g_malloc(SIZE);
    z_stream z = {0};
    fill_text(data, SIZE);
    ssize_t len = qcow2_compress(QCOW2_COMPRESSION_ZLIB, stream, SIZE - 1, data, SIZE);
    g_assert_cmpint(inflateInit2(&z, -12), ==, Z_OK);
    z.next_in = stream;
    z.avail_in = (uInt)len;
    for (size_t pos = 0; pos < SIZE; pos += 512) { /* small pieces: only the window remembers */
        z.next_out = back + pos;
        z.avail_out = 512;
        int ret = inflate(&z, Z_SYNC_FLUSH);
        g_assert_true(ret == Z_OK || ret == Z_STREAM_END);
        g_assert_cmpuint(z.avail_out, ==, 0);
    }
    inflateEnd(&z);
    g_assert_cmpmem(back, SIZE, data, SIZE);
}

#ifdef CONFIG_ZSTD
static void test_zstd_frames(void)
{
    enum { SIZE = 65536, HALF = SIZE / 2 };
    g_autofree uint8_t *data = g_malloc(SIZE), *back = g_malloc(SIZE), *stream = g_malloc(2 * SIZE);
    fill_text(data, SIZE);
    size_t first = ZSTD_compress(stream, SIZE, data, HALF, 1);
    size_t second = ZSTD_compress(stream + first, SIZE, data + HALF, HALF, 5);
    g_assert_false(ZSTD_isError(first) || ZSTD_isError(second));
    size_t padded = pad_with_garbage(stream, first + second, 0);
    g_assert_cmpint(qcow2_decompress(QCOW2_COMPRESSION_ZSTD, back, SIZE, stream, padded), ==, 0);
    g_assert_cmpmem(back, SIZE, data, SIZE);
    /* the second frame is missing, or is more than the cluster takes */
    g_assert_cmpint(qcow2_decompress(QCOW2_COMPRESSION_ZSTD, back, SIZE, stream, first), ==, -EIO);
    g_assert_cmpint(qcow2_decompress(QCOW2_COMPRESSION_ZSTD, back, HALF + 512, stream,
                                     first + second),
                    ==, -EIO);
}

static void test_zstd_content_size(void)
{
    enum { SIZE = 65536 };
    g_autofree uint8_t *data = g_malloc(SIZE), *stream = g_malloc(SIZE);
    fill_text(data, SIZE);
    ssize_t len = qcow2_compress(QCOW2_COMPRESSION_ZSTD, stream, SIZE - 1, data, SIZE);
    g_assert_cmpint(len, >, 0);
    g_assert_cmpuint(ZSTD_getFrameContentSize(stream, (size_t)len), ==, SIZE);
}
#endif

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/qcow2-compress/round-trip", test_round_trip);
    g_test_add_func("/qcow2-compress/does-not-shrink", test_does_not_shrink);
    g_test_add_func("/qcow2-compress/cut-short", test_cut_short);
    g_test_add_func("/qcow2-compress/noise", test_noise);
    g_test_add_func("/qcow2-compress/unknown-type", test_unknown_type);
    g_test_add_func("/qcow2-compress/large-window", test_large_window);
    g_test_add_func("/qcow2-compress/small-window", test_small_window);
#ifdef CONFIG_ZSTD
    g_test_add_func("/qcow2-compress/zstd-frames", test_zstd_frames);
    g_test_add_func("/qcow2-compress/zstd-content-size", test_zstd_content_size);
#endif
    return g_test_run();
}
