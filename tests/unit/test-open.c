/*
 * Opening: file names, options, probing, backing chains, loops, reopen, creation.
 *
 * "cow" is a format made up for this test.  Its image is a text file:
 *
 *     COW\n backing name \n backing format \n
 *
 * It shows 64 KiB that read as its backing file's, so that chains can be told apart by content.
 *
 * SPDX-License-Identifier: MIT
 */
#undef NDEBUG
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <glib/gstdio.h>
#include "block/core-int.h"
#include "util/pool.h"

#define COW_SIZE 65536

/* --- the format --- */

typedef struct Cow {
    bool lazy;
} Cow;

static int cow_probe(const uint8_t *buf, size_t len, const char *filename)
{
    return len >= 4 && !memcmp(buf, "COW\n", 4) ? 100 : 0;
}

static bool cow_read_header(BlockDriverState *bs, GError **errp)
{
    char buf[1024] = "";
    int64_t len = MIN(bdrv_getlength(bs->file->bs), (int64_t)sizeof(buf) - 1);
    int ret = bdrv_pread(bs->file, 0, len, buf, 0);
    if (ret < 0 || memcmp(buf, "COW\n", 4)) {
        qb_error_set(errp, EINVAL, "Image is not in cow format");
        return false;
    }
    g_auto(GStrv) lines = g_strsplit(buf, "\n", -1);
    guint n = g_strv_length(lines);
    bdrv_set_backing_names(bs, n > 1 ? lines[1] : "", n > 2 ? lines[2] : "");
    return true;
}

static bool cow_open(BlockDriverState *bs, json_t *options, int flags, GError **errp)
{
    Cow *s = bs->opaque;
    return qb_opt_take_bool(options, "lazy", false, &s->lazy, errp) &&
           bdrv_open_file_child(bs, NULL, options, BDRV_CHILD_IMAGE, errp) &&
           cow_read_header(bs, errp);
}

static bool cow_reopen_prepare(BDRVReopenState *state, GError **errp)
{
    bool lazy;
    if (!qb_opt_take_bool(state->options, "lazy", false, &lazy, errp)) {
        return false;
    }
    if (lazy && state->read_only) {
        qb_error_set(errp, EINVAL, "lazy and read-only");
        return false;
    }
    state->opaque = GINT_TO_POINTER(lazy);
    return true;
}

static void cow_reopen_commit(BDRVReopenState *state)
{
    ((Cow *)state->bs->opaque)->lazy = GPOINTER_TO_INT(state->opaque);
}

static int cow_preadv(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                      IoVector *qiov, size_t qiov_offset, int flags)
{
    if (!bs->backing) {
        iov_vector_memset(qiov, qiov_offset, 0, (size_t)bytes);
        return 0;
    }
    return bdrv_preadv_part(bs->backing, offset, bytes, qiov, qiov_offset, flags);
}

static int cow_pwritev(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                       IoVector *qiov, size_t qiov_offset, int flags)
{
    return -ENOSPC;
}

static int64_t cow_getlength(BlockDriverState *bs)
{
    return COW_SIZE;
}

static bool cow_create(const char *filename, json_t *options, QbProgress *progress,
                       GError **errp)
{
    g_autofree char *backing = qb_opt_take_string(options, "backing_file");
    g_autofree char *mode = qb_opt_take_string(options, "mode");
    uint64_t size;
    if (!qb_opt_take_size(options, "size", 0, &size, errp)) {
        return false;
    }
    if (mode && !strcmp(mode, "bad")) {
        qb_error_set(errp, EINVAL, "bad mode");
        return false;
    }
    if (!bdrv_create_file(filename, options, errp)) {
        return false;
    }
    if (mode && !strcmp(mode, "late")) {
        qb_error_set(errp, EIO, "failed late");
        return false;
    }
    g_autofree char *text = g_strdup_printf("COW\n%s\n\n%" G_GUINT64_FORMAT "\n",
                                            backing ? backing : "", size);
    return g_file_set_contents(filename, text, -1, errp);
}

