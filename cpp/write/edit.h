// Changes of the metadata of a file.
#pragma once

#include <torch/custom_class.h>
#include <torch/library.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cpp/deadline.h"
#include "cpp/metadata.h"

namespace safetensors_torch::layer {

// An edit that is checked: `torch.classes.safetensors_torch.PendingEdit`.
class PendingEdit : public torch::CustomClassHolder {
  public:
    // `set` holds new entries, `removed` the keys to remove. `in_place` overwrites the header instead of rewriting the
    // file.
    PendingEdit(const std::string& path, const Metadata& set, const std::vector<std::string>& removed, bool in_place,
                int64_t reserve, bool durable);

    // Writes until the file is changed or the deadline has passed; returns whether it is changed.
    bool advance(Deadline until);

    // The bytes to write, and those that are written.
    uint64_t total() const { return edit().total_bytes(); }
    uint64_t done() const { return edit().done_bytes(); }

    // Leaves the file unchanged unless advance() has returned true.
    void cancel() { edit_.reset(); }

    // Returns the metadata of the file, once advance() has returned true; empty if it has none.
    Metadata result() const;

  private:
    // Fails after cancel().
    const core::MetadataEdit& edit() const;

    std::optional<rust::Box<core::MetadataEdit>> edit_;
};

void register_pending_edit(torch::Library& library);

}  // namespace safetensors_torch::layer
