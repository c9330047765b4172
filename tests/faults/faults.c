/* Saves in which every system call fails once, in every way that is worth it, until the save succeeds.
 *
 * After each: the call that failed was answered with an error that names the path, or the new file is complete all the
 * same; the target holds the old file or the new one, whole; nothing stands beside it; no descriptor is left open; and
 * the next save works. Run with a folder; ends in "N faults, N failed". */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <safetensors_torch.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "inject.h"

enum { BYTES = 100000 };

static long faults, wrong;
static char folder[3000];

static void expect(bool holds, const char* what, const char* scenario, long call, int error) {
    if (holds) return;
    wrong++;
    const char* name = inject_failed();
    printf("%s, call %ld (%s, %s): %s; %s\n", scenario, call, name == NULL ? "none" : name, strerror(error), what,
           sft_last_error_message());
}

static const char* path_of(const char* name) {
    static char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

/* How many entries a folder has; -1 if it is not there. */
static int entries(const char* path) {
    DIR* opened = opendir(path);
    if (opened == NULL) return -1;
    int count = 0;
    for (const struct dirent* entry; (entry = readdir(opened)) != NULL;) {
        count += strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0;
    }
    closedir(opened);
    return count;
}

/* Descriptors that are open. The one with which they are counted is among them each time. */
static int descriptors(void) { return entries("/proc/self/fd"); }

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
static unsigned char content(const char* path) {
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

/* A way to save: what is there before, and how it is written. */
typedef struct scenario {
    const char* name;
    bool exists;         /* whether an old file, or checkpoint, is there */
    bool sync;           /* whether the new one is to be on the disk */
    const char* missing; /* a call that this filesystem lacks, or NULL */
    int missing_error;
    uint64_t old_shard, new_shard;      /* for a checkpoint: the bytes of a file; 0 for a single file by itself */
    enum { AT_ONCE, STREAM, EDIT } how; /* all tensors at once, one by one, or a change of the metadata */
    sft_edit_mode mode;
} scenario;

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

static void remove_target(void) {
    char command[4200];
    snprintf(command, sizeof command, "rm -rf '%s'", path_of("target"));
    if (system(command) != 0) abort();
}

/* Calls whose failure changes nothing that anybody was promised: they look for a better way, or clean up. */
static bool may_succeed(const char* name, int error) {
    static const char* const harmless[] = {"close", "unlink", "fstatfs", "statx", "open", "fchown", "flock", "linkat"};
    if (name == NULL || error == EINTR) return true;
    for (size_t i = 0; i < sizeof harmless / sizeof *harmless; i++) {
        if (strcmp(name, harmless[i]) == 0) return true;
    }
    return false;
}

static bool is_whole(const scenario* what, unsigned char value, int before) {
    return value == 2 || (what->exists ? value == 1 : value == 0 && before == entries(folder));
}

/* One save in which call number `call` fails. Gives how many calls it made. */
static long run_one(const scenario* what, long call, fault kind, int error, const sft_writer* old,
                    const sft_writer* fresh) {
    remove_target();
    if (what->exists && save(what, old, what->old_shard) != SFT_OK) abort();
    const int before = entries(folder), open_before = descriptors();
    if (what->missing != NULL) inject_always(what->missing, what->missing_error);
    inject_arm(call, kind, error);
    const sft_status status = save_anew(what, fresh);
    const long calls = inject_disarm();
    inject_always(NULL, 0);
    char said[4096];
    snprintf(said, sizeof said, "%s", status == SFT_OK ? "" : sft_last_error_message());
    const char* name = inject_failed();
    faults += name != NULL;

    const unsigned char value = content(path_of("target"));
    if (status == SFT_OK) {
        expect(value == 2, "success, but the new file is not there", what->name, call, error);
        expect(may_succeed(name, error) || kind == FAULT_SHORT, "success", what->name, call, error);
    } else {
        expect(strstr(said, folder) != NULL, said, what->name, call, error);
        expect(sft_last_os_error() == error || strstr(said, strerror(error)) != NULL, said, what->name, call, error);
        /* Only the entry in the folder, or the copy over one that cannot be renamed over, is not on the disk. */
        const bool is_told = strstr(said, "the new file is") != NULL || what->new_shard != 0;
        expect(value != 2 || is_told, said, what->name, call, error);
        /* Where an old shard was replaced already, the error says so, and no reader takes what is left for one. */
        const bool says_so = strstr(said, "is not complete") != NULL && value == 0;
        expect(is_whole(what, value, before) || says_so, "neither the old file nor the new one", what->name, call,
               error);
    }
    /* The only whole copy has a name that no later save takes for a stray. */
    const char* complete = strstr(said, "the new file is complete at");
    expect(complete == NULL || strstr(complete, ".whole") != NULL, said, what->name, call, error);
    /* What cannot be removed stays: the error of a failed unlink has nobody to go to. */
    const bool cannot_remove = name != NULL && (strcmp(name, "unlink") == 0 || strcmp(name, "rmdir") == 0);
    const bool strays = cannot_remove || complete != NULL || strstr(said, "are still there") != NULL;
    const int after = entries(folder);
    expect(strays || after == before || (after == before + 1 && value == 2), "something is left", what->name, call,
           error);
    if (what->new_shard != 0 && !strays && value != 0) {
        const int files = entries(path_of("target"));
        expect(files == 1 || files == 3 || files == 4, "something is left in the folder", what->name, call, error);
    }
    expect(descriptors() == open_before, "a descriptor is open", what->name, call, error);
    expect(save_anew(what, fresh) == SFT_OK && content(path_of("target")) == 2, "the next save fails", what->name, call,
           error);
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
            const long calls = run_one(what, call, kind, error, old, fresh);
            if (inject_failed() == NULL) {
                most = calls > most ? calls : most;
                break;
            }
        }
    }
    printf("%s: %ld faults, %ld calls in a save\n", what->name, faults - before, most);
}

