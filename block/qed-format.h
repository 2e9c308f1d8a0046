/*
 * The QED image format on disk: offsets and constants.  Everything is little-endian.
 *
 *     cluster 0 .. header_size-1   header, backing file name
 *     l1_table_offset              L1: table_size clusters of 8-byte entries, always there
 *     anywhere behind the header   L2 tables, as long as the L1; data clusters
 *
 * Header, from file offset 0:
 *
 *     0  u32 magic            16 u64 features           40 u64 l1_table_offset
 *     4  u32 cluster_size     24 u64 compat_features    48 u64 image_size
 *     8  u32 table_size       32 u64 autoclear_features 56 u32 backing_filename_offset
 *     12 u32 header_size                                60 u32 backing_filename_size
 *
 * An L1 entry is 0 or the offset of an L2 table; an L2 entry is 0 (nothing here), 1 (zeroes), or
 * the offset of a data cluster.  Offsets are multiples of the cluster size.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_QED_FORMAT_H
#define BLOCK_QED_FORMAT_H

#define QED_MAGIC 0x00444551u

#define QED_HEADER_BYTES 64
#define QED_HEADER_SECTOR 512 /* what changes in one write */

#define QED_F_BACKING_FILE (UINT64_C(1) << 0)
#define QED_F_NEED_CHECK (UINT64_C(1) << 1)
#define QED_F_BACKING_NO_PROBE (UINT64_C(1) << 2) /* the backing file is raw */
#define QED_F_KNOWN (QED_F_BACKING_FILE | QED_F_NEED_CHECK | QED_F_BACKING_NO_PROBE)

#define QED_MIN_CLUSTER_SIZE 4096u
#define QED_MAX_CLUSTER_SIZE (64u << 20)
#define QED_DEFAULT_CLUSTER_SIZE 65536u
#define QED_MIN_TABLE_SIZE 1u
#define QED_MAX_TABLE_SIZE 16u
#define QED_DEFAULT_TABLE_SIZE 4u
#define QED_MAX_BACKING_NAME 4095u

#define QED_ENTRY_BYTES 8u
#define QED_ENTRY_NONE UINT64_C(0)
#define QED_ENTRY_ZERO UINT64_C(1)

#endif
