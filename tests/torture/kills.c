/* Saves that are killed: at any moment, just when a commit has begun, and between any two system calls.
 *
 * A child saves two contents, a large one and a tiny one, in turn to one file, at once or incrementally, or to one
 * checkpoint; or it changes the metadata of a file. After each kill the file must be one of those that it can be,
 * whole; the checkpoint too, or have no index, with the error that says so; a file that had to be overwritten in place
 * may be torn, with a whole one beside it; and the next child's saves must work. The system calls of the library come
 * by here, so that the child can tell when its commit begins, and end itself at a call that is chosen. Run with a
 * directory and a number of kills. */
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "common.h"

/* What parent and child share. */
typedef struct shared {
    atomic_long saves;   /* that the child has made */
    atomic_int commits;  /* whether a commit has begun, since the parent last looked */
    atomic_long mortal;  /* the call, counted from the first of a save, at which the child ends itself; 0 for none */
    atomic_long longest; /* how many calls a save has */
} shared;

static shared* common;
static _Thread_local bool counted;
static long calls;
static bool no_unnamed; /* a filesystem without O_TMPFILE */
static bool no_rename;  /* a target that cannot be renamed over */
static bool pwrites;    /* a commit is one pwrite */
static long ahead;      /* what the filesystem's clock is ahead by, in seconds, for open files */

