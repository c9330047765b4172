/* See scenarios.h. */
#include "scenarios.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "common.h"

/* Of each tensor; and of one in a file that is large enough to be closed by another thread. */
enum { BYTES = 100000, LARGE = 16 << 20 };

/* The owner of a file that another user left; only root can make one. */
enum { STRANGER = 12345 };

const scenario scenarios[] = {
    {.name = "a new file"},
    {.name = "over an old file", .exists = true},
    {.name = "a new file, synchronized", .durable = true},
    {.name = "over an old file, synchronized", .exists = true, .durable = true, .twice = true},
    {.name = "over an old file, no preallocation", .exists = true, .missing = {{"fallocate", EOPNOTSUPP}}},
    {.name = "over an old file, no sync_file_range", .exists = true, .missing = {{"sync_file_range", ENOSYS}}},
    {.name = "a checkpoint of other names, not synchronized",
     .exists = true,
     .old_shard = BYTES,
     .new_shard = 2 * BYTES},
    {.name = "one that cannot be renamed over",
     .exists = true,
     .durable = true,
     .twice = true,
     .missing = {{"rename", EXDEV}}},
    {.name = "a new checkpoint", .durable = true, .twice = true, .new_shard = 2 * BYTES},
    {.name = "a checkpoint of other names",
     .exists = true,
     .durable = true,
     .old_shard = BYTES,
     .new_shard = 2 * BYTES},
    {.name = "a checkpoint of the same names",
     .exists = true,
     .durable = true,
     .twice = true,
     .old_shard = 2 * BYTES,
     .new_shard = 2 * BYTES},
    {.name = "a checkpoint whose files cannot be renamed over",
     .exists = true,
     .durable = true,
     .missing = {{"rename over a file", EBUSY}},
     .old_shard = 2 * BYTES,
     .new_shard = 2 * BYTES},
    {.name = "one file over a checkpoint", .exists = true, .durable = true, .old_shard = BYTES, .new_shard = 9 * BYTES},
    {.name = "a checkpoint over one file", .exists = true, .durable = true, .old_shard = 9 * BYTES, .new_shard = BYTES},
    {.name = "an incremental writer to a new file", .durable = true, .how = INCREMENTAL},
    {.name = "an incremental writer over an old file", .exists = true, .durable = true, .how = INCREMENTAL},
    {.name = "an edit in place", .exists = true, .durable = true, .twice = true, .how = EDIT, .in_place = true},
    {.name = "a rewriting edit", .exists = true, .durable = true, .how = EDIT},
    {.name = "a rewriting edit, copied through memory",
     .exists = true,
     .durable = true,
     .missing = {{"copy_file_range", EXDEV}},
     .how = EDIT},
    {.name = "over another's file", .exists = true, .durable = true, .stranger = true},
    {.name = "over a file with an access control list", .exists = true, .durable = true, .twice = true, .listed = true},
    {.name = "where new files get an access control list",
     .exists = true,
     .durable = true,
     .twice = true,
     .lists = true},
    {.name = "over a large file", .exists = true, .large = true},
    {.name = "a new file, no unnamed files", .durable = true, .missing = {{"open unnamed", EOPNOTSUPP}}},
    {.name = "over an old file, no unnamed files",
     .exists = true,
     .durable = true,
     .twice = true,
     .missing = {{"open unnamed", EOPNOTSUPP}}},
    {.name = "a checkpoint, no unnamed files",
     .exists = true,
     .durable = true,
     .missing = {{"open unnamed", EOPNOTSUPP}},
     .old_shard = BYTES,
     .new_shard = BYTES},
    {.name = "an incremental writer, no unnamed files",
     .exists = true,
     .durable = true,
     .twice = true,
     .missing = {{"open unnamed", EOPNOTSUPP}},
     .how = INCREMENTAL},
    {.name = "a rewriting edit, no unnamed files",
     .exists = true,
     .durable = true,
     .twice = true,
     .missing = {{"open unnamed", EOPNOTSUPP}},
     .how = EDIT},
    {.name = "one that cannot be renamed over, nor copied to by the kernel",
     .exists = true,
     .durable = true,
     .missing = {{"rename", EXDEV}, {"copy_file_range", EINVAL}}},
    {.name = "one that has to be copied to by hand",
     .exists = true,
     .durable = true,
     .missing = {{"rename", EXDEV}, {"copy_file_range", EINVAL}, {"sendfile", EINVAL}}},
    {.name = "a new file, no links", .durable = true, .twice = true, .missing = {{"linkat", EPERM}}},
    {.name = "over an old file, no links",
     .exists = true,
     .durable = true,
     .twice = true,
     .missing = {{"linkat", EOPNOTSUPP}}},
    {.name = "over an old file, no renames",
     .exists = true,
     .durable = true,
     .missing = {{"rename", ENOSYS}, {"rename to a hidden name", ENOSYS}}},
    {.name = "a new file, neither",
     .durable = true,
     .twice = true,
     .missing = {{"linkat", EPERM}, {"rename", ENOSYS}, {"rename to a hidden name", ENOSYS}}},
    {.name = "over an old file, neither",
     .exists = true,
     .durable = true,
     .missing = {{"linkat", EPERM}, {"rename", ENOSYS}, {"rename to a hidden name", ENOSYS}}},
    {.name = NULL},
};

