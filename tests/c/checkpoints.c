/* sft_checkpoint: writes and reads shards and their index. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"

static const unsigned char values[6] = {1, 2, 3, 4, 5, 6};
static const char* const names[3] = {"c", "a", "b"};

/* Three tensors of 2 bytes: c is 1 2, a is 3 4, b is 5 6. */
static sft_writer* three_pairs(void) {
    static const uint64_t shape[] = {2};
    sft_writer* writer = NULL;
    CHECK_OK(sft_writer_new(&writer));
    for (size_t i = 0; i < 3; i++) {
        CHECK_OK(sft_writer_add_tensor(writer, names[i], 1, SFT_DTYPE_U8, shape, 1, values + 2 * i, 2));
    }
    CHECK_OK(sft_writer_add_metadata(writer, "format", 6, "pt", 2));
    return writer;
}

static bool exists(const char* name) { return access(path_of(name), F_OK) == 0; }

static void write_text(const char* name, const char* text) {
    FILE* stream = fopen(path_of(name), "wb");
    CHECK(stream != NULL && fputs(text, stream) >= 0 && fclose(stream) == 0);
}

static void check_values(const sft_checkpoint* checkpoint) {
    for (size_t i = 0; i < 3; i++) {
        size_t shard = 9, index = 9;
        CHECK_OK(sft_checkpoint_find_tensor(checkpoint, names[i], 1, &shard, &index));
        const sft_file* file = NULL;
        sft_str name;
        CHECK_OK(sft_checkpoint_get_shard(checkpoint, shard, &name, &file));
        unsigned char bytes[2] = {0, 0};
        CHECK_OK(sft_file_read_tensor(file, index, bytes, sizeof bytes));
        CHECK(memcmp(bytes, values + 2 * i, 2) == 0);
        sft_str value;
        CHECK_OK(sft_file_find_metadata(file, "format", 6, &value));
        CHECK(text_is(value, "pt"));
    }
}

