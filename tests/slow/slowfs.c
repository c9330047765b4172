// A slow filesystem over the files of one directory, which simulates network storage: each request has a latency and a
// fixed bandwidth, and requests are served concurrently.
//
// Run as root: slowfs DIRECTORY MOUNTPOINT MILLISECONDS MEGABYTES_PER_SECOND [MAX_BACKGROUND [GOOD_BYTES [REFUSES]]]
//
// The kernel sends at most MAX_BACKGROUND requests of its readahead at once: 12 by default, as with libfuse. Reads
// beyond GOOD_BYTES of a file fail with EIO. Direct access (O_DIRECT) gets EINVAL from what REFUSES names: "open" or
// "read". Serves until it is unmounted (umount MOUNTPOINT). Its file `.requests`, which is never cached, contains the
// number of reads so far, the largest number of concurrent reads, the bytes read, and the number of refused reads.
// Readahead has the kernel's defaults, except that reads are parallel and requests have up to 1 MiB.
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { THREADS = 32, MOST_FILES = 1024, MOST_BYTES = 1 << 20, REQUESTS_NODE = 2, FIRST_NODE = 3 };

static int device;
static int directory;
static long wait_ns;
static double ns_per_byte;
static uint16_t max_background;  // 0 for the kernel's default
static uint64_t good_bytes = UINT64_MAX;
static const char* refuses = "";

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char* names[MOST_FILES];  // of node FIRST_NODE + index
static size_t name_count;
static unsigned long reads, at_once, most_at_once, bytes_read, refused;

