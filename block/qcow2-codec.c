/*
 * Streams of compressed clusters: raw deflate with a window of 4 KiB, or zstd frames.
 *
 *   cluster --compress--> stream, at most cluster - 1 bytes      or -ENOSPC: store it as it is
 *   stream + whatever else is in its last sector --decompress--> cluster
 *
 * How long a stream is is known to the sector only, so a decoder is given more than the stream and
 * stops when the cluster is full.  Deflate need not have seen its end then; zstd must have ended a
 * frame, and several frames may follow one another.
 *
 * Deflate is written by ISA-L where the build has it: some ten times as fast as zlib, streams about 8 %
 * longer.  It is read by libdeflate, which wants the stream's end within the cluster's size; what it
 * does not take, zlib may.
 *
 * Making a compressor costs more than compressing a small cluster, so each thread keeps what it has
 * used, until it ends.
 *
 * Deliberately not done: compression levels to choose from, since nobody can say them in `qemu-img`.
 *
 * SPDX-License-Identifier: MIT
 */
#include "qb-config.h"
#include "block/qcow2.h"

#include <zlib.h>
#ifdef CONFIG_ISAL
#include <isa-l/igzip_lib.h>
#endif
#ifdef CONFIG_LIBDEFLATE
#include <libdeflate.h>
#endif
#ifdef CONFIG_ZSTD
#include <zstd.h>
#endif

#define WINDOW_BITS 12
#define WINDOW_BITS_READ 15 /* takes what others may have written with a larger one */
#define MEM_LEVEL 9

/* What a thread keeps. */
typedef struct Codecs {
    z_stream inflate;
    bool has_inflate;
#ifdef CONFIG_ISAL
    uint8_t *isal_work;
#else
    z_stream deflate;
    bool has_deflate;
#endif
#ifdef CONFIG_LIBDEFLATE
    struct libdeflate_decompressor *libdeflate;
#endif
#ifdef CONFIG_ZSTD
    ZSTD_CCtx *zstd_c;
    ZSTD_DCtx *zstd_d;
#endif
} Codecs;

static pthread_key_t codecs_key;
static pthread_once_t codecs_once = PTHREAD_ONCE_INIT;

static void codecs_free(void *opaque)
{
    Codecs *c = opaque;
    if (c->has_inflate) {
        inflateEnd(&c->inflate);
    }
#ifdef CONFIG_ISAL
    g_free(c->isal_work);
#else
    if (c->has_deflate) {
        deflateEnd(&c->deflate);
    }
#endif
#ifdef CONFIG_LIBDEFLATE
    if (c->libdeflate) {
        libdeflate_free_decompressor(c->libdeflate);
    }
#endif
#ifdef CONFIG_ZSTD
    ZSTD_freeCCtx(c->zstd_c);
    ZSTD_freeDCtx(c->zstd_d);
#endif
    g_free(c);
}

static void codecs_init(void)
{
    int ret = pthread_key_create(&codecs_key, codecs_free);
    assert(ret == 0);
    (void)ret;
}

/* This thread's; NULL: no memory. */
static Codecs *codecs_get(void)
{
    pthread_once(&codecs_once, codecs_init);
    Codecs *c = pthread_getspecific(codecs_key);
    if (!c) {
        c = g_try_new0(Codecs, 1);
        if (c && pthread_setspecific(codecs_key, c) != 0) {
            g_free(c);
            c = NULL;
        }
    }
    return c;
}

/* --- writing deflate --- */

#ifdef CONFIG_ISAL
static ssize_t deflate_compress(Codecs *c, void *dst, size_t dst_len, const void *src,
                                size_t src_len)
{
    if (!c->isal_work) {
        c->isal_work = g_try_malloc(ISAL_DEF_LVL3_DEFAULT);
    }
    if (!c->isal_work) {
        return -ENOMEM;
    }
    struct isal_zstream z;
    isal_deflate_stateless_init(&z);
    z.level = 3;
    z.level_buf = c->isal_work;
    z.level_buf_size = ISAL_DEF_LVL3_DEFAULT;
    z.hist_bits = WINDOW_BITS;
    z.gzip_flag = IGZIP_DEFLATE;
    z.end_of_stream = 1;
    z.next_in = (uint8_t *)src;
    z.avail_in = (uint32_t)src_len;
    z.next_out = dst;
    z.avail_out = (uint32_t)dst_len;
    return isal_deflate_stateless(&z) == COMP_OK ? (ssize_t)z.total_out : -ENOSPC;
}
#else
static z_stream *get_deflate(Codecs *c)
{
    if (c->has_deflate) {
        return deflateReset(&c->deflate) == Z_OK ? &c->deflate : NULL;
    }
    c->has_deflate = deflateInit2(&c->deflate, Z_DEFAULT_COMPRESSION, Z_DEFLATED, -WINDOW_BITS,
                                  MEM_LEVEL, Z_DEFAULT_STRATEGY)
                     == Z_OK;
    return c->has_deflate ? &c->deflate : NULL;
}

