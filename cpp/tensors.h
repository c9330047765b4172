// Tensors by name, as dicts and as lists.
#pragma once

#include <ATen/core/Dict.h>
#include <ATen/core/Tensor.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace safetensors_torch::layer {

using Tensors = c10::Dict<std::string, at::Tensor>;
using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

// Names and tensors as two lists: Python makes a dict of them in half the time that a Dict takes.
using Lists = std::tuple<std::vector<std::string>, std::vector<at::Tensor>>;

// Returns the tensors of a dict, in its order.
NamedTensors to_pairs(const Tensors& tensors);

// Returns each tensor with the name at its position. Fails if the lists differ in length.
NamedTensors to_pairs(std::vector<std::string> names, std::vector<at::Tensor> tensors);

}  // namespace safetensors_torch::layer
