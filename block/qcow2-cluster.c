/*
 * The mapping, read: guest offset -> L1 -> L2 -> entry.
 *
 *      guest offset  | l1 index | l2 index | offset into cluster |
 *                        |          |            '--> subcluster (extended L2)
 *      L1 table  [ ...   e   ... ]  |
 *                        '--> L2 table [ ... entry, bitmap ... ] --> host cluster
 *
 * An entry is two words, the second one 0 without extended L2.  All code works on subclusters; an
 * image without them has one per cluster, which is the cluster.
 *
 * A look-up takes no metadata lock.  It is safe because
 *  1. the caller is announced, so no host cluster (of data or of a table) that was reachable when
 *     it began gets new content before it leaves;
 *  2. entries are copied out of a table under the cache's lock, both words of an entry at once;
 *  3. after copying it looks whether the table was poisoned or L1 names another one; if so, it
 *     starts again from L1.  A table that was taken out of L1 after that was right when it was
 *     read.  One that cannot be read, since it was taken out before it was ever written, is no
 *     corruption.
 * So every entry returned stood in the map at some moment after the caller announced itself.  Two
 * entries of one run may stem from two moments; requests that care have their range serialised.
 *
 * Impossible entries are judged here and nowhere else.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-io-int.h"

#define CHUNK_ENTRIES 512 /* copied out of a table at a time */
#define FIRST_CHUNK 8
#define CHUNK_BYTES (CHUNK_ENTRIES * 16)
#define ALLOC_BITS(bitmap) ((uint32_t)(bitmap))
#define ZERO_BITS(bitmap) ((uint32_t)((bitmap) >> QCOW2_SUBCLUSTERS))

/* --- entries --- */

bool qcow2_entry_has_host(const BDRVQcow2State *s, Qcow2L2Entry e)
{
    if (qcow2_entry_is_compressed(e)) {
        return false;
    }
    return qcow2_entry_host(e) || (s->has_data_file && (e.entry & QCOW2_ENTRY_COPIED));
}

bool qcow2_entry_copied(const BDRVQcow2State *s, Qcow2L2Entry e)
{
    return qcow2_entry_has_host(s, e) && (s->has_data_file || (e.entry & QCOW2_ENTRY_COPIED));
}

Qcow2L2Entry qcow2_entry_decode(const BDRVQcow2State *s, const void *raw)
{
    Qcow2L2Entry e = {.entry = qb_ldbe64(raw)};
    if (s->has_subclusters) {
        e.bitmap = qb_ldbe64((const uint8_t *)raw + 8);
    }
    return e;
}

void qcow2_entry_encode(const BDRVQcow2State *s, Qcow2L2Entry e, void *raw)
{
    qb_stbe64(raw, e.entry);
    if (s->has_subclusters) {
        qb_stbe64((uint8_t *)raw + 8, e.bitmap);
    }
}

static Qcow2ClusterType plain_entry_type(const BDRVQcow2State *s, Qcow2L2Entry e)
{
    bool host = qcow2_entry_has_host(s, e);
    if (e.entry & QCOW2_ENTRY_ZERO) {
        if (s->version < 3) {
            return QCOW2_INVALID;
        }
        return host ? QCOW2_ZERO_ALLOC : QCOW2_ZERO_PLAIN;
    }
    return host ? QCOW2_NORMAL : QCOW2_UNALLOCATED;
}

/* One bad pair of bits spoils the whole entry. */
static bool bitmap_is_valid(const BDRVQcow2State *s, Qcow2L2Entry e)
{
    uint32_t alloc = ALLOC_BITS(e.bitmap), zero = ZERO_BITS(e.bitmap);
    if (qcow2_entry_is_compressed(e)) {
        return e.bitmap == 0;
    }
    return !(alloc & zero) && (alloc == 0 || qcow2_entry_has_host(s, e));
}

