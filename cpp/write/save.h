// From tensors to the bytes of a file.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpp/deadline.h"
#include "cpp/device/download.h"
#include "cpp/metadata.h"
#include "cpp/tensor_memory.h"
#include "cpp/tensors.h"
#include "cpp/write/save_checks.h"

namespace safetensors_torch::layer {

// Names, dtypes and shapes of tensors for the core. The names must outlive this.
class Specs {
  public:
    // Fails, naming the tensor, for a dtype or a shape that the format does not have.
    explicit Specs(const NamedTensors& tensors);
    Specs(const Specs&) = delete;
    Specs& operator=(const Specs&) = delete;

    rust::Slice<const core::Spec> slice() const { return {specs_.data(), specs_.size()}; }

  private:
    // All shapes in one array, which the specs point into.
    std::vector<uint64_t> dims_;
    std::vector<core::Spec> specs_;
};

// A save that is checked and laid out: `torch.classes.safetensors_torch.PendingSave`.
//
// It is written by advance() once it has a target. The tensors' values are read then.
class PendingSave : public torch::CustomClassHolder {
  public:
    using SinkMaker = std::function<std::unique_ptr<Sink>()>;

    // Checks everything and settles the layout; writes nothing. `path` is for the errors, empty if there is none.
    PendingSave(NamedTensors tensors, std::optional<Metadata> metadata, const std::string& path,
                const SaveRules& rules = {});

    // Sets the target: the file at `path`, replaced at the end or not at all. With `durable`, advance() returns true
    // only once it is on the disk.
    void set_file(const std::string& path, bool durable);

    // Sets the target: `out`, a contiguous uint8 tensor on the CPU of exactly total() elements.
    void set_memory(const at::Tensor& out);

    // Sets the target: a sink, which the first step makes.
    void set_sink(SinkMaker make_sink);

    // Writes until everything is written or the deadline has passed; returns whether everything is.
    bool advance(Deadline until);

    // The bytes of the file, and those that are written.
    uint64_t total() const { return plan_->total_bytes(); }
    uint64_t done() const;

    // Returns whether all bytes are in host memory as they will be in the file.
    bool is_on_host() const;

    // Undoes an unfinished save: leaves no new file behind. Forgets the target.
    void cancel();

    // Writes everything, and forgets the target.
    void finish();

  protected:
    const NamedTensors& tensors() const { return tensors_; }

    // Returns the index in tensors() of the one that is written as number `place`.
    size_t tensor_at(size_t place) const { return plan_->tensor(place); }

  private:
    void check_memory() const;

    NamedTensors tensors_;
    rust::Box<core::SavePlan> plan_;
    // Of each tensor.
    std::vector<TensorMemory> memory_;
    SinkMaker make_sink_;
    // From the first step on.
    std::unique_ptr<Download> download_;
};

void register_pending_save(torch::Library& library);

}  // namespace safetensors_torch::layer
