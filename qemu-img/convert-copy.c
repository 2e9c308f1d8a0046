/*
 * The copying engine of convert: extents of the sources to the target, on all cores.
 *
 *       cursor (under lock) --> unit {offset, bytes, kind, turn} --> worker
 *
 *       worker:  DATA   read -- wait for the turn -- write what is not zero
 *                ZERO   wait for the turn -- write zeroes unless the target is known to be zero
 *                SKIP   the target's backing file has it
 *
 * Reads run in parallel; writes happen in the order of the turns, so that the target is laid out in
 * guest order, unless -W allows any order.  Into the page cache of a file writes go one by one then,
 * too: the kernel lets one writer into a file at a time, and has others spin who could be reading; and
 * they are short, so that what was read is still in the processor's caches.  A unit of compressed data
 * is many clusters long: the driver compresses them in parallel inside one write.
 *
 * Invariants
 * 1. Units partition [0, size); a DATA unit is at most CONVERT_UNIT or a cluster of the target long,
 *    and begins and ends on one (but for the end of the image).
 * 2. After the first error, or a signal, no new unit is handed out; turns are still passed on, so
 *    no worker waits for ever.
 *
 * With -C the data of a unit go from file to file inside the kernel, where files and formats let them.
 *
 * Not done here: opening, creating and judging; convert.c does.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdlib.h>
#include <string.h>
#include "block/locks.h"
#include "qemu-img/convert.h"
#include "util/checked.h"
#include "util/iov.h"
#include "util/thread.h"

#define CONVERT_UNIT (2 * 1024 * 1024)
#define CONVERT_SHORT_UNIT (512 * 1024)
#define CONVERT_SECTOR 512
#define CONVERT_GAP (64 * 1024) /* zeroes as short as this are copied along with the data around */

typedef enum UnitKind { UNIT_SKIP, UNIT_ZERO, UNIT_DATA } UnitKind;

typedef struct Unit {
    int64_t offset, bytes;
    UnitKind kind;
    uint64_t turn;
} Unit;

typedef struct Engine {
    const ConvertPlan *plan;
    QbMutex lock;
    QbCond turn_passed;
    int64_t unit;       /* longest unit of data */
    bool one_writer;    /* any order, but one at a time */
    bool writing;
    int64_t cursor;     /* guarded by lock, as are all below */
    uint64_t next_turn, write_turn;
    UnitKind known_kind; /* what lies from here to there */
    int64_t known_start, known_end;
    bool failed;
    BlockRateLimit limit;
} Engine;

/* ---- what lies where ---- */

static ConvertSource *source_at(const ConvertPlan *plan, int64_t offset)
{
    for (unsigned i = 0; i < plan->nb_sources; i++) {
        ConvertSource *src = &plan->sources[i];
        if (offset < src->start + src->size) {
            return src;
        }
    }
    return NULL;
}

static UnitKind classify(const ConvertPlan *plan, const BdrvStatus *st)
{
    if (plan->target_has_backing && !(st->flags & BDRV_BLOCK_ALLOCATED)) {
        return UNIT_SKIP;
    }
    return st->flags & BDRV_BLOCK_ZERO ? UNIT_ZERO : UNIT_DATA;
}

/* With a backing file below the target only the source's top layer counts: what it does not have
 * is expected in that backing file. */
static int query_source(const ConvertPlan *plan, const ConvertSource *src, int64_t pos,
                        BdrvStatus *st)
{
    BDRV_GRAPH_GUARD();
    BlockDriverState *bs = blk_bs(src->blk);
    BlockDriverState *base = plan->target_has_backing ? bdrv_backing_chain_next(bs) : NULL;

    return bdrv_block_status_above(bs, base, pos, src->size - pos, st);
}

