/*
 * What a new image shall be: shared by those who make one (qcow2-create.c), those who only
 * reckon what it would take (qcow2-measure.c), and those who change one (qcow2-amend.c).
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_QCOW2_CREATE_H
#define BLOCK_QCOW2_CREATE_H

#include "block/qcow2.h"

typedef struct Qcow2CreateArgs {
    int version;
    uint64_t size, cluster_size, refcount_bits;
    bool extended_l2, lazy_refcounts, data_file_raw;
    int prealloc;    /* PreallocMode */
    int compression; /* QCOW2_COMPRESSION_* */
    char *backing_file, *backing_fmt, *data_file;
} Qcow2CreateArgs;

/* Pure: 2 or 3 for "0.10", "v2", "1.1", "v3"; else 0. */
int qcow2_version_by_name(const char *name);
/* Frees the strings. */
void qcow2_create_args_clear(Qcow2CreateArgs *a);
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Qcow2CreateArgs, qcow2_create_args_clear)

/* Takes what the format knows out of @options ("size" must be there) into the zeroed @a, and judges
 * whether it fits together.  Touches no file; *a is to be cleared also on failure. */
bool qcow2_create_args_take(json_t *options, Qcow2CreateArgs *a, GError **errp);

/* Pure: L2 tables that map the whole disk, which is as many as L1 has entries. */
uint64_t qcow2_new_l2_tables(const Qcow2CreateArgs *a);
/* Pure: refcount blocks, and clusters of the refcount table, that count @others clusters (at most
 * 2^55) and themselves; at least one of each. */
void qcow2_settle_refcounts(const Qcow2CreateArgs *a, uint64_t others, uint64_t *ret_blocks,
                            uint64_t *ret_table);

#endif