static const QbOptDesc cow_create_opts[] = {
    {"size", QB_OPT_SIZE, "Virtual disk size", NULL},
    {"backing_file", QB_OPT_STRING, "", NULL},
    {"backing_fmt", QB_OPT_STRING, "", NULL},
    {"mode", QB_OPT_STRING, "", NULL},
    {NULL, QB_OPT_STRING, NULL, NULL},
};

static const BlockDriver cow_driver = {
    .format_name = "cow", .instance_size = sizeof(Cow), .is_format = true,
    .supports_backing = true, .probe = cow_probe, .open = cow_open,
    .reopen_prepare = cow_reopen_prepare, .reopen_commit = cow_reopen_commit,
    .preadv = cow_preadv, .pwritev = cow_pwritev, .getlength = cow_getlength,
    .create = cow_create, .create_opts = cow_create_opts,
};

/* A format whose image may hold anything: a filter by json:{} above another image. */
static bool wrap_open(BlockDriverState *bs, json_t *options, int flags, GError **errp)
{
    return bdrv_open_child(bs, NULL, options, "file", BDRV_CHILD_FILTERED | BDRV_CHILD_PRIMARY,
                           false, errp);
}

static int wrap_preadv(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                       IoVector *qiov, size_t qiov_offset, int flags)
{
    return bdrv_preadv_part(bs->file, offset, bytes, qiov, qiov_offset, flags);
}

static const BlockDriver wrap_driver = {
    .format_name = "wrap", .is_filter = true, .open = wrap_open, .preadv = wrap_preadv,
};

/* --- files --- */

static char *dir;

static char *path_of(const char *name)
{
    return g_build_filename(dir, name, NULL);
}

static void put(const char *name, const char *text)
{
    g_autofree char *path = path_of(name);
    g_assert_true(g_file_set_contents(path, text, -1, NULL));
}

static void put_raw(const char *name, char fill)
{
    g_autofree char *path = path_of(name), *data = g_malloc(COW_SIZE);
    memset(data, fill, COW_SIZE);
    g_assert_true(g_file_set_contents(path, data, COW_SIZE, NULL));
}

static void make_files(void)
{
    put_raw("base.raw", 'b');
    put_raw("other.raw", 'o');
    put("mid.cow", "COW\nbase.raw\nraw\n");
    put("top.cow", "COW\nmid.cow\n\n");
    put("alone.cow", "COW\n\n\n");
    put("lost.cow", "COW\nnosuch\ncow\n");
    put("lost2.cow", "COW\nlost.cow\ncow\n");
    put("badfmt.cow", "COW\nbase.raw\nbogus\n");
    put("badproto.cow", "COW\nbogus:base.raw\nraw\n");
    put("self.cow", "COW\nself.cow\ncow\n");
    put("loop1.cow", "COW\nloop2.cow\n\n");
    put("loop2.cow", "COW\nloop3.cow\n\n");
    put("loop3.cow", "COW\nloop1.cow\n\n");
    put("a:b.cow", "COW\nbase.raw\nraw\n");
    put("empty.img", "");
    g_autofree char *link = path_of("link.cow");
    g_assert_cmpint(symlink("loop4.cow", link), ==, 0);
    put("loop4.cow", "COW\nlink.cow\ncow\n");
    g_autofree char *json_loop = g_strdup_printf(
        "COW\njson:{'driver':'wrap','file':{'driver':'cow','file.filename':'%s/jloop.cow'}}\n\n",
        dir);
    put("jloop.cow", json_loop);
}

/* --- helpers --- */

static json_t *opts(const char *text)
{
    return text ? qb_opts_parse(text, NULL, NULL) : NULL;
}

static char *spell(const char *text)
{
    g_auto(GStrv) parts = g_strsplit(text, "@", -1); /* "@" stands for the directory */
    g_autofree char *slash = g_strconcat(dir, "/", NULL);
    return g_strjoinv(slash, parts);
}

