#include <torch/torch.h>

#include <safetensors_torch.hpp>

int main() {
    safetensors_torch::Tensors tensors;
    tensors["weight"] = torch::randn({4, 4});
    tensors["bias"] = torch::randn({4});
    tensors.insert({"scale", torch::ones({1})});
    tensors.emplace("shift", torch::zeros({1}));
    safetensors_torch::save_file(tensors, "build_dict.safetensors", {{"format", "pt"}});

    auto loaded = safetensors_torch::load_file("build_dict.safetensors");
    TORCH_CHECK(loaded.size() == 4 && !loaded.empty());
    TORCH_CHECK(loaded["weight"].equal(tensors["weight"]));
    TORCH_CHECK(loaded.contains("bias") && loaded.count("scale") == 1);
    if (auto it = loaded.find("bias"); it != loaded.end()) {
        TORCH_CHECK(torch::equal(it->second, tensors.at("bias")));
    }
    torch::Tensor w = loaded["weight"];
    w.zero_();
    loaded.erase("bias");
    TORCH_CHECK(loaded.find("bias") == loaded.end());
    for (const std::string& key : loaded.keys()) {
        TORCH_CHECK(loaded.contains(key));
    }
    loaded.insert(tensors.begin(), tensors.end());
    TORCH_CHECK(loaded.size() == 4 && loaded["weight"].sum().item<float>() == 0);
}
