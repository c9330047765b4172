// safetensors for LibTorch: load and save tensors, modules and parts of files from C++17.
//
//     #include <safetensors_torch.hpp>
//
//     auto weights = safetensors_torch::load_file("model.safetensors", at::kCUDA);
//     at::Tensor bias = weights.at("encoder.bias");
//     safetensors_torch::save_file(weights, "copy.safetensors", {{"format", "pt"}});
//
//     safetensors_torch::File file("model.safetensors");
//     at::Tensor row = file.get_slice("embedding", {7, at::indexing::Slice(0, 128)});
//
//     torch::nn::Linear layer(4, 2);
//     safetensors_torch::save_model(*layer, "linear.safetensors");
//     safetensors_torch::load_model(*layer, "linear.safetensors");
//
// Link libsafetensors_torch.so and libtorch (CMake: safetensors_torch::safetensors_torch). This header holds no
// format knowledge and keeps no state: it finds the operators that the library registers and calls them, so no C++
// symbol crosses the library's boundary. Every function may be called from several threads at once.
//
// Errors: each function throws c10::Error with a text for a person, and no backtrace, in what(). Paths are bytes, as
// the operating system takes them.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <torch/nn/module.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "safetensors_torch.h"
#include "safetensors_torch/detail.hpp"
#include "safetensors_torch/index.hpp"
#include "safetensors_torch/types.hpp"

namespace safetensors_torch {

/// Every tensor of the file at `path`, on `device`, in file order.
///
/// A tensor owns its storage, is writable and needs no grad. Two calls never give tensors that share memory.
/// On the meta device: shapes and dtypes, nothing is read but the header.
///
/// `prefault` is about Backend::mmap, whose tensors cost a page fault every few pages where they are touched first, and
/// a wait for the disk where the file is not in memory. Without a value, threads in the background bring the file in
/// while the caller goes on (a cold one only if it takes no more than half of the memory available); true has that done
/// when the call returns, false leaves it to the touch.
///
/// Throws c10::Error: `No such file or directory: PATH`; the file cannot be read; it is not a safetensors file, or is
/// cut short; a dtype that torch does not have.
inline Tensors load_file(const std::string& path, at::Device device = at::kCPU, Backend backend = Backend::mmap,
                         std::optional<bool> prefault = std::nullopt) {
    using Names = std::optional<std::vector<std::string>>;
    using Signature = Tensors(const std::string&, at::Device, const std::string&, std::optional<bool>,
                              std::optional<at::ScalarType>, const Names&);
    static const auto op = detail::find_op("safetensors_torch::load_file").typed<Signature>();
    return op.call(path, device, detail::name_of(backend), prefault, std::nullopt, std::nullopt);
}

/// The tensors of the file at `path` that `options` select, on `device`, in file order.
///
/// Where the device has streams, what its current stream does after this call sees the tensors.
///
/// Throws c10::Error: as the other load_file; a dtype that is not floating-point, or cannot be converted to;
/// c10::OutOfMemoryError that names the tensor for which the device has no memory.
inline Tensors load_file(const std::string& path, at::Device device, const LoadOptions& options) {
    return detail::load(detail::open(path, options.backend), device, options);
}

/// Every tensor of a safetensors file whose bytes are in memory. The tensors are copies: `bytes` may go away.
///
/// A `const char*` converts to a view that ends at the first zero byte, which is not what is wanted here: pass a
/// std::string, or a pointer and a length.
///
/// Throws c10::Error as load_file does of the contents.
inline Tensors load(std::string_view bytes, at::Device device = at::kCPU) {
    using Names = std::optional<std::vector<std::string>>;
    using Signature = Tensors(const at::Tensor&, at::Device, std::optional<at::ScalarType>, const Names&);
    static const auto op = detail::find_op("safetensors_torch::load").typed<Signature>();
    // from_blob asks for a mutable pointer; the operator only reads.
    const at::Tensor data =
        at::from_blob(const_cast<char*>(bytes.data()), {static_cast<int64_t>(bytes.size())}, at::kByte);
    return op.call(data, device, std::nullopt, std::nullopt);
}

/// The tensors that `options` select of a safetensors file whose bytes are in memory; its backend and prefault are of
/// no concern. The tensors are copies: `bytes` may go away.
///
/// Throws c10::Error as load_file does of the contents and the options.
inline Tensors load(std::string_view bytes, at::Device device, const LoadOptions& options) {
    static const c10::OperatorHandle op = detail::find_op("safetensors_torch::_open_bytes");
    torch::jit::Stack stack{
        at::from_blob(const_cast<char*>(bytes.data()), {static_cast<int64_t>(bytes.size())}, at::kByte)};
    op.callBoxed(stack);
    LoadOptions copies = options;
    copies.backend = Backend::pread;
    return detail::load(stack.back().toObject(), device, copies);
}

/// Writes `tensors`, from whatever device, and `metadata` to a file at `path`.
///
/// A file that is there is replaced as a whole, or stays as it was: readers and tensors mapped from it never see half
/// of the new one. The values of conjugate and negative views are written.
///
/// Throws c10::Error before anything is written: a sparse tensor; tensors that share memory (see save_model); one that
/// is not contiguous; a meta tensor; a dtype that the format does not have; the name `__metadata__`. And when the
/// operating system refuses.
inline void save_file(const Tensors& tensors, const std::string& path, const Metadata& metadata = {},
                      const SaveOptions& options = {}) {
    const auto plan = detail::plan_save(tensors, metadata, path);
    detail::call_method(plan, "start_file", path, options.durable, 0.0);
    detail::run(plan, detail::call_method(plan, "size").toInt(), options.progress);
}

/// The bytes that save_file would write.
///
/// Throws c10::Error for the tensors that save_file refuses.
inline std::string save(const Tensors& tensors, const Metadata& metadata = {}, const Progress& progress = {}) {
    const auto plan = detail::plan_save(tensors, metadata, "");
    std::string bytes(static_cast<std::size_t>(detail::call_method(plan, "size").toInt()), '\0');
    const auto size = static_cast<int64_t>(bytes.size());
    detail::call_method(plan, "start_into", at::from_blob(bytes.data(), {size}, at::kByte), 0.0);
    detail::run(plan, size, progress);
    return bytes;
}

/// A file that is open: names, shapes, dtypes and metadata without reading the data, tensors and parts of them one by
/// one.
///
/// A File is a handle: copies share one open file, and it is closed when the last copy and the last tensor mapped from
/// it are gone, or by close(). On Backend::mmap and the CPU, two reads of one tensor through one file share memory.
/// Once closed, or moved from, every method but is_open and close throws c10::Error `File is closed`. Tensors outlive
/// it.
class File {
  public:
    /// Opens the file at `path` and checks its header. Tensors will be put on `device`.
    /// Throws c10::Error as load_file does.
    explicit File(const std::string& path, at::Device device = at::kCPU, Backend backend = Backend::mmap)
        : object_(detail::open(path, backend)), device_(device) {}

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

