// Files that are written tensor by tensor.
#pragma once

#include <torch/custom_class.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cpp/write/save.h"

namespace safetensors_torch::layer {

// A file whose tensors are declared first and then written in any order, by any thread:
// `torch.classes.safetensors_torch.IncrementalWriter`. Without a commit, the target stays as it was.
class IncrementalWriter : public torch::CustomClassHolder {
  public:
    // Begins the file at `path`. Uses only the dtypes and shapes of `specs`, which may be on any device.
    IncrementalWriter(std::string path, const NamedTensors& specs, const std::optional<Metadata>& metadata,
                      bool durable);

    // Checks the tensor, as every save does, and writes it. Returns the save if it is not done at the deadline. If that
    // is cancelled or dropped before its end, the tensor can be written again.
    std::optional<c10::intrusive_ptr<PendingSave>> write(const std::string& name, const at::Tensor& tensor,
                                                         Deadline until) const;

    // Returns the names of tensors that are not written yet, in file order.
    std::vector<std::string> missing() const;

    bool is_open() const { return writer_->is_open(); }

    // Fails, and stays open, if a tensor is missing.
    void commit() const { writer_->commit(); }

    // Lets other processes write to the file, with JoinedSave. Returns the path of the hidden file.
    std::string make_joinable() const;

    // Commits without checking that every byte was written.
    void commit_joined() const { writer_->commit_joined(); }

    void discard() const { writer_->discard(); }

  private:
    std::string path_;
    rust::Box<core::IncrementalWriter> writer_;
};

void register_incremental_writer(torch::Library& library);

}  // namespace safetensors_torch::layer