static BlockDriverState *open_ok(const char *filename, const char *options, int flags)
{
    GError *err = NULL;
    g_autofree char *f = filename ? spell(filename) : NULL, *o = options ? spell(options) : NULL;
    BlockDriverState *bs = bdrv_open(f, opts(o), flags, &err);
    g_assert_no_error(err);
    return bs;
}

/* Fails with "Could not open 'F': " and @expected, each with "@" for the directory. */
static void open_fails(const char *filename, const char *options, int flags, const char *expected)
{
    GError *err = NULL;
    g_autofree char *f = filename ? spell(filename) : NULL, *o = options ? spell(options) : NULL;
    g_autofree char *text = spell(expected);
    g_autofree char *whole = g_strdup_printf("Could not open '%s': %s", f ? f : o, text);
    g_assert_null(bdrv_open(f, opts(o), flags, &err));
    g_assert_nonnull(err);
    g_assert_cmpstr(err->message, ==, whole);
    g_error_free(err);
}

static void assert_filename(BlockDriverState *bs, const char *expected)
{
    g_autofree char *text = spell(expected);
    g_assert_cmpstr(bdrv_filename(bs), ==, text);
}

static char first_byte(BlockDriverState *bs)
{
    char c = 0;
    g_autoptr(BlockBackend) blk =
        blk_new_with_bs(bs, BLK_PERM_CONSISTENT_READ, BLK_PERM_ALL, NULL);
    g_assert_cmpint(blk_pread(blk, 0, 1, &c, 0), ==, 0);
    return c;
}

/* --- names --- */

static void test_file_names(void)
{
    g_autoptr(BlockDriverState) plain = open_ok("@base.raw", NULL, 0);
    assert_filename(plain, "@base.raw");
    g_assert_cmpstr(bdrv_get_format_name(plain), ==, "raw");
    g_autoptr(BlockDriverState) prefixed = open_ok("file:@base.raw", "driver=raw", 0);
    assert_filename(prefixed, "@base.raw");
    g_autoptr(BlockDriverState) colon = open_ok("@a:b.cow", NULL, 0);
    g_assert_cmpint(first_byte(colon), ==, 'b');
    g_autoptr(BlockDriverState) dotted = open_ok(NULL, "driver=cow,file.filename=@mid.cow", 0);
    assert_filename(dotted, "@mid.cow");
    g_autoptr(BlockDriverState) proto = open_ok(NULL, "driver=file,filename=@base.raw", 0);
    g_assert_cmpstr(bdrv_get_format_name(proto), ==, "file");
    g_autoptr(BlockDriverState) null = open_ok("null-co://", "driver=raw", 0);
    g_assert_cmpstr(bdrv_get_format_name(null->file->bs), ==, "null-co");
}

static void test_existing_file_wins(void)
{
    g_autofree char *cwd = g_get_current_dir();
    g_assert_cmpint(chdir(dir), ==, 0);
    g_autoptr(BlockDriverState) bs = open_ok("a:b.cow", NULL, 0);
    g_assert_cmpint(first_byte(bs), ==, 'b');
    open_fails("bogus:b.cow", NULL, 0, "Unknown protocol 'bogus'");
    g_assert_cmpint(chdir(cwd), ==, 0);
}

static void test_json_names(void)
{
    g_autoptr(BlockDriverState) a =
        open_ok("json:{'driver':'raw','file':{'driver':'file','filename':'@base.raw'}}", NULL, 0);
    assert_filename(a, "@base.raw");
    g_autoptr(BlockDriverState) b =
        open_ok("json:{\"driver\":\"raw\",\"offset\":512,\"file.filename\":\"@base.raw\"}", NULL, 0);
    assert_filename(b, "json:{\"driver\": \"raw\", \"offset\": 512, \"file\": {\"driver\": "
                       "\"file\", \"filename\": \"@base.raw\"}}");
    g_autoptr(BlockDriverState) again = open_ok(bdrv_filename(b), NULL, 0);
    g_assert_cmpint(bdrv_getlength(again), ==, COW_SIZE - 512);
    g_autoptr(BlockDriverState) won =
        open_ok("json:{'driver':'raw','offset':512,'file.filename':'@base.raw'}", "offset=1k", 0);
    g_assert_cmpint(bdrv_getlength(won), ==, COW_SIZE - 1024);
    g_autoptr(BlockDriverState) over =
        open_ok(NULL, "driver=cow,file.filename=@alone.cow,backing.driver=null-co", 0);
    assert_filename(over, "json:{\"driver\": \"cow\", \"file\": {\"driver\": \"file\", "
                          "\"filename\": \"@alone.cow\"}, \"backing\": {\"driver\": \"null-co\"}}");
}