int main(int count, char** arguments) {
    if (count != 2) return 2;
    snprintf(folder, sizeof folder, "%s", arguments[1]);
    static unsigned char ones[BYTES], twos[BYTES];
    memset(ones, 1, BYTES);
    memset(twos, 2, BYTES);
    sft_writer *old = writer_of(ones), *fresh = writer_of(twos);
    static const scenario scenarios[] = {
        {.name = "a new file"},
        {.name = "over an old file", .exists = true},
        {.name = "a new file, synchronized", .sync = true},
        {.name = "over an old file, synchronized", .exists = true, .sync = true},
        {.name = "over an old file, no preallocation",
         .exists = true,
         .missing = "fallocate",
         .missing_error = EOPNOTSUPP},
        {.name = "one that cannot be renamed over",
         .exists = true,
         .sync = true,
         .missing = "rename",
         .missing_error = EXDEV},
        {.name = "a new checkpoint", .sync = true, .new_shard = 2 * BYTES},
        {.name = "a checkpoint of other names",
         .exists = true,
         .sync = true,
         .old_shard = BYTES,
         .new_shard = 2 * BYTES},
        {.name = "a checkpoint of the same names",
         .exists = true,
         .sync = true,
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
        {.name = "an edit in place", .exists = true, .sync = true, .how = EDIT, .mode = SFT_EDIT_IN_PLACE},
        {.name = "an edit anew", .exists = true, .sync = true, .how = EDIT, .mode = SFT_EDIT_REWRITE},
        {.name = "an edit anew, copied by hand",
         .exists = true,
         .sync = true,
         .missing = "copy_file_range",
         .missing_error = EXDEV,
         .how = EDIT,
         .mode = SFT_EDIT_REWRITE},
        {.name = "a new file, no links", .sync = true, .missing = "linkat", .missing_error = EPERM},
        {.name = "over an old file, no links",
         .exists = true,
         .sync = true,
         .missing = "linkat",
         .missing_error = EOPNOTSUPP},
        {.name = "over an old file, no renames",
         .exists = true,
         .sync = true,
         .missing = "rename",
         .missing_error = ENOSYS},
    };
    for (size_t i = 0; i < sizeof scenarios / sizeof *scenarios; i++) run(&scenarios[i], old, fresh);
    sft_writer_free(old);
    sft_writer_free(fresh);
    printf("%ld faults, %ld failed\n", faults, wrong);
    return wrong == 0 ? 0 : 1;
}
