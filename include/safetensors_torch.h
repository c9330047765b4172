/** @file
 * Reads, validates and writes safetensors files in C, without torch. docs/c.md is a guide with complete programs.
 *
 *     #include <safetensors_torch.h>
 *
 *     sft_file* file;   size_t index;   const void* data;
 *     if (sft_file_open("model.safetensors", NULL, &file) != SFT_OK) return puts(sft_last_error_get_message());
 *     if (sft_file_find_tensor(file, "weight", 6, &index) == SFT_OK && sft_file_get_data(file, index, &data) == SFT_OK)
 *         use(data);                                   // points into the file, until it is freed
 *     sft_file_free(file);
 *
 * Link with -lsafetensors_torch_c, or with the output of `pkg-config --libs safetensors_torch-c`. Requires C11 or C++.
 *
 * Status. A function that can fail returns an sft_status: SFT_OK or an SFT_ERROR_ number. sft_last_error_get_message()
 * then returns a line that names the object, the fault and the remedy. A failed call does not change its results,
 * unless its documentation says otherwise. A bug of the library is SFT_ERROR_PANIC. Every function with a handle of a
 * closed file returns SFT_ERROR_CLOSED, except sft_file_close and sft_file_free. "Errors" lists what a function returns
 * besides these, without the prefix SFT_ERROR_; "A to B" includes the numbers between.
 *
 * Pointers. A pointer must be valid during the call for as many elements as its length says, or for one element if it
 * has no length. Memory for results may be uninitialized, and must not overlap anything that the same call reads. NULL
 * and misaligned pointers are SFT_ERROR_INVALID_ARGUMENT; arrays of length 0 may be NULL.
 *
 * The end of the process. No function ends the process, with two exceptions. The library calls abort() if malloc fails
 * for the library's own small needs. Those are headers, indexes, names and lists of work in functions that open, read,
 * save or edit, and the message of any function that fails. On an open file, sft_file_get_tensor_count,
 * sft_file_get_tensor_info, sft_file_get_sorted_index, sft_file_find_tensor, the functions for metadata and, if it is
 * mapped, sft_file_get_data allocate nothing when they succeed. Writes to a pipe without a reader and beyond the limit
 * of a file's size are errors (EPIPE, EFBIG): SIGPIPE and SIGXFSZ are blocked in the thread that writes, for as long as
 * it does, and those that its writes cause are discarded. A mapped file that another program cuts short in place raises
 * SIGBUS in the thread that accesses the lost part.
 *
 * Text. Names, metadata keys and values are UTF-8 with a length in bytes. They may contain NUL, and do not end in it.
 * Text that is not UTF-8 is SFT_ERROR_INVALID_ARGUMENT. A string without a length ends in NUL. Paths are such strings,
 * in the bytes of the operating system.
 *
 * Ownership. The caller owns a handle, and frees it with its _free function. Names, shapes and data that a function
 * returns belong to the handle, and are valid until it is closed or freed. Bytes that a handle borrows from the caller
 * must stay valid and unchanged for as long as its function says.
 *
 * Threads. Functions with a const handle may run on several threads at once with one handle. The others require that no
 * other thread uses the handle. Functions without a handle may run at any time.
 *
 * Units. Sizes, offsets and lengths are bytes; shapes, ranges and ranks are elements and dimensions.
 *
 * Versions. A struct with struct_size as its first field may grow at its end: initialize it with its _INIT macro, which
 * sets the size. Library and program may then be of different versions. Fields that the library does not know must be
 * 0, and the size must be set; otherwise SFT_ERROR_INVALID_ARGUMENT. Numbers are never reused.
 */
#ifndef SAFETENSORS_TORCH_H
#define SAFETENSORS_TORCH_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/** The version of this header: text such as "0.1.0". */
#define SFT_VERSION_STRING "0.1.0"

/** The same as a number, 10000 * major + 100 * minor + patch: `#if SFT_VERSION_NUMBER >= 100` is true from 0.1.0 on. */
#define SFT_VERSION_NUMBER 100

/** Returns the version of the linked library. The string is static. */
const char* sft_get_version(void);

/* ---- Status ------------------------------------------------------------------------------------------------------ */

/** SFT_OK or one of the SFT_ERROR_ numbers; more of them may come. */
typedef int32_t sft_status;

/** Every status. */
enum {
    SFT_OK = 0,                     /**< success */
    SFT_ERROR_INVALID_ARGUMENT = 1, /**< an invalid argument */
    SFT_ERROR_IO = 2,             /**< an error of the operating system; sft_last_error_get_os_error() returns errno */
    SFT_ERROR_FILE_TOO_SMALL = 3, /**< fewer than the 8 bytes of the header length */
    SFT_ERROR_HEADER_TOO_LARGE = 4,   /**< a header of more than 100,000,000 bytes */
    SFT_ERROR_HEADER_TRUNCATED = 5,   /**< the header runs past the end of the file */
    SFT_ERROR_FOREIGN_FORMAT = 6,     /**< a Git LFS pointer, an HTML page, a zip, a pickle, ... */
    SFT_ERROR_HEADER_UTF8 = 7,        /**< the header is not UTF-8 */
    SFT_ERROR_HEADER_JSON = 8,        /**< the header is not the JSON that the format requires */
    SFT_ERROR_DUPLICATE = 9,          /**< a name, a field or a metadata key occurs twice */
    SFT_ERROR_UNKNOWN_DTYPE = 10,     /**< a dtype code that the format does not know */
    SFT_ERROR_SHAPE_OVERFLOW = 11,    /**< a shape whose elements, bytes or strides do not fit in 63 bits */
    SFT_ERROR_SIZE_MISMATCH = 12,     /**< data offsets that do not fit dtype and shape */
    SFT_ERROR_OFFSETS = 13,           /**< data offsets that are reversed, overlap, or leave a hole */
    SFT_ERROR_DATA_LENGTH = 14,       /**< data that is shorter or longer than its tensors */
    SFT_ERROR_TENSOR_NOT_FOUND = 15,  /**< no tensor has this name */
    SFT_ERROR_RESERVED_NAME = 16,     /**< a tensor called `__metadata__` */
    SFT_ERROR_UNSUPPORTED_DTYPE = 17, /**< an unknown dtype number; on a big-endian machine, a dtype of several bytes */
    SFT_ERROR_SLICE = 18,             /**< outside the tensor, of step 0, or splitting a byte */
    SFT_ERROR_BUFFER_SIZE = 19,       /**< a buffer of the wrong size */
    SFT_ERROR_CLOSED = 20,            /**< the file was closed */
    SFT_ERROR_FILE_CHANGED = 21,      /**< the file changed while it was open or edited */
    SFT_ERROR_PANIC = 22,             /**< a bug of this library */
    SFT_ERROR_INDEX = 23 /**< an index of a checkpoint that is malformed, names files outside its directory or does
                              not fit its files; a directory that holds no checkpoint, or several */
};

