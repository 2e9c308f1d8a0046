/*
 * Creation options (-o) of create and convert: help, parsing, judging.
 *
 *      "k=v,..."  --parse--> strings  --judge by the tables--> integers (numbers, sizes), strings
 *                                      format's table, then that of the protocol below it
 *
 * The tables belong to the drivers; here they decide which names exist and which type a value has,
 * so that a wrong name or value is said before any file is touched.
 *
 * Not done here: what values mean; the driver judges that.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdio.h>
#include <string.h>
#include "qemu-img/create-options.h"

/* ---- the tables ---- */

bool img_create_tables_find(ImgCreateTables *t, const char *format, const char *file,
                            GError **errp)
{
    const BlockDriver *drv = bdrv_find_format(format);
    const BlockDriver *protocol;

    *t = (ImgCreateTables){.drv = drv};
    if (!drv) {
        qb_error_set(errp, EINVAL, "Unknown file format '%s'", format);
        return false;
    }
    t->format = bdrv_create_options(drv);
    if (!t->format) {
        qb_error_set(errp, ENOTSUP, "Format driver '%s' does not support image creation", format);
        return false;
    }
    if (!file) {
        return true;
    }
    protocol = bdrv_find_protocol(file, true, errp);
    t->protocol = protocol ? bdrv_create_options(protocol) : NULL;
    return protocol != NULL;
}

static const QbOptDesc *find_desc(const ImgCreateTables *t, const char *name)
{
    const QbOptDesc *desc = qb_opts_find(t->format, name);

    return desc || !t->protocol ? desc : qb_opts_find(t->protocol, name);
}

/* ---- help ---- */

bool img_asks_for_option_help(const char *options)
{
    g_auto(GStrv) words = g_strsplit(options ? options : "", ",", -1);

    return g_strv_contains((const char *const *)words, "help") ||
           g_strv_contains((const char *const *)words, "?");
}

/* The options of both tables, those of the same name once. */
static char *describe_merged(const ImgCreateTables *t)
{
    g_autoptr(GArray) merged = g_array_new(true, false, sizeof(QbOptDesc));

    for (const QbOptDesc *desc = t->format; desc->name; desc++) {
        g_array_append_val(merged, *desc);
    }
    for (const QbOptDesc *desc = t->protocol; desc && desc->name; desc++) {
        if (!qb_opts_find(t->format, desc->name)) {
            g_array_append_val(merged, *desc);
        }
    }
    return qb_opts_describe((const QbOptDesc *)(void *)merged->data);
}

int img_print_option_help(const char *format, const char *file)
{
    ImgCreateTables tables;
    GError *err = NULL;

    if (!img_create_tables_find(&tables, format, file, &err)) {
        return img_report(err, 1);
    }
    g_autofree char *text = describe_merged(&tables);
    if (file) {
        printf("Supported options:\n%s", text);
        return 0;
    }
    printf("Supported %s options:\n%s\n"
           "The protocol level may support further options.\n"
           "Specify the target filename to include those options.\n", format, text);
    return 0;
}

/* ---- parsing and judging ---- */

/* Gives @key, which has a description, its native type. */
static bool settle_type(json_t *options, const QbOptDesc *desc, GError **errp)
{
    uint64_t number;
    json_t *given;
    bool truth, ok;

    switch (desc->type) {
    case QB_OPT_STRING:
        return true;
    case QB_OPT_BOOL: /* shown as it was spelt */
        given = json_incref(json_object_get(options, desc->name));
        ok = qb_opt_take_bool(options, desc->name, false, &truth, errp);
        json_object_set_new(options, desc->name, given);
        return ok;
    case QB_OPT_NUMBER:
        if (!qb_opt_take_uint(options, desc->name, 0, &number, errp)) {
            return false;
        }
        break;
    case QB_OPT_SIZE:
        if (!qb_opt_take_size(options, desc->name, 0, &number, errp)) {
            return false;
        }
        break;
    }
    json_object_set_new(options, desc->name, json_integer((json_int_t)number));
    return true;
}

static bool settle_types(const ImgCreateTables *t, json_t *options, GError **errp)
{
    g_autoptr(json_t) given = json_copy(options);
    const char *key;
    json_t *value;

    json_object_foreach(given, key, value) {
        const QbOptDesc *desc = find_desc(t, key);
        if (!desc) {
            qb_error_set(errp, EINVAL, "Invalid parameter '%s'", key);
            return false;
        }
        if (!settle_type(options, desc, errp)) {
            return false;
        }
    }
    return true;
}

static void set_string(json_t *options, const char *key, const char *value)
{
    if (value) {
        json_object_set_new(options, key, json_string(value));
    }
}

json_t *img_parse_create_options(const ImgCreateTables *t, const char *format, const char *text,
                                 const char *backing, const char *backing_format, GError **errp)
{
    g_autoptr(json_t) options = qb_opts_parse(text ? text : "", NULL, errp);

    if (!options) {
        return NULL;
    }
    set_string(options, "backing_file", backing);
    set_string(options, "backing_fmt", backing_format);
    if (qb_opt_peek_string(options, "backing_file") && !bdrv_driver_supports_backing(t->drv)) {
        qb_error_set(errp, ENOTSUP, "Backing file not supported for file format '%s'", format);
        return NULL;
    }
    return settle_types(t, options, errp) ? g_steal_pointer(&options) : NULL;
}
