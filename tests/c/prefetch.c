/* sft_prefetch: tensors and slices of several files, handed out as they land. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"

/* Two files, each large enough for several threads. */
enum { FILES = 2, ROWS = 300, COLUMNS = 10007, SMALL = 5, TENSORS = 3, LONG = 60000 };

static int32_t matrix[FILES][ROWS][COLUMNS];
static const unsigned char small[FILES][SMALL] = {{1, 2, 3, 4, 5}, {6, 7, 8, 9, 10}};

/* In file order: sorted by dtype, then by name. */
enum { EMPTY, MATRIX, SMALL_ONE };

static const char* name_of(int number) { return number == 0 ? "first.safetensors" : "second.safetensors"; }

static void write_files(void) {
    const uint64_t matrix_shape[] = {ROWS, COLUMNS}, small_shape[] = {SMALL}, empty_shape[] = {0};
    for (int number = 0; number < FILES; number++) {
        for (int row = 0; row < ROWS; row++) {
            for (int column = 0; column < COLUMNS; column++) {
                matrix[number][row][column] = number * 1000000007 + row * 100003 + column;
            }
        }
        sft_writer* writer = NULL;
        CHECK_OK(sft_writer_new(&writer));
        CHECK_OK(sft_writer_add_tensor(writer, "small", 5, SFT_DTYPE_U8, small_shape, 1, small[number], SMALL));
        CHECK_OK(sft_writer_add_tensor(writer, "matrix", 6, SFT_DTYPE_I32, matrix_shape, 2, matrix[number],
                                       sizeof matrix[number]));
        CHECK_OK(sft_writer_add_tensor(writer, "empty", 5, SFT_DTYPE_I64, empty_shape, 1, NULL, 0));
        CHECK_OK(sft_writer_write_file(writer, path_of(name_of(number)), NULL));
        sft_writer_free(writer);
    }
}

static sft_file* open_file(int number, sft_backend backend) {
    sft_open_options options = SFT_OPEN_OPTIONS_INIT;
    options.backend = backend;
    sft_file* file = NULL;
    CHECK_OK(sft_file_open(path_of(name_of(number)), &options, &file));
    return file;
}

/* Every second column of every third row. */
static const sft_range part[2] = {{0, ROWS, 3}, {1, COLUMNS, 2}};
enum { PART_ROWS = ROWS / 3, PART_COLUMNS = COLUMNS / 2 };

struct buffers {
    int32_t matrix[ROWS][COLUMNS], part[PART_ROWS][PART_COLUMNS];
    unsigned char small[SMALL];
};

static bool part_is_right(const struct buffers* found, int number) {
    bool same = true;
    for (int row = 0; row < PART_ROWS; row++) {
        for (int column = 0; column < PART_COLUMNS; column++) {
            same = same && found->part[row][column] == matrix[number][3 * row][2 * column + 1];
        }
    }
    return same;
}

enum { A_FILE = 4, ALL = FILES * A_FILE };

/* The requests of all files, in order: whole tensors, one of them empty, and a slice. */
static void make_requests(sft_prefetch_request* requests, sft_file* const* files, struct buffers* buffers) {
    for (int number = 0; number < FILES; number++) {
        sft_prefetch_request* of_file = requests + number * A_FILE;
        struct buffers* to = buffers + number;
        of_file[0] = (sft_prefetch_request){files[number], EMPTY, NULL, 0, NULL, 0};
        of_file[1] = (sft_prefetch_request){files[number], MATRIX, NULL, 0, to->matrix, sizeof to->matrix};
        of_file[2] = (sft_prefetch_request){files[number], MATRIX, part, 2, to->part, sizeof to->part};
        of_file[3] = (sft_prefetch_request){files[number], SMALL_ONE, NULL, 0, to->small, sizeof to->small};
    }
}

