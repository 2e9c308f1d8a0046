/*
 * The operations that the suites put through crashes and faults: a table.
 *
 *      group guest     requests to an open image
 *      group image     calls that change a whole image
 *      group bitmap    operations on stored dirty bitmaps (operations-bitmap.c)
 *      group verb      qemu-img's verbs, over several files
 *
 * What is damaged before it is repaired is in operations-repair.c.
 *
 * Invariant: what an operation writes depends on the world's kind and on w->value at its beginning
 * only, so that running it again ends with the same content.
 *
 * SPDX-License-Identifier: MIT
 */
#include "tests/harness/operations-int.h"

#include <string.h>

#include "block/job.h"
#include "block/qcow2.h"
#include "util/iov.h"
#include "util/thread.h"

/* ---------------------------------------------------------------- guest */

unsigned operation_group(const World *w, unsigned n)
{
    return n * 4 * w->kind->cluster % (w->kind->sectors - 16 * w->kind->cluster);
}

static bool run_write(World *w)
{
    if (!world_open(w)) {
        return false;
    }
    unsigned c = w->kind->cluster;
    for (unsigned i = 0; i < 4; i++) {
        world_write(w, operation_group(w, i) + 3 * c, c); /* what is not there yet */
        world_write(w, operation_group(w, i + 4) + 3 * c, MAX(c / 4, 1));
        if (i % 2) {
            world_flush(w);
        }
    }
    return world_close(w);
}

static bool run_overwrite(World *w)
{
    if (!world_open(w)) {
        return false;
    }
    unsigned c = w->kind->cluster;
    for (unsigned i = 0; i < 4; i++) {
        world_write(w, operation_group(w, i), 2 * c);
        world_write(w, operation_group(w, i + 5) + c / 2, c);
        if (i == 1) {
            world_flush(w);
        }
    }
    return world_close(w);
}

/* Small writes into clusters that are shared, zero, in the base, or not there. */
static bool run_cow(World *w)
{
    if (!world_open(w)) {
        return false;
    }
    unsigned c = w->kind->cluster;
    for (unsigned i = 0; i < 16; i++) {
        world_write(w, operation_group(w, i / 2) + i % 4 * c + c / 2, 1);
        if (i % 5 == 4) {
            world_flush(w);
        }
    }
    return world_close(w);
}

/* Cluster @at goes in two parts, and somebody wants its space. */
static void zero_by_halves(World *w, unsigned at)
{
    unsigned c = w->kind->cluster;
    if (c > 1) {
        world_zero(w, at + c / 2, c / 2, BDRV_REQ_MAY_UNMAP);
        world_flush(w);
        world_zero(w, at, c / 2, BDRV_REQ_MAY_UNMAP);
        world_write(w, operation_group(w, 7) + 3 * c, c);
    }
}

static bool run_zero(World *w)
{
    if (!world_open(w)) {
        return false;
    }
    unsigned c = w->kind->cluster;
    zero_by_halves(w, operation_group(w, 1));
    world_zero(w, operation_group(w, 0), 3 * c, 0);
    world_zero(w, operation_group(w, 2), 4 * c, BDRV_REQ_MAY_UNMAP);
    world_zero(w, operation_group(w, 4) + c / 2, 5 * c, BDRV_REQ_MAY_UNMAP);
    world_flush(w);
    world_write(w, operation_group(w, 0), c);
    world_zero(w, operation_group(w, 6), 8 * c, BDRV_REQ_MAY_UNMAP);
    world_write(w, operation_group(w, 6) + c, c);
    return world_close(w);
}

/* What was freed is wanted again at once. */
static bool run_discard(World *w)
{
    if (!world_open(w)) {
        return false;
    }
    unsigned c = w->kind->cluster;
    world_discard(w, operation_group(w, 0), 4 * c);
    world_write(w, operation_group(w, 4) + 3 * c, c);
    world_write(w, operation_group(w, 0), c);
    world_flush(w);
    world_discard(w, operation_group(w, 2), 8 * c);
    world_write(w, operation_group(w, 5) + 3 * c, c);
    world_flush(w);
    world_write(w, operation_group(w, 6) + 3 * c, c);
    world_write(w, operation_group(w, 2) + c, c);
    return world_close(w);
}

/* Subclusters go one after the other, the last ones with their host cluster, which is wanted again;
 * some come back in between. */