/** Returns the name of a status, such as "SFT_ERROR_IO", or "unknown status". The string is static, never NULL. */
const char* sft_status_get_name(sft_status status);

/** Returns the meaning of a status in a few words. The string is static, never NULL. */
const char* sft_status_get_message(sft_status status);

/** Returns the error of the calling thread's last failed call: one line that names the file, the tensor and the remedy;
 * "" before the first failure. A successful call does not change it. UTF-8 (control and format
 * characters of names are escaped: `\0`, `\n`, `\u{1b}`), valid until this thread's next failed call, never NULL. */
const char* sft_last_error_get_message(void);

/** Returns errno of the calling thread's last failed call, or 0 if it was not an error of the operating system. A
 * successful call does not change it. */
int32_t sft_last_error_get_os_error(void);

/* ---- Settings ---------------------------------------------------------------------------------------------------- */

/** Sets the most threads that one call uses, from the next call on, for the whole process. They include the calling
 * thread and those of SFT_PREFAULT_BACKGROUND. 1 means only the calling thread, 0 means automatic. */
sft_status sft_set_threads(size_t threads);

/** Sets `*threads` to the value of sft_set_threads; before that, to the environment variable SAFETENSORS_TORCH_THREADS,
 * or 0.
 * Errors: INVALID_ARGUMENT if the variable is not a number, as in every call that could use several threads. */
sft_status sft_get_threads(size_t* threads);

/** Whether large reads into memory bypass the page cache (O_DIRECT). */
typedef uint32_t sft_direct;

/** Every setting of direct reads. */
enum {
    SFT_DIRECT_AUTO = 0,  /**< if the file is not in the page cache, and its storage is fast */
    SFT_DIRECT_NEVER = 1, /**< never, so that the page cache keeps what was read */
    SFT_DIRECT_ALWAYS = 2 /**< even if the file is in the page cache, which takes several times as long */
};

/** Sets whether large reads into memory bypass the page cache, from the next call on, for the whole process. If a
 * filesystem refuses direct reads, reads are buffered.
 * Errors: INVALID_ARGUMENT for another number. */
sft_status sft_set_direct(sft_direct direct);

/** Sets `*direct` to the value of sft_set_direct; before that, to the environment variable SAFETENSORS_TORCH_DIRECT
 * ("auto", "0" or "1"), or SFT_DIRECT_AUTO.
 * Errors: INVALID_ARGUMENT if the variable has another value, as in every call that could read directly. */
sft_status sft_get_direct(sft_direct* direct);

/* ---- Element types ----------------------------------------------------------------------------------------------- */

/** One of the SFT_DTYPE_ numbers; more of them may come. */
typedef uint32_t sft_dtype;

/** Every element type. Elements are little-endian: big-endian machines can open and write only files whose elements
 * have one byte at most. */
enum {
    SFT_DTYPE_BOOL = 0,         /**< a byte, 0 or 1 */
    SFT_DTYPE_F4 = 1,           /**< 4-bit float (e2m1), two to a byte */
    SFT_DTYPE_F6_E2M3 = 2,      /**< 6-bit float, four to three bytes */
    SFT_DTYPE_F6_E3M2 = 3,      /**< 6-bit float, four to three bytes */
    SFT_DTYPE_U8 = 4,           /**< uint8_t */
    SFT_DTYPE_I8 = 5,           /**< int8_t */
    SFT_DTYPE_F8_E5M2 = 6,      /**< 8-bit float */
    SFT_DTYPE_F8_E4M3 = 7,      /**< 8-bit float without infinities (e4m3fn) */
    SFT_DTYPE_F8_E8M0 = 8,      /**< an exponent alone: a scale */
    SFT_DTYPE_F8_E4M3FNUZ = 9,  /**< 8-bit float without infinities and negative zero */
    SFT_DTYPE_F8_E5M2FNUZ = 10, /**< 8-bit float without infinities and negative zero */
    SFT_DTYPE_I16 = 11,         /**< int16_t */
    SFT_DTYPE_U16 = 12,         /**< uint16_t */
    SFT_DTYPE_F16 = 13,         /**< IEEE 754 binary16 */
    SFT_DTYPE_BF16 = 14,        /**< bfloat16 */
    SFT_DTYPE_I32 = 15,         /**< int32_t */
    SFT_DTYPE_U32 = 16,         /**< uint32_t */
    SFT_DTYPE_F32 = 17,         /**< float */
    SFT_DTYPE_C64 = 18,         /**< two floats: real, imaginary */
    SFT_DTYPE_F64 = 19,         /**< double */
    SFT_DTYPE_I64 = 20,         /**< int64_t */
    SFT_DTYPE_U64 = 21          /**< uint64_t */
};

/** Returns the code of a dtype in a file, such as "F32", or NULL if the number is unknown. The string is static. */
const char* sft_dtype_get_code(sft_dtype dtype);

/** Returns the width of one element in bits (4, 6, or a multiple of 8), or 0 if the number is unknown. */
uint32_t sft_dtype_get_bits(sft_dtype dtype);

/** Sets `*dtype` to the dtype of a code.
 * Errors: UNKNOWN_DTYPE. */
sft_status sft_dtype_parse(const char* code, sft_dtype* dtype);

/** Sets `*nbytes` to the size of a tensor of this dtype and shape. `shape` has `rank` dimensions; rank 0 is a scalar.
 * Errors: UNSUPPORTED_DTYPE, SHAPE_OVERFLOW, SIZE_MISMATCH (the elements end in the middle of a byte). */
sft_status sft_dtype_compute_nbytes(sft_dtype dtype, const uint64_t* shape, size_t rank, uint64_t* nbytes);

/* ---- Reading: files ---------------------------------------------------------------------------------------------- */

/** Text with a length in bytes: UTF-8 that does not end in NUL, and may hold it. */
typedef struct sft_str {
    const char* data; /**< the first byte; printf("%.*s", (int)length, data) prints the text */
    size_t length;    /**< in bytes */
} sft_str;

/** An open file with a valid header. From sft_file_open, sft_file_open_buffer or
 * sft_checkpoint_get_shard. */
typedef struct sft_file sft_file;

/** How the tensors of a file are read. */
typedef uint32_t sft_backend;

/** Every backend. */
enum {
    SFT_BACKEND_MMAP = 0, /**< map the file privately; copy nothing */
    SFT_BACKEND_PREAD = 1 /**< read the file; for network filesystems, and for files that others may truncate */
};

/** When the pages of a mapped file are prefaulted. Otherwise the first access costs a page fault every few pages, and a
 * wait for the disk if the file is not in the page cache. Ignored with SFT_BACKEND_PREAD. */
typedef uint32_t sft_prefault;

