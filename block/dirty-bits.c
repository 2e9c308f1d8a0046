/*
 * The bits of a dirty bitmap, in pages.
 *
 *   segments    [0] 64 slots   [1] 128 slots   [2] 256 ...      made when needed, never moved
 *   slot        ZEROES | ONES | UNREAD (+ CHANGED), or a page   one word, changed atomically
 *   page        64-bit words, changed atomically; changed?
 *
 *       UNREAD --read--> page or ZEROES
 *       ZEROES --set--> page --set--> page          whole page set: ONES, without a page
 *       ONES --reset--> page                        whole page reset: ZEROES
 *
 * A page is 4 KiB, 32768 bits.  So what was never written costs nothing, what was written as a
 * whole costs a word, and memory is bounded by the pages that guests really write to.  Bits that
 * are stored somewhere are read page by page when somebody wants to know them.
 *
 * Invariants
 *  1. A slot goes from a marker to a page by compare-and-swap and keeps that page until clear() or
 *     free(), which run alone.  So whoever found a page may use it without a lock.
 *  2. Bits at and behind the end of the disk are clear; a page that the end lies in is never ONES
 *     by our doing.
 *  3. Whatever set() or reset() really changed is marked changed: in the page, or CHANGED in the
 *     slot.
 *  4. The lock covers begin(), reading, and the making of segments; setting what is at hand takes
 *     no lock.
 *
 * Not done: a page that becomes all ones or zeroes by single bits keeps its memory.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/dirty-bits.h"

#include <assert.h>
#include <errno.h>
#include <glib.h>
#include <string.h>

#include "util/checked.h"
#include "util/endian.h"
#include "util/iov.h"
#include "util/thread.h"

enum {
    PAGE_BYTES = BDRV_DIRTY_PAGE_BYTES,
    PAGE_BITS = PAGE_BYTES * 8,
    PAGE_WORDS = PAGE_BYTES / 8,
    FIRST_SEGMENT = 64, /* slots; each segment has twice as many as the one before */
    SEGMENTS = 40,
    READ_AHEAD = 64, /* pages read at once by those who want them all */
};

/* Markers in slots; a page's address is larger than any of them. */
enum {
    SLOT_ZEROES = 0,
    SLOT_ONES = 1,
    SLOT_UNREAD = 2,
    SLOT_KIND = 3,
    SLOT_CHANGED = 4,
    SLOT_MARKERS = 8,
};

typedef struct Page {
    _Atomic(bool) changed;
    _Atomic(uint64_t) words[PAGE_WORDS];
} Page;

typedef _Atomic(uintptr_t) Slot;

struct BdrvDirtyBits {
    unsigned granularity_bits;
    BdrvDirtySource source;
    _Atomic(uint64_t) size;
    _Atomic(bool) begun; /* begin() has run */
    QbMutex lock;
    _Atomic(Slot *) segments[SEGMENTS];
};

/* ---------------------------------------------------------------- slots */

static unsigned segment_of(uint64_t page)
{
    return 63 - (unsigned)__builtin_clzll(page / FIRST_SEGMENT + 1);
}

static uint64_t segment_start(unsigned segment)
{
    return ((UINT64_C(1) << segment) - 1) * FIRST_SEGMENT;
}

/* The slot of @page, or NULL where there is no segment: ZEROES, unchanged. */
static Slot *find_slot(const BdrvDirtyBits *b, uint64_t page)
{
    unsigned k = segment_of(page);
    Slot *segment = atomic_load(&b->segments[k]);
    return segment ? segment + (page - segment_start(k)) : NULL;
}

static uintptr_t slot_value(const BdrvDirtyBits *b, uint64_t page)
{
    Slot *slot = find_slot(b, page);
    return slot ? atomic_load(slot) : SLOT_ZEROES;
}

static bool is_page(uintptr_t value)
{
    return value >= SLOT_MARKERS;
}

static Page *as_page(uintptr_t value)
{
    return (Page *)value;
}

/* Makes the segment if there is none; NULL: no memory. */
static Slot *make_slot_locked(BdrvDirtyBits *b, uint64_t page) QB_REQUIRES(b->lock)
{
    qb_mutex_assert_held(&b->lock);
    unsigned k = segment_of(page);
    if (!atomic_load(&b->segments[k])) {
        Slot *segment = g_try_malloc0((sizeof(Slot) * FIRST_SEGMENT) << k);
        if (!segment) {
            return NULL;
        }
        atomic_store(&b->segments[k], segment);
    }
    return find_slot(b, page);
}

