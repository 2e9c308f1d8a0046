/*
 * qcow2 on disk: offsets, bits and limits.  docs/interop/qcow2.md tells what they mean.
 *
 *   off  size field                     off  size field
 *     0     4 magic "QFI\xfb"            56     4 refcount table clusters
 *     4     4 version                    60     4 number of snapshots
 *     8     8 backing name offset        64     8 snapshot table offset
 *    16     4 backing name length        72     8 incompatible features   (version 3 from here)
 *    20     4 cluster bits               80     8 compatible features
 *    24     8 virtual size               88     8 autoclear features
 *    32     4 crypt method               96     4 refcount order
 *    36     4 L1 entries                100     4 header length
 *    40     8 L1 offset                 104     1 compression type
 *    48     8 refcount table offset     105     7 padding
 *
 * All integers are big-endian.  Bytes 8..111 lie in one 512-byte sector (invariant 5).
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_QCOW2_FORMAT_H
#define BLOCK_QCOW2_FORMAT_H

#include <stdint.h>

#define QCOW2_MAGIC 0x514649FBu

enum {
    QCOW2_HDR_MAGIC = 0,
    QCOW2_HDR_VERSION = 4,
    QCOW2_HDR_BACKING_OFFSET = 8,
    QCOW2_HDR_BACKING_SIZE = 16,
    QCOW2_HDR_CLUSTER_BITS = 20,
    QCOW2_HDR_SIZE = 24,
    QCOW2_HDR_CRYPT = 32,
    QCOW2_HDR_L1_SIZE = 36,
    QCOW2_HDR_L1_OFFSET = 40,
    QCOW2_HDR_REFTABLE_OFFSET = 48,
    QCOW2_HDR_REFTABLE_CLUSTERS = 56,
    QCOW2_HDR_NB_SNAPSHOTS = 60,
    QCOW2_HDR_SNAPSHOTS_OFFSET = 64,
    QCOW2_HDR_V2_LENGTH = 72,
    QCOW2_HDR_INCOMPATIBLE = 72,
    QCOW2_HDR_COMPATIBLE = 80,
    QCOW2_HDR_AUTOCLEAR = 88,
    QCOW2_HDR_REFCOUNT_ORDER = 96,
    QCOW2_HDR_HEADER_LENGTH = 100,
    QCOW2_HDR_V3_MIN_LENGTH = 104,
    QCOW2_HDR_COMPRESSION = 104,
    QCOW2_HDR_V3_LENGTH = 112,
};

#define QCOW2_INCOMPAT_DIRTY (UINT64_C(1) << 0)
#define QCOW2_INCOMPAT_CORRUPT (UINT64_C(1) << 1)
#define QCOW2_INCOMPAT_DATA_FILE (UINT64_C(1) << 2)
#define QCOW2_INCOMPAT_COMPRESSION (UINT64_C(1) << 3)
#define QCOW2_INCOMPAT_EXTL2 (UINT64_C(1) << 4)
#define QCOW2_INCOMPAT_KNOWN UINT64_C(0x1f)
#define QCOW2_COMPAT_LAZY_REFCOUNTS (UINT64_C(1) << 0)
#define QCOW2_AUTOCLEAR_BITMAPS (UINT64_C(1) << 0)
#define QCOW2_AUTOCLEAR_DATA_FILE_RAW (UINT64_C(1) << 1)

#define QCOW2_EXT_END 0u
#define QCOW2_EXT_BACKING_FORMAT 0xE2792ACAu
#define QCOW2_EXT_FEATURE_TABLE 0x6803F857u
#define QCOW2_EXT_BITMAPS 0x23852875u
#define QCOW2_EXT_CRYPTO 0x0537BE77u
#define QCOW2_EXT_DATA_FILE 0x44415441u

#define QCOW2_CRYPT_NONE 0
#define QCOW2_CRYPT_AES 1
#define QCOW2_CRYPT_LUKS 2

#define QCOW2_COMPRESSION_ZLIB 0
#define QCOW2_COMPRESSION_ZSTD 1

#define QCOW2_MIN_CLUSTER_BITS 9
#define QCOW2_MAX_CLUSTER_BITS 21
#define QCOW2_MAX_L1_BYTES (32u << 20)
#define QCOW2_MAX_REFTABLE_BYTES (8u << 20)
#define QCOW2_MAX_SNAPSHOTS 65536u
#define QCOW2_MAX_SNAPSHOT_TABLE_BYTES (64u << 20)
#define QCOW2_MAX_SNAPSHOT_EXTRA 1024u
#define QCOW2_SNAPSHOT_EXTRA_V3 16u    /* VM state size, disk size: version 3 demands them */
#define QCOW2_SNAPSHOT_EXTRA_KNOWN 24u /* and the instruction count; what new entries have */
#define QCOW2_MAX_BACKING_NAME 1023u
#define QCOW2_MAX_BACKING_FORMAT 15u
#define QCOW2_MAX_BITMAPS 65535u
#define QCOW2_MAX_BITMAP_DIRECTORY_BYTES (1024u * QCOW2_MAX_BITMAPS)
#define QCOW2_FEATURE_ENTRY_BYTES 48u
#define QCOW2_HDR_SECTOR 512u /* the fixed fields lie in it and change in one write */
#define QCOW2_MAX_HOST_OFFSET ((UINT64_C(1) << 56) - 1)

