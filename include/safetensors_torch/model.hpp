/// @file
/// Loading and saving modules, torch::nn::Module and torch::jit::Module. Part of safetensors_torch.hpp, which includes
/// it.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <type_traits>
#include <unordered_set>
#include <utility>
#include <vector>

#include "detail.hpp"
#include "save.hpp"
#include "sharded.hpp"
#include "types.hpp"

namespace safetensors_torch {
namespace detail {

// The tensors of a module under the names and in the order of Python's state_dict, and the names that a file may lack.
struct State {
    Tensors tensors;
    std::vector<std::string> optional;
};

// Old files lack the counter of normalisation layers, which Python accepts too.
inline void note_counter(const std::string& prefix, bool has_counter, bool has_mean, State& state) {
    if (has_counter && has_mean) {
        state.optional.push_back(prefix + "num_batches_tracked");
    }
}

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
    note_counter(prefix, buffers.contains("num_batches_tracked"), buffers.contains("running_mean"), state);
    for (const auto& child : module.named_children()) {
        collect_state(*child.value(), prefix + child.key() + ".", state);
    }
}

inline void collect_state(const torch::jit::Module& module, const std::string& prefix, State& state) {
    for (const auto& parameter : module.named_parameters(/*recurse=*/false)) {
        state.tensors.insert_or_assign(prefix + parameter.name, parameter.value);
    }
    bool has_counter = false;
    bool has_mean = false;
    for (const auto& buffer : module.named_buffers(/*recurse=*/false)) {
        if (buffer.value.defined()) {
            state.tensors.insert_or_assign(prefix + buffer.name, buffer.value);
        }
        has_counter = has_counter || buffer.name == "num_batches_tracked";
        has_mean = has_mean || buffer.name == "running_mean";
    }
    note_counter(prefix, has_counter, has_mean, state);
    for (const auto& child : module.named_children()) {
        collect_state(child.value, prefix + child.name + ".", state);
    }
}

inline std::string class_of(const torch::nn::Module& module) { return module.name(); }

inline std::string class_of(const torch::jit::Module& module) {
    const auto name = module.type()->name();
    return name ? name->name() : "ScriptModule";
}

// Returns the state of a module under the names in a checkpoint.
template <typename Module>
State state_of(const Module& module, const std::string& prefix, const Rename& rename) {
    State state;
    collect_state(module, "", state);
    if (prefix.empty() && !rename) {
        return state;
    }
    const auto outside = [&](const std::string& name) { return prefix + (rename ? rename(name) : name); };
    State result;
    for (const auto& [inside, tensor] : state.tensors) {
        const std::string name = outside(inside);
        if (!result.tensors.insert(name, tensor).second) {
            fail("two tensors of " + class_of(module) + " are called " + name + " by `rename`, `" + inside +
                     "` and one before it: give each its own name",
                 ErrorCategory::value);
        }
    }
    for (const std::string& name : state.optional) {
        result.optional.push_back(outside(name));
    }
    return result;
}

template <typename Module>
LoadResult load_model(const Module& module, const Object& files, const LoadModelOptions& options) {
    const c10::NoGradGuard no_grad;
    const State state = state_of(module, options.prefix, options.rename);
    const Object pending = call_method(files, "start_state", Dict(state.tensors), state.optional, class_of(module),
                                       options.strict, options.prefix)
                               .toObject();
    run(pending, options.progress);
    const auto result = call_method(pending, "result").toTuple();
    return {result->elements()[0].to<std::vector<std::string>>(), result->elements()[1].to<std::vector<std::string>>()};
}

template <typename Module>
LoadResult load_model(const Module& module, const std::filesystem::path& path, const LoadModelOptions& options) {
    return load_model(module, open_checkpoint(path, options.backend, {options.variant, options.extra}), options);
}

template <typename Module>
LoadResult load_model(const Module& module, Filesystem& filesystem, const std::string& path,
                      const LoadModelOptions& options) {
    return load_model(module, open_checkpoint(filesystem, path, {options.variant, options.extra}), options);
}

// Writes the tensors of a module, or those of its optimizer.
inline void save_tensors(const Tensors& tensors, const std::filesystem::path& path, const Metadata& metadata,
                         const SaveModelOptions& options) {
    if (options.max_shard_size) {
        ShardedSaveOptions sharded;
        sharded.max_shard_size = *options.max_shard_size;
        sharded.stem = options.stem;
        sharded.force_contiguous = options.force_contiguous;
        sharded.shared = Shared::keep_one;
        sharded.durable = options.durable;
        sharded.progress = options.progress;
        save_sharded(tensors, path, metadata, sharded);
    } else {
        SaveOptions whole;
        whole.force_contiguous = options.force_contiguous;
        whole.shared = Shared::keep_one;
        whole.durable = options.durable;
        whole.progress = options.progress;
        save_file(tensors, path, metadata, whole);
    }
}

template <typename Module>
void save_model(const Module& module, const std::filesystem::path& path, const Metadata& metadata,
                const SaveModelOptions& options) {
    const c10::NoGradGuard no_grad;
    save_tensors(state_of(module, options.prefix, options.rename).tensors, path, metadata, options);
}

}  // namespace detail

