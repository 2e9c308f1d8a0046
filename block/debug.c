/*
 * Debug events: points in the code where a test may make requests fail or stop.
 *
 * A format driver names what it is about to do to a child ("l2_update"), the core names steps of
 * its own ("pwritev_rmw_head").  Only the blkdebug driver listens; everywhere else an event costs a
 * look at one pointer.  Breakpoints are set by a user of the topmost node and land on the first
 * listening node below it.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/io-int.h"

void bdrv_node_debug_event(BlockDriverState *bs, const char *event)
{
    if (bs->drv->debug_event) {
        bs->drv->debug_event(bs, event);
    }
}

void bdrv_debug_event(BdrvChild *child, const char *event)
{
    if (child) {
        bdrv_node_debug_event(child->bs, event);
    }
}

/* The first node from @bs down along the files that has breakpoints, or NULL. */
static BlockDriverState *listener_below(BlockDriverState *bs)
{
    while (bs && !bs->drv->debug_breakpoint) {
        bs = bs->file ? bs->file->bs : NULL;
    }
    return bs;
}

int bdrv_debug_breakpoint(BlockDriverState *bs, const char *event, const char *tag)
{
    BDRV_GRAPH_GUARD();
    BlockDriverState *listener = listener_below(bs);
    return listener ? listener->drv->debug_breakpoint(listener, event, tag) : -ENOTSUP;
}

int bdrv_debug_remove_breakpoint(BlockDriverState *bs, const char *tag)
{
    BDRV_GRAPH_GUARD();
    BlockDriverState *listener = listener_below(bs);
    return listener ? listener->drv->debug_remove_breakpoint(listener, tag) : -ENOTSUP;
}

int bdrv_debug_resume(BlockDriverState *bs, const char *tag)
{
    BDRV_GRAPH_GUARD();
    BlockDriverState *listener = listener_below(bs);
    return listener ? listener->drv->debug_resume(listener, tag) : -ENOTSUP;
}

bool bdrv_debug_is_suspended(BlockDriverState *bs, const char *tag)
{
    BDRV_GRAPH_GUARD();
    BlockDriverState *listener = listener_below(bs);
    return listener && listener->drv->debug_is_suspended(listener, tag);
}
