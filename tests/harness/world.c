/*
 * A world: the images of a test, what is on them, and what may be on them.
 *
 *      world_new():  base  1111 1111 1111 0000   (values)
 *                    top   2222 3... 0000 ....   per four clusters: data, a part, zeroes, none
 *
 *      mark {time, change, view, ...}  -->  applied to w->view at once, and kept; the replayer
 *                                           applies the kept ones to a copy, up to a time
 *
 * Invariants
 * 1. A mark is made before the operation whose effect it allows begins, and a settling one after
 *    the call that promises it has returned.
 * 2. What failed may have happened or not: it is in doubt, and stays so when the rest settles.
 *
 * SPDX-License-Identifier: MIT
 */
#include "tests/harness/world.h"

#include <glib/gstdio.h>
#include <string.h>
#include <unistd.h>

#include "block/dirty-bitmap.h"
#include "tests/harness/verbs.h"
#include "util/error.h"
#include "util/thread.h"

typedef enum Change {
    MARK_WRITE,
    MARK_MERGE,
    MARK_RESIZE,
    MARK_APPEAR,
    MARK_VANISH,
    MARK_SETTLE,
    MARK_SETTLE_PART,
    MARK_DOUBT,
    MARK_DOUBT_ALL,
    MARK_BITMAP,
    MARK_BITMAP_DONE,
} Change;

typedef struct Mark {
    uint64_t time;
    Change change;
    ViewId view, from;          /* appear: from VIEWS: all zeroes */
    unsigned first, n, value; /* resize: n; the end of a bitmap's change: n, is it done? */
    BitmapChange bitmap_change;
    BitmapId bitmap, bitmap_from;
} Mark;

/* ---------------------------------------------------------------- marks */

static void settle(View *v)
{
    oracle_settle(&v->oracle);
    if (v->presence == VIEW_MAYBE) {
        v->presence = v->vanishes ? VIEW_ABSENT : VIEW_PRESENT;
    }
}

static void apply_resize(World *w, View *v, unsigned sectors)
{
    if (w->bitmaps && v == &w->view[VIEW_TOP]) {
        bitmaps_resize(w->bitmaps, v->oracle.sectors, sectors);
    }
    oracle_resize(&v->oracle, sectors);
}

static void apply_mark(World *w, const Mark *m)
{
    View *views = w->view, *v = &views[m->view];
    switch (m->change) {
    case MARK_WRITE:
        oracle_write(&v->oracle, m->first, m->n, m->value);
        break;
    case MARK_MERGE:
        oracle_merge(&v->oracle, &views[m->from].oracle);
        break;
    case MARK_RESIZE:
        apply_resize(w, v, m->n);
        break;
    case MARK_APPEAR:
        if (m->from == VIEWS) {
            oracle_init(&v->oracle, views[VIEW_TOP].oracle.sectors);
        } else {
            v->oracle = views[m->from].oracle;
        }
        oracle_settle(&v->oracle);
        v->vanishes = false;
        v->presence = MAX(v->presence, VIEW_MAYBE);
        break;
    case MARK_VANISH:
        v->vanishes = true;
        v->presence = MIN(v->presence, VIEW_MAYBE);
        break;
    case MARK_SETTLE:
        settle(v);
        break;
    case MARK_SETTLE_PART:
        oracle_settle_part(&v->oracle, m->first, m->n);
        break;
    case MARK_DOUBT:
        oracle_doubt(&v->oracle, m->first, m->n);
        break;
    case MARK_DOUBT_ALL:
        oracle_doubt_all(&v->oracle);
        break;
    case MARK_BITMAP:
        bitmaps_begin(w->bitmaps, m->bitmap_change, m->bitmap, m->bitmap_from, &v->oracle);
        break;
    case MARK_BITMAP_DONE:
        bitmaps_end(w->bitmaps, m->bitmap, m->n);
        break;
    }
}

/* The views and marks of all worlds: threads share those that are parts of one. */
static QbMutex marks_lock = QB_MUTEX_INIT;

static void mark(World *w, Mark m)
{
    QB_GUARD(&marks_lock);
    apply_mark(w, &m);
    if (w->marks) {
        m.time = disk_tick();
        g_array_append_val(w->marks, m);
    }
}

