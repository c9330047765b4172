/* See inject.h. */
#include "inject.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <unistd.h>

static _Thread_local bool armed;
static _Thread_local long calls, chosen, chosen_after;
static _Thread_local int duplicate = -1;
static _Thread_local fault chosen_kind;
static _Thread_local int chosen_error;
static _Thread_local const char *failed, *failed_again;
/* Whether the target is another than it was, and was when the fault came. */
static _Thread_local bool changed, had_changed;

enum { ALWAYS = 4 };
static struct {
    const char* name;
    int error;
} always[ALWAYS];

void inject_arm(long target, fault kind, int error, long after) {
    calls = 0;
    chosen = target;
    chosen_kind = kind;
    chosen_error = error;
    chosen_after = after;
    failed = failed_again = NULL;
    changed = had_changed = false;
    armed = true;
}

long inject_disarm(void) {
    armed = false;
    return calls;
}

const char* inject_failed(void) { return failed; }

const char* inject_failed_again(void) { return failed_again; }

bool inject_had_changed(void) { return had_changed; }

void inject_always(const char* name, int error) {
    size_t i = 0;
    while (i < ALWAYS && always[i].name != NULL) i++;
    if (name == NULL) {
        memset(always, 0, sizeof always);
    } else if (i < ALWAYS) {
        always[i].name = name;
        always[i].error = error;
    } else {
        abort();
    }
}

/* Whether every call of `name` fails; errno is set then. */
static bool is_always(const char* name) {
    for (size_t i = 0; armed && i < ALWAYS && always[i].name != NULL; i++) {
        if (strcmp(always[i].name, name) != 0) continue;
        errno = always[i].error;
        return true;
    }
    return false;
}

/* Whether this call of `name` is to fail; errno is set then. */
static bool fails(const char* name) {
    if (!armed) return false;
    if (is_always(name)) return true;
    calls++;
    if (calls == chosen) {
        failed = name;
        had_changed = changed;
        errno = chosen_error;
        return chosen_kind == FAULT_ERROR;
    }
    if (chosen_after == 0 || calls != chosen + chosen_after) return false;
    failed_again = name;
    had_changed = changed;
    errno = chosen_error;
    return true;
}

/* Whether the call that was counted last is to take less than it is given. */
static bool is_short(void) { return armed && calls == chosen && chosen_kind == FAULT_SHORT; }

static bool is_hidden(const char* path) {
    const char* slash = strrchr(path, '/');
    return strncmp(slash == NULL ? path : slash + 1, ".safetensors-", 13) == 0;
}

/* Notes that `path` has become another, if a call has done that. */
static int note_name(const char* path, int result) {
    changed = changed || (result == 0 && !is_hidden(path));
    return result;
}

