/// @file
/// The constants of packages that AOTInductor compiled, from safetensors files. Include it in addition to
/// safetensors_torch.hpp, which does not include it. Needs torch 2.8 or later.
///
///     safetensors_torch::PackageLoader model("gpt.pt2");
///     safetensors_torch::load_constants(model, "first/");
///     at::Tensor logits = model.run({tokens}).at(0);
///     safetensors_torch::load_constants(model, "second/");  // while other threads run the model
#pragma once

#include <torch/version.h>

// Before 2.8, a container cannot use tensors in place, does not tell shapes, and folds the old constants after a swap.
#if TORCH_VERSION_MAJOR < 2 || (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 8)
#error \
    "safetensors_torch/aoti.hpp needs torch 2.8 or later; with an older one, load a torch::nn::Module with load_model"
#endif

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <functional>
#include <iterator>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "aoti_package.hpp"
#include "detail.hpp"
#include "model.hpp"
#include "source.hpp"
#include "tensors.hpp"
#include "types.hpp"

namespace safetensors_torch {

/// How the constants of a package are loaded. `strict`, `prefix`, `rename` and the others are as for a module.
struct LoadConstantsOptions : LoadModelOptions {
    /// Whether floating-point tensors are converted to the dtypes that the package was compiled for. Otherwise, another
    /// dtype is an error.
    bool convert = false;
    /// Accepts names of constants that the checkpoint may lack, such as those of buffers that are not persistent. They
    /// keep the value that the package has.
    NameFilter optional = {};
    /// Called when the new constants are ready, right before the package uses them: several packages can wait for each
    /// other here. An exception keeps the old constants, and reaches the caller.
    std::function<void()> before_swap = {};
};

/// An AOTIModelPackageLoader that lets load_constants go before waiting runs, and that frees its constants when it is
/// destroyed.
///
/// With torch's own class, a swap of constants waits until no run happens to be in progress, which can take forever if
/// several threads run the package all the time. And before torch 2.15, that class never frees constants that it has
/// not copied, except for those that load_constants replaces.
class PackageLoader : public torch::inductor::AOTIModelPackageLoader {
  public:
    using torch::inductor::AOTIModelPackageLoader::AOTIModelPackageLoader;
    PackageLoader(const PackageLoader&) = delete;
    PackageLoader& operator=(const PackageLoader&) = delete;
    ~PackageLoader() { detail::release(detail::managed_constants(*get_runner())); }

    /// Runs the package, as torch's class does.
    std::vector<at::Tensor> run(const std::vector<at::Tensor>& inputs, void* stream = nullptr) {
        wait();
        return torch::inductor::AOTIModelPackageLoader::run(inputs, stream);
    }
    /// Runs the package, and takes its inputs.
    std::vector<at::Tensor> boxed_run(std::vector<at::Tensor>&& inputs, void* stream = nullptr) {
        wait();
        return torch::inductor::AOTIModelPackageLoader::boxed_run(std::move(inputs), stream);
    }

  private:
    friend class PackageRef;

    // Waits for the end of a swap.
    void wait() { const std::lock_guard<std::mutex> lock(swapping_); }

    std::mutex swapping_;
};

/// A PackageLoader or torch's own loader, by reference. Do not store it: it refers to the loader.
class PackageRef {
  public:
    /// Torch's own loader.
    PackageRef(torch::inductor::AOTIModelPackageLoader& loader) : loader_(loader) {}
    /// A loader in which swaps go first.
    PackageRef(PackageLoader& loader) : loader_(loader), swapping_(&loader.swapping_) {}

    /// The loader.
    torch::inductor::AOTIModelPackageLoader& operator*() const { return loader_; }
    /// What swaps lock; null for torch's own loader.
    std::mutex* swapping() const { return swapping_; }