void world_mark_write(World *w, ViewId view, unsigned first, unsigned n, unsigned value)
{
    mark(w, (Mark){.change = MARK_WRITE, .view = view, .first = first, .n = n, .value = value});
}

void world_mark_merge(World *w, ViewId view, ViewId from)
{
    mark(w, (Mark){.change = MARK_MERGE, .view = view, .from = from});
}

void world_mark_resize(World *w, ViewId view, unsigned sectors)
{
    mark(w, (Mark){.change = MARK_RESIZE, .view = view, .n = sectors});
}

void world_mark_shows_base(World *w)
{
    const Oracle *base = &w->view[VIEW_BASE].oracle;
    for (unsigned i = 0; i < base->sectors; i++) {
        world_mark_write(w, VIEW_TOP, i, 1, base->now[i]);
    }
    world_mark_write(w, VIEW_TOP, base->sectors, w->kind->sectors - base->sectors, 0);
}

void world_mark_appear(World *w, ViewId view, ViewId from)
{
    mark(w, (Mark){.change = MARK_APPEAR, .view = view, .from = from});
}

void world_mark_appear_empty(World *w, ViewId view)
{
    world_mark_appear(w, view, VIEWS);
}

void world_mark_vanish(World *w, ViewId view)
{
    mark(w, (Mark){.change = MARK_VANISH, .view = view});
}

void world_mark_done(World *w, ViewId view, bool ok)
{
    mark(w, (Mark){.change = ok ? MARK_SETTLE : MARK_DOUBT_ALL, .view = view});
}

World world_copy(const World *w)
{
    return (World){.kind = w->kind, .value = w->value, .damaged = w->damaged,
                   .lost = w->lost,
                   .view = g_memdup2(w->view, VIEWS * sizeof(View)),
                   .bitmaps = bitmaps_dup(w->bitmaps)};
}

void world_copy_clear(World *copy)
{
    g_clear_pointer(&copy->view, g_free);
    g_clear_pointer(&copy->bitmaps, g_free);
    g_clear_pointer(&copy->why, g_free);
}

void world_record(World *w)
{
    w->marks = g_array_new(false, false, sizeof(Mark));
}

void world_advance(World *copy, const World *w, uint64_t time)
{
    for (guint i = 0; i < w->marks->len; i++) {
        const Mark *m = &g_array_index(w->marks, Mark, i);
        if (m->time <= time) {
            apply_mark(copy, m);
        }
    }
}

/* ---------------------------------------------------------------- opening */

static const char *const disk_of_view[VIEWS] = {"top", "base", "other", "top", "top"};
static const char *const snapshot_of_view[VIEWS] = {[VIEW_SNAP0] = "s0", [VIEW_SNAP1] = "s1"};

static const char *format_of(const World *w, ViewId view)
{
    bool top = !strcmp(disk_of_view[view], "top");
    if (top && w->kind->flags & KIND_QED) {
        return "qed";
    }
    return view == VIEW_BASE && w->kind->flags & KIND_RAW_BASE ? "raw" : "qcow2";
}

/* The options of the node "file" below a format. */
static char *file_options(const World *w, ViewId view)
{
    const char *disk = disk_of_view[view];
    if (w->dir) {
        return g_strdup_printf("file.driver=file,file.filename=%s/%s", w->dir, disk);
    }
    if (w->debug && !strcmp(disk, "top")) {
        return g_strdup("file.driver=blkdebug,file.image.driver=test-disk,file.image.disk=top");
    }
    return g_strdup_printf("file.driver=test-disk,file.disk=%s%s", disk,
                           w->kind->flags & KIND_4K ? ",file.align=4096" : "");
}

char *world_options(const World *w, ViewId view)
{
    bool top = !strcmp(disk_of_view[view], "top");
    bool data = top && w->kind->flags & KIND_DATA_FILE;
    g_autofree char *file = file_options(w, view);
    return g_strdup_printf("driver=%s,discard=unmap,%s%s%s%s",
                           format_of(w, view), file,
                           data ? ",data-file.driver=test-disk,data-file.disk=data" : "",
                           top && w->kind->open ? w->kind->open : "",
                           top && w->more ? w->more : "");
}

