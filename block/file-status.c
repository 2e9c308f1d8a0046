/*
 * Where a file has data, and how holes and zeroes are made.
 *
 * Block status asks the file system with lseek(): SEEK_DATA, and SEEK_HOLE for the end of data.  On
 * some file systems the second costs time proportional to the extent, and formats ask piece by
 * piece, in any order. So data extents are remembered, up to a few hundred; one that is found to
 * begin earlier grows:
 *
 *      file    |  hole  |######## data ########|   hole   |######|
 *                       start <-- asked at     end
 *
 * Of a hole only its end is remembered, where data begins: so a walk over a sparse file asks twice for
 * each hole and the data behind it.
 *
 * Who asks in random order would find a longer part of the same extent each time, at the cost of
 * all of it.  So the first question reads the first extents of the file from the start on, and
 * where nothing is known later the search begins up to LOOK_BACK before the place.
 *
 * Only data is remembered, never holes.  "Data" that another process has punched meanwhile is still
 * a true answer, if not the best one; a "hole" that another process has filled would lose its data.
 *
 * Zeroes.                         inside the file                            beyond its end
 *      may be given back          PUNCH_HOLE, else as below                  longer by ftruncate
 *      must stay allocated        ZERO_RANGE, else PUNCH_HOLE + fallocate    longer by ftruncate
 * What the file system has not got is remembered and answered with -ENOTSUP, upon which the core
 * writes zeroes.
 *
 * Invariants
 *  1. A remembered extent was data at a time when no hole made by this node, and completed, was
 *     later: "changes" counts holes, and a look-up that began under an older count is not stored.
 *  2. An extent that is returned is a multiple of request_alignment long, or reaches the end of the
 *     request.  In doubt it is data.
 *  3. Discard does not promise zeroes, and never fails for want of support otherwise than -ENOTSUP.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/file-int.h"

#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#define LOOK_BACK (16 * 1024 * 1024)
#define LOOK_BACK_EXTENTS 16
#define FIRST_LOOKS 256 /* holes and data */

/* --- the cache --- */

void file_data_cache_init(FileDataCache *c)
{
    qb_mutex_init(&c->lock);
    c->begins = -1;
}

void file_data_cache_destroy(FileDataCache *c)
{
    qb_mutex_destroy(&c->lock);
}

void file_data_cache_drop(FileDataCache *c)
{
    QB_GUARD(&c->lock);
    c->n = 0;
    c->begins = -1;
    c->changes++;
}

/* How many extents begin at @offset or before. */
static unsigned begun_before(const FileDataCache *c, int64_t offset)
{
    unsigned low = 0, high = c->n;
    while (low < high) {
        unsigned mid = low + (high - low) / 2;
        if (c->list[mid].start <= offset) {
            low = mid + 1;
        } else {
            high = mid;
        }
    }
    return low;
}

/* What is remembered of a place. */
typedef struct Known {
    int64_t end;      /* data up to there; 0: not known */
    bool begins;      /* data begins there */
    int64_t before;   /* where the last known data before it ends */
    bool first;       /* nobody has asked before */
    uint64_t changes; /* for cache_store() */
} Known;

static Known cache_find(FileDataCache *c, int64_t offset)
{
    QB_GUARD(&c->lock);
    unsigned i = begun_before(c, offset);
    bool first = !c->asked;
    c->asked = true;
    return (Known){
        .first = first,
        .end = i > 0 && offset < c->list[i - 1].end ? c->list[i - 1].end : 0,
        .begins = offset == c->begins,
        .before = i > 0 ? c->list[i - 1].end : 0,
        .changes = c->changes,
    };
}

/* A hole that was found ends at @offset. */
static void cache_store_begin(FileDataCache *c, int64_t offset, uint64_t changes)
{
    QB_GUARD(&c->lock);
    c->begins = c->changes == changes ? offset : c->begins;
}

static void remove_extents(FileDataCache *c, unsigned first, unsigned end)
{
    memmove(c->list + first, c->list + end, (c->n - end) * sizeof(c->list[0]));
    c->n -= end - first;
}

