/*
 * The bits of dirty bitmaps: every operation against an array of booleans, storing and reading
 * back, and many threads at once.
 *
 * SPDX-License-Identifier: MIT
 */
#undef NDEBUG
#include "block/dirty-bits.h"
#include "util/checked.h"
#include "util/thread.h"

#include <errno.h>
#include <glib.h>
#include <string.h>

/* ---- bits that are stored in memory, and an oracle ---- */

typedef struct Store {
    uint8_t *data;
    uint64_t bytes, chunk; /* chunk: what is described as one */
    unsigned begins, reads;
    int error; /* of the next reads */
} Store;

static BdrvDirtyStored judge(const uint8_t *p, uint64_t n)
{
    bool zeroes = true, ones = true;
    for (uint64_t i = 0; i < n; i++) {
        zeroes &= p[i] == 0;
        ones &= p[i] == 0xff;
    }
    return zeroes ? BDRV_DIRTY_STORED_ZEROES
                  : ones ? BDRV_DIRTY_STORED_ONES : BDRV_DIRTY_STORED_DATA;
}

static int store_begin(BdrvDirtyBits *b, void *opaque)
{
    Store *s = opaque;
    s->begins++;
    for (uint64_t pos = 0; pos < s->bytes; pos += s->chunk) {
        int ret = bdrv_dirty_bits_expect(b, pos, s->chunk, judge(s->data + pos, s->chunk));
        g_assert_cmpint(ret, ==, 0);
    }
    return 0;
}

static int store_read(void *opaque, uint64_t pos, size_t bytes, uint8_t *buf)
{
    Store *s = opaque;
    s->reads++;
    memset(buf, 0, bytes);
    if (pos < s->bytes) {
        memcpy(buf, s->data + pos, MIN(bytes, s->bytes - pos));
    }
    return s->error;
}

typedef struct Model {
    uint64_t size;
    unsigned granularity_bits;
    GByteArray *bits; /* a byte each */
    BdrvDirtyBits *b;
    Store store;
} Model;

static uint64_t n_bits(const Model *m)
{
    return qb_div_round_up(m->size, UINT64_C(1) << m->granularity_bits);
}

static BdrvDirtySource source_of(Store *s)
{
    return (BdrvDirtySource){.begin = store_begin, .read = store_read, .opaque = s};
}

static void model_init(Model *m, uint64_t size, unsigned granularity_bits)
{
    *m = (Model){.size = size, .granularity_bits = granularity_bits, .bits = g_byte_array_new()};
    g_byte_array_set_size(m->bits, n_bits(m));
    memset(m->bits->data, 0, m->bits->len);
    m->b = bdrv_dirty_bits_new(size, granularity_bits, NULL);
}

static void model_clear(Model *m)
{
    bdrv_dirty_bits_free(m->b);
    g_byte_array_unref(m->bits);
    g_free(m->store.data);
}

/* What begins behind the end of the disk is not there, also where the last bit reaches as far. */
static void model_mark(Model *m, uint64_t offset, uint64_t bytes, bool set)
{
    for (uint64_t i = offset >> m->granularity_bits;
         bytes && offset < m->size && i < n_bits(m) && i << m->granularity_bits < offset + bytes; i++) {
        m->bits->data[i] = set;
    }
}

/* All extents are those of the oracle. */
static void model_compare(Model *m)
{
    uint64_t offset = 0, at, bytes;
    g_autofree uint8_t *seen = g_malloc0(m->bits->len + 1);
    int ret;
    while ((ret = bdrv_dirty_bits_next(m->b, offset, m->size, &at, &bytes)) > 0) {
        g_assert_cmpuint(at, >=, offset);
        g_assert_cmpuint(bytes, >, 0);
        g_assert_cmpuint(at + bytes, <=, m->size);
        for (uint64_t i = at >> m->granularity_bits; i << m->granularity_bits < at + bytes; i++) {
            seen[i] = 1;
        }
        offset = at + bytes;
    }
    g_assert_cmpint(ret, ==, 0);
    g_assert_cmpmem(seen, m->bits->len, m->bits->data, m->bits->len);
}

