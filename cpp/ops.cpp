// The ops: their schemas in one block, their kernels above it. The schemas are the C++ ABI of this library.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <cstdio>
#include <exception>
#include <optional>

#include "cpp/built_for.h"
#include "cpp/device/pinned_pool.h"
#include "cpp/error.h"
#include "cpp/model/mismatch.h"
#include "cpp/read/checkpoint.h"
#include "cpp/read/file.h"
#include "cpp/read/load.h"
#include "cpp/read/pending_load.h"
#include "cpp/tensor_memory.h"
#include "cpp/write/aliasing.h"
#include "cpp/write/edit.h"
#include "cpp/write/incremental_writer.h"
#include "cpp/write/save.h"
#include "cpp/write/save_sharded.h"

namespace safetensors_torch::layer {
namespace {

using Names = std::vector<std::string>;

using MaybeNames = std::optional<Names>;
using MaybeDtype = std::optional<c10::ScalarType>;

Tensors load_file_op(const std::string& filename, c10::Device device, const std::string& backend,
                     std::optional<bool> prefault, MaybeDtype dtype, const MaybeNames& names) {
    return guarded([&] {
        CheckpointLoader loads = load_file(filename, Target{device, dtype}, backend, prefault, names);
        return dict_of(loads);
    });
}

Tensors load_op(const at::Tensor& data, c10::Device device, MaybeDtype dtype, const MaybeNames& names) {
    return guarded([&] {
        CheckpointLoader loads = load_all(Checkpoint(open_bytes(data)), StorageSharing{}, Target{device, dtype}, names);
        return dict_of(loads);
    });
}

Lists load_file_lists_op(const std::string& filename, c10::Device device, const std::string& backend,
                         std::optional<bool> prefault) {
    return guarded([&] {
        CheckpointLoader loads = load_file(filename, Target{device, {}}, backend, prefault, {});
        return lists_of(loads);
    });
}

Lists load_lists_op(const at::Tensor& data, c10::Device device) {
    return guarded([&] {
        CheckpointLoader loads = load_all(Checkpoint(open_bytes(data)), StorageSharing{}, Target{device, {}}, {});
        return lists_of(loads);
    });
}

Lists load_shared_op(const at::Tensor& data) {
    return guarded([&] {
        CheckpointLoader loads =
            load_all(Checkpoint(open_bytes(data)), StorageSharing{true, data}, Target{}, {});
        return lists_of(loads);
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

// Reads only the bytes that the slice needs, and maps nothing for them.
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

void save_file_op(const Tensors& tensors, const std::string& filename, const std::optional<Metadata>& metadata,
                  bool durable) {
    guarded([&] { PendingSave(named(tensors), metadata, filename).write_file(filename, durable); });
}

void save_tensors_op(const std::string& filename, Names names, std::vector<at::Tensor> tensors,
                     const std::optional<Metadata>& metadata, bool durable) {
    guarded([&] {
        PendingSave(named(std::move(names), std::move(tensors)), metadata, filename).write_file(filename, durable);
    });
}

at::Tensor save_op(const Tensors& tensors, const std::optional<Metadata>& metadata) {
    return guarded([&] { return PendingSave(named(tensors), metadata, "").write(); });
}

c10::intrusive_ptr<PendingSave> plan_save_op(const Tensors& tensors, const std::optional<Metadata>& metadata,
                                             const std::string& path, bool force_contiguous,
                                             const std::string& shared) {
    return guarded([&] {
        return c10::make_intrusive<PendingSave>(named(tensors), metadata, path, save_rules(force_contiguous, shared));
    });
}

c10::intrusive_ptr<PendingShardedSave> plan_sharded_save_op(const Tensors& tensors,
                                                            const std::optional<Metadata>& metadata,
                                                            const std::string& directory, const std::string& stem,
                                                            int64_t max_shard_size, bool force_contiguous,
                                                            const std::string& shared) {
    return guarded([&] {
        return c10::make_intrusive<PendingShardedSave>(named(tensors), metadata, directory, stem, max_shard_size,
                                                       save_rules(force_contiguous, shared));
    });
}

c10::intrusive_ptr<IncrementalWriter> create_incremental_writer_op(const std::string& path, const Tensors& specs,
                                                                   const std::optional<Metadata>& metadata,
                                                                   bool durable) {
    return guarded([&] { return c10::make_intrusive<IncrementalWriter>(path, named(specs), metadata, durable); });
}

c10::intrusive_ptr<PendingEdit> begin_edit_op(const std::string& path, const Metadata& set, const Names& removed,
                                              bool in_place, int64_t reserve, bool durable) {
    return guarded([&] { return c10::make_intrusive<PendingEdit>(path, set, removed, in_place, reserve, durable); });
}

void check_save_op(const Tensors& tensors, bool force_contiguous, const std::string& shared) {
    guarded([&] {
        NamedTensors checked = named(tensors);
        std::optional<Metadata> metadata;
        check_saveable(checked, metadata, save_rules(force_contiguous, shared));
    });
}

c10::Dict<std::string, std::string> tied_op(const Tensors& tensors, const Names& preferred) {
    return guarded([&] {
        const NamedTensors all = named(tensors);
        // Before the caller copies, or loads into, what is not contiguous, or has hooks.
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

c10::intrusive_ptr<File> open_op(const std::string& filename, const std::string& backend) {
    return c10::make_intrusive<File>(filename, backend);
}

c10::intrusive_ptr<File> open_checkpoint_op(const std::string& path, const std::string& backend,
                                            const std::optional<std::string>& variant, const std::string& extra) {
    return guarded([&] {
        PendingFile pending(path, backend, variant, extra);
        pending.advance(Deadline::never());
        return pending.result();
    });
}

c10::intrusive_ptr<File> open_bytes_op(const at::Tensor& data) { return c10::make_intrusive<File>(data); }

std::tuple<int64_t, int64_t> transfer_options_op() {
    return guarded([&]() -> std::tuple<int64_t, int64_t> {
        const TransferOptions options = transfer_options();
        return {options.pinned_pool_bytes, options.threads};
    });
}

void set_transfer_options_op(std::optional<int64_t> pinned_pool_bytes, std::optional<int64_t> threads) {
    guarded([&] { set_transfer_options(pinned_pool_bytes, threads); });
}

int64_t reserve_transfer_memory_op(int64_t bytes) {
    return guarded([&] { return PinnedPool::of_process().reserve(bytes); });
}

int64_t release_transfer_memory_op() {
    return guarded([&] { return PinnedPool::of_process().release(); });
}

std::tuple<std::string, std::string> built_for_op() {
    // Without the volatile the compiler may put the text into instructions, and a search of the file does not find it.
    const char* const volatile whole = built_for;
    const std::string text = whole;
    const auto between = [&text](const std::string& before, const std::string& after) {
        const auto start = text.find(before) + before.size();
        return text.substr(start, text.find(after, start) - start);
    };
    return {between("safetensors_torch ", " built"), between("for torch ", ", ")};
}

int64_t transfer_memory_op() { return PinnedPool::of_process().bytes(); }

// An op that reads or writes files: TorchScript must neither drop, move nor fold it.
c10::FunctionSchema effectful(const char* schema) {
    return torch::schema(schema, c10::AliasAnalysisKind::CONSERVATIVE);
}

// Kernels stand under CompositeExplicitAutograd: ops without a tensor argument have no other key to be found by.
void define(torch::Library& library) {
    const auto key = c10::DispatchKey::CompositeExplicitAutograd;
    // Before File, whose methods return them.
    register_pending_loads(library);
    register_pending_save(library);
    register_sharded_saves(library);
    register_incremental_writer(library);
    register_pending_edit(library);
    register_file(library);

    library.def(effectful(R"(load_file(str filename, *, Device device="cpu", str backend="mmap", bool? prefault=None, )"
                          "ScalarType? dtype=None, str[]? names=None) -> Dict(str, Tensor)"),
                torch::dispatch(key, load_file_op));
    library.def(R"(load(Tensor data, *, Device device="cpu", ScalarType? dtype=None, str[]? names=None) -> )"
                "Dict(str, Tensor)",
                torch::dispatch(key, load_op));
    library.def(effectful("save_file(Dict(str, Tensor) tensors, str filename, Dict(str, str)? metadata=None, *, "
                          "bool durable=False) -> ()"),
                torch::dispatch(key, save_file_op));
    library.def("save(Dict(str, Tensor) tensors, Dict(str, str)? metadata=None) -> Tensor",
                torch::dispatch(key, save_op));
    library.def(effectful(R"(get_tensor(str filename, str name, *, Device device="cpu") -> Tensor)"),
                torch::dispatch(key, get_tensor_op));
    // One range for each dimension of torch's shape: 0 <= start <= stop <= size, and a step of 1 or more.
    library.def(effectful("get_slice(str filename, str name, int[] starts, int[] stops, int[]? steps=None, *, "
                          R"(Device device="cpu") -> Tensor)"),
                torch::dispatch(key, get_slice_op));
    // The same as load_file and save_file without a dict of tensors, which not every compiler takes.
    library.def(effectful(R"(load_tensors(str filename, str[] names, *, Device device="cpu", str backend="mmap") -> )"
                          "Tensor[]"),
                torch::dispatch(key, load_tensors_op));
    library.def(effectful("save_tensors(str filename, str[] names, Tensor[] tensors, Dict(str, str)? metadata=None, "
                          "*, bool durable=False) -> ()"),
                torch::dispatch(key, save_tensors_op));

    // What the Python package and the C++ header are made of; no promise to anyone else.
    library.def(effectful("_load_file_lists(str filename, *, Device device, str backend, bool? prefault) -> "
                          "(str[] names, Tensor[] tensors)"),
                torch::dispatch(key, load_file_lists_op));
    library.def("_load_lists(Tensor data, *, Device device) -> (str[] names, Tensor[] tensors)",
                torch::dispatch(key, load_lists_op));
    library.def("_load_shared_lists(Tensor data) -> (str[] names, Tensor[] tensors)",
                torch::dispatch(key, load_shared_op));
    library.def(
        "_plan_save(Dict(str, Tensor) tensors, Dict(str, str)? metadata, str path, bool force_contiguous, str shared) "
        "-> __torch__.torch.classes.safetensors_torch.PendingSave",
        torch::dispatch(key, plan_save_op));
    library.def(
        "_plan_sharded_save(Dict(str, Tensor) tensors, Dict(str, str)? metadata, str directory, str stem, "
        "int max_shard_size, bool force_contiguous, str shared) -> "
        "__torch__.torch.classes.safetensors_torch.PendingShardedSave",
        torch::dispatch(key, plan_sharded_save_op));
    library.def(
        effectful(
            "_create_incremental_writer(str path, Dict(str, Tensor) specs, Dict(str, str)? metadata, bool durable) -> "
            "__torch__.torch.classes.safetensors_torch.IncrementalWriter"),
        torch::dispatch(key, create_incremental_writer_op));
    library.def(effectful("_begin_edit(str path, Dict(str, str) set, str[] removed, bool in_place, int reserve, "
                          "bool durable) -> __torch__.torch.classes.safetensors_torch.PendingEdit"),
                torch::dispatch(key, begin_edit_op));
    library.def(effectful("_check_save(Dict(str, Tensor) tensors, *, bool force_contiguous=False, "
                          R"(str shared="error") -> ())"),
                torch::dispatch(key, check_save_op));
    library.def("_tied(Dict(str, Tensor) tensors, str[] preferred) -> Dict(str, str)", torch::dispatch(key, tied_op));
    library.def(effectful("_check_names(str class_name, str[] missing, str[] unexpected, str prefix) -> ()"),
                torch::dispatch(key, check_names_op));
    library.def(effectful("_open(str filename, str backend) -> __torch__.torch.classes.safetensors_torch.File"),
                torch::dispatch(key, open_op));
    library.def(effectful("_open_checkpoint(str path, str backend, str? variant, str extra) -> "
                          "__torch__.torch.classes.safetensors_torch.File"),
                torch::dispatch(key, open_checkpoint_op));
    library.def("_open_bytes(Tensor data) -> __torch__.torch.classes.safetensors_torch.File",
                torch::dispatch(key, open_bytes_op));
    library.def(effectful("_transfer_options() -> (int pinned_pool_bytes, int threads)"),
                torch::dispatch(key, transfer_options_op));
    library.def(effectful("_set_transfer_options(int? pinned_pool_bytes, int? threads) -> ()"),
                torch::dispatch(key, set_transfer_options_op));
    library.def(effectful("_reserve_transfer_memory(int bytes) -> int"),
                torch::dispatch(key, reserve_transfer_memory_op));
    library.def(effectful("_release_transfer_memory() -> int"), torch::dispatch(key, release_transfer_memory_op));
    library.def(effectful("_transfer_memory() -> int"), torch::dispatch(key, transfer_memory_op));
    library.def("_built_for() -> (str version, str torch)", torch::dispatch(key, built_for_op));
    library.def(effectful("_last_error() -> (str kind, int code, int os_error, str message)"),
                torch::dispatch(key, last_error));
}

// Registers the ops with torch, when the library is loaded, unless another copy of it has: the Python package's layer
// in a program that is linked to libsafetensors_torch.so, say. All copies use those of the first one; whether they are
// of the same version, the C++ header and the Python package ask at their first call. In place of TORCH_LIBRARY, which
// ends the process then.
torch::Library* register_ops() noexcept {
    try {
        if (c10::Dispatcher::singleton().findSchema({"safetensors_torch::load_file", ""})) {
            return nullptr;
        }
        // Never destroyed: when the process ends, threads may still be in an op.
        auto* library = new torch::Library(torch::Library::DEF, "safetensors_torch", std::nullopt, __FILE__, __LINE__);
        define(*library);
        return library;
    } catch (const std::exception& error) {
        // The first call says which operator is missing.
        std::fprintf(stderr, "safetensors_torch: its operators could not be registered: %s\n", error.what());
        return nullptr;
    }
}

// Kept, or a search for leaks finds what the operators have.
[[gnu::used]] torch::Library* const registered = register_ops();

}  // namespace
}  // namespace safetensors_torch::layer