    /// The shape that the header gives: for "F4", twice torch's last dimension, as torch packs two values in a byte.
    /// Throws c10::Error `File does not contain tensor NAME`.
    std::vector<int64_t> shape(const std::string& name) const { return call("shape", name).toIntVector(); }

    /// The shape that the tensor has in torch.
    /// Throws c10::Error `File does not contain tensor NAME`, or that torch has no such dtype.
    std::vector<int64_t> tensor_shape(const std::string& name) const {
        return call("tensor_shape", name).toIntVector();
    }

    /// The format's code for the dtype: "F32", "BF16", "F8_E4M3".
    /// Throws c10::Error `File does not contain tensor NAME`.
    std::string dtype(const std::string& name) const { return call("dtype", name).toStringRef(); }

    /// The dtype that the tensor has in torch.
    /// Throws c10::Error `File does not contain tensor NAME`, or that torch has no such dtype.
    at::ScalarType tensor_dtype(const std::string& name) const { return call("tensor_dtype", name).toScalarType(); }

    /// One tensor.
    /// Throws c10::Error `File does not contain tensor NAME`, that torch has no such dtype, or that reading failed.
    at::Tensor get_tensor(const std::string& name) const { return call("get_tensor", name, device_).toTensor(); }

    /// Several tensors, in the order of `names`, read in parallel.
    /// Throws c10::Error as get_tensor does.
    std::vector<at::Tensor> get_tensors(const std::vector<std::string>& names) const {
        return call("get_tensors", names, device_).toTensorVector();
    }

    /// Every tensor, in file order.
    /// Throws c10::Error as get_tensor does.
    Tensors get_tensors() const {
        const std::vector<std::string> names = offset_keys();
        const std::vector<at::Tensor> tensors = get_tensors(names);
        Tensors result;
        result.reserve(names.size());
        for (std::size_t i = 0; i < names.size(); ++i) {
            result.insert(names[i], tensors[i]);
        }
        return result;
    }