static void test_bad_options(void)
{
    open_fails("@nosuch", NULL, 0, "No such file or directory");
    open_fails("@base.raw", "driver=bogus", 0, "Unknown driver 'bogus'");
    open_fails("@base.raw", "driver=cow", 0, "Image is not in cow format");
    open_fails("bogus:x", NULL, 0, "Unknown protocol 'bogus'");
    open_fails(NULL, "driver=raw", 0, "A block device must be specified for \"file\"");
    open_fails(NULL, "driver=raw,file.driver=file", 0,
               "The 'file' block driver requires a file name");
    open_fails(NULL, "driver=raw,file.filename=@nosuch", 0,
               "Could not open '@nosuch': No such file or directory");
    open_fails(NULL, "filename=@base.raw", 0, "Must specify either driver or file");
    open_fails(NULL, "driver=raw,file=nn", 0, "Cannot find device='nn' nor node-name='nn'");
    open_fails(NULL, "driver=cow,file.filename=@mid.cow,bogus=1", 0,
               "Block format 'cow' does not support the option 'bogus'");
    open_fails(NULL, "driver=cow,file.filename=@mid.cow,file.bogus=1", 0,
               "Block protocol 'file' doesn't support the option 'bogus'");
    open_fails("@base.raw", "file.filename=@base.raw", 0,
               "Can't specify 'file' and 'filename' options at the same time");
    open_fails("@base.raw", "driver=raw,read-only=x", 0,
               "Parameter 'read-only' expects 'on' or 'off'");
    open_fails("@base.raw", "driver=raw,force-share=on", BDRV_O_RDWR,
               "force-share=on can only be used with read-only images");
    open_fails("@base.raw", "driver=raw,discard=x", 0, "Invalid discard option");
    open_fails("@base.raw", "driver=raw,detect-zeroes=unmap", 0,
               "setting detect-zeroes to unmap is not allowed without setting discard operation to "
               "unmap");
    open_fails("@base.raw", "driver=raw,backing.driver=null-co", 0,
               "Driver doesn't support backing files");
}

/* --- probing --- */

static char *warned;

static void remember_warning(const char *text, void *opaque)
{
    g_free(warned);
    warned = g_strdup(text);
}

static void test_probing(void)
{
    g_autoptr(BlockDriverState) cow = open_ok("@mid.cow", NULL, BDRV_O_RDWR);
    g_assert_cmpstr(bdrv_get_format_name(cow), ==, "cow");
    g_assert_false(cow->probed);
    g_assert_null(warned);
    g_autoptr(BlockDriverState) read_only = open_ok("@base.raw", NULL, 0);
    g_assert_true(read_only->probed);
    g_assert_null(warned);
    g_autoptr(BlockDriverState) said = open_ok("@base.raw", "driver=raw", BDRV_O_RDWR);
    g_assert_false(said->probed);
    g_assert_null(warned);
    g_clear_pointer(&read_only, bdrv_unref);
    g_autoptr(BlockDriverState) guessed = open_ok("@other.raw", NULL, BDRV_O_RDWR);
    g_assert_true(guessed->probed);
    g_autofree char *expected = spell(
        "WARNING: Image format was not specified for '@other.raw' and probing guessed raw.\n"
        "         Automatically detecting the format is dangerous for raw images, write operations "
        "on block 0 will be restricted.\n"
        "         Specify the 'raw' format explicitly to remove the restrictions.");
    g_assert_cmpstr(warned, ==, expected);
    g_clear_pointer(&warned, g_free);
    g_autoptr(BlockDriverState) empty = open_ok("@empty.img", NULL, 0);
    g_assert_cmpstr(bdrv_get_format_name(empty), ==, "raw");
    g_assert_cmpint(bdrv_getlength(empty), ==, 0);
}

