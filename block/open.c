/*
 * Opening: from a file name and options to a tree of nodes.
 *
 *     bdrv_open("a.qcow2", {..})
 *       bdrv_open_tree               a node, its children, its backing chain
 *         bdrv_open_node
 *           bdrv_merge_filename      name -> options, or name of the "file" child
 *           open_file_first          format wanted: the file below is opened before ...
 *           run_guard                ... its opener can shut the process in, and ...
 *           bdrv_probe_format        ... so that its content can name the driver
 *           instantiate              common options, new node, driver's open, leftovers
 *             driver -> bdrv_open_child -> bdrv_open_tree       (other children, same way)
 *         bdrv_open_backing_chain    one node after the other, not recursive
 *       bdrv_append_temporary        BDRV_O_SNAPSHOT
 *
 * The file opened first is handed to the driver as option "file" with the node's name; the driver
 * attaches it with the role it wants.  Until then it has no parent and hence no permissions: probing
 * never disturbs another user of the file.
 *
 * Invariants
 *  1. An option is the driver's, the core's, a child's, or an error that names it.
 *  2. A node that could not be opened leaves nothing behind: children dropped, name free.
 *  3. bs->options holds what makes this node (inherited values too), bs->explicit_options what the
 *     user said about it; neither holds its children's.
 *  4. The text "Could not open 'F': " is put in front of an error once, at the top.
 *
 * Not done: no search for a format by file name extension.
 *
 * SPDX-License-Identifier: MIT
 */
#include <string.h>
#include "block/open-int.h"

void bdrv_backing_spec_clear(BdrvBackingSpec *spec)
{
    g_clear_pointer(&spec->reference, g_free);
    g_clear_pointer(&spec->options, json_decref);
}

/* --- children --- */

/* Opens what @left says about child @name of a parent, or what @filename says; takes that out of
 * @left. NULL without an error when neither says anything. */
static BlockDriverState *open_wanted(const char *name, json_t *left, BdrvOpenArgs *args,
                                     GError **errp)
{
    g_autofree char *reference = qb_opt_take_string(left, name);
    args->options = qb_opts_take_prefix(left, name);
    bool said = json_object_size(args->options) || args->filename;
    if (!reference && said) {
        BlockDriverState *bs = bdrv_open_tree(args, errp);
        if (bs) {
            bs->implicit = true;
        }
        return bs;
    }
    g_clear_pointer(&args->options, json_decref);
    if (reference && said) {
        qb_error_set(errp, EINVAL,
                     "Cannot reference an existing block device with additional options or a new "
                     "filename");
        return NULL;
    }
    return reference ? bdrv_ref_node(reference, errp) : NULL;
}

BdrvChild *bdrv_open_child(BlockDriverState *bs, const char *filename, json_t *options,
                           const char *name, int role, bool allow_none, GError **errp)
{
    BdrvOpenArgs args = {
        .filename = filename,
        .flags = bdrv_inherit_flags(bs->open_flags, role, bs->drv->is_format),
        .parent_options = bs->options,
        .role = role,
        .context = bs->open_context,
    };
    GError *err = NULL;
    BlockDriverState *node = open_wanted(name, options, &args, &err);
    if (node) {
        const BdrvAttach at = {.parent = bs, .name = name, .role = role};
        return bdrv_attach(&at, node, errp);
    }
    if (!err && !allow_none) {
        qb_error_set(&err, EINVAL, "A block device must be specified for \"%s\"", name);
    }
    if (err) {
        g_propagate_error(errp, err);
    }
    return NULL;
}

bool bdrv_open_file_child(BlockDriverState *bs, const char *filename, json_t *options, int role,
                          GError **errp)
{
    return bdrv_open_child(bs, filename, options, "file", role, false, errp) != NULL;
}

/* --- one node: what is known before it exists --- */

typedef struct Opening {
    BdrvOpenArgs *args;
    const BlockDriver *drv;
    json_t *explicit_options; /* what was said, before anything was inherited */
    BlockDriverState *file;   /* opened first; NULL for protocol nodes */
    bool guessed_raw;
} Opening;

