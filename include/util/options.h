/*
 * Options: JSON objects end to end, one parser for every spelling of them.
 *
 *   key=value,key2=a,,b          -o and --image-opts strings; ",," stands for a comma
 *   file.filename=x              dotted keys name members of nested objects
 *   json:{'driver':'qcow2',...}  JSON with single or double quotes
 *
 * All of them become one flat json_t object with dotted keys and string values ("file.filename":
 * "x", lists "servers.0.host"); values from JSON keep their type.  A consumer takes (removes) the
 * keys it knows with the qb_opt_take_*() functions, which accept both the string and the native
 * type; a key that is left over is an error that names it.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef QB_UTIL_OPTIONS_H
#define QB_UTIL_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>
#include <glib.h>
#include <jansson.h>

#pragma GCC visibility push(default) /* public: exported by libqblock */

G_DEFINE_AUTOPTR_CLEANUP_FUNC(json_t, json_decref)

/* Parses "k=v,k2=v2". @implied_key (may be NULL) names the key of a first element without "=".
 * An element "foo" stands for foo=on, "nofoo" is not special. NULL and error on bad syntax. */
json_t *qb_opts_parse(const char *str, const char *implied_key, GError **errp);

/* Parses JSON text, strings in single or double quotes. Must be an object. Not flattened. A member
 * named twice is an error; errors say at which byte of @text. */
json_t *qb_json_parse_object(const char *text, GError **errp);

/* Nested object/array -> flat object with dotted keys (new reference). Empty objects and arrays
 * and null values are kept as they are. A key of @obj that is dotted already wins over the nested
 * spelling of the same name. */
json_t *qb_opts_flatten(const json_t *obj);
/* Flat -> nested (new reference); "a" and "a.b" together are an error, unless "a" is an empty
 * object. Keys 0..n-1 become an array; gaps, and indices mixed with names, are errors. */
json_t *qb_opts_unflatten(const json_t *flat, GError **errp);

/* Moves all "prefix.x" of @opts into a new flat object under "x"; empty when there are none. */
json_t *qb_opts_take_prefix(json_t *opts, const char *prefix);
/* True when there is a key "prefix.x". */
bool qb_opts_has_prefix(const json_t *opts, const char *prefix);
/* Copies each key of @src that @dst does not have. */
void qb_opts_set_defaults(json_t *dst, const json_t *src);

/* Each takes @key out of @opts, also when its value is refused. *ret is written on success only; an
 * absent key gives the default. Booleans: on/yes/true/y, off/no/false/n. */
bool qb_opt_take_bool(json_t *opts, const char *key, bool def, bool *ret, GError **errp);
/* Unsigned decimal or 0x number. "Parameter 'key' expects a number" otherwise. */
bool qb_opt_take_uint(json_t *opts, const char *key, uint64_t def, uint64_t *ret, GError **errp);
/* Number with b k K M G T P E suffix, fractions allowed; at most INT64_MAX. */
bool qb_opt_take_size(json_t *opts, const char *key, uint64_t def, uint64_t *ret, GError **errp);
/* Newly allocated copy, NULL when absent (numbers and booleans are turned into text, the latter
 * into "on" and "off"). An object, array or null is no string: NULL too, and the key stays in
 * @opts, so that it is named as left over. */
char *qb_opt_take_string(json_t *opts, const char *key);
/* Index into the NULL-terminated @names. "Parameter 'key' does not accept value 'x'". */
bool qb_opt_take_enum(json_t *opts, const char *key, const char *const *names, int def, int *ret,
                      GError **errp);
/* Borrowed string value or NULL; only for keys whose value is a JSON string. */
const char *qb_opt_peek_string(const json_t *opts, const char *key);

/* Description of one option of a driver or verb: feeds `-o help` and checks names. */
typedef enum QbOptType { QB_OPT_STRING, QB_OPT_BOOL, QB_OPT_NUMBER, QB_OPT_SIZE } QbOptType;
typedef struct QbOptDesc {
    const char *name; /* NULL ends the table */
    QbOptType type;
    const char *help; /* as `-o help` shows it */
    const char *def;  /* default as text, or NULL */
} QbOptDesc;

/* The description of @name, NULL when it is not in @table. */
const QbOptDesc *qb_opts_find(const QbOptDesc *table, const char *name);
/* Lines "  name=<type>  - help", sorted, as the tools print them. Newly allocated. */
char *qb_opts_describe(const QbOptDesc *table);

#pragma GCC visibility pop

#endif
