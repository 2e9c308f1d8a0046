/*
 * qemu-img bench: how fast an image takes requests, many under way at once.
 *
 *      offset  |[== size ==]     [== size ==]     [== size ==]  ... |
 *              ^ offset   step   ^                                  ^ length of the image: from
 *                                                                     there on at offset modulo length
 *
 *      free slots --send()--> BlkQueue --done()--> free slots       `depth` of them
 *
 * The requests go through a BlkQueue, as those of a guest would.
 *
 * Invariants
 * 1. At most `depth` requests are under way; a flush is not one of them.
 * 2. With a flush interval, each flush follows so many requests: when all of them are done, or with
 *    --no-drain while they are under way.
 * 3. After a failed request nothing more is sent, what is under way is waited for.
 *
 * SPDX-License-Identifier: MIT
 */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "block/queue.h"
#include "qemu-img/img.h"
#include "util/checked.h"
#include "util/thread.h"

typedef struct BenchArgs {
    const char *format, *cache, *aio, *count, *depth, *flush_interval, *pattern;
    bool image_opts, write, native, no_drain, force_share, quiet;
    uint64_t offset, size, step;
    GPtrArray *objects;
} BenchArgs;

#define FIELD(name) offsetof(BenchArgs, name)
static const ImgOption bench_options[] = {
    {IMG_STRING, 'f', "format", FIELD(format), "FMT", "image format (not probed)"},
    {IMG_FLAG, 0, "image-opts", FIELD(image_opts), NULL, "FILE is an option string"},
    {IMG_STRING, 't', "cache", FIELD(cache), "CACHE", "cache mode [writeback]"},
    {IMG_STRING, 'c', "count", FIELD(count), "COUNT", "number of requests [75000]"},
    {IMG_STRING, 'd', "depth", FIELD(depth), "DEPTH", "requests under way at once [64]"},
    {IMG_SIZE, 'o', "offset", FIELD(offset), "OFFSET", "of the first request [0]"},
    {IMG_SIZE, 's', "buffer-size", FIELD(size), "SIZE", "of a request [4k]"},
    {IMG_SIZE, 'S', "step-size", FIELD(step), "SIZE", "from request to request [buffer size]"},
    {IMG_FLAG, 'w', "write", FIELD(write), NULL, "write; the image's content is lost"},
    {IMG_STRING, 0, "pattern", FIELD(pattern), "BYTE", "what is written [0]"},
    {IMG_STRING, 0, "flush-interval", FIELD(flush_interval), "COUNT",
     "flush after so many write requests"},
    {IMG_FLAG, 0, "no-drain", FIELD(no_drain), NULL, "do not wait for requests before a flush"},
    {IMG_STRING, 'i', "aio", FIELD(aio), "AIO", "threads, native or io_uring"},
    {IMG_FLAG, 'n', "native", FIELD(native), NULL, "the same as -i native"},
    {IMG_FLAG, 'U', "force-share", FIELD(force_share), NULL,
     "open the image while another process writes it"},
    {IMG_FLAG, 'q', "quiet", FIELD(quiet), NULL, "accepted, without effect"},
    {IMG_LIST, 0, "object", FIELD(objects), "OBJDEF", "object definition"},
    {IMG_END},
};

static const ImgUsage bench_usage = {"bench", "FILE", "Measure how fast an image takes requests.",
                                     bench_options};

/* ---- arguments ---- */

/* What the arguments say. */
typedef struct BenchPlan {
    unsigned count, depth, flush_interval; /* 0: no flushes */
    int64_t offset, step;
    size_t size;
    int pattern;
    bool write, no_drain;
} BenchPlan;

/* A whole number in @text (NULL: *ret stays); false: said that it is not a @what. */
static bool parse_number(const char *what, const char *text, unsigned min, unsigned max,
                         unsigned *ret)
{
    char *end;

    if (!text) {
        return true;
    }
    guint64 value = g_ascii_strtoull(text, &end, 0);
    if (end == text || *end || strchr(text, '-') || value < min || value > max) {
        img_error("Invalid %s specified", what);
        return false;
    }
    *ret = (unsigned)value;
    return true;
}

static bool check_size(const char *what, uint64_t value, uint64_t max)
{
    if (value > max) {
        img_error("Invalid %s specified. Must be between 0 and %" PRIu64 ".", what, max);
        return false;
    }
    return true;
}

