// From the bytes of an open file to tensors on a device.
#pragma once

#include <ATen/core/Dict.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpp/deadline.h"
#include "cpp/device/upload.h"
#include "cpp/read/open_file.h"

namespace safetensors_torch::layer {

using Tensors = c10::Dict<std::string, at::Tensor>;
using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

// The tensors of a dict, in its order.
NamedTensors named(const Tensors& tensors);

// Each tensor under the name of its place. Fails where there are not as many of both.
NamedTensors named(std::vector<std::string> names, std::vector<at::Tensor> tensors);

// What lends tensors their memory, for files whose bytes are in memory.
struct StorageSharing {
    // Whether tensors may use the file's memory: it is a mapping, or bytes that `data` owns.
    bool lends = false;
    // The owner of bytes in memory; undefined for a mapping.
    at::Tensor data;
    // The mapping once tensors over it exist: they may have been written to.
    core::ReadFrom read_from = core::ReadFrom::File;
};

// Where tensors are to be, and what.
struct Target {
    c10::Device device = c10::kCPU;
    // Of the tensors that the file has in another floating-point dtype.
    std::optional<c10::ScalarType> dtype;
};

// The tensors at some places of a file, each with a storage of its own, without grad.
//
// Where they are on a device, or of another dtype than in the file, their memory is set aside when the loader is made.
class Loader {
  public:
    // Checks everything and sets memory aside; nothing is read yet.
    Loader(SharedFile file, StorageSharing lender, std::vector<size_t> indices, Target target);

    // Goes on reading until all is there, or the time is up; whether all is. On a device with streams, it is there for
    // what the caller's stream does from then on.
    bool advance(Deadline until);

    // What has to be read, and how much of that is.
    uint64_t total_bytes() const;
    uint64_t done_bytes() const;

    // How many tensors there are.
    size_t size() const { return indices_.size(); }

    // The name of number `i` below size().
    std::string name(size_t i) const;

    // Number `i` below size(), once advance() is done. To be called once for each.
    at::Tensor tensor(size_t i) const;

  private:
    bool upload(Deadline until);
    void set_aside(size_t i, c10::ScalarType stored, c10::ScalarType type, c10::IntArrayRef shape);

    SharedFile file_;
    StorageSharing lender_;
    std::vector<size_t> indices_;
    Target target_;
    // Reads into host memory, and for each tensor its place there or kLent; both empty where nothing is read so.
    std::optional<rust::Box<core::PendingRead>> loading_;
    std::vector<size_t> places_;
    // Tensors that were set aside, undefined or empty where there are none; what is to be copied into them, and the
    // copying, from its beginning to its end.
    std::vector<at::Tensor> aside_;
    std::vector<Destination> destinations_;
    std::unique_ptr<Upload> upload_;
    uint64_t upload_bytes_ = 0;
    bool is_uploaded_ = false;
};

// One tensor of a file.
at::Tensor load_tensor(SharedFile file, const StorageSharing& lender, size_t index, c10::Device device);

// Part of a tensor, one range a dimension of torch's shape; only the bytes that it needs are read.
class SliceLoader {
  public:
    SliceLoader(SharedFile file, size_t index, std::vector<core::Range> ranges, c10::Device device);

    bool advance(Deadline until) { return !upload_ || upload_->advance(until); }
    uint64_t total_bytes() const { return upload_ ? upload_->total_bytes() : 0; }
    uint64_t done_bytes() const { return upload_ ? upload_->done_bytes() : 0; }

    // The slice, once advance() is done.
    const at::Tensor& tensor() const { return tensor_; }

  private:
    at::Tensor tensor_;
    std::unique_ptr<Upload> upload_;
};

}  // namespace safetensors_torch::layer
