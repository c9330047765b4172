// From slices of a checkpoint to tensors that exist already.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpp/deadline.h"
#include "cpp/read/checkpoint.h"
#include "cpp/read/load.h"
#include "cpp/tensor_memory.h"

namespace safetensors_torch::layer {

// A copy of slices into tensors of their shapes, on any device, with any strides and any dtype that torch converts to.
// All slices for tensors on the CPU with the dtype of the file are read together, to their memory. Others are loaded,
// then copied by torch.
class FillLoader {
  public:
    // Checks everything; writes nothing. A slice begins at `starts` in the tensor of its name, and has the shape of its
    // target. Targets must not overlap.
    FillLoader(SharedCheckpoint checkpoint, const StorageSharing& sharing, std::vector<std::string> names,
               const std::vector<std::vector<int64_t>>& starts, std::vector<at::Tensor> targets);

    // Copies until everything is copied or the deadline has passed; returns whether everything is.
    bool advance(Deadline until);

    // The bytes of the slices, and those that are copied.
    uint64_t total_bytes() const { return total_; }
    uint64_t done_bytes() const;

  private:
    // A slice that is loaded, then copied by torch.
    struct Rest {
        size_t target;
        core::TensorLocation place;
        // In torch's elements.
        std::vector<core::Range> ranges;
        uint64_t nbytes;
    };

    bool load_and_copy(const Rest& rest, Deadline until);

    SharedCheckpoint checkpoint_;
    std::vector<std::string> names_;
    std::vector<at::Tensor> targets_;
    // Of each target.
    std::vector<TensorMemory> memory_;
    std::optional<rust::Box<core::PendingRead>> reading_;
    size_t parts_ = 0;
    std::vector<Rest> rest_;
    size_t next_rest_ = 0;
    std::unique_ptr<SliceLoader> loader_;
    uint64_t total_ = 0;
    uint64_t done_rest_ = 0;
    bool started_ = false;
};

}  // namespace safetensors_torch::layer
