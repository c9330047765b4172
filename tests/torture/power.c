/* What a loss of power leaves of saves that replace something and do not ask for durability: the old content or the
 * new one, whole.
 *
 * Filesystems with their default options lie in images, side by side. In each of them, everything that can be replaced
 * is replaced. Each image is copied 2, 7 and 20 s later, as a disk that loses power: before ext4 has written its
 * journal, afterwards, and once every filesystem has written its journal because somebody else wanted it. Other images
 * lose power in the moment in which the journal is written. Every copy is mounted again, and every byte is compared.
 * Skips what the machine lacks: root, loop devices, a filesystem or the program that makes one. */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/btrfs.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common.h"

/* The least that mkfs.xfs takes is 300 MB. */
enum { IMAGE_BYTES = 320 << 20 };

/* Words of a tensor, of which each content has two: of several MiB, so that some is written back early; of a page. */
enum { LARGE = 1250000, SMALL = 500 };

/* The losses of power in the moment of the journal, after each thing that is replaced. If nothing keeps name and data
 * in order, about two in five find one without the other. */
enum { STOPS = 3 };

static const int moments[] = {2, 7, 20};
enum { MOMENTS = sizeof moments / sizeof *moments };

/* Ends a filesystem as a loss of power does: EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN, without writing the journal. */
#define STOP _IOR('X', 125, uint32_t)
static const uint32_t no_journal = 2;

static bool no_links;

int linkat(int from_directory, const char* from, int to_directory, const char* to, int flags) {
    if (no_links) {
        errno = EPERM;
        return -1;
    }
    return ((__typeof__(&linkat))dlsym(RTLD_NEXT, "linkat"))(from_directory, from, to_directory, to, flags);
}

/* ---- What is replaced -------------------------------------------------------------------------------------------- */

static sft_status save(const char* path, uint64_t version, size_t words) {
    content what = content_new(version, 2, words);
    sft_writer* writer = content_writer(&what);
    const sft_status status = sft_writer_write_file(writer, path, NULL);
    sft_writer_free(writer);
    content_free(&what);
    return status;
}

static sft_status file(const char* path, uint64_t version) { return save(path, version, LARGE); }

static sft_status small_file(const char* path, uint64_t version) { return save(path, version, SMALL); }

/* On a filesystem that gives no name to a file without one. */
static sft_status copied_file(const char* path, uint64_t version) {
    no_links = true;
    const sft_status status = small_file(path, version);
    no_links = false;
    return status;
}

static sft_status write_incrementally(const char* path, uint64_t version) {
    content what = content_new(version, 2, LARGE);
    const sft_status status = content_write_incrementally(&what, path, NULL);
    content_free(&what);
    return status;
}

static sft_status save_shards(const char* path, uint64_t version, uint64_t max_shard_size) {
    content what = content_new(version, 2, SMALL);
    sft_writer* writer = content_writer(&what);
    sft_sharded_options options = SFT_SHARDED_OPTIONS_INIT;
    options.max_shard_size = max_shard_size;
    const sft_status status = sft_writer_write_sharded(writer, path, &options);
    sft_writer_free(writer);
    content_free(&what);
    return status;
}

static sft_status checkpoint(const char* path, uint64_t version) { return save_shards(path, version, SMALL * 8); }

/* Its old files have other names than the new ones, and are removed. */
static sft_status divided(const char* path, uint64_t version) {
    return save_shards(path, version, SMALL * (version == 1 ? 8 : 16));
}

/* The content of the first version, whose metadata tells the version. */
static sft_status edit(const char* path, uint64_t version) {
    const sft_status status = version == 1 ? small_file(path, 1) : SFT_OK;
    const char text[] = {(char)('0' + version)};
    const sft_metadata_change change = {{"version", 7}, {text, 1}};
    sft_edit_options options = SFT_EDIT_OPTIONS_INIT;
    return status == SFT_OK ? sft_edit_metadata(path, &change, 1, &options) : status;
}

static uint64_t whole_version(const char* path) { return file_version(path, SFT_BACKEND_PREAD); }

static uint64_t edited_version(const char* path) {
    sft_file* opened = NULL;
    sft_str text = {NULL, 0};
    if (whole_version(path) != 1 || sft_file_open(path, NULL, &opened) != SFT_OK) return 0;
    const bool found = sft_file_find_metadata(opened, "version", 7, &text) == SFT_OK && text.length == 1;
    const uint64_t version = found ? (uint64_t)(text.data[0] - '0') : 0;
    sft_file_free(opened);
    return version;
}

