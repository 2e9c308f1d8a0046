/*
 * Copying from one node to another, by the kernel where drivers know the place of both.
 *
 *      source   |---- piece ----|          mapped for reading:  (fd, offset) ...
 *                    |  copy_file_range()
 *      target   |---- piece ----|          mapped for writing:  (fd, offset) ...
 *
 * The maps are those of the fast lane, so order, drains, allocation, growth and dirty bitmaps are what
 * they are for a write of the same range.
 *
 *      both sides mapped    the kernel copies; or this thread reads and writes the files
 *      one is not           ordinary requests to the nodes
 *
 * A kernel that shares blocks, or sends the request on to a server, moves no data.  One that copies
 * page by page holds the lock of the target's inode for all of it, so that several threads are no
 * quicker than one: they had better read and write (BDRV_COPY_SHARING), half of which they do in
 * parallel.
 *
 * Where the first pages of a batch are not in memory the rest of it is asked for ahead, so that a
 * disk sees it at depth.
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

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#define PIECE (1 << 20)

/* One call. */
typedef struct Copier {
    BdrvChild *src, *dst;
    int flags; /* BdrvCopyFlags */
    void *buf; /* of PIECE bytes, or less if all are shorter; NULL: not needed so far */
    size_t buf_size;
    const BdrvCopyExtent *ahead; /* what comes next; none: nothing, or asked for already */
    size_t n_ahead;
} Copier;

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

static int need_buffer(Copier *c)
{
    if (!c->buf) {
        size_t align = MAX(c->src->bs->bl.min_mem_alignment, c->dst->bs->bl.opt_mem_alignment);
        c->buf = qb_try_memalign(MAX(align, sizeof(void *)), c->buf_size);
    }
    return c->buf ? 0 : -ENOMEM;
}

static int map_part(BdrvChild *child, BdrvMapIntent intent, int64_t offset, int64_t bytes,
                    BdrvMapping *m)
{
    bdrv_mapping_init(m);
    return bdrv_map(child, NULL, intent, offset, bytes, m);
}

/* --- reading ahead --- */

static void ask_for_extent(Copier *c, const BdrvCopyExtent *ext)
{
    BdrvMapping m;
    if (map_part(c->src, BDRV_MAP_READ, ext->src_offset, MIN(ext->bytes, PIECE), &m) < 0) {
        return;
    }
    for (unsigned i = 0; i < m.n; i++) {
        if (!m.ext[i].zero && !m.ext[i].direct) {
            posix_fadvise(m.ext[i].fd, m.ext[i].host_offset, m.ext[i].bytes, POSIX_FADV_WILLNEED);
        }
    }
    (void)bdrv_map_done(NULL, &m, 0);
}

static void ask_ahead(Copier *c)
{
    while (c->n_ahead > 0) {
        ask_for_extent(c, c->ahead++);
        c->n_ahead--;
    }
}

/* --- both sides mapped --- */

static bool kernel_is_for(const Copier *c, const BdrvMapExtent *dst)
{
    bool moves_pages = (c->flags & BDRV_COPY_SHARING) && dst->copies_pages;
    return !moves_pages && !atomic_load(dst->lacks_copy);
}

