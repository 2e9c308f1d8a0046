/*
 * The rules of blkdebug: what happens at which event, in which state.
 *
 *   rules, in the order they were given          state
 *     [write_aio, state 1: inject EIO once]       1
 *     [l2_update, any:     state -> 2     ]
 *     [pwritev,   any:     break "A"      ]      suspended:  { "A" thread 7 }, { "B" thread 9 }
 *
 *   event ---> rules of that event and state:
 *                inject     becomes active, in place of those active before
 *                set-state  changes the state, after all rules were looked at
 *                break      suspends the thread; the rule is used up
 *   request -> the first active rule that fits: its error; "once" uses it up
 *
 * The event "none" happens once, when the node is opened: its rules are active from the start.
 *
 * Invariants
 *  1. The state begins as 1; a rule of state 0 fits every state.
 *  2. One breakpoint stops one request.
 *  3. A suspended thread is in the list exactly as long as it waits; the record is on its stack.
 *
 * Not done: "immediately" is accepted and means nothing, since no request ever returns in another
 * way than by returning.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/blkdebug-rules.h"
#include "block/block.h"
#include "util/error.h"
#include "util/options.h"
#include "util/thread.h"

#include <string.h>
#include <unistd.h>

static const char *const event_names[] = {
    "none", "l1_update", "l1_grow_alloc_table", "l1_grow_write_table", "l1_grow_activate_table",
    "l2_load", "l2_update", "l2_update_compressed", "l2_alloc_cow_read", "l2_alloc_write",
    "read_aio", "read_backing_aio", "read_compressed", "write_aio", "write_compressed",
    "vmstate_load", "vmstate_save", "cow_read", "cow_write", "reftable_load", "reftable_grow",
    "reftable_update", "refblock_load", "refblock_update", "refblock_update_part",
    "refblock_alloc", "refblock_alloc_hookup", "refblock_alloc_write",
    "refblock_alloc_write_blocks", "refblock_alloc_write_table", "refblock_alloc_switch_table",
    "cluster_alloc", "cluster_alloc_bytes", "cluster_free", "flush_to_os", "flush_to_disk",
    "pwritev_rmw_head", "pwritev_rmw_after_head", "pwritev_rmw_tail", "pwritev_rmw_after_tail",
    "pwritev", "pwritev_zero", "pwritev_done", "empty_image_prepare", "l1_shrink_write_table",
    "l1_shrink_free_l2_clusters", "cor_write", "cluster_alloc_space",
    "snapshot_write", /* the one that is ours alone */
    NULL,
};
G_STATIC_ASSERT(G_N_ELEMENTS(event_names) == 49 + 1);

static const char *const io_type_names[] = {
    [BLKDEBUG_READ] = "read",
    [BLKDEBUG_WRITE] = "write",
    [BLKDEBUG_WRITE_ZEROES] = "write-zeroes",
    [BLKDEBUG_DISCARD] = "discard",
    [BLKDEBUG_FLUSH] = "flush",
    [BLKDEBUG_BLOCK_STATUS] = "block-status",
    [BLKDEBUG_IO_TYPES] = NULL,
};
/* What a rule without "iotype" is about: everything that moves or makes stable. */
#define DEFAULT_IO_TYPES ((1u << BLKDEBUG_BLOCK_STATUS) - 1)

typedef enum Action { ACTION_INJECT, ACTION_SET_STATE, ACTION_BREAK } Action;

typedef struct Rule {
    Action action;
    int event;
    uint64_t state; /* 0: any */
    /* inject */
    bool active, once;
    unsigned io_types; /* bits */
    int error;         /* positive errno; 0 injects nothing */
    int64_t offset;    /* a byte the request must contain; -1: any request */
    /* set-state */
    uint64_t new_state;
    /* break */
    char *tag;
} Rule;

/* A thread that waits for its tag to be resumed. */
typedef struct Suspended {
    const char *tag;
    bool resumed;
} Suspended;

