/* Files that change while they are open: cut short, replaced, removed, written to, on both backends; and files that are
 * hardly files: of a size that does not tell (/proc), of holes alone, of more than 4 GiB, of no bytes.
 *
 * pread must answer each read with an error or with the old bytes, never with a signal. A mapping must keep its bytes
 * when the file is replaced or removed, and the documented hazard of one that is cut short is shown in a child. Run
 * with a directory. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common.h"

enum { WORDS = 400000 }; /* 3.2 MB a tensor: its last pages are not in what the header's read brought */

static long changes;
static char path[4096];

static sft_file* opened(sft_backend backend) {
    sft_open_options options = SFT_OPEN_OPTIONS_INIT;
    options.backend = backend;
    sft_file* file = NULL;
    EXPECT(sft_file_open(path, &options, &file) == SFT_OK, "%s", sft_last_error_get_message());
    return file;
}

static void save_version(uint64_t version, size_t words) {
    content what = content_new(version, 2, words);
    save_content(&what, path);
    content_free(&what);
}

/* Reads tensor and slices. Gives whether the bytes are those of `version`; `*error` is the status of the first failure.
 */
static bool reads(const sft_file* file, size_t tensor, uint64_t version, sft_status* error) {
    static uint64_t buffer[WORDS];
    *error = sft_file_read_tensor(file, tensor, buffer, sizeof buffer);
    if (*error != SFT_OK) return false;
    const bool whole = tensor_is(buffer, sizeof buffer, version, tensor);
    uint64_t last = 0;
    const sft_range range = {WORDS - 1, WORDS, 1};
    *error = sft_file_read_slice(file, tensor, &range, 1, &last, sizeof last);
    return *error == SFT_OK && whole && last == buffer[WORDS - 1];
}

static bool data_is(const sft_file* file, size_t tensor, uint64_t version) {
    const void* bytes = NULL;
    return sft_file_get_data(file, tensor, &bytes) == SFT_OK && tensor_is(bytes, WORDS * 8, version, tensor);
}

/* Replaced by a save, by a rename, and removed: both backends have the old bytes. */
static void replaced_and_removed(sft_backend backend) {
    for (int how = 0; how < 3; how++) {
        save_version(1, WORDS);
        sft_file* file = opened(backend);
        if (how == 0) save_version(2, 10);
        if (how == 1) {
            char other[4200];
            snprintf(other, sizeof other, "%s.other", path);
            put_file(other, "no safetensors file", 19);
            if (rename(other, path) != 0) abort();
        }
        if (how == 2 && unlink(path) != 0) abort();
        for (size_t tensor = 0; tensor < 2; tensor++) {
            sft_status error;
            EXPECT(reads(file, tensor, 1, &error), "backend %u, way %d: %d", backend, how, error);
            EXPECT(backend == SFT_BACKEND_PREAD || data_is(file, tensor, 1), "way %d", how);
        }
        sft_file_free(file);
        changes++;
    }
}

/* Cut at places in header and data: pread says so, of what is gone alone. */
static void cut_short(void) {
    save_version(1, WORDS);
    struct stat told;
    if (stat(path, &told) != 0) abort();
    const off_t cuts[] = {
        told.st_size - 1, told.st_size - 4096, told.st_size / 2 + 100000, told.st_size / 2 - 100000, 100, 0};
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
        save_version(1, WORDS);
        sft_file* file = opened(SFT_BACKEND_PREAD);
        if (truncate(path, cuts[i]) != 0) abort();
        for (size_t tensor = 0; tensor < 2; tensor++) {
            sft_tensor_info info = SFT_TENSOR_INFO_INIT;
            sft_file_get_tensor_info(file, tensor, &info);
            sft_status error;
            const bool old = reads(file, tensor, 1, &error);
            EXPECT(old == (info.end <= (uint64_t)cuts[i]), "cut at %ld, tensor %zu", (long)cuts[i], tensor);
            EXPECT(old || (error == SFT_ERROR_FILE_CHANGED && strstr(sft_last_error_get_message(), path) != NULL),
                   "cut at %ld: %d, %s", (long)cuts[i], error, sft_last_error_get_message());
        }
        sft_file_free(file);
        sft_file* again = NULL;
        EXPECT(sft_file_open(path, NULL, &again) != SFT_OK, "cut at %ld", (long)cuts[i]);
        changes++;
    }
}

