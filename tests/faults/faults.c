/* Saves in which every system call fails once, in every way that is worth it, until the save succeeds; in some
 * scenarios each call that comes after the failure fails too, one at a time.
 *
 * After each: the call that failed was answered with an error that names the path, or it is one that a save can do
 * without, and the new file is complete; the target holds the old file, or, where the error says so, the new one,
 * whole; nothing stands beside it; no descriptor is left open; and the next save works. At the end: every system call
 * that saves make was among those that failed. Run with a folder; ends in "N faults, N failed". */
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

/* Of each tensor; and of one in a file that is large enough to be closed by another thread. */
enum { BYTES = 100000, LARGE = 16 << 20 };

/* The owner of a file that another user left; only root can make one. */
enum { STRANGER = 12345 };

/* So many faults has the shortest of the scenarios, at the least. */
enum { LEAST = 48 };

static long faults, wrong;
static char folder[3000];

static void expect(bool holds, const char* what, const char* scenario, long call, int error) {
    if (holds) return;
    wrong++;
    const char *name = inject_failed(), *again = inject_failed_again();
    printf("%s, call %ld (%s%s%s, %s): %s; %s\n", scenario, call, name == NULL ? "none" : name,
           again == NULL ? "" : ", then ", again == NULL ? "" : again, strerror(error), what, sft_last_error_message());
}

/* Descriptors that are open. The one with which they are counted is among them each time. A thread may have to close a
 * large file yet. */
static bool are_open(int descriptors) {
    for (int tries = 0; entries("/proc/self/fd") != descriptors; tries++) {
        if (tries == 500) return false;
        usleep(2000);
    }
    return true;
}

/* A writer of three tensors of these bytes each. */
static sft_writer* writer_of(const unsigned char* bytes) {
    static const uint64_t shape[] = {BYTES};
    sft_writer* writer = NULL;
    if (sft_writer_new(&writer) != SFT_OK) abort();
    for (const char* name = "abc"; *name != '\0'; name++) {
        if (sft_writer_add_tensor(writer, name, 1, SFT_DTYPE_U8, shape, 1, bytes, BYTES) != SFT_OK) abort();
    }
    /* Room for an edit in place. */
    if (sft_writer_add_metadata(writer, "room", 4, "for a longer value", 18) != SFT_OK) abort();
    return writer;
}

/* The byte that all tensors of the checkpoint at `path` are full of, or 2 if its metadata were edited; 0 if they are
 * not, or if it cannot be read. */
static unsigned char value_of(const char* path) {
    static unsigned char bytes[BYTES];
    sft_checkpoint* checkpoint = NULL;
    if (sft_checkpoint_open(path, NULL, &checkpoint) != SFT_OK) return 0;
    unsigned char value = 0;
    bool same = true;
    for (const char* name = "abc"; *name != '\0'; name++) {
        size_t shard = 0, index = 0;
        const sft_file* file = NULL;
        sft_str ignored;
        same = same && sft_checkpoint_find(checkpoint, name, 1, &shard, &index) == SFT_OK &&
               sft_checkpoint_shard(checkpoint, shard, &ignored, &file) == SFT_OK &&
               sft_file_read(file, index, bytes, BYTES) == SFT_OK;
        value = value == 0 ? bytes[0] : value;
        for (size_t i = 0; same && i < BYTES; i++) same = bytes[i] == value;
        sft_str edited = {NULL, 0};
        same = same && sft_file_metadata_get(file, "edited", 6, &edited) == SFT_OK;
        value = edited.data != NULL ? 2 : value;
        if (edited.data != NULL && same) break;
    }
    sft_checkpoint_free(checkpoint);
    return same ? value : 0;
}

/* A call that a filesystem lacks, and what it says then. */
typedef struct lack {
    const char* name;
    int error;
} lack;

/* A way to save: what is there before, and how it is written. */
typedef struct scenario {
    const char* name;
    bool exists;                        /* whether an old file, or checkpoint, is there */
    bool sync;                          /* whether the new one is to be on the disk */
    bool stranger;                      /* whether the old file is another user's */
    bool large;                         /* whether it is a large one */
    bool twice;                         /* whether what comes after a failure fails too */
    lack missing[3];                    /* calls that this filesystem lacks */
    uint64_t old_shard, new_shard;      /* for a checkpoint: the bytes of a file; 0 for a single file by itself */
    enum { AT_ONCE, STREAM, EDIT } how; /* all tensors at once, one by one, or a change of the metadata */
    sft_edit_mode mode;
} scenario;