/* L1 and L2 entries. */
#define QCOW2_ENTRY_OFFSET_MASK UINT64_C(0x00fffffffffffe00)
#define QCOW2_L1_RESERVED_MASK UINT64_C(0x7f000000000001ff)
#define QCOW2_L2_STD_RESERVED_MASK UINT64_C(0x3f000000000001fe)
#define QCOW2_ENTRY_COPIED (UINT64_C(1) << 63)
#define QCOW2_ENTRY_COMPRESSED (UINT64_C(1) << 62)
#define QCOW2_ENTRY_ZERO (UINT64_C(1) << 0)

#define QCOW2_REFTABLE_OFFSET_MASK UINT64_C(0xfffffffffffffe00)
#define QCOW2_REFTABLE_RESERVED_MASK UINT64_C(0x1ff)

/* The bitmaps extension: count, reserved, bytes and place of the directory. */
enum {
    QCOW2_BITMAP_EXT_DIR_BYTES = 8,
    QCOW2_BITMAP_EXT_DIR_OFFSET = 16,
    QCOW2_BITMAP_EXT_LENGTH = 24,
};
/* An entry of the bitmap directory: the fixed part; extra data and the name follow, padded to 8. */
enum {
    QCOW2_BITMAP_TABLE_OFFSET = 0,
    QCOW2_BITMAP_TABLE_ENTRIES = 8,
    QCOW2_BITMAP_FLAGS = 12,
    QCOW2_BITMAP_TYPE = 16,
    QCOW2_BITMAP_GRANULARITY_BITS = 17,
    QCOW2_BITMAP_NAME_LENGTH = 18,
    QCOW2_BITMAP_EXTRA_LENGTH = 20,
    QCOW2_BITMAP_FIXED = 24,
};
#define QCOW2_BITMAP_IN_USE (1u << 0)
#define QCOW2_BITMAP_AUTO (1u << 1)
#define QCOW2_BITMAP_TYPE_DIRTY 1
#define QCOW2_MIN_GRANULARITY_BITS 9
#define QCOW2_MAX_GRANULARITY_BITS 31
#define QCOW2_MAX_BITMAP_NAME 1023u
#define QCOW2_MAX_BITMAP_BYTES (UINT64_C(512) << 20) /* of data */
/* An entry of a bitmap table: 0, or 1 without a cluster: all bits set. */
#define QCOW2_BITMAP_ENTRY_OFFSET_MASK UINT64_C(0x00fffffffffffe00)
#define QCOW2_BITMAP_ENTRY_RESERVED_MASK UINT64_C(0xff000000000001fe)
#define QCOW2_BITMAP_ENTRY_ALL_ONES UINT64_C(1)

#define QCOW2_SUBCLUSTERS 32 /* per cluster with extended L2 */

#endif
