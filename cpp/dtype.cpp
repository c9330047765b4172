#include "cpp/dtype.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/copy.h>
#include <ATen/ops/empty.h>

#include <array>
#include <string_view>
#include <utility>

#include "cpp/compat.h"
#include "cpp/error.h"
#include "include/safetensors_torch.h"
#include "safetensors-torch/src/bridge.rs.h"

namespace safetensors_torch::layer {
namespace {

struct Pair {
    const char* code;
    c10::ScalarType type;
};

constexpr Pair kPairs[] = {
    {"BOOL", c10::ScalarType::Bool},
    {"U8", c10::ScalarType::Byte},
    {"I8", c10::ScalarType::Char},
    {"I16", c10::ScalarType::Short},
    {"I32", c10::ScalarType::Int},
    {"I64", c10::ScalarType::Long},
    {"U16", c10::ScalarType::UInt16},
    {"U32", c10::ScalarType::UInt32},
    {"U64", c10::ScalarType::UInt64},
    {"F16", c10::ScalarType::Half},
    {"BF16", c10::ScalarType::BFloat16},
    {"F32", c10::ScalarType::Float},
    {"F64", c10::ScalarType::Double},
    {"C64", c10::ScalarType::ComplexFloat},
    {"F8_E5M2", c10::ScalarType::Float8_e5m2},
    {"F8_E4M3", c10::ScalarType::Float8_e4m3fn},
    {"F8_E5M2FNUZ", c10::ScalarType::Float8_e5m2fnuz},
    {"F8_E4M3FNUZ", c10::ScalarType::Float8_e4m3fnuz},
#if SAFETENSORS_TORCH_HAS_FLOAT8_E8M0
    {"F8_E8M0", c10::ScalarType::Float8_e8m0fnu},
#endif
#if SAFETENSORS_TORCH_HAS_FLOAT4
    {"F4", c10::ScalarType::Float4_e2m1fn_x2},
#endif
};

// Dtype numbers are small: one table for each direction.
constexpr size_t kTableSize = 256;

struct Tables {
    std::array<std::optional<c10::ScalarType>, kTableSize> to_torch;
    std::array<std::optional<uint8_t>, kTableSize> from_torch;

    Tables() {
        for (const Pair& pair : kPairs) {
            const uint8_t number = core::dtype_number(pair.code);
            to_torch[number] = pair.type;
            from_torch[static_cast<uint8_t>(pair.type)] = number;
        }
    }
};

// Initialized when the library is loaded: see cpp/fork.h.
const Tables tables;

bool packs_two(c10::ScalarType type) {
#if SAFETENSORS_TORCH_HAS_FLOAT4
    return type == c10::ScalarType::Float4_e2m1fn_x2;
#else
    (void)type;
    return false;
#endif
}

std::string_view as_view(rust::Str text) { return {text.data(), text.size()}; }

}  // namespace

c10::ScalarType to_torch(uint8_t dtype, rust::Str tensor) {
    const auto type = tables.to_torch[dtype];
    if (!type) {
        fail(ErrorCategory::safetensor,
             "tensor " + repr(as_view(tensor)) + " has dtype " + std::string(core::dtype_code(dtype)) +
                 ", which this version of torch has no dtype for; its bytes can be read through the C API",
             SFT_ERROR_UNSUPPORTED_DTYPE);
    }
    return *type;
}

std::optional<uint8_t> from_torch(c10::ScalarType type) { return tables.from_torch[static_cast<uint8_t>(type)]; }

c10::DimVector to_torch_shape(uint8_t dtype, rust::Slice<const uint64_t> shape, rust::Str tensor) {
    // The core refuses dimensions that do not fit in 63 bits.
    c10::DimVector out(shape.begin(), shape.end());
    if (packs_two(to_torch(dtype, tensor))) {
        if (out.empty() || out.back() % 2 != 0) {
            fail(ErrorCategory::safetensor,
                 "tensor " + repr(as_view(tensor)) +
                     " is F4 and its last dimension is odd: torch packs two values into an element, so it has no "
                     "such tensor");
        }
        out.back() /= 2;
    }
    return out;
}

void append_header_shape(std::vector<uint64_t>& out, c10::ScalarType type, c10::IntArrayRef shape,
                         const std::string& tensor) {
    out.insert(out.end(), shape.begin(), shape.end());
    if (packs_two(type)) {
        if (shape.empty()) {
            fail(ErrorCategory::safetensor,
                 "tensor " + repr(tensor) +
                     " is a scalar of float4_e2m1fn_x2, two values without a dimension, which the "
                     "format cannot hold: save it as `.reshape(1)`");
        }
        out.back() *= 2;
    }
}

// Converts one element on the CPU, because torch has no query for this. Most calls repeat the previous one, so its
// result is kept.
std::optional<std::string> why_not_convertible(c10::ScalarType from, c10::ScalarType to) {
    thread_local std::pair<c10::ScalarType, c10::ScalarType> known{at::kFloat, at::kFloat};
    if (from == to || known == std::pair(from, to)) {
        return std::nullopt;
    }
    try {
        const at::NoGradGuard no_grad;
        const auto options = at::TensorOptions().device(at::kCPU);
        at::empty({1}, options.dtype(to)).copy_(at::empty({1}, options.dtype(from)));
    } catch (const c10::Error& error) {
        return error.what_without_backtrace();
    }
    known = {from, to};
    return std::nullopt;
}

void check_conversion(c10::ScalarType from, c10::ScalarType to, rust::Str tensor) {
    if (const auto reason = why_not_convertible(from, to)) {
        fail(ErrorCategory::safetensor,
             "tensor " + repr(std::string(tensor)) + " of " + dtype_name(from) + " cannot be converted to " +
                 dtype_name(to) + ": " + *reason,
             SFT_ERROR_UNSUPPORTED_DTYPE);
    }
}

}  // namespace safetensors_torch::layer
