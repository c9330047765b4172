// Internal part of optimizer.hpp, which includes it: the parameters of an optimizer, and the load of their state.
#pragma once

#include <ATen/ATen.h>
#include <torch/optim/optimizer.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include "detail.hpp"
#include "model.hpp"
#include "optimizer_kinds.hpp"
#include "types.hpp"

namespace safetensors_torch::detail {

// The names of a module's tensors in a checkpoint: several for tied ones, the first as in Python's named_parameters.
using NamesOfTensors = std::unordered_map<const void*, std::vector<std::string>>;

inline NamesOfTensors names_of(const State& module) {
    NamesOfTensors names;
    for (const auto& [name, tensor] : module.tensors) {
        names[tensor.unsafeGetTensorImpl()].push_back(name);
    }
    return names;
}

// The parameters of an optimizer, each once, with the number of its group and its names.
struct OptimizerParameter {
    at::Tensor tensor;
    std::size_t group;
    std::vector<std::string> names;
};

inline std::vector<OptimizerParameter> parameters_of(const torch::optim::Optimizer& optimizer,
                                                     const OptimizerKind& kind, const NamesOfTensors& names,
                                                     const std::string& module) {
    std::vector<OptimizerParameter> parameters;
    std::map<const void*, std::size_t> groups;
    const auto& all = optimizer.param_groups();
    for (std::size_t group = 0; group < all.size(); ++group) {
        for (std::size_t i = 0; i < all[group].params().size(); ++i) {
            const at::Tensor& tensor = all[group].params()[i];
            const std::string where = "parameter " + std::to_string(i) + " of group " + std::to_string(group) + " of " +
                                      kind.name + ", of shape " + c10::str(tensor.sizes()) + ": ";
            const auto found = names.find(tensor.unsafeGetTensorImpl());
            if (found == names.end()) {
                fail(where + module + " does not have it; pass the module whose parameters the optimizer has",
                     ErrorCategory::value);
            }
            const auto [first, is_new] = groups.emplace(tensor.unsafeGetTensorImpl(), group);
            if (!is_new && first->second != group) {
                fail(where + "group " + std::to_string(first->second) + " has it too, as \"" + found->second.front() +
                         "\"; give each parameter to one group",
                     ErrorCategory::value);
            }
            if (is_new) {
                parameters.push_back({tensor, group, found->second});
            }
        }
    }
    return parameters;
}

// Reads the state of an optimizer from an open checkpoint. The optimizer changes in apply() only.
class OptimizerLoader {
  public:
    OptimizerLoader(const OptimizerKind& kind, Object file, const std::string& path)
        : kind_(kind), file_(std::move(file)), path_(shown(path, path.size())) {
        keys_ = call_method(file_, "keys").to<std::vector<std::string>>();  // sorted
        const auto metadata = call_method(file_, "metadata").to<OptionalStrings>();
        if (metadata && metadata->contains("optimizer") && metadata->at("optimizer") != kind_.name) {
            fail_kind(metadata->at("optimizer"));
        }
    }

