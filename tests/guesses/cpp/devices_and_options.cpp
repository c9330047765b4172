#include <torch/torch.h>

#include <filesystem>
#include <iostream>
#include <safetensors_torch.hpp>
#include <string_view>

namespace st = safetensors_torch;
namespace fs = std::filesystem;

int main() {
    fs::path dir = fs::current_path();
    st::save_file({{"w", torch::ones({2, 3})}}, dir / "device.safetensors");
    std::string_view name = "device.safetensors";
    const std::string device = "cpu";

    TORCH_CHECK(st::load_file(name, "cpu")["w"].is_cpu());
    TORCH_CHECK(st::load_file(name, device)["w"].is_cpu());
    TORCH_CHECK(st::load_file(name, torch::kCPU)["w"].is_cpu());
    TORCH_CHECK(st::load_file(name, torch::Device("cpu"))["w"].is_cpu());
    TORCH_CHECK(st::load_file(dir / name, "meta").at("w").is_meta());
    if (torch::cuda::is_available()) {
        TORCH_CHECK(st::load_file(dir / name, "cuda:0")["w"].is_cuda());
    }
    st::LoadOptions options;
    options.dtype = torch::kHalf;
    TORCH_CHECK(st::load_file(name, options)["w"].scalar_type() == torch::kHalf);
    TORCH_CHECK(st::load_file(name, "cpu", options)["w"].scalar_type() == torch::kHalf);

    st::SaveOptions save;
    save.durable = true;
    st::save_file(st::load_file(name), dir / "saved.safetensors", save);
    TORCH_CHECK(st::load_file("saved.safetensors", {})["w"].sum().item<int>() == 6);

    TORCH_CHECK(st::safe_open(name).keys() == std::vector<std::string>{"w"});
    st::File file(dir / name, "cpu");
    TORCH_CHECK(file.get_tensor("w", "meta").is_meta());
    TORCH_CHECK(st::Checkpoint(name, "meta").get_tensor("w").is_meta());
    try {
        st::load_file(name, "gpu");
        TORCH_CHECK(false, "not thrown");
    } catch (const st::Error& e) {
        std::cout << e.what() << std::endl;
        TORCH_CHECK(std::string(e.what()).find("\"gpu\"") != std::string::npos);
        TORCH_CHECK(std::string(e.what()).find("cuda:0") != std::string::npos);
    }
}
