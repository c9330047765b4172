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

namespace safetensors_torch::layer {

// A load of a checkpoint's tensors into those of a state dict, by name, whatever their device. Tied names count once.
//
// What the bytes of a file fit into gets them straight: CPU tensors by reads, those of a device through slabs, which
// convert other dtypes on the way. What is not contiguous, and tensors that share memory with each other, are loaded
// and copied one by one.
class StateLoader {
  public:
    // Checks everything, before the first tensor changes. `optional` holds names whose absence from the checkpoint is
    // no fault; what it has whose name does not begin with `prefix` is passed over. Fails where `strict` and the names
    // differ, where a shape does not fit, and for a tensor on the meta device.
    StateLoader(SharedCheckpoint checkpoint, StorageSharing lender, const Tensors& state,
                const std::vector<std::string>& optional, const std::string& class_name, bool strict,
                const std::string& prefix);

    // Goes on until all tensors are filled, or the time is up; whether they are.
    bool advance(Deadline until);

    uint64_t total_bytes() const { return total_; }
    uint64_t done_bytes() const;

    const Mismatch& mismatch() const { return mismatch_; }

  private:
    // A tensor of a file and the one of the model that it goes into.
    struct Match {
        core::Place place;
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
    StorageSharing lender_;
    Mismatch mismatch_;
    std::vector<Match> matches_;
    // Of each destination.
    std::vector<TensorMemory> memory_;
    uint64_t total_ = 0;
    // By what is over.
    uint64_t done_ = 0;
    bool started_ = false;
    // Straight into CPU tensors, file by file; then group by group, through one upload at a time; and the rest, one by
    // one.
    std::vector<rust::Box<core::PendingRead>> reading_;
    size_t next_reading_ = 0;
    std::vector<Group> groups_;
    std::unique_ptr<Upload> upload_;
    size_t next_group_ = 0;
    std::vector<Match> rest_;
    std::unique_ptr<Loader> loader_;
    size_t next_rest_ = 0;
};

}  // namespace safetensors_torch::layer