/** Every time of prefaulting. */
enum {
    SFT_PREFAULT_NONE = 0,       /**< never: pages are read when they are accessed */
    SFT_PREFAULT_BACKGROUND = 1, /**< in background threads, for files of 16 MiB and more; pages that are not cached are
                                      read with large reads, unless the file needs more than half of the available
                                      memory */
    SFT_PREFAULT_WAIT = 2        /**< before sft_file_open returns */
};

/** Options for sft_file_open. */
typedef struct sft_open_options {
    size_t struct_size;    /**< sizeof(sft_open_options) */
    sft_backend backend;   /**< how tensors are read; default SFT_BACKEND_MMAP */
    sft_prefault prefault; /**< when mapped pages are prefaulted; default SFT_PREFAULT_NONE */
} sft_open_options;

/** The defaults of sft_open_options. */
#define SFT_OPEN_OPTIONS_INIT {sizeof(sft_open_options), SFT_BACKEND_MMAP, SFT_PREFAULT_NONE}

/** Opens the file at `path`, and validates its header against the format and the length of the file. `options` may be
 * NULL for the defaults. `*file` becomes a handle to free with sft_file_free, or NULL on an error.
 *
 * With SFT_BACKEND_MMAP, changes that another process makes in place appear in memory. If it truncates the file, access
 * to the lost part raises SIGBUS, even in sft_file_read_tensor. Replacing the file by rename, as this library does, is
 * safe. With SFT_BACKEND_PREAD a truncated file is an error, and a changed file returns its present contents.
 *
 * Errors: IO, also if it is not a regular file; FILE_TOO_SMALL to DATA_LENGTH and RESERVED_NAME if the file is invalid;
 * FILE_CHANGED; INVALID_ARGUMENT for an unknown backend or prefault. */
sft_status sft_file_open(const char* path, const sft_open_options* options, sft_file** file);

/** Opens a file whose `nbytes` bytes are in memory. The handle borrows the bytes until it is closed or freed. `*file`
 * becomes a handle to free with sft_file_free, or NULL on an error. Errors: FILE_TOO_SMALL to DATA_LENGTH and
 * RESERVED_NAME. */
sft_status sft_file_open_buffer(const void* data, size_t nbytes, sft_file** file);

/** What a function of an sft_source says about its failure. */
typedef struct sft_source_error sft_source_error;

/** Sets the errno (0 if there is none) and the text of a failure: what is wrong, and what to do. The library adds the
 * name of the file. Only for functions of an sft_source, with the error that they got. */
sft_status sft_source_error_set(sft_source_error* error, int32_t os_error, const char* message);

/** Memory for the next bytes of a source. */
typedef struct sft_buffer {
    void* data;    /**< its first byte */
    size_t nbytes; /**< its size */
} sft_buffer;

/** Sets `*length` to the size of the file. Called once. */
typedef sft_status (*sft_source_get_length)(void* context, uint64_t* length, sft_source_error* error);

/** Sets `*identity` to what identifies the bytes that the last call of get_length or read on this thread was about,
 * such as an ETag. Called after each of these; a change makes reads fail with FILE_CHANGED. The string ends in NUL, and
 * must stay valid until the next call on this thread. NULL is none. */
typedef sft_status (*sft_source_get_identity)(void* context, const char** identity, sft_source_error* error);

/** Fills `count` buffers, one after the other, with the bytes of the file from `offset` on: at most 8 MiB, inside its
 * length. */
typedef sft_status (*sft_source_read)(void* context, uint64_t offset, const sft_buffer* buffers, size_t count,
                                      sft_source_error* error);

/** Returns how many calls of read the source can answer at once; 0 for as many as suit the library. With 1, a load
 * reads in the order of the file, as a stream needs it. Called once, after get_length. */
typedef uint32_t (*sft_source_get_max_requests)(void* context);

/** Frees the context. Called once, after all other calls have returned. */
typedef void (*sft_source_free)(void* context);

/** A file that the program reads by its own means: an object in a bucket, an entry of an archive, a cache.
 *
 * The functions return SFT_OK, or a status after they have called sft_source_error_set: SFT_ERROR_FILE_CHANGED,
 * SFT_ERROR_INVALID_ARGUMENT, or SFT_ERROR_IO, which every other status means too. Several threads call them at once,
 * up to 32 or as many as sft_set_threads says, if get_max_requests allows. They must not throw, nor use a handle of the
 * source's file. */
typedef struct sft_source {
    size_t struct_size;                   /**< sizeof(sft_source) */
    void* context;                        /**< the first argument of each function */
    sft_source_get_length get_length;     /**< not NULL */
    sft_source_get_identity get_identity; /**< NULL if the source makes sure by itself that its bytes do not change */
    sft_source_read read;                 /**< not NULL */
    sft_source_free free;                 /**< NULL if there is nothing to free */
    sft_source_get_max_requests get_max_requests; /**< NULL if the source can answer as many as suit the library */
} sft_source;

/** A source without functions. */
#define SFT_SOURCE_INIT {sizeof(sft_source), NULL, NULL, NULL, NULL, NULL, NULL}

/** Opens a file that the program reads by its own means. `name` stands for the path in messages: a URL, without
 * credentials. Its tensors are read as those of a file with SFT_BACKEND_PREAD. The source is freed with the file, and
 * also if this fails, except for an invalid struct_size. `*file` becomes a handle to free with sft_file_free, or NULL
 * on an error. Errors: those of the source; FILE_TOO_SMALL to DATA_LENGTH and RESERVED_NAME; INVALID_ARGUMENT if
 * get_length or read is NULL. */
sft_status sft_file_open_source(const sft_source* source, const char* name, sft_file** file);

/** Sets `*source` to the file at `path`. If there is none, this or get_length fails with the errno ENOENT; for a
 * directory, with EISDIR. `*source` is SFT_SOURCE_INIT before. */
typedef sft_status (*sft_filesystem_open)(void* context, const char* path, sft_source* source, sft_source_error* error);

/** Sets `*names` to the names of the files in a directory, and `*count` to their number. Array and strings must stay
 * valid until the next call on this thread. */
typedef sft_status (*sft_filesystem_list)(void* context, const char* directory, const char* const** names,
                                          size_t* count, sft_source_error* error);

/** Files that the program reads by its own means, by their paths: the objects of a bucket, for example. The functions
 * return a status as those of an sft_source do, and several threads call them at once. Paths are the program's own: the
 * library only joins the path of a directory and the name of a file with a slash. */
typedef struct sft_filesystem {
    size_t struct_size;       /**< sizeof(sft_filesystem) */
    void* context;            /**< the first argument of each function */
    sft_filesystem_open open; /**< not NULL */
    sft_filesystem_list list; /**< NULL if directories cannot be listed */
} sft_filesystem;

/** A filesystem without functions. */
#define SFT_FILESYSTEM_INIT {sizeof(sft_filesystem), NULL, NULL, NULL}

/** Closes the file. Everything that the handle returned becomes invalid, mapped data too; the handle itself stays valid
 * until sft_file_free. Closing twice is not an error. No other thread may use the handle during the call. */