/* Stores what changed, as a driver would, and goes on with bits read from there. */
static void model_store_and_reload(Model *m, uint64_t chunk)
{
    uint64_t bytes = qb_align_up(MAX(qb_div_round_up(n_bits(m), 8), 1), chunk);
    Store *s = &m->store;
    s->data = g_realloc(s->data, bytes);
    if (bytes > s->bytes) {
        memset(s->data + s->bytes, 0, bytes - s->bytes);
    }
    s->bytes = bytes;
    s->chunk = chunk;
    uint64_t pos = 0, n;
    g_assert_cmpint(bdrv_dirty_bits_begin(m->b), ==, 0);
    for (; bdrv_dirty_bits_next_changed(m->b, pos, bytes, &pos, &n); pos += n) {
        BdrvDirtyLook look = bdrv_dirty_bits_look(m->b, pos, n);
        g_assert_true(look.changed && !look.unread);
        bdrv_dirty_bits_serialise(m->b, pos, n, s->data + pos);
        BdrvDirtyStored is = judge(s->data + pos, n);
        g_assert_true(look.all_zeroes == (is == BDRV_DIRTY_STORED_ZEROES));
        g_assert_true(look.all_ones == (is == BDRV_DIRTY_STORED_ONES));
    }
    bdrv_dirty_bits_mark_stored(m->b);
    g_assert_false(bdrv_dirty_bits_look(m->b, 0, bytes).changed);
    bdrv_dirty_bits_free(m->b);
    BdrvDirtySource source = source_of(s);
    m->b = bdrv_dirty_bits_new(m->size, m->granularity_bits, &source);
}

/* ---- random operations ---- */

static void random_range(GRand *r, const Model *m, uint64_t *offset, uint64_t *bytes)
{
    *offset = (uint64_t)(g_rand_double(r) * (double)m->size * 1.05);
    uint64_t most = g_rand_int_range(r, 0, 4) ? UINT64_C(64) << m->granularity_bits : m->size;
    *bytes = (uint64_t)(g_rand_double(r) * (double)most);
}

static void change(GRand *r, Model *m, bool set)
{
    uint64_t offset, bytes;
    random_range(r, m, &offset, &bytes);
    if (set) {
        g_assert_cmpint(bdrv_dirty_bits_set(m->b, offset, bytes), ==, 0);
    } else {
        offset = qb_align_down(offset, UINT64_C(1) << m->granularity_bits);
        g_assert_cmpint(bdrv_dirty_bits_reset(m->b, offset, bytes), ==, 0);
    }
    model_mark(m, offset, bytes, set);
}

static void ask(GRand *r, Model *m)
{
    uint64_t offset, bytes;
    random_range(r, m, &offset, &bytes);
    bool covered = true, quick;
    for (uint64_t i = offset >> m->granularity_bits;
         bytes && i < n_bits(m) && i << m->granularity_bits < offset + bytes; i++) {
        covered &= m->bits->data[i];
    }
    if (offset >= m->size) {
        covered = true;
    }
    if (bdrv_dirty_bits_at_hand(m->b, offset, bytes, &quick)) {
        g_assert_true(quick == covered);
    }
    g_assert_cmpint(bdrv_dirty_bits_covers(m->b, offset, bytes), ==, covered);
}

static void resize(GRand *r, Model *m)
{
    guint old = m->bits->len;
    m->size = MAX(512, (uint64_t)((double)m->size * g_rand_double_range(r, 0.5, 1.5)));
    g_assert_cmpint(bdrv_dirty_bits_truncate(m->b, m->size), ==, 0);
    g_byte_array_set_size(m->bits, n_bits(m));
    if (m->bits->len > old) {
        memset(m->bits->data + old, 0, m->bits->len - old);
    }
}

static void merge_other(GRand *r, Model *m)
{
    Model other;
    unsigned granularity_bits = g_rand_boolean(r) ? m->granularity_bits
                                                  : (unsigned)g_rand_int_range(r, 9, 13);
    model_init(&other, m->size, granularity_bits);
    for (int i = 0; i < 5; i++) {
        change(r, &other, true);
    }
    if (g_rand_boolean(r)) {
        model_store_and_reload(&other, 4096);
    }
    g_assert_cmpint(bdrv_dirty_bits_merge(m->b, other.b), ==, 0);
    for (uint64_t i = 0; i < n_bits(&other); i++) {
        if (other.bits->data[i]) {
            model_mark(m, i << granularity_bits, UINT64_C(1) << granularity_bits, true);
        }
    }
    model_compare(&other);
    model_clear(&other);
}

