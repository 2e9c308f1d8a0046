/*
 * The graph: edges, permissions, drains, BlockBackends, with drivers that only take notes.
 *
 *     "leaf"    a protocol without storage: remembers the permissions it is told, can refuse them
 *     "pass"    a filter over "file"
 *     "layer"   a format over "file" that may have a backing file
 *
 * SPDX-License-Identifier: MIT
 */
#undef NDEBUG
#include <string.h>
#include <unistd.h>
#include "block/core-int.h"
#include "util/pool.h"

#define ALL BLK_PERM_ALL
#define READ BLK_PERM_CONSISTENT_READ
#define WRITE BLK_PERM_WRITE
#define UNCHANGED BLK_PERM_WRITE_UNCHANGED
#define RESIZE BLK_PERM_RESIZE

/* --- drivers --- */

typedef struct Leaf {
    unsigned perm, shared, refuse; /* as last set; WRITE etc. that are refused */
    unsigned checks, aborts;
    _Atomic(int) inside; /* requests in preadv */
    _Atomic(bool) block; /* preadv waits while set */
    _Atomic(int) writes;
    int64_t length;
    uint32_t align;
} Leaf;

static _Atomic(int) open_leaves;

static bool leaf_open(BlockDriverState *bs, json_t *options, int flags, GError **errp)
{
    Leaf *l = bs->opaque;
    uint64_t size, align;
    if (!qb_opt_take_size(options, "size", 65536, &size, errp) ||
        !qb_opt_take_size(options, "align", 1, &align, errp)) {
        return false;
    }
    l->length = (int64_t)size;
    l->align = (uint32_t)align;
    atomic_fetch_add(&open_leaves, 1);
    return true;
}

static void leaf_close(BlockDriverState *bs)
{
    atomic_fetch_sub(&open_leaves, 1);
}

static bool leaf_check_perm(BlockDriverState *bs, unsigned perm, unsigned shared, GError **errp)
{
    Leaf *l = bs->opaque;
    l->checks++;
    if (perm & l->refuse) {
        qb_error_set(errp, EAGAIN, "leaf refuses %u", perm & l->refuse);
        return false;
    }
    return true;
}

static void leaf_set_perm(BlockDriverState *bs, unsigned perm, unsigned shared)
{
    Leaf *l = bs->opaque;
    l->perm = perm;
    l->shared = shared;
}

static void leaf_abort_perm(BlockDriverState *bs)
{
    ((Leaf *)bs->opaque)->aborts++;
}

static int leaf_preadv(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                       IoVector *qiov, size_t qiov_offset, int flags)
{
    Leaf *l = bs->opaque;
    atomic_fetch_add(&l->inside, 1);
    while (atomic_load(&l->block)) {
        usleep(500);
    }
    iov_vector_memset(qiov, qiov_offset, 0x5a, (size_t)bytes);
    atomic_fetch_sub(&l->inside, 1);
    return 0;
}

static int leaf_pwritev(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                        IoVector *qiov, size_t qiov_offset, int flags)
{
    atomic_fetch_add(&((Leaf *)bs->opaque)->writes, 1);
    return 0;
}

static int leaf_flush(BlockDriverState *bs)
{
    return 0;
}

static int64_t leaf_getlength(BlockDriverState *bs)
{
    return ((Leaf *)bs->opaque)->length;
}

static void leaf_refresh_limits(BlockDriverState *bs)
{
    bs->bl.request_alignment = ((Leaf *)bs->opaque)->align;
}

static bool reopen_any(BDRVReopenState *state, GError **errp)
{
    json_object_del(state->options, "changeable");
    return true;
}

static const BlockDriver leaf_driver = {
    .format_name = "leaf", .protocol_name = "leaf", .instance_size = sizeof(Leaf),
    .open = leaf_open, .close = leaf_close, .reopen_prepare = reopen_any,
    .check_perm = leaf_check_perm, .set_perm = leaf_set_perm, .abort_perm = leaf_abort_perm,
    .preadv = leaf_preadv, .pwritev = leaf_pwritev, .flush = leaf_flush,
    .getlength = leaf_getlength, .refresh_limits = leaf_refresh_limits,
};

