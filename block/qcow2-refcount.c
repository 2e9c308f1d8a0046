/*
 * Refcounts in bulk: reading runs of counts, and changing the counts of many host runs.
 *
 *      runs --sort--> pass 1: every cluster's new count fits?     (nothing changed yet)
 *                 --> pass 2: change, one block at a time
 *
 * Counts are stored as on disk, 1 to 64 bits wide: below 8 bits the lowest slot is in the lowest
 * bits, from 8 bits on they are big-endian.
 *
 * Invariants
 * 1. Only blocks in the cache are changed, under the alloc lock; the flush writes them.  (Counts of
 *    whole trees go to the file by themselves: qcow2-refcount-bulk.c.)
 * 2. An overflow or underflow is found before the first change, so that such a call changed
 *    nothing. The caller sees to it that nobody else changes the same counts in between (whole node
 *    in the range lock, or the flusher's turn).  Blocks that cannot be read are met there too;
 *    should one be dropped from memory and fail to come back between the passes, the rest of the
 *    counts stays as it was.
 * 3. Underflow, or raising the count of a cluster that has no refcount block, means that the counts
 *    on disk are wrong: the image is marked corrupt.
 * 4. The free-space index hears of every count that becomes 0.
 *
 * Counts are compared and set eight bytes at a time where they are alike: 16 million of them, those of
 * 1 TiB, are read or changed in some milliseconds.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-refcount-int.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* ---- the codec of a count ---- */

uint64_t qcow2_refcount_read(const uint8_t *block, unsigned order, uint64_t slot)
{
    switch (order) {
    case 3:
        return block[slot];
    case 4:
        return qb_ldbe16(block + 2 * slot);
    case 5:
        return qb_ldbe32(block + 4 * slot);
    case 6:
        return qb_ldbe64(block + 8 * slot);
    default: {
        unsigned bits = 1u << order, shift = (unsigned)(slot << order & 7);
        return (block[slot << order >> 3] >> shift) & ((1u << bits) - 1);
    }
    }
}

void qcow2_refcount_write(uint8_t *block, unsigned order, uint64_t slot, uint64_t value)
{
    assert(order >= 6 || value >> (1u << order) == 0);
    switch (order) {
    case 3:
        block[slot] = (uint8_t)value;
        break;
    case 4:
        qb_stbe16(block + 2 * slot, (uint16_t)value);
        break;
    case 5:
        qb_stbe32(block + 4 * slot, (uint32_t)value);
        break;
    case 6:
        qb_stbe64(block + 8 * slot, value);
        break;
    default: {
        unsigned bits = 1u << order, shift = (unsigned)(slot << order & 7);
        uint8_t *byte = &block[slot << order >> 3];
        *byte = (uint8_t)((*byte & ~(((1u << bits) - 1) << shift)) | value << shift);
    }
    }
}

/* ---- many counts ---- */

/* Eight bytes of counts that are all @value. */
static uint64_t word_of(unsigned order, uint64_t value)
{
    uint8_t bytes[8] = {0};
    uint64_t word;

    for (uint64_t slot = 0; slot < UINT64_C(64) >> order; slot++) {
        qcow2_refcount_write(bytes, order, slot, value);
    }
    memcpy(&word, bytes, sizeof(word));
    return word;
}

static bool all_are(const uint8_t *data, unsigned n, uint64_t word)
{
    uint64_t differs = 0;

    for (unsigned i = 0; i < n; i++) {
        uint64_t next;
        memcpy(&next, data + 8 * i, sizeof(next));
        differs |= next ^ word;
    }
    return differs == 0;
}

/* How many words of those at @data, at most @max, are @word. */
static uint64_t equal_words(const uint8_t *data, uint64_t max, uint64_t word)
{
    enum { SPAN = 32 }; /* one look for that many */
    uint64_t n = 0;

    while (max - n >= SPAN && all_are(data + 8 * n, SPAN, word)) {
        n += SPAN;
    }
    while (n < max && all_are(data + 8 * n, 1, word)) {
        n++;
    }
    return n;
}

uint64_t qcow2_equal_counts(const uint8_t *data, unsigned order, uint64_t slot, uint64_t max,
                            uint64_t *ret_count)
{
    uint64_t per_word = UINT64_C(64) >> order, end = slot + max, pos = slot + 1;
    uint64_t count = qcow2_refcount_read(data, order, slot);
    bool by_words = false;

    *ret_count = count;
    while (pos < end && qcow2_refcount_read(data, order, pos) == count) {
        pos++;
        if (!by_words && pos % per_word == 0) {
            pos += per_word * equal_words(data + (pos << order >> 3), (end - pos) / per_word,
                                          word_of(order, count));
            by_words = true;
        }
    }
    return pos - slot;
}