static void fail(const char* what) {
    fprintf(stderr, "slowfs: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void reply(uint64_t unique, int error, const void* body, size_t size) {
    struct fuse_out_header head = {(uint32_t)(sizeof head + size), -error, unique};
    struct iovec parts[2] = {{&head, sizeof head}, {(void*)body, size}};
    // ENOENT: the process that waited for the answer was interrupted.
    if (writev(device, parts, size ? 2 : 1) < 0 && errno != ENOENT) {
        fail("answer");
    }
}

static const char* name_of(uint64_t node) {
    pthread_mutex_lock(&lock);
    const char* name = node >= FIRST_NODE && node - FIRST_NODE < name_count ? names[node - FIRST_NODE] : NULL;
    pthread_mutex_unlock(&lock);
    return name;
}

// Returns the node of a name, or 0 if there are too many files.
static uint64_t node_of(const char* name) {
    pthread_mutex_lock(&lock);
    size_t index = 0;
    while (index < name_count && strcmp(names[index], name) != 0) {
        index++;
    }
    if (index == name_count && index < MOST_FILES && (names[index] = strdup(name)) != NULL) {
        name_count++;
    }
    const uint64_t node = index < name_count ? FIRST_NODE + index : 0;
    pthread_mutex_unlock(&lock);
    return node;
}

static size_t requests_text(char* text, size_t size) {
    pthread_mutex_lock(&lock);
    const int length = snprintf(text, size, "%lu %lu %lu %lu\n", reads, most_at_once, bytes_read, refused);
    pthread_mutex_unlock(&lock);
    return (size_t)length;
}

// Fills in the attributes of a node. Returns 0 or the error.
static int attributes(uint64_t node, struct fuse_attr* out) {
    memset(out, 0, sizeof *out);
    out->ino = node;
    out->nlink = 1;
    if (node == FUSE_ROOT_ID || node == REQUESTS_NODE) {
        out->mode = node == FUSE_ROOT_ID ? S_IFDIR | 0755 : S_IFREG | 0444;
        return 0;
    }
    const char* name = name_of(node);
    struct stat status;
    if (name == NULL || fstatat(directory, name, &status, 0) != 0 || !S_ISREG(status.st_mode)) {
        return ENOENT;
    }
    out->mode = S_IFREG | 0444;
    out->size = (uint64_t)status.st_size;
    out->blocks = (out->size + 511) / 512;
    out->mtime = (uint64_t)status.st_mtim.tv_sec;
    out->mtimensec = (uint32_t)status.st_mtim.tv_nsec;
    out->blksize = 4096;
    return 0;
}

static void look_up(const struct fuse_in_header* head, const char* name) {
    struct fuse_entry_out entry = {.entry_valid = 3600, .attr_valid = 3600};
    entry.nodeid = strcmp(name, ".requests") == 0 ? REQUESTS_NODE : node_of(name);
    const int error = attributes(entry.nodeid, &entry.attr);
    reply(head->unique, error, &entry, error ? 0 : sizeof entry);
}

static void take_time(size_t bytes) {
    const long long nanoseconds = wait_ns + (long long)((double)bytes * ns_per_byte);
    struct timespec left = {nanoseconds / 1000000000, nanoseconds % 1000000000};
    while (nanosleep(&left, &left) != 0) {
    }
}

static void read_file(const struct fuse_in_header* head, const struct fuse_read_in* in, char* buffer) {
    if (head->nodeid == REQUESTS_NODE) {
        const size_t length = requests_text(buffer, MOST_BYTES);
        const size_t start = in->offset < length ? in->offset : length;
        reply(head->unique, 0, buffer + start, length - start);
        return;
    }
    pthread_mutex_lock(&lock);
    reads++;
    most_at_once = ++at_once > most_at_once ? at_once : most_at_once;
    pthread_mutex_unlock(&lock);
    ssize_t length = pread((int)in->fh, buffer, in->size < MOST_BYTES ? in->size : MOST_BYTES, (off_t)in->offset);
    int error = errno;
    const bool is_refused = (in->flags & O_DIRECT) && strcmp(refuses, "read") == 0;
    if (is_refused) {
        length = -1;
        error = EINVAL;
    } else if (length > 0 && in->offset + (uint64_t)length > good_bytes) {
        length = -1;
        error = EIO;
    }
    take_time(length > 0 ? (size_t)length : 0);
    pthread_mutex_lock(&lock);
    at_once--;
    bytes_read += length > 0 ? (size_t)length : 0;
    refused += is_refused;
    pthread_mutex_unlock(&lock);
    reply(head->unique, length < 0 ? error : 0, buffer, length < 0 ? 0 : (size_t)length);
}

static void open_file(const struct fuse_in_header* head, const struct fuse_open_in* in) {
    struct fuse_open_out out = {0};
    if (head->nodeid == REQUESTS_NODE) {
        out.open_flags = FOPEN_DIRECT_IO;
    } else if (head->opcode == FUSE_OPEN) {
        if ((in->flags & O_DIRECT) && strcmp(refuses, "open") == 0) {
            reply(head->unique, EINVAL, NULL, 0);
            return;
        }
        const char* name = name_of(head->nodeid);
        const int file = name == NULL ? -1 : openat(directory, name, O_RDONLY | O_CLOEXEC);
        if (file < 0) {
            reply(head->unique, name == NULL ? ENOENT : errno, NULL, 0);
            return;
        }
        out.fh = (uint64_t)file;
        out.open_flags = FOPEN_KEEP_CACHE;
    }
    reply(head->unique, 0, &out, sizeof out);
}

static void start(const struct fuse_in_header* head, const struct fuse_init_in* in) {
    struct fuse_init_out out = {
        .major = FUSE_KERNEL_VERSION,
        .minor = FUSE_KERNEL_MINOR_VERSION,
        .max_readahead = in->max_readahead,
        .flags = FUSE_ASYNC_READ | FUSE_MAX_PAGES,
        .max_background = max_background,
        .congestion_threshold = (uint16_t)(max_background * 3 / 4),
        .max_write = MOST_BYTES,
        .max_pages = MOST_BYTES / 4096,
    };
    if (in->minor < out.minor) {
        out.minor = in->minor;
    }
    reply(head->unique, 0, &out, sizeof out);
}

static void answer(const struct fuse_in_header* head, const void* body, char* buffer) {
    struct fuse_attr_out attr = {.attr_valid = 3600};
    struct fuse_statfs_out statfs = {.st = {.bsize = 4096, .frsize = 4096, .namelen = 255}};
    int error = 0;
    switch (head->opcode) {
        case FUSE_INIT:
            start(head, body);
            break;
        case FUSE_LOOKUP:
            look_up(head, body);
            break;
        case FUSE_GETATTR:
            error = attributes(head->nodeid, &attr.attr);
            reply(head->unique, error, &attr, error ? 0 : sizeof attr);
            break;
        case FUSE_OPEN:
        case FUSE_OPENDIR:
            open_file(head, body);
            break;
        case FUSE_READ:
            read_file(head, body, buffer);
            break;
        case FUSE_RELEASE:
            if (head->nodeid >= FIRST_NODE) {
                close((int)((const struct fuse_release_in*)body)->fh);
            }
            reply(head->unique, 0, NULL, 0);
            break;
        case FUSE_STATFS:
            reply(head->unique, 0, &statfs, sizeof statfs);
            break;
        // Directories cannot be listed, and flush has nothing to write.
        case FUSE_READDIR:
        case FUSE_RELEASEDIR:
        case FUSE_FLUSH:
            reply(head->unique, 0, NULL, 0);
            break;
        // These requests have no reply.
        case FUSE_FORGET:
        case FUSE_BATCH_FORGET:
        case FUSE_INTERRUPT:
            break;
        default:
            reply(head->unique, ENOSYS, NULL, 0);
    }
}

static void* serve(void* unused) {
    (void)unused;
    enum { ROOM = MOST_BYTES + 8192 };
    char* request = malloc(ROOM);
    char* buffer = malloc(MOST_BYTES);
    if (request == NULL || buffer == NULL) {
        fail("memory");
    }
    for (;;) {
        const ssize_t length = read(device, request, ROOM);
        if (length >= (ssize_t)sizeof(struct fuse_in_header)) {
            answer((const void*)request, request + sizeof(struct fuse_in_header), buffer);
        } else if (errno == ENODEV) {
            exit(0);  // unmounted
        } else if (errno != ENOENT && errno != EINTR && errno != EAGAIN) {
            fail("request");
        }
    }
}

int main(int argc, char** argv) {
    if (argc < 5 || argc > 8) {
        fprintf(stderr,
                "usage: slowfs DIRECTORY MOUNTPOINT MILLISECONDS MEGABYTES_PER_SECOND [MAX_BACKGROUND "
                "[GOOD_BYTES [REFUSES]]]\n");
        return 2;
    }
    wait_ns = (long)(atof(argv[3]) * 1e6);
    ns_per_byte = 1e3 / atof(argv[4]);
    max_background = argc > 5 ? (uint16_t)atoi(argv[5]) : 0;
    good_bytes = argc > 6 ? strtoull(argv[6], NULL, 10) : good_bytes;
    refuses = argc > 7 ? argv[7] : refuses;
    if ((directory = open(argv[1], O_RDONLY | O_DIRECTORY | O_CLOEXEC)) < 0) {
        fail(argv[1]);
    }
    if ((device = open("/dev/fuse", O_RDWR | O_CLOEXEC)) < 0) {
        fail("/dev/fuse");
    }
    char options[128];
    snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", device);
    if (mount("slowfs", argv[2], "fuse.slowfs", MS_NOSUID | MS_NODEV | MS_RDONLY, options) != 0) {
        fail("mount");
    }
    pthread_t thread;
    for (int i = 1; i < THREADS; i++) {
        if (pthread_create(&thread, NULL, serve, NULL) != 0) {
            fail("thread");
        }
    }
    serve(NULL);
}