static bool check_flushes(const BenchArgs *args, const BenchPlan *plan)
{
    if (args->flush_interval && !args->write) {
        img_error("--flush-interval is only available in write tests");
        return false;
    }
    if (plan->flush_interval && plan->flush_interval < plan->depth) {
        img_error("Flush interval can't be smaller than depth");
        return false;
    }
    return true;
}

static bool make_plan(const BenchArgs *args, BenchPlan *plan)
{
    unsigned pattern = 0;

    *plan = (BenchPlan){.count = 75000, .depth = 64};
    if (!parse_number("request count", args->count, 0, INT_MAX, &plan->count) ||
        !parse_number("queue depth", args->depth, 1, INT_MAX, &plan->depth) ||
        !parse_number("flush interval", args->flush_interval, 0, INT_MAX,
                      &plan->flush_interval) ||
        !parse_number("pattern byte", args->pattern, 0, 255, &pattern) ||
        !check_size("offset", args->offset, INT64_MAX) ||
        !check_size("buffer size", args->size, INT_MAX) ||
        !check_size("step size", args->step, INT_MAX)) {
        return false;
    }
    plan->pattern = (int)pattern;
    plan->offset = (int64_t)args->offset;
    plan->size = (size_t)args->size;
    plan->step = (int64_t)(args->step ? args->step : args->size);
    plan->write = args->write;
    plan->no_drain = args->no_drain;
    return check_flushes(args, plan);
}

/* ---- the run ---- */

typedef struct Bench Bench;

/* One of the requests under way at once. */
typedef struct BenchSlot {
    Bench *bench;
    struct BenchSlot *next; /* free */
    IoVector qiov;
} BenchSlot;

struct Bench {
    const BenchPlan *plan;
    BlkQueue *queue;
    int64_t length, offset; /* of the image; of the next request */
    unsigned to_send, under_way, since_flush;
    bool flushing; /* and nothing is sent before it is done */
    BenchSlot *free;
    int ret; /* the first error */
};

static void remember_error(Bench *b, int ret)
{
    b->ret = b->ret < 0 ? b->ret : ret;
}

static void request_done(void *opaque, int ret)
{
    BenchSlot *slot = opaque;
    Bench *b = slot->bench;

    remember_error(b, ret);
    b->under_way--;
    slot->next = b->free;
    b->free = slot;
}

static void flush_done(void *opaque, int ret)
{
    Bench *b = opaque;

    remember_error(b, ret);
    b->flushing = false;
}

static void send_request(Bench *b)
{
    const BenchPlan *plan = b->plan;
    BenchSlot *slot = b->free;
    const BlkQueueRequest req = {
        .op = plan->write ? BLK_OP_WRITE : BLK_OP_READ, .offset = b->offset,
        .bytes = (int64_t)plan->size, .qiov = &slot->qiov, .done = request_done, .opaque = slot,
    };

    b->free = slot->next;
    b->under_way++;
    b->to_send--;
    b->since_flush++;
    b->offset = b->length > 0 ? (b->offset + plan->step) % b->length : 0;
    blk_queue_submit(b->queue, &req);
}

static void send_flush(Bench *b)
{
    const BlkQueueRequest req = {.op = BLK_OP_FLUSH, .done = flush_done, .opaque = b};

    b->since_flush = 0;
    b->flushing = !b->plan->no_drain;
    blk_queue_submit(b->queue, &req);
}

static bool flush_is_due(const Bench *b)
{
    return b->plan->flush_interval && b->since_flush == b->plan->flush_interval;
}

/* Sends what may go now. */
static void send_some(Bench *b)
{
    while (b->ret == 0 && !b->flushing && !img_interrupted()) {
        if (flush_is_due(b)) {
            if (b->under_way > 0 && !b->plan->no_drain) {
                return;
            }
            send_flush(b);
        } else if (b->to_send > 0 && b->free) {
            send_request(b);
        } else {
            return;
        }
    }
}

static void run(Bench *b)
{
    send_some(b);
    while (blk_queue_pending(b->queue) > 0) {
        (void)blk_queue_wait(b->queue);
        send_some(b);
    }
}

/* ---- around it ---- */

