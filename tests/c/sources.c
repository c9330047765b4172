/* sft_source and sft_filesystem: files that the program reads by its own means. */
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"

enum { NBYTES = 20000000, PARTS = 3 };

static const char header[] =
    "{\"large\":{\"dtype\":\"I32\",\"shape\":[5000000],\"data_offsets\":[0,20000000]},"
    "\"small\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[20000000,20000003]}}";

/* An object in a bucket. */
struct object {
    const unsigned char* bytes;
    size_t length;
    atomic_int reads, frees;
    const char* etag;
    sft_status refuse; /* what reads return */
    const char* message;
};

static sft_status get_length(void* context, uint64_t* length, sft_source_error* error) {
    struct object* object = context;
    if (object->bytes == NULL) {
        CHECK_OK(sft_source_error_set(error, ENOENT, "404: no such object; look for it in the console"));
        return SFT_ERROR_IO;
    }
    *length = object->length;
    return SFT_OK;
}

static sft_status get_identity(void* context, const char** identity, sft_source_error* error) {
    struct object* object = context;
    (void)error;
    *identity = object->etag;
    return SFT_OK;
}

static sft_status read_ranges(void* context, uint64_t offset, const sft_buffer* buffers, size_t count,
                              sft_source_error* error) {
    struct object* object = context;
    atomic_fetch_add(&object->reads, 1);
    if (object->refuse != SFT_OK) {
        if (object->message != NULL) CHECK_OK(sft_source_error_set(error, 0, object->message));
        return object->refuse;
    }
    for (size_t i = 0; i < count; i++) {
        memcpy(buffers[i].data, object->bytes + offset, buffers[i].nbytes);
        offset += buffers[i].nbytes;
    }
    return SFT_OK;
}

static void free_object(void* context) { atomic_fetch_add(&((struct object*)context)->frees, 1); }

static bool message_has(const char* text) { return strstr(sft_last_error_get_message(), text) != NULL; }

