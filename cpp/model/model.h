// Loading a checkpoint into the tensors of a model.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpp/model/mismatch.h"
#include "cpp/read/checkpoint.h"
#include "cpp/read/load.h"
#include "cpp/tensor_memory.h"
#include "cpp/tensors.h"

namespace safetensors_torch::layer {

// A load of a checkpoint's tensors into those of a state dict, by name, on any device. Tied names count once.
//
// Contiguous tensors are filled directly: those on the CPU by reads, those on a device through slabs, which also
// convert dtypes. Tensors that are not contiguous, or share memory with each other, are loaded and copied one by one.
class StateLoader {
  public:
    // Checks everything before the first tensor changes. The checkpoint may lack names of `optional`; its names that do
    // not begin with `prefix` are ignored. Fails if `strict` and the names differ, if a shape does not fit, and for a
    // tensor on the meta device.
    StateLoader(SharedCheckpoint checkpoint, StorageSharing sharing, const Tensors& state,
                const std::vector<std::string>& optional, const std::string& class_name, bool strict,
                const std::string& prefix);

    // Loads until all tensors are filled or the deadline has passed; returns whether they are.
    bool advance(Deadline until);

    uint64_t total_bytes() const { return total_; }
    uint64_t done_bytes() const;

    const Mismatch& mismatch() const { return mismatch_; }

  private:
    // A tensor of a file, and the tensor of the model that it fills.
    struct Match {
        core::TensorLocation place;
        std::string name;
        at::Tensor destination;
    };

    void plan(bool aliased);
    bool takes_bytes(const Match& match) const;
    bool load_and_copy(const Match& match, Deadline until);

    // Tensors of one device that are filled from one file.
    struct Group {
        size_t shard;
        std::vector<Destination> destinations;
    };

    SharedCheckpoint checkpoint_;
    StorageSharing sharing_;
    Mismatch mismatch_;
    std::vector<Match> matches_;
    // Of each destination.
    std::vector<TensorMemory> memory_;
    uint64_t total_ = 0;
    // Bytes of finished uploads and copies.
    uint64_t done_ = 0;
    bool started_ = false;
    // First one read into the CPU tensors, of all files; then uploads, group by group; then the rest, one by one.
    std::optional<rust::Box<core::PendingRead>> reading_;
    std::vector<Group> groups_;
    std::unique_ptr<Upload> upload_;
    size_t next_group_ = 0;
    std::vector<Match> rest_;
    std::unique_ptr<Loader> loader_;
    size_t next_rest_ = 0;
};

}  // namespace safetensors_torch::layer
