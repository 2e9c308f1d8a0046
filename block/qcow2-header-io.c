/*
 * The qcow2 header on disk: read at open, and changed one sector at a time.
 *
 *   memory                                   disk
 *   s->header  --fn()--> copy --encode-->  [ sector 0: bytes 8..111 replaced, the rest as it was ]
 *      ^                                          |  one write          (invariant 5)
 *      `--------- the copy, when it succeeded ----'  + flush if asked for
 *
 * Rules
 *  1. The fixed fields are always written together, in one request of one sector.  Whatever else
 *     the sector holds (extensions, a name, bytes of a later format) is read from the file and
 *     written back unchanged; a core that must pad the request to a larger device block keeps it
 *     whole.
 *  2. s->header changes after the disk did, under header_lock, which is held across this I/O and no
 *     other.
 *  3. A failed write or flush leaves it open which of the two states the disk is in.  The old
 *     sector is put back at once; the next successful flush settles that.  When not even that can
 *     be written, the node refuses further I/O, because nobody can tell any more which tables are
 *     in use.
 *  4. A caller that undoes its work after a failure gives back what the new header would have
 *     pointed to through quarantine (not qcow2_alloc_undo): it is reused only after the flush of
 *     rule 3.
 *
 * Autoclear bits that this driver does not keep true are cleared before the first change of a
 * session and not at open, so that opening an image writable and only reading leaves it as it is.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2.h"

#include <inttypes.h>
#include <string.h>

#include "util/iov.h"

/* ---------------------------------------------------------------- reading */

/* Reads [0, len) of the image file; what lies beyond its end is zero. */
static bool read_start(BlockDriverState *bs, uint8_t *buf, size_t len, GError **errp)
{
    int64_t file_bytes = bdrv_getlength(bs->file->bs);
    if (file_bytes < 0) {
        qb_error_set_errno(errp, (int)file_bytes, "Could not get the length of the image file");
        return false;
    }
    memset(buf, 0, len);
    size_t present = MIN((uint64_t)file_bytes, len);
    int ret = present ? bdrv_pread(bs->file, 0, present, buf, 0) : 0;
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Could not read qcow2 header");
        return false;
    }
    return true;
}

/* Unknown features come before anything whose meaning they might have changed. */
static bool refuse_unknown_features(const Qcow2Header *h, const GArray *extensions, GError **errp)
{
    uint64_t unknown = h->incompatible & ~QCOW2_INCOMPAT_KNOWN;
    if (!unknown) {
        return true;
    }
    g_autofree char *text = qcow2_unknown_feature_names(extensions, unknown);
    qb_error_set(errp, ENOTSUP, "%s", text);
    return false;
}

static bool parse_cluster0(BDRVQcow2State *s, const uint8_t *cluster0, bool for_check,
                           GError **errp)
{
    const Qcow2Header *h = &s->header;
    g_autoptr(GError) ext_error = NULL;
    bool parsed = qcow2_extensions_decode(cluster0, h->header_length, qcow2_extensions_end(h),
                                          s->extensions, &ext_error);
    if (!refuse_unknown_features(h, s->extensions, errp)) {
        return false;
    }
    if (!qcow2_header_validate(h, for_check, errp)) {
        return false;
    }
    if (!parsed) {
        g_propagate_error(errp, g_steal_pointer(&ext_error));
        return false;
    }
    return qcow2_extensions_validate(h, s->extensions, errp);
}

bool qcow2_header_load(BlockDriverState *bs, bool for_check, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    uint8_t start[QCOW2_HDR_V3_LENGTH];
    if (!read_start(bs, start, sizeof(start), errp) ||
        !qcow2_header_decode(start, sizeof(start), &s->header, errp) ||
        !qcow2_header_validate_layout(&s->header, errp)) {
        return false;
    }
    size_t cluster_size = (size_t)1 << s->header.cluster_bits;
    g_autofree uint8_t *cluster0 = g_try_malloc(cluster_size);
    if (!cluster0) {
        qb_error_set_errno(errp, ENOMEM, "Could not read qcow2 header");
        return false;
    }
    if (!read_start(bs, cluster0, cluster_size, errp)) {
        return false;
    }
    if (s->header.header_length > QCOW2_HDR_V3_LENGTH) {
        size_t tail = s->header.header_length - QCOW2_HDR_V3_LENGTH;
        s->header_tail = g_memdup2(cluster0 + QCOW2_HDR_V3_LENGTH, tail);
    }
    s->extensions = qcow2_extensions_new();
    return parse_cluster0(s, cluster0, for_check, errp);
}

/* ---------------------------------------------------------------- writing */

static int write_sector(BlockDriverState *bs, const uint8_t *sector, bool sync)
{
    if (sync) {
        return bdrv_pwrite_sync(bs->file, 0, QCOW2_HDR_SECTOR, sector, 0);
    }
    return bdrv_pwrite(bs->file, 0, QCOW2_HDR_SECTOR, sector, 0);
}

