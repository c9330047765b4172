/// @file
/// safetensors for LibTorch: loads and saves tensors, modules and slices from C++17. docs/cpp.md is a guide with
/// complete programs.
///
///     #include <safetensors_torch.hpp>
///
///     auto weights = safetensors_torch::load_file("model.safetensors", "cuda:0");
///     at::Tensor bias = weights.at("encoder.bias");
///     for (auto& [name, tensor] : weights) std::cout << name << " " << tensor.sizes() << "\n";
///     safetensors_torch::save_file(weights, "copy.safetensors", {{"format", "pt"}});
///
///     safetensors_torch::File file("model.safetensors");
///     at::Tensor row = file.get_slice("embedding", {7, at::indexing::Slice(0, 128)});
///
///     torch::nn::Linear layer(4, 2);
///     safetensors_torch::save_model(*layer, "linear.safetensors");
///     safetensors_torch::load_model(*layer, "linear.safetensors");
///
///     auto gpt = safetensors_torch::load_sharded("gpt/");             // model.safetensors.index.json and its files
///
/// Link libsafetensors_torch.so and libtorch (CMake: SafetensorsTorch::safetensors_torch). This header knows nothing of
/// the format. It calls the operators and classes that the library registers with torch, so no C++ symbol crosses the
/// library's boundary.
///
/// Threads: all functions, and all methods of a File or Checkpoint, including close(), are thread-safe. As with torch's
/// own functions, only one thread at a time may write to a tensor or fill a module.
///
/// Errors: every function throws Error, a c10::Error whose what() has no backtrace, with an error code for programs.
/// Exceptions of a filter, a Rename or a Progress pass through unchanged. Paths are bytes, as the operating system
/// takes them.
///
/// SFT_VERSION_STRING and SFT_VERSION_NUMBER, of safetensors_torch.h, are the version of this header.
///
///     for (auto& [name, tensor] : file.prefetch()) use(name, tensor);  // each once it has landed
///
/// Programs that train include safetensors_torch/optimizer.hpp too, which has the state of optimizers.
///
/// This header includes all others: file.hpp (open files and checkpoints), source.hpp (files that the program reads by
/// its own means), prefetch.hpp (tensors as they land), save.hpp, incremental_writer.hpp (files that are written tensor
/// by tensor), metadata.hpp (edits of metadata), sharded.hpp (checkpoints of several files), model.hpp (modules),
/// transfer.hpp (threads, pinned memory), tensors.hpp (tensors by name), types.hpp (all options) and error.hpp.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "safetensors_torch.h"
#include "safetensors_torch/detail.hpp"
#include "safetensors_torch/error.hpp"
#include "safetensors_torch/file.hpp"
#include "safetensors_torch/incremental_writer.hpp"
#include "safetensors_torch/metadata.hpp"
#include "safetensors_torch/model.hpp"
#include "safetensors_torch/prefetch.hpp"
#include "safetensors_torch/save.hpp"
#include "safetensors_torch/sharded.hpp"
#include "safetensors_torch/source.hpp"
#include "safetensors_torch/tensors.hpp"
#include "safetensors_torch/transfer.hpp"
#include "safetensors_torch/types.hpp"

namespace safetensors_torch {

/// Loads all tensors of the file at `path` to `device`, in file order. For a checkpoint of several files, see
/// load_sharded.
///
/// Each tensor owns its storage, is writable and requires no grad. Tensors of two calls never share memory. On the meta
/// device, tensors have shapes and dtypes, and only the header is read.
///
/// `prefault` applies to Backend::mmap: see LoadOptions.
///
/// Throws Error: `No such file or directory: PATH`; the file cannot be read; it is not a safetensors file, or is
/// truncated; torch does not have a dtype. Throws c10::OutOfMemoryError, which names the tensor, if the device has too
/// little memory.
inline Tensors load_file(const std::filesystem::path& path, DeviceLike device = at::kCPU,
                         Backend backend = Backend::mmap, std::optional<bool> prefault = std::nullopt) {
    using Lists = std::tuple<std::vector<std::string>, std::vector<at::Tensor>>;
    using Signature = Lists(const std::string&, at::Device, const std::string&, std::optional<bool>);
    const auto op = detail::find_op("safetensors_torch::_load_file_lists").typed<Signature>();
    auto [names, tensors] = detail::call(op, path.native(), at::Device(device), detail::name_of(backend), prefault);
    return detail::to_tensors(std::move(names), tensors);
}

/// Loads the tensors of the file at `path` that `options` select to `device`, in file order.
///
/// If the device has streams, later work of its current stream sees the tensors.
///
/// Throws Error: as the other load_file; the file has no tensor of a name in `options.names`; `options.dtype` is not
/// floating-point, or a tensor cannot be converted to it.
inline Tensors load_file(const std::filesystem::path& path, DeviceLike device, const LoadOptions& options) {
    return detail::load(detail::open(path, options.backend), device, options);
}

/// The same, of a file that the program reads by its own means. `name` stands for the path in messages.
inline Tensors load_file(std::shared_ptr<Source> source, const std::string& name, DeviceLike device = at::kCPU,
                         const LoadOptions& options = {}) {
    return detail::load(detail::open_source(std::move(source), name), device, options);
}

/// The same to the CPU.
inline Tensors load_file(const std::filesystem::path& path, const LoadOptions& options) {
    return load_file(path, at::kCPU, options);
}

/// Loads the tensors that `options` select of a safetensors file whose bytes are in memory; ignores backend and
/// prefault. The tensors are copies: `bytes` may be freed.
///
/// Throws Error as load_file does for the contents and the options, and for the path of a file instead of its bytes.
inline Tensors load(BytesView bytes, DeviceLike device = at::kCPU, const LoadOptions& options = {}) {
    const std::string_view text = bytes;
    detail::refuse_path(text);
    // from_blob asks for a mutable pointer; the operator only reads.
    const at::Tensor data =
        at::from_blob(const_cast<char*>(text.data()), {static_cast<int64_t>(text.size())}, at::kByte);
    const auto op = detail::find_op("safetensors_torch::_open_bytes");
    return detail::load(detail::call_boxed(op, data).toObject(), device, options);
}

/// The same to the CPU.
inline Tensors load(BytesView bytes, const LoadOptions& options) { return load(bytes, at::kCPU, options); }

}  // namespace safetensors_torch
