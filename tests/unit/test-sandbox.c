/*
 * The sandbox: what is open stays usable, threads too, and nothing else is left.
 *
 * Each attempt runs in a process of its own, since there is no way back.
 *
 * SPDX-License-Identifier: MIT
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include <glib.h>
#include "util/sandbox.h"
#include "util/thread.h"

static int open_fd = -1; /* a temporary file, open and unlinked */

static int result(long ret)
{
    return ret < 0 ? errno : 0;
}

static int open_for_reading(void) { return result(open("/etc/hostname", O_RDONLY)); }
static int create_file(void) { return result(open("/tmp/qb-sandbox", O_CREAT | O_RDWR, 0600)); }
static int remove_file(void) { return result(unlink("/tmp/qb-sandbox")); }
static int open_socket(void) { return result(socket(AF_UNIX, SOCK_STREAM, 0)); }
static int start_process(void) { return result(fork()); }
static int run_program(void) { return result(execl("/bin/true", "true", (char *)NULL)); }
static int make_ring(void) { return result(syscall(SYS_io_uring_setup, 8, NULL)); }
static int signal_parent(void) { return result(kill(getppid(), 0)); }

static int type_into_terminal(void)
{
    return result(ioctl(open_fd, TIOCSTI, "x"));
}

static int make_code(void)
{
    void *page = mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return page == MAP_FAILED ? errno : 0;
}

static const struct Attempt {
    const char *name;
    int (*run)(void); /* 0, or the errno it failed with */
} forbidden[] = {
    {"open", open_for_reading}, {"create", create_file},    {"remove", remove_file},
    {"socket", open_socket},    {"fork", start_process},    {"exec", run_program},
    {"ring", make_ring},        {"signal", signal_parent},  {"terminal", type_into_terminal},
    {"code", make_code},
};

static int use_open_file(void)
{
    char byte = 0;
    if (pwrite(open_fd, "x", 1, 5) != 1 || pread(open_fd, &byte, 1, 5) != 1 || byte != 'x') {
        return errno ? errno : EIO;
    }
    return result(ftruncate(open_fd, 100)) || result(fdatasync(open_fd)) ||
           result(fallocate(open_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 50));
}

static void *write_in_thread(void *opaque)
{
    *(bool *)opaque = use_open_file() == 0;
    return NULL;
}

static int use_thread(void)
{
    bool done = false;
    pthread_t thread;
    if (!qb_thread_start(&thread, "worker", write_in_thread, &done)) {
        return EAGAIN;
    }
    pthread_join(thread, NULL);
    return done ? 0 : EIO;
}

static int use_memory(void)
{
    char *big = malloc(64 << 20);
    if (!big) {
        return ENOMEM;
    }
    big[32 << 20] = 1;
    free(big);
    return 0;
}

static const struct Attempt allowed[] = {
    {"file", use_open_file},
    {"thread", use_thread},
    {"memory", use_memory},
};

/* The attempt's result in a process that is shut in; -1: there is no sandbox here. */
static int in_sandbox(int (*run)(void))
{
    int status;
    pid_t pid = fork();
    g_assert_cmpint(pid, >=, 0);
    if (pid == 0) {
        _exit(qb_sandbox_enter(NULL) ? run() : 255);
    }
    g_assert_cmpint(waitpid(pid, &status, 0), ==, pid);
    g_assert_true(WIFEXITED(status));
    return WEXITSTATUS(status) == 255 ? -1 : WEXITSTATUS(status);
}

static void test_forbidden(gconstpointer data)
{
    const struct Attempt *attempt = data;
    int ret = in_sandbox(attempt->run);
    if (ret < 0) {
        g_test_skip("no sandbox in this kernel or build");
        return;
    }
    g_assert_true(ret == EPERM || ret == EACCES);
}

static void test_allowed(gconstpointer data)
{
    const struct Attempt *attempt = data;
    int ret = in_sandbox(attempt->run);
    if (ret < 0) {
        g_test_skip("no sandbox in this kernel or build");
        return;
    }
    g_assert_cmpint(ret, ==, 0);
}

static void add_all(const char *kind, const struct Attempt *attempts, size_t n,
                    GTestDataFunc test)
{
    for (size_t i = 0; i < n; i++) {
        g_autofree char *path = g_strdup_printf("/sandbox/%s/%s", kind, attempts[i].name);
        g_test_add_data_func(path, &attempts[i], test);
    }
}

int main(int argc, char **argv)
{
    g_autofree char *name = NULL;

    g_test_init(&argc, &argv, NULL);
    open_fd = g_file_open_tmp("qb-sandbox.XXXXXX", &name, NULL);
    g_assert_cmpint(open_fd, >=, 0);
    unlink(name);
    add_all("forbidden", forbidden, G_N_ELEMENTS(forbidden), test_forbidden);
    add_all("allowed", allowed, G_N_ELEMENTS(allowed), test_allowed);
    int status = g_test_run();
    close(open_fd);
    return status;
}
