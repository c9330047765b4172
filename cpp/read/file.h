// The open file, or checkpoint, that Python and C++ hold: `torch.classes.safetensors_torch.File`.
#pragma once

#include <torch/custom_class.h>

#include <atomic>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpp/closable.h"
#include "cpp/model/model.h"
#include "cpp/read/checkpoint.h"
#include "cpp/read/load.h"
#include "cpp/read/pending_load.h"
#include "cpp/write/save.h"

namespace safetensors_torch::layer {

// A file that is open until close(); after that, every method but is_open() fails with "File is closed".
class File : public torch::CustomClassHolder {
  public:
    File(const std::string& path, const std::string& backend);

    // Over several files, or one, whose tensors may have the memory of its mapping if it `lends`.
    File(SharedCheckpoint checkpoint, bool lends);

    // Over the bytes of `data`, as open_bytes() takes them; nothing of it is lent.
    explicit File(const at::Tensor& data);

    std::vector<std::string> keys() const;
    std::vector<std::string> offset_keys() const;
    std::optional<Metadata> metadata() const;
    int64_t size() const;
    bool contains(const std::string& name) const;
    std::vector<int64_t> tensor_shape(const std::string& name) const;
    c10::ScalarType tensor_dtype(const std::string& name) const;
    // The shape and the dtype's code in the header.
    std::vector<int64_t> shape(const std::string& name) const;
    std::string dtype(const std::string& name) const;
    // Both with one look-up.
    std::tuple<std::vector<int64_t>, std::string> shape_and_dtype(const std::string& name) const;
    // Where the tensor's bytes begin and end, from the start of its file.
    std::tuple<int64_t, int64_t> byte_range(const std::string& name) const;
    // The names of the files of a checkpoint, and of the one that holds a tensor; nothing for a file by itself.
    std::vector<std::string> shards() const;
    std::string shard_of(const std::string& name) const;
    at::Tensor get_tensor(const std::string& name, c10::Device device) const;
    // As get_tensor on the CPU, but none of it is read ahead.
    at::Tensor view(const std::string& name) const;
    // Has the kernel read what of `part`, a part of a view of the tensor `name`, is not in memory.
    void read_ahead(const std::string& name, const at::Tensor& part) const;
    std::vector<at::Tensor> get_tensors(const std::vector<std::string>& names, c10::Device device) const;
    at::Tensor get_slice(const std::string& name, const std::vector<int64_t>& starts, const std::vector<int64_t>& stops,
                         const std::vector<int64_t>& steps, c10::Device device) const;

    // The same in steps. Tensors come in file order; without `names`, all of them.
    c10::intrusive_ptr<PendingLoad> start_load(const std::optional<std::vector<std::string>>& names, c10::Device device,
                                               std::optional<c10::ScalarType> dtype) const;
    c10::intrusive_ptr<PendingSlice> start_slice(const std::string& name, const std::vector<int64_t>& starts,
                                                 const std::vector<int64_t>& stops, const std::vector<int64_t>& steps,
                                                 c10::Device device) const;
    c10::intrusive_ptr<PendingState> start_state(const Tensors& state, const std::vector<std::string>& optional,
                                                 const std::string& class_name, bool strict,
                                                 const std::string& prefix) const;
    // Brings the pages of a mapping in: before this returns, or in the background.
    void prefault(bool wait) const;

    void close();
    bool is_open() const;

  private:
    // What is open; held by the caller for as long as it uses it, so that close() on another thread is harmless.
    SharedCheckpoint opened() const;

    // What lends memory to tensors for `device`; from then on, copies show what was written to those.
    StorageSharing lender_for(c10::Device device) const;

    mutable Closable<const Checkpoint> checkpoint_;
    StorageSharing lender_;
    // Whether tensors have the mapping's memory, or may have.
    mutable std::atomic<bool> is_lent_{false};
};

// A checkpoint that is being opened, which waits for a save that is about to put it there:
// `torch.classes.safetensors_torch.PendingFile`.
class PendingFile : public torch::CustomClassHolder {
  public:
    // For the file, the index or the directory at `path`. `variant` is one of the checkpoints of a directory, `extra`
    // what is done about tensors that an index does not list.
    PendingFile(const std::string& path, const std::string& backend, const std::optional<std::string>& variant,
                const std::string& extra);

    // Goes on until the checkpoint is open, or the time is up; whether it is open.
    bool advance(Deadline until) { return pending_->advance(until.milliseconds_left()); }

    // What advance() has opened; once.
    c10::intrusive_ptr<File> result();

  private:
    rust::Box<core::PendingOpen> pending_;
    bool lends_;
};

// Tells torch of the classes.
void register_file(torch::Library& library);

}  // namespace safetensors_torch::layer
