/// @file
/// Conversions from and to other maps of tensors. Part of safetensors_torch.hpp, which includes it.
///
/// Copies handles of tensors only: both maps share memory.
#pragma once

#include <ATen/ATen.h>
#include <torch/ordered_dict.h>

#include <algorithm>
#include <string>
#include <unordered_map>
#include <vector>

#include "types.hpp"

namespace safetensors_torch {

/// Returns the tensors of a torch::OrderedDict, such as module.named_parameters(), in its order.
inline Tensors to_tensors(const torch::OrderedDict<std::string, at::Tensor>& dict) {
    Tensors tensors;
    tensors.reserve(dict.size());
    for (const auto& item : dict) {
        tensors.insert(item.key(), item.value());
    }
    return tensors;
}

/// Returns the tensors of a map from std::string to at::Tensor, such as a std::unordered_map, sorted by name.
template <typename Map, typename = typename Map::mapped_type>
Tensors to_tensors(const Map& map) {
    std::vector<std::string> names;
    names.reserve(map.size());
    for (const auto& entry : map) {
        names.push_back(entry.first);
    }
    std::sort(names.begin(), names.end());
    Tensors tensors;
    tensors.reserve(names.size());
    for (const std::string& name : names) {
        tensors.insert(name, map.at(name));
    }
    return tensors;
}

/// Returns the tensors as a torch::OrderedDict, in the same order.
inline torch::OrderedDict<std::string, at::Tensor> to_ordered_dict(const Tensors& tensors) {
    torch::OrderedDict<std::string, at::Tensor> dict;
    dict.reserve(tensors.size());
    for (const auto& entry : tensors) {
        dict.insert(entry.key(), entry.value());
    }
    return dict;
}

/// Returns the tensors as a std::unordered_map, which has no order.
inline std::unordered_map<std::string, at::Tensor> to_unordered_map(const Tensors& tensors) {
    std::unordered_map<std::string, at::Tensor> map;
    map.reserve(tensors.size());
    for (const auto& entry : tensors) {
        map.emplace(entry.key(), entry.value());
    }
    return map;
}

}  // namespace safetensors_torch
