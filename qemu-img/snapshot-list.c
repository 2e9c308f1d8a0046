/*
 * The table of internal snapshots, for people; its columns are parsed by scripts.
 *
 * SPDX-License-Identifier: MIT
 */
#include <inttypes.h>
#include <stdio.h>
#include <time.h>
#include "block/block.h"
#include "qemu-img/snapshot-list.h"
#include "util/size.h"

static void print_row(const BdrvSnapshotInfo *sn)
{
    g_autofree char *vm_size = qb_size_to_text(sn->vm_state_size);
    g_autofree char *icount = sn->icount == UINT64_MAX
                                  ? g_strdup("--")
                                  : g_strdup_printf("%" PRIu64, sn->icount);
    uint64_t seconds = sn->vm_clock_nsec / 1000000000;
    time_t when = sn->date_sec;
    char date[32] = "", clock[64];
    struct tm tm;

    if (localtime_r(&when, &tm)) {
        strftime(date, sizeof(date), "%Y-%m-%d %H:%M:%S", &tm);
    }
    snprintf(clock, sizeof(clock), "%04" PRIu64 ":%02d:%02d.%03d", seconds / 3600,
             (int)(seconds / 60 % 60), (int)(seconds % 60),
             (int)(sn->vm_clock_nsec / 1000000 % 1000));
    printf("%-7s %-16s %8s %19s %15s %10s\n", sn->id, sn->name, vm_size, date, clock, icount);
}

static void print_header(void)
{
    printf("Snapshot list:\n%-7s %-16s %8s %19s %15s %10s\n", "ID", "TAG", "VM_SIZE", "DATE",
           "VM_CLOCK", "ICOUNT");
}

void img_print_snapshots(const GArray *snapshots)
{
    if (snapshots->len == 0) {
        return;
    }
    print_header();
    for (guint i = 0; i < snapshots->len; i++) {
        print_row(&g_array_index(snapshots, BdrvSnapshotInfo, i));
    }
}

static uint64_t number(const json_t *obj, const char *key, uint64_t absent)
{
    const json_t *value = json_object_get(obj, key);

    return value ? (uint64_t)json_integer_value(value) : absent;
}

void img_print_snapshot_facts(const json_t *snapshots)
{
    size_t i;
    json_t *item;

    print_header();
    json_array_foreach((json_t *)snapshots, i, item) {
        BdrvSnapshotInfo sn = {
            .id = (char *)json_string_value(json_object_get(item, "id")),
            .name = (char *)json_string_value(json_object_get(item, "name")),
            .vm_state_size = number(item, "vm-state-size", 0),
            .date_sec = (uint32_t)number(item, "date-sec", 0),
            .vm_clock_nsec = number(item, "vm-clock-sec", 0) * 1000000000 +
                             number(item, "vm-clock-nsec", 0),
            .icount = number(item, "icount", UINT64_MAX),
        };
        print_row(&sn);
    }
}