/* -ENOTSUP: the kernel cannot; what it has done so far does not matter. */
static int copy_in_kernel(const BdrvMapping *src, const BdrvMapping *dst)
{
    Cursor from = {.m = src}, to = {.m = dst};
    for (int64_t n, bytes = dst->bytes; bytes > 0; bytes -= n) {
        const BdrvMapExtent *s = &src->ext[from.i], *d = &dst->ext[to.i];
        n = MIN(MIN(s->bytes - from.done, d->bytes - to.done), bytes);
        if (s->zero) {
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
    }
    return 0;
}

static int read_extent(Copier *c, const BdrvMapExtent *e, const struct iovec *iov)
{
    if (c->n_ahead > 0 && !e->direct) {
        QbIoOp op = {
            .kind = QB_IO_READ, .fd = e->fd, .offset = (uint64_t)e->host_offset, .iov = iov,
            .niov = 1,
        };
        ssize_t n = qb_io_nowait(&op, e->lacks_nowait);
        if (n == (ssize_t)iov->iov_len) {
            return 0;
        }
        ask_ahead(c);
    }
    return qb_io_one(QB_IO_READ, e->fd, (uint64_t)e->host_offset, iov, 1);
}

/* The first @bytes of what is mapped, to the buffer. */
static int read_mapped(Copier *c, const BdrvMapping *m, int64_t bytes)
{
    uint8_t *buf = c->buf;
    int ret = 0;
    for (unsigned i = 0; bytes > 0 && ret == 0; i++) {
        const BdrvMapExtent *e = &m->ext[i];
        struct iovec iov = {.iov_base = buf, .iov_len = (size_t)MIN(e->bytes, bytes)};
        if (e->zero) {
            memset(buf, 0, iov.iov_len);
        } else {
            ret = read_extent(c, e, &iov);
        }
        buf += iov.iov_len;
        bytes -= (int64_t)iov.iov_len;
    }
    return ret;
}

static int write_mapped(Copier *c, const BdrvMapping *m)
{
    uint8_t *buf = c->buf;
    int ret = 0;
    for (unsigned i = 0; i < m->n && ret == 0; i++) {
        const BdrvMapExtent *e = &m->ext[i];
        struct iovec iov = {.iov_base = buf, .iov_len = (size_t)e->bytes};
        ret = qb_io_one(QB_IO_WRITE, e->fd, (uint64_t)e->host_offset, &iov, 1);
        buf += e->bytes;
    }
    return ret;
}

static int copy_through_memory(Copier *c, const BdrvMapping *src, const BdrvMapping *dst)
{
    int ret = need_buffer(c);
    ret = ret < 0 ? ret : read_mapped(c, src, dst->bytes);
    return ret < 0 ? ret : write_mapped(c, dst);
}

/* Bytes copied, or -errno. */
static int64_t copy_mapped(Copier *c, const BdrvMapping *src, BdrvMapping *dst)
{
    int64_t bytes = dst->bytes;
    int ret = -ENOTSUP;
    if (kernel_is_for(c, &dst->ext[0])) {
        dst->copied = true;
        ret = copy_in_kernel(src, dst);
    }
    if (ret == -ENOTSUP) {
        ret = copy_through_memory(c, src, dst);
    }
    ret = bdrv_map_done(NULL, dst, ret);
    return ret < 0 ? ret : bytes;
}

/* Copies the start of @piece: bytes, or -EAGAIN when requests have to do it. */
static int64_t copy_in_lane(Copier *c, const BdrvCopyExtent *piece)
{
    BdrvMapping src, dst;
    int64_t ret = map_part(c->src, BDRV_MAP_READ, piece->src_offset, piece->bytes, &src);
    if (ret < 0) {
        return ret;
    }
    ret = map_part(c->dst, BDRV_MAP_WRITE, piece->dst_offset, src.bytes, &dst);
    if (ret == 0) {
        ret = copy_mapped(c, &src, &dst);
    }
    (void)bdrv_map_done(NULL, &src, 0);
    return ret;
}

/* --- requests --- */

static int64_t copy_by_requests(Copier *c, const BdrvCopyExtent *piece)
{
    int ret = need_buffer(c);
    if (ret == 0) {
        ret = bdrv_pread(c->src, piece->src_offset, piece->bytes, c->buf, 0);
    }
    if (ret == 0) {
        ret = bdrv_pwrite(c->dst, piece->dst_offset, piece->bytes, c->buf, 0);
    }
    return ret < 0 ? ret : piece->bytes;
}

/* --- entries --- */

static int copy_extent(Copier *c, BdrvCopyExtent rest)
{
    while (rest.bytes > 0) {
        BdrvCopyExtent piece = rest;
        piece.bytes = MIN(rest.bytes, PIECE - rest.dst_offset % PIECE);
        int64_t n = copy_in_lane(c, &piece);
        if (n == -EAGAIN) {
            n = copy_by_requests(c, &piece);
        }
        if (n < 0) {
            return (int)n;
        }
        rest.src_offset += n;
        rest.dst_offset += n;
        rest.bytes -= n;
    }
    return 0;
}

int bdrv_copy_extents(BdrvChild *src, BdrvChild *dst, const BdrvCopyExtent *ext, size_t n,
                      int flags)
{
    Copier c = {.src = src, .dst = dst, .flags = flags, .ahead = ext, .n_ahead = n};
    int ret = 0;
    for (size_t i = 0; i < n; i++) {
        c.buf_size = MAX(c.buf_size, (size_t)MIN(ext[i].bytes, PIECE));
    }
    BDRV_GRAPH_GUARD();
    for (size_t i = 0; ret == 0 && i < n; i++) {
        if (c.n_ahead > 0) {
            c.ahead = &ext[i + 1];
            c.n_ahead = n - i - 1;
        }
        ret = copy_extent(&c, ext[i]);
    }
    free(c.buf);
    return ret;
}

int bdrv_copy_range(BdrvChild *src, int64_t src_offset, BdrvChild *dst, int64_t dst_offset,
                    int64_t bytes)
{
    BdrvCopyExtent ext = {.src_offset = src_offset, .dst_offset = dst_offset, .bytes = bytes};
    return bdrv_copy_extents(src, dst, &ext, 1, 0);
}