/* Kinds of scenarios, and the calls that must have failed in one of each kind at least. */
enum { FILES, CHECKPOINTS, STREAMS, EDITS, KINDS };
static const struct {
    const char* name;
    const char* calls[40];
} kinds[KINDS] = {
    {"files",
     {"close",
      "close of a duplicate",
      "copy_file_range",
      "fallocate",
      "fchmod",
      "fchown",
      "fcntl",
      "flock",
      "fstatfs",
      "fsync",
      "ftruncate",
      "linkat",
      "lseek",
      "open",
      "open to hold",
      "open unnamed",
      "opendir",
      "pthread_create",
      "readdir",
      "readlink",
      "rename",
      "rename to a hidden name",
      "statx",
      "statx of /proc",
      "statx of a file",
      "statx of a hidden name",
      "unlink of a hidden name",
      "writev"}},
    {"checkpoints",
     {"close",
      "close of a duplicate",
      "fallocate",
      "fcntl",
      "flock",
      "fsync",
      "linkat",
      "mkdir",
      "open",
      "open to hold",
      "open unnamed",
      "opendir",
      "readdir",
      "rename",
      "rename to a hidden name",
      "rmdir",
      "statx",
      "statx of /proc",
      "statx of a file",
      "statx of a hidden name",
      "unlink",
      "unlink of a hidden name",
      "writev"}},
    {"streams",
     {"close",
      "close of a duplicate",
      "fallocate",
      "fchmod",
      "fcntl",
      "flock",
      "fsync",
      "linkat",
      "open",
      "open to hold",
      "open unnamed",
      "opendir",
      "pwrite",
      "readdir",
      "readlink",
      "rename",
      "statx",
      "statx of /proc",
      "statx of a file",
      "unlink of a hidden name"}},
    {"edits", {"close",           "close of a duplicate",
               "copy_file_range", "fallocate",
               "fchmod",          "fcntl",
               "flock",           "fsync",
               "linkat",          "open",
               "open to hold",    "open unnamed",
               "pread",           "pwrite",
               "readlink",        "rename",
               "statx",           "statx of /proc",
               "statx of a file", "unlink of a hidden name",
               "write",           "writev"}},
};

static int kind_of(const scenario* what) {
    return what->how == EDIT ? EDITS : what->how == STREAM ? STREAMS : what->new_shard > 0 ? CHECKPOINTS : FILES;
}

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
        for (const char* const* wanted = kinds[kind].calls; *wanted != NULL; wanted++) {
            size_t i = 0;
            while (i < count && strcmp(seen[kind][i], *wanted) != 0) i++;
            /* Nobody but root can leave a file to somebody else. */
            if (i < count || (strcmp(*wanted, "fchown") == 0 && geteuid() != 0)) continue;
            wrong++;
            printf("%s: %s never failed\n", kinds[kind].name, *wanted);
        }
        printf("%s: %zu different calls failed\n", kinds[kind].name, count);
    }
}

/* Writes the tensors of `writer` through a stream. */
static sft_status stream(const sft_writer* writer, const sft_save_options* options) {
    sft_stream* opened = NULL;
    sft_status status = sft_stream_create(writer, path_of("target"), options, &opened);
    if (status == SFT_OK) status = sft_stream_commit(opened);
    sft_stream_free(opened);
    return status;
}

static sft_status edit(const scenario* what) {
    static const sft_metadata_change changes[] = {{{"room", 4}, {NULL, 0}}, {{"edited", 6}, {"yes", 3}}};
    sft_edit_options options = SFT_EDIT_OPTIONS_INIT;
    options.mode = what->mode;
    options.sync = what->sync;
    return sft_metadata_edit(path_of("target"), changes, 2, &options);
}

