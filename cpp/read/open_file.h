// Open files.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/DimVector.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "safetensors-torch/src/bridge.rs.h"

namespace safetensors_torch::layer {

// A file of the core, shared by the objects that read from it.
using SharedFile = std::shared_ptr<const rust::Box<core::File>>;

SharedFile open_file(const std::string& path, const std::string& backend);

// Opens the bytes of `data` (uint8, 1-D, contiguous, on the CPU), and keeps `data` alive.
SharedFile open_bytes(const at::Tensor& data);

// Opens the file of the sft_source at `address`, whose functions run in an interpreter or are compiled code. `name` is
// its path in errors.
SharedFile open_source(int64_t address, const std::string& name, bool is_interpreted);

// The result refers to the arguments.
core::CheckpointOptions checkpoint_options(const std::string& backend, const std::optional<std::string>& variant,
                                           const std::string& extra);

// Opens a checkpoint in the sft_filesystem at `address`, as open_source opens a file.
rust::Box<core::Checkpoint> open_filesystem(int64_t address, const std::string& path,
                                            const core::CheckpointOptions& options, bool is_interpreted);

// Returns torch's dtype and shape of the tensor at `index`.
std::pair<c10::ScalarType, c10::DimVector> describe(const core::File& file, size_t index);

}  // namespace safetensors_torch::layer
