#include "cpp/tensors.h"

#include "cpp/error.h"

namespace safetensors_torch::layer {

NamedTensors to_pairs(const Tensors& tensors) {
    NamedTensors pairs;
    pairs.reserve(tensors.size());
    for (const auto& entry : tensors) {
        pairs.emplace_back(entry.key(), entry.value());
    }
    return pairs;
}

NamedTensors to_pairs(std::vector<std::string> names, std::vector<at::Tensor> tensors) {
    if (names.size() != tensors.size()) {
        fail(ErrorCategory::value, "a save takes as many names as tensors, not " + std::to_string(names.size()) +
                                       " and " + std::to_string(tensors.size()));
    }
    NamedTensors pairs;
    pairs.reserve(names.size());
    for (size_t i = 0; i < names.size(); ++i) {
        pairs.emplace_back(std::move(names[i]), std::move(tensors[i]));
    }
    return pairs;
}

}  // namespace safetensors_torch::layer
