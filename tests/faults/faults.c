/* Saves in which every system call fails once, in every way that is worth it, until the save succeeds; in some
 * scenarios each call that comes after the failure fails too, one at a time.
 *
 * After each: the call that failed was answered with an error that names the path, or it is one that a save can do
 * without, and the new file is complete; the target holds the old file, or, where the error says so, the new one,
 * whole; nothing stands beside it; no descriptor is left open; and the next save works. At the end: every system call
 * that saves make was among those that failed. Run with a directory; ends in "N faults, N failed". */
#include <errno.h>
#include <fcntl.h>
#include <safetensors_torch.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common.h"
#include "inject.h"
#include "scenarios.h"

/* So many faults has the shortest of the scenarios, at the least. */
enum { LEAST = 48 };

static long faults, wrong;
static char directory[3000];

static void expect(bool holds, const char* what, const char* scenario, long call, int error) {
    if (holds) return;
    wrong++;
    const char *name = inject_failed(), *again = inject_failed_again();
    printf("%s, call %ld (%s%s%s, %s): %s; %s\n", scenario, call, name == NULL ? "none" : name,
           again == NULL ? "" : ", then ", again == NULL ? "" : again, strerror(error), what,
           sft_last_error_get_message());
}

/* Descriptors that are open. The one with which they are counted is among them each time. A thread may have to close a
 * large file yet. */
static bool are_open(int descriptors) {
    for (int tries = 0; entries("/proc/self/fd") != descriptors; tries++) {
        if (tries == 5000) return false;
        usleep(2000);
    }
    return true;
}

/* The calls of which one at least must have failed in each kind of scenario. */
static const struct {
    const char* name;
    const char* calls;
} kinds[KINDS] = {
    [FILES] = {"files",
               "close, close of a duplicate, copy_file_range, fallocate, fchmod, fchown, fcntl, fdatasync, fdopendir, "
               "fgetxattr, flock, fremovexattr, fsetxattr, fstatfs, fsync, ftruncate, getxattr, linkat, look at a "
               "hidden name, look at a name, lseek, open, open a directory, open to list, open unnamed, "
               "pthread_create, read, readdir, rename, rename to a hidden name, sendfile, statx of /proc, statx of a "
               "file, statx of a mapping, sync_file_range, unlink of a hidden name, write, writev"},
    [CHECKPOINTS] =
        {"checkpoints",
         "close, close of a duplicate, fallocate, fcntl, fdopendir, fgetxattr, flock, fsync, getxattr, "
         "linkat, look at a hidden name, look at a name, mkdir, open, open a directory, open to list, open unnamed, "
         "readdir, rename, rename to a hidden name, rmdir, statx of /proc, statx of a file, sync_file_range, unlink, "
         "unlink of a hidden name, unlink of the lock, writev"},
    [INCREMENTAL_WRITERS] =
        {"incremental writers",
         "close, close of a duplicate, fallocate, fchmod, fcntl, fdopendir, fgetxattr, flock, fsync, getxattr, "
         "linkat, look at a name, open, open a directory, open to list, open unnamed, pwrite, readdir, rename, "
         "statx of "
         "/proc, statx of a file, unlink of a hidden name"},
    [EDITS] = {"edits",
               "close, close of a duplicate, copy_file_range, fallocate, fchmod, fcntl, fgetxattr, flock, "
               "fsync, getxattr, linkat, look at a name, open, open a directory, open unnamed, pread, pwrite, rename, "
               "statx of /proc, statx of a file, unlink of a hidden name, write, writev"},
};

/* The calls that failed, of each kind. */
static const char* seen[KINDS][64];

static void note_failed(const scenario* what, const char* name) {
    const char** names = seen[kind_of(what)];
    size_t i = 0;
    while (names[i] != NULL && strcmp(names[i], name) != 0) i++;
    names[i] = name;
}