struct BlkdebugRules {
    QbMutex lock; /* guards all below; leaf */
    QbCond resumed;
    GPtrArray *rules;     /* Rule*, owned */
    GPtrArray *suspended; /* Suspended*, on the stacks of the threads */
    uint64_t state;
    _Atomic(unsigned) n_rules; /* length of rules, for a look without the lock */
};

static void rule_free(gpointer p)
{
    Rule *rule = p;
    g_free(rule->tag);
    g_free(rule);
}

BlkdebugRules *blkdebug_rules_new(void)
{
    BlkdebugRules *r = g_new0(BlkdebugRules, 1);
    qb_mutex_init(&r->lock);
    qb_cond_init(&r->resumed);
    r->rules = g_ptr_array_new_with_free_func(rule_free);
    r->suspended = g_ptr_array_new();
    r->state = 1;
    return r;
}

void blkdebug_rules_free(BlkdebugRules *r)
{
    if (!r) {
        return;
    }
    assert(r->suspended->len == 0);
    g_ptr_array_unref(r->rules);
    g_ptr_array_unref(r->suspended);
    qb_cond_destroy(&r->resumed);
    qb_mutex_destroy(&r->lock);
    g_free(r);
}

static int find_event(const char *name)
{
    for (int i = 0; event_names[i]; i++) {
        if (!strcmp(event_names[i], name)) {
            return i;
        }
    }
    return -1;
}

/* Takes @rule. */
static void add_rule(BlkdebugRules *r, Rule *rule)
{
    QB_GUARD(&r->lock);
    g_ptr_array_add(r->rules, rule);
    atomic_store(&r->n_rules, r->rules->len);
}

static void remove_rule_locked(BlkdebugRules *r, guint index) QB_REQUIRES(r->lock)
{
    qb_mutex_assert_held(&r->lock);
    g_ptr_array_remove_index(r->rules, index);
    atomic_store(&r->n_rules, r->rules->len);
}

/* --- reading rules --- */

static bool take_event(json_t *options, int *ret, GError **errp)
{
    g_autofree char *name = qb_opt_take_string(options, "event");
    if (!name) {
        qb_error_set(errp, EINVAL, "Missing event name for rule");
        return false;
    }
    *ret = find_event(name);
    if (*ret < 0) {
        qb_error_set(errp, EINVAL, "Invalid event name \"%s\"", name);
        return false;
    }
    return true;
}

static bool take_sector(json_t *options, int64_t *ret_offset, GError **errp)
{
    /* -1 is how users say "any", and no number that the unsigned parser knows */
    g_autofree char *text = qb_opt_take_string(options, "sector");
    if (!text || !strcmp(text, "-1")) {
        *ret_offset = -1;
        return true;
    }
    json_object_set_new(options, "sector", json_string(text));
    uint64_t sector;
    if (!qb_opt_take_uint(options, "sector", 0, &sector, errp)) {
        return false;
    }
    if (sector > INT64_MAX / BDRV_SECTOR_SIZE) {
        qb_error_set(errp, EINVAL, "Parameter 'sector' is too large");
        return false;
    }
    *ret_offset = (int64_t)sector * BDRV_SECTOR_SIZE;
    return true;
}

static bool take_error(json_t *options, int *ret, GError **errp)
{
    uint64_t error;
    if (!qb_opt_take_uint(options, "errno", EIO, &error, errp)) {
        return false;
    }
    if (error > 4095) { /* the kernel's limit for an errno */
        qb_error_set(errp, EINVAL, "Parameter 'errno' is too large");
        return false;
    }
    *ret = (int)error;
    return true;
}

static bool fill_inject(Rule *rule, json_t *options, GError **errp)
{
    int type;
    bool immediately;
    if (!qb_opt_take_enum(options, "iotype", io_type_names, BLKDEBUG_IO_TYPES, &type, errp)
        || !take_error(options, &rule->error, errp) || !take_sector(options, &rule->offset, errp)
        || !qb_opt_take_bool(options, "once", false, &rule->once, errp)
        || !qb_opt_take_bool(options, "immediately", false, &immediately, errp)) {
        return false;
    }
    rule->io_types = type == BLKDEBUG_IO_TYPES ? DEFAULT_IO_TYPES : 1u << type;
    return true;
}

