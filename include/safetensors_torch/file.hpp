/// @file
/// Files and checkpoints that stay open, to be read tensor by tensor or in part. Part of safetensors_torch.hpp, which
/// includes it.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "detail.hpp"
#include "index.hpp"
#include "types.hpp"

namespace safetensors_torch {

/// A file that is open: names, shapes, dtypes and metadata without reading the data, tensors and parts of them one by
/// one.
///
/// A File is a handle: copies share one open file, which is closed with the last of them, or by close(). Tensors
/// outlive it: those that are mapped keep the mapping, until the last of them is gone. On Backend::mmap and the CPU,
/// two reads of one tensor through one file share memory, and what is written to it shows in later reads and slices.
/// Once closed, or moved from, every method but is_open and close throws Error `File is closed`.
///
/// All methods may be called from several threads at once; close() lets reads that are under way end.
class File {
  public:
    /// Opens the file at `path` and checks its header; no data is read. Tensors will be put on `device`.
    /// Throws Error as load_file does, but for a dtype that torch does not have.
    explicit File(const std::string& path, at::Device device = at::kCPU, Backend backend = Backend::mmap)
        : File(detail::open(path, backend), device) {}

    /// The names, sorted bytewise.
    std::vector<std::string> keys() const { return call("keys").to<std::vector<std::string>>(); }

    /// The names, in the order of the data in the file.
    std::vector<std::string> offset_keys() const { return call("offset_keys").to<std::vector<std::string>>(); }

    /// The metadata; empty if there is none.
    Metadata metadata() const {
        Metadata result;
        if (const auto found = call("metadata"); !found.isNone()) {
            for (const auto& entry : found.to<detail::Strings>()) {
                result.emplace(entry.key(), entry.value());
            }
        }
        return result;
    }

    /// The number of tensors.
    std::size_t size() const { return static_cast<std::size_t>(call("size").toInt()); }

    /// Whether there is a tensor of this name.
    bool contains(const std::string& name) const { return call("contains", name).toBool(); }

    /// The shape that the header gives, in elements: for "F4", twice torch's last dimension, as torch packs two values
    /// in a byte. Throws Error `PATH: File does not contain tensor NAME`.
    std::vector<int64_t> shape(const std::string& name) const { return call("shape", name).toIntVector(); }

    /// The shape that the tensor has in torch.
    /// Throws Error `PATH: File does not contain tensor NAME`, or that torch has no such dtype.
    std::vector<int64_t> tensor_shape(const std::string& name) const {
        return call("tensor_shape", name).toIntVector();
    }

    /// The format's code for the dtype: "F32", "BF16", "F8_E4M3".
    /// Throws Error `PATH: File does not contain tensor NAME`.
    std::string dtype(const std::string& name) const { return call("dtype", name).toStringRef(); }

    /// The dtype that the tensor has in torch.
    /// Throws Error `PATH: File does not contain tensor NAME`, or that torch has no such dtype.
    at::ScalarType tensor_dtype(const std::string& name) const { return call("tensor_dtype", name).toScalarType(); }

    /// Where the tensor's bytes are: from the first to behind the last, in bytes from the start of its file.
    /// Throws Error `PATH: File does not contain tensor NAME`.
    std::pair<int64_t, int64_t> byte_range(const std::string& name) const {
        const auto range = call("byte_range", name).toTuple();
        return {range->elements()[0].toInt(), range->elements()[1].toInt()};
    }

    /// One tensor, on `device` if one is given, otherwise on that of this handle.
    /// Throws Error `PATH: File does not contain tensor NAME`, that torch has no such dtype, or that reading failed.
    at::Tensor get_tensor(const std::string& name, std::optional<at::Device> device = std::nullopt) const {
        return call("get_tensor", name, device.value_or(device_)).toTensor();
    }

    /// Several tensors, in the order of `names`, read in parallel; on `device` if one is given.
    /// Throws Error as get_tensor does.
    std::vector<at::Tensor> get_tensors(const std::vector<std::string>& names,
                                        std::optional<at::Device> device = std::nullopt) const {
        return call("get_tensors", names, device.value_or(device_)).toTensorVector();
    }

