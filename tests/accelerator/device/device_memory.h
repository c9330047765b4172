// Memory of the devices. Its addresses cannot be read or written by the host, as a GPU's cannot: each device has one
// region that is mapped twice, without access where tensors point to, and with access where streams work.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/Stream.h>

#include <cstdint>

namespace testaccel {

// Caches as CUDA's allocator does: a freed block is at once reused by the stream that it was allocated on, and by no
// other, whatever work still goes on with it.
c10::Allocator* device_allocator();

// Where a stream's work finds what a tensor of a device points to.
void* reachable(const void* data);
// -1 for memory of no device.
c10::DeviceIndex device_of(const void* data);

// The block is held back, when it is freed, until the stream has done what is queued on it then.
void use_on_stream(const c10::DataPtr& data, const c10::Stream& stream);

// Blocks that are not in use can go to any stream again, once the device has done what is queued.
void empty_device_cache(c10::DeviceIndex index);

// In bytes, of blocks in use and cached ones together; negative for none.
void set_memory_limit(c10::DeviceIndex index, int64_t limit);

struct MemoryStatistics {
    int64_t allocated = 0;
    int64_t peak = 0;
    // With what is cached.
    int64_t reserved = 0;
    int64_t allocations = 0;
};

MemoryStatistics memory_statistics(c10::DeviceIndex index);
void reset_memory_statistics(c10::DeviceIndex index);

}  // namespace testaccel
