/* Sixteen threads that load, save, slice, replace and remove files at paths that they share, for as long as they are
 * told. Each tensor that is read is compared word by word with the version that its file says it is of. Run with a
 * directory and a number of seconds. */
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common.h"

enum { THREADS = 16, PATHS = 6 };

enum operation { LOAD, READ_MANY, SLICE, SAVE, REPLACE, REMOVE, HOLD, SAVE_CHECKPOINT, LOAD_CHECKPOINT, OPERATIONS };
static const char* const names[OPERATIONS] = {"loads",      "reads of many",     "slices",
                                              "saves",      "renames",           "removals",
                                              "held files", "checkpoints saved", "checkpoints loaded"};

static atomic_long counts[OPERATIONS], absent;
static atomic_uint_fast64_t next_version = 1;
static double until;

static content fresh(uint64_t* state) {
    const size_t words = random_below(state, 20) == 0 ? 700000 : 3 + random_below(state, 9000);
    return content_new(atomic_fetch_add(&next_version, 1), 1 + random_below(state, 6), words);
}

static const char* some_path(uint64_t* state) {
    char name[40];
    snprintf(name, sizeof name, "shared%llu.safetensors", (unsigned long long)random_below(state, PATHS));
    return path_of(name);
}

static sft_file* open_some(uint64_t* state, const char* path) {
    sft_open_options options = SFT_OPEN_OPTIONS_INIT;
    options.backend = (sft_backend)random_below(state, 2);
    options.prefault = (sft_prefault)random_below(state, 3);
    sft_file* file = NULL;
    if (sft_file_open(path, &options, &file) != SFT_OK) {
        EXPECT(sft_last_error_get_os_error() == ENOENT, "%s", sft_last_error_get_message());
        atomic_fetch_add(&absent, 1);
    }
    return file;
}

static void load(uint64_t* state) {
    const char* path = some_path(state);
    const uint64_t version = file_version(path, (sft_backend)random_below(state, 2));
    EXPECT(version != WRONG && (version != 0 || sft_last_error_get_os_error() == ENOENT), "%s",
           sft_last_error_get_message());
    atomic_fetch_add(version == 0 ? &absent : &counts[LOAD], 1);
}

/* All tensors in one call; what is held for a while must stay what it was, whatever becomes of the path. */
static void read_many(uint64_t* state, bool hold) {
    sft_file* file = open_some(state, some_path(state));
    if (file == NULL) return;
    size_t count = 0;
    sft_file_get_tensor_count(file, &count);
    uint64_t version = 0;
    for (int pass = 0; pass <= hold; pass++) {
        sft_read_request wanted[8];
        for (size_t i = 0; i < count; i++) {
            sft_tensor_info info = SFT_TENSOR_INFO_INIT;
            sft_file_get_tensor_info(file, i, &info);
            wanted[i] = (sft_read_request){i, malloc(info.nbytes), info.nbytes};
        }
        EXPECT(sft_file_read_tensors(file, wanted, count) == SFT_OK, "%s", sft_last_error_get_message());
        if (version == 0) version = *(uint64_t*)wanted[0].buffer;
        for (size_t i = 0; i < count; i++) {
            EXPECT(tensor_is(wanted[i].buffer, wanted[i].nbytes, version, i), "tensor %zu of version %llu", i,
                   (unsigned long long)version);
            free(wanted[i].buffer);
        }
        if (pass < hold) usleep((useconds_t)random_below(state, 20000));
    }
    sft_file_free(file);
    atomic_fetch_add(&counts[hold ? HOLD : READ_MANY], 1);
}

/* A slice of the last tensor, against the whole of it. */
static void slice(uint64_t* state) {
    sft_file* file = open_some(state, some_path(state));
    if (file == NULL) return;
    size_t count = 0;
    sft_file_get_tensor_count(file, &count);
    sft_tensor_info info = SFT_TENSOR_INFO_INIT;
    sft_file_get_tensor_info(file, count - 1, &info);
    uint64_t *whole = malloc(info.nbytes), *part = malloc(info.nbytes);
    const uint64_t words = info.shape[0], start = random_below(state, words);
    const sft_range range = {start, start + random_below(state, words - start + 1), 1 + random_below(state, 5)};
    uint64_t shape = 0, nbytes = 0;
    EXPECT(sft_file_get_slice_size(file, count - 1, &range, 1, &shape, &nbytes) == SFT_OK &&
               sft_file_read_slice(file, count - 1, &range, 1, part, nbytes) == SFT_OK &&
               sft_file_read_tensor(file, count - 1, whole, info.nbytes) == SFT_OK,
           "%s", sft_last_error_get_message());
    EXPECT(tensor_is(whole, info.nbytes, whole[0], count - 1), "version %llu", (unsigned long long)whole[0]);
    bool same = true;
    for (uint64_t i = 0; i < shape; i++) same = same && part[i] == whole[range.start + i * range.step];
    EXPECT(same, "a slice of version %llu", (unsigned long long)whole[0]);
    free(whole);
    free(part);
    sft_file_free(file);
    atomic_fetch_add(&counts[SLICE], 1);
}

