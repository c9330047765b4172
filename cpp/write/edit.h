// Changes of the metadata of a file.
#pragma once

#include <torch/custom_class.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cpp/write/save.h"

namespace safetensors_torch::layer {

// An edit that has been checked, and that is done in steps: `torch.classes.safetensors_torch.PendingEdit`. Cancelled
// before it is done, it leaves the file as it was.
class PendingEdit : public torch::CustomClassHolder {
  public:
    // `set` holds new entries, `removed` the keys to remove. `in_place` overwrites the header instead of rewriting the
    // file.
    PendingEdit(const std::string& path, const Metadata& set, const std::vector<std::string>& removed, bool in_place,
                int64_t reserve, bool durable);

    // The bytes that are to be written, and those that are.
    int64_t size() const { return static_cast<int64_t>(under_way()->total_bytes()); }
    int64_t done() const { return static_cast<int64_t>(under_way()->done_bytes()); }

    // Goes on until the file is changed, or the time is up; whether it is.
    bool advance(Deadline until);

    void cancel() { edit_.reset(); }

    // What the file has once advance() is done; empty where it has none.
    Metadata metadata() const;

  private:
    const rust::Box<core::MetadataEdit>& under_way() const;

    std::optional<rust::Box<core::MetadataEdit>> edit_;
};

// Tells torch of the class.
void register_pending_edit(torch::Library& library);

}  // namespace safetensors_torch::layer
