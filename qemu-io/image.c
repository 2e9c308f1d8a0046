/*
 * Opening, closing and reopening the file that the commands work on.
 *
 * Permissions: a file opened for writing may be written from the start; the right to resize it is
 * asked for by the first command that does so.  After "reopen -w" the right to write comes with the
 * first command that writes.
 *
 * Invariants
 * 1. sh->blk is NULL or usable; a failing open leaves it NULL, a failing reopen as it was.
 * 2. At close nothing is in flight and nothing is suspended: breakpoints are removed, which resumes
 *    what stands at them, then all requests end and are reported.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdio.h>
#include <string.h>
#include "block/dirty-bitmap.h"
#include "qemu-io/qio.h"

/* --- opening --- */

static bool parse_cache(const char *text, BlkCacheMode *ret)
{
    *ret = (BlkCacheMode){.writethrough = true};
    return !text || blk_parse_cache_mode(text, ret) || qio_error("Invalid cache option: %s", text);
}

static bool parse_discard(const char *text, bool *ret_unmap)
{
    *ret_unmap = true;
    return !text || blk_parse_discard(text, ret_unmap) ||
           qio_error("Invalid discard option: %s", text);
}

static bool parse_aio(const char *text, int *ret_flags)
{
    *ret_flags = 0;
    return !text || blk_parse_aio(text, ret_flags) ||
           qio_error("Invalid aio option: %s", text);
}

/* What the switches stand for; options that say something themselves win. */
static void set_defaults(json_t *options, const QioOpen *how, const BlkCacheMode *cache, bool unmap)
{
    g_autoptr(json_t) defaults = json_object();

    json_object_set_new(defaults, "discard", json_string(unmap ? "unmap" : "ignore"));
    if (cache->direct) {
        json_object_set_new(defaults, "cache.direct", json_true());
    }
    if (cache->no_flush) {
        json_object_set_new(defaults, "cache.no-flush", json_true());
    }
    if (how->force_share) {
        json_object_set_new(defaults, "force-share", json_true());
    }
    qb_opts_set_defaults(options, defaults);
}

static int open_flags(const QioOpen *how)
{
    return (how->read_only ? 0 : BDRV_O_RDWR) | (how->snapshot ? BDRV_O_SNAPSHOT : 0) |
           (how->copy_on_read ? BDRV_O_COPY_ON_READ : 0);
}

static bool fail_open(const char *filename, GError *err)
{
    if (filename) {
        return qio_error_prefixed(err, "can't open device %s: ", filename);
    }
    return qio_error_prefixed(err, "can't open: ");
}

bool qio_open(QioShell *sh, const QioOpen *how)
{
    g_autoptr(json_t) options = how->options ? json_copy(how->options) : json_object();
    BlkCacheMode cache;
    GError *err = NULL;
    int aio_flags;
    bool unmap;

    if (sh->blk) {
        return qio_error("file open already, try 'help close'");
    }
    if (!parse_cache(how->cache, &cache) || !parse_discard(how->discard, &unmap) ||
        !parse_aio(how->aio, &aio_flags)) {
        return false;
    }
    set_defaults(options, how, &cache, unmap);
    sh->blk = blk_new_open(how->filename, g_steal_pointer(&options),
                           open_flags(how) | aio_flags, &err);
    if (!sh->blk) {
        return fail_open(how->filename, err);
    }
    blk_set_write_cache(sh->blk, !cache.writethrough);
    return true;
}

bool qio_cmd_open(QioShell *sh, const QioArgs *args)
{
    const bool *g = args->given;
    g_autoptr(json_t) options = NULL;
    GError *err = NULL;
    QioOpen how = {
        .filename = args->operand[0],
        .cache = g['n'] ? "none" : args->value['t'],
        .discard = args->value['d'],
        .aio = g['k'] ? "native" : args->value['i'],
        .read_only = g['r'], .snapshot = g['s'], .copy_on_read = g['C'], .force_share = g['U'],
    };

    if (g['o'] && !(options = qb_opts_parse(args->value['o'], NULL, &err))) {
        return qio_error_prefixed(err, "%s", "");
    }
    how.options = options;
    if (!how.filename && !how.options) {
        qio_print_synopsis(qio_find_command("open"));
        return false;
    }
    return qio_open(sh, &how);
}

/* --- permissions --- */

static unsigned needed_perm(unsigned needs)
{
    return (needs & QIO_WRITE ? BLK_PERM_WRITE : 0) | (needs & QIO_RESIZE ? BLK_PERM_RESIZE : 0);
}

