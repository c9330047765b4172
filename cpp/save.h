// From tensors to the bytes of a file.
#pragma once

#include <ATen/core/Dict.h>
#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>

#include <cstdint>
#include <optional>
#include <string>

#include "cpp/load.h"
#include "cpp/shared.h"

namespace safetensors_torch {

using Metadata = c10::Dict<std::string, std::string>;

// Fails where a tensor cannot be saved: not strided, shared memory, not contiguous, without data - in this order, so
// that the error is the same whichever function is asked.
void check_saveable(const NamedTensors& tensors);

// A save that has been checked and laid out, and that can be written: `torch.classes.safetensors_torch.PendingSave`.
class PendingSave : public torch::CustomClassHolder {
  public:
    // Checks everything and settles the layout; nothing is written yet. `path` is for the errors, empty if there is
    // none. The tensors' values are read when they are written.
    PendingSave(NamedTensors tensors, const std::optional<Metadata>& metadata, const std::string& path);

    // The bytes of the file.
    int64_t size() const;

    // Writes the file at `path`: all of it, or nothing. With `durable` it is on the disk when this returns.
    void write_file(const std::string& path, bool durable) const;

    // Writes into `out`, a contiguous uint8 tensor on the CPU of exactly size() elements.
    void write_into(const at::Tensor& out) const;

    // The bytes of the file, as a one-dimensional uint8 tensor.
    at::Tensor write() const;

  private:
    template <typename Writer>
    void stream(Writer&& writer) const;

    NamedTensors tensors_;
    rust::Box<core::SavePlan> layout_;
};

// Tells torch of the class.
void register_pending_save(torch::Library& library);

}  // namespace safetensors_torch
