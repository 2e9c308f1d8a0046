/*
 * Fuzz target: whole qcow2 images with fields changed (damage.c), of all kinds that need no other
 * file.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2.h"
#include "tests/fuzz/damage.h"
#include "tests/fuzz/fuzz.h"
#include "tests/harness/world.h"
#include "util/endian.h"

static DamageBase *bases;
static unsigned nb_bases;

/* Where the metadata lie, found by following what the header says. */
static void find_areas(DamageBase *base)
{
    const uint8_t *data = base->image.data;
    uint64_t l1 = qb_ldbe64(data + 40), reftable = qb_ldbe64(data + 48);
    uint64_t l2 = qb_ldbe64(data + l1) & UINT64_C(0x00fffffffffffe00);

    base->cluster_size = 1u << qb_ldbe32(data + 20);
    damage_add_area(base, 0, 28, 4);
    damage_add_area(base, 24, 11, 8);
    damage_add_area(base, 112, 60, 4);
    damage_add_area(base, l1, qb_ldbe32(data + 36), 8);
    if (l2) {
        damage_add_area(base, l2, MIN(base->cluster_size / 8, 64), 8);
    }
    damage_add_area(base, reftable, 4, 8);
    damage_add_area(base, qb_ldbe64(data + reftable), MIN(base->cluster_size, 128), 1);
    if (qb_ldbe32(data + 60)) {
        damage_add_area(base, qb_ldbe64(data + 64), 30, 4);
    }
}

/* The directory of bitmaps, which an extension names, and the table of the first one. */
static void find_bitmaps(DamageBase *base)
{
    const uint8_t *data = base->image.data;
    size_t pos = qb_ldbe32(data + QCOW2_HDR_HEADER_LENGTH);
    uint32_t type;
    while ((type = qb_ldbe32(data + pos)) != QCOW2_EXT_BITMAPS) {
        if (!type) {
            return;
        }
        pos += 8 + qb_align_up(qb_ldbe32(data + pos + 4), 8);
    }
    uint64_t directory = qb_ldbe64(data + pos + 8 + 16), table = qb_ldbe64(data + directory);
    damage_add_area(base, pos, 8, 4);
    damage_add_area(base, directory, 24, 4);
    damage_add_area(base, table, 4, 8);
}

static void make_base(const Kind *kind)
{
    World *world = world_new(kind);
    DamageBase base = {.driver = "qcow2", .image = disk_save(disk_number("top"))};
    world_free(world);
    find_areas(&base);
    if (kind->flags & KIND_BITMAPS) {
        find_bitmaps(&base);
    }
    bases[nb_bases++] = base;
}

static void make_bases(void)
{
    disk_init();
    bases = g_new0(DamageBase, nb_kinds);
    for (unsigned i = 0; i < nb_kinds; i++) {
        if (!(kinds[i].flags & (KIND_BACKING | KIND_DATA_FILE | KIND_QED))) {
            make_base(&kinds[i]);
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!bases) {
        make_bases();
    }
    damage_run(bases, nb_bases, data, size);
    return 0;
}

void fuzz_seeds(void (*add)(const void *data, size_t size))
{
    make_bases();
    damage_seeds(bases, nb_bases, add);
}
