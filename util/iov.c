/*
 * IoVector: the scatter/gather list of a request, and the search for zeroes in buffers.
 *
 *   v ---> iov[0]        iov[1]     iov[2]          niov = 3, size = sum of the lengths
 *          [base,len]    [base,len] [base,len]
 *           |----a----|  |--b--|    |------c------|
 *   0                                             size     offsets count through all elements
 *
 * The array is either the caller's business no more (nalloc > 0: on the heap, freed by destroy) or
 * the one element inside the vector (iov == &local, nalloc == 0), which costs no allocation.
 *
 * Invariants
 *  1. size is the sum of all iov_len and fits size_t; elements of length 0 are never stored.
 *  2. iov == &local holds exactly when niov == 1 and nalloc == 0.  Such a vector must not be copied
 *     by assignment, the copy would point into the original.
 *  3. Offsets given to the copying functions lie inside [0, size].
 *
 * Not done: adjacent elements are not merged, callers count on what they added.
 *
 * SPDX-License-Identifier: MIT
 */
#include "util/iov.h"
#include "util/checked.h"

#include <assert.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

void iov_vector_init(IoVector *v, int capacity_hint)
{
    *v = (IoVector){0};
    if (capacity_hint > 0) {
        v->iov = g_new(struct iovec, (size_t)capacity_hint);
        v->nalloc = capacity_hint;
    }
}

void iov_vector_init_buf(IoVector *v, void *buf, size_t len)
{
    *v = (IoVector){0};
    iov_vector_add(v, buf, len);
}

void iov_vector_destroy(IoVector *v)
{
    if (v->nalloc) {
        g_free(v->iov);
    }
    *v = (IoVector){0};
}

/* Makes room for one more element; a single local element moves to the heap. */
static void reserve_one(IoVector *v)
{
    if (v->niov < v->nalloc) {
        return;
    }
    assert(v->nalloc <= INT_MAX / 2);
    int grown = v->nalloc ? v->nalloc * 2 : 4;
    struct iovec *old = v->nalloc ? v->iov : NULL;
    v->iov = g_renew(struct iovec, old, (size_t)grown);
    if (!old && v->niov) {
        v->iov[0] = v->local;
    }
    v->nalloc = grown;
}

void iov_vector_add(IoVector *v, void *base, size_t len)
{
    if (len == 0) {
        return;
    }
    bool overflow = qb_add_overflow(v->size, len, &v->size);
    assert(!overflow);
    (void)overflow;
    if (v->niov == 0 && v->nalloc == 0) {
        v->iov = &v->local;
    } else {
        reserve_one(v);
    }
    v->iov[v->niov++] = (struct iovec){.iov_base = base, .iov_len = len};
}

/* A place in a vector: the element, and how far into it. */
typedef struct Cursor {
    const struct iovec *iov, *end;
    size_t skip;
} Cursor;

/* The place of @offset, after the check that [offset, offset + len) lies inside. */
static Cursor cursor_at(const IoVector *v, size_t offset, size_t len)
{
    assert(offset <= v->size && len <= v->size - offset);
    (void)len;
    Cursor c = {.iov = v->iov, .end = v->iov + v->niov, .skip = offset};
    while (c.iov < c.end && c.skip >= c.iov->iov_len) {
        c.skip -= c.iov->iov_len;
        c.iov++;
    }
    return c;
}

/* Takes the next piece of at most @len bytes, *len > 0, and moves behind it. */
static struct iovec cursor_next(Cursor *c, size_t len)
{
    assert(c->iov < c->end && c->skip < c->iov->iov_len);
    size_t left = c->iov->iov_len - c->skip;
    struct iovec piece = {
        .iov_base = (char *)c->iov->iov_base + c->skip,
        .iov_len = len < left ? len : left,
    };
    c->skip = 0;
    c->iov++;
    return piece;
}

void iov_vector_concat(IoVector *v, const IoVector *src, size_t offset, size_t len)
{
    assert(v != src);
    Cursor c = cursor_at(src, offset, len);
    while (len > 0) {
        struct iovec piece = cursor_next(&c, len);
        iov_vector_add(v, piece.iov_base, piece.iov_len);
        len -= piece.iov_len;
    }
}