/* Learns what lies at @offset. A status that cannot be told counts as data with --salvage. */
static int learn_locked(Engine *e, int64_t offset)
{
    const ConvertPlan *plan = e->plan;
    const ConvertSource *src = source_at(plan, offset);
    int64_t pos = offset - src->start;
    BdrvStatus st = {0};
    int ret = query_source(plan, src, pos, &st);

    if (ret < 0 && plan->salvage) {
        st = (BdrvStatus){.flags = BDRV_BLOCK_DATA | BDRV_BLOCK_ALLOCATED,
                          .bytes = MIN(src->size - pos, e->unit)};
        ret = 0;
    }
    if (ret < 0) {
        img_error("error while reading block status at offset %" PRId64 " of '%s': %s", pos,
                  src->name, g_strerror(-ret));
        return ret;
    }
    e->known_kind = classify(plan, &st);
    e->known_start = offset;
    e->known_end = offset + st.bytes;
    if (e->known_kind == UNIT_ZERO && !plan->min_sparse) {
        e->known_kind = UNIT_DATA;
    }
    return 0;
}

/* What lies at the cursor: one extent, or data in many small pieces with short gaps, so that a
 * fragmented source does not cost a unit for each fragment. */
static bool gather_locked(Engine *e, Unit *u)
{
    int64_t end;

    if ((e->cursor < e->known_start || e->cursor >= e->known_end) &&
        learn_locked(e, e->cursor) < 0) {
        return false;
    }
    *u = (Unit){.offset = e->cursor, .kind = e->known_kind, .turn = e->next_turn++};
    end = e->known_end;
    while (u->kind == UNIT_DATA && end - u->offset < e->unit && end < e->plan->size) {
        if (learn_locked(e, end) < 0) {
            return false;
        }
        if (e->known_kind == UNIT_SKIP ||
            (e->known_kind == UNIT_ZERO && e->known_end - end > CONVERT_GAP)) {
            break;
        }
        end = e->known_end;
    }
    u->bytes = end - u->offset;
    return true;
}

/* Data goes in whole clusters of the target, so that none is written (or compressed) twice: a data
 * unit may swallow zeroes or a hole at its ends, which are then found by content, or what the
 * backing file has, which reads the same through the source.  So each unit begins at a cluster, and
 * none is longer than a buffer. */
static void shape_unit(const Engine *e, Unit *u)
{
    int64_t align = e->plan->target_alignment, end = u->offset + u->bytes;

    if (u->kind != UNIT_DATA) {
        int64_t down = (int64_t)qb_align_down((uint64_t)end, (uint64_t)align);
        if (end < e->plan->size && down > u->offset) {
            u->bytes = down - u->offset;
        } else if (end < e->plan->size) {
            u->kind = UNIT_DATA; /* shares its cluster with what follows */
            u->bytes = align;
        }
    }
    if (u->kind == UNIT_DATA) {
        end = (int64_t)qb_align_up((uint64_t)(u->offset + MIN(u->bytes, e->unit)),
                                   (uint64_t)align);
        u->bytes = end - u->offset;
    }
    u->bytes = MIN(u->bytes, e->plan->size - u->offset);
    assert(u->offset % align == 0);
}

/* Takes the next unit. False: none left, or the copy has failed or was interrupted. */
static bool next_unit(Engine *e, Unit *u)
{
    QB_GUARD(&e->lock);
    if (e->failed || e->cursor >= e->plan->size) {
        return false;
    }
    if (qb_progress_cancelled(e->plan->progress)) {
        img_error("Interrupted at offset %" PRId64 " of %" PRId64, e->cursor, e->plan->size);
        e->failed = true;
        return false;
    }
    if (!gather_locked(e, u)) {
        e->failed = true;
        return false;
    }
    shape_unit(e, u);
    e->cursor += u->bytes;
    return true;
}

/* ---- turns ---- */

static bool may_write_locked(const Engine *e, const Unit *u)
{
    return e->plan->out_of_order ? !e->one_writer || !e->writing : e->write_turn == u->turn;
}

static void wait_turn(Engine *e, const Unit *u)
{
    QB_GUARD(&e->lock);
    while (!may_write_locked(e, u)) {
        qb_cond_wait(&e->turn_passed, &e->lock);
    }
    e->writing = true;
}

static void pass_turn(Engine *e, bool ok)
{
    QB_GUARD(&e->lock);
    e->write_turn++;
    e->writing = false;
    e->failed |= !ok;
    if (e->one_writer) {
        qb_cond_signal(&e->turn_passed);
    } else {
        qb_cond_broadcast(&e->turn_passed);
    }
}

/* ---- reading ---- */

