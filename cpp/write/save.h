// From tensors to the bytes of a file.
#pragma once

#include <ATen/core/Dict.h>
#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpp/deadline.h"
#include "cpp/device/download.h"
#include "cpp/read/load.h"
#include "cpp/tensor_memory.h"
#include "cpp/write/aliasing.h"

namespace safetensors_torch::layer {

using Metadata = c10::Dict<std::string, std::string>;

// What a save takes beside tensors that are contiguous and share no memory.
struct SaveRules {
    // Whether tensors that are not contiguous are written as if they were, or refused.
    bool force_contiguous = false;
    // Whether one name of each group of tensors that share memory is written, or the group refused.
    bool keep_one = false;
};

// The rules for `shared`, "error" or "keep_one". Fails for another word.
SaveRules save_rules(bool force_contiguous, const std::string& shared);

// Fails where a tensor cannot be saved: not strided, shared memory, not contiguous, without data - in this order, so
// that the error is the same whichever function is asked.
//
// With `keep_one`, removes all names but one of each group that shares memory from `tensors`, and adds those to
// `metadata`, each with the name that is kept, unless it has them.
void check_saveable(NamedTensors& tensors, std::optional<Metadata>& metadata, const SaveRules& rules);

// What the core is to know of tensors: names, dtypes and shapes. Their names must live as long as this.
class Specs {
  public:
    // Fails, naming the tensor, for a dtype or a shape that the format has not.
    explicit Specs(const NamedTensors& tensors);
    Specs(const Specs&) = delete;
    Specs& operator=(const Specs&) = delete;

    rust::Slice<const core::Spec> slice() const { return {specs_.data(), specs_.size()}; }

  private:
    // All shapes in one array, which the specs point into.
    std::vector<uint64_t> dims_;
    std::vector<core::Spec> specs_;
};

// Text entries for the core; none where there is no metadata.
rust::Vec<core::Entry> entries_of(const std::optional<Metadata>& metadata);

// A save that has been checked and laid out, and that can be written: `torch.classes.safetensors_torch.PendingSave`.
class PendingSave : public torch::CustomClassHolder {
  public:
    // Checks everything and settles the layout; nothing is written yet. `path` is for the errors, empty if there is
    // none. The tensors' values are read when they are written.
    PendingSave(NamedTensors tensors, std::optional<Metadata> metadata, const std::string& path,
                const SaveRules& rules = {});

    // The bytes of the file.
    int64_t size() const;

    // Begins the file at `path`, of which all will be there or nothing. With `durable` it is on the disk once advance()
    // is done.
    void start_file(const std::string& path, bool durable);

    // Begins to write into `out`, a contiguous uint8 tensor on the CPU of exactly size() elements.
    void start_into(const at::Tensor& out);

    // Begins to write into whatever `sink` is.
    void start(std::unique_ptr<Sink> sink);

    // Goes on with what was begun until all is written, or the time is up; whether it is.
    bool advance(Deadline until);

    // The bytes that are written.
    int64_t done() const;

    // Leaves what was begun undone: no file is written, nor anything left beside it.
    void cancel();

    // All of the above in one.
    void write_file(const std::string& path, bool durable);
    void write_into(const at::Tensor& out);

    // The bytes of the file, as a one-dimensional uint8 tensor.
    at::Tensor write();

  private:
    void check_memory() const;

    NamedTensors tensors_;
    rust::Box<core::SavePlan> layout_;
    // Of each tensor.
    std::vector<TensorMemory> memory_;
    // What is under way.
    std::unique_ptr<Download> download_;
};

// Tells torch of the class.
void register_pending_save(torch::Library& library);

}  // namespace safetensors_torch::layer
