/*
 * Changing the backing name, the header extensions and the version of an image that may lose power
 * at any moment.
 *
 *   cluster 0, before       [fixed | ext A | ext B | features | end | name |  ...  unreached  ... ]
 *                            <-- sector 0 -->|<-- sector 1 ...
 *   1. detour sector 0      [fixed | ext A | ext B | end |...]   no feature table: nothing of the
 *      (only if needed)                                           later sectors is reached any more
 *   2. unreached bytes      end of the new table, end marker, new name: written, barrier
 *   3. final sector 0       [fixed'| ext A'| ext B | features...] one write: now all is reached
 *
 * "Reached" is what a reader of the present header looks at: the fixed fields, the extensions up to
 * the end marker, the backing name.  Whatever is not reached may be written in any order.
 *
 * Invariants
 *  1. A reached byte changes only as part of a write of sector 0, which is atomic; before each such
 *     write a barrier has made stable what it will make reachable, and a barrier follows it.
 *  2. Names and all extensions but the feature table (which is only for error texts) stand in every
 *     state.
 *  3. The backing name never moves onto bytes where the present one lies; where the new table needs
 *     that place, the detour points to a copy behind everything.
 *  4. s->header and s->extensions say what sector 0 says, after each write of it.
 *  5. The fixed fields, the version and the header's length among them, change with the last write
 *     of sector 0; until then they are the old ones.
 *
 * Not done: when the extensions other than the feature table do not fit sector 0 (a very long data
 * file name), only changes that leave the later sectors as they are can be made; others are
 * refused.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2.h"

#include <limits.h>
#include <string.h>

typedef struct Range {
    size_t start, end;
} Range;

/* A header as it may stand in cluster 0. */
typedef struct Image {
    Qcow2Header h;
    GArray *extensions; /* owned by the state or by the change */
    size_t end;         /* of the extensions, end marker included */
} Image;

/* A change on its way. */
typedef struct Change {
    BDRVQcow2State *s;
    char *name; /* new backing name, "" for none; owned */
    size_t name_len;
    size_t cluster_size;
    uint8_t *now;  /* cluster 0 as it is */
    uint8_t *want; /* cluster 0 as it shall be; unreached bytes as they are */
    Image from, detour, to;
} Change;

static bool fail(GError **errp, int err, const char *text)
{
    qb_error_set(errp, err, "%s", text);
    return false;
}

static bool overlaps(Range a, Range b)
{
    return qb_ranges_overlap(a.start, a.end - a.start, b.start, b.end - b.start);
}

static Range name_range(const Qcow2Header *h)
{
    return h->backing_offset
               ? (Range){h->backing_offset, h->backing_offset + h->backing_size}
               : (Range){0, 0};
}

/* ---------------------------------------------------------------- what it shall look like */

static GArray *copy_extensions(const GArray *from, bool with_features)
{
    GArray *to = qcow2_extensions_new();
    for (guint i = 0; i < from->len; i++) {
        const Qcow2Extension *ext = &g_array_index(from, Qcow2Extension, i);
        if (with_features || ext->type != QCOW2_EXT_FEATURE_TABLE) {
            qcow2_extensions_add(to, ext->type, ext->data, ext->length);
        }
    }
    return to;
}

static void move_extension(GArray *list, uint32_t type, guint at)
{
    for (guint i = 0; i < list->len; i++) {
        Qcow2Extension ext = g_array_index(list, Qcow2Extension, i);
        if (ext.type == type) {
            g_array_index(list, Qcow2Extension, i).data = NULL; /* @ext owns it now */
            g_array_remove_index(list, i);
            g_array_insert_val(list, MIN(at, list->len), ext);
            return;
        }
    }
}

/* Backing format first, so that it shares sector 0 with the name; the feature table last. */
static void sort_extensions(GArray *list)
{
    move_extension(list, QCOW2_EXT_BACKING_FORMAT, 0);
    move_extension(list, QCOW2_EXT_FEATURE_TABLE, UINT_MAX);
}

/* The part of @r behind sector 0, which is where changes are not atomic. */
static Range later_sectors(Range r)
{
    size_t start = MAX(r.start, QCOW2_HDR_SECTOR);
    return (Range){start, MAX(r.end, start)};
}

/* A place for @bytes at or behind @from that touches neither @a nor @b behind sector 0; 0: none. */
static size_t find_room(const Change *c, size_t from, size_t bytes, Range a, Range b)
{
    Range at = {from, from + bytes};
    a = later_sectors(a);
    b = later_sectors(b);
    for (int turn = 0; turn < 3; turn++) {
        Range hit = overlaps(at, a) ? a : overlaps(at, b) ? b : (Range){0, 0};
        if (!hit.end) {
            return at.end <= c->cluster_size ? at.start : 0;
        }
        at = (Range){hit.end, hit.end + bytes};
    }
    return 0;
}

