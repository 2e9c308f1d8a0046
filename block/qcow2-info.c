/*
 * What a qcow2 node tells about itself.
 *
 * The order of keys is part of the interface: users' scripts compare the text that is printed from
 * it.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2.h"

static Qcow2Header header_copy(BDRVQcow2State *s)
{
    QB_GUARD(&s->header_lock);
    return s->header;
}

bool qcow2_get_info(BlockDriverState *bs, BlockDriverInfo *info, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    Qcow2Header h = header_copy(s);
    *info = (BlockDriverInfo){
        .cluster_size = s->cluster_size,
        .subcluster_size = s->subcluster_size,
        .vm_state_offset = (int64_t)qcow2_vm_state_offset(s, h.size),
        .is_dirty = h.incompatible & QCOW2_INCOMPAT_DIRTY,
        .is_encrypted = s->crypt_method != QCOW2_CRYPT_NONE,
    };
    return true;
}

void qcow2_refresh_limits(BlockDriverState *bs)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    bs->bl.request_alignment = 1;
    bs->bl.pwrite_zeroes_alignment = s->subcluster_size;
    bs->bl.pdiscard_alignment = s->cluster_size;
}

/* The data file's name as the image has it, or NULL. */
static json_t *data_file_name(BDRVQcow2State *s)
{
    QB_GUARD(&s->header_lock);
    const Qcow2Extension *ext = qcow2_find_extension(s->extensions, QCOW2_EXT_DATA_FILE);
    return ext ? json_string_nocheck((const char *)ext->data) : NULL;
}

static void add_data_file(BDRVQcow2State *s, const Qcow2Header *h, json_t *data)
{
    if (!s->has_data_file) {
        return;
    }
    json_t *name = data_file_name(s);
    if (name) {
        json_object_set_new(data, "data-file", name);
    }
    json_object_set_new(data, "data-file-raw",
                        json_boolean(h->autoclear & QCOW2_AUTOCLEAR_DATA_FILE_RAW));
}

static json_t *bitmap_flags(uint32_t flags)
{
    json_t *list = json_array();
    if (flags & QCOW2_BITMAP_IN_USE) {
        json_array_append_new(list, json_string("in-use"));
    }
    if (flags & QCOW2_BITMAP_AUTO) {
        json_array_append_new(list, json_string("auto"));
    }
    return list;
}

/* Those of the directory, as it stands in the image. */
static void add_bitmaps(BDRVQcow2State *s, json_t *data)
{
    json_t *list = json_array();
    Qcow2BitmapFacts facts;
    for (guint i = 0; qcow2_bitmap_facts(s, i, &facts); i++) {
        g_autofree char *name = g_utf8_make_valid(facts.name, -1);
        json_int_t granularity = (json_int_t)1 << MIN(facts.granularity_bits, 62);
        json_array_append_new(list, json_pack("{s:o, s:s, s:I}", "flags", bitmap_flags(facts.flags),
                                              "name", name, "granularity", granularity));
    }
    if (json_array_size(list)) {
        json_object_set(data, "bitmaps", list);
    }
    json_decref(list);
}

json_t *qcow2_get_specific_info(BlockDriverState *bs, GError **errp)
{
    BDRVQcow2State *s = qcow2_state(bs);
    Qcow2Header h = header_copy(s);
    bool v3 = h.version >= 3;
    json_t *data = json_object();
    json_object_set_new(data, "compat", json_string(v3 ? "1.1" : "0.10"));
    bool zstd = h.compression_type == QCOW2_COMPRESSION_ZSTD;
    json_object_set_new(data, "compression-type", json_string(zstd ? "zstd" : "zlib"));
    if (v3) {
        json_object_set_new(data, "lazy-refcounts",
                            json_boolean(h.compatible & QCOW2_COMPAT_LAZY_REFCOUNTS));
        add_bitmaps(s, data);
    }
    json_object_set_new(data, "refcount-bits", json_integer(1 << h.refcount_order));
    json_t *encrypt = qcow2_crypto_facts(bs);
    if (encrypt) {
        json_object_set_new(data, "encrypt", encrypt);
    }
    add_data_file(s, &h, data);
    if (v3) {
        json_object_set_new(data, "corrupt",
                            json_boolean(h.incompatible & QCOW2_INCOMPAT_CORRUPT));
        json_object_set_new(data, "extended-l2", json_boolean(s->has_subclusters));
    }
    return json_pack("{s:s, s:o}", "type", "qcow2", "data", data);
}