/* Reads what can be read, sector by sector; the rest becomes zeroes. */
static void salvage_sectors(const ConvertSource *src, int64_t pos, int64_t bytes, uint8_t *buf,
                            bool quiet)
{
    for (int64_t done = 0; done < bytes; done += CONVERT_SECTOR) {
        int64_t n = MIN(CONVERT_SECTOR, bytes - done);
        int ret = blk_pread(src->blk, pos + done, n, buf + done, 0);
        if (ret < 0) {
            memset(buf + done, 0, (size_t)n);
            if (!quiet) {
                img_warn("error while reading offset %" PRId64 " of '%s': %s", pos + done,
                         src->name, g_strerror(-ret));
            }
        }
    }
}

static int read_piece(const ConvertPlan *plan, const ConvertSource *src, int64_t pos,
                      int64_t bytes, uint8_t *buf)
{
    int ret = blk_pread(src->blk, pos, bytes, buf, 0);

    if (ret < 0 && plan->salvage) {
        salvage_sectors(src, pos, bytes, buf, plan->quiet);
        return 0;
    }
    if (ret < 0) {
        img_error("error while reading at byte %" PRId64 " of '%s': %s", pos, src->name,
                  g_strerror(-ret));
    }
    return ret;
}

/* A unit may span several sources. */
static int read_unit(const ConvertPlan *plan, const Unit *u, uint8_t *buf)
{
    int64_t offset = u->offset, end = u->offset + u->bytes;

    while (offset < end) {
        ConvertSource *src = source_at(plan, offset);
        int64_t n = MIN(end, src->start + src->size) - offset;
        int ret = read_piece(plan, src, offset - src->start, n, buf + (offset - u->offset));
        if (ret < 0) {
            return ret;
        }
        offset += n;
    }
    memset(buf + u->bytes, 0, (size_t)plan->target_alignment);
    return 0;
}

/* ---- writing ---- */

static int said_write_error(const ConvertPlan *plan, int ret, int64_t offset)
{
    if (ret < 0) {
        img_error("error while writing at byte %" PRId64 " of '%s': %s", offset, plan->target_name,
                  g_strerror(-ret));
    }
    return ret;
}

static int write_zeroes(const ConvertPlan *plan, int64_t offset, int64_t bytes)
{
    if (plan->target_is_zero) {
        return 0;
    }
    return said_write_error(
        plan, blk_pwrite_zeroes(plan->target, offset, bytes, BDRV_REQ_MAY_UNMAP), offset);
}

/* Length of the run at @buf that is all zero, or all not zero, in steps of @step. */
static int64_t uniform_run(const uint8_t *buf, int64_t bytes, int64_t step, bool *ret_zero)
{
    int64_t n = MIN(step, bytes);

    *ret_zero = qb_buffer_is_zero(buf, (size_t)n);
    while (n < bytes) {
        int64_t piece = MIN(step, bytes - n);
        if (qb_buffer_is_zero(buf + n, (size_t)piece) != *ret_zero) {
            break;
        }
        n += piece;
    }
    return n;
}

/* Compression works on whole clusters; otherwise zeroes are looked for in steps of -S. */
static int64_t sparse_step(const ConvertPlan *plan)
{
    return plan->compress ? MAX(plan->target_alignment, plan->min_sparse) : plan->min_sparse;
}

/* A compressed write covers whole clusters or reaches the target's end, which may lie beyond the
 * sources' (sizes are rounded up to sectors). The buffer is zero behind the unit. */
static int64_t padded(const ConvertPlan *plan, int64_t offset, int64_t bytes)
{
    uint64_t align = (uint64_t)plan->target_alignment;
    int64_t end = (int64_t)qb_align_up((uint64_t)(offset + bytes), align);

    return plan->compress ? MIN(end, plan->target_size) - offset : bytes;
}

static int write_piece(const ConvertPlan *plan, int64_t offset, int64_t bytes, const uint8_t *buf)
{
    int flags = plan->compress ? BDRV_REQ_COMPRESSED : 0;
    int ret = blk_pwrite(plan->target, offset, padded(plan, offset, bytes), buf, flags);

    return said_write_error(plan, ret, offset);
}

