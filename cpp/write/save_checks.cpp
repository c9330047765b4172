#include "cpp/write/save_checks.h"

#include <algorithm>
#include <utility>

#include "cpp/error.h"
#include "cpp/tensor_memory.h"
#include "cpp/write/aliasing.h"

namespace safetensors_torch::layer {
namespace {

bool is_dense(const at::Tensor& tensor) { return tensor.layout() == at::kStrided && !tensor.is_nested(); }

bool is_without_data(const at::Tensor& tensor) {
    return tensor.is_meta() || !tensor.has_storage() || tensor.storage().device().is_meta();
}

// Returns whether a save can only refuse the tensor because it shares memory.
bool is_plain(const at::Tensor& tensor) {
    return is_dense(tensor) && tensor.is_contiguous() && !is_without_data(tensor) &&
           (tensor.numel() == 0 || (has_memory(tensor) && is_whole(tensor)));
}

void refuse_layouts(const NamedTensors& tensors) {
    std::string names;
    for (const auto& [name, tensor] : tensors) {
        if (tensor.is_nested()) {
            fail(ErrorCategory::value,
                 "tensor " + repr(name) +
                     " is nested: its parts have shapes of their own, and the format has one shape for a "
                     "tensor; save its `.values()` and `.offsets()`, or `.to_padded_tensor(0)`");
        }
        if (!is_dense(tensor)) {
            names += (names.empty() ? "" : ", ") + repr(name);
        }
    }
    if (!names.empty()) {
        fail(ErrorCategory::value,
             "You are trying to save a sparse tensors: `[" + names +
                 "]` which this library does not support. You can make it a dense tensor before saving "
                 "with `.to_dense()` but be aware this might make a much larger file than needed.");
    }
}

void refuse_shared(const NamedTensors& tensors) {
    std::string groups;
    for (const auto& group : overlapping(tensors)) {
        groups += (groups.empty() ? "" : ", ") + repr_set(group);
    }
    if (!groups.empty()) {
        fail(ErrorCategory::runtime,
             "Some tensors share memory, so the file would hold it more than once and loading would not share it "
             "again: [" +
                 groups +
                 "]. Save the model with `save_model`, or these with `shared` = \"keep_one\", which keeps one name of "
                 "each group, or `.clone()` them.");
    }
}

// Removes all names except one of each group of tensors that share memory, and records them in `metadata`.
void drop_shared(NamedTensors& tensors, std::optional<Metadata>& metadata) {
    // Before tied_names(), which compares tensors with their storages.
    for (const auto& [name, tensor] : tensors) {
        check_whole(name, tensor);
    }
    const auto dropped = tied_names(tensors, {});
    if (dropped.empty()) {
        return;
    }
    const auto is_dropped = [&](const auto& entry) { return dropped.count(entry.first) != 0; };
    tensors.erase(std::remove_if(tensors.begin(), tensors.end(), is_dropped), tensors.end());
    // A copy: copies of a c10::Dict share their entries.
    Metadata entries = metadata ? metadata->copy() : Metadata();
    for (const auto& [name, kept] : dropped) {
        entries.insert(name, kept);
    }
    metadata = std::move(entries);
}

void refuse_not_contiguous(const NamedTensors& tensors) {
    for (const auto& [name, tensor] : tensors) {
        if (!tensor.is_contiguous()) {
            fail(ErrorCategory::value,
                 "You are trying to save a non contiguous tensor: `" + shortened(name) +
                     "` which is not allowed. Call `.contiguous()` on it to pack it before saving, or save with "
                     "`force_contiguous`, or, if it is a view of another tensor, save only that one and take the "
                     "view again after loading.");
        }
    }
}

void refuse_without_data(const NamedTensors& tensors) {
    for (const auto& [name, tensor] : tensors) {
        if (!tensor.defined()) {
            fail(ErrorCategory::value,
                 "tensor " + repr(name) + " is undefined: leave it out, or give it a value before saving");
        }
        if (is_without_data(tensor) && (tensor.is_meta() || tensor.has_storage())) {
            fail(ErrorCategory::runtime, "Cannot copy out of meta tensor; no data! Tensor `" + shortened(name) +
                                             "` is on the meta device (or fake): materialize it before saving.");
        }
        if (is_wrapper(tensor)) {
            fail(ErrorCategory::safetensor,
                 "tensor " + repr(name) +
                     " has no memory of its own (it is a wrapper subclass, or in a transform of torch.func): convert "
                     "it to a plain tensor before saving, or save outside of the transform");
        }
        check_whole(name, tensor);
    }
}

}  // namespace

SaveRules save_rules(bool force_contiguous, const std::string& shared) {
    if (shared != "error" && shared != "keep_one") {
        fail(ErrorCategory::value, "shared is " + repr(shared) + ": choose \"error\" or \"keep_one\"");
    }
    return {force_contiguous, shared == "keep_one", /*allow_shared=*/false};
}

void check_saveable(NamedTensors& tensors, std::optional<Metadata>& metadata, const SaveRules& rules) {
    // One pass over the tensors, because each access waits for memory if there are many. The other checks, in the order
    // of their errors, follow only if a tensor is unusual.
    const bool all_plain =
        std::all_of(tensors.begin(), tensors.end(), [](const auto& entry) { return is_plain(entry.second); });
    if (!all_plain) {
        refuse_layouts(tensors);
    }
    if (rules.keep_one) {
        drop_shared(tensors, metadata);
    } else if (!rules.allow_shared) {
        refuse_shared(tensors);
    }
    if (!all_plain) {
        if (!rules.force_contiguous) {
            refuse_not_contiguous(tensors);
        }
        refuse_without_data(tensors);
    }
}

}  // namespace safetensors_torch::layer
