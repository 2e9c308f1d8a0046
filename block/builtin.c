/*
 * The built-in drivers, in the order in which their formats are probed and listed.
 *
 * This file is linked with the drivers and not with the core, since it knows them by name.
 *
 * SPDX-License-Identifier: MIT
 */
#include <pthread.h>
#include "block/driver.h"

static const BlockDriver *const builtin[] = {
    &bdrv_file, &bdrv_host_device, &bdrv_blkdebug, &bdrv_null_co, &bdrv_null_aio, &bdrv_scratch,
    &bdrv_qcow2, &bdrv_qed, &bdrv_raw,
};

static void register_all(void)
{
    for (size_t i = 0; i < G_N_ELEMENTS(builtin); i++) {
        bdrv_register(builtin[i]);
    }
}

void bdrv_init(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, register_all);
}