static bool pass_open(BlockDriverState *bs, json_t *options, int flags, GError **errp)
{
    return bdrv_open_file_child(bs, NULL, options, BDRV_CHILD_FILTERED | BDRV_CHILD_PRIMARY, errp);
}

static int child_preadv(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                        IoVector *qiov, size_t qiov_offset, int flags)
{
    return bdrv_preadv_part(bs->file, offset, bytes, qiov, qiov_offset, flags);
}

static int child_pwritev(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                         IoVector *qiov, size_t qiov_offset, int flags)
{
    return bdrv_pwritev_part(bs->file, offset, bytes, qiov, qiov_offset, flags);
}

static const BlockDriver pass_driver = {
    .format_name = "pass", .is_filter = true, .open = pass_open, .reopen_prepare = reopen_any,
    .preadv = child_preadv, .pwritev = child_pwritev,
};

static bool layer_open(BlockDriverState *bs, json_t *options, int flags, GError **errp)
{
    return bdrv_open_file_child(bs, NULL, options, BDRV_CHILD_IMAGE, errp);
}

static int64_t layer_getlength(BlockDriverState *bs)
{
    return 65536;
}

static const BlockDriver layer_driver = {
    .format_name = "layer", .is_format = true, .supports_backing = true, .open = layer_open,
    .reopen_prepare = reopen_any, .preadv = child_preadv, .pwritev = child_pwritev,
    .getlength = layer_getlength,
};

/* --- helpers --- */

static json_t *opts(const char *text)
{
    json_t *o = qb_opts_parse(text, NULL, NULL);
    g_assert_nonnull(o);
    return o;
}

static BlockDriverState *open_node(const char *text, int flags)
{
    GError *err = NULL;
    BlockDriverState *bs = bdrv_open(NULL, opts(text), flags, &err);
    g_assert_no_error(err);
    g_assert_nonnull(bs);
    return bs;
}

static BlockBackend *user(BlockDriverState *bs, unsigned perm, unsigned shared)
{
    GError *err = NULL;
    BlockBackend *blk = blk_new_with_bs(bs, perm, shared, &err);
    g_assert_no_error(err);
    return blk;
}

static Leaf *leaf_of(BlockDriverState *bs)
{
    while (bs->file) {
        bs = bs->file->bs;
    }
    g_assert_true(bs->drv == &leaf_driver);
    return bs->opaque;
}

static void assert_perms(BlockDriverState *bs, unsigned perm, unsigned shared)
{
    Leaf *l = leaf_of(bs);
    g_assert_cmphex(l->perm, ==, perm);
    g_assert_cmphex(l->shared, ==, shared);
}

static void assert_error(GError *err, const char *text)
{
    g_assert_nonnull(err);
    g_assert_cmpstr(err->message, ==, text);
    g_error_free(err);
}

/* --- permissions --- */

static void test_format_perms(void)
{
    g_autoptr(BlockDriverState) ro = open_node("driver=layer,file.driver=leaf", 0);
    assert_perms(ro, READ, ALL & ~(WRITE | RESIZE));
    g_autoptr(BlockDriverState) rw = open_node("driver=layer,file.driver=leaf", BDRV_O_RDWR);
    assert_perms(rw, READ | WRITE | RESIZE, ALL & ~(WRITE | RESIZE));
    g_autoptr(BlockDriverState) info = open_node("driver=layer,file.driver=leaf", BDRV_O_NO_IO);
    assert_perms(info, 0, ALL & ~(WRITE | RESIZE));
    g_autoptr(BlockDriverState) forced =
        open_node("driver=layer,file.driver=leaf,force-share=on", 0);
    assert_perms(forced, READ, ALL);
}