static bool run_discard_parts(World *w)
{
    if (!world_open(w)) {
        return false;
    }
    unsigned c = w->kind->cluster, at = operation_group(w, 0), other = operation_group(w, 2);
    world_discard_parts(w, at + c / 4, c / 4);
    world_discard_parts(w, other + c / 2, 2 * c + c / 4); /* and of what is zero, or not there */
    world_flush(w);
    world_write(w, at + c / 4 + 1, 2);
    world_discard_parts(w, at + c / 2, c);
    world_flush(w);
    world_discard_parts(w, at, c / 2);
    world_write(w, operation_group(w, 4) + 3 * c, c);
    world_discard_parts(w, other + 1, c / 2);
    world_discard_parts(w, other, 1);
    world_flush(w);
    world_write(w, operation_group(w, 5) + 3 * c, 2 * c);
    world_write(w, at + 3, 1);
    world_discard_parts(w, operation_group(w, 6) + c - 1, 4 * c + 2);
    return world_close(w);
}

static bool run_discard_all(World *w)
{
    if (!world_open(w)) {
        return false;
    }
    world_discard(w, 0, w->kind->sectors);
    world_write(w, operation_group(w, 1), w->kind->cluster);
    return world_close(w);
}

/* Clusters that are free are not empty: an operation that was interrupted wrote to them. */
static void leave_remains(World *w)
{
    unsigned top = disk_number("top");
    size_t bytes = 32 * w->kind->cluster * ORACLE_SECTOR;
    DiskImage image = disk_save(top);
    image.data = g_realloc(image.data, image.length + bytes);
    memset(image.data + image.length, 0xa5, bytes);
    image.length += bytes;
    disk_load(top, &image);
    disk_image_clear(&image);
}

/* Compressed clusters come, are overwritten in part and whole, and their space is used again. */
static bool run_compressed(World *w)
{
    if (!world_open(w)) {
        return false;
    }
    unsigned c = w->kind->cluster;
    world_discard(w, operation_group(w, 1), 4 * c);
    world_write_flags(w, operation_group(w, 1), 4 * c, BDRV_REQ_COMPRESSED);
    world_flush(w);
    world_write(w, operation_group(w, 1), c);
    world_write(w, operation_group(w, 1) + c + c / 2, 1);
    world_write(w, operation_group(w, 3) + 3 * c, c);
    world_discard(w, operation_group(w, 2), 4 * c);
    world_flush(w);
    world_write_flags(w, operation_group(w, 2), 4 * c, BDRV_REQ_COMPRESSED);
    world_write(w, operation_group(w, 2) + 2 * c, c);
    return world_close(w);
}

#define NO_COMPRESSION (KIND_DATA_FILE | KIND_NO_DISCARD | KIND_QED)

static bool can_compress(const World *w)
{
    return !(w->kind->flags & NO_COMPRESSION);
}

void operation_random_request(World *w, GRand *rand)
{
    unsigned c = w->kind->cluster;
    unsigned n = (unsigned)g_rand_int_range(rand, 1, (gint32)(4 * c));
    unsigned at = (unsigned)g_rand_int_range(rand, 0, (gint32)(w->kind->sectors - 4 * c));
    switch (g_rand_int_range(rand, 0, 8)) {
    case 0:
        world_flush(w);
        break;
    case 1:
        if (n % 3) {
            world_discard(w, at / c * c, 2 * c);
        } else {
            world_discard(w, at, n);
        }
        break;
    case 2:
        world_zero(w, at, n, n % 2 ? BDRV_REQ_MAY_UNMAP : 0);
        break;
    case 3:
        world_discard(w, at / c * c, c);
        world_write_flags(w, at / c * c, c, can_compress(w) ? BDRV_REQ_COMPRESSED : 0);
        break;
    default:
        world_write(w, at, n);
    }
}

static bool random_requests(World *w, guint32 seed, unsigned n)
{
    if (!world_open(w)) {
        return false;
    }
    g_autoptr(GRand) rand = g_rand_new_with_seed(seed);
    for (unsigned i = 0; i < n; i++) {
        operation_random_request(w, rand);
    }
    return world_close(w);
}

static bool run_random1(World *w)
{
    return random_requests(w, 1, 40);
}

static bool run_random2(World *w)
{
    return random_requests(w, 2, 40);
}

static bool run_open_close(World *w)
{
    return world_open(w) && world_close(w);
}

/* Nobody flushes: what closing does, it does alone, and nothing was promised. */
static bool run_close(World *w)
{
    if (!world_open(w)) {
        return false;
    }
    unsigned c = w->kind->cluster;
    world_write(w, operation_group(w, 0) + 3 * c, c);
    world_write(w, operation_group(w, 1) + c / 2, 1);
    world_discard(w, operation_group(w, 2), 4 * c);
    world_zero(w, operation_group(w, 3), 3 * c, 0);
    if (w->at_close) {
        w->at_close(w);
    }
    g_clear_pointer(&w->blk, blk_unref);
    return true;
}

/* ---------------------------------------------------------------- several threads */

#define THREADS 3

typedef struct Part {
    pthread_t thread;
    World world;
    guint32 seed;
} Part;

