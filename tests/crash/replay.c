/*
 * Files as they could be after power loss, made from the log of what was done to them.
 *
 *      log   W1 W2 F   W3 Z4 T5 ... W6 F
 *            \______/  \_____________/
 *            stable    at a time in here: any of them may be there, whole, in part, or not at all
 *
 * An event is stable at a time if a flush of its disk, complete by then, began after the event was
 * complete.  Flushes are per disk.  Of what has begun and is not stable each 512-byte sector may
 * have arrived or not; where several wrote a sector, leaving out the later ones is what reordering
 * them would give.  A file may have got its new length without the data.
 *
 * Which states are made:
 *
 *      every subset     of the unstable events, and of their sectors, before each flush, as long as
 *                       these are few
 *      every prefix     everything up to an event is there, nothing after it
 *      random ones      by patterns that find more than tossing a coin for each sector does: one
 *                       event missing, one event alone, one torn, a prefix that ends torn, ...
 *      on demand        an event goes ahead of all that is not stable when it ends; an event is
 *                       still missing at the last moment when it may be
 *
 * Invariant: a state is a function of the recording and its name.
 *
 * SPDX-License-Identifier: MIT
 */
#include "tests/crash/replay.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define FEW_EVENTS 5
#define FEW_SECTORS 6

/* ---------------------------------------------------------------- recording */

static guint hash_log(const GArray *log)
{
    guint h = 5381;
    for (guint i = 0; i < log->len; i++) {
        const DiskEvent *e = &g_array_index(log, DiskEvent, i);
        h = h * 33 + (guint)e->kind;
        h = h * 33 + e->disk;
        h = h * 33 + (guint)(e->offset ^ e->offset >> 32);
        h = h * 33 + (guint)e->bytes;
        h = h * 33 + (guint)(e->end - e->begin);
    }
    return h;
}

static void forget_disks(void)
{
    for (unsigned i = 0; i < disk_count(); i++) {
        disk_load(i, &(DiskImage){0});
    }
}

Recording *recording_new(const Operation *op, const Kind *kind, char **ret_why)
{
    Recording *r = g_new0(Recording, 1);
    forget_disks();
    World *w = world_new(kind);
    if (op->prepare) {
        op->prepare(w);
    }
    for (unsigned i = 0; i < disk_count(); i++) {
        r->image[i] = disk_save(i);
    }
    r->op = op;
    r->world = w;
    r->before = world_copy(w);
    r->before.damaged = op->flags & OPERATION_DAMAGED;
    r->before.lost = op->flags & OPERATION_LOST;
    disk_log_start();
    world_record(w);
    bool ok = op->run(w);
    r->end = disk_tick();
    r->log = disk_log_stop();
    r->hash = hash_log(r->log);
    if (!ok || w->failed) {
        *ret_why = g_strdup(w->why ? w->why : "it failed");
        recording_free(r);
        return NULL;
    }
    return r;
}

void recording_free(Recording *r)
{
    for (unsigned i = 0; i < DISKS_MAX; i++) {
        disk_image_clear(&r->image[i]);
    }
    disk_log_free(r->log);
    world_copy_clear(&r->before);
    world_free(r->world);
    g_free(r);
}

static const DiskEvent *event_at(const Recording *r, guint i)
{
    return &g_array_index(r->log, DiskEvent, i);
}

unsigned recording_flushes(const Recording *r)
{
    unsigned n = 0;
    for (guint i = 0; i < r->log->len; i++) {
        n += event_at(r, i)->kind == DISK_FLUSH;
    }
    return n;
}

/* ---------------------------------------------------------------- names */

char *state_name(const State *s)
{
    switch (s->kind) {
    case STATE_PREFIX:
        return g_strdup_printf("p%" PRIu64, s->time);
    case STATE_RANDOM:
    case STATE_ALONE:
    case STATE_MISSING:
        return g_strdup_printf("%c%" PRIu64, s->kind, s->mask);
    default:
        return g_strdup_printf("%c%" PRIu64 ".%" PRIx64, s->kind, s->time, s->mask);
    }
}

bool state_parse(const char *name, State *ret)
{
    char *end = NULL;
    State s = {.kind = (StateKind)*name};
    if (!*name || !strchr("pesram", *name)) {
        return false;
    }
    uint64_t number = strtoull(name + 1, &end, 10);
    if (strchr("ram", *name)) {
        s.mask = number;
    } else {
        s.time = number;
        s.mask = *end == '.' ? strtoull(end + 1, &end, 16) : 0;
    }
    *ret = s;
    return !*end;
}

/* ---------------------------------------------------------------- what is stable */

/* For each disk the beginning of the last flush that was complete at @time. */
static void find_flushes(const Recording *r, uint64_t time, uint64_t *ret_begin)
{
    memset(ret_begin, 0, DISKS_MAX * sizeof(*ret_begin));
    for (guint i = 0; i < r->log->len; i++) {
        const DiskEvent *e = event_at(r, i);
        if (e->kind == DISK_FLUSH && e->end <= time) {
            ret_begin[e->disk] = MAX(ret_begin[e->disk], e->begin);
        }
    }
}

