/// @file
/// Files that are written tensor by tensor. Part of safetensors_torch.hpp, which includes it.
#pragma once

#include <ATen/ATen.h>

#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "detail.hpp"
#include "types.hpp"

namespace safetensors_torch {

/// A file that is written tensor by tensor, so that no more than one of them has to be in memory: all are declared
/// first, then given in any order. The bytes are those that save_file writes for the same tensors.
///
///     safetensors_torch::IncrementalWriter writer("model.safetensors", {{"weight", {at::kFloat, {3, 4}}}});
///     writer.write("weight", tensor);
///     writer.commit();
///
/// The file is there under its name only once it was committed. When the last copy of a writer is gone without that,
/// what was there before stays as it was, and nothing is left beside it.
///
/// An IncrementalWriter is a handle: copies share one file. All methods may be called from several threads at once, so
/// that they may write different tensors at once.
class IncrementalWriter {
  public:
    /// Begins the file at `path` with these tensors: sets its space aside, and writes its header.
    ///
    /// Throws Error: a dtype that the format does not have; the name `__metadata__`; names or metadata that are not
    /// UTF-8; when the operating system refuses, also where there is no space for all of the file.
    IncrementalWriter(const std::string& path, const TensorSpecs& specs, const Metadata& metadata = {},
                      const IncrementalWriterOptions& options = {})
        : IncrementalWriter(path, empty(specs), metadata, options) {}

    /// The same with the dtypes and the shapes of `tensors`, which may be on the meta device, and are not written.
    IncrementalWriter(const std::string& path, const Tensors& tensors, const Metadata& metadata = {},
                      const IncrementalWriterOptions& options = {}) {
        const auto op = detail::find_op("safetensors_torch::_create_incremental_writer");
        object_ = detail::call_boxed(op, path, tensors, detail::to_dict(metadata), options.durable).toObject();
    }

    /// Writes one tensor, from whatever device, of the dtype and the shape that were declared. If this fails, the
    /// tensor may be given again.
    ///
    /// Throws Error: a name that was not declared; another dtype or shape; a tensor that was given already; what
    /// save_file refuses of a tensor by itself; after the commit; when the operating system refuses. That tensors
    /// share memory is not found out: each is written by itself.
    void write(const std::string& name, const at::Tensor& tensor) {
        call("write", name, tensor, std::numeric_limits<double>::infinity());
    }

    /// The names of the tensors that were not given yet, in the order of the data in the file.
    /// Throws Error in a process that was forked from the one that began the file; so do write and commit.
    std::vector<std::string> missing() const { return call("missing").to<std::vector<std::string>>(); }

    /// Puts the file under its name, as save_file does.
    ///
    /// Throws Error: tensors are missing, which it lists, or another thread is writing one, after both of which the
    /// writer is still open; after an earlier commit; when the operating system refuses.
    void commit() { call("commit"); }

    /// Gives the file up: what was there before stays as it was. Does nothing once it was committed.
    void discard() { call("discard"); }

    /// Whether tensors can be given: by this process, and it was neither committed nor discarded.
    bool is_open() const { return object_ && call("is_open").toBool(); }

  private:
    // Tensors without data, to declare others by.
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

}  // namespace safetensors_torch