static void test_filter_perms(void)
{
    g_autoptr(BlockDriverState) bs = open_node("driver=pass,file.driver=leaf", BDRV_O_RDWR);
    assert_perms(bs, 0, ALL);
    BlockBackend *a = user(bs, READ | WRITE, ALL);
    BlockBackend *b = user(bs, READ, READ | WRITE);
    assert_perms(bs, READ | WRITE, READ | WRITE);
    blk_unref(b);
    assert_perms(bs, READ | WRITE, ALL);
    g_assert_true(blk_set_perm(a, READ, ALL & ~RESIZE, NULL));
    assert_perms(bs, READ, ALL & ~RESIZE);
    blk_unref(a);
    assert_perms(bs, 0, ALL);
}

static void test_backing_perms(void)
{
    g_autoptr(BlockDriverState) top = open_node(
        "driver=layer,file.driver=leaf,backing.driver=pass,backing.file.driver=leaf", BDRV_O_RDWR);
    BlockDriverState *base = top->backing->bs;
    g_assert_true(base->read_only && !top->read_only);
    assert_perms(base, 0, ALL);
    BlockBackend *a = user(top, READ | WRITE, ALL);
    assert_perms(base, READ, ALL);
    g_assert_true(blk_set_perm(a, READ | WRITE, READ, NULL));
    assert_perms(base, READ, READ | UNCHANGED);
    blk_unref(a);
}

static void test_conflict(void)
{
    GError *err = NULL;
    g_autoptr(BlockDriverState) bs = open_node("driver=leaf,node-name=q0", BDRV_O_RDWR);
    g_autoptr(BlockBackend) a = user(bs, READ | WRITE, ALL & ~RESIZE);
    g_assert_true(blk_is_writable(a));
    g_assert_null(blk_new_with_bs(bs, READ | RESIZE, ALL, &err));
    assert_error(err, "Permission conflict on node 'q0': permissions 'resize' are both required by "
                      "an unnamed block device (uses node 'q0' as 'root' child) and unshared by an "
                      "unnamed block device (uses node 'q0' as 'root' child).");
    assert_perms(bs, READ | WRITE, ALL & ~RESIZE);
    g_assert_cmpuint(bs->parents->len, ==, 1);
    err = NULL;
    g_assert_null(blk_new_with_bs(bs, READ, READ, &err));
    g_assert_nonnull(strstr(err->message, "permissions 'write' are both required by"));
    g_error_free(err);
}

static void test_read_only_node(void)
{
    GError *err = NULL;
    g_autoptr(BlockDriverState) bs = open_node("driver=leaf", 0);
    g_assert_null(blk_new_with_bs(bs, READ | WRITE, ALL, &err));
    assert_error(err, "Block node is read-only");
    g_autoptr(BlockBackend) blk = user(bs, READ, ALL);
    g_assert_cmpint(blk_pwrite(blk, 0, 1, "x", 0), ==, -EPERM);
    err = NULL;
    g_assert_false(blk_set_perm(blk, READ | WRITE, ALL, &err));
    assert_error(err, "Block node is read-only");
}

static void test_refused_below(void)
{
    GError *err = NULL;
    g_autoptr(BlockDriverState) bs = open_node("driver=pass,file.driver=leaf", BDRV_O_RDWR);
    Leaf *l = leaf_of(bs);
    g_autoptr(BlockBackend) blk = user(bs, READ, ALL);
    l->refuse = WRITE;
    g_assert_false(blk_set_perm(blk, READ | WRITE, ALL, &err));
    assert_error(err, "leaf refuses 2");
    assert_perms(bs, READ, ALL);
    g_assert_cmphex(blk_root(blk)->new_perm, ==, READ);
    g_assert_cmphex(bs->file->new_perm, ==, READ);
    l->refuse = 0;
    g_assert_true(blk_set_perm(blk, READ | WRITE, ALL, NULL));
    assert_perms(bs, READ | WRITE, ALL);
}

/* --- edges --- */

