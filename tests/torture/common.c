/* See common.h. */
#include "common.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static atomic_long failed;
static char directory_of_all[2048];

static void die(const char* what) {
    fprintf(stderr, "%s: %s; %s\n", what, strerror(errno), sft_last_error_get_message());
    abort();
}

bool does_not_hold(const char* what, const char* file, int line, const char* format, ...) {
    atomic_fetch_add(&failed, 1);
    char detail[6000];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(detail, sizeof detail, format, arguments);
    va_end(arguments);
    printf("%s:%d: %s: %s\n", file, line, what, detail);
    fflush(stdout);
    return false;
}

long failures(void) { return atomic_load(&failed); }

static uint64_t word(uint64_t version, size_t tensor, size_t place, size_t tensors, size_t words) {
    switch (place) {
        case 0:
            return version;
        case 1:
            return tensors;
        case 2:
            return words;
        default:
            return version * 0x9E3779B97F4A7C15u + tensor * 0xC2B2AE3D27D4EB4Fu + place * 0x165667B19E3779F9u;
    }
}

content content_new(uint64_t version, size_t tensors, size_t words) {
    content made = {version, tensors, words, malloc(tensors * words * 8)};
    if (made.data == NULL) die("malloc");
    for (size_t t = 0; t < tensors; t++) {
        for (size_t i = 0; i < words; i++) made.data[t * words + i] = word(version, t, i, tensors, words);
    }
    return made;
}

void content_free(content* what) {
    free(what->data);
    what->data = NULL;
}

sft_writer* content_writer(const content* what) {
    sft_writer* writer = NULL;
    if (sft_writer_new(&writer) != SFT_OK) die("sft_writer_new");
    const uint64_t shape[] = {what->words};
    for (size_t t = 0; t < what->tensors; t++) {
        char name[32];
        const int length = snprintf(name, sizeof name, "t%04zu", t);
        if (sft_writer_add_tensor(writer, name, (size_t)length, SFT_DTYPE_U64, shape, 1, what->data + t * what->words,
                                  what->words * 8) != SFT_OK) {
            die("sft_writer_add_tensor");
        }
    }
    return writer;
}

void save_content(const content* what, const char* path) {
    sft_writer* writer = content_writer(what);
    const sft_status status = sft_writer_write_file(writer, path, NULL);
    EXPECT(status == SFT_OK, "%s", sft_last_error_get_message());
    sft_writer_free(writer);
}

sft_status content_write_incrementally(const content* what, const char* path, const sft_save_options* options) {
    sft_writer* writer = NULL;
    sft_incremental_writer* writing = NULL;
    if (sft_writer_new(&writer) != SFT_OK) die("sft_writer_new");
    const uint64_t shape[] = {what->words};
    const size_t nbytes = what->words * 8, half = nbytes / 2;
    char name[32];
    for (size_t t = 0; t < what->tensors; t++) {
        const size_t length = (size_t)snprintf(name, sizeof name, "t%04zu", t);
        if (sft_writer_declare_tensor(writer, name, length, SFT_DTYPE_U64, shape, 1) != SFT_OK) die("declare");
    }
    sft_status status = sft_incremental_writer_create(writer, path, options, &writing);
    for (size_t t = what->tensors; status == SFT_OK && t-- > 0;) {
        const size_t length = (size_t)snprintf(name, sizeof name, "t%04zu", t);
        const unsigned char* bytes = (const unsigned char*)(what->data + t * what->words);
        if (t + 1 < what->tensors) {
            status = sft_incremental_writer_write_tensor(writing, name, length, bytes, nbytes);
            continue;
        }
        status = sft_incremental_writer_write_part(writing, name, length, half, bytes + half, nbytes - half);
        if (status == SFT_OK) status = sft_incremental_writer_write_part(writing, name, length, 0, bytes, half);
    }
    if (status == SFT_OK) status = sft_incremental_writer_commit(writing);
    sft_incremental_writer_free(writing);
    sft_writer_free(writer);
    return status;
}

bool tensor_is(const void* bytes, size_t nbytes, uint64_t version, size_t tensor) {
    const uint64_t* words = bytes;
    if (nbytes < 24 || words[0] != version || words[2] != nbytes / 8) return false;
    for (size_t i = 3; i < nbytes / 8; i++) {
        if (words[i] != word(version, tensor, i, 0, 0)) return false;
    }
    return true;
}

/* The version of the tensors of one file, of which a content has `*tensors` (0: not known yet). Adds how many there
 * are here to `*seen`. */