/* Requests of one thread to its own sectors; cluster and tables at their ends are shared. */
static void *run_part(void *opaque)
{
    Part *p = opaque;
    World *w = &p->world;
    unsigned c = w->kind->cluster;
    g_autoptr(GRand) rand = g_rand_new_with_seed(p->seed);
    for (unsigned i = 0; i < 14; i++) {
        unsigned n = (unsigned)g_rand_int_range(rand, 1, (gint32)(2 * c + 1));
        unsigned at = w->own_first +
                      (unsigned)g_rand_int_range(rand, 0, (gint32)(w->own_n - 2 * c));
        if (i % 5 == 4) {
            world_flush(w);
        } else if (i % 7 == 3) {
            world_zero(w, at, n, BDRV_REQ_MAY_UNMAP);
        } else {
            world_write(w, at, n);
        }
    }
    return NULL;
}

/* Flushes begin and end while others write. */
static bool run_threads(World *w)
{
    Part parts[THREADS];
    unsigned own = w->kind->sectors / THREADS;
    if (!world_open(w)) {
        return false;
    }
    disk_set_jitter(true);
    for (unsigned i = 0; i < THREADS; i++) {
        parts[i] = (Part){.world = world_part(w, i * own, own), .seed = i};
        parts[i].world.value += 20 * i;
        g_assert_true(qb_thread_start(&parts[i].thread, "part", run_part, &parts[i]));
    }
    for (unsigned i = 0; i < THREADS; i++) {
        pthread_join(parts[i].thread, NULL);
        world_part_end(w, &parts[i].world);
    }
    disk_set_jitter(false);
    return world_close(w);
}

/* ---------------------------------------------------------------- growing tables */

/* Every eighth sector is not there afterwards, so that tables are that want more entries. */
static void fill_up_to(World *w, uint64_t clusters)
{
    const BDRVQcow2State *s = qcow2_state(blk_bs(w->blk));
    unsigned sectors = w->view[VIEW_TOP].oracle.sectors;
    for (unsigned at = 0; at < sectors && s->file_end >> s->cluster_bits < clusters; at++) {
        if (at % 8 != 7) {
            world_write(w, at, 1);
        }
    }
    g_assert_cmpuint(s->file_end >> s->cluster_bits, >=, clusters);
}

/* 512-byte clusters, counts of 64 bits: soon a block of 64 counts is full. */
static void fill_block(World *w)
{
    g_assert_true(world_open(w));
    uint64_t clusters = qcow2_state(blk_bs(w->blk))->file_end / ORACLE_SECTOR;
    fill_up_to(w, qb_align_up(clusters + 8, 64) - 4);
    g_assert_true(world_close(w));
}

/* And here a table of 64 blocks. */
static void fill_table(World *w)
{
    g_assert_true(world_open(w));
    world_mark_resize(w, VIEW_TOP, 6144);
    g_assert_true(blk_truncate(w->blk, 6144 * ORACLE_SECTOR, true, PREALLOC_MODE_OFF, false, NULL));
    world_mark_done(w, VIEW_TOP, true);
    fill_up_to(w, 64 * 64 - 4);
    g_assert_true(world_close(w));
}

/* Into tables that are there. */
static bool run_new_counts(World *w)
{
    if (!world_open(w)) {
        return false;
    }
    for (unsigned i = 0; i < 18; i++) {
        world_write(w, 8 * i + 7, 1);
        if (i % 6 == 5) {
            world_discard(w, 8 * i + 5, 1);
            world_flush(w);
        }
    }
    return world_close(w);
}

/* The L1 table needs another cluster, and then more. */
static bool run_grow_l1(World *w)
{
    if (!world_open(w)) {
        return false;
    }
    bool ok = true;
    for (unsigned sectors = 4096; ok && sectors <= 12288; sectors *= 3) {
        GError *err = NULL;
        world_mark_resize(w, VIEW_TOP, sectors);
        ok = blk_truncate(w->blk, sectors * ORACLE_SECTOR, true, PREALLOC_MODE_OFF, false, &err);
        world_note(w, ok, "truncate", err);
        world_mark_done(w, VIEW_TOP, ok);
        if (ok) {
            world_write(w, sectors - 3, 2);
            world_write(w, 3, 1);
        }
    }
    return world_close(w) && ok;
}

/* ---------------------------------------------------------------- whole images */

static bool resize(World *w, unsigned sectors, PreallocMode prealloc)
{
    GError *err = NULL;
    if (!world_open(w)) {
        return false;
    }
    world_mark_resize(w, VIEW_TOP, sectors);
    bool ok = blk_truncate(w->blk, (int64_t)sectors * ORACLE_SECTOR, true, prealloc, true, &err);
    world_note(w, ok, "truncate", err);
    world_mark_done(w, VIEW_TOP, ok);
    return world_close(w) && ok;
}

static bool run_grow(World *w)
{
    return resize(w, w->kind->sectors * 3, PREALLOC_MODE_OFF);
}

