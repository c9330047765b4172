// From the bytes of an open file to tensors on a device.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpp/deadline.h"
#include "cpp/device/upload.h"
#include "cpp/read/open_file.h"

namespace safetensors_torch::layer {

// Whether the storages of CPU tensors point into the memory of their file.
struct StorageSharing {
    // Whether they may: the file is a mapping, or bytes that `owner` owns.
    bool is_enabled = false;
    // The owner of bytes in memory; undefined for a mapping.
    at::Tensor owner;
    // The mapping once tensors over it exist: they may have been written to.
    core::ReadFrom read_from = core::ReadFrom::File;
};

// The device and the dtype of loaded tensors.
struct Target {
    c10::Device device = c10::kCPU;
    // Floating-point tensors are converted to this dtype.
    std::optional<c10::ScalarType> dtype;
};

// A load of some tensors of a file, each with a storage of its own, without grad.
//
// Tensors on a device, and those that are converted, are allocated by the constructor.
class Loader {
  public:
    // Checks everything and allocates; reads nothing.
    Loader(SharedFile file, StorageSharing sharing, std::vector<size_t> indices, Target target);

    // Reads until everything is loaded or the deadline has passed; returns whether everything is loaded. On a device
    // with streams, later work of the caller's stream sees the tensors.
    bool advance(Deadline until);

    // Reads together with `first`, whose advance() then reads for both; does nothing if one of them reads nothing into
    // host memory.
    void join(Loader& first);
    bool reads() const { return loading_ != nullptr; }

    // The bytes to read, and those that are read.
    uint64_t total_bytes() const;
    uint64_t done_bytes() const;

    // The number of tensors.
    size_t size() const { return indices_.size(); }

    // Returns the name of tensor `i`.
    std::string name(size_t i) const;

    // Returns tensor `i`, once advance() has returned true. Call it once for each.
    at::Tensor tensor(size_t i) const;

  private:
    bool upload(Deadline until);
    void allocate_destination(size_t i, c10::ScalarType stored, c10::ScalarType type, c10::IntArrayRef shape);

    SharedFile file_;
    StorageSharing sharing_;
    std::vector<size_t> indices_;
    Target target_;
    // Reads into host memory, and for each tensor its place there or kShared; both empty if nothing is read that way.
    std::shared_ptr<rust::Box<core::PendingRead>> loading_;
    size_t part_ = 0;
    std::vector<size_t> places_;
    // The tensors that the constructor has allocated: undefined for others, empty if there are none.
    std::vector<at::Tensor> allocated_;
    // The copies into them, moved into the upload when it starts.
    std::vector<Destination> destinations_;
    std::unique_ptr<Upload> upload_;
    uint64_t upload_bytes_ = 0;
    bool is_uploaded_ = false;
};

// Returns the device, with the index of the current one if it has none.
c10::Device with_index(c10::Device device);

// Returns the dtype of a loaded tensor: only floating-point ones are converted.
c10::ScalarType converted(c10::ScalarType stored, std::optional<c10::ScalarType> wanted);

// Fails if tensors cannot be converted to `dtype` because it is not a floating-point one.
void check_wanted(std::optional<c10::ScalarType> dtype);

// Returns a tensor without data. All options are explicit, so torch's default device is ignored.
at::Tensor empty_on(c10::Device device, c10::ScalarType type, c10::IntArrayRef shape);

// The same; the error about too little memory names `what`.
at::Tensor allocate(c10::Device device, c10::ScalarType type, c10::IntArrayRef shape, const std::string& what);

// Returns a CPU tensor over `data`, in a block of the core, which it releases.
at::Tensor over_block(uint8_t* data, const core::Block* block, size_t nbytes, c10::ScalarType type,
                      c10::IntArrayRef shape);

// The ranges to read for a part of a tensor, and its dtype and shape in torch.
struct SlicePlan {
    std::vector<core::Range> ranges;
    c10::ScalarType type;
    c10::DimVector shape;
};

// Plans a part of a tensor: one range for each dimension of torch's shape. The core has one for each of the header's.
SlicePlan plan_slice(const core::File& file, size_t index, std::vector<core::Range> ranges);

// Loads one tensor of a file.
at::Tensor load_tensor(SharedFile file, const StorageSharing& sharing, size_t index, c10::Device device);

// A load of part of a tensor: one range for each dimension of torch's shape. Reads only the bytes of the slice.
class SliceLoader {
  public:
    SliceLoader(SharedFile file, size_t index, std::vector<core::Range> ranges, c10::Device device);

    bool advance(Deadline until) { return !upload_ || upload_->advance(until); }
    uint64_t total_bytes() const { return upload_ ? upload_->total_bytes() : 0; }
    uint64_t done_bytes() const { return upload_ ? upload_->done_bytes() : 0; }

    // Returns the slice, once advance() has returned true.
    const at::Tensor& tensor() const { return tensor_; }

  private:
    at::Tensor tensor_;
    std::unique_ptr<Upload> upload_;
};

}  // namespace safetensors_torch::layer