/* Takes the message out of @err, which is freed. */
static char *say(const char *what, GError *err)
{
    char *text = g_strdup_printf("%s: %s", what, err ? err->message : "failed");
    g_clear_error(&err);
    return text;
}

BlockBackend *world_open_view(const World *w, ViewId view, int flags, char **ret_why)
{
    GError *err = NULL;
    g_autofree char *text = world_options(w, view);
    json_t *options = qb_opts_parse(text, NULL, &err);
    g_assert_no_error(err);
    g_autoptr(BlockBackend) blk = blk_new_open(NULL, options, flags, &err);
    const char *snapshot = snapshot_of_view[view];
    if (!blk || (snapshot && !bdrv_snapshot_load_tmp(blk_bs(blk), snapshot, &err))) {
        *ret_why = say(blk ? "snapshot" : "open", err);
        return NULL;
    }
    return g_steal_pointer(&blk);
}

bool world_note(World *w, bool ok, const char *what, GError *err)
{
    w->failed += !ok;
    if (!ok && !w->why) {
        w->why = say(what, err);
    } else {
        g_clear_error(&err);
    }
    return ok;
}

bool world_open(World *w)
{
    g_autofree char *why = NULL;
    w->blk = world_open_view(w, VIEW_TOP, BDRV_O_RDWR | BDRV_O_RESIZE, &why);
    return world_note(w, w->blk != NULL, why, NULL);
}

bool world_close(World *w)
{
    if (w->at_close) {
        w->at_close(w);
    }
    GError *err = NULL;
    bool ok = !w->bitmaps || bdrv_store_bitmaps(blk_bs(w->blk), &err);
    world_note(w, ok, "bitmaps", err);
    int ret = world_flush(w);
    g_clear_pointer(&w->blk, blk_unref);
    return ret == 0 && ok;
}

World world_part(const World *w, unsigned first, unsigned n)
{
    World part = *w;
    part.own_first = first;
    part.own_n = n;
    part.failed = 0;
    part.why = NULL;
    return part;
}

void world_part_end(World *w, World *part)
{
    w->failed += part->failed;
    if (!w->why) {
        w->why = g_steal_pointer(&part->why);
    }
    g_free(part->why);
}

/* ---------------------------------------------------------------- requests */

static int note_ret(World *w, int ret, const char *what)
{
    GError *err = NULL;
    if (ret < 0) {
        qb_error_set(&err, -ret, "%s", g_strerror(-ret));
    }
    world_note(w, ret == 0, what, err);
    return ret;
}

static unsigned next_value(World *w)
{
    w->value = w->value % (ORACLE_VALUES - 1) + 1;
    return w->value;
}

/* The sectors of a request that failed are in doubt. */
static int note_range(World *w, int ret, const char *what, unsigned first, unsigned n)
{
    if (ret < 0) {
        mark(w, (Mark){.change = MARK_DOUBT, .view = VIEW_TOP, .first = first, .n = n});
    }
    return note_ret(w, ret, what);
}

int world_write_flags(World *w, unsigned first, unsigned n, int flags)
{
    g_autofree uint8_t *buf = g_malloc((size_t)n * ORACLE_SECTOR);
    unsigned value = next_value(w);
    oracle_fill(buf, first, n, value);
    world_mark_write(w, VIEW_TOP, first, n, value);
    int ret = blk_pwrite(w->blk, (int64_t)first * ORACLE_SECTOR, (int64_t)n * ORACLE_SECTOR, buf,
                         flags);
    return note_range(w, ret, "write", first, n);
}

int world_write(World *w, unsigned first, unsigned n)
{
    return world_write_flags(w, first, n, 0);
}

int world_zero(World *w, unsigned first, unsigned n, int flags)
{
    world_mark_write(w, VIEW_TOP, first, n, 0);
    int ret = blk_pwrite_zeroes(w->blk, (int64_t)first * ORACLE_SECTOR, (int64_t)n * ORACLE_SECTOR,
                                flags);
    return note_range(w, ret, "zero", first, n);
}