/* `depth` slots, each with its part of @buf; NULL: no memory for so many. */
static BenchSlot *make_slots(Bench *b, uint8_t *buf)
{
    const BenchPlan *plan = b->plan;
    BenchSlot *slots = g_try_new0(BenchSlot, plan->depth);

    for (unsigned i = slots ? plan->depth : 0; i-- > 0;) {
        slots[i].bench = b;
        iov_vector_init_buf(&slots[i].qiov, buf + (size_t)i * plan->size, plan->size);
        slots[i].next = b->free;
        b->free = &slots[i];
    }
    return slots;
}

static void announce(const BenchPlan *plan)
{
    printf("Sending %u %s requests, %zu bytes each, %u in parallel (starting at offset %" PRId64
           ", step size %" PRId64 ")\n",
           plan->count, plan->write ? "write" : "read", plan->size, plan->depth, plan->offset,
           plan->step);
    if (plan->flush_interval) {
        printf("Sending flush every %u requests\n", plan->flush_interval);
    }
    fflush(stdout);
}

static int measure(Bench *b)
{
    QbProgress progress; /* nobody looks at it, but it has the signals */

    qb_progress_init(&progress, b->plan->count);
    img_progress_start(&progress, false);
    announce(b->plan);
    uint64_t start = qb_now_ns();
    run(b);
    uint64_t end = qb_now_ns();
    img_progress_end(b->ret == 0);
    if (b->ret == 0 && img_interrupted()) {
        img_error("Interrupted after %u of %u requests", b->plan->count - b->to_send,
                  b->plan->count);
        return 1;
    }
    if (b->ret < 0) {
        img_error("Failed request: %s", g_strerror(-b->ret));
        return 1;
    }
    printf("Run completed in %.3f seconds.\n", (double)(end - start) / 1e9);
    return 0;
}

static int bench_image(BlockBackend *blk, const BenchPlan *plan)
{
    Bench b = {.plan = plan, .offset = plan->offset, .to_send = plan->count};
    size_t bytes;

    b.length = blk_getlength(blk);
    if (b.length < 0) {
        img_error("Could not get the image size: %s", g_strerror((int)-b.length));
        return 1;
    }
    bool fits = !qb_mul_overflow((size_t)plan->depth, plan->size, &bytes);
    QB_AUTO_FREE void *buf = fits ? bdrv_try_blockalign(blk_bs(blk), bytes) : NULL;
    b.queue = buf ? blk_queue_new(blk) : NULL;
    if (!b.queue) {
        img_error("Could not allocate the requests: %s", g_strerror(buf ? EMFILE : ENOMEM));
        return 1;
    }
    memset(buf, plan->write ? plan->pattern : 0, bytes);
    BenchSlot *slots = make_slots(&b, buf);
    int status = slots ? measure(&b) : 1;
    if (!slots) {
        img_error("Could not allocate the requests: %s", g_strerror(ENOMEM));
    }
    g_free(slots);
    blk_queue_free(b.queue);
    return status;
}

static int open_flags(const BenchArgs *args)
{
    int flags = args->write ? BDRV_O_RDWR : 0;

    if (args->aio && !blk_parse_aio(args->aio, &flags)) {
        img_error("Invalid aio option: %s", args->aio);
        return -1;
    }
    return args->native ? flags | BDRV_O_AIO_NATIVE : flags;
}

static int bench(const BenchArgs *args, const char *file)
{
    BlkCacheMode cache;
    BenchPlan plan;
    int flags = open_flags(args);

    if (flags < 0 || !make_plan(args, &plan)) {
        return 1;
    }
    if (args->cache && !blk_parse_cache_mode(args->cache, &cache)) {
        img_error("Invalid cache mode");
        return 1;
    }
    const ImgOpen how = {
        .format = args->format, .image_opts = args->image_opts, .cache = args->cache,
        .force_share = args->force_share, .flags = flags,
    };
    BlockBackend *blk = img_open(file, &how);
    return blk ? img_close(blk, bench_image(blk, &plan)) : 1;
}

int img_bench(int argc, char **argv)
{
    BenchArgs args = {.size = 4096};
    g_autoptr(GPtrArray) operands = g_ptr_array_new();
    int status;

    if (!img_parse_args(&bench_usage, argc, argv, &args, operands, &status)) {
        return status;
    }
    g_autoptr(GPtrArray) objects = args.objects;
    if (operands->len != 1) {
        return img_usage_error("bench", "Expecting one image file name");
    }
    if (!img_check_open_args(args.format, args.image_opts) || !img_check_objects(objects)) {
        return 1;
    }
    return bench(&args, operands->pdata[0]);
}