static void opening_clear(Opening *o)
{
    g_clear_pointer(&o->explicit_options, json_decref);
    g_clear_pointer(&o->file, bdrv_unref);
    g_clear_pointer(&o->args->options, json_decref);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Opening, opening_clear)

static void add_defaults(BdrvOpenArgs *args)
{
    if (args->parent_options) {
        bdrv_inherit_options(args->options, args->parent_options, args->role);
    }
    bdrv_set_default_string(args->options, "read-only",
                            args->flags & BDRV_O_RDWR ? "off" : "on");
    if (args->flags & BDRV_O_COPY_ON_READ) {
        bdrv_set_default_string(args->options, "copy-on-read", "on");
    }
}

/* No backing file: null, or an empty name, which is all that option strings can say. */
static bool says_no_backing(json_t *options)
{
    json_t *backing = json_object_get(options, "backing");
    if (json_is_string(backing) && !*json_string_value(backing)) {
        bdrv_warn("Use of \"backing\": \"\" is deprecated; use \"backing\": null instead");
        return true;
    }
    return json_is_null(backing);
}

static void take_backing_spec(json_t *options, BdrvBackingSpec *ret)
{
    *ret = (BdrvBackingSpec){0};
    ret->none = says_no_backing(options);
    if (ret->none) {
        json_object_del(options, "backing");
    }
    ret->reference = qb_opt_take_string(options, "backing");
    ret->options = qb_opts_take_prefix(options, "backing");
}

static bool open_file_first(Opening *o, GError **errp)
{
    BdrvOpenArgs *args = o->args;
    if (args->flags & BDRV_O_PROTOCOL) {
        return true;
    }
    BdrvOpenArgs file = {
        .filename = args->filename,
        .flags = bdrv_inherit_flags(args->flags, BDRV_CHILD_IMAGE, !o->drv || o->drv->is_format),
        .parent_options = args->options,
        .role = BDRV_CHILD_IMAGE,
        .context = args->context,
    };
    GError *err = NULL;
    o->file = open_wanted("file", args->options, &file, &err);
    if (err) {
        g_propagate_error(errp, err);
        return false;
    }
    return true;
}

static bool run_guard(Opening *o, GError **errp)
{
    const BdrvOpenGuard *guard = o->args->guard;
    return !guard || guard->opened(guard->opaque, errp);
}

static bool choose_driver(Opening *o, GError **errp)
{
    if (o->drv) {
        return true;
    }
    if (!o->file) {
        qb_error_set(errp, EINVAL, "Must specify either driver or file");
        return false;
    }
    const char *filename = o->args->filename ? o->args->filename : o->file->filename;
    o->drv = bdrv_probe_format(o->file, filename, errp);
    if (!o->drv) {
        return false;
    }
    o->guessed_raw = !strcmp(o->drv->format_name, "raw");
    bdrv_set_default_string(o->args->options, "driver", o->drv->format_name);
    return true;
}

static bool prepare(Opening *o, BdrvBackingSpec *ret_spec, GError **errp)
{
    if (!bdrv_merge_filename(o->args, &o->drv, errp)) {
        return false;
    }
    take_backing_spec(o->args->options, ret_spec);
    o->explicit_options = json_copy(o->args->options);
    add_defaults(o->args);
    return open_file_first(o, errp) && run_guard(o, errp) && choose_driver(o, errp);
}

/* --- one node: making it --- */

/* The name errors and the driver's open know the node by, until it has its own. */
static void set_working_filename(BlockDriverState *bs, const BlockDriverState *file)
{
    const char *name = qb_opt_peek_string(bs->options, "filename");
    g_free(bs->filename);
    bs->filename = g_strdup(name ? name : file ? file->filename : "");
}

static bool check_filename(const BlockDriverState *bs, GError **errp)
{
    if (bs->drv->needs_filename && !bs->filename[0]) {
        qb_error_set(errp, EINVAL, "The '%s' block driver requires a file name",
                     bs->drv->format_name);
        return false;
    }
    return true;
}

