/*
 * Lists the contents of safetensors files: names, dtypes, shapes, sizes, metadata, totals. Reads only the headers, so
 * time and memory do not depend on the size of the tensors.
 *
 *     make PREFIX=/usr/local               # the prefix of `make install TORCH=0 PREFIX=...` of the library
 *     ./inspect model.safetensors          # a line for each tensor, sorted by name
 *     ./inspect DIRECTORY                  # the shards of a checkpoint
 *     ./inspect --json *.safetensors       # a JSON object for each argument, one per line
 *
 * Without make: cc -std=c11 inspect.c -I$PREFIX/include -L$PREFIX/lib -Wl,-rpath,$PREFIX/lib -lsafetensors_torch_c -o
 * inspect
 *
 * Exit status: 0; 1 if a file cannot be read or the output cannot be written; 2 if the arguments are wrong.
 */
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <safetensors_torch.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

typedef struct total {
    uint64_t tensors;
    uint64_t nbytes;
} total;

/* More dtypes than exist today: a newer library may know others. */
enum { DTYPES = 256 };

typedef struct totals {
    total all;
    total by_dtype[DTYPES];
} totals;

/* ---- Text -------------------------------------------------------------------------------------------------------- */

/* Returns the length of the UTF-8 character at `text`, or 0 if it is not valid. */
static size_t character_length(const char* text, size_t length) {
    const unsigned char* s = (const unsigned char*)text;
    const size_t expected = s[0] < 0x80 ? 1 : s[0] < 0xc2 ? 0 : s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3 : s[0] < 0xf5 ? 4 : 0;
    if (expected > length) {
        return 0;
    }
    for (size_t i = 1; i < expected; i++) {
        if ((s[i] & 0xc0) != 0x80) {
            return 0;
        }
    }
    /* An overlong encoding, a surrogate, or beyond U+10FFFF. */
    const bool wrong = expected > 1 && ((s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xed && s[1] > 0x9f) ||
                                        (s[0] == 0xf0 && s[1] < 0x90) || (s[0] == 0xf4 && s[1] > 0x8f));
    return wrong ? 0 : expected;
}

/* Returns the code point of the valid UTF-8 character of `length` bytes at `text`. */
static uint32_t code_point(const char* text, size_t length) {
    const unsigned char* s = (const unsigned char*)text;
    uint32_t code = length == 1 ? s[0] : s[0] & (0x7fU >> length);
    for (size_t i = 1; i < length; i++) {
        code = code << 6 | (s[i] & 0x3fU);
    }
    return code;
}

static bool within(uint32_t code, uint32_t begin, uint32_t end) { return begin <= code && code <= end; }

/* Returns whether a character can control a terminal or the direction of text, ends a line, or has no width. */
static bool is_invisible(uint32_t code) {
    return code < 0x20 || within(code, 0x7f, 0x9f) || code == 0xad || code == 0x61c || code == 0x180e ||
           within(code, 0x200b, 0x200f) || within(code, 0x2028, 0x202e) || within(code, 0x2060, 0x206f) ||
           code == 0xfeff || within(code, 0xfff9, 0xfffb) || within(code, 0xe0000, 0xe007f);
}

/* Writes text escaped for a JSON string, without the quotes. Invisible characters are escaped, so that none reaches a
 * terminal. Invalid UTF-8, which paths may contain, becomes U+FFFD. */
static void put_text(const char* text, size_t length) {
    size_t begin = 0; /* of the text not written yet */
    for (size_t i = 0; i < length;) {
        const size_t step = character_length(text + i, length - i);
        const uint32_t code = step == 0 ? 0xfffd : code_point(text + i, step);
        const bool hidden = step == 0 || is_invisible(code);
        if (!hidden && code != '"' && code != '\\') {
            i += step;
            continue;
        }
        fwrite(text + begin, 1, i - begin, stdout);
        if (!hidden) {
            printf("\\%c", (char)code);
        } else if (code < 0x10000) {
            printf("\\u%04" PRIx32, code);
        } else { /* as a surrogate pair */
            printf("\\u%04" PRIx32 "\\u%04" PRIx32, 0xd7c0 + (code >> 10), 0xdc00 + (code & 0x3ff));
        }
        i += step == 0 ? 1 : step;
        begin = i;
    }
    fwrite(text + begin, 1, length - begin, stdout);
}