    // Finds the names of parameters that begin with `prefix`, and assigns them to those of the optimizer.
    LoadResult match(const std::vector<OptimizerParameter>& parameters, const std::string& prefix, bool strict) {
        std::map<std::string, std::vector<std::string>> saved;  // the parts of each parameter's state
        LoadResult result;
        for (const std::string& key : keys_) {
            const bool is_state = key.compare(0, 6, "state.") == 0;
            const std::size_t begin = is_state ? 6 : key.compare(0, 13, "param_groups.") == 0 ? 13 : 0;
            const std::size_t end = key.rfind('.');
            if (begin == 0 || end == std::string::npos || end < begin) {
                if (prefix.empty()) {
                    result.unexpected.push_back(key);
                }
            } else if (end >= begin + prefix.size() && key.compare(begin, prefix.size(), prefix) == 0) {
                auto& parts = saved[key.substr(begin, end - begin)];
                if (is_state) {
                    parts.push_back(key.substr(end + 1));
                }
            }
        }
        if (saved.empty() && !parameters.empty()) {
            fail(path_ + ": not the state of an optimizer: no name begins with \"param_groups." + prefix +
                     "\"; pass a checkpoint of save_optimizer",
                 ErrorCategory::runtime);
        }
        for (const OptimizerParameter& parameter : parameters) {
            const auto is_saved = [&](const std::string& name) { return saved.count(name) != 0; };
            const auto name = std::find_if(parameter.names.begin(), parameter.names.end(), is_saved);
            if (name == parameter.names.end()) {
                result.missing.push_back(parameter.names.front());
                kept_.push_back(parameter);
                continue;
            }
            entries_.push_back(
                {parameter.tensor, parameter.group, *name, std::move(saved[*name]), false, false, {}, {}});
            saved.erase(*name);
        }
        for (const auto& entry : saved) {
            result.unexpected.push_back(entry.first);
        }
        std::sort(result.missing.begin(), result.missing.end());
        std::sort(result.unexpected.begin(), result.unexpected.end());
        if (strict && !(result.missing.empty() && result.unexpected.empty())) {
            fail(path_ + ": its parameters are not those of the optimizer" + list("\n    missing: ", result.missing) +
                     list("\n    unexpected: ", result.unexpected) +
                     "\npass the optimizer and the module that were saved, or set `strict` to false",
                 ErrorCategory::runtime);
        }
        return result;
    }

    void read_options(const torch::optim::Optimizer& optimizer) {
        std::vector<Scalar> scalars;
        for (Entry& entry : entries_) {
            const std::string prefix = "param_groups." + entry.name + ".";
            check_kind(prefix);
            entry.options = optimizer.param_groups()[entry.group].options().clone();
            for (const OptimizerField& field : kind_.options(*entry.options)) {
                scalars.push_back({needed(prefix + field.name), field});
            }
            for (const OptimizerField& field : python_options(entry)) {
                if (contains(prefix + field.name)) {
                    scalars.push_back({prefix + field.name, field});
                }
            }
        }
        read(scalars);
        std::map<std::size_t, const Entry*> first;
        for (const Entry& entry : entries_) {
            check_python_options(entry);
            const Entry& other = *first.emplace(entry.group, &entry).first->second;
            const OptimizerFields expected = kind_.options(*other.options);
            const OptimizerFields fields = kind_.options(*entry.options);
            for (std::size_t i = 0; i < fields.size(); ++i) {
                if (!at::equal(to_tensor(fields[i]), to_tensor(expected[i]))) {
                    fail(path_ + ": `" + fields[i].name + "` of \"" + entry.name + "\" and \"" + other.name +
                             "\" differs, which are in group " + std::to_string(entry.group) +
                             " of the optimizer; make the parameter groups that were saved",
                         ErrorCategory::runtime);
                }
            }
        }
        for (const OptimizerParameter& parameter : kept_) {
            const auto entry = first.find(parameter.group);
            const auto state = optimizer.state().find(parameter.tensor.unsafeGetTensorImpl());
            if (entry != first.end() && state != optimizer.state().end()) {
                check_kept(parameter, *state->second->clone(), *entry->second->options);
            }
        }
    }

