/// @file
/// The error that the functions of safetensors_torch.hpp throw. Part of it: it includes this.
#pragma once

#include <c10/util/Exception.h>

#include <cstdint>
#include <string>
#include <utility>

#include "../safetensors_torch.h"

namespace safetensors_torch {

/// Whose fault an error is, roughly; in Python each is an exception class.
enum class ErrorCategory {
    /// The file is not valid safetensors, a checkpoint does not fit its index, there is no such tensor, a file is
    /// closed, or a dtype has no counterpart. SafetensorError in Python.
    safetensor,
    /// The operating system refused; os_error() is its errno. OSError in Python.
    os,
    /// An argument that cannot be meant so, such as a tensor that is sparse or not contiguous. ValueError in Python.
    value,
    /// The arguments are valid one by one, but not together: tensors that share memory, a module and a checkpoint that
    /// do not fit. RuntimeError in Python.
    runtime,
    /// No host memory is left. MemoryError in Python.
    memory,
};

/// What the functions of this library throw: a c10::Error whose what() is a text for a person, without a backtrace, and
/// that a program can tell apart.
///
///     try {
///         file.get_tensor("bias");
///     } catch (const safetensors_torch::Error& error) {
///         if (error.code() != SFT_ERROR_TENSOR_NOT_FOUND) throw;
///     }
class Error : public c10::Error {
  public:
    /// An error as the library noted it.
    Error(std::string message, ErrorCategory category, sft_status code, int os_error)
        : c10::Error(std::move(message), nullptr), category_(category), code_(code), os_error_(os_error) {}

    /// Whose fault it is.
    ErrorCategory category() const { return category_; }

    /// The SFT_ERROR_ number of safetensors_torch.h, for what the format and its files are about; otherwise 0, such as
    /// for a module that does not fit.
    sft_status code() const { return code_; }

    /// The errno of an error of ErrorCategory::os (ENOENT, ENOSPC, ...), ENOMEM of ErrorCategory::memory; otherwise 0.
    int os_error() const { return os_error_; }

  private:
    ErrorCategory category_;
    sft_status code_;
    int os_error_;
};

}  // namespace safetensors_torch
