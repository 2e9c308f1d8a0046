/*
 * Compressed clusters of an image: reading runs of them, writing new ones.
 *
 *   read    streams are read as a batch while announced; then each is unpacked, in parallel when
 *           there are several, into the caller's memory or, for a part of a cluster, into the cache
 *   write   clusters of the request, up to MAX_BATCH at a time
 *             pack       all at once in the compute pool
 *             place      in guest order, streams back to back
 *             write      streams that lie back to back as one
 *             link       only now; what does not shrink is written as a normal cluster
 *
 * The cache holds a few unpacked clusters, found by the place of their streams, for guests that
 * read a compressed cluster in small pieces.
 *
 * Invariants
 *  1. A stream is in the file before an entry names it.
 *  2. A cached cluster is what its place in the file holds.  Before a stream is written, clusters
 *     cached for that place are dropped and the generation rises; a reader puts a cluster into the
 *     cache only if the generation is the one from the time when it was announced.  Space of a
 *     stream is given to another one only after such readers have left.
 *  3. Only clusters without a host cluster or stream are written to, but by who moves a stream; the
 *     request is serialised.
 *
 * Not done: an unpacked cluster is not kept when all of it was asked for.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/qcow2-io-int.h"
#include "util/pool.h"

#define CACHE_SLOTS 4
#define MAX_BATCH 16
#define MAX_BATCH_BYTES (8u << 20)

/* --- the cache --- */

typedef struct Qcow2Unpacked {
    _Atomic(unsigned) refs;
    uint8_t data[];
} Qcow2Unpacked;

typedef struct CacheSlot {
    uint64_t host;
    uint32_t bytes;
    uint64_t used; /* turn of the last use */
    Qcow2Unpacked *cluster; /* NULL: empty */
} CacheSlot;

struct Qcow2Compressor {
    QbMutex lock;
    uint64_t generation, turn;
    CacheSlot slot[CACHE_SLOTS];
};

static Qcow2Unpacked *unpacked_new(size_t size)
{
    Qcow2Unpacked *u = g_try_malloc(sizeof(*u) + size);
    if (u) {
        atomic_init(&u->refs, 1);
    }
    return u;
}

static void unpacked_unref(Qcow2Unpacked *u)
{
    if (u && atomic_fetch_sub(&u->refs, 1) == 1) {
        g_free(u);
    }
}

struct Qcow2Compressor *qcow2_compressor_new(void)
{
    struct Qcow2Compressor *c = g_new0(struct Qcow2Compressor, 1);
    qb_mutex_init(&c->lock);
    return c;
}

void qcow2_compressor_free(struct Qcow2Compressor *c)
{
    if (!c) {
        return;
    }
    for (unsigned i = 0; i < CACHE_SLOTS; i++) {
        unpacked_unref(c->slot[i].cluster);
    }
    qb_mutex_destroy(&c->lock);
    g_free(c);
}

/* A reference to the cluster whose stream is that of @m, or NULL. *ret_generation in any case. */
static Qcow2Unpacked *cache_find(struct Qcow2Compressor *c, const Qcow2Mapping *m,
                                 uint64_t *ret_generation)
{
    *ret_generation = 0;
    if (!c) {
        return NULL;
    }
    QB_GUARD(&c->lock);
    *ret_generation = c->generation;
    for (unsigned i = 0; i < CACHE_SLOTS; i++) {
        CacheSlot *slot = &c->slot[i];
        if (slot->cluster && slot->host == m->host && slot->bytes == m->comp_bytes) {
            slot->used = ++c->turn;
            atomic_fetch_add(&slot->cluster->refs, 1);
            return slot->cluster;
        }
    }
    return NULL;
}

/* Invariant 2. */
static void cache_put(struct Qcow2Compressor *c, const Qcow2Stream *st, Qcow2Unpacked *cluster)
{
    if (!c) {
        return;
    }
    QB_GUARD(&c->lock);
    if (c->generation != st->generation) {
        return;
    }
    CacheSlot *oldest = &c->slot[0];
    for (unsigned i = 1; i < CACHE_SLOTS; i++) {
        if (c->slot[i].used < oldest->used) {
            oldest = &c->slot[i];
        }
    }
    unpacked_unref(oldest->cluster);
    atomic_fetch_add(&cluster->refs, 1);
    *oldest = (CacheSlot){st->map.host, st->map.comp_bytes, ++c->turn, cluster};
}

