/// @file
/// Saving and loading the state of an optimizer, torch::optim::Optimizer, to resume a training. safetensors_torch.hpp
/// does not include this header.
///
///     #include <safetensors_torch.hpp>
///     #include <safetensors_torch/optimizer.hpp>
///
///     safetensors_torch::save_model(net, "model.safetensors");
///     safetensors_torch::save_optimizer(optimizer, net, "optimizer.safetensors");
///
/// The names are those of `torch.distributed.checkpoint.state_dict` with `flatten_optimizer_state_dict`, so Python can
/// continue the training and C++ that of Python:
///
///     state.PARAMETER.exp_avg          F32, the shape of the parameter
///     state.PARAMETER.step             F32, no dimensions
///     param_groups.PARAMETER.lr        F64, no dimensions; the options of its group, for each parameter
#pragma once

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <torch/optim/optimizer.h>

#include <filesystem>
#include <string>
#include <vector>

#include "detail.hpp"
#include "model.hpp"
#include "optimizer_kinds.hpp"
#include "optimizer_loader.hpp"
#include "source.hpp"
#include "types.hpp"

namespace safetensors_torch {

/// How the state of an optimizer is saved: as a module. A directory (`max_shard_size`) has `stem` = `optimizer`.
struct SaveOptimizerOptions : SaveModelOptions {
    SaveOptimizerOptions() { stem = "optimizer"; }
};

namespace detail {

inline Tensors optimizer_tensors(const torch::optim::Optimizer& optimizer, const OptimizerKind& kind,
                                 const std::vector<OptimizerParameter>& parameters) {
    Tensors tensors;
    const auto add = [&](const std::string& prefix, const OptimizerFields& fields) {
        for (const OptimizerField& field : fields) {
            const at::Tensor value = to_tensor(field);
            if (value.defined()) {
                tensors.insert(prefix + field.name, value);
            }
        }
    };
    for (const OptimizerParameter& parameter : parameters) {
        const std::string& name = parameter.names.front();
        const auto options = optimizer.param_groups()[parameter.group].options().clone();
        add("param_groups." + name + ".", kind.options(*options));
        const auto found = optimizer.state().find(parameter.tensor.unsafeGetTensorImpl());
        if (found != optimizer.state().end()) {
            add("state." + name + ".", kind.state(*found->second->clone(), *options));
        }
    }
    return tensors;
}

template <typename Module>
void save_optimizer(const torch::optim::Optimizer& optimizer, const Module& module, const std::filesystem::path& path,
                    Metadata metadata, const SaveOptimizerOptions& options) {
    const c10::NoGradGuard no_grad;
    const OptimizerKind& kind = kind_of(optimizer);
    const NamesOfTensors names = names_of(state_of(module, options.prefix, options.rename));
    metadata["optimizer"] = kind.name;
    save_tensors(optimizer_tensors(optimizer, kind, parameters_of(optimizer, kind, names, class_of(module))), path,
                 metadata, options);
}

// Loads the state of an optimizer from the checkpoint that `open` opens.
template <typename Module, typename Open>
LoadResult load_optimizer(torch::optim::Optimizer& optimizer, const Module& module, const Open& open,
                          const std::string& path, const LoadModelOptions& options) {
    const c10::InferenceMode normal(false);  // a step, later, changes the state in place
    const c10::NoGradGuard no_grad;
    const OptimizerKind& kind = kind_of(optimizer);
    const NamesOfTensors names = names_of(state_of(module, options.prefix, options.rename));
    const auto parameters = parameters_of(optimizer, kind, names, class_of(module));
    OptimizerLoader loader(kind, open(CheckpointOptions{options.variant, options.extra}), path);
    LoadResult result = loader.match(parameters, options.prefix, options.strict);
    loader.read_options(optimizer);
    loader.read_state(options.progress);
    loader.apply(optimizer);
    return result;
}

template <typename Module>
LoadResult load_optimizer(torch::optim::Optimizer& optimizer, const Module& module, const std::filesystem::path& path,
                          const LoadModelOptions& options) {
    const auto open = [&](const CheckpointOptions& how) { return open_checkpoint(path, options.backend, how); };
    return load_optimizer(optimizer, module, open, path.native(), options);
}

template <typename Module>
LoadResult load_optimizer(torch::optim::Optimizer& optimizer, const Module& module, Filesystem& filesystem,
                          const std::string& path, const LoadModelOptions& options) {
    const auto open = [&](const CheckpointOptions& how) { return open_checkpoint(filesystem, path, how); };
    return load_optimizer(optimizer, module, open, path, options);
}

}  // namespace detail

/// Loads the state of `optimizer` from the checkpoint at `path`: what each parameter has, and the options of its group,
/// such as the learning rate. `module` has the names of the parameters; the optimizer's parameters must be among its
/// own. `path` and `options` are as for load_model; to keep an option of the program, set it again after the load.
///
/// The state is that of the checkpoint: a parameter without one there has none afterwards, as one that never had a
/// gradient. Tensors are on the device of their parameter, with its dtype and strides. Options are changed in place.
/// Everything is checked and read before the first change, so the optimizer is unchanged if a call fails.
///
/// Returns the names of parameters that only the optimizer or only the checkpoint has. With `strict` false, the former
/// keep their state, and their options if the checkpoint has no parameter of their group. Options that only Python has
/// are ignored, such as `foreach` and `fused`, and what a scheduler adds.
///
/// Throws Error: as Checkpoint does; the checkpoint has the state of another optimizer, or none; names of parameters
/// are missing or unexpected and `strict` is true; a shape does not fit; an option is not a number; parameters of
/// one group have different options; the loaded options do not fit the state of a parameter that keeps it; `maximize`
/// is true; the module does not have a parameter; two groups have one parameter; the optimizer is none of Adagrad,
/// Adam, AdamW, RMSprop and SGD, or a class derived from one.
inline LoadResult load_optimizer(torch::optim::Optimizer& optimizer, ModuleRef module,
                                 const std::filesystem::path& path, const LoadModelOptions& options = {}) {
    return detail::load_optimizer(optimizer, *module, path, options);
}

/// The same for the parameters of a TorchScript module.
inline LoadResult load_optimizer(torch::optim::Optimizer& optimizer, const torch::jit::Module& module,
                                 const std::filesystem::path& path, const LoadModelOptions& options = {}) {
    return detail::load_optimizer(optimizer, module, path, options);
}

/// The same, from files that the program reads by its own means.
inline LoadResult load_optimizer(torch::optim::Optimizer& optimizer, ModuleRef module, Filesystem& filesystem,
                                 const std::string& path, const LoadModelOptions& options = {}) {
    return detail::load_optimizer(optimizer, *module, filesystem, path, options);
}

inline LoadResult load_optimizer(torch::optim::Optimizer& optimizer, const torch::jit::Module& module,
                                 Filesystem& filesystem, const std::string& path,
                                 const LoadModelOptions& options = {}) {
    return detail::load_optimizer(optimizer, module, filesystem, path, options);
}

/// Saves the state of `optimizer` and the options of its groups, under the names of the parameters in `module`, to a
/// file at `path`, or, with `max_shard_size`, into the directory `path` as save_sharded does.
///
/// A parameter that has no gradient yet has no state, only options. Tied parameters have one state, under the first of
/// their names, as in Python's named_parameters. The metadata gets `optimizer` = the class, such as `AdamW`. A group
/// without parameters is not saved.
///
/// Throws Error: as save_file does; the module does not have a parameter; two groups have one parameter; the optimizer
/// is not one that load_optimizer takes.
inline void save_optimizer(const torch::optim::Optimizer& optimizer, ModuleRef module,
                           const std::filesystem::path& path, const Metadata& metadata = {},
                           const SaveOptimizerOptions& options = {}) {
    detail::save_optimizer(optimizer, *module, path, metadata, options);
}

/// The same without metadata of the caller.
inline void save_optimizer(const torch::optim::Optimizer& optimizer, ModuleRef module,
                           const std::filesystem::path& path, const SaveOptimizerOptions& options) {
    detail::save_optimizer(optimizer, *module, path, {}, options);
}

/// The same for the parameters of a TorchScript module.
inline void save_optimizer(const torch::optim::Optimizer& optimizer, const torch::jit::Module& module,
                           const std::filesystem::path& path, const Metadata& metadata = {},
                           const SaveOptimizerOptions& options = {}) {
    detail::save_optimizer(optimizer, module, path, metadata, options);
}

}  // namespace safetensors_torch
