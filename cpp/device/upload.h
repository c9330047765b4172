// From a file into existing tensors: to a device, or to another dtype.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
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

// Reads ahead into slabs; one thread takes them, others may prioritize.
using SharedPrefetcher = std::shared_ptr<const rust::Box<core::Prefetcher>>;

// Returns the bytes that are read for `count` elements.
inline uint64_t stored_bytes(int64_t count, c10::ScalarType stored) {
    return static_cast<uint64_t>(count) * c10::elementSize(stored);
}

// A transfer from files to tensors of one device. If a dtype is not the file's, the device converts, slab by slab.
class Upload {
  public:
    // Whole tensors of a file.
    Upload(SharedFile file, std::vector<Destination> destinations, core::ReadFrom read_from);

    // A slice of one.
    Upload(SharedFile file, Destination destination, std::vector<core::Range> ranges);

    virtual ~Upload();
    Upload(const Upload&) = delete;
    Upload& operator=(const Upload&) = delete;

    // Copies until everything is queued on the device or the deadline has passed; returns whether everything is. Later
    // work of the caller's stream sees the tensors; on a device without streams, they are complete.
    bool advance(Deadline until);

    uint64_t total_bytes() const { return total_; }
    uint64_t done_bytes() const { return done_; }

  protected:
    // The requests of `prefetcher`, which was made for used_slab_bytes(total): each has a destination, whose tensor
    // allocate() defines. With `converts`, some dtypes are not those of the files.
    Upload(SharedPrefetcher prefetcher, std::vector<Destination> destinations, c10::Device device, uint64_t total,
           bool converts);

    bool copy_until(Deadline until);
    Destination& destination(size_t request) { return destinations_[request]; }

  private:
    Upload(SharedFile file, std::vector<Destination> destinations, core::ReadFrom read_from,
           const std::vector<core::Range>* slice);

    virtual std::string name(size_t request) const;

    // Called before the first copy to a destination without a tensor, with the stream of the copies as the current one.
    virtual void allocate(size_t /*request*/) {}

    // Called once all copies of these parts are queued on the current stream.
    virtual void copied(const rust::Vec<core::SlabPart>& /*parts*/) {}

    void add_slabs();
    void take_back();
    void copy(const core::NextSlab& next);
    void copy_part(const core::SlabPart& part, size_t slab);
    [[noreturn]] void explain(const std::exception& error, size_t request) const;

    // Null if the requests are of several files.
    SharedFile file_;
    std::vector<Destination> destinations_;
    uint64_t total_;
    uint64_t done_ = 0;
    bool finished_ = false;
    // On the device: the bytes of one part, before they are converted. Allocated on the caller's stream before
    // copy_stream_ is made, whose stream then waits for earlier users of the memory; freed after it.
    at::Tensor unconverted_;
    DeviceCopyStream copy_stream_;
    // Its threads write to the slabs until it is stopped.
    SharedPrefetcher prefetcher_;
    // The number of slabs that it has.
    size_t slabs_ = 0;
    // Slabs whose copies are running, the oldest first.
    std::deque<size_t> copying_;
};

}  // namespace safetensors_torch::layer
