/*
 * The table of internal snapshots: codec, loading, and switching to a new table.
 *
 *   header.snapshots_offset
 *     v
 *     entry  [40 bytes | extra data | id | name] pad to 8  entry ...  (no padding behind the last)
 *
 *   off size
 *     0   8  L1 offset             16   4  seconds since 1970       32   4  VM state bytes
 *     8   4  L1 entries            20   4  nanoseconds              36   4  X = bytes of extra data
 *    12   2  length of the id      24   8  guest run time, ns       40   X  VM state bytes, disk
 *    14   2  length of the name                                           size, icount, ...
 *
 * Invariants
 *  1. The table is never changed in place: a new one is written to new clusters and made stable,
 *     then one write of the header's sector switches to it, then the old clusters go to quarantine.
 *  2. Entries keep their extra data byte for byte and as long as it was, but for what version 3
 *     demands; new ones have the three known fields.
 *  3. Loading costs memory only for entries that the file really holds: an entry's length is read
 *     before the entry, and nothing is read or allocated for what a header merely claims.
 *
 * Not done: the place and length of a snapshot's L1 are judged when that L1 is used, as elsewhere
 * in the field, so that one damaged snapshot does not keep the image from being opened.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-compact.h"

#include <inttypes.h>
#include <string.h>

enum {
    SN_L1_OFFSET = 0,
    SN_L1_SIZE = 8,
    SN_ID_LENGTH = 12,
    SN_NAME_LENGTH = 14,
    SN_SECONDS = 16,
    SN_NANOSECONDS = 20,
    SN_VM_CLOCK = 24,
    SN_VM_STATE_32 = 32,
    SN_EXTRA_SIZE = 36,
    SN_FIXED = 40,
};

/* ---------------------------------------------------------------- in memory */

void qcow2_snapshot_clear(Qcow2Snapshot *sn)
{
    g_clear_pointer(&sn->id, g_free);
    g_clear_pointer(&sn->name, g_free);
    g_clear_pointer(&sn->extra, g_free);
    sn->extra_size = 0;
}

GArray *qcow2_snapshots_new(void)
{
    GArray *snapshots = g_array_new(false, true, sizeof(Qcow2Snapshot));
    g_array_set_clear_func(snapshots, (GDestroyNotify)qcow2_snapshot_clear);
    return snapshots;
}

GArray *qcow2_snapshots_dup(const GArray *snapshots)
{
    GArray *copy = qcow2_snapshots_new();
    for (guint i = 0; i < snapshots->len; i++) {
        Qcow2Snapshot sn = g_array_index(snapshots, Qcow2Snapshot, i);
        sn.id = g_strdup(sn.id);
        sn.name = g_strdup(sn.name);
        sn.extra = g_memdup2(sn.extra, sn.extra_size);
        g_array_append_val(copy, sn);
    }
    return copy;
}

/* ---------------------------------------------------------------- codec */

typedef struct EntryLengths {
    size_t extra, id, name;
} EntryLengths;

static EntryLengths entry_lengths(const uint8_t *fixed)
{
    return (EntryLengths){
        .extra = qb_ldbe32(fixed + SN_EXTRA_SIZE),
        .id = qb_ldbe16(fixed + SN_ID_LENGTH),
        .name = qb_ldbe16(fixed + SN_NAME_LENGTH),
    };
}

static size_t entry_bytes(EntryLengths len)
{
    return SN_FIXED + len.extra + len.id + len.name;
}

static void decode_fixed(const uint8_t *fixed, Qcow2Snapshot *sn)
{
    sn->l1_offset = qb_ldbe64(fixed + SN_L1_OFFSET);
    sn->l1_size = qb_ldbe32(fixed + SN_L1_SIZE);
    sn->date_sec = qb_ldbe32(fixed + SN_SECONDS);
    sn->date_nsec = qb_ldbe32(fixed + SN_NANOSECONDS);
    sn->vm_clock_nsec = qb_ldbe64(fixed + SN_VM_CLOCK);
    sn->vm_state_size = qb_ldbe32(fixed + SN_VM_STATE_32);
}