/* In a child: a mapped file that is cut short, then touched, or read. Gives how the child ended. */
static int cut_and_touched(bool touch, int read_status) {
    save_version(1, WORDS);
    fflush(stdout);
    const pid_t pid = fork();
    if (pid < 0) abort();
    if (pid == 0) {
        sft_file* file = opened(SFT_BACKEND_MMAP);
        if (truncate(path, 100000) != 0) _exit(3);
        if (touch) _exit(data_is(file, 1, 1) ? 4 : 5);
        sft_status error;
        _exit(reads(file, 1, 1, &error) ? 4 : error == read_status ? 0 : 5);
    }
    int status = 0;
    if (waitpid(pid, &status, 0) != pid) abort();
    return status;
}

/* Cut and grown again and again by another process while it is read and opened: an error or some bytes, no signal. */
static void under_fire(sft_backend backend, double for_seconds) {
    save_version(1, WORDS);
    struct stat told;
    if (stat(path, &told) != 0) abort();
    fflush(stdout);
    const pid_t pid = fork();
    if (pid < 0) abort();
    if (pid == 0) {
        uint64_t state = 5;
        for (;;) {
            if (truncate(path, (off_t)random_below(&state, (uint64_t)told.st_size)) != 0) _exit(1);
            usleep(50);
            if (truncate(path, told.st_size) != 0) _exit(1);
            usleep(500);
        }
    }
    long answers = 0, errors = 0, refused = 0;
    sft_file* file = NULL;
    for (const double until = seconds() + for_seconds; seconds() < until; answers++) {
        sft_status error;
        if (file == NULL) {
            sft_open_options options = SFT_OPEN_OPTIONS_INIT;
            options.backend = backend;
            error = sft_file_open(path, &options, &file);
            refused += error != SFT_OK;
            EXPECT(error == SFT_OK || (error >= SFT_ERROR_FILE_TOO_SMALL && error <= SFT_ERROR_FILE_CHANGED), "%d, %s",
                   error, sft_last_error_get_message());
            continue;
        }
        reads(file, (size_t)answers % 2, 1, &error);
        EXPECT(error == SFT_OK || error == SFT_ERROR_FILE_CHANGED, "%d, %s", error, sft_last_error_get_message());
        errors += error != SFT_OK;
        if (answers % 16 == 15) {
            sft_file_free(file);
            file = NULL;
        }
    }
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    sft_file_free(file);
    printf("cut and grown while it is read: %ld answers, refused: %ld, errors: %ld, signals: 0\n", answers, refused,
           errors);
}

static void odd_files(void) {
    static const char* const names[] = {"/proc/self/status",  "/proc/self/maps",
                                        "/proc/version",      "/proc/self/mem",
                                        "/proc/self/pagemap", "/sys/kernel/mm/transparent_hugepage/enabled"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        for (sft_backend backend = SFT_BACKEND_MMAP; backend <= SFT_BACKEND_PREAD; backend++) {
            if (access(names[i], R_OK) != 0) continue;
            sft_open_options options = SFT_OPEN_OPTIONS_INIT;
            options.backend = backend;
            sft_file* file = NULL;
            EXPECT(sft_file_open(names[i], &options, &file) != SFT_OK && file == NULL, "%s opened", names[i]);
            EXPECT(strstr(sft_last_error_get_message(), names[i]) != NULL, "%s", sft_last_error_get_message());
            changes++;
        }
    }
    /* No bytes, and holes alone, to the limit of the header and beyond. */
    const off_t sizes[] = {0, 7, 8, 9, 4096, 100000009, (off_t)5 << 30};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        put_file(path, "", 0);
        if (truncate(path, sizes[i]) != 0) abort();
        for (sft_backend backend = SFT_BACKEND_MMAP; backend <= SFT_BACKEND_PREAD; backend++) {
            sft_open_options options = SFT_OPEN_OPTIONS_INIT;
            options.backend = backend;
            sft_file* file = NULL;
            const sft_status status = sft_file_open(path, &options, &file);
            EXPECT(status == (sizes[i] < 8 ? SFT_ERROR_FILE_TOO_SMALL : SFT_ERROR_HEADER_JSON), "%ld bytes: %d, %s",
                   (long)sizes[i], status, sft_last_error_get_message());
            EXPECT(strstr(sft_last_error_get_message(), path) != NULL, "%s", sft_last_error_get_message());
            changes++;
        }
    }
}