static bool check_loop(const BlockDriverState *bs, BlockDriverState *file, GError **errp)
{
    if (!bs->open_context || !bs->drv->supports_backing || !file) {
        return true;
    }
    g_autoptr(json_t) strong = bdrv_strong_options(bs);
    g_autofree char *identity = bdrv_image_identity(bs->drv, strong, file);
    return bdrv_check_no_loop(bs->open_context, identity, file->filename, errp);
}

static bool check_all_taken(const BlockDriverState *bs, json_t *left, GError **errp)
{
    const char *key;
    json_t *value;
    json_object_foreach(left, key, value) {
        bool protocol = bs->drv->protocol_name != NULL;
        qb_error_set(errp, EINVAL, "Block %s '%s' %s support the option '%s'",
                     protocol ? "protocol" : "format", bs->drv->format_name,
                     protocol ? "doesn't" : "does not", key);
        return false;
    }
    return true;
}

static void drop_children(BlockDriverState *bs)
{
    while (bs->children->len) {
        bdrv_detach_child(g_ptr_array_index(bs->children, bs->children->len - 1));
    }
}

/* The driver's open with a copy of @driver_options, which all must be taken. */
static bool try_driver_open(BlockDriverState *bs, const json_t *driver_options, GError **errp)
{
    g_autoptr(json_t) left = json_copy((json_t *)driver_options);
    if (!bs->drv->open(bs, left, bs->open_flags, errp)) {
        drop_children(bs);
        return false;
    }
    bs->opened = true;
    return check_all_taken(bs, left, errp);
}

static bool is_refused_write(const GError *err)
{
    int code = -qb_error_to_errno(err);
    return code == EACCES || code == EROFS || code == EPERM;
}

static bool open_driver(BlockDriverState *bs, const json_t *driver_options, GError **errp)
{
    GError *err = NULL;
    if (try_driver_open(bs, driver_options, &err)) {
        return true;
    }
    if (!bs->opened && bs->auto_read_only && !bs->read_only && is_refused_write(err)) {
        g_clear_error(&err);
        bs->read_only = true;
        bs->open_flags &= ~(BDRV_O_RDWR | BDRV_O_RESIZE);
        json_object_set_new(bs->options, "read-only", json_string("on"));
        return try_driver_open(bs, driver_options, errp);
    }
    g_propagate_error(errp, err);
    return false;
}

/* Options of children are the children's. */
static void prune_child_options(BlockDriverState *bs, json_t *options)
{
    for (unsigned i = 0; i < bs->children->len; i++) {
        const BdrvChild *c = g_ptr_array_index(bs->children, i);
        json_decref(qb_opts_take_prefix(options, c->name));
        json_object_del(options, c->name);
    }
}

static bool finish_node(BlockDriverState *bs, GError **errp)
{
    prune_child_options(bs, bs->options);
    prune_child_options(bs, bs->explicit_options);
    int64_t length = bdrv_refresh_length(bs);
    if (length < 0) {
        qb_error_set_errno(errp, (int)length, "Could not refresh total sector count");
        return false;
    }
    bdrv_refresh_limits(bs);
    bdrv_refresh_filename(bs);
    return true;
}

static void warn_of_guess(const BlockDriverState *bs)
{
    bdrv_warn("WARNING: Image format was not specified for '%s' and probing guessed raw.\n"
              "         Automatically detecting the format is dangerous for raw images, write "
              "operations on block 0 will be restricted.\n"
              "         Specify the 'raw' format explicitly to remove the restrictions.",
              bs->filename);
}

/* Fills the new node @bs and lets its driver open it. */
static bool open_new_node(BlockDriverState *bs, Opening *o, json_t *driver_options, GError **errp)
{
    bs->options = g_steal_pointer(&o->args->options);
    bs->explicit_options = g_steal_pointer(&o->explicit_options);
    bs->probed = o->guessed_raw;
    bs->open_context = o->args->context;
    set_working_filename(bs, o->file);
    if (o->file) {
        json_object_set_new(driver_options, "file", json_string(o->file->node_name));
    }
    bool ok = check_filename(bs, errp) && check_loop(bs, o->file, errp) &&
              open_driver(bs, driver_options, errp) && finish_node(bs, errp);
    bs->open_context = NULL;
    if (ok && bs->probed && !bs->read_only) {
        warn_of_guess(bs);
    }
    return ok;
}

