/* What is on the disk when: with `durable`, a file is synchronized when all of it is written and before it gets its
 * name, and its directory afterwards; the files of a checkpoint before the names, the names before the index, the index
 * before what it replaces goes. Streams and edits of the metadata too.
 *
 * The system calls that matter come by here, are written down in a word, and done; those in a row that write to one
 * file, in one word. Nothing else may be written, so that no byte comes after the synchronizing. Run with a directory.
 */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "common.h"

static char log_text[65536];
static bool is_logging;
static ino_t numbers[64];
static size_t known;

static void note(const char* what, const char* name) {
    const size_t length = strlen(log_text);
    snprintf(log_text + length, sizeof log_text - length, "%s(%s) ", what, name);
}

static const char* last_part(const char* path) {
    const char* slash = strrchr(path, '/');
    const char* name = slash == NULL ? path : slash + 1;
    return strncmp(name, ".safetensors-", 13) == 0 ? "hidden" : name;
}

/* "directory NAME", or "file N" by the order in which files are met first: they have no names yet. */
static const char* name_of(int descriptor) {
    static char name[PATH_MAX + 16];
    struct stat told;
    if (fstat(descriptor, &told) != 0) abort();
    if (S_ISDIR(told.st_mode)) {
        char link[64], path[PATH_MAX] = "";
        snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
        if (readlink(link, path, sizeof path - 1) < 0) abort();
        snprintf(name, sizeof name, "directory %s", last_part(path));
        return name;
    }
    size_t number = 0;
    while (number < known && numbers[number] != told.st_ino) number++;
    if (number == known && known < sizeof numbers / sizeof *numbers) numbers[known++] = told.st_ino;
    snprintf(name, sizeof name, "file %zu", number + 1);
    return name;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static void note_write(int descriptor) {
    static char last[PATH_MAX + 32];
    if (!is_logging) return;
    const int error = errno;
    snprintf(last, sizeof last, "write(%s) ", name_of(descriptor));
    const size_t length = strlen(log_text), of_last = strlen(last);
    if (length < of_last || strcmp(log_text + length - of_last, last) != 0) note("write", name_of(descriptor));
    errno = error;
}

ssize_t write(int descriptor, const void* bytes, size_t count) {
    note_write(descriptor);
    return REAL(write)(descriptor, bytes, count);
}
ssize_t writev(int descriptor, const struct iovec* pieces, int count) {
    note_write(descriptor);
    return REAL(writev)(descriptor, pieces, count);
}
ssize_t pwrite64(int descriptor, const void* bytes, size_t count, off_t offset) {
    note_write(descriptor);
    return REAL(pwrite64)(descriptor, bytes, count, offset);
}
ssize_t copy_file_range(int in, off_t* in_offset, int out, off_t* out_offset, size_t count, unsigned flags) {
    note_write(out);
    return REAL(copy_file_range)(in, in_offset, out, out_offset, count, flags);
}
ssize_t sendfile64(int out, int in, off64_t* offset, size_t count) {
    note_write(out);
    return REAL(sendfile64)(out, in, offset, count);
}
int ftruncate64(int descriptor, off_t length) {
    note_write(descriptor);
    return REAL(ftruncate64)(descriptor, length);
}
int fsync(int descriptor) {
    if (is_logging) note("fsync", name_of(descriptor));
    return REAL(fsync)(descriptor);
}
int fdatasync(int descriptor) {
    if (is_logging) note("fdatasync", name_of(descriptor));
    return REAL(fdatasync)(descriptor);
}
/* What a filesystem says that has no links for files without names, or no renames over a file; 0 where it has. */
static int no_links, no_renames;

int renameat(int from_directory, const char* from, int to_directory, const char* to) {
    if (is_logging) note("rename", last_part(to));
    if (no_renames != 0 && strcmp(last_part(to), "hidden") != 0) {
        errno = no_renames;
        return -1;
    }
    return REAL(renameat)(from_directory, from, to_directory, to);
}
int linkat(int a, const char* from, int b, const char* to, int flags) {
    if (no_links != 0) {
        /* Kept, so that no other file gets its number. */
        if (open(from, O_PATH) < 0) abort();
        errno = no_links;
        return -1;
    }
    const int result = REAL(linkat)(a, from, b, to, flags);
    if (is_logging && result == 0) note("link", last_part(to));
    return result;
}
int unlinkat(int directory, const char* path, int flags) {
    /* Shards go in the order in which the directory has them. What locks the directory need not survive. */
    const bool is_lock = strcmp(path, ".safetensors.lock") == 0;
    if (is_logging && !is_lock) note("unlink", strstr(path, "-of-") != NULL ? "shard" : last_part(path));
    return REAL(unlinkat)(directory, path, flags);
}

static long orders;

static void expect_order(const char* scenario, sft_status status, const char* expected) {
    is_logging = false;
    EXPECT(status == SFT_OK, "%s: %s", scenario, sft_last_error_get_message());
    EXPECT(strcmp(log_text, expected) == 0, "%s:\n  given    %s\n  expected %s", scenario, log_text, expected);
    orders++;
}

static void begin(void) {
    log_text[0] = '\0';
    known = 0;
    is_logging = true;
}

static void files(const sft_writer* writer) {
    sft_save_options options = SFT_SAVE_OPTIONS_INIT;
    begin();
    expect_order("a file that is left to the kernel", sft_writer_write_file(writer, path_of("plain"), &options),
                 "write(file 1) link(plain) ");
    begin();
    expect_order("another over it", sft_writer_write_file(writer, path_of("plain"), &options),
                 "write(file 1) link(hidden) rename(plain) ");
    options.durable = 1;
    begin();
    expect_order("a new file", sft_writer_write_file(writer, path_of("sub/synced"), &options),
                 "write(file 1) fsync(file 1) link(synced) fsync(directory sub) ");
    begin();
    expect_order("a file over an old one", sft_writer_write_file(writer, path_of("sub/synced"), &options),
                 "write(file 1) fsync(file 1) link(hidden) rename(synced) fsync(directory sub) ");
    /* The directory is that of the link, which is replaced, not that of the file. */
    if (symlink("../sub/synced", path_of("parent-of-link/link")) != 0) abort();
    begin();
    expect_order("over a symbolic link", sft_writer_write_file(writer, path_of("parent-of-link/link"), &options),
                 "write(file 1) fsync(file 1) link(hidden) rename(link) fsync(directory parent-of-link) ");
    if (chdir(path_of("sub")) != 0) abort();
    begin();
    expect_order("by a name without a directory", sft_writer_write_file(writer, "relative", &options),
                 "write(file 1) fsync(file 1) link(relative) fsync(directory sub) ");
}

static void checkpoints(const sft_writer* writer) {
    sft_sharded_options options = SFT_SHARDED_OPTIONS_INIT;
    options.durable = 1;
    options.max_shard_size = 8000;
    const char* directory = path_of("parent/checkpoint");
    begin();
    /* Files and index, then the directory, then the names of files, on the disk before that of the index; at the end
     * the directories that are new in theirs. */
    expect_order(
        "a new checkpoint", sft_writer_write_sharded(writer, directory, &options),
        "write(file 1) write(file 2) write(file 3) fsync(file 1) fsync(file 2) fsync(file 3) fsync(directory "
        "checkpoint) "
        "link(model-00001-of-00002.safetensors) link(model-00002-of-00002.safetensors) "
        "fsync(directory checkpoint) link(model.safetensors.index.json) "
        "fsync(directory checkpoint) fsync(directory parent) fsync(directory files) fsync(directory checkpoint) ");
    begin();
    /* The old index is out of the way, on the disk, before the first file that it lists changes. */
    expect_order("a checkpoint over one of the same names", sft_writer_write_sharded(writer, directory, &options),
                 "write(file 1) write(file 2) write(file 3) fsync(file 1) fsync(file 2) fsync(file 3) rename(hidden) "
                 "fsync(directory checkpoint) "
                 "link(hidden) rename(model-00001-of-00002.safetensors) "
                 "link(hidden) rename(model-00002-of-00002.safetensors) "
                 "fsync(directory checkpoint) link(model.safetensors.index.json) unlink(hidden) "
                 "fsync(directory checkpoint) fsync(directory checkpoint) ");
    options.max_shard_size = 1000000;
    begin();
    expect_order(
        "one file over a checkpoint", sft_writer_write_sharded(writer, directory, &options),
        "write(file 1) fsync(file 1) fsync(directory checkpoint) link(model.safetensors) fsync(directory checkpoint) "
        "unlink(model.safetensors.index.json) unlink(shard) unlink(shard) "
        "fsync(directory checkpoint) ");
    options.max_shard_size = 8000;
    begin();
    expect_order("a checkpoint over one file", sft_writer_write_sharded(writer, directory, &options),
                 "write(file 1) write(file 2) write(file 3) fsync(file 1) fsync(file 2) fsync(file 3) fsync(directory "
                 "checkpoint) "
                 "link(model-00001-of-00002.safetensors) link(model-00002-of-00002.safetensors) "
                 "fsync(directory checkpoint) link(model.safetensors.index.json) fsync(directory checkpoint) "
                 "unlink(model.safetensors) fsync(directory checkpoint) ");
}

/* Tensor by tensor, and in two parts. */
static void incremental_writers(const content* what) {
    sft_save_options options = SFT_SAVE_OPTIONS_INIT;
    begin();
    expect_order("an incremental writer that is left to the kernel",
                 content_write_incrementally(what, path_of("sub/written"), &options), "write(file 1) link(written) ");
    options.durable = 1;
    begin();
    expect_order("an incremental writer over an old file",
                 content_write_incrementally(what, path_of("sub/written"), &options),
                 "write(file 1) fsync(file 1) link(hidden) rename(written) fsync(directory sub) ");
    if (unlink(path_of("sub/written")) != 0) abort();
    begin();
    expect_order("an incremental writer to a new file",
                 content_write_incrementally(what, path_of("sub/written"), &options),
                 "write(file 1) fsync(file 1) link(written) fsync(directory sub) ");
}

static sft_status edit(const char* value, bool in_place, uint32_t durable) {
    const sft_metadata_change change = {{"key", 3}, {value, strlen(value)}};
    sft_edit_options options = SFT_EDIT_OPTIONS_INIT;
    options.in_place = in_place;
    options.durable = durable;
    return sft_edit_metadata(path_of("sub/written"), &change, 1, &options);
}

static void edits(void) {
    begin();
    expect_order("a rewriting edit that is left to the kernel", edit("a", false, 0),
                 "write(file 1) link(hidden) rename(written) ");
    begin();
    expect_order("a rewriting edit", edit("b", false, 1),
                 "write(file 1) fsync(file 1) link(hidden) rename(written) fsync(directory sub) ");
    begin();
    expect_order("an edit in place that is left to the kernel", edit("c", true, 0), "write(file 1) ");
    begin();
    expect_order("an edit in place", edit("d", true, 1), "write(file 1) fsync(file 1) ");
    begin();
    expect_order("an edit that changes nothing", edit("d", false, 1), "");
}

/* Copies are synchronized as what they are made of. */
static void copies(const sft_writer* writer) {
    sft_save_options options = SFT_SAVE_OPTIONS_INIT;
    options.durable = 1;
    no_links = EPERM;
    begin();
    expect_order("a new file, no links", sft_writer_write_file(writer, path_of("sub/copied"), &options),
                 "write(file 1) fsync(file 1) write(file 2) fsync(file 2) rename(copied) fsync(directory sub) ");
    no_renames = ENOSYS;
    begin();
    expect_order("a file over an old one, neither", sft_writer_write_file(writer, path_of("sub/copied"), &options),
                 "write(file 1) fsync(file 1) write(file 2) fsync(file 2) rename(copied) rename(hidden) "
                 "fsync(directory sub) write(file 3) fsync(file 3) unlink(hidden) ");
    begin();
    expect_order("a new file, neither", sft_writer_write_file(writer, path_of("sub/made"), &options),
                 "write(file 1) fsync(file 1) write(file 2) fsync(file 2) rename(made) write(file 3) fsync(file 3) "
                 "fsync(directory sub) unlink(hidden) ");
    no_renames = 0;
    sft_sharded_options sharded = SFT_SHARDED_OPTIONS_INIT;
    sharded.durable = 1;
    begin();
    expect_order("a checkpoint, no links", sft_writer_write_sharded(writer, path_of("sub"), &sharded),
                 "write(file 1) fsync(file 1) fsync(directory sub) write(file 2) fsync(file 2) "
                 "rename(model.safetensors) fsync(directory sub) "
                 "fsync(directory sub) ");
    no_links = 0;
}

int main(int count, char** arguments) {
    if (count != 2) return 2;
    use_directory(arguments[1]);
    const int unnamed = open(arguments[1], O_TMPFILE | O_WRONLY, 0600);
    if (unnamed < 0) {
        printf("order: skipped, as this filesystem has no files without names\n");
        return 0;
    }
    close(unnamed);
    const content what = content_new(1, 2, 1000);
    sft_writer* writer = content_writer(&what);
    if (mkdir(path_of("sub"), 0777) != 0 || mkdir(path_of("parent-of-link"), 0777) != 0) return 2;
    files(writer);
    checkpoints(writer);
    incremental_writers(&what);
    edits();
    copies(writer);
    sft_writer_free(writer);
    printf("order of synchronizing: %ld orders, %ld wrong\n", orders, failures());
    return failures() == 0 ? 0 : 1;
}
