/*
 * What the files that carry requests out tell one another: request.c, io*.c, drain.c.
 *
 *   io.c         bdrv_preadv() ...     any alignment, checked, tracked
 *     io-align.c                       pads to the node's alignment, read-modify-write
 *     io-cor.c   io-zero.c             what a read or write may turn into
 *       io-driver.c                    end of the node, splits, bounce buffers; calls the driver
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_IO_INT_H
#define BLOCK_IO_INT_H

#include "block/core-int.h"
#include "util/checked.h"

/* One transfer, or one run of zeroes (no vector then), on its way to a driver. Passed on by value
 * with the range changed; the memory behind it belongs to whoever began the request. */
typedef struct BdrvTransfer {
    BlockDriverState *bs;
    BdrvRequest *req;
    int64_t offset, bytes;
    IoVector *qiov;
    size_t qiov_offset;
    int flags; /* BdrvRequestFlags */
} BdrvTransfer;

/* --- request.c --- */
/* Counts @req on @bs and, unless it reads, draws its ticket. Graph lock held shared. */
void bdrv_request_begin(BdrvRequest *req, BlockDriverState *bs, BdrvRequestType type,
                        int64_t offset, int64_t bytes);
/* Waits for the serialising requests in the way; then it runs as a plain one. */
void bdrv_request_enter(BdrvRequest *req);
/* Makes @req serialising for its range rounded out to what the node's driver may want to change as
 * one. @wait_plain: and waits for the plain requests there. */
void bdrv_request_enter_serialising(BdrvRequest *req, bool wait_plain);
void bdrv_request_end(BdrvRequest *req);
/* @to becomes @req, a write that has entered and changed nothing, as it was when it began with
 * [offset, +bytes); @req ends. */
void bdrv_request_hand_over(BdrvRequest *req, BdrvRequest *to, int64_t offset, int64_t bytes);
/* The unit that serialising ranges of @bs are rounded to, a power of two. */
uint32_t bdrv_serialising_unit(const BlockDriverState *bs);

/* --- io-driver.c: ranges are multiples of request_alignment --- */
/* Reads; what lies beyond the end of the node becomes zeroes. */
int bdrv_aligned_preadv(const BdrvTransfer *t);
/* Writes; FUA is honoured, one way or the other. */
int bdrv_aligned_pwritev(const BdrvTransfer *t);
/* Only hands the data to the driver: no events, no look for zeroes, no flush for FUA. */
int bdrv_write_pieces(const BdrvTransfer *t);
/* A write up to @end has succeeded. */
void bdrv_raise_length(BlockDriverState *bs, int64_t end);
/* @max (0: none) as a number of bytes that is a multiple of @align, at least @align. */
int64_t bdrv_limit_aligned(int64_t max, uint32_t align);

/* --- io-align.c: ranges of any alignment, entered --- */
bool bdrv_transfer_is_aligned(const BdrvTransfer *t);
int bdrv_padded_preadv(const BdrvTransfer *t);
/* Where @t is not aligned its request must have entered serialising, waiting for plain ones. */
int bdrv_padded_pwritev(const BdrvTransfer *t);

/* --- io-zero.c --- */
/* Writes zeroes over a range of any alignment; rules of bdrv_padded_pwritev(). */
int bdrv_do_pwrite_zeroes(const BdrvTransfer *t);
/* Discards what the driver can of a range of any alignment inside the node. */
int bdrv_do_pdiscard(const BdrvTransfer *t);
/* The data of @t are all zero and the node wants to know. */
bool bdrv_detects_zeroes(const BdrvTransfer *t);

/* --- io-cor.c --- */
/* A read that leaves what it read in the node. @t->req has not entered anything. */
int bdrv_copy_on_read(const BdrvTransfer *t);

/* --- drain.c --- */
/* The last request of a node that is being drained has left. */
void bdrv_drain_wake(void);

/* --- debug.c --- */
/* The event happens at @bs itself. */
void bdrv_node_debug_event(BlockDriverState *bs, const char *event);

#endif
