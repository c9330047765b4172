// The files of the processes of torch.distributed.checkpoint, joined.
#pragma once

#include <torch/custom_class.h>
#include <torch/library.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cpp/bytes.h"
#include "cpp/deadline.h"

namespace safetensors_torch::layer {

// A consolidation that runs in the background: `torch.classes.safetensors_torch.PendingConsolidation`.
class PendingConsolidation : public torch::CustomClassHolder {
  public:
    // Each of `names` has its file in `files`, counted from 1; without names, `max_shard_size` divides the tensors.
    PendingConsolidation(const std::string& input, const std::string& output, const std::vector<std::string>& names,
                         const std::vector<int64_t>& files, int64_t max_shard_size, bool durable);

    // Waits until the files are in place or the deadline has passed; returns whether they are.
    bool advance(Deadline until);

    // The bytes of all tensors, and those that are written.
    uint64_t total() const { return work().total_bytes(); }
    uint64_t done() const { return work().done_bytes(); }

    // Leaves the output unchanged unless advance() has returned true.
    void cancel() { work_.reset(); }

    // Returns the names of the files, the index last, once advance() has returned true.
    std::vector<std::string> result() const;

  private:
    // Fails after cancel().
    const core::Consolidation& work() const;

    std::optional<rust::Box<core::Consolidation>> work_;
};

void register_pending_consolidation(torch::Library& library);

}  // namespace safetensors_torch::layer
