/*
 * Amending: what the steps share.
 *
 * All of them run with the whole node in the range lock and drained; so the state's numbers that
 * are constant otherwise (version, refcount width) may change.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_QCOW2_AMEND_H
#define BLOCK_QCOW2_AMEND_H

#include "block/qcow2.h"
#include "util/progress.h"

/* False and ECANCELED when somebody asked to stop. @progress may be NULL. */
bool qcow2_amend_go_on(QbProgress *progress, GError **errp);

/* qcow2-amend-width.c: changes the width of refcounts to 1 << @order bits (version 3, or 4). Overflow
 * is found before the first change; a failure leaves the old structure. */
bool qcow2_amend_width(BlockDriverState *bs, unsigned order, QbProgress *progress, GError **errp);

/* qcow2-amend-version.c */
/* Version 2 to 3. */
bool qcow2_upgrade(BlockDriverState *bs, GError **errp);
/* May the version 3 image, once its disk is @size bytes long and its refcounts have 16 bits, become
 * version 2? Reads only. */
bool qcow2_may_downgrade(BlockDriverState *bs, uint64_t size, GError **errp);
/* Version 3 to 2: zero clusters become zeroes or go, then the header changes. A failure, or a stop,
 * leaves version 3, some zero clusters having been expanded. */
bool qcow2_downgrade(BlockDriverState *bs, QbProgress *progress, GError **errp);

#endif
