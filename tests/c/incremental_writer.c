/* sft_incremental_writer: writes files tensor by tensor. */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"

static const uint64_t matrix_shape[] = {3, 4};
static const float matrix[12] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
static const uint64_t bytes_shape[] = {3};
static const unsigned char bytes[3] = {7, 8, 9};
static const uint64_t none_shape[] = {0, 5};

/* Returns a writer of three tensors, which are added with their data or only declared. */
static sft_writer* new_writer(bool with_data) {
    sft_writer* writer = NULL;
    CHECK_OK(sft_writer_new(&writer));
    CHECK_OK(sft_writer_add_metadata(writer, "format", 6, "pt", 2));
    if (with_data) {
        CHECK_OK(sft_writer_add_tensor(writer, "bytes", 5, SFT_DTYPE_U8, bytes_shape, 1, bytes, sizeof bytes));
        CHECK_OK(sft_writer_add_tensor(writer, "matrix", 6, SFT_DTYPE_F32, matrix_shape, 2, matrix, sizeof matrix));
        CHECK_OK(sft_writer_add_tensor(writer, "none", 4, SFT_DTYPE_I64, none_shape, 2, NULL, 0));
    } else {
        CHECK_OK(sft_writer_declare_tensor(writer, "bytes", 5, SFT_DTYPE_U8, bytes_shape, 1));
        CHECK_OK(sft_writer_declare_tensor(writer, "matrix", 6, SFT_DTYPE_F32, matrix_shape, 2));
        CHECK_OK(sft_writer_declare_tensor(writer, "none", 4, SFT_DTYPE_I64, none_shape, 2));
    }
    return writer;
}

/* Returns an incremental writer of "incremental.safetensors"; the sft_writer is freed already. */
static sft_incremental_writer* new_incremental(void) {
    sft_writer* writer = new_writer(false);
    sft_incremental_writer* incremental = NULL;
    CHECK_OK(sft_incremental_writer_create(writer, path_of("incremental.safetensors"), NULL, &incremental));
    sft_writer_free(writer);
    return incremental;
}

static void check_file(const char* name, const void* expected, size_t length) {
    FILE* file = fopen(path_of(name), "rb");
    CHECK(file != NULL);
    if (file == NULL) {
        return;
    }
    unsigned char* found = malloc(length + 1);
    CHECK(found != NULL && fread(found, 1, length + 1, file) == length && memcmp(found, expected, length) == 0);
    free(found);
    fclose(file);
}

static void test_bytes(void) {
    const uint64_t alignments[] = {8, 4096};
    for (int i = 0; i < 2; i++) {
        sft_save_options options = SFT_SAVE_OPTIONS_INIT;
        options.alignment = alignments[i];
        options.durable = 1;
        sft_writer *whole = new_writer(true), *declared = new_writer(false);
        uint64_t size = 0, declared_size = 0;
        CHECK_OK(sft_writer_get_size(whole, &options, &size));
        CHECK_OK(sft_writer_get_size(declared, &options, &declared_size));
        CHECK(size == declared_size);
        void* expected = malloc(size);
        CHECK_OK(sft_writer_write_buffer(whole, &options, expected, size));

        sft_incremental_writer* incremental = NULL;
        CHECK_OK(sft_incremental_writer_create(declared, path_of("incremental.safetensors"), &options, &incremental));
        sft_writer_free(declared);
        CHECK_OK(sft_incremental_writer_write_tensor(incremental, "none", 4, NULL, 0));
        CHECK_OK(sft_incremental_writer_write_part(incremental, "matrix", 6, 20, matrix + 5, 28));
        CHECK_OK(sft_incremental_writer_write_tensor(incremental, "bytes", 5, bytes, sizeof bytes));
        CHECK_OK(sft_incremental_writer_write_part(incremental, "matrix", 6, 0, matrix, 20));
        CHECK((access(path_of("incremental.safetensors"), F_OK) == 0) == (i > 0));
        CHECK_OK(sft_incremental_writer_commit(incremental));
        sft_incremental_writer_free(incremental);
        check_file("incremental.safetensors", expected, size);

        /* Creating the incremental writer writes the tensors that have data. */
        CHECK_OK(sft_incremental_writer_create(whole, path_of("incremental.safetensors"), &options, &incremental));
        CHECK_STATUS(sft_incremental_writer_write_tensor(incremental, "bytes", 5, bytes, sizeof bytes),
                     SFT_ERROR_DUPLICATE);
        CHECK_OK(sft_incremental_writer_commit(incremental));
        sft_incremental_writer_free(incremental);
        check_file("incremental.safetensors", expected, size);
        free(expected);
        sft_writer_free(whole);
    }
}