static void test_written_checkpoint(const char* path, const sft_checkpoint_options* options) {
    sft_checkpoint* checkpoint = NULL;
    CHECK_OK(sft_checkpoint_open(path, options, &checkpoint));
    size_t count = 0;
    CHECK_OK(sft_checkpoint_get_shard_count(checkpoint, &count));
    CHECK(count == 2);
    CHECK_OK(sft_checkpoint_get_tensor_count(checkpoint, &count));
    CHECK(count == 3);
    sft_str name;
    const sft_file* file;
    CHECK_OK(sft_checkpoint_get_shard(checkpoint, 1, &name, &file));
    CHECK(text_is(name, "m-00002-of-00002.safetensors"));
    CHECK_STATUS(sft_checkpoint_get_shard(checkpoint, 2, &name, &file), SFT_ERROR_INVALID_ARGUMENT);
    /* In the order of names: a, b, c. */
    static const size_t shards[3] = {0, 1, 0}, indices[3] = {0, 0, 1};
    size_t shard = 9, index = 9;
    for (size_t i = 0; i < 3; i++) {
        CHECK_OK(sft_checkpoint_get_sorted_tensor(checkpoint, i, &shard, &index));
        CHECK(shard == shards[i] && index == indices[i]);
    }
    CHECK_STATUS(sft_checkpoint_get_sorted_tensor(checkpoint, 3, &shard, &index), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(sft_checkpoint_find_tensor(checkpoint, "d", 1, &shard, &index), SFT_ERROR_TENSOR_NOT_FOUND);
    CHECK(strstr(sft_last_error_get_message(), "m.safetensors.index.json") != NULL);
    check_values(checkpoint);
    sft_checkpoint_free(checkpoint);
}

static void check_refused(const char* name, sft_status expected, const char* message) {
    sft_checkpoint* checkpoint = (sft_checkpoint*)&checkpoint;
    CHECK_STATUS(sft_checkpoint_open(path_of(name), NULL, &checkpoint), expected);
    CHECK(checkpoint == NULL);
    CHECK(strstr(sft_last_error_get_message(), message) != NULL);
}

/* Writes the file of a process: `count` elements of the tensor "w", from `offset` on. */
static void write_chunk(const char* name, const char* offsets, uint64_t count, const unsigned char* data) {
    sft_writer* writer = NULL;
    CHECK_OK(sft_writer_new(&writer));
    CHECK_OK(sft_writer_add_tensor(writer, "w", 1, SFT_DTYPE_U8, &count, 1, data, count));
    CHECK_OK(sft_writer_add_metadata(writer, "DCP_SHARDING_INFO", 17, offsets, strlen(offsets)));
    CHECK_OK(sft_writer_write_file(writer, path_of(name), NULL));
    sft_writer_free(writer);
}

static void test_consolidation(void) {
    CHECK(mkdir(path_of("chunks"), 0777) == 0);
    char input[4096], output[4096];
    snprintf(input, sizeof input, "%s", path_of("chunks"));
    snprintf(output, sizeof output, "%s", path_of("whole"));
    CHECK_STATUS(sft_consolidate(input, output, NULL), SFT_ERROR_INVALID_ARGUMENT);
    write_chunk("chunks/shard-00002-model-00001-of-00001.safetensors", "{\"w\": {\"saved_offsets\": [2]}}", 4,
                values + 2);
    CHECK_STATUS(sft_consolidate(input, output, NULL), SFT_ERROR_OFFSETS);
    CHECK(strstr(sft_last_error_get_message(), "tensor \"w\"") != NULL && !exists("whole"));
    write_chunk("chunks/shard-00001-model-00001-of-00001.safetensors", "{\"w\": {\"saved_offsets\": [0]}}", 2, values);
    sft_sharded_options options = SFT_SHARDED_OPTIONS_INIT;
    options.stem = "m";
    CHECK_OK(sft_consolidate(input, output, &options));
    sft_file* file = NULL;
    CHECK_OK(sft_file_open(path_of("whole/m.safetensors"), NULL, &file));
    unsigned char bytes[6];
    CHECK_OK(sft_file_read_tensor(file, 0, bytes, sizeof bytes));
    CHECK(memcmp(bytes, values, sizeof bytes) == 0);
    sft_file_free(file);
    CHECK_STATUS(sft_consolidate(NULL, output, NULL), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(sft_consolidate(input, NULL, NULL), SFT_ERROR_INVALID_ARGUMENT);
    options.struct_size = 1;
    CHECK_STATUS(sft_consolidate(input, output, &options), SFT_ERROR_INVALID_ARGUMENT);
}

void test_checkpoints(void) {
    test_consolidation();
    sft_writer* writer = three_pairs();
    sft_sharded_options options = SFT_SHARDED_OPTIONS_INIT;
    options.stem = "m";
    options.max_shard_size = 4;
    options.durable = 1;
    CHECK_OK(sft_writer_write_sharded(writer, path_of("deep/sharded"), &options));
    CHECK(exists("deep/sharded/m.safetensors.index.json"));
    sft_checkpoint_options pread = SFT_CHECKPOINT_OPTIONS_INIT;
    pread.backend = SFT_BACKEND_PREAD;
    test_written_checkpoint(path_of("deep/sharded"), NULL);
    test_written_checkpoint(path_of("deep/sharded/m.safetensors.index.json"), &pread);

    /* A single file is a checkpoint too, and replaces the shards of its stem. */
    options.max_shard_size = 0;
    CHECK_OK(sft_writer_write_sharded(writer, path_of("deep/sharded"), &options));
    CHECK(exists("deep/sharded/m.safetensors") && !exists("deep/sharded/m.safetensors.index.json"));
    CHECK(!exists("deep/sharded/m-00001-of-00002.safetensors"));
    CHECK_OK(sft_writer_write_sharded(writer, path_of("one"), NULL));
    CHECK(exists("one/model.safetensors"));
    sft_checkpoint* checkpoint = NULL;
    CHECK_OK(sft_checkpoint_open(path_of("one/model.safetensors"), NULL, &checkpoint));
    check_values(checkpoint);
    sft_checkpoint_free(checkpoint);
    sft_checkpoint_free(NULL);
    options.stem = "../m";
    CHECK_STATUS(sft_writer_write_sharded(writer, path_of("one"), &options), SFT_ERROR_INVALID_ARGUMENT);
    options.stem = "\xff";
    CHECK_STATUS(sft_writer_write_sharded(writer, path_of("one"), &options), SFT_ERROR_INVALID_ARGUMENT);
    sft_writer_free(writer);

    /* A variant, and an index that omits a tensor of its files. */
    writer = three_pairs();
    options.stem = "m.fp16";
    options.max_shard_size = 4;
    CHECK_OK(sft_writer_write_sharded(writer, path_of("deep/sharded"), &options));
    sft_writer_free(writer);
    sft_checkpoint_options chosen = SFT_CHECKPOINT_OPTIONS_INIT;
    chosen.variant = "fp16";
    CHECK_OK(sft_checkpoint_open(path_of("deep/sharded"), &chosen, &checkpoint));
    size_t count = 0;
    CHECK_OK(sft_checkpoint_get_shard_count(checkpoint, &count));
    CHECK(count == 2);
    check_values(checkpoint);
    sft_checkpoint_free(checkpoint);
    write_text("deep/sharded/m.fp16.safetensors.index.json",
               "{\"weight_map\": {\"b\": \"m.fp16-00002-of-00002.safetensors\", \"c\": "
               "\"m.fp16-00001-of-00002.safetensors\"}}");
    CHECK_STATUS(sft_checkpoint_open(path_of("deep/sharded"), &chosen, &checkpoint), SFT_ERROR_INDEX);
    chosen.extra = SFT_EXTRA_IGNORE;
    CHECK_OK(sft_checkpoint_open(path_of("deep/sharded"), &chosen, &checkpoint));
    CHECK_OK(sft_checkpoint_get_tensor_count(checkpoint, &count));
    CHECK(count == 2);
    size_t shard = 9, index = 9;
    CHECK_STATUS(sft_checkpoint_find_tensor(checkpoint, "a", 1, &shard, &index), SFT_ERROR_TENSOR_NOT_FOUND);
    CHECK_OK(sft_checkpoint_find_tensor(checkpoint, "c", 1, &shard, &index));
    CHECK(shard == 0 && index == 1);
    sft_checkpoint_free(checkpoint);
    chosen.variant = "bf16";
    CHECK_STATUS(sft_checkpoint_open(path_of("deep/sharded"), &chosen, &checkpoint), SFT_ERROR_INDEX);
    CHECK(strstr(sft_last_error_get_message(), "m.fp16.safetensors.index.json (variant \"fp16\")") != NULL);
    CHECK_STATUS(sft_checkpoint_open(path_of("one/model.safetensors"), &chosen, &checkpoint),
                 SFT_ERROR_INVALID_ARGUMENT);
    chosen.variant = "\xff";
    CHECK_STATUS(sft_checkpoint_open(path_of("deep/sharded"), &chosen, &checkpoint), SFT_ERROR_INVALID_ARGUMENT);
    chosen.variant = NULL;
    chosen.extra = 2;
    CHECK_STATUS(sft_checkpoint_open(path_of("deep/sharded"), &chosen, &checkpoint), SFT_ERROR_INVALID_ARGUMENT);

    /* Invalid indexes. */
    CHECK(mkdir(path_of("bad"), 0700) == 0);
    check_refused("bad", SFT_ERROR_INDEX, "no checkpoint");
    write_text("bad/model.safetensors.index.json", "{\"weight_map\": {\"a\": \"../one/model.safetensors\"}}");
    check_refused("bad", SFT_ERROR_INDEX, "../one/model.safetensors");
    write_text("bad/model.safetensors.index.json", "{\"weight_map\": {\"a\": \"gone.safetensors\"}}");
    check_refused("bad", SFT_ERROR_IO, "model.safetensors.index.json lists this shard");
    CHECK(sft_last_error_get_os_error() == ENOENT && strstr(sft_last_error_get_message(), "gone.safetensors") != NULL);
    write_text("bad/model.safetensors.index.json", "{\"weight_map\": {\"a\": \"x\", \"a\": \"x\"}}");
    check_refused("bad", SFT_ERROR_DUPLICATE, "twice");
    write_text("bad/model.safetensors.index.json", "[1]");
    check_refused("bad/model.safetensors.index.json", SFT_ERROR_INDEX, "model.safetensors.index.json");
    check_refused("gone", SFT_ERROR_IO, "gone");

    CHECK_STATUS(sft_checkpoint_open(NULL, NULL, &checkpoint), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(sft_checkpoint_open(path_of("one"), NULL, NULL), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(sft_checkpoint_get_tensor_count(NULL, &count), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(sft_checkpoint_get_shard_count(NULL, &count), SFT_ERROR_INVALID_ARGUMENT);
}