scenario_kind kind_of(const scenario* what) {
    return what->how == EDIT          ? EDITS
           : what->how == INCREMENTAL ? INCREMENTAL_WRITERS
           : what->new_shard > 0      ? CHECKPOINTS
                                      : FILES;
}

static char directory[3000];
static sft_writer *old, *large, *fresh;
static unsigned char ones[BYTES], twos[BYTES], *zeros;

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

void scenarios_begin(const char* where) {
    snprintf(directory, sizeof directory, "%s", where);
    memset(ones, 1, BYTES);
    memset(twos, 2, BYTES);
    old = writer_of(ones);
    large = writer_of(ones);
    fresh = writer_of(twos);
    static const uint64_t shape[] = {LARGE};
    zeros = calloc(LARGE, 1);
    if (zeros == NULL || sft_writer_add_tensor(large, "large", 5, SFT_DTYPE_U8, shape, 1, zeros, LARGE) != SFT_OK) {
        abort();
    }
}

void scenarios_end(void) {
    sft_writer_free(old);
    sft_writer_free(large);
    sft_writer_free(fresh);
    free(zeros);
}

static sft_status write_incrementally(const sft_writer* writer, const sft_save_options* options) {
    sft_incremental_writer* opened = NULL;
    sft_status status = sft_incremental_writer_create(writer, path_of("target"), options, &opened);
    if (status == SFT_OK) status = sft_incremental_writer_commit(opened);
    sft_incremental_writer_free(opened);
    return status;
}

static sft_status edit(const scenario* what) {
    static const sft_metadata_change changes[] = {{{"room", 4}, {NULL, 0}}, {{"edited", 6}, {"yes", 3}}};
    sft_edit_options options = SFT_EDIT_OPTIONS_INIT;
    options.in_place = what->in_place;
    options.durable = what->durable;
    return sft_edit_metadata(path_of("target"), changes, 2, &options);
}

static sft_status save(const scenario* what, const sft_writer* writer, uint64_t shard) {
    if (shard == 0) {
        sft_save_options options = SFT_SAVE_OPTIONS_INIT;
        options.durable = what->durable;
        return sft_writer_write_file(writer, path_of("target"), &options);
    }
    sft_sharded_options options = SFT_SHARDED_OPTIONS_INIT;
    options.max_shard_size = shard;
    options.durable = what->durable;
    return sft_writer_write_sharded(writer, path_of("target"), &options);
}