static bool fill_rule(Rule *rule, json_t *options, GError **errp)
{
    if (!take_event(options, &rule->event, errp)
        || !qb_opt_take_uint(options, "state", 0, &rule->state, errp)) {
        return false;
    }
    if (rule->action == ACTION_INJECT) {
        return fill_inject(rule, options, errp);
    }
    return qb_opt_take_uint(options, "new_state", 0, &rule->new_state, errp);
}

/* Adds one rule from its options, all of which must be known. */
static bool add_from_options(BlkdebugRules *r, Action action, json_t *options, GError **errp)
{
    Rule *rule = g_new0(Rule, 1);
    rule->action = action;
    bool ok = fill_rule(rule, options, errp);
    const char *left = ok ? json_object_iter_key(json_object_iter(options)) : NULL;
    if (left) {
        qb_error_set(errp, EINVAL, "Invalid parameter '%s'", left);
        ok = false;
    }
    if (ok) {
        add_rule(r, rule);
    } else {
        rule_free(rule);
    }
    return ok;
}

/* Rules "0.event", "0.errno", "1.event" ... of one kind. */
static bool take_list(BlkdebugRules *r, Action action, const char *kind, json_t *options,
                      GError **errp)
{
    g_autoptr(json_t) list = qb_opts_take_prefix(options, kind);
    for (unsigned i = 0; json_object_size(list) > 0; i++) {
        g_autofree char *index = g_strdup_printf("%u", i);
        if (!qb_opts_has_prefix(list, index)) {
            qb_error_set(errp, EINVAL, "Invalid parameter '%s.%s'", kind,
                         json_object_iter_key(json_object_iter(list)));
            return false;
        }
        g_autoptr(json_t) one = qb_opts_take_prefix(list, index);
        if (!add_from_options(r, action, one, errp)) {
            return false;
        }
    }
    return true;
}

bool blkdebug_rules_take(BlkdebugRules *r, json_t *options, GError **errp)
{
    return take_list(r, ACTION_INJECT, "inject-error", options, errp)
           && take_list(r, ACTION_SET_STATE, "set-state", options, errp);
}

/* --- the configuration file --- */

/* Where the reading of a file stands: the section that is open, and what it said so far. */
typedef struct ConfigReader {
    BlkdebugRules *rules;
    const char *filename;
    unsigned line;
    json_t *section; /* NULL before the first one */
    Action action;
} ConfigReader;

static bool config_error(const ConfigReader *c, const char *what, GError **errp)
{
    qb_error_set(errp, EINVAL, "%s:%u: %s", c->filename, c->line, what);
    return false;
}

static bool end_section(ConfigReader *c, GError **errp)
{
    g_autoptr(json_t) section = g_steal_pointer(&c->section);
    if (!section || add_from_options(c->rules, c->action, section, errp)) {
        return true;
    }
    g_prefix_error(errp, "%s:%u: ", c->filename, c->line);
    return false;
}

/* "[inject-error]", or with a name behind that means nothing: "[inject-error "x"]". */
static bool begin_section(ConfigReader *c, char *text, GError **errp)
{
    static const char *const kinds[] = {
        [ACTION_INJECT] = "inject-error",
        [ACTION_SET_STATE] = "set-state",
    };
    char *close = strchr(text, ']');
    if (!end_section(c, errp)) {
        return false;
    }
    if (!close) {
        return config_error(c, "parse error", errp);
    }
    *close = '\0';
    g_autofree char *kind = g_strndup(text + 1, strcspn(text + 1, " \t\""));
    for (size_t i = 0; i < G_N_ELEMENTS(kinds); i++) {
        if (!strcmp(kind, kinds[i])) {
            c->action = (Action)i;
            c->section = json_object();
            return true;
        }
    }
    g_autofree char *what = g_strdup_printf("There is no option group '%s'", kind);
    return config_error(c, what, errp);
}

