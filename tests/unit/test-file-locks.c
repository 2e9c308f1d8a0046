/*
 * Driver "file": image locks and reopen.
 *
 * Two nodes of one process stand for two processes: the locks belong to the open file, so they get
 * in each other's way just the same.
 *
 * SPDX-License-Identifier: MIT
 */
#include "file-node.h"

#define RDWR ((NodeMode){0})
#define RDONLY ((NodeMode){.read_only = true})

enum { USED = 100, UNSHARED = 200 };

/* Whether anybody has @byte of @path locked, asked from outside. */
static bool is_locked(const char *path, int byte)
{
    struct flock fl = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
    int fd = open(path, O_RDWR | O_CLOEXEC);
    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(fcntl(fd, F_OFD_GETLK, &fl), ==, 0);
    close(fd);
    return fl.l_type != F_UNLCK;
}

/* Checks that exactly the bytes of @perm and @unshared are locked. */
static void expect_locked(const char *path, unsigned perm, unsigned unshared)
{
    for (int i = 0; i < 4; i++) {
        g_assert_cmpint(is_locked(path, USED + i), ==, (perm >> i) & 1);
        g_assert_cmpint(is_locked(path, UNSHARED + i), ==, (unshared >> i) & 1);
    }
}

static bool take(BlockDriverState *bs, unsigned perm, unsigned unshared, GError **errp)
{
    if (!bs->drv->check_perm(bs, perm, BLK_PERM_ALL & ~unshared, errp)) {
        return false;
    }
    bs->drv->set_perm(bs, perm, BLK_PERM_ALL & ~unshared);
    return true;
}

static void take_ok(BlockDriverState *bs, unsigned perm, unsigned unshared)
{
    GError *err = NULL;
    g_assert_true(take(bs, perm, unshared, &err));
    g_assert_no_error(err);
}

static void expect_conflict(const char *path, BlockDriverState *bs, unsigned perm,
                            unsigned unshared, const char *what)
{
    GError *err = NULL;
    g_autofree char *text = g_strdup_printf(
        "Failed to get %s lock\nIs another process using the image [%s]?", what, path);
    g_assert_false(take(bs, perm, unshared, &err));
    expect_error(&err, EAGAIN, text);
}

static bool locks_work(TestDir *t)
{
    make_file(t->file, 4096, 0);
    BlockDriverState *bs = node_open_ok(t->file, RDWR);
    bool enabled = file_state(bs)->locks.enabled;
    node_close(bs);
    if (!enabled) {
        g_test_skip("no locks of open files here");
    }
    return enabled;
}

static void test_bytes(TestDir *t, gconstpointer root)
{
    if (!locks_work(t)) {
        return;
    }
    BlockDriverState *bs = node_open_ok(t->file, RDWR);
    expect_locked(t->file, 0, 0);
    take_ok(bs, BLK_PERM_CONSISTENT_READ | BLK_PERM_RESIZE, BLK_PERM_WRITE);
    expect_locked(t->file, BLK_PERM_CONSISTENT_READ | BLK_PERM_RESIZE, BLK_PERM_WRITE);
    take_ok(bs, BLK_PERM_WRITE, BLK_PERM_ALL);
    expect_locked(t->file, BLK_PERM_WRITE, BLK_PERM_ALL);
    take_ok(bs, 0, 0);
    expect_locked(t->file, 0, 0);
    take_ok(bs, BLK_PERM_ALL, 0);
    node_close(bs);
    expect_locked(t->file, 0, 0);
}

static void test_conflicts(TestDir *t, gconstpointer root)
{
    static const char *const names[] = {"\"consistent read\"", "\"write\"", "\"write unchanged\"",
                                        "\"resize\""};
    if (!locks_work(t)) {
        return;
    }
    BlockDriverState *a = node_open_ok(t->file, RDWR), *b = node_open_ok(t->file, RDONLY);
    for (unsigned i = 0; i < G_N_ELEMENTS(names); i++) {
        g_autofree char *shared = g_strconcat("shared ", names[i], NULL);
        take_ok(a, 0, 1u << i);
        expect_conflict(t->file, b, 1u << i, 0, names[i]);
        take_ok(b, BLK_PERM_ALL & ~(1u << i), 1u << i);
        take_ok(b, 0, 0);
        take_ok(a, 1u << i, 0);
        expect_conflict(t->file, b, 0, 1u << i, shared);
        take_ok(b, 1u << i, 0);
        take_ok(b, 0, 0);
    }
    node_close(a);
    node_close(b);
}

