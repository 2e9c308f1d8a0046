/*
 * Operations on stored dirty bitmaps, each with guest writes around it, since these are what
 * bitmaps are about.
 *
 *      before      b0 enabled, b1 disabled, b2 IN_USE       (world.c)
 *
 * Whoever finds a bitmap IN_USE after a crash removes it and begins anew; so do these when they are
 * run again.
 *
 * SPDX-License-Identifier: MIT
 */
#include "tests/harness/operations-int.h"

#include "block/dirty-bitmap.h"

/* Opens the image; of the bitmaps that an interrupted run has left IN_USE new ones are made. */
static bool begin(World *w)
{
    bool ok = world_open(w);
    for (BitmapId id = BITMAP_ENABLED; ok && id <= BITMAP_DISABLED; id++) {
        if (bitmap_is_listed(w->blk, id) && !bitmap_is_usable(w->blk, id)) {
            ok = world_bitmap(w, BITMAP_REMOVE, id, 0) && world_bitmap(w, BITMAP_ADD, id, 0);
        }
    }
    return ok;
}

static void write_some(World *w, unsigned n)
{
    world_write(w, operation_group(w, n) + w->kind->cluster / 2, w->kind->cluster);
}

/* Closes it, if it is open. Returns @ok when that went well, too. */
static bool end(World *w, bool ok)
{
    return w->blk && world_close(w) && ok;
}

/* One change of one bitmap between two writes. */
static bool change(World *w, BitmapChange what, BitmapId id, BitmapId from)
{
    bool ok = begin(w);
    if (ok) {
        write_some(w, 3);
        ok = world_bitmap(w, what, id, from);
        write_some(w, 5);
    }
    return end(w, ok);
}

/* What is there already from a run that was interrupted goes away first. */
bool run_bitmap_add(World *w)
{
    bool ok = begin(w);
    if (ok && bitmap_is_listed(w->blk, BITMAP_NEW)) {
        ok = world_bitmap(w, BITMAP_REMOVE, BITMAP_NEW, 0);
    }
    if (ok) {
        write_some(w, 3);
        ok = world_bitmap(w, BITMAP_ADD, BITMAP_NEW, 0);
        write_some(w, 5);
    }
    return end(w, ok);
}

static bool remove_bitmap(World *w, BitmapId id)
{
    bool ok = begin(w);
    if (ok) {
        write_some(w, 3);
        ok = !bitmap_is_listed(w->blk, id) || world_bitmap(w, BITMAP_REMOVE, id, 0);
        write_some(w, 5);
    }
    return end(w, ok);
}

bool run_bitmap_remove(World *w)
{
    return remove_bitmap(w, BITMAP_ENABLED);
}

bool run_bitmap_remove_broken(World *w)
{
    return remove_bitmap(w, BITMAP_BROKEN);
}

bool run_bitmap_clear(World *w)
{
    return change(w, BITMAP_CLEAR, BITMAP_ENABLED, 0);
}

bool run_bitmap_enable(World *w)
{
    return change(w, BITMAP_ENABLE, BITMAP_DISABLED, 0);
}

bool run_bitmap_disable(World *w)
{
    return change(w, BITMAP_DISABLE, BITMAP_ENABLED, 0);
}

bool run_bitmap_merge(World *w)
{
    return change(w, BITMAP_MERGE, BITMAP_ENABLED, BITMAP_DISABLED);
}

/* Bitmaps are stored in the middle of things: afterwards a session begins again. */
bool run_bitmap_session(World *w)
{
    bool ok = begin(w);
    for (unsigned i = 0; ok && i < 3; i++) {
        GError *err = NULL;
        write_some(w, 2 * i);
        world_write(w, w->kind->sectors - 1 - i, 1);
        ok = bdrv_store_bitmaps(blk_bs(w->blk), &err);
        world_note(w, ok, "store", err);
    }
    return end(w, ok);
}

static bool add_new(World *w)
{
    GError *err = NULL;
    bool ok = bdrv_bitmap_add(blk_bs(w->blk), bitmap_name(BITMAP_NEW), 0, true, false, &err);
    return world_note(w, ok, "add", err);
}

static bool remove_new(World *w)
{
    GError *err = NULL;
    bool ok = bdrv_bitmap_remove(blk_bs(w->blk), bitmap_name(BITMAP_NEW), &err);
    return world_note(w, ok, "remove", err);
}

/* An image that had none gets one, and loses it: the header's extensions grow to where the name of
 * the base lies, and shrink. */
bool run_bitmap_first(World *w)
{
    bool ok = world_open(w);
    if (ok && bitmap_is_listed(w->blk, BITMAP_NEW)) {
        ok = remove_new(w);
    }
    ok = ok && add_new(w);
    if (ok) {
        write_some(w, 3);
        ok = remove_new(w);
    }
    return end(w, ok);
}
