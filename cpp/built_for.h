// The version of this library, and which torch it was compiled for.
#pragma once

namespace safetensors_torch::layer {

// Such as "safetensors_torch 0.1.0 built for torch 2.11.0, C++ ABI 1". The CMake package searches the library's file
// for this text and compares it with the torch of the program.
extern const char built_for[];

}  // namespace safetensors_torch::layer
