/*
 * Options: every spelling becomes one flat JSON object, and its consumers take what they know.
 *
 *   "driver=qcow2,file.filename=a"  --qb_opts_parse()------------+
 *   {'driver':'qcow2',              --qb_json_parse_object()-+   v
 *    'file':{'filename':'a'}}                                +-> qb_opts_flatten()
 *                                                                |
 *   { "driver": "qcow2", "file.filename": "a" }  <---------------+
 *        |                    |
 *        | qb_opt_take_*()    +- qb_opts_take_prefix("file") --> { "filename": "a" }
 *        v
 *   values; what is left over at the end is named in an error by the consumer
 *
 * Invariants
 *  1. Values from key=value text are JSON strings; the taking functions read both a string and the
 *     native type, with the same checks and the same error texts.
 *  2. A taking function removes its key also when the value is refused, and writes its result only
 *     on success.  Only qb_opt_take_string() leaves a value it cannot read, to be named as left
 *     over.
 *  3. Objects made by unflattening are at most MAX_DEPTH deep: jansson frees recursively.
 *
 * Keys and values are bytes: file names need not be UTF-8, hence jansson's _nocheck functions.
 *
 * Not done: types are not checked against a QbOptDesc table here, the consumer's takes do that.
 *
 * SPDX-License-Identifier: MIT
 */
#include "util/options.h"
#include "util/error.h"
#include "util/size.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_DEPTH 64

/* ---- key=value text ---- */

/* Reads a value up to a single comma (",," stands for one inside); *p is left behind that comma. */
static char *read_value(const char **p)
{
    GString *value = g_string_new(NULL);
    for (; **p && !(**p == ',' && (*p)[1] != ','); (*p)++) {
        if (**p == ',') {
            (*p)++;
        }
        g_string_append_c(value, **p);
    }
    if (**p == ',') {
        (*p)++;
    }
    return g_string_free(value, FALSE);
}

/* Reads one element of the list. @implied_key is for an element without "=", NULL: it means on. */
static bool read_element(json_t *opts, const char **p, const char *implied_key, GError **errp)
{
    size_t name_len = strcspn(*p, "=,");
    bool has_value = (*p)[name_len] == '=';
    g_autofree char *name = NULL;
    g_autofree char *value = NULL;
    if (!has_value && implied_key) {
        name = g_strdup(implied_key);
        value = read_value(p);
    } else {
        name = g_strndup(*p, name_len);
        *p += name_len + ((*p)[name_len] != '\0');
        value = has_value ? read_value(p) : g_strdup("on");
    }
    if (!name[0]) {
        qb_error_set(errp, EINVAL, "Invalid parameter ''");
        return false;
    }
    json_object_set_new_nocheck(opts, name, json_string_nocheck(value));
    return true;
}

json_t *qb_opts_parse(const char *str, const char *implied_key, GError **errp)
{
    g_autoptr(json_t) opts = json_object();
    for (const char *p = str; *p;) {
        if (!read_element(opts, &p, p == str ? implied_key : NULL, errp)) {
            return NULL;
        }
    }
    return g_steal_pointer(&opts);
}

/* ---- flat <-> nested ---- */

static bool is_nested(const json_t *value)
{
    return json_object_size(value) > 0 || json_array_size(value) > 0;
}

static void flatten_value(json_t *flat, const char *key, json_t *value);

static void flatten_object(json_t *flat, const char *prefix, json_t *obj)
{
    const char *name;
    json_t *value;
    json_object_foreach(obj, name, value) {
        g_autofree char *key = g_strconcat(prefix, ".", name, NULL);
        flatten_value(flat, key, value);
    }
}

static void flatten_array(json_t *flat, const char *prefix, json_t *array)
{
    size_t i;
    json_t *value;
    json_array_foreach(array, i, value) {
        g_autofree char *key = g_strdup_printf("%s.%zu", prefix, i);
        flatten_value(flat, key, value);
    }
}

static void flatten_value(json_t *flat, const char *key, json_t *value)
{
    if (!is_nested(value)) {
        json_object_set_nocheck(flat, key, value);
    } else if (json_is_object(value)) {
        flatten_object(flat, key, value);
    } else {
        flatten_array(flat, key, value);
    }
}

