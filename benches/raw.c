/* The raw limit of a machine: bare loops that copy the same bytes as the works, without format or tensors.
 *
 * Owns the loops and their clock. works.py says which work a loop is compared with.
 *
 * raw LOOP SOURCE TARGET [sync]     answers each line "run" on stdin with the seconds of one run, in JSON.
 *
 * The loop "direct N x M" reads around the page cache: N threads, M MiB a read. The loop "files N x M" writes N files
 * of one size into the directory TARGET with M threads.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, CHUNK = 8 << 20, BLOCK = 16 << 20, HUGE = 2 << 20, MOST_THREADS = 64 };

static const char* source;
static const char* target;
static bool synced;
static size_t size;  /* of the source */
static char* held;   /* the bytes of the source, for loops that start from memory */
static char* result; /* the result of a run, freed after the clock stops */
static int leftover; /* a descriptor, closed after the clock stops */

static void fail(const char* what) {
    printf("{\"error\": \"%s: %s\"}\n", what, strerror(errno));
    exit(1);
}

static int checked(int value, const char* what) {
    if (value < 0) fail(what);
    return value;
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* Returns fresh memory that may get huge pages, aligned to them. */
static char* new_memory(void) {
    char* start = mmap(NULL, size + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) fail("mmap");
    size_t before = -(uintptr_t)start % HUGE;
    size_t after = HUGE - before; /* at least a page: both are multiples of pages */
    if (before) munmap(start, before);
    munmap(start + before + (size + PAGE - 1) / PAGE * PAGE, after);
    madvise(start + before, size, MADV_HUGEPAGE);
    return start + before;
}

static void read_fully(int file, char* to, size_t length, size_t offset) {
    while (length > 0) {
        ssize_t count = pread(file, to, length, (off_t)offset);
        if (count <= 0) fail("pread");
        to += count;
        offset += (size_t)count;
        length -= (size_t)count;
    }
}

static void write_fully(int file, const char* from, size_t length) {
    for (size_t done = 0; done < length;) {
        ssize_t count = write(file, from + done, length - done);
        if (count < 0) fail("write");
        done += (size_t)count;
    }
}

/* --- loops over chunks, one thread for each core */

struct shared {
    atomic_size_t next;
    size_t chunk;
    int file; /* or -1 for memory */
    bool direct;
    char* to;
};

/* Reads whole pages: O_DIRECT takes nothing else. The last one reaches beyond the end of the file. */
static void read_pages(int file, char* to, size_t length, size_t offset) {
    for (size_t done = 0; done < length;) {
        size_t pages = (length - done + PAGE - 1) / PAGE * PAGE;
        ssize_t count = pread(file, to + done, pages, (off_t)(offset + done));
        if (count <= 0) fail("direct pread");
        done += (size_t)count;
    }
}

static void* move_chunks(void* argument) {
    struct shared* shared = argument;
    for (;;) {
        size_t begin = atomic_fetch_add(&shared->next, shared->chunk);
        if (begin >= size) return NULL;
        size_t length = size - begin < shared->chunk ? size - begin : shared->chunk;
        if (shared->file < 0)
            memcpy(shared->to + begin, held + begin, length);
        else if (shared->direct)
            read_pages(shared->file, shared->to + begin, length, begin);
        else
            read_fully(shared->file, shared->to + begin, length, begin);
    }
}

static void run_threads(int count, struct shared* shared) {
    pthread_t threads[MOST_THREADS];
    for (int i = 1; i < count; i++) {
        if (pthread_create(&threads[i], NULL, move_chunks, shared)) fail("pthread_create");
    }
    move_chunks(shared);
    for (int i = 1; i < count; i++) pthread_join(threads[i], NULL);
}

static void move_all(int file, char* to) {
    struct shared shared = {.next = 0, .chunk = CHUNK, .file = file, .direct = false, .to = to};
    cpu_set_t cores;
    checked(sched_getaffinity(0, sizeof cores, &cores), "sched_getaffinity");
    run_threads(CPU_COUNT(&cores) < MOST_THREADS ? CPU_COUNT(&cores) : MOST_THREADS, &shared);
}

static void read_to(char* to) {
    int file = checked(open(source, O_RDONLY | O_CLOEXEC), "open");
    move_all(file, to);
    close(file);
}

static void loop_read(void) { read_to(result = new_memory()); }

static void loop_read_warm(void) { read_to(held); }

static int direct_threads = 4, direct_mib = 1;

static void loop_direct(void) {
    int file = checked(open(source, O_RDONLY | O_CLOEXEC | O_DIRECT), "open for direct reads");
    result = new_memory();
    struct shared shared = {.next = 0, .chunk = (size_t)direct_mib << 20, .file = file, .direct = true, .to = result};
    run_threads(direct_threads, &shared);
    close(file);
}

static void loop_copy(void) { move_all(-1, result = new_memory()); }

static int files = 8, writers = 1;

static void* write_files(void* argument) {
    atomic_int* next = argument;
    for (int number; (number = atomic_fetch_add(next, 1)) < files;) {
        char path[4096];
        snprintf(path, sizeof path, "%s/%d", target, number);
        size_t begin = size / (size_t)files * (size_t)number;
        size_t length = number == files - 1 ? size - begin : size / (size_t)files;
        int file = checked(open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666), "create");
        checked(fallocate(file, 0, 0, (off_t)length), "fallocate");
        write_fully(file, held + begin, length);
        checked(close(file), "close");
    }
    return NULL;
}

