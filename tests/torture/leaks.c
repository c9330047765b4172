/* Ten thousand rounds of loads, saves, incremental writers and edits, failures among them: memory, descriptors,
 * mappings and threads stay what they were after a thousand others. Run with a directory. */
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common.h"

/* And how many bytes may be more at the end: 13 a round, so that no leak in each of them passes. */
enum { WARM_UP = 1000, ROUNDS = WARM_UP + 10000, SLACK = 128 << 10 };

/* A writer that is committed, one that is given up, and one that is not complete; edits in place and by a rewrite, and
 * such as are refused. */
static void changes_of(long round, const content* what) {
    const char *written = path_of("written.safetensors"), *edited = path_of("edited.safetensors");
    EXPECT(content_write_incrementally(what, written, NULL) == SFT_OK, "%s", sft_last_error_get_message());
    EXPECT(content_write_incrementally(what, path_of("no/directory"), NULL) == SFT_ERROR_IO, "no directory");
    const uint64_t shape[] = {4};
    sft_writer* writer = NULL;
    sft_incremental_writer* writing = NULL;
    EXPECT(sft_writer_new(&writer) == SFT_OK &&
               sft_writer_declare_tensor(writer, "a", 1, SFT_DTYPE_U8, shape, 1) == SFT_OK &&
               sft_incremental_writer_create(writer, written, NULL, &writing) == SFT_OK,
           "%s", sft_last_error_get_message());
    EXPECT(sft_incremental_writer_write_part(writing, "a", 1, 1, "xy", 2) == SFT_OK, "%s",
           sft_last_error_get_message());
    if (round % 2 == 0) EXPECT(sft_incremental_writer_commit(writing) == SFT_ERROR_DATA_LENGTH, "not complete");
    sft_incremental_writer_free(writing);
    sft_writer_free(writer);
    EXPECT(file_version(written, SFT_BACKEND_MMAP) == what->version, "%s", sft_last_error_get_message());

    if (round == 0) save_content(what, edited);
    char value[32];
    snprintf(value, sizeof value, "%010ld", round);
    const sft_metadata_change change = {{"round", 5}, {value, strlen(value)}};
    sft_edit_options options = SFT_EDIT_OPTIONS_INIT;
    options.in_place = round % 4 != 0;
    EXPECT(sft_edit_metadata(edited, &change, 1, &options) == SFT_OK, "%s", sft_last_error_get_message());
    options.in_place = 1;
    options.reserve = 1000;
    EXPECT(sft_edit_metadata(edited, &change, 1, &options) == SFT_ERROR_INVALID_ARGUMENT, "no room");
    EXPECT(sft_edit_metadata(path_of("absent"), &change, 1, &options) == SFT_ERROR_IO, "an absent file");
    EXPECT(sft_edit_metadata(path_of("torn.safetensors"), &change, 1, &options) != SFT_OK, "a torn file");
}