/* --- chains --- */

static void test_chain(void)
{
    g_autoptr(BlockDriverState) top = open_ok("@top.cow", NULL, BDRV_O_RDWR);
    BlockDriverState *mid = top->backing->bs, *base = mid->backing->bs;
    g_assert_cmpstr(bdrv_get_format_name(mid), ==, "cow");
    g_assert_cmpstr(bdrv_get_format_name(base), ==, "raw");
    g_assert_true(mid->read_only && base->read_only && !top->read_only);
    g_assert_false(base->probed);
    assert_filename(base, "@base.raw");
    g_assert_cmpint(first_byte(top), ==, 'b');
    g_assert_true(bdrv_find_backing_image(top, "mid.cow") == mid);
    g_autofree char *path = path_of("base.raw");
    g_assert_true(bdrv_find_backing_image(top, path) == base);
    g_assert_true(bdrv_find_backing_image(top, "base.raw") == base);
    g_assert_null(bdrv_find_backing_image(top, "top.cow"));
    g_autoptr(BlockDriverState) bare = open_ok("@top.cow", "force-share=on", BDRV_O_NO_BACKING);
    g_assert_null(bare->backing);
    g_assert_cmpstr(bdrv_backing_name(bare), ==, "mid.cow");
}

static void test_backing_options(void)
{
    g_autoptr(BlockDriverState) none =
        open_ok("json:{'file.filename':'@mid.cow','backing':null}", NULL, 0);
    g_assert_null(none->backing);
    g_assert_true(none->has_backing_override);
    g_autoptr(BlockDriverState) other = open_ok("@mid.cow", "backing.file.filename=@other.raw", 0);
    g_assert_cmpint(first_byte(other), ==, 'o');
    g_autoptr(BlockDriverState) node = open_ok("@other.raw", "driver=raw,node-name=o", 0);
    g_autoptr(BlockDriverState) by_name = open_ok("@mid.cow", "backing=o", 0);
    g_assert_true(by_name->backing->bs == node);
    g_autoptr(BlockDriverState) deep = open_ok("@top.cow", "backing.backing=o", 0);
    g_assert_cmpint(first_byte(deep), ==, 'o');
    g_autoptr(BlockDriverState) added = open_ok("@alone.cow", "backing=o", 0);
    g_assert_cmpint(first_byte(added), ==, 'o');
    open_fails("@mid.cow", "backing=nn", 0,
               "Could not open backing file: Cannot find device='nn' nor node-name='nn'");
    open_fails("@mid.cow", "backing.bogus=1", 0,
               "Could not open backing file: Block format 'raw' does not support the option "
               "'bogus'");
    open_fails("@mid.cow", "backing=o,backing.x=1", 0,
               "Could not open backing file: Cannot reference an existing block device with "
               "additional options or a new filename");
}

static void test_broken_chains(void)
{
    open_fails("@lost.cow", NULL, 0,
               "Could not open backing file: Could not open '@nosuch': No such file or directory");
    open_fails("@lost2.cow", NULL, 0,
               "Could not open backing file: Could not open backing file: Could not open "
               "'@nosuch': No such file or directory");
    open_fails("@badfmt.cow", NULL, 0, "Could not open backing file: Unknown driver 'bogus'");
    open_fails("@badproto.cow", NULL, 0, "Could not open backing file: Unknown protocol 'bogus'");
}

