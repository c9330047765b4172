/// @file
/// Open files and checkpoints, which are read tensor by tensor or in slices. Part of safetensors_torch.hpp, which
/// includes it.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "detail.hpp"
#include "index.hpp"
#include "prefetch.hpp"
#include "source.hpp"
#include "types.hpp"

namespace safetensors_torch {

/// An open file: reads names, shapes, dtypes and metadata without the data, and tensors and slices one by one.
///
/// A File is a handle: copies share one open file, which is closed with the last of them, or by close(). Tensors
/// outlive it: mapped tensors keep the mapping until the last of them is destroyed. With Backend::mmap on the CPU, two
/// reads of one tensor through one file share memory, and later reads and slices see what is written to it. Once
/// closed, or moved from, every method except is_open and close throws Error `File is closed`.
///
/// All methods are thread-safe; running reads finish after close().
class File {
  public:
    /// Opens the file at `path` and checks its header, without reading data. Tensors are loaded to `device`.
    /// Throws Error as load_file does, except for a dtype that torch does not have.
    explicit File(const std::filesystem::path& path, DeviceLike device = at::kCPU, Backend backend = Backend::mmap)
        : File(detail::open(path, backend), device) {}

    /// Opens a file that the program reads by its own means. `name` stands for the path in messages: a URL, without
    /// credentials. Tensors have memory of their own.
    /// Throws Error as above, and with what the source has thrown.
    File(std::shared_ptr<Source> source, const std::string& name, DeviceLike device = at::kCPU)
        : File(detail::open_source(std::move(source), name), device) {}

    /// Returns the names, sorted bytewise.
    std::vector<std::string> keys() const { return call("keys").to<std::vector<std::string>>(); }

    /// Returns the names, in file order.
    std::vector<std::string> offset_keys() const { return call("offset_keys").to<std::vector<std::string>>(); }

    /// Returns the metadata; empty if there is none.
    Metadata metadata() const {
        const auto metadata = call("metadata").to<detail::OptionalStrings>();
        return metadata ? detail::to_metadata(*metadata) : Metadata();
    }

    /// Returns the number of tensors.
    std::size_t size() const { return static_cast<std::size_t>(call("size").toInt()); }

    /// Returns whether there is a tensor of this name.
    bool contains(const std::string& name) const { return call("contains", name).toBool(); }

    /// Returns the shape in the header. For "F4", its last dimension is twice torch's, which packs two values in a
    /// byte. Throws Error `PATH: File does not contain tensor NAME`.
    std::vector<int64_t> shape(const std::string& name) const { return call("shape", name).toIntVector(); }

    /// Returns the shape of the tensor in torch.
    /// Throws Error `PATH: File does not contain tensor NAME`, or that torch has no such dtype.
    std::vector<int64_t> tensor_shape(const std::string& name) const {
        return call("tensor_shape", name).toIntVector();
    }

    /// Returns the format's code of the dtype: "F32", "BF16", "F8_E4M3".
    /// Throws Error `PATH: File does not contain tensor NAME`.
    std::string dtype(const std::string& name) const { return call("dtype", name).toStringRef(); }

    /// Returns the dtype of the tensor in torch.
    /// Throws Error `PATH: File does not contain tensor NAME`, or that torch has no such dtype.
    at::ScalarType tensor_dtype(const std::string& name) const { return call("tensor_dtype", name).toScalarType(); }

    /// Returns the range of the tensor's bytes, begin and end, from the start of its file.
    /// Throws Error `PATH: File does not contain tensor NAME`.
    std::pair<int64_t, int64_t> byte_range(const std::string& name) const {
        const auto range = call("byte_range", name).toTuple();
        return {range->elements()[0].toInt(), range->elements()[1].toInt()};
    }

    /// Loads one tensor, to `device` if one is given, otherwise to that of this handle.
    /// Throws Error `PATH: File does not contain tensor NAME`, that torch has no such dtype, or that reading failed.
    at::Tensor get_tensor(const std::string& name, std::optional<DeviceLike> device = std::nullopt) const {
        return call("get_tensor", name, chosen(device)).toTensor();
    }