static bool run_grow_metadata(World *w)
{
    return resize(w, w->kind->sectors * 2, PREALLOC_MODE_METADATA);
}

static bool run_grow_full(World *w)
{
    return resize(w, w->kind->sectors / 4 * 5, PREALLOC_MODE_FULL);
}

static bool run_shrink(World *w)
{
    return resize(w, w->kind->sectors / 4 + 1, PREALLOC_MODE_OFF);
}

static bool run_shrink_grow(World *w)
{
    return resize(w, w->kind->sectors / 2 + 1, PREALLOC_MODE_OFF) &&
           resize(w, w->kind->sectors, PREALLOC_MODE_OFF);
}

/* What lies in the second half of the disk lies in front of what lies in the first. */
static void turn_around(World *w)
{
    unsigned c = w->kind->cluster, half = w->kind->sectors / 2 / c * c;
    int flags = w->kind->flags & KIND_COMPRESSED ? BDRV_REQ_COMPRESSED : 0;
    g_assert_true(world_open(w));
    world_discard(w, 0, w->kind->sectors);
    world_flush(w);
    for (unsigned first = half; first + 4 * c <= w->kind->sectors; first += 4 * c) {
        world_write(w, first, 4 * c);
    }
    for (unsigned first = 0; first + 3 * c <= half; first += 4 * c) {
        world_write_flags(w, first, 3 * c, flags);
    }
    g_assert_true(world_close(w));
}

static bool run_shrink_moves(World *w)
{
    return resize(w, w->kind->sectors / 2 + 1, PREALLOC_MODE_OFF);
}

/* A snapshot makes stable what it shows. */
static bool create_snapshot(World *w)
{
    GError *err = NULL;
    world_mark_appear(w, VIEW_SNAP1, VIEW_TOP);
    bool ok = bdrv_snapshot_create(blk_bs(w->blk), "s1", &err);
    if (world_note(w, ok, "create", err)) {
        world_mark_done(w, VIEW_TOP, true);
    }
    world_mark_done(w, VIEW_SNAP1, ok);
    return ok;
}

/* The image is dirty when it begins. */
static bool run_snapshot_create(World *w)
{
    if (!world_open(w)) {
        return false;
    }
    bool ok = world_write(w, operation_group(w, 3), w->kind->cluster + 1) == 0 &&
              create_snapshot(w);
    return world_close(w) && ok;
}

/* A snapshot has what is at the end, too, and there are holes before it. */
static void share_the_end(World *w)
{
    unsigned c = w->kind->cluster, half = w->kind->sectors / 2 / c * c;
    turn_around(w);
    g_assert_true(world_open(w));
    world_discard(w, half, w->kind->sectors / 4);
    g_assert_true(create_snapshot(w));
    g_assert_true(world_close(w));
}

/* Nothing but the lists of snapshots and bitmaps, with what they name, lies at the end. */
static void free_the_front(World *w)
{
    g_assert_true(world_open(w));
    world_discard(w, 0, w->kind->sectors);
    world_flush(w);
    world_write(w, operation_group(w, 1), w->kind->cluster);
    g_assert_true(world_close(w));
}

/* A sector gets the value that it has. */
static void write_again(World *w, unsigned sector)
{
    unsigned last = w->value, now = w->view[VIEW_TOP].oracle.now[sector];
    g_assert_cmpuint(now, >, 0);
    w->value = now - 1;
    world_write(w, sector, 1);
    w->value = last;
}

/* As a machine that is saved does it: its state goes behind the disk, then comes the snapshot. */
static bool run_save_vm(World *w)
{
    uint8_t state[7000], found[sizeof(state)];
    memset(state, 0x5a, sizeof(state));
    if (!world_open(w)) {
        return false;
    }
    IoVector out, in;
    iov_vector_init_buf(&out, state, sizeof(state));
    iov_vector_init_buf(&in, found, sizeof(found));
    bool ok = blk_save_vmstate(w->blk, &out, 1000) >= 0;
    world_note(w, ok, "save", NULL);
    ok = ok && world_write(w, operation_group(w, 3), w->kind->cluster + 1) == 0 &&
         create_snapshot(w);
    write_again(w, operation_group(w, 0));
    if (ok) {
        ok = blk_load_vmstate(w->blk, &in, 1000) >= 0 && !memcmp(state, found, sizeof(state));
        world_note(w, ok, "load", NULL);
    }
    return world_close(w) && ok;
}

static bool delete_snapshot(World *w)
{
    GError *err = NULL;
    world_mark_vanish(w, VIEW_SNAP0);
    bool ok = bdrv_snapshot_delete(blk_bs(w->blk), NULL, "s0", &err);
    world_note(w, ok, "delete", err);
    world_mark_done(w, VIEW_SNAP0, ok);
    return ok;
}

