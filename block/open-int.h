/*
 * What the files that open nodes tell one another: open.c, filename.c, node-options.c, backing.c.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_OPEN_INT_H
#define BLOCK_OPEN_INT_H

#include "block/core-int.h"

/* --- node-options.c --- */
typedef struct BdrvNodeOptions {
    char *node_name; /* NULL: not said */
    bool read_only, auto_read_only, force_share;
    bool cache_direct, cache_no_flush;
    bool discard_unmap, copy_on_read;
    int detect_zeroes; /* 0 off, 1 on, 2 unmap */
} BdrvNodeOptions;

void bdrv_node_options_clear(BdrvNodeOptions *no);
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(BdrvNodeOptions, bdrv_node_options_clear)
/* Takes the common options out of @options and checks that they fit together. */
bool bdrv_take_node_options(json_t *options, BdrvNodeOptions *ret, GError **errp);
void bdrv_set_default_string(json_t *options, const char *key, const char *value);
/* Gives @child what it inherits of @parent's options, where it does not say otherwise. */
void bdrv_inherit_options(json_t *child, const json_t *parent, int role);
/* open_flags of a node with @no: BDRV_O_RDWR and what depends on it follow the options. */
int bdrv_node_flags(int flags, const BdrvNodeOptions *no);
/* Copies @no into the node, which is new or drained. */
void bdrv_apply_node_options(BlockDriverState *bs, const BdrvNodeOptions *no, int flags);
int bdrv_inherit_flags(int flags, int role, bool parent_is_format);

/* --- filename.c --- */
/* What is to be opened. */
typedef struct BdrvOpenArgs {
    const char *filename; /* NULL when the options say it all */
    json_t *options;      /* flat, owned by the struct */
    int flags;            /* BdrvOpenFlags */
    const json_t *parent_options; /* inherited from as child of @role; NULL: nothing is */
    int role;
    const struct BdrvOpenContext *context; /* images above; NULL at the top */
    const BdrvOpenGuard *guard; /* of the top node */
} BdrvOpenArgs;

/*
 * Turns the file name into options where it is more than the name of the "file" child: json:{},
 * "proto:...", or any name when a protocol node is wanted.  Leaves args->filename NULL then, and sets
 * or clears BDRV_O_PROTOCOL.  *ret_drv: the driver that was named or follows, NULL: to be probed.
 */
bool bdrv_merge_filename(BdrvOpenArgs *args, const BlockDriver **ret_drv, GError **errp);

/* --- open.c --- */
/* What the options said about the backing file of a node. */
typedef struct BdrvBackingSpec {
    bool none;       /* backing: null */
    char *reference; /* a node-name */
    json_t *options; /* "backing.*", never NULL once taken */
} BdrvBackingSpec;
void bdrv_backing_spec_clear(BdrvBackingSpec *spec);
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(BdrvBackingSpec, bdrv_backing_spec_clear)

/* The images above the one that is being opened, for refusing loops. */
typedef struct BdrvOpenContext {
    GHashTable *above; /* identities (strings, owned) */
    const struct BdrvOpenContext *up;
} BdrvOpenContext;

/* One node with its children, but without its backing file, about which *ret_spec tells. Takes
 * args->options. */
BlockDriverState *bdrv_open_node(BdrvOpenArgs *args, BdrvBackingSpec *ret_spec, GError **errp);
/* What the user called the image: the file name, or the options as they were said. */
char *bdrv_spell_name(const char *filename, const json_t *options);
/* Puts "Could not open 'name': " in front, unless the text begins with it. */
void bdrv_prefix_open_error(GError **errp, const char *name);
/* A node, its children, its backing chain. Takes args->options. */
BlockDriverState *bdrv_open_tree(BdrvOpenArgs *args, GError **errp);

/* --- backing.c --- */
/* Opens all that is below @bs by the names in the headers; @spec is about the first one. */
bool bdrv_open_backing_chain(BlockDriverState *bs, const BdrvBackingSpec *spec,
                             const BdrvOpenContext *context, GError **errp);
/* What makes two nodes the same image: driver, strong options, the file at the bottom. */
char *bdrv_image_identity(const BlockDriver *drv, const json_t *strong, BlockDriverState *file);
/* False and error when @identity is among the images above. */
bool bdrv_check_no_loop(const BdrvOpenContext *context, const char *identity,
                        const char *filename, GError **errp);
/* Puts a temporary qcow2 overlay over @base (reference stolen); @options: the user's. */
BlockDriverState *bdrv_append_temporary(BlockDriverState *base, const json_t *options,
                                        GError **errp);

#endif