static void loop_files(void) {
    atomic_int next = 0;
    pthread_t threads[MOST_THREADS];
    checked(mkdir(target, 0777), "mkdir");
    for (int i = 1; i < writers; i++) {
        if (pthread_create(&threads[i], NULL, write_files, &next)) fail("pthread_create");
    }
    write_files(&next);
    for (int i = 1; i < writers; i++) pthread_join(threads[i], NULL);
}

/* --- loops in one thread */

static void loop_touch(void) {
    int file = checked(open(source, O_RDONLY | O_CLOEXEC), "open");
    result = mmap(NULL, size, PROT_READ, MAP_PRIVATE, file, 0);
    if (result == MAP_FAILED) fail("mmap");
    close(file);
    for (size_t at = 0; at < size; at += PAGE) (void)*(volatile char*)(result + at);
}

static void loop_sequential(void) {
    static char block[BLOCK];
    int file = checked(open(source, O_RDONLY | O_CLOEXEC), "open");
    for (size_t at = 0; at < size; at += BLOCK) {
        read_fully(file, block, size - at < BLOCK ? size - at : BLOCK, at);
    }
    close(file);
}

static void fill(int file) {
    write_fully(file, held, size);
    if (synced) checked(fsync(file), "fsync");
}

static const char* directory(void) {
    static char path[4096];
    snprintf(path, sizeof path, "%s", target);
    return dirname(path);
}

static void sync_directory(void) {
    if (!synced) return;
    int opened = checked(open(directory(), O_RDONLY | O_DIRECTORY | O_CLOEXEC), "open the directory");
    checked(fsync(opened), "fsync of the directory");
    close(opened);
}

static void loop_write(void) {
    int file = checked(open(target, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666), "create");
    checked(fallocate(file, 0, 0, (off_t)size), "fallocate");
    fill(file);
    checked(close(file), "close");
    sync_directory();
}

/* Writes and renames by hand. Preallocates nothing: ext4 writes delayed data when the rename replaces a file. */
static void loop_replace(void) {
    char link[64], fresh[4096];
    snprintf(fresh, sizeof fresh, "%s.fresh", target);
    leftover = checked(open(target, O_RDONLY | O_CLOEXEC), "open the old file");
    int file = checked(open(directory(), O_TMPFILE | O_WRONLY | O_CLOEXEC, 0666), "create");
    fill(file);
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    checked(linkat(AT_FDCWD, link, AT_FDCWD, fresh, AT_SYMLINK_FOLLOW), "link");
    checked(rename(fresh, target), "rename");
    checked(close(file), "close");
    sync_directory();
}

/* --- the worker */

static const struct {
    const char* name;
    void (*run)(void);
    bool holds; /* whether it starts from bytes in memory, or reads into warm memory */
} loops[] = {
    {"touch", loop_touch, false},      {"sequential", loop_sequential, false},
    {"read", loop_read, false},        {"read warm", loop_read_warm, true},
    {"copy", loop_copy, true},         {"write", loop_write, true},
    {"replace", loop_replace, true},   {"direct N x M", loop_direct, false},
    {"files N x M", loop_files, true},
};

int main(int count, char** arguments) {
    if (count < 4) {
        fprintf(stderr, "usage: raw LOOP SOURCE TARGET [sync]\n");
        return 2;
    }
    source = arguments[2];
    target = arguments[3];
    synced = count > 4;
    struct stat status;
    checked(stat(source, &status), source);
    size = (size_t)status.st_size;
    setvbuf(stdout, NULL, _IOLBF, 0);
    char* name = arguments[1];
    if (sscanf(name, "direct %d x %d", &direct_threads, &direct_mib) == 2 && direct_threads > 0 && direct_mib > 0 &&
        direct_threads <= MOST_THREADS) {
        name = "direct N x M";
    }
    if (sscanf(name, "files %d x %d", &files, &writers) == 2 && files > 0 && writers > 0 && writers <= MOST_THREADS) {
        name = "files N x M";
    }
    size_t chosen = 0;
    while (strcmp(loops[chosen].name, name) != 0) {
        if (++chosen == sizeof loops / sizeof *loops) {
            fprintf(stderr, "no loop %s\n", name);
            return 2;
        }
    }
    if (loops[chosen].holds) read_to(held = new_memory());
    printf("{\"ready\": \"%zu bytes\"}\n", size);
    for (char line[16]; fgets(line, sizeof line, stdin);) {
        result = NULL;
        leftover = -1;
        double start = now();
        loops[chosen].run();
        double seconds = now() - start;
        if (result) munmap(result, size);
        if (leftover >= 0) close(leftover);
        printf("{\"seconds\": %.9f}\n", seconds);
    }
    return 0;
}