/* A call of the library: before it, and after it, is a moment to die. */
static void moment(void) {
    if (!counted) return;
    calls++;
    if (calls > atomic_load(&common->longest)) atomic_store(&common->longest, calls);
    if (calls == atomic_load(&common->mortal)) raise(SIGKILL);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define BETWEEN_MOMENTS(type, call) \
    do {                            \
        moment();                   \
        const type result = (call); \
        const int error = errno;    \
        moment();                   \
        errno = error;              \
        return result;              \
    } while (0)

int openat(int directory, const char* path, int flags, ...) {
    va_list arguments;
    va_start(arguments, flags);
    const mode_t mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(arguments, mode_t) : 0;
    va_end(arguments);
    if (no_unnamed && (flags & O_TMPFILE) == O_TMPFILE) {
        errno = EOPNOTSUPP;
        return -1;
    }
    BETWEEN_MOMENTS(int, REAL(openat)(directory, path, flags, mode));
}
ssize_t writev(int file, const struct iovec* pieces, int count) {
    BETWEEN_MOMENTS(ssize_t, REAL(writev)(file, pieces, count));
}
ssize_t write(int file, const void* bytes, size_t count) { BETWEEN_MOMENTS(ssize_t, REAL(write)(file, bytes, count)); }
ssize_t pwrite64(int file, const void* bytes, size_t count, off_t offset) {
    if (counted && pwrites) atomic_store(&common->commits, 1);
    BETWEEN_MOMENTS(ssize_t, REAL(pwrite64)(file, bytes, count, offset));
}
ssize_t copy_file_range(int in, off_t* in_offset, int out, off_t* out_offset, size_t count, unsigned flags) {
    /* A file that is overwritten gets its bytes in several calls. */
    if (no_rename && count > 1 << 20) count = 1 << 20;
    BETWEEN_MOMENTS(ssize_t, REAL(copy_file_range)(in, in_offset, out, out_offset, count, flags));
}
int ftruncate64(int file, off_t length) { BETWEEN_MOMENTS(int, REAL(ftruncate64)(file, length)); }
int linkat(int a, const char* from, int b, const char* to, int flags) {
    BETWEEN_MOMENTS(int, REAL(linkat)(a, from, b, to, flags));
}
int renameat(int from_directory, const char* from, int to_directory, const char* to) {
    if (counted && no_rename && strncmp(to, ".safetensors-", 13) != 0) {
        errno = EXDEV;
        return -1;
    }
    BETWEEN_MOMENTS(int, REAL(renameat)(from_directory, from, to_directory, to));
}
int statx(int directory, const char* restrict path, int flags, unsigned mask, struct statx* restrict told) {
    const int result = REAL(statx)(directory, path, flags, mask, told);
    /* What is opened only to be looked at shows when it changed; a new file shows the time. */
    const bool is_looked_at = (flags & AT_EMPTY_PATH) != 0 && (REAL(fcntl)(directory, F_GETFL) & O_PATH) != 0;
    if (result == 0 && (flags & AT_EMPTY_PATH) != 0 && !is_looked_at) told->stx_ctime.tv_sec += ahead;
    return result;
}
int unlinkat(int directory, const char* path, int flags) {
    BETWEEN_MOMENTS(int, REAL(unlinkat)(directory, path, flags));
}
int fchmod(int file, mode_t mode) { BETWEEN_MOMENTS(int, REAL(fchmod)(file, mode)); }
int fallocate(int file, int mode, off_t offset, off_t length) {
    BETWEEN_MOMENTS(int, REAL(fallocate)(file, mode, offset, length));
}
int fcntl(int file, int command, ...) {
    va_list arguments;
    va_start(arguments, command);
    void* argument = va_arg(arguments, void*);
    va_end(arguments);
    /* The commit begins with this one. */
    if (counted && command == F_DUPFD_CLOEXEC) {
        atomic_store(&common->commits, 1);
        BETWEEN_MOMENTS(int, REAL(fcntl)(file, command, argument));
    }
    return REAL(fcntl)(file, command, argument);
}

/* A kind of target: what is saved, and how it is looked at. */
typedef struct target {
    const char* name;
    bool unnamed;
    sft_status (*save)(const content* what, const char* path);
    uint64_t (*version)(const char* path);
    bool (*may_be_absent)(const char* path);
    const char* (*directory)(const char* path);
} target;

static sft_status save_file(const content* what, const char* path) {
    sft_writer* writer = content_writer(what);
    const sft_status status = sft_writer_write_file(writer, path, NULL);
    sft_writer_free(writer);
    return status;
}
static uint64_t version_of_file(const char* path) { return file_version(path, SFT_BACKEND_MMAP); }
static bool never(const char* path) {
    (void)path;
    return false;
}
static const char* directory_of_file(const char* path) {
    (void)path;
    return path_of("file");
}

/* The last tensor first. */
static sft_status save_incrementally(const content* what, const char* path) {
    return content_write_incrementally(what, path, NULL);
}

/* Where a file cannot be renamed over, it may be torn, if the new one is whole beside it; it is put in its place then.
 */
static long recovered;
static uint64_t version_of_overwritten(const char* path) {
    const uint64_t version = version_of_file(path);
    if (version != 0 && version != WRONG) return version;
    DIR* opened = opendir(directory_of_file(path));
    if (opened == NULL) return WRONG;
    uint64_t beside = WRONG;
    for (const struct dirent* entry; beside == WRONG && (entry = readdir(opened)) != NULL;) {
        const size_t length = strlen(entry->d_name);
        if (length < 6 || strcmp(entry->d_name + length - 6, ".whole") != 0) continue;
        char whole[4400];
        snprintf(whole, sizeof whole, "%s/%s", directory_of_file(path), entry->d_name);
        beside = version_of_file(whole);
        if (rename(whole, path) != 0) abort();
        recovered++;
    }
    closedir(opened);
    return beside;
}

/* The tensors stay what they are; the metadata have the version, and digits that depend on it, as many each time, so
 * that there is room. */
enum { EDITED_WORDS = 50000, DIGITS = 1000 };
static void write_digits(uint64_t version, char digits[DIGITS + 1]) {
    snprintf(digits, DIGITS + 1, "%020llu", (unsigned long long)version);
    uint64_t state = version;
    for (size_t i = 20; i < DIGITS; i++) digits[i] = (char)('0' + random_below(&state, 10));
    digits[DIGITS] = '\0';
}
static sft_status edit(const content* what, const char* path, bool in_place) {
    if (access(path, F_OK) != 0) {
        content first = content_new(1, 6, EDITED_WORDS);
        const sft_status saved = save_file(&first, path);
        content_free(&first);
        if (saved != SFT_OK) return saved;
        in_place = false;
    }
    char digits[DIGITS + 1];
    write_digits(what->version, digits);
    const sft_metadata_change change = {{"version", 7}, {digits, DIGITS}};
    sft_edit_options options = SFT_EDIT_OPTIONS_INIT;
    options.in_place = in_place;
    return sft_edit_metadata(path, &change, 1, &options);
}
static sft_status edit_by_rewrite(const content* what, const char* path) { return edit(what, path, false); }
static sft_status edit_in_place(const content* what, const char* path) { return edit(what, path, true); }
static uint64_t version_of_metadata(const char* path) {
    if (version_of_file(path) != 1) return WRONG;
    sft_file* file = NULL;
    if (sft_file_open(path, NULL, &file) != SFT_OK) return 0;
    sft_str text = {NULL, 0};
    uint64_t version = WRONG;
    if (sft_file_find_metadata(file, "version", 7, &text) == SFT_OK && text.length == DIGITS) {
        char first[21] = "", digits[DIGITS + 1];
        memcpy(first, text.data, 20);
        version = strtoull(first, NULL, 10);
        write_digits(version, digits);
        if (memcmp(text.data, digits, DIGITS) != 0) version = WRONG;
    }
    sft_file_free(file);
    return version;
}

/* Large ones have several files, tiny ones one or two; the names of both overlap. */
static sft_status save_checkpoint(const content* what, const char* path) {
    sft_writer* writer = content_writer(what);
    uint64_t nbytes = 0;
    sft_writer_get_size(writer, NULL, &nbytes);
    sft_sharded_options options = SFT_SHARDED_OPTIONS_INIT;
    options.max_shard_size = nbytes > 1000000 ? nbytes / 3 + 4096 : nbytes % 16 == 0 ? nbytes : nbytes / 2 + 24;
    const sft_status status = sft_writer_write_sharded(writer, path, &options);
    sft_writer_free(writer);
    return status;
}

/* No index, and an error that speaks of it. */
static bool has_no_index(const char* path) {
    char index[4200];
    snprintf(index, sizeof index, "%s/model.safetensors.index.json", path);
    const char* said = sft_last_error_get_message();
    return access(index, F_OK) != 0 && errno == ENOENT && strstr(said, path) != NULL && strstr(said, "index") != NULL;
}
static const char* itself(const char* path) { return path; }

static const target targets[] = {
    {"file", true, save_file, version_of_file, never, directory_of_file},
    {"checkpoint", true, save_checkpoint, checkpoint_version, has_no_index, itself},
    {"incremental writer", true, save_incrementally, version_of_file, never, directory_of_file},
    {"file edited by a rewrite", true, edit_by_rewrite, version_of_metadata, never, directory_of_file},
    {"file edited in place", true, edit_in_place, version_of_metadata, never, directory_of_file},
    {"file that is overwritten", true, save_file, version_of_overwritten, never, directory_of_file},
    {"file without unnamed files", false, save_file, version_of_file, never, directory_of_file},
    {"checkpoint without unnamed files", false, save_checkpoint, checkpoint_version, has_no_index, itself},
    {"incremental writer without unnamed files", false, save_incrementally, version_of_file, never, directory_of_file},
};

/* Saves for ever; the contents are those of this number. */
static void child(const target* what, const char* path, const content* both, pid_t parent) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(1);
    counted = true;
    for (size_t i = 0;; i++) {
        calls = 0;
        if (what->save(&both[i % 2], path) != SFT_OK) {
            fprintf(stderr, "a save failed: %s\n", sft_last_error_get_message());
            _exit(2);
        }
        atomic_fetch_add(&common->saves, 1);
    }
}