Qcow2ClusterType qcow2_entry_type(const BDRVQcow2State *s, Qcow2L2Entry e, unsigned sc)
{
    assert(sc < s->subclusters_per_cluster);
    if (s->has_subclusters && !bitmap_is_valid(s, e)) {
        return QCOW2_INVALID;
    }
    if (qcow2_entry_is_compressed(e)) {
        return QCOW2_COMPRESSED;
    }
    if (!s->has_subclusters) {
        return plain_entry_type(s, e);
    }
    bool host = qcow2_entry_has_host(s, e);
    if (ALLOC_BITS(e.bitmap) >> sc & 1) {
        return QCOW2_NORMAL;
    }
    if (ZERO_BITS(e.bitmap) >> sc & 1) {
        return host ? QCOW2_ZERO_ALLOC : QCOW2_ZERO_PLAIN;
    }
    return host ? QCOW2_UNALLOCATED_ALLOC : QCOW2_UNALLOCATED;
}

/* Bits from @from on that equal bit @from. */
static unsigned equal_bits(uint32_t word, unsigned from)
{
    uint32_t rest = word >> from;
    uint32_t differs = rest & 1 ? ~rest : rest;
    unsigned n = differs ? (unsigned)__builtin_ctz(differs) : 32;
    return MIN(n, 32 - from);
}

unsigned qcow2_entry_run(const BDRVQcow2State *s, Qcow2L2Entry e, unsigned sc,
                         Qcow2ClusterType *ret)
{
    *ret = qcow2_entry_type(s, e, sc);
    if (!s->has_subclusters || qcow2_entry_is_compressed(e)) {
        return s->subclusters_per_cluster - sc;
    }
    return MIN(equal_bits(ALLOC_BITS(e.bitmap), sc), equal_bits(ZERO_BITS(e.bitmap), sc));
}

/* All subclusters of @e are of one type. */
static bool is_uniform(Qcow2L2Entry e)
{
    uint32_t alloc = ALLOC_BITS(e.bitmap), zero = ZERO_BITS(e.bitmap);
    return (alloc == 0 || alloc == UINT32_MAX) && (zero == 0 || zero == UINT32_MAX);
}

/* A stretch of entries, the first of which is @e, in look for those that continue it. */
typedef struct Alike {
    const BDRVQcow2State *s;
    const uint8_t *raw;
    Qcow2L2Entry e;
    uint64_t step; /* from one to the next */
} Alike;

/* The end of those from @n on that continue what is before them; at most @max. */
static inline unsigned follow_singly(const Alike *a, unsigned n, unsigned max)
{
    uint64_t expected = a->e.entry + n * a->step;
    for (; n < max; n++, expected += a->step) {
        const uint8_t *at = a->raw + (size_t)n * a->s->l2_entry_size;
        if (qb_ldbe64(at) != expected ||
            (a->s->has_subclusters && qb_ldbe64(at + 8) != a->e.bitmap)) {
            break;
        }
    }
    return n;
}

enum { SPAN = 16 }; /* entries for one look */

/* A pair of words as they stand in a table: an entry and its bitmap, or two entries. */
typedef uint64_t WordPair __attribute__((vector_size(16)));

static inline bool pairs_follow(const uint8_t *at, unsigned n, WordPair first,
                                const WordPair *steps)
{
    WordPair differs = {0};
    for (unsigned i = 0; i < n; i++) {
        WordPair words;
        memcpy(&words, at + i * sizeof(words), sizeof(words));
        differs |= words ^ first ^ steps[i];
    }
    return !(differs[0] | differs[1]);
}

/*
 * Same, by spans as long as all of one is alike. Where the first host cluster of a span is a
 * multiple of SPAN, the places of the others differ from it in bits that it has not set: so what
 * the disk has is compared as it is, without a sum or a swap for each.
 */