static bool run_snapshot_delete(World *w)
{
    if (!world_open(w)) {
        return false;
    }
    bool ok = delete_snapshot(w);
    return world_close(w) && ok;
}

/* A second snapshot lies behind the first one, which goes: there is nothing in front of it. */
static void leave_last_snapshot(World *w)
{
    free_the_front(w);
    g_assert_true(world_open(w));
    g_assert_true(create_snapshot(w));
    world_write(w, operation_group(w, 1), w->kind->cluster); /* tables of its own, some of them */
    g_assert_true(delete_snapshot(w));
    g_assert_true(world_close(w));
}

/* All data moves behind those of the first snapshot, which goes; a second one keeps it there. */
static void keep_the_end(World *w)
{
    unsigned c = w->kind->cluster;
    g_assert_true(world_open(w));
    for (unsigned at = 0; at + c <= w->kind->sectors; at += c) {
        world_write(w, at, c);
    }
    g_assert_true(create_snapshot(w));
    g_assert_true(delete_snapshot(w));
    g_assert_true(world_close(w));
}

static bool run_snapshot_apply(World *w)
{
    GError *err = NULL;
    if (!world_open(w)) {
        return false;
    }
    world_mark_merge(w, VIEW_TOP, VIEW_SNAP0);
    bool ok = bdrv_snapshot_apply(blk_bs(w->blk), "s0", &err);
    world_note(w, ok, "apply", err);
    world_mark_done(w, VIEW_TOP, ok);
    return world_close(w) && ok;
}

static bool run_make_empty(World *w)
{
    GError *err = NULL;
    if (!world_open(w)) {
        return false;
    }
    world_mark_shows_base(w);
    bool ok = blk_make_empty(w->blk, false, &err);
    world_note(w, ok, "make_empty", err);
    world_mark_done(w, VIEW_TOP, ok);
    return world_close(w) && ok;
}

/* Clusters that are not there yet get data until no free one is left in the file, which cannot grow
 * any more then. */
static void fill_disk(World *w)
{
    unsigned top = disk_number("top");
    g_assert_true(world_open(w));
    uint64_t length = disk_length(top);
    unsigned step = w->kind->cluster;
    for (unsigned at = 0; disk_length(top) == length && at < w->kind->sectors; at += step) {
        world_write(w, at, 1);
    }
    g_assert_true(world_close(w));
    g_assert_cmpuint(disk_length(top), >, length);
    disk_set_limit(top, disk_length(top));
}

/* ---------------------------------------------------------------- verbs */

static bool run_commit(World *w)
{
    world_mark_merge(w, VIEW_BASE, VIEW_TOP);
    bool ok = world_verb(w, "commit -q --image-opts %TOP");
    world_mark_done(w, VIEW_BASE, ok);
    return ok;
}

static bool commit_open(World *w, GError **errp)
{
    BlockDriverState *top = blk_bs(w->blk), *base = bdrv_backing_chain_next(top);
    QbProgress progress = {0};
    CommitOptions opts = {.top = top, .base = base, .progress = &progress};
    return bdrv_reopen_set_read_only(base, false, errp) && commit_run(&opts, errp);
}

/* What a commit has reported as done is stable, though its base stays open for writing. */
static bool run_commit_live(World *w)
{
    GError *err = NULL;
    if (!world_open(w)) {
        return false;
    }
    world_mark_merge(w, VIEW_BASE, VIEW_TOP);
    bool ok = commit_open(w, &err);
    world_note(w, ok, "commit", err);
    world_mark_done(w, VIEW_BASE, ok);
    write_again(w, operation_group(w, 2));
    return world_close(w) && ok;
}

/* Another base, which differs from the old one and from the image. */
static void make_other(World *w)
{
    g_autofree char *create =
        g_strdup_printf("create -q -f qcow2 -o cluster_size=8k test-disk:other %u",
                        w->kind->sectors * ORACLE_SECTOR);
    g_autofree char *why = NULL;
    g_assert_true(world_verb(w, create));
    g_autoptr(BlockBackend) blk = world_open_view(w, VIEW_OTHER, BDRV_O_RDWR, &why);
    g_assert_nonnull(blk);
    View *v = &w->view[VIEW_OTHER];
    unsigned first = w->kind->sectors / 3, n = w->kind->sectors / 2;
    g_autofree uint8_t *buf = g_malloc((size_t)n * ORACLE_SECTOR);
    oracle_fill(buf, first, n, 60);
    g_assert_cmpint(blk_pwrite(blk, (int64_t)first * ORACLE_SECTOR, (int64_t)n * ORACLE_SECTOR, buf,
                               0), ==, 0);
    v->presence = VIEW_PRESENT;
    oracle_init(&v->oracle, w->kind->sectors);
    oracle_write(&v->oracle, first, n, 60);
    oracle_settle(&v->oracle);
}

/* Keeps what the image shows. Its snapshots show the new base where they have nothing, hence none
 * here. */
