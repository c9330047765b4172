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

// Names and tensors, in one order: what Python and C++ make their dicts of.
using Lists = std::tuple<std::vector<std::string>, std::vector<at::Tensor>>;

// A dict of them, in their order.
Tensors to_dict(const Lists& lists);

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

// The tensors at `indices` (places in file order), each with a storage of its own, without grad.
std::vector<at::Tensor> load_tensors(const core::File& file, const Lender& lender, const std::vector<size_t>& indices,
                                     c10::Device device);

// All tensors, in file order.
Lists load_all(const core::File& file, const Lender& lender, c10::Device device);

// All tensors of the file at `path`, in file order. What is mapped is brought in before this returns, or not at all, or,
// where `prefault` has no value, in the background.
Lists load_file(const std::string& path, c10::Device device, const std::string& backend, std::optional<bool> prefault);

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