    /// Loads several tensors in parallel, in the order of `names`; to `device` if one is given.
    /// Throws Error as get_tensor does.
    std::vector<at::Tensor> get_tensors(const std::vector<std::string>& names,
                                        std::optional<DeviceLike> device = std::nullopt) const {
        return call("get_tensors", names, chosen(device)).toTensorVector();
    }

    /// Loads the tensors whose names `filter` accepts, as in LoadOptions, in file order; others are not read. An empty
    /// std::function accepts all. Throws Error as get_tensor does.
    template <typename Filter, typename = std::enable_if_t<std::is_convertible_v<Filter, NameFilter>>>
    Tensors get_tensors(const Filter& filter, std::optional<DeviceLike> device = std::nullopt) const {
        const NameFilter takes = filter;
        std::vector<std::string> names = offset_keys();
        if (takes) {
            const auto refused = [&](const std::string& name) { return !takes(name); };
            names.erase(std::remove_if(names.begin(), names.end(), refused), names.end());
        }
        const std::vector<at::Tensor> tensors = get_tensors(names, device);
        return detail::to_tensors(std::move(names), tensors);
    }

    /// Loads all tensors, in file order. Throws Error as get_tensor does.
    Tensors get_tensors() const { return get_tensors(NameFilter()); }

    /// Returns `get_tensor(name).index(index)`, and reads only the bytes of integers, slices and an ellipsis; a
    /// dimension that a tensor indexes is read as a whole. An empty `index` takes everything. The result owns its
    /// memory, with either backend.
    ///
    /// Throws Error as get_tensor does; c10::IndexError for an integer outside its dimension, more indices than
    /// dimensions or two ellipses; c10::ValueError for a step that is not positive; Error for part of a byte.
    at::Tensor get_slice(const std::string& name, const std::vector<at::indexing::TensorIndex>& index,
                         std::optional<DeviceLike> device = std::nullopt) const {
        const detail::Box box = detail::bounding_box(index, tensor_shape(name), name);
        const at::Tensor part = call("get_slice", name, box.starts, box.stops, box.steps, chosen(device)).toTensor();
        return box.has_rest ? part.index(box.rest) : part;
    }

    /// Reads parts of tensors into tensors that exist, all with one call: on any device, with any strides, and any
    /// dtype that torch converts to. CPU tensors with the dtype of the file are read in parallel, without memory for a
    /// copy. Destinations must not overlap. Everything is checked before the first one changes.
    ///
    /// Throws Error: the file has no tensor of a name, or it has no such part; torch cannot convert it; a destination
    /// has no memory; the file cannot be read: the destinations are then unspecified.
    void read_into(const std::vector<TensorPart>& parts) const {
        std::vector<std::string> names;
        std::vector<std::vector<int64_t>> starts;
        std::vector<at::Tensor> tensors;
        for (const TensorPart& part : parts) {
            names.push_back(part.name);
            starts.push_back(part.starts);
            tensors.push_back(part.tensor);
        }
        const c10::IValue fill = call("start_fill", names, starts, tensors);
        detail::call_method(fill.toObject(), "advance", std::numeric_limits<double>::infinity());
    }

