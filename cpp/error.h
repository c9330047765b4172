// Errors of the C++ layer: which exception of the caller's language each is to be, and a text without a backtrace.
#pragma once

#include <c10/util/Exception.h>

#include <exception>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include "rust/cxx.h"

namespace safetensors_torch::layer {

// The exception that Python raises. C++ callers get c10::Error for each.
enum class Kind { safetensor, os, value, runtime, memory };

// What the calling thread's last failure was: kind, number in the C header (0 if it began here), errno, message.
using LastError = std::tuple<std::string, int64_t, int64_t, std::string>;
LastError last_error();

// Throws a c10::Error that says `message`. `code` is its SFT_ERROR_ number in the C header, 0 if it has none.
[[noreturn]] void fail(Kind kind, const std::string& message, int64_t code = 0);

// Throws the error in flight again, as a c10::Error without a backtrace, once it is noted as the last one.
[[noreturn]] void rethrow_clean();

// Calls `body`; whatever it throws leaves with a clean text. Every op and every method of File runs inside one.
template <typename Body>
auto guarded(Body&& body) -> decltype(body()) {
    try {
        return std::forward<Body>(body)();
    } catch (...) {
        rethrow_clean();
    }
}

// Whether torch's `error` says that there is not enough host memory, or anything else.
Kind kind_of(const c10::Error& error);

// `text` for a message: of a long one the beginning, and how long it is.
std::string shortened(std::string_view text);

// A string for a person, as Python's repr() gives it: names in messages look the same in both languages. Shortened.
std::string repr(std::string_view text);

}  // namespace safetensors_torch::layer
