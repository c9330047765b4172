/* Files made to exhaust who reads them: each is opened in a child on both backends, and must be refused, or read,
 * within bounds of time and of memory that are linear in the file, whatever it claims. What the library asks for comes
 * by here, as memory that is asked for and never touched does not show. Run with a directory. */
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common.h"

/* The most that a header may have. */
static const size_t LIMIT = 100000000;

/* No request for memory is for more than so many times the file, and this much beside. A list of numbers of two bytes
 * each in the file takes eight in memory, and up to twice that while it grows; a map of small things a few kilobytes.
 */
enum { MOST_TIMES = 6, MOST_BESIDE = 64 << 10 };

/* The largest request while a child opens a file, and how many there were. */
typedef struct requests {
    atomic_size_t largest;
    atomic_long count;
} requests;

static requests* asked;
static atomic_bool armed;

static size_t note(size_t size) {
    if (!atomic_load(&armed)) return size;
    atomic_fetch_add(&asked->count, 1);
    size_t largest = atomic_load(&asked->largest);
    while (size > largest && !atomic_compare_exchange_weak(&asked->largest, &largest, size)) {
    }
    return size;
}

/* Those of glibc, which can be called before dlsym can. */
extern void* __libc_malloc(size_t size);
extern void* __libc_calloc(size_t count, size_t size);
extern void* __libc_realloc(void* old, size_t size);
extern void* __libc_memalign(size_t alignment, size_t size);

void* malloc(size_t size) { return __libc_malloc(note(size)); }
void* calloc(size_t count, size_t size) {
    note(count * size);
    return __libc_calloc(count, size);
}
void* realloc(void* old, size_t size) { return __libc_realloc(old, note(size)); }
int posix_memalign(void** memory, size_t alignment, size_t size) {
    *memory = __libc_memalign(alignment, note(size));
    return *memory == NULL ? ENOMEM : 0;
}
void* mmap64(void* at, size_t length, int protection, int flags, int file, off_t offset) {
    return ((__typeof__(&mmap64))dlsym(RTLD_NEXT, "mmap64"))(at, note(length), protection, flags, file, offset);
}

typedef struct text {
    char* data;
    size_t length, room;
} text;

static void append(text* to, const char* what, size_t length) {
    if (to->length + length > to->room) {
        to->room = (to->length + length) * 2;
        to->data = realloc(to->data, to->room);
        if (to->data == NULL) abort();
    }
    memcpy(to->data + to->length, what, length);
    to->length += length;
}

static void append_text(text* to, const char* what) { append(to, what, strlen(what)); }

static void append_times(text* to, const char* what, size_t times) {
    for (size_t i = 0; i < times; i++) append_text(to, what);
}

/* Writes a file of this header, with `claimed` for its length, and `nbytes` of zeros behind it. */
static void put_header(const char* path, const text* header, uint64_t claimed, size_t nbytes) {
    FILE* file = fopen(path, "wb");
    if (file == NULL || fwrite(&claimed, 8, 1, file) != 1 ||
        fwrite(header->data, 1, header->length, file) != header->length || fflush(file) != 0 ||
        ftruncate(fileno(file), (off_t)(8 + header->length + nbytes)) != 0 || fclose(file) != 0) {
        abort();
    }
}

typedef struct attack {
    const char* name;
    void (*make)(const char* path);
    sft_status status; /* what opening it must give */
    bool is_index;
    double most_seconds;
    long most_mebibytes; /* in memory at once, the mapped file included */
} attack;

static void garbage(const char* path) {
    text header = {malloc(LIMIT), LIMIT, LIMIT};
    if (header.data == NULL) abort();
    uint64_t state = 1;
    for (size_t i = 0; i < LIMIT; i++) header.data[i] = (char)random_below(&state, 256);
    put_header(path, &header, LIMIT, 0);
    free(header.data);
}

/* Garbage that is found at the very end. */
static void spaces(const char* path) {
    text header = {malloc(LIMIT), LIMIT, LIMIT};
    if (header.data == NULL) abort();
    memset(header.data, ' ', LIMIT);
    header.data[LIMIT - 1] = '[';
    put_header(path, &header, LIMIT, 0);
    free(header.data);
}

static void with_field(const char* path, const char* begin, const char* each, size_t times, const char* end) {
    text header = {0};
    append_text(&header, "{\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0],\"x\":");
    append_text(&header, begin);
    append_times(&header, each, times);
    append_text(&header, end);
    append_text(&header, "}}");
    put_header(path, &header, header.length, 0);
    free(header.data);
}

static void numbers(const char* path) { with_field(path, "[1", ",2", 49000000, "]"); }
static void numbers_in_arrays(const char* path) { with_field(path, "[[]", ",[]", 33000000, "]"); }
static void long_string(const char* path) { with_field(path, "\"", "\\u00e9", 16000000, "\""); }
static void deep_arrays(const char* path) { with_field(path, "", "[", 5000, ""); }
static void deep_objects(const char* path) { with_field(path, "", "{\"a\":", 10000000, ""); }

