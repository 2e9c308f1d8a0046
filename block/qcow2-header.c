/*
 * The qcow2 header as data: bytes <-> struct, rules, extensions.  Pure functions, no I/O, no locks.
 *
 *   cluster 0
 *   0            header_length                                                cluster_size
 *   +-------------+-----------+-----------+-----+-------------+--------------+
 *   | fixed fields| extension | extension | end | backing name| not reached  |
 *   +-------------+-----------+-----------+-----+-------------+--------------+
 *    72 or >= 104   type u32, length u32, data, zeroes up to 8 bytes
 *
 * Invariants
 *  1. decode() judges the magic and the version only, so that a tool can show a header it would
 *     refuse.
 *  2. validate_layout() holds before anybody looks at extensions; unknown features are reported
 *     before validate() judges fields whose meaning they may have changed.
 *  3. A field that the header is too short to hold is 0, or for version 2 what version 2 implies.
 *  4. encode(decode(x)) gives x back for every field this driver knows; what lies behind
 *     QCOW2_HDR_V3_LENGTH, and extensions it does not know, are carried along as bytes.
 *
 * Not done: header_length need not be a multiple of 8 and an extension type may come twice (the
 * later one counts): other writers do so, and nothing here depends on it.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2.h"

#include <inttypes.h>
#include <string.h>

#include "util/iov.h"

/* ---------------------------------------------------------------- fixed fields */

static void decode_v3(const uint8_t *buf, Qcow2Header *h)
{
    h->incompatible = qb_ldbe64(buf + QCOW2_HDR_INCOMPATIBLE);
    h->compatible = qb_ldbe64(buf + QCOW2_HDR_COMPATIBLE);
    h->autoclear = qb_ldbe64(buf + QCOW2_HDR_AUTOCLEAR);
    h->refcount_order = qb_ldbe32(buf + QCOW2_HDR_REFCOUNT_ORDER);
    h->header_length = qb_ldbe32(buf + QCOW2_HDR_HEADER_LENGTH);
    h->compression_type = h->header_length > QCOW2_HDR_COMPRESSION ? buf[QCOW2_HDR_COMPRESSION] : 0;
}

static void decode_v2(Qcow2Header *h)
{
    h->incompatible = h->compatible = h->autoclear = 0;
    h->refcount_order = 4;
    h->header_length = QCOW2_HDR_V2_LENGTH;
    h->compression_type = QCOW2_COMPRESSION_ZLIB;
}

static void decode_common(const uint8_t *buf, Qcow2Header *h)
{
    h->backing_offset = qb_ldbe64(buf + QCOW2_HDR_BACKING_OFFSET);
    h->backing_size = qb_ldbe32(buf + QCOW2_HDR_BACKING_SIZE);
    h->cluster_bits = qb_ldbe32(buf + QCOW2_HDR_CLUSTER_BITS);
    h->size = qb_ldbe64(buf + QCOW2_HDR_SIZE);
    h->crypt_method = qb_ldbe32(buf + QCOW2_HDR_CRYPT);
    h->l1_size = qb_ldbe32(buf + QCOW2_HDR_L1_SIZE);
    h->l1_offset = qb_ldbe64(buf + QCOW2_HDR_L1_OFFSET);
    h->reftable_offset = qb_ldbe64(buf + QCOW2_HDR_REFTABLE_OFFSET);
    h->reftable_clusters = qb_ldbe32(buf + QCOW2_HDR_REFTABLE_CLUSTERS);
    h->nb_snapshots = qb_ldbe32(buf + QCOW2_HDR_NB_SNAPSHOTS);
    h->snapshots_offset = qb_ldbe64(buf + QCOW2_HDR_SNAPSHOTS_OFFSET);
}

