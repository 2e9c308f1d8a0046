/*
 * Options: every spelling of them, what consumers take, and the texts of their errors.
 *
 * SPDX-License-Identifier: MIT
 */
#include "util/options.h"
#include "util/error.h"

#include <string.h>

static char *dump(const json_t *obj)
{
    char *text = json_dumps(obj, JSON_SORT_KEYS | JSON_COMPACT);
    char *copy = g_strdup(text);
    free(text);
    return copy;
}

static void check_json(const json_t *obj, const char *expected)
{
    g_assert_nonnull(obj);
    g_autofree char *text = dump(obj);
    g_assert_cmpstr(text, ==, expected);
}

static json_t *from_text(const char *text)
{
    GError *err = NULL;
    json_t *obj = qb_json_parse_object(text, &err);
    g_assert_no_error(err);
    return obj;
}

/* ---- key=value ---- */

static void test_parse(void)
{
    static const struct {
        const char *text, *implied, *json;
    } cases[] = {
        {"", NULL, "{}"},
        {"a=1", NULL, "{\"a\":\"1\"}"},
        {"a=1,b=2", NULL, "{\"a\":\"1\",\"b\":\"2\"}"},
        {"a=1,", NULL, "{\"a\":\"1\"}"},
        {"a=", NULL, "{\"a\":\"\"}"},
        {"a=b=c", NULL, "{\"a\":\"b=c\"}"},
        {"a=x,,y,b=z", NULL, "{\"a\":\"x,y\",\"b\":\"z\"}"},
        {"a=,,", NULL, "{\"a\":\",\"}"},
        {"a=,,,b=1", NULL, "{\"a\":\",\",\"b\":\"1\"}"},
        {"a=1,a=2", NULL, "{\"a\":\"2\"}"},
        {"flag", NULL, "{\"flag\":\"on\"}"},
        {"noflag,b=1", NULL, "{\"b\":\"1\",\"noflag\":\"on\"}"},
        {"x.img", "file", "{\"file\":\"x.img\"}"},
        {"x,,y.img,b=1", "file", "{\"b\":\"1\",\"file\":\"x,y.img\"}"},
        {"file=x", "file", "{\"file\":\"x\"}"},
        {"b=1,x.img", "file", "{\"b\":\"1\",\"x.img\":\"on\"}"},
        {"file.driver=file,file.filename=a b", NULL,
         "{\"file.driver\":\"file\",\"file.filename\":\"a b\"}"},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        g_autoptr(GError) err = NULL;
        g_autoptr(json_t) opts = qb_opts_parse(cases[i].text, cases[i].implied, &err);
        g_assert_no_error(err);
        check_json(opts, cases[i].json);
    }
}

static void test_parse_errors(void)
{
    static const char *const bad[] = {"=x", ",", "a=1,=2", ",a=1", "a=1,b,,c=2"};
    for (size_t i = 0; i < G_N_ELEMENTS(bad); i++) {
        g_autoptr(GError) err = NULL;
        g_assert_null(qb_opts_parse(bad[i], NULL, &err));
        g_assert_error(err, QB_ERROR, EINVAL);
        g_assert_cmpstr(err->message, ==, "Invalid parameter ''");
    }
}

/* File names are bytes. */
static void test_parse_not_utf8(void)
{
    g_autoptr(json_t) opts = qb_opts_parse("filename=/tmp/\xff\xfe.img", NULL, NULL);
    g_assert_nonnull(opts);
    g_autofree char *name = qb_opt_take_string(opts, "filename");
    g_assert_cmpstr(name, ==, "/tmp/\xff\xfe.img");
}

/* ---- JSON ---- */

static void test_json_quotes(void)
{
    static const struct {
        const char *text, *json;
    } cases[] = {
        {"{}", "{}"},
        {" { } ", "{}"},
        {"{\"a\": \"b\"}", "{\"a\":\"b\"}"},
        {"{'a': 'b'}", "{\"a\":\"b\"}"},
        {"{'a': \"b\", \"c\": 'd'}", "{\"a\":\"b\",\"c\":\"d\"}"},
        {"{'a': 'say \"x\"'}", "{\"a\":\"say \\\"x\\\"\"}"},
        {"{\"a\": \"it's\"}", "{\"a\":\"it's\"}"},
        {"{'a': 'it\\'s'}", "{\"a\":\"it's\"}"},
        {"{\"a\": \"it\\'s\"}", "{\"a\":\"it's\"}"},
        {"{'a': '\\\\'}", "{\"a\":\"\\\\\"}"},
        {"{'a': '\\\\\\''}", "{\"a\":\"\\\\'\"}"},
        {"{'a': '\\\"'}", "{\"a\":\"\\\"\"}"},
        {"{'a': '\\u0041\\n'}", "{\"a\":\"A\\n\"}"},
        {"{'': ''}", "{\"\":\"\"}"},
        {"{'a': [1, true, null, {'b': 1.5}]}", "{\"a\":[1,true,null,{\"b\":1.5}]}"},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        g_autoptr(json_t) obj = from_text(cases[i].text);
        check_json(obj, cases[i].json);
    }
}

