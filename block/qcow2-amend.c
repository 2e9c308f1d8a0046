/*
 * Changing what an existing image says about itself.
 *
 * Now: the backing file and its format.  The names go into the header by steps that each leave an
 * image that parses (qcow2-names.c); the open graph is the caller's.
 *
 * Not done: changes of version, refcount width, lazy refcounts, data file.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2.h"

const QbOptDesc qcow2_amend_opts[] = {
    {"backing_file", QB_OPT_STRING, "File name of a base image", NULL},
    {"backing_fmt", QB_OPT_STRING, "Image format of the base image", NULL},
    {NULL, 0, NULL, NULL},
};

bool qcow2_change_backing_file(BlockDriverState *bs, const char *file, const char *fmt,
                               GError **errp)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    if (s->data_file_raw && file && *file) {
        qb_error_set(errp, EINVAL,
                     "Backing file and data-file-raw cannot be used at the same time");
        return false;
    }
    if (!qcow2_header_change_names(bs, file, fmt, errp)) {
        return false;
    }
    bdrv_set_backing_names(bs, file, file && *file ? fmt : "");
    return true;
}