static unsigned follow_by_spans(const Alike *a, unsigned n, unsigned max)
{
    bool wide = a->s->has_subclusters;
    unsigned pairs = wide ? SPAN : SPAN / 2;
    WordPair steps[SPAN];
    for (unsigned i = 0; i < pairs; i++) {
        steps[i][0] = htobe64((wide ? i : i * 2) * a->step);
        steps[i][1] = wide ? 0 : htobe64((i * 2 + 1) * a->step);
    }
    for (; max - n >= SPAN; n += SPAN) {
        uint64_t entry = htobe64(a->e.entry + n * a->step);
        WordPair first = {entry, wide ? htobe64(a->e.bitmap) : entry};
        if (!pairs_follow(a->raw + (size_t)n * a->s->l2_entry_size, pairs, first, steps)) {
            break;
        }
    }
    return n;
}

unsigned qcow2_entries_alike(const BDRVQcow2State *s, const void *raw, unsigned max)
{
    Qcow2L2Entry e = qcow2_entry_decode(s, raw);
    if (qcow2_entry_is_compressed(e) || (s->has_subclusters && !is_uniform(e))) {
        return 1;
    }
    uint64_t cluster = qcow2_entry_host(e) >> s->cluster_bits;
    uint64_t room = (QCOW2_ENTRY_OFFSET_MASK >> s->cluster_bits) - cluster;
    max = (unsigned)MIN(max, room + 1); /* offsets do not run over into the bits above them */
    Alike a = {s, raw, e, qcow2_entry_has_host(s, e) ? s->cluster_size : 0};
    unsigned whole = a.step ? (unsigned)(-cluster % SPAN) : 0; /* where spans may begin */
    unsigned n = follow_singly(&a, 1, MIN(MAX(whole, 1), max));
    if (n >= whole && n < max) {
        n = follow_singly(&a, follow_by_spans(&a, whole, max), max);
    }
    return n;
}

void qcow2_parse_compressed(const BDRVQcow2State *s, uint64_t entry, uint64_t *ret_offset,
                            uint32_t *ret_bytes)
{
    assert(entry & QCOW2_ENTRY_COMPRESSED);
    uint64_t offset = entry & ((UINT64_C(1) << s->csize_shift) - 1);
    uint64_t sectors = ((entry >> s->csize_shift) & s->csize_mask) + 1;
    *ret_offset = offset;
    *ret_bytes = (uint32_t)(sectors * BDRV_SECTOR_SIZE - offset % BDRV_SECTOR_SIZE);
}

/* --- runs --- */

Qcow2Mapping qcow2_entry_mapping(const BDRVQcow2State *s, Qcow2L2Entry e, uint64_t guest,
                                 uint64_t end)
{
    assert(guest < end);
    uint64_t into = qcow2_offset_into_cluster(s, guest);
    unsigned sc = (unsigned)(into >> s->subcluster_bits);
    Qcow2Mapping m = {.guest = guest, .first = e};
    unsigned n = qcow2_entry_run(s, e, sc, &m.type);
    m.bytes = ((uint64_t)(sc + n) << s->subcluster_bits) - into;
    m.bytes = MIN(m.bytes, end - guest);
    if (m.type == QCOW2_COMPRESSED) {
        qcow2_parse_compressed(s, e.entry, &m.host, &m.comp_bytes);
    } else if (qcow2_entry_has_host(s, e)) {
        m.host = qcow2_entry_host(e) + into;
        m.copied = qcow2_entry_copied(s, e);
    }
    return m;
}

static bool type_has_host(Qcow2ClusterType type)
{
    return type == QCOW2_NORMAL || type == QCOW2_ZERO_ALLOC || type == QCOW2_UNALLOCATED_ALLOC;
}

bool qcow2_mapping_extend(Qcow2Mapping *m, const Qcow2Mapping *next)
{
    if (m->bytes == 0) {
        *m = *next;
        return true;
    }
    assert(next->guest == m->guest + m->bytes);
    if (next->type != m->type || m->type == QCOW2_COMPRESSED || m->type == QCOW2_INVALID) {
        return false;
    }
    bool contiguous = next->host == m->host + m->bytes && next->copied == m->copied;
    if (type_has_host(m->type) && !contiguous) {
        return false;
    }
    m->bytes += next->bytes;
    return true;
}