bool qcow2_header_decode(const uint8_t *buf, size_t len, Qcow2Header *ret, GError **errp)
{
    uint8_t raw[QCOW2_HDR_V3_LENGTH] = {0};
    memcpy(raw, buf, MIN(len, sizeof(raw)));
    if (qb_ldbe32(raw + QCOW2_HDR_MAGIC) != QCOW2_MAGIC) {
        qb_error_set(errp, EINVAL, "Image is not in qcow2 format");
        return false;
    }
    uint32_t version = qb_ldbe32(raw + QCOW2_HDR_VERSION);
    if (version < 2 || version > 3) {
        qb_error_set(errp, ENOTSUP, "Unsupported qcow2 version %" PRIu32, version);
        return false;
    }
    Qcow2Header h = {.version = version};
    decode_common(raw, &h);
    if (version == 2) {
        decode_v2(&h);
    } else {
        decode_v3(raw, &h);
    }
    *ret = h;
    return true;
}

void qcow2_header_encode(const Qcow2Header *h, uint8_t *buf)
{
    assert(h->version == 2 || h->version == 3);
    memset(buf, 0, h->version == 2 ? QCOW2_HDR_V2_LENGTH : QCOW2_HDR_V3_LENGTH);
    qb_stbe32(buf + QCOW2_HDR_MAGIC, QCOW2_MAGIC);
    qb_stbe32(buf + QCOW2_HDR_VERSION, h->version);
    qb_stbe64(buf + QCOW2_HDR_BACKING_OFFSET, h->backing_offset);
    qb_stbe32(buf + QCOW2_HDR_BACKING_SIZE, h->backing_size);
    qb_stbe32(buf + QCOW2_HDR_CLUSTER_BITS, h->cluster_bits);
    qb_stbe64(buf + QCOW2_HDR_SIZE, h->size);
    qb_stbe32(buf + QCOW2_HDR_CRYPT, h->crypt_method);
    qb_stbe32(buf + QCOW2_HDR_L1_SIZE, h->l1_size);
    qb_stbe64(buf + QCOW2_HDR_L1_OFFSET, h->l1_offset);
    qb_stbe64(buf + QCOW2_HDR_REFTABLE_OFFSET, h->reftable_offset);
    qb_stbe32(buf + QCOW2_HDR_REFTABLE_CLUSTERS, h->reftable_clusters);
    qb_stbe32(buf + QCOW2_HDR_NB_SNAPSHOTS, h->nb_snapshots);
    qb_stbe64(buf + QCOW2_HDR_SNAPSHOTS_OFFSET, h->snapshots_offset);
    if (h->version >= 3) {
        qb_stbe64(buf + QCOW2_HDR_INCOMPATIBLE, h->incompatible);
        qb_stbe64(buf + QCOW2_HDR_COMPATIBLE, h->compatible);
        qb_stbe64(buf + QCOW2_HDR_AUTOCLEAR, h->autoclear);
        qb_stbe32(buf + QCOW2_HDR_REFCOUNT_ORDER, h->refcount_order);
        qb_stbe32(buf + QCOW2_HDR_HEADER_LENGTH, h->header_length);
        buf[QCOW2_HDR_COMPRESSION] = h->compression_type;
    }
}

/* ---------------------------------------------------------------- rules */

static bool fail(GError **errp, int err, const char *text)
{
    qb_error_set(errp, err, "%s", text);
    return false;
}

static uint32_t header_cluster_size(const Qcow2Header *h)
{
    assert(h->cluster_bits <= QCOW2_MAX_CLUSTER_BITS);
    return UINT32_C(1) << h->cluster_bits;
}

static bool validate_backing_name(const Qcow2Header *h, GError **errp)
{
    uint32_t cluster_size = header_cluster_size(h);
    if (h->backing_offset > cluster_size) {
        return fail(errp, EINVAL, "Invalid backing file offset");
    }
    if (h->backing_offset && (h->backing_size > QCOW2_MAX_BACKING_NAME ||
                              h->backing_size > cluster_size - h->backing_offset)) {
        return fail(errp, EINVAL, "Backing file name too long");
    }
    return true;
}