static sft_status save(const scenario* what, const sft_writer* writer, uint64_t shard) {
    if (shard == 0) {
        sft_save_options options = SFT_SAVE_OPTIONS_INIT;
        options.sync = what->sync;
        return sft_writer_write_file(writer, path_of("target"), &options);
    }
    sft_sharded_options options = SFT_SHARDED_OPTIONS_INIT;
    options.max_shard_bytes = shard;
    options.sync = what->sync;
    return sft_writer_write_sharded(writer, path_of("target"), &options);
}

/* The save that is tested, over what is there. */
static sft_status save_anew(const scenario* what, const sft_writer* fresh) {
    if (what->how == EDIT) return edit(what);
    if (what->how == AT_ONCE) return save(what, fresh, what->new_shard);
    sft_save_options options = SFT_SAVE_OPTIONS_INIT;
    options.sync = what->sync;
    return stream(fresh, &options);
}

/* What is there before, in a folder that no save has looked through yet. */
static void prepare(const scenario* what, const sft_writer* old) {
    static long number;
    if (number > 0) remove_all(path_of(""));
    char own[3072];
    snprintf(own, sizeof own, "%s/%ld", folder, ++number);
    if (mkdir(own, 0755) != 0) abort();
    use_folder(own);
    if (!what->exists) return;
    if (save(what, old, what->old_shard) != SFT_OK) abort();
    if (what->new_shard != 0) return;
    if (what->stranger && geteuid() == 0 && chown(path_of("target"), STRANGER, STRANGER) != 0) abort();
    if (chmod(path_of("target"), 0640) != 0) abort();
}

/* Whether the file has the owner and the permissions that it is to have. */
static bool is_as_it_was(const scenario* what) {
    struct stat told;
    const mode_t mask = umask(0);
    umask(mask);
    return stat(path_of("target"), &told) == 0 && (told.st_mode & 07777) == (what->exists ? 0640 : 0666 & ~mask) &&
           told.st_uid == (what->stranger && geteuid() == 0 ? STRANGER : geteuid());
}

/* How many files a checkpoint of three tensors has. */
static int files_of(uint64_t shard) { return shard >= 3 * BYTES ? 1 : shard >= 2 * BYTES ? 3 : 4; }

/* Calls that a save can do without: they look for a better way, or clean up. What else comes of them is seen
 * afterwards: permissions, owner, and how many files there are. */
static bool may_succeed(const scenario* what, const char* name, int error) {
    static const char* const harmless[] = {"close",
                                           "flock",
                                           "fstatfs",
                                           "open to hold",
                                           "open unnamed",
                                           "opendir",
                                           "readdir",
                                           "pthread_create",
                                           "statx of /proc",
                                           "statx of a file",
                                           "statx of a hidden name",
                                           "unlink of a hidden name"};
    if (name == NULL || error == EINTR) return true;
    /* The space may be that of a large file that is being closed, so that it is asked for twice. */
    if (what->large && strcmp(name, "fallocate") == 0) return error == ENOSPC || error == EDQUOT;
    /* A checkpoint asks which of its names are taken. */
    if (what->new_shard != 0 && strcmp(name, "statx") == 0) return true;
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
    /* It has a name that no later save takes for a stray. */
    return strstr(copy, ".whole") != NULL && value_of(copy) == 2;
}

/* Whether what an error leaves is the old file, or another thing that it tells of, and that can be. */
static bool is_whole(const scenario* what, const char* said, unsigned char value) {
    if (what->exists ? value == 1 : value == 0 && (access(path_of("target"), F_OK) != 0 || cannot_remove()))
        return true;
    /* To take back what was done failed too. */
    if (inject_failed_again() != NULL && strstr(said, "be restored") != NULL) return true;
    if (!inject_had_changed()) return false;
    /* Once the target has been replaced, or is half overwritten, and there is a whole copy. */
    if (is_complete(said)) return true;
    if (value == 2) return strstr(said, "in place") != NULL || strstr(said, "the new checkpoint is complete") != NULL;
    /* An old shard was replaced, and no reader takes what is left for a checkpoint. */
    return what->new_shard != 0 && strstr(said, "is not complete") != NULL;
}

/* One save in which call number `call` fails, and with `after` the one that comes so many later. Gives how many calls
 * it made. */
