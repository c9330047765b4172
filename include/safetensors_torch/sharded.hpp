/// @file
/// Loads and saves of checkpoints of several files. Part of safetensors_torch.hpp, which includes it. To read one
/// tensor by tensor, see Checkpoint in file.hpp.
#pragma once

#include <ATen/ATen.h>

#include <filesystem>
#include <string>
#include <vector>

#include "detail.hpp"
#include "source.hpp"
#include "types.hpp"

namespace safetensors_torch {

/// Loads the tensors of the checkpoint at `path` that `options` select to `device`, file after file. `path` and
/// `checkpoint` are as for Checkpoint.
///
/// Throws Error: as Checkpoint and as load_file do.
inline Tensors load_sharded(const std::filesystem::path& path, DeviceLike device = at::kCPU,
                            const LoadOptions& options = {}, const CheckpointOptions& checkpoint = {}) {
    const auto files = detail::open_checkpoint(path, options.backend, checkpoint);
    return detail::load(files, device, options);
}

/// The same to the CPU.
inline Tensors load_sharded(const std::filesystem::path& path, const LoadOptions& options,
                            const CheckpointOptions& checkpoint = {}) {
    return load_sharded(path, at::kCPU, options, checkpoint);
}

/// The same, of files that the program reads by its own means.
inline Tensors load_sharded(Filesystem& filesystem, const std::string& path, DeviceLike device = at::kCPU,
                            const LoadOptions& options = {}, const CheckpointOptions& checkpoint = {}) {
    return detail::load(detail::open_checkpoint(filesystem, path, checkpoint), device, options);
}

/// Writes `tensors`, from any device, as a checkpoint into `directory`, which is created if necessary: one file
/// STEM.safetensors or, if that would exceed max_shard_size, STEM-00001-of-00003.safetensors and so on with their index
/// STEM.safetensors.index.json. Returns the names of the files, the index last.
///
/// Names, index and division are those of Hugging Face's tools. Tensors are divided in the order of `tensors`. Each
/// file has all of `metadata`, and `format` = `pt`, which those tools require, unless `metadata` has that key.
///
/// Replaces a checkpoint of the same stem; symbolic links in the directory are replaced, not followed. The old files
/// change only once all new files are complete. Old files that are not overwritten are removed at the end, including a
/// STEM.safetensors that would take precedence over the index. If the process is killed in between, the directory may
/// have no index, so that files of two checkpoints are never taken for one.
///
/// Throws Error: as save_file does, before anything is written; max_shard_size is less than 1; the stem cannot begin a
/// file name.
inline std::vector<std::string> save_sharded(const Tensors& tensors, const std::filesystem::path& directory,
                                             const Metadata& metadata = {}, const ShardedSaveOptions& options = {}) {
    Metadata entries = metadata;
    entries.emplace("format", "pt");
    const detail::Object save =
        detail::make("PendingShardedSave", tensors.keys(), tensors.values(), detail::to_dict(entries),
                     directory.native(), options.stem, options.max_shard_size, options.force_contiguous,
                     detail::name_of(options.shared), options.durable);
    detail::run(save, options.progress);
    return detail::call_method(save, "result").to<std::vector<std::string>>();
}

/// The same without metadata of the caller.
inline std::vector<std::string> save_sharded(const Tensors& tensors, const std::filesystem::path& directory,
                                             const ShardedSaveOptions& options) {
    return save_sharded(tensors, directory, Metadata(), options);
}

}  // namespace safetensors_torch