static void test_json_errors(void)
{
    static const struct {
        const char *text, *message;
    } cases[] = {
        {"[1]", "Invalid JSON object given"},
        {"'x'", "Invalid JSON object given"},
        {"3", "Invalid JSON object given"},
        {"", "JSON parse error at position 0: *"},
        {"{'a': 1", "JSON parse error at position 7: *end of file*"},
        {"{'a': 1,}", "JSON parse error at position 9: *"},
        {"{'a': 'b}", "JSON parse error at position *"},
        {"{'a': 'b\\", "JSON parse error at position *"},
        {"{'a': 1} x", "JSON parse error at position *end of file expected*"},
        {"{'a': 1, 'b': 2, 'a': 3}", "JSON parse error at position *duplicate*"},
        {"{'a': {'b': 2, \"b\": 3}}", "JSON parse error at position *duplicate*"},
        {"{a: 1}", "JSON parse error at position *"},
        {"{'a': '\\u0000'}", "JSON parse error at position *"},
        {"{'a': '\xff'}", "JSON parse error at position *"},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        g_autoptr(GError) err = NULL;
        g_assert_null(qb_json_parse_object(cases[i].text, &err));
        g_assert_error(err, QB_ERROR, EINVAL);
        g_test_message("%zu: %s", i, err->message);
        g_assert_true(g_pattern_match_simple(cases[i].message, err->message));
    }
}

/* The position counts in the user's text: the escapes that rewriting adds do not shift it. */
static void test_json_error_position(void)
{
    g_autoptr(GError) plain = NULL, quoted = NULL;
    g_assert_null(qb_json_parse_object("{'a': 'xxxxxx', !}", &plain));
    g_assert_null(qb_json_parse_object("{'a': '\"\"\"\"\"\"', !}", &quoted));
    g_assert_cmpstr(plain->message, ==, quoted->message);
    g_assert_true(g_pattern_match_simple("* position 17: *", plain->message));
}

static void test_json_deep(void)
{
    GString *text = g_string_new("{'a':");
    for (int i = 0; i < 100000; i++) {
        g_string_append_c(text, '[');
    }
    g_autoptr(GError) err = NULL;
    g_assert_null(qb_json_parse_object(text->str, &err));
    g_assert_error(err, QB_ERROR, EINVAL);
    g_string_free(text, TRUE);
}

/* ---- flat and nested ---- */

static void test_flatten(void)
{
    static const struct {
        const char *nested, *flat;
    } cases[] = {
        {"{}", "{}"},
        {"{'a':1}", "{\"a\":1}"},
        {"{'a':{'b':{'c':'x'}},'d':true}", "{\"a.b.c\":\"x\",\"d\":true}"},
        {"{'s':[{'host':'a'},{'host':'b'}]}", "{\"s.0.host\":\"a\",\"s.1.host\":\"b\"}"},
        {"{'a':{},'b':[],'c':null,'d':{'e':{}}}", "{\"a\":{},\"b\":[],\"c\":null,\"d.e\":{}}"},
        {"{'file.driver':'file','file':{'filename':'x'}}",
         "{\"file.driver\":\"file\",\"file.filename\":\"x\"}"},
        {"{'a.b':1,'a':{'b':2}}", "{\"a.b\":1}"},
        {"{'a':{'b':2},'a.b':1}", "{\"a.b\":1}"},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        g_autoptr(json_t) nested = from_text(cases[i].nested);
        g_autoptr(json_t) flat = qb_opts_flatten(nested);
        check_json(flat, cases[i].flat);
    }
}

