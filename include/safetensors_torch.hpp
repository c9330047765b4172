/// @file
/// safetensors for LibTorch: load and save tensors, modules and parts of files from C++17. A guide with whole programs
/// is docs/cpp.md.
///
///     #include <safetensors_torch.hpp>
///
///     auto weights = safetensors_torch::load_file("model.safetensors", at::kCUDA);
///     at::Tensor bias = weights.at("encoder.bias");
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
/// Link libsafetensors_torch.so and libtorch (CMake: SafetensorsTorch::safetensors_torch). This header holds no
/// format knowledge and keeps no state: it finds the operators that the library registers and calls them, so no C++
/// symbol crosses the library's boundary.
///
/// Threads: every function may be called from several threads at once, and so may the methods of one File or
/// Checkpoint, close() too; tensors and modules are read, or filled, as torch's own functions do it: one thread at a
/// time may write to a tensor.
///
/// Errors: each function throws Error, a c10::Error with a text for a person, and no backtrace, in what(), and with
/// numbers for a program. What a filter, a Rename or a Progress throws comes through as it is. Paths are bytes, as the
/// operating system takes them.
///
/// Where to look: files and checkpoints that stay open are in safetensors_torch/file.hpp, saving in save.hpp, tensor by
/// tensor in incremental_writer.hpp, changing metadata in metadata.hpp, checkpoints of several files in sharded.hpp,
/// modules in model.hpp, other maps of tensors in maps.hpp, memory for devices in transfer.hpp, all options in
/// types.hpp, errors in error.hpp. This header includes them.
#pragma once

#include <ATen/ATen.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "safetensors_torch.h"
#include "safetensors_torch/detail.hpp"
#include "safetensors_torch/error.hpp"
#include "safetensors_torch/file.hpp"
#include "safetensors_torch/incremental_writer.hpp"
#include "safetensors_torch/maps.hpp"
#include "safetensors_torch/metadata.hpp"
#include "safetensors_torch/model.hpp"
#include "safetensors_torch/save.hpp"
#include "safetensors_torch/sharded.hpp"
#include "safetensors_torch/transfer.hpp"
#include "safetensors_torch/types.hpp"

namespace safetensors_torch {

/// Every tensor of the file at `path`, on `device`, in file order. Of a checkpoint of several files: load_sharded.
///
/// A tensor owns its storage, is writable and needs no grad. Two calls never give tensors that share memory.
/// On the meta device: shapes and dtypes, nothing is read but the header.
///
/// `prefault` is about Backend::mmap, whose tensors cost a page fault every few pages where they are touched first, and
/// a wait for the disk where the file is not in memory. Without a value, threads in the background bring the file in
/// while the caller goes on (a cold one only if it takes no more than half of the memory available); true has that done
/// when the call returns, false leaves it to the touch.
///
/// Throws Error: `No such file or directory: PATH`; the file cannot be read; it is not a safetensors file, or is
/// cut short; a dtype that torch does not have; c10::OutOfMemoryError that names the tensor for which the device has no
/// memory.
inline Tensors load_file(const std::string& path, at::Device device = at::kCPU, Backend backend = Backend::mmap,
                         std::optional<bool> prefault = std::nullopt) {
    using Names = std::optional<std::vector<std::string>>;
    using Signature = Tensors(const std::string&, at::Device, const std::string&, std::optional<bool>,
                              std::optional<at::ScalarType>, const Names&);
    const auto op = detail::find_op("safetensors_torch::load_file").typed<Signature>();
    return detail::call(op, path, device, detail::name_of(backend), prefault, std::nullopt, std::nullopt);
}

/// The tensors of the file at `path` that `options` select, on `device`, in file order.
///
/// Where the device has streams, what its current stream does after this call sees the tensors.
///
/// Throws Error: as the other load_file; a dtype that is not floating-point, or cannot be converted to.
inline Tensors load_file(const std::string& path, at::Device device, const LoadOptions& options) {
    return detail::load(detail::open(path, options.backend), device, options);
}

/// Every tensor of a safetensors file whose bytes are in memory. The tensors are copies: `bytes` may go away.
///
/// A `const char*` converts to a view that ends at the first zero byte, which is not what is wanted here: pass a
/// std::string, or a pointer and a length.
///
/// Throws Error as load_file does of the contents.
inline Tensors load(std::string_view bytes, at::Device device = at::kCPU) {
    using Names = std::optional<std::vector<std::string>>;
    using Signature = Tensors(const at::Tensor&, at::Device, std::optional<at::ScalarType>, const Names&);
    const auto op = detail::find_op("safetensors_torch::load").typed<Signature>();
    // from_blob asks for a mutable pointer; the operator only reads.
    const at::Tensor data =
        at::from_blob(const_cast<char*>(bytes.data()), {static_cast<int64_t>(bytes.size())}, at::kByte);
    return detail::call(op, data, device, std::nullopt, std::nullopt);
}

/// The tensors that `options` select of a safetensors file whose bytes are in memory; its backend and prefault are of
/// no concern. The tensors are copies: `bytes` may go away.
///
/// Throws Error as load_file does of the contents and the options.
inline Tensors load(std::string_view bytes, at::Device device, const LoadOptions& options) {
    const auto op = detail::find_op("safetensors_torch::_open_bytes");
    const at::Tensor data =
        at::from_blob(const_cast<char*>(bytes.data()), {static_cast<int64_t>(bytes.size())}, at::kByte);
    LoadOptions copies = options;
    copies.backend = Backend::pread;
    return detail::load(detail::call_boxed(op, data).toObject(), device, copies);
}

}  // namespace safetensors_torch