  private:
    torch::inductor::AOTIModelPackageLoader& loader_;
    std::mutex* swapping_ = nullptr;
};

namespace detail {

// The constants of a package that are loaded, and their memory, as the tensors of a module.
struct ConstantsModule {
    Tensors memory;
};

inline std::string class_of(const ConstantsModule&) { return "AOTIModelPackageLoader"; }

inline void collect_state(const ConstantsModule& module, const std::string&, State& state) {
    state.tensors = module.memory;
}

// Returns the name of the counter of a normalisation layer, which evaluation does not use, beside its mean.
inline std::optional<std::string> counter_beside(const std::string& fqn) {
    const std::string mean = "running_mean";
    if (fqn.size() < mean.size() || fqn.compare(fqn.size() - mean.size(), mean.size(), mean) != 0) {
        return std::nullopt;
    }
    return fqn.substr(0, fqn.size() - mean.size()) + "num_batches_tracked";
}

inline bool begins_with(const std::string& text, const std::string& start) {
    return text.compare(0, start.size(), start) == 0;
}

// Compares the names of a checkpoint with those of a package, and fails as `options` say.
inline LoadResult compare_names(const Package& package, const std::vector<std::string>& names, const Rename& outside,
                                const std::string& origin, const LoadConstantsOptions& options) {
    const std::unordered_set<std::string> all(names.begin(), names.end());
    std::unordered_set<std::string> used;
    LoadResult result;
    for (const Constant& constant : package.constants()) {
        const std::string name = outside(constant.fqn);
        used.insert(name);
        if (all.count(name) == 0 && !constant.is_of_program && !(options.optional && options.optional(constant.fqn))) {
            result.missing.push_back(name);
        }
        if (const auto counter = counter_beside(constant.fqn)) {
            used.insert(outside(*counter));
        }
    }
    std::copy_if(names.begin(), names.end(), std::back_inserter(result.unexpected),
                 [&](const std::string& name) { return begins_with(name, options.prefix) && used.count(name) == 0; });
    std::string faults;
    for (auto* list : {&result.missing, &result.unexpected}) {
        std::sort(list->begin(), list->end());
        std::string text;
        for (const std::string& name : *list) {
            text += (text.empty() ? "\"" : ", \"") + name + "\"";
        }
        if (!list->empty()) {
            faults += (list == &result.missing ? "\n    Missing" : "\n    Unexpected") +
                      std::string(" key(s) in state_dict: ") + text;
        }
    }
    if (options.strict && !faults.empty()) {
        fail("Error(s) in loading " + origin + " for AOTIModelPackageLoader:" + faults +
                 "\n    The package has the names of get_constant_fqns(): give a `prefix` or a `rename`, or set "
                 "`strict` "
                 "to false. It lacks tensors that the program does not use, and small ones, which are part of the code "
                 "unless it was compiled with always_keep_tensor_constants.",
             ErrorCategory::runtime);
    }
    return result;
}

// Returns the name of a constant in the files. They have one of several tied tensors, the package too, and it may be
// another one: save_model recorded which.
inline Rename names_in(const Object& files, const Package& package, const LoadConstantsOptions& options) {
    const Rename plain = [&options](const std::string& fqn) {
        return options.prefix + (options.rename ? options.rename(fqn) : fqn);
    };
    const auto metadata = call_method(files, "metadata").to<OptionalStrings>();
    if (!metadata) {
        return plain;
    }
    std::unordered_set<std::string> taken;
    for (const Constant& constant : package.constants()) {
        taken.insert(plain(constant.fqn));
    }
    return [files, plain, metadata, taken, &options](const std::string& fqn) {
        const auto contains = [&](const std::string& name) { return call_method(files, "contains", name).toBool(); };
        const std::string name = plain(fqn);
        const auto entry = metadata->find(name);
        if (entry == metadata->end() || contains(name)) {
            return name;
        }
        const std::string& kept = entry->value();
        const bool is_free = taken.count(kept) == 0 && begins_with(kept, options.prefix) && contains(kept);
        return is_free ? kept : name;
    };
}

inline LoadResult load_constants(PackageRef loader, const Object& files, const std::string& origin,
                                 const LoadConstantsOptions& options) {
    const c10::NoGradGuard no_grad;
    Package package(*loader, loader.swapping());
    const Rename outside = names_in(files, package, options);
    const auto names = call_method(files, "offset_keys").to<std::vector<std::string>>();
    const std::unordered_set<std::string> all(names.begin(), names.end());
    const auto shape_of = [&](const std::string& name) {
        return call_method(files, "tensor_shape", name).toIntVector();
    };
    Candidates candidates(origin, options.convert);
    for (const Constant& constant : package.constants()) {
        const std::string name = outside(constant.fqn);
        if (all.count(name) != 0) {
            const at::ScalarType dtype = call_method(files, "tensor_dtype", name).toScalarType();
            candidates.add(constant, name, dtype, shape_of(name), constant.device);
        }
    }
    candidates.check();
    LoadResult result = compare_names(package, names, outside, origin, options);

    std::vector<at::Tensor> tensors;
    std::vector<std::pair<at::Tensor, at::Tensor>> copies;  // of constants that have one tensor in the files
    ConstantsModule module;
    for (const Constant& constant : package.constants()) {
        const std::string name = outside(constant.fqn);
        tensors.push_back(all.count(name) != 0 ? constant.make_memory(shape_of(name)) : at::Tensor());
        if (tensors.back().defined()) {
            const auto [entry, is_new] = module.memory.insert(name, tensors.back());
            if (!is_new) {
                copies.emplace_back(tensors.back(), entry->second);
            }
        }
    }
    package.check_complete(tensors, origin);
    LoadModelOptions load = options;
    load.strict = false;
    load.prefix.clear();
    load.rename = nullptr;
    load_model(module, files, load);
    for (const auto& [tensor, source] : copies) {
        tensor.copy_(source);
    }
    package.replace(tensors, options.before_swap);
    return result;
}

// Returns the tensor with the dtype and the strides of the constant, in memory that nothing frees. If the strides are
// unknown, those of the tensor may be the right ones.
inline at::Tensor as_compiled(const Package& package, const Constant& constant, const at::Tensor& tensor) {
    const bool has_strides =
        constant.value.defined() ? tensor.strides() == constant.value.strides() : tensor.is_non_overlapping_and_dense();
    if (tensor.scalar_type() == constant.dtype && has_strides && !package.is_active(tensor)) {
        return tensor;
    }
    at::Tensor copy = constant.value.defined() ? constant.make_memory(tensor.sizes())
                                               : at::empty_like(tensor, tensor.options().dtype(constant.dtype));
    copy.copy_(tensor);
    return copy;
}

inline LoadResult load_constants(PackageRef loader, const Tensors& tensors, const LoadConstantsOptions& options) {
    const c10::NoGradGuard no_grad;
    Package package(*loader, loader.swapping());
    const std::string origin = "tensors in memory";
    const auto outside = [&](const std::string& fqn) {
        return options.prefix + (options.rename ? options.rename(fqn) : fqn);
    };
    Candidates candidates(origin, options.convert);
    std::vector<at::Tensor> used;
    for (const Constant& constant : package.constants()) {
        const auto found = tensors.find(outside(constant.fqn));
        used.emplace_back();
        if (found != tensors.end()) {
            const at::Tensor& tensor = found->second;
            if (!tensor.defined() || tensor.layout() != at::kStrided || tensor.is_conj() || tensor.is_neg()) {
                fail("tensor \"" + found->first + "\": undefined, sparse, or a lazy conjugate; pass a dense tensor",
                     ErrorCategory::value);
            }
            candidates.add(constant, found->first, tensor.scalar_type(), tensor.sizes(), tensor.device());
            used.back() = tensor;
        }
    }
    candidates.check();
    LoadResult result = compare_names(package, tensors.keys(), outside, origin, options);
    package.check_complete(used, origin);
    for (std::size_t i = 0; i < used.size(); ++i) {
        if (used[i].defined()) {
            used[i] = as_compiled(package, package.constants()[i], used[i]);
        }
    }
    package.replace(used, options.before_swap);
    return result;
}

}  // namespace detail

/// Loads the constants of a package from the checkpoint at `path`, to the package's device. `path` is a file, an index
/// or a directory, as for Checkpoint. The constants of a package are the parameters and buffers that its code uses.
/// Names are those of the exported module (get_constant_fqns).
///
/// Other threads may run the package at the same time, except with run_single_threaded: the new constants are read
/// beside the old ones, and then swapped, so each run uses either the old or the new ones. Then the old ones are freed.
/// If anything fails, the old ones stay. One thread at a time may load. A package without weights must not be run
/// before its first load; that one, and loads with run_single_threaded, change the constants in place at the end.
///
/// The package uses the memory into which the constants are read, so they are in memory once; no one else needs to
/// keep it. Use a PackageLoader: see there.
///
/// A package without weights does not tell for which strides it was compiled; they must be those of contiguous tensors.
///
/// The checkpoint may lack tensors that are neither parameters nor buffers; they keep their values, and so do buffers
/// and parameters that `optional` accepts, or, if `strict` is false, any that are missing.
///
/// Throws Error: as Checkpoint does; a dtype or a shape differs from those that the package was compiled for; a name is
/// missing or unexpected, and `strict` is true; a constant is missing, and has no value in the package.
inline LoadResult load_constants(PackageRef package, const std::filesystem::path& path,
                                 const LoadConstantsOptions& options = {}) {
    const detail::Object files = detail::open_checkpoint(path, options.backend, {options.variant, options.extra});
    return detail::load_constants(package, files, path.native(), options);
}

/// The same, from files that the program reads by its own means.
inline LoadResult load_constants(PackageRef package, Filesystem& filesystem, const std::string& path,
                                 const LoadConstantsOptions& options = {}) {
    const detail::Object files = detail::open_checkpoint(filesystem, path, {options.variant, options.extra});
    return detail::load_constants(package, files, path, options);
}

/// The same with tensors that are in memory, on the package's device. The package uses their memory, if they are laid
/// out as it was compiled: nothing else may write to it. A package without weights takes their strides as they are.
///
/// Throws Error as above, and if a tensor is on another device.
inline LoadResult load_constants(PackageRef package, const Tensors& tensors, const LoadConstantsOptions& options = {}) {
    return detail::load_constants(package, tensors, options);
}

}  // namespace safetensors_torch