    /// Every tensor for whose name `filter`, a function as in LoadOptions, is true, in file order; others are not read.
    /// An empty std::function takes all. Throws Error as get_tensor does.
    template <typename Filter, typename = std::enable_if_t<std::is_convertible_v<Filter, NameFilter>>>
    Tensors get_tensors(const Filter& filter, std::optional<at::Device> device = std::nullopt) const {
        const NameFilter takes = filter;
        std::vector<std::string> names = offset_keys();
        if (takes) {
            const auto refused = [&](const std::string& name) { return !takes(name); };
            names.erase(std::remove_if(names.begin(), names.end(), refused), names.end());
        }
        const std::vector<at::Tensor> tensors = get_tensors(names, device);
        Tensors result;
        result.reserve(names.size());
        for (std::size_t i = 0; i < names.size(); ++i) {
            result.insert(names[i], tensors[i]);
        }
        return result;
    }

    /// Every tensor, in file order. Throws Error as get_tensor does.
    Tensors get_tensors() const { return get_tensors(NameFilter()); }

    /// Part of a tensor: what `get_tensor(name).index(index)` gives. For integers, slices and an ellipsis only the
    /// bytes that are needed are read; a dimension that a tensor indexes is read whole. An empty `index` takes all. The
    /// result has memory of its own, on either backend.
    ///
    /// Throws Error as get_tensor does; c10::IndexError for an integer outside its dimension, more indices than
    /// dimensions or two ellipses; c10::ValueError for a step that is not positive; Error for part of a byte.
    at::Tensor get_slice(const std::string& name, const std::vector<at::indexing::TensorIndex>& index,
                         std::optional<at::Device> device = std::nullopt) const {
        const detail::Box box = detail::bounding_box(index, tensor_shape(name), name);
        const at::Tensor part =
            call("get_slice", name, box.starts, box.stops, box.steps, device.value_or(device_)).toTensor();
        return box.has_rest ? part.index(box.rest) : part;
    }

    /// Closes the file for every copy of this handle; a second call does nothing.
    void close() {
        if (object_) {
            call("close");
        }
    }

    /// Whether the file is open.
    bool is_open() const { return object_ && call("is_open").toBool(); }

  protected:
    /// For Checkpoint: a handle of what the library has opened.
    File(detail::Object object, at::Device device) : object_(std::move(object)), device_(device) {}

    /// For Checkpoint: calls a method of what is open.
    template <typename... Args>
    c10::IValue call(const char* method, const Args&... args) const {
        if (!object_) {
            detail::fail("File is closed", ErrorCategory::safetensor, SFT_ERROR_CLOSED);
        }
        return detail::call_method(object_, method, args...);
    }

  private:
    detail::Object object_;
    at::Device device_;
};

/// The tensors of one file, or of several that an index lists, opened like one File.
///
/// The index is checked against its files when they are opened: they hold the tensors that it lists, where it says so,
/// and no others, unless Extra::ignore leaves those out; and it names no file outside its directory. offset_keys and
/// get_tensors go file after file; of the metadata of several files the first to have a key counts; shape, dtype and
/// byte_range are those in a tensor's own file.
class Checkpoint : public File {
  public:
    /// Opens `path`: a file, an index (a name that ends in `.json`), or a directory with either. In a directory
    /// `model.safetensors` counts first, then `model.safetensors.index.json`, as in Python's transformers, then the
    /// only one of another name. `options` chooses a variant.
    ///
    /// Throws Error as File does, for each file; an index that is malformed, names a file outside its directory, or
    /// does not fit its files; a shard that is missing; a directory with no checkpoint, or with several; a variant of a
    /// path that is a file. The text names the index, the shard and the tensor.
    explicit Checkpoint(const std::string& path, at::Device device = at::kCPU, Backend backend = Backend::mmap,
                        const CheckpointOptions& options = {})
        : File(detail::open_checkpoint(path, backend, options), device) {}

    /// The names of the files, from the directory of the checkpoint, sorted.
    std::vector<std::string> shards() const { return call("shards").to<std::vector<std::string>>(); }

    /// The name of the file that holds a tensor.
    /// Throws Error `PATH: File does not contain tensor NAME`.
    std::string shard_of(const std::string& name) const { return call("shard_of", name).toStringRef(); }
};

}  // namespace safetensors_torch
