/* Thread safety: handles that several threads use at once, and functions without a handle. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"

/* Threads take no lock of the test: it would synchronize them, and hide data races of the library from
 * ThreadSanitizer. */
enum { THREADS = 8, ROUNDS = 25, ROWS = 40, COLUMNS = 30, TAIL = 1001 };

/* Large enough for a read, and for prefault, to use several threads. */
enum { LARGE = (18 << 20) + 5 };

/* The tensors that every thread reads or writes, filled before the first thread starts. */
static unsigned char large[LARGE], tail[TAIL];
static int32_t matrix[ROWS][COLUMNS];
static const uint64_t large_shape[] = {LARGE}, tail_shape[] = {TAIL}, matrix_shape[] = {ROWS, COLUMNS};
static const uint64_t none_shape[] = {0, 5};

static void fill(void) {
    for (size_t i = 0; i < LARGE; i++) {
        large[i] = (unsigned char)(i % 251);
    }
    for (size_t i = 0; i < TAIL; i++) {
        tail[i] = (unsigned char)(i * 7);
    }
    for (int row = 0; row < ROWS; row++) {
        for (int column = 0; column < COLUMNS; column++) {
            matrix[row][column] = row * 1000 + column;
        }
    }
}

/* In file order: sorted by dtype, then by name. */
enum { NONE, MATRIX, LARGE_ONE, TAIL_ONE, TENSORS };

static sft_writer* new_writer(bool with_large) {
    sft_writer* writer = NULL;
    CHECK_OK(sft_writer_new(&writer));
    CHECK_OK(sft_writer_add_tensor(writer, "tail", 4, SFT_DTYPE_U8, tail_shape, 1, tail, sizeof tail));
    CHECK_OK(sft_writer_add_tensor(writer, "matrix", 6, SFT_DTYPE_I32, matrix_shape, 2, matrix, sizeof matrix));
    CHECK_OK(sft_writer_add_tensor(writer, "none", 4, SFT_DTYPE_I64, none_shape, 2, NULL, 0));
    if (with_large) {
        CHECK_OK(sft_writer_add_tensor(writer, "large", 5, SFT_DTYPE_U8, large_shape, 1, large, sizeof large));
    }
    CHECK_OK(sft_writer_add_metadata(writer, "format", 6, "pt", 2));
    CHECK_OK(sft_writer_add_metadata(writer, "made by", 7, "threads", 7));
    return writer;
}

/* A thread's number and paths, and the handles that all threads share. */
struct worker {
    pthread_t thread;
    int number;
    bool in_memory;
    const sft_file* file;
    const sft_writer* writer;
    const sft_prefetch* prefetch;
    char own_path[4096], shared_path[4096];
};

/* Runs `body` on all threads, each with a copy of `common` that has its own number and paths. */
static void run(void* (*body)(void*), struct worker common) {
    static struct worker workers[THREADS];
    for (int i = 0; i < THREADS; i++) {
        char name[32];
        snprintf(name, sizeof name, "own-%d.safetensors", i);
        workers[i] = common;
        workers[i].number = i;
        snprintf(workers[i].own_path, sizeof workers[i].own_path, "%s", path_of(name));
        snprintf(workers[i].shared_path, sizeof workers[i].shared_path, "%s", path_of("threads.safetensors"));
    }
    for (int i = 0; i < THREADS; i++) {
        CHECK(pthread_create(&workers[i].thread, NULL, body, &workers[i]) == 0);
    }
    for (int i = 0; i < THREADS; i++) {
        CHECK(pthread_join(workers[i].thread, NULL) == 0);
        unlink(workers[i].own_path);
    }
}

static void read_header(const sft_file* file) {
    const char* const in_order[TENSORS] = {"none", "matrix", "large", "tail"};
    const size_t by_name[TENSORS] = {LARGE_ONE, MATRIX, NONE, TAIL_ONE};
    size_t count = 0, index = 0;
    int32_t present = 0;
    sft_str key, value;
    sft_tensor_info info = SFT_TENSOR_INFO_INIT;
    CHECK_OK(sft_file_get_tensor_count(file, &count));
    CHECK(count == TENSORS);
    for (size_t i = 0; i < TENSORS; i++) {
        CHECK_OK(sft_file_get_tensor_info(file, i, &info));
        CHECK(text_is(info.name, in_order[i]));
        CHECK_OK(sft_file_find_tensor(file, in_order[i], strlen(in_order[i]), &index));
        CHECK(index == i);
        CHECK_OK(sft_file_get_sorted_index(file, i, &index));
        CHECK(index == by_name[i]);
    }
    CHECK(info.dtype == SFT_DTYPE_U8 && info.rank == 1 && info.shape[0] == TAIL && info.nbytes == TAIL);
    CHECK_OK(sft_file_has_metadata(file, &present));
    CHECK_OK(sft_file_get_metadata_count(file, &count));
    CHECK(present == 1 && count == 2);
    CHECK_OK(sft_file_get_metadata_entry(file, 1, &key, &value));
    CHECK(text_is(key, "made by") && text_is(value, "threads"));
    CHECK_OK(sft_file_find_metadata(file, "format", 6, &value));
    CHECK(text_is(value, "pt"));
}

