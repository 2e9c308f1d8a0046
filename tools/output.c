/*
 * JSON and facts as users of the tools know them.
 *
 * JSON: 4 spaces a level, one member a line, an empty list over two lines (scripts compare text).
 * Facts for people: the same tree as "key: value" lines with dashes shown as spaces.
 *
 * Invariant: members are printed in the order in which they were put in; jansson keeps it.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <glib.h>
#include "tools/output.h"
#include "util/options.h"

static void append_value(GString *out, const json_t *value, unsigned level);

static void append_newline(GString *out, unsigned level)
{
    g_string_append_printf(out, "\n%*s", (int)(4 * level), "");
}

/* jansson escapes a bare string for us. */
static void append_string(GString *out, const json_t *string)
{
    char *text = json_dumps(string, JSON_ENCODE_ANY);

    g_string_append(out, text ? text : "null");
    free(text);
}

static void append_object(GString *out, const json_t *object, unsigned level)
{
    const char *separator = "", *key;
    json_t *value;

    g_string_append_c(out, '{');
    json_object_foreach((json_t *)object, key, value) {
        g_autoptr(json_t) name = json_string(key);
        g_string_append(out, separator);
        append_newline(out, level + 1);
        append_string(out, name);
        g_string_append(out, ": ");
        append_value(out, value, level + 1);
        separator = ",";
    }
    append_newline(out, level);
    g_string_append_c(out, '}');
}

static void append_array(GString *out, const json_t *array, unsigned level)
{
    size_t i;
    json_t *value;

    g_string_append_c(out, '[');
    json_array_foreach((json_t *)array, i, value) {
        g_string_append(out, i ? "," : "");
        append_newline(out, level + 1);
        append_value(out, value, level + 1);
    }
    append_newline(out, level);
    g_string_append_c(out, ']');
}

static void append_value(GString *out, const json_t *value, unsigned level)
{
    if (json_is_object(value)) {
        append_object(out, value, level);
    } else if (json_is_array(value)) {
        append_array(out, value, level);
    } else {
        append_string(out, value);
    }
}

char *tool_json_text(const json_t *value)
{
    GString *out = g_string_new(NULL);

    append_value(out, value, 0);
    return g_string_free(out, FALSE);
}

void tool_print_json(const json_t *value)
{
    g_autofree char *text = tool_json_text(value);

    printf("%s\n", text);
}

static void print_scalar(const json_t *value)
{
    if (json_is_string(value)) {
        printf(" %s\n", json_string_value(value));
    } else if (json_is_integer(value)) {
        printf(" %" JSON_INTEGER_FORMAT "\n", json_integer_value(value));
    } else if (json_is_boolean(value)) {
        printf(" %s\n", json_is_true(value) ? "true" : "false");
    } else {
        printf("\n");
    }
}

static bool is_composite(const json_t *value)
{
    return json_is_object(value) || json_is_array(value);
}

static void print_member(const char *label, const json_t *value, unsigned indent)
{
    printf("%*s%s:", (int)(4 * indent), "", label);
    if (is_composite(value)) {
        printf("\n");
        tool_print_facts(value, indent + 1);
    } else {
        print_scalar(value);
    }
}

static void print_list(const json_t *array, unsigned indent)
{
    size_t i;
    json_t *value;

    json_array_foreach((json_t *)array, i, value) {
        g_autofree char *label = g_strdup_printf("[%zu]", i);
        print_member(label, value, indent);
    }
}

void tool_print_facts(const json_t *value, unsigned indent)
{
    const char *key;
    json_t *member;

    if (json_is_array(value)) {
        print_list(value, indent);
        return;
    }
    json_object_foreach((json_t *)value, key, member) {
        g_autofree char *label = g_strdelimit(g_strdup(key), "-", ' ');
        print_member(label, member, indent);
    }
}
