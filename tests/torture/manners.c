/* How a save behaves among the things that a filesystem has: what the tests in other languages do not need a mount, a
 * second user or a second process for.
 *
 * What killed saves have left, a folder with the set-group-ID bit, a sticky one, links to another filesystem,
 * filesystems without unnamed files, renames or links, a disk that is full, a folder that may not be written to or is
 * gone, two processes at one path. What needs root is skipped without. Run with a folder. */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common.h"

static long* manners; /* children count too */
static bool no_unnamed;

/* A filesystem without O_TMPFILE, where that is wanted. */
int open64(const char* path, int flags, ...) {
    va_list arguments;
    va_start(arguments, flags);
    const mode_t mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(arguments, mode_t) : 0;
    va_end(arguments);
    if (no_unnamed && (flags & O_TMPFILE) == O_TMPFILE) {
        errno = EOPNOTSUPP;
        return -1;
    }
    return ((__typeof__(&open64))dlsym(RTLD_NEXT, "open64"))(path, flags, mode);
}

/* A filesystem that sets no space aside, where that is wanted. */
static bool no_fallocate;

int fallocate(int file, int mode, off_t offset, off_t length) {
    if (no_fallocate) {
        errno = EOPNOTSUPP;
        return -1;
    }
    return ((__typeof__(&fallocate))dlsym(RTLD_NEXT, "fallocate"))(file, mode, offset, length);
}

/* What the filesystem's clock is ahead by, for open files. */
static long ahead;

int statx(int folder, const char* restrict path, int flags, unsigned mask, struct statx* restrict told) {
    const int result = ((__typeof__(&statx))dlsym(RTLD_NEXT, "statx"))(folder, path, flags, mask, told);
    if (result == 0 && (flags & AT_EMPTY_PATH) != 0) told->stx_ctime.tv_sec += ahead;
    return result;
}

/* A process that is forked while a file is about to be renamed, and lives on. */
static bool forks_at_rename;
static pid_t forked;

/* What a filesystem says that has no renames, or no links; 0 where it has. */
static int no_renames, no_links;

int linkat(int from_folder, const char* from, int to_folder, const char* to, int flags) {
    if (no_links != 0) {
        errno = no_links;
        return -1;
    }
    return ((__typeof__(&linkat))dlsym(RTLD_NEXT, "linkat"))(from_folder, from, to_folder, to, flags);
}

int rename(const char* from, const char* to) {
    if (no_renames != 0) {
        errno = no_renames;
        return -1;
    }
    if (forks_at_rename && (forked = fork()) == 0) {
        pause();
        _exit(0);
    }
    return ((__typeof__(&rename))dlsym(RTLD_NEXT, "rename"))(from, to);
}

static void make_folder(const char* path, mode_t mode) {
    if (mkdir(path, 0777) != 0 || chmod(path, mode) != 0) abort();
}

static mode_t mode_of(const char* path) {
    struct stat told;
    return stat(path, &told) == 0 ? told.st_mode & 07777 : 0;
}

static sft_status save_version(uint64_t version, size_t words, const char* path) {
    content what = content_new(version, 2, words);
    sft_writer* writer = content_writer(&what);
    const sft_status status = sft_writer_write_file(writer, path, NULL);
    sft_writer_free(writer);
    content_free(&what);
    return status;
}

/* A save with this status must have failed with this errno and named the path, and left `version` in it and nothing
 * beside it. */
static void is_refused(const char* what, sft_status status, const char* path, int error, uint64_t version,
                       const char* folder, int before) {
    EXPECT(status == SFT_ERROR_IO, "%s: status %d, %s", what, status, sft_last_error_message());
    EXPECT(sft_last_os_error() == error, "%s: %s", what, sft_last_error_message());
    EXPECT(strstr(sft_last_error_message(), path) != NULL, "%s: %s", what, sft_last_error_message());
    EXPECT(version == 0 || file_version(path, SFT_BACKEND_PREAD) == version, "%s: %s", what, sft_last_error_message());
    EXPECT(entries(folder) == before, "%s: %d entries, %d before", what, entries(folder), before);
    (*manners)++;
}