static void expect_all_failed(void) {
    for (int kind = 0; kind < KINDS; kind++) {
        size_t count = 0;
        while (seen[kind][count] != NULL) count++;
        char wanted[1000], *rest = NULL;
        snprintf(wanted, sizeof wanted, "%s", kinds[kind].calls);
        for (char* name = strtok_r(wanted, ",", &rest); name != NULL; name = strtok_r(NULL, ",", &rest)) {
            name += strspn(name, " ");
            size_t i = 0;
            while (i < count && strcmp(seen[kind][i], name) != 0) i++;
            /* Nobody but root can leave a file to somebody else; some filesystems have no access control lists. */
            if (i < count || (strcmp(name, "fchown") == 0 && geteuid() != 0)) continue;
            if ((strcmp(name, "fsetxattr") == 0 || strcmp(name, "fremovexattr") == 0) && !has_lists()) continue;
            wrong++;
            printf("%s: %s never failed\n", kinds[kind].name, name);
        }
        printf("%s: %zu different calls failed\n", kinds[kind].name, count);
    }
}

/* Calls that a save can do without: they look for a better way, or clean up. What else comes of them is seen
 * afterwards: permissions, owner, and how many files there are. */
static bool may_succeed(const scenario* what, const char* name, int error) {
    static const char* const harmless[] = {"close",
                                           "flock",
                                           "fstatfs",
                                           "linkat",
                                           "open unnamed",
                                           "open to list",
                                           "fdopendir",
                                           "readdir",
                                           "pthread_create",
                                           "statx of /proc",
                                           "statx of a file",
                                           "look at a hidden name",
                                           "statx of a mapping",
                                           "unlink of a hidden name",
                                           "unlink of the lock"};
    if (name == NULL || error == EINTR) return true;
    /* The space may be that of a large file that is being closed, so that it is asked for twice. */
    if (what->large && strcmp(name, "fallocate") == 0) return error == ENOSPC || error == EDQUOT;
    /* Without leave to ask for the list, the file gets the narrower permissions; and a lock that may not be opened is
     * tried again, as its owner may be about to open it to others. */
    if (error == EACCES && strcmp(name, "getxattr") == 0) return true;
    if (error == EACCES && what->new_shard != 0 && strcmp(name, "open") == 0) return true;
    for (size_t i = 0; i < sizeof harmless / sizeof *harmless; i++) {
        if (strcmp(name, harmless[i]) == 0) return true;
    }
    return false;
}

/* Whether something may be left that could not be removed: the error of a failed unlink has nobody to go to. */
static bool cannot_remove(void) {
    const char* names[] = {inject_failed(), inject_failed_again()};
    for (int i = 0; i < 2; i++) {
        if (names[i] != NULL && (strncmp(names[i], "unlink", 6) == 0 || strcmp(names[i], "rmdir") == 0)) return true;
    }
    return false;
}

/* Whether the file that an error says is complete is that. */
static bool is_complete(const char* said) {
    const char* path = strstr(said, "complete at ");
    char copy[4096];
    if (path == NULL) return false;
    snprintf(copy, sizeof copy, "%s", path + strlen("complete at "));
    copy[strcspn(copy, ";,)\n")] = '\0';
    /* It has a name that no later save takes for a stray, or the error says how long there is. */
    return (strstr(copy, ".whole") != NULL || strstr(said, "copy it from there now") != NULL) && value_of(copy) == 2;
}

/* Whether what an error leaves is the old file, or another thing that it tells of, and that can be. */
static bool is_whole(const scenario* what, const char* said, unsigned char value) {
    if (what->exists ? value == 1 : value == 0 && (access(path_of("target"), F_OK) != 0 || cannot_remove()))
        return true;
    /* To take back what was done failed too: it says so, or nothing was there that could have been lost. */
    if (inject_failed_again() != NULL && strcmp(inject_failed_again(), "unlink") == 0 && !what->exists) return true;
    if (inject_failed_again() != NULL && strstr(said, "be restored") != NULL) return true;
    if (!inject_had_changed()) return false;
    /* Once the target has been replaced, or is half overwritten, and there is a whole copy. */
    if (is_complete(said)) return true;
    if (value == 2) return strstr(said, "in place") != NULL || strstr(said, "the new checkpoint is complete") != NULL;
    /* An old shard was replaced, and no reader takes what is left for a checkpoint. */
    return what->new_shard != 0 && strstr(said, "is not complete") != NULL;
}

static bool is_getxattr(const char* name) { return name != NULL && strcmp(name, "getxattr") == 0; }

/* One save in which call number `call` fails, and with `after` the one that comes so many later. Gives how many calls
 * it made. */
