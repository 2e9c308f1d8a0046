/*
 * The fields of an image's metadata, and hostile values for them.
 *
 *   header, extensions
 *   refcount table --> blocks          a field per entry that is used, and a few that are not
 *   L1s (active, snapshots) --> L2s
 *   snapshot table
 *   bitmap directory --> bitmap tables
 *
 *   case number = field * VALUES + value
 *
 * The image is sound, so nothing is checked while walking it but the end of the file.
 *
 * SPDX-License-Identifier: MIT
 */
#include "damage-fields.h"

#include <inttypes.h>
#include <stdbool.h>
#include <string.h>
#include "block/qcow2-format.h"
#include "util/endian.h"

enum {
    ENTRIES_PER_TABLE = 24, /* used ones that become fields, of each table */
    UNUSED_PER_TABLE = 2,
    VALUES = 20,
    VERSION_3 = 3,
};

typedef struct Named {
    const char *name;
    unsigned pos, bytes;
} Named;

static const Named header_fields[] = {
    {"magic", 0, 4}, {"version", 4, 4}, {"backing offset", 8, 8}, {"backing size", 16, 4},
    {"cluster bits", 20, 4}, {"size", 24, 8}, {"crypt method", 32, 4}, {"l1 size", 36, 4},
    {"l1 offset", 40, 8}, {"refcount table offset", 48, 8}, {"refcount table clusters", 56, 4},
    {"nb snapshots", 60, 4}, {"snapshots offset", 64, 8},
    {"incompatible", 72, 8}, {"compatible", 80, 8}, {"autoclear", 88, 8},
    {"refcount order", 96, 4}, {"header length", 100, 4}, {"compression type", 104, 1},
};
enum { HEADER_FIELDS_V2 = 13 };

static const Named snapshot_fields[] = {
    {"l1 offset", 0, 8}, {"l1 size", 8, 4}, {"id length", 12, 2}, {"name length", 14, 2},
    {"date", 16, 8}, {"clock", 24, 8}, {"vm state size", 32, 4}, {"extra length", 36, 4},
    {"vm state size 64", 40, 8}, {"disk size", 48, 8}, {"icount", 56, 8}, {"strings", 64, 2},
};

static const Named bitmap_fields[] = {
    {"table offset", 0, 8}, {"table size", 8, 4}, {"flags", 12, 4}, {"type", 16, 1},
    {"granularity", 17, 1}, {"name length", 18, 2}, {"extra length", 20, 4}, {"name", 24, 1},
};

/* ---------------------------------------------------------------- bytes */

static uint64_t get(const DamageLayout *l, uint64_t pos, unsigned bytes)
{
    uint64_t value = 0;
    for (unsigned i = 0; i < bytes && pos + i < l->length; i++) {
        value = value << 8 | l->image[pos + i];
    }
    return value;
}

static void put(uint8_t *p, unsigned bytes, uint64_t value)
{
    for (unsigned i = bytes; i > 0; i--) {
        p[i - 1] = (uint8_t)value;
        value >>= 8;
    }
}

static void add_place(DamageLayout *l, uint64_t pos)
{
    g_array_append_val(l->places, pos);
}

static void clear_field(void *p)
{
    g_free(((DamageField *)p)->name);
}

static void add_field(DamageLayout *l, uint64_t pos, unsigned bytes, const char *fmt, ...)
    G_GNUC_PRINTF(4, 5);
static void add_field(DamageLayout *l, uint64_t pos, unsigned bytes, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    DamageField field = {g_strdup_vprintf(fmt, ap), pos, bytes};
    va_end(ap);
    if (pos + bytes <= l->length) {
        g_array_append_val(l->fields, field);
    } else {
        clear_field(&field);
    }
}

static void add_named(DamageLayout *l, uint64_t pos, const Named *list, size_t n, const char *what)
{
    for (size_t i = 0; i < n; i++) {
        add_field(l, pos + list[i].pos, list[i].bytes, "%s %s", what, list[i].name);
    }
}

/* Entries of 8 bytes of a table, with @step from one to the next; @fn (may be NULL) goes on from
 * those that are used. */
static void add_table(DamageLayout *l, const char *what, uint64_t pos, uint64_t n, unsigned step,
                      void (*fn)(DamageLayout *l, const char *what, uint64_t entry))
{
    unsigned used = 0, unused = 0;
    add_place(l, pos);
    for (uint64_t i = 0; i < n; i++) {
        uint64_t entry = get(l, pos + i * step, 8), second = get(l, pos + i * step + 8, 8);
        bool empty = !entry && (step == 8 || !second);
        if (empty ? unused++ >= UNUSED_PER_TABLE : used++ >= ENTRIES_PER_TABLE) {
            continue;
        }
        add_field(l, pos + i * step, 8, "%s[%" PRIu64 "]", what, i);
        if (step == 16) {
            add_field(l, pos + i * step + 8, 8, "%s[%" PRIu64 "].bitmap", what, i);
        }
        if (entry && fn) {
            fn(l, what, entry);
        }
    }
}

