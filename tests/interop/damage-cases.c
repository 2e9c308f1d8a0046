/*
 * Damages an image field by field and lets the driver at it, in one process: thousands of cases in
 * the time that a few processes take.
 *
 *      damage-cases [OPTIONS] IMAGE       a sound qcow2 image; its backing file and external data
 *                                         file, if any, are BASE and DATA
 *        --base BASE, --data DATA         raw files
 *        --cases N     so many, drawn at random (0: every field with every value)
 *        --random N    and so many cases of several fields or bytes at once
 *        --seed S      what is drawn
 *        --only I      this case alone (the number that a failure says)
 *        --sample N:DIR   writes one in N of the damaged images to DIR/I.qcow2
 *
 * Each case is a copy of the image in memory with one field changed:
 *
 *      info --> check --> read everything      none of them writes
 *      check -r leaks, check -r all            what they call clean is clean; what could be read
 *                                              before a repair can be read after it; also when
 *                                              it is interrupted and run again
 *      open for writing, write, zero, discard, snapshot, resize, flush
 *
 * It must end with errors or a sound image: no crash, nothing that a sanitizer finds, no more than
 * CPU_SECONDS, no more memory than metadata may take.  Cases run in a child; when it dies, its
 * parent says which case that was and goes on with the next one.
 *
 * SPDX-License-Identifier: MIT
 */
#include "../unit/qcow2-rec.h"
#include "damage-fields.h"

#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>

enum {
    CPU_SECONDS = 5,       /* for a case; a sanitizer takes longer */
    WALL_SECONDS = 60,
    MEMORY_MIB = 256 + 64, /* above what the process had before */
    MAX_FAILURES = 20,
};

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { SANITIZED = 1, SLOWER = 10 };
#else
enum { SANITIZED = 0, SLOWER = 1 };
#endif

/* What parent and child both see. */
typedef struct Shared {
    _Atomic(uint64_t) current; /* case */
    _Atomic(unsigned) failures;
    char story[512];           /* of the current case: what was damaged */
    char step[128];            /* what is being done to it */
} Shared;

typedef struct Options {
    const char *image, *base, *data;
    uint64_t cases, random, seed, only, sample;
    const char *sample_dir;
} Options;

typedef struct Session {
    const Options *o;
    Shared *shared;
    RecFile *image;          /* sound */
    RecFile *damaged;        /* the case in hand, before anything is done to it */
    RecFile *base, *data;    /* or NULL */
    DamageLayout *layout;
    uint64_t cluster;
    uint8_t *guest;          /* sound content; NULL: cannot be read */
    size_t guest_bytes;
    size_t memory_before;    /* KiB */
    QbProgress progress;     /* of checks */
    unsigned findings_left;  /* before the check is asked to stop; 0: it is not */
} Session;

/* ---------------------------------------------------------------- saying */

static void fail(Session *s, const char *fmt, ...) G_GNUC_PRINTF(2, 3);
static void fail(Session *s, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    g_autofree char *text = g_strdup_vprintf(fmt, ap);
    va_end(ap);
    printf("FAILED case %" PRIu64 " (%s), %s: %s\n", atomic_load(&s->shared->current),
           s->shared->story, s->shared->step, text);
    fflush(stdout);
    atomic_fetch_add(&s->shared->failures, 1);
}

static void step(Session *s, const char *what)
{
    g_strlcpy(s->shared->step, what, sizeof(s->shared->step));
}

/* ---------------------------------------------------------------- opening */

/* A copy of the damaged image to do something to. */
static RecFile *copy_of(Session *s)
{
    return rec_file_dup("copy", s->damaged);
}

static json_t *open_options(Session *s, const RecFile *f, int flags)
{
    g_autoptr(GString) text = g_string_new(NULL);
    g_string_printf(text, "driver=qcow2,discard=unmap,file.driver=test-rec,file.discard=unmap,"
                          "file.name=%s", f->name);
    if (s->data && !(flags & BDRV_O_NO_IO)) {
        g_string_append(text, ",data-file.driver=test-rec,data-file.name=data");
    }
    if (!s->base) {
        return qb_opts_parse(text->str, NULL, NULL);
    }
    if (!(flags & BDRV_O_NO_BACKING)) {
        g_string_append(text, ",backing.driver=raw,backing.file.driver=test-rec,"
                              "backing.file.name=base");
    }
    return qb_opts_parse(text->str, NULL, NULL);
}