/* Each request that is handed out has landed, and all are, once. */
static void take_all(sft_backend backend, struct buffers* buffers) {
    memset(buffers, 0x55, FILES * sizeof *buffers);
    sft_file* files[FILES] = {open_file(0, backend), open_file(1, backend)};
    sft_prefetch_request requests[ALL];
    make_requests(requests, files, buffers);
    sft_prefetch* prefetch = NULL;
    CHECK_OK(sft_prefetch_start(requests, ALL, &prefetch));
    memset(requests, 0, sizeof requests); /* they were copied */

    bool taken[ALL] = {false};
    sft_prefetch_state state = 99;
    size_t request = 99;
    CHECK_OK(sft_prefetch_take(prefetch, ALL - 2, LONG, &state));
    CHECK(state == SFT_PREFETCH_LANDED && part_is_right(&buffers[1], 1));
    taken[ALL - 2] = true;
    CHECK_STATUS(sft_prefetch_take(prefetch, ALL - 2, 0, &state), SFT_ERROR_INVALID_ARGUMENT);
    CHECK(strstr(sft_last_error_get_message(), "\"matrix\": already delivered") != NULL);
    CHECK_STATUS(sft_prefetch_take(prefetch, ALL, 0, &state), SFT_ERROR_INVALID_ARGUMENT);

    for (int left = ALL - 1; left > 0; left--) {
        CHECK_OK(sft_prefetch_next(prefetch, LONG, &state, &request));
        CHECK(state == SFT_PREFETCH_LANDED && request < ALL && !taken[request]);
        const int number = (int)request / A_FILE;
        const struct buffers* found = &buffers[number];
        switch (request % A_FILE) {
            case 1:
                CHECK(memcmp(found->matrix, matrix[number], sizeof found->matrix) == 0);
                break;
            case 2:
                CHECK(part_is_right(found, number));
                break;
            case 3:
                CHECK(memcmp(found->small, small[number], SMALL) == 0);
                break;
            default:
                break;
        }
        taken[request] = true;
    }
    CHECK_OK(sft_prefetch_next(prefetch, 0, &state, &request));
    CHECK(state == SFT_PREFETCH_END);
    sft_prefetch_free(prefetch);
    sft_file_free(files[0]);
    sft_file_free(files[1]);
}

/* With one thread, a call reads one chunk at least, and then keeps to its time. */
static void test_time(struct buffers* buffers) {
    sft_file* file = open_file(0, SFT_BACKEND_PREAD);
    const sft_prefetch_request request = {file, MATRIX, NULL, 0, buffers->matrix, sizeof buffers->matrix};
    sft_prefetch* prefetch = NULL;
    sft_prefetch_state state = 99;
    size_t landed = 99;
    CHECK_OK(sft_set_threads(1));
    CHECK_OK(sft_prefetch_start(&request, 1, &prefetch));
    CHECK_OK(sft_prefetch_next(prefetch, 0, &state, &landed)); /* 8 of 12 MB */
    CHECK(state == SFT_PREFETCH_PENDING && landed == 99);
    CHECK_OK(sft_prefetch_take(prefetch, 0, 0, &state));
    CHECK(state == SFT_PREFETCH_LANDED && memcmp(buffers->matrix, matrix[0], sizeof matrix[0]) == 0);
    sft_prefetch_free(prefetch);
    CHECK_OK(sft_set_threads(0));
    sft_file_free(file);
}

/* A buffer is the caller's once the prefetch is freed, whatever was read. */
static void test_free_half_way(struct buffers* buffers) {
    sft_file* files[FILES] = {open_file(0, SFT_BACKEND_MMAP), open_file(1, SFT_BACKEND_PREAD)};
    for (int round = 0; round < 20; round++) {
        sft_prefetch_request requests[ALL];
        make_requests(requests, files, buffers);
        sft_prefetch* prefetch = NULL;
        CHECK_OK(sft_prefetch_start(requests, ALL, &prefetch));
        usleep((useconds_t)(round * 200));
        sft_prefetch_free(prefetch);
        memset(buffers, 0x11, FILES * sizeof *buffers);
        usleep(1000);
        const unsigned char* bytes = (const unsigned char*)buffers;
        CHECK(bytes[0] == 0x11 && memcmp(bytes, bytes + 1, FILES * sizeof *buffers - 1) == 0);
    }
    sft_file_free(files[0]);
    sft_file_free(files[1]);
}