/* --- judging --- */

int qcow2_l1_entry_judge(BlockDriverState *bs, uint64_t l1_entry, uint64_t l1_index)
{
    uint64_t offset = l1_entry & QCOW2_ENTRY_OFFSET_MASK;
    if (qcow2_offset_into_cluster(qcow2_state(bs), offset) == 0) {
        return 0;
    }
    return qcow2_signal_corruption(bs, true, -1,
                                   "L2 table offset %#" PRIx64 " unaligned (L1 index: %#" PRIx64
                                   ")",
                                   offset, l1_index);
}

static int judge_compressed(BlockDriverState *bs, uint64_t l2_offset, unsigned index)
{
    if (!qcow2_state(bs)->has_data_file) {
        return 0;
    }
    return qcow2_signal_corruption(bs, true, -1,
                                   "Compressed cluster entry found in image with external data "
                                   "file (L2 offset: %#" PRIx64 ", L2 index: %#x)",
                                   l2_offset, index);
}

static int judge_invalid(BlockDriverState *bs, uint64_t l2_offset, unsigned index)
{
    if (!qcow2_state(bs)->has_subclusters) {
        return qcow2_signal_corruption(bs, true, -1,
                                       "Zero cluster entry found in pre-v3 image (L2 offset: "
                                       "%#" PRIx64 ", L2 index: %#x)",
                                       l2_offset, index);
    }
    return qcow2_signal_corruption(bs, true, -1,
                                   "Invalid cluster entry found  (L2 offset: %#" PRIx64
                                   ", L2 index: %#x)",
                                   l2_offset, index);
}

static int judge_host(BlockDriverState *bs, Qcow2L2Entry e, uint64_t guest, uint64_t l2_offset,
                      unsigned index)
{
    BDRVQcow2State *s = qcow2_state(bs);
    uint64_t host = qcow2_entry_host(e);
    bool zero = qcow2_type_is_zero(qcow2_entry_type(s, e, 0));
    if (qcow2_offset_into_cluster(s, host)) {
        return qcow2_signal_corruption(bs, true, -1,
                                       "%s offset %#" PRIx64 " unaligned (L2 offset: %#" PRIx64
                                       ", L2 index: %#x)",
                                       zero ? "Preallocated zero cluster" : "Cluster allocation",
                                       host, l2_offset, index);
    }
    if (s->has_data_file && host != guest) {
        return qcow2_signal_corruption(bs, true, -1,
                                       "External data file host cluster offset %#" PRIx64
                                       " does not match guest cluster offset: %#" PRIx64
                                       ", L2 index: %#x)",
                                       host, guest, index);
    }
    return 0;
}

int qcow2_entry_judge(BlockDriverState *bs, Qcow2L2Entry e, uint64_t guest, uint64_t l2_offset,
                      unsigned index)
{
    BDRVQcow2State *s = qcow2_state(bs);
    switch (qcow2_entry_type(s, e, 0)) {
    case QCOW2_INVALID:
        return judge_invalid(bs, l2_offset, index);
    case QCOW2_COMPRESSED:
        return judge_compressed(bs, l2_offset, index);
    default:
        return qcow2_entry_has_host(s, e) ? judge_host(bs, e, qcow2_start_of_cluster(s, guest),
                                                       l2_offset, index)
                                          : 0;
    }
}

/* --- walking down from L1 --- */

uint64_t qcow2_unmapped_by_l1(const BDRVQcow2State *s, uint64_t guest, uint64_t bytes)
{
    uint64_t size = qcow2_l1_size(s);
    uint64_t end = guest + bytes;
    uint64_t index = qcow2_l1_index(s, guest);
    uint64_t last = qcow2_l1_index(s, end - 1);
    assert(bytes > 0 && end > guest);
    while (index < size && index <= last
           && !(qcow2_l1_get(s, index) & QCOW2_ENTRY_OFFSET_MASK)) {
        index++;
    }
    if (index >= size || index > last) {
        return bytes;
    }
    uint64_t first_mapped = index << (s->cluster_bits + s->l2_bits);
    return first_mapped > guest ? first_mapped - guest : 0;
}