static void test_set_backing(void)
{
    GError *err = NULL;
    g_autoptr(BlockDriverState) top = open_node("driver=layer,file.driver=leaf", BDRV_O_RDWR);
    BlockDriverState *a = open_node("driver=layer,file.driver=leaf,node-name=a", 0);
    g_autoptr(BlockDriverState) b = open_node("driver=leaf,node-name=b", 0);
    g_assert_true(bdrv_set_backing(top, a, &err));
    g_assert_true(top->backing->bs == a);
    bdrv_unref(a); /* the edge keeps it */
    {
        BDRV_GRAPH_GUARD();
        g_assert_true(bdrv_backing_chain_next(top) == a);
    }
    g_assert_true(bdrv_find_backing_image(top, "a") == a);
    g_assert_false(bdrv_set_backing(a, top, &err));
    g_assert_nonnull(strstr(err->message, "would create a cycle"));
    g_clear_error(&err);
    g_assert_true(bdrv_set_backing(top, b, &err));
    g_assert_null(bdrv_find_node("a"));
    g_assert_true(bdrv_set_backing(top, NULL, &err));
    g_assert_null(top->backing);
    g_assert_false(bdrv_set_backing(b, top, &err));
    g_error_free(err);
}

static void test_set_backing_refused(void)
{
    GError *err = NULL;
    g_autoptr(BlockDriverState) top = open_node("driver=layer,file.driver=leaf", BDRV_O_RDWR);
    g_autoptr(BlockBackend) blk = user(top, READ, ALL);
    g_assert_true(blk_bs(blk) == top);
    g_autoptr(BlockDriverState) a = open_node("driver=leaf,node-name=a", 0);
    g_autoptr(BlockDriverState) b = open_node("driver=leaf,node-name=b", 0);
    g_assert_true(bdrv_set_backing(top, a, NULL));
    leaf_of(b)->refuse = READ;
    g_assert_false(bdrv_set_backing(top, b, &err));
    assert_error(err, "leaf refuses 1");
    g_assert_true(top->backing->bs == a);
    g_assert_cmpuint(b->parents->len, ==, 0);
    g_assert_cmphex(leaf_of(a)->perm, ==, READ);
}

/* Neither settling permissions nor closing may use stack or time out of proportion. */
static void test_deep_chain(void)
{
    const int depth = 3000;
    BlockDriverState *top = open_node("driver=layer,file.driver=leaf", 0), *bs = top;
    for (int i = 0; i < depth; i++) {
        const BdrvAttach at = {.parent = bs, .name = "backing", .role = BDRV_CHILD_COW};
        bs = open_node("driver=layer,file.driver=leaf", 0);
        g_assert_nonnull(bdrv_attach(&at, bs, NULL));
    }
    BlockBackend *blk = user(top, READ, ALL);
    assert_perms(bs, READ, READ | UNCHANGED);
    blk_unref(blk);
    bdrv_unref(top);
    g_assert_cmpint(atomic_load(&open_leaves), ==, 0);
}

static void test_names(void)
{
    GError *err = NULL;
    g_autoptr(BlockDriverState) bs = open_node("driver=leaf,node-name=n1", 0);
    g_assert_true(bdrv_find_node("n1") == bs);
    g_assert_null(bdrv_find_node("n2"));
    g_assert_null(bdrv_open(NULL, opts("driver=leaf,node-name=n1"), 0, &err));
    g_assert_nonnull(strstr(err->message, "Duplicate nodes with node-name='n1'"));
    g_clear_error(&err);
    g_assert_null(bdrv_open(NULL, opts("driver=leaf,node-name=9x"), 0, &err));
    g_assert_nonnull(strstr(err->message, "Invalid node-name: '9x'"));
    g_clear_error(&err);
    g_autoptr(BlockDriverState) two = open_node("driver=pass,file=n1", 0);
    g_assert_true(two->file->bs == bs);
    g_assert_null(bdrv_open(NULL, opts("driver=pass,file=n1,file.size=1"), 0, &err));
    g_assert_nonnull(strstr(err->message, "Cannot reference an existing block device"));
    g_clear_error(&err);
}