static void cache_drop(struct Qcow2Compressor *c, uint64_t host, uint64_t bytes)
{
    if (!c) {
        return;
    }
    QB_GUARD(&c->lock);
    c->generation++;
    for (unsigned i = 0; i < CACHE_SLOTS; i++) {
        CacheSlot *slot = &c->slot[i];
        if (slot->cluster && qb_ranges_overlap(slot->host, slot->bytes, host, bytes)) {
            unpacked_unref(slot->cluster);
            *slot = (CacheSlot){0};
        }
    }
}

void qcow2_streams_forget(BDRVQcow2State *s, uint64_t host, uint64_t bytes)
{
    cache_drop(s->compressor, host, bytes);
}

/* --- reading --- */

void qcow2_streams_clear(Qcow2Stream *streams, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        g_free(streams[i].data);
        unpacked_unref(streams[i].cluster);
        streams[i].data = NULL;
        streams[i].cluster = NULL;
    }
}

/* The operations that read what is not cached; false: no memory. */
static bool streams_prepare(BDRVQcow2State *s, Qcow2Stream *streams, size_t n, GArray *ops)
{
    for (size_t i = 0; i < n; i++) {
        Qcow2Stream *st = &streams[i];
        st->cluster = cache_find(s->compressor, &st->map, &st->generation);
        if (st->cluster) {
            continue;
        }
        st->data = g_try_malloc(st->map.comp_bytes);
        if (!st->data) {
            return false;
        }
        BdrvBatchOp op = {
            .kind = BDRV_BATCH_READ, .offset = (int64_t)st->map.host,
            .bytes = st->map.comp_bytes, .buf = st->data,
        };
        g_array_append_val(ops, op);
    }
    return true;
}

int qcow2_streams_read(BlockDriverState *bs, Qcow2Stream *streams, size_t n)
{
    g_autoptr(GArray) ops = g_array_new(false, false, sizeof(BdrvBatchOp));
    int ret = streams_prepare(qcow2_state(bs), streams, n, ops) ? 0 : -ENOMEM;
    if (ret == 0 && ops->len > 0) {
        bdrv_debug_event(bs->file, "read_compressed");
        ret = bdrv_run_batch(bs->file, (BdrvBatchOp *)ops->data, ops->len);
    }
    if (ret < 0) {
        qcow2_streams_clear(streams, n);
    }
    return ret;
}

/* Where the caller wants the whole cluster, in one piece of memory; NULL if it does not. */
static void *direct_target(const Qcow2Io *io, const Qcow2Mapping *m)
{
    IOV_VECTOR_AUTO part;
    iov_vector_init_slice(&part, io->qiov, qcow2_io_pos(io, m->guest), (size_t)m->bytes);
    return m->bytes == io->s->cluster_size && part.niov == 1 ? part.iov[0].iov_base : NULL;
}

static int unpack_to_cluster(const Qcow2Io *io, Qcow2Stream *st)
{
    BDRVQcow2State *s = io->s;
    st->cluster = unpacked_new(s->cluster_size);
    if (!st->cluster) {
        return -ENOMEM;
    }
    int ret = qcow2_decompress(s->compression_type, st->cluster->data, s->cluster_size, st->data,
                               st->map.comp_bytes);
    if (ret == 0 && st->map.bytes < s->cluster_size) {
        cache_put(s->compressor, st, st->cluster);
    }
    return ret;
}

static int unpack_stream(const Qcow2Io *io, Qcow2Stream *st)
{
    const Qcow2Mapping *m = &st->map;
    void *target = st->cluster ? NULL : direct_target(io, m);
    if (target) {
        return qcow2_decompress(io->s->compression_type, target, io->s->cluster_size, st->data,
                                m->comp_bytes);
    }
    int ret = st->cluster ? 0 : unpack_to_cluster(io, st);
    if (ret == 0) {
        iov_vector_from_buf(io->qiov, qcow2_io_pos(io, m->guest),
                            st->cluster->data + qcow2_offset_into_cluster(io->s, m->guest),
                            (size_t)m->bytes);
    }
    return ret;
}

typedef struct UnpackTask {
    const Qcow2Io *io;
    Qcow2Stream *stream;
} UnpackTask;

static int unpack_task(void *opaque)
{
    UnpackTask *task = opaque;
    return unpack_stream(task->io, task->stream);
}

int qcow2_streams_unpack(const Qcow2Io *io, Qcow2Stream *streams, size_t n)
{
    if (n == 1) {
        return unpack_stream(io, &streams[0]);
    }
    g_autofree UnpackTask *tasks = g_new(UnpackTask, n);
    QbTaskGroup group;
    qb_group_init(&group);
    for (size_t i = 0; i < n; i++) {
        tasks[i] = (UnpackTask){io, &streams[i]};
        qb_group_submit(&group, qb_compute_pool(), unpack_task, &tasks[i]);
    }
    int ret = qb_group_wait(&group, 0);
    qb_group_destroy(&group);
    return ret;
}

