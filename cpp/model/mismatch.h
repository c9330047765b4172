// Names that only the module or only the checkpoint has, and the error about them.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace safetensors_torch::layer {

// Missing names, which only the state dict has, and unexpected ones, which only the file has; both sorted.
using Mismatch = std::pair<std::vector<std::string>, std::vector<std::string>>;

// Returns the first line of an error of load_state_dict.
std::string heading(const std::string& class_name);

// Fails unless both lists are empty. The error explains names that torch.compile or DataParallel has changed. In the
// file, the names of the module begin with `prefix`.
void check_names(const Mismatch& mismatch, const std::string& class_name, const std::string& prefix);

}  // namespace safetensors_torch::layer