void iov_vector_init_slice(IoVector *v, const IoVector *src, size_t offset, size_t len)
{
    iov_vector_init(v, 0);
    iov_vector_concat(v, src, offset, len);
}

void iov_vector_to_buf(const IoVector *v, size_t offset, void *buf, size_t len)
{
    Cursor c = cursor_at(v, offset, len);
    char *to = buf;
    while (len > 0) {
        struct iovec piece = cursor_next(&c, len);
        memcpy(to, piece.iov_base, piece.iov_len);
        to += piece.iov_len;
        len -= piece.iov_len;
    }
}

void iov_vector_from_buf(const IoVector *v, size_t offset, const void *buf, size_t len)
{
    Cursor c = cursor_at(v, offset, len);
    const char *from = buf;
    while (len > 0) {
        struct iovec piece = cursor_next(&c, len);
        memcpy(piece.iov_base, from, piece.iov_len);
        from += piece.iov_len;
        len -= piece.iov_len;
    }
}

void iov_vector_memset(const IoVector *v, size_t offset, int byte, size_t len)
{
    Cursor c = cursor_at(v, offset, len);
    while (len > 0) {
        struct iovec piece = cursor_next(&c, len);
        memset(piece.iov_base, byte, piece.iov_len);
        len -= piece.iov_len;
    }
}

bool iov_vector_is_zero(const IoVector *v, size_t offset, size_t len)
{
    Cursor c = cursor_at(v, offset, len);
    while (len > 0) {
        struct iovec piece = cursor_next(&c, len);
        if (!qb_buffer_is_zero(piece.iov_base, piece.iov_len)) {
            return false;
        }
        len -= piece.iov_len;
    }
    return true;
}

bool iov_vector_is_aligned(const IoVector *v, size_t align)
{
    assert(qb_is_power_of_2(align));
    for (int i = 0; i < v->niov; i++) {
        if (!qb_is_aligned((uintptr_t)v->iov[i].iov_base | v->iov[i].iov_len, align)) {
            return false;
        }
    }
    return true;
}

/* Four 64-bit lanes at any address: two registers with SSE2 and NEON, one with AVX2. */
typedef uint64_t Lanes __attribute__((vector_size(32), aligned(1), may_alias));

#define BLOCK_LANES 8
#define BLOCK_BYTES (BLOCK_LANES * sizeof(Lanes))

/* One test per 256 bytes keeps the loop at the speed of its loads. */
static inline bool block_is_zero(const char *p)
{
    const Lanes *l = (const Lanes *)p;
    Lanes any = ((l[0] | l[1]) | (l[2] | l[3])) | ((l[4] | l[5]) | (l[6] | l[7]));
    return (any[0] | any[1] | any[2] | any[3]) == 0;
}

static bool few_bytes_are_zero(const char *p, size_t len)
{
    uint64_t any = 0, word;
    for (; len >= sizeof(word); p += sizeof(word), len -= sizeof(word)) {
        memcpy(&word, p, sizeof(word));
        any |= word;
    }
    for (; len > 0; p++, len--) {
        any |= (unsigned char)*p;
    }
    return any == 0;
}

bool qb_buffer_is_zero(const void *buf, size_t len)
{
    const char *p = buf;
    if (len < BLOCK_BYTES) {
        return few_bytes_are_zero(p, len);
    }
    const char *last = p + len - BLOCK_BYTES;
    /* Data that starts with zeroes mostly does not end with them. The last block may overlap the
     * one before it, which spares the loop a remainder. */
    if (!block_is_zero(last)) {
        return false;
    }
    for (; p < last; p += BLOCK_BYTES) {
        if (!block_is_zero(p)) {
            return false;
        }
    }
    return true;
}

void *qb_try_memalign(size_t align, size_t size)
{
    void *p;
    size_t at_least = align < sizeof(void *) ? sizeof(void *) : align;
    assert(qb_is_power_of_2(at_least));
    return posix_memalign(&p, at_least, size ? size : 1) == 0 ? p : NULL;
}

void qb_free_cleanup(void *p)
{
    free(*(void **)p);
}