/* NULL when it does not open, which is fine. */
static BlockBackend *try_open(Session *s, const RecFile *f, int flags)
{
    g_autoptr(GError) err = NULL;
    flags |= s->base ? 0 : BDRV_O_NO_BACKING; /* whatever it names now */
    BlockDriverState *bs = bdrv_open(NULL, open_options(s, f, flags), flags, &err);
    if (!bs) {
        if (!err || !err->message[0]) {
            fail(s, "does not open and does not say why");
        }
        return NULL;
    }
    unsigned perm = flags & BDRV_O_RDWR ? BLK_PERM_ALL
                    : flags & BDRV_O_NO_IO ? 0 : BLK_PERM_CONSISTENT_READ;
    BlockBackend *blk = blk_new_with_bs(bs, perm, BLK_PERM_ALL, &err);
    if (!blk) {
        fail(s, "no backend: %s", err->message);
    }
    bdrv_unref(bs);
    return blk;
}

/* ---------------------------------------------------------------- looking */

static void expect_unwritten(Session *s, const RecFile *f, unsigned writes)
{
    if (f->count[REC_WRITE] != writes) {
        fail(s, "the image was written");
    }
}

static void look_at_info(Session *s, RecFile *f)
{
    step(s, "info");
    g_autoptr(BlockBackend) blk = try_open(s, f, BDRV_O_NO_BACKING | BDRV_O_NO_IO);
    if (!blk) {
        return;
    }
    BlockDriverInfo info;
    bdrv_get_info(blk_bs(blk), &info, NULL);
    json_decref(bdrv_get_specific_info(blk_bs(blk), NULL));
    GArray *snapshots = bdrv_snapshot_list(blk_bs(blk), NULL);
    g_clear_pointer(&snapshots, g_array_unref);
    expect_unwritten(s, f, 0);
}

static void note_finding(const BdrvCheckFinding *finding, void *opaque)
{
    Session *s = opaque;
    if (s->o->only != UINT64_MAX) {
        printf("  %s: %s\n", finding->code, finding->text);
    }
    if (!finding->text[0] || !finding->code[0]) {
        fail(s, "a finding without words");
    }
    if (s->findings_left && --s->findings_left == 0) {
        atomic_store(&s->progress.cancel, true);
    }
}

/* False: it could not be run. */
static bool check(Session *s, const RecFile *f, unsigned fix, BdrvCheckResult *ret)
{
    BdrvCheckOptions opts = {.fix = fix, .finding = note_finding, .opaque = s,
                             .progress = &s->progress};
    int flags = BDRV_O_CHECK | BDRV_O_NO_BACKING;
    flags |= fix ? BDRV_O_RDWR | BDRV_O_RESIZE : BDRV_O_NO_IO;
    g_autoptr(BlockBackend) blk = try_open(s, f, flags);
    *ret = (BdrvCheckResult){0};
    qb_progress_init(&s->progress, 0);
    return blk && bdrv_check(blk_bs(blk), &opts, ret, NULL);
}

/* Which sectors read as they were; damage may change the size. NULL: the image does not open. */
static uint8_t *readable_sectors(Session *s, const RecFile *f)
{
    if (!s->guest) {
        return NULL;
    }
    g_autoptr(BlockBackend) blk = try_open(s, f, 0);
    int64_t length = blk ? blk_getlength(blk) : 0;
    uint8_t buf[REC_SECTOR], *map = blk ? g_malloc0(s->guest_bytes / REC_SECTOR + 1) : NULL;
    for (size_t pos = 0; blk && pos < s->guest_bytes && (int64_t)pos < length;
         pos += REC_SECTOR) {
        size_t bytes = MIN(REC_SECTOR, s->guest_bytes - pos);
        map[pos / REC_SECTOR] = (int64_t)(pos + bytes) <= length &&
                                blk_pread(blk, (int64_t)pos, (int64_t)bytes, buf, 0) == 0 &&
                                memcmp(buf, s->guest + pos, bytes) == 0;
    }
    return map;
}