sft_status sft_file_close(sft_file* file);

/** Closes the file and frees the handle. NULL is ignored. No other thread may use the handle during the call. */
void sft_file_free(sft_file* file);

/** Sets `*count` to the number of tensors. */
sft_status sft_file_get_tensor_count(const sft_file* file, size_t* count);

/** The description of one tensor. Name and shape belong to the file. */
typedef struct sft_tensor_info {
    size_t struct_size;    /**< sizeof(sft_tensor_info) */
    sft_str name;          /**< UTF-8, without a NUL at its end */
    size_t rank;           /**< number of dimensions, 0 for a scalar */
    const uint64_t* shape; /**< `rank` dimensions, in elements of dtype */
    uint64_t nbytes;       /**< the size in bytes: end - begin */
    uint64_t begin;        /**< the offset of its first byte in the file */
    uint64_t end;          /**< the offset after its last byte */
    sft_dtype dtype;       /**< the element type */
    uint32_t reserved;     /**< 0 */
} sft_tensor_info;

/** The initializer of an sft_tensor_info. */
#define SFT_TENSOR_INFO_INIT {sizeof(sft_tensor_info), {NULL, 0}, 0, NULL, 0, 0, 0, 0, 0}

/** Describes the tensor at `index`, from 0 to the number of tensors less 1, in `*info`. Tensors are in file order: by
 * offset, then by name. `info->struct_size` must be set, as SFT_TENSOR_INFO_INIT does.
 * Errors: INVALID_ARGUMENT for an index beyond the last tensor. */
sft_status sft_file_get_tensor_info(const sft_file* file, size_t index, sft_tensor_info* info);

/** Where a load of a whole file puts its tensors. */
typedef uint32_t sft_load_target;

/** Every target of a load. */
enum {
    SFT_LOAD_TARGET_MAPPING = 0, /**< in a mapping of the file */
    SFT_LOAD_TARGET_MEMORY = 1,  /**< in memory of their own */
    SFT_LOAD_TARGET_DEVICE = 2   /**< on a device */
};

/** How a load would read a file. */
typedef struct sft_load_plan {
    size_t struct_size;     /**< sizeof(sft_load_plan) */
    const char* filesystem; /**< its kind, such as "ext4", or "unknown"; static */
    const char* reason;     /**< the reason of the plan, in English; static */
    uint64_t cached_bytes;  /**< the bytes in the page cache, in whole pages; UINT64_MAX if that is unknown */
    uint64_t request_bytes; /**< the most bytes of one read, or 0 without a limit */
    uint32_t readers;       /**< the threads that read, or 0 if pages are read when they are touched */
    uint32_t direct;        /**< 1 if reads bypass the page cache, otherwise 0 */
} sft_load_plan;

/** The initializer of an sft_load_plan. */
#define SFT_LOAD_PLAN_INIT {sizeof(sft_load_plan), NULL, NULL, 0, 0, 0, 0}

/** Sets `*plan` to how a load of the whole file to `target` would read it now. `plan->struct_size` must be set, as
 * SFT_LOAD_PLAN_INIT does. Reads nothing.
 * Errors: INVALID_ARGUMENT for an unknown target, or a handle of sft_file_open_buffer; FILE_CHANGED if the path leads
 * to another file by now. */
sft_status sft_file_explain_load(const sft_file* file, sft_load_target target, sft_load_plan* plan);

/** Sets `*index` to the index of the tensor whose name is at `position` in bytewise order.
 * Errors: INVALID_ARGUMENT for a position beyond the last tensor. */
sft_status sft_file_get_sorted_index(const sft_file* file, size_t position, size_t* index);

/** Sets `*index` to the index of the tensor called `name`, of `name_length` bytes.
 * Errors: TENSOR_NOT_FOUND. */
sft_status sft_file_find_tensor(const sft_file* file, const char* name, size_t name_length, size_t* index);

/* ---- Reading: metadata ------------------------------------------------------------------------------------------- */

/** Sets `*present` to 1 if the header has metadata, which may be empty, otherwise to 0. */
sft_status sft_file_has_metadata(const sft_file* file, int32_t* present);

/** Sets `*count` to the number of metadata entries; 0 if there is no metadata. */
sft_status sft_file_get_metadata_count(const sft_file* file, size_t* count);

/** Sets `*key` and `*value` to the entry at `position`, from 0 on, in bytewise order of keys. Both texts belong
 * to the file.
 * Errors: INVALID_ARGUMENT for a position beyond the last entry. */
sft_status sft_file_get_metadata_entry(const sft_file* file, size_t position, sft_str* key, sft_str* value);

/** Sets `*value` to the value of `key`, of `key_length` bytes. The text belongs to the file. If there is no such key,
 * `value->data` becomes NULL, which no value has, and the status is SFT_OK. */
sft_status sft_file_find_metadata(const sft_file* file, const char* key, size_t key_length, sft_str* value);

/* ---- Reading: data ----------------------------------------------------------------------------------------------- */

/** Sets `*data` to the bytes of the tensor at `index`, which belong to the file: in its mapping, or in the buffer of
 * sft_file_open_buffer. Never NULL on success, even for a tensor without bytes; NULL on an error. The bytes are
 * read-only, and are read from the file when they are accessed. Files of other writers may contain data that is not
 * aligned for its dtype. Errors: INVALID_ARGUMENT for an index beyond the last tensor, and for a file opened with
 * SFT_BACKEND_PREAD. */
sft_status sft_file_get_data(const sft_file* file, size_t index, const void** data);

/** Reads the tensor at `index` into `buffer`, whose `nbytes` must be the size of the tensor. Large tensors are read by
 * several threads, which have ended when the call returns. After IO and FILE_CHANGED the contents of the buffer are
 * unspecified. Errors: INVALID_ARGUMENT, BUFFER_SIZE, IO, FILE_CHANGED. */
sft_status sft_file_read_tensor(const sft_file* file, size_t index, void* buffer, size_t nbytes);

/** One of several tensors to read. */
typedef struct sft_read_request {
    size_t index;  /**< of the tensor, in file order */
    void* buffer;  /**< the destination; no two buffers may overlap */
    size_t nbytes; /**< of the buffer: the size of the tensor */
} sft_read_request;

/** Reads `count` tensors, in parallel, and tensors that are adjacent in the file with one read: pass them in file
 * order if possible. All sizes are checked before the first byte is read.
 * Errors: as sft_file_read_tensor. */
sft_status sft_file_read_tensors(const sft_file* file, const sft_read_request* reads, size_t count);

/** The part of one dimension that a slice takes: the indices start, start + step, ... below stop. */
typedef struct sft_range {
    uint64_t start; /**< at most stop */
    uint64_t stop;  /**< at most the dimension */
    uint64_t step;  /**< 1 or more */
} sft_range;