static int discard(World *w, unsigned first, unsigned n)
{
    int ret = blk_pdiscard(w->blk, (int64_t)first * ORACLE_SECTOR, (int64_t)n * ORACLE_SECTOR);
    return note_range(w, ret, "discard", first, n);
}

/* A part of a cluster: without subclusters it stays as it is; with them it reads zero, but if the
 * cluster is compressed. */
static void mark_discarded_part(World *w, unsigned first, unsigned end)
{
    if (first < end && (w->kind->flags & KIND_PARTS)) {
        world_mark_write(w, VIEW_TOP, first, end - first, 0);
        mark(w, (Mark){.change = MARK_DOUBT, .view = VIEW_TOP, .first = first, .n = end - first});
    }
}

/* Whole clusters (and the end of the disk) read as zero after it; some kinds ignore it. */
int world_discard(World *w, unsigned first, unsigned n)
{
    unsigned c = w->kind->cluster, end = first + n;
    unsigned from = (first + c - 1) / c * c;
    unsigned to = end == w->kind->sectors ? end : end / c * c;
    if (w->kind->flags & KIND_NO_DISCARD) {
        return discard(w, first, n);
    }
    mark_discarded_part(w, first, MIN(from, end));
    if (from < to) {
        world_mark_write(w, VIEW_TOP, from, to - from, 0);
    }
    mark_discarded_part(w, MAX(from, to), end);
    return discard(w, first, n);
}

int world_discard_parts(World *w, unsigned first, unsigned n)
{
    g_assert_true(w->kind->flags & KIND_PARTS);
    world_mark_write(w, VIEW_TOP, first, n, 0);
    return discard(w, first, n);
}

int world_flush(World *w)
{
    int ret = note_ret(w, blk_flush(w->blk), "flush");
    if (ret == 0) {
        mark(w, (Mark){.change = w->own_n ? MARK_SETTLE_PART : MARK_SETTLE, .view = VIEW_TOP,
                       .first = w->own_first, .n = w->own_n});
    }
    return ret;
}

/* ---------------------------------------------------------------- bitmaps */

static bool change_bitmap(BlockDriverState *bs, BitmapChange change, const char *name,
                          const char *from, GError **errp)
{
    switch (change) {
    case BITMAP_ADD:
        return bdrv_bitmap_add(bs, name, ORACLE_SECTOR, true, false, errp);
    case BITMAP_REMOVE:
        return bdrv_bitmap_remove(bs, name, errp);
    case BITMAP_CLEAR:
        return bdrv_bitmap_clear(bs, name, errp);
    case BITMAP_ENABLE:
        return bdrv_bitmap_enable(bs, name, errp);
    case BITMAP_DISABLE:
        return bdrv_bitmap_disable(bs, name, errp);
    case BITMAP_MERGE:
        break;
    }
    return bdrv_bitmap_merge(bs, name, bs, from, errp);
}

bool world_bitmap(World *w, BitmapChange change, BitmapId id, BitmapId from)
{
    static const char *const names[] = {"add", "remove", "clear", "enable", "disable", "merge"};
    GError *err = NULL;
    g_autofree char *what = g_strdup_printf("%s bitmap %s", names[change], bitmap_name(id));
    mark(w, (Mark){.change = MARK_BITMAP, .bitmap_change = change, .bitmap = id,
                   .bitmap_from = from});
    bool ok = change_bitmap(blk_bs(w->blk), change, bitmap_name(id), bitmap_name(from), &err);
    mark(w, (Mark){.change = MARK_BITMAP_DONE, .bitmap = id, .n = ok});
    return world_note(w, ok, what, err);
}

/* ---------------------------------------------------------------- verbs */

static char *expand(const World *w, const char *command)
{
    static const char *const names[VIEWS] = {"%TOP", "%BASE", "%OTHER"};
    g_autoptr(GString) text = g_string_new(command);
    for (ViewId view = VIEW_TOP; view <= VIEW_OTHER; view++) {
        g_autofree char *options = world_options(w, view);
        g_string_replace(text, names[view], options, 0);
    }
    return g_strdup(text->str);
}

bool world_verb(World *w, const char *command)
{
    g_autofree char *text = expand(w, command), *said = NULL;
    int status = verb_run(text, &said);
    GError *err = NULL;
    if (status) {
        qb_error_set(&err, EIO, "status %d, %s", status, g_strchomp(said));
    }
    return world_note(w, status == 0, command, err);
}

