// Open files as the C++ layer passes them around.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/DimVector.h>

#include <memory>
#include <string>
#include <utility>

#include "safetensors-torch/src/bridge.rs.h"

namespace safetensors_torch::layer {

// A file of the core that many can hold: the open file, and what is being read from it.
using SharedFile = std::shared_ptr<const rust::Box<core::File>>;

SharedFile open_file(const std::string& path, const std::string& backend);

// A file over the bytes of `data` (uint8, 1-D, contiguous, on the CPU), which lives as long as the result.
SharedFile open_bytes(const at::Tensor& data);

// torch's dtype and shape of the tensor at `index`.
std::pair<c10::ScalarType, c10::DimVector> describe(const core::File& file, size_t index);

// A name for the core, as bytes: whether it is UTF-8 is for the core to say.
inline rust::Slice<const uint8_t> as_bytes(const std::string& text) {
    return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

}  // namespace safetensors_torch::layer
