/*
 * The sandbox of the tools that only look at an image.
 *
 *      Landlock   no file can be opened, made, renamed, removed by name: a ruleset without a rule
 *      seccomp    system calls outside the table below fail with EPERM
 *                 table: name, and where needed a test of one argument
 *
 * A parser that a hostile image takes over finds a process that can read and write what the user
 * named, compute, print, and end.  The two parts overlap on purpose: Landlock holds where a call
 * could name a file in a way the filter cannot see, the filter holds where Landlock has no say
 * (network, exec, terminals).
 *
 * Invariants
 *  1. Nothing here can be undone, and nothing fails half-way: a part that is missing leaves the other
 *     in force, and is reported.
 *  2. A refused call is an error, not the end of the process: libraries have their ways around it.
 *  3. No I/O ring: what a ring does is not seen by the filter.  Batches use threads then.
 *
 * Deliberately not done: no limit of memory or time (the block layer bounds both by what an image's
 * metadata really references), no namespaces (they need privileges or cost milliseconds).
 *
 * SPDX-License-Identifier: MIT
 */
#include "qb-config.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <sched.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "util/error.h"
#include "util/sandbox.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED true
#elif defined(__has_feature)
#define SANITIZED (__has_feature(address_sanitizer) || __has_feature(thread_sanitizer))
#else
#define SANITIZED false
#endif

/* ---- Landlock ---- */

#ifdef CONFIG_LANDLOCK
#include <linux/landlock.h>

/* All rights on files of the first version; later versions add some that we need not know, since an
 * open refused by these never gets that far. */
#define ALL_FILE_RIGHTS ((LANDLOCK_ACCESS_FS_MAKE_SYM << 1) - 1)

static bool enter_landlock(GError **errp)
{
    struct landlock_ruleset_attr attr = {.handled_access_fs = ALL_FILE_RIGHTS};
    int fd = (int)syscall(SYS_landlock_create_ruleset, &attr, sizeof(attr), 0);
    if (fd < 0) {
        qb_error_set_errno(errp, errno, "The kernel offers no Landlock");
        return false;
    }
    int ret = (int)syscall(SYS_landlock_restrict_self, fd, 0);
    int err = errno;
    close(fd);
    if (ret < 0) {
        qb_error_set_errno(errp, err, "Landlock refuses to restrict the process");
    }
    return ret == 0;
}
#else
static bool enter_landlock(GError **errp)
{
    qb_error_set(errp, ENOTSUP, "This build has no Landlock");
    return false;
}
#endif

/* ---- seccomp ---- */

#ifdef CONFIG_SECCOMP
#include <seccomp.h>

static const int plain_calls[] = {
    /* files that are open */
    SCMP_SYS(read), SCMP_SYS(readv), SCMP_SYS(pread64), SCMP_SYS(preadv), SCMP_SYS(preadv2),
    SCMP_SYS(write), SCMP_SYS(writev), SCMP_SYS(pwrite64), SCMP_SYS(pwritev), SCMP_SYS(pwritev2),
    SCMP_SYS(lseek), SCMP_SYS(fstat), SCMP_SYS(newfstatat), SCMP_SYS(statx), SCMP_SYS(fstatfs),
    SCMP_SYS(fcntl), SCMP_SYS(fallocate), SCMP_SYS(ftruncate), SCMP_SYS(fdatasync),
    SCMP_SYS(fsync), SCMP_SYS(fadvise64), SCMP_SYS(copy_file_range), SCMP_SYS(close), SCMP_SYS(dup),
    SCMP_SYS(io_setup), SCMP_SYS(io_submit), SCMP_SYS(io_getevents), SCMP_SYS(io_destroy),
    /* memory */
    SCMP_SYS(brk), SCMP_SYS(munmap), SCMP_SYS(mremap), SCMP_SYS(madvise),
    /* threads and time */
    SCMP_SYS(futex), SCMP_SYS(sched_yield), SCMP_SYS(sched_getaffinity), SCMP_SYS(set_robust_list),
    SCMP_SYS(rseq), SCMP_SYS(gettid), SCMP_SYS(getpid), SCMP_SYS(clock_gettime),
    SCMP_SYS(clock_nanosleep), SCMP_SYS(nanosleep), SCMP_SYS(gettimeofday), SCMP_SYS(getrandom),
    SCMP_SYS(getrusage), SCMP_SYS(sysinfo), SCMP_SYS(poll), SCMP_SYS(ppoll), SCMP_SYS(membarrier),
    /* signals and the end */
    SCMP_SYS(rt_sigreturn), SCMP_SYS(rt_sigprocmask), SCMP_SYS(rt_sigaction),
    SCMP_SYS(rt_sigtimedwait), SCMP_SYS(sigaltstack), SCMP_SYS(restart_syscall), SCMP_SYS(exit),
    SCMP_SYS(exit_group),
};

