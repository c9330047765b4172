// The open file or checkpoint of Python and C++ programs: `torch.classes.safetensors_torch.File`.
#pragma once

#include <torch/custom_class.h>
#include <torch/library.h>

#include <atomic>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpp/closable.h"
#include "cpp/metadata.h"
#include "cpp/model/model.h"
#include "cpp/read/checkpoint.h"
#include "cpp/read/pending_load.h"
#include "cpp/read/prefetch_loader.h"
#include "cpp/tensors.h"

namespace safetensors_torch::layer {

// A file that is open until close(). After that every method except is_open() fails with "File is closed".
class File : public torch::CustomClassHolder {
  public:
    File(const std::string& path, const std::string& backend);

    // `is_mapped`: the storages of its tensors may point into the mapping.
    File(SharedCheckpoint checkpoint, bool is_mapped);

    // Over the bytes of `data`, as open_bytes() takes them; tensors are copies.
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
    // Both with one search.
    std::tuple<std::vector<int64_t>, std::string> shape_and_dtype(const std::string& name) const;
    // The same, and the range of the tensor's bytes from the start of the data.
    std::tuple<std::string, std::vector<int64_t>, std::tuple<int64_t, int64_t>> meta(const std::string& name) const;
    // The range of the tensor's bytes, begin and end, from the start of its file.
    std::tuple<int64_t, int64_t> byte_range(const std::string& name) const;
    // Whether a file is on a network filesystem.
    bool is_remote() const;
    // The names of the files of a checkpoint, and of the one that holds a tensor; empty for a single file.
    std::vector<std::string> shards() const;
    std::string shard_of(const std::string& name) const;
    at::Tensor get_tensor(const std::string& name, c10::Device device) const;
    // Returns what get_tensor returns on the CPU, without reading ahead.
    at::Tensor view(const std::string& name) const;
    // Has the kernel read the pages of `part`, a part of a view of the tensor `name`, that are not in memory.
    void read_ahead(const std::string& name, const at::Tensor& part) const;
    std::vector<at::Tensor> get_tensors(const std::vector<std::string>& names, c10::Device device) const;
    at::Tensor get_slice(const std::string& name, const std::vector<int64_t>& starts, const std::vector<int64_t>& stops,
                         const std::vector<int64_t>& steps, c10::Device device) const;

    // The same in steps. Loads the tensors of `names`, or all, in file order; `prefault` is that of Selection.
    c10::intrusive_ptr<PendingLoad> start_load(const std::optional<std::vector<std::string>>& names, c10::Device device,
                                               std::optional<c10::ScalarType> dtype,
                                               std::optional<bool> prefault) const;
    c10::intrusive_ptr<PendingSlice> start_slice(const std::string& name, const std::vector<int64_t>& starts,
                                                 const std::vector<int64_t>& stops, const std::vector<int64_t>& steps,
                                                 c10::Device device) const;
    c10::intrusive_ptr<PendingState> start_state(const Tensors& state, const std::vector<std::string>& optional,
                                                 const std::string& class_name, bool strict,
                                                 const std::string& prefix) const;
    // Starts to copy slices into targets, as FillLoader does.
    c10::intrusive_ptr<PendingFill> start_fill(const std::vector<std::string>& names,
                                               const std::vector<std::vector<int64_t>>& starts,
                                               const std::vector<at::Tensor>& targets) const;

    // Adds tensors to a plan, as PrefetchPlan::add() does.
    void add_to(PrefetchPlan& plan, const std::optional<std::vector<std::string>>& names,
                const std::vector<std::vector<int64_t>>& slices) const;

    void close();
    bool is_open() const;

  private:
    // Returns the checkpoint, which the caller keeps while it uses it: close() on another thread does not free it.
    SharedCheckpoint opened() const;

    // Returns the sharing for a load to `device`. Once CPU tensors share the mapping, later copies are read from that.
    StorageSharing sharing_for(c10::Device device) const;

    mutable Closable<const Checkpoint> checkpoint_;
    bool is_mapped_;
    // Whether tensors may share the mapping.
    mutable std::atomic<bool> is_shared_{false};
};

// The opening of a checkpoint, which waits for a save that is replacing it:
// `torch.classes.safetensors_torch.PendingFile`.
class PendingFile : public torch::CustomClassHolder {
  public:
    // `path` is a file, an index or a directory. `variant` selects one of the checkpoints of a directory; `extra` is
    // "error" or "ignore", for tensors that the index does not list.
    PendingFile(const std::string& path, const std::string& backend, const std::optional<std::string>& variant,
                const std::string& extra);

    // Returns whether the checkpoint is open; false if the deadline has passed before.
    bool advance(Deadline until);

    // No tensor is read.
    uint64_t total() const { return 0; }
    uint64_t done() const { return 0; }
    void cancel() { pending_.reset(); }

    // Returns the file, once advance() has returned true. Call it once.
    c10::intrusive_ptr<File> result();

  private:
    core::PendingOpen& pending();

    std::optional<rust::Box<core::PendingOpen>> pending_;
    bool is_mapped_;
};

void register_file(torch::Library& library);

}  // namespace safetensors_torch::layer