/* A check that fails, or is taken back, leaves the locks as they were. */
static void test_abort(TestDir *t, gconstpointer root)
{
    GError *err = NULL;
    if (!locks_work(t)) {
        return;
    }
    BlockDriverState *a = node_open_ok(t->file, RDWR), *b = node_open_ok(t->file, RDWR);
    take_ok(a, BLK_PERM_WRITE, 0);
    g_assert_true(a->drv->check_perm(a, BLK_PERM_RESIZE, BLK_PERM_ALL & ~BLK_PERM_RESIZE, &err));
    expect_locked(t->file, BLK_PERM_WRITE | BLK_PERM_RESIZE, BLK_PERM_RESIZE);
    a->drv->abort_perm(a);
    expect_locked(t->file, BLK_PERM_WRITE, 0);
    expect_conflict(t->file, b, BLK_PERM_CONSISTENT_READ, BLK_PERM_WRITE, "shared \"write\"");
    expect_locked(t->file, BLK_PERM_WRITE, 0);
    a->drv->abort_perm(a);
    expect_locked(t->file, BLK_PERM_WRITE, 0);
    node_close(a);
    take_ok(b, BLK_PERM_CONSISTENT_READ, BLK_PERM_WRITE);
    node_close(b);
}

static void test_without_locks(TestDir *t, gconstpointer root)
{
    GError *err = NULL;
    make_file(t->file, 4096, 0);
    BlockDriverState *a = node_open_ok(t->file, RDWR);
    take_ok(a, BLK_PERM_ALL, BLK_PERM_ALL);
    BlockDriverState *b = node_open_ok(t->file, (NodeMode){.read_only = true, .force_share = true});
    take_ok(b, BLK_PERM_CONSISTENT_READ, 0);
    node_close(b);
    b = node_open(&bdrv_file, t->file, RDWR, "locking=off", &err);
    g_assert_no_error(err);
    take_ok(b, BLK_PERM_ALL, BLK_PERM_ALL);
    node_close(b);
    b = node_open(&bdrv_file, t->file, RDWR, "locking=on", &err);
    if (b) {
        expect_conflict(t->file, b, BLK_PERM_WRITE, 0, "\"write\"");
        node_close(b);
    }
    node_close(a);
}

/* Creating over a file that somebody uses and does not share for writing. */
static void test_create_locked(TestDir *t, gconstpointer root)
{
    GError *err = NULL;
    if (!locks_work(t)) {
        return;
    }
    make_file(t->file, 4096, 9);
    g_autoptr(json_t) options = qb_opts_parse("size=1M", NULL, NULL);
    g_autofree char *text = g_strdup_printf(
        "Failed to get \"write\" lock\nIs another process using the image [%s]?", t->file);
    BlockDriverState *bs = node_open_ok(t->file, RDWR);
    take_ok(bs, BLK_PERM_CONSISTENT_READ, BLK_PERM_WRITE);
    g_assert_false(bdrv_file.create(t->file, options, NULL, &err));
    expect_error(&err, EAGAIN, text);
    g_assert_cmpint(node_read_byte(bs, 0, 4096), ==, 9);
    g_assert_cmpint(bs->drv->getlength(bs), ==, 4096);
    node_close(bs);
}

/* --- reopen --- */

typedef struct Reopen {
    BDRVReopenState state;
    BlockDriverState *bs;
} Reopen;

