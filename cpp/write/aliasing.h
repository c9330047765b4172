// Which tensors of a state dict share memory, and which of them to keep.
#pragma once

#include <map>
#include <string>
#include <unordered_set>
#include <vector>

#include "cpp/read/load.h"

namespace safetensors_torch::layer {

// Groups of two and more names whose tensors overlap in memory; names sorted, groups sorted by their first name.
// Tensors without memory (null or empty storage; meta unless `with_meta`) are in none, nor are disjoint views of one
// storage.
std::vector<std::vector<std::string>> overlapping(const NamedTensors& tensors, bool with_meta = false);

// The names to drop so that no two tensors overlap, each with the name that is kept in its place: the first, in
// order, whose tensor covers its storage, and among these one of `preferred` where there is one.
// Tensors on the meta device are tied as others are. Fails where none of a group covers the storage.
std::map<std::string, std::string> tied_names(const NamedTensors& tensors,
                                              const std::unordered_set<std::string>& preferred);

// Names as Python prints a set of strings.
std::string repr_set(const std::vector<std::string>& names);

}  // namespace safetensors_torch::layer
