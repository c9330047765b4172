/* Errors: invalid files, invalid arguments, structs of other versions. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"

static void check_refused(const void* bytes, size_t length, sft_status expected) {
    sft_file* file = (sft_file*)&file;
    CHECK_STATUS(sft_file_open_buffer(bytes, length, &file), expected);
    CHECK(file == NULL);
}

static void check_refused_json(const char* json, size_t nbytes, sft_status expected) {
    size_t length;
    void* bytes = make_file(json, nbytes, &length);
    check_refused(bytes, length, expected);
    free(bytes);
}

#define TENSOR(name, dtype, shape, offsets) \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"

void test_refused_files(void) {
    check_refused(NULL, 0, SFT_ERROR_FILE_TOO_SMALL);
    check_refused("1234567", 7, SFT_ERROR_FILE_TOO_SMALL);
    check_refused("\0\0\0\0\0\0\0\1", 8, SFT_ERROR_HEADER_TOO_LARGE);
    check_refused("\7\0\0\0\0\0\0\0{}", 10, SFT_ERROR_HEADER_TRUNCATED);
    const char pointer[] = "version https://git-lfs.github.com/spec/v1\noid sha256:0\n";
    check_refused(pointer, sizeof pointer - 1, SFT_ERROR_FOREIGN_FORMAT);
    CHECK(strstr(sft_last_error_get_message(), "git lfs pull") != NULL);
    check_refused_json("{\"\xff\":1}", 0, SFT_ERROR_HEADER_UTF8);
    check_refused_json("[]", 0, SFT_ERROR_HEADER_JSON);
    check_refused_json("{" TENSOR("a", "U8", "[0]", "[0,0]") "," TENSOR("a", "U8", "[0]", "[0,0]") "}", 0,
                       SFT_ERROR_DUPLICATE);
    check_refused_json("{" TENSOR("a", "F33", "[0]", "[0,0]") "}", 0, SFT_ERROR_UNKNOWN_DTYPE);
    check_refused_json("{" TENSOR("a", "U8", "[4294967296,4294967296]", "[0,0]") "}", 0, SFT_ERROR_SHAPE_OVERFLOW);
    check_refused_json("{" TENSOR("a", "U8", "[2]", "[0,1]") "}", 1, SFT_ERROR_SIZE_MISMATCH);
    check_refused_json("{" TENSOR("a", "U8", "[1]", "[1,2]") "}", 2, SFT_ERROR_OFFSETS);
    check_refused_json("{" TENSOR("a", "U8", "[1]", "[0,1]") "}", 2, SFT_ERROR_DATA_LENGTH);

    sft_file* file;
    CHECK_STATUS(sft_file_open(path_of("."), NULL, &file), SFT_ERROR_IO);
    CHECK(sft_last_error_get_os_error() == EISDIR);
    CHECK_STATUS(sft_file_open("/dev/null", NULL, &file), SFT_ERROR_IO);
    CHECK(sft_last_error_get_os_error() == ENODEV);
}

/* Each shared test vector is refused with the status of the list, whichever way it is opened. */
void test_malformed_files(void) {
    FILE* list = fopen(VECTORS "/malformed.tsv", "r");
    CHECK(list != NULL);
    if (list == NULL) return;
    char name[256], status[256], path[4096];
    int count = 0;
    for (; fscanf(list, "%255s %255s", name, status) == 2; count++) {
        snprintf(path, sizeof path, VECTORS "/malformed/%s.safetensors", name);
        for (sft_backend backend = SFT_BACKEND_MMAP; backend <= SFT_BACKEND_PREAD; backend++) {
            sft_open_options options = SFT_OPEN_OPTIONS_INIT;
            options.backend = backend;
            sft_file* file = (sft_file*)&file;
            const char* given = sft_status_get_name(sft_file_open(path, &options, &file));
            CHECK(strcmp(given, status) == 0 && file == NULL);
            CHECK(strstr(sft_last_error_get_message(), path) != NULL);
            if (strcmp(given, status) != 0) printf("    %s: %s, not %s\n", name, given, status);
        }
    }
    fclose(list);
    CHECK(count >= 150);
}