static void test_loops(void)
{
    open_fails("@self.cow", NULL, BDRV_O_RDWR,
               "Could not open backing file: Backing file loop: '@self.cow' is already above itself "
               "in the chain");
    open_fails("@loop1.cow", NULL, 0,
               "Could not open backing file: Could not open backing file: Could not open backing "
               "file: Backing file loop: '@loop1.cow' is already above itself in the chain");
    open_fails("@loop4.cow", NULL, 0,
               "Could not open backing file: Backing file loop: '@link.cow' is already above itself "
               "in the chain");
    open_fails("@jloop.cow", NULL, 0,
               "Could not open backing file: Backing file loop: '@jloop.cow' is already above "
               "itself in the chain");
}

static void test_resolving(void)
{
    g_autoptr(BlockDriverState) bs = open_ok("@mid.cow", NULL, 0);
    g_autofree char *a = bdrv_resolve_backing_name(bs, "x/y", NULL), *want = path_of("x/y");
    g_assert_cmpstr(a, ==, want);
    g_autofree char *b = bdrv_resolve_backing_name(bs, "/x/y", NULL);
    g_assert_cmpstr(b, ==, "/x/y");
    g_autofree char *c = bdrv_resolve_backing_name(bs, "null-co://", NULL);
    g_assert_cmpstr(c, ==, "null-co://");
    g_autofree char *d = bdrv_resolve_name_against("d/img", "x", NULL);
    g_assert_cmpstr(d, ==, "d/x");
    g_autofree char *e = bdrv_resolve_name_against("img", "x", NULL);
    g_assert_cmpstr(e, ==, "x");
    g_autofree char *f = bdrv_resolve_name_against("file:d/img", "x", NULL);
    g_assert_cmpstr(f, ==, "d/x");
    g_autofree char *j = bdrv_resolve_name_against(
        "json:{'driver':'cow','file':{'driver':'file','filename':'d/img'}}", "x", NULL);
    g_assert_cmpstr(j, ==, "d/x");
}

/* --- reopen --- */

static void test_reopen_read_only(void)
{
    GError *err = NULL;
    g_autoptr(BlockDriverState) top = open_ok("@top.cow", NULL, BDRV_O_RDWR);
    BlockDriverState *base = top->backing->bs->backing->bs;
    g_assert_true(bdrv_reopen_set_read_only(base, false, &err));
    g_assert_false(base->read_only || base->file->bs->read_only);
    g_autoptr(BlockBackend) blk =
        blk_new_with_bs(base, BLK_PERM_CONSISTENT_READ | BLK_PERM_WRITE, BLK_PERM_ALL, &err);
    g_assert_no_error(err);
    g_assert_cmpint(blk_pwrite(blk, 0, 1, "B", 0), ==, 0);
    g_assert_cmpint(first_byte(top), ==, 'B');
    g_assert_cmpint(blk_pwrite(blk, 0, 1, "b", 0), ==, 0);
    g_assert_false(bdrv_reopen_set_read_only(base, true, &err));
    g_assert_nonnull(strstr(err->message, "cannot support read-write users"));
    g_clear_error(&err);
    g_assert_false(base->read_only || base->file->bs->read_only);
    g_clear_pointer(&blk, blk_unref);
    g_assert_true(bdrv_reopen_set_read_only(base, true, &err));
    g_assert_true(base->read_only && base->file->bs->read_only);
}

static void test_reopen_options(void)
{
    GError *err = NULL;
    g_autoptr(BlockDriverState) bs = open_ok("@mid.cow", "cache.no-flush=on", BDRV_O_RDWR);
    Cow *s = bs->opaque;
    g_assert_true(bdrv_reopen(bs, opts("lazy=on"), true, &err));
    g_assert_true(s->lazy && bs->cache_no_flush && bs->file->bs->cache_no_flush);
    g_assert_true(bdrv_reopen(bs, opts("cache.no-flush=off"), true, &err));
    g_assert_true(s->lazy);
    g_assert_false(bs->cache_no_flush || bs->file->bs->cache_no_flush ||
                   bs->backing->bs->cache_no_flush);
    g_assert_true(bdrv_reopen(bs, opts("discard=unmap"), false, &err));
    g_assert_true(!s->lazy && bs->discard_unmap && !bs->read_only);
    g_assert_false(bdrv_reopen(bs, opts("lazy=on,read-only=on"), true, &err));
    g_assert_cmpstr(err->message, ==, "lazy and read-only");
    g_clear_error(&err);
    g_assert_true(!s->lazy && !bs->read_only && !bs->file->bs->read_only);
    const char *const fixed[][2] = {
        {"driver=raw", "driver"}, {"node-name=x", "node-name"}, {"bogus=1", "bogus"},
        {"file=x", "file"}, {"file.filename=x", "filename"}, {"backing=x", "backing"},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(fixed); i++) {
        g_autofree char *text = g_strdup_printf("Cannot change the option '%s'", fixed[i][1]);
        g_assert_false(bdrv_reopen(bs, opts(fixed[i][0]), true, &err));
        g_assert_cmpstr(err->message, ==, text);
        g_clear_error(&err);
    }
    g_assert_cmpint(first_byte(bs), ==, 'b');
}

