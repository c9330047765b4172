/// @file
/// Checkpoints of several files: loaded and saved as a whole. Part of safetensors_torch.hpp, which includes it. To read
/// one tensor by tensor, see Checkpoint in file.hpp.
#pragma once

#include <ATen/ATen.h>

#include <string>
#include <vector>

#include "detail.hpp"
#include "types.hpp"

namespace safetensors_torch {

/// The tensors of the checkpoint at `path` that `options` select, on `device`, file after file. `path` is a file, an
/// index or a directory, as for Checkpoint, and so is `checkpoint`.
///
/// Throws Error: as Checkpoint and as load_file do.
inline Tensors load_sharded(const std::string& path, at::Device device = at::kCPU, const LoadOptions& options = {},
                            const CheckpointOptions& checkpoint = {}) {
    const auto files = detail::open_checkpoint(path, options.backend, checkpoint);
    return detail::load(files, device, options);
}

/// Writes `tensors`, from whatever device, as a checkpoint into `directory`, which is made if it is not there: one file
/// STEM.safetensors, or, where that would pass max_shard_size, STEM-00001-of-00003.safetensors and so on beside their
/// index STEM.safetensors.index.json. Returns the names of the files, the index last.
///
/// Names, index and division are those of Hugging Face's tools; tensors go into the files in the order of `tensors`.
/// Each file has all of `metadata`, and `format` = `pt` unless that says otherwise, which those tools want.
///
/// A checkpoint of the same stem that is there is replaced; links in the directory are replaced, not followed. Nothing
/// of it changes before all new files are complete; what they do not overwrite is removed at the end, also a file
/// STEM.safetensors that would count before the index. If the process is killed in between, the directory may hold no
/// index, so that files of two checkpoints are never taken for one.
///
/// Throws Error: as save_file does, before anything is written; for a max_shard_size of less than 1; for a stem
/// that is no file name.
inline std::vector<std::string> save_sharded(const Tensors& tensors, const std::string& directory,
                                             const Metadata& metadata = {}, const ShardedSaveOptions& options = {}) {
    const auto op = detail::find_op("safetensors_torch::_plan_sharded_save");
    Metadata entries = metadata;
    entries.emplace("format", "pt");
    const detail::Object plan =
        detail::call_boxed(op, tensors, detail::to_dict(entries), directory, options.stem, options.max_shard_size,
                           options.force_contiguous, detail::name_of(options.shared))
            .toObject();
    detail::call_method(plan, "start", options.durable, 0.0);
    detail::run(plan, detail::call_method(plan, "size").toInt(), options.progress);
    return detail::call_method(plan, "file_names").to<std::vector<std::string>>();
}

}  // namespace safetensors_torch