static const struct {
    const char* name;
    sft_status (*save)(const char* path, uint64_t version);
    uint64_t (*version)(const char* path);
} replaced[] = {
    {"file", file, whole_version},
    {"small file", small_file, whole_version},
    {"copied file", copied_file, whole_version},
    {"incremental writer", write_incrementally, whole_version},
    {"checkpoint", checkpoint, checkpoint_version},
    {"checkpoint of another number of files", divided, checkpoint_version},
    {"edit", edit, edited_version},
};
enum { REPLACED = sizeof replaced / sizeof *replaced };

static const char* path_in(const char* directory, size_t index) {
    char name[64];
    snprintf(name, sizeof name, "%s/%zu", directory, index);
    return path_of(name);
}

static void replace(const char* directory, size_t index, uint64_t version) {
    const sft_status status = replaced[index].save(path_in(directory, index), version);
    EXPECT(status == SFT_OK, "%s: %s: %s", directory, replaced[index].name, sft_last_error_get_message());
}

/* Everything that is replaced is there, in a version from `least` on, the second being the last. */
static void expect_whole(const char* directory, const char* when, uint64_t least) {
    for (size_t i = 0; i < REPLACED; i++) {
        const uint64_t version = replaced[i].version(path_in(directory, i));
        EXPECT(version >= least && version <= 2, "%s, %s: %s: version %ld, %s", directory, when, replaced[i].name,
               (long)version, version == 0 ? sft_last_error_get_message() : "not whole");
    }
}

/* ---- Where ------------------------------------------------------------------------------------------------------- */

typedef struct filesystem {
    const char *name, *options;
    /* Whether it can be stopped. */
    bool stops;
} filesystem;

static const filesystem filesystems[] = {{"ext4", "-q -F", true}, {"xfs", "-q -f", true}, {"btrfs", "-q -f", false}};
enum { FILESYSTEMS = sizeof filesystems / sizeof *filesystems };