static void test_unflatten(void)
{
    static const struct {
        const char *flat, *nested;
    } cases[] = {
        {"{}", "{}"},
        {"{'a.b.c':'x','d':true}", "{\"a\":{\"b\":{\"c\":\"x\"}},\"d\":true}"},
        {"{'s.1.host':'b','s.0.host':'a'}", "{\"s\":[{\"host\":\"a\"},{\"host\":\"b\"}]}"},
        {"{'m.0.0':1,'m.0.1':2,'m.1.0':3}", "{\"m\":[[1,2],[3]]}"},
        {"{'0':'x'}", "{\"0\":\"x\"}"},
        {"{'a.00':1}", "{\"a\":{\"00\":1}}"},
        {"{'a':{},'a.b':1}", "{\"a\":{\"b\":1}}"},
        {"{'a.b':1,'a':{}}", "{\"a\":{\"b\":1}}"},
        {"{'a':{},'b':[],'c':null}", "{\"a\":{},\"b\":[],\"c\":null}"},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        g_autoptr(GError) err = NULL;
        g_autoptr(json_t) flat = from_text(cases[i].flat);
        g_autofree char *before = dump(flat);
        g_autoptr(json_t) nested = qb_opts_unflatten(flat, &err);
        g_assert_no_error(err);
        check_json(nested, cases[i].nested);
        check_json(flat, before); /* the source is untouched */
    }
}

static void test_unflatten_errors(void)
{
    static const struct {
        const char *flat, *message;
    } cases[] = {
        {"{'a':1,'a.b':2}", "Parameters 'a' and 'a.b' cannot be used together"},
        {"{'a.b':2,'a':1}", "Parameters 'a' and 'a.*' cannot be used together"},
        {"{'x.a':1,'x.a.b.c':2}", "Parameters 'x.a' and 'x.a.b.c' cannot be used together"},
        {"{'s.0':1,'s.2':2}", "Parameter 's.1' missing"},
        {"{'x.s.1':2}", "Parameter 'x.s.0' missing"},
        {"{'s.0':1,'s.host':2}", "Parameters 's.*' mix list and non-list names"},
        {"{'a..b':1}", "Invalid parameter 'a..b'"},
        {"{'.a':1}", "Invalid parameter '.a'"},
        {"{'a.':1}", "Invalid parameter 'a.'"},
        {"{'':1}", "Invalid parameter ''"},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        g_autoptr(GError) err = NULL;
        g_autoptr(json_t) flat = from_text(cases[i].flat);
        g_assert_null(qb_opts_unflatten(flat, &err));
        g_assert_error(err, QB_ERROR, EINVAL);
        g_assert_cmpstr(err->message, ==, cases[i].message);
    }
}

static void test_unflatten_too_deep(void)
{
    GString *key = g_string_new("a");
    for (int i = 0; i < 50000; i++) {
        g_string_append(key, ".a");
    }
    g_autoptr(json_t) flat = json_object();
    json_object_set_new(flat, key->str, json_true());
    g_autoptr(GError) err = NULL;
    g_assert_null(qb_opts_unflatten(flat, &err));
    g_assert_error(err, QB_ERROR, EINVAL);
    g_string_free(key, TRUE);
}

static void test_prefix(void)
{
    g_autoptr(json_t) opts = from_text("{'file.driver':'a','file.x.y':1,'file':'ref',"
                                       "'filename':'b','driver':'c'}");
    g_assert_true(qb_opts_has_prefix(opts, "file"));
    g_assert_true(qb_opts_has_prefix(opts, "file.x"));
    g_assert_false(qb_opts_has_prefix(opts, "driver"));
    g_assert_false(qb_opts_has_prefix(opts, "fil"));
    g_autoptr(json_t) file = qb_opts_take_prefix(opts, "file");
    check_json(file, "{\"driver\":\"a\",\"x.y\":1}");
    check_json(opts, "{\"driver\":\"c\",\"file\":\"ref\",\"filename\":\"b\"}");
    g_assert_false(qb_opts_has_prefix(opts, "file"));
    g_autoptr(json_t) none = qb_opts_take_prefix(opts, "file");
    check_json(none, "{}");
}

static void test_defaults(void)
{
    g_autoptr(json_t) dst = from_text("{'a':1}");
    g_autoptr(json_t) src = from_text("{'a':2,'b':3}");
    qb_opts_set_defaults(dst, src);
    check_json(dst, "{\"a\":1,\"b\":3}");
    check_json(src, "{\"a\":2,\"b\":3}");
}

/* ---- taking ---- */

/* One try: the value given to a taking function, and what comes of it. */
typedef struct TakeCase {
    const char *value;   /* as JSON */
    const char *message; /* NULL: it is accepted */
    uint64_t expected;
} TakeCase;

#define NOT_BOOL "Parameter 'x' expects 'on' or 'off'"
#define NOT_NUMBER "Parameter 'x' expects a number"
#define NOT_SIZE                                                                                   \
    "Parameter 'x' expects a size\n"                                                               \
    "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"                 \
    "and exabytes, respectively."

