// Conversions between the format's dtypes and shapes and torch's.
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

// Returns torch's dtype for a dtype number of the core. Fails, naming the tensor, if torch has none (F6).
c10::ScalarType to_torch(uint8_t dtype, rust::Str tensor);

// Returns the core's dtype number; none if the format has no code for the dtype (complex128, quantized).
std::optional<uint8_t> from_torch(c10::ScalarType type);

// Returns torch's shape for a header's: an element of float4_e2m1fn_x2 has two F4 values of the last dimension.
c10::DimVector to_torch_shape(uint8_t dtype, rust::Slice<const uint64_t> shape, rust::Str tensor);

// Appends the header's shape for torch's. Fails, naming the tensor, for an F4 scalar, which the format cannot hold.
void append_header_shape(std::vector<uint64_t>& out, c10::ScalarType type, c10::IntArrayRef shape,
                         const std::string& tensor);

// Returns why torch cannot convert from one dtype to the other; none if it can.
std::optional<std::string> why_not_convertible(c10::ScalarType from, c10::ScalarType to);

// Fails with that reason, naming the tensor, if torch cannot.
void check_conversion(c10::ScalarType from, c10::ScalarType to, rust::Str tensor);

}  // namespace safetensors_torch::layer
