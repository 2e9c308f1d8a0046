/*
 * Copying content into an image: what convert.c and dd.c (what to do) and convert-copy.c (doing it)
 * agree on.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef QEMU_IMG_CONVERT_H
#define QEMU_IMG_CONVERT_H

#include "block/job.h"
#include "qemu-img/img.h"

typedef struct ConvertSource {
    BlockBackend *blk;
    const char *name;
    int64_t start, size; /* place in the concatenation; what lies before 0 is left out */
} ConvertSource;

typedef struct ConvertPlan {
    ConvertSource *sources; /* in order, contiguous */
    unsigned nb_sources;
    json_t *create_options; /* of the new target; NULL: it exists */
    BlockBackend *target;
    const char *target_name;
    int64_t size;              /* bytes to copy */
    int64_t target_size;
    int64_t target_alignment;  /* cluster size of the target, or 1 sector */
    bool target_is_zero;       /* what is not written reads as zeroes */
    bool target_has_backing;   /* what the sources' top layers do not have shines through */
    bool compress, out_of_order, salvage, quiet;
    bool target_cached;        /* writes go to the page cache */
    bool copy_offload;         /* data are copied by the kernel where it can, zeroes in them too */
    int64_t min_sparse;        /* shortest run of zeroes to look for in data; 0: write everything */
    unsigned workers;
    uint64_t rate_limit;
    QbProgress *progress;
} ConvertPlan;

/* The open target's size and alignment into the plan; false: said, also when plan->size does not
 * fit. */
bool convert_settle_target(ConvertPlan *plan);
/* Does image @name of @format read as zeroes when it was just made? */
bool convert_fresh_target_is_zero(const char *name, const char *format);
/* convert_copy() with its progress reported, on stdout if @show; plan->progress is set meanwhile. */
bool convert_run(ConvertPlan *plan, bool show);
/* Closes and frees what the plan holds, but for the plan itself. */
void convert_plan_clear(ConvertPlan *plan);

/* Can the bitmaps of the (one) source be copied? False: said. */
bool convert_check_bitmaps(const ConvertPlan *plan, bool skip_broken);
/* Copies them to the target, which has its content; broken ones are left out. False: said. */
bool convert_copy_bitmaps(const ConvertPlan *plan);

/* Copies all of it; false: said. */
bool convert_copy(const ConvertPlan *plan);

#endif