    /// Starts to read the tensors of `plan`, or all, and returns a loader that hands out each once it has landed. They
    /// have memory of their own, with either backend, and are read in file order.
    ///
    /// Throws Error: the file has no tensor of a name; torch does not have a dtype, or cannot convert it; as get_slice
    /// does for an index.
    PrefetchLoader prefetch(const PrefetchPlan& plan = {}, const PrefetchOptions& options = {}) const {
        size();  // throws if the file is closed
        std::optional<std::vector<std::string>> names;
        std::vector<std::vector<int64_t>> slices;
        std::map<std::string, detail::Index> rest;
        for (const auto& [name, index] : plan) {
            if (!names) {
                names.emplace();
            }
            names->push_back(name);
            slices.emplace_back();
            if (!index.empty()) {
                const detail::Box box = detail::bounding_box(index, tensor_shape(name), name);
                for (const auto& part : {box.starts, box.stops, box.steps}) {
                    slices.back().insert(slices.back().end(), part.begin(), part.end());
                }
                if (box.has_rest) {
                    rest.emplace(name, box.rest);
                }
            }
        }
        const detail::Object native = detail::make("PrefetchPlan");
        detail::call_method(native, "add", object_, names, slices);
        const c10::IValue loader = detail::call_method(native, "start", chosen(options.device), options.dtype,
                                                       options.buffer_bytes, options.threads);
        return {loader.toObject(), std::move(rest)};
    }

    /// Closes the file for all copies of this handle; a second call does nothing.
    void close() {
        if (object_) {
            call("close");
        }
    }

    /// Returns whether the file is open.
    bool is_open() const { return object_ && call("is_open").toBool(); }

  protected:
    /// For Checkpoint: a handle of an open file of the library.
    File(detail::Object object, at::Device device) : object_(std::move(object)), device_(device) {}

    /// For Checkpoint: calls a method of the open file.
    template <typename... Args>
    c10::IValue call(const char* method, const Args&... args) const {
        if (!object_) {
            detail::fail("File is closed", ErrorCategory::safetensor, SFT_ERROR_CLOSED);
        }
        return detail::call_method(object_, method, args...);
    }

  private:
    at::Device chosen(std::optional<DeviceLike> device) const { return device ? at::Device(*device) : device_; }

    detail::Object object_;
    at::Device device_;
};

/// Opens the file at `path`, as safe_open of Python does: `File(path, device, backend)`.
inline File safe_open(const std::filesystem::path& path, DeviceLike device = at::kCPU,
                      Backend backend = Backend::mmap) {
    return File(path, device, backend);
}

/// The tensors of one file, or of several that an index lists, opened like one File.
///
/// Opening checks the index against its files: each file contains the tensors that the index lists for it and no
/// others, unless Extra::ignore leaves those out, and the index names no file outside its directory. offset_keys and
/// get_tensors go file after file. If several files have a metadata key, the first counts. shape, dtype and byte_range
/// are those in the tensor's file.
class Checkpoint : public File {
  public:
    /// Opens `path`: a file, an index (a name that ends in `.json`), or a directory with either. In a directory, the
    /// first of these counts: `model.safetensors`; `model.safetensors.index.json`, as in Python's transformers; the
    /// only checkpoint of another name. `options` selects a variant.
    ///
    /// Throws Error: as File does, for each file; the index is malformed, names a file outside its directory, or does
    /// not match its files; a shard is missing; a directory has no checkpoint, or several; a variant of a path that is
    /// a file. The text names the index, the shard and the tensor.
    explicit Checkpoint(const std::filesystem::path& path, DeviceLike device = at::kCPU,
                        Backend backend = Backend::mmap, const CheckpointOptions& options = {})
        : File(detail::open_checkpoint(path, backend, options), device) {}

    /// Opens the checkpoint at a path of `filesystem`, which is used during the call only. The headers of several files
    /// are read at once. Throws Error as above, and with what the filesystem and its sources have thrown.
    Checkpoint(Filesystem& filesystem, const std::string& path, DeviceLike device = at::kCPU,
               const CheckpointOptions& options = {})
        : File(detail::open_checkpoint(filesystem, path, options), device) {}

    /// Returns the names of the files, relative to the directory of the checkpoint, sorted.
    std::vector<std::string> shards() const { return call("shards").to<std::vector<std::string>>(); }

    /// Returns the name of the file that contains a tensor.
    /// Throws Error `PATH: File does not contain tensor NAME`.
    std::string shard_of(const std::string& name) const { return call("shard_of", name).toStringRef(); }
};

}  // namespace safetensors_torch
