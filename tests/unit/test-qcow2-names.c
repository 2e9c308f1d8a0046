/*
 * Changing the backing name in a header that may be torn at any moment.
 *
 * Names and formats of random lengths follow one another in headers of several kinds.  After each
 * write of each change, with and without the sectors that were not flushed, the header parses,
 * names one of the two files with its own format, and still has every extension that is not just
 * for error texts.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2.h"
#include "tests/unit/log-driver.h"

#define SCRATCH 1

/* Extensions that others put there, which must survive. */
typedef struct Kind {
    const char *name, *options;
    uint32_t header_length;
    uint32_t unknown; /* bytes of data of an unknown extension, 0: none */
    bool features;    /* a feature table between the others, as the field's tools put it */
    size_t max_name;  /* longest names tried */
} Kind;

static const Kind kinds[] = {
    {"plain", "cluster_size=64k", 112, 0, true, 1023},
    {"small", "cluster_size=512", 112, 0, false, 180},
    {"two-sectors", "cluster_size=1k", 112, 20, false, 250},
    {"v2", "cluster_size=4k,compat=0.10", 72, 16, false, 1000},
    {"unknown", "cluster_size=64k", 112, 100, true, 1023},
    {"much-unknown", "cluster_size=64k", 112, 340, true, 1023},
    {"short-header", "cluster_size=64k", 104, 8, true, 700},
    {"long-header", "cluster_size=64k", 176, 24, true, 700},
    {"tight", "cluster_size=4k", 112, 24, true, 1023},
};

typedef struct Names {
    char *file, *format;
} Names;

static void names_clear(Names *n)
{
    g_free(n->file);
    g_free(n->format);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Names, names_clear)

/* --- headers --- */

static uint8_t *unknown_data(uint32_t length)
{
    uint8_t *data = g_malloc(length + 1);
    for (uint32_t i = 0; i < length; i++) {
        data[i] = (uint8_t)(i * 7 + 1);
    }
    return data;
}

static GArray *extensions_of(const Kind *kind)
{
    GArray *list = qcow2_extensions_new();
    uint32_t length;
    g_autofree uint8_t *table = qcow2_feature_table(&length);
    g_autofree uint8_t *data = unknown_data(kind->unknown);
    if (kind->features) {
        qcow2_extensions_add(list, QCOW2_EXT_FEATURE_TABLE, table, length);
    }
    if (kind->unknown) {
        qcow2_extensions_add(list, 0xabcdef, data, kind->unknown);
    }
    return list;
}

/* A fresh image, then its header made over into one of this kind. */
static void make_image(const Kind *kind)
{
    g_autoptr(json_t) options = qb_opts_parse(kind->options, NULL, NULL);
    json_object_set_new(options, "size", json_integer(1 << 20));
    g_assert_true(bdrv_img_create("test-log:0", "qcow2", options, NULL, NULL));
    LogDisk *d = &log_disks[0];
    Qcow2Header h;
    g_assert_true(qcow2_header_decode(d->data, d->length, &h, NULL));
    size_t cluster_size = (size_t)1 << h.cluster_bits;
    g_autoptr(GArray) list = extensions_of(kind);
    g_autofree uint8_t *chain = g_malloc(qcow2_extensions_length(list));
    h.header_length = kind->header_length;
    qcow2_extensions_encode(list, chain);
    memset(d->data, 0, cluster_size);
    qcow2_header_encode(&h, d->data);
    memset(d->data + h.header_length, 0, 8);
    for (uint32_t i = QCOW2_HDR_V3_LENGTH; i < h.header_length; i++) {
        d->data[i] = (uint8_t)i; /* fields of the future */
    }
    memcpy(d->data + h.header_length, chain, qcow2_extensions_length(list));
}

static BlockBackend *open_disk(int disk, int flags)
{
    g_autoptr(GError) err = NULL;
    json_t *options = json_pack("{s:s, s:s, s:i, s:n}", "driver", "qcow2", "file.driver",
                                "test-log", "file.disk", disk, "backing");
    BlockBackend *blk = blk_new_open(NULL, options, flags, &err);
    g_assert_no_error(err);
    return blk;
}

/* --- what must hold --- */

static bool is_named(BlockDriverState *bs, const Names *n)
{
    return !strcmp(bdrv_backing_name(bs), n->file) && !strcmp(bdrv_backing_format(bs), n->format);
}

static void assert_kept(const Kind *kind, BlockDriverState *bs, const LogDisk *d)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    g_autofree uint8_t *data = unknown_data(kind->unknown);
    if (kind->unknown) {
        const Qcow2Extension *ext = qcow2_find_extension(s->extensions, 0xabcdef);
        g_assert_nonnull(ext);
        g_assert_cmpmem(ext->data, ext->length, data, kind->unknown);
    }
    g_assert_cmpuint(s->header.header_length, ==, kind->header_length);
    for (uint32_t i = QCOW2_HDR_V3_LENGTH; i < kind->header_length; i++) {
        g_assert_cmphex(d->data[i], ==, (uint8_t)i);
    }
}

