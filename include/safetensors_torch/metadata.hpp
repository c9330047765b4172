/// @file
/// Changing the metadata of a file. Part of safetensors_torch.hpp, which includes it.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "detail.hpp"
#include "types.hpp"

namespace safetensors_torch {

/// Changes the metadata of the file at `path`, and returns the new metadata. Tensors and their alignment stay as they
/// are. The file is replaced as by save_file, and the kernel copies the data, or shares its blocks if the filesystem
/// can. Removing an absent key is not an error. Nothing is written if nothing changes and the header already has
/// `options.reserve` free bytes. A symbolic link is replaced by the changed file; the file it leads to stays as it is.
///
/// Throws Error: as File does; if `options.in_place` is impossible; a header of more than 100 MB; a negative reserve;
/// text that is not UTF-8; another program changes the file during the edit; a system error. The file is then as it
/// was, unless the text says otherwise.
inline Metadata edit_metadata(const std::filesystem::path& path, const MetadataChanges& changes,
                              const EditOptions& options = {}) {
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
        detail::make("PendingEdit", path.native(), set, removed, options.in_place, options.reserve, options.durable);
    detail::run(edit, options.progress);
    return detail::to_metadata(detail::call_method(edit, "result").to<detail::Strings>());
}

}  // namespace safetensors_torch
