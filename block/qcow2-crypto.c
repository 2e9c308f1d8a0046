/*
 * What an encrypted image tells about itself without its key.
 *
 *     crypto extension --offset--> [ header, 592 bytes | key slots' material | ... ]   LUKS area
 *
 *     header   names of cipher, mode and hash; where the payload would begin; UUID; 8 slots
 *
 * Invariants
 *  1. The area is only read.  It is counted by check and kept by everything that moves or empties.
 *  2. A header that makes no sense is shown as far as it can be: facts that do not exist are left
 *     out, and nothing in it is trusted as a length.
 *
 * Not done: unlocking, and so reading and writing of guest data.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2.h"

#include <string.h>

enum {
    LUKS_HEADER = 592,
    LUKS_CIPHER = 8,
    LUKS_MODE = 40,
    LUKS_HASH = 72,
    LUKS_NAME = 32, /* bytes of each of these three */
    LUKS_PAYLOAD = 104,
    LUKS_KEY_BYTES = 108,
    LUKS_ITERATIONS = 164,
    LUKS_UUID = 168,
    LUKS_UUID_BYTES = 40,
    LUKS_SLOTS = 208,
    LUKS_NB_SLOTS = 8,
    LUKS_SLOT_BYTES = 48,
    SLOT_ITERATIONS = 4,
    SLOT_OFFSET = 40,
    SLOT_STRIPES = 44,
};
#define LUKS_SLOT_ACTIVE 0x00ac71f3u

/* A text that ends with a NUL or with its field; what cannot be printed is replaced. */
static char *field_text(const uint8_t *field, size_t bytes)
{
    char *text = g_strndup((const char *)field, bytes);
    for (char *c = text; *c; c++) {
        *c = g_ascii_isprint(*c) ? *c : '?';
    }
    return text;
}

static void set_text(json_t *data, const char *key, const char *text)
{
    json_object_set_new(data, key, json_string_nocheck(text));
}

static void set_number(json_t *data, const char *key, uint64_t number)
{
    json_object_set_new(data, key, json_integer((json_int_t)number));
}

/* "aes" and 64 bytes of key in XTS mode, which has two keys, are "aes-256". */
static char *cipher_name(const uint8_t *header, bool xts)
{
    g_autofree char *name = field_text(header + LUKS_CIPHER, LUKS_NAME);
    uint64_t bits = (uint64_t)qb_ldbe32(header + LUKS_KEY_BYTES) * 8 / (xts ? 2 : 1);
    return g_strdup_printf("%s-%" G_GUINT64_FORMAT, name, bits);
}

static json_t *slot_facts(const uint8_t *slot)
{
    bool active = qb_ldbe32(slot) == LUKS_SLOT_ACTIVE;
    json_t *facts = json_pack("{s:b}", "active", active);
    if (active) {
        set_number(facts, "iters", qb_ldbe32(slot + SLOT_ITERATIONS));
    }
    set_number(facts, "key-offset", (uint64_t)qb_ldbe32(slot + SLOT_OFFSET) * BDRV_SECTOR_SIZE);
    if (active) {
        set_number(facts, "stripes", qb_ldbe32(slot + SLOT_STRIPES));
    }
    return facts;
}

/* The mode's text is "MODE-GENERATOR" or "MODE-GENERATOR:HASH". */
json_t *qcow2_luks_facts(const uint8_t *header)
{
    g_autofree char *mode = field_text(header + LUKS_MODE, LUKS_NAME);
    g_autofree char *hash = field_text(header + LUKS_HASH, LUKS_NAME);
    g_autofree char *uuid = field_text(header + LUKS_UUID, LUKS_UUID_BYTES);
    g_auto(GStrv) parts = g_strsplit_set(mode, "-:", 3);
    guint n = g_strv_length(parts);
    g_autofree char *cipher = cipher_name(header, n && !strcmp(parts[0], "xts"));
    json_t *facts = json_object(), *slots = json_array();
    set_text(facts, "ivgen-alg", n > 1 ? parts[1] : "");
    if (n > 2) {
        set_text(facts, "ivgen-hash-alg", parts[2]);
    }
    set_text(facts, "hash-alg", hash);
    set_text(facts, "cipher-alg", cipher);
    set_text(facts, "uuid", uuid);
    set_text(facts, "format", "luks");
    set_text(facts, "cipher-mode", n ? parts[0] : "");
    for (int i = 0; i < LUKS_NB_SLOTS; i++) {
        const uint8_t *slot = header + LUKS_SLOTS + i * LUKS_SLOT_BYTES;
        json_array_append_new(slots, slot_facts(slot));
    }
    json_object_set_new(facts, "slots", slots);
    set_number(facts, "payload-offset", (uint64_t)qb_ldbe32(header + LUKS_PAYLOAD) *
                                            BDRV_SECTOR_SIZE);
    set_number(facts, "master-key-iters", qb_ldbe32(header + LUKS_ITERATIONS));
    return facts;
}

static uint64_t area_offset(BDRVQcow2State *s)
{
    QB_GUARD(&s->header_lock);
    const Qcow2Extension *ext = qcow2_find_extension(s->extensions, QCOW2_EXT_CRYPTO);
    return ext && ext->length == 16 ? qb_ldbe64(ext->data) : 0;
}

/* Is it there, and a version 1 header? */
static bool read_header(BlockDriverState *bs, uint64_t offset, uint8_t *header)
{
    static const uint8_t magic[] = {'L', 'U', 'K', 'S', 0xba, 0xbe, 0, 1};
    int64_t length = bdrv_getlength(bs->file->bs);
    return offset && length >= LUKS_HEADER && offset <= (uint64_t)length - LUKS_HEADER &&
           bdrv_pread(bs->file, (int64_t)offset, LUKS_HEADER, header, 0) == 0 &&
           !memcmp(header, magic, sizeof(magic));
}

json_t *qcow2_crypto_facts(BlockDriverState *bs)
{
    BDRVQcow2State *s = qcow2_state(bs);
    uint8_t header[LUKS_HEADER];
    if (s->crypt_method != QCOW2_CRYPT_LUKS) {
        return s->crypt_method ? json_pack("{s:s}", "format", "aes") : NULL;
    }
    return read_header(bs, area_offset(s), header) ? qcow2_luks_facts(header)
                                                   : json_pack("{s:s}", "format", "luks");
}
