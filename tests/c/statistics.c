/* sft_file_compute_statistics: values, histograms, pieces, and what it refuses. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"

static sft_file* open_floats(const float* values, size_t count, unsigned char** bytes) {
    char json[200];
    snprintf(json, sizeof json, "{\"a\":{\"dtype\":\"F32\",\"shape\":[%zu],\"data_offsets\":[0,%zu]}}", count,
             4 * count);
    size_t length = 0;
    *bytes = make_file(json, 4 * count, &length);
    memcpy(*bytes + 8 + strlen(json), values, 4 * count);
    sft_file* file = NULL;
    CHECK_OK(sft_file_open_buffer(*bytes, length, &file));
    return file;
}

static bool is_near(double actual, double expected) { return fabs(actual - expected) < 1e-12; }

static void check_values(void) {
    const float values[] = {1, -2, 0, 4, NAN, INFINITY, -INFINITY};
    unsigned char* bytes = NULL;
    sft_file* file = open_floats(values, 7, &bytes);
    sft_statistics whole = SFT_STATISTICS_INIT, pieces = SFT_STATISTICS_INIT;
    sft_histogram bins = SFT_HISTOGRAM_INIT, sums = SFT_HISTOGRAM_INIT;
    const sft_statistics_request all = {0, 0, 7, &whole, &bins};
    CHECK_OK(sft_file_compute_statistics(file, &all, 1));
    CHECK(whole.count == 7 && whole.zeros == 1 && whole.nans == 1 && whole.infinities == 2);
    CHECK(whole.minimum == -2 && whole.maximum == 4 && is_near(whole.mean, 0.75));
    CHECK(is_near(whole.squared_deviations, 3 * 2.5 * 2.5));

    /* -2, 0, 1 and 4, in bins from the one of -2 to the one of 4. */
    uint64_t total = 0;
    for (uint64_t i = 0; i < bins.bin_count; i++) {
        const double begin = (double)(bins.first + (int64_t)i) * bins.width;
        uint64_t expected = 0;
        for (size_t j = 0; j < 4; j++) {
            expected += values[j] >= begin && values[j] < begin + bins.width;
        }
        CHECK(bins.counts[i] == expected);
        total += bins.counts[i];
    }
    CHECK(total == 4 && bins.bin_count > SFT_HISTOGRAM_BINS / 2 && bins.bin_count <= SFT_HISTOGRAM_BINS);

    /* The same in pieces: no values, then none that is finite, then the others. */
    const sft_statistics_request none = {0, 4, 0, &pieces, &sums}, infinite = {0, 4, 3, &pieces, &sums};
    CHECK_OK(sft_file_compute_statistics(file, &none, 1));
    CHECK_OK(sft_file_compute_statistics(file, &infinite, 1));
    CHECK(pieces.count == 3 && pieces.minimum == 0 && pieces.mean == 0 && sums.bin_count == 0);
    const sft_statistics_request rest = {0, 0, 4, &pieces, &sums};
    CHECK_OK(sft_file_compute_statistics(file, &rest, 1));
    CHECK(pieces.count == 7 && pieces.zeros == 1 && pieces.minimum == -2 && pieces.maximum == 4);
    CHECK(is_near(pieces.mean, whole.mean) && is_near(pieces.squared_deviations, whole.squared_deviations));
    CHECK(memcmp(&sums, &bins, sizeof sums) == 0);

    /* Several requests with one call, one without a histogram. */
    sft_statistics both[2] = {SFT_STATISTICS_INIT, SFT_STATISTICS_INIT};
    const sft_statistics_request requests[] = {{0, 0, 2, &both[0], NULL}, {0, 2, 2, &both[1], NULL}};
    CHECK_OK(sft_file_compute_statistics(file, requests, 2));
    CHECK(both[0].minimum == -2 && both[0].maximum == 1 && both[1].minimum == 0 && both[1].maximum == 4);
    CHECK_OK(sft_file_compute_statistics(file, NULL, 0));
    sft_file_free(file);
    free(bytes);
}

static void check_refusals(void) {
    const float values[] = {1, 2, 3};
    unsigned char* bytes = NULL;
    sft_file* file = open_floats(values, 3, &bytes);
    sft_statistics found = SFT_STATISTICS_INIT;
    sft_histogram bins = SFT_HISTOGRAM_INIT;
    sft_statistics_request request = {0, 0, 3, &found, &bins};
    const sft_status invalid = SFT_ERROR_INVALID_ARGUMENT;
    CHECK_STATUS(sft_file_compute_statistics(NULL, &request, 1), invalid);
    CHECK_STATUS(sft_file_compute_statistics(file, NULL, 1), invalid);
    request.index = 1;
    CHECK_STATUS(sft_file_compute_statistics(file, &request, 1), invalid);
    request.index = 0;
    request.count = 4;
    CHECK_STATUS(sft_file_compute_statistics(file, &request, 1), SFT_ERROR_SLICE);
    request.count = 3;
    request.statistics = NULL;
    CHECK_STATUS(sft_file_compute_statistics(file, &request, 1), invalid);
    request.statistics = &found;
    found.struct_size = 0;
    CHECK_STATUS(sft_file_compute_statistics(file, &request, 1), invalid);
    found.struct_size = sizeof found;
    found.nans = 1;
    CHECK_STATUS(sft_file_compute_statistics(file, &request, 1), invalid);
    found.nans = 0;
    bins.struct_size = 0;
    CHECK_STATUS(sft_file_compute_statistics(file, &request, 1), invalid);
    bins.struct_size = sizeof bins;
    bins.bin_count = SFT_HISTOGRAM_BINS + 1;
    CHECK_STATUS(sft_file_compute_statistics(file, &request, 1), invalid);
    bins.bin_count = 1;
    bins.width = 3;
    CHECK_STATUS(sft_file_compute_statistics(file, &request, 1), invalid);
    CHECK(found.count == 0 && bins.counts[0] == 0);
    sft_file_close(file);
    CHECK_STATUS(sft_file_compute_statistics(file, &request, 1), SFT_ERROR_CLOSED);
    sft_file_free(file);
    free(bytes);

    size_t length = 0;
    bytes = make_file(
        "{\"a\":{\"dtype\":\"F6_E2M3\",\"shape\":[4],\"data_offsets\":[0,3]},"
        "\"b\":{\"dtype\":\"F4\",\"shape\":[4],\"data_offsets\":[3,5]}}",
        5, &length);
    CHECK_OK(sft_file_open_buffer(bytes, length, &file));
    sft_statistics other = SFT_STATISTICS_INIT;
    const sft_statistics_request undefined = {0, 0, 4, &other, NULL}, odd = {1, 1, 2, &other, NULL};
    const sft_statistics_request whole = {1, 2, 2, &other, NULL};
    CHECK_STATUS(sft_file_compute_statistics(file, &undefined, 1), SFT_ERROR_UNSUPPORTED_DTYPE);
    CHECK_STATUS(sft_file_compute_statistics(file, &odd, 1), SFT_ERROR_SLICE);
    CHECK(other.count == 0);
    CHECK_OK(sft_file_compute_statistics(file, &whole, 1));
    CHECK(other.count == 2 && other.zeros == 2);
    sft_file_free(file);
    free(bytes);
}

void test_statistics(void) {
    check_values();
    check_refusals();
}
