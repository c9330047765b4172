// Between the format's dtypes and torch's, and the shapes that go with them.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/DimVector.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "rust/cxx.h"

namespace safetensors_torch::layer {

// torch's dtype for a dtype number of the core; fails, naming the tensor, where torch has none (F6).
c10::ScalarType to_torch(uint8_t dtype, rust::Str tensor);

// The core's dtype number; none where the format has no code for it (complex128, quantized).
std::optional<uint8_t> from_torch(c10::ScalarType type);

// torch's shape for a header's: float4_e2m1fn_x2 holds two of the format's F4 in one element, along the last dimension.
c10::DimVector to_torch_shape(uint8_t dtype, rust::Slice<const uint64_t> shape, rust::Str tensor);

// Appends the header's shape for torch's; fails, naming the tensor, for an F4 scalar, which the format cannot hold.
void append_header_shape(std::vector<uint64_t>& out, c10::ScalarType type, c10::IntArrayRef shape,
                         const std::string& tensor);

// Why torch cannot convert from the one dtype to the other; none where it can.
std::optional<std::string> why_not_convertible(c10::ScalarType from, c10::ScalarType to);

// Fails for that reason, naming the tensor.
void check_conversion(c10::ScalarType from, c10::ScalarType to, rust::Str tensor);

}  // namespace safetensors_torch::layer