static void one_step(GRand *r, Model *m)
{
    static const uint64_t chunks[] = {512, 4096, 65536};
    int what = g_rand_int_range(r, 0, 40);
    if (what < 16) {
        change(r, m, true);
    } else if (what < 24) {
        change(r, m, false);
    } else if (what < 32) {
        ask(r, m);
    } else if (what < 35) {
        merge_other(r, m);
    } else if (what < 37) {
        model_store_and_reload(m, chunks[g_rand_int_range(r, 0, 3)]);
    } else if (what < 39) {
        resize(r, m);
    } else {
        g_assert_cmpint(bdrv_dirty_bits_clear(m->b), ==, 0);
        memset(m->bits->data, 0, m->bits->len);
    }
}

static void test_random(void)
{
    guint32 seed = g_test_rand_int();
    g_test_message("seed %u", seed);
    g_autoptr(GRand) r = g_rand_new_with_seed(seed);
    for (int round = 0; round < 12; round++) {
        Model m;
        uint64_t size = (uint64_t)g_rand_int_range(r, 1, 400) << g_rand_int_range(r, 10, 19);
        model_init(&m, size, 9);
        for (int i = 0; i < 40; i++) {
            one_step(r, &m);
            if (i % 8 == 7) {
                model_compare(&m);
            }
        }
        model_compare(&m);
        model_clear(&m);
    }
}

/* ---- what is read, and when ---- */

static void test_reads_what_is_needed(void)
{
    Store s = {.bytes = 65536, .chunk = 65536, .data = g_malloc0(65536)};
    BdrvDirtySource source = source_of(&s);
    s.data[9000] = 1;
    uint64_t size = UINT64_C(65536) * 8 << 16;
    BdrvDirtyBits *b = bdrv_dirty_bits_new(size, 16, &source);
    g_assert_cmpuint(s.begins, ==, 0);
    g_assert_cmpint(bdrv_dirty_bits_set(b, 0, 65536), ==, 0);
    g_assert_cmpuint(s.begins, ==, 1);
    g_assert_cmpuint(s.reads, ==, 1);
    uint64_t pos, n;
    g_assert_true(bdrv_dirty_bits_next_changed(b, 0, 65536, &pos, &n));
    g_assert_cmpuint(pos, ==, 0);
    g_assert_cmpuint(n, ==, 4096);
    g_assert_false(bdrv_dirty_bits_next_changed(b, 4096, 65536, &pos, &n));
    /* a bit that is set already changes nothing */
    bdrv_dirty_bits_mark_stored(b);
    g_assert_cmpint(bdrv_dirty_bits_set(b, 100, 5), ==, 0);
    g_assert_false(bdrv_dirty_bits_look(b, 0, 65536).changed);
    g_assert_cmpint(bdrv_dirty_bits_covers(b, UINT64_C(72000) << 16, 65536), ==, 1);
    /* whole pages need not be read to be set */
    unsigned reads = s.reads;
    g_assert_cmpint(bdrv_dirty_bits_set(b, UINT64_C(4096 * 8 * 4) << 16, UINT64_C(4096 * 8) << 16),
                    ==, 0);
    g_assert_cmpuint(s.reads, ==, reads);
    s.error = -EIO;
    g_assert_cmpint(bdrv_dirty_bits_set(b, UINT64_C(4096 * 8 * 6) << 16, 1), ==, -EIO);
    bdrv_dirty_bits_free(b);
    g_free(s.data);
}

/* All ones at the end of a disk are ones up to that end, also when the disk grows. */
static void test_ones_end_with_the_disk(void)
{
    Store s = {.bytes = 65536, .chunk = 65536, .data = g_malloc(65536)};
    BdrvDirtySource source = source_of(&s);
    memset(s.data, 0xff, 65536);
    uint64_t size = UINT64_C(40000) << 16, at, bytes;
    BdrvDirtyBits *b = bdrv_dirty_bits_new(size, 16, &source);
    g_assert_cmpint(bdrv_dirty_bits_next(b, 0, size, &at, &bytes), ==, 1);
    g_assert_cmpuint(at, ==, 0);
    g_assert_cmpuint(bytes, ==, size);
    g_assert_cmpint(bdrv_dirty_bits_truncate(b, size * 2), ==, 0);
    g_assert_cmpint(bdrv_dirty_bits_next(b, 0, size * 2, &at, &bytes), ==, 1);
    g_assert_cmpuint(bytes, ==, size);
    g_assert_cmpint(bdrv_dirty_bits_next(b, size, size * 2, &at, &bytes), ==, 0);
    bdrv_dirty_bits_free(b);
    g_free(s.data);
}