static size_t image_end(const Qcow2Header *h, const GArray *extensions)
{
    return h->header_length + qcow2_extensions_length(extensions);
}

/* The fixed fields, as many as this header has; bytes of a longer one stay. */
static void put_fields(const Qcow2Header *h, uint8_t *sector)
{
    uint8_t fields[QCOW2_HDR_V3_LENGTH];
    qcow2_header_encode(h, fields);
    memcpy(sector, fields, MIN(h->header_length, QCOW2_HDR_V3_LENGTH));
}

/* ---------------------------------------------------------------- planning */

/* Later sectors may be written freely when nothing reached lies there, or when nothing changes
 * there. */
static bool needs_detour(const Change *c)
{
    size_t end = c->to.end;
    if (end <= QCOW2_HDR_SECTOR) {
        return false;
    }
    Range tail = {QCOW2_HDR_SECTOR, end};
    Range chain = {0, c->from.end};
    bool reached = overlaps(tail, chain) || overlaps(tail, name_range(&c->from.h));
    return reached && memcmp(c->now + tail.start, c->want + tail.start, end - tail.start);
}

static bool plan_name(Change *c, GError **errp)
{
    Qcow2Header *h = &c->to.h;
    Range old = name_range(&c->detour.h), chain = {0, MAX(c->from.end, c->to.end)};
    bool same = c->name_len && old.end - old.start == c->name_len && old.start >= c->to.end &&
                !memcmp(c->want + old.start, c->name, c->name_len);
    size_t place = same ? old.start : find_room(c, c->to.end, c->name_len, old, chain);
    if (c->name_len && !place) {
        return fail(errp, ENOSPC, "No space left in the file header");
    }
    h->backing_offset = c->name_len ? place : 0;
    h->backing_size = c->name_len;
    memcpy(c->want + place, c->name, c->name_len);
    return true;
}

/* The state in between: old names, no feature table, the name out of the new table's way. */
static bool plan_detour(Change *c, GError **errp)
{
    c->detour.extensions = copy_extensions(c->from.extensions, false);
    c->detour.end = image_end(&c->detour.h, c->detour.extensions);
    if (c->detour.end > QCOW2_HDR_SECTOR) {
        return fail(errp, ENOTSUP, "Header extensions are too long to be changed safely");
    }
    Range old = name_range(&c->from.h), chain = {0, MAX(c->from.end, c->to.end)};
    if (!overlaps(old, (Range){QCOW2_HDR_SECTOR, c->to.end}) &&
        !overlaps(old, (Range){0, c->detour.end})) {
        return true;
    }
    size_t place = find_room(c, chain.end, old.end - old.start, old, chain);
    if (!place) {
        return fail(errp, ENOSPC, "No space left in the file header");
    }
    memcpy(c->want + place, c->now + old.start, old.end - old.start);
    c->detour.h.backing_offset = place;
    return true;
}

/* The name that @what asks for, or the present one. Owned by the change. */
static bool take_name(Change *c, const Qcow2HeaderChange *what, GError **errp)
{
    Range old = name_range(&c->from.h);
    c->name = what->backing_file
                  ? g_strdup(what->backing_file)
                  : g_strndup((const char *)c->now + old.start, old.end - old.start);
    c->name_len = strlen(c->name);
    return c->name_len <= QCOW2_MAX_BACKING_NAME ||
           fail(errp, EINVAL, "Backing file name or format name too long");
}

static bool plan(Change *c, const Qcow2HeaderChange *what, GError **errp)
{
    c->from.h = c->detour.h = c->to.h = c->s->header;
    c->from.extensions = c->s->extensions;
    c->from.end = MIN(image_end(&c->from.h, c->from.extensions), c->cluster_size);
    c->to.extensions = copy_extensions(c->from.extensions, true);
    if (!take_name(c, what, errp)) {
        return false;
    }
    what->edit(&c->to.h, c->to.extensions, what->opaque);
    sort_extensions(c->to.extensions);
    c->to.end = image_end(&c->to.h, c->to.extensions);
    if (c->to.end > c->cluster_size || c->name_len > c->cluster_size - c->to.end) {
        return fail(errp, ENOSPC, "No space left in the file header");
    }
    memcpy(c->want, c->now, c->cluster_size);
    qcow2_extensions_encode(c->to.extensions, c->want + c->to.h.header_length);
    if (needs_detour(c) && !plan_detour(c, errp)) {
        return false;
    }
    if (!plan_name(c, errp)) {
        return false;
    }
    put_fields(&c->to.h, c->want);
    return true;
}

