// Memory of the devices. Its addresses cannot be read or written by the host, as a GPU's cannot: each device has one
// region that is mapped twice, without access where tensors point to, and with access where streams work.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/Stream.h>

#include <cstdint>

namespace testaccel {

// Caches like CUDA's allocator: a freed block is reused at once by the stream that it was allocated on, and by no
// other, even if work on it is still queued.
c10::Allocator* device_allocator();

// Returns the address at which a stream's work accesses the memory of a tensor.
void* reachable(const void* data);
// Returns the device of the memory; -1 if it has none.
c10::DeviceIndex device_of(const void* data);

// Delays the reuse of a freed block until the stream has done the work that is queued when it is freed.
void use_on_stream(const c10::DataPtr& data, const c10::Stream& stream);

// Waits for the device, and lets any stream use the free blocks.
void empty_device_cache(c10::DeviceIndex index);

// In bytes, of blocks in use and cached ones together; negative for none.
void set_memory_limit(c10::DeviceIndex index, int64_t limit);

struct MemoryStatistics {
    int64_t allocated = 0;
    int64_t peak = 0;
    // Including cached blocks.
    int64_t reserved = 0;
    int64_t allocations = 0;
};

MemoryStatistics memory_statistics(c10::DeviceIndex index);
void reset_memory_statistics(c10::DeviceIndex index);

}  // namespace testaccel