static bool run_rebase(World *w)
{
    return world_verb(w, "rebase -q --image-opts -b test-disk:other -F qcow2 %TOP");
}

static bool run_rebase_none(World *w)
{
    return world_verb(w, "rebase -q --image-opts -b '' %TOP");
}

/* A name so long that it stands in several sectors of the header, then one that does not. */
static bool run_rename_base(World *w)
{
    unsigned room = w->kind->cluster * ORACLE_SECTOR;
    const char *format = w->kind->flags & KIND_RAW_BASE ? "raw" : "qcow2";
    g_autofree char *tail = g_strnfill(room > ORACLE_SECTOR ? 700 : 30, 'x');
    g_autofree char *longer = g_strdup_printf("rebase -q -u --image-opts -b test-disk:base+%s -F %s"
                                              " %%TOP", tail, format);
    g_autofree char *shorter =
        g_strdup_printf("rebase -q -u --image-opts -b test-disk:base+ -F %s %%TOP", format);
    return world_verb(w, longer) && world_verb(w, shorter);
}

/* Into an image that exists, with a cache mode that flushes. */
static bool run_convert_into(World *w)
{
    world_mark_merge(w, VIEW_OTHER, VIEW_TOP);
    bool ok = world_verb(w, "convert -q -m 1 -n -t writeback --image-opts --target-image-opts "
                            "%TOP %OTHER");
    world_mark_done(w, VIEW_OTHER, ok);
    return ok;
}

/* A target made anew is nothing before it is done, and settles only with a flush. */
static bool convert_new(World *w, const char *command)
{
    world_mark_appear(w, VIEW_OTHER, VIEW_TOP);
    bool ok = world_verb(w, command);
    world_mark_done(w, VIEW_OTHER, ok);
    return ok;
}

static bool run_convert(World *w)
{
    return convert_new(w, "convert -q -m 1 -t writeback -O qcow2 -o cluster_size=4k --image-opts "
                          "%TOP test-disk:other");
}

static bool run_convert_compressed(World *w)
{
    return convert_new(w, "convert -q -m 1 -c -t writeback -O qcow2 -o cluster_size=4k "
                          "--image-opts %TOP test-disk:other");
}

static bool run_create(World *w)
{
    g_autofree char *command =
        g_strdup_printf("create -q -f qcow2 -o %s,preallocation=metadata test-disk:other %u",
                        w->kind->create, w->kind->sectors * ORACLE_SECTOR);
    world_mark_appear_empty(w, VIEW_OTHER);
    bool ok = world_verb(w, command);
    world_mark_done(w, VIEW_OTHER, ok);
    return ok;
}

static bool run_amend_data_file(World *w)
{
    return world_verb(w, "amend -q --image-opts -o data_file=another-name-that-is-longer %TOP");
}

static bool run_amend_lazy(World *w)
{
    bool lazy = strstr(w->kind->create, "lazy");
    return world_verb(w, lazy ? "amend -q --image-opts -o lazy_refcounts=off %TOP"
                              : "amend -q --image-opts -o lazy_refcounts=on %TOP");
}

static bool run_amend_size(World *w)
{
    unsigned sectors = w->kind->sectors * 2;
    g_autofree char *command = g_strdup_printf("amend -q --image-opts -o size=%u %%TOP",
                                               sectors * ORACLE_SECTOR);
    world_mark_resize(w, VIEW_TOP, sectors);
    bool ok = world_verb(w, command);
    world_mark_done(w, VIEW_TOP, ok);
    return ok;
}

static bool run_amend_width(World *w)
{
    return world_verb(w, "amend -q --image-opts -o refcount_bits=32 %TOP");
}

/* The counts lie at the end of the file now, and go back to the front: the file can be cut. */
static void prepare_amend_back(World *w)
{
    g_assert_true(run_amend_width(w));
}

static bool run_amend_back(World *w)
{
    return world_verb(w, "amend -q --image-opts -o refcount_bits=16 %TOP");
}

static bool run_amend_narrow(World *w)
{
    return world_verb(w, "amend -q --image-opts -o refcount_bits=8 %TOP");
}

static bool run_amend_upgrade(World *w)
{
    return world_verb(w, "amend -q --image-opts -o compat=1.1,lazy_refcounts=on %TOP");
}

static bool run_amend_downgrade(World *w)
{
    return world_verb(w, "amend -q --image-opts -o compat=0.10 %TOP");
}

/* ---------------------------------------------------------------- the table */

#define OVER KIND_BACKING