static Qcow2TableRange range_of_entries(const BDRVQcow2State *s, uint64_t l1_entry, uint64_t guest,
                                        size_t n)
{
    return qcow2_l2_range(s, l1_entry & QCOW2_ENTRY_OFFSET_MASK, qcow2_l2_index(s, guest), n);
}

int qcow2_pin_entries(BlockDriverState *bs, uint64_t l1_index, uint64_t l1_entry, Qcow2EntryRange r,
                      Qcow2Table **ret)
{
    BDRVQcow2State *s = qcow2_state(bs);
    uint64_t offset = l1_entry & QCOW2_ENTRY_OFFSET_MASK;
    Qcow2TableRange range = qcow2_l2_range(s, offset, r.index, r.n);
    int err = qcow2_l1_entry_judge(bs, l1_entry, l1_index);
    err = err < 0 ? err : qcow2_cache_get_part(s->cache, &range, ret);
    if (err != -ENXIO) {
        return err;
    }
    return (qcow2_l1_get(s, l1_index) & QCOW2_ENTRY_OFFSET_MASK) == offset
               ? qcow2_table_outside_file(bs, QCOW2_TABLE_L2, offset)
               : QCOW2_STALE;
}

static int get_entries(BlockDriverState *bs, uint64_t l1_entry, uint64_t guest, size_t n,
                       Qcow2Table **ret)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    Qcow2EntryRange r = {qcow2_l2_index(s, guest), n};
    return qcow2_pin_entries(bs, qcow2_l1_index(s, guest), l1_entry, r, ret);
}

/* Essay, point 3. */
static bool table_is_current(const BDRVQcow2State *s, const Qcow2Table *t, uint64_t l1_index)
{
    return (qcow2_l1_get(s, l1_index) & QCOW2_ENTRY_OFFSET_MASK) == qcow2_table_offset(t)
           && !qcow2_table_poisoned(t);
}

static void decode_entries(const BDRVQcow2State *s, const uint8_t *raw, size_t n, Qcow2L2Entry *ret)
{
    for (size_t i = 0; i < n; i++) {
        ret[i] = qcow2_entry_decode(s, raw + i * s->l2_entry_size);
    }
}

/* Copies up to @n entries from @index on; the number copied. */
static size_t copy_entries(const BDRVQcow2State *s, const Qcow2Table *t, unsigned index, size_t n,
                           Qcow2L2Entry *ret)
{
    uint8_t raw[CHUNK_BYTES];
    n = MIN(n, CHUNK_ENTRIES);
    assert(index + n <= s->l2_entries);
    qcow2_table_load(t, (size_t)index * s->l2_entry_size, n * s->l2_entry_size, raw);
    decode_entries(s, raw, n, ret);
    return n;
}

/* --- many entries --- */

/* @n entries of one table. QCOW2_STALE: the table is no longer the one in L1. */
static int load_from_table(BlockDriverState *bs, Qcow2Table *t, uint64_t guest, size_t n,
                           Qcow2L2Entry *ret)
{
    BDRVQcow2State *s = qcow2_state(bs);
    unsigned index = qcow2_l2_index(s, guest);
    for (size_t done = 0; done < n;) {
        done += copy_entries(s, t, index + (unsigned)done, n - done, ret + done);
    }
    if (!table_is_current(s, t, qcow2_l1_index(s, guest))) {
        return QCOW2_STALE;
    }
    int err = 0;
    for (size_t i = 0; i < n && err == 0; i++) {
        err = qcow2_entry_judge(bs, ret[i], guest + ((uint64_t)i << s->cluster_bits),
                                qcow2_table_offset(t), index + (unsigned)i);
    }
    return err;
}