static void refused(const char* what, const char* path, size_t words, int error, uint64_t version, const char* folder) {
    const int before = entries(folder);
    is_refused(what, save_version(99, words, path), path, error, version, folder, before);
}

static void accepted(const char* what, const char* path, size_t words, int beside, const char* folder) {
    for (uint64_t version = 5; version < 8; version++) {
        EXPECT(save_version(version, words, path) == SFT_OK, "%s: %s", what, sft_last_error_message());
        EXPECT(file_version(path, SFT_BACKEND_MMAP) == version, "%s: %s", what, sft_last_error_message());
        EXPECT(entries(folder) == beside + 1, "%s: %d entries", what, entries(folder));
    }
    (*manners)++;
}

/* In a child, as another user where this process may change it: what it makes of its failures is its exit status. */
static void as_child(void (*body)(void), bool as_nobody) {
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

static void folders_with_bits(void) {
    const char* folder = path_of("setgid");
    make_folder(folder, 0755);
    if (geteuid() == 0 && chown(folder, (uid_t)-1, 12345) != 0) abort();
    if (chmod(folder, 02775) != 0) abort();
    struct stat told;
    accepted("a folder with the set-group-ID bit", path_of("setgid/a"), 10, 0, folder);
    if (stat(folder, &told) != 0) abort();
    const gid_t group = told.st_gid;
    EXPECT(stat(path_of("setgid/a"), &told) == 0 && told.st_gid == group, "group %u, not %u", told.st_gid, group);
    const mode_t mask = umask(0);
    umask(mask);
    EXPECT(mode_of(path_of("setgid/a")) == (0666 & ~mask), "mode %o", mode_of(path_of("setgid/a")));
    no_unnamed = true;
    accepted("the same without unnamed files", path_of("setgid/b"), 10, 1, folder);
    no_unnamed = false;
    EXPECT(stat(path_of("setgid/b"), &told) == 0 && told.st_gid == group, "group %u, not %u", told.st_gid, group);
    EXPECT(mode_of(path_of("setgid/b")) == (0666 & ~mask), "mode %o", mode_of(path_of("setgid/b")));
}

static void without_unnamed_files(void) {
    char name[300];
    memset(name, 'n', 255);
    memcpy(name, "long/", 5);
    name[260] = '\0';
    memset(name + 5, 'n', 255);
    make_folder(path_of("long"), 0755);
    no_unnamed = true;
    accepted("a name of 255 bytes, no unnamed files", path_of(name), 10, 0, path_of("long"));
    no_unnamed = false;
    char longer[400];
    snprintf(longer, sizeof longer, "%sn", name);
    refused("a name of 256 bytes", path_of(longer), 10, ENAMETOOLONG, 0, path_of("long"));
    no_unnamed = true;
    refused("the same, no unnamed files", path_of(longer), 10, ENAMETOOLONG, 0, path_of("long"));
    no_unnamed = false;
}

static void folder_that_is_gone(void) {
    make_folder(path_of("gone"), 0755);
    if (chdir(path_of("gone")) != 0 || rmdir(path_of("gone")) != 0) abort();
    EXPECT(save_version(1, 10, "a") == SFT_ERROR_IO && sft_last_os_error() == ENOENT, "%s", sft_last_error_message());
    sft_file* file = NULL;
    EXPECT(sft_file_open("a", NULL, &file) == SFT_ERROR_IO && sft_last_os_error() == ENOENT, "%s",
           sft_last_error_message());
    /* Paths from the root need no current folder. */
    EXPECT(save_version(1, 10, path_of("from-the-root")) == SFT_OK, "%s", sft_last_error_message());
}

static void as_a_stranger(void) {
    if (geteuid() == 0) abort();
    refused("a folder that may only be read", path_of("closed/a"), 10, EACCES, 1, path_of("closed"));
    no_unnamed = true;
    refused("the same, no unnamed files", path_of("closed/a"), 10, EACCES, 1, path_of("closed"));
    no_unnamed = false;
    refused("another's file in a sticky folder", path_of("sticky/a"), 10, EPERM, 1, path_of("sticky"));
    refused("the same, which everybody may write to", path_of("sticky/open"), 10, EPERM, 1, path_of("sticky"));
    no_renames = ENOSYS;
    refused("another's file, no renames", path_of("shared/a"), 10, EACCES, 1, path_of("shared"));
    no_renames = 0;
    sft_sharded_options options = SFT_SHARDED_OPTIONS_INIT;
    content what = content_new(2, 2, 10);
    sft_writer* writer = content_writer(&what);
    EXPECT(sft_writer_write_sharded(writer, path_of("closed/new"), &options) == SFT_ERROR_IO &&
               sft_last_os_error() == EACCES,
           "%s", sft_last_error_message());
    sft_writer_free(writer);
    content_free(&what);
}

static void another_user(void) {
    if (geteuid() != 0) {
        printf("manners: folders of another user skipped, for want of root\n");
        return;
    }
    make_folder(path_of("closed"), 0755);
    make_folder(path_of("sticky"), 01777);
    EXPECT(save_version(1, 10, path_of("closed/a")) == SFT_OK, "%s", sft_last_error_message());
    EXPECT(save_version(1, 10, path_of("sticky/a")) == SFT_OK, "%s", sft_last_error_message());
    EXPECT(save_version(1, 10, path_of("sticky/open")) == SFT_OK, "%s", sft_last_error_message());
    if (chmod(path_of("sticky/open"), 0666) != 0) abort();
    make_folder(path_of("shared"), 0777);
    EXPECT(save_version(1, 10, path_of("shared/a")) == SFT_OK, "%s", sft_last_error_message());
    as_child(as_a_stranger, true);
}

/* A new file and two over it, and its permissions, on a filesystem that lacks what is set. */
static void saves_all_the_same(const char* name, bool unnamed, int renames, int links) {
    char folder[4096], file[4200];
    snprintf(folder, sizeof folder, "%s", path_of(name));
    make_folder(folder, 0755);
    snprintf(file, sizeof file, "%s/model.safetensors", folder);
    no_unnamed = !unnamed;
    no_renames = renames;
    no_links = links;
    accepted(name, file, 5000, 0, folder);
    const mode_t mask = umask(0);
    umask(mask);
    EXPECT(mode_of(file) == (0666 & ~mask), "%s: mode %o", name, mode_of(file));
    if (chmod(file, 0600) != 0) abort();
    accepted(name, file, 100, 0, folder);
    EXPECT(mode_of(file) == 0600, "%s: mode %o", name, mode_of(file));
    /* What is not of the filesystem is an error still. */
    no_renames = EACCES;
    refused(name, file, 10, EACCES, 7, folder);
    no_unnamed = false;
    no_renames = no_links = 0;
}

static void without_renames_or_links(void) {
    static const int errors[] = {ENOSYS, EOPNOTSUPP, EINVAL, EPERM};
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++) {
        char name[40];
        snprintf(name, sizeof name, "no links, %zu", i);
        saves_all_the_same(name, true, 0, errors[i]);
        snprintf(name, sizeof name, "no renames, %zu", i);
        saves_all_the_same(name, false, errors[i], 0);
        snprintf(name, sizeof name, "neither, %zu", i);
        saves_all_the_same(name, true, errors[i], errors[i]);
    }
}

