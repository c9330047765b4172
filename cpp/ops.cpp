// The ops: their schemas in one block, their kernels above it. The schemas are the C++ ABI of this library.

#include <torch/library.h>

#include "cpp/error.h"
#include "cpp/file.h"
#include "cpp/load.h"
#include "cpp/model.h"
#include "cpp/save.h"
#include "cpp/shared.h"

namespace safetensors_torch {
namespace {

using Names = std::vector<std::string>;

Tensors load_file_op(const std::string& filename, c10::Device device, const std::string& backend,
                     std::optional<bool> prefault) {
    return guarded([&] { return dict_of(load_file(filename, device, backend, prefault)); });
}

Tensors load_op(const at::Tensor& data, c10::Device device) {
    return guarded([&] { return dict_of(load_all(open_bytes(data), Lender{}, device)); });
}

Lists load_file_lists_op(const std::string& filename, c10::Device device, const std::string& backend,
                         std::optional<bool> prefault) {
    return guarded([&] { return lists_of(load_file(filename, device, backend, prefault)); });
}

Lists load_lists_op(const at::Tensor& data, c10::Device device) {
    return guarded([&] { return lists_of(load_all(open_bytes(data), Lender{}, device)); });
}

Lists load_shared_op(const at::Tensor& data) {
    return guarded([&] { return lists_of(load_all(open_bytes(data), Lender{true, data}, at::kCPU)); });
}

at::Tensor get_tensor_op(const std::string& filename, const std::string& name, c10::Device device) {
    return guarded([&] {
        const auto file = open_file(filename, "mmap");
        return load_tensor(file, Lender{true, {}}, (*file)->find(as_bytes(name)), device);
    });
}

void save_file_op(const Tensors& tensors, const std::string& filename, const std::optional<Metadata>& metadata,
                  bool durable) {
    guarded([&] { PendingSave(named(tensors), metadata, filename).write_file(filename, durable); });
}

at::Tensor save_op(const Tensors& tensors, const std::optional<Metadata>& metadata) {
    return guarded([&] { return PendingSave(named(tensors), metadata, "").write(); });
}

c10::intrusive_ptr<PendingSave> plan_save_op(const Tensors& tensors, const std::optional<Metadata>& metadata) {
    return guarded([&] { return c10::make_intrusive<PendingSave>(named(tensors), metadata, ""); });
}

void check_save_op(const Tensors& tensors) {
    guarded([&] { check_saveable(named(tensors)); });
}

c10::Dict<std::string, std::string> tied_op(const Tensors& tensors, const Names& preferred) {
    return guarded([&] {
        c10::Dict<std::string, std::string> result;
        for (const auto& [dropped, kept] : tied_names(named(tensors), {preferred.begin(), preferred.end()})) {
            result.insert(dropped, kept);
        }
        return result;
    });
}

std::tuple<Names, Names> load_state_op(const c10::intrusive_ptr<File>& file, const Tensors& state,
                                       const Names& optional, const std::string& class_name, bool strict) {
    return guarded([&]() -> std::tuple<Names, Names> {
        auto [missing, unexpected] = file->load_state(state, optional, class_name, strict);
        return {std::move(missing), std::move(unexpected)};
    });
}

c10::intrusive_ptr<File> open_op(const std::string& filename, const std::string& backend) {
    return c10::make_intrusive<File>(filename, backend);
}

// An op that reads or writes files: TorchScript must neither drop, move nor fold it.
c10::FunctionSchema effectful(const char* schema) {
    return torch::schema(schema, c10::AliasAnalysisKind::CONSERVATIVE);
}

}  // namespace

// Kernels stand under CompositeExplicitAutograd: ops without a tensor argument have no other key to be found by.
TORCH_LIBRARY(safetensors_torch, library) {
    const auto key = c10::DispatchKey::CompositeExplicitAutograd;
    register_file(library);
    register_pending_save(library);

    library.def(effectful(R"(load_file(str filename, *, Device device="cpu", str backend="mmap", bool? prefault=None))"
                          " -> Dict(str, Tensor)"),
                torch::dispatch(key, load_file_op));
    library.def(R"(load(Tensor data, *, Device device="cpu") -> Dict(str, Tensor))", torch::dispatch(key, load_op));
    library.def(effectful("save_file(Dict(str, Tensor) tensors, str filename, Dict(str, str)? metadata=None, *, "
                          "bool durable=False) -> ()"),
                torch::dispatch(key, save_file_op));
    library.def("save(Dict(str, Tensor) tensors, Dict(str, str)? metadata=None) -> Tensor",
                torch::dispatch(key, save_op));
    library.def(effectful(R"(get_tensor(str filename, str name, *, Device device="cpu") -> Tensor)"),
                torch::dispatch(key, get_tensor_op));

    // What the Python package and the C++ header are made of; no promise to anyone else.
    library.def(effectful("_load_file_lists(str filename, *, Device device, str backend, bool? prefault) -> "
                          "(str[] names, Tensor[] tensors)"),
                torch::dispatch(key, load_file_lists_op));
    library.def("_load_lists(Tensor data, *, Device device) -> (str[] names, Tensor[] tensors)",
                torch::dispatch(key, load_lists_op));
    library.def("_load_shared_lists(Tensor data) -> (str[] names, Tensor[] tensors)",
                torch::dispatch(key, load_shared_op));
    library.def(
        "_plan_save(Dict(str, Tensor) tensors, Dict(str, str)? metadata=None) -> "
        "__torch__.torch.classes.safetensors_torch.PendingSave",
        torch::dispatch(key, plan_save_op));
    library.def(effectful("_check_save(Dict(str, Tensor) tensors) -> ()"), torch::dispatch(key, check_save_op));
    library.def("_tied(Dict(str, Tensor) tensors, str[] preferred) -> Dict(str, str)", torch::dispatch(key, tied_op));
    library.def(effectful("_load_state(__torch__.torch.classes.safetensors_torch.File file, Dict(str, Tensor) state, "
                          "str[] optional, str class_name, bool strict) -> (str[] missing, str[] unexpected)"),
                torch::dispatch(key, load_state_op));
    library.def(effectful("_open(str filename, str backend) -> __torch__.torch.classes.safetensors_torch.File"),
                torch::dispatch(key, open_op));
    library.def(effectful("_last_error() -> (str kind, int code, int os_error, str message)"),
                torch::dispatch(key, last_error));
}

}  // namespace safetensors_torch
