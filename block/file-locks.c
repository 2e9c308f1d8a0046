/*
 * Image locks: how processes that open the same image learn of one another.
 *
 * Every permission has two bytes of the file.  Nobody reads or writes them; they are only locked,
 * always with shared (read) locks, so that any number of holders get along:
 *
 *      byte 100 + i   somebody uses permission i          i = 0  consistent read
 *      byte 200 + i   somebody does not share it              1  write
 *                                                             2  write unchanged
 *                                                             3  resize
 *
 * A newcomer first locks its own bytes and then asks, for each permission it wants, whether anybody
 * else holds the "not shared" byte, and for each it does not share, whether anybody else holds the
 * "uses" byte.  The question is whether an exclusive lock could be had (F_OFD_GETLK), it is never
 * taken.  Of two newcomers at the same time at least one sees the other; both may give up.
 *
 * The locks are open file description locks: they belong to the open(), not to the process, and die
 * with it.  The numbers are those of the field, so a running guest elsewhere is respected.
 *
 *      take(new)     held = held + new, checked         check_perm
 *      keep(final)   held = final                       set_perm, or back to the old: abort_perm
 *
 * Invariants
 *  1. perm and unshared tell exactly which bytes the descriptor holds, or are 0 without locking.
 *  2. final_perm and final_unshared are subsets of them; they differ only between check and set.
 *  3. Only bytes that are newly taken are checked: whoever came after the others had to pass
 *     theirs.
 *
 * Not done: file systems without such locks get none (locking=auto) or an error (locking=on).  The
 * older kind, which belongs to the process and is lost at any close() of the file, protects
 * nothing.
 *
 * SPDX-License-Identifier: MIT
 */
#include "block/file-int.h"
#include "util/error.h"

#include <fcntl.h>

enum { USED_BASE = 100, UNSHARED_BASE = 200, PERMISSIONS = 4 };

G_STATIC_ASSERT(BLK_PERM_ALL == (1 << PERMISSIONS) - 1);

static const char *const permission_names[PERMISSIONS] = {
    "consistent read",
    "write",
    "write unchanged",
    "resize",
};

/* fcntl() on one byte: 0, or -errno. */
static int lock_byte(int fd, int cmd, short type, int byte)
{
    struct flock fl = {.l_type = type, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
    int ret;
    do {
        ret = fcntl(fd, cmd, &fl);
    } while (ret < 0 && errno == EINTR);
    return ret < 0 ? -errno : 0;
}

/* 1 when somebody else has @byte locked, 0 when not, or -errno. */
static int byte_is_taken(int fd, int byte)
{
    struct flock fl = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
    if (fcntl(fd, F_OFD_GETLK, &fl) < 0) {
        return -errno;
    }
    return fl.l_type != F_UNLCK;
}

/* Errors that say "no locks here" rather than "not this one". */
static bool means_no_locks(int ret)
{
    return ret == -EINVAL || ret == -ENOLCK || ret == -ENOTSUP || ret == -ENOSYS;
}

bool file_locks_init(FileLocks *l, int fd, int locking, const char *path, GError **errp)
{
    *l = (FileLocks){.required = locking == FILE_LOCKING_ON};
    if (locking == FILE_LOCKING_OFF) {
        return true;
    }
    int ret = byte_is_taken(fd, USED_BASE);
    if (ret < 0 && l->required) {
        qb_error_set_errno(errp, ret, "Could not use file locks on '%s'", path);
        return false;
    }
    l->enabled = ret >= 0;
    return true;
}

static void unlock_bits(int fd, int base, unsigned bits)
{
    for (int i = 0; i < PERMISSIONS; i++) {
        if (bits & (1u << i)) {
            lock_byte(fd, F_OFD_SETLK, F_UNLCK, base + i);
        }
    }
}

/* Locks all of @bits or none. 0, or -errno with *ret_byte the one that failed. */
static int lock_bits(int fd, int base, unsigned bits, int *ret_byte)
{
    for (int i = 0; i < PERMISSIONS; i++) {
        if (!(bits & (1u << i))) {
            continue;
        }
        int ret = lock_byte(fd, F_OFD_SETLK, F_RDLCK, base + i);
        if (ret < 0) {
            unlock_bits(fd, base, bits & ((1u << i) - 1));
            *ret_byte = base + i;
            return ret;
        }
    }
    return 0;
}

/* Locks both kinds, all or none. */
static int lock_both(int fd, unsigned perm, unsigned unshared, int *ret_byte)
{
    int ret = lock_bits(fd, USED_BASE, perm, ret_byte);
    if (ret < 0) {
        return ret;
    }
    ret = lock_bits(fd, UNSHARED_BASE, unshared, ret_byte);
    if (ret < 0) {
        unlock_bits(fd, USED_BASE, perm);
    }
    return ret;
}

/* Looks whether anybody holds the bytes at @base of @bits; @kind: what the message calls them. */
static bool check_bits(int fd, int base, unsigned bits, const char *kind, GError **errp)
{
    for (int i = 0; i < PERMISSIONS; i++) {
        int ret = bits & (1u << i) ? byte_is_taken(fd, base + i) : 0;
        if (ret != 0) {
            qb_error_set(errp, ret < 0 ? ret : EAGAIN, "Failed to get %s\"%s\" lock", kind,
                         permission_names[i]);
            return false;
        }
    }
    return true;
}

/* What is used must be shared by all others, what is not shared must not be used by any. */
static bool check_conflicts(int fd, unsigned perm, unsigned unshared, const char *path,
                            GError **errp)
{
    g_autoptr(GError) err = NULL;
    if (check_bits(fd, UNSHARED_BASE, perm, "", &err) &&
        check_bits(fd, USED_BASE, unshared, "shared ", &err)) {
        return true;
    }
    qb_error_add_hint(&err, "Is another process using the image [%s]?", path);
    g_propagate_error(errp, g_steal_pointer(&err));
    return false;
}

bool file_locks_take(FileLocks *l, int fd, unsigned perm, unsigned unshared, const char *path,
                     GError **errp)
{
    if (!l->enabled) {
        return true;
    }
    unsigned new_perm = perm & ~l->perm, new_unshared = unshared & ~l->unshared;
    int byte = 0, ret = lock_both(fd, new_perm, new_unshared, &byte);
    if (means_no_locks(ret) && !l->required && !l->perm && !l->unshared) {
        l->enabled = false; /* the question worked at open, the lock itself does not */
        return true;
    }
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Failed to lock byte %d", byte);
        return false;
    }
    if (!check_conflicts(fd, new_perm, new_unshared, path, errp)) {
        unlock_bits(fd, USED_BASE, new_perm);
        unlock_bits(fd, UNSHARED_BASE, new_unshared);
        return false;
    }
    l->perm |= new_perm;
    l->unshared |= new_unshared;
    return true;
}