/* ---------------------------------------------------------------- structures */

static bool is_extended(const DamageLayout *l)
{
    return get(l, 4, 4) >= VERSION_3 && (get(l, QCOW2_HDR_INCOMPATIBLE, 8) & QCOW2_INCOMPAT_EXTL2);
}

static void data_of_entry(DamageLayout *l, const char *what, uint64_t entry)
{
    if (!(entry & QCOW2_ENTRY_COMPRESSED) && l->places->len < 64) {
        add_place(l, entry & QCOW2_ENTRY_OFFSET_MASK);
    }
}

static void l2_of_entry(DamageLayout *l, const char *what, uint64_t entry)
{
    unsigned step = is_extended(l) ? 16 : 8;
    g_autofree char *name = g_strdup_printf("%s -> L2", what);
    add_table(l, name, entry & QCOW2_ENTRY_OFFSET_MASK, l->cluster / step, step, data_of_entry);
}

static void block_of_entry(DamageLayout *l, const char *what, uint64_t entry)
{
    uint64_t order = get(l, 4, 4) >= VERSION_3 ? get(l, QCOW2_HDR_REFCOUNT_ORDER, 4) : 4;
    unsigned bytes = order > 3 ? 1u << (order - 3) : 1;
    uint64_t pos = entry & QCOW2_REFTABLE_OFFSET_MASK;
    add_place(l, pos);
    for (unsigned i = 0; i < 40 && i < l->cluster / bytes; i++) {
        add_field(l, pos + i * bytes, bytes, "refcount block at %#" PRIx64 "[%u]", pos, i);
    }
}

static void bitmap_table_entry(DamageLayout *l, const char *what, uint64_t entry)
{
    if (entry > 1) {
        add_place(l, entry);
    }
}

static void add_bitmaps(DamageLayout *l, uint64_t ext)
{
    uint64_t nb = get(l, ext, 4), pos = get(l, ext + QCOW2_BITMAP_EXT_DIR_OFFSET, 8);
    add_place(l, pos);
    for (uint64_t i = 0; i < nb && pos < l->length; i++) {
        g_autofree char *what = g_strdup_printf("bitmap %" PRIu64, i);
        add_named(l, pos, bitmap_fields, G_N_ELEMENTS(bitmap_fields), what);
        g_autofree char *table = g_strdup_printf("%s table", what);
        add_table(l, table, get(l, pos, 8), get(l, pos + 8, 4), 8, bitmap_table_entry);
        uint64_t names = get(l, pos + QCOW2_BITMAP_NAME_LENGTH, 2) +
                         get(l, pos + QCOW2_BITMAP_EXTRA_LENGTH, 4);
        pos += (QCOW2_BITMAP_FIXED + names + 7) / 8 * 8;
    }
}

static void add_extensions(DamageLayout *l)
{
    uint64_t pos = get(l, 4, 4) >= VERSION_3 ? get(l, QCOW2_HDR_HEADER_LENGTH, 4)
                                             : QCOW2_HDR_V2_LENGTH;
    uint64_t type = 1;
    for (unsigned i = 0; type && pos + 8 <= l->length; i++) {
        type = get(l, pos, 4);
        uint64_t length = get(l, pos + 4, 4);
        add_field(l, pos, 4, "extension %u type", i);
        add_field(l, pos + 4, 4, "extension %u length", i);
        for (unsigned word = 0; word < 3 && word * 8 < length; word++) {
            add_field(l, pos + 8 + word * 8, 8, "extension %u data %u", i, word);
        }
        if (type == QCOW2_EXT_BITMAPS) {
            add_bitmaps(l, pos + 8);
        }
        pos += 8 + (length + 7) / 8 * 8;
    }
}

static void add_snapshots(DamageLayout *l)
{
    uint64_t nb = get(l, QCOW2_HDR_NB_SNAPSHOTS, 4), pos = get(l, QCOW2_HDR_SNAPSHOTS_OFFSET, 8);
    if (nb) {
        add_place(l, pos);
    }
    for (uint64_t i = 0; i < nb; i++) {
        g_autofree char *what = g_strdup_printf("snapshot %" PRIu64, i);
        add_named(l, pos, snapshot_fields, G_N_ELEMENTS(snapshot_fields), what);
        g_autofree char *l1 = g_strdup_printf("%s L1", what);
        add_table(l, l1, get(l, pos, 8), get(l, pos + 8, 4), 8, l2_of_entry);
        uint64_t names = get(l, pos + 12, 2) + get(l, pos + 14, 2) + get(l, pos + 36, 4);
        pos += (40 + names + 7) / 8 * 8;
    }
}