static bool reopen_prepare(Reopen *r, BlockDriverState *bs, NodeMode mode, const char *opts,
                           GError **errp)
{
    r->bs = bs;
    r->state = (BDRVReopenState){.bs = bs, .read_only = mode.read_only,
                                 .options = opts ? qb_opts_parse(opts, NULL, NULL) : json_object()};
    json_object_set_new(r->state.options, "cache.direct", json_boolean(mode.direct));
    if (bs->drv->reopen_prepare(&r->state, errp)) {
        return true;
    }
    g_assert_null(r->state.opaque);
    json_decref(r->state.options);
    return false;
}

static void reopen_commit(Reopen *r, NodeMode mode)
{
    r->bs->drv->reopen_commit(&r->state);
    r->bs->read_only = mode.read_only;
    r->bs->cache_direct = mode.direct;
    r->bs->drv->refresh_limits(r->bs);
    json_decref(r->state.options);
}

static void reopen_ok(BlockDriverState *bs, NodeMode mode, const char *opts)
{
    Reopen r;
    GError *err = NULL;
    g_assert_true(reopen_prepare(&r, bs, mode, opts, &err));
    g_assert_no_error(err);
    reopen_commit(&r, mode);
}

static void test_reopen_modes(TestDir *t, gconstpointer root)
{
    make_file(t->file, 4096, 1);
    BlockDriverState *bs = node_open_ok(t->file, RDONLY);
    take_ok(bs, BLK_PERM_CONSISTENT_READ, BLK_PERM_RESIZE);
    g_assert_cmpint(node_write(bs, 0, 512, 2, 0), ==, -EBADF);
    reopen_ok(bs, RDWR, NULL);
    expect_locked(t->file, BLK_PERM_CONSISTENT_READ, BLK_PERM_RESIZE);
    g_assert_cmpint(node_write(bs, 0, 512, 2, 0), ==, 0);
    reopen_ok(bs, RDWR, "aio=threads");
    g_assert_cmpint(file_state(bs)->aio, ==, QB_AIO_THREADS);
    reopen_ok(bs, RDONLY, NULL);
    expect_locked(t->file, BLK_PERM_CONSISTENT_READ, BLK_PERM_RESIZE);
    g_assert_cmpint(node_write(bs, 0, 512, 2, 0), ==, -EBADF);
    g_assert_cmpint(node_read_byte(bs, 0, 512), ==, 2);
    node_close(bs);
    expect_locked(t->file, 0, 0);
}

static void test_reopen_direct(TestDir *t, gconstpointer root)
{
    Reopen r;
    GError *err = NULL;
    NodeMode direct = {.direct = true};
    make_file(t->file, 8192, 1);
    BlockDriverState *bs = node_open_ok(t->file, RDWR);
    if (!reopen_prepare(&r, bs, direct, "aio=native", &err)) {
        g_test_skip(err->message);
        g_clear_error(&err);
        node_close(bs);
        return;
    }
    reopen_commit(&r, direct);
    g_assert_true(fcntl(file_state(bs)->fd, F_GETFL) & O_DIRECT);
    g_assert_cmpint(node_read_byte(bs, 0, 4096), ==, 1);
    g_assert_cmpint(node_write(bs, 0, 4096, 2, 0), ==, 0);
    reopen_ok(bs, RDWR, NULL);
    g_assert_cmpuint(bs->bl.request_alignment, ==, 1);
    g_assert_false(fcntl(file_state(bs)->fd, F_GETFL) & O_DIRECT);
    g_assert_cmpint(node_read_byte(bs, 0, 4096), ==, 2);
    node_close(bs);
}

static void expect_reopen_error(BlockDriverState *bs, NodeMode mode, const char *opts,
                                const char *text)
{
    Reopen r;
    GError *err = NULL;
    int fd = file_state(bs)->fd;
    g_assert_false(reopen_prepare(&r, bs, mode, opts, &err));
    g_assert_nonnull(err);
    g_assert_cmpstr(err->message, ==, text);
    g_clear_error(&err);
    g_assert_cmpint(file_state(bs)->fd, ==, fd);
}