static void read_small(const sft_file* file, int number) {
    int32_t whole[ROWS][COLUMNS], part[ROWS / 3][COLUMNS / 2];
    unsigned char bytes[TAIL];
    memset(whole, 0xff, sizeof whole);
    CHECK_OK(sft_file_read_tensor(file, MATRIX, whole, sizeof whole));
    CHECK(memcmp(whole, matrix, sizeof matrix) == 0);

    memset(whole, 0xff, sizeof whole);
    memset(bytes, 0xff, sizeof bytes);
    const sft_read_request reads[] = {{MATRIX, whole, sizeof whole}, {NONE, NULL, 0}, {TAIL_ONE, bytes, sizeof bytes}};
    CHECK_OK(sft_file_read_tensors(file, reads, 3));
    CHECK(memcmp(whole, matrix, sizeof matrix) == 0 && memcmp(bytes, tail, sizeof tail) == 0);

    /* Each thread reads another slice. */
    const uint64_t first_row = (uint64_t)number, first_column = (uint64_t)number % 2;
    const sft_range ranges[] = {{first_row, first_row + ROWS / 3, 1}, {first_column, COLUMNS, 2}};
    uint64_t shape[2] = {0, 0}, nbytes = 0;
    CHECK_OK(sft_file_get_slice_size(file, MATRIX, ranges, 2, shape, &nbytes));
    CHECK(shape[0] == ROWS / 3 && shape[1] == COLUMNS / 2 && nbytes == sizeof part);
    memset(part, 0xff, sizeof part);
    CHECK_OK(sft_file_read_slice(file, MATRIX, ranges, 2, part, sizeof part));
    bool same = true;
    for (size_t row = 0; row < ROWS / 3; row++) {
        for (size_t column = 0; column < COLUMNS / 2; column++) {
            same = same && part[row][column] == matrix[first_row + row][first_column + 2 * column];
        }
    }
    CHECK(same);
}

/* Returns the size of a thread's share of the large tensor, and sets `*start`: comparing all of it is slow under a
 * sanitizer. */
static size_t share_of(int number, size_t* start) {
    *start = (size_t)number * (LARGE / THREADS);
    return number == THREADS - 1 ? LARGE - *start : LARGE / THREADS;
}

static void read_borrowed(const sft_file* file, bool in_memory, int number) {
    size_t start;
    const size_t length = share_of(number, &start);
    for (size_t i = 0; i < TENSORS; i++) {
        const void* data = NULL;
        if (!in_memory) {
            CHECK_STATUS(sft_file_get_data(file, i, &data), SFT_ERROR_INVALID_ARGUMENT);
            continue;
        }
        CHECK_OK(sft_file_get_data(file, i, &data));
        CHECK(data != NULL);
        CHECK(i != MATRIX || memcmp(data, matrix, sizeof matrix) == 0);
        CHECK(i != TAIL_ONE || memcmp(data, tail, sizeof tail) == 0);
        CHECK(i != LARGE_ONE || memcmp((const unsigned char*)data + start, large + start, length) == 0);
    }
}

/* Checks the thread's share of the large tensor; two threads check all of it. */
static void read_large(const sft_file* file, int number) {
    unsigned char* read = calloc(1, LARGE);
    size_t start;
    const size_t length = share_of(number, &start);
    const sft_range range = {start, start + length, 1};
    CHECK_OK(sft_file_read_slice(file, LARGE_ONE, &range, 1, read, length));
    CHECK(memcmp(read, large + start, length) == 0);
    memset(read, 0, length);
    if (number == 0) {
        CHECK_OK(sft_file_read_tensor(file, LARGE_ONE, read, LARGE));
        CHECK(memcmp(read, large, LARGE) == 0);
    } else if (number == 1) {
        unsigned char bytes[TAIL] = {0};
        const sft_read_request reads[] = {{LARGE_ONE, read, LARGE}, {TAIL_ONE, bytes, sizeof bytes}};
        CHECK_OK(sft_file_read_tensors(file, reads, 2));
        CHECK(memcmp(read, large, LARGE) == 0 && memcmp(bytes, tail, TAIL) == 0);
    }
    free(read);
}