static Slot *get_slot(BdrvDirtyBits *b, uint64_t page)
{
    Slot *slot = find_slot(b, page);
    if (slot) {
        return slot;
    }
    QB_GUARD(&b->lock);
    return make_slot_locked(b, page);
}

/* Where looking goes on behind @page: the next one, or the next segment where this one is
 * missing. */
static uint64_t next_page(const BdrvDirtyBits *b, uint64_t page)
{
    return find_slot(b, page) ? page + 1 : segment_start(segment_of(page) + 1);
}

static uint64_t nb_bits(const BdrvDirtyBits *b, uint64_t size)
{
    return qb_div_round_up(size, UINT64_C(1) << b->granularity_bits);
}

static uint64_t nb_pages(const BdrvDirtyBits *b)
{
    return qb_div_round_up(nb_bits(b, atomic_load(&b->size)), PAGE_BITS);
}

/* ---------------------------------------------------------------- life */

BdrvDirtyBits *bdrv_dirty_bits_new(uint64_t size, unsigned granularity_bits,
                                   const BdrvDirtySource *source)
{
    BdrvDirtyBits *b = g_new0(BdrvDirtyBits, 1);
    assert(granularity_bits < 63 && size <= INT64_MAX);
    b->granularity_bits = granularity_bits;
    atomic_init(&b->size, size);
    atomic_init(&b->begun, !source);
    if (source) {
        b->source = *source;
    }
    qb_mutex_init(&b->lock);
    return b;
}

/* Calls @fn for each slot of each segment there is. */
static void for_each_slot(BdrvDirtyBits *b, void (*fn)(Slot *slot))
{
    for (unsigned k = 0; k < SEGMENTS; k++) {
        Slot *segment = atomic_load(&b->segments[k]);
        for (uint64_t i = 0; segment && i < (UINT64_C(1) << k) * FIRST_SEGMENT; i++) {
            fn(&segment[i]);
        }
    }
}

static void free_page(Slot *slot)
{
    uintptr_t value = atomic_load(slot);
    if (is_page(value)) {
        g_free(as_page(value));
    }
}

void bdrv_dirty_bits_free(BdrvDirtyBits *b)
{
    if (!b) {
        return;
    }
    for_each_slot(b, free_page);
    for (unsigned k = 0; k < SEGMENTS; k++) {
        g_free(atomic_load(&b->segments[k]));
    }
    qb_mutex_destroy(&b->lock);
    g_free(b);
}

uint64_t bdrv_dirty_bits_size(const BdrvDirtyBits *b)
{
    return atomic_load(&b->size);
}

unsigned bdrv_dirty_bits_granularity_bits(const BdrvDirtyBits *b)
{
    return b->granularity_bits;
}

/* ---------------------------------------------------------------- reading what is stored */

int bdrv_dirty_bits_begin(BdrvDirtyBits *b)
{
    if (atomic_load(&b->begun)) {
        return 0;
    }
    QB_GUARD(&b->lock);
    if (atomic_load(&b->begun)) {
        return 0;
    }
    int ret = b->source.begin(b, b->source.opaque);
    if (ret == 0) {
        atomic_store(&b->begun, true);
    }
    return ret;
}

/* A page only part of which is described, or that the disk ends in, is read to know its ones. */
static uintptr_t expected_slot(const BdrvDirtyBits *b, uint64_t pos, uint64_t bytes,
                               BdrvDirtyStored stored)
{
    bool whole = bytes == PAGE_BYTES && (pos + bytes) * 8 <= nb_bits(b, atomic_load(&b->size));
    if (stored == BDRV_DIRTY_STORED_ONES && whole) {
        return SLOT_ONES;
    }
    return stored == BDRV_DIRTY_STORED_ZEROES ? SLOT_ZEROES : SLOT_UNREAD;
}