static void test_refusals(struct buffers* buffers) {
    sft_file* file = open_file(0, SFT_BACKEND_PREAD);
    sft_prefetch* prefetch = (sft_prefetch*)buffers;
    sft_prefetch_state state = 99;
    size_t landed = 99;
    const sft_prefetch_request whole = {file, MATRIX, NULL, 0, buffers->matrix, sizeof buffers->matrix};
    sft_prefetch_request wrong = whole;
    wrong.nbytes--;
    CHECK_STATUS(sft_prefetch_start(&wrong, 1, &prefetch), SFT_ERROR_BUFFER_SIZE);
    CHECK(prefetch == NULL && strstr(sft_last_error_get_message(), "tensor \"matrix\" takes") != NULL);
    wrong = whole;
    wrong.index = TENSORS;
    CHECK_STATUS(sft_prefetch_start(&wrong, 1, &prefetch), SFT_ERROR_INVALID_ARGUMENT);
    wrong = whole;
    wrong.ranges = part;
    wrong.rank = 1;
    CHECK_STATUS(sft_prefetch_start(&wrong, 1, &prefetch), SFT_ERROR_SLICE);
    wrong = whole;
    wrong.buffer = NULL;
    CHECK_STATUS(sft_prefetch_start(&wrong, 1, &prefetch), SFT_ERROR_INVALID_ARGUMENT);
    wrong = whole;
    wrong.file = NULL;
    CHECK_STATUS(sft_prefetch_start(&wrong, 1, &prefetch), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(sft_prefetch_start(NULL, 1, &prefetch), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(sft_prefetch_start(&whole, 1, NULL), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(sft_prefetch_next(NULL, 0, &state, &landed), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(sft_prefetch_take(NULL, 0, 0, &state), SFT_ERROR_INVALID_ARGUMENT);
    sft_prefetch_free(NULL);

    CHECK_OK(sft_prefetch_start(NULL, 0, &prefetch));
    CHECK_STATUS(sft_prefetch_next(prefetch, 0, NULL, &landed), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(sft_prefetch_next(prefetch, 0, &state, NULL), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(sft_prefetch_take(prefetch, 0, 0, NULL), SFT_ERROR_INVALID_ARGUMENT);
    CHECK_OK(sft_prefetch_next(prefetch, 0, &state, &landed));
    CHECK(state == SFT_PREFETCH_END);
    sft_prefetch_free(prefetch);

    CHECK_OK(sft_file_close(file));
    CHECK_STATUS(sft_prefetch_start(&whole, 1, &prefetch), SFT_ERROR_CLOSED);
    sft_file_free(file);
}

/* A file that is cut short fails, names the tensor, and ends the prefetch. */
static void test_failure(struct buffers* buffers) {
    sft_file* file = open_file(0, SFT_BACKEND_PREAD);
    CHECK(truncate(path_of(name_of(0)), 1000000) == 0);
    const sft_prefetch_request request = {file, MATRIX, NULL, 0, buffers->matrix, sizeof buffers->matrix};
    sft_prefetch* prefetch = NULL;
    sft_prefetch_state state = 99;
    size_t landed = 99;
    CHECK_OK(sft_prefetch_start(&request, 1, &prefetch));
    CHECK_STATUS(sft_prefetch_next(prefetch, LONG, &state, &landed), SFT_ERROR_FILE_CHANGED);
    CHECK(strstr(sft_last_error_get_message(), "for tensor \"matrix\"") != NULL);
    CHECK_STATUS(sft_prefetch_next(prefetch, LONG, &state, &landed), SFT_ERROR_INVALID_ARGUMENT);
    sft_prefetch_free(prefetch);
    sft_file_free(file);
}

void test_prefetch(void) {
    struct buffers* buffers = malloc(FILES * sizeof *buffers);
    write_files();
    take_all(SFT_BACKEND_MMAP, buffers);
    take_all(SFT_BACKEND_PREAD, buffers);
    CHECK_OK(sft_set_threads(1));
    take_all(SFT_BACKEND_PREAD, buffers);
    CHECK_OK(sft_set_threads(0));
    test_time(buffers);
    test_free_half_way(buffers);
    test_refusals(buffers);
    test_failure(buffers);
    unlink(path_of(name_of(0)));
    unlink(path_of(name_of(1)));
    free(buffers);
}