/* Checks that the last error is per thread. */
static void fail_alone(const sft_file* file, int number) {
    char name[32];
    size_t index;
    snprintf(name, sizeof name, "absent of %d", number);
    CHECK_STATUS(sft_file_find_tensor(file, name, strlen(name), &index), SFT_ERROR_TENSOR_NOT_FOUND);
    CHECK(strstr(sft_last_error_get_message(), name) != NULL && sft_last_error_get_os_error() == 0);
}

static void use_no_handle(void) {
    size_t threads = 99;
    sft_dtype dtype = 99;
    uint64_t nbytes = 0;
    CHECK(strcmp(sft_get_version(), SFT_VERSION_STRING) == 0);
    CHECK_OK(sft_set_threads(3));
    CHECK_OK(sft_get_threads(&threads));
    CHECK(threads == 3);
    sft_direct direct = 99;
    CHECK_OK(sft_set_direct(SFT_DIRECT_NEVER));
    CHECK_OK(sft_get_direct(&direct));
    CHECK(direct == SFT_DIRECT_NEVER);
    CHECK(strcmp(sft_status_get_name(SFT_ERROR_IO), "SFT_ERROR_IO") == 0 &&
          *sft_status_get_message(SFT_ERROR_IO) != '\0');
    CHECK_OK(sft_dtype_parse("BF16", &dtype));
    CHECK(dtype == SFT_DTYPE_BF16 && sft_dtype_get_bits(dtype) == 16 && strcmp(sft_dtype_get_code(dtype), "BF16") == 0);
    CHECK_OK(sft_dtype_compute_nbytes(SFT_DTYPE_I32, matrix_shape, 2, &nbytes));
    CHECK(nbytes == sizeof matrix);
}

static void* read_one_file(void* argument) {
    const struct worker* worker = argument;
    for (int round = 0; round < ROUNDS; round++) {
        read_header(worker->file);
        read_small(worker->file, worker->number);
        fail_alone(worker->file, worker->number);
        use_no_handle();
    }
    read_borrowed(worker->file, worker->in_memory, worker->number);
    read_large(worker->file, worker->number);
    return NULL;
}

/* Opens the same file on each thread. */
static void* open_one_path(void* argument) {
    const struct worker* worker = argument;
    for (int round = 0; round < ROUNDS; round++) {
        sft_open_options options = SFT_OPEN_OPTIONS_INIT;
        options.backend = (sft_backend)(round % 2);
        options.prefault = (sft_prefault)(round % 3);
        sft_file* file = NULL;
        CHECK_OK(sft_file_open(worker->shared_path, &options, &file));
        read_small(file, worker->number);
        if (round % 2 == 0) {
            CHECK_OK(sft_file_close(file));
        }
        sft_file_free(file);
    }
    return NULL;
}

static void test_readers(void) {
    sft_writer* writer = new_writer(true);
    uint64_t size = 0;
    CHECK_OK(sft_writer_get_size(writer, NULL, &size));
    unsigned char* bytes = malloc(size);
    CHECK_OK(sft_writer_write_buffer(writer, NULL, bytes, size));
    CHECK_OK(sft_writer_write_file(writer, path_of("threads.safetensors"), NULL));
    sft_writer_free(writer);

    const sft_backend backends[] = {SFT_BACKEND_MMAP, SFT_BACKEND_PREAD};
    for (size_t i = 0; i < 2; i++) {
        sft_open_options options = SFT_OPEN_OPTIONS_INIT;
        options.backend = backends[i];
        options.prefault = SFT_PREFAULT_BACKGROUND;
        sft_file* file = NULL;
        CHECK_OK(sft_file_open(path_of("threads.safetensors"), &options, &file));
        run(read_one_file, (struct worker){.file = file, .in_memory = backends[i] == SFT_BACKEND_MMAP});
        sft_file_free(file);
    }
    sft_file* file = NULL;
    CHECK_OK(sft_file_open_buffer(bytes, size, &file));
    run(read_one_file, (struct worker){.file = file, .in_memory = true});
    sft_file_free(file);
    free(bytes);
    run(open_one_path, (struct worker){.file = NULL});
    unlink(path_of("threads.safetensors"));
}

enum { REQUESTS = 200 };

