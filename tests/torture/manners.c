/* How a save behaves among the things that a filesystem has: what the tests in other languages do not need a mount, a
 * second user or a second process for.
 *
 * What killed saves have left, a directory with the set-group-ID bit, a sticky one, links to another filesystem,
 * filesystems without unnamed files, renames or links, a disk that is full (disk.c), a directory that may not be
 * written to or is gone, two processes at one path. What needs root is skipped without. Run with a directory. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common.h"
#include "filesystem.h"

static mode_t mode_of(const char* path) {
    struct stat told;
    return stat(path, &told) == 0 ? told.st_mode & 07777 : 0;
}

static void directorys_with_bits(void) {
    const char* directory = path_of("setgid");
    make_directory(directory, 0755);
    if (geteuid() == 0 && chown(directory, (uid_t)-1, 12345) != 0) abort();
    if (chmod(directory, 02775) != 0) abort();
    struct stat told;
    accepted("a directory with the set-group-ID bit", path_of("setgid/a"), 10, 0, directory);
    if (stat(directory, &told) != 0) abort();
    const gid_t group = told.st_gid;
    EXPECT(stat(path_of("setgid/a"), &told) == 0 && told.st_gid == group, "group %u, not %u", told.st_gid, group);
    const mode_t mask = umask(0);
    umask(mask);
    EXPECT(mode_of(path_of("setgid/a")) == (0666 & ~mask), "mode %o", mode_of(path_of("setgid/a")));
    no_unnamed = true;
    accepted("the same without unnamed files", path_of("setgid/b"), 10, 1, directory);
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
    make_directory(path_of("long"), 0755);
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

static void directory_that_is_gone(void) {
    make_directory(path_of("gone"), 0755);
    if (chdir(path_of("gone")) != 0 || rmdir(path_of("gone")) != 0) abort();
    EXPECT(save_version(1, 10, "a") == SFT_ERROR_IO && sft_last_error_get_os_error() == ENOENT, "%s",
           sft_last_error_get_message());
    sft_file* file = NULL;
    EXPECT(sft_file_open("a", NULL, &file) == SFT_ERROR_IO && sft_last_error_get_os_error() == ENOENT, "%s",
           sft_last_error_get_message());
    /* Paths from the root need no current directory. */
    EXPECT(save_version(1, 10, path_of("from-the-root")) == SFT_OK, "%s", sft_last_error_get_message());
}

/* A writer that is created by a relative path stays in the directory that this meant, whatever the current directory is
 * when it is committed; so do a save that is given up, and one that is overwritten. */
static void another_current_directory(void) {
    char first[4096], second[4096];
    snprintf(first, sizeof first, "%s", path_of("first"));
    snprintf(second, sizeof second, "%s", path_of("second"));
    make_directory(first, 0755);
    make_directory(second, 0755);
    static const uint64_t shape[] = {3};
    for (int round = 0; round < 8; round++) {
        no_unnamed = round % 2 == 1;
        no_renames = round / 2 % 2 == 1 ? ENOSYS : 0;
        const bool commits = round < 4;
        sft_writer* writer = NULL;
        sft_incremental_writer* writing = NULL;
        if (chdir(first) != 0 || sft_writer_new(&writer) != SFT_OK) abort();
        EXPECT(sft_writer_add_tensor(writer, "a", 1, SFT_DTYPE_U8, shape, 1, "abc", 3) == SFT_OK &&
                   sft_incremental_writer_create(writer, "model", NULL, &writing) == SFT_OK,
               "%s", sft_last_error_get_message());
        if (chdir(second) != 0) abort();
        put_file("model", "theirs", 6);
        EXPECT(!commits || sft_incremental_writer_commit(writing) == SFT_OK, "%s", sft_last_error_get_message());
        sft_incremental_writer_free(writing);
        sft_writer_free(writer);
        struct stat told;
        EXPECT(stat("model", &told) == 0 && told.st_size == 6 && entries(second) == 1, "round %d", round);
        EXPECT(entries(first) == 1 || round == 0, "round %d: %d entries", round, entries(first));
        sft_file* file = NULL;
        EXPECT(sft_file_open(path_of("first/model"), NULL, &file) == SFT_OK, "%s", sft_last_error_get_message());
        sft_file_free(file);
        (*manners)++;
    }
    no_unnamed = false;
    no_renames = 0;
}

