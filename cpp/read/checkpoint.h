// The tensors of one file or of several, by name.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpp/read/open_file.h"

namespace safetensors_torch::layer {

class Checkpoint {
  public:
    // Of one file.
    explicit Checkpoint(SharedFile file) : files_{std::move(file)} {}

    // Of the files of a checkpoint.
    explicit Checkpoint(rust::Box<core::Checkpoint> checkpoint);

    const std::vector<SharedFile>& files() const { return files_; }

    // Returns the names of the files; none for a single file.
    std::vector<std::string> file_names() const;

    // Returns the number of tensors.
    size_t count() const;

    bool contains(const std::string& name) const;

    // Fails if there is no such tensor.
    core::TensorLocation find(const std::string& name) const;
    std::pair<const core::File&, size_t> at(const std::string& name) const {
        const core::TensorLocation place = find(name);
        return {file(place), place.index};
    }

    // Returns all tensors, sorted by name.
    std::vector<core::TensorLocation> sorted_by_name() const;

    // Returns all tensors, file after file, each in file order.
    std::vector<core::TensorLocation> in_file_order() const;

    const core::File& file(core::TensorLocation place) const { return **files_[place.shard]; }
    std::string name(core::TensorLocation place) const { return std::string(file(place).name(place.index)); }

    // Prefaults mappings: before this returns, or in the background.
    void prefault(bool wait) const;

  private:
    std::vector<SharedFile> files_;
    // None for a single file.
    std::optional<rust::Box<core::Checkpoint>> checkpoint_;
};

using SharedCheckpoint = std::shared_ptr<const Checkpoint>;

}  // namespace safetensors_torch::layer
