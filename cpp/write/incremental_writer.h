// Files that are written tensor by tensor.
#pragma once

#include <torch/custom_class.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cpp/write/save.h"

namespace safetensors_torch::layer {

// A file whose tensors are declared first and then given in any order, by any thread:
// `torch.classes.safetensors_torch.IncrementalWriter`. Without a commit, the target stays as it was.
class IncrementalWriter : public torch::CustomClassHolder {
  public:
    // Begins the file at `path`. Of `specs`, tensors of any device, only dtypes and shapes count.
    IncrementalWriter(std::string path, const NamedTensors& specs, const std::optional<Metadata>& metadata,
                      bool durable);

    // Checks the tensor, as every save does, and writes it. Where the time is up before all of it is written, gives
    // what goes on with it; that being cancelled or dropped before its end, the tensor can be given again.
    std::optional<c10::intrusive_ptr<PendingSave>> write(const std::string& name, const at::Tensor& tensor,
                                                         Deadline until) const;

    // The names of tensors that were not given yet, in file order.
    std::vector<std::string> missing() const;

    bool is_open() const { return writer_->is_open(); }

    // Fails, and stays open, where a tensor is missing.
    void commit() const { writer_->commit(); }

    void discard() const { writer_->discard(); }

  private:
    std::string path_;
    rust::Box<core::IncrementalWriter> writer_;
};

// Tells torch of the class.
void register_incremental_writer(torch::Library& library);

}  // namespace safetensors_torch::layer