/* While a file is written that will replace another one, nobody can open it who could not open that; nor after the
 * permissions of that have become narrower. */
static void nobody_gets_rights_meanwhile(void) {
    make_directory(path_of("rights"), 0755);
    for (int unnamed = 0; unnamed < 2; unnamed++) {
        no_unnamed = !unnamed;
        EXPECT(save_version(1, 1000, path_of("rights/a")) == SFT_OK, "%s", sft_last_error_get_message());
        if (chmod(path_of("rights/a"), 0644) != 0) abort();
        narrows_at_stage = path_of("rights/a");
        most_rights = 0;
        EXPECT(save_version(2, 1000, path_of("rights/a")) == SFT_OK, "%s", sft_last_error_get_message());
        narrows_at_stage = NULL;
        EXPECT(most_rights == 0600 && mode_of(path_of("rights/a")) == 0600, "rights %o, then %o", most_rights,
               mode_of(path_of("rights/a")));
        (*manners)++;
    }
    no_unnamed = false;
}

static sft_status edit(const char* key, bool in_place, uint64_t reserve) {
    sft_edit_options options = SFT_EDIT_OPTIONS_INIT;
    options.in_place = in_place;
    options.reserve = reserve;
    const sft_metadata_change change = {{key, strlen(key)}, {"value", 5}};
    return sft_edit_metadata(path_of("edited/a"), &change, 1, &options);
}

static void another_edit(void) { EXPECT(edit("theirs", true, 0) == SFT_OK, "%s", sft_last_error_get_message()); }

/* The whole file, in a buffer that is valid until the next call. */
static const char* contents(const char* path, size_t* length) {
    static char bytes[8192];
    const int file = open(path, O_RDONLY);
    const ssize_t count = read(file, bytes, sizeof bytes);
    if (file < 0 || count < 0 || count == sizeof bytes) abort();
    close(file);
    *length = (size_t)count;
    return bytes;
}

/* As cp does: over the old bytes. */
static void copy_over(void) {
    size_t length;
    const char* bytes = contents(path_of("edited/other"), &length);
    put_file(path_of("edited/a"), bytes, length);
}

/* What another program does to a file after an edit has read its header: the edit is refused, and that stays. */
static void edits_of_what_has_changed(void) {
    static void (*const acts[])(void) = {another_edit, copy_over};
    static const bool in_place[] = {true, false};
    make_directory(path_of("edited"), 0755);
    EXPECT(save_version(2, 50, path_of("edited/other")) == SFT_OK, "%s", sft_last_error_get_message());
    for (int round = 0; round < 4; round++) {
        EXPECT(save_version(1, 50, path_of("edited/a")) == SFT_OK && edit("old", false, 400) == SFT_OK, "%s",
               sft_last_error_get_message());
        after_header = acts[round % 2];
        const sft_status status = edit("ours", in_place[round / 2], 0);
        EXPECT(status == SFT_ERROR_FILE_CHANGED && after_header == NULL, "round %d: status %u", round, status);
        size_t length;
        const char* bytes = contents(path_of("edited/a"), &length);
        EXPECT(memmem(bytes, length, "\"ours\"", 6) == NULL, "round %d", round);
        EXPECT((memmem(bytes, length, "\"theirs\"", 8) != NULL) == (round % 2 == 0), "round %d", round);
        EXPECT(file_version(path_of("edited/a"), SFT_BACKEND_PREAD) == (round % 2 == 0 ? 1 : 2), "round %d", round);
        (*manners)++;
    }
}

/* With the default action of the signals, which is to end the process, and in a child that may write files of 4 kB:
 * errors, and neither the mask nor what is pending is another one afterwards. */
