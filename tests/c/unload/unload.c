/* Repeatedly loads the library with dlopen, starts its background threads, and unloads it while they run. Arguments:
 * the library and a directory. */
#include <dlfcn.h>
#include <pthread.h>
#include <safetensors_torch.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define ROUNDS 200
#define NBYTES (24 << 20) /* enough for prefault to start threads */

#define FIND(library, name) ((__typeof__(&(name)))dlsym(library, #name))

static const char* file_path;
static sft_file* files[ROUNDS];
static int opened;

/* Runs on a thread that ends, because destructors of thread-local storage keep a library loaded too. The file is never
 * freed, so that the threads that prefault it continue. */
static void* open_file(void* library) {
    sft_open_options options = SFT_OPEN_OPTIONS_INIT;
    options.prefault = SFT_PREFAULT_BACKGROUND;
    return FIND(library, sft_file_open)(file_path, &options, &files[opened++]) == SFT_OK ? library : NULL;
}

static int load_and_unload(const char* path) {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        return fprintf(stderr, "%s\n", dlerror());
    }
    pthread_t thread;
    void* result = NULL;
    if (pthread_create(&thread, NULL, open_file, library) != 0 || pthread_join(thread, &result) != 0 ||
        result == NULL) {
        return fprintf(stderr, "the file was not opened\n");
    }
    return dlclose(library);
}

/* Returns whether the library is still loaded after a dlclose. */
static int stays_loaded(const char* path) {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    void* left = NULL;
    if (library == NULL || dlclose(library) != 0 || (left = dlopen(path, RTLD_NOW | RTLD_NOLOAD)) == NULL) {
        fprintf(stderr, "the library is gone, and threads may be in its code\n");
        return 0;
    }
    return dlclose(left) == 0;
}

static int make_file(const char* path) {
    const char header[] = "{\"a\":{\"dtype\":\"U8\",\"shape\":[25165824],\"data_offsets\":[0,25165824]}}";
    const unsigned long long length = sizeof header - 1;
    FILE* file = fopen(path, "wb");
    if (file == NULL) {
        return 1;
    }
    const size_t written = fwrite(&length, 8, 1, file) + fwrite(header, length, 1, file);
    const int status = fflush(file) != 0 || ftruncate(fileno(file), 8 + (long)length + NBYTES) != 0;
    return fclose(file) != 0 || status || written != 2;
}

int main(int argc, char** argv) {
    char path[4096];
    if (argc != 3 || snprintf(path, sizeof path, "%s/unload.safetensors", argv[2]) >= (int)sizeof path ||
        make_file(path) != 0) {
        fprintf(stderr, "usage: %s LIBRARY DIRECTORY\n", argv[0]);
        return 2;
    }
    file_path = path;
    for (int round = 0; round < ROUNDS; ++round) {
        /* In the first round, nothing in this program keeps the library loaded. */
        if ((round > 0 && load_and_unload(argv[1]) != 0) || !stays_loaded(argv[1])) {
            return 1;
        }
    }
    printf("unloaded %d times\n", ROUNDS);
    return 0;
}
