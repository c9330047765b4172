/* Forks of a process with open handles. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

static const uint64_t bytes_shape[] = {3};
static const unsigned char bytes[3] = {7, 8, 9};

/* Returns an incremental writer of the file `name`, with one tensor, "a". */
static sft_incremental_writer* new_incremental(const char* name) {
    sft_writer* writer = NULL;
    sft_incremental_writer* incremental = NULL;
    CHECK_OK(sft_writer_new(&writer));
    CHECK_OK(sft_writer_declare_tensor(writer, "a", 1, SFT_DTYPE_U8, bytes_shape, 1));
    CHECK_OK(sft_incremental_writer_create(writer, path_of(name), NULL, &incremental));
    sft_writer_free(writer);
    return incremental;
}

static bool is_refused(sft_status status) {
    return status == SFT_ERROR_INVALID_ARGUMENT && strstr(sft_last_error_get_message(), "before a fork") != NULL;
}

/* A child shares the parent's descriptor: its writes would change the file that the parent has committed. */
static void test_committed_after_the_fork(void) {
    const unsigned char others[3] = {1, 2, 3};
    unsigned char found[3] = {0};
    sft_incremental_writer* incremental = new_incremental("forked.safetensors");
    int gate[2];
    CHECK(pipe(gate) == 0);
    fflush(stdout);
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        close(gate[1]);
        const bool committed = read(gate[0], found, 1) == 0;
        const bool refused = is_refused(sft_incremental_writer_write_tensor(incremental, "a", 1, others, 3));
        _exit(committed && refused ? 0 : 1);
    }
    CHECK_OK(sft_incremental_writer_write_tensor(incremental, "a", 1, bytes, 3));
    CHECK_OK(sft_incremental_writer_commit(incremental));
    sft_incremental_writer_free(incremental);
    close(gate[0]);
    close(gate[1]);
    int status = 1;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    sft_file* file = NULL;
    CHECK_OK(sft_file_open(path_of("forked.safetensors"), NULL, &file));
    CHECK_OK(sft_file_read_tensor(file, 0, found, 3));
    CHECK(memcmp(found, bytes, 3) == 0);
    sft_file_free(file);
}

static atomic_bool over;

/* Takes the writer's lock as often as it can. A write of zero bytes does not allocate: a sanitizer's allocator has
 * locks that are not safe in a fork. */
static void* write_nothing(void* incremental) {
    sft_status status = SFT_OK;
    while (!atomic_load(&over) && status == SFT_OK) {
        status = sft_incremental_writer_write_part(incremental, "a", 1, 0, bytes, 0);
    }
    CHECK_OK(status);
    return NULL;
}

/* In a child, a lock may be held by a thread that does not exist there. If the library took the lock before it checked
 * the process, some of a hundred children would wait forever. */
static void test_forks_while_threads_write(void) {
    enum { HAMMERS = 2, FORKS = 100 };
    sft_incremental_writer* incremental = new_incremental("hammered.safetensors");
    pthread_t threads[HAMMERS];
    atomic_store(&over, false);
    for (int i = 0; i < HAMMERS; i++) {
        CHECK(pthread_create(&threads[i], NULL, write_nothing, incremental) == 0);
    }
    int failed = 0;
    for (int i = 0; i < FORKS && failed == 0; i++) {
        const pid_t child = fork();
        if (child == 0) {
            alarm(20);
            const bool refused = is_refused(sft_incremental_writer_write_tensor(incremental, "a", 1, bytes, 3)) &&
                                 is_refused(sft_incremental_writer_write_part(incremental, "a", 1, 0, bytes, 0)) &&
                                 is_refused(sft_incremental_writer_commit(incremental));
            sft_incremental_writer_free(incremental);
            _exit(refused ? 0 : 1);
        }
        int status = 1;
        failed += child < 0 || waitpid(child, &status, 0) != child || status != 0;
    }
    CHECK(failed == 0);
    atomic_store(&over, true);
    for (int i = 0; i < HAMMERS; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
    }
    CHECK_OK(sft_incremental_writer_write_tensor(incremental, "a", 1, bytes, 3));
    CHECK_OK(sft_incremental_writer_commit(incremental));
    sft_incremental_writer_free(incremental);
}

/* A prefetch belongs to the parent, with and without threads; a child can only free what it has inherited. */
static void test_prefetch_in_a_child(size_t threads) {
    enum { LENGTH = 20 << 20 };
    const uint64_t shape[] = {LENGTH};
    unsigned char* written = calloc(LENGTH, 1);
    unsigned char* found = malloc(LENGTH);
    written[LENGTH - 1] = 9;
    sft_writer* writer = NULL;
    sft_file* file = NULL;
    sft_prefetch* prefetch = NULL;
    sft_prefetch_state state = 99;
    size_t request = 99;
    CHECK_OK(sft_writer_new(&writer));
    CHECK_OK(sft_writer_add_tensor(writer, "a", 1, SFT_DTYPE_U8, shape, 1, written, LENGTH));
    CHECK_OK(sft_writer_write_file(writer, path_of("prefetched.safetensors"), NULL));
    sft_writer_free(writer);
    CHECK_OK(sft_file_open(path_of("prefetched.safetensors"), NULL, &file));
    const sft_prefetch_request one = {file, 0, NULL, 0, found, LENGTH};
    CHECK_OK(sft_set_threads(threads));
    CHECK_OK(sft_prefetch_start(&one, 1, &prefetch));
    CHECK_OK(sft_set_threads(0));
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        alarm(20);
        const bool refused = is_refused(sft_prefetch_next(prefetch, 1000, &state, &request)) &&
                             is_refused(sft_prefetch_take(prefetch, 0, 1000, &state));
        sft_prefetch_free(prefetch);
        _exit(refused ? 0 : 1);
    }
    CHECK_OK(sft_prefetch_next(prefetch, 60000, &state, &request));
    CHECK(state == SFT_PREFETCH_LANDED && request == 0 && memcmp(found, written, LENGTH) == 0);
    sft_prefetch_free(prefetch);
    int status = 1;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    sft_file_free(file);
    unlink(path_of("prefetched.safetensors"));
    free(written);
    free(found);
}

void test_forks(void) {
    test_prefetch_in_a_child(0);
    test_prefetch_in_a_child(1);
    test_committed_after_the_fork();
    test_forks_while_threads_write();
}