static uint64_t version_of(const sft_file* file, uint64_t expected, uint64_t* tensors, uint64_t* seen) {
    size_t count = 0;
    sft_file_get_tensor_count(file, &count);
    for (size_t i = 0; i < count; i++) {
        sft_tensor_info info = SFT_TENSOR_INFO_INIT;
        if (sft_file_get_tensor_info(file, i, &info) != SFT_OK || info.nbytes < 24 || info.name.length != 5)
            return WRONG;
        char digits[5] = "";
        memcpy(digits, info.name.data + 1, 4);
        const size_t tensor = strtoul(digits, NULL, 10);
        uint64_t* own = NULL;
        const void* bytes = NULL;
        if (sft_file_get_data(file, i, &bytes) != SFT_OK) {
            own = malloc(info.nbytes);
            if (own == NULL) die("malloc");
            bytes = own;
            if (sft_file_read_tensor(file, i, own, info.nbytes) != SFT_OK) {
                free(own);
                return WRONG;
            }
        }
        const uint64_t* words = bytes;
        if (expected == 0) expected = words[0];
        if (*tensors == 0) *tensors = words[1];
        const bool whole = words[1] == *tensors && tensor_is(bytes, info.nbytes, expected, tensor);
        free(own);
        if (!whole) return WRONG;
    }
    *seen += count;
    return expected;
}

uint64_t file_version(const char* path, sft_backend backend) {
    sft_open_options options = SFT_OPEN_OPTIONS_INIT;
    options.backend = backend;
    sft_file* file = NULL;
    if (sft_file_open(path, &options, &file) != SFT_OK) return 0;
    uint64_t tensors = 0, seen = 0;
    const uint64_t version = version_of(file, 0, &tensors, &seen);
    sft_file_free(file);
    return version != 0 && tensors == seen ? version : WRONG;
}

uint64_t checkpoint_version(const char* path) {
    sft_status ignored;
    return checkpoint_open_version(path, &ignored);
}

uint64_t checkpoint_open_version(const char* path, sft_status* status) {
    sft_checkpoint* checkpoint = NULL;
    *status = sft_checkpoint_open(path, NULL, &checkpoint);
    if (*status != SFT_OK) return 0;
    size_t shards = 0;
    sft_checkpoint_get_shard_count(checkpoint, &shards);
    uint64_t version = 0, tensors = 0, seen = 0;
    for (size_t shard = 0; shard < shards && version != WRONG; shard++) {
        sft_str name;
        const sft_file* file = NULL;
        sft_checkpoint_get_shard(checkpoint, shard, &name, &file);
        version = version_of(file, version, &tensors, &seen);
    }
    sft_checkpoint_free(checkpoint);
    return version != 0 && tensors == seen ? version : WRONG;
}

void use_directory(const char* directory) { snprintf(directory_of_all, sizeof directory_of_all, "%s", directory); }

const char* path_of(const char* name) {
    static _Thread_local char paths[8][4096];
    static _Thread_local unsigned next;
    char* path = paths[next++ % 8];
    snprintf(path, sizeof paths[0], "%s/%s", directory_of_all, name);
    return path;
}

static int count_of(const char* directory, const char* beginning) {
    DIR* opened = opendir(directory);
    if (opened == NULL) return -1;
    int count = 0;
    for (const struct dirent* entry; (entry = readdir(opened)) != NULL;) {
        const bool is_dots = strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0;
        count += !is_dots && strncmp(entry->d_name, beginning, strlen(beginning)) == 0;
    }
    closedir(opened);
    return count;
}

int entries(const char* directory) { return count_of(directory, ""); }

int leftovers(const char* directory) { return count_of(directory, ".safetensors-"); }

static int remove_one(const char* path, const struct stat* told, int kind, struct FTW* place) {
    (void)told, (void)kind, (void)place;
    return remove(path);
}

void remove_all(const char* path) {
    if (nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS) != 0 && errno != ENOENT) die(path);
}

void put_file(const char* path, const void* bytes, size_t nbytes) {
    FILE* file = fopen(path, "wb");
    if (file == NULL || fwrite(bytes, 1, nbytes, file) != nbytes || fclose(file) != 0) die(path);
}

figures figures_now(void) {
    figures now = {0, entries("/proc/self/fd"), 0, 0};
    char line[512];
    FILE* status = fopen("/proc/self/status", "r");
    if (status == NULL) die("/proc/self/status");
    while (fgets(line, sizeof line, status) != NULL) {
        sscanf(line, "Threads: %ld", &now.threads);
    }
    fclose(status);
    /* Counted page by page: VmRSS of the former file is off by as much as each processor has not told yet. */
    FILE* pages = fopen("/proc/self/smaps_rollup", "r");
    if (pages == NULL) die("/proc/self/smaps_rollup");
    while (fgets(line, sizeof line, pages) != NULL) {
        if (sscanf(line, "Rss: %ld kB", &now.resident) == 1) now.resident *= 1024;
    }
    fclose(pages);
    FILE* maps = fopen("/proc/self/maps", "r");
    if (maps == NULL) die("/proc/self/maps");
    while (fgets(line, sizeof line, maps) != NULL) now.mappings += strchr(line, '\n') != NULL;
    fclose(maps);
    return now;
}

double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

uint64_t random_below(uint64_t* state, uint64_t limit) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (*state >> 33) % limit;
}