static void test_null_file_arguments(const sft_file* file) {
    size_t number;
    uint64_t size, shape[2];
    int32_t present;
    const void* data;
    sft_str text;
    char buffer[64];
    sft_tensor_info info = SFT_TENSOR_INFO_INIT;
    const sft_range ranges[2] = {{0, 1, 1}, {0, 1, 1}};
    const sft_read_request read = {1, NULL, 48};
    const sft_status invalid = SFT_ERROR_INVALID_ARGUMENT;
    CHECK_STATUS(sft_file_get_tensor_count(NULL, &number), invalid);
    CHECK_STATUS(sft_file_get_tensor_count(file, NULL), invalid);
    CHECK_STATUS(sft_file_get_tensor_info(NULL, 0, &info), invalid);
    CHECK_STATUS(sft_file_get_tensor_info(file, 0, NULL), invalid);
    sft_load_plan plan = SFT_LOAD_PLAN_INIT;
    CHECK_STATUS(sft_file_explain_load(NULL, SFT_LOAD_TARGET_MEMORY, &plan), invalid);
    CHECK_STATUS(sft_file_explain_load(file, SFT_LOAD_TARGET_DEVICE + 1, &plan), invalid);
    CHECK_STATUS(sft_file_explain_load(file, SFT_LOAD_TARGET_MEMORY, NULL), invalid);
    CHECK_STATUS(sft_file_get_sorted_index(NULL, 0, &number), invalid);
    CHECK_STATUS(sft_file_get_sorted_index(file, 0, NULL), invalid);
    CHECK_STATUS(sft_file_find_tensor(NULL, "a", 1, &number), invalid);
    CHECK_STATUS(sft_file_find_tensor(file, NULL, 1, &number), invalid);
    CHECK_STATUS(sft_file_find_tensor(file, "a", SIZE_MAX, &number), invalid);
    CHECK_STATUS(sft_file_find_tensor(file, "a", 1, NULL), invalid);
    CHECK_STATUS(sft_file_has_metadata(NULL, &present), invalid);
    CHECK_STATUS(sft_file_has_metadata(file, NULL), invalid);
    CHECK_STATUS(sft_file_get_metadata_count(NULL, &number), invalid);
    CHECK_STATUS(sft_file_get_metadata_count(file, NULL), invalid);
    CHECK_STATUS(sft_file_get_metadata_entry(NULL, 0, &text, &text), invalid);
    CHECK_STATUS(sft_file_get_metadata_entry(file, 0, NULL, &text), invalid);
    CHECK_STATUS(sft_file_get_metadata_entry(file, 0, &text, NULL), invalid);
    CHECK_STATUS(sft_file_find_metadata(NULL, "a", 1, &text), invalid);
    CHECK_STATUS(sft_file_find_metadata(file, NULL, 1, &text), invalid);
    CHECK_STATUS(sft_file_find_metadata(file, "a", 1, NULL), invalid);
    CHECK_STATUS(sft_file_get_data(NULL, 0, &data), invalid);
    CHECK_STATUS(sft_file_get_data(file, 0, NULL), invalid);
    CHECK_STATUS(sft_file_read_tensor(NULL, 1, buffer, 48), invalid);
    CHECK_STATUS(sft_file_read_tensor(file, 1, NULL, 48), invalid);
    CHECK_STATUS(sft_file_read_tensors(NULL, &read, 1), invalid);
    CHECK_STATUS(sft_file_read_tensors(file, NULL, 1), invalid);
    CHECK_STATUS(sft_file_read_tensors(file, &read, 1), invalid);
    CHECK_STATUS(sft_file_get_slice_size(NULL, 1, ranges, 2, shape, &size), invalid);
    CHECK_STATUS(sft_file_get_slice_size(file, 1, NULL, 2, shape, &size), invalid);
    CHECK_STATUS(sft_file_get_slice_size(file, 1, ranges, 2, NULL, &size), invalid);
    CHECK_STATUS(sft_file_get_slice_size(file, 1, ranges, 2, shape, NULL), invalid);
    CHECK_STATUS(sft_file_read_slice(NULL, 1, ranges, 2, buffer, 4), invalid);
    CHECK_STATUS(sft_file_read_slice(file, 1, NULL, 2, buffer, 4), invalid);
    CHECK_STATUS(sft_file_read_slice(file, 1, ranges, 2, NULL, 4), invalid);
    sft_slice_request slice = {1, ranges, 2, buffer, 4, NULL};
    CHECK_STATUS(sft_file_read_slices(NULL, &slice, 1), invalid);
    CHECK_STATUS(sft_file_read_slices(file, NULL, 1), invalid);
    slice.strides = (const uint64_t*)(const void*)((const char*)ranges + 1);
    CHECK_STATUS(sft_file_read_slices(file, &slice, 1), invalid);
    slice = (sft_slice_request){1, ranges, 2, NULL, 4, NULL};
    CHECK_STATUS(sft_file_read_slices(file, &slice, 1), invalid);
    slice = (sft_slice_request){1, NULL, 2, buffer, 4, NULL};
    CHECK_STATUS(sft_file_read_slices(file, &slice, 1), invalid);
    CHECK_STATUS(sft_file_close(NULL), invalid);
}

