/*
 * Lists the tensors of a safetensors file, and reads one.
 *
 *     make PREFIX=/usr/local                    # where `make install TORCH=0 PREFIX=...` of the library has put it
 *     ./list model.safetensors                  # names, dtypes, shapes, places
 *     ./list model.safetensors h.0.attn.bias    # the same, and the first bytes of one tensor
 *
 * Without make: cc -std=c11 list.c -I$PREFIX/include -L$PREFIX/lib -Wl,-rpath,$PREFIX/lib -lsafetensors_torch -o list
 */
#include <inttypes.h>
#include <safetensors_torch.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int fail(void) {
    fprintf(stderr, "%s\n", sft_last_error_message());
    return 1;
}

static int list(const sft_file* file) {
    size_t count;
    if (sft_file_count(file, &count) != SFT_OK) {
        return fail();
    }
    for (size_t index = 0; index < count; index++) {
        sft_tensor_info info = SFT_TENSOR_INFO_INIT;
        if (sft_file_tensor(file, index, &info) != SFT_OK) {
            return fail();
        }
        /* A name has a length, and no NUL at its end. */
        fwrite(info.name.data, 1, info.name.length, stdout);
        printf(": %s [", sft_dtype_code(info.dtype));
        for (size_t axis = 0; axis < info.rank; axis++) {
            printf("%s%" PRIu64, axis == 0 ? "" : ", ", info.shape[axis]);
        }
        printf("], %" PRIu64 " bytes at %" PRIu64 "\n", info.nbytes, info.begin);
    }
    return 0;
}

static int read_one(const sft_file* file, const char* name) {
    size_t index;
    sft_tensor_info info = SFT_TENSOR_INFO_INIT;
    if (sft_file_find(file, name, strlen(name), &index) != SFT_OK || sft_file_tensor(file, index, &info) != SFT_OK) {
        return fail();
    }
    unsigned char* bytes = malloc(info.nbytes == 0 ? 1 : info.nbytes);
    if (bytes == NULL) {
        perror("malloc");
        return 1;
    }
    if (sft_file_read(file, index, bytes, info.nbytes) != SFT_OK) {
        free(bytes);
        return fail();
    }
    printf("%s begins with", name);
    for (size_t i = 0; i < info.nbytes && i < 16; i++) {
        printf(" %02x", bytes[i]);
    }
    printf("\n");
    free(bytes);
    return 0;
}

int main(int argc, char** argv) {
    if (argc != 2 && argc != 3) {
        fprintf(stderr, "usage: %s FILE [TENSOR]\n", argv[0]);
        return 2;
    }
    sft_open_options options = SFT_OPEN_OPTIONS_INIT;
    options.backend = SFT_BACKEND_PREAD;
    sft_file* file;
    if (sft_file_open(argv[1], &options, &file) != SFT_OK) {
        return fail();
    }
    int status = list(file);
    if (status == 0 && argc == 3) {
        status = read_one(file, argv[2]);
    }
    sft_file_free(file);
    return status;
}