static void decode_extra(const uint8_t *extra, size_t len, uint64_t disk_size, Qcow2Snapshot *sn)
{
    sn->vm_state_size = len >= 8 ? qb_ldbe64(extra) : sn->vm_state_size;
    sn->disk_size = len >= 16 ? qb_ldbe64(extra + 8) : disk_size;
    sn->icount = len >= 24 ? qb_ldbe64(extra + 16) : UINT64_MAX;
    sn->extra_size = len;
    sn->extra = g_memdup2(extra, len);
}

bool qcow2_snapshot_decode(const uint8_t *buf, size_t len, uint64_t disk_size, Qcow2Snapshot *ret,
                           size_t *ret_bytes, GError **errp)
{
    EntryLengths lengths = len >= SN_FIXED ? entry_lengths(buf) : (EntryLengths){0};
    if (lengths.extra > QCOW2_MAX_SNAPSHOT_EXTRA) {
        qb_error_set(errp, EFBIG, "Too much extra metadata in snapshot table entry");
        return false;
    }
    if (len < entry_bytes(lengths)) {
        qb_error_set(errp, EINVAL, "Snapshot table entry is cut off");
        return false;
    }
    Qcow2Snapshot sn = {0};
    const char *id = (const char *)buf + SN_FIXED + lengths.extra;
    decode_fixed(buf, &sn);
    decode_extra(buf + SN_FIXED, lengths.extra, disk_size, &sn);
    sn.id = g_strndup(id, lengths.id);
    sn.name = g_strndup(id + lengths.id, lengths.name);
    *ret = sn;
    *ret_bytes = entry_bytes(lengths);
    return true;
}

/* Extra data stays as long as it was; version 3, and VM state of 4 GiB, need some. */
static EntryLengths lengths_to_write(const Qcow2Snapshot *sn, int version)
{
    uint32_t least = version >= 3 || sn->vm_state_size > UINT32_MAX ? QCOW2_SNAPSHOT_EXTRA_V3 : 0;
    return (EntryLengths){
        .extra = MAX(sn->extra_size, least),
        .id = MIN(strlen(sn->id), UINT16_MAX),
        .name = MIN(strlen(sn->name), UINT16_MAX),
    };
}

/* Known fields as far as they fit; what else was read, verbatim. */
static void encode_extra(const Qcow2Snapshot *sn, uint8_t *extra, size_t len)
{
    const uint64_t known[] = {sn->vm_state_size, sn->disk_size, sn->icount};
    memset(extra, 0, len);
    if (sn->extra) {
        memcpy(extra, sn->extra, MIN(len, sn->extra_size));
    }
    for (size_t i = 0; i < G_N_ELEMENTS(known) && (i + 1) * 8 <= len; i++) {
        qb_stbe64(extra + i * 8, known[i]);
    }
}

static void encode_entry(const Qcow2Snapshot *sn, int version, uint8_t *buf)
{
    EntryLengths len = lengths_to_write(sn, version);
    qb_stbe64(buf + SN_L1_OFFSET, sn->l1_offset);
    qb_stbe32(buf + SN_L1_SIZE, sn->l1_size);
    qb_stbe16(buf + SN_ID_LENGTH, len.id);
    qb_stbe16(buf + SN_NAME_LENGTH, len.name);
    qb_stbe32(buf + SN_SECONDS, sn->date_sec);
    qb_stbe32(buf + SN_NANOSECONDS, sn->date_nsec);
    qb_stbe64(buf + SN_VM_CLOCK, sn->vm_clock_nsec);
    qb_stbe32(buf + SN_VM_STATE_32, sn->vm_state_size > UINT32_MAX ? 0 : sn->vm_state_size);
    qb_stbe32(buf + SN_EXTRA_SIZE, len.extra);
    encode_extra(sn, buf + SN_FIXED, len.extra);
    memcpy(buf + SN_FIXED + len.extra, sn->id, len.id);
    memcpy(buf + SN_FIXED + len.extra + len.id, sn->name, len.name);
}

