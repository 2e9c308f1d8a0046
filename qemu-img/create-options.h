/*
 * Creation options (-o): what create.c and convert.c share.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef QEMU_IMG_CREATE_OPTIONS_H
#define QEMU_IMG_CREATE_OPTIONS_H

#include "qemu-img/img.h"

/* Which options there are for a new image. */
typedef struct ImgCreateTables {
    const BlockDriver *drv;
    const QbOptDesc *format;   /* never NULL */
    const QbOptDesc *protocol; /* NULL: no file was named, or it has none */
} ImgCreateTables;

/* False: no such format or protocol, or the format cannot be created. @file may be NULL. */
bool img_create_tables_find(ImgCreateTables *t, const char *format, const char *file,
                            GError **errp);
/* Is "help" (or "?") among the words of @options? */
bool img_asks_for_option_help(const char *options);
/* Prints the options of @format and, with @file, of its protocol; returns the exit status. */
int img_print_option_help(const char *format, const char *file);
/*
 * Parses @text ("k=v,...", may be NULL), adds the backing file and format if given, and judges
 * names and types. Flat object: sizes and numbers are integers, all else strings. NULL on error.
 */
json_t *img_parse_create_options(const ImgCreateTables *t, const char *format, const char *text,
                                 const char *backing, const char *backing_format, GError **errp);

#endif
