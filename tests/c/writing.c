/* sft_writer: writes a file and a buffer. The reading tests open "three.safetensors", which test_writing writes. */
#include <errno.h>
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

static sft_writer* three_tensors(void) {
    sft_writer* writer = NULL;
    CHECK_OK(sft_writer_new(&writer));
    CHECK_OK(sft_writer_add_tensor(writer, "a\0b", 3, SFT_DTYPE_U8, bytes_shape, 1, bytes, sizeof bytes));
    CHECK_OK(sft_writer_add_tensor(writer, "matrix", 6, SFT_DTYPE_F32, matrix_shape, 2, matrix, sizeof matrix));
    CHECK_OK(sft_writer_add_tensor(writer, "", 0, SFT_DTYPE_I64, none_shape, 2, NULL, 0));
    CHECK_OK(sft_writer_add_metadata(writer, "format", 6, "pt", 2));
    CHECK_OK(sft_writer_add_metadata(writer, "\0", 1, "", 0));
    return writer;
}

static void compare_with_file(const void* expected, size_t length, const char* name) {
    FILE* stream = fopen(path_of(name), "rb");
    CHECK(stream != NULL);
    if (stream == NULL) {
        return;
    }
    unsigned char* found = malloc(length + 1);
    CHECK(found != NULL && fread(found, 1, length + 1, stream) == length && memcmp(found, expected, length) == 0);
    free(found);
    fclose(stream);
}

static void test_targets(const sft_writer* writer) {
    /* sft_writer_get_size returns the exact size, and the file has the same bytes as the buffer. */
    uint64_t size = 0;
    CHECK_OK(sft_writer_get_size(writer, NULL, &size));
    void* buffer = malloc(size);
    CHECK_OK(sft_writer_write_buffer(writer, NULL, buffer, size));
    CHECK_STATUS(sft_writer_write_buffer(writer, NULL, buffer, size - 1), SFT_ERROR_BUFFER_SIZE);
    CHECK_OK(sft_writer_write_file(writer, path_of("three.safetensors"), NULL));
    compare_with_file(buffer, size, "three.safetensors");

    sft_file* file = NULL;
    CHECK_OK(sft_file_open_buffer(buffer, size, &file));
    size_t count = 0;
    CHECK_OK(sft_file_get_tensor_count(file, &count));
    CHECK(count == 3);
    sft_file_free(file);
    free(buffer);

    /* An existing file keeps its permissions. */
    CHECK(chmod(path_of("three.safetensors"), 0640) == 0);
    sft_save_options options = SFT_SAVE_OPTIONS_INIT;
    options.durable = 1;
    CHECK_OK(sft_writer_write_file(writer, path_of("three.safetensors"), &options));
    struct stat status;
    CHECK(stat(path_of("three.safetensors"), &status) == 0 && (status.st_mode & 07777) == 0640);

    CHECK_STATUS(sft_writer_write_file(writer, path_of("absent/file"), NULL), SFT_ERROR_IO);
    CHECK(sft_last_error_get_os_error() == ENOENT);
    CHECK_STATUS(sft_writer_write_file(writer, path_of("."), NULL), SFT_ERROR_IO);
    CHECK(sft_last_error_get_os_error() == EISDIR);
}