const Operation operations[] = {
    {"open-close", "guest", NULL, run_open_close, 0, 0, 0, NULL},
    {"close", "guest", NULL, run_close, 0, 0, 0, NULL},
    {"write", "guest", NULL, run_write, 0, 0, 0, NULL},
    {"overwrite", "guest", NULL, run_overwrite, 0, 0, 0, NULL},
    {"cow", "guest", NULL, run_cow, 0, 0, 0, NULL},
    {"zero", "guest", NULL, run_zero, 0, 0, 0, NULL},
    {"discard", "guest", NULL, run_discard, 0, 0, 0, NULL},
    {"discard-parts", "guest", NULL, run_discard_parts, KIND_PARTS, 0, 0, NULL},
    {"discard-all", "guest", NULL, run_discard_all, 0, 0, 0, NULL},
    {"new-table-on-remains", "guest", leave_remains, run_discard_all, 0, 0, 0,
     " v3 512 64k ext data-file snapshot backing "},
    {"compressed-write", "guest", NULL, run_compressed, 0, NO_COMPRESSION, 0, NULL},
    {"random-1", "guest", NULL, run_random1, 0, 0, 0, NULL},
    {"random-2", "guest", NULL, run_random2, 0, 0, 0, NULL},
    {"threads", "guest", NULL, run_threads, 0, 0, 0, NULL},
    {"new-refcount-block", "guest", fill_block, run_new_counts, 0, 0, 0, " 512 "},
    {"grow-refcount-table", "guest", fill_table, run_new_counts, 0, 0, 0, " 512 "},
    {"grow-l1-table", "image", NULL, run_grow_l1, 0, 0, 0, " 512 "},
    {"grow", "image", NULL, run_grow, 0, KIND_FIXED, 0, NULL},
    {"grow-metadata", "image", NULL, run_grow_metadata, 0, KIND_FIXED | KIND_QED, 0, NULL},
    {"grow-full", "image", NULL, run_grow_full, 0, KIND_FIXED | KIND_QED, 0, NULL},
    {"shrink", "image", NULL, run_shrink, 0, KIND_FIXED, 0, NULL},
    {"shrink-grow", "image", NULL, run_shrink_grow, 0, KIND_FIXED, 0, NULL},
    {"shrink-moves", "image", turn_around, run_shrink_moves, 0, KIND_FIXED, 0,
     " v3 v2 512 refcount1 ext data-file compressed snapshot snapshot-512 backing "},
    {"shrink-moves-shared", "image", share_the_end, run_shrink_moves, 0, KIND_FIXED, 0,
     " v3 ext compressed "},
    {"shrink-moves-parts", "image", free_the_front, run_shrink_moves, 0, 0, 0,
     " bitmap bitmap-snapshot bitmap-backing "},
    {"shrink-moves-snapshots", "image", leave_last_snapshot, run_shrink_moves, 0, 0, 0,
     " snapshot snapshot-512 snapshot-ext bitmap-snapshot "},
    {"shrink-moves-parts", "bitmap", free_the_front, run_shrink_moves, 0, 0, 0, " bitmap-512 "},
    {"snapshot-create", "image", NULL, run_snapshot_create, 0,
     KIND_NO_SHARING | KIND_DATA_FILE | KIND_QED, 0, NULL},
    {"save-vm", "image", NULL, run_save_vm, 0, KIND_NO_SHARING | KIND_DATA_FILE | KIND_QED, 0,
     NULL},
    {"snapshot-repack", "image", NULL, run_snapshot_create, KIND_TIGHT, 0, 0, NULL},
    {"snapshot-delete", "image", NULL, run_snapshot_delete, KIND_SNAPSHOT, 0, OPERATION_ONCE, NULL},
    {"snapshot-apply", "image", NULL, run_snapshot_apply, KIND_SNAPSHOT, KIND_BITMAPS, 0, NULL},
    {"make-empty", "image", NULL, run_make_empty, OVER, 0, 0, NULL},
    {"make-empty-full", "image", fill_disk, run_make_empty, OVER, 0, 0,
     " backing backing-v2 backing-ext backing-snapshot "},
    {"make-empty-blocks", "image", NULL, run_make_empty, OVER | KIND_BLOCKS, 0, 0, NULL},
    {"make-empty-front", "image", keep_the_end, run_make_empty, OVER | KIND_BLOCKS, 0, 0, NULL},
    {"bitmap-add", "bitmap", NULL, run_bitmap_add, KIND_BITMAPS, 0, 0, NULL},
    {"bitmap-remove", "bitmap", NULL, run_bitmap_remove, KIND_BITMAPS, 0, 0, NULL},
    {"bitmap-remove-broken", "bitmap", NULL, run_bitmap_remove_broken, KIND_BITMAPS, 0, 0, NULL},
    {"bitmap-clear", "bitmap", NULL, run_bitmap_clear, KIND_BITMAPS, 0, 0, NULL},
    {"bitmap-enable", "bitmap", NULL, run_bitmap_enable, KIND_BITMAPS, 0, 0, NULL},
    {"bitmap-disable", "bitmap", NULL, run_bitmap_disable, KIND_BITMAPS, 0, 0, NULL},
    {"bitmap-merge", "bitmap", NULL, run_bitmap_merge, KIND_BITMAPS, 0, 0, NULL},
    {"bitmap-session", "bitmap", NULL, run_bitmap_session, KIND_BITMAPS, 0, 0, NULL},
    {"bitmap-first", "bitmap", NULL, run_bitmap_first, KIND_BACKING,
     KIND_BITMAPS | KIND_V2 | KIND_QED, 0, NULL},
    {"repair-leaks", "image", damage_leaks, run_repair, 0, KIND_QED, 0, NULL},
    {"repair-dirty", "image", damage_dirty, run_repair, 0, KIND_V2 | KIND_QED, 0, NULL},
    {"repair-at-open", "image", damage_dirty, run_write, 0, KIND_V2 | KIND_QED, 0, NULL},
    {"repair-counts", "image", damage_counts, run_repair, 0, KIND_QED, OPERATION_DAMAGED, NULL},
    {"repair-copied", "image", damage_copied, run_repair, 0, KIND_QED, OPERATION_DAMAGED, NULL},
    {"repair-table", "image", damage_table, run_repair, 0, KIND_QED, OPERATION_DAMAGED, NULL},
    {"repair-l1", "image", damage_l1, run_repair, 0, 0, OPERATION_DAMAGED | OPERATION_LOST,
     " v3 compressed "},
    {"repair-entries", "image", damage_entries, run_repair, 0, 0,
     OPERATION_DAMAGED | OPERATION_LOST, " v2 64k backing "},
    {"repair-qed", "image", damage_qed, run_repair, KIND_QED, 0, 0, NULL},
    {"repair-qed-at-open", "image", damage_qed, run_write, KIND_QED, 0, 0, NULL},
    {"amend-width", "verb", NULL, run_amend_width, 0, KIND_V2 | KIND_QED, 0, NULL},
    {"amend-back", "verb", prepare_amend_back, run_amend_back, 0, KIND_V2 | KIND_QED, 0,
     " v3 4k ext snapshot bitmap "},
    {"amend-narrow", "verb", NULL, run_amend_narrow, 0, KIND_V2 | KIND_QED, 0, NULL},
    {"amend-upgrade", "verb", NULL, run_amend_upgrade, KIND_V2, 0, 0, NULL},
    {"amend-downgrade", "verb", NULL, run_amend_downgrade, 0, 0,
     0, " v3 64k odd lazy compressed snapshot backing backing-raw backing-snapshot "},
    {"amend-lazy", "verb", NULL, run_amend_lazy, 0, KIND_V2 | KIND_QED, 0, NULL},
    {"amend-size", "verb", NULL, run_amend_size, 0, KIND_FIXED | KIND_QED, 0, NULL},
    {"amend-data-file", "verb", NULL, run_amend_data_file, KIND_DATA_FILE, 0, 0, NULL},
    {"rename-base", "verb", NULL, run_rename_base, OVER, 0, 0, NULL},
    {"commit", "verb", NULL, run_commit, OVER, 0, 0, NULL},
    {"commit-live", "image", NULL, run_commit_live, OVER, 0, 0, NULL},
    {"rebase", "verb", make_other, run_rebase, OVER, KIND_SNAPSHOT, 0, NULL},
    {"rebase-none", "verb", NULL, run_rebase_none, OVER, KIND_SNAPSHOT, 0, NULL},
    {"convert-into", "verb", make_other, run_convert_into, 0, 0, 0, NULL},
    {"convert", "verb", NULL, run_convert, 0, 0, 0, NULL},
    {"convert-compressed", "verb", NULL, run_convert_compressed, 0, 0, 0, NULL},
    {"create", "verb", NULL, run_create, 0, KIND_DATA_FILE | KIND_QED, 0, NULL},
};

const unsigned nb_operations = G_N_ELEMENTS(operations);

bool operation_fits(const Operation *op, const Kind *kind)
{
    g_autofree char *name = g_strdup_printf(" %s ", kind->name);
    if (op->only && !strstr(op->only, name)) {
        return false;
    }
    if (kind->flags & KIND_BIG && strcmp(op->group, "bitmap")) {
        return false;
    }
    if (kind->flags & (KIND_TIGHT | KIND_BLOCKS) & ~op->need) {
        return false;
    }
    return (kind->flags & op->need) == op->need && !(kind->flags & op->bar);
}

const Operation *operation_find(const char *name)
{
    for (unsigned i = 0; i < nb_operations; i++) {
        if (!strcmp(operations[i].name, name)) {
            return &operations[i];
        }
    }
    return NULL;
}

const Kind *kind_find(const char *name)
{
    for (unsigned i = 0; i < nb_kinds; i++) {
        if (!strcmp(kinds[i].name, name)) {
            return &kinds[i];
        }
    }
    return NULL;
}