static void shape_of_many(const char* path) {
    text header = {0};
    append_text(&header, "{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,1],\"shape\":[1");
    append_times(&header, ",1", 49000000);
    append_text(&header, "]}}");
    put_header(path, &header, header.length, 1);
    free(header.data);
}

static void many_tensors(const char* path, size_t count, bool same) {
    text header = {0};
    append_text(&header, "{");
    for (size_t i = 0; i < count; i++) {
        char one[128];
        const int length =
            snprintf(one, sizeof one, "%s\"t%zu\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[%zu,%zu]}",
                     i == 0 ? "" : ",", same ? 0 : i, i, i + 1);
        append(&header, one, (size_t)length);
    }
    append_text(&header, "}");
    put_header(path, &header, header.length, count);
    free(header.data);
}

static void million(const char* path) { many_tensors(path, 1000000, false); }
static void million_of_one_name(const char* path) { many_tensors(path, 1000000, true); }

static void much_metadata(const char* path) {
    text header = {0};
    append_text(&header, "{\"__metadata__\":{");
    for (size_t i = 0; i < 5000000; i++) {
        char one[40];
        const int length = snprintf(one, sizeof one, "%s\"%zu\":\"\"", i == 0 ? "" : ",", i);
        append(&header, one, (size_t)length);
    }
    append_text(&header, "}}");
    put_header(path, &header, header.length, 0);
    free(header.data);
}

static void claims(const char* path, uint64_t length) {
    text header = {0};
    append_text(&header, "{}      ");
    put_header(path, &header, length, 0);
    free(header.data);
}

static void two_to_the_63(const char* path) { claims(path, (uint64_t)1 << 63); }
static void all_ones(const char* path) { claims(path, UINT64_MAX); }
static void at_the_limit(const char* path) { claims(path, LIMIT); }

static void huge_shape(const char* path) {
    text header = {0};
    append_text(&header, "{\"a\":{\"dtype\":\"F32\",\"shape\":[1099511627776],\"data_offsets\":[0,4398046511104]}}");
    put_header(path, &header, header.length, 0);
    free(header.data);
}

static void index_of(const char* path, size_t count, const char* entry) {
    text index = {0};
    append_text(&index, "{\"metadata\":{},\"weight_map\":{\"first\":\"absent.safetensors\"");
    for (size_t i = 0; i < count && index.length < 20000000; i++) {
        char one[128];
        const int length = snprintf(one, sizeof one, entry, i, i);
        append(&index, one, (size_t)length);
    }
    append_text(&index, "}}");
    put_file(path, index.data, index.length);
    free(index.data);
}

static void index_of_files(const char* path) { index_of(path, 1000000, ",\"t%zu\":\"f%zu.safetensors\""); }
static void index_of_names(const char* path) { index_of(path, 1000000, ",\"t%zu\":\"absent.safetensors\""); }
static void index_of_one_name(const char* path) { index_of(path, 1000000, ",\"t\":\"absent.safetensors\""); }

static void index_of_arrays(const char* path) {
    text index = {0};
    append_text(&index, "{\"metadata\":");
    append_times(&index, "[", 10000000);
    append_times(&index, "]", 10000000);
    append_text(&index, ",\"weight_map\":{}}");
    put_file(path, index.data, index.length);
    free(index.data);
}

/* In a child: opens it, and ends with whether it gave what it must. */
static void child(const attack* what, const char* path, sft_backend backend) {
    sft_open_options options = SFT_OPEN_OPTIONS_INIT;
    options.backend = backend;
    sft_checkpoint_options checkpoint_options = SFT_CHECKPOINT_OPTIONS_INIT;
    checkpoint_options.backend = backend;
    sft_file* file = NULL;
    sft_checkpoint* checkpoint = NULL;
    atomic_store(&armed, true);
    const sft_status status = what->is_index ? sft_checkpoint_open(path, &checkpoint_options, &checkpoint)
                                             : sft_file_open(path, &options, &file);
    atomic_store(&armed, false);
    const char* said = status == SFT_OK ? "" : sft_last_error_get_message();
    const bool right = EXPECT(status == what->status, "%s: %d, %.300s", what->name, status, said) &&
                       EXPECT(strlen(said) < 4096, "%s: a message of %zu bytes", what->name, strlen(said));
    sft_file_free(file);
    sft_checkpoint_free(checkpoint);
    fflush(stdout);
    _exit(right ? 0 : 1);
}

