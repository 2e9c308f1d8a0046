/*
 * Copying from one node to another, by the kernel where drivers know the place of both.
 *
 *      source   |---- piece ----|          mapped for reading:  (fd, offset) ...
 *                    |  copy_file_range()
 *      target   |---- piece ----|          mapped for writing:  (fd, offset) ...
 *
 * The maps are those of the fast lane, so order, drains, allocation, growth and dirty bitmaps are what
 * they are for a write of the same range.  Where one of both sides cannot be mapped, or the kernel
 * cannot copy between the files, the piece is read and written.
 *
 * Invariants
 *  1. Pieces end at multiples of PIECE in the target, so that whole clusters are allocated.
 *  2. The source is mapped before the target: what is read is what the source had before the piece
 *     was written, unless both overlap, which callers avoid.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/io-int.h"
#include "block/queue.h"
#include "util/iobatch.h"

#define PIECE (1 << 20)

typedef struct Copy {
    BdrvChild *src, *dst;
    int64_t src_offset, dst_offset, bytes;
} Copy;

/* Extent @i of @m, from @done bytes on. */
typedef struct Cursor {
    const BdrvMapping *m;
    unsigned i;
    int64_t done;
} Cursor;

static void advance(Cursor *c, int64_t bytes)
{
    c->done += bytes;
    if (c->done == c->m->ext[c->i].bytes) {
        c->i++;
        c->done = 0;
    }
}

/* -ENOTSUP: the kernel cannot; what it has done so far does not matter. */
static int copy_extents(const BdrvMapping *src, const BdrvMapping *dst, int64_t bytes)
{
    Cursor from = {.m = src}, to = {.m = dst};
    while (bytes > 0) {
        const BdrvMapExtent *s = &src->ext[from.i], *d = &dst->ext[to.i];
        int64_t n = MIN(MIN(s->bytes - from.done, d->bytes - to.done), bytes);
        if (s->zero || atomic_load(d->lacks_copy)) {
            return -ENOTSUP;
        }
        int ret = qb_io_copy(s->fd, s->host_offset + from.done, d->fd, d->host_offset + to.done, n);
        if (ret == -ENOTSUP) {
            atomic_store(d->lacks_copy, true);
        }
        if (ret < 0) {
            return ret;
        }
        advance(&from, n);
        advance(&to, n);
        bytes -= n;
    }
    return 0;
}

/* Both are mapped: bytes copied, or -errno. */
static int64_t copy_mapped(BdrvMapping *src, BdrvMapping *dst)
{
    int64_t bytes = MIN(src->bytes, dst->bytes);
    int ret = bytes == dst->bytes ? copy_extents(src, dst, bytes) : -ENOTSUP;
    dst->copied = true;
    ret = bdrv_map_done(NULL, dst, ret);
    return ret < 0 ? ret : bytes;
}

/* Copies the start of @c: bytes, or -EAGAIN or -ENOTSUP when it has to be read and written. */
static int64_t copy_by_kernel(const Copy *c)
{
    BdrvMapping src, dst;
    bdrv_mapping_init(&src);
    bdrv_mapping_init(&dst);
    int64_t ret = bdrv_map(c->src, NULL, BDRV_MAP_READ, c->src_offset, c->bytes, &src);
    if (ret < 0) {
        return ret;
    }
    ret = bdrv_map(c->dst, NULL, BDRV_MAP_WRITE, c->dst_offset, src.bytes, &dst);
    if (ret == 0) {
        ret = copy_mapped(&src, &dst);
    }
    (void)bdrv_map_done(NULL, &src, 0);
    return ret;
}

static int64_t copy_by_hand(const Copy *c, void *buf)
{
    int ret = bdrv_pread(c->src, c->src_offset, c->bytes, buf, 0);
    if (ret == 0) {
        ret = bdrv_pwrite(c->dst, c->dst_offset, c->bytes, buf, 0);
    }
    return ret < 0 ? ret : c->bytes;
}

int bdrv_copy_range(BdrvChild *src, int64_t src_offset, BdrvChild *dst, int64_t dst_offset,
                    int64_t bytes)
{
    QB_AUTO_FREE void *buf = NULL;
    BDRV_GRAPH_GUARD();
    while (bytes > 0) {
        Copy c = {.src = src, .dst = dst, .src_offset = src_offset, .dst_offset = dst_offset,
                  .bytes = MIN(bytes, PIECE - dst_offset % PIECE)};
        int64_t n = copy_by_kernel(&c);
        if (n == -EAGAIN || n == -ENOTSUP) {
            buf = buf ? buf : bdrv_try_blockalign(dst->bs, PIECE);
            n = buf ? copy_by_hand(&c, buf) : -ENOMEM;
        }
        if (n < 0) {
            return (int)n;
        }
        src_offset += n;
        dst_offset += n;
        bytes -= n;
    }
    return 0;
}