static void signals_of_writes(void) {
    make_directory(path_of("limited"), 0755);
    EXPECT(save_version(1, 50, path_of("limited/a")) == SFT_OK, "%s", sft_last_error_get_message());
    const struct rlimit limit = {4096, 4096};
    if (setrlimit(RLIMIT_FSIZE, &limit) != 0) abort();
    sigset_t ours, before, after;
    /* The kernel fills only the first bytes. */
    sigemptyset(&before);
    sigemptyset(&after);
    sigemptyset(&ours);
    sigaddset(&ours, SIGXFSZ);
    for (int round = 0; round < 3; round++) {
        /* In the last round the caller has blocked the signal, and one is pending. */
        if (round == 1 && pthread_sigmask(SIG_BLOCK, &ours, NULL) != 0) abort();
        if (round == 2 && raise(SIGXFSZ) != 0) abort();
        pthread_sigmask(SIG_SETMASK, NULL, &before);
        refused("a file beyond the limit", path_of("limited/a"), 5000, EFBIG, 1, path_of("limited"));
        content what = content_new(3, 2, 5000);
        EXPECT(content_write_incrementally(&what, path_of("limited/b"), NULL) == SFT_ERROR_IO &&
                   sft_last_error_get_os_error() == EFBIG,
               "%s", sft_last_error_get_message());
        content_free(&what);
        pthread_sigmask(SIG_SETMASK, NULL, &after);
        for (int i = 1; i < 32; i++)
            EXPECT(sigismember(&before, i) == sigismember(&after, i), "round %d, signal %d: %d", round, i,
                   sigismember(&before, i));
        EXPECT(sigpending(&after) == 0 && sigismember(&after, SIGXFSZ) == (round == 2), "round %d", round);
        (*manners)++;
    }
    if (mkfifo(path_of("limited/pipe"), 0600) != 0) abort();
    const pid_t reader = fork();
    if (reader == 0) {
        char byte;
        const int pipe = open(path_of("limited/pipe"), O_RDONLY);
        _exit(read(pipe, &byte, 1) == 1 ? 0 : 1);
    }
    EXPECT(save_version(1, 50000, path_of("limited/pipe")) == SFT_ERROR_IO && sft_last_error_get_os_error() == EPIPE,
           "%s", sft_last_error_get_message());
    EXPECT(sigpending(&after) == 0 && !sigismember(&after, SIGPIPE), "a SIGPIPE is left");
    if (waitpid(reader, NULL, 0) != reader) abort();
    (*manners)++;
}

/* A user who may only read a directory cannot lock it against saves. */
static void reader_of_locked(int tell) {
    const int directory = open(path_of("locked"), O_RDONLY | O_DIRECTORY);
    EXPECT(directory >= 0 && flock(directory, LOCK_EX | LOCK_NB) == 0, "%s", strerror(errno));
    EXPECT(open(path_of("locked/.safetensors.lock"), O_RDONLY | O_CREAT, 0666) < 0 && errno == EACCES, "%s",
           strerror(errno));
    if (write(tell, "", 1) != 1) abort();
    pause();
}

static void readers_hold_up_no_save(void) {
    if (geteuid() != 0) {
        printf("manners: a lock of another user skipped, for want of root\n");
        return;
    }
    make_directory(path_of("locked"), 0755);
    int gate[2];
    char locked;
    if (pipe(gate) != 0) abort();
    fflush(stdout);
    const pid_t reader = fork();
    if (reader == 0) {
        if (setgid(65534) != 0 || setuid(65534) != 0) abort();
        reader_of_locked(gate[1]);
        _exit(1);
    }
    close(gate[1]);
    EXPECT(read(gate[0], &locked, 1) == 1, "the reader has ended");
    close(gate[0]);
    sft_sharded_options options = SFT_SHARDED_OPTIONS_INIT;
    options.max_shard_size = 100;
    content what = content_new(3, 2, 10);
    sft_writer* writer = content_writer(&what);
    const double begin = seconds();
    EXPECT(sft_writer_write_sharded(writer, path_of("locked"), &options) == SFT_OK, "%s", sft_last_error_get_message());
    EXPECT(seconds() - begin < 10, "%f seconds", seconds() - begin);
    EXPECT(checkpoint_version(path_of("locked")) == 3 && entries(path_of("locked")) == 3, "%s",
           sft_last_error_get_message());
    sft_writer_free(writer);
    content_free(&what);
    if (kill(reader, SIGKILL) != 0 || waitpid(reader, NULL, 0) != reader) abort();
    (*manners)++;
}

