/*
 * Runs a fuzz target without a fuzzer: its seeds, files, and blind mutations of the seeds.
 *
 *      replay [--rounds N] [--seed S] [--save FILE] [FILE...]
 *      replay --corpus DIR        writes the seeds as files, for libFuzzer to begin with
 *
 * Round k mutates by a generator that is seeded with S + k, so `--seed S+k --rounds 1` runs that round
 * alone.  With --save each input is written to FILE before it runs: after a crash it is there.
 *
 * An input may take 10 seconds of processor time and 512 MiB of memory, as libFuzzer is told in `run`;
 * a sanitizer's own memory is not told apart from the target's, so there only libFuzzer looks.
 *
 * Deliberately not done: no feedback of coverage; libFuzzer has it.
 *
 * SPDX-License-Identifier: MIT
 */
#include <glib.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <unistd.h>
#include "tests/fuzz/fuzz.h"

#define SECONDS_MAX 10
#define MEMORY_MAX_KIB (512 << 10)

static GPtrArray *seeds; /* GBytes */

static void add_seed(const void *data, size_t size)
{
    g_ptr_array_add(seeds, g_bytes_new(data, size));
}

static void on_timeout(int sig)
{
    static const char what[] = "an input takes more than 10 seconds\n";
    ssize_t n = write(STDERR_FILENO, what, sizeof(what) - 1);
    (void)n;
    abort();
}

static void check_memory(void)
{
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    if (usage.ru_maxrss > MEMORY_MAX_KIB) {
        fprintf(stderr, "an input took %ld KiB of memory\n", usage.ru_maxrss);
        abort();
    }
#endif
}

static void run(const void *data, size_t size, const char *save)
{
    const struct itimerval limit = {.it_value.tv_sec = SECONDS_MAX}, none = {0};
    if (save) {
        g_file_set_contents(save, data, (gssize)size, NULL);
    }
    setitimer(ITIMER_PROF, &limit, NULL);
    LLVMFuzzerTestOneInput(data, size);
    setitimer(ITIMER_PROF, &none, NULL);
    check_memory();
}

/* One change: a bit, a byte, a few bytes inserted, removed or repeated. */
static void mutate(GByteArray *input, GRand *rand)
{
    uint8_t bytes[8];
    guint at = input->len ? (guint)g_rand_int_range(rand, 0, (gint)input->len) : 0;
    guint n = (guint)g_rand_int_range(rand, 1, 9);
    for (guint i = 0; i < n; i++) {
        bytes[i] = (uint8_t)g_rand_int(rand);
    }
    switch (input->len ? g_rand_int_range(rand, 0, 4) : 3) {
    case 0:
        input->data[at] ^= (uint8_t)(1u << (bytes[0] % 8));
        break;
    case 1:
        input->data[at] = bytes[0];
        break;
    case 2:
        g_byte_array_remove_range(input, at, MIN(n, input->len - at));
        break;
    default: {
        g_autofree uint8_t *tail = g_memdup2(input->data + at, input->len - at);
        guint rest = input->len - at;
        g_byte_array_set_size(input, at);
        g_byte_array_append(input, bytes, n);
        g_byte_array_append(input, tail ? tail : bytes, rest);
    }
    }
}

static void run_round(guint32 seed, const char *save)
{
    GRand *rand = g_rand_new_with_seed(seed);
    const GBytes *from = seeds->pdata[g_rand_int_range(rand, 0, (gint)seeds->len)];
    gsize size;
    const void *data = g_bytes_get_data((GBytes *)from, &size);
    g_autoptr(GByteArray) input = g_byte_array_new();
    g_byte_array_append(input, data, (guint)size);
    for (gint changes = g_rand_int_range(rand, 1, 12); changes > 0; changes--) {
        mutate(input, rand);
    }
    run(input->data, input->len, save);
    g_rand_free(rand);
}

static int write_corpus(const char *dir)
{
    for (guint i = 0; i < seeds->len; i++) {
        g_autofree char *path = g_strdup_printf("%s/seed-%u", dir, i);
        gsize size;
        const char *data = g_bytes_get_data(seeds->pdata[i], &size);
        if (!g_file_set_contents(path, data, (gssize)size, NULL)) {
            fprintf(stderr, "cannot write %s\n", path);
            return 1;
        }
    }
    return 0;
}

static int run_files(char **files, const char *save)
{
    for (; *files; files++) {
        g_autofree char *data = NULL;
        gsize size;
        if (!g_file_get_contents(*files, &data, &size, NULL)) {
            fprintf(stderr, "cannot read %s\n", *files);
            return 1;
        }
        run(data, size, save);
    }
    return 0;
}

int main(int argc, char **argv)
{
    static int rounds, seed = -1;
    static char *corpus, *save;
    static char **files;
    static const GOptionEntry entries[] = {
        {"rounds", 0, 0, G_OPTION_ARG_INT, &rounds, "how many mutated seeds to run", "N"},
        {"seed", 0, 0, G_OPTION_ARG_INT, &seed, "of the first round", "S"},
        {"save", 0, 0, G_OPTION_ARG_FILENAME, &save, "keep the input that runs", "FILE"},
        {"corpus", 0, 0, G_OPTION_ARG_FILENAME, &corpus, "write the seeds and end", "DIR"},
        {G_OPTION_REMAINING, 0, 0, G_OPTION_ARG_FILENAME_ARRAY, &files, NULL, "FILE..."},
        {NULL},
    };
    GOptionContext *context = g_option_context_new(NULL);
    g_option_context_add_main_entries(context, entries, NULL);
    bool ok = g_option_context_parse(context, &argc, &argv, NULL);
    g_option_context_free(context);
    if (!ok) {
        fprintf(stderr, "usage: %s [--rounds N] [--seed S] [--save FILE] [FILE...]\n", argv[0]);
        return 2;
    }
    signal(SIGPROF, on_timeout);
    seeds = g_ptr_array_new_with_free_func((GDestroyNotify)g_bytes_unref);
    fuzz_seeds(add_seed);
    int status = 0;
    if (corpus) {
        status = write_corpus(corpus);
    } else if (files) {
        status = run_files(files, save);
    } else {
        guint32 first = seed < 0 ? g_random_int() & INT32_MAX : (guint32)seed;
        printf("seed %u (replay: %s --rounds %d --seed %u)\n", first, argv[0], rounds, first);
        fflush(stdout);
        for (guint i = 0; i < seeds->len; i++) {
            gsize size;
            const void *data = g_bytes_get_data(seeds->pdata[i], &size);
            run(data, size, save);
        }
        for (int i = 0; i < rounds; i++) {
            run_round(first + (guint32)i, save);
        }
    }
    g_ptr_array_unref(seeds);
    g_strfreev(files);
    return status;
}
