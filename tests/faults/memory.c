/* Saves in which every allocation fails once, in a child process each time, until the save succeeds.
 *
 * Rust ends a process that has no memory left for what cannot do without it, so the child may end with SIGABRT, or with
 * an error, or, where the memory was for something that can be done without, with success. Whichever it is, the target
 * holds the old file or the new one, whole, and nothing stands beside it. Run with a directory. */
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <safetensors_torch.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

enum { TENSORS = 40, BYTES = 20000 };

/* So many allocations has a save of these tensors, at the least. */
enum { LEAST = TENSORS };

static bool armed;
static long calls, chosen;

static bool fails(void) {
    if (!armed || ++calls != chosen) return false;
    errno = ENOMEM;
    return true;
}

/* Those of glibc, which can be called before dlsym can. */
extern void* __libc_malloc(size_t size);
extern void* __libc_calloc(size_t count, size_t size);
extern void* __libc_realloc(void* old, size_t size);
extern void* __libc_memalign(size_t alignment, size_t size);

void* malloc(size_t size) { return fails() ? NULL : __libc_malloc(size); }
void* calloc(size_t count, size_t size) { return fails() ? NULL : __libc_calloc(count, size); }
void* realloc(void* old, size_t size) { return fails() ? NULL : __libc_realloc(old, size); }

int posix_memalign(void** memory, size_t alignment, size_t size) {
    if (fails()) return ENOMEM;
    *memory = __libc_memalign(alignment, size);
    return *memory == NULL ? ENOMEM : 0;
}

static char directory[3000], target[4000];

static int entries(void) {
    DIR* opened = opendir(directory);
    if (opened == NULL) abort();
    int count = 0;
    for (const struct dirent* entry; (entry = readdir(opened)) != NULL;)
        count += entry->d_name[0] != '.' || entry->d_name[1] == 's';
    closedir(opened);
    return count;
}

/* Saves tensors of this byte. */
static sft_status save(unsigned char value) {
    static unsigned char bytes[BYTES];
    static const uint64_t shape[] = {BYTES};
    memset(bytes, value, BYTES);
    sft_writer* writer = NULL;
    sft_status status = sft_writer_new(&writer);
    if (status == SFT_OK) status = sft_writer_add_metadata(writer, "format", 6, "pt", 2);
    for (char i = 0; status == SFT_OK && i < TENSORS; i++) {
        const char name[] = {'t', (char)('0' + i)};
        status = sft_writer_add_tensor(writer, name, sizeof name, SFT_DTYPE_U8, shape, 1, bytes, BYTES);
    }
    if (status == SFT_OK) status = sft_writer_write_file(writer, target, NULL);
    sft_writer_free(writer);
    return status;
}

/* The byte of which every tensor is full; 0 if the file is not whole. */
static unsigned char content(void) {
    static unsigned char bytes[BYTES];
    sft_file* file = NULL;
    if (sft_file_open(target, NULL, &file) != SFT_OK) return 0;
    size_t count = 0;
    unsigned char value = 0;
    bool whole = sft_file_get_tensor_count(file, &count) == SFT_OK && count == TENSORS;
    for (size_t i = 0; whole && i < count; i++) {
        whole = sft_file_read_tensor(file, i, bytes, BYTES) == SFT_OK && (i == 0 || bytes[0] == value);
        value = bytes[0];
        for (size_t at = 0; whole && at < BYTES; at++) whole = bytes[at] == value;
    }
    sft_file_free(file);
    return whole ? value : 0;
}

enum { SAVED = 0, REFUSED = 1, SILENT = 2, UNTOUCHED = 3 };

/* In the child: one save in which allocation number `call` fails. */
static int attempt(long call) {
    /* What ends it tells of it on the standard error, and leaves no core. */
    const struct rlimit none = {0, 0};
    setrlimit(RLIMIT_CORE, &none);
    if (freopen("/dev/null", "w", stderr) == NULL) return SILENT;
    chosen = call;
    armed = true;
    const sft_status status = save(2);
    armed = false;
    if (calls < chosen) return UNTOUCHED;
    if (status == SFT_OK) return SAVED;
    return strlen(sft_last_error_get_message()) > 0 ? REFUSED : SILENT;
}

/* What of an open file can be asked without any memory, as the header says. Returns how many calls do allocate. */
static int looks_that_allocate(void) {
    sft_file* file = NULL;
    if (save(1) != SFT_OK || sft_file_open(target, NULL, &file) != SFT_OK) abort();
    sft_tensor_info info = SFT_TENSOR_INFO_INIT;
    sft_str key, value;
    size_t index = 0;
    int32_t present = 0;
    const void* data = NULL;
    calls = 0;
    chosen = LONG_MAX;
    armed = true;
    const bool succeed =
        sft_file_get_tensor_count(file, &index) == SFT_OK && sft_file_get_tensor_info(file, 0, &info) == SFT_OK &&
        sft_file_get_sorted_index(file, 0, &index) == SFT_OK && sft_file_find_tensor(file, "t1", 2, &index) == SFT_OK &&
        sft_file_has_metadata(file, &present) == SFT_OK && present == 1 &&
        sft_file_get_metadata_count(file, &index) == SFT_OK &&
        sft_file_get_metadata_entry(file, 0, &key, &value) == SFT_OK &&
        sft_file_find_metadata(file, "format", 6, &value) == SFT_OK && sft_file_get_data(file, 0, &data) == SFT_OK;
    armed = false;
    if (!succeed) abort();
    sft_file_free(file);
    return (int)calls;
}

int main(int count, char** arguments) {
    if (count != 2) return 2;
    snprintf(directory, sizeof directory, "%s", arguments[1]);
    snprintf(target, sizeof target, "%s/target", directory);
    long ended[3] = {0, 0, 0}, aborted = 0, wrong = 0;
    for (long call = 1;; call++) {
        if (save(1) != SFT_OK || content() != 1) abort();
        const int before = entries();
        const pid_t child = fork();
        if (child == 0) _exit(attempt(call));
        int status = 0;
        if (child < 0 || waitpid(child, &status, 0) != child) abort();
        if (WIFEXITED(status) && WEXITSTATUS(status) == UNTOUCHED) break;
        const bool is_abort = WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
        const int how = WIFEXITED(status) ? WEXITSTATUS(status) : SILENT;
        const unsigned char value = content();
        aborted += is_abort;
        if (!is_abort) ended[how < SILENT ? how : SILENT]++;
        /* The old file, unless the child says that it has saved: one that is killed may have got that far too. */
        const bool whole = value == 2 || (value == 1 && how != SAVED);
        if (!whole || entries() != before || (!is_abort && how >= SILENT)) {
            wrong++;
            printf("allocation %ld: status %d, the file holds %d\n", call, status, value);
        }
    }
    const long total = ended[SAVED] + ended[REFUSED] + ended[SILENT] + aborted;
    printf("%ld allocations that failed: %ld errors, %ld aborts, %ld saved all the same; %ld wrong\n", total,
           ended[REFUSED], aborted, ended[SAVED], wrong);
    /* Each tensor's name takes one, and nothing can do without it. */
    if (total < LEAST || ended[REFUSED] + aborted < LEAST) {
        wrong++;
        printf("fewer than %d that failed: those of the library do not come by here\n", LEAST);
    }
    const int allocated = looks_that_allocate();
    if (allocated != 0) printf("calls that only look into an open file allocated %d times\n", allocated);
    return wrong == 0 && allocated == 0 ? 0 : 1;
}