/* The events that may or may not be there at @time, in the order of their beginnings. */
static GPtrArray *unstable_at(const Recording *r, uint64_t time)
{
    uint64_t flushed[DISKS_MAX];
    GPtrArray *events = g_ptr_array_new();
    find_flushes(r, time, flushed);
    for (guint i = 0; i < r->log->len; i++) {
        const DiskEvent *e = event_at(r, i);
        if (e->kind != DISK_FLUSH && e->begin <= time && e->end >= flushed[e->disk]) {
            g_ptr_array_add(events, (void *)e);
        }
    }
    return events;
}

static unsigned sectors_of(const DiskEvent *e)
{
    return e->kind == DISK_TRUNCATE ? 1 : (unsigned)((e->bytes + DISK_SECTOR - 1) / DISK_SECTOR);
}

static unsigned count_sectors(const GPtrArray *events)
{
    unsigned n = 0;
    for (guint i = 0; i < events->len; i++) {
        n += sectors_of(events->pdata[i]);
    }
    return n;
}

/* ---------------------------------------------------------------- applying */

static void apply_all(const DiskEvent *e)
{
    disk_apply(e, 0, e->bytes);
}

/* The @n-th sector of the event: pieces end where sectors of the file do. */
static void apply_sector(const DiskEvent *e, unsigned n)
{
    uint64_t skew = e->offset % DISK_SECTOR;
    uint64_t from = n ? n * DISK_SECTOR - skew : 0;
    uint64_t to = MIN((n + 1) * (uint64_t)DISK_SECTOR - skew, e->bytes);
    if (e->kind == DISK_TRUNCATE) {
        apply_all(e);
    } else if (from < to) {
        disk_apply(e, from, to - from);
    }
}

static void apply_torn(const DiskEvent *e, GRand *rand)
{
    for (unsigned i = 0; i <= sectors_of(e); i++) {
        if (g_rand_boolean(rand)) {
            apply_sector(e, i);
        }
    }
}

static void maybe_extend(const DiskEvent *e, GRand *rand)
{
    bool can = e->kind == DISK_WRITE || e->kind == DISK_ZERO;
    if (can && g_rand_int_range(rand, 0, 4) == 0) {
        disk_extend(e->disk, e->offset + e->bytes);
    }
}

/* Everything but @except that is stable, or (@prefix) complete, on the disks as they were. */
static void apply_stable(const Recording *r, uint64_t time, bool prefix, const DiskEvent *except)
{
    uint64_t flushed[DISKS_MAX];
    find_flushes(r, time, flushed);
    for (unsigned i = 0; i < disk_count(); i++) {
        disk_load(i, &r->image[i]);
    }
    for (guint i = 0; i < r->log->len; i++) {
        const DiskEvent *e = event_at(r, i);
        if (e != except && e->end <= time && (prefix || e->end < flushed[e->disk])) {
            apply_all(e);
        }
    }
}

/* ---------------------------------------------------------------- random choices */

typedef enum Pattern {
    SOME_EVENTS,    /* each by a coin */
    ALL_BUT_ONE,
    ONLY_ONE,
    SOME_SECTORS,   /* each by a coin */
    MIXED,          /* none, torn or whole */
    TORN_PREFIX,    /* all up to one, which is torn */
    ONE_TORN,       /* all, one of them torn */
    SUFFIX,         /* the later ones only */
    PATTERNS,
} Pattern;

/* 0 not there, 1 torn, 2 there. */
static int choose(Pattern p, guint i, guint special, GRand *rand)
{
    switch (p) {
    case SOME_EVENTS:
        return g_rand_boolean(rand) ? 2 : 0;
    case ALL_BUT_ONE:
        return i == special ? 0 : 2;
    case ONLY_ONE:
        return i == special ? 2 : 0;
    case SOME_SECTORS:
        return 1;
    case MIXED:
        return g_rand_int_range(rand, 0, 3);
    case TORN_PREFIX:
        return i < special ? 2 : i == special;
    case ONE_TORN:
        return i == special ? 1 : 2;
    default:
        return i >= special ? 2 : 0;
    }
}

static void apply_random(const GPtrArray *events, GRand *rand)
{
    Pattern p = (Pattern)g_rand_int_range(rand, 0, PATTERNS);
    guint special = events->len ? (guint)g_rand_int_range(rand, 0, (gint32)events->len) : 0;
    for (guint i = 0; i < events->len; i++) {
        const DiskEvent *e = events->pdata[i];
        int how = choose(p, i, special, rand);
        if (how == 2) {
            apply_all(e);
        } else if (how == 1) {
            apply_torn(e, rand);
        }
        if (how != 2) {
            maybe_extend(e, rand);
        }
    }
}

/* A moment just after an event began or ended. */
static uint64_t random_time(const Recording *r, GRand *rand)
{
    if (!r->log->len) {
        return 0;
    }
    const DiskEvent *e = event_at(r, (guint)g_rand_int_range(rand, 0, (gint32)r->log->len));
    return e->kind == DISK_FLUSH || g_rand_boolean(rand) ? e->begin : e->end;
}

