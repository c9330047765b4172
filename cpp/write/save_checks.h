// Which tensors can be saved.
#pragma once

#include <optional>
#include <string>

#include "cpp/metadata.h"
#include "cpp/tensors.h"

namespace safetensors_torch::layer {

struct SaveRules {
    // Whether tensors that are not contiguous are written as if they were, or refused.
    bool force_contiguous = false;
    // Whether one name of each group of tensors that share memory is written, or the group refused.
    bool keep_one = false;
    // Whether tensors that share memory are written like others.
    bool allow_shared = false;
};

// Returns the rules for `shared`, "error" or "keep_one". Fails for another word.
SaveRules save_rules(bool force_contiguous, const std::string& shared);

// Fails if a tensor cannot be saved: not strided, shared memory, not contiguous, without data. Every save checks in
// this order, so that the error is the same.
//
// With `keep_one`, removes all names except one of each group that shares memory from `tensors`, and adds them to
// `metadata`, each with the name that is kept, unless it has that key.
void check_saveable(NamedTensors& tensors, std::optional<Metadata>& metadata, const SaveRules& rules);

}  // namespace safetensors_torch::layer