static int load_of_one_l1_entry(BlockDriverState *bs, uint64_t guest, size_t n, Qcow2L2Entry *ret)
{
    BDRVQcow2State *s = qcow2_state(bs);
    uint64_t l1_index = qcow2_l1_index(s, guest);
    int err;
    do {
        uint64_t l1_entry = qcow2_l1_get(s, l1_index);
        if (!(l1_entry & QCOW2_ENTRY_OFFSET_MASK)) {
            memset(ret, 0, n * sizeof(*ret));
            return 0;
        }
        g_autoptr(Qcow2Table) t = NULL;
        err = get_entries(bs, l1_entry, guest, n, &t);
        if (err == 0) {
            err = load_from_table(bs, t, guest, n, ret);
        }
    } while (err == QCOW2_STALE);
    return err;
}

int qcow2_load_entries(BlockDriverState *bs, uint64_t guest, size_t n, Qcow2L2Entry *ret)
{
    BDRVQcow2State *s = qcow2_state(bs);
    assert(qcow2_offset_into_cluster(s, guest) == 0);
    int err = 0;
    while (n > 0 && err == 0) {
        size_t part = MIN(n, s->l2_entries - qcow2_l2_index(s, guest));
        err = load_of_one_l1_entry(bs, guest, part, ret);
        guest += (uint64_t)part << s->cluster_bits;
        ret += part;
        n -= part;
    }
    return err;
}

/* --- one run --- */

typedef struct Lookup {
    BlockDriverState *bs;
    BDRVQcow2State *s;
    uint64_t end;
    bool nowait;
    Qcow2Mapping m; /* found so far; bytes 0: nothing */
} Lookup;

static uint64_t lookup_pos(const Lookup *l)
{
    return l->m.guest + l->m.bytes;
}

/* Adds what @n entries say that end at @end: @e, and those that continue it. 1: go on, 0: the run ends
 * here, or -errno. */
static int lookup_add_entries(Lookup *l, Qcow2L2Entry e, unsigned n, uint64_t end)
{
    end = MIN(l->end, end);
    while (lookup_pos(l) < end) {
        Qcow2Mapping next = qcow2_entry_mapping(l->s, e, lookup_pos(l), end);
        next.bytes = n > 1 ? end - lookup_pos(l) : next.bytes;
        if (!qcow2_mapping_extend(&l->m, &next)) {
            return 0;
        }
    }
    return 1;
}

/* Entries to look at next, all of one table. */
static unsigned chunk_wanted(const Lookup *l)
{
    const BDRVQcow2State *s = l->s;
    uint64_t guest = lookup_pos(l);
    unsigned most = l->m.bytes ? CHUNK_ENTRIES : FIRST_CHUNK; /* runs are short, or long */
    uint64_t wanted = qcow2_size_to_clusters(s, l->end - qcow2_start_of_cluster(s, guest));
    return (unsigned)MIN(MIN(wanted, most), s->l2_entries - qcow2_l2_index(s, guest));
}

/* @raw are the @n entries from here on: 1, 0, or -errno. */
static int lookup_in_entries(Lookup *l, uint64_t table, const uint8_t *raw, unsigned n)
{
    uint64_t guest = lookup_pos(l);
    unsigned index = qcow2_l2_index(l->s, guest);
    uint64_t cluster = qcow2_start_of_cluster(l->s, guest);
    int more = 1;
    for (unsigned i = 0, run; i < n && more == 1; i += run, raw += run * l->s->l2_entry_size) {
        bool first = l->m.bytes == 0;
        Qcow2L2Entry e = qcow2_entry_decode(l->s, raw);
        int err = qcow2_entry_judge(l->bs, e, cluster, table, index + i);
        if (err < 0) {
            return first ? err : 0; /* the run in front of it is good */
        }
        run = n - i > 1 ? qcow2_entries_alike(l->s, raw, n - i) : 1;
        cluster += (uint64_t)run << l->s->cluster_bits;
        more = lookup_add_entries(l, e, run, cluster);
    }
    return more;
}

