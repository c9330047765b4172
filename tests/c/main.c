/* Runs the tests of the C interface in the given directory. The last line of output is "N passed, N failed". */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"

#define STATUS_COUNT 24

/* Relaxed atomics: the checks must not synchronize the threads that they run on. */
static atomic_int passed, failed;
static atomic_bool seen[STATUS_COUNT];
static const char* directory;

void check_that(bool holds, const char* what, const char* file, int line) {
    if (holds) {
        atomic_fetch_add_explicit(&passed, 1, memory_order_relaxed);
        return;
    }
    atomic_fetch_add_explicit(&failed, 1, memory_order_relaxed);
    printf("%s:%d: failed: %s\n", file, line, what);
}

void check_status(sft_status actual, sft_status expected, const char* what, const char* file, int line) {
    if (actual >= 0 && actual < STATUS_COUNT) {
        atomic_store_explicit(&seen[actual], true, memory_order_relaxed);
    }
    const bool has_message = actual == SFT_OK || strlen(sft_last_error_get_message()) > 0;
    check_that(actual == expected && has_message, what, file, line);
    if (actual != expected) {
        printf("    %s, not %s: %s\n", sft_status_get_name(actual), sft_status_get_name(expected),
               sft_last_error_get_message());
    }
}

bool check_seen(sft_status status) { return seen[status]; }

void* make_file(const char* json, size_t nbytes, size_t* length) {
    const size_t header = strlen(json);
    *length = 8 + header + nbytes;
    unsigned char* bytes = calloc(*length, 1);
    if (bytes == NULL) {
        abort();
    }
    for (int i = 0; i < 8; i++) {
        bytes[i] = (unsigned char)(header >> (8 * i));
    }
    memcpy(bytes + 8, json, header);
    return bytes;
}

const char* path_of(const char* name) {
    static char path[4096];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    return path;
}

bool text_is(sft_str text, const char* expected) {
    return text.length == strlen(expected) && memcmp(text.data, expected, text.length) == 0;
}

int main(int argc, char** argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: %s DIRECTORY\n", argv[0]);
        return 2;
    }
    directory = argv[1];
    test_version_and_status();
    test_dtypes();
    test_writing();
    test_incremental_writer();
    test_forks();
    test_edits();
    test_reading();
    test_prefault();
    test_statistics();
    test_slices();
    test_sources();
    test_filesystems();
    test_prefetch();
    test_metadata();
    test_checkpoints();
    test_threads();
    test_refused_files();
    test_malformed_files();
    test_arguments();
    test_struct_sizes();

    /* Every error has occurred except PANIC, which only a bug raises; the Rust tests provoke one. */
    for (sft_status status = SFT_OK; status < STATUS_COUNT; status++) {
        check_that(check_seen(status) == (status != SFT_ERROR_PANIC), sft_status_get_name(status),
                   "occurred in no test", status);
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 ? 0 : 1;
}