static int write_data(const ConvertPlan *plan, const Unit *u, const uint8_t *buf)
{
    int64_t n;

    if (!plan->min_sparse) {
        return write_piece(plan, u->offset, u->bytes, buf);
    }
    for (int64_t pos = 0; pos < u->bytes; pos += n) {
        bool zero;
        int ret;
        n = uniform_run(buf + pos, u->bytes - pos, sparse_step(plan), &zero);
        ret = zero ? write_zeroes(plan, u->offset + pos, n)
                   : write_piece(plan, u->offset + pos, n, buf + pos);
        if (ret < 0) {
            return ret;
        }
    }
    return 0;
}

static bool has_failed(Engine *e)
{
    QB_GUARD(&e->lock);
    return e->failed;
}

/* Copies without data passing through here. A unit may span several sources. */
static int offload_unit(const ConvertPlan *plan, const Unit *u)
{
    int64_t offset = u->offset, end = u->offset + u->bytes;

    while (offset < end) {
        ConvertSource *src = source_at(plan, offset);
        int64_t n = MIN(end, src->start + src->size) - offset;
        int ret = blk_copy_range(src->blk, offset - src->start, plan->target, offset, n);
        if (ret < 0) {
            img_error("error while copying at byte %" PRId64 " of '%s' to '%s': %s",
                      offset - src->start, src->name, plan->target_name, g_strerror(-ret));
            return ret;
        }
        offset += n;
    }
    return 0;
}

static void copy_unit(Engine *e, const Unit *u, uint8_t *buf)
{
    const ConvertPlan *plan = e->plan;
    bool reads = u->kind == UNIT_DATA && !plan->copy_offload;
    int ret = reads ? read_unit(plan, u, buf) : 0;

    wait_turn(e, u);
    if (ret == 0 && !has_failed(e)) {
        if (reads) {
            ret = write_data(plan, u, buf);
        } else if (u->kind == UNIT_DATA) {
            ret = offload_unit(plan, u);
        } else if (u->kind == UNIT_ZERO) {
            ret = write_zeroes(plan, u->offset, u->bytes);
        }
    }
    pass_turn(e, ret == 0);
    qb_progress_add(plan->progress, (uint64_t)u->bytes);
}

static void throttle(Engine *e, const Unit *u)
{
    if (u->kind == UNIT_DATA) {
        BlockRateLimit *limit = &e->limit;
        QB_GUARD(&e->lock);
        block_rate_limit_wait(limit, (uint64_t)u->bytes, e->plan->progress);
    }
}

static void *worker_main(void *opaque)
{
    Engine *e = opaque;
    size_t size = (size_t)e->unit + (size_t)e->plan->target_alignment;
    QB_AUTO_FREE uint8_t *buf = bdrv_try_blockalign(blk_bs(e->plan->target), size);
    Unit u;

    if (!buf) {
        QB_GUARD(&e->lock);
        img_error("Not enough memory for a buffer of %zu bytes", size);
        e->failed = true;
        return NULL;
    }
    while (next_unit(e, &u)) {
        throttle(e, &u);
        copy_unit(e, &u, buf);
    }
    return NULL;
}

bool convert_copy(const ConvertPlan *plan)
{
    Engine e = {.plan = plan, .limit = {.speed = plan->rate_limit}};
    bool plain = !plan->compress && !plan->copy_offload;
    g_autofree pthread_t *threads = g_new0(pthread_t, plan->workers);
    unsigned started = 0;

    e.one_writer = plain && plan->out_of_order && plan->target_cached;
    e.unit = e.one_writer ? CONVERT_SHORT_UNIT : CONVERT_UNIT;
    e.unit = MAX(e.unit, plan->target_alignment); /* whole clusters, all of them powers of two */
    qb_mutex_init(&e.lock);
    qb_cond_init(&e.turn_passed);
    while (started + 1 < plan->workers &&
           qb_thread_start(&threads[started], "convert", worker_main, &e)) {
        started++;
    }
    worker_main(&e);
    while (started > 0) {
        pthread_join(threads[--started], NULL);
    }
    qb_cond_destroy(&e.turn_passed);
    qb_mutex_destroy(&e.lock);
    return !e.failed;
}
