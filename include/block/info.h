/*
 * What an image is, as facts (JSON) in the order in which the field's tools print them.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_INFO_H
#define BLOCK_INFO_H

#include "block/block.h"

#pragma GCC visibility push(default) /* public: exported by libqblock */

/*
 * Facts of @bs and of the nodes that hold it ("children"), without its backing chain: filename,
 * format, virtual-size, actual-size, cluster-size, snapshots, backing names, format-specific, ...
 * Absent facts are left out.  @limits adds "limits".  New reference; NULL and error when the node
 * cannot answer.  Reads metadata; any thread.
 */
json_t *bdrv_image_info(BlockDriverState *bs, bool limits, GError **errp);

#pragma GCC visibility pop

#endif