/* --- writing: pack --- */

typedef enum PackedAs { PACKED_ZERO, PACKED_STREAM, PACKED_PLAIN } PackedAs;

typedef struct Packed {
    const Qcow2Io *io;
    uint64_t guest;
    size_t in_bytes;  /* of the caller's data; less than a cluster at the end of the disk only */
    PackedAs as;
    uint8_t *out;     /* owned */
    size_t out_bytes;
    uint64_t host;    /* 0: no space taken */
} Packed;

typedef struct Batch {
    const Qcow2Io *io;
    Packed p[MAX_BATCH];
    Qcow2L2Entry old[MAX_BATCH], new[MAX_BATCH];
    size_t n;
    uint64_t guest;
    int64_t below_end; /* up to here the backing file shows where nothing is allocated */
} Batch;

/* The cluster's data in one piece, zero-padded; *ret_owned when that needed memory of its own. */
static const uint8_t *source_of(const Packed *p, uint8_t **ret_owned)
{
    size_t size = p->io->s->cluster_size, pos = qcow2_io_pos(p->io, p->guest);
    IOV_VECTOR_AUTO part;
    *ret_owned = NULL;
    iov_vector_init_slice(&part, p->io->qiov, pos, p->in_bytes);
    if (p->in_bytes == size && part.niov == 1) {
        return part.iov[0].iov_base;
    }
    uint8_t *copy = g_try_malloc0(size);
    if (copy) {
        iov_vector_to_buf(p->io->qiov, pos, copy, p->in_bytes);
    }
    *ret_owned = copy;
    return copy;
}

static int pack(void *opaque)
{
    Packed *p = opaque;
    const BDRVQcow2State *s = p->io->s;
    bool can_say_zero = s->version >= 3 || !p->io->bs->backing;
    g_autofree uint8_t *owned = NULL;
    const uint8_t *data = source_of(p, &owned);
    if (!data) {
        return -ENOMEM;
    }
    if (can_say_zero && qb_buffer_is_zero(data, s->cluster_size)) {
        p->as = PACKED_ZERO;
        return 0;
    }
    p->out = g_try_malloc(s->cluster_size);
    if (!p->out) {
        return -ENOMEM;
    }
    ssize_t len = qcow2_compress(s->compression_type, p->out, s->cluster_size - 1, data,
                                 s->cluster_size);
    p->as = len < 0 ? PACKED_PLAIN : PACKED_STREAM;
    p->out_bytes = len < 0 ? 0 : (size_t)len;
    return len < 0 && len != -ENOSPC ? (int)len : 0;
}

static int batch_pack(Batch *b)
{
    if (b->n == 1) {
        return pack(&b->p[0]);
    }
    QbTaskGroup group;
    qb_group_init(&group);
    for (size_t i = 0; i < b->n; i++) {
        qb_group_submit(&group, qb_compute_pool(), pack, &b->p[i]);
    }
    int ret = qb_group_wait(&group, 0);
    qb_group_destroy(&group);
    return ret;
}

/* --- writing: place --- */

/* Invariant 3. */
static int batch_check_targets(Batch *b)
{
    Qcow2User user;
    qcow2_user_announce(b->io->s, &user);
    int ret = qcow2_load_entries(b->io->bs, b->guest, b->n, b->old);
    qcow2_user_leave(b->io->s, &user);
    for (size_t i = 0; i < b->n && ret == 0; i++) {
        bool taken = qcow2_entry_is_compressed(b->old[i])
                     || qcow2_entry_has_host(b->io->s, b->old[i]);
        ret = taken ? -EIO : 0;
    }
    return ret;
}

static Qcow2L2Entry stream_entry(const BDRVQcow2State *s, const Packed *p)
{
    uint64_t sectors = ((p->host + p->out_bytes - 1) >> 9) - (p->host >> 9);
    assert(sectors <= s->csize_mask && p->host >> s->csize_shift == 0);
    return (Qcow2L2Entry){
        .entry = QCOW2_ENTRY_COMPRESSED | sectors << s->csize_shift | p->host,
    };
}

static Qcow2L2Entry zero_entry(const Batch *b, size_t i)
{
    const BDRVQcow2State *s = b->io->s;
    bool below = (int64_t)b->p[i].guest < b->below_end;
    bool partly_unallocated = s->has_subclusters && b->old[i].bitmap != 0;
    if (!below && !partly_unallocated) {
        return b->old[i]; /* reads zero as it is */
    }
    if (s->has_subclusters) {
        return (Qcow2L2Entry){.bitmap = UINT64_C(0xffffffff) << 32};
    }
    return (Qcow2L2Entry){.entry = QCOW2_ENTRY_ZERO};
}