bool qcow2_header_validate_layout(const Qcow2Header *h, GError **errp)
{
    if (h->cluster_bits < QCOW2_MIN_CLUSTER_BITS || h->cluster_bits > QCOW2_MAX_CLUSTER_BITS) {
        qb_error_set(errp, EINVAL, "Unsupported cluster size: 2^%" PRIu32, h->cluster_bits);
        return false;
    }
    if (h->version >= 3 && h->header_length < QCOW2_HDR_V3_MIN_LENGTH) {
        return fail(errp, EINVAL, "qcow2 header too short");
    }
    if (h->header_length > header_cluster_size(h)) {
        return fail(errp, EINVAL, "qcow2 header exceeds cluster size");
    }
    return validate_backing_name(h, errp);
}

static bool validate_compression(const Qcow2Header *h, GError **errp)
{
    if (h->compression_type > QCOW2_COMPRESSION_ZSTD) {
        qb_error_set(errp, ENOTSUP, "qcow2: unknown compression type: %u", h->compression_type);
        return false;
    }
    bool bit = h->incompatible & QCOW2_INCOMPAT_COMPRESSION;
    if (bit && h->compression_type == QCOW2_COMPRESSION_ZLIB) {
        return fail(errp, EINVAL,
                    "qcow2: Compression type incompatible feature bit must not be set");
    }
    if (!bit && h->compression_type != QCOW2_COMPRESSION_ZLIB) {
        return fail(errp, EINVAL, "qcow2: Compression type incompatible feature bit must be set");
    }
    return true;
}

static bool validate_features(const Qcow2Header *h, GError **errp)
{
    if (!validate_compression(h, errp)) {
        return false;
    }
    uint32_t subcluster = header_cluster_size(h) / QCOW2_SUBCLUSTERS;
    if ((h->incompatible & QCOW2_INCOMPAT_EXTL2) && subcluster < BDRV_SECTOR_SIZE) {
        qb_error_set(errp, EINVAL, "Unsupported subcluster size: %" PRIu32, subcluster);
        return false;
    }
    if ((h->autoclear & QCOW2_AUTOCLEAR_DATA_FILE_RAW) &&
        !(h->incompatible & QCOW2_INCOMPAT_DATA_FILE)) {
        return fail(errp, EINVAL, "data-file-raw requires a data file");
    }
    if (h->refcount_order > 6) {
        return fail(errp, EINVAL,
                    "Reference count entry width too large; may not exceed 64 bits");
    }
    if (h->crypt_method > QCOW2_CRYPT_LUKS) {
        qb_error_set(errp, EINVAL, "Unsupported encryption method %" PRIu32, h->crypt_method);
        return false;
    }
    return true;
}

/* A table's place: cluster aligned, not on the header, and its end a number. */
static bool validate_place(const Qcow2Header *h, const char *name, uint64_t offset, uint64_t bytes,
                           GError **errp)
{
    bool missing = bytes && !offset;
    if (missing || !qb_is_aligned(offset, header_cluster_size(h)) ||
        offset > (uint64_t)INT64_MAX - bytes) {
        qb_error_set(errp, EINVAL, "%s offset invalid", name);
        return false;
    }
    return true;
}

static bool validate_reftable(const Qcow2Header *h, bool for_check, GError **errp)
{
    if (for_check) {
        return true; /* a repair makes a new one */
    }
    if (!h->reftable_clusters) {
        return fail(errp, EINVAL, "Image does not contain a reference count table");
    }
    uint64_t bytes = (uint64_t)h->reftable_clusters << h->cluster_bits;
    if (bytes > QCOW2_MAX_REFTABLE_BYTES) {
        return fail(errp, EFBIG, "Reference count table too large");
    }
    return validate_place(h, "Reference count table", h->reftable_offset, bytes, errp);
}

static bool validate_snapshot_table(const Qcow2Header *h, bool for_check, GError **errp)
{
    if (h->nb_snapshots > QCOW2_MAX_SNAPSHOTS && !for_check) {
        return fail(errp, EFBIG, "Snapshot table too large");
    }
    if (for_check && (!h->nb_snapshots || !h->snapshots_offset)) {
        return true; /* a repair forgets the place or the number */
    }
    return validate_place(h, "Snapshot table", h->snapshots_offset, h->nb_snapshots, errp);
}

/* L1 entries that the size needs, rounded up: cannot overflow, size is shifted down by 15 bits at
 * least. */