/** Computes the size of a slice of the tensor at `index`. `ranges` has one range for each of the tensor's `rank`
 * dimensions; `shape` receives the `rank` dimensions of the slice, `*nbytes` its size in bytes. Errors: SLICE (ranges
 * that do not fit the tensor, or elements of less than a byte whose slice would begin or end in the middle of one),
 * INVALID_ARGUMENT. */
sft_status sft_file_get_slice_size(const sft_file* file, size_t index, const sft_range* ranges, size_t rank,
                                   uint64_t* shape, uint64_t* nbytes);

/** Reads a slice of the tensor at `index` into `buffer`, row-major and without gaps; `nbytes` must be the size
 * from sft_file_get_slice_size. Reads only the pages that contain bytes of the slice. After IO and FILE_CHANGED the
 * contents of the buffer are unspecified. Errors: SLICE, INVALID_ARGUMENT, BUFFER_SIZE, IO, FILE_CHANGED. */
sft_status sft_file_read_slice(const sft_file* file, size_t index, const sft_range* ranges, size_t rank, void* buffer,
                               size_t nbytes);

/** One of several slices to read. */
typedef struct sft_slice_request {
    size_t index;            /**< of the tensor, in file order */
    const sft_range* ranges; /**< one for each of the tensor's dimensions */
    size_t rank;             /**< the number of ranges */
    void* buffer;            /**< the first element of the destination; no elements of two requests may overlap */
    size_t nbytes; /**< of the buffer: the size from sft_file_get_slice_size, or for `strides` at least from the
                      first element to the end of the last */
    const uint64_t* strides; /**< the distance between neighbours in the buffer, in elements, as in DLPack: one for each
                                dimension; NULL for row-major without gaps */
} sft_slice_request;

/** Reads `count` slices, in parallel, each into row-major memory or to the places that `strides` give its elements,
 * such as columns of a larger matrix. The bytes between these places stay as they are. Reads only the pages that
 * contain bytes of the slices. A thread needs at most about 1 MiB of memory besides the destinations. Everything is
 * checked before the first byte is read. Errors: as sft_file_read_slice; INVALID_ARGUMENT also for strides with which
 * elements might share memory (each stride must step over all elements of the dimensions with smaller strides), and for
 * strides other than row-major ones if the elements have less than a byte. */
sft_status sft_file_read_slices(const sft_file* file, const sft_slice_request* reads, size_t count);

/* ---- Reading: statistics ----------------------------------------------------------------------------------------- */

/** How many values there are of each kind, and where the finite ones lie. Each element is a value; those of
 * SFT_DTYPE_C64 are two, and a byte of SFT_DTYPE_BOOL other than 0 is 1. 64-bit integers are rounded to a double. */
typedef struct sft_statistics {
    size_t struct_size;        /**< sizeof(sft_statistics) */
    uint64_t count;            /**< all values */
    uint64_t zeros;            /**< zeros of either sign */
    uint64_t nans;             /**< values that are not a number */
    uint64_t infinities;       /**< infinities of either sign */
    double minimum;            /**< the least finite value; 0 if there is none */
    double maximum;            /**< the greatest finite value; 0 if there is none */
    double mean;               /**< the mean of the finite values; 0 if there is none */
    double squared_deviations; /**< the sum of (value - mean) squared over the finite values: with n of them, the
                                    standard deviation is sqrt(squared_deviations / (n - 1)) */
} sft_statistics;

/** The statistics of no values. */
#define SFT_STATISTICS_INIT {sizeof(sft_statistics), 0, 0, 0, 0, 0, 0, 0, 0}

/** The most bins of a histogram. */
#define SFT_HISTOGRAM_BINS 128

/** How many finite values lie in each of several intervals, the bins: from the one with the least value to the one with
 * the greatest. Bin i has the values from (first + i) * width up to, but without, (first + i + 1) * width. The width is
 * the least power of two with which the bins suffice, so more than half of them are used, unless the values are too
 * close to each other. */
typedef struct sft_histogram {
    size_t struct_size;                  /**< sizeof(sft_histogram) */
    int64_t first;                       /**< where the first bin begins, in widths */
    double width;                        /**< the width of a bin, a power of two */
    uint64_t bin_count;                  /**< the number of bins; 0 if there are no values */
    uint64_t counts[SFT_HISTOGRAM_BINS]; /**< the number of values in each bin */
} sft_histogram;

/** The histogram of no values. */
#define SFT_HISTOGRAM_INIT {sizeof(sft_histogram), 0, 0, 0, {0}}

/** Elements of a tensor, and what they are added to. */
typedef struct sft_statistics_request {
    size_t index;               /**< of the tensor, in file order */
    uint64_t first;             /**< the first element */
    uint64_t count;             /**< the number of elements */
    sft_statistics* statistics; /**< SFT_STATISTICS_INIT, or the result for other elements */
    sft_histogram* histogram;   /**< SFT_HISTOGRAM_INIT, or the result for the same elements; NULL for none */
} sft_statistics_request;

/** Adds elements of tensors to statistics: `count` requests, each with structs of its own. They are read and added up
 * in parts, by several threads, which need a few MiB each; tensors that are adjacent in the file are read with one
 * read. Programs that show progress, or that must react in time, divide a large tensor into several calls. The result
 * does not depend on the threads. It does not depend on the division either if each request ends at a multiple of 1 MiB
 * of its tensor; otherwise the last bits of mean and deviations do. Everything is checked before the first byte is
 * read. Errors: UNSUPPORTED_DTYPE for SFT_DTYPE_F6_E2M3 and SFT_DTYPE_F6_E3M2, because the format does not define which
 * bits are an element; SLICE for elements outside the tensor, or of less than a byte if they begin or end in the middle
 * of one; INVALID_ARGUMENT, also for structs that are not results; IO, FILE_CHANGED. */
sft_status sft_file_compute_statistics(const sft_file* file, const sft_statistics_request* requests, size_t count);

/* ---- Reading: checkpoints of several files ----------------------------------------------------------------------- */

/** The tensors of one file or of several, its shards, which an index (model.safetensors.index.json) lists. It does
 * not change while it is open. */
typedef struct sft_checkpoint sft_checkpoint;

/** What to do about tensors that the files of a checkpoint contain and its index does not list. */
typedef uint32_t sft_extra;

/** Every choice. */
enum {
    SFT_EXTRA_ERROR = 0, /**< refuse the checkpoint: index and files may be of two checkpoints */
    SFT_EXTRA_IGNORE = 1 /**< leave them out of the functions of sft_checkpoint */
};

/** Options for sft_checkpoint_open. */
typedef struct sft_checkpoint_options {
    size_t struct_size;    /**< sizeof(sft_checkpoint_options) */
    sft_backend backend;   /**< as in sft_open_options, of each file */
    sft_prefault prefault; /**< as in sft_open_options, of each file */
    const char* variant;   /**< which of the checkpoints of a directory, UTF-8 that ends in NUL: "fp16" stands for
                                model.fp16.safetensors, model.safetensors.index.fp16.json and so on; NULL for the one
                                without a variant */
    sft_extra extra;       /**< what to do about tensors that the index does not list; default SFT_EXTRA_ERROR */
    uint32_t reserved;     /**< 0 */
} sft_checkpoint_options;

