/*
 * --object of the tools.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef TOOLS_OBJECTS_H
#define TOOLS_OBJECTS_H

#include <stdbool.h>
#include <glib.h>

/* Judges the definitions "type,id=...,..." of @definitions (const char *; may be NULL). */
bool tool_check_objects(const GPtrArray *definitions, GError **errp);

#endif
