#include <torch/torch.h>

#include <cstddef>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <safetensors_torch.hpp>
#include <vector>

namespace st = safetensors_torch;

int main() {
    st::save_file({{"w", torch::ones({2, 3})}}, "bytes.safetensors");
    std::ifstream f("bytes.safetensors", std::ios::binary);
    std::vector<char> buffer((std::istreambuf_iterator<char>(f)), std::istreambuf_iterator<char>());
    TORCH_CHECK(st::load(buffer)["w"].sum().item<float>() == 6);

    std::vector<uint8_t> octets(buffer.begin(), buffer.end());
    TORCH_CHECK(st::load(octets).contains("w"));
    std::vector<std::byte> raw(buffer.size());
    std::memcpy(raw.data(), buffer.data(), buffer.size());
    st::LoadOptions options;
    options.dtype = torch::kHalf;
    TORCH_CHECK(st::load(raw, options)["w"].scalar_type() == torch::kHalf);
    std::string text(buffer.begin(), buffer.end());
    TORCH_CHECK(st::load(text, "cpu").size() == 1);
    TORCH_CHECK(st::load(std::string_view(buffer.data(), buffer.size())).size() == 1);

    std::string path = "bytes.safetensors";
    try {
        st::load(path);
        TORCH_CHECK(false, "not thrown");
    } catch (const st::Error& e) {
        std::cout << e.what() << std::endl;
        TORCH_CHECK(std::string(e.what()).find("load_file") != std::string::npos);
    }
}
