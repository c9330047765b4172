/* How saves, incremental writers and edits behave on a small disk that has no space left, and over a file that is a
 * mount point: a part of the program "manners". Skipped where this process may not mount. */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "common.h"
#include "filesystem.h"

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

static sft_status write_version_incrementally(uint64_t version, size_t words, const char* path) {
    content what = content_new(version, 2, words);
    const sft_status status = content_write_incrementally(&what, path, NULL);
    content_free(&what);
    return status;
}

static sft_status edit(const char* path, const char* value, bool in_place) {
    const sft_metadata_change change = {{"key", 3}, {value, strlen(value)}};
    sft_edit_options options = SFT_EDIT_OPTIONS_INIT;
    options.in_place = in_place;
    options.reserve = in_place ? 0 : 100;
    return sft_edit_metadata(path, &change, 1, &options);
}

static bool metadata_is(const char* path, const char* value) {
    sft_file* file = NULL;
    sft_str text = {NULL, 0};
    if (sft_file_open(path, NULL, &file) != SFT_OK) return false;
    const bool same = sft_file_find_metadata(file, "key", 3, &text) == SFT_OK && text.length == strlen(value) &&
                      memcmp(text.data, value, text.length) == 0;
    sft_file_free(file);
    return same;
}

/* Edits and incremental writers where there is no byte left: what needs no space works. */
static void on_a_full_disk(const char* a, const char* disk) {
    EXPECT(edit(a, "first", false) == SFT_OK, "%s", sft_last_error_get_message());
    static const char page[4096];
    const int fill = open(path_of("disk/fill"), O_CREAT | O_WRONLY, 0666);
    while (fill >= 0 && write(fill, page, sizeof page) > 0) {
    }
    EXPECT(fill >= 0 && errno == ENOSPC, "%s", strerror(errno));
    close(fill);
    const int before = entries(disk);
    is_refused("a rewriting edit", edit(a, "second", false), a, ENOSPC, 1, disk, before);
    is_refused("an incremental writer", write_version_incrementally(99, 10000, a), a, ENOSPC, 1, disk, before);
    is_refused("an incremental writer to a new file", write_version_incrementally(99, 10000, path_of("disk/b")),
               path_of("disk/b"), ENOSPC, 0, disk, before);
    EXPECT(metadata_is(a, "first"), "%s", sft_last_error_get_message());
    EXPECT(edit(a, "third", true) == SFT_OK && metadata_is(a, "third"), "%s", sft_last_error_get_message());
    EXPECT(file_version(a, SFT_BACKEND_PREAD) == 1, "%s", sft_last_error_get_message());
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
        EXPECT(save_version(1, third, a) == SFT_OK, "%s", sft_last_error_get_message());
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
        options.max_shard_size = 400000;
        EXPECT(
            sft_writer_write_sharded(writer, disk, &options) == SFT_ERROR_IO && sft_last_error_get_os_error() == ENOSPC,
            "%s", sft_last_error_get_message());
        EXPECT(entries(disk) == 1, "%d entries", entries(disk));
        sft_writer_free(writer);
        content_free(&what);
        /* A save works once there is space again. */
        if (unlink(a) != 0) abort();
        EXPECT(save_version(3, 50000, a) == SFT_OK && file_version(a, SFT_BACKEND_MMAP) == 3, "%s",
               sft_last_error_get_message());
        if (unlink(a) != 0) abort();
        *manners += 2;
    }
    no_unnamed = no_fallocate = false;
    /* Nothing was kept back: the disk is as empty as at first. */
    struct statfs told;
    EXPECT(statfs(disk, &told) == 0 && told.f_bfree + 1 >= told.f_blocks, "%ld of %ld blocks", (long)told.f_bfree,
           (long)told.f_blocks);
    accepted("a file on another filesystem", path_of("disk/far"), 1000, 0, disk);
    if (symlink(path_of("disk/far"), path_of("to-another-disk")) != 0) abort();
    const int beside = entries(path_of(".")) - 1;
    accepted("a link to another filesystem", path_of("to-another-disk"), 10, beside, path_of("."));
    struct stat link;
    EXPECT(lstat(path_of("to-another-disk"), &link) == 0 && S_ISREG(link.st_mode), "the link is not replaced");
    EXPECT(file_version(path_of("disk/far"), SFT_BACKEND_PREAD) == 7, "%s", sft_last_error_get_message());
    if (mount(NULL, disk, NULL, MS_REMOUNT | MS_RDONLY, NULL) != 0) abort();
    refused("a filesystem that may only be read", path_of("disk/far"), 10, EROFS, 7, disk);
}

/* A file that is itself a mount point, as containers have them, can only be overwritten in place: not if this process
 * has it mapped, by its own path or by another one. */
static void on_a_mount_point(void) {
    if (!may_mount()) {
        printf("manners: a mount point skipped, as this process may not mount: %s\n", strerror(errno));
        return;
    }
    char disk[4096], point[4096], source[4096];
    snprintf(disk, sizeof disk, "%s", path_of("disk"));
    snprintf(point, sizeof point, "%s", path_of("disk/point"));
    snprintf(source, sizeof source, "%s", path_of("disk/source"));
    EXPECT(save_version(1, 20000, source) == SFT_OK && save_version(2, 10, point) == SFT_OK, "%s",
           sft_last_error_get_message());
    if (mount(source, point, NULL, MS_BIND, NULL) != 0) abort();
    const char* mapped[] = {point, source};
    for (int i = 0; i < 2; i++) {
        sft_file* file = NULL;
        EXPECT(sft_file_open(mapped[i], NULL, &file) == SFT_OK, "%s", sft_last_error_get_message());
        /* A smaller file: to touch what is mapped would be SIGBUS. */
        refused("a mount point that is mapped", point, 10, EBUSY, 1, disk);
        EXPECT(save_version(9, 10, point) == SFT_ERROR_IO && strstr(sft_last_error_get_message(), "pread") != NULL,
               "%s", sft_last_error_get_message());
        const void* bytes = NULL;
        EXPECT(sft_file_get_data(file, 1, &bytes) == SFT_OK && tensor_is(bytes, 20000 * 8, 1, 1), "the tensor changed");
        sft_file_free(file);
    }
    sft_open_options options = SFT_OPEN_OPTIONS_INIT;
    options.backend = SFT_BACKEND_PREAD;
    sft_file* file = NULL;
    EXPECT(sft_file_open(point, &options, &file) == SFT_OK, "%s", sft_last_error_get_message());
    accepted("a mount point that is open", point, 10, 1, disk);
    EXPECT(file_version(source, SFT_BACKEND_PREAD) == 7, "%s", sft_last_error_get_message());
    sft_file_free(file);
    if (umount(point) != 0) abort();
    EXPECT(file_version(point, SFT_BACKEND_PREAD) == 2, "%s", sft_last_error_get_message());
}

void small_disk(void) {
    make_directory(path_of("disk"), 0755);
    as_child(on_a_small_disk, false);
    as_child(on_a_mount_point, false);
}