int bdrv_dirty_bits_expect(BdrvDirtyBits *b, uint64_t pos, uint64_t bytes, BdrvDirtyStored stored)
{
    assert(!atomic_load(&b->begun));
    qb_mutex_assert_held(&b->lock);
    uint64_t end = MIN(pos + bytes, nb_pages(b) * PAGE_BYTES);
    while (pos < end) {
        uint64_t n = MIN(end - pos, PAGE_BYTES - pos % PAGE_BYTES);
        uintptr_t value = expected_slot(b, pos, n, stored);
        if (value != SLOT_ZEROES) {
            Slot *slot = make_slot_locked(b, pos / PAGE_BYTES);
            if (!slot) {
                return -ENOMEM;
            }
            atomic_store(slot, value);
        }
        pos += n;
    }
    return 0;
}

static bool word_is_inside(uint64_t first_bit, uint64_t bits, uint64_t *ret_mask)
{
    uint64_t left = first_bit < bits ? bits - first_bit : 0;
    *ret_mask = left >= 64 ? UINT64_MAX : (UINT64_C(1) << left) - 1;
    return left > 0;
}

/* A page of what was read at @page, without bits behind the end; NULL: no memory. */
static Page *decode_page(const BdrvDirtyBits *b, uint64_t page, const uint8_t *buf)
{
    Page *p = g_try_new0(Page, 1);
    uint64_t bits = nb_bits(b, atomic_load(&b->size));
    for (unsigned w = 0; p && w < PAGE_WORDS; w++) {
        uint64_t mask;
        if (word_is_inside(page * PAGE_BITS + w * 64, bits, &mask)) {
            atomic_init(&p->words[w], qb_ldle64(buf + (size_t)w * 8) & mask);
        }
    }
    return p;
}

/* Puts what was read into the slot, unless somebody had a use for it meanwhile that needs none. */
static int publish_page(BdrvDirtyBits *b, uint64_t page, const uint8_t *buf)
{
    uintptr_t unread = SLOT_UNREAD;
    if (qb_buffer_is_zero(buf, PAGE_BYTES)) {
        atomic_compare_exchange_strong(find_slot(b, page), &unread, SLOT_ZEROES);
        return 0;
    }
    Page *p = decode_page(b, page, buf);
    if (!p) {
        return -ENOMEM;
    }
    if (!atomic_compare_exchange_strong(find_slot(b, page), &unread, (uintptr_t)p)) {
        g_free(p);
    }
    return 0;
}

/* Pages from @page on that are not read yet, at most @max. */
static uint64_t unread_run(const BdrvDirtyBits *b, uint64_t page, uint64_t max)
{
    uint64_t n = 0, end = nb_pages(b);
    while (n < max && page + n < end && slot_value(b, page + n) == SLOT_UNREAD) {
        n++;
    }
    return n;
}

/* Reads @page, and up to @max pages in all that follow unread. */
static int read_pages(BdrvDirtyBits *b, uint64_t page, uint64_t max)
{
    QB_GUARD(&b->lock);
    uint64_t n = unread_run(b, page, max);
    if (!n) {
        return 0; /* somebody else was faster */
    }
    g_autofree uint8_t *buf = g_try_malloc(n * PAGE_BYTES);
    if (!buf) {
        return -ENOMEM;
    }
    int ret = b->source.read(b->source.opaque, page * PAGE_BYTES, n * PAGE_BYTES, buf);
    for (uint64_t i = 0; i < n && ret == 0; i++) {
        ret = publish_page(b, page + i, buf + i * PAGE_BYTES);
    }
    return ret;
}

/* ---------------------------------------------------------------- words */

/* Bits [from, to) of word @w, of those [from, to) of the page. */
static uint64_t word_mask(unsigned w, unsigned from, unsigned to)
{
    unsigned lo = MAX(from, w * 64) - w * 64, hi = MIN(to, w * 64 + 64) - w * 64;
    uint64_t below_hi = hi == 64 ? UINT64_MAX : (UINT64_C(1) << hi) - 1;
    return below_hi & ~((UINT64_C(1) << lo) - 1);
}

/* Who marks what is dirty reads first: bits that are set already cost nothing. */
static void set_words(Page *p, unsigned from, unsigned to)
{
    for (unsigned w = from / 64; w * 64 < to; w++) {
        uint64_t mask = word_mask(w, from, to);
        if ((atomic_load(&p->words[w]) & mask) != mask) {
            atomic_fetch_or(&p->words[w], mask);
            atomic_store(&p->changed, true);
        }
    }
}