/* --- locks --- */

static void test_locks(void)
{
    GError *err = NULL;
    g_autofree char *path = path_of("mid.cow");
    g_autoptr(BlockDriverState) bs = open_ok("@mid.cow", NULL, BDRV_O_RDWR);
    g_assert_null(bdrv_open(path, NULL, BDRV_O_RDWR, &err));
    g_assert_nonnull(strstr(err->message, "Failed to get \"write\" lock\nIs another process using "
                                          "the image ["));
    g_clear_error(&err);
    g_assert_null(bdrv_open(path, NULL, 0, &err));
    g_assert_nonnull(strstr(err->message, "Failed to get shared \"write\" lock"));
    g_clear_error(&err);
    g_autoptr(BlockDriverState) forced = open_ok("@mid.cow", "force-share=on", 0);
    g_assert_true(forced->force_share && forced->file->bs->force_share);
    g_clear_pointer(&bs, bdrv_unref);
    g_autoptr(BlockDriverState) reader = open_ok("@mid.cow", NULL, 0);
    g_autoptr(BlockDriverState) reader2 = open_ok("@mid.cow", NULL, 0);
    g_assert_false(bdrv_reopen_set_read_only(reader, false, &err));
    g_assert_nonnull(strstr(err->message, "Failed to get \"write\" lock"));
    g_clear_error(&err);
    g_assert_true(reader->read_only && reader->file->bs->read_only);
    g_clear_pointer(&reader2, bdrv_unref);
    g_assert_true(bdrv_reopen_set_read_only(reader, false, &err));
}

/* --- temporary overlays --- */

static guint count_files(const char *path)
{
    guint n = 0;
    GDir *d = g_dir_open(path, 0, NULL);
    while (g_dir_read_name(d)) {
        n++;
    }
    g_dir_close(d);
    return n;
}

static void test_temporary_overlay(void)
{
    g_autofree char *tmp = g_dir_make_tmp("qb-open-tmp-XXXXXX", NULL);
    g_setenv("TMPDIR", tmp, TRUE);
    g_autoptr(BlockDriverState) bs = open_ok("@base.raw", NULL, BDRV_O_RDWR | BDRV_O_SNAPSHOT);
    g_assert_cmpuint(count_files(tmp), ==, 0); /* nothing to clean up, whatever happens */
    g_assert_cmpstr(bdrv_get_format_name(bs), ==, "qcow2");
    g_assert_true(bs->backing->bs->read_only);
    g_assert_cmpint(first_byte(bs), ==, 'b');
    g_autoptr(BlockBackend) blk =
        blk_new_with_bs(bs, BLK_PERM_CONSISTENT_READ | BLK_PERM_WRITE, BLK_PERM_ALL, NULL);
    g_assert_cmpint(blk_pwrite(blk, 0, 1, "T", 0), ==, 0);
    g_assert_cmpint(first_byte(bs), ==, 'T');
    g_assert_cmpint(first_byte(bs->backing->bs), ==, 'b');
    g_unsetenv("TMPDIR");
    g_assert_cmpint(g_rmdir(tmp), ==, 0);
}

/* --- creating --- */