static long run_one(const scenario* what, long call, fault kind, int error, long after, const sft_writer* old,
                    const sft_writer* fresh) {
    prepare(what, old);
    const int before = entries(path_of("")), open_before = entries("/proc/self/fd");
    for (size_t i = 0; i < 3 && what->missing[i].name != NULL; i++) {
        inject_always(what->missing[i].name, what->missing[i].error);
    }
    inject_arm(call, kind, error, after);
    const sft_status status = save_anew(what, fresh);
    const long calls = inject_disarm();
    inject_always(NULL, 0);
    char said[4096];
    snprintf(said, sizeof said, "%s", status == SFT_OK ? "" : sft_last_error_message());
    const char *name = inject_failed(), *again = inject_failed_again();
    if (name != NULL) note_failed(what, name);
    if (again != NULL) note_failed(what, again);
    faults += (name != NULL) + (again != NULL);

    const unsigned char value = value_of(path_of("target"));
    if (status == SFT_OK) {
        expect(value == 2, "success, but the new file is not there", what->name, call, error);
        expect(what->new_shard != 0 || is_as_it_was(what), "another owner or mode", what->name, call, error);
        expect((may_succeed(what, name, error) || kind == FAULT_SHORT) && may_succeed(what, again, error), "success",
               what->name, call, error);
    } else {
        expect(name != NULL, "nothing failed", what->name, call, error);
        expect(strstr(said, folder) != NULL, said, what->name, call, error);
        expect(sft_last_os_error() == error || strstr(said, strerror(error)) != NULL, said, what->name, call, error);
        expect(is_whole(what, said, value), "neither the old file nor what the error says", what->name, call, error);
    }
    const bool complete = strstr(said, "complete at") != NULL;
    expect(!complete || is_complete(said), said, what->name, call, error);
    const bool excused =
        cannot_remove() || complete || strstr(said, "are still there") != NULL || strstr(said, "be restored") != NULL;
    const int after_it = entries(path_of(""));
    expect(excused || after_it == (value == 2 ? 1 : before), "something is left", what->name, call, error);
    if (what->new_shard != 0 && !excused && value != 0) {
        const int files = entries(path_of("target"));
        const int new_files = files_of(what->new_shard), old_files = files_of(what->old_shard);
        /* After an error once the new one is there, files of the old one may be too. */
        expect(value == 1 ? files == old_files : files == new_files || status != SFT_OK, "files are left in the folder",
               what->name, call, error);
        expect(strays(path_of("target")) == 0, "something hidden is left in the folder", what->name, call, error);
    }
    expect(are_open(open_before), "a descriptor is open", what->name, call, error);
    expect(save_anew(what, fresh) == SFT_OK && value_of(path_of("target")) == 2, "the next save fails", what->name,
           call, error);
    return calls;
}