    /// Part of a tensor: what `get_tensor(name).index(index)` gives. For integers, slices and an ellipsis only the
    /// bytes that are needed are read; a dimension that a tensor indexes is read whole. An empty `index` takes all.
    ///
    /// Throws c10::Error as get_tensor does; c10::IndexError for an integer outside its dimension, more indices than
    /// dimensions or two ellipses; c10::ValueError for a step that is not positive; c10::Error for part of a byte.
    at::Tensor get_slice(const std::string& name, const std::vector<at::indexing::TensorIndex>& index) const {
        const detail::Box box = detail::bounding_box(index, tensor_shape(name));
        const at::Tensor part = call("get_slice", name, box.starts, box.stops, box.steps, device_).toTensor();
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

  private:
    template <typename... Args>
    c10::IValue call(const char* method, const Args&... args) const {
        if (!object_) {
            detail::fail("File is closed");
        }
        return detail::call_method(object_, method, args...);
    }

    detail::Object object_;
    at::Device device_;
};

/// What load_model found: names that the module has and the file has not, and the other way round. Both sorted.
struct LoadResult {
    std::vector<std::string> missing;
    std::vector<std::string> unexpected;
};

/// Fills the parameters and buffers of `module` from the file at `path`, in place, on the devices where they are.
///
/// Of tied tensors the file needs to have one. The counter `num_batches_tracked` may be absent. Everything is checked
/// before the first tensor changes: if a check fails the module is as it was.
///
/// Throws c10::Error: as load_file does; `Error(s) in loading state_dict for CLASS:` when `strict` and a name is
/// missing or unexpected, and, strict or not, for a shape that does not fit; a parameter on the meta device.
inline LoadResult load_model(torch::nn::Module& module, const std::string& path, bool strict = true,
                             Backend backend = Backend::mmap, const Progress& progress = {}) {
    const c10::NoGradGuard no_grad;
    detail::State state;
    detail::collect_state(module, "", state);
    const auto pending = detail::call_method(detail::open(path, backend), "start_state", state.tensors, state.optional,
                                             module.name(), strict)
                             .toObject();
    detail::run(pending, detail::call_method(pending, "total").toInt(), progress);
    const auto result = detail::call_method(pending, "result").toTuple();
    return {result->elements()[0].to<std::vector<std::string>>(), result->elements()[1].to<std::vector<std::string>>()};
}

/// Saves the parameters and buffers of `module` under the names of Python's state_dict.
///
/// Of tied tensors the first name, alphabetically, whose tensor covers the whole memory is kept; the others are dropped
/// and recorded as `metadata[dropped] = kept`, unless `metadata` has that key. Tensors that are not contiguous are
/// written as if they were; with `force_contiguous` false they are refused.
///
/// Throws c10::Error: as save_file does; tied tensors of which none covers the memory.
inline void save_model(const torch::nn::Module& module, const std::string& path, const Metadata& metadata = {},
                       bool force_contiguous = true, const SaveOptions& options = {}) {
    static const auto tied = detail::find_op("safetensors_torch::_tied")
                                 .typed<detail::Strings(const Tensors&, const std::vector<std::string>&)>();
    static const auto last_error = detail::find_op("safetensors_torch::_last_error")
                                       .typed<std::tuple<std::string, int64_t, int64_t, std::string>()>();
    const c10::NoGradGuard no_grad;
    detail::State state;
    detail::collect_state(module, "", state);
    const detail::Strings dropped = tied.call(state.tensors, {});
    Tensors kept;
    Metadata entries = metadata;
    bool has_gaps = false;
    bool all_strided = true;
    for (const auto& item : state.tensors) {
        if (const auto found = dropped.find(item.key()); found != dropped.end()) {
            entries.emplace(item.key(), found->value());
            continue;
        }
        at::Tensor tensor = item.value();
        if (tensor.layout() != at::kStrided) {
            all_strided = false;
        } else if (!tensor.is_contiguous()) {
            tensor = force_contiguous ? tensor.contiguous() : tensor;
            has_gaps = !force_contiguous;
        }
        kept.insert(item.key(), tensor);
    }
    try {
        save_file(kept, path, entries, options);
    } catch (const c10::Error& error) {
        // Layouts are checked before gaps, so with strided tensors alone the ValueError is about a gap.
        if (!has_gaps || !all_strided || std::get<0>(last_error.call()) != "ValueError") {
            throw;
        }
        detail::fail(std::string(error.what_without_backtrace()) +
                     " Or use save_model(..., force_contiguous=True), read the docs for potential caveats.");
    }
}

/// What transfers may use: until it is set, what the environment variables SAFETENSORS_TORCH_RING_BYTES (otherwise 64
/// MiB) and SAFETENSORS_TORCH_THREADS (otherwise 0) say.
inline TransferOptions transfer_options() {
    static const auto op =
        detail::find_op("safetensors_torch::_transfer_options").typed<std::tuple<int64_t, int64_t>()>();
    const auto [ring_bytes, threads] = op.call();
    return {ring_bytes, threads};
}

/// Takes effect with the next load or save. Throws c10::Error for negative numbers.
inline void set_transfer_options(const TransferOptions& options) {
    static const auto op = detail::find_op("safetensors_torch::_set_transfer_options").typed<void(int64_t, int64_t)>();
    op.call(options.ring_bytes, options.threads);
}

/// Pins host memory for transfers to come, so that the first of them need not, until there are `bytes` (but no more
/// than ring_bytes). Returns how many bytes there are: 0 where there is no accelerator that has such memory.
inline int64_t reserve_transfer_memory(int64_t bytes) {
    static const auto op = detail::find_op("safetensors_torch::_reserve_transfer_memory").typed<int64_t(int64_t)>();
    return op.call(bytes);
}

/// The bytes of pinned host memory that transfers have, in use or waiting for the next one.
inline int64_t transfer_memory() {
    static const auto op = detail::find_op("safetensors_torch::_transfer_memory").typed<int64_t()>();
    return op.call();
}

/// Frees the pinned host memory that waits for the next transfer; returns its bytes.
inline int64_t release_transfer_memory() {
    static const auto op = detail::find_op("safetensors_torch::_release_transfer_memory").typed<int64_t()>();
    return op.call();
}

}  // namespace safetensors_torch
