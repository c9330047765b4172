// From tensors to the files of a checkpoint.
#pragma once

#include <torch/custom_class.h>
#include <torch/library.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpp/write/save.h"

namespace safetensors_torch::layer {

// A complete file of a checkpoint.
using CompleteFile = std::optional<rust::Box<core::FileWriter>>;

// Returns the bytes of each tensor.
std::vector<uint64_t> nbytes_of_each(const NamedTensors& tensors);

// Divides tensors, which may have no data, into files.
rust::Box<core::ShardPlan> divide(const NamedTensors& tensors, const std::string& stem, int64_t max_shard_size);

// Begins the checkpoint in `directory` of tensors called `names`.
rust::Box<core::ShardedWriter> begin_checkpoint(const std::string& directory, const core::ShardPlan& plan,
                                                const std::vector<std::string>& names);

// Returns the names of the files, the index last. Fails unless they are in place.
std::vector<std::string> file_names_of(const std::optional<rust::Box<core::ShardedWriter>>& writer, bool is_committed);

// A save into one file or several that is checked and laid out: `torch.classes.safetensors_torch.PendingShardedSave`.
class PendingShardedSave : public torch::CustomClassHolder {
  public:
    // Checks everything, and settles which file each tensor is written to, and where; does not open `directory`.
    PendingShardedSave(NamedTensors tensors, std::optional<Metadata> metadata, std::string directory,
                       const std::string& stem, int64_t max_shard_size, const SaveRules& rules, bool durable);
    ~PendingShardedSave() override { cancel(); }
    PendingShardedSave(const PendingShardedSave&) = delete;
    PendingShardedSave& operator=(const PendingShardedSave&) = delete;

    // Writes until all files are in place or the deadline has passed; returns whether they are. Files whose bytes are
    // in host memory are written several at once.
    bool advance(Deadline until);

    // The bytes of all files except the index, and those that are written.
    uint64_t total() const;
    uint64_t done() const;

    // Leaves the directory unchanged unless advance() has returned true.
    void cancel();

    // Returns the names of the files, the index last, once advance() has returned true.
    std::vector<std::string> result() const;

    // For a save by other means than advance(): return the save of each file, the names of the files, the index last,
    // and the text of the index, empty if there is none.
    const std::vector<c10::intrusive_ptr<PendingSave>>& shards() const { return shards_; }
    std::vector<std::string> file_names() const;
    std::string index() const;

    // Returns those of the files of a directory that belong to another checkpoint of the same stem.
    std::vector<std::string> stale(const std::vector<std::string>& names) const;

  private:
    bool is_complete(size_t shard) const { return shard < next_ || files_[shard].has_value(); }
    void start();
    void write(Deadline until);
    void write_together(size_t end, Deadline until);

    std::string directory_;
    bool durable_;
    std::vector<std::string> names_;
    rust::Box<core::ShardPlan> plan_;
    std::vector<c10::intrusive_ptr<PendingSave>> shards_;
    // From the first step on.
    std::optional<rust::Box<core::ShardedWriter>> writer_;
    // Of each shard, its file once that is complete, until the writer has it.
    std::vector<CompleteFile> files_;
    // The first shard whose file the writer does not have.
    size_t next_ = 0;
    bool is_committed_ = false;
    bool is_cancelled_ = false;
};

// A checkpoint that is written file by file: only the tensors of one file have to be in memory.
// `torch.classes.safetensors_torch.ShardedWriter`. A file is written by advance() after start(), and the checkpoint is
// put in place by advance() after start_commit().
class ShardedWriter : public torch::CustomClassHolder {
  public:
    // `specs` have the names, dtypes and shapes of all tensors.
    ShardedWriter(NamedTensors specs, std::optional<Metadata> metadata, std::string directory, const std::string& stem,
                  int64_t max_shard_size);
    ~ShardedWriter() override { cancel(); }
    ShardedWriter(const ShardedWriter&) = delete;
    ShardedWriter& operator=(const ShardedWriter&) = delete;

    // Returns the names of the tensors in each file.
    std::vector<std::vector<std::string>> members() const;

    // Starts the next file. `tensors` are those of its names, in their order.
    void start(const std::vector<at::Tensor>& tensors);

    // Starts to put the files in place, once all are written.
    void start_commit(bool durable);

    // Writes the file, or waits for another save of the directory and commits, until that is done or the deadline has
    // passed; returns whether it is done.
    bool advance(Deadline until);

    // The bytes of the file, and those that are written.
    uint64_t total() const { return total_; }
    uint64_t done() const { return current_ ? current_->done() : total_; }

    // Leaves the directory unchanged unless it is committed.
    void cancel();

    // Returns the names of the files, the index last, once they are in place.
    std::vector<std::string> result() const;

  private:
    NamedTensors specs_;
    std::optional<Metadata> metadata_;
    std::string directory_;
    // Indices of the specs, of each file.
    std::vector<std::vector<size_t>> members_;
    std::optional<rust::Box<core::ShardedWriter>> writer_;
    // The file that is being written; its sink refers to the writer and to the complete file.
    CompleteFile file_;
    std::unique_ptr<PendingSave> current_;
    uint64_t total_ = 0;
    size_t next_ = 0;
    // From start_commit() on.
    std::optional<bool> commit_durable_;
    bool is_committed_ = false;
};

void register_sharded_saves(torch::Library& library);

}  // namespace safetensors_torch::layer
