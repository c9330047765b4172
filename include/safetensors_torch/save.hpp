/// @file
/// Saving tensors to a file, or to bytes in memory. Part of safetensors_torch.hpp, which includes it.
#pragma once

#include <ATen/ATen.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>

#include "detail.hpp"
#include "types.hpp"

namespace safetensors_torch {

/// Writes `tensors`, from any device, and `metadata` to a file at `path`.
///
/// An existing file is replaced atomically: readers, and tensors mapped from it, never see part of the new file
/// (docs/saving.md has the exceptions). A symbolic link is replaced; its target stays as it is. The tensors may be
/// mapped from the file that is replaced. For conjugate and negative views, their values are written. The file has the
/// tensors by dtype, then by name. Only Shared::keep_one adds to `metadata`.
///
/// Throws Error, before anything is written: a tensor is sparse, or on the meta device; tensors share memory, or one is
/// not contiguous, unless `options` allow it; a storage is too small for its tensor; the format does not have a dtype;
/// a tensor is called `__metadata__`; names or metadata are not UTF-8. Also throws Error if the file cannot be written.
inline void save_file(const Tensors& tensors, const std::filesystem::path& path, const Metadata& metadata = {},
                      const SaveOptions& options = {}) {
    const auto plan = detail::plan_save(tensors, metadata, path, options);
    detail::call_method(plan, "set_file", path.native(), options.durable);
    detail::run(plan, options.progress);
}

/// The same without metadata.
inline void save_file(const Tensors& tensors, const std::filesystem::path& path, const SaveOptions& options) {
    save_file(tensors, path, Metadata(), options);
}

/// Returns the bytes that save_file would write; ignores SaveOptions::durable.
///
/// Throws Error for tensors and metadata that save_file refuses.
inline std::string save(const Tensors& tensors, const Metadata& metadata = {}, const SaveOptions& options = {}) {
    const auto plan = detail::plan_save(tensors, metadata, "", options);
    std::string bytes(static_cast<std::size_t>(detail::call_method(plan, "total").toInt()), '\0');
    const auto size = static_cast<int64_t>(bytes.size());
    detail::call_method(plan, "set_memory", at::from_blob(bytes.data(), {size}, at::kByte));
    detail::run(plan, options.progress);
    return bytes;
}

}  // namespace safetensors_torch
