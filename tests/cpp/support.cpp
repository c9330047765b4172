#include "support.h"

#include <stdlib.h>
#include <torch/version.h>

#include <cstring>
#include <iterator>
#include <sstream>
#include <stdexcept>

namespace support {

TempDir::TempDir() {
    std::string pattern = (std::filesystem::temp_directory_path() / "safetensors_torch_XXXXXX").string();
    if (mkdtemp(pattern.data()) == nullptr) {
        throw std::runtime_error("no temporary directory like " + pattern);
    }
    path_ = pattern;
}

TempDir::~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
}

std::size_t TempDir::count() const {
    return static_cast<std::size_t>(
        std::distance(std::filesystem::directory_iterator(path_), std::filesystem::directory_iterator()));
}

const std::vector<Dtype>& dtypes() {
    static const std::vector<Dtype> all = {
        {at::kBool, "BOOL"},
        {at::kByte, "U8"},
        {at::kChar, "I8"},
        {at::kShort, "I16"},
        {at::kInt, "I32"},
        {at::kLong, "I64"},
        {at::kUInt16, "U16"},
        {at::kUInt32, "U32"},
        {at::kUInt64, "U64"},
        {at::kHalf, "F16"},
        {at::kBFloat16, "BF16"},
        {at::kFloat, "F32"},
        {at::kDouble, "F64"},
        {at::kComplexFloat, "C64"},
        {at::kFloat8_e4m3fn, "F8_E4M3"},
        {at::kFloat8_e5m2, "F8_E5M2"},
        {at::kFloat8_e4m3fnuz, "F8_E4M3FNUZ"},
        {at::kFloat8_e5m2fnuz, "F8_E5M2FNUZ"},
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 7
        {at::ScalarType::Float8_e8m0fnu, "F8_E8M0"},
#endif
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 8
        {at::ScalarType::Float4_e2m1fn_x2, "F4"},
#endif
    };
    return all;
}

at::Tensor make(at::IntArrayRef shape, at::ScalarType type, unsigned seed) {
    at::Tensor tensor = at::empty(shape, type);
    auto* bytes = static_cast<unsigned char*>(tensor.data_ptr());
    unsigned state = seed * 2654435761U + 1;
    for (std::size_t i = 0; i < tensor.nbytes(); ++i) {
        state = state * 1664525U + 1013904223U;
        bytes[i] = static_cast<unsigned char>(type == at::kBool ? state >> 31 : state >> 24);
    }
    return tensor;
}

bool identical(const at::Tensor& a, const at::Tensor& b) {
    return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() && a.is_contiguous() && b.is_contiguous() &&
           (a.nbytes() == 0 || std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.nbytes()) == 0);
}

bool identical(const st::Tensors& a, const st::Tensors& b) {
    if (a.size() != b.size()) {
        return false;
    }
    for (const auto& [name, tensor] : a) {
        const auto found = b.find(name);
        if (found == b.end() || !identical(tensor, found->second)) {
            return false;
        }
    }
    return true;
}

std::string read_file(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    if (!in) {
        throw std::runtime_error("cannot read " + path);
    }
    std::ostringstream out;
    out << in.rdbuf();
    return out.str();
}

void write_file(const std::string& path, const std::string& bytes) {
    std::ofstream out(path, std::ios::binary | std::ios::trunc);
    out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    if (!out.flush()) {
        throw std::runtime_error("cannot write " + path);
    }
}

std::string file_bytes(const std::string& header, const std::string& data) {
    std::string bytes;
    for (int shift = 0; shift < 64; shift += 8) {
        bytes += static_cast<char>(static_cast<std::uint64_t>(header.size()) >> shift & 0xff);
    }
    return bytes + header + data;
}

std::string error_of(const std::function<void()>& body, const char* file, int line) {
    try {
        body();
    } catch (const c10::Error& error) {
        const std::string text = error.what();
        if (has(text, "Exception raised from") || has(text, "frame #")) {
            check::report(file, line, "a backtrace in: " + text);
        }
        // Invalid indices throw torch's classes, as torch does.
        const bool is_of_index = dynamic_cast<const c10::IndexError*>(&error) != nullptr ||
                                 dynamic_cast<const c10::ValueError*>(&error) != nullptr;
        if (!is_of_index && dynamic_cast<const st::Error*>(&error) == nullptr) {
            check::report(file, line, "not a safetensors_torch::Error: " + text);
        }
        return text;
    } catch (const std::exception& error) {
        check::report(file, line, std::string("not a c10::Error: ") + error.what());
        return error.what();
    }
    check::report(file, line, "nothing was thrown");
    return "";
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace support