static void test_length_goes_up(void)
{
    g_autoptr(BlockDriverState) top =
        open_node("driver=pass,file.driver=pass,file.file.driver=leaf,file.file.size=8k", 0);
    Leaf *l = leaf_of(top);
    g_assert_cmpint(bdrv_getlength(top), ==, 8192);
    l->length = 12288;
    g_assert_cmpint(bdrv_getlength(top->file->bs->file->bs), ==, 8192); /* cached */
    bdrv_set_length(top->file->bs->file->bs, 12288);
    g_assert_cmpint(bdrv_getlength(top), ==, 12288);
}

/* --- BlockBackends and drains --- */

typedef struct Call {
    BlockBackend *blk;
    _Atomic(bool) begun, done;
    int ret;
} Call;

static void *read_once(void *opaque)
{
    Call *c = opaque;
    char buf[512];
    atomic_store(&c->begun, true);
    c->ret = blk_pread(c->blk, 0, sizeof(buf), buf, 0);
    atomic_store(&c->done, true);
    return NULL;
}

static void wait_inside(Leaf *l)
{
    while (!atomic_load(&l->inside)) {
        usleep(500);
    }
}

typedef struct DrainCall {
    BlockDriverState *bs;
    _Atomic(bool) done;
} DrainCall;

static void *drain_once(void *opaque)
{
    DrainCall *d = opaque;
    bdrv_drained_begin(d->bs);
    atomic_store(&d->done, true);
    return NULL;
}

static void test_drain_waits(void)
{
    g_autoptr(BlockDriverState) bs = open_node("driver=pass,file.driver=leaf", 0);
    g_autoptr(BlockBackend) blk = user(bs, READ, ALL);
    Leaf *l = leaf_of(bs);
    Call first = {.blk = blk}, second = {.blk = blk};
    DrainCall d = {.bs = bs->file->bs};
    pthread_t t1, t2, td;
    atomic_store(&l->block, true);
    g_assert_true(qb_thread_start(&t1, "reader", read_once, &first));
    wait_inside(l);
    g_assert_true(qb_thread_start(&td, "drainer", drain_once, &d));
    while (atomic_load(&bs->quiesce) == 0) {
        usleep(1000);
    }
    usleep(20000);
    g_assert_false(atomic_load(&d.done));
    g_assert_cmpuint(atomic_load(&bs->quiesce), ==, 1);
    atomic_store(&l->block, false);
    pthread_join(td, NULL);
    g_assert_true(atomic_load(&first.done));
    g_assert_true(qb_thread_start(&t2, "reader", read_once, &second));
    while (!atomic_load(&second.begun)) {
        usleep(1000);
    }
    usleep(20000);
    g_assert_false(atomic_load(&second.done));
    bdrv_drained_end(d.bs);
    pthread_join(t1, NULL);
    pthread_join(t2, NULL);
    g_assert_cmpint(second.ret, ==, 0);
    g_assert_cmpuint(atomic_load(&bs->quiesce), ==, 0);
}

/* Edges that come and go while a node is drained take their share of the count with them. */
static void test_drain_and_edges(void)
{
    g_autoptr(BlockDriverState) leaf = open_node("driver=leaf,node-name=l", 0);
    bdrv_drained_begin(leaf);
    bdrv_drained_begin(leaf);
    g_autoptr(BlockDriverState) bs = open_node("driver=pass,file=l", 0);
    g_assert_cmpuint(atomic_load(&bs->quiesce), ==, 1);
    g_autoptr(BlockBackend) blk = user(bs, READ, ALL);
    Call c = {.blk = blk};
    pthread_t t;
    g_assert_true(qb_thread_start(&t, "reader", read_once, &c));
    bdrv_drained_end(leaf);
    usleep(20000);
    g_assert_false(atomic_load(&c.done));
    g_autoptr(BlockDriverState) other = open_node("driver=pass,file=l", 0);
    g_clear_pointer(&other, bdrv_unref); /* gone before the drain ends */
    bdrv_drained_end(leaf);
    pthread_join(t, NULL);
    g_assert_cmpint(c.ret, ==, 0);
    g_assert_cmpuint(atomic_load(&bs->quiesce), ==, 0);
    g_assert_cmpuint(atomic_load(&leaf->quiesce), ==, 0);
}