int qcow2_header_write_sector_locked(BDRVQcow2State *s, const uint8_t *sector, const uint8_t *undo,
                                     bool sync)
{
    BlockDriverState *bs = s->bs;
    qb_mutex_assert_held(&s->header_lock);
    int ret = write_sector(bs, sector, sync);
    if (ret < 0 && undo && write_sector(bs, undo, false) < 0) {
        bdrv_warn("qcow2: Image header could not be written and not be restored; node '%s' refuses"
                  " all further requests", bdrv_get_node_name(bs));
        atomic_store(&s->corrupt, true);
    }
    return ret;
}

/* Replaces the fixed fields in @sector; never more than the header says it is long. */
static void patch_fields(const Qcow2Header *h, uint8_t *sector)
{
    uint8_t fields[QCOW2_HDR_V3_LENGTH];
    qcow2_header_encode(h, fields);
    memcpy(sector, fields, MIN(h->header_length, QCOW2_HDR_V3_LENGTH));
}

static int write_header_locked(BDRVQcow2State *s, const Qcow2Header *h, bool sync)
    QB_REQUIRES(s->header_lock)
{
    BlockDriverState *bs = s->bs;
    uint8_t old[QCOW2_HDR_SECTOR], sector[QCOW2_HDR_SECTOR];
    int ret = bdrv_pread(bs->file, 0, sizeof(old), old, 0);
    if (ret < 0) {
        return ret;
    }
    memcpy(sector, old, sizeof(sector));
    patch_fields(h, sector);
    if (memcmp(old, sector, sizeof(sector)) == 0) {
        return sync ? bdrv_flush(bs->file->bs) : 0;
    }
    return qcow2_header_write_sector_locked(s, sector, old, sync);
}

/* Stores only fields that changed: whoever owns another one (a resize its size, a flush the place of
 * its tables) reads it without header_lock, and must not meet a store of the same value. */
static void take_changes(Qcow2Header *to, const Qcow2Header *from)
{
#define TAKE(field)                                                                                \
    if (to->field != from->field) {                                                                \
        to->field = from->field;                                                                   \
    }
    TAKE(version)
    TAKE(backing_offset)
    TAKE(backing_size)
    TAKE(cluster_bits)
    TAKE(size)
    TAKE(crypt_method)
    TAKE(l1_size)
    TAKE(l1_offset)
    TAKE(reftable_offset)
    TAKE(reftable_clusters)
    TAKE(nb_snapshots)
    TAKE(snapshots_offset)
    TAKE(incompatible)
    TAKE(compatible)
    TAKE(autoclear)
    TAKE(refcount_order)
    TAKE(header_length)
    TAKE(compression_type)
#undef TAKE
}

int qcow2_header_update(BlockDriverState *bs, void (*fn)(Qcow2Header *h, void *opaque),
                        void *opaque, bool sync)
{
    BDRVQcow2State *s = qcow2_state(bs);
    QB_GUARD(&s->header_lock);
    Qcow2Header h = s->header;
    fn(&h, opaque);
    assert(h.version == s->header.version && h.cluster_bits == s->header.cluster_bits);
    int ret = write_header_locked(s, &h, sync);
    if (ret < 0) {
        return ret;
    }
    take_changes(&s->header, &h);
    return 0;
}

/* ---------------------------------------------------------------- feature bits */

typedef struct FeatureChange {
    uint64_t set, clear;
} FeatureChange;

static void change_incompatible(Qcow2Header *h, void *opaque)
{
    const FeatureChange *c = opaque;
    h->incompatible = (h->incompatible | c->set) & ~c->clear;
}

static void change_autoclear(Qcow2Header *h, void *opaque)
{
    const FeatureChange *c = opaque;
    h->autoclear = (h->autoclear | c->set) & ~c->clear;
}

static uint64_t header_word(BDRVQcow2State *s, const uint64_t *word)
{
    QB_GUARD(&s->header_lock);
    return *word;
}

int qcow2_set_incompatible(BlockDriverState *bs, uint64_t set, uint64_t clear)
{
    BDRVQcow2State *s = qcow2_state(bs);
    assert(s->version >= 3 && !(set & clear));
    uint64_t old = header_word(s, &s->header.incompatible);
    if (((old | set) & ~clear) == old) {
        return 0;
    }
    return qcow2_header_update(bs, change_incompatible, &(FeatureChange){set, clear}, true);
}

int qcow2_set_autoclear(BlockDriverState *bs, uint64_t set, uint64_t clear)
{
    BDRVQcow2State *s = qcow2_state(bs);
    assert(s->version >= 3 && !(set & clear));
    uint64_t old = header_word(s, &s->header.autoclear);
    if (((old | set) & ~clear) == old) {
        return 0;
    }
    return qcow2_header_update(bs, change_autoclear, &(FeatureChange){set, clear}, true);
}

int qcow2_begin_change(BlockDriverState *bs, bool guest)
{
    BDRVQcow2State *s = qcow2_state(bs);
    if (atomic_load(&s->corrupt)) {
        return -EIO;
    }
    uint64_t pending = atomic_load(&s->autoclear_pending);
    uint64_t clear = guest ? pending : pending & ~QCOW2_AUTOCLEAR_BITMAPS;
    if (!clear) {
        return 0;
    }
    /* Threads that come here at once write the same bits; all return after the first flush at
     * least. */
    int ret = qcow2_set_autoclear(bs, 0, clear);
    if (ret == 0) {
        atomic_fetch_and(&s->autoclear_pending, ~clear);
    }
    return ret;
}
