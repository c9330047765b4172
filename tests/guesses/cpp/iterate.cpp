#include <torch/torch.h>

#include <iostream>
#include <safetensors_torch.hpp>

using namespace safetensors_torch;

int main() {
    std::string path = "iterate.safetensors";
    save_file({{"w", torch::ones({2, 3})}, {"b", torch::zeros(3)}}, path);

    for (auto& [name, tensor] : load_file(path)) {
        std::cout << name << ": " << tensor.sizes() << std::endl;
    }
    auto tensors = load_file(path);
    for (const auto& [name, tensor] : tensors) {
        TORCH_CHECK(tensor.size(-1) == 3, name);
    }
    double total = 0;
    for (const auto& item : tensors) {
        total += item.second.sum().item<double>();
    }
    TORCH_CHECK(total == 6);
    for (auto it = tensors.begin(); it != tensors.end(); ++it) {
        it->second = it->second.to(torch::kHalf);
    }
    TORCH_CHECK(tensors["w"].scalar_type() == torch::kHalf);
}