/** The defaults of sft_checkpoint_options. */
#define SFT_CHECKPOINT_OPTIONS_INIT \
    {sizeof(sft_checkpoint_options), SFT_BACKEND_MMAP, SFT_PREFAULT_NONE, NULL, SFT_EXTRA_ERROR, 0}

/** Opens the checkpoint at `path`: a file, an index (a name that ends in .json), or a directory with either, where
 * model.safetensors counts before model.safetensors.index.json, and both before other names. All files are opened, and
 * the index is checked against them: they hold the tensors that it lists, where it says so, and no others, unless
 * `extra` leaves those out; the names of files in it must not lead out of its directory. `options` may be NULL for the
 * defaults. `*checkpoint` becomes a handle to free with sft_checkpoint_free, or NULL on an error.
 * Errors: INDEX; INVALID_ARGUMENT for a variant of a path that is a file; DUPLICATE for a name that the index has
 * twice; those of sft_file_open for each file, and for the index IO and FOREIGN_FORMAT; FILE_CHANGED if it is
 * replaced again and again. */
sft_status sft_checkpoint_open(const char* path, const sft_checkpoint_options* options, sft_checkpoint** checkpoint);

/** As sft_checkpoint_open, of files that the program reads by its own means. The headers of several files are read at
 * once. In a directory that cannot be listed (no list function, or its error is EACCES), a checkpoint is found if its
 * names begin with "model". `filesystem` is used during the call only, its sources until the checkpoint is freed.
 * Backend and prefault have no effect. Errors: those of the filesystem and its sources, and those of
 * sft_checkpoint_open about the format and the index. */
sft_status sft_checkpoint_open_in(const sft_filesystem* filesystem, const char* path,
                                  const sft_checkpoint_options* options, sft_checkpoint** checkpoint);

/** Closes the files and frees the handle. Everything that it and they returned becomes invalid. NULL is ignored. No
 * other thread may use the handle or its files during the call. */
void sft_checkpoint_free(sft_checkpoint* checkpoint);

/** Sets `*count` to the number of files. */
sft_status sft_checkpoint_get_shard_count(const sft_checkpoint* checkpoint, size_t* count);

/** Sets `*file` to the handle of the file at `shard`, from 0 on in the order of names, and `*name` to its path relative
 * to the directory of the checkpoint. Both belong to the checkpoint. Errors: INVALID_ARGUMENT for a shard beyond the
 * last one. */
sft_status sft_checkpoint_get_shard(const sft_checkpoint* checkpoint, size_t shard, sft_str* name,
                                    const sft_file** file);

/** Sets `*count` to the number of tensors in all files, without those that `extra` leaves out. */
sft_status sft_checkpoint_get_tensor_count(const sft_checkpoint* checkpoint, size_t* count);

/** Sets `*shard` and `*index` to the file, and the index in it, of the tensor whose name is at `position` in bytewise
 * order.
 * Errors: INVALID_ARGUMENT for a position beyond the last tensor. */
sft_status sft_checkpoint_get_sorted_tensor(const sft_checkpoint* checkpoint, size_t position, size_t* shard,
                                            size_t* index);

/** Sets `*shard` and `*index` to the file, and the index in it, of the tensor called `name`, of `name_length` bytes.
 * Errors: TENSOR_NOT_FOUND. */
sft_status sft_checkpoint_find_tensor(const sft_checkpoint* checkpoint, const char* name, size_t name_length,
                                      size_t* shard, size_t* index);

/* ---- Reading: tensors as they land ------------------------------------------------------------------------------- */

/** Reads tensors in the background, in the order of their requests, and hands out each as soon as it has landed in its
 * buffer, so that the program can work on the first ones while the others are read. */
typedef struct sft_prefetch sft_prefetch;

/** A tensor to read, or a slice of one. */
typedef struct sft_prefetch_request {
    const sft_file* file;    /**< the file of the tensor; the requests may be of several files */
    size_t index;            /**< of the tensor, in file order */
    const sft_range* ranges; /**< the slice, as in sft_file_read_slice; NULL for the whole tensor */
    size_t rank;             /**< the number of ranges */
    void* buffer;            /**< the destination; no two buffers may overlap */
    size_t nbytes;           /**< of the buffer: the size of the tensor or slice */
} sft_prefetch_request;

/** What sft_prefetch_next and sft_prefetch_take have found. */
typedef uint32_t sft_prefetch_state;

/** Every state. */
enum {
    SFT_PREFETCH_PENDING = 0, /**< the time has passed, and nothing has landed */
    SFT_PREFETCH_LANDED = 1,  /**< a tensor has landed: its buffer is the caller's again */
    SFT_PREFETCH_END = 2      /**< all requests were handed out */
};

/** Starts to read `count` requests, and returns at once. All sizes are checked before the first byte is read. The files
 * must stay open, and the buffers valid and unused, until a buffer's request is handed out or the prefetch is freed.
 * The requests and their ranges are copied. sft_set_threads limits the threads; with 1, or for little data, the
 * functions that wait do the reading. `*prefetch` becomes a handle to free with sft_prefetch_free, or NULL on an error.
 * Errors: INVALID_ARGUMENT, BUFFER_SIZE, SLICE. */
sft_status sft_prefetch_start(const sft_prefetch_request* requests, size_t count, sft_prefetch** prefetch);

/** Waits up to `milliseconds` for a tensor that has landed. Sets `*state`, and if it is SFT_PREFETCH_LANDED, `*request`
 * to the number of the request, from 0 on. Several threads may wait at once; each request is handed out once.
 * Errors: IO and FILE_CHANGED, after which nothing more is read, and INVALID_ARGUMENT from the next call on; in a
 * forked process, INVALID_ARGUMENT. */
sft_status sft_prefetch_next(const sft_prefetch* prefetch, uint64_t milliseconds, sft_prefetch_state* state,
                             size_t* request);

/** As sft_prefetch_next, for request number `request`: sets `*state` to SFT_PREFETCH_LANDED or SFT_PREFETCH_PENDING. A
 * request that is not being read goes first.
 * Errors: as sft_prefetch_next, and INVALID_ARGUMENT for a request that does not exist or was handed out before. */
sft_status sft_prefetch_take(const sft_prefetch* prefetch, size_t request, uint64_t milliseconds,
                             sft_prefetch_state* state);

/** Ends all reading and frees the handle: no buffer is written to afterwards. NULL is ignored. */
void sft_prefetch_free(sft_prefetch* prefetch);

/* ---- Writing ----------------------------------------------------------------------------------------------------- */

/** Collects tensors and metadata, and writes them, even several times. */
typedef struct sft_writer sft_writer;

