/*
 * Fuzz target: the header of a qcow2 image and its extensions, as bytes.
 *
 * What decodes and is valid must come back the same from encode.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdlib.h>
#include <string.h>
#include "block/qcow2.h"
#include "tests/fuzz/fuzz.h"
#include "util/endian.h"

#define HEADER_BYTES 112

static void header_round_trip(const Qcow2Header *header)
{
    uint8_t buf[HEADER_BYTES] = {0};
    Qcow2Header again;
    qcow2_header_encode(header, buf);
    bool same = qcow2_header_decode(buf, sizeof(buf), &again, NULL) &&
                again.size == header->size && again.l1_offset == header->l1_offset &&
                again.incompatible == header->incompatible;
    if (!same) {
        abort();
    }
}

static void extensions_round_trip(const GArray *extensions)
{
    size_t length = qcow2_extensions_length(extensions);
    g_autofree uint8_t *buf = g_malloc0(length);
    g_autoptr(GArray) again = qcow2_extensions_new();
    qcow2_extensions_encode(extensions, buf);
    if (!qcow2_extensions_decode(buf, 0, length, again, NULL) || again->len != extensions->len) {
        abort();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    g_autoptr(GArray) extensions = qcow2_extensions_new();
    Qcow2Header header;
    if (!qcow2_header_decode(data, size, &header, NULL) ||
        !qcow2_header_validate_layout(&header, NULL)) {
        return 0;
    }
    if (qcow2_header_validate(&header, false, NULL)) {
        header_round_trip(&header);
    }
    size_t end = MIN(size, qcow2_extensions_end(&header));
    if (header.header_length <= end &&
        qcow2_extensions_decode(data, header.header_length, end, extensions, NULL)) {
        qcow2_extensions_validate(&header, extensions, NULL);
        g_free(qcow2_unknown_feature_names(extensions, UINT64_MAX));
        extensions_round_trip(extensions);
    }
    return 0;
}

static void fill(uint8_t *buf, uint32_t version, uint32_t length)
{
    const Qcow2Header header = {
        .version = version, .cluster_bits = 16, .size = UINT64_C(1) << 30, .l1_size = 2,
        .l1_offset = 0x30000, .reftable_offset = 0x10000, .reftable_clusters = 1,
        .refcount_order = 4, .header_length = length,
    };
    qcow2_header_encode(&header, buf);
}

void fuzz_seeds(void (*add)(const void *data, size_t size))
{
    uint8_t buf[640] = {0};
    uint32_t length;
    g_autofree uint8_t *names = qcow2_feature_table(&length);

    fill(buf, 2, 72);
    add(buf, 72 + 8);
    fill(buf, 3, HEADER_BYTES);
    add(buf, HEADER_BYTES + 8);
    qb_stbe32(buf + HEADER_BYTES, QCOW2_EXT_FEATURE_TABLE);
    qb_stbe32(buf + HEADER_BYTES + 4, length);
    memcpy(buf + HEADER_BYTES + 8, names, length);
    add(buf, HEADER_BYTES + 8 + length + 8);
}