static bool add_setting(ConfigReader *c, char *text, GError **errp)
{
    char *equals = strchr(text, '=');
    if (!equals || !c->section) {
        return config_error(c, equals ? "no group defined" : "parse error", errp);
    }
    *equals = '\0';
    char *value = g_strstrip(equals + 1);
    size_t len = strlen(value);
    if (len >= 2 && value[0] == '"' && value[len - 1] == '"') {
        value[len - 1] = '\0';
        value++;
    }
    if (json_object_set_new(c->section, g_strstrip(text), json_string(value)) < 0) {
        return config_error(c, "not UTF-8", errp);
    }
    return true;
}

static bool read_line(ConfigReader *c, char *line, GError **errp)
{
    char *text = g_strstrip(line);
    if (text[0] == '\0' || text[0] == '#') {
        return true;
    }
    return text[0] == '[' ? begin_section(c, text, errp) : add_setting(c, text, errp);
}

bool blkdebug_rules_load(BlkdebugRules *r, const char *filename, GError **errp)
{
    g_autofree char *content = NULL;
    g_autoptr(GError) err = NULL;
    if (access(filename, R_OK) < 0) {
        qb_error_set_errno(errp, errno, "Could not read blkdebug config file");
        return false;
    }
    if (!g_file_get_contents(filename, &content, NULL, &err)) {
        qb_error_set(errp, EIO, "Could not read blkdebug config file: %s", err->message);
        return false;
    }
    g_auto(GStrv) lines = g_strsplit(content, "\n", -1);
    ConfigReader c = {.rules = r, .filename = filename};
    bool ok = true;
    for (char **line = lines; ok && *line; line++) {
        c.line++;
        ok = read_line(&c, *line, errp);
    }
    ok = ok && end_section(&c, errp);
    json_decref(c.section);
    return ok;
}

/* --- events --- */

static bool fits(const BlkdebugRules *r, const Rule *rule, int event)
{
    return rule->event == event && (rule->state == 0 || rule->state == r->state);
}

/* Rules that inject: those of this event take the place of those active so far, if there
 * are any. */
static void activate_locked(BlkdebugRules *r, int event) QB_REQUIRES(r->lock)
{
    bool first = true;
    qb_mutex_assert_held(&r->lock);
    for (guint i = 0; i < r->rules->len; i++) {
        Rule *rule = g_ptr_array_index(r->rules, i);
        if (rule->action != ACTION_INJECT || !fits(r, rule, event)) {
            continue;
        }
        for (guint k = 0; first && k < r->rules->len; k++) {
            ((Rule *)g_ptr_array_index(r->rules, k))->active = false;
        }
        first = false;
        rule->active = true;
    }
}

static uint64_t next_state_locked(BlkdebugRules *r, int event) QB_REQUIRES(r->lock)
{
    uint64_t state = r->state;
    qb_mutex_assert_held(&r->lock);
    for (guint i = 0; i < r->rules->len; i++) {
        const Rule *rule = g_ptr_array_index(r->rules, i);
        if (rule->action == ACTION_SET_STATE && fits(r, rule, event)) {
            state = rule->new_state;
        }
    }
    return state;
}

/* Uses up the first breakpoint of the event: its tag, or NULL when there is none. */
static char *take_break_locked(BlkdebugRules *r, int event) QB_REQUIRES(r->lock)
{
    qb_mutex_assert_held(&r->lock);
    for (guint i = 0; i < r->rules->len; i++) {
        Rule *rule = g_ptr_array_index(r->rules, i);
        if (rule->action == ACTION_BREAK && rule->event == event) {
            char *tag = g_steal_pointer(&rule->tag);
            remove_rule_locked(r, i);
            return tag;
        }
    }
    return NULL;
}

static void suspend_locked(BlkdebugRules *r, const char *tag) QB_REQUIRES(r->lock)
{
    Suspended self = {.tag = tag};
    qb_mutex_assert_held(&r->lock);
    g_ptr_array_add(r->suspended, &self);
    while (!self.resumed) {
        qb_cond_wait(&r->resumed, &r->lock);
    }
    g_ptr_array_remove(r->suspended, &self);
}

