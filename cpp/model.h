// Loading a file into the tensors of a model.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "cpp/load.h"

namespace safetensors_torch {

// Names in a state dict that a load left alone, and names in a file that it had no use for; both sorted.
using Mismatch = std::pair<std::vector<std::string>, std::vector<std::string>>;

// Reads the file's tensors into those of `state`, by name, whatever their device. Tied names count once. `optional`
// holds names whose absence from the file is no fault. Everything is checked before the first tensor changes.
// Fails where `strict` and the names differ, where a shape does not fit, and for a tensor on the meta device.
Mismatch load_state(const SharedFile& shared_file, const Lender& lender, const Tensors& state,
                    const std::vector<std::string>& optional, const std::string& class_name, bool strict);

}  // namespace safetensors_torch