bool qio_want_permissions(QioShell *sh, unsigned needs)
{
    unsigned wanted = needed_perm(needs), have;
    GError *err = NULL;

    if (!wanted) {
        return true;
    }
    if (bdrv_is_read_only(blk_bs(sh->blk))) {
        return qio_error("Block node is read-only");
    }
    have = blk_root(sh->blk)->perm;
    if ((have & wanted) == wanted) {
        return true;
    }
    return blk_set_perm(sh->blk, have | wanted, BLK_PERM_ALL, &err) ||
           qio_error_prefixed(err, "%s", "");
}

/* --- closing --- */

bool qio_close(QioShell *sh)
{
    GError *err = NULL;
    bool stored = true;
    int ret = 0;

    qio_release_breakpoints(sh);
    if (blk_is_writable(sh->blk)) {
        stored = bdrv_store_bitmaps(blk_bs(sh->blk), &err) || qio_error_prefixed(err, "%s", "");
        ret = blk_flush(sh->blk);
    }
    g_clear_pointer(&sh->blk, blk_unref);
    return stored && (ret >= 0 || qio_error("flush at close failed: %s", g_strerror(-ret)));
}

bool qio_cmd_close(QioShell *sh, const QioArgs *args)
{
    return qio_close(sh);
}

bool qio_cmd_quit(QioShell *sh, const QioArgs *args)
{
    sh->quit = true;
    return true;
}

/* --- reopening --- */

typedef struct Reopen {
    json_t *options; /* flat; owned */
    BlkCacheMode cache;
    bool set_cache, set_read_only, read_only;
} Reopen;

static void reopen_clear(Reopen *r)
{
    json_decref(r->options);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Reopen, reopen_clear)

static bool parse_reopen_mode(const QioArgs *args, Reopen *r)
{
    r->set_read_only = args->given['r'] || args->given['w'];
    r->read_only = args->given['r'];
    if (args->given['r'] && args->given['w']) {
        return qio_error("Only one -r/-w option may be given");
    }
    r->set_cache = args->given['c'];
    return !r->set_cache || parse_cache(args->value['c'], &r->cache);
}

static bool parse_reopen_options(const QioArgs *args, Reopen *r)
{
    GError *err = NULL;

    r->options = args->given['o'] ? qb_opts_parse(args->value['o'], NULL, &err) : json_object();
    if (!r->options) {
        return qio_error_prefixed(err, "%s", "");
    }
    if (r->set_read_only && json_object_get(r->options, "read-only")) {
        return qio_error("Cannot set both -r/-w and 'read-only'");
    }
    if (r->set_cache && (json_object_get(r->options, "cache.direct") ||
                         json_object_get(r->options, "cache.no-flush"))) {
        return qio_error("Cannot set both -c and the cache options");
    }
    return true;
}

/* The switches as options of the node. */
static void add_reopen_switches(Reopen *r)
{
    if (r->set_read_only) {
        json_object_set_new(r->options, "read-only", json_boolean(r->read_only));
    }
    if (r->set_cache) {
        json_object_set_new(r->options, "cache.direct", json_boolean(r->cache.direct));
        json_object_set_new(r->options, "cache.no-flush", json_boolean(r->cache.no_flush));
    }
}

/* True when the options will make the node read-only. */
static bool becomes_read_only(const Reopen *r)
{
    g_autoptr(json_t) copy = json_copy(r->options);
    bool read_only = false;

    return qb_opt_take_bool(copy, "read-only", false, &read_only, NULL) && read_only;
}

/* A node that somebody may write cannot become read-only: lets go of the right, and takes it back
 * when the reopen fails. */
static bool reopen_node(QioShell *sh, Reopen *r, GError **errp)
{
    unsigned had = blk_root(sh->blk)->perm;
    unsigned left = had & ~(unsigned)(BLK_PERM_WRITE | BLK_PERM_WRITE_UNCHANGED | BLK_PERM_RESIZE);
    bool drop = becomes_read_only(r) && left != had;
    int ret = drop ? blk_flush(sh->blk) : 0;

    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Could not flush");
        return false;
    }
    if (drop && !blk_set_perm(sh->blk, left, BLK_PERM_ALL, errp)) {
        return false;
    }
    if (bdrv_reopen(blk_bs(sh->blk), g_steal_pointer(&r->options), true, errp)) {
        return true;
    }
    if (drop) {
        (void)blk_set_perm(sh->blk, had, BLK_PERM_ALL, NULL);
    }
    return false;
}

bool qio_cmd_reopen(QioShell *sh, const QioArgs *args)
{
    g_auto(Reopen) r = {0};
    GError *err = NULL;

    if (!parse_reopen_mode(args, &r) || !parse_reopen_options(args, &r) || !qio_aio_wait(sh)) {
        return false;
    }
    add_reopen_switches(&r);
    if (!reopen_node(sh, &r, &err)) {
        return qio_error_prefixed(err, "%s", "");
    }
    if (r.set_cache) {
        blk_set_write_cache(sh->blk, !r.cache.writethrough);
    }
    return true;
}