static uint64_t needed_l1_entries(const Qcow2Header *h)
{
    unsigned entry_bits = h->incompatible & QCOW2_INCOMPAT_EXTL2 ? 4 : 3;
    unsigned shift = h->cluster_bits + h->cluster_bits - entry_bits;
    return (h->size >> shift) + ((h->size & ((UINT64_C(1) << shift) - 1)) != 0);
}

static bool validate_l1(const Qcow2Header *h, bool for_check, GError **errp)
{
    if (h->l1_size > QCOW2_MAX_L1_BYTES / 8) {
        return fail(errp, EFBIG, "Active L1 table too large");
    }
    if (!validate_place(h, "Active L1 table", h->l1_offset, (uint64_t)h->l1_size * 8, errp)) {
        return false;
    }
    uint64_t needed = needed_l1_entries(h);
    if (needed > INT32_MAX || h->size > INT64_MAX) {
        return fail(errp, EFBIG, "Image is too big");
    }
    if (h->l1_size < needed && !for_check) {
        return fail(errp, EINVAL, "L1 table is too small");
    }
    return true;
}

bool qcow2_header_validate(const Qcow2Header *h, bool for_check, GError **errp)
{
    return qcow2_header_validate_layout(h, errp) && validate_features(h, errp) &&
           validate_reftable(h, for_check, errp) && validate_snapshot_table(h, for_check, errp) &&
           validate_l1(h, for_check, errp);
}

/* ---------------------------------------------------------------- extensions */

void qcow2_extension_clear(Qcow2Extension *ext)
{
    g_clear_pointer(&ext->data, g_free);
    ext->length = 0;
}

GArray *qcow2_extensions_new(void)
{
    GArray *extensions = g_array_new(false, true, sizeof(Qcow2Extension));
    g_array_set_clear_func(extensions, (GDestroyNotify)qcow2_extension_clear);
    return extensions;
}

void qcow2_extensions_add(GArray *extensions, uint32_t type, const void *data, uint32_t length)
{
    Qcow2Extension ext = {.type = type, .length = length, .data = g_malloc(length + (size_t)1)};
    memcpy(ext.data, length ? data : "", length);
    ext.data[length] = 0; /* so that text can be used as text */
    g_array_append_val(extensions, ext);
}

void qcow2_extensions_set(GArray *extensions, uint32_t type, const void *data, uint32_t length)
{
    for (guint i = extensions->len; i > 0; i--) {
        if (g_array_index(extensions, Qcow2Extension, i - 1).type == type) {
            g_array_remove_index(extensions, i - 1);
        }
    }
    if (data) {
        qcow2_extensions_add(extensions, type, data, length);
    }
}

size_t qcow2_extensions_end(const Qcow2Header *h)
{
    return h->backing_offset ? h->backing_offset : header_cluster_size(h);
}

bool qcow2_extensions_decode(const uint8_t *cluster0, size_t start, size_t end, GArray *ret,
                             GError **errp)
{
    size_t pos = start;
    while (pos < end && end - pos >= 8) {
        uint32_t type = qb_ldbe32(cluster0 + pos);
        uint32_t length = qb_ldbe32(cluster0 + pos + 4);
        pos += 8;
        if (type == QCOW2_EXT_END) {
            return true;
        }
        if (length > end - pos) {
            return fail(errp, EINVAL, "Header extension too large");
        }
        qcow2_extensions_add(ret, type, cluster0 + pos, length);
        pos += qb_align_up(length, 8);
    }
    return true;
}

static size_t extension_bytes(const Qcow2Extension *ext)
{
    return 8 + qb_align_up(ext->length, 8);
}

size_t qcow2_extensions_length(const GArray *extensions)
{
    size_t length = 8; /* the end marker */
    for (guint i = 0; i < extensions->len; i++) {
        length += extension_bytes(&g_array_index(extensions, Qcow2Extension, i));
    }
    return length;
}

