#include "cpp/error.h"

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <new>

#include "include/safetensors_torch.h"

namespace safetensors_torch::layer {
namespace {

// The most bytes of a text that a message shows.
constexpr size_t kMostShown = 200;

// The beginning of `text`, cut between two characters of its UTF-8.
std::string_view beginning(std::string_view text) {
    if (text.size() <= kMostShown) {
        return text;
    }
    size_t end = kMostShown;
    while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) {
        --end;
    }
    return text.substr(0, end);
}

// Returns what follows the beginning of a text of `size` bytes.
std::string rest_of(size_t size) { return size <= kMostShown ? "" : "... (" + std::to_string(size) + " bytes)"; }

// An error that is recorded already, for rethrow_clean().
class NotedError : public c10::Error {
  public:
    using c10::Error::Error;
};

LastError& last() {
    thread_local LastError error;
    return error;
}

const char* name_of(ErrorCategory category) {
    switch (category) {
        case ErrorCategory::os:
            return "OSError";
        case ErrorCategory::value:
            return "ValueError";
        case ErrorCategory::runtime:
            return "RuntimeError";
        case ErrorCategory::memory:
            return "MemoryError";
        case ErrorCategory::safetensor:
            break;
    }
    return "SafetensorError";
}

[[noreturn]] void note_and_throw(ErrorCategory category, int64_t code, int64_t os_error, const std::string& message) {
    last() = {name_of(category), code, os_error, message};
    throw NotedError(message, nullptr);
}

// The core's errors arrive as "CODE ERRNO MESSAGE".
[[noreturn]] void throw_core_error(const char* text) {
    char* end = nullptr;
    const int64_t code = std::strtoll(text, &end, 10);
    const int64_t os_error = std::strtoll(end, &end, 10);
    const std::string message = *end == ' ' ? end + 1 : end;
    ErrorCategory category = ErrorCategory::safetensor;
    if (code == SFT_ERROR_IO && os_error != 0) {
        category = os_error == ENOMEM ? ErrorCategory::memory : ErrorCategory::os;
    }
    note_and_throw(category, code, os_error, message);
}

}  // namespace

LastError last_error() { return last(); }

void CarriedError::rethrow() const {
    last() = noted_;
    std::rethrow_exception(error_);
}

void fail(ErrorCategory category, const std::string& message, int64_t code) {
    note_and_throw(category, code, 0, message);
}

void rethrow_clean() {
    try {
        throw;
    } catch (const NotedError&) {
        throw;
    } catch (const rust::Error& error) {
        throw_core_error(error.what());
    } catch (const c10::OutOfMemoryError&) {
        // Python has an exception class for it, and callers that free memory and retry.
        throw;
    } catch (const c10::Error& error) {
        note_and_throw(category_of(error), 0, 0, error.what_without_backtrace());
    } catch (const std::bad_alloc&) {
        note_and_throw(ErrorCategory::memory, 0, 0, "there is not enough memory");
    } catch (const std::exception& error) {
        note_and_throw(ErrorCategory::runtime, 0, 0, error.what());
    }
}

ErrorCategory category_of(const c10::Error& error) {
    // torch has no error class for this, only a text of its CPU allocator.
    const std::string_view text = error.what_without_backtrace();
    return text.find("DefaultCPUAllocator: ") == std::string_view::npos ? ErrorCategory::runtime
                                                                        : ErrorCategory::memory;
}

std::string shortened(std::string_view text) { return std::string(beginning(text)) + rest_of(text.size()); }

std::string repr(std::string_view whole) {
    const std::string_view text = beginning(whole);
    const bool has_single = text.find('\'') != std::string_view::npos;
    const char quote = has_single && text.find('"') == std::string_view::npos ? '"' : '\'';
    std::string out(1, quote);
    for (const char c : text) {
        if (c == quote || c == '\\') {
            out += '\\';
            out += c;
        } else if (c == '\n') {
            out += "\\n";
        } else if (c == '\r') {
            out += "\\r";
        } else if (c == '\t') {
            out += "\\t";
        } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
            char escape[8];
            std::snprintf(escape, sizeof escape, "\\x%02x", static_cast<unsigned char>(c));
            out += escape;
        } else {
            out += c;
        }
    }
    return out + quote + rest_of(whole.size());
}

}  // namespace safetensors_torch::layer