static const attack attacks[] = {
    {"100 MB of garbage", garbage, SFT_ERROR_HEADER_UTF8, false, 10, 150},
    {"100 MB of spaces", spaces, SFT_ERROR_HEADER_JSON, false, 10, 150},
    {"an unknown field of 49 million numbers", numbers, SFT_OK, false, 20, 150},
    {"one of 33 million arrays", numbers_in_arrays, SFT_OK, false, 20, 150},
    {"one of 16 million escapes", long_string, SFT_OK, false, 20, 200},
    {"a shape of 49 million dimensions", shape_of_many, SFT_OK, false, 20, 700},
    {"5000 arrays in one another", deep_arrays, SFT_ERROR_HEADER_JSON, false, 2, 30},
    {"10 million objects in one another", deep_objects, SFT_ERROR_HEADER_JSON, false, 10, 100},
    {"a million tensors", million, SFT_OK, false, 20, 200},
    {"a million of one name", million_of_one_name, SFT_ERROR_DUPLICATE, false, 20, 200},
    {"5 million metadata entries", much_metadata, SFT_OK, false, 30, 1000},
    {"a header of 2^63 bytes", two_to_the_63, SFT_ERROR_HEADER_TOO_LARGE, false, 2, 30},
    {"one of 2^64 - 1", all_ones, SFT_ERROR_HEADER_TOO_LARGE, false, 2, 30},
    {"one of 100 MB in a file of 16 bytes", at_the_limit, SFT_ERROR_HEADER_TRUNCATED, false, 2, 30},
    {"a shape of 2^40 with no bytes", huge_shape, SFT_ERROR_DATA_LENGTH, false, 2, 30},
    {"an index of 600,000 files", index_of_files, SFT_ERROR_IO, true, 20, 220},
    {"an index of 700,000 names", index_of_names, SFT_ERROR_IO, true, 20, 120},
    {"an index of one name", index_of_one_name, SFT_ERROR_DUPLICATE, true, 20, 120},
    {"an index of arrays in one another", index_of_arrays, SFT_ERROR_INDEX, true, 10, 50},
};

int main(int count, char** arguments) {
    if (count != 2) return 2;
    use_directory(arguments[1]);
    asked = mmap(NULL, sizeof *asked, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (asked == MAP_FAILED) return 2;
    long opened = 0, most_mebibytes = 0;
    double most_times = 0;
    const char *most_in_memory = "", *most_asked_for = "";
    for (size_t i = 0; i < sizeof attacks / sizeof *attacks; i++) {
        const attack* what = &attacks[i];
        const char* path = path_of(what->is_index ? "model.safetensors.index.json" : "model.safetensors");
        fflush(stdout);
        /* Made in a child, so that this process stays small: a fork begins with the memory of its parent. */
        const pid_t maker = fork();
        if (maker < 0) abort();
        if (maker == 0) {
            what->make(path);
            _exit(0);
        }
        int made = 0;
        if (waitpid(maker, &made, 0) != maker || made != 0) abort();
        struct stat told;
        if (stat(path, &told) != 0) abort();
        printf("%s:", what->name);
        for (sft_backend backend = SFT_BACKEND_MMAP; backend <= SFT_BACKEND_PREAD; backend++) {
            fflush(stdout);
            atomic_store(&asked->largest, 0);
            atomic_store(&asked->count, 0);
            const pid_t pid = fork();
            if (pid < 0) abort();
            if (pid == 0) child(what, path, backend);
            int status = 0;
            struct rusage used;
            if (wait4(pid, &status, 0, &used) != pid) abort();
            /* Processor time: other work on the machine is no fault of ours. */
            const double took = (double)used.ru_utime.tv_sec + (double)used.ru_stime.tv_sec +
                                (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) * 1e-6;
            const long mebibytes = used.ru_maxrss / 1024;
            const size_t largest = atomic_load(&asked->largest), nbytes = (size_t)told.st_size;
            printf(" %s %.2f s, %ld MiB, at most %zu kB at once;", backend == SFT_BACKEND_MMAP ? "mmap" : "pread", took,
                   mebibytes, largest / 1000);
            EXPECT(status == 0, "%s: status %d", what->name, status);
            EXPECT(took <= what->most_seconds, "%s: %.2f s of %.0f", what->name, took, what->most_seconds);
            EXPECT(mebibytes <= what->most_mebibytes, "%s: %ld MiB of %ld", what->name, mebibytes,
                   what->most_mebibytes);
            EXPECT(atomic_load(&asked->count) > 0, "%s: no request came by here", what->name);
            EXPECT(largest <= MOST_TIMES * nbytes + MOST_BESIDE, "%s: %zu bytes at once, for a file of %zu", what->name,
                   largest, nbytes);
            if (mebibytes > most_mebibytes) {
                most_mebibytes = mebibytes;
                most_in_memory = what->name;
            }
            const double times = (double)largest / (double)(nbytes + MOST_BESIDE);
            if (times > most_times) {
                most_times = times;
                most_asked_for = what->name;
            }
            opened++;
        }
        printf("\n");
        remove_all(path);
    }
    printf("attacks: %ld, failed: %ld; most memory: %ld MiB (%s), most at once: %.1f times the file (%s)\n", opened,
           failures(), most_mebibytes, most_in_memory, most_times, most_asked_for);
    return failures() == 0 ? 0 : 1;
}
