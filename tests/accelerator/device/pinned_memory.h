// Pinned memory of the host. Unlike CUDA's it is no safer than it has to be: freed memory is overwritten at once and
// reused, whatever copies are still to read or write it.
#pragma once

#include <c10/core/Allocator.h>

#include <cstdint>

namespace testaccel {

// Sizes are powers of two, as CUDA's are.
c10::Allocator* pinned_allocator();

// Whether all of it lies in one pinned block, in use or not.
bool is_pinned(const void* data, size_t nbytes);

// Frees memory that is not in use. No queued work may use it.
void empty_pinned_cache();

struct PinnedStatistics {
    int64_t in_use = 0;
    int64_t peak = 0;
    // Including cached memory.
    int64_t total = 0;
    int64_t allocations = 0;
};

PinnedStatistics pinned_statistics();
void reset_pinned_statistics();

}  // namespace testaccel