/* Everything that takes and gives back: one round of it. */
static void round_of(long round, const sft_writer* small, const sft_writer* other) {
    static uint64_t buffer[5000];
    const char* file = path_of("a.safetensors");
    sft_save_options save = SFT_SAVE_OPTIONS_INIT;
    const sft_writer* writer = round % 2 == 0 ? small : other;
    EXPECT(sft_writer_write_file(writer, file, &save) == SFT_OK, "%s", sft_last_error_get_message());
    EXPECT(file_version(file, round % 3 == 0 ? SFT_BACKEND_PREAD : SFT_BACKEND_MMAP) == (round % 2 == 0 ? 1 : 2), "%s",
           sft_last_error_get_message());

    sft_open_options options = SFT_OPEN_OPTIONS_INIT;
    options.prefault = (sft_prefault)(round % 3);
    sft_file* opened = NULL;
    EXPECT(sft_file_open(path_of("large.safetensors"), &options, &opened) == SFT_OK, "%s",
           sft_last_error_get_message());
    const sft_range range = {(uint64_t)round, (uint64_t)round + 4000, 1};
    EXPECT(sft_file_read_slice(opened, 1, &range, 1, buffer, 4000 * 8) == SFT_OK, "%s", sft_last_error_get_message());
    if (round % 2 == 0) sft_file_close(opened);
    sft_file_free(opened);

    /* What fails must give back as much. */
    EXPECT(sft_file_open(path_of("torn.safetensors"), &options, &opened) != SFT_OK, "a torn file");
    EXPECT(sft_file_open(path_of("absent"), NULL, &opened) == SFT_ERROR_IO, "an absent file");
    EXPECT(sft_writer_write_file(writer, path_of("no/directory"), NULL) == SFT_ERROR_IO, "no directory");
    EXPECT(sft_writer_write_file(writer, "/dev/full", NULL) == SFT_ERROR_IO, "full");
    if (round % 10 == 0) {
        sft_sharded_options sharded = SFT_SHARDED_OPTIONS_INIT;
        sharded.max_shard_size = round % 20 == 0 ? 100 : 1000000;
        EXPECT(sft_writer_write_sharded(writer, path_of("checkpoint"), &sharded) == SFT_OK, "%s",
               sft_last_error_get_message());
        EXPECT(checkpoint_version(path_of("checkpoint")) != WRONG, "%s", sft_last_error_get_message());
        sft_checkpoint* checkpoint = NULL;
        EXPECT(sft_checkpoint_open(path_of("torn"), NULL, &checkpoint) == SFT_ERROR_INDEX, "%s",
               sft_last_error_get_message());
        content fresh = content_new(3, 3, 10);
        sft_writer_free(content_writer(&fresh));
        content_free(&fresh);
    }
}

int main(int count, char** arguments) {
    if (count != 2) return 2;
    use_directory(arguments[1]);
    content one = content_new(1, 3, 50), two = content_new(2, 4, 60), large = content_new(7, 2, 3000000);
    sft_writer *small = content_writer(&one), *other = content_writer(&two);
    save_content(&large, path_of("large.safetensors"));
    put_file(path_of("torn.safetensors"), "\x40\0\0\0\0\0\0\0{\"a\":", 13);
    if (mkdir(path_of("torn"), 0777) != 0) return 2;
    put_file(path_of("torn/model.safetensors.index.json"), "{\"weight_map\":{\"a\":\"../b\"}}", 27);
    content_free(&large);
    figures warm = {0, 0, 0, 0};
    const double begun = seconds();
    for (long round = 0; round < ROUNDS; round++) {
        if (round == WARM_UP) {
            malloc_trim(0);
            warm = figures_now();
        }
        round_of(round, small, other);
        changes_of(round, &one);
    }
    /* Threads that bring pages in, or close a file, end by themselves, soon. */
    figures after;
    const double until = seconds() + 20;
    do {
        usleep(20000);
        malloc_trim(0);
        after = figures_now();
    } while (after.threads > 1 && seconds() < until);
    EXPECT(after.resident <= warm.resident + SLACK, "%ld bytes, %ld before", after.resident, warm.resident);
    EXPECT(after.descriptors <= warm.descriptors, "%ld descriptors, %ld before", after.descriptors, warm.descriptors);
    /* Stacks and arenas of threads are kept for the next ones. */
    EXPECT(after.mappings <= warm.mappings + 16, "%ld mappings, %ld before", after.mappings, warm.mappings);
    EXPECT(after.threads == 1, "%ld threads", after.threads);
    printf(
        "leaks in C: %d rounds in %.1f s; kB in memory %ld, then %ld; descriptors %ld, %ld; mappings %ld, %ld; threads "
        "%ld\n",
        ROUNDS - WARM_UP, seconds() - begun, warm.resident / 1024, after.resident / 1024, warm.descriptors,
        after.descriptors, warm.mappings, after.mappings, after.threads);
    sft_writer_free(small);
    sft_writer_free(other);
    content_free(&one);
    content_free(&two);
    return failures() == 0 ? 0 : 1;
}