static void reset_words(Page *p, unsigned from, unsigned to)
{
    for (unsigned w = from / 64; w * 64 < to; w++) {
        uint64_t mask = word_mask(w, from, to);
        if (atomic_load(&p->words[w]) & mask) {
            atomic_fetch_and(&p->words[w], ~mask);
            atomic_store(&p->changed, true);
        }
    }
}

static bool words_are_set(Page *p, unsigned from, unsigned to)
{
    for (unsigned w = from / 64; w * 64 < to; w++) {
        uint64_t mask = word_mask(w, from, to);
        if ((atomic_load(&p->words[w]) & mask) != mask) {
            return false;
        }
    }
    return true;
}

/* ---------------------------------------------------------------- changing */

/* Puts a page with @word everywhere where the marker @value is. 0 also when it is no more. */
static int make_page(Slot *slot, uintptr_t value, uint64_t word)
{
    Page *p = g_try_new0(Page, 1);
    if (!p) {
        return -ENOMEM;
    }
    atomic_init(&p->changed, value & SLOT_CHANGED);
    for (unsigned w = 0; word && w < PAGE_WORDS; w++) {
        atomic_init(&p->words[w], word);
    }
    if (!atomic_compare_exchange_strong(slot, &value, (uintptr_t)p)) {
        g_free(p);
    }
    return 0;
}

typedef struct Change {
    uintptr_t goal;    /* SLOT_ONES or SLOT_ZEROES */
    uint64_t opposite; /* a word of the other kind */
    void (*words)(Page *p, unsigned from, unsigned to);
} Change;

static const Change change_set = {SLOT_ONES, 0, set_words};
static const Change change_reset = {SLOT_ZEROES, UINT64_MAX, reset_words};

/* One step from the marker @value towards a slot that has bits [from, to) as wanted. */
static int step_marker(BdrvDirtyBits *b, const Change *c, uint64_t page, Slot *slot,
                       uintptr_t value, bool whole)
{
    if (whole) {
        atomic_compare_exchange_strong(slot, &value, c->goal | SLOT_CHANGED);
        return 0;
    }
    return (value & SLOT_KIND) == SLOT_UNREAD ? read_pages(b, page, 1)
                                              : make_page(slot, value, c->opposite);
}

static int change_page(BdrvDirtyBits *b, const Change *c, uint64_t page, unsigned from, unsigned to)
{
    if (c->goal == SLOT_ZEROES && !find_slot(b, page)) {
        return 0;
    }
    Slot *slot = get_slot(b, page);
    if (!slot) {
        return -ENOMEM;
    }
    for (;;) {
        uintptr_t value = atomic_load(slot);
        if (is_page(value)) {
            c->words(as_page(value), from, to);
            return 0;
        }
        if ((value & SLOT_KIND) == c->goal) {
            return 0;
        }
        int ret = step_marker(b, c, page, slot, value, to - from == PAGE_BITS);
        if (ret < 0) {
            return ret;
        }
    }
}

/* Bits [first, end). */
static int change_bits(BdrvDirtyBits *b, const Change *c, uint64_t first, uint64_t end)
{
    while (first < end) {
        uint64_t page = first / PAGE_BITS;
        unsigned from = first % PAGE_BITS;
        unsigned to = (unsigned)MIN(end - page * PAGE_BITS, PAGE_BITS);
        int ret = change_page(b, c, page, from, to);
        if (ret < 0) {
            return ret;
        }
        bool skip = c->goal == SLOT_ZEROES; /* nothing is set where there is no segment */
        first = (skip ? next_page(b, page) : page + 1) * PAGE_BITS;
    }
    return 0;
}

/* The bits of [offset, +bytes) inside the disk; false when there are none. */
static bool bits_of_range(const BdrvDirtyBits *b, uint64_t offset, uint64_t bytes,
                          uint64_t *ret_first, uint64_t *ret_end)
{
    uint64_t size = atomic_load(&b->size);
    if (offset >= size || !bytes) {
        return false;
    }
    uint64_t end = offset + MIN(bytes, size - offset);
    *ret_first = offset >> b->granularity_bits;
    *ret_end = ((end - 1) >> b->granularity_bits) + 1;
    return true;
}

static int change_range(BdrvDirtyBits *b, const Change *c, uint64_t offset, uint64_t bytes)
{
    uint64_t first, end;
    int ret = bdrv_dirty_bits_begin(b);
    if (ret < 0 || !bits_of_range(b, offset, bytes, &first, &end)) {
        return ret;
    }
    return change_bits(b, c, first, end);
}