static void cache_store(FileDataCache *c, int64_t start, int64_t end, uint64_t changes)
{
    QB_GUARD(&c->lock);
    if (c->changes != changes) {
        return;
    }
    unsigned i = begun_before(c, start);
    if (i > 0 && c->list[i - 1].end >= start) {
        start = c->list[--i].start;
    }
    unsigned after = i; /* those from i on that the new one touches are parts of it */
    while (after < c->n && c->list[after].start <= end) {
        end = MAX(end, c->list[after].end);
        after++;
    }
    remove_extents(c, i, after);
    if (c->n == FILE_DATA_EXTENTS) {
        unsigned out = c->victim++ % FILE_DATA_EXTENTS;
        remove_extents(c, out, out + 1);
        i -= out < i;
    }
    memmove(c->list + i + 1, c->list + i, (c->n - i) * sizeof(c->list[0]));
    c->list[i] = (FileDataExtent){start, end};
    c->n++;
}

/* --- block status --- */

/* [offset, end) is all data or all hole. */
typedef struct FileExtent {
    int64_t end;
    bool data;
} FileExtent;

/* Asks the file system, @is_data: for the end only. Holes that reach the end of the file have none. */
static FileExtent find_extent(int fd, int64_t offset, bool is_data)
{
    FileExtent all_data = {.end = INT64_MAX, .data = true};
    off64_t data = is_data ? offset : lseek(fd, offset, SEEK_DATA);
    if (data < 0) {
        return errno == ENXIO ? (FileExtent){.end = INT64_MAX, .data = false} : all_data;
    }
    if (data > offset) {
        return (FileExtent){.end = data, .data = false};
    }
    off64_t hole = lseek(fd, offset, SEEK_HOLE);
    if (hole <= offset) {
        return all_data; /* it changed between the two questions, or there is no answer */
    }
    return (FileExtent){.end = hole, .data = true};
}

static void remember(FileDataCache *c, int64_t start, FileExtent e, uint64_t changes)
{
    if (e.end != INT64_MAX && e.data) {
        cache_store(c, start, e.end, changes);
    } else if (e.end != INT64_MAX) {
        cache_store_begin(c, e.end, changes);
    }
}

/* Remembers what lies at the start of the file. */
static void learn_start(BDRVFileState *s, uint64_t changes)
{
    bool is_data = false;
    int64_t pos = 0;
    for (int i = 0; i < FIRST_LOOKS && pos != INT64_MAX; i++) {
        FileExtent e = find_extent(s->fd, pos, is_data);
        remember(&s->data, pos, e, changes);
        is_data = !e.data; /* behind a hole */
        pos = e.end;
    }
}

/* The extent with @offset, of which nothing is known, found from somewhat before it. */
static FileExtent find_from_before(BDRVFileState *s, int64_t offset, const Known *known)
{
    int64_t pos = known->begins ? offset : MAX(known->before, offset - LOOK_BACK);
    for (int i = 0; i < LOOK_BACK_EXTENTS && pos < offset; i++) {
        FileExtent e = find_extent(s->fd, pos, false);
        remember(&s->data, pos, e, known->changes);
        if (e.end > offset) {
            return e;
        }
        pos = e.end;
    }
    FileExtent e = find_extent(s->fd, offset, known->begins);
    remember(&s->data, offset, e, known->changes);
    return e;
}

static FileExtent look_up(BDRVFileState *s, int64_t offset)
{
    Known known = cache_find(&s->data, offset);
    if (known.first && offset > 0) {
        learn_start(s, known.changes);
        known = cache_find(&s->data, offset);
    }
    return known.end ? (FileExtent){.end = known.end, .data = true}
                     : find_from_before(s, offset, &known);
}

/* Cuts the extent to the request and to whole units; a unit that is partly data is data. */
static int64_t fit(FileExtent *e, int64_t offset, int64_t bytes, uint32_t unit)
{
    if (e->end - offset >= bytes) {
        return bytes;
    }
    uint64_t length = (uint64_t)(e->end - offset);
    length = e->data ? qb_align_up(length, unit) : qb_align_down(length, unit);
    if (length == 0) {
        e->data = true;
        length = unit;
    }
    return MIN((int64_t)length, bytes);
}

