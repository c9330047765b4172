/* sft_edit_metadata. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"

static const unsigned char bytes[3] = {7, 8, 9};

static sft_str text(const char* value) { return (sft_str){value, strlen(value)}; }

static const sft_str none = {NULL, 0};

/* Writes a file of one tensor, whose data begins at a multiple of `alignment`. */
static void make_edited(uint64_t alignment) {
    const uint64_t shape[] = {3};
    sft_save_options options = SFT_SAVE_OPTIONS_INIT;
    options.alignment = alignment;
    sft_writer* writer = NULL;
    CHECK_OK(sft_writer_new(&writer));
    CHECK_OK(sft_writer_add_tensor(writer, "bytes", 5, SFT_DTYPE_U8, shape, 1, bytes, sizeof bytes));
    CHECK_OK(sft_writer_add_metadata(writer, "format", 6, "pt", 2));
    CHECK_OK(sft_writer_write_file(writer, path_of("edited.safetensors"), &options));
    sft_writer_free(writer);
}

static ino_t inode(void) {
    struct stat status;
    CHECK(stat(path_of("edited.safetensors"), &status) == 0);
    return status.st_ino;
}

/* Checks that the file has its tensor, `count` metadata entries, and `value` for `key`, or no such key if it is NULL.
 */
static void check_entry(size_t count, const char* key, const char* value) {
    sft_file* file = NULL;
    size_t found_count = 0;
    sft_str found = none;
    unsigned char data[3] = {0};
    CHECK_OK(sft_file_open(path_of("edited.safetensors"), NULL, &file));
    CHECK_OK(sft_file_get_metadata_count(file, &found_count));
    CHECK_OK(sft_file_find_metadata(file, key, strlen(key), &found));
    CHECK(found_count == count && (value == NULL ? found.data == NULL : text_is(found, value)));
    CHECK_OK(sft_file_read_tensor(file, 0, data, sizeof data));
    CHECK(memcmp(data, bytes, sizeof bytes) == 0);
    sft_file_free(file);
}

static void test_in_place_and_rewritten(void) {
    make_edited(4096);
    const ino_t before = inode();
    sft_edit_options options = SFT_EDIT_OPTIONS_INIT;
    const sft_metadata_change set[] = {{text("format"), none}, {text("epoch"), text("3")}, {text("empty"), text("")}};
    CHECK_OK(sft_edit_metadata(path_of("edited.safetensors"), set, 3, NULL));
    CHECK(inode() != before);
    check_entry(2, "epoch", "3");
    check_entry(2, "empty", "");
    check_entry(2, "format", NULL);
    const ino_t rewritten = inode();
    CHECK_OK(sft_edit_metadata(path_of("edited.safetensors"), NULL, 0, &options)); /* nothing to change */
    options.in_place = 1;
    options.durable = 1;
    const sft_metadata_change removed[] = {{text("empty"), none}};
    CHECK_OK(sft_edit_metadata(path_of("edited.safetensors"), removed, 1, &options));
    check_entry(1, "epoch", "3");
    CHECK(inode() == rewritten);
    check_entry(1, "epoch", "3");

    /* Without reserved bytes, then with some. */
    make_edited(8);
    options = (sft_edit_options)SFT_EDIT_OPTIONS_INIT;
    options.in_place = 1;
    const sft_metadata_change change[] = {{text("key"), text("a value that is longer than the padding")}};
    CHECK_STATUS(sft_edit_metadata(path_of("edited.safetensors"), change, 1, &options), SFT_ERROR_INVALID_ARGUMENT);
    check_entry(1, "format", "pt");
    options.in_place = 0;
    options.reserve = 100;
    CHECK_OK(sft_edit_metadata(path_of("edited.safetensors"), NULL, 0, &options));
    options.in_place = 1;
    options.reserve = 0;
    CHECK_OK(sft_edit_metadata(path_of("edited.safetensors"), change, 1, &options));
    check_entry(2, "key", "a value that is longer than the padding");
}

static void test_refused_edits(void) {
    make_edited(8);
    const char* path = path_of("edited.safetensors");
    const sft_metadata_change twice[] = {{text("a"), text("1")}, {text("a"), none}};
    CHECK_STATUS(sft_edit_metadata(path, twice, 2, NULL), SFT_ERROR_DUPLICATE);
    CHECK(strstr(sft_last_error_get_message(), "edited.safetensors: the changes contain the key \"a\" twice") != NULL);
    const sft_metadata_change bad_key[] = {{text("\xff"), text("1")}};
    CHECK_STATUS(sft_edit_metadata(path, bad_key, 1, NULL), SFT_ERROR_INVALID_ARGUMENT);
    const sft_metadata_change bad_value[] = {{text("a"), text("\xff")}};
    CHECK_STATUS(sft_edit_metadata(path, bad_value, 1, NULL), SFT_ERROR_INVALID_ARGUMENT);
    const sft_metadata_change no_value[] = {{text("a"), {NULL, 1}}};
    CHECK_STATUS(sft_edit_metadata(path, no_value, 1, NULL), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(sft_edit_metadata(path, NULL, 1, NULL), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(sft_edit_metadata(NULL, NULL, 0, NULL), SFT_ERROR_INVALID_ARGUMENT);
    sft_edit_options options = SFT_EDIT_OPTIONS_INIT;
    options.in_place = 2;
    CHECK_STATUS(sft_edit_metadata(path, NULL, 0, &options), SFT_ERROR_INVALID_ARGUMENT);
    options = (sft_edit_options)SFT_EDIT_OPTIONS_INIT;
    options.durable = 2;
    CHECK_STATUS(sft_edit_metadata(path, NULL, 0, &options), SFT_ERROR_INVALID_ARGUMENT);
    options = (sft_edit_options)SFT_EDIT_OPTIONS_INIT;
    options.struct_size = 0;
    CHECK_STATUS(sft_edit_metadata(path, NULL, 0, &options), SFT_ERROR_INVALID_ARGUMENT);
    options = (sft_edit_options)SFT_EDIT_OPTIONS_INIT;
    options.reserve = UINT64_MAX;
    CHECK_STATUS(sft_edit_metadata(path, NULL, 0, &options), SFT_ERROR_HEADER_TOO_LARGE);
    CHECK_STATUS(sft_edit_metadata(path_of("absent"), NULL, 0, NULL), SFT_ERROR_IO);
    CHECK(sft_last_error_get_os_error() == ENOENT);
    check_entry(1, "format", "pt");
    CHECK(truncate(path_of("edited.safetensors"), 20) == 0);
    CHECK_STATUS(sft_edit_metadata(path_of("edited.safetensors"), NULL, 0, NULL), SFT_ERROR_HEADER_TRUNCATED);
}

void test_edits(void) {
    test_in_place_and_rewritten();
    test_refused_edits();
}
