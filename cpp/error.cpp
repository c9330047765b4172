#include "cpp/error.h"

#include <cerrno>
#include <cstdio>
#include <cstdlib>

#include "include/safetensors_torch.h"

namespace safetensors_torch {
namespace {

// Thrown by fail(), so that rethrow_clean() leaves what fail() noted alone.
class NotedError : public c10::Error {
  public:
    using c10::Error::Error;
};

LastError& last() {
    thread_local LastError error;
    return error;
}

const char* name_of(Kind kind) {
    switch (kind) {
        case Kind::os:
            return "OSError";
        case Kind::value:
            return "ValueError";
        case Kind::runtime:
            return "RuntimeError";
        case Kind::memory:
            return "MemoryError";
        case Kind::safetensor:
            break;
    }
    return "SafetensorError";
}

[[noreturn]] void note_and_throw(Kind kind, int64_t code, int64_t os_error, const std::string& message) {
    last() = {name_of(kind), code, os_error, message};
    throw NotedError(message, nullptr);
}

// The core's errors arrive as "CODE ERRNO MESSAGE".
[[noreturn]] void throw_core_error(const char* text) {
    char* end = nullptr;
    const int64_t code = std::strtoll(text, &end, 10);
    const int64_t os_error = std::strtoll(end, &end, 10);
    const std::string message = *end == ' ' ? end + 1 : end;
    Kind kind = Kind::safetensor;
    if (code == SFT_ERROR_IO && os_error != 0) {
        kind = os_error == ENOMEM ? Kind::memory : Kind::os;
    }
    note_and_throw(kind, code, os_error, message);
}

}  // namespace

LastError last_error() { return last(); }

void fail(Kind kind, const std::string& message, int64_t code) { note_and_throw(kind, code, 0, message); }

void rethrow_clean() {
    try {
        throw;
    } catch (const NotedError&) {
        throw;
    } catch (const rust::Error& error) {
        throw_core_error(error.what());
    } catch (const c10::OutOfMemoryError&) {
        // Has an exception of its own in Python, and callers that free memory and try again.
        throw;
    } catch (const c10::Error& error) {
        note_and_throw(Kind::runtime, 0, 0, error.what_without_backtrace());
    } catch (const std::exception& error) {
        note_and_throw(Kind::runtime, 0, 0, error.what());
    }
}

std::string repr(std::string_view text) {
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
    return out + quote;
}

}  // namespace safetensors_torch
