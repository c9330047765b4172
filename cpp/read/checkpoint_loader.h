// Loads of many tensors, of one file or of a checkpoint.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cpp/deadline.h"
#include "cpp/read/checkpoint.h"
#include "cpp/read/load.h"
#include "cpp/tensors.h"

namespace safetensors_torch::layer {

// A load of some tensors of a checkpoint: those in host memory with one read, uploads file after file.
class CheckpointLoader {
  public:
    // Checks everything and allocates; reads nothing. Results are in the order of `places`.
    CheckpointLoader(const Checkpoint& checkpoint, const StorageSharing& sharing,
                     const std::vector<core::TensorLocation>& places, Target target);

    // As for Loader.
    bool advance(Deadline until);
    uint64_t total_bytes() const;
    uint64_t done_bytes() const;
    size_t size() const { return order_.size(); }
    std::string name(size_t i) const { return loaders_[order_[i].shard].name(order_[i].index); }
    at::Tensor tensor(size_t i) const { return loaders_[order_[i].shard].tensor(order_[i].index); }

  private:
    // One for each file.
    std::vector<Loader> loaders_;
    // For each result, its loader and its number there.
    std::vector<core::TensorLocation> order_;
    size_t next_ = 0;
};

// Which tensors are loaded, and whether their pages are brought in before they are touched.
struct Selection {
    // All, or those of these names, which the checkpoint must have; each once, in the order of the files.
    std::optional<std::vector<std::string>> names;
    // Of mapped files: before the load returns; not at all; or, without a value, in the background if all tensors are
    // loaded.
    std::optional<bool> prefault;
};

CheckpointLoader load_all(const Checkpoint& checkpoint, const StorageSharing& sharing, Target target,
                          const Selection& selection);

// Loads to the end, and returns the tensors.
std::vector<at::Tensor> tensors_of(CheckpointLoader& loader);
Tensors dict_of(CheckpointLoader& loader);
Lists lists_of(CheckpointLoader& loader);

}  // namespace safetensors_torch::layer