/* The same of a file that got bytes; one that is being written beside the target is hidden, or has no name. */
static ssize_t note_bytes(int descriptor, ssize_t result) {
    if (!armed || changed || result <= 0) return result;
    const int error = errno;
    char link[64], path[4200] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    struct stat told;
    changed = fstat(descriptor, &told) == 0 && told.st_nlink > 0 &&
              ((__typeof__(&readlink))dlsym(RTLD_NEXT, "readlink"))(link, path, sizeof path - 1) > 0 &&
              !is_hidden(path);
    errno = error;
    return result;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static const char* name_of_open(const char* path, int flags) {
    const bool is_hidden_name = is_hidden(path) || strcmp(path, ".safetensors.lock") == 0;
    return (flags & O_TMPFILE) == O_TMPFILE ? "open unnamed"
           : (flags & O_PATH) == 0          ? (flags & O_DIRECTORY) != 0 ? "open to list" : "open"
           : (flags & O_DIRECTORY) != 0     ? "open a directory"
           : is_hidden_name                 ? "look at a hidden name"
                                            : "look at a name";
}

int open64(const char* path, int flags, ...) {
    va_list arguments;
    va_start(arguments, flags);
    const mode_t mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(arguments, mode_t) : 0;
    va_end(arguments);
    return fails(name_of_open(path, flags)) ? -1 : REAL(open64)(path, flags, mode);
}

int openat(int directory, const char* path, int flags, ...) {
    va_list arguments;
    va_start(arguments, flags);
    const mode_t mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(arguments, mode_t) : 0;
    va_end(arguments);
    return fails(name_of_open(path, flags)) ? -1 : REAL(openat)(directory, path, flags, mode);
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
    return note_bytes(descriptor, REAL(write)(descriptor, bytes, is_short() && count > 1 ? 1 : count));
}

ssize_t writev(int descriptor, const struct iovec* pieces, int count) {
    if (fails("writev")) return -1;
    if (!is_short() || count == 0) return REAL(writev)(descriptor, pieces, count);
    return REAL(write)(descriptor, pieces[0].iov_base, pieces[0].iov_len > 1 ? 1 : pieces[0].iov_len);
}

ssize_t pwrite64(int descriptor, const void* bytes, size_t count, off_t offset) {
    if (fails("pwrite")) return -1;
    return note_bytes(descriptor, REAL(pwrite64)(descriptor, bytes, is_short() && count > 1 ? 1 : count, offset));
}

ssize_t read(int descriptor, void* bytes, size_t count) {
    return fails("read") ? -1 : REAL(read)(descriptor, bytes, is_short() && count > 1 ? 1 : count);
}

ssize_t pread64(int descriptor, void* bytes, size_t count, off_t offset) {
    return fails("pread") ? -1 : REAL(pread64)(descriptor, bytes, is_short() && count > 1 ? 1 : count, offset);
}

ssize_t copy_file_range(int in, off_t* in_offset, int out, off_t* out_offset, size_t count, unsigned flags) {
    if (fails("copy_file_range")) return -1;
    count = is_short() && count > 1 ? 1 : count;
    return note_bytes(out, REAL(copy_file_range)(in, in_offset, out, out_offset, count, flags));
}

ssize_t sendfile64(int out, int in, off64_t* offset, size_t count) {
    if (fails("sendfile")) return -1;
    return note_bytes(out, REAL(sendfile64)(out, in, offset, is_short() && count > 1 ? 1 : count));
}

ssize_t splice(int in, off64_t* in_offset, int out, off64_t* out_offset, size_t count, unsigned flags) {
    if (fails("splice")) return -1;
    return note_bytes(out, REAL(splice)(in, in_offset, out, out_offset, is_short() && count > 1 ? 1 : count, flags));
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

int fsync(int descriptor) {
    (void)descriptor;
    return fails("fsync") ? -1 : 0;
}

int fdatasync(int descriptor) {
    (void)descriptor;
    return fails("fdatasync") ? -1 : 0;
}

int sync_file_range(int descriptor, off64_t offset, off64_t length, unsigned flags) {
    return fails("sync_file_range") ? -1 : REAL(sync_file_range)(descriptor, offset, length, flags);
}

int fchmod(int descriptor, mode_t mode) { return fails("fchmod") ? -1 : REAL(fchmod)(descriptor, mode); }

int fchown(int descriptor, uid_t user, gid_t group) {
    return fails("fchown") ? -1 : REAL(fchown)(descriptor, user, group);
}

int fstatfs(int descriptor, struct statfs* told) {
    if (fails("fstatfs")) return -1;
    const int result = REAL(fstatfs)(descriptor, told);
    /* One on which large files are held, whichever the tests are on. */
    told->f_type = TMPFS_MAGIC;
    return result;
}

int statx(int directory, const char* restrict path, int flags, unsigned mask, struct statx* restrict told) {
    /* NULL where Rust asks whether there is such a call at all, though the declaration forbids it. */
    const char* volatile asked = path;
    const char* name = (flags & AT_EMPTY_PATH) != 0             ? "statx of a file"
                       : asked == NULL                          ? "statx"
                       : strncmp(asked, "/proc/self/", 11) == 0 ? "statx of /proc"
                       : asked[0] == '/'                        ? "statx of a mapping"
                                                                : "statx";
    return fails(name) ? -1 : REAL(statx)(directory, path, flags, mask, told);
}

ssize_t getxattr(const char* path, const char* name, void* value, size_t size) {
    return fails("getxattr") ? -1 : REAL(getxattr)(path, name, value, size);
}

ssize_t fgetxattr(int descriptor, const char* name, void* value, size_t size) {
    return fails("fgetxattr") ? -1 : REAL(fgetxattr)(descriptor, name, value, size);
}

int fsetxattr(int descriptor, const char* name, const void* value, size_t size, int flags) {
    return fails("fsetxattr") ? -1 : REAL(fsetxattr)(descriptor, name, value, size, flags);
}

int fremovexattr(int descriptor, const char* name) {
    return fails("fremovexattr") ? -1 : REAL(fremovexattr)(descriptor, name);
}

int linkat(int from_directory, const char* from, int to_directory, const char* to, int flags) {
    if (fails("linkat")) return -1;
    return note_name(to, REAL(linkat)(from_directory, from, to_directory, to, flags));
}

int renameat(int from_directory, const char* from, int to_directory, const char* to) {
    /* Where a target cannot be renamed over, a hidden file beside it can be renamed all the same. */
    if (fails(is_hidden(to) ? "rename to a hidden name" : "rename")) return -1;
    if (!is_hidden(to) && faccessat(to_directory, to, F_OK, 0) == 0 && is_always("rename over a file")) return -1;
    return note_name(to, REAL(renameat)(from_directory, from, to_directory, to));
}

int unlinkat(int directory, const char* path, int flags) {
    const bool is_lock = strcmp(path, ".safetensors.lock") == 0;
    const char* name = flags != 0        ? "rmdir"
                       : is_lock         ? "unlink of the lock"
                       : is_hidden(path) ? "unlink of a hidden name"
                                         : "unlink";
    if (fails(name)) return -1;
    const int result = REAL(unlinkat)(directory, path, flags);
    return is_lock || flags != 0 ? result : note_name(path, result);
}

int mkdirat(int directory, const char* path, mode_t mode) {
    return fails("mkdir") ? -1 : REAL(mkdirat)(directory, path, mode);
}

DIR* fdopendir(int descriptor) { return fails("fdopendir") ? NULL : REAL(fdopendir)(descriptor); }

struct dirent64* readdir64(DIR* opened) { return fails("readdir") ? NULL : REAL(readdir64)(opened); }

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

int pthread_create(pthread_t* restrict thread, const pthread_attr_t* restrict attributes, void* (*body)(void*),
                   void* restrict argument) {
    return fails("pthread_create") ? errno : REAL(pthread_create)(thread, attributes, body, argument);
}
