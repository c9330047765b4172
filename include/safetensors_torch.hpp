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
#include <ATen/core/Dict.h>
#include <ATen/core/class_type.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/function.h>
#include <ATen/core/stack.h>
#include <c10/core/GradMode.h>
#include <torch/nn/module.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "safetensors_torch.h"
#include "safetensors_torch/index.hpp"

namespace safetensors_torch {

/// Tensors by name. A loaded one iterates in the order of the data in the file.
using Tensors = c10::Dict<std::string, at::Tensor>;

/// The free-form text beside the tensors. Empty means none: no `__metadata__` is written, or there was none.
using Metadata = std::map<std::string, std::string>;

/// How the bytes of a file become host memory.
enum class Backend {
    /// One private copy-on-write mapping and no copy; it lives until the last tensor over it dies. Writing to a tensor
    /// never changes the file. The file must not be cut short meanwhile: touching a lost page is a SIGBUS.
    mmap,
    /// Parallel reads into memory that the tensors own. Any change of the file meanwhile ends in an error at worst.
    pread,
};

/// How a file is written.
struct SaveOptions {
    /// Whether the file is on the disk when the call returns, so that it survives a loss of power (fsync of the file
    /// and its directory). Otherwise the kernel writes it there within half a minute or so.
    bool durable = false;
};

namespace detail {

using Strings = c10::Dict<std::string, std::string>;
using OptionalStrings = std::optional<Strings>;

[[noreturn]] inline void fail(std::string message) { throw c10::Error(std::move(message), nullptr); }

// The one reference to a symbol of the library: it keeps the library among those needed under --as-needed.
inline c10::OperatorHandle find_op(const char* name) {
    auto op = c10::Dispatcher::singleton().findSchema({name, ""});
    if (!op) {
        fail(std::string("the operator ") + name + " is missing: this libsafetensors_torch (" + sft_version() +
             ") was built without libtorch, or is not of the version of safetensors_torch.hpp");
    }
    return *op;
}

inline std::string name_of(Backend backend) { return backend == Backend::pread ? "pread" : "mmap"; }

inline OptionalStrings to_dict(const Metadata& metadata) {
    if (metadata.empty()) {
        return std::nullopt;
    }
    Strings dict;
    for (const auto& [key, value] : metadata) {
        dict.insert(key, value);
    }
    return dict;
}

// An object of a class that the library registers with torch.
using Object = c10::intrusive_ptr<c10::ivalue::Object>;

template <typename... Args>
c10::IValue call_method(const Object& object, const char* method, const Args&... args) {
    torch::jit::Stack stack{c10::IValue(object), c10::IValue(args)...};
    object->type()->getMethod(method).run(stack);
    return std::move(stack.back());
}

inline Object open(const std::string& path, Backend backend) {
    static const c10::OperatorHandle op = find_op("safetensors_torch::_open");
    torch::jit::Stack stack{path, name_of(backend)};
    op.callBoxed(stack);
    return stack.back().toObject();
}

// The tensors of a module under their names in Python's state_dict, in its order, and the names that a file may lack.
struct State {
    Tensors tensors;
    std::vector<std::string> optional;
};

inline void collect_state(const torch::nn::Module& module, const std::string& prefix, State& state) {
    for (const auto& parameter : module.named_parameters(/*recurse=*/false)) {
        if (parameter.value().defined()) {
            state.tensors.insert_or_assign(prefix + parameter.key(), parameter.value());
        }
    }
    const auto buffers = module.named_buffers(/*recurse=*/false);
    for (const auto& buffer : buffers) {
        if (buffer.value().defined()) {
            state.tensors.insert_or_assign(prefix + buffer.key(), buffer.value());
        }
    }
    // The counter of the normalisation layers came late: files written before it do without, in Python too.
    if (buffers.contains("num_batches_tracked") && buffers.contains("running_mean")) {
        state.optional.push_back(prefix + "num_batches_tracked");
    }
    for (const auto& child : module.named_children()) {
        collect_state(*child.value(), prefix + child.key() + ".", state);
    }
}

}  // namespace detail

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
    static const auto op =
        detail::find_op("safetensors_torch::load_file")
            .typed<Tensors(const std::string&, at::Device, const std::string&, std::optional<bool>)>();
    return op.call(path, device, detail::name_of(backend), prefault);
}

/// Every tensor of a safetensors file whose bytes are in memory. The tensors are copies: `bytes` may go away.
///
/// A `const char*` converts to a view that ends at the first zero byte, which is not what is wanted here: pass a
/// std::string, or a pointer and a length.
///
/// Throws c10::Error as load_file does of the contents.
inline Tensors load(std::string_view bytes, at::Device device = at::kCPU) {
    static const auto op = detail::find_op("safetensors_torch::load").typed<Tensors(const at::Tensor&, at::Device)>();
    // from_blob asks for a mutable pointer; the operator only reads.
    const at::Tensor data =
        at::from_blob(const_cast<char*>(bytes.data()), {static_cast<int64_t>(bytes.size())}, at::kByte);
    return op.call(data, device);
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
                      SaveOptions options = {}) {
    static const auto op = detail::find_op("safetensors_torch::save_file")
                               .typed<void(const Tensors&, const std::string&, const detail::OptionalStrings&, bool)>();
    op.call(tensors, path, detail::to_dict(metadata), options.durable);
}

/// The bytes that save_file would write.
///
/// Throws c10::Error for the tensors that save_file refuses.
inline std::string save(const Tensors& tensors, const Metadata& metadata = {}) {
    static const c10::OperatorHandle op = detail::find_op("safetensors_torch::_plan_save");
    torch::jit::Stack stack{tensors, detail::to_dict(metadata)};
    op.callBoxed(stack);
    const auto plan = stack.back().toObject();
    std::string bytes(static_cast<std::size_t>(detail::call_method(plan, "size").toInt()), '\0');
    const auto size = static_cast<int64_t>(bytes.size());
    detail::call_method(plan, "write_into", at::from_blob(bytes.data(), {size}, at::kByte));
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
                             Backend backend = Backend::mmap) {
    static const c10::OperatorHandle op = detail::find_op("safetensors_torch::_load_state");
    const c10::NoGradGuard no_grad;
    detail::State state;
    detail::collect_state(module, "", state);
    torch::jit::Stack stack{detail::open(path, backend), state.tensors, state.optional, module.name(), strict};
    op.callBoxed(stack);
    return {stack.at(0).to<std::vector<std::string>>(), stack.at(1).to<std::vector<std::string>>()};
}

/// Saves the parameters and buffers of `module` under the names of Python's state_dict.
///
/// Of tied tensors the first name, alphabetically, whose tensor covers the whole memory is kept; the others are dropped
/// and recorded as `metadata[dropped] = kept`, unless `metadata` has that key. Tensors that are not contiguous are
/// written as if they were; with `force_contiguous` false they are refused.
///
/// Throws c10::Error: as save_file does; tied tensors of which none covers the memory.
inline void save_model(const torch::nn::Module& module, const std::string& path, const Metadata& metadata = {},
                       bool force_contiguous = true, SaveOptions options = {}) {
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

}  // namespace safetensors_torch
