// What the tests share: temporary directories, tensors of every dtype, comparison by bytes, and errors with clean
// texts.
#pragma once

#include <filesystem>
#include <fstream>
#include <functional>
#include <safetensors_torch.hpp>
#include <string>
#include <vector>

#include "check.h"

namespace support {

namespace st = safetensors_torch;

// A directory of its own for each test, gone afterwards.
class TempDir {
  public:
    TempDir();
    ~TempDir();
    TempDir(const TempDir&) = delete;
    TempDir& operator=(const TempDir&) = delete;

    std::string file(const std::string& name) const { return (path_ / name).string(); }
    // How many entries it holds.
    std::size_t count() const;

  private:
    std::filesystem::path path_;
};

constexpr st::Backend kBackends[] = {st::Backend::mmap, st::Backend::pread};

// Every dtype that the format and this torch have, with its code.
struct Dtype {
    at::ScalarType type;
    const char* code;
};
const std::vector<Dtype>& dtypes();

// A contiguous tensor whose bytes depend on `seed`.
at::Tensor make(at::IntArrayRef shape, at::ScalarType type, unsigned seed = 1);

// Same dtype, shape and bytes; NaN equals itself. Of contiguous tensors on the CPU.
bool identical(const at::Tensor& a, const at::Tensor& b);

// Returns whether names and tensors are the same, in any order.
bool identical(const st::Tensors& a, const st::Tensors& b);

std::vector<std::string> names_of(const st::Tensors& tensors);

std::string read_file(const std::string& path);
void write_file(const std::string& path, const std::string& bytes);

// The bytes of a file with this header and these data.
std::string file_bytes(const std::string& header, const std::string& data = "");

// What the c10::Error says that `body` throws. Reports a failure if it throws nothing, something else, or a text with a
// backtrace in it.
std::string error_of(const std::function<void()>& body, const char* file, int line);

bool has(const std::string& text, const std::string& part);

}  // namespace support

#define ERROR_OF(...) support::error_of([&] { __VA_ARGS__; }, __FILE__, __LINE__)

#define EXPECT_HAS(text, part)                                                                       \
    do {                                                                                             \
        const std::string text_value = (text);                                                       \
        if (!support::has(text_value, part))                                                         \
            check::report(__FILE__, __LINE__, "no \"" + std::string(part) + "\" in: " + text_value); \
    } while (false)
