// Checkpoints that several processes write together, each its parts of the tensors.
#pragma once

#include <torch/custom_class.h>
#include <torch/library.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cpp/write/save.h"
#include "cpp/write/save_sharded.h"

namespace safetensors_torch::layer {

// The files of a checkpoint before it is written: `torch.classes.safetensors_torch.CheckpointLayout`, for a save whose
// bytes Python sends.
class CheckpointLayout : public torch::CustomClassHolder {
  public:
    // `specs` have the names, dtypes and shapes of all tensors; `files` has the number of each one's file, from 0 on,
    // or is empty: then `max_shard_size` divides them. `directory` is for the errors.
    CheckpointLayout(const NamedTensors& specs, const std::optional<Metadata>& metadata, const std::string& directory,
                     const std::string& stem, int64_t max_shard_size, const std::vector<int64_t>& files);

    const core::ShardPlan& plan() const { return *plan_; }
    const std::vector<std::string>& names() const { return names_; }
    const std::vector<rust::Box<core::SavePlan>>& saves() const { return saves_; }

    // Returns the number of each tensor's file, from 0 on.
    const std::vector<int64_t>& files() const { return shard_of_; }

    // Returns the bytes of the header of a file, and its tensors in the order of their data, as indices of the specs.
    at::Tensor header(int64_t file) const;
    std::vector<int64_t> order(int64_t file) const;

    // Return the names of the files, the index last, and the text of the index, empty if there is none.
    std::vector<std::string> file_names() const;
    std::string index() const;

    // Returns those of the files of a directory that belong to another checkpoint of the same stem.
    std::vector<std::string> stale(const std::vector<std::string>& names) const;

  private:
    rust::Box<core::ShardPlan> plan_;
    std::vector<std::string> names_;
    std::vector<int64_t> shard_of_;
    // Of each file: its tensors, as indices of the specs, and its layout.
    std::vector<std::vector<int64_t>> members_;
    std::vector<rust::Box<core::SavePlan>> saves_;
};

// The files of a checkpoint, for other processes to fill: `torch.classes.safetensors_torch.JoinedCheckpoint`. One
// process creates it, and puts the files in place by advance() once all have finished. Until then, the directory stays
// as it was.
class JoinedCheckpoint : public torch::CustomClassHolder {
  public:
    // Creates the files, with their headers, as CheckpointLayout lays them out. The hidden names of the files are
    // determined by numbers from `first_number` on.
    JoinedCheckpoint(const NamedTensors& specs, const std::optional<Metadata>& metadata, const std::string& directory,
                     const std::string& stem, int64_t max_shard_size, const std::vector<int64_t>& files,
                     int64_t first_number, bool durable);
    ~JoinedCheckpoint() override { cancel(); }
    JoinedCheckpoint(const JoinedCheckpoint&) = delete;
    JoinedCheckpoint& operator=(const JoinedCheckpoint&) = delete;

    // Returns the number of each tensor's file, from 0 on.
    const std::vector<int64_t>& files() const { return shard_of_; }

    // Returns the hidden name of each file.
    const std::vector<std::string>& hidden_names() const { return hidden_names_; }

    // Puts the files in place, or waits for another save of the directory until the deadline has passed; returns
    // whether they are in place. Every byte must be written by then.
    bool advance(Deadline until);

    // Nothing is written by advance().
    uint64_t total() const { return 0; }
    uint64_t done() const { return 0; }

    // Leaves the directory unchanged unless the files are in place.
    void cancel();

    // Returns the names of the files, the index last, once they are in place.
    std::vector<std::string> result() const { return file_names_of(writer_, is_committed_); }

  private:
    bool durable_;
    std::vector<int64_t> shard_of_;
    std::vector<std::string> hidden_names_;
    std::optional<rust::Box<core::ShardedWriter>> writer_;
    // Dropped before the writer, which removes a directory that it has created only if that is empty.
    std::vector<rust::Box<core::FileWriter>> created_;
    bool is_committed_ = false;
};

// Writes parts of tensors to one file of a JoinedCheckpoint, of this process or another:
// `torch.classes.safetensors_torch.JoinedSave`.
class JoinedSave : public PendingSave {
  public:
    // `path` is that of the hidden file. A part begins at `starts` in the tensor of its name, and has its own shape.
    // Tensors that are not contiguous are copied, one at a time; they may share memory.
    JoinedSave(const std::string& path, const std::vector<std::string>& names, std::vector<at::Tensor> parts,
               std::vector<std::vector<int64_t>> starts, bool durable);
};

void register_joined(torch::Library& library);

}  // namespace safetensors_torch::layer