/* Bytes of the whole table; each entry is at most 130 KiB and there are at most 65536: no
 * overflow. */
static size_t table_bytes(const GArray *snapshots, int version)
{
    size_t bytes = 0;
    for (guint i = 0; i < snapshots->len; i++) {
        const Qcow2Snapshot *sn = &g_array_index(snapshots, Qcow2Snapshot, i);
        bytes = qb_align_up(bytes, 8) + entry_bytes(lengths_to_write(sn, version));
    }
    return bytes;
}

uint8_t *qcow2_snapshots_encode(const GArray *snapshots, int version, size_t *ret_bytes,
                                GError **errp)
{
    size_t bytes = snapshots->len <= QCOW2_MAX_SNAPSHOTS ? table_bytes(snapshots, version) : SIZE_MAX;
    if (bytes > QCOW2_MAX_SNAPSHOT_TABLE_BYTES) {
        qb_error_set(errp, EFBIG, "Snapshot table too large");
        return NULL;
    }
    uint8_t *buf = g_try_malloc0(bytes + 1);
    if (!buf) {
        qb_error_set_errno(errp, ENOMEM, "Could not write snapshot table");
        return NULL;
    }
    size_t pos = 0;
    for (guint i = 0; i < snapshots->len; i++) {
        const Qcow2Snapshot *sn = &g_array_index(snapshots, Qcow2Snapshot, i);
        pos = qb_align_up(pos, 8);
        encode_entry(sn, version, buf + pos);
        pos += entry_bytes(lengths_to_write(sn, version));
    }
    assert(pos == bytes);
    *ret_bytes = bytes;
    return buf;
}

/* ---------------------------------------------------------------- loading */

typedef struct TableReader {
    BlockDriverState *bs;
    uint64_t file_bytes; /* length of the image file: nothing is read beyond it */
    uint64_t start, pos; /* of the table and of the next entry, in the file */
    bool for_check;
} TableReader;

static bool read_table(const TableReader *r, uint64_t pos, size_t len, uint8_t *buf, GError **errp)
{
    if (pos > r->file_bytes || len > r->file_bytes - pos) {
        qb_error_set(errp, EINVAL, "Snapshot table reaches beyond the end of the image file");
        return false;
    }
    int ret = bdrv_pread(r->bs->file, (int64_t)pos, (int64_t)len, buf, 0);
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Failed to read snapshot table");
        return false;
    }
    return true;
}

/* The bytes of an entry in one piece; extra data over the limit is left out for a check
 * (*ret_cut). */
static uint8_t *read_entry(const TableReader *r, size_t *ret_len, bool *ret_cut, uint64_t *ret_disk,
                           GError **errp)
{
    uint8_t fixed[SN_FIXED];
    if (!read_table(r, r->pos, SN_FIXED, fixed, errp)) {
        return NULL;
    }
    EntryLengths len = entry_lengths(fixed);
    uint64_t names = r->pos + SN_FIXED + len.extra;
    *ret_disk = entry_bytes(len);
    *ret_cut = len.extra > QCOW2_MAX_SNAPSHOT_EXTRA;
    if (*ret_cut && !r->for_check) {
        qb_error_set(errp, EFBIG, "Too much extra metadata in snapshot table entry");
        return NULL;
    }
    len.extra = MIN(len.extra, QCOW2_MAX_SNAPSHOT_EXTRA);
    qb_stbe32(fixed + SN_EXTRA_SIZE, len.extra);
    g_autofree uint8_t *buf = g_malloc(entry_bytes(len)); /* at most 130 KiB */
    memcpy(buf, fixed, SN_FIXED);
    if (!read_table(r, r->pos + SN_FIXED, len.extra, buf + SN_FIXED, errp) ||
        !read_table(r, names, len.id + len.name, buf + SN_FIXED + len.extra, errp)) {
        return NULL;
    }
    *ret_len = entry_bytes(len);
    return g_steal_pointer(&buf);
}