/* ---------------------------------------------------------------- carrying it out */

/* Writes sector 0 of @image and takes it over into memory, extensions and all. */
static int write_image(BDRVQcow2State *s, Change *c, const uint8_t *sector, Image *image)
    QB_REQUIRES(s->header_lock)
{
    bool same = !memcmp(c->now, sector, QCOW2_HDR_SECTOR);
    int ret = same ? bdrv_flush(s->bs->file->bs)
                   : qcow2_header_write_sector_locked(s, sector, c->now, true);
    if (ret < 0) {
        return ret;
    }
    memcpy(c->now, sector, QCOW2_HDR_SECTOR);
    g_array_unref(s->extensions);
    s->extensions = g_steal_pointer(&image->extensions);
    s->header = image->h;
    qcow2_guard_bitmaps(s);
    return 0;
}

/* Bytes [start, end) of the wanted cluster, if they are not there yet. */
static int write_unreached(Change *c, size_t start, size_t end)
{
    if (start >= end || !memcmp(c->now + start, c->want + start, end - start)) {
        return 0;
    }
    memcpy(c->now + start, c->want + start, end - start);
    return bdrv_pwrite_sync(c->s->bs->file, (int64_t)start, (int64_t)(end - start),
                            c->want + start, 0);
}

static int take_detour(BDRVQcow2State *s, Change *c) QB_REQUIRES(s->header_lock)
{
    Range name = name_range(&c->detour.h);
    uint8_t sector[QCOW2_HDR_SECTOR];
    int ret = write_unreached(c, MAX(name.start, QCOW2_HDR_SECTOR), name.end);
    if (ret < 0) {
        return ret;
    }
    memcpy(sector, c->now, sizeof(sector));
    qcow2_extensions_encode(c->detour.extensions, sector + c->detour.h.header_length);
    put_fields(&c->detour.h, sector);
    return write_image(s, c, sector, &c->detour);
}

static int carry_out(BDRVQcow2State *s, Change *c) QB_REQUIRES(s->header_lock)
{
    Range name = name_range(&c->to.h);
    int ret = c->detour.extensions ? take_detour(s, c) : 0;
    ret = ret < 0 ? ret : write_unreached(c, QCOW2_HDR_SECTOR, c->to.end);
    ret = ret < 0 ? ret : write_unreached(c, MAX(name.start, QCOW2_HDR_SECTOR), name.end);
    return ret < 0 ? ret : write_image(s, c, c->want, &c->to);
}

static bool read_cluster0(Change *c, GError **errp)
{
    int ret = bdrv_pread(c->s->bs->file, 0, (int64_t)c->cluster_size, c->now, 0);
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Could not read qcow2 header");
    }
    return ret == 0;
}

static void change_clear(Change *c)
{
    g_free(c->now);
    g_free(c->want);
    g_free(c->name);
    g_clear_pointer(&c->detour.extensions, g_array_unref);
    g_clear_pointer(&c->to.extensions, g_array_unref);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Change, change_clear)

bool qcow2_header_change(BlockDriverState *bs, const Qcow2HeaderChange *what, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    g_auto(Change) c = {
        .s = s,
        .cluster_size = s->cluster_size,
        .now = g_malloc(s->cluster_size),
        .want = g_malloc(s->cluster_size),
    };
    QB_GUARD(&s->header_lock);
    if (!read_cluster0(&c, errp) || !plan(&c, what, errp)) {
        return false;
    }
    int ret = carry_out(s, &c);
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Could not write qcow2 header");
    }
    return ret == 0;
}

/* ---------------------------------------------------------------- names */

static void set_format(Qcow2Header *h, GArray *extensions, void *opaque)
{
    const char *format = opaque;
    qcow2_extensions_set(extensions, QCOW2_EXT_BACKING_FORMAT, *format ? format : NULL,
                         strlen(format));
}

bool qcow2_header_change_names(BlockDriverState *bs, const char *backing_file,
                               const char *backing_fmt, GError **errp)
{
    const char *file = backing_file ? backing_file : "";
    const char *format = backing_fmt && *file ? backing_fmt : "";
    if (strlen(format) > QCOW2_MAX_BACKING_FORMAT) {
        return fail(errp, EINVAL, "Backing file name or format name too long");
    }
    Qcow2HeaderChange what = {.backing_file = file, .edit = set_format, .opaque = (void *)format};
    return qcow2_header_change(bs, &what, errp);
}