static int place_stream(Batch *b, Packed *p)
{
    BlockDriverState *bs = b->io->bs;
    unsigned size = b->io->s->cluster_size;
    int64_t host = p->out_bytes < size
                       ? qcow2_alloc_bytes(bs, (uint32_t)p->out_bytes)
                       : qcow2_alloc_clusters(bs, qb_align_up(p->out_bytes, size));
    if (host < 0) {
        return (int)host;
    }
    if (host == 0) {
        return qcow2_signal_corruption(bs, true, -1,
                                       "Preventing invalid allocation of compressed cluster at "
                                       "offset 0");
    }
    p->host = (uint64_t)host;
    uint64_t limit = MIN(UINT64_C(1) << b->io->s->csize_shift, QCOW2_MAX_HOST_OFFSET);
    return p->host + p->out_bytes > limit ? -EFBIG : 0;
}

static int batch_place(Batch *b)
{
    int ret = 0;
    for (size_t i = 0; i < b->n && ret == 0; i++) {
        Packed *p = &b->p[i];
        b->new[i] = b->old[i];
        if (p->as == PACKED_ZERO) {
            b->new[i] = zero_entry(b, i);
        } else if (p->as == PACKED_STREAM) {
            ret = place_stream(b, p);
            b->new[i] = ret == 0 ? stream_entry(b->io->s, p) : b->old[i];
        }
    }
    return ret;
}

/* Gives back the space of streams from @first on. */
static void batch_undo(Batch *b, size_t first)
{
    for (size_t i = first; i < b->n; i++) {
        Packed *p = &b->p[i];
        if (p->host) {
            qcow2_alloc_undo(b->io->bs, p->host, p->out_bytes);
            p->host = 0;
        }
    }
}

/* --- writing: write and link --- */

static int write_streams(Batch *b, uint64_t host, IoVector *qiov)
{
    BlockDriverState *bs = b->io->bs;
    int ret = qcow2_check_overlap(bs, QCOW2_OL_NONE, host, qiov->size);
    if (ret < 0) {
        return ret;
    }
    cache_drop(b->io->s->compressor, host, qiov->size);
    bdrv_debug_event(bs->file, "write_compressed");
    return bdrv_pwritev(bs->file, (int64_t)host, (int64_t)qiov->size, qiov, 0);
}

/* Streams that lie back to back go out as one. */
static int batch_write(Batch *b)
{
    size_t i = 0;
    int ret = 0;
    while (i < b->n && ret == 0) {
        uint64_t host = b->p[i].host;
        IOV_VECTOR_AUTO run;
        iov_vector_init(&run, MAX_BATCH);
        while (i < b->n && b->p[i].host && b->p[i].host == host + run.size) {
            iov_vector_add(&run, b->p[i].out, b->p[i].out_bytes);
            i++;
        }
        if (run.size > 0) {
            ret = write_streams(b, host, &run);
        } else {
            i++; /* no stream */
        }
    }
    return ret;
}

static int batch_link(Batch *b)
{
    size_t done;
    Qcow2Change change = {
        .guest = b->guest, .n = b->n, .old = b->old, .new = b->new, .type = QCOW2_DISCARD_OTHER,
    };
    int ret = qcow2_link(b->io->bs, &change, &done);
    batch_undo(b, done);
    return ret == QCOW2_STALE ? -EIO : ret; /* somebody mapped what must be unmapped */
}

static int batch_write_plain(Batch *b)
{
    int ret = 0;
    for (size_t i = 0; i < b->n && ret == 0; i++) {
        if (b->p[i].as == PACKED_PLAIN) {
            ret = qcow2_write_guest(b->io, b->p[i].guest, b->p[i].in_bytes);
        }
    }
    return ret;
}

/* Puts the streams into the file, all of them or none. */
static int batch_store(Batch *b)
{
    int ret = batch_place(b);
    if (ret == 0) {
        ret = batch_write(b);
    }
    if (ret < 0) {
        batch_undo(b, 0);
    }
    return ret;
}

static int batch_run(Batch *b)
{
    int ret = batch_check_targets(b);
    if (ret == 0) {
        ret = batch_pack(b);
    }
    if (ret < 0) {
        return ret;
    }
    ret = batch_store(b);
    if (ret == -ENOSPC && qcow2_reclaim(b->io->bs)) {
        ret = batch_store(b); /* what quarantine held may do */
    }
    if (ret < 0) {
        return ret;
    }
    ret = batch_link(b);
    if (ret == 0) {
        ret = batch_write_plain(b);
    }
    return ret < 0 ? ret : qcow2_relieve(b->io->bs);
}

