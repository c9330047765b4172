// The metadata of a file, as torch has it and as the core has it.
#pragma once

#include <ATen/core/Dict.h>

#include <optional>
#include <string>

#include "safetensors-torch/src/bridge.rs.h"

namespace safetensors_torch::layer {

using Metadata = c10::Dict<std::string, std::string>;

// Adds entries to `metadata`, except those whose key it has.
void add_entries(Metadata& metadata, const rust::Vec<core::Entry>& entries);

// Returns the entries for the core; none if there is no metadata.
rust::Vec<core::Entry> entries_of(const std::optional<Metadata>& metadata);

}  // namespace safetensors_torch::layer