static long run_one(const scenario* what, long call, fault kind, int error, long after) {
    prepare(what);
    const int before = entries(path_of("")), open_before = entries("/proc/self/fd");
    for (size_t i = 0; i < 3 && what->missing[i].name != NULL; i++) {
        inject_always(what->missing[i].name, what->missing[i].error);
    }
    inject_arm(call, kind, error, after);
    const sft_status status = run_save(what);
    const long calls = inject_disarm();
    inject_always(NULL, 0);
    char said[4096];
    snprintf(said, sizeof said, "%s", status == SFT_OK ? "" : sft_last_error_get_message());
    const char *name = inject_failed(), *again = inject_failed_again();
    if (name != NULL) note_failed(what, name);
    if (again != NULL) note_failed(what, again);
    faults += (name != NULL) + (again != NULL);

    const unsigned char value = value_of(path_of("target"));
    if (status == SFT_OK) {
        expect(value == 2, "success, but the new file is not there", what->name, call, error);
        const bool unknown = error == EACCES && (is_getxattr(name) || is_getxattr(again));
        expect(what->new_shard != 0 || is_as_it_was(what, unknown), "another owner or mode", what->name, call, error);
        expect((may_succeed(what, name, error) || kind == FAULT_SHORT) && may_succeed(what, again, error), "success",
               what->name, call, error);
    } else {
        expect(name != NULL, "nothing failed", what->name, call, error);
        expect(strstr(said, directory) != NULL, said, what->name, call, error);
        expect(sft_last_error_get_os_error() == error || strstr(said, strerror(error)) != NULL, said, what->name, call,
               error);
        expect(is_whole(what, said, value), "neither the old file nor what the error says", what->name, call, error);
    }
    const bool complete = strstr(said, "complete at") != NULL;
    expect(!complete || what->new_shard != 0 || is_complete(said), said, what->name, call, error);
    const bool excused =
        cannot_remove() || complete || strstr(said, "were kept") != NULL || strstr(said, "be restored") != NULL;
    const int after_it = entries(path_of(""));
    expect(excused || after_it == (value == 2 ? 1 : before), "something is left", what->name, call, error);
    if (what->new_shard != 0 && !excused && value != 0) {
        const int files = entries(path_of("target"));
        const int new_files = files_of(what->new_shard), old_files = files_of(what->old_shard);
        /* After an error once the new one is there, files of the old one may be too. */
        expect(value == 1 ? files == old_files : files == new_files || status != SFT_OK,
               "files are left in the directory", what->name, call, error);
        expect(leftovers(path_of("target")) == 0, "something hidden is left in the directory", what->name, call, error);
    }
    expect(are_open(open_before), "a descriptor is open", what->name, call, error);
    expect(run_save(what) == SFT_OK && value_of(path_of("target")) == 2, "the next save fails", what->name, call,
           error);
    return calls;
}

static void run(const scenario* what) {
    static const int errors[] = {EIO, ENOSPC, EINTR, EACCES, EDQUOT};
    const long before = faults;
    long most = 0;
    for (size_t i = 0; i <= sizeof errors / sizeof *errors; i++) {
        const fault kind = i == 0 ? FAULT_SHORT : FAULT_ERROR;
        const int error = i == 0 ? 0 : errors[i - 1];
        for (long call = 1;; call++) {
            const long calls = run_one(what, call, kind, error, 0);
            if (inject_failed() == NULL) {
                most = calls > most ? calls : most;
                break;
            }
        }
    }
    const long once = faults - before;
    expect(once >= LEAST, "too few faults", what->name, 0, 0);
    for (long call = 1; what->twice && call <= most; call++) {
        long after = 0;
        do run_one(what, call, FAULT_ERROR, EIO, ++after);
        while (inject_failed_again() != NULL);
    }
    printf("%s: %ld faults, %ld more after others, %ld calls in a save\n", what->name, once, faults - before - once,
           most);
}

int main(int count, char** arguments) {
    if (count != 2) return 2;
    snprintf(directory, sizeof directory, "%s", arguments[1]);
    scenarios_begin(directory);
    for (const scenario* what = scenarios; what->name != NULL; what++) run(what);
    scenarios_end();
    expect_all_failed();
    printf("%ld faults, %ld failed\n", faults, wrong);
    return wrong == 0 ? 0 : 1;
}
