/*
 * Pieces of tables in memory.
 *
 *     by_offset:  file offset -> page, a part of an L1 or L2 table of at most 64 KiB
 *
 *     (absent) --get--> loading --> ready <--set/collect--> ready, dirty
 *                         |  \-- read failed --.                |
 *                         '------- drop -------+---> gone  <----'  freed with its last pin
 *
 * A table can be 1 GiB long, most of it never looked at; pages keep memory bounded by what is used.
 * Pages hold the bytes as they are on disk.
 *
 * Invariants
 *  1. A page that is pinned or dirty stays in memory, so what it says and what the disk says differ
 *     only as long as it can be found.  Pieces on their way to the disk pin their page.
 *  2. A page that is gone is in no list: it is not written and not found, whoever still pins it.
 *  3. Nobody waits for a page while holding the lock for anything else; the cache grows over its
 *     limit rather than wait for someone to let go.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qed.h"

#include <string.h>

#define CACHE_LIMIT (64u << 20) /* bytes of clean pages that are kept */
#define DIRTY_LIMIT (16u << 20)
#define SECTOR 512u
#define MAX_SECTORS 128 /* of a page */

typedef enum PageState { PAGE_LOADING, PAGE_READY, PAGE_GONE } PageState;

struct QedPage {
    BDRVQedState *s;
    uint64_t offset;
    uint8_t *data;
    unsigned pins;
    PageState state;
    int error;     /* of loading, when that made it go */
    bool is_dirty; /* listed in pages.dirty */
    uint8_t dirty[MAX_SECTORS];
    GList link;    /* in pages.lru */
};

/* ---------------------------------------------------------------- life */

void qed_pages_init(BDRVQedState *s)
{
    s->pages.by_offset = g_hash_table_new(g_int64_hash, g_int64_equal);
    g_queue_init(&s->pages.lru);
    s->pages.dirty = g_ptr_array_new();
}

static QedPage *page_new(BDRVQedState *s, uint64_t offset)
{
    QedPage *page = g_new0(QedPage, 1);
    page->s = s;
    page->offset = offset;
    page->data = qb_try_memalign(4096, s->page_bytes);
    page->link.data = page;
    return page;
}

static void page_free(QedPage *page)
{
    assert(page->pins == 0);
    free(page->data);
    g_free(page);
}

/* Takes it out of everything (invariant 2). */
static void make_gone_locked(BDRVQedState *s, QedPage *page) QB_REQUIRES(s->lock)
{
    assert(page->state != PAGE_GONE);
    page->state = PAGE_GONE;
    g_hash_table_remove(s->pages.by_offset, &page->offset);
    g_queue_unlink(&s->pages.lru, &page->link);
    if (page->is_dirty) {
        g_ptr_array_remove_fast(s->pages.dirty, page);
        page->is_dirty = false;
    }
    if (page->pins == 0) {
        page_free(page);
    }
}

void qed_pages_free(BDRVQedState *s)
{
    if (!s->pages.by_offset) {
        return;
    }
    qb_mutex_lock(&s->lock);
    while (s->pages.lru.head) {
        make_gone_locked(s, s->pages.lru.head->data);
    }
    qb_mutex_unlock(&s->lock);
    g_clear_pointer(&s->pages.by_offset, g_hash_table_unref);
    g_ptr_array_free(g_steal_pointer(&s->pages.dirty), true);
}

/* Drops clean pages that nobody uses, oldest first, as long as there are too many. */
static void trim_locked(BDRVQedState *s) QB_REQUIRES(s->lock)
{
    GList *next, *l = s->pages.lru.head;
    guint limit = CACHE_LIMIT / (guint)s->page_bytes;
    for (; l && s->pages.lru.length > limit; l = next) {
        QedPage *page = l->data;
        next = l->next;
        if (page->pins == 0 && !page->is_dirty) {
            make_gone_locked(s, page);
        }
    }
}

/* ---------------------------------------------------------------- pins */

static void unpin_locked(BDRVQedState *s, QedPage *page) QB_REQUIRES(s->lock)
{
    assert(page->pins > 0);
    if (--page->pins == 0 && page->state == PAGE_GONE) {
        page_free(page);
    }
}

void qed_page_put(QedPage *page)
{
    if (page) {
        BDRVQedState *s = page->s;
        QB_GUARD(&s->lock);
        unpin_locked(s, page);
    }
}

/* Reads it; the pin is the caller's. Others wait meanwhile. */
static void load_locked(BDRVQedState *s, QedPage *page) QB_REQUIRES(s->lock)
{
    qb_mutex_unlock(&s->lock);
    bdrv_debug_event(s->bs->file, "l2_load");
    int ret = !page->data ? -ENOMEM
                          : bdrv_pread(s->bs->file, (int64_t)page->offset, (int64_t)s->page_bytes,
                                       page->data, 0);
    qb_mutex_lock(&s->lock);
    page->error = ret;
    if (page->state == PAGE_LOADING && ret == 0) {
        page->state = PAGE_READY;
    } else if (page->state == PAGE_LOADING) {
        make_gone_locked(s, page);
    }
    qb_cond_broadcast(&s->changed);
}

