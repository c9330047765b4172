// From the bytes of an open file to tensors on a device.
#pragma once

#include <ATen/core/Dict.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/util/DimVector.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "safetensors-torch/src/bridge.rs.h"

namespace safetensors_torch {

using Tensors = c10::Dict<std::string, at::Tensor>;
using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

// The tensors of a dict, in its order.
NamedTensors named(const Tensors& tensors);

// A file of the core that many can hold: the open file, and the slices taken from it.
using SharedFile = std::shared_ptr<const rust::Box<core::File>>;

SharedFile open_file(const std::string& path, const std::string& backend);

// A file over the bytes of `data` (uint8, 1-D, contiguous, on the CPU), which must live as long as the result.
SharedFile open_bytes(const at::Tensor& data);

// What lends tensors their memory, for files whose bytes are in memory.
struct Lender {
    // Whether tensors may use the file's memory: it is a mapping, or bytes that `data` owns.
    bool lends = false;
    // The owner of bytes in memory; undefined for a mapping.
    at::Tensor data;
};

// The tensors at some places of a file, made one by one, each with a storage of its own, without grad.
//
// What has to be read into host memory is read when the loader is made, all of it in parallel. Tensors for another
// device come to the host one at a time, as they are made, so that the host never holds more than one of them.
class Loader {
  public:
    Loader(SharedFile file, Lender lender, std::vector<size_t> indices, c10::Device device);

    // How many tensors there are.
    size_t size() const { return indices_.size(); }

    // The name of number `i` below size().
    std::string name(size_t i) const;

    // Number `i` below size(). To be called once for each.
    at::Tensor tensor(size_t i) const;

  private:
    SharedFile file_;
    Lender lender_;
    std::vector<size_t> indices_;
    c10::Device device_;
    // What was read, and for each tensor its place there or kLent; both empty where nothing had to be read.
    std::optional<rust::Box<core::Loaded>> loaded_;
    std::vector<size_t> places_;
};

// All tensors of `file`, in file order.
Loader load_all(SharedFile file, Lender lender, c10::Device device);

// All tensors of the file at `path`, in file order. What is mapped is brought in before this returns, or not at all,
// or, where `prefault` has no value, in the background.
Loader load_file(const std::string& path, c10::Device device, const std::string& backend, std::optional<bool> prefault);

// All that `loader` makes.
std::vector<at::Tensor> tensors_of(const Loader& loader);

// The same as a dict.
Tensors dict_of(const Loader& loader);

// The same as a list of names and one of tensors, which become a Python dict in half the time that a Dict takes.
using Lists = std::tuple<std::vector<std::string>, std::vector<at::Tensor>>;
Lists lists_of(const Loader& loader);

// One tensor of a file.
at::Tensor load_tensor(SharedFile file, const Lender& lender, size_t index, c10::Device device);

// Part of the tensor at `index`: one range a dimension of torch's shape; reads only the bytes that it needs.
at::Tensor load_slice(const core::File& file, size_t index, std::vector<core::Range> ranges, c10::Device device);

// Reads whole tensors into contiguous CPU tensors of the same number of bytes, in parallel: (index, destination).
void read_into(const core::File& file, const std::vector<std::pair<size_t, at::Tensor>>& destinations);

// torch's dtype and shape of the tensor at `index`.
std::pair<c10::ScalarType, c10::DimVector> describe(const core::File& file, size_t index);

// A name for the core, as bytes: whether it is UTF-8 is for the core to say.
inline rust::Slice<const uint8_t> as_bytes(const std::string& text) {
    return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

}  // namespace safetensors_torch