    void read_state(const Progress& progress) {
        std::vector<Scalar> scalars;
        std::vector<std::string> names;
        std::vector<std::vector<int64_t>> starts;
        std::vector<at::Tensor> tensors;
        for (Entry& entry : entries_) {
            if (entry.parts.empty() && !kind_.has_state_from_start) {
                continue;
            }
            entry.state = kind_.make_state();
            for (const OptimizerField& field : kind_.state(*entry.state, *entry.options)) {
                const auto part = std::find(entry.parts.begin(), entry.parts.end(), field.name);
                const std::string name = "state." + entry.name + "." + field.name;
                if (part == entry.parts.end() && !field.is_needed) {
                    continue;
                }
                needed(name);
                if (part != entry.parts.end()) {
                    entry.parts.erase(part);
                }
                if (!std::holds_alternative<at::Tensor*>(field.place)) {
                    scalars.push_back({name, field});
                    continue;
                }
                check_tensor(name, entry.parameter);
                // With the strides of the parameter, as a first step creates it.
                tensors.push_back(at::empty_like(entry.parameter));
                set_field(field, tensors.back(), name);
                names.push_back(name);
                starts.emplace_back(entry.parameter.dim(), 0);
            }
            if (!entry.parts.empty()) {
                fail(path_ + ": tensor \"state." + entry.name + "." + shown(entry.parts.front()) + "\": " + kind_.name +
                         " has no such state; make the optimizer that was saved",
                     ErrorCategory::runtime);
            }
        }
        read(scalars);
        run(call_method(file_, "start_fill", names, starts, tensors).toObject(), progress);
    }

    void apply(torch::optim::Optimizer& optimizer) {
        auto& state = optimizer.state();
        state.reserve(state.size() + entries_.size());
        for (Entry& entry : entries_) {
            // In place: programs keep references to the options of a group.
            const OptimizerFields from = kind_.options(*entry.options);
            const OptimizerFields to = kind_.options(optimizer.param_groups()[entry.group].options());
            for (std::size_t i = 0; i < to.size(); ++i) {
                copy_field(from[i], to[i]);
            }
            if (entry.state) {
                state[entry.parameter.unsafeGetTensorImpl()] = std::move(entry.state);
            } else {
                state.erase(entry.parameter.unsafeGetTensorImpl());
            }
        }
    }

  private:
    // A parameter of the optimizer that the checkpoint has.
    struct Entry {
        at::Tensor parameter;
        std::size_t group;
        std::string name;
        std::vector<std::string> parts;
        bool maximize = false;
        bool is_decoupled = false;
        std::unique_ptr<torch::optim::OptimizerOptions> options;
        std::unique_ptr<torch::optim::OptimizerParamState> state;
    };
    struct Scalar {
        std::string name;
        OptimizerField field;
    };

    static std::string list(const std::string& title, const std::vector<std::string>& names) {
        std::string text;
        for (const std::string& name : names) {
            text += (text.empty() ? title + "\"" : ", \"") + shown(name) + "\"";
        }
        return text;
    }

    [[noreturn]] void fail_kind(const std::string& saved) const {
        fail(path_ + ": has the state of " + shown(saved) + ", not of " + kind_.name +
                 "; make the optimizer that was saved",
             ErrorCategory::runtime);
    }

    bool contains(const std::string& name) const { return std::binary_search(keys_.begin(), keys_.end(), name); }

    // Fails if a parameter does not have this optimizer's options and has another's: not all files name their
    // optimizer.
    void check_kind(const std::string& prefix) const {
        const auto has_options = [&](const OptimizerKind& kind) {
            const auto options = kind.make_options();
            const OptimizerFields fields = kind.options(*options);
            return std::all_of(fields.begin(), fields.end(),
                               [&](const OptimizerField& field) { return contains(prefix + field.name); });
        };
        if (has_options(kind_)) {
            return;
        }
        for (const OptimizerKind& other : kOptimizerKinds) {
            if (has_options(other)) {
                fail_kind(other.name);
            }
        }
    }

    // Returns `name`, which the checkpoint must have.
    std::string needed(std::string name) const {
        if (!contains(name)) {
            fail(path_ + ": tensor \"" + name + "\": does not exist, and " + kind_.name +
                     " needs it; make the optimizer that was saved, or save it again",
                 ErrorCategory::runtime);
        }
        return name;
    }