/* A hole of 5 GiB with a few bytes behind it. */
static void beyond_four_gibibytes(void) {
    const uint64_t hole = (uint64_t)5 << 30, length = hole + 4096;
    char json[300];
    int size = snprintf(json, sizeof json, "{\"a\":{\"dtype\":\"U8\",\"shape\":[%llu],\"data_offsets\":[0,%llu]}}",
                        (unsigned long long)length, (unsigned long long)length);
    while (size % 8 != 0) json[size++] = ' ';
    const uint64_t header = (uint64_t)size;
    const int made = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    unsigned char end[4096];
    for (size_t i = 0; i < sizeof end; i++) end[i] = (unsigned char)(i * 7 + 1);
    if (made < 0 || write(made, &header, 8) != 8 || write(made, json, header) != (ssize_t)header ||
        pwrite(made, end, sizeof end, (off_t)(8 + header + hole)) != (ssize_t)sizeof end || close(made) != 0) {
        printf("changes: 5 GiB skipped, as this filesystem has no such files: %s\n", strerror(errno));
        return;
    }
    for (sft_backend backend = SFT_BACKEND_MMAP; backend <= SFT_BACKEND_PREAD; backend++) {
        sft_file* file = opened(backend);
        const sft_range ranges[] = {{hole - 100, length, 1},
                                    {length - 1, length, 1},
                                    {(uint64_t)4294967290u, 4294967302u, 1},
                                    {hole - 1, length, 3}};
        for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++) {
            static unsigned char part[8192];
            uint64_t shape = 0, nbytes = 0;
            EXPECT(sft_file_get_slice_size(file, 0, &ranges[i], 1, &shape, &nbytes) == SFT_OK &&
                       nbytes <= sizeof part && sft_file_read_slice(file, 0, &ranges[i], 1, part, nbytes) == SFT_OK,
                   "%s", sft_last_error_get_message());
            bool same = true;
            for (uint64_t k = 0; k < nbytes; k++) {
                const uint64_t place = ranges[i].start + k * ranges[i].step;
                same = same && part[k] == (place < hole ? 0 : end[place - hole]);
            }
            EXPECT(same, "backend %u, slice %zu", backend, i);
        }
        const void* bytes = NULL;
        EXPECT(backend == SFT_BACKEND_PREAD || (sft_file_get_data(file, 0, &bytes) == SFT_OK &&
                                                memcmp((const char*)bytes + hole, end, sizeof end) == 0),
               "the end of a mapping of 5 GiB");
        sft_file_free(file);
        changes++;
    }
    struct stat told;
    EXPECT(stat(path, &told) == 0 && told.st_blocks < 1000, "the hole has %ld blocks", (long)told.st_blocks);
    unlink(path);
}

int main(int count, char** arguments) {
    if (count != 2) return 2;
    use_directory(arguments[1]);
    snprintf(path, sizeof path, "%s", path_of("changed.safetensors"));
    replaced_and_removed(SFT_BACKEND_MMAP);
    replaced_and_removed(SFT_BACKEND_PREAD);
    cut_short();
    const int touched = cut_and_touched(true, 0), copied = cut_and_touched(false, SFT_ERROR_FILE_CHANGED);
    EXPECT(WIFSIGNALED(touched) && WTERMSIG(touched) == SIGBUS, "status %d", touched);
    EXPECT(copied == 0, "status %d", copied);
    odd_files();
    beyond_four_gibibytes();
    printf("changes: %ld, failed: %ld; a mapped file that is cut short: touched, signal %d; copied, an error\n",
           changes, failures(), WIFSIGNALED(touched) ? WTERMSIG(touched) : 0);
    under_fire(SFT_BACKEND_PREAD, 2);
    return failures() == 0 ? 0 : 1;
}