static void test_null_writer_arguments(sft_writer* writer) {
    const uint64_t shape = 1;
    uint64_t size;
    char buffer[64];
    const sft_status invalid = SFT_ERROR_INVALID_ARGUMENT;
    CHECK_STATUS(sft_writer_new(NULL), invalid);
    CHECK_STATUS(sft_writer_add_tensor(NULL, "a", 1, SFT_DTYPE_U8, &shape, 1, buffer, 1), invalid);
    CHECK_STATUS(sft_writer_add_tensor(writer, NULL, 1, SFT_DTYPE_U8, &shape, 1, buffer, 1), invalid);
    CHECK_STATUS(sft_writer_add_tensor(writer, "a", 1, SFT_DTYPE_U8, NULL, 1, buffer, 1), invalid);
    CHECK_STATUS(sft_writer_add_tensor(writer, "a", 1, SFT_DTYPE_U8, &shape, 1, NULL, 1), invalid);
    CHECK_STATUS(sft_writer_enable_metadata(NULL), invalid);
    CHECK_STATUS(sft_writer_add_metadata(NULL, "k", 1, "v", 1), invalid);
    CHECK_STATUS(sft_writer_add_metadata(writer, NULL, 1, "v", 1), invalid);
    CHECK_STATUS(sft_writer_add_metadata(writer, "k", 1, NULL, 1), invalid);
    CHECK_STATUS(sft_writer_get_size(NULL, NULL, &size), invalid);
    CHECK_STATUS(sft_writer_get_size(writer, NULL, NULL), invalid);
    CHECK_STATUS(sft_writer_write_file(NULL, path_of("never"), NULL), invalid);
    CHECK_STATUS(sft_writer_write_file(writer, NULL, NULL), invalid);
    CHECK_STATUS(sft_writer_write_buffer(NULL, NULL, buffer, 16), invalid);
    CHECK_STATUS(sft_writer_write_buffer(writer, NULL, NULL, 16), invalid);
    CHECK_OK(sft_writer_write_buffer(writer, NULL, buffer, 16));
}

void test_arguments(void) {
    const sft_status invalid = SFT_ERROR_INVALID_ARGUMENT;
    sft_dtype dtype;
    uint64_t size;
    CHECK_STATUS(sft_dtype_parse(NULL, &dtype), invalid);
    CHECK_STATUS(sft_dtype_parse("F32", NULL), invalid);
    CHECK_STATUS(sft_get_threads(NULL), invalid);
    CHECK_STATUS(sft_get_direct(NULL), invalid);
    CHECK_STATUS(sft_set_direct(SFT_DIRECT_ALWAYS + 1), invalid);
    CHECK(strstr(sft_last_error_get_message(), "unknown direct 3: give SFT_DIRECT_AUTO") != NULL);
    CHECK_STATUS(sft_dtype_compute_nbytes(SFT_DTYPE_U8, NULL, 1, &size), invalid);
    CHECK_STATUS(sft_dtype_compute_nbytes(SFT_DTYPE_U8, NULL, 0, NULL), invalid);
    CHECK_STATUS(sft_dtype_compute_nbytes(SFT_DTYPE_U8, (const uint64_t*)((const char*)&size + 1), 1, &size), invalid);
    CHECK(strstr(sft_last_error_get_message(), "aligned") != NULL);
    CHECK_STATUS(sft_dtype_compute_nbytes(SFT_DTYPE_U8, &size, SIZE_MAX / 8, &size), invalid);

    sft_file* file = NULL;
    CHECK_STATUS(sft_file_open(NULL, NULL, &file), invalid);
    CHECK(file == NULL);
    CHECK_STATUS(sft_file_open(path_of("three.safetensors"), NULL, NULL), invalid);
    CHECK_STATUS(sft_file_open_buffer(NULL, 8, &file), invalid);
    CHECK_STATUS(sft_file_open_buffer("", 0, NULL), invalid);
    CHECK_OK(sft_file_open(path_of("three.safetensors"), NULL, &file));
    test_null_file_arguments(file);
    sft_file_free(file);

    sft_writer* writer = NULL;
    CHECK_OK(sft_writer_new(&writer));
    test_null_writer_arguments(writer);
    sft_writer_free(writer);
}