/// A module, by reference, in a holder such as torch::nn::Linear, or in a std::shared_ptr. Do not store it: it refers
/// to the module.
class ModuleRef {
  public:
    /// A module by reference. Its tensors are mutable even if it is const.
    ModuleRef(const torch::nn::Module& module) : module_(module) {}
    /// The module in a holder. Throws c10::Error if the holder is empty.
    template <typename Contained>
    ModuleRef(const torch::nn::ModuleHolder<Contained>& holder) : module_(*holder) {}
    /// The module of a pointer. Throws Error for a null pointer.
    template <typename Contained, typename = std::enable_if_t<std::is_base_of_v<torch::nn::Module, Contained>>>
    ModuleRef(const std::shared_ptr<Contained>& pointer) : module_(checked(pointer.get())) {}

    /// The module.
    const torch::nn::Module& operator*() const { return module_; }

  private:
    static const torch::nn::Module& checked(const torch::nn::Module* module) {
        if (module == nullptr) {
            detail::fail("module pointer is null: pass a module", ErrorCategory::value);
        }
        return *module;
    }

    const torch::nn::Module& module_;
};

/// Loads the parameters and buffers of `module` from the checkpoint at `path`, in place, on their devices. `path` is a
/// file, an index or a directory, as for Checkpoint.
///
/// Reads directly into a tensor's memory if its dtype and layout allow, and converts or copies otherwise, without a
/// second copy of the module. The checkpoint needs only one of several tied tensors. The counter `num_batches_tracked`
/// may be absent. If a check fails, the module is unchanged. If reading fails later, or Progress throws, it is loaded
/// in part. Records no gradient.
///
/// Throws Error: as Checkpoint does; `Error(s) in loading state_dict for CLASS:` if a name is missing or unexpected and
/// `strict` is true, or if a shape or a dtype does not fit; a parameter is on the meta device (members of the module
/// refer to it, so it cannot be replaced as by Python's `assign`), or its storage is too small; a tensor is an
/// inference tensor, outside of InferenceMode; `rename` returns one name for two tensors.
inline LoadResult load_model(ModuleRef module, const std::filesystem::path& path,
                             const LoadModelOptions& options = {}) {
    return detail::load_model(*module, path, options);
}

/// The same for a TorchScript module, with all of its buffers: TorchScript does not record which ones Python left out
/// of the state_dict.
inline LoadResult load_model(torch::jit::Module& module, const std::filesystem::path& path,
                             const LoadModelOptions& options = {}) {
    return detail::load_model(module, path, options);
}

/// The same, from files that the program reads by its own means.
inline LoadResult load_model(ModuleRef module, Filesystem& filesystem, const std::string& path,
                             const LoadModelOptions& options = {}) {
    return detail::load_model(*module, filesystem, path, options);
}

inline LoadResult load_model(torch::jit::Module& module, Filesystem& filesystem, const std::string& path,
                             const LoadModelOptions& options = {}) {
    return detail::load_model(module, filesystem, path, options);
}

/// Saves the parameters and buffers of `module` under the names of Python's state_dict, to a file at `path`, or, with
/// `max_shard_size`, into the directory `path` as save_sharded does.
///
/// Tied tensors are saved as by Shared::keep_one. Tensors that are not contiguous are written as if they were; with
/// `force_contiguous` false they are refused. With `max_shard_size` the metadata gets `format` = `pt`, as by
/// save_sharded.
///
/// Throws Error: as save_file does; none of several tied tensors covers their memory; `rename` returns one name for two
/// tensors.
inline void save_model(ModuleRef module, const std::filesystem::path& path, const Metadata& metadata = {},
                       const SaveModelOptions& options = {}) {
    detail::save_model(*module, path, metadata, options);
}

/// The same without metadata of the caller.
inline void save_model(ModuleRef module, const std::filesystem::path& path, const SaveModelOptions& options) {
    detail::save_model(*module, path, {}, options);
}

/// The same for a TorchScript module, with all of its buffers.
inline void save_model(const torch::jit::Module& module, const std::filesystem::path& path,
                       const Metadata& metadata = {}, const SaveModelOptions& options = {}) {
    detail::save_model(module, path, metadata, options);
}

}  // namespace safetensors_torch
