// How safetensors_torch.hpp, which includes this, reaches the library: operators by name, objects by method.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/Dict.h>
#include <ATen/core/class_type.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/function.h>
#include <ATen/core/stack.h>
#include <torch/version.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../safetensors_torch.h"
#include "error.hpp"
#include "types.hpp"

namespace safetensors_torch::detail {

using Strings = c10::Dict<std::string, std::string>;
using OptionalStrings = std::optional<Strings>;

[[noreturn]] inline void fail(std::string message, ErrorCategory kind, sft_status code = 0) {
    throw Error(std::move(message), kind, code, 0);
}

// Fails if the operators are not those of the library that the program is linked to, or of another torch.
//
// Of several copies of the library in a process, the first one has the operators. And objects of torch's classes pass
// between the program and the library, so both must be compiled for one torch: the CMake package sees to that, and this
// is for those who build without it.
inline void check_library() {
    using BuiltFor = std::tuple<std::string, std::string>();
    const auto op = c10::Dispatcher::singleton().findSchema({"safetensors_torch::_built_for", ""});
    if (!op) {
        return;  // a library that has no operators at all: find_op says so
    }
    const auto [version, built_for] = op->typed<BuiltFor>().call();
    if (version != sft_get_version()) {
        fail(std::string("this program is linked to libsafetensors_torch ") + sft_get_version() +
                 ", but another copy of it, version " + version +
                 ", was loaded before (the Python package has one): use the same version of both",
             ErrorCategory::runtime);
    }
    const std::string series = std::to_string(TORCH_VERSION_MAJOR) + "." + std::to_string(TORCH_VERSION_MINOR) + ".";
    if (built_for.compare(0, series.size(), series) != 0) {
        fail(std::string("this libsafetensors_torch (") + sft_get_version() + ") was built for torch " + built_for +
                 ", and this program for torch " TORCH_VERSION
                 ": build the library against the torch of the program, or the program against that of the library",
             ErrorCategory::runtime);
    }
}

// The one reference to a symbol of the library: it keeps the library among those needed under --as-needed. Looked for
// each time: what a local static keeps, another thread may be making when the process is forked, and the child would
// wait for ever for that to end.
inline c10::OperatorHandle find_op(const char* name) {
    static std::atomic<bool> is_checked{false};
    if (!is_checked.load(std::memory_order_relaxed)) {
        check_library();
        is_checked.store(true, std::memory_order_relaxed);
    }
    auto op = c10::Dispatcher::singleton().findSchema({name, ""});
    if (!op) {
        fail(std::string("the operator ") + name + " is missing: this libsafetensors_torch (" + sft_get_version() +
                 ") was built without libtorch, or is not of the version of safetensors_torch.hpp",
             ErrorCategory::runtime);
    }
    return *op;
}

inline ErrorCategory kind_of(const std::string& name) {
    return name == "OSError"        ? ErrorCategory::os
           : name == "ValueError"   ? ErrorCategory::value
           : name == "MemoryError"  ? ErrorCategory::memory
           : name == "RuntimeError" ? ErrorCategory::runtime
                                    : ErrorCategory::safetensor;
}

// Calls `body`, which calls the library; what that has noted of an error is thrown with it.
template <typename Body>
auto with_errors(Body&& body) -> decltype(body()) {
    using LastError = std::tuple<std::string, int64_t, int64_t, std::string>();
    try {
        return body();
    } catch (const Error&) {
        throw;
    } catch (const c10::Error& error) {
        const auto [kind, code, os_error, message] =
            find_op("safetensors_torch::_last_error").typed<LastError>().call();
        if (message != error.what_without_backtrace()) {
            throw;  // torch's own
        }
        throw Error(message, kind_of(kind), static_cast<sft_status>(code), static_cast<int>(os_error));
    }
}

// Calls an operator that torch can call with types.
template <typename Result, typename... Parameters, typename... Args>
Result call(const c10::TypedOperatorHandle<Result(Parameters...)>& op, const Args&... args) {
    return with_errors([&] { return op.call(args...); });
}

// Calls one whose arguments or result are objects of the library's classes.
template <typename... Args>
c10::IValue call_boxed(const c10::OperatorHandle& op, const Args&... args) {
    torch::jit::Stack stack{c10::IValue(args)...};
    with_errors([&] { op.callBoxed(stack); });
    return std::move(stack.back());
}

inline std::string name_of(Backend backend) { return backend == Backend::pread ? "pread" : "mmap"; }

inline std::string name_of(Shared shared) { return shared == Shared::keep_one ? "keep_one" : "error"; }

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
    with_errors([&] { object->type()->getMethod(method).run(stack); });
    return std::move(stack.back());
}

// Opens the file at `path`.
inline Object open(const std::string& path, Backend backend) {
    const auto op = find_op("safetensors_torch::_open");
    return call_boxed(op, path, name_of(backend)).toObject();
}

// Opens the checkpoint at `path`.
inline Object open_checkpoint(const std::string& path, Backend backend, const CheckpointOptions& options) {
    const auto op = find_op("safetensors_torch::_open_checkpoint");
    const std::string extra = options.extra == Extra::ignore ? "ignore" : "error";
    return call_boxed(op, path, name_of(backend), options.variant, extra).toObject();
}

// Has an object of the library do its work in steps, and tells `progress` between them.
inline void run(const Object& work, int64_t total, const Progress& progress) {
    const double seconds = progress ? 0.1 : std::numeric_limits<double>::infinity();
    try {
        while (!call_method(work, "advance", seconds).toBool()) {
            if (progress) {
                progress(call_method(work, "done").toInt(), total);
            }
        }
        if (progress) {
            progress(total, total);
        }
    } catch (...) {
        call_method(work, "cancel");
        throw;
    }
}

// The names of `file` that `filter` takes; none where that takes all.
inline std::optional<std::vector<std::string>> select(const Object& file, const NameFilter& filter) {
    if (!filter) {
        return std::nullopt;
    }
    std::vector<std::string> names;
    for (std::string& name : call_method(file, "offset_keys").to<std::vector<std::string>>()) {
        if (filter(name)) {
            names.push_back(std::move(name));
        }
    }
    return names;
}

// A save that is checked and laid out. `path` is for the errors.
inline Object plan_save(const Tensors& tensors, const Metadata& metadata, const std::string& path,
                        const SaveOptions& options) {
    const auto op = find_op("safetensors_torch::_plan_save");
    return call_boxed(op, tensors, to_dict(metadata), path, options.force_contiguous, name_of(options.shared))
        .toObject();
}

// The tensors of an open file or checkpoint that `options` select.
inline Tensors load(const Object& file, at::Device device, const LoadOptions& options) {
    if (options.backend == Backend::mmap && device.is_cpu() && options.prefault.value_or(!options.names)) {
        call_method(file, "prefault", options.prefault.has_value());
    }
    const auto pending = call_method(file, "start_load", select(file, options.names), device, options.dtype).toObject();
    run(pending, call_method(pending, "total").toInt(), options.progress);
    const auto result = call_method(pending, "result").toTuple();
    auto names = result->elements()[0].to<std::vector<std::string>>();
    const auto tensors = result->elements()[1].to<std::vector<at::Tensor>>();
    Tensors dict;
    dict.reserve(names.size());
    for (std::size_t i = 0; i < names.size(); ++i) {
        dict.insert(std::move(names[i]), tensors[i]);
    }
    return dict;
}

}  // namespace safetensors_torch::detail