static void batch_init(Batch *b, const Qcow2Io *io, uint64_t guest, uint64_t bytes)
{
    unsigned size = io->s->cluster_size;
    size_t max = CLAMP(MAX_BATCH_BYTES / size, 1, MAX_BATCH);
    b->io = io;
    b->guest = guest;
    b->n = MIN(qcow2_size_to_clusters(io->s, bytes), max);
    for (size_t i = 0; i < b->n; i++) {
        uint64_t into = (uint64_t)i * size;
        b->p[i] = (Packed){
            .io = io, .guest = guest + into, .in_bytes = (size_t)MIN(bytes - into, size),
        };
    }
}

static int write_batch(const Qcow2Io *io, uint64_t guest, uint64_t bytes, uint64_t *ret_done)
{
    Batch b;
    batch_init(&b, io, guest, bytes);
    *ret_done = MIN(bytes, (uint64_t)b.n << io->s->cluster_bits);
    b.below_end = bdrv_backing_end(io->bs);
    int ret = b.below_end < 0 ? (int)b.below_end : batch_run(&b);
    for (size_t i = 0; i < b.n; i++) {
        g_free(b.p[i].out);
    }
    return ret;
}

/* --- moving --- */

/* Reads the stream of @m, which must still be what the entry says. */
static int load_stream(Batch *b, const Qcow2Mapping *m)
{
    BlockDriverState *bs = b->io->bs;
    Packed *p = &b->p[0];
    Qcow2User user;
    Qcow2Mapping now = {0};
    qcow2_user_announce(b->io->s, &user);
    int ret = qcow2_load_entries(bs, b->guest, 1, b->old);
    if (ret == 0) {
        now = qcow2_entry_mapping(b->io->s, b->old[0], b->guest, b->guest + 1);
    }
    bool same = now.type == QCOW2_COMPRESSED && now.host == m->host &&
                now.comp_bytes == m->comp_bytes;
    ret = ret == 0 && !same ? -EIO : ret;
    ret = ret < 0 ? ret : bdrv_pread(bs->file, (int64_t)m->host, m->comp_bytes, p->out, 0);
    qcow2_user_leave(b->io->s, &user);
    return ret;
}

int qcow2_move_stream(BlockDriverState *bs, const Qcow2Mapping *m)
{
    BDRVQcow2State *s = qcow2_state(bs);
    const Qcow2Io io = {.bs = bs, .s = s};
    g_autofree uint8_t *data = g_try_malloc(m->comp_bytes);
    Batch b = {.io = &io, .n = 1, .guest = qcow2_start_of_cluster(s, m->guest)};
    b.p[0] = (Packed){
        .io = &io, .guest = b.guest, .as = PACKED_STREAM, .out = data, .out_bytes = m->comp_bytes,
    };
    int ret = data ? load_stream(&b, m) : -ENOMEM;
    ret = ret < 0 ? ret : batch_store(&b);
    ret = ret < 0 ? ret : batch_link(&b);
    return ret < 0 ? ret : qcow2_relieve(bs);
}

/* Whole clusters, or the rest of the disk. */
static bool range_is_compressible(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    const BDRVQcow2State *s = qcow2_state(bs);
    bool start_ok = qcow2_offset_into_cluster(s, (uint64_t)offset) == 0;
    bool end_ok = qcow2_offset_into_cluster(s, (uint64_t)(offset + bytes)) == 0
                  || offset + bytes == bdrv_getlength(bs);
    return start_ok && end_ok;
}

int qcow2_pwritev_compressed(BlockDriverState *bs, BdrvRequest *req, int64_t offset, int64_t bytes,
                             IoVector *qiov, size_t qiov_offset)
{
    BDRVQcow2State *s = qcow2_state(bs);
    if (atomic_load(&s->corrupt)) {
        return -ENOMEDIUM;
    }
    if (s->has_data_file) {
        return -ENOTSUP;
    }
    if (!range_is_compressible(bs, offset, bytes)) {
        return -EINVAL;
    }
    qcow2_serialise(s, req);
    int ret = 0;
    Qcow2Io io = {
        .bs = bs, .s = s, .req = req, .qiov = qiov, .qiov_offset = qiov_offset,
        .base = (uint64_t)offset,
    };
    uint64_t guest = (uint64_t)offset, left = (uint64_t)bytes, done;
    while (left > 0 && ret == 0) {
        ret = write_batch(&io, guest, left, &done);
        guest += done;
        left -= done;
    }
    return ret;
}