static void walk_status(Session *s, BlockBackend *blk)
{
    int64_t pos = 0, length = MIN(blk_getlength(blk), (int64_t)s->guest_bytes);
    while (pos < length) {
        BdrvStatus status;
        BDRV_GRAPH_GUARD();
        int ret = bdrv_block_status_above(blk_bs(blk), NULL, pos, length - pos, &status);
        if (ret == 0 && status.bytes <= 0) {
            fail(s, "block status of length %" PRId64, status.bytes);
            return;
        }
        pos += ret < 0 ? REC_SECTOR : status.bytes;
    }
}

static uint8_t *look_at_content(Session *s, RecFile *f)
{
    step(s, "status");
    {
        g_autoptr(BlockBackend) blk = try_open(s, f, 0);
        if (blk) {
            walk_status(s, blk);
        }
    }
    step(s, "read");
    uint8_t *map = readable_sectors(s, f);
    expect_unwritten(s, f, 0);
    return map;
}

/* ---------------------------------------------------------------- repair */

static bool is_clean(const BdrvCheckResult *r)
{
    return !r->corruptions && !r->check_errors;
}

/* The next look must agree with what a repair says is left. False: there is none. */
static bool look_again(Session *s, RecFile *f, const BdrvCheckResult *first,
                       BdrvCheckResult *again)
{
    step(s, "check after the repair");
    unsigned writes = f->count[REC_WRITE];
    if (!check(s, f, 0, again)) {
        fail(s, "the repaired image does not open for a check");
        return false;
    }
    expect_unwritten(s, f, writes);
    if (is_clean(first) && (!is_clean(again) || again->leaks > first->leaks)) {
        fail(s, "%" PRIu64 " corruptions, %" PRIu64 " leaks after a repair that left none",
             again->corruptions, again->leaks);
    }
    return true;
}

static void repair(Session *s, RecFile *f, unsigned fix)
{
    BdrvCheckResult first, again, third;
    step(s, fix & BDRV_FIX_ERRORS ? "check -r all" : "check -r leaks");
    if (!check(s, f, fix, &first) || !look_again(s, f, &first, &again)) {
        return;
    }
    step(s, "repair of the repaired");
    if (is_clean(&again) && (fix & BDRV_FIX_ERRORS) &&
        (!check(s, f, fix, &third) || !is_clean(&third) || third.leaks ||
         third.corruptions_fixed)) {
        fail(s, "a sound image gets worse");
    }
}

static void expect_nothing_lost(Session *s, const RecFile *f, const uint8_t *before)
{
    step(s, "read after the repair");
    if (!before) {
        return;
    }
    g_autofree uint8_t *after = readable_sectors(s, f);
    for (size_t i = 0; i < s->guest_bytes / REC_SECTOR; i++) {
        if (before[i] && (!after || !after[i])) {
            fail(s, "sector %zu could be read before the repair", i);
            return;
        }
    }
}

/* Somebody stops a repair at one of its first findings, and lets it run another time. */
static void repair_interrupted(Session *s, const uint8_t *readable)
{
    RecFile *f = copy_of(s);
    BdrvCheckResult result, again;
    step(s, "interrupted check -r all");
    s->findings_left = 1 + g_str_hash(s->shared->story) % 5;
    bool done = check(s, f, BDRV_FIX_LEAKS | BDRV_FIX_ERRORS, &result);
    s->findings_left = 0;
    if (done) {
        look_again(s, f, &result, &again);
    }
    expect_nothing_lost(s, f, readable);
    repair(s, f, BDRV_FIX_LEAKS | BDRV_FIX_ERRORS);
    expect_nothing_lost(s, f, readable);
    rec_file_free(f);
}