/* Of the requests of one prefetch: their buffers, and how often each was handed out. */
static unsigned char prefetched[REQUESTS][TAIL], prefetched_large[LARGE];
static unsigned char times[REQUESTS + 1];

/* Takes what has landed, each time with the last request once more. */
static void* take_from_one_prefetch(void* argument) {
    const struct worker* worker = argument;
    sft_prefetch_state state = SFT_PREFETCH_LANDED;
    size_t request = 0;
    CHECK_OK(sft_prefetch_next(worker->prefetch, 60000, &state, &request));
    while (state == SFT_PREFETCH_LANDED) {
        /* Only this thread has the buffer now. */
        CHECK(request == REQUESTS ? memcmp(prefetched_large, large, LARGE) == 0
                                  : memcmp(prefetched[request], tail, TAIL) == 0);
        times[request]++;
        CHECK_STATUS(sft_prefetch_take(worker->prefetch, request, 60000, &state), SFT_ERROR_INVALID_ARGUMENT);
        CHECK_OK(sft_prefetch_next(worker->prefetch, 60000, &state, &request));
    }
    CHECK(state == SFT_PREFETCH_END);
    return NULL;
}

static void test_prefetch_on_threads(void) {
    sft_file* file = NULL;
    sft_prefetch* prefetch = NULL;
    sft_prefetch_request requests[REQUESTS + 1];
    sft_writer* writer = new_writer(true);
    CHECK_OK(sft_writer_write_file(writer, path_of("threads.safetensors"), NULL));
    sft_writer_free(writer);
    CHECK_OK(sft_file_open(path_of("threads.safetensors"), NULL, &file));
    for (size_t i = 0; i < REQUESTS; i++) {
        requests[i] = (sft_prefetch_request){file, TAIL_ONE, NULL, 0, prefetched[i], TAIL};
    }
    requests[REQUESTS] = (sft_prefetch_request){file, LARGE_ONE, NULL, 0, prefetched_large, LARGE};
    CHECK_OK(sft_prefetch_start(requests, REQUESTS + 1, &prefetch));
    run(take_from_one_prefetch, (struct worker){.prefetch = prefetch});
    for (size_t i = 0; i <= REQUESTS; i++) {
        CHECK(times[i] == 1);
    }
    sft_prefetch_free(prefetch);
    sft_file_free(file);
}

/* Returns whether the file at `path` contains exactly these bytes. */
static bool has_bytes(const char* path, const void* bytes, size_t length) {
    FILE* stream = fopen(path, "rb");
    char* found = malloc(length + 1);
    const bool same = stream != NULL && fread(found, 1, length + 1, stream) == length && !memcmp(found, bytes, length);
    free(found);
    return stream != NULL && fclose(stream) == 0 && same;
}

/* Writes to memory, to a file of the thread's own, and to a file that all threads replace. */
static void write_everywhere(const sft_writer* writer, const struct worker* worker) {
    uint64_t size = 0;
    CHECK_OK(sft_writer_get_size(writer, NULL, &size));
    unsigned char* bytes = malloc(size);
    CHECK_OK(sft_writer_write_buffer(writer, NULL, bytes, size));
    CHECK_OK(sft_writer_write_file(writer, worker->own_path, NULL));
    CHECK(has_bytes(worker->own_path, bytes, size));
    CHECK_OK(sft_writer_write_file(writer, worker->shared_path, NULL));
    sft_file* file = NULL;
    CHECK_OK(sft_file_open(worker->shared_path, NULL, &file));
    sft_file_free(file);
    free(bytes);
}

static void* write_with_one_writer(void* argument) {
    const struct worker* worker = argument;
    for (int round = 0; round < ROUNDS; round++) {
        write_everywhere(worker->writer, worker);
    }
    return NULL;
}

static void* write_with_own_writers(void* argument) {
    const struct worker* worker = argument;
    for (int round = 0; round < ROUNDS; round++) {
        /* Two threads write the large tensor once, which takes several system calls. */
        sft_writer* writer = new_writer(round == 0 && worker->number < 2);
        write_everywhere(writer, worker);
        sft_writer_free(writer);
    }
    return NULL;
}

void test_threads(void) {
    fill();
    test_readers();
    test_prefetch_on_threads();
    sft_writer* writer = new_writer(false);
    run(write_with_one_writer, (struct worker){.writer = writer});
    sft_writer_free(writer);
    run(write_with_own_writers, (struct worker){.file = NULL});
    unlink(path_of("threads.safetensors"));
    CHECK_OK(sft_set_threads(0));
}
