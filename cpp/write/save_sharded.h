// From tensors to the files of a checkpoint.
#pragma once

#include <torch/custom_class.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpp/write/save.h"

namespace safetensors_torch::layer {

// A save into one file or several that has been checked and laid out, and that can be written:
// `torch.classes.safetensors_torch.PendingShardedSave`.
class PendingShardedSave : public torch::CustomClassHolder {
  public:
    // Checks everything and settles which tensor goes into which file, and where; nothing is written yet, and
    // `directory` is not looked at.
    PendingShardedSave(NamedTensors tensors, std::optional<Metadata> metadata, std::string directory,
                       const std::string& stem, int64_t max_shard_size, const SaveRules& rules = {});

    // The bytes of all files but the index.
    int64_t size() const;

    // Begins to write. With `durable`, all is on the disk once advance() is done.
    void start(bool durable);

    // Goes on until all files are in place, or the time is up; whether they are.
    bool advance(Deadline until);

    // The bytes that are written.
    int64_t done() const;

    // Leaves what was begun undone: the directory is as it was.
    void cancel();

    // The names of the files, the index last, once advance() is done.
    const std::vector<std::string>& file_names() const { return file_names_; }

  private:
    std::string directory_;
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

// A checkpoint that is written file by file, each of tensors that are given only then, so that no more than those of
// one file have to be in memory: `torch.classes.safetensors_torch.ShardedWriter`.
class ShardedWriter : public torch::CustomClassHolder {
  public:
    // `specs` have the names, dtypes and shapes of all tensors. Begins to write; the directory stays as it is until
    // commit().
    ShardedWriter(NamedTensors specs, std::optional<Metadata> metadata, std::string directory, const std::string& stem,
                  int64_t max_shard_size);
    ~ShardedWriter() override { cancel(); }
    ShardedWriter(const ShardedWriter&) = delete;
    ShardedWriter& operator=(const ShardedWriter&) = delete;

    // The names of the tensors in each file.
    std::vector<std::vector<std::string>> members() const;

    // Begins the next file; `tensors` are those of its names, in their order.
    void start(const std::vector<at::Tensor>& tensors);

    // Goes on with that file until it is written, or the time is up; whether it is. Lets go of its tensors then.
    bool advance(Deadline until);

    // The bytes of that file, and those of it that are written.
    int64_t size() const { return size_; }
    int64_t done() const { return current_ ? current_->done() : size_; }

    // Gives the files their names, once all are written. Returns false if another save had the directory locked until
    // the time was up: call it again.
    bool commit(bool durable, Deadline until);

    // The names that commit() gave, the index last.
    const std::vector<std::string>& file_names() const { return file_names_; }

    // Leaves what was begun undone: the directory is as it was.
    void cancel();

  private:
    NamedTensors specs_;
    std::optional<Metadata> metadata_;
    std::string directory_;
    // Places among the specs, of each file.
    std::vector<std::vector<size_t>> members_;
    std::optional<rust::Box<core::ShardedWriter>> writer_;
    // The file that is being written, whose sink refers to the writer.
    std::unique_ptr<PendingSave> current_;
    int64_t size_ = 0;
    size_t next_ = 0;
    std::vector<std::string> file_names_;
};

// Tells torch of the classes.
void register_sharded_saves(torch::Library& library);

}  // namespace safetensors_torch::layer