static void repair_both_ways(Session *s, const uint8_t *readable)
{
    static const unsigned fixes[] = {BDRV_FIX_LEAKS, BDRV_FIX_LEAKS | BDRV_FIX_ERRORS};
    for (size_t i = 0; i < G_N_ELEMENTS(fixes); i++) {
        RecFile *f = copy_of(s);
        repair(s, f, fixes[i]);
        expect_nothing_lost(s, f, readable);
        rec_file_free(f);
    }
}

/* ---------------------------------------------------------------- use */

/* Writes that allocate, overwrite, zero and discard; whatever they do they end. */
static void write_about(Session *s, BlockBackend *blk)
{
    int64_t cluster = (int64_t)s->cluster, length = MIN(blk_getlength(blk), 64 * cluster);
    g_autofree uint8_t *buf = g_malloc((size_t)(2 * cluster));
    memset(buf, 0x77, (size_t)(2 * cluster));
    for (int64_t i = 0; (3 * i + 2) * cluster <= length && i < 8; i++) {
        int64_t pos = 3 * i * cluster;
        switch (i % 4) {
        case 0:
            blk_pwrite(blk, pos, 2 * cluster, buf, 0);
            break;
        case 1:
            blk_pwrite(blk, pos + 5, 700, buf, 0);
            break;
        case 2:
            blk_pwrite_zeroes(blk, pos, cluster, BDRV_REQ_MAY_UNMAP);
            break;
        default:
            blk_pdiscard(blk, pos, cluster);
        }
    }
    blk_flush(blk);
}

static void use_snapshots(Session *s, BlockBackend *blk)
{
    BlockDriverState *bs = blk_bs(blk);
    g_autoptr(GArray) list = bdrv_snapshot_list(bs, NULL);
    step(s, "snapshot create");
    bdrv_snapshot_create(bs, "new", NULL);
    write_about(s, blk);
    if (list && list->len) {
        g_autofree char *id = g_strdup(g_array_index(list, BdrvSnapshotInfo, 0).id);
        step(s, "snapshot apply");
        bdrv_snapshot_apply(bs, id, NULL);
        step(s, "snapshot delete");
        bdrv_snapshot_delete(bs, id, NULL, NULL);
    }
}

static void use_length(Session *s, BlockBackend *blk)
{
    int64_t length = blk_getlength(blk);
    step(s, "shrink");
    blk_truncate(blk, length / 2 / 512 * 512, true, PREALLOC_MODE_OFF, false, NULL);
    step(s, "grow");
    blk_truncate(blk, (int64_t)s->guest_bytes + 3 * (int64_t)s->cluster, true, PREALLOC_MODE_OFF,
                 false, NULL);
    write_about(s, blk);
}

static void use_image(Session *s)
{
    static void (*const uses[])(Session *, BlockBackend *) = {write_about, use_snapshots,
                                                              use_length};
    RecFile *f = copy_of(s);
    step(s, "open for writing");
    {
        g_autoptr(BlockBackend) blk = try_open(s, f, BDRV_O_RDWR | BDRV_O_RESIZE);
        if (blk) {
            step(s, "write");
            uses[atomic_load(&s->shared->current) % G_N_ELEMENTS(uses)](s, blk);
            step(s, "close");
        }
    }
    step(s, "check of the written");
    BdrvCheckResult result;
    check(s, f, 0, &result);
    rec_file_free(f);
}

/* ---------------------------------------------------------------- a case */

static size_t memory_kib(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (size_t)usage.ru_maxrss;
}

