/*
 * Fuzz target: whole QED images with fields changed (damage.c).
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdlib.h>
#include <string.h>
#include "block/block-backend.h"
#include "tests/fuzz/damage.h"
#include "tests/fuzz/fuzz.h"
#include "util/endian.h"

#define CLUSTER 4096

static DamageBase base = {.driver = "qed", .little_endian = true, .cluster_size = CLUSTER};

static void fill_image(void)
{
    json_t *options = json_pack("{ssssss}", "driver", "qed", "file.driver", "test-disk",
                                "file.disk", "top");
    BlockBackend *blk = blk_new_open(NULL, options, BDRV_O_RDWR | BDRV_O_RESIZE, NULL);
    static uint8_t buf[40 * CLUSTER];
    memset(buf, 0x5a, sizeof(buf));
    if (!blk || blk_pwrite(blk, 3 * CLUSTER, sizeof(buf), buf, 0) < 0 ||
        blk_pwrite_zeroes(blk, 10 * CLUSTER, 4 * CLUSTER, 0) < 0) {
        abort();
    }
    blk_unref(blk);
}

static void make_base(void)
{
    g_autoptr(json_t) options = json_pack("{sisiss}", "cluster_size", CLUSTER, "table_size", 1,
                                          "size", "1M");
    disk_init();
    disk_number("top");
    if (!bdrv_img_create("test-disk:top", "qed", options, NULL, NULL)) {
        abort();
    }
    fill_image();
    base.image = disk_save(disk_number("top"));
    uint64_t l1 = qb_ldle64(base.image.data + 40);
    damage_add_area(&base, 0, 16, 4);
    damage_add_area(&base, 16, 6, 8);
    damage_add_area(&base, l1, 8, 8);
    damage_add_area(&base, qb_ldle64(base.image.data + l1), 48, 8);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!base.areas) {
        make_base();
    }
    damage_run(&base, 1, data, size);
    return 0;
}

void fuzz_seeds(void (*add)(const void *data, size_t size))
{
    make_base();
    damage_seeds(&base, 1, add);
}