json_t *qb_opts_flatten(const json_t *obj)
{
    json_t *flat = json_object();
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)obj, name, value) {
        if (is_nested(value)) {
            flatten_value(flat, name, value);
        }
    }
    json_object_foreach((json_t *)obj, name, value) {
        if (!is_nested(value)) {
            flatten_value(flat, name, value); /* second: the dotted spelling wins */
        }
    }
    return flat;
}

static void set_conflict(GError **errp, const char *a, const char *b)
{
    qb_error_set(errp, EINVAL, "Parameters '%s' and '%s' cannot be used together", a, b);
}

/* The object that member @name of @parent is or becomes; NULL when it is a plain value already. */
static json_t *descend(json_t *parent, const char *name)
{
    json_t *child = json_object_get(parent, name);
    if (!child) {
        child = json_object();
        json_object_set_new_nocheck(parent, name, child);
    }
    return json_is_object(child) ? child : NULL;
}

static bool check_path(char *const *path, const char *key, GError **errp)
{
    guint depth = g_strv_length((char **)path);
    bool empty_part = depth == 0 || g_strv_contains((const char *const *)path, "");
    if (empty_part || depth > MAX_DEPTH) {
        qb_error_set(errp, EINVAL, "Invalid parameter '%s'", key);
        return false;
    }
    return true;
}

/* Puts @value at the place that the dotted @key names. */
static bool put_nested(json_t *root, const char *key, json_t *value, GError **errp)
{
    g_auto(GStrv) path = g_strsplit(key, ".", -1);
    if (!check_path(path, key, errp)) {
        return false;
    }
    json_t *at = root;
    guint i = 0;
    for (; path[i + 1]; i++) {
        at = descend(at, path[i]);
        if (!at) {
            g_autofree char *rest = g_strjoinv(".", path + i + 1);
            g_autofree char *head = g_strndup(key, strlen(key) - strlen(rest) - 1);
            set_conflict(errp, head, key);
            return false;
        }
    }
    json_t *there = json_object_get(at, path[i]);
    if (json_is_object(there) && json_is_object(value) && !json_object_size(value)) {
        return true; /* an empty object adds nothing to the members that came first */
    }
    if (there) {
        g_autofree char *below = g_strconcat(key, ".*", NULL);
        set_conflict(errp, key, below);
        return false;
    }
    json_object_set_nocheck(at, path[i], value);
    return true;
}

static bool is_index(const char *name)
{
    bool leading_zero = name[0] == '0' && name[1];
    return !leading_zero && name[0] && strspn(name, "0123456789") == strlen(name);
}

static size_t count_indices(json_t *obj)
{
    size_t n = 0;
    const char *name;
    json_t *value;
    json_object_foreach(obj, name, value) {
        n += is_index(name);
    }
    return n;
}

/* @obj, whose keys are all indices, as an array. @path names it in errors. */
static json_t *array_of(json_t *obj, const char *path, GError **errp)
{
    g_autoptr(json_t) array = json_array();
    for (size_t i = 0; i < json_object_size(obj); i++) {
        char index[32];
        snprintf(index, sizeof(index), "%zu", i);
        json_t *value = json_object_get(obj, index);
        if (!value) {
            qb_error_set(errp, EINVAL, "Parameter '%s.%zu' missing", path, i);
            return NULL;
        }
        json_array_append(array, value);
    }
    return g_steal_pointer(&array);
}

static bool make_arrays(json_t *obj, const char *prefix, GError **errp);

/* The final form of the member @path of a nested object (new reference), NULL on error. */
static json_t *finish_member(json_t *value, const char *path, GError **errp)
{
    if (json_object_size(value) == 0) {
        return json_incref(value);
    }
    g_autofree char *prefix = g_strconcat(path, ".", NULL);
    if (!make_arrays(value, prefix, errp)) {
        return NULL;
    }
    size_t indices = count_indices(value);
    if (indices == 0) {
        return json_incref(value);
    }
    if (indices < json_object_size(value)) {
        qb_error_set(errp, EINVAL, "Parameters '%s.*' mix list and non-list names", path);
        return NULL;
    }
    return array_of(value, path, errp);
}

