/* Counts checks, on any thread, and records the status numbers that occurred. */
#ifndef CHECK_H
#define CHECK_H

#include <safetensors_torch.h>
#include <stdbool.h>

#define CHECK(condition) check_that((condition), #condition, __FILE__, __LINE__)
#define CHECK_STATUS(call, expected) check_status((call), (expected), #call, __FILE__, __LINE__)
#define CHECK_OK(call) CHECK_STATUS(call, SFT_OK)

void check_that(bool holds, const char* what, const char* file, int line);

/* Checks the status of a call, and that an error has set a message. */
void check_status(sft_status actual, sft_status expected, const char* what, const char* file, int line);

/* Returns whether a call has returned this status. */
bool check_seen(sft_status status);

/* Returns the bytes of a file: the length of `json`, `json` itself, `nbytes` zeros. The caller frees them. */
void* make_file(const char* json, size_t nbytes, size_t* length);

/* Returns a path in the directory of this run, valid until the next call. Not thread-safe. */
const char* path_of(const char* name);

bool text_is(sft_str text, const char* expected);

void test_version_and_status(void);
void test_dtypes(void);
void test_reading(void);
void test_prefault(void);
void test_statistics(void);
void test_slices(void);
void test_sources(void);
void test_filesystems(void);
void test_prefetch(void);
void test_metadata(void);
void test_checkpoints(void);
void test_threads(void);
void test_writing(void);
void test_incremental_writer(void);
void test_forks(void);
void test_edits(void);
void test_refused_files(void);
void test_malformed_files(void);
void test_arguments(void);
void test_struct_sizes(void);

#endif
