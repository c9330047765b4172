/// @file
/// Saving tensors to a file, or to bytes in memory. Part of safetensors_torch.hpp, which includes it.
#pragma once

#include <ATen/ATen.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "detail.hpp"
#include "types.hpp"

namespace safetensors_torch {

/// Writes `tensors`, from whatever device, and `metadata` to a file at `path`.
///
/// A file that is there is replaced as a whole, or stays as it was: readers and tensors mapped from it never see half
/// of the new one (docs/saving.md says how, and when not). A symbolic link is replaced, and what it leads to stays as
/// it is. The tensors may be mapped from the file that is replaced. The values of conjugate and negative views are
/// written. Tensors are written by dtype, then by name, whatever their order. Nothing is added to `metadata`, except by
/// Shared::keep_one.
///
/// Throws Error before anything is written: a sparse tensor; tensors that share memory, and one that is not
/// contiguous, unless `options` say otherwise; a meta tensor; a storage that is too small for its tensor; a dtype that
/// the format does not have; the name `__metadata__`; names or metadata that are not UTF-8. And when the operating
/// system refuses.
inline void save_file(const Tensors& tensors, const std::string& path, const Metadata& metadata = {},
                      const SaveOptions& options = {}) {
    const auto plan = detail::plan_save(tensors, metadata, path, options);
    detail::call_method(plan, "start_file", path, options.durable, 0.0);
    detail::run(plan, detail::call_method(plan, "size").toInt(), options.progress);
}

/// The bytes that save_file would write; SaveOptions::durable does nothing here.
///
/// Throws Error for the tensors and the metadata that save_file refuses.
inline std::string save(const Tensors& tensors, const Metadata& metadata = {}, const SaveOptions& options = {}) {
    const auto plan = detail::plan_save(tensors, metadata, "", options);
    std::string bytes(static_cast<std::size_t>(detail::call_method(plan, "size").toInt()), '\0');
    const auto size = static_cast<int64_t>(bytes.size());
    detail::call_method(plan, "start_into", at::from_blob(bytes.data(), {size}, at::kByte), 0.0);
    detail::run(plan, size, options.progress);
    return bytes;
}

}  // namespace safetensors_torch