static bool take_bool(json_t *opts, uint64_t *ret, GError **errp)
{
    bool b = *ret;
    bool ok = qb_opt_take_bool(opts, "x", true, &b, errp);
    *ret = b;
    return ok;
}

static bool take_uint(json_t *opts, uint64_t *ret, GError **errp)
{
    return qb_opt_take_uint(opts, "x", 77, ret, errp);
}

static bool take_size(json_t *opts, uint64_t *ret, GError **errp)
{
    return qb_opt_take_size(opts, "x", 77, ret, errp);
}

static bool take_enum(json_t *opts, uint64_t *ret, GError **errp)
{
    static const char *const names[] = {"off", "on", "unmap", "3", NULL};
    int i = (int)*ret;
    bool ok = qb_opt_take_enum(opts, "x", names, 2, &i, errp);
    *ret = (uint64_t)i;
    return ok;
}

static void check_takes(bool (*take)(json_t *, uint64_t *, GError **), const TakeCase *cases,
                        size_t n, uint64_t def)
{
    uint64_t ret = 0;
    g_autoptr(json_t) none = json_object();
    g_assert_true(take(none, &ret, NULL));
    g_assert_cmpuint(ret, ==, def);
    for (size_t i = 0; i < n; i++) {
        g_autofree char *text = g_strdup_printf("{'x': %s, 'y': 1}", cases[i].value);
        g_autoptr(json_t) opts = from_text(text);
        g_autoptr(GError) err = NULL;
        ret = 1;
        bool ok = take(opts, &ret, &err);
        g_test_message("%s: %s", text, err ? err->message : "taken");
        g_assert_cmpstr(err ? err->message : NULL, ==, cases[i].message);
        g_assert_cmpint(ok, ==, err == NULL);
        g_assert_cmpuint(ret, ==, ok ? cases[i].expected : 1);
        check_json(opts, "{\"y\":1}");
    }
}

static void test_take_bool(void)
{
    static const TakeCase cases[] = {
        {"true", NULL, 1},     {"false", NULL, 0},      {"'on'", NULL, 1},
        {"'off'", NULL, 0},    {"'yes'", NULL, 1},      {"'no'", NULL, 0},
        {"'true'", NULL, 1},   {"'false'", NULL, 0},    {"'y'", NULL, 1},
        {"'n'", NULL, 0},      {"'maybe'", NOT_BOOL, 0}, {"''", NOT_BOOL, 0},
        {"'ON'", NOT_BOOL, 0}, {"1", NOT_BOOL, 0},      {"null", NOT_BOOL, 0},
        {"{}", NOT_BOOL, 0},   {"[]", NOT_BOOL, 0},
    };
    check_takes(take_bool, cases, G_N_ELEMENTS(cases), true);
}

static void test_take_uint(void)
{
    static const TakeCase cases[] = {
        {"16", NULL, 16},
        {"0", NULL, 0},
        {"'16'", NULL, 16},
        {"'0x10'", NULL, 16},
        {"'18446744073709551615'", NULL, UINT64_MAX},
        {"9223372036854775807", NULL, INT64_MAX},
        {"'99999999999999999999'",
         "Value '99999999999999999999' is too large for parameter 'x'", 0},
        {"-1", NOT_NUMBER, 0},
        {"'-1'", NOT_NUMBER, 0},
        {"'-99999999999999999999'", NOT_NUMBER, 0},
        {"'16k'", NOT_NUMBER, 0},
        {"'x'", NOT_NUMBER, 0},
        {"''", NOT_NUMBER, 0},
        {"1.5", NOT_NUMBER, 0},
        {"true", NOT_NUMBER, 0},
        {"{}", NOT_NUMBER, 0},
    };
    check_takes(take_uint, cases, G_N_ELEMENTS(cases), 77);
}

static void test_take_size(void)
{
    static const TakeCase cases[] = {
        {"65536", NULL, 65536},
        {"'64k'", NULL, 65536},
        {"'1.5M'", NULL, 1572864},
        {"'0x200'", NULL, 512},
        {"'9223372036854775807'", NULL, INT64_MAX},
        {"'9223372036854775808'",
         "Value '9223372036854775808' is out of range for parameter 'x'", 0},
        {"'99999E'", "Value '99999E' is out of range for parameter 'x'", 0},
        {"-5", NOT_SIZE, 0},
        {"'-5'", NOT_SIZE, 0},
        {"'xx'", NOT_SIZE, 0},
        {"1.5", NOT_SIZE, 0},
        {"null", NOT_SIZE, 0},
        {"[]", NOT_SIZE, 0},
    };
    check_takes(take_size, cases, G_N_ELEMENTS(cases), 77);
}

