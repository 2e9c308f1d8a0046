/*
 * Files in memory below the drivers: they remember all that was done to them, and fail on demand.
 *
 * A disk is found by its name, "test-disk:NAME" or driver=test-disk,disk=NAME, which ends at a '+':
 * what is behind it only makes the name longer.  It outlives the nodes that use it.  With align=N
 * requests are multiples of N, as those to a device are.  While a log is kept each operation has the
 * time at which it began and the time at which it was complete, on one clock for all disks, so that
 * a flush can be told from what it does not cover.
 *
 * Any thread, but for what is said to set up a run: nobody uses the disks meanwhile.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef TESTS_HARNESS_DISK_H
#define TESTS_HARNESS_DISK_H

#include "block/driver.h"

#define DISK_SECTOR 512
#define DISK_CAPACITY (UINT64_C(64) << 20)
#define DISKS_MAX 8

typedef enum DiskKind {
    DISK_READ,
    DISK_WRITE,
    DISK_ZERO,
    DISK_DISCARD,
    DISK_FLUSH,
    DISK_TRUNCATE,
    DISK_KINDS,
} DiskKind;
extern const char *const disk_kind_names[DISK_KINDS];

/* Something that was done, from @begin to @end; reads are not logged. */
typedef struct DiskEvent {
    DiskKind kind;
    unsigned disk;          /* number */
    uint64_t offset, bytes; /* truncate: offset is the new length */
    uint8_t *data;          /* of a write; owned by the log */
    uint64_t begin, end;    /* end is UINT64_MAX until it is complete */
} DiskEvent;

/* Bytes of a disk, for saving and loading. */
typedef struct DiskImage {
    uint8_t *data;
    uint64_t length;
} DiskImage;

/* The @countdown-th operation of @kind from now on fails. */
typedef struct DiskFault {
    DiskKind kind;
    unsigned countdown;
    int error;    /* -errno */
    bool lasting; /* and so do all of the kind after it */
    bool partly;  /* the first half of a transfer is done before it fails */
} DiskFault;

/* Registers the driver. Once, before anything else. */
void disk_init(void);
/* Frees all disks and the log. */
void disk_done(void);

/* The number of disk @name, which is made (empty) when there is none. */
unsigned disk_number(const char *name);
const char *disk_name(unsigned disk);
unsigned disk_count(void);

/* --- setting up a run --- */
/* A copy, owned by the caller: disk_image_clear(). */
DiskImage disk_save(unsigned disk);
void disk_image_clear(DiskImage *image);
void disk_load(unsigned disk, const DiskImage *image);
uint64_t disk_length(unsigned disk);
/* Writes the bytes to a file, for those who look at a failure. */
bool disk_export(unsigned disk, const char *path);
bool disk_import(unsigned disk, const char *path);
/* The file cannot grow beyond @bytes (-ENOSPC); 0: DISK_CAPACITY. */
void disk_set_limit(unsigned disk, uint64_t bytes);
/* @fn is called by each thread that begins to write to a disk; NULL: none. */
void disk_set_hook(void (*fn)(void *opaque), void *opaque);
/* Lets requests wait at random between their beginning and their effect, to mix threads up. */
void disk_set_jitter(bool on);

/* --- the log --- */
void disk_log_start(void);
/* DiskEvent, in the order of their beginnings; the caller's: disk_log_free(). */
GArray *disk_log_stop(void);
void disk_log_free(GArray *log);
/* Moves the clock on, and returns what it shows. */
uint64_t disk_tick(void);

/* --- faults --- */
/* One at a time; replaces the one before. */
void disk_fault_set(const DiskFault *fault);
/* Lets nothing fail for a while, and nothing count. */
void disk_fault_suspend(bool on);
/* What is left of the countdown. */
unsigned disk_fault_left(void);
/* Ends it. How often it has fired. */
unsigned disk_fault_clear(void);
/* Has a flush of the disk failed since it was opened? */
bool disk_flush_is_broken(unsigned disk);
/* Has something been written to it that no flush has made stable? */
bool disk_is_unflushed(unsigned disk);

/* --- doing one operation to the bytes, as the driver and the replayer do --- */
/* Applies @bytes of @e, from @from on; of a truncation all. */
void disk_apply(const DiskEvent *e, uint64_t from, uint64_t bytes);
/* Makes the disk at least @end long. */
void disk_extend(unsigned disk, uint64_t end);

#endif