typedef struct Submitted {
    _Atomic(int) done, failed;
} Submitted;

static void count_done(void *opaque, int ret)
{
    Submitted *s = opaque;
    if (ret < 0) {
        atomic_fetch_add(&s->failed, 1);
    }
    atomic_fetch_add(&s->done, 1);
}

static void test_submit(void)
{
    const int n = 200;
    char buf[4096] = {0};
    IOV_VECTOR_AUTO qiov;
    iov_vector_init_buf(&qiov, buf, sizeof(buf));
    Submitted s = {0};
    BlockDriverState *bs = open_node("driver=leaf", BDRV_O_RDWR);
    BlockBackend *blk = user(bs, READ | WRITE, ALL);
    Leaf *l = leaf_of(bs);
    for (int i = 0; i < n; i++) {
        blk_submit(blk, BLK_OP_WRITE, i % 16 * 4096, 4096, &qiov, 0, count_done, &s);
    }
    blk_submit(blk, BLK_OP_FLUSH, 0, 0, NULL, 0, count_done, &s);
    blk_submit(blk, BLK_OP_WRITE, 65536, 4096, &qiov, 0, count_done, &s);
    blk_submit(blk, BLK_OP_READ, -1, 4096, &qiov, 0, count_done, &s);
    blk_drain(blk);
    g_assert_cmpint(atomic_load(&s.done), ==, n + 3);
    g_assert_cmpint(atomic_load(&s.failed), ==, 2);
    g_assert_cmpint(atomic_load(&l->writes), ==, n);
    for (int i = 0; i < n; i++) {
        blk_submit(blk, BLK_OP_WRITE, 0, 4096, &qiov, 0, count_done, &s);
    }
    blk_unref(blk); /* waits for them */
    g_assert_cmpint(atomic_load(&s.done), ==, 2 * n + 3);
    g_assert_cmpint(atomic_load(&l->writes), ==, 2 * n);
    bdrv_unref(bs);
}

static void test_ranges(void)
{
    char buf[512];
    g_autoptr(BlockDriverState) bs = open_node("driver=leaf", BDRV_O_RDWR);
    g_autoptr(BlockBackend) blk = user(bs, READ | WRITE, ALL);
    g_assert_cmpint(blk_pread(blk, 65536 - 512, 512, buf, 0), ==, 0);
    g_assert_cmpint(buf[0], ==, 0x5a);
    g_assert_cmpint(blk_pread(blk, 65536 - 511, 512, buf, 0), ==, -EIO);
    g_assert_cmpint(blk_pread(blk, -1, 1, buf, 0), ==, -EIO);
    g_assert_cmpint(blk_pread(blk, 0, -1, buf, 0), ==, -EIO);
    g_assert_cmpint(blk_pwrite(blk, INT64_MAX, 512, buf, 0), ==, -EIO);
    g_assert_cmpint(blk_pdiscard(blk, 0, 65537), ==, -EIO);
    g_assert_cmpint(blk_pread(blk, 65536, 0, buf, 0), ==, 0);
}

/* --- many at once --- */

typedef struct Storm {
    BlockDriverState *bs;
    BlockBackend *blk;
    _Atomic(bool) stop;
} Storm;

static void *storm_reader(void *opaque)
{
    Storm *s = opaque;
    char buf[512];
    while (!atomic_load(&s->stop)) {
        g_assert_cmpint(blk_pread(s->blk, 512, sizeof(buf), buf, 0), ==, 0);
    }
    return NULL;
}

static void *storm_drainer(void *opaque)
{
    Storm *s = opaque;
    for (int i = 0; i < 200; i++) {
        bdrv_drained_begin(s->bs->file->bs);
        g_assert_cmpint(atomic_load(&leaf_of(s->bs)->inside), ==, 0);
        bdrv_drained_end(s->bs->file->bs);
    }
    return NULL;
}