static void create_fails(const char *name, const char *format, const char *options,
                         const char *expected)
{
    GError *err = NULL;
    g_autofree char *path = spell(name);
    g_autoptr(json_t) o = options ? opts(options) : json_object();
    g_assert_false(bdrv_img_create(path, format, o, NULL, &err));
    g_assert_cmpstr(err->message, ==, expected);
    g_error_free(err);
}

static bool exists(const char *name)
{
    g_autofree char *path = path_of(name);
    return access(path, F_OK) == 0;
}

static void test_create(void)
{
    GError *err = NULL;
    g_autofree char *path = path_of("new.cow"), *text = NULL;
    g_autoptr(json_t) o = opts("backing_file=mid.cow,backing_fmt=cow");
    g_assert_true(bdrv_img_create(path, "cow", o, NULL, &err));
    g_assert_cmpuint(json_object_size(o), ==, 2); /* borrowed */
    g_assert_true(g_file_get_contents(path, &text, NULL, NULL));
    g_assert_cmpstr(text, ==, "COW\nmid.cow\n\n65536\n");
    g_autoptr(BlockDriverState) bs = open_ok("@new.cow", NULL, 0);
    g_assert_cmpint(first_byte(bs), ==, 'b');
}

static void test_create_failures(void)
{
    create_fails("@n.cow", "bogus", NULL, "Unknown file format 'bogus'");
    create_fails("@n.cow", "wrap", NULL, "Format driver 'wrap' does not support image creation");
    create_fails("@n.cow", "cow", "size=1k,bogus=1", "Invalid parameter 'bogus'");
    create_fails("@n.cow", "cow", NULL, "Image creation needs a size parameter");
    create_fails("@n.cow", "cow", "size=1k,mode=bad", "bad mode");
    g_assert_false(exists("n.cow"));
    create_fails("@n.cow", "cow", "size=1k,mode=late", "failed late");
    g_assert_false(exists("n.cow"));
    put_raw("old.raw", 'x');
    g_autofree char *path = path_of("old.raw");
    struct stat st;
    create_fails("@old.raw", "cow", "size=1k,mode=bad", "bad mode");
    g_assert_true(stat(path, &st) == 0 && st.st_size == COW_SIZE);
    create_fails("@old.raw", "cow", "size=1k,mode=late", "failed late");
    g_assert_true(exists("old.raw"));
}

static void remove_files(void)
{
    GDir *d = g_dir_open(dir, 0, NULL);
    const char *name;
    while ((name = g_dir_read_name(d))) {
        g_autofree char *path = path_of(name);
        g_remove(path);
    }
    g_dir_close(d);
    g_rmdir(dir);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    dir = g_dir_make_tmp("qb-open-XXXXXX", NULL);
    bdrv_init();
    bdrv_register(&cow_driver);
    bdrv_register(&wrap_driver);
    bdrv_set_warning_handler(remember_warning, NULL);
    make_files();
    g_test_add_func("/open/names/file", test_file_names);
    g_test_add_func("/open/names/existing-file-wins", test_existing_file_wins);
    g_test_add_func("/open/names/json", test_json_names);
    g_test_add_func("/open/bad-options", test_bad_options);
    g_test_add_func("/open/probing", test_probing);
    g_test_add_func("/open/chain/by-header", test_chain);
    g_test_add_func("/open/chain/by-options", test_backing_options);
    g_test_add_func("/open/chain/broken", test_broken_chains);
    g_test_add_func("/open/chain/loops", test_loops);
    g_test_add_func("/open/chain/resolving", test_resolving);
    g_test_add_func("/open/reopen/read-only", test_reopen_read_only);
    g_test_add_func("/open/reopen/options", test_reopen_options);
    g_test_add_func("/open/locks", test_locks);
    g_test_add_func("/open/temporary-overlay", test_temporary_overlay);
    g_test_add_func("/open/create", test_create);
    g_test_add_func("/open/create-failures", test_create_failures);
    int status = g_test_run();
    remove_files();
    g_free(dir);
    g_free(warned);
    qb_pools_shutdown();
    return status;
}