static double cpu_seconds(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

/* The story of case @i, done to s->damaged. */
static void damage(Session *s, uint64_t i)
{
    g_autofree char *story = NULL;
    int64_t length = s->image->length;
    memcpy(s->damaged->data, s->image->data, (size_t)length);
    s->damaged->length = length;
    if (i < s->layout->n_cases) {
        story = damage_field(s->layout, i, s->damaged->data, (size_t)length);
    } else {
        story = damage_at_random(s->layout, s->o->seed + i, s->damaged->data, (size_t *)&length);
        memset(s->damaged->data + length, 0, (size_t)(s->image->length - length));
        s->damaged->length = length;
    }
    g_strlcpy(s->shared->story, story, sizeof(s->shared->story));
}

static void write_sample(Session *s, uint64_t i)
{
    g_autofree char *path = g_strdup_printf("%s/%" PRIu64 ".qcow2", s->o->sample_dir, i);
    if (!g_file_set_contents(path, (char *)s->damaged->data, s->damaged->length, NULL)) {
        fail(s, "cannot write %s", path);
    }
    printf("SAMPLE %" PRIu64 " %s\n", i, s->shared->story);
    fflush(stdout);
}

static void run_case(Session *s, uint64_t i)
{
    double begin = cpu_seconds();
    atomic_store(&s->shared->current, i);
    damage(s, i);
    alarm(WALL_SECONDS * SLOWER);
    RecFile *f = copy_of(s);
    BdrvCheckResult result;
    look_at_info(s, f);
    step(s, "check");
    check(s, f, 0, &result);
    expect_unwritten(s, f, 0);
    g_autofree uint8_t *readable = look_at_content(s, f);
    rec_file_free(f);
    repair_both_ways(s, readable);
    repair_interrupted(s, readable);
    use_image(s);
    step(s, "the whole case");
    /* Every sector is read by itself, and a stream that does not unpack is tried for each one. */
    unsigned larger = s->cluster > 65536 ? 8 : 1;
    if (cpu_seconds() - begin > CPU_SECONDS * SLOWER * larger) {
        fail(s, "took %.1f s", cpu_seconds() - begin);
    }
    if (!SANITIZED && memory_kib() > s->memory_before + (MEMORY_MIB << 10)) {
        fail(s, "took %zu MiB of memory", memory_kib() >> 10);
        s->memory_before = memory_kib();
    }
    if (s->o->sample && g_str_hash(s->shared->story) % s->o->sample == 0) {
        write_sample(s, i);
    }
}

/* ---------------------------------------------------------------- all cases */

static RecFile *load(const char *name, const char *path)
{
    g_autofree char *data = NULL;
    g_autoptr(GError) err = NULL;
    gsize length;
    if (!path) {
        return NULL;
    }
    if (!g_file_get_contents(path, &data, &length, &err)) {
        g_error("%s", err->message);
    }
    return rec_file_new(name, (uint8_t *)data, length, length * 4 + 16 * MIB);
}

static void read_sound(Session *s)
{
    step(s, "opening the sound image");
    g_autoptr(BlockBackend) blk = try_open(s, s->image, 0);
    if (!blk) {
        return; /* encrypted */
    }
    s->guest_bytes = (size_t)blk_getlength(blk);
    s->guest = g_malloc(s->guest_bytes);
    if (blk_pread(blk, 0, (int64_t)s->guest_bytes, s->guest, 0) < 0) {
        fail(s, "the sound image cannot be read");
    }
}

static void session_init(Session *s, const Options *o, Shared *shared)
{
    *s = (Session){.o = o, .shared = shared};
    s->image = load("sound", o->image);
    s->damaged = rec_file_dup("damaged", s->image);
    s->base = load("base", o->base);
    s->data = load("data", o->data);
    s->layout = damage_layout_new(s->image->data, (size_t)s->image->length);
    s->cluster = s->layout->cluster;
}

static void session_clear(Session *s)
{
    RecFile *files[] = {s->image, s->damaged, s->base, s->data};
    for (size_t i = 0; i < G_N_ELEMENTS(files); i++) {
        if (files[i]) {
            rec_file_free(files[i]);
        }
    }
    g_ptr_array_unref(g_steal_pointer(&rec_files));
    damage_layout_free(s->layout);
    g_free(s->guest);
}

/* The cases to run, drawn with the seed; all of them without --cases. */
static GArray *draw_cases(const Session *s)
{
    const Options *o = s->o;
    GArray *list = g_array_new(false, false, sizeof(uint64_t));
    GRand *rand = g_rand_new_with_seed((guint32)o->seed);
    if (o->only != UINT64_MAX) {
        g_array_append_val(list, o->only);
    }
    uint64_t n = o->cases ? o->cases : s->layout->n_cases;
    for (uint64_t i = 0; i < n && o->only == UINT64_MAX; i++) {
        uint64_t drawn = o->cases ? g_rand_int(rand) % s->layout->n_cases : i;
        g_array_append_val(list, drawn);
    }
    for (uint64_t i = 0; i < o->random && o->only == UINT64_MAX; i++) {
        uint64_t beyond = s->layout->n_cases + i;
        g_array_append_val(list, beyond);
    }
    g_rand_free(rand);
    return list;
}

/* In a child: cases from position *@next on. */
static void run_cases(const Options *o, Shared *shared, _Atomic(uint64_t) *next)
{
    Session s;
    bdrv_init();
    bdrv_register(&rec_driver);
    session_init(&s, o, shared);
    read_sound(&s);
    g_autoptr(GArray) list = draw_cases(&s);
    s.memory_before = memory_kib();
    while (*next < list->len && shared->failures < MAX_FAILURES) {
        run_case(&s, g_array_index(list, uint64_t, (*next)++));
    }
    session_clear(&s);
    qb_pools_shutdown();
}

static bool parse_options(int argc, char **argv, Options *o)
{
    gint64 cases = 0, random = 0, seed = 1, only = -1;
    g_autofree char *sample = NULL;
    GOptionEntry entries[] = {
        {"base", 0, 0, G_OPTION_ARG_STRING, &o->base, "backing file", NULL},
        {"data", 0, 0, G_OPTION_ARG_STRING, &o->data, "external data file", NULL},
        {"cases", 0, 0, G_OPTION_ARG_INT64, &cases, "how many to draw", NULL},
        {"random", 0, 0, G_OPTION_ARG_INT64, &random, "cases of several damages", NULL},
        {"seed", 0, 0, G_OPTION_ARG_INT64, &seed, "what is drawn", NULL},
        {"only", 0, 0, G_OPTION_ARG_INT64, &only, "one case", NULL},
        {"sample", 0, 0, G_OPTION_ARG_STRING, &sample, "N:DIR", NULL},
        {NULL, 0, 0, 0, NULL, NULL, NULL},
    };
    GOptionContext *context = g_option_context_new("IMAGE");
    g_option_context_add_main_entries(context, entries, NULL);
    bool ok = g_option_context_parse(context, &argc, &argv, NULL) && argc == 2;
    g_option_context_free(context);
    *o = (Options){.image = ok ? argv[1] : NULL, .base = o->base, .data = o->data,
                   .cases = (uint64_t)cases, .random = (uint64_t)random, .seed = (uint64_t)seed,
                   .only = (uint64_t)only};
    if (sample && strchr(sample, ':')) {
        o->sample = g_ascii_strtoull(sample, NULL, 10);
        o->sample_dir = g_strdup(strchr(sample, ':') + 1);
    }
    return ok;
}

static void *shared_memory(size_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    g_assert_true(p != MAP_FAILED);
    return p;
}

int main(int argc, char **argv)
{
    static Options o;
    if (!parse_options(argc, argv, &o)) {
        fprintf(stderr, "usage: damage-cases [OPTIONS] IMAGE\n");
        return 2;
    }
    Shared *shared = shared_memory(sizeof(*shared));
    _Atomic(uint64_t) *next = shared_memory(sizeof(*next));
    int status = 1;
    uint64_t before = UINT64_MAX; /* where the last child began: the next must get further */
    while (status != 0 && shared->failures < MAX_FAILURES && *next != before) {
        before = *next;
        pid_t child = fork();
        if (child == 0) {
            run_cases(&o, shared, next);
            exit(0);
        }
        waitpid(child, &status, 0);
        if (status != 0) {
            printf("FAILED case %" PRIu64 " (%s), %s: died with status %#x\n", shared->current,
                   shared->story, shared->step, (unsigned)status);
            fflush(stdout);
            shared->failures++;
        }
    }
    printf("%" PRIu64 " cases, %u failures\n", *next, shared->failures);
    return shared->failures ? 1 : 0;
}
