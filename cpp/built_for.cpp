#include "cpp/built_for.h"

#include <torch/version.h>

#include <cstddef>  // which says what the C++ ABI is

#define SAFETENSORS_TORCH_TEXT_OF(value) #value
#define SAFETENSORS_TORCH_TEXT(macro) SAFETENSORS_TORCH_TEXT_OF(macro)

namespace safetensors_torch {

const char built_for[] =
    "safetensors_torch built for torch " TORCH_VERSION ", C++ ABI " SAFETENSORS_TORCH_TEXT(_GLIBCXX_USE_CXX11_ABI);

}  // namespace safetensors_torch
