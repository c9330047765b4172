// Helpers of the tests: temporary directories, tensors of every dtype, comparison by bytes, and error texts.
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

// A temporary directory, removed by the destructor.
class TempDir {
  public:
    TempDir();
    ~TempDir();
    TempDir(const TempDir&) = delete;
    TempDir& operator=(const TempDir&) = delete;

    std::string file(const std::string& name) const { return (path_ / name).string(); }
    // Returns the number of entries.
    std::size_t count() const;

  private:
    std::filesystem::path path_;
};

constexpr st::Backend kBackends[] = {st::Backend::mmap, st::Backend::pread};

// A dtype that both the format and this torch have, with its code.
struct Dtype {
    at::ScalarType type;
    const char* code;
};
const std::vector<Dtype>& dtypes();

// Returns a contiguous tensor whose bytes depend on `seed`.
at::Tensor make(at::IntArrayRef shape, at::ScalarType type, unsigned seed = 1);

// Returns whether two contiguous CPU tensors have the same dtype, shape and bytes; NaN equals itself.
bool identical(const at::Tensor& a, const at::Tensor& b);

// Returns whether names and tensors are the same, in any order.
bool identical(const st::Tensors& a, const st::Tensors& b);

std::string read_file(const std::string& path);
void write_file(const std::string& path, const std::string& bytes);

// Returns the bytes of a file with this header and data.
std::string file_bytes(const std::string& header, const std::string& data = "");

// Returns the text of the c10::Error that `body` throws. Reports a failure if it throws nothing or something else, or
// if the text contains a backtrace.
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
