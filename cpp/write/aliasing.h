// Tensors of a state dict that share memory, and which of them to keep.
#pragma once

#include <map>
#include <string>
#include <unordered_set>
#include <vector>

#include "cpp/tensors.h"

namespace safetensors_torch::layer {

// Returns groups of names whose tensors overlap in memory; names sorted, groups sorted by their first name. Leaves out
// tensors without memory (null or empty storage; meta unless `with_meta`) and disjoint views of one storage.
std::vector<std::vector<std::string>> overlapping(const NamedTensors& tensors, bool with_meta = false);

// Returns the names to drop so that no two tensors overlap, each with the name that is kept: the first whose tensor
// covers its storage, or the first such name of `preferred`. Includes tensors on the meta device. Fails if no tensor of
// a group covers the storage.
std::map<std::string, std::string> tied_names(const NamedTensors& tensors,
                                              const std::unordered_set<std::string>& preferred);

// Returns names as Python prints a set of strings.
std::string repr_set(const std::vector<std::string>& names);

}  // namespace safetensors_torch::layer
