/*
 * --sandbox of the verbs that only look at an image: info, check, map, measure.
 *
 *      name of a plain file, and nothing the image names is wanted
 *          open the file | shut in | read the first byte, choose the format, ...
 *      anything else
 *          open the whole chain | shut in | map, measure
 *
 * "auto" takes what the kernel and the build offer, "on" refuses to work without all of it, "off" is
 * without.  util/sandbox.c says what is taken away.
 *
 * Invariant: a process enters once, and opens nothing afterwards.  So `info --backing-chain`, which
 * goes from name to name, is without; and a program that runs verbs among other things is not shut in
 * by them, unless it says so: only main() makes auto the default.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdlib.h>
#include <string.h>
#include "qemu-img/img.h"
#include "util/sandbox.h"

static const char *default_mode = "off";

void img_set_default_sandbox(const char *mode)
{
    default_mode = mode;
}

const char *img_sandbox_mode(const char *said)
{
    return said ? said : default_mode;
}

static bool is_wanted(const ImgOpen *how)
{
    return how->sandbox && strcmp(how->sandbox, "off") != 0;
}

bool img_check_sandbox(const char *verb, const char *mode)
{
    if (!mode || !strcmp(mode, "auto") || !strcmp(mode, "on") || !strcmp(mode, "off")) {
        return true;
    }
    img_usage_error(verb, "--sandbox expects 'auto', 'on' or 'off', not '%s'", mode);
    return false;
}

static bool shut_in(void *opaque, GError **errp)
{
    const ImgOpen *how = opaque;

    if (strcmp(how->sandbox, "on") != 0) {
        qb_sandbox_enter(NULL);
        return true;
    }
    if (!qb_sandbox_enter(errp)) {
        g_prefix_error(errp, "--sandbox=on: ");
        return false;
    }
    return true;
}

/* A path: no "json:", no "driver:". */
static bool is_plain_path(const char *name)
{
    const char *colon = strchr(name, ':'), *slash = strchr(name, '/');
    return !colon || (slash && slash < colon);
}

/* Does opening need just the one file that @name means? */
static bool is_one_file(const char *name, const ImgOpen *how)
{
    bool names_followed = !(how->flags & BDRV_O_NO_BACKING) || !(how->flags & BDRV_O_NO_IO);

    return !how->image_opts && is_plain_path(name) && (!names_followed || how->untrusted);
}

BlockBackend *img_open_guarded(const char *name, const ImgOpen *how, json_t *options, GError **errp)
{
    const BdrvOpenGuard guard = {.opened = shut_in, .opaque = (void *)how};
    int flags = how->flags | (how->untrusted ? BDRV_O_NO_NAMES : 0);
    bool wanted = is_wanted(how), early = wanted && is_one_file(name, how);
    BlockBackend *blk;

    if (wanted) { /* a ring made while opening could not be used afterwards */
        setenv("QB_DISABLE_IO_URING", "1", 1);
    }
    blk = blk_new_open_guarded(how->image_opts ? NULL : name, options, flags,
                               early ? &guard : NULL, errp);
    if (blk && wanted && !early && !shut_in((void *)how, errp)) {
        blk_unref(blk);
        return NULL;
    }
    return blk;
}
