/*
 * The entries for guest requests in the driver's table: see BlockDriver (include/block/driver.h).
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_QCOW2_REQUESTS_H
#define BLOCK_QCOW2_REQUESTS_H

#include "block/driver.h"

int qcow2_preadv(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                 IoVector *qiov, size_t qiov_offset, int flags);
int qcow2_pwritev(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                  IoVector *qiov, size_t qiov_offset, int flags);
int qcow2_pwritev_compressed(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                             IoVector *qiov, size_t qiov_offset);
int qcow2_pwrite_zeroes(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                        int flags);
int qcow2_pdiscard(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes);
int qcow2_block_status(BlockDriverState *bs, int64_t offset, int64_t bytes, BdrvStatus *ret);
int qcow2_find_allocated(BlockDriverState *bs, int64_t offset, int64_t bytes, GArray *ranges);
int qcow2_save_vmstate(BlockDriverState *bs, IoVector *qiov, int64_t pos);
int qcow2_load_vmstate(BlockDriverState *bs, IoVector *qiov, int64_t pos);
int qcow2_map(BlockDriverState *bs, BlkQueue *queue, BdrvMapIntent intent, int64_t offset,
              int64_t bytes, BdrvMapping *mapping);
int qcow2_map_done(BlockDriverState *bs, BlkQueue *queue, BdrvMapping *mapping, int result);

#endif