static void run(const scenario* what, const sft_writer* old, const sft_writer* fresh) {
    static const int errors[] = {EIO, ENOSPC, EINTR, EACCES, EDQUOT};
    const long before = faults;
    long most = 0;
    for (size_t i = 0; i <= sizeof errors / sizeof *errors; i++) {
        const fault kind = i == 0 ? FAULT_SHORT : FAULT_ERROR;
        const int error = i == 0 ? 0 : errors[i - 1];
        for (long call = 1;; call++) {
            const long calls = run_one(what, call, kind, error, 0, old, fresh);
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
        do run_one(what, call, FAULT_ERROR, EIO, ++after, old, fresh);
        while (inject_failed_again() != NULL);
    }
    printf("%s: %ld faults, %ld more after others, %ld calls in a save\n", what->name, once, faults - before - once,
           most);
}

int main(int count, char** arguments) {
    if (count != 2) return 2;
    snprintf(folder, sizeof folder, "%s", arguments[1]);
    static unsigned char ones[BYTES], twos[BYTES];
    memset(ones, 1, BYTES);
    memset(twos, 2, BYTES);
    sft_writer *old = writer_of(ones), *large = writer_of(ones), *fresh = writer_of(twos);
    static const uint64_t shape[] = {LARGE};
    unsigned char* zeros = calloc(LARGE, 1);
    if (zeros == NULL || sft_writer_add_tensor(large, "large", 5, SFT_DTYPE_U8, shape, 1, zeros, LARGE) != SFT_OK) {
        return 2;
    }
    static const scenario scenarios[] = {
        {.name = "a new file"},
        {.name = "over an old file", .exists = true},
        {.name = "a new file, synchronized", .sync = true},
        {.name = "over an old file, synchronized", .exists = true, .sync = true, .twice = true},
        {.name = "over an old file, no preallocation", .exists = true, .missing = {{"fallocate", EOPNOTSUPP}}},
        {.name = "one that cannot be renamed over",
         .exists = true,
         .sync = true,
         .twice = true,
         .missing = {{"rename", EXDEV}}},
        {.name = "a new checkpoint", .sync = true, .twice = true, .new_shard = 2 * BYTES},
        {.name = "a checkpoint of other names",
         .exists = true,
         .sync = true,
         .old_shard = BYTES,
         .new_shard = 2 * BYTES},
        {.name = "a checkpoint of the same names",
         .exists = true,
         .sync = true,
         .twice = true,
         .old_shard = 2 * BYTES,
         .new_shard = 2 * BYTES},
        {.name = "one file over a checkpoint",
         .exists = true,
         .sync = true,
         .old_shard = BYTES,
         .new_shard = 9 * BYTES},
        {.name = "a checkpoint over one file",
         .exists = true,
         .sync = true,
         .old_shard = 9 * BYTES,
         .new_shard = BYTES},
        {.name = "a stream to a new file", .sync = true, .how = STREAM},
        {.name = "a stream over an old file", .exists = true, .sync = true, .how = STREAM},
        {.name = "an edit in place",
         .exists = true,
         .sync = true,
         .twice = true,
         .how = EDIT,
         .mode = SFT_EDIT_IN_PLACE},
        {.name = "an edit anew", .exists = true, .sync = true, .how = EDIT, .mode = SFT_EDIT_REWRITE},
        {.name = "an edit anew, copied by hand",
         .exists = true,
         .sync = true,
         .missing = {{"copy_file_range", EXDEV}},
         .how = EDIT,
         .mode = SFT_EDIT_REWRITE},
        {.name = "over another's file", .exists = true, .sync = true, .stranger = true},
        {.name = "over a large file", .exists = true, .large = true},
        {.name = "a new file, no unnamed files", .sync = true, .missing = {{"open unnamed", EOPNOTSUPP}}},
        {.name = "over an old file, no unnamed files",
         .exists = true,
         .sync = true,
         .twice = true,
         .missing = {{"open unnamed", EOPNOTSUPP}}},
        {.name = "a checkpoint, no unnamed files",
         .exists = true,
         .sync = true,
         .missing = {{"open unnamed", EOPNOTSUPP}},
         .old_shard = BYTES,
         .new_shard = BYTES},
        {.name = "a stream, no unnamed files",
         .exists = true,
         .sync = true,
         .twice = true,
         .missing = {{"open unnamed", EOPNOTSUPP}},
         .how = STREAM},
        {.name = "an edit anew, no unnamed files",
         .exists = true,
         .sync = true,
         .twice = true,
         .missing = {{"open unnamed", EOPNOTSUPP}},
         .how = EDIT,
         .mode = SFT_EDIT_REWRITE},
        {.name = "one that cannot be renamed over, nor copied to by the kernel",
         .exists = true,
         .sync = true,
         .missing = {{"rename", EXDEV}, {"copy_file_range", EINVAL}}},
        {.name = "one that has to be copied to by hand",
         .exists = true,
         .sync = true,
         .missing = {{"rename", EXDEV}, {"copy_file_range", EINVAL}, {"sendfile", EINVAL}}},
    };
    for (size_t i = 0; i < sizeof scenarios / sizeof *scenarios; i++) {
        run(&scenarios[i], scenarios[i].large ? large : old, fresh);
    }
    expect_all_failed();
    sft_writer_free(old);
    sft_writer_free(large);
    free(zeros);
    sft_writer_free(fresh);
    printf("%ld faults, %ld failed\n", faults, wrong);
    return wrong == 0 ? 0 : 1;
}