static void assert_one_of(const Kind *kind, int disk, const Names *old, const Names *new)
{
    g_autoptr(BlockBackend) blk = open_disk(disk, 0);
    BlockDriverState *bs = blk_bs(blk);
    g_assert_true(is_named(bs, old) || is_named(bs, new));
    assert_kept(kind, bs, &log_disks[disk]);
}

/* --- changes --- */

static Names random_names(const Kind *kind)
{
    static const char *const formats[] = {"", "raw", "qcow2", "parallels", "123456789012345"};
    int length = g_test_rand_int_range(0, 4) ? g_test_rand_int_range(0, (int)kind->max_name + 1)
                                             : g_test_rand_int_range(0, 20);
    Names n = {g_strnfill((gsize)length, (gchar)('a' + g_test_rand_int_range(0, 26))), NULL};
    n.format = g_strdup(length ? formats[g_test_rand_int_range(0, G_N_ELEMENTS(formats))] : "");
    return n;
}

static bool change(const Names *n, GError **errp)
{
    g_autoptr(BlockBackend) blk = open_disk(0, BDRV_O_RDWR);
    bool ok = bdrv_change_backing_file(blk_bs(blk), n->file, n->format, errp);
    g_assert_true(!ok || is_named(blk_bs(blk), n));
    return ok;
}

static void assert_every_moment(const Kind *kind, const LogDisk *before, const GArray *log,
                                const Names *old, const Names *new)
{
    g_autoptr(GRand) toss = g_rand_new_with_seed(g_test_rand_int());
    for (guint n = 0; n <= log->len; n++) {
        for (int turn = 0; turn < 4; turn++) {
            log_copy(&log_disks[SCRATCH], before);
            log_rebuild(&log_disks[SCRATCH], log, n, turn ? toss : NULL);
            assert_one_of(kind, SCRATCH, old, new);
        }
    }
}

/* One change; *names follows it. Refusals must leave everything as it was. */
static void try_change(const Kind *kind, Names *names, unsigned *changed)
{
    g_autoptr(GError) err = NULL;
    g_auto(Names) next = random_names(kind);
    LogDisk before = {0};
    log_copy(&before, &log_disks[0]);
    log_start(&log_disks[0]);
    bool ok = change(&next, &err);
    g_autoptr(GArray) log = g_steal_pointer(&log_disks[0].log);
    g_test_message("%s: %zu %s -> %zu %s: %s", kind->name, strlen(names->file), names->format,
                   strlen(next.file), next.format, ok ? "done" : err->message);
    assert_every_moment(kind, &before, log, names, ok ? &next : names);
    assert_one_of(kind, 0, ok ? &next : names, ok ? &next : names);
    log_reset(&before);
    if (ok) {
        Names old = *names;
        *names = next;
        next = old;
        ++*changed;
    }
}

static void test_kind(gconstpointer data)
{
    const Kind *kind = data;
    g_auto(Names) names = {g_strdup(""), g_strdup("")};
    unsigned changed = 0;
    make_image(kind);
    for (int i = 0; i < 40; i++) {
        try_change(kind, &names, &changed);
    }
    g_assert_cmpuint(changed, >=, 20); /* refused for want of room: the exception */
}

/* The feature table comes back after a step that had to leave it out. */
static void test_features_come_back(void)
{
    const Kind *kind = &kinds[0];
    make_image(kind);
    for (int i = 0; i < 6; i++) {
        g_auto(Names) n = {g_strnfill(200 + 100 * (gsize)i, 'n'), g_strdup(i % 2 ? "raw" : "")};
        g_assert_true(change(&n, NULL));
        g_autoptr(BlockBackend) blk = open_disk(0, 0);
        const Qcow2Extension *ext = qcow2_find_extension(qcow2_state(blk_bs(blk))->extensions,
                                                         QCOW2_EXT_FEATURE_TABLE);
        g_assert_nonnull(ext);
        g_assert_cmpuint(ext->length, ==, 384);
    }
}

/* Nothing is written when the names are what they were. */
static void test_same_names(void)
{
    g_auto(Names) n = {g_strdup("below.img"), g_strdup("raw")};
    make_image(&kinds[0]);
    g_assert_true(change(&n, NULL));
    log_start(&log_disks[0]);
    g_assert_true(change(&n, NULL));
    for (guint i = 0; i < log_disks[0].log->len; i++) {
        g_assert_cmpint(g_array_index(log_disks[0].log, LogEvent, i).kind, ==, LOG_FLUSH);
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    log_init();
    for (size_t i = 0; i < G_N_ELEMENTS(kinds); i++) {
        g_autofree char *path = g_strdup_printf("/qcow2/names/%s", kinds[i].name);
        g_test_add_data_func(path, &kinds[i], test_kind);
    }
    g_test_add_func("/qcow2/names/features-come-back", test_features_come_back);
    g_test_add_func("/qcow2/names/same", test_same_names);
    int ret = g_test_run();
    return log_done(ret);
}
