#include "cpp/built_for.h"

#include <torch/version.h>

#include <cstddef>  // which says what the C++ ABI is

#include "include/safetensors_torch.h"

#define SAFETENSORS_TORCH_TEXT_OF(value) #value
#define SAFETENSORS_TORCH_TEXT(macro) SAFETENSORS_TORCH_TEXT_OF(macro)

namespace safetensors_torch::layer {

const char built_for[] = "safetensors_torch " SFT_VERSION_STRING " built for torch " TORCH_VERSION
                         ", C++ ABI " SAFETENSORS_TORCH_TEXT(_GLIBCXX_USE_CXX11_ABI);

}  // namespace safetensors_torch::layer