/** Options for sft_writer_write_file. */
typedef struct sft_save_options {
    size_t struct_size; /**< sizeof(sft_save_options) */
    uint64_t
        alignment;     /**< the data begins at a multiple of so many bytes: a power of two from 8 to 1 MiB; 0 means 8 */
    uint32_t durable;  /**< 1: return only once the file is on the disk (fsync); 0: leave that to the kernel */
    uint32_t reserved; /**< 0 */
} sft_save_options;

/** The defaults of sft_save_options. */
#define SFT_SAVE_OPTIONS_INIT {sizeof(sft_save_options), 8, 0, 0}

/** Sets `*writer` to a writer without tensors and metadata, to free with sft_writer_free. */
sft_status sft_writer_new(sft_writer** writer);

/** Frees the writer, which borrows no data afterwards. NULL is ignored. */
void sft_writer_free(sft_writer* writer);

/** Adds a tensor. Name and shape are copied. The `nbytes` bytes at `data`, row-major, are borrowed: they must stay
 * valid until the last write, or until the writer is freed, and unchanged during a write. A file contains its tensors
 * sorted by dtype, then by name; the order of calls matters only to sft_writer_write_sharded.
 * Errors: UNSUPPORTED_DTYPE, SHAPE_OVERFLOW, SIZE_MISMATCH, BUFFER_SIZE (nbytes does not fit dtype and shape). A name
 * that is reserved or occurs twice is an error of sft_writer_get_size and of the writes. */
sft_status sft_writer_add_tensor(sft_writer* writer, const char* name, size_t name_length, sft_dtype dtype,
                                 const uint64_t* shape, size_t rank, const void* data, size_t nbytes);

/** Writes metadata even if it stays empty. Without this, and without entries, the file has none. */
sft_status sft_writer_enable_metadata(sft_writer* writer);

/** Adds a metadata entry; both texts are copied.
 * Errors: DUPLICATE for a key that was added already. */
sft_status sft_writer_add_metadata(sft_writer* writer, const char* key, size_t key_length, const char* value,
                                   size_t value_length);

/** Sets `*nbytes` to the size of the whole file, in bytes. `options` may be NULL for the defaults.
 * Errors: DUPLICATE, RESERVED_NAME, SHAPE_OVERFLOW (a file of 2^63 bytes and more), HEADER_TOO_LARGE, INVALID_ARGUMENT
 * for the options. */
sft_status sft_writer_get_size(const sft_writer* writer, const sft_save_options* options, uint64_t* nbytes);

/** Writes the file at `path` atomically: a new file is written beside the target, then renamed over it (docs/saving.md
 * lists the exceptions). Tensors may be mapped from the file that is replaced. The permissions of an existing file are
 * kept. A symbolic link is replaced, and its target does not change. Pipes and character devices, also through links,
 * and descriptors of this process (/dev/stdout, /dev/fd/N) are written to directly. `options` may be NULL for the
 * defaults.
 * Errors: those of sft_writer_get_size, IO, and INVALID_ARGUMENT for a tensor without data. */
sft_status sft_writer_write_file(const sft_writer* writer, const char* path, const sft_save_options* options);

/** Options for sft_writer_write_sharded. */
typedef struct sft_sharded_options {
    size_t struct_size;      /**< sizeof(sft_sharded_options) */
    const char* stem;        /**< the beginning of the file names, UTF-8 that ends in NUL; NULL means "model" */
    uint64_t max_shard_size; /**< the most bytes of tensors in one file; 0 means 5,000,000,000 */
    uint64_t alignment;      /**< as in sft_save_options */
    uint32_t durable;        /**< as in sft_save_options */
    uint32_t reserved;       /**< 0 */
} sft_sharded_options;

/** The defaults of sft_sharded_options. */
#define SFT_SHARDED_OPTIONS_INIT {sizeof(sft_sharded_options), NULL, 0, 8, 0, 0}

/** Writes a checkpoint into `directory`, which is created if it is missing. The checkpoint is one file,
 * STEM.safetensors, if the tensors fit max_shard_size. Otherwise it consists of STEM-00001-of-00002.safetensors and so
 * on, and the index STEM.safetensors.index.json. Tensors are divided as Hugging Face's tools do, in the order in which
 * they were added; a tensor larger than max_shard_size has a file of its own. Each file contains all of the metadata.
 *
 * An existing checkpoint of the same stem is replaced, including symbolic links. It does not change before all new
 * files are complete; files that the new checkpoint does not overwrite are removed at the end. After an IO error in
 * that phase, the files already in place are removed again, or the message says how many are in place. All files stay
 * open until the end. Concurrent saves into one directory are serialized by a lock, and the last one remains complete
 * (docs/saving.md lists the exceptions). `options` may be NULL for the defaults.
 *
 * Errors: those of sft_writer_write_file; IO with EWOULDBLOCK if another save has the directory locked for a minute;
 * INVALID_ARGUMENT for a stem that is not a file name or is the name of a shard. */
sft_status sft_writer_write_sharded(const sft_writer* writer, const char* directory,
                                    const sft_sharded_options* options);

/** Joins the files shard-*.safetensors in the directory `input`, which the processes of torch.distributed.checkpoint
 * have written, and writes the whole tensors into `output` as sft_writer_write_sharded does, in the order of their
 * names, with the metadata format = pt. `options` may be NULL for the defaults. Files that this library has written
 * contain the shapes of the whole tensors; torch's do not: there, a tensor ends where its furthest chunk does, and a
 * missing file goes unnoticed if the other chunks of each tensor still form a box. The files are mapped, and must not
 * be truncated during the call.
 * Errors: INVALID_ARGUMENT if `input` has no such file; HEADER_JSON if a file lacks the positions of its chunks;
 * OFFSETS if the chunks of a tensor overlap, leave a gap, or differ in their dtype; those of sft_file_open and
 * sft_writer_write_sharded. `output` is then as it was. */
sft_status sft_consolidate(const char* input, const char* output, const sft_sharded_options* options);

/** Writes the file into `buffer`, whose `nbytes` must be the result of sft_writer_get_size for the same `options`,
 * and which must not overlap a tensor's data. `options` may be NULL for the defaults; `durable` is ignored. Errors:
 * those of sft_writer_get_size, BUFFER_SIZE, and INVALID_ARGUMENT for a tensor without data. */
sft_status sft_writer_write_buffer(const sft_writer* writer, const sft_save_options* options, void* buffer,
                                   size_t nbytes);

/* ---- Writing: tensor by tensor ----------------------------------------------------------------------------------- */

/** Writes a file tensor by tensor, in any order, so that only one of them has to be in memory. The file appears at its
 * path when it is committed. */
typedef struct sft_incremental_writer sft_incremental_writer;

