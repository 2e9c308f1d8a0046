/*
 * --object of the tools: secrets, TLS credentials, throttle groups, threads.
 *
 * Nothing here uses such objects yet, so a definition has no effect.  Its syntax and type
 * are judged all the same: a typing error must not pass as a definition.
 *
 * SPDX-License-Identifier: MIT
 */
#include "tools/objects.h"
#include "util/error.h"
#include "util/options.h"

static const char *const known_types[] = {
    "authz-list", "authz-list-file", "authz-simple", "iothread", "main-loop", "pr-manager-helper",
    "secret", "secret_keyring", "throttle-group", "tls-cipher-suites", "tls-creds-anon",
    "tls-creds-psk", "tls-creds-x509", NULL};

static bool check_object(const char *definition, GError **errp)
{
    g_autoptr(json_t) opts = qb_opts_parse(definition, "qom-type", errp);
    const char *type = opts ? qb_opt_peek_string(opts, "qom-type") : NULL;

    if (!opts) {
        return false;
    }
    if (!type) {
        qb_error_set(errp, EINVAL, "Parameter 'qom-type' is missing");
        return false;
    }
    if (!g_strv_contains(known_types, type)) {
        qb_error_set(errp, EINVAL, "Parameter 'qom-type' does not accept value '%s'", type);
        return false;
    }
    if (!json_object_get(opts, "id")) {
        qb_error_set(errp, EINVAL, "Parameter 'id' is missing");
        return false;
    }
    return true;
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
