// From tensors to the bytes of a file.
#pragma once

#include <ATen/core/Dict.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "cpp/load.h"
#include "cpp/shared.h"

namespace safetensors_torch {

using Metadata = c10::Dict<std::string, std::string>;

// Fails where a tensor cannot be saved: not strided, shared memory, not contiguous, without data - in this order, so
// that the error is the same whichever function is asked.
void check_saveable(const NamedTensors& tensors);

// Writes a file: all of it, or nothing.
void save_file(const Tensors& tensors, const std::string& path, const std::optional<Metadata>& metadata);

// The bytes of a file, as a one-dimensional uint8 tensor.
at::Tensor save(const Tensors& tensors, const std::optional<Metadata>& metadata);

// How many bytes save() would give.
int64_t save_size(const Tensors& tensors, const std::optional<Metadata>& metadata);

// The bytes of a file into `out`, a contiguous uint8 tensor on the CPU of exactly save_size() elements.
void save_into(const Tensors& tensors, const at::Tensor& out, const std::optional<Metadata>& metadata);

}  // namespace safetensors_torch
