// From a file into tensors that are there: to a device, or to another dtype.
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

// A tensor that is to be filled, and what with.
struct Destination {
    // Of the tensor in the file.
    size_t index;
    c10::ScalarType stored;
    // Contiguous, with a storage of its device, and as many elements as are read.
    at::Tensor tensor;
};

// Copies that are under way from a file to tensors of one device, whose dtypes may be others than the file's: then the
// device converts, slab by slab.
class Upload {
  public:
    // Whole tensors of a file.
    Upload(SharedFile file, std::vector<Destination> destinations, core::ReadFrom read_from);

    // A slice of one.
    Upload(SharedFile file, Destination destination, std::vector<core::Range> ranges);

    // Goes on until everything is under way to the device, or the time is up; whether it is. What the caller's stream
    // does after that sees it; for a device without streams, it is there.
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
    // On the device: the bytes of one part, before they are converted. Made on the caller's stream, so before the
    // copy_stream, whose stream then waits for whoever had the memory before, and gone after it.
    at::Tensor unconverted_;
    // Before the prefetch, whose threads write to its slabs.
    DeviceCopyStream copy_stream_;
    // None before the first step.
    std::optional<rust::Box<core::Prefetcher>> prefetcher_;
    // Slabs whose copies are under way, the oldest first.
    std::deque<size_t> copying_;
};

}  // namespace safetensors_torch::layer