void file_locks_keep(FileLocks *l, int fd, unsigned perm, unsigned unshared)
{
    if (!l->enabled) {
        return;
    }
    assert(!(perm & ~l->perm) && !(unshared & ~l->unshared));
    unlock_bits(fd, USED_BASE, l->perm & ~perm);
    unlock_bits(fd, UNSHARED_BASE, l->unshared & ~unshared);
    l->perm = perm;
    l->unshared = unshared;
}

bool file_locks_copy(const FileLocks *l, int fd, const char *path, GError **errp)
{
    if (!l->enabled) {
        return true;
    }
    int byte = 0, ret = lock_both(fd, l->perm, l->unshared, &byte);
    if (ret < 0) {
        qb_error_set_errno(errp, ret, "Failed to lock byte %d of '%s'", byte, path);
        return false;
    }
    return true;
}

/* --- the driver's callbacks --- */

/* A node that was opened with force-share neither asks nor tells. */
static bool node_takes_locks(const BlockDriverState *bs)
{
    return !bs->force_share;
}

bool file_check_perm(BlockDriverState *bs, unsigned perm, unsigned shared, GError **errp)
{
    BDRVFileState *s = file_state(bs);
    if (!node_takes_locks(bs)) {
        return true;
    }
    return file_locks_take(&s->locks, s->fd, perm & BLK_PERM_ALL, ~shared & BLK_PERM_ALL, s->path,
                           errp);
}

void file_set_perm(BlockDriverState *bs, unsigned perm, unsigned shared)
{
    BDRVFileState *s = file_state(bs);
    FileLocks *l = &s->locks;
    if (!node_takes_locks(bs)) {
        return;
    }
    /* Only what check_perm() got can be kept; more was never granted. */
    file_locks_keep(l, s->fd, perm & l->perm, ~shared & l->unshared);
    l->final_perm = l->perm;
    l->final_unshared = l->unshared;
}

void file_abort_perm(BlockDriverState *bs)
{
    BDRVFileState *s = file_state(bs);
    file_locks_keep(&s->locks, s->fd, s->locks.final_perm, s->locks.final_unshared);
}
