/*
 * Fuzz target: option strings and json: names, in every spelling.
 *
 * What has been nested and flattened must survive that a second time. (The first time an empty object
 * may go: "a": {} beside "a.b".)
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdlib.h>
#include <string.h>
#include "tests/fuzz/fuzz.h"
#include "util/options.h"
#include "util/size.h"

static void take_all_kinds(const json_t *options)
{
    g_autoptr(json_t) copy = json_deep_copy(options);
    uint64_t number;
    bool flag;
    qb_opt_take_bool(copy, "a", false, &flag, NULL);
    qb_opt_take_size(copy, "size", 0, &number, NULL);
    qb_opt_take_uint(copy, "b", 0, &number, NULL);
    g_free(qb_opt_take_string(copy, "file.filename"));
    json_decref(qb_opts_take_prefix(copy, "file"));
}

static json_t *nest_and_flatten(const json_t *flat)
{
    g_autoptr(json_t) nested = qb_opts_unflatten(flat, NULL);
    return nested ? qb_opts_flatten(nested) : NULL;
}

static void round_trip(const json_t *flat)
{
    g_autoptr(json_t) once = nest_and_flatten(flat);
    if (once) {
        g_autoptr(json_t) twice = nest_and_flatten(once);
        if (!json_equal(once, twice)) {
            abort();
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    g_autofree char *text = g_strndup((const char *)data, size);
    g_autoptr(json_t) options = qb_opts_parse(text, "filename", NULL);
    if (options) {
        take_all_kinds(options);
        round_trip(options);
    }
    g_autoptr(json_t) object = qb_json_parse_object(text, NULL);
    if (object) {
        g_autoptr(json_t) flat = qb_opts_flatten(object);
        take_all_kinds(flat);
        round_trip(flat);
    }
    return 0;
}

void fuzz_seeds(void (*add)(const void *data, size_t size))
{
    static const char *const texts[] = {
        "driver=qcow2,file.filename=a,,b,size=1.5G,a=on",
        "a,b=0x10,servers.0.host=x,servers.1.host=y",
        "{\"driver\":\"qcow2\",\"file\":{\"filename\":\"a\\u00e9\",\"x\":[1,2,{\"y\":null}]}}",
        "{'driver':'raw','file':{'driver':'file','filename':'it\\'s'},'a':true,'b':-1,'size':1e3}",
        "{'a.b':1,'a':{'b':2},'c':{},'d':[]}",
    };
    for (size_t i = 0; i < G_N_ELEMENTS(texts); i++) {
        add(texts[i], strlen(texts[i]));
    }
}
