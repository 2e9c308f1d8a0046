/*
 * Fuzz target: the LUKS header of an encrypted image, of which names and numbers are shown.
 *
 *      input   | magic, version | names of cipher, mode, hash | ... | 8 key slots |   592 bytes
 *
 * A shorter input is the beginning of such a header.
 *
 * SPDX-License-Identifier: MIT
 */
#include <string.h>
#include "block/qcow2.h"
#include "tests/fuzz/fuzz.h"

#define LUKS_HEADER 592

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint8_t header[LUKS_HEADER] = {0};
    memcpy(header, data, MIN(size, sizeof(header)));
    json_t *facts = qcow2_luks_facts(header);
    g_autofree char *text = json_dumps(facts, 0);
    if (!text) {
        abort(); /* what is shown must be text */
    }
    json_decref(facts);
    return 0;
}

static void add_header(const char *mode, uint32_t active,
                       void (*add)(const void *data, size_t size))
{
    uint8_t header[LUKS_HEADER] = {'L', 'U', 'K', 'S', 0xba, 0xbe, 0, 1};
    strcpy((char *)header + 8, "aes");
    strcpy((char *)header + 40, mode);
    strcpy((char *)header + 72, "sha256");
    qb_stbe32(header + 104, 4040);
    qb_stbe32(header + 108, 64);
    qb_stbe32(header + 164, 1000);
    strcpy((char *)header + 168, "6d2a2e5c-7bb5-4f25-9a3f-7f9d1c1f7a11");
    for (unsigned i = 0; i < 8; i++) {
        qb_stbe32(header + 208 + 48 * i, i < active ? 0x00ac71f3 : 0x0000dead);
    }
    add(header, sizeof(header));
}

void fuzz_seeds(void (*add)(const void *data, size_t size))
{
    add_header("xts-plain64", 1, add);
    add_header("cbc-essiv:sha256", 8, add);
    add_header("", 0, add);
}