void qcow2_extensions_encode(const GArray *extensions, uint8_t *buf)
{
    memset(buf, 0, qcow2_extensions_length(extensions));
    for (guint i = 0; i < extensions->len; i++) {
        const Qcow2Extension *ext = &g_array_index(extensions, Qcow2Extension, i);
        qb_stbe32(buf, ext->type);
        qb_stbe32(buf + 4, ext->length);
        memcpy(buf + 8, ext->data, ext->length);
        buf += extension_bytes(ext);
    }
}

const Qcow2Extension *qcow2_find_extension(const GArray *extensions, uint32_t type)
{
    for (guint i = extensions->len; i > 0; i--) {
        const Qcow2Extension *ext = &g_array_index(extensions, Qcow2Extension, i - 1);
        if (ext->type == type) {
            return ext;
        }
    }
    return NULL;
}

static bool validate_crypto_extension(const Qcow2Header *h, const Qcow2Extension *ext,
                                      GError **errp)
{
    if (!ext) {
        return h->crypt_method != QCOW2_CRYPT_LUKS ||
               fail(errp, EINVAL, "Header extension for LUKS encryption is missing");
    }
    if (h->crypt_method != QCOW2_CRYPT_LUKS) {
        return fail(errp, EINVAL,
                    "CRYPTO header extension only expected with LUKS encryption method");
    }
    if (ext->length != 16) {
        qb_error_set(errp, EINVAL, "CRYPTO header extension size %" PRIu32 ", but expected size 16",
                     ext->length);
        return false;
    }
    return validate_place(h, "Encryption header", qb_ldbe64(ext->data), qb_ldbe64(ext->data + 8),
                          errp);
}

static bool validate_bitmaps_counts(const Qcow2Header *h, const Qcow2Extension *ext, GError **errp)
{
    uint32_t nb = qb_ldbe32(ext->data);
    uint64_t dir_size = qb_ldbe64(ext->data + 8);
    if (!nb) {
        return fail(errp, EINVAL, "found bitmaps extension with zero bitmaps");
    }
    if (nb > QCOW2_MAX_BITMAPS) {
        qb_error_set(errp, EINVAL,
                     "bitmaps_ext: Image has %" PRIu32 " bitmaps, exceeding the supported maximum"
                     " of %u", nb, QCOW2_MAX_BITMAPS);
        return false;
    }
    if (dir_size > QCOW2_MAX_BITMAP_DIRECTORY_BYTES) {
        qb_error_set(errp, EINVAL,
                     "bitmaps_ext: bitmap directory size (%" PRIu64 ") exceeds the maximum"
                     " supported size (%u)", dir_size, QCOW2_MAX_BITMAP_DIRECTORY_BYTES);
        return false;
    }
    uint64_t dir_offset = qb_ldbe64(ext->data + 16);
    if (!dir_offset || !qb_is_aligned(dir_offset, header_cluster_size(h))) {
        return fail(errp, EINVAL, "bitmaps_ext: invalid bitmap directory offset");
    }
    return true;
}

/* Without the autoclear bit the extension means nothing, and version 2 has no bitmaps. */
static bool validate_bitmaps_extension(const Qcow2Header *h, const Qcow2Extension *ext,
                                       GError **errp)
{
    if (!ext || h->version < 3 || !(h->autoclear & QCOW2_AUTOCLEAR_BITMAPS)) {
        return true;
    }
    if (ext->length != 24) {
        return fail(errp, EINVAL, "bitmaps_ext: Invalid extension length");
    }
    if (qb_ldbe32(ext->data + 4)) {
        return fail(errp, EINVAL, "bitmaps_ext: Reserved field is not zero");
    }
    return validate_bitmaps_counts(h, ext, errp);
}

bool qcow2_extensions_validate(const Qcow2Header *h, const GArray *extensions, GError **errp)
{
    const Qcow2Extension *format = qcow2_find_extension(extensions, QCOW2_EXT_BACKING_FORMAT);
    if (format && format->length > QCOW2_MAX_BACKING_FORMAT) {
        return fail(errp, EINVAL, "Backing format name too long");
    }
    return validate_crypto_extension(h, qcow2_find_extension(extensions, QCOW2_EXT_CRYPTO), errp) &&
           validate_bitmaps_extension(h, qcow2_find_extension(extensions, QCOW2_EXT_BITMAPS), errp);
}

