/// @file
/// Changing the metadata of a file. Part of safetensors_torch.hpp, which includes it.
#pragma once

#include <string>
#include <vector>

#include "detail.hpp"
#include "types.hpp"

namespace safetensors_torch {

/// Changes the metadata of the file at `path`, and returns what it is then. Tensors, and where they lie, stay as they
/// are. A key that is removed need not be there. Where nothing changes, nothing is written, unless `options.in_place`
/// is false. A symbolic link is replaced by the changed file, and what it leads to stays as it is.
///
/// In place, the header is written over the old one, with one short write: files that are open, and tensors that are
/// mapped, see nothing of it, but who opens the file in that moment, or a loss of power, may meet a part of the change.
/// Otherwise the file is replaced as by save_file, its data copied by the kernel.
///
/// Throws Error: as File does; in place without room, or of a symbolic link; a header of more than 100 MB; a negative
/// reserve; text that is not UTF-8; when the operating system refuses. The file is then as it was, unless the text says
/// otherwise.
inline Metadata edit_metadata(const std::string& path, const MetadataChanges& changes,
                              const EditOptions& options = {}) {
    const auto op = detail::find_op("safetensors_torch::_begin_edit");
    detail::Strings set;
    std::vector<std::string> removed;
    for (const auto& [key, value] : changes) {
        if (value) {
            set.insert(key, *value);
        } else {
            removed.push_back(key);
        }
    }
    const detail::Object edit =
        detail::call_boxed(op, path, set, removed, options.in_place, options.reserve, options.durable).toObject();
    detail::run(edit, detail::call_method(edit, "size").toInt(), options.progress);
    Metadata result;
    for (const auto& entry : detail::call_method(edit, "metadata").to<detail::Strings>()) {
        result.emplace(entry.key(), entry.value());
    }
    return result;
}

}  // namespace safetensors_torch
