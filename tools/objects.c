/*
 * --object of the tools: secrets, TLS credentials, throttle groups, threads.
 *
 * Nothing here uses such objects yet, so a definition has no effect.  Its syntax is judged all the
 * same: a typing error must not pass as a definition.
 *
 * SPDX-License-Identifier: MIT
 */
#include "tools/objects.h"
#include "util/error.h"
#include "util/options.h"

static bool check_object(const char *definition, GError **errp)
{
    static const char *const needed[] = {"qom-type", "id"};
    g_autoptr(json_t) opts = qb_opts_parse(definition, "qom-type", errp);

    for (size_t i = 0; opts && i < G_N_ELEMENTS(needed); i++) {
        if (!json_object_get(opts, needed[i])) {
            qb_error_set(errp, EINVAL, "Parameter '%s' is missing", needed[i]);
            return false;
        }
    }
    return opts != NULL;
}

bool tool_check_objects(const GPtrArray *definitions, GError **errp)
{
    for (guint i = 0; definitions && i < definitions->len; i++) {
        if (!check_object(g_ptr_array_index(definitions, i), errp)) {
            return false;
        }
    }
    return true;
}