/* ---------------------------------------------------------------- making */

static void must(World *w, bool ok)
{
    if (!ok || w->failed) {
        g_error("the world of kind '%s' cannot be made: %s", w->kind->name, w->why);
    }
}

/* The arguments of "create" that name the base. */
static const char *base_arguments(const World *w)
{
    if (!(w->kind->flags & KIND_BACKING)) {
        return "";
    }
    return w->kind->flags & KIND_RAW_BASE ? "-b test-disk:base -F raw"
                                          : "-b test-disk:base -F qcow2";
}

/* The data file's name in the header stays plain, hence files in a directory that goes away. */
static void create_with_data_file(World *w)
{
    g_autofree char *dir = g_dir_make_tmp("qb-world-XXXXXX", NULL);
    g_assert_nonnull(dir);
    g_autofree char *top = g_build_filename(dir, "top", NULL);
    g_autofree char *data = g_build_filename(dir, "data", NULL);
    g_autofree char *command =
        g_strdup_printf("create -q -f qcow2 %s -o %s,data_file=%s %s %u", base_arguments(w),
                        w->kind->create, data, top, w->kind->sectors * ORACLE_SECTOR);
    must(w, world_verb(w, command));
    must(w, disk_import(disk_number("top"), top) && disk_import(disk_number("data"), data));
    g_unlink(top);
    g_unlink(data);
    g_rmdir(dir);
}

static void create_base(World *w)
{
    const char *format = format_of(w, VIEW_BASE);
    unsigned sectors = w->view[VIEW_BASE].oracle.sectors;
    g_autofree char *command =
        g_strdup_printf("create -q -f %s %s test-disk:base %u", format,
                        !strcmp(format, "qcow2") ? "-o cluster_size=4k" : "",
                        sectors * ORACLE_SECTOR);
    must(w, world_verb(w, command));
    g_autofree char *why = NULL;
    unsigned n = sectors / 4 * 3;
    g_autofree uint8_t *buf = g_malloc((size_t)n * ORACLE_SECTOR);
    g_autoptr(BlockBackend) blk = world_open_view(w, VIEW_BASE, BDRV_O_RDWR, &why);
    must(w, blk != NULL);
    w->value = 1;
    oracle_fill(buf, 0, n, w->value);
    must(w, blk_pwrite(blk, 0, (int64_t)n * ORACLE_SECTOR, buf, 0) == 0);
    w->view[VIEW_BASE].presence = VIEW_PRESENT;
    oracle_write(&w->view[VIEW_BASE].oracle, 0, n, w->value);
    oracle_settle(&w->view[VIEW_BASE].oracle);
}

static void create_top(World *w)
{
    g_autofree char *command =
        g_strdup_printf("create -q -f %s %s -o %s test-disk:top %u", format_of(w, VIEW_TOP),
                        base_arguments(w), w->kind->create, w->kind->sectors * ORACLE_SECTOR);
    must(w, world_verb(w, command));
}

/* One cluster of each four is data, a part of one is, one is zero, one is not there. */
static void fill_plain(World *w)
{
    unsigned c = w->kind->cluster, part = MAX(c / 2, 1);
    for (unsigned at = 0; at + 4 * c <= w->kind->sectors; at += 4 * c) {
        world_write(w, at, c);
        world_write(w, at + c, part);
        world_zero(w, at + 2 * c, c, 0);
    }
    world_write(w, w->kind->sectors - 1, 1);
}

static void fill_compressed(World *w)
{
    unsigned c = w->kind->cluster;
    for (unsigned at = 0; at + 4 * c <= w->kind->sectors; at += 4 * c) {
        world_write_flags(w, at, 2 * c, BDRV_REQ_COMPRESSED);
        world_write(w, at + 2 * c, c);
    }
}

