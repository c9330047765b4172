/// @file
/// The exception of safetensors_torch.hpp, which includes this.
#pragma once

#include <c10/util/Exception.h>

#include <cstdint>
#include <string>
#include <utility>

#include "../safetensors_torch.h"

namespace safetensors_torch {

/// The category of an error; each is an exception class in Python.
enum class ErrorCategory {
    /// The file is not valid safetensors, a checkpoint does not match its index, a tensor does not exist, a file is
    /// closed, or a dtype has no counterpart. SafetensorError in Python.
    safetensor,
    /// A call of the operating system failed; os_error() is its errno. OSError in Python.
    os,
    /// An argument is invalid, such as a tensor that is sparse or not contiguous. ValueError in Python.
    value,
    /// The arguments are valid, but not together: tensors share memory, or a checkpoint does not fit a module.
    /// RuntimeError in Python.
    runtime,
    /// Host memory is exhausted. MemoryError in Python.
    memory,
};

/// The exception of this library: a c10::Error whose what() has no backtrace, with a category and an error code.
///
///     try {
///         file.get_tensor("bias");
///     } catch (const safetensors_torch::Error& error) {
///         if (error.code() != SFT_ERROR_TENSOR_NOT_FOUND) throw;
///     }
class Error : public c10::Error {
  public:
    /// Constructed by this library, and by a Source or a Filesystem of the program that has a code or an errno to
    /// report.
    Error(std::string message, ErrorCategory category, sft_status code, int os_error)
        : c10::Error(std::move(message), nullptr), category_(category), code_(code), os_error_(os_error) {}

    /// Returns the category.
    ErrorCategory category() const { return category_; }

    /// Returns the SFT_ERROR_ number of safetensors_torch.h, for errors of files and the format; otherwise 0, such as
    /// for a module that does not fit.
    sft_status code() const { return code_; }

    /// Returns the errno for ErrorCategory::os (ENOENT, ENOSPC, ...), ENOMEM for ErrorCategory::memory; otherwise 0.
    int os_error() const { return os_error_; }

  private:
    ErrorCategory category_;
    sft_status code_;
    int os_error_;
};

}  // namespace safetensors_torch
