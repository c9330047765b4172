/// @file
/// Files that are written tensor by tensor. Part of safetensors_torch.hpp, which includes it.
#pragma once

#include <ATen/ATen.h>

#include <filesystem>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "detail.hpp"
#include "types.hpp"

namespace safetensors_torch {

/// A file that is written tensor by tensor, so that only one has to be in memory. All tensors are declared first, then
/// written in any order. The bytes are those that save_file writes for the same tensors.
///
///     safetensors_torch::IncrementalWriter writer("model.safetensors", {{"weight", {at::kFloat, {3, 4}}}});
///     writer.write("weight", tensor);
///     writer.commit();
///
/// The commit puts the file in place. Without one, the file that was there before stays as it was, and nothing else is
/// left.
///
/// An IncrementalWriter is a handle: copies share one file. All methods are thread-safe: threads may write different
/// tensors at once.
class IncrementalWriter {
  public:
    /// Begins the file at `path`: allocates its space, and writes its header.
    ///
    /// Throws Error: the format does not have a dtype; a tensor is called `__metadata__`; names or metadata are not
    /// UTF-8; the file cannot be written, or the disk has too little space.
    IncrementalWriter(const std::filesystem::path& path, const TensorSpecs& specs, const Metadata& metadata = {},
                      const IncrementalWriterOptions& options = {})
        : IncrementalWriter(path, empty(specs), metadata, options) {}

    /// The same with the dtypes and shapes of `tensors`, which may be on the meta device. Their values are not written.
    IncrementalWriter(const std::filesystem::path& path, const Tensors& tensors, const Metadata& metadata = {},
                      const IncrementalWriterOptions& options = {}) {
        object_ = detail::make("IncrementalWriter", path.native(), tensors.keys(), tensors.values(),
                               detail::to_dict(metadata), options.durable);
    }

    /// Writes one tensor, from any device, with the declared dtype and shape. If this fails, it may be called again.
    ///
    /// Throws Error: the name was not declared; the dtype or the shape differs; the tensor is written already;
    /// save_file refuses the tensor; the writer is committed; the file cannot be written. Does not check whether
    /// tensors share memory.
    void write(const std::string& name, const at::Tensor& tensor) {
        call("write", name, tensor, std::numeric_limits<double>::infinity());
    }

    /// Returns the names of the tensors that are not written yet, in file order.
    /// Throws Error in a process that was forked from the one that began the file; so do write and commit.
    std::vector<std::string> missing() const { return call("missing").to<std::vector<std::string>>(); }

    /// Puts the file in place, as save_file does.
    ///
    /// Throws Error: tensors are missing, or another thread is writing one (the writer stays open then); the writer is
    /// committed already; the file cannot be written.
    void commit() { call("commit"); }

    /// Makes the file joinable: other processes can write parts of its tensors with write_joined. Returns the path of
    /// the hidden file, for them. Call it before the first write.
    ///
    /// Throws Error: another thread is writing a tensor; the writer is committed; the file cannot be written.
    std::filesystem::path make_joinable() { return call("make_joinable").toStringRef(); }

    /// Puts the file in place, as commit does, without checking that every tensor was written: this process does not
    /// know what the others have written. Call it once all of them have finished; bytes that nobody wrote are zero.
    void commit_joined() { call("commit_joined"); }

    /// Discards the file: the one that was there before stays as it was. Does nothing after a commit.
    void discard() { call("discard"); }

    /// Returns whether this process can write tensors: the file is neither committed nor discarded.
    bool is_open() const { return object_ && call("is_open").toBool(); }

  private:
    // Returns meta tensors of these dtypes and shapes.
    static Tensors empty(const TensorSpecs& specs) {
        Tensors tensors;
        for (const auto& [name, spec] : specs) {
            tensors.insert(name, at::empty(spec.shape, at::TensorOptions().dtype(spec.dtype).device(at::kMeta)));
        }
        return tensors;
    }

    template <typename... Args>
    c10::IValue call(const char* method, const Args&... args) const {
        if (!object_) {
            detail::fail("File is closed", ErrorCategory::safetensor, SFT_ERROR_CLOSED);
        }
        return detail::call_method(object_, method, args...);
    }

    detail::Object object_;
};

/// Writes parts of tensors, from any device, to a file that another process commits. `path` is the one that
/// IncrementalWriter::make_joinable has returned there. Returns once the bytes are written; if `durable`, once they are
/// on the disk. Parts that are not contiguous are copied, one at a time.
///
/// Throws Error: the other process has ended; the file has no tensor of a name, or of another dtype or shape; the file
/// cannot be written.
inline void write_joined(const std::filesystem::path& path, const std::vector<TensorPart>& parts,
                         bool durable = false) {
    std::vector<std::string> names;
    std::vector<at::Tensor> tensors;
    std::vector<std::vector<int64_t>> starts;
    for (const TensorPart& part : parts) {
        names.push_back(part.name);
        tensors.push_back(part.tensor);
        starts.push_back(part.starts);
    }
    const detail::Object save = detail::make("JoinedSave", path.native(), names, tensors, starts, durable);
    detail::call_method(save, "advance", std::numeric_limits<double>::infinity());
}

}  // namespace safetensors_torch
