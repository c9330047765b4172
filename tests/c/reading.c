/* sft_file: tensors, metadata and data of a file, on both backends and from memory. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "check.h"

static sft_file* open_three(sft_backend backend) {
    sft_open_options options = SFT_OPEN_OPTIONS_INIT;
    options.backend = backend;
    sft_file* file = NULL;
    CHECK_OK(sft_file_open(path_of("three.safetensors"), &options, &file));
    return file;
}

/* Prefaulting does not change what is read; without a mapping it has no effect. */
void test_prefault(void) {
    enum { LENGTH = 20 << 20 };
    const sft_backend backends[] = {SFT_BACKEND_MMAP, SFT_BACKEND_PREAD};
    unsigned char* bytes = malloc(LENGTH);
    unsigned char* read = malloc(LENGTH);
    for (size_t i = 0; i < LENGTH; i++) {
        bytes[i] = (unsigned char)(i % 251);
    }
    const uint64_t shape[] = {LENGTH};
    sft_writer* writer = NULL;
    CHECK_OK(sft_writer_new(&writer));
    CHECK_OK(sft_writer_add_tensor(writer, "large", 5, SFT_DTYPE_U8, shape, 1, bytes, LENGTH));
    CHECK_OK(sft_writer_write_file(writer, path_of("large.safetensors"), NULL));
    sft_writer_free(writer);
    for (sft_prefault prefault = SFT_PREFAULT_NONE; prefault <= SFT_PREFAULT_WAIT; prefault++) {
        for (size_t i = 0; i < 2; i++) {
            sft_open_options options = SFT_OPEN_OPTIONS_INIT;
            options.backend = backends[i];
            options.prefault = prefault;
            sft_file* file = NULL;
            CHECK_OK(sft_file_open(path_of("large.safetensors"), &options, &file));
            memset(read, 0, LENGTH);
            CHECK_OK(sft_file_read_tensor(file, 0, read, LENGTH));
            CHECK(memcmp(read, bytes, LENGTH) == 0);
            sft_load_plan plan = SFT_LOAD_PLAN_INIT;
            CHECK_OK(sft_file_explain_load(file, SFT_LOAD_TARGET_MEMORY, &plan));
            CHECK(plan.readers > 0 && *plan.filesystem != '\0' && *plan.reason != '\0');
            sft_file_free(file);
        }
    }
    unlink(path_of("large.safetensors"));
    free(bytes);
    free(read);
}