/* What is in the snapshot is changed here and there, so that counts of 1 and 2 are mixed. */
static void take_snapshot(World *w)
{
    GError *err = NULL;
    world_mark_appear(w, VIEW_SNAP0, VIEW_TOP);
    bool ok = bdrv_snapshot_create(blk_bs(w->blk), "s0", &err);
    must(w, world_note(w, ok, "snapshot", err));
    world_mark_done(w, VIEW_SNAP0, ok);
    unsigned c = w->kind->cluster;
    for (unsigned at = 0; at + 8 * c <= w->kind->sectors; at += 8 * c) {
        world_write(w, at, c);
        world_discard(w, at + 4 * c, c);
    }
}

/* The bitmap is IN_USE in the image that a crash leaves here; nothing else is lost. */
static void leave_broken_bitmap(World *w)
{
    unsigned top = disk_number("top");
    must(w, world_open(w) && world_bitmap(w, BITMAP_ADD, BITMAP_BROKEN, 0));
    world_write(w, 0, 1);
    must(w, world_flush(w) == 0);
    DiskImage crashed = disk_save(top);
    must(w, world_close(w));
    disk_load(top, &crashed);
    disk_image_clear(&crashed);
}

/* Some sectors are dirty in both, some in one of them. */
static void add_bitmaps(World *w)
{
    unsigned c = w->kind->cluster;
    leave_broken_bitmap(w);
    must(w, world_open(w) && world_bitmap(w, BITMAP_ADD, BITMAP_DISABLED, 0));
    world_write(w, 4 * c, c);
    world_write(w, w->kind->sectors - 2, 1);
    must(w, world_bitmap(w, BITMAP_ADD, BITMAP_ENABLED, 0));
    world_write(w, 5 * c, c);
    must(w, world_bitmap(w, BITMAP_DISABLE, BITMAP_DISABLED, 0));
    world_write(w, 8 * c, 1);
    must(w, world_close(w));
}

static void fill(World *w)
{
    must(w, world_open(w));
    if (w->kind->flags & KIND_COMPRESSED) {
        fill_compressed(w);
    } else {
        fill_plain(w);
    }
    if (w->kind->flags & KIND_SNAPSHOT) {
        take_snapshot(w);
    }
    must(w, world_close(w));
    if (w->kind->flags & KIND_BITMAPS) {
        add_bitmaps(w);
    }
}

static void init_views(World *w)
{
    w->view = g_new0(View, VIEWS);
    for (ViewId view = VIEW_TOP; view < VIEWS; view++) {
        oracle_init(&w->view[view].oracle, w->kind->sectors);
    }
    if (w->kind->flags & KIND_SHORT_BASE) {
        oracle_init(&w->view[VIEW_BASE].oracle, w->kind->sectors / 2 + 1);
    }
    w->view[VIEW_TOP].presence = VIEW_PRESENT;
    w->bitmaps = w->kind->flags & KIND_BITMAPS ? bitmaps_new() : NULL;
}

World *world_new(const Kind *kind)
{
    World *w = g_new0(World, 1);
    w->kind = kind;
    disk_set_limit(disk_number("top"), 0);
    init_views(w);
    if (kind->flags & KIND_BACKING) {
        create_base(w);
        world_mark_shows_base(w);
        world_mark_done(w, VIEW_TOP, true);
    }
    if (kind->flags & KIND_DATA_FILE) {
        create_with_data_file(w);
    } else {
        create_top(w);
    }
    fill(w);
    return w;
}

void world_free(World *w)
{
    if (w->marks) {
        g_array_free(w->marks, true);
    }
    world_copy_clear(w);
    g_free(w);
}

/* ---------------------------------------------------------------- judging */

typedef struct Findings {
    bool v2;
    uint64_t harmless;
    GString *text; /* of the others */
} Findings;

/* Invariant 4: COPIED clear where the count is 1 is what a crash may leave on version 2. */
static bool is_harmless(const Findings *f, const BdrvCheckFinding *finding)
{
    return f->v2 && g_str_has_prefix(finding->code, "copied-flag") &&
           g_str_has_suffix(finding->text, "refcount=1");
}

static void note_finding(const BdrvCheckFinding *finding, void *opaque)
{
    Findings *f = opaque;
    if (is_harmless(f, finding)) {
        f->harmless++;
    } else if (finding->kind != BDRV_FINDING_LEAK && f->text->len < 400) {
        g_string_append_printf(f->text, "; %s", finding->text);
    }
}