static void test_exabytes_cost_little(void)
{
    uint64_t size = INT64_MAX, at, bytes;
    BdrvDirtyBits *b = bdrv_dirty_bits_new(size, 20, NULL);
    g_assert_cmpint(bdrv_dirty_bits_set(b, UINT64_C(1) << 40, 1), ==, 0);
    g_assert_cmpint(bdrv_dirty_bits_next(b, 0, size, &at, &bytes), ==, 1);
    g_assert_cmpuint(at, ==, UINT64_C(1) << 40);
    g_assert_cmpuint(bytes, ==, 1 << 20);
    g_assert_cmpint(bdrv_dirty_bits_next(b, at + bytes, size, &at, &bytes), ==, 0);
    bdrv_dirty_bits_free(b);
}

/* ---- threads ---- */

enum { THREADS = 4, STEPS = 3000 };

typedef struct Worker {
    BdrvDirtyBits *b;
    guint32 seed;
    uint64_t size;
} Worker;

static void step_of(GRand *r, uint64_t size, uint64_t *offset, uint64_t *bytes)
{
    *offset = (uint64_t)(g_rand_double(r) * (double)size);
    *bytes = (uint64_t)g_rand_int_range(r, 1, g_rand_int_range(r, 0, 50) ? 65536 : 64 << 20);
}

static void *mark_randomly(void *opaque)
{
    Worker *w = opaque;
    g_autoptr(GRand) r = g_rand_new_with_seed(w->seed);
    for (int i = 0; i < STEPS; i++) {
        uint64_t offset, bytes, at, n;
        step_of(r, w->size, &offset, &bytes);
        g_assert_cmpint(bdrv_dirty_bits_set(w->b, offset, bytes), ==, 0);
        g_assert_cmpint(bdrv_dirty_bits_covers(w->b, offset, bytes), ==, 1);
        if (i % 500 == 0) {
            g_assert_cmpint(bdrv_dirty_bits_next(w->b, offset, w->size, &at, &n), >=, 0);
        }
    }
    return NULL;
}

/* No mark of any thread is lost, while pages are made and read. */
static void test_threads(void)
{
    Model m;
    guint32 seed = g_test_rand_int();
    g_test_message("seed %u", seed);
    model_init(&m, UINT64_C(512) << 20, 9);
    g_assert_cmpint(bdrv_dirty_bits_set(m.b, 512 * 1000, 512), ==, 0);
    model_mark(&m, 512 * 1000, 512, true);
    model_store_and_reload(&m, 65536);
    pthread_t threads[THREADS];
    Worker workers[THREADS];
    for (unsigned i = 0; i < THREADS; i++) {
        workers[i] = (Worker){.b = m.b, .seed = seed + i, .size = m.size};
        g_assert_true(qb_thread_start(&threads[i], "marker", mark_randomly, &workers[i]));
    }
    for (unsigned i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        g_autoptr(GRand) r = g_rand_new_with_seed(seed + i);
        for (int k = 0; k < STEPS; k++) {
            uint64_t offset, bytes;
            step_of(r, m.size, &offset, &bytes);
            model_mark(&m, offset, MIN(bytes, m.size - offset), true);
        }
    }
    model_compare(&m);
    model_clear(&m);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/dirty-bits/random", test_random);
    g_test_add_func("/dirty-bits/reads-what-is-needed", test_reads_what_is_needed);
    g_test_add_func("/dirty-bits/ones-end-with-the-disk", test_ones_end_with_the_disk);
    g_test_add_func("/dirty-bits/exabytes", test_exabytes_cost_little);
    g_test_add_func("/dirty-bits/threads", test_threads);
    return g_test_run();
}