static void test_refused(void) {
    sft_incremental_writer* incremental = new_incremental();
    CHECK_STATUS(sft_incremental_writer_write_tensor(incremental, "absent", 6, NULL, 0), SFT_ERROR_TENSOR_NOT_FOUND);
    CHECK(strstr(sft_last_error_get_message(), "incremental.safetensors: no tensor \"absent\"") != NULL);
    CHECK_STATUS(sft_incremental_writer_write_tensor(incremental, "bytes", 5, bytes, 2), SFT_ERROR_BUFFER_SIZE);
    CHECK_STATUS(sft_incremental_writer_write_tensor(incremental, "bytes", 5, NULL, 3), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(sft_incremental_writer_write_tensor(incremental, "\xff", 1, bytes, 3), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(sft_incremental_writer_write_part(incremental, "bytes", 5, 1, bytes, 3), SFT_ERROR_BUFFER_SIZE);
    CHECK_OK(sft_incremental_writer_write_part(incremental, "bytes", 5, 0, bytes, 2));
    CHECK_STATUS(sft_incremental_writer_write_part(incremental, "bytes", 5, 1, bytes + 1, 2), SFT_ERROR_DUPLICATE);
    CHECK_STATUS(sft_incremental_writer_write_tensor(incremental, "bytes", 5, bytes, 3), SFT_ERROR_DUPLICATE);
    CHECK_OK(sft_incremental_writer_write_tensor(incremental, "none", 4, NULL, 0));
    CHECK_STATUS(sft_incremental_writer_commit(incremental), SFT_ERROR_DATA_LENGTH);
    CHECK(strstr(sft_last_error_get_message(), "2 of 3 tensors") != NULL);
    CHECK(strstr(sft_last_error_get_message(), "\"matrix\", \"bytes\"") != NULL);
    CHECK_OK(sft_incremental_writer_write_part(incremental, "bytes", 5, 2, bytes + 2, 1));
    CHECK_OK(sft_incremental_writer_write_tensor(incremental, "matrix", 6, matrix, sizeof matrix));
    CHECK_OK(sft_incremental_writer_commit(incremental));
    CHECK_STATUS(sft_incremental_writer_commit(incremental), SFT_ERROR_CLOSED);
    CHECK_STATUS(sft_incremental_writer_write_tensor(incremental, "bytes", 5, bytes, 3), SFT_ERROR_CLOSED);
    CHECK_STATUS(sft_incremental_writer_write_part(incremental, "bytes", 5, 0, bytes, 3), SFT_ERROR_CLOSED);
    sft_incremental_writer_free(incremental);

    /* Freeing without a commit keeps the existing file. */
    struct stat before, after;
    CHECK(stat(path_of("incremental.safetensors"), &before) == 0);
    incremental = new_incremental();
    CHECK_OK(sft_incremental_writer_write_tensor(incremental, "bytes", 5, bytes, 3));
    sft_incremental_writer_free(incremental);
    CHECK(stat(path_of("incremental.safetensors"), &after) == 0 && before.st_ino == after.st_ino);
    sft_incremental_writer_free(NULL);
}

static void test_incremental_arguments(void) {
    sft_writer* writer = NULL;
    CHECK_OK(sft_writer_new(&writer));
    CHECK_STATUS(sft_writer_declare_tensor(writer, "a", 1, 22, bytes_shape, 1), SFT_ERROR_UNSUPPORTED_DTYPE);
    CHECK_STATUS(sft_writer_declare_tensor(writer, "a", 1, SFT_DTYPE_F4, bytes_shape, 1), SFT_ERROR_SIZE_MISMATCH);
    CHECK_STATUS(sft_writer_declare_tensor(writer, "\xff", 1, SFT_DTYPE_U8, bytes_shape, 1),
                 SFT_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(sft_writer_declare_tensor(NULL, "a", 1, SFT_DTYPE_U8, bytes_shape, 1), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_OK(sft_writer_declare_tensor(writer, "a", 1, SFT_DTYPE_U8, bytes_shape, 1));

    /* The other functions that write refuse a declared tensor. */
    char buffer[256];
    uint64_t size = 0;
    CHECK_OK(sft_writer_get_size(writer, NULL, &size));
    CHECK(size <= sizeof buffer);
    CHECK_STATUS(sft_writer_write_buffer(writer, NULL, buffer, size), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(sft_writer_write_sharded(writer, path_of("never"), NULL), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(sft_writer_write_file(writer, path_of("never"), NULL), SFT_ERROR_INVALID_ARGUMENT);
    CHECK(strstr(sft_last_error_get_message(), "\"a\" was declared without data") != NULL);
    CHECK(access(path_of("never"), F_OK) != 0);

    sft_incremental_writer* incremental = (sft_incremental_writer*)buffer;
    CHECK_STATUS(sft_incremental_writer_create(NULL, path_of("never"), NULL, &incremental), SFT_ERROR_INVALID_ARGUMENT);
    CHECK(incremental == NULL);
    CHECK_STATUS(sft_incremental_writer_create(writer, NULL, NULL, &incremental), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(sft_incremental_writer_create(writer, path_of("never"), NULL, NULL), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(sft_incremental_writer_create(writer, path_of("absent/file"), NULL, &incremental), SFT_ERROR_IO);
    CHECK(sft_last_error_get_os_error() == ENOENT);
    CHECK_STATUS(sft_incremental_writer_create(writer, "/dev/null", NULL, &incremental), SFT_ERROR_IO);
    CHECK(sft_last_error_get_os_error() == ENODEV);
    CHECK_OK(sft_writer_declare_tensor(writer, "a", 1, SFT_DTYPE_U8, bytes_shape, 1));
    CHECK_STATUS(sft_incremental_writer_create(writer, path_of("never"), NULL, &incremental), SFT_ERROR_DUPLICATE);
    CHECK_STATUS(sft_incremental_writer_write_tensor(NULL, "a", 1, bytes, 3), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(sft_incremental_writer_write_part(NULL, "a", 1, 0, bytes, 3), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(sft_incremental_writer_commit(NULL), SFT_ERROR_INVALID_ARGUMENT);
    CHECK(access(path_of("never"), F_OK) != 0);
    sft_writer_free(writer);
}

enum { THREADS = 8, ROWS = 5000 };

static unsigned char rows[THREADS][ROWS];

struct worker {
    pthread_t thread;
    int number;
    const sft_incremental_writer* incremental;
};

static void* write_row(void* argument) {
    const struct worker* worker = argument;
    char name[2] = {(char)('a' + worker->number), 0};
    for (int offset = ROWS - 1000; offset >= 0; offset -= 1000) {
        CHECK_OK(sft_incremental_writer_write_part(worker->incremental, name, 1, (uint64_t)offset,
                                                   rows[worker->number] + offset, 1000));
    }
    return NULL;
}

static void test_incremental_threads(void) {
    const uint64_t shape[] = {ROWS};
    sft_writer* writer = NULL;
    CHECK_OK(sft_writer_new(&writer));
    for (int i = 0; i < THREADS; i++) {
        char name[2] = {(char)('a' + i), 0};
        memset(rows[i], 1 + i, ROWS);
        CHECK_OK(sft_writer_declare_tensor(writer, name, 1, SFT_DTYPE_U8, shape, 1));
    }
    sft_incremental_writer* incremental = NULL;
    CHECK_OK(sft_incremental_writer_create(writer, path_of("threads-incremental.safetensors"), NULL, &incremental));
    sft_writer_free(writer);
    struct worker workers[THREADS];
    for (int i = 0; i < THREADS; i++) {
        workers[i].number = i;
        workers[i].incremental = incremental;
        CHECK(pthread_create(&workers[i].thread, NULL, write_row, &workers[i]) == 0);
    }
    for (int i = 0; i < THREADS; i++) {
        CHECK(pthread_join(workers[i].thread, NULL) == 0);
    }
    CHECK_OK(sft_incremental_writer_commit(incremental));
    sft_incremental_writer_free(incremental);

    sft_file* file = NULL;
    CHECK_OK(sft_file_open(path_of("threads-incremental.safetensors"), NULL, &file));
    for (int i = 0; i < THREADS; i++) {
        unsigned char found[ROWS];
        CHECK_OK(sft_file_read_tensor(file, (size_t)i, found, ROWS));
        CHECK(memcmp(found, rows[i], ROWS) == 0);
    }
    sft_file_free(file);
}

/* Two parts of the matrix, as two processes write them. */
static void test_joined(void) {
    sft_incremental_writer* incremental = new_incremental();
    sft_str path, again;
    CHECK_OK(sft_incremental_writer_make_joinable(incremental, &path));
    CHECK_OK(sft_incremental_writer_make_joinable(incremental, &again));
    CHECK(path.data == again.data && path.length == again.length);
    char* staged = calloc(path.length + 1, 1);
    memcpy(staged, path.data, path.length);

    sft_joined_file* file = NULL;
    CHECK_STATUS(sft_joined_file_open(path_of("incremental.safetensors"), &file), SFT_ERROR_INVALID_ARGUMENT);
    CHECK(file == NULL);
    CHECK_OK(sft_joined_file_open(staged, &file));
    const sft_range left[2] = {{0, 3, 1}, {0, 1, 1}}, right[2] = {{0, 3, 1}, {1, 4, 1}}, all = {0, 3, 1};
    const float first[3] = {0, 4, 8}, rest[9] = {1, 2, 3, 5, 6, 7, 9, 10, 11};
    CHECK_OK(sft_joined_file_write_slice(file, "matrix", 6, left, 2, first, sizeof first));
    CHECK_OK(sft_joined_file_write_slice(file, "matrix", 6, right, 2, rest, sizeof rest));
    CHECK_OK(sft_joined_file_write_slice(file, "bytes", 5, &all, 1, bytes, sizeof bytes));
    CHECK_STATUS(sft_joined_file_write_slice(file, "matrix", 6, left, 2, first, 11), SFT_ERROR_BUFFER_SIZE);
    CHECK_STATUS(sft_joined_file_write_slice(file, "matrix", 6, left, 1, first, 12), SFT_ERROR_SLICE);
    CHECK_STATUS(sft_joined_file_write_slice(file, "other", 5, left, 2, first, 12), SFT_ERROR_TENSOR_NOT_FOUND);
    CHECK_STATUS(sft_joined_file_finish(file, 2), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_OK(sft_joined_file_finish(file, 1));
    CHECK_STATUS(sft_joined_file_finish(file, 0), SFT_ERROR_CLOSED);
    CHECK_STATUS(sft_joined_file_write_slice(file, "bytes", 5, &all, 1, bytes, 3), SFT_ERROR_CLOSED);
    sft_joined_file_free(file);
    sft_joined_file_free(NULL);
    free(staged);

    CHECK_STATUS(sft_incremental_writer_commit(incremental), SFT_ERROR_DATA_LENGTH);
    CHECK_OK(sft_incremental_writer_commit_joined(incremental));
    CHECK_STATUS(sft_incremental_writer_commit_joined(incremental), SFT_ERROR_CLOSED);
    sft_incremental_writer_free(incremental);
    sft_writer* writer = new_writer(true);
    uint64_t size = 0;
    CHECK_OK(sft_writer_get_size(writer, NULL, &size));
    void* expected = malloc(size);
    CHECK_OK(sft_writer_write_buffer(writer, NULL, expected, size));
    check_file("incremental.safetensors", expected, size);
    free(expected);
    sft_writer_free(writer);
}

void test_incremental_writer(void) {
    test_bytes();
    test_joined();
    test_refused();
    test_incremental_arguments();
    test_incremental_threads();
}
