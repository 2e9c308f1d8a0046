/*
 * A program as a user of the installed library writes it: creates an image, writes, reads back.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdio.h>
#include <string.h>
#include <block/block-backend.h>
#include <block/info.h>
#include <util/error.h>

int main(int argc, char **argv)
{
    const char *file = argc > 1 ? argv[1] : "consumer.qcow2";
    char in[4096], out[4096] = {0};
    GError *err = NULL;
    json_t *options = json_pack("{s:I}", "size", (json_int_t)1 << 20);
    BlockBackend *blk;
    int ret;

    bdrv_init();
    if (!bdrv_img_create(file, "qcow2", options, NULL, &err)) {
        fprintf(stderr, "create: %s\n", err->message);
        return 1;
    }
    json_decref(options);
    blk = blk_new_open(file, NULL, BDRV_O_RDWR, &err);
    if (!blk) {
        fprintf(stderr, "open: %s\n", err->message);
        return 1;
    }
    memset(in, 0x5a, sizeof(in));
    ret = blk_pwrite(blk, 12345, sizeof(in), in, 0);
    if (ret == 0) {
        ret = blk_pread(blk, 12345, sizeof(out), out, 0);
    }
    blk_unref(blk);
    if (ret < 0 || memcmp(in, out, sizeof(in)) != 0) {
        fprintf(stderr, "content: %d\n", ret);
        return 1;
    }
    return 0;
}