static void check_three(const sft_file* file, bool in_memory) {
    size_t count = 0, index = 99;
    CHECK_OK(sft_file_get_tensor_count(file, &count));
    CHECK(count == 3);

    sft_tensor_info info = SFT_TENSOR_INFO_INIT;
    CHECK_OK(sft_file_get_tensor_info(file, 0, &info));
    CHECK(text_is(info.name, "") && info.dtype == SFT_DTYPE_I64 && info.nbytes == 0 && info.begin == info.end);
    CHECK(info.rank == 2 && info.shape[0] == 0 && info.shape[1] == 5);
    CHECK_OK(sft_file_get_tensor_info(file, 1, &info));
    CHECK(text_is(info.name, "matrix") && info.dtype == SFT_DTYPE_F32 && info.nbytes == 48);
    CHECK(info.rank == 2 && info.shape[0] == 3 && info.shape[1] == 4 && info.end - info.begin == 48);
    const uint64_t end = info.end;
    CHECK_OK(sft_file_get_tensor_info(file, 2, &info));
    CHECK(info.name.length == 3 && memcmp(info.name.data, "a\0b", 3) == 0 && info.begin == end);
    CHECK(info.struct_size == sizeof info && info.reserved == 0);
    CHECK_STATUS(sft_file_get_tensor_info(file, 3, &info), SFT_ERROR_INVALID_ARGUMENT);

    /* Sorted by name: "", "a\0b", "matrix". */
    const size_t sorted[] = {0, 2, 1};
    for (size_t position = 0; position < 3; position++) {
        CHECK_OK(sft_file_get_sorted_index(file, position, &index));
        CHECK(index == sorted[position]);
    }
    CHECK_STATUS(sft_file_get_sorted_index(file, 3, &index), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_OK(sft_file_find_tensor(file, "matrix", 6, &index));
    CHECK(index == 1);
    CHECK_OK(sft_file_find_tensor(file, "a\0b", 3, &index));
    CHECK(index == 2);
    CHECK_OK(sft_file_find_tensor(file, NULL, 0, &index));
    CHECK(index == 0);
    CHECK_STATUS(sft_file_find_tensor(file, "a", 1, &index), SFT_ERROR_TENSOR_NOT_FOUND);
    CHECK(index == 0);
    CHECK_STATUS(sft_file_find_tensor(file, "a\0c", 3, &index), SFT_ERROR_TENSOR_NOT_FOUND);
    CHECK(strstr(sft_last_error_get_message(), "a\\0c") != NULL);
    CHECK_STATUS(sft_file_find_tensor(file, "\xff", 1, &index), SFT_ERROR_INVALID_ARGUMENT);

    float matrix[12] = {0};
    CHECK_OK(sft_file_read_tensor(file, 1, matrix, sizeof matrix));
    for (int i = 0; i < 12; i++) {
        CHECK(matrix[i] == (float)i);
    }
    CHECK_STATUS(sft_file_read_tensor(file, 1, matrix, sizeof matrix - 1), SFT_ERROR_BUFFER_SIZE);
    CHECK_STATUS(sft_file_read_tensor(file, 3, matrix, sizeof matrix), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_OK(sft_file_read_tensor(file, 0, NULL, 0));

    unsigned char bytes[3] = {0};
    float again[12] = {0};
    const sft_read_request reads[] = {{2, bytes, sizeof bytes}, {0, NULL, 0}, {1, again, sizeof again}};
    CHECK_OK(sft_file_read_tensors(file, reads, 3));
    CHECK(memcmp(bytes, "\7\10\11", 3) == 0 && memcmp(matrix, again, sizeof again) == 0);
    CHECK_OK(sft_file_read_tensors(file, NULL, 0));
    const sft_read_request wrong[] = {{1, again, sizeof again}, {2, bytes, 2}};
    memset(again, 0, sizeof again);
    CHECK_STATUS(sft_file_read_tensors(file, wrong, 2), SFT_ERROR_BUFFER_SIZE);
    CHECK(again[11] == 0);

    const void* data = bytes;
    if (in_memory) {
        CHECK_OK(sft_file_get_data(file, 1, &data));
        CHECK(memcmp(data, matrix, sizeof matrix) == 0);
        CHECK_OK(sft_file_get_data(file, 0, &data));
        CHECK(data != NULL);
    } else {
        CHECK_STATUS(sft_file_get_data(file, 1, &data), SFT_ERROR_INVALID_ARGUMENT);
        CHECK(data == NULL);
    }
    CHECK_STATUS(sft_file_get_data(file, 3, &data), SFT_ERROR_INVALID_ARGUMENT);
    CHECK(data == NULL);
}

/* Slices of the matrix into memory with strides; tests/rust/slices.rs has more of them. */
static void check_strides(const sft_file* file) {
    const sft_range all[2] = {{0, 3, 1}, {0, 4, 1}}, left[2] = {{0, 3, 1}, {0, 2, 1}};
    const uint64_t transposed[2] = {1, 3}, rows_of_five[2] = {5, 1};
    /* Exactly as large as needed, for the sanitizers. */
    float* columns = malloc(12 * sizeof *columns);
    float* block = malloc(12 * sizeof *block);
    for (int i = 0; i < 12; i++) {
        block[i] = -1;
    }
    const sft_slice_request reads[] = {{1, all, 2, columns, 12 * sizeof *columns, transposed},
                                       {1, left, 2, block, 12 * sizeof *block, rows_of_five}};
    CHECK_OK(sft_file_read_slices(file, reads, 2));
    for (int row = 0; row < 3; row++) {
        for (int column = 0; column < 4; column++) {
            CHECK(columns[3 * column + row] == (float)(4 * row + column));
        }
        CHECK(block[5 * row] == (float)(4 * row) && block[5 * row + 1] == (float)(4 * row + 1));
    }
    CHECK(block[2] == -1 && block[4] == -1 && block[7] == -1 && block[9] == -1);

    /* Refused before anything is read: too small a buffer, and elements that share memory. */
    sft_slice_request refused[] = {reads[0], reads[1]};
    memset(columns, 0, 12 * sizeof *columns);
    refused[1].nbytes -= 1;
    CHECK_STATUS(sft_file_read_slices(file, refused, 2), SFT_ERROR_BUFFER_SIZE);
    CHECK(strstr(sft_last_error_get_message(), "\"matrix\" takes 48 bytes") != NULL);
    const uint64_t overlapping[][2] = {{0, 1}, {1, 1}, {1, 0}};
    for (size_t i = 0; i < sizeof overlapping / sizeof *overlapping; i++) {
        refused[1] = reads[1];
        refused[1].strides = overlapping[i];
        CHECK_STATUS(sft_file_read_slices(file, refused, 2), SFT_ERROR_INVALID_ARGUMENT);
        CHECK(strstr(sft_last_error_get_message(), "\"matrix\": elements of shape [3, 2] may share memory") != NULL);
    }
    const uint64_t far[2] = {UINT64_MAX / 2, 1};
    refused[1].strides = far;
    CHECK_STATUS(sft_file_read_slices(file, refused, 2), SFT_ERROR_BUFFER_SIZE);
    CHECK(columns[1] == 0 && columns[11] == 0);
    free(columns);
    free(block);
}

static void check_closed(sft_file* file) {
    size_t number;
    uint64_t size, shape[2];
    int32_t present;
    const void* data;
    sft_str text;
    char byte;
    sft_tensor_info info = SFT_TENSOR_INFO_INIT;
    const sft_range ranges[2] = {{0, 1, 1}, {0, 1, 1}};
    CHECK_OK(sft_file_close(file));
    CHECK_OK(sft_file_close(file));
    CHECK_STATUS(sft_file_get_tensor_count(file, &number), SFT_ERROR_CLOSED);
    CHECK_STATUS(sft_file_get_tensor_info(file, 0, &info), SFT_ERROR_CLOSED);
    CHECK_STATUS(sft_file_get_sorted_index(file, 0, &number), SFT_ERROR_CLOSED);
    CHECK_STATUS(sft_file_find_tensor(file, "matrix", 6, &number), SFT_ERROR_CLOSED);
    CHECK_STATUS(sft_file_has_metadata(file, &present), SFT_ERROR_CLOSED);
    CHECK_STATUS(sft_file_get_metadata_count(file, &number), SFT_ERROR_CLOSED);
    CHECK_STATUS(sft_file_get_metadata_entry(file, 0, &text, &text), SFT_ERROR_CLOSED);
    CHECK_STATUS(sft_file_find_metadata(file, "k", 1, &text), SFT_ERROR_CLOSED);
    CHECK_STATUS(sft_file_get_data(file, 0, &data), SFT_ERROR_CLOSED);
    CHECK_STATUS(sft_file_read_tensor(file, 0, &byte, 0), SFT_ERROR_CLOSED);
    CHECK_STATUS(sft_file_read_tensors(file, NULL, 0), SFT_ERROR_CLOSED);
    CHECK_STATUS(sft_file_get_slice_size(file, 1, ranges, 2, shape, &size), SFT_ERROR_CLOSED);
    CHECK_STATUS(sft_file_read_slice(file, 1, ranges, 2, &byte, 1), SFT_ERROR_CLOSED);
    CHECK_STATUS(sft_file_read_slices(file, NULL, 0), SFT_ERROR_CLOSED);
    CHECK(strcmp(sft_last_error_get_message(), "File is closed") == 0);
    sft_file_free(file);
}

/* The mmap backend keeps no descriptor open; pread does. */
static void test_more_files_than_descriptors(void) {
    enum { FILES = 300, LIMIT = 100 };
    static sft_file* files[FILES];
    struct rlimit before, lower;
    CHECK(getrlimit(RLIMIT_NOFILE, &before) == 0);
    lower = before;
    lower.rlim_cur = LIMIT;
    CHECK(setrlimit(RLIMIT_NOFILE, &lower) == 0);
    sft_open_options options = SFT_OPEN_OPTIONS_INIT;
    options.prefault = SFT_PREFAULT_WAIT;
    for (int i = 0; i < FILES; i++) {
        CHECK_OK(sft_file_open(path_of("three.safetensors"), &options, &files[i]));
    }
    for (int i = 0; i < FILES; i++) {
        const void* data = NULL;
        size_t count = 0;
        CHECK_OK(sft_file_get_tensor_count(files[i], &count));
        CHECK(count == 3);
        CHECK_OK(sft_file_get_data(files[i], 0, &data));
        sft_file_free(files[i]);
    }
    options.backend = SFT_BACKEND_PREAD;
    int opened = 0;
    while (opened < FILES && sft_file_open(path_of("three.safetensors"), &options, &files[opened]) == SFT_OK) {
        opened++;
    }
    CHECK(opened < LIMIT && sft_last_error_get_os_error() == EMFILE);
    CHECK(strstr(sft_last_error_get_message(), "as many files open as it may (100)") != NULL);
    CHECK(strstr(sft_last_error_get_message(), "\"mmap\", which keeps no file open") != NULL);
    for (int i = 0; i < opened; i++) {
        sft_file_free(files[i]);
    }
    CHECK(setrlimit(RLIMIT_NOFILE, &before) == 0);
}

void test_reading(void) {
    test_more_files_than_descriptors();
    const sft_backend backends[] = {SFT_BACKEND_MMAP, SFT_BACKEND_PREAD};
    for (size_t i = 0; i < 2; i++) {
        sft_file* file = open_three(backends[i]);
        check_three(file, backends[i] == SFT_BACKEND_MMAP);
        check_closed(file);
    }
    FILE* stream = fopen(path_of("three.safetensors"), "rb");
    unsigned char bytes[4096];
    const size_t length = stream == NULL ? 0 : fread(bytes, 1, sizeof bytes, stream);
    CHECK(stream != NULL && fclose(stream) == 0);
    sft_file* file = NULL;
    CHECK_OK(sft_file_open_buffer(bytes, length, &file));
    check_three(file, true);
    const void* data = NULL;
    CHECK_OK(sft_file_get_data(file, 1, &data));
    CHECK((const unsigned char*)data > bytes && (const unsigned char*)data < bytes + length);
    check_closed(file);

    /* Reading a file that shrank since it was opened is an error. */
    file = open_three(SFT_BACKEND_PREAD);
    CHECK(truncate(path_of("three.safetensors"), (off_t)length - 1) == 0);
    CHECK_STATUS(sft_file_read_tensor(file, 2, bytes, 3), SFT_ERROR_FILE_CHANGED);
    CHECK_OK(sft_file_read_tensor(file, 1, bytes, 48));
    sft_file_free(file);
    CHECK_STATUS(sft_file_open(path_of("three.safetensors"), NULL, &file), SFT_ERROR_DATA_LENGTH);
    CHECK(strstr(sft_last_error_get_message(), "three.safetensors: ") != NULL);
    sft_file_free(NULL);
    test_writing();
}

void test_slices(void) {
    const sft_backend backends[] = {SFT_BACKEND_MMAP, SFT_BACKEND_PREAD};
    for (size_t i = 0; i < 2; i++) {
        sft_file* file = open_three(backends[i]);
        sft_range ranges[2] = {{0, 3, 2}, {1, 4, 2}};
        uint64_t shape[2] = {0, 0}, size = 0;
        float part[4] = {0};
        CHECK_OK(sft_file_get_slice_size(file, 1, ranges, 2, shape, &size));
        CHECK(shape[0] == 2 && shape[1] == 2 && size == sizeof part);
        CHECK_OK(sft_file_read_slice(file, 1, ranges, 2, part, sizeof part));
        CHECK(part[0] == 1 && part[1] == 3 && part[2] == 9 && part[3] == 11);
        float column[3] = {0}, again[4] = {0};
        const sft_range last[2] = {{0, 3, 1}, {3, 4, 1}};
        const sft_slice_request reads[2] = {{1, last, 2, column, sizeof column, NULL},
                                            {1, ranges, 2, again, sizeof again, NULL}};
        CHECK_OK(sft_file_read_slices(file, reads, 2));
        CHECK(column[0] == 3 && column[2] == 11 && memcmp(again, part, sizeof part) == 0);
        const sft_slice_request wrong = {1, last, 2, column, 8, NULL};
        CHECK_STATUS(sft_file_read_slices(file, &wrong, 1), SFT_ERROR_BUFFER_SIZE);
        check_strides(file);
        CHECK_STATUS(sft_file_read_slice(file, 1, ranges, 2, part, 15), SFT_ERROR_BUFFER_SIZE);
        CHECK_STATUS(sft_file_get_slice_size(file, 1, ranges, 1, shape, &size), SFT_ERROR_SLICE);
        CHECK_STATUS(sft_file_get_slice_size(file, 3, ranges, 2, shape, &size), SFT_ERROR_INVALID_ARGUMENT);
        ranges[1].step = 0;
        CHECK_STATUS(sft_file_read_slice(file, 1, ranges, 2, part, sizeof part), SFT_ERROR_SLICE);
        ranges[1] = (sft_range){0, 5, 1};
        CHECK_STATUS(sft_file_get_slice_size(file, 1, ranges, 2, shape, &size), SFT_ERROR_SLICE);
        ranges[1] = (sft_range){2, 2, 1};
        CHECK_OK(sft_file_get_slice_size(file, 1, ranges, 2, shape, &size));
        CHECK(shape[0] == 2 && shape[1] == 0 && size == 0);
        CHECK_OK(sft_file_read_slice(file, 1, ranges, 2, NULL, 0));
        sft_file_free(file);
    }

    /* A slice must not end within a byte. */
    size_t length;
    void* bytes = make_file("{\"a\":{\"dtype\":\"F4\",\"shape\":[4],\"data_offsets\":[0,2]}}", 2, &length);
    sft_file* file = NULL;
    CHECK_OK(sft_file_open_buffer(bytes, length, &file));
    const sft_range half = {1, 3, 1}, whole = {2, 4, 1};
    uint64_t shape, size;
    CHECK_STATUS(sft_file_get_slice_size(file, 0, &half, 1, &shape, &size), SFT_ERROR_SLICE);
    CHECK_OK(sft_file_get_slice_size(file, 0, &whole, 1, &shape, &size));
    CHECK(shape == 2 && size == 1);
    sft_file_free(file);
    free(bytes);

    /* The only slice of a scalar is the scalar. */
    bytes = make_file("{\"a\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[0,1]}}", 1, &length);
    CHECK_OK(sft_file_open_buffer(bytes, length, &file));
    char scalar = 1;
    CHECK_OK(sft_file_get_slice_size(file, 0, NULL, 0, NULL, &size));
    CHECK_OK(sft_file_read_slice(file, 0, NULL, 0, &scalar, 1));
    CHECK(size == 1 && scalar == 0);
    sft_file_free(file);
    free(bytes);
}

void test_metadata(void) {
    sft_file* file = open_three(SFT_BACKEND_MMAP);
    int32_t present = 0;
    size_t count = 0;
    sft_str key, value;
    CHECK_OK(sft_file_has_metadata(file, &present));
    CHECK_OK(sft_file_get_metadata_count(file, &count));
    CHECK(present == 1 && count == 2);
    CHECK_OK(sft_file_get_metadata_entry(file, 0, &key, &value));
    CHECK(key.length == 1 && key.data[0] == '\0' && value.length == 0 && value.data != NULL);
    CHECK_OK(sft_file_get_metadata_entry(file, 1, &key, &value));
    CHECK(text_is(key, "format") && text_is(value, "pt"));
    CHECK_STATUS(sft_file_get_metadata_entry(file, 2, &key, &value), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_OK(sft_file_find_metadata(file, "format", 6, &value));
    CHECK(text_is(value, "pt"));
    CHECK_OK(sft_file_find_metadata(file, "\0", 1, &value));
    CHECK(value.data != NULL && value.length == 0);
    CHECK_OK(sft_file_find_metadata(file, "forma", 5, &value));
    CHECK(value.data == NULL && value.length == 0);
    CHECK_STATUS(sft_file_find_metadata(file, "\xff", 1, &value), SFT_ERROR_INVALID_ARGUMENT);
    sft_file_free(file);

    const char* const without[] = {"{}", "{\"__metadata__\":null}", "{\"__metadata__\":{}}"};
    for (int i = 0; i < 3; i++) {
        size_t length;
        void* bytes = make_file(without[i], 0, &length);
        CHECK_OK(sft_file_open_buffer(bytes, length, &file));
        CHECK_OK(sft_file_has_metadata(file, &present));
        CHECK_OK(sft_file_get_metadata_count(file, &count));
        CHECK(present == (i == 2) && count == 0);
        sft_file_free(file);
        free(bytes);
    }
}