DamageLayout *damage_layout_new(const uint8_t *image, size_t length)
{
    DamageLayout *l = g_new0(DamageLayout, 1);
    l->image = image;
    l->length = length;
    l->cluster = UINT64_C(1) << get(l, QCOW2_HDR_CLUSTER_BITS, 4);
    l->fields = g_array_new(false, false, sizeof(DamageField));
    g_array_set_clear_func(l->fields, clear_field);
    l->places = g_array_new(false, false, sizeof(uint64_t));
    bool v3 = get(l, 4, 4) >= VERSION_3;
    add_place(l, 0);
    add_named(l, 0, header_fields, v3 ? G_N_ELEMENTS(header_fields) : HEADER_FIELDS_V2, "header");
    add_extensions(l);
    add_table(l, "refcount table", get(l, QCOW2_HDR_REFTABLE_OFFSET, 8),
              get(l, QCOW2_HDR_REFTABLE_CLUSTERS, 4) * l->cluster / 8, 8, block_of_entry);
    add_table(l, "L1", get(l, QCOW2_HDR_L1_OFFSET, 8), get(l, QCOW2_HDR_L1_SIZE, 4), 8,
              l2_of_entry);
    add_snapshots(l);
    l->n_cases = (uint64_t)l->fields->len * VALUES;
    return l;
}

void damage_layout_free(DamageLayout *l)
{
    g_array_unref(l->fields);
    g_array_unref(l->places);
    g_free(l);
}

/* ---------------------------------------------------------------- damage */

/* Value @which for a field of @bytes that holds @old; @salt chooses among places. */
static uint64_t hostile_value(const DamageLayout *l, uint64_t old, unsigned bytes, unsigned which,
                              uint64_t salt)
{
    uint64_t flags = bytes == 8 ? old & (QCOW2_ENTRY_COPIED | QCOW2_ENTRY_COMPRESSED) : 0;
    uint64_t end = (l->length + l->cluster - 1) / l->cluster * l->cluster;
    uint64_t place = g_array_index(l->places, uint64_t, salt % l->places->len);
    uint64_t other = g_array_index(l->places, uint64_t, (salt * 7 + 3) % l->places->len);
    const uint64_t values[VALUES] = {
        0, UINT64_MAX, old + 1, old - 1, old + l->cluster, old - l->cluster, old + 512,
        flags | end, flags | (end + 3 * l->cluster), flags | (UINT64_C(1) << 50), flags | place,
        flags | other, old ^ 1, old ^ (UINT64_C(1) << 5), old ^ QCOW2_ENTRY_COMPRESSED,
        old ^ QCOW2_ENTRY_COPIED, old ^ (UINT64_C(1) << 57), old * 2, UINT64_MAX >> 1,
        UINT64_C(0x80000000),
    };
    return values[which];
}

static char *set_field(const DamageLayout *l, const DamageField *f, unsigned which, uint64_t salt,
                       uint8_t *data)
{
    uint64_t mask = f->bytes == 8 ? UINT64_MAX : (UINT64_C(1) << f->bytes * 8) - 1;
    uint64_t old = get(l, f->pos, f->bytes);
    uint64_t value = hostile_value(l, old, f->bytes, which, salt) & mask;
    put(data + f->pos, f->bytes, value);
    return g_strdup_printf("%s at %#" PRIx64 ": %#" PRIx64 " -> %#" PRIx64, f->name, f->pos, old,
                           value);
}

char *damage_field(const DamageLayout *l, uint64_t i, uint8_t *data, size_t length)
{
    g_assert_cmpuint(length, ==, l->length);
    const DamageField *f = &g_array_index(l->fields, DamageField, i / VALUES);
    return set_field(l, f, i % VALUES, i / VALUES, data);
}

static void damage_bytes(const DamageLayout *l, GRand *rand, uint8_t *data, GString *story)
{
    uint64_t place = g_array_index(l->places, uint64_t, g_rand_int(rand) % l->places->len);
    uint64_t pos = place + g_rand_int(rand) % MIN(l->cluster, 512);
    if (pos < l->length) {
        data[pos] = (uint8_t)g_rand_int(rand);
        g_string_append_printf(story, "byte %#" PRIx64 " -> %#x; ", pos, data[pos]);
    }
}

char *damage_at_random(const DamageLayout *l, uint64_t seed, uint8_t *data, size_t *length)
{
    GRand *rand = g_rand_new_with_seed((guint32)(seed * 2654435761u));
    GString *story = g_string_new(NULL);
    unsigned n = 1 + g_rand_int(rand) % 6;
    for (unsigned i = 0; i < n; i++) {
        const DamageField *f =
            &g_array_index(l->fields, DamageField, g_rand_int(rand) % l->fields->len);
        g_autofree char *one = NULL;
        if (g_rand_int(rand) % 4 == 0) {
            damage_bytes(l, rand, data, story);
            continue;
        }
        one = set_field(l, f, g_rand_int(rand) % VALUES, g_rand_int(rand), data);
        g_string_append_printf(story, "%s; ", one);
    }
    if (g_rand_int(rand) % 8 == 0) {
        *length = g_rand_int(rand) % *length;
        g_string_append_printf(story, "cut to %zu", *length);
    }
    g_rand_free(rand);
    if (!story->len) {
        g_string_append(story, "nothing");
    }
    return g_string_free(story, false);
}