static void as_a_stranger(void) {
    if (geteuid() == 0) abort();
    refused("a directory that may only be read", path_of("closed/a"), 10, EACCES, 1, path_of("closed"));
    no_unnamed = true;
    refused("the same, no unnamed files", path_of("closed/a"), 10, EACCES, 1, path_of("closed"));
    no_unnamed = false;
    refused("another's file in a sticky directory", path_of("sticky/a"), 10, EPERM, 1, path_of("sticky"));
    refused("the same, which everybody may write to", path_of("sticky/open"), 10, EPERM, 1, path_of("sticky"));
    no_renames = ENOSYS;
    refused("another's file, no renames", path_of("shared/a"), 10, EACCES, 1, path_of("shared"));
    no_renames = 0;
    sft_sharded_options options = SFT_SHARDED_OPTIONS_INIT;
    content what = content_new(2, 2, 10);
    sft_writer* writer = content_writer(&what);
    EXPECT(sft_writer_write_sharded(writer, path_of("closed/new"), &options) == SFT_ERROR_IO &&
               sft_last_error_get_os_error() == EACCES,
           "%s", sft_last_error_get_message());
    sft_writer_free(writer);
    content_free(&what);
}

static void another_user(void) {
    if (geteuid() != 0) {
        printf("manners: directories of another user skipped, for want of root\n");
        return;
    }
    make_directory(path_of("closed"), 0755);
    make_directory(path_of("sticky"), 01777);
    EXPECT(save_version(1, 10, path_of("closed/a")) == SFT_OK, "%s", sft_last_error_get_message());
    EXPECT(save_version(1, 10, path_of("sticky/a")) == SFT_OK, "%s", sft_last_error_get_message());
    EXPECT(save_version(1, 10, path_of("sticky/open")) == SFT_OK, "%s", sft_last_error_get_message());
    if (chmod(path_of("sticky/open"), 0666) != 0) abort();
    make_directory(path_of("shared"), 0777);
    EXPECT(save_version(1, 10, path_of("shared/a")) == SFT_OK, "%s", sft_last_error_get_message());
    as_child(as_a_stranger, true);
}

