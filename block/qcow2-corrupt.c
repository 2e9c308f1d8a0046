/*
 * Damage found at run time.
 *
 *     found --> was the node writable and is it fatal?
 *                 no:  say it once, fail the request
 *                 yes: s->corrupt (all further I/O fails), say it, set the corrupt bit (version 3)
 *
 * Invariants
 *  1. The first fatal finding wins: it is said, its place in this source is kept for a debugger,
 *     the bit is written once.
 *  2. A thread that holds the metadata or the alloc lock must not do I/O: the bit stays owed
 *     (corrupt_unsaved) and is written by the next caller without locks, at the latest by close.
 *  3. An image opened for check is never marked from here: check looks at all damage, reports each
 *     finding itself and sets or clears the bit at its end.
 *
 * Not done: version 2 has no place to record it, and a read-only node writes nothing.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2.h"

#include <stdarg.h>

static bool may_do_io(const BDRVQcow2State *s)
{
    return !qb_mutex_held(&s->lock) && !qb_mutex_held(&s->alloc_lock) &&
           !qb_mutex_held(&s->header_lock);
}

static void set_corrupt_bit(Qcow2Header *h, void *opaque)
{
    h->incompatible |= QCOW2_INCOMPAT_CORRUPT;
}

int qcow2_corrupt_save(BlockDriverState *bs)
{
    BDRVQcow2State *s = qcow2_state(bs);
    if (!atomic_exchange(&s->corrupt_unsaved, false)) {
        return 0;
    }
    int ret = qcow2_header_update(bs, set_corrupt_bit, NULL, true);
    if (ret < 0) {
        atomic_store(&s->corrupt_unsaved, true);
    }
    return ret;
}

static void report_once(BDRVQcow2State *s, const char *what, const char *text, const char *events)
{
    if (!atomic_exchange(&s->corrupt_reported, true)) {
        bdrv_warn("qcow2: %s: %s; further %s events will be suppressed", what, text, events);
    }
}

/* The node stops here, whatever happens to the bit. */
static void mark(BlockDriverState *bs, const char *file, int line, const char *text)
{
    BDRVQcow2State *s = qcow2_state(bs);
    if (atomic_exchange(&s->corrupt, true)) {
        return;
    }
    s->corrupt_file = file;
    s->corrupt_line = line;
    atomic_store(&s->corrupt_reported, false); /* said also after a harmless one */
    report_once(s, "Marking image as corrupt", text, "corruption");
    atomic_store(&s->corrupt_unsaved, s->version >= 3);
}

int qcow2_signal_corruption_at(BlockDriverState *bs, bool fatal, int64_t offset, const char *file,
                               int line, const char *fmt, ...)
{
    BDRVQcow2State *s = qcow2_state(bs);
    if (bs->open_flags & BDRV_O_CHECK) {
        return -EIO;
    }
    va_list ap;
    va_start(ap, fmt);
    g_autofree char *text = g_strdup_vprintf(fmt, ap);
    va_end(ap);
    if (!fatal || bdrv_is_read_only(bs)) {
        report_once(s, "Image is corrupt", text, "non-fatal corruption");
        return -EIO;
    }
    mark(bs, file, line, text);
    if (may_do_io(s)) {
        qcow2_corrupt_save(bs);
    }
    return -EIO;
}