static void save(uint64_t* state, size_t thread, bool by_rename) {
    content what = fresh(state);
    const char* path = some_path(state);
    if (by_rename) {
        char name[40];
        snprintf(name, sizeof name, "own%zu", thread);
        const char* own = path_of(name);
        save_content(&what, own);
        EXPECT(rename(own, path) == 0, "%s", strerror(errno));
    } else {
        save_content(&what, path);
    }
    content_free(&what);
    atomic_fetch_add(&counts[by_rename ? REPLACE : SAVE], 1);
}

/* Both threads of a pair save to one directory, and load from it. */
static void checkpoint(uint64_t* state, size_t thread) {
    static atomic_bool is_saved[THREADS / 2];
    const size_t pair = thread / 2;
    char name[40];
    snprintf(name, sizeof name, "checkpoint%zu", pair);
    const char* directory = path_of(name);
    if (random_below(state, 2) == 0) {
        content what = fresh(state);
        sft_writer* writer = content_writer(&what);
        sft_sharded_options options = SFT_SHARDED_OPTIONS_INIT;
        options.max_shard_size = what.words * 8 * (1 + random_below(state, 3));
        EXPECT(sft_writer_write_sharded(writer, directory, &options) == SFT_OK, "%s", sft_last_error_get_message());
        atomic_store(&is_saved[pair], true);
        sft_writer_free(writer);
        content_free(&what);
        atomic_fetch_add(&counts[SAVE_CHECKPOINT], 1);
        return;
    }
    const bool was_saved = atomic_load(&is_saved[pair]);
    sft_status status = SFT_OK;
    const uint64_t version = checkpoint_open_version(directory, &status);
    EXPECT(version != WRONG, "torn: %s", sft_last_error_get_message());
    if (status == SFT_OK) {
        atomic_fetch_add(&counts[LOAD_CHECKPOINT], 1);
        return;
    }
    atomic_fetch_add(&absent, 1);
    /* Before the first save there is no directory, or an empty one; later there is a checkpoint at any time, but it may
     * be replaced too often to be opened. */
    const char* said = sft_last_error_get_message();
    const bool is_absent = status == SFT_ERROR_IO && sft_last_error_get_os_error() == ENOENT;
    const bool is_empty = status == SFT_ERROR_INDEX && strstr(said, "holds no checkpoint") != NULL;
    EXPECT(strstr(said, directory) != NULL &&
               (status == SFT_ERROR_FILE_CHANGED || (!was_saved && (is_absent || is_empty))),
           "status %d: %s", status, said);
}

static void* work(void* argument) {
    const size_t thread = (size_t)argument;
    uint64_t state = thread * 977 + 3;
    while (seconds() < until && failures() < 20) {
        switch (random_below(&state, 16)) {
            case 0:
            case 1:
                save(&state, thread, false);
                break;
            case 2:
                save(&state, thread, true);
                break;
            case 3:
                if (unlink(some_path(&state)) == 0) atomic_fetch_add(&counts[REMOVE], 1);
                break;
            case 4:
            case 5:
                checkpoint(&state, thread);
                break;
            case 6:
            case 7:
                read_many(&state, true);
                break;
            case 8:
            case 9:
            case 10:
                read_many(&state, false);
                break;
            case 11:
            case 12:
                slice(&state);
                break;
            default:
                load(&state);
        }
    }
    return NULL;
}

int main(int count, char** arguments) {
    if (count != 3) return 2;
    use_directory(arguments[1]);
    const double length = atof(arguments[2]);
    uint64_t state = 1;
    for (int i = 0; i < 4 * PATHS; i++) save(&state, THREADS, false);
    until = seconds() + length;
    pthread_t threads[THREADS];
    for (size_t i = 0; i < THREADS; i++) {
        if (pthread_create(&threads[i], NULL, work, (void*)i) != 0) abort();
    }
    for (size_t i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    EXPECT(leftovers(arguments[1]) == 0, "%d leftovers", leftovers(arguments[1]));
    for (size_t pair = 0; pair < THREADS / 2; pair++) {
        char name[40];
        snprintf(name, sizeof name, "checkpoint%zu", pair);
        /* -1 where none was saved. */
        EXPECT(leftovers(path_of(name)) <= 0, "%s: %d leftovers", name, leftovers(path_of(name)));
    }
    for (int i = 0; i < OPERATIONS; i++) EXPECT(atomic_load(&counts[i]) > 0, "no %s", names[i]);
    long total = 0;
    for (int i = 0; i < OPERATIONS; i++) total += atomic_load(&counts[i]);
    printf("soak: %d threads, %.0f s, %ld operations (", THREADS, length, total);
    for (int i = 0; i < OPERATIONS; i++) printf("%s%s %ld", i == 0 ? "" : ", ", names[i], atomic_load(&counts[i]));
    printf("; not there %ld), failed: %ld\n", atomic_load(&absent), failures());
    return failures() == 0 ? 0 : 1;
}
