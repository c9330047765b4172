// The names that a module and a checkpoint do not have in common, and the error about them.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace safetensors_torch::layer {

// Names in a state dict that a load left alone, and names in a file that it had no use for; both sorted.
using Mismatch = std::pair<std::vector<std::string>, std::vector<std::string>>;

// How an error of load_state_dict begins.
std::string heading(const std::string& class_name);

// Fails unless both lists are empty. Says what to do about names that torch.compile or DataParallel has changed.
// `prefix` is what the names of the module begin with in the file.
void check_names(const Mismatch& mismatch, const std::string& class_name, const std::string& prefix);

}  // namespace safetensors_torch::layer