int bdrv_dirty_bits_set(BdrvDirtyBits *b, uint64_t offset, uint64_t bytes)
{
    return change_range(b, &change_set, offset, bytes);
}

int bdrv_dirty_bits_reset(BdrvDirtyBits *b, uint64_t offset, uint64_t bytes)
{
    assert(qb_is_aligned(offset, UINT64_C(1) << b->granularity_bits));
    return change_range(b, &change_reset, offset, bytes);
}

static void clear_slot(Slot *slot)
{
    uintptr_t value = atomic_load(slot);
    if (value == SLOT_ZEROES) {
        return;
    }
    free_page(slot);
    atomic_store(slot, SLOT_ZEROES | SLOT_CHANGED);
}

int bdrv_dirty_bits_clear(BdrvDirtyBits *b)
{
    int ret = bdrv_dirty_bits_begin(b);
    if (ret == 0) {
        for_each_slot(b, clear_slot);
    }
    return ret;
}

int bdrv_dirty_bits_truncate(BdrvDirtyBits *b, uint64_t size)
{
    int ret = bdrv_dirty_bits_begin(b);
    if (ret < 0) {
        return ret;
    }
    uint64_t old = nb_bits(b, atomic_load(&b->size)), new = nb_bits(b, size);
    if (new < old) {
        ret = change_bits(b, &change_reset, new, old); /* invariant 2 */
    } else if (new > old && old % PAGE_BITS && slot_value(b, old / PAGE_BITS) == SLOT_UNREAD) {
        ret = read_pages(b, old / PAGE_BITS, 1); /* what is stored behind the old end counts not */
    }
    if (ret == 0) {
        atomic_store(&b->size, size);
    }
    return ret;
}

/* ---------------------------------------------------------------- looking */

int bdrv_dirty_bits_covers(BdrvDirtyBits *b, uint64_t offset, uint64_t bytes)
{
    uint64_t first, end;
    int ret = bdrv_dirty_bits_begin(b);
    if (ret < 0 || !bits_of_range(b, offset, bytes, &first, &end)) {
        return ret < 0 ? ret : 1;
    }
    for (uint64_t page = first / PAGE_BITS; page * PAGE_BITS < end; page++) {
        unsigned from = (unsigned)(MAX(first, page * PAGE_BITS) % PAGE_BITS);
        unsigned to = (unsigned)MIN(end - page * PAGE_BITS, PAGE_BITS);
        uintptr_t value = slot_value(b, page);
        if (value == SLOT_UNREAD) {
            ret = read_pages(b, page, 1);
            if (ret < 0) {
                return ret;
            }
            value = slot_value(b, page);
        }
        bool set = is_page(value) ? words_are_set(as_page(value), from, to)
                                  : (value & SLOT_KIND) == SLOT_ONES;
        if (!set) {
            return 0;
        }
    }
    return 1;
}

bool bdrv_dirty_bits_at_hand(BdrvDirtyBits *b, uint64_t offset, uint64_t bytes, bool *ret_covered)
{
    uint64_t first, end;
    *ret_covered = true;
    if (!atomic_load(&b->begun)) {
        return false;
    }
    if (!bits_of_range(b, offset, bytes, &first, &end)) {
        return true;
    }
    for (uint64_t page = first / PAGE_BITS; page * PAGE_BITS < end; page++) {
        if (slot_value(b, page) == SLOT_UNREAD) {
            return false;
        }
    }
    *ret_covered = bdrv_dirty_bits_covers(b, offset, bytes) == 1;
    return true;
}

/* The first bit of the page at or behind @from, and before @to, that is @set; @to: there is
 * none. */
static unsigned find_in_page(Page *p, unsigned from, unsigned to, bool set)
{
    for (unsigned w = from / 64; w * 64 < to; w++) {
        uint64_t word = atomic_load(&p->words[w]);
        word = (set ? word : ~word) & word_mask(w, from, to);
        if (word) {
            return w * 64 + (unsigned)__builtin_ctzll(word);
        }
    }
    return to;
}

