// The version of this library, and which torch it was compiled for.
#pragma once

namespace safetensors_torch::layer {

// Such as "safetensors_torch 0.1.0 built for torch 2.11.0, C++ ABI 1". The CMake package finds this text in the
// library's file and compares it with the torch of the program, so built_for_op() keeps the compiler from taking it
// apart.
extern const char built_for[];

}  // namespace safetensors_torch::layer
