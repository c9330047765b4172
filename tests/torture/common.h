/* What the programs here share: contents that tell their version and whether they are whole, figures of this process,
 * and checks. One line of result comes from each test; failures are printed as they are met. */
#ifndef TORTURE_COMMON_H
#define TORTURE_COMMON_H

#include <safetensors_torch.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Tensors of 64-bit words, each of which depends on version, tensor and place. Named "t0000" and so on. */
typedef struct content {
    uint64_t version; /* more than 0 */
    size_t tensors, words;
    uint64_t* data;
} content;

/* `words` a tensor, three at least. Ends the process where there is no memory. */
content content_new(uint64_t version, size_t tensors, size_t words);
void content_free(content* what);

/* A writer that borrows the content. */
sft_writer* content_writer(const content* what);

/* Whether these bytes are the tensor `tensor` of a content of this version. */
bool tensor_is(const void* bytes, size_t nbytes, uint64_t version, size_t tensor);

/* The version of the file at `path`, every word of which is compared; 0 if it cannot be opened
 * (sft_last_error_get_message says why) and WRONG if it is no whole content. */
#define WRONG UINT64_MAX
uint64_t file_version(const char* path, sft_backend backend);
uint64_t checkpoint_version(const char* path);

/* The same, with the status of opening it. */
uint64_t checkpoint_open_version(const char* path, sft_status* status);

/* Saves the content, or fails the test that is named. */
void save_content(const content* what, const char* path);

/* Writes the content tensor by tensor, the last one first and in two parts. */
sft_status content_write_incrementally(const content* what, const char* path, const sft_save_options* options);

/* Prints what does not hold, and counts it. For any thread. */
#define EXPECT(condition, ...) held((condition) || does_not_hold(#condition, __FILE__, __LINE__, __VA_ARGS__))
static inline bool held(bool holds) { return holds; }
bool does_not_hold(const char* what, const char* file, int line, const char* format, ...)
    __attribute__((format(printf, 4, 5)));

/* How many checks failed until now. */
long failures(void);

/* A path in the directory that main() was given; valid for the next seven calls of this thread. */
void use_directory(const char* directory);
const char* path_of(const char* name);

/* How many entries a directory has, and how many of them begin with ".safetensors-"; -1 if it is not there. */
int entries(const char* directory);
int leftovers(const char* directory);

/* Removes a file, or a directory with all that is in it; nothing if it is not there. */
void remove_all(const char* path);

/* Writes a file of these bytes, or ends the process. */
void put_file(const char* path, const void* bytes, size_t nbytes);

/* Of this process: bytes in memory, descriptors, lines of its map, threads. */
typedef struct figures {
    long resident, descriptors, mappings, threads;
} figures;
figures figures_now(void);

double seconds(void);

/* A number below `limit`, from a sequence that `state` seeds. */
uint64_t random_below(uint64_t* state, uint64_t limit);

#endif
