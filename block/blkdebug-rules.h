/*
 * What the two halves of the blkdebug driver tell one another.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef BLOCK_BLKDEBUG_RULES_H
#define BLOCK_BLKDEBUG_RULES_H

#include <stdbool.h>
#include <stdint.h>
#include <glib.h>
#include <jansson.h>

/* What a request does, for rules that pick. */
typedef enum BlkdebugIoType {
    BLKDEBUG_READ,
    BLKDEBUG_WRITE,
    BLKDEBUG_WRITE_ZEROES,
    BLKDEBUG_DISCARD,
    BLKDEBUG_FLUSH,
    BLKDEBUG_BLOCK_STATUS,
    BLKDEBUG_IO_TYPES,
} BlkdebugIoType;

typedef struct BlkdebugRules BlkdebugRules;

/* All functions may be called from any thread. */
BlkdebugRules *blkdebug_rules_new(void);
void blkdebug_rules_free(BlkdebugRules *r); /* nobody may be suspended */
/* Adds the rules of an ini-style file: sections [inject-error] and [set-state] with lines
 * key = "value". */
bool blkdebug_rules_load(BlkdebugRules *r, const char *filename, GError **errp);
/* Takes inject-error.N.* and set-state.N.* out of @options and adds the rules. */
bool blkdebug_rules_take(BlkdebugRules *r, json_t *options, GError **errp);

/* The event happens in the calling thread, which may be suspended until somebody resumes it. */
void blkdebug_rules_event(BlkdebugRules *r, const char *event);
/* 0, or the -errno that an active rule has for this request. */
int blkdebug_rules_check(BlkdebugRules *r, BlkdebugIoType type, int64_t offset, int64_t bytes);

/* Breakpoints. -ENOENT: no such event, no such tag. */
int blkdebug_rules_break(BlkdebugRules *r, const char *event, const char *tag);
int blkdebug_rules_remove_break(BlkdebugRules *r, const char *tag); /* and resumes who is there */
int blkdebug_rules_resume(BlkdebugRules *r, const char *tag);       /* the one suspended last */
bool blkdebug_rules_is_suspended(BlkdebugRules *r, const char *tag);

#endif