static bool put_line(const char* path, const char* line) {
    const int file = open(path, O_WRONLY);
    const bool written = file >= 0 && write(file, line, strlen(line)) == (ssize_t)strlen(line);
    if (file >= 0) close(file);
    return written;
}

/* Mounts of its own for this process: as root, or as the root of a namespace of its own, where that is allowed. */
static bool may_mount(void) {
    char users[64], groups[64];
    snprintf(users, sizeof users, "0 %u 1", geteuid());
    snprintf(groups, sizeof groups, "0 %u 1", getegid());
    const bool is_root = unshare(CLONE_NEWNS) == 0;
    return (is_root || (unshare(CLONE_NEWUSER | CLONE_NEWNS) == 0 && put_line("/proc/self/setgroups", "deny") &&
                        put_line("/proc/self/uid_map", users) && put_line("/proc/self/gid_map", groups))) &&
           mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0 &&
           mount("tmpfs", path_of("disk"), "tmpfs", 0, "size=1m") == 0;
}

static sft_status stream_version(uint64_t version, size_t words, const char* path) {
    content what = content_new(version, 2, words);
    const sft_status status = content_stream(&what, path, NULL);
    content_free(&what);
    return status;
}

static sft_status edit(const char* path, const char* value, sft_edit_mode mode) {
    const sft_metadata_change change = {{"key", 3}, {value, strlen(value)}};
    sft_edit_options options = SFT_EDIT_OPTIONS_INIT;
    options.mode = mode;
    options.reserve = mode == SFT_EDIT_REWRITE ? 100 : 0;
    return sft_metadata_edit(path, &change, 1, &options);
}

