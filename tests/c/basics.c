/* Functions without a file: version, status, element types. */
#include <errno.h>
#include <pthread.h>
#include <string.h>

#include "check.h"

static void* other_thread(void* unused) {
    (void)unused;
    CHECK(strcmp(sft_last_error_get_message(), "") == 0);
    CHECK(sft_last_error_get_os_error() == 0);
    sft_dtype dtype;
    CHECK_STATUS(sft_dtype_parse("other", &dtype), SFT_ERROR_UNKNOWN_DTYPE);
    CHECK(strstr(sft_last_error_get_message(), "other") != NULL);
    return NULL;
}

void test_version_and_status(void) {
    CHECK(strcmp(sft_get_version(), SFT_VERSION_STRING) == 0);
    CHECK(strcmp(sft_last_error_get_message(), "") == 0);
    CHECK(sft_last_error_get_os_error() == 0);

    CHECK(strcmp(sft_status_get_name(SFT_OK), "SFT_OK") == 0);
    CHECK(strcmp(sft_status_get_name(SFT_ERROR_IO), "SFT_ERROR_IO") == 0);
    CHECK(strcmp(sft_status_get_name(SFT_ERROR_PANIC), "SFT_ERROR_PANIC") == 0);
    CHECK(strcmp(sft_status_get_name(-1), "unknown status") == 0);
    CHECK(strcmp(sft_status_get_name(1000), sft_status_get_name(-1)) == 0);
    CHECK(strcmp(sft_status_get_message(SFT_OK), "no error") == 0);
    CHECK(strstr(sft_status_get_message(1000), "does not know") != NULL);
    for (sft_status a = SFT_OK; a <= SFT_ERROR_INDEX; a++) {
        CHECK(strlen(sft_status_get_message(a)) > 0);
        for (sft_status b = SFT_OK; b < a; b++) {
            CHECK(strcmp(sft_status_get_name(a), sft_status_get_name(b)) != 0);
            CHECK(strcmp(sft_status_get_message(a), sft_status_get_message(b)) != 0);
        }
    }

    /* errno describes the last failure; success changes neither it nor the message. */
    sft_file* file;
    CHECK_STATUS(sft_file_open(path_of("absent"), NULL, &file), SFT_ERROR_IO);
    CHECK(file == NULL);
    CHECK(sft_last_error_get_os_error() == ENOENT);
    CHECK(strstr(sft_last_error_get_message(), "absent") != NULL);
    sft_dtype dtype;
    CHECK_OK(sft_dtype_parse("F32", &dtype));
    CHECK(sft_last_error_get_os_error() == ENOENT);

    /* The last error is per thread. */
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, other_thread, NULL) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(strstr(sft_last_error_get_message(), "absent") != NULL);
    CHECK_STATUS(sft_dtype_parse("mine", &dtype), SFT_ERROR_UNKNOWN_DTYPE);
    CHECK(sft_last_error_get_os_error() == 0);
}

void test_dtypes(void) {
    static const struct {
        sft_dtype dtype;
        const char* code;
        uint32_t bits;
    } all[] = {
        {SFT_DTYPE_BOOL, "BOOL", 8},
        {SFT_DTYPE_F4, "F4", 4},
        {SFT_DTYPE_F6_E2M3, "F6_E2M3", 6},
        {SFT_DTYPE_F6_E3M2, "F6_E3M2", 6},
        {SFT_DTYPE_U8, "U8", 8},
        {SFT_DTYPE_I8, "I8", 8},
        {SFT_DTYPE_F8_E5M2, "F8_E5M2", 8},
        {SFT_DTYPE_F8_E4M3, "F8_E4M3", 8},
        {SFT_DTYPE_F8_E8M0, "F8_E8M0", 8},
        {SFT_DTYPE_F8_E4M3FNUZ, "F8_E4M3FNUZ", 8},
        {SFT_DTYPE_F8_E5M2FNUZ, "F8_E5M2FNUZ", 8},
        {SFT_DTYPE_I16, "I16", 16},
        {SFT_DTYPE_U16, "U16", 16},
        {SFT_DTYPE_F16, "F16", 16},
        {SFT_DTYPE_BF16, "BF16", 16},
        {SFT_DTYPE_I32, "I32", 32},
        {SFT_DTYPE_U32, "U32", 32},
        {SFT_DTYPE_F32, "F32", 32},
        {SFT_DTYPE_C64, "C64", 64},
        {SFT_DTYPE_F64, "F64", 64},
        {SFT_DTYPE_I64, "I64", 64},
        {SFT_DTYPE_U64, "U64", 64},
    };
    const size_t count = sizeof all / sizeof all[0];
    for (size_t i = 0; i < count; i++) {
        sft_dtype found = 1000;
        CHECK(strcmp(sft_dtype_get_code(all[i].dtype), all[i].code) == 0);
        CHECK(sft_dtype_get_bits(all[i].dtype) == all[i].bits);
        CHECK_OK(sft_dtype_parse(all[i].code, &found));
        CHECK(found == all[i].dtype);
    }
    CHECK(sft_dtype_get_code((sft_dtype)count) == NULL);
    CHECK(sft_dtype_get_bits((sft_dtype)count) == 0);
    sft_dtype dtype = 1000;
    CHECK_STATUS(sft_dtype_parse("f32", &dtype), SFT_ERROR_UNKNOWN_DTYPE);
    CHECK_STATUS(sft_dtype_parse("\xff", &dtype), SFT_ERROR_UNKNOWN_DTYPE);
    CHECK_STATUS(sft_dtype_parse("", &dtype), SFT_ERROR_UNKNOWN_DTYPE);
    CHECK(dtype == 1000);

    uint64_t nbytes = 0;
    const uint64_t shape[] = {2, 3};
    CHECK_OK(sft_dtype_compute_nbytes(SFT_DTYPE_F32, shape, 2, &nbytes));
    CHECK(nbytes == 24);
    CHECK_OK(sft_dtype_compute_nbytes(SFT_DTYPE_F4, shape, 2, &nbytes));
    CHECK(nbytes == 3);
    CHECK_OK(sft_dtype_compute_nbytes(SFT_DTYPE_C64, NULL, 0, &nbytes));
    CHECK(nbytes == 8);
    const uint64_t odd = 3, huge = UINT64_MAX;
    CHECK_STATUS(sft_dtype_compute_nbytes(SFT_DTYPE_F4, &odd, 1, &nbytes), SFT_ERROR_SIZE_MISMATCH);
    CHECK_STATUS(sft_dtype_compute_nbytes(SFT_DTYPE_U8, &huge, 1, &nbytes), SFT_ERROR_SHAPE_OVERFLOW);
    CHECK_STATUS(sft_dtype_compute_nbytes(22, shape, 2, &nbytes), SFT_ERROR_UNSUPPORTED_DTYPE);
    CHECK(nbytes == 8);
}
