/*
 * The registry: which drivers there are, and which one a name means.
 *
 *     drivers:  [ file ][ host_device ][ raw ][ qcow2 ] ...      in order of registration
 *
 *     "qcow2"               format name     -> exact match
 *     "blkdebug:cfg:x.img"  protocol prefix -> the driver whose protocol_name is "blkdebug"
 *     "x.img"               plain name      -> best probe_device() score, else "file"
 *
 * Invariants
 *  1. The table only grows, and only before the first open: it is read without a lock.
 *  2. Names are unique; a second driver of a name is a bug of the program.
 *  3. What exists as a file, or has a '/' before the first ':', is a plain name.  A prefix can thus
 *     never hide a file that is there.
 *
 * Not done: no loading of drivers at run time, no aliases.
 *
 * SPDX-License-Identifier: MIT
 */
#include <string.h>
#include <unistd.h>
#include "block/core-int.h"

static GPtrArray *drivers; /* const BlockDriver* */

void bdrv_register(const BlockDriver *drv)
{
    assert(!bdrv_find_format(drv->format_name));
    if (!drivers) {
        drivers = g_ptr_array_new();
    }
    g_ptr_array_add(drivers, (gpointer)drv);
}

unsigned bdrv_driver_count(void)
{
    return drivers ? drivers->len : 0;
}

const BlockDriver *bdrv_driver_at(unsigned i)
{
    return g_ptr_array_index(drivers, i);
}

const BlockDriver *bdrv_find_format(const char *format_name)
{
    for (unsigned i = 0; i < bdrv_driver_count(); i++) {
        const BlockDriver *drv = bdrv_driver_at(i);
        if (!strcmp(drv->format_name, format_name)) {
            return drv;
        }
    }
    return NULL;
}

/* Length of "proto" in "proto:rest"; 0 for a plain name. */
static size_t protocol_prefix_length(const char *filename)
{
    size_t n = strcspn(filename, ":/");
    if (filename[n] != ':' || n == 0 || access(filename, F_OK) == 0) {
        return 0;
    }
    return n;
}

bool bdrv_has_protocol_prefix(const char *filename)
{
    return protocol_prefix_length(filename) > 0;
}

/* The best probe_device() answer among drivers for plain names; else "file". */
static const BlockDriver *plain_file_driver(const char *filename)
{
    const BlockDriver *best = NULL;
    int best_score = 0;
    for (unsigned i = 0; i < bdrv_driver_count(); i++) {
        const BlockDriver *drv = bdrv_driver_at(i);
        int score = drv->probe_device ? drv->probe_device(filename) : 0;
        if (score > best_score) {
            best = drv;
            best_score = score;
        }
    }
    return best ? best : bdrv_find_format("file");
}

static const BlockDriver *find_protocol_name(const char *name, size_t len)
{
    for (unsigned i = 0; i < bdrv_driver_count(); i++) {
        const BlockDriver *drv = bdrv_driver_at(i);
        const char *proto = drv->protocol_name;
        if (proto && strlen(proto) == len && !memcmp(proto, name, len)) {
            return drv;
        }
    }
    return NULL;
}

const BlockDriver *bdrv_find_protocol(const char *filename, bool allow_prefix, GError **errp)
{
    size_t len = allow_prefix ? protocol_prefix_length(filename) : 0;
    const BlockDriver *drv =
        len ? find_protocol_name(filename, len) : plain_file_driver(filename);
    if (!drv) {
        qb_error_set(errp, EINVAL, "Unknown protocol '%.*s'", len ? (int)len : 4,
                     len ? filename : "file");
    }
    return drv;
}

static int compare_names(gconstpointer a, gconstpointer b)
{
    const BlockDriver *const *da = a, *const *db = b;
    return strcmp((*da)->format_name, (*db)->format_name);
}

void bdrv_for_each_driver(void (*cb)(const BlockDriver *drv, void *opaque), void *opaque)
{
    g_autoptr(GPtrArray) sorted = g_ptr_array_new();
    for (unsigned i = 0; i < bdrv_driver_count(); i++) {
        g_ptr_array_add(sorted, (gpointer)bdrv_driver_at(i));
    }
    g_ptr_array_sort(sorted, compare_names);
    for (unsigned i = 0; i < sorted->len; i++) {
        cb(g_ptr_array_index(sorted, i), opaque);
    }
}

const char *bdrv_driver_name(const BlockDriver *drv)
{
    return drv->format_name;
}

bool bdrv_driver_can_create(const BlockDriver *drv)
{
    return drv->create != NULL;
}

bool bdrv_driver_supports_backing(const BlockDriver *drv)
{
    return drv->supports_backing;
}

const QbOptDesc *bdrv_create_options(const BlockDriver *drv)
{
    return drv->create_opts;
}

const QbOptDesc *bdrv_amend_options(const BlockDriver *drv)
{
    return drv->amend_opts;
}
