/* See filesystem.h. */
#include "filesystem.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common.h"

long* manners;

bool no_unnamed, no_fallocate;
int no_renames, no_links;
long ahead;
bool is_shared;
bool forks_at_rename;
pid_t forked;
const char* narrows_at_stage;
void (*after_header)(void);
mode_t most_rights;

/* Notes the permissions that the file being saved has now. */
static void note_rights(int file) {
    struct stat told;
    if (narrows_at_stage == NULL || fstat(file, &told) != 0 || !S_ISREG(told.st_mode)) return;
    most_rights |= told.st_mode & 07777;
}

ssize_t writev(int file, const struct iovec* pieces, int count) {
    if (narrows_at_stage != NULL && chmod(narrows_at_stage, 0600) != 0) abort();
    note_rights(file);
    return ((__typeof__(&writev))dlsym(RTLD_NEXT, "writev"))(file, pieces, count);
}

/* The header begins behind its length. */
ssize_t pread64(int file, void* bytes, size_t length, off64_t offset) {
    const ssize_t result = ((__typeof__(&pread64))dlsym(RTLD_NEXT, "pread64"))(file, bytes, length, offset);
    void (*const act)(void) = after_header;
    if (act != NULL && offset == 8) {
        after_header = NULL;
        act();
    }
    return result;
}

int fchmod(int file, mode_t mode) {
    const int result = ((__typeof__(&fchmod))dlsym(RTLD_NEXT, "fchmod"))(file, mode);
    note_rights(file);
    return result;
}

int openat(int directory, const char* path, int flags, ...) {
    va_list arguments;
    va_start(arguments, flags);
    const mode_t mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(arguments, mode_t) : 0;
    va_end(arguments);
    if (no_unnamed && (flags & O_TMPFILE) == O_TMPFILE) {
        errno = EOPNOTSUPP;
        return -1;
    }
    return ((__typeof__(&openat))dlsym(RTLD_NEXT, "openat"))(directory, path, flags, mode);
}

int fallocate(int file, int mode, off_t offset, off_t length) {
    if (no_fallocate) {
        errno = EOPNOTSUPP;
        return -1;
    }
    return ((__typeof__(&fallocate))dlsym(RTLD_NEXT, "fallocate"))(file, mode, offset, length);
}

int statx(int directory, const char* restrict path, int flags, unsigned mask, struct statx* restrict told) {
    const int result = ((__typeof__(&statx))dlsym(RTLD_NEXT, "statx"))(directory, path, flags, mask, told);
    /* What is opened only to be looked at shows when it changed; a new file shows the time. */
    const bool is_looked_at = (flags & AT_EMPTY_PATH) != 0 && (fcntl(directory, F_GETFL) & O_PATH) != 0;
    if (result == 0 && (flags & AT_EMPTY_PATH) != 0 && !is_looked_at) told->stx_ctime.tv_sec += ahead;
    return result;
}

int fstatfs(int file, struct statfs* told) {
    const int result = ((__typeof__(&fstatfs))dlsym(RTLD_NEXT, "fstatfs"))(file, told);
    if (result == 0) told->f_type = is_shared ? NFS_SUPER_MAGIC : EXT4_SUPER_MAGIC;
    return result;
}

int linkat(int from_directory, const char* from, int to_directory, const char* to, int flags) {
    if (no_links != 0) {
        errno = no_links;
        return -1;
    }
    return ((__typeof__(&linkat))dlsym(RTLD_NEXT, "linkat"))(from_directory, from, to_directory, to, flags);
}

int renameat(int from_directory, const char* from, int to_directory, const char* to) {
    if (no_renames != 0) {
        errno = no_renames;
        return -1;
    }
    if (forks_at_rename && (forked = fork()) == 0) {
        pause();
        _exit(0);
    }
    return ((__typeof__(&renameat))dlsym(RTLD_NEXT, "renameat"))(from_directory, from, to_directory, to);
}

void make_directory(const char* path, mode_t mode) {
    if (mkdir(path, 0777) != 0 || chmod(path, mode) != 0) abort();
}

sft_status save_version(uint64_t version, size_t words, const char* path) {
    content what = content_new(version, 2, words);
    sft_writer* writer = content_writer(&what);
    const sft_status status = sft_writer_write_file(writer, path, NULL);
    sft_writer_free(writer);
    content_free(&what);
    return status;
}

void is_refused(const char* what, sft_status status, const char* path, int error, uint64_t version,
                const char* directory, int before) {
    EXPECT(status == SFT_ERROR_IO, "%s: status %d, %s", what, status, sft_last_error_get_message());
    EXPECT(sft_last_error_get_os_error() == error, "%s: %s", what, sft_last_error_get_message());
    EXPECT(strstr(sft_last_error_get_message(), path) != NULL, "%s: %s", what, sft_last_error_get_message());
    EXPECT(version == 0 || file_version(path, SFT_BACKEND_PREAD) == version, "%s: %s", what,
           sft_last_error_get_message());
    EXPECT(entries(directory) == before, "%s: %d entries, %d before", what, entries(directory), before);
    (*manners)++;
}

void refused(const char* what, const char* path, size_t words, int error, uint64_t version, const char* directory) {
    const int before = entries(directory);
    is_refused(what, save_version(99, words, path), path, error, version, directory, before);
}

void accepted(const char* what, const char* path, size_t words, int beside, const char* directory) {
    for (uint64_t version = 5; version < 8; version++) {
        EXPECT(save_version(version, words, path) == SFT_OK, "%s: %s", what, sft_last_error_get_message());
        EXPECT(file_version(path, SFT_BACKEND_MMAP) == version, "%s: %s", what, sft_last_error_get_message());
        EXPECT(entries(directory) == beside + 1, "%s: %d entries", what, entries(directory));
    }
    (*manners)++;
}

void as_child(void (*body)(void), bool as_nobody) {
    fflush(stdout);
    const pid_t pid = fork();
    if (pid < 0) abort();
    if (pid == 0) {
        if (as_nobody && geteuid() == 0 && (setgid(65534) != 0 || setuid(65534) != 0)) abort();
        const long before = failures();
        body();
        fflush(stdout);
        _exit(failures() == before ? 0 : 1);
    }
    int status = 0;
    EXPECT(waitpid(pid, &status, 0) == pid && status == 0, "status %d", status);
}