/* A reopen that fails or is given up leaves descriptor, locks and mode alone. */
static void test_reopen_failure(TestDir *t, gconstpointer root)
{
    Reopen r;
    GError *err = NULL;
    make_file(t->file, 4096, 1);
    BlockDriverState *bs = node_open_ok(t->file, RDWR);
    take_ok(bs, BLK_PERM_WRITE, BLK_PERM_RESIZE);
    expect_reopen_error(bs, RDONLY, "filename=/other", "Cannot change the option 'filename'");
    expect_reopen_error(bs, RDONLY, "locking=off", "Cannot change the option 'locking'");
    expect_reopen_error(bs, RDONLY, "aio=native",
                        "aio=native was specified, but it requires cache.direct=on, which was not "
                        "specified.");
    g_assert_true(reopen_prepare(&r, bs, RDONLY, NULL, &err));
    bs->drv->reopen_abort(&r.state);
    json_decref(r.state.options);
    expect_locked(t->file, BLK_PERM_WRITE, BLK_PERM_RESIZE);
    g_assert_cmpint(node_write(bs, 0, 512, 2, BDRV_REQ_FUA), ==, 0);
    node_close(bs);
}

/* Permissions that change between prepare and commit: the new descriptor has what is held last. */
static void test_reopen_perms_between(TestDir *t, gconstpointer root)
{
    Reopen r;
    GError *err = NULL;
    if (!locks_work(t)) {
        return;
    }
    BlockDriverState *bs = node_open_ok(t->file, RDONLY);
    take_ok(bs, BLK_PERM_CONSISTENT_READ, BLK_PERM_WRITE);
    g_assert_true(reopen_prepare(&r, bs, RDWR, NULL, &err));
    take_ok(bs, BLK_PERM_WRITE, BLK_PERM_RESIZE);
    reopen_commit(&r, RDWR);
    expect_locked(t->file, BLK_PERM_WRITE, BLK_PERM_RESIZE);
    node_close(bs);
}

/* The file may have been renamed or unlinked since it was opened. */
static void test_reopen_unlinked(TestDir *t, gconstpointer root)
{
    make_file(t->file, 4096, 1);
    BlockDriverState *bs = node_open_ok(t->file, RDONLY);
    g_assert_cmpint(g_remove(t->file), ==, 0);
    make_file(t->file, 4096, 7);
    reopen_ok(bs, RDWR, NULL);
    g_assert_cmpint(node_read_byte(bs, 0, 4096), ==, 1);
    g_assert_cmpint(node_write(bs, 0, 4096, 2, 0), ==, 0);
    node_close(bs);
    bs = node_open_ok(t->file, RDONLY);
    g_assert_cmpint(node_read_byte(bs, 0, 4096), ==, 7);
    node_close(bs);
}

/* The pages a failed flush has lost do not come back with another descriptor. */
static void test_reopen_keeps_flush_failure(TestDir *t, gconstpointer root)
{
    make_file(t->file, 4096, 1);
    BlockDriverState *bs = node_open_ok(t->file, RDWR);
    file_state(bs)->flush.broken = true;
    reopen_ok(bs, RDONLY, NULL);
    reopen_ok(bs, RDWR, NULL);
    g_assert_cmpint(bs->drv->flush(bs), ==, -EIO);
    node_close(bs);
}

static void add(const char *name, void (*fn)(TestDir *, gconstpointer))
{
    static const char *const roots[] = {"/tmp", "/dev/shm"};
    for (unsigned i = 0; i < G_N_ELEMENTS(roots); i++) {
        if (access(roots[i], W_OK) == 0) {
            g_autofree char *path = g_strdup_printf("/file-locks/%s%s", name, roots[i]);
            g_test_add(path, TestDir, roots[i], test_dir_setup, fn, test_dir_teardown);
        }
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    add("bytes", test_bytes);
    add("conflicts", test_conflicts);
    add("abort", test_abort);
    add("without-locks", test_without_locks);
    add("create-locked", test_create_locked);
    add("reopen-modes", test_reopen_modes);
    add("reopen-direct", test_reopen_direct);
    add("reopen-failure", test_reopen_failure);
    add("reopen-perms-between", test_reopen_perms_between);
    add("reopen-unlinked", test_reopen_unlinked);
    add("reopen-keeps-flush-failure", test_reopen_keeps_flush_failure);
    return g_test_run();
}