/** Adds a tensor without data to `writer`, for sft_incremental_writer_create and sft_writer_get_size; the other
 * functions that write refuse such a writer with INVALID_ARGUMENT. Name and shape are copied. Errors:
 * UNSUPPORTED_DTYPE, SHAPE_OVERFLOW, SIZE_MISMATCH. */
sft_status sft_writer_declare_tensor(sft_writer* writer, const char* name, size_t name_length, sft_dtype dtype,
                                     const uint64_t* shape, size_t rank);

/** Starts writing the file at `path`, with the tensors and the metadata of `writer`, which may be freed afterwards.
 * Tensors that were added with data are written by this call; the declared ones by
 * sft_incremental_writer_write_tensor. The committed file has the same bytes as the one that sft_writer_write_file
 * writes. The target does not change before the commit. A relative `path` is resolved by this call. `options` may be
 * NULL for the defaults. `*incremental` becomes a handle to free with sft_incremental_writer_free, or NULL on an error.
 * Errors: those of sft_writer_get_size; IO, also if the disk has no space for the whole file, or if `path` is a pipe, a
 * device or a descriptor (/dev/fd/N). */
sft_status sft_incremental_writer_create(const sft_writer* writer, const char* path, const sft_save_options* options,
                                         sft_incremental_writer** incremental);

/** Writes the tensor called `name`: all of its `nbytes` bytes, row-major, from `data`. Several threads may write
 * different tensors at once. After IO the tensor may be written again.
 * Errors: TENSOR_NOT_FOUND for a name that was not declared, DUPLICATE for a tensor that was written already,
 * BUFFER_SIZE, CLOSED after the commit, IO. */
sft_status sft_incremental_writer_write_tensor(const sft_incremental_writer* writer, const char* name,
                                               size_t name_length, const void* data, size_t nbytes);

/** Writes `nbytes` bytes of the tensor called `name`, from its byte `offset` on. Parts come in any order, and from
 * several threads; none may overlap another.
 * Errors: as sft_incremental_writer_write_tensor. */
sft_status sft_incremental_writer_write_part(const sft_incremental_writer* writer, const char* name, size_t name_length,
                                             uint64_t offset, const void* data, size_t nbytes);

/** Replaces the target by the file, as sft_writer_write_file does; every byte must be written.
 * Errors: DATA_LENGTH, whose message lists the missing tensors, which may still be written; CLOSED after an earlier
 * commit; IO, after which the target has not changed. */
sft_status sft_incremental_writer_commit(sft_incremental_writer* writer);

/** Makes the file of `writer` joinable: other processes can write parts of its tensors, as an sft_joined_file. Call it
 * before the first write. `*path` becomes the path of the hidden file beside the target, for them, in the bytes of the
 * filesystem and without a NUL at its end; it is valid until `writer` is freed. A second call returns the same path.
 * Errors: IO; INVALID_ARGUMENT if another thread is writing a tensor; CLOSED after the commit. */
sft_status sft_incremental_writer_make_joinable(sft_incremental_writer* writer, sft_str* path);

/** Commits as sft_incremental_writer_commit does, without checking that every byte was written: this process does not
 * know what the others have written. Call it once all of them have finished; bytes that nobody wrote are zero.
 * Errors: as sft_incremental_writer_commit, except for missing tensors. */
sft_status sft_incremental_writer_commit_joined(sft_incremental_writer* writer);

/** Frees the handle. Without a commit the target stays as it was, and no file is left beside it. NULL is ignored. */
void sft_incremental_writer_free(sft_incremental_writer* writer);

/** A file that another process writes and commits, open to write parts of its tensors. */
typedef struct sft_joined_file sft_joined_file;

/** Opens the file at `path`, which sft_incremental_writer_make_joinable has returned in another process. `*file`
 * becomes a handle to free with sft_joined_file_free, or NULL on an error. Errors: INVALID_ARGUMENT if `path` does not
 * have the name of such a file; those of sft_file_open. */
sft_status sft_joined_file_open(const char* path, sft_joined_file** file);

/** Writes a slice of the tensor called `name`: one range for each of its `rank` dimensions. `data` has the `nbytes`
 * bytes of its elements, row-major. Several threads may write at once. Slices that overlap one another have unspecified
 * bytes. Errors: TENSOR_NOT_FOUND, SLICE, BUFFER_SIZE, IO; CLOSED after sft_joined_file_finish. */
sft_status sft_joined_file_write_slice(const sft_joined_file* file, const char* name, size_t name_length,
                                       const sft_range* ranges, size_t rank, const void* data, size_t nbytes);

/** Ends the writes of this process: returns the errors that the filesystem has kept until now, and on a network
 * filesystem sends the bytes to the server. If `durable` is 1, returns once they are on the disk.
 * Errors: IO; CLOSED after an earlier call. */
sft_status sft_joined_file_finish(sft_joined_file* file, uint32_t durable);

/** Frees the handle. NULL is ignored. */
void sft_joined_file_free(sft_joined_file* file);

/* ---- Changing metadata ------------------------------------------------------------------------------------------- */

/** A metadata entry to set or remove. */
typedef struct sft_metadata_change {
    sft_str key;   /**< the key, at most one change of each */
    sft_str value; /**< its new value; NULL with length 0 removes the entry if it exists */
} sft_metadata_change;

/** Options for sft_edit_metadata. */
typedef struct sft_edit_options {
    size_t struct_size; /**< sizeof(sft_edit_options) */
    uint64_t reserve;   /**< free bytes to leave in the header for later edits, at least */
    uint32_t in_place;  /**< 0: rewrite the file; 1: overwrite its header, which a power cut can tear */
    uint32_t durable;   /**< 1: return only once the change is on the disk (fsync); 0: leave that to the kernel */
} sft_edit_options;

/** The defaults of sft_edit_options. */
#define SFT_EDIT_OPTIONS_INIT {sizeof(sft_edit_options), 0, 0, 0}

/** Changes the metadata of the file at `path`. The header is validated first; tensors, their data and its alignment
 * stay as they are. The file is replaced as by sft_writer_write_file, and the kernel copies the data, or shares its
 * blocks if the filesystem can. A symbolic link is replaced by the changed file; the file it leads to stays as it is.
 * Nothing is written if nothing changes and the header already has `reserve` free bytes. With `in_place` one write
 * overwrites the header. It is not atomic: a power cut, or a program that opens the file during the write, can meet a
 * torn header. Files that are open or mapped are not affected. INVALID_ARGUMENT if the header does not fit, the file
 * has another name (hard link), or the path is a symbolic link. `options` may be NULL for the defaults. Errors: those
 * of sft_file_open; DUPLICATE for a key that is given twice; INVALID_ARGUMENT; HEADER_TOO_LARGE; FILE_CHANGED if
 * another program changes the file during the edit; IO. */
sft_status sft_edit_metadata(const char* path, const sft_metadata_change* changes, size_t count,
                             const sft_edit_options* options);

#ifdef __cplusplus
}
#endif

#endif /* SAFETENSORS_TORCH_H */