static bool load_entry(TableReader *r, GArray *snapshots, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(r->bs);
    Qcow2Snapshot sn;
    size_t len, used;
    uint64_t disk_bytes;
    bool cut;
    r->pos = r->start + qb_align_up(r->pos - r->start, 8);
    g_autofree uint8_t *buf = read_entry(r, &len, &cut, &disk_bytes, errp);
    if (!buf || !qcow2_snapshot_decode(buf, len, s->header.size, &sn, &used, errp)) {
        return false;
    }
    sn.extra_cut = cut;
    g_array_append_val(snapshots, sn);
    r->pos += disk_bytes;
    if (r->pos - r->start > QCOW2_MAX_SNAPSHOT_TABLE_BYTES && !r->for_check) {
        qb_error_set(errp, EFBIG, "Snapshot table too large");
        return false;
    }
    return true;
}

/* For a check the entries that fit the limits; the rest it will report as overhanging. */
static bool load_entries(TableReader *r, GArray *snapshots, GError **errp)
{
    const BDRVQcow2State *s = qcow2_state(r->bs);
    uint32_t nb = MIN(s->header.nb_snapshots, QCOW2_MAX_SNAPSHOTS);
    if (r->for_check && !r->start) {
        nb = 0; /* there is no table */
    }
    for (uint32_t i = 0; i < nb; i++) {
        uint64_t before = r->pos;
        g_autoptr(GError) err = NULL;
        if (!load_entry(r, snapshots, &err)) {
            if (r->for_check && err->code == EINVAL) {
                r->pos = before; /* cut off by the end of the file */
                return true;
            }
            g_propagate_prefixed_error(errp, g_steal_pointer(&err),
                                       "Snapshot table entry %" PRIu32 ": ", i);
            return false;
        }
        if (r->pos - r->start > QCOW2_MAX_SNAPSHOT_TABLE_BYTES) {
            g_array_set_size(snapshots, snapshots->len - 1);
            r->pos = before;
            return true;
        }
    }
    return true;
}

bool qcow2_snapshots_load(BlockDriverState *bs, bool for_check, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    int64_t file_bytes = bdrv_getlength(bs->file->bs);
    if (file_bytes < 0) {
        qb_error_set_errno(errp, (int)file_bytes, "Could not get the length of the image file");
        return false;
    }
    TableReader r = {
        .bs = bs,
        .file_bytes = (uint64_t)file_bytes,
        .start = s->header.snapshots_offset,
        .pos = s->header.snapshots_offset,
        .for_check = for_check,
    };
    GArray *snapshots = qcow2_snapshots_new();
    if (!load_entries(&r, snapshots, errp)) {
        g_array_unref(snapshots);
        return false;
    }
    g_clear_pointer(&s->snapshots, g_array_unref);
    s->snapshots = snapshots;
    s->snapshots_offset = r.start;
    s->snapshots_bytes = r.pos - r.start;
    qcow2_guard_snapshots(bs);
    return true;
}

/* ---------------------------------------------------------------- switching */

/* A table on its way into the header. */
typedef struct NewTable {
    uint64_t offset;
    uint32_t nb;
    void (*fn)(Qcow2Header *h, void *opaque);
    void *opaque;
} NewTable;

static void switch_table(Qcow2Header *h, void *opaque)
{
    const NewTable *t = opaque;
    h->snapshots_offset = t->offset;
    h->nb_snapshots = t->nb;
    if (t->fn) {
        t->fn(h, t->opaque);
    }
}