/* Found or new, pinned. */
static QedPage *pin_locked(BDRVQedState *s, uint64_t offset) QB_REQUIRES(s->lock)
{
    QedPage *page = g_hash_table_lookup(s->pages.by_offset, &offset);
    if (page) {
        g_queue_unlink(&s->pages.lru, &page->link);
        g_queue_push_tail_link(&s->pages.lru, &page->link);
        page->pins++;
        return page;
    }
    trim_locked(s);
    page = page_new(s, offset);
    page->pins = 1;
    g_hash_table_insert(s->pages.by_offset, &page->offset, page);
    g_queue_push_tail_link(&s->pages.lru, &page->link);
    load_locked(s, page);
    return page;
}

int qed_page_get(BDRVQedState *s, uint64_t offset, QedPage **ret)
{
    QB_GUARD(&s->lock);
    QedPage *page = pin_locked(s, offset);
    while (page->state == PAGE_LOADING) {
        qb_cond_wait(&s->changed, &s->lock);
    }
    int error = page->error;
    if (error < 0) {
        unpin_locked(s, page);
        return error;
    }
    *ret = page;
    return 0;
}

/* ---------------------------------------------------------------- entries */

bool qed_page_gone_locked(const QedPage *page)
{
    qb_mutex_assert_held(&page->s->lock);
    return page->state == PAGE_GONE;
}

uint64_t qed_page_entry_locked(const QedPage *page, unsigned index)
{
    assert(index < page->s->page_bytes / QED_ENTRY_BYTES);
    return qb_ldle64(page->data + (size_t)index * QED_ENTRY_BYTES);
}

void qed_page_set_locked(QedPage *page, unsigned index, uint64_t entry)
{
    size_t pos = (size_t)index * QED_ENTRY_BYTES;
    qb_mutex_assert_held(&page->s->lock);
    assert(page->state == PAGE_READY && pos < page->s->page_bytes);
    qb_stle64(page->data + pos, entry);
    page->dirty[pos / SECTOR] = 1;
    if (!page->is_dirty) {
        page->is_dirty = true;
        g_ptr_array_add(page->s->pages.dirty, page);
    }
}

void qed_pages_drop_locked(BDRVQedState *s, uint64_t offset, uint64_t bytes)
{
    qb_mutex_assert_held(&s->lock);
    for (uint64_t pos = offset; pos < offset + bytes; pos += s->page_bytes) {
        QedPage *page = g_hash_table_lookup(s->pages.by_offset, &pos);
        if (page) {
            make_gone_locked(s, page);
        }
    }
}

void qed_pages_overlay(BDRVQedState *s, uint64_t offset, size_t bytes, uint8_t *buf)
{
    QB_GUARD(&s->lock);
    for (uint64_t pos = 0; pos < bytes; pos += s->page_bytes) {
        uint64_t key = offset + pos;
        const QedPage *page = g_hash_table_lookup(s->pages.by_offset, &key);
        if (page && page->state == PAGE_READY) {
            memcpy(buf + pos, page->data, MIN(s->page_bytes, bytes - pos));
        }
    }
}

/* ---------------------------------------------------------------- writing back */

bool qed_pages_too_dirty(BDRVQedState *s)
{
    QB_GUARD(&s->lock);
    return s->pages.dirty->len > DIRTY_LIMIT / s->page_bytes;
}

/* Runs of dirty sectors become pieces. */
static void collect_page_locked(BDRVQedState *s, QedPage *page, GArray *pieces)
    QB_REQUIRES(s->lock)
{
    size_t sectors = s->page_bytes / SECTOR;
    for (size_t i = 0; i < sectors; i++) {
        size_t first = i;
        while (i < sectors && page->dirty[i]) {
            page->dirty[i++] = 0;
        }
        if (i > first) {
            QedPiece piece = {.page = page, .offset = page->offset + first * SECTOR,
                              .bytes = (i - first) * SECTOR};
            piece.data = g_memdup2(page->data + first * SECTOR, piece.bytes);
            page->pins++;
            g_array_append_val(pieces, piece);
        }
    }
}

void qed_pages_collect_locked(BDRVQedState *s, GArray *pieces)
{
    qb_mutex_assert_held(&s->lock);
    for (guint i = 0; i < s->pages.dirty->len; i++) {
        QedPage *page = g_ptr_array_index(s->pages.dirty, i);
        collect_page_locked(s, page, pieces);
        page->is_dirty = false;
    }
    g_ptr_array_set_size(s->pages.dirty, 0);
}

static void make_dirty_again_locked(BDRVQedState *s, const QedPiece *piece)
    QB_REQUIRES(s->lock)
{
    QedPage *page = piece->page;
    size_t first = (piece->offset - page->offset) / SECTOR;
    memset(page->dirty + first, 1, piece->bytes / SECTOR);
    if (!page->is_dirty) {
        page->is_dirty = true;
        g_ptr_array_add(s->pages.dirty, page);
    }
}

void qed_pages_return(BDRVQedState *s, GArray *pieces, bool failed)
{
    QB_GUARD(&s->lock);
    for (guint i = 0; i < pieces->len; i++) {
        const QedPiece *piece = &g_array_index(pieces, QedPiece, i);
        if (failed && piece->page->state == PAGE_READY) {
            make_dirty_again_locked(s, piece);
        }
        unpin_locked(s, piece->page);
        g_free(piece->data);
    }
    g_array_set_size(pieces, 0);
}