void qcow2_fill_counts(uint8_t *data, unsigned order, uint64_t slot, uint64_t n, uint64_t value)
{
    uint64_t per_word = UINT64_C(64) >> order, end = slot + n;

    while (slot < end && (slot % per_word || end - slot < per_word)) {
        qcow2_refcount_write(data, order, slot++, value);
    }
    if (slot < end) {
        uint64_t word = word_of(order, value);
        for (; end - slot >= per_word; slot += per_word) {
            memcpy(data + (slot << order >> 3), &word, sizeof(word));
        }
    }
    while (slot < end) {
        qcow2_refcount_write(data, order, slot++, value);
    }
}

/* No stream may be put behind one in a cluster that nobody uses any more. */
static void forget_compressed_next(BDRVQcow2State *s, uint64_t index, uint64_t slot, uint64_t n)
{
    uint64_t cluster = s->compressed_next >> s->cluster_bits;
    uint64_t first = index * qcow2_counts_per_block(s) + slot;

    if (s->compressed_next && cluster >= first && cluster - first < n) {
        s->compressed_next = 0;
    }
}

static size_t byte_of_slot(const BDRVQcow2State *s, uint64_t slot)
{
    return (size_t)(slot << s->refcount_order >> 3);
}

static void mark_slots_dirty(const BDRVQcow2State *s, Qcow2Table *t, uint64_t slot, uint64_t n)
{
    size_t width = MAX((1u << s->refcount_order) / 8, 1);
    size_t first = byte_of_slot(s, slot), last = byte_of_slot(s, slot + n - 1) + width;

    qcow2_table_mark_dirty(t, first, last - first);
}

void qcow2_set_counts_locked(BDRVQcow2State *s, Qcow2Table *t, uint64_t index, uint64_t slot,
                             uint64_t n, uint64_t value)
{
    if (n == 0) {
        return;
    }
    qcow2_fill_counts(qcow2_refblock_data(t), s->refcount_order, slot, n, value);
    mark_slots_dirty(s, t, slot, n);
    s->alloc_seq++; /* who is about to cut the file looks again */
    if (value == 0) {
        forget_compressed_next(s, index, slot, n);
        qcow2_free_index_freed(s->free_index, index, slot, n, qcow2_counts_per_block(s));
    }
}

/* ---- reading ---- */

static int pin_if_there(BDRVQcow2State *s, uint64_t index, Qcow2Table **ret)
{
    QB_GUARD(&s->alloc_lock);
    bool dropped;

    *ret = NULL;
    return qcow2_block_offset_locked(s, index) ? qcow2_pin_block_locked(s, index, ret, &dropped)
                                               : 0;
}

static uint64_t equal_slots(BDRVQcow2State *s, Qcow2Table *t, uint64_t slot, uint64_t max,
                            uint64_t *ret_count)
{
    QB_GUARD(&s->alloc_lock);

    return qcow2_equal_counts(qcow2_refblock_data(t), s->refcount_order, slot, max, ret_count);
}

int qcow2_count_run(BlockDriverState *bs, uint64_t offset, uint64_t bytes, uint64_t *ret_count,
                    uint64_t *ret_bytes)
{
    BDRVQcow2State *s = qcow2_state(bs);
    uint64_t cluster = offset >> s->cluster_bits, slot = qcow2_slot_of(s, cluster);
    uint64_t max = MIN(bytes >> s->cluster_bits, qcow2_counts_per_block(s) - slot);
    g_autoptr(Qcow2Table) t = NULL;
    int ret = pin_if_there(s, qcow2_block_of(s, cluster), &t);

    if (ret < 0) {
        return ret;
    }
    *ret_count = 0;
    *ret_bytes = (t ? equal_slots(s, t, slot, max, ret_count) : max) << s->cluster_bits;
    return 0;
}

int qcow2_get_refcount(BlockDriverState *bs, uint64_t index, uint64_t *ret)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    uint64_t bytes;

    return qcow2_count_run(bs, index << s->cluster_bits, s->cluster_size, ret, &bytes);
}

/* ---- changing ---- */

static gint compare_runs(gconstpointer a, gconstpointer b)
{
    const Qcow2HostRun *x = a, *y = b;

    return x->offset < y->offset ? -1 : x->offset > y->offset;
}

/* One block's part of a run. */
typedef struct Part {
    uint64_t index, slot, n;
} Part;

static int underflow(BDRVQcow2State *s, uint64_t cluster)
{
    return qcow2_signal_corruption(s->bs, true, (int64_t)(cluster << s->cluster_bits),
                                   "Refcount of the cluster at offset %#" PRIx64
                                   " is lower than the number of references",
                                   cluster << s->cluster_bits);
}

/* 0 if all counts of the part can take @delta, else the first that cannot is in *@ret_misfit:
 * -EINVAL if it has no room, -EIO if it is too low. A cluster whose count is to be raised is in use
 * already, so that a count of 0 is as wrong as one that cannot be lowered. */
static int judge_counts(BDRVQcow2State *s, Qcow2Table *t, const Part *p, int delta,
                        uint64_t *ret_misfit)
{
    QB_GUARD(&s->alloc_lock);
    const uint8_t *data = qcow2_refblock_data(t);
    uint64_t need = delta < 0 ? (uint64_t)-(int64_t)delta : 1;
    uint64_t more = delta > 0 ? (uint64_t)delta : 0;

    for (uint64_t i = 0, n, count; i < p->n; i += n) {
        n = qcow2_equal_counts(data, s->refcount_order, p->slot + i, p->n - i, &count);
        if (count < need || more > s->refcount_max - count) {
            *ret_misfit = i;
            return count < need ? -EIO : -EINVAL;
        }
    }
    return 0;
}