/* Turns each object below @obj whose keys are 0..n-1 into an array. */
static bool make_arrays(json_t *obj, const char *prefix, GError **errp)
{
    const char *name;
    json_t *value;
    json_object_foreach(obj, name, value) {
        g_autofree char *path = g_strconcat(prefix, name, NULL);
        json_t *final = finish_member(value, path, errp);
        if (!final) {
            return false;
        }
        /* Replacing the value of a key that exists keeps the iteration valid. */
        json_object_set_new_nocheck(obj, name, final);
    }
    return true;
}

json_t *qb_opts_unflatten(const json_t *flat, GError **errp)
{
    g_autoptr(json_t) root = json_object();
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)flat, key, value) {
        /* A copy: an empty object of the flat form must not become a place to put members. */
        g_autoptr(json_t) copy = json_deep_copy(value);
        if (!put_nested(root, key, copy, errp)) {
            return NULL;
        }
    }
    return make_arrays(root, "", errp) ? g_steal_pointer(&root) : NULL;
}

/* ---- prefixes and defaults ---- */

/* What follows "prefix." in @key, NULL when it does not start so. */
static const char *behind_prefix(const char *key, const char *prefix)
{
    size_t len = strlen(prefix);
    return strncmp(key, prefix, len) == 0 && key[len] == '.' ? key + len + 1 : NULL;
}

json_t *qb_opts_take_prefix(json_t *opts, const char *prefix)
{
    json_t *taken = json_object();
    const char *key;
    json_t *value;
    void *next;
    json_object_foreach_safe(opts, next, key, value) {
        const char *rest = behind_prefix(key, prefix);
        if (rest) {
            json_object_set_nocheck(taken, rest, value);
            json_object_del(opts, key);
        }
    }
    return taken;
}

bool qb_opts_has_prefix(const json_t *opts, const char *prefix)
{
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)opts, key, value) {
        if (behind_prefix(key, prefix)) {
            return true;
        }
    }
    return false;
}

void qb_opts_set_defaults(json_t *dst, const json_t *src)
{
    json_object_update_missing(dst, (json_t *)src);
}

/* ---- taking values ---- */

/* Removes @key and returns its value (new reference), NULL when absent. */
static json_t *take(json_t *opts, const char *key)
{
    json_t *value = json_incref(json_object_get(opts, key));
    if (value) {
        json_object_del(opts, key);
    }
    return value;
}

/* The text of a scalar value, newly allocated; NULL for an object, an array, null. */
static char *scalar_text(const json_t *value)
{
    switch (json_typeof(value)) {
    case JSON_STRING:
        return g_strdup(json_string_value(value));
    case JSON_INTEGER:
        return g_strdup_printf("%" JSON_INTEGER_FORMAT, json_integer_value(value));
    case JSON_REAL: {
        char buf[G_ASCII_DTOSTR_BUF_SIZE];
        return g_strdup(g_ascii_dtostr(buf, sizeof(buf), json_real_value(value)));
    }
    case JSON_TRUE:
        return g_strdup("on");
    case JSON_FALSE:
        return g_strdup("off");
    default:
        return NULL;
    }
}

static bool parse_bool(const json_t *value, bool *ret)
{
    static const char *const on[] = {"on", "yes", "true", "y", NULL};
    static const char *const off[] = {"off", "no", "false", "n", NULL};
    if (json_is_boolean(value)) {
        *ret = json_is_true(value);
        return true;
    }
    const char *text = json_string_value(value);
    if (text && g_strv_contains(on, text)) {
        *ret = true;
        return true;
    }
    if (text && g_strv_contains(off, text)) {
        *ret = false;
        return true;
    }
    return false;
}

bool qb_opt_take_bool(json_t *opts, const char *key, bool def, bool *ret, GError **errp)
{
    g_autoptr(json_t) value = take(opts, key);
    if (!value) {
        *ret = def;
        return true;
    }
    if (!parse_bool(value, ret)) {
        qb_error_set(errp, EINVAL, "Parameter '%s' expects 'on' or 'off'", key);
        return false;
    }
    return true;
}

/* The number in a string or an integer value: 0, -EINVAL or -ERANGE. */
static int parse_number(const json_t *value, int (*parse)(const char *, uint64_t *), uint64_t *ret)
{
    if (json_is_integer(value) || json_is_string(value)) {
        g_autofree char *text = scalar_text(value);
        return parse(text, ret);
    }
    return -EINVAL;
}