int file_block_status(BlockDriverState *bs, int64_t offset, int64_t bytes, BdrvStatus *ret)
{
    BDRVFileState *s = file_state(bs);
    assert(bytes > 0 && qb_range_valid(offset, bytes));
    FileExtent e = look_up(s, offset);
    if (!e.data) {
        file_note_hole_seen(s);
    }
    ret->bytes = fit(&e, offset, bytes, s->request_alignment);
    ret->flags = BDRV_BLOCK_ALLOCATED | BDRV_BLOCK_OFFSET_VALID |
                 (e.data ? BDRV_BLOCK_DATA : BDRV_BLOCK_ZERO);
    ret->host_offset = offset;
    ret->host_node = bs;
    return 0;
}

/* --- fallocate --- */

static bool means_no_such_operation(int err)
{
    return err == EOPNOTSUPP || err == ENOSYS || err == ENOTTY || err == ENODEV;
}

int file_fallocate(int fd, int mode, int64_t offset, int64_t bytes, _Atomic(bool) *lacks)
{
    int ret;
    if (lacks && atomic_load_explicit(lacks, memory_order_relaxed)) {
        return -ENOTSUP;
    }
    do {
        ret = fallocate(fd, mode, offset, bytes);
    } while (ret < 0 && errno == EINTR);
    if (ret == 0) {
        return 0;
    }
    if (!means_no_such_operation(errno)) {
        /* EINVAL: these numbers do not suit the file system; others may. */
        return errno == EINVAL ? -ENOTSUP : -errno;
    }
    if (lacks) {
        atomic_store(lacks, true);
    }
    return -ENOTSUP;
}

/* --- zeroes --- */

static int punch(BDRVFileState *s, int64_t offset, int64_t bytes)
{
    return file_fallocate(s->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, bytes,
                          &s->lacks.punch_hole);
}

/* Zeroes that keep their space. */
static int zero_allocated(BDRVFileState *s, int64_t offset, int64_t bytes)
{
    int ret = file_fallocate(s->fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, bytes,
                             &s->lacks.zero_range);
    if (ret != -ENOTSUP) {
        return ret;
    }
    ret = punch(s, offset, bytes);
    if (ret < 0) {
        return ret;
    }
    /* What cannot be reserved again reads as zeroes all the same. */
    ret = file_fallocate(s->fd, FALLOC_FL_KEEP_SIZE, offset, bytes, NULL);
    return ret == -ENOTSUP ? 0 : ret;
}

/* The part of the request that lies inside the file, which other processes may have made longer. */
static int64_t bytes_inside(const BDRVFileState *s, int64_t offset, int64_t bytes)
{
    if (offset + bytes <= atomic_load(&s->eof)) {
        return bytes; /* many holes come one by one: no question for each */
    }
    int64_t length = file_length(s);
    if (length < 0) {
        return length;
    }
    return CLAMP(length - offset, 0, bytes);
}

static int zero_regular(BDRVFileState *s, int64_t offset, int64_t bytes, int flags)
{
    int64_t inside = bytes_inside(s, offset, bytes);
    if (inside < 0) {
        return (int)inside;
    }
    int ret = 0;
    if (inside > 0) {
        ret = flags & BDRV_REQ_MAY_UNMAP ? punch(s, offset, inside) : -ENOTSUP;
        ret = ret == -ENOTSUP ? zero_allocated(s, offset, inside) : ret;
    }
    return ret < 0 ? ret : file_grow(s, offset + bytes);
}

int file_pwrite_zeroes(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                       int flags)
{
    BDRVFileState *s = file_state(bs);
    file_assert_request(s, offset, bytes);
    int ret = s->is_device ? host_device_zero(s, offset, bytes, flags)
                           : zero_regular(s, offset, bytes, flags);
    file_data_cache_drop(&s->data);
    file_note_change(s);
    return ret;
}

static int discard_regular(BDRVFileState *s, int64_t offset, int64_t bytes)
{
    int64_t inside = bytes_inside(s, offset, bytes);
    return inside > 0 ? punch(s, offset, inside) : (int)inside;
}

int file_pdiscard(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes)
{
    BDRVFileState *s = file_state(bs);
    file_assert_request(s, offset, bytes);
    int ret = s->is_device ? host_device_discard(s, offset, bytes)
                           : discard_regular(s, offset, bytes);
    file_data_cache_drop(&s->data);
    file_note_discard(s);
    return ret;
}