static bool check_image(const World *w, BlockBackend *blk, bool exact, char **ret_why)
{
    GError *err = NULL;
    g_autoptr(GString) text = g_string_new(NULL);
    Findings findings = {.v2 = !exact && w->kind->flags & KIND_V2, .text = text};
    BdrvCheckOptions opts = {.finding = note_finding, .opaque = &findings};
    BdrvCheckResult result = {0};
    if (!bdrv_check(blk_bs(blk), &opts, &result, &err)) {
        *ret_why = say("check", err);
        return false;
    }
    result.corruptions -= findings.harmless;
    bool counts = !(w->kind->flags & KIND_QED); /* without them what is free looks leaked */
    if (result.corruptions || result.check_errors || (exact && counts && result.leaks)) {
        *ret_why = g_strdup_printf("check: %u corruptions, %u errors, %u leaks%s",
                                   (unsigned)result.corruptions, (unsigned)result.check_errors,
                                   (unsigned)result.leaks, text->str);
        return false;
    }
    return true;
}

static bool has_snapshot(BlockBackend *blk, const char *name)
{
    g_autoptr(GArray) list = bdrv_snapshot_list(blk_bs(blk), NULL);
    for (guint i = 0; list && i < list->len; i++) {
        if (!strcmp(g_array_index(list, BdrvSnapshotInfo, i).name, name)) {
            return true;
        }
    }
    return false;
}

/* An image that may be opened for writing: this repairs it where it is dirty. */
static bool judge_image(const World *w, ViewId view, bool exact, bool *ret_snapshots,
                        char **ret_why)
{
    bool damaged = view == VIEW_TOP && w->damaged;
    bool has_check = strcmp(format_of(w, view), "raw") && !damaged;
    g_autoptr(BlockBackend) blk =
        world_open_view(w, view, damaged ? 0 : BDRV_O_RDWR | BDRV_O_RESIZE, ret_why);
    if (blk && damaged && w->lost) {
        return true;
    }
    if (!blk || (has_check && !check_image(w, blk, exact, ret_why)) ||
        !oracle_check(&w->view[view].oracle, blk, ret_why) ||
        (view == VIEW_TOP && w->bitmaps && !bitmaps_check(w->bitmaps, blk, exact, ret_why))) {
        return false;
    }
    for (ViewId sn = VIEW_SNAP0; view == VIEW_TOP && sn <= VIEW_SNAP1; sn++) {
        ret_snapshots[sn] = has_snapshot(blk, snapshot_of_view[sn]);
    }
    return true;
}

static bool judge_snapshot(const World *w, ViewId view, bool there, char **ret_why)
{
    Presence presence = w->view[view].presence;
    if (presence != VIEW_MAYBE && (presence == VIEW_PRESENT) != there) {
        *ret_why = g_strdup(there ? "it is there" : "it is not there");
        return false;
    }
    g_autoptr(BlockBackend) blk = there ? world_open_view(w, view, 0, ret_why) : NULL;
    return !there || (blk && oracle_check(&w->view[view].oracle, blk, ret_why));
}

static bool judge_view(const World *w, ViewId view, bool exact, bool *snapshots, char **ret_why)
{
    if (view >= VIEW_SNAP0) {
        return judge_snapshot(w, view, snapshots[view], ret_why);
    }
    return w->view[view].presence != VIEW_PRESENT ||
           judge_image(w, view, exact, snapshots, ret_why);
}

bool world_judge(const World *w, bool exact, char **ret_why)
{
    static const char *const names[VIEWS] = {"top", "base", "other", "snapshot s0", "snapshot s1"};
    bool snapshots[VIEWS] = {0};
    for (ViewId view = VIEW_TOP; view < VIEWS; view++) {
        g_autofree char *why = NULL;
        if (!judge_view(w, view, exact, snapshots, &why)) {
            *ret_why = g_strdup_printf("%s: %s", names[view], why);
            return false;
        }
    }
    return true;
}

bool world_judge_end(const World *recorded, const World *w, char **ret_why)
{
    World end = *recorded;
    end.bitmaps = w->bitmaps;
    return world_judge(&end, false, ret_why);
}