static bool metadata_is(const char* path, const char* value) {
    sft_file* file = NULL;
    sft_str text = {NULL, 0};
    if (sft_file_open(path, NULL, &file) != SFT_OK) return false;
    const bool same = sft_file_metadata_get(file, "key", 3, &text) == SFT_OK && text.length == strlen(value) &&
                      memcmp(text.data, value, text.length) == 0;
    sft_file_free(file);
    return same;
}

/* Edits and streams where there is no byte left: what needs no space works. */
static void on_a_full_disk(const char* a, const char* disk) {
    EXPECT(edit(a, "first", SFT_EDIT_REWRITE) == SFT_OK, "%s", sft_last_error_message());
    static const char page[4096];
    const int fill = open(path_of("disk/fill"), O_CREAT | O_WRONLY, 0666);
    while (fill >= 0 && write(fill, page, sizeof page) > 0) {
    }
    EXPECT(fill >= 0 && errno == ENOSPC, "%s", strerror(errno));
    close(fill);
    const int before = entries(disk);
    is_refused("an edit anew", edit(a, "second", SFT_EDIT_REWRITE), a, ENOSPC, 1, disk, before);
    is_refused("a stream", stream_version(99, 10000, a), a, ENOSPC, 1, disk, before);
    is_refused("a stream to a new file", stream_version(99, 10000, path_of("disk/b")), path_of("disk/b"), ENOSPC, 0,
               disk, before);
    EXPECT(metadata_is(a, "first"), "%s", sft_last_error_message());
    EXPECT(edit(a, "third", SFT_EDIT_IN_PLACE) == SFT_OK && metadata_is(a, "third"), "%s", sft_last_error_message());
    EXPECT(file_version(a, SFT_BACKEND_PREAD) == 1, "%s", sft_last_error_message());
    if (unlink(path_of("disk/fill")) != 0) abort();
    (*manners)++;
}

