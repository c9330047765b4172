/* Writes a file, reads it back and compares:  use_c FILE */
#include <inttypes.h>
#include <safetensors_torch.h>
#include <stdio.h>
#include <string.h>

#if SFT_VERSION_NUMBER < 100
#error "the header has no version that the preprocessor can compare"
#endif

static int failed(const char* what) {
    fprintf(stderr, "%s: %s\n", what, sft_last_error_get_message());
    return 1;
}

int main(int argc, char** argv) {
    static const float weight[6] = {0.5f, -1.0f, 2.0f, 3.25f, -4.0f, 5.5f};
    static const uint64_t shape[2] = {2, 3};
    const char* path = argc > 1 ? argv[1] : "use_c.safetensors";
    sft_writer* writer = NULL;
    sft_file* file = NULL;
    sft_tensor_info info = SFT_TENSOR_INFO_INIT;
    sft_str format = {NULL, 0};
    float copy[6] = {0};
    size_t index = 0;

    if (strcmp(sft_get_version(), SFT_VERSION_STRING) != 0) {
        fprintf(stderr, "header %s, library %s\n", SFT_VERSION_STRING, sft_get_version());
        return 1;
    }
    if (sft_writer_new(&writer) ||
        sft_writer_add_tensor(writer, "weight", 6, SFT_DTYPE_F32, shape, 2, weight, sizeof weight) ||
        sft_writer_add_metadata(writer, "format", 6, "pt", 2) || sft_writer_write_file(writer, path, NULL)) {
        return failed("write");
    }
    sft_writer_free(writer);

    if (sft_file_open(path, NULL, &file) || sft_file_find_tensor(file, "weight", 6, &index) ||
        sft_file_get_tensor_info(file, index, &info) || sft_file_find_metadata(file, "format", 6, &format) ||
        sft_file_read_tensor(file, index, copy, sizeof copy)) {
        return failed("read");
    }
    if (info.dtype != SFT_DTYPE_F32 || info.rank != 2 || info.shape[0] != 2 || info.shape[1] != 3 ||
        memcmp(weight, copy, sizeof weight) != 0 || format.length != 2 || memcmp(format.data, "pt", 2) != 0) {
        fprintf(stderr, "the file differs from what was written\n");
        return 1;
    }
    printf("C: weight of %" PRIu64 " bytes, library %s\n", info.nbytes, sft_get_version());
    sft_file_free(file);

    /* An error has a text. */
    if (sft_file_open("/nowhere/model.safetensors", NULL, &file) != SFT_ERROR_IO ||
        strstr(sft_last_error_get_message(), "/nowhere/model.safetensors") == NULL) {
        return failed("a missing file");
    }
    return 0;
}