/* Calls that are allowed when (argument & mask) == value. */
static const struct ArgumentRule {
    int call;
    unsigned argument;
    uint64_t mask, value;
} argument_rules[] = {
    {SCMP_SYS(mmap), 2, PROT_EXEC, 0},
    {SCMP_SYS(mprotect), 2, PROT_EXEC, 0},
    {SCMP_SYS(clone), 0, CLONE_THREAD, CLONE_THREAD},
    {SCMP_SYS(prctl), 0, UINT32_MAX, PR_SET_NAME},
    {SCMP_SYS(prlimit64), 2, UINT64_MAX, 0}, /* asking, not setting */
    {SCMP_SYS(ioctl), 1, UINT32_MAX, TCGETS /* is it a terminal? */},
    {SCMP_SYS(ioctl), 1, UINT32_MAX, BLKGETSIZE64},
    {SCMP_SYS(ioctl), 1, UINT32_MAX, BLKSSZGET},
    {SCMP_SYS(ioctl), 1, UINT32_MAX, BLKPBSZGET},
    {SCMP_SYS(ioctl), 1, UINT32_MAX, BLKDISCARD},
    {SCMP_SYS(ioctl), 1, UINT32_MAX, BLKZEROOUT},
};

static int add_rules(scmp_filter_ctx filter)
{
    int ret = 0;
    for (size_t i = 0; i < G_N_ELEMENTS(plain_calls) && ret == 0; i++) {
        ret = seccomp_rule_add(filter, SCMP_ACT_ALLOW, plain_calls[i], 0);
    }
    for (size_t i = 0; i < G_N_ELEMENTS(argument_rules) && ret == 0; i++) {
        const struct ArgumentRule *r = &argument_rules[i];
        ret = seccomp_rule_add(filter, SCMP_ACT_ALLOW, r->call, 1,
                               SCMP_CMP(r->argument, SCMP_CMP_MASKED_EQ, r->mask, r->value));
    }
    if (ret == 0) { /* the way out of it that clone3 has for arguments behind a pointer */
        ret = seccomp_rule_add(filter, SCMP_ACT_ERRNO(ENOSYS), SCMP_SYS(clone3), 0);
    }
    return ret ? ret : seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(tgkill), 1,
                                        SCMP_A0(SCMP_CMP_EQ, (scmp_datum_t)getpid()));
}

static bool enter_seccomp(GError **errp)
{
    scmp_filter_ctx filter = seccomp_init(SCMP_ACT_ERRNO(EPERM));
    int ret = filter ? 0 : -ENOMEM;
    if (ret == 0) { /* also for threads that run already */
        ret = seccomp_attr_set(filter, SCMP_FLTATR_CTL_TSYNC, 1);
    }
    if (ret == 0) {
        ret = add_rules(filter);
    }
    if (ret == 0) {
        ret = seccomp_load(filter);
    }
    if (filter) {
        seccomp_release(filter);
    }
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "The kernel refuses a system call filter");
    }
    return ret == 0;
}
#else
static bool enter_seccomp(GError **errp)
{
    qb_error_set(errp, ENOTSUP, "This build has no system call filter");
    return false;
}
#endif

bool qb_sandbox_enter(GError **errp)
{
    if (SANITIZED) {
        qb_error_set(errp, ENOTSUP, "Builds for sanitizers run without a sandbox");
        return false;
    }
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0) {
        qb_error_set_errno(errp, errno, "The kernel cannot restrict this process");
        return false;
    }
    bool files = enter_landlock(errp);
    return enter_seccomp(files ? errp : NULL) && files;
}