static void test_alignment(const sft_writer* writer) {
    sft_save_options options = SFT_SAVE_OPTIONS_INIT;
    uint64_t size = 0, aligned = 0;
    CHECK_OK(sft_writer_get_size(writer, &options, &size));
    options.alignment = 0;
    CHECK_OK(sft_writer_get_size(writer, &options, &aligned));
    CHECK(size == aligned);
    options.alignment = 4096;
    CHECK_OK(sft_writer_get_size(writer, &options, &aligned));
    CHECK(aligned == 4096 + sizeof matrix + sizeof bytes);
    CHECK_OK(sft_writer_write_file(writer, path_of("aligned.safetensors"), &options));
    sft_file* file = NULL;
    CHECK_OK(sft_file_open(path_of("aligned.safetensors"), NULL, &file));
    sft_tensor_info info = SFT_TENSOR_INFO_INIT;
    CHECK_OK(sft_file_get_tensor_info(file, 0, &info));
    CHECK(info.begin == 4096);
    sft_file_free(file);
    options.alignment = 24;
    CHECK_STATUS(sft_writer_get_size(writer, &options, &aligned), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(sft_writer_write_file(writer, path_of("never"), &options), SFT_ERROR_INVALID_ARGUMENT);
    CHECK(access(path_of("never"), F_OK) != 0);
}

static void test_refusals(void) {
    sft_writer* writer = NULL;
    uint64_t size = 0;
    CHECK_OK(sft_writer_new(&writer));
    CHECK_STATUS(sft_writer_add_tensor(writer, "a", 1, 22, bytes_shape, 1, bytes, 3), SFT_ERROR_UNSUPPORTED_DTYPE);
    CHECK_STATUS(sft_writer_add_tensor(writer, "a", 1, SFT_DTYPE_U8, bytes_shape, 1, bytes, 2), SFT_ERROR_BUFFER_SIZE);
    CHECK_STATUS(sft_writer_add_tensor(writer, "a", 1, SFT_DTYPE_F4, bytes_shape, 1, bytes, 2),
                 SFT_ERROR_SIZE_MISMATCH);
    const uint64_t huge[] = {UINT64_MAX, 2};
    CHECK_STATUS(sft_writer_add_tensor(writer, "a", 1, SFT_DTYPE_U8, huge, 2, bytes, 2), SFT_ERROR_SHAPE_OVERFLOW);
    CHECK_STATUS(sft_writer_add_tensor(writer, "\xff", 1, SFT_DTYPE_U8, bytes_shape, 1, bytes, 3),
                 SFT_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(sft_writer_add_tensor(writer, "a", 1, SFT_DTYPE_U8, bytes_shape, 1, NULL, 3),
                 SFT_ERROR_INVALID_ARGUMENT);

    /* Refused tensors are not added: the file is empty. */
    CHECK_OK(sft_writer_get_size(writer, NULL, &size));
    CHECK(size == 16);
    char empty[16];
    CHECK_OK(sft_writer_write_buffer(writer, NULL, empty, sizeof empty));
    CHECK(memcmp(empty, "\x08\0\0\0\0\0\0\0{}      ", 16) == 0);
    CHECK_OK(sft_writer_enable_metadata(writer));
    CHECK_OK(sft_writer_enable_metadata(writer));
    CHECK_OK(sft_writer_get_size(writer, NULL, &size));
    CHECK(size == 32);

    CHECK_OK(sft_writer_add_metadata(writer, "k", 1, "v", 1));
    CHECK_STATUS(sft_writer_add_metadata(writer, "k", 1, "w", 1), SFT_ERROR_DUPLICATE);
    CHECK_STATUS(sft_writer_add_metadata(writer, "\xc0", 1, "w", 1), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(sft_writer_add_metadata(writer, "l", 1, "\xc0", 1), SFT_ERROR_INVALID_ARGUMENT);

    CHECK_OK(sft_writer_add_tensor(writer, "a", 1, SFT_DTYPE_U8, bytes_shape, 1, bytes, 3));
    CHECK_OK(sft_writer_add_tensor(writer, "a", 1, SFT_DTYPE_I8, bytes_shape, 1, bytes, 3));
    CHECK_STATUS(sft_writer_get_size(writer, NULL, &size), SFT_ERROR_DUPLICATE);
    CHECK_STATUS(sft_writer_write_file(writer, path_of("never"), NULL), SFT_ERROR_DUPLICATE);
    CHECK_STATUS(sft_writer_write_buffer(writer, NULL, empty, sizeof empty), SFT_ERROR_DUPLICATE);
    sft_writer_free(writer);

    CHECK_OK(sft_writer_new(&writer));
    CHECK_OK(sft_writer_add_tensor(writer, "__metadata__", 12, SFT_DTYPE_U8, bytes_shape, 1, bytes, 3));
    CHECK_STATUS(sft_writer_write_file(writer, path_of("never"), NULL), SFT_ERROR_RESERVED_NAME);
    CHECK(access(path_of("never"), F_OK) != 0);
    sft_writer_free(writer);
    sft_writer_free(NULL);
}

void test_writing(void) {
    sft_writer* writer = three_tensors();
    test_targets(writer);
    test_alignment(writer);
    sft_writer_free(writer);
    test_refusals();
}
