// Errors of the layer: the exception class in Python, and a text without a backtrace.
#pragma once

#include <c10/util/Exception.h>

#include <exception>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include "rust/cxx.h"

namespace safetensors_torch::layer {

// The exception class in Python. C++ programs catch a c10::Error; the header makes a safetensors_torch::Error of it.
enum class ErrorCategory { safetensor, os, value, runtime, memory };

// The last failure of the calling thread: Python's exception class, number in the C header (0 for errors of this
// layer), errno, message.
using LastError = std::tuple<std::string, int64_t, int64_t, std::string>;
LastError last_error();

// An error of one thread that others throw, which becomes the last error of each.
class CarriedError {
  public:
    // The exception that is being handled, which guarded() has thrown.
    static CarriedError current() { return {std::current_exception(), last_error()}; }

    [[noreturn]] void rethrow() const;

  private:
    CarriedError(std::exception_ptr error, LastError noted) : error_(std::move(error)), noted_(std::move(noted)) {}

    std::exception_ptr error_;
    LastError noted_;
};

// Throws a c10::Error with `message`. `code` is its SFT_ERROR_ number in the C header, 0 if it has none.
[[noreturn]] void fail(ErrorCategory category, const std::string& message, int64_t code = 0);

// Records the current exception as the last error, and throws it as a c10::Error without a backtrace.
[[noreturn]] void rethrow_clean();

// Returns body(); its exceptions become c10::Errors without a backtrace. Every op and every method is guarded.
template <typename Body>
auto guarded(Body&& body) -> decltype(body()) {
    try {
        return std::forward<Body>(body)();
    } catch (...) {
        rethrow_clean();
    }
}

// Returns ErrorCategory::memory if torch's `error` is about host memory, otherwise ErrorCategory::runtime.
ErrorCategory category_of(const c10::Error& error);

// Returns `text` for a message: with escapes for invisible characters; if it is long, its beginning and its length.
std::string shortened(std::string_view text);

// Returns Python's repr() of a string, shortened: messages quote names the same way in both languages.
std::string repr(std::string_view text);

}  // namespace safetensors_torch::layer