void test_struct_sizes(void) {
    const sft_status invalid = SFT_ERROR_INVALID_ARGUMENT;
    const char* path = path_of("three.safetensors");
    sft_file* file = NULL;

    /* Options of a later version: fields that this library does not know must be zero. */
    struct {
        sft_open_options options;
        uint64_t later;
    } open = {SFT_OPEN_OPTIONS_INIT, 0};
    open.options.struct_size = sizeof open;
    CHECK_OK(sft_file_open(path, &open.options, &file));
    sft_file_free(file);
    open.later = 1;
    CHECK_STATUS(sft_file_open(path, &open.options, &file), invalid);
    open.options.struct_size = 0;
    CHECK_STATUS(sft_file_open(path, &open.options, &file), invalid);
    open.options.struct_size = sizeof(sft_open_options) - 1;
    CHECK_STATUS(sft_file_open(path, &open.options, &file), invalid);
    open.options.struct_size = SIZE_MAX;
    CHECK_STATUS(sft_file_open(path, &open.options, &file), invalid);
    open.options = (sft_open_options)SFT_OPEN_OPTIONS_INIT;
    open.options.prefault = 3;
    CHECK_STATUS(sft_file_open(path, &open.options, &file), invalid);
    open.options = (sft_open_options)SFT_OPEN_OPTIONS_INIT;
    open.options.backend = 2;
    CHECK_STATUS(sft_file_open(path, &open.options, &file), invalid);

    sft_writer* writer = NULL;
    uint64_t size;
    CHECK_OK(sft_writer_new(&writer));
    sft_save_options save = SFT_SAVE_OPTIONS_INIT;
    save.struct_size = 8;
    CHECK_STATUS(sft_writer_get_size(writer, &save, &size), invalid);
    save = (sft_save_options)SFT_SAVE_OPTIONS_INIT;
    save.reserved = 1;
    CHECK_STATUS(sft_writer_get_size(writer, &save, &size), invalid);
    save = (sft_save_options)SFT_SAVE_OPTIONS_INIT;
    save.durable = 2;
    CHECK_STATUS(sft_writer_get_size(writer, &save, &size), invalid);
    sft_sharded_options sharded = SFT_SHARDED_OPTIONS_INIT;
    sharded.reserved = 1;
    CHECK_STATUS(sft_writer_write_sharded(writer, "none", &sharded), invalid);
    sharded = (sft_sharded_options)SFT_SHARDED_OPTIONS_INIT;
    sharded.struct_size = 32;
    CHECK_STATUS(sft_writer_write_sharded(writer, "none", &sharded), invalid);
    sft_writer_free(writer);

    /* An output struct of a later version: fields that this library does not know become zero, and nothing beyond. */
    struct {
        sft_tensor_info info;
        uint64_t later, behind;
    } tensor = {SFT_TENSOR_INFO_INIT, 5, 6};
    tensor.info.struct_size = sizeof tensor.info + sizeof tensor.later;
    CHECK_OK(sft_file_open(path, NULL, &file));
    CHECK_OK(sft_file_get_tensor_info(file, 1, &tensor.info));
    CHECK(text_is(tensor.info.name, "matrix") && tensor.later == 0 && tensor.behind == 6);
    CHECK(tensor.info.struct_size == sizeof tensor.info + sizeof tensor.later);
    tensor.info.struct_size = 0;
    CHECK_STATUS(sft_file_get_tensor_info(file, 1, &tensor.info), invalid);
    CHECK(strstr(sft_last_error_get_message(), "struct_size") != NULL);
    sft_file_free(file);
}