static ssize_t deflate_compress(Codecs *c, void *dst, size_t dst_len, const void *src,
                                size_t src_len)
{
    z_stream *z = get_deflate(c);
    if (!z) {
        return -ENOMEM;
    }
    z->next_in = (Bytef *)src;
    z->avail_in = (uInt)src_len;
    z->next_out = dst;
    z->avail_out = (uInt)dst_len;
    return deflate(z, Z_FINISH) == Z_STREAM_END ? (ssize_t)(dst_len - z->avail_out) : -ENOSPC;
}
#endif

/* --- reading deflate --- */

/* Streams that end within @dst_len, as nearly all do. False: let zlib try. */
static bool inflate_quickly(Codecs *c, void *dst, size_t dst_len, const void *src, size_t src_len)
{
#ifdef CONFIG_LIBDEFLATE
    if (!c->libdeflate) {
        c->libdeflate = libdeflate_alloc_decompressor();
    }
    size_t in, out;
    return c->libdeflate &&
           libdeflate_deflate_decompress_ex(c->libdeflate, src, src_len, dst, dst_len, &in, &out)
               == LIBDEFLATE_SUCCESS &&
           out == dst_len;
#else
    return false;
#endif
}

static z_stream *get_inflate(Codecs *c)
{
    if (c->has_inflate) {
        return inflateReset(&c->inflate) == Z_OK ? &c->inflate : NULL;
    }
    c->has_inflate = inflateInit2(&c->inflate, -WINDOW_BITS_READ) == Z_OK;
    return c->has_inflate ? &c->inflate : NULL;
}

static int deflate_decompress(Codecs *c, void *dst, size_t dst_len, const void *src,
                              size_t src_len)
{
    if (inflate_quickly(c, dst, dst_len, src, src_len)) {
        return 0;
    }
    z_stream *z = get_inflate(c);
    if (!z) {
        return -ENOMEM;
    }
    z->next_in = (Bytef *)src;
    z->avail_in = (uInt)src_len;
    z->next_out = dst;
    z->avail_out = (uInt)dst_len;
    int ret = inflate(z, Z_FINISH);
    bool went_well = ret == Z_STREAM_END || ret == Z_BUF_ERROR || ret == Z_OK;
    return went_well && z->avail_out == 0 ? 0 : -EIO;
}

/* --- zstd --- */

#ifdef CONFIG_ZSTD
static ssize_t zstd_compress(Codecs *c, void *dst, size_t dst_len, const void *src, size_t src_len)
{
    if (!c->zstd_c) {
        c->zstd_c = ZSTD_createCCtx();
    }
    if (!c->zstd_c) {
        return -ENOMEM;
    }
    ZSTD_CCtx_reset(c->zstd_c, ZSTD_reset_session_only);
    ZSTD_inBuffer in = {.src = src, .size = src_len};
    ZSTD_outBuffer out = {.dst = dst, .size = dst_len};
    size_t left = ZSTD_compressStream2(c->zstd_c, &out, &in, ZSTD_e_end);
    if (ZSTD_isError(left)) {
        return -EIO;
    }
    return left == 0 ? (ssize_t)out.pos : -ENOSPC;
}

static int zstd_decompress(Codecs *c, void *dst, size_t dst_len, const void *src, size_t src_len)
{
    if (!c->zstd_d) {
        c->zstd_d = ZSTD_createDCtx();
    }
    if (!c->zstd_d) {
        return -ENOMEM;
    }
    ZSTD_DCtx_reset(c->zstd_d, ZSTD_reset_session_only);
    ZSTD_inBuffer in = {.src = src, .size = src_len};
    ZSTD_outBuffer out = {.dst = dst, .size = dst_len};
    size_t left = 1; /* 0: a frame has ended */
    while (out.pos < dst_len || left != 0) {
        size_t in_before = in.pos, out_before = out.pos;
        left = ZSTD_decompressStream(c->zstd_d, &out, &in);
        bool stuck = in.pos == in_before && out.pos == out_before && left != 0;
        bool dry = in.pos == src_len && (out.pos < dst_len || left != 0) && out.pos == out_before;
        if (ZSTD_isError(left) || stuck || dry) {
            return -EIO;
        }
    }
    return 0;
}
#endif

/* --- by type --- */

static const struct Codec {
    ssize_t (*compress)(Codecs *c, void *dst, size_t dst_len, const void *src, size_t src_len);
    int (*decompress)(Codecs *c, void *dst, size_t dst_len, const void *src, size_t src_len);
} codecs[] = {
    [QCOW2_COMPRESSION_ZLIB] = {deflate_compress, deflate_decompress},
#ifdef CONFIG_ZSTD
    [QCOW2_COMPRESSION_ZSTD] = {zstd_compress, zstd_decompress},
#endif
};

ssize_t qcow2_compress(uint8_t type, void *dst, size_t dst_len, const void *src, size_t src_len)
{
    if (type >= G_N_ELEMENTS(codecs)) {
        return -ENOTSUP;
    }
    Codecs *c = codecs_get();
    return c ? codecs[type].compress(c, dst, dst_len, src, src_len) : -ENOMEM;
}

int qcow2_decompress(uint8_t type, void *dst, size_t dst_len, const void *src, size_t src_len)
{
    if (type >= G_N_ELEMENTS(codecs)) {
        return -ENOTSUP;
    }
    Codecs *c = codecs_get();
    return c ? codecs[type].decompress(c, dst, dst_len, src, src_len) : -ENOMEM;
}