static bool run(const char* command) {
    const int status = system(command);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

static bool mount_image(const char* image, const char* directory) {
    char command[8300];
    snprintf(command, sizeof command, "mount -o loop '%s' '%s' 2>&1", path_of(image), path_of(directory));
    return run(command);
}

/* A large file that was replaced may have to be closed yet, by a thread. */
static void unmount(const char* directory) {
    int status = 0;
    for (int tries = 0; (status = umount(path_of(directory))) != 0 && errno == EBUSY && tries < 500; tries++)
        usleep(10000);
    EXPECT(status == 0, "%s: %s", directory, strerror(errno));
}

/* Puts an empty filesystem into `image`, and mounts it at `directory`; false, after a line that says why, if it cannot.
 */
static bool make_filesystem(const filesystem* what, const char* image, const char* directory) {
    char command[4300];
    snprintf(command, sizeof command, "command -v mkfs.%s >/dev/null", what->name);
    if (!run(command)) {
        printf("power: %s skipped, as there is no mkfs.%s\n", what->name, what->name);
        return false;
    }
    put_file(path_of(image), "", 0);
    if (mkdir(path_of(directory), 0777) != 0 || truncate(path_of(image), IMAGE_BYTES) != 0) abort();
    snprintf(command, sizeof command, "mkfs.%s %s '%s' >/dev/null", what->name, what->options, path_of(image));
    if (!run(command)) abort();
    if (mount_image(image, directory)) return true;
    printf("power: %s skipped, as it cannot be mounted\n", what->name);
    return false;
}

/* Has the filesystem write its journal, with what was saved before, as another program may that needs it. */
static void write_journal(const filesystem* what, const char* directory) {
    const int opened = open(path_of(directory), O_RDONLY | O_DIRECTORY);
    uint64_t transaction = 0;
    const bool written = strcmp(what->name, "btrfs") != 0 ? fsync(opened) == 0
                                                          : ioctl(opened, BTRFS_IOC_START_SYNC, &transaction) == 0 &&
                                                                ioctl(opened, BTRFS_IOC_WAIT_SYNC, &transaction) == 0;
    EXPECT(written, "%s: %s", directory, strerror(errno));
    close(opened);
}

/* The bytes of the image as they are now; those that are 0 take no space. */
static void copy_image(const char* from, const char* to) {
    enum { STEP = 1 << 16 };
    static char bytes[STEP];
    static const char zeros[STEP];
    const int source = open(path_of(from), O_RDONLY), target = open(path_of(to), O_WRONLY | O_CREAT, 0600);
    if (source < 0 || target < 0 || ftruncate(target, IMAGE_BYTES) != 0) abort();
    for (off_t at = 0; at < IMAGE_BYTES && (at = lseek(source, at, SEEK_DATA)) >= 0; at += STEP) {
        at -= at % STEP;
        if (pread(source, bytes, STEP, at) != STEP) abort();
        if (memcmp(bytes, zeros, STEP) != 0 && pwrite(target, bytes, STEP, at) != STEP) abort();
    }
    close(source);
    close(target);
}

static void replace_all(const char* directory, uint64_t version) {
    for (size_t i = 0; i < REPLACED; i++) replace(directory, i, version);
}

/* Makes the first version of everything, and has it on the disk. */
static void begin(const char* directory) {
    replace_all(directory, 1);
    const int opened = open(path_of(directory), O_RDONLY | O_DIRECTORY);
    if (opened < 0 || syncfs(opened) != 0) abort();
    close(opened);
}

/* ---- When -------------------------------------------------------------------------------------------------------- */

static void copied_after(const filesystem* what) {
    char image[64], directory[64], copies[MOMENTS][80];
    snprintf(image, sizeof image, "%s.image", what->name);
    snprintf(directory, sizeof directory, "%s", what->name);
    if (!make_filesystem(what, image, directory)) return;
    begin(directory);
    replace_all(directory, 2);
    const double start = seconds();
    for (size_t i = 0; i < MOMENTS; i++) {
        const double left = start + moments[i] - seconds();
        if (left > 0) usleep((useconds_t)(left * 1e6));
        if (i + 1 == MOMENTS) write_journal(what, directory);
        snprintf(copies[i], sizeof copies[i], "%s.%d", image, moments[i]);
        copy_image(image, copies[i]);
    }
    /* First, as the copies say of themselves that they are the same filesystem. */
    unmount(directory);
    for (size_t i = 0; i < MOMENTS; i++) {
        char when[32];
        snprintf(when, sizeof when, "%d s later", moments[i]);
        const bool mounted = mount_image(copies[i], directory);
        EXPECT(mounted, "%s, %s", directory, when);
        if (!mounted) continue;
        expect_whole(directory, when, i + 1 == MOMENTS ? 2 : 1);
        unmount(directory);
    }
}

static void stopped(const filesystem* what) {
    char image[64], directory[64];
    snprintf(image, sizeof image, "%s.stopped.image", what->name);
    snprintf(directory, sizeof directory, "%s.stopped", what->name);
    if (!make_filesystem(what, image, directory)) return;
    for (size_t round = 0; round < STOPS * REPLACED; round++) {
        const size_t index = round % REPLACED;
        begin(directory);
        const int opened = open(path_of(directory), O_RDONLY | O_DIRECTORY);
        replace(directory, index, 2);
        if (opened < 0 || fsync(opened) != 0 || ioctl(opened, STOP, &no_journal) != 0) abort();
        close(opened);
        unmount(directory);
        if (!mount_image(image, directory)) abort();
        expect_whole(directory, "stopped", 1);
    }
    unmount(directory);
}

/* Mounts of its own for this process, which go with it. */
static bool may_mount(void) {
    return unshare(CLONE_NEWNS) == 0 && mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0;
}

static pid_t in_child(void (*body)(const filesystem* what), const filesystem* what) {
    fflush(stdout);
    const pid_t pid = fork();
    if (pid < 0) abort();
    if (pid > 0) return pid;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    body(what);
    fflush(stdout);
    _exit(failures() == 0 ? 0 : 1);
}

int main(int count, char** arguments) {
    if (count != 2) return 2;
    use_directory(arguments[1]);
    if (geteuid() != 0 || access("/dev/loop-control", R_OK) != 0 || !may_mount()) {
        printf("power: skipped, as this process may not mount images\n");
        return 0;
    }
    /* Where mkfs is may not be on the path. */
    char path[8192];
    snprintf(path, sizeof path, "%s:/usr/sbin:/sbin", getenv("PATH") == NULL ? "/usr/bin:/bin" : getenv("PATH"));
    setenv("PATH", path, 1);
    pid_t children[2 * FILESYSTEMS];
    size_t begun = 0;
    for (size_t i = 0; i < FILESYSTEMS; i++) {
        children[begun++] = in_child(copied_after, &filesystems[i]);
        if (filesystems[i].stops) children[begun++] = in_child(stopped, &filesystems[i]);
    }
    long failed = 0;
    for (size_t i = 0; i < begun; i++) {
        int status = 0;
        failed += waitpid(children[i], &status, 0) != children[i] || status != 0;
    }
    printf("losses of power: of %d saves, %d times each, and in %d moments of the journal; failed: %ld\n",
           (int)REPLACED, (int)MOMENTS, (int)(STOPS * REPLACED), failed);
    return failed == 0 ? 0 : 1;
}
