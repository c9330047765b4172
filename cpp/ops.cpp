// The ops: kernels first, then schemas, one block for each concept. The schemas are the C++ ABI of this library.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstdio>
#include <exception>
#include <optional>

#include "cpp/built_for.h"
#include "cpp/bytes.h"
#include "cpp/device/pinned_pool.h"
#include "cpp/error.h"
#include "cpp/file.h"
#include "cpp/model/mismatch.h"
#include "cpp/read/checkpoint_loader.h"
#include "cpp/read/pending_load.h"
#include "cpp/read/prefetch_loader.h"
#include "cpp/tensor_memory.h"
#include "cpp/write/aliasing.h"
#include "cpp/write/consolidate.h"
#include "cpp/write/edit.h"
#include "cpp/write/incremental_writer.h"
#include "cpp/write/joined.h"
#include "cpp/write/save.h"
#include "cpp/write/save_sharded.h"

namespace safetensors_torch::layer {
namespace {

using Names = std::vector<std::string>;
using MaybeNames = std::optional<Names>;
using MaybeDtype = std::optional<c10::ScalarType>;

CheckpointLoader load_path(const std::string& filename, Target target, const std::string& backend,
                           const Selection& selection) {
    return load_all(Checkpoint(open_file(filename, backend)), {backend == "mmap", {}}, target, selection);
}

CheckpointLoader load_bytes(const at::Tensor& data, Target target, const MaybeNames& names = {}) {
    return load_all(Checkpoint(open_bytes(data)), {}, target, {names, {}});
}

Tensors load_file_op(const std::string& filename, c10::Device device, const std::string& backend,
                     std::optional<bool> prefault, MaybeDtype dtype, const MaybeNames& names) {
    return guarded([&] {
        CheckpointLoader loader = load_path(filename, {device, dtype}, backend, {names, prefault});
        return dict_of(loader);
    });
}

Tensors load_op(const at::Tensor& data, c10::Device device, MaybeDtype dtype, const MaybeNames& names) {
    return guarded([&] {
        CheckpointLoader loader = load_bytes(data, {device, dtype}, names);
        return dict_of(loader);
    });
}

Lists load_file_lists_op(const std::string& filename, c10::Device device, const std::string& backend,
                         std::optional<bool> prefault) {
    return guarded([&] {
        CheckpointLoader loader = load_path(filename, {device, {}}, backend, {{}, prefault});
        return lists_of(loader);
    });
}

Lists load_lists_op(const at::Tensor& data, c10::Device device) {
    return guarded([&] {
        CheckpointLoader loader = load_bytes(data, {device, {}});
        return lists_of(loader);
    });
}

Lists load_shared_op(const at::Tensor& data) {
    return guarded([&] {
        CheckpointLoader loader = load_all(Checkpoint(open_bytes(data)), {true, data}, {}, {});
        return lists_of(loader);
    });
}

at::Tensor get_tensor_op(const std::string& filename, const std::string& name, c10::Device device) {
    return guarded([&] {
        const auto file = open_file(filename, "mmap");
        const size_t index = (*file)->find(as_bytes(name));
        if (device.is_cpu()) {
            (*file)->read_ahead(index);
        }
        return load_tensor(file, StorageSharing{true, {}}, index, device);
    });
}

// Reads only the bytes of the slice.
at::Tensor get_slice_op(const std::string& filename, const std::string& name, const std::vector<int64_t>& starts,
                        const std::vector<int64_t>& stops, const std::optional<std::vector<int64_t>>& steps,
                        c10::Device device) {
    const auto file = c10::make_intrusive<File>(filename, "pread");
    return guarded([&] {
        return file->get_slice(name, starts, stops, steps.value_or(std::vector<int64_t>(starts.size(), 1)), device);
    });
}

std::vector<at::Tensor> load_tensors_op(const std::string& filename, const Names& names, c10::Device device,
                                        const std::string& backend) {
    const auto file = c10::make_intrusive<File>(filename, backend);
    return guarded([&] { return file->get_tensors(names, device); });
}

void write_file(NamedTensors tensors, const std::optional<Metadata>& metadata, const std::string& filename,
                bool durable) {
    PendingSave save(std::move(tensors), metadata, filename);
    save.set_file(filename, durable);
    save.finish();
}

void save_file_op(const Tensors& tensors, const std::string& filename, const std::optional<Metadata>& metadata,
                  bool durable) {
    guarded([&] { write_file(to_pairs(tensors), metadata, filename, durable); });
}

void save_tensors_op(const std::string& filename, Names names, std::vector<at::Tensor> tensors,
                     const std::optional<Metadata>& metadata, bool durable) {
    guarded([&] { write_file(to_pairs(std::move(names), std::move(tensors)), metadata, filename, durable); });
}

at::Tensor save_op(const Tensors& tensors, const std::optional<Metadata>& metadata) {
    return guarded([&] {
        PendingSave save(to_pairs(tensors), metadata, "");
        const auto options = at::TensorOptions().dtype(at::kByte).device(at::kCPU).requires_grad(false);
        at::Tensor out = at::empty({static_cast<int64_t>(save.total())}, options);
        save.set_memory(out);
        save.finish();
        return out;
    });
}

void check_save_op(const Tensors& tensors, bool force_contiguous, const std::string& shared) {
    guarded([&] {
        NamedTensors checked = to_pairs(tensors);
        std::optional<Metadata> metadata;
        check_saveable(checked, metadata, save_rules(force_contiguous, shared));
    });
}

c10::Dict<std::string, std::string> tied_op(const Tensors& tensors, const Names& preferred) {
    return guarded([&] {
        const NamedTensors all = to_pairs(tensors);
        // Before the caller copies tensors, or loads into them.
        for (const auto& [name, tensor] : all) {
            check_whole(name, tensor);
        }
        c10::Dict<std::string, std::string> result;
        for (const auto& [dropped, kept] : tied_names(all, {preferred.begin(), preferred.end()})) {
            result.insert(dropped, kept);
        }
        return result;
    });
}

void check_names_op(const std::string& class_name, const Names& missing, const Names& unexpected,
                    const std::string& prefix) {
    guarded([&] { check_names({missing, unexpected}, class_name, prefix); });
}

c10::intrusive_ptr<File> open_bytes_op(const at::Tensor& data) { return c10::make_intrusive<File>(data); }

c10::intrusive_ptr<File> open_source_op(int64_t address, const std::string& name, bool is_interpreted) {
    return guarded([&] {
        auto checkpoint = std::make_shared<const Checkpoint>(open_source(address, name, is_interpreted));
        return c10::make_intrusive<File>(std::move(checkpoint), /*is_mapped=*/false);
    });
}

c10::intrusive_ptr<File> open_filesystem_op(int64_t address, const std::string& path,
                                            const std::optional<std::string>& variant, const std::string& extra,
                                            bool is_interpreted) {
    return guarded([&] {
        auto opened = open_filesystem(address, path, checkpoint_options("pread", variant, extra), is_interpreted);
        return c10::make_intrusive<File>(std::make_shared<const Checkpoint>(std::move(opened)), /*is_mapped=*/false);
    });
}

void end_interpreter_op() {
    // Long enough for a request; a process should not wait longer for its end.
    core::end_interpreter(10'000);
}

// For functions of a source in Python.
int64_t source_error_setter_op() { return static_cast<int64_t>(core::source_error_setter()); }

std::tuple<int64_t, int64_t, int64_t> transfer_options_op() {
    return guarded([&]() -> std::tuple<int64_t, int64_t, int64_t> {
        const TransferOptions options = transfer_options();
        return {options.pinned_pool_bytes, options.threads, options.direct};
    });
}

void set_transfer_options_op(std::optional<int64_t> pinned_pool_bytes, std::optional<int64_t> threads,
                             std::optional<int64_t> direct) {
    guarded([&] { set_transfer_options(pinned_pool_bytes, threads, direct); });
}

int64_t reserve_transfer_memory_op(int64_t bytes) {
    return guarded([&] { return PinnedPool::of_process().reserve(bytes); });
}

int64_t release_transfer_memory_op() {
    return guarded([&] { return PinnedPool::of_process().release(); });
}

std::tuple<std::string, std::string> built_for_op() {
    // volatile keeps the compiler from splitting the text into instructions: the CMake package searches the file for
    // it.
    const char* const volatile whole = built_for;
    const std::string text = whole;
    const auto between = [&text](const std::string& before, const std::string& after) {
        const auto start = text.find(before) + before.size();
        return text.substr(start, text.find(after, start) - start);
    };
    return {between("safetensors_torch ", " built"), between("for torch ", ", ")};
}

int64_t transfer_memory_op() { return PinnedPool::of_process().bytes(); }

// Returns the schema of an op that reads or writes files: TorchScript must not drop, move or fold it.
c10::FunctionSchema effectful(const char* schema) {
    return torch::schema(schema, c10::AliasAnalysisKind::CONSERVATIVE);
}

// Ops without a tensor argument have no other dispatch key to be found by.
constexpr auto kOpKey = c10::DispatchKey::CompositeExplicitAutograd;

// In the order of their results: File's methods return the pending loads.
void define_classes(torch::Library& library) {
    register_pending_loads(library);
    register_file(library);
    register_prefetch(library);
    register_pending_save(library);
    register_sharded_saves(library);
    register_incremental_writer(library);
    register_joined(library);
    register_pending_consolidation(library);
    register_pending_edit(library);
}

void define_loads(torch::Library& library) {
    library.def(effectful(R"(load_file(str filename, *, Device device="cpu", str backend="mmap", bool? prefault=None, )"
                          "ScalarType? dtype=None, str[]? names=None) -> Dict(str, Tensor)"),
                torch::dispatch(kOpKey, load_file_op));
    library.def(R"(load(Tensor data, *, Device device="cpu", ScalarType? dtype=None, str[]? names=None) -> )"
                "Dict(str, Tensor)",
                torch::dispatch(kOpKey, load_op));
    library.def(effectful(R"(get_tensor(str filename, str name, *, Device device="cpu") -> Tensor)"),
                torch::dispatch(kOpKey, get_tensor_op));
    // One range for each dimension of torch's shape: 0 <= start <= stop <= size, and a step of 1 or more.
    library.def(effectful("get_slice(str filename, str name, int[] starts, int[] stops, int[]? steps=None, *, "
                          R"(Device device="cpu") -> Tensor)"),
                torch::dispatch(kOpKey, get_slice_op));
    // load_file without a dict of tensors, which not every compiler takes.
    library.def(effectful(R"(load_tensors(str filename, str[] names, *, Device device="cpu", str backend="mmap") -> )"
                          "Tensor[]"),
                torch::dispatch(kOpKey, load_tensors_op));
}

void define_saves(torch::Library& library) {
    library.def(effectful("save_file(Dict(str, Tensor) tensors, str filename, Dict(str, str)? metadata=None, *, "
                          "bool durable=False) -> ()"),
                torch::dispatch(kOpKey, save_file_op));
    library.def("save(Dict(str, Tensor) tensors, Dict(str, str)? metadata=None) -> Tensor",
                torch::dispatch(kOpKey, save_op));
    // save_file without a dict of tensors.
    library.def(effectful("save_tensors(str filename, str[] names, Tensor[] tensors, Dict(str, str)? metadata=None, "
                          "*, bool durable=False) -> ()"),
                torch::dispatch(kOpKey, save_tensors_op));
}

// Internals of the Python package and the C++ header; they may change.
void define_internals(torch::Library& library) {
    library.def(effectful("_load_file_lists(str filename, *, Device device, str backend, bool? prefault) -> "
                          "(str[] names, Tensor[] tensors)"),
                torch::dispatch(kOpKey, load_file_lists_op));
    library.def("_load_lists(Tensor data, *, Device device) -> (str[] names, Tensor[] tensors)",
                torch::dispatch(kOpKey, load_lists_op));
    library.def("_load_shared_lists(Tensor data) -> (str[] names, Tensor[] tensors)",
                torch::dispatch(kOpKey, load_shared_op));
    library.def("_open_bytes(Tensor data) -> __torch__.torch.classes.safetensors_torch.File",
                torch::dispatch(kOpKey, open_bytes_op));
    library.def(effectful("_open_source(int address, str name, bool is_interpreted=False) -> "
                          "__torch__.torch.classes.safetensors_torch.File"),
                torch::dispatch(kOpKey, open_source_op));
    library.def(effectful("_open_filesystem(int address, str path, str? variant, str extra, bool is_interpreted=False) "
                          "-> __torch__.torch.classes.safetensors_torch.File"),
                torch::dispatch(kOpKey, open_filesystem_op));
    library.def(effectful("_end_interpreter() -> ()"), torch::dispatch(kOpKey, end_interpreter_op));
    library.def("_source_error_setter() -> int", torch::dispatch(kOpKey, source_error_setter_op));
    library.def(effectful("_check_save(Dict(str, Tensor) tensors, *, bool force_contiguous=False, "
                          R"(str shared="error") -> ())"),
                torch::dispatch(kOpKey, check_save_op));
    library.def("_tied(Dict(str, Tensor) tensors, str[] preferred) -> Dict(str, str)",
                torch::dispatch(kOpKey, tied_op));
    library.def(effectful("_check_names(str class_name, str[] missing, str[] unexpected, str prefix) -> ()"),
                torch::dispatch(kOpKey, check_names_op));
    library.def("_built_for() -> (str version, str torch)", torch::dispatch(kOpKey, built_for_op));
    library.def(effectful("_last_error() -> (str kind, int code, int os_error, str message)"),
                torch::dispatch(kOpKey, last_error));
}

void define_transfers(torch::Library& library) {
    library.def(effectful("_transfer_options() -> (int pinned_pool_bytes, int threads, int direct)"),
                torch::dispatch(kOpKey, transfer_options_op));
    library.def(effectful("_set_transfer_options(int? pinned_pool_bytes, int? threads, int? direct=None) -> ()"),
                torch::dispatch(kOpKey, set_transfer_options_op));
    library.def(effectful("_reserve_transfer_memory(int bytes) -> int"),
                torch::dispatch(kOpKey, reserve_transfer_memory_op));
    library.def(effectful("_release_transfer_memory() -> int"), torch::dispatch(kOpKey, release_transfer_memory_op));
    library.def(effectful("_transfer_memory() -> int"), torch::dispatch(kOpKey, transfer_memory_op));
}

// Registers the ops with torch when the library is loaded, unless another copy of it has, such as the Python package's
// layer in a program that is linked to libsafetensors_torch.so. All copies use the ops of the first; the C++ header and
// the Python package check its version at their first call. TORCH_LIBRARY would end the process instead.
torch::Library* register_ops() noexcept {
    try {
        if (c10::Dispatcher::singleton().findSchema({"safetensors_torch::load_file", ""})) {
            return nullptr;
        }
        // Never destroyed: when the process ends, threads may still be in an op.
        auto* library = new torch::Library(torch::Library::DEF, "safetensors_torch", std::nullopt, __FILE__, __LINE__);
        for (const auto define : {define_classes, define_loads, define_saves, define_internals, define_transfers}) {
            define(*library);
        }
        return library;
    } catch (const std::exception& error) {
        // The first call says which operator is missing.
        std::fprintf(stderr, "safetensors_torch: its operators could not be registered: %s\n", error.what());
        return nullptr;
    }
}

// Kept reachable for leak checkers.
[[gnu::used]] torch::Library* const registered = register_ops();

}  // namespace
}  // namespace safetensors_torch::layer