static void sleep_for(uint64_t nanoseconds) {
    const struct timespec time = {(time_t)(nanoseconds / 1000000000), (long)(nanoseconds % 1000000000)};
    nanosleep(&time, NULL);
}

static void wait_for_saves(long count) {
    const double until = seconds() + 60;
    siginfo_t ended = {0};
    while (atomic_load(&common->saves) < count && seconds() < until) {
        if (waitid(P_ALL, 0, &ended, WEXITED | WNOHANG | WNOWAIT) == 0 && ended.si_pid != 0) return;
        sleep_for(50000);
    }
}

static void remove_leftovers(const char* directory) {
    DIR* opened = opendir(directory);
    if (opened == NULL) return;
    for (const struct dirent* entry; (entry = readdir(opened)) != NULL;) {
        if (strncmp(entry->d_name, ".safetensors-", 13) == 0) unlinkat(dirfd(opened), entry->d_name, 0);
    }
    closedir(opened);
}

static void run(const target* what, long kills) {
    char path[4096];
    snprintf(path, sizeof path, "%s", path_of(what->directory == itself ? "checkpoint" : "file/model.safetensors"));
    no_unnamed = !what->unnamed;
    no_rename = what->version == version_of_overwritten;
    pwrites = what->save == edit_in_place;
    remove_all(what->directory(path));
    if (mkdir(what->directory(path), 0777) != 0) abort();
    uint64_t state = 20, before = 1;
    const content first = content_new(1, 6, 1000);
    EXPECT(what->save(&first, path) == SFT_OK, "%s", sft_last_error_get_message());
    long whole = 0, absent = 0, left = 0, in_save = 0, at_commit = 0, at_call = 0;
    for (long kill_number = 1; kill_number <= kills; kill_number++) {
        const size_t words = (3 + random_below(&state, 28)) * 131072 / 6;
        content both[] = {content_new((uint64_t)kill_number * 2, 6, words),
                          content_new((uint64_t)kill_number * 2 + 1, 6, 3 + random_below(&state, 40))};
        *common = (shared){0};
        const unsigned how = (unsigned)(kill_number % 3);
        fflush(stdout);
        const pid_t parent = getpid(), pid = fork();
        if (pid < 0) abort();
        if (pid == 0) child(what, path, both, parent);
        if (how == 0) {
            /* Anywhere, the first save included: it is the one that replaces what another process left. */
            const double begun = seconds();
            wait_for_saves(random_below(&state, 2) == 0 ? 0 : 2);
            const double each = atomic_load(&common->saves) == 0 ? 0.03 : (seconds() - begun) / 2;
            sleep_for(random_below(&state, (uint64_t)(each * 2e9) + 1));
            in_save++;
        } else if (how == 1) {
            /* When a commit has begun, and a little later. */
            wait_for_saves((long)random_below(&state, 3));
            atomic_store(&common->commits, 0);
            const double until = seconds() + 60;
            while (atomic_load(&common->commits) == 0 && seconds() < until) sched_yield();
            const uint64_t later = random_below(&state, 300000);
            for (const double from = seconds(); seconds() - from < (double)later * 1e-9;) {
            }
            at_commit++;
        } else {
            /* At a call, which the child counts; the first two saves say how many there are. */
            wait_for_saves(2);
            atomic_store(&common->mortal, 1 + (long)random_below(&state, (uint64_t)atomic_load(&common->longest)));
            /* Where only the first save had so many, nobody dies; the kill below ends it then. */
            wait_for_saves(atomic_load(&common->saves) + 4);
            at_call++;
        }
        int status = 0;
        kill(pid, SIGKILL);
        if (waitpid(pid, &status, 0) != pid) abort();
        EXPECT(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "%s: the child ended by itself: %d", what->name,
               status);

        const uint64_t version = what->version(path);
        if (version == 0 && what->may_be_absent(path)) {
            absent++;
        } else if (EXPECT(version != 0 && (version == before || version / 2 == (uint64_t)kill_number),
                          "%s, kill %ld: version %llu after %llu; %s", what->name, kill_number,
                          (unsigned long long)version, (unsigned long long)before, sft_last_error_get_message())) {
            whole++;
        }
        before = version;
        const int count = leftovers(what->directory(path));
        /* The moment between two names: of a file, and of the index. Without unnamed files, all that was begun. */
        EXPECT(count <= (what->unnamed ? 2 : 5), "%s, kill %ld: %d leftovers", what->name, kill_number, count);
        left += count;
        remove_leftovers(what->directory(path));
        content_free(&both[0]);
        content_free(&both[1]);
    }
    content last = first;
    EXPECT(what->save(&last, path) == SFT_OK && what->version(path) == 1, "%s", sft_last_error_get_message());
    content_free(&last);
    printf(
        "kills of a %s: %ld (%ld anywhere, %ld in the commit, %ld between calls), whole: %ld, no index: %ld, "
        "overwritten in part: %ld, leftovers: %ld\n",
        what->name, kills, in_save, at_commit, at_call, whole, absent, recovered, left);
    recovered = 0;
}

