/// @file
/// Tensors that are handed out as soon as they have landed. Part of safetensors_torch.hpp, which includes it.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <iterator>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "detail.hpp"
#include "index.hpp"
#include "types.hpp"

namespace safetensors_torch {

/// The tensors to read, and the index of the part of each, as for File::get_slice; an empty index takes the whole
/// tensor. An empty plan reads all tensors.
using PrefetchPlan = std::map<std::string, std::vector<at::indexing::TensorIndex>>;

/// Hands out tensors that are read in the background, each once: by name, or in the order in which they land.
///
///     for (auto& [name, tensor] : file.prefetch()) consume(name, tensor);
///
/// A PrefetchLoader is a handle: copies share one loader. Reading ends with the last of them, or with close(). It keeps
/// the file open. All methods are thread-safe.
class PrefetchLoader {
  public:
    /// A name and its tensor.
    using Item = std::pair<std::string, at::Tensor>;

    /// Returns the names, in file order.
    std::vector<std::string> names() const {
        return detail::call_method(object_, "names").to<std::vector<std::string>>();
    }

    /// Returns the number of tensors, including those that were handed out.
    std::size_t size() const { return names().size(); }

    /// Returns a tensor that has landed, and waits for one. Returns nothing once all were handed out.
    ///
    /// Later work of the current stream of its device sees the tensor. Throws Error: the loader is closed; a read
    /// failed, and the text names the tensor. Throws c10::OutOfMemoryError, which names the tensor, if the device has
    /// too little memory. After an error, the loader is closed.
    std::optional<Item> next() const {
        while (true) {
            const auto result = detail::call_method(object_, "next", kStepSeconds).toTuple();
            const c10::IValue& item = result->elements()[1];
            if (!item.isNone()) {
                const auto& parts = item.toTupleRef().elements();
                const std::string& name = parts[0].toStringRef();
                return Item(name, part(name, parts[1].toTensor()));
            }
            if (!result->elements()[0].toBool()) {
                return std::nullopt;
            }
        }
    }

    /// Returns the tensor called `name`, and waits for it. Its bytes are read before those of others.
    /// Throws Error as next() does; the plan does not have the name; the tensor was handed out before.
    at::Tensor take(const std::string& name) const {
        while (true) {
            const c10::IValue tensor = detail::call_method(object_, "take", name, kStepSeconds);
            if (!tensor.isNone()) {
                return part(name, tensor.toTensor());
            }
        }
    }

    /// Ends all reading, and frees the tensors that were not handed out; the others remain valid. A second call does
    /// nothing.
    void close() const { detail::call_method(object_, "close"); }

    /// The end of an iteration.
    struct End {};

    /// Calls next() for a range-based for loop. It has less than an input iterator, so algorithms do not take it. The
    /// loader must outlive it.
    class Iterator {
      public:
        /// Calls next() for the first item.
        explicit Iterator(const PrefetchLoader& loader) : loader_(loader), item_(loader.next()) {}

        /// Returns the current item.
        Item& operator*() { return *item_; }

        /// Calls next(). The tensor before is freed first, if nothing else refers to it.
        Iterator& operator++() {
            item_.reset();
            item_ = loader_.next();
            return *this;
        }

        /// Returns whether an item is left.
        bool operator!=(End) const { return item_.has_value(); }

      private:
        const PrefetchLoader& loader_;
        std::optional<Item> item_;
    };

    /// Begins to hand out the tensors that are left.
    Iterator begin() const { return Iterator(*this); }
    /// The end of every iteration.
    End end() const { return {}; }

  private:
    friend class File;
    friend PrefetchLoader iterate(const std::vector<std::filesystem::path>& files, const IterateOptions& options);

    // A signal or close() on another thread waits at most so long.
    static constexpr double kStepSeconds = 0.1;

    PrefetchLoader(detail::Object object, std::map<std::string, detail::Index> rest)
        : object_(std::move(object)), rest_(std::move(rest)) {}

    at::Tensor part(const std::string& name, const at::Tensor& tensor) const {
        const auto rest = rest_.find(name);
        return rest == rest_.end() ? tensor : tensor.index(rest->second);
    }

    detail::Object object_;
    // The indices to apply to the tensors that were read.
    std::map<std::string, detail::Index> rest_;
};

namespace detail {

// Returns the names to read of each file, which has them. At least one file has each name, or a match of each glob.
inline std::vector<std::optional<std::vector<std::string>>> select(const std::vector<Object>& files,
                                                                   const NameSelection& selection) {
    std::vector<std::optional<std::vector<std::string>>> chosen(files.size());
    if (!selection.names()) {
        std::transform(files.begin(), files.end(), chosen.begin(),
                       [&](const Object& file) { return select(file, selection); });
        return chosen;
    }
    chosen.assign(files.size(), std::vector<std::string>());
    for (const std::string& name : *selection.names()) {
        bool is_found = false;
        for (std::size_t i = 0; i < files.size(); ++i) {
            const auto matches = select(files[i], NameSelection{name});
            for (const std::string& match : *matches) {
                const bool is_there = call_method(files[i], "contains", match).toBool();
                is_found = is_found || is_there;
                if (is_there && std::find(chosen[i]->begin(), chosen[i]->end(), match) == chosen[i]->end()) {
                    chosen[i]->push_back(match);
                }
            }
        }
        if (!is_found) {
            fail("no file has a tensor \"" + name + "\"; name one that a file has", ErrorCategory::safetensor,
                 SFT_ERROR_TENSOR_NOT_FOUND);
        }
    }
    return chosen;
}

}  // namespace detail

/// Reads the tensors of several files, while the caller uses those that have landed. Each path is a file, an index or a
/// directory, as for Checkpoint.
///
///     for (auto& [name, tensor] : safetensors_torch::iterate({"a.safetensors", "b.safetensors"})) ...
///
/// Files come in the given order, and their tensors about in file order. The next file is read while the last tensors
/// of the one before are used. PrefetchLoader::take returns the tensor of the first file that has the name.
///
/// Throws Error: as Checkpoint does for each path, as load_file does for `options.dtype`; no file has a name in
/// `options.names`; torch does not have a dtype.
inline PrefetchLoader iterate(const std::vector<std::filesystem::path>& files, const IterateOptions& options = {}) {
    std::vector<detail::Object> opened;
    for (const std::filesystem::path& path : files) {
        opened.push_back(detail::open_checkpoint(path, options.backend, {}));
    }
    const auto names = detail::select(opened, options.names);
    const detail::Object plan = detail::make("PrefetchPlan");
    const std::vector<std::vector<int64_t>> whole;
    for (std::size_t i = 0; i < opened.size(); ++i) {
        detail::call_method(plan, "add", opened[i], names[i], whole);
    }
    constexpr int64_t most_threads = 64;
    return {detail::call_method(plan, "start", at::Device(options.device), options.dtype, options.buffer_bytes,
                                most_threads)
                .toObject(),
            {}};
}

}  // namespace safetensors_torch
