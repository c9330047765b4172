#include "cpp/error.h"

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <optional>

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

// A character of a text in UTF-8.
struct Character {
    uint32_t code;
    size_t size;  // in bytes
};

// Returns the character at the beginning of `text`, or its first byte if it is not valid UTF-8.
Character first_character(std::string_view text) {
    const auto byte = [&](size_t index) { return static_cast<unsigned char>(text[index]); };
    const size_t size = byte(0) < 0xc0 ? 1 : byte(0) < 0xe0 ? 2 : byte(0) < 0xf0 ? 3 : 4;
    uint32_t code = size == 1 ? byte(0) : byte(0) & (0x7f >> size);
    for (size_t index = 1; index < size; ++index) {
        if (index == text.size() || (byte(index) & 0xc0) != 0x80) {
            return {byte(0), 1};
        }
        code = code << 6 | (byte(index) & 0x3f);
    }
    return {code, size};
}

// Returns whether a character can control a terminal or the direction of text, ends a line, or has no width. As in
// src/error.rs.
bool is_invisible(uint32_t code) {
    const auto within = [code](uint32_t begin, uint32_t end) { return begin <= code && code <= end; };
    return code < 0x20 || within(0x7f, 0x9f) || code == 0xad || code == 0x61c || code == 0x180e ||
           within(0x200b, 0x200f) || within(0x2028, 0x202e) || within(0x2060, 0x206f) || code == 0xfeff ||
           within(0xfff9, 0xfffb) || within(0xe0000, 0xe007f);
}

// Returns `text` with escapes for invisible characters; with a `quote`, for that and for backslashes too.
std::string escaped(std::string_view text, std::optional<char> quote = std::nullopt) {
    std::string out;
    for (size_t at = 0; at < text.size();) {
        const auto [code, size] = first_character(text.substr(at));
        if (quote && (text[at] == *quote || text[at] == '\\')) {
            out += '\\';
            out += text[at];
        } else if (code == '\n') {
            out += "\\n";
        } else if (code == '\r') {
            out += "\\r";
        } else if (code == '\t') {
            out += "\\t";
        } else if (is_invisible(code)) {
            char escape[12];
            const char* format = code < 0x100 ? "\\x%02x" : code < 0x10000 ? "\\u%04x" : "\\U%08x";
            std::snprintf(escape, sizeof escape, format, static_cast<unsigned>(code));
            out += escape;
        } else {
            out += text.substr(at, size);
        }
        at += size;
    }
    return out;
}

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

std::string shortened(std::string_view text) { return escaped(beginning(text)) + rest_of(text.size()); }

std::string repr(std::string_view whole) {
    const std::string_view text = beginning(whole);
    const bool has_single = text.find('\'') != std::string_view::npos;
    const char quote = has_single && text.find('"') == std::string_view::npos ? '"' : '\'';
    return quote + escaped(text, quote) + quote + rest_of(whole.size());
}

}  // namespace safetensors_torch::layer
