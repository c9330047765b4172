// Internal part of optimizer.hpp, which includes it: the options and the state of each optimizer, by torch's names.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Type.h>
#include <torch/optim/adagrad.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/sgd.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <typeinfo>
#include <utility>
#include <variant>
#include <vector>

#include "detail.hpp"

namespace safetensors_torch::detail {

// Returns text of a file for a message: its first `most` bytes, with escapes for the characters that can control a
// terminal or have no width. The same characters as in src/error.rs; UTF-8 has their order.
inline std::string shown(std::string_view text, std::size_t most = 200) {
    constexpr std::pair<std::string_view, std::string_view> invisible[] = {{"\x7f", "\xc2\x9f"},
                                                                           {"\xc2\xad", "\xc2\xad"},
                                                                           {"\xd8\x9c", "\xd8\x9c"},
                                                                           {"\xe1\xa0\x8e", "\xe1\xa0\x8e"},
                                                                           {"\xe2\x80\x8b", "\xe2\x80\x8f"},
                                                                           {"\xe2\x80\xa8", "\xe2\x80\xae"},
                                                                           {"\xe2\x81\xa0", "\xe2\x81\xaf"},
                                                                           {"\xef\xbb\xbf", "\xef\xbb\xbf"},
                                                                           {"\xef\xbf\xb9", "\xef\xbf\xbb"},
                                                                           {"\xf3\xa0\x80\x80", "\xf3\xa0\x81\xbf"}};
    std::string out;
    std::size_t begin = 0;
    while (begin < text.size()) {
        std::size_t end = begin + 1;
        while (end < text.size() && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) {
            ++end;
        }
        if (end > most) {
            return out + "... (" + std::to_string(text.size()) + " bytes)";
        }
        const std::string_view character = text.substr(begin, end - begin);
        bool is_escaped = character < std::string_view(" ");
        for (const auto& [first, last] : invisible) {
            is_escaped = is_escaped || (first <= character && character <= last);
        }
        for (const char byte : character) {
            char escape[5] = {byte};
            if (is_escaped) {
                std::snprintf(escape, sizeof escape, "\\x%02x",
                              static_cast<unsigned>(static_cast<unsigned char>(byte)));
            }
            out += escape;
        }
        begin = end;
    }
    return out;
}

// An option or a part of a parameter's state, in its place in torch's struct.
struct OptimizerField {
    const char* name;
    std::variant<double*, bool*, int64_t*, std::tuple<double, double>*, at::Tensor*> place;
    // Whether a state that the optimizer uses has it.
    bool is_needed = true;
};
using OptimizerFields = std::vector<OptimizerField>;

// Returns the value of a field, as Python has it. Python's optimizers count steps in F32.
inline at::Tensor to_tensor(const OptimizerField& field) {
    return std::visit(
        [](const auto* place) -> at::Tensor {
            using Value = std::decay_t<decltype(*place)>;
            if constexpr (std::is_same_v<Value, at::Tensor>) {
                return *place;
            } else if constexpr (std::is_same_v<Value, std::tuple<double, double>>) {
                return at::tensor({std::get<0>(*place), std::get<1>(*place)}, at::kDouble);
            } else if constexpr (std::is_same_v<Value, int64_t>) {
                constexpr int64_t most = int64_t{1} << std::numeric_limits<float>::digits;
                return at::scalar_tensor(*place, *place <= most ? at::kFloat : at::kDouble);
            } else {
                return at::scalar_tensor(*place, std::is_same_v<Value, bool> ? at::kBool : at::kDouble);
            }
        },
        field.place);
}

// Sets a field to the value that `where` names.
inline void set_field(const OptimizerField& field, const at::Tensor& saved, const std::string& where) {
    const auto number = [&where](const at::Tensor& value) {
        const double result = value.item<double>();
        if (std::isnan(result)) {
            fail(where + "its value is not a number; save the optimizer again", ErrorCategory::runtime);
        }
        return result;
    };
    std::visit(
        [&](auto* place) {
            using Value = std::decay_t<decltype(*place)>;
            if constexpr (std::is_same_v<Value, at::Tensor>) {
                *place = saved;
            } else if constexpr (std::is_same_v<Value, std::tuple<double, double>>) {
                *place = {number(saved[0]), number(saved[1])};
            } else if constexpr (std::is_same_v<Value, double>) {
                *place = number(saved);
            } else {
                constexpr int64_t most = std::is_same_v<Value, bool> ? 1 : int64_t{1} << 53;
                const double value = number(saved);
                if (!(value >= 0 && value <= static_cast<double>(most) && value == std::floor(value))) {
                    fail(where + "its value is " + std::to_string(value) + ", not an integer from 0 to " +
                             std::to_string(most) + "; save the optimizer again",
                         ErrorCategory::runtime);
                }
                *place = static_cast<Value>(value);
            }
        },
        field.place);
}

inline void copy_field(const OptimizerField& from, const OptimizerField& to) {
    std::visit([&](auto* place) { *place = *std::get<decltype(place)>(from.place); }, to.place);
}

template <typename Options>
OptimizerFields adam_options(Options& o) {
    return {{"lr", &o.lr()},
            {"betas", &o.betas()},
            {"eps", &o.eps()},
            {"weight_decay", &o.weight_decay()},
            {"amsgrad", &o.amsgrad()}};
}

template <typename State, typename Options>
OptimizerFields adam_state(State& s, const Options& o) {
    return {{"step", &s.step()},
            {"exp_avg", &s.exp_avg()},
            {"exp_avg_sq", &s.exp_avg_sq()},
            {"max_exp_avg_sq", &s.max_exp_avg_sq(), o.amsgrad()}};
}

inline OptimizerFields options_of(torch::optim::AdamOptions& o) { return adam_options(o); }
inline OptimizerFields options_of(torch::optim::AdamWOptions& o) { return adam_options(o); }
inline OptimizerFields options_of(torch::optim::SGDOptions& o) {
    return {{"lr", &o.lr()},
            {"momentum", &o.momentum()},
            {"dampening", &o.dampening()},
            {"weight_decay", &o.weight_decay()},
            {"nesterov", &o.nesterov()}};
}
inline OptimizerFields options_of(torch::optim::RMSpropOptions& o) {
    return {{"lr", &o.lr()},
            {"alpha", &o.alpha()},
            {"eps", &o.eps()},
            {"weight_decay", &o.weight_decay()},
            {"momentum", &o.momentum()},
            {"centered", &o.centered()}};
}
inline OptimizerFields options_of(torch::optim::AdagradOptions& o) {
    return {{"lr", &o.lr()},
            {"lr_decay", &o.lr_decay()},
            {"weight_decay", &o.weight_decay()},
            {"initial_accumulator_value", &o.initial_accumulator_value()},
            {"eps", &o.eps()}};
}

inline OptimizerFields param_state_of(torch::optim::AdamParamState& s, const torch::optim::AdamOptions& o) {
    return adam_state(s, o);
}
inline OptimizerFields param_state_of(torch::optim::AdamWParamState& s, const torch::optim::AdamWOptions& o) {
    return adam_state(s, o);
}
inline OptimizerFields param_state_of(torch::optim::SGDParamState& s, const torch::optim::SGDOptions&) {
    return {{"momentum_buffer", &s.momentum_buffer()}};
}
inline OptimizerFields param_state_of(torch::optim::RMSpropParamState& s, const torch::optim::RMSpropOptions& o) {
    return {{"step", &s.step()},
            {"square_avg", &s.square_avg()},
            {"momentum_buffer", &s.momentum_buffer(), o.momentum() > 0},
            {"grad_avg", &s.grad_avg(), o.centered()}};
}
inline OptimizerFields param_state_of(torch::optim::AdagradParamState& s, const torch::optim::AdagradOptions&) {
    return {{"step", &s.step()}, {"sum", &s.sum()}};
}

// One of torch's optimizers, with its functions for options and states whose class is not known.
struct OptimizerKind {
    const char* name;
    // Whether each parameter has a state before the first step, without which a step fails.
    bool has_state_from_start;
    bool (*matches)(const torch::optim::Optimizer& optimizer);
    OptimizerFields (*options)(torch::optim::OptimizerOptions& options);
    OptimizerFields (*state)(torch::optim::OptimizerParamState& state, torch::optim::OptimizerOptions& options);
    std::unique_ptr<torch::optim::OptimizerOptions> (*make_options)();
    std::unique_ptr<torch::optim::OptimizerParamState> (*make_state)();
};

// Returns `object` as the class that belongs to the optimizer; torch casts without a check.
template <typename Wanted, typename Base>
Wanted& as(Base& object) {
    Wanted* const wanted = dynamic_cast<Wanted*>(&object);
    if (wanted == nullptr) {
        fail(
            "optimizer: a parameter group has options, or a parameter has a state, of another optimizer's class; pass "
            "torch::optim::AdamWOptions to an AdamW, for example",
            ErrorCategory::value);
    }
    return *wanted;
}

template <typename Optimizer, typename Options, typename ParamState>
constexpr OptimizerKind optimizer_kind(const char* name, bool has_state_from_start = false) {
    using torch::optim::OptimizerOptions;
    using torch::optim::OptimizerParamState;
    return {
        name,
        has_state_from_start,
        [](const torch::optim::Optimizer& optimizer) { return dynamic_cast<const Optimizer*>(&optimizer) != nullptr; },
        [](OptimizerOptions& options) { return options_of(as<Options>(options)); },
        [](OptimizerParamState& state, OptimizerOptions& options) {
            return param_state_of(as<ParamState>(state), as<Options>(options));
        },
        []() -> std::unique_ptr<OptimizerOptions> { return std::make_unique<Options>(0.0); },
        []() -> std::unique_ptr<OptimizerParamState> { return std::make_unique<ParamState>(); }};
}

inline constexpr OptimizerKind kOptimizerKinds[] = {
    optimizer_kind<torch::optim::Adagrad, torch::optim::AdagradOptions, torch::optim::AdagradParamState>("Adagrad",
                                                                                                         true),
    optimizer_kind<torch::optim::Adam, torch::optim::AdamOptions, torch::optim::AdamParamState>("Adam"),
    optimizer_kind<torch::optim::AdamW, torch::optim::AdamWOptions, torch::optim::AdamWParamState>("AdamW"),
    optimizer_kind<torch::optim::RMSprop, torch::optim::RMSpropOptions, torch::optim::RMSpropParamState>("RMSprop"),
    optimizer_kind<torch::optim::SGD, torch::optim::SGDOptions, torch::optim::SGDParamState>("SGD"),
};

inline const OptimizerKind& kind_of(const torch::optim::Optimizer& optimizer) {
    std::string names;
    for (const OptimizerKind& kind : kOptimizerKinds) {
        if (kind.matches(optimizer)) {
            return kind;
        }
        names += std::string(names.empty() ? "" : ", ") + kind.name;
    }
    fail("optimizer " + c10::demangle(typeid(optimizer).name()) +
             ": its state cannot be saved by the names of parameters; that of these can: " + names,
         ErrorCategory::value);
}

}  // namespace safetensors_torch::detail
