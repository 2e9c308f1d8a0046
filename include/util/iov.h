/*
 * IoVector: the scatter/gather list of a request.
 *
 * An IoVector does not own the memory it points to.  It owns its iovec array; a single element
 * may be embedded in the vector itself, so a vector must not be copied by assignment (use a
 * slice).  Any number of threads may read one vector; changing it is for one thread alone.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef QB_UTIL_IOV_H
#define QB_UTIL_IOV_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#pragma GCC visibility push(default) /* public: exported by libqblock */

typedef struct IoVector {
    struct iovec *iov;
    int niov;
    size_t size;        /* sum of all iov_len */
    int nalloc;         /* capacity of iov, 0 when it is local */
    struct iovec local; /* used by iov_vector_init_buf() */
} IoVector;

/* An empty vector; no allocation happens for the first @capacity_hint elements added to it. */
void iov_vector_init(IoVector *v, int capacity_hint);
/* A vector of the one element @buf, without an allocation. */
void iov_vector_init_buf(IoVector *v, void *buf, size_t len);
/* Appends an element; one of length 0 is left out. The sum of lengths must fit size_t. */
void iov_vector_add(IoVector *v, void *base, size_t len);
/* Appends the part [offset, offset + len) of @src. */
void iov_vector_concat(IoVector *v, const IoVector *src, size_t offset, size_t len);
/* Makes @v (uninitialised) a view of the part [offset, offset + len) of @src. */
void iov_vector_init_slice(IoVector *v, const IoVector *src, size_t offset, size_t len);
/* Leaves an empty vector; the memory pointed to is untouched. */
void iov_vector_destroy(IoVector *v);

/* Copies between a flat buffer and [offset, offset + len); both sides must be large enough. */
void iov_vector_to_buf(const IoVector *v, size_t offset, void *buf, size_t len);
void iov_vector_from_buf(const IoVector *v, size_t offset, const void *buf, size_t len);
/* Sets, or looks for bytes other than 0 in, [offset, offset + len), which must lie inside @v. */
void iov_vector_memset(const IoVector *v, size_t offset, int byte, size_t len);
bool iov_vector_is_zero(const IoVector *v, size_t offset, size_t len);
/* True when every element's base and length is a multiple of @align (power of two). */
bool iov_vector_is_aligned(const IoVector *v, size_t align);
static inline void iov_vector_cleanup(IoVector *v)
{
    iov_vector_destroy(v);
}
#define IOV_VECTOR_AUTO __attribute__((cleanup(iov_vector_cleanup))) IoVector

/* True when @len bytes at @buf are all zero; as fast as memory allows. */
bool qb_buffer_is_zero(const void *buf, size_t len);

/* Aligned memory that may fail: NULL when there is none. Free with free(). */
void *qb_try_memalign(size_t align, size_t size);
/* For QB_AUTO_FREE: frees the pointer that @p points to, when the variable goes out of scope. */
void qb_free_cleanup(void *p);
#define QB_AUTO_FREE __attribute__((cleanup(qb_free_cleanup)))

#pragma GCC visibility pop

#endif
