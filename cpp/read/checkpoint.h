// The tensors of one file or of several, by name: what File opens, and what loads of many tensors go through.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpp/read/load.h"
#include "cpp/read/open_file.h"

namespace safetensors_torch::layer {

class Checkpoint {
  public:
    // The tensors of one file.
    explicit Checkpoint(SharedFile file) : files_{std::move(file)} {}

    // Those of the files that were opened together.
    explicit Checkpoint(rust::Box<core::Checkpoint> checkpoint);

    const std::vector<SharedFile>& files() const { return files_; }

    // What the files are called; nothing where one was opened by itself.
    std::vector<std::string> file_names() const;

    // The number of tensors.
    size_t count() const;

    bool contains(const std::string& name) const;

    // Fails where there is no such tensor.
    core::Place find(const std::string& name) const;

    // All tensors, sorted by name.
    std::vector<core::Place> sorted_by_name() const;

    // All tensors, file after file, each in its order.
    std::vector<core::Place> in_file_order() const;

    const core::File& file(core::Place place) const { return **files_[place.shard]; }
    std::string name(core::Place place) const { return std::string(file(place).name(place.index)); }

    // Brings the pages of mappings in: before this returns, or in the background.
    void prefault(bool wait) const;

  private:
    std::vector<SharedFile> files_;
    // None where one file was opened by itself.
    std::optional<rust::Box<core::Checkpoint>> checkpoint_;
};

using SharedCheckpoint = std::shared_ptr<const Checkpoint>;

// The tensors at some places of a checkpoint: those of one file after those of the other.
class CheckpointLoader {
  public:
    // Checks everything and sets memory aside; nothing is read yet. Results are in the order of `places`.
    CheckpointLoader(const Checkpoint& checkpoint, const StorageSharing& lender, const std::vector<core::Place>& places,
                     Target target);

    // As for Loader.
    bool advance(Deadline until);
    uint64_t total_bytes() const;
    uint64_t done_bytes() const;
    size_t size() const { return order_.size(); }
    std::string name(size_t i) const { return loaders_[order_[i].shard].name(order_[i].index); }
    at::Tensor tensor(size_t i) const { return loaders_[order_[i].shard].tensor(order_[i].index); }

  private:
    // One for each file that has a part in this.
    std::vector<Loader> loaders_;
    // For each result, its loader and its number there.
    std::vector<core::Place> order_;
    size_t next_ = 0;
};

// All tensors of `checkpoint`, or those of `names`, which it must have, each once; in the order of the files.
CheckpointLoader load_all(const Checkpoint& checkpoint, const StorageSharing& lender, Target target,
                          const std::optional<std::vector<std::string>>& names);

// All tensors of the file at `path`. What is mapped is brought in before this returns, or not at all, or, where
// `prefault` has no value, in the background.
CheckpointLoader load_file(const std::string& path, Target target, const std::string& backend,
                           std::optional<bool> prefault, const std::optional<std::vector<std::string>>& names);

// All that `loads` makes, once it has read to the end.
std::vector<at::Tensor> tensors_of(CheckpointLoader& loads);

// The same as a dict.
Tensors dict_of(CheckpointLoader& loads);

// The same as a list of names and one of tensors, which become a Python dict in half the time that a Dict takes.
using Lists = std::tuple<std::vector<std::string>, std::vector<at::Tensor>>;
Lists lists_of(CheckpointLoader& loads);

}  // namespace safetensors_torch::layer
