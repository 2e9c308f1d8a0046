/*
 * JSON text as users of block tools write it: strings in double or single quotes.
 *
 *   json:{'driver': 'qcow2', 'x': 'a "b" \'c\''}      what a shell likes
 *         |  rewrite() turns quotes, one string at a time
 *         v
 *        {"driver": "qcow2", "x": "a \"b\" 'c'"}      what jansson reads
 *
 * Outside of strings nothing is changed.  Inside, only quotes and their escapes are; all else,
 * \uXXXX and wrong escapes too, is left to jansson.
 *
 * Invariants
 *  1. Text without single quotes is handed on byte by byte.
 *  2. The rewritten text of a longer piece of the user's text is never shorter, so the place of an
 *     error in the rewritten text is found in the user's text by trying lengths.
 *  3. A string that is not closed stays open in the rewritten text: jansson refuses it.
 *
 * Not done: no other extension (comments, trailing commas, unquoted keys).
 *
 * SPDX-License-Identifier: MIT
 */
#include "util/options.h"
#include "util/error.h"

#include <string.h>

/* Copies one piece of a string (a character or an escape) and returns what follows it. */
static const char *rewrite_piece(GString *out, const char *p, char quote)
{
    if (p[0] == '\\' && p[1] == '\'') {
        g_string_append_c(out, '\'');
        return p + 2;
    }
    if (p[0] == '\\' && p[1]) {
        g_string_append_len(out, p, 2);
        return p + 2;
    }
    if (p[0] == '"' && quote == '\'') {
        g_string_append_c(out, '\\');
    }
    g_string_append_c(out, p[0]);
    return p + 1;
}

/* Copies the string that starts with the quote at @p; returns what follows its end. */
static const char *rewrite_string(GString *out, const char *p)
{
    char quote = *p++;
    g_string_append_c(out, '"');
    while (*p && *p != quote) {
        p = rewrite_piece(out, p, quote);
    }
    if (*p) {
        g_string_append_c(out, '"');
        p++;
    }
    return p;
}

static GString *rewrite(const char *text)
{
    GString *out = g_string_sized_new(strlen(text) + 1);
    for (const char *p = text; *p;) {
        if (*p == '"' || *p == '\'') {
            p = rewrite_string(out, p);
        } else {
            g_string_append_c(out, *p++);
        }
    }
    return out;
}

/* The position in @text whose rewriting ends at @position of the rewritten text. */
static size_t original_position(const char *text, size_t position)
{
    size_t low = 0, high = strlen(text);
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        g_autofree char *head = g_strndup(text, middle);
        GString *out = rewrite(head);
        size_t len = out->len;
        g_string_free(out, TRUE);
        if (len < position) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

static void set_parse_error(GError **errp, const char *text, const json_error_t *error)
{
    size_t at = original_position(text, error->position > 0 ? (size_t)error->position : 0);
    qb_error_set(errp, EINVAL, "JSON parse error at position %zu: %s", at, error->text);
}

json_t *qb_json_parse_object(const char *text, GError **errp)
{
    GString *strict = rewrite(text);
    json_error_t error;
    json_t *root = json_loadb(strict->str, strict->len,
                              JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, &error);
    g_string_free(strict, TRUE);
    if (!root) {
        set_parse_error(errp, text, &error);
        return NULL;
    }
    if (!json_is_object(root)) {
        json_decref(root);
        qb_error_set(errp, EINVAL, "Invalid JSON object given");
        return NULL;
    }
    return root;
}