static void *storm_user(void *opaque)
{
    Storm *s = opaque;
    for (int i = 0; i < 200; i++) {
        g_autoptr(BlockBackend) blk = user(s->bs, READ, ALL);
        char c;
        g_assert_cmpint(blk_pread(blk, 0, 1, &c, 0), ==, 0);
    }
    return NULL;
}

static void test_storm(void)
{
    void *(*const roles[])(void *) = {storm_reader, storm_reader, storm_drainer, storm_drainer,
                                      storm_user};
    pthread_t threads[G_N_ELEMENTS(roles)];
    Storm s = {.bs = open_node("driver=layer,file.driver=leaf", 0)};
    s.blk = user(s.bs, READ, ALL);
    for (size_t i = 0; i < G_N_ELEMENTS(roles); i++) {
        g_assert_true(qb_thread_start(&threads[i], "storm", roles[i], &s));
    }
    for (size_t i = 2; i < G_N_ELEMENTS(roles); i++) {
        pthread_join(threads[i], NULL);
    }
    atomic_store(&s.stop, true);
    pthread_join(threads[0], NULL);
    pthread_join(threads[1], NULL);
    blk_unref(s.blk);
    bdrv_unref(s.bs);
}

/*
 * Requests that are queued with their ticket drawn, others that wait for those tickets (they read,
 * modify and write the same block), and graph changes elsewhere: nobody may wait in a circle.
 */
static void test_submit_and_graph_changes(void)
{
    char buf[512] = {0};
    IOV_VECTOR_AUTO qiov;
    iov_vector_init_buf(&qiov, buf, sizeof(buf));
    Submitted s = {0};
    BlockDriverState *bs = open_node("driver=leaf,align=4k", BDRV_O_RDWR);
    BlockBackend *blk = user(bs, READ | WRITE, ALL);
    const int rounds = 60, burst = 12;
    for (int i = 0; i < rounds; i++) {
        for (int j = 0; j < burst; j++) {
            blk_submit(blk, BLK_OP_WRITE, j % 3 * 512, 512, &qiov, 0, count_done, &s);
        }
        bdrv_unref(open_node("driver=pass,file.driver=leaf", 0));
    }
    blk_unref(blk);
    g_assert_cmpint(atomic_load(&s.done), ==, rounds * burst);
    g_assert_cmpint(atomic_load(&s.failed), ==, 0);
    bdrv_unref(bs);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    bdrv_register(&leaf_driver);
    bdrv_register(&pass_driver);
    bdrv_register(&layer_driver);
    g_test_add_func("/graph/perms/format", test_format_perms);
    g_test_add_func("/graph/perms/filter", test_filter_perms);
    g_test_add_func("/graph/perms/backing", test_backing_perms);
    g_test_add_func("/graph/perms/conflict", test_conflict);
    g_test_add_func("/graph/perms/read-only-node", test_read_only_node);
    g_test_add_func("/graph/perms/refused-below", test_refused_below);
    g_test_add_func("/graph/edges/set-backing", test_set_backing);
    g_test_add_func("/graph/edges/set-backing-refused", test_set_backing_refused);
    g_test_add_func("/graph/edges/deep-chain", test_deep_chain);
    g_test_add_func("/graph/names", test_names);
    g_test_add_func("/graph/length-goes-up", test_length_goes_up);
    g_test_add_func("/graph/drain/waits", test_drain_waits);
    g_test_add_func("/graph/drain/edges", test_drain_and_edges);
    g_test_add_func("/graph/backend/submit", test_submit);
    g_test_add_func("/graph/backend/submit-and-graph-changes", test_submit_and_graph_changes);
    g_test_add_func("/graph/backend/ranges", test_ranges);
    g_test_add_func("/graph/backend/storm", test_storm);
    int status = g_test_run();
    g_assert_cmpint(atomic_load(&open_leaves), ==, 0);
    qb_pools_shutdown();
    return status;
}