/* Writes the table to clusters at *offset; 0: allocates them, unless there is nothing to write.
 * Nothing refers to it yet; on failure the clusters are free. */
static bool write_table(BlockDriverState *bs, const uint8_t *table, size_t bytes,
                        uint64_t *offset, GError **errp)
{
    if (!bytes) {
        return true;
    }
    int64_t place = *offset ? (int64_t)*offset : qcow2_alloc_clusters(bs, bytes);
    int ret = place < 0 ? (int)place : qcow2_check_overlap(bs, 0, place, bytes);
    if (ret == 0) {
        bdrv_debug_event(bs->file, "snapshot_write");
        ret = bdrv_pwrite(bs->file, place, bytes, table, 0);
    }
    if (ret == 0) {
        *offset = place;
        return true;
    }
    if (place >= 0) {
        qcow2_alloc_undo(bs, place, bytes);
    }
    qb_error_set_errno(errp, ret, "Failed to write snapshot table");
    return false;
}

/* The flush makes the table's content and its counts stable before the header names it. */
static bool switch_to(BlockDriverState *bs, NewTable *t, GError **errp)
{
    int ret = qcow2_flush(bs);
    if (ret == 0) {
        ret = qcow2_header_update(bs, switch_table, t, true);
    }
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Failed to switch to the new snapshot table");
    }
    return ret == 0;
}

/* Writes @bytes at @table as the new table, to t->offset (0: anywhere), and switches to it. */
static bool replace_table(BlockDriverState *bs, const uint8_t *table, size_t bytes, NewTable *t,
                          GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    if (!write_table(bs, table, bytes, &t->offset, errp)) {
        return false;
    }
    uint64_t old_offset = s->header.snapshots_offset;
    uint64_t old_bytes = s->snapshots_bytes;
    bool done = switch_to(bs, t, errp);
    /* Whichever of the two the header does not name goes; quarantine waits for the next flush. */
    uint64_t gone = done ? old_offset : t->offset, gone_bytes = done ? old_bytes : bytes;
    if (gone && gone_bytes) {
        qcow2_free_run(bs, gone, qb_align_up(gone_bytes, s->cluster_size), QCOW2_DISCARD_SNAPSHOT);
    }
    if (done) {
        s->snapshots_offset = t->offset;
        s->snapshots_bytes = bytes;
    }
    return done;
}

bool qcow2_snapshots_store(BlockDriverState *bs, GArray *snapshots,
                           void (*fn)(Qcow2Header *h, void *opaque), void *opaque, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    g_autoptr(GArray) list = snapshots;
    NewTable t = {.nb = list->len, .fn = fn, .opaque = opaque};
    size_t bytes;
    g_autofree uint8_t *table = qcow2_snapshots_encode(list, s->version, &bytes, errp);
    if (!table || !replace_table(bs, table, bytes, &t, errp)) {
        return false;
    }
    g_array_unref(s->snapshots);
    s->snapshots = g_steal_pointer(&list);
    qcow2_guard_snapshots(bs);
    return true;
}

uint64_t qcow2_snapshots_room(const BDRVQcow2State *s)
{
    size_t bytes = table_bytes(s->snapshots, s->version);
    return bytes <= QCOW2_MAX_SNAPSHOT_TABLE_BYTES ? qb_align_up(bytes, s->cluster_size) : 0;
}

bool qcow2_snapshots_rewrite(BlockDriverState *bs, const GArray *list, uint64_t place,
                             GError **errp)
{
    NewTable t = {.offset = place, .nb = list->len};
    size_t bytes;
    g_autofree uint8_t *table =
        qcow2_snapshots_encode(list, qcow2_state(bs)->version, &bytes, errp);
    if (!table) {
        qcow2_alloc_undo(bs, place, qcow2_snapshots_room(qcow2_state(bs)));
        return false;
    }
    return replace_table(bs, table, bytes, &t, errp);
}
