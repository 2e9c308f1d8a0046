/*
 * Files as they could be after power loss, made from the log of what was done to them.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef TESTS_CRASH_REPLAY_H
#define TESTS_CRASH_REPLAY_H

#include "tests/harness/operations.h"

/* An operation as it went once, without a crash. */
typedef struct Recording {
    const Operation *op;
    World *world;        /* as it is at the end; its marks */
    World before;        /* a copy of it as it was */
    DiskImage image[DISKS_MAX]; /* the disks as they were */
    GArray *log;         /* DiskEvent */
    uint64_t end;        /* the time after everything */
    guint hash;          /* of the log, without the content: equal logs have equal states */
} Recording;

/* How the choice is made among the events that are not stable at a time. */
typedef enum StateKind {
    STATE_PREFIX = 'p',  /* what was complete is there, all of it */
    STATE_EVENTS = 'e',  /* bit i of the mask: the i-th unstable event is there */
    STATE_SECTORS = 's', /* bit i: the i-th sector of the unstable events is there */
    STATE_RANDOM = 'r',  /* mask is the seed: of the choice, and of the time */
    STATE_ALONE = 'a',   /* mask is an event: it is there as soon as it ends, and what is stable */
    STATE_MISSING = 'm', /* mask is an event: all is there but it, as long as that can be */
} StateKind;

/* One state, in words: "p120", "e120.5", "s120.3f", "r77", "a5", "m5". */
typedef struct State {
    StateKind kind;
    uint64_t time, mask;
} State;

/* Runs the operation in a new world. NULL: it failed, *ret_why says how. */
Recording *recording_new(const Operation *op, const Kind *kind, char **ret_why);
void recording_free(Recording *r);
unsigned recording_flushes(const Recording *r);

char *state_name(const State *state);
bool state_parse(const char *name, State *ret);
/* Up to @max states, the exhaustive ones first, then prefixes, then random ones by @seed. */
GArray *recording_states(const Recording *r, unsigned max, uint64_t seed);
/* Makes the disks as the state has them. Returns the time of the crash. */
uint64_t state_build(const Recording *r, const State *state);
/* A world that has only what is needed to judge the disks, or to run the operation again, after a
 * crash at @time: world_copy_clear(). */
World recording_world(const Recording *r, uint64_t time);
/* Runs the operation in @w, with the values that it had when it was recorded, and judges what has
 * become of everything. *ret_why says what is wrong. */
bool recording_run_again(const Recording *r, World *w, char **ret_why);

#endif