/* A new file and two over it, and its permissions, on a filesystem that lacks what is set. */
static void saves_all_the_same(const char* name, bool unnamed, int renames, int links) {
    char directory[4096], file[4200];
    snprintf(directory, sizeof directory, "%s", path_of(name));
    make_directory(directory, 0755);
    snprintf(file, sizeof file, "%s/model.safetensors", directory);
    no_unnamed = !unnamed;
    no_renames = renames;
    no_links = links;
    accepted(name, file, 5000, 0, directory);
    const mode_t mask = umask(0);
    umask(mask);
    EXPECT(mode_of(file) == (0666 & ~mask), "%s: mode %o", name, mode_of(file));
    if (chmod(file, 0600) != 0) abort();
    accepted(name, file, 100, 0, directory);
    EXPECT(mode_of(file) == 0600, "%s: mode %o", name, mode_of(file));
    /* What is not of the filesystem is an error still. */
    no_renames = EACCES;
    refused(name, file, 10, EACCES, 7, directory);
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

/* Staged files whose lock nobody has: they stay while they are young, and go then, if only their process is gone too
 * where machines share the filesystem. What is locked stays, and what is no staged file for ever. */
static void leftovers_of_killed_saves(const char* name, bool unnamed, bool shared) {
    enum { MINUTE = 60, HOUR = 60 * MINUTE, DAY = 24 * HOUR };
    make_directory(path_of(name), 0755);
    no_unnamed = !unnamed;
    is_shared = shared;
    fflush(stdout);
    const pid_t gone = fork();
    if (gone == 0) _exit(0);
    if (gone < 0 || waitpid(gone, NULL, 0) != gone) abort();
    char directory[4096], stray[4][4200], file[4200];
    snprintf(directory, sizeof directory, "%s", path_of(name));
    snprintf(file, sizeof file, "%s/model.safetensors", directory);
    const struct {
        pid_t process;
        const char* end;
    } names[] = {{gone, "-0.tmp"}, {gone, "-1.tmp"}, {gone, "-0.whole"}, {getppid(), "-0.tmp"}};
    for (int i = 0; i < 4; i++) {
        snprintf(stray[i], sizeof stray[i], "%s/.safetensors-%d%s", directory, (int)names[i].process, names[i].end);
        EXPECT(save_version(1, 1000, stray[i]) == SFT_OK, "%s", sft_last_error_get_message());
    }
    const int locked = open(stray[1], O_RDONLY);
    if (locked < 0 || flock(locked, LOCK_EX) != 0) abort();
    /* A save is made at these times, and leaves so many entries; before the last but one the lock is given back. */
    const struct {
        long ahead;
        int left;
    } here[] = {{0, 5}, {HOUR - 2 * MINUTE, 5}, {2 * HOUR, 3}, {2 * HOUR + 30, 3}, {3 * HOUR, 2}},
      elsewhere[] = {{0, 5}, {DAY - HOUR / 2, 5}, {2 * DAY, 4}, {2 * DAY + HOUR / 2, 4}, {4 * DAY, 3}};
    for (size_t i = 0; i < sizeof here / sizeof *here; i++) {
        if (i == 3) close(locked);
        ahead = shared ? elsewhere[i].ahead : here[i].ahead;
        EXPECT(save_version(i + 2, 1000, file) == SFT_OK && file_version(file, SFT_BACKEND_MMAP) == i + 2, "%s",
               sft_last_error_get_message());
        ahead = 0;
        const int left = shared ? elsewhere[i].left : here[i].left;
        EXPECT(entries(directory) == left, "%s, step %zu: %d entries, not %d", name, i, entries(directory), left);
        (*manners)++;
    }
    EXPECT(file_version(stray[2], SFT_BACKEND_MMAP) == 1, "%s: %s", name, sft_last_error_get_message());
    no_unnamed = is_shared = false;
}

/* The lock of a staged file ends with the save, also where a process that was forked meanwhile has its descriptor. */
static void saved_files_are_not_locked(void) {
    EXPECT(save_version(1, 10, path_of("unlocked")) == SFT_OK, "%s", sft_last_error_get_message());
    fflush(stdout);
    forks_at_rename = true;
    EXPECT(save_version(2, 10, path_of("unlocked")) == SFT_OK, "%s", sft_last_error_get_message());
    forks_at_rename = false;
    const int file = open(path_of("unlocked"), O_RDONLY);
    EXPECT(forked > 0 && file >= 0 && flock(file, LOCK_EX | LOCK_NB) == 0, "%s", strerror(errno));
    close(file);
    if (forked > 0 && (kill(forked, SIGKILL) != 0 || waitpid(forked, NULL, 0) != forked)) abort();
    (*manners)++;
}

/* Two processes save to one path, each its own content, at once: a whole file wins each time. */
static void race(const char* name, bool unnamed, long rounds) {
    char directory[4096];
    snprintf(directory, sizeof directory, "%s", path_of(name));
    make_directory(directory, 0755);
    char path[4200];
    snprintf(path, sizeof path, "%s/a", directory);
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
        if (EXPECT(version == 10 || version == 11, "%s, round %ld: %s", name, round, sft_last_error_get_message())) {
            won[version - 10]++;
        }
        EXPECT(entries(directory) == 1, "%s, round %ld: %d entries", name, round, entries(directory));
    }
    no_unnamed = false;
    printf("two processes at one path, %s: %ld rounds, whole: %ld (%ld and %ld), leftovers: %d\n", name, rounds,
           won[0] + won[1], won[0], won[1], leftovers(directory));
}

int main(int count, char** arguments) {
    if (count != 2) return 2;
    use_directory(arguments[1]);
    manners = mmap(NULL, sizeof *manners, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (manners == MAP_FAILED) return 2;
    char above[4096];
    snprintf(above, sizeof above, "%s/..", arguments[1]);
    /* The directory above may be for its owner alone, and others are to come here. */
    if (chmod(above, 0755) != 0 || chmod(arguments[1], 0755) != 0) return 2;
    directorys_with_bits();
    without_unnamed_files();
    without_renames_or_links();
    as_child(directory_that_is_gone, false);
    another_user();
    small_disk();
    as_child(another_current_directory, false);
    nobody_gets_rights_meanwhile();
    edits_of_what_has_changed();
    as_child(signals_of_writes, false);
    readers_hold_up_no_save();
    saved_files_are_not_locked();
    leftovers_of_killed_saves("leftovers", true, false);
    leftovers_of_killed_saves("leftovers of named files", false, false);
    leftovers_of_killed_saves("leftovers on a shared filesystem", true, true);
    leftovers_of_killed_saves("leftovers of named files on one", false, true);
    printf("manners: %ld, failed: %ld\n", *manners, failures());
    race("unnamed", true, 100);
    race("named", false, 100);
    return failures() == 0 ? 0 : 1;
}
