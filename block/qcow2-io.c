/*
 * Guest requests: the driver's entries for reads and writes, and VM state.
 *
 *   gate           in qcow2.c: before the first change of a session the header is made fit for it
 *   entry          refuse on a node marked corrupt, or encrypted
 *   body           qcow2-read.c, qcow2-cow.c
 *   FUA            a shared flush: its barrier covers the data, its second one the entries
 *
 * VM state lies in the guest's address space behind the disk, at the next multiple of what one L1
 * entry covers; L1 grows to reach it.  Saving holds the whole node, so its writes need no order of
 * their own.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-io-int.h"

static Qcow2Io guest_io(BlockDriverState *bs, BdrvRequest *req, uint64_t offset, IoVector *qiov,
                        size_t qiov_offset)
{
    return (Qcow2Io){
        .bs = bs, .s = qcow2_state(bs), .req = req, .qiov = qiov, .qiov_offset = qiov_offset,
        .base = offset,
    };
}

/* A node marked corrupt takes no requests, an encrypted one none that needs the key. */
static int refuse_data(BlockDriverState *bs)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    if (atomic_load(&s->corrupt)) {
        return -ENOMEDIUM;
    }
    return s->crypt_method ? -EACCES : 0;
}

/* What is found out under a lock is marked in the header here, where I/O is allowed. */
static int finish_request(BlockDriverState *bs, int ret)
{
    if (ret < 0 && atomic_load(&qcow2_state(bs)->corrupt_unsaved)) {
        (void)qcow2_corrupt_save(bs); /* the request has its error already */
    }
    return ret;
}

int qcow2_preadv(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                 IoVector *qiov, size_t qiov_offset, int flags)
{
    Qcow2Io io = guest_io(bs, NULL, (uint64_t)offset, qiov, qiov_offset);
    int ret = refuse_data(bs);
    if (ret == 0) {
        ret = qcow2_read_guest(&io, (uint64_t)offset, (uint64_t)bytes);
    }
    return finish_request(bs, ret);
}

int qcow2_pwritev(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                  IoVector *qiov, size_t qiov_offset, int flags)
{
    Qcow2Io io = guest_io(bs, req, (uint64_t)offset, qiov, qiov_offset);
    int ret = refuse_data(bs);
    if (ret == 0) {
        ret = qcow2_write_guest(&io, (uint64_t)offset, (uint64_t)bytes);
    }
    if (ret == 0 && (flags & BDRV_REQ_FUA)) {
        ret = qcow2_flush(bs);
    }
    return finish_request(bs, ret);
}

/* --- VM state --- */

/* Where [pos, +bytes) of the VM state lies in the guest's address space. */
static int vmstate_range(BlockDriverState *bs, int64_t pos, uint64_t bytes, uint64_t *ret_start,
                         uint64_t *ret_end)
{
    int64_t length = bdrv_getlength(bs);
    if (length < 0) {
        return (int)length;
    }
    uint64_t start = qcow2_vm_state_offset(qcow2_state(bs), (uint64_t)length);
    if (pos < 0 || qb_add_overflow(start, (uint64_t)pos, &start)
        || qb_add_overflow(start, bytes, ret_end) || *ret_end > INT64_MAX) {
        return -EFBIG;
    }
    *ret_start = start;
    return 0;
}

int qcow2_save_vmstate(BlockDriverState *bs, IoVector *qiov, int64_t pos)
{
    BDRVQcow2State *s = qcow2_state(bs);
    uint64_t start = 0, end = 0;
    int ret = refuse_data(bs);
    if (ret == 0) {
        ret = vmstate_range(bs, pos, qiov->size, &start, &end);
    }
    if (ret == 0 && qcow2_size_to_l1(s, end) > qcow2_l1_size(s)) {
        ret = qcow2_l1_grow(bs, qcow2_size_to_l1(s, end), false);
    }
    if (ret < 0) {
        return finish_request(bs, ret);
    }
    bdrv_debug_event(bs->file, "vmstate_save");
    Qcow2Io io = guest_io(bs, NULL, start, qiov, 0);
    return finish_request(bs, qcow2_write_guest(&io, start, qiov->size));
}

int qcow2_load_vmstate(BlockDriverState *bs, IoVector *qiov, int64_t pos)
{
    uint64_t start = 0, end = 0;
    int ret = refuse_data(bs);
    if (ret == 0) {
        ret = vmstate_range(bs, pos, qiov->size, &start, &end);
    }
    if (ret < 0) {
        return ret;
    }
    bdrv_debug_event(bs->file, "vmstate_load");
    Qcow2Io io = guest_io(bs, NULL, start, qiov, 0);
    return finish_request(bs, qcow2_read_guest(&io, start, qiov->size));
}
