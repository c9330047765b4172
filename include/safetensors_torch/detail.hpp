// Internal part of safetensors_torch.hpp, which includes it: calls the library's operators and objects by name.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/Dict.h>
#include <ATen/core/class_type.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/function.h>
#include <ATen/core/stack.h>
#include <fnmatch.h>
#include <torch/custom_class.h>
#include <torch/version.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <iterator>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

#include "../safetensors_torch.h"
#include "error.hpp"
#include "types.hpp"

namespace safetensors_torch::detail {

using Dict = c10::Dict<std::string, at::Tensor>;
using Strings = c10::Dict<std::string, std::string>;
using OptionalStrings = std::optional<Strings>;

[[noreturn]] inline void fail(std::string message, ErrorCategory category, sft_status code = 0) {
    throw Error(std::move(message), category, code, 0);
}

// Fails if nothing has registered the operators, or if they are of another version of the library, or of another torch.
//
// If a process has several copies of the library, the first registers the operators. Objects of torch's classes pass
// between program and library, so both must be compiled for one torch. The CMake package checks that too.
inline void check_library() {
    using BuiltFor = std::tuple<std::string, std::string>();
    const auto op = c10::Dispatcher::singleton().findSchema({"safetensors_torch::_built_for", ""});
    if (!op) {
        fail(
            "operators of safetensors_torch: none are registered; a program must link libsafetensors_torch, not "
            "libsafetensors_torch_c, and a Python extension must import safetensors_torch first",
            ErrorCategory::runtime);
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

// Finds the operator at each call: with a local static, a child forked while another thread initializes it would wait
// forever. sft_get_version, called here, is the only symbol of the library that the header uses: it keeps the library
// linked under --as-needed.
inline c10::OperatorHandle find_op(const char* name) {
    static std::atomic<bool> is_checked{false};
    if (!is_checked.load(std::memory_order_relaxed)) {
        check_library();
        is_checked.store(true, std::memory_order_relaxed);
    }
    auto op = c10::Dispatcher::singleton().findSchema({name, ""});
    if (!op) {
        fail(std::string("operator ") + name + ": this libsafetensors_torch (" + sft_get_version() +
                 ") does not have it; use the safetensors_torch.hpp of the same version, not of " SFT_VERSION_STRING,
             ErrorCategory::runtime);
    }
    return *op;
}

inline ErrorCategory category_of(const std::string& name) {
    return name == "OSError"        ? ErrorCategory::os
           : name == "ValueError"   ? ErrorCategory::value
           : name == "MemoryError"  ? ErrorCategory::memory
           : name == "RuntimeError" ? ErrorCategory::runtime
                                    : ErrorCategory::safetensor;
}

// Returns body(); turns an error that the library has recorded into an Error.
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
        throw Error(message, category_of(kind), static_cast<sft_status>(code), static_cast<int>(os_error));
    }
}

// Calls an operator with types.
template <typename Result, typename... Parameters, typename... Args>
Result call(const c10::TypedOperatorHandle<Result(Parameters...)>& op, const Args&... args) {
    return with_errors([&] { return op.call(args...); });
}

// Calls an operator whose arguments or result are objects of the library's classes.
template <typename... Args>
c10::IValue call_boxed(const c10::OperatorHandle& op, const Args&... args) {
    torch::jit::Stack stack{c10::IValue(args)...};
    with_errors([&] { op.callBoxed(stack); });
    return std::move(stack.back());
}

inline std::string name_of(Backend backend) { return backend == Backend::pread ? "pread" : "mmap"; }

inline std::string name_of(Shared shared) { return shared == Shared::keep_one ? "keep_one" : "error"; }

// Returns the metadata for the library; none if it is empty.
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

inline Metadata to_metadata(const Strings& dict) {
    Metadata metadata;
    for (const auto& entry : dict) {
        metadata.emplace(entry.key(), entry.value());
    }
    return metadata;
}

// Returns each tensor under the name at its position.
inline Tensors to_tensors(std::vector<std::string> names, const std::vector<at::Tensor>& list) {
    Tensors tensors;
    tensors.reserve(names.size());
    for (std::size_t i = 0; i < names.size(); ++i) {
        tensors.insert(std::move(names[i]), list[i]);
    }
    return tensors;
}

// An object of a class that the library registers with torch.
using Object = c10::intrusive_ptr<c10::ivalue::Object>;

template <typename... Args>
c10::IValue call_method(const Object& object, const char* method, const Args&... args) {
    torch::jit::Stack stack{c10::IValue(object), c10::IValue(args)...};
    with_errors([&] { object->type()->getMethod(method).run(stack); });
    return std::move(stack.back());
}

// Makes an object of one of the library's classes.
template <typename... Args>
Object make(const char* name, const Args&... args) {
    find_op("safetensors_torch::_built_for");  // checks the library
    const auto type = torch::getCustomClass(std::string("__torch__.torch.classes.safetensors_torch.") + name);
    const Object object = c10::ivalue::Object::create(type, /*numSlots=*/1);
    call_method(object, "__init__", args...);
    return object;
}

// Does pending work in steps, and calls `progress` between them.
inline void run(const Object& work, const Progress& progress = {}) {
    const double seconds = progress ? 0.1 : std::numeric_limits<double>::infinity();
    try {
        while (!call_method(work, "advance", seconds).toBool()) {
            if (progress) {
                progress(call_method(work, "done").toInt(), call_method(work, "total").toInt());
            }
        }
        if (progress) {
            const int64_t total = call_method(work, "total").toInt();
            progress(total, total);
        }
    } catch (...) {
        call_method(work, "cancel");
        throw;
    }
}

// Opens the file at `path`.
inline Object open(const std::filesystem::path& path, Backend backend) {
    return make("File", path.native(), name_of(backend));
}

// Opens the checkpoint at `path`.
inline Object open_checkpoint(const std::filesystem::path& path, Backend backend, const CheckpointOptions& options) {
    const std::string extra = options.extra == Extra::ignore ? "ignore" : "error";
    const Object pending = make("PendingFile", path.native(), name_of(backend), options.variant, extra);
    run(pending);
    return call_method(pending, "result").toObject();
}

// Returns the elements of `names` that match the glob. Returns the glob itself if it is one of them, or if it matches
// none: the load then reports the missing tensor.
inline std::vector<std::string> expand(const std::string& glob, const std::vector<std::string>& names) {
    std::vector<std::string> matching;
    for (const std::string& name : names) {
        if (name == glob) {
            return {name};
        }
        if (fnmatch(glob.c_str(), name.c_str(), 0) == 0) {
            matching.push_back(name);
        }
    }
    return matching.empty() ? std::vector<std::string>{glob} : matching;
}

// Returns the names in `file` that `selection` accepts, each once; no value if it accepts all.
inline std::optional<std::vector<std::string>> select(const Object& file, const NameSelection& selection) {
    const auto is_glob = [](const std::string& name) { return name.find_first_of("*?[") != std::string::npos; };
    const std::optional<std::vector<std::string>>& wanted = selection.names();
    if (!selection.filter() && (!wanted || std::none_of(wanted->begin(), wanted->end(), is_glob))) {
        return wanted;
    }
    const auto all = call_method(file, "offset_keys").to<std::vector<std::string>>();
    std::vector<std::string> names;
    if (selection.filter()) {
        std::copy_if(all.begin(), all.end(), std::back_inserter(names), selection.filter());
        return names;
    }
    for (const std::string& one : *wanted) {
        for (std::string& name : expand(one, all)) {
            if (std::find(names.begin(), names.end(), name) == names.end()) {
                names.push_back(std::move(name));
            }
        }
    }
    return names;
}

// Fails if `bytes` are the path of a file. Bytes that could be loaded contain a zero: no header has 2^56 bytes.
inline void refuse_path(std::string_view bytes) {
    constexpr std::size_t most = 4096;  // PATH_MAX
    if (bytes.size() > most || bytes.find('\0') != std::string_view::npos) {
        return;
    }
    const std::filesystem::path path(bytes);
    std::error_code ignored;
    if (path.extension() == ".safetensors" || std::filesystem::is_regular_file(path, ignored)) {
        fail(path.native() + ": load takes the bytes of a file, and this is a path; call load_file",
             ErrorCategory::value);
    }
}

// Checks and lays out a save. `path` is for the errors.
inline Object plan_save(const Tensors& tensors, const Metadata& metadata, const std::filesystem::path& path,
                        const SaveOptions& options) {
    return make("PendingSave", tensors.keys(), tensors.values(), to_dict(metadata), path.native(),
                options.force_contiguous, name_of(options.shared));
}

// Loads the tensors of an open file or checkpoint that `options` select.
inline Tensors load(const Object& file, at::Device device, const LoadOptions& options) {
    const auto pending =
        call_method(file, "start_load", select(file, options.names), device, options.dtype, options.prefault)
            .toObject();
    run(pending, options.progress);
    const auto result = call_method(pending, "result").toTuple();
    auto names = result->elements()[0].to<std::vector<std::string>>();
    const auto tensors = result->elements()[1].to<std::vector<at::Tensor>>();
    return to_tensors(std::move(names), tensors);
}

}  // namespace safetensors_torch::detail
