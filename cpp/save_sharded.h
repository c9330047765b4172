// From tensors to the files of a checkpoint.
#pragma once

#include <torch/custom_class.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cpp/save.h"

namespace safetensors_torch {

// A save into one file or several that has been checked and laid out, and that can be written:
// `torch.classes.safetensors_torch.PendingShardedSave`.
class PendingShardedSave : public torch::CustomClassHolder {
  public:
    // Checks everything and settles which tensor goes into which file, and where; nothing is written yet, and `folder`
    // is not looked at.
    PendingShardedSave(const NamedTensors& tensors, const std::optional<Metadata>& metadata, std::string folder,
                       const std::string& stem, int64_t max_shard_bytes);

    // The bytes of all files but the index.
    int64_t size() const;

    // Begins to write. With `durable`, all is on the disk once advance() is done.
    void start(bool durable);

    // Goes on until all files are in place, or the time is up; whether they are.
    bool advance(Deadline until);

    // The bytes that are written.
    int64_t done() const;

    // Leaves what was begun undone: the folder is as it was.
    void cancel();

    // The names of the files, the index last, once advance() is done.
    const std::vector<std::string>& file_names() const { return file_names_; }

  private:
    std::string folder_;
    std::vector<std::string> names_;
    rust::Box<core::ShardPlan> plan_;
    std::vector<c10::intrusive_ptr<PendingSave>> shards_;
    // What is under way.
    std::optional<rust::Box<core::ShardedWriter>> writer_;
    bool durable_ = false;
    size_t next_ = 0;
    bool has_begun_next_ = false;
    int64_t done_ = 0;
    std::vector<std::string> file_names_;
};

// Tells torch of the class.
void register_pending_sharded_save(torch::Library& library);

}  // namespace safetensors_torch