/* What kills have left, a save removes that comes an hour later, whatever process makes it. */
static void the_next_save_removes_leftovers(const target* what) {
    enum { WANTED = 5, TRIES = 200, SOON = 50 * 60, LATE = 70 * 60 };
    char path[4096];
    snprintf(path, sizeof path, "%s", path_of("file/model.safetensors"));
    no_unnamed = true;
    no_rename = pwrites = false;
    remove_all(what->directory(path));
    if (mkdir(what->directory(path), 0777) != 0) abort();
    content both[] = {content_new(2, 6, 131072), content_new(3, 6, 131072)};
    for (int i = 0; i < TRIES && leftovers(what->directory(path)) < WANTED; i++) {
        *common = (shared){0};
        fflush(stdout);
        const pid_t parent = getpid(), pid = fork();
        if (pid < 0) abort();
        if (pid == 0) child(what, path, both, parent);
        wait_for_saves(1);
        kill(pid, SIGKILL);
        if (waitpid(pid, NULL, 0) != pid) abort();
    }
    const int left = leftovers(what->directory(path));
    EXPECT(left >= WANTED, "%d leftovers to be removed", left);
    ahead = SOON;
    EXPECT(what->save(&both[0], path) == SFT_OK && leftovers(what->directory(path)) == left, "too early");
    ahead = LATE;
    EXPECT(what->save(&both[0], path) == SFT_OK && what->version(path) == 2, "%s", sft_last_error_get_message());
    ahead = 0;
    const int still = leftovers(what->directory(path));
    EXPECT(still == 0, "%d leftovers stay", still);
    printf("leftovers that a save an hour later removes: %d of %d\n", left - still, left);
    content_free(&both[0]);
    content_free(&both[1]);
}

int main(int count, char** arguments) {
    if (count != 3) return 2;
    use_directory(arguments[1]);
    common = mmap(NULL, sizeof *common, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (common == MAP_FAILED) return 2;
    const long kills = atol(arguments[2]);
    for (size_t i = 0; i < sizeof targets / sizeof *targets; i++) {
        run(&targets[i], targets[i].unnamed ? kills : (kills + 4) / 5);
    }
    the_next_save_removes_leftovers(&targets[0]);
    return failures() == 0 ? 0 : 1;
}