/* The first bit in [bit, end) that is @set, else @end; or an error. */
static int find_bit(BdrvDirtyBits *b, uint64_t bit, uint64_t end, bool set, uint64_t *ret)
{
    while (bit < end) {
        uint64_t page = bit / PAGE_BITS;
        uintptr_t value = slot_value(b, page);
        if (value == SLOT_UNREAD) {
            int err = read_pages(b, page, READ_AHEAD);
            if (err < 0) {
                return err;
            }
            continue;
        }
        unsigned to = (unsigned)MIN(end - page * PAGE_BITS, PAGE_BITS), from = bit % PAGE_BITS;
        bool found = !is_page(value) && ((value & SLOT_KIND) == SLOT_ONES) == set;
        unsigned at = is_page(value) ? find_in_page(as_page(value), from, to, set)
                                     : found ? from : to;
        if (at < to) {
            *ret = page * PAGE_BITS + at;
            return 0;
        }
        bit = (set ? next_page(b, page) : page + 1) * PAGE_BITS;
    }
    *ret = end;
    return 0;
}

int bdrv_dirty_bits_next(BdrvDirtyBits *b, uint64_t offset, uint64_t end, uint64_t *ret_offset,
                         uint64_t *ret_bytes)
{
    uint64_t first, last, start, stop;
    int ret = bdrv_dirty_bits_begin(b);
    if (ret < 0 || offset >= end || !bits_of_range(b, offset, end - offset, &first, &last)) {
        return ret;
    }
    ret = find_bit(b, first, last, true, &start);
    if (ret < 0 || start == last) {
        return ret;
    }
    ret = find_bit(b, start, last, false, &stop);
    if (ret < 0) {
        return ret;
    }
    end = MIN(end, atomic_load(&b->size));
    *ret_offset = MAX(start << b->granularity_bits, offset);
    *ret_bytes = (stop == last ? end : stop << b->granularity_bits) - *ret_offset;
    return 1;
}

/* ---------------------------------------------------------------- merging */

/* The page to change bits of; NULL in *ret: all are set already. */
static int page_to_write(BdrvDirtyBits *b, uint64_t page, Page **ret)
{
    Slot *slot = get_slot(b, page);
    int err = slot ? 0 : -ENOMEM;
    while (err == 0) {
        uintptr_t value = atomic_load(slot);
        if (is_page(value) || (value & SLOT_KIND) == SLOT_ONES) {
            *ret = is_page(value) ? as_page(value) : NULL;
            return 0;
        }
        err = (value & SLOT_KIND) == SLOT_UNREAD ? read_pages(b, page, READ_AHEAD)
                                                 : make_page(slot, value, 0);
    }
    return err;
}

static int merge_page(BdrvDirtyBits *to, uint64_t page, Page *from)
{
    Page *p;
    int ret = page_to_write(to, page, &p);
    for (unsigned w = 0; ret == 0 && p && w < PAGE_WORDS; w++) {
        uint64_t word = atomic_load(&from->words[w]);
        if (word & ~atomic_load(&p->words[w])) {
            atomic_fetch_or(&p->words[w], word);
            atomic_store(&p->changed, true);
        }
    }
    return ret;
}

/* Same granularity: page by page. */
static int merge_pages(BdrvDirtyBits *to, BdrvDirtyBits *from)
{
    uint64_t end = nb_pages(from);
    uint64_t page = 0;
    while (page < end) {
        uintptr_t value = slot_value(from, page);
        int ret = 0;
        if (value == SLOT_UNREAD) {
            ret = read_pages(from, page, READ_AHEAD);
        } else if (is_page(value)) {
            ret = merge_page(to, page, as_page(value));
            page++;
        } else if ((value & SLOT_KIND) == SLOT_ONES) {
            uint64_t bits = nb_bits(to, atomic_load(&to->size));
            ret = change_bits(to, &change_set, page * PAGE_BITS,
                              MIN((page + 1) * PAGE_BITS, bits));
            page++;
        } else {
            page = next_page(from, page);
        }
        if (ret < 0) {
            return ret;
        }
    }
    return 0;
}

/* Other granularity: extent by extent. */
static int merge_extents(BdrvDirtyBits *to, BdrvDirtyBits *from)
{
    uint64_t size = atomic_load(&from->size), offset = 0, at, bytes;
    int ret;
    while ((ret = bdrv_dirty_bits_next(from, offset, size, &at, &bytes)) > 0) {
        ret = bdrv_dirty_bits_set(to, at, bytes);
        if (ret < 0) {
            return ret;
        }
        offset = at + bytes;
    }
    return ret;
}