/* Copies @n entries from where the look-up is: 0, QCOW2_STALE, or -errno. */
static int fetch(const Lookup *l, uint64_t l1_entry, size_t n, uint8_t *raw)
{
    const BDRVQcow2State *s = l->s;
    uint64_t guest = lookup_pos(l);
    g_autoptr(Qcow2Table) t = NULL;
    int err = get_entries(l->bs, l1_entry, guest, n, &t);
    if (err == 0) {
        qcow2_table_load(t, (size_t)qcow2_l2_index(s, guest) * s->l2_entry_size,
                         n * s->l2_entry_size, raw);
        err = table_is_current(s, t, qcow2_l1_index(s, guest)) ? 0 : QCOW2_STALE;
    }
    return err;
}

/* The same if they are in memory, else -EAGAIN.  What the cache finds is not poisoned while it is
 * copied, so that L1 alone tells whether it still counts. */
static int fetch_present(const Lookup *l, uint64_t l1_entry, size_t n, uint8_t *raw)
{
    uint64_t guest = lookup_pos(l);
    Qcow2TableRange range = range_of_entries(l->s, l1_entry, guest, n);
    if (!qcow2_cache_copy_part(l->s->cache, &range, raw)) {
        return -EAGAIN;
    }
    uint64_t now = qcow2_l1_get(l->s, qcow2_l1_index(l->s, guest));
    return (now & QCOW2_ENTRY_OFFSET_MASK) == range.offset ? 0 : QCOW2_STALE;
}

static int lookup_in_table(Lookup *l, uint64_t l1_entry)
{
    uint8_t raw[CHUNK_BYTES];
    unsigned n = chunk_wanted(l);
    int ret = l->nowait ? fetch_present(l, l1_entry, n, raw) : fetch(l, l1_entry, n, raw);
    if (ret < 0) {
        return l->m.bytes ? 0 : ret; /* who wants more asks again from there */
    }
    return ret ? ret : lookup_in_entries(l, l1_entry & QCOW2_ENTRY_OFFSET_MASK, raw, n);
}

/* No table: unallocated as far as L1 says so. */
static int lookup_unmapped(Lookup *l)
{
    uint64_t guest = lookup_pos(l);
    uint64_t bytes = qcow2_unmapped_by_l1(l->s, guest, l->end - guest);
    if (bytes == 0) {
        return QCOW2_STALE; /* a table has just been linked */
    }
    Qcow2Mapping next = {.type = QCOW2_UNALLOCATED, .guest = guest, .bytes = bytes};
    return qcow2_mapping_extend(&l->m, &next) ? 1 : 0;
}

static int lookup_step(Lookup *l)
{
    uint64_t l1_entry = qcow2_l1_get(l->s, qcow2_l1_index(l->s, lookup_pos(l)));
    return l1_entry & QCOW2_ENTRY_OFFSET_MASK ? lookup_in_table(l, l1_entry) : lookup_unmapped(l);
}

static int lookup(Lookup *l, Qcow2Mapping *ret)
{
    int more = 1;
    while (lookup_pos(l) < l->end && more != 0) {
        more = lookup_step(l);
        if (more == QCOW2_STALE && l->nowait) {
            more = -EAGAIN;
        }
        if (more < 0) {
            return more;
        }
    }
    assert(l->m.bytes > 0 && lookup_pos(l) <= l->end);
    *ret = l->m;
    return 0;
}

int qcow2_lookup(BlockDriverState *bs, uint64_t guest, uint64_t bytes, Qcow2Mapping *ret)
{
    Lookup l = {.bs = bs, .s = qcow2_state(bs), .end = guest + bytes, .m.guest = guest};
    assert(bytes > 0 && l.end > guest);
    return lookup(&l, ret);
}

int qcow2_lookup_nowait(BlockDriverState *bs, uint64_t guest, uint64_t bytes, Qcow2Mapping *ret)
{
    Lookup l = {
        .bs = bs, .s = qcow2_state(bs), .end = guest + bytes, .nowait = true, .m.guest = guest,
    };
    assert(bytes > 0 && l.end > guest);
    return lookup(&l, ret);
}