/* A disk of 1 MiB: one old file of a third of it. */
static void on_a_small_disk(void) {
    if (!may_mount()) {
        printf("manners: a full disk skipped, as this process may not mount: %s\n", strerror(errno));
        return;
    }
    const size_t third = 20000;
    char disk[4096], a[4096];
    snprintf(disk, sizeof disk, "%s", path_of("disk"));
    snprintf(a, sizeof a, "%s", path_of("disk/a"));
    for (int round = 0; round < 4; round++) {
        no_unnamed = round % 2 == 1;
        no_fallocate = round >= 2;
        EXPECT(save_version(1, third, a) == SFT_OK, "%s", sft_last_error_message());
        refused("a file larger than the disk", a, 70000, ENOSPC, 1, disk);
        refused("one that would fit in the place of the old one", a, 50000, ENOSPC, 1, disk);
        refused("a new file", path_of("disk/b"), 50000, ENOSPC, 0, disk);
        no_links = EPERM;
        no_renames = ENOSYS;
        refused("a new file that is written twice", path_of("disk/b"), 25000, ENOSPC, 0, disk);
        if (!no_unnamed) refused("one over the old, written twice", a, 25000, ENOSPC, 1, disk);
        no_links = no_renames = 0;
        on_a_full_disk(a, disk);
        content what = content_new(2, 2, 50000);
        sft_writer* writer = content_writer(&what);
        sft_sharded_options options = SFT_SHARDED_OPTIONS_INIT;
        options.max_shard_bytes = 400000;
        EXPECT(sft_writer_write_sharded(writer, disk, &options) == SFT_ERROR_IO && sft_last_os_error() == ENOSPC, "%s",
               sft_last_error_message());
        EXPECT(entries(disk) == 1, "%d entries", entries(disk));
        sft_writer_free(writer);
        content_free(&what);
        /* A save works once there is space again. */
        if (unlink(a) != 0) abort();
        EXPECT(save_version(3, 50000, a) == SFT_OK && file_version(a, SFT_BACKEND_MMAP) == 3, "%s",
               sft_last_error_message());
        if (unlink(a) != 0) abort();
        *manners += 2;
    }
    no_unnamed = no_fallocate = false;
    /* Nothing was kept back: the disk is as empty as at first. */
    struct statfs told;
    EXPECT(statfs(disk, &told) == 0 && told.f_bfree + 1 >= told.f_blocks, "%ld of %ld blocks", (long)told.f_bfree,
           (long)told.f_blocks);
    if (symlink(path_of("disk/far"), path_of("to-another-disk")) != 0) abort();
    const int beside = entries(path_of("."));
    accepted("a link to another filesystem, to nothing yet", path_of("to-another-disk"), 1000, 0, disk);
    struct stat link;
    EXPECT(lstat(path_of("to-another-disk"), &link) == 0 && S_ISLNK(link.st_mode), "the link is gone");
    EXPECT(entries(path_of(".")) == beside, "%d entries, %d before", entries(path_of(".")), beside);
    if (mount(NULL, disk, NULL, MS_REMOUNT | MS_RDONLY, NULL) != 0) abort();
    refused("a filesystem that may only be read", path_of("disk/far"), 10, EROFS, 7, disk);
}

static void small_disk(void) {
    make_folder(path_of("disk"), 0755);
    as_child(on_a_small_disk, false);
}

/* Staged files of a process that is gone: they stay while they are young, or locked, and go then; what is no staged
 * file stays for ever. */
static void strays_of_the_dead(const char* name, bool unnamed) {
    enum { DAYS = 86400 };
    make_folder(path_of(name), 0755);
    no_unnamed = !unnamed;
    fflush(stdout);
    const pid_t gone = fork();
    if (gone == 0) _exit(0);
    if (gone < 0 || waitpid(gone, NULL, 0) != gone) abort();
    char folder[4096], stray[3][4200], file[4200];
    snprintf(folder, sizeof folder, "%s", path_of(name));
    snprintf(file, sizeof file, "%s/model.safetensors", folder);
    static const char* const endings[] = {"-0.tmp", "-1.tmp", "-0.whole"};
    for (int i = 0; i < 3; i++) {
        snprintf(stray[i], sizeof stray[i], "%s/.safetensors-%d%s", folder, (int)gone, endings[i]);
        EXPECT(save_version(1, 1000, stray[i]) == SFT_OK, "%s", sft_last_error_message());
    }
    const int locked = open(stray[1], O_RDONLY);
    if (locked < 0 || flock(locked, LOCK_EX) != 0) abort();
    const struct {
        long ahead;
        int left;
    } steps[] = {{0, 4}, {DAYS - 600, 4}, {2 * DAYS, 3}, {2 * DAYS + 600, 3}, {4 * DAYS, 2}};
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        if (i == 3) close(locked);
        ahead = steps[i].ahead;
        EXPECT(save_version(i + 2, 1000, file) == SFT_OK && file_version(file, SFT_BACKEND_MMAP) == i + 2, "%s",
               sft_last_error_message());
        ahead = 0;
        EXPECT(entries(folder) == steps[i].left, "%s, step %zu: %d entries", name, i, entries(folder));
        (*manners)++;
    }
    EXPECT(file_version(stray[2], SFT_BACKEND_MMAP) == 1, "%s: %s", name, sft_last_error_message());
    no_unnamed = false;
}