static BlockDriverState *instantiate(Opening *o, GError **errp)
{
    g_autoptr(json_t) driver_options = json_copy(o->args->options);
    g_auto(BdrvNodeOptions) no = {0};
    json_object_del(driver_options, "driver");
    if (!bdrv_take_node_options(driver_options, &no, errp)) {
        return NULL;
    }
    BlockDriverState *bs = bdrv_new_node(o->drv, no.node_name, errp);
    if (!bs) {
        return NULL;
    }
    bdrv_apply_node_options(bs, &no, o->args->flags);
    if (!open_new_node(bs, o, driver_options, errp)) {
        bdrv_unref(bs);
        return NULL;
    }
    return bs;
}

BlockDriverState *bdrv_open_node(BdrvOpenArgs *args, BdrvBackingSpec *ret_spec, GError **errp)
{
    g_auto(Opening) o = {.args = args};
    *ret_spec = (BdrvBackingSpec){0};
    return prepare(&o, ret_spec, errp) ? instantiate(&o, errp) : NULL;
}

/* --- trees --- */

BlockDriverState *bdrv_open_tree(BdrvOpenArgs *args, GError **errp)
{
    g_auto(BdrvBackingSpec) spec = {0};
    BlockDriverState *bs = bdrv_open_node(args, &spec, errp);
    if (bs && !(args->flags & BDRV_O_NO_BACKING) &&
        !bdrv_open_backing_chain(bs, &spec, args->context, errp)) {
        bdrv_unref(bs);
        return NULL;
    }
    return bs;
}

/* What the user sees: a read-only image below, a throw-away overlay on top. */
static BlockDriverState *open_temporary(BdrvOpenArgs *args, GError **errp)
{
    g_autoptr(json_t) said = json_copy(args->options);
    args->flags &= ~(BDRV_O_RDWR | BDRV_O_RESIZE | BDRV_O_SNAPSHOT);
    json_object_set_new(args->options, "read-only", json_string("on"));
    BlockDriverState *base = bdrv_open_tree(args, errp);
    return base ? bdrv_append_temporary(base, said, errp) : NULL;
}

char *bdrv_spell_name(const char *filename, const json_t *options)
{
    if (filename) {
        return g_strdup(filename);
    }
    GString *s = g_string_new(NULL);
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)options, key, value) {
        g_autoptr(json_t) one = json_object();
        json_object_set(one, key, value);
        g_autofree char *text = qb_opt_take_string(one, key);
        g_auto(GStrv) parts = g_strsplit(text ? text : "", ",", -1);
        g_autofree char *copy = g_strjoinv(",,", parts);
        g_string_append_printf(s, "%s%s=%s", s->len ? "," : "", key, copy);
    }
    return g_string_free(s, FALSE);
}

/* Invariant 4. A protocol driver has said it already where it is the file itself that fails. */
void bdrv_prefix_open_error(GError **errp, const char *name)
{
    g_autofree char *prefix = g_strdup_printf("Could not open '%s': ", name);
    if (errp && *errp && !g_str_has_prefix((*errp)->message, prefix)) {
        g_prefix_error(errp, "%s", prefix);
    }
}

BlockDriverState *bdrv_open(const char *filename, json_t *options, int flags, GError **errp)
{
    return bdrv_open_guarded(filename, options, flags, NULL, errp);
}

BlockDriverState *bdrv_open_guarded(const char *filename, json_t *options, int flags,
                                    const BdrvOpenGuard *guard, GError **errp)
{
    assert(!bdrv_graph_held());
    BdrvOpenArgs args = {
        .filename = filename,
        .options = options ? json_copy(options) : json_object(),
        .flags = flags,
        .guard = guard,
    };
    json_decref(options);
    g_autofree char *name = bdrv_spell_name(filename, args.options);
    BlockDriverState *bs = flags & BDRV_O_SNAPSHOT ? open_temporary(&args, errp)
                                                   : bdrv_open_tree(&args, errp);
    if (!bs) {
        bdrv_prefix_open_error(errp, name);
    }
    return bs;
}