static int judge_part(BDRVQcow2State *s, const Part *p, int delta)
{
    uint64_t cluster = p->index * qcow2_counts_per_block(s) + p->slot, misfit = 0;
    g_autoptr(Qcow2Table) t = NULL;
    int ret = pin_if_there(s, p->index, &t);

    if (ret < 0) {
        return ret;
    }
    if (!t) { /* a cluster in use has no count; a block made for it might be put on top of it */
        return underflow(s, cluster);
    }
    ret = judge_counts(s, t, p, delta, &misfit);
    return ret == -EIO ? underflow(s, cluster + misfit) : ret;
}

static void change_counts_locked(BDRVQcow2State *s, Qcow2Table *t, const Part *p, int delta)
{
    uint8_t *data = qcow2_refblock_data(t);

    qb_mutex_assert_held(&s->alloc_lock);
    for (uint64_t slot = p->slot, end = p->slot + p->n, n, count; slot < end; slot += n) {
        n = qcow2_equal_counts(data, s->refcount_order, slot, end - slot, &count);
        count += (uint64_t)(int64_t)delta;
        qcow2_fill_counts(data, s->refcount_order, slot, n, count);
        if (count == 0) {
            forget_compressed_next(s, p->index, slot, n);
            qcow2_free_index_freed(s->free_index, p->index, slot, n, qcow2_counts_per_block(s));
        }
    }
    mark_slots_dirty(s, t, p->slot, p->n);
    s->alloc_seq += delta > 0;
}

static int change_part(BDRVQcow2State *s, const Part *p, int delta)
{
    QB_GUARD(&s->alloc_lock);
    g_autoptr(Qcow2Table) t = NULL;
    bool dropped;
    int ret = qcow2_pin_block_locked(s, p->index, &t, &dropped);

    if (ret == 0) {
        change_counts_locked(s, t, p, delta);
    }
    return ret;
}

/* Calls @fn for each block's part of each run. */
static int for_each_part(BDRVQcow2State *s, const Qcow2HostRun *runs, size_t n, int delta,
                         int (*fn)(BDRVQcow2State *s, const Part *p, int delta))
{
    uint64_t per_block = qcow2_counts_per_block(s);

    for (size_t i = 0; i < n; i++) {
        uint64_t cluster = runs[i].offset >> s->cluster_bits;
        uint64_t end = (runs[i].offset + runs[i].bytes - 1) >> s->cluster_bits;
        while (cluster <= end) {
            Part p = {qcow2_block_of(s, cluster), qcow2_slot_of(s, cluster), 0};
            int ret;
            p.n = MIN(end + 1 - cluster, per_block - p.slot);
            ret = fn(s, &p, delta);
            if (ret < 0) {
                return ret;
            }
            cluster += p.n;
        }
    }
    return 0;
}

int qcow2_judge_refcounts(BlockDriverState *bs, Qcow2HostRun *runs, size_t n, int delta)
{
    assert(delta != 0);
    qsort(runs, n, sizeof(*runs), compare_runs);
    return for_each_part(qcow2_state(bs), runs, n, delta, judge_part);
}

int qcow2_update_refcounts(BlockDriverState *bs, Qcow2HostRun *runs, size_t n, int delta)
{
    int ret = qcow2_judge_refcounts(bs, runs, n, delta);

    return ret < 0 ? ret : for_each_part(qcow2_state(bs), runs, n, delta, change_part);
}

/* ---- the end of what is used ---- */

/* One more than the last slot with a count, 0: none. */
static uint64_t last_slot(BDRVQcow2State *s, Qcow2Table *t)
{
    QB_GUARD(&s->alloc_lock);
    const uint8_t *data = qcow2_refblock_data(t);
    uint64_t slot = qcow2_counts_per_block(s);

    while (slot > 0 && !qcow2_refcount_read(data, s->refcount_order, slot - 1)) {
        slot--;
    }
    return slot;
}

static uint64_t nb_blocks(BDRVQcow2State *s)
{
    QB_GUARD(&s->alloc_lock);

    return s->reftable.nb_blocks;
}

int qcow2_last_used_end(BlockDriverState *bs, uint64_t *ret)
{
    BDRVQcow2State *s = qcow2_state(bs);

    for (uint64_t index = nb_blocks(s); index > 0; index--) {
        g_autoptr(Qcow2Table) t = NULL;
        uint64_t slot;
        int err = pin_if_there(s, index - 1, &t);
        if (err < 0) {
            return err;
        }
        slot = t ? last_slot(s, t) : 0;
        if (slot) {
            *ret = ((index - 1) * qcow2_counts_per_block(s) + slot) << s->cluster_bits;
            return 0;
        }
    }
    *ret = 0;
    return 0;
}
