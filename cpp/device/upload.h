// From a file into existing tensors: to a device, or to another dtype.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <deque>
#include <optional>
#include <vector>

#include "cpp/deadline.h"
#include "cpp/device/device_copy_stream.h"
#include "cpp/read/open_file.h"

namespace safetensors_torch::layer {

// A tensor to fill, and the tensor of the file that it is filled from.
struct Destination {
    // Index and dtype of the tensor in the file.
    size_t index;
    c10::ScalarType stored;
    // Contiguous, with a storage on its device, and as many elements as are read.
    at::Tensor tensor;
};

// A transfer from a file to tensors of one device. If a dtype is not the file's, the device converts, slab by slab.
class Upload {
  public:
    // Whole tensors of a file.
    Upload(SharedFile file, std::vector<Destination> destinations, core::ReadFrom read_from);

    // A slice of one.
    Upload(SharedFile file, Destination destination, std::vector<core::Range> ranges);

    // Copies until everything is queued on the device or the deadline has passed; returns whether everything is. Later
    // work of the caller's stream sees the tensors; on a device without streams, they are complete.
    bool advance(Deadline until);

    uint64_t total_bytes() const { return total_; }
    uint64_t done_bytes() const { return done_; }

  private:
    Upload(SharedFile file, std::vector<Destination> destinations, core::ReadFrom read_from,
           std::vector<core::Range> ranges, bool is_slice);

    void start();
    bool copy_until(Deadline until);
    void take_back();
    void copy(const core::NextSlab& next);
    void copy_part(const core::SlabPart& part, size_t slab);
    [[noreturn]] void explain(const std::exception& error, size_t request) const;

    SharedFile file_;
    std::vector<Destination> destinations_;
    core::ReadFrom read_from_;
    // Of a slice of the one destination.
    std::vector<core::Range> ranges_;
    bool is_slice_;
    uint64_t total_;
    uint64_t done_ = 0;
    bool finished_ = false;
    // On the device: the bytes of one part, before they are converted. Allocated on the caller's stream before
    // copy_stream_ is made, whose stream then waits for earlier users of the memory; freed after it.
    at::Tensor unconverted_;
    // Declared before the prefetcher, whose threads write to its slabs.
    DeviceCopyStream copy_stream_;
    // From the first step on.
    std::optional<rust::Box<core::Prefetcher>> prefetcher_;
    // Slabs whose copies are running, the oldest first.
    std::deque<size_t> copying_;
};

}  // namespace safetensors_torch::layer