int bdrv_dirty_bits_merge(BdrvDirtyBits *to, BdrvDirtyBits *from)
{
    assert(atomic_load(&to->size) == atomic_load(&from->size));
    int ret = bdrv_dirty_bits_begin(to);
    ret = ret < 0 ? ret : bdrv_dirty_bits_begin(from);
    if (ret < 0 || to == from) {
        return ret;
    }
    return to->granularity_bits == from->granularity_bits ? merge_pages(to, from)
                                                          : merge_extents(to, from);
}

/* ---------------------------------------------------------------- storing */

static bool slot_changed(uintptr_t value)
{
    return is_page(value) ? atomic_load(&as_page(value)->changed) : (value & SLOT_CHANGED) != 0;
}

/* Bits [from, to) of a page that is in memory. */
static void look_at_page(uintptr_t value, unsigned from, unsigned to, BdrvDirtyLook *look)
{
    bool zeroes = (value & SLOT_KIND) == SLOT_ZEROES, ones = (value & SLOT_KIND) == SLOT_ONES;
    if (is_page(value)) {
        zeroes = look->all_zeroes && find_in_page(as_page(value), from, to, true) == to;
        ones = look->all_ones && words_are_set(as_page(value), from, to);
    }
    look->all_zeroes &= zeroes;
    look->all_ones &= ones;
}

BdrvDirtyLook bdrv_dirty_bits_look(BdrvDirtyBits *b, uint64_t pos, uint64_t bytes)
{
    BdrvDirtyLook look = {.all_zeroes = true, .all_ones = true};
    uint64_t end = pos + bytes;
    for (uint64_t page = pos / PAGE_BYTES; page * PAGE_BYTES < end; page++) {
        uintptr_t value = slot_value(b, page);
        look.changed |= slot_changed(value);
        look.unread |= value == SLOT_UNREAD;
    }
    look.all_zeroes = look.all_ones = look.changed && !look.unread; /* of no interest otherwise */
    while (pos < end && (look.all_zeroes || look.all_ones)) {
        uint64_t page = pos / PAGE_BYTES, stop = MIN(end, (page + 1) * PAGE_BYTES);
        look_at_page(slot_value(b, page), (unsigned)(pos % PAGE_BYTES * 8),
                     (unsigned)((stop - page * PAGE_BYTES) * 8), &look);
        pos = stop;
    }
    return look;
}

bool bdrv_dirty_bits_next_changed(BdrvDirtyBits *b, uint64_t pos, uint64_t end, uint64_t *ret_pos,
                                  uint64_t *ret_bytes)
{
    while (pos < end && !slot_changed(slot_value(b, pos / PAGE_BYTES))) {
        pos = (pos / PAGE_BYTES + 1) * PAGE_BYTES;
    }
    uint64_t stop = pos;
    while (stop < end && slot_changed(slot_value(b, stop / PAGE_BYTES))) {
        stop = (stop / PAGE_BYTES + 1) * PAGE_BYTES;
    }
    *ret_pos = pos;
    *ret_bytes = MIN(stop, end) - MIN(pos, end);
    return *ret_bytes > 0;
}

void bdrv_dirty_bits_serialise(BdrvDirtyBits *b, uint64_t pos, size_t bytes, uint8_t *buf)
{
    assert(pos % 8 == 0 && bytes % 8 == 0);
    for (size_t i = 0; i < bytes; i += 8) {
        uint64_t at = pos + i;
        uintptr_t value = slot_value(b, at / PAGE_BYTES);
        assert(value != SLOT_UNREAD);
        uint64_t word = (value & SLOT_KIND) == SLOT_ONES ? UINT64_MAX : 0;
        if (is_page(value)) {
            word = atomic_load(&as_page(value)->words[at % PAGE_BYTES / 8]);
        }
        qb_stle64(buf + i, word);
    }
}

static void mark_slot_stored(Slot *slot)
{
    uintptr_t value = atomic_load(slot);
    if (is_page(value)) {
        atomic_store(&as_page(value)->changed, false);
    } else {
        atomic_store(slot, value & ~(uintptr_t)SLOT_CHANGED);
    }
}

void bdrv_dirty_bits_mark_stored(BdrvDirtyBits *b)
{
    for_each_slot(b, mark_slot_stored);
}