static void put_shape(const sft_tensor_info* info) {
    putchar('[');
    for (size_t axis = 0; axis < info->rank; axis++) {
        printf("%s%" PRIu64, axis == 0 ? "" : ", ", info->shape[axis]);
    }
    putchar(']');
}

/* ---- One file ---------------------------------------------------------------------------------------------------- */

static void add(const sft_tensor_info* info, totals* sums) {
    sums->all.tensors++;
    sums->all.nbytes += info->nbytes;
    if (info->dtype < DTYPES) {
        sums->by_dtype[info->dtype].tensors++;
        sums->by_dtype[info->dtype].nbytes += info->nbytes;
    }
}

/* Gets the tensor at `position` in the order of names. */
static bool tensor_at(const sft_file* file, size_t position, sft_tensor_info* info) {
    size_t index;
    return sft_file_get_sorted_index(file, position, &index) == SFT_OK &&
           sft_file_get_tensor_info(file, index, info) == SFT_OK;
}

static bool print_file(const sft_file* file, totals* sums) {
    size_t entries, count;
    if (sft_file_get_metadata_count(file, &entries) != SFT_OK || sft_file_get_tensor_count(file, &count) != SFT_OK) {
        return false;
    }
    for (size_t i = 0; i < entries; i++) {
        sft_str key, value;
        if (sft_file_get_metadata_entry(file, i, &key, &value) != SFT_OK) {
            return false;
        }
        fputs("  # ", stdout);
        put_text(key.data, key.length);
        fputs(" = ", stdout);
        put_text(value.data, value.length);
        putchar('\n');
    }
    for (size_t i = 0; i < count; i++) {
        sft_tensor_info info = SFT_TENSOR_INFO_INIT;
        if (!tensor_at(file, i, &info)) {
            return false;
        }
        add(&info, sums);
        printf("  %-11s %14" PRIu64 "  ", sft_dtype_get_code(info.dtype), info.nbytes);
        put_text(info.name.data, info.name.length);
        putchar(' ');
        put_shape(&info);
        putchar('\n');
    }
    return true;
}

static bool print_file_json(const sft_file* file, totals* sums) {
    int32_t has_metadata;
    size_t entries, count;
    if (sft_file_has_metadata(file, &has_metadata) != SFT_OK || sft_file_get_metadata_count(file, &entries) != SFT_OK ||
        sft_file_get_tensor_count(file, &count) != SFT_OK) {
        return false;
    }
    fputs(has_metadata ? "\"metadata\": {" : "\"metadata\": null", stdout);
    for (size_t i = 0; i < entries; i++) {
        sft_str key, value;
        if (sft_file_get_metadata_entry(file, i, &key, &value) != SFT_OK) {
            return false;
        }
        fputs(i == 0 ? "\"" : ", \"", stdout);
        put_text(key.data, key.length);
        fputs("\": \"", stdout);
        put_text(value.data, value.length);
        putchar('"');
    }
    fputs(has_metadata ? "}, \"tensors\": [" : ", \"tensors\": [", stdout);
    for (size_t i = 0; i < count; i++) {
        sft_tensor_info info = SFT_TENSOR_INFO_INIT;
        if (!tensor_at(file, i, &info)) {
            return false;
        }
        add(&info, sums);
        fputs(i == 0 ? "{\"name\": \"" : ", {\"name\": \"", stdout);
        put_text(info.name.data, info.name.length);
        printf("\", \"dtype\": \"%s\", \"shape\": ", sft_dtype_get_code(info.dtype));
        put_shape(&info);
        printf(", \"nbytes\": %" PRIu64 ", \"begin\": %" PRIu64 "}", info.nbytes, info.begin);
    }
    putchar(']');
    return true;
}

/* ---- One checkpoint ---------------------------------------------------------------------------------------------- */

static void print_total(const char* what, const total* sum) {
    printf("  %-11s %14" PRIu64 "  in %" PRIu64 " tensor%s\n", what, sum->nbytes, sum->tensors,
           sum->tensors == 1 ? "" : "s");
}

