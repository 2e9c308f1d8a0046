/*
 * JSON and facts on stdout, as users of the tools know them.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef TOOLS_OUTPUT_H
#define TOOLS_OUTPUT_H

#include <jansson.h>

/* Pretty JSON, 4 spaces, empty lists over two lines, newline at the end. */
void tool_print_json(const json_t *value);
/* The same as a string without the newline. Newly allocated. */
char *tool_json_text(const json_t *value);
/* Nested facts for people: "key: value", dashes as spaces, lists as "[0]:"; @indent levels of four
 * blanks. NULL prints nothing. */
void tool_print_facts(const json_t *value, unsigned indent);

#endif