void test_sources(void) {
    const char* name = "s3://bucket/model.safetensors";
    size_t length;
    unsigned char* bytes = make_file(header, NBYTES + PARTS, &length);
    unsigned char* data = bytes + 8 + strlen(header);
    for (size_t i = 0; i < NBYTES + PARTS; i++) data[i] = (unsigned char)(i * 7 >> 3);
    struct object object = {.bytes = bytes, .length = length, .etag = "one"};
    sft_source source = SFT_SOURCE_INIT;
    source.context = &object;
    source.get_length = get_length;
    source.get_identity = get_identity;
    source.read = read_ranges;
    source.free = free_object;

    sft_file* file = NULL;
    CHECK_OK(sft_file_open_source(&source, name, &file));
    CHECK(object.reads == 1);
    size_t count;
    CHECK_OK(sft_file_get_tensor_count(file, &count));
    CHECK(count == 2);
    unsigned char* large = malloc(NBYTES);
    unsigned char small[PARTS];
    const sft_read_request reads[] = {{0, large, NBYTES}, {1, small, PARTS}};
    CHECK_OK(sft_file_read_tensors(file, reads, 2));
    CHECK(memcmp(large, data, NBYTES) == 0 && memcmp(small, data + NBYTES, PARTS) == 0);
    const void* nowhere;
    CHECK_STATUS(sft_file_get_data(file, 1, &nowhere), SFT_ERROR_INVALID_ARGUMENT);
    const sft_range range = {1000, 3000, 2};
    CHECK_OK(sft_file_read_slice(file, 0, &range, 1, large, 4000));
    CHECK(memcmp(large, data + 4000, 4) == 0 && memcmp(large + 3996, data + 11992, 4) == 0);

    /* Faults: the message of the source, its name, and the tensor. */
    object.refuse = SFT_ERROR_IO;
    object.message = "503: try again later";
    CHECK_STATUS(sft_file_read_tensor(file, 0, large, NBYTES), SFT_ERROR_IO);
    CHECK(message_has(name) && message_has("503: try again later") && message_has("\"large\""));
    object.message = NULL;
    object.refuse = 12345;
    CHECK_STATUS(sft_file_read_tensor(file, 0, large, NBYTES), SFT_ERROR_IO);
    CHECK(message_has("the source cannot read"));
    object.refuse = SFT_ERROR_FILE_CHANGED;
    CHECK_STATUS(sft_file_read_tensor(file, 0, large, NBYTES), SFT_ERROR_FILE_CHANGED);
    object.refuse = SFT_OK;
    object.etag = "two";
    CHECK_STATUS(sft_file_read_tensor(file, 0, large, NBYTES), SFT_ERROR_FILE_CHANGED);
    CHECK(message_has("was replaced while it was read"));
    CHECK(object.frees == 0);
    sft_file_free(file);
    CHECK(object.frees == 1);

    /* A source that is closed, or cannot be opened, is freed too. */
    CHECK_OK(sft_file_open_source(&source, name, &file));
    CHECK_OK(sft_file_close(file));
    CHECK(object.frees == 2);
    sft_file_free(file);
    object.bytes = NULL;
    CHECK_STATUS(sft_file_open_source(&source, name, &file), SFT_ERROR_IO);
    CHECK(message_has("404: no such object") && message_has(name) && file == NULL);
    CHECK(sft_last_error_get_os_error() == ENOENT);
    object.bytes = bytes;
    object.length = 7;
    CHECK_STATUS(sft_file_open_source(&source, name, &file), SFT_ERROR_FILE_TOO_SMALL);
    CHECK(object.frees == 4);
    source.read = NULL;
    CHECK_STATUS(sft_file_open_source(&source, name, &file), SFT_ERROR_INVALID_ARGUMENT);
    CHECK(object.frees == 5);
    source.struct_size = 1;
    CHECK_STATUS(sft_file_open_source(&source, name, &file), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(sft_file_open_source(NULL, name, &file), SFT_ERROR_INVALID_ARGUMENT);
    CHECK(object.frees == 5);
    CHECK_STATUS(sft_source_error_set(NULL, 0, "text"), SFT_ERROR_INVALID_ARGUMENT);
    free(large);
    free(bytes);
}

/* A bucket with one checkpoint of two files. */
struct bucket {
    struct object index, shards[2];
    sft_status refuse_list;
    atomic_int opens;
};

static sft_status open_object(void* context, const char* path, sft_source* source, sft_source_error* error) {
    struct bucket* bucket = context;
    atomic_fetch_add(&bucket->opens, 1);
    CHECK(source->struct_size == sizeof(sft_source) && source->read == NULL);
    if (strcmp(path, "s3://bucket/llm/model.safetensors.index.json") == 0) source->context = &bucket->index;
    if (strcmp(path, "s3://bucket/llm/a.safetensors") == 0) source->context = &bucket->shards[0];
    if (strcmp(path, "s3://bucket/llm/b.safetensors") == 0) source->context = &bucket->shards[1];
    if (source->context == NULL) {
        CHECK_OK(sft_source_error_set(error, ENOENT, "404: no such object"));
        return SFT_ERROR_IO;
    }
    source->get_length = get_length;
    source->get_identity = get_identity;
    source->read = read_ranges;
    source->free = free_object;
    return SFT_OK;
}

static sft_status list_objects(void* context, const char* directory, const char* const** names, size_t* count,
                               sft_source_error* error) {
    struct bucket* bucket = context;
    if (bucket->refuse_list != SFT_OK) {
        CHECK_OK(sft_source_error_set(error, EACCES, "403: no permission to list"));
        return bucket->refuse_list;
    }
    static const char* const all[] = {"README.md", "b.safetensors", "model.safetensors.index.json"};
    *names = all;
    *count = strcmp(directory, "s3://bucket/llm") == 0 ? 3 : 0;
    return SFT_OK;
}

void test_filesystems(void) {
    static const char index[] = "{\"weight_map\": {\"x\": \"a.safetensors\", \"y\": \"b.safetensors\"}}";
    static struct bucket bucket;
    size_t lengths[2];
    unsigned char* files[2];
    for (int i = 0; i < 2; i++) {
        const char* one = i == 0 ? "{\"x\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}}"
                                 : "{\"y\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}}";
        files[i] = make_file(one, 4, &lengths[i]);
        memset(files[i] + lengths[i] - 4, 'x' + i, 4);
        bucket.shards[i] = (struct object){.bytes = files[i], .length = lengths[i], .etag = "one"};
    }
    bucket.index = (struct object){.bytes = (const unsigned char*)index, .length = strlen(index), .etag = "one"};
    sft_filesystem filesystem = SFT_FILESYSTEM_INIT;
    filesystem.context = &bucket;
    filesystem.open = open_object;
    filesystem.list = list_objects;

    sft_checkpoint* checkpoint = NULL;
    const char* paths[] = {"s3://bucket/llm", "s3://bucket/llm/model.safetensors.index.json"};
    for (int i = 0; i < 2; i++) {
        CHECK_OK(sft_checkpoint_open_in(&filesystem, paths[i], NULL, &checkpoint));
        size_t shard, at;
        CHECK_OK(sft_checkpoint_find_tensor(checkpoint, "y", 1, &shard, &at));
        sft_str name;
        const sft_file* file;
        CHECK_OK(sft_checkpoint_get_shard(checkpoint, shard, &name, &file));
        CHECK(name.length == 13 && memcmp(name.data, "b.safetensors", 13) == 0);
        unsigned char bytes[4];
        CHECK_OK(sft_file_read_tensor(file, at, bytes, 4));
        CHECK(memcmp(bytes, "yyyy", 4) == 0);
        CHECK(bucket.index.frees == i + 1 && bucket.shards[1].frees == i);
        sft_checkpoint_free(checkpoint);
        CHECK(bucket.shards[0].frees == i + 1 && bucket.shards[1].frees == i + 1);
    }

    /* Directories that cannot be listed. */
    bucket.refuse_list = SFT_ERROR_IO;
    CHECK_OK(sft_checkpoint_open_in(&filesystem, "s3://bucket/llm/", NULL, &checkpoint));
    sft_checkpoint_free(checkpoint);
    filesystem.list = NULL;
    CHECK_OK(sft_checkpoint_open_in(&filesystem, "s3://bucket/llm", NULL, &checkpoint));
    sft_checkpoint_free(checkpoint);
    CHECK_STATUS(sft_checkpoint_open_in(&filesystem, "s3://bucket/none", NULL, &checkpoint), SFT_ERROR_IO);
    CHECK(checkpoint == NULL && message_has("s3://bucket/none: 404: no such object"));
    CHECK(message_has("cannot be listed") && sft_last_error_get_os_error() == ENOENT);

    bucket.shards[0].bytes = NULL;
    CHECK_STATUS(sft_checkpoint_open_in(&filesystem, "s3://bucket/llm", NULL, &checkpoint), SFT_ERROR_IO);
    CHECK(message_has("s3://bucket/llm/a.safetensors: 404") && message_has("lists this shard"));
    filesystem.open = NULL;
    CHECK_STATUS(sft_checkpoint_open_in(&filesystem, "s3://bucket/llm", NULL, &checkpoint), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(sft_checkpoint_open_in(NULL, "s3://bucket/llm", NULL, &checkpoint), SFT_ERROR_INVALID_ARGUMENT);
    filesystem.struct_size = 8;
    CHECK_STATUS(sft_checkpoint_open_in(&filesystem, "s3://bucket/llm", NULL, &checkpoint), SFT_ERROR_INVALID_ARGUMENT);
    for (int i = 0; i < 2; i++) free(files[i]);
}
