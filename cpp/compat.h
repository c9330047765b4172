// The differences between the supported versions of torch, 2.6 and later. No other file tests the version.
#pragma once

#include <c10/core/ScalarType.h>
#include <torch/version.h>

#include <string>

#define SAFETENSORS_TORCH_AT_LEAST(major, minor) \
    (TORCH_VERSION_MAJOR > (major) || (TORCH_VERSION_MAJOR == (major) && TORCH_VERSION_MINOR >= (minor)))

#if !SAFETENSORS_TORCH_AT_LEAST(2, 6)
#error "safetensors_torch needs torch 2.6 or later"
#endif

// float8_e8m0fnu came with torch 2.7, float4_e2m1fn_x2 with 2.8.
#define SAFETENSORS_TORCH_HAS_FLOAT8_E8M0 SAFETENSORS_TORCH_AT_LEAST(2, 7)
#define SAFETENSORS_TORCH_HAS_FLOAT4 SAFETENSORS_TORCH_AT_LEAST(2, 8)

namespace safetensors_torch::layer {

// Returns Python's name of a dtype, without "torch.". torch returns a std::string, since 2.15 a string_view.
inline std::string dtype_name(c10::ScalarType type) { return std::string(c10::getDtypeNames(type).first); }

}  // namespace safetensors_torch::layer