void blkdebug_rules_event(BlkdebugRules *r, const char *event)
{
    if (atomic_load(&r->n_rules) == 0) {
        return;
    }
    int index = find_event(event);
    assert(index >= 0); /* events are named by code, and this table has them all */
    QB_GUARD(&r->lock);
    activate_locked(r, index);
    uint64_t next = next_state_locked(r, index);
    /* All breakpoints are taken before the first one stops us: those set meanwhile are
     * for others. */
    g_autoptr(GPtrArray) tags = g_ptr_array_new_with_free_func(g_free);
    char *tag;
    while ((tag = take_break_locked(r, index))) {
        g_ptr_array_add(tags, tag);
    }
    r->state = next;
    for (guint i = 0; i < tags->len; i++) {
        suspend_locked(r, g_ptr_array_index(tags, i));
    }
}

/* --- requests --- */

static bool hits(const Rule *rule, BlkdebugIoType type, int64_t offset, int64_t bytes)
{
    if (rule->action != ACTION_INJECT || !rule->active || !(rule->io_types & (1u << type))) {
        return false;
    }
    return rule->offset < 0 || (rule->offset >= offset && rule->offset - offset < bytes);
}

int blkdebug_rules_check(BlkdebugRules *r, BlkdebugIoType type, int64_t offset, int64_t bytes)
{
    if (atomic_load(&r->n_rules) == 0) {
        return 0;
    }
    QB_GUARD(&r->lock);
    for (guint i = 0; i < r->rules->len; i++) {
        const Rule *rule = g_ptr_array_index(r->rules, i);
        if (!hits(rule, type, offset, bytes)) {
            continue;
        }
        int error = rule->error;
        if (rule->once) {
            remove_rule_locked(r, i);
        }
        return -error;
    }
    return 0;
}

/* --- breakpoints --- */

int blkdebug_rules_break(BlkdebugRules *r, const char *event, const char *tag)
{
    int index = find_event(event);
    if (index < 0) {
        return -ENOENT;
    }
    Rule *rule = g_new0(Rule, 1);
    rule->action = ACTION_BREAK;
    rule->event = index;
    rule->tag = g_strdup(tag);
    add_rule(r, rule);
    return 0;
}

/* Lets go of those with @tag, all or the youngest; true when there was one. */
static bool resume_locked(BlkdebugRules *r, const char *tag, bool all) QB_REQUIRES(r->lock)
{
    bool found = false;
    qb_mutex_assert_held(&r->lock);
    for (guint i = r->suspended->len; i-- > 0 && (all || !found);) {
        Suspended *s = g_ptr_array_index(r->suspended, i);
        if (!s->resumed && !strcmp(s->tag, tag)) {
            s->resumed = true;
            found = true;
        }
    }
    if (found) {
        qb_cond_broadcast(&r->resumed);
    }
    return found;
}

int blkdebug_rules_resume(BlkdebugRules *r, const char *tag)
{
    QB_GUARD(&r->lock);
    return resume_locked(r, tag, false) ? 0 : -ENOENT;
}

int blkdebug_rules_remove_break(BlkdebugRules *r, const char *tag)
{
    QB_GUARD(&r->lock);
    bool found = false;
    for (guint i = r->rules->len; i-- > 0;) {
        const Rule *rule = g_ptr_array_index(r->rules, i);
        if (rule->action == ACTION_BREAK && !strcmp(rule->tag, tag)) {
            remove_rule_locked(r, i);
            found = true;
        }
    }
    return resume_locked(r, tag, true) || found ? 0 : -ENOENT;
}

bool blkdebug_rules_is_suspended(BlkdebugRules *r, const char *tag)
{
    QB_GUARD(&r->lock);
    for (guint i = 0; i < r->suspended->len; i++) {
        const Suspended *s = g_ptr_array_index(r->suspended, i);
        if (!s->resumed && !strcmp(s->tag, tag)) {
            return true;
        }
    }
    return false;
}