static void test_take_enum(void)
{
    static const TakeCase cases[] = {
        {"'off'", NULL, 0},
        {"'on'", NULL, 1},
        {"'unmap'", NULL, 2},
        {"false", NULL, 0},
        {"true", NULL, 1},
        {"3", NULL, 3},
        {"'0.11'", "Parameter 'x' does not accept value '0.11'", 0},
        {"''", "Parameter 'x' does not accept value ''", 0},
        {"{}", "Invalid parameter type for 'x', expected: string", 0},
    };
    check_takes(take_enum, cases, G_N_ELEMENTS(cases), 2);
}

static void test_take_string(void)
{
    static const struct {
        const char *value, *text;
    } cases[] = {
        {"'abc'", "abc"}, {"''", ""},        {"12", "12"},  {"-3", "-3"},
        {"1.5", "1.5"},   {"true", "on"},    {"false", "off"},
        {"null", NULL},   {"{'a':1}", NULL}, {"[1]", NULL},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        g_autofree char *text = g_strdup_printf("{'x': %s}", cases[i].value);
        g_autoptr(json_t) opts = from_text(text);
        g_autofree char *value = qb_opt_take_string(opts, "x");
        g_assert_cmpstr(value, ==, cases[i].text);
        /* What is no string stays, to be named as left over. */
        g_assert_cmpuint(json_object_size(opts), ==, value ? 0 : 1);
        g_assert_null(qb_opt_take_string(opts, "y"));
    }
}

static void test_peek_string(void)
{
    g_autoptr(json_t) opts = from_text("{'x':'abc','n':1}");
    g_assert_cmpstr(qb_opt_peek_string(opts, "x"), ==, "abc");
    g_assert_null(qb_opt_peek_string(opts, "n"));
    g_assert_null(qb_opt_peek_string(opts, "z"));
    g_assert_cmpuint(json_object_size(opts), ==, 2);
}

/* ---- descriptions ---- */

static const QbOptDesc descriptions[] = {
    {"size", QB_OPT_SIZE, "Virtual disk size", NULL},
    {"cluster_size", QB_OPT_SIZE, "qcow2 cluster size", "65536"},
    {"extended_l2", QB_OPT_BOOL, "Extended L2 tables", "off"},
    {"encrypt.cipher-alg", QB_OPT_STRING, "Name of encryption cipher algorithm", NULL},
    {"refcount_bits", QB_OPT_NUMBER, NULL, NULL},
    {NULL},
};

static void test_describe(void)
{
    g_autofree char *text = qb_opts_describe(descriptions);
    g_assert_cmpstr(text, ==,
                    "  cluster_size=<size>    - qcow2 cluster size\n"
                    "  encrypt.cipher-alg=<str> - Name of encryption cipher algorithm\n"
                    "  extended_l2=<bool (on/off)> - Extended L2 tables\n"
                    "  refcount_bits=<num>\n"
                    "  size=<size>            - Virtual disk size\n");
}

static void test_find(void)
{
    g_assert_true(qb_opts_find(descriptions, "extended_l2") == &descriptions[2]);
    g_assert_null(qb_opts_find(descriptions, "bogus"));
    g_assert_null(qb_opts_find(descriptions, ""));
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/options/parse", test_parse);
    g_test_add_func("/options/parse-errors", test_parse_errors);
    g_test_add_func("/options/parse-not-utf8", test_parse_not_utf8);
    g_test_add_func("/options/flatten", test_flatten);
    g_test_add_func("/options/unflatten", test_unflatten);
    g_test_add_func("/options/unflatten-errors", test_unflatten_errors);
    g_test_add_func("/options/unflatten-too-deep", test_unflatten_too_deep);
    g_test_add_func("/options/prefix", test_prefix);
    g_test_add_func("/options/defaults", test_defaults);
    g_test_add_func("/options/take-bool", test_take_bool);
    g_test_add_func("/options/take-uint", test_take_uint);
    g_test_add_func("/options/take-size", test_take_size);
    g_test_add_func("/options/take-enum", test_take_enum);
    g_test_add_func("/options/take-string", test_take_string);
    g_test_add_func("/options/peek-string", test_peek_string);
    g_test_add_func("/options/describe", test_describe);
    g_test_add_func("/options/find", test_find);
    g_test_add_func("/json/quotes", test_json_quotes);
    g_test_add_func("/json/errors", test_json_errors);
    g_test_add_func("/json/error-position", test_json_error_position);
    g_test_add_func("/json/deep", test_json_deep);
    return g_test_run();
}
