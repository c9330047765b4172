/* See inject.h. */
#define _GNU_SOURCE
#include "inject.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/uio.h>
#include <unistd.h>

static _Thread_local bool armed;
static _Thread_local long calls, chosen;
static _Thread_local int duplicate = -1;
static _Thread_local fault chosen_kind;
static _Thread_local int chosen_error;
static _Thread_local const char* failed;
static const char* always;
static int always_error;

void inject_arm(long target, fault kind, int error) {
    calls = 0;
    chosen = target;
    chosen_kind = kind;
    chosen_error = error;
    failed = NULL;
    armed = true;
}

long inject_disarm(void) {
    armed = false;
    return calls;
}

const char* inject_failed(void) { return failed; }

void inject_always(const char* name, int error) {
    always = name;
    always_error = error;
}

/* Whether this call of `name` is to fail; errno is set then. */
static bool fails(const char* name) {
    if (!armed) return false;
    if (always != NULL && strcmp(always, name) == 0) {
        errno = always_error;
        return true;
    }
    if (++calls != chosen) return false;
    failed = name;
    errno = chosen_error;
    return chosen_kind == FAULT_ERROR;
}

/* Whether the call that was counted last is to take less than it is given. */
static bool is_short(void) { return armed && calls == chosen && chosen_kind == FAULT_SHORT; }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int open64(const char* path, int flags, ...) {
    va_list arguments;
    va_start(arguments, flags);
    const mode_t mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(arguments, mode_t) : 0;
    va_end(arguments);
    return fails("open") ? -1 : REAL(open64)(path, flags, mode);
}

int close(int descriptor) {
    const bool is_duplicate = descriptor == duplicate;
    duplicate = is_duplicate ? -1 : duplicate;
    if (!fails(is_duplicate ? "close of a duplicate" : "close")) return REAL(close)(descriptor);
    /* As Linux does it: the descriptor is gone all the same. */
    const int error = errno;
    REAL(close)(descriptor);
    errno = error;
    return -1;
}

ssize_t write(int descriptor, const void* bytes, size_t count) {
    if (fails("write")) return -1;
    return REAL(write)(descriptor, bytes, is_short() && count > 1 ? 1 : count);
}

ssize_t writev(int descriptor, const struct iovec* pieces, int count) {
    if (fails("writev")) return -1;
    if (!is_short() || count == 0) return REAL(writev)(descriptor, pieces, count);
    return REAL(write)(descriptor, pieces[0].iov_base, pieces[0].iov_len > 1 ? 1 : pieces[0].iov_len);
}

ssize_t pwrite64(int descriptor, const void* bytes, size_t count, off_t offset) {
    if (fails("pwrite")) return -1;
    return REAL(pwrite64)(descriptor, bytes, is_short() && count > 1 ? 1 : count, offset);
}

ssize_t read(int descriptor, void* bytes, size_t count) {
    return fails("read") ? -1 : REAL(read)(descriptor, bytes, is_short() && count > 1 ? 1 : count);
}

ssize_t copy_file_range(int in, off_t* in_offset, int out, off_t* out_offset, size_t count, unsigned flags) {
    if (fails("copy_file_range")) return -1;
    return REAL(copy_file_range)(in, in_offset, out, out_offset, is_short() && count > 1 ? 1 : count, flags);
}

int fallocate(int descriptor, int mode, off_t offset, off_t length) {
    return fails("fallocate") ? -1 : REAL(fallocate)(descriptor, mode, offset, length);
}

int ftruncate64(int descriptor, off_t length) {
    return fails("ftruncate") ? -1 : REAL(ftruncate64)(descriptor, length);
}

off_t lseek64(int descriptor, off_t offset, int whence) {
    return fails("lseek") ? -1 : REAL(lseek64)(descriptor, offset, whence);
}

int fsync(int descriptor) { return fails("fsync") ? -1 : REAL(fsync)(descriptor); }

int fchmod(int descriptor, mode_t mode) { return fails("fchmod") ? -1 : REAL(fchmod)(descriptor, mode); }

int fchown(int descriptor, uid_t user, gid_t group) {
    return fails("fchown") ? -1 : REAL(fchown)(descriptor, user, group);
}

int fstatfs(int descriptor, struct statfs* told) { return fails("fstatfs") ? -1 : REAL(fstatfs)(descriptor, told); }

int statx(int folder, const char* restrict path, int flags, unsigned mask, struct statx* restrict told) {
    return fails("statx") ? -1 : REAL(statx)(folder, path, flags, mask, told);
}

ssize_t readlink(const char* restrict path, char* restrict link, size_t size) {
    return fails("readlink") ? -1 : REAL(readlink)(path, link, size);
}

int linkat(int from_folder, const char* from, int to_folder, const char* to, int flags) {
    return fails("linkat") ? -1 : REAL(linkat)(from_folder, from, to_folder, to, flags);
}

int rename(const char* from, const char* to) {
    /* Where a target cannot be renamed over, a hidden file beside it can be renamed all the same. */
    const char* name = strrchr(to, '/');
    const bool is_hidden = name != NULL && strncmp(name, "/.safetensors-", 14) == 0;
    const char* kept = always;
    if (is_hidden) always = NULL;
    const bool failed_now = fails("rename");
    always = kept;
    return failed_now ? -1 : REAL(rename)(from, to);
}

int unlink(const char* path) { return fails("unlink") ? -1 : REAL(unlink)(path); }

int mkdir(const char* path, mode_t mode) { return fails("mkdir") ? -1 : REAL(mkdir)(path, mode); }

int rmdir(const char* path) { return fails("rmdir") ? -1 : REAL(rmdir)(path); }

DIR* opendir(const char* path) { return fails("opendir") ? NULL : REAL(opendir)(path); }

int flock(int descriptor, int operation) { return fails("flock") ? -1 : REAL(flock)(descriptor, operation); }

int fcntl(int descriptor, int command, ...) {
    va_list arguments;
    va_start(arguments, command);
    void* argument = va_arg(arguments, void*);
    va_end(arguments);
    /* Debug builds ask whether descriptors are valid, and end the process if they are not. */
    if (command != F_DUPFD_CLOEXEC) return REAL(fcntl)(descriptor, command, argument);
    if (fails("fcntl")) return -1;
    return duplicate = REAL(fcntl)(descriptor, command, argument);
}