sft_status run_save(const scenario* what) {
    if (what->how == EDIT) return edit(what);
    if (what->how == AT_ONCE) return save(what, fresh, what->new_shard);
    sft_save_options options = SFT_SAVE_OPTIONS_INIT;
    options.durable = what->durable;
    return write_incrementally(fresh, &options);
}

/* User 12345 may do as much as the group; the permissions are 0640. */
static bool list(const char* path, const char* name) {
    static const struct {
        uint32_t version;
        struct {
            uint16_t tag, rights;
            uint32_t id;
        } entries[5];
    } acl = {2, {{0x01, 6, -1u}, {0x02, 4, STRANGER}, {0x04, 4, -1u}, {0x10, 4, -1u}, {0x20, 0, -1u}}};
    return setxattr(path, name, &acl, sizeof acl, 0) == 0;
}

bool has_lists(void) { return list(directory, "system.posix_acl_access"); }

void prepare(const scenario* what) {
    /* One that no save has looked through for leftovers yet. */
    static long number;
    if (number > 0) remove_all(path_of(""));
    char own[3072];
    snprintf(own, sizeof own, "%s/%ld", directory, ++number);
    if (mkdir(own, 0755) != 0) abort();
    use_directory(own);
    if (!what->exists) return;
    if (save(what, what->large ? large : old, what->old_shard) != SFT_OK) abort();
    if (what->new_shard != 0) return;
    if (what->stranger && geteuid() == 0 && chown(path_of("target"), STRANGER, STRANGER) != 0) abort();
    if (chmod(path_of("target"), 0640) != 0) abort();
    if (what->listed) list(path_of("target"), "system.posix_acl_access");
    if (what->lists) list(own, "system.posix_acl_default");
}

/* How many bytes the access control list of a file has. */
static ssize_t list_of(const char* path) {
    const ssize_t size = getxattr(path, "system.posix_acl_access", NULL, 0);
    return size < 0 ? 0 : size;
}

bool is_as_it_was(const scenario* what, bool may_be) {
    struct stat told;
    const mode_t mask = umask(0);
    umask(mask);
    const bool has_list = what->listed && has_lists();
    return stat(path_of("target"), &told) == 0 && ((list_of(path_of("target")) > 0) == has_list || may_be) &&
           ((told.st_mode & 07777) == (what->exists ? 0640 : 0666 & ~mask) ||
            (may_be && (told.st_mode & 07777) == 0600)) &&
           told.st_uid == (what->stranger && geteuid() == 0 ? STRANGER : geteuid());
}

int files_of(uint64_t shard) { return shard >= 3 * BYTES ? 1 : shard >= 2 * BYTES ? 3 : 4; }

unsigned char value_of(const char* path) {
    static unsigned char bytes[BYTES];
    sft_checkpoint* checkpoint = NULL;
    if (sft_checkpoint_open(path, NULL, &checkpoint) != SFT_OK) return 0;
    unsigned char value = 0;
    bool same = true;
    for (const char* name = "abc"; *name != '\0'; name++) {
        size_t shard = 0, index = 0;
        const sft_file* file = NULL;
        sft_str ignored;
        same = same && sft_checkpoint_find_tensor(checkpoint, name, 1, &shard, &index) == SFT_OK &&
               sft_checkpoint_get_shard(checkpoint, shard, &ignored, &file) == SFT_OK &&
               sft_file_read_tensor(file, index, bytes, BYTES) == SFT_OK;
        value = value == 0 ? bytes[0] : value;
        for (size_t i = 0; same && i < BYTES; i++) same = bytes[i] == value;
        sft_str edited = {NULL, 0};
        same = same && sft_file_find_metadata(file, "edited", 6, &edited) == SFT_OK;
        value = edited.data != NULL ? 2 : value;
        if (edited.data != NULL && same) break;
    }
    sft_checkpoint_free(checkpoint);
    return same ? value : 0;
}
