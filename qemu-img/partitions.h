/*
 * Partition tables of a disk, as far as a shrink has to know them.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef QEMU_IMG_PARTITIONS_H
#define QEMU_IMG_PARTITIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <glib.h>

typedef struct ImgPartition {
    unsigned number;     /* from 1 on, the place in the table */
    uint64_t start, end; /* bytes of the disk; end excluded and not beyond the disk's end */
} ImgPartition;

typedef struct ImgPartitionTable {
    const char *type;       /* "gpt", "mbr"; NULL: none that makes sense, all else is empty */
    unsigned sector_size;
    GArray *partitions;     /* ImgPartition, by number */
    uint64_t last_end;      /* where the last partition ends; 0: there is none */
    uint64_t minimum_size;  /* of a disk that holds the partitions and, with GPT, a backup table */
    bool has_backup;        /* GPT: its backup header lies on the disk, and ends at ... */
    uint64_t backup_end;
} ImgPartitionTable;

/* Reads [offset, +bytes) of the disk, which lies inside it. 0 or -errno. */
typedef int (*ImgReadFn)(void *opaque, uint64_t offset, size_t bytes, void *buf);

/* Looks for a table on a disk of @disk_bytes. Nothing on the disk is trusted. 0, also when there is no
 * table, or -errno of a read. *ret is to be cleared in any case. */
int img_partitions_read(ImgReadFn read, void *opaque, uint64_t disk_bytes, ImgPartitionTable *ret);
void img_partitions_clear(ImgPartitionTable *table);
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(ImgPartitionTable, img_partitions_clear)

#endif