/* The lock of a staged file ends with the save, also where a process that was forked meanwhile has its descriptor. */
static void saved_files_are_not_locked(void) {
    EXPECT(save_version(1, 10, path_of("unlocked")) == SFT_OK, "%s", sft_last_error_message());
    fflush(stdout);
    forks_at_rename = true;
    EXPECT(save_version(2, 10, path_of("unlocked")) == SFT_OK, "%s", sft_last_error_message());
    forks_at_rename = false;
    const int file = open(path_of("unlocked"), O_RDONLY);
    EXPECT(forked > 0 && file >= 0 && flock(file, LOCK_EX | LOCK_NB) == 0, "%s", strerror(errno));
    close(file);
    if (forked > 0 && (kill(forked, SIGKILL) != 0 || waitpid(forked, NULL, 0) != forked)) abort();
    (*manners)++;
}

/* Two processes save to one path, each its own content, at once: a whole file wins each time. */
static void race(const char* name, bool unnamed, long rounds) {
    char folder[4096];
    snprintf(folder, sizeof folder, "%s", path_of(name));
    make_folder(folder, 0755);
    char path[4200];
    snprintf(path, sizeof path, "%s/a", folder);
    no_unnamed = !unnamed;
    long won[2] = {0, 0};
    for (long round = 0; round < rounds; round++) {
        if (round % 2 == 0) unlink(path);
        int gate[2];
        if (pipe(gate) != 0) abort();
        fflush(stdout);
        pid_t pids[2];
        for (uint64_t saver = 0; saver < 2; saver++) {
            pids[saver] = fork();
            if (pids[saver] < 0) abort();
            if (pids[saver] == 0) {
                char go;
                close(gate[1]);
                if (read(gate[0], &go, 1) != 0) _exit(1);
                _exit(save_version(10 + saver, 1000 + saver * 30000, path) == SFT_OK ? 0 : 1);
            }
        }
        close(gate[0]);
        close(gate[1]);
        for (int saver = 0; saver < 2; saver++) {
            int status = 0;
            EXPECT(waitpid(pids[saver], &status, 0) == pids[saver] && status == 0, "%s, round %ld: status %d", name,
                   round, status);
        }
        const uint64_t version = file_version(path, SFT_BACKEND_MMAP);
        if (EXPECT(version == 10 || version == 11, "%s, round %ld: %s", name, round, sft_last_error_message())) {
            won[version - 10]++;
        }
        EXPECT(entries(folder) == 1, "%s, round %ld: %d entries", name, round, entries(folder));
    }
    no_unnamed = false;
    printf("two processes at one path, %s: %ld rounds, whole: %ld (%ld and %ld), strays: %d\n", name, rounds,
           won[0] + won[1], won[0], won[1], strays(folder));
}

int main(int count, char** arguments) {
    if (count != 2) return 2;
    use_folder(arguments[1]);
    manners = mmap(NULL, sizeof *manners, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (manners == MAP_FAILED) return 2;
    char above[4096];
    snprintf(above, sizeof above, "%s/..", arguments[1]);
    /* The folder above may be for its owner alone, and others are to come here. */
    if (chmod(above, 0755) != 0 || chmod(arguments[1], 0755) != 0) return 2;
    folders_with_bits();
    without_unnamed_files();
    without_renames_or_links();
    as_child(folder_that_is_gone, false);
    another_user();
    small_disk();
    saved_files_are_not_locked();
    strays_of_the_dead("strays", true);
    strays_of_the_dead("strays of named files", false);
    printf("manners: %ld, failed: %ld\n", *manners, failures());
    race("unnamed", true, 100);
    race("named", false, 100);
    return failures() == 0 ? 0 : 1;
}