    // Fails if a parameter that keeps its state cannot do a step with the options that its group gets.
    void check_kept(const OptimizerParameter& parameter, torch::optim::OptimizerParamState& state,
                    torch::optim::OptimizerOptions& options) const {
        for (const OptimizerField& field : kind_.state(state, options)) {
            const auto* const tensor = std::get_if<at::Tensor*>(&field.place);
            if (field.is_needed && tensor != nullptr && !(*tensor)->defined()) {
                fail(path_ + ": does not have \"" + parameter.names.front() + "\", whose state has no `" + field.name +
                         "`, which the loaded options of group " + std::to_string(parameter.group) +
                         " need; give that parameter a group of its own",
                     ErrorCategory::runtime);
            }
        }
    }

    // The options of Python's optimizers that change the result and that C++ does not have. Others are ignored.
    static OptimizerFields python_options(Entry& entry) {
        return {{"maximize", &entry.maximize}, {"decoupled_weight_decay", &entry.is_decoupled}};
    }

    void check_python_options(const Entry& entry) const {
        const std::string prefix = "param_groups." + entry.name + ".";
        if (entry.maximize) {
            fail(path_ + ": tensor \"" + prefix + "maximize\": is true, and C++ only minimizes; negate the loss, and " +
                     "save with maximize=False",
                 ErrorCategory::runtime);
        }
        const std::string kind = kind_.name;
        if (kind.compare(0, 4, "Adam") == 0 && contains(prefix + "decoupled_weight_decay") &&
            entry.is_decoupled != (kind == "AdamW")) {
            fail_kind(entry.is_decoupled ? "AdamW" : "Adam");
        }
    }

    std::vector<int64_t> shape(const std::string& name) const {
        return call_method(file_, "tensor_shape", name).toIntVector();
    }

    at::ScalarType dtype(const std::string& name) const {
        return call_method(file_, "tensor_dtype", name).toScalarType();
    }

    void check_tensor(const std::string& name, const at::Tensor& parameter) const {
        const std::vector<int64_t> saved = shape(name);
        if (parameter.sizes() != saved) {
            fail(path_ + ": tensor \"" + name + "\": its shape is " + c10::str(at::IntArrayRef(saved)) +
                     ", and that of the parameter is " + c10::str(parameter.sizes()) +
                     "; make the module that was saved",
                 ErrorCategory::runtime);
        }
        const at::ScalarType wanted = parameter.scalar_type(), type = dtype(name);
        if (at::isFloatingType(type) != at::isFloatingType(wanted) ||
            at::isComplexType(type) != at::isComplexType(wanted)) {
            fail(path_ + ": tensor \"" + name + "\": its dtype is " + at::toString(type) +
                     ", and that of the parameter " + at::toString(wanted) + "; make the module that was saved",
                 ErrorCategory::runtime);
        }
    }

    void read(const std::vector<Scalar>& scalars) const {
        std::vector<std::string> names;
        for (const Scalar& scalar : scalars) {
            const bool is_pair = std::holds_alternative<std::tuple<double, double>*>(scalar.field.place);
            const std::vector<int64_t> expected(is_pair ? 1 : 0, 2);
            const at::ScalarType type = dtype(scalar.name);
            if (shape(scalar.name) != expected || !(at::isFloatingType(type) || at::isIntegralType(type, true))) {
                fail(path_ + ": tensor \"" + scalar.name + "\": is " + at::toString(type) + " " +
                         c10::str(at::IntArrayRef(shape(scalar.name))) + ", not " +
                         (is_pair ? "two numbers" : "one number") + "; save the optimizer again",
                     ErrorCategory::runtime);
            }
            names.push_back(scalar.name);
        }
        const auto values = call_method(file_, "get_tensors", names, at::Device(at::kCPU)).toTensorVector();
        for (std::size_t i = 0; i < scalars.size(); ++i) {
            set_field(scalars[i].field, values[i], path_ + ": tensor \"" + names[i] + "\": ");
        }
    }

    const OptimizerKind& kind_;
    Object file_;
    std::string path_;
    std::vector<std::string> keys_;
    std::vector<Entry> entries_;
    std::vector<OptimizerParameter> kept_;  // those that the checkpoint does not have
};

}  // namespace safetensors_torch::detail