/* A file is a checkpoint of one shard. */
static bool print_checkpoint(const char* path, const sft_checkpoint* checkpoint) {
    size_t shards;
    if (sft_checkpoint_get_shard_count(checkpoint, &shards) != SFT_OK) {
        return false;
    }
    put_text(path, strlen(path));
    fputs(":\n", stdout);
    totals sums = {0};
    for (size_t i = 0; i < shards; i++) {
        sft_str name;
        const sft_file* file;
        if (sft_checkpoint_get_shard(checkpoint, i, &name, &file) != SFT_OK) {
            return false;
        }
        if (shards != 1) {
            put_text(name.data, name.length);
            fputs(":\n", stdout);
        }
        if (!print_file(file, &sums)) {
            return false;
        }
    }
    for (sft_dtype dtype = 0; dtype < DTYPES; dtype++) {
        if (sums.by_dtype[dtype].tensors != 0) {
            print_total(sft_dtype_get_code(dtype), &sums.by_dtype[dtype]);
        }
    }
    print_total("total", &sums.all);
    return true;
}

static void print_total_json(const total* sum) {
    printf("\"tensor_count\": %" PRIu64 ", \"nbytes\": %" PRIu64, sum->tensors, sum->nbytes);
}

static bool print_checkpoint_json(const char* path, const sft_checkpoint* checkpoint) {
    size_t shards;
    if (sft_checkpoint_get_shard_count(checkpoint, &shards) != SFT_OK) {
        return false;
    }
    fputs("{\"path\": \"", stdout);
    put_text(path, strlen(path));
    fputs("\", \"shards\": [", stdout);
    totals sums = {0};
    for (size_t i = 0; i < shards; i++) {
        sft_str name;
        const sft_file* file;
        if (sft_checkpoint_get_shard(checkpoint, i, &name, &file) != SFT_OK) {
            return false;
        }
        fputs(i == 0 ? "{\"name\": \"" : ", {\"name\": \"", stdout);
        put_text(name.data, name.length);
        fputs("\", ", stdout);
        if (!print_file_json(file, &sums)) {
            return false;
        }
        putchar('}');
    }
    fputs("], ", stdout);
    print_total_json(&sums.all);
    fputs(", \"dtypes\": {", stdout);
    const char* comma = "";
    for (sft_dtype dtype = 0; dtype < DTYPES; dtype++) {
        if (sums.by_dtype[dtype].tensors != 0) {
            printf("%s\"%s\": {", comma, sft_dtype_get_code(dtype));
            print_total_json(&sums.by_dtype[dtype]);
            putchar('}');
            comma = ", ";
        }
    }
    fputs("}}\n", stdout);
    return true;
}

static bool inspect(const char* path, bool json) {
    /* Read, not mapped: if another program truncates the file, reading fails, but accessing a mapping raises SIGBUS. */
    sft_checkpoint_options options = SFT_CHECKPOINT_OPTIONS_INIT;
    options.backend = SFT_BACKEND_PREAD;
    sft_checkpoint* checkpoint;
    if (sft_checkpoint_open(path, &options, &checkpoint) != SFT_OK) {
        return false;
    }
    const bool done = json ? print_checkpoint_json(path, checkpoint) : print_checkpoint(path, checkpoint);
    sft_checkpoint_free(checkpoint);
    return done;
}

int main(int argc, char** argv) {
    static const struct option options[] = {{"json", no_argument, NULL, 'j'}, {"help", no_argument, NULL, 'h'}, {0}};
    static const char usage[] = "usage: inspect [--json] FILE_OR_DIRECTORY...\n";
    bool json = false;
    for (int option; (option = getopt_long(argc, argv, "jh", options, NULL)) != -1;) {
        if (option == 'h') {
            return fputs(usage, stdout) == EOF || fflush(stdout) == EOF;
        }
        if (option != 'j') {
            fputs(usage, stderr);
            return 2;
        }
        json = true;
    }
    if (optind == argc) {
        fputs(usage, stderr);
        return 2;
    }
    int status = 0;
    for (int i = optind; i < argc; i++) {
        if (!inspect(argv[i], json)) {
            fprintf(stderr, "inspect: %s\n", sft_last_error_get_message());
            status = 1;
        }
        /* Flush, so that error messages appear between the lists. */
        if (fflush(stdout) == EOF || ferror(stdout)) {
            fprintf(stderr, "inspect: standard output: %s\n", strerror(errno));
            return 1;
        }
    }
    return status;
}