/* ---------------------------------------------------------------- feature names */

/* The image's own name for incompatible feature @bit, printable; NULL when the table has none. */
static char *feature_name(const Qcow2Extension *table, unsigned bit)
{
    for (size_t i = 0; table && i < table->length / QCOW2_FEATURE_ENTRY_BYTES; i++) {
        const uint8_t *entry = table->data + i * QCOW2_FEATURE_ENTRY_BYTES;
        if (entry[0] != 0 || entry[1] != bit) {
            continue;
        }
        char *name = g_strndup((const char *)entry + 2, QCOW2_FEATURE_ENTRY_BYTES - 2);
        for (char *c = name; *c; c++) {
            *c = g_ascii_isprint(*c) ? *c : '?';
        }
        return name;
    }
    return NULL;
}

char *qcow2_unknown_feature_names(const GArray *extensions, uint64_t unknown)
{
    const Qcow2Extension *table = qcow2_find_extension(extensions, QCOW2_EXT_FEATURE_TABLE);
    GString *text = g_string_new("Unsupported qcow2 feature(s): ");
    const char *comma = "";
    for (unsigned bit = 0; bit < 64; bit++) {
        g_autofree char *name = (unknown >> bit) & 1 ? feature_name(table, bit) : NULL;
        if (name) {
            g_string_append_printf(text, "%s%s", comma, name);
            comma = ", ";
            unknown &= ~(UINT64_C(1) << bit);
        }
    }
    if (unknown) {
        g_string_append_printf(text, "%sUnknown incompatible feature: %" PRIx64, comma, unknown);
    }
    return g_string_free(text, false);
}

uint8_t *qcow2_feature_table(uint32_t *ret_length)
{
    static const struct {
        uint8_t type, bit;
        const char *name;
    } features[] = {
        {0, 0, "dirty bit"},        {0, 1, "corrupt bit"},         {0, 2, "external data file"},
        {0, 3, "compression type"}, {0, 4, "extended L2 entries"}, {1, 0, "lazy refcounts"},
        {2, 0, "bitmaps"},          {2, 1, "raw external data"},
    };
    uint8_t *table = g_malloc0(G_N_ELEMENTS(features) * QCOW2_FEATURE_ENTRY_BYTES);
    for (size_t i = 0; i < G_N_ELEMENTS(features); i++) {
        uint8_t *entry = table + i * QCOW2_FEATURE_ENTRY_BYTES;
        entry[0] = features[i].type;
        entry[1] = features[i].bit;
        memcpy(entry + 2, features[i].name, strlen(features[i].name));
    }
    *ret_length = G_N_ELEMENTS(features) * QCOW2_FEATURE_ENTRY_BYTES;
    return table;
}

/* ---------------------------------------------------------------- a fresh cluster 0 */

bool qcow2_header_layout(const Qcow2Header *h, const GArray *extensions, const char *backing_file,
                         uint8_t *cluster0, size_t cluster_size, Qcow2Header *ret, GError **errp)
{
    Qcow2Header out = *h;
    out.header_length = h->version == 2 ? QCOW2_HDR_V2_LENGTH : QCOW2_HDR_V3_LENGTH;
    size_t name_len = backing_file ? strlen(backing_file) : 0;
    size_t name_pos = out.header_length + qcow2_extensions_length(extensions);
    if (name_len > QCOW2_MAX_BACKING_NAME) {
        return fail(errp, EINVAL, "Backing file name too long");
    }
    if (name_pos > cluster_size || name_len > cluster_size - name_pos) {
        return fail(errp, ENOSPC, "No space left in the file header");
    }
    out.backing_offset = name_len ? name_pos : 0;
    out.backing_size = name_len;
    memset(cluster0, 0, cluster_size);
    qcow2_header_encode(&out, cluster0);
    qcow2_extensions_encode(extensions, cluster0 + out.header_length);
    memcpy(cluster0 + name_pos, name_len ? backing_file : "", name_len);
    *ret = out;
    return true;
}