static int parse_size(const char *text, uint64_t *ret)
{
    return qb_size_parse(text, 'b', ret);
}

static bool is_negative(const json_t *value)
{
    const char *text = json_string_value(value);
    return json_integer_value(value) < 0 || (text && strchr(text, '-'));
}

bool qb_opt_take_uint(json_t *opts, const char *key, uint64_t def, uint64_t *ret, GError **errp)
{
    g_autoptr(json_t) value = take(opts, key);
    if (!value) {
        *ret = def;
        return true;
    }
    int rc = parse_number(value, qb_uint_parse, ret);
    if (rc == -ERANGE && !is_negative(value)) {
        qb_error_set(errp, ERANGE, "Value '%s' is too large for parameter '%s'",
                     json_string_value(value), key);
    } else if (rc < 0) {
        qb_error_set(errp, EINVAL, "Parameter '%s' expects a number", key);
    }
    return rc == 0;
}

bool qb_opt_take_size(json_t *opts, const char *key, uint64_t def, uint64_t *ret, GError **errp)
{
    g_autoptr(json_t) value = take(opts, key);
    if (!value) {
        *ret = def;
        return true;
    }
    int rc = parse_number(value, parse_size, ret);
    if (rc == -ERANGE && !is_negative(value)) {
        qb_error_set(errp, ERANGE, "Value '%s' is out of range for parameter '%s'",
                     json_string_value(value), key);
    } else if (rc < 0) {
        qb_error_set(errp, EINVAL, "Parameter '%s' expects a size", key);
        qb_error_add_hint(errp, "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, "
                                "tera-, peta-\nand exabytes, respectively.");
    }
    return rc == 0;
}

char *qb_opt_take_string(json_t *opts, const char *key)
{
    json_t *value = json_object_get(opts, key);
    char *text = value ? scalar_text(value) : NULL;
    if (text) {
        json_object_del(opts, key);
    }
    return text;
}

bool qb_opt_take_enum(json_t *opts, const char *key, const char *const *names, int def, int *ret,
                      GError **errp)
{
    g_autoptr(json_t) value = take(opts, key);
    if (!value) {
        *ret = def;
        return true;
    }
    g_autofree char *text = scalar_text(value);
    if (!text) {
        qb_error_set(errp, EINVAL, "Invalid parameter type for '%s', expected: string", key);
        return false;
    }
    for (int i = 0; names[i]; i++) {
        if (strcmp(names[i], text) == 0) {
            *ret = i;
            return true;
        }
    }
    qb_error_set(errp, EINVAL, "Parameter '%s' does not accept value '%s'", key, text);
    return false;
}

const char *qb_opt_peek_string(const json_t *opts, const char *key)
{
    return json_string_value(json_object_get(opts, key));
}

/* ---- descriptions ---- */

static int compare_lines(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static char *describe_one(const QbOptDesc *desc)
{
    static const char *const types[] = {
        [QB_OPT_STRING] = "str",
        [QB_OPT_BOOL] = "bool (on/off)",
        [QB_OPT_NUMBER] = "num",
        [QB_OPT_SIZE] = "size",
    };
    g_autofree char *head = g_strdup_printf("%s=<%s>", desc->name, types[desc->type]);
    return desc->help ? g_strdup_printf("  %-22s - %s\n", head, desc->help)
                      : g_strdup_printf("  %s\n", head);
}

char *qb_opts_describe(const QbOptDesc *table)
{
    g_autoptr(GPtrArray) lines = g_ptr_array_new_with_free_func(g_free);
    for (const QbOptDesc *desc = table; desc->name; desc++) {
        g_ptr_array_add(lines, describe_one(desc));
    }
    qsort(lines->pdata, lines->len, sizeof(gpointer), compare_lines);
    g_ptr_array_add(lines, NULL);
    return g_strjoinv("", (char **)lines->pdata);
}

const QbOptDesc *qb_opts_find(const QbOptDesc *table, const char *name)
{
    for (const QbOptDesc *desc = table; desc->name; desc++) {
        if (strcmp(desc->name, name) == 0) {
            return desc;
        }
    }
    return NULL;
}