/* ---------------------------------------------------------------- building */

static void apply_masked(const GPtrArray *events, uint64_t mask, bool by_sector)
{
    unsigned bit = 0;
    for (guint i = 0; i < events->len; i++) {
        const DiskEvent *e = events->pdata[i];
        unsigned n = by_sector ? sectors_of(e) : 1;
        for (unsigned j = 0; j < n; j++, bit++) {
            if (!(mask >> bit & 1)) {
                continue;
            }
            if (by_sector) {
                apply_sector(e, j);
            } else {
                apply_all(e);
            }
        }
    }
}

/* The last moment when the event need not be there: before the next flush of its disk ends. */
static uint64_t last_missing(const Recording *r, const DiskEvent *e)
{
    for (guint i = 0; i < r->log->len; i++) {
        const DiskEvent *flush = event_at(r, i);
        if (flush->kind == DISK_FLUSH && flush->disk == e->disk && flush->begin > e->end) {
            return flush->begin;
        }
    }
    return r->end;
}

static uint64_t build_for_one(const Recording *r, const State *s)
{
    const DiskEvent *e = event_at(r, MIN((guint)s->mask, r->log->len - 1));
    uint64_t time = e->end;
    if (s->kind == STATE_MISSING) {
        time = last_missing(r, e);
        apply_stable(r, time, true, e);
    } else {
        apply_stable(r, time, false, NULL);
        apply_all(e);
    }
    return time;
}

uint64_t state_build(const Recording *r, const State *s)
{
    if ((s->kind == STATE_ALONE || s->kind == STATE_MISSING) && r->log->len) {
        return build_for_one(r, s);
    }
    g_autoptr(GRand) rand = g_rand_new_with_seed((guint32)s->mask);
    uint64_t time = s->kind == STATE_RANDOM ? random_time(r, rand) : s->time;
    g_autoptr(GPtrArray) events = unstable_at(r, time);
    apply_stable(r, time, s->kind == STATE_PREFIX, NULL);
    if (s->kind == STATE_RANDOM) {
        apply_random(events, rand);
    } else if (s->kind != STATE_PREFIX) {
        apply_masked(events, s->mask, s->kind == STATE_SECTORS);
    }
    return time;
}

/* ---------------------------------------------------------------- choosing states */

static void add(GArray *states, unsigned max, State s)
{
    if (states->len < max) {
        g_array_append_val(states, s);
    }
}

static void add_masks(GArray *states, unsigned max, StateKind kind, uint64_t time, unsigned bits)
{
    for (uint64_t mask = 0; mask < UINT64_C(1) << bits; mask++) {
        add(states, max, (State){.kind = kind, .time = time, .mask = mask});
    }
}

/* All subsets of what is not stable at @time, if they are few. */
static void add_exhaustive(const Recording *r, GArray *states, unsigned max, uint64_t time)
{
    g_autoptr(GPtrArray) events = unstable_at(r, time);
    unsigned sectors = count_sectors(events);
    if (events->len && events->len <= FEW_EVENTS) {
        add_masks(states, max, STATE_EVENTS, time, events->len);
    }
    if (sectors > events->len && sectors <= FEW_SECTORS) {
        add_masks(states, max, STATE_SECTORS, time, sectors);
    }
}

/* At most @n prefixes, spread over the log. */
static void add_prefixes(const Recording *r, GArray *states, unsigned n)
{
    unsigned step = MAX(r->log->len / MAX(n, 1), 1);
    for (guint i = 0; i < r->log->len; i += step) {
        add(states, UINT_MAX, (State){.kind = STATE_PREFIX, .time = event_at(r, i)->end});
    }
    add(states, UINT_MAX, (State){.kind = STATE_PREFIX, .time = r->end});
}

World recording_world(const Recording *r, uint64_t time)
{
    World w = world_copy(&r->before);
    world_advance(&w, r->world, time);
    return w;
}

bool recording_run_again(const Recording *r, World *w, char **ret_why)
{
    g_autofree char *why = NULL;
    w->value = r->before.value;
    bool ok = r->op->run(w) && !w->failed;
    if (!ok && !(r->op->flags & OPERATION_ONCE)) {
        *ret_why = g_strdup_printf("run again: %s", w->why ? w->why : "it fails");
        return false;
    }
    if (!world_judge_end(r->world, w, &why)) {
        *ret_why = g_strdup_printf("run again: %s", why);
        return false;
    }
    return true;
}

GArray *recording_states(const Recording *r, unsigned max, uint64_t seed)
{
    GArray *states = g_array_new(false, false, sizeof(State));
    for (guint i = 0; i < r->log->len; i++) {
        const DiskEvent *e = event_at(r, i);
        if (e->kind == DISK_FLUSH) {
            add_exhaustive(r, states, max / 3, e->begin);
        }
    }
    add_prefixes(r, states, max / 3);
    while (states->len < max) {
        add(states, max, (State){.kind = STATE_RANDOM, .mask = seed + states->len});
    }
    return states;
}
