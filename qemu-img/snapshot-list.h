/*
 * The table of internal snapshots that `info` and `snapshot -l` print.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef QEMU_IMG_SNAPSHOT_LIST_H
#define QEMU_IMG_SNAPSHOT_LIST_H

#include <glib.h>
#include <jansson.h>

/* @snapshots: GArray of BdrvSnapshotInfo. Prints nothing when it is empty. */
void img_print_snapshots(const GArray *snapshots);
/* The same from bdrv_image_info()'s "snapshots". */
void img_print_snapshot_facts(const json_t *snapshots);

#endif
